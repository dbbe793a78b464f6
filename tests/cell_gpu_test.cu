// Cells on a GPU, or on an emulated one: every built-in cell and one of a user's, against the cpu backend.
#include <gtest/gtest.h>

#include <cmath>

#include <deeppcr/cell.cuh>
#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"

namespace deeppcr {
namespace {

/// Not built in, the example of the documentation.
struct LeakyTanh {
    static constexpr int states = 1, inputs = 1, parameters = 2;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 2> p) {
        const S a = p[0], w = p[1];
        return {(S(1) - a) * x[0] + a * tanh(w * x[0] + u[0])};
    }
};
DEEPPCR_CELL_ON_GPU(LeakyTanh);

/// Not known to the library.
struct Unregistered : LeakyTanh {};

constexpr Execution gpu{.backend = Backend::cuda};

/// The same problem in main memory and on the GPU.
template <class C, class T>
struct Problem {
    Problem(const Shape& channels, std::uint64_t seed, double scale = 0.5, Layout layout = Layout::steps_first,
            const std::vector<SequenceStart>& starts = {}, bool with_initial = true)
        : inputs(Buffer<T>::random({channels.steps, channels.batch, channels.width * C::inputs}, seed, layout)),
          parameters(Buffer<T>::random({C::parameters, 1, channels.width}, seed + 1)),
          initial(with_initial ? Buffer<T>::random(
                                     {1, channels.batch + index(starts.size()), channels.width * C::states}, seed + 2)
                               : Buffer<T>()),
          gradient(Buffer<T>::random({channels.steps, channels.batch, channels.width * C::states}, seed + 3)) {
        for (index i = 0; i < parameters.size(); ++i) parameters.data()[i] *= T(scale);
        if (std::is_same_v<C, SLSTM>)
            for (index i = 0; i < initial.size(); ++i) initial.data()[i] = std::abs(initial.data()[i]);
        if (C::parameters == 2)
            for (index c = 0; c < channels.width; ++c)
                parameters(0, 0, c) = T(0.5) + T(0.4) * std::sin(parameters(0, 0, c));
        there_inputs = inputs.on(Device::cuda());
        there_parameters = parameters.on(Device::cuda());
        if (with_initial) there_initial = initial.on(Device::cuda());
        there_gradient = gradient.on(Device::cuda());
        here = std::make_unique<CellRecurrence<C, T>>(inputs, parameters, initial, starts);
        there = std::make_unique<CellRecurrence<C, T>>(there_inputs, there_parameters, there_initial, starts);
    }

    std::pair<Buffer<T>, Report> evaluate_there(Options options, Layout layout = Layout::steps_first) const {
        options.execution = gpu;
        const Buffer<T> trajectory(here->shape(), layout, Device::cuda());
        Report report = evaluate(*there, trajectory.view(), options);
        return {trajectory.on(Device::host()), std::move(report)};
    }
    /// The largest max|x_t - f(x_{t-1})|, relative to 1 + max|x_t|, of the first `steps` steps of a sequence.
    double residual(const Buffer<T>& trajectory, index sequence, index steps) const {
        const auto [all, batch, width] = here->shape();
        Buffer<T> before(here->shape()), after(here->shape());
        std::vector<index> sequences;
        for (index j = 0; j < batch; ++j) {
            sequences.push_back(j);
            for (index t = 0; t < all; ++t)
                for (index k = 0; k < width; ++k)
                    before(t, j, k) = t == 0 ? here->initial_state(j)[k] : trajectory(t - 1, j, k);
        }
        here->step({0, all, sequences}, before.view(), after.view());
        double largest = 0;
        for (index t = 0; t < steps; ++t) {
            double apart = 0, size = 0;
            for (index k = 0; k < width; ++k) {
                const double x = trajectory(t, sequence, k), difference = std::abs(x - double(after(t, sequence, k)));
                if (!(difference <= apart)) apart = difference;  // NaN too
                size = std::max(size, std::abs(x));
            }
            if (!(apart / (1 + size) <= largest)) largest = apart / (1 + size);
        }
        return largest;
    }
    Buffer<T> expected() const { return evaluate(*here, {.method = Method::sequential}).trajectory; }

