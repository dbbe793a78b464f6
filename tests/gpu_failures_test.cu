// What goes wrong around a GPU, and the order of streams: only on an emulated one, which can be told to fail.
#include <gtest/gtest.h>

#include <cmath>

#include <deeppcr/cell.cuh>
#include <deeppcr/deeppcr.hpp>
#include <deeppcr/launch.cuh>

#include "device/cuda.hpp"
#include "tests/compare.hpp"
#include "tests/gpu.hpp"
#include "tests/messages.hpp"
#include "tests/streams.cuh"

namespace deeppcr {
namespace {

/// The machine is whole again when a test ends.
class EmulatedGpu : public testing::Test {
protected:
    ~EmulatedGpu() override {
        emulation::Machine& machine = emulation::machine();
        machine.devices = 1;
        machine.compute_capability = 90;
        machine.broken = machine.launch_error = 0;
        machine.good_allocations = -1;
        machine.shared_bytes = std::size_t(227) << 10;
        machine.kept = 0;
        cudaSetDevice(0);
        cudaGetLastError();
    }
};

// --- recurrences and systems to fail with

template <class T>
__global__ void halve(index first, index count, index batch, const T* before, T* after, T* jacobian) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    after[i] = std::sin(before[i]) / 2 + T(first + i / batch + 1);
    if (jacobian != nullptr) jacobian[i] = std::cos(before[i]) / 2;
}

struct Halves : Recurrence<float> {
    Halves(index steps, index batch) : Recurrence({steps, batch, 1}) {}
    bool runs_on(Backend backend) const override { return backend == Backend::cuda; }
    void step(const Section& section, View<const float> before, View<float> after) const override {
        run(section, before, after, nullptr);
    }
    void linearise(const Section& section, View<const float> before, View<float> after,
                   Jacobian<float> jacobian) const override {
        run(section, before, after, jacobian.data());
    }
    using Recurrence::run;

private:
    static void run(const Section& section, View<const float> before, View<float> after, float* jacobian) {
        const index count = section.steps() * section.batch();
        cuda::launch(cuda::one_each(count, section.execution.stream), halve<float>, section.first, count,
                     section.batch(), before.data(), after.data(), jacobian);
    }
};

constexpr Device first_gpu = Device::cuda();

/// Lets every allocation of `call` fail in turn: each time it must say so, leave `untouched` as it was, and give back
/// all that it had taken.
template <class Call>
void fail_everywhere(const Buffer<float>& untouched, const Call& call) {
    const Buffer<float> before = untouched.on(Device::host());
    call();  // letters and pools are kept
    const Buffer<float> changed = untouched.on(Device::host());
    long failures = 0;
    for (;; ++failures) {
        detail::copy(untouched.data(), before.data(), before.size() * index(sizeof(float)));
        const std::size_t used = emulation::machine().used;
        emulation::machine().good_allocations = failures;
        try {
            call();
            break;
        } catch (const OutOfMemory& error) {
            EXPECT_NE(std::string(error.what()).find("bytes on GPU 0"), std::string::npos) << error.what();
        }
        cuda::check(cudaDeviceSynchronize(), "waiting");
        EXPECT_EQ(emulation::machine().used, used) << "allocation " << failures;
        EXPECT_TRUE(same_bits<float>(untouched.on(Device::host()), before)) << "allocation " << failures;
    }
    emulation::machine().good_allocations = -1;
    EXPECT_GT(failures, 0);
    EXPECT_TRUE(same_bits<float>(untouched.on(Device::host()), changed));
}

TEST_F(EmulatedGpu, EveryAllocationMayFailAndLeavesTheTrajectoryAsItWas) {
    const Halves recurrence(50, 3);
    const Buffer<float> trajectory = Buffer<float>::random(recurrence.shape(), 1, Layout::steps_first, Device::cuda());
    for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::zero})
        for (const Reduction reduction : {Reduction::automatic, Reduction::pcr})
            fail_everywhere(trajectory, [&] {
                evaluate(recurrence, trajectory.view(),
                         {.method = Method::newton, .surrogate = surrogate, .reduction = reduction, .execution = gpu});
            });
    fail_everywhere(trajectory,
                    [&] { evaluate(recurrence, trajectory.view(), {.method = Method::sequential, .execution = gpu}); });
    fail_everywhere(trajectory, [&] {
        EnqueuedEvaluation<float>(recurrence, trajectory.view(), {.max_iterations = 9, .execution = gpu}).finish();
    });
    const Report good = evaluate(recurrence, trajectory.view(), {.execution = gpu});
    const Buffer<float> gradient = Buffer<float>::random(recurrence.shape(), 1, Layout::steps_first, Device::cuda());
    fail_everywhere(gradient, [&] { adjoint<float>(recurrence, trajectory, good, gradient, {.execution = gpu}); });
}

