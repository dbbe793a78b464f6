// How fast DenseChain's sequential kernels are: residual tanh networks, widths 4 to 1,024, batches 1 to 64, beside
// OpenBLAS' product of one layer's size, called once per layer with the same weights and threads. Chain and baseline
// take turns, and medians are compared (the column Time holds a turn of both). Cases up to width 64 are first verified
// against the reference backend.
//
//   forward    DenseChain::run
//   backward   DenseChain::run_backward with given slopes: two products per layer
//   linearise  DenseChain::linearise: bytes of Jacobians written
//   pack       the constructor
//
//   DEEPPCR_BENCHMARK_ELEMENTS  weights per case (default 256 Ki, at least 8 layers)
//   DEEPPCR_THREADS             threads of chain and baseline
#include <benchmark/benchmark.h>
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include <deeppcr/dense_chain.hpp>

#include "measuring.hpp"

extern "C" void openblas_set_num_threads(int threads);

namespace {

using namespace deeppcr;
using namespace deeppcr::benchmarks;

Buffer<float> random(const Shape& shape, std::uint64_t seed, float deviation) {
    auto numbers = Buffer<float>::random(shape, seed);
    for (index i = 0; i < numbers.size(); ++i) numbers.data()[i] *= deviation;
    return numbers;
}

struct Network {
    index layers, batch, width;
    Buffer<float> weights, biases;
    Buffer<float> states;  // x_0 .. x_T
    Buffer<float> slopes, output_gradient, weight_gradients, bias_gradients, initial_gradient, product;
    DenseChain<float> chain;
    std::vector<index> sequences;

    Network(index layer_count, index batch_size, index size)
        : layers(layer_count),
          batch(batch_size),
          width(size),
          weights(random({layers, width, width}, 1, 1 / std::sqrt(float(width * layers)))),
          biases(random({layers, 1, width}, 2, 0.1f)),
          states(Buffer<float>::random({layers + 1, batch, width}, 3)),
          slopes({layers, batch, width}),
          output_gradient(Buffer<float>::random({layers, batch, width}, 4)),
          weight_gradients({layers, width, width}),
          bias_gradients({layers, 1, width}),
          initial_gradient({1, batch, width}),
          product({1, batch, width}),
          chain(make()),
          sequences(std::size_t(batch)) {
        std::iota(sequences.begin(), sequences.end(), 0);
    }

    DenseChain<float> make() const { return {weights, biases, states.view().steps(0, 1), {Activation::tanh, 1}}; }
    Section section(Backend backend = Backend::cpu) const { return {0, layers, sequences, {backend}}; }
    View<float> trajectory() const { return states.view().steps(1, layers + 1); }
    View<float> before() const { return states.view().steps(0, layers); }

    void forward() { chain.run(section(), states.view().steps(0, 1), trajectory()); }
    void forward_with_slopes() { chain.run_with_slopes(section(), states.view().steps(0, 1), trajectory(), slopes); }
    void backward(Backend backend = Backend::cpu) {
        chain.run_backward(section(backend), before(), slopes, output_gradient, weight_gradients, bias_gradients, {},
                           initial_gradient);
    }
    /// The baseline: one product of the layer's size per layer, without bias or activation.
    void products() {
        for (index layer = 0; layer < layers; ++layer)
            cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(batch), int(width), int(width), 1, states.data(),
                        int(width), weights.view().at(layer, 0), int(width), 0, product.data(), int(width));
    }
};

double largest_difference(const Buffer<float>& a, const Buffer<float>& b) {
    double largest = 0;
    for (index i = 0; i < a.size(); ++i) {
        const double now = std::abs(double(a.data()[i]) - double(b.data()[i])) / (1 + std::abs(double(b.data()[i])));
        largest = now <= largest ? largest : now;  // keeps NaN
    }
    return largest;
}

bool verified(index batch, index width) {
    Network network(3, batch, width), reference(3, batch, width);
    network.forward_with_slopes();
    network.backward();
    reference.chain.run(reference.section(Backend::reference), reference.states.view().steps(0, 1),
                        reference.trajectory());
    reference.backward(Backend::reference);
    return largest_difference(network.states, reference.states) < 1e-4 &&
           largest_difference(network.weight_gradients, reference.weight_gradients) < 1e-3;
}

enum class What { forward, backward, linearise, pack };

void measure(benchmark::State& state, What what, index batch, index width) {
    if (width <= 64 && !verified(batch, width)) return state.SkipWithError("differs from the reference backend");
    const index elements = case_elements(index(1) << 18);
    Network network(std::clamp<index>(elements / (width * width), 8, 1024), batch, width);
    openblas_set_num_threads(default_threads());
    network.forward_with_slopes();
    Buffer<float> jacobians;
    if (what == What::linearise) jacobians = Buffer<float>({network.layers, batch * width, width});
    Buffer<float> after({network.layers, batch, width});

    const std::function<void()> bodies[] = {[&] { network.forward(); }, [&] { network.backward(); },
                                            [&] {
                                                network.chain.linearise(
                                                    network.section(), network.before(), after,
                                                    Jacobian<float>(jacobians.data(), after.shape(), width));
                                            },
                                            [&] { benchmark::DoNotOptimize(network.make()); }};
    const auto& body = bodies[int(what)];
    body();
    network.products();
    std::vector<double> ours, baseline;
    for (auto _ : state) {
        ours.push_back(seconds(body));
        baseline.push_back(seconds([&] { network.products(); }));
    }
    const double layers = double(network.layers), products = what == What::backward ? 2 : 1;
    const double flops = products * 2 * layers * double(batch * width * width);
    state.counters["us_per_layer"] = median(ours) / layers * 1e6;
    if (what == What::linearise)
        state.counters["GB_per_s"] = layers * double(batch * width * width) * sizeof(float) / median(ours) * 1e-9;
    if (what == What::forward || what == What::backward) {
        state.counters["GFlop_per_s"] = flops / median(ours) * 1e-9;
        state.counters["OpenBLAS_GFlop_per_s"] = flops / products / median(baseline) * 1e-9;
        state.counters["of_OpenBLAS"] = products * median(baseline) / median(ours);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const auto add = [](const char* name, What what, index batch, index width) {
        benchmark::RegisterBenchmark(
            (std::string(name) + "/width:" + std::to_string(width) + "/batch:" + std::to_string(batch)).c_str(),
            measure, what, batch, width)
            ->UseRealTime()
            ->Unit(benchmark::kMillisecond);
    };
    for (const index width : {4, 8, 16, 32, 64, 256, 1024})
        for (const index batch : {1, 8, 64}) {
            add("forward", What::forward, batch, width);
            add("backward", What::backward, batch, width);
            if (width <= 64) add("linearise", What::linearise, batch, width);
        }
    for (const index width : {16, 256}) add("pack", What::pack, 1, width);
    benchmark::AddCustomContext("simd", simd_target());
    benchmark::AddCustomContext("threads", std::to_string(default_threads()));
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
}
