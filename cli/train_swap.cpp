// deeppcr train swap: a classifier of Fashion-MNIST or a language model by workers whose gradients or weights are
// averaged.
#include <cmath>
#include <memory>

#include <deeppcr/nn/swap.hpp>

#include "command.hpp"
#include "given_options.hpp"
#include "language_options.hpp"
#include "report.hpp"
#include "training_command.hpp"

namespace deeppcr::program {
namespace {

using nn::SwapOptions;

struct TrainSwapArguments {
    TrainingFiles files;
    std::string data, configuration;
    bool compare = false;
    std::unique_ptr<GivenOptions<SwapOptions>> given;
};

Json to_json(const nn::SwapMeasure& measure) {
    return measure.examples > 0
               ? Json{{"examples", measure.examples}, {"loss", measure.loss}, {"accuracy", measure.accuracy}}
               : Json();
}

Json to_json(const nn::SwapStep& step) {
    return {{"phase", step.phase},
            {"worker", step.worker},
            {"step", step.step},
            {"epoch", step.epoch},
            {"loss", step.loss},
            {"accuracy", step.accuracy},
            {"learning_rate", step.learning_rate},
            {"gradient_norm", step.gradient_norm},
            {"seconds", step.seconds},
            {"skipped", step.skipped}};
}

Json to_json(const nn::SwapEpoch& epoch) {
    return {{"phase", epoch.phase},
            {"epoch", epoch.epoch},
            {"loss", epoch.loss},
            {"accuracy", epoch.accuracy},
            {"held_out", to_json(epoch.held_out)}};
}

SwapOptions gather(const TrainSwapArguments& arguments, Group& group) {
    auto options = arguments.files.options(nn::swap_options);
    apply_configuration(arguments.configuration, options.language);
    if (!arguments.files.continues() && group.size() > 1) options.workers = group.size();
    options.group = &group;
    arguments.given->apply(options);
    if (!arguments.data.empty()) options.data = arguments.data;
    if (options.network == nn::Network::language && options.data.empty()) options.data = "text.tokens";
    options.compare = arguments.compare;
    arguments.files.check();
    return options;
}

std::string describe(const SwapOptions& options) {
    const bool language = options.network == nn::Network::language;
    std::string text =
        (language ? "language model on " + options.data.string() + ", "
                  : "Fashion-MNIST, " + std::string(nn::name_of(nn::network_names, options.network)) + " network, ") +
        count_text(options.workers) + (options.workers == 1 ? " worker" : " workers");
    if (options.large_epochs > 0)
        text += "; together with batches of " + count_text(options.large_batch) + ", at most " +
                count_text(options.large_epochs) + " epochs";
    if (options.small_epochs > 0) {
        text += "; then batches of " + count_text(options.small_batch) + ", " + count_text(options.small_epochs) +
                " epochs, averaged ";
        text += options.period == 0   ? "at the end"
                : options.period == 1 ? "in every step"
                                      : "every " + count_text(options.period) + " steps";
    }
    return text;
}

std::string describe(const nn::SwapMeasure& measure) {
    return percent_text(measure.accuracy, 2) + ", loss " + number_text(measure.loss);
}

std::string describe(const nn::SwapEpoch& epoch) {
    std::string text = "phase " + std::to_string(epoch.phase) + ", epoch " + std::to_string(epoch.epoch) + "/" +
                       std::to_string(epoch.epochs) + ": loss " + number_text(epoch.loss) + ", accuracy " +
                       percent_text(epoch.accuracy);
    return epoch.held_out.examples > 0 ? text + "; held out " + describe(epoch.held_out) : text;
}

Json to_json(const nn::SwapComparison& comparison) {
    Json json{{"workers", Json::array()},
              {"ensemble", to_json(comparison.ensemble)},
              {"stale_statistics", to_json(comparison.stale)},
              {"averaged_statistics", to_json(comparison.averaged_statistics)},
              {"line", Json::array()}};
    for (const nn::SwapMeasure& worker : comparison.workers) json["workers"].push_back(to_json(worker));
    for (std::size_t i = 0; i < comparison.line.size(); ++i)
        json["line"].push_back({{"weight", comparison.line_weights[i]},
                                {"loss", comparison.line[i].loss},
                                {"accuracy", comparison.line[i].accuracy}});
    return json;
}

void print(const nn::SwapComparison& comparison, const Output& output) {
    for (std::size_t i = 0; i < comparison.workers.size(); ++i)
        output.line("worker " + std::to_string(i) + ": test accuracy " + describe(comparison.workers[i]));
    output.line("ensemble of the workers: test accuracy " + describe(comparison.ensemble));
    output.line("averaged, with the statistics of worker 0: test accuracy " + describe(comparison.stale));
    output.line("averaged, statistics too: test accuracy " + describe(comparison.averaged_statistics));
}

Exit run_train_swap(const TrainSwapArguments& arguments, Output& output) {
    const SwapOptions options = gather(arguments, output.group());
    Log log(arguments.files, output);
    output.line(describe(options));
    warn_about_slow_blas(output);

    TrainingProgress progress(output);
    index phase = 0;
    RecentMean recent(50);
    nn::SwapCallbacks callbacks;
    callbacks.step = [&](const nn::SwapStep& step) { log.write(to_json(step)); };
    callbacks.progress = [&](index number, double done, double loss) {
        if (number != phase) recent = RecentMean(50);
        phase = number;
        recent.add(loss);
        progress.show("phase " + std::to_string(number), done, 1, "loss " + number_text(recent.mean()));
    };
    callbacks.epoch = [&](const nn::SwapEpoch& epoch) {
        log.write(to_json(epoch));
        progress.line(describe(epoch));
    };
    callbacks.note = [&](const std::string& text) { progress.warn(text); };
    callbacks.interrupted = interrupted;
    const nn::SwapResult result = nn::train_swap(options, callbacks);
    progress.end();

    output.line(count_text(result.examples) + " examples trained on in " + seconds_text(result.seconds) + ", " +
                seconds_text(result.processor_seconds) +
                " of processors; modelled with a processor for each worker: " + seconds_text(result.modelled_seconds));
    if (!result.comparison.workers.empty()) print(result.comparison, output);
    if (result.test.examples > 0)
        output.line("test accuracy " + describe(result.test) + " on " + count_text(result.test.examples) +
                    (options.network == nn::Network::language ? " tokens" : " images"));
    const Exit exit = arguments.files.finish(result, output);

    Json& json = output.result;
    json["examples"] = result.examples;
    json["seconds"] = result.seconds;
    json["processor_seconds"] = result.processor_seconds;
    json["modelled_seconds"] = result.modelled_seconds;
    json["steps"] = Json::array();
    for (const nn::SwapStep& step : result.steps) json["steps"].push_back(to_json(step));
    json["epochs"] = Json::array();
    for (const nn::SwapEpoch& epoch : result.epochs) json["epochs"].push_back(to_json(epoch));
    json["held_out"] = to_json(result.held_out);
    json["test"] = to_json(result.test);
    json["comparison"] = result.comparison.workers.empty() ? Json() : to_json(result.comparison);
    return exit;
}

}  // namespace

void add_train_swap(Program& program) {
    const auto arguments = std::make_shared<TrainSwapArguments>();
    CLI::App& command = program.add(
        "train swap", "Train a classifier or language model by workers whose weights are averaged",
        "  deeppcr train swap --workers 8 --compare\n"
        "  deeppcr train swap --large-epochs 0 --period 100 --outer-learning-rate 0.7 --outer-momentum 0.9\n"
        "  deeppcr train swap --network language --data text.tokens --optimiser adamw --large-batch 64 ..\n"
        "  deeppcr train swap --workers 1 --small-schedule constant --trajectory swa\n"
        "  deeppcr train swap --resume swap.safetensors\n"
        "  mpirun -n 4 deeppcr train swap",
        [arguments](Output& output) { return run_train_swap(*arguments, output); });
    arguments->given = std::make_unique<GivenOptions<SwapOptions>>(command);
    auto& given = *arguments->given;
    given.choice("--network", &SwapOptions::network, nn::network_names,
                 "Three convolutions with batch norm, a deep residual trunk, or a language model");
    const auto of_network = [](auto residual, auto language) {
        return [=](SwapOptions& options) -> index& {
            return options.network == nn::Network::language ? options.language.*language : options.*residual;
        };
    };
    given.value("--layers", of_network(&SwapOptions::layers, &nn::LanguageModelOptions::layers),
                "Of the residual network, or blocks of the language model (4)");
    given.value("--width", of_network(&SwapOptions::width, &nn::LanguageModelOptions::width),
                "Of the residual network's layers, or numbers per token (128)");
    command
        .add_option("--configuration", arguments->configuration,
                    "Of the language model, a named size, which gives --width and --layers")
        ->check(CLI::IsMember(configuration_names()));
    given.choice(
        "--mixer", [](SwapOptions & options) -> auto& { return options.language.mixer; }, nn::mixer_names,
        "Of the language model: what mixes the steps of a block");
    given.value("--context", &SwapOptions::context, "Tokens of a sequence");
    given.value("--workers", &SwapOptions::workers,
                "Workers, simulated in this process; under mpirun one for each rank");
    given.value("--threads", &SwapOptions::threads, "Workers that compute side by side");
    given.value("--large-batch", &SwapOptions::large_batch, "Phase 1: examples per step, of all workers together");
    given.value("--large-epochs", &SwapOptions::large_epochs, "Phase 1: passes at most; 0: no phase 1");
    given.value("--large-learning-rate", &SwapOptions::large_learning_rate, "Phase 1: at its highest");
    given.value("--large-warm-up", &SwapOptions::large_warm_up,
                "Phase 1: steps until the learning rate is at its highest");
    given.value("--stopping-accuracy", &SwapOptions::stopping_accuracy,
                "Phase 1: ends after an epoch of this training accuracy, a part of 1; above 1: never");
    given.value("--small-batch", &SwapOptions::small_batch, "Phase 2: examples per step of each worker");
    given.value("--small-epochs", &SwapOptions::small_epochs, "Phase 2: passes of each worker; 0: no phase 2");
    given.value("--small-learning-rate", &SwapOptions::small_learning_rate, "Phase 2: at its highest");
    given.value("--small-warm-up", &SwapOptions::small_warm_up,
                "Phase 2: steps until the learning rate is at its highest");
    given.choice("--small-schedule", &SwapOptions::small_schedule, nn::rate_schedule_names,
                 "Phase 2: the learning rate after the warm-up");
    given.value("--period", &SwapOptions::period,
                "Phase 2: steps between averages; 0: only at the end (SWAP), 1: gradients (data-parallel)");
    given.value("--outer-learning-rate", &SwapOptions::outer_learning_rate,
                "Phase 2: of the outer optimiser at each average (DiLoCo); 1: plain averages");
    given.value("--outer-momentum", &SwapOptions::outer_momentum, "Phase 2: Nesterov's, of the outer optimiser");
    given.choice("--trajectory", &SwapOptions::trajectory, nn::trajectory_names,
                 "Phase 2: what each worker gives, its last weights or their mean over its epochs' ends");
    given.value("--trajectory-from", &SwapOptions::trajectory_from, "The first epoch that counts in that mean");
    given.value("--trajectory-window", &SwapOptions::trajectory_window, "Of lawa: the latest so many epochs");
    given.choice("--optimiser", &SwapOptions::optimiser, nn::optimiser_names, "How parameters are updated");
    given.value("--momentum", &SwapOptions::momentum, "Of sgd");
    given.value("--weight-decay", &SwapOptions::weight_decay, "Decay of the parameters");
    given.value("--gradient-clip", &SwapOptions::gradient_clip, "Largest norm of the gradient; 0: any");
    given.value("--micro-batch", &SwapOptions::micro_batch,
                "Examples that pass through the network at once; larger batches are accumulated");
    given.choice("--on-not-finite", &SwapOptions::on_not_finite, nn::on_divergence_names,
                 "What to do about a loss or gradient that is not finite");
    given.value("--seed", &SwapOptions::seed, "Of initial weights, split and orders");
    given.value("--train-examples", &SwapOptions::train_examples, "Train on so many images or sequences only; 0: all");
    given.value("--held-out", &SwapOptions::held_out,
                "Keep so many of the training images or sequences for validation");
    command.add_flag("--compare", arguments->compare,
                     "Measure also the workers before averaging, their ensemble and the line between two of them");
    command.add_option("--data", arguments->data,
                       "Folder of Fashion-MNIST (default: DEEPPCR_DATA, else Debian's package), or token file "
                       "(text.tokens)");
    arguments->files.add_options(command, "swap", "step and epoch");
}

}  // namespace deeppcr::program
