// What differs between LibTorch 1.13 and 2.x, in one place: here, and in libtorch_1.cpp or libtorch_2.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <sstream>
#include <type_traits>

#include <deeppcr/execution.hpp>

namespace deeppcr::nn {

/// LibTorch's current stream of a GPU. Throws NoDevice where this LibTorch is too old to say.
CUstream_st* current_cuda_stream(c10::Device device);

/// Bytes that the current GPU has available, those included that LibTorch holds and does not use; 0: unknown.
index available_cuda_memory(c10::Device device);

/// While it lives, and where `on`, LibTorch's autocast computes matrix products on the device in bfloat16, in this
/// thread.
class Bfloat16Products {
public:
    Bfloat16Products(c10::Device device, bool on);
    ~Bfloat16Products();
    Bfloat16Products(const Bfloat16Products&) = delete;
    Bfloat16Products& operator=(const Bfloat16Products&) = delete;

private:
    c10::DeviceType device_;
    bool on_, was_on_ = false;
    c10::ScalarType type_before_ = c10::ScalarType::BFloat16;
};

/// Under which key an optimiser keeps the state of a parameter: its address, which 1.13 writes out as text.
template <class Optimiser>
auto state_key(Optimiser& optimiser, const at::Tensor& parameter) {
    using Key = typename std::decay_t<decltype(optimiser.state())>::key_type;
    if constexpr (std::is_pointer_v<Key>) {
        return static_cast<Key>(parameter.unsafeGetTensorImpl());
    } else {
        std::ostringstream address;
        address << parameter.unsafeGetTensorImpl();
        return address.str();
    }
}

}  // namespace deeppcr::nn
