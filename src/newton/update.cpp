#include "newton/update.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "newton/update.cpp"
#include <hwy/foreach_target.h>
// foreach_target.h first: it includes this file once for each instruction set.
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "device/simd.hpp"
#include "device/threads.hpp"

HWY_BEFORE_NAMESPACE();
namespace deeppcr::newton::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Largest absolute values of one state's residual and of the state; NaN in `finite` where any value is not finite.
template <class T>
struct RowNorms {
    T residual, state, finite;
};

/// update = after - state.
template <class T>
RowNorms<T> difference(const T* HWY_RESTRICT state, const T* HWY_RESTRICT after, T* HWY_RESTRICT update, index width) {
    const hn::ScalableTag<T> d;
    const index lanes = index(hn::Lanes(d));
    const auto zero = hn::Zero(d);
    auto residual = zero, size = zero, finite = zero;
    index i = 0;
    for (; i + lanes <= width; i += lanes) {
        const auto x = hn::LoadU(d, state + i);
        const auto r = hn::Sub(hn::LoadU(d, after + i), x);
        hn::StoreU(r, d, update + i);
        residual = hn::Max(residual, hn::Abs(r));
        size = hn::Max(size, hn::Abs(x));
        finite = hn::MulAdd(r, zero, finite);
    }
    RowNorms<T> norms{hn::GetLane(hn::MaxOfLanes(d, residual)), hn::GetLane(hn::MaxOfLanes(d, size)),
                      hn::GetLane(hn::SumOfLanes(d, finite))};
    for (; i < width; ++i) {
        const T r = after[i] - state[i];
        update[i] = r;
        norms.residual = std::max(norms.residual, std::abs(r));
        norms.state = std::max(norms.state, std::abs(state[i]));
        norms.finite += r * T(0);
    }
    return norms;
}

/// state += update, unless any sum is not finite: then nothing changes and the result is false.
template <class T>
bool add(T* HWY_RESTRICT state, const T* HWY_RESTRICT update, index width) {
    const hn::ScalableTag<T> d;
    const index lanes = index(hn::Lanes(d));
    const auto zero = hn::Zero(d);
    auto check = zero;
    T finite = 0;
    index i = 0;
    for (; i + lanes <= width; i += lanes)
        check = hn::MulAdd(hn::Add(hn::LoadU(d, state + i), hn::LoadU(d, update + i)), zero, check);
    finite = hn::GetLane(hn::SumOfLanes(d, check));
    for (index k = i; k < width; ++k) finite += (state[k] + update[k]) * T(0);
    if (!(finite == T(0))) return false;
    for (i = 0; i + lanes <= width; i += lanes)
        hn::StoreU(hn::Add(hn::LoadU(d, state + i), hn::LoadU(d, update + i)), d, state + i);
    for (; i < width; ++i) state[i] += update[i];
    return true;
}

template <class T>
index test_rows(const Window<T>& window, const Progress* progress, Tolerance tolerance, index first, index last,
                RangeResult* results) {
    const index sequences = window.after.batch(), width = window.after.width();
    index resets = 0;
    for (index i = first; i < last; ++i)
        for (index j = 0; j < sequences; ++j) {
            T* update = window.update.at(i, j);
            RangeResult& result = results[j];
            if (i < progress[j].confirmed) {
                std::fill_n(update, width, T(0));
                result.passed = i - first + 1;
                continue;
            }
            T* state = window.states.at(i + 1, j);
            const RowNorms<T> norms = difference(state, window.after.at(i, j), update, width);
            const double allowed = tolerance.absolute + tolerance.relative * double(norms.state);
            const double relative =
                norms.residual == T(0) ? 0.0 : double(norms.residual) / allowed;  // a tolerance of 0 asks for r == 0
            const bool finite = norms.finite == T(0);
            if (finite && relative <= 1 && result.passed == i - first) {
                result.passed = i - first + 1;
                result.residual = std::max(result.residual, double(norms.residual));
                result.relative_residual = std::max(result.relative_residual, relative);
                continue;
            }
            if (finite) {
                result.worst = std::max(result.worst, relative);
                continue;
            }
            result.worst = std::numeric_limits<double>::infinity();
            ++resets;
            std::fill_n(update, width, T(0));
            if (window.jacobian.data() != nullptr)
                std::fill_n(window.jacobian.at(i, j), width * window.jacobian.block(), T(0));
            if (!std::all_of(state, state + width, [](T value) { return std::isfinite(value); }))
                std::copy_n(window.states.at(progress[j].confirmed, j), width, state);
        }
    return resets;
}

