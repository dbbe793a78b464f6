// Cells on a GPU, chunks side by side, as fused.cpp has them on a processor:
//
//   shoot    (shooting only) every chunk runs from its start and carries the product of its Jacobians; the starts'
//            corrections d_c = P_{c-1} d_{c-1} + (end of c-1 - start of c) are one bidiagonal solve
//   sweep    every chunk runs from its start and writes its trajectory
//   repair   every chunk runs again from the end of the one before it, until it meets its old states; some rounds, of
//            which those that have nothing left to do end at once
//   finish   what has not met by then, step after step
//
// Each channel is tested by itself, against its own magnitude: at least as strict as the residual test of evaluate.hpp.
// All is enqueued; the host waits once, at the end, for the status.
#include "newton/fused_gpu.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include <deeppcr/launch.cuh>

#include "device/cuda.hpp"
#include "newton/experience.hpp"
#include "newton/options.hpp"
#include "newton/stopwatch.hpp"

namespace deeppcr::newton {
namespace {

using cell::DeviceChunks;
using cell::DeviceKernels;

constexpr int rounds = 3;                           // of repairs before what is left is finished step after step
constexpr index threads_per_multiprocessor = 1024;  // enough to hide what each waits for
constexpr index shortest_chunk = 64;
constexpr double most_shots = 6;

__device__ index this_thread() { return index(blockIdx.x) * blockDim.x + threadIdx.x; }

/// mismatch[c] = ends[c] - starts[c + 1]
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    find_mismatches(const T* ends, const T* starts, index states, index count, T* mismatches) {
    const index i = this_thread();
    if (i < count) mismatches[i] = ends[i] - starts[i + states];
}

/// starts[c + 1] += corrections[c], or = ends[c] where the correction has overflowed.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    correct_starts(const T* ends, const T* corrections, index states, index count, T* starts) {
    const index i = this_thread();
    if (i >= count) return;
    const T corrected = starts[i + states] + corrections[i];
    starts[i + states] = corrected - corrected == T(0) ? corrected : ends[i];
}

/// The states before chunks 1.. of a trajectory, the initial state where one is not finite.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    gather_starts(const DeviceChunks<T> all, int states, bool given, T* starts) {
    const index i = this_thread(), width = all.channels * states;
    if (i >= all.count * all.part_count * width) return;
    const index chunk = i / (all.part_count * width), part = i / width % all.part_count, k = i % width;
    const SequencePart whole = all.parts != nullptr ? all.parts[part] : SequencePart{part, 0, all.steps};
    const T initial = all.initial != nullptr ? all.initial[part * all.initial_part + k] : T(0);
    const index before = whole.first + chunk * all.length - 1;
    T start = initial;
    if (given && chunk > 0 && before < whole.last)
        start = all.trajectory[before * all.trajectory_step + whole.sequence * all.trajectory_batch + k];
    starts[i] = start - start == T(0) ? start : initial;
}

/// Sums over chunks and parts, in their order.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    sum_parameter_gradients(const double* parts, index terms, index parameters, T* sums) {
    const index q = this_thread();
    if (q >= parameters) return;
    double sum = 0;
    for (index i = 0; i < terms; ++i) sum += parts[i * parameters + q];
    sums[q] = T(sum);
}

