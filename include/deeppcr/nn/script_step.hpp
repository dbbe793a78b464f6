// A step x_t = f(x_{t-1}, u_t) from a TorchScript file. No LibTorch in here.
#pragma once

#include <filesystem>
#include <memory>

#include <deeppcr/recurrence.hpp>

namespace deeppcr::nn {

/// See ScriptRecurrence (script.hpp). inputs: [steps, batch, width of u]; where the module takes none, only the first
/// two sizes count. initial: x_0, [1, batch, width]. Both are copied. Throws InvalidArgument, FileError.
template <class T>
std::unique_ptr<Recurrence<T>> script_recurrence(const std::filesystem::path& file, View<const T> inputs,
                                                 View<const T> initial);

}  // namespace deeppcr::nn
