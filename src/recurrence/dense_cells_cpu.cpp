// DenseCell with SIMD and threads.
//
// A step is one matrix product for the gates of some hidden units (product-inl.hpp), written to a small scratch, and
// one elementwise sweep that turns these sums, the inputs and the old state into the new one. The panels of the gates
// of a hidden unit lie side by side, so that a sweep follows as soon as a few panels are done:
//
//     sums   | r of units 0..15 | z of units 0..15 | n of units 0..15 | r of units 16..31 | ...     per sequence
//
// `run` shares the sequences among threads, which then never wait for each other. Where there are too few of them, or
// where the weights exceed a core's cache, threads take different hidden units instead, with a barrier after each step:
// each core then reads its own part of the weights only, in alternating order, so that the part that it read last is
// the first that it reads in the next step.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "device/simd.hpp"
#include "device/threads.hpp"
#include "recurrence/dense_cells_kernels.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/dense_cells_cpu.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <hwy/highway.h>

#include "recurrence/activation-inl.hpp"
#include "recurrence/product-inl.hpp"

#ifndef DEEPPCR_RECURRENCE_DENSE_CELLS_CPU_ONCE
#define DEEPPCR_RECURRENCE_DENSE_CELLS_CPU_ONCE
namespace deeppcr::dense_cell {

/// The operations of one instruction set, for one type.
template <class T>
struct Kernels {
    decltype(&run<Backend::cpu, T>) run;
    decltype(&linearise<Backend::cpu, T>) linearise;
    decltype(&backward<Backend::cpu, T>) backward;
};

/// Work, in multiplications, that is worth waking a thread for: about 10 microseconds.
constexpr index work_per_thread = index(1) << 18;
/// Work of one step per thread that is worth a barrier.
constexpr index work_per_barrier = index(1) << 16;
/// Weights of more bytes than this do not stay in a core's second-level cache.
constexpr index cache_bytes = index(3) << 18;
/// Bytes of scratch that stay in the first-level cache.
constexpr index scratch_bytes = 16384;
/// Fewest sequences that are worth a thread of their own.
constexpr index fewest_rows = 4;
/// States that are linearised together.
constexpr index group_rows = 64;
/// Jacobians larger than this are written past the caches.
constexpr index stream_bytes = index(1) << 22;
/// Bytes of slopes and deltas that the backward pass keeps for some steps, and the fewest states that it keeps.
constexpr index tape_bytes = index(1) << 18, tape_rows = 64;

/// A range of panels, that is of hidden units.
struct Panels {
    index first, last;
};

}  // namespace deeppcr::dense_cell
#endif

HWY_BEFORE_NAMESPACE();
namespace deeppcr::dense_cell::HWY_NAMESPACE {
using namespace chain::HWY_NAMESPACE;  // NOLINT(google-build-using-namespace): products and activations

/// What a kind of cell does with one vector of hidden units. Arrays of several parts (inputs and deltas per gate,
/// states of an LSTM) have them `hidden` apart, sums `panel_width` apart, slopes `stride` apart.
///   Forward    the new state from the sums b + W h; the slopes (each array of `slopes` has a name below), if wanted
///   Scale      the Jacobian's rows of one unit from the slopes, given the gates' rows of W
///   Deltas     gradients of inputs and sums from the adjoint state y; y becomes what passes back past the gates
template <DenseCellKind kind>
struct Gates;

template <Activation activation>
struct ElmanGates {
    static constexpr index gates = 1, parts = 1, slopes = 1;
    enum Slope { by_sum };

    template <bool partial, bool with_slopes, class D, class T = hn::TFromD<D>>
    static HWY_INLINE void Forward(D d, index count, index, const T* sums, const T* inputs, const T*, T* after,
                                   T* slope, index) {
        auto value = hn::Add(Load<partial>(d, inputs, count), hn::Load(d, sums));
        if constexpr (with_slopes) {
            auto derivative = value;
            value = Function<activation>::ValueAndSlope(d, value, derivative);
            hn::Store(derivative, d, slope);
        } else {
            value = Function<activation>::Value(d, value);
        }
        Store<partial>(d, value, after, count);
    }

    template <bool partial, class D, class T = hn::TFromD<D>>
    static HWY_INLINE void Deltas(D d, index count, index, const T* slope, index, T* y, T* deltas, T* inputs) {
        const auto delta = hn::Mul(hn::Load(d, slope), Load<partial>(d, y, count));
        Store<partial>(d, delta, deltas, count);
        Store<partial>(d, delta, inputs, count);
        Store<partial>(d, hn::Zero(d), y, count);
    }
};
template <>
struct Gates<DenseCellKind::elman_tanh> : ElmanGates<Activation::tanh> {};
template <>
struct Gates<DenseCellKind::elman_relu> : ElmanGates<Activation::relu> {};

template <>
struct Gates<DenseCellKind::gru> {
    static constexpr index gates = 3, parts = 1, slopes = 5;
    enum Slope { by_r, by_z, by_n, keep, by_input_n };  // of the new state by the three sums; z; by u_n

