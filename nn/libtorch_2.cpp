// LibTorch 2.x; what it offers without CUDA's headers.
#include <ATen/autocast_mode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "nn/libtorch.hpp"

namespace deeppcr::nn {

CUstream_st* current_cuda_stream(c10::Device device) {
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    return static_cast<CUstream_st*>(stream.native_handle());
}

index available_cuda_memory(c10::Device device) {
    c10::DeviceAllocator* const allocator = c10::getDeviceAllocator(device.type());
    const auto stats = allocator->getDeviceStats(device.index());
    const auto sum = std::size_t(c10::CachingDeviceAllocator::StatType::AGGREGATE);
    return index(allocator->getMemoryInfo(device.index()).first) + stats.reserved_bytes[sum].current -
           stats.allocated_bytes[sum].current;
}

Bfloat16Products::Bfloat16Products(c10::Device device, bool on) : device_(device.type()), on_(on) {
    if (!on_) return;
    was_on_ = at::autocast::is_autocast_enabled(device_);
    type_before_ = at::autocast::get_autocast_dtype(device_);
    at::autocast::set_autocast_enabled(device_, true);
    at::autocast::set_autocast_dtype(device_, at::kBFloat16);
}

Bfloat16Products::~Bfloat16Products() {
    if (!on_) return;
    at::autocast::set_autocast_enabled(device_, was_on_);
    at::autocast::set_autocast_dtype(device_, type_before_);
    at::autocast::clear_cache();  // of weights in bfloat16, which are other ones after the next step
}

}  // namespace deeppcr::nn
