// CUDA C++ on the host, as far as this library uses it: the kernels' sources compile as ordinary C++ where this file
// is found in the place of CUDA's own. Threads are fibers that take turns in an order drawn at random (emulation.cpp);
// several blocks are in flight at once. Shared memory is exactly as large as was asked for, device memory starts as
// NaN, so that the sanitizers and the tests see what a GPU would hide. What is enqueued in a stream happens when
// something waits for it, and no earlier; streams that nothing orders take turns at random.
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

/// A copy to shared memory that the running thread has begun: it happens in wait_for_copies.
void begin_copy(void* shared, const void* global, std::size_t bytes);
/// A group of the copies that the running thread has begun since the last.
void commit_copies();
/// For all groups but the last so many; 0: for all copies.
void wait_for_copies(int groups);

/// What is emulated; for tests.
struct Machine {
    int devices = 1, multiprocessors = 3, compute_capability = 90;
    std::size_t memory = std::size_t(1) << 30, used = 0;
    std::size_t kept = 0;                               ///< by pools, of memory that nobody uses
    std::size_t shared_bytes = std::size_t(227) << 10;  ///< that a block can have
    unsigned seed = 1;                                  ///< of the order in which threads take turns
    int blocks_at_once = 4;                             ///< in flight
    long launches = 0, allocations = 0, waits = 0;
    long good_allocations = -1;  ///< until one fails for want of memory; negative: all are good
    int broken = 0;              ///< the error that every call returns, as after a kernel's crash; 0: none
    int launch_error = 0;        ///< that every launch returns; 0: none
};
Machine& machine();

}  // namespace emulation

// Of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

/// Of memory that nothing writes meanwhile.
template <class T>
T __ldg(const T* address) {
    return *address;
}
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
inline void __threadfence_system() {}
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
inline long long __double_as_longlong(double value) {
    long long bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline int __clz(int bits) { return __builtin_clz(unsigned(bits)); }
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
T atomicMin(T* address, T value) {
    const T old = *address;
    if (value < old) *address = value;
    return old;
}
template <class T>
T atomicOr(T* address, T value) {
    const T old = *address;
    *address = old | value;
    return old;
}

// The runtime's interface.
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureImplicit = 906,
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
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMemoryPoolsSupported = 115
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
    cudaMemoryType type;
    int device;
    void *devicePointer, *hostPointer;
};
struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct CUmemPoolHandle_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;
using cudaMemPool_t = CUmemPoolHandle_st*;
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
enum cudaMemAllocationType { cudaMemAllocationTypePinned = 1 };
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
enum cudaMemPoolAttr {
    cudaMemPoolAttrReleaseThreshold = 4,
    cudaMemPoolAttrReservedMemCurrent = 5,
    cudaMemPoolAttrUsedMemCurrent = 7
};
enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive,
    cudaStreamCaptureStatusInvalidated
};
struct cudaMemLocation {
    cudaMemLocationType type;
    int id;
};
struct cudaMemPoolProps {
    cudaMemAllocationType allocType;
    cudaMemLocation location;
};
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
cudaError_t cudaDeviceGetPCIBusId(char* id, int most, int device);
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total);
cudaError_t cudaMalloc(void** memory, std::size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaMallocHost(void** memory, std::size_t bytes);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties);
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value);
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value);
cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t pool, cudaStream_t stream);
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory);
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);
namespace emulation {
/// Dynamic shared memory that a kernel may have.
std::size_t& granted_shared_bytes(const void* kernel);
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);
}  // namespace emulation

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if (std::size_t(bytes) > emulation::machine().shared_bytes) return cudaErrorInvalidValue;
    emulation::granted_shared_bytes(reinterpret_cast<const void*>(kernel)) = std::size_t(bytes);
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int threads, std::size_t) {
    *blocks = threads < 256 ? 256 / threads : 1;
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    if (const cudaError_t error = check_launch(*config, reinterpret_cast<const void*>(kernel)); error != cudaSuccess)
        return error;
    const std::tuple<std::remove_cv_t<Parameters>...> values(static_cast<Arguments&&>(arguments)...);
    return emulation::enqueue(config->stream, [where = *config, kernel, values] {
        emulation::run(where.gridDim, where.blockDim, where.dynamicSmemBytes, [&] { std::apply(kernel, values); });
    });
}
