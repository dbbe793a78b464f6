// deeppcr analyse: can a recurrence be evaluated in parallel, by which method, and does that pay on this machine?
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <deeppcr/analyse.hpp>
#include <deeppcr/bidiagonal.hpp>
#include <files/npy.hpp>

#include "command.hpp"
#include "jacobian_file.hpp"
#include "model_file.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

struct AnalyseArguments {
    std::string file, inputs, module;
    index steps = 4096, batch = 1, heads = 1;
    std::uint64_t seed = 1;
    double tolerance = 0, seconds = 10;
    int threads = 0;
    bool relu = false;
};

/// x_t = A_t x_{t-1} + b_t, from 0 on.
template <class T>
class LinearRecurrence : public Recurrence<T> {
public:
    explicit LinearRecurrence(const BidiagonalSystem<T>& system)
        : Recurrence<T>(system.right_side.shape(), system.subdiagonal.block()), system_(system) {}

    void step(const Section& section, View<const T> before, View<T> after) const override {
        const index width = before.width(), block = this->block();
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                const index t = section.first + i, sequence = section.sequences[std::size_t(j)];
                const T* matrix = system_.subdiagonal.at(t, sequence);
                for (index row = 0; row < width; ++row, matrix += block) {
                    T sum = system_.right_side(t, sequence, row);
                    const T* const x = before.at(i, j) + row - row % block;
                    for (index k = 0; k < block; ++k) sum += matrix[k] * x[k];
                    after(i, j, row) = sum;
                }
            }
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j)
                std::copy_n(system_.subdiagonal.at(section.first + i, section.sequences[std::size_t(j)]),
                            before.width() * this->block(), jacobian.at(i, j));
    }

private:
    BidiagonalSystem<T> system_;
};

/// "contractive; a disturbance halves every 3.3 steps"
std::string nature(const Analysis& analysis) {
    const double exponent = analysis.lyapunov;
    if (std::isnan(exponent)) return "unknown";
    if (std::isinf(exponent)) return exponent < 0 ? "the past is forgotten at once" : "its products overflow";
    const double uncertain = std::isnan(analysis.lyapunov_error) ? 0 : 2 * analysis.lyapunov_error;
    const std::string growing = analysis.linear ? "unstable" : "chaotic";
    if (std::abs(exponent) <= uncertain) return "at the edge between contractive and " + growing;
    const std::string steps = number_text(std::log(2.0) / std::abs(exponent), 2) + " steps";
    if (exponent < 0) return "contractive; a disturbance halves every " + steps;
    return growing + (analysis.linear ? ", as it is linear" : "") + "; a disturbance doubles every " + steps +
           (analysis.linear
                ? ", and as a rule x with it, until it overflows"
                : ", so that no two precisions give the same trajectory: only its residual can be promised");
}

std::string signed_text(double value) { return (value < 0 ? "-" : "") + number_text(std::abs(value), 2); }

std::string steps_text(index steps) { return count_text(steps) + (steps == 1 ? " step" : " steps"); }

std::string forgetting_text(const Analysis& analysis) {
    if (analysis.places == 0) return "How soon a wrong state is forgotten was not measured: no start was wrong.";
    const std::string within = " (within " + scientific_text(analysis.tolerance);
    if (analysis.forgetting < 0)
        return "A wrong state is not forgotten within " + steps_text(analysis.forgetting_looked) + within +
               "): overlap's chunks cannot start from a guess.";
    return "A wrong state is forgotten after " + steps_text(analysis.forgetting) + within +
           (analysis.places == 1 ? ", from one start)." : ", the most of " + count_text(analysis.places) + " starts).");
}

