// What the kernels take of a GPU, and what is aimed at: a program of its own, without Google Benchmark, so that it can
// be carried to a machine that has only a driver (see ../gpu.sh).
//
//   gpu_benchmark PART [--json FILE] [--tiny]   measures: first, solves, cells, map or chains
//   gpu_benchmark table FILE...                 the table of all that the files have, in Markdown
//   gpu_benchmark gpu                           the GPU's name, or why there is none (exit code 1)
//
// Every case is verified before it is timed; a case and its baseline take turns, and medians are compared. Seconds are
// those of the GPU, between events around a call as a user makes it. The roofline is that of the copy and of
// multiplications and additions in float, measured in the same run; it counts what must be moved and done, each once.
#include <fstream>
#include <iostream>

#include "measuring.cuh"

namespace deeppcr::benchmark {
namespace {

constexpr const char* usage =
    "usage: gpu_benchmark first|solves|cells|map|chains [--json FILE] [--tiny]\n"
    "       gpu_benchmark table FILE...\n"
    "       gpu_benchmark gpu";

int print_table(const std::vector<std::string>& files) {
    std::vector<Json> parts;
    for (const std::string& file : files) {
        std::ifstream in(file);
        if (!in) throw Error(file + " cannot be read");
        parts.push_back(Json::parse(in));
    }
    std::cout << table(parts);
    return 0;
}

int print_gpu() {
    if (!cuda_problem().empty()) throw NoDevice(cuda_problem());
    std::cout << cuda_devices().front() << '\n';
    return 0;
}

int run(const std::vector<std::string>& arguments) {
    const std::vector<std::pair<std::string, void (*)(Results&)>> parts{{"first", measure_first},
                                                                        {"solves", measure_solves},
                                                                        {"cells", measure_cells},
                                                                        {"map", measure_map},
                                                                        {"chains", measure_chains}};
    if (arguments.empty()) throw Error(usage);
    if (arguments[0] == "table") return print_table({arguments.begin() + 1, arguments.end()});
    if (arguments[0] == "gpu" && arguments.size() == 1) return print_gpu();
    const auto part = std::find_if(parts.begin(), parts.end(), [&](const auto& p) { return p.first == arguments[0]; });
    bool tiny = false;
    std::string file;
    for (std::size_t i = 1; i < arguments.size(); ++i) {
        if (arguments[i] == "--tiny")
            tiny = true;
        else if (arguments[i] == "--json" && i + 1 < arguments.size())
            file = arguments[++i];
        else
            throw Error(usage);
    }
    if (part == parts.end()) throw Error(usage);
    if (!cuda_problem().empty()) throw NoDevice(cuda_problem());
    Results results(part->first, file, tiny);
    measure_ceilings(results);
    part->second(results);
    return results.failed() ? 1 : 0;
}

}  // namespace
}  // namespace deeppcr::benchmark

int main(int argc, char** argv) {
    try {
        return deeppcr::benchmark::run({argv + 1, argv + argc});
    } catch (const std::exception& error) {
        std::cerr << "gpu_benchmark: " << error.what() << '\n';
        return 1;
    }
}
