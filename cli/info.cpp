// deeppcr info: what this build and this machine offer.
#include <fstream>
#include <memory>

#include <deeppcr/execution.hpp>
#include <files/idx.hpp>

#include "command.hpp"

namespace deeppcr::program {
namespace {

#if defined(__clang__)
constexpr const char* compiler = "Clang " __clang_version__;
#else
constexpr const char* compiler = "GCC " __VERSION__;
#endif

/// The libraries that this process has loaded, each by its real path.
struct LoadedLibraries {
    std::string blas, libtorch;  ///< empty where not loaded

    LoadedLibraries() {
        std::ifstream maps("/proc/self/maps");
        for (std::string line; std::getline(maps, line);) {
            const std::size_t begin = line.find('/');
            if (begin == std::string::npos) continue;
            const std::string path = line.substr(begin), name = path.substr(path.rfind('/') + 1);
            // An optimised library has its own name, or lies under the name libblas.so in a folder of its own.
            const bool named = name.starts_with("libopenblas") || name.starts_with("libmkl_rt") ||
                               name.starts_with("libblis") || name.starts_with("libmkl_core");
            if (named || (blas.empty() && name.starts_with("libblas"))) blas = path;
            if (name.starts_with("libtorch_cpu")) libtorch = path;
        }
    }

    bool slow() const {
        for (const char* fast : {"openblas", "mkl", "blis", "atlas"})
            if (blas.find(fast) != std::string::npos) return false;
        return !blas.empty();
    }
};

std::string joined(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text;
}

Exit run_info(const std::string& data, Output& output) {
    std::string found, missing;
    try {
        found = files::find_fashion_mnist(data).string();
    } catch (const FileError& error) {
        // A folder that the user named must be right; that the package is not installed is only worth knowing.
        if (!data.empty()) throw;
        missing = error.what();
    }
    const LoadedLibraries loaded;
    const auto tell = [&](const char* label, const char* key, const std::string& text, const Json& value) {
        output.line(std::string(label) + std::string(18 - std::string(label).size(), ' ') + text);
        output.result[key] = value;
    };
    const auto tell_text = [&](const char* label, const char* key, const std::string& text) {
        tell(label, key, text, text);
    };
    tell_text("version", "version", version());
    tell_text("compiler", "compiler", compiler);
    std::vector<std::string> backends{"cpu", "reference"};
    const std::vector<std::string> gpus = cuda_devices();
    if (!gpus.empty()) backends.emplace_back("cuda");
    tell("backends", "backends", joined(backends), backends);
    tell("GPUs", "gpus", gpus.empty() ? "none: " + cuda_problem() : joined(gpus), gpus);
    tell_text("SIMD in use", "simd_target", simd_target());
    tell("SIMD available", "simd_targets", joined(simd_targets()), simd_targets());
    tell("threads", "threads", std::to_string(default_threads()), default_threads());
    tell("memory available", "memory_available", std::to_string(available_memory() >> 20) + " MiB", available_memory());
    tell("LibTorch", "libtorch", loaded.libtorch.empty() ? "not loaded" : loaded.libtorch,
         loaded.libtorch.empty() ? Json() : Json(loaded.libtorch));
    tell("BLAS", "blas", loaded.blas.empty() ? "not loaded" : loaded.blas,
         loaded.blas.empty() ? Json() : Json(loaded.blas));
    tell("Fashion-MNIST", "fashion_mnist", found.empty() ? missing : found, found.empty() ? Json() : Json(found));
    warn_about_slow_blas(output);
    return Exit::done;
}

}  // namespace

void warn_about_slow_blas(Output& output) {
    const LoadedLibraries loaded;
    if (!loaded.libtorch.empty() && loaded.slow())
        output.warn("LibTorch runs on the reference BLAS (" + loaded.blas +
                    "), about 20 times slower than OpenBLAS: `apt-get install libopenblas0-pthread`");
}

void add_info(Program& program) {
    const auto data = std::make_shared<std::string>();
    CLI::App& command = program.add("info", "Version, backends, GPUs, SIMD, threads, memory, libraries and data found",
                                    "  deeppcr info", [data](Output& output) { return run_info(*data, output); });
    command.add_option("--data", *data, "Folder of Fashion-MNIST (default: DEEPPCR_DATA, else Debian's package)");
}

}  // namespace deeppcr::program
