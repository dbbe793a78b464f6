// The backward pass: one transposed, reversed bidiagonal solve with the Jacobians at the final states, exact, window
// after window from the end.

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include <deeppcr/enqueue.hpp>

#include "device/cuda.hpp"
#include "newton/across_ranks.hpp"
#include "newton/automatic.hpp"
#include "newton/options.hpp"
#include "newton/overlap.hpp"
#include "newton/stopwatch.hpp"
#include "newton/trajectory.hpp"
#include "recurrence/arguments.hpp"

namespace deeppcr {
namespace newton {

template <class T>
void check_adjoint_arguments(const Recurrence<T>& recurrence, View<const T> trajectory, const Report& report,
                             View<const T> output_gradient, const Options& options) {
    if (is_shared(options)) {
        Options alone = options;
        alone.group = nullptr;
        return options.group->agree(
            caught([&] { check_adjoint_arguments<T>(recurrence, trajectory, report, output_gradient, alone); }));
    }
    check_options(options);
    const Shape& shape = recurrence.shape();
    const auto check = [&](const char* name, View<const T> states) {
        if (states.shape() != shape)
            throw InvalidArgument(name, "the recurrence's shape " + to_string(shape), to_string(states.shape()));
        if (states.data() == nullptr && shape.count() > 0)
            throw InvalidArgument(name, "memory of shape " + to_string(shape), "a null pointer");
    };
    check("trajectory", trajectory);
    check("output_gradient", output_gradient);
    if (!report.ok())
        throw InvalidArgument("report", "a trajectory that converged or was finished sequentially",
                              "one that ended as " + to_string(report.status));
}

template void check_adjoint_arguments(const Recurrence<float>&, View<const float>, const Report&, View<const float>,
                                      const Options&);
template void check_adjoint_arguments(const Recurrence<double>&, View<const double>, const Report&, View<const double>,
                                      const Options&);
template void check_adjoint_arguments(const Recurrence<bfloat16>&, View<const bfloat16>, const Report&,
                                      View<const bfloat16>, const Options&);
template void check_adjoint_arguments(const Recurrence<float16>&, View<const float16>, const Report&,
                                      View<const float16>, const Options&);

namespace {

/// Called for each window, the last first, with x_{t-1} and dL/dx_t of its steps, contiguous.
template <class T>
using Visit = std::function<void(const Section& section, View<const T> before, View<const T> adjoint)>;

/// Of one rank. Nothing waits for a GPU.
template <class T>
Report sweep_windows(const Recurrence<T>& recurrence, View<const T> trajectory, View<const T> output_gradient,
                     const Options& options, View<T> initial, const Visit<T>& visit) {
    Report report;
    Options solving = options;
    solving.surrogate = Surrogate::full;
    report.method = "adjoint, " + describe(solving);
    const auto [steps, batch, width] = recurrence.shape();
    if (recurrence.shape().count() == 0) {
        clear(initial.data(), batch * width, options.execution);
        return report;
    }

    Workspace own(options.execution);
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    const Workspace::Use use(workspace, options.execution);
    const index length = window_length(recurrence, solving, recurrence.block());
    report.window = length;
    const Workspace::Scope scope(workspace);
    const Shape whole{length, batch, width};
    T* const before_memory = workspace.take<T>(whole.count());
    T* const after_memory = workspace.take<T>(whole.count());
    T* const adjoint_memory = workspace.take<T>(whole.count());
    T* const jacobian_memory = workspace.take<T>(whole.count() * recurrence.block());
    const bool on_gpu = options.execution.backend == Backend::cuda;
    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), index(0));

