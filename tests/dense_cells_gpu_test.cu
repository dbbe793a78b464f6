// DenseCell on a GPU, or on an emulated one, against the reference backend.
#include <gtest/gtest.h>

#include <limits>
#include <optional>

#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"
#include "tests/gpu.hpp"

namespace deeppcr {
namespace {

constexpr DenseCellKind kinds[] = {DenseCellKind::elman_tanh, DenseCellKind::elman_relu, DenseCellKind::gru,
                                   DenseCellKind::lstm};

template <class T>
Buffer<T> on_gpu(const Shape& shape) {
    return Buffer<T>(shape, Layout::steps_first, Device::cuda());
}

/// The same layer in main memory and on the GPU.
template <class T>
struct Problem {
    Problem(DenseCellKind kind, index steps, index batch, index hidden, Layout layout = Layout::steps_first,
            double strength = 0.9)
        : gates(gate_count(kind)),
          inputs(Buffer<T>::random({steps, batch, gates * hidden}, 1, layout)),
          weights(Buffer<T>::random({gates, hidden, hidden}, 2)),
          biases(Buffer<T>::random({gates, 1, hidden}, 3)),
          initial(Buffer<T>::random({1, batch, state_width(kind, hidden)}, 4)),
          gradient(Buffer<T>::random({steps, batch, state_width(kind, hidden)}, 5)) {
        for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= T(strength / std::sqrt(double(hidden)));
        there_inputs = inputs.on(Device::cuda());
        there_weights = weights.on(Device::cuda());
        there_biases = biases.on(Device::cuda());
        there_initial = initial.on(Device::cuda());
        here.emplace(kind, inputs, weights, biases, initial);
        there.emplace(kind, there_inputs, there_weights, there_biases, there_initial);
    }
    const Shape& shape() const { return here->shape(); }
    Section section(Backend backend, const std::vector<index>& sequences) const {
        return {0, shape().steps, sequences, {.backend = backend}};
    }

