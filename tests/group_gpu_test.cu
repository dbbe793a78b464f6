// Systems whose parts are on GPUs, one part for each rank. Ranks are threads here, and all have the same GPU.
#include <gtest/gtest.h>

#include <cmath>

#include <deeppcr/bidiagonal.hpp>
#include <deeppcr/group.hpp>

#include "tests/compare.hpp"

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
    const auto& [shape, block, method] = problem;
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

TEST(GroupOnGpu, SolvesEveryKindOfBlock) {
    if (!cuda_problem().empty()) GTEST_SKIP() << cuda_problem();
    for (const Problem& problem :
         {Problem{{3, 1, 1}, 1}, Problem{{41, 2, 6}, 1}, Problem{{41, 2, 6}, 3}, Problem{{23, 2, 5}, 5},
          Problem{{41, 1, 4}, 2, Reduction::sequential}, Problem{{41, 1, 2}, 2, Reduction::pcr}})
        for (const bool transposed : {false, true})
            for (const bool in_place : {false, true}) {
                expect_solved<float>(problem, transposed, in_place, Layout::steps_first, 1e-5);
                expect_solved<double>(problem, transposed, in_place, Layout::batch_first, 1e-13);
            }
}

TEST(GroupOnGpu, WhatOneRankCannotSolveIsAnErrorOnAll) {
    if (!cuda_problem().empty()) GTEST_SKIP() << cuda_problem();
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
