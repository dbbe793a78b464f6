// Method::automatic of recurrences that are not a cell's: by what evaluations of the same kind have taken.
#pragma once

#include <limits>
#include <vector>

#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// Whether `options` leave the method open: automatic, and nothing that only Newton's method heeds.
bool leaves_choice(const Options& options);
/// Likewise of `adjoint`: automatic, and nothing that only the transposed solve heeds.
bool leaves_backward_choice(const Options& options);

struct Choice {
    Method method = Method::newton;
    std::vector<Report::Candidate> candidates = {};  ///< empty: nothing was weighed, and nothing is to be learned
    /// Newton's passes are given up where they have taken longer than this for each step that is left.
    double patience = std::numeric_limits<double>::infinity();
};

/// For options that leave the choice, and a trajectory that is not empty. The first call of a kind times a few steps.
/// Throws OutOfMemory as Newton's method would with options.memory_limit; what the recurrence's callbacks throw.
template <class T>
Choice choose(const Recurrence<T>& recurrence, const Options& options);
/// What came of it. seconds: all of the call's.
template <class T>
void learn_from(const Recurrence<T>& recurrence, const Options& options, const Choice& choice, const Report& report,
                double seconds);

/// The same for gradients: sequential is the fused backward pass, newton the transposed solve.
template <class T>
Choice choose_backward(const Recurrence<T>& recurrence, const Options& options);
template <class T>
void learn_from_backward(const Recurrence<T>& recurrence, const Options& options, Method method, double seconds);

}  // namespace deeppcr::newton
