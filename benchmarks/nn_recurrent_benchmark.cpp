// DIAGONAL AGAINST DENSE CELL: the recurrent modules ParaGRU and ParaLSTM, sequential method, against torch::nn::GRU
// and torch::nn::LSTM of the same hidden size, as many input features. They compute different networks: ours have
// diagonal recurrent weights, theirs full ones. Both sides include the projection of the inputs. LibTorch runs with one
// and with all threads; the faster counts, on both sides. All take turns, and medians are compared. First the module's
// states are compared with those of Newton's method.
//
//   times_faster, us_per_step, LibTorch_us_per_step     of projection + recurrence, inference
//   training_times_faster                               forward and backward pass, gradients of inputs and parameters
//   recurrence_times_faster                             the same as times_faster, without the projection on our side
//                                                       and without the projection's time on theirs
//
//   DEEPPCR_BENCHMARK_ELEMENTS  hidden units times sequences times steps per case (default: 256 steps)
#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include <algorithm>
#include <string>

#include <deeppcr/nn/recurrent.hpp>

#include "measuring.hpp"

namespace {

using namespace deeppcr;
using namespace deeppcr::benchmarks;
using deeppcr::index;  // not strings.h's

template <class Ours, class Theirs>
void measure(benchmark::State& state, nn::CellKind kind, index batch, index hidden) {
    const index per_step = hidden * batch;
    const index steps = std::clamp<index>(case_elements(256 * per_step) / per_step, 2, 256);
    torch::manual_seed(1);
    Ours ours(nn::RecurrentOptions(hidden, hidden).batch_first(false));
    Theirs theirs(hidden, hidden);
    const torch::Tensor inputs = torch::randn({steps, batch, hidden});
    const auto evaluate_by = [&](Method method) {
        Options options;
        options.method = method;
        options.tolerance = 1e-6;
        ours->options.evaluation(options);
        const torch::NoGradGuard no_gradients;
        return std::get<0>(ours(inputs));
    };
    const torch::Tensor newton = evaluate_by(Method::newton), sequential = evaluate_by(Method::sequential);
    if (!torch::allclose(newton, sequential, 1e-4, 1e-4))
        return state.SkipWithError("sequential method and Newton's method differ");

    const auto parameters = ours->named_parameters();
    const torch::Tensor weight = parameters["weight_ih_l0"].detach(), bias = parameters["bias_ih_l0"].detach(),
                        recurrent = parameters["parameters_l0"].detach(),
                        their_weight = theirs->parameters()[0].detach(), their_bias = theirs->parameters()[2].detach();
    const auto train = [&](auto& module) {
        const torch::Tensor leaf = inputs.clone().requires_grad_();
        auto leaves = module->parameters();
        leaves.push_back(leaf);
        benchmark::DoNotOptimize(torch::autograd::grad({std::get<0>(module->forward(leaf)).sum()}, leaves));
    };
    Times our_times, their_times, our_training, their_training, our_recurrence, their_projection;
    for (auto _ : state)
        for (const int one : {0, 1}) {
            torch::set_num_threads(one ? 1 : default_threads());
            our_training[one].push_back(seconds([&] { train(ours); }));
            their_training[one].push_back(seconds([&] { train(theirs); }));
            const torch::NoGradGuard no_gradients;
            our_times[one].push_back(seconds([&] { benchmark::DoNotOptimize(ours(inputs)); }));
            their_times[one].push_back(seconds([&] { benchmark::DoNotOptimize(theirs(inputs)); }));
            const torch::Tensor gates = torch::linear(inputs, weight, bias);
            nn::CellOptions options;
            options.evaluation.method = Method::sequential;
            our_recurrence[one].push_back(
                seconds([&] { benchmark::DoNotOptimize(nn::cell(kind, gates, recurrent, {}, options)); }));
            their_projection[one].push_back(
                seconds([&] { benchmark::DoNotOptimize(torch::linear(inputs, their_weight, their_bias)); }));
        }
    const double microseconds = 1e6 / double(steps);
    state.counters["us_per_step"] = best(our_times) * microseconds;
    state.counters["LibTorch_us_per_step"] = best(their_times) * microseconds;
    state.counters["times_faster"] = best(their_times) / best(our_times);
    state.counters["training_times_faster"] = best(their_training) / best(our_training);
    state.counters["recurrence_times_faster"] = (best(their_times) - best(their_projection)) / best(our_recurrence);
}

}  // namespace

int main(int argc, char** argv) {
    for (const deeppcr::index hidden : {16, 64, 256, 512})
        for (const deeppcr::index batch : {1, 16, 64}) {
            const std::string sizes = "/hidden:" + std::to_string(hidden) + "/batch:" + std::to_string(batch);
            const auto add = [&](const std::string& name, const auto& function, deeppcr::nn::CellKind kind) {
                benchmark::RegisterBenchmark(("diagonal_against_dense/" + name + sizes).c_str(), function, kind, batch,
                                             hidden)
                    ->UseRealTime()
                    ->Unit(benchmark::kMillisecond);
            };
            add("ParaGRU_against_GRU", measure<deeppcr::nn::ParaGRU, torch::nn::GRU>, deeppcr::nn::CellKind::para_gru);
            add("ParaLSTM_against_LSTM", measure<deeppcr::nn::ParaLSTM, torch::nn::LSTM>,
                deeppcr::nn::CellKind::para_lstm);
        }
    benchmark::AddCustomContext("simd", deeppcr::simd_target());
    benchmark::AddCustomContext("threads", std::to_string(deeppcr::default_threads()));
    benchmark::AddCustomContext("libtorch", TORCH_VERSION);
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
}
