// The sequential kernel of DenseCell against torch::nn::GRU and torch::nn::LSTM, one layer, one direction, inference,
// as many input features as hidden units. Both sides include the projection of the inputs, W_ih x + b_ih for all steps
// at once, which is LibTorch's product on both. LibTorch runs with one and with all threads; the faster counts. All
// take turns, and medians are compared (the column Time holds a turn of all). The states and gradients of both are
// first compared.
//
//   inference   DenseCell::run against LibTorch's layer without gradients
//   training    nn::dense_cell, sequential, and its backward pass, against LibTorch's layer and autograd's backward
//   pass,
//               for a loss of all outputs, with gradients of inputs, initial state and parameters
//
//   times_faster               LibTorch's time / ours, the projection included
//   with_packing               the same where the cell is also constructed: its weights are packed for one sequence
//   only us_per_step                of projection + run; LibTorch_us_per_step; projection_us_per_step
//
//   DEEPPCR_BENCHMARK_ELEMENTS  recurrent weights times steps per case (default: 256 steps)
//   DEEPPCR_THREADS             threads of the cell, and most threads of LibTorch
#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include <deeppcr/nn/dense_cell.hpp>

#include "measuring.hpp"

namespace {

using namespace deeppcr;
using namespace deeppcr::benchmarks;
using deeppcr::index;  // not strings.h's

/// The same layer twice, on the same numbers.
struct Layers {
    DenseCellKind kind;
    index steps, batch, hidden;
    torch::nn::GRU gru = nullptr;
    torch::nn::LSTM lstm = nullptr;
    torch::Tensor inputs, gates, initial, trajectory, gradient, weight_ih, weight_hh, bias_ih, bias_hh;
    std::vector<torch::Tensor> leaves;  // inputs and initial state, and the parameters
    std::vector<index> sequences;

    Layers(DenseCellKind which, index step_count, index batch_size, index size)
        : kind(which), steps(step_count), batch(batch_size), hidden(size), sequences(std::size_t(batch)) {
        torch::manual_seed(1);
        std::vector<torch::Tensor> parameters;
        if (kind == DenseCellKind::gru) {
            gru = torch::nn::GRU(hidden, hidden);
            parameters = gru->parameters();
        } else {
            lstm = torch::nn::LSTM(hidden, hidden);
            parameters = lstm->parameters();
        }
        weight_ih = parameters[0].detach();
        weight_hh = parameters[1].detach();
        bias_ih = parameters[2].detach();
        bias_hh = parameters[3].detach();
        inputs = torch::randn({steps, batch, hidden});
        initial = torch::randn({1, batch, state_width(kind, hidden)});
        trajectory = torch::zeros({steps, batch, state_width(kind, hidden)});
        std::iota(sequences.begin(), sequences.end(), 0);
        gradient = torch::randn({steps, batch, hidden});
        leaves = {inputs.clone().requires_grad_(), initial.clone().requires_grad_()};
        leaves.insert(leaves.end(), parameters.begin(), parameters.end());
        project();
    }

    void project() { gates = torch::linear(inputs, weight_ih, bias_ih); }

    DenseCell<float> cell() const {
        const index count = gate_count(kind);
        const auto view = [](const torch::Tensor& tensor, const Shape& shape) {
            return View<const float>(tensor.data_ptr<float>(), shape);
        };
        return {kind, view(gates, {steps, batch, count * hidden}), view(weight_hh, {count, hidden, hidden}),
                view(bias_hh, {count, 1, hidden}), view(initial, {1, batch, state_width(kind, hidden)})};
    }
    void run(const DenseCell<float>& cell) const {
        cell.run({0, steps, sequences}, {initial.data_ptr<float>(), {1, batch, state_width(kind, hidden)}},
                 {trajectory.data_ptr<float>(), cell.shape()});
    }

