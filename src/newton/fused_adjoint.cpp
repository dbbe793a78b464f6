// The backward pass of cells: adjoint, gradients of inputs and of parameters in one sweep from the last step to the
// first. In chunks side by side, every chunk first takes a zero adjoint from behind; since the adjoint is linear, what
// the next chunk then hands over is sent through afterwards and added, until it has shrunk below rounding.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <deeppcr/evaluate.hpp>

#include "device/cuda.hpp"
#include "device/threads.hpp"
#include "newton/across_ranks.hpp"
#include "newton/cost_model.hpp"
#include "newton/fused.hpp"
#include "newton/fused_gpu.hpp"
#include "newton/options.hpp"
#include "newton/stopwatch.hpp"
#include "recurrence/cell_rows.hpp"
#include "recurrence/states.hpp"

namespace deeppcr {
namespace newton {
namespace {

constexpr index first_correction = 64;   // steps before the first look; then as many again, and again
constexpr double enough_vanished = 0.5;  // of the chunks, in the first round, or the pass is made step after step

template <class T>
class FusedAdjoint {
public:
    FusedAdjoint(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, View<const T> output_gradient,
                 const CellGradientViews<T>& gradients, const Options& options, Workspace& workspace)
        : recurrence_(recurrence),
          trajectory_(trajectory),
          gradient_(output_gradient),
          options_(options),
          workspace_(workspace),
          width_(recurrence.shape().width),
          parameters_(recurrence.parameters().shape().count()),
          threads_(device::thread_count(options.execution)),
          result_(gradients) {
        report_.lyapunov = std::numeric_limits<double>::quiet_NaN();
        report_.sequences.resize(std::size_t(recurrence.shape().batch));
        for (Report::Sequence& sequence : report_.sequences) sequence.confirmed = recurrence.shape().steps;
    }

    Report run() {
        const Clock::time_point begin = Clock::now();
        const Workspace::Scope scope(workspace_);
        const index length = chunk_length();
        report_.method = "adjoint, sequential";
        const bool done = length > 0 && run_chunks(length);
        if (!done) run_chunks(0);
        report_.seconds = seconds_since(begin);
        report_.workspace_bytes = workspace_.peak_bytes();
        return std::move(report_);
    }

private:
    struct Chunk {
        index part, first, last;
    };

    /// 0: step after step.
    index chunk_length() const {
        if (options_.method == Method::sequential || options_.execution.backend == Backend::reference) return 0;
        index steps = 0;
        for (const SequencePart& part : recurrence_.parts()) steps = std::max(steps, part.last - part.first);
        if (options_.chunk > 0) return options_.chunk;
        if (steps < 256) return 0;
        const Plan plan = plan_chunks(step_costs(recurrence_, threads_), steps, index(recurrence_.parts().size()),
                                      recurrence_.channels(), 2 * first_correction, 0, threads_);
        return plan.pays() ? plan.chunk : 0;
    }

    /// Rows of one chunk's steps; all steps have their predecessors in the trajectory but the first of a part.
    cell::Row<T> row(index part, index first, index last) const {
        const SequencePart& here = recurrence_.parts()[std::size_t(part)];
        cell::Row<T> row;
        row.steps = last - first;
        row.inputs = recurrence_.inputs().at(first, here.sequence);
        row.before = first == here.first ? recurrence_.initial_state(part) : trajectory_.at(first - 1, here.sequence);
        row.gradient = gradient_.at(first, here.sequence);
        row.input_gradient = result_.inputs.at(first, here.sequence);
        return row;
    }

    void run_rows(cell::Work work, const std::vector<cell::Row<T>>& rows) {
        const cell::RowStrides strides{.inputs = recurrence_.inputs().step_stride(),
                                       .before = trajectory_.step_stride(),
                                       .gradient = gradient_.step_stride(),
                                       .input_gradient = result_.inputs.step_stride()};
        const T* const parameters = recurrence_.parameters().data();
        if (options_.execution.backend == Backend::reference)
            cell::run_rows_plainly<T>(recurrence_.kernels(), work, recurrence_.channels(), parameters, rows, strides);
        else
            cell::run_rows<T>(recurrence_.kernels(), work, recurrence_.channels(), parameters, rows, strides, threads_);
        for (const cell::Row<T>& row : rows)
            report_.linearise.bytes += row.steps * (2 * recurrence_.inputs().width() + 2 * width_) * index(sizeof(T));
    }