    template <bool partial, bool with_slopes, class D, class T = hn::TFromD<D>>
    static HWY_INLINE void Forward(D d, index count, index hidden, const T* sums, const T* inputs, const T* before,
                                   T* after, T* slope, index stride) {
        using V = hn::Vec<D>;
        constexpr index panel = panel_width<T>;
        const V h = Load<partial>(d, before, count), sum_n = hn::Load(d, sums + 2 * panel);
        V r = hn::Add(Load<partial>(d, inputs, count), hn::Load(d, sums));
        V z = hn::Add(Load<partial>(d, inputs + hidden, count), hn::Load(d, sums + panel));
        V slope_r = r, slope_z = z, slope_n = sum_n;
        r = Function<Activation::sigmoid>::ValueAndSlope(d, r, slope_r);
        z = Function<Activation::sigmoid>::ValueAndSlope(d, z, slope_z);
        const V candidate = hn::MulAdd(r, sum_n, Load<partial>(d, inputs + 2 * hidden, count));
        const V n = Function<Activation::tanh>::ValueAndSlope(d, candidate, slope_n);
        const V change = hn::Sub(h, n);
        if constexpr (with_slopes) {
            const V by_n_input = hn::Mul(hn::Sub(hn::Set(d, 1), z), slope_n);
            hn::Store(hn::Mul(hn::Mul(by_n_input, sum_n), slope_r), d, slope + by_r * stride);
            hn::Store(hn::Mul(change, slope_z), d, slope + by_z * stride);
            hn::Store(hn::Mul(by_n_input, r), d, slope + by_n * stride);
            hn::Store(z, d, slope + keep * stride);
            hn::Store(by_n_input, d, slope + by_input_n * stride);
        }
        Store<partial>(d, hn::MulAdd(z, change, n), after, count);
    }

    template <bool partial, class D, class T = hn::TFromD<D>>
    static HWY_INLINE void Deltas(D d, index count, index hidden, const T* slope, index stride, T* y, T* deltas,
                                  T* inputs) {
        const auto v = Load<partial>(d, y, count);
        const auto times = [&](Slope which) HWY_ATTR { return hn::Mul(hn::Load(d, slope + which * stride), v); };
        for (const Slope gate : {by_r, by_z}) {
            const auto delta = times(gate);
            Store<partial>(d, delta, deltas + gate * hidden, count);
            Store<partial>(d, delta, inputs + gate * hidden, count);
        }
        Store<partial>(d, times(by_n), deltas + 2 * hidden, count);
        Store<partial>(d, times(by_input_n), inputs + 2 * hidden, count);
        Store<partial>(d, times(keep), y, count);
    }
};

template <>
struct Gates<DenseCellKind::lstm> {
    static constexpr index gates = 4, parts = 2, slopes = 6;
    enum Slope { by_i, by_f, by_g, by_o, keep, through };  // of c by three sums; of h by the fourth; f; of h by c

    template <bool partial, bool with_slopes, class D, class T = hn::TFromD<D>>
    static HWY_INLINE void Forward(D d, index count, index hidden, const T* sums, const T* inputs, const T* before,
                                   T* after, T* slope, index stride) {
        using V = hn::Vec<D>;
        constexpr index panel = panel_width<T>;
        V gate[4], derivative[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const V z = hn::Add(Load<partial>(d, inputs + k * hidden, count), hn::Load(d, sums + k * panel));
            gate[k] = k == 2 ? Function<Activation::tanh>::ValueAndSlope(d, z, derivative[k])
                             : Function<Activation::sigmoid>::ValueAndSlope(d, z, derivative[k]);
        }
        const V old = Load<partial>(d, before + hidden, count);
        const V c = hn::MulAdd(gate[1], old, hn::Mul(gate[0], gate[2]));
        V slope_c;
        const V squashed = Function<Activation::tanh>::ValueAndSlope(d, c, slope_c);
        if constexpr (with_slopes) {
            hn::Store(hn::Mul(gate[2], derivative[0]), d, slope + by_i * stride);
            hn::Store(hn::Mul(old, derivative[1]), d, slope + by_f * stride);
            hn::Store(hn::Mul(gate[0], derivative[2]), d, slope + by_g * stride);
            hn::Store(hn::Mul(squashed, derivative[3]), d, slope + by_o * stride);
            hn::Store(gate[1], d, slope + keep * stride);
            hn::Store(hn::Mul(gate[3], slope_c), d, slope + through * stride);
        }
        Store<partial>(d, hn::Mul(gate[3], squashed), after, count);
        Store<partial>(d, c, after + hidden, count);
    }

