// Newton's method for any recurrence on a GPU: newton_cuda.cu, or no_cuda.cpp.
#pragma once

#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// By options.method: sequential, or else Newton's, with the patience of a Choice. Arguments are checked but for where
/// they lie.
template <class T>
Report evaluate_newton_on_gpu(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options,
                              double patience);

/// Throws NotConverged where options.on_failure is `raise` and the report is not ok().
void raise_failure(const Report& report, const Options& options, index steps);

}  // namespace deeppcr::newton
