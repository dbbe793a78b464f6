// torch.ops.deeppcr.*: what Python (or TorchScript) gets by loading libdeeppcr_nn.so. Each is differentiable.
//
// Of a cell, forward and backward are one operation each, _cell and _cell_backward, with kernels that know the shapes
// alone: what torch.compile needs to trace a network with cells in it. The other operations stop its tracing.
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <deeppcr/nn/cell.hpp>
#include <deeppcr/nn/dense_cell.hpp>
#include <deeppcr/nn/dense_chain.hpp>
#include <deeppcr/nn/names.hpp>
#include <deeppcr/nn/recurrent.hpp>

#include "nn/cell_operators.hpp"
#include "nn/tensors.hpp"

namespace {

using at::Tensor;
using namespace deeppcr::nn;

constexpr Names<deeppcr::DenseCellKind, 4> dense_names{{{"elman_tanh", deeppcr::DenseCellKind::elman_tanh},
                                                        {"elman_relu", deeppcr::DenseCellKind::elman_relu},
                                                        {"gru", deeppcr::DenseCellKind::gru},
                                                        {"lstm", deeppcr::DenseCellKind::lstm}}};

constexpr Names<CellKind, 4> cell_names{{{"para_gru", CellKind::para_gru},
                                         {"para_lstm", CellKind::para_lstm},
                                         {"diagonal_elman", CellKind::diagonal_elman},
                                         {"slstm", CellKind::slstm}}};

CellOptions cell_options(bool reversed) {
    CellOptions options;
    options.reversed = reversed;
    return options;
}

/// states, and the Status of the evaluation [], 64-bit.
using CellForward = std::tuple<Tensor, Tensor>(int64_t kind, const Tensor& gates, const Tensor& parameters,
                                               const c10::optional<Tensor>& initial, bool reversed);
/// Gradients of gates, parameters and initial states (also where none were given).
using CellBackward = std::tuple<Tensor, Tensor, Tensor>(int64_t kind, const Tensor& gates, const Tensor& parameters,
                                                        const c10::optional<Tensor>& initial, const Tensor& states,
                                                        const Tensor& status, const Tensor& output_gradient,
                                                        bool reversed);

template <class Signature>
c10::TypedOperatorHandle<Signature> operation(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
const auto& forward_operation() {
    static const auto found = operation<CellForward>("deeppcr::_cell");
    return found;
}
const auto& backward_operation() {
    static const auto found = operation<CellBackward>("deeppcr::_cell_backward");
    return found;
}

std::tuple<Tensor, Tensor> run_cell(int64_t kind, const Tensor& gates, const Tensor& parameters,
                                    const c10::optional<Tensor>& initial, bool reversed) {
    const CellStates found =
        cell_states(CellKind(kind), gates, parameters, initial.value_or(Tensor()), cell_options(reversed));
    return {found.states, found.status};
}

std::tuple<Tensor, Tensor, Tensor> run_cell_backward(int64_t kind, const Tensor& gates, const Tensor& parameters,
                                                     const c10::optional<Tensor>& initial, const Tensor& states,
                                                     const Tensor& status, const Tensor& output_gradient,
                                                     bool reversed) {
    const auto gradients = cell_gradients(CellKind(kind), gates, parameters, initial.value_or(Tensor()), states, status,
                                          output_gradient, cell_options(reversed));
    return {gradients.gates, gradients.parameters, gradients.initial};
}

c10::SymInt state_width(int64_t kind, const Tensor& parameters) {
    return parameters.sym_size(1) * sizes_of(CellKind(kind)).states;
}

std::tuple<Tensor, Tensor> shape_cell(int64_t kind, const Tensor& gates, const Tensor& parameters,
                                      const c10::optional<Tensor>&, bool) {
    return {at::empty_symint({gates.sym_size(0), gates.sym_size(1), state_width(kind, parameters)}, gates.options()),
            at::empty({}, gates.options().dtype(at::kLong))};
}

std::tuple<Tensor, Tensor, Tensor> shape_cell_backward(int64_t kind, const Tensor& gates, const Tensor& parameters,
                                                       const c10::optional<Tensor>&, const Tensor&, const Tensor&,
                                                       const Tensor&, bool) {
    return {at::empty_like(gates, at::MemoryFormat::Contiguous),
            at::empty_like(parameters, at::MemoryFormat::Contiguous),
            at::empty_symint({gates.sym_size(1), state_width(kind, parameters)}, gates.options())};
}

struct DifferentiableCell : torch::autograd::Function<DifferentiableCell> {
    static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, int64_t kind,
                                                  const Tensor& gates, const Tensor& parameters,
                                                  const c10::optional<Tensor>& initial, bool reversed) {
        const at::AutoDispatchBelowADInplaceOrView below;
        const auto [states, status] = forward_operation().call(kind, gates, parameters, initial, reversed);
        context->save_for_backward({gates, parameters, initial.value_or(Tensor()), states, status});
        context->saved_data["kind"] = kind;
        context->saved_data["reversed"] = reversed;
        context->mark_non_differentiable({status});
        return {states, status};
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& output_gradients) {
        if (at::GradMode::is_enabled())
            throw deeppcr::InvalidArgument("backward of a cell", "first derivatives only", "create_graph");
        const auto saved = context->get_saved_variables();
        const c10::optional<Tensor> initial = saved[2].defined() ? c10::make_optional(saved[2]) : c10::nullopt;
        const auto [gates, parameters, start] =
            backward_operation().call(context->saved_data["kind"].toInt(), saved[0], saved[1], initial, saved[3],
                                      saved[4], output_gradients[0], context->saved_data["reversed"].toBool());
        return {Tensor(), gates, parameters, initial ? start : Tensor(), Tensor()};
    }
};

std::tuple<Tensor, Tensor> differentiate_cell(int64_t kind, const Tensor& gates, const Tensor& parameters,
                                              const c10::optional<Tensor>& initial, bool reversed) {
    const auto result = DifferentiableCell::apply(kind, gates, parameters, initial, reversed);
    return {result[0], result[1]};
}

template <CellKind kind>
Tensor cell_op(const Tensor& gates, const Tensor& parameters, const c10::optional<Tensor>& initial, bool reversed) {
    const auto type = gates.scalar_type();
    c10::optional<Tensor> start = initial;
    if (start && is_16_bit(type)) start = widen("initial", *start, type);
    const Tensor weights = is_16_bit(type) ? widen("parameters", parameters, type) : parameters;
    if (must_be_widened(gates)) return cell_op<kind>(gates.to(at::kFloat), weights, start, reversed).to(type);
    if (start && is_16_bit(type)) start = start->to(type);
    return std::get<0>(forward_operation().call(int64_t(kind), gates, weights, start, reversed));
}

Tensor dense_op(const std::string& kind, const Tensor& gates, const Tensor& weight_hh, const Tensor& bias_hh,
                const Tensor& initial, const std::string& method) {
    DenseCellOptions options;
    options.evaluation.method = choice_of(method_names, "method", method);
    return dense_cell(choice_of(dense_names, "kind", kind), gates, weight_hh, bias_hh, initial, options);
}

Tensor chain_op(const Tensor& initial, const Tensor& weights, const Tensor& biases, const std::string& activation,
                int64_t skip, const std::string& method, bool whole_trajectory) {
    DenseChainOptions options;
    options.activation = choice_of(activation_names, "activation", activation);
    options.skip = skip;
    options.evaluation.method = choice_of(method_names, "method", method);
    options.whole_trajectory = whole_trajectory;
    return dense_chain(initial, weights, biases, options);
}

/// Under autocast. A cell of tensors on a GPU reads and writes autocast's type of 16 bits, with its parameters as
/// floats; on processors, which would only widen it, a cell stays float, and so do the dense ones everywhere. Double
/// stays double.
template <CellKind kind>
Tensor autocast_cell_op(const Tensor& gates, const Tensor& parameters, const c10::optional<Tensor>& initial,
                        bool reversed) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const auto device = gates.device().type();
    const auto type = gates.is_cuda() ? at::autocast::get_lower_precision_fp_from_device_type(device) : at::kFloat;
    return cell_op<kind>(at::autocast::cached_cast(type, gates, device),
                         at::autocast::cached_cast(at::kFloat, parameters, device),
                         at::autocast::cached_cast(type, initial, device), reversed);
}

