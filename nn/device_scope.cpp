#include "nn/device_scope.hpp"

#include <ATen/Context.h>
#include <torch/version.h>

#include <algorithm>
#include <string>

#include "nn/libtorch.hpp"
#include "nn/tensors.hpp"

namespace deeppcr::nn {

at::Device device_of(const std::string& name, Group* group) {
    at::Device device = at::kMeta;
    const int number = group != nullptr ? group->rank_on_machine() : 0;
    try {
        device = at::Device(name);
    } catch (const c10::Error&) {  // no device has this name
    }
    if (!device.is_cpu() && !device.is_cuda()) throw InvalidArgument("device", "cpu, cuda or cuda:<number>", name);
    if (device.is_cuda() && !at::hasCUDA())
        throw NoDevice("device " + name + ": this LibTorch, " TORCH_VERSION ", has no GPU to use");
    if (const std::string problem = cuda_problem(); device.is_cuda() && !problem.empty())
        throw NoDevice("device " + name + ": there is no GPU to use: " + problem);
    if (group == nullptr || !device.is_cuda() || device.has_index()) return device;
    return {at::kCUDA, c10::DeviceIndex(std::size_t(number) % cuda_devices().size())};
}

MemorySource::Allocate allocate_tensors(c10::Device device) {
    return [device](index bytes) -> std::shared_ptr<void> {
        try {
            const at::Tensor tensor =
                at::empty({std::max<index>(bytes, 1)}, at::TensorOptions(device).dtype(at::kByte));
            return {tensor.data_ptr(), TensorMemory{tensor}};
        } catch (const c10::OutOfMemoryError& error) {
            throw OutOfMemory(error.what_without_backtrace());
        }
    };
}

DeviceScope::DeviceScope(const at::Tensor& tensor)
    : device_(tensor.device()), is_cuda_(device_.is_cuda()), guard_(device_) {
    if (!is_cuda_) return;
    if (const std::string problem = cuda_problem(); !problem.empty())
        throw NoDevice("tensors on " + device_.str() + ", but there is no GPU to use: " + problem);
    stream_ = current_cuda_stream(device_);
    memory_.emplace(device(), allocate_tensors(device_), stream_);
}

Options DeviceScope::options(Options given) const {
    if (!is_cuda_ && given.execution.backend == Backend::cuda)
        throw InvalidArgument("evaluation.execution.backend", "cpu or reference, for tensors on the CPU", "cuda");
    if (!is_cuda_) return given;
    given.execution.backend = Backend::cuda;
    given.execution.stream = stream_;
    given.workspace = nullptr;
    return given;
}

Options DeviceScope::options_of_windows(Options given) const {
    given = options(given);
    if (is_cuda_ && given.method != Method::sequential && given.memory_limit == 0)
        given.memory_limit = available_cuda_memory(device_) / 2;
    return given;
}

}  // namespace deeppcr::nn
