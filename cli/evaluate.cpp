// deeppcr evaluate: the trajectory of any step x_t = f(x_{t-1}, u_t) from a TorchScript file, in parallel.
#include <cmath>
#include <memory>
#include <optional>
#include <sstream>
#include <variant>

#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/script_step.hpp>
#include <files/npy.hpp>

#include "command.hpp"
#include "given_options.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

using files::Tensor;

struct EvaluateArguments {
    std::string model, inputs, initial, output;
    index steps = 0, width = 0;
    bool compare = false, overwrite = false;
    std::unique_ptr<GivenOptions<Options>> given;
};

template <class T>
const std::vector<T>& values_of(const Tensor& tensor, const std::string& file) {
    const auto* const values = std::get_if<std::vector<T>>(&tensor.values);
    if (values == nullptr)
        throw FileError(file, std::is_same_v<T, float> ? "float32, as the inputs are" : "float64, as the inputs are",
                        files::element_type(tensor));
    return *values;
}

template <class T>
Exit evaluate_file(const EvaluateArguments& arguments, const Options& given, const Tensor& inputs_file,
                   Output& output) {
    // [T,B,U], or [T,U] for one sequence.
    std::vector<index> shape = inputs_file.shape;
    if (shape.size() == 2) shape.insert(shape.begin() + 1, 1);
    if (shape.size() != 3)
        throw FileError(arguments.inputs, "[steps, batch, width] or [steps, width]", files::to_string(shape));
    const View<const T> inputs(values_of<T>(inputs_file, arguments.inputs).data(), {shape[0], shape[1], shape[2]});

    // [B,D], or [D] for one sequence; zeros where only the width is given.
    std::vector<T> zeros;
    std::optional<Tensor> initial_file;
    View<const T> initial;
    if (!arguments.initial.empty()) {
        initial_file = files::read_npy(arguments.initial);
        const std::vector<index>& sizes = initial_file->shape;
        if (sizes.empty() || sizes.size() > 2 || (sizes.size() == 2 ? sizes[0] : 1) != shape[1])
            throw FileError(arguments.initial, "[" + std::to_string(shape[1]) + ", width]", files::to_string(sizes));
        initial = {values_of<T>(*initial_file, arguments.initial).data(), {1, shape[1], sizes.back()}};
    } else {
        zeros.assign(std::size_t(shape[1] * arguments.width), T(0));
        initial = {zeros.data(), {1, shape[1], arguments.width}};
    }
    const auto recurrence = nn::script_recurrence<T>(arguments.model, inputs, initial);

    Options options = given;
    std::optional<Progress> bar(std::in_place, "evaluating", double(std::max<index>(1, shape[0])));
    options.progress = [&](index confirmed, index, index passes) {
        bar->update(double(confirmed), passes > 0 ? std::to_string(passes) + " passes" : "one after the other");
        return !interrupted();
    };
    const Shape whole = recurrence->shape();
    Tensor result{{whole.steps, whole.batch, whole.width}, std::vector<T>(std::size_t(whole.count()))};
    const Report report =
        evaluate(*recurrence, View<T>(std::get<std::vector<T>>(result.values).data(), whole), options);
    std::optional<Report> sequential;
    double difference = 0;
    if (arguments.compare && !interrupted()) {
        auto other = Buffer<T>::uninitialised(whole);
        sequential = evaluate(*recurrence, other.view(), {.method = Method::sequential, .progress = options.progress});
        for (index i = 0; i < other.size(); ++i) {
            const double distance =
                std::abs(double(other.data()[i]) - double(std::get<std::vector<T>>(result.values)[std::size_t(i)]));
            if (!(distance <= difference)) difference = distance;
            if (std::isnan(distance)) break;
        }
    }
    bar.reset();
    if (interrupted()) throw Interrupted();

    std::ostringstream text;
    text << report;
    output.line(arguments.model + ": " + count_text(whole.steps) + " steps of " + count_text(whole.batch) +
                " sequences of " + count_text(whole.width) + " numbers, " + files::element_type(result));
    output.line(text.str());
    if (sequential)
        output.line("sequentially " + seconds_text(sequential->seconds) + ": " +
                    speed_text(sequential->seconds / report.seconds) + "; differs by at most " +
                    scientific_text(difference));
    if (report.ok() && !arguments.output.empty()) files::write_npy(arguments.output, result);
    if (!arguments.output.empty())
        output.line(report.ok() ? "trajectory: " + arguments.output : "no trajectory is written, as it is not right");
    Json& json = output.result;
    json["trajectory"] = report.ok() && !arguments.output.empty() ? Json(arguments.output) : Json();
    json["shape"] = result.shape;
    json["element_type"] = files::element_type(result);
    json["status"] = to_string(report.status);
    json["method"] = report.method;
    json["iterations"] = report.iterations;
    json["residual"] = report.residual;
    json["relative_residual"] = report.relative_residual;
    json["error"] = finite(report.error);
    json["lyapunov"] = finite(report.lyapunov);
    json["seconds"] = report.seconds;
    if (sequential) {
        json["sequential_seconds"] = sequential->seconds;
        json["largest_difference"] = finite(difference);
    }
    return report.ok() ? Exit::done : Exit::failed;
}

