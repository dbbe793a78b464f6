// Kernel launches whose failures become exceptions.
#pragma once

#include <cstddef>

#include <deeppcr/device.cuh>

namespace deeppcr::cuda {

/// Throws OutOfMemory, NoDevice or Error, which say what was being done.
void check(cudaError_t error, const char* doing);

constexpr std::size_t granted_without_asking = std::size_t(48) << 10;  // bytes of shared memory

/// Lets a kernel have so much dynamic shared memory on the current GPU; asks CUDA once for each kernel and more memory.
void allow_shared_memory(const void* kernel, std::size_t bytes);

/// What a launch needs besides the kernel and its arguments.
struct Launch {
    dim3 blocks, threads;
    std::size_t shared_bytes = 0;
    cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
void launch(const Launch& where, void (*kernel)(Parameters...), Arguments&&... arguments) {
    if (where.shared_bytes > granted_without_asking)
        allow_shared_memory(reinterpret_cast<const void*>(kernel), where.shared_bytes);
    cudaLaunchConfig_t config{};
    config.gridDim = where.blocks;
    config.blockDim = where.threads;
    config.dynamicSmemBytes = where.shared_bytes;
    config.stream = where.stream;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...), "launching a kernel");
}

/// How many blocks of a kernel a multiprocessor holds at once.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, std::size_t shared_bytes) {
    if (shared_bytes > granted_without_asking) allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "looking at a kernel");
    return blocks;
}

constexpr int plain_threads = 256;  // of a block whose threads know nothing of each other

__device__ inline index this_thread() { return index(blockIdx.x) * blockDim.x + threadIdx.x; }

/// The larger of the lanes' values goes to `target`: by one of them where all have the same target. All lanes call.
__device__ inline void raise_from_warp(unsigned long long* target, unsigned long long value) {
    const auto address = reinterpret_cast<unsigned long long>(target);
    const bool alike = __all_sync(~0U, __shfl_sync(~0U, address, 0) == address) != 0;
    if (alike)
        for (int d = 16; d > 0; d /= 2) {
            const unsigned long long other = __shfl_xor_sync(~0U, value, d);
            value = other > value ? other : value;
        }
    if ((!alike || threadIdx.x % 32 == 0) && target != nullptr && value > 0) atomicMax(target, value);
}

/// Blocks of `threads`, or as many warps as are enough, one thread for each of `count`. Throws InvalidArgument where
/// they are more than a grid has.
Launch one_each(index count, cudaStream_t stream, int threads = plain_threads);

}  // namespace deeppcr::cuda