/// Known to no other file: nobody has measured what they cost.
struct Averages {
    static constexpr int states = 1, inputs = 1, parameters = 1;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 1> p) {
        return {p[0] * x[0] + u[0]};
    }
};

struct OtherAverages : Averages {};

/// A cell's recurrence, and what its gradients need.
template <class C = Averages>
struct CellProblem {
    Buffer<float> inputs, parameters, gradient, trajectory, input_gradient, parameter_gradient, initial_gradient;
    CellRecurrence<C, float> recurrence;

    explicit CellProblem(const Shape& shape)
        : inputs(Buffer<float>::random(shape, 1, Layout::steps_first, Device::cuda())),
          parameters({1, 1, shape.width}, Layout::steps_first, Device::cuda()),
          gradient(Buffer<float>::random(shape, 2, Layout::steps_first, Device::cuda())),
          trajectory(Buffer<float>::random(shape, 3, Layout::steps_first, Device::cuda())),
          input_gradient(Buffer<float>::random(shape, 4, Layout::steps_first, Device::cuda())),
          parameter_gradient(parameters.shape(), Layout::steps_first, Device::cuda()),
          initial_gradient({1, shape.batch, shape.width}, Layout::steps_first, Device::cuda()),
          recurrence(registered(inputs), parameters) {}

    Report run(const Options& options) const { return evaluate(recurrence, trajectory.view(), options); }
    void run_backward(const Options& options) const {
        Report good;
        adjoint<float>(recurrence, trajectory, good, gradient, {input_gradient, parameter_gradient, initial_gradient},
                       options);
    }

private:
    static View<const float> registered(const Buffer<float>& all) {
        cell::register_on_gpu<C, float>();
        return all;
    }
};

TEST_F(EmulatedGpu, EveryAllocationOfACellMayFailAndLeavesTheTrajectoryAsItWas) {
    const CellProblem<> problem({200, 2, 20});
    for (const Options& options : {Options{.method = Method::sequential, .execution = gpu},
                                   Options{.method = Method::overlap, .chunk = 40, .execution = gpu},
                                   Options{.method = Method::shooting, .chunk = 40, .execution = gpu},
                                   Options{.method = Method::shooting, .execution = gpu}}) {
        fail_everywhere(problem.trajectory, [&] { problem.run(options); });
        if (options.chunk > 0) fail_everywhere(problem.input_gradient, [&] { problem.run_backward(options); });
    }
}

