// The recurrent modules against loops of LibTorch's own operations: heads, layers, directions, packed sequences,
// continued sequences; and what a module must do: clone, save and load, change its type.
// tests/nn_torch_library_test.py checks all of them together, and their gradients.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch/serialize.h>
#include <torch/types.h>

#include <functional>
#include <sstream>
#include <vector>

#include <deeppcr/nn/recurrent.hpp>

#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;
using deeppcr::index;  // not strings.h's
using testing::HasSubstr;
using torch::nn::utils::rnn::PackedSequence;

double difference(const Tensor& a, const Tensor& b) {
    return a.sizes() == b.sizes() ? (a - b).abs().max().item<double>() : INFINITY;
}

Tensor normal(at::IntArrayRef sizes) { return torch::randn(sizes, at::kDouble); }

/// States of one channelwise cell, each [batch, hidden], as a list; u: its gates, [batch, hidden] each.
using Step = std::function<std::vector<Tensor>(const std::vector<Tensor>&, const std::vector<Tensor>&, const Tensor&)>;

const Step gru = [](const std::vector<Tensor>& x, const std::vector<Tensor>& u, const Tensor& p) {
    const Tensor h = x[0], z = at::sigmoid(p[0] * h + u[0]), r = at::sigmoid(p[1] * h + u[1]);
    return std::vector<Tensor>{(1 - z) * h + z * at::tanh(p[2] * (r * h) + u[2])};
};
const Step lstm = [](const std::vector<Tensor>& x, const std::vector<Tensor>& u, const Tensor& p) {
    const Tensor f = at::sigmoid(p[0] * x[1] + p[3] * x[0] + u[0]), n = at::tanh(p[2] * x[1] + u[2]);
    const Tensor c = f * x[0] + (1 - f) * n;
    return std::vector<Tensor>{c, at::sigmoid(p[1] * x[1] + p[4] * c + u[1]) * at::tanh(c)};
};
const Step slstm = [](const std::vector<Tensor>& x, const std::vector<Tensor>& u, const Tensor& p) {
    const Tensor i = p[0] * x[3] + u[0], f = at::log_sigmoid(p[1] * x[3] + u[1]) + x[2];
    const Tensor m = at::maximum(f, i), input = at::exp(i - m), forget = at::exp(f - m);
    const Tensor c = forget * x[0] + input * at::tanh(p[2] * x[3] + u[2]), n = forget * x[1] + input;
    return std::vector<Tensor>{c, n, m, at::sigmoid(p[3] * x[3] + u[3]) * c / n};
};
const Step elman = [](const std::vector<Tensor>& x, const std::vector<Tensor>& u, const Tensor& p) {
    return std::vector<Tensor>{at::tanh(p[0] * x[0] + u[0])};
};

/// One layer and direction over [batch,steps,inputs], from zeros: {h [batch,steps,hidden], the last state}.
std::pair<Tensor, Tensor> loop(const Step& step, index states, const Tensor& input, const Tensor& weight,
                               const Tensor& bias, const Tensor& p, bool reversed) {
    const index gates = weight.size(0) / p.size(1), steps = input.size(1);
    std::vector<Tensor> x(std::size_t(states), at::zeros({input.size(0), p.size(1)}, input.options()));
    std::vector<Tensor> rows(static_cast<std::size_t>(steps));
    for (index i = 0; i < steps; ++i) {
        const index t = reversed ? steps - 1 - i : i;
        x = step(x, at::linear(input.select(1, t), weight, bias).chunk(gates, 1), p);
        rows[std::size_t(t)] = x.back();
    }
    return {at::stack(rows, 1), at::stack(x, 2).flatten(1)};
}

