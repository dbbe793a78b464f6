#include <deeppcr/nn/training.hpp>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <torch/version.h>

#include <cmath>
#include <memory>
#include <optional>

#include <deeppcr/nn/fashion_mnist.hpp>
#include <deeppcr/nn/residual_network.hpp>

#include "nn/device_scope.hpp"
#include "nn/threads.hpp"
#include "nn/training_loop.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

const std::string format = "deeppcr residual network 1";

std::string shape_text(const Tensor& tensor) {
    std::string text = "[";
    for (index d = 0; d < tensor.dim(); ++d) text += (d ? "," : "") + std::to_string(tensor.size(d));
    return text + "]";
}

// ------------------------------------------------------------------------------------------------- options

OptimisationOptions optimisation_options(const TrainingOptions& options, index steps) {
    return {options.optimiser,    options.learning_rate, options.warm_up,      steps,
            options.weight_decay, options.momentum,      options.gradient_clip};
}

void check(const TrainingOptions& options) {
    require(options.batch >= 1, "batch", "at least 1", options.batch);
    const index ranks = Share(options.group).ranks();
    require(options.batch % ranks == 0, "batch", "a multiple of the " + std::to_string(ranks) + " ranks",
            options.batch);
    require(options.epochs >= 1, "epochs", "at least 1", options.epochs);
    check(optimisation_options(options, options.steps));
    require(options.checkpoint_interval >= 0, "checkpoint_interval", "at least 0", options.checkpoint_interval);
    require(std::isfinite(options.trunk_learning_rate) && options.trunk_learning_rate >= 0, "trunk_learning_rate",
            "a finite number, at least 0", options.trunk_learning_rate);
}

// ------------------------------------------------------------------------------------------- the checkpoint

/// Everything that a training needs to go on to the same numbers.
struct State {
    TrainingOptions options;  ///< without `resume`, `checkpoint`, `data`: they are the caller's
    index step = 0;           ///< done so far
    double epoch_loss = 0, epoch_accuracy = 0, epoch_seconds = 0;  ///< sums over the steps of the epoch under way
    SavedTensors tensors;  ///< Optimisation::save's; "prediction": DenseChainMemory's, where there is one
};

/// What a resumed training must have in common with its checkpoint.
template <class O, class Visit>
void visit_fixed_fields(O& options, const Visit& visit) {
    visit("layers", options.layers);
    visit("width", options.width);
    visit("skip", options.skip);
    visit("activation", options.activation, activation_names);
    visit("train_images", options.train_images);
    visit("held_out", options.held_out);
    visit("batch", options.batch);
    visit("seed", options.seed);
    visit("optimiser", options.optimiser, optimiser_names);
}

template <class S, class Visit>
void visit_fields(S& state, const Visit& visit) {
    auto& options = state.options;
    visit("step", state.step);
    visit("epoch_loss", state.epoch_loss);
    visit("epoch_accuracy", state.epoch_accuracy);
    visit("epoch_seconds", state.epoch_seconds);
    visit_fixed_fields(options, visit);
    visit("epochs", options.epochs);
    visit("steps", options.steps);
    visit("learning_rate", options.learning_rate);
    visit("trunk_learning_rate", options.trunk_learning_rate);
    visit("warm_up", options.warm_up);
    visit("weight_decay", options.weight_decay);
    visit("momentum", options.momentum);
    visit("gradient_clip", options.gradient_clip);
    visit("checkpoint_interval", options.checkpoint_interval);
    visit_evaluation(options.evaluation, open_method_names, visit);
}

Metadata fixed_fields(const TrainingOptions& options) {
    Metadata fields;
    visit_fixed_fields(options, put_into(fields));
    return fields;
}

State from_saved(const std::filesystem::path& path, SavedState saved) {
    State state;
    visit_fields(state, get_from(path, saved.metadata));
    if (state.step < 0) throw FileError(path, "a count as metadata \"step\"", std::to_string(state.step));
    state.tensors = std::move(saved.tensors);
    return state;
}

// ------------------------------------------------------------------------------------------------- network

ResidualNetwork make_network(const TrainingOptions& options) {
    return ResidualNetwork(ResidualNetworkOptions(options.layers, options.width)
                               .skip(options.skip)
                               .activation(options.activation)
                               .seed(options.seed)
                               .evaluation(options.evaluation));
}

