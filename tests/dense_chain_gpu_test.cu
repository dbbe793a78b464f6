// DenseChain on a GPU, or on an emulated one, against the reference backend.
#include <gtest/gtest.h>

#include <limits>
#include <optional>
#include <string>

#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"

namespace deeppcr {
namespace {

constexpr Activation activations[] = {Activation::identity, Activation::tanh, Activation::relu, Activation::sigmoid,
                                      Activation::gelu};

/// The same network in main memory and on the GPU.
template <class T>
struct Problem {
    Problem(index steps, index batch, index width, Activation activation, index skip, double strength = 0.9)
        : options{activation, skip},
          layers(steps * std::max<index>(skip, 1)),
          weights(Buffer<T>::random({layers, width, width}, 1)),
          biases(Buffer<T>::random({layers, 1, width}, 2)),
          initial(Buffer<T>::random({1, batch, width}, 3)),
          gradient(Buffer<T>::random({steps, batch, width}, 4)) {
        for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= T(strength / std::sqrt(double(width)));
        there_weights = weights.on(Device::cuda());
        there_biases = biases.on(Device::cuda());
        there_initial = initial.on(Device::cuda());
        here.emplace(weights, biases, initial, options);
        there.emplace(there_weights, there_biases, there_initial, options);
    }

    const Shape& shape() const { return here->shape(); }
    Section section(Backend backend, const std::vector<index>& sequences) const {
        return {0, shape().steps, sequences, {.backend = backend}};
    }
    std::string description() const {
        return "activation " + std::to_string(int(options.activation)) + ", skip " + std::to_string(options.skip) +
               ", " + to_string(shape());
    }

