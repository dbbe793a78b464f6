// Systems whose parts are on GPUs, one part for each rank. Ranks are threads here, and all have the same GPU.
#include <gtest/gtest.h>

#include <cmath>

#include <deeppcr/bidiagonal.hpp>
#include <deeppcr/cells.hpp>
#include <deeppcr/dense_cells.hpp>
#include <deeppcr/dense_chain.hpp>
#include <deeppcr/evaluate.hpp>
#include <deeppcr/group.hpp>

#include "tests/compare.hpp"
#include "tests/gpu.hpp"

namespace deeppcr {
namespace {

constexpr Device there = Device::cuda();

struct Problem {
    Shape shape;
    index block;
    Reduction method = Reduction::automatic;
};

/// Each rank's part on the GPU against all of it on a processor.
template <class T>
void expect_solved(const Problem& problem, bool transposed, bool in_place, Layout layout, double tolerance) {
    const Shape shape = problem.shape;
    const index block = problem.block;
    const Reduction method = problem.method;
    const auto factors = Buffer<T>::random({shape.steps, shape.batch, shape.width * block}, 1, layout);
    const auto right_side = Buffer<T>::random(shape, 2, layout), initial = Buffer<T>::random({1, 3, shape.width}, 3);
    for (index i = 0; i < factors.size(); ++i) factors.data()[i] *= T(0.8 / std::sqrt(double(block)));
    const auto solve_by = [&](const BidiagonalSystem<T>& system, View<T> solution, const SolveOptions& options) {
        transposed ? solve_transposed(system, solution, options) : solve(system, solution, options);
    };
    const auto start = [&](const Buffer<T>& states) { return states.view().sequences(0, shape.batch); };
    Buffer<T> expected(shape, layout);
    solve_by({Jacobian<const T>(factors.data(), shape, block, layout), right_side, start(initial)}, expected, {});

    const auto there_factors = factors.on(there), there_right_side = right_side.on(there),
               there_initial = initial.on(there);
    for (const int ranks : {2, 3}) {
        auto solution = in_place ? right_side.on(there) : Buffer<T>::uninitialised(shape, layout, there);
        Group::simulate(ranks, [&](Group& group) {
            const auto [first, last] = group.part(shape.steps);
            const View<T> part = solution.view().steps(first, last);
            solve_by(
                {Jacobian<const T>(there_factors.data(), shape, block, layout).steps(first, last),
                 in_place ? View<const T>(part) : there_right_side.view().steps(first, last), start(there_initial)},
                part, {.method = method, .execution = {.backend = Backend::cuda}, .group = &group});
        });
        EXPECT_LE(largest_difference<T>(solution.on(Device::host()), expected), tolerance)
            << to_string(shape) << " block " << block << (transposed ? " transposed, " : ", ") << ranks << " ranks";
    }
}

using GroupOnGpu = OnGpuTest;

TEST_F(GroupOnGpu, SolvesEveryKindOfBlock) {
    for (const Problem& problem :
         {Problem{{3, 1, 1}, 1}, Problem{{41, 2, 6}, 1}, Problem{{41, 2, 6}, 3}, Problem{{23, 2, 5}, 5},
          Problem{{41, 1, 4}, 2, Reduction::sequential}, Problem{{41, 1, 2}, 2, Reduction::pcr}})
        for (const bool transposed : {false, true})
            for (const bool in_place : {false, true}) {
                expect_solved<float>(problem, transposed, in_place, Layout::steps_first, 1e-5);
                expect_solved<double>(problem, transposed, in_place, Layout::batch_first, 1e-13);
            }
}

/// Row 0 has three sequences, one of which begins with the second rank's part.
TEST_F(GroupOnGpu, CellsAndTheirGradientsAreThoseOfOneProcessor) {
    const index steps = 90, batch = 2, channels = 3;
    const auto inputs = Buffer<double>::random({steps, batch, ParaLSTM::inputs * channels}, 1);
    const auto parameters = Buffer<double>::random({ParaLSTM::parameters, 1, channels}, 2);
    const auto output_gradient = Buffer<double>::random({steps, batch, ParaLSTM::states * channels}, 4);
    const auto there_inputs = inputs.on(there), there_parameters = parameters.on(there),
               there_gradient = output_gradient.on(there);
    for (const int ranks : {2, 3}) {
        const std::vector<SequenceStart> starts = {{0, 0}, {0, 7}, {0, steps / ranks}, {1, 0}};
        const auto initial = Buffer<double>::random({1, index(starts.size()), ParaLSTM::states * channels}, 3);
        const auto there_initial = initial.on(there);
        const CellRecurrence<ParaLSTM, double> whole(inputs, parameters, initial, starts);
        const auto expected = evaluate(whole, {.method = Method::sequential});
        const auto gradients = adjoint(whole, expected.trajectory, expected.report, output_gradient);
        Group::simulate(ranks, [&](Group& group) {
            const auto [first, last] = group.part(steps);
            // Of the first rank's sequences one is in row 1; on the others row 1 goes on, and its state is not read.
            const std::vector<SequenceStart> here = group.rank() == 0   ? std::vector<SequenceStart>{{0, 7}}
                                                    : group.rank() == 1 ? std::vector<SequenceStart>{{0, 0}}
                                                                        : std::vector<SequenceStart>{};
            Buffer<double> own({1, group.rank() == 0 ? 3 : 2, initial.view().width()});
            for (index i = 0; i < own.view().batch(); ++i) {
                const index from = group.rank() == 0 ? (i < 2 ? i : 3) : i + 2;
                std::copy_n(initial.view().at(0, from), own.view().width(), own.view().at(0, i));
            }
            const auto there_own = own.on(there);
            const CellRecurrence<ParaLSTM, double> part(there_inputs.view().steps(first, last), there_parameters,
                                                        there_own, here);
            for (const Method method : {Method::automatic, Method::overlap, Method::shooting, Method::sequential}) {
                const Options options{
                    .method = method, .chunk = 16, .execution = {.backend = Backend::cuda}, .group = &group};
                const auto found = evaluate(part, options);
                EXPECT_TRUE(found.report.ok()) << found.report;
                EXPECT_LE(largest_difference<double>(found.trajectory.on(Device::host()),
                                                     expected.trajectory.view().steps(first, last)),
                          1e-11)
                    << to_string(method) << " on " << to_string(group);
                const auto mine = adjoint(part, found.trajectory, found.report,
                                          View<const double>(there_gradient.view().steps(first, last)), options);
                EXPECT_LE(largest_difference<double>(mine.inputs.on(Device::host()),
                                                     gradients.inputs.view().steps(first, last)),
                          1e-10);
                EXPECT_TRUE(near(mine.parameters.on(Device::host()), gradients.parameters, 1e-10));
                EXPECT_LE(mine.report.iterations, ranks + 1);
                const auto of_initial = mine.initial.on(Device::host());
                for (index i = 0; i < of_initial.view().batch(); ++i) {
                    const index k = group.rank() == 0 ? (i < 2 ? i : 3) : i + 2;
                    if (group.rank() > 1 || (group.rank() == 1 && i == 1)) continue;  // it began on another rank
                    EXPECT_LE(
                        largest_difference<double>(of_initial.view().sequences(i, i + 1),
                                                   View<const double>(gradients.initial.view().sequences(k, k + 1))),
                        1e-10);
                }
            }
        });
    }
}

/// One GPU for all: through main memory.
TEST_F(GroupOnGpu, SumsHaveTheBitsOfMainMemory) {
    for (const int ranks : {1, 2, 3})
        Group::simulate(ranks, [](Group& group) {
            for (const index count : {3, 5000}) {
                auto expected = Buffer<double>::random({1, 1, count}, std::uint64_t(group.rank() + 1));
                const auto values = expected.on(there);
                group.sum(std::span<double>(expected.data(), std::size_t(count)));
                group.sum(std::span<double>(values.data(), std::size_t(count)), {.backend = Backend::cuda});
                EXPECT_EQ(largest_difference<double>(values.on(Device::host()), expected), 0) << to_string(group);
            }
            EXPECT_FALSE(group.sums_between_gpus());
        });
}

TEST_F(GroupOnGpu, ASequenceThatIsNotFiniteEndsThere) {
    const auto inputs = Buffer<float>::random({40, 2, 2}, 1);
    inputs(27, 1, 0) = std::numeric_limits<float>::quiet_NaN();
    const auto there_inputs = inputs.on(there), there_parameters = Buffer<float>::random({1, 1, 2}, 2).on(there);
    Group::simulate(3, [&](Group& group) {
        const auto [first, last] = group.part(40);
        const CellRecurrence<DiagonalElman> part(there_inputs.view().steps(first, last), there_parameters);
        const auto found =
            evaluate(part, {.method = Method::overlap, .execution = {.backend = Backend::cuda}, .group = &group});
        EXPECT_FALSE(found.report.ok());
        EXPECT_TRUE(found.report.sequences[0].status != Status::non_finite) << found.report;
        EXPECT_EQ(found.report.sequences[1].status, Status::non_finite);
        EXPECT_EQ(found.report.sequences[1].confirmed, 27);
    });
}

TEST_F(GroupOnGpu, NewtonsMethodIsRefusedForCells) {
    const auto inputs = Buffer<float>::random({8, 1, 2}, 1).on(there),
               parameters = Buffer<float>::random({1, 1, 2}, 2).on(there);
    Group::simulate(2, [&](Group& group) {
        const auto [first, last] = group.part(8);
        const CellRecurrence<DiagonalElman> part(inputs.view().steps(first, last), parameters);
        EXPECT_THROW(
            evaluate(part, {.method = Method::newton, .execution = {.backend = Backend::cuda}, .group = &group}),
            InvalidArgument);
    });
}

TEST_F(GroupOnGpu, ADenseCellsGradientsAreThoseOfOneProcessor) {
    const index steps = 31, batch = 2, hidden = 3;
    const auto inputs = Buffer<double>::random({steps, batch, 3 * hidden}, 1);
    const auto weights = Buffer<double>::random({3, hidden, hidden}, 2),
               biases = Buffer<double>::random({3, 1, hidden}, 3);
    const auto output_gradient = Buffer<double>::random({steps, batch, hidden}, 4);
    const auto initial = Buffer<double>::random({1, batch, hidden}, 5);
    const DenseCell<double> whole(DenseCellKind::gru, inputs, weights, biases, initial);
    const auto expected = evaluate(whole, {.method = Method::sequential});
    const auto gradients = adjoint(whole, expected.trajectory, expected.report, output_gradient);
    const auto there_inputs = inputs.on(there), there_weights = weights.on(there), there_biases = biases.on(there),
               there_initial = initial.on(there), there_gradient = output_gradient.on(there);
    for (const int ranks : {2, 3})
        Group::simulate(ranks, [&](Group& group) {
            const auto [first, last] = group.part(steps);
            const DenseCell<double> part(DenseCellKind::gru, there_inputs.view().steps(first, last), there_weights,
                                         there_biases, there_initial);
            for (const Method method : {Method::automatic, Method::sequential}) {
                const Options options{.method = method, .execution = {.backend = Backend::cuda}, .group = &group};
                const auto found = evaluate(part, options);
                EXPECT_TRUE(found.report.ok()) << found.report;
                EXPECT_LE(largest_difference<double>(found.trajectory.on(Device::host()),
                                                     expected.trajectory.view().steps(first, last)),
                          1e-11);
                const auto own = adjoint(part, found.trajectory, found.report,
                                         View<const double>(there_gradient.view().steps(first, last)), options);
                EXPECT_LE(largest_difference<double>(own.inputs.on(Device::host()),
                                                     gradients.inputs.view().steps(first, last)),
                          1e-11);
                EXPECT_TRUE(near(own.weights.on(Device::host()), gradients.weights, 1e-11));
                EXPECT_TRUE(near(own.biases.on(Device::host()), gradients.biases, 1e-11));
            }
        });
}

TEST_F(GroupOnGpu, ADenseChainsLayersAreShared) {
    const index steps = 13, batch = 2, width = 4, skip = 2;
    auto weights = Buffer<double>::random({steps * skip, width, width}, 1);
    for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= 0.4;
    const auto biases = Buffer<double>::random({steps * skip, 1, width}, 2);
    const auto initial = Buffer<double>::random({1, batch, width}, 3);
    const auto output_gradient = Buffer<double>::random({steps, batch, width}, 4);
    const DenseChain<double>::Options residual{Activation::tanh, skip};
    const DenseChain<double> whole(weights, biases, initial, residual);
    const auto expected = evaluate(whole, {.method = Method::sequential});
    const auto gradients = adjoint(whole, expected.trajectory, expected.report, output_gradient);
    const auto there_weights = weights.on(there), there_biases = biases.on(there), there_initial = initial.on(there),
               there_gradient = output_gradient.on(there);
    for (const int ranks : {2, 3})
        Group::simulate(ranks, [&](Group& group) {
            const auto [first, last] = group.part(steps);
            const DenseChain<double> part(there_weights.view().steps(skip * first, skip * last),
                                          there_biases.view().steps(skip * first, skip * last), there_initial,
                                          residual);
            const Options options{.execution = {.backend = Backend::cuda}, .group = &group};
            const auto found = evaluate(part, options);
            EXPECT_TRUE(found.report.ok()) << found.report;
            EXPECT_LE(largest_difference<double>(found.trajectory.on(Device::host()),
                                                 expected.trajectory.view().steps(first, last)),
                      1e-11);
            const auto own = adjoint(part, found.trajectory, found.report,
                                     View<const double>(there_gradient.view().steps(first, last)), options);
            EXPECT_LE(largest_difference<double>(own.weights.on(Device::host()),
                                                 gradients.weights.view().steps(skip * first, skip * last)),
                      1e-11);
            EXPECT_LE(largest_difference<double>(own.biases.on(Device::host()),
                                                 gradients.biases.view().steps(skip * first, skip * last)),
                      1e-11);
        });
}

TEST_F(GroupOnGpu, WhatOneRankCannotSolveIsAnErrorOnAll) {
    Group::simulate(2, [](Group& group) {
        const Shape shape{4, 1, 2};
        const auto factors = Buffer<float>({4, 1, 4}, Layout::steps_first, there);
        const Buffer<float> right_side(shape, Layout::steps_first, there), in_main_memory(shape);
        Buffer<float> solution(shape, Layout::steps_first, there);
        const BidiagonalSystem<float> system{{factors.data(), shape, 2},
                                             group.rank() == 0 ? right_side.view() : in_main_memory.view()};
        const SolveOptions options{.execution = {.backend = Backend::cuda}, .group = &group};
        if (group.rank() == 0)
            EXPECT_THROW(solve(system, solution.view(), options), RankFailed);
        else
            EXPECT_THROW(solve(system, solution.view(), options), InvalidArgument);
    });
}

}  // namespace
}  // namespace deeppcr
