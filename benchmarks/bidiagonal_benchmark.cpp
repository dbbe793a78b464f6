// How fast the bidiagonal solvers are, as fractions of what the machine can do with the same threads: of a
// non-temporal triad x = s a + b that moves the same bytes, and of OpenBLAS' matrix product where products bound.
// Baseline and solver take turns within each measurement, and medians are compared, so that a ratio does not depend on
// when it was taken. Every case is first verified on a small size.
//
//   DEEPPCR_BENCHMARK_ELEMENTS  elements of A per case (default 64 Mi)
//   DEEPPCR_THREADS             threads of solver and baselines
#include <benchmark/benchmark.h>
#include <cblas.h>
#include <emmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include <deeppcr/bidiagonal.hpp>

#include "device/threads.hpp"
#include "measuring.hpp"

extern "C" void openblas_set_num_threads(int threads);

namespace {

using namespace deeppcr;
using namespace deeppcr::benchmarks;

constexpr index usual_elements = index(64) << 20;

/// Uniform numbers in [low, high): fast, and the same for every thread count.
void fill(float* data, index count, float low, float high) {
    device::parallel_ranges(default_threads(), count, 1 << 16, [&](index first, index last) {
        for (index i = first; i < last; ++i) {
            std::uint64_t bits = std::uint64_t(i) * 0x9e3779b97f4a7c15u;
            bits = (bits ^ bits >> 29) * 0xbf58476d1ce4e5b9u;
            data[i] = low + (high - low) * float(bits >> 40) * 0x1p-24f;
        }
    });
}

/// x = s a + b past the caches: the baseline for memory. count is a multiple of 4.
void triad(const float* a, const float* b, float* x, index count) {
    device::parallel_ranges(default_threads(), count, 1024, [&](index first, index last) {
        const __m128 s = _mm_set1_ps(0.5f);
        for (index i = first; i + 4 <= last; i += 4)
            _mm_stream_ps(x + i, _mm_add_ps(_mm_mul_ps(_mm_load_ps(a + i), s), _mm_load_ps(b + i)));
        _mm_sfence();
    });
}

enum class Bound { memory, products };

struct Case {
    std::string name;
    index batch, width, block;
    index steps = 0;  ///< 0: as many as give the elements of a case
    Reduction method = Reduction::automatic;
    bool transposed = false;
    Layout layout = Layout::steps_first;
    index chunk = 0;
};

struct System {
    Shape shape;
    Buffer<float> factors, right_side, solution;
    BidiagonalSystem<float> view;
    SolveOptions options;
    bool transposed;

    System(const Case& c, index elements)
        : shape{c.steps > 0 ? c.steps : std::max<index>(2, elements / (c.batch * c.width * c.block)), c.batch, c.width},
          factors(Buffer<float>::uninitialised({shape.steps, c.batch, c.width * c.block}, c.layout)),
          right_side(Buffer<float>::uninitialised(shape, c.layout)),
          solution(shape, c.layout),
          view{Jacobian<const float>(factors.data(), shape, c.block, c.layout), right_side},
          options{.method = c.method, .chunk = c.chunk},
          transposed(c.transposed) {
        // Products neither grow nor vanish within a few steps.
        const float size = c.block == 1 ? 1.0f : 1.5f / std::sqrt(float(c.block));
        fill(factors.data(), factors.size(), c.block == 1 ? 0.9f : -size, size);
        fill(right_side.data(), right_side.size(), -1, 1);
    }
    void solve() { solve(solution, options); }
    void solve(View<float> x, const SolveOptions& how) {
        transposed ? solve_transposed(view, x, how) : deeppcr::solve(view, x, how);
    }
};

/// Compares a small system of this kind with the reference backend's substitution.
bool verified(const Case& c) {
    Case small = c;
    small.steps = std::clamp<index>(100'000 / (c.batch * c.width * c.block), 3, 20'000);
    if (small.chunk > 0) small.chunk = std::max<index>(1, small.steps / 5);
    System system(small, 0);
    system.solve();
    Buffer<float> expected(system.shape, c.layout);
    system.solve(expected, {.method = Reduction::sequential, .execution = {.backend = Backend::reference}});
    double error = 0, size = 0;
    for (index i = 0; i < expected.size(); ++i) {
        const double now = std::abs(double(system.solution.data()[i]) - double(expected.data()[i]));
        error = now <= error ? error : now;  // keeps NaN
        size = std::max(size, std::abs(double(expected.data()[i])));
    }
    if (error <= 1e-4 * size) return true;
    std::fprintf(stderr, "%s: wrong, error %g of %g\n", c.name.c_str(), error, size);
    return false;
}

/// Multiplications and additions that the method does.
double operations(const Case& c, const Shape& shape) {
    const double per_step = double(shape.batch * shape.width) * 2, block = double(c.block);
    const double steps = double(shape.steps);
    if (c.method == Reduction::pcr) {
        double total = 0;
        for (double distance = 1; distance < steps; distance *= 2)
            total += per_step * block * (steps - distance + block * std::max(0.0, steps - 2 * distance));
        return total;
    }
    if (c.method == Reduction::scan && c.chunk > 0)
        return per_step * block * ((2 + block) * std::max(0.0, steps - 2 * double(c.chunk)) + 2 * double(c.chunk));
    return per_step * block * steps;
}

void measure(benchmark::State& state, const Case& c, Bound bound) {
    System system(c, case_elements(usual_elements));
    const index triad_count = std::min(system.factors.size(), index(64) << 20) / 4 * 4;
    auto a = Buffer<float>::uninitialised({triad_count, 1, 1}), b = Buffer<float>::uninitialised({triad_count, 1, 1}),
         x = Buffer<float>::uninitialised({triad_count, 1, 1});
    fill(a.data(), triad_count, 0, 1);
    fill(b.data(), triad_count, 0, 1);
    fill(x.data(), triad_count, 0, 1);
    constexpr int n = 1024;
    const auto gemm = [&] {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1, a.data(), n, b.data(), n, 0, x.data(), n);
    };
    const bool with_gemm = bound == Bound::products && triad_count >= index(n) * n;

