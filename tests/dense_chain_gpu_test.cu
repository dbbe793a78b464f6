// DenseChain on a GPU, or on an emulated one, against the reference backend.
#include <gtest/gtest.h>

#include <limits>
#include <optional>
#include <string>

#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"
#include "tests/gpu.hpp"

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

using ChainOnGpu = OnGpuTest;

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

/// The largest max|x_t - f(x_{t-1})| of a trajectory that lies there, relative to what the tolerance allows.
template <class T>
double residual(const Problem<T>& problem, const Buffer<T>& trajectory, double tolerance) {
    const auto& [steps, batch, width] = problem.shape();
    const Buffer<T> own = trajectory.on({});
    Buffer<T> before(problem.shape());
    for (index t = 0; t < steps; ++t)
        for (index j = 0; j < batch; ++j)
            std::copy_n(t == 0 ? problem.initial.view().at(0, j) : own.view().at(t - 1, j), width,
                        before.view().at(t, j));
    const Buffer<T> there_before = before.on(Device::cuda()), there_after = on_gpu<T>(problem.shape());
    const std::vector<index> sequences = all(batch);
    problem.there->step(problem.section(Backend::cuda, sequences), there_before, there_after.view());
    const Buffer<T> after = there_after.on({});
    double largest = 0;
    for (index t = 0; t < steps; ++t)
        for (index j = 0; j < batch; ++j)
            for (index k = 0; k < width; ++k) {
                const double x = own(t, j, k), apart = std::abs(x - double(after(t, j, k)));
                if (!(apart / (tolerance * (1 + std::abs(x))) <= largest))
                    largest = apart / (tolerance * (1 + std::abs(x)));
            }
    return largest;
}

// Contractive layers: all chunks meet. Every layout, blocks of several layers, several sequences per block, gaps.
TEST_F(ChainOnGpu, OverlapFindsTheTrajectory) {
    struct Case {
        index steps, batch, width, skip, chunk;
        Layout layout;
    };
    for (const Case& c : {Case{300, 1, 7, 0, 0, Layout::steps_first}, Case{200, 3, 20, 0, 40, Layout::batch_first},
                          Case{120, 17, 5, 0, 30, Layout::steps_first}, Case{90, 1, 40, 0, 30, Layout::steps_first},
                          Case{70, 2, 100, 0, 35, Layout::batch_first}, Case{50, 1, 130, 0, 25, Layout::steps_first},
                          Case{33, 2, 3, 0, 100, Layout::steps_first}}) {
        const Problem<float> problem(c.steps, c.batch, c.width, Activation::tanh, c.skip, 0.4);
        SCOPED_TRACE(problem.description());
        const Buffer<float> trajectory(problem.shape(), c.layout, Device::cuda());
        constexpr double tolerance = 1e-5;
        const Report report =
            evaluate(*problem.there, trajectory.view(),
                     {.method = Method::overlap, .chunk = c.chunk, .tolerance = tolerance, .execution = gpu});
        EXPECT_EQ(report.status, Status::converged) << report;
        EXPECT_EQ(report.sequential_steps, 0);
        EXPECT_LE(report.relative_residual, 1);
        EXPECT_NEAR(residual(problem, trajectory, tolerance), report.relative_residual, 0.5);
        const Buffer<float> expected = evaluate(*problem.here, {.method = Method::sequential}).trajectory;
        EXPECT_LE(largest_difference<float>(trajectory.on({}), expected), 1e-4);
    }
}

// Inexact products of Jacobians cost passes and no accuracy; the gradient, which has no residual, is as exact as they.
TEST_F(ChainOnGpu, TensorCoresMayMultiplyJacobians) {
    const Problem<float> problem(24, 1, 40, Activation::tanh, 0, 1.5);
    const Recurrence<float>&here = *problem.here, &there = *problem.there;
    const auto [expected, report] = evaluate(here, {.method = Method::sequential});
    const Buffer<float> gradient = Buffer<float>::random(here.shape(), 6), there_gradient = gradient.on(Device::cuda());
    const Buffer<float> expected_gradient = adjoint<float>(here, expected, report, gradient).states;
    for (const auto& [kind, error] : {std::pair(TensorCores::split, 1e-5), std::pair(TensorCores::tf32, 2e-3)}) {
        SCOPED_TRACE(int(kind));
        const Options options{
            .method = Method::newton, .reduction = Reduction::scan, .chunk = 5, .tensor_cores = kind, .execution = gpu};
        const Buffer<float> trajectory = on_gpu<float>(here.shape());
        const Report found = evaluate(there, trajectory.view(), options);
        EXPECT_EQ(found.status, Status::converged) << found;
        EXPECT_TRUE(near(trajectory.on({}), expected, 1e-4));
        const Buffer<float> states = adjoint<float>(there, trajectory, found, there_gradient, options).states.on({});
        EXPECT_TRUE(near(states, expected_gradient, error));
        EXPECT_EQ(bool(near(states, expected_gradient, 1e-5)), kind != TensorCores::tf32);
    }
}

