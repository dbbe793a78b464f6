// The loops over time that every Cell is compiled into: 16 neighbouring lanes at a time, for each instruction set.
//
// A lane is one channel of one sequence, or of one chunk of one. The step of a Cell is written for one lane; inlined
// into a loop over 16 of them, without branches, it becomes SIMD code. Blocks of 16 lanes are interleaved, step after
// step, so that the long chain of dependent operations of one hides behind those of the others. Every kernel also
// exists as plain code, for processors without the sets named here; which is used is decided at run time.
//
// Memory per lane and step: the inputs are read and the states written once; states, products of Jacobians, adjoints
// and parameters stay in the first-level cache.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <utility>

#include <deeppcr/array.hpp>
#include <deeppcr/scalar.hpp>

// A kernel has all of its Cell in itself (flatten) and is optimised whatever the program around it asks for, but for
// -O0, where GCC inlines nothing: it makes vectors of lanes from -O3 on.
#if defined(__clang__)
#define DEEPPCR_KERNEL DEEPPCR_FLATTEN
#define DEEPPCR_WIDEST
#elif defined(DEEPPCR_SANITIZED)
#define DEEPPCR_KERNEL DEEPPCR_FLATTEN
#define DEEPPCR_WIDEST ",prefer-vector-width=512"
#else
#define DEEPPCR_KERNEL DEEPPCR_FLATTEN, optimize("O3")
#define DEEPPCR_WIDEST ",prefer-vector-width=512"
#endif
#if defined(__x86_64__)
#define DEEPPCR_AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma" DEEPPCR_WIDEST), DEEPPCR_KERNEL))
#define DEEPPCR_AVX2 __attribute__((target("avx2,fma"), DEEPPCR_KERNEL))
#else
#define DEEPPCR_AVX512 __attribute__((DEEPPCR_KERNEL))
#define DEEPPCR_AVX2 __attribute__((DEEPPCR_KERNEL))
#endif
#define DEEPPCR_PLAIN __attribute__((DEEPPCR_KERNEL))
// Clang makes no vectors of these loops yet, asked to or not.
#if defined(__clang__)
#define DEEPPCR_INDEPENDENT_LANES
#else
#define DEEPPCR_INDEPENDENT_LANES _Pragma("GCC ivdep")
#endif

namespace deeppcr::cell {

constexpr int lanes = 16;
constexpr bool one_kernel_set = DEEPPCR_ONE_KERNEL_SET;

/// The memory of 16 lanes. K, G, P: states, inputs and parameters per channel; "states" are interleaved, lane after
/// lane, its K values side by side, and have a stride from step to step.
template <class T>
struct LaneBlock {
    const T* inputs;        ///< [steps, G, 16]
    const T* parameters;    ///< [P, 16]
    T* state;               ///< [K, 16]; backward: the adjoint; in and out
    T* product;             ///< [K, K, 16], in and out
    T* after;               ///< states [steps], out
    const T* before;        ///< states [steps]
    T* jacobian;            ///< [steps, 16, K, K], out
    const T* gradient;      ///< states [steps]: the loss' own gradient with respect to x_t
    T* input_gradient;      ///< [steps, G, 16], out
    T* parameter_gradient;  ///< [P, 16], in and out: added to
};

/// `steps` steps of `count` blocks; strides in elements.
template <class T>
struct LaneSweep {
    index steps = 0, count = 0;
    const LaneBlock<T>* blocks = nullptr;
    index input_step = 0, input_gate = 0, parameter_stride = 0;
    index after_step = 0, before_step = 0, jacobian_step = 0, gradient_step = 0, input_gradient_step = 0;
};

template <class T>
using Kernel = void (*)(const LaneSweep<T>& sweep);

/// What a Cell is compiled into, for one instruction set.
template <class T>
struct Kernels {
    std::string name;
    const std::type_info* cell = nullptr;
    int states = 0, inputs = 0, parameters = 0;
    Kernel<T> advance = nullptr;      ///< state <- f(state), after = state
    Kernel<T> advance_one = nullptr;  ///< advance for lane 0 of each block alone: the shortest chain of operations
    Kernel<T> multiply = nullptr;     ///< state <- f(state), product <- J product
    Kernel<T> apply = nullptr;        ///< after = f(before), each step on its own
    Kernel<T> linearise = nullptr;    ///< jacobian = J at before
    Kernel<T> backward = nullptr;     ///< from the last step: a = state + gradient; the gradients of inputs (set) and
                                      ///< parameters (added); state <- J^T a
    Kernel<T> correct = nullptr;      ///< backward without gradient, added to input_gradient and parameter_gradient
    Kernel<T> plain_step = nullptr;   ///< apply, without SIMD: what the reference backend runs, 1 lane per block
    Kernel<T> plain_linearise = nullptr;
    Kernel<T> plain_backward = nullptr;
};

/// Which of the instruction sets runs: 512, 256 (AVX2 and FMA) or 0 (plain).
int vector_bits();

template <class Cell, class T, class Stored = T>
struct Lane {
    static constexpr int K = Cell::states, G = Cell::inputs, P = Cell::parameters;
    std::array<T, K> x;
    std::array<T, G> u;
    std::array<T, P> p;

