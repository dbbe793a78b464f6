// deeppcr train lm: a language model.
#include <memory>

#include <files/tokens.hpp>

#include "language_options.hpp"
#include "report.hpp"
#include "training_command.hpp"

namespace deeppcr::program {
namespace {

using nn::LanguageTrainingOptions;

struct TrainLanguageModelArguments {
    TrainingFiles files;
    std::string configuration, tokens;
    bool plan = false;
    std::unique_ptr<GivenOptions<LanguageTrainingOptions>> given;
};

Json to_json(const nn::LanguageStep& step) {
    Json json{{"step", step.step},
              {"tokens", step.tokens},
              {"loss", step.loss},
              {"learning_rate", step.learning_rate},
              {"gradient_norm", step.gradient_norm},
              {"growth", finite(step.growth)},
              {"skipped", step.skipped}};
    json.update(newton_json(step));
    json["tokens_per_second"] = step.tokens_per_second;
    json["seconds"] = step.seconds;
    return json;
}

Json to_json(const nn::LanguageValidation& validation) {
    return {{"step", validation.step},
            {"tokens", validation.tokens},
            {"validation_loss", validation.loss},
            {"perplexity", validation.perplexity},
            {"seconds", validation.seconds}};
}

LanguageTrainingOptions gather(const TrainLanguageModelArguments& arguments, Group& group) {
    auto options = arguments.files.options(nn::language_options);
    apply_configuration(arguments.configuration, options.model);
    arguments.given->apply(options);
    if (!arguments.tokens.empty()) options.tokens = arguments.tokens;
    if (options.tokens.empty()) options.tokens = "text.tokens";
    options.group = &group;
    return options;
}

Exit run_plan(const LanguageTrainingOptions& options, Output& output) {
    nn::LanguagePlanOptions plan;
    plan.model = options.model;
    plan.model.vocabulary = files::TokenFile(options.tokens).counts().vocabulary_size;
    plan.context = options.context;
    plan.batch = options.batch;
    plan.micro_batch = options.micro_batch;
    plan.recompute = options.recompute;
    plan.number_bytes = options.number == nn::Number::bfloat16 ? 2 : 4;
    print_plan(nn::plan_language_model(plan), plan, output);
    return Exit::done;
}

Exit run_train(const TrainLanguageModelArguments& arguments, Output& output) {
    Group& group = output.group();
    const LanguageTrainingOptions options = gather(arguments, group);
    if (arguments.plan) return run_plan(options, output);
    arguments.files.check();
    Log log(arguments.files, output);
    output.line(
        "language model on " + options.tokens.string() + ": " + nn::name_of(nn::mixer_names, options.model.mixer) +
        ", " + count_text(options.model.layers) + " blocks x " + count_text(options.model.width) +
        ", cells evaluated by the method " + nn::name_of(nn::cell_method_names, options.evaluation.method) +
        (group.size() > 1
             ? "; " + count_text(group.size()) + " ranks share the " + nn::name_of(nn::sharing_names, options.share)
             : std::string()));
    warn_about_slow_blas(output);

    TrainingProgress progress(output);
    RecentMean loss(20), speed(20);
    nn::LanguageCallbacks callbacks;
    callbacks.step = [&](const nn::LanguageStep& step) {
        log.write(to_json(step));
        if (!step.skipped) loss.add(step.loss);
        speed.add(step.tokens_per_second);
        progress.show("training", double(step.step), double(step.steps),
                      "loss " + number_text(loss.mean()) + "  " + count_text(std::llround(speed.mean())) + " tokens/s",
                      double(step.step - 1));
    };
    callbacks.validating = [&](double done) { progress.show("validating", done, 1); };
    callbacks.validation = [&](const nn::LanguageValidation& validation) {
        log.write(to_json(validation));
        progress.line("step " + count_text(validation.step) + ": validation loss " + number_text(validation.loss, 4) +
                      ", perplexity " + number_text(validation.perplexity, 4) + " on " + count_text(validation.tokens) +
                      " tokens");
    };
    callbacks.note = [&](const std::string& note) { progress.warn(note); };
    callbacks.interrupted = interrupted;
    const nn::LanguageTraining result = nn::train_language_model(options, callbacks);
    progress.end();

    const double count = double(std::max<std::size_t>(1, result.steps.size()));
    double seconds = 0, iterations = 0, residual = 0;
    index skipped = 0;
    for (const auto& step : result.steps) {
        seconds += step.seconds;
        iterations += step.mean_iterations / count;
        residual = std::max(residual, step.residual);
        skipped += step.skipped;
    }
    const double pace = seconds > 0 ? count * double(options.batch * options.context) / seconds : 0;
    output.line(
        count_text(index(result.steps.size())) + " steps of " + count_text(options.batch * options.context) +
        " tokens, " + count_text(std::llround(pace)) + " tokens/s, " + count_text(result.parameters) + " parameters" +
        (iterations > 0
             ? ", " + number_text(iterations) + " Newton iterations each, residual at most " + scientific_text(residual)
             : std::string()) +
        (skipped > 0 ? "; " + count_text(skipped) + " steps were skipped" : std::string()));
    const Exit exit = arguments.files.finish(result, output, "deeppcr generate");

    Json& json = output.result;
    json["tokens_per_second"] = pace;
    json["peak_memory"] = result.peak_memory;
    json["seconds"] = result.seconds;
    json["steps"] = Json::array();
    for (const auto& step : result.steps) json["steps"].push_back(to_json(step));
    json["validations"] = Json::array();
    for (const auto& validation : result.validations) json["validations"].push_back(to_json(validation));
    return exit;
}

}  // namespace

void add_train_language_model(Program& program) {
    const auto arguments = std::make_shared<TrainLanguageModelArguments>();
    CLI::App& command = program.add("train lm", "Train a language model on tokens of `deeppcr prepare`",
                                    "  deeppcr train lm --tokens text.tokens --configuration 1M --steps 2000\n"
                                    "  deeppcr train lm --mixer lstm --checkpoint lstm.safetensors\n"
                                    "  deeppcr train lm --resume lm.safetensors\n"
                                    "  mpirun -n 4 deeppcr train lm --share steps --context 65536 --batch 1",
                                    [arguments](Output& output) { return run_train(*arguments, output); });
    arguments->given = std::make_unique<GivenOptions<LanguageTrainingOptions>>(command);
    auto& given = *arguments->given;
    using Training = LanguageTrainingOptions;
    add_training_options(given, command, arguments->configuration);
    given.value("--context", &Training::context, "Steps per sequence");
    given.value("--batch", &Training::batch, "Sequences per optimiser step");
    given.value("--micro-batch", &Training::micro_batch,
                "Sequences at once, whose gradients are added up; 0: all that a process has of --batch");
    given.choice("--share", &Training::share, nn::sharing_names,
                 "What the processes that mpirun has started divide among themselves");
    given.value("--bound", &Training::bound,
                "Limit the cells' recurrent parameters to +-this, and so their Jacobians; 0: not");
    given.value("--penalty", &Training::penalty,
                "Times the growth of disturbances along the sequences is added to the loss; 0: not");
    given.value("--penalty-rate", &Training::penalty_rate,
                "Growth per step above which --penalty counts; below 0: disturbances are to die out");
    given.choice("--number", &Training::number, nn::number_names, "Of matrix products and activations");
    given.value("--recompute", &Training::recompute,
                "Keep each block's input alone, and compute the rest again in the backward pass");
    given.value("--seed", &Training::seed, "Of the order of the data");
    given.value("--validation-tokens", &Training::validation_tokens, "On so many tokens; 0: all");
    command.add_option("--tokens", arguments->tokens,
                       "What `deeppcr prepare` wrote (default: --resume's, else text.tokens)");
    arguments->files.add_options(command, "lm", "step and validation");
    command.add_flag("--plan", arguments->plan, "Only tell what the training would take");
}

}  // namespace deeppcr::program