/// The network of a checkpoint. The file's own tensors are compared with its metadata before anything is built from it.
ResidualNetwork make_network(const std::filesystem::path& path, const State& checkpoint) {
    const TrainingOptions& options = checkpoint.options;
    const auto weights = checkpoint.tensors.find("layers.weight");
    if (weights == checkpoint.tensors.end() ||
        weights->second.sizes() != at::IntArrayRef({options.layers, options.width, options.width}))
        throw FileError(
            path,
            "tensor layers.weight of " + std::to_string(options.layers) + " layers x " + std::to_string(options.width),
            weights == checkpoint.tensors.end() ? "none" : shape_text(weights->second));
    ResidualNetwork network = make_network(options);
    const at::NoGradGuard no_gradients;
    for (auto& parameter : network->named_parameters())
        parameter.value().copy_(find(path, checkpoint.tensors, parameter.key(), parameter.value()));
    if (const auto found = checkpoint.tensors.find("prediction"); found != checkpoint.tensors.end())
        network->memory->prediction = found->second;
    return network;
}

void move(ResidualNetwork& network, at::Device device) {
    network->to(device);
    Tensor& prediction = network->memory->prediction;
    if (prediction.defined()) prediction = prediction.to(device);
}

index correct(const Tensor& logits, const Tensor& labels) {
    return logits.detach().argmax(1).eq(labels).sum().item<index>();
}

/// Loss and accuracy on a set. The network's memory is left as it is, so that a validation in between does not change
/// the training.
ValidationResult measure(ResidualNetwork& network, const ImageSet& set, index batch, const Share& share,
                         const std::function<void(double)>& progress, const std::function<bool()>& interrupted) {
    const at::NoGradGuard no_gradients;
    const auto begin = Clock::now();
    const auto training_memory = network->memory;
    struct Restore {
        ResidualNetwork& network;
        std::shared_ptr<DenseChainMemory> memory;
        ~Restore() { network->memory = memory; }
    } restore{network, training_memory};
    network->memory = std::make_shared<DenseChainMemory>();
    network->memory->prediction = training_memory->prediction;

    ValidationResult result;
    std::vector<double> sums(4), maxima(1);
    double &loss = sums[0], &right = sums[1], &iterations = sums[2], &batches = sums[3];
    for (index first = 0; first < set.size(); first += batch) {
        if (share.any(interrupted && interrupted())) break;
        const index last = std::min(first + batch, set.size());
        const auto [from, to] = share.part(last - first);
        if (to > from) {
            const auto part = set.batch(first + from, first + to);
            const Tensor logits = network->forward(part.images);
            loss += at::cross_entropy_loss(logits, part.labels).item<double>() * double(to - from);
            right += double(correct(logits, part.labels));
            iterations += double(network->memory->forward.iterations);
            maxima[0] = std::max(maxima[0], network->memory->forward.residual);
            ++batches;
        }
        result.images = last;
        if (progress) progress(double(last) / double(set.size()));
    }
    share.reduce(sums, maxima);
    if (result.images > 0) {
        result.loss = loss / double(result.images);
        result.accuracy = right / double(result.images);
        result.iterations = iterations / batches;
        result.residual = maxima[0];
    }
    result.seconds = seconds_since(begin);
    return result;
}

// ---------------------------------------------------------------------------------------------- optimisers

/// Encoder and decoder; the trunk.
std::vector<Optimisation::Group> parameter_groups(const ResidualNetwork& network, const TrainingOptions& options) {
    Optimisation::Group ends, trunk;
    trunk.factor = (options.trunk_learning_rate > 0 ? options.trunk_learning_rate
                                                    : options.learning_rate / double(options.layers)) /
                   options.learning_rate;
    for (const auto& parameter : network->named_parameters())
        (parameter.key().starts_with("layers.") ? trunk : ends)
            .parameters.emplace_back(parameter.key(), parameter.value());
    return {ends, trunk};
}

/// Of all ranks, in place of this one's.
void gather(StepRecord& record, const Share& share) {
    std::vector<double> sums = {record.accuracy, record.mean_iterations, double(record.sequential_steps)},
                        maxima = {double(record.iterations), record.residual, double(record.status)};
    share.reduce(sums, maxima);
    record.accuracy = sums[0];
    record.mean_iterations = sums[1];
    record.sequential_steps = index(sums[2]);
    record.iterations = index(maxima[0]);
    record.residual = maxima[1];
    record.status = Status(int(maxima[2]));
}

Tensor mean_loss(ResidualNetwork& network, const ImageSet::Batch& batch, Tensor& logits) {
    logits = network->forward(batch.images);
    return at::cross_entropy_loss(logits, batch.labels);
}

// --------------------------------------------------------------------------------------------- the training