    template <bool partial, class D, class T = hn::TFromD<D>>
    static HWY_INLINE void Deltas(D d, index count, index hidden, const T* slope, index stride, T* y, T* deltas,
                                  T* inputs) {
        const auto at = [&](Slope which) HWY_ATTR { return hn::Load(d, slope + which * stride); };
        const auto y_h = Load<partial>(d, y, count);
        const auto y_c = hn::MulAdd(at(through), y_h, Load<partial>(d, y + hidden, count));
        for (const Slope gate : {by_i, by_f, by_g, by_o}) {
            const auto delta = hn::Mul(at(gate), gate == by_o ? y_h : y_c);
            Store<partial>(d, delta, deltas + gate * hidden, count);
            Store<partial>(d, delta, inputs + gate * hidden, count);
        }
        Store<partial>(d, hn::Zero(d), y, count);
        Store<partial>(d, hn::Mul(at(keep), y_c), y + hidden, count);
    }
};

/// Hidden units rounded up to whole panels.
template <class T>
index Padded(const Cell<T>& cell) {
    return cell.panel_count() * panel_width<T>;
}

/// Calls body(partial, unit, count) for the vectors of units of some panels.
template <class T, class Body>
HWY_INLINE void ForUnits(const Cell<T>& cell, const Panels& panels, const Body& body) {
    const hn::ScalableTag<T> d;
    const index lanes = index(hn::Lanes(d)), last = std::min(cell.hidden(), panels.last * panel_width<T>);
    index unit = panels.first * panel_width<T>;
    for (; unit + lanes <= last; unit += lanes) body(std::false_type(), unit, lanes);
    if (unit < last) body(std::true_type(), unit, last - unit);
}

/// Panels of each gate that are multiplied before their sums are used.
template <class T>
index BlockPanels(index gates, index rows) {
    const index panel_bytes = panel_width<T> * index(sizeof(T));
    return std::clamp<index>(scratch_bytes / (rows * gates * panel_bytes), 2, 8 / gates * 2);
}

/// Elements of scratch for `Evaluate` of so many rows, or fewer.
template <class T>
index ScratchElements(index gates, index rows) {
    return std::max<index>(scratch_bytes / index(sizeof(T)), rows * 2 * gates * panel_width<T>);
}

/// after = f(before) of some hidden units, for `rows` states: inputs[row] points to the gates' inputs. slopes, where
/// wanted: [rows, Gates::slopes, Padded]. backwards: the last panels first.
template <DenseCellKind kind, bool with_slopes, class T>
void Evaluate(const Cell<T>& cell, index rows, const Panels& panels, bool backwards, const T* const* inputs,
              const T* before, T* after, T* slopes, T* sums) {
    using G = Gates<kind>;
    const hn::ScalableTag<T> d;
    const index hidden = cell.hidden(), width = G::parts * hidden, stride = Padded(cell);
    const index block = BlockPanels<T>(G::gates, rows), blocks = (panels.last - panels.first + block - 1) / block;
    for (index b = 0; b < blocks; ++b) {
        const index first = panels.first + (backwards ? blocks - 1 - b : b) * block;
        const Panels some{first, std::min(first + block, panels.last)};
        const index columns = (some.last - some.first) * G::gates * panel_width<T>;
        Multiply<T>({rows, 0, columns, hidden, before, width, 1,
                     Right<T>::Panels(cell.panels + some.first * G::gates * cell.panel_size(), columns, hidden),
                     nullptr, 0, sums, columns});
        for (index row = 0; row < rows; ++row)
            ForUnits(cell, some, [&](auto partial, index unit, index count) HWY_ATTR {
                const index panel = unit / panel_width<T> - some.first;
                const index at = row * columns + panel * G::gates * panel_width<T> + unit % panel_width<T>;
                G::template Forward<decltype(partial)::value, with_slopes>(
                    d, count, hidden, sums + at, inputs[row] + unit, before + row * width + unit,
                    after + row * width + unit, with_slopes ? slopes + row * G::slopes * stride + unit : nullptr,
                    stride);
            });
    }
}

/// Where the inputs of `rows` states lie, from number `at` of the extent on.
template <class T>
void FindInputs(const Cell<T>& cell, const Extent& extent, index at, index rows, const T** inputs) {
    index step = at / extent.batch(), j = at % extent.batch();
    for (index row = 0; row < rows; ++row) {
        inputs[row] = cell.inputs.at(extent.first + step, extent.sequences[std::size_t(j)]);
        if (++j == extent.batch()) ++step, j = 0;
    }
}

/// Threads that share `work` multiplications.
int ThreadsFor(const Extent& extent, index work) {
    return int(std::clamp<index>(work / work_per_thread, 1, extent.threads));
}

/// Threads that share the hidden units, with a barrier after each step; 1: better each its own sequences.
template <class T>
int ThreadsForUnits(const Cell<T>& cell, const Extent& extent, int threads) {
    const index weights = cell.gates() * cell.hidden() * cell.hidden(), batch = extent.batch();
    const index worth = std::min<index>({threads, batch * weights / work_per_barrier, cell.panel_count()});
    const index by_sequences = std::min<index>(threads, (batch + fewest_rows - 1) / fewest_rows);
    return weights * index(sizeof(T)) <= cache_bytes && by_sequences >= worth ? 1 : int(std::max<index>(1, worth));
}

Panels PanelsOf(index panels, int thread, int threads) {
    return {panels * thread / threads, panels * (thread + 1) / threads};
}

/// Some sequences, some hidden units, all steps; `wait` after each step. sums and inputs: scratch.
template <DenseCellKind kind, class T, class Wait>
void RunPart(const Cell<T>& cell, const Extent& extent, index first, index rows, const Panels& panels, const T* state,
             T* trajectory, T* sums, const T** inputs, const Wait& wait) {
    const index width = cell.width(), row = extent.batch() * width;
    const T* before = state + first * width;
    for (index i = 0; i < extent.steps; ++i) {
        T* const after = trajectory + i * row + first * width;
        FindInputs(cell, extent, i * extent.batch() + first, rows, inputs);
        Evaluate<kind, false, T>(cell, rows, panels, i % 2 != 0, inputs, before, after, nullptr, sums);
        before = after;
        wait();
    }
}

template <DenseCellKind kind, class T>
void RunKind(const Cell<T>& cell, const Extent& extent, const T* state, T* trajectory) {
    const index hidden = cell.hidden(), batch = extent.batch(), panels = cell.panel_count();
    const int threads = ThreadsFor(extent, extent.steps * batch * Gates<kind>::gates * hidden * (hidden + 16));
    const int sharing = ThreadsForUnits(cell, extent, threads);
    const index group = std::max<index>(32, scratch_bytes / (cell.width() * index(sizeof(T))));
    const index most = std::min(sharing > 1 ? batch : group, batch);
    // All before the threads begin: one that threw would leave the others at the barrier.
    const Buffer<T> sums = Buffer<T>::uninitialised({threads, 1, ScratchElements<T>(Gates<kind>::gates, most)});
    std::vector<const T*> inputs(static_cast<std::size_t>(threads * most));
    if (sharing > 1) {
        device::Barrier barrier(sharing);
        return device::run_together(sharing, [&](int thread) {
            RunPart<kind>(cell, extent, 0, batch, PanelsOf(panels, thread, sharing), state, trajectory,
                          sums.view().at(thread, 0), inputs.data() + thread * most, [&] { barrier.wait(); });
        });
    }
    const index grains = (batch + fewest_rows - 1) / fewest_rows;
    const int used = int(std::min<index>(threads, grains));
    device::run_together(used, [&](int thread) {
        const index last = std::min(batch, grains * (thread + 1) / used * fewest_rows);
        for (index j = grains * thread / used * fewest_rows; j < last; j += group)
            RunPart<kind>(cell, extent, j, std::min(group, last - j), {0, panels}, state, trajectory,
                          sums.view().at(thread, 0), inputs.data() + thread * most, [] {});
    });
}

/// The Jacobian of one state, and its diagonal, from the slopes.
template <DenseCellKind kind, class T>
class JacobianRows {
public:
    explicit JacobianRows(const Cell<T>& cell)
        : cell_(cell), stride_(Padded(cell)), diagonals_(Shape{1, G::gates, stride_}) {
        for (index gate = 0; gate < G::gates; ++gate)
            for (index unit = 0; unit < cell.hidden(); ++unit)
                diagonals_(0, gate, unit) = cell.weights(gate, unit, unit);
    }