template <class T>
index update_rows(const Window<T>& window, const Progress* progress, index first, index last) {
    const index sequences = window.after.batch(), width = window.after.width();
    index kept = 0;
    for (index i = first; i < last; ++i)
        for (index j = 0; j < sequences; ++j) {
            if (i < progress[j].confirmed) continue;
            T* state = window.states.at(i + 1, j);
            if (i == progress[j].confirmed)
                std::copy_n(window.after.at(i, j), width, state);
            else if (!add(state, window.update.at(i, j), width))
                ++kept;
        }
    return kept;
}

index test_float(const Window<float>& window, const Progress* progress, Tolerance tolerance, index first, index last,
                 RangeResult* results) {
    return test_rows(window, progress, tolerance, first, last, results);
}
index test_double(const Window<double>& window, const Progress* progress, Tolerance tolerance, index first, index last,
                  RangeResult* results) {
    return test_rows(window, progress, tolerance, first, last, results);
}
index update_float(const Window<float>& window, const Progress* progress, index first, index last) {
    return update_rows(window, progress, first, last);
}
index update_double(const Window<double>& window, const Progress* progress, index first, index last) {
    return update_rows(window, progress, first, last);
}

}  // namespace deeppcr::newton::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deeppcr::newton {

HWY_EXPORT(test_float);
HWY_EXPORT(test_double);
HWY_EXPORT(update_float);
HWY_EXPORT(update_double);

namespace {

constexpr index elements_per_thread = 1 << 14;  // below this a second thread costs more than it brings

/// Ranges of rows that do not depend on which thread runs them.
struct Ranges {
    Ranges(const Shape& shape, const Execution& execution) : rows(shape.steps) {
        const index wanted = shape.steps * shape.batch * shape.width / elements_per_thread;
        count =
            std::clamp<index>(std::min<index>(device::thread_count(execution), wanted), 1, std::max<index>(rows, 1));
    }
    index begin(index range) const { return rows * range / count; }
    index rows, count;
};

}  // namespace

template <class T>
index test_residual(const Window<T>& window, std::vector<Progress>& progress, Tolerance tolerance,
                    const Execution& execution) {
    device::choose_simd_target();
    const Ranges ranges(window.after.shape(), execution);
    const index sequences = window.after.batch();
    std::vector<RangeResult> results(std::size_t(ranges.count * sequences));
    std::vector<index> resets(std::size_t(ranges.count), 0);
    device::run_together(int(ranges.count), [&](int range) {
        RangeResult* result = results.data() + range * sequences;
        const index first = ranges.begin(range), last = ranges.begin(range + 1);
        if constexpr (std::is_same_v<T, float>)
            resets[std::size_t(range)] =
                HWY_DYNAMIC_DISPATCH(test_float)(window, progress.data(), tolerance, first, last, result);
        else
            resets[std::size_t(range)] =
                HWY_DYNAMIC_DISPATCH(test_double)(window, progress.data(), tolerance, first, last, result);
    });
    for (index j = 0; j < sequences; ++j) {
        Progress& sequence = progress[std::size_t(j)];
        sequence.worst = 0;
        bool unbroken = true;
        for (index range = 0; range < ranges.count; ++range) {
            const RangeResult& result = results[std::size_t(range * sequences + j)];
            const index first = ranges.begin(range), last = ranges.begin(range + 1);
            sequence.worst = std::max(sequence.worst, result.worst);
            if (!unbroken) {  // passed, but beyond a step that did not
                sequence.worst = std::max(sequence.worst, result.relative_residual);
                continue;
            }
            sequence.confirmed = std::max(sequence.confirmed, first + result.passed);
            sequence.residual = std::max(sequence.residual, result.residual);
            sequence.relative_residual = std::max(sequence.relative_residual, result.relative_residual);
            unbroken = first + result.passed == last;
        }
    }
    index total = 0;
    for (const index count : resets) total += count;
    return total;
}

template <class T>
index apply_update(const Window<T>& window, const std::vector<Progress>& progress, const Execution& execution) {
    device::choose_simd_target();
    const Ranges ranges(window.after.shape(), execution);
    std::vector<index> kept(std::size_t(ranges.count), 0);
    device::run_together(int(ranges.count), [&](int range) {
        const index first = ranges.begin(range), last = ranges.begin(range + 1);
        if constexpr (std::is_same_v<T, float>)
            kept[std::size_t(range)] = HWY_DYNAMIC_DISPATCH(update_float)(window, progress.data(), first, last);
        else
            kept[std::size_t(range)] = HWY_DYNAMIC_DISPATCH(update_double)(window, progress.data(), first, last);
    });
    index total = 0;
    for (const index count : kept) total += count;
    return total;
}

template index test_residual(const Window<float>&, std::vector<Progress>&, Tolerance, const Execution&);
template index test_residual(const Window<double>&, std::vector<Progress>&, Tolerance, const Execution&);
template index apply_update(const Window<float>&, const std::vector<Progress>&, const Execution&);
template index apply_update(const Window<double>&, const std::vector<Progress>&, const Execution&);

}  // namespace deeppcr::newton
#endif
