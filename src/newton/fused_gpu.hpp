// Cells on a GPU: fused_cuda.cu, or no_cuda.cpp.
#pragma once

#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// Evaluates a cell's recurrence by options.method: automatic, sequential, overlap or shooting. All arrays lie on the
/// current GPU.
template <class T>
Report evaluate_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options);

/// The same without a wait; see enqueue.hpp.
template <class T>
void enqueue_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, index* status,
                    const Options& options);

/// Writes the gradients to memory of the current GPU.
template <class T>
Report adjoint_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,
                      View<const T> output_gradient, const CellGradientViews<T>& gradients, const Options& options);

/// The same without a wait; see enqueue.hpp.
template <class T>
void enqueue_adjoint_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, const index* status,
                            View<const T> output_gradient, const CellGradientViews<T>& gradients,
                            const Options& options);

}  // namespace deeppcr::newton