    /// stream: past the caches, where the rows allow it.
    HWY_NOINLINE void operator()(const T* slopes, bool stream, T* out) const {
        const index width = cell_.width();
        if (stream && width % lanes == 0 && cell_.hidden() % lanes == 0 &&
            reinterpret_cast<std::uintptr_t>(out) % (lanes * sizeof(T)) == 0)
            All<true>(slopes, out);
        else
            All<false>(slopes, out);
    }

    HWY_NOINLINE void Diagonal(const T* slopes, T* out) const {
        const D d;
        ForUnits(cell_, {0, cell_.panel_count()}, [&](auto partial, index unit, index count) HWY_ATTR {
            constexpr bool p = decltype(partial)::value;
            const auto slope = [&](index which) HWY_ATTR { return hn::Load(d, slopes + which * stride_ + unit); };
            const auto weight = [&](index gate) HWY_ATTR { return hn::Load(d, diagonals_.view().at(0, gate) + unit); };
            const auto [first, second] = Entries(slope, weight);
            if constexpr (kind == DenseCellKind::gru) {
                Store<p>(d, hn::Add(first, slope(G::keep)), out + unit, count);
            } else {
                Store<p>(d, first, out + unit, count);
            }
            if constexpr (G::parts == 2) Store<p>(d, slope(G::keep), out + cell_.hidden() + unit, count);
            (void)second;
        });
    }

private:
    using G = Gates<kind>;
    using D = hn::ScalableTag<T>;
    using V = hn::Vec<D>;
    static constexpr index lanes = index(hn::MaxLanes(D()));

