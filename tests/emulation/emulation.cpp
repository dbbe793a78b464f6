#include "cuda_runtime.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <boost/context/fiber.hpp>

#include <deeppcr/scalar.hpp>

// What tells AddressSanitizer of a change of stacks.
#if defined(DEEPPCR_SANITIZED)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "emulated CUDA: %s\n", what.c_str());
    std::abort();
}

/// What the threads that wait for each other have in common: all of a block, or some lanes of a warp.
struct Meeting {
    std::size_t arrived = 0, round = 0;
    std::array<int, 2> counts{};                                             // of this round and the one before
    std::array<std::array<unsigned char, std::size_t(16) * 32>, 2> slots{};  // likewise
};

struct Block;
struct Fiber {
    uint3 thread{};
    Block* block = nullptr;
    boost::context::fiber context;
    std::unique_ptr<unsigned char[]> stack;
    Meeting* waiting = nullptr;  // for the end of `round`
    std::size_t round = 0;
    bool done = false;
    void* fake_stack = nullptr;
    struct Copy {
        void* to;
        const void* from;
        std::size_t bytes;
        int group;
    };
    std::vector<Copy> copies;  // begun and not done
    int copy_groups = 0;
};

struct Block {
    uint3 where{};
    std::unique_ptr<unsigned char[]> shared;
    Meeting all;
    std::map<std::pair<unsigned, unsigned>, Meeting> warps;  // by warp and mask
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::size_t running = 0;
};

constexpr std::size_t stack_bytes = std::size_t(256) << 10;

struct Scheduler {
    const std::function<void()>* kernel = nullptr;
    Fiber* now = nullptr;
    boost::context::fiber context;
    const void* stack = nullptr;
    std::size_t stack_size = 0;
    void* fake_stack = nullptr;
    bool moved = false;  // whether anything but waiting has happened
    std::vector<std::unique_ptr<unsigned char[]>> free_stacks;
    std::mt19937 order;
};
Scheduler scheduler;

void switch_to_fiber(Fiber& fiber) {
    scheduler.now = &fiber;
    threadIdx = fiber.thread;
    blockIdx = fiber.block->where;
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack.get(), stack_bytes);
    fiber.context = std::move(fiber.context).resume();
    __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
    scheduler.now = nullptr;
}

void switch_to_scheduler(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler.stack, scheduler.stack_size);
    scheduler.context = std::move(scheduler.context).resume();
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler.stack, &scheduler.stack_size);
}

boost::context::fiber run_fiber(boost::context::fiber&& from) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
    scheduler.context = std::move(from);
    Fiber& fiber = *scheduler.now;
    (*scheduler.kernel)();
    fiber.done = true;
    --fiber.block->running;
    scheduler.moved = true;
    __sanitizer_start_switch_fiber(nullptr, scheduler.stack, scheduler.stack_size);
    return std::move(scheduler.context);
}

void prepare(Fiber& fiber) {
    struct KeepsTheStack {
        void deallocate(boost::context::stack_context&) {}
    };
    boost::context::stack_context stack;
    stack.size = stack_bytes;
    stack.sp = fiber.stack.get() + stack_bytes;
    fiber.context = boost::context::fiber(std::allocator_arg, boost::context::preallocated(stack.sp, stack.size, stack),
                                          KeepsTheStack(), run_fiber);
}

/// Waits until `expected` threads have come; returns the round that they have ended.
std::size_t meet(Meeting& meeting, std::size_t expected) {
    Fiber& fiber = *scheduler.now;
    scheduler.moved = true;
    const std::size_t round = meeting.round;
    if (++meeting.arrived == expected) {
        meeting.arrived = 0;
        ++meeting.round;
        meeting.counts[meeting.round % 2] = 0;
        return round;
    }
    fiber.waiting = &meeting;
    fiber.round = round;
    switch_to_scheduler(fiber);
    return round;
}

