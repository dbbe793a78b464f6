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
    // The sweep, find_non_finite; with three repairs, finish and collect; tiles and find_non_finite.
    const std::pair<Options, long> cases[] = {{{.method = Method::sequential}, 2},
                                              {{.method = Method::overlap, .chunk = 40}, 7},
                                              {{.method = Method::shooting}, 2}};
    for (const auto& [asked_for, launches] : cases) {
        Options options = asked_for;
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
        EXPECT_EQ(again.launches, launches) << report;
        EXPECT_EQ(asked_by(backward, input_gradient).allocations, 0) << report;
    }
}

}  // namespace
}  // namespace deeppcr