    struct Pair {
        V first, second;
    };

    /// What the gates contribute to the entries of a row of h, and of the row of c where there is one.
    template <class Slope, class Weight>
    static HWY_INLINE Pair Entries(const Slope& slope, const Weight& weight) {
        const D d;
        if constexpr (kind == DenseCellKind::lstm) {
            V c = hn::Mul(slope(G::by_i), weight(0));
            c = hn::MulAdd(slope(G::by_f), weight(1), c);
            c = hn::MulAdd(slope(G::by_g), weight(2), c);
            return {hn::MulAdd(slope(G::by_o), weight(3), hn::Mul(slope(G::through), c)), c};
        } else if constexpr (kind == DenseCellKind::gru) {
            V h = hn::Mul(slope(G::by_r), weight(0));
            h = hn::MulAdd(slope(G::by_z), weight(1), h);
            return {hn::MulAdd(slope(G::by_n), weight(2), h), hn::Zero(d)};
        } else {
            return {hn::Mul(slope(G::by_sum), weight(0)), hn::Zero(d)};
        }
    }

    template <bool stream, bool partial>
    static HWY_INLINE void Put(V v, T* to, index count) {
        const D d;
        if constexpr (stream)
            hn::Stream(v, d, to);
        else
            Store<partial>(d, v, to, count);
    }

    template <bool stream>
    HWY_INLINE void All(const T* slopes, T* out) const {
        const D d;
        const index hidden = cell_.hidden(), width = cell_.width();
        HWY_ALIGN T one[2 * lanes] = {};  // a window of it is a multiple of a row of the identity
        HWY_ALIGN T other[2 * lanes] = {};
        for (index unit = 0; unit < hidden; ++unit) {
            V slope[G::slopes];
            const T* weights[G::gates];
            for (index k = 0; k < G::slopes; ++k) slope[k] = hn::Set(d, slopes[k * stride_ + unit]);
            for (index gate = 0; gate < G::gates; ++gate) weights[gate] = cell_.weights.at(gate, unit);
            if constexpr (kind == DenseCellKind::gru) one[lanes] = slopes[G::keep * stride_ + unit];
            T* const row = out + unit * width;
            T* const row_c = row + hidden * width;
            const auto slope_of = [&](index which) HWY_ATTR { return slope[which]; };
            ForUnits(cell_, {0, cell_.panel_count()}, [&](auto part, index column, index count) HWY_ATTR {
                constexpr bool partial = decltype(part)::value;
                auto [first, second] = Entries(
                    slope_of, [&](index gate) HWY_ATTR { return Load<partial>(d, weights[gate] + column, count); });
                if (kind == DenseCellKind::gru && unit >= column && unit - column < lanes)
                    first = hn::Add(first, hn::LoadU(d, one + lanes - (unit - column)));
                Put<stream, partial>(first, row + column, count);
                if constexpr (G::parts == 2) Put<stream, partial>(second, row_c + column, count);
            });
            if constexpr (G::parts == 2) {
                other[lanes] = slopes[G::keep * stride_ + unit];
                one[lanes] = slopes[G::through * stride_ + unit] * other[lanes];
                ForUnits(cell_, {0, cell_.panel_count()}, [&](auto part, index column, index count) HWY_ATTR {
                    constexpr bool partial = decltype(part)::value;
                    const bool here = unit >= column && unit - column < lanes;
                    const index window = here ? lanes - (unit - column) : 0;
                    Put<stream, partial>(here ? hn::LoadU(d, one + window) : hn::Zero(d), row + hidden + column, count);
                    Put<stream, partial>(here ? hn::LoadU(d, other + window) : hn::Zero(d), row_c + hidden + column,
                                         count);
                });
            }
        }
    }

