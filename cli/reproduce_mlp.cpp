// Multilayer perceptrons, evaluated and differentiated over their depth (arXiv 2309.16318, section 4.1).
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <span>

#include <deeppcr/deeppcr.hpp>

#include "reproduce.hpp"

namespace deeppcr::program {
namespace {

constexpr index most_iterations = 100;

struct Grid {
    std::vector<index> widths, depths, batches;
    double seconds;  ///< per configuration, once each method has run `least_repetitions` times
    int least_repetitions, most_repetitions;
};

Grid grid(bool quick) {
    if (quick) return {{2, 4}, {32, 64}, {1, 3}, 0.01, 3, 9};
    return {{2, 4, 8, 16}, {256, 512, 1024, 2048, 4096, 8192}, {1, 16}, 1.0, 3, 101};
}

/// A network with its input and the gradient of its loss, a weighted sum of all states: weights and biases are drawn
/// uniformly from +-sqrt(3 / width) (Xavier) and +-1 / sqrt(width), input and loss weights from a normal distribution.
struct Network {
    Network(index width, index depth, index batch, std::uint64_t seed)
        : weights(uniform({depth, width, width}, std::sqrt(3.0 / double(width)), seed)),
          biases(uniform({depth, 1, width}, std::sqrt(1.0 / double(width)), seed + 1)),
          input(Buffer<float>::random({1, batch, width}, seed + 2)),
          output_gradient(Buffer<float>::random({depth, batch, width}, seed + 3)),
          sequences(std::size_t(batch)),
          chain(weights, biases, input, {.activation = Activation::tanh, .skip = 0}) {
        std::iota(sequences.begin(), sequences.end(), index(0));
    }

    Section section() const { return {0, chain.shape().steps, sequences, {}}; }

    Buffer<float> weights, biases, input, output_gradient;
    std::vector<index> sequences;
    DenseChain<float> chain;

private:
    /// Uniform in +-bound: the normal distribution function of normal numbers is uniform.
    static Buffer<float> uniform(const Shape& shape, double bound, std::uint64_t seed) {
        Buffer<float> values = Buffer<float>::random(shape, seed);
        for (index i = 0; i < values.size(); ++i)
            values.data()[i] = float(bound * std::erf(double(values.data()[i]) / std::sqrt(2.0)));
        return values;
    }
};

template <class Call>
double seconds_of(const Call& call) {
    const auto begin = Clock::now();
    call();
    return seconds_since(begin);
}

/// One way of computing a forward and a backward pass, with what it computed last and the seconds that it took.
class Contender {
public:
    Contender(std::string label, const Network& network, const Options& choices)
        : name(std::move(label)), options_(choices), network_(network), states_({shape().steps + 1, batch(), width()}) {
        options_.workspace = &workspace_;
        std::copy_n(network.input.data(), network.input.size(), states_.data());
        if (!sequential()) return;
        slopes_ = Buffer<float>(shape());
        gradients_ = {Buffer<float>(network.weights.shape()),
                      Buffer<float>(network.biases.shape()),
                      Buffer<float>(network.input.shape()),
                      {}};
    }

    bool sequential() const { return options_.method == Method::sequential; }
    /// Whether the last forward pass is right, so that there is something to differentiate.
    bool right() const { return sequential() || report_.status == Status::converged; }

    void forward() {
        const auto call = [&] {
            if (sequential())
                network_.chain.run(network_.section(), network_.input, trajectory());
            else
                report_ = evaluate(network_.chain, trajectory(), options_);
        };
        forward_seconds.push_back(seconds_of(call));
    }

