// Cell: a recurrence whose channels do not mix in the state (a diagonal or block-diagonal Jacobian), from one channel's
// step as a small functor. Derivatives come from dual numbers; nothing else is to be written by hand.
#pragma once

#include <concepts>
#include <memory>
#include <vector>

#include <deeppcr/cell_device.hpp>
#include <deeppcr/cell_kernels.hpp>
#include <deeppcr/recurrence.hpp>

namespace deeppcr {

/// One channel's step x_t = f(x_{t-1}, u_t, p), a class with only static members, for instance
///
///     struct LeakyTanh {
///         static constexpr int states = 1, inputs = 1, parameters = 2;      // per channel, each at least 1
///         template <class S>
///         static std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 2> p) {
///             auto [a, w] = p;
///             return {(S(1) - a) * x[0] + a * tanh(w * x[0] + u[0])};
///         }
///     };
///
/// `step` is compiled for several S, which compute with float or double, most of them with derivatives: it may use + -
/// * / and the functions of scalar.hpp, without std::. Without branches (max, min instead) it becomes SIMD code.
/// `static constexpr const char* name` is optional.
template <class C>
concept Cell = requires(std::array<Scalar<float>, std::size_t(C::states)> x,
                        std::array<Scalar<float>, std::size_t(C::inputs)> u,
                        std::array<Scalar<float>, std::size_t(C::parameters)> p) {
    { C::step(x, u, p) } -> std::convertible_to<std::array<Scalar<float>, std::size_t(C::states)>>;
};

/// A new sequence begins at step `step` (counted from 0) of row `sequence` of the batch: x before it is an initial
/// state, and nothing of the steps before it remains. Step 0 need not be named, but with Options::group on a rank after
/// the first, where a row goes on from the rank before unless it is.
struct SequenceStart {
    index sequence = 0, step = 0;
};

/// What all CellRecurrences share, whatever their Cell: `evaluate` runs its fused methods on any of them. T is float,
/// double, or, with Backend::cuda alone, bfloat16 or float16: inputs, states and their gradients are stored so, while
/// parameters and all arithmetic are float. The state goes from step to step as a float, and what is stored of it is
/// rounded; initial states, and what a GPU's segments start from (evaluate_boundaries), are rounded numbers.
///
/// Shapes, with C channels and K, G, P states, inputs and parameters per channel:
///   inputs      [steps, batch, G*C], gate after gate, as torch's chunk(G, -1) has them; any strides
///   parameters  [P, 1, C]
///   states      [steps, batch, C*K], channel after channel, its K values side by side
///   initial     [1, parts, C*K]; zeros where empty
/// A row of the batch holds one sequence, or several one after the other (`starts`, sorted by sequence and step):
/// parts() lists them. All views must outlive the recurrence. Time-reversed: pass reversed views of inputs and
/// trajectory.
template <class T>
class ChannelwiseRecurrence : public Recurrence<T> {
public:
    const cell::Kernels<T>& kernels() const { return kernels_; }
    index channels() const { return channels_; }
    View<const T> inputs() const { return inputs_; }
    View<const Arithmetic<T>> parameters() const { return parameters_; }
    const std::vector<SequencePart>& parts() const { return parts_; }
    /// The rows for which `starts` names step 0.
    const std::vector<index>& named_first_steps() const { return named_first_steps_; }
    /// x_0 of a part, [C*K].
    const T* initial_state(index part) const { return initial_.at(0, part); }
    /// x_0 of all parts, as they were given; empty: zeros.
    View<const T> initial_states() const { return zeros_.data() == nullptr ? initial_ : View<const T>(); }

    /// The recurrence of steps first+1 .. last alone, 0 <= first < last <= steps, on the same inputs and parameters.
    /// before: x_first of every row of the batch, [1,batch,width], in, copied; a sequence that begins after it has its
    /// own initial state. execution: with Backend::cuda all is on the current GPU, and copied in its stream.
    std::unique_ptr<ChannelwiseRecurrence> segment(index first, index last, View<const T> before,
                                                   const Execution& execution = {}) const;

    /// The last state of every part, [1, parts, C*K]; its initial state where it has no steps. execution: as above.
    Buffer<T> final_states(View<const T> trajectory, const Execution& execution = {}) const;

    /// The callbacks below are for processors, and for float and double; elsewhere `evaluate` has kernels of its own.
    bool runs_on(Backend backend) const override;

    void initial(const Section& section, View<T> state) const override;
    void step(const Section& section, View<const T> before, View<T> after) const override;
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override;
    void run(const Section& section, View<const T> state, View<T> trajectory) const override;
    /// The Jacobians alone.
    void jacobians(const Section& section, View<const T> before, Jacobian<T> jacobian) const;

protected:
    ChannelwiseRecurrence(const cell::Kernels<T>& kernels, View<const T> inputs, View<const Arithmetic<T>> parameters,
                          View<const T> initial, const std::vector<SequenceStart>& starts);

private:
    const cell::Kernels<T>& kernels_;
    View<const T> inputs_;
    View<const Arithmetic<T>> parameters_;
    View<const T> initial_;
    index channels_;
    std::vector<SequencePart> parts_;
    std::vector<index> named_first_steps_;
    std::vector<index> first_part_;  // of each row of the batch
    Buffer<T> zeros_;
};

/// The recurrence of a Cell over its inputs. Throws InvalidArgument for shapes that do not fit each other.
template <Cell C, class T = float>
class CellRecurrence : public ChannelwiseRecurrence<T> {
public:
    using cell_type = C;
    CellRecurrence(View<const T> inputs, View<const Arithmetic<T>> parameters, View<const T> initial = {},
                   const std::vector<SequenceStart>& starts = {})
        : ChannelwiseRecurrence<T>(cell::kernels_of<C, T>(), inputs, parameters, initial, starts) {}
};

namespace cell {
template <class T>
void decode(const Kernels<T>& kernels, View<const T> inputs, View<const Arithmetic<T>> parameters,
            View<Arithmetic<T>> state, View<T> output, const Execution& execution);
}  // namespace cell

/// One step of every sequence of a batch, as a network that generates takes them. Shapes as in ChannelwiseRecurrence:
///   inputs      [1, batch, G*C], in, any stride
///   parameters  [P, 1, C], in
///   state       [1, batch, C*K], contiguous, in and out: x_{t-1} becomes x_t. Float where T has 16 bits
///   output      [1, batch, C*K], out, any stride: x_t as it is stored. Empty: not wanted
/// The numbers of Method::sequential. With Backend::cuda, all is on the current GPU: one kernel is enqueued in
/// execution.stream and not waited for, nothing is allocated, and the call can be captured in a graph. Throws
/// InvalidArgument.
template <Cell C, class T = float>
void decode(View<const T> inputs, View<const Arithmetic<T>> parameters, View<Arithmetic<T>> state, View<T> output = {},
            const Execution& execution = {}) {
    cell::decode<T>(cell::kernels_of<C, T>(), inputs, parameters, state, output, execution);
}

}  // namespace deeppcr
