// deeppcr solve: x_t = A_t x_{t-1} + b_t with x_0 = 0, from and to .npy files.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <variant>

#include <deeppcr/bidiagonal.hpp>
#include <files/npy.hpp>
#include <files/write.hpp>

#include "command.hpp"
#include "jacobian_file.hpp"

namespace deeppcr::program {
namespace {

using files::NpyHeader;
using files::Tensor;

const std::map<std::string, Reduction> methods = {{"automatic", Reduction::automatic},
                                                  {"sequential", Reduction::sequential},
                                                  {"pcr", Reduction::pcr},
                                                  {"scan", Reduction::scan}};
const std::map<std::string, Backend> backends = {
    {"cpu", Backend::cpu}, {"cuda", Backend::cuda}, {"reference", Backend::reference}};

struct SolveArguments {
    std::string subdiagonal, right_side, solution;
    std::string method = "automatic", backend = "cpu";
    int threads = 0;
    index chunk = 0;
    bool transposed = false;
};

std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2g", value);
    return text;
}

template <class T>
Buffer<T> on_gpu(const std::vector<T>& numbers) {
    const Buffer<T> here = Buffer<T>::uninitialised({1, 1, index(numbers.size())});
    std::copy(numbers.begin(), numbers.end(), here.data());
    return here.on(Device::cuda());
}

template <class T>
Exit solve_files(const SolveArguments& arguments, const BlockShape& problem, Output& output) {
    const std::vector<T> subdiagonal = read_finite<T>(arguments.subdiagonal);
    const std::vector<T> right_side = read_finite<T>(arguments.right_side);
    if (interrupted()) throw Interrupted();

    const BidiagonalSystem<T> system{.subdiagonal = {subdiagonal.data(), problem.states, problem.block},
                                     .right_side = {right_side.data(), problem.states}};
    const auto [steps, batch, width] = problem.states;
    Tensor solution_file{{steps, batch, width}, std::vector<T>(right_side.size())};
    const View<T> solution(std::get<std::vector<T>>(solution_file.values).data(), problem.states);
    SolveOptions options{.method = methods.at(arguments.method),
                         .execution = {backends.at(arguments.backend), arguments.threads},
                         .chunk = arguments.chunk};
    Reduction used = options.method;
    const auto solve_here = [&](const BidiagonalSystem<T>& given, const View<T>& x) {
        return arguments.transposed ? solve_transposed(given, x, options) : solve(given, x, options);
    };
    const auto run = [&] {
        const auto begin = Clock::now();
        if (options.execution.backend == Backend::cuda) {  // the copies count
            const Buffer<T> factors = on_gpu(subdiagonal), states = on_gpu(right_side);
            const View<T> x(states.data(), problem.states);
            used = solve_here({{factors.data(), problem.states, problem.block}, x}, x);
            const Buffer<T> solved = states.on(Device::host());
            std::copy_n(solved.data(), solved.size(), solution.data());
        } else {
            used = solve_here(system, solution);
        }
        return seconds_since(begin);
    };
    double seconds = run();
    Residual residual = residual_of<T>(system, solution, arguments.transposed);

    // Products of A may overflow, or lose all digits, where the solution itself does not.
    if (!residual.small && options.method == Reduction::automatic) {
        output.warn("the products of A grow too far for a parallel method; solved sequentially instead");
        options.method = Reduction::sequential;
        seconds += run();
        residual = residual_of<T>(system, solution, arguments.transposed);
    }
    if (!residual.small) {
        const std::string reason =
            std::isnan(residual.relative)
                ? "the result is not finite: x, or a product of A, grows beyond the range of its element type"
                : "the solution has a relative residual of " + number(residual.relative);
        throw NotConverged(reason + "; nothing was written" +
                           (options.method == Reduction::sequential ? "" : " (--method sequential may succeed)"));
    }
    if (interrupted()) throw Interrupted();
    files::write_npy(arguments.solution, solution_file);
    const std::string method =
        std::find_if(methods.begin(), methods.end(), [&](const auto& entry) { return entry.second == used; })->first;

    output.line(arguments.solution + ": " + files::to_string(solution_file.shape) + " " +
                files::element_type(solution_file) + ", " + method + " on " + arguments.backend + " in " +
                number(seconds) + " s, residual " + number(residual.largest) + " (relative " +
                number(residual.relative) + ")");
    output.result.update(Json{{"solution", arguments.solution},
                              {"shape", solution_file.shape},
                              {"element_type", files::element_type(solution_file)},
                              {"block", problem.block},
                              {"transposed", arguments.transposed},
                              {"method", method},
                              {"backend", arguments.backend},
                              {"seconds", seconds},
                              {"residual", residual.largest},
                              {"relative_residual", residual.relative}});
    return Exit::done;
}

Exit run_solve(const SolveArguments& arguments, Output& output) {
    for (const std::string& input : {arguments.subdiagonal, arguments.right_side}) {
        std::error_code error;
        if (std::filesystem::equivalent(input, arguments.solution, error))
            throw FileError(arguments.solution, "is an input too: solving would overwrite it");
    }
    files::check_writable(arguments.solution);
    if (arguments.backend == "cuda" && cuda_devices().empty())
        throw NoDevice("--backend cuda: there is no GPU to use: " + cuda_problem());
    const NpyHeader subdiagonal = files::read_npy_header(arguments.subdiagonal);
    const NpyHeader right_side = files::read_npy_header(arguments.right_side);

    const BlockShape problem = block_shape_of(arguments.subdiagonal, subdiagonal.shape);
    refuse_if_not_matching(arguments.right_side, right_side, arguments.subdiagonal, subdiagonal);
    // Both inputs and the solution. A file in Fortran order is twice in memory while it is converted; PCR keeps two
    // copies of A and b.
    const bool pcr = arguments.method == "pcr";
    const index copies_of_subdiagonal = pcr ? 3 : subdiagonal.fortran_order ? 2 : 1;
    refuse_if_too_large("solving this", {{subdiagonal.bytes, copies_of_subdiagonal}, {right_side.bytes, pcr ? 4 : 2}});
    return subdiagonal.float64 ? solve_files<double>(arguments, problem, output)
                               : solve_files<float>(arguments, problem, output);
}

template <class Value>
std::vector<std::string> names(const std::map<std::string, Value>& values) {
    std::vector<std::string> result;
    for (const auto& [name, value] : values) result.push_back(name);
    return result;
}

}  // namespace

