// Recomputation: only the states before each segment of steps are kept; the backward pass evaluates the segments again.

#include <deeppcr/evaluate.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "device/cuda.hpp"
#include "newton/options.hpp"
#include "newton/stopwatch.hpp"
#include "newton/trajectory.hpp"
#include "recurrence/cell_rows.hpp"

namespace deeppcr {
namespace newton {
namespace {

index segment_count(index steps, index segment) { return (steps + segment - 1) / segment; }

template <class T>
void check_segments(const ChannelwiseRecurrence<T>& recurrence, index segment, View<const T> boundaries) {
    if (segment < 1) throw InvalidArgument("segment", "at least 1 step", std::to_string(segment));
    const auto [steps, batch, width] = recurrence.shape();
    const Shape expected{segment_count(steps, segment), batch, width};
    if (boundaries.shape() != expected || (boundaries.data() == nullptr && expected.count() > 0))
        throw InvalidArgument("boundaries", "memory of shape " + to_string(expected), to_string(boundaries.shape()));
}

/// With Backend::cuda: throws InvalidArgument where kernels cannot reach what they are to read or write.
template <class T>
void check_places(const ChannelwiseRecurrence<T>& recurrence, View<const T> boundaries, const Options& options) {
    if (options.execution.backend != Backend::cuda) return;
    if (options.workspace != nullptr && options.workspace->device() != device::current_gpu())
        throw InvalidArgument("options.workspace", "a workspace on the current GPU", "one elsewhere");
    device::require_on_gpu("boundaries", boundaries.data());
    if (const View<const T> initial = recurrence.initial_states(); !initial.empty())
        device::require_on_gpu("initial", initial.data());
}

double larger(double a, double b) { return std::isnan(a) || std::isnan(b) ? std::nan("") : std::max(a, b); }

void add(Report::Stage& sum, const Report::Stage& stage) {
    sum.seconds += stage.seconds;
    sum.bytes += stage.bytes;
}

/// Adds the next segment's report to that of the segments before it.
void append(Report& all, const Report& next, bool first) {
    if (first) {
        all = next;
        return;
    }
    all.status = std::max(all.status, next.status);
    for (std::size_t j = 0; j < all.sequences.size(); ++j) {
        Report::Sequence& sequence = all.sequences[j];
        const Report::Sequence& more = next.sequences[j];
        sequence.status = std::max(sequence.status, more.status);
        sequence.iterations += more.iterations;
        sequence.confirmed += more.confirmed;
        sequence.residual = std::max(sequence.residual, more.residual);
        sequence.relative_residual = std::max(sequence.relative_residual, more.relative_residual);
        sequence.error = std::nan("");  // of a segment that starts from exact states: not of the whole
    }
    all.iterations += next.iterations;
    all.residual = std::max(all.residual, next.residual);
    all.relative_residual = std::max(all.relative_residual, next.relative_residual);
    all.error = std::nan("");
    all.lyapunov = larger(all.lyapunov, next.lyapunov);
    add(all.linearise, next.linearise);
    add(all.reduce, next.reduce);
    add(all.update, next.update);
    add(all.sequential, next.sequential);
    add(all.estimate, next.estimate);
    all.workspace_bytes = std::max(all.workspace_bytes, next.workspace_bytes);
    all.window_shrinks += next.window_shrinks;
    all.damped_passes += next.damped_passes;
    all.non_finite_resets += next.non_finite_resets;
    all.sequential_steps += next.sequential_steps;
}

/// What stands before the first step of each row of the batch.
template <class T>
void copy_initial(const ChannelwiseRecurrence<T>& recurrence, View<T> state, const Options& options) {
    const View<const T> given = recurrence.initial_states();
    if (given.empty()) clear(state.data(), state.shape().count(), options.execution);
    const auto& parts = recurrence.parts();
    if (!given.empty() && index(parts.size()) == state.batch()) return copy_states<T>(given, state, options.execution);
    for (index p = 0; !given.empty() && p < index(parts.size()); ++p)
        if (const SequencePart& part = parts[std::size_t(p)]; part.first == 0)
            copy_states<T>(given.sequences(p, p + 1), state.sequences(part.sequence, part.sequence + 1),
                           options.execution);
}

template <class T>
Report run_segments(const ChannelwiseRecurrence<T>& recurrence, index segment, View<T> boundaries,
                    const Options& options, const std::function<void(index first, View<const T> states)>& visit) {
    const Clock::time_point begin = Clock::now();
    check_options(options);
    require_alone(options);
    cell::require_gpu_for_16_bits<T>(options.execution.backend);
    check_segments<T>(recurrence, segment, boundaries);
    const auto [steps, batch, width] = recurrence.shape();
    Report report;
    report.method = to_string(options.method);
    report.sequences.resize(std::size_t(batch));
    if (recurrence.shape().count() == 0) return report;
    check_places<T>(recurrence, boundaries, options);
    Workspace own(options.execution);
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    const Workspace::Scope scope(workspace);
    const View<T> memory = workspace.take_states<T>({std::min(segment, steps), batch, width});
    copy_initial<T>(recurrence, boundaries.steps(0, 1), options);
    const index count = segment_count(steps, segment);
    for (index s = 0; s < count; ++s) {
        const index first = s * segment, last = std::min(steps, first + segment);
        Options here = options;
        here.workspace = &workspace;
        if (here.guess == Guess::given) here.guess = Guess::initial_state;
        if (options.progress)
            here.progress = [&, all = steps](index confirmed, index, index iterations) {
                return options.progress(first + confirmed, all, report.iterations + iterations);
            };
        const View<T> states = memory.steps(0, last - first);
        append(report,
               evaluate(*recurrence.segment(first, last, View<const T>(boundaries.steps(s, s + 1)), here.execution),
                        states, here),
               s == 0);
        if (visit) visit(first, View<const T>(states));
        if (!report.ok()) break;
        if (s + 1 < count)
            copy_states<T>(states.steps(last - first - 1, last - first), boundaries.steps(s + 1, s + 2),
                           options.execution);
    }
    if (count > 1) report.method += ", " + std::to_string(count) + " segments of " + std::to_string(segment) + " steps";
    report.seconds = seconds_since(begin);
    return report;
}

template <class T>
CellGradients<T> adjoint_segments(const ChannelwiseRecurrence<T>& recurrence, index segment, View<const T> boundaries,
                                  const Report& report, View<const T> output_gradient, const Options& options) {
    const Clock::time_point begin = Clock::now();
    require_alone(options);
    check_segments<T>(recurrence, segment, boundaries);
    check_adjoint_arguments<T>(recurrence, output_gradient, report, output_gradient, options);
    const auto [steps, batch, width] = recurrence.shape();
    const std::vector<SequencePart>& parts = recurrence.parts();
    cell::require_gpu_for_16_bits<T>(options.execution.backend);
    const Device device = detail::device_of(options.execution);
    if (recurrence.shape().count() > 0) {
        check_places<T>(recurrence, boundaries, options);
        if (!device.is_host()) device::require_on_gpu("output_gradient", output_gradient.data());
    }
    CellGradients<T> result{Buffer<T>::uninitialised(recurrence.inputs().shape(), Layout::steps_first, device),
                            Buffer<Arithmetic<T>>(recurrence.parameters().shape(), Layout::steps_first, device),
                            Buffer<T>({1, index(parts.size()), width}, Layout::steps_first, device),
                            {}};
    result.report.sequences.resize(std::size_t(batch));
    if (recurrence.shape().count() == 0) return result;
    Workspace own(options.execution);
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    const Workspace::Scope scope(workspace);
    const Shape most{std::min(segment, steps), batch, width};
    const View<T> states_memory = workspace.take_states<T>(most), gradient_memory = workspace.take_states<T>(most);
    const View<T> carried = workspace.take_states<T>({1, batch, width});  // dL/dx at the segment's end, from behind
    clear(carried.data(), batch * width, options.execution);
    std::vector<double> parameters(std::size_t(result.parameters.size()), 0.0);
    Options here = options;
    here.workspace = &workspace;
    here.progress = {};
    if (here.guess == Guess::given) here.guess = Guess::initial_state;
    const index count = segment_count(steps, segment);
    for (index s = count - 1; s >= 0; --s) {
        const index first = s * segment, last = std::min(steps, first + segment);
        const auto part_recurrence = recurrence.segment(first, last, boundaries.steps(s, s + 1), here.execution);
        const View<T> states = states_memory.steps(0, last - first), gradient = gradient_memory.steps(0, last - first);
        const Report again = evaluate(*part_recurrence, states, here);
        copy_states<T>(output_gradient.steps(first, last), gradient, here.execution);
        add_states<T>(carried, gradient.steps(last - first - 1, last - first), here.execution);
        CellGradients<T> found = adjoint(*part_recurrence, View<const T>(states), again, View<const T>(gradient), here);
        copy_states<T>(found.inputs, result.inputs.view().steps(first, last), here.execution);
        const Buffer<Arithmetic<T>> sums = found.parameters.on(Device::host());
        for (std::size_t k = 0; k < parameters.size(); ++k) parameters[k] += double(sums.data()[k]);
        index piece = 0;  // the segment's sequences, in the order of `parts`
        if (index(parts.size()) == batch) {
            copy_states<T>(found.initial, s == 0 ? result.initial.view() : carried, here.execution);
        } else {
            clear(carried.data(), batch * width, options.execution);
            for (index p = 0; p < index(parts.size()); ++p) {
                const SequencePart& part = parts[std::size_t(p)];
                if (part.last <= first || part.first >= last) continue;
                const View<T> to = part.first >= first ? result.initial.view().sequences(p, p + 1)
                                                       : carried.sequences(part.sequence, part.sequence + 1);
                copy_states<T>(found.initial.view().sequences(piece, piece + 1), to, here.execution);
                ++piece;
            }
        }
        if (!device.is_host()) device::synchronise(here.execution.stream);  // before `found` goes
        append(result.report, found.report, s == count - 1);
    }
    const Buffer<Arithmetic<T>> sums(recurrence.parameters().shape());
    std::copy(parameters.begin(), parameters.end(), sums.data());
    if (device.is_host())
        std::copy_n(sums.data(), sums.size(), result.parameters.data());
    else
        detail::copy(result.parameters.data(), sums.data(), sums.size() * index(sizeof(Arithmetic<T>)));
    if (count > 1)
        result.report.method += ", " + std::to_string(count) + " segments of " + std::to_string(segment) + " steps";
    result.report.workspace_bytes = workspace.peak_bytes();
    result.report.seconds = seconds_since(begin);
    return result;
}

}  // namespace
}  // namespace newton

#define DEEPPCR_SEGMENTS(T)                                                                                      \
    template <>                                                                                                  \
    Report evaluate_boundaries(const ChannelwiseRecurrence<T>& recurrence, index segment, View<T> boundaries,    \
                               const Options& options, const std::function<void(index, View<const T>)>& visit) { \
        return newton::run_segments<T>(recurrence, segment, boundaries, options, visit);                         \
    }                                                                                                            \
    template <>                                                                                                  \
    CellGradients<T> adjoint_from_boundaries(const ChannelwiseRecurrence<T>& recurrence, index segment,          \
                                             View<const T> boundaries, const Report& report,                     \
                                             View<const T> output_gradient, const Options& options) {            \
        return newton::adjoint_segments<T>(recurrence, segment, boundaries, report, output_gradient, options);   \
    }
DEEPPCR_SEGMENTS(float)
DEEPPCR_SEGMENTS(double)
DEEPPCR_SEGMENTS(bfloat16)
DEEPPCR_SEGMENTS(float16)
#undef DEEPPCR_SEGMENTS

}  // namespace deeppcr
