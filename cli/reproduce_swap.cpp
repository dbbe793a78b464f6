// Weights averaged over workers that went on alone, against small and large batches (arXiv 2001.02312, section 4).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>

#include <deeppcr/nn/swap.hpp>
#include <files/idx.hpp>

#include "trainings.hpp"

namespace deeppcr::program {
namespace {

struct Sizes {
    index train_images, held_out, workers, small_batch, large_batch;
    index epochs;         ///< of the small batch, and of the large batch and phase 1 at most
    index worker_epochs;  ///< of each worker in phase 2
    index seeds;
    std::vector<double> rates, worker_rates;  ///< learning rates that are tried; worker: of SWAP's phase 2
    std::vector<double> stopping_accuracies;

    /// As many as SWAP's workers see together, at most.
    index long_epochs() const { return epochs + workers * worker_epochs; }
};

Sizes sizes_of(const Experiment& experiment) {
    if (experiment.quick) return {256, 128, 2, 16, 64, 1, 1, 1, {0.1}, {0.05, 0.1}, {0.5}};
    Sizes sizes{5120, 4000, 4, 64, 512, 10, 4, 2, {0.1, 0.2, 0.4}, {0.05, 0.1, 0.2}, {0.85, 0.92, 0.97}};
    if (experiment.full) {
        sizes.train_images = 10240;
        sizes.seeds = 5;
        sizes.rates = {0.05, 0.1, 0.2, 0.4, 0.8};
        sizes.worker_rates = {0.05, 0.1, 0.2, 0.4};
    }
    return sizes;
}

// -------------------------------------------------------------------------------------------- the trainings

nn::SwapOptions base(const Sizes& sizes, const Experiment& experiment, std::uint64_t seed) {
    nn::SwapOptions options;
    options.train_examples = sizes.train_images;
    options.held_out = sizes.held_out;
    options.data = experiment.data;
    options.seed = seed;
    options.workers = sizes.workers;
    options.large_batch = sizes.large_batch;
    options.micro_batch = sizes.large_batch / sizes.workers;
    options.large_epochs = sizes.epochs;
    options.large_warm_up = 2 * sizes.train_images / sizes.large_batch;
    options.small_batch = sizes.small_batch;
    options.small_epochs = 0;
    options.stopping_accuracy = 2;
    return options;
}

/// The arms that are trained; a rate is that of the phase that tells them apart.
enum class Arm { small, large, longer, swa, swap };
const std::map<Arm, std::string> arm_names = {{Arm::small, "small_batch"},
                                              {Arm::large, "large_batch"},
                                              {Arm::longer, "longer_large_batch"},
                                              {Arm::swa, "swa"},
                                              {Arm::swap, "swap"}};

/// What is chosen on held-out images.
struct Choice {
    std::map<Arm, double> rates;
    double stopping_accuracy = 0;
};

nn::SwapOptions options_of(Arm arm, const Choice& choice, nn::SwapOptions options, const Sizes& sizes) {
    const double rate = choice.rates.at(arm);
    switch (arm) {
        case Arm::small:
            options.workers = 1;
            options.large_epochs = 0;
            options.small_epochs = sizes.epochs;
            options.small_warm_up = sizes.train_images / sizes.small_batch;
            options.small_learning_rate = rate;
            break;
        case Arm::large:
        case Arm::longer:
            options.large_learning_rate = rate;
            if (arm == Arm::longer) options.large_epochs = sizes.long_epochs();
            break;
        case Arm::swa:
        case Arm::swap:
            options.large_learning_rate = choice.rates.at(Arm::large);
            options.stopping_accuracy = choice.stopping_accuracy;
            options.small_learning_rate = rate;
            options.small_epochs = sizes.worker_epochs;
            if (arm == Arm::swap) break;
            options.workers = 1;
            options.small_epochs *= sizes.workers;
            options.small_schedule = nn::RateSchedule::constant;
            options.trajectory = nn::Trajectory::swa;
            break;
    }
    return options;
}

struct Job {
    std::string name;
    nn::SwapOptions options;
    nn::SwapResult result = {};
    bool diverged = false;

    /// At most, of all workers.
    double images() const {
        return double(options.train_examples) * double(options.large_epochs + options.small_epochs * options.workers);
    }
};

/// Runs trainings side by side, each in one thread, and tells how much of all is done.
class Runner {
public:
    Runner(const Experiment& experiment, double all_images) : threads_(experiment, all_images) {}