std::vector<std::string> findings(const Analysis& analysis) {
    std::vector<std::string> lines;
    std::string exponent = "Lyapunov exponent ";
    if (std::isinf(analysis.lyapunov))
        exponent += analysis.lyapunov < 0 ? "-infinity" : "infinity";
    else
        exponent += signed_text(analysis.lyapunov) +
                    (std::isnan(analysis.lyapunov_error) ? "" : " ± " + number_text(analysis.lyapunov_error, 1)) +
                    " per step";
    lines.push_back(exponent + ": " + nature(analysis) + ".");
    lines.push_back(forgetting_text(analysis));
    lines.push_back(analysis.longest_window > 0
                        ? "Window: products of Jacobians have no digits left after " +
                              steps_text(analysis.longest_window) + "; longer windows bring Newton's method nothing."
                        : "Window: the whole trajectory at once, if it fits the memory.");
    return lines;
}

std::string name_of(const Trial& trial) {
    if (trial.method != Method::newton) return to_string(trial.method);
    return to_string(trial.method) +
           (trial.surrogate == Surrogate::diagonal ? ", diagonal of the Jacobian" : ", full Jacobian");
}

/// What the Report's own words add to the method's name: "64 chunks of 2048 steps, 96 steps repeated".
std::string details(const Trial& trial) {
    if (trial.method == Method::newton || trial.method == Method::sequential) return "";
    const std::string& method = trial.report.method;
    if (trial.method == Method::automatic) return method;
    const std::size_t comma = method.find(", ");
    return comma == std::string::npos ? "" : method.substr(comma + 2);
}

Table trials_table(const Analysis& analysis, index steps) {
    Table table{.title = {},
                .caption = {},
                .columns = {{"method", false},
                            {"passes"},
                            {"outcome", false},
                            {"time"},
                            {"against sequential"},
                            {"differs by"},
                            {"", false}},
                .rows = {}};
    if (analysis.steps_tried < steps) table.caption = "Tried on the first " + steps_text(analysis.steps_tried) + ".";
    const double baseline = analysis.trials.front().seconds;
    for (const Trial& trial : analysis.trials) {
        const bool first = &trial == &analysis.trials.front();
        table.rows.push_back({name_of(trial), first ? "" : count_text(trial.report.iterations),
                              trial.out_of_time ? "out of time" : to_string(trial.report.status),
                              seconds_text(trial.seconds),
                              first || !trial.right() ? "" : speed_text(baseline / trial.seconds),
                              first ? "" : scientific_text(trial.difference), details(trial)});
    }
    return table;
}

std::string verdict(const Analysis& analysis) {
    const Trial& best = analysis.fastest();
    const Trial *newton = nullptr, *automatic = nullptr;
    for (const Trial& trial : analysis.trials) {
        if (trial.method == Method::newton && newton == nullptr) newton = &trial;
        if (trial.method == Method::automatic) automatic = &trial;
    }
    std::string text;
    if (newton != nullptr) {
        const Report& report = newton->report;
        text += newton->out_of_time ? "Newton's method was stopped after " + count_text(report.iterations) + " passes. "
                : report.status == Status::converged
                    ? "Newton's method needs " + count_text(report.iterations) +
                          (report.iterations == 1 ? " pass. " : " passes. ")
                    : "Newton's method made too little progress in " + count_text(report.iterations) +
                          " passes, and the rest was finished sequentially. ";
    }
    const double gain = analysis.trials.front().seconds / best.seconds;
    if (best.method == Method::sequential || best.report.method == "sequential")
        text += "On this machine: evaluate it sequentially.";
    else if (gain < 1.1)  // the trials' own noise
        text += "On this machine: evaluate it sequentially; " + to_string(best.method) + " is about as fast.";
    else
        text += "On this machine: " + (best.method == Method::automatic ? best.report.method : name_of(best)) + ", " +
                number_text(gain) + "x faster than sequentially.";
    if (automatic != nullptr) {
        const std::string& chosen = automatic->report.method;
        text += " (`automatic` chooses " + chosen.substr(0, chosen.find(',')) + ".)";
    }
    if (analysis.channels_that_pay == 0)
        text += " By the measured costs of a step, overlap does not pay for any number of channels of this length.";
    if (analysis.channels_that_pay > 0)
        text += " By the measured costs of a step, overlap pays up to " + count_text(analysis.channels_that_pay) +
                (analysis.channels_that_pay == 1 ? " channel" : " channels") +
                " of this length, all sequences together.";
    return text;
}

