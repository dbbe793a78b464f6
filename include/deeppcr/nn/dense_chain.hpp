// dense_chain: a chain of dense layers as an autograd function, evaluated in parallel over its depth or layer by layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include <deeppcr/evaluate.hpp>

namespace deeppcr::nn {

struct DenseChainOptions {
    Activation activation = Activation::tanh;
    index skip = 0;  ///< as in DenseChain: 0 an MLP, s >= 1 residual blocks of s layers
    /// Method, guess, tolerance and the rest. `Guess::given` starts Newton's method from the prediction of the memory
    /// (from x_0 where there is none yet); `workspace` is not used: the memory has its own.
    Options evaluation = {};
    bool whole_trajectory = false;  ///< return x_1..x_T instead of x_T
};

/// What a call leaves for the next one: a prediction of its trajectory, and memory. Not for two threads at once.
class DenseChainMemory {
public:
    /// Reports of the last forward and backward pass.
    Report forward, backward;
    Workspace workspace;

    /// Of the last trajectory: the affine map x_0 -> x_t that fits it best in the least-squares sense, for every t.
    /// It is what `Guess::given` starts from: every training step sees other samples, but nearly the same network.
    /// [steps, width + 1, width]: a matrix and, in the last row, the offset; undefined before the first call.
    at::Tensor prediction;
};

/// The chain of DenseChain, differentiable once with respect to its three tensors.
/// initial: x_0, [batch,width]; weights: [layers, out = width, in = width]; biases: [layers,width]; any strides (those
/// not contiguous are copied). Returns x_T [batch,width], or the trajectory [steps,batch,width], of initial's type.
/// memory: null for none. Types and devices as in `cell`, with initial in the place of its gates; the memory's
/// workspace serves tensors on the CPU. A trajectory that does not converge follows evaluation.on_failure; one that is
/// not right (`report`, or non-finite states) has no gradient: backward throws InvalidArgument. Deterministic as
/// `evaluate`. Throws InvalidArgument, OutOfMemory, NotConverged, NoDevice.
at::Tensor dense_chain(const at::Tensor& initial, const at::Tensor& weights, const at::Tensor& biases,
                       const DenseChainOptions& options, std::shared_ptr<DenseChainMemory> memory = {});

}  // namespace deeppcr::nn
