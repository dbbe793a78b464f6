#include <deeppcr/nn/cell.hpp>

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
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
          initial(x.detach().contiguous()),
          options(chosen),
          recurrence(recurrence_of<T>(kind, view_of<T>(gates, options.reversed),
                                      view<const Arithmetic<T>>(parameters.unsqueeze(1)), view<const T>(initial),
                                      options.starts)) {
        if (options.evaluation.guess == Guess::given) options.evaluation.guess = Guess::initial_state;
    }

    Tensor gates, parameters, initial;  // detached: the recurrence's views point into them
    CellOptions options;
    std::unique_ptr<ChannelwiseRecurrence<T>> recurrence;
    Buffer<T> boundaries;  // where the states are recomputed
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
    auto gradients = pass.options.recompute > 0
                         ? adjoint_from_boundaries(*pass.recurrence, pass.options.recompute, pass.boundaries,
                                                   pass.report, outputs, evaluation)
                         : adjoint(*pass.recurrence, view_of<T>(states, reversed), pass.report, outputs, evaluation);
    const Tensor inputs = adopt(gradients.inputs, pass.gates.sizes(), pass.gates.options());
    return {reversed ? inputs.flip(0) : inputs,
            adopt(gradients.parameters, pass.parameters.sizes(), pass.parameters.options()),
            adopt(gradients.initial, pass.initial.sizes(), pass.initial.options())};
}

template <class T>
struct CellFunction : torch::autograd::Function<CellFunction<T>> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& gates, const Tensor& parameters,
                          const Tensor& initial, CellKind kind, const CellOptions& options, Report* report) {
        const DeviceScope here(gates);
        auto pass = c10::make_intrusive<Forward<T>>(kind, gates, parameters, initial, options);
        const Options evaluation = here.options(pass->options.evaluation);
        const Shape shape = pass->recurrence->shape();
        Tensor states = at::empty({shape.steps, shape.batch, shape.width}, pass->gates.options());
        const View<T> all = view<T>(states), whole = options.reversed ? all.reversed() : all;
        if (const index segment = options.recompute; segment > 0) {
            pass->boundaries =
                Buffer<T>::uninitialised({(shape.steps + segment - 1) / segment, shape.batch, shape.width});
            pass->report = evaluate_boundaries<T>(
                *pass->recurrence, segment, pass->boundaries, evaluation, [&](index first, View<const T> rows) {
                    for (index i = 0; i < rows.steps(); ++i)
                        for (index j = 0; j < rows.batch(); ++j)
                            std::copy_n(rows.at(i, j), rows.width(), whole.at(first + i, j));
                });
            context->save_for_backward({gates, parameters, initial});
        } else {
            pass->report = evaluate(*pass->recurrence, whole, evaluation);
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
        return {inputs, parameters, initial, Tensor(), Tensor(), Tensor()};
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
    if (options.recompute > 0 && gates.is_cuda())
        throw InvalidArgument("recompute", "0 for tensors on a GPU", std::to_string(options.recompute));
    const auto type = gates.scalar_type();
    if (is_16_bit(type))
        return cell(kind, gates.to(at::kFloat), widen("parameters", parameters, type), widen("initial", initial, type),
                    options, report)
            .to(type);
    const index channels = gates.size(2) / sizes.inputs;
    require("parameters", parameters, {sizes.parameters, channels}, type, gates.device());
    index sequences = gates.size(1);
    for (const SequenceStart& start : options.starts) sequences += start.step > 0;
    const Tensor states =
        initial.defined() ? initial : at::zeros({sequences, channels * sizes.states}, gates.options());
    require("initial", states, {sequences, channels * sizes.states}, type, gates.device());
    return type == at::kFloat ? CellFunction<float>::apply(gates, parameters, states, kind, options, report)
                              : CellFunction<double>::apply(gates, parameters, states, kind, options, report);
}

CellGradientTensors cell_gradients(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                                   const Tensor& states, Status status, const Tensor& output_gradient,
                                   const CellOptions& options) {
    return gates.scalar_type() == at::kFloat
               ? gradients<float>(kind, gates, parameters, initial, states, status, output_gradient, options)
               : gradients<double>(kind, gates, parameters, initial, states, status, output_gradient, options);
}

}  // namespace deeppcr::nn