    DEEPPCR_INLINE void read_inputs(const LaneBlock<T>& block, const LaneSweep<T>& sweep, index step, int lane) {
        const T* inputs = block.inputs + step * sweep.input_step + lane;
        for (int g = 0; g < G; ++g) u[std::size_t(g)] = inputs[g * sweep.input_gate];
        for (int q = 0; q < P; ++q) p[std::size_t(q)] = block.parameters[q * sweep.parameter_stride + lane];
    }
    DEEPPCR_INLINE void read_state(const LaneBlock<T>& block, int lane) {
        for (int k = 0; k < K; ++k) x[std::size_t(k)] = block.state[k * lanes + lane];
    }
    DEEPPCR_INLINE void read_before(const LaneBlock<T>& block, const LaneSweep<T>& sweep, index step, int lane) {
        for (int k = 0; k < K; ++k) x[std::size_t(k)] = block.before[step * sweep.before_step + lane * K + k];
    }

    DEEPPCR_INLINE std::array<T, K> step() const {
        std::array<Scalar<T, Stored>, K> xs;
        std::array<Scalar<T, Stored>, G> us;
        std::array<Scalar<T, Stored>, P> ps;
        for (int k = 0; k < K; ++k) xs[std::size_t(k)].value = x[std::size_t(k)];
        for (int g = 0; g < G; ++g) us[std::size_t(g)].value = u[std::size_t(g)];
        for (int q = 0; q < P; ++q) ps[std::size_t(q)].value = p[std::size_t(q)];
        const std::array<Scalar<T, Stored>, K> result = Cell::step(xs, us, ps);
        std::array<T, K> values;
        for (int k = 0; k < K; ++k) values[std::size_t(k)] = result[std::size_t(k)].value;
        return values;
    }

    /// df applied to a direction (x', u', p').
    DEEPPCR_INLINE std::array<Dual<T>, K> derivative(const std::array<T, K>& dx, const std::array<T, G>& du,
                                                     const std::array<T, P>& dp) const {
        std::array<Dual<T>, K> xs;
        std::array<Dual<T>, G> us;
        std::array<Dual<T>, P> ps;
        for (int k = 0; k < K; ++k) xs[std::size_t(k)] = {x[std::size_t(k)], dx[std::size_t(k)]};
        for (int g = 0; g < G; ++g) us[std::size_t(g)] = {u[std::size_t(g)], du[std::size_t(g)]};
        for (int q = 0; q < P; ++q) ps[std::size_t(q)] = {p[std::size_t(q)], dp[std::size_t(q)]};
        return Cell::step(xs, us, ps);
    }

