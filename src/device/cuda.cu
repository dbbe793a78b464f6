#include "device/cuda.hpp"

#include <limits>

#include <deeppcr/launch.cuh>

namespace deeppcr {
namespace cuda {

void check(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report it again
    const std::string text = std::string("CUDA, ") + doing + ": " + cudaGetErrorString(error);
    if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorInvalidDevice)
        throw NoDevice(text);
    throw Error(text);
}

Launch one_each(index count, cudaStream_t stream, int threads) {
    const index blocks = (count + threads - 1) / threads;
    if (blocks > std::numeric_limits<int>::max())
        throw InvalidArgument("shape", "fewer than 2^31 blocks of threads", std::to_string(blocks));
    return {dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, stream};
}

}  // namespace cuda

namespace device {

using cuda::check;

namespace {

bool on_gpu(const void* memory) {
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

/// The GPU that was current before is so again at its end.
class Current {
public:
    explicit Current(int ordinal) {
        check(cudaGetDevice(&before_), "asking for the current GPU");
        if (ordinal != before_) check(cudaSetDevice(ordinal), "choosing a GPU");
    }
    ~Current() { cudaSetDevice(before_); }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

private:
    int before_ = 0;
};

}  // namespace

void require_gpu() {
    if (const std::string problem = cuda_problem(); !problem.empty())
        throw NoDevice("there is no GPU to use: " + problem);
}

Device current_gpu() {
    require_gpu();
    int ordinal = 0;
    check(cudaGetDevice(&ordinal), "asking for the current GPU");
    return Device::cuda(ordinal);
}

int multiprocessors() {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_gpu().ordinal()), "looking at a GPU");
    return count;
}

void require_on_gpu(const std::string& name, const void* memory) {
    if (!on_gpu(memory)) throw InvalidArgument(name, "memory of a GPU, for Backend::cuda", "main memory");
}

bool is_on_gpu(const void* memory) { return memory != nullptr && cuda_problem().empty() && on_gpu(memory); }

std::shared_ptr<void> allocate_on_gpu(index bytes, Device device) {
    require_gpu();
    const Current current(device.ordinal());
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, std::size_t(bytes > 0 ? bytes : 1));
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        throw OutOfMemory("cannot allocate " + std::to_string(bytes) + " bytes on GPU " +
                          std::to_string(device.ordinal()) + ", which has " + std::to_string(available_on_gpu()) +
                          " available");
    }
    check(error, "allocating memory");
    return {memory, [](void* pointer) { cudaFree(pointer); }};
}

std::shared_ptr<void> allocate_in_stream(index bytes, CUstream_st* stream) {
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, std::size_t(bytes > 0 ? bytes : 1), stream), "allocating memory");
    return {memory, [stream](void* pointer) { cudaFreeAsync(pointer, stream); }};
}

bool copy_by_gpu(void* to, const void* from, index bytes) {
    if (bytes == 0 || !cuda_problem().empty() || (!on_gpu(to) && !on_gpu(from))) return bytes == 0;
    check(cudaMemcpyAsync(to, from, std::size_t(bytes), cudaMemcpyDefault, nullptr), "copying");
    synchronise(nullptr);
    return true;
}

void fill_zeros_on_gpu(void* data, index bytes) {
    if (bytes == 0) return;
    check(cudaMemsetAsync(data, 0, std::size_t(bytes), nullptr), "filling with zeros");
    synchronise(nullptr);
}

void copy_to_gpu(void* to, const void* from, index bytes, CUstream_st* stream) {
    check(cudaMemcpyAsync(to, from, std::size_t(bytes), cudaMemcpyHostToDevice, stream), "copying to a GPU");
}

void copy_from_gpu(void* to, const void* from, index bytes, CUstream_st* stream) {
    check(cudaMemcpyAsync(to, from, std::size_t(bytes), cudaMemcpyDeviceToHost, stream), "copying from a GPU");
}

void fill_bytes(void* data, int value, index bytes, CUstream_st* stream) {
    check(cudaMemsetAsync(data, value, std::size_t(bytes), stream), "filling memory");
}

index available_on_gpu() {
    std::size_t available = 0, total = 0;
    check(cudaMemGetInfo(&available, &total), "asking for memory");
    return index(available);
}

void synchronise(CUstream_st* stream) { check(cudaStreamSynchronize(stream), "running"); }

}  // namespace device

std::string cuda_problem() {
    int count = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(error);
    }
    return count > 0 ? "" : "no CUDA-capable device is detected";
}

std::vector<std::string> cuda_devices() {
    std::vector<std::string> names;
    int count = 0;
    if (cuda_problem().empty()) cuda::check(cudaGetDeviceCount(&count), "counting GPUs");
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        cudaDeviceProp properties{};
        cuda::check(cudaGetDeviceProperties(&properties, ordinal), "looking at a GPU");
        names.emplace_back(properties.name);
    }
    return names;
}

}  // namespace deeppcr
