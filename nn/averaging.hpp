// Training by workers whose gradients or weights are averaged, in one engine. The period between averages makes the
// method: 1 is data-parallel training, several steps local SGD (with an outer optimiser: DiLoCo), none SWAP's second
// phase.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <deeppcr/group.hpp>
#include <deeppcr/nn/swap.hpp>

#include "nn/optimisation.hpp"
#include "nn/saved_state.hpp"

namespace deeppcr::nn {

/// All workers of a training, as one of them sees the others. Every call but the first two is made by all of them, in
/// the same order, and returns when all have come.
class Team {
public:
    virtual ~Team() = default;
    virtual index rank() const = 0;
    virtual index size() const = 0;
    /// Replaces each tensor by its mean over the workers: the sum of `sum_over`, divided by their number. The same bits
    /// for all. Shapes and types are the same for all.
    virtual void average(const std::vector<at::Tensor>& tensors) = 0;
    /// Everyone's record, for everyone, in the order of ranks. Records may be of different lengths.
    virtual std::vector<std::vector<double>> gather(const std::vector<double>& record) = 0;
    /// Copies of everyone's tensors in the order of ranks, for worker 0; for the others nothing.
    virtual std::vector<SavedTensors> collect(const SavedTensors& tensors) = 0;
};

/// The ranks of a Group, each of them a worker.
class GroupTeam : public Team {
public:
    explicit GroupTeam(Group& group) : group_(group) {}
    index rank() const override { return group_.rank(); }
    index size() const override { return group_.size(); }
    void average(const std::vector<at::Tensor>& tensors) override;
    std::vector<std::vector<double>> gather(const std::vector<double>& record) override;
    std::vector<SavedTensors> collect(const SavedTensors& tensors) override;

private:
    Group& group_;
};

/// Runs `worker` for a team of `size` simulated in this process, each in a thread of its own, of which at most
/// `threads` compute at the same time. Results do not depend on `threads`, and are those of a GroupTeam of as many
/// processes. An exception of one ends all, and is thrown here: that of the lowest rank. Throws InvalidArgument.
void run_team(index size, int threads, const std::function<void(Team&)>& worker);

/// What is trained, and by which examples. Its functions are called from all workers' threads at once.
class Task {
public:
    struct Loss {
        at::Tensor mean;        ///< over the rows, differentiable
        double right_part = 0;  ///< of the rows that were predicted rightly; where there is no such thing, 0
    };
    virtual ~Task() = default;
    /// A new model, the same at every call.
    virtual std::shared_ptr<torch::nn::Module> make_model() const = 0;
    virtual index examples() const = 0;
    /// Of the examples `rows`, 64-bit.
    virtual Loss loss(torch::nn::Module& model, const at::Tensor& rows) const = 0;
};

/// The order of an epoch's examples: of a worker, or of all workers together (worker -1). epoch: from 0.
at::Tensor order_of_examples(index examples, std::uint64_t seed, index phase, index worker, index epoch);

struct PhaseOptions {
    index number = 1;  ///< of the phase; orders differ between phases
    std::uint64_t seed = 1;
    index period = 0;           ///< steps between averages; 0: never
    bool shared_order = false;  ///< the workers take parts of the same batch, in the order of ranks; else each its own
    index batch = 64;           ///< of each worker
    index micro_batch = 256;    ///< a larger batch passes through the model in pieces of this size
    index epochs = 1;
    double stopping_accuracy = 2;      ///< the phase ends after an epoch whose training accuracy is at least this
    OptimisationOptions optimisation;  ///< its `steps` are set by the phase
    double outer_learning_rate = 1, outer_momentum = 0;
    Trajectory trajectory = Trajectory::last;
    index trajectory_from = 1, trajectory_window = 5;
    OnDivergence on_not_finite = OnDivergence::stop;
};

/// Throws InvalidArgument for options that no phase of so many workers, over so many examples, can have.
void check(const PhaseOptions& options, index examples, index workers);

/// One phase of one worker.
///
/// Period 1: the gradients are averaged before each step, so that equal models with equal optimisers stay equal, for
/// any optimiser; averaged weights would do the same only for SGD, whose steps are linear in the gradients. Batch norm
/// normalises by each worker's own piece of the batch, and its running statistics are averaged with the gradients.
/// Period n: weights and running statistics are averaged after every n steps and at the end, optimisers keep their
/// state. Period 0: the caller averages.
///
/// Deterministic: the same options, examples and team size give the same bits.
class Phase {
public:
    using Module = torch::nn::Module;
    /// Throws InvalidArgument.
    Phase(std::shared_ptr<Module> model, const Task& task, const PhaseOptions& options, Team& team);