    const Cell<T>& cell_;
    index stride_;
    Buffer<T> diagonals_;  // of the gates' weights, [gates, Padded]
};

template <DenseCellKind kind, class T>
void LineariseKind(const Cell<T>& cell, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    using G = Gates<kind>;
    const index hidden = cell.hidden(), width = cell.width(), stride = Padded(cell),
                states = extent.steps * extent.batch();
    const bool wanted = jacobian != nullptr || diagonal != nullptr;
    const JacobianRows<kind, T> rows_of(cell);
    const bool stream = jacobian != nullptr && states * width * width * index(sizeof(T)) > stream_bytes;
    const index grain = std::max<index>(1, work_per_thread / (G::gates * hidden * (hidden + 16)));
    device::parallel_ranges(extent.threads, states, grain, [&](index first, index last) {
        const index most = std::min(group_rows, last - first);
        const Buffer<T> sums = Buffer<T>::uninitialised({1, 1, ScratchElements<T>(G::gates, most)});
        const Buffer<T> slopes = Buffer<T>::uninitialised({wanted ? most : 0, G::slopes, stride});
        const T* inputs[group_rows];
        for (index at = first; at < last; at += group_rows) {
            const index rows = std::min(group_rows, last - at);
            FindInputs(cell, extent, at, rows, inputs);
            if (!wanted) {
                Evaluate<kind, false, T>(cell, rows, {0, cell.panel_count()}, false, inputs, before + at * width,
                                         after + at * width, nullptr, sums.data());
                continue;
            }
            Evaluate<kind, true, T>(cell, rows, {0, cell.panel_count()}, false, inputs, before + at * width,
                                    after + at * width, slopes.data(), sums.data());
            for (index row = 0; row < rows; ++row) {
                if (jacobian != nullptr)
                    rows_of(slopes.view().at(row, 0), stream, jacobian + (at + row) * width * width);
                if (diagonal != nullptr) rows_of.Diagonal(slopes.view().at(row, 0), diagonal + (at + row) * width);
            }
        }
        if (stream) hwy::FlushStream();
    });
}

/// The backward passes: a few steps at a time, whose slopes are computed first, for all states at once. From them and
/// the adjoint states follow the deltas, gradients of the gates' sums; from these the gradients of the weights, again
/// for all states at once.
template <DenseCellKind kind, class T>
class Backward {
public:
    Backward(const Cell<T>& cell, const Extent& extent, bool serial)
        : cell_(cell),
          extent_(extent),
          hidden_(cell.hidden()),
          width_(cell.width()),
          gates_(G::gates * cell.hidden()),
          stride_(Padded(cell)),
          batch_(extent.batch()),
          threads_(Threads(cell, extent)),
          share_(ThreadsForUnits(cell, extent, threads_) > 1),
          barrier_(threads_) {
        const index state_bytes = (G::slopes * stride_ + gates_) * index(sizeof(T));
        const index states = std::max(tape_rows, tape_bytes / state_bytes);
        chunk_ = std::clamp<index>((states + batch_ - 1) / batch_, 1, extent.steps);
        slopes_ = Buffer<T>::uninitialised({chunk_ * batch_, G::slopes, stride_});
        deltas_ = Buffer<T>::uninitialised({chunk_, batch_, gates_});
        after_ = Buffer<T>::uninitialised({chunk_, batch_, width_});
        sums_ = Buffer<T>::uninitialised(
            {threads_, 1, ScratchElements<T>(G::gates, std::min(group_rows, chunk_ * batch_))});
        if (serial) PackTransposed();
    }

    void Run(const T* before, const T* gradient, T* inputs, T* weights, T* biases, T* state) {
        device::run_together(threads_, [&](int thread) {
            for (index end = extent_.steps; end > 0; end -= chunk_) {
                const index begin = std::max<index>(0, end - chunk_), at = begin * batch_;
                Slopes(begin, end, thread, before + at * width_);
                barrier_.wait();
                if (state != nullptr)
                    Back(end - begin, thread, gradient + at * width_, inputs + at * gates_, state);
                else
                    DeltasOf((end - begin) * batch_, thread, gradient + at * width_, inputs + at * gates_);
                barrier_.wait();
                ParameterGradients((end - begin) * batch_, thread, before + at * width_, weights, biases);
                barrier_.wait();
            }
        });
    }

private:
    using G = Gates<kind>;

