// nn/: the autograd function against LibTorch's own autograd, the network, the data, training and its checkpoints.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <deeppcr/nn/dense_chain.hpp>
#include <deeppcr/nn/fashion_mnist.hpp>
#include <deeppcr/nn/residual_network.hpp>
#include <deeppcr/nn/training.hpp>
#include <files/error.hpp>
#include <files/safetensors.hpp>

#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;
using testing::HasSubstr;

// ------------------------------------------------------------------------------------------------- helpers

Tensor normal(at::IntArrayRef sizes, std::uint64_t seed, double deviation, at::ScalarType type) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    return at::empty(sizes, type).normal_(0, deviation, generator);
}

Tensor activate(const Tensor& values, Activation activation) {
    switch (activation) {
        case Activation::tanh:
            return at::tanh(values);
        case Activation::relu:
            return at::relu(values);
        case Activation::sigmoid:
            return at::sigmoid(values);
        case Activation::gelu:
            return at::gelu(values);
        case Activation::identity:
            break;
    }
    return values;
}

/// The network as one would write it in LibTorch: layer by layer. Returns the trajectory [steps,batch,width].
Tensor layer_by_layer(const Tensor& initial, const Tensor& weights, const Tensor& biases, Activation activation,
                      index skip) {
    std::vector<Tensor> trajectory;
    Tensor state = initial;
    const index block = std::max<index>(skip, 1);
    for (index first = 0; first < weights.size(0); first += block) {
        Tensor branch = state;
        for (index layer = first; layer < first + block; ++layer)
            branch = activate(at::linear(branch, weights[layer], biases[layer]), activation);
        state = skip > 0 ? state + branch : branch;
        trajectory.push_back(state);
    }
    return at::stack(trajectory);
}

/// x_0, weights and biases of a chain whose states stay of order 1.
std::array<Tensor, 3> leaves(index layers, index batch, index width, at::ScalarType type, std::uint64_t seed = 7) {
    std::array<Tensor, 3> result{normal({batch, width}, seed, 1, type),
                                 normal({layers, width, width}, seed + 1, 0.6 / std::sqrt(double(width)), type),
                                 normal({layers, width}, seed + 2, 0.3, type)};
    for (Tensor& leaf : result) leaf.requires_grad_();
    return result;
}

std::vector<Tensor> gradients(const Tensor& output, const Tensor& output_gradient,
                              const std::array<Tensor, 3>& inputs) {
    return torch::autograd::grad({output}, {inputs[0], inputs[1], inputs[2]}, {output_gradient});
}

double largest_difference(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

// ------------------------------------------------------------------------------------- the autograd function

struct Way {
    const char* name;
    Method method;
    Surrogate surrogate = Surrogate::full;
    Reduction reduction = Reduction::automatic;
};
constexpr Way ways[] = {{"sequential", Method::sequential},
                        {"newton", Method::newton},
                        {"newton_pcr", Method::newton, Surrogate::full, Reduction::pcr},
                        {"newton_scan", Method::newton, Surrogate::full, Reduction::scan},
                        {"newton_diagonal", Method::newton, Surrogate::diagonal},
                        {"newton_zero", Method::newton, Surrogate::zero}};

struct Case {
    Activation activation;
    index skip;
    Way way;
    at::ScalarType type;
};

class DenseChainFunction : public testing::TestWithParam<Case> {};

TEST_P(DenseChainFunction, AgreesWithLibTorchLayerByLayer) {
    const auto [activation, skip, way, type] = GetParam();
    const index layers = 14, batch = 3, width = 5;  // no power of two anywhere
    const auto inputs = leaves(layers, batch, width, type);
    const Tensor expected = layer_by_layer(inputs[0], inputs[1], inputs[2], activation, skip);
    const double tolerance = type == at::kDouble ? 1e-10 : 1e-3;

    DenseChainOptions options;
    options.activation = activation;
    options.skip = skip;
    options.evaluation.method = way.method;
    options.evaluation.surrogate = way.surrogate;
    options.evaluation.reduction = way.reduction;
    for (const bool whole : {false, true}) {
        options.whole_trajectory = whole;
        const Tensor last = whole ? expected : expected[expected.size(0) - 1];
        const Tensor output = dense_chain(inputs[0], inputs[1], inputs[2], options);
        ASSERT_EQ(output.sizes(), last.sizes());
        const double scale = 1 + last.abs().max().item<double>();
        EXPECT_LT(largest_difference(output, last), tolerance * scale);

        const Tensor output_gradient = normal(output.sizes(), 3, 1, type);
        const auto found = gradients(output, output_gradient, inputs);
        const auto wanted = torch::autograd::grad({last}, {inputs[0], inputs[1], inputs[2]}, {output_gradient},
                                                  /*retain_graph=*/true);
        for (int i = 0; i < 3; ++i) {
            ASSERT_EQ(found[i].sizes(), wanted[i].sizes());
            EXPECT_LT(largest_difference(found[i], wanted[i]), tolerance * (1 + wanted[i].abs().max().item<double>()))
                << "gradient of input " << i << (whole ? ", whole trajectory" : "");
        }
    }
}

std::vector<Case> all_cases() {
    std::vector<Case> cases;
    for (const auto& [name, activation] : activation_names)
        for (const index skip : {0, 1, 2})
            for (const Way& way : ways)
                for (const auto type : {at::kFloat, at::kDouble}) cases.push_back({activation, skip, way, type});
    return cases;
}

INSTANTIATE_TEST_SUITE_P(All, DenseChainFunction, testing::ValuesIn(all_cases()), [](const auto& tested) {
    return name_of(activation_names, tested.param.activation) + "_skip" + std::to_string(tested.param.skip) + "_" +
           tested.param.way.name + (tested.param.type == at::kFloat ? "_float" : "_double");
});

TEST(DenseChainGradients, AgreeWithFiniteDifferences) {
    for (const Way& way : {ways[0], ways[1]}) {
        const auto inputs = leaves(4, 2, 3, at::kDouble);
        DenseChainOptions options;
        options.activation = Activation::gelu;
        options.skip = 2;
        options.evaluation.method = way.method;
        const auto loss = [&] {
            const Tensor output = dense_chain(inputs[0], inputs[1], inputs[2], options);
            return (output * output * normal(output.sizes(), 5, 1, at::kDouble)).sum();
        };
        const auto found = torch::autograd::grad({loss()}, {inputs[0], inputs[1], inputs[2]});
        const at::NoGradGuard no_gradients;
        const double step = 1e-5;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            Tensor flat = inputs[i].view({-1});
            for (index element = 0; element < flat.numel(); ++element) {
                const double value = flat[element].item<double>();
                flat[element].fill_(value + step);
                const double above = loss().item<double>();
                flat[element].fill_(value - step);
                const double below = loss().item<double>();
                flat[element].fill_(value);
                EXPECT_NEAR(found[i].view({-1})[element].item<double>(), (above - below) / (2 * step), 1e-7)
                    << way.name << ", input " << i << ", element " << element;
            }
        }
    }
}

