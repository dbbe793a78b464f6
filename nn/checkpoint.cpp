#include "nn/checkpoint.hpp"

#include <utility>

namespace deeppcr::nn {
namespace {

const std::string format = "deeppcr residual network 1";

/// Lists the fields of a checkpoint's metadata, once for writing and reading: visit(key, field) for numbers,
/// visit(key, field, names) for choices.
template <class C, class Visit>
void visit_fields(C& checkpoint, const Visit& visit) {
    auto& options = checkpoint.options;
    visit("step", checkpoint.step);
    visit("epoch_loss", checkpoint.epoch_loss);
    visit("epoch_accuracy", checkpoint.epoch_accuracy);
    visit("epoch_seconds", checkpoint.epoch_seconds);
    visit("layers", options.layers);
    visit("width", options.width);
    visit("skip", options.skip);
    visit("activation", options.activation, activation_names);
    visit("train_images", options.train_images);
    visit("held_out", options.held_out);
    visit("batch", options.batch);
    visit("epochs", options.epochs);
    visit("steps", options.steps);
    visit("optimiser", options.optimiser, optimiser_names);
    visit("learning_rate", options.learning_rate);
    visit("trunk_learning_rate", options.trunk_learning_rate);
    visit("warm_up", options.warm_up);
    visit("weight_decay", options.weight_decay);
    visit("momentum", options.momentum);
    visit("gradient_clip", options.gradient_clip);
    visit("seed", options.seed);
    visit("checkpoint_interval", options.checkpoint_interval);
    visit_evaluation(options.evaluation, method_names, visit);
}

}  // namespace

void write_checkpoint(const std::filesystem::path& path, const Checkpoint& checkpoint) {
    SavedState state{{{"format", format}}, checkpoint.tensors};
    visit_fields(checkpoint, [&](const auto&... field) { put_field(state.metadata, field...); });
    write_state(path, state);
}

Checkpoint read_checkpoint(const std::filesystem::path& path) {
    SavedState state = read_state(path, format);
    Checkpoint checkpoint;
    visit_fields(checkpoint, [&](const char* key, auto&... field) { get_field(path, state.metadata, key, field...); });
    if (checkpoint.step < 0) throw FileError(path, "a count as metadata \"step\"", std::to_string(checkpoint.step));
    checkpoint.tensors = std::move(state.tensors);
    return checkpoint;
}

TrainingOptions checkpoint_options(const std::filesystem::path& checkpoint) {
    return read_checkpoint(checkpoint).options;
}

}  // namespace deeppcr::nn
