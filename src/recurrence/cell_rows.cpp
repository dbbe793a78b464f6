// A thread takes units of work, each 16 lanes wide, in bundles:
//   direct   16 neighbouring channels of one row, read and written in place
//   padded   the last channels of a row, fewer than 16, through tiles in the cache; the other lanes idle
//   lone     the only channel of a row, forwards: no lanes at all
//   grouped  16 rows of equal length with all their channels, fewer than 16, through tiles: lanes are rows
// All units of a bundle go forward together, so that their dependent operations overlap.
//
//   tile of a group      step 0: gate 0 channel 0: row 0 row 1 ... row 15 | gate 0 channel 1: row 0 ... | ...
//                        step 1: ...

#include "recurrence/cell_rows.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "device/simd.hpp"
#include "device/threads.hpp"

namespace deeppcr::cell {
namespace {

constexpr index tile_bytes = 16384;        // of a unit's inputs
constexpr index steps_between_sums = 256;  // the parameters' gradients leave float for double

enum class Kind { direct, lone, padded, grouped };

// Transposing between 16 rows and lanes, four elements of four rows (or two of two) at a time in registers.
using Four = float __attribute__((vector_size(16)));
using Two = double __attribute__((vector_size(16)));

template <class Vector, class Element>
Vector load(const Element* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}
template <class Vector, class Element>
void store(Element* to, Vector vector) {
    std::memcpy(to, &vector, sizeof vector);
}
std::array<Four, 4> transpose(const std::array<Four, 4>& rows) {
    const Four a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
    const Four b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
    const Four c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
    const Four d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
    return {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
            __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
}
std::array<Two, 2> transpose(const std::array<Two, 2>& rows) {
    return {__builtin_shufflevector(rows[0], rows[1], 0, 2), __builtin_shufflevector(rows[0], rows[1], 1, 3)};
}

/// Elements of `width` numbers that are 4 or 8 bytes long; `Vector` holds `n` of them.
template <class Vector, std::size_t n, class T>
index interleave_vectors(const std::array<const T*, lanes>& from, index count, index width, T* to) {
    index e = 0;
    for (; e + index(n) <= count; e += n)
        for (std::size_t r = 0; r < lanes; r += n) {
            std::array<Vector, n> square;
            for (std::size_t i = 0; i < n; ++i) square[i] = load<Vector>(from[r + i] + e * width);
            square = transpose(square);
            for (std::size_t i = 0; i < n; ++i) store(to + ((e + index(i)) * lanes + index(r)) * width, square[i]);
        }
    return e;
}
template <class Vector, std::size_t n, class T>
index separate_vectors(const T* from, index count, index width, const std::array<T*, lanes>& to) {
    index e = 0;
    for (; e + index(n) <= count; e += n)
        for (std::size_t r = 0; r < lanes; r += n) {
            std::array<Vector, n> square;
            for (std::size_t i = 0; i < n; ++i)
                square[i] = load<Vector>(from + ((e + index(i)) * lanes + index(r)) * width);
            square = transpose(square);
            for (std::size_t i = 0; i < n; ++i) store(to[r + i] + e * width, square[i]);
        }
    return e;
}

/// to[e][r] = from[r][e] for 16 rows of `count` elements, `width` numbers each.
template <class T>
void interleave(const std::array<const T*, lanes>& from, index count, index width, T* to) {
    index e = 0;
    if (width * index(sizeof(T)) == 4)
        e = interleave_vectors<Four, 4>(from, count, width, to);
    else if (width * index(sizeof(T)) == 8)
        e = interleave_vectors<Two, 2>(from, count, width, to);
    for (; e < count; ++e)
        for (std::size_t r = 0; r < lanes; ++r)
            std::copy_n(from[r] + e * width, width, to + (e * lanes + index(r)) * width);
}

/// The way back.
template <class T>
void separate(const T* from, index count, index width, const std::array<T*, lanes>& to) {
    index e = 0;
    if (width * index(sizeof(T)) == 4)
        e = separate_vectors<Four, 4>(from, count, width, to);
    else if (width * index(sizeof(T)) == 8)
        e = separate_vectors<Two, 2>(from, count, width, to);
    for (std::size_t r = 0; r < lanes; ++r)
        for (index i = e; i < count; ++i) std::copy_n(from + (i * lanes + index(r)) * width, width, to[r] + i * width);
}

struct Unit {
    Kind kind;
    index row = 0;      // direct, padded; grouped: the first entry in the order of rows
    index channel = 0;  // direct, padded: the first
    index count = 0;    // padded: channels; grouped: rows
    index steps = 0;
    index blocks = 1;
};

template <class T>
class Bundle {
public:
    Bundle(const Kernels<T>& kernels, Work work, index channels, const T* parameters, std::span<const Row<T>> rows,
           std::span<const index> order, const RowStrides& strides, std::span<const Unit> units)
        : kernels_(kernels),
          work_(work),
          C_(channels),
          parameters_(parameters),
          rows_(rows),
          order_(order),
          strides_(strides),
          units_(units),
          kind_(units.front().kind) {}

    void run() {
        allocate();
        for (std::size_t i = 0; i < units_.size(); ++i) enter(i);
        const bool backwards = work_ == Work::backward || work_ == Work::correct;
        // Backwards, a unit of fewer steps waits until the others have come down to its own last step.
        std::vector<index> stops{0};
        for (const Unit& unit : units_) stops.push_back(unit.steps);
        std::sort(stops.begin(), stops.end());
        stops.erase(std::unique(stops.begin(), stops.end()), stops.end());
        if (backwards) {
            for (std::size_t i = stops.size() - 1; i > 0; --i)
                for (index last = stops[i]; last > stops[i - 1];) {
                    const index first = std::max(stops[i - 1], last - piece_);
                    advance(first, last);
                    last = first;
                }
        } else {
            for (std::size_t i = 0; i + 1 < stops.size(); ++i)
                for (index first = stops[i]; first < stops[i + 1];) {
                    const index last = std::min(stops[i + 1], first + piece_);
                    advance(first, last);
                    first = last;
                }
        }
        for (std::size_t i = 0; i < units_.size(); ++i) leave(i);
    }

private:
    bool uses(Work a, Work b) const { return work_ == a || work_ == b; }
    bool has_state() const { return !uses(Work::apply, Work::linearise); }
    bool has_before() const { return work_ != Work::advance && work_ != Work::multiply; }
    bool has_after() const { return uses(Work::advance, Work::apply); }
    bool writes_after() const { return has_after() && rows_[std::size_t(any_row(0))].after != nullptr; }
    bool differentiates() const { return uses(Work::backward, Work::correct); }

    /// Memory of one block of 16 lanes; blocks of a bundle lie one after the other.
    void allocate() {
        const index blocks = std::accumulate(units_.begin(), units_.end(), index(0),
                                             [](index sum, const Unit& unit) { return sum + unit.blocks; });
        const index per_block = lanes * (K_ + K_ * K_ + 2 * P_);
        tiled_ = kind_ == Kind::padded || kind_ == Kind::grouped;
        // A tile holds whole rows of a group, or the 16 lanes of a padded unit.
        tile_channels_ = kind_ == Kind::grouped ? C_ : 1;
        piece_ = steps_between_sums;
        if (tiled_) piece_ = std::clamp<index>(tile_bytes / (lanes * tile_channels_ * G_ * index(sizeof(T))), 4, 64);
        const index longest = std::max_element(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) {
                                  return a.steps < b.steps;
                              })->steps;
        piece_ = std::min(piece_, std::max<index>(longest, 1));
        const index entries = tiled_ ? piece_ * tile_channels_ * lanes : 0;
        const index per_unit =
            entries * (G_ + (differentiates() ? G_ : 0) + (has_before() ? K_ : 0) + (writes_after() ? K_ : 0) +
                       (work_ == Work::backward ? K_ : 0) + (work_ == Work::linearise ? K_ * K_ : 0));
        // Kept from call to call: a fresh piece of this size would cost more than a short row.
        thread_local std::vector<T> memory;
        const index rest = tiled_ ? piece_ * tile_channels_ * std::max(G_, K_ * K_) : 0;
        const std::size_t wanted = std::size_t(blocks * per_block + index(units_.size()) * per_unit +
                                               lanes * K_ * (tiled_ ? piece_ * tile_channels_ : 1) + rest);
        if (memory.size() < wanted) memory.resize(wanted);
        T* next = memory.data();
        const auto take = [&](index count) {
            T* const taken = next;
            next += count;
            return taken;
        };
        scratch_ = take(lanes * K_ * (tiled_ ? piece_ * tile_channels_ : 1));
        rest_ = take(rest);
        std::fill_n(next, blocks * per_block + index(units_.size()) * per_unit, T(0));
        first_block_.clear();
        for (const Unit& unit : units_) {
            first_block_.push_back(index(blocks_.size()));
            for (index b = 0; b < unit.blocks; ++b) {
                LaneBlock<T> block{};
                block.state = take(lanes * K_);
                block.product = take(lanes * K_ * K_);
                block.parameter_gradient = take(lanes * P_);
                block.after = scratch_;
                own_parameters_.push_back(take(lanes * P_));
                block.parameters = own_parameters_.back();
                blocks_.push_back(block);
            }
            Tile tile{};
            if (tiled_) {
                tile.inputs = take(entries * G_);
                if (differentiates()) tile.input_gradient = take(entries * G_);
                if (has_before()) tile.before = take(entries * K_);
                tile.after = writes_after() ? take(entries * K_) : scratch_;
                if (work_ == Work::backward) tile.gradient = take(entries * K_);
                if (work_ == Work::linearise) tile.jacobian = take(entries * K_ * K_);
            }
            tiles_.push_back(tile);
        }
        sums_.assign(differentiates() ? std::size_t(blocks * lanes * P_) : 0, 0);
    }

    /// Calls visit(block, lane, row, channel) for the lanes of a unit; `real` is false for those that fill up.
    template <class Visit>
    void each_lane(std::size_t u, const Visit& visit) const {
        const Unit& unit = units_[u];
        for (index b = 0; b < unit.blocks; ++b)
            for (int l = 0; l < lanes; ++l) {
                switch (kind_) {
                    case Kind::direct:
                        visit(b, l, unit.row, unit.channel + l, true);
                        break;
                    case Kind::lone:
                        visit(b, l, unit.row, unit.channel, l == 0);
                        break;
                    case Kind::padded:
                        visit(b, l, unit.row, unit.channel + std::min<index>(l, unit.count - 1), l < unit.count);
                        break;
                    case Kind::grouped:
                        visit(b, l, order_[std::size_t(unit.row + std::min<index>(l, unit.count - 1))], b,
                              l < unit.count);
                        break;
                }
            }
    }

    LaneBlock<T>& block(std::size_t u, index b) { return blocks_[std::size_t(first_block_[u] + b)]; }

    void enter(std::size_t u) {
        if (!tiled_) block(u, 0).parameters = parameters_ + units_[u].channel;
        each_lane(u, [&](index b, int l, index r, index c, bool) {
            LaneBlock<T>& here = block(u, b);
            const Row<T>& row = rows_[std::size_t(r)];
            if (tiled_)
                for (index q = 0; q < P_; ++q)
                    own_parameters_[std::size_t(first_block_[u] + b)][q * lanes + l] = parameters_[q * C_ + c];
            if (has_state() && row.start != nullptr)
                for (index k = 0; k < K_; ++k) here.state[k * lanes + l] = row.start[c * K_ + k];
            for (index k = 0; k < K_; ++k) here.product[(k * K_ + k) * lanes + l] = 1;
        });
        if (tiled_) return;
        const Row<T>& row = rows_[std::size_t(units_[u].row)];
        const index c = units_[u].channel;
        LaneBlock<T>& here = block(u, 0);
        here.inputs = row.inputs + c;
        if (row.before != nullptr) here.before = row.before + c * K_;
        if (row.after != nullptr) here.after = row.after + c * K_;
        if (row.jacobian != nullptr) here.jacobian = row.jacobian + c * K_ * K_;
        if (row.gradient != nullptr) here.gradient = row.gradient + c * K_;
        if (row.input_gradient != nullptr) here.input_gradient = row.input_gradient + c;
    }

    void leave(std::size_t u) {
        each_lane(u, [&](index b, int l, index r, index c, bool real) {
            if (!real) return;
            const LaneBlock<T>& here = block(u, b);
            const Row<T>& row = rows_[std::size_t(r)];
            if (has_state() && row.end != nullptr)
                for (index k = 0; k < K_; ++k) row.end[c * K_ + k] = here.state[k * lanes + l];
            if (work_ == Work::multiply && row.product != nullptr)
                for (index k = 0; k < K_ * K_; ++k) row.product[c * K_ * K_ + k] = here.product[k * lanes + l];
            if (differentiates() && row.parameter_gradient != nullptr)
                for (index q = 0; q < P_; ++q)
                    row.parameter_gradient[q * C_ + c] +=
                        sums_[std::size_t(((first_block_[u] + b) * P_ + q) * lanes + l)];
        });
    }

    /// Steps first .. last of every unit that has them.
    void advance(index first, index last) {
        active_.clear();
        LaneSweep<T> sweep;
        sweep.steps = last - first;
        sweep.parameter_stride = tiled_ ? lanes : C_;
        if (!tiled_) {
            sweep.input_step = strides_.inputs;
            sweep.input_gate = C_;
            sweep.before_step = strides_.before;
            sweep.after_step = writes_after() ? strides_.after : 0;
            sweep.jacobian_step = strides_.jacobian;
            sweep.gradient_step = strides_.gradient;
            sweep.input_gradient_step = strides_.input_gradient;
        } else {
            const index row = tile_channels_ * lanes;
            sweep.input_step = sweep.input_gradient_step = row * G_;
            sweep.input_gate = row;
            sweep.before_step = sweep.after_step = sweep.gradient_step = row * K_;
            sweep.jacobian_step = row * K_ * K_;
        }
        for (std::size_t u = 0; u < units_.size(); ++u) {
            if (units_[u].steps < last) continue;
            if (tiled_) fill_tile(u, first, last);
            for (index b = 0; b < units_[u].blocks; ++b) {
                LaneBlock<T> now = block(u, b);
                if (tiled_) {
                    const Tile& tile = tiles_[u];
                    now.inputs = tile.inputs + b * lanes;
                    now.before = tile.before + b * lanes * K_;
                    now.after = tile.after + b * lanes * K_;
                    now.gradient = tile.gradient + b * lanes * K_;
                    now.jacobian = tile.jacobian + b * lanes * K_ * K_;
                    now.input_gradient = tile.input_gradient + b * lanes;
                } else {
                    now.inputs += first * sweep.input_step;
                    now.after += first * sweep.after_step;
                    if (now.before != nullptr) now.before += first * sweep.before_step;
                    if (now.jacobian != nullptr) now.jacobian += first * sweep.jacobian_step;
                    if (now.gradient != nullptr) now.gradient += first * sweep.gradient_step;
                    if (now.input_gradient != nullptr) now.input_gradient += first * sweep.input_gradient_step;
                }
                active_.push_back(now);
            }
        }
        sweep.blocks = active_.data();
        sweep.count = index(active_.size());
        kernel()(sweep);
        if (tiled_)
            for (std::size_t u = 0; u < units_.size(); ++u)
                if (units_[u].steps >= last) empty_tile(u, first, last);
        if (differentiates()) sum_up();
    }

    Kernel<T> kernel() const {
        switch (work_) {
            case Work::advance:
                return kind_ == Kind::lone ? kernels_.advance_one : kernels_.advance;
            case Work::multiply:
                return kernels_.multiply;
            case Work::apply:
                return kernels_.apply;
            case Work::linearise:
                return kernels_.linearise;
            case Work::backward:
                return kernels_.backward;
            case Work::correct:
                break;
        }
        return kernels_.correct;
    }

    void sum_up() {
        for (std::size_t b = 0; b < blocks_.size(); ++b)
            for (index q = 0; q < P_ * lanes; ++q) {
                sums_[b * std::size_t(P_ * lanes) + std::size_t(q)] += double(blocks_[b].parameter_gradient[q]);
                blocks_[b].parameter_gradient[q] = 0;
            }
    }

    /// `width` elements per channel and step, in `gates` runs of C of them. Lanes that only fill up a padded block keep
    /// zeros.
    template <class Pointer>
    void gather(std::size_t u, Pointer Row<T>::*source, index stride, index gates, index width, index first, index last,
                T* tile) const {
        const Unit& unit = units_[u];
        if (kind_ == Kind::padded) {
            const T* from = rows_[std::size_t(unit.row)].*source + first * stride + unit.channel * width;
            for (index i = first; i < last; ++i, from += stride)
                for (index g = 0; g < gates; ++g, tile += lanes * width)
                    std::copy_n(from + g * C_, unit.count * width, tile);
            return;
        }
        std::array<const T*, lanes> from;
        for (int l = 0; l < lanes; ++l)
            from[std::size_t(l)] =
                rows_[std::size_t(order_[std::size_t(unit.row + std::min<index>(l, unit.count - 1))])].*source +
                first * stride;
        const index row = gates * C_;
        const bool together = stride == row * width;
        const index runs = together ? 1 : last - first, count = together ? row * (last - first) : row;
        for (index i = 0; i < runs; ++i) {
            interleave(from, count, width, tile + i * row * lanes * width);
            for (const T*& pointer : from) pointer += stride;
        }
        // The rows are too many and too short for the processor's own prefetching.
        if (together)
            for (const T* pointer : from)
                for (index e = 0; e < count * width; e += 64 / index(sizeof(T)))
                    __builtin_prefetch(pointer - stride + count * width + e);
    }

    void scatter(std::size_t u, T* Row<T>::*target, index stride, index gates, index width, index first, index last,
                 const T* tile) const {
        const Unit& unit = units_[u];
        if (kind_ == Kind::padded) {
            T* to = rows_[std::size_t(unit.row)].*target + first * stride + unit.channel * width;
            for (index i = first; i < last; ++i, to += stride)
                for (index g = 0; g < gates; ++g, tile += lanes * width)
                    std::copy_n(tile, unit.count * width, to + g * C_);
            return;
        }
        std::array<T*, lanes> to;
        for (int l = 0; l < lanes; ++l)
            to[std::size_t(l)] = l < unit.count
                                     ? rows_[std::size_t(order_[std::size_t(unit.row + l)])].*target + first * stride
                                     : nullptr;
        const index row = gates * C_;
        const bool together = stride == row * width;
        const index runs = together ? 1 : last - first, count = together ? row * (last - first) : row;
        for (index i = 0; i < runs; ++i) {
            std::array<T*, lanes> now = to;
            for (std::size_t l = 0; l < lanes; ++l) now[l] = to[l] == nullptr ? rest_ : to[l] + i * stride;
            separate(tile + i * row * lanes * width, count, width, now);
        }
    }

    void fill_tile(std::size_t u, index first, index last) {
        const Tile& tile = tiles_[u];
        gather(u, &Row<T>::inputs, strides_.inputs, G_, 1, first, last, tile.inputs);
        if (has_before()) gather(u, &Row<T>::before, strides_.before, 1, K_, first, last, tile.before);
        if (work_ == Work::backward) gather(u, &Row<T>::gradient, strides_.gradient, 1, K_, first, last, tile.gradient);
        if (work_ == Work::correct)
            gather(u, &Row<T>::input_gradient, strides_.input_gradient, G_, 1, first, last, tile.input_gradient);
    }

    void empty_tile(std::size_t u, index first, index last) {
        const Tile& tile = tiles_[u];
        if (writes_after()) scatter(u, &Row<T>::after, strides_.after, 1, K_, first, last, tile.after);
        if (work_ == Work::linearise)
            scatter(u, &Row<T>::jacobian, strides_.jacobian, 1, K_ * K_, first, last, tile.jacobian);
        if (differentiates())
            scatter(u, &Row<T>::input_gradient, strides_.input_gradient, G_, 1, first, last, tile.input_gradient);
    }

    index any_row(std::size_t u) const {
        return kind_ == Kind::grouped ? order_[std::size_t(units_[u].row)] : units_[u].row;
    }

    struct Tile {
        T *inputs, *input_gradient, *before, *after, *gradient, *jacobian;
    };

    const Kernels<T>& kernels_;
    Work work_;
    index C_;
    const T* parameters_;
    std::span<const Row<T>> rows_;
    std::span<const index> order_;
    RowStrides strides_;
    std::span<const Unit> units_;
    Kind kind_;
    index K_ = kernels_.states, G_ = kernels_.inputs, P_ = kernels_.parameters;
    bool tiled_ = false;
    index tile_channels_ = 1, piece_ = 0;
    T* scratch_ = nullptr;  // where states go that nobody wants
    T* rest_ = nullptr;     // and what the lanes give that only fill up
    std::vector<LaneBlock<T>> blocks_, active_;
    std::vector<T*> own_parameters_;  // of tiled blocks
    std::vector<index> first_block_;
    std::vector<Tile> tiles_;
    std::vector<double> sums_;
};

/// Units of like kind, in the order of rows.
std::vector<Unit> plan(Work work, std::span<const index> order, index channels, const auto& steps_of) {
    const Kind alone = work == Work::advance ? Kind::lone : Kind::padded;
    std::vector<Unit> units;
    if (channels >= lanes) {
        for (const index row : order)
            for (index c = 0; c + lanes <= channels; c += lanes)
                units.push_back({Kind::direct, row, c, lanes, steps_of(row), 1});
        if (channels % lanes != 0)
            for (const index row : order)
                units.push_back({channels % lanes == 1 ? alone : Kind::padded, row, channels - channels % lanes,
                                 channels % lanes, steps_of(row), 1});
        return units;
    }
    for (std::size_t i = 0; i < order.size();) {
        std::size_t end = i + 1;
        while (end < order.size() && end - i < lanes && steps_of(order[end]) == steps_of(order[i])) ++end;
        // A row alone fills more of its 16 lanes with its channels than with itself.
        if (end - i == 1)
            units.push_back({channels == 1 ? alone : Kind::padded, order[i], 0, channels, steps_of(order[i]), 1});
        else
            units.push_back({Kind::grouped, index(i), 0, index(end - i), steps_of(order[i]), channels});
        i = end;
    }
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.kind < b.kind; });
    return units;
}

