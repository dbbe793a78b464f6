// deeppcr validate: a checkpoint on the test set, on text, or on a task's sequences.
#include <memory>

#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/swap.hpp>
#include <deeppcr/nn/tasks.hpp>
#include <deeppcr/nn/training.hpp>

#include "command.hpp"
#include "given_options.hpp"
#include "language_options.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

struct ValidateArguments {
    const CLI::App* command = nullptr;
    std::string checkpoint, data;
    index length = 0;
    bool held_out = false;
    std::unique_ptr<GivenOptions<nn::ValidationOptions>> given;
};

/// Options that say nothing about such a checkpoint.
void refuse(const ValidateArguments& arguments, const std::string& what, std::initializer_list<const char*> options) {
    for (const char* option : options)
        if (arguments.command->count(option) > 0)
            throw InvalidArgument(option, "no such option for " + what, arguments.checkpoint);
}

/// The options for a model of cells, which refuses a guess that only a network of layers has. evaluation: that of its
/// checkpoint.
template <class Validation>
Validation options_for_cells(const ValidateArguments& arguments, const std::string& what, const Options& evaluation) {
    nn::ValidationOptions given;
    given.evaluation = evaluation;
    arguments.given->apply(given);
    if (arguments.command->count("--guess") > 0 && given.evaluation.guess == Guess::given)
        throw InvalidArgument("--guess", "initial_state or first_step, for " + what, "predicted");
    Validation options;
    options.device = given.device;
    options.batch = given.batch;
    options.evaluation = given.evaluation;
    return options;
}

/// What measure(options) gives, under a progress bar. Throws Interrupted.
template <class Options, class Measure>
auto measured(Options& options, const Measure& measure) {
    Progress bar("validating", 1);
    options.progress = [&](double done) { bar.update(done); };
    options.interrupted = interrupted;
    auto result = measure(options);
    if (interrupted()) throw Interrupted();
    return result;
}

/// A language model's, on the validation part of a token file.
Exit run_validate_text(const ValidateArguments& arguments, Output& output) {
    refuse(arguments, "a language model", {"--length", "--held-out"});
    auto options = options_for_cells<nn::LanguageValidationOptions>(
        arguments, "a language model", nn::language_options(arguments.checkpoint).evaluation);
    options.tokens = arguments.data;
    warn_about_slow_blas(output);

    const nn::LanguageValidation result = measured(
        options, [&](const auto& chosen) { return nn::validate_language_model(arguments.checkpoint, chosen); });

    output.line("validation loss " + number_text(result.loss, 4) + ", perplexity " + number_text(result.perplexity, 4) +
                " on " + count_text(result.tokens) + " tokens in " + seconds_text(result.seconds));
    output.result.update(Json{{"checkpoint", arguments.checkpoint},
                              {"method", nn::name_of(nn::cell_method_names, options.evaluation.method)},
                              {"tokens", result.tokens},
                              {"loss", result.loss},
                              {"perplexity", result.perplexity},
                              {"seconds", result.seconds}});
    return Exit::done;
}

Exit validate_swap(const ValidateArguments& arguments, Output& output) {
    refuse(arguments, "a network of averaged workers",
           {"--method", "--surrogate", "--reduction", "--chunk", "--guess", "--tolerance", "--window", "--on-failure",
            "--threads", "--device", "--batch", "--length"});
    const nn::SwapMeasure result = nn::validate_swap(arguments.checkpoint, arguments.data, arguments.held_out,
                                                     [&](const std::string& text) { output.warn(text); });
    output.line(std::string(arguments.held_out ? "held-out" : "test") + " accuracy " +
                percent_text(result.accuracy, 2) + ", loss " + number_text(result.loss) + " on " +
                count_text(result.examples) + " examples");
    output.result.update(Json{{"checkpoint", arguments.checkpoint},
                              {"set", arguments.held_out ? "held_out" : "test"},
                              {"examples", result.examples},
                              {"accuracy", result.accuracy},
                              {"loss", result.loss}});
    return Exit::done;
}

