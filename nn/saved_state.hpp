// What a checkpoint file holds: tensors by their names, and numbers and choices as text.
#pragma once

#include <ATen/core/Tensor.h>

#include <charconv>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <utility>

#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/names.hpp>
#include <files/error.hpp>

namespace deeppcr::nn {

using Metadata = std::map<std::string, std::string>;

using SavedTensors = std::map<std::string, at::Tensor>;

struct SavedState {
    Metadata metadata;  ///< "format" says whose it is
    SavedTensors tensors;
};

/// The tensor of this name, of the type and shape of `like`. Throws FileError, which names the file.
const at::Tensor& find(const std::filesystem::path& path, const SavedTensors& tensors, const std::string& name,
                       const at::Tensor& like);

/// A safetensors file, atomically, with a checksum as metadata. Throws FileError.
void write_state(const std::filesystem::path& path, const SavedState& state);

/// Throws FileError where the file is corrupt, by its checksum where it has one, or of another format.
SavedState read_state(const std::filesystem::path& path, const std::string& format);
/// The metadata "format" of a safetensors file, empty where it has none. Throws FileError.
std::string format_of(const std::filesystem::path& path);

/// A file with the latest state, and <path>.previous with the one before, each with a checksum of all that is in it.
class SavedStates {
public:
    explicit SavedStates(std::filesystem::path path) : path_(std::move(path)) {}

    /// The state that this object has saved or loaded last becomes the one before; another file is replaced. At any
    /// moment a whole state is there. Throws FileError.
    void save(const SavedState& state);
    /// The latest state that is whole; note(text) says when that is not the latest. Throws FileError, about the
    /// latest, where neither is.
    SavedState load(const std::string& format, const std::function<void(const std::string&)>& note);
    /// Likewise of the file `from`, which may be this one: what a training goes on from.
    SavedState load_from(const std::filesystem::path& from, const std::string& format,
                         const std::function<void(const std::string&)>& note);

private:
    std::filesystem::path path_;
    bool whole_ = false;  ///< the latest is known to be
};

/// A number, or a choice by its name.
template <class Value, class... Names>
void put_field(Metadata& metadata, const char* key, const Value& value, const Names&... names) {
    if constexpr (sizeof...(names) > 0) {
        metadata[key] = name_of(names..., value);
    } else {
        char text[64];  // the shortest that reads back to the same bits
        metadata[key] = {text, std::to_chars(text, text + sizeof text, value).ptr};
    }
}

/// Throws FileError where the field is missing or is none.
template <class Value, class... Names>
void get_field(const std::filesystem::path& path, const Metadata& metadata, const char* key, Value& value,
               const Names&... names) {
    const auto found = metadata.find(key);
    if (found == metadata.end())
        throw FileError(path, std::string("metadata \"") + key + "\"", "none: not a checkpoint of deeppcr train");
    const std::string& written = found->second;
    if constexpr (sizeof...(names) > 0) {
        try {
            value = choice_of(names..., key, written);
        } catch (const InvalidArgument& problem) {
            throw FileError(path, problem.what());
        }
    } else {
        const auto [end, problem] = std::from_chars(written.data(), written.data() + written.size(), value);
        if (problem != std::errc() || end != written.data() + written.size())
            throw FileError(path, std::string("a number as metadata \"") + key + '"', '"' + written + '"');
    }
}

/// For a function that lists fields, visit(key, field) or visit(key, field, names): writes each as metadata.
inline auto put_into(Metadata& metadata) {
    return [&metadata](const char* key, const auto&... field) { put_field(metadata, key, field...); };
}
/// Likewise: reads each.
inline auto get_from(const std::filesystem::path& path, const Metadata& metadata) {
    return [&path, &metadata](const char* key, auto&... field) { get_field(path, metadata, key, field...); };
}

/// Throws InvalidArgument where a field of a checkpoint, but for `free`, is not what is wanted.
void check_continues(const Metadata& wanted, const Metadata& saved, const std::string& free = {});

inline constexpr Names<bool, 2> yes_or_no{{{"no", false}, {"yes", true}}};

/// Lists the fields of `evaluation` that a checkpoint keeps.
template <class Evaluation, std::size_t methods, class Visit>
void visit_evaluation(Evaluation& evaluation, const Names<Method, methods>& names, const Visit& visit) {
    visit("method", evaluation.method, names);
    visit("surrogate", evaluation.surrogate, surrogate_names);
    visit("reduction", evaluation.reduction, reduction_names);
    visit("chunk", evaluation.chunk);
    visit("guess", evaluation.guess, guess_names);
    visit("tolerance", evaluation.tolerance);
    visit("absolute_tolerance", evaluation.absolute_tolerance);
    visit("relative_tolerance", evaluation.relative_tolerance);
    visit("window", evaluation.window);
    visit("max_iterations", evaluation.max_iterations);
    visit("on_failure", evaluation.on_failure, on_failure_names);
    visit("memory_limit", evaluation.memory_limit);
    visit("backend", evaluation.execution.backend, backend_names);
    visit("threads", evaluation.execution.threads);
}

}  // namespace deeppcr::nn
