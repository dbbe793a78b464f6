// nn::cell against loops of LibTorch's own operations: states, gradients, time reversed, sequences in one row, numbers
// of 16 bits, errors; and the core's memory as tensors. tests/nn_torch_library_test.py checks the gradients of every
// cell, tests/nn_gpu_test.py that GPUs agree with processors.
#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <cstring>
#include <vector>

#include <deeppcr/nn/cell.hpp>
#include <deeppcr/nn/trained_cell.hpp>

#include "nn/device_scope.hpp"
#include "nn/tensors.hpp"
#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;
using deeppcr::index;  // not strings.h's
using testing::HasSubstr;

Tensor normal(at::IntArrayRef sizes, std::uint64_t seed, at::ScalarType type = at::kDouble) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    return at::empty(sizes, type).normal_(0, 1, generator);
}

/// States [steps, batch, channels * 2] of ParaLSTM, by its equations.
Tensor loop(const Tensor& gates, const Tensor& p, const Tensor& initial) {
    const index batch = gates.size(1), channels = p.size(1);
    const Tensor start = initial.view({batch, channels, 2});
    Tensor c = start.select(2, 0), h = start.select(2, 1);
    std::vector<Tensor> states;
    for (index t = 0; t < gates.size(0); ++t) {
        const auto u = gates[t].chunk(3, -1);
        const Tensor f = at::sigmoid(p[0] * h + p[3] * c + u[0]), n = at::tanh(p[2] * h + u[2]);
        c = f * c + (1 - f) * n;
        h = at::sigmoid(p[1] * h + p[4] * c + u[1]) * at::tanh(c);
        states.push_back(at::stack({c, h}, 2).view({batch, channels * 2}));
    }
    return at::stack(states);
}

TEST(Cell, EqualsALoopForwardAndBackward) {
    for (const index channels : {1, 5, 17})
        for (const Method method : {Method::sequential, Method::overlap, Method::shooting, Method::newton}) {
            const std::vector<Tensor> arguments{normal({60, 2, 3 * channels}, 1).requires_grad_(),
                                                normal({5, channels}, 2).mul(0.5).requires_grad_(),
                                                normal({2, channels * 2}, 3).requires_grad_()};
            CellOptions options;
            options.evaluation.method = method;
            options.evaluation.tolerance = 1e-13;
            Report report;
            const Tensor ours = cell(CellKind::para_lstm, arguments[0], arguments[1], arguments[2], options, &report);
            EXPECT_TRUE(report.ok()) << report;
            const Tensor expected = loop(arguments[0], arguments[1], arguments[2]);
            EXPECT_LE((ours - expected).abs().max().item<double>(), 1e-9) << to_string(method);
            const Tensor weights = normal(ours.sizes(), 4);
            const auto gradients = torch::autograd::grad({(ours * weights).sum()}, arguments);
            const auto truth = torch::autograd::grad({(expected * weights).sum()}, arguments);
            for (std::size_t i = 0; i < truth.size(); ++i)
                EXPECT_LE((gradients[i] - truth[i]).abs().max().item<double>(), 1e-8) << to_string(method) << " " << i;
        }
}

TEST(Cell, ReversedEqualsFlipped) {
    const Tensor gates = normal({40, 3, 3 * 4}, 5).requires_grad_(), parameters = normal({3, 4}, 6).mul(0.5);
    CellOptions options;
    options.reversed = true;
    const Tensor reversed = cell(CellKind::para_gru, gates, parameters, {}, options);
    const Tensor flipped = cell(CellKind::para_gru, gates.flip(0), parameters).flip(0);
    EXPECT_TRUE(at::equal(reversed, flipped));
    const Tensor weights = normal(reversed.sizes(), 7);
    const Tensor a = torch::autograd::grad({(reversed * weights).sum()}, {gates})[0];
    const Tensor b = torch::autograd::grad({(flipped * weights).sum()}, {gates})[0];
    EXPECT_TRUE(at::equal(a, b));
}

