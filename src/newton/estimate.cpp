#include "newton/estimate.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "device/threads.hpp"
#include "newton/lyapunov.hpp"
#include "newton/options.hpp"
#include "newton/stopwatch.hpp"
#include "newton/trajectory.hpp"

namespace deeppcr::newton {

template <class T>
void error_sources(View<const T> states, View<const T> after, index first, index block,
                   std::span<const index> confirmed, View<T> sources, int threads) {
    const index width = states.width();
    constexpr T unit = T(rounding_of_a_step) * std::numeric_limits<T>::epsilon();
    device::parallel_ranges(threads, sources.steps(), 16, [&](index begin, index end) {
        for (index i = begin; i < end; ++i)
            for (index j = 0; j < sources.batch(); ++j) {
                T* const source = sources.at(i, j);
                const T *x = states.at(i, j), *f = after.at(i, j);
                if (i >= confirmed[std::size_t(j)]) {
                    std::fill_n(source, width, T(0));
                    continue;
                }
                for (index from = 0; from < width; from += block) {
                    T largest = 0;
                    for (index k = from; k < from + block; ++k) largest = std::max(largest, std::abs(f[k]));
                    for (index k = from; k < from + block; ++k)
                        source[k] = x[k] - f[k] + (rounding_sign(first + i, j, k) ? unit : -unit) * largest;
                }
            }
    });
}

template <class T>
void raise_error(double& largest, const T* errors, index count) {
    for (index k = 0; k < count; ++k) {
        const double error = std::abs(double(errors[k]));
        largest = std::max(largest, std::isfinite(error) ? error : std::numeric_limits<double>::infinity());
    }
}

template <class T>
void estimate_along(const Recurrence<T>& recurrence, View<const T> trajectory, const Options& options, Report& report) {
    const auto [steps, batch, width] = recurrence.shape();
    const index block = recurrence.block();
    if (trajectory.empty()) return;
    const Stopwatch watch(report.estimate.seconds);
    Options whole = options;
    whole.surrogate = Surrogate::full;
    whole.anderson = 0;
    whole.window = options.window > 0 ? options.window : std::min<index>(steps, 4096);
    Workspace own;
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    const index length = window_length(recurrence, whole, block);
    const Workspace::Scope scope(workspace);
    std::vector<index> sequences(static_cast<std::size_t>(batch)), confirmed(sequences.size());
    std::iota(sequences.begin(), sequences.end(), index(0));
    const Shape most{length, batch, width};
    T *const before_memory = workspace.take<T>(most.count()), *const after_memory = workspace.take<T>(most.count()),
             *const states_memory = workspace.take<T>(most.count()),
             *const error_memory = workspace.take<T>(most.count()),
             *const jacobian_memory = workspace.take<T>(most.count() * block);
    const View<T> carried = workspace.take_states<T>({1, batch, width});
    std::fill_n(carried.data(), batch * width, T(0));
    LyapunovEstimate<T> growth(width, block, true);
    for (Report::Sequence& sequence : report.sequences) sequence.error = 0;
    for (index first = 0; first < steps; first += length) {
        const index rows = std::min(length, steps - first);
        const Section section{first, first + rows, sequences, options.execution};
        const Shape shape{rows, batch, width};
        const View<T> before(before_memory, shape), after(after_memory, shape), states(states_memory, shape),
            errors(error_memory, shape);
        const Jacobian<T> jacobian(jacobian_memory, shape, block);
        gather_before(recurrence, trajectory, section, before);
        recurrence.linearise(section, View<const T>(before), after, jacobian);
        copy_states<T>(trajectory.steps(first, first + rows), states, options.execution);
        for (index j = 0; j < batch; ++j) {
            index& count = confirmed[std::size_t(j)];
            count = std::clamp<index>(report.sequences[std::size_t(j)].confirmed - first, 0, rows);
            growth.follow(j, jacobian, j, count);
        }
        error_sources<T>(states, after, first, block, confirmed, errors, device::thread_count(options.execution));
        solve(BidiagonalSystem<T>{jacobian, errors, carried}, errors,
              {options.reduction, options.execution, options.chunk, &workspace, options.tensor_cores});
        for (index j = 0; j < batch; ++j)
            for (index i = 0; i < confirmed[std::size_t(j)]; ++i)
                raise_error(report.sequences[std::size_t(j)].error, errors.at(i, j), width);
        std::copy_n(errors.at(rows - 1, 0), batch * width, carried.data());
        report.estimate.bytes += shape.count() * (2 * block + 6) * index(sizeof(T));
    }
    report.lyapunov = growth.exponent();
    report.error = 0;
    for (const Report::Sequence& sequence : report.sequences) report.error = std::max(report.error, sequence.error);
    report.workspace_bytes = std::max(report.workspace_bytes, workspace.peak_bytes());
}

template void error_sources(View<const float>, View<const float>, index, index, std::span<const index>, View<float>,
                            int);
template void error_sources(View<const double>, View<const double>, index, index, std::span<const index>, View<double>,
                            int);
template void raise_error(double&, const float*, index);
template void raise_error(double&, const double*, index);
template void estimate_along(const Recurrence<float>&, View<const float>, const Options&, Report&);
template void estimate_along(const Recurrence<double>&, View<const double>, const Options&, Report&);

}  // namespace deeppcr::newton