template <class T>
Json to_json(const std::string& description, const Shape& shape, const Analysis& analysis) {
    Json result{{"recurrence", description},
                {"steps", shape.steps},
                {"batch", shape.batch},
                {"width", shape.width},
                {"element_type", sizeof(T) == 8 ? "float64" : "float32"},
                {"tolerance", analysis.tolerance},
                {"lyapunov", finite(analysis.lyapunov)},
                {"lyapunov_error", finite(analysis.lyapunov_error)},
                {"linear", analysis.linear},
                {"forgetting_steps", analysis.forgetting >= 0 ? Json(analysis.forgetting) : Json()},
                {"forgetting_looked", analysis.forgetting_looked},
                {"forgetting_starts", analysis.places},
                {"longest_window", analysis.longest_window > 0 ? Json(analysis.longest_window) : Json()}};
    if (analysis.trials.empty()) return result;
    result["steps_tried"] = analysis.steps_tried;
    result["channels_that_pay"] = analysis.channels_that_pay >= 0 ? Json(analysis.channels_that_pay) : Json();
    for (const Trial& trial : analysis.trials)
        result["trials"].push_back(
            {{"method", to_string(trial.method)},
             {"surrogate", trial.surrogate == Surrogate::diagonal ? "diagonal" : "full"},
             {"what_it_did", trial.report.method},
             {"iterations", trial.report.iterations},
             {"status", to_string(trial.report.status)},
             {"out_of_time", trial.out_of_time},
             {"seconds", trial.seconds},
             {"sequential_over_this", trial.right() ? Json(analysis.trials.front().seconds / trial.seconds) : Json()},
             {"difference", finite(trial.difference)}});
    result["fastest"] = to_string(analysis.fastest().method);
    return result;
}

template <class T>
Analysis analyse_with_progress(const Recurrence<T>& recurrence, const std::string& title,
                               const AnalyseArguments& arguments, bool trials) {
    Progress progress(title, 1);
    AnalysisOptions options{
        .evaluation = {.tolerance = arguments.tolerance, .execution = {.threads = arguments.threads}},
        .trials = trials,
        .seconds = arguments.seconds};
    options.progress = [&](double done) {
        progress.update(done);
        return !interrupted();
    };
    try {
        return analyse(recurrence, options);
    } catch (const NotConverged&) {
        if (interrupted()) throw Interrupted();
        throw;
    }
}

std::string shape_text(const Shape& shape, bool float64) {
    return steps_text(shape.steps) + ", " + count_text(shape.batch) +
           (shape.batch == 1 ? " sequence of " : " sequences of ") + count_text(shape.width) +
           (shape.width == 1 ? " number, " : " numbers, ") + (float64 ? "double" : "float");
}

/// Normal numbers, or those of a file; of the type that the model has.
template <class T>
Buffer<T> inputs_of(const AnalyseArguments& arguments, const ModelFile& model) {
    index width = 0;
    if (__builtin_mul_overflow(model.inputs(), model.recurrent() ? arguments.heads : 1, &width))
        throw InvalidArgument("--heads", "a number of heads that fits the memory", std::to_string(arguments.heads));
    if (arguments.inputs.empty())
        return Buffer<T>::random({model.recurrent() ? arguments.steps : 1, arguments.batch, width}, arguments.seed);
    const files::NpyHeader header = files::read_npy_header(arguments.inputs);
    std::vector<index> shape = header.shape;
    const std::size_t dimensions = model.recurrent() ? 3 : 2;
    if (shape.size() + 1 == dimensions) shape.insert(shape.end() - 1, 1);  // a single sequence
    if (!model.recurrent()) shape.insert(shape.begin(), 1);
    const bool fits = shape.size() == 3 && shape[0] > 0 && shape[1] > 0 &&
                      (model.recurrent() && arguments.heads == 1 ? shape[2] > 0 && shape[2] % model.inputs() == 0
                                                                 : shape[2] == width);
    if (!fits)
        throw FileError(arguments.inputs,
                        model.recurrent() ? "shape [steps,sequences," + std::to_string(width) + "]"
                                          : "first states of shape [sequences," + std::to_string(width) + "]",
                        files::to_string(header.shape));
    // The file, twice in memory while its order is converted, and the numbers as T.
    const Shape sizes{shape[0], shape[1], shape[2]};
    refuse_if_too_large("reading " + arguments.inputs,
                        {{header.bytes, header.fortran_order ? 2 : 1}, {index(sizeof(T)), sizes.count()}});
    const files::Tensor tensor = files::read_npy(arguments.inputs);
    Buffer<T> result(sizes);
    std::visit(
        [&]<class U>(const std::vector<U>& values) {
            if constexpr (std::is_floating_point_v<U>) {
                refuse_if_not_finite<T>(arguments.inputs, values, tensor.shape);
                std::transform(values.begin(), values.end(), result.data(), [](U value) { return T(value); });
            }
        },
        tensor.values);
    return result;
}