    torch::Tensor torch_forward(const torch::Tensor& layer_inputs, const torch::Tensor& state) {
        if (kind == DenseCellKind::gru) return std::get<0>(gru->forward(layer_inputs, state));
        const auto parts =
            std::make_tuple(state.slice(2, 0, hidden).contiguous(), state.slice(2, hidden, 2 * hidden).contiguous());
        return std::get<0>(lstm->forward(layer_inputs, parts));
    }
    torch::Tensor torch_run() {
        const torch::NoGradGuard no_gradients;
        return torch_forward(inputs, initial);
    }

    std::vector<torch::Tensor> train() const {
        nn::DenseCellOptions options;
        options.evaluation.method = Method::sequential;
        const torch::Tensor states = nn::dense_cell(kind, torch::linear(leaves[0], leaves[2], leaves[4]), leaves[3],
                                                    leaves[5], leaves[1][0], options);
        return torch::autograd::grad({states.slice(2, 0, hidden)}, leaves, {gradient});
    }
    std::vector<torch::Tensor> torch_train() {
        return torch::autograd::grad({torch_forward(leaves[0], leaves[1])}, leaves, {gradient});
    }

    bool verified() {
        run(cell());
        bool right = torch::allclose(torch_run(), trajectory.slice(2, 0, hidden), 1e-4, 1e-5);
        const auto ours = train(), theirs = torch_train();
        for (std::size_t i = 0; i < ours.size(); ++i) {
            const double size = theirs[i].abs().max().item<double>();
            right = right && (ours[i] - theirs[i]).abs().max().item<double>() <= 1e-4 * size;
        }
        return right;
    }
};

void measure(benchmark::State& state, bool training, DenseCellKind kind, index batch, index hidden) {
    const index per_step = gate_count(kind) * hidden * hidden;
    const index steps = std::clamp<index>(case_elements(256 * per_step) / per_step, 2, 256);
    Layers layers(kind, steps, batch, hidden);
    if (!layers.verified()) return state.SkipWithError("cell and LibTorch differ");

    Times projection, ours, packing, theirs;
    for (auto _ : state)
        for (const int one : {0, 1}) {
            torch::set_num_threads(one ? 1 : default_threads());
            if (training) {
                ours[one].push_back(seconds([&] { benchmark::DoNotOptimize(layers.train()); }));
                theirs[one].push_back(seconds([&] { benchmark::DoNotOptimize(layers.torch_train()); }));
                continue;
            }
            projection[one].push_back(seconds([&] { layers.project(); }));
            std::vector<DenseCell<float>> cell;
            cell.reserve(1);
            const double construction = seconds([&] { cell.push_back(layers.cell()); });
            ours[one].push_back(projection[one].back() + seconds([&] { layers.run(cell[0]); }));
            packing[one].push_back(construction + ours[one].back());
            theirs[one].push_back(seconds([&] { benchmark::DoNotOptimize(layers.torch_run()); }));
        }
    const double microseconds = 1e6 / double(steps);
    state.counters["us_per_step"] = best(ours) * microseconds;
    state.counters["LibTorch_us_per_step"] = best(theirs) * microseconds;
    state.counters["times_faster"] = best(theirs) / best(ours);
    if (training) return;
    state.counters["projection_us_per_step"] = best(projection) * microseconds;
    state.counters["with_packing"] = best(theirs) / best(packing);
}

}  // namespace

int main(int argc, char** argv) {
    for (const bool training : {false, true})
        for (const DenseCellKind kind : {DenseCellKind::gru, DenseCellKind::lstm})
            for (const deeppcr::index hidden : {16, 64, 256, 512})
                for (const deeppcr::index batch : {1, 16, 64})
                    benchmark::RegisterBenchmark((std::string(training ? "training" : "inference") +
                                                  (kind == DenseCellKind::gru ? "/gru" : "/lstm") + "/hidden:" +
                                                  std::to_string(hidden) + "/batch:" + std::to_string(batch))
                                                     .c_str(),
                                                 measure, training, kind, batch, hidden)
                        ->UseRealTime()
                        ->Unit(benchmark::kMillisecond);
    benchmark::AddCustomContext("simd", simd_target());
    benchmark::AddCustomContext("threads", std::to_string(default_threads()));
    benchmark::AddCustomContext("libtorch", TORCH_VERSION);
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
}