/// What is counted in 31 bits. All steps have the numbers of one, by strides of 0; what is written has addresses alone.
TEST_F(EmulatedGpu, WhatIsTooLongForAThreadOrALaunchIsRefusedBeforeMemoryIsAskedFor) {
    const auto memory = Buffer<float>::random({1, 1, 50}, 1, Layout::steps_first, first_gpu);
    float *const numbers = memory.data(), *const written = numbers + 25;
    cell::register_on_gpu<Averages, float>();
    const Shape shape{index(1) << 31, 1, 1}, row{1, 1, 1};
    const View<const float> same(numbers, shape, 0, 0);
    const CellRecurrence<Averages, float> recurrence(same, View<const float>(numbers, row));
    const View<float> there(written, shape);
    emulation::machine().good_allocations = 0;
    const long launches = emulation::machine().launches;
    const std::string too_long =
        "recurrence: expected fewer than 2^31 steps of a sequence, for Backend::cuda, got 2147483648";
    for (const Method method : {Method::automatic, Method::sequential, Method::overlap, Method::shooting}) {
        EXPECT_EQ(message_of([&] { evaluate(recurrence, there, {.method = method, .execution = gpu}); }), too_long);
        EXPECT_EQ(message_of([&] {
                      adjoint<float>(recurrence, there, Report(), same, {there, {written, row}, {written, row}},
                                     {.method = method, .execution = gpu});
                  }),
                  too_long);
    }
    constexpr index many = index(1) << 46;
    struct Case {
        Shape states;
        index block;
        Reduction method;
        std::string expected;
    };
    for (const Case& given :
         {Case{{many, 1, 1}, 1, Reduction::scan, "system: expected fewer than 2^31 tiles, "},
          Case{{1, many, 1}, 1, Reduction::scan, "system: expected fewer than 2^31 tiles, "},
          Case{{2, many, 1}, 1, Reduction::sequential, "shape: expected fewer than 2^31 blocks "},
          Case{{2, many, 5}, 5, Reduction::sequential, "system: expected fewer than 2^31 chunks "}}) {
        const auto& [states, block, method, expected] = given;
        const BidiagonalSystem<float> system{{numbers, states, block, 0, 0}, {numbers, states, 0, 0}, {}};
        const View<float> solution(written, states, states.width, states.width * states.steps);
        const SolveOptions options{.method = method, .execution = gpu};
        const std::string refusal = message_of([&] { solve(system, solution, options); });
        EXPECT_EQ(refusal.substr(0, expected.size()), expected) << refusal;
    }
    EXPECT_EQ(emulation::machine().launches, launches);
}

TEST_F(EmulatedGpu, CostsOfCellsAreMeasuredWithMemoryOfTheirOwnOrNotAtAll) {
    const CellProblem<> problem({300, 1, 4});
    const Options options{.method = Method::automatic, .execution = gpu};
    // Each allocation fails once. Without the first one for measuring, costs are assumed from then on.
    int survived = 0;
    for (long good = 0;; ++good) {
        emulation::machine().good_allocations = good;
        try {
            const Report report = problem.run(options);
            EXPECT_TRUE(report.ok()) << report;
            EXPECT_FALSE(report.candidates.empty());
            for (const auto& candidate : report.candidates) EXPECT_GT(candidate.seconds, 0);
            if (emulation::machine().good_allocations >= 0) break;
            ++survived;
        } catch (const OutOfMemory&) {
        }
    }
    EXPECT_EQ(survived, 1);
    emulation::machine().good_allocations = -1;
    const CellProblem<OtherAverages> other({300, 1, 4});
    index largest = 0;  // of what is asked of a caller's memory
    const MemorySource source(Device::cuda(), [&](index bytes) {
        largest = std::max(largest, bytes);
        return device::allocate_on_gpu(bytes, Device::cuda());
    });
    EXPECT_TRUE(other.run(options).ok());
    EXPECT_LE(largest, 1 << 16);  // a block of a workspace
}

TEST_F(EmulatedGpu, EveryAllocationMayFailAndLeavesAnInPlaceSystemAsItWas) {
    for (const index block : {1, 6})
        for (const Reduction method : {Reduction::scan, Reduction::pcr}) {
            const index steps = block == 1 ? 20'000 : 300;  // more than one tile of the scan: that needs no memory
            const Shape shape{steps, 1, 6};
            const Buffer<float> factors =
                                    Buffer<float>::random({steps, 6, block}, 1, Layout::steps_first, Device::cuda()),
                                states = Buffer<float>::random(shape, 2, Layout::steps_first, Device::cuda());
            fail_everywhere(states, [&] {
                solve(BidiagonalSystem<float>{Jacobian<float>(factors.data(), shape, block), states}, states,
                      {.method = method, .execution = gpu});
            });
        }
}