// Six layers are too few to weigh methods; a Newton pass confirms one of them, and the rest is finished.
TEST(DenseChainGradients, AreThoseOfTheSequentialMethodWhereAnotherGoesStepAfterStep) {
    for (const index skip : {0, 1, 2}) {
        const auto inputs = leaves(6, 4, 3, at::kDouble);
        DenseChainOptions options;
        options.skip = skip;
        options.whole_trajectory = true;
        const auto memory = std::make_shared<DenseChainMemory>();
        const auto results = [&](Method method, index most_iterations) {
            options.evaluation.method = method;
            options.evaluation.max_iterations = most_iterations;
            const Tensor output = dense_chain(inputs[0], inputs[1], inputs[2], options, memory);
            auto found = gradients(output, normal(output.sizes(), 3, 1, at::kDouble), inputs);
            found.push_back(output);
            return found;
        };
        const auto expected = results(Method::sequential, 0), automatic = results(Method::automatic, 0);
        EXPECT_EQ(memory->forward.iterations, 0);
        EXPECT_EQ(memory->forward.sequential_steps, 4 * expected.back().size(0));
        const auto finished = results(Method::newton, 1);
        EXPECT_EQ(memory->forward.status, Status::finished_sequentially);
        for (std::size_t i = 0; i < expected.size(); ++i) {
            EXPECT_TRUE(at::equal(automatic[i], expected[i])) << "skip " << skip << ", result " << i;
            EXPECT_LT(largest_difference(finished[i], expected[i]), 1e-12) << "skip " << skip << ", result " << i;
        }
    }
}

TEST(DenseChainInputs, OfAnyStrides) {
    const auto inputs = leaves(6, 4, 3, at::kDouble);
    DenseChainOptions options;
    options.skip = 1;
    options.evaluation.method = Method::newton;
    const Tensor expected = dense_chain(inputs[0], inputs[1], inputs[2], options);
    // The same numbers, laid out differently.
    const Tensor initial = inputs[0].detach().t().contiguous().t();
    const Tensor weights = inputs[1].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_();
    const Tensor biases = at::cat({inputs[2].detach(), inputs[2].detach()}, 1).slice(1, 0, 3);
    ASSERT_FALSE(initial.is_contiguous() || weights.is_contiguous() || biases.is_contiguous());
    const Tensor output = dense_chain(initial, weights, biases, options);
    EXPECT_TRUE(at::equal(output, expected));
    const Tensor ones = at::ones_like(output);
    EXPECT_TRUE(at::equal(torch::autograd::grad({output}, {weights}, {ones})[0],
                          torch::autograd::grad({expected}, {inputs[1]}, {ones})[0]));
}

