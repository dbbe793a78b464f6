// Cells on a GPU, or on an emulated one: every built-in cell and some of a user's, in every type, against the cpu
// backend.
#include "tests/cells_on_gpu.hpp"

namespace deeppcr {
namespace {

DEEPPCR_CELL_ON_GPU(::deeppcr::LeakyTanh);

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

/// A group has two channels there, which begin together; or one, at the end of an odd width.
TYPED_TEST(CellOnGpu, SequencesInOneRowInEveryTypeOf16Bits) {
    const auto agrees = [](auto type, index width) {
        using T = decltype(type);
        const std::vector<SequenceStart> starts{{0, 4}, {0, 5}, {2, 230}};
        const Problem<TypeParam, T> problem({300, 3, width}, 5, 0.5, Layout::steps_first, starts);
        const auto expected = problem.expected();
        for (const Method method : {Method::sequential, Method::overlap, Method::shooting})
            for (const index chunk : {0, 50}) {
                const auto [trajectory, report] = problem.evaluate_there({.method = method, .chunk = chunk});
                EXPECT_TRUE(report.ok()) << report;
                EXPECT_TRUE(near(trajectory, expected, 10 * rounding<T>)) << width << " channels, " << report;
            }
    };
    for (const index width : {12, 13}) {
        agrees(bfloat16(), width);
        agrees(float16(), width);
    }
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
                    EXPECT_TRUE(near(parameters.on(Device::host()), expected.parameters,
                                     has_brief_tanh<T> ? 4 * tolerance(expected.parameters) : 2e-5));
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
            EXPECT_TRUE(near(now, want, has_brief_tanh<T> ? 0x1p-8 : 2e-5));
            EXPECT_TRUE(near(here, want, 1e-6));
            if (t == 0) continue;
            EXPECT_TRUE(near(widened(output.on(Device::host())), now, 1.01 * rounding<T>));
        }
    });
}

}  // namespace
}  // namespace deeppcr