TEST_F(EmulatedGpu, AWorkspaceThatCannotGrowStaysUsable) {
    Workspace workspace(Device::cuda());
    {
        const Workspace::Scope scope(workspace);
        workspace.take<char>(1 << 20);
        emulation::machine().good_allocations = 0;
        EXPECT_THROW(workspace.take<char>(1 << 22), OutOfMemory);
        workspace.take<char>(1 << 22);
        emulation::machine().good_allocations = 0;
    }  // the one block that would take the place of both cannot be had
    const Workspace::Scope scope(workspace);
    EXPECT_NE(workspace.take<char>(1 << 22), nullptr);
}

TEST_F(EmulatedGpu, AScopeThatAnExceptionEndsAllocatesNothing) {
    Workspace workspace(Device::cuda());
    const long allocations = emulation::machine().allocations;
    try {
        const Workspace::Scope scope(workspace);
        workspace.take<char>(1 << 20);
        workspace.take<char>(1 << 22);
        throw Error("on its way");
    } catch (const Error&) {
        EXPECT_EQ(emulation::machine().allocations, allocations + 2);
    }
}

TEST_F(EmulatedGpu, TheSecondCallAllocatesNothing) {
    const Halves recurrence(50, 3);
    const Buffer<float> trajectory(recurrence.shape(), Layout::steps_first, Device::cuda());
    Workspace workspace(Device::cuda());
    const Options options{.method = Method::newton, .execution = gpu, .workspace = &workspace};
    evaluate(recurrence, trajectory.view(), options);
    evaluate(recurrence, trajectory.view(), options);  // many small blocks have become a large one
    const long allocations = emulation::machine().allocations;
    evaluate(recurrence, trajectory.view(), options);
    EXPECT_EQ(emulation::machine().allocations, allocations);
}

/// A system whose scan needs memory.
struct Scanned {
    explicit Scanned(index steps)
        : shape{steps, 1, 6},
          factors(Buffer<float>::random({steps, 1, 36}, 1, Layout::steps_first, Device::cuda())),
          right_side(Buffer<float>::random(shape, 2, Layout::steps_first, Device::cuda())),
          solution(shape, Layout::steps_first, Device::cuda()) {
        const Buffer<float> small = factors.on(Device::host());
        for (index i = 0; i < small.size(); ++i) small.data()[i] *= 0.2F;
        factors = small.on(Device::cuda());
    }
    void solve(const Execution& execution, Workspace* workspace = nullptr) const {
        deeppcr::solve<float>({Jacobian<const float>(factors.data(), shape, 6), right_side}, solution.view(),
                              {.method = Reduction::scan, .execution = execution, .chunk = 16, .workspace = workspace});
    }
    Shape shape;
    Buffer<float> factors, right_side, solution;
};

TEST_F(EmulatedGpu, AWorkspaceKeepsWhatAGraphUses) {
    const Scanned small(300), large(9000);
    const Stream stream;
    small.solve(gpu);
    const Buffer<float> expected = small.solution.on(Device::host());
    Workspace workspace(Device::cuda());
    small.solve(stream.execution(), &workspace);
    const void* memory = nullptr;
    const Captured graph(stream, [&] {
        small.solve(stream.execution(), &workspace);
        const Workspace::Use use(workspace, stream.execution());
        const Workspace::Scope scope(workspace);
        memory = workspace.take<char>(1);
    });
    for (const index growing : {1, 2, 3}) {
        const Workspace::Use use(workspace, stream.execution());
        const Workspace::Scope scope(workspace);
        for (index i = 0; i < 2 * growing; ++i) workspace.take<char>(growing << 20);
    }
    large.solve(stream.execution(), &workspace);
    EXPECT_TRUE(device::is_on_gpu(memory));
    detail::fill_zeros(small.solution.data(), small.solution.size() * 4, Device::cuda());
    graph.launch();
    stream.wait();
    EXPECT_TRUE(same_bits<float>(small.solution.on(Device::host()), expected));
    const long allocations = emulation::machine().allocations;
    large.solve(stream.execution(), &workspace);
    EXPECT_EQ(emulation::machine().allocations, allocations);
}