TEST(DenseChainInputs, Of16BitsAreWidenedAndTheResultNarrowed) {
    const auto inputs = leaves(4, 2, 3, at::kFloat);
    const Tensor narrow = inputs[0].detach().to(at::kBFloat16).requires_grad_();
    const Tensor output = dense_chain(narrow, inputs[1], inputs[2], {});
    EXPECT_EQ(output.scalar_type(), at::kBFloat16);
    const Tensor wide = dense_chain(narrow.to(at::kFloat), inputs[1], inputs[2], {});
    EXPECT_TRUE(at::equal(output, wide.to(at::kBFloat16)));
    const auto found = torch::autograd::grad({output.sum()}, {narrow, inputs[1]});
    EXPECT_EQ(found[0].scalar_type(), at::kBFloat16);
    EXPECT_EQ(found[1].scalar_type(), at::kFloat);
    EXPECT_THAT(message_of([&] { dense_chain(narrow, inputs[1].to(at::kHalf), inputs[2], {}); }),
                HasSubstr("weights: expected BFloat16 or Float"));
}

TEST(DenseChainInputs, WithoutGradientsAreNotFollowed) {
    const auto inputs = leaves(4, 2, 3, at::kFloat);
    DenseChainOptions options;
    EXPECT_FALSE(dense_chain(inputs[0].detach(), inputs[1].detach(), inputs[2].detach(), options).requires_grad());
    const at::NoGradGuard no_gradients;
    EXPECT_FALSE(dense_chain(inputs[0], inputs[1], inputs[2], options).requires_grad());
}

TEST(DenseChainInputs, OfNoLayersReturnTheInitialState) {
    const auto inputs = leaves(0, 2, 3, at::kFloat);
    for (const Method method : {Method::sequential, Method::newton}) {
        DenseChainOptions options;
        options.evaluation.method = method;
        const Tensor output = dense_chain(inputs[0], inputs[1], inputs[2], options);
        EXPECT_TRUE(at::equal(output, inputs[0]));
        const Tensor gradient = normal({2, 3}, 1, 1, at::kFloat);
        EXPECT_TRUE(at::equal(torch::autograd::grad({output}, {inputs[0]}, {gradient})[0], gradient));
    }
}

TEST(DenseChainGuess, PredictsFromTheLastTrajectory) {
    const index layers = 200, batch = 40, width = 6;
    const auto network = leaves(layers, batch, width, at::kDouble);
    const Tensor weights = network[1].detach() / std::sqrt(double(layers)),
                 biases = network[2].detach() / double(layers);
    const Tensor others = normal({batch, width}, 99, 1, at::kDouble);
    DenseChainOptions options;
    options.skip = 1;
    options.evaluation.method = Method::newton;

    const auto cold = std::make_shared<DenseChainMemory>();
    const Tensor expected = dense_chain(others, weights, biases, options, cold);
    EXPECT_FALSE(cold->prediction.defined());

    options.evaluation.guess = Guess::given;
    const auto warm = std::make_shared<DenseChainMemory>();
    dense_chain(network[0], weights, biases, options, warm);
    ASSERT_EQ(warm->prediction.sizes(), at::IntArrayRef({layers, width + 1, width}));
    const Tensor output = dense_chain(others, weights, biases, options, warm);
    EXPECT_LT(warm->forward.iterations, cold->forward.iterations);
    EXPECT_LT(largest_difference(output, expected), 1e-9);

    // A prediction of another shape or type is not used, nor is it in the way.
    const Tensor shorter = dense_chain(others, weights.slice(0, 0, 50), biases.slice(0, 0, 50), options, warm);
    EXPECT_TRUE(warm->forward.ok());
    EXPECT_EQ(warm->prediction.size(0), 50);
    EXPECT_EQ(shorter.size(0), batch);
}

TEST(DenseChainGuess, AfterAnAffineNetworkIsExact) {
    const auto network = leaves(30, 20, 4, at::kDouble);
    DenseChainOptions options;
    options.activation = Activation::identity;
    options.skip = 1;
    options.evaluation.guess = Guess::given;
    options.evaluation.tolerance = 1e-2;  // the ridge bends the map a little
    const auto memory = std::make_shared<DenseChainMemory>();
    dense_chain(network[0], network[1], network[2], options, memory);
    dense_chain(normal({20, 4}, 98, 1, at::kDouble), network[1], network[2], options, memory);
    EXPECT_LE(memory->forward.iterations, 1);
}