TEST(Cell, SequencesInOneRowAreIndependent) {
    const Tensor gates = normal({30, 1, 3 * 4}, 8), parameters = normal({3, 4}, 9).mul(0.5),
                 initial = normal({2, 4}, 10);
    CellOptions options;
    options.starts = {{0, 11}};
    const Tensor together = cell(CellKind::para_gru, gates, parameters, initial, options);
    const Tensor first = cell(CellKind::para_gru, gates.slice(0, 0, 11), parameters, initial.slice(0, 0, 1));
    const Tensor second = cell(CellKind::para_gru, gates.slice(0, 11, 30), parameters, initial.slice(0, 1, 2));
    EXPECT_TRUE(at::allclose(together, at::cat({first, second}), 0, 1e-12));
}

TEST(Cell, StepsOneAtATimeContinueAState) {
    const Tensor gates = normal({20, 2, 3 * 17}, 11), parameters = normal({5, 17}, 12).mul(0.5);
    const Tensor whole = cell(CellKind::para_lstm, gates, parameters);
    Tensor state = at::zeros({2, 34}, at::kDouble);
    for (index t = 0; t < 20; ++t) {
        state = cell(CellKind::para_lstm, gates.slice(0, t, t + 1), parameters, state)[0];
        EXPECT_TRUE(at::equal(state, whole[t])) << t;
    }
}

TEST(Cell, RecomputedBackwardEqualsTheOther) {
    for (const bool reversed : {false, true}) {
        const std::vector<Tensor> arguments{normal({30, 2, 3 * 5}, 1).requires_grad_(),
                                            normal({5, 5}, 2).mul(0.5).requires_grad_(),
                                            normal({3, 10}, 3).requires_grad_()};
        CellOptions options;
        options.evaluation.method = Method::sequential;
        options.reversed = reversed;
        options.starts = {{1, 13}};
        const Tensor kept = cell(CellKind::para_lstm, arguments[0], arguments[1], arguments[2], options);
        const auto expected = torch::autograd::grad({kept.square().sum()}, arguments);
        for (const index segment : {1, 7, 30, 1000}) {
            options.recompute = segment;
            const Tensor states = cell(CellKind::para_lstm, arguments[0], arguments[1], arguments[2], options);
            EXPECT_TRUE(at::equal(states, kept)) << segment;
            const auto found = torch::autograd::grad({states.square().sum()}, arguments);
            for (std::size_t i = 0; i < found.size(); ++i)
                EXPECT_LE((found[i] - expected[i]).abs().max().item<double>(), 1e-11) << segment << " " << i;
        }
    }
}

TEST(Cell, NumbersOf16BitsAreWidenedAndTheStatesNarrowed) {
    for (const auto type : {at::kBFloat16, at::kHalf}) {
        const Tensor gates = normal({20, 2, 9}, 1).to(type).requires_grad_();
        const Tensor parameters = normal({3, 3}, 2, at::kFloat).requires_grad_();
        const Tensor initial = normal({2, 3}, 3).to(type).requires_grad_();
        const Tensor states = cell(CellKind::para_gru, gates, parameters, initial);
        const Tensor wide = cell(CellKind::para_gru, gates.to(at::kFloat), parameters, initial.to(at::kFloat));
        EXPECT_EQ(states.scalar_type(), type);
        EXPECT_TRUE(at::equal(states, wide.to(type)));
        const Tensor weights = normal(states.sizes(), 4).to(type);
        const std::vector<Tensor> arguments{gates, parameters, initial};
        const auto found = torch::autograd::grad({(states * weights).sum()}, arguments);
        const auto expected = torch::autograd::grad({(wide * weights.to(at::kFloat)).sum()}, arguments);
        for (std::size_t i = 0; i < found.size(); ++i) {
            EXPECT_EQ(found[i].scalar_type(), arguments[i].scalar_type()) << i;
            EXPECT_TRUE(at::equal(found[i], expected[i])) << i;
        }
        EXPECT_TRUE(at::equal(cell(CellKind::para_gru, gates, parameters.to(type)),
                              cell(CellKind::para_gru, gates, parameters.to(type).to(at::kFloat))));
    }
}