template <class Module>
void equals_its_equations(const Step& step, index states) {
    torch::manual_seed(3);
    Module module(RecurrentOptions(5, 4).layers(2).bidirectional(true));
    module->to(at::kDouble);
    const Tensor input = normal({3, 9, 5}).requires_grad_();
    const auto [output, last] = module(input);
    auto named = module->named_parameters();
    Tensor signal = input;
    std::vector<Tensor> ends;
    for (const std::string layer : {"_l0", "_l1"}) {
        std::vector<Tensor> outputs;
        for (const std::string suffix : {"", "_reverse"}) {
            const auto [h, end] =
                loop(step, states, signal, named["weight_ih" + layer + suffix], named["bias_ih" + layer + suffix],
                     named["parameters" + layer + suffix], !suffix.empty());
            outputs.push_back(h);
            ends.push_back(end);
        }
        signal = at::cat(outputs, 2);
    }
    EXPECT_LE(difference(output, signal), 1e-12);
    EXPECT_LE(difference(last, at::stack(ends)), 1e-12);
    auto arguments = module->parameters();
    arguments.push_back(input);
    const Tensor weights = normal(output.sizes()), more = normal(last.sizes());
    const auto ours = torch::autograd::grad({(output * weights).sum() + (last * more).sum()}, arguments);
    const auto truth = torch::autograd::grad({(signal * weights).sum() + (at::stack(ends) * more).sum()}, arguments);
    for (std::size_t i = 0; i < truth.size(); ++i) EXPECT_LE(difference(ours[i], truth[i]), 1e-10) << i;
    EXPECT_EQ(module->reports().size(), 4U);
    for (const Report& report : module->reports()) EXPECT_TRUE(report.ok());
    module->options.reports(false);
    EXPECT_TRUE(torch::equal(std::get<0>(module->forward(input)), output));
    EXPECT_TRUE(module->reports().empty());
    module->options.reports(true);
    module->forward(input);
    EXPECT_EQ(module->reports().size(), 4U);
}

TEST(Recurrent, EveryModuleEqualsItsEquationsForwardAndBackward) {
    equals_its_equations<ParaGRU>(gru, 1);
    equals_its_equations<ParaLSTM>(lstm, 2);
    equals_its_equations<SLSTM>(slstm, 4);
    equals_its_equations<Elman>(elman, 1);
}

TEST(Recurrent, AsInTheReadme) {
    auto rnn = deeppcr::nn::ParaGRU(deeppcr::nn::ParaGRUOptions(/*inputs=*/256, /*hidden=*/512).heads(8));
    const Tensor x = torch::randn({2, 10, 256});
    auto [y, last] = rnn(x);
    EXPECT_EQ(y.sizes(), at::IntArrayRef({2, 10, 512}));
    EXPECT_EQ(last.sizes(), at::IntArrayRef({1, 2, 512}));
    EXPECT_TRUE(at::equal(y.select(1, 9), last[0]));
    y.sum().backward();
    for (const Tensor& parameter : rnn->parameters()) EXPECT_GT(parameter.grad().abs().max().item<double>(), 0);
    std::ostringstream text;
    text << *rnn;
    EXPECT_THAT(text.str(), HasSubstr("deeppcr::nn::ParaGRU(256, 512, heads=8)"));
}

TEST(Recurrent, HeadsAreABlockDiagonalProjection) {
    ParaLSTM parts(ParaLSTMOptions(6, 4).heads(2)), whole(ParaLSTMOptions(6, 4));
    const torch::NoGradGuard guard;
    auto from = parts->named_parameters();
    auto to = whole->named_parameters();
    const Tensor full = at::zeros({3, 4, 6});
    const Tensor weight = from["weight_ih_l0"].view({3, 4, 3});
    full.slice(1, 0, 2).slice(2, 0, 3).copy_(weight.slice(1, 0, 2));
    full.slice(1, 2, 4).slice(2, 3, 6).copy_(weight.slice(1, 2, 4));
    to["weight_ih_l0"].copy_(full.view({12, 6}));
    to["bias_ih_l0"].copy_(from["bias_ih_l0"].normal_());
    to["parameters_l0"].copy_(from["parameters_l0"]);
    const Tensor input = torch::randn({3, 8, 6});
    EXPECT_LE(difference(std::get<0>(parts(input)), std::get<0>(whole(input))), 1e-6);
}

