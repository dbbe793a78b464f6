// nn::dense_cell against torch::nn::RNN, GRU and LSTM with the same weights: states and all gradients.
#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch/nn/modules/rnn.h>
#include <torch/types.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <deeppcr/nn/dense_cell.hpp>

#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;
using deeppcr::index;  // not strings.h's
using testing::HasSubstr;

constexpr DenseCellKind kinds[] = {DenseCellKind::elman_tanh, DenseCellKind::elman_relu, DenseCellKind::gru,
                                   DenseCellKind::lstm};

struct Way {
    const char* name;
    Method method;
    Surrogate surrogate = Surrogate::full;
};
constexpr Way ways[] = {{"sequential", Method::sequential},
                        {"full", Method::newton},
                        {"diagonal", Method::newton, Surrogate::diagonal},
                        {"zero", Method::newton, Surrogate::zero}};

Tensor normal(at::IntArrayRef sizes, std::uint64_t seed, double deviation, at::ScalarType type) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    return at::empty(sizes, type).normal_(0, deviation, generator);
}

/// LibTorch's layer, and its states [steps, batch, state] for inputs [steps, batch, features].
struct Layer {
    DenseCellKind kind;
    index hidden;
    torch::nn::RNN rnn = nullptr;
    torch::nn::GRU gru = nullptr;
    torch::nn::LSTM lstm = nullptr;
    std::vector<Tensor> parameters;  // weight_ih, weight_hh, bias_ih, bias_hh

    Layer(DenseCellKind which, index features, index size, at::ScalarType type) : kind(which), hidden(size) {
        torch::nn::RNNOptions elman(features, hidden);
        if (kind == DenseCellKind::elman_relu)
            elman.nonlinearity(torch::kReLU);
        else
            elman.nonlinearity(torch::kTanh);
        if (kind == DenseCellKind::gru)
            parameters = initialise(gru = torch::nn::GRU(features, hidden), type);
        else if (kind == DenseCellKind::lstm)
            parameters = initialise(lstm = torch::nn::LSTM(features, hidden), type);
        else
            parameters = initialise(rnn = torch::nn::RNN(elman), type);
    }

    template <class Module>
    std::vector<Tensor> initialise(Module& module, at::ScalarType type) {
        module->to(type);
        const torch::NoGradGuard no_gradients;
        std::uint64_t seed = 21;
        for (Tensor& parameter : module->parameters())
            parameter.copy_(normal(parameter.sizes(), seed++, 0.6 / std::sqrt(double(hidden)), type));
        return module->parameters();
    }

    /// The outputs h_t, and what LibTorch calls the last state, as [1, batch, state].
    std::tuple<Tensor, Tensor> run(const Tensor& inputs, const Tensor& initial) {
        const Tensor state = initial.unsqueeze(0);
        if (kind == DenseCellKind::gru) return gru->forward(inputs, state);
        if (kind != DenseCellKind::lstm) return rnn->forward(inputs, state);
        const auto parts =
            std::make_tuple(state.slice(2, 0, hidden).contiguous(), state.slice(2, hidden, 2 * hidden).contiguous());
        const auto [outputs, last] = lstm->forward(inputs, parts);
        return {outputs, torch::cat({std::get<0>(last), std::get<1>(last)}, 2)};
    }
};

struct Case {
    DenseCellKind kind;
    Way way;
    at::ScalarType type;
};

class DenseCellFunction : public testing::TestWithParam<Case> {};

