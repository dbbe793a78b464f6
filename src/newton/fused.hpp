// The methods that only cells have: overlap and multiple shooting, and the choice between them and step after step.
#pragma once

#include <deeppcr/cell.hpp>
#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// Evaluates a cell's recurrence by options.method: automatic, sequential, overlap or shooting.
template <class T>
Report evaluate_fused(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options);

}  // namespace deeppcr::newton
