// Cells on a GPU, or on an emulated one: every built-in cell and some of a user's, in every type, against the cpu
// backend.
#include <gtest/gtest.h>

#include <cmath>

#include <deeppcr/cell.cuh>
#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"

namespace deeppcr {
namespace {

/// From large states it overflows; from small ones it does not.
struct Squares {
    static constexpr int states = 1, inputs = 1, parameters = 1;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 1> p) {
        return {p[0] * x[0] * x[0] + u[0]};
    }
};

/// Not built in, the example of the documentation.
struct LeakyTanh {
    static constexpr int states = 1, inputs = 1, parameters = 2;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 2> p) {
        const S a = p[0], w = p[1];
        return {(S(1) - a) * x[0] + a * tanh(w * x[0] + u[0])};
    }
};
DEEPPCR_CELL_ON_GPU(::deeppcr::LeakyTanh);

/// Its first state is not a number once it was large; the second one forgets everything at once.
template <int power>
struct FirstIsNaN {
    static constexpr int states = 2, inputs = 1, parameters = 1;
    template <class S>
    static constexpr std::array<S, 2> step(std::array<S, 2> x, std::array<S, 1> u, std::array<S, 1> p) {
        S large = x[0];
        for (int i = 0; i < power; ++i) large = large * x[0];
        return {S(0) * large + p[0], u[0]};
    }
};

/// Linear, with a factor and a summand for every step.
struct Affine {
    static constexpr int states = 1, inputs = 2, parameters = 1;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 2> u, std::array<S, 1> p) {
        return {p[0] * u[0] * x[0] + u[1]};
    }
};

/// Knows nothing of the steps before.
struct Scaled {
    static constexpr int states = 1, inputs = 1, parameters = 1;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1>, std::array<S, 1> u, std::array<S, 1> p) {
        return {p[0] * u[0]};
    }
};

/// Not known to the library.
struct Unregistered : LeakyTanh {};

/// 2^x and 1/x as the hardware has them, in the functions made of them.
struct Functions {
    static constexpr int states = 3, inputs = 1, parameters = 1;
    template <class S>
    static constexpr std::array<S, 3> step(std::array<S, 3>, std::array<S, 1> u, std::array<S, 1>) {
        return {exp(u[0]), sigmoid(u[0]), tanh(u[0])};
    }
};

constexpr Execution gpu{.backend = Backend::cuda};

template <class T, class A>
Buffer<T> stored(const Buffer<A>& wide, Layout layout = Layout::steps_first) {
    Buffer<T> result = Buffer<T>::uninitialised(wide.shape(), layout);
    for (index i = 0; i < wide.shape().steps; ++i)
        for (index j = 0; j < wide.shape().batch; ++j)
            for (index k = 0; k < wide.shape().width; ++k) result(i, j, k) = T(wide(i, j, k));
    return result;
}
template <class T>
Buffer<Arithmetic<T>> widened(const Buffer<T>& narrow) {
    return stored<Arithmetic<T>>(narrow);
}

/// What rounding to T changes of a number of about 1.
template <class T>
constexpr double rounding = std::is_same_v<T, bfloat16>  ? 0x1p-8
                            : std::is_same_v<T, float16> ? 0x1p-11
                            : std::is_same_v<T, float>   ? 2e-5
                                                         : 1e-14;

/// With enough sequences for tiles, which are taken where every multiprocessor has one: the emulated GPU has three.
Shape wide_enough(Shape shape) {
    int multiprocessors = 0;
    cuda::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "looking at a GPU");
    shape.batch *= (multiprocessors + 2) / 3;
    return shape;
}

/// The same problem on the GPU, and in main memory in the numbers that it is computed with.
template <class C, class T>
struct Problem {
    using A = Arithmetic<T>;