/// What evaluation and gradients share: the arrays on the GPU, and how the steps are cut.
template <class T>
class OnGpu {
public:
    OnGpu(const ChannelwiseRecurrence<T>& recurrence, const Options& options, Workspace& workspace)
        : recurrence_(recurrence),
          options_(options),
          workspace_(workspace),
          kernels_(find(recurrence)),
          stream_(options.execution.stream),
          states_(recurrence.kernels().states),
          tolerance_(tolerance_of<T>(options)) {
        const auto& parts = recurrence.parts();
        all_.inputs = recurrence.inputs().data();
        all_.input_step = recurrence.inputs().step_stride();
        all_.input_batch = recurrence.inputs().batch_stride();
        all_.parameters = recurrence.parameters().data();
        if (const View<const T> initial = recurrence.initial_states(); !initial.empty()) {
            all_.initial = initial.data();
            all_.initial_part = initial.batch_stride();
            device::require_on_gpu("initial", all_.initial);
        }
        device::require_on_gpu("inputs", all_.inputs);
        device::require_on_gpu("parameters", all_.parameters);
        all_.steps = recurrence.shape().steps;
        all_.batch = recurrence.shape().batch;
        all_.channels = recurrence.channels();
        all_.part_count = index(parts.size());
        for (const SequencePart& part : parts) longest_ = std::max(longest_, part.last - part.first);
        if (all_.part_count != all_.batch) {
            auto* const there = workspace_.template take<SequencePart>(all_.part_count);
            device::copy_to_gpu(there, parts.data(), all_.part_count * index(sizeof(SequencePart)), stream_);
            all_.parts = there;
        }
        all_.absolute_tolerance = tolerance_.absolute;
        all_.relative_tolerance = tolerance_.relative;
        all_.sequences = workspace_.template take<cell::SequenceStatus>(all_.batch);
        all_.run = workspace_.template take<cell::RunStatus>(1);
        device::fill_bytes(all_.sequences, 0, all_.batch * index(sizeof(cell::SequenceStatus)), stream_);
        device::fill_bytes(all_.run, 0, index(sizeof(cell::RunStatus)), stream_);
    }

protected:
    static const DeviceKernels<T>& find(const ChannelwiseRecurrence<T>& recurrence) {
        const DeviceKernels<T>* const found = cell::find_device_kernels<T>(*recurrence.kernels().cell);
        if (found == nullptr)
            throw InvalidArgument("recurrence", "a Cell with kernels for GPUs (see cell.cuh, DEEPPCR_CELL_ON_GPU)",
                                  recurrence.kernels().name);
        return *found;
    }

    index rows() const { return all_.part_count * all_.channels; }
    index boundary_size() const { return all_.count * rows() * states_; }

    void cut(index length) {
        all_.length = length;
        all_.count = std::max<index>(1, (longest_ + length - 1) / length);
    }

    /// Of chunks that together occupy the GPU, but are not short against what is repeated.
    index chunk_length(index repeated) const {
        if (options_.chunk > 0) return std::min(options_.chunk, longest_);
        const index wanted = std::max<index>(1, device::multiprocessors() * threads_per_multiprocessor / rows());
        return std::min(longest_, std::max({shortest_chunk, 2 * repeated, (longest_ + wanted - 1) / wanted}));
    }

    bool rows_occupy_the_gpu() const { return 2 * rows() >= device::multiprocessors() * threads_per_multiprocessor; }

    /// Rounds of repairs, or of corrections: `kernel` with the ends before and after each round.
    void run_rounds(cell::DeviceKernel<T> kernel, T* ends) {
        T* const other_ends = workspace_.template take<T>(boundary_size());
        unsigned char* changed[2] = {workspace_.template take<unsigned char>(all_.count * rows()),
                                     workspace_.template take<unsigned char>(all_.count * rows())};
        T* both_ends[2] = {ends, other_ends};
        all_.old_changed = nullptr;
        for (int round = 0; round < rounds; ++round) {
            all_.old_ends = both_ends[round % 2];
            all_.ends = both_ends[(round + 1) % 2];
            all_.changed = changed[round % 2];
            device::fill_bytes(&all_.run->pending, 0, index(sizeof all_.run->pending), stream_);
            kernel(all_, stream_);
            all_.old_changed = all_.changed;
        }
        all_.old_ends = all_.ends;
        all_.ends = nullptr;
    }

    const ChannelwiseRecurrence<T>& recurrence_;
    const Options& options_;
    Workspace& workspace_;
    const DeviceKernels<T>& kernels_;
    CUstream_st* stream_;
    index states_, longest_ = 0;
    Tolerance tolerance_;
    DeviceChunks<T> all_;
};

