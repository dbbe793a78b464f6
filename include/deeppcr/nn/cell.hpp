// cell: a recurrence of a built-in cell (ParaGRU, ParaLSTM, DiagonalElman, SLSTM) as an autograd function.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include <deeppcr/cell.hpp>
#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/cell_kind.hpp>

namespace deeppcr::nn {

struct CellOptions {
    Options evaluation = {};            ///< method, tolerance and the rest; guess `given` counts as initial_state
    std::vector<SequenceStart> starts;  ///< where new sequences begin within rows of the batch
    bool reversed = false;              ///< from the last step to the first
    /// Steps per segment of which backward keeps only the first state and computes the others again; 0: keep all. Saves
    /// memory where nothing else keeps the returned states.
    index recompute = 0;
};

/// Numbers per state and channel, gates, and parameters per channel of a cell.
struct CellSizes {
    index states, inputs, parameters;
};
CellSizes sizes_of(CellKind kind);

/// x_1..x_T of a cell's recurrence, differentiable once with respect to its three tensors.
/// gates: [steps, batch, inputs * channels], gate after gate; any strides (where the last dimension is contiguous,
/// nothing is copied: [batch,steps,...] transposed will do). parameters: [parameters, channels]. initial: [sequences,
/// channels * states], one for each sequence (the batch, and one more for each start), or undefined for zeros. Returns
/// [steps, batch, channels * states], of the gates' type, a channel's states side by side; row t belongs to row t of
/// the gates, also where `reversed`. report: receives what the evaluation did, where not null. All float or all double,
/// or gates of 16 bits (bfloat16, float16), with which the others may be float or of the same type: on the CPU they are
/// widened to float, and the states narrowed at the end; a GPU stores them so, with parameters and arithmetic in float.
/// All on one device: the CPU, or a GPU, where the work runs in LibTorch's current stream and with its memory
/// (evaluation.execution and evaluation.workspace do not count there). A trajectory that does not converge follows
/// evaluation.on_failure; one that is not right has no gradient: backward throws InvalidArgument, and on a GPU, where
/// nobody has waited, makes all gradients NaN. There the host waits for the stream only where a report is asked for, in
/// calls with recompute, a group or another on_failure than `finish`, and where `enqueue` does; all others, but those
/// with `starts`, a CUDA graph can capture. Deterministic as `evaluate`: for the same bits in every call, give method
/// and chunk. Throws InvalidArgument, OutOfMemory, NotConverged, NoDevice.
at::Tensor cell(CellKind kind, const at::Tensor& gates, const at::Tensor& parameters, const at::Tensor& initial = {},
                const CellOptions& options = {}, Report* report = nullptr);

}  // namespace deeppcr::nn