    /// False: stopped.
    bool run(std::vector<Job>& jobs) {
        return threads_.run(jobs.size(), [&](std::size_t i) { run(jobs[i]); });
    }

private:
    void run(Job& job) {
        double counted = 0;
        const auto count = [&](double images) {
            threads_.advance(images - counted, job.name);
            counted = images;
        };
        nn::SwapCallbacks callbacks;
        callbacks.progress = [&](index phase, double done, double) {
            const double first = double(job.options.train_examples * job.options.large_epochs);
            count(phase == 1 ? done * first : first + done * (job.images() - first));
        };
        callbacks.interrupted = [&] { return threads_.stopped(); };
        try {
            job.result = nn::train_swap(job.options, callbacks);
        } catch (const nn::TrainingDiverged&) {
            job.diverged = true;
        }
        count(job.images());
    }

    SideBySide threads_;
};

// -------------------------------------------------------------------------------------------------- the search

/// Trains an arm with each rate, and each accuracy to stop phase 1 at, and takes what is best on the held-out images.
/// False: stopped.
bool search(const std::vector<Arm>& arms, const Sizes& sizes, const Experiment& experiment, Choice& choice,
            Runner& runner, Json& found) {
    std::vector<Job> jobs;
    std::vector<std::pair<Arm, Choice>> tried;
    for (const Arm arm : arms) {
        const bool stops = arm == Arm::swap;
        for (const double accuracy : stops ? sizes.stopping_accuracies : std::vector{choice.stopping_accuracy})
            for (const double rate : arm == Arm::swap ? sizes.worker_rates : sizes.rates) {
                Choice trial = choice;
                trial.rates[arm] = rate;
                trial.stopping_accuracy = accuracy;
                nn::SwapOptions options = options_of(arm, trial, base(sizes, experiment, experiment.seed), sizes);
                options.test = false;
                jobs.push_back({"search, " + arm_names.at(arm) + ", learning rate " + number_text(rate), options});
                tried.emplace_back(arm, trial);
            }
    }
    if (!runner.run(jobs)) return false;
    std::map<Arm, std::size_t> best;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        if (jobs[i].diverged) continue;
        const auto [place, first] = best.emplace(tried[i].first, i);
        if (!first && jobs[i].result.held_out.accuracy > jobs[place->second].result.held_out.accuracy)
            place->second = i;
    }
    for (const Arm arm : arms) {
        if (!best.contains(arm)) throw NotConverged(arm_names.at(arm) + " diverged at every learning rate tried");
        choice.rates[arm] = tried[best.at(arm)].second.rates.at(arm);
        if (arm == Arm::swap) choice.stopping_accuracy = tried[best.at(arm)].second.stopping_accuracy;
    }
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        const auto& [arm, trial] = tried[i];
        const bool stops = arm == Arm::swap || arm == Arm::swa;
        index phase_1_epochs = 0;
        for (const nn::SwapEpoch& epoch : jobs[i].result.epochs) phase_1_epochs += epoch.phase == 1;
        found.push_back({{"arm", arm_names.at(arm)},
                         {"learning_rate", trial.rates.at(arm)},
                         {"stopping_accuracy", stops ? Json(trial.stopping_accuracy) : Json()},
                         {"phase_1_epochs", phase_1_epochs},
                         {"held_out_accuracy", jobs[i].diverged ? Json() : Json(jobs[i].result.held_out.accuracy)},
                         {"chosen", best.at(arm) == i}});
    }
    return true;
}

// -------------------------------------------------------------------------------------------------- the trials

Json to_json(const nn::SwapMeasure& measure) { return {{"accuracy", measure.accuracy}, {"loss", measure.loss}}; }

Json cost_of(const nn::SwapResult& result) {
    return {{"images", result.examples},
            {"seconds", result.seconds},
            {"processor_seconds", result.processor_seconds},
            {"modelled_seconds", result.modelled_seconds}};
}

double barrier_of(const nn::SwapComparison& comparison) {
    double barrier = 0;
    for (std::size_t i = 0; i < comparison.line.size(); ++i) {
        const double weight = comparison.line_weights[i];
        const double straight = (1 - weight) * comparison.line.front().loss + weight * comparison.line.back().loss;
        barrier = std::max(barrier, comparison.line[i].loss - straight);
    }
    return barrier;
}

