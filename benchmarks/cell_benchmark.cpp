// Cells: every method over steps x channels, verified against step after step first. All methods of a case take turns,
// at least seven times after one turn to warm up, and medians are compared, so that a ratio does not depend on when it
// was taken.
//
//   DEEPPCR_BENCHMARK_ELEMENTS  steps x channels of the largest cases (default 4 Mi)
//   DEEPPCR_THREADS             threads
//
// Counters: ns_per_element and the times of the other methods divided by that of `sequential`'s (x_...: times faster);
// `best_over_automatic`: the fastest method's time divided by automatic's, 1 being the best that a choice can do.
// Weights: recurrent coefficients N(0, 0.25), as initialised, or scaled by 4 ("strong"), which leaves the gates far
// from linear; the inputs are N(0, 1).
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <deeppcr/deeppcr.hpp>

#include "measuring.hpp"

namespace {

using namespace deeppcr;
using namespace deeppcr::benchmarks;

constexpr index usual_elements = index(4) << 20;
constexpr int least_turns = 7;
constexpr double least_seconds = 0.3;  // of all turns of a case

template <class C>
void run_methods(benchmark::State& state, index steps, index channels, float scale, bool backward) {
    const auto inputs = Buffer<float>::random({steps, 1, channels * C::inputs}, 1);
    const auto parameters = Buffer<float>::random({C::parameters, 1, channels}, 2);
    for (index i = 0; i < parameters.size(); ++i) parameters.data()[i] *= scale;
    const CellRecurrence<C> recurrence(inputs, parameters);
    const Buffer<float> trajectory(recurrence.shape());
    const std::vector<Method> methods{Method::sequential, Method::overlap, Method::shooting, Method::automatic};

    const auto expected = evaluate(recurrence, {.method = Method::sequential});
    for (const Method method : methods) {
        const Report report = evaluate(recurrence, trajectory.view(), {.method = method, .tolerance = 1e-5});
        if (!report.ok()) return state.SkipWithError("a method did not converge");
        double worst = 0, size = 0;
        for (index i = 0; i < trajectory.size(); ++i) {
            worst = std::max(worst, std::abs(double(trajectory.data()[i]) - double(expected.trajectory.data()[i])));
            size = std::max(size, std::abs(double(expected.trajectory.data()[i])));
        }
        if (!(worst <= 1e-3 * size)) return state.SkipWithError("a method is wrong");
    }
    std::vector<std::vector<double>> seconds(methods.size());
    const auto gradient = Buffer<float>::random(recurrence.shape(), 3);
    const auto run = [&](Method method) {
        const auto begin = Clock::now();
        if (backward)
            benchmark::DoNotOptimize(
                adjoint(recurrence, expected.trajectory.view(), expected.report, gradient.view(), {.method = method}));
        else
            benchmark::DoNotOptimize(evaluate(recurrence, trajectory.view(), {.method = method, .tolerance = 1e-5}));
        return seconds_since(begin);
    };
    for (const Method method : methods) run(method);
    for (auto iteration : state) {
        (void)iteration;
        double total = 0;
        for (int turn = 0; turn < least_turns || total < least_seconds; ++turn)
            for (std::size_t m = 0; m < methods.size(); ++m) {
                seconds[m].push_back(run(methods[m]));
                total += seconds[m].back();
            }
        state.SetIterationTime(total / double(seconds[0].size()));
    }
    std::vector<double> medians;
    for (const auto& of_method : seconds) medians.push_back(median(of_method));
    const double elements = double(steps) * double(channels);
    for (std::size_t m = 0; m < methods.size(); ++m) {
        state.counters["ns_" + to_string(methods[m])] = medians[m] / elements * 1e9;
        if (m > 0) state.counters["x_" + to_string(methods[m])] = medians[0] / medians[m];
    }
    state.counters["turns"] = double(seconds[0].size());
    state.counters["best_over_automatic"] = *std::min_element(medians.begin(), medians.end() - 1) / medians.back();
}

template <class C>
void add(index steps, index channels, float scale = 0.5F, bool backward = false) {
    steps = std::max<index>(2, std::min(steps, case_elements(usual_elements) / channels));
    const std::string name = std::string(C::name) + (backward ? "/backward" : "/forward") +
                             (scale > 1 ? "/strong" : "") + "/steps:" + std::to_string(steps) +
                             "/channels:" + std::to_string(channels);
    benchmark::RegisterBenchmark(
        name.c_str(), [=](benchmark::State& state) { run_methods<C>(state, steps, channels, scale, backward); })
        ->UseManualTime()
        ->Iterations(1)
        ->Unit(benchmark::kMicrosecond);
}

template <class C>
void add_all() {
    add<C>(index(1) << 20, 1);
    add<C>(index(1) << 20, 1, 2);
    add<C>(index(1) << 20, 1, 0.5F, true);
    add<C>(4096, 1024);
    add<C>(4096, 1024, 0.5F, true);
    for (index steps = 64; steps <= (index(1) << 20); steps *= 4)
        for (index channels = 1; channels <= 4096; channels *= 4)
            if (steps * channels <= case_elements(usual_elements)) add<C>(steps, channels);
}

}  // namespace

int main(int argc, char** argv) {
    benchmark::AddCustomContext("simd_target", simd_target());
    benchmark::AddCustomContext("threads", std::to_string(default_threads()));
    add_all<ParaGRU>();
    add_all<ParaLSTM>();
    add<DiagonalElman>(index(1) << 20, 1);
    add<SLSTM>(index(1) << 20, 1);
    add<DiagonalElman>(4096, 1024);
    add<SLSTM>(4096, 1024);
    benchmark::Initialize(&argc, argv);
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}