TEST_P(DenseCellFunction, AgreesWithLibTorch) {
    const auto [kind, way, type] = GetParam();
    for (const index steps : {1, 23})
        for (const index batch : {1, 3})
            for (const index hidden : {1, 5, 17}) {
                SCOPED_TRACE("hidden " + std::to_string(hidden) + ", batch " + std::to_string(batch) + ", " +
                             std::to_string(steps) + " steps");
                const index features = 4, state = state_width(kind, hidden);
                Layer layer(kind, features, hidden, type);
                const Tensor inputs = normal({steps, batch, features}, 1, 1, type).requires_grad_();
                const Tensor initial = normal({batch, state}, 2, 1, type).requires_grad_();
                std::vector<Tensor> leaves = {inputs, initial};
                leaves.insert(leaves.end(), layer.parameters.begin(), layer.parameters.end());
                const Tensor of_outputs = normal({steps, batch, hidden}, 3, 1, type),
                             of_last = normal({1, batch, state}, 4, 1, type);

                const auto [outputs, last] = layer.run(inputs, initial);
                const auto expected = torch::autograd::grad({outputs, last}, leaves, {of_outputs, of_last});

                DenseCellOptions options;
                options.evaluation.method = way.method;
                options.evaluation.surrogate = way.surrogate;
                const auto memory = std::make_shared<DenseCellMemory>();
                const Tensor gates = torch::linear(inputs, layer.parameters[0], layer.parameters[2]);
                const Tensor states =
                    dense_cell(kind, gates, layer.parameters[1], layer.parameters[3], initial, options, memory);
                EXPECT_TRUE(memory->forward.ok());
                const auto actual = torch::autograd::grad({states.slice(2, 0, hidden), states.slice(0, steps - 1)},
                                                          leaves, {of_outputs, of_last});

                const double tolerance = type == at::kDouble ? 1e-10 : 2e-4;
                EXPECT_TRUE(torch::allclose(states.slice(2, 0, hidden), outputs, tolerance, tolerance));
                EXPECT_TRUE(torch::allclose(states.slice(0, steps - 1), last, tolerance, tolerance));
                for (std::size_t i = 0; i < leaves.size(); ++i)
                    EXPECT_TRUE(torch::allclose(actual[i], expected[i], tolerance, tolerance)) << "leaf " << i;
            }
}

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const DenseCellKind kind : kinds)
        for (const Way& way : ways)
            for (const at::ScalarType type : {at::kFloat, at::kDouble}) all.push_back({kind, way, type});
    return all;
}
std::string name_of(const testing::TestParamInfo<Case>& info) {
    constexpr const char* names[] = {"elman_tanh", "elman_relu", "gru", "lstm"};
    return std::string(names[int(info.param.kind)]) + "_" + info.param.way.name +
           (info.param.type == at::kFloat ? "_float" : "_double");
}
INSTANTIATE_TEST_SUITE_P(, DenseCellFunction, testing::ValuesIn(cases()), name_of);

TEST(DenseCell, TakesBatchFirstInputsAsTheyAre) {
    const Tensor gates = normal({3, 11, 15}, 1, 1, at::kDouble), weights = normal({15, 5}, 2, 0.3, at::kDouble),
                 biases = normal({15}, 3, 0.3, at::kDouble), initial = normal({3, 5}, 4, 1, at::kDouble);
    const Tensor strided = dense_cell(DenseCellKind::gru, gates.transpose(0, 1), weights, biases, initial);
    const Tensor copied = dense_cell(DenseCellKind::gru, gates.transpose(0, 1).contiguous(), weights, biases, initial);
    EXPECT_TRUE(torch::equal(strided, copied));
    const Tensor slow = gates.permute({1, 0, 2}).transpose(1, 2).contiguous().transpose(1, 2);  // rows with strides
    EXPECT_TRUE(torch::equal(dense_cell(DenseCellKind::gru, slow, weights, biases, initial), copied));
}

TEST(DenseCell, WithoutBiasIsWithZeros) {
    const Tensor gates = normal({7, 2, 8}, 1, 1, at::kFloat), weights = normal({8, 2}, 2, 0.3, at::kFloat),
                 initial = normal({2, 4}, 4, 1, at::kFloat);
    EXPECT_TRUE(torch::equal(dense_cell(DenseCellKind::lstm, gates, weights, {}, initial),
                             dense_cell(DenseCellKind::lstm, gates, weights, torch::zeros({8}), initial)));
}

