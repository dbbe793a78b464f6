// On a GPU without a wait: trajectories and gradients that the host enqueues, and goes on. Of cells both; of any other
// recurrence the gradients, whose trajectories are EnqueuedEvaluation's.
#pragma once

#include <deeppcr/cell.hpp>
#include <deeppcr/evaluate.hpp>

namespace deeppcr {

/// `evaluate` of a cell on the current GPU without a wait: all that may be needed is enqueued in
/// options.execution.stream, chunks that do not meet finished step after step included. Arrays as for `evaluate`;
/// nothing of them may be freed or changed before the stream gets there.
/// status: one number on the GPU, out: the worst Status of the sequences, converged, finished_sequentially or
/// non_finite; where it is the last, no part of a sequence after its first state that is not finite is right.
/// What a run tells of repairs and shots, later calls learn once it is there. Some calls do wait: the first of a cell
/// on a GPU, which measures what its kernels cost, unless method and chunk are given; with Method::automatic those of a
/// kind, until each method that is worth it was measured twice (a trajectory that is not finite does not count); and
/// those of a recurrence with sequences that begin within rows, until their list is on the GPU; and those that load
/// kernels or take memory for the first time, as CUDA has it.
/// In a stream that is captured into a graph nothing waits, and nothing is learnt or measured: calls before, of the
/// same sizes, make the choice a good one, since what ran is captured rather than what did not, and grow a workspace of
/// `options`, which must not lack memory (InvalidArgument). Without one or a MemorySource the graph has memory of its
/// own; it may then have one instance at a time, and no clone. Sequences do not begin within rows (InvalidArgument).
/// Deterministic as `evaluate`. Throws InvalidArgument for what `evaluate` does not take, another backend than cuda,
/// and another on_failure than `finish`; OutOfMemory, NoDevice.
template <class T>
void enqueue(const ChannelwiseRecurrence<T>& recurrence, View<std::type_identity_t<T>> trajectory, index* status,
             const Options& options);

/// `adjoint` of what `enqueue` evaluates, likewise without a wait, into `gradients`. status: what `enqueue` writes;
/// where it says non_finite, all gradients are NaN. Throws as `enqueue`.
template <class T>
void enqueue_adjoint(const ChannelwiseRecurrence<T>& recurrence, View<const std::type_identity_t<T>> trajectory,
                     const index* status, View<const std::type_identity_t<T>> output_gradient,
                     const CellGradientViews<std::type_identity_t<T>>& gradients, const Options& options);

/// `adjoint` of any recurrence that runs on the current GPU, likewise without a wait: dL/dx_t to `states`, of the
/// recurrence's shape, dL/dx_0 to `initial`, [1,batch,width], contiguous. The recurrence's callbacks are called at
/// once, window after window, and nothing may be freed or changed before the stream gets there. Whether the trajectory
/// is right is not asked: EnqueuedEvaluation::finish tells. Once options.workspace has grown nothing is allocated. A
/// captured stream wants one that has (InvalidArgument), and options.window where memory bounds it. Deterministic, the
/// bits of `adjoint` with the same window. Throws InvalidArgument, OutOfMemory, NoDevice, and what callbacks throw.
template <class T>
void enqueue_adjoint(const Recurrence<T>& recurrence, View<const std::type_identity_t<T>> trajectory,
                     View<const std::type_identity_t<T>> output_gradient, View<std::type_identity_t<T>> states,
                     View<std::type_identity_t<T>> initial, const Options& options);

}  // namespace deeppcr
