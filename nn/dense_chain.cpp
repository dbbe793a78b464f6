#include <deeppcr/nn/dense_chain.hpp>

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linalg_solve_ex.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>
#include <thread>

#include "nn/basics.hpp"
#include "nn/device_scope.hpp"
#include "nn/tensors.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

/// [layers,width] as the [layers,1,width] that DenseChain takes.
template <class T>
View<T> view_biases(const Tensor& biases) {
    return view<T>(biases.unsqueeze(1));
}

/// A chain that keeps the slopes of what is evaluated step after step, where that saves the backward pass from
/// evaluating its layers again: not if steps have several layers, as it needs what is between them anyway.
template <class T>
class RememberingChain : public DenseChain<T> {
public:
    RememberingChain(View<const T> weights, View<const T> biases, View<const T> initial,
                     const typename DenseChain<T>::Options& options, bool keeps, const at::TensorOptions& numbers)
        : DenseChain<T>(weights, biases, initial, options), keeps_(keeps && options.skip <= 1), numbers_(numbers) {}

    /// Kept are steps from the first one on, one call's after another's. Methods that run parts side by side do so on
    /// other threads too.
    void run(const Section& section, View<const T> state, View<T> trajectory) const override {
        const Shape& shape = this->shape();
        const bool all_sequences = section.batch() == shape.batch && std::ranges::is_sorted(section.sequences);
        if (!keeps_ || std::this_thread::get_id() != thread_ || !all_sequences ||
            (section.first != kept_ && section.first != 0))
            return DenseChain<T>::run(section, state, trajectory);
        if (!slopes_.defined()) slopes_ = at::empty({shape.steps, shape.batch, shape.width}, numbers_);
        this->run_with_slopes(section, state, trajectory, view<T>(slopes_).steps(section.first, section.last));
        kept_ = section.last;
    }
    /// Gives up [layers,batch,width], once the evaluation has ended as `report` says; undefined where it was another.
    Tensor take_slopes(const Report& report) {
        const Tensor slopes = std::move(slopes_);
        return report.iterations == 0 && kept_ == this->shape().steps ? slopes : Tensor();
    }

private:
    bool keeps_;
    at::TensorOptions numbers_;
    std::thread::id thread_ = std::this_thread::get_id();
    mutable Tensor slopes_;
    mutable index kept_ = 0;
};

Report sequential_report(index batch, index steps) {
    Report report;
    report.method = "sequential";
    report.sequences.assign(std::size_t(batch), {Status::converged, 0, steps, 0, 0, 0});
    report.status = Status::converged;
    report.sequential_steps = batch * steps;
    report.lyapunov = std::nan("");
    return report;
}

/// Marks the sequences whose last state is not finite; one that is not stays so in a residual network, and in an MLP
/// that recovers from one, the trajectory is what its formula says, and counts as right.
void find_non_finite(const Tensor& trajectory, Report& report) {
    const Tensor ends_well = trajectory.select(0, trajectory.size(0) - 1).isfinite().all(1).cpu();
    const auto* const finite = ends_well.data_ptr<bool>();
    for (index sequence = 0; sequence < index(report.sequences.size()); ++sequence) {
        if (finite[sequence]) continue;
        Report::Sequence& entry = report.sequences[std::size_t(sequence)];
        entry.status = report.status = Status::non_finite;
        const Tensor steps = trajectory.select(1, sequence).isfinite().all(1);
        entry.confirmed = steps.to(at::kLong).cumprod(0).sum().item<index>();
    }
}

/// Step by step.
template <class T>
Report run_sequentially(const DenseChain<T>& chain, const Execution& execution, Device device,
                        const Tensor& trajectory) {
    const auto start = Clock::now();
    const Shape shape = chain.shape();
    std::vector<index> sequences(std::size_t(shape.batch));
    std::iota(sequences.begin(), sequences.end(), index(0));
    const Section section{0, shape.steps, sequences, execution};
    const auto state = Buffer<T>::uninitialised({1, shape.batch, shape.width}, Layout::steps_first, device);
    chain.initial(section, state);
    chain.run(section, state, view<T>(trajectory));

    Report report = sequential_report(shape.batch, shape.steps);
    if (shape.steps > 0) find_non_finite(trajectory, report);
    report.seconds = report.sequential.seconds = seconds_since(start);
    return report;
}