TEST_F(EmulatedGpu, AWorkspaceDoesNotGrowIntoAGraph) {
    const Scanned system(300);
    const Stream stream;
    Workspace workspace(Device::cuda());
    const std::string what =
        message_of([&] { Captured(stream, [&] { system.solve(stream.execution(), &workspace); }); });
    EXPECT_NE(what.find("options.workspace: expected one that an earlier call of the same sizes has grown"),
              std::string::npos)
        << what;
    system.solve(stream.execution(), &workspace);
    Captured(stream, [&] { system.solve(stream.execution(), &workspace); });
}

TEST_F(EmulatedGpu, AGraphThatLacksMemorySaysSo) {
    const CellProblem<> problem({200, 2, 20});
    const Stream stream;
    const auto status = detail::allocate(index(sizeof(index)), Device::cuda());
    const std::size_t used = emulation::machine().used;
    for (const long good : {0, 1}) {
        EXPECT_THROW(Captured(stream,
                              [&] {
                                  emulation::machine().good_allocations = good;
                                  enqueue(problem.recurrence, problem.trajectory.view(),
                                          static_cast<index*>(status.get()),
                                          {.method = Method::overlap, .chunk = 2, .execution = stream.execution()});
                              }),
                     OutOfMemory);
        EXPECT_EQ(emulation::machine().used, used);
    }
}

/// Of which nobody has asked anything before.
TEST_F(EmulatedGpu, PoolsAndLettersAreMadeDuringCaptures) {
    emulation::machine().devices = 3;
    cudaSetDevice(2);
    const Stream stream;
    const Captured graph(stream, [&] {
        device::allocate_in_stream(1, stream.stream);
        const device::Letter letter;
        EXPECT_GT(device::available_on_gpu(), 0);
    });
}

TEST_F(EmulatedGpu, AnEvaluationThatIsWaitedForIsNotCaptured) {
    const Halves recurrence(12, 3);
    const Stream stream;
    const Buffer<float> trajectory(recurrence.shape(), Layout::steps_first, Device::cuda());
    const auto refusal = [&](const auto& call) {
        const std::string what = message_of([&] { Captured(stream, call); });
        EXPECT_NE(what.find("options.execution.stream: expected one that is not captured"), std::string::npos) << what;
    };
    Options options{.execution = stream.execution()};
    for (const Method method : {Method::automatic, Method::newton, Method::overlap, Method::sequential}) {
        options.method = method;
        refusal([&] { evaluate(recurrence, trajectory.view(), options); });
    }
    options.method = Method::newton;
    const Report report = evaluate(recurrence, trajectory.view(), options);
    refusal([&] { adjoint<float>(recurrence, trajectory.view(), report, trajectory.view(), options); });
}

TEST_F(EmulatedGpu, CallsInDifferentStreamsTakeTurnsInAWorkspace) {
    const Scanned systems[] = {Scanned(300), Scanned(310)};
    Buffer<float> expected[2];
    for (int i : {0, 1}) {
        systems[i].solve(gpu);
        expected[i] = systems[i].solution.on(Device::host());
    }
    for (int tries = 0; tries < 20; ++tries) {
        const Stream streams[2];
        Workspace workspace(Device::cuda());
        for (int i : {0, 1, 0}) systems[i].solve(streams[i].execution(), &workspace);
        for (const Stream& stream : streams) stream.wait();
        for (int i : {0, 1}) EXPECT_TRUE(same_bits<float>(systems[i].solution.on(Device::host()), expected[i]));
        // A graph is captured in between, which waits for nobody.
        systems[0].solve(streams[0].execution(), &workspace);
        const Captured graph(streams[1], [&] { systems[1].solve(streams[1].execution(), &workspace); });
        systems[1].solve(streams[1].execution(), &workspace);
        for (const Stream& stream : streams) stream.wait();
        for (int i : {0, 1}) EXPECT_TRUE(same_bits<float>(systems[i].solution.on(Device::host()), expected[i]));
    }
    const Stream one, other;
    Workspace bound(one.execution());
    systems[0].solve(one.execution(), &bound);
    EXPECT_EQ(
        message_of([&] { systems[0].solve(other.execution(), &bound); }),
        "options.workspace: expected a workspace of the call's stream, or one made for a Device, got one made for "
        "another stream");
    one.wait();
}

