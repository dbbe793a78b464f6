// How far a trajectory is from the exact one: e_t = J_t e_{t-1} + s_t, where s_t is what step t itself got wrong.
#pragma once

#include <cstdint>
#include <span>

#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

constexpr double rounding_of_a_step = 2;  // in units of epsilon

/// The sign of a step's rounding: a fair coin that depends on the place only.
constexpr bool rounding_sign(index step, index sequence, index element) {
    std::uint64_t bits = std::uint64_t(step) * 0x9E3779B97F4A7C15U + std::uint64_t(sequence) * 0xC2B2AE3D27D4EB4FU +
                         std::uint64_t(element) * 0x165667B19E3779F9U;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9U;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBU;
    return ((bits ^ (bits >> 31)) & 1U) != 0;
}

/// s_t of steps first+1, first+2, ...: the residual x_t - f(x_{t-1}) and, for the rounding of f, two units in the last
/// place of the largest number of its Jacobian block, with a sign drawn per step and block. Zero from confirmed[j] on
/// (rows from `first`). states: x_t, after: f(x_{t-1}), sources: out; all contiguous [rows, sequences, width].
template <class T>
void error_sources(View<const T> states, View<const T> after, index first, index block,
                   std::span<const index> confirmed, View<T> sources, int threads);

/// Raises `largest` to the largest absolute value of `errors`; to infinity where one is not finite.
template <class T>
void raise_error(double& largest, const T* errors, index count);

/// Estimates::full: the error of every sequence of `report` and the Lyapunov exponent, from the Jacobians along the
/// whole trajectory, window after window.
template <class T>
void estimate_along(const Recurrence<T>& recurrence, View<const T> trajectory, const Options& options, Report& report);

}  // namespace deeppcr::newton