// Sequences that share a block are repaired as if they were alone, however long their neighbours take.
TEST_F(ChainOnGpu, OverlapOfASequenceDoesNotDependOnItsNeighbours) {
    constexpr index steps = 1200, batch = 6;
    for (const index width : {6, 20}) {  // of one warp, of several
        Problem<float> problem(steps, batch, width, Activation::identity, 0, 0.5);
        for (index j = 0; j < batch; ++j)  // the larger, the longer it is remembered
            for (index k = 0; k < width; ++k) problem.initial(0, j, k) *= std::pow(100.0F, float(j % 4));
        problem.there_initial = problem.initial.on(Device::cuda());
        const Options options{.method = Method::overlap, .chunk = 40, .tolerance = 1e-4, .execution = gpu};
        const Buffer<float> together = on_gpu<float>(problem.shape());
        problem.there.emplace(problem.there_weights, problem.there_biases, problem.there_initial, problem.options);
        const Report report = evaluate(*problem.there, together.view(), options);
        EXPECT_EQ(report.status, Status::converged) << report;
        for (index j = 0; j < batch; ++j) {
            const DenseChain<float> one(problem.there_weights, problem.there_biases,
                                        View<const float>(problem.there_initial).sequences(j, j + 1), problem.options);
            const Buffer<float> alone = on_gpu<float>(one.shape());
            const Report of_one = evaluate(one, alone.view(), options);
            EXPECT_TRUE(same_bits<float>(alone.on({}).view(), together.on({}).view().sequences(j, j + 1))) << j;
            EXPECT_EQ(of_one.residual, report.sequences[std::size_t(j)].residual) << j;
        }
    }
}

// Old states that are not finite are met by nothing: all of them are replaced.
TEST_F(ChainOnGpu, OverlapReplacesStatesThatAreNotFinite) {
    std::vector<float> factors;
    for (const auto& [factor, count] :
         {std::pair{0.5F, 140}, std::pair{1.0F, 60}, std::pair{2.0F, 140}, std::pair{1.0F, 60}})
        factors.insert(factors.end(), std::size_t(count), factor);
    const Buffer<float> weights({400, 1, 1}), biases({400, 1, 1}), initial({1, 1, 1});
    std::copy(factors.begin(), factors.end(), weights.data());
    initial.data()[0] = 1;
    const DenseChain<float>::Options identity{Activation::identity, 0};
    const DenseChain<float> here(weights, biases, initial, identity);
    const Buffer<float> there_weights = weights.on(Device::cuda()), there_biases = biases.on(Device::cuda()),
                        there_initial = initial.on(Device::cuda());
    const DenseChain<float> there(there_weights, there_biases, there_initial, identity);
    const Buffer<float> expected = evaluate(here, {.method = Method::sequential}).trajectory;
    for (const Guess guess : {Guess::initial_state, Guess::given}) {  // the second chunk overflows, or begins with NaN
        Options options{.method = Method::overlap, .chunk = 200, .guess = guess};
        Buffer<float> trajectory(here.shape());
        trajectory(199, 0, 0) = std::numeric_limits<float>::quiet_NaN();
        const Buffer<float> there_trajectory = trajectory.on(Device::cuda());
        EXPECT_EQ(evaluate(here, trajectory.view(), options).status, Status::converged);
        EXPECT_TRUE(same_bits<float>(trajectory, expected));
        options.execution = gpu;
        EXPECT_EQ(evaluate(there, there_trajectory.view(), options).status, Status::converged);
        EXPECT_TRUE(same_bits<float>(there_trajectory.on({}), expected));
    }
}

// The residual that the report names is the one that f has, exactly; both backends do the same.
TEST_F(ChainOnGpu, OverlapReportsTheResidual) {
    const Problem<double> problem(160, 2, 6, Activation::tanh, 0, 0.7);
    constexpr double tolerance = 1e-3;
    const Options options{.method = Method::overlap, .chunk = 40, .tolerance = tolerance};
    Options there = options;
    there.execution = gpu;
    const Buffer<double> trajectory = on_gpu<double>(problem.shape());
    const Report report = evaluate(*problem.there, trajectory.view(), there);
    EXPECT_EQ(report.status, Status::converged) << report;
    EXPECT_GT(report.relative_residual, 0);
    EXPECT_NEAR(residual(problem, trajectory, tolerance), report.relative_residual, 1e-9);
    const auto [expected, expected_report] = evaluate(*problem.here, options);
    EXPECT_NEAR(report.residual, expected_report.residual, 1e-12);
    EXPECT_EQ(report.method, expected_report.method);
    EXPECT_TRUE(near(trajectory.on({}), expected, 1e-12));
}