    index gates;
    Buffer<T> inputs, weights, biases, initial, gradient, there_inputs, there_weights, there_biases, there_initial;
    std::optional<DenseCell<T>> here, there;
};

/// All operations of a cell, there against the reference here.
template <class T>
void compare(const Problem<T>& problem) {
    const auto& [steps, batch, width] = problem.shape();
    const index hidden = problem.here->hidden();
    SCOPED_TRACE("kind " + std::to_string(int(problem.here->kind())) + ", " + std::to_string(hidden) + " units, " +
                 to_string(problem.shape()));
    const Shape states = problem.shape(), blocks{steps, batch, width * width}, one{1, batch, width};
    const Shape of_inputs{steps, batch, problem.gates * hidden}, vectors{problem.gates, 1, hidden};
    const double tolerance = 300 * double(std::numeric_limits<T>::epsilon()) * std::sqrt(double(hidden));
    const std::vector<index> sequences = all(batch);
    const Section here = problem.section(Backend::reference, sequences);
    const Section there = problem.section(Backend::cuda, sequences);

    Buffer<T> trajectory(states);
    problem.here->run(here, problem.initial, trajectory.view());
    const Buffer<T> there_trajectory = on_gpu<T>(states);
    problem.there->run(there, problem.there_initial, there_trajectory.view());
    const Buffer<T> own = there_trajectory.on({});
    EXPECT_TRUE(near(own, trajectory, tolerance));

    // run = repeated step, bit for bit
    Buffer<T> before(states);
    std::copy_n(problem.initial.data(), batch * width, before.data());
    std::copy_n(own.data(), (steps - 1) * batch * width, before.data() + batch * width);
    const Buffer<T> there_before = before.on(Device::cuda()), after = on_gpu<T>(states);
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

    // Gradients of weights and biases are added to what is there, the state comes from later steps.
    const Buffer<T> later = Buffer<T>::random(one, 6), some_weights = Buffer<T>::random(problem.weights.shape(), 7),
                    some_biases = Buffer<T>::random(vectors, 8);
    const Buffer<T> there_gradient = problem.gradient.on(Device::cuda());
    for (const bool sequential : {true, false}) {
        Buffer<T> inputs(of_inputs), weights = some_weights.on({}), biases = some_biases.on({}), state = later.on({});
        const Buffer<T> there_inputs = on_gpu<T>(of_inputs), there_weights = some_weights.on(Device::cuda());
        const Buffer<T> there_biases = some_biases.on(Device::cuda()), there_state = later.on(Device::cuda());
        if (sequential) {
            problem.here->run_backward(here, before, problem.gradient, inputs.view(), weights.view(), biases.view(),
                                       state.view());
            problem.there->run_backward(there, there_before, there_gradient, there_inputs.view(), there_weights.view(),
                                        there_biases.view(), there_state.view());
        } else {
            problem.here->parameter_gradients(here, before, problem.gradient, inputs.view(), weights.view(),
                                              biases.view());
            problem.there->parameter_gradients(there, there_before, there_gradient, there_inputs.view(),
                                               there_weights.view(), there_biases.view());
        }
        EXPECT_TRUE(near(there_inputs.on({}), inputs, 4 * tolerance));
        EXPECT_TRUE(near(there_weights.on({}), weights, 4 * tolerance));
        EXPECT_TRUE(near(there_biases.on({}), biases, 4 * tolerance));
        EXPECT_TRUE(near(there_state.on({}), state, 4 * tolerance));
    }
}

using DenseCellOnGpu = OnGpuTest;

// One unit; less than four columns; a layout less one, whole, one more; several pieces per step.
TEST_F(DenseCellOnGpu, EveryKindAndWidth) {
    for (const DenseCellKind kind : kinds) {
        for (const index hidden : {1, 2, 3, 15, 16, 17, 32, 33}) {
            compare(Problem<float>(kind, 5, 3, hidden));
            compare(Problem<double>(kind, 4, 1, hidden, Layout::batch_first));
        }
        for (const index hidden : {64, 70, 130}) compare(Problem<float>(kind, 2, 1, hidden));
        compare(Problem<double>(kind, 2, 2, 100));
    }
}

// More sequences than one block takes, more states than one warp linearises, sequences in any order.
TEST_F(DenseCellOnGpu, ManySequencesAndSomeOfThem) {
    for (const DenseCellKind kind : kinds)
        for (const index hidden : {5, 66}) {
            compare(Problem<double>(kind, hidden == 5 ? 9 : 2, 13, hidden));
            const Problem<float> problem(kind, 3, 13, hidden);
            const std::vector<index> every = all(13), some{11, 2, 7};
            const index width = problem.shape().width;
            const Buffer<float> whole = on_gpu<float>(problem.shape()), part = on_gpu<float>({3, 3, width}),
                                state = on_gpu<float>({1, 3, width});
            problem.there->run(problem.section(Backend::cuda, every), problem.there_initial, whole.view());
            problem.there->initial(problem.section(Backend::cuda, some), state.view());
            problem.there->run(problem.section(Backend::cuda, some), state, part.view());
            const Buffer<float> expected = whole.on({}), got = part.on({});
            for (index j = 0; j < 3; ++j) {
                const index sequence = some[std::size_t(j)];
                EXPECT_TRUE(same_bits<float>(got.view().sequences(j, j + 1),
                                             expected.view().sequences(sequence, sequence + 1)));
            }
        }
}

TEST_F(DenseCellOnGpu, OverlapFindsTheTrajectory) {
    for (const DenseCellKind kind : kinds)
        for (const Layout layout : {Layout::steps_first, Layout::batch_first}) {
            const Problem<float> problem(kind, 150, 2, 6, Layout::steps_first, 0.5);
            const Buffer<float> trajectory(problem.shape(), layout, Device::cuda());
            const Options options{.method = Method::overlap, .chunk = 50, .tolerance = 1e-5};
            Options there = options;
            there.execution.backend = Backend::cuda;
            const Report report = evaluate(*problem.there, trajectory.view(), there);
            EXPECT_EQ(report.status, Status::converged) << report;
            EXPECT_LE(report.relative_residual, 1);
            const auto [expected, expected_report] = evaluate(*problem.here, options);
            EXPECT_EQ(expected_report.status, Status::converged) << expected_report;
            EXPECT_LE(largest_difference<float>(trajectory.on({}), expected), 1e-4);
            EXPECT_LE(
                largest_difference<float>(expected, evaluate(*problem.here, {.method = Method::sequential}).trajectory),
                1e-4);
        }
}

TEST_F(DenseCellOnGpu, GradientsEqualTheProcessors) {
    for (const DenseCellKind kind : kinds) {
        const Problem<double> problem(kind, 7, 3, 5);
        const Evaluation<double> here = evaluate(*problem.here, {.method = Method::sequential});
        const DenseCellGradients<double> expected =
            adjoint(*problem.here, here.trajectory, here.report, problem.gradient, {.method = Method::sequential});
        for (const Layout layout : {Layout::steps_first, Layout::batch_first}) {
            Buffer<double> trajectory(problem.shape(), layout), gradient(problem.shape(), layout);
            for (index t = 0; t < 7; ++t)
                for (index j = 0; j < 3; ++j) {
                    std::copy_n(here.trajectory.view().at(t, j), problem.shape().width, trajectory.view().at(t, j));
                    std::copy_n(problem.gradient.view().at(t, j), problem.shape().width, gradient.view().at(t, j));
                }
            const Buffer<double> there = trajectory.on(Device::cuda()), there_gradient = gradient.on(Device::cuda());
            const DenseCellGradients<double> got =
                adjoint(*problem.there, there, here.report, there_gradient,
                        {.method = Method::sequential, .execution = {.backend = Backend::cuda}});
            EXPECT_TRUE(near(got.inputs.on({}), expected.inputs, 1e-12));
            EXPECT_TRUE(near(got.weights.on({}), expected.weights, 1e-12));
            EXPECT_TRUE(near(got.biases.on({}), expected.biases, 1e-12));
            EXPECT_TRUE(near(got.initial.on({}), expected.initial, 1e-12));
        }
    }
}

TEST_F(DenseCellOnGpu, ArraysMustLieWhereItRuns) {
    const Problem<float> problem(DenseCellKind::gru, 2, 1, 4);
    EXPECT_TRUE(problem.there->runs_on(Backend::cuda));
    EXPECT_FALSE(problem.there->runs_on(Backend::cpu));
    EXPECT_FALSE(problem.here->runs_on(Backend::cuda));
    EXPECT_THROW(DenseCell<float>(DenseCellKind::gru, problem.there_inputs, problem.weights, problem.there_biases,
                                  problem.there_initial),
                 InvalidArgument);
}

}  // namespace
}  // namespace deeppcr
