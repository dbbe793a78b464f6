#include <deeppcr/nn/cell.hpp>

#include <ATen/ops/full.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <string>
#include <utility>

#include <deeppcr/cells.hpp>
#include <deeppcr/enqueue.hpp>

#include "nn/cell_operators.hpp"
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
    std::vector<int64_t> state_sizes() const {
        const Shape& shape = recurrence->shape();
        return {shape.steps, shape.batch, shape.width};
    }
    /// Whether the host need not wait for the outcome, if nobody asks for the report.
    bool may_be_enqueued() const {
        return gates.is_cuda() && options.recompute == 0 && options.evaluation.group == nullptr &&
               options.evaluation.on_failure == OnFailure::finish;
    }
    /// All states, into `states`: their Status is in `status` if enqueued, else in `report`.
    void evaluate_all(const DeviceScope& here, const Tensor& states, bool enqueued) {
        const Options evaluation = here.options(options.evaluation);
        const View<T> all = options.reversed ? view<T>(states).reversed() : view<T>(states);
        if (enqueued) {
            status = at::empty({}, gates.options().dtype(at::kLong));
            enqueue(*recurrence, all, status_data(), evaluation);
        } else {
            report = evaluate(*recurrence, all, evaluation);
        }
    }
    index* status_data() const { return static_cast<index*>(status.data_ptr()); }

    Tensor gates, parameters, initial;  // detached: the recurrence's views point into them; initial may be undefined
    CellOptions options;
    std::unique_ptr<ChannelwiseRecurrence<T>> recurrence;
    Tensor boundaries;  // where the states are recomputed
    Tensor status;      // [], 64-bit, on the GPU, where nobody has waited for it; else undefined, and there is a report
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
    const CellGradientViews<T> gradients{reversed ? inputs.reversed() : inputs,
                                         view<Arithmetic<T>>(result.parameters.unsqueeze(1)), view<T>(result.initial)};
    const View<const T> trajectory = view_of<T>(states, reversed);
    if (pass.status.defined())
        enqueue_adjoint(*pass.recurrence, trajectory, pass.status_data(), outputs, gradients, evaluation);
    else
        adjoint(*pass.recurrence, trajectory, pass.report, outputs, gradients, evaluation);
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
        const Shape shape = pass->recurrence->shape();
        Tensor states = at::empty(pass->state_sizes(), pass->gates.options());
        if (const index segment = options.recompute; segment > 0) {
            pass->boundaries =
                at::empty({(shape.steps + segment - 1) / segment, shape.batch, shape.width}, pass->gates.options());
            pass->report = evaluate_boundaries<T>(
                *pass->recurrence, segment, view<T>(pass->boundaries), here.options(pass->options.evaluation),
                [&](index first, View<const T> rows) {
                    const index steps = rows.steps(), from = options.reversed ? shape.steps - first - steps : first;
                    const Tensor segment_states = at::from_blob(
                        const_cast<T*>(rows.data()), {steps, shape.batch, shape.width}, pass->gates.options());
                    states.narrow(0, from, steps)
                        .copy_(options.reversed ? segment_states.flip(0) : segment_states, /*non_blocking=*/true);
                });
            context->save_for_backward({gates, parameters, initial});
        } else {
            pass->evaluate_all(here, states, report == nullptr && pass->may_be_enqueued());
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
CellStates states_of(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                     const CellOptions& options) {
    const DeviceScope here(gates);
    Forward<T> pass(kind, gates, parameters, initial, options);
    const Tensor states = at::empty(pass.state_sizes(), pass.gates.options());
    pass.evaluate_all(here, states, pass.may_be_enqueued());
    if (!pass.status.defined())
        pass.status = at::full({}, int64_t(pass.report.status), gates.options().dtype(at::kLong));
    return {states, pass.status};
}

template <class T>
CellGradientTensors gradients(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                              const Tensor& states, const Tensor& status, const Tensor& output_gradient,
                              const CellOptions& options) {
    const DeviceScope here(gates);
    Forward<T> pass(kind, gates, parameters, initial, options);
    if (status.is_cuda())
        pass.status = status;
    else
        pass.report.status = Status(status.item<int64_t>());
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

namespace {

/// Parameters and initial states of the types that the core takes beside the gates; none: zeros.
struct Arguments {
    Tensor parameters;
    c10::optional<Tensor> initial;
};

/// Of gates that need not be widened. Throws InvalidArgument.
Arguments checked(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                  const CellOptions& options) {
    const CellSizes sizes = sizes_of(kind);
    const auto type = gates.scalar_type();
    const index channels = gates.size(2) / sizes.inputs;
    Arguments result{is_16_bit(type) ? widen("parameters", parameters, type) : parameters, c10::nullopt};
    require("parameters", result.parameters, {sizes.parameters, channels}, is_16_bit(type) ? at::kFloat : type,
            gates.device());
    index sequences = gates.size(1);
    for (const SequenceStart& start : options.starts) sequences += start.step > 0;
    if (initial.defined()) {
        result.initial = is_16_bit(type) ? widen("initial", initial, type).to(type) : initial;
        require("initial", *result.initial, {sequences, channels * sizes.states}, type, gates.device());
    }
    return result;
}

void check_gates(CellKind kind, const Tensor& gates, const CellOptions& options) {
    const index inputs = sizes_of(kind).inputs;
    if (options.recompute < 0) throw InvalidArgument("recompute", "0 or more", std::to_string(options.recompute));
    if (!gates.defined() || gates.dim() != 3 || gates.size(2) < inputs || gates.size(2) % inputs != 0 ||
        !is_real(gates.scalar_type()) || !is_on_cpu_or_cuda(gates))
        throw InvalidArgument("gates",
                              "float, double, bfloat16 or float16 [steps,batch," + std::to_string(inputs) +
                                  " * channels] on the CPU or a GPU",
                              describe(gates));
}

}  // namespace

Tensor cell(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
            const CellOptions& options, Report* report) {
    check_gates(kind, gates, options);
    const auto type = gates.scalar_type();
    if (must_be_widened(gates))
        return cell(kind, gates.to(at::kFloat), widen("parameters", parameters, type), widen("initial", initial, type),
                    options, report)
            .to(type);
    const Arguments with = checked(kind, gates, parameters, initial, options);
    return with_storage(type, [&]<class T>(T) {
        return CellFunction<T>::apply(gates, with.parameters, with.initial, kind, options, report);
    });
}

CellStates cell_states(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                       const CellOptions& options) {
    check_gates(kind, gates, options);
    const auto type = gates.scalar_type();
    if (must_be_widened(gates)) {
        CellStates found = cell_states(kind, gates.to(at::kFloat), widen("parameters", parameters, type),
                                       widen("initial", initial, type), options);
        return {found.states.to(type), found.status};
    }
    const Arguments with = checked(kind, gates, parameters, initial, options);
    return with_storage(type, [&]<class T>(T) {
        return states_of<T>(kind, gates, with.parameters, with.initial.value_or(Tensor()), options);
    });
}

CellGradientTensors cell_gradients(CellKind kind, const Tensor& gates, const Tensor& parameters, const Tensor& initial,
                                   const Tensor& states, const Tensor& status, const Tensor& output_gradient,
                                   const CellOptions& options) {
    return with_storage(gates.scalar_type(), [&]<class T>(T) {
        return gradients<T>(kind, gates, parameters, initial, states, status, output_gradient, options);
    });
}

}  // namespace deeppcr::nn