    /// In chunks of `length` steps (0: whole parts). False where what chunks hand over does not vanish.
    bool run_chunks(index length) {
        const Workspace::Scope scope(workspace_);
        const auto& parts = recurrence_.parts();
        std::vector<Chunk> chunks;
        for (index p = 0; p < index(parts.size()); ++p) {
            // The first step stands alone: its predecessor is the initial state.
            const index first = parts[std::size_t(p)].first + 1, steps = parts[std::size_t(p)].last - first;
            const index count = length == 0 ? 1 : std::max<index>(1, (steps + length - 1) / length);
            for (index c = 0; c < count && steps > 0; ++c)
                chunks.push_back({p, first + steps * c / count, first + steps * (c + 1) / count});
        }
        const index count = index(chunks.size()), total = index(parts.size());
        T* const none = workspace_.take<T>(width_);
        std::fill_n(none, width_, T(0));
        T* const handed = workspace_.take<T>(count * width_);    // dL/dx before a chunk, from the steps in it
        T* const arriving = workspace_.take<T>(count * width_);  // what the chunk after it has handed over
        double* const sums = workspace_.take<double>((count + total) * parameters_);
        std::fill_n(sums, (count + total) * parameters_, 0.0);
        T* const before_main = workspace_.take<T>(total * width_);  // dL/dx of each part's first step, from later ones
        std::fill_n(before_main, total * width_, T(0));

        std::vector<cell::Row<T>> rows;
        for (index c = 0; c < count; ++c) {
            const Chunk& chunk = chunks[std::size_t(c)];
            rows.push_back(row(chunk.part, chunk.first, chunk.last));
            rows.back().start = none;
            rows.back().end = handed + c * width_;
            rows.back().parameter_gradient = sums + c * parameters_;
        }
        run_rows(cell::Work::backward, rows);

        const auto leads = [&](index c) {
            return c == 0 || chunks[std::size_t(c - 1)].part != chunks[std::size_t(c)].part;
        };
        std::vector<index> pending;
        for (index c = 0; c < count; ++c) {
            if (leads(c))
                std::copy_n(handed + c * width_, width_, before_main + chunks[std::size_t(c)].part * width_);
            else
                pending.push_back(c - 1);
        }
        index longest = 0;
        for (index round = 0; !pending.empty(); ++round) {
            for (const index c : pending) std::copy_n(handed + (c + 1) * width_, width_, arriving + c * width_);
            const std::vector<index> survivors = correct(chunks, pending, arriving, sums, longest);
            if (round == 0 && double(survivors.size()) > (1 - enough_vanished) * double(pending.size()) &&
                survivors.size() > 2)
                return false;
            pending.clear();
            for (const index c : survivors) {
                // What is left of it goes on to the chunk before, or to the first step.
                std::copy_n(arriving + c * width_, width_, handed + c * width_);
                if (!leads(c)) {
                    pending.push_back(c - 1);
                } else {
                    T* const target = before_main + chunks[std::size_t(c)].part * width_;
                    for (index k = 0; k < width_; ++k) target[k] += arriving[c * width_ + k];
                }
            }
        }
        rows.clear();
        for (index p = 0; p < total; ++p) {
            const SequencePart& part = parts[std::size_t(p)];
            if (part.last == part.first) continue;
            rows.push_back(row(p, part.first, part.first + 1));
            rows.back().start = before_main + p * width_;
            rows.back().end = result_.initial.at(0, p);
            rows.back().parameter_gradient = sums + (count + p) * parameters_;
        }
        run_rows(cell::Work::backward, rows);
        for (index q = 0; q < parameters_; ++q) {
            double sum = 0;
            for (index c = 0; c < count + total; ++c) sum += sums[c * parameters_ + q];
            result_.parameters.data()[q] = T(sum);
        }
        if (length > 0)
            report_.method = "adjoint, " + std::to_string(count) + " chunks of " + std::to_string(length) + " steps, " +
                             std::to_string(longest) + " steps corrected";
        report_.window = length;
        return true;
    }

