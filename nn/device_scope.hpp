// Where calls of the core run: on their tensors' device, in its current stream, with memory of LibTorch's.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <string>

#include <deeppcr/evaluate.hpp>
#include <deeppcr/group.hpp>

namespace deeppcr::nn {

/// The device of this name: cpu, cuda or cuda:<number>. With a group, whose ranks all call this, cuda is a GPU of this
/// rank's own as long as its machine has as many as ranks. Throws InvalidArgument, NoDevice.
at::Device device_of(const std::string& name, Group* group = nullptr);

/// What MemorySource takes: uninitialised tensors of LibTorch's allocator for this device, which `adopt` hands on.
MemorySource::Allocate allocate_tensors(c10::Device device);

/// While it lives, the device of a tensor is the current one and, where that is a GPU, the core's memory there comes
/// from LibTorch's caching allocator, which reuses what has been freed in the order of the stream.
class DeviceScope {
public:
    /// Throws NoDevice where the core cannot run there.
    explicit DeviceScope(const at::Tensor& tensor);

    /// `given`, to be run here: on a GPU in its current stream, and without a workspace of the caller's. Throws
    /// InvalidArgument where `given` asks for a GPU and the tensors are not on one.
    Options options(Options given) const;
    /// Likewise, for what may be solved in windows, forward or backward: all but cells. What LibTorch's cache holds
    /// unused counts as available to them.
    Options options_of_windows(Options given) const;
    Device device() const { return is_cuda_ ? Device::cuda(device_.index()) : Device::host(); }

private:
    c10::Device device_;
    bool is_cuda_;
    c10::DeviceGuard guard_;
    CUstream_st* stream_ = nullptr;
    std::optional<MemorySource> memory_;
};

}  // namespace deeppcr::nn