    Problem(const Shape& channels, std::uint64_t seed, double scale = 0.5, Layout layout = Layout::steps_first,
            const std::vector<SequenceStart>& starts = {}, bool with_initial = true)
        : parameters(Buffer<A>::random({C::parameters, 1, channels.width}, seed + 1)) {
        for (index i = 0; i < parameters.size(); ++i) parameters.data()[i] *= A(scale);
        Buffer<A> first =
            Buffer<A>::random({1, channels.batch + index(starts.size()), channels.width * C::states}, seed + 2);
        if (std::is_same_v<C, SLSTM>)
            for (index i = 0; i < first.size(); ++i) first.data()[i] = std::abs(first.data()[i]);
        if (C::parameters == 2)
            for (index c = 0; c < channels.width; ++c)
                parameters(0, 0, c) = A(0.5) + A(0.4) * std::sin(parameters(0, 0, c));
        const Buffer<T> narrow_inputs =
            stored<T>(Buffer<A>::random({channels.steps, channels.batch, channels.width * C::inputs}, seed), layout);
        const Buffer<T> narrow_initial = stored<T>(first);
        const Buffer<T> narrow_gradient = stored<T>(
            Buffer<A>::random({channels.steps, channels.batch, channels.width * C::states}, seed + 3), layout);
        inputs = widened(narrow_inputs);
        gradient = widened(narrow_gradient);
        there_inputs = narrow_inputs.on(Device::cuda());
        there_parameters = parameters.on(Device::cuda());
        there_gradient = narrow_gradient.on(Device::cuda());
        if (with_initial) {
            initial = widened(narrow_initial);
            there_initial = narrow_initial.on(Device::cuda());
        }
        here = std::make_unique<CellRecurrence<C, A>>(inputs, parameters, initial, starts);
        there = std::make_unique<CellRecurrence<C, T>>(there_inputs, there_parameters, there_initial, starts);
    }

    std::pair<Buffer<A>, Report> evaluate_there(Options options, Layout layout = Layout::steps_first,
                                                const Buffer<T>& guess = {}) const {
        options.execution = gpu;
        const Buffer<T> trajectory =
            guess.size() > 0 ? guess.on(Device::cuda()) : Buffer<T>(here->shape(), layout, Device::cuda());
        Report report = evaluate(*there, trajectory.view(), options);
        return {widened(trajectory.on(Device::host())), std::move(report)};
    }
    /// The largest max|x_t - f(x_{t-1})|, relative to 1 + max|x_t|, of the first `steps` steps of a sequence.
    double residual(const Buffer<A>& trajectory, index sequence, index steps) const {
        const auto [all, batch, width] = here->shape();
        Buffer<A> before(here->shape()), after(here->shape());
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
                apart = scalar_functions::larger_or_nan(apart, difference);
                size = std::max(size, std::abs(x));
            }
            largest = scalar_functions::larger_or_nan(largest, apart / (1 + size));
        }
        return largest;
    }
    Buffer<A> expected() const { return evaluate(*here, {.method = Method::sequential}).trajectory; }

    Buffer<A> inputs, parameters, initial, gradient;
    Buffer<T> there_inputs, there_initial, there_gradient;
    Buffer<A> there_parameters;
    std::unique_ptr<CellRecurrence<C, A>> here;
    std::unique_ptr<CellRecurrence<C, T>> there;
};

/// Whether even strong weights leave a cell forgetful.
template <class C>
constexpr bool contractive = std::is_same_v<C, SLSTM>;

/// Calls body(T()) for every type that numbers are stored as.
template <class Body>
void for_every_type(const Body& body) {
    body(float());
    body(double());
    body(bfloat16());
    body(float16());
}

class OnGpuTest : public testing::Test {
protected:
    void SetUp() override {
        if (!cuda_problem().empty()) GTEST_SKIP() << cuda_problem();
    }
};
template <class C>
class CellOnGpu : public OnGpuTest {};
using Cells = testing::Types<ParaGRU, ParaLSTM, DiagonalElman, SLSTM, LeakyTanh>;
TYPED_TEST_SUITE(CellOnGpu, Cells);

// A warp less one, a warp, one more; even and odd; fewer steps than are loaded ahead, as many, one more.
const std::vector<Shape> shapes{{1, 1, 1},  {2, 3, 1},   {7, 1, 31}, {8, 2, 32},
                                {9, 1, 33}, {67, 3, 17}, {64, 5, 4}, {130, 1, 130}};

TYPED_TEST(CellOnGpu, SequentialEqualsTheProcessors) {
    for_every_type([](auto type) {
        using T = decltype(type);
        for (const Shape& shape : shapes)
            for (const Layout layout : {Layout::steps_first, Layout::batch_first})
                for (const bool with_initial : {true, false}) {
                    SCOPED_TRACE(to_string(shape));
                    const Problem<TypeParam, T> problem(shape, 1, 0.5, layout, {}, with_initial);
                    const auto [trajectory, report] = problem.evaluate_there({.method = Method::sequential}, layout);
                    EXPECT_EQ(report.status, Status::converged);
                    EXPECT_TRUE(near(trajectory, problem.expected(), 1.1 * rounding<T>));
                }
    });
}