TEST_F(EmulatedGpu, WhatIsEnqueuedAllocatesNothing) {
    const Stream stream;
    const auto check = [&](const auto& recurrence, Surrogate surrogate) {
        const Buffer<float> trajectory(recurrence.shape(), Layout::steps_first, Device::cuda());
        EnqueuedEvaluation<float> evaluation(
            recurrence, trajectory.view(),
            {.surrogate = surrogate, .max_iterations = 30, .execution = stream.execution()});
        EXPECT_EQ(evaluation.finish().status, Status::converged);
        const Buffer<float> expected = trajectory.on(Device::host());
        const long allocations = emulation::machine().allocations;
        evaluation.enqueue();
        EXPECT_EQ(emulation::machine().allocations, allocations);
        evaluation.finish();
        const Captured graph(stream, [&] { evaluation.enqueue(); });
        detail::fill_zeros(trajectory.data(), trajectory.size() * 4, Device::cuda());
        graph.launch();
        EXPECT_EQ(evaluation.finish().status, Status::converged);
        EXPECT_TRUE(same_bits<float>(trajectory.on(Device::host()), expected));
    };
    check(Halves(12, 3), Surrogate::diagonal);  // whose diagonal is the library's
    const Buffer<float> weights = Buffer<float>::random({24, 2, 2}, 1),
                        biases({24, 1, 2}, Layout::steps_first, first_gpu),
                        initial = Buffer<float>::random({1, 3, 2}, 2, Layout::steps_first, first_gpu);
    for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= 0.1F;
    const Buffer<float> there_weights = weights.on(first_gpu);
    check(DenseChain<float>(there_weights, biases, initial, {Activation::tanh, 2}), Surrogate::full);
}

TEST_F(EmulatedGpu, WhatAPoolKeepsUnusedIsAvailable) {
    const index available = device::available_on_gpu();
    emulation::machine().kept = std::size_t(1) << 28;
    EXPECT_EQ(device::available_on_gpu(), available);
}

TEST_F(EmulatedGpu, WhereSharedMemoryIsShortABlockTakesFewerSequences) {
    constexpr index width = 200, batch = 13;
    const Buffer<double> weights = Buffer<double>::random({2, width, width}, 1, Layout::steps_first, first_gpu),
                         biases = Buffer<double>::random({2, 1, width}, 2, Layout::steps_first, first_gpu),
                         initial = Buffer<double>::random({1, batch, width}, 3, Layout::steps_first, first_gpu);
    const DenseChain<double> chain(weights, biases, initial, {Activation::tanh, 0});
    const std::vector<index> sequences = all(batch);
    const auto run = [&] {
        const Buffer<double> trajectory(chain.shape(), Layout::steps_first, first_gpu);
        chain.run({0, 2, sequences, gpu}, initial, trajectory.view());
        return trajectory.on(Device::host());
    };
    const Buffer<double> expected = run();
    emulation::machine().shared_bytes = 8 << 10;
    EXPECT_TRUE(same_bits<double>(run(), expected));
    emulation::machine().shared_bytes = 4 << 10;
    EXPECT_EQ(message_of(run),
              "weights: expected a width of at most 128, for the 4096 bytes of shared memory that a block has on this "
              "GPU, got 200");
}

// --- errors

