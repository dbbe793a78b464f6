// SIMD kernels of the bidiagonal solvers, compiled once for each instruction set.
//
//   rows       diagonal, many channels: lanes are channels; the state of a tile of channels stays in the L2 cache.
//              Reads A and b, writes x, past the caches where x is large: 3 elements moved per element.
//   series     diagonal, fewer channels than lanes, contiguous in time: lanes are neighbouring elements, and each
//              vector is scanned by doubling (Kogge-Stone) on pairs (a, b), x = a x_before + b:
//
//                  lane        0    1    2    3    4 ...          one channel; with c channels all distances are
//                  distance 1       0-1  1-2  2-3  3-4            multiplied by c
//                  distance 2            0-2  0-3  1-4
//                  distance 4                      0-4            then x = a x_before + b in every lane
//
//   blocks     dense blocks: y = A x + b by rows (sums across lanes as a tree over as many rows as there are lanes), or
//              by columns where transposed (no sums across lanes). Bound by reading A.
//   products   of blocks: a register tile of rows x vectors, over the inner dimension.
#include "reduce/kernels_cpu.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "reduce/kernels_cpu.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "device/simd.hpp"

HWY_BEFORE_NAMESPACE();
namespace deeppcr::reduce {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using Lanes = hn::ScalableTag<T>;
template <class T>
constexpr index lanes = index(HWY_LANES(T));

/// body(std::integral_constant<index, 0>()), ... up to count - 1, unrolled.
template <class Body, index... i>
HWY_INLINE void unroll(const Body& body, std::integer_sequence<index, i...>) {
    (body(std::integral_constant<index, i>()), ...);
}
template <index count, class Body>
HWY_INLINE void unroll(const Body& body) {
    unroll(body, std::make_integer_sequence<index, count>());
}

/// The first `count` lanes from memory, zeros in the others; nothing beyond them is touched.
template <class D, class T = hn::TFromD<D>>
HWY_INLINE hn::Vec<D> load_first(D d, const T* from, index count) {
    if constexpr (HWY_TARGET <= HWY_AVX2) return hn::MaskedLoad(hn::FirstN(d, std::size_t(count)), d, from);
    HWY_ALIGN T lane[hn::MaxLanes(d)] = {};
    std::copy_n(from, count, lane);
    return hn::Load(d, lane);
}
template <class D, class T = hn::TFromD<D>>
HWY_INLINE void store_first(hn::Vec<D> vector, D d, T* to, index count) {
    hn::BlendedStore(vector, hn::FirstN(d, std::size_t(count)), d, to);
}

// ------------------------------------------------------------------------------------------------------------- rows

/// Into the second-level cache; `ahead` 0 fetches what is being read anyway.
template <class T>
HWY_INLINE void fetch(const T* from, index ahead) {
    __builtin_prefetch(from + ahead, 0, 2);
}

/// Copies past the caches; the ends that do not fill an aligned vector go the ordinary way.
template <class T>
HWY_INLINE void copy_past_caches(const T* from, index count, T* to) {
    const Lanes<T> d;
    const index misaligned = index(reinterpret_cast<std::uintptr_t>(to) / sizeof(T)) % lanes<T>;
    index i = std::min(count, misaligned == 0 ? 0 : lanes<T> - misaligned);
    if (i > 0) std::copy_n(from, i, to);
    for (; i + lanes<T> <= count; i += lanes<T>) hn::Stream(hn::LoadU(d, from + i), d, to + i);
    if (i < count) std::copy_n(from + i, count - i, to + i);
}

/// The states of neighbouring channels between two rows: in registers where they are few, else in memory.
template <class T, index vectors>
struct CarriedStates {
    static constexpr index largest_width = vectors * lanes<T>;
    hn::Vec<Lanes<T>> state[vectors];
    HWY_INLINE auto load(index i) const { return state[i / lanes<T>]; }
    HWY_INLINE void store(hn::Vec<Lanes<T>> value, index i) { state[i / lanes<T>] = value; }
    /// body(i, lanes in use) for the first channel i of each vector.
    template <class Body>
    HWY_INLINE void for_each(index width, const Body& body) {
        unroll<vectors>([&](auto v) HWY_ATTR { body(v * lanes<T>, std::min(width - v * lanes<T>, lanes<T>)); });
    }
};
template <class T>
struct CarriedStates<T, 0> {
    static constexpr index largest_width = 131072 / sizeof(T);
    HWY_ALIGN T state[largest_width];
    HWY_INLINE auto load(index i) const { return hn::Load(Lanes<T>(), state + i); }
    HWY_INLINE void store(hn::Vec<Lanes<T>> value, index i) { hn::Store(value, Lanes<T>(), state + i); }
    template <class Body>
    HWY_INLINE void for_each(index width, const Body& body) {
        index i = 0;
        for (; i + lanes<T> <= width; i += lanes<T>) body(i, lanes<T>);
        if (i < width) body(i, width - i);
    }
};

template <class T>
HWY_INLINE auto load_up_to(const T* from, index count) {
    return count == lanes<T> ? hn::LoadU(Lanes<T>(), from) : load_first(Lanes<T>(), from, count);
}

template <class T>
HWY_INLINE void store_up_to(hn::Vec<Lanes<T>> vector, T* to, index count) {
    if (count == lanes<T>)
        hn::StoreU(vector, Lanes<T>(), to);
    else
        store_first(vector, Lanes<T>(), to, count);
}

/// All steps of neighbouring channels of one sequence. Past the caches, a wide row goes straight to memory if it is
/// aligned; others are staged, some rows at a time, so that they fill whole cache lines.
template <class T, index vectors>
void substitute_channels(const Strip<T>& s, const T* a, const T* b, const T* before, T* x, index width) {
    const Lanes<T> d;
    constexpr index most_staged = 8192 / sizeof(T);
    using States = CarriedStates<T, vectors>;
    HWY_ALIGN T staged[vectors > 0 ? most_staged + States::largest_width : States::largest_width];
    States states;
    const auto aligned = [&](index elements) { return elements % lanes<T> == 0; };
    const bool straight = s.bypass_caches && vectors == 0 && aligned(s.solution_step) && aligned(width) &&
                          aligned(index(reinterpret_cast<std::uintptr_t>(x) / sizeof(T)));
    const bool stage = s.bypass_caches && !straight;
    const index together = stage ? std::max<index>(1, most_staged / width) : 1;

    states.for_each(width, [&](index i, index count) HWY_ATTR {
        auto state = load_up_to(b + i, count);
        if (before != nullptr) state = hn::MulAdd(load_up_to(a + i, count), load_up_to(before + i, count), state);
        states.store(state, i);
        store_up_to(state, x + i, count);
    });
    for (index first = 1; first < s.steps; first += together) {
        const index last = std::min(first + together, s.steps);
        x += s.solution_step;
        T* row = stage ? staged : x;
        for (index step = first; step < last; ++step) {
            a += s.factor_step;
            b += s.right_side_step;
            states.for_each(width, [&](index i, index count) HWY_ATTR {
                fetch(a + i, s.factor_ahead);
                fetch(b + i, s.right_side_ahead);
                const auto state = hn::MulAdd(load_up_to(a + i, count), states.load(i), load_up_to(b + i, count));
                states.store(state, i);
                if (straight)
                    hn::Stream(state, d, row + i);
                else if (stage)
                    hn::StoreU(state, d, row + i);  // may run into the next row, which comes later
                else
                    store_up_to(state, row + i, count);
            });
            row += width;
        }
        if (!stage) continue;
        const index rows = last - first;
        if (s.solution_step == width)
            copy_past_caches(staged, rows * width, x);
        else
            for (index i = 0; i < rows; ++i) copy_past_caches(staged + i * width, width, x + i * s.solution_step);
        x += (rows - 1) * s.solution_step;
    }
}

template <class T, index vectors>
void summarise_channels(const Strip<T>& s, const T* a, const T* b, T* product, T* end, index width) {
    CarriedStates<T, vectors> products, states;
    states.for_each(width, [&](index i, index count) HWY_ATTR {
        products.store(load_up_to(a + i, count), i);
        states.store(load_up_to(b + i, count), i);
    });
    for (index step = 1; step < s.steps; ++step) {
        a += s.factor_step;
        b += s.right_side_step;
        states.for_each(width, [&](index i, index count) HWY_ATTR {
            fetch(a + i, s.factor_ahead);
            fetch(b + i, s.right_side_ahead);
            const auto factor = load_up_to(a + i, count);
            products.store(hn::Mul(factor, products.load(i)), i);
            states.store(hn::MulAdd(factor, states.load(i), load_up_to(b + i, count)), i);
        });
    }
    states.for_each(width, [&](index i, index count) HWY_ATTR {
        store_up_to(products.load(i), product + i, count);
        store_up_to(states.load(i), end + i, count);
    });
}

/// Calls body(first, width, vectors) for tiles of neighbouring channels; vectors: how many hold a tile, 0: many.
template <class T, class Body>
void for_each_tile(index width, const Body& body) {
    constexpr index tile = CarriedStates<T, 0>::largest_width;
    for (index first = 0; first < width; first += tile) {
        const index size = std::min(tile, width - first);
        switch ((size + lanes<T> - 1) / lanes<T>) {
            case 1:
                body(first, size, std::integral_constant<index, 1>());
                break;
            case 2:
                body(first, size, std::integral_constant<index, 2>());
                break;
            case 3:
                body(first, size, std::integral_constant<index, 3>());
                break;
            case 4:
                body(first, size, std::integral_constant<index, 4>());
                break;
            default:
                body(first, size, std::integral_constant<index, 0>());
        }
    }
}

/// A few channels in each of several sequences: side by side, so that they do not wait for each other.
template <class T>
void substitute_side_by_side(const Strip<T>& s) {
    const Lanes<T> d;
    for (index step = 0; step < s.steps; ++step) {
        for (index sequence = 0; sequence < s.batch; ++sequence) {
            const T* b = s.right_side + step * s.right_side_step + sequence * s.right_side_batch;
            T* x = s.solution + step * s.solution_step + sequence * s.solution_batch;
            const T* before = step > 0   ? x - s.solution_step
                              : s.before ? s.before + sequence * s.before_batch
                                         : nullptr;
            auto state = load_first(d, b, s.width);
            if (before != nullptr)
                state = hn::MulAdd(load_first(d, s.factor + step * s.factor_step + sequence * s.factor_batch, s.width),
                                   load_first(d, before, s.width), state);
            store_first(state, d, x, s.width);
        }
    }
}

template <class T>
void substitute_diagonal(const Strip<T>& s) {
    if (s.width < lanes<T> && s.batch > 1) return substitute_side_by_side(s);
    for (index sequence = 0; sequence < s.batch; ++sequence)
        for_each_tile<T>(s.width, [&](index first, index width, auto vectors) HWY_ATTR {
            substitute_channels<T, vectors>(s, s.factor + sequence * s.factor_batch + first,
                                            s.right_side + sequence * s.right_side_batch + first,
                                            s.before ? s.before + sequence * s.before_batch + first : nullptr,
                                            s.solution + sequence * s.solution_batch + first, width);
        });
    if (s.bypass_caches) hwy::FlushStream();
}

template <class T>
void summarise_rows(const Strip<T>& s, T* product, T* end) {
    for_each_tile<T>(s.width, [&](index first, index width, auto vectors) HWY_ATTR {
        summarise_channels<T, vectors>(s, s.factor + first, s.right_side + first, product + first, end + first, width);
    });
}

// ----------------------------------------------------------------------------------------------------------- series

/// Whether the strip is one contiguous series of fewer channels than lanes, forwards or backwards in memory.
template <class T>
bool is_series(const Strip<T>& s) {
    const auto follows = [&](index stride) { return stride == s.width || stride == -s.width; };
    return s.block == 1 && s.width < lanes<T> && s.steps * s.width >= 4 * lanes<T> && follows(s.factor_step) &&
           s.factor_step == s.right_side_step && s.factor_step == s.solution_step;
}

/// What a vector of a series needs to know of its neighbours. Position p counts elements in the order of solving,
/// x(p) = a(p) x(p - channels) + b(p); in memory it lies at origin[sign * p].
template <class T, int rounds>
struct SeriesScan {
    using D = Lanes<T>;
    using V = hn::Vec<D>;
    using Indices = decltype(hn::SetTableIndices(D(), static_cast<const hwy::MakeSigned<T>*>(nullptr)));