std::unique_ptr<Block> make_block(std::size_t number, std::size_t shared_bytes) {
    auto block = std::make_unique<Block>();
    block->shared = std::make_unique<unsigned char[]>(shared_bytes);  // aligned to 16
    std::memset(block->shared.get(), 0xFF, shared_bytes);             // NaN
    block->where = {unsigned(number) % gridDim.x, unsigned(number) / gridDim.x % gridDim.y,
                    unsigned(number) / gridDim.x / gridDim.y};
    for (unsigned t = 0; t < blockDim.x * blockDim.y * blockDim.z; ++t) {
        auto fiber = std::make_unique<Fiber>();
        fiber->thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        fiber->block = block.get();
        if (scheduler.free_stacks.empty()) {
            fiber->stack.reset(new unsigned char[stack_bytes]);
        } else {
            fiber->stack = std::move(scheduler.free_stacks.back());
            scheduler.free_stacks.pop_back();
        }
        prepare(*fiber);
        block->fibers.push_back(std::move(fiber));
    }
    block->running = block->fibers.size();
    return block;
}

unsigned number_in_block() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

/// Threads of a program may use the machine, one call at a time; what is enqueued happens in the call that waits for
/// it.
std::recursive_mutex one_at_a_time;
using Lock = std::lock_guard<std::recursive_mutex>;

thread_local cudaError_t last_error = cudaSuccess;
cudaError_t failed(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

/// The state of the machine that makes every call fail, or 0.
cudaError_t broken() { return cudaError_t(machine().broken); }

struct Array {
    std::size_t bytes;
    int device;  // -1: pinned main memory
};
std::map<const unsigned char*, Array>& arrays() {
    static std::map<const unsigned char*, Array> all;
    return all;
}
const Array* find_array(const void* memory) {
    const auto* const address = static_cast<const unsigned char*>(memory);
    auto after = arrays().upper_bound(address);
    return after != arrays().begin() && (--after, address < after->first + after->second.bytes) ? &after->second
                                                                                                : nullptr;
}
thread_local int current_device = 0;

}  // namespace
}  // namespace emulation

// --- streams: what is enqueued, in the order of the calls

struct CUevent_st {
    long recorded = 0, done = 0;  // how often
};

struct Operation {
    long number;  // in the order of all calls
    std::function<void()> run;
    CUevent_st* event = nullptr;  // waited for
    long recorded = 0;            // how often it must have been recorded by then
};

struct CUgraph_st {
    std::vector<std::function<void()>> operations;
    std::map<void*, std::shared_ptr<void>> memory;  // allocated within and not freed
    bool invalid = false;                           // something forbidden was called while it was captured
};
struct CUgraphExec_st : CUgraph_st {};
struct CUmemPoolHandle_st {};

struct CUstream_st {
    bool blocking = true;  // waits for the null stream, and the null stream for it
    std::deque<Operation> operations;
    std::unique_ptr<CUgraph_st> capture;
};