    /// Sends what arrives behind each chunk through it and adds its gradients, until it is below rounding. Returns the
    /// chunks through whose start something is left, in `arriving`.
    std::vector<index> correct(const std::vector<Chunk>& chunks, std::vector<index> pending, T* arriving, double* sums,
                               index& longest) {
        std::vector<double> size(chunks.size());
        for (const index c : pending) size[std::size_t(c)] = largest(arriving + c * width_);
        std::vector<index> survivors;
        for (index done = 0, length = first_correction; !pending.empty();
             done += length, length = std::min<index>(2 * length, 256)) {
            std::vector<cell::Row<T>> rows;
            for (const index c : pending) {
                const Chunk& chunk = chunks[std::size_t(c)];
                const index last = chunk.last - done, first = std::max(chunk.first, last - length);
                rows.push_back(row(chunk.part, first, last));
                rows.back().start = rows.back().end = arriving + c * width_;
                rows.back().parameter_gradient = sums + c * parameters_;
            }
            run_rows(cell::Work::correct, rows);
            longest = std::max(longest, done + length);
            std::vector<index> still;
            for (const index c : pending) {
                const double left = largest(arriving + c * width_);
                if (left <= double(std::numeric_limits<T>::epsilon()) / 16 * size[std::size_t(c)]) continue;
                const Chunk& chunk = chunks[std::size_t(c)];
                (chunk.last - done - length <= chunk.first ? survivors : still).push_back(c);
            }
            pending = std::move(still);
        }
        std::sort(survivors.begin(), survivors.end());
        return survivors;
    }

    /// NaN counts as infinite.
    double largest(const T* values) const {
        double result = 0;
        for (index k = 0; k < width_; ++k)
            result = scalar_functions::larger_or_nan(result, std::abs(double(values[k])));
        return std::isnan(result) ? std::numeric_limits<double>::infinity() : result;
    }

