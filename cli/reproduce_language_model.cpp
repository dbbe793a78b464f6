// Language models of cells against LibTorch's LSTM, a linear recurrence and attention, at equal parameters and tokens.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <numbers>

#include <deeppcr/execution.hpp>
#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/tokens.hpp>
#include <deeppcr/nn/training.hpp>
#include <files/tokens.hpp>
#include <files/write.hpp>

#include "trainings.hpp"

namespace deeppcr::program {
namespace {

using nn::Mixer;

struct Sizes {
    index width, layers;
    index context, batch, chunk;  ///< of trainings; chunk: steps that shooting evaluates in one piece
    index steps;
    index seeds;
    index validation_tokens;  ///< eight times during a training
    index final_tokens;       ///< at its end
    index compared_steps;     ///< by which parallel and sequential evaluation are compared
    index speed_context, speed_batch, speed_rounds, speed_steps;
    index generated;
};

Sizes sizes_of(const Experiment& experiment) {
    if (experiment.quick) return {16, 2, 32, 4, 8, 12, 1, 512, 1000, 6, 32, 4, 2, 3, 150};
    Sizes sizes{128, 4, 128, 8, 16, 400, 1, 16384, 100'000, 150, 256, 8, 3, 5, 10'000};
    if (experiment.full) sizes.steps = 4000, sizes.seeds = 3, sizes.compared_steps = 600, sizes.speed_rounds = 7;
    return sizes;
}

// ------------------------------------------------------------------------------------------------- the text

constexpr const char* bible_package = "not found; install Debian's package bible-kjv, or name a text with --text";

/// The program that prints the text, where the shell would find it.
std::filesystem::path find_bible() {
    const char* const variable = std::getenv("PATH");
    const std::string path = variable != nullptr ? variable : "";
    for (std::size_t begin = 0; begin <= path.size();) {
        const std::size_t end = std::min(path.find(':', begin), path.size());
        std::filesystem::path candidate = std::filesystem::path(path.substr(begin, end - begin)) / "bible";
        std::error_code error;
        if (std::filesystem::is_regular_file(candidate, error) && access(candidate.c_str(), X_OK) == 0)
            return candidate;
        begin = end + 1;
    }
    throw FileError("bible", bible_package);
}

std::string bible() {
    const std::string program = find_bible().string();
    std::string text;
    {
        const auto close = [](std::FILE* pipe) { pclose(pipe); };
        const std::unique_ptr<std::FILE, decltype(close)> pipe(popen("bible -f gen1:1-rev22:21 2>/dev/null", "r"),
                                                               close);
        if (!pipe) throw FileError(program, "cannot be started");
        char part[4096];
        for (std::size_t count = 0; (count = std::fread(part, 1, sizeof part, pipe.get())) > 0;)
            text.append(part, count);
    }
    constexpr std::size_t least = 4'000'000;
    if (text.size() < least)
        throw FileError(program, "at least " + std::to_string(least) + " bytes of text", std::to_string(text.size()));
    return text;
}

/// Writes tokens.
void prepare(const Experiment& experiment, const std::filesystem::path& folder, Json& result) {
    nn::PrepareOptions options;
    options.output = folder / "text.tokens";
    if (experiment.text.empty()) {
        files::write_file(folder / "text", bible());
        options.texts = {folder / "text"};
    } else {
        options.texts = {experiment.text};
    }
    const nn::PreparedTokens prepared = nn::prepare_tokens(options);
    result["text"] = experiment.text.empty() ? "the King James Bible (Debian's bible-kjv)" : experiment.text.string();
    result["bytes"] = prepared.bytes;
    result["training_tokens"] = prepared.training;
}

// -------------------------------------------------------------------------------------------- the trainings

struct Job {
    const MixerArm* arm = nullptr;
    std::string name;
    nn::LanguageTrainingOptions options;
    index stop_after = 0;  ///< steps; 0: all
    nn::LanguageTraining result = {};
    nn::LanguageValidation validation = {};
    std::string failure = {};

