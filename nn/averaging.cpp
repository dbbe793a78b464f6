#include "nn/averaging.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/nn/modules/batchnorm.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <ctime>
#include <mutex>
#include <span>
#include <utility>

#include <deeppcr/nn/fashion_mnist.hpp>

#include "nn/basics.hpp"
#include "nn/sharing.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

Tensors tensors_of(const NamedTensors& named) {
    Tensors tensors;
    for (const auto& [name, tensor] : named) tensors.push_back(tensor);
    return tensors;
}

Tensors copies_of(const Tensors& tensors) {
    Tensors copies;
    for (const Tensor& tensor : tensors) copies.push_back(tensor.detach().clone());
    return copies;
}

/// Buffers that have a mean; counters have none.
NamedTensors real_buffers(const torch::nn::Module& model) {
    NamedTensors buffers;
    for (const auto& buffer : model.named_buffers())
        if (buffer.value().is_floating_point()) buffers.emplace_back(buffer.key(), buffer.value());
    return buffers;
}

// ------------------------------------------------------------------------------------ a team in one process

/// How many threads may compute at the same time.
class Turns {
public:
    explicit Turns(int count) : free_(count) {}
    void take() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return free_ > 0; });
        --free_;
    }
    void give_back() {
        const std::lock_guard lock(mutex_);
        ++free_;
        changed_.notify_one();
    }

private:
    int free_;
    std::mutex mutex_;
    std::condition_variable changed_;
};

/// Whoever waits for others leaves its turn to them.
class SimulatedTeam : public Team {
public:
    SimulatedTeam(Group& group, Turns& turns) : team_(group), turns_(turns) { turns_.take(); }
    ~SimulatedTeam() override { turns_.give_back(); }
    SimulatedTeam(const SimulatedTeam&) = delete;
    SimulatedTeam& operator=(const SimulatedTeam&) = delete;

    index rank() const override { return team_.rank(); }
    index size() const override { return team_.size(); }
    void average(const Tensors& tensors) override {
        const Pause pause(turns_);
        team_.average(tensors);
    }
    std::vector<std::vector<double>> gather(const std::vector<double>& record) override {
        const Pause pause(turns_);
        return team_.gather(record);
    }
    std::vector<SavedTensors> collect(const SavedTensors& tensors) override {
        const Pause pause(turns_);
        return team_.collect(tensors);
    }

private:
    struct Pause {
        explicit Pause(Turns& all) : turns(all) { turns.give_back(); }
        ~Pause() { turns.take(); }
        Pause(const Pause&) = delete;
        Pause& operator=(const Pause&) = delete;
        Turns& turns;
    };

    GroupTeam team_;
    Turns& turns_;
};

// ------------------------------------------------------------------------------------------ batch norm

template <class Norm>
void prepare(torch::nn::Module& module, std::vector<std::function<void()>>& restore) {
    auto* const norm = module.as<Norm>();
    if (norm == nullptr || !norm->options.track_running_stats()) return;
    const auto momentum = norm->options.momentum();
    restore.push_back([norm, momentum] { norm->options.momentum(momentum); });
    norm->options.momentum(std::decay_t<decltype(momentum)>());  // none: the mean of all batches
    norm->reset_running_stats();
}

}  // namespace

void run_team(index size, int threads, const std::function<void(Team&)>& worker) {
    require(size >= 1, "workers", "at least 1", size);
    require(threads >= 1, "threads", "at least 1", threads);
    Turns turns(threads);
    Group::simulate(int(size), [&](Group& group) {
        at::init_num_threads();  // as the process has them; OpenMP would give each thread all processors
        SimulatedTeam team(group, turns);
        worker(team);
    });
}

void GroupTeam::average(const Tensors& tensors) {
    const at::NoGradGuard no_gradients;
    sum_over(group_, tensors);
    for (const Tensor& tensor : tensors) Tensor(tensor).div_(double(size()));
}