template <class T>
class GpuEvaluator : OnGpu<T> {
    using Base = OnGpu<T>;
    using Base::all_, Base::kernels_, Base::options_, Base::recurrence_, Base::workspace_, Base::stream_, Base::states_,
        Base::longest_, Base::tolerance_, Base::rows, Base::boundary_size, Base::cut, Base::chunk_length,
        Base::rows_occupy_the_gpu, Base::run_rounds;

public:
    GpuEvaluator(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options,
                 Workspace& workspace)
        : Base(recurrence, options, workspace), trajectory_(trajectory) {
        device::require_on_gpu("trajectory", trajectory.data());
        all_.trajectory = trajectory.data();
        all_.trajectory_step = trajectory.step_stride();
        all_.trajectory_batch = trajectory.batch_stride();
    }

    Report run() {
        const Clock::time_point begin = Clock::now();
        const Experience seen = experience(key());
        const Method method = choose(seen);
        report_.method = "sequential";
        if (method == Method::sequential) {
            cut(longest_);
            kernels_.advance(all_, stream_);
        } else {
            cut(chunk_length(method == Method::overlap ? seen.repeated : shortest_chunk / 2));
            run_chunks(method, seen);
        }
        std::vector<cell::SequenceStatus> sequences(std::size_t(all_.batch));
        cell::RunStatus status;
        device::copy_from_gpu(sequences.data(), all_.sequences, all_.batch * index(sizeof(cell::SequenceStatus)),
                              stream_);
        device::copy_from_gpu(&status, all_.run, index(sizeof status), stream_);
        device::synchronise(stream_);
        describe_result(method, sequences, status);
        report_.seconds = seconds_since(begin);
        report_.workspace_bytes = workspace_.peak_bytes();
        return std::move(report_);
    }

private:
    ExperienceKey key() const {
        return {&kernels_, device::current_gpu().ordinal(), std::ilogb(double(longest_)), std::ilogb(double(rows())),
                std::ilogb(tolerance_.relative) / 4};
    }

    Method choose(const Experience& seen) const {
        if (options_.method != Method::automatic) return options_.method;
        if (longest_ < 2 * shortest_chunk || rows_occupy_the_gpu()) return Method::sequential;
        return seen.overlap_works ? Method::overlap : seen.shooting_works ? Method::shooting : Method::sequential;
    }

    void run_chunks(Method method, const Experience& seen) {
        const index size = boundary_size();
        T* const ends = workspace_.template take<T>(size);
        if (method == Method::shooting || options_.guess == Guess::given) {
            T* const starts = workspace_.template take<T>(size);
            all_.starts = starts;
            cuda::launch(cuda::one_each(size, stream_), gather_starts<T>, all_, int(states_),
                         options_.guess == Guess::given, starts);
            if (method == Method::shooting) shoot(starts, ends, seen);
        }
        all_.ends = ends;
        kernels_.advance(all_, stream_);
        ++report_.iterations;
        run_rounds(kernels_.repair, ends);
        report_.iterations += rounds;
        if (options_.on_failure == OnFailure::finish) kernels_.finish(all_, stream_);
    }

    /// Newton's method for the chunks' starts: as many sweeps as it took last time; the repairs test them.
    void shoot(T* starts, T* ends, const Experience& seen) {
        const index products = all_.count * rows() * states_ * states_;
        shots_ = int(std::min(seen.shots, most_shots));
        if (options_.max_iterations > 0) shots_ = int(std::min<index>(shots_, options_.max_iterations));
        all_.products = workspace_.template take<T>(products);
        all_.ends = ends;
        const index width = all_.channels * states_, states = all_.part_count * width;
        const index between = (all_.count - 1) * states;
        T* const mismatches = workspace_.template take<T>(between);
        for (int shot = 0; shot < shots_; ++shot) {
            kernels_.multiply(all_, stream_);
            ++report_.iterations;
            if (between == 0) continue;
            cuda::launch(cuda::one_each(between, stream_), find_mismatches<T>, ends, starts, states, between,
                         mismatches);
            const Shape shape{all_.count - 1, all_.part_count, width};
            const View<T> corrections(mismatches, shape);
            solve(BidiagonalSystem<T>{Jacobian<const T>(all_.products, shape, states_), corrections}, corrections,
                  {.execution = options_.execution, .workspace = &workspace_});
            cuda::launch(cuda::one_each(between, stream_), correct_starts<T>, ends, mismatches, states, between,
                         starts);
        }
    }

