// What cells ask of an emulated GPU: how many kernels, and no memory once a workspace has grown.
#include <gtest/gtest.h>

#include <cuda_runtime.h>

#include <deeppcr/deeppcr.hpp>

namespace deeppcr {
namespace {

struct Asked {
    long launches, allocations;
};
/// Of what `call` enqueues, all of it done.
template <class Call>
Asked asked_by(const Call& call, const Buffer<float>& result) {
    const Asked before{emulation::machine().launches, emulation::machine().allocations};
    call();
    const Buffer<float> here({result.shape()});
    detail::copy(here.data(), result.data(), result.size() * index(sizeof(float)));
    return {emulation::machine().launches - before.launches, emulation::machine().allocations - before.allocations};
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

}  // namespace
}  // namespace deeppcr
