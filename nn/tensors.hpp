// What the autograd functions share: tensors as views, buffers as tensors, tensors in error messages.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

inline std::string describe(const at::Tensor& tensor) {
    if (!tensor.defined()) return "an undefined tensor";
    std::ostringstream text;
    text << tensor.scalar_type() << " [";
    for (index d = 0; d < tensor.dim(); ++d) text << (d ? "," : "") << tensor.size(d);
    text << "] on " << tensor.device();
    return text.str();
}

/// [steps,batch,width] of a contiguous tensor whose last dimension is the width, with ones put in front.
template <class T>
View<T> view(const at::Tensor& tensor) {
    const index dimensions = tensor.dim();
    const Shape shape{dimensions > 2 ? tensor.size(0) : 1, tensor.size(dimensions - 2), tensor.size(dimensions - 1)};
    return View<T>(tensor.data_ptr<std::remove_const_t<T>>(), shape);
}

/// Detached, with a contiguous last dimension, copied only where it must be.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
    const at::Tensor detached = tensor.detach();
    return detached.stride(-1) == 1 || detached.size(-1) <= 1 ? detached : detached.contiguous();
}

/// Throws InvalidArgument unless `tensor` has this shape and type, on the CPU.
inline void require(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type) {
    if (tensor.defined() && tensor.sizes() == sizes && tensor.scalar_type() == type && tensor.device().is_cpu()) return;
    std::ostringstream expected;
    expected << type << " " << sizes << " on the CPU";
    throw InvalidArgument(name, expected.str(), describe(tensor));
}

/// A tensor that owns the buffer from here on: nothing is copied.
template <class T>
at::Tensor adopt(Buffer<T>& buffer, at::IntArrayRef sizes, const at::TensorOptions& options) {
    auto owner = std::make_shared<Buffer<T>>(std::move(buffer));
    return at::from_blob(
        owner->data(), sizes, [owner](void*) {}, options);
}

}  // namespace deeppcr::nn