namespace emulation {
namespace {

long operations = 0;  // enqueued
std::mt19937 stream_order(1);

std::vector<CUstream_st*>& streams() {
    static CUstream_st null_stream;
    static std::vector<CUstream_st*> all{&null_stream};
    return all;
}
CUstream_st& null_stream() { return *streams().front(); }
CUstream_st& resolve(cudaStream_t stream) {
    CUstream_st* const found = stream == nullptr ? &null_stream() : stream;
    if (std::find(streams().begin(), streams().end(), found) == streams().end()) fail("a stream that does not exist");
    return *found;
}

/// Whether nothing keeps the first operation of a stream from happening.
bool ready(const CUstream_st& stream) {
    if (stream.operations.empty()) return false;
    const Operation& first = stream.operations.front();
    if (first.event != nullptr && first.event->done < first.recorded) return false;
    if (!stream.blocking) return true;
    const auto before = [&](const CUstream_st& other) {
        return !other.operations.empty() && other.operations.front().number < first.number;
    };
    if (&stream != &null_stream()) return !before(null_stream());
    return std::none_of(streams().begin() + 1, streams().end(),
                        [&](const CUstream_st* other) { return other->blocking && before(*other); });
}

/// Lets streams that can go on do so, in an order drawn at random, until `done`.
void run_until(const std::function<bool()>& done) {
    ++machine().waits;
    while (!done()) {
        std::vector<CUstream_st*> able;
        for (CUstream_st* stream : streams())
            if (ready(*stream)) able.push_back(stream);
        if (able.empty()) fail("a wait for what never happens");
        CUstream_st& chosen = *able[stream_order() % able.size()];
        const Operation operation = std::move(chosen.operations.front());
        if (operation.run) operation.run();
        chosen.operations.pop_front();
    }
}

bool capturing() {
    return std::any_of(streams().begin(), streams().end(), [](const CUstream_st* s) { return s->capture != nullptr; });
}

thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

/// Whether the machine is broken, or a stream is captured, which this breaks off.
cudaError_t forbidden_in_captures() {
    if (broken() != cudaSuccess) return failed(broken());
    if (!capturing()) return cudaSuccess;
    for (const CUstream_st* stream : streams())
        if (stream->capture != nullptr) stream->capture->invalid = true;
    return failed(cudaErrorStreamCaptureUnsupported);
}
/// The same, but where the thread has said that it knows.
cudaError_t unsafe_in_captures() {
    return capture_mode == cudaStreamCaptureModeRelaxed ? failed(broken()) : forbidden_in_captures();
}

/// Waits for `done`.
cudaError_t wait(const std::function<bool()>& done) {
    if (const cudaError_t error = forbidden_in_captures(); error != cudaSuccess) return error;
    run_until(done);
    return cudaSuccess;
}

bool all_done() {
    return std::all_of(streams().begin(), streams().end(),
                       [](const CUstream_st* stream) { return stream->operations.empty(); });
}

cudaError_t allocate(void** memory, std::size_t bytes, int device) {
    if (machine().good_allocations == 0 || machine().used + bytes > machine().memory) {
        machine().good_allocations = -1;
        return failed(cudaErrorMemoryAllocation);
    }
    if (machine().good_allocations > 0) --machine().good_allocations;
    machine().used += bytes;
    ++machine().allocations;
    auto* const array = static_cast<unsigned char*>(std::aligned_alloc(256, (bytes / 256 + 1) * 256));
    std::memset(array, 0xFF, (bytes / 256 + 1) * 256);
    arrays()[array] = {bytes, device};
    *memory = array;
    return cudaSuccess;
}

void release(void* memory) {
    const auto found = arrays().find(static_cast<unsigned char*>(memory));
    if (found == arrays().end()) fail("memory is freed that was not allocated");
    machine().used -= found->second.bytes;
    arrays().erase(found);
    std::free(memory);
}

/// What a graph does where it allocates or frees memory.
std::function<void()> filled_with_nan(std::shared_ptr<void> memory, std::size_t bytes) {
    return [memory = std::move(memory), bytes] { std::memset(memory.get(), 0xFF, bytes); };
}

}  // namespace

cudaError_t enqueue(cudaStream_t where, std::function<void()> work) {
    const Lock lock(one_at_a_time);
    if (broken() != cudaSuccess) return failed(broken());
    CUstream_st& stream = resolve(where);
    if (stream.capture != nullptr) {
        if (stream.capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
        stream.capture->operations.push_back(std::move(work));
        return cudaSuccess;
    }
    if (&stream == &null_stream() && capturing()) {
        forbidden_in_captures();
        return failed(cudaErrorStreamCaptureImplicit);
    }
    stream.operations.push_back({++operations, std::move(work)});
    return cudaSuccess;
}

unsigned char* shared_memory() { return scheduler.now->block->shared.get(); }

int lane() { return int(number_in_block() % 32); }

void yield() { switch_to_scheduler(*scheduler.now); }

void wait_for_block() { count_in_block(0); }

int count_in_block(int value) {
    Block& block = *scheduler.now->block;
    if (block.running != block.fibers.size()) fail("a thread waits for its block, of which another has ended");
    Meeting& all = block.all;
    all.counts[all.round % 2] += value != 0 ? 1 : 0;
    const std::size_t round = meet(all, block.fibers.size());
    return all.counts[round % 2];
}

const unsigned char* exchange_in_warp(unsigned mask, const void* value, std::size_t bytes) {
    Fiber& fiber = *scheduler.now;
    const int here = lane();
    if ((mask >> here & 1U) == 0) fail("a lane takes part in an exchange whose mask does not name it");
    const std::size_t threads = fiber.block->fibers.size();
    const unsigned warp = number_in_block() / 32;
    const std::size_t in_warp = std::min<std::size_t>(32, threads - std::size_t(32) * warp);
    const unsigned present = in_warp == 32 ? ~0U : (1U << in_warp) - 1;
    if ((mask & ~present) != 0 && mask != ~0U) fail("the mask of an exchange names lanes that do not exist");
    mask &= present;
    Meeting& meeting = fiber.block->warps[{warp, mask}];
    auto& slots = meeting.slots[meeting.round % 2];
    std::memcpy(slots.data() + std::size_t(16) * std::size_t(here), value, bytes);
    meet(meeting, std::size_t(__builtin_popcount(mask)));
    return slots.data();
}

void begin_copy(void* shared, const void* global, std::size_t bytes) {
    for (const void* address : {static_cast<const void*>(shared), global})
        if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fail("an asynchronous copy is not aligned");
    // It may happen at any time before it is waited for.
    if (scheduler.order() % 2 == 0)
        std::memcpy(shared, global, bytes);
    else
        scheduler.now->copies.push_back({shared, global, bytes, scheduler.now->copy_groups});
}

void commit_copies() { ++scheduler.now->copy_groups; }

void wait_for_copies(int groups) {
    auto& copies = scheduler.now->copies;
    // Without a wait for groups, what no group has been made of is waited for too.
    const int last = groups == 0 ? std::numeric_limits<int>::max() : scheduler.now->copy_groups - groups;
    std::size_t done = 0;
    for (; done < copies.size() && copies[done].group < last; ++done)
        std::memcpy(copies[done].to, copies[done].from, copies[done].bytes);
    copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(done));
}

void run(dim3 blocks, dim3 threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
    if (scheduler.now != nullptr || scheduler.kernel != nullptr) fail("a kernel is launched within another");
    ++machine().launches;
    scheduler.kernel = &kernel;
    gridDim = blocks;
    blockDim = threads;
    scheduler.order.seed(machine().seed + unsigned(machine().launches));
    const std::size_t total = std::size_t(blocks.x) * blocks.y * blocks.z;
    std::size_t next = 0, idle = 0;
    std::vector<std::unique_ptr<Block>> flying;
    while (next < total || !flying.empty()) {
        while (next < total && flying.size() < std::size_t(machine().blocks_at_once))
            flying.push_back(make_block(next++, shared_bytes));
        std::vector<Fiber*> ready;
        std::size_t living = 0;
        for (const auto& block : flying)
            for (const auto& fiber : block->fibers) {
                if (fiber->done) continue;
                ++living;
                if (fiber->waiting == nullptr || fiber->waiting->round != fiber->round) ready.push_back(fiber.get());
            }
        if (living > 0 && ready.empty()) fail("all threads wait for others");
        std::shuffle(ready.begin(), ready.end(), scheduler.order);
        idle = scheduler.moved ? 0 : idle + 1;
        if (idle > 1000000) fail("threads wait in loops for what never comes");
        scheduler.moved = false;
        for (Fiber* fiber : ready) {
            fiber->waiting = nullptr;
            switch_to_fiber(*fiber);
        }
        std::erase_if(flying, [](const std::unique_ptr<Block>& block) {
            if (block->running > 0) return false;
            for (const auto& fiber : block->fibers) scheduler.free_stacks.push_back(std::move(fiber->stack));
            return true;
        });
    }
    scheduler.kernel = nullptr;
}

Machine& machine() {
    static Machine one;
    return one;
}

}  // namespace emulation

