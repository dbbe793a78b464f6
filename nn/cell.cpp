#include <deeppcr/nn/cell.hpp>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
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
    Buffer<T> boundaries;  // where the states are recomputed
    Report report;
};

template <class T>
struct CellFunction : torch::autograd::Function<CellFunction<T>> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& gates, const Tensor& parameters,
                          const Tensor& initial, CellKind kind, const CellOptions& options, Report* report) {
        auto pass = c10::make_intrusive<Forward<T>>(kind, gates, parameters, initial, options);
        const Shape shape = pass->recurrence->shape();
        Tensor states = at::empty({shape.steps, shape.batch, shape.width}, pass->parameters.options());
        const View<T> all(states.data_ptr<T>(), shape), whole = options.reversed ? all.reversed() : all;
        if (const index segment = options.recompute; segment > 0) {
            pass->boundaries =
                Buffer<T>::uninitialised({(shape.steps + segment - 1) / segment, shape.batch, shape.width});
            pass->report =
                evaluate_boundaries<T>(*pass->recurrence, segment, pass->boundaries, pass->options.evaluation,
                                       [&](index first, View<const T> rows) {
                                           for (index i = 0; i < rows.steps(); ++i)
                                               for (index j = 0; j < rows.batch(); ++j)
                                                   std::copy_n(rows.at(i, j), rows.width(), whole.at(first + i, j));
                                       });
            context->save_for_backward({gates, parameters, initial});
        } else {
            pass->report = evaluate(*pass->recurrence, whole, pass->options.evaluation);
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
        const bool reversed = pass->options.reversed;
        const Tensor output_gradient = with_contiguous_rows(output_gradients[0]);
        const View<const T> outputs = view_of<T>(output_gradient, reversed);
        auto gradients = pass->options.recompute > 0
                             ? adjoint_from_boundaries(*pass->recurrence, pass->options.recompute, pass->boundaries,
                                                       pass->report, outputs, pass->options.evaluation)
                             : adjoint(*pass->recurrence, view_of<T>(saved[3], reversed), pass->report, outputs,
                                       pass->options.evaluation);
        const auto options = pass->parameters.options();
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
    if (options.recompute < 0) throw InvalidArgument("recompute", "0 or more", std::to_string(options.recompute));
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