/// Displacements of a residual network's states from x_0; the states themselves of an MLP.
Tensor relative_to_initial(const Tensor& trajectory, const Tensor& initial, index skip) {
    return skip > 0 ? trajectory.sub(initial) : trajectory;
}

/// x_0 with a column of ones: what the prediction multiplies.
Tensor with_ones(const Tensor& initial) {
    return at::cat({initial, at::ones({initial.size(0), 1}, initial.options())}, 1);
}

/// Ridge regression of every step's (relative) states on x_0 and 1. The ridge only decides between maps that the batch
/// cannot tell apart.
Tensor fit_prediction(const Tensor& trajectory, const Tensor& initial, index skip) {
    const Tensor inputs = with_ones(initial);
    const Tensor gram = inputs.t().mm(inputs), ridge = gram.diagonal().mean().mul(1e-3);
    gram.diagonal().add_(ridge);
    // Unchecked, for a look at the outcome would wait for the GPU: the matrix is positive definite.
    const Tensor solver = std::get<0>(at::linalg_solve_ex(gram, inputs.t()));  // [width + 1, batch]
    const Tensor targets = relative_to_initial(trajectory, initial, skip);
    return at::bmm(solver.unsqueeze(0).expand({trajectory.size(0), -1, -1}), targets);
}

bool fits(const Tensor& prediction, const Tensor& trajectory) {
    return prediction.defined() && prediction.scalar_type() == trajectory.scalar_type() &&
           prediction.device() == trajectory.device() &&
           prediction.sizes() == at::IntArrayRef({trajectory.size(0), trajectory.size(2) + 1, trajectory.size(2)});
}

void predict(const Tensor& prediction, const Tensor& initial, index skip, Tensor& trajectory) {
    at::bmm_out(trajectory, with_ones(initial).unsqueeze(0).expand({trajectory.size(0), -1, -1}), prediction);
    if (skip > 0) trajectory.add_(initial);
}

/// What the backward pass needs and autograd does not keep: the chain's packed weights, the slopes, the report.
template <class T>
struct Forward : torch::CustomClassHolder {
    Forward(Tensor x, Tensor w, Tensor b, const DenseChainOptions& chain_options,
            std::shared_ptr<DenseChainMemory> shared, bool backward_follows)
        : initial(std::move(x)),
          weights(std::move(w)),
          biases(std::move(b)),
          options(chain_options),
          memory(std::move(shared)),
          chain(view<const T>(weights), view_biases<const T>(biases), view<const T>(initial),
                {options.activation, options.skip}, backward_follows, initial.options()) {
        options.evaluation.workspace = &memory->workspace;
    }

    Tensor initial, weights, biases;  // contiguous and detached: the chain's views point into them
    DenseChainOptions options;
    std::shared_ptr<DenseChainMemory> memory;
    RememberingChain<T> chain;
    Tensor slopes;
    Report report;
};

template <class T>
Tensor run_forward(Forward<T>& forward, const DeviceScope& here) {
    const DenseChain<T>& chain = forward.chain;
    const index skip = forward.options.skip;
    Options options = here.options_of_windows(forward.options.evaluation);
    DenseChainMemory& memory = *forward.memory;
    const Shape shape = chain.shape();
    Tensor trajectory = at::empty({shape.steps, shape.batch, shape.width}, forward.initial.options());

    if (options.method == Method::sequential) {
        forward.report = run_sequentially(chain, options.execution, here.device(), trajectory);
    } else {
        const bool predicted = options.guess == Guess::given;
        if (predicted && options.method == Method::automatic) options.method = Method::newton;  // also the first time
        if (predicted && fits(memory.prediction, trajectory))
            predict(memory.prediction, forward.initial, skip, trajectory);
        else if (predicted)
            options.guess = Guess::initial_state;
        forward.report = evaluate(chain, view<T>(trajectory), options);
        if (predicted && forward.report.ok()) memory.prediction = fit_prediction(trajectory, forward.initial, skip);
    }
    forward.slopes = forward.chain.take_slopes(forward.report);
    memory.forward = forward.report;
    return trajectory;
}

