#include "device/cuda.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include <deeppcr/launch.cuh>

namespace deeppcr {
namespace cuda {

void check(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report it again
    const std::string text = std::string("CUDA, ") + doing + ": " + cudaGetErrorString(error);
    if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
    switch (error) {
        case cudaErrorNoDevice:
        case cudaErrorInsufficientDriver:
        case cudaErrorInvalidDevice:
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorUnsupportedPtxVersion:
            throw NoDevice(text);
        default:
            throw Error(text);
    }
}

void allow_shared_memory(const void* kernel, std::size_t bytes) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, std::size_t> granted;
    int gpu = 0;
    check(cudaGetDevice(&gpu), "asking for the current GPU");
    const std::lock_guard lock(mutex);
    std::size_t& most = granted[{gpu, kernel}];
    if (bytes <= most) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
          "asking for shared memory");
    most = bytes;
}

Launch one_each(index count, cudaStream_t stream, int threads) {
    constexpr index warp = 32;
    threads = int(std::min<index>(threads, std::max<index>(1, (count + warp - 1) / warp) * warp));
    const index blocks = (count + threads - 1) / threads;
    if (blocks > std::numeric_limits<int>::max())
        throw InvalidArgument("shape", "fewer than 2^31 blocks of threads", std::to_string(blocks));
    return {dim3(unsigned(blocks)), dim3(unsigned(threads)), 0, stream};
}

}  // namespace cuda

namespace device {

using cuda::check;

namespace {

constexpr int least_capability = 80;  // that the kernels are compiled for

int attribute(cudaDeviceAttr which, int ordinal) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, ordinal), "looking at a GPU");
    return value;
}

int capability(int ordinal) {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, ordinal) +
           attribute(cudaDevAttrComputeCapabilityMinor, ordinal);
}

/// Why a GPU cannot run the kernels, or nothing.
std::string problem_of(int ordinal) {
    const int found = capability(ordinal);
    if (found >= least_capability) return "";
    return "GPU " + std::to_string(ordinal) + " has compute capability " + std::to_string(found / 10) + "." +
           std::to_string(found % 10) + ", 8.0 or more is needed";
}

int current_ordinal() {
    int ordinal = 0;
    check(cudaGetDevice(&ordinal), "asking for the current GPU");
    return ordinal;
}

/// While it lives, this thread may make calls that CUDA forbids while a stream is captured, by whichever thread.
class DespiteCaptures {
public:
    DespiteCaptures() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "looking at captures"); }
    ~DespiteCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    DespiteCaptures(const DespiteCaptures&) = delete;
    DespiteCaptures& operator=(const DespiteCaptures&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// For ends of memory, where nothing can be thrown: nobody else is to take the error for one of their own.
void forget_error(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
}

OutOfMemory out_of_memory(index bytes) {
    cudaGetLastError();
    return OutOfMemory("cannot allocate " + std::to_string(bytes) + " bytes on GPU " +
                       std::to_string(current_ordinal()) + ", which has " + std::to_string(available_on_gpu()) +
                       " available");
}

/// The pool of a GPU, our own, so that other users of CUDA's default one are not affected. It keeps some memory, so
/// that what one call gives back the next one takes without asking the driver.
cudaMemPool_t pool_of(int ordinal) {
    constexpr std::uint64_t kept_bytes = std::uint64_t(1) << 30;
    static std::mutex mutex;
    static std::map<int, cudaMemPool_t> pools;
    const std::lock_guard lock(mutex);
    if (const auto found = pools.find(ordinal); found != pools.end()) return found->second;
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = ordinal;
    cudaMemPool_t pool = nullptr;
    const DespiteCaptures despite_captures;
    check(cudaMemPoolCreate(&pool, &properties), "making a pool of memory");
    std::uint64_t threshold = kept_bytes;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold), "making a pool of memory");
    pools.emplace(ordinal, pool);
    return pool;
}

/// The GPU that was current before is so again at its end.
class Current {
public:
    explicit Current(int ordinal) : before_(current_ordinal()) {
        if (ordinal != before_) check(cudaSetDevice(ordinal), "choosing a GPU");
    }
    ~Current() { cudaSetDevice(before_); }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

private:
    int before_;
};

}  // namespace

void require_gpu() {
    std::string problem = cuda_problem();
    if (problem.empty()) problem = problem_of(current_ordinal());
    if (!problem.empty()) throw NoDevice("there is no GPU to use: " + problem);
}

Device current_gpu() {
    require_gpu();
    return Device::cuda(current_ordinal());
}

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount, current_ordinal()); }
index shared_bytes_per_block() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, current_ordinal()); }

