// Parity, recall and k-hop induction by models of every mixer (ParaRNN, arXiv 2510.21450).
#include <algorithm>
#include <cmath>

#include <deeppcr/nn/tasks.hpp>
#include <deeppcr/nn/training.hpp>

#include "trainings.hpp"

namespace deeppcr::program {
namespace {

using nn::SequenceTask;

struct Setting {
    SequenceTask task;
    index layers, steps, first_length;
    double learning_rate;
};

std::vector<Setting> settings_of(const Experiment& experiment) {
    if (experiment.quick)
        return {{SequenceTask::parity, 1, 6, 4, 1e-2},
                {SequenceTask::recall, 2, 6, 4, 3e-3},
                {SequenceTask::hops, 2, 6, 4, 3e-3}};
    const index times = experiment.full ? 4 : 1;
    return {{SequenceTask::parity, 1, 300 * times, 4, 1e-2},
            {SequenceTask::recall, 2, 1000 * times, 24, 3e-3},
            {SequenceTask::hops, 3, 600 * times, 16, 3e-3}};
}

// -------------------------------------------------------------------------------------------- the trainings

struct Job {
    const MixerArm* arm;
    nn::TaskTrainingOptions options;
    nn::TaskTraining result = {};
    nn::TaskValidation sequential = {};  ///< of a cell's training, at its end
    std::string failure = {};