std::vector<std::vector<double>> GroupTeam::gather(const std::vector<double>& record) {
    const std::size_t workers = std::size_t(size());
    const index length = index(record.size());
    std::vector<index> lengths(workers);
    group_.gather(std::span(&length, 1), std::span(lengths));
    const std::size_t longest = std::size_t(*std::max_element(lengths.begin(), lengths.end()));
    std::vector<double> own = record, everything(workers * longest);
    own.resize(longest);
    group_.gather(std::span<const double>(own), std::span(everything));
    std::vector<std::vector<double>> records;
    for (std::size_t worker = 0; worker < workers; ++worker) {
        const auto begin = everything.begin() + std::ptrdiff_t(worker * longest);
        records.emplace_back(begin, begin + lengths[worker]);
    }
    return records;
}

std::vector<SavedTensors> GroupTeam::collect(const SavedTensors& tensors) {
    const int workers = group_.size();
    const auto packed = [](const SavedTensors& all) {
        c10::Dict<std::string, Tensor> named;
        for (const auto& [name, tensor] : all) named.insert(name, tensor.detach().clone());
        return torch::jit::pickle_save(named);
    };
    const auto pass = [this](int to, std::span<const char> sent, int from, std::span<char> received) {
        group_.pass(to, sent, from, received);
    };
    if (rank() > 0) {
        const std::vector<char> bytes = packed(tensors);
        const index count = index(bytes.size());
        group_.pass<index>(0, std::span(&count, 1), -1, {});
        pass(0, bytes, -1, {});
        return {};
    }
    std::vector<SavedTensors> all = {tensors};
    for (auto& [name, tensor] : all.back()) tensor = tensor.detach().clone();
    for (int worker = 1; worker < workers; ++worker) {
        index count = 0;
        group_.pass<index>(-1, {}, worker, std::span(&count, 1));
        std::vector<char> bytes(static_cast<std::size_t>(count));
        pass(-1, {}, worker, bytes);
        SavedTensors& theirs = all.emplace_back();
        for (const auto& item : torch::jit::pickle_load(bytes).toGenericDict())
            theirs[item.key().toStringRef()] = item.value().toTensor();
    }
    return all;
}

Tensor order_of_examples(index examples, std::uint64_t seed, index phase, index worker, index epoch) {
    return shuffled(examples, mixed_seed(seed, std::uint32_t(phase), std::uint32_t(worker + 1)), epoch);
}

NamedTensors state_of(const torch::nn::Module& model) {
    NamedTensors state;
    for (const auto& parameter : model.named_parameters()) state.emplace_back(parameter.key(), parameter.value());
    for (const auto& buffer : model.named_buffers()) state.emplace_back(buffer.key(), buffer.value());
    return state;
}

