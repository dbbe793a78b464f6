// How the benchmarks of GPUs measure: arrays filled and compared on the GPU, bodies timed in turns, and the copy that
// all is compared with. Every result is verified over its whole length before it is timed; NaN fails.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include <deeppcr/deeppcr.hpp>
#include <deeppcr/launch.cuh>
#include <only_on_gpu.cuh>

#include "rows.hpp"

namespace deeppcr::benchmark {

constexpr Device there = Device::cuda();
constexpr Execution on_the_gpu{.backend = Backend::cuda};

template <class T>
constexpr const char* type_name = std::is_same_v<T, double>     ? "double"
                                  : std::is_same_v<T, float>    ? "float"
                                  : std::is_same_v<T, bfloat16> ? "bf16"
                                                                : "fp16";

/// Threads that share `count` elements, each taking every `all_threads()`-th.
inline cuda::Launch threads_for(index count) {
    return cuda::one_each(std::max<index>(1, std::min(count, index(1) << 20)), nullptr);
}
__device__ inline index this_thread() { return index(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline index all_threads() { return index(gridDim.x) * blockDim.x; }

/// Uniform numbers in [low, high).
template <class T>
__global__ void fill_kernel(T* data, index count, Arithmetic<T> low, Arithmetic<T> high, unsigned long long seed) {
    for (index i = this_thread(); i < count; i += all_threads()) {
        unsigned long long bits = ((unsigned long long)(i) + (seed << 40)) * 0x9e3779b97f4a7c15ULL;
        bits = (bits ^ bits >> 29) * 0xbf58476d1ce4e5b9ULL;
        bits ^= bits >> 32;
        data[i] = cuda::narrow<T>(low + (high - low) * Arithmetic<T>(float(bits >> 40) * 0x1p-24F));
    }
}
template <class T>
Buffer<T> uniform(const Shape& shape, double low, double high, unsigned long long seed) {
    Buffer<T> result = Buffer<T>::uninitialised(shape, Layout::steps_first, there);
    cuda::launch(threads_for(result.size()), fill_kernel<T>, result.data(), result.size(), Arithmetic<T>(low),
                 Arithmetic<T>(high), seed);
    return result;
}

/// Bits of the largest |difference| and of the largest |value|; infinity where one is NaN.
struct Extremes {
    unsigned long long apart = 0, size = 0;
};
/// The largest of what one thread has seen; NaN stays.
struct Largest {
    double value = 0;
    __device__ void see(double other) {
        if (value == value && !(other <= value)) value = other;
    }
    __device__ void raise(unsigned long long* target) const {
        const double kept = value == value ? value : std::numeric_limits<double>::infinity();
        unsigned long long bits = 0;
        memcpy(&bits, &kept, sizeof bits);
        if (bits > 0) atomicMax(target, bits);
    }
};

/// The largest of what several threads found, relative to the largest value: 0 where all agree, infinity for NaN.
template <class Kernel, class... Arguments>
double relative_extreme(index count, Kernel kernel, Arguments... arguments) {
    const auto memory = detail::allocate(index(sizeof(Extremes)), there);
    detail::fill_zeros(memory.get(), index(sizeof(Extremes)), there);
    cuda::launch(threads_for(count), kernel, arguments..., count, static_cast<Extremes*>(memory.get()));
    Extremes found;
    detail::copy(&found, memory.get(), index(sizeof found));
    const double apart = std::bit_cast<double>(found.apart), size = std::bit_cast<double>(found.size);
    if (!std::isfinite(size)) return std::numeric_limits<double>::infinity();
    return apart == 0 ? 0 : apart / size;
}

template <class T, class U>
__global__ void compare_kernel(const T* a, const U* b, index count, Extremes* extremes) {
    Largest apart, size;
    for (index i = this_thread(); i < count; i += all_threads()) {
        const double expected = double(cuda::widen(b[i]));
        apart.see(fabs(double(cuda::widen(a[i])) - expected));
        size.see(fabs(expected));
    }
    apart.raise(&extremes->apart);
    size.raise(&extremes->size);
}
/// Between all elements of two arrays on the GPU, relative to the largest of `expected`.
template <class T, class U>
double difference(const Buffer<T>& result, const Buffer<U>& expected) {
    if (result.size() != expected.size()) throw Error("arrays of different sizes are compared");
    return relative_extreme(result.size(), compare_kernel<T, U>, static_cast<const T*>(result.data()),
                            static_cast<const U*>(expected.data()));
}
/// Throws where `found` is more, or NaN; else notes it in the row.
inline void verify(Row& row, const std::string& what, double found, double limit) {
    row.details[what] = found;
    if (!(found <= limit)) throw Error(what + " is " + std::to_string(found) + ", more than " + std::to_string(limit));
}

/// A body that says how many seconds it took.
using Timed = std::function<double()>;

/// Seconds between events around `body`, gaps included in which the GPU waits for it. host_ahead: the GPU is busy with
/// something else while it is enqueued, as within a network.
inline Timed on_gpu(std::function<void()> body, bool host_ahead = false) {
    const auto stopwatch = std::make_shared<Stopwatch>();
    return [stopwatch, host_ahead, body = std::move(body)] {
        if (host_ahead) keep_busy();
        stopwatch->begin();
        body();
        return stopwatch->end();
    };
}

/// Runs all bodies one after the other, again and again: twice for warming up, then until each has had `enough`
/// seconds or many turns.
inline std::vector<Timing> take_turns(const std::vector<Timed>& bodies, bool tiny) {
    constexpr double enough = 0.15, too_much = 2;  // seconds of a body
    constexpr int fewest = 5, most = 200, warm_up = 2;
    std::vector<std::vector<double>> seconds(bodies.size());
    double slowest = 0, fastest = 0;
    for (int turn = 0; turn < (tiny ? 3 : warm_up + most); ++turn) {
        if (turn > warm_up + 1 && slowest > too_much) break;
        if (turn >= warm_up + fewest && fastest > enough) break;
        slowest = 0;
        fastest = std::numeric_limits<double>::infinity();
        for (std::size_t i = 0; i < bodies.size(); ++i) {
            const double taken = bodies[i]();
            if (turn >= warm_up) seconds[i].push_back(taken);
            double total = 0;
            for (const double s : seconds[i]) total += s;
            slowest = std::max(slowest, total);
            fastest = std::min(fastest, total);
        }
    }
    std::vector<Timing> timings;
    for (std::vector<double>& of_body : seconds) timings.push_back(summarise(std::move(of_body)));
    return timings;
}

/// The device-to-device copy that moves as many bytes, half of them read and half written.
class Copy {
public:
    explicit Copy(double bytes)
        : half_(index(bytes / 2)), from_(detail::allocate(half_, there)), to_(detail::allocate(half_, there)) {
        detail::fill_zeros(from_.get(), half_, there);
    }
    Timed timed(bool host_ahead = false) const {
        return on_gpu(
            [half = half_, from = from_, to = to_] {
                cuda::check(cudaMemcpyAsync(to.get(), from.get(), std::size_t(half), cudaMemcpyDeviceToDevice, nullptr),
                            "copying");
            },
            host_ahead);
    }

private:
    index half_;
    std::shared_ptr<void> from_, to_;
};
constexpr const char* copy_name = "copy of the same bytes";

/// Seconds of ours and of the baseline, in turns.
inline void race(Row& row, const Timed& ours, const std::string& baseline_name, const Timed& baseline, bool tiny) {
    const std::vector<Timing> timings = take_turns({ours, baseline}, tiny);
    row.ours = timings[0];
    row.baseline = timings[1];
    row.baseline_name = baseline_name;
}

// The parts of the program.
void measure_ceilings(Results& results);
void measure_first(Results& results);
void measure_solves(Results& results);
void measure_cells(Results& results);
void measure_map(Results& results);
void measure_chains(Results& results);

}  // namespace deeppcr::benchmark
