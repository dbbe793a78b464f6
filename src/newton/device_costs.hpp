// What a cell's kernels cost on the current GPU: measured once per process, GPU and cell, when `automatic` first asks.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include <deeppcr/cell.hpp>

#include "device/cuda.hpp"
#include "newton/stopwatch.hpp"

namespace deeppcr::newton {

/// Of a kernel whose threads run steps: the time of one chain of steps, or, where there are many, what all
/// multiprocessors together get through.
struct KernelCost {
    double latency = 0;     ///< seconds per step, nothing else at work
    double throughput = 0;  ///< seconds per step of a channel, all at work
    double at_once = 1;     ///< chains that all multiprocessors hold; more run round after round. Not of tiles

    double seconds(double chains, double steps) const {
        const double rounds = std::floor(chains / at_once), last = chains - rounds * at_once;
        return steps * (rounds * per_step(at_once) + (last > 0 ? per_step(last) : 0));
    }

private:
    /// Where both count, neither hides the other: hypot() is within a fifth of what an H200 takes.
    double per_step(double chains) const { return std::hypot(latency, throughput * chains); }
};

struct DeviceCosts {
    double launch = 0;  ///< seconds from one launch to the next, when they do nothing
    KernelCost advance, multiply;
    KernelCost backward;  ///< that of `multiply`, in rounds of its own
    KernelCost tiles;     ///< latency: of a block of `fewest_tile_groups`
    index tiles_at_once = 1;
};

/// Channels of which all multiprocessors of the current GPU run a step at once.
template <class T>
double chains_at_once(const cell::DeviceKernels<T>& kernels, const cell::DeviceKernel<T>& kernel) {
    return double(std::max(1, kernel.resident_threads())) * device::multiprocessors() * kernels.channels_per_group;
}

/// Blocks that shoot tiles, on all multiprocessors of the current GPU.
template <class T>
index tiles_at_once(const cell::DeviceKernels<T>& kernels) {
    if (kernels.shoot_tiles.launch == nullptr) return 1;
    return index(std::max(1, kernels.shoot_tiles.resident_threads() / cell::tile_threads)) * device::multiprocessors();
}

constexpr int fewest_tile_groups = 8, most_tile_groups = 32;  // whole sectors of memory, and a warp

/// Without measurements: a step takes about a hundred cycles, and no longer while every thread that a GPU holds runs
/// one; with the product of Jacobians twice that. A tile's 32 chunks take two such sweeps and a plain one.
template <class T>
DeviceCosts assumed_device_costs(const cell::DeviceKernels<T>& kernels) {
    constexpr double launch = 3e-6, step = 1e-7;
    const double channels = chains_at_once(kernels, kernels.advance);
    const KernelCost multiply = {2 * step, 2 * step / channels, chains_at_once(kernels, kernels.multiply)};
    return {launch,
            {step, step / channels, channels},
            multiply,
            {multiply.latency, multiply.throughput, chains_at_once(kernels, kernels.backward)},
            {5 * step / 32, 5 * step / channels},
            tiles_at_once(kernels)};
}

template <class T>
DeviceCosts measure_device_costs(const cell::DeviceKernels<T>& kernels, int states, int inputs, int parameters,
                                 CUstream_st* stream) {
    using A = Arithmetic<T>;
    constexpr int launches = 8, repetitions = 3;
    constexpr index few_groups = 32, many_steps = 256, bytes_at_most = index(256) << 20;
    const Device here = device::current_gpu();
    const int multiprocessors = device::multiprocessors(), V = kernels.channels_per_group;
    const index full = index(kernels.advance.resident_threads()) * multiprocessors;
    const index row_bytes = full * V * (inputs + states) * index(sizeof(T));
    const index full_steps = std::clamp<index>(bytes_at_most / row_bytes, 4, 96);
    const index most_groups = std::max(full, few_groups);
    const index rows = std::max(full_steps, (many_steps * few_groups + full - 1) / full);
    // The driver's memory, not that of a MemorySource, which would keep it.
    const auto zeros = [&](index bytes) {
        std::shared_ptr<void> memory = device::allocate_on_gpu(bytes, here);
        device::fill_bytes(memory.get(), 0, bytes, stream);
        return memory;
    };
    constexpr index T_bytes = index(sizeof(T)), A_bytes = index(sizeof(A));
    const auto input = zeros(rows * full * V * inputs * T_bytes),
               trajectory = zeros(rows * full * V * states * T_bytes),
               parameter = zeros(parameters * most_groups * V * A_bytes),
               ends = zeros(most_groups * V * states * A_bytes),
               products = zeros(most_groups * V * states * states * A_bytes),
               status = zeros(index(sizeof(cell::SequenceStatus) + sizeof(cell::RunStatus)));

    const auto time = [&](const cell::DeviceKernel<T>& kernel, index groups, index steps, int tile_groups, int times) {
        cell::DeviceChunks<T> all;
        all.inputs = static_cast<const T*>(input.get());
        all.input_step = groups * V * inputs;
        all.parameters = static_cast<const A*>(parameter.get());
        all.steps = all.length = steps;
        all.batch = all.part_count = all.count = 1;
        all.groups = groups;
        all.channels = groups * V;
        all.multiprocessors = multiprocessors;
        all.trajectory = static_cast<T*>(trajectory.get());
        all.trajectory_step = groups * V * states;
        all.ends = static_cast<A*>(ends.get());
        all.products = static_cast<A*>(products.get());
        all.absolute_tolerance = all.relative_tolerance = 1;
        all.tile_groups = tile_groups;
        all.tile_shots = 1;
        all.sequences = static_cast<cell::SequenceStatus*>(status.get());
        all.run = reinterpret_cast<cell::RunStatus*>(all.sequences + 1);
        double least = std::numeric_limits<double>::infinity();
        for (int i = 0; i < repetitions; ++i) {
            device::synchronise(stream);
            const Clock::time_point begin = Clock::now();
            for (int launch = 0; launch < times; ++launch) kernel(all, stream);
            device::synchronise(stream);
            least = std::min(least, seconds_since(begin));
        }
        return least;
    };
    const double once = time(kernels.advance, 1, 1, 0, 1);
    DeviceCosts costs;
    costs.launch = std::max(0.0, time(kernels.advance, 1, 1, 0, 1 + launches) - once) / launches;
    const auto cost = [&](const cell::DeviceKernel<T>& kernel, index few, int tile_groups) {
        const double chains = chains_at_once(kernels, kernel);
        const index many = tile_groups > 0 ? full : std::min(full, index(chains) / V);
        return KernelCost{
            std::max(0.0, time(kernel, few, many_steps, tile_groups, 1) - once) / double(many_steps),
            std::max(0.0, time(kernel, many, full_steps, most_tile_groups, 1) - once) / double(full_steps * many * V),
            chains};
    };
    costs.advance = cost(kernels.advance, few_groups, 0);
    costs.multiply = cost(kernels.multiply, few_groups, 0);
    costs.backward = costs.multiply;
    costs.backward.at_once = chains_at_once(kernels, kernels.backward);
    if (kernels.shoot_tiles.launch != nullptr)
        costs.tiles = cost(kernels.shoot_tiles, fewest_tile_groups, fewest_tile_groups);
    costs.tiles_at_once = tiles_at_once(kernels);
    return costs;
}

/// The same for the same kernels and GPU in one process. Measuring takes, and gives back, up to some hundred MB, and
/// all is done in the stream; where there is no such memory, or nothing may be measured yet, costs are assumed.
template <class T>
DeviceCosts device_costs(const cell::DeviceKernels<T>& kernels, const cell::Kernels<T>& cell, CUstream_st* stream,
                         bool may_measure) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, DeviceCosts> known;
    const std::lock_guard lock(mutex);
    const std::pair<const void*, int> key(&kernels, device::current_gpu().ordinal());
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    if (!may_measure) return assumed_device_costs(kernels);
    DeviceCosts costs;
    try {
        costs = measure_device_costs(kernels, cell.states, cell.inputs, cell.parameters, stream);
    } catch (const OutOfMemory&) {
        costs = assumed_device_costs(kernels);
    }
    return known[key] = costs;
}

}  // namespace deeppcr::newton