template <class T>
void analyse_model(const AnalyseArguments& arguments, const ModelFile& model, Output& output) {
    Buffer<T> input = inputs_of<T>(arguments, model);
    for (index layer = 0; layer < model.layers(); ++layer) {
        Buffer<T> next;
        for (index direction = 0; direction < model.directions(); ++direction) {
            const LayerRecurrence<T> found = model.layer<T>(layer, direction, input, arguments.relu);
            const Recurrence<T>& recurrence = *found.recurrence;
            const Analysis analysis = analyse_with_progress(recurrence, found.description, arguments, true);
            output.line(found.description + ": " + shape_text(recurrence.shape(), model.float64()));
            for (const std::string& line : findings(analysis)) output.line("  " + line);
            output.line("\n" + text(trials_table(analysis, recurrence.shape().steps)));
            output.line("  " + verdict(analysis) + "\n");
            output.result["recurrences"].push_back(to_json<T>(found.description, recurrence.shape(), analysis));
            if (layer + 1 == model.layers()) continue;
            const auto states =
                evaluate(recurrence, {.method = Method::sequential, .execution = {.threads = arguments.threads}})
                    .trajectory;
            const auto [steps, batch, width] = recurrence.shape();
            if (direction == 0) next = Buffer<T>({steps, batch, found.outputs * model.directions()});
            for (index t = 0; t < steps; ++t)
                for (index j = 0; j < batch; ++j)
                    for (index c = 0; c < found.outputs; ++c)
                        next(found.reversed ? steps - 1 - t : t, j, direction * found.outputs + c) =
                            states(t, j, found.first_output + c * found.output_stride);
        }
        input = std::move(next);
    }
}

/// Where x ceases to be finite, in the sequence where it does so first.
struct Overflow {
    index step, sequence;  ///< the step counts from 1
};

template <class T>
std::optional<Overflow> overflow_of(const LinearRecurrence<T>& recurrence, int threads) {
    const Report report =
        evaluate(recurrence,
                 {.method = Method::sequential, .estimates = Estimates::none, .execution = {.threads = threads}})
            .report;
    if (report.ok()) return {};
    const auto first = std::min_element(report.sequences.begin(), report.sequences.end(),
                                        [](const auto& a, const auto& b) { return a.confirmed < b.confirmed; });
    return Overflow{first->confirmed + 1, first - report.sequences.begin()};
}

/// A way to solve a linear recurrence, tried.
struct Solution {
    Reduction reduction;
    const char* name;
    Residual residual = {};
    double seconds = std::nan("");  ///< median; NaN where the residual is not small

    std::string outcome() const {
        if (residual.small) return "right";
        return std::isnan(residual.relative) ? "not finite" : "relative residual " + scientific_text(residual.relative);
    }
};