TEST(DenseChainErrors, NameTheArgument) {
    const auto inputs = leaves(4, 2, 3, at::kFloat);
    const DenseChainOptions options;
    const auto call = [&](const Tensor& initial, const Tensor& weights, const Tensor& biases) {
        return message_of([&] { dense_chain(initial, weights, biases, options); });
    };
    EXPECT_THAT(
        call({}, inputs[1], inputs[2]),
        HasSubstr("initial: expected float, double, bfloat16 or float16 [batch,width] on the CPU or a GPU, got an "
                  "undefined"));
    EXPECT_THAT(call(inputs[0].detach()[0], inputs[1], inputs[2]), HasSubstr("Float [3]"));
    EXPECT_THAT(call(inputs[0].detach().to(at::kLong), inputs[1], inputs[2]),
                HasSubstr("initial: expected float, double"));
    EXPECT_THAT(call(inputs[0], inputs[1].detach().to(at::kDouble), inputs[2]),
                HasSubstr("weights: expected [layers,3,3] of initial's type and device, got Double [4,3,3]"));
    EXPECT_THAT(call(inputs[0], inputs[1].slice(2, 0, 2), inputs[2]), HasSubstr("got Float [4,3,2]"));
    EXPECT_THAT(call(inputs[0], inputs[1], inputs[2].slice(0, 0, 3)), HasSubstr("biases: expected [4,3]"));
    DenseChainOptions odd;
    odd.skip = 3;
    EXPECT_THROW(dense_chain(inputs[0], inputs[1], inputs[2], odd), InvalidArgument);
}

TEST(DenseChainErrors, SecondDerivativesAreRefused) {
    const auto inputs = leaves(4, 2, 3, at::kFloat);
    const Tensor sum = dense_chain(inputs[0], inputs[1], inputs[2], {}).sum();
    EXPECT_THAT(message_of([&] { torch::autograd::grad({sum}, {inputs[1]}, {}, true, /*create_graph=*/true); }),
                HasSubstr("first derivatives only"));
}

TEST(DenseChainErrors, ChangedWeightsAreNoticed) {
    const auto inputs = leaves(4, 2, 3, at::kFloat);
    const Tensor sum = dense_chain(inputs[0], inputs[1], inputs[2], {}).sum();
    {
        const at::NoGradGuard no_gradients;
        inputs[1].detach().add_(1);  // a detached tensor shares the count of changes
    }
    EXPECT_THAT(message_of<c10::Error>([&] { sum.backward(); }), HasSubstr("modified by an inplace operation"));
}

TEST(DenseChainErrors, FollowOnFailure) {
    const auto inputs = leaves(60, 2, 5, at::kDouble);
    DenseChainOptions options;
    options.evaluation.max_iterations = 1;
    const auto memory = std::make_shared<DenseChainMemory>();
    const Tensor finished = dense_chain(inputs[0], inputs[1], inputs[2], options, memory);
    EXPECT_EQ(memory->forward.status, Status::finished_sequentially);
    const Tensor expected = layer_by_layer(inputs[0], inputs[1], inputs[2], options.activation, 0)[59];
    EXPECT_LT(largest_difference(finished, expected), 1e-12);

    options.evaluation.on_failure = OnFailure::report;
    const Tensor unfinished = dense_chain(inputs[0], inputs[1], inputs[2], options, memory);
    EXPECT_EQ(memory->forward.status, Status::max_iterations);
    EXPECT_THAT(message_of([&] { unfinished.sum().backward(); }), HasSubstr("backward of dense_chain"));

    options.evaluation.on_failure = OnFailure::raise;
    EXPECT_THROW(dense_chain(inputs[0], inputs[1], inputs[2], options), NotConverged);
}

TEST(DenseChainErrors, NonFiniteStatesHaveNoGradient) {
    for (const Method method : {Method::sequential, Method::newton}) {
        const auto inputs = leaves(8, 2, 3, at::kFloat);
        {
            const at::NoGradGuard no_gradients;
            inputs[0].select(0, 1).fill_(std::nanf(""));
        }
        DenseChainOptions options;
        options.skip = 1;
        options.evaluation.method = method;
        const auto memory = std::make_shared<DenseChainMemory>();
        const Tensor output = dense_chain(inputs[0], inputs[1], inputs[2], options, memory);
        EXPECT_EQ(memory->forward.status, Status::non_finite) << int(method);
        EXPECT_TRUE(std::isfinite(output[0].sum().item<float>()));  // the other sequence is unharmed
        EXPECT_THROW(output.sum().backward(), InvalidArgument);
    }
}

TEST(DenseChainErrors, JacobiansBeyondTheMemoryAreRefusedWithTheirSize) {
    const auto inputs = leaves(100, 2, 8, at::kFloat);
    DenseChainOptions options;
    options.evaluation.memory_limit = 1000;
    options.evaluation.window = 100;
    EXPECT_THROW(dense_chain(inputs[0], inputs[1], inputs[2], options), OutOfMemory);
    EXPECT_THAT(message_of<OutOfMemory>([&] { dense_chain(inputs[0], inputs[1], inputs[2], options); }),
                HasSubstr("1000"));
}

// ----------------------------------------------------------------------------------------------- the network