template <class T>
std::array<Tensor, 3> run_backward(const Forward<T>& forward, const Tensor& trajectory, const Tensor& output_gradient) {
    if (!forward.report.ok())
        throw InvalidArgument("backward of dense_chain", "a trajectory that converged or was finished sequentially",
                              "one that is " + to_string(forward.report.status));
    const DeviceScope here(trajectory);
    const Shape shape = forward.chain.shape();
    Tensor state_gradients;
    if (forward.options.whole_trajectory) {
        state_gradients = output_gradient.contiguous();
    } else {
        state_gradients = at::zeros(trajectory.sizes(), trajectory.options());
        state_gradients[shape.steps - 1].copy_(output_gradient);
    }
    auto gradients = adjoint(forward.chain, view<const T>(trajectory), forward.report, view<const T>(state_gradients),
                             here.options_of_windows(forward.options.evaluation),
                             forward.slopes.defined() ? view<const T>(forward.slopes) : View<const T>());
    forward.memory->backward = gradients.report;

    return {adopt(gradients.initial, forward.initial.sizes(), trajectory.options()),
            adopt(gradients.weights, forward.weights.sizes(), trajectory.options()),
            adopt(gradients.biases, forward.biases.sizes(), trajectory.options())};
}

template <class T>
struct DenseChainFunction : torch::autograd::Function<DenseChainFunction<T>> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& initial, const Tensor& weights,
                          const Tensor& biases, const DenseChainOptions& options,
                          const std::shared_ptr<DenseChainMemory>& memory, bool backward_follows) {
        const DeviceScope here(initial);
        const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
        auto pass = c10::make_intrusive<Forward<T>>(initial.detach().contiguous(), weights.detach().contiguous(),
                                                    biases.detach().contiguous(), options, memory, backward_follows);
        Tensor trajectory = run_forward(*pass, here);
        Tensor output = options.whole_trajectory ? trajectory : trajectory[trajectory.size(0) - 1].clone();
        context->save_for_backward({initial, weights, biases, trajectory});
        context->saved_data["pass"] = c10::IValue::make_capsule(pass);
        return output;
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& output_gradients) {
        if (at::GradMode::is_enabled())
            throw InvalidArgument("backward of dense_chain", "first derivatives only", "create_graph");
        // Reading the saved variables is also what notices that one was changed in place since.
        const auto saved = context->get_saved_variables();
        const auto pass = c10::static_intrusive_pointer_cast<Forward<T>>(context->saved_data["pass"].toCapsule());
        auto [initial, weights, biases] = run_backward(*pass, saved[3], output_gradients[0]);
        return {initial, weights, biases, Tensor(), Tensor(), Tensor()};
    }
};

template <class T>
Tensor apply(const Tensor& initial, const Tensor& weights, const Tensor& biases, const DenseChainOptions& options,
             const std::shared_ptr<DenseChainMemory>& memory) {
    const bool backward_follows =
        at::GradMode::is_enabled() && (initial.requires_grad() || weights.requires_grad() || biases.requires_grad());
    return DenseChainFunction<T>::apply(initial, weights, biases, options, memory, backward_follows);
}

}  // namespace

Tensor dense_chain(const Tensor& initial, const Tensor& weights, const Tensor& biases, const DenseChainOptions& options,
                   std::shared_ptr<DenseChainMemory> memory) {
    if (!initial.defined() || initial.dim() != 2 || !is_real(initial.scalar_type()) || !is_on_cpu_or_cuda(initial))
        throw InvalidArgument("initial", "float, double, bfloat16 or float16 [batch,width] on the CPU or a GPU",
                              describe(initial));
    const auto type = initial.scalar_type();
    if (is_16_bit(type))
        return dense_chain(initial.to(at::kFloat), widen("weights", weights, type), widen("biases", biases, type),
                           options, std::move(memory))
            .to(type);
    const std::string width = std::to_string(initial.size(1));
    if (!weights.defined() || weights.dim() != 3 || weights.size(1) != initial.size(1) ||
        weights.size(2) != initial.size(1) || weights.scalar_type() != type || weights.device() != initial.device())
        throw InvalidArgument("weights", "[layers," + width + "," + width + "] of initial's type and device",
                              describe(weights));
    if (!biases.defined() || biases.dim() != 2 || biases.size(0) != weights.size(0) ||
        biases.size(1) != initial.size(1) || biases.scalar_type() != type || biases.device() != initial.device())
        throw InvalidArgument("biases",
                              "[" + std::to_string(weights.size(0)) + "," + width + "] of initial's type and device",
                              describe(biases));
    if (weights.size(0) == 0 && !options.whole_trajectory) return initial.clone();
    if (!memory) memory = std::make_shared<DenseChainMemory>();
    return type == at::kFloat ? apply<float>(initial, weights, biases, options, memory)
                              : apply<double>(initial, weights, biases, options, memory);
}

}  // namespace deeppcr::nn