    /// The derivative with respect to variable `direction` of x, u, p in a row, times `adjoint`, summed over the
    /// states.
    template <int direction>
    DEEPPCR_INLINE T sensitivity(const std::array<T, K>& adjoint) const {
        std::array<T, K> dx;
        std::array<T, G> du;
        std::array<T, P> dp;
        for (int k = 0; k < K; ++k) dx[std::size_t(k)] = T(k == direction);
        for (int g = 0; g < G; ++g) du[std::size_t(g)] = T(K + g == direction);
        for (int q = 0; q < P; ++q) dp[std::size_t(q)] = T(K + G + q == direction);
        const std::array<Dual<T>, K> result = derivative(dx, du, dp);
        T sum = adjoint[0] * result[0].derivative;
        for (int k = 1; k < K; ++k) sum += adjoint[std::size_t(k)] * result[std::size_t(k)].derivative;
        return sum;
    }
    template <std::size_t... direction>
    DEEPPCR_INLINE std::array<T, sizeof...(direction)> sensitivities(const std::array<T, K>& adjoint,
                                                                     std::index_sequence<direction...>) const {
        return {sensitivity<int(direction)>(adjoint)...};
    }

    /// J times column `column` of a [K,K] matrix whose entries lie `stride` apart.
    template <int column>
    DEEPPCR_INLINE std::array<Dual<T>, K> times_column(const T* matrix, index stride) const {
        std::array<T, K> dx;
        for (int k = 0; k < K; ++k) dx[std::size_t(k)] = matrix[(k * K + column) * stride];
        return derivative(dx, {}, {});
    }
    template <std::size_t... column>
    DEEPPCR_INLINE std::array<std::array<Dual<T>, K>, K> times_matrix(const T* matrix, index stride,
                                                                      std::index_sequence<column...>) const {
        return {times_column<int(column)>(matrix, stride)...};
    }
    template <int column>
    DEEPPCR_INLINE std::array<Dual<T>, K> jacobian_column() const {
        std::array<T, K> dx;
        for (int k = 0; k < K; ++k) dx[std::size_t(k)] = T(k == column);
        return derivative(dx, {}, {});
    }
    template <std::size_t... column>
    DEEPPCR_INLINE std::array<std::array<Dual<T>, K>, K> jacobian_columns(std::index_sequence<column...>) const {
        return {jacobian_column<int(column)>()...};
    }
};

template <class Cell, class T>
struct Loops {
    static constexpr int K = Cell::states, G = Cell::inputs, P = Cell::parameters;

    DEEPPCR_INLINE static void advance(const LaneSweep<T>& sweep) {
        for (index i = 0; i < sweep.steps; ++i)
            for (index b = 0; b < sweep.count; ++b) {
                const LaneBlock<T> block = sweep.blocks[b];
                const LaneSweep<T> here = sweep;
                T* const after = block.after + i * here.after_step;
                DEEPPCR_INDEPENDENT_LANES
                for (int l = 0; l < lanes; ++l) {
                    Lane<Cell, T> lane;
                    lane.read_inputs(block, here, i, l);
                    lane.read_state(block, l);
                    const std::array<T, K> next = lane.step();
                    for (int k = 0; k < K; ++k) block.state[k * lanes + l] = next[std::size_t(k)];
                    for (int k = 0; k < K; ++k) after[l * K + k] = next[std::size_t(k)];
                }
            }
    }

    DEEPPCR_INLINE static void multiply(const LaneSweep<T>& sweep) {
        for (index i = 0; i < sweep.steps; ++i)
            for (index b = 0; b < sweep.count; ++b) {
                const LaneBlock<T> block = sweep.blocks[b];
                const LaneSweep<T> here = sweep;
                DEEPPCR_INDEPENDENT_LANES
                for (int l = 0; l < lanes; ++l) {
                    Lane<Cell, T> lane;
                    lane.read_inputs(block, here, i, l);
                    lane.read_state(block, l);
                    const auto columns = lane.times_matrix(block.product + l, lanes, std::make_index_sequence<K>());
                    for (int k = 0; k < K; ++k) block.state[k * lanes + l] = columns[0][std::size_t(k)].value;
                    for (int k = 0; k < K; ++k)
                        for (int m = 0; m < K; ++m)
                            block.product[(k * K + m) * lanes + l] = columns[std::size_t(m)][std::size_t(k)].derivative;
                }
            }
    }