template <class T>
std::vector<Solution> try_solutions(const BidiagonalSystem<T>& system, const AnalyseArguments& arguments) {
    std::vector<Solution> solutions{{Reduction::sequential, "substitution"},
                                    {Reduction::scan, "scan"},
                                    {Reduction::pcr, "parallel cyclic reduction"},
                                    {Reduction::automatic, "automatic"}};
    Workspace workspace;
    const Buffer<T> x(system.right_side.shape());
    for (Solution& solution : solutions) {
        std::vector<double> seconds;
        for (int run = 0; run < 4; ++run) {
            if (interrupted()) throw Interrupted();
            const auto begin = Clock::now();
            solve(system, x, {solution.reduction, {.threads = arguments.threads}, 0, &workspace});
            seconds.push_back(seconds_since(begin));
            if (run == 0) solution.residual = residual_of<T>(system, x, false);
            if (!solution.residual.small || seconds.back() > arguments.seconds) break;
        }
        if (!solution.residual.small) continue;
        if (seconds.size() > 1) seconds.erase(seconds.begin());
        std::sort(seconds.begin(), seconds.end());
        solution.seconds = seconds[seconds.size() / 2];
    }
    return solutions;
}

/// Jacobians of a file: how they make errors grow, and how their linear recurrence is solved fastest.
template <class T>
void analyse_jacobians(const AnalyseArguments& arguments, const BlockShape& problem, Output& output) {
    const auto& [shape, block] = problem;
    const std::vector<T> jacobians = read_finite<T>(arguments.file);
    const bool random = arguments.inputs.empty();
    const Buffer<T> numbers = random ? Buffer<T>::random(shape, arguments.seed) : Buffer<T>();
    const std::vector<T> given = random ? std::vector<T>() : read_finite<T>(arguments.inputs);
    const BidiagonalSystem<T> system{.subdiagonal = {jacobians.data(), shape, block},
                                     .right_side = {random ? numbers.data() : given.data(), shape}};
    const std::string description = block == 1 ? "diagonal Jacobians"
                                               : (block == shape.width ? "dense" : "block-diagonal") +
                                                     std::string(" Jacobians, blocks of ") + std::to_string(block) +
                                                     " x " + std::to_string(block);
    const auto overflow = overflow_of(LinearRecurrence<T>(system), arguments.threads);
    // The Jacobians are the same along every trajectory: where x overflows, x = 0 shows how errors grow.
    const Buffer<T> zeros = overflow ? Buffer<T>(shape) : Buffer<T>();
    const LinearRecurrence<T> recurrence({system.subdiagonal, overflow ? zeros.view() : system.right_side});
    const Analysis analysis = analyse_with_progress(recurrence, arguments.file, arguments, false);

    output.line(arguments.file + ", " + description + ": " + shape_text(shape, sizeof(T) == 8));
    if (overflow)
        output.line("  x overflows from step " + count_text(overflow->step) + " of sequence " +
                    count_text(overflow->sequence) + " on, sequentially too. Along x = 0, with the same Jacobians:");
    for (const std::string& line : findings(analysis)) output.line("  " + line);
    Json result = to_json<T>(description, shape, analysis);
    result["overflows_from_step"] = overflow ? Json(overflow->step) : Json();
    result["overflowing_sequence"] = overflow ? Json(overflow->sequence) : Json();
    result["fastest"] = nullptr;

    Table table{.title = {},
                .caption = {},
                .columns = {{"solution of x_t = A_t x_{t-1} + b_t", false},
                            {"outcome", false},
                            {"time"},
                            {"against substitution"}},
                .rows = {}};
    const std::vector<Solution> solutions = try_solutions(system, arguments);
    const Solution& substitution = solutions.front();
    const Solution* best = nullptr;
    for (const Solution& solution : solutions) {
        const double ratio = substitution.seconds / solution.seconds;
        table.rows.push_back({solution.name, solution.outcome(), seconds_text(solution.seconds),
                              &solution == &substitution ? "" : speed_text(ratio)});
        result["solutions"].push_back({{"method", solution.name},
                                       {"outcome", solution.outcome()},
                                       {"seconds", finite(solution.seconds)},
                                       {"substitution_over_this", finite(ratio)}});
        if (solution.residual.small && solution.reduction != Reduction::automatic &&
            (best == nullptr || solution.seconds < best->seconds))
            best = &solution;
    }
    if (best != nullptr) result["fastest"] = best->name;
    output.line("\n" + text(table));
    output.line(best != nullptr ? "  A linear recurrence: one pass of Newton's method solves it. On this machine: by " +
                                      std::string(best->name) + "."
                                : "  A linear recurrence: no solution is right.");
    output.result["recurrences"].push_back(result);
}

