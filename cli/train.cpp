// deeppcr train: a deep residual network on Fashion-MNIST.
#include <deque>
#include <memory>
#include <numeric>

#include <deeppcr/nn/training.hpp>

#include "command.hpp"
#include "given_options.hpp"
#include "report.hpp"
#include "training_command.hpp"

namespace deeppcr::program {
namespace {

using nn::TrainingOptions;

struct TrainArguments {
    TrainingFiles files;
    std::string data;
    std::unique_ptr<GivenOptions<TrainingOptions>> given;
};

Json to_json(const nn::ValidationResult& result) {
    return {{"images", result.images},         {"loss", result.loss},         {"accuracy", result.accuracy},
            {"iterations", result.iterations}, {"residual", result.residual}, {"seconds", result.seconds}};
}

Json to_json(const nn::StepRecord& record) {
    return {{"step", record.step},
            {"epoch", record.epoch},
            {"loss", record.loss},
            {"accuracy", record.accuracy},
            {"learning_rate", record.learning_rate},
            {"gradient_norm", record.gradient_norm},
            {"iterations", record.iterations},
            {"mean_iterations", record.mean_iterations},
            {"residual", record.residual},
            {"status", to_string(record.status)},
            {"sequential_steps", record.sequential_steps},
            {"forward_seconds", record.forward_seconds},
            {"backward_seconds", record.backward_seconds},
            {"seconds", record.seconds}};
}

/// What the progress bar shows: means over the last steps.
class Recent {
public:
    std::string note(const nn::StepRecord& record) {
        steps_.push_back(record);
        if (steps_.size() > 50) steps_.pop_front();
        const auto mean = [&](auto field) {
            double sum = 0;
            for (const auto& step : steps_) sum += double(step.*field);
            return sum / double(steps_.size());
        };
        std::string text = "loss " + number_text(mean(&nn::StepRecord::loss)) + "  accuracy " +
                           percent_text(mean(&nn::StepRecord::accuracy));
        if (record.iterations > 0) text += "  iterations " + number_text(mean(&nn::StepRecord::iterations), 2);
        return text;
    }

private:
    std::deque<nn::StepRecord> steps_;
};

TrainingOptions gather(const TrainArguments& arguments, Group& group) {
    auto options = arguments.files.options(nn::checkpoint_options);
    arguments.given->apply(options);
    options.group = &group;
    options.data = arguments.data;
    arguments.files.check();
    return options;
}

std::string describe(const TrainingOptions& options) {
    std::string text = "residual network of " + count_text(options.layers) + " layers x " + count_text(options.width) +
                       ", " + nn::name_of(nn::activation_names, options.activation) + ", evaluated ";
    switch (options.evaluation.method) {
        case Method::sequential:
            return text + "layer by layer";
        case Method::automatic:
            return text + "layer by layer or by Newton's method, whichever takes less";
        default:
            return text + "by Newton's method";
    }
}

std::string describe(const nn::EpochRecord& epoch) {
    std::string text = "epoch " + std::to_string(epoch.epoch) + ": loss " + number_text(epoch.loss) + ", accuracy " +
                       percent_text(epoch.accuracy);
    if (epoch.validation.images > 0)
        text += "; held out " + number_text(epoch.validation.loss) + ", " + percent_text(epoch.validation.accuracy);
    return text + "  (" + seconds_text(epoch.seconds) + ")";
}

std::string describe_steps(const std::vector<nn::StepRecord>& steps, Method method) {
    if (steps.empty()) return "no steps were left to do";
    nn::StepRecord sum;
    index parallel = 0, finished = 0;
    for (const auto& step : steps) {
        sum.seconds += step.seconds;
        sum.forward_seconds += step.forward_seconds;
        sum.backward_seconds += step.backward_seconds;
        sum.iterations += step.iterations;
        sum.residual = std::max(sum.residual, step.residual);
        parallel += step.iterations > 0;
        finished += step.sequential_steps > 0;
    }
    const double count = double(steps.size());
    std::string text = count_text(index(steps.size())) + " steps of " + seconds_text(sum.seconds / count) +
                       " (layers: forward " + seconds_text(sum.forward_seconds / count) + ", backward " +
                       seconds_text(sum.backward_seconds / count) + ")";
    if (parallel > 0)
        text += ", " + number_text(double(sum.iterations) / double(parallel)) + " Newton iterations " +
                (parallel < index(steps.size()) ? "in " + count_text(parallel) + " of them" : "each") +
                ", residual at most " + scientific_text(sum.residual);
    else if (method == Method::automatic)
        text += ", all layer by layer";
    if (finished > 0) text += "; " + count_text(finished) + " of them finished sequentially";
    return text;
}

Exit run_train(const TrainArguments& arguments, Output& output) {
    const TrainingOptions options = gather(arguments, output.group());
    Log log(arguments.files, output);
    output.line("Fashion-MNIST, " + describe(options));
    warn_about_slow_blas(output);

    TrainingProgress progress(output);
    Recent recent;
    nn::TrainingCallbacks callbacks;
    callbacks.step = [&](const nn::StepRecord& record) {
        log.write(to_json(record));
        progress.show("epoch " + std::to_string(record.epoch) + "/" + std::to_string(record.epochs),
                      double(record.epoch_step), double(record.epoch_steps), recent.note(record),
                      double(record.epoch_step - 1));
    };
    callbacks.validation = [&](double done) { progress.show("validating", done, 1); };
    callbacks.epoch = [&](const nn::EpochRecord& epoch) { progress.line(describe(epoch)); };
    callbacks.note = [&](const std::string& note) { progress.warn(note); };
    callbacks.interrupted = interrupted;
    const nn::TrainingResult result = nn::train(options, callbacks);
    progress.end();

    output.line(describe_steps(result.steps, options.evaluation.method));
    if (result.test.images > 0 && !result.interrupted)
        output.line("test accuracy " + percent_text(result.test.accuracy, 2) + ", loss " +
                    number_text(result.test.loss) + " on " + count_text(result.test.images) + " images");
    const Exit exit = arguments.files.finish(result, output);

    Json& json = output.result;
    json["seconds"] = result.seconds;
    json["steps"] = Json::array();
    for (const auto& step : result.steps) json["steps"].push_back(to_json(step));
    json["epochs"] = Json::array();
    for (const auto& epoch : result.epochs)
        json["epochs"].push_back({{"epoch", epoch.epoch},
                                  {"step", epoch.step},
                                  {"loss", epoch.loss},
                                  {"accuracy", epoch.accuracy},
                                  {"held_out", to_json(epoch.validation)},
                                  {"seconds", epoch.seconds}});
    json["test"] = result.test.images > 0 ? to_json(result.test) : Json();
    return exit;
}

}  // namespace

void add_train(Program& program) {
    const auto arguments = std::make_shared<TrainArguments>();
    CLI::App& command =
        program.add("train resnet", "Train a deep residual network on Fashion-MNIST",
                    "  deeppcr train resnet --layers 1024 --width 16 --epochs 3\n"
                    "  deeppcr train resnet --method sequential --steps 500 --checkpoint plain.safetensors\n"
                    "  deeppcr train resnet --resume resnet.safetensors",
                    [arguments](Output& output) { return run_train(*arguments, output); });
    arguments->given = std::make_unique<GivenOptions<TrainingOptions>>(command);
    auto& given = *arguments->given;
    given.value("--layers", &TrainingOptions::layers, "Residual layers, a multiple of --skip");
    given.value("--width", &TrainingOptions::width, "Width of each layer");
    given.value("--skip", &TrainingOptions::skip, "Layers that a skip connection spans; 0: none");
    given.choice("--activation", &TrainingOptions::activation, nn::activation_names, "Of the layers");
    given.evaluation(&TrainingOptions::evaluation);
    given.device();
    given.value("--batch", &TrainingOptions::batch, "Images per step, of all processes together");
    given.value("--epochs", &TrainingOptions::epochs, "Passes over the training images");
    given.value("--steps", &TrainingOptions::steps, "Steps, instead of epochs; 0: as --epochs says");
    given.choice("--optimiser", &TrainingOptions::optimiser, nn::optimiser_names, "How parameters are updated");
    given.updates("Of encoder and decoder, at its highest", "parameters");
    given.value("--trunk-learning-rate", &TrainingOptions::trunk_learning_rate,
                "Of the layers; 0: chosen from --learning-rate and --layers");
    given.value("--seed", &TrainingOptions::seed, "Of initial weights, split and shuffles");
    given.value("--train-images", &TrainingOptions::train_images, "Train on so many images only; 0: all 54,000");
    given.value("--held-out", &TrainingOptions::held_out, "Keep so many of the 60,000 training images for validation");
    given.value("--checkpoint-interval", &TrainingOptions::checkpoint_interval,
                "Save every so many steps, besides each epoch's end; 0: not");
    command.add_option("--data", arguments->data,
                       "Folder of Fashion-MNIST (default: DEEPPCR_DATA, else Debian's package)");
    arguments->files.add_options(command, "resnet", "step");
}

}  // namespace deeppcr::program