    system.solve();  // warm up
    std::vector<double> solves, triads, gemms;
    for (auto _ : state) {
        triads.push_back(seconds([&] { triad(a.data(), b.data(), x.data(), triad_count); }));
        if (with_gemm) gemms.push_back(seconds(gemm));
        solves.push_back(seconds([&] { system.solve(); }));
        state.SetIterationTime(solves.back());
    }
    const double time = median(solves), bytes = double(system.factors.size() + 2 * system.right_side.size()) * 4;
    const double triad_rate = double(triad_count) * 12 / median(triads);
    const double flops = operations(c, system.shape);
    state.counters["GB/s"] = bytes / time / 1e9;
    state.counters["triad_GB/s"] = triad_rate / 1e9;
    state.counters["of_triad"] = bytes / time / triad_rate;
    state.counters["GFLOP/s"] = flops / time / 1e9;
    if (with_gemm) {
        const double gemm_rate = 2.0 * n * n * n / median(gemms);
        state.counters["gemm_GFLOP/s"] = gemm_rate / 1e9;
        state.counters["of_gemm"] = flops / time / gemm_rate;
    }
    state.counters["threads"] = default_threads();
}

std::vector<std::pair<Case, Bound>> cases() {
    std::vector<std::pair<Case, Bound>> all;
    const auto memory = [&](Case c) { all.emplace_back(std::move(c), Bound::memory); };
    const auto products = [&](Case c) { all.emplace_back(std::move(c), Bound::products); };
    for (const index width : {65536, 16384, 4096, 1024, 256, 64, 37, 16, 15, 8, 3, 2, 1})
        memory({.name = "diagonal/channels:" + std::to_string(width), .batch = 1, .width = width, .block = 1});
    memory({.name = "diagonal/channels:65536/transposed", .batch = 1, .width = 65536, .block = 1, .transposed = true});
    memory({.name = "diagonal/channels:64/transposed", .batch = 1, .width = 64, .block = 1, .transposed = true});
    memory({.name = "diagonal/channels:1/transposed", .batch = 1, .width = 1, .block = 1, .transposed = true});
    memory({.name = "diagonal/[B,T,D]/64x1", .batch = 64, .width = 1, .block = 1, .layout = Layout::batch_first});
    memory({.name = "diagonal/[B,T,D]/64x64", .batch = 64, .width = 64, .block = 1, .layout = Layout::batch_first});
    memory({.name = "diagonal/[B,T,D]/8x1024", .batch = 8, .width = 1024, .block = 1, .layout = Layout::batch_first});
    memory({.name = "diagonal/channels:1/sequential",
            .batch = 1,
            .width = 1,
            .block = 1,
            .method = Reduction::sequential});
    const auto square = [](index block) { return std::to_string(block) + "x" + std::to_string(block); };
    for (const bool transposed : {false, true})
        for (const index sequences : {4096, 256})
            for (const index block : {2, 3, 4, 5, 8, 13, 16, 17, 32, 64})
                products({.name = "dense/" + square(block) + "/sequences:" + std::to_string(sequences) +
                                  (transposed ? "/transposed" : ""),
                          .batch = sequences,
                          .width = block,
                          .block = block,
                          .transposed = transposed});
    for (const index block : {4, 16, 32})
        products({.name = "dense/" + square(block) + "/[B,T,D]/sequences:64",
                  .batch = 64,
                  .width = block,
                  .block = block,
                  .layout = Layout::batch_first});
    for (const Reduction method : {Reduction::pcr, Reduction::scan})
        for (const index block : {4, 8, 16, 17, 32, 64})
            products({.name = (method == Reduction::pcr ? "pcr/" : "scan/") + square(block) + "/sequences:1",
                      .batch = 1,
                      .width = block,
                      .block = block,
                      .steps = std::clamp<index>(case_elements(usual_elements) / 16 / (block * block), 16, 1 << 14),
                      .method = method,
                      .chunk = method == Reduction::scan ? index(64) : 0});
    return all;
}

}  // namespace

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);
    openblas_set_num_threads(default_threads());
    for (const auto& [c, bound] : cases()) {
        if (!verified(c)) return 1;
        benchmark::RegisterBenchmark(c.name.c_str(),
                                     [c = c, bound = bound](benchmark::State& state) { measure(state, c, bound); })
            ->UseManualTime()
            ->Unit(benchmark::kMillisecond);
    }
    benchmark::RunSpecifiedBenchmarks();
    return 0;
}