/// One seed's arms.
Json trial_of(std::uint64_t seed, const std::vector<Job>& jobs, const std::vector<Arm>& arms) {
    Json trial{{"seed", seed}, {"arms", Json::object()}, {"line", Json::array()}, {"barrier", nullptr}};
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        if (jobs[i].diverged) continue;
        const nn::SwapResult& result = jobs[i].result;
        Json arm = to_json(result.test);
        arm.update(cost_of(result));
        trial["arms"][arm_names.at(arms[i])] = std::move(arm);
        const nn::SwapComparison& comparison = result.comparison;
        if (comparison.workers.empty()) continue;
        nn::SwapMeasure mean;
        for (const nn::SwapMeasure& worker : comparison.workers) {
            mean.accuracy += worker.accuracy / double(comparison.workers.size());
            mean.loss += worker.loss / double(comparison.workers.size());
        }
        trial["arms"]["workers"] = to_json(mean);
        trial["arms"]["ensemble"] = to_json(comparison.ensemble);
        trial["arms"]["stale_statistics"] = to_json(comparison.stale);
        trial["arms"]["averaged_statistics"] = to_json(comparison.averaged_statistics);
        for (std::size_t k = 0; k < comparison.line.size(); ++k)
            trial["line"].push_back({{"weight", comparison.line_weights[k]},
                                     {"loss", comparison.line[k].loss},
                                     {"accuracy", comparison.line[k].accuracy}});
        trial["barrier"] = barrier_of(comparison);
    }
    return trial;
}

// ---------------------------------------------------------------------------------------------------- the report

const std::vector<std::pair<std::string, std::string>> rows = {
    {"small_batch", "small batch"},
    {"large_batch", "large batch"},
    {"longer_large_batch", "large batch, longer"},
    {"swa", "SWA: phase 1, then one worker"},
    {"workers", "workers before averaging, mean"},
    {"swap", "SWAP"},
    {"ensemble", "ensemble of the workers"},
    {"stale_statistics", "SWAP with one worker's statistics"},
    {"averaged_statistics", "SWAP with averaged statistics"}};

double value_of(const Json& trial, const std::string& arm, const char* field) {
    const Json& arms = trial["arms"];
    return arms.contains(arm) && arms[arm].contains(field) ? number(arms[arm][field]) : std::nan("");
}

Sample sample(const Json& swap, const std::string& arm, const char* field) {
    Sample found;
    for (const Json& trial : swap["trials"])
        if (const double value = value_of(trial, arm, field); std::isfinite(value)) found.values.push_back(value);
    return found;
}

/// SWAP less the arm, per seed.
Sample differences(const Json& swap, const std::string& arm) {
    Sample found;
    for (const Json& trial : swap["trials"]) {
        const double difference = value_of(trial, "swap", "accuracy") - value_of(trial, arm, "accuracy");
        if (std::isfinite(difference)) found.values.push_back(difference);
    }
    return found;
}

std::string points_text(double part, bool sign) {
    if (!std::isfinite(part)) return "-";
    char text[32];
    std::snprintf(text, sizeof text, sign ? "%+.2f" : "%.2f", part * 100);
    return text;
}

std::string with_deviation(const Sample& found, bool sign) {
    const double deviation = found.deviation();
    return points_text(found.mean(), sign) + (std::isfinite(deviation) ? " ± " + points_text(deviation, false) : "");
}

Table swap_results_table(const Json& swap) {
    const std::size_t seeds = swap["trials"].size();
    Table table{
        .title = "Test accuracy, paired by seed",
        .caption = count_text(index(seeds)) +
                   (seeds == 1 ? " seed" : " seeds: means ± standard deviations over seeds, in points of 100") +
                   ". SWAP less: differences from the arm with the same seed. Images: trained on by all workers. "
                   "Processor time: of all workers; wall clock: workers one after the other in one thread, beside "
                   "another training. Modelled: a processor for each worker, its slowest worker in each phase, "
                   "communication free; not measured.",
        .columns = {{"arm", false},
                    {"accuracy"},
                    {"SWAP less"},
                    {"SWAP is better"},
                    {"images"},
                    {"processors"},
                    {"wall clock"},
                    {"modelled"}},
        .rows = {}};
    for (const auto& [arm, title] : rows) {
        const Sample difference = differences(swap, arm);
        const auto better =
            std::count_if(difference.values.begin(), difference.values.end(), [](double value) { return value > 0; });
        const bool itself = arm == "swap";
        const double images = sample(swap, arm, "images").mean();
        table.rows.push_back({title, with_deviation(sample(swap, arm, "accuracy"), false),
                              itself ? "" : with_deviation(difference, true),
                              itself ? "" : count_text(better) + " of " + count_text(index(difference.values.size())),
                              std::isfinite(images) ? count_text(index(images)) : "",
                              std::isfinite(images) ? seconds_text(sample(swap, arm, "processor_seconds").mean()) : "",
                              std::isfinite(images) ? seconds_text(sample(swap, arm, "seconds").mean()) : "",
                              std::isfinite(images) ? seconds_text(sample(swap, arm, "modelled_seconds").mean()) : ""});
    }
    return table;
}

