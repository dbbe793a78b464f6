// The damped bidiagonal system: least squares that keep the solution small where the system itself would blow it up.
#pragma once

#include <span>

#include <deeppcr/array.hpp>

namespace deeppcr::reduce {

/// Minimises, for each sequence j, the sum over t of |x_t - A_t x_{t-1} - b_t|^2 + damping[j] |x_t|^2, with x_0 = 0
/// (A_1 plays no part): Levenberg-Marquardt's step for a recurrence, whose normal equations are block tridiagonal.
/// With damping 0 it is the bidiagonal solve itself. subdiagonal: A, in. solution: b on the way in, x on the way out,
/// [steps,batch,width]. damping: [batch], each >= 0. chunk: steps per chunk; 0: chosen. Arithmetic in double.
/// Deterministic: the same inputs and chunk give the same bits; the chosen chunk depends on shape and thread count.
/// Source: Gonzalez, Warrington, Smith, Linderman: Towards Scalable and Stable Parallelization of Nonlinear RNNs
/// (NeurIPS 2024, arXiv 2407.19115): ELK, where this is a Kalman smoother; here in information form, by chunks.
template <class T>
void solve_damped(const Jacobian<const T>& subdiagonal, const View<T>& solution, std::span<const double> damping,
                  index chunk, int threads);

}  // namespace deeppcr::reduce