TEST(Network, ComputesWhatItsParametersSay) {
    ResidualNetwork network(
        ResidualNetworkOptions(12, 4).skip(2).activation(Activation::gelu).inputs(7).outputs(3).type(at::kDouble));
    const Tensor images = normal({5, 7}, 1, 1, at::kDouble);
    const auto parameters = network->named_parameters();
    ASSERT_EQ(parameters.size(), 6u);
    const Tensor initial = at::linear(images, parameters["encoder.weight"], parameters["encoder.bias"]);
    const Tensor last =
        layer_by_layer(initial, parameters["layers.weight"], parameters["layers.bias"], Activation::gelu, 2)[5];
    const Tensor expected = at::linear(last, parameters["decoder.weight"], parameters["decoder.bias"]);
    EXPECT_LT(largest_difference(network->forward(images), expected), 1e-11);
}

TEST(Network, ComesFromItsSeedAlone) {
    const auto weights = [](std::uint64_t seed) {
        return ResidualNetwork(ResidualNetworkOptions(8, 4).seed(seed))->layers->weight;
    };
    const Tensor first = weights(1);
    EXPECT_TRUE(at::equal(first, weights(1)));
    EXPECT_FALSE(at::equal(first, weights(2)));
}

TEST(Network, KeepsStatesAndGradientsInSizeAtAnyDepth) {
    for (const auto& [name, activation] : activation_names)
        for (const index skip : {1, 2})
            for (const index layers : {16, 1024}) {
                ResidualNetworkOptions options(layers, 16);
                options.skip(skip).activation(activation).inputs(16);
                options.evaluation().method = Method::sequential;
                ResidualNetwork network(options);
                const Tensor images = normal({32, 16}, 1, 1, at::kFloat).requires_grad_();
                const Tensor logits = network->forward(images);
                const double size = logits.pow(2).mean().sqrt().item<double>();
                const Tensor gradient =
                    torch::autograd::grad({logits}, {images}, {normal({32, 10}, 2, 1, at::kFloat)})[0];
                const double gradient_size = gradient.pow(2).mean().sqrt().item<double>();
                SCOPED_TRACE(std::string(name) + ", skip " + std::to_string(skip) + ", layers " +
                             std::to_string(layers));
                EXPECT_GT(size, 0.2);
                EXPECT_LT(size, 10);
                EXPECT_GT(gradient_size, 0.1);
                EXPECT_LT(gradient_size, 10);
            }
}

TEST(Network, RefusesImpossibleSizes) {
    const auto message = [](const ResidualNetworkOptions& options) {
        return message_of([&] { ResidualNetwork network(options); });
    };
    EXPECT_THAT(message(ResidualNetworkOptions(0, 4)), HasSubstr("layers: expected at least 1, got 0"));
    EXPECT_THAT(message(ResidualNetworkOptions(4, -1)), HasSubstr("width: expected at least 1, got -1"));
    EXPECT_THAT(message(ResidualNetworkOptions(10, 4).skip(3)),
                HasSubstr("layers: expected a multiple of skip = 3, got 10"));
    EXPECT_THAT(message(ResidualNetworkOptions(4, 4).type(at::kLong)), HasSubstr("type: expected float or double"));
    EXPECT_THROW(ResidualNetwork(ResidualNetworkOptions(index(1) << 40, index(1) << 20)), Error);
    EXPECT_THROW(ResidualNetwork(ResidualNetworkOptions(index(1) << 40, 16)), OutOfMemory);
}

// -------------------------------------------------------------------------------------------------- the data

TEST(Data, IsSplitWithoutOverlap) {
    const FashionMnist data = load_fashion_mnist({}, 1);
    EXPECT_EQ(data.training.size(), 54000);
    EXPECT_EQ(data.held_out.size(), 6000);
    EXPECT_EQ(data.test.size(), 10000);
    EXPECT_EQ(data.training.images.size(1), 784);
    // Every class has 6,000 training images and 1,000 test images.
    const Tensor labels = at::cat({data.training.labels, data.held_out.labels});
    EXPECT_TRUE(labels.bincount().eq(6000).all().item<bool>());
    EXPECT_TRUE(data.test.labels.bincount().eq(1000).all().item<bool>());

    const auto all = data.training.batch(0, data.training.size());
    EXPECT_NEAR(all.images.mean().item<double>(), 0, 0.01);
    EXPECT_NEAR(all.images.std().item<double>(), 1, 0.01);

    const FashionMnist again = load_fashion_mnist({}, 1, 6000, 100), other = load_fashion_mnist({}, 2);
    EXPECT_TRUE(at::equal(again.held_out.images, data.held_out.images));
    EXPECT_TRUE(at::equal(again.training.images, data.training.images.slice(0, 0, 100)));
    EXPECT_FALSE(at::equal(other.held_out.labels, data.held_out.labels));
}

TEST(Data, IsShuffledBySeedAndEpoch) {
    const Tensor order = shuffled(1000, 1, 0);
    EXPECT_TRUE(at::equal(std::get<0>(order.sort()), at::arange(1000, at::kLong)));
    EXPECT_TRUE(at::equal(order, shuffled(1000, 1, 0)));
    EXPECT_FALSE(at::equal(order, shuffled(1000, 1, 1)));
    EXPECT_FALSE(at::equal(order, shuffled(1000, 2, 0)));
    EXPECT_EQ(shuffled(0, 1, 0).size(0), 0);
}