    Indices earlier[rounds], carried;
    hn::Mask<D> has_earlier[rounds];

    SeriesScan(index channels, bool backwards) {
        const D d;
        HWY_ALIGN hwy::MakeSigned<T> from[hn::MaxLanes(d)];
        HWY_ALIGN T inside[hn::MaxLanes(d)];
        const auto lane = [&](index position) { return backwards ? lanes<T> - 1 - position : position; };
        for (int round = 0; round < rounds; ++round) {
            const index distance = channels << round;
            for (index i = 0; i < lanes<T>; ++i) {
                from[lane(i)] = hwy::MakeSigned<T>(lane(std::max<index>(i - distance, 0)));
                inside[lane(i)] = T(i >= distance);
            }
            earlier[round] = hn::SetTableIndices(d, from);
            has_earlier[round] = hn::Ne(hn::Load(d, inside), hn::Zero(d));
        }
        for (index i = 0; i < lanes<T>; ++i)
            from[lane(i)] = hwy::MakeSigned<T>(lane(lanes<T> - channels + i % channels));
        carried = hn::SetTableIndices(d, from);
    }

    /// Composes every lane with all earlier lanes of its channel.
    HWY_INLINE void scan(V& a, V& b) const {
        unroll<rounds>([&](auto round) HWY_ATTR {
            const V earlier_a = hn::TableLookupLanes(a, earlier[round]);
            const V earlier_b = hn::TableLookupLanes(b, earlier[round]);
            b = hn::IfThenElse(has_earlier[round], hn::MulAdd(a, earlier_b, b), b);
            a = hn::IfThenElse(has_earlier[round], hn::Mul(a, earlier_a), a);
        });
    }
    /// The last state of each lane's channel in the vector before.
    HWY_INLINE V carry(V before) const { return hn::TableLookupLanes(before, carried); }
};

template <class T, int rounds>
void replay_series(const Strip<T>& s) {
    const Lanes<T> d;
    const index channels = s.width, count = s.steps * channels;
    const bool backwards = s.factor_step < 0;
    const index sign = backwards ? -1 : 1, first_channel = backwards ? channels - 1 : 0;
    const T* a = s.factor + first_channel;
    const T* b = s.right_side + first_channel;
    T* x = s.solution + first_channel;
    const SeriesScan<T, rounds> series(channels, backwards);

    for (index channel = 0; channel < channels; ++channel) {
        const index at = sign * channel;
        x[at] = s.before ? a[at] * s.before[first_channel + at] + b[at] : b[at];
    }
    const auto one_by_one = [&](index position) {
        const index at = sign * position;
        x[at] = a[at] * x[at - sign * channels] + b[at];
    };
    // Where vectors begin depends on the sizes alone, not on addresses: so do the bits. To bypass the caches, which
    // takes aligned vectors, some vectors at a time are staged.
    constexpr index together = 8192 / sizeof(T);
    HWY_ALIGN T staged[together];
    const index lowest = backwards ? lanes<T> - 1 : 0;  // of a vector's positions in memory
    index position = channels;
    for (; position < std::min(lanes<T>, count); ++position) one_by_one(position);
    auto state = hn::LoadU(d, x + sign * (position - lanes<T>)-lowest);
    while (position + lanes<T> <= count) {
        const index length = std::min(together, (count - position) / lanes<T> * lanes<T>);
        T* const run = x + sign * position - (backwards ? length - 1 : 0);
        const bool aligned = reinterpret_cast<std::uintptr_t>(run) % (lanes<T> * sizeof(T)) == 0;
        const bool straight = s.bypass_caches && aligned, stage = s.bypass_caches && !aligned;
        T* const target = stage ? staged : run;
        for (index i = 0; i < length; i += lanes<T>) {
            const index at = sign * (position + i) - lowest;
            fetch(a + at, s.factor_ahead);
            fetch(b + at, s.right_side_ahead);
            auto factor = hn::LoadU(d, a + at), sum = hn::LoadU(d, b + at);
            series.scan(factor, sum);
            state = hn::MulAdd(factor, series.carry(state), sum);
            T* const to = target + (backwards ? length - lanes<T> - i : i);
            if (straight)
                hn::Stream(state, d, to);
            else
                hn::StoreU(state, d, to);
        }
        if (stage) copy_past_caches(staged, length, run);
        position += length;
    }
    for (; position < count; ++position) one_by_one(position);
    if (s.bypass_caches) hwy::FlushStream();
}

/// A single channel, 2^levels vectors at once: lane i of the result is the composition of 2^levels neighbouring
/// elements, the i-th such group in memory. Neighbours are joined pair by pair, which takes half the shuffles of a
/// scan.
template <class T, int levels>
HWY_INLINE void compose_neighbours(const T* a, const T* b, bool backwards, hn::Vec<Lanes<T>>& factor,
                                   hn::Vec<Lanes<T>>& sum) {
    const Lanes<T> d;
    if constexpr (levels == 0) {
        factor = hn::LoadU(d, a);
        sum = hn::LoadU(d, b);
    } else {
        constexpr index half = lanes<T> << (levels - 1);
        hn::Vec<Lanes<T>> low_factor, low_sum, high_factor, high_sum;
        compose_neighbours<T, levels - 1>(a, b, backwards, low_factor, low_sum);
        compose_neighbours<T, levels - 1>(a + half, b + half, backwards, high_factor, high_sum);
        const auto even_factor = ConcatEven(d, high_factor, low_factor), even_sum = ConcatEven(d, high_sum, low_sum);
        const auto odd_factor = ConcatOdd(d, high_factor, low_factor), odd_sum = ConcatOdd(d, high_sum, low_sum);
        factor = hn::Mul(even_factor, odd_factor);
        sum = backwards ? hn::MulAdd(even_factor, odd_sum, even_sum) : hn::MulAdd(odd_factor, even_sum, odd_sum);
    }
}

template <class T, int rounds>
void summarise_series(const Strip<T>& s, T* product, T* end) {
    const Lanes<T> d;
    const index channels = s.width, count = s.steps * channels;
    const bool backwards = s.factor_step < 0;
    const index sign = backwards ? -1 : 1, first_channel = backwards ? channels - 1 : 0;
    const T* a = s.factor + first_channel;
    const T* b = s.right_side + first_channel;
    const SeriesScan<T, rounds> series(channels, backwards);
    const index lowest = backwards ? lanes<T> - 1 : 0;
    const auto lane = [&](index position) { return backwards ? lanes<T> - 1 - position : position; };

    // The vector that ends with the first row.
    HWY_ALIGN T factors[hn::MaxLanes(d)] = {}, sums[hn::MaxLanes(d)] = {};
    for (index channel = 0; channel < channels; ++channel) {
        factors[lane(lanes<T> - channels + channel)] = a[sign * channel];
        sums[lane(lanes<T> - channels + channel)] = b[sign * channel];
    }
    auto total = hn::Load(d, factors), state = hn::Load(d, sums);
    index position = channels;
    if constexpr (lanes < T >> 1) {
        constexpr int levels = 4;
        constexpr index length = lanes<T> << levels;
        for (; channels == 1 && position + length <= count; position += length) {
            const index at = sign * position - (backwards ? length - 1 : 0);
            for (index i = 0; i < length; i += 64 / index(sizeof(T))) {
                fetch(a + at + i, s.factor_ahead);
                fetch(b + at + i, s.right_side_ahead);
            }
            hn::Vec<Lanes<T>> factor, sum;
            compose_neighbours<T, levels>(a + at, b + at, backwards, factor, sum);
            series.scan(factor, sum);
            total = hn::Mul(factor, series.carry(total));
            state = hn::MulAdd(factor, series.carry(state), sum);
        }
    }
    for (; position + lanes<T> <= count; position += lanes<T>) {
        const index at = sign * position - lowest;
        fetch(a + at, s.factor_ahead);
        fetch(b + at, s.right_side_ahead);
        auto factor = hn::LoadU(d, a + at), sum = hn::LoadU(d, b + at);
        series.scan(factor, sum);
        total = hn::Mul(factor, series.carry(total));
        state = hn::MulAdd(factor, series.carry(state), sum);
    }
    hn::Store(total, d, factors);
    hn::Store(state, d, sums);
    for (index channel = 0; channel < channels; ++channel) {
        // Positions modulo channels are channels, from `first_channel` on in the direction of `sign`.
        const index behind = (position - channels + channel) % channels;
        product[first_channel + sign * behind] = factors[lane(lanes<T> - channels + channel)];
        end[first_channel + sign * behind] = sums[lane(lanes<T> - channels + channel)];
    }
    for (; position < count; ++position) {
        const index at = sign * position, channel = first_channel + sign * (position % channels);
        end[channel] = a[at] * end[channel] + b[at];
        product[channel] = a[at] * product[channel];
    }
}

/// Calls body(std::integral_constant<int, rounds>()) with the rounds of doubling that join all lanes of a channel.
template <class T, class Body>
void with_rounds(index channels, const Body& body) {
    if (channels * 8 < lanes<T>)
        body(std::integral_constant<int, 4>());
    else if (channels * 4 < lanes<T>)
        body(std::integral_constant<int, 3>());
    else if (channels * 2 < lanes<T>)
        body(std::integral_constant<int, 2>());
    else
        body(std::integral_constant<int, 1>());
}

// ----------------------------------------------------------------------------------------------------------- blocks

/// The elements of `count` vectors, one after the other, in groups of `count` neighbours: their sums, in order.
/// (ConcatEven and ConcatOdd are found by their arguments: the scalar target, whose vectors have one lane, has none.)
template <index count, class D, class V>
HWY_INLINE V sum_each(D d, V* sums) {
    if constexpr (count == 1)
        return sums[0];
    else {
        unroll<count / 2>([&](auto i) HWY_ATTR {
            sums[i] = hn::Add(ConcatEven(d, sums[2 * i + 1], sums[2 * i]), ConcatOdd(d, sums[2 * i + 1], sums[2 * i]));
        });
        return sum_each<count / 2>(d, sums);
    }
}

/// Operations on one block; `fixed` is its size where known at compile time, otherwise 0.
template <class T, index fixed>
struct Block {
    index size;