    static int Threads(const Cell<T>& cell, const Extent& extent) {
        const int threads =
            ThreadsFor(extent, 2 * extent.steps * extent.batch() * G::gates * cell.hidden() * cell.hidden());
        const int sharing = ThreadsForUnits(cell, extent, threads);
        return sharing > 1 ? sharing : threads;
    }

    void PackTransposed() {
        transposed_ = Buffer<T>(Shape{1, 1, chain::panel_elements<T>(hidden_, gates_)});
        const index panel = panel_width<T>, size = panel * (gates_ + 1);
        device::parallel_ranges(threads_, cell_.panel_count(), 1, [&](index first, index last) {
            for (index p = first; p < last; ++p) {
                const index count = std::min(panel, hidden_ - p * panel);
                chain::pack_panel(
                    p * panel, count, count == panel ? panel : chain::narrow_width<T>(hidden_), gates_,
                    [](index) { return T(0); },
                    [&](index out, index in) { return cell_.weights(in / hidden_, in % hidden_, out); },
                    transposed_.data() + p * size);
            }
        });
    }

    void Slopes(index begin, index end, int thread, const T* before) {
        const T* inputs[group_rows];
        const index states = (end - begin) * batch_;
        const index first = states * thread / threads_, last = states * (thread + 1) / threads_;
        for (index at = first; at < last; at += group_rows) {
            const index rows = std::min(group_rows, last - at);
            FindInputs(cell_, extent_, begin * batch_ + at, rows, inputs);
            Evaluate<kind, true, T>(cell_, rows, {0, cell_.panel_count()}, false, inputs, before + at * width_,
                                    after_.data() + at * width_, slopes_.view().at(at, 0), sums_.view().at(thread, 0));
        }
    }

    /// Deltas of state `at` of the chunk; y: see Gates.
    HWY_INLINE void DeltasOfUnits(index at, const Panels& panels, T* y, T* inputs) {
        const hn::ScalableTag<T> d;
        ForUnits(cell_, panels, [&](auto partial, index unit, index count) HWY_ATTR {
            G::template Deltas<decltype(partial)::value>(d, count, hidden_, slopes_.view().at(at, 0) + unit, stride_,
                                                         y + unit, deltas_.data() + at * gates_ + unit,
                                                         inputs + at * gates_ + unit);
        });
    }

    void DeltasOf(index states, int thread, const T* adjoint, T* inputs) {
        for (index at = states * thread / threads_; at < states * (thread + 1) / threads_; ++at) {
            T* const y = after_.data() + at * width_;  // free by now
            std::copy_n(adjoint + at * width_, width_, y);
            DeltasOfUnits(at, {0, cell_.panel_count()}, y, inputs);
        }
    }

    void Back(index steps, int thread, const T* gradient, T* inputs, T* state) {
        const index first = share_ ? 0 : batch_ * thread / threads_;
        const index last = share_ ? batch_ : batch_ * (thread + 1) / threads_;
        const Panels panels = share_ ? PanelsOf(cell_.panel_count(), thread, threads_) : Panels{0, cell_.panel_count()};
        const index begin = panels.first * panel_width<T>, end = std::min(hidden_, panels.last * panel_width<T>);
        const hn::ScalableTag<T> d;
        for (index i = steps - 1; i >= 0; --i) {
            for (index j = first; j < last; ++j) {
                T* const y = state + j * width_;
                const T* const own = gradient + (i * batch_ + j) * width_;
                for (index part = 0; part < G::parts; ++part)
                    ForUnits(cell_, panels, [&](auto partial, index unit, index count) HWY_ATTR {
                        constexpr bool p = decltype(partial)::value;
                        const index at = part * hidden_ + unit;
                        Store<p>(d, hn::Add(Load<p>(d, y + at, count), Load<p>(d, own + at, count)), y + at, count);
                    });
                DeltasOfUnits(i * batch_ + j, panels, y, inputs);
            }
            if (share_) barrier_.wait();
            if (first < last)
                Multiply<T>({last - first, begin, end, gates_, deltas_.data() + (i * batch_ + first) * gates_, gates_,
                             1, Right<T>::Panels(transposed_.data(), hidden_, gates_), state + first * width_, width_,
                             state + first * width_, width_});
        }
    }