void analyse_jacobian_file(const AnalyseArguments& arguments, Output& output) {
    const files::NpyHeader header = files::read_npy_header(arguments.file);
    const BlockShape problem = block_shape_of(arguments.file, header.shape);
    if (problem.states.count() < 1)
        throw FileError(arguments.file, "at least one step, sequence and number", files::to_string(header.shape));
    if (!arguments.inputs.empty())
        refuse_if_not_matching(arguments.inputs, files::read_npy_header(arguments.inputs), arguments.file, header);
    // The inputs, x and zeros, and the two copies of A and b that PCR keeps.
    refuse_if_too_large("analysing this", {{header.bytes, 3}, {header.bytes / problem.block, 5}});
    if (header.float64)
        analyse_jacobians<double>(arguments, problem, output);
    else
        analyse_jacobians<float>(arguments, problem, output);
}

Exit run_analyse(const AnalyseArguments& arguments, Output& output) {
    if (!(arguments.tolerance >= 0 && std::isfinite(arguments.tolerance)))
        throw InvalidArgument("--tolerance", "a finite number of 0 or more", std::to_string(arguments.tolerance));
    if (arguments.file.ends_with(".npy")) {
        analyse_jacobian_file(arguments, output);
        return Exit::done;
    }
    const ModelFile model(arguments.file, arguments.module);
    if (model.float64())
        analyse_model<double>(arguments, model, output);
    else
        analyse_model<float>(arguments, model, output);
    return Exit::done;
}

}  // namespace

void add_analyse(Program& program) {
    const auto arguments = std::make_shared<AnalyseArguments>();
    CLI::App& command = program.add(
        "analyse", "Tell whether a recurrence can be evaluated in parallel, how, and whether that pays here",
        "  deeppcr analyse model.safetensors --inputs u.npy\n"
        "  deeppcr analyse jacobians.npy --json",
        [arguments](Output& output) { return run_analyse(*arguments, output); });
    command
        .add_option("file", arguments->file,
                    "Weights (.safetensors): of torch.nn.RNN, GRU, LSTM, of this library's recurrent modules, or of\n"
                    "deeppcr train; or Jacobians (.npy): [T,B,D] diagonal, [T,B,D,D] dense, [T,B,D/K,K,K] blocks")
        ->required();
    command.add_option("--inputs", arguments->inputs,
                       "Inputs [steps,sequences,features] (.npy); of a deep network its first states\n"
                       "[sequences,width]; of Jacobians the right side [T,B,D]. Default: normal numbers");
    command.add_option("--module", arguments->module, "Which module of the file, where there are several: a prefix");
    const auto sizes = CLI::Range(index(1), std::numeric_limits<index>::max());
    command.add_option("--steps", arguments->steps, "Steps, without --inputs")->check(sizes)->capture_default_str();
    command.add_option("--batch", arguments->batch, "Sequences, without --inputs")->check(sizes)->capture_default_str();
    command.add_option("--heads", arguments->heads, "Heads of this library's modules, without --inputs")
        ->check(sizes)
        ->capture_default_str();
    command.add_option("--seed", arguments->seed, "Of the normal numbers")
        ->check(without_sign())
        ->capture_default_str();
    command.add_flag("--relu", arguments->relu, "A torch.nn.RNN with nonlinearity relu");
    command.add_option("--tolerance", arguments->tolerance, "Of the residual; 0: 64 machine epsilons")
        ->capture_default_str();
    command.add_option("--seconds", arguments->seconds, "A method is stopped after about so many")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    command.add_option("--threads", arguments->threads, "Threads; 0: as many as there are processors")
        ->check(CLI::Range(0, 4096))
        ->capture_default_str();
}

}  // namespace deeppcr::program