    enum class Outcome { met, epoch_ended, interrupted };
    struct Callbacks {
        std::function<void(const SwapStep&)> step = {};               ///< for worker 0: everyone's, once all have met
        std::function<void(double done, double loss)> progress = {};  ///< after each own step
        std::function<bool()> interrupted = {};
    };
    /// Trains up to where the workers meet next: an average, or the end of an epoch. `interrupted` means that someone
    /// was: everyone stops, perhaps at different steps, in a state that can be saved and restored.
    Outcome advance(const Callbacks& callbacks);
    bool finished() const;

    index step() const { return step_; }
    index steps() const { return options_.optimisation.steps; }
    index epoch() const { return met_ / epoch_steps_; }  ///< how many have ended
    /// Means over the epoch that has just ended, and over the workers.
    double epoch_loss() const { return epoch_loss_; }
    double epoch_accuracy() const { return epoch_accuracy_; }
    double processor_seconds() const { return seconds_; }  ///< of this worker's steps so far

    /// Puts the mean of the trajectory, where one is kept, in place of the weights. True: running statistics are stale.
    bool take_trajectory();

    /// Everything that a later phase with the same options needs to go on to the same bits.
    SavedTensors state() const;
    /// take(name, like): the saved tensor, of the type and shape of `like`; it is copied.
    void restore(const std::function<at::Tensor(const std::string& name, const at::Tensor& like)>& take);

private:
    void one_step(const Callbacks& callbacks);
    void synchronise();
    void keep_trajectory();
    at::Tensor rows_of_step();

    std::shared_ptr<Module> model_;
    const Task& task_;
    PhaseOptions options_;
    Team& team_;
    index epoch_steps_ = 0;
    NamedTensors parameters_, buffers_;
    Optimisation optimisation_;
    NamedTensors outer_parameters_;  ///< the last average, where there is an outer optimiser
    std::unique_ptr<Optimisation> outer_;
    std::deque<std::vector<at::Tensor>> trajectory_;  ///< of SWA one: the mean so far
    at::Tensor order_;
    index order_epoch_ = -1;

    index step_ = 0, met_ = 0;  ///< done by this worker; where all met last
    index updates_ = 0, outer_updates_ = 0, trajectory_count_ = 0;
    bool stopped_ = false;                             ///< by its accuracy
    double loss_sum_ = 0, right_sum_ = 0, steps_ = 0;  ///< over the epoch's steps, but for those left out
    double epoch_loss_ = 0, epoch_accuracy_ = 0, seconds_ = 0;
    std::vector<double> records_;  ///< of the steps since the workers met
};

/// Sets every batch norm's running statistics to the means, over one pass of batches of this size in the order of the
/// examples, of the batches' means and (unbiased) variances, as they are in training. Examples that fill no last batch
/// are left out.
void recompute_statistics(torch::nn::Module& model, const Task& task, index batch);

/// SWAP's third phase: weights and running statistics averaged over the team. The statistics are stale until
/// recomputed.
void average_models(torch::nn::Module& model, Team& team);

/// Parameters and buffers by their names.
NamedTensors state_of(const torch::nn::Module& model);

/// Seconds of a processor that this thread has used.
double thread_seconds();

}  // namespace deeppcr::nn