TEST(Recurrent, BatchFirstOrStepsFirst) {
    ParaGRU module(ParaGRUOptions(3, 5).layers(2).bidirectional(true));
    const Tensor input = torch::randn({4, 7, 3});
    const auto [output, last] = module(input);
    module->options.batch_first(false);
    const auto [steps_first, again] = module(input.transpose(0, 1));
    EXPECT_LE(difference(output, steps_first.transpose(0, 1)), 1e-6);
    EXPECT_LE(difference(last, again), 1e-6);
}

TEST(Recurrent, AContinuedSequenceEqualsTheWhole) {
    ParaLSTM module(ParaLSTMOptions(3, 20).layers(2));
    const Tensor input = torch::randn({2, 30, 3});
    const Tensor whole = std::get<0>(module(input));
    const auto [first, state] = module(input.slice(1, 0, 11));
    const auto [second, end] = module(input.slice(1, 11, 30), state);
    EXPECT_LE(difference(at::cat({first, second}, 1), whole), 1e-6);
    Tensor running;
    for (index t = 0; t < 30; ++t) {
        const auto [one, next] = module(input.slice(1, t, t + 1), running);
        EXPECT_LE(difference(one.select(1, 0), whole.select(1, t)), 1e-6) << t;
        running = next;
    }
    EXPECT_LE(difference(running, end), 1e-6);
}

TEST(Recurrent, PackedSequencesAreThoseOfEachAlone) {
    for (const bool bidirectional : {false, true}) {
        ParaLSTM module(ParaLSTMOptions(3, 4).layers(2).bidirectional(bidirectional));
        module->to(at::kDouble);
        std::vector<Tensor> sequences;
        for (const index length : {5, 1, 9, 9, 2}) sequences.push_back(normal({length, 3}).requires_grad_());
        const Tensor initial = normal({bidirectional ? 4 : 2, 5, 8}).requires_grad_();
        const PackedSequence input = torch::nn::utils::rnn::pack_sequence(sequences, /*enforce_sorted=*/false);
        const auto [packed, last] = module->forward_with_packed_input(input, initial);
        const auto [padded, lengths] = torch::nn::utils::rnn::pad_packed_sequence(packed, /*batch_first=*/true);
        Tensor ours = at::zeros({}, at::kDouble), truth = ours;
        for (index j = 0; j < 5; ++j) {
            const Tensor& sequence = sequences[std::size_t(j)];
            const auto [output, end] = module(sequence.unsqueeze(0), initial.slice(1, j, j + 1).contiguous());
            EXPECT_LE(difference(padded[j].slice(0, 0, sequence.size(0)), output[0]), 1e-12) << j;
            EXPECT_LE(difference(last.select(1, j), end.select(1, 0)), 1e-12) << j;
            ours = ours + padded[j].square().sum() + last.select(1, j).sum();
            truth = truth + output.square().sum() + end.sum();
        }
        auto arguments = module->parameters();
        arguments.insert(arguments.end(), sequences.begin(), sequences.end());
        arguments.push_back(initial);
        const auto a = torch::autograd::grad({ours}, arguments), b = torch::autograd::grad({truth}, arguments);
        for (std::size_t i = 0; i < a.size(); ++i) EXPECT_LE(difference(a[i], b[i]), 1e-9) << i;
    }
}