    const ChannelwiseRecurrence<T>& recurrence_;
    View<const T> trajectory_, gradient_;
    const Options& options_;
    Workspace& workspace_;
    index width_, parameters_;
    int threads_;
    CellGradientViews<T> result_;
    Report report_;
};

template <class T>
void require_shape(const std::string& name, const View<T>& view, const Shape& shape, bool contiguous) {
    if (view.shape() != shape || (view.data() == nullptr && shape.count() > 0) || (contiguous && !view.contiguous()))
        throw InvalidArgument(name,
                              (contiguous ? "contiguous memory of shape " : "memory of shape ") + to_string(shape),
                              to_string(view.shape()));
}

/// All gradients are zeros.
template <class T>
Report no_steps(const ChannelwiseRecurrence<T>& recurrence, const CellGradientViews<T>& gradients,
                const Options& options) {
    clear_gradients(gradients, options.execution);
    if (options.execution.backend == Backend::cuda) device::synchronise(options.execution.stream);
    Report report;
    report.method = "adjoint, sequential";
    report.lyapunov = std::numeric_limits<double>::quiet_NaN();
    report.sequences.resize(std::size_t(recurrence.shape().batch));
    return report;
}

template <class T>
Report cell_gradients(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, const Report& report,
                      View<const T> output_gradient, const CellGradientViews<T>& gradients, const Options& options);

/// On a GPU the parts are repeated with what the ranks after them hand back.
template <class T>
Report gradients_across_gpus(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, const Report& report,
                             View<const T> output_gradient, const CellGradientViews<T>& gradients,
                             const Options& options) {
    const index steps = recurrence.shape().steps, batch = recurrence.shape().batch, width = recurrence.shape().width;
    CUstream_st* const stream = options.execution.stream;
    const index row_bytes = width * index(sizeof(T));
    Options own = options;
    own.group = nullptr;
    Buffer<T> gradient, before_there, handed_there;
    const std::exception_ptr problem = caught([&] {
        const Device here = device::current_gpu();
        device::require_on_gpu("trajectory", trajectory.data());
        device::require_on_gpu("output_gradient", output_gradient.data());
        gradient = Buffer<T>::uninitialised(recurrence.shape(), Layout::steps_first, here);
        before_there = Buffer<T>::uninitialised({1, batch, width}, Layout::steps_first, here);
        handed_there = Buffer<T>::uninitialised({1, batch, width}, Layout::steps_first, here);
    });
    const BackwardPart<T> backward = [&](View<const T> before, View<const T> handed, View<T> first) {
        device::put<T>(before, before_there.view(), options.execution);
        device::put<T>(handed, handed_there.view(), options.execution);
        copy_states<T>(output_gradient, gradient.view(), options.execution);
        add_states<T>(handed_there, gradient.view().steps(steps - 1, steps), options.execution);
        Report result = cell_gradients<T>(*recurrence.segment(0, steps, before_there, options.execution), trajectory,
                                          report, gradient, gradients, own);
        for (std::size_t p = 0; p < recurrence.parts().size(); ++p)
            if (const SequencePart& part = recurrence.parts()[p]; part.first == 0)
                device::copy_from_gpu(first.at(0, part.sequence), gradients.initial.at(0, index(p)), row_bytes, stream);
        device::synchronise(stream);
        return result;
    };
    Report result = repeat_across_ranks<T>(recurrence, trajectory, backward, options, problem);
    result.method += ", " + std::to_string(result.iterations) + " passes";
    const index count = gradients.parameters.shape().count();
    std::vector<Arithmetic<T>> parameters(static_cast<std::size_t>(count));
    device::copy_from_gpu(parameters.data(), gradients.parameters.data(), count * index(sizeof(T)), stream);
    device::synchronise(stream);
    options.group->sum(std::span(parameters));
    device::copy_to_gpu(gradients.parameters.data(), parameters.data(), count * index(sizeof(T)), stream);
    device::synchronise(stream);
    return result;
}

/// Once what the other ranks hand to this one's part is known, the part is a recurrence like any other.
template <class T>
Report gradients_across_ranks(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,
                              const Report& report, View<const T> output_gradient,
                              const CellGradientViews<T>& gradients, const Options& options) {
    if (options.execution.backend == Backend::cuda) {
        Report result = gradients_across_gpus<T>(recurrence, trajectory, report, output_gradient, gradients, options);
        result.method += ", on " + std::to_string(options.group->size()) + " ranks";
        return result;
    }
    const index steps = recurrence.shape().steps, batch = recurrence.shape().batch, width = recurrence.shape().width;
    Buffer<T> before, handed, gradient;
    std::exception_ptr problem = caught([&] {
        before = Buffer<T>({1, batch, width});
        handed = Buffer<T>({1, batch, width});
        gradient = Buffer<T>(recurrence.shape());
    });
    const Report sweep = sweep_across_ranks<T>(
        recurrence, {.trajectory = trajectory, .output_gradient = output_gradient, .before = before, .handed = handed},
        options, problem);
    Report result;
    problem = caught([&] {
        copy_states<T>(output_gradient, gradient.view(), options.execution);
        add_states<T>(handed, gradient.view().steps(steps - 1, steps), options.execution);
        Options own = options;
        own.group = nullptr;
        result = cell_gradients<T>(*recurrence.segment(0, steps, before), trajectory, report, gradient, gradients, own);
    });
    options.group->agree(problem);
    options.group->sum(std::span(gradients.parameters.data(), std::size_t(gradients.parameters.shape().count())));
    result.method += ", on " + std::to_string(options.group->size()) + " ranks";
    result.linearise.seconds += sweep.linearise.seconds;
    result.linearise.bytes += sweep.linearise.bytes;
    result.reduce = sweep.reduce;
    result.seconds += sweep.seconds;
    return result;
}

template <class T>
Report cell_gradients(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, const Report& report,
                      View<const T> output_gradient, const CellGradientViews<T>& gradients, const Options& options) {
    check_adjoint_arguments<T>(recurrence, trajectory, report, output_gradient, options);
    cell::require_gpu_for_16_bits<T>(options.execution.backend);
    require_shape("gradients.inputs", gradients.inputs, recurrence.inputs().shape(), false);
    require_shape("gradients.parameters", gradients.parameters, recurrence.parameters().shape(), true);
    require_shape("gradients.initial", gradients.initial,
                  {1, index(recurrence.parts().size()), recurrence.shape().width}, false);
    if constexpr (is_stored_in_16_bits<T>)
        require_alone(options);
    else if (is_shared(options))
        return gradients_across_ranks<T>(recurrence, trajectory, report, output_gradient, gradients, options);
    if (recurrence.shape().count() == 0) return no_steps(recurrence, gradients, options);
    if (options.execution.backend == Backend::cuda)
        return adjoint_on_gpu<T>(recurrence, trajectory, output_gradient, gradients, options);
    if constexpr (is_stored_in_16_bits<T>) {
        return {};
    } else {
        Workspace own;
        Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
        return FusedAdjoint<T>(recurrence, trajectory, output_gradient, gradients, options, workspace).run();
    }
}

template <class T>
CellGradients<T> new_cell_gradients(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,
                                    const Report& report, View<const T> output_gradient, const Options& options) {
    check_adjoint_arguments<T>(recurrence, trajectory, report, output_gradient, options);
    const Device device = options.execution.backend == Backend::cuda ? device::current_gpu() : Device::host();
    CellGradients<T> result{
        Buffer<T>::uninitialised(recurrence.inputs().shape(), Layout::steps_first, device),
        Buffer<Arithmetic<T>>::uninitialised(recurrence.parameters().shape(), Layout::steps_first, device),
        Buffer<T>({1, index(recurrence.parts().size()), recurrence.shape().width}, Layout::steps_first, device),
        {}};
    result.report = cell_gradients<T>(recurrence, trajectory, report, output_gradient,
                                      {result.inputs, result.parameters, result.initial}, options);
    return result;
}

}  // namespace

template <class T>
void clear_gradients(const CellGradientViews<T>& gradients, const Execution& execution) {
    if (execution.backend == Backend::cuda) {
        if (!gradients.parameters.empty()) device::require_on_gpu("gradients.parameters", gradients.parameters.data());
        if (!gradients.initial.empty()) device::require_on_gpu("gradients.initial", gradients.initial.data());
    }
    const auto [steps, batch, width] = gradients.initial.shape();
    clear(gradients.parameters.data(), gradients.parameters.shape().count(), execution);
    for (index part = 0; part < batch; ++part) clear(gradients.initial.at(0, part), width, execution);
}

template void clear_gradients(const CellGradientViews<float>&, const Execution&);
template void clear_gradients(const CellGradientViews<double>&, const Execution&);
template void clear_gradients(const CellGradientViews<bfloat16>&, const Execution&);
template void clear_gradients(const CellGradientViews<float16>&, const Execution&);

}  // namespace newton

#define DEEPPCR_ADJOINT(T)                                                                                         \
    template <>                                                                                                    \
    CellGradients<T> adjoint(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,                 \
                             const Report& report, View<const T> output_gradient, const Options& options) {        \
        return newton::new_cell_gradients<T>(recurrence, trajectory, report, output_gradient, options);            \
    }                                                                                                              \
    template <>                                                                                                    \
    Report adjoint(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, const Report& report,     \
                   View<const T> output_gradient, const CellGradientViews<T>& gradients, const Options& options) { \
        return newton::cell_gradients<T>(recurrence, trajectory, report, output_gradient, gradients, options);     \
    }
DEEPPCR_ADJOINT(float)
DEEPPCR_ADJOINT(double)
DEEPPCR_ADJOINT(bfloat16)
DEEPPCR_ADJOINT(float16)
#undef DEEPPCR_ADJOINT

}  // namespace deeppcr