    clear(initial.data(), batch * width, options.execution);
    for (index last = steps; last > 0;) {
        const index first = std::max<index>(0, last - length), rows = last - first;
        const Section section{first, last, sequences, options.execution, on_gpu ? &workspace : nullptr};
        const Shape shape{rows, batch, width};
        const View<T> before(before_memory, shape), after(after_memory, shape), adjoint(adjoint_memory, shape);
        const Jacobian<T> jacobian(jacobian_memory, shape, recurrence.block());

        const Clock::time_point linearised = Clock::now();
        gather_before(recurrence, trajectory, section, before);
        recurrence.linearise(section, View<const T>(before), after, jacobian);
        report.linearise.seconds += seconds_since(linearised);
        report.linearise.bytes += rows * batch * width * (4 + recurrence.block()) * index(sizeof(T));

        const Clock::time_point reduced = Clock::now();
        copy_states<T>(output_gradient.steps(first, last), adjoint, options.execution);
        // What the later window passes back reaches this one's last state.
        add_states<T>(initial, adjoint.steps(rows - 1, rows), options.execution);
        solve_transposed(BidiagonalSystem<T>{jacobian, adjoint}, adjoint,
                         {options.reduction, options.execution, options.chunk, &workspace, options.tensor_cores});
        multiply_transposed<T>(jacobian.steps(0, 1), adjoint.steps(0, 1), initial, options.execution);
        report.reduce.seconds += seconds_since(reduced);
        report.reduce.bytes += rows * batch * width * (4 + recurrence.block()) * index(sizeof(T));

        const Clock::time_point visited = Clock::now();
        visit(section, View<const T>(before), View<const T>(adjoint));
        report.update.seconds += seconds_since(visited);
        last = first;
    }
    for (index j = 0; j < batch; ++j) report.sequences.push_back({.confirmed = steps});
    report.workspace_bytes = workspace.peak_bytes();
    return report;
}

template <class T>
Report transposed_sweep(const Recurrence<T>& recurrence, View<const T> trajectory, View<const T> output_gradient,
                        const Options& options, View<T> initial, const Visit<T>& visit) {
    if (is_shared(options))
        return sweep_across_ranks<T>(
            recurrence,
            {.trajectory = trajectory, .output_gradient = output_gradient, .initial = initial, .visit = visit}, options,
            nullptr);
    const Clock::time_point begin = Clock::now();
    Report report = sweep_windows(recurrence, trajectory, output_gradient, options, initial, visit);
    if (options.execution.backend == Backend::cuda) device::synchronise(options.execution.stream);
    report.seconds = seconds_since(begin);
    return report;
}

/// Where the result will lie. Throws InvalidArgument where something is elsewhere.
template <class T>
Device check_device(const Recurrence<T>& recurrence, View<const T> trajectory, View<const T> output_gradient,
                    const Options& options) {
    if (options.execution.backend != Backend::cuda) return Device::host();
    check_gpu_arguments(recurrence, options);
    if (!trajectory.empty()) {
        device::require_on_gpu("trajectory", trajectory.data());
        device::require_on_gpu("output_gradient", output_gradient.data());
    }
    return device::current_gpu();
}

/// What may throw on one rank alone before the ranks' next exchange, as where memory is taken on its GPU: throws on
/// all.
template <class Body>
void together(const Options& options, const Body& body) {
    if (!is_shared(options) || options.execution.backend != Backend::cuda) return body();
    options.group->agree(caught(body));
}

template <class T>
Adjoint<T> adjoint_states(const Recurrence<T>& recurrence, View<const T> trajectory, const Report& report,
                          View<const T> output_gradient, const Options& options) {
    check_adjoint_arguments<T>(recurrence, trajectory, report, output_gradient, options);
    const Shape& shape = recurrence.shape();
    Adjoint<T> result;
    together(options, [&] {
        const Device here = check_device<T>(recurrence, trajectory, output_gradient, options);
        result.states = Buffer<T>::uninitialised(shape, Layout::steps_first, here);
        result.initial = Buffer<T>::uninitialised({1, shape.batch, shape.width}, Layout::steps_first, here);
    });
    result.report = transposed_sweep<T>(
        recurrence, trajectory, output_gradient, options, result.initial,
        [&](const Section& section, View<const T>, View<const T> adjoint) {
            copy_states<T>(adjoint, result.states.view().steps(section.first, section.last), options.execution);
        });
    return result;
}

template <class T>
void enqueue_adjoint_states(const Recurrence<T>& recurrence, View<const T> trajectory, View<const T> output_gradient,
                            View<T> states, View<T> initial, const Options& options) {
    check_values(options);
    require_alone(options);
    require_cuda(options);
    const Shape& shape = recurrence.shape();
    require_shape("trajectory", trajectory, shape);
    require_shape("output_gradient", output_gradient, shape);
    require_shape("states", states, shape);
    require_contiguous("initial", initial, {1, shape.batch, shape.width});
    check_device<T>(recurrence, trajectory, output_gradient, options);
    if (!states.empty()) device::require_on_gpu("states", states.data());
    if (!initial.empty()) device::require_on_gpu("initial", initial.data());
    sweep_windows<T>(recurrence, trajectory, output_gradient, options, initial,
                     [&](const Section& section, View<const T>, View<const T> adjoint) {
                         copy_states<T>(adjoint, states.steps(section.first, section.last), options.execution);
                     });
}

/// On a GPU: x_{t-1} and dL/dx_t of all steps, contiguous.
template <class T>
std::pair<View<const T>, View<const T>> gather_on_gpu(const Recurrence<T>& recurrence, View<const T> trajectory,
                                                      View<const T> output_gradient, const Section& all,
                                                      Workspace& workspace) {
    device::require_on_gpu("trajectory", trajectory.data());
    device::require_on_gpu("output_gradient", output_gradient.data());
    const auto [steps, batch, width] = recurrence.shape();
    CUstream_st* const stream = all.execution.stream;
    const View<T> initial = workspace.take_states<T>({1, batch, width});
    const View<T> before = workspace.take_states<T>({steps, batch, width});
    recurrence.initial({0, 0, all.sequences, all.execution}, initial);
    gather_starts<T>(trajectory, initial, 1, before, stream);
    if (output_gradient.contiguous()) return {before, output_gradient};
    const View<T> gradient = workspace.take_states<T>({steps + 1, batch, width});
    gather_starts<T>(output_gradient, initial, 1, gradient, stream);
    return {before, gradient.steps(1, steps + 1)};
}

/// The fused backward pass reads x_{t-1} and dL/dx_t in place: first the steps after the first, whose predecessors
/// are rows of the trajectory, then step 1 from the initial state.
template <class T>
void run_backward(const DenseChain<T>& chain, View<const T> trajectory, View<const T> output_gradient,
                  View<const T> slopes, const Options& options, Workspace& workspace, DenseChainGradients<T>& result) {
    const auto [steps, batch, width] = chain.shape();
    const index layers_per_step = std::max<index>(chain.options().skip, 1);
    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), index(0));
    const Workspace::Scope scope(workspace);
    if (options.execution.backend == Backend::cuda) {
        const Section all{0, steps, sequences, options.execution, &workspace};
        const auto [before, gradient] = gather_on_gpu<T>(chain, trajectory, output_gradient, all, workspace);
        chain.run_backward(all, before, slopes, gradient, result.weights, result.biases, {}, result.initial);
        return device::synchronise(options.execution.stream);
    }
    const auto contiguous = [&](View<const T> states) {
        if (states.contiguous()) return states;
        const View<T> copy = workspace.take_states<T>(states.shape());
        copy_states<T>(states, copy, options.execution);
        return View<const T>(copy);
    };
    const View<const T> states = contiguous(trajectory), gradient = contiguous(output_gradient);
    const View<T> first_gradient = workspace.take_states<T>({1, batch, width});
    const View<T> initial = workspace.take_states<T>({1, batch, width});
    const auto part = [&](index first, index last, View<const T> before, View<const T> gradients) {
        const auto layers = [&](auto view) { return view.steps(first * layers_per_step, last * layers_per_step); };
        chain.run_backward({first, last, sequences, options.execution}, before,
                           slopes.empty() ? View<const T>() : View<const T>(layers(slopes)), gradients,
                           layers(result.weights.view()), layers(result.biases.view()), View<T>(), result.initial);
    };
    std::copy_n(gradient.data(), batch * width, first_gradient.data());
    if (steps > 1) {
        part(1, steps, states.steps(0, steps - 1), gradient.steps(1, steps));
        for (index k = 0; k < batch * width; ++k) first_gradient.data()[k] += result.initial.data()[k];
    }
    chain.initial({0, 0, sequences, options.execution}, initial);
    part(0, 1, initial, first_gradient);
}

