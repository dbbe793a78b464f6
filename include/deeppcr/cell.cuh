// The loops over time that a Cell is compiled into for GPUs, from the same functor as for processors. In one .cu file:
//
//     #include <deeppcr/cell.cuh>
//     DEEPPCR_CELL_ON_GPU(LeakyTanh);   // its step must be constexpr
//
// A thread runs one channel of one chunk of steps (see cell_device.hpp); the 32 threads of a warp have neighbouring
// channels, so that inputs and states are read and written in whole lines, as they are, without a transposition. The
// inputs of the next `ahead` steps are on their way while those at hand are computed with; states, products of
// Jacobians, adjoints and parameters stay in registers. Bytes per step and channel: G numbers read and K written.
#pragma once

#include <type_traits>

#include <deeppcr/cell.hpp>
#include <deeppcr/cell_device.hpp>
#include <deeppcr/launch.cuh>

namespace deeppcr::cell {

constexpr int steps_per_sum = 64;  // of parameter gradients in T, before they are added up in double

/// The channel of a chunk that this thread runs.
template <class T>
struct Here {
    index channel, part, chunk, sequence, first, last, begins;
    bool exists;

    __device__ explicit Here(const DeviceChunks<T>& all, index thread) {
        const index rows = all.part_count * all.channels;
        chunk = thread / rows;
        part = thread % rows / all.channels;
        channel = thread % all.channels;
        const SequencePart whole = all.parts != nullptr ? all.parts[part] : SequencePart{part, 0, all.steps};
        sequence = whole.sequence;
        begins = whole.first;
        first = whole.first + chunk * all.length;
        last = first + all.length < whole.last ? first + all.length : whole.last;
        exists = chunk < all.count && first < last;
    }
    /// Where this channel's entry of [count, parts, C, size] begins; `distance` chunks further on.
    __device__ index boundary(const DeviceChunks<T>& all, int size, index distance = 0) const {
        return (((chunk + distance) * all.part_count + part) * all.channels + channel) * size;
    }
    __device__ bool has_next(const DeviceChunks<T>& all) const {
        return all.parts != nullptr ? last < all.parts[part].last : last < all.steps;
    }
};

template <class T>
__device__ index this_thread() {
    return index(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// The larger of the lanes' values goes to `target`: by one of them where all have the same target.
__device__ inline void raise(unsigned long long* target, unsigned long long value) {
    const auto address = reinterpret_cast<unsigned long long>(target);
    const bool alike = __all_sync(~0U, __shfl_sync(~0U, address, 0) == address) != 0;
    if (!alike) {
        if (target != nullptr && value > 0) atomicMax(target, value);
        return;
    }
    for (int d = 16; d > 0; d /= 2) {
        const unsigned long long other = __shfl_xor_sync(~0U, value, d);
        value = other > value ? other : value;
    }
    if (threadIdx.x % 32 == 0 && target != nullptr && value > 0) atomicMax(target, value);
}

__device__ inline unsigned long long bits_of(double value) {
    unsigned long long bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <class Cell, class T>
struct OnGpu {
    static constexpr int K = Cell::states, G = Cell::inputs, P = Cell::parameters;
    static constexpr int ahead = G <= 4 ? 8 : G <= 8 ? 4 : 2;  // steps whose inputs are on their way
    using Chunks = DeviceChunks<T>;
    using LaneOfCell = Lane<Cell, T>;

    /// Inputs of `ahead` steps of one channel.
    struct Inputs {
        std::array<T, G> at[ahead];

        __device__ __forceinline__ void load(const Chunks& all, const T* inputs, index left) {
            DEEPPCR_UNROLL
            for (int i = 0; i < ahead; ++i)
                if (i < left)
                    for (int g = 0; g < G; ++g) at[i][std::size_t(g)] = inputs[i * all.input_step + g * all.channels];
        }
    };

    __device__ static const T* inputs_at(const Chunks& all, const Here<T>& here, index step) {
        return all.inputs + step * all.input_step + here.sequence * all.input_batch + here.channel;
    }
    __device__ static T* state_at(const Chunks& all, const Here<T>& here, index step) {
        return all.trajectory + step * all.trajectory_step + here.sequence * all.trajectory_batch + here.channel * K;
    }
    __device__ __forceinline__ static std::array<T, K> read(const T* from) {
        std::array<T, K> x;
        for (int k = 0; k < K; ++k) x[std::size_t(k)] = from[k];
        return x;
    }
    __device__ __forceinline__ static void write(T* to, const std::array<T, K>& x) {
        for (int k = 0; k < K; ++k) to[k] = x[std::size_t(k)];
    }
    __device__ static std::array<T, K> initial_state(const Chunks& all, const Here<T>& here) {
        if (all.initial != nullptr) return read(all.initial + here.part * all.initial_part + here.channel * K);
        std::array<T, K> zeros;
        for (int k = 0; k < K; ++k) zeros[std::size_t(k)] = T(0);
        return zeros;
    }
    __device__ static std::array<T, K> start_state(const Chunks& all, const Here<T>& here) {
        if (here.chunk > 0 && all.starts != nullptr) return read(all.starts + here.boundary(all, K));
        return initial_state(all, here);
    }
    __device__ static LaneOfCell lane_with_parameters(const Chunks& all, const Here<T>& here) {
        LaneOfCell lane;
        for (int q = 0; q < P; ++q) lane.p[std::size_t(q)] = all.parameters[q * all.channels + here.channel];
        return lane;
    }

    /// Calls visit(step) for steps first .. last-1, with the inputs of each in lane.u; stops where it says false.
    template <class Visit>
    __device__ __forceinline__ static void for_steps(const Chunks& all, const Here<T>& here, index first, index last,
                                                     LaneOfCell& lane, const Visit& visit) {
        Inputs now, next;
        const T* inputs = inputs_at(all, here, first);
        next.load(all, inputs, last - first);
        for (index t = first; t < last; t += ahead) {
            now = next;
            inputs += ahead * all.input_step;
            next.load(all, inputs, last - t - ahead);
            DEEPPCR_UNROLL
            for (int i = 0; i < ahead; ++i) {
                if (t + i >= last) return;
                lane.u = now.at[i];
                if (!visit(t + i)) return;
            }
        }
    }

    /// 0 exactly where all are finite.
    __device__ __forceinline__ static T zero_of(const std::array<T, K>& x) {
        T sum = T(0) * x[0];
        for (int k = 1; k < K; ++k) sum += T(0) * x[std::size_t(k)];
        return sum;
    }
    __device__ static void note_non_finite(const Chunks& all, const Here<T>& here, T zero) {
        if (zero == T(0)) return;
        // Where exactly, the slow way: it is the end of this sequence.
        for (index t = here.first; t < here.last; ++t)
            if (zero_of(read(state_at(all, here, t))) != T(0)) {
                atomicMax(&all.sequences[here.sequence].first_non_finite, (unsigned long long)(all.steps - t));
                atomicOr(&all.run->non_finite, 1U);
                return;
            }
    }

    __device__ static void advance(const Chunks& all, index thread) {
        const Here<T> here(all, thread);
        if (!here.exists) return;
        LaneOfCell lane = lane_with_parameters(all, here);
        lane.x = start_state(all, here);
        T zero = T(0);
        T* to = all.trajectory != nullptr ? state_at(all, here, here.first) : nullptr;
        for_steps(all, here, here.first, here.last, lane, [&](index) {
            lane.x = lane.step();
            if (to != nullptr) {
                write(to, lane.x);
                to += all.trajectory_step;
                zero += zero_of(lane.x);
            }
            return true;
        });
        if (all.ends != nullptr) write(all.ends + here.boundary(all, K), lane.x);
        note_non_finite(all, here, zero);
    }

    __device__ static void multiply(const Chunks& all, index thread) {
        const Here<T> here(all, thread);
        if (!here.exists) {
            if (here.chunk >= all.count) return;
            for (int e = 0; e < K; ++e) all.ends[here.boundary(all, K) + e] = T(0);
            for (int e = 0; e < K * K; ++e) all.products[here.boundary(all, K * K) + e] = T(0);
            return;
        }
        LaneOfCell lane = lane_with_parameters(all, here);
        lane.x = start_state(all, here);
        T product[K * K];
        for (int e = 0; e < K * K; ++e) product[e] = T(e / K == e % K);
        for_steps(all, here, here.first, here.last, lane, [&](index) {
            const auto columns = lane.times_matrix(product, 1, std::make_index_sequence<K>());
            for (int k = 0; k < K; ++k) {
                lane.x[std::size_t(k)] = columns[0][std::size_t(k)].value;
                for (int m = 0; m < K; ++m) product[k * K + m] = columns[std::size_t(m)][std::size_t(k)].derivative;
            }
            return true;
        });
        write(all.ends + here.boundary(all, K), lane.x);
        for (int e = 0; e < K * K; ++e) all.products[here.boundary(all, K * K) + e] = product[e];
    }

    __device__ static void repair(const Chunks& all, index thread) {
        const Here<T> here(all, thread);
        const bool asked = here.exists && here.chunk > 0 &&
                           (all.old_changed == nullptr || all.old_changed[here.boundary(all, 1, -1)] != 0);
        double residual = 0, relative = 0;
        unsigned long long repeated = 0;
        bool met = true;
        if (asked) {
            LaneOfCell lane = lane_with_parameters(all, here);
            lane.x = read(all.old_ends + here.boundary(all, K, -1));
            met = false;
            T zero = T(0);
            T* at = state_at(all, here, here.first);
            for_steps(all, here, here.first, here.last, lane, [&](index t) {
                const std::array<T, K> old = read(at);
                lane.x = lane.step();
                double apart = 0, size = 0;
                for (int k = 0; k < K; ++k) {
                    const double difference = fabs(double(lane.x[std::size_t(k)]) - double(old[std::size_t(k)]));
                    const double magnitude = fabs(double(old[std::size_t(k)]));
                    if (!(difference <= apart)) apart = difference;
                    if (magnitude > size) size = magnitude;
                }
                const double allowed = all.absolute_tolerance + all.relative_tolerance * size;
                repeated = (unsigned long long)(t + 1 - here.first);
                if (apart <= allowed) {  // false for NaN; the old state stays, and the mismatch is a tested residual
                    residual = apart;
                    relative = apart == 0 ? 0 : apart / allowed;
                    met = true;
                    return false;
                }
                write(at, lane.x);
                zero += zero_of(lane.x);
                at += all.trajectory_step;
                return true;
            });
            write(all.ends + here.boundary(all, K), met ? read(all.old_ends + here.boundary(all, K)) : lane.x);
            note_non_finite(all, here, zero);
        } else if (here.exists) {
            write(all.ends + here.boundary(all, K), read(all.old_ends + here.boundary(all, K)));
        }
        const bool pending = asked && !met && here.has_next(all);
        if (here.chunk < all.count) all.changed[here.boundary(all, 1)] = pending ? 1 : 0;
        SequenceStatus* const status = here.exists ? all.sequences + here.sequence : nullptr;
        raise(status != nullptr ? &status->residual : nullptr, bits_of(residual));
        raise(status != nullptr ? &status->relative_residual : nullptr, bits_of(relative));
        raise(&all.run->repeated, repeated);
        const unsigned waiting = __ballot_sync(~0U, pending);
        if (threadIdx.x % 32 == 0 && waiting != 0) atomicAdd(&all.run->pending, unsigned(__popc(waiting)));
    }

    /// The first chunk of a channel whose predecessor's end is new; `count` where there is none.
    __device__ static index first_pending(const Chunks& all, Here<T>& here) {
        for (here.chunk = 1; here.chunk < all.count; ++here.chunk)
            if (all.old_changed[here.boundary(all, 1, -1)] != 0) break;
        return here.chunk;
    }

    __device__ static void finish(const Chunks& all, index thread) {
        if (all.run->pending == 0 || thread >= all.part_count * all.channels) return;
        Here<T> here(all, thread);
        if (!here.exists || first_pending(all, here) >= all.count) return;
        const SequencePart whole = all.parts != nullptr ? all.parts[here.part] : SequencePart{here.part, 0, all.steps};
        here.first = whole.first + here.chunk * all.length;
        here.last = whole.last;
        LaneOfCell lane = lane_with_parameters(all, here);
        lane.x = read(all.old_ends + here.boundary(all, K, -1));
        T zero = T(0);
        T* to = state_at(all, here, here.first);
        for_steps(all, here, here.first, here.last, lane, [&](index) {
            lane.x = lane.step();
            write(to, lane.x);
            to += all.trajectory_step;
            zero += zero_of(lane.x);
            return true;
        });
        atomicAdd(&all.sequences[here.sequence].sequential_steps, (unsigned long long)(here.last - here.first));
        note_non_finite(all, here, zero);
    }

    /// One step of the backward pass: `adjoint` becomes J^T times itself. Gradients of the inputs are set, or added to.
    template <bool adding>
    __device__ __forceinline__ static void step_back(const Chunks& all, const Here<T>& here, index t, LaneOfCell& lane,
                                                     std::array<T, K>& adjoint, std::array<T, P>& sums) {
        const T* const inputs = inputs_at(all, here, t);
        for (int g = 0; g < G; ++g) lane.u[std::size_t(g)] = inputs[g * all.channels];
        lane.x = t == here.begins ? initial_state(all, here) : read(state_at(all, here, t - 1));
        const std::array<T, K + G + P> result = lane.sensitivities(adjoint, std::make_index_sequence<K + G + P>());
        for (int k = 0; k < K; ++k) adjoint[std::size_t(k)] = result[std::size_t(k)];
        T* const gradient = all.input_gradient + (t * all.batch + here.sequence) * G * all.channels + here.channel;
        for (int g = 0; g < G; ++g) {
            T& entry = gradient[g * all.channels];
            entry = adding ? entry + result[std::size_t(K + g)] : result[std::size_t(K + g)];
        }
        for (int q = 0; q < P; ++q) sums[std::size_t(q)] += result[std::size_t(K + G + q)];
    }
    __device__ static void add_sums(const Chunks& all, const Here<T>& here, std::array<T, P>& sums) {
        for (int q = 0; q < P; ++q) {
            all.parameter_gradient[((here.chunk * all.part_count + here.part) * P + q) * all.channels + here.channel] +=
                double(sums[std::size_t(q)]);
            sums[std::size_t(q)] = T(0);
        }
    }
    __device__ static std::array<T, P> no_sums() {
        std::array<T, P> sums;
        for (int q = 0; q < P; ++q) sums[std::size_t(q)] = T(0);
        return sums;
    }
    __device__ static T largest(const std::array<T, K>& values) {
        T size = T(0);
        for (int k = 0; k < K; ++k) {
            const T magnitude = values[std::size_t(k)] < T(0) ? -values[std::size_t(k)] : values[std::size_t(k)];
            if (!(magnitude <= size)) size = magnitude;
        }
        return size;
    }

    __device__ static void backward(const Chunks& all, index thread) {
        const Here<T> here(all, thread);
        if (!here.exists) return;
        LaneOfCell lane = lane_with_parameters(all, here);
        std::array<T, K> adjoint;
        for (int k = 0; k < K; ++k) adjoint[std::size_t(k)] = T(0);
        std::array<T, P> sums = no_sums();
        for (index t = here.last - 1; t >= here.first; --t) {
            const T* const gradient =
                all.output_gradient + t * all.gradient_step + here.sequence * all.gradient_batch + here.channel * K;
            for (int k = 0; k < K; ++k) adjoint[std::size_t(k)] += gradient[k];
            step_back<false>(all, here, t, lane, adjoint, sums);
            if ((here.last - t) % steps_per_sum == 0) add_sums(all, here, sums);
        }
        add_sums(all, here, sums);
        write(all.ends + here.boundary(all, K), adjoint);
        if (here.chunk == 0) write(all.initial_gradient + (here.part * all.channels + here.channel) * K, adjoint);
    }

    /// Sends `adjoint` from behind a chunk through it; true where something is left of it at the chunk's start.
    __device__ static bool send(const Chunks& all, const Here<T>& here, LaneOfCell& lane, std::array<T, K>& adjoint,
                                unsigned long long& corrected) {
        const T negligible = largest(adjoint) * std::numeric_limits<T>::epsilon() / T(16);
        std::array<T, P> sums = no_sums();
        bool left = largest(adjoint) != T(0);
        for (index t = here.last - 1; t >= here.first && left; --t) {
            step_back<true>(all, here, t, lane, adjoint, sums);
            left = !(largest(adjoint) <= negligible);
            corrected = (unsigned long long)(here.last - t);
            if ((here.last - t) % steps_per_sum == 0) add_sums(all, here, sums);
        }
        add_sums(all, here, sums);
        if (left && here.chunk == 0) {
            T* const initial = all.initial_gradient + (here.part * all.channels + here.channel) * K;
            for (int k = 0; k < K; ++k) initial[k] += adjoint[std::size_t(k)];
        }
        return left;
    }

    __device__ static void correct(const Chunks& all, index thread) {
        const Here<T> here(all, thread);
        const bool asked = here.exists && here.has_next(all) &&
                           (all.old_changed == nullptr || all.old_changed[here.boundary(all, 1, 1)] != 0);
        bool pending = false;
        unsigned long long corrected = 0;
        if (asked) {
            LaneOfCell lane = lane_with_parameters(all, here);
            std::array<T, K> adjoint = read(all.old_ends + here.boundary(all, K, 1));
            pending = send(all, here, lane, adjoint, corrected) && here.chunk > 0;
            write(all.ends + here.boundary(all, K), adjoint);
        }
        if (here.chunk < all.count) all.changed[here.boundary(all, 1)] = pending ? 1 : 0;
        raise(&all.run->repeated, corrected);
        const unsigned waiting = __ballot_sync(~0U, pending);
        if (threadIdx.x % 32 == 0 && waiting != 0) atomicAdd(&all.run->pending, unsigned(__popc(waiting)));
    }

    __device__ static void finish_backward(const Chunks& all, index thread) {
        if (all.run->pending == 0 || thread >= all.part_count * all.channels) return;
        Here<T> here(all, thread);
        if (!here.exists) return;
        const SequencePart whole = all.parts != nullptr ? all.parts[here.part] : SequencePart{here.part, 0, all.steps};
        LaneOfCell lane = lane_with_parameters(all, here);
        std::array<T, K> adjoint;
        for (int k = 0; k < K; ++k) adjoint[std::size_t(k)] = T(0);
        unsigned long long corrected = 0;
        for (here.chunk = (whole.last - whole.first - 1) / all.length - 1; here.chunk >= 0; --here.chunk) {
            if (all.old_changed[here.boundary(all, 1, 1)] != 0)
                for (int k = 0; k < K; ++k) adjoint[std::size_t(k)] += all.old_ends[here.boundary(all, K, 1) + k];
            here.first = whole.first + here.chunk * all.length;
            here.last = here.first + all.length;
            if (!send(all, here, lane, adjoint, corrected))
                for (int k = 0; k < K; ++k) adjoint[std::size_t(k)] = T(0);
        }
    }

    static DeviceKernels<T> kernels();
};

constexpr int cell_threads = 128;  // of a block: no thread knows of any other but those of its warp

#define DEEPPCR_CELL_KERNEL(name)                                                                                \
    template <class Cell, class T>                                                                               \
    __global__ void __launch_bounds__(cell_threads) name##_kernel(const __grid_constant__ DeviceChunks<T> all) { \
        OnGpu<Cell, T>::name(all, this_thread<T>());                                                             \
    }                                                                                                            \
    template <class Cell, class T>                                                                               \
    void launch_##name(const DeviceChunks<T>& all, CUstream_st* stream) {                                        \
        const index threads = all.count * all.part_count * all.channels;                                         \
        cuda::Launch where = cuda::one_each(threads, stream, cell_threads);                                      \
        cuda::launch(where, name##_kernel<Cell, T>, all);                                                        \
    }
DEEPPCR_CELL_KERNEL(advance)
DEEPPCR_CELL_KERNEL(multiply)
DEEPPCR_CELL_KERNEL(repair)
DEEPPCR_CELL_KERNEL(finish)
DEEPPCR_CELL_KERNEL(backward)
DEEPPCR_CELL_KERNEL(correct)
DEEPPCR_CELL_KERNEL(finish_backward)
#undef DEEPPCR_CELL_KERNEL

template <class Cell, class T>
DeviceKernels<T> OnGpu<Cell, T>::kernels() {
    return {launch_advance<Cell, T>,  launch_multiply<Cell, T>, launch_repair<Cell, T>,         launch_finish<Cell, T>,
            launch_backward<Cell, T>, launch_correct<Cell, T>,  launch_finish_backward<Cell, T>};
}

/// Its constructor tells the library of the kernels for a Cell.
template <deeppcr::Cell C>
struct RegisteredOnGpu {
    RegisteredOnGpu() {
        register_device_kernels<float>(typeid(C), OnGpu<C, float>::kernels());
        register_device_kernels<double>(typeid(C), OnGpu<C, double>::kernels());
    }
};

}  // namespace deeppcr::cell

/// In one .cu file, at namespace scope: `evaluate` and `adjoint` then run recurrences of this Cell with Backend::cuda.
#define DEEPPCR_CELL_ON_GPU(type) static const ::deeppcr::cell::RegisteredOnGpu<type> deeppcr_registered_on_gpu_##type
