#include <deeppcr/nn/cell.hpp>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <string>
#include <utility>

#include <deeppcr/cells.hpp>

#include "nn/tensors.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

template <class T>
std::unique_ptr<ChannelwiseRecurrence<T>> recurrence_of(CellKind kind, View<const T> inputs, View<const T> parameters,
                                                        View<const T> initial,
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
    const View<const T> all(tensor.data_ptr<T>(), {tensor.size(0), tensor.size(1), tensor.size(2)}, tensor.stride(0),
                            tensor.stride(1));
    return reversed ? all.reversed() : all;
}

/// What the backward pass needs and autograd does not keep.
template <class T>
struct Forward : torch::CustomClassHolder {
    Forward(CellKind kind, const Tensor& u, const Tensor& p, const Tensor& x, const CellOptions& chosen)
        : gates(with_contiguous_rows(u)),
          parameters(p.detach().contiguous()),
          initial(x.detach().contiguous()),
          options(chosen),
          recurrence(recurrence_of<T>(
              kind, view_of<T>(gates, options.reversed),
              View<const T>(parameters.data_ptr<T>(), {parameters.size(0), 1, parameters.size(1)}),
              View<const T>(initial.data_ptr<T>(), {1, initial.size(0), initial.size(1)}), options.starts)) {
        if (options.evaluation.guess == Guess::given) options.evaluation.guess = Guess::initial_state;
    }

    Tensor gates, parameters, initial;  // detached: the recurrence's views point into them
    CellOptions options;
    std::unique_ptr<ChannelwiseRecurrence<T>> recurrence;
    Report report;
};

template <class T>
struct CellFunction : torch::autograd::Function<CellFunction<T>> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& gates, const Tensor& parameters,
                          const Tensor& initial, CellKind kind, const CellOptions& options, Report* report) {
        auto pass = c10::make_intrusive<Forward<T>>(kind, gates, parameters, initial, options);
        const Shape shape = pass->recurrence->shape();
        Tensor states = at::empty({shape.steps, shape.batch, shape.width}, pass->parameters.options());
        const View<T> whole(states.data_ptr<T>(), shape);
        pass->report =
            evaluate(*pass->recurrence, options.reversed ? whole.reversed() : whole, pass->options.evaluation);
        if (report != nullptr) *report = pass->report;
        context->save_for_backward({gates, parameters, initial, states});
        context->saved_data["pass"] = c10::IValue::make_capsule(pass);
        return states;
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& output_gradients) {
        if (at::GradMode::is_enabled())
            throw InvalidArgument("backward of cell", "first derivatives only", "create_graph");
        // Reading the saved variables is also what notices that one was changed in place since.
        const Tensor states = context->get_saved_variables()[3];
        const auto pass = c10::static_intrusive_pointer_cast<Forward<T>>(context->saved_data["pass"].toCapsule());
        const bool reversed = pass->options.reversed;
        const Tensor output_gradient = with_contiguous_rows(output_gradients[0]);
        auto gradients = adjoint(*pass->recurrence, view_of<T>(states, reversed), pass->report,
                                 view_of<T>(output_gradient, reversed), pass->options.evaluation);
        const auto options = states.options();
        Tensor inputs = adopt(gradients.inputs, pass->gates.sizes(), options);
        if (reversed) inputs = inputs.flip(0);
        return {inputs,
                adopt(gradients.parameters, pass->parameters.sizes(), options),
                adopt(gradients.initial, pass->initial.sizes(), options),
                Tensor(),
                Tensor(),
                Tensor()};
    }
};

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
    if (!gates.defined() || gates.dim() != 3 || gates.size(2) < sizes.inputs || gates.size(2) % sizes.inputs != 0 ||
        (gates.scalar_type() != at::kFloat && gates.scalar_type() != at::kDouble) || !gates.device().is_cpu())
        throw InvalidArgument(
            "gates", "float or double [steps,batch," + std::to_string(sizes.inputs) + " * channels] on the CPU",
            describe(gates));
    const index channels = gates.size(2) / sizes.inputs;
    const auto type = gates.scalar_type();
    require("parameters", parameters, {sizes.parameters, channels}, type);
    index sequences = gates.size(1);
    for (const SequenceStart& start : options.starts) sequences += start.step > 0;
    const Tensor states =
        initial.defined() ? initial : at::zeros({sequences, channels * sizes.states}, gates.options());
    require("initial", states, {sequences, channels * sizes.states}, type);
    return type == at::kFloat ? CellFunction<float>::apply(gates, parameters, states, kind, options, report)
                              : CellFunction<double>::apply(gates, parameters, states, kind, options, report);
}

}  // namespace deeppcr::nn
