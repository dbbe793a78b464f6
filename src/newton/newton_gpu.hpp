// Newton's method for any recurrence on a GPU, and what it does to arrays there: newton_cuda.cu, or no_cuda.cpp.
#pragma once

#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// By options.method: sequential, or else Newton's. Arguments are checked but for where they lie.
template <class T>
Report evaluate_newton_on_gpu(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options);

/// to = from, element by element; any strides.
template <class T>
void copy_states_on_gpu(View<const T> from, View<T> to, CUstream_st* stream);
/// to += from
template <class T>
void add_states_on_gpu(View<const T> from, View<T> to, CUstream_st* stream);

/// Throws NotConverged where options.on_failure is `raise` and the report is not ok().
void raise_failure(const Report& report, const Options& options, index steps);

}  // namespace deeppcr::newton
