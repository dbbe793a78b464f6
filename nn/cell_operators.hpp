// `cell` and its backward pass as functions without autograd, for operators that torch.compile can see.
#pragma once

#include <ATen/core/Tensor.h>

#include <deeppcr/nn/cell.hpp>

namespace deeppcr::nn {

struct CellStates {
    at::Tensor states;
    at::Tensor status;  ///< [], 64-bit: the Status, where the states are
};

/// options.recompute does not count. On a GPU nothing waits, but where the options ask for more than OnFailure::finish.
CellStates cell_states(CellKind kind, const at::Tensor& gates, const at::Tensor& parameters, const at::Tensor& initial,
                       const CellOptions& options);

struct CellGradientTensors {
    at::Tensor gates, parameters, initial;
};

/// Gradients of `cell_states`' arguments (of the types that the core stores; that of the initial states also where none
/// are given), like them, from those of its states. states, status: what it returned for the same arguments.
CellGradientTensors cell_gradients(CellKind kind, const at::Tensor& gates, const at::Tensor& parameters,
                                   const at::Tensor& initial, const at::Tensor& states, const at::Tensor& status,
                                   const at::Tensor& output_gradient, const CellOptions& options);

}  // namespace deeppcr::nn