void add_solve(Program& program) {
    const auto arguments = std::make_shared<SolveArguments>();
    CLI::App& command = program.add("solve", "Solve x_t = A_t x_{t-1} + b_t, t = 1..T, with x_0 = 0",
                                    "  deeppcr solve A.npy b.npy -o x.npy\n"
                                    "  deeppcr solve A.npy b.npy -o x.npy --method scan --threads 2 --json",
                                    [arguments](Output& output) { return run_solve(*arguments, output); });
    command.add_option("A", arguments->subdiagonal, "[T,B,D] diagonal, [T,B,D,D] dense or [T,B,D/K,K,K] blocks (.npy)")
        ->required();
    command.add_option("b", arguments->right_side, "[T,B,D] of the same element type, float32 or float64 (.npy)")
        ->required();
    command.add_option("-o,--output", arguments->solution, "Where x goes, [T,B,D]; not one of the inputs")->required();
    command.add_option("--method", arguments->method, "How to solve")
        ->check(CLI::IsMember(names(methods)))
        ->capture_default_str();
    command.add_option("--backend", arguments->backend, "Where to solve")
        ->check(CLI::IsMember(names(backends)))
        ->capture_default_str();
    command.add_option("--threads", arguments->threads, "Threads; 0: as many as there are processors")
        ->check(CLI::Range(0, 4096))
        ->capture_default_str();
    command.add_option("--chunk", arguments->chunk, "Steps per chunk of the scan; 0: chosen")
        ->check(CLI::Range(index(0), std::numeric_limits<index>::max()))
        ->capture_default_str();
    command.add_flag("--transposed", arguments->transposed, "Solve y_t = A_{t+1}^T y_{t+1} + b_t with y_{T+1} = 0");
}

}  // namespace deeppcr::program