double thread_seconds() {
    timespec time = {};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

void recompute_statistics(torch::nn::Module& model, const Task& task, index batch) {
    const at::NoGradGuard no_gradients;
    std::vector<std::function<void()>> restore;
    for (const auto& module : model.modules()) {
        prepare<torch::nn::BatchNorm1dImpl>(*module, restore);
        prepare<torch::nn::BatchNorm2dImpl>(*module, restore);
        prepare<torch::nn::BatchNorm3dImpl>(*module, restore);
    }
    if (restore.empty()) return;
    const bool was_training = model.is_training();
    model.train();
    const index size = std::min(batch, task.examples());
    const Tensor rows = at::arange(task.examples(), at::kLong);
    for (index first = 0; first + size <= task.examples(); first += size)
        task.loss(model, rows.slice(0, first, first + size));
    model.train(was_training);
    for (const auto& momentum : restore) momentum();
}

void average_models(torch::nn::Module& model, Team& team) {
    Tensors tensors = model.parameters();
    for (const auto& [name, buffer] : real_buffers(model)) tensors.push_back(buffer);
    team.average(tensors);
}

// ---------------------------------------------------------------------------------------------- a phase

void check(const PhaseOptions& options, index examples, index workers) {
    check(options.optimisation);
    require(options.batch >= 1, "batch", "at least 1", options.batch);
    require(options.micro_batch >= 1, "micro_batch", "at least 1", options.micro_batch);
    require(options.epochs >= 1, "epochs", "at least 1", options.epochs);
    require(options.period >= 0, "period", "at least 0", options.period);
    require(std::isfinite(options.outer_learning_rate) && options.outer_learning_rate > 0, "outer_learning_rate",
            "a finite number above 0", options.outer_learning_rate);
    require(options.outer_momentum >= 0 && options.outer_momentum < 1, "outer_momentum", "0 to below 1",
            options.outer_momentum);
    if (options.period < 2 && (options.outer_learning_rate != 1 || options.outer_momentum != 0))
        throw InvalidArgument("period", "2 or more, as an outer optimiser works on averages of weights",
                              std::to_string(options.period));
    require(options.trajectory_from >= 1, "trajectory_from", "at least 1", options.trajectory_from);
    require(options.trajectory_window >= 1, "trajectory_window", "at least 1", options.trajectory_window);
    if (std::isnan(options.stopping_accuracy))
        throw InvalidArgument("stopping_accuracy", "a part of 1, or more for never", "nan");
    const index together = options.shared_order ? options.batch * workers : options.batch;
    if (together > examples)
        throw InvalidArgument("batch",
                              "at most the number of training examples, " + std::to_string(examples) +
                                  (options.shared_order ? ", of all workers together" : ""),
                              std::to_string(together));
}

namespace {

/// With the number of steps.
PhaseOptions checked(PhaseOptions options, index examples, index workers) {
    check(options, examples, workers);
    const index together = options.shared_order ? options.batch * workers : options.batch;
    options.optimisation.steps = options.epochs * (examples / together);
    return options;
}

NamedTensors named_parameters(const torch::nn::Module& model) {
    NamedTensors parameters;
    for (const auto& parameter : model.named_parameters()) parameters.emplace_back(parameter.key(), parameter.value());
    return parameters;
}

constexpr std::size_t step_fields = 7, meeting_fields = 4;

}  // namespace

Phase::Phase(std::shared_ptr<Module> model, const Task& task, const PhaseOptions& options, Team& team)
    : model_(std::move(model)),
      task_(task),
      options_(checked(options, task.examples(), team.size())),
      team_(team),
      epoch_steps_(options_.optimisation.steps / options_.epochs),
      parameters_(named_parameters(*model_)),
      buffers_(real_buffers(*model_)),
      optimisation_({{parameters_}}, options_.optimisation) {
    model_->train();
    if (options_.outer_learning_rate != 1 || options_.outer_momentum != 0) {
        for (const auto& [name, parameter] : parameters_)
            outer_parameters_.emplace_back("outer." + name, parameter.detach().clone());
        OptimisationOptions outer;
        outer.optimiser = Optimiser::sgd;
        outer.learning_rate = options_.outer_learning_rate;
        outer.momentum = options_.outer_momentum;
        outer.nesterov = true;
        outer.schedule = RateSchedule::constant;
        outer_ = std::make_unique<Optimisation>(std::vector<Optimisation::Group>{{outer_parameters_}}, outer);
    }
}

bool Phase::finished() const { return stopped_ || met_ == steps(); }

Tensor Phase::rows_of_step() {
    const index epoch = step_ / epoch_steps_, position = step_ % epoch_steps_;
    if (order_epoch_ != epoch) {
        order_ = order_of_examples(task_.examples(), options_.seed, options_.number,
                                   options_.shared_order ? -1 : team_.rank(), epoch);
        order_epoch_ = epoch;
    }
    const index piece = options_.shared_order ? position * team_.size() + team_.rank() : position;
    return order_.slice(0, piece * options_.batch, (piece + 1) * options_.batch);
}

void Phase::one_step(const Callbacks& callbacks) {
    const double begin = thread_seconds();
    const bool together = options_.period == 1 && team_.size() > 1;
    const Tensors buffers = tensors_of(buffers_);
    const Tensors before = options_.on_not_finite == OnDivergence::skip ? copies_of(buffers) : Tensors();
    optimisation_.clear_gradients();
    double loss = 0, right = 0;
    for (const Tensor& rows : rows_of_step().split(options_.micro_batch)) {
        const double part = double(rows.size(0)) / double(options_.batch);
        const Task::Loss found = task_.loss(*model_, rows);
        const Tensor scaled = found.mean * part;
        scaled.backward();
        loss += scaled.item<double>();
        right += part * found.right_part;
    }
    double waited = 0;
    if (together) {
        Tensors shared = {at::tensor({loss, right}, at::kDouble)};
        for (auto& [name, parameter] : parameters_) {
            if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
            shared.push_back(parameter.grad());
        }
        shared.insert(shared.end(), buffers.begin(), buffers.end());
        waited = -thread_seconds();
        team_.average(shared);
        waited += thread_seconds();
        loss = shared[0][0].item<double>();
        right = shared[0][1].item<double>();
    }
    const double norm = optimisation_.step(step_, loss);
    const bool finite = std::isfinite(norm);
    if (finite) {
        ++updates_;
        loss_sum_ += loss;
        right_sum_ += right;
        ++steps_;
    } else if (options_.on_not_finite == OnDivergence::skip) {
        const at::NoGradGuard no_gradients;
        for (std::size_t i = 0; i < buffers.size(); ++i) Tensor(buffers[i]).copy_(before[i]);
    } else {
        throw TrainingDiverged(
            not_finite(loss, "step " + std::to_string(step_ + 1) + " of phase " + std::to_string(options_.number) +
                                 (together ? "" : ", worker " + std::to_string(team_.rank()) + ",")) +
            "; a smaller learning rate may help");
    }
    const double seconds = thread_seconds() - begin - waited;
    seconds_ += seconds;
    ++step_;
    if (!together || team_.rank() == 0)
        records_.insert(records_.end(), {double(step_), loss, right, optimisation_.learning_rate(step_ - 1), norm,
                                         seconds, finite ? 0.0 : 1.0});
    if (callbacks.progress) callbacks.progress(double(step_) / double(steps()), loss);
}

Phase::Outcome Phase::advance(const Callbacks& callbacks) {
    index target = std::min((met_ / epoch_steps_ + 1) * epoch_steps_, steps());
    if (options_.period > 0) target = std::min(target, (met_ / options_.period + 1) * options_.period);
    bool interrupted = false;
    while (step_ < target && !interrupted) {
        one_step(callbacks);
        interrupted = callbacks.interrupted && callbacks.interrupted();
    }

    std::vector<double> record = {double(interrupted), loss_sum_, right_sum_, steps_};
    record.insert(record.end(), records_.begin(), records_.end());
    records_.clear();
    const auto records = team_.gather(record);
    double losses = 0, rights = 0;
    for (std::size_t worker = 0; worker < records.size(); ++worker) {
        const std::vector<double>& theirs = records[worker];
        interrupted = interrupted || theirs[0] != 0;
        losses += theirs[1] / theirs[3];
        rights += theirs[2] / theirs[3];
        if (team_.rank() != 0 || !callbacks.step) continue;
        for (std::size_t at = meeting_fields; at < theirs.size(); at += step_fields) {
            SwapStep step;
            step.phase = options_.number;
            step.worker = index(worker);
            step.step = index(theirs[at]);
            step.steps = steps();
            step.epoch = (step.step - 1) / epoch_steps_ + 1;
            step.loss = theirs[at + 1];
            step.accuracy = theirs[at + 2];
            step.learning_rate = theirs[at + 3];
            step.gradient_norm = theirs[at + 4];
            step.seconds = theirs[at + 5];
            step.skipped = theirs[at + 6] != 0;
            callbacks.step(step);
        }
    }
    if (interrupted) return Outcome::interrupted;

    met_ = target;
    const bool epoch_ended = met_ % epoch_steps_ == 0;
    if (epoch_ended) {
        epoch_loss_ = losses / double(team_.size());
        epoch_accuracy_ = rights / double(team_.size());
        loss_sum_ = right_sum_ = steps_ = 0;
        stopped_ = epoch_accuracy_ >= options_.stopping_accuracy;
    }
    if (options_.period > 1 && (met_ % options_.period == 0 || finished())) synchronise();
    if (epoch_ended && options_.trajectory != Trajectory::last && epoch() >= options_.trajectory_from)
        keep_trajectory();
    return epoch_ended ? Outcome::epoch_ended : Outcome::met;
}

void Phase::synchronise() {
    average_models(*model_, team_);
    if (!outer_) return;
    const at::NoGradGuard no_gradients;
    for (std::size_t i = 0; i < parameters_.size(); ++i)
        outer_parameters_[i].second.mutable_grad() = outer_parameters_[i].second - parameters_[i].second;
    if (!std::isfinite(outer_->step(outer_updates_)))
        throw TrainingDiverged("the outer gradient of step " + std::to_string(step_) + " is not finite");
    ++outer_updates_;
    for (std::size_t i = 0; i < parameters_.size(); ++i) parameters_[i].second.copy_(outer_parameters_[i].second);
}

void Phase::keep_trajectory() {
    const at::NoGradGuard no_gradients;
    ++trajectory_count_;
    if (options_.trajectory == Trajectory::lawa || trajectory_.empty()) {
        trajectory_.push_back(copies_of(tensors_of(parameters_)));
        if (index(trajectory_.size()) > options_.trajectory_window) trajectory_.pop_front();
    } else {
        for (std::size_t i = 0; i < parameters_.size(); ++i)
            trajectory_[0][i].add_((parameters_[i].second - trajectory_[0][i]).div_(double(trajectory_count_)));
    }
}

bool Phase::take_trajectory() {
    if (trajectory_.empty()) return false;
    const at::NoGradGuard no_gradients;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
        Tensor sum = trajectory_[0][i].clone();
        for (std::size_t k = 1; k < trajectory_.size(); ++k) sum.add_(trajectory_[k][i]);
        parameters_[i].second.copy_(sum.div_(double(trajectory_.size())));
    }
    return true;
}