/// By the fused backward pass, in the workspace that it is given, or the transposed solve: as options.method says.
template <class T, class Fused, class Solve>
Report by_choice(const Recurrence<T>& recurrence, const Options& options, const Fused& fused, const Solve& solve) {
    if (recurrence.shape().count() == 0 || is_shared(options)) return solve();
    const bool open = leaves_backward_choice(options);
    Choice choice;
    if (open)
        choice = choose_backward(recurrence, options);
    else if (options.method == Method::sequential)
        choice.method = Method::sequential;
    const Clock::time_point begin = Clock::now();
    Report report;
    if (choice.method == Method::sequential) {
        Workspace own(options.execution);
        Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
        const Workspace::Use use(workspace, options.execution);
        fused(workspace);
        report.method = "adjoint, sequential";
        report.sequences.assign(std::size_t(recurrence.shape().batch), {.confirmed = recurrence.shape().steps});
        report.seconds = report.sequential.seconds = seconds_since(begin);
        report.workspace_bytes = workspace.peak_bytes();
    } else {
        report = solve();
    }
    if (open) learn_from_backward(recurrence, options, choice.method, seconds_since(begin));
    report.candidates = std::move(choice.candidates);
    return report;
}

template <class T>
DenseChainGradients<T> chain_gradients(const DenseChain<T>& chain, View<const T> trajectory, const Report& report,
                                       View<const T> output_gradient, const Options& options, View<const T> slopes) {
    check_adjoint_arguments<T>(chain, trajectory, report, output_gradient, options);
    const auto [steps, batch, width] = chain.shape();
    const index layers_per_step = std::max<index>(chain.options().skip, 1);
    if (!slopes.empty() && slopes.shape() != Shape{chain.layers(), batch, width})
        throw InvalidArgument("slopes", "one row per layer, " + to_string(Shape{chain.layers(), batch, width}),
                              to_string(slopes.shape()));
    const Shape states{1, batch, width}, weights{chain.layers(), width, width}, biases{chain.layers(), 1, width};
    DenseChainGradients<T> result;
    together(options, [&] {
        const Device here = check_device<T>(chain, trajectory, output_gradient, options);
        if (!here.is_host() && !slopes.empty()) device::require_on_gpu("slopes", slopes.data());
        result.weights = Buffer<T>::uninitialised(weights, Layout::steps_first, here);
        result.biases = Buffer<T>::uninitialised(biases, Layout::steps_first, here);
        result.initial = Buffer<T>(states, Layout::steps_first, here);
        if (states.batch > 0) return;
        detail::fill_zeros(result.weights.data(), result.weights.size() * index(sizeof(T)), here);
        detail::fill_zeros(result.biases.data(), result.biases.size() * index(sizeof(T)), here);
    });
    result.report = by_choice<T>(
        chain, options,
        [&](Workspace& workspace) {
            run_backward<T>(chain, trajectory, output_gradient, slopes, options, workspace, result);
        },
        [&] {
            return transposed_sweep<T>(
                chain, trajectory, output_gradient, options, result.initial,
                [&](const Section& section, View<const T> before, View<const T> adjoint) {
                    const index first = section.first * layers_per_step, last = section.last * layers_per_step;
                    chain.parameter_gradients(section, before, adjoint, result.weights.view().steps(first, last),
                                              result.biases.view().steps(first, last));
                });
        });
    return result;
}