TYPED_TEST(CellOnGpu, OverlapAndShootingEqualSequential) {
    for (const Method method : {Method::overlap, Method::shooting, Method::automatic})
        for (const Shape& shape : {Shape{1000, 1, 1}, Shape{517, 2, 33}, Shape{300, 3, 5}})
            for (const index chunk : {0, 40, 299}) {
                SCOPED_TRACE(to_string(method) + " " + to_string(shape) + " chunk " + std::to_string(chunk));
                const Problem<TypeParam, double> problem(shape, 7);
                const auto [trajectory, report] =
                    problem.evaluate_there({.method = method, .chunk = chunk, .tolerance = 1e-9});
                EXPECT_TRUE(report.ok()) << report;
                EXPECT_LE(report.relative_residual, 1);
                for (index j = 0; j < shape.batch; ++j) EXPECT_LE(problem.residual(trajectory, j, shape.steps), 1e-9);
                EXPECT_LE(largest_difference<double>(trajectory, problem.expected()), 1e-6) << report;
                EXPECT_EQ(report.candidates.empty(), method != Method::automatic);
            }
}

// Rows that are whole pieces of 16 bytes, of 4, and of neither.
TYPED_TEST(CellOnGpu, ChunksAndTilesInEveryTypeAndLayout) {
    for_every_type([](auto type) {
        using T = decltype(type);
        for (const Shape& narrow : {Shape{400, 1, 40}, Shape{301, 2, 34}, Shape{150, 2, 33}})
            for (const Layout layout : {Layout::steps_first, Layout::batch_first})
                for (const Options& options :
                     {Options{.method = Method::overlap, .chunk = 50}, Options{.method = Method::shooting, .chunk = 50},
                      Options{.method = Method::shooting}}) {
                    const bool tiles = options.method == Method::shooting && options.chunk == 0;
                    const Shape shape = tiles ? wide_enough(narrow) : narrow;
                    const Problem<TypeParam, T> problem(shape, 3, 0.5, layout);
                    const auto [trajectory, report] = problem.evaluate_there(options, layout);
                    SCOPED_TRACE(to_string(shape) + " " + report.method);
                    EXPECT_TRUE(report.ok()) << report;
                    EXPECT_LE(report.relative_residual, 1);
                    // Mismatches within the tolerance, carried on; each is at most two roundings.
                    EXPECT_TRUE(near(trajectory, problem.expected(), 10 * rounding<T> + 1e-9));
                    EXPECT_EQ(report.method.find("tiles") != std::string::npos, tiles);
                }
    });
}

TYPED_TEST(CellOnGpu, SequencesInOneRow) {
    const std::vector<SequenceStart> starts{{0, 4}, {0, 5}, {2, 230}};
    const Problem<TypeParam, double> problem({300, 3, 12}, 5, 0.5, Layout::steps_first, starts);
    for (const Method method : {Method::sequential, Method::overlap, Method::shooting})
        for (const index chunk : {0, 50}) {
            const auto [trajectory, report] =
                problem.evaluate_there({.method = method, .chunk = chunk, .tolerance = 1e-10});
            EXPECT_TRUE(report.ok()) << report;
            EXPECT_LE(largest_difference<double>(trajectory, problem.expected()), 1e-7) << report;
        }
    const Buffer<double> trajectory = problem.expected(), there = trajectory.on(Device::cuda());
    EXPECT_TRUE(same_bits<double>(problem.there->final_states(there, gpu).on(Device::host()),
                                  problem.here->final_states(trajectory)));
}