TEST_F(ChainOnGpu, AutomaticIsRightWhateverItTakes) {
    const Problem<double> problem(200, 2, 6, Activation::tanh, 0, 0.4);
    const Buffer<double> expected = evaluate(*problem.here, {.method = Method::sequential}).trajectory;
    const Buffer<double> gradient = problem.gradient.on(Device::cuda());
    Buffer<double> weights;
    for (int call = 0; call < 5; ++call) {
        const Buffer<double> trajectory = on_gpu<double>(problem.shape());
        const Report report = evaluate(*problem.there, trajectory.view(), {.tolerance = 1e-10, .execution = gpu});
        EXPECT_TRUE(report.ok()) << report;
        EXPECT_EQ(report.candidates.size(), 3U) << "it knows how to overlap, and forgets its past";
        EXPECT_TRUE(report.method.starts_with(to_string(report.candidates.front().method))) << report.method;
        EXPECT_TRUE(near(trajectory.on({}), expected, 1e-8));
        const auto found =
            adjoint(*problem.there, View<const double>(trajectory), report, gradient, {.execution = gpu});
        if (call == 0) weights = found.weights.on({});
        EXPECT_TRUE(near(found.weights.on({}), weights, 1e-8));
    }
}

TEST_F(ChainOnGpu, OverlapFinishesOrReportsWhatForgetsNothing) {
    const Problem<double> problem(200, 3, 5, Activation::identity, 1,
                                  0.01);  // x + a small change: nothing is forgotten
    const Buffer<double> expected = evaluate(*problem.here, {.method = Method::sequential}).trajectory;
    for (const OnFailure on_failure : {OnFailure::finish, OnFailure::report}) {
        const Buffer<double> trajectory = on_gpu<double>(problem.shape());
        const Report report = evaluate(
            *problem.there, trajectory.view(),
            {.method = Method::overlap, .chunk = 20, .tolerance = 1e-9, .on_failure = on_failure, .execution = gpu});
        const bool finishes = on_failure == OnFailure::finish;
        EXPECT_EQ(report.status, finishes ? Status::finished_sequentially : Status::max_iterations);
        for (index j = 0; j < 3; ++j) {
            const index confirmed = report.sequences[std::size_t(j)].confirmed;
            EXPECT_EQ(confirmed, finishes ? 200 : 80);  // the first chunk, and one more for every round of repairs
            EXPECT_LE(largest_difference<double>(trajectory.on({}).view().sequences(j, j + 1).steps(0, confirmed),
                                                 expected.view().sequences(j, j + 1).steps(0, confirmed)),
                      1e-9);
        }
    }
    EXPECT_THROW(evaluate(*problem.there, on_gpu<double>(problem.shape()).view(),
                          {.method = Method::overlap, .chunk = 20, .on_failure = OnFailure::raise, .execution = gpu}),
                 NotConverged);
}

TEST_F(ChainOnGpu, OverlapSaysWhereStatesCeaseToBeFinite) {
    Problem<float> problem(100, 2, 4, Activation::relu, 0, 0.3);
    for (index i = 0; i < 4; ++i) problem.biases(37, 0, i) = std::numeric_limits<float>::quiet_NaN();
    problem.there_biases = problem.biases.on(Device::cuda());
    problem.there.emplace(problem.there_weights, problem.there_biases, problem.there_initial, problem.options);
    const Buffer<float> trajectory = on_gpu<float>(problem.shape());
    const Report report =
        evaluate(*problem.there, trajectory.view(), {.method = Method::overlap, .chunk = 10, .execution = gpu});
    EXPECT_EQ(report.status, Status::non_finite);
    for (const Report::Sequence& sequence : report.sequences) EXPECT_EQ(sequence.confirmed, 37);
}

TEST_F(ChainOnGpu, GradientsEqualTheProcessors) {
    for (const index skip : {0, 2}) {
        const Problem<double> problem(6, 3, 5, Activation::tanh, skip);
        const Evaluation<double> here = evaluate(*problem.here, {.method = Method::sequential});
        const DenseChainGradients<double> expected =
            adjoint(*problem.here, here.trajectory, here.report, problem.gradient, {.method = Method::sequential});
        for (const Layout layout : {Layout::steps_first, Layout::batch_first}) {
            Buffer<double> trajectory(problem.shape(), layout), gradient(problem.shape(), layout);
            for (index t = 0; t < 6; ++t)
                for (index j = 0; j < 3; ++j) {
                    std::copy_n(here.trajectory.view().at(t, j), 5, trajectory.view().at(t, j));
                    std::copy_n(problem.gradient.view().at(t, j), 5, gradient.view().at(t, j));
                }
            const Buffer<double> there = trajectory.on(Device::cuda()), there_gradient = gradient.on(Device::cuda());
            const DenseChainGradients<double> got = adjoint(*problem.there, there, here.report, there_gradient,
                                                            {.method = Method::sequential, .execution = gpu});
            EXPECT_TRUE(near(got.weights.on({}), expected.weights, 1e-12));
            EXPECT_TRUE(near(got.biases.on({}), expected.biases, 1e-12));
            EXPECT_TRUE(near(got.initial.on({}), expected.initial, 1e-12));
        }
    }
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