    typename DenseChain<T>::Options options;
    index layers;
    Buffer<T> weights, biases, initial, gradient, there_weights, there_biases, there_initial;
    std::optional<DenseChain<T>> here, there;
};

template <class T>
Buffer<T> on_gpu(const Shape& shape) {
    return Buffer<T>(shape, Layout::steps_first, Device::cuda());
}

/// All operations of a chain, there against the reference here.
template <class T>
void compare(const Problem<T>& problem) {
    SCOPED_TRACE(problem.description());
    const auto& [steps, batch, width] = problem.shape();
    const Shape states = problem.shape(), blocks{steps, batch, width * width}, per_layer{problem.layers, batch, width};
    const Shape matrices{problem.layers, width, width}, vectors{problem.layers, 1, width}, one{1, batch, width};
    const double tolerance = 200 * double(std::numeric_limits<T>::epsilon()) * std::sqrt(double(width));
    const std::vector<index> sequences = all(batch);
    const Section here = problem.section(Backend::reference, sequences);
    const Section there = problem.section(Backend::cuda, sequences);

    Buffer<T> trajectory(states), slopes(per_layer);
    problem.here->run_with_slopes(here, problem.initial, trajectory.view(), slopes.view());
    const Buffer<T> there_trajectory = on_gpu<T>(states), there_slopes = on_gpu<T>(per_layer);
    problem.there->run_with_slopes(there, problem.there_initial, there_trajectory.view(), there_slopes.view());
    EXPECT_TRUE(near(there_trajectory.on({}), trajectory, tolerance));
    EXPECT_TRUE(near(there_slopes.on({}), slopes, tolerance));

    // run = repeated step, bit for bit; all steps from the states that run has found
    const Buffer<T> own = there_trajectory.on({});
    Buffer<T> before(states);
    std::copy_n(problem.initial.data(), batch * width, before.data());
    std::copy_n(own.data(), (steps - 1) * batch * width, before.data() + batch * width);
    const Buffer<T> there_before = before.on(Device::cuda());
    const Buffer<T> after = on_gpu<T>(states);
    problem.there->step(there, there_before, after.view());
    EXPECT_TRUE(same_bits(after.on({}), own));

    Buffer<T> expected(states), jacobian(blocks), diagonal(states);
    problem.here->linearise(here, before, expected.view(), Jacobian<T>(jacobian.data(), states, width));
    const Buffer<T> there_jacobian = on_gpu<T>(blocks), there_diagonal = on_gpu<T>(states);
    problem.there->linearise(there, there_before, after.view(), Jacobian<T>(there_jacobian.data(), states, width));
    EXPECT_TRUE(same_bits(after.on({}), own));
    EXPECT_TRUE(near(there_jacobian.on({}), jacobian, tolerance));
    problem.there->linearise_diagonal(there, there_before, after.view(), Jacobian<T>(there_diagonal.data(), states, 1));
    for (index i = 0; i < diagonal.size(); ++i)
        diagonal.data()[i] = jacobian.data()[i / width * width * width + i % width * (width + 1)];
    EXPECT_TRUE(near(there_diagonal.on({}), diagonal, tolerance));

    Buffer<T> weights(matrices), biases(vectors), adjoint(states), first(one);
    const Buffer<T> there_gradient = problem.gradient.on(Device::cuda());
    const Buffer<T> there_weights = on_gpu<T>(matrices), there_biases = on_gpu<T>(vectors);
    const Buffer<T> there_adjoint = on_gpu<T>(states), there_first = on_gpu<T>(one);
    problem.here->run_backward(here, before, {}, problem.gradient, weights.view(), biases.view(), adjoint.view(),
                               first.view());
    for (const bool with_slopes : {true, false}) {
        problem.there->run_backward(there, there_before, with_slopes ? there_slopes.view() : View<T>(), there_gradient,
                                    there_weights.view(), there_biases.view(), there_adjoint.view(),
                                    there_first.view());
        EXPECT_TRUE(near(there_weights.on({}), weights, 4 * tolerance));
        EXPECT_TRUE(near(there_biases.on({}), biases, 4 * tolerance));
        EXPECT_TRUE(near(there_adjoint.on({}), adjoint, 4 * tolerance));
        EXPECT_TRUE(near(there_first.on({}), first, 4 * tolerance));
    }
    problem.here->parameter_gradients(here, before, problem.gradient, weights.view(), biases.view());
    problem.there->parameter_gradients(there, there_before, there_gradient, there_weights.view(), there_biases.view());
    EXPECT_TRUE(near(there_weights.on({}), weights, 4 * tolerance));
    EXPECT_TRUE(near(there_biases.on({}), biases, 4 * tolerance));
}

class ChainOnGpu : public testing::Test {
protected:
    void SetUp() override {
        if (!cuda_problem().empty()) GTEST_SKIP() << cuda_problem();
    }
};

// One number; less than four columns; a layout less one, whole, one more, for each of them; several pieces per layer.
TEST_F(ChainOnGpu, EveryWidth) {
    for (const index width : {1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 100, 128, 130, 200}) {
        compare(Problem<float>(3, width > 64 ? 1 : 3, width, Activation::tanh, 0));
        compare(Problem<double>(2, 1, width, Activation::sigmoid, 2));
    }
}

TEST_F(ChainOnGpu, EveryActivationSkipAndBatch) {
    for (const Activation activation : activations)
        for (const index skip : {0, 1, 2, 3})
            for (const index batch : {1, 2, 13}) {  // alone; fewer than a block takes; more than a warp linearises
                compare(Problem<float>(4, batch, 5, activation, skip));
                compare(Problem<double>(2, batch, 8, activation, skip));
            }
}

TEST_F(ChainOnGpu, ManySequencesPerBlockHaveTheSameBits) {
    for (const index width : {7, 20, 40, 70, 140}) {
        const Problem<float> problem(3, 14, width, Activation::gelu, 1);
        const std::vector<index> sequences = all(14);
        const Buffer<float> together = on_gpu<float>(problem.shape());
        problem.there->run(problem.section(Backend::cuda, sequences), problem.there_initial, together.view());
        for (const index one : {0, 13}) {
            const std::vector<index> sequence{one};
            const Buffer<float> state = on_gpu<float>({1, 1, width}), alone = on_gpu<float>({3, 1, width});
            const Section section = problem.section(Backend::cuda, sequence);
            problem.there->initial(section, state.view());
            problem.there->run(section, state, alone.view());
            EXPECT_TRUE(same_bits<float>(alone.on({}).view(), together.on({}).view().sequences(one, one + 1)));
        }
    }
}

TEST_F(ChainOnGpu, SectionsJoin) {
    const Problem<double> problem(6, 2, 9, Activation::tanh, 2);
    const std::vector<index> sequences = all(2);
    const Buffer<double> whole = on_gpu<double>(problem.shape()), parts = on_gpu<double>(problem.shape());
    problem.there->run(problem.section(Backend::cuda, sequences), problem.there_initial, whole.view());
    const Execution gpu{.backend = Backend::cuda};
    problem.there->run({0, 4, sequences, gpu}, problem.there_initial, parts.view().steps(0, 4));
    problem.there->run({4, 6, sequences, gpu}, parts.view().steps(3, 4), parts.view().steps(4, 6));
    EXPECT_TRUE(same_bits(parts.on({}), whole.on({})));
}

TEST_F(ChainOnGpu, ArraysMustLieWhereItRuns) {
    const Problem<float> problem(2, 1, 4, Activation::tanh, 0);
    EXPECT_TRUE(problem.there->runs_on(Backend::cuda));
    EXPECT_FALSE(problem.there->runs_on(Backend::cpu));
    EXPECT_FALSE(problem.here->runs_on(Backend::cuda));
    EXPECT_THROW(DenseChain<float>(problem.there_weights, problem.biases, problem.there_initial, problem.options),
                 InvalidArgument);
    const std::vector<index> sequences = all(1);
    Buffer<float> trajectory(problem.shape());
    EXPECT_THROW(problem.here->run(problem.section(Backend::cuda, sequences), problem.initial, trajectory.view()),
                 InvalidArgument);
    EXPECT_THROW(problem.there->run(problem.section(Backend::cpu, sequences), problem.initial, trajectory.view()),
                 InvalidArgument);
}

}  // namespace
}  // namespace deeppcr
