// Method::overlap of recurrences that are not a cell's.
#pragma once

#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// On processors by `run`, for every recurrence; on the current GPU by `run_chunks`: throws InvalidArgument where the
/// recurrence has none.
template <class T>
Report evaluate_by_overlap(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options);

/// Steps of a chunk where options.chunk is 0: as many chunks as run at a time, but none that is short against what it
/// repeats.
index overlap_chunk(const Shape& shape, const Execution& execution);

/// On a GPU, in the stream: the state before each chunk of `length` steps, starts [chunks,batch,width]. That of the
/// first is `initial`, as are all others where `trajectory` has no data.
template <class T>
void gather_starts(View<const T> trajectory, View<const T> initial, index length, View<T> starts, CUstream_st* stream);

/// On a GPU, in the stream: first[j] = steps - the first step whose state is not finite, where there is one; else it
/// stays.
template <class T>
void find_non_finite(View<const T> trajectory, unsigned long long* first, CUstream_st* stream);

}  // namespace deeppcr::newton
