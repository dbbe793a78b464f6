// A deep residual network trained twice from the same seed, on real pictures (arXiv 2309.16318, section 4.2).
#include <algorithm>
#include <cmath>
#include <numeric>

#include <deeppcr/nn/training.hpp>
#include <files/idx.hpp>

#include "reproduce.hpp"

namespace deeppcr::program {
namespace {

struct Trial {
    std::string name, title;
    Options evaluation;
    double share;  ///< of the experiment's time
};

/// Chunks much shorter than the network, so that the scan's three parts all have work.
std::vector<Trial> trials(index layers) {
    const Options deeppcr{.method = Method::newton,
                          .reduction = Reduction::scan,
                          .chunk = layers / 32,
                          .guess = Guess::given,
                          .estimates = Estimates::none};
    return {{"sequential", "sequential", {.method = Method::sequential}, 0.18}, {"deeppcr", "DeepPCR", deeppcr, 0.79}};
}

nn::TrainingOptions training_options(const Experiment& experiment) {
    nn::TrainingOptions options;
    options.held_out = 0;
    options.seed = experiment.seed;
    options.data = experiment.data;
    options.epochs = 2;
    if (experiment.quick) {
        options.layers = 64;
        options.width = 8;
        options.batch = 32;
        options.steps = 6;
        options.warm_up = 2;
        options.train_images = 192;
    }
    return options;
}

/// One training as JSON: a value per step, and the test set where it was reached.
Json run_trial(const Trial& trial, nn::TrainingOptions options, const Experiment& experiment, double done_before) {
    bool going_on = true;
    double trained = 0;
    constexpr double training_share = 0.9;  // the rest is the test set
    nn::TrainingCallbacks callbacks;
    callbacks.step = [&](const nn::StepRecord& record) {
        trained = training_share * double(record.step) / double(record.steps);
        going_on = going_on && experiment.advance(done_before + trial.share * trained,
                                                  trial.title + ", step " + count_text(record.step) + "/" +
                                                      count_text(record.steps) + ", loss " + number_text(record.loss));
    };
    callbacks.validation = [&](double done) {
        going_on = going_on && experiment.advance(done_before + trial.share * (trained + (1 - training_share) * done),
                                                  trial.title + ", test set");
    };
    callbacks.interrupted = [&] { return !going_on; };
    options.evaluation = trial.evaluation;
    const nn::TrainingResult result = nn::train(options, callbacks);

    Json entry{{"complete", !result.interrupted}, {"parameters", result.parameters}, {"steps", result.steps.size()}};
    for (const char* list : {"loss", "accuracy", "seconds", "forward_seconds", "backward_seconds"})
        entry[list] = Json::array();
    const bool newton = trial.evaluation.method != Method::sequential;
    for (const nn::StepRecord& record : result.steps) {
        entry["loss"].push_back(record.loss);
        entry["accuracy"].push_back(record.accuracy);
        entry["seconds"].push_back(record.seconds);
        entry["forward_seconds"].push_back(record.forward_seconds);
        entry["backward_seconds"].push_back(record.backward_seconds);
        if (!newton) continue;
        entry["iterations"].push_back(record.iterations);
        entry["mean_iterations"].push_back(record.mean_iterations);
        entry["status"].push_back(to_string(record.status));
        entry["residual"].push_back(record.residual);
    }
    for (const char* list : {"seconds", "forward_seconds", "backward_seconds"}) {
        const std::string name = std::string("median_") + list;
        if (result.steps.empty())
            entry[name] = nullptr;
        else
            entry[name] = quartiles(entry[list].get<std::vector<double>>()).median;
    }
    const bool tested = result.test.images > 0 && !result.interrupted;
    entry["test_images"] = tested ? Json(result.test.images) : Json();
    entry["test_loss"] = tested ? Json(result.test.loss) : Json();
    entry["test_accuracy"] = tested ? Json(result.test.accuracy) : Json();
    entry["total_seconds"] = result.seconds;
    return entry;
}

double relative(const nn::MethodComparison::Difference& difference) {
    if (!std::isfinite(difference.largest)) return INFINITY;
    return difference.magnitude > 0 ? difference.largest / difference.magnitude : difference.largest;
}

/// Both methods on one batch, with the parameters of `checkpoint` (empty: the initial ones).
Json compare(const nn::TrainingOptions& options, const std::filesystem::path& checkpoint, index step,
             const std::vector<Trial>& methods) {
    const nn::MethodComparison found =
        nn::compare_methods(options, checkpoint, methods[0].evaluation, methods[1].evaluation);
    double gradient = 0;
    Json gradients = Json::object();
    for (const nn::MethodComparison::Difference& difference : found.gradients) {
        gradients[difference.name] = relative(difference);
        gradient = std::max(gradient, relative(difference));
    }
    return {{"step", step},
            {"status", to_string(found.second_forward.status)},
            {"iterations", found.second_forward.iterations},
            {"logits_difference", relative(found.logits)},
            {"gradient_difference", gradient},
            {"gradient_differences", gradients}};
}

/// resnet: the experiment's JSON, with its tolerances.
bool agrees(const Json& comparison, const Json& resnet) {
    return number(comparison["logits_difference"]) <= number(resnet["logits_tolerance"]) &&
           number(comparison["gradient_difference"]) <= number(resnet["gradient_tolerance"]);
}

std::vector<double> list(const Json& training, const char* name) {
    std::vector<double> values;
    if (training.contains(name))
        for (const Json& value : training[name]) values.push_back(number(value));
    return values;
}

/// One of the two trainings; null where it was not reached.
const Json* training_of(const Json& resnet, const char* name) {
    return resnet["training"].contains(name) ? &resnet["training"][name] : nullptr;
}

/// |sequential - DeepPCR| of each step's loss.
std::vector<double> loss_differences(const Json& resnet) {
    const Json *sequential = training_of(resnet, "sequential"), *deeppcr = training_of(resnet, "deeppcr");
    if (sequential == nullptr || deeppcr == nullptr) return {};
    std::vector<double> first = list(*sequential, "loss"), second = list(*deeppcr, "loss");
    first.resize(std::min(first.size(), second.size()));
    for (std::size_t i = 0; i < first.size(); ++i) first[i] = std::abs(first[i] - second[i]);
    return first;
}

using Steps = std::vector<double>;
double mean(const Steps& steps) { return std::accumulate(steps.begin(), steps.end(), 0.0) / double(steps.size()); }
double largest(const Steps& steps) { return *std::max_element(steps.begin(), steps.end()); }
double median(const Steps& steps) { return quartiles(steps).median; }

/// How many steps a plot draws as one point, so that it does not become a blur.
index steps_per_point(const Json& resnet) {
    constexpr index most_points = 200;
    const Json* sequential = training_of(resnet, "sequential");
    const index steps = sequential != nullptr ? index(list(*sequential, "loss").size()) : 0;
    return std::max<index>(1, (steps + most_points - 1) / most_points);
}

std::string point_text(const Json& resnet, const std::string& summary) {
    const index group = steps_per_point(resnet);
    return group == 1 ? "" : " Each point is the " + summary + " of " + count_text(group) + " steps.";
}

Series over_steps(const Json& resnet, const std::string& name, const Steps& values, double (*summary)(const Steps&)) {
    Series series{.name = name, .x = {}, .y = {}};
    const auto group = std::size_t(steps_per_point(resnet));
    for (std::size_t first = 0; first < values.size(); first += group) {
        const std::size_t last = std::min(first + group, values.size());
        series.x.push_back(double(first + 1 + last) / 2);
        series.y.push_back(
            summary(Steps(values.begin() + std::ptrdiff_t(first), values.begin() + std::ptrdiff_t(last))));
    }
    return series;
}

const Axis step_axis{.label = "training step"};

Plot loss_plot(const Json& resnet) {
    Plot plot{.title = "Training loss",
              .caption =
                  "Cross-entropy of the steps' batches. DeepPCR is drawn thin over the wide line of the sequential "
                  "training: where they lie on each other, both train alike." +
                  point_text(resnet, "mean"),
              .x = step_axis,
              .y = {.label = "loss"},
              .series = {}};
    if (const Json* sequential = training_of(resnet, "sequential")) {
        plot.series.push_back(over_steps(resnet, "sequential", list(*sequential, "loss"), mean));
        plot.series.back().stroke = Series::Stroke::wide;
    }
    if (const Json* deeppcr = training_of(resnet, "deeppcr"))
        plot.series.push_back(over_steps(resnet, "DeepPCR", list(*deeppcr, "loss"), mean));
    return plot;
}

Plot loss_difference_plot(const Json& resnet) {
    Plot plot{.title = "Difference of the two losses",
              .caption =
                  "Rounding and the tolerance of the residual test differ between the methods, and each training "
                  "passes them on from step to step." +
                  point_text(resnet, "largest"),
              .x = step_axis,
              .y = {.label = "|sequential - DeepPCR|", .logarithm = 10},
              .series = {over_steps(resnet, "difference", loss_differences(resnet), largest)}};
    plot.series[0].colour = 3;
    return plot;
}

Plot iterations_plot(const Json& resnet) {
    Plot plot{.title = "Newton iterations per training step",
              .caption =
                  "The slowest sequence of a batch, and the mean over the batch. Each step starts from a prediction "
                  "made of the last step's trajectory." +
                  point_text(resnet, "mean"),
              .x = step_axis,
              .y = {.label = "iterations", .first = 0.0},
              .series = {}};
    if (const Json* deeppcr = training_of(resnet, "deeppcr")) {
        plot.series = {over_steps(resnet, "slowest of the batch", list(*deeppcr, "iterations"), mean),
                       over_steps(resnet, "mean of the batch", list(*deeppcr, "mean_iterations"), mean)};
        plot.series[0].colour = 1;
        plot.series[1].colour = 2;
    }
    return plot;
}

Plot seconds_plot(const Json& resnet) {
    Plot plot{.title = "Time per training step",
              .caption =
                  "The whole step: forward, backward, optimiser. Both trainings ran in this process, one after the "
                  "other." +
                  point_text(resnet, "median"),
              .x = step_axis,
              .y = {.label = "time per step", .unit = Unit::seconds, .logarithm = 10},
              .series = {}};
    if (const Json* sequential = training_of(resnet, "sequential"))
        plot.series.push_back(over_steps(resnet, "sequential, fused", list(*sequential, "seconds"), median));
    if (const Json* deeppcr = training_of(resnet, "deeppcr"))
        plot.series.push_back(over_steps(resnet, "DeepPCR", list(*deeppcr, "seconds"), median));
    return plot;
}

Table resnet_results_table(const Json& resnet) {
    Table table{.title = "Two trainings from the same seed",
                .caption = "Trunk: the residual layers alone.",
                .columns = {{"", false}, {"sequential, fused"}, {"DeepPCR"}, {"DeepPCR is"}},
                .rows = {}};
    const Json *sequential = training_of(resnet, "sequential"), *deeppcr = training_of(resnet, "deeppcr");
    const auto value = [](const Json* entry, const char* name) {
        return entry != nullptr && entry->contains(name) ? number((*entry)[name]) : std::nan("");
    };
    const auto add = [&](const std::string& label, const char* name, const auto& write, bool time) {
        const double first = value(sequential, name), second = value(deeppcr, name), ratio = first / second;
        table.rows.push_back({label,
                              write(first),
                              write(second),
                              {time ? speed_text(ratio) : "", ratio > 1 ? Table::Tone::good : Table::Tone::plain}});
    };
    const auto accuracy = [](double fraction) { return percent_text(fraction, 2); };
    const auto loss = [](double mean) { return number_text(mean, 4); };
    const auto count = [](double steps) { return std::isfinite(steps) ? count_text(index(steps)) : "-"; };
    add("test accuracy", "test_accuracy", accuracy, false);
    add("test loss", "test_loss", loss, false);
    add("training steps", "steps", count, false);
    add("median time per step", "median_seconds", seconds_text, true);
    add("  trunk, forward", "median_forward_seconds", seconds_text, true);
    add("  trunk, backward", "median_backward_seconds", seconds_text, true);
    add("training and test, in all", "total_seconds", seconds_text, true);
    return table;
}

Table comparison_table(const Json& resnet) {
    Table table{.title = "The same parameters, the same batch, both methods",
                .caption =
                    "Largest difference, relative to the largest sequential value of the same tensor; tolerances: "
                    "logits " +
                    scientific_text(number(resnet["logits_tolerance"])) + ", gradients " +
                    scientific_text(number(resnet["gradient_tolerance"])) +
                    ". Newton's method starts without a prediction here.",
                .columns = {{"parameters", false}, {"status", false}, {"Newton iterations"}, {"logits"}, {"gradients"}},
                .rows = {}};
    for (const Json& entry : resnet["same_parameters"]) {
        const auto step = entry["step"].get<index>();
        const auto tone = agrees(entry, resnet) ? Table::Tone::plain : Table::Tone::bad;
        table.rows.push_back({step == 0 ? "initial" : "after " + count_text(step) + " steps",
                              entry["status"].get<std::string>(),
                              count_text(entry["iterations"].get<index>()),
                              {scientific_text(number(entry["logits_difference"])), tone},
                              {scientific_text(number(entry["gradient_difference"])), tone}});
    }
    return table;
}

std::vector<std::string> resnet_verdicts(const Json& resnet) {
    std::vector<std::string> sentences;
    const std::vector<double> differences = loss_differences(resnet);
    if (!differences.empty())
        sentences.push_back("The losses of the two trainings differ by at most " +
                            scientific_text(*std::max_element(differences.begin(), differences.end())) + " in " +
                            count_text(index(differences.size())) + " steps.");
    const Json* deeppcr = training_of(resnet, "deeppcr");
    if (deeppcr == nullptr || list(*deeppcr, "iterations").empty()) return sentences;
    const std::vector<double> iterations = list(*deeppcr, "iterations");
    const Quartiles typical = quartiles(iterations);
    const auto [fewest, most] = std::minmax_element(iterations.begin(), iterations.end());
    std::string sentence = "Newton iterations per training step: median " + number_text(typical.median, 2) + ", " +
                           count_text(index(*fewest)) + " to " + count_text(index(*most)) + ".";
    const Json& status = (*deeppcr)["status"];
    const auto finished = std::count_if(status.begin(), status.end(), [](const Json& s) { return s != "converged"; });
    if (finished > 0)
        sentence += " In " + count_text(finished) + " of " + count_text(index(iterations.size())) +
                    " steps Newton's method did not converge everywhere and the rest was finished sequentially.";
    sentences.push_back(sentence);
    if (resnet["seconds_ratio"].is_number()) {
        const double ratio = resnet["seconds_ratio"].get<double>();
        sentences.push_back("On this machine a training step by DeepPCR is " + speed_text(ratio) +
                            " than one by the fused sequential method" + (ratio < 1 ? ": parallel loses here." : "."));
    }
    return sentences;
}

}  // namespace

void check_resnet_data(const Experiment& experiment) { files::find_fashion_mnist(experiment.data); }

Json run_resnet(const Experiment& experiment) {
    nn::TrainingOptions options = training_options(experiment);
    const std::vector<Trial> methods = trials(options.layers);
    const TemporaryFolder folder;

    Json result{
        {"complete", false},
        {"agreement", nullptr},
        {"network",
         {{"layers", options.layers}, {"width", options.width}, {"skip", options.skip}, {"activation", "tanh"}}},
        {"data", "Fashion-MNIST"},
        {"batch", options.batch},
        {"optimiser", "AdamW"},
        {"learning_rate", options.learning_rate},
        {"warm_up_steps", options.warm_up},
        {"chunk", methods[1].evaluation.chunk},
        {"baseline", "sequential, fused: all layers for a cache-resident group of sequences in one kernel"},
        {"logits_tolerance", experiment.tolerance},
        {"gradient_tolerance", experiment.gradient_tolerance()},
        {"training", Json::object()},
        {"seconds_ratio", nullptr},
        {"same_parameters", Json::array()}};
    const auto add_comparison = [&](const std::filesystem::path& checkpoint, index step) {
        result["same_parameters"].push_back(compare(options, checkpoint, step, methods));
        const bool agree = agrees(result["same_parameters"].back(), result);
        result["agreement"] = agree && (result["agreement"].is_null() || result["agreement"].get<bool>());
    };

    double done = 0;
    if (!experiment.advance(done, "both methods on the initial network")) return result;
    add_comparison({}, 0);
    done += 0.02;
    for (const Trial& method : methods) {
        if (!experiment.advance(done, method.title + ", loading Fashion-MNIST")) return result;
        options.checkpoint = folder.path / (method.name + ".safetensors");
        result["training"][method.name] = run_trial(method, options, experiment, done);
        if (!result["training"][method.name]["complete"].get<bool>()) return result;
        done += method.share;
    }
    const Json& training = result["training"];
    result["seconds_ratio"] =
        training["sequential"]["median_seconds"].get<double>() / training["deeppcr"]["median_seconds"].get<double>();
    if (!experiment.advance(done, "both methods on the trained network")) return result;
    add_comparison(folder.path / "sequential.safetensors", training["sequential"]["steps"].get<index>());
    result["complete"] = true;
    return result;
}

void describe_resnet(const Json& resnet, Page& page) {
    const Json& network = resnet["network"];
    page.heading("Residual network on Fashion-MNIST");
    page.paragraph(
        "A classifier of " + count_text(network["layers"].get<index>()) + " residual layers x_t = x_{t-1} + " +
        "tanh(W_t x_{t-1} + b_t) of width " + count_text(network["width"].get<index>()) +
        " between an encoder (784 -> width) and a decoder (width -> 10), trained twice on the same batches of " +
        count_text(resnet["batch"].get<index>()) + " from the same seed: once layer after layer (fused), once " +
        "by DeepPCR forward and backward: Newton's method with the work-efficient scan, in chunks of " +
        count_text(resnet["chunk"].get<index>()) + " layers. Both use " + resnet["optimiser"].get<std::string>() +
        ", a learning rate of up to " + number_text(number(resnet["learning_rate"]), 1) +
        " (the layers': that divided by their number), a linear start and a cosine to 0. The baseline is " +
        resnet["baseline"].get<std::string>() + ".");
    page.list(resnet_verdicts(resnet));
    page.plots({loss_plot(resnet), loss_difference_plot(resnet), iterations_plot(resnet), seconds_plot(resnet)});
    page.table(resnet_results_table(resnet));
    page.table(comparison_table(resnet));
}

std::string summarise_resnet(const Json& resnet) {
    std::string summary = text(resnet_results_table(resnet)) + "\n" + text(comparison_table(resnet)) + "\n";
    for (const std::string& sentence : resnet_verdicts(resnet)) summary += sentence + "\n";
    return summary;
}

}  // namespace deeppcr::program