Table search_table(const Json& swap) {
    Table table{.title = "Chosen on held-out training images",
                .caption = "One training each, of a seed of its own; accuracy on " +
                           count_text(swap["held_out"].get<index>()) +
                           " images held out of the training. The test set has no part in it.",
                .columns = {{"arm", false},
                            {"learning rate"},
                            {"phase 1 stops at"},
                            {"after epochs"},
                            {"held-out accuracy"},
                            {"", false}},
                .rows = {}};
    for (const Json& entry : swap["search"]) {
        const bool stops = entry["stopping_accuracy"].is_number();
        const auto found = std::find_if(rows.begin(), rows.end(),
                                        [&](const auto& row) { return row.first == entry["arm"].get<std::string>(); });
        table.rows.push_back(
            {found->second, number_text(number(entry["learning_rate"]), 2),
             stops ? percent_text(number(entry["stopping_accuracy"]), 0) : "",
             stops ? count_text(entry["phase_1_epochs"].get<index>()) : "",
             entry["held_out_accuracy"].is_null() ? "diverged" : percent_text(number(entry["held_out_accuracy"]), 2),
             entry["chosen"].get<bool>() ? "chosen" : ""});
    }
    return table;
}

Plot accuracy_plot(const Json& swap) {
    Plot plot{.title = "Test accuracy by seed",
              .caption = "Six of the arms, each with the same seeds.",
              .x = {.label = "seed"},
              .y = {.label = "accuracy", .unit = Unit::percent},
              .series = {}};
    for (const auto& [arm, title] : rows) {
        if (arm == "stale_statistics" || arm == "averaged_statistics" || arm == "longer_large_batch") continue;
        Series series{.name = title, .x = {}, .y = {}};
        for (const Json& trial : swap["trials"]) {
            series.x.push_back(number(trial["seed"]));
            series.y.push_back(value_of(trial, arm, "accuracy"));
        }
        plot.series.push_back(std::move(series));
    }
    return plot;
}

Plot line_plot(const Json& swap) {
    Plot plot{
        .title = "Loss on the line between two workers",
        .caption =
            "Test loss of (1 - weight) times the weights of worker 0 plus weight times those of worker 1, batch-norm "
            "statistics recomputed at every point. A hump above the straight line between the ends is a barrier; "
            "a hollow is why averaging helps.",
        .x = {.label = "weight"},
        .y = {.label = "test loss"},
        .series = {}};
    for (const Json& trial : swap["trials"]) {
        if (plot.series.size() == 6) break;
        Series series{.name = "seed " + count_text(trial["seed"].get<index>()), .x = {}, .y = {}};
        for (const Json& point : trial["line"]) {
            series.x.push_back(number(point["weight"]));
            series.y.push_back(number(point["loss"]));
        }
        plot.series.push_back(std::move(series));
    }
    return plot;
}

std::vector<std::string> swap_verdicts(const Json& swap) {
    if (swap["trials"].empty()) return {};
    const auto against = [&](const std::string& arm, const std::string& words) {
        return "SWAP less " + words + ": " + with_deviation(differences(swap, arm), true) + " points.";
    };
    Sample barriers, middles;
    for (const Json& trial : swap["trials"]) {
        if (!trial["barrier"].is_number()) continue;
        barriers.values.push_back(number(trial["barrier"]));
        const Json& line = trial["line"];
        middles.values.push_back(number(line[line.size() / 2]["loss"]) -
                                 (number(line.front()["loss"]) + number(line.back()["loss"])) / 2);
    }
    std::vector<std::string> sentences = {against("small_batch", "the small batch"),
                                          against("large_batch", "the large batch"),
                                          against("workers", "the mean of its workers before averaging"),
                                          against("ensemble", "the ensemble of its workers")};
    if (!barriers.values.empty())
        sentences.push_back("Loss barrier between two workers: " + number_text(barriers.mean()) +
                            " (mean over seeds); the middle of the line is at " + number_text(middles.mean(), 2) +
                            " from the mean of the ends.");
    const double seconds = sample(swap, "small_batch", "processor_seconds").mean(),
                 modelled = sample(swap, "swap", "modelled_seconds").mean();
    sentences.push_back(
        "Modelled, not measured: SWAP with a processor for each worker takes " + seconds_text(modelled) +
        ", the small batch on one " + seconds_text(seconds) + ": SWAP is " + speed_text(seconds / modelled) + ", for " +
        number_text(sample(swap, "swap", "images").mean() / sample(swap, "small_batch", "images").mean()) +
        " times the images.");
    return sentences;
}

}  // namespace