    void describe_result(Method method, const std::vector<cell::SequenceStatus>& sequences,
                         const cell::RunStatus& status) {
        report_.lyapunov = report_.error = std::numeric_limits<double>::quiet_NaN();
        report_.sequences.resize(sequences.size());
        const index steps = all_.steps;
        for (std::size_t j = 0; j < sequences.size(); ++j) {
            Report::Sequence& result = report_.sequences[j];
            result.confirmed = steps;
            result.error = std::numeric_limits<double>::quiet_NaN();
            result.residual = std::bit_cast<double>(sequences[j].residual);
            result.relative_residual = std::bit_cast<double>(sequences[j].relative_residual);
            if (sequences[j].sequential_steps > 0) result.status = Status::finished_sequentially;
            report_.sequential_steps += index(sequences[j].sequential_steps) / all_.channels;
        }
        const bool met = status.pending == 0;
        if (!met && options_.on_failure != OnFailure::finish) find_unconfirmed();
        for (std::size_t j = 0; j < sequences.size(); ++j) {
            Report::Sequence& result = report_.sequences[j];
            if (const index left = index(sequences[j].first_non_finite); left > 0 && steps - left < result.confirmed) {
                result.confirmed = steps - left;
                result.status = Status::non_finite;
            }
            report_.status = std::max(report_.status, result.status);
            report_.residual = std::max(report_.residual, result.residual);
            report_.relative_residual = std::max(report_.relative_residual, result.relative_residual);
        }
        if (method == Method::sequential) {
            report_.sequential_steps = steps * all_.batch;
            return;
        }
        report_.method = to_string(method) + ", " + std::to_string(all_.count) + " chunks of " +
                         std::to_string(all_.length) + " steps, ";
        if (method == Method::shooting) report_.method += std::to_string(shots_) + " Newton sweeps, ";
        report_.method += std::to_string(status.repeated) + " steps repeated";
        report_.window = all_.length;
        learn(key(), [&](Experience& seen) {
            if (method == Method::overlap) {
                seen.overlap_works = met;
                if (met) seen.repeated = std::max<index>(32, index(status.repeated));
            } else {
                // A sweep more where the repairs had much to do, up to a point.
                const bool far = index(status.repeated) > all_.length / 4;
                seen.shooting_works = met || seen.shots < most_shots;
                if (far) seen.shots = std::min(most_shots, seen.shots + 1);
            }
        });
    }

    /// Where chunks still do not fit, nothing after them is confirmed.
    void find_unconfirmed() {
        std::vector<unsigned char> changed(std::size_t(all_.count * rows()));
        device::copy_from_gpu(changed.data(), all_.old_changed, index(changed.size()), stream_);
        device::synchronise(stream_);
        for (index c = all_.count - 2; c >= 0; --c)
            for (index p = 0; p < all_.part_count; ++p) {
                const auto first = changed.begin() + std::ptrdiff_t(c * rows() + p * all_.channels);
                if (std::find(first, first + std::ptrdiff_t(all_.channels), 1) == first + std::ptrdiff_t(all_.channels))
                    continue;
                const SequencePart& part = recurrence_.parts()[std::size_t(p)];
                Report::Sequence& result = report_.sequences[std::size_t(part.sequence)];
                result.confirmed = std::min(result.confirmed, part.first + (c + 1) * all_.length);
                result.status = Status::max_iterations;
            }
    }

    View<T> trajectory_;
    Report report_;
    int shots_ = 0;
};