    /// Small blocks take vectors no longer than they need.
    static constexpr index power_of_two = fixed <= 2 ? 2 : fixed <= 4 ? 4 : fixed <= 8 ? 8 : 16;
    static constexpr index width = fixed == 0 ? lanes<T> : std::min(lanes<T>, power_of_two);
    using D = hn::CappedTag<T, std::size_t(width)>;
    using V = hn::Vec<D>;

    HWY_INLINE index extent() const { return fixed > 0 ? fixed : size; }

    /// Up to `width` elements of a row from `column` on.
    HWY_INLINE V load(const T* row, index column) const {
        const index rest = extent() - column;
        if (rest >= width) return hn::LoadU(D(), row + column);
        return load_first(D(), row + column, rest);
    }
    HWY_INLINE void store(V vector, T* row, index column) const {
        const index rest = extent() - column;
        if (rest >= width)
            hn::StoreU(vector, D(), row + column);
        else
            store_first(vector, D(), row + column, rest);
    }

    /// y = A x + b. y may be b.
    HWY_INLINE void advance(const T* a, const T* x, const T* b, T* y) const {
        const D d;
        const index n = extent();
        for (index row = 0; row < n; row += width) {
            V sums[width];
            const T* rows = a + row * n;
            if (row + width <= n || fixed > 0) {
                unroll<width>([&](auto r) HWY_ATTR {
                    sums[r] = fixed == 0 || row + r < n ? hn::Mul(load(rows + r * n, 0), load(x, 0)) : hn::Zero(d);
                });
                for (index column = width; column < n; column += width) {
                    const V state = load(x, column);
                    unroll<width>([&](auto r) HWY_ATTR {
                        if (fixed == 0 || row + r < n) sums[r] = hn::MulAdd(load(rows + r * n, column), state, sums[r]);
                    });
                }
                store(hn::Add(sum_each<width>(d, sums), load(b, row)), y, row);
            } else {
                for (index r = row; r < n; ++r) {
                    V sum = hn::Mul(load(a + r * n, 0), load(x, 0));
                    for (index column = width; column < n; column += width)
                        sum = hn::MulAdd(load(a + r * n, column), load(x, column), sum);
                    y[r] = hn::GetLane(hn::SumOfLanes(d, sum)) + b[r];
                }
            }
        }
    }