TEST(Recurrent, DropoutOnlyWhileTrainingAndOnlyBetweenLayers) {
    ParaGRU module(ParaGRUOptions(3, 64).layers(2).dropout(0.5));
    const Tensor input = torch::randn({2, 5, 3});
    EXPECT_FALSE(at::equal(std::get<0>(module(input)), std::get<0>(module(input))));
    module->eval();
    EXPECT_TRUE(at::equal(std::get<0>(module(input)), std::get<0>(module(input))));
    ParaGRU single(ParaGRUOptions(3, 64).dropout(0.5));
    EXPECT_TRUE(at::equal(std::get<0>(single(input)), std::get<0>(single(input))));
}

TEST(Recurrent, ClonesSavesLoadsAndRepeatsItsSeed) {
    ParaGRU module(ParaGRUOptions(3, 5).layers(2).seed(7)), same(ParaGRUOptions(3, 5).layers(2).seed(7)),
        other(ParaGRUOptions(3, 5).layers(2).seed(8));
    const Tensor input = torch::randn({2, 6, 3});
    const Tensor output = std::get<0>(module(input));
    EXPECT_TRUE(at::equal(output, std::get<0>(same(input))));
    EXPECT_FALSE(at::equal(output, std::get<0>(other(input))));
    const auto copy = std::dynamic_pointer_cast<ParaGRUImpl>(module->clone());
    EXPECT_TRUE(at::equal(output, std::get<0>(copy->forward(input))));
    {
        const torch::NoGradGuard guard;
        module->parameters()[0].add_(1);
    }
    EXPECT_TRUE(at::equal(output, std::get<0>(copy->forward(input))));
    EXPECT_FALSE(at::equal(output, std::get<0>(module(input))));
    std::stringstream file;
    torch::save(same, file);
    torch::load(other, file);
    EXPECT_TRUE(at::equal(output, std::get<0>(other(input))));
}

TEST(Recurrent, ErrorsNameTheArgument) {
    EXPECT_THAT(message_of([] { ParaGRU(ParaGRUOptions(6, 4).heads(4)); }), HasSubstr("inputs"));
    EXPECT_THAT(message_of([] { ParaGRU(ParaGRUOptions(6, 4).heads(3)); }), HasSubstr("hidden"));
    EXPECT_THAT(message_of([] { ParaGRU(ParaGRUOptions(6, 0)); }), HasSubstr("hidden"));
    EXPECT_THAT(message_of([] { ParaGRU(ParaGRUOptions(6, 4).layers(0)); }), HasSubstr("layers"));
    EXPECT_THAT(message_of([] { ParaGRU(ParaGRUOptions(6, 4).dropout(2)); }), HasSubstr("dropout"));
    ParaGRU module(ParaGRUOptions(6, 4));
    EXPECT_THAT(message_of([&] { module(torch::randn({2, 6})); }), HasSubstr("input"));
    EXPECT_THAT(message_of([&] { module(torch::randn({2, 0, 6})); }), HasSubstr("input"));
    EXPECT_THAT(message_of([&] { module(torch::randn({2, 3, 5})); }), HasSubstr("weights[0]"));
    EXPECT_THAT(message_of([&] { module(normal({2, 3, 6})); }), HasSubstr("weights[0]"));
    EXPECT_THAT(message_of([&] { module(torch::randn({2, 3, 6}), torch::randn({1, 2, 5})); }), HasSubstr("initial"));
    RecurrentCall packed;
    for (const std::vector<std::int64_t>& sizes :
         std::vector<std::vector<std::int64_t>>{{1, 2}, {2}, {3, 0}, {}, {-3}}) {
        packed.batch_sizes = at::tensor(sizes, at::kLong);
        EXPECT_THAT(message_of([&] {
                        recurrent(CellKind::para_gru, torch::randn({3, 6}), module->parameters(), {}, packed);
                    }),
                    HasSubstr("batch_sizes"));
    }
    EXPECT_THAT(message_of([&] {
                    recurrent(CellKind::para_gru, torch::randn({2, 3, 6}), {}, {}, {});
                }),
                HasSubstr("weights"));
}

}  // namespace
}  // namespace deeppcr::nn
