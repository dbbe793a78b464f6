#include <deeppcr/nn/cell.hpp>

#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <string>
#include <utility>

#include <deeppcr/cells.hpp>

#include "nn/cell_gradients.hpp"
#include "nn/device_scope.hpp"
#include "nn/tensors.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

template <class T>
std::unique_ptr<ChannelwiseRecurrence<T>> recurrence_of(CellKind kind, View<const T> inputs,
                                                        View<const Arithmetic<T>> parameters, View<const T> initial,
                                                        const std::vector<SequenceStart>& starts) {
    switch (kind) {
        case CellKind::para_gru:
            return std::make_unique<CellRecurrence<ParaGRU, T>>(inputs, parameters, initial, starts);
        case CellKind::para_lstm:
            return std::make_unique<CellRecurrence<ParaLSTM, T>>(inputs, parameters, initial, starts);
        case CellKind::diagonal_elman:
            return std::make_unique<CellRecurrence<DiagonalElman, T>>(inputs, parameters, initial, starts);
        case CellKind::slstm:
            break;
    }
    return std::make_unique<CellRecurrence<SLSTM, T>>(inputs, parameters, initial, starts);
}

template <class T>
View<const T> view_of(const Tensor& tensor, bool reversed) {
    const View<const T> all(static_cast<const T*>(tensor.data_ptr()), {tensor.size(0), tensor.size(1), tensor.size(2)},
                            tensor.stride(0), tensor.stride(1));
    return reversed ? all.reversed() : all;
}

/// What the backward pass needs and autograd does not keep.
template <class T>
struct Forward : torch::CustomClassHolder {
    Forward(CellKind kind, const Tensor& u, const Tensor& p, const Tensor& x, const CellOptions& chosen)
        : gates(with_contiguous_rows(u)),
          parameters(p.detach().contiguous()),
          initial(x.defined() ? x.detach().contiguous() : x),
          options(chosen),
          recurrence(recurrence_of<T>(kind, view_of<T>(gates, options.reversed),
                                      view<const Arithmetic<T>>(parameters.unsqueeze(1)),
                                      initial.defined() ? view<const T>(initial) : View<const T>(), options.starts)) {
        if (options.evaluation.guess == Guess::given) options.evaluation.guess = Guess::initial_state;
    }

    std::vector<int64_t> initial_sizes() const {
        return {int64_t(recurrence->parts().size()), recurrence->shape().width};
    }

    Tensor gates, parameters, initial;  // detached: the recurrence's views point into them; initial may be undefined
    CellOptions options;
    std::unique_ptr<ChannelwiseRecurrence<T>> recurrence;
    Tensor boundaries;  // where the states are recomputed
    Report report;
};

/// states: undefined where they are recomputed.
template <class T>
CellGradientTensors gradients_of(const Forward<T>& pass, const Tensor& states, const Tensor& output_gradient) {
    const DeviceScope here(pass.gates);
    const Options evaluation = here.options(pass.options.evaluation);
    const bool reversed = pass.options.reversed;
    const Tensor rows = with_contiguous_rows(output_gradient);
    const View<const T> outputs = view_of<T>(rows, reversed);
    if (pass.options.recompute > 0) {
        auto found = adjoint_from_boundaries(*pass.recurrence, pass.options.recompute, view<const T>(pass.boundaries),
                                             pass.report, outputs, evaluation);
        const Tensor inputs = adopt(found.inputs, pass.gates.sizes(), pass.gates.options());
        return {reversed ? inputs.flip(0) : inputs,
                adopt(found.parameters, pass.parameters.sizes(), pass.parameters.options()),
                adopt(found.initial, pass.initial_sizes(), pass.gates.options())};
    }
    const auto like = [](const Tensor& tensor) { return at::empty(tensor.sizes(), tensor.options()); };
    CellGradientTensors result{like(pass.gates), like(pass.parameters),
                               at::empty(pass.initial_sizes(), pass.gates.options())};
    const View<T> inputs = view<T>(result.gates);
    adjoint(*pass.recurrence, view_of<T>(states, reversed), pass.report, outputs,
            {reversed ? inputs.reversed() : inputs, view<Arithmetic<T>>(result.parameters.unsqueeze(1)),
             view<T>(result.initial)},
            evaluation);
    return result;
}