    /// y = A^T x + b. y may be b.
    HWY_INLINE void advance_transposed(const T* a, const T* x, const T* b, T* y) const {
        const D d;
        const index n = extent();
        for (index column = 0; column < n; column += 2 * width) {
            const bool second = column + width < n;
            V low = load(b, column), high = second ? load(b, column + width) : hn::Zero(d);
            for (index row = 0; row < n; ++row) {
                const V state = hn::Set(d, x[row]);
                low = hn::MulAdd(load(a + row * n, column), state, low);
                if (second) high = hn::MulAdd(load(a + row * n, column + width), state, high);
            }
            store(low, y, column);
            if (second) store(high, y, column + width);
        }
    }

    /// product = left right, for `rows` rows of left.
    template <index rows>
    HWY_INLINE void multiply_rows(const T* left, const T* right, T* product) const {
        const D d;
        const index n = extent();
        for (index column = 0; column < n; column += 2 * width) {
            const bool second = column + width < n;
            V low[rows], high[rows];
            unroll<rows>([&](auto r) HWY_ATTR { low[r] = high[r] = hn::Zero(d); });
            for (index inner = 0; inner < n; ++inner) {
                const V right_low = load(right + inner * n, column);
                const V right_high = second ? load(right + inner * n, column + width) : right_low;
                unroll<rows>([&](auto r) HWY_ATTR {
                    const V factor = hn::Set(d, left[r * n + inner]);
                    low[r] = hn::MulAdd(factor, right_low, low[r]);
                    if (second) high[r] = hn::MulAdd(factor, right_high, high[r]);
                });
            }
            unroll<rows>([&](auto r) HWY_ATTR {
                store(low[r], product + r * n, column);
                if (second) store(high[r], product + r * n, column + width);
            });
        }
    }
    HWY_INLINE void multiply(const T* left, const T* right, T* product) const {
        const index n = extent();
        index row = 0;
        for (; row + 4 <= n; row += 4) multiply_rows<4>(left + row * n, right, product + row * n);
        for (; row < n; ++row) multiply_rows<1>(left + row * n, right, product + row * n);
    }
};

template <class T, class Body>
void with_block(index size, const Body& body) {
    switch (size) {
        case 2:
            return body(Block<T, 2>{size});
        case 3:
            return body(Block<T, 3>{size});
        case 4:
            return body(Block<T, 4>{size});
        case 5:
            return body(Block<T, 5>{size});
        case 6:
            return body(Block<T, 6>{size});
        case 7:
            return body(Block<T, 7>{size});
        case 8:
            return body(Block<T, 8>{size});
        case 16:
            return body(Block<T, 16>{size});
        case 32:
            return body(Block<T, 32>{size});
        default:
            return body(Block<T, 0>{size});
    }
}

/// y = A x + b for neighbouring blocks that are smaller than a vector, as many as fill one with their states. The sums
/// are those of Block::advance, bit for bit.
template <class T, index size>
struct SmallBlocks {
    using D = Lanes<T>;
    using Indices = decltype(hn::SetTableIndices(D(), static_cast<const hwy::MakeSigned<T>*>(nullptr)));

