// LibTorch 2.x; what it offers without CUDA's headers.
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

}  // namespace deeppcr::nn
