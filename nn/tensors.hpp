// What the autograd functions share: tensors as views, buffers as tensors, tensors in error messages.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

inline std::string type_and_shape(const at::Tensor& tensor) {
    std::ostringstream text;
    text << tensor.scalar_type() << " [";
    for (index d = 0; d < tensor.dim(); ++d) text << (d ? "," : "") << tensor.size(d);
    text << "]";
    return text.str();
}

inline std::string describe(const at::Tensor& tensor) {
    if (!tensor.defined()) return "an undefined tensor";
    std::ostringstream text;
    text << type_and_shape(tensor) << " on " << tensor.device();
    return text.str();
}

/// [steps,batch,width] of a contiguous tensor whose last dimension is the width, with ones put in front.
template <class T>
View<T> view(const at::Tensor& tensor) {
    const index dimensions = tensor.dim();
    const Shape shape{dimensions > 2 ? tensor.size(0) : 1, tensor.size(dimensions - 2), tensor.size(dimensions - 1)};
    return View<T>(static_cast<T*>(tensor.data_ptr()), shape);
}

/// Detached, with a contiguous last dimension, copied only where it must be.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
    const at::Tensor detached = tensor.detach();
    return detached.stride(-1) == 1 || detached.size(-1) <= 1 ? detached : detached.contiguous();
}

/// Throws InvalidArgument unless `tensor` has this shape, type and device.
inline void require(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type,
                    at::Device device) {
    if (tensor.defined() && tensor.sizes() == sizes && tensor.scalar_type() == type && tensor.device() == device)
        return;
    std::ostringstream expected;
    expected << type << " " << sizes << " on " << device;
    throw InvalidArgument(name, expected.str(), describe(tensor));
}

inline bool is_on_cpu_or_cuda(const at::Tensor& tensor) { return tensor.is_cpu() || tensor.is_cuda(); }

inline bool is_16_bit(at::ScalarType type) { return type == at::kBFloat16 || type == at::kHalf; }

/// Types that the functions of nn/ take: those of the core, and numbers of 16 bits, which stand for floats.
inline bool is_real(at::ScalarType type) { return type == at::kFloat || type == at::kDouble || is_16_bit(type); }

/// Whether the core cannot store a cell's numbers as these are: of 16 bits only GPUs can.
inline bool must_be_widened(const at::Tensor& gates) { return is_16_bit(gates.scalar_type()) && !gates.is_cuda(); }

/// `tensor` as float, differentiably; undefined stays so. It goes with tensors of `type`, which is of 16 bits: throws
/// InvalidArgument where it is of another type, but float.
inline at::Tensor widen(const char* name, const at::Tensor& tensor, at::ScalarType type) {
    if (!tensor.defined()) return tensor;
    if (tensor.scalar_type() != type && tensor.scalar_type() != at::kFloat)
        throw InvalidArgument(name, std::string(c10::toString(type)) + " or Float", describe(tensor));
    return tensor.to(at::kFloat);
}

/// Releases memory that was taken from LibTorch as a tensor of bytes.
struct TensorMemory {
    at::Tensor bytes;
    void operator()(void*) { bytes.reset(); }
};

/// A tensor that owns the buffer from here on: nothing is copied. Memory that came from LibTorch goes back to it whole,
/// so that its allocator knows of streams that use the tensor.
template <class T>
at::Tensor adopt(Buffer<T>& buffer, at::IntArrayRef sizes, const at::TensorOptions& options) {
    if (const auto* const memory = std::get_deleter<TensorMemory>(buffer.memory()))
        return at::empty({0}, options).set_(memory->bytes.storage(), 0, sizes);
    auto owner = std::make_shared<Buffer<T>>(std::move(buffer));
    return at::from_blob(
        owner->data(), sizes, [owner](void*) {}, options);
}

}  // namespace deeppcr::nn
