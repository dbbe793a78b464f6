// How much a cell's steps let disturbances grow, as a number that can be trained to be small.
#pragma once

#include <ATen/core/Tensor.h>

#include <deeppcr/nn/cell_kind.hpp>
#include <deeppcr/nn/recurrent.hpp>

namespace deeppcr::nn {

/// The mean over windows of w = 16 steps, sequences and channels of
///     max(0, log(|J_w .. J_1| / sqrt(K)) / w - rate)
/// where J_t is the K x K Jacobian of a channel's step t in its state and |.| Frobenius' norm: by how much the rate per
/// step at which a random disturbance of the state grows over a window (below 0: dies out) exceeds `rate`. Windows
/// follow one another from the first step; a rest below 16 steps counts where it is all there is, in windows of a power
/// of two. Jacobians come from the cells' own equations. Differentiable in all tensors, once: also by what the states
/// depend on. A scalar. layer: one direction that ran forward in time, each row one sequence. rate: finite.
at::Tensor jacobian_growth(CellKind kind, const CellTensors& layer, double rate);

}  // namespace deeppcr::nn