    void ParameterGradients(index states, int thread, const T* before, T* weights, T* biases) {
        const Panels panels = PanelsOf((gates_ + panel_width<T> - 1) / panel_width<T>, thread, threads_);
        const index first = panels.first * panel_width<T>, last = std::min(gates_, panels.last * panel_width<T>);
        if (first >= last) return;
        Multiply<T>({last - first, 0, hidden_, states, deltas_.data() + first, 1, gates_,
                     Right<T>::Rows(before, width_), weights + first * hidden_, hidden_, weights + first * hidden_,
                     hidden_});
        const T one = 1;
        Multiply<T>(
            {1, first, last, states, &one, 0, 0, Right<T>::Rows(deltas_.data(), gates_), biases, 0, biases, gates_});
    }

    const Cell<T>& cell_;
    const Extent& extent_;
    index hidden_, width_, gates_, stride_, batch_;
    int threads_;
    bool share_;  // the hidden units, not the sequences
    device::Barrier barrier_;
    index chunk_ = 1;
    Buffer<T> slopes_, deltas_, after_;  // [chunk * batch, slopes, Padded], [chunk, batch, gates * hidden], states
    Buffer<T> sums_;                     // scratch of each thread
    Buffer<T> transposed_;               // panels of the transposed weights, [hidden, gates * hidden]
};

/// Calls body<kind>().
template <class Body>
void OnKind(DenseCellKind kind, const Body& body) {
    switch (kind) {
        case DenseCellKind::elman_tanh:
            return body.template operator()<DenseCellKind::elman_tanh>();
        case DenseCellKind::elman_relu:
            return body.template operator()<DenseCellKind::elman_relu>();
        case DenseCellKind::gru:
            return body.template operator()<DenseCellKind::gru>();
        case DenseCellKind::lstm:
            return body.template operator()<DenseCellKind::lstm>();
    }
}

template <class T>
void Run(const Cell<T>& cell, const Extent& extent, const T* state, T* trajectory) {
    OnKind(cell.kind, [&]<DenseCellKind kind> { RunKind<kind>(cell, extent, state, trajectory); });
}

template <class T>
void Linearise(const Cell<T>& cell, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    OnKind(cell.kind,
           [&]<DenseCellKind kind> { LineariseKind<kind>(cell, extent, before, after, jacobian, diagonal); });
}

template <class T>
void BackwardAll(const Cell<T>& cell, const Extent& extent, const T* before, const T* gradient, T* inputs, T* weights,
                 T* biases, T* state) {
    OnKind(cell.kind, [&]<DenseCellKind kind> {
        Backward<kind, T>(cell, extent, state != nullptr).Run(before, gradient, inputs, weights, biases, state);
    });
}

const Kernels<float>& FloatKernels() {
    static constexpr Kernels<float> kernels{Run<float>, Linearise<float>, BackwardAll<float>};
    return kernels;
}
const Kernels<double>& DoubleKernels() {
    static constexpr Kernels<double> kernels{Run<double>, Linearise<double>, BackwardAll<double>};
    return kernels;
}

}  // namespace deeppcr::dense_cell::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deeppcr::dense_cell {
namespace {

HWY_EXPORT(FloatKernels);
HWY_EXPORT(DoubleKernels);

template <class T>
const Kernels<T>& kernels() {
    device::choose_simd_target();
    if constexpr (sizeof(T) == sizeof(float))
        return HWY_DYNAMIC_DISPATCH(FloatKernels)();
    else
        return HWY_DYNAMIC_DISPATCH(DoubleKernels)();
}

}  // namespace

template <Backend B, class T>
void run(const Cell<T>& cell, const Extent& extent, const T* state, T* trajectory) {
    if (extent.steps > 0 && extent.batch() > 0) kernels<T>().run(cell, extent, state, trajectory);
}

template <Backend B, class T>
void linearise(const Cell<T>& cell, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    if (extent.steps > 0 && extent.batch() > 0) kernels<T>().linearise(cell, extent, before, after, jacobian, diagonal);
}

template <Backend B, class T>
void backward(const Cell<T>& cell, const Extent& extent, const T* before, const T* gradient, T* inputs, T* weights,
              T* biases, T* state) {
    if (extent.steps > 0 && extent.batch() > 0)
        kernels<T>().backward(cell, extent, before, gradient, inputs, weights, biases, state);
}

#define DEEPPCR_INSTANTIATE(T)                                                                     \
    template void run<Backend::cpu, T>(const Cell<T>&, const Extent&, const T*, T*);               \
    template void linearise<Backend::cpu, T>(const Cell<T>&, const Extent&, const T*, T*, T*, T*); \
    template void backward<Backend::cpu, T>(const Cell<T>&, const Extent&, const T*, const T*, T*, T*, T*, T*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::dense_cell
#endif
