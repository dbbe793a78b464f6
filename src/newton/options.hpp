// What Options mean for a given recurrence: tolerance, Jacobian, length of the window.
#pragma once

#include <limits>
#include <string>

#include <deeppcr/evaluate.hpp>

#include "newton/update.hpp"

namespace deeppcr::newton {

constexpr index most_anderson = 16;

/// Throws InvalidArgument for an option that is out of its range; NoDevice.
void check_values(const Options& options);
/// And for a captured stream.
void check_options(const Options& options);

/// For what one process computes alone: throws InvalidArgument where options.group has other ranks.
void require_alone(const Options& options);
/// For what a GPU alone does: throws InvalidArgument for another backend.
void require_cuda(const Options& options);

/// Throws InvalidArgument for arguments of `evaluate` that do not fit each other.
template <class T>
void check_arguments(const Recurrence<T>& recurrence, View<const T> trajectory, const Options& options);

/// Throws InvalidArgument for arguments of `adjoint` that do not fit the recurrence, or a report that is not ok().
template <class T>
void check_adjoint_arguments(const Recurrence<T>& recurrence, View<const T> trajectory, const Report& report,
                             View<const T> output_gradient, const Options& options);

/// For Backend::cuda: throws InvalidArgument unless the recurrence and options.workspace are for the current GPU;
/// NoDevice.
template <class T>
void check_gpu_arguments(const Recurrence<T>& recurrence, const Options& options);

/// "newton, full Jacobian, scan"
std::string describe(const Options& options);

/// Where numbers are stored in 16 bits, half a unit of 1's last place: then two states agree where they are the same or
/// neighbours.
template <class T>
constexpr double default_tolerance = 64 * double(std::numeric_limits<T>::epsilon());
template <>
inline constexpr double default_tolerance<bfloat16> = 0x1p-8;
template <>
inline constexpr double default_tolerance<float16> = 0x1p-11;

template <class T>
Tolerance tolerance_of(const Options& options) {
    const double both = options.tolerance > 0 ? options.tolerance : default_tolerance<T>;
    return {options.absolute_tolerance >= 0 ? options.absolute_tolerance : both,
            options.relative_tolerance >= 0 ? options.relative_tolerance : both};
}

/// Block size of the Jacobian that stands in the solve; 0 where there is none.
template <class T>
index jacobian_block(const Recurrence<T>& recurrence, Surrogate surrogate) {
    switch (surrogate) {
        case Surrogate::full:
            return recurrence.block();
        case Surrogate::diagonal:
        case Surrogate::identity:
            return 1;
        case Surrogate::zero:
            break;
    }
    return 0;
}

/// Steps per window: options.window, or as many as the memory limit allows. Throws OutOfMemory, with the bytes that
/// would be needed, where not even one step (or the window asked for) fits.
template <class T>
index window_length(const Recurrence<T>& recurrence, const Options& options, index block);

}  // namespace deeppcr::newton