using emulation::arrays;
using emulation::broken;
using emulation::enqueue;
using emulation::failed;
using emulation::Lock;
using emulation::machine;
using emulation::one_at_a_time;
using emulation::resolve;

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorInsufficientDriver:
            return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoDevice:
            return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice:
            return "invalid device ordinal";
        case cudaErrorNoKernelImageForDevice:
            return "no kernel image is available for execution on the device";
        case cudaErrorIllegalAddress:
            return "an illegal memory access was encountered";
        case cudaErrorStreamCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated:
            return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureImplicit:
            return "operation would make the legacy stream depend on a capturing blocking stream";
        default:
            return "unknown error";
    }
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = emulation::last_error;
    emulation::last_error = cudaSuccess;
    return error;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = machine().devices;
    return failed(machine().devices > 0 ? broken() : cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
    *device = emulation::current_device;
    return failed(machine().devices > 0 ? broken() : cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
    const Lock lock(one_at_a_time);
    if (device < 0 || device >= machine().devices) return failed(cudaErrorInvalidDevice);
    emulation::current_device = device;
    return failed(broken());
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= machine().devices) return failed(cudaErrorInvalidDevice);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = machine().multiprocessors;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = machine().compute_capability / 10;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = machine().compute_capability % 10;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = int(machine().shared_bytes);
            break;
        case cudaDevAttrMemoryPoolsSupported:
            *value = 1;
            break;
    }
    return failed(broken());
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    std::snprintf(properties->name, sizeof properties->name, "emulated GPU %d", device);
    return failed(broken());
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int most, int device) {
    std::snprintf(id, std::size_t(most), "0000:%02x:00.0", device);
    return failed(broken());
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
    const Lock lock(one_at_a_time);
    *total = machine().memory;
    *free = machine().memory - machine().used - machine().kept;
    return failed(broken());
}
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    const Lock lock(one_at_a_time);
    if (const cudaError_t error = emulation::unsafe_in_captures(); error != cudaSuccess) return error;
    return emulation::allocate(memory, bytes, emulation::current_device);
}
cudaError_t cudaFree(void* memory) {
    const Lock lock(one_at_a_time);
    if (memory == nullptr) return cudaSuccess;
    if (const cudaError_t error = emulation::wait(emulation::all_done); error != cudaSuccess) return error;
    emulation::release(memory);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
    const Lock lock(one_at_a_time);
    if (const cudaError_t error = emulation::unsafe_in_captures(); error != cudaSuccess) return error;
    return emulation::allocate(memory, bytes, -1);
}
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
    static CUmemPoolHandle_st one;
    const Lock lock(one_at_a_time);
    *pool = &one;
    return emulation::unsafe_in_captures();
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
    const Lock lock(one_at_a_time);
    return emulation::unsafe_in_captures();
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void* value) {
    const Lock lock(one_at_a_time);
    constexpr std::uint64_t in_use = 4096;
    const std::uint64_t bytes = in_use + (attribute == cudaMemPoolAttrReservedMemCurrent ? machine().kept : 0);
    std::memcpy(value, &bytes, sizeof bytes);
    return emulation::unsafe_in_captures();
}
cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t, cudaStream_t stream) {
    const Lock lock(one_at_a_time);
    if (broken() != cudaSuccess) return failed(broken());
    const cudaError_t error = emulation::allocate(memory, bytes, emulation::current_device);
    CUgraph_st* const graph = resolve(stream).capture.get();
    if (graph == nullptr || error != cudaSuccess) return error;
    graph->memory[*memory] = {*memory, emulation::release};
    return enqueue(stream, emulation::filled_with_nan(graph->memory[*memory], bytes));
}
/// In a graph, what the graph has allocated: the last of its operations that refers to it keeps it.
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
    const Lock lock(one_at_a_time);
    CUgraph_st* const graph = resolve(stream).capture.get();
    if (graph == nullptr) return enqueue(stream, [memory] { emulation::release(memory); });
    const auto found = graph->memory.find(memory);
    if (found == graph->memory.end()) return failed(cudaErrorInvalidValue);
    const auto owned = std::move(found->second);
    graph->memory.erase(found);
    return enqueue(stream, emulation::filled_with_nan(owned, emulation::find_array(memory)->bytes));
}

