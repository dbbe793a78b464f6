#include <deeppcr/nn/recurrent.hpp>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <utility>

#include "nn/tensors.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;
using torch::nn::utils::rnn::PackedSequence;

constexpr std::size_t weights_per_direction = 3;

/// Packed data, whose rows are ordered by step and then sequence, laid out sequence after sequence.
struct Layout {
    Layout(const Tensor& batch_sizes, at::Device device) {
        const Tensor sizes = batch_sizes.contiguous();
        const auto* const running = sizes.data_ptr<std::int64_t>();  // sequences that have a step t
        const index steps = sizes.size(0);
        sequences = running[0];
        std::vector<std::int64_t> row(std::size_t(steps + 1), 0);
        for (index t = 0; t < steps; ++t) row[std::size_t(t + 1)] = row[std::size_t(t)] + running[t];
        std::vector<std::int64_t> from, back(std::size_t(row.back()));
        for (index j = 0; j < sequences; ++j) {
            begins.push_back(index(from.size()));
            for (index t = 0; t < steps && running[t] > j; ++t) {
                back[std::size_t(row[std::size_t(t)] + j)] = std::int64_t(from.size());
                from.push_back(row[std::size_t(t)] + j);
            }
            ends.push_back(index(from.size()));
        }
        laid_out = indices(from, device);
        packed = indices(back, device);
    }

    /// Enqueued, not waited for: what the vector holds has been read when it returns.
    static Tensor indices(const std::vector<std::int64_t>& rows, at::Device device) {
        return at::tensor(rows, at::kLong).to(device, /*non_blocking=*/true);
    }

    /// Where sequences begin in the one row that holds them all, from its first step or from its last.
    std::vector<SequenceStart> starts(bool reversed) const {
        std::vector<SequenceStart> result;
        for (index j = 1; j < sequences; ++j)
            result.push_back({0, reversed ? ends.back() - begins[std::size_t(sequences - j)] : begins[std::size_t(j)]});
        return result;
    }

    index sequences = 0;
    std::vector<index> begins, ends;
    Tensor laid_out, packed;  // permutations of the rows
};

/// [..., gates * hidden] of [..., inputs].
Tensor project(const Tensor& input, const Tensor& weight, const Tensor& bias, index gates) {
    const index heads = input.size(-1) / weight.size(1);
    if (heads == 1) return at::linear(input, weight, bias);
    const index hidden = weight.size(0) / gates, rows = input.numel() / input.size(-1);
    const Tensor parts = input.reshape({rows, heads, -1}).transpose(0, 1);
    const Tensor blocks = weight.view({gates, heads, hidden / heads, -1}).permute({1, 3, 0, 2});
    const Tensor products = at::bmm(parts, blocks.reshape({heads, -1, gates * hidden / heads}));
    auto sizes = input.sizes().vec();
    sizes.back() = gates * hidden;
    return products.view({heads, rows, gates, hidden / heads}).permute({1, 2, 0, 3}).reshape(sizes) +
           bias.to(products.scalar_type());
}

struct Result {
    Tensor hidden, last;
};

/// One direction of one layer. gates: [steps,batch,...]; initial: [sequences, ...] or undefined. layout: of packed
/// sequences in one row, or null.
Result run_direction(CellKind kind, const Tensor& gates, const Tensor& parameters, Tensor initial, bool reversed,
                     const Layout* layout, const RecurrentCall& call) {
    CellOptions options;
    options.evaluation = call.evaluation;
    options.reversed = reversed;
    if (layout != nullptr) {
        options.starts = layout->starts(reversed);
        if (reversed && initial.defined()) initial = initial.flip(0);
    }
    Report report;
    const Tensor states = cell(kind, gates, parameters, initial, options, call.reports != nullptr ? &report : nullptr);
    if (call.reports != nullptr) call.reports->push_back(std::move(report));
    if (call.cells != nullptr) call.cells->push_back({gates, parameters, initial, states});
    Result result;
    if (layout != nullptr) {
        std::vector<std::int64_t> rows;
        for (std::size_t j = 0; j < layout->begins.size(); ++j)
            rows.push_back(reversed ? layout->begins[j] : layout->ends[j] - 1);
        result.last = states.select(1, 0).index_select(0, Layout::indices(rows, states.device()));
    } else {
        result.last = states.select(0, reversed ? 0 : states.size(0) - 1);
    }
    const index values = sizes_of(kind).states;
    result.hidden = states.view({states.size(0), states.size(1), -1, values}).select(3, values - 1);
    return result;
}

