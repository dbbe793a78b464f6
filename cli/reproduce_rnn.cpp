// Recurrent cells over time: one long sequence, a map of sizes, weights after training, and how right the results are.
#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>

#include <deeppcr/deeppcr.hpp>
#include <deeppcr/nn/trained_cell.hpp>

#include "reproduce.hpp"

namespace deeppcr::program {
namespace {

constexpr double evaluation_tolerance = 1e-5;
constexpr double accuracy_tolerance = 1e-6;  // 8 machine epsilons: less is in reach of a step's rounding
constexpr double good_error = 2e-6;
constexpr double good_choice = 0.95;  // of the fastest method's speed
constexpr index most_iterations = 32;
constexpr double initial_deviation = 0.5;

struct Sizes {
    std::vector<index> steps, channels;
    index most_elements;
    double seconds;         ///< per configuration, once each method has run `least_repetitions` times
    int least_repetitions;  ///< of which a method slower than all `seconds` together runs `slow_repetitions`
    int slow_repetitions, most_repetitions;
    index accuracy_steps, accuracy_channels;
};

std::vector<index> powers_of_4(index first, index last) {
    std::vector<index> powers;
    for (index power = first; power <= last; power *= 4) powers.push_back(power);
    return powers;
}

Sizes sizes(bool quick) {
    if (quick) return {powers_of_4(64, 1024), powers_of_4(1, 4), 2048, 0.005, 3, 3, 9, 64, 8};
    return {powers_of_4(64, index(1) << 20), powers_of_4(1, 4096), index(4) << 20, 0.4, 7, 3, 1001, 2048, 256};
}

nn::TrainedCellOptions training_options(const Experiment& experiment) {
    nn::TrainedCellOptions options;
    options.seed = experiment.seed;
    if (experiment.quick) {
        options.channels = 4;
        options.steps = 64;
        options.updates = 60;
    }
    return options;
}

template <class T>
using Recurrences = std::unique_ptr<ChannelwiseRecurrence<T>>(View<const T> inputs, View<const T> parameters);

template <class C, class T>
std::unique_ptr<ChannelwiseRecurrence<T>> recurrence_of(View<const T> inputs, View<const T> parameters) {
    return std::make_unique<CellRecurrence<C, T>>(inputs, parameters);
}

struct CellType {
    const char* name;
    nn::CellKind kind;
    index inputs, parameters;
    Recurrences<float>* in_float;
    Recurrences<double>* in_double;
};

template <class C>
CellType cell_type(nn::CellKind kind) {
    return {C::name, kind, C::inputs, C::parameters, recurrence_of<C, float>, recurrence_of<C, double>};
}

/// The first two are the ones that are trained and mapped.
const std::vector<CellType>& cell_types() {
    static const std::vector<CellType> all{
        cell_type<ParaGRU>(nn::CellKind::para_gru), cell_type<ParaLSTM>(nn::CellKind::para_lstm),
        cell_type<DiagonalElman>(nn::CellKind::diagonal_elman), cell_type<SLSTM>(nn::CellKind::slstm)};
    return all;
}
constexpr std::size_t examined_cells = 2;

/// A recurrence with the arrays that it looks at.
struct Problem {
    Problem(const CellType& type, Buffer<float> u, Buffer<float> p)
        : inputs(std::move(u)), parameters(std::move(p)), recurrence(type.in_float(inputs, parameters)) {}

    Buffer<float> inputs, parameters;
    std::unique_ptr<ChannelwiseRecurrence<float>> recurrence;
};

/// Gates' inputs N(0, 1), recurrent coefficients N(0, deviation^2).
Problem random_problem(const CellType& cell, index steps, index channels, double deviation, std::uint64_t seed) {
    Buffer<float> parameters = Buffer<float>::random({cell.parameters, 1, channels}, seed + 1);
    for (index i = 0; i < parameters.size(); ++i) parameters.data()[i] *= float(deviation);
    return {cell, Buffer<float>::random({steps, 1, cell.inputs * channels}, seed), std::move(parameters)};
}

/// One channel of a trained layer, whose input is N(0, 1).
Problem trained_problem(const CellType& cell, const nn::TrainedCell& layer, index channel, index steps,
                        std::uint64_t seed) {
    const Buffer<float> noise = Buffer<float>::random({steps, 1, 1}, seed);
    Buffer<float> inputs({steps, 1, cell.inputs}), parameters({cell.parameters, 1, 1});
    for (index t = 0; t < steps; ++t)
        for (index g = 0; g < cell.inputs; ++g)
            inputs(t, 0, g) = layer.weights(g, 0, channel) * noise(t, 0, 0) + layer.biases(g, 0, channel);
    for (index q = 0; q < cell.parameters; ++q) parameters(q, 0, 0) = layer.parameters(q, 0, channel);
    return {cell, std::move(inputs), std::move(parameters)};
}

double lyapunov_exponent(const Problem& problem) {
    return evaluate(*problem.recurrence, {.method = Method::sequential, .estimates = Estimates::full}).report.lyapunov;
}

/// How much of the experiment is done, in seconds as they were on one machine: only their proportions count.
class Course {
public:
    Course(const Experiment& experiment, double total) : experiment_(experiment), total_(total) {}

    /// What comes takes so long.
    void begin(double seconds, std::string what) {
        done_ += current_;
        current_ = seconds;
        what_ = std::move(what);
    }
    bool going_on(double part = 0) const {
        return experiment_.advance(std::min(1.0, (done_ + current_ * part) / total_), what_);
    }

private:
    const Experiment& experiment_;
    double total_, done_ = 0, current_ = 0;
    std::string what_;
};

/// One method, with what it did and how long it took.
struct Contender {
    Contender(std::string label, const Options& choices) : name(std::move(label)), options(choices) {
        options.workspace = &workspace;
    }
    Contender(const Contender&) = delete;
    Contender& operator=(const Contender&) = delete;

