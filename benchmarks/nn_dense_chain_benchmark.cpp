// The sequential kernel of DenseChain against the same residual tanh network as LibTorch modules, layer by layer:
// x = x + tanh(Linear(x)). LibTorch runs with one and with all threads; the faster counts. All take turns, and medians
// are compared (the column Time holds a turn of all). The states and gradients of both are first compared.
//
//   forward   DenseChain::run against LibTorch without gradients
//   training  construction (the weights have changed), run_with_slopes and run_backward, against LibTorch's forward and
//             autograd's backward pass, for a loss of the last state
//
//   DEEPPCR_BENCHMARK_ELEMENTS  weights per case (default 256 Ki, at least 8 and at most 1,024 layers)
//   DEEPPCR_THREADS             threads of the chain, and most threads of LibTorch
#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include <deeppcr/dense_chain.hpp>

#include "measuring.hpp"

namespace {

using namespace deeppcr;
using namespace deeppcr::benchmarks;
using deeppcr::index;  // not strings.h's

View<float> view(const torch::Tensor& tensor) {
    return {tensor.data_ptr<float>(), {tensor.size(0), tensor.size(1), tensor.size(2)}};
}

/// The same network twice, on the same numbers.
struct Networks {
    index layers, batch, width;
    std::vector<torch::nn::Linear> modules;
    torch::Tensor weights, biases, states, slopes, output_gradient, weight_gradients, bias_gradients, initial_gradient;
    torch::Tensor input, gradient;
    std::vector<index> sequences;

    Networks(index layer_count, index batch_size, index size)
        : layers(layer_count), batch(batch_size), width(size), sequences(std::size_t(batch)) {
        torch::manual_seed(1);
        weights = torch::randn({layers, width, width}) * (1 / std::sqrt(double(width * layers)));
        biases = torch::randn({layers, 1, width}) * 0.1;
        states = torch::randn({layers + 1, batch, width});
        gradient = torch::randn({batch, width});
        slopes = torch::zeros({layers, batch, width});
        output_gradient = torch::zeros({layers, batch, width});
        output_gradient[layers - 1] = gradient;
        weight_gradients = torch::zeros_like(weights);
        bias_gradients = torch::zeros_like(biases);
        initial_gradient = torch::zeros({1, batch, width});
        input = states[0].clone().requires_grad_();
        const torch::NoGradGuard no_gradients;
        for (index layer = 0; layer < layers; ++layer) {
            modules.emplace_back(width, width);
            modules.back()->weight.copy_(weights[layer]);
            modules.back()->bias.copy_(biases[layer][0]);
        }
        std::iota(sequences.begin(), sequences.end(), 0);
    }

    DenseChain<float> chain() const {
        return {view(weights), view(biases), view(states).steps(0, 1), {Activation::tanh, 1}};
    }
    Section section() const { return {0, layers, sequences}; }

    void run(const DenseChain<float>& network) const {
        network.run(section(), view(states).steps(0, 1), view(states).steps(1, layers + 1));
    }
    void train() const {
        const DenseChain<float> network = chain();
        network.run_with_slopes(section(), view(states).steps(0, 1), view(states).steps(1, layers + 1), view(slopes));
        network.run_backward(section(), view(states).steps(0, layers), view(slopes), view(output_gradient),
                             view(weight_gradients), view(bias_gradients), {}, view(initial_gradient));
    }

    torch::Tensor torch_forward() {
        torch::Tensor x = input;
        for (auto& layer : modules) x = x + torch::tanh(layer->forward(x));
        return x;
    }
    void torch_run() {
        const torch::NoGradGuard no_gradients;
        benchmark::DoNotOptimize(torch_forward());
    }
    void torch_train() {
        for (auto& layer : modules) layer->zero_grad();
        input.mutable_grad() = torch::Tensor();
        torch_forward().backward(gradient);
    }

    /// Whether states and gradients of both agree.
    bool verified() {
        train();
        torch_train();
        const torch::NoGradGuard no_gradients;
        return torch::allclose(torch_forward(), states[layers], 1e-3, 1e-4) &&
               torch::allclose(input.grad(), initial_gradient[0], 1e-3, 1e-3) &&
               torch::allclose(modules[0]->weight.grad(), weight_gradients[0], 1e-3, 1e-3) &&
               torch::allclose(modules.back()->bias.grad(), bias_gradients[layers - 1][0], 1e-3, 1e-3);
    }
};

void measure(benchmark::State& state, bool training, index batch, index width) {
    const index elements = case_elements(index(1) << 18);
    Networks networks(std::clamp<index>(elements / (width * width), 8, 1024), batch, width);
    if (!networks.verified()) return state.SkipWithError("chain and LibTorch differ");

    const DenseChain<float> chain = networks.chain();
    const std::function<void()> ours = [&] { training ? networks.train() : networks.run(chain); };
    const std::function<void()> theirs = [&] { training ? networks.torch_train() : networks.torch_run(); };
    std::vector<double> chain_seconds;
    Times torch_seconds;
    for (auto _ : state) {
        chain_seconds.push_back(seconds(ours));
        torch::set_num_threads(1);
        torch_seconds[1].push_back(seconds(theirs));
        torch::set_num_threads(default_threads());
        torch_seconds[0].push_back(seconds(theirs));
    }
    const double fastest = best(torch_seconds);
    state.counters["layers"] = double(networks.layers);
    state.counters["us_per_layer"] = median(chain_seconds) / double(networks.layers) * 1e6;
    state.counters["LibTorch_us_per_layer"] = fastest / double(networks.layers) * 1e6;
    state.counters["times_faster"] = fastest / median(chain_seconds);
}

}  // namespace

int main(int argc, char** argv) {
    for (const bool training : {false, true})
        for (const deeppcr::index width : {4, 8, 16, 32, 64, 256})
            for (const deeppcr::index batch : {1, 8, 64})
                benchmark::RegisterBenchmark((std::string(training ? "training" : "forward") +
                                              "/width:" + std::to_string(width) + "/batch:" + std::to_string(batch))
                                                 .c_str(),
                                             measure, training, batch, width)
                    ->UseRealTime()
                    ->Unit(benchmark::kMillisecond);
    benchmark::AddCustomContext("simd", simd_target());
    benchmark::AddCustomContext("threads", std::to_string(default_threads()));
    benchmark::AddCustomContext("libtorch", TORCH_VERSION);
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
}