TEST_F(EmulatedGpu, ABrokenContextIsNotTakenForMainMemory) {
    const Halves recurrence(10, 1);
    const Buffer<float> there(recurrence.shape(), Layout::steps_first, Device::cuda()), here(recurrence.shape());
    emulation::machine().broken = cudaErrorIllegalAddress;
    EXPECT_NE(message_of<Error>([&] { there.on(Device::host()); }).find("illegal memory access"), std::string::npos);
    EXPECT_NE(message_of<Error>([&] { device::require_on_gpu("x", there.data()); }).find("illegal memory access"),
              std::string::npos);
    EXPECT_NE(message_of<Error>([&] {
                  evaluate(recurrence, there.view(), {.execution = gpu});
              }).find("illegal memory access"),
              std::string::npos);
    EXPECT_TRUE(same_bits<float>(here.clone(), here)) << "main memory needs no GPU";
    emulation::machine().broken = 0;
}

TEST_F(EmulatedGpu, GPUsThatCannotRunTheKernelsAreRefused) {
    const Halves recurrence(10, 1);
    const Buffer<float> there(recurrence.shape(), Layout::steps_first, Device::cuda());
    const auto run = [&] { evaluate(recurrence, there.view(), {.execution = gpu}); };
    emulation::machine().compute_capability = 75;
    EXPECT_THROW(run(), NoDevice);
    EXPECT_EQ(message_of<NoDevice>(run),
              "there is no GPU to use: GPU 0 has compute capability 7.5, 8.0 or more is needed");
    EXPECT_FALSE(cuda_problem().empty());
    emulation::machine().compute_capability = 90;
    emulation::machine().launch_error = cudaErrorNoKernelImageForDevice;
    EXPECT_THROW(run(), NoDevice);
    emulation::machine().launch_error = 0;
    emulation::machine().devices = 0;
    EXPECT_THROW(run(), NoDevice);
    EXPECT_EQ(message_of<NoDevice>([] {
                  Buffer<float>({1, 1, 1}, Layout::steps_first, Device::cuda());
              }),
              "there is no GPU to use: no CUDA-capable device is detected");
}

TEST_F(EmulatedGpu, MemoryOfAnotherGPUIsRefused) {
    emulation::machine().devices = 2;
    const Halves recurrence(10, 1);
    const Buffer<float> other(recurrence.shape(), Layout::steps_first, Device::cuda(1));
    int current = -1;
    cudaGetDevice(&current);
    EXPECT_EQ(current, 0) << "the current GPU stays so";
    EXPECT_EQ(message_of([&] { evaluate(recurrence, other.view(), {.execution = gpu}); }),
              "trajectory: expected memory of the current GPU, 0, got memory of GPU 1");
}

/// Refuses memory of any GPU but the current one.
struct OnlyHere : Halves {
    using Halves::Halves;
    void step(const Section& section, View<const float> before, View<float> after) const override {
        device::require_on_gpu("before", before.data());
        device::require_on_gpu("after", after.data());
        Halves::step(section, before, after);
    }
};

TEST_F(EmulatedGpu, ARecurrenceIsCheckedOnTheCurrentGPU) {
    emulation::machine().devices = 2;
    cudaSetDevice(1);
    const CheckReport report = check_recurrence(OnlyHere(10, 2), 10);
    EXPECT_TRUE(report.ok()) << report;
    EXPECT_GT(report.entries_checked, 0);
}

TEST_F(EmulatedGpu, WithoutStepsGradientsAreZerosInTheStreamOfTheCall) {
    const CellProblem<> problem({0, 2, 4});
    for (int tries = 0; tries < 20; ++tries) {
        const Stream stream;
        device::fill_bytes(problem.parameter_gradient.data(), 1, 16, stream.stream);
        device::fill_bytes(problem.initial_gradient.data(), 1, 32, stream.stream);
        problem.run_backward({.execution = stream.execution()});
        stream.wait();
        for (const Buffer<float>* gradients : {&problem.parameter_gradient, &problem.initial_gradient}) {
            const Buffer<float> here = gradients->on(Device::host());
            for (index i = 0; i < here.size(); ++i) EXPECT_EQ(here.data()[i], 0);
        }
    }
}