TYPED_TEST(CellOnGpu, MoreSequencesThanALetterTellsOf) {
    const Problem<TypeParam, double> problem({130, 101, 1}, 5);
    for (const index chunk : {20, 50, 130}) {
        const auto [trajectory, report] =
            problem.evaluate_there({.method = Method::overlap, .chunk = chunk, .tolerance = 1e-10});
        EXPECT_TRUE(report.ok()) << report;
        ASSERT_EQ(report.sequences.size(), 101U);
        for (const Report::Sequence& sequence : report.sequences) EXPECT_EQ(sequence.confirmed, 130);
        EXPECT_LE(largest_difference<double>(trajectory, problem.expected()), 1e-7) << report;
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

// A tile that Newton's method does not finish is finished within itself.
TYPED_TEST(CellOnGpu, TilesAreRightWhateverTheRecurrence) {
    const Problem<TypeParam, double> problem(wide_enough({400, 2, 9}), 3, 8);
    for (const index shots : {1, 0}) {
        const auto [trajectory, report] =
            problem.evaluate_there({.method = Method::shooting, .tolerance = 1e-10, .max_iterations = shots});
        EXPECT_TRUE(report.ok()) << report;
        EXPECT_NE(report.method.find("tiles"), std::string::npos);
        for (index j = 0; j < 2; ++j) EXPECT_LE(problem.residual(trajectory, j, 400), 1e-10) << report;
    }
}

TYPED_TEST(CellOnGpu, GivenTrajectoriesAreGuesses) {
    const Problem<TypeParam, float> problem({300, 2, 16}, 9);
    const Buffer<float> right = problem.expected();
    for (const Method method : {Method::overlap, Method::shooting})
        for (const index chunk : {0, 64}) {
            const auto [trajectory, report] = problem.evaluate_there(
                {.method = method, .chunk = chunk, .guess = Guess::given}, Layout::steps_first, right);
            EXPECT_TRUE(report.ok()) << report;
            EXPECT_TRUE(near(trajectory, right, 1e-4)) << report;
            // From the right states there is nothing to correct.
            EXPECT_TRUE(chunk == 0 || report.method.find(", 1 steps repeated") != std::string::npos) << report;
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

TYPED_TEST(CellOnGpu, GradientsInEveryTypeAndLayout) {
    for_every_type([](auto type) {
        using T = decltype(type);
        for (const Shape& shape : {Shape{140, 2, 6}, Shape{65, 3, 7}})
            for (const Layout layout : {Layout::steps_first, Layout::batch_first})
                for (const index chunk : {0, 32}) {
                    SCOPED_TRACE(to_string(shape) + " chunk " + std::to_string(chunk));
                    const Problem<TypeParam, T> problem(shape, 11, 0.5, layout);
                    // The same states on both sides.
                    const Buffer<T> trajectory = stored<T>(problem.expected(), layout);
                    const Report report = evaluate(*problem.here, {.method = Method::sequential}).report;
                    const auto expected = adjoint<Arithmetic<T>>(*problem.here, widened(trajectory), report,
                                                                 problem.gradient, {.method = Method::sequential});
                    const Buffer<T> inputs(problem.there_inputs.shape(), layout, Device::cuda()),
                        initial(problem.there_initial.shape(), Layout::steps_first, Device::cuda());
                    const Buffer<Arithmetic<T>> parameters(problem.parameters.shape(), Layout::steps_first,
                                                           Device::cuda());
                    adjoint<T>(*problem.there, trajectory.on(Device::cuda()), report, problem.there_gradient,
                               {inputs, parameters, initial}, {.chunk = chunk, .execution = gpu});
                    // What a chunk adds to what is stored may be as large as any, and cancel with it.
                    const auto tolerance = [](const Buffer<Arithmetic<T>>& gradients) {
                        double largest = 1;
                        for (index i = 0; i < gradients.size(); ++i)
                            largest = std::max(largest, std::abs(double(gradients.data()[i])));
                        return (1 + largest) * rounding<T>;
                    };
                    EXPECT_TRUE(near(widened(inputs.on(Device::host())), expected.inputs, tolerance(expected.inputs)));
                    EXPECT_TRUE(
                        near(widened(initial.on(Device::host())), expected.initial, tolerance(expected.initial)));
                    EXPECT_TRUE(near(parameters.on(Device::host()), expected.parameters, 2e-5));
                }
    });
}

TYPED_TEST(CellOnGpu, TheSameBitsEveryTime) {
    const Problem<TypeParam, float> problem({600, 2, 20}, 13);
    const auto here = evaluate(*problem.here, {.method = Method::sequential});
    const Buffer<float> trajectory = here.trajectory.on(Device::cuda());
    for (const Options& options : {Options{.method = Method::sequential, .execution = gpu},
                                   Options{.method = Method::overlap, .chunk = 64, .execution = gpu},
                                   Options{.method = Method::shooting, .chunk = 64, .execution = gpu},
                                   Options{.method = Method::shooting, .execution = gpu}}) {
        const auto first = problem.evaluate_there(options).first, second = problem.evaluate_there(options).first;
        EXPECT_TRUE(same_bits<float>(first, second)) << to_string(options.method);
        if (options.chunk == 0) continue;
        const auto gradients = [&] {
            return adjoint<float>(*problem.there, trajectory, here.report, problem.there_gradient, options)
                .parameters.on(Device::host());
        };
        EXPECT_TRUE(same_bits<float>(gradients(), gradients()));
    }
}

TYPED_TEST(CellOnGpu, SegmentsEqualTheWhole) {
    const std::vector<SequenceStart> none, some{{0, 30}, {1, 100}};
    for (const auto& starts : {none, some}) {
        const Problem<TypeParam, double> problem({130, 2, 5}, 17, 0.5, Layout::steps_first, starts);
        const Options options{.method = Method::sequential, .execution = gpu};
        const Buffer<double> boundaries({3, 2, problem.here->shape().width}), there = boundaries.on(Device::cuda());
        evaluate_boundaries<double>(*problem.here, 50, boundaries.view(), {.method = Method::sequential});
        index seen = 0;
        const Report report = evaluate_boundaries<double>(*problem.there, 50, there.view(), options,
                                                          [&](index, View<const double> s) { seen += s.steps(); });
        EXPECT_TRUE(report.ok());
        EXPECT_EQ(seen, 130);
        EXPECT_LE(largest_difference<double>(there.on(Device::host()), boundaries), 1e-13);
        const auto expected = adjoint_from_boundaries<double>(*problem.here, 50, boundaries, report, problem.gradient,
                                                              {.method = Method::sequential});
        const auto found =
            adjoint_from_boundaries<double>(*problem.there, 50, there, report, problem.there_gradient, options);
        EXPECT_LE(largest_difference<double>(found.inputs.on(Device::host()), expected.inputs), 1e-12);
        EXPECT_LE(largest_difference<double>(found.parameters.on(Device::host()), expected.parameters), 1e-12);
        EXPECT_LE(largest_difference<double>(found.initial.on(Device::host()), expected.initial), 1e-12);
    }
}

TYPED_TEST(CellOnGpu, DecodingTakesTheStepsOfSequentialEvaluation) {
    for_every_type([](auto type) {
        using T = decltype(type);
        using A = Arithmetic<T>;
        const Problem<TypeParam, T> problem({5, 3, 7}, 19, 0.5, Layout::batch_first);
        const Buffer<A> state = problem.initial.on(Device::cuda()), expected = problem.expected(),
                        here = problem.initial.clone();
        const Buffer<T> output({1, 3, 7 * TypeParam::states}, Layout::steps_first, Device::cuda());
        for (index t = 0; t < 5; ++t) {
            decode<TypeParam, T>(problem.there_inputs.view().steps(t, t + 1), problem.there_parameters, state,
                                 t == 0 ? View<T>() : output.view(), gpu);
            decode<TypeParam, A>(problem.inputs.view().steps(t, t + 1), problem.parameters, here);
            const Buffer<A> now = stored<A>(state.on(Device::host()));
            Buffer<A> want({1, 3, 7 * TypeParam::states});
            for (index j = 0; j < 3; ++j)
                for (index k = 0; k < want.shape().width; ++k) want(0, j, k) = expected(t, j, k);
            EXPECT_TRUE(near(now, want, 2e-5));
            EXPECT_TRUE(near(here, want, 1e-6));
            if (t == 0) continue;
            EXPECT_TRUE(near(widened(output.on(Device::host())), now, 1.01 * rounding<T>));
        }
    });
}

using CellOnGpuCorners = OnGpuTest;

TEST_F(CellOnGpuCorners, WhatIsNotFiniteInGuessesIsReplaced) {
    cell::register_on_gpu<FirstIsNaN<30>, float>();
    cell::register_on_gpu<Squares, float>();
    const Shape shape{200, 1, 12};
    const auto expect_right = [&](const auto& cell, double guess) {
        using C = std::decay_t<decltype(cell)>;
        const Buffer<float> inputs(shape), parameters({1, 1, 12}), there_guess({200, 1, 12 * C::states});
        std::fill_n(inputs.data(), inputs.size(), 0.1F);
        std::fill_n(parameters.data(), parameters.size(), 1.0F);
        std::fill_n(there_guess.data(), there_guess.size(), float(guess));
        const CellRecurrence<C, float> here(inputs, parameters);
        const Buffer<float> there_inputs = inputs.on(Device::cuda()), there_parameters = parameters.on(Device::cuda());
        const CellRecurrence<C, float> there(there_inputs, there_parameters);
        const auto expected = evaluate(here, {.method = Method::sequential}).trajectory;
        for (const Method method : {Method::overlap, Method::shooting})
            for (const index chunk : {0, 25}) {
                const Options options{.method = method, .chunk = chunk, .guess = Guess::given, .execution = gpu};
                const Buffer<float> trajectory = there_guess.on(Device::cuda());
                const Report report = evaluate(there, trajectory.view(), options);
                EXPECT_TRUE(report.ok()) << report;
                EXPECT_LE(largest_difference<float>(trajectory.on(Device::host()), expected), 1e-4) << report;
                const Buffer<float> on_cpu = there_guess.clone();
                EXPECT_TRUE(evaluate(here, on_cpu.view(), {.method = method, .chunk = 25, .guess = Guess::given}).ok());
                EXPECT_LE(largest_difference<float>(on_cpu, expected), 1e-4);
            }
    };
    expect_right(Squares(), 100);
    expect_right(FirstIsNaN<30>(), 100);
}

TEST_F(CellOnGpuCorners, TheFirstStepThatIsNotFiniteIsFound) {
    cell::register_on_gpu<Squares, float>();
    const Buffer<float> inputs({300, 2, 3}), parameters({1, 1, 3}), initial({1, 2, 3});
    std::fill_n(inputs.data(), inputs.size(), 0.1F);
    std::fill_n(parameters.data(), parameters.size(), 1.0F);
    initial(0, 1, 2) = 1.01F;
    const Buffer<float> there_inputs = inputs.on(Device::cuda()), there_parameters = parameters.on(Device::cuda()),
                        there_initial = initial.on(Device::cuda()),
                        trajectory({300, 2, 3}, Layout::steps_first, Device::cuda());
    const CellRecurrence<Squares, float> here(inputs, parameters, initial),
        there(there_inputs, there_parameters, there_initial);
    const Report expected = evaluate(here, {.method = Method::sequential}).report;
    ASSERT_EQ(expected.status, Status::non_finite);
    for (const Options& options : {Options{.method = Method::sequential, .execution = gpu},
                                   Options{.method = Method::overlap, .chunk = 25, .execution = gpu},
                                   Options{.method = Method::shooting, .chunk = 25, .execution = gpu}}) {
        const Report report = evaluate(there, trajectory.view(), options);
        EXPECT_EQ(report.status, Status::non_finite);
        EXPECT_EQ(report.sequences[0].confirmed, 300) << report;
        EXPECT_EQ(report.sequences[1].confirmed, expected.sequences[1].confirmed) << report;
    }
}

TEST_F(CellOnGpuCorners, WhatOverflowsWhereItIsRoundedIsNotFinite) {
    cell::register_on_gpu<Scaled, bfloat16, float16>();
    const auto expect_found = [](auto type, float input) {
        using T = decltype(type);
        const Shape shape{300, 2, 48};
        const Buffer<T> inputs(shape);
        const Buffer<float> parameters({1, 1, 48});
        std::fill_n(inputs.data(), inputs.size(), T(1.0F));
        std::fill_n(parameters.data(), parameters.size(), 1.9998F);
        inputs(150, 1, 47) = T(input);
        const Buffer<T> there_inputs = inputs.on(Device::cuda()),
                        trajectory(shape, Layout::steps_first, Device::cuda());
        const Buffer<float> there_parameters = parameters.on(Device::cuda());
        const CellRecurrence<Scaled, T> recurrence(there_inputs, there_parameters);
        for (const Options& options : {Options{.method = Method::sequential, .execution = gpu},
                                       Options{.method = Method::overlap, .chunk = 40, .execution = gpu},
                                       Options{.method = Method::shooting, .chunk = 40, .execution = gpu},
                                       Options{.method = Method::shooting, .execution = gpu}}) {
            const Report report = evaluate(recurrence, trajectory.view(), options);
            EXPECT_EQ(report.sequences[0].status, Status::converged) << report;
            EXPECT_EQ(report.sequences[1].status, Status::non_finite) << report;
            EXPECT_EQ(report.sequences[1].confirmed, 150) << report;
        }
    };
    expect_found(bfloat16(), 0x1p127F);
    expect_found(float16(), 0x1p15F);
}

TEST_F(CellOnGpuCorners, ALaterRepairKeepsTheResidualOfAnEarlierOne) {
    cell::register_on_gpu<Affine, float, double>();
    const Buffer<double> inputs({120, 1, 2}), parameters({1, 1, 1});
    parameters(0, 0, 0) = 1;
    for (index t = 0; t < 120; ++t) inputs(t, 0, 0) = t < 80 ? 1 : t == 80 ? 0.3 : 0.5;
    inputs(0, 0, 1) = 0.15;
    inputs(79, 0, 1) = 2;
    // The chunks of 40 steps start from 0. In the first round the last one starts from 2 and meets its zeros at
    // 2 * 0.3 * 0.5^3 = 0.075, and in the second, from 2.15, at once: 0.15 * 0.3 = 0.045.
    const Buffer<double> there_inputs = inputs.on(Device::cuda()), there_parameters = parameters.on(Device::cuda()),
                         trajectory({120, 1, 1}, Layout::steps_first, Device::cuda());
    const CellRecurrence<Affine, double> recurrence(there_inputs, there_parameters);
    const Report report = evaluate(
        recurrence, trajectory.view(),
        {.method = Method::overlap, .chunk = 40, .absolute_tolerance = 0.1, .relative_tolerance = 0, .execution = gpu});
    EXPECT_TRUE(report.ok()) << report;
    EXPECT_NEAR(report.residual, 0.075, 1e-12);
    EXPECT_NEAR(report.relative_residual, 0.75, 1e-12);
    const Buffer<double> states = trajectory.on(Device::host());
    EXPECT_NEAR(states(80, 0, 0), 0.6, 1e-12);
    EXPECT_NEAR(0.5 * states(82, 0, 0) - states(83, 0, 0), 0.075, 1e-12);
}

// Of nine channels in tiles of eight, seven lanes follow the last one until it is repaired. Two stable states: what is
// at the upper one goes to the lower one at steps 5 and 1500, so a lane that kept an old carry would ask for another
// repair.
TEST_F(CellOnGpuCorners, LanesWithoutChannelsDecideNothing) {
    const auto method_of = [](index channels) {
        const Shape shape{1600, 2, channels};
        const Buffer<double> inputs(shape), parameters({2, 1, channels}), initial({1, 2, channels});
        for (index t : {5, 6, 1500, 1501}) std::fill_n(inputs.view().at(t, 0), 2 * channels, -10.0);
        std::fill_n(parameters.data(), channels, 0.5);
        std::fill_n(parameters.data() + channels, channels, 2.0);
        std::fill_n(initial.data(), initial.size(), 0.95);
        const Buffer<double> there_inputs = inputs.on(Device::cuda()), there_parameters = parameters.on(Device::cuda()),
                             there_initial = initial.on(Device::cuda()),
                             trajectory(shape, Layout::steps_first, Device::cuda());
        const CellRecurrence<LeakyTanh, double> recurrence(there_inputs, there_parameters, there_initial);
        return evaluate(recurrence, trajectory.view(),
                        {.method = Method::shooting, .tolerance = 1e-9, .max_iterations = 1, .execution = gpu})
            .method;
    };
    EXPECT_EQ(method_of(9), method_of(16));
}

TEST_F(CellOnGpuCorners, NothingToDo) {
    for (const Shape& shape : {Shape{0, 2, 4}, Shape{5, 0, 4}}) {
        const Buffer<float> inputs(shape, Layout::steps_first, Device::cuda()),
            parameters({1, 1, 4}, Layout::steps_first, Device::cuda()),
            states(shape, Layout::steps_first, Device::cuda());
        const CellRecurrence<DiagonalElman, float> recurrence(inputs, parameters);
        const Report report = evaluate(recurrence, states.view(), {.execution = gpu});
        EXPECT_TRUE(report.ok());
        const auto gradients = adjoint<float>(recurrence, states, report, states, {.execution = gpu});
        const Buffer<float> sums = gradients.parameters.on(Device::host()),
                            first = gradients.initial.on(Device::host());
        EXPECT_EQ(sums.size(), 4);
        for (index i = 0; i < sums.size(); ++i) EXPECT_EQ(sums.data()[i], 0);
        EXPECT_EQ(first.size(), 4 * shape.batch);
        for (index i = 0; i < first.size(); ++i) EXPECT_EQ(first.data()[i], 0);
    }
}

/// Units in the last place, as in scalar_test.cpp; what is below the smallest normal number may be 0.
double units(float result, double exact) {
    if (std::abs(exact) < 0x1p-126 && std::abs(result) <= 0x1p-126F) return 0;
    if (std::isinf(result)) return exact >= 0x1.ffffffp127 ? 0 : HUGE_VAL;
    int exponent = 0;
    (void)std::frexp(exact, &exponent);
    return std::abs(double(result) - exact) / std::ldexp(1.0, std::max(exponent, -125) - 24);
}

TEST_F(CellOnGpuCorners, FunctionsAreAsAccurateAsTheySay) {
    cell::register_on_gpu<Functions, float>();
    // Floats of all sizes, most of them where the functions are neither 0 nor 1.
    const index steps = 64, channels = 512;
    const Buffer<float> inputs({steps, 1, channels}), parameters({1, 1, channels});
    for (index i = 0; i < inputs.size(); ++i) {
        const double at = double(i) / double(inputs.size());
        inputs.data()[i] = float(i % 4 == 0   ? -104 + 193 * at
                                 : i % 4 == 1 ? 88.5 + 0.5 * at
                                 : i % 4 == 2 ? -12 + 24 * at
                                              : std::copysign(std::exp2(-40 + 47 * at), at - 0.5));
    }
    const Buffer<float> there_inputs = inputs.on(Device::cuda()), there_parameters = parameters.on(Device::cuda()),
                        trajectory({steps, 1, channels * 3}, Layout::steps_first, Device::cuda());
    evaluate(CellRecurrence<Functions, float>(there_inputs, there_parameters), trajectory.view(),
             {.method = Method::sequential, .execution = gpu});
    const Buffer<float> found = trajectory.on(Device::host());
    double worst[3] = {};
    for (index i = 0; i < inputs.size(); ++i) {
        const double x = inputs.data()[i];
        const double exact[3] = {std::exp(x), 1 / (1 + std::exp(-x)), std::tanh(x)};
        for (int k = 0; k < 3; ++k)
            worst[k] = scalar_functions::larger_or_nan(worst[k], units(found.data()[3 * i + k], exact[k]));
    }
    EXPECT_LE(worst[0], 4);
    EXPECT_LE(worst[1], 8);
    EXPECT_LE(worst[2], 7);
}

TEST_F(CellOnGpuCorners, SayWhatIsWrong) {
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
              "options.method: expected automatic, sequential, overlap or shooting, for a cell on a GPU, got newton");
    const std::string elsewhere = ": expected memory of a GPU, for Backend::cuda, got main memory";
    EXPECT_EQ(
        message([&] { evaluate_boundaries<float>(*problem.there, 5, here.view().steps(0, 2), {.execution = gpu}); }),
        "boundaries" + elsewhere);
    const auto backward = [&](View<const float> boundaries, View<const float> gradient) {
        adjoint_from_boundaries<float>(*problem.there, 5, boundaries, Report(), gradient, {.execution = gpu});
    };
    EXPECT_EQ(message([&] { backward(here.view().steps(0, 2), problem.there_gradient); }), "boundaries" + elsewhere);
    EXPECT_EQ(message([&] { backward(there.view().steps(0, 2), here); }), "output_gradient" + elsewhere);
    EXPECT_EQ(message([&] { problem.there->segment(5, 10, here.view().steps(0, 1), gpu); }), "before" + elsewhere);
    EXPECT_EQ(message([&] { problem.here->segment(5, 10, there.view().steps(0, 1), gpu); }), "initial" + elsewhere);
    EXPECT_EQ(message([&] { problem.there->final_states(here, gpu); }), "trajectory" + elsewhere);
    const CellRecurrence<Unregistered, float> unknown(problem.there_inputs, problem.there_parameters);
    EXPECT_NE(message([&] { evaluate(unknown, there.view(), {.execution = gpu}); }).find("DEEPPCR_CELL_ON_GPU"),
              std::string::npos);
    EXPECT_EQ(message([&] {
                  decode<LeakyTanh, float>(problem.there_inputs.view().steps(0, 1), problem.there_parameters, {}, {},
                                           gpu);
              }),
              "state: expected a contiguous array of shape [1,1,2], got [0,1,1]");
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capturing");
    const Execution captured{.backend = Backend::cuda, .stream = stream};
    EXPECT_EQ(message([&] { evaluate(*problem.there, there.view(), {.execution = captured}); }),
              "options.execution.stream: expected one that is not captured, as the host waits for the outcome, got one "
              "that is captured into a graph");
    cuda::check(cudaStreamEndCapture(stream, &graph), "capturing");
    cuda::check(cudaGraphDestroy(graph), "ending a graph");
    cuda::check(cudaStreamDestroy(stream), "ending a stream");
    // Processors do not compute with numbers of 16 bits.
    const Buffer<bfloat16> few({10, 1, 2});
    const Buffer<float> parameters({2, 1, 2});
    const CellRecurrence<LeakyTanh, bfloat16> narrow(few, parameters);
    for (const Backend backend : {Backend::cpu, Backend::reference}) {
        const std::string name = backend == Backend::cpu ? "cpu" : "reference";
        const std::string expected =
            "options.execution.backend: expected cuda, for numbers stored in 16 bits, got " + name;
        const Options options{.execution = {.backend = backend}};
        EXPECT_EQ(message([&] { evaluate(narrow, few.view(), options); }), expected);
        EXPECT_EQ(message([&] { adjoint<bfloat16>(narrow, few, Report(), few, options); }), expected);
        EXPECT_EQ(message([&] { evaluate_boundaries<bfloat16>(narrow, 5, few.view(), options); }), expected);
    }
}

}  // namespace
}  // namespace deeppcr