void require_on_gpu(const std::string& name, const void* memory) {
    const auto refuse = [&](const std::string& actual) {
        throw InvalidArgument(name, "memory of a GPU, for Backend::cuda", actual);
    };
    cudaPointerAttributes attributes{};
    const cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
    if (error == cudaErrorInvalidValue) {  // what CUDA does not know
        cudaGetLastError();
        refuse("main memory");
    }
    check(error, "asking where memory is");
    if (attributes.type == cudaMemoryTypeManaged) return;
    if (attributes.type != cudaMemoryTypeDevice) refuse("main memory");
    if (const int current = current_ordinal(); attributes.device != current)
        throw InvalidArgument(name, "memory of the current GPU, " + std::to_string(current),
                              "memory of GPU " + std::to_string(attributes.device));
}

bool is_on_gpu(const void* memory) {
    if (memory == nullptr || !cuda_problem().empty()) return false;
    cudaPointerAttributes attributes{};
    const cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
    if (error == cudaErrorInvalidValue) {  // what CUDA does not know
        cudaGetLastError();
        return false;
    }
    check(error, "asking where memory is");
    return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

std::shared_ptr<void> allocate_on_gpu(index bytes, Device device) {
    if (const std::string problem = cuda_problem(); !problem.empty())
        throw NoDevice("there is no GPU to use: " + problem);
    const Current current(device.ordinal());
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, std::size_t(bytes > 0 ? bytes : 1));
    if (error == cudaErrorMemoryAllocation) throw out_of_memory(bytes);
    check(error, "allocating memory");
    return {memory, [](void* pointer) { forget_error(cudaFree(pointer)); }};
}

std::shared_ptr<void> allocate_in_stream(index bytes, CUstream_st* stream) {
    require_gpu();
    const int ordinal = current_ordinal();
    if (attribute(cudaDevAttrMemoryPoolsSupported, ordinal) == 0) return allocate_on_gpu(bytes, Device::cuda(ordinal));
    void* memory = nullptr;
    const cudaError_t error =
        cudaMallocFromPoolAsync(&memory, std::size_t(bytes > 0 ? bytes : 1), pool_of(ordinal), stream);
    if (error == cudaErrorMemoryAllocation) throw out_of_memory(bytes);
    check(error, "allocating memory");
    return {memory, [stream, ordinal](void* pointer) {  // the null stream is that of the current GPU
                int before = 0;
                cudaGetDevice(&before);
                if (before != ordinal) cudaSetDevice(ordinal);
                forget_error(cudaFreeAsync(pointer, stream));
                if (before != ordinal) forget_error(cudaSetDevice(before));
            }};
}

void copy_by_gpu(void* to, const void* from, index bytes) {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, std::size_t(bytes), cudaMemcpyDefault, nullptr), "copying");
    synchronise(nullptr);
}

void fill_zeros_on_gpu(void* data, index bytes, Device device) {
    if (bytes == 0) return;
    const Current current(device.ordinal());
    check(cudaMemsetAsync(data, 0, std::size_t(bytes), nullptr), "filling with zeros");
    synchronise(nullptr);
}

void copy_to_gpu(void* to, const void* from, index bytes, CUstream_st* stream) {
    check(cudaMemcpyAsync(to, from, std::size_t(bytes), cudaMemcpyHostToDevice, stream), "copying to a GPU");
}

void copy_from_gpu(void* to, const void* from, index bytes, CUstream_st* stream) {
    check(cudaMemcpyAsync(to, from, std::size_t(bytes), cudaMemcpyDeviceToHost, stream), "copying from a GPU");
}

void copy_on_gpu(void* to, const void* from, index bytes, CUstream_st* stream) {
    check(cudaMemcpyAsync(to, from, std::size_t(bytes), cudaMemcpyDeviceToDevice, stream), "copying on a GPU");
}

void fill_bytes(void* data, int value, index bytes, CUstream_st* stream) {
    check(cudaMemsetAsync(data, value, std::size_t(bytes), stream), "filling memory");
}

index available_on_gpu() {
    const DespiteCaptures despite_captures;
    std::size_t available = 0, total = 0;
    check(cudaMemGetInfo(&available, &total), "asking for memory");
    std::uint64_t reserved = 0, used = 0;
    if (const int ordinal = current_ordinal(); attribute(cudaDevAttrMemoryPoolsSupported, ordinal) != 0) {
        check(cudaMemPoolGetAttribute(pool_of(ordinal), cudaMemPoolAttrReservedMemCurrent, &reserved),
              "looking at a pool of memory");
        check(cudaMemPoolGetAttribute(pool_of(ordinal), cudaMemPoolAttrUsedMemCurrent, &used),
              "looking at a pool of memory");
    }
    return index(available + (reserved - used));
}

void synchronise(CUstream_st* stream) { check(cudaStreamSynchronize(stream), "running"); }

bool is_captured(CUstream_st* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "looking at a stream");
    return status != cudaStreamCaptureStatusNone;
}

Mark::Mark() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
    event_ = {event, [](void* made) { forget_error(cudaEventDestroy(static_cast<cudaEvent_t>(made))); }};
}
void Mark::set(CUstream_st* stream) {
    check(cudaEventRecord(static_cast<cudaEvent_t>(event_.get()), stream), "recording an event");
}
void Mark::wait_in(CUstream_st* stream) const {
    check(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(event_.get()), 0), "waiting for an event");
}