/// Runs of units of one kind, at most `most` blocks each: (first, last).
std::vector<std::pair<std::size_t, std::size_t>> bundles(const std::vector<Unit>& units, index most) {
    std::vector<std::pair<std::size_t, std::size_t>> result;
    for (std::size_t i = 0; i < units.size();) {
        index blocks = units[i].blocks;
        std::size_t end = i + 1;
        while (end < units.size() && units[end].kind == units[i].kind && blocks + units[end].blocks <= most)
            blocks += units[end++].blocks;
        result.emplace_back(i, end);
        i = end;
    }
    return result;
}

}  // namespace

template <class T>
void run_rows(const Kernels<T>& kernels, Work work, index channels, const T* parameters, std::span<const Row<T>> rows,
              const RowStrides& strides, int threads) {
    std::vector<index> order(rows.size());
    std::iota(order.begin(), order.end(), index(0));
    const auto steps_of = [&](index row) { return rows[std::size_t(row)].steps; };
    if (channels < lanes)
        std::stable_sort(order.begin(), order.end(), [&](index a, index b) { return steps_of(a) > steps_of(b); });
    const std::vector<Unit> units = plan(work, order, channels, steps_of);
    if (units.empty()) return;
    const index blocks = std::accumulate(units.begin(), units.end(), index(0),
                                         [](index sum, const Unit& unit) { return sum + unit.blocks; });
    const index share = (blocks + threads - 1) / threads;
    const auto parts = bundles(units, std::min(share, most_blocks));
    const int used = int(std::min<index>(threads, index(parts.size())));
    const bool decays = work == Work::multiply || work == Work::backward || work == Work::correct;
    const auto work_on = [&](index first, index last) {
        std::optional<device::SubnormalsAreZero> fast;
        if (decays) fast.emplace();
        for (index i = first; i < last; ++i) {
            const auto [begin, end] = parts[std::size_t(i)];
            Bundle<T>(kernels, work, channels, parameters, rows, order, strides,
                      std::span(units).subspan(begin, end - begin))
                .run();
        }
    };
    if (used == 1)
        work_on(0, index(parts.size()));
    else
        device::parallel_ranges(used, index(parts.size()), 1, work_on);
}

