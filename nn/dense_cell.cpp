#include <deeppcr/nn/dense_cell.hpp>

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <utility>

#include "nn/device_scope.hpp"
#include "nn/tensors.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

template <class T>
View<const T> view_inputs(const Tensor& gates) {
    return {static_cast<const T*>(gates.data_ptr()),
            {gates.size(0), gates.size(1), gates.size(2)},
            gates.stride(0),
            gates.stride(1)};
}

/// What the backward pass needs and autograd does not keep: the cell's packed weights and the report.
template <class T>
struct Forward : torch::CustomClassHolder {
    Forward(DenseCellKind kind, const Tensor& u, const Tensor& w, const Tensor& b, const Tensor& x,
            const Options& evaluation_options, std::shared_ptr<DenseCellMemory> shared)
        : gates(with_contiguous_rows(u)),
          weights(w.detach().contiguous()),
          biases(b.detach().contiguous()),
          initial(x.detach().contiguous()),
          evaluation(evaluation_options),
          memory(std::move(shared)),
          cell(kind, view_inputs<T>(gates), per_gate(kind, weights, weights.size(1)), per_gate(kind, biases, 1),
               view<const T>(initial)) {
        evaluation.workspace = &memory->workspace;
    }

    /// PyTorch's [gates * hidden, hidden] (or [gates * hidden]) as one matrix (or row) per gate.
    static View<const T> per_gate(DenseCellKind kind, const Tensor& tensor, index rows) {
        const index gates = gate_count(kind), hidden = tensor.size(0) / gates;
        return {static_cast<const T*>(tensor.data_ptr()), {gates, rows, hidden}};
    }

    Tensor gates, weights, biases, initial;  // detached: the cell's views point into them
    Options evaluation;
    std::shared_ptr<DenseCellMemory> memory;
    DenseCell<T> cell;
    Report report;
};

template <class T>
Tensor run_forward(Forward<T>& forward, const DeviceScope& here) {
    const Shape shape = forward.cell.shape();
    DenseCellMemory& memory = *forward.memory;
    Tensor trajectory = at::empty({shape.steps, shape.batch, shape.width}, forward.initial.options());
    Options options = here.options_of_windows(forward.evaluation);
    const bool given = options.guess == Guess::given && options.method != Method::sequential;
    if (given && options.method == Method::automatic) options.method = Method::newton;  // also without a guess yet
    if (given && memory.trajectory.defined() && memory.trajectory.sizes() == trajectory.sizes())
        trajectory.copy_(memory.trajectory);
    else if (given)
        options.guess = Guess::initial_state;
    forward.report = evaluate(forward.cell, view<T>(trajectory), options);
    if (given && forward.report.ok()) memory.trajectory = trajectory.clone();
    memory.forward = forward.report;
    return trajectory;
}

template <class T>
struct DenseCellFunction : torch::autograd::Function<DenseCellFunction<T>> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& gates, const Tensor& weights,
                          const Tensor& biases, const Tensor& initial, DenseCellKind kind, const Options& evaluation,
                          const std::shared_ptr<DenseCellMemory>& memory) {
        const DeviceScope here(gates);
        auto pass = c10::make_intrusive<Forward<T>>(kind, gates, weights, biases, initial, evaluation, memory);
        Tensor trajectory = run_forward(*pass, here);
        context->save_for_backward({gates, weights, biases, initial, trajectory});
        context->saved_data["pass"] = c10::IValue::make_capsule(pass);
        return trajectory;
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& output_gradients) {
        if (at::GradMode::is_enabled())
            throw InvalidArgument("backward of dense_cell", "first derivatives only", "create_graph");
        // Reading the saved variables is also what notices that one was changed in place since.
        const Tensor trajectory = context->get_saved_variables()[4];
        const auto pass = c10::static_intrusive_pointer_cast<Forward<T>>(context->saved_data["pass"].toCapsule());
        if (!pass->report.ok())
            throw InvalidArgument("backward of dense_cell", "a trajectory that converged or was finished sequentially",
                                  "one that is " + to_string(pass->report.status));
        const DeviceScope here(trajectory);
        const Tensor output_gradient = output_gradients[0].contiguous();
        auto gradients = adjoint(pass->cell, view<const T>(trajectory), pass->report, view<const T>(output_gradient),
                                 here.options_of_windows(pass->evaluation));
        pass->memory->backward = gradients.report;
        const auto options = trajectory.options();
        return {adopt(gradients.inputs, pass->gates.sizes(), options),
                adopt(gradients.weights, pass->weights.sizes(), options),
                adopt(gradients.biases, pass->biases.sizes(), options),
                adopt(gradients.initial, pass->initial.sizes(), options),
                Tensor(),
                Tensor(),
                Tensor()};
    }
};

}  // namespace

Tensor dense_cell(DenseCellKind kind, const Tensor& gates, const Tensor& weight_hh, const Tensor& bias_hh,
                  const Tensor& initial, const DenseCellOptions& options, std::shared_ptr<DenseCellMemory> memory) {
    if (kind < DenseCellKind::elman_tanh || kind > DenseCellKind::lstm)
        throw InvalidArgument("kind", "one of DenseCellKind", std::to_string(int(kind)));
    const index count = gate_count(kind);
    if (!gates.defined() || gates.dim() != 3 || gates.size(2) < count || gates.size(2) % count != 0 ||
        !is_real(gates.scalar_type()) || !is_on_cpu_or_cuda(gates))
        throw InvalidArgument("gates",
                              "float, double, bfloat16 or float16 [steps,batch," + std::to_string(count) +
                                  " * hidden] on the CPU or a GPU",
                              describe(gates));
    const auto type = gates.scalar_type();
    if (is_16_bit(type))
        return dense_cell(kind, gates.to(at::kFloat), widen("weight_hh", weight_hh, type),
                          widen("bias_hh", bias_hh, type), widen("initial", initial, type), options, std::move(memory))
            .to(type);
    const index hidden = gates.size(2) / count;
    require("weight_hh", weight_hh, {count * hidden, hidden}, type, gates.device());
    const Tensor biases = bias_hh.defined() ? bias_hh : at::zeros({count * hidden}, gates.options());
    require("bias_hh", biases, {count * hidden}, type, gates.device());
    require("initial", initial, {gates.size(1), state_width(kind, hidden)}, type, gates.device());
    if (!memory) memory = std::make_shared<DenseCellMemory>();
    return type == at::kFloat
               ? DenseCellFunction<float>::apply(gates, weight_hh, biases, initial, kind, options.evaluation, memory)
               : DenseCellFunction<double>::apply(gates, weight_hh, biases, initial, kind, options.evaluation, memory);
}

}  // namespace deeppcr::nn