bool is_autocast_on(at::Device device) {
    return !c10::impl::tls_is_dispatch_key_excluded(
        at::autocast::get_autocast_dispatch_key_from_device_type(device.type()));
}

/// As `require`; under autocast, which casts them, float and numbers of 16 bits may come together.
void require_weight(const std::string& name, const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type,
                    at::Device device) {
    const auto is_cast = [](at::ScalarType given) { return given == at::kFloat || is_16_bit(given); };
    const bool mixed = tensor.defined() && is_autocast_on(device) && is_cast(type) && is_cast(tensor.scalar_type());
    require(name.c_str(), tensor, sizes, mixed ? tensor.scalar_type() : type, device);
}

void check_weights(CellKind kind, const std::vector<Tensor>& weights, std::size_t directions, index inputs,
                   at::ScalarType type, at::Device device) {
    const std::size_t per_layer = weights_per_direction * directions;
    if (weights.empty() || weights.size() % per_layer != 0)
        throw InvalidArgument("weights", "a multiple of " + std::to_string(per_layer) + " tensors, at least one",
                              std::to_string(weights.size()));
    const CellSizes sizes = sizes_of(kind);
    const Tensor& first = weights[0];
    if (!first.defined() || first.dim() != 2 || first.size(0) < sizes.inputs || first.size(0) % sizes.inputs != 0 ||
        first.size(1) < 1 || inputs % first.size(1) != 0)
        throw InvalidArgument("weights[0]",
                              "[" + std::to_string(sizes.inputs) + " * hidden, " + std::to_string(inputs) +
                                  " / heads] for an input of " + std::to_string(inputs) + " numbers per step",
                              describe(first));
    const index hidden = first.size(0) / sizes.inputs, heads = inputs / first.size(1);
    if (hidden % heads != 0)
        throw InvalidArgument("weights[0]", "a number of heads that divides hidden = " + std::to_string(hidden),
                              std::to_string(heads) + " heads");
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const std::string name = "weights[" + std::to_string(i) + "]";
        const index width = i < per_layer ? inputs : hidden * index(directions);
        switch (i % weights_per_direction) {
            case 0:
                require_weight(name, weights[i], {sizes.inputs * hidden, width / heads}, type, device);
                break;
            case 1:
                require_weight(name, weights[i], {sizes.inputs * hidden}, type, device);
                break;
            default:
                require_weight(name, weights[i], {sizes.parameters, hidden}, type, device);
        }
    }
}

void check_batch_sizes(const Tensor& batch_sizes, index rows) {
    const auto fail = [&](const std::string& actual) {
        throw InvalidArgument("batch_sizes",
                              "those of a PackedSequence of " + std::to_string(rows) +
                                  " rows: int64 [steps], at least 1 each, not increasing",
                              actual);
    };
    if (batch_sizes.dim() != 1 || batch_sizes.scalar_type() != at::kLong || !batch_sizes.device().is_cpu() ||
        batch_sizes.size(0) < 1)
        fail(describe(batch_sizes));
    const Tensor sizes = batch_sizes.contiguous();
    const auto* const running = sizes.data_ptr<std::int64_t>();
    std::int64_t sum = 0, before = rows;
    for (index t = 0; t < sizes.size(0); ++t) {
        if (running[t] < 1 || running[t] > before) fail(std::to_string(running[t]) + " at step " + std::to_string(t));
        before = running[t];
        sum += running[t];
        if (sum > rows) break;
    }
    if (sum != rows) fail("a sum of " + std::to_string(sum));
}

}  // namespace