TEST(Data, ErrorsSayWhatToDo) {
    EXPECT_THAT(message_of<Error>([] { load_fashion_mnist("/nonexistent", 1); }), HasSubstr("dataset-fashion-mnist"));
    EXPECT_THAT(message_of([] { load_fashion_mnist({}, 1, 60000); }),
                HasSubstr("held_out: expected 0 to 59999, got 60000"));
    EXPECT_THAT(message_of([] { load_fashion_mnist({}, 1, 6000, 54001); }),
                HasSubstr("train_images: expected 0 to 54000"));
}

// -------------------------------------------------------------------------------------------------- training

class Training : public testing::Test {
protected:
    void SetUp() override {
        folder = std::filesystem::temp_directory_path() / ("deeppcr-nn-test-" + std::to_string(getpid()));
        std::filesystem::create_directories(folder);
    }
    void TearDown() override { std::filesystem::remove_all(folder); }

    /// Four steps make an epoch.
    TrainingOptions small(const std::string& checkpoint = {}) const {
        TrainingOptions options;
        options.layers = 24;
        options.width = 8;
        options.batch = 32;
        options.train_images = 128;
        options.held_out = 50;
        options.steps = 6;
        options.test = false;
        if (!checkpoint.empty()) options.checkpoint = folder / checkpoint;
        return options;
    }

    std::filesystem::path folder;
};

/// Ends a training after so many steps, as Ctrl-C does.
TrainingCallbacks stop_after(index steps) {
    TrainingCallbacks callbacks;
    const auto done = std::make_shared<index>(0);
    callbacks.step = [done](const StepRecord&) { ++*done; };
    callbacks.interrupted = [done, steps] { return *done >= steps; };
    return callbacks;
}

void expect_same_numbers(const std::filesystem::path& found, const std::filesystem::path& expected) {
    auto a = files::read_safetensors(found), b = files::read_safetensors(expected);
    for (const char* key : {"epoch_seconds", "checksum"}) {  // of the seconds, too
        a.metadata.erase(key);
        b.metadata.erase(key);
    }
    EXPECT_EQ(a.metadata, b.metadata);
    ASSERT_EQ(a.tensors.size(), b.tensors.size());
    for (const auto& [name, tensor] : b.tensors) {
        ASSERT_EQ(a.tensors.count(name), 1u) << name;
        EXPECT_TRUE(a.tensors[name].shape == tensor.shape && a.tensors[name].values == tensor.values) << name;
    }
}

TEST_F(Training, ResumesToTheSameBits) {
    for (const Method method : {Method::newton, Method::sequential})
        for (const Optimiser optimiser : {Optimiser::adamw, Optimiser::sgd})
            for (const index stop : {3, 4}) {  // within an epoch, and at its end
                SCOPED_TRACE(name_of(method_names, method) + ", " + name_of(optimiser_names, optimiser) +
                             ", stopped after " + std::to_string(stop));
                TrainingOptions options = small("whole.safetensors");
                options.evaluation.method = method;
                options.optimiser = optimiser;
                options.learning_rate = optimiser == Optimiser::adamw ? 1e-3 : 1e-2;
                const TrainingResult whole = train(options);
                ASSERT_EQ(whole.steps.size(), 6u);
                ASSERT_EQ(whole.epochs.size(), 2u);

                options.checkpoint = folder / "part.safetensors";
                const TrainingResult part = train(options, stop_after(stop));
                EXPECT_TRUE(part.interrupted);
                ASSERT_EQ(part.steps.size(), std::size_t(stop));
                options.resume = options.checkpoint;
                const TrainingResult rest = train(options);
                EXPECT_FALSE(rest.interrupted);
                ASSERT_EQ(rest.steps.size(), std::size_t(6 - stop));
                for (std::size_t step = 0; step < 6; ++step) {
                    const StepRecord& found =
                        step < std::size_t(stop) ? part.steps[step] : rest.steps[step - std::size_t(stop)];
                    EXPECT_EQ(found.step, index(step) + 1);
                    EXPECT_EQ(found.loss, whole.steps[step].loss);
                    EXPECT_EQ(found.gradient_norm, whole.steps[step].gradient_norm);
                    EXPECT_EQ(found.iterations, whole.steps[step].iterations);
                }
                EXPECT_EQ(rest.epochs.back().loss, whole.epochs.back().loss);
                EXPECT_EQ(rest.epochs.back().validation.loss, whole.epochs.back().validation.loss);
                expect_same_numbers(folder / "part.safetensors", folder / "whole.safetensors");
            }
}