    DEEPPCR_INLINE static void advance_one(const LaneSweep<T>& sweep) {
        for (index b = 0; b < sweep.count; ++b) {
            const LaneBlock<T> block = sweep.blocks[b];
            const LaneSweep<T> here = sweep;
            Lane<Cell, T> lane;
            lane.read_state(block, 0);
            for (index i = 0; i < here.steps; ++i) {
                lane.read_inputs(block, here, i, 0);
                lane.x = lane.step();
                for (int k = 0; k < K; ++k) block.after[i * here.after_step + k] = lane.x[std::size_t(k)];
            }
            for (int k = 0; k < K; ++k) block.state[k * lanes] = lane.x[std::size_t(k)];
        }
    }

    template <int width = lanes>
    DEEPPCR_INLINE static void apply(const LaneSweep<T>& sweep) {
        for (index i = 0; i < sweep.steps; ++i)
            for (index b = 0; b < sweep.count; ++b) {
                const LaneBlock<T> block = sweep.blocks[b];
                const LaneSweep<T> here = sweep;
                T* const after = block.after + i * here.after_step;
                DEEPPCR_INDEPENDENT_LANES
                for (int l = 0; l < width; ++l) {
                    Lane<Cell, T> lane;
                    lane.read_inputs(block, here, i, l);
                    lane.read_before(block, here, i, l);
                    const std::array<T, K> next = lane.step();
                    for (int k = 0; k < K; ++k) after[l * K + k] = next[std::size_t(k)];
                }
            }
    }

    template <int width = lanes>
    DEEPPCR_INLINE static void linearise(const LaneSweep<T>& sweep) {
        for (index i = 0; i < sweep.steps; ++i)
            for (index b = 0; b < sweep.count; ++b) {
                const LaneBlock<T> block = sweep.blocks[b];
                const LaneSweep<T> here = sweep;
                T* const jacobian = block.jacobian + i * here.jacobian_step;
                DEEPPCR_INDEPENDENT_LANES
                for (int l = 0; l < width; ++l) {
                    Lane<Cell, T> lane;
                    lane.read_inputs(block, here, i, l);
                    lane.read_before(block, here, i, l);
                    const auto columns = lane.jacobian_columns(std::make_index_sequence<K>());
                    for (int k = 0; k < K; ++k)
                        for (int m = 0; m < K; ++m)
                            jacobian[(l * K + k) * K + m] = columns[std::size_t(m)][std::size_t(k)].derivative;
                }
            }
    }

    template <bool correcting, int width = lanes>
    DEEPPCR_INLINE static void backward(const LaneSweep<T>& sweep) {
        for (index i = sweep.steps - 1; i >= 0; --i)
            for (index b = 0; b < sweep.count; ++b) {
                const LaneBlock<T> block = sweep.blocks[b];
                const LaneSweep<T> here = sweep;
                T* const input_gradient = block.input_gradient + i * here.input_gradient_step;
                const T* const gradient = block.gradient + i * here.gradient_step;
                DEEPPCR_INDEPENDENT_LANES
                for (int l = 0; l < width; ++l) {
                    Lane<Cell, T> lane;
                    lane.read_inputs(block, here, i, l);
                    lane.read_before(block, here, i, l);
                    std::array<T, K> adjoint;
                    for (int k = 0; k < K; ++k)
                        adjoint[std::size_t(k)] =
                            correcting ? block.state[k * lanes + l] : block.state[k * lanes + l] + gradient[l * K + k];
                    const std::array<T, K + G + P> result =
                        lane.sensitivities(adjoint, std::make_index_sequence<K + G + P>());
                    for (int k = 0; k < K; ++k) block.state[k * lanes + l] = result[std::size_t(k)];
                    for (int g = 0; g < G; ++g) {
                        T& entry = input_gradient[g * here.input_gate + l];
                        entry = correcting ? entry + result[std::size_t(K) + std::size_t(g)]
                                           : result[std::size_t(K) + std::size_t(g)];
                    }
                    for (int q = 0; q < P; ++q)
                        block.parameter_gradient[q * lanes + l] +=
                            result[std::size_t(K) + std::size_t(G) + std::size_t(q)];
                }
            }
    }

