#include <deeppcr/nn/training.hpp>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <torch/version.h>

#include <chrono>
#include <cmath>
#include <memory>

#include <deeppcr/nn/fashion_mnist.hpp>
#include <deeppcr/nn/residual_network.hpp>
#include <files/error.hpp>
#include <files/write.hpp>

#include "nn/checkpoint.hpp"
#include "nn/device_scope.hpp"
#include "nn/optimisation.hpp"
#include "nn/sharing.hpp"
#include "nn/threads.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

class Stopwatch {
public:
    double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

private:
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::string shape_text(const Tensor& tensor) {
    std::string text = "[";
    for (index d = 0; d < tensor.dim(); ++d) text += (d ? "," : "") + std::to_string(tensor.size(d));
    return text + "]";
}

// ------------------------------------------------------------------------------------------------- options

template <class Number>
void require(bool condition, const std::string& argument, const std::string& expected, Number actual) {
    if (!condition) throw InvalidArgument(argument, expected, std::to_string(actual));
}

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

/// Throws unless `options` continue the training of the checkpoint.
void check_continues(const TrainingOptions& options, const TrainingOptions& saved) {
    const auto same = [](const char* name, const auto& wanted, const auto& written) {
        if (wanted != written)
            throw InvalidArgument(name, std::to_string(written) + ", as in the checkpoint", std::to_string(wanted));
    };
    const auto same_choice = [](const char* name, auto wanted, auto written, const auto& names) {
        if (wanted != written)
            throw InvalidArgument(name, name_of(names, written) + ", as in the checkpoint", name_of(names, wanted));
    };
    same("layers", options.layers, saved.layers);
    same("width", options.width, saved.width);
    same("skip", options.skip, saved.skip);
    same_choice("activation", options.activation, saved.activation, activation_names);
    same("train_images", options.train_images, saved.train_images);
    same("held_out", options.held_out, saved.held_out);
    same("batch", options.batch, saved.batch);
    same("seed", options.seed, saved.seed);
    same_choice("optimiser", options.optimiser, saved.optimiser, optimiser_names);
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
ResidualNetwork make_network(const std::filesystem::path& path, const Checkpoint& checkpoint) {
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
    const Stopwatch watch;
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
    result.seconds = watch.seconds();
    return result;
}

// ---------------------------------------------------------------------------------------------- optimisers

/// Two groups of parameters: encoder and decoder; the trunk.
Optimisation make_optimisation(ResidualNetwork& network, const TrainingOptions& options, index steps) {
    Optimisation::Group ends, trunk;
    trunk.factor = (options.trunk_learning_rate > 0 ? options.trunk_learning_rate
                                                    : options.learning_rate / double(options.layers)) /
                   options.learning_rate;
    for (const auto& parameter : network->named_parameters())
        (parameter.key().starts_with("layers.") ? trunk : ends)
            .parameters.emplace_back(parameter.key(), parameter.value());
    return {{ends, trunk}, optimisation_options(options, steps)};
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

}  // namespace

// ------------------------------------------------------------------------------------------------ training

TrainingResult train(const TrainingOptions& options, const TrainingCallbacks& all_callbacks) {
    check(options);
    const Share share(options.group);
    const TrainingCallbacks callbacks =
        share.speaks() ? all_callbacks : TrainingCallbacks{.interrupted = all_callbacks.interrupted};
    const at::Device device = device_of(options.device, options.group);
    if (!options.checkpoint.empty()) files::check_writable(options.checkpoint);
    limit_threads(1);

    Checkpoint state;
    ResidualNetwork network = nullptr;
    if (options.resume.empty()) {
        network = make_network(options);
    } else {
        state = read_checkpoint(options.resume);
        check_continues(options, state.options);
        network = make_network(options.resume, state);
        network->options.evaluation(options.evaluation);
    }
    state.options = options;
    move(network, device);

    const FashionMnist data =
        load_fashion_mnist(options.data, options.seed, options.held_out, options.train_images).to(device);
    const index epoch_steps = data.training.size() / options.batch;
    require(epoch_steps >= 1, "batch", "at most the number of training images, " + std::to_string(data.training.size()),
            options.batch);
    const index steps = options.steps > 0 ? options.steps : options.epochs * epoch_steps;
    const index epochs = (steps + epoch_steps - 1) / epoch_steps;
    if (state.step < 0 || state.step > steps)
        throw InvalidArgument("steps", "at least the " + std::to_string(state.step) + " steps of the checkpoint",
                              std::to_string(steps));

    Optimisation optimisation = make_optimisation(network, options, steps);
    if (share.group() != nullptr) optimisation.share(*share.group());
    if (state.step > 0)
        optimisation.restore_state(state.step, [&](const std::string& name, const Tensor& like) {
            return find(options.resume, state.tensors, name, like).to(device, like.scalar_type(), false, /*copy=*/true);
        });

    const auto save = [&] {
        if (options.checkpoint.empty() || !share.speaks()) return;
        state.tensors.clear();
        for (const auto& parameter : network->named_parameters()) state.tensors[parameter.key()] = parameter.value();
        optimisation.visit_state([&](const std::string& name, const Tensor& tensor) { state.tensors[name] = tensor; });
        if (network->memory->prediction.defined()) state.tensors["prediction"] = network->memory->prediction;
        write_checkpoint(options.checkpoint, state);
    };

    TrainingResult result;
    for (const auto& parameter : network->parameters()) result.parameters += parameter.numel();
    const Stopwatch watch;
    const index first_step = state.step;
    Tensor order;
    while (state.step < steps && !result.interrupted) {
        const Stopwatch step_watch;
        const index epoch = state.step / epoch_steps, position = state.step % epoch_steps;
        if (!order.defined() || position == 0) order = shuffled(data.training.size(), options.seed, epoch).to(device);
        const auto [first_row, last_row] = share.part(options.batch);
        const auto batch = data.training.batch(
            order.slice(0, position * options.batch + first_row, position * options.batch + last_row));

        optimisation.clear_gradients();
        Tensor logits;
        const Tensor loss = mean_loss(network, batch, logits) / double(share.ranks());
        StepRecord record;
        record.step = state.step + 1;
        record.loss = share.sum(loss.item<double>());
        const auto diverged = [&](const std::string& what) {
            return TrainingDiverged(what + " of step " + std::to_string(record.step) +
                                    " is not finite; a smaller learning rate may help");
        };
        if (!std::isfinite(record.loss)) throw diverged("the loss");
        loss.backward();
        record.gradient_norm = optimisation.step(state.step);
        if (!std::isfinite(record.gradient_norm)) throw diverged("the gradient");

        const Report& forward = network->memory->forward;
        record.steps = steps;
        record.epoch = epoch + 1;
        record.epochs = epochs;
        record.epoch_step = position + 1;
        record.epoch_steps = std::min(epoch_steps, steps - epoch * epoch_steps);
        record.accuracy = double(correct(logits, batch.labels)) / double(options.batch);
        record.learning_rate = optimisation.learning_rate(state.step);
        record.iterations = forward.iterations;
        for (const auto& sequence : forward.sequences)
            record.mean_iterations += double(sequence.iterations) / double(options.batch);
        record.residual = forward.residual;
        record.status = forward.status;
        record.sequential_steps =
            network->options.evaluation().method != Method::sequential ? forward.sequential_steps : 0;
        record.forward_seconds = forward.seconds;
        record.backward_seconds = network->memory->backward.seconds;
        gather(record, share);
        record.seconds = step_watch.seconds();
        record.elapsed = watch.seconds();
        record.remaining = record.elapsed / double(record.step - first_step) * double(steps - record.step);
        result.steps.push_back(record);

        ++state.step;
        state.epoch_loss += record.loss;
        state.epoch_accuracy += record.accuracy;
        state.epoch_seconds += record.seconds;
        if (callbacks.step) callbacks.step(record);
        result.interrupted = share.any(callbacks.interrupted && callbacks.interrupted());

        if (const bool epoch_ends = position + 1 == epoch_steps; epoch_ends || state.step == steps) {
            EpochRecord summary{epoch + 1, state.step, 0, 0, {}, state.epoch_seconds};
            summary.loss = state.epoch_loss / double(position + 1);
            summary.accuracy = state.epoch_accuracy / double(position + 1);
            if (epoch_ends) state.epoch_loss = state.epoch_accuracy = state.epoch_seconds = 0;
            if (data.held_out.size() > 0 && !result.interrupted) {
                summary.validation =
                    measure(network, data.held_out, options.batch, share, callbacks.validation, callbacks.interrupted);
                result.interrupted = summary.validation.images < data.held_out.size();
            }
            if (!result.interrupted) {
                result.epochs.push_back(summary);
                if (callbacks.epoch) callbacks.epoch(summary);
            }
            save();
        } else if (result.interrupted ||
                   (options.checkpoint_interval > 0 && state.step % options.checkpoint_interval == 0)) {
            save();
        }
    }
    if (options.test && !result.interrupted) {
        result.test = measure(network, data.test, options.batch, share, callbacks.validation, callbacks.interrupted);
        result.interrupted = result.test.images < data.test.size();
    }
    share.barrier();  // so that no rank ends the program before the first one has written
    result.seconds = watch.seconds();
    return result;
}

// ------------------------------------------------------------------------------- validation and comparison

ValidationResult validate(const std::filesystem::path& checkpoint, const ValidationOptions& options) {
    require(options.batch >= 0, "batch", "at least 0", options.batch);
    const at::Device device = device_of(options.device);
    limit_threads(1);
    const Checkpoint saved = read_checkpoint(checkpoint);
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
    ResidualNetwork network =
        checkpoint.empty() ? make_network(training) : make_network(checkpoint, read_checkpoint(checkpoint));
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