/// A task's, on sequences of the training's length or another.
Exit run_validate_task(const ValidateArguments& arguments, Output& output) {
    refuse(arguments, "a task", {"--data", "--held-out"});
    auto options = options_for_cells<nn::TaskValidationOptions>(arguments, "a task",
                                                                nn::task_options(arguments.checkpoint).evaluation);
    options.length = arguments.length;
    const nn::TaskValidation result = nn::validate_task(arguments.checkpoint, options);
    output.line(validation_text(result));
    output.result.update(Json{{"checkpoint", arguments.checkpoint},
                              {"method", nn::name_of(nn::cell_method_names, options.evaluation.method)}});
    output.result.update(validation_json(result));
    return Exit::done;
}

Exit run_validate(const ValidateArguments& arguments, Output& output) {
    if (nn::is_language_model(arguments.checkpoint)) return run_validate_text(arguments, output);
    if (nn::is_task(arguments.checkpoint)) return run_validate_task(arguments, output);
    if (nn::is_swap(arguments.checkpoint)) return validate_swap(arguments, output);
    refuse(arguments, "a residual network", {"--length"});
    nn::ValidationOptions options;
    options.evaluation = nn::checkpoint_options(arguments.checkpoint).evaluation;
    arguments.given->apply(options);
    options.data = arguments.data;
    options.held_out = arguments.held_out;
    warn_about_slow_blas(output);

    const nn::ValidationResult result =
        measured(options, [&](const auto& chosen) { return nn::validate(arguments.checkpoint, chosen); });

    std::string text = std::string(arguments.held_out ? "held-out" : "test") + " accuracy " +
                       percent_text(result.accuracy, 2) + ", loss " + number_text(result.loss) + " on " +
                       count_text(result.images) + " images in " + seconds_text(result.seconds);
    if (result.iterations > 0)
        text += ", " + number_text(result.iterations) + " Newton iterations per batch, residual at most " +
                scientific_text(result.residual);
    output.line(text);
    output.result.update(Json{{"checkpoint", arguments.checkpoint},
                              {"set", arguments.held_out ? "held_out" : "test"},
                              {"method", nn::name_of(nn::open_method_names, options.evaluation.method)},
                              {"images", result.images},
                              {"accuracy", result.accuracy},
                              {"loss", result.loss},
                              {"iterations", result.iterations},
                              {"residual", result.residual},
                              {"seconds", result.seconds}});
    return Exit::done;
}

}  // namespace

void add_validate(Program& program) {
    const auto arguments = std::make_shared<ValidateArguments>();
    CLI::App& command = program.add(
        "validate", "Accuracy of a trained network on the test set or on its task, or perplexity of a language model",
        "  deeppcr validate resnet.safetensors\n"
        "  deeppcr validate resnet.safetensors --method sequential --json\n"
        "  deeppcr validate lm.safetensors --data other.tokens\n"
        "  deeppcr validate task.safetensors --length 200",
        [arguments](Output& output) { return run_validate(*arguments, output); });
    arguments->command = &command;
    command.add_option("checkpoint", arguments->checkpoint, "What `deeppcr train` wrote (.safetensors)")->required();
    arguments->given = std::make_unique<GivenOptions<nn::ValidationOptions>>(command);
    auto& given = *arguments->given;
    given.evaluation(&nn::ValidationOptions::evaluation);
    given.value("--device", &nn::ValidationOptions::device, "Where: cpu, cuda or cuda:<number>");
    given.value("--batch", &nn::ValidationOptions::batch, "Images at once; 0: as in the training");
    command.add_option("--data", arguments->data,
                       "Folder of Fashion-MNIST (default: DEEPPCR_DATA, else Debian's package); of a language model a "
                       "token file (default: its training's)");
    command.add_option("--length", arguments->length, "Of a task: steps of the sequences; 0: as in the training");
    command.add_flag("--held-out", arguments->held_out, "The images held out of the training, instead of the test set");
}

}  // namespace deeppcr::program