    static void plain_step(const LaneSweep<T>& sweep) { apply<1>(sweep); }
    static void plain_linearise(const LaneSweep<T>& sweep) { linearise<1>(sweep); }
    static void plain_backward(const LaneSweep<T>& sweep) { backward<false, 1>(sweep); }

#define DEEPPCR_CELL_KERNELS(attribute, set)                                                    \
    attribute static void advance_##set(const LaneSweep<T>& sweep) { advance(sweep); }          \
    attribute static void advance_one_##set(const LaneSweep<T>& sweep) { advance_one(sweep); }  \
    attribute static void multiply_##set(const LaneSweep<T>& sweep) { multiply(sweep); }        \
    attribute static void apply_##set(const LaneSweep<T>& sweep) { apply(sweep); }              \
    attribute static void linearise_##set(const LaneSweep<T>& sweep) { linearise(sweep); }      \
    attribute static void backward_##set(const LaneSweep<T>& sweep) { backward<false>(sweep); } \
    attribute static void correct_##set(const LaneSweep<T>& sweep) { backward<true>(sweep); }   \
    static Kernels<T> kernels_##set() {                                                         \
        return {name(),                                                                         \
                &typeid(Cell),                                                                  \
                K,                                                                              \
                G,                                                                              \
                P,                                                                              \
                advance_##set,                                                                  \
                advance_one_##set,                                                              \
                multiply_##set,                                                                 \
                apply_##set,                                                                    \
                linearise_##set,                                                                \
                backward_##set,                                                                 \
                correct_##set,                                                                  \
                plain_step,                                                                     \
                plain_linearise,                                                                \
                plain_backward};                                                                \
    }
    DEEPPCR_CELL_KERNELS(DEEPPCR_AVX512, avx512)
    DEEPPCR_CELL_KERNELS(DEEPPCR_AVX2, avx2)
    DEEPPCR_CELL_KERNELS(DEEPPCR_PLAIN, plain)
#undef DEEPPCR_CELL_KERNELS

    /// Cell::name where there is one, else what the compiler calls the type.
    static std::string name() {
        if constexpr (requires { std::string(Cell::name); })
            return Cell::name;
        else
            return typeid(Cell).name();
    }
};

/// The kernels of a Cell for this machine's instruction set. Where numbers are stored in 16 bits, none: only its name
/// and sizes.
template <class Cell, class T>
const Kernels<T>& kernels_of() {
    static const Kernels<T> kernels = [] {
        if constexpr (is_stored_in_16_bits<T>) {
            Kernels<T> sizes;
            sizes.name = Loops<Cell, float>::name();
            sizes.cell = &typeid(Cell);
            sizes.states = Cell::states;
            sizes.inputs = Cell::inputs;
            sizes.parameters = Cell::parameters;
            return sizes;
        } else {
            if constexpr (!one_kernel_set) {
                if (vector_bits() == 512) return Loops<Cell, T>::kernels_avx512();
                if (vector_bits() == 256) return Loops<Cell, T>::kernels_avx2();
            }
            return Loops<Cell, T>::kernels_plain();
        }
    }();
    return kernels;
}

}  // namespace deeppcr::cell