template <class T>
struct CellFunction : torch::autograd::Function<CellFunction<T>> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& gates, const Tensor& parameters,
                          const c10::optional<Tensor>& start, CellKind kind, const CellOptions& options,
                          Report* report) {
        const DeviceScope here(gates);
        const Tensor initial = start.value_or(Tensor());
        auto pass = c10::make_intrusive<Forward<T>>(kind, gates, parameters, initial, options);
        const Options evaluation = here.options(pass->options.evaluation);
        const Shape shape = pass->recurrence->shape();
        Tensor states = at::empty({shape.steps, shape.batch, shape.width}, pass->gates.options());
        if (const index segment = options.recompute; segment > 0) {
            pass->boundaries =
                at::empty({(shape.steps + segment - 1) / segment, shape.batch, shape.width}, pass->gates.options());
            pass->report = evaluate_boundaries<T>(
                *pass->recurrence, segment, view<T>(pass->boundaries), evaluation,
                [&](index first, View<const T> rows) {
                    const index steps = rows.steps(), from = options.reversed ? shape.steps - first - steps : first;
                    const Tensor segment_states = at::from_blob(
                        const_cast<T*>(rows.data()), {steps, shape.batch, shape.width}, pass->gates.options());
                    states.narrow(0, from, steps)
                        .copy_(options.reversed ? segment_states.flip(0) : segment_states, /*non_blocking=*/true);
                });
            context->save_for_backward({gates, parameters, initial});
        } else {
            const View<T> all = view<T>(states);
            pass->report = evaluate(*pass->recurrence, options.reversed ? all.reversed() : all, evaluation);
            context->save_for_backward({gates, parameters, initial, states});
        }
        if (report != nullptr) *report = pass->report;
        context->saved_data["pass"] = c10::IValue::make_capsule(pass);
        return states;
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& output_gradients) {
        if (at::GradMode::is_enabled())
            throw InvalidArgument("backward of cell", "first derivatives only", "create_graph");
        // Reading the saved variables is also what notices that one was changed in place since.
        const auto saved = context->get_saved_variables();
        const auto pass = c10::static_intrusive_pointer_cast<Forward<T>>(context->saved_data["pass"].toCapsule());
        const auto [inputs, parameters, initial] =
            gradients_of(*pass, pass->options.recompute > 0 ? Tensor() : saved[3], output_gradients[0]);
        return {inputs, parameters, saved[2].defined() ? initial : Tensor(), Tensor(), Tensor(), Tensor()};
    }
};

template <class T>
CellGradientTensors gradients(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                              const Tensor& states, Status status, const Tensor& output_gradient,
                              const CellOptions& options) {
    const DeviceScope here(gates);
    Forward<T> pass(kind, gates, parameters, initial, options);
    pass.report.status = status;
    return gradients_of(pass, with_contiguous_rows(states), output_gradient);
}

/// body(T()) for the type in which the core stores such numbers.
template <class Body>
auto with_storage(at::ScalarType type, const Body& body) {
    switch (type) {
        case at::kDouble:
            return body(double());
        case at::kBFloat16:
            return body(bfloat16());
        case at::kHalf:
            return body(float16());
        default:
            return body(float());
    }
}

}  // namespace

CellSizes sizes_of(CellKind kind) {
    switch (kind) {
        case CellKind::para_gru:
            return {ParaGRU::states, ParaGRU::inputs, ParaGRU::parameters};
        case CellKind::para_lstm:
            return {ParaLSTM::states, ParaLSTM::inputs, ParaLSTM::parameters};
        case CellKind::diagonal_elman:
            return {DiagonalElman::states, DiagonalElman::inputs, DiagonalElman::parameters};
        case CellKind::slstm:
            return {SLSTM::states, SLSTM::inputs, SLSTM::parameters};
    }
    throw InvalidArgument("kind", "one of CellKind", std::to_string(int(kind)));
}

Tensor cell(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
            const CellOptions& options, Report* report) {
    const CellSizes sizes = sizes_of(kind);
    if (options.recompute < 0) throw InvalidArgument("recompute", "0 or more", std::to_string(options.recompute));
    if (!gates.defined() || gates.dim() != 3 || gates.size(2) < sizes.inputs || gates.size(2) % sizes.inputs != 0 ||
        !is_real(gates.scalar_type()) || !is_on_cpu_or_cuda(gates))
        throw InvalidArgument("gates",
                              "float, double, bfloat16 or float16 [steps,batch," + std::to_string(sizes.inputs) +
                                  " * channels] on the CPU or a GPU",
                              describe(gates));
    const auto type = gates.scalar_type();
    if (must_be_widened(gates))
        return cell(kind, gates.to(at::kFloat), widen("parameters", parameters, type), widen("initial", initial, type),
                    options, report)
            .to(type);
    const index channels = gates.size(2) / sizes.inputs;
    const Tensor weights = is_16_bit(type) ? widen("parameters", parameters, type) : parameters;
    require("parameters", weights, {sizes.parameters, channels}, is_16_bit(type) ? at::kFloat : type, gates.device());
    index sequences = gates.size(1);
    for (const SequenceStart& start : options.starts) sequences += start.step > 0;
    c10::optional<Tensor> start;  // none: zeros
    if (initial.defined()) {
        start = is_16_bit(type) ? widen("initial", initial, type).to(type) : initial;
        require("initial", *start, {sequences, channels * sizes.states}, type, gates.device());
    }
    return with_storage(
        type, [&]<class T>(T) { return CellFunction<T>::apply(gates, weights, start, kind, options, report); });
}

CellGradientTensors cell_gradients(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                                   const Tensor& states, Status status, const Tensor& output_gradient,
                                   const CellOptions& options) {
    return with_storage(gates.scalar_type(), [&]<class T>(T) {
        return gradients<T>(kind, gates, parameters, initial, states, status, output_gradient, options);
    });
}

}  // namespace deeppcr::nn
