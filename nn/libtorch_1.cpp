// LibTorch 1.13: Debian's, which is built without CUDA.
#include <ATen/autocast_mode.h>

#include "nn/libtorch.hpp"

namespace deeppcr::nn {

CUstream_st* current_cuda_stream(c10::Device device) {
    throw NoDevice("tensors on " + device.str() + " need LibTorch 2, this is 1.13");
}

index available_cuda_memory(c10::Device) { return 0; }

Bfloat16Products::Bfloat16Products(c10::Device device, bool on) : device_(device.type()), on_(on) {
    if (!on_) return;
    was_on_ = at::autocast::is_cpu_enabled();
    type_before_ = at::autocast::get_autocast_cpu_dtype();
    at::autocast::set_cpu_enabled(true);
    at::autocast::set_autocast_cpu_dtype(at::kBFloat16);
}

Bfloat16Products::~Bfloat16Products() {
    if (!on_) return;
    at::autocast::set_cpu_enabled(was_on_);
    at::autocast::set_autocast_cpu_dtype(type_before_);
    at::autocast::clear_cache();  // of weights in bfloat16, which are other ones after the next step
}

}  // namespace deeppcr::nn