    Indices columns[size];  // of the states, which each element of a vector of A multiplies

    SmallBlocks() {
        const D d;
        HWY_ALIGN hwy::MakeSigned<T> from[hn::MaxLanes(d)];
        for (index vector = 0; vector < size; ++vector) {
            for (index lane = 0; lane < lanes<T>; ++lane) {
                const index row = (vector * lanes<T> + lane) / size;
                from[lane] = hwy::MakeSigned<T>(row / size * size + lane % size);
            }
            columns[vector] = hn::SetTableIndices(d, from);
        }
    }

    HWY_INLINE void advance(const T* a, const T* x, const T* b, T* y) const {
        const D d;
        const auto states = hn::LoadU(d, x);
        hn::Vec<D> sums[size];
        unroll<size>([&](auto i) HWY_ATTR {
            sums[i] = hn::Mul(hn::LoadU(d, a + i * lanes<T>), hn::TableLookupLanes(states, columns[i]));
        });
        hn::StoreU(hn::Add(sum_each<size>(d, sums), hn::LoadU(d, b)), d, y);
    }
};

/// All steps, and side by side in each of them all sequences and blocks: they do not wait for each other.
template <bool transposed, class T, index fixed>
HWY_INLINE void substitute_blocks(const Strip<T>& s, const Block<T, fixed>& block) {
    const index size = block.extent();
    constexpr bool small = !transposed && (fixed == 2 || fixed == 4 || fixed == 8) && fixed < lanes<T>;
    const std::conditional_t<small, SmallBlocks<T, small ? fixed : 2>, int> neighbours{};
    for (index step = 0; step < s.steps; ++step) {
        for (index sequence = 0; sequence < s.batch; ++sequence) {
            const T* a = s.factor + step * s.factor_step + sequence * s.factor_batch;
            const T* b = s.right_side + step * s.right_side_step + sequence * s.right_side_batch;
            T* x = s.solution + step * s.solution_step + sequence * s.solution_batch;
            const T* before = step > 0   ? x - s.solution_step
                              : s.before ? s.before + sequence * s.before_batch
                                         : nullptr;
            if (before == nullptr) {
                std::copy_n(b, s.width, x);
                continue;
            }
            index first = 0;
            if constexpr (small)
                for (; first + lanes<T> <= s.width; first += lanes<T>) {
                    unroll<fixed>([&](auto i) HWY_ATTR { fetch(a + first * fixed + i * lanes<T>, s.factor_ahead); });
                    fetch(b + first, s.right_side_ahead);
                    neighbours.advance(a + first * fixed, before + first, b + first, x + first);
                }
            for (; first < s.width; first += size) {
                for (index i = 0; i < size * size; i += 64 / index(sizeof(T)))
                    fetch(a + first * size + i, s.factor_ahead);
                fetch(b + first, s.right_side_ahead);
                if constexpr (transposed)
                    block.advance_transposed(a + first * size, before + first, b + first, x + first);
                else
                    block.advance(a + first * size, before + first, b + first, x + first);
            }
        }
    }
}

template <class T, class B>
HWY_INLINE void summarise_blocks(const Strip<T>& s, const B& block, T* product, T* end, T* scratch) {
    const index size = block.extent();
    for (index first = 0; first < s.width; first += size) {
        const T* a = s.factor + first * size;
        const T* b = s.right_side + first;
        // Two places each for the product and the state; the last step leaves them in `product` and `end`.
        T *total = product + first * size, *next_total = scratch;
        T *state = end + first, *next_state = scratch + size * size;
        if (s.steps % 2 == 0) {
            std::swap(total, next_total);
            std::swap(state, next_state);
        }
        std::copy_n(a, size * size, total);
        std::copy_n(b, size, state);
        for (index step = 1; step < s.steps; ++step) {
            a += s.factor_step;
            b += s.right_side_step;
            if (s.transposed) {
                block.multiply(total, a, next_total);
                block.advance_transposed(a, state, b, next_state);
            } else {
                block.multiply(a, total, next_total);
                block.advance(a, state, b, next_state);
            }
            std::swap(total, next_total);
            std::swap(state, next_state);
        }
    }
}

// ------------------------------------------------------------------------------------------------------ entry points

template <class T>
void substitute(const Strip<T>& s) {
    if (s.block == 1) return substitute_diagonal(s);
    with_block<T>(s.block, [&](auto block) HWY_ATTR {
        if (s.transposed)
            substitute_blocks<true>(s, block);
        else
            substitute_blocks<false>(s, block);
    });
}

template <class T>
void replay(const Strip<T>& s) {
    if (!is_series(s)) return substitute(s);
    with_rounds<T>(s.width, [&](auto rounds) HWY_ATTR { replay_series<T, rounds>(s); });
}

template <class T>
void summarise(const Strip<T>& s, T* product, T* end, T* scratch) {
    if (is_series(s))
        with_rounds<T>(s.width, [&](auto rounds) HWY_ATTR { summarise_series<T, rounds>(s, product, end); });
    else if (s.block == 1)
        summarise_rows(s, product, end);
    else
        with_block<T>(s.block, [&](auto block) HWY_ATTR { summarise_blocks(s, block, product, end, scratch); });
}

template <class T>
void multiply(const T* left, const T* right, index count, index size, T* product) {
    if (size == 1) {
        const Lanes<T> d;
        index i = 0;
        for (; i + lanes<T> <= count; i += lanes<T>)
            hn::StoreU(hn::Mul(hn::LoadU(d, left + i), hn::LoadU(d, right + i)), d, product + i);
        for (; i < count; ++i) product[i] = left[i] * right[i];
        return;
    }
    with_block<T>(size, [&](auto block) HWY_ATTR {
        for (index i = 0; i < count * size * size; i += size * size) block.multiply(left + i, right + i, product + i);
    });
}

template <class T>
constexpr Kernels<T> table{lanes<T>, substitute<T>, replay<T>, summarise<T>, multiply<T>};
const Kernels<float>* kernels_of_float() { return &table<float>; }
const Kernels<double>* kernels_of_double() { return &table<double>; }

}  // namespace HWY_NAMESPACE
}  // namespace deeppcr::reduce
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deeppcr::reduce {

HWY_EXPORT(kernels_of_float);
HWY_EXPORT(kernels_of_double);

template <>
const Kernels<float>& kernels<float>() {
    device::choose_simd_target();
    return *HWY_DYNAMIC_DISPATCH(kernels_of_float)();
}
template <>
const Kernels<double>& kernels<double>() {
    device::choose_simd_target();
    return *HWY_DYNAMIC_DISPATCH(kernels_of_double)();
}

}  // namespace deeppcr::reduce
#endif
