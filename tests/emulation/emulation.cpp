#include "cuda_runtime.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
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
    ucontext_t context{};
    std::unique_ptr<unsigned char[]> stack;
    Meeting* waiting = nullptr;  // for the end of `round`
    std::size_t round = 0;
    bool done = false;
    void* fake_stack = nullptr;
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
    ucontext_t context{};
    const void* stack = nullptr;
    std::size_t stack_size = 0;
    void* fake_stack = nullptr;
    bool moved = false;  // whether anything but waiting has happened
    std::vector<std::unique_ptr<unsigned char[]>> free_stacks;
};
Scheduler scheduler;

void switch_to_fiber(Fiber& fiber) {
    scheduler.now = &fiber;
    threadIdx = fiber.thread;
    blockIdx = fiber.block->where;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack.get(), stack_bytes);
#endif
    swapcontext(&scheduler.context, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
    scheduler.now = nullptr;
}

void switch_to_scheduler(Fiber& fiber, bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, scheduler.stack, scheduler.stack_size);
#else
    (void)for_ever;
#endif
    swapcontext(&fiber.context, &scheduler.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler.stack, &scheduler.stack_size);
#endif
}

void begin_fiber() {
    Fiber& fiber = *scheduler.now;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
#endif
    (*scheduler.kernel)();
    fiber.done = true;
    --fiber.block->running;
    scheduler.moved = true;
    switch_to_scheduler(fiber, true);
}

void prepare(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin_fiber, 0);
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
    switch_to_scheduler(fiber, false);
    return round;
}

std::unique_ptr<Block> make_block(std::size_t number, std::size_t shared_bytes) {
    auto block = std::make_unique<Block>();
    block->shared = std::make_unique<unsigned char[]>(shared_bytes);
    std::memset(block->shared.get(), 0xFF, shared_bytes);  // NaN
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

thread_local cudaError_t last_error = cudaSuccess;
cudaError_t failed(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

std::map<const unsigned char*, std::size_t>& device_arrays() {
    static std::map<const unsigned char*, std::size_t> all;
    return all;
}

}  // namespace

unsigned char* shared_memory() { return scheduler.now->block->shared.get(); }

int lane() { return int(number_in_block() % 32); }

void yield() { switch_to_scheduler(*scheduler.now, false); }

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

void run(dim3 blocks, dim3 threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
    if (scheduler.now != nullptr || scheduler.kernel != nullptr) fail("a kernel is launched within another");
    ++machine().launches;
    scheduler.kernel = &kernel;
    gridDim = blocks;
    blockDim = threads;
    std::mt19937 order(machine().seed + unsigned(machine().launches));
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
        std::shuffle(ready.begin(), ready.end(), order);
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

using emulation::failed;
using emulation::machine;

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
    }
    return "unknown error";
}
cudaError_t cudaGetLastError() {
    const cudaError_t error = emulation::last_error;
    emulation::last_error = cudaSuccess;
    return error;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = machine().devices;
    return failed(machine().devices > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return failed(machine().devices > 0 ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
    return failed(device < machine().devices ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = machine().multiprocessors;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = int(machine().shared_bytes);
            break;
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    std::snprintf(properties->name, sizeof properties->name, "emulated GPU %d", device);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
    *total = machine().memory;
    *free = machine().memory - machine().used;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    if (machine().used + bytes > machine().memory) return failed(cudaErrorMemoryAllocation);
    machine().used += bytes;
    ++machine().allocations;
    auto* const array = static_cast<unsigned char*>(std::aligned_alloc(256, (bytes / 256 + 1) * 256));
    std::memset(array, 0xFF, (bytes / 256 + 1) * 256);
    emulation::device_arrays()[array] = bytes;
    *memory = array;
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    if (memory == nullptr) return cudaSuccess;
    const auto found = emulation::device_arrays().find(static_cast<unsigned char*>(memory));
    if (found == emulation::device_arrays().end()) return failed(cudaErrorInvalidValue);
    machine().used -= found->second;
    emulation::device_arrays().erase(found);
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
    const auto* const address = static_cast<const unsigned char*>(memory);
    auto after = emulation::device_arrays().upper_bound(address);
    const bool device =
        after != emulation::device_arrays().begin() && (--after, address < after->first + after->second);
    *attributes = {device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, 0,
                   device ? const_cast<void*>(memory) : nullptr, const_cast<void*>(memory)};
    return cudaSuccess;
}
cudaError_t check_launch(const cudaLaunchConfig_t& config) {
    const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
    const bool good = threads >= 1 && threads <= 1024 && config.gridDim.x >= 1 && config.gridDim.y >= 1 &&
                      config.gridDim.z >= 1 && config.gridDim.x <= 0x7FFFFFFFU && config.gridDim.y <= 65535 &&
                      config.gridDim.z <= 65535 && config.dynamicSmemBytes <= machine().shared_bytes;
    return failed(good ? cudaSuccess : cudaErrorInvalidValue);
}
