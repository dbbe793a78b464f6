// One long series: a diode clipper (the circuit of a distortion pedal, a stiff differential equation) is simulated over
// a long signal; a small recurrent network learns to imitate it from the first part and then runs over all of it at
// once, step after step and in parallel over time.
//
//     long_series [steps, default 262144]
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <utility>
#include <vector>

#include <deeppcr/nn/recurrent.hpp>

namespace {

using deeppcr::Method;
namespace nn = deeppcr::nn;

double seconds_of(const std::function<void()>& body) {
    std::vector<double> times;
    for (int i = 0; i < 5; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        body();
        times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

/// The voltage v behind a resistor, across a capacitor and two diodes: C v' = (u - v) / R - 2 I sinh(v / V), sampled at
/// 48 kHz; each step by the implicit trapezoidal rule, solved by Newton's method to 1e-9 volts.
std::vector<float> clip(const std::vector<float>& input) {
    constexpr double resistance = 2200, capacity = 10e-9, leakage = 2.52e-9, thermal = 45.3e-3, step = 1.0 / 48000;
    const auto slope = [&](double v, double u) {
        return ((u - v) / resistance - 2 * leakage * std::sinh(v / thermal)) / capacity;
    };
    std::vector<float> output;
    double v = 0, before = 0;
    for (const float u : input) {
        const double start = v, known = slope(v, before);
        for (int i = 0; i < 50; ++i) {
            const double residual = v - start - step / 2 * (known + slope(v, u));
            const double derivative =
                1 + step / (2 * capacity) * (1 / resistance + 2 * leakage / thermal * std::cosh(v / thermal));
            const double change = residual / derivative;
            v -= change;
            if (std::abs(change) < 1e-9) break;
        }
        before = u;
        output.push_back(float(v));
    }
    return output;
}

/// Notes of random pitch and loudness, half a second each.
std::vector<float> melody(long steps) {
    torch::manual_seed(1);
    std::vector<float> signal;
    double phase = 0;
    double frequency = 0, loudness = 0;
    for (long t = 0; t < steps; ++t) {
        if (t % 24000 == 0) {
            frequency = 80 * std::pow(2.0, 4 * torch::rand({1}).item<double>());
            loudness = 0.2 + 4.5 * torch::rand({1}).item<double>();
        }
        phase += 2 * M_PI * frequency / 48000;
        const double decay = std::exp(-double(t % 24000) / 12000);
        signal.push_back(float(loudness * decay * (std::sin(phase) + 0.5 * std::sin(2.01 * phase))));
    }
    return signal;
}

struct Model : torch::nn::Module {
    Model()
        : cell(register_module("cell", nn::ParaGRU(nn::ParaGRUOptions(1, 8).seed(1)))),
          head(register_module("head", torch::nn::Linear(8, 1))) {}
    torch::Tensor forward(const torch::Tensor& input) { return head(std::get<0>(cell(input))); }
    nn::ParaGRU cell;
    torch::nn::Linear head;
};

torch::Tensor tensor_of(const std::vector<float>& values) {
    return torch::tensor(values).view({1, std::int64_t(values.size()), 1});
}

/// Squared error as a fraction of the signal's power.
double error_of(const torch::Tensor& output, const torch::Tensor& target) {
    return ((output - target).square().sum() / target.square().sum()).item<double>();
}

}  // namespace

int main(int argc, char** argv) {
    const long steps = argc > 1 ? std::atol(argv[1]) : 1L << 18;
    if (steps < 1L << 16) {
        std::fprintf(stderr, "long_series: error: steps: expected at least 65536, got %s\n", argv[1]);
        return 1;
    }
    std::vector<float> recording;
    const double simulation = seconds_of([&] { recording = clip(melody(steps)); });
    std::printf("diode clipper, %ld samples at 48 kHz (%.1f s), simulated in %.2f s\n", steps, double(steps) / 48000,
                simulation);
    const torch::Tensor input = tensor_of(melody(steps)), target = tensor_of(recording);

    // The first half is for training, in pieces of 512 steps; the second half is held out.
    constexpr std::int64_t piece = 512, forget = 64, batch = 64;
    torch::manual_seed(2);
    Model model;
    // So little work at a time is not worth a second thread.
    torch::set_num_threads(1);
    auto training = model.cell->options.evaluation();
    training.execution.threads = 1;
    model.cell->options.evaluation(training);
    torch::optim::Adam optimiser(model.parameters(), torch::optim::AdamOptions(1e-2));
    const std::int64_t pieces = steps / 2 / piece;
    const torch::Tensor inputs = input.slice(1, 0, pieces * piece).view({pieces, piece, 1}),
                        targets = target.slice(1, 0, pieces * piece).view({pieces, piece, 1});
    constexpr int updates = 300;
    const auto begin = std::chrono::steady_clock::now();
    for (int update = 1; update <= updates; ++update) {
        for (auto& group : optimiser.param_groups())
            static_cast<torch::optim::AdamOptions&>(group.options()).lr(1e-2 * (1 - (update - 1) / double(updates)));
        const torch::Tensor chosen = torch::randint(pieces, {batch}, torch::kLong);
        const torch::Tensor wanted = targets.index_select(0, chosen).slice(1, forget, piece);
        const torch::Tensor loss =
            (model.forward(inputs.index_select(0, chosen)).slice(1, forget, piece) - wanted).square().mean();
        optimiser.zero_grad();
        loss.backward();
        optimiser.step();
        const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        if (update % 100 == 0)
            std::printf("update %d of %d, loss %.2e, %.1f s left\n", update, updates, loss.item<double>(),
                        spent / update * (updates - update));
    }

    const torch::NoGradGuard no_gradients;
    torch::Tensor serial, parallel;
    const auto run = [&](Method method, torch::Tensor& output) {
        auto options = model.cell->options.evaluation();
        options.method = method;
        options.tolerance = 1e-5;
        options.execution.threads = 0;
        model.cell->options.evaluation(options);
        output = model.forward(input);  // once before it is timed
        std::vector<double> times;
        const double whole = seconds_of([&] {
            output = model.forward(input);
            times.push_back(model.cell->reports()[0].seconds);
        });
        std::sort(times.begin(), times.end());
        return std::pair{whole, times[times.size() / 2]};
    };
    const auto [slow, slow_recurrence] = run(Method::sequential, serial);
    const auto [fast, fast_recurrence] = run(Method::automatic, parallel);
    const std::int64_t half = pieces * piece;
    const double held_out = error_of(parallel.slice(1, half), target.slice(1, half));
    const double trivial = error_of(input.slice(1, half), target.slice(1, half));
    const double apart = (serial - parallel).abs().max().item<double>();
    std::cout << "automatic: " << model.cell->reports()[0] << '\n';
    std::printf("held out: %.2f %% of the power is error (the input itself: %.0f %%)\n", 100 * held_out, 100 * trivial);
    std::printf(
        "network of 8 channels over %ld steps: sequential %.2f ms, automatic %.2f ms: %.1fx, %.2f ms saved, largest "
        "difference %.1e volts\n",
        steps, 1e3 * slow, 1e3 * fast, slow / fast, 1e3 * (slow - fast), apart);
    std::printf("its recurrence alone, without the projections: %.2f ms, %.2f ms: %.1fx\n", 1e3 * slow_recurrence,
                1e3 * fast_recurrence, slow_recurrence / fast_recurrence);

    // One channel of the trained weights alone.
    const auto weights = model.cell->named_parameters();
    const torch::Tensor rows = torch::arange(3) * 8;
    const torch::Tensor gates =
        torch::linear(input, weights["weight_ih_l0"].index_select(0, rows), weights["bias_ih_l0"].index_select(0, rows))
            .transpose(0, 1);
    const torch::Tensor parameters = weights["parameters_l0"].slice(1, 0, 1).contiguous();
    double baseline = 0;
    for (const Method method : {Method::sequential, Method::overlap, Method::shooting}) {
        nn::CellOptions options;
        options.evaluation.method = method;
        options.evaluation.tolerance = 1e-5;
        deeppcr::Report report;
        nn::cell(nn::CellKind::para_gru, gates, parameters, {}, options, &report);
        const double time =
            seconds_of([&] { nn::cell(nn::CellKind::para_gru, gates, parameters, {}, options, &report); });
        if (method == Method::sequential) baseline = time;
        std::printf("one trained channel, %-10s: %.2f ms, %.1fx (%s)\n", to_string(method).c_str(), 1e3 * time,
                    baseline / time, report.method.c_str());
    }
    return held_out < 0.05 && apart < 1e-3 ? 0 : 1;
}