    /// The sequential pass at its best: the slopes come with the forward pass, and nothing is allocated or copied.
    void backward() {
        if (sequential()) network_.chain.run_with_slopes(network_.section(), network_.input, trajectory(), slopes_);
        const auto call = [&] {
            if (sequential())
                network_.chain.run_backward(network_.section(), states_.view().steps(0, shape().steps), slopes_,
                                            network_.output_gradient, gradients_.weights, gradients_.biases, {},
                                            gradients_.initial);
            else
                gradients_ = adjoint(network_.chain, trajectory(), report_, network_.output_gradient.view(), options_);
        };
        backward_seconds.push_back(seconds_of(call));
    }

    View<float> trajectory() const { return states_.view().steps(1, shape().steps + 1); }
    const DenseChainGradients<float>& gradients() const { return gradients_; }
    const Report& report() const { return report_; }

    std::string name;
    std::vector<double> forward_seconds, backward_seconds;

private:
    const Shape& shape() const { return network_.chain.shape(); }
    index batch() const { return shape().batch; }
    index width() const { return shape().width; }

    Workspace workspace_;
    Options options_;
    const Network& network_;
    Buffer<float> states_, slopes_;  // states_: x_0 .. x_T
    DenseChainGradients<float> gradients_;
    Report report_;
};

/// How long a configuration takes beyond a second, roughly: products of Jacobians decide.
double weight(index width, index depth, index batch) {
    return 1 + 1e-9 * double(depth * batch) * std::pow(double(width), 3) * std::log2(double(depth));
}

/// Medians, quartiles, ratios and differences. contenders[0] is the baseline.
Json to_json(const std::vector<Contender>& contenders) {
    const Contender& baseline = contenders[0];
    Json result = Json::object();
    for (const Contender& contender : contenders) {
        Json& entry = result[contender.name];
        entry = Json::object();
        if (!contender.sequential()) {
            entry["status"] = to_string(contender.report().status);
            entry["iterations"] = contender.report().iterations;
        }
        if (!contender.right()) continue;
        const auto add_seconds = [&](const std::string& pass, const std::vector<double>& sample) {
            const Quartiles found = quartiles(sample);
            entry[pass + "_seconds"] = found.median;
            entry[pass + "_quartiles"] = {found.first, found.third};
            if (!contender.sequential())
                entry[pass + "_ratio"] = number(result[baseline.name][pass + "_seconds"]) / found.median;
        };
        add_seconds("forward", contender.forward_seconds);
        add_seconds("backward", contender.backward_seconds);
        if (contender.sequential()) continue;
        const auto gradient_difference = [&](const Buffer<float> DenseChainGradients<float>::*part) {
            return largest_difference<float>(contender.gradients().*part, baseline.gradients().*part);
        };
        entry["state_difference"] = largest_difference<float>(contender.trajectory(), baseline.trajectory());
        entry["gradient_difference"] = std::max({gradient_difference(&DenseChainGradients<float>::weights),
                                                 gradient_difference(&DenseChainGradients<float>::biases),
                                                 gradient_difference(&DenseChainGradients<float>::initial)});
    }
    return result;
}

/// One configuration. going_on is told how much of it is done; null where it says no.
Json measure(index width, index depth, index batch, const Grid& sizes, std::uint64_t seed,
             const std::function<bool(double done)>& going_on) {
    const Network network(width, depth, batch, seed);
    const Options newton{.method = Method::newton,
                         .max_iterations = most_iterations,
                         .on_failure = OnFailure::report,
                         .estimates = Estimates::none};
    Options pcr = newton, scan = newton;
    pcr.reduction = Reduction::pcr;
    scan.reduction = Reduction::scan;
    std::vector<Contender> contenders;
    contenders.reserve(3);  // their options point to their workspaces
    contenders.emplace_back("sequential", network, Options{.method = Method::sequential});
    contenders.emplace_back("pcr", network, pcr);
    contenders.emplace_back("scan", network, scan);

    // The first pass of each warms up and is not timed.
    for (Contender& contender : contenders) {
        if (!going_on(0)) return {};
        contender.forward();
        if (contender.right()) contender.backward();
        contender.forward_seconds.clear();
        contender.backward_seconds.clear();
    }

    // Interleaved, so that whatever else the machine does meets all of them alike.
    const auto begin = Clock::now();
    int repetitions = 0;
    for (bool enough = false; !enough; ++repetitions) {
        for (Contender& contender : contenders) {
            if (!contender.right()) continue;
            contender.forward();
            contender.backward();
        }
        const double seconds = seconds_since(begin);
        const int measured = repetitions + 1;
        if (!going_on(std::min(1.0, std::max(seconds / sizes.seconds, double(measured) / sizes.most_repetitions))))
            return {};
        enough =
            measured >= sizes.most_repetitions || (measured >= sizes.least_repetitions && seconds >= sizes.seconds);
    }

    Json result{{"width", width}, {"depth", depth}, {"batch", batch}, {"repetitions", repetitions}};
    result.update(to_json(contenders));
    return result;
}

/// Whether a parallel method that converged also agrees. Not finite: no.
bool agrees(const Json& method, const Experiment& experiment) {
    return !method.contains("state_difference") ||
           (number(method["state_difference"]) <= experiment.tolerance &&
            number(method["gradient_difference"]) <= experiment.gradient_tolerance());
}

double measured(const Json& configuration, const char* method, const std::string& field) {
    const Json& entry = configuration[method];
    return entry.contains(field) ? number(entry[field]) : std::nan("");
}

/// The better of the two parallel methods; NaN where neither converged.
double best_ratio(const Json& configuration, const std::string& pass) {
    return std::fmax(measured(configuration, "pcr", pass + "_ratio"), measured(configuration, "scan", pass + "_ratio"));
}

Table::Tone tone(double ratio) { return ratio > 1 ? Table::Tone::good : Table::Tone::plain; }

/// Values of one width, batch and method as a line over depth.
template <class Value>
Series over_depth(const Json& mlp, index width, index batch, const std::string& name, const Value& value) {
    Series series{.name = name, .x = {}, .y = {}};
    for (const Json& configuration : mlp["configurations"])
        if (configuration["width"] == width && configuration["batch"] == batch) {
            series.x.push_back(configuration["depth"].get<double>());
            series.y.push_back(value(configuration));
        }
    return series;
}

std::vector<index> measured_values(const Json& mlp, const char* field) {
    std::vector<index> values;
    for (const Json& configuration : mlp["configurations"]) values.push_back(configuration[field].get<index>());
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    return values;
}

const Axis depth_axis{.label = "depth (layers)", .logarithm = 2};

Plot ratio_plot(const Json& mlp, index batch, const std::string& pass) {
    Plot plot{.title = (pass == "forward" ? "Forward" : "Backward") + std::string(" pass, batch ") + count_text(batch) +
                       ": sequential / parallel",
              .caption =
                  "The faster of Newton + PCR and Newton + scan against the fused sequential pass. "
                  "Above the dotted line parallel is faster, below it is slower.",
              .x = depth_axis,
              .y = {.label = "ratio of median seconds", .logarithm = 10},
              .series = {},
              .reference = 1.0,
              .reference_label = "equally fast"};
    for (const index width : measured_values(mlp, "width"))
        plot.series.push_back(over_depth(mlp, width, batch, "width " + count_text(width),
                                         [&](const Json& entry) { return best_ratio(entry, pass); }));
    return plot;
}

Plot seconds_plot(const Json& mlp, index width, index batch, const std::string& pass) {
    Plot plot{.title = (pass == "forward" ? "Forward" : "Backward") + std::string(" pass, width ") + count_text(width) +
                       ", batch " + count_text(batch) + ": seconds",
              .caption = {},
              .x = depth_axis,
              .y = {.label = "median time per pass", .unit = Unit::seconds, .logarithm = 10},
              .series = {}};
    const std::map<std::string, std::string> names{
        {"sequential", "sequential, fused"}, {"pcr", "Newton + PCR"}, {"scan", "Newton + scan"}};
    for (const char* method : {"sequential", "pcr", "scan"})
        plot.series.push_back(over_depth(
            mlp, width, batch,
            pass == "backward" && method != std::string("sequential") ? (method == std::string("pcr") ? "PCR" : "scan")
                                                                      : names.at(method),
            [&](const Json& entry) { return measured(entry, method, pass + "_seconds"); }));
    return plot;
}

Plot iterations_plot(const Json& mlp) {
    const index batch = measured_values(mlp, "batch").back();
    Plot plot{.title = "Newton iterations until the residual test passes, batch " + count_text(batch),
              .caption =
                  "The slowest sequence of the batch decides. Each iteration solves one bidiagonal system for all "
                  "layers at once; layer by layer there are as many dependent steps as layers.",
              .x = depth_axis,
              .y = {.label = "iterations", .first = 0.0},
              .series = {}};
    for (const index width : measured_values(mlp, "width"))
        plot.series.push_back(over_depth(mlp, width, batch, "width " + count_text(width),
                                         [](const Json& entry) { return measured(entry, "scan", "iterations"); }));
    return plot;
}

/// The largest differences over everything else, by depth.
Plot difference_plot(const Json& mlp) {
    Plot plot{.title = "Largest difference from sequential",
              .caption = "Over all widths and batches, Newton + PCR and Newton + scan. Above a tolerance (" +
                         scientific_text(number(mlp["state_tolerance"])) + " for states, " +
                         scientific_text(number(mlp["gradient_tolerance"])) + " for gradients) the command fails.",
              .x = depth_axis,
              .y = {.label = "relative difference", .logarithm = 10},
              .series = {}};
    for (const char* quantity : {"state", "gradient"}) {
        std::map<double, double> largest;
        for (const Json& entry : mlp["configurations"])
            for (const char* method : {"pcr", "scan"}) {
                double& value = largest[entry["depth"].get<double>()];
                value = std::fmax(value, measured(entry, method, std::string(quantity) + "_difference"));
            }
        Series series{.name = quantity == std::string("state") ? "states" : "gradients", .x = {}, .y = {}};
        for (const auto& [depth, difference] : largest) {
            series.x.push_back(depth);
            series.y.push_back(difference);
        }
        plot.series.push_back(series);
    }
    return plot;
}

/// Everything measured with one batch.
Table measurements(const Json& mlp, index batch) {
    Table table{
        .title = "All measurements, batch " + count_text(batch),
        .caption =
            "Against sequential: the ratio of the median seconds beside it and of the fused sequential pass. Where "
            "Newton's method did not converge, its status stands in place of its numbers.",
        .columns = {{"width"},
                    {"depth"},
                    {"method", false},
                    {"iterations"},
                    {"forward"},
                    {"against sequential"},
                    {"backward"},
                    {"against sequential"},
                    {"states differ by"},
                    {"gradients differ by"},
                    {"runs"}},
        .rows = {}};
    for (const Json& entry : mlp["configurations"]) {
        if (entry["batch"] != batch) continue;
        const auto add = [&](const char* method, const std::string& name) {
            const auto value = [&](const char* field) { return measured(entry, method, field); };
            const bool parallel = entry[method].contains("status"), right = entry[method].contains("forward_seconds");
            const double forward = value("forward_ratio"), backward = value("backward_ratio");
            const auto once = [&](const char* field) { return parallel ? "" : count_text(entry[field].get<index>()); };
            table.rows.push_back(
                {once("width"),
                 once("depth"),
                 name,
                 parallel ? count_text(entry[method]["iterations"].get<index>()) : "",
                 right ? seconds_text(value("forward_seconds")) : entry[method]["status"].get<std::string>(),
                 {parallel ? speed_text(forward) : "", tone(forward)},
                 seconds_text(value("backward_seconds")),
                 {parallel ? speed_text(backward) : "", tone(backward)},
                 parallel ? scientific_text(value("state_difference")) : "",
                 parallel ? scientific_text(value("gradient_difference")) : "",
                 once("repetitions")});
        };
        add("sequential", "sequential");
        add("pcr", "Newton + PCR");
        add("scan", "Newton + scan");
    }
    return table;
}

/// Width x depth: the better parallel method's ratio.
Table ratios(const Json& mlp, index batch, const std::string& pass) {
    const std::vector<index> depths = measured_values(mlp, "depth");
    Table table{.title = "MLP " + pass + " pass, batch " + count_text(batch) +
                         ": parallel (the better of Newton + PCR and Newton + scan) against fused sequential",
                .caption = {},
                .columns = {{"width \\ depth"}},
                .rows = {}};
    for (const index depth : depths) table.columns.push_back({count_text(depth)});
    for (const index width : measured_values(mlp, "width")) {
        std::vector<Table::Cell> row{count_text(width)};
        row.resize(depths.size() + 1, Table::Cell(""));
        for (const Json& entry : mlp["configurations"])
            if (entry["width"] == width && entry["batch"] == batch) {
                const auto column = std::find(depths.begin(), depths.end(), entry["depth"].get<index>());
                const double ratio = best_ratio(entry, pass);
                row[std::size_t(column - depths.begin()) + 1] =
                    std::isfinite(ratio) ? speed_text(ratio) : entry["scan"]["status"].get<std::string>();
            }
        table.rows.push_back(row);
    }
    return table;
}

/// What the measurements say, in sentences.
std::vector<std::string> mlp_verdicts(const Json& mlp) {
    index configurations = 0, unconverged = 0;
    double state = 0, gradient = 0, fewest = INFINITY, most = 0;
    for (const Json& entry : mlp["configurations"]) {
        ++configurations;
        for (const char* method : {"pcr", "scan"}) {
            if (entry[method]["status"] != "converged") {
                ++unconverged;
                continue;
            }
            state = std::fmax(state, measured(entry, method, "state_difference"));
            gradient = std::fmax(gradient, measured(entry, method, "gradient_difference"));
            fewest = std::fmin(fewest, measured(entry, method, "iterations"));
            most = std::fmax(most, measured(entry, method, "iterations"));
        }
    }
    if (configurations == 0) return {"Nothing was measured."};
    std::vector<std::string> sentences{"Largest relative difference from sequential: states " + scientific_text(state) +
                                       " (tolerance " + scientific_text(number(mlp["state_tolerance"])) +
                                       "), gradients " + scientific_text(gradient) + " (tolerance " +
                                       scientific_text(number(mlp["gradient_tolerance"])) + ")."};
    if (most > 0)
        sentences.push_back("Newton iterations: " + count_text(index(fewest)) + " to " + count_text(index(most)) + ".");
    if (unconverged > 0)
        sentences.push_back(count_text(unconverged) + " of " + count_text(2 * configurations) +
                            " evaluations by Newton's method did not converge within " + count_text(most_iterations) +
                            " iterations.");
    for (const char* pass : {"forward", "backward"}) {
        index faster = 0;
        const Json *best = nullptr, *worst = nullptr;
        for (const Json& entry : mlp["configurations"]) {
            const double ratio = best_ratio(entry, pass);
            if (!std::isfinite(ratio)) continue;
            if (ratio > 1) ++faster;
            if (best == nullptr || ratio > best_ratio(*best, pass)) best = &entry;
            if (worst == nullptr || ratio < best_ratio(*worst, pass)) worst = &entry;
        }
        if (best == nullptr) continue;
        const auto place = [&](const Json& entry) {
            return speed_text(best_ratio(entry, pass)) + " (width " + count_text(entry["width"].get<index>()) +
                   ", depth " + count_text(entry["depth"].get<index>()) + ", batch " +
                   count_text(entry["batch"].get<index>()) + ")";
        };
        sentences.push_back(std::string(pass == std::string("forward") ? "Forward" : "Backward") +
                            " pass: parallel is faster than fused sequential in " + count_text(faster) + " of " +
                            count_text(configurations) + " configurations on this machine; it is " + place(*best) +
                            " at best and " + place(*worst) + " at worst.");
    }
    return sentences;
}

}  // namespace

Json run_mlp(const Experiment& experiment) {
    const Grid sizes = grid(experiment.quick);
    Json configurations = Json::array();
    bool agreement = true, complete = true;
    double total = 0, done = 0;
    const auto each = [&](const auto& visit) {
        for (const index batch : sizes.batches)
            for (const index width : sizes.widths)
                for (const index depth : sizes.depths) visit(width, depth, batch);
    };
    each([&](index width, index depth, index batch) { total += weight(width, depth, batch); });
    each([&](index width, index depth, index batch) {
        if (!complete) return;
        const auto going_on = [&](double part) {
            return experiment.advance(
                (done + part * weight(width, depth, batch)) / total,
                "batch " + count_text(batch) + ", width " + count_text(width) + ", depth " + count_text(depth));
        };
        Json configuration = measure(width, depth, batch, sizes, experiment.seed, going_on);
        complete = !configuration.is_null();
        if (!complete) return;
        agreement = agreement && agrees(configuration["pcr"], experiment) && agrees(configuration["scan"], experiment);
        configurations.push_back(std::move(configuration));
        done += weight(width, depth, batch);
    });
    return {{"complete", complete},
            {"agreement", configurations.empty() ? Json() : Json(agreement)},
            {"precision", "float"},
            {"activation", "tanh"},
            {"weights", "Xavier uniform"},
            {"biases", "uniform in +-1/sqrt(width)"},
            {"baseline",
             "sequential, fused: DenseChain::run forward, DenseChain::run_backward with the forward pass' "
             "slopes backward"},
            {"state_tolerance", experiment.tolerance},
            {"gradient_tolerance", experiment.gradient_tolerance()},
            {"max_iterations", most_iterations},
            {"configurations", configurations}};
}

void describe_mlp(const Json& mlp, Page& page) {
    page.heading("Multilayer perceptrons: width × depth");
    page.paragraph(
        "Every layer is x_t = tanh(W_t x_{t-1} + b_t), in float, with Xavier weights. The forward pass computes the "
        "whole trajectory x_1 .. x_T; the backward pass computes the gradients of all weights, biases and the input, "
        "for a loss that is a random linear function of all states. Baseline: " +
        mlp["baseline"].get<std::string>() +
        ". Newton's method tests its residual at every layer, and its backward "
        "pass is one transposed solve with the Jacobians at its own trajectory.");
    page.paragraph(
        "Times are medians of interleaved repetitions in this one run, after a pass to warm up. Differences are the "
        "largest over the trajectory or over all weights and biases, relative to the largest value there.");
    page.list(mlp_verdicts(mlp));
    if (mlp["configurations"].empty()) return;

    const std::vector<index> widths = measured_values(mlp, "width");
    for (const index batch : measured_values(mlp, "batch")) {
        page.plots({ratio_plot(mlp, batch, "forward"), ratio_plot(mlp, batch, "backward"),
                    seconds_plot(mlp, widths.back(), batch, "forward"),
                    seconds_plot(mlp, widths.back(), batch, "backward")});
    }
    page.plots({iterations_plot(mlp), difference_plot(mlp)});
    for (const index batch : measured_values(mlp, "batch")) page.table(measurements(mlp, batch));
}

std::string summarise_mlp(const Json& mlp) {
    std::string summary;
    for (const index batch : measured_values(mlp, "batch"))
        for (const char* pass : {"forward", "backward"}) summary += text(ratios(mlp, batch, pass)) + "\n";
    for (const std::string& sentence : mlp_verdicts(mlp)) summary += sentence + "\n";
    return summary;
}

}  // namespace deeppcr::program