TEST(Cell, TheCoresMemoryIsLibTorchsWhereItIsAskedFor) {
    Tensor adopted;
    {
        const MemorySource source(Device::host(), allocate_tensors(at::kCPU));
        Buffer<float> buffer({3, 1, 5});
        ASSERT_NE(std::get_deleter<TensorMemory>(buffer.memory()), nullptr);
        buffer(2, 0, 4) = 7;
        const float* const data = buffer.data();
        adopted = adopt(buffer, {3, 5}, at::TensorOptions(at::kFloat));
        EXPECT_EQ(adopted.data_ptr<float>(), data);
        Workspace workspace;
        EXPECT_NE(workspace.take<double>(100'000), nullptr);
    }
    EXPECT_EQ(adopted.sizes(), at::IntArrayRef({3, 5}));
    EXPECT_EQ(adopted.sum().item<float>(), 7);
    EXPECT_GE(adopted.storage().nbytes(), 60U);
    Buffer<float> own({3, 1, 5});
    EXPECT_EQ(std::get_deleter<TensorMemory>(own.memory()), nullptr);
    EXPECT_EQ(adopt(own, {15}, at::TensorOptions(at::kFloat)).sum().item<float>(), 0);
}

TEST(Cell, ErrorsNameTheArgument) {
    const Tensor gates = normal({5, 2, 9}, 1), parameters = normal({3, 3}, 2);
    EXPECT_THAT(message_of([&] { cell(CellKind::para_gru, gates[0], parameters); }), HasSubstr("gates"));
    EXPECT_THAT(message_of([&] { cell(CellKind::para_gru, gates, normal({4, 3}, 2)); }), HasSubstr("parameters"));
    EXPECT_THAT(message_of([&] { cell(CellKind::para_gru, gates, parameters.to(at::kFloat)); }),
                HasSubstr("parameters"));
    EXPECT_THAT(message_of([&] {
                    cell(CellKind::para_gru, gates, parameters, normal({1, 3}, 3));
                }),
                HasSubstr("initial"));
    EXPECT_THAT(message_of([&] { cell(CellKind(9), gates, parameters); }), HasSubstr("kind"));
    EXPECT_THAT(message_of([&] { cell(CellKind::para_gru, gates.to(at::kBFloat16), parameters); }),
                HasSubstr("parameters: expected BFloat16 or Float, got Double"));
    EXPECT_THAT(message_of([&] { cell(CellKind::para_gru, gates.to(at::kInt), parameters); }), HasSubstr("gates"));
    EXPECT_THAT(message_of([&] { cell(CellKind::para_gru, gates.to(at::kMeta), parameters); }), HasSubstr("on meta"));
    CellOptions options;
    options.evaluation.execution.backend = Backend::cuda;
    EXPECT_THAT(message_of([&] { cell(CellKind::para_gru, gates, parameters, {}, options); }),
                HasSubstr("evaluation.execution.backend"));
}

TEST(TrainedCell, LearnsAndIsTheSameForTheSameSeed) {
    TrainedCellOptions options{.channels = 8, .steps = 128, .batch = 8, .updates = 150};
    for (const CellKind kind : {CellKind::para_gru, CellKind::para_lstm}) {
        const TrainedCell first = train_cell(kind, options), second = train_cell(kind, options);
        EXPECT_LT(first.last_loss, 0.6 * first.first_loss);
        EXPECT_EQ(first.weights.shape(), (Shape{3, 1, 8}));
        EXPECT_EQ(first.parameters.shape(), (Shape{sizes_of(kind).parameters, 1, 8}));
        EXPECT_EQ(first.last_loss, second.last_loss);
        EXPECT_EQ(std::memcmp(first.parameters.data(), second.parameters.data(),
                              std::size_t(first.parameters.size()) * sizeof(float)),
                  0);
        TrainedCellOptions other = options;
        other.seed = 2;
        other.updates = 5;
        EXPECT_NE(train_cell(kind, other).first_loss, first.first_loss);
    }
}

TEST(TrainedCell, StopsWhenToldAndRefusesWhatMakesNoSense) {
    TrainedCellOptions options{.channels = 4, .steps = 32, .updates = 100};
    index told = 0;
    options.progress = [&](double) { return ++told < 3; };
    const TrainedCell stopped = train_cell(CellKind::para_gru, options);
    EXPECT_TRUE(stopped.interrupted);
    EXPECT_EQ(told, 3);
    options.progress = {};
    options.channels = 0;
    EXPECT_THROW(train_cell(CellKind::para_gru, options), InvalidArgument);
    options.channels = 4;
    options.learning_rate = -1;
    EXPECT_THROW(train_cell(CellKind::para_gru, options), InvalidArgument);
}

}  // namespace
}  // namespace deeppcr::nn