    Buffer<T> inputs, parameters, initial, gradient, there_inputs, there_parameters, there_initial, there_gradient;
    std::unique_ptr<CellRecurrence<C, T>> here, there;
};

/// Whether even strong weights leave a cell forgetful.
template <class C>
constexpr bool contractive = std::is_same_v<C, SLSTM>;

template <class C>
class CellOnGpu : public testing::Test {
protected:
    void SetUp() override {
        if (!cuda_problem().empty()) GTEST_SKIP() << cuda_problem();
    }
};
using Cells = testing::Types<ParaGRU, ParaLSTM, DiagonalElman, SLSTM, LeakyTanh>;
TYPED_TEST_SUITE(CellOnGpu, Cells);

// A warp less one, a warp, one more; fewer steps than are loaded ahead, as many, one more.
const std::vector<Shape> shapes{{1, 1, 1},  {2, 3, 1},   {7, 1, 31}, {8, 2, 32},
                                {9, 1, 33}, {67, 3, 17}, {64, 5, 4}, {130, 1, 130}};

TYPED_TEST(CellOnGpu, SequentialEqualsTheProcessors) {
    for (const Shape& shape : shapes)
        for (const Layout layout : {Layout::steps_first, Layout::batch_first})
            for (const bool with_initial : {true, false}) {
                SCOPED_TRACE(to_string(shape));
                const Problem<TypeParam, float> problem(shape, 1, 0.5, layout, {}, with_initial);
                const auto [trajectory, report] = problem.evaluate_there({.method = Method::sequential}, layout);
                EXPECT_EQ(report.status, Status::converged);
                EXPECT_LE(largest_difference<float>(trajectory, problem.expected()), 2e-5);
            }
}

TYPED_TEST(CellOnGpu, OverlapAndShootingEqualSequential) {
    for (const Method method : {Method::overlap, Method::shooting, Method::automatic})
        for (const Shape& shape : {Shape{1000, 1, 1}, Shape{517, 2, 33}, Shape{300, 3, 5}})
            for (const index chunk : {0, 40, 64, 299}) {
                SCOPED_TRACE(to_string(method) + " " + to_string(shape) + " chunk " + std::to_string(chunk));
                const Problem<TypeParam, double> problem(shape, 7);
                const auto [trajectory, report] =
                    problem.evaluate_there({.method = method, .chunk = chunk, .tolerance = 1e-9});
                EXPECT_TRUE(report.ok()) << report;
                EXPECT_LE(report.relative_residual, 1);
                for (index j = 0; j < shape.batch; ++j) EXPECT_LE(problem.residual(trajectory, j, shape.steps), 1e-9);
                EXPECT_LE(largest_difference<double>(trajectory, problem.expected()), 1e-6) << report;
            }
}

TYPED_TEST(CellOnGpu, SequencesInOneRow) {
    const std::vector<SequenceStart> starts{{0, 4}, {0, 5}, {2, 230}};
    const Problem<TypeParam, double> problem({300, 3, 3}, 5, 0.5, Layout::steps_first, starts);
    for (const Method method : {Method::sequential, Method::overlap, Method::shooting}) {
        const auto [trajectory, report] = problem.evaluate_there({.method = method, .chunk = 50, .tolerance = 1e-10});
        EXPECT_TRUE(report.ok()) << report;
        EXPECT_LE(largest_difference<double>(trajectory, problem.expected()), 1e-7) << to_string(method);
    }
}

TYPED_TEST(CellOnGpu, WhatForgetsNothingIsFinishedSequentiallyOrReported) {
    // Strong weights: chunks that start from guesses do not meet.
    const Problem<TypeParam, double> problem({400, 2, 9}, 3, 8);
    constexpr double tolerance = 1e-10;
    index finished = 0, unconfirmed = 0;
    for (const Method method : {Method::overlap, Method::shooting})
        for (const OnFailure on_failure : {OnFailure::finish, OnFailure::report}) {
            const auto [trajectory, report] = problem.evaluate_there(
                {.method = method, .chunk = 20, .tolerance = tolerance, .on_failure = on_failure});
            for (index j = 0; j < 2; ++j) {
                const Report::Sequence& sequence = report.sequences[std::size_t(j)];
                EXPECT_LE(problem.residual(trajectory, j, sequence.confirmed), tolerance) << report;
                EXPECT_EQ(sequence.confirmed == 400, report.ok() || sequence.status == Status::converged) << report;
                if (sequence.status == Status::finished_sequentially) ++finished;
                if (sequence.status == Status::max_iterations) ++unconfirmed;
            }
            EXPECT_TRUE(report.ok() || on_failure == OnFailure::report) << report;
        }
    if (!contractive<TypeParam>) {
        EXPECT_GT(finished, 0);
        EXPECT_GT(unconfirmed, 0);
    }
}

TYPED_TEST(CellOnGpu, GradientsEqualTheProcessors) {
    const std::vector<SequenceStart> none, some{{0, 40}, {1, 7}, {1, 100}};
    for (const auto& starts : {none, some})
        for (const Shape& shape : {Shape{130, 2, 5}, Shape{300, 2, 33}})
            for (const index chunk : {0, 32, 75}) {
                SCOPED_TRACE(to_string(shape) + " chunk " + std::to_string(chunk));
                const Problem<TypeParam, double> problem(shape, 11, 0.5, Layout::steps_first, starts);
                const auto here = evaluate(*problem.here, {.method = Method::sequential});
                const auto expected = adjoint<double>(*problem.here, here.trajectory, here.report, problem.gradient,
                                                      {.method = Method::sequential});
                const Buffer<double> trajectory = here.trajectory.on(Device::cuda());
                for (const Method method : {Method::sequential, Method::automatic}) {
                    const auto found = adjoint<double>(*problem.there, trajectory, here.report, problem.there_gradient,
                                                       {.method = method, .chunk = chunk, .execution = gpu});
                    EXPECT_LE(largest_difference<double>(found.inputs.on(Device::host()), expected.inputs), 1e-11);
                    EXPECT_LE(largest_difference<double>(found.parameters.on(Device::host()), expected.parameters),
                              1e-11);
                    EXPECT_LE(largest_difference<double>(found.initial.on(Device::host()), expected.initial), 1e-11);
                }
            }
}

TYPED_TEST(CellOnGpu, TheSameBitsEveryTime) {
    const Problem<TypeParam, float> problem({600, 2, 20}, 13);
    for (const Method method : {Method::sequential, Method::overlap, Method::shooting}) {
        const Options options{.method = method, .chunk = 64};
        const auto first = problem.evaluate_there(options).first, second = problem.evaluate_there(options).first;
        EXPECT_TRUE(same_bits<float>(first, second)) << to_string(method);
    }
}

TEST(CellOnGpuArguments, SayWhatIsWrong) {
    if (!cuda_problem().empty()) GTEST_SKIP() << cuda_problem();
    const auto message = [](const auto& call) -> std::string {
        try {
            call();
        } catch (const Error& error) {
            return error.what();
        }
        return "";
    };
    const Problem<LeakyTanh, float> problem({10, 1, 2}, 1);
    const Buffer<float> here({10, 1, 2}), there({10, 1, 2}, Layout::steps_first, Device::cuda());
    EXPECT_EQ(message([&] { evaluate(*problem.here, here.view(), {.execution = gpu}); }),
              "initial: expected memory of a GPU, for Backend::cuda, got main memory");
    EXPECT_EQ(message([&] { evaluate(*problem.there, here.view(), {.execution = gpu}); }),
              "trajectory: expected memory of a GPU, for Backend::cuda, got main memory");
    Workspace workspace;
    EXPECT_EQ(message([&] { evaluate(*problem.there, there.view(), {.execution = gpu, .workspace = &workspace}); }),
              "options.workspace: expected a workspace on the current GPU, got one elsewhere");
    EXPECT_EQ(message([&] { evaluate(*problem.there, there.view(), {.method = Method::newton, .execution = gpu}); }),
              "options.execution.backend: expected one that the recurrence runs on (Recurrence::runs_on), got cuda");
    const CellRecurrence<Unregistered, float> unknown(problem.there_inputs, problem.there_parameters);
    EXPECT_NE(message([&] { evaluate(unknown, there.view(), {.execution = gpu}); }).find("DEEPPCR_CELL_ON_GPU"),
              std::string::npos);
}

}  // namespace
}  // namespace deeppcr
