// deeppcr train task: a model of sequences on parity, recall or k-hop induction.
#include <memory>

#include <deeppcr/nn/tasks.hpp>

#include "language_options.hpp"
#include "report.hpp"
#include "training_command.hpp"

namespace deeppcr::program {
namespace {

using nn::TaskTrainingOptions;

struct TrainTaskArguments {
    TrainingFiles files;
    std::string task, configuration;
    std::unique_ptr<GivenOptions<TaskTrainingOptions>> given;
};

Json to_json(const nn::TaskStep& step) {
    Json json{{"step", step.step},
              {"length", step.length},
              {"loss", step.loss},
              {"accuracy", step.accuracy},
              {"learning_rate", step.learning_rate},
              {"gradient_norm", step.gradient_norm},
              {"skipped", step.skipped}};
    json.update(newton_json(step));
    json["seconds"] = step.seconds;
    return json;
}

TaskTrainingOptions gather(const TrainTaskArguments& arguments, Group& group) {
    auto options = arguments.files.options(nn::task_options);
    if (!arguments.task.empty()) options.task.task = nn::choice_of(nn::sequence_task_names, "task", arguments.task);
    apply_configuration(arguments.configuration, options.model);
    arguments.given->apply(options);
    options.group = &group;
    arguments.files.check();
    return options;
}

Exit run_train(const TrainTaskArguments& arguments, Output& output) {
    const TaskTrainingOptions options = gather(arguments, output.group());
    Log log(arguments.files, output);
    output.line(std::string(nn::name_of(nn::sequence_task_names, options.task.task)) + " of " +
                count_text(options.task.length) + " steps: " + nn::name_of(nn::mixer_names, options.model.mixer) +
                ", " + count_text(options.model.layers) + " blocks x " + count_text(options.model.width) +
                ", cells evaluated by the method " + nn::name_of(nn::cell_method_names, options.evaluation.method));
    warn_about_slow_blas(output);

    TrainingProgress progress(output);
    RecentMean loss(20), accuracy(20);
    nn::TaskCallbacks callbacks;
    callbacks.step = [&](const nn::TaskStep& step) {
        log.write(to_json(step));
        if (!step.skipped) {
            loss.add(step.loss);
            accuracy.add(step.accuracy);
        }
        progress.show("training", double(step.step), double(step.steps),
                      "loss " + number_text(loss.mean()) + "  accuracy " + percent_text(accuracy.mean()) + "  length " +
                          count_text(step.length),
                      double(step.step - 1));
    };
    callbacks.validation = [&](const nn::TaskValidation& validation) {
        log.write(validation_json(validation));
        const bool shown =
            !output.json() && validation.step % (10 * std::max<index>(1, options.validation_interval)) == 0;
        if (shown) progress.line("step " + count_text(validation.step) + ": " + validation_text(validation));
    };
    callbacks.note = [&](const std::string& note) { progress.warn(note); };
    callbacks.interrupted = interrupted;
    const nn::TaskTraining result = nn::train_task(options, callbacks);
    progress.end();

    output.line(count_text(index(result.steps.size())) + " steps in " + seconds_text(result.seconds) + ", " +
                count_text(result.parameters) + " parameters");
    if (!result.validations.empty()) output.line(validation_text(result.validations.back()));
    const Exit exit = arguments.files.finish(result, output);

    Json& json = output.result;
    json["seconds"] = result.seconds;
    json["steps"] = Json::array();
    for (const auto& step : result.steps) json["steps"].push_back(to_json(step));
    json["validations"] = Json::array();
    for (const auto& validation : result.validations) json["validations"].push_back(validation_json(validation));
    return exit;
}

}  // namespace

Json validation_json(const nn::TaskValidation& validation) {
    Json json{{"step", validation.step},
              {"answers", validation.answers},
              {"validation_loss", validation.loss},
              {"validation_accuracy", validation.accuracy},
              {"last_accuracy", validation.last_accuracy}};
    json.update(newton_json(validation.newton));
    json["seconds"] = validation.seconds;
    return json;
}

std::string validation_text(const nn::TaskValidation& validation) {
    return "validation accuracy " + percent_text(validation.accuracy, 2) + ", of the last answers " +
           percent_text(validation.last_accuracy, 2) + ", loss " + number_text(validation.loss) + " on " +
           count_text(validation.answers) + " answers of " + count_text(validation.sequences) + " sequences";
}

void add_train_task(Program& program) {
    const auto arguments = std::make_shared<TrainTaskArguments>();
    CLI::App& command = program.add("train task", "Train a model of sequences on parity, recall or k-hop induction",
                                    "  deeppcr train task parity --mixer para_gru\n"
                                    "  deeppcr train task recall --mixer lstm --pairs 4 --log recall.log\n"
                                    "  deeppcr train task --resume task.safetensors",
                                    [arguments](Output& output) { return run_train(*arguments, output); });
    std::vector<std::string> names;
    for (const auto& name : nn::sequence_task_names) names.emplace_back(name.first);
    command.add_option("task", arguments->task, "What is asked (default: --resume's, else parity)")
        ->check(CLI::IsMember(names));
    arguments->given = std::make_unique<GivenOptions<TaskTrainingOptions>>(command);
    auto& given = *arguments->given;
    using Training = TaskTrainingOptions;
    const auto task = [](auto member) {
        return [=](Training & options) -> auto& { return options.task.*member; };
    };
    using Task = nn::SequenceTaskOptions;
    given.value("--length", task(&Task::length), "Steps of a sequence");
    given.value("--pairs", task(&Task::pairs), "Of recall: pairs of a key and its value");
    given.value("--keys", task(&Task::keys), "Of recall: different keys");
    given.value("--values", task(&Task::values), "Of recall: different values");
    given.value("--hops", task(&Task::hops), "Of hops: how often the last occurrence is gone back to");
    given.value("--symbols", task(&Task::symbols), "Of hops: different tokens");
    add_training_options(given, command, arguments->configuration);
    given.value("--recurrent-scale", &Training::recurrent_scale,
                "The cells' recurrent parameters are initially so many times the usual ones");
    given.value("--batch", &Training::batch, "Sequences per step");
    given.value("--first-length", &Training::first_length,
                "Steps of the first sequences, which get longer once they are answered; 0: --length");
    given.value("--growth", &Training::growth, "Part of --steps after which sequences have --length in any case");
    given.value("--seed", &Training::seed, "Of the training data");
    given.value("--validation-sequences", &Training::validation_sequences, "On so many sequences");
    given.value("--enough", &Training::enough, "End after a validation of this accuracy, 0 to 1; 0: do not");
    arguments->files.add_options(command, "task", "step and validation");
}

}  // namespace deeppcr::program