struct Letter::Paper {
    std::shared_ptr<void> memory;  // pinned
    cudaEvent_t sent = nullptr;
    enum { blank, written_on, on_its_way } state = blank;

    explicit Paper(std::shared_ptr<void> where) : memory(std::move(where)) {
        check(cudaEventCreateWithFlags(&sent, cudaEventDisableTiming), "making an event");
    }
    ~Paper() { forget_error(cudaEventDestroy(sent)); }
    Paper(const Paper&) = delete;
    Paper& operator=(const Paper&) = delete;

    /// Many at once: asking for pinned memory may wait for the GPU.
    static std::vector<std::unique_ptr<Paper>> make_some() {
        const DespiteCaptures despite_captures;
        void* made = nullptr;
        const cudaError_t error = cudaMallocHost(&made, std::size_t(made_at_once * most_bytes));
        if (error == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            throw OutOfMemory("cannot allocate " + std::to_string(made_at_once * most_bytes) +
                              " bytes of pinned main memory");
        }
        check(error, "allocating pinned memory");
        const std::shared_ptr<void> all(made, [](void* pointer) { forget_error(cudaFreeHost(pointer)); });
        std::vector<std::unique_ptr<Paper>> papers;
        for (index i = 0; i < made_at_once; ++i)
            papers.push_back(std::make_unique<Paper>(
                std::shared_ptr<void>(all, static_cast<unsigned char*>(made) + i * most_bytes)));
        return papers;
    }
};

Letter::Letter() {
    // By GPU; kept to the end of the process, since CUDA may end before this library does.
    static std::mutex mutex;
    static std::multimap<int, std::unique_ptr<Paper>>& unused = *new std::multimap<int, std::unique_ptr<Paper>>;
    static std::vector<std::unique_ptr<Paper>>& lost = *new std::vector<std::unique_ptr<Paper>>;
    const int ordinal = current_ordinal();
    std::unique_ptr<Paper> paper;
    {
        const std::lock_guard lock(mutex);
        if (const auto found = unused.find(ordinal); found != unused.end()) {
            paper = std::move(found->second);
            unused.erase(found);
        }
    }
    if (paper == nullptr) {  // without the lock: others' GPUs do not wait for this one
        std::vector<std::unique_ptr<Paper>> made = Paper::make_some();
        paper = std::move(made.back());
        made.pop_back();
        const std::lock_guard lock(mutex);
        for (std::unique_ptr<Paper>& other : made) unused.emplace(ordinal, std::move(other));
    }
    paper_ = {paper.release(), [ordinal](Paper* read) {
                  // Nothing may still be on its way; where that cannot be told, nobody gets it again.
                  if (read->state == Paper::on_its_way) {
                      if (cudaEventSynchronize(read->sent) == cudaSuccess)
                          read->state = Paper::blank;
                      else
                          cudaGetLastError();
                  }
                  const std::lock_guard lock(mutex);
                  if (read->state == Paper::blank)
                      unused.emplace(ordinal, read);
                  else
                      lost.emplace_back(read);
              }};
}

void* Letter::paper() {
    paper_->state = Paper::written_on;
    return paper_->memory.get();
}

void Letter::send(CUstream_st* stream) {
    check(cudaEventRecord(paper_->sent, stream), "recording an event");
    paper_->state = Paper::on_its_way;
}

void* Letter::marked_paper(index words) {
    auto* const memory = static_cast<std::uint64_t*>(paper());
    std::atomic_ref(memory[words]).store(0, std::memory_order_relaxed);
    return memory;
}

const void* Letter::look(index words) {
    auto* const memory = static_cast<std::uint64_t*>(paper_->memory.get());
    if (std::atomic_ref(memory[words]).load(std::memory_order_acquire) == 0) return nullptr;
    paper_->state = Paper::blank;
    return memory;
}

const void* Letter::receive() {
    check(cudaEventSynchronize(paper_->sent), "running");
    paper_->state = Paper::blank;
    return paper_->memory.get();
}

void Letter::fetch(void* to, const void* from, index bytes, CUstream_st* stream) {
    if (bytes > most_bytes) {
        copy_from_gpu(to, from, bytes, stream);
        return synchronise(stream);
    }
    copy_from_gpu(paper(), from, bytes, stream);
    send(stream);
    std::memcpy(to, receive(), std::size_t(bytes));
}

}  // namespace device

std::string cuda_problem() {
    int count = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
        cudaGetLastError();
        return cudaGetErrorString(error);
    }
    std::string problem = "no CUDA-capable device is detected";
    for (int ordinal = 0; ordinal < count; ++ordinal)
        if (problem = device::problem_of(ordinal); problem.empty()) break;
    return problem;
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