/// Elements of states that the fused backward pass of a cell copies at a time.
constexpr index copied_elements = index(1) << 20;

/// The fused backward pass, section after section from the end.
template <class T>
void run_backward(const DenseCell<T>& cell, View<const T> trajectory, View<const T> output_gradient,
                  const Options& options, Workspace& workspace, DenseCellGradients<T>& result) {
    const auto [steps, batch, width] = cell.shape();
    const index length = std::clamp<index>(copied_elements / (batch * width), 1, steps);
    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), index(0));
    const Workspace::Scope scope(workspace);
    if (options.execution.backend == Backend::cuda) {
        const Section all{0, steps, sequences, options.execution, &workspace};
        const auto [before, gradient] = gather_on_gpu<T>(cell, trajectory, output_gradient, all, workspace);
        cell.run_backward(all, before, gradient, result.inputs, result.weights, result.biases, result.initial);
        return device::synchronise(options.execution.stream);
    }
    const View<T> before_memory = workspace.take_states<T>({length, batch, width});
    const View<T> gradient_memory = workspace.take_states<T>({length, batch, width});
    for (index last = steps; last > 0;) {
        const index first = std::max<index>(0, last - length);
        const Section section{first, last, sequences, options.execution};
        const View<T> before = before_memory.steps(0, last - first), gradient = gradient_memory.steps(0, last - first);
        gather_before(cell, trajectory, section, before);
        copy_states<T>(output_gradient.steps(first, last), gradient, options.execution);
        cell.run_backward(section, before, gradient, result.inputs.view().steps(first, last), result.weights,
                          result.biases, result.initial);
        last = first;
    }
}

