#include "newton/options.hpp"

#include <algorithm>
#include <cmath>

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

void check_options(const Options& options) {
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
    const index limit = options.memory_limit > 0 ? options.memory_limit : available_memory() / 2;
    // States, f of them, update and error estimate; the Jacobian; and what the reduction takes: PCR two more copies of
    // Jacobian and right side, the scan a pair of them per chunk (counted as one more per step, an upper bound).
    const double copies = options.reduction == Reduction::pcr ? 3 : options.reduction == Reduction::sequential ? 1 : 2;
    // Anderson keeps states and updates of earlier passes.
    const double per_step =
        double(shape.batch) * double(shape.width) * double(sizeof(T)) *
        (4 + double(block) * copies + (copies - 1) + (options.anderson > 0 ? 2 * double(options.anderson) + 2 : 0));
    const index wanted = options.window > 0 ? std::min(options.window, shape.steps) : 1;
    if (per_step * double(wanted) > double(limit))
        throw OutOfMemory((options.window > 0 ? "a window of " + std::to_string(wanted) + " steps" : "one step") +
                          " of shape " + to_string(shape) + " with Jacobian blocks of " + std::to_string(block) +
                          " needs " + std::to_string(index(std::min(per_step * double(wanted), 9e18))) + " bytes; " +
                          std::to_string(limit) + " are allowed (options.memory_limit)");
    if (options.window > 0) return wanted;
    return std::clamp<index>(index(double(limit) / per_step), 1, shape.steps);
}

template index window_length(const Recurrence<float>&, const Options&, index);
template index window_length(const Recurrence<double>&, const Options&, index);

}  // namespace deeppcr::newton
