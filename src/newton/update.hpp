// The two sweeps of a Newton pass over its window's states: test the residual, apply the update.
#pragma once

#include <limits>
#include <vector>

#include <deeppcr/array.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr::newton {

/// What a pass knows of one active sequence. Rows count from the window's start.
struct Progress {
    index confirmed = 0;           ///< leading rows that passed the residual test; frozen
    double residual = 0;           ///< maximum over the confirmed rows of the whole trajectory
    double relative_residual = 0;  ///< likewise, as a fraction of the tolerance
    double worst = 0;              ///< largest relative residual of the rows not confirmed, this pass
    double damping = 0;            ///< Levenberg-Marquardt's, of this pass
    double merit = std::numeric_limits<double>::infinity();  ///< sum of the squared residuals of the last damped pass
};

/// What the test of one range of rows found of one sequence.
struct RangeResult {
    index passed = 0;  ///< leading rows of the range that passed
    double residual = 0, relative_residual = 0, worst = 0;
};

struct Tolerance {
    double absolute, relative;
};

/// The window: rows + 1 states, the first of them confirmed; all [.., sequences, width], contiguous.
template <class T>
struct Window {
    View<T> states;        ///< x_{t-1} in row i, x_t in row i + 1; in/out
    View<T> after;         ///< f(x_{t-1}), in
    Jacobian<T> jacobian;  ///< in; rows of non-finite steps are zeroed
    View<T> update;        ///< -r on the way into the solve, d on the way out
};

/// Sets update = f(x_{t-1}) - x_t, and 0 in confirmed rows; moves each sequence's `confirmed` over the rows that pass
/// |r| <= absolute + relative |x| (maximum norms over the width, NaN fails). Rows beyond, where f or x is not finite,
/// are cut off from their neighbours (update and Jacobian 0; a state that is not finite itself is replaced by the
/// confirmed one). Returns how many states were so reset.
template <class T>
index test_residual(const Window<T>& window, std::vector<Progress>& progress, Tolerance tolerance,
                    const Execution& execution);

/// x_t += d_t beyond the confirmed rows; the first row beyond takes f(x_{t-1}) itself, exactly. A state that would
/// not be finite keeps its value. Returns how many did.
template <class T>
index apply_update(const Window<T>& window, const std::vector<Progress>& progress, const Execution& execution);

}  // namespace deeppcr::newton