Tensor as_float(const Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, tensor.device().type()); }

Tensor autocast_dense_op(const std::string& kind, const Tensor& gates, const Tensor& weight_hh, const Tensor& bias_hh,
                         const Tensor& initial, const std::string& method) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return dense_op(kind, as_float(gates), as_float(weight_hh), as_float(bias_hh), as_float(initial), method);
}

Tensor autocast_chain_op(const Tensor& initial, const Tensor& weights, const Tensor& biases,
                         const std::string& activation, int64_t skip, const std::string& method,
                         bool whole_trajectory) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return chain_op(as_float(initial), as_float(weights), as_float(biases), activation, skip, method, whole_trajectory);
}

void add_kernels(torch::Library& library) {
    library.impl("_cell", run_cell);
    library.impl("_cell_backward", run_cell_backward);
}

void add_autocast(torch::Library& library) {
    library.impl("para_gru", autocast_cell_op<CellKind::para_gru>);
    library.impl("para_lstm", autocast_cell_op<CellKind::para_lstm>);
    library.impl("diagonal_elman", autocast_cell_op<CellKind::diagonal_elman>);
    library.impl("slstm", autocast_cell_op<CellKind::slstm>);
    library.impl("dense_cell", autocast_dense_op);
    library.impl("dense_chain", autocast_chain_op);
}