    std::string task() const { return nn::name_of(nn::sequence_task_names, options.task.task); }
    /// Of all steps, in any unit.
    double work() const { return double(options.steps * options.model.layers * options.task.length); }
};

Job make_job(const MixerArm& arm, const Setting& setting, const Experiment& experiment, std::uint64_t seed,
             const std::filesystem::path& folder) {
    nn::TaskTrainingOptions options;
    options.task.task = setting.task;
    options.model.mixer = arm.mixer;
    options.model.layers = setting.layers;
    options.model.mlp = options.model.width;
    options.steps = setting.steps;
    options.first_length = setting.first_length;
    options.learning_rate = setting.learning_rate;
    options.model.seed = options.seed = seed;
    options.evaluation.execution.threads = 1;
    options.validation_interval = 50;
    options.validation_sequences = 200;
    options.enough = 1;
    options.checkpoint = folder / (std::string(nn::name_of(nn::sequence_task_names, setting.task)) + "-" +
                                   nn::name_of(nn::mixer_names, arm.mixer) + "-" + std::to_string(seed));
    if (experiment.quick) {
        options.model.width = options.model.mlp = 8;
        options.task.length = 20;
        options.batch = 4;
        options.validation_interval = 2;
        options.validation_sequences = 20;
        options.warm_up = 2;
    }
    return {&arm, options};
}

void run(Job& job, SideBySide& threads) {
    const double per_step = job.work() / double(job.options.steps);
    double counted = 0;
    nn::TaskCallbacks callbacks;
    callbacks.step = [&](const nn::TaskStep&) {
        threads.advance(per_step, job.task() + ", " + job.arm->title);
        counted += per_step;
    };
    callbacks.interrupted = [&] { return threads.stopped(); };
    try {
        job.result = nn::train_task(job.options, callbacks);
        if (job.arm->is_cell && !job.result.interrupted) {
            nn::TaskValidationOptions plain;
            plain.evaluation.method = Method::sequential;
            plain.evaluation.execution.threads = 1;
            job.sequential = nn::validate_task(job.options.checkpoint, plain);
        }
    } catch (const nn::TrainingDiverged& problem) {
        job.failure = problem.what();
    }
    threads.advance(job.work() - counted, job.task() + ", " + job.arm->title);
}

/// Lists with a number per step.
Json curve_of(const nn::TaskTraining& training, bool is_cell) {
    Json curve{
        {"step", Json::array()}, {"loss", Json::array()}, {"accuracy", Json::array()}, {"length", Json::array()}};
    for (const nn::TaskStep& step : training.steps) {
        curve["step"].push_back(step.step);
        curve["loss"].push_back(step.loss);
        curve["accuracy"].push_back(step.accuracy);
        curve["length"].push_back(step.length);
        if (is_cell) add_figures(curve, step);
    }
    return curve;
}

Json training_of(const Job& job) {
    Json entry{
        {"task", job.task()},
        {"mixer", nn::name_of(nn::mixer_names, job.arm->mixer)},
        {"title", job.arm->title},
        {"is_cell", job.arm->is_cell},
        {"seed", job.options.seed},
        {"parameters", job.result.parameters},
        {"steps", job.options.steps},
        {"steps_done", job.result.steps.size()},
        {"seconds", job.result.seconds},
        {"curve", curve_of(job.result, job.arm->is_cell)},
        {"validations", {{"step", Json::array()}, {"accuracy", Json::array()}, {"last_accuracy", Json::array()}}}};
    if (!job.failure.empty()) {
        entry["failure"] = job.failure;
        return entry;
    }
    for (const nn::TaskValidation& validation : job.result.validations) {
        entry["validations"]["step"].push_back(validation.step);
        entry["validations"]["accuracy"].push_back(validation.accuracy);
        entry["validations"]["last_accuracy"].push_back(validation.last_accuracy);
    }
    const nn::TaskValidation& last = job.result.validations.back();
    entry["accuracy"] = last.accuracy;
    entry["last_accuracy"] = last.last_accuracy;
    entry["loss"] = last.loss;
    if (job.arm->is_cell) {
        entry["iterations"] = last.newton.iterations;
        entry["lyapunov"] = last.newton.lyapunov;
        entry["sequential_loss"] = job.sequential.loss;
        entry["loss_difference"] = std::abs(last.loss - job.sequential.loss);
    }
    return entry;
}

// ---------------------------------------------------------------------------------------------------- the report

std::string definition(const Json& tasks, const std::string& task) {
    const auto count = [&](const char* field) { return count_text(tasks[field].get<index>()); };
    if (task == "parity")
        return "Parity: tokens are bits; the answer at each step is whether the ones so far are odd in number. Right "
               "by "
               "guessing: 50 %.";
    if (task == "recall")
        return "Recall (multi-query associative recall, arXiv 2312.04927): " + count("pairs") +
               " pairs of a key and its value, of " + count("keys") + " keys and " + count("values") +
               " values, then keys among them; the answer at each of these is the key's value. Right by guessing among "
               "the values that were there: at least " +
               percent_text(1 / tasks["pairs"].get<double>(), 0) + ".";
    return "k-hop induction (arXiv 2402.09268) with k = " + count("hops") + " and " + count("symbols") +
           " symbols: from each step back to what followed the last occurrence of its symbol, k times; the answer is "
           "the "
           "symbol there. Right by guessing: about " +
           percent_text(1 / tasks["symbols"].get<double>(), 0) + ".";
}

Json trainings_of(const Json& tasks, const std::string& task) {
    Json found = Json::array();
    for (const Json& training : tasks["trainings"])
        if (training["task"] == task) found.push_back(training);
    return found;
}

/// A field of the trainings of an arm, by all seeds.
Sample sample(const Json& trainings, const MixerArm& arm, const char* field) {
    Sample found;
    for (const Json& training : trainings)
        if (training["title"] == arm.title && training.contains(field) && training[field].is_number())
            found.values.push_back(number(training[field]));
    return found;
}

Table tasks_results_table(const Json& tasks, const std::string& task) {
    const Json trainings = trainings_of(tasks, task);
    const index seeds = tasks["seeds"].get<index>();
    Table table{
        .title = "Accuracy, " + task,
        .caption = "On " + count_text(tasks["validation_sequences"].get<index>()) + " sequences of " +
                   count_text(tasks["length"].get<index>()) + " steps that no training saw, after the last step" +
                   (seeds > 1 ? "; means over " + count_text(seeds) + " seeds" : std::string()) +
                   ". Solved: every answer right, after so many steps, at which the training ends. Iterations, "
                   "Lyapunov exponent: of the cells at the end, the largest of these sequences. Differs by: the "
                   "loss there, evaluated in parallel, from that of the same model evaluated sequentially, nats.",
        .columns = {{"mixer", false},
                    {"parameters"},
                    {"accuracy"},
                    {"of the last answers"},
                    {"solved"},
                    {"after steps"},
                    {"seconds"},
                    {"iterations"},
                    {"Lyapunov exponent"},
                    {"differs by"}},
        .rows = {}};
    for (const MixerArm& arm : mixer_arms) {
        const Sample accuracy = sample(trainings, arm, "accuracy");
        const Sample parameters = sample(trainings, arm, "parameters");
        if (parameters.values.empty()) continue;
        if (accuracy.values.empty()) {
            table.rows.push_back({arm.title, "", {"failed", Table::Tone::bad}, "", "", "", "", "", "", ""});
            continue;
        }
        Sample solved_after;
        for (const Json& training : trainings)
            if (training["title"] == arm.title && training.value("accuracy", 0.0) == 1)
                solved_after.values.push_back(number(training["steps_done"]));
        const bool all = index(solved_after.values.size()) == seeds;
        table.rows.push_back({arm.title,
                              count_text(index(parameters.mean())),
                              {percent_text(accuracy.mean(), 2), all ? Table::Tone::good : Table::Tone::plain},
                              percent_text(sample(trainings, arm, "last_accuracy").mean(), 2),
                              count_text(index(solved_after.values.size())) + " of " + count_text(seeds),
                              solved_after.values.empty() ? "-" : count_text(index(std::llround(solved_after.mean()))),
                              seconds_text(sample(trainings, arm, "seconds").mean()),
                              arm.is_cell ? number_text(sample(trainings, arm, "iterations").mean()) : "",
                              arm.is_cell ? number_text(sample(trainings, arm, "lyapunov").mean(), 2) : "",
                              arm.is_cell ? scientific_text(sample(trainings, arm, "loss_difference").mean()) : ""});
    }
    return table;
}

std::vector<Plot> plots_of(const Json& tasks, const std::string& task) {
    Plot accuracy{.title = "Accuracy over the training, " + task,
                  .caption = "On the sequences for validation, of full length; the first seed.",
                  .x = {.label = "optimiser step"},
                  .y = {.label = "accuracy", .unit = Unit::percent},
                  .series = {}};
    Plot length{.title = "Length of the training's sequences, " + task,
                .caption = "They get longer once they are answered.",
                .x = {.label = "optimiser step"},
                .y = {.label = "steps"},
                .series = {}};
    Json cells = Json::array();
    for (const Json& training : trainings_of(tasks, task)) {
        if (training["seed"] != tasks["first_seed"] || training.contains("failure")) continue;
        const auto title = training["title"].get<std::string>();
        const Json& validations = training["validations"];
        accuracy.series.push_back(curve(title, validations["step"], validations["accuracy"]));
        length.series.push_back(curve(title, training["curve"]["step"], training["curve"]["length"]));
        if (training["is_cell"].get<bool>()) cells.push_back(training);
    }
    std::vector<Plot> plots = {accuracy, length};
    if (!cells.empty())
        for (Plot& plot : newton_plots(cells)) plots.push_back(std::move(plot));
    return plots;
}

std::vector<std::string> task_names() {
    std::vector<std::string> names;
    for (const auto& name : nn::sequence_task_names) names.emplace_back(name.first);
    return names;
}

}  // namespace

Json run_tasks(const Experiment& experiment) {
    const std::vector<Setting> settings = settings_of(experiment);
    const index seeds = experiment.full ? 3 : 1;
    const TemporaryFolder folder;
    std::vector<Job> jobs;
    double work = 0;
    for (index seed = 0; seed < seeds; ++seed)
        for (const Setting& setting : settings)
            for (const MixerArm& arm : mixer_arms) {
                jobs.push_back(make_job(arm, setting, experiment, experiment.seed + std::uint64_t(seed), folder.path));
                work += jobs.back().work();
            }
    const nn::TaskTrainingOptions& any = jobs.front().options;
    Json result{{"complete", false},
                {"agreement", nullptr},
                {"full", experiment.full},
                {"loss_tolerance", experiment.tolerance},
                {"length", any.task.length},
                {"width", any.model.width},
                {"batch", any.batch},
                {"pairs", any.task.pairs},
                {"keys", any.task.keys},
                {"values", any.task.values},
                {"hops", any.task.hops},
                {"symbols", any.task.symbols},
                {"validation_sequences", any.validation_sequences},
                {"first_seed", experiment.seed},
                {"seeds", seeds},
                {"settings", Json::array()},
                {"trainings", Json::array()}};
    for (const Setting& setting : settings)
        result["settings"].push_back({{"task", nn::name_of(nn::sequence_task_names, setting.task)},
                                      {"layers", setting.layers},
                                      {"steps", setting.steps},
                                      {"first_length", setting.first_length},
                                      {"learning_rate", setting.learning_rate}});
    SideBySide threads(experiment, work);
    const bool done = threads.run(jobs.size(), [&](std::size_t i) { run(jobs[i], threads); });
    bool agreement = true;
    for (const Job& job : jobs) {
        if (job.failure.empty() && (job.result.interrupted || job.result.validations.empty())) continue;
        Json entry = training_of(job);
        agreement = agreement && job.failure.empty() &&
                    (!entry.contains("loss_difference") || number(entry["loss_difference"]) <= experiment.tolerance);
        result["trainings"].push_back(std::move(entry));
    }
    if (!result["trainings"].empty()) result["agreement"] = agreement;
    result["complete"] = done;
    return result;
}

void describe_tasks(const Json& tasks, Page& page) {
    page.heading("Tasks of sequences");
    page.paragraph("Models of width " + count_text(tasks["width"].get<index>()) + " on sequences of " +
                   count_text(tasks["length"].get<index>()) +
                   " steps, fresh ones in every training step; the first are short, and get longer once they are "
                   "answered. The cells' recurrence is diagonal and evaluated in parallel over the steps; the linear "
                   "recurrence's factors do not depend on the input.");
    for (const Json& setting : tasks["settings"]) {
        const auto task = setting["task"].get<std::string>();
        page.paragraph(definition(tasks, task) + " Blocks: " + count_text(setting["layers"].get<index>()) +
                       ", steps at most: " + count_text(setting["steps"].get<index>()) +
                       ", first length: " + count_text(setting["first_length"].get<index>()) +
                       ", learning rate: " + number_text(number(setting["learning_rate"]), 2) + ".");
        page.table(tasks_results_table(tasks, task));
        page.plots(plots_of(tasks, task));
    }
}

std::string summarise_tasks(const Json& tasks) {
    std::string summary;
    for (const std::string& task : task_names()) summary += text(tasks_results_table(tasks, task)) + "\n";
    return summary;
}

}  // namespace deeppcr::program