void check_swap_data(const Experiment& experiment) { files::find_fashion_mnist(experiment.data); }

Json run_swap(const Experiment& experiment) {
    const Sizes sizes = sizes_of(experiment);
    const std::vector<Arm> arms = {Arm::small, Arm::large, Arm::longer, Arm::swap, Arm::swa};
    Json result{{"complete", false},
                {"agreement", nullptr},
                {"data", "Fashion-MNIST"},
                {"network", "three convolutions with batch norm, 33,658 parameters"},
                {"full", experiment.full},
                {"train_images", sizes.train_images},
                {"held_out", sizes.held_out},
                {"workers", sizes.workers},
                {"small_batch", sizes.small_batch},
                {"large_batch", sizes.large_batch},
                {"epochs", sizes.epochs},
                {"longer_epochs", sizes.long_epochs()},
                {"worker_epochs", sizes.worker_epochs},
                {"search", Json::array()},
                {"trials", Json::array()}};

    const double short_run = double(sizes.train_images * sizes.epochs),
                 long_run = double(sizes.train_images * sizes.long_epochs());
    const auto count = [](const auto& list) { return double(list.size()); };
    const double short_runs = 2 * count(sizes.rates) + 2 * double(sizes.seeds),
                 long_runs = 2 * count(sizes.rates) + count(sizes.worker_rates) * count(sizes.stopping_accuracies) +
                             3 * double(sizes.seeds);
    Runner runner(experiment, short_run * short_runs + long_run * long_runs);
    Choice choice;
    for (const auto& group : {std::vector{Arm::longer, Arm::small, Arm::large}, {Arm::swap}, {Arm::swa}})
        if (!search(group, sizes, experiment, choice, runner, result["search"])) return result;

    std::vector<Job> all;
    for (index i = 1; i <= sizes.seeds; ++i)
        for (const Arm arm : arms) {
            const std::uint64_t seed = experiment.seed + std::uint64_t(i);
            nn::SwapOptions options = options_of(arm, choice, base(sizes, experiment, seed), sizes);
            options.compare = arm == Arm::swap;
            all.push_back({"seed " + std::to_string(seed) + ", " + arm_names.at(arm), options});
        }
    const bool done = runner.run(all);
    for (index i = 0; i < sizes.seeds && done; ++i) {
        const auto first = all.begin() + i * index(arms.size());
        result["trials"].push_back(
            trial_of(first->options.seed, std::vector<Job>(first, first + index(arms.size())), arms));
    }
    result["complete"] = done;
    return result;
}

void describe_swap(const Json& swap, Page& page) {
    page.heading("Weights averaged over workers");
    page.paragraph(
        "SWAP (arXiv 2001.02312) in three phases: " + count_text(swap["workers"].get<index>()) +
        " workers train together with batches of " + count_text(swap["large_batch"].get<index>()) +
        " up to a training accuracy below 100 %; each goes on alone with batches of " +
        count_text(swap["small_batch"].get<index>()) + " for " + count_text(swap["worker_epochs"].get<index>()) +
        " epochs in an order of its own; their weights are averaged and batch-norm statistics recomputed. On " +
        count_text(swap["train_images"].get<index>()) + " images of Fashion-MNIST with " +
        swap["network"].get<std::string>() + ", workers simulated. Small and large batch train for " +
        count_text(swap["epochs"].get<index>()) + " epochs, the longer large batch for " +
        count_text(swap["longer_epochs"].get<index>()) +
        ", about the images of SWAP's workers together; SWA goes on from phase 1 with one worker over as many images "
        "at a "
        "constant rate and averages the ends of its epochs.");
    page.list(swap_verdicts(swap));
    if (!swap["trials"].empty()) {
        page.table(swap_results_table(swap));
        page.plots({accuracy_plot(swap), line_plot(swap)});
    }
    page.table(search_table(swap));
}

std::string summarise_swap(const Json& swap) {
    std::string summary = text(search_table(swap)) + "\n";
    if (!swap["trials"].empty()) summary += text(swap_results_table(swap)) + "\n";
    for (const std::string& sentence : swap_verdicts(swap)) summary += sentence + "\n";
    return summary;
}

}  // namespace deeppcr::program