std::tuple<Tensor, Tensor> recurrent_op(const std::string& cell, const Tensor& input,
                                        const std::vector<Tensor>& weights, const c10::optional<Tensor>& initial,
                                        const c10::optional<Tensor>& batch_sizes, bool bidirectional, bool batch_first,
                                        double dropout) {
    RecurrentCall call;
    call.bidirectional = bidirectional;
    call.batch_first = batch_first;
    call.batch_sizes = batch_sizes.value_or(Tensor());
    call.dropout = dropout;
    return recurrent(choice_of(cell_names, "cell", cell), input, weights, initial.value_or(Tensor()), call);
}

}  // namespace

// gates [T,B,G*C], parameters [P,C], initial [B,C*K] -> states [T,B,C*K]; see include/deeppcr/nn/cell.hpp,
// dense_cell.hpp and dense_chain.hpp.
TORCH_LIBRARY(deeppcr, library) {
    library.def(
        "_cell(int kind, Tensor gates, Tensor parameters, Tensor? initial, bool reversed) -> (Tensor states, Tensor "
        "status)");
    library.def(
        "_cell_backward(int kind, Tensor gates, Tensor parameters, Tensor? initial, Tensor states, Tensor status, "
        "Tensor "
        "output_gradient, bool reversed) -> (Tensor gates, Tensor parameters, Tensor initial)");
    library.def("para_gru(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::para_gru>);
    library.def("para_lstm(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::para_lstm>);
    library.def("diagonal_elman(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::diagonal_elman>);
    library.def("slstm(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::slstm>);
    library.def(
        "dense_cell(str kind, Tensor gates, Tensor weight_hh, Tensor bias_hh, Tensor initial, "
        "str method=\"sequential\") -> Tensor",
        dense_op);
    library.def(
        "dense_chain(Tensor initial, Tensor weights, Tensor biases, str activation=\"tanh\", int skip=0, "
        "str method=\"newton\", bool whole_trajectory=False) -> Tensor",
        chain_op);
    // Whole layers, as torch's own _VF.gru: see `recurrent` in include/deeppcr/nn/recurrent.hpp.
    library.def(
        "recurrent(str cell, Tensor input, Tensor[] weights, Tensor? initial=None, Tensor? batch_sizes=None, "
        "bool bidirectional=False, bool batch_first=True, float dropout=0.0) -> (Tensor output, Tensor last)",
        [](const std::string& cell, const Tensor& input, const c10::List<Tensor>& weights,
           const c10::optional<Tensor>& initial, const c10::optional<Tensor>& batch_sizes, bool bidirectional,
           bool batch_first, double dropout) {
            return recurrent_op(cell, input, weights.vec(), initial, batch_sizes, bidirectional, batch_first, dropout);
        });
}

// `recurrent` needs nothing here: autocast makes its projections, and with them its gates, numbers of 16 bits.
TORCH_LIBRARY_IMPL(deeppcr, AutocastCPU, library) { add_autocast(library); }
TORCH_LIBRARY_IMPL(deeppcr, AutocastCUDA, library) { add_autocast(library); }
TORCH_LIBRARY_IMPL(deeppcr, CPU, library) { add_kernels(library); }
TORCH_LIBRARY_IMPL(deeppcr, CUDA, library) { add_kernels(library); }
TORCH_LIBRARY_IMPL(deeppcr, Meta, library) {
    library.impl("_cell", shape_cell);
    library.impl("_cell_backward", shape_cell_backward);
}
TORCH_LIBRARY_IMPL(deeppcr, Autograd, library) { library.impl("_cell", differentiate_cell); }
