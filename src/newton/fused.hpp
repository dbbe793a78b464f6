// The methods that only cells have: overlap and multiple shooting, and the choice between them and step after step.
#pragma once

#include <deeppcr/cell.hpp>
#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// What options.method may be where there is nothing else.
constexpr const char* fused_methods = "automatic, sequential, overlap or shooting, for a cell on a GPU";

/// Evaluates a cell's recurrence by options.method: automatic, sequential, overlap or shooting.
template <class T>
Report evaluate_fused(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options);

/// Those of no steps: zeros, enqueued.
template <class T>
void clear_gradients(const CellGradientViews<T>& gradients, const Execution& execution);

}  // namespace deeppcr::newton