template <class T>
void run_rows_plainly(const Kernels<T>& kernels, Work work, index channels, const T* parameters,
                      std::span<const Row<T>> rows, const RowStrides& strides) {
    const index K = kernels.states, P = kernels.parameters;
    std::vector<T> state(std::size_t(K * lanes)), sums(std::size_t(P * lanes));
    for (const Row<T>& row : rows)
        for (index c = 0; c < channels; ++c) {
            if (row.start != nullptr)
                for (index k = 0; k < K; ++k) state[std::size_t(k * lanes)] = row.start[c * K + k];
            for (index n = 0; n < row.steps; ++n) {
                const index i = work == Work::backward ? row.steps - 1 - n : n;
                LaneBlock<T> block{};
                LaneSweep<T> sweep;
                sweep.steps = sweep.count = 1;
                sweep.blocks = &block;
                sweep.input_gate = sweep.parameter_stride = channels;
                block.inputs = row.inputs + i * strides.inputs + c;
                block.parameters = parameters + c;
                block.state = state.data();
                block.before = work != Work::advance ? row.before + i * strides.before + c * K
                               : i == 0              ? row.start + c * K
                                                     : row.after + (i - 1) * strides.after + c * K;
                if (work == Work::backward) {
                    block.gradient = row.gradient + i * strides.gradient + c * K;
                    block.input_gradient = row.input_gradient + i * strides.input_gradient + c;
                    block.parameter_gradient = sums.data();
                    std::fill(sums.begin(), sums.end(), T(0));
                    kernels.plain_backward(sweep);
                    for (index q = 0; q < P; ++q)
                        row.parameter_gradient[q * channels + c] += double(sums[std::size_t(q * lanes)]);
                } else if (work == Work::linearise) {
                    block.jacobian = row.jacobian + i * strides.jacobian + c * K * K;
                    kernels.plain_linearise(sweep);
                } else {
                    block.after = row.after + i * strides.after + c * K;
                    kernels.plain_step(sweep);
                }
            }
            if (work == Work::backward && row.end != nullptr)
                for (index k = 0; k < K; ++k) row.end[c * K + k] = state[std::size_t(k * lanes)];
        }
}

#define DEEPPCR_INSTANTIATE(T)                                                                                         \
    template void run_rows(const Kernels<T>&, Work, index, const T*, std::span<const Row<T>>, const RowStrides&, int); \
    template void run_rows_plainly(const Kernels<T>&, Work, index, const T*, std::span<const Row<T>>,                  \
                                   const RowStrides&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::cell
