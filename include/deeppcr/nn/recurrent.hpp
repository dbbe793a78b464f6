// ParaGRU, ParaLSTM, SLSTM, Elman: recurrent layers as modules, in the manner of torch::nn::GRU, evaluated in parallel
// over time. Channels do not mix in the state, only in the projection of each layer's inputs.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/nn/utils/rnn.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include <deeppcr/nn/cell.hpp>

namespace deeppcr::nn {

struct RecurrentOptions {
    RecurrentOptions(index input_count, index hidden_count) : inputs_(input_count), hidden_(hidden_count) {}

    TORCH_ARG(index, inputs);  ///< numbers per step that enter the first layer
    TORCH_ARG(index, hidden);  ///< channels of every layer and direction
    /// The projection is block diagonal: inputs and channels are cut into as many equal parts, each for itself.
    TORCH_ARG(index, heads) = 1;
    TORCH_ARG(index, layers) = 1;
    TORCH_ARG(bool, bidirectional) = false;
    TORCH_ARG(bool, batch_first) = true;  ///< inputs [batch,steps,inputs]; else [steps,batch,inputs]
    TORCH_ARG(double, dropout) = 0;       ///< of the outputs of all layers but the last, while training
    /// Of the initial parameters: a generator of the module's own; without it, LibTorch's global one.
    TORCH_ARG(std::optional<std::uint64_t>, seed) = {};
    TORCH_ARG(Options, evaluation) = {};  ///< as in CellOptions
    /// Whether reports() tells of a call; unset: on processors. On a GPU the host would wait for that, layer by layer.
    TORCH_ARG(std::optional<bool>, reports) = {};
};
using ParaGRUOptions = RecurrentOptions;
using ParaLSTMOptions = RecurrentOptions;
using SLSTMOptions = RecurrentOptions;
using ElmanOptions = RecurrentOptions;

/// What a layer's cell has computed with, in one direction: as in `cell`. Steps come first.
struct CellTensors {
    at::Tensor gates, parameters, initial, states;
};

/// How `recurrent` reads its tensors.
struct RecurrentCall {
    bool bidirectional = false;
    bool batch_first = true;  ///< of input and output; not for packed input
    at::Tensor batch_sizes;   ///< of a PackedSequence, whose data are the input; undefined: not packed
    double dropout = 0;       ///< 0 unless training
    Options evaluation = {};
    std::vector<Report>* reports = nullptr;     ///< receives one per layer and direction, where not null (see `cell`)
    std::vector<CellTensors>* cells = nullptr;  ///< likewise
};

/// What the modules compute, from their parameters: {output, last}, differentiable once.
/// input: [batch,steps,inputs], [steps,batch,inputs], or [numbers of all steps, inputs] where packed. weights: for each
/// layer and direction weight_ih [gates * hidden, inputs / heads], bias_ih [gates * hidden] and the cell's parameters
/// [parameters, hidden]; gate after gate, as in torch::nn::GRU. Row g * hidden + c of weight_ih takes the inputs of
/// head c / (hidden / heads). initial: [layers * directions, batch, hidden * states], or undefined for zeros. output:
/// like the input, with hidden numbers per direction: the cell's h. last: like initial, the whole state after each
/// sequence's last step (of the reversed direction: its first), channel after channel, the cell's states side by side.
/// Packed sequences count in the order of the packed data. Each runs as one of several sequences in one row: no step of
/// padding is computed. All of one type and device, as in `cell`; under autocast, float and numbers of 16 bits may come
/// together: the projections run in autocast's type, and the cells read and write it. batch_sizes: on the CPU.
/// Deterministic as `cell`. Throws InvalidArgument, OutOfMemory, NotConverged, NoDevice.
std::tuple<at::Tensor, at::Tensor> recurrent(CellKind kind, const at::Tensor& input,
                                             const std::vector<at::Tensor>& weights, const at::Tensor& initial,
                                             const RecurrentCall& call);

/// What all recurrent modules share. Parameters, for layer k: weight_ih_l{k}, bias_ih_l{k}, parameters_l{k} (see
/// `recurrent`), and the same with the suffix _reverse where bidirectional. Initially weights are uniform within
/// +-1 / sqrt(inputs / heads), biases 0 but 1 for an LSTM's forget gate, and the cell's parameters normal with standard
/// deviation 1/2: contractive with inputs of unit size, so that evaluation in parallel pays.
template <class Derived>
class RecurrentImpl : public torch::nn::Cloneable<Derived> {
public:
    /// Throws InvalidArgument.
    RecurrentImpl(CellKind cell_kind, std::string cell_name, const RecurrentOptions& recurrent_options);

    /// {output, last}; see `recurrent`. `last` goes back in as `initial`: a sequence may be continued, by one step too.
    std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& input, const at::Tensor& initial = {});
    /// The same for sequences of different lengths; initial and last in the caller's order of sequences.
    std::tuple<torch::nn::utils::rnn::PackedSequence, at::Tensor> forward_with_packed_input(
        const torch::nn::utils::rnn::PackedSequence& input, const at::Tensor& initial = {});

    void reset() override;
    void pretty_print(std::ostream& stream) const override;

    /// What the last call did, for each layer and direction; none unless options.reports() has it so.
    const std::vector<Report>& reports() const { return reports_; }

    RecurrentOptions options;  ///< `evaluation`, `dropout`, `batch_first` and `reports` may be changed between calls

private:
    RecurrentCall call(const at::Tensor& input);
    CellKind kind_;
    std::string name_;
    std::vector<at::Tensor> weights_;
    std::vector<Report> reports_;
};

/// h' = (1 - z) h + z tanh(a_h r h + u_h), diagonal: the equations are deeppcr::ParaGRU's.
class ParaGRUImpl : public RecurrentImpl<ParaGRUImpl> {
public:
    explicit ParaGRUImpl(const ParaGRUOptions& chosen) : RecurrentImpl(CellKind::para_gru, "ParaGRU", chosen) {}
};
TORCH_MODULE(ParaGRU);

/// States c, h per channel, coupled gates and peepholes: the equations are deeppcr::ParaLSTM's.
class ParaLSTMImpl : public RecurrentImpl<ParaLSTMImpl> {
public:
    explicit ParaLSTMImpl(const ParaLSTMOptions& chosen) : RecurrentImpl(CellKind::para_lstm, "ParaLSTM", chosen) {}
};
TORCH_MODULE(ParaLSTM);

/// States c, n, m, h per channel, exponential gates: the equations are deeppcr::SLSTM's.
class SLSTMImpl : public RecurrentImpl<SLSTMImpl> {
public:
    explicit SLSTMImpl(const SLSTMOptions& chosen) : RecurrentImpl(CellKind::slstm, "SLSTM", chosen) {}
};
TORCH_MODULE(SLSTM);

/// h' = tanh(a h + u), diagonal: deeppcr::DiagonalElman.
class ElmanImpl : public RecurrentImpl<ElmanImpl> {
public:
    explicit ElmanImpl(const ElmanOptions& chosen) : RecurrentImpl(CellKind::diagonal_elman, "Elman", chosen) {}
};
TORCH_MODULE(Elman);

}  // namespace deeppcr::nn