    double tokens() const {
        return double((stop_after > 0 ? stop_after : options.steps) * options.batch * options.context);
    }
};

nn::LanguageTrainingOptions base(const Sizes& sizes, const std::filesystem::path& folder, Mixer mixer,
                                 std::uint64_t seed) {
    nn::LanguageTrainingOptions options;
    options.model.mixer = mixer;
    options.model.width = sizes.width;
    options.model.layers = sizes.layers;
    options.model.seed = options.seed = seed;
    options.tokens = folder / "text.tokens";
    options.evaluation.chunk = sizes.chunk;
    options.evaluation.execution.threads = 1;
    options.context = sizes.context;
    options.batch = sizes.batch;
    options.steps = sizes.steps;
    options.warm_up = std::max<index>(1, sizes.steps / 10);
    options.validation_interval = std::max<index>(1, sizes.steps / 8);
    options.validation_tokens = sizes.validation_tokens;
    return options;
}

void run(Job& job, const Sizes& sizes, SideBySide& threads) {
    const double per_step = double(job.options.batch * job.options.context);
    double counted = 0;
    nn::LanguageCallbacks callbacks;
    callbacks.step = [&](const nn::LanguageStep&) {
        threads.advance(per_step, job.name);
        counted += per_step;
    };
    callbacks.interrupted = [&] {
        return threads.stopped() || (job.stop_after > 0 && counted >= per_step * double(job.stop_after));
    };
    try {
        job.result = nn::train_language_model(job.options, callbacks);
        if (!job.options.checkpoint.empty() && !job.result.interrupted) {
            nn::LanguageValidationOptions validation;
            validation.at_most = sizes.final_tokens;
            validation.evaluation = job.options.evaluation;
            validation.interrupted = callbacks.interrupted;
            job.validation = nn::validate_language_model(job.options.checkpoint, validation);
        }
    } catch (const nn::TrainingDiverged& problem) {
        job.failure = problem.what();
    }
    threads.advance(job.tokens() - counted, job.name);
}

/// Lists with a number per step.
Json curve_of(const nn::LanguageTraining& training, bool is_cell) {
    Json curve{{"step", Json::array()}, {"loss", Json::array()}};
    for (const nn::LanguageStep& step : training.steps) {
        curve["step"].push_back(step.step);
        curve["loss"].push_back(step.loss);
        if (is_cell) add_figures(curve, step);
    }
    return curve;
}

Json training_of(const Job& job) {
    Json entry{{"mixer", nn::name_of(nn::mixer_names, job.arm->mixer)},
               {"title", job.arm->title},
               {"is_cell", job.arm->is_cell},
               {"seed", job.options.seed},
               {"parameters", job.result.parameters},
               {"tokens", job.tokens()},
               {"seconds", job.result.seconds},
               {"curve", curve_of(job.result, job.arm->is_cell)},
               {"validations", {{"step", Json::array()}, {"loss", Json::array()}}}};
    if (!job.failure.empty()) {
        entry["failure"] = job.failure;
        return entry;
    }
    for (const nn::LanguageValidation& validation : job.result.validations) {
        entry["validations"]["step"].push_back(validation.step);
        entry["validations"]["loss"].push_back(validation.loss);
    }
    entry["loss"] = job.validation.loss;
    entry["perplexity"] = job.validation.perplexity;
    entry["bits_per_byte"] = job.validation.loss / std::numbers::ln2;
    return entry;
}

/// The losses of two trainings that differ in rounding alone. The first goes on after the second has stopped.
Json comparison_of(const Job& parallel, const Job& sequential, const Job& halves, double tolerance) {
    const auto differences = [&](const Job& a, const Job& b) {
        Json list = Json::array();
        for (std::size_t i = 0; i < std::min(a.result.steps.size(), b.result.steps.size()); ++i)
            list.push_back(std::abs(a.result.steps[i].loss - b.result.steps[i].loss) / b.result.steps[i].loss);
        return list;
    };
    const auto largest = [](const Json& list) {
        double most = 0;
        for (const Json& value : list) most = std::isnan(number(value)) ? INFINITY : std::max(most, number(value));
        return most;
    };
    const auto compared = index(sequential.result.steps.size());
    Json entry{{"title", parallel.arm->title},
               {"steps", compared},
               {"sequential", curve_of(sequential.result, false)},
               {"differences", differences(parallel, sequential)},
               {"rounding_differences", differences(halves, sequential)}};
    entry["difference"] = largest(entry["differences"]);
    entry["rounding_difference"] = largest(entry["rounding_differences"]);
    entry["agrees"] = compared == parallel.options.steps || compared == sequential.stop_after
                          ? entry["difference"] <= tolerance
                          : false;
    return entry;
}

// ------------------------------------------------------------------------------------------------- the speed

struct Pace {
    const MixerArm* arm;
    Method method;
    std::vector<double> rounds;  ///< tokens/s: of each round's steps but the first, the median
};

/// All arms one after the other, round after round, with all threads. False: stopped.
bool measure_speed(const Sizes& sizes, const std::filesystem::path& folder, std::uint64_t seed, SideBySide& threads,
                   Json& result) {
    std::vector<Pace> paces;
    for (const MixerArm& arm : mixer_arms) {
        if (arm.is_cell) paces.push_back({&arm, Method::shooting, {}});
        paces.push_back({&arm, Method::sequential, {}});
    }
    for (index round = 0; round < sizes.speed_rounds; ++round)
        for (Pace& pace : paces) {
            nn::LanguageTrainingOptions options = base(sizes, folder, pace.arm->mixer, seed);
            options.evaluation.method = pace.method;
            options.evaluation.chunk = 64;
            options.evaluation.execution.threads = 0;
            options.context = sizes.speed_context;
            options.batch = sizes.speed_batch;
            options.steps = sizes.speed_steps;
            options.estimate_interval = 0;
            options.validation_interval = 0;
            options.validation_tokens = 1;
            nn::LanguageCallbacks callbacks;
            callbacks.step = [&](const nn::LanguageStep& step) {
                threads.advance(double(options.batch * options.context),
                                "speed, " + std::string(pace.arm->title) + ", step " + std::to_string(step.step));
            };
            callbacks.interrupted = [&] { return threads.stopped(); };
            const nn::LanguageTraining training = nn::train_language_model(options, callbacks);
            if (training.interrupted) return false;
            std::vector<double> steps;
            for (const nn::LanguageStep& step : training.steps)
                if (step.step > 1) steps.push_back(step.tokens_per_second);
            pace.rounds.push_back(quartiles(steps).median);
        }
    const Pace& lstm =
        *std::find_if(paces.begin(), paces.end(), [](const Pace& pace) { return pace.arm->mixer == Mixer::lstm; });
    for (const Pace& pace : paces) {
        std::vector<double> ratios;
        for (std::size_t i = 0; i < pace.rounds.size(); ++i) ratios.push_back(pace.rounds[i] / lstm.rounds[i]);
        result.push_back(
            {{"mixer", nn::name_of(nn::mixer_names, pace.arm->mixer)},
             {"title", pace.arm->title},
             {"method", pace.arm->is_cell ? Json(nn::name_of(nn::cell_method_names, pace.method)) : Json()},
             {"rounds", pace.rounds},
             {"tokens_per_second", quartiles(pace.rounds).median},
             {"against_lstm", quartiles(ratios).median}});
    }
    return true;
}

// ------------------------------------------------------------------------------------------------ generation

constexpr const char* prompt = "Ge1:1 In the beginning";

/// False: stopped.
bool generate(const std::vector<Job>& jobs, const Sizes& sizes, SideBySide& threads, Json& result) {
    for (const Job& job : jobs) {
        if (!job.failure.empty()) continue;
        const nn::TextGenerator generator(job.options.checkpoint);
        nn::TextOptions options;
        options.prompt = prompt;
        options.seed = job.options.seed;
        options.temperature = 0.8;
        // Attention sees all that was before: each token takes longer than the last.
        options.tokens = job.arm->mixer == Mixer::attention ? std::min<index>(sizes.generated, 2000) : sizes.generated;
        options.interrupted = [&] { return threads.stopped(); };
        const nn::GeneratedText text = generator.generate(options);
        threads.advance(0, std::string("text, ") + job.arm->title);
        if (text.interrupted) return false;
        Json entry{{"title", job.arm->title},
                   {"state_bytes", text.state_bytes},
                   {"position", Json::array()},
                   {"seconds_per_token", Json::array()},
                   {"text", text.text.substr(0, 600)}};
        for (const auto& pace : text.paces) {
            entry["position"].push_back(pace.position);
            entry["seconds_per_token"].push_back(pace.seconds_per_token);
        }
        result.push_back(std::move(entry));
    }
    return true;
}

// ------------------------------------------------------------------------------------------------ the report

Sample perplexities(const Json& lm, const std::string& mixer) {
    Sample sample;
    for (const Json& training : lm["trainings"])
        if (training["mixer"] == mixer && training.contains("perplexity"))
            sample.values.push_back(number(training["perplexity"]));
    return sample;
}

/// Perplexity over that of LibTorch's LSTM with the same seed.
Sample against_lstm(const Json& lm, const std::string& mixer) {
    std::map<std::uint64_t, double> lstm;
    for (const Json& training : lm["trainings"])
        if (training["mixer"] == "lstm" && training.contains("perplexity"))
            lstm[training["seed"].get<std::uint64_t>()] = number(training["perplexity"]);
    Sample sample;
    for (const Json& training : lm["trainings"])
        if (training["mixer"] == mixer && training.contains("perplexity"))
            if (const auto found = lstm.find(training["seed"].get<std::uint64_t>()); found != lstm.end())
                sample.values.push_back(number(training["perplexity"]) / found->second);
    return sample;
}

std::string more_or_less(double ratio) {
    if (!std::isfinite(ratio)) return "-";
    return percent_text(std::abs(ratio - 1)) + (ratio < 1 ? " lower" : " higher");
}

std::string with_deviation(const Sample& sample, int digits) {
    const double deviation = sample.deviation();
    return number_text(sample.mean(), digits) + (std::isfinite(deviation) ? " ± " + number_text(deviation, 2) : "");
}

const Json* speed_of(const Json& lm, const std::string& mixer) {
    const auto found =
        std::find_if(lm["speed"].begin(), lm["speed"].end(), [&](const Json& row) { return row["mixer"] == mixer; });
    return found == lm["speed"].end() ? nullptr : &*found;
}

Table language_model_results_table(const Json& lm) {
    Table table{.title = "Perplexity per byte at equal parameters and tokens",
                .caption = "On " + count_text(lm["final_tokens"].get<index>()) +
                           " bytes of text that the training did not see. Against LSTM: of the same seed. Tokens/s: of "
                           "training, all threads, median over rounds; cells by shooting.",
                .columns = {{"mixer", false},
                            {"parameters"},
                            {"tokens"},
                            {"perplexity"},
                            {"bits per byte"},
                            {"against LSTM"},
                            {"tokens/s"},
                            {"against LSTM"}},
                .rows = {}};
    for (const MixerArm& arm : mixer_arms) {
        const std::string mixer = nn::name_of(nn::mixer_names, arm.mixer);
        const Sample perplexity = perplexities(lm, mixer), ratio = against_lstm(lm, mixer);
        const Json* const speed = speed_of(lm, mixer);
        const auto training = std::find_if(lm["trainings"].begin(), lm["trainings"].end(),
                                           [&](const Json& entry) { return entry["mixer"] == mixer; });
        if (training == lm["trainings"].end()) continue;
        if (perplexity.values.empty()) {
            table.rows.push_back({arm.title,
                                  count_text((*training)["parameters"].get<index>()),
                                  "",
                                  {"failed", Table::Tone::bad},
                                  "",
                                  "",
                                  "",
                                  ""});
            continue;
        }
        const bool itself = arm.mixer == Mixer::lstm;
        table.rows.push_back({arm.title, count_text((*training)["parameters"].get<index>()),
                              count_text(std::llround(number((*training)["tokens"]))), with_deviation(perplexity, 4),
                              number_text(std::log2(perplexity.mean()), 4), itself ? "" : more_or_less(ratio.mean()),
                              speed != nullptr ? count_text(std::llround(number((*speed)["tokens_per_second"]))) : "",
                              itself || speed == nullptr ? "" : speed_text(number((*speed)["against_lstm"]))});
    }
    return table;
}

Table speed_table(const Json& lm) {
    Table table{
        .title = "Tokens per second of training",
        .caption = "Sequences of " + count_text(lm["speed_context"].get<index>()) + " tokens, batches of " +
                   count_text(lm["speed_batch"].get<index>()) +
                   ", all threads. All of the table one after the other, round after round; of a round the "
                   "median of its steps but the first, then medians over rounds, of the ratios too.",
        .columns = {{"mixer", false}, {"cells evaluated", false}, {"tokens/s"}, {"least, most"}, {"against LSTM"}},
        .rows = {}};
    for (const Json& row : lm["speed"]) {
        const auto rounds = row["rounds"].get<std::vector<double>>();
        const auto [least, most] = std::minmax_element(rounds.begin(), rounds.end());
        const bool itself = row["mixer"] == "lstm";
        table.rows.push_back({row["title"].get<std::string>(),
                              row["method"].is_string() ? row["method"].get<std::string>() : std::string(),
                              count_text(std::llround(number(row["tokens_per_second"]))),
                              count_text(std::llround(*least)) + ", " + count_text(std::llround(*most)),
                              itself ? "" : speed_text(number(row["against_lstm"]))});
    }
    return table;
}

Table comparison_table(const Json& lm) {
    Table table{.title = "Trained by parallel and by sequential evaluation",
                .caption =
                    "The same seed and data: the largest difference of two losses of the same step, relative. "
                    "Rounding alone: sequential evaluation against itself with each batch in two halves, "
                    "whose gradients are added. Tolerance: " +
                    scientific_text(number(lm["loss_tolerance"])) + ".",
                .columns = {{"cell", false}, {"steps"}, {"difference"}, {"rounding alone"}, {"", false}},
                .rows = {}};
    for (const Json& entry : lm["comparisons"]) {
        const bool agrees = entry["agrees"].get<bool>();
        table.rows.push_back({entry["title"].get<std::string>(),
                              count_text(entry["steps"].get<index>()),
                              scientific_text(number(entry["difference"])),
                              scientific_text(number(entry["rounding_difference"])),
                              {agrees ? "agree" : "disagree", agrees ? Table::Tone::good : Table::Tone::bad}});
    }
    return table;
}

Table generation_table(const Json& lm) {
    Table table{.title = "Text, token after token",
                .caption =
                    "Seconds per token by the number of tokens generated before, one thread: medians of the "
                    "last 100. State: what goes from token to token, at the end.",
                .columns = {{"mixer", false}, {"bytes of state"}},
                .rows = {}};
    std::vector<index> positions;
    for (const Json& entry : lm["generation"])
        for (const Json& position : entry["position"]) positions.push_back(position.get<index>());
    std::sort(positions.begin(), positions.end());
    positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
    for (const index position : positions) table.columns.push_back({"at " + count_text(position)});
    for (const Json& entry : lm["generation"]) {
        std::vector<Table::Cell> row = {entry["title"].get<std::string>(),
                                        count_text(entry["state_bytes"].get<index>())};
        for (const index position : positions) {
            const auto place = std::find(entry["position"].begin(), entry["position"].end(), Json(position));
            row.emplace_back(
                place == entry["position"].end()
                    ? ""
                    : seconds_text(number(entry["seconds_per_token"][std::size_t(place - entry["position"].begin())])));
        }
        table.rows.push_back(std::move(row));
    }
    return table;
}

/// The trainings with the first seed.
Json first_trainings(const Json& lm, bool cells_only) {
    Json found = Json::array();
    for (const Json& training : lm["trainings"])
        if (training["seed"] == lm["trainings"][0]["seed"] && (training["is_cell"].get<bool>() || !cells_only))
            found.push_back(training);
    return found;
}

std::vector<Plot> loss_plots(const Json& lm) {
    Plot validation{.title = "Validation loss",
                    .caption = "On " + count_text(lm["validation_tokens"].get<index>()) + " bytes, one seed.",
                    .x = {.label = "optimiser step"},
                    .y = {.label = "nats per byte"},
                    .series = {}},
        training{.title = "Training loss",
                 .caption = "Of each step's batch before the update, means over windows of steps, one seed.",
                 .x = {.label = "optimiser step"},
                 .y = {.label = "nats per byte"},
                 .series = {}};
    for (const Json& entry : first_trainings(lm, false)) {
        const auto title = entry["title"].get<std::string>();
        validation.series.push_back(curve(title, entry["validations"]["step"], entry["validations"]["loss"]));
        training.series.push_back(curve(title, entry["curve"]["step"], entry["curve"]["loss"]));
    }
    return {validation, training};
}

std::vector<Plot> comparison_plots(const Json& lm) {
    const Json cells = first_trainings(lm, true);
    Plot losses{.title = "Training loss, in parallel and sequentially",
                .caption = "The first steps. Where the lines lie on each other only one of them shows.",
                .x = {.label = "optimiser step"},
                .y = {.label = "nats per byte"},
                .series = {}},
        differences{.title = "Difference of the losses",
                    .caption =
                        "Relative; the largest of windows of steps. Dashed: what rounding alone does, each "
                        "batch in one piece against two halves. A difference of exactly 0 is not drawn.",
                    .x = {.label = "optimiser step"},
                    .y = {.label = "relative difference", .logarithm = 10},
                    .series = {},
                    .reference = number(lm["loss_tolerance"]),
                    .reference_label = "tolerance"};
    int colour = 0;
    for (const Json& entry : lm["comparisons"]) {
        const auto title = entry["title"].get<std::string>();
        const Json& steps = entry["sequential"]["step"];
        for (const Json& cell : cells) {
            if (cell["title"] != title) continue;
            Json first = Json::array();
            for (std::size_t i = 0; i < steps.size(); ++i) first.push_back(cell["curve"]["loss"][i]);
            Series parallel = curve(title + ", parallel", steps, first),
                   sequential = curve(title + ", sequential", steps, entry["sequential"]["loss"]);
            parallel.stroke = Series::Stroke::wide;
            sequential.stroke = Series::Stroke::dashed;
            parallel.colour = sequential.colour = colour;
            losses.series.push_back(std::move(parallel));
            losses.series.push_back(std::move(sequential));
        }
        Series difference = curve(title, steps, entry["differences"], OfWindow::largest),
               rounding = curve(title + ", rounding", steps, entry["rounding_differences"], OfWindow::largest);
        rounding.stroke = Series::Stroke::dashed;
        difference.colour = rounding.colour = colour++;
        differences.series.push_back(std::move(difference));
        differences.series.push_back(std::move(rounding));
    }
    return {losses, differences};
}

Plot generation_plot(const Json& lm) {
    Plot plot{.title = "Seconds per token of generated text",
              .caption = "A recurrence's state has a constant size; attention keeps all that it has seen.",
              .x = {.label = "tokens generated before", .logarithm = 10},
              .y = {.label = "per token", .unit = Unit::seconds, .logarithm = 10},
              .series = {}};
    for (const Json& entry : lm["generation"])
        plot.series.push_back(curve(entry["title"].get<std::string>(), entry["position"], entry["seconds_per_token"]));
    return plot;
}

std::vector<std::string> language_model_verdicts(const Json& lm) {
    std::vector<std::string> sentences;
    for (const MixerArm& arm : mixer_arms) {
        if (!arm.is_cell) continue;
        const std::string mixer = nn::name_of(nn::mixer_names, arm.mixer);
        const double ratio = against_lstm(lm, mixer).mean();
        if (!std::isfinite(ratio)) continue;
        std::string sentence = std::string(arm.title) + "'s perplexity is " + more_or_less(ratio) +
                               " than that of LibTorch's LSTM, " +
                               (ratio <= 1.03 ? "within 3 % of it, or better" : "more than 3 % behind");
        if (const Json* const speed = speed_of(lm, mixer))
            sentence += "; its training is " + speed_text(number((*speed)["against_lstm"]));
        sentences.push_back(sentence + ".");
    }
    for (const Json& entry : lm["comparisons"])
        sentences.push_back(entry["title"].get<std::string>() +
                            " trained in parallel and sequentially: losses of the same step differ by at most " +
                            scientific_text(number(entry["difference"])) + " of their size over " +
                            count_text(entry["steps"].get<index>()) + " steps; rounding alone by " +
                            scientific_text(number(entry["rounding_difference"])) + ".");
    return sentences;
}

}  // namespace

void check_language_model_data(const Experiment& experiment) {
    if (experiment.text.empty())
        find_bible();
    else if (std::error_code error; !std::filesystem::is_regular_file(experiment.text, error))
        throw FileError(experiment.text, "not found, or no file");
}

Json run_language_model(const Experiment& experiment) {
    const Sizes sizes = sizes_of(experiment);
    const TemporaryFolder folder;
    Json result{{"complete", false},
                {"agreement", nullptr},
                {"full", experiment.full},
                {"width", sizes.width},
                {"layers", sizes.layers},
                {"context", sizes.context},
                {"batch", sizes.batch},
                {"chunk", sizes.chunk},
                {"steps", sizes.steps},
                {"validation_tokens", sizes.validation_tokens},
                {"final_tokens", sizes.final_tokens},
                {"loss_tolerance", experiment.gradient_tolerance()},
                {"speed_context", sizes.speed_context},
                {"speed_batch", sizes.speed_batch},
                {"trainings", Json::array()},
                {"comparisons", Json::array()},
                {"speed", Json::array()},
                {"generation", Json::array()}};
    prepare(experiment, folder.path, result);

    // Those for the comparison are shorter: last.
    std::vector<Job> jobs;
    for (index i = 0; i < sizes.seeds; ++i)
        for (const MixerArm& arm : mixer_arms) {
            const std::uint64_t seed = experiment.seed + std::uint64_t(i);
            Job job{&arm, arm.title, base(sizes, folder.path, arm.mixer, seed)};
            job.options.checkpoint = folder.path / (std::to_string(jobs.size()) + ".safetensors");
            jobs.push_back(std::move(job));
        }
    const std::size_t trainings = jobs.size();
    for (const MixerArm& arm : mixer_arms) {
        if (!arm.is_cell) continue;
        for (const index micro_batch : {index(0), sizes.batch / 2}) {
            Job job{&arm, std::string(arm.title) + ", sequential",
                    base(sizes, folder.path, arm.mixer, experiment.seed)};
            job.options.evaluation.method = Method::sequential;
            job.options.micro_batch = micro_batch;
            job.options.validation_interval = 0;
            job.stop_after = sizes.compared_steps;
            jobs.push_back(std::move(job));
        }
    }
    double work = 0;
    for (const Job& job : jobs) work += job.tokens();
    std::size_t paces = 0;
    for (const MixerArm& arm : mixer_arms) paces += arm.is_cell ? 2 : 1;
    work += double(paces) * double(sizes.speed_rounds * sizes.speed_steps * sizes.speed_context * sizes.speed_batch);
    SideBySide threads(experiment, work);
    const bool trained = threads.run(jobs.size(), [&](std::size_t i) { run(jobs[i], sizes, threads); });
    if (!trained) return result;

    bool agreement = true;
    for (std::size_t i = 0; i < trainings; ++i) {
        result["trainings"].push_back(training_of(jobs[i]));
        agreement = agreement && jobs[i].failure.empty();
    }
    for (std::size_t i = trainings; i < jobs.size(); i += 2) {
        const auto parallel =
            std::find_if(jobs.begin(), jobs.end(), [&](const Job& job) { return job.arm == jobs[i].arm; });
        result["comparisons"].push_back(
            comparison_of(*parallel, jobs[i], jobs[i + 1], experiment.gradient_tolerance()));
        agreement = agreement && result["comparisons"].back()["agrees"].get<bool>();
    }
    result["agreement"] = agreement;
    const std::vector<Job> first(jobs.begin(), jobs.begin() + index(std::size(mixer_arms)));
    result["complete"] = measure_speed(sizes, folder.path, experiment.seed, threads, result["speed"]) &&
                         generate(first, sizes, threads, result["generation"]);
    return result;
}

void describe_language_model(const Json& lm, Page& page) {
    page.heading("Language models");
    page.paragraph("Blocks of " + count_text(lm["width"].get<index>()) + " channels, " +
                   count_text(lm["layers"].get<index>()) +
                   " of them, that mix over time by a cell (ParaRNN, arXiv "
                   "2510.21450; xLSTM, arXiv 2405.04517), by LibTorch's LSTM, a diagonal linear recurrence or causal "
                   "attention, with MLPs so wide that all have about the same number of parameters. Text: " +
                   lm["text"].get<std::string>() + ", " + count_text(lm["bytes"].get<index>()) +
                   " bytes, each a token. " + count_text(lm["steps"].get<index>()) + " steps of " +
                   count_text(lm["batch"].get<index>()) + " sequences of " + count_text(lm["context"].get<index>()) +
                   " tokens, one learning rate for all, none tuned. Cells are evaluated in parallel over time, by "
                   "shooting in chunks of " +
                   count_text(lm["chunk"].get<index>()) + " steps.");
    page.list(language_model_verdicts(lm));
    if (lm["trainings"].empty()) return;
    page.table(language_model_results_table(lm));
    page.plots(loss_plots(lm));
    page.plots(newton_plots(first_trainings(lm, true)));
    page.table(comparison_table(lm));
    page.plots(comparison_plots(lm));
    if (!lm["speed"].empty()) page.table(speed_table(lm));
    if (lm["generation"].empty()) return;
    page.table(generation_table(lm));
    page.plots({generation_plot(lm)});
    const Json& sample = lm["generation"][0];
    page.preformatted(
        "Text by " + sample["title"].get<std::string>() + " that goes on from “" + prompt + "”, temperature 0.8",
        sample["text"].get<std::string>());
}

std::string summarise_language_model(const Json& lm) {
    if (lm["trainings"].empty()) return {};
    std::string summary = text(language_model_results_table(lm)) + "\n" + text(comparison_table(lm)) + "\n";
    if (!lm["speed"].empty()) summary += text(speed_table(lm)) + "\n";
    if (!lm["generation"].empty()) summary += text(generation_table(lm)) + "\n";
    for (const std::string& sentence : language_model_verdicts(lm)) summary += sentence + "\n";
    return summary;
}

}  // namespace deeppcr::program
