// dense_cell: a recurrent layer (Elman, GRU, LSTM) as an autograd function, evaluated in parallel over time or step by
// step.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include <deeppcr/evaluate.hpp>

namespace deeppcr::nn {

struct DenseCellOptions {
    /// Method, guess, tolerance and the rest. `Guess::given` starts Newton's method from the last trajectory of the
    /// memory (from x_0 where it has none of this shape); `workspace` is not used: the memory has its own.
    Options evaluation = {};
};

/// What a call leaves for the next one. Not for two threads at once.
class DenseCellMemory {
public:
    /// Reports of the last forward and backward pass.
    Report forward, backward;
    Workspace workspace;
    at::Tensor trajectory;  ///< of the last call with Guess::given that converged
};

/// The recurrence of DenseCell, differentiable once with respect to its four tensors.
/// gates: the projected inputs W_ih x_t + b_ih, [steps, batch, gates * hidden], in PyTorch's order of gates; any
/// strides (where the last dimension is contiguous, nothing is copied: [batch,steps,...] transposed will do).
/// weight_hh: [gates * hidden, hidden]; bias_hh: [gates * hidden], or undefined for zeros; initial: x_0,
/// [batch, state_width(kind, hidden)], of an LSTM h and then c. Returns x_1..x_T, [steps, batch, state_width(kind,
/// hidden)], of the gates' type. memory: null for none. Types and devices as in `cell`; the memory's workspace serves
/// tensors on the CPU.
/// A trajectory that does not converge follows evaluation.on_failure; one that is not right (`report`, or non-finite
/// states) has no gradient: backward throws InvalidArgument. Deterministic as `evaluate`.
/// Throws InvalidArgument, OutOfMemory, NotConverged, NoDevice.
at::Tensor dense_cell(DenseCellKind kind, const at::Tensor& gates, const at::Tensor& weight_hh,
                      const at::Tensor& bias_hh, const at::Tensor& initial, const DenseCellOptions& options = {},
                      std::shared_ptr<DenseCellMemory> memory = {});

}  // namespace deeppcr::nn