Exit run_evaluate(const EvaluateArguments& arguments, Output& output) {
    Options options;
    arguments.given->apply(options);
    if (arguments.inputs.empty() == (arguments.steps == 0))
        throw InvalidArgument("--inputs", "either inputs or --steps", arguments.inputs.empty() ? "neither" : "both");
    if (arguments.initial.empty() == (arguments.width == 0))
        throw InvalidArgument("--initial", "either initial states or --width",
                              arguments.initial.empty() ? "neither" : "both");
    if (arguments.steps < 0) throw InvalidArgument("--steps", "at least 1", std::to_string(arguments.steps));
    if (arguments.width < 0) throw InvalidArgument("--width", "at least 1", std::to_string(arguments.width));
    if (!arguments.output.empty()) check_output(arguments.output, arguments.overwrite);
    Tensor inputs;
    if (!arguments.inputs.empty()) {
        inputs = files::read_npy(arguments.inputs);
    } else {
        index batch = 1;
        bool float64 = false;
        if (!arguments.initial.empty()) {
            const files::NpyHeader header = files::read_npy_header(arguments.initial);
            if (header.shape.size() == 2) batch = header.shape[0];
            float64 = header.float64;
        }
        inputs.shape = {arguments.steps, batch, 1};
        const auto count = std::size_t(Shape{arguments.steps, batch, 1}.count());
        if (float64)
            inputs.values = std::vector<double>(count);
        else
            inputs.values = std::vector<float>(count);
    }
    warn_about_slow_blas(output);
    return std::holds_alternative<std::vector<double>>(inputs.values)
               ? evaluate_file<double>(arguments, options, inputs, output)
               : evaluate_file<float>(arguments, options, inputs, output);
}

}  // namespace

void add_evaluate(Program& program) {
    const auto arguments = std::make_shared<EvaluateArguments>();
    CLI::App& command = program.add("evaluate", "Evaluate a step of your own, from a TorchScript file, in parallel",
                                    "  deeppcr evaluate --model step.pt --inputs u.npy --width 16 -o x.npy\n"
                                    "  deeppcr evaluate --model map.pt --steps 10000 --initial x0.npy --compare",
                                    [arguments](Output& output) { return run_evaluate(*arguments, output); });
    command
        .add_option("--model", arguments->model,
                    "torch.jit.save'd module: forward(x [rows, D], u [rows, U]), or forward(x), gives the next states")
        ->required();
    command.add_option("--inputs", arguments->inputs, "u: [T,B,U], or [T,U] for one sequence (.npy)");
    command.add_option("--steps", arguments->steps, "T, where the step has no inputs");
    command.add_option("--initial", arguments->initial, "x_0: [B,D], or [D] for one sequence (.npy)");
    command.add_option("--width", arguments->width, "D, where x_0 is zero");
    command.add_option("-o,--output", arguments->output, "The trajectory, [T,B,D] (.npy)");
    command.add_flag("--overwrite", arguments->overwrite, "Replace an output that exists");
    command.add_flag("--compare", arguments->compare, "Evaluate sequentially too, and say how far the two are apart");
    arguments->given = std::make_unique<GivenOptions<Options>>(command);
    auto& given = *arguments->given;
    given.choice("--method", &Options::method, nn::open_method_names,
                 "All steps at once, one after the other, or what is expected to take less");
    given.choice("--surrogate", &Options::surrogate, nn::surrogate_names, "What stands for the Jacobian");
    given.choice("--reduction", &Options::reduction, nn::reduction_names, "How the bidiagonal systems are solved");
    given.value("--tolerance", &Options::tolerance, "Of the residual of each step; 0: 64 machine epsilons");
    given.value("--window", &Options::window, "Steps evaluated at once; 0: as many as fit the memory");
    given.value("--anderson", &Options::anderson, "Passes combined by Anderson acceleration; 0: none");
    given.choice("--on-failure", &Options::on_failure, nn::on_failure_names,
                 "What to do where Newton's method does not converge");
}

}  // namespace deeppcr::program