    std::string name;
    Options options;
    Workspace workspace;
    std::vector<double> seconds;
    double total_seconds = 0;
    Report report;
    double difference = 0;
};

Options options_of(Method method) {
    Options options{.method = method, .tolerance = evaluation_tolerance, .estimates = Estimates::none};
    if (method == Method::newton) {
        options.reduction = Reduction::scan;
        options.max_iterations = most_iterations;
        options.on_failure = OnFailure::report;
    }
    return options;
}

/// Every method on one problem, sequential first; null where it is to stop.
Json measure(const Problem& problem, const std::vector<Method>& methods, const Sizes& sizes, const Course& course) {
    const ChannelwiseRecurrence<float>& recurrence = *problem.recurrence;
    const Buffer<float> trajectory(recurrence.shape());
    const Evaluation<float> expected = evaluate(recurrence, options_of(Method::sequential));
    std::deque<Contender> contenders;  // they stay where they are
    for (const Method method : methods) contenders.emplace_back(to_string(method), options_of(method));

    const auto run = [&](Contender& contender) {
        contender.report = evaluate(recurrence, trajectory.view(), contender.options);
    };
    // Before and after what is timed: the first time warms up, the last sees what earlier evaluations have led to.
    const auto verify = [&] {
        for (Contender& contender : contenders) {
            if (!contender.report.ok()) continue;
            contender.options.progress = [&](index, index, index) { return course.going_on(); };
            run(contender);
            contender.options.progress = {};
            if (!course.going_on()) return false;
            if (contender.report.ok())
                contender.difference = std::max(
                    contender.difference, largest_difference<float>(trajectory.view(), expected.trajectory.view()));
        }
        return true;
    };
    if (!verify()) return {};
    // Interleaved, each turn from another one on, so that what else the machine does, and what the one before has left
    // in its caches, meets all of them alike.
    const auto begin = Clock::now();
    int repetitions = 0;
    for (bool enough = false; !enough; ++repetitions) {
        for (std::size_t turn = 0; turn < contenders.size(); ++turn) {
            Contender& contender = contenders[(turn + std::size_t(repetitions)) % contenders.size()];
            const bool too_slow = contender.total_seconds > sizes.seconds && repetitions >= sizes.slow_repetitions;
            if (!contender.report.ok() || too_slow) continue;
            const auto start = Clock::now();
            run(contender);
            contender.seconds.push_back(seconds_since(start));
            contender.total_seconds += contender.seconds.back();
        }
        const double seconds = seconds_since(begin);
        const int measured = repetitions + 1;
        if (!course.going_on(std::max(seconds / sizes.seconds, double(measured) / sizes.most_repetitions))) return {};
        enough =
            measured >= sizes.most_repetitions || (measured >= sizes.least_repetitions && seconds >= sizes.seconds);
    }
    if (!verify()) return {};

    Json found = Json::object();
    for (const Contender& contender : contenders) {
        Json& entry = found[contender.name];
        entry = {{"method", contender.report.method},
                 {"status", to_string(contender.report.status)},
                 {"iterations", contender.report.iterations}};
        if (!contender.report.ok()) continue;
        const Quartiles seconds = quartiles(contender.seconds);
        entry["seconds"] = seconds.median;
        entry["quartiles"] = {seconds.first, seconds.third};
        entry["runs"] = contender.seconds.size();
        if (&contender == &contenders.front()) continue;
        entry["ratio"] = number(found[contenders.front().name]["seconds"]) / seconds.median;
        entry["difference"] = contender.difference;
    }
    return {{"repetitions", repetitions}, {"methods", found}};
}

/// A number of a method's entry; NaN where the method has none.
double measured(const Json& configuration, const std::string& method, const char* field) {
    const Json& methods = configuration["methods"];
    return methods.contains(method) && methods[method].contains(field) ? number(methods[method][field]) : std::nan("");
}

const std::vector<std::string> parallel_methods{"overlap", "shooting", "newton"};

/// The fastest of the parallel methods that were asked for by name; empty where none has an end.
std::string best_parallel(const Json& configuration) {
    std::string best;
    for (const std::string& method : parallel_methods)
        if (const double ratio = measured(configuration, method, "ratio");
            std::isfinite(ratio) && (best.empty() || ratio > measured(configuration, best, "ratio")))
            best = method;
    return best;
}

/// The fastest of the parallel methods the middle half of whose times is below that of sequential's; else "sequential".
std::string winner(const Json& configuration) {
    const Json& methods = configuration["methods"];
    std::string fastest = "sequential";
    for (const std::string& method : parallel_methods)
        if (measured(configuration, method, "seconds") < measured(configuration, fastest, "seconds") &&
            number(methods[method]["quartiles"][1]) < number(methods["sequential"]["quartiles"][0]))
            fastest = method;
    return fastest;
}

double best_ratio(const Json& configuration) { return measured(configuration, best_parallel(configuration), "ratio"); }

double worst_difference(const Json& configuration) {
    double largest = 0;
    for (const auto& [name, method] : configuration["methods"].items())
        if (method.contains("difference")) {
            const double difference = number(method["difference"]);
            largest = std::isnan(difference) ? INFINITY : std::max(largest, difference);
        }
    return largest;
}

bool contractive(const Json& configuration) { return !(number(configuration["lyapunov"]) >= 0); }

/// The largest difference that residuals within the tolerance explain: each is carried along, and shrinks by
/// exp(exponent) per step; or the experiment's own tolerance where that is more. Twice the sum, as the exponent is a
/// mean. Where neighbouring trajectories part, two sequential evaluations differ without bound.
double allowed_difference(const Json& configuration, double tolerance) {
    if (!contractive(configuration)) return INFINITY;
    const double exponent = number(configuration["lyapunov"]);
    if (std::isnan(exponent)) return tolerance;
    return std::max(tolerance, -2 * evaluation_tolerance / std::expm1(exponent));
}
bool agrees(const Json& configuration, double tolerance) {
    return worst_difference(configuration) <= allowed_difference(configuration, tolerance);
}

// --- what is measured

struct Trained {
    nn::TrainedCell layer;
    index channel = 0;  ///< the one that forgets most slowly
};

/// Null where it is to stop; with a "failure" where the training did not succeed.
Json train(const CellType& cell, const Experiment& experiment, const Course& course, Trained& trained) {
    nn::TrainedCellOptions options = training_options(experiment);
    options.progress = [&](double done) { return course.going_on(done); };
    Json result{{"cell", cell.name},      {"channels", options.channels}, {"steps", options.steps},
                {"batch", options.batch}, {"updates", options.updates},   {"time_constant", options.time_constant},
                {"delay", options.delay}};
    try {
        trained.layer = nn::train_cell(cell.kind, options);
    } catch (const NotConverged& error) {
        result["failure"] = error.what();
        return result;
    }
    if (trained.layer.interrupted) return {};
    std::vector<double> exponents;
    for (index channel = 0; channel < options.channels; ++channel)
        exponents.push_back(
            lyapunov_exponent(trained_problem(cell, trained.layer, channel, 4096, experiment.seed + 7)));
    trained.channel = std::max_element(exponents.begin(), exponents.end()) - exponents.begin();
    result.update(Json{{"first_loss", trained.layer.first_loss},
                       {"last_loss", trained.layer.last_loss},
                       {"channel", trained.channel},
                       {"lyapunov", exponents}});
    return result;
}

Json measure_single(const std::string& cell, const std::string& weights, const Problem& problem, const Sizes& sizes,
                    const Course& course) {
    Json found =
        measure(problem, {Method::sequential, Method::overlap, Method::shooting, Method::newton, Method::automatic},
                sizes, course);
    if (found.is_null()) return {};
    Json result{{"cell", cell},
                {"weights", weights},
                {"steps", problem.recurrence->shape().steps},
                {"lyapunov", lyapunov_exponent(problem)}};
    result.update(found);
    return result;
}

Json measure_point(const CellType& cell, const Problem& problem, const Sizes& sizes, double tolerance,
                   const Course& course) {
    Json found =
        measure(problem, {Method::sequential, Method::overlap, Method::shooting, Method::automatic}, sizes, course);
    if (found.is_null()) return {};
    Json result{{"cell", cell.name},
                {"steps", problem.recurrence->shape().steps},
                {"channels", problem.recurrence->channels()},
                {"lyapunov", nullptr}};
    result.update(found);
    result["winner"] = winner(result);
    result["best_ratio"] = best_ratio(result);
    result["best_over_automatic"] =
        std::fmin(measured(result, "sequential", "seconds"), measured(result, best_parallel(result), "seconds")) /
        measured(result, "automatic", "seconds");
    // Costs more than the evaluations where there are many channels, and is asked for only where it decides something.
    if (worst_difference(result) > tolerance) result["lyapunov"] = lyapunov_exponent(problem);
    return result;
}

/// Errors against the same recurrence in double, step after step; false where it is to stop.
bool measure_accuracy(const CellType& cell, double variance, const Sizes& sizes, std::uint64_t seed,
                      const Course& course, Json& rows) {
    const Problem problem =
        random_problem(cell, sizes.accuracy_steps, sizes.accuracy_channels, std::sqrt(variance), seed);
    const auto in_double = [](const Buffer<float>& values) {
        Buffer<double> result(values.shape());
        std::copy_n(values.data(), values.size(), result.data());
        return result;
    };
    const Buffer<double> inputs = in_double(problem.inputs), parameters = in_double(problem.parameters);
    const auto exact = evaluate(*cell.in_double(inputs, parameters), {.method = Method::sequential}).trajectory;
    double size = 0;
    for (index i = 0; i < exact.size(); ++i) size = std::max(size, std::abs(exact.data()[i]));
    const std::vector<Method> methods{Method::sequential, Method::overlap, Method::shooting, Method::newton,
                                      Method::automatic};
    for (std::size_t m = 0; m < methods.size(); ++m) {
        const double done = double(m) / double(methods.size());
        const auto [trajectory, report] =
            evaluate(*problem.recurrence, {.method = methods[m],
                                           .tolerance = accuracy_tolerance,
                                           .estimates = Estimates::full,
                                           .progress = [&](index, index, index) { return course.going_on(done); }});
        if (!course.going_on(done)) return false;
        const double error = largest_difference<double>(trajectory.view(), exact.view()),
                     estimate = report.error / size;
        rows.push_back({{"cell", cell.name},
                        {"variance", variance},
                        {"name", to_string(methods[m])},
                        {"method", report.method},
                        {"status", to_string(report.status)},
                        {"iterations", report.iterations},
                        {"lyapunov", report.lyapunov},
                        {"error", error},
                        {"estimate", std::isfinite(estimate) ? Json(estimate)
                                     : std::isnan(estimate)  ? Json()
                                                             : Json("infinite")},
                        {"good", error <= good_error || estimate > good_error}});
    }
    return true;
}

// --- what the measurements say

std::string steps_text(const Json& entry) { return count_text(entry["steps"].get<index>()); }

std::string weights_text(const std::string& weights) { return weights == "trained" ? "trained" : "as initialised"; }

/// "ParaGRU", "ParaGRU, trained"
std::string cell_text(const Json& entry) {
    return entry["cell"].get<std::string>() + (entry.value("weights", "") == "trained" ? ", trained" : "");
}

std::string method_text(const std::string& method) { return method == "newton" ? "Newton + scan" : method; }

/// "ParaGRU, trained, 64 steps"; of the map "ParaGRU, 64 steps, 16 channels"
std::string place_text(const Json& entry) {
    const index channels = entry.value("channels", index(0));
    return cell_text(entry) + ", " + steps_text(entry) + " steps" +
           (channels == 0 ? "" : ", " + count_text(channels) + (channels == 1 ? " channel" : " channels"));
}

std::vector<index> values_of(const Json& list, const char* field) {
    std::vector<index> values;
    for (const Json& entry : list) values.push_back(entry[field].get<index>());
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    return values;
}

std::vector<std::string> cells_of(const Json& list) {
    std::vector<std::string> cells;
    for (const Json& entry : list)
        if (std::find(cells.begin(), cells.end(), entry["cell"]) == cells.end()) cells.push_back(entry["cell"]);
    return cells;
}

/// The curves of the plots over steps: a cell with its weights, and where its colour is in the palette.
struct Curve {
    std::string cell, weights;
    int colour;
};
std::vector<Curve> curves(const Json& rnn) {
    std::vector<Curve> found;
    const std::vector<std::string> cells = cells_of(rnn["single"]);
    for (const Json& entry : rnn["single"]) {
        const std::string cell = entry["cell"], weights = entry["weights"];
        if (!found.empty() && found.back().cell == cell && found.back().weights == weights) continue;
        found.push_back({cell, weights, int(std::find(cells.begin(), cells.end(), cell) - cells.begin())});
    }
    return found;
}

bool belongs(const Json& entry, const Curve& curve) {
    return entry["cell"] == curve.cell && entry["weights"] == curve.weights;
}

template <class Value>
Series over_steps(const Json& rnn, const Curve& curve, const std::string& name, const Value& value) {
    Series series{.name = name, .x = {}, .y = {}};
    for (const Json& entry : rnn["single"])
        if (belongs(entry, curve)) {
            series.x.push_back(entry["steps"].get<double>());
            series.y.push_back(value(entry));
        }
    return series;
}

/// A line for each curve, trained ones dashed.
template <class Value>
Plot plot_of_curves(const Json& rnn, Plot plot, const Value& value) {
    for (const Curve& curve : curves(rnn)) {
        plot.series.push_back(
            over_steps(rnn, curve, curve.cell + (curve.weights == "trained" ? ", trained" : ""), value));
        plot.series.back().colour = curve.colour;
        if (curve.weights == "trained") plot.series.back().stroke = Series::Stroke::dashed;
    }
    return plot;
}

const Axis steps_axis{.label = "steps T", .logarithm = 2};
const Axis ratio_axis{.label = "ratio of median seconds", .logarithm = 10};

Plot ratio_plot(const Json& rnn) {
    return plot_of_curves(
        rnn,
        {.title = "One channel: sequential / parallel",
         .caption = "The fastest of overlap, shooting and Newton + scan against the fused sequential method. Above the "
                    "dotted line parallel is faster, below it is slower.",
         .x = steps_axis,
         .y = ratio_axis,
         .series = {},
         .reference = 1.0,
         .reference_label = "equally fast"},
        best_ratio);
}

Plot iterations_plot(const Json& rnn, const std::string& method) {
    const std::string caption =
        method == "newton"
            ? "Passes over all steps until the residual test passes: each solves one bidiagonal system. Nothing is "
              "drawn where it did not pass within " +
                  count_text(most_iterations) + " passes."
            : "Newton sweeps for the states between chunks, and the repairs that test them: one where all meet.";
    return plot_of_curves(rnn,
                          {.title = "One channel: iterations of " + method_text(method),
                           .caption = caption,
                           .x = steps_axis,
                           .y = {.label = "iterations", .first = 0.0},
                           .series = {}},
                          [&](const Json& entry) {
                              const bool ended = std::isfinite(measured(entry, method, "seconds"));
                              return ended ? measured(entry, method, "iterations") : std::nan("");
                          });
}

Plot seconds_plot(const Json& rnn, const Curve& curve) {
    Plot plot{.title = curve.cell + ", " + weights_text(curve.weights) + ", one channel: seconds",
              .caption = {},
              .x = steps_axis,
              .y = {.label = "median time per evaluation", .unit = Unit::seconds, .logarithm = 10},
              .series = {}};
    for (const char* method : {"sequential", "overlap", "shooting", "newton", "automatic"})
        plot.series.push_back(
            over_steps(rnn, curve, method == std::string("sequential") ? "sequential, fused" : method_text(method),
                       [&](const Json& entry) { return measured(entry, method, "seconds"); }));
    plot.series.back().stroke = Series::Stroke::dashed;
    return plot;
}

const std::vector<std::string> map_methods{"sequential", "overlap", "shooting"};

std::string ratio_text(double ratio) { return std::isfinite(ratio) ? number_text(ratio, 2) + "x" : "-"; }

Map map_of(const Json& rnn, const std::string& cell) {
    Map map{
        .title = cell + ": which method is fastest",
        .caption =
            "Colour and name: overlap or shooting, the faster whose middle half of times is below that of "
            "sequential's; else sequential. Number: seconds of the fused sequential method / seconds of the faster of "
            "overlap and shooting; below 1 both are slower. Point at a square for its times.",
        .across = "steps T",
        .up = "sequences × channels, B D",
        .columns = {},
        .rows = {},
        .legend = {"sequential", "overlap", "shooting"},
        .squares = {}};
    const std::vector<index> steps = values_of(rnn["map"], "steps"), channels = values_of(rnn["map"], "channels");
    for (const index value : steps) map.columns.push_back(count_text(value));
    for (const index value : channels) map.rows.push_back(count_text(value));
    map.squares.assign(channels.size(), std::vector<Map::Square>(steps.size()));
    for (const Json& point : rnn["map"]) {
        if (point["cell"] != cell) continue;
        const auto column = std::find(steps.begin(), steps.end(), point["steps"].get<index>()) - steps.begin();
        const auto row = std::find(channels.begin(), channels.end(), point["channels"].get<index>()) - channels.begin();
        Map::Square& square = map.squares[std::size_t(row)][std::size_t(column)];
        const std::string winner = point["winner"];
        square.colour = int(std::find(map_methods.begin(), map_methods.end(), winner) - map_methods.begin());
        square.text = ratio_text(number(point["best_ratio"]));
        square.note = winner;
        square.details = place_text(point) + ":";
        for (const char* method : {"sequential", "overlap", "shooting", "automatic"}) {
            square.details += std::string(" ") + method + " " + seconds_text(measured(point, method, "seconds"));
            if (const double ratio = measured(point, method, "ratio"); std::isfinite(ratio))
                square.details += " (" + speed_text(ratio) + ")";
            square.details += method == std::string("automatic") ? "" : ",";
        }
        square.details += "; best / automatic " + number_text(number(point["best_over_automatic"]), 2);
    }
    return map;
}

/// Steps x channels, a cell's text and tone as `content` says.
template <class Content>
Table map_table(const Json& rnn, const std::string& cell, Table table, const Content& content) {
    const std::vector<index> steps = values_of(rnn["map"], "steps"), channels = values_of(rnn["map"], "channels");
    table.columns = {{"T \\ B D"}};
    for (const index value : channels) table.columns.push_back({count_text(value)});
    for (const index value : steps) {
        std::vector<Table::Cell> row{count_text(value)};
        row.resize(channels.size() + 1, Table::Cell(""));
        for (const Json& point : rnn["map"])
            if (point["cell"] == cell && point["steps"] == value) {
                const auto column = std::find(channels.begin(), channels.end(), point["channels"].get<index>());
                row[std::size_t(column - channels.begin()) + 1] = content(point);
            }
        table.rows.push_back(row);
    }
    return table;
}

Table winners(const Json& rnn, const std::string& cell) {
    return map_table(rnn, cell,
                     {.title = cell + ", T steps x B D channels: the fastest method, and fused sequential seconds / "
                                      "those of the faster of overlap and shooting",
                      .caption = "Sequential also where the middle halves of the times overlap.",
                      .columns = {},
                      .rows = {}},
                     [](const Json& point) -> Table::Cell {
                         return point["winner"].get<std::string>() + " " + ratio_text(number(point["best_ratio"]));
                     });
}

Table choices(const Json& rnn, const std::string& cell) {
    return map_table(rnn, cell,
                     {.title = cell + ": seconds of the fastest method / seconds of automatic",
                      .caption = "1: automatic is as fast as the fastest of sequential, overlap and shooting. What is "
                                 "below " +
                                 number_text(good_choice, 2) + " is coloured.",
                      .columns = {},
                      .rows = {}},
                     [](const Json& point) -> Table::Cell {
                         const double reached = number(point["best_over_automatic"]);
                         return {number_text(reached), reached < good_choice ? Table::Tone::bad : Table::Tone::plain};
                     });
}

/// Ratio to sequential; the status in its place where the method did not end.
Table::Cell speed_cell(const Json& entry, const std::string& method) {
    const double ratio = measured(entry, method, "ratio");
    if (!std::isfinite(ratio)) return entry["methods"][method]["status"].get<std::string>();
    return {speed_text(ratio), ratio > 1 ? Table::Tone::good : Table::Tone::plain};
}

/// The distribution of a row's recurrent coefficients.
std::string coefficients_text(const Json& row) { return "N(0, " + count_text(index(number(row["variance"]))) + ")"; }

std::string exponent_text(const Json& entry) { return number_text(number(entry["lyapunov"]), 2); }

Table single_table(const Json& rnn, bool only_longest) {
    const std::vector<index> steps = values_of(rnn["single"], "steps");
    Table table{.title = only_longest && !steps.empty()
                             ? "One channel of " + count_text(steps.back()) + " steps: against fused sequential"
                             : "One channel: all lengths",
                .caption =
                    "Against sequential: the ratio of median seconds. In a method's place: its status, where it "
                    "did not converge within " +
                    count_text(most_iterations) + " passes.",
                .columns = {{"cell", false},
                            {"steps"},
                            {"Lyapunov exponent"},
                            {"sequential, fused"},
                            {"overlap"},
                            {"shooting"},
                            {"Newton + scan"},
                            {"iterations"},
                            {"automatic"},
                            {"largest difference"},
                            {"most runs"}},
                .rows = {}};
    for (const Json& entry : rnn["single"]) {
        if (only_longest && entry["steps"] != steps.back()) continue;
        const double difference = worst_difference(entry);
        table.rows.push_back({cell_text(entry),
                              steps_text(entry),
                              exponent_text(entry),
                              seconds_text(measured(entry, "sequential", "seconds")),
                              speed_cell(entry, "overlap"),
                              speed_cell(entry, "shooting"),
                              speed_cell(entry, "newton"),
                              count_text(entry["methods"]["newton"]["iterations"].get<index>()),
                              speed_cell(entry, "automatic"),
                              {scientific_text(difference),
                               agrees(entry, number(rnn["state_tolerance"])) ? Table::Tone::plain : Table::Tone::bad},
                              count_text(entry["repetitions"].get<index>())});
    }
    return table;
}

/// What the methods did with the longest sequence.
Table methods_table(const Json& rnn) {
    const std::vector<index> steps = values_of(rnn["single"], "steps");
    Table table{.title = "One channel of " + count_text(steps.back()) + " steps: what the methods did",
                .caption = "Iterations: Newton passes; of shooting, sweeps and repairs; of overlap, repairs.",
                .columns = {{"cell", false},
                            {"method", false},
                            {"as reported", false},
                            {"status", false},
                            {"iterations"},
                            {"time"},
                            {"against sequential"},
                            {"differs by"}},
                .rows = {}};
    for (const Json& entry : rnn["single"]) {
        if (entry["steps"] != steps.back()) continue;
        for (const auto& [name, method] : entry["methods"].items()) {
            const bool baseline = name == "sequential";
            table.rows.push_back(
                {baseline ? cell_text(entry) : "", method_text(name), method["method"].get<std::string>(),
                 method["status"].get<std::string>(), baseline ? "" : count_text(method["iterations"].get<index>()),
                 seconds_text(measured(entry, name, "seconds")), baseline ? Table::Cell("") : speed_cell(entry, name),
                 baseline ? "" : scientific_text(measured(entry, name, "difference"))});
        }
    }
    return table;
}

Table training_table(const Json& rnn) {
    Table table{.title = "Weights after training",
                .caption =
                    "Mean squared error on sequences kept apart, before and after. The channel whose exponent is "
                    "largest forgets most slowly: it is the one measured.",
                .columns = {{"cell", false},
                            {"channels"},
                            {"updates"},
                            {"loss before"},
                            {"loss after"},
                            {"smallest exponent"},
                            {"largest exponent"},
                            {"of channel"}},
                .rows = {}};
    for (const Json& entry : rnn["training"]) {
        std::vector<Table::Cell> row{entry["cell"].get<std::string>(), count_text(entry["channels"].get<index>()),
                                     count_text(entry["updates"].get<index>())};
        if (entry.contains("failure")) {
            row.insert(row.end(), {"-", {"failed", Table::Tone::bad}, "-", "-", "-"});
            table.rows.push_back(std::move(row));
            continue;
        }
        const auto exponents = entry["lyapunov"].get<std::vector<double>>();
        const auto [least, most] = std::minmax_element(exponents.begin(), exponents.end());
        row.insert(row.end(),
                   {number_text(number(entry["first_loss"])), number_text(number(entry["last_loss"])),
                    number_text(*least, 2), number_text(*most, 2), count_text(entry["channel"].get<index>())});
        table.rows.push_back(std::move(row));
    }
    return table;
}

Table accuracy_table(const Json& rnn) {
    Table table{.title = "Against the same recurrence in double",
                .caption =
                    "Coefficients: their distribution. Error and the Report's own estimate (Estimates::full) are "
                    "relative to the largest value. A row is good where the error is at most " +
                    scientific_text(good_error) + ", or the estimate says that it is not.",
                .columns = {{"cell", false},
                            {"coefficients", false},
                            {"method", false},
                            {"status", false},
                            {"Lyapunov exponent"},
                            {"error"},
                            {"estimate"},
                            {"", false}},
                .rows = {}};
    for (const Json& row : rnn["accuracy"]) {
        const bool good = row["good"];
        const Json& estimate = row["estimate"];
        table.rows.push_back({row["cell"].get<std::string>(),
                              coefficients_text(row),
                              method_text(row["name"]),
                              row["status"].get<std::string>(),
                              exponent_text(row),
                              scientific_text(number(row["error"])),
                              estimate.is_string() ? estimate.get<std::string>() : scientific_text(number(estimate)),
                              {good ? "good" : "worse than it says", good ? Table::Tone::good : Table::Tone::bad}});
    }
    return table;
}

/// The longest sequence of one channel, in a sentence per cell.
void add_single_verdicts(const Json& rnn, std::vector<std::string>& sentences) {
    double largest = 0;
    index unconverged = 0, evaluations = 0;
    std::string parting;
    for (const char* list : {"single", "map"})
        for (const Json& entry : rnn[list]) {
            if (contractive(entry))
                largest = std::max(largest, worst_difference(entry));
            else
                parting += (parting.empty() ? "" : "; ") + place_text(entry) + " (" + exponent_text(entry) + ")";
            for (const auto& [name, method] : entry["methods"].items()) {
                ++evaluations;
                if (!method.contains("seconds")) ++unconverged;
            }
        }
    sentences.push_back("Largest relative difference from sequential: " + scientific_text(largest) +
                        " (allowed: " + scientific_text(number(rnn["state_tolerance"])) +
                        ", and for cells that forget slowly what their residuals add up to, twice " +
                        scientific_text(evaluation_tolerance) + " / (1 - exp(Lyapunov exponent))).");
    if (!parting.empty())
        sentences.push_back(
            "Not contractive, so that no difference from sequential counts there (Lyapunov exponent): " + parting +
            ".");
    if (unconverged > 0)
        sentences.push_back(count_text(unconverged) + " of " + count_text(evaluations) +
                            " evaluations did not converge within " + count_text(most_iterations) + " passes.");
    const std::vector<index> steps = values_of(rnn["single"], "steps");
    for (const Json& entry : rnn["single"]) {
        const std::string best = best_parallel(entry);
        if (entry["steps"] != steps.back() || best.empty()) continue;
        sentences.push_back("One channel of " + steps_text(entry) + " steps, " + cell_text(entry) + ": " +
                            method_text(best) + " is " + speed_text(measured(entry, best, "ratio")) +
                            " than fused sequential, automatic " + speed_text(measured(entry, "automatic", "ratio")) +
                            ".");
    }
}

void add_map_verdicts(const Json& rnn, std::vector<std::string>& sentences) {
    const Json& map = rnn["map"];
    if (map.empty()) return;
    const auto at = [&](const char* field, bool largest) -> const Json& {
        const auto less = [&](const Json& a, const Json& b) { return number(a[field]) < number(b[field]); };
        return largest ? *std::max_element(map.begin(), map.end(), less)
                       : *std::min_element(map.begin(), map.end(), less);
    };
    const auto faster =
        std::count_if(map.begin(), map.end(), [](const Json& p) { return p["winner"] != "sequential"; });
    const auto chosen = std::count_if(
        map.begin(), map.end(), [](const Json& point) { return number(point["best_over_automatic"]) >= good_choice; });
    const Json &best = at("best_ratio", true), &worst = at("best_ratio", false),
               &worst_choice = at("best_over_automatic", false);
    sentences.push_back("Map: overlap or shooting is faster than fused sequential in " + count_text(faster) + " of " +
                        count_text(index(map.size())) +
                        " points, counted where the middle halves of their times are apart; the faster of them is " +
                        speed_text(number(best["best_ratio"])) + " at best (" + place_text(best) + ") and " +
                        speed_text(number(worst["best_ratio"])) + " at worst (" + place_text(worst) + ").");
    sentences.push_back("Automatic reaches " + number_text(good_choice, 2) + " of the fastest method's speed in " +
                        count_text(chosen) + " of " + count_text(index(map.size())) + " points; at worst " +
                        number_text(number(worst_choice["best_over_automatic"]), 2) + " (" + place_text(worst_choice) +
                        ").");
}

void add_accuracy_verdict(const Json& rnn, std::vector<std::string>& sentences) {
    const Json& rows = rnn["accuracy"];
    index good = 0;
    double share = INFINITY;  // of the error that was estimated, at the least
    const Json* least = nullptr;
    for (const Json& row : rows) {
        if (row["good"].get<bool>()) ++good;
        const double here = number(row["estimate"]) / number(row["error"]);
        if (number(row["error"]) <= good_error || !(here < share)) continue;
        share = here;
        least = &row;
    }
    std::string sentence = "Against double, tolerance " + scientific_text(number(rnn["accuracy_tolerance"])) + ": in " +
                           count_text(good) + " of " + count_text(index(rows.size())) +
                           " evaluations the error is at most " + scientific_text(good_error) +
                           ", or the Report says that it is not.";
    if (least != nullptr)
        sentence += " Of a larger error, at the least " + number_text(share, 2) + " was estimated (" +
                    (*least)["cell"].get<std::string>() + ", " + coefficients_text(*least) + ", " +
                    method_text((*least)["name"]) + ").";
    sentences.push_back(sentence);
}

std::vector<std::string> rnn_verdicts(const Json& rnn) {
    std::vector<std::string> sentences;
    for (const Json& entry : rnn["training"]) {
        if (entry.contains("failure")) {
            sentences.push_back(entry["cell"].get<std::string>() +
                                " was not measured as trained: " + entry["failure"].get<std::string>() + ".");
            continue;
        }
        const double exponent = number(entry["lyapunov"][entry["channel"].get<std::size_t>()]);
        sentences.push_back(entry["cell"].get<std::string>() + " trained: the loss fell from " +
                            number_text(number(entry["first_loss"])) + " to " +
                            number_text(number(entry["last_loss"])) +
                            "; the largest Lyapunov exponent of its channels is " + number_text(exponent, 2) +
                            (exponent < 0 ? ", a factor e in " + number_text(-1 / exponent, 2) + " steps." : "."));
    }
    if (!rnn["single"].empty()) add_single_verdicts(rnn, sentences);
    add_map_verdicts(rnn, sentences);
    if (!rnn["accuracy"].empty()) add_accuracy_verdict(rnn, sentences);
    if (sentences.empty()) sentences.emplace_back("Nothing was measured.");
    return sentences;
}

/// Seconds on a machine of two cores: proportions for the progress bar.
constexpr double training_seconds = 1.5, accuracy_seconds = 1;
double single_seconds(index steps, const Sizes& sizes) { return sizes.seconds + 4e-6 * double(steps); }
double point_seconds(index elements, const Sizes& sizes) { return sizes.seconds + 1e-7 * double(elements); }

}  // namespace

Json run_rnn(const Experiment& experiment) {
    const Sizes chosen = sizes(experiment.quick);
    const std::vector<CellType>& cells = cell_types();
    Json result{{"complete", false},
                {"agreement", nullptr},
                {"precision", "float"},
                {"baseline", "sequential, fused: evaluate with Method::sequential, one kernel over all steps"},
                {"evaluation_tolerance", evaluation_tolerance},
                {"state_tolerance", experiment.tolerance},
                {"accuracy_tolerance", accuracy_tolerance},
                {"max_iterations", most_iterations},
                {"training", Json::array()},
                {"single", Json::array()},
                {"map", Json::array()},
                {"accuracy", Json::array()}};
    const auto agree = [&](bool here) {
        result["agreement"] = here && (result["agreement"].is_null() || result["agreement"].get<bool>());
    };
    const auto each_point = [&](const auto& visit) {
        for (std::size_t c = 0; c < examined_cells; ++c)
            for (const index steps : chosen.steps)
                for (const index channels : chosen.channels)
                    if (steps * channels <= chosen.most_elements && !visit(cells[c], steps, channels)) return false;
        return true;
    };
    const std::vector<double> variances{1, 4, 16};
    double total = double(examined_cells) * (training_seconds + double(variances.size()) * accuracy_seconds);
    for (const index steps : chosen.steps)
        total += double(cells.size() + examined_cells) * single_seconds(steps, chosen);
    each_point([&](const CellType&, index steps, index channels) {
        total += point_seconds(steps * channels, chosen);
        return true;
    });
    Course course(experiment, total);

    const auto measure_lengths = [&](const CellType& cell, const std::string& weights, const auto& problem) {
        for (const index steps : chosen.steps) {
            course.begin(single_seconds(steps, chosen),
                         cell.name + (" " + weights_text(weights)) + ", " + count_text(steps) + " steps");
            Json entry = measure_single(cell.name, weights, problem(steps), chosen, course);
            if (entry.is_null()) return false;
            agree(agrees(entry, experiment.tolerance));
            result["single"].push_back(std::move(entry));
        }
        return true;
    };
    // Weights as initialised first: evaluations learn from those before them of the same cell and size, which would
    // otherwise be of trained weights, whose chunks take longer to meet.
    for (const CellType& cell : cells)
        if (!measure_lengths(cell, "initialised", [&](index steps) {
                return random_problem(cell, steps, 1, initial_deviation, experiment.seed);
            }))
            return result;
    const bool mapped = each_point([&](const CellType& cell, index steps, index channels) {
        course.begin(point_seconds(steps * channels, chosen), std::string(cell.name) + ", " + count_text(steps) +
                                                                  " steps, " + count_text(channels) + " channels");
        Json point = measure_point(cell, random_problem(cell, steps, channels, initial_deviation, experiment.seed),
                                   chosen, experiment.tolerance, course);
        if (point.is_null()) return false;
        agree(agrees(point, experiment.tolerance));
        result["map"].push_back(std::move(point));
        return true;
    });
    if (!mapped) return result;
    for (std::size_t c = 0; c < examined_cells; ++c) {
        course.begin(training_seconds, std::string("training ") + cells[c].name);
        Trained trained;
        Json training = train(cells[c], experiment, course, trained);
        if (training.is_null()) return result;
        const bool failed = training.contains("failure");
        result["training"].push_back(std::move(training));
        agree(!failed);
        if (failed) continue;
        if (!measure_lengths(cells[c], "trained", [&](index steps) {
                return trained_problem(cells[c], trained.layer, trained.channel, steps, experiment.seed);
            }))
            return result;
    }
    bool complete = true;
    for (std::size_t c = 0; c < examined_cells && complete; ++c)
        for (const double variance : variances) {
            course.begin(accuracy_seconds, std::string(cells[c].name) + " against double");
            complete =
                complete && measure_accuracy(cells[c], variance, chosen, experiment.seed, course, result["accuracy"]);
        }
    for (const Json& row : result["accuracy"]) agree(row["good"].get<bool>());
    result["complete"] = complete;
    return result;
}

void describe_rnn(const Json& rnn, Page& page) {
    page.heading("Recurrent cells over time");
    page.paragraph(
        "A cell's step x_t = f(x_{t-1}, u_t, p) acts on each channel alone: ParaGRU (one state), ParaLSTM (two), the "
        "diagonal Elman network (one) and the sLSTM (four). All T steps are evaluated in float: sequentially; by "
        "overlap (chunks side by side from guessed states, each run again from the true end of the one before until it "
        "meets its old states); by shooting (Newton's method for the states between chunks: s_c <- e_{c-1} + P_{c-1} "
        "(s_{c-1} - old s_{c-1})); by Newton's method for all steps (d_t = J_t d_{t-1} - r_t, solved by the scan); and "
        "as Method::automatic chooses. Baseline: " +
        rnn["baseline"].get<std::string>() + ".");
    page.paragraph(
        "Every evaluation has the tolerance " + scientific_text(number(rnn["evaluation_tolerance"])) +
        " on max|x_t - f(x_{t-1})|, absolute and relative to max|x_t|. Times are medians of interleaved repetitions in "
        "this one run, after an evaluation to warm up. Each method is compared with sequential before and after the "
        "timed repetitions; differences are the largest over the trajectory, relative to the largest value there. "
        "Automatic learns from evaluations of the same cell and about the same size, here also from those of overlap "
        "and "
        "shooting, and weights as initialised come first. Weights as initialised: gates' inputs N(0, 1), recurrent "
        "coefficients N(0, " +
        number_text(initial_deviation * initial_deviation, 2) + ").");
    if (!rnn["training"].empty()) {
        const Json& training = rnn["training"][0];
        page.paragraph("Trained weights: a layer of " + count_text(training["channels"].get<index>()) +
                       " channels between one input and a linear read-out learned, in " +
                       count_text(training["updates"].get<index>()) + " steps of Adam on " +
                       count_text(training["batch"].get<index>()) + " sequences of " +
                       count_text(training["steps"].get<index>()) +
                       " steps each, to give the exponential average of its noise input (time constant " +
                       number_text(number(training["time_constant"]), 2) + " steps) plus the input " +
                       count_text(training["delay"].get<index>()) +
                       " steps ago. Measured is the channel with the largest Lyapunov exponent, the one that forgets "
                       "most slowly.");
    }
    page.list(rnn_verdicts(rnn));
    if (!rnn["single"].empty()) {
        page.plots({ratio_plot(rnn), iterations_plot(rnn, "newton"), iterations_plot(rnn, "shooting")});
        std::vector<Plot> seconds;
        for (const Curve& curve : curves(rnn)) seconds.push_back(seconds_plot(rnn, curve));
        page.plots(seconds);
    }
    std::vector<Map> maps;
    for (const std::string& cell : cells_of(rnn["map"])) maps.push_back(map_of(rnn, cell));
    if (!maps.empty()) page.maps(maps);
    for (const std::string& cell : cells_of(rnn["map"])) page.table(choices(rnn, cell));
    if (!rnn["training"].empty()) page.table(training_table(rnn));
    if (!rnn["accuracy"].empty()) page.table(accuracy_table(rnn));
    if (!rnn["single"].empty()) {
        page.table(methods_table(rnn));
        page.table(single_table(rnn, false));
    }
}

std::string summarise_rnn(const Json& rnn) {
    std::string summary;
    if (!rnn["single"].empty()) summary += text(single_table(rnn, true)) + "\n";
    for (const std::string& cell : cells_of(rnn["map"])) summary += text(winners(rnn, cell)) + "\n";
    for (const std::string& sentence : rnn_verdicts(rnn)) summary += sentence + "\n";
    return summary;
}

}  // namespace deeppcr::program