template <class T>
DenseCellGradients<T> cell_gradients(const DenseCell<T>& cell, View<const T> trajectory, const Report& report,
                                     View<const T> output_gradient, const Options& options) {
    check_adjoint_arguments<T>(cell, trajectory, report, output_gradient, options);
    const auto [steps, batch, width] = cell.shape();
    const index hidden = cell.hidden(), gates = cell.gates();
    const Shape states{1, batch, width}, inputs{steps, batch, gates * hidden};
    DenseCellGradients<T> result;
    together(options, [&] {
        const Device here = check_device<T>(cell, trajectory, output_gradient, options);
        result.inputs = Buffer<T>::uninitialised(inputs, Layout::steps_first, here);
        result.weights = Buffer<T>({gates, hidden, hidden}, Layout::steps_first, here);
        result.biases = Buffer<T>({gates, 1, hidden}, Layout::steps_first, here);
        result.initial = Buffer<T>(states, Layout::steps_first, here);
    });
    result.report = by_choice<T>(
        cell, options,
        [&](Workspace& workspace) { run_backward<T>(cell, trajectory, output_gradient, options, workspace, result); },
        [&] {
            return transposed_sweep<T>(cell, trajectory, output_gradient, options, result.initial,
                                       [&](const Section& section, View<const T> before, View<const T> adjoint) {
                                           cell.parameter_gradients(
                                               section, before, adjoint,
                                               result.inputs.view().steps(section.first, section.last), result.weights,
                                               result.biases);
                                       });
        });
    if (is_shared(options))
        for (const Buffer<T>& shared : {std::cref(result.weights), std::cref(result.biases)})
            options.group->sum(std::span(shared.data(), std::size_t(shared.size())), options.execution);
    if (is_shared(options) && options.execution.backend == Backend::cuda) device::synchronise(options.execution.stream);
    return result;
}

}  // namespace
}  // namespace newton

template <>
Adjoint<float> adjoint(const Recurrence<float>& recurrence, View<const float> trajectory, const Report& report,
                       View<const float> output_gradient, const Options& options) {
    return newton::adjoint_states(recurrence, trajectory, report, output_gradient, options);
}
template <>
Adjoint<double> adjoint(const Recurrence<double>& recurrence, View<const double> trajectory, const Report& report,
                        View<const double> output_gradient, const Options& options) {
    return newton::adjoint_states(recurrence, trajectory, report, output_gradient, options);
}
template <>
void enqueue_adjoint(const Recurrence<float>& recurrence, View<const float> trajectory,
                     View<const float> output_gradient, View<float> states, View<float> initial,
                     const Options& options) {
    newton::enqueue_adjoint_states(recurrence, trajectory, output_gradient, states, initial, options);
}
template <>
void enqueue_adjoint(const Recurrence<double>& recurrence, View<const double> trajectory,
                     View<const double> output_gradient, View<double> states, View<double> initial,
                     const Options& options) {
    newton::enqueue_adjoint_states(recurrence, trajectory, output_gradient, states, initial, options);
}
template <>
DenseChainGradients<float> adjoint(const DenseChain<float>& chain, View<const float> trajectory, const Report& report,
                                   View<const float> output_gradient, const Options& options,
                                   View<const float> slopes) {
    return newton::chain_gradients(chain, trajectory, report, output_gradient, options, slopes);
}
template <>
DenseChainGradients<double> adjoint(const DenseChain<double>& chain, View<const double> trajectory,
                                    const Report& report, View<const double> output_gradient, const Options& options,
                                    View<const double> slopes) {
    return newton::chain_gradients(chain, trajectory, report, output_gradient, options, slopes);
}
template <>
DenseCellGradients<float> adjoint(const DenseCell<float>& cell, View<const float> trajectory, const Report& report,
                                  View<const float> output_gradient, const Options& options) {
    return newton::cell_gradients(cell, trajectory, report, output_gradient, options);
}
template <>
DenseCellGradients<double> adjoint(const DenseCell<double>& cell, View<const double> trajectory, const Report& report,
                                   View<const double> output_gradient, const Options& options) {
    return newton::cell_gradients(cell, trajectory, report, output_gradient, options);
}

}  // namespace deeppcr
