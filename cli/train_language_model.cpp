// deeppcr train lm: a language model.
#include <memory>
#include <optional>

#include <files/error.hpp>
#include <files/tokens.hpp>

#include "language_options.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

using nn::LanguageTrainingOptions;

struct Arguments {
    std::string configuration, tokens, checkpoint, resume, log;
    bool overwrite = false, plan = false;
    std::unique_ptr<GivenOptions<LanguageTrainingOptions>> given;
};

Json to_json(const nn::LanguageStep& step) {
    Json json{{"step", step.step},
              {"tokens", step.tokens},
              {"loss", step.loss},
              {"learning_rate", step.learning_rate},
              {"gradient_norm", step.gradient_norm},
              {"growth", std::isfinite(step.growth) ? Json(step.growth) : Json()},
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

LanguageTrainingOptions gather(const Arguments& arguments, Group& group) {
    LanguageTrainingOptions options =
        arguments.resume.empty() ? LanguageTrainingOptions{} : nn::language_options(arguments.resume);
    apply_configuration(arguments.configuration, options.model);
    arguments.given->apply(options);
    if (!arguments.tokens.empty()) options.tokens = arguments.tokens;
    if (options.tokens.empty()) options.tokens = "text.tokens";
    options.group = &group;
    options.resume = arguments.resume;
    options.checkpoint = !arguments.checkpoint.empty() ? arguments.checkpoint
                         : !arguments.resume.empty()   ? arguments.resume
                                                       : "lm.safetensors";
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

Exit run_train(const Arguments& arguments, Output& output) {
    Group& group = output.group();
    const LanguageTrainingOptions options = gather(arguments, group);
    if (arguments.plan) return run_plan(options, output);
    refuse_to_overwrite(options.checkpoint, options.resume, arguments.overwrite);
    Log log(output.follows() ? "" : arguments.log);
    output.line(
        "language model on " + options.tokens.string() + ": " + nn::name_of(nn::mixer_names, options.model.mixer) +
        ", " + count_text(options.model.layers) + " blocks x " + count_text(options.model.width) +
        ", cells evaluated by the method " + nn::name_of(nn::cell_method_names, options.evaluation.method) +
        (group.size() > 1
             ? "; " + count_text(group.size()) + " ranks share the " + nn::name_of(nn::sharing_names, options.share)
             : std::string()));
    warn_about_slow_blas(output);

    std::optional<Progress> bar;
    std::string title;
    double recent = 0, speed = 0;
    index first = 0;
    const auto show = [&](const std::string& wanted, double total) {
        if (bar && title == wanted) return;
        bar.reset();
        bar.emplace(wanted, total);
        title = wanted;
    };
    nn::LanguageCallbacks callbacks;
    callbacks.step = [&](const nn::LanguageStep& step) {
        log.write(to_json(step));
        if (!bar || title != "training") first = step.step - 1;
        show("training", double(step.steps - first));
        if (recent == 0) recent = step.loss, speed = step.tokens_per_second;
        if (!step.skipped) recent += (step.loss - recent) / 20;
        speed += (step.tokens_per_second - speed) / 20;
        bar->update(double(step.step - first),
                    "loss " + number_text(recent) + "  " + count_text(std::llround(speed)) + " tokens/s");
    };
    callbacks.validating = [&](double done) {
        show("validating", 1.0);
        bar->update(done);
    };
    callbacks.validation = [&](const nn::LanguageValidation& validation) {
        bar.reset();
        log.write(to_json(validation));
        output.line("step " + count_text(validation.step) + ": validation loss " + number_text(validation.loss, 4) +
                    ", perplexity " + number_text(validation.perplexity, 4) + " on " + count_text(validation.tokens) +
                    " tokens");
    };
    callbacks.note = [&](const std::string& note) {
        bar.reset();
        output.warn(note);
    };
    callbacks.interrupted = interrupted;
    const nn::LanguageTraining result = nn::train_language_model(options, callbacks);
    bar.reset();

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
    output.line(result.interrupted ? "interrupted; go on with: deeppcr train lm --resume " + options.checkpoint.string()
                                   : "checkpoint: " + options.checkpoint.string() + "; next: deeppcr generate " +
                                         options.checkpoint.string());

    Json& json = output.result;
    json["checkpoint"] = options.checkpoint.string();
    json["interrupted"] = result.interrupted;
    json["parameters"] = result.parameters;
    json["tokens_per_second"] = pace;
    json["peak_memory"] = result.peak_memory;
    json["seconds"] = result.seconds;
    json["steps"] = Json::array();
    for (const auto& step : result.steps) json["steps"].push_back(to_json(step));
    json["validations"] = Json::array();
    for (const auto& validation : result.validations) json["validations"].push_back(to_json(validation));
    return result.interrupted ? Exit::interrupted : Exit::done;
}

}  // namespace

void add_train_language_model(Program& program) {
    const auto arguments = std::make_shared<Arguments>();
    CLI::App& command = program.add("train lm", "Train a language model on tokens of `deeppcr prepare`",
                                    "  deeppcr train lm --tokens text.tokens --configuration 1M --steps 2000\n"
                                    "  deeppcr train lm --mixer lstm --checkpoint lstm.safetensors\n"
                                    "  deeppcr train lm --resume lm.safetensors\n"
                                    "  mpirun -n 4 deeppcr train lm --share steps --context 65536 --batch 1",
                                    [arguments](Output& output) { return run_train(*arguments, output); });
    arguments->given = std::make_unique<GivenOptions<LanguageTrainingOptions>>(command);
    auto& given = *arguments->given;
    using Training = LanguageTrainingOptions;
    const auto field = [](auto member) {
        return [=](Training & options) -> auto& { return options.*member; };
    };
    add_model_options(given, command, arguments->configuration, field(&Training::model));
    given.value(
        "--model-seed", [](Training& options) -> std::uint64_t& { return options.model.seed; },
        "Of the initial weights");
    given.cells(field(&Training::evaluation));
    given.value("--device", field(&Training::device), "Where to train: cpu, cuda or cuda:<number>");
    given.value("--context", field(&Training::context), "Steps per sequence");
    given.value("--batch", field(&Training::batch), "Sequences per optimiser step");
    given.value("--micro-batch", field(&Training::micro_batch),
                "Sequences at once, whose gradients are added up; 0: all that a process has of --batch");
    given.choice("--share", field(&Training::share), nn::sharing_names,
                 "What the processes that mpirun has started divide among themselves");
    given.value("--steps", field(&Training::steps), "Optimiser steps");
    given.value("--learning-rate", field(&Training::learning_rate), "At its highest");
    given.value("--warm-up", field(&Training::warm_up), "Steps until the learning rate is at its highest");
    given.value("--weight-decay", field(&Training::weight_decay), "Decay of the matrices");
    given.value("--gradient-clip", field(&Training::gradient_clip), "Largest norm of the gradient; 0: any");
    given.value("--bound", field(&Training::bound),
                "Limit the cells' recurrent parameters to +-this, and so their Jacobians; 0: not");
    given.value("--penalty", field(&Training::penalty),
                "Times the growth of disturbances along the sequences is added to the loss; 0: not");
    given.value("--penalty-rate", field(&Training::penalty_rate),
                "Growth per step above which --penalty counts; below 0: disturbances are to die out");
    given.choice("--number", field(&Training::number), nn::number_names, "Of matrix products and activations");
    given.value("--estimate-interval", field(&Training::estimate_interval),
                "Estimate the Lyapunov exponent every so many steps; 0: never");
    given.value("--recompute", field(&Training::recompute),
                "Keep each block's input alone, and compute the rest again in the backward pass");
    given.choice("--on-divergence", field(&Training::on_divergence), nn::on_divergence_names,
                 "What to do about a loss or gradient that is not finite");
    given.value("--seed", field(&Training::seed), "Of the order of the data");
    given.value("--validation-interval", field(&Training::validation_interval),
                "Validate every so many steps, besides the end; 0: not");
    given.value("--validation-tokens", field(&Training::validation_tokens), "On so many tokens; 0: all");
    given.value("--checkpoint-interval", field(&Training::checkpoint_interval),
                "Save every so many steps, besides the end; 0: not");
    command.add_option("--tokens", arguments->tokens,
                       "What `deeppcr prepare` wrote (default: --resume's, else text.tokens)");
    command.add_option("--resume", arguments->resume, "Continue this checkpoint, with its options");
    command.add_option("--checkpoint", arguments->checkpoint,
                       "Where the training is saved (default: --resume's, else lm.safetensors)");
    command.add_flag("--overwrite", arguments->overwrite, "Replace a checkpoint that exists");
    command.add_option("--log", arguments->log, "Append a JSON object per step and validation to this file");
    command.add_flag("--plan", arguments->plan, "Only tell what the training would take");
}

}  // namespace deeppcr::program