TEST_F(EmulatedGpu, AskingHowManyBlocksFitTakesNoSharedMemoryAway) {
    const auto launch = [] {
        cuda::launch({1, 1, std::size_t(100) << 10, nullptr}, halve<float>, index(0), index(0), index(1),
                     static_cast<const float*>(nullptr), static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    };
    launch();
    EXPECT_GT(cuda::resident_blocks(halve<float>, 32, std::size_t(60) << 10), 0);
    EXPECT_EQ(message_of(launch), nothing_thrown);
}

// --- the emulation itself: what streams do not order shows

__global__ void add_one(const float* from, float* to) { *to = *from + 1; }

/// Whether the numbers that two streams of which the second needs the first's came to are right, for each of 20 tries.
int right_results(unsigned flags, bool with_event) {
    int right = 0;
    for (int tries = 0; tries < 20; ++tries) {
        cudaStream_t streams[2];
        cudaEvent_t event = nullptr;
        for (cudaStream_t& stream : streams) cudaStreamCreateWithFlags(&stream, flags);
        cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
        const Buffer<float> numbers({3, 1, 1}, Layout::steps_first, Device::cuda());
        float* const x = numbers.data();
        cuda::launch({1, 1, 0, streams[0]}, add_one, x, x + 1);
        cudaEventRecord(event, streams[0]);
        if (with_event) cudaStreamWaitEvent(streams[1], event, 0);
        cuda::launch({1, 1, 0, streams[1]}, add_one, x + 1, x + 2);
        for (const cudaStream_t stream : streams) cudaStreamSynchronize(stream);
        if (numbers.on(Device::host())(2, 0, 0) == 2) ++right;
        cudaEventDestroy(event);
        for (const cudaStream_t stream : streams) cudaStreamDestroy(stream);
    }
    return right;
}

TEST_F(EmulatedGpu, StreamsThatNothingOrdersTakeTurnsAtRandom) {
    EXPECT_EQ(right_results(cudaStreamNonBlocking, true), 20);
    const int right = right_results(cudaStreamNonBlocking, false);
    EXPECT_GT(right, 0);
    EXPECT_LT(right, 20);
}

TEST_F(EmulatedGpu, TheNullStreamWaitsForBlockingStreamsOnly) {
    for (const unsigned flags : {cudaStreamDefault, cudaStreamNonBlocking}) {
        cudaStream_t stream = nullptr;
        cudaStreamCreateWithFlags(&stream, flags);
        const Buffer<float> numbers({2, 1, 1}, Layout::steps_first, Device::cuda());
        cuda::launch({1, 1, 0, stream}, add_one, numbers.data(), numbers.data() + 1);
        int late = 0;
        for (int tries = 0; tries < 20; ++tries) {
            device::fill_bytes(numbers.data() + 1, 0, 4, stream);
            cuda::launch({1, 1, 0, stream}, add_one, numbers.data(), numbers.data() + 1);
            if (numbers.on(Device::host())(1, 0, 0) == 0) ++late;
        }
        EXPECT_EQ(late > 0, flags == cudaStreamNonBlocking);
        cudaStreamDestroy(stream);
    }
}

__global__ void copy_without_waiting(const float* from, float* to) {
    cuda::begin_copy<4>(cuda::shared_memory<float>(), from);
    *to = *cuda::shared_memory<float>();
    cuda::wait_for_copies();
    to[1] = *cuda::shared_memory<float>();
}

TEST_F(EmulatedGpu, ACopyToSharedMemoryIsThereOnlyWhenWaitedFor) {
    const Buffer<float> numbers({3, 1, 1}, Layout::steps_first, Device::cuda());
    int early = 0;
    for (int tries = 0; tries < 20; ++tries) {
        cuda::launch({1, 1, 4, nullptr}, copy_without_waiting, numbers.data(), numbers.data() + 1);
        const Buffer<float> here = numbers.on(Device::host());
        if (here(1, 0, 0) == 0) ++early;
        EXPECT_EQ(here(2, 0, 0), 0);
    }
    EXPECT_GT(early, 0);
    EXPECT_LT(early, 20);
}

}  // namespace
}  // namespace deeppcr
