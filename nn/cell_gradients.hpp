// The backward pass of `cell` as a function, for operators that torch.compile can see.
#pragma once

#include <ATen/core/Tensor.h>

#include <deeppcr/nn/cell.hpp>

namespace deeppcr::nn {

struct CellGradientTensors {
    at::Tensor gates, parameters, initial;
};

/// Gradients of `cell`'s arguments (of the types that the core stores; that of the initial states also where none are
/// given), like them, from those of its states. states, status: what `cell` returned and reported for the same
/// arguments. options.recompute does not count.
CellGradientTensors cell_gradients(CellKind kind, const at::Tensor& gates, const at::Tensor& parameters,
                                   const at::Tensor& initial, const at::Tensor& states, Status status,
                                   const at::Tensor& output_gradient, const CellOptions& options);

}  // namespace deeppcr::nn