std::tuple<Tensor, Tensor> recurrent(CellKind kind, const Tensor& input, const std::vector<Tensor>& weights,
                                     const Tensor& initial, const RecurrentCall& call) {
    const CellSizes sizes = sizes_of(kind);
    const bool is_packed = call.batch_sizes.defined();
    const index dimensions = is_packed ? 2 : 3;
    if (!input.defined() || input.dim() != dimensions || input.numel() == 0 || !is_real(input.scalar_type()) ||
        !is_on_cpu_or_cuda(input))
        throw InvalidArgument("input",
                              std::string("float, double, bfloat16 or float16 ") +
                                  (is_packed          ? "[rows,inputs]"
                                   : call.batch_first ? "[batch,steps,inputs]"
                                                      : "[steps,batch,inputs]") +
                                  " on the CPU or a GPU, at least one of each",
                              describe(input));
    if (!(call.dropout >= 0 && call.dropout <= 1))
        throw InvalidArgument("dropout", "0 to 1", std::to_string(call.dropout));
    const std::size_t directions = call.bidirectional ? 2 : 1;
    const auto type = input.scalar_type();
    const at::Device device = input.device();
    check_weights(kind, weights, directions, input.size(-1), type, device);
    const index hidden = weights[2].size(1), layers = index(weights.size() / (weights_per_direction * directions));

    std::optional<Layout> layout;
    Tensor signal = input;
    if (is_packed) {
        check_batch_sizes(call.batch_sizes, input.size(0));
        layout.emplace(call.batch_sizes, device);
        signal = input.index_select(0, layout->laid_out).unsqueeze(1);
    }
    // The first projection reads the input as it lies; from the gates on, steps come first.
    const bool transposed = !is_packed && call.batch_first;
    const index sequences = is_packed ? layout->sequences : input.size(transposed ? 0 : 1);
    if (initial.defined())
        require_weight("initial", initial, {layers * index(directions), sequences, hidden * sizes.states}, type,
                       device);
    if (call.reports != nullptr) call.reports->clear();
    if (call.cells != nullptr) call.cells->clear();
    std::vector<Tensor> last;
    for (index layer = 0; layer < layers; ++layer) {
        std::vector<Tensor> outputs;
        for (std::size_t direction = 0; direction < directions; ++direction) {
            const std::size_t at = (std::size_t(layer) * directions + direction) * weights_per_direction;
            Tensor gates = project(signal, weights[at], weights[at + 1], sizes.inputs);
            if (transposed && layer == 0) gates = gates.transpose(0, 1);
            const Tensor start = initial.defined() ? initial[index(last.size())].to(gates.scalar_type()) : Tensor();
            const Result result =
                run_direction(kind, gates, weights[at + 2], start, direction == 1, layout ? &*layout : nullptr, call);
            outputs.push_back(result.hidden);
            last.push_back(result.last);
        }
        signal = directions == 1 ? outputs[0] : at::cat(outputs, 2);
        if (call.dropout > 0 && layer + 1 < layers) signal = at::dropout(signal, call.dropout, true);
    }
    const Tensor output = is_packed    ? signal.select(1, 0).index_select(0, layout->packed)
                          : transposed ? signal.transpose(0, 1)
                                       : signal;
    return {output, at::stack(last)};
}

template <class Derived>
RecurrentImpl<Derived>::RecurrentImpl(CellKind cell_kind, std::string cell_name,
                                      const RecurrentOptions& recurrent_options)
    : options(recurrent_options), kind_(cell_kind), name_(std::move(cell_name)) {
    reset();
}

