// What is asked of an emulated GPU: how many kernels, and no memory once a workspace has grown.
#include <gtest/gtest.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"
#include "tests/streams.cuh"

namespace deeppcr {
namespace {

struct Asked {
    long launches, allocations, waits;
};
/// Of what `call` enqueues, all of it done.
template <class Call>
Asked asked_by(const Call& call, const Buffer<float>& result) {
    const emulation::Machine& machine = emulation::machine();
    const Asked before{machine.launches, machine.allocations, machine.waits};
    call();
    const long waits = machine.waits - before.waits;
    const Buffer<float> here({result.shape()});
    detail::copy(here.data(), result.data(), result.size() * index(sizeof(float)));
    return {machine.launches - before.launches, machine.allocations - before.allocations, waits};
}

TEST(CellLaunches, OneKernelPerDecodedStep) {
    const Buffer<float> inputs({1, 3, 3 * 5}, Layout::steps_first, Device::cuda()),
        parameters({3, 1, 5}, Layout::steps_first, Device::cuda()),
        state({1, 3, 5}, Layout::steps_first, Device::cuda());
    const Asked asked =
        asked_by([&] { decode<ParaGRU, float>(inputs, parameters, state, {}, {.backend = Backend::cuda}); }, state);
    EXPECT_EQ(asked.launches, 1);
    EXPECT_EQ(asked.allocations, 0);
}

TEST(CellLaunches, LaterCallsAllocateNothing) {
    const Shape shape{200, 2, 20};
    const Buffer<float> inputs = Buffer<float>::random({200, 2, 3 * 20}, 1, Layout::steps_first, Device::cuda()),
                        parameters = Buffer<float>::random({3, 1, 20}, 2, Layout::steps_first, Device::cuda()),
                        gradient = Buffer<float>::random(shape, 3, Layout::steps_first, Device::cuda()),
                        trajectory(shape, Layout::steps_first, Device::cuda()),
                        input_gradient(inputs.shape(), Layout::steps_first, Device::cuda()),
                        parameter_gradient(parameters.shape(), Layout::steps_first, Device::cuda()),
                        initial_gradient({1, 2, 20}, Layout::steps_first, Device::cuda());
    const CellRecurrence<ParaGRU, float> recurrence(inputs, parameters);
    Workspace workspace(Device::cuda());
    struct Case {
        Options options;
        long launches, backward;
    };
    // The sweep, a round of repairs, collect; tiles and collect. Backward the sweep, three rounds of corrections, as
    // they do not end within 40 steps, what is left of them, the sum of the parameters' gradients, the initial states'.
    const Case cases[] = {{{.method = Method::sequential}, 2, 3},
                          {{.method = Method::overlap, .chunk = 40}, 3, 7},
                          {{.method = Method::overlap, .chunk = 100}, 3, 4},
                          {{.method = Method::shooting}, 2, 0}};
    for (const Case& counted : cases) {
        Options options = counted.options;
        options.execution.backend = Backend::cuda;
        options.workspace = &workspace;
        Report report;
        const auto evaluation = [&, &asked = options] { report = evaluate(recurrence, trajectory.view(), asked); };
        const auto backward = [&, &asked = options] {
            adjoint<float>(recurrence, trajectory, report, gradient,
                           {input_gradient, parameter_gradient, initial_gradient}, asked);
        };
        evaluation();
        backward();
        const Asked again = asked_by(evaluation, trajectory);
        EXPECT_EQ(again.allocations, 0) << report;
        EXPECT_EQ(again.launches, counted.launches) << report;
        const Asked back = asked_by(backward, input_gradient);
        EXPECT_EQ(back.allocations, 0) << report;
        if (counted.backward > 0) {  // else as costs have it
            EXPECT_EQ(back.launches, counted.backward) << report;
        }
    }
}

/// Nor do the systems that a sweep solves, where they take memory: here a tile does not hold one.
TEST(CellLaunches, LaterSweepsAllocateNothing) {
    const Shape shape{1200, 1, 4};
    const Buffer<float> inputs = Buffer<float>::random({1200, 1, 3 * 4}, 1, Layout::steps_first, Device::cuda()),
                        parameters({3, 1, 4}, Layout::steps_first, Device::cuda()),
                        trajectory(shape, Layout::steps_first, Device::cuda());
    const CellRecurrence<ParaGRU, float> recurrence(inputs, parameters);
    Workspace workspace(Device::cuda());
    const Options options{
        .method = Method::shooting, .chunk = 2, .execution = {.backend = Backend::cuda}, .workspace = &workspace};
    const std::size_t before = std::exchange(emulation::machine().shared_bytes, std::size_t(8) << 10);
    Report report;
    const auto evaluation = [&] { report = evaluate(recurrence, trajectory.view(), options); };
    evaluation();
    EXPECT_GT(report.iterations, 3) << report;
    EXPECT_EQ(asked_by(evaluation, trajectory).allocations, 0);
    emulation::machine().shared_bytes = before;
}

/// And waits for nothing; in chunks three launches more than with a wait, two rounds and what finishes.
TEST(CellLaunches, WhatIsEnqueuedIsNotWaitedFor) {
    const Shape shape{200, 2, 20};
    const Buffer<float> inputs = Buffer<float>::random({200, 2, 3 * 20}, 1, Layout::steps_first, Device::cuda()),
                        gradient = Buffer<float>::random(shape, 3, Layout::steps_first, Device::cuda()),
                        trajectory(shape, Layout::steps_first, Device::cuda()),
                        input_gradient(inputs.shape(), Layout::steps_first, Device::cuda()),
                        initial_gradient({1, 2, 20}, Layout::steps_first, Device::cuda());
    Buffer<float> weights = Buffer<float>::random({3, 1, 20}, 2);
    for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= 0.3F;
    const Buffer<float> parameters = weights.on(Device::cuda()),
                        parameter_gradient(parameters.shape(), Layout::steps_first, Device::cuda());
    const auto memory = detail::allocate(index(sizeof(index)), Device::cuda());
    auto* const status = static_cast<index*>(memory.get());
    const CellRecurrence<ParaGRU, float> recurrence(inputs, parameters);
    Workspace workspace(Device::cuda());
    struct Case {
        Method method;
        index chunk;
        long launches, backward;
    };
    for (const Case& counted :
         {Case{Method::sequential, 0, 2, 3}, Case{Method::overlap, 100, 6, 7}, Case{Method::shooting, 0, 2, 0}}) {
        const Options options{.method = counted.method,
                              .chunk = counted.chunk,
                              .tolerance = 1e-4,
                              .execution = {.backend = Backend::cuda},
                              .workspace = &workspace};
        const auto forward = [&] { enqueue(recurrence, trajectory.view(), status, options); };
        const auto backward = [&] {
            enqueue_adjoint(recurrence, trajectory.view(), status, gradient,
                            {input_gradient, parameter_gradient, initial_gradient}, options);
        };
        for (int times = 0; times < 2; ++times) {  // learns how many rounds there are
            asked_by(forward, trajectory);
            asked_by(backward, input_gradient);
        }
        const Asked there = asked_by(forward, trajectory), back = asked_by(backward, input_gradient);
        EXPECT_EQ(there.launches, counted.launches) << to_string(counted.method);
        if (counted.backward > 0) {  // else as costs have it
            EXPECT_EQ(back.launches, counted.backward) << to_string(counted.method);
        }
        const Asked ahead = asked_by(  // of the GPU, whose letters are not back
            [&] {
                for (int times = 0; times < 40; ++times) {
                    forward();
                    backward();
                }
            },
            trajectory);
        EXPECT_EQ(there.allocations + back.allocations + ahead.allocations, 0);
        EXPECT_EQ(there.waits + back.waits + ahead.waits, 0);
    }
    // Not so while it is not known what the methods that `automatic` weighs take.
    const Options automatic{.execution = {.backend = Backend::cuda}, .workspace = &workspace};
    long waits = 0, last = 0;
    for (int times = 0; times < 12; ++times) {
        last = asked_by([&] { enqueue(recurrence, trajectory.view(), status, automatic); }, trajectory).waits;
        waits += last;
    }
    EXPECT_GT(waits, 0);
    EXPECT_EQ(last, 0);
}

/// Beyond the `buffers` that the gradients of a call are.
template <class R>
void expect_nothing_more_allocated(const R& recurrence, long buffers) {
    const Buffer<float> trajectory(recurrence.shape(), Layout::steps_first, Device::cuda()),
        gradient = Buffer<float>::random(recurrence.shape(), 3, Layout::steps_first, Device::cuda());
    const Execution execution{.backend = Backend::cuda};
    const Report report =
        evaluate(recurrence, trajectory.view(), {.method = Method::sequential, .execution = execution});
    const Options cases[] = {{.method = Method::sequential},
                             {.method = Method::newton, .reduction = Reduction::sequential, .window = 7},
                             {.method = Method::newton, .reduction = Reduction::pcr},
                             {.method = Method::newton, .reduction = Reduction::scan}};
    for (Options options : cases) {
        Workspace workspace(Device::cuda());
        options.execution = execution;
        options.workspace = &workspace;
        Report told;
        const auto backward = [&] { told = adjoint(recurrence, trajectory, report, gradient, options).report; };
        backward();
        EXPECT_EQ(asked_by(backward, trajectory).allocations, buffers) << told;
        EXPECT_EQ(told.workspace_bytes, workspace.peak_bytes()) << told;
    }
}

/// Those are returned in new memory.
TEST(AdjointLaunches, LaterCallsAllocateTheGradientsOnly) {
    const auto random = [](const Shape& shape, unsigned seed) {
        auto numbers = Buffer<float>::random(shape, seed);
        for (index i = 0; i < numbers.size(); ++i) numbers.data()[i] *= 0.3F;
        return numbers.on(Device::cuda());
    };
    const index steps = 30, batch = 3, width = 24;
    const Buffer<float> initial = random({1, batch, width}, 4);
    for (const index skip : {0, 2}) {
        SCOPED_TRACE("a chain with skip " + std::to_string(skip));
        const index layers = steps * std::max<index>(skip, 1);
        const Buffer<float> weights = random({layers, width, width}, 1), biases = random({layers, 1, width}, 2);
        const DenseChain<float> chain(weights, biases, initial, {.skip = skip});
        expect_nothing_more_allocated(chain, 3);
        SCOPED_TRACE("as any recurrence");
        expect_nothing_more_allocated<Recurrence<float>>(chain, 2);
    }
    for (const DenseCellKind kind : {DenseCellKind::elman_tanh, DenseCellKind::gru, DenseCellKind::lstm}) {
        SCOPED_TRACE("a cell of kind " + std::to_string(int(kind)));
        const index gates = gate_count(kind), hidden = width / (state_width(kind, width) / width);
        const Buffer<float> inputs = random({steps, batch, gates * hidden}, 1),
                            weights = random({gates, hidden, hidden}, 2), biases = random({gates, 1, hidden}, 3);
        const DenseCell<float> cell(kind, inputs, weights, biases, initial);
        expect_nothing_more_allocated(cell, 4);
        SCOPED_TRACE("as any recurrence");
        expect_nothing_more_allocated<Recurrence<float>>(cell, 2);
    }
}

/// None where it is enqueued into the caller's, and then nothing waits.
TEST(AdjointLaunches, WhatIsEnqueuedAllocatesNothingAndIsNotWaitedFor) {
    const index layers = 200, width = 6;
    const Buffer<float> weights = Buffer<float>::random({layers, width, width}, 1, Layout::steps_first, Device::cuda()),
                        biases = Buffer<float>::random({layers, 1, width}, 2, Layout::steps_first, Device::cuda()),
                        initial = Buffer<float>::random({1, 2, width}, 3, Layout::steps_first, Device::cuda());
    const DenseChain<float> chain(weights, biases, initial, {});
    const Buffer<float> trajectory = Buffer<float>::random(chain.shape(), 4, Layout::steps_first, Device::cuda()),
                        gradient = Buffer<float>::random(chain.shape(), 5, Layout::steps_first, Device::cuda()),
                        states(chain.shape(), Layout::steps_first, Device::cuda()),
                        initial_gradient(initial.shape(), Layout::steps_first, Device::cuda());
    for (const index window : {0, 70})
        for (const Reduction reduction : {Reduction::automatic, Reduction::scan, Reduction::pcr}) {
            Workspace workspace(Device::cuda());
            const Options options{.reduction = reduction,
                                  .window = window,
                                  .execution = {.backend = Backend::cuda},
                                  .workspace = &workspace};
            const auto backward = [&] {
                enqueue_adjoint(chain, trajectory, gradient, states.view(), initial_gradient.view(), options);
            };
            backward();
            const Asked again = asked_by(backward, states);
            EXPECT_EQ(again.allocations, 0) << window << ", " << int(reduction);
            EXPECT_EQ(again.waits, 0) << window << ", " << int(reduction);
        }
}

/// Systems of every kind of kernel, in both directions; captured too.
TEST(SolveLaunches, LaterCallsAllocateNothingAndAreNotWaitedFor) {
    const Stream stream;
    for (const index block : {1, 2, 3, 4, 6, 16, 40})
        for (const Reduction method : {Reduction::automatic, Reduction::scan, Reduction::sequential, Reduction::pcr})
            for (const bool transposed : {false, true}) {
                SCOPED_TRACE("blocks of " + std::to_string(block) + ", method " + std::to_string(int(method)));
                const Shape shape{50, 2, block};
                Buffer<float> factors = Buffer<float>::random({shape.steps, shape.batch, block * block}, 1);
                for (index i = 0; i < factors.size(); ++i) factors.data()[i] *= 0.5F / float(block);
                const Buffer<float> there = factors.on(Device::cuda()),
                                    right_side = Buffer<float>::random(shape, 2, Layout::steps_first, Device::cuda()),
                                    solution(shape, Layout::steps_first, Device::cuda());
                Workspace workspace(Device::cuda());
                const auto call = [&] {
                    const BidiagonalSystem<float> system{Jacobian<const float>(there.data(), shape, block), right_side};
                    const SolveOptions options{
                        .method = method, .execution = stream.execution(), .workspace = &workspace};
                    if (transposed)
                        solve_transposed<float>(system, solution.view(), options);
                    else
                        solve<float>(system, solution.view(), options);
                };
                call();
                const Asked again = asked_by(call, solution);
                EXPECT_EQ(again.allocations, 0);
                EXPECT_EQ(again.waits, 0);
                stream.wait();
                const Buffer<float> expected = solution.on(Device::host());
                const Captured graph(stream, call);
                detail::fill_zeros(solution.data(), solution.size() * index(sizeof(float)), Device::cuda());
                graph.launch();
                stream.wait();
                EXPECT_TRUE(same_bits<float>(solution.on(Device::host()), expected));
            }
}

/// tanh layers of one sequence, small enough for Newton's method to take a few passes.
class Layers {
    static Buffer<float> random(const Shape& shape, unsigned seed) {
        auto numbers = Buffer<float>::random(shape, seed);
        for (index i = 0; i < numbers.size(); ++i) numbers.data()[i] *= 0.5F / std::sqrt(float(shape.width));
        return numbers.on(Device::cuda());
    }
    Buffer<float> weights_, biases_, initial_;

public:
    DenseChain<float> chain;
    Layers(index steps, index width)
        : weights_(random({steps, width, width}, 1)),
          biases_(random({steps, 1, width}, 2)),
          initial_(random({1, 1, width}, 3)),
          chain(weights_, biases_, initial_, {.activation = Activation::tanh}) {}
};

/// The chunks of 600 steps have ends enough for chunks of their own, which take no launch more.
TEST(NewtonLaunches, FiveKernelsPerPass) {
    const Layers layers(600, 16);
    const Buffer<float> trajectory(layers.chain.shape(), Layout::steps_first, Device::cuda());
    const auto launches = [&](index passes) {
        EnqueuedEvaluation<float> evaluation(
            layers.chain, trajectory.view(),
            {.reduction = Reduction::scan, .max_iterations = passes, .execution = {.backend = Backend::cuda}});
        return asked_by([&] { evaluation.enqueue(); }, trajectory).launches;
    };
    EXPECT_EQ(launches(3) - launches(2), 5);  // f and J, test, chunks, states, settle
}

/// A pass of many bytes: its solve waits for the test, and is left out where nothing is left.
TEST(NewtonLaunches, NoSolveAfterTheLastTestOfALongPass) {
    const Layers layers(1400, 32);
    const Buffer<float> trajectory(layers.chain.shape(), Layout::steps_first, Device::cuda()),
        expected(layers.chain.shape(), Layout::steps_first, Device::cuda());
    const int before = emulation::machine().multiprocessors;
    Report report;
    const auto launches = [&](index passes) {
        return asked_by(
                   [&] {
                       report = evaluate(layers.chain, trajectory.view(),
                                         {.method = Method::newton,
                                          .reduction = Reduction::sequential,
                                          .max_iterations = passes,
                                          .on_failure = OnFailure::report,
                                          .estimates = Estimates::none,
                                          .execution = {.backend = Backend::cuda}});
                   },
                   trajectory)
            .launches;
    };
    emulation::machine().multiprocessors = 1;  // for which few bytes are many
    const long all = launches(0);
    const index passes = report.iterations;
    EXPECT_EQ(report.status, Status::converged) << report;
    evaluate(layers.chain, expected.view(), {.method = Method::sequential, .execution = {.backend = Backend::cuda}});
    const Buffer<float> here = trajectory.on(Device::host()), expected_here = expected.on(Device::host());
    for (index i = 0; i < here.size(); ++i) ASSERT_NEAR(here.data()[i], expected_here.data()[i], 1e-4F) << i;
    // f and J, test, tracks (the test is of many blocks for one multiprocessor), settle.
    EXPECT_EQ(all - launches(passes - 1), 4);
    EXPECT_EQ(report.status, Status::max_iterations) << report;
    emulation::machine().multiprocessors = before;
}

TEST(OverlapLaunches, SixKernels) {
    const Layers layers(600, 16);
    const Buffer<float> trajectory(layers.chain.shape(), Layout::steps_first, Device::cuda());
    Report report;
    const Asked asked = asked_by(
        [&] {
            report = evaluate(layers.chain, trajectory.view(),
                              {.method = Method::overlap, .execution = {.backend = Backend::cuda}});
        },
        trajectory);
    // The initial state, starts and sweep, starts and repairs, what is not finite.
    EXPECT_EQ(asked.launches, 6) << report;
}

}  // namespace
}  // namespace deeppcr
