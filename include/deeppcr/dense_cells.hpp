// DenseCell: recurrent layers with a full recurrent matrix (Elman, GRU, LSTM), as recurrences over time.
#pragma once

#include <deeppcr/recurrence.hpp>

namespace deeppcr {

namespace dense_cell {
template <class T>
struct Cell;
}

enum class DenseCellKind { elman_tanh, elman_relu, gru, lstm };

/// Gates of a cell: 1 (Elman), 3 (GRU: r, z, n) or 4 (LSTM: i, f, g, o), in PyTorch's order.
constexpr index gate_count(DenseCellKind kind) {
    return kind == DenseCellKind::lstm ? 4 : kind == DenseCellKind::gru ? 3 : 1;
}
/// Numbers per state of a cell of `hidden` units: 2 * hidden for an LSTM (h, then c), else hidden.
constexpr index state_width(DenseCellKind kind, index hidden) {
    return kind == DenseCellKind::lstm ? 2 * hidden : hidden;
}

/// One direction of one recurrent layer with PyTorch's equations and weights, over steps t = 1..T. With u_t the inputs
/// of the gates, s the logistic function and * elementwise (an index names a gate's part of u, W and b):
///   Elman   h_t = tanh(u + W h + b), or relu
///   GRU     r = s(u_r + W_r h + b_r), z = s(u_z + W_z h + b_z), n = tanh(u_n + r * (W_n h + b_n)),
///           h_t = (1 - z) * n + z * h
///   LSTM    i = s(u_i + W_i h + b_i), f = s(u_f + W_f h + b_f), g = tanh(u_g + W_g h + b_g),
///           o = s(u_o + W_o h + b_o), c_t = f * c + i * g, h_t = o * tanh(c_t)
/// where h and c on the right are those of step t - 1. The state is h; of an LSTM, h and then c. The Jacobian is dense.
/// A hidden unit's number does not depend on the batch, the section, the number of threads or which callback computes
/// it. All arrays are views: they must outlive the cell. All lie in main memory, where the weights are packed once, at
/// construction, or all on the current GPU, where the weights are contiguous and used as they are, and the cell runs
/// with Backend::cuda; a cell is immutable. On a GPU the callbacks enqueue their work in section.execution.stream.
/// Source: documentation of torch.nn.RNN, torch.nn.GRU and torch.nn.LSTM, PyTorch 1.13.
template <class T>
class DenseCell : public Recurrence<T> {
public:
    /// inputs: u = W_ih x_t + b_ih, [steps, batch, gates * hidden], any strides; weights: W_hh, one matrix per gate,
    /// [gates, out = hidden, in = hidden], which is the memory of PyTorch's [gates * hidden, hidden]; biases: b_hh,
    /// [gates, 1, hidden]; initial: x_0, [1, batch, state_width(kind, hidden)]. All in. Throws InvalidArgument.
    DenseCell(DenseCellKind kind, View<const T> inputs, View<const T> weights, View<const T> biases,
              View<const T> initial);

    DenseCellKind kind() const { return kind_; }
    index hidden() const { return weights_.width(); }
    index gates() const { return weights_.steps(); }
    /// Where the weights lie.
    bool runs_on(Backend backend) const override { return (backend == Backend::cuda) == on_gpu_; }

    void initial(const Section& section, View<T> state) const override;
    void step(const Section& section, View<const T> before, View<T> after) const override;
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override;
    void linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                            Jacobian<T> diagonal) const override;
    /// Fused: product, gates and new state of each step in one pass over the packed weights. Threads share the
    /// sequences, or, where the sequences are few or the weights exceed a core's cache, the hidden units.
    void run(const Section& section, View<const T> state, View<T> trajectory) const override;
    bool run_chunks(const Section& section, const Chunks<T>& chunks) const override;

    /// Gradients of the parameters from the adjoint states: given before = x_{t-1} and adjoint = dL/dx_t of the steps
    /// of `section`, both [steps,batch,width], writes those of the inputs [steps, batch, gates * hidden] and ADDS those
    /// of weights [gates,hidden,hidden] and biases [gates,1,hidden], as sections share them. All contiguous. Sums over
    /// steps and sequences run in a fixed order: the same bits for every thread count.
    void parameter_gradients(const Section& section, View<const T> before, View<const T> adjoint, View<T> inputs,
                             View<T> weights, View<T> biases) const;

    /// Backward pass, sequential and fused: the baseline of `adjoint`. output_gradient [steps,batch,width]: the loss'
    /// own gradient with respect to each x_t; state [1,batch,width], in: what steps after the section pass back (zeros
    /// at the end), out: dL/dx before the section's first step. The rest as in `parameter_gradients`.
    void run_backward(const Section& section, View<const T> before, View<const T> output_gradient, View<T> inputs,
                      View<T> weights, View<T> biases, View<T> state) const;

private:
    dense_cell::Cell<T> cell() const;

    DenseCellKind kind_;
    View<const T> inputs_, weights_, biases_, initial_;
    bool on_gpu_;
    Buffer<T> packed_;
};

}  // namespace deeppcr