template <class Derived>
void RecurrentImpl<Derived>::reset() {
    const auto at_least_one = [](const char* argument, index value) {
        if (value < 1) throw InvalidArgument(argument, "at least 1", std::to_string(value));
    };
    at_least_one("inputs", options.inputs());
    at_least_one("hidden", options.hidden());
    at_least_one("heads", options.heads());
    at_least_one("layers", options.layers());
    const index hidden = options.hidden(), heads = options.heads();
    for (const auto& [argument, value] : {std::pair{"inputs", options.inputs()}, {"hidden", hidden}})
        if (value % heads != 0)
            throw InvalidArgument(argument, "a multiple of heads = " + std::to_string(heads), std::to_string(value));
    if (!(options.dropout() >= 0 && options.dropout() <= 1))
        throw InvalidArgument("dropout", "0 to 1", std::to_string(options.dropout()));

    c10::optional<at::Generator> generator;
    if (options.seed()) generator = at::make_generator<at::CPUGeneratorImpl>(*options.seed());
    const CellSizes sizes = sizes_of(kind_);
    weights_.clear();
    for (index layer = 0; layer < options.layers(); ++layer)
        for (const char* suffix : {"", "_reverse"}) {
            if (*suffix != '\0' && !options.bidirectional()) continue;
            const index inputs = layer == 0 ? options.inputs() : hidden * (options.bidirectional() ? 2 : 1);
            const double bound = 1 / std::sqrt(double(inputs / heads));
            const std::string name = "_l" + std::to_string(layer) + suffix;
            const Tensor weight = at::empty({sizes.inputs * hidden, inputs / heads}).uniform_(-bound, bound, generator);
            Tensor bias = at::zeros({sizes.inputs * hidden});
            // ParaLSTM's gates are f, o, c; the sLSTM's i, f, z, o.
            if (kind_ == CellKind::para_lstm) bias.slice(0, 0, hidden).fill_(1);
            if (kind_ == CellKind::slstm) bias.slice(0, hidden, 2 * hidden).fill_(1);
            const Tensor parameters = at::empty({sizes.parameters, hidden}).normal_(0, 0.5, generator);
            weights_.push_back(this->register_parameter("weight_ih" + name, weight));
            weights_.push_back(this->register_parameter("bias_ih" + name, bias));
            weights_.push_back(this->register_parameter("parameters" + name, parameters));
        }
}

template <class Derived>
RecurrentCall RecurrentImpl<Derived>::call(const Tensor& input) {
    RecurrentCall result;
    result.bidirectional = options.bidirectional();
    result.batch_first = options.batch_first();
    result.dropout = this->is_training() ? options.dropout() : 0;
    result.evaluation = options.evaluation();
    reports_.clear();
    if (options.reports().value_or(!input.is_cuda())) result.reports = &reports_;
    return result;
}

template <class Derived>
std::tuple<Tensor, Tensor> RecurrentImpl<Derived>::forward(const Tensor& input, const Tensor& initial) {
    return recurrent(kind_, input, weights_, initial, call(input));
}

template <class Derived>
std::tuple<PackedSequence, Tensor> RecurrentImpl<Derived>::forward_with_packed_input(const PackedSequence& input,
                                                                                     const Tensor& initial) {
    RecurrentCall packed = call(input.data());
    packed.batch_sizes = input.batch_sizes();
    const Tensor &sorted = input.sorted_indices(), &unsorted = input.unsorted_indices();
    const Tensor start = initial.defined() && sorted.defined() ? initial.index_select(1, sorted) : initial;
    const auto [output, last] = recurrent(kind_, input.data(), weights_, start, packed);
    return {PackedSequence(output, input.batch_sizes(), sorted, unsorted),
            unsorted.defined() ? last.index_select(1, unsorted) : last};
}

template <class Derived>
void RecurrentImpl<Derived>::pretty_print(std::ostream& stream) const {
    stream << "deeppcr::nn::" << name_ << "(" << options.inputs() << ", " << options.hidden();
    if (options.heads() > 1) stream << ", heads=" << options.heads();
    if (options.layers() > 1) stream << ", layers=" << options.layers();
    if (options.bidirectional()) stream << ", bidirectional";
    if (!options.batch_first()) stream << ", steps first";
    if (options.dropout() > 0) stream << ", dropout=" << options.dropout();
    stream << ")";
}

template class RecurrentImpl<ParaGRUImpl>;
template class RecurrentImpl<ParaLSTMImpl>;
template class RecurrentImpl<SLSTMImpl>;
template class RecurrentImpl<ElmanImpl>;

}  // namespace deeppcr::nn