TEST(DenseCell, AGivenGuessIsTheLastTrajectory) {
    const Tensor gates = normal({50, 2, 12}, 1, 1, at::kDouble), weights = normal({12, 4}, 2, 0.3, at::kDouble),
                 biases = normal({12}, 3, 0.3, at::kDouble), initial = normal({2, 4}, 4, 1, at::kDouble);
    DenseCellOptions options;
    options.evaluation.guess = Guess::given;
    const auto memory = std::make_shared<DenseCellMemory>();
    const Tensor first = dense_cell(DenseCellKind::gru, gates, weights, biases, initial, options, memory);
    EXPECT_GT(memory->forward.iterations, 1);
    const Tensor second = dense_cell(DenseCellKind::gru, gates, weights, biases, initial, options, memory);
    EXPECT_EQ(memory->forward.iterations, 1);
    EXPECT_TRUE(torch::allclose(first, second, 1e-12, 1e-12));
}

TEST(DenseCell, NamesTheArgumentThatIsWrong) {
    const Tensor gates = torch::zeros({7, 2, 12}), weights = torch::zeros({12, 4}), biases = torch::zeros({12}),
                 initial = torch::zeros({2, 4});
    const auto says = [](const char* argument, const auto& action) {
        EXPECT_THAT(message_of(action), HasSubstr(argument));
    };
    says("kind", [&] { dense_cell(DenseCellKind(9), gates, weights, biases, initial); });
    says("gates", [&] { dense_cell(DenseCellKind::gru, gates.slice(2, 0, 11), weights, biases, initial); });
    says("gates", [&] { dense_cell(DenseCellKind::gru, gates.to(at::kInt), weights, biases, initial); });
    says("gates", [&] { dense_cell(DenseCellKind::gru, {}, weights, biases, initial); });
    says("weight_hh", [&] { dense_cell(DenseCellKind::gru, gates, weights.t(), biases, initial); });
    says("weight_hh", [&] { dense_cell(DenseCellKind::gru, gates, weights.to(at::kDouble), biases, initial); });
    says("bias_hh", [&] { dense_cell(DenseCellKind::gru, gates, weights, biases.slice(0, 1), initial); });
    says("initial", [&] { dense_cell(DenseCellKind::gru, gates, weights, biases, initial.slice(0, 1)); });
    says("initial", [&] { dense_cell(DenseCellKind::gru, gates, weights, biases, {}); });
}

TEST(DenseCell, HasNoGradientWhereItIsNotFinite) {
    Tensor gates = torch::zeros({7, 2, 12});
    gates[3][1][0] = std::numeric_limits<float>::quiet_NaN();
    const Tensor weights = torch::ones({12, 4}).requires_grad_(), initial = torch::zeros({2, 4});
    for (const Method method : {Method::sequential, Method::newton}) {
        DenseCellOptions options;
        options.evaluation.method = method;
        const auto memory = std::make_shared<DenseCellMemory>();
        const Tensor states = dense_cell(DenseCellKind::gru, gates, weights, {}, initial, options, memory);
        EXPECT_EQ(memory->forward.status, Status::non_finite);
        EXPECT_THAT(message_of([&] { states.sum().backward(); }), HasSubstr("backward of dense_cell"));
    }
}

TEST(DenseCell, OfNoStepsOrNoSequences) {
    const Tensor weights = torch::ones({12, 4}).requires_grad_(), biases = torch::zeros({12});
    for (const auto& [steps, batch] : {std::pair<index, index>{0, 2}, {5, 0}}) {
        const Tensor states =
            dense_cell(DenseCellKind::gru, torch::zeros({steps, batch, 12}), weights, biases, torch::zeros({batch, 4}));
        EXPECT_EQ(states.sizes(), at::IntArrayRef({steps, batch, 4}));
        const auto gradients = torch::autograd::grad({states.sum()}, {weights});
        EXPECT_EQ(gradients[0].abs().sum().item<float>(), 0);
    }
}

}  // namespace
}  // namespace deeppcr::nn
