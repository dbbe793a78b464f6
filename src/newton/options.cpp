#include "newton/options.hpp"

#include <algorithm>
#include <cmath>

#include <deeppcr/group.hpp>

#include "device/cuda.hpp"

namespace deeppcr {

std::string to_string(Method method) {
    switch (method) {
        case Method::automatic:
            return "automatic";
        case Method::newton:
            return "newton";
        case Method::sequential:
            return "sequential";
        case Method::overlap:
            return "overlap";
        case Method::shooting:
            break;
    }
    return "shooting";
}

}  // namespace deeppcr

namespace deeppcr::newton {
namespace {

void check_tolerance(const char* name, double value, bool negative_allowed) {
    if (!std::isfinite(value) || (value < 0 && !negative_allowed))
        throw InvalidArgument(name, negative_allowed ? "a finite number" : "a finite number of 0 or more",
                              std::to_string(value));
}

void check_count(const char* name, index value) {
    if (value < 0) throw InvalidArgument(name, "0 or more", std::to_string(value));
}

}  // namespace

void check_values(const Options& options) {
    check_tolerance("options.tolerance", options.tolerance, false);
    check_tolerance("options.absolute_tolerance", options.absolute_tolerance, true);
    check_tolerance("options.relative_tolerance", options.relative_tolerance, true);
    if (!std::isfinite(options.damping))
        throw InvalidArgument("options.damping", "a finite number", std::to_string(options.damping));
    if (options.anderson < 0 || options.anderson > most_anderson)
        throw InvalidArgument("options.anderson", "0 to " + std::to_string(most_anderson),
                              std::to_string(options.anderson));
    check_count("options.window", options.window);
    check_count("options.max_iterations", options.max_iterations);
    check_count("options.memory_limit", options.memory_limit);
    check_count("options.chunk", options.chunk);
    check_count("options.execution.threads", options.execution.threads);
    if (options.execution.backend == Backend::cuda) device::current_gpu();
}

void check_options(const Options& options) {
    check_values(options);
    if (options.execution.backend == Backend::cuda && device::is_captured(options.execution.stream))
        throw InvalidArgument("options.execution.stream", "one that is not captured, as the host waits for the outcome",
                              "one that is captured into a graph");
}

void require_alone(const Options& options) {
    if (options.group != nullptr && options.group->size() > 1)
        throw InvalidArgument("options.group", "null, or a group of one rank",
                              "one of " + std::to_string(options.group->size()));
}

void require_cuda(const Options& options) {
    if (options.execution.backend != Backend::cuda)
        throw InvalidArgument("options.execution.backend", "cuda",
                              options.execution.backend == Backend::cpu ? "cpu" : "reference");
}

template <class T>
void check_arguments(const Recurrence<T>& recurrence, View<const T> trajectory, const Options& options) {
    check_options(options);
    if (trajectory.shape() != recurrence.shape())
        throw InvalidArgument("trajectory", "the recurrence's shape " + to_string(recurrence.shape()),
                              to_string(trajectory.shape()));
    if (trajectory.data() == nullptr && recurrence.shape().count() > 0)
        throw InvalidArgument("trajectory", "memory of shape " + to_string(recurrence.shape()), "a null pointer");
}

template <class T>
void check_gpu_arguments(const Recurrence<T>& recurrence, const Options& options) {
    const Device here = device::current_gpu();
    if (!recurrence.runs_on(Backend::cuda))
        throw InvalidArgument("options.execution.backend", "one that the recurrence runs on (Recurrence::runs_on)",
                              "cuda");
    if (options.workspace != nullptr && options.workspace->device() != here)
        throw InvalidArgument("options.workspace", "a workspace on the current GPU", "one elsewhere");
}

std::string describe(const Options& options) {
    if (options.method == Method::sequential) return "sequential";
    std::string text = "newton, ";
    switch (options.surrogate) {
        case Surrogate::full:
            text += "full Jacobian";
            break;
        case Surrogate::diagonal:
            text += "diagonal Jacobian";
            break;
        case Surrogate::identity:
            text += "identity (Picard)";
            break;
        case Surrogate::zero:
            return text + "zero Jacobian (Jacobi)";
    }
    switch (options.reduction) {
        case Reduction::automatic:
            return text + ", automatic reduction";
        case Reduction::sequential:
            return text + ", substitution";
        case Reduction::pcr:
            return text + ", parallel cyclic reduction";
        case Reduction::scan:
            break;
    }
    return text + ", scan";
}

template <class T>
index window_length(const Recurrence<T>& recurrence, const Options& options, index block) {
    const Shape& shape = recurrence.shape();
    const bool on_gpu = options.execution.backend == Backend::cuda;
    // What the workspace holds is taken from what is available; the next call must choose the same window.
    const index held = on_gpu && options.workspace != nullptr ? options.workspace->peak_bytes() : 0;
    const index limit = options.memory_limit > 0 ? options.memory_limit
                        : on_gpu                 ? (device::available_on_gpu() + held) / 2
                                                 : available_memory() / 2;
    // States, f of them, update and error estimate; the Jacobian; and what the reduction takes: PCR two more copies of
    // Jacobian and right side, the scan a pair of them per chunk (counted as one more per step, an upper bound).
    const double copies = options.reduction == Reduction::pcr ? 3 : options.reduction == Reduction::sequential ? 1 : 2;
    // Anderson keeps states and updates of earlier passes. On a GPU a window slides through states for two.
    const double per_step = double(shape.batch) * double(shape.width) * double(sizeof(T)) *
                            (4 + (on_gpu ? 1 : 0) + double(block) * copies + (copies - 1) +
                             (options.anderson > 0 ? 2 * double(options.anderson) + 2 : 0));
    const index wanted = options.window > 0 ? std::min(options.window, shape.steps) : 1;
    if (per_step * double(wanted) > double(limit))
        throw OutOfMemory((options.window > 0 ? "a window of " + std::to_string(wanted) + " steps" : "one step") +
                          " of shape " + to_string(shape) + " with Jacobian blocks of " + std::to_string(block) +
                          " needs " + std::to_string(index(std::min(per_step * double(wanted), 9e18))) + " bytes; " +
                          std::to_string(limit) + " are allowed (options.memory_limit)");
    if (options.window > 0) return wanted;
    return std::clamp<index>(index(double(limit) / per_step), 1, shape.steps);
}

template void check_arguments(const Recurrence<float>&, View<const float>, const Options&);
template void check_arguments(const Recurrence<double>&, View<const double>, const Options&);
template void check_gpu_arguments(const Recurrence<float>&, const Options&);
template void check_gpu_arguments(const Recurrence<double>&, const Options&);
template index window_length(const Recurrence<float>&, const Options&, index);
template index window_length(const Recurrence<double>&, const Options&, index);

}  // namespace deeppcr::newton
