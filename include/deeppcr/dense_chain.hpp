// DenseChain: multilayer perceptrons and residual networks, as a recurrence over their depth.
#pragma once

#include <deeppcr/recurrence.hpp>

namespace deeppcr {

namespace chain {
template <class T>
struct Network;
}

enum class Activation { identity, tanh, relu, sigmoid, gelu };  ///< gelu is the exact one, z Phi(z)

/// A network of `layers` dense layers of equal width, read as a recurrence over depth (arXiv 2309.16318, 4.1-4.2).
///   skip 0 (MLP):       x_t = activation(W_t x_{t-1} + b_t), one step per layer
///   skip s >= 1:        x_t = x_{t-1} + layer_{ts}( ... layer_{ts-s+1}(x_{t-1})), one step per residual block of s
///                       layers; the number of layers must be a multiple of s
/// where layer(x) = activation(W x + b). The Jacobian is dense.
/// Weights, biases and initial state are views: they must outlive the chain. All lie in main memory, where the weights
/// are packed once, at construction, or all on the current GPU, where they are used as they are and the chain runs with
/// Backend::cuda; a chain is immutable. On a GPU the callbacks enqueue their work in section.execution.stream.
template <class T>
class DenseChain : public Recurrence<T> {
public:
    struct Options {
        Activation activation = Activation::tanh;
        index skip = 0;
    };

    /// weights: [layers, out = width, in = width], torch.nn.Linear's layout; biases: [layers,1,width];
    /// initial: x_0, [1,batch,width]. All in. Throws InvalidArgument.
    DenseChain(View<const T> weights, View<const T> biases, View<const T> initial, const Options& options);

    index layers() const { return weights_.steps(); }
    const Options& options() const { return options_; }
    /// Where the weights lie.
    bool runs_on(Backend backend) const override { return (backend == Backend::cuda) == on_gpu_; }

    void initial(const Section& section, View<T> state) const override;
    void step(const Section& section, View<const T> before, View<T> after) const override;
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override;
    void linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                            Jacobian<T> diagonal) const override;
    /// Fused: all layers for a cache-resident group of sequences in one pass over the weights.
    void run(const Section& section, View<const T> state, View<T> trajectory) const override;
    bool run_chunks(const Section& section, const Chunks<T>& chunks) const override;

    /// As `run`, and the slope activation'(z) of every layer, [steps * max(skip,1), batch, width], out: what a
    /// backward pass needs and would otherwise have to compute again.
    void run_with_slopes(const Section& section, View<const T> state, View<T> trajectory, View<T> slopes) const;

    /// Gradients of the parameters from the adjoint states: given before = x_{t-1} and adjoint = dL/dx_t for the steps
    /// of `section`, writes the weights' and biases' gradients of those steps' layers (not accumulating):
    /// weights [steps * max(skip,1), width, width], biases [steps * max(skip,1), 1, width], out. Sums over the
    /// sequences run in a fixed order: the same bits for every thread count.
    void parameter_gradients(const Section& section, View<const T> before, View<const T> adjoint, View<T> weights,
                             View<T> biases) const;

    /// Backward pass, sequential and fused: the baseline of `adjoint`. From before = x_{t-1}, the slopes that
    /// `run_with_slopes` wrote (empty: computed again) and output_gradient = the loss' own gradient with respect to
    /// each x_t, all [steps,batch,width], writes the parameters' gradients as `parameter_gradients` does, the adjoint
    /// states dL/dx_t (empty: not wanted) and dL/dx_0 [1,batch,width].
    void run_backward(const Section& section, View<const T> before, View<const T> slopes, View<const T> output_gradient,
                      View<T> weights, View<T> biases, View<T> adjoint, View<T> initial) const;

private:
    chain::Network<T> network() const;

    View<const T> weights_, biases_, initial_;
    Options options_;
    bool on_gpu_;
    Buffer<T> packed_;  // biases and transposed weights, layer after layer, in the order in which kernels read them
};

}  // namespace deeppcr
