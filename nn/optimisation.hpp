// LibTorch's optimisers with a schedule of learning rates, and their state by names that a checkpoint can hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/optim/optimizer.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <deeppcr/array.hpp>
#include <deeppcr/group.hpp>
#include <deeppcr/nn/names.hpp>

#include "nn/saved_state.hpp"

namespace deeppcr::nn {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

struct OptimisationOptions {
    Optimiser optimiser = Optimiser::adamw;
    double learning_rate = 1e-3;  ///< at its highest
    index warm_up = 0;            ///< steps of linear growth; the schedule leads on from there
    index steps = 1;
    double weight_decay = 0;
    double momentum = 0.9;                         ///< of sgd
    double gradient_clip = 0;                      ///< the norm of all gradients is limited to this; 0: not
    RateSchedule schedule = RateSchedule::cosine;  ///< after the warm-up
    bool nesterov = false;                         ///< of sgd
};

/// Throws InvalidArgument for a number that is out of its range.
void check(const OptimisationOptions& options);

/// What is wrong with a step whose loss or, where that is finite, gradient is not.
std::string not_finite(double loss, const std::string& step);

class Optimisation {
public:
    /// Parameters whose learning rate is `factor` times the schedule's.
    struct Group {
        NamedTensors parameters;
        double factor = 1;
        bool decays = true;  ///< or the weight decay is not for them
    };
    Optimisation(std::vector<Group> groups, const OptimisationOptions& options);

    /// From here on gradients are summed over the ranks before each step, but for those of `complete`, parameters whose
    /// gradients all ranks have already. `step` is collective then.
    void share(deeppcr::Group& ranks, const std::vector<at::Tensor>& complete = {});

    /// step: 0..steps-1.
    double learning_rate(index step) const;
    void clear_gradients();
    /// Limits the gradients' norm and updates the parameters. Returns the norm, or NaN where `loss`, whose gradients
    /// they are, is not finite; where it is not finite, nothing is updated.
    double step(index number, double loss = 0);

    /// visit("optimiser.<what>.<parameter>", tensor) for each tensor of the optimiser's state.
    void visit_state(const std::function<void(const std::string& name, const at::Tensor& tensor)>& visit) const;
    /// take(name, like): the saved tensor of that name, of the shape of `like`; it is kept.
    void restore_state(index step,
                       const std::function<at::Tensor(const std::string& name, const at::Tensor& like)>& take);

    /// For a checkpoint: adds the parameters by their names, and the optimiser's state.
    void save(SavedTensors& tensors) const;
    /// The optimiser's state after so many updates. Throws FileError, about `path`.
    void restore(index updates, const std::filesystem::path& path, const SavedTensors& tensors);

private:
    OptimisationOptions options_;
    std::vector<double> factors_;
    NamedTensors parameters_;
    std::unique_ptr<torch::optim::Optimizer> optimiser_;
    deeppcr::Group* ranks_ = nullptr;
    std::vector<at::Tensor> shared_;  ///< parameters whose gradients are summed
};

}  // namespace deeppcr::nn
