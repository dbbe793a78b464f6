// CUDA C++ on the host, as far as this library uses it: the kernels' sources compile as ordinary C++ where this file
// is found in the place of CUDA's own. Threads are fibers that take turns in an order drawn at random (emulation.cpp);
// several blocks are in flight at once. Shared memory is exactly as large as was asked for, device memory starts as
// NaN, so that the sanitizers and the tests see what a GPU would hide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulation {

/// Of the block of the fiber that runs.
unsigned char* shared_memory();

/// Lets other threads run. A kernel whose threads only wait for each other is reported, and the program ends.
void yield();
void wait_for_block();
/// The number of threads of the block whose `value` is not 0, once all have called.
int count_in_block(int value);

/// All lanes of `mask` exchange 16 bytes; returns where lane l's lie, at 16 * l, valid until the next exchange.
const unsigned char* exchange_in_warp(unsigned mask, const void* value, std::size_t bytes);
int lane();

void run(dim3 blocks, dim3 threads, std::size_t shared_bytes, const std::function<void()>& kernel);

/// What is emulated; for tests.
struct Machine {
    int devices = 1, multiprocessors = 3;
    std::size_t memory = std::size_t(1) << 30, used = 0;
    unsigned seed = 1;       ///< of the order in which threads take turns
    int blocks_at_once = 4;  ///< in flight
    long launches = 0, allocations = 0;
};
Machine& machine();

}  // namespace emulation

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

inline void __syncthreads() { emulation::wait_for_block(); }
inline int __syncthreads_or(int value) { return emulation::count_in_block(value) > 0; }
inline int __syncthreads_count(int value) { return emulation::count_in_block(value); }
inline void __syncwarp(unsigned mask = ~0U) { emulation::exchange_in_warp(mask, &mask, sizeof mask); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulation::yield(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    static_assert(sizeof(T) <= 16);
    const int first = emulation::lane() / width * width;
    const unsigned char* const all = emulation::exchange_in_warp(mask, &value, sizeof value);
    T result;
    std::memcpy(&result, all + 16 * (first + ((source % width) + width) % width), sizeof result);
    return result;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulation::lane() % width, source = lane - int(delta);
    const T other = __shfl_sync(mask, value, source < 0 ? lane : source, width);
    return other;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = emulation::lane() % width, source = lane + int(delta);
    return __shfl_sync(mask, value, source >= width ? lane : source, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    return __shfl_sync(mask, value, (emulation::lane() % width) ^ bits, width);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    const unsigned char* const all = emulation::exchange_in_warp(mask, &value, sizeof value);
    unsigned votes = 0;
    for (int l = 0; l < 32; ++l) {
        int vote = 0;
        std::memcpy(&vote, all + 16 * l, sizeof vote);
        if ((mask >> l & 1U) != 0 && vote != 0) votes |= 1U << l;
    }
    return votes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == mask; }

template <class T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <class T>
T atomicMax(T* address, T value) {
    const T old = *address;
    if (value > old) *address = value;
    return old;
}
template <class T>
T atomicOr(T* address, T value) {
    const T old = *address;
    *address = old | value;
    return old;
}

// The runtime's interface. Everything happens at once, in the order of the calls.
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

struct cudaDeviceProp {
    char name[256];
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
inline cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t) { return cudaMalloc(memory, bytes); }
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory);
cudaError_t check_launch(const cudaLaunchConfig_t& config);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
    return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    if (const cudaError_t error = check_launch(*config); error != cudaSuccess) return error;
    const std::tuple<std::remove_cv_t<Parameters>...> values(static_cast<Arguments&&>(arguments)...);
    emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
    return cudaSuccess;
}