template <class T>
class GpuAdjoint : OnGpu<T> {
    using Base = OnGpu<T>;
    using Base::all_, Base::kernels_, Base::options_, Base::recurrence_, Base::workspace_, Base::stream_, Base::states_,
        Base::longest_, Base::rows, Base::boundary_size, Base::cut, Base::chunk_length, Base::rows_occupy_the_gpu,
        Base::run_rounds;

public:
    GpuAdjoint(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, View<const T> output_gradient,
               const Options& options, Workspace& workspace)
        : Base(recurrence, options, workspace),
          result_{Buffer<T>::uninitialised(recurrence.inputs().shape(), Layout::steps_first, device::current_gpu()),
                  Buffer<T>::uninitialised(recurrence.parameters().shape(), Layout::steps_first, device::current_gpu()),
                  Buffer<T>({1, index(recurrence.parts().size()), recurrence.shape().width}, Layout::steps_first,
                            device::current_gpu()),
                  {}} {
        device::require_on_gpu("trajectory", trajectory.data());
        device::require_on_gpu("output_gradient", output_gradient.data());
        all_.trajectory = const_cast<T*>(trajectory.data());  // only read
        all_.trajectory_step = trajectory.step_stride();
        all_.trajectory_batch = trajectory.batch_stride();
        all_.output_gradient = output_gradient.data();
        all_.gradient_step = output_gradient.step_stride();
        all_.gradient_batch = output_gradient.batch_stride();
        all_.input_gradient = result_.inputs.data();
        all_.initial_gradient = result_.initial.data();
    }

    CellGradients<T> run() {
        const Clock::time_point begin = Clock::now();
        const bool whole = options_.method == Method::sequential || longest_ < 2 * shortest_chunk ||
                           (options_.chunk == 0 && rows_occupy_the_gpu());
        cut(whole ? longest_ : chunk_length(shortest_chunk));
        const index parameters = recurrence_.parameters().shape().count(), terms = all_.count * all_.part_count;
        T* const ends = workspace_.template take<T>(boundary_size());
        all_.parameter_gradient = workspace_.template take<double>(terms * parameters);
        device::fill_bytes(all_.parameter_gradient, 0, terms * parameters * index(sizeof(double)), stream_);
        all_.ends = ends;
        kernels_.backward(all_, stream_);
        Report& report = result_.report;
        report.method = "adjoint, sequential";
        if (all_.count > 1) {
            run_rounds(kernels_.correct, ends);
            kernels_.finish_backward(all_, stream_);
            report.method =
                "adjoint, " + std::to_string(all_.count) + " chunks of " + std::to_string(all_.length) + " steps";
        }
        cuda::launch(cuda::one_each(parameters, stream_), sum_parameter_gradients<T>, all_.parameter_gradient, terms,
                     parameters, result_.parameters.data());
        device::synchronise(stream_);
        report.window = all_.length;
        report.lyapunov = std::numeric_limits<double>::quiet_NaN();
        report.sequences.resize(std::size_t(all_.batch));
        for (Report::Sequence& sequence : report.sequences) sequence.confirmed = all_.steps;
        report.seconds = seconds_since(begin);
        report.workspace_bytes = workspace_.peak_bytes();
        return std::move(result_);
    }

private:
    CellGradients<T> result_;
};

/// Calls body with the caller's workspace, or one that lives as long as the call.
template <class Body>
auto with_workspace(const Options& options, const Body& body) {
    const Device here = device::current_gpu();
    if (options.workspace == nullptr) {
        Workspace own(here);
        return body(own);
    }
    if (options.workspace->device() != here)
        throw InvalidArgument("options.workspace", "a workspace on the current GPU", "one elsewhere");
    const Workspace::Scope scope(*options.workspace);
    return body(*options.workspace);
}

}  // namespace

template <class T>
Report evaluate_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    return with_workspace(options, [&](Workspace& workspace) {
        return GpuEvaluator<T>(recurrence, trajectory, options, workspace).run();
    });
}

template <class T>
CellGradients<T> adjoint_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,
                                View<const T> output_gradient, const Options& options) {
    return with_workspace(options, [&](Workspace& workspace) {
        return GpuAdjoint<T>(recurrence, trajectory, output_gradient, options, workspace).run();
    });
}

#define DEEPPCR_INSTANTIATE(T)                                                                              \
    template Report evaluate_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, const Options&);              \
    template CellGradients<T> adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, View<const T>, \
                                             const Options&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton
