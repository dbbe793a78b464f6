// Where and how a call runs: the backend, the number of threads, and what this build and machine offer.
#pragma once

#include <string>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr {

/// reference: plain loops, for checking by hand. cpu: threads and SIMD. cuda: the current GPU, whose memory all arrays
/// must lie in.
enum class Backend { reference, cpu, cuda };

/// How a call is executed. Results depend on nothing here but the backend, the thread count where a function says
/// so, and the SIMD target (see `simd_target`); on a GPU, where methods or chunks are chosen, also on its number of
/// multiprocessors. What learns from earlier calls (the `automatic` method and the chunks of cells) says so.
struct Execution {
    Backend backend = Backend::cpu;
    int threads = 0;                ///< 0: `default_threads()`; not for cuda
    CUstream_st* stream = nullptr;  ///< cuda: a cudaStream_t; calls return before its work is done where they say so
};

namespace detail {
/// Where the arrays of a call lie. Throws NoDevice.
Device device_of(const Execution& execution);
}  // namespace detail

/// Threads that a call with `threads == 0` uses: DEEPPCR_THREADS from the environment, else the processors this
/// process may run on.
int default_threads();

/// Name of the SIMD instruction set in use ("AVX3", "AVX2", "SSE4", "SCALAR"). DEEPPCR_SIMD in the environment caps it:
/// one of the names of `simd_targets()`.
std::string simd_target();
/// Instruction sets that were compiled in and that this machine can run, best first.
std::vector<std::string> simd_targets();

/// GPUs that Backend::cuda can run on, by name, in the order of their ordinals.
std::vector<std::string> cuda_devices();
/// Why there are none: built without CUDA, no driver, ...; empty where there are.
std::string cuda_problem();

/// "0.1.0"
std::string version();

}  // namespace deeppcr