class Training : TrainingLoop<TrainingOptions, TrainingCallbacks, TrainingResult> {
public:
    Training(const TrainingOptions& options, const TrainingCallbacks& callbacks)
        : TrainingLoop(options, callbacks, Share(options.group)), device_(device_of(options.device, options.group)) {
        if (options.resume.empty()) {
            network_ = make_network(options);
        } else {
            state_ = from_saved(options.resume, load(format));
            check_continues(fixed_fields(options), fixed_fields(state_.options));
            network_ = make_network(options.resume, state_);
            network_->options.evaluation(options.evaluation);
        }
        state_.options = options;
        move(network_, device_);

        data_ = load_fashion_mnist(options.data, options.seed, options.held_out, options.train_images).to(device_);
        epoch_steps_ = data_.training.size() / options.batch;
        require(epoch_steps_ >= 1, "batch",
                "at most the number of training images, " + std::to_string(data_.training.size()), options.batch);
        steps_ = options.steps > 0 ? options.steps : options.epochs * epoch_steps_;
        require(state_.step <= steps_, "steps",
                "at least the " + std::to_string(state_.step) + " steps of the checkpoint", steps_);

        optimisation_.emplace(parameter_groups(network_, options), optimisation_options(options, steps_));
        if (share_.group() != nullptr) optimisation_->share(*share_.group());
        optimisation_->restore(state_.step, options.resume, state_.tensors);
        state_.tensors.clear();
    }

    TrainingResult run() {
        start(network_->parameters());
        while (state_.step < steps_ && !result_.interrupted) {
            StepRecord step = one_step();
            tell(step, steps_ - state_.step);
            if (const bool epoch_ends = step.epoch_step == epoch_steps_; epoch_ends || state_.step == steps_) {
                end_epoch(step);
                if (epoch_ends) state_.epoch_loss = state_.epoch_accuracy = state_.epoch_seconds = 0;
                save();
            } else if (result_.interrupted || due(options_.checkpoint_interval, state_.step)) {
                save();
            }
        }
        if (options_.test && !result_.interrupted) result_.test = validate(data_.test);
        return conclude();
    }

private:
    void save() {
        if (!saves()) return;
        SavedState saved{{{"format", format}}, {}};
        visit_fields(state_, put_into(saved.metadata));
        optimisation_->save(saved.tensors);
        if (network_->memory->prediction.defined()) saved.tensors["prediction"] = network_->memory->prediction;
        checkpoint_.save(saved);
    }

    StepRecord one_step() {
        const auto begin = Clock::now();
        const index epoch = state_.step / epoch_steps_, position = state_.step % epoch_steps_, rows = options_.batch;
        if (!order_.defined() || position == 0)
            order_ = shuffled(data_.training.size(), options_.seed, epoch).to(device_);
        const auto [first, last] = share_.part(rows);
        const auto batch = data_.training.batch(order_.slice(0, position * rows + first, position * rows + last));

        optimisation_->clear_gradients();
        Tensor logits;
        const Tensor loss = mean_loss(network_, batch, logits) / double(share_.ranks());
        StepRecord record;
        record.step = state_.step + 1;
        record.steps = steps_;
        record.epoch = epoch + 1;
        record.epochs = (steps_ + epoch_steps_ - 1) / epoch_steps_;
        record.epoch_step = position + 1;
        record.epoch_steps = std::min(epoch_steps_, steps_ - epoch * epoch_steps_);
        record.learning_rate = optimisation_->learning_rate(state_.step);
        record.loss = share_.sum(loss.item<double>());
        if (std::isfinite(record.loss)) loss.backward();
        record.gradient_norm = optimisation_->step(state_.step, record.loss);
        updated(record.loss, record.gradient_norm, "step " + std::to_string(record.step));

        const Report& forward = network_->memory->forward;
        record.accuracy = double(correct(logits, batch.labels)) / double(rows);
        record.iterations = forward.iterations;
        for (const auto& sequence : forward.sequences)
            record.mean_iterations += double(sequence.iterations) / double(rows);
        record.residual = forward.residual;
        record.status = forward.status;
        record.sequential_steps = forward.iterations > 0 ? forward.sequential_steps : 0;  // that Newton's method left
        record.forward_seconds = forward.seconds;
        record.backward_seconds = network_->memory->backward.seconds;
        gather(record, share_);
        record.seconds = seconds_since(begin);
        ++state_.step;
        state_.epoch_loss += record.loss;
        state_.epoch_accuracy += record.accuracy;
        state_.epoch_seconds += record.seconds;
        return record;
    }