// ------------------------------------------------------------------------------- the state of a phase

SavedTensors Phase::state() const {
    SavedTensors saved;
    const auto keep = [&](const std::string& name, const Tensor& tensor) { saved[name] = tensor.detach().clone(); };
    for (const auto& [name, tensor] : state_of(*model_)) keep(name, tensor);
    optimisation_.visit_state(keep);
    for (const auto& [name, tensor] : outer_parameters_) keep(name, tensor);
    if (outer_) outer_->visit_state(keep);
    for (std::size_t k = 0; k < trajectory_.size(); ++k)
        for (std::size_t i = 0; i < parameters_.size(); ++i)
            keep("trajectory." + std::to_string(k) + "." + parameters_[i].first, trajectory_[k][i]);
    saved["counts"] = at::tensor(
        {step_, met_, updates_, outer_updates_, trajectory_count_, index(trajectory_.size()), index(stopped_)},
        at::kLong);
    saved["sums"] = at::tensor({loss_sum_, right_sum_, steps_, epoch_loss_, epoch_accuracy_, seconds_}, at::kDouble);
    return saved;
}

void Phase::restore(const std::function<Tensor(const std::string& name, const Tensor& like)>& take) {
    const at::NoGradGuard no_gradients;
    const auto copy = [&](const std::string& name, const Tensor& like) { return take(name, like).clone(); };
    const Tensor counts = take("counts", at::empty({7}, at::kLong));
    const auto* const count = counts.data_ptr<std::int64_t>();
    if (count[0] < 0 || count[0] > steps() || count[1] < 0 || count[1] > steps() || count[5] < 0 ||
        count[5] > std::max(options_.trajectory_window, options_.epochs))
        throw InvalidArgument("counts", "those of a phase of " + std::to_string(steps()) + " steps",
                              std::to_string(count[0]) + ", " + std::to_string(count[1]));
    step_ = count[0];
    met_ = count[1];
    updates_ = count[2];
    outer_updates_ = count[3];
    trajectory_count_ = count[4];
    stopped_ = count[6] != 0;
    const Tensor sums = take("sums", at::empty({6}, at::kDouble));
    const auto* const sum = sums.data_ptr<double>();
    loss_sum_ = sum[0];
    right_sum_ = sum[1];
    steps_ = sum[2];
    epoch_loss_ = sum[3];
    epoch_accuracy_ = sum[4];
    seconds_ = sum[5];
    for (const auto& [name, tensor] : state_of(*model_)) Tensor(tensor).copy_(take(name, tensor));
    if (updates_ > 0) optimisation_.restore_state(updates_, copy);
    for (auto& [name, tensor] : outer_parameters_) tensor.copy_(take(name, tensor));
    if (outer_updates_ > 0) outer_->restore_state(outer_updates_, copy);
    trajectory_.clear();
    for (index k = 0; k < count[5]; ++k) {
        trajectory_.emplace_back();
        for (const auto& [name, parameter] : parameters_)
            trajectory_.back().push_back(copy("trajectory." + std::to_string(k) + "." + name, parameter));
    }
}

}  // namespace deeppcr::nn