// Main memory that is not pinned is read before the call returns, and written before it returns.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t where) {
    const Lock lock(one_at_a_time);
    if (broken() != cudaSuccess) return failed(broken());
    CUstream_st& stream = resolve(where);
    if (stream.capture == nullptr && emulation::find_array(from) == nullptr) {
        const auto* const begin = static_cast<const unsigned char*>(from);
        return enqueue(where, [to, read = std::vector<unsigned char>(begin, begin + bytes)] {
            std::memcpy(to, read.data(), read.size());
        });
    }
    const cudaError_t error = enqueue(where, [to, from, bytes] { std::memcpy(to, from, bytes); });
    if (error != cudaSuccess || stream.capture != nullptr || emulation::find_array(to) != nullptr) return error;
    return cudaStreamSynchronize(where);
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
    const Lock lock(one_at_a_time);
    if (emulation::find_array(memory) == nullptr) return failed(cudaErrorInvalidValue);
    return enqueue(stream, [memory, value, bytes] { std::memset(memory, value, bytes); });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    const Lock lock(one_at_a_time);
    *stream = new CUstream_st;
    (*stream)->blocking = flags != cudaStreamNonBlocking;
    emulation::streams().push_back(*stream);
    return failed(broken());
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const Lock lock(one_at_a_time);
    if (const cudaError_t error = cudaStreamSynchronize(stream); error != cudaSuccess) return error;
    std::erase(emulation::streams(), stream);
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t where) {
    const Lock lock(one_at_a_time);
    const CUstream_st& stream = resolve(where);
    return emulation::wait([&] { return stream.operations.empty(); });
}
/// What is enqueued happens now, but is not said to be done before the next time.
cudaError_t cudaStreamQuery(cudaStream_t where) {
    const Lock lock(one_at_a_time);
    const CUstream_st& stream = resolve(where);
    const bool done = stream.operations.empty();
    const cudaError_t error = emulation::wait([&] { return stream.operations.empty(); });
    return error == cudaSuccess && !done ? cudaErrorNotReady : error;
}
cudaError_t cudaDeviceSynchronize() {
    const Lock lock(one_at_a_time);
    return emulation::wait(emulation::all_done);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st;
    return failed(broken());
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const Lock lock(one_at_a_time);
    if (event->done < event->recorded)
        if (const cudaError_t error = cudaEventSynchronize(event); error != cudaSuccess) return error;
    delete event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const Lock lock(one_at_a_time);
    if (resolve(stream).capture == nullptr) ++event->recorded;
    return enqueue(stream, [event, recorded = event->recorded] { event->done = recorded; });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const Lock lock(one_at_a_time);
    return emulation::wait([&] { return event->done >= event->recorded; });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t where, cudaEvent_t event, unsigned) {
    const Lock lock(one_at_a_time);
    if (broken() != cudaSuccess) return failed(broken());
    resolve(where).operations.push_back({++emulation::operations, {}, event, event->recorded});
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    const Lock lock(one_at_a_time);
    if (stream == nullptr) return failed(cudaErrorStreamCaptureUnsupported);
    resolve(stream).capture = std::make_unique<CUgraph_st>();
    return failed(broken());
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    const Lock lock(one_at_a_time);
    const CUgraph_st* const graph = resolve(stream).capture.get();
    *status = graph == nullptr ? cudaStreamCaptureStatusNone
              : graph->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
    return failed(broken());
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const Lock lock(one_at_a_time);
    std::unique_ptr<CUgraph_st> captured = std::move(resolve(stream).capture);
    *graph = captured->invalid ? nullptr : captured.release();
    return *graph == nullptr ? failed(cudaErrorStreamCaptureInvalidated) : failed(broken());
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    if (broken() == cudaSuccess) std::swap(*mode, emulation::capture_mode);
    return failed(broken());
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = new CUgraphExec_st{*graph};
    return failed(broken());
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    const Lock lock(one_at_a_time);
    for (const auto& operation : executable->operations)
        if (const cudaError_t error = enqueue(stream, operation); error != cudaSuccess) return error;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    const Lock lock(one_at_a_time);
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    const Lock lock(one_at_a_time);
    delete executable;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
    const Lock lock(one_at_a_time);
    const emulation::Array* const array = emulation::find_array(memory);
    const cudaMemoryType type = array == nullptr     ? cudaMemoryTypeUnregistered
                                : array->device >= 0 ? cudaMemoryTypeDevice
                                                     : cudaMemoryTypeHost;
    *attributes = {type, array == nullptr ? -2 : array->device,
                   type == cudaMemoryTypeDevice ? const_cast<void*>(memory) : nullptr, const_cast<void*>(memory)};
    return failed(broken());
}
std::size_t& emulation::granted_shared_bytes(const void* kernel) {
    const Lock lock(one_at_a_time);
    static std::map<const void*, std::size_t> granted;
    return granted.try_emplace(kernel, std::size_t(48) << 10).first->second;
}
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
    const Lock lock(one_at_a_time);
    if (machine().launch_error != 0) return failed(cudaError_t(machine().launch_error));
    const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
    const bool good = threads >= 1 && threads <= 1024 && config.gridDim.x >= 1 && config.gridDim.y >= 1 &&
                      config.gridDim.z >= 1 && config.gridDim.x <= 0x7FFFFFFFU && config.gridDim.y <= 65535 &&
                      config.gridDim.z <= 65535 && config.dynamicSmemBytes <= emulation::granted_shared_bytes(kernel);
    return failed(good ? broken() : cudaErrorInvalidValue);
}