TEST_F(Training, LearnsAndBothMethodsAgree) {
    TrainingOptions options = small();
    options.layers = 100;
    options.train_images = 3200;
    options.held_out = 500;
    options.steps = 100;
    options.evaluation.method = Method::newton;
    const TrainingResult parallel = train(options), again = train(options);
    options.evaluation.method = Method::sequential;
    const TrainingResult sequential = train(options);
    options.seed = 2;
    const TrainingResult other = train(options);

    for (std::size_t step = 0; step < parallel.steps.size(); ++step) {
        EXPECT_EQ(parallel.steps[step].loss, again.steps[step].loss) << step;
        EXPECT_GT(parallel.steps[step].iterations, 0);
        EXPECT_EQ(sequential.steps[step].iterations, 0);
        if (step < 20) {
            EXPECT_NEAR(parallel.steps[step].loss, sequential.steps[step].loss, 1e-3) << step;
        }
    }
    EXPECT_NE(other.steps[0].loss, sequential.steps[0].loss);
    EXPECT_GT(parallel.epochs.back().validation.accuracy, 0.65);
    EXPECT_GT(sequential.epochs.back().validation.accuracy, 0.65);
    EXPECT_EQ(parallel.parameters, 784 * 8 + 8 + 100 * (8 * 8 + 8) + 8 * 10 + 10);
}

TEST_F(Training, ValidatesItsCheckpoints) {
    TrainingOptions options = small("network.safetensors");
    options.steps = 20;
    options.test = true;
    const TrainingResult trained = train(options);
    ASSERT_EQ(trained.test.images, 10000);
    EXPECT_GT(trained.test.accuracy, 0.2);

    ValidationOptions validation;
    validation.evaluation = options.evaluation;
    const ValidationResult found = validate(options.checkpoint, validation);
    EXPECT_EQ(found.accuracy, trained.test.accuracy);
    EXPECT_EQ(found.loss, trained.test.loss);
    validation.evaluation.method = Method::sequential;
    validation.batch = 1000;
    const ValidationResult sequential = validate(options.checkpoint, validation);
    EXPECT_NEAR(sequential.accuracy, trained.test.accuracy, 0.001);
    EXPECT_EQ(sequential.iterations, 0);
    validation.held_out = true;
    EXPECT_EQ(validate(options.checkpoint, validation).images, 50);

    const TrainingOptions saved = checkpoint_options(options.checkpoint);
    EXPECT_EQ(saved.layers, 24);
    EXPECT_EQ(saved.learning_rate, options.learning_rate);
    EXPECT_EQ(saved.evaluation.guess, Guess::given);
}

TEST_F(Training, ComparesMethods) {
    TrainingOptions options = small("network.safetensors");
    Options sequential, newton;
    sequential.method = Method::sequential;
    newton.method = Method::newton;
    const auto initial = compare_methods(options, {}, sequential, newton);
    train(options);
    const auto trained = compare_methods(options, options.checkpoint, sequential, newton);
    for (const auto& comparison : {initial, trained}) {
        EXPECT_GT(comparison.logits.magnitude, 0.01);
        EXPECT_LT(comparison.logits.largest, 1e-3 * comparison.logits.magnitude);
        ASSERT_EQ(comparison.gradients.size(), 6u);
        for (const auto& gradient : comparison.gradients) {
            EXPECT_GT(gradient.magnitude, 0) << gradient.name;
            EXPECT_LT(gradient.largest, 1e-3 * gradient.magnitude) << gradient.name;
        }
        EXPECT_GT(comparison.second_forward.iterations, 0);
    }
    EXPECT_NE(initial.logits.magnitude, trained.logits.magnitude);
}

TEST_F(Training, ThatDivergesLeavesTheCheckpoint) {
    TrainingOptions options = small("network.safetensors");
    options.evaluation.method = Method::sequential;
    options.activation = Activation::identity;
    options.optimiser = Optimiser::sgd;
    options.learning_rate = options.trunk_learning_rate = 1e20;
    options.gradient_clip = 0;
    options.warm_up = 0;
    options.checkpoint_interval = 1;
    EXPECT_THAT(message_of<Error>([&] { train(options); }), HasSubstr("is not finite"));
    EXPECT_GE(files::read_safetensors(options.checkpoint).tensors.size(), 6u);
}