    /// last: its last step.
    void end_epoch(const StepRecord& last) {
        EpochRecord summary{last.epoch, last.step, 0, 0, {}, state_.epoch_seconds};
        summary.loss = state_.epoch_loss / double(last.epoch_step);
        summary.accuracy = state_.epoch_accuracy / double(last.epoch_step);
        if (data_.held_out.size() > 0 && !result_.interrupted) summary.validation = validate(data_.held_out);
        if (result_.interrupted) return;
        result_.epochs.push_back(summary);
        if (callbacks_.epoch) callbacks_.epoch(summary);
    }

    ValidationResult validate(const ImageSet& set) {
        const ValidationResult found =
            measure(network_, set, options_.batch, share_, callbacks_.validation, callbacks_.interrupted);
        result_.interrupted = found.images < set.size();
        return found;
    }

    at::Device device_;
    ResidualNetwork network_ = nullptr;
    FashionMnist data_;
    index epoch_steps_ = 0, steps_ = 0;
    State state_;
    std::optional<Optimisation> optimisation_;
    Tensor order_;
};

}  // namespace

TrainingResult train(const TrainingOptions& options, const TrainingCallbacks& callbacks) {
    check(options);
    limit_threads(1);
    return Training(options, callbacks).run();
}

TrainingOptions checkpoint_options(const std::filesystem::path& checkpoint) {
    return from_saved(checkpoint, SavedStates(checkpoint).load(format, {})).options;
}

// ------------------------------------------------------------------------------- validation and comparison

ValidationResult validate(const std::filesystem::path& checkpoint, const ValidationOptions& options) {
    require(options.batch >= 0, "batch", "at least 0", options.batch);
    const at::Device device = device_of(options.device);
    limit_threads(1);
    const State saved = from_saved(checkpoint, read_state(checkpoint, format));
    ResidualNetwork network = make_network(checkpoint, saved);
    network->options.evaluation(options.evaluation);
    move(network, device);
    const FashionMnist data =
        load_fashion_mnist(options.data, saved.options.seed, saved.options.held_out, saved.options.train_images)
            .to(device);
    return measure(network, options.held_out ? data.held_out : data.test,
                   options.batch > 0 ? options.batch : std::max<index>(1, saved.options.batch), Share(nullptr),
                   options.progress, options.interrupted);
}

MethodComparison compare_methods(const TrainingOptions& training, const std::filesystem::path& checkpoint,
                                 const Options& first, const Options& second) {
    check(training);
    limit_threads(1);
    ResidualNetwork network = checkpoint.empty()
                                  ? make_network(training)
                                  : make_network(checkpoint, from_saved(checkpoint, read_state(checkpoint, format)));
    const at::Device device = device_of(training.device);
    move(network, device);
    const FashionMnist data =
        load_fashion_mnist(training.data, training.seed, training.held_out, training.train_images).to(device);
    require(data.training.size() >= training.batch, "batch",
            "at most the number of training images, " + std::to_string(data.training.size()), training.batch);
    const auto batch =
        data.training.batch(shuffled(data.training.size(), training.seed, 0).slice(0, 0, training.batch).to(device));

    MethodComparison result;
    std::vector<std::pair<std::string, Tensor>> values[2];
    for (const int method : {0, 1}) {
        network->options.evaluation(method == 0 ? first : second);
        network->memory = std::make_shared<DenseChainMemory>();
        for (auto& parameter : network->parameters()) parameter.mutable_grad() = Tensor();
        Tensor logits;
        mean_loss(network, batch, logits).backward();
        values[method].emplace_back("logits", logits.detach());
        for (const auto& parameter : network->named_parameters())
            values[method].emplace_back(parameter.key(), parameter.value().grad());
        (method == 0 ? result.first_forward : result.second_forward) = network->memory->forward;
        (method == 0 ? result.first_backward : result.second_backward) = network->memory->backward;
    }
    for (std::size_t i = 0; i < values[0].size(); ++i) {
        const auto& [name, value] = values[0][i];
        const MethodComparison::Difference difference{name, values[1][i].second.sub(value).abs().max().item<double>(),
                                                      value.abs().max().item<double>()};
        if (i == 0)
            result.logits = difference;
        else
            result.gradients.push_back(difference);
    }
    return result;
}

LibTorch libtorch() {
    const Blas blas;
    LibTorch result{TORCH_VERSION, "reference", true, at::get_num_threads()};
    if (blas.config)
        result.blas = blas.config();
    else if (at::hasMKL())
        result.blas = "MKL";
    else
        result.fast_blas = false;
    return result;
}

}  // namespace deeppcr::nn
