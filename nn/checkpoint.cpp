#include "nn/checkpoint.hpp"

#include <ATen/ops/empty.h>

#include <charconv>
#include <cstring>
#include <vector>

#include <files/safetensors.hpp>

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
    auto& evaluation = options.evaluation;
    visit("method", evaluation.method, method_names);
    visit("surrogate", evaluation.surrogate, surrogate_names);
    visit("reduction", evaluation.reduction, reduction_names);
    visit("chunk", evaluation.chunk);
    visit("guess", evaluation.guess, guess_names);
    visit("tolerance", evaluation.tolerance);
    visit("absolute_tolerance", evaluation.absolute_tolerance);
    visit("relative_tolerance", evaluation.relative_tolerance);
    visit("window", evaluation.window);
    visit("max_iterations", evaluation.max_iterations);
    visit("on_failure", evaluation.on_failure, on_failure_names);
    visit("memory_limit", evaluation.memory_limit);
    visit("backend", evaluation.execution.backend, backend_names);
    visit("threads", evaluation.execution.threads);
}

template <class Number>
std::string to_text(Number number) {
    char text[64];
    return {text,
            std::to_chars(text, text + sizeof text, number).ptr};  // the shortest that reads back to the same bits
}

files::Tensor to_file(const at::Tensor& tensor) {
    const at::Tensor values = tensor.detach().cpu().contiguous();
    files::Tensor result{values.sizes().vec(), {}};
    const auto fill = [&]<class T>(T) {
        result.values = std::vector<T>(values.data_ptr<T>(), values.data_ptr<T>() + values.numel());
    };
    switch (values.scalar_type()) {
        case at::kFloat:
            fill(float());
            break;
        case at::kDouble:
            fill(double());
            break;
        case at::kLong:
            fill(std::int64_t());
            break;
        case at::kByte:
            fill(std::uint8_t());
            break;
        default:
            throw InvalidArgument("tensor", "float, double, 64-bit integers or bytes",
                                  c10::toString(values.scalar_type()));
    }
    return result;
}

at::Tensor from_file(const files::Tensor& tensor) {
    return std::visit(
        [&]<class T>(const std::vector<T>& values) {
            at::Tensor result = at::empty(tensor.shape, c10::CppTypeToScalarType<T>::value);
            if (!values.empty()) std::memcpy(result.data_ptr<T>(), values.data(), values.size() * sizeof(T));
            return result;
        },
        tensor.values);
}

}  // namespace

void write_checkpoint(const std::filesystem::path& path, const Checkpoint& checkpoint) {
    files::Safetensors contents;
    auto& metadata = contents.metadata;
    metadata["format"] = format;
    visit_fields(checkpoint, [&](const char* key, auto value, const auto&... names) {
        if constexpr (sizeof...(names) > 0)
            metadata[key] = name_of(names..., value);
        else
            metadata[key] = to_text(value);
    });
    for (const auto& [name, tensor] : checkpoint.tensors) contents.tensors.emplace(name, to_file(tensor));
    files::write_safetensors(path, contents);
}

Checkpoint read_checkpoint(const std::filesystem::path& path) {
    const files::Safetensors contents = files::read_safetensors(path);
    const auto& metadata = contents.metadata;
    const auto text = [&](const std::string& key) {
        const auto found = metadata.find(key);
        if (found == metadata.end())
            throw FileError(path, "metadata \"" + key + "\"", "none: not a checkpoint of deeppcr train");
        return found->second;
    };
    if (text("format") != format) throw FileError(path, "format \"" + format + "\"", '"' + text("format") + '"');

    Checkpoint checkpoint;
    visit_fields(checkpoint, [&](const char* key, auto& value, const auto&... names) {
        const std::string written = text(key);
        if constexpr (sizeof...(names) > 0) {
            try {
                value = choice_of(names..., key, written);
            } catch (const InvalidArgument& problem) {
                throw FileError(path, problem.what());
            }
        } else {
            const auto [end, problem] = std::from_chars(written.data(), written.data() + written.size(), value);
            if (problem != std::errc() || end != written.data() + written.size())
                throw FileError(path, std::string("a number as metadata \"") + key + '"', '"' + written + '"');
        }
    });
    if (checkpoint.step < 0) throw FileError(path, "a count as metadata \"step\"", std::to_string(checkpoint.step));
    for (const auto& [name, tensor] : contents.tensors) checkpoint.tensors.emplace(name, from_file(tensor));
    return checkpoint;
}

TrainingOptions checkpoint_options(const std::filesystem::path& checkpoint) {
    return read_checkpoint(checkpoint).options;
}

}  // namespace deeppcr::nn
