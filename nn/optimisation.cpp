#include "nn/optimisation.hpp"

#include <ATen/ops/zeros_like.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
// Not self-contained in 1.13:
#include <torch/nn/utils/clip_grad.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "nn/basics.hpp"
#include "nn/device_scope.hpp"
#include "nn/libtorch.hpp"
#include "nn/sharing.hpp"

namespace deeppcr::nn {

using at::Tensor;

void check(const OptimisationOptions& options) {
    const auto require_amount = [&](const char* name, double value) {
        require(std::isfinite(value) && value >= 0, name, "a finite number, at least 0", value);
    };
    require(options.steps >= 0, "steps", "at least 0", options.steps);
    require(options.warm_up >= 0, "warm_up", "at least 0", options.warm_up);
    require(std::isfinite(options.learning_rate) && options.learning_rate > 0, "learning_rate",
            "a finite number above 0", options.learning_rate);
    require_amount("weight_decay", options.weight_decay);
    require_amount("gradient_clip", options.gradient_clip);
    require(options.momentum >= 0 && options.momentum < 1, "momentum", "0 to below 1", options.momentum);
}

std::string not_finite(double loss, const std::string& step) {
    return std::string(std::isfinite(loss) ? "the gradient" : "the loss") + " of " + step + " is not finite";
}

Optimisation::Optimisation(std::vector<Group> groups, const OptimisationOptions& options) : options_(options) {
    using torch::optim::AdamWOptions, torch::optim::SGDOptions;
    check(options);
    AdamWOptions adamw(options.learning_rate);
    SGDOptions sgd(options.learning_rate);
    sgd.momentum(options.momentum).nesterov(options.nesterov && options.momentum > 0);
    std::vector<torch::optim::OptimizerParamGroup> torch_groups;
    for (Group& group : groups) {
        std::vector<Tensor> tensors;
        for (auto& named : group.parameters) {
            tensors.push_back(named.second);
            parameters_.push_back(std::move(named));
        }
        const double decay = group.decays ? options.weight_decay : 0;
        if (options.optimiser == Optimiser::adamw)
            torch_groups.emplace_back(tensors, std::make_unique<AdamWOptions>(adamw.weight_decay(decay)));
        else
            torch_groups.emplace_back(tensors, std::make_unique<SGDOptions>(sgd.weight_decay(decay)));
        factors_.push_back(group.factor);
    }
    if (options.optimiser == Optimiser::adamw)
        optimiser_ = std::make_unique<torch::optim::AdamW>(torch_groups, adamw);
    else
        optimiser_ = std::make_unique<torch::optim::SGD>(torch_groups, sgd);
}

double Optimisation::learning_rate(index step) const {
    const index warm_up = std::min(options_.warm_up, options_.steps);
    if (step < warm_up) return options_.learning_rate * double(step + 1) / double(warm_up);
    if (options_.schedule == RateSchedule::constant) return options_.learning_rate;
    const double done = double(step - warm_up) / double(std::max<index>(1, options_.steps - warm_up));
    return options_.learning_rate * 0.5 * (1 + std::cos(std::numbers::pi * done));
}

void Optimisation::clear_gradients() {
    for (auto& [name, parameter] : parameters_) parameter.mutable_grad() = Tensor();
}

void Optimisation::share(deeppcr::Group& ranks, const std::vector<Tensor>& complete) {
    ranks_ = &ranks;
    for (const auto& [name, parameter] : parameters_)
        if (std::none_of(complete.begin(), complete.end(),
                         [&parameter = parameter](const Tensor& other) { return parameter.is_same(other); }))
            shared_.push_back(parameter);
    // Ranks on GPUs are connected now, while memory is free, and not in the first step.
    if (!shared_.empty() && shared_.front().is_cuda()) {
        const DeviceScope here(shared_.front());
        ranks.sums_between_gpus();
    }
}

double Optimisation::step(index number, double loss) {
    if (!std::isfinite(loss)) return std::numeric_limits<double>::quiet_NaN();
    if (ranks_ != nullptr) {
        std::vector<Tensor> gradients;
        for (Tensor& parameter : shared_) {
            if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
            gradients.push_back(parameter.grad());
        }
        sum_over(*ranks_, gradients);
    }
    std::vector<Tensor> tensors;
    for (const auto& [name, parameter] : parameters_) tensors.push_back(parameter);
    const double limit = options_.gradient_clip > 0 ? options_.gradient_clip : std::numeric_limits<double>::infinity();
    const double norm = torch::nn::utils::clip_grad_norm_(tensors, limit);
    if (!std::isfinite(norm)) return norm;
    auto& groups = optimiser_->param_groups();
    for (std::size_t i = 0; i < groups.size(); ++i) groups[i].options().set_lr(learning_rate(number) * factors_[i]);
    optimiser_->step();
    return norm;
}

void Optimisation::visit_state(const std::function<void(const std::string& name, const Tensor& tensor)>& visit) const {
    using namespace torch::optim;
    for (const auto& [name, parameter] : parameters_) {
        const auto found = optimiser_->state().find(state_key(*optimiser_, parameter));
        if (found == optimiser_->state().end()) continue;
        if (options_.optimiser == Optimiser::adamw) {
            const auto& state = static_cast<const AdamWParamState&>(*found->second);
            visit("optimiser.exp_avg." + name, state.exp_avg());
            visit("optimiser.exp_avg_sq." + name, state.exp_avg_sq());
        } else if (const auto& state = static_cast<const SGDParamState&>(*found->second);
                   state.momentum_buffer().defined()) {
            visit("optimiser.momentum_buffer." + name, state.momentum_buffer());
        }
    }
}

void Optimisation::restore_state(index step,
                                 const std::function<Tensor(const std::string& name, const Tensor& like)>& take) {
    using namespace torch::optim;
    for (const auto& [name, parameter] : parameters_) {
        std::unique_ptr<OptimizerParamState> restored;
        if (options_.optimiser == Optimiser::adamw) {
            auto state = std::make_unique<AdamWParamState>();
            state->step(step);
            state->exp_avg(take("optimiser.exp_avg." + name, parameter));
            state->exp_avg_sq(take("optimiser.exp_avg_sq." + name, parameter));
            restored = std::move(state);
        } else if (options_.momentum > 0) {
            auto state = std::make_unique<SGDParamState>();
            state->momentum_buffer(take("optimiser.momentum_buffer." + name, parameter));
            restored = std::move(state);
        }
        if (restored) optimiser_->state()[state_key(*optimiser_, parameter)] = std::move(restored);
    }
}

void Optimisation::save(SavedTensors& tensors) const {
    const auto keep = [&](const std::string& name, const Tensor& tensor) { tensors[name] = tensor; };
    for (const auto& [name, parameter] : parameters_) keep(name, parameter);
    visit_state(keep);
}

void Optimisation::restore(index updates, const std::filesystem::path& path, const SavedTensors& tensors) {
    if (updates == 0) return;
    restore_state(updates, [&](const std::string& name, const Tensor& like) {
        return find(path, tensors, name, like).to(like.device(), like.scalar_type(), false, /*copy=*/true);
    });
}

}  // namespace deeppcr::nn