TEST_F(Training, RefusesOptionsThatMakeNoSense) {
    const auto message = [&](auto change) {
        TrainingOptions options = small();
        change(options);
        return message_of<Error>([&] { train(options); });
    };
    EXPECT_THAT(message([](auto& o) { o.batch = 0; }), HasSubstr("batch: expected at least 1, got 0"));
    EXPECT_THAT(message([](auto& o) { o.batch = 129; }),
                HasSubstr("batch: expected at most the number of training images, 128"));
    EXPECT_THAT(message([](auto& o) { o.epochs = -1; }), HasSubstr("epochs: expected at least 1"));
    EXPECT_THAT(message([](auto& o) { o.learning_rate = 0; }), HasSubstr("learning_rate: expected"));
    EXPECT_THAT(message([](auto& o) { o.learning_rate = std::nan(""); }), HasSubstr("learning_rate: expected"));
    EXPECT_THAT(message([](auto& o) { o.momentum = 1; }), HasSubstr("momentum: expected"));
    EXPECT_THAT(message([](auto& o) { o.layers = 25, o.skip = 2; }),
                HasSubstr("layers: expected a multiple of skip = 2"));
    EXPECT_THAT(message([](auto& o) { o.data = "/nonexistent"; }), HasSubstr("dataset-fashion-mnist"));
    EXPECT_THAT(message([](auto& o) { o.device = "tpu"; }), HasSubstr("device: expected cpu, cuda or cuda:<number>"));
    EXPECT_THAT(message([](auto& o) { o.device = "cuda:7"; }), HasSubstr("device cuda:7"));
    EXPECT_THAT(message([](auto& o) { o.checkpoint = "/nonexistent/file"; }), HasSubstr("/nonexistent"));
    EXPECT_THAT(message([](auto& o) { o.layers = index(1) << 40; }), HasSubstr("bytes"));
}

TEST_F(Training, RefusesWhatIsNoCheckpointOrAnother) {
    TrainingOptions options = small("network.safetensors");
    options.steps = 2;
    train(options);
    const auto good = files::read_safetensors(options.checkpoint);
    const auto resume = [&](auto change_file, auto change_options) {
        auto contents = good;
        contents.metadata.erase("checksum");  // or nothing else would be looked at
        change_file(contents);
        TrainingOptions changed = options;
        changed.checkpoint.clear();
        changed.resume = folder / "changed.safetensors";
        files::write_safetensors(changed.resume, contents);
        change_options(changed);
        return message_of<Error>([&] { train(changed); });
    };
    const auto as_is = [](auto&) {};
    EXPECT_EQ(resume(as_is, [](auto& o) { o.steps = 3; }), nothing_thrown);
    EXPECT_THAT(resume(as_is, [](auto& o) { o.layers = 12; }),
                HasSubstr("layers: expected 24, as in the checkpoint, got 12"));
    EXPECT_THAT(resume(as_is, [](auto& o) { o.activation = Activation::relu; }),
                HasSubstr("activation: expected tanh, as in the checkpoint, got relu"));
    EXPECT_THAT(resume(as_is, [](auto& o) { o.seed = 5; }), HasSubstr("seed: expected 1, as in the checkpoint"));
    EXPECT_THAT(resume(as_is, [](auto& o) { o.steps = 1; }), HasSubstr("steps: expected at least the 2 steps"));
    EXPECT_THAT(resume([](auto& f) { f.tensors.erase("decoder.bias"); }, as_is),
                HasSubstr("tensor decoder.bias, got none"));
    EXPECT_THAT(resume([](auto& f) { f.tensors.erase("layers.weight"); }, as_is), HasSubstr("layers.weight"));
    EXPECT_THAT(resume([](auto& f) { f.tensors.erase("optimiser.exp_avg.layers.bias"); }, as_is),
                HasSubstr("optimiser.exp_avg.layers.bias"));
    EXPECT_THAT(resume([](auto& f) { f.tensors["decoder.bias"] = f.tensors["encoder.bias"]; }, as_is),
                HasSubstr("expected Float [10] as decoder.bias, got Float [8]"));
    EXPECT_THAT(resume([](auto& f) { f.metadata.erase("format"); }, as_is), HasSubstr("not a checkpoint"));
    EXPECT_THAT(resume([](auto& f) { f.metadata["format"] = "another"; }, as_is), HasSubstr("\"another\""));
    EXPECT_THAT(resume([](auto& f) { f.metadata["step"] = "two"; }, as_is), HasSubstr("a number as metadata \"step\""));
    EXPECT_THAT(resume([](auto& f) { f.metadata["step"] = "-2"; }, as_is), HasSubstr("a count as metadata \"step\""));
    EXPECT_THAT(resume([](auto& f) { f.metadata["activation"] = "step"; }, as_is),
                HasSubstr("activation: expected one of"));
    // The network that the metadata claims would not fit any memory; the tensors show that it is none.
    EXPECT_THAT(
        resume([](auto& f) { f.metadata["layers"] = "1099511627776"; }, [](auto& o) { o.layers = 1099511627776; }),
        HasSubstr("layers.weight of 1099511627776 layers"));

    std::filesystem::resize_file(options.checkpoint, std::filesystem::file_size(options.checkpoint) - 1);
    EXPECT_THROW(validate(options.checkpoint), FileError);
    EXPECT_THROW(checkpoint_options(folder / "none.safetensors"), FileError);
}

TEST(LibTorchHere, RunsOnAFastBlas) {
    const LibTorch found = libtorch();
    EXPECT_FALSE(found.version.empty());
    EXPECT_TRUE(found.fast_blas) << found.blas;
}

}  // namespace
}  // namespace deeppcr::nn
