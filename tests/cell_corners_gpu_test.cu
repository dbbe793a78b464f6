// Cells on a GPU, or on an emulated one, at their limits: what is not finite, what has no steps, repairs that meet,
// wrong arguments, and the accuracy of functions.
#include "tests/cells_on_gpu.hpp"
#include "tests/messages.hpp"
#include "tests/streams.cuh"

namespace deeppcr {
namespace {

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
    const TwoOfSquares overflows(300, 1.01F);
    const Report expected = evaluate(*overflows.here, {.method = Method::sequential}).report;
    ASSERT_EQ(expected.status, Status::non_finite);
    for (const Options& options : {Options{.method = Method::sequential, .execution = gpu},
                                   Options{.method = Method::overlap, .chunk = 25, .execution = gpu},
                                   Options{.method = Method::shooting, .chunk = 25, .execution = gpu}}) {
        const Report report = evaluate(*overflows.there, options).report;
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
    cell::register_on_gpu<LeakyTanh, double>();
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

// In 16 bits all of exp, sigmoid and tanh are as exact as their numbers: on a GPU by functions of their own.
template <class T>
void check_functions_of_16_bits(double unit, const Options& options) {
    cell::register_on_gpu<Functions, T>();
    const index steps = 64, channels = 512;
    const Buffer<T> inputs({steps, 1, channels});
    const Buffer<float> parameters({1, 1, channels});
    for (index i = 0; i < inputs.size(); ++i) {
        const double at = double(i) / double(inputs.size());
        inputs.data()[i] = T(float(i % 2 == 0 ? -12 + 22 * at : std::copysign(std::exp2(-12 + 14 * at), at - 0.5)));
    }
    for (const T limit : {T(HUGE_VALF), T(-HUGE_VALF), T(float(NAN))}) {
        inputs.data()[0] = limit;
        const Buffer<T> there_inputs = inputs.on(Device::cuda());
        const Buffer<float> there_parameters = parameters.on(Device::cuda());
        const Buffer<T> trajectory({steps, 1, channels * 3}, Layout::steps_first, Device::cuda());
        evaluate(CellRecurrence<Functions, T>(there_inputs, there_parameters), trajectory.view(), options);
        const Buffer<T> found = trajectory.on(Device::host());
        for (index i = 0; i < inputs.size(); ++i) {
            const double x = float(inputs.data()[i]);
            const double exact[3] = {std::exp(x), 1 / (1 + std::exp(-x)), std::tanh(x)};
            for (int k = 0; k < 3; ++k) {
                const double value = float(found.data()[3 * i + k]);
                if (std::isfinite(exact[k]))
                    ASSERT_LE(std::abs(value - exact[k]), unit * std::abs(exact[k]) + 0x1p-24) << x << " " << k;
                else
                    ASSERT_TRUE(std::isnan(exact[k]) ? std::isnan(value) : value == exact[k]) << x << " " << k;
            }
        }
    }
}
TEST_F(CellOnGpuCorners, FunctionsOf16BitsAreAsExactAsTheirNumbers) {
    const Options options{.method = Method::sequential, .execution = gpu};
    check_functions_of_16_bits<bfloat16>(0x1p-8 + 0x1p-10, options);
    check_functions_of_16_bits<float16>(0x1.01p-11, options);
}

TEST_F(CellOnGpuCorners, SayWhatIsWrong) {
    cell::register_on_gpu<LeakyTanh, float>();
    const Problem<LeakyTanh, float> problem({10, 1, 2}, 1);
    const Buffer<float> here({10, 1, 2}), there({10, 1, 2}, Layout::steps_first, Device::cuda());
    EXPECT_EQ(message_of([&] { evaluate(*problem.here, here.view(), {.execution = gpu}); }),
              "initial: expected memory of a GPU, for Backend::cuda, got main memory");
    EXPECT_EQ(message_of([&] { evaluate(*problem.there, here.view(), {.execution = gpu}); }),
              "trajectory: expected memory of a GPU, for Backend::cuda, got main memory");
    Workspace workspace;
    EXPECT_EQ(message_of([&] { evaluate(*problem.there, there.view(), {.execution = gpu, .workspace = &workspace}); }),
              "options.workspace: expected a workspace on the current GPU, got one elsewhere");
    EXPECT_EQ(message_of([&] { evaluate(*problem.there, there.view(), {.method = Method::newton, .execution = gpu}); }),
              "options.method: expected automatic, sequential, overlap or shooting, for a cell on a GPU, got newton");
    const std::string elsewhere = ": expected memory of a GPU, for Backend::cuda, got main memory";
    EXPECT_EQ(
        message_of([&] { evaluate_boundaries<float>(*problem.there, 5, here.view().steps(0, 2), {.execution = gpu}); }),
        "boundaries" + elsewhere);
    const auto backward = [&](View<const float> boundaries, View<const float> gradient) {
        adjoint_from_boundaries<float>(*problem.there, 5, boundaries, Report(), gradient, {.execution = gpu});
    };
    EXPECT_EQ(message_of([&] { backward(here.view().steps(0, 2), problem.there_gradient); }), "boundaries" + elsewhere);
    EXPECT_EQ(message_of([&] { backward(there.view().steps(0, 2), here); }), "output_gradient" + elsewhere);
    EXPECT_EQ(message_of([&] { problem.there->segment(5, 10, here.view().steps(0, 1), gpu); }), "before" + elsewhere);
    EXPECT_EQ(message_of([&] { problem.here->segment(5, 10, there.view().steps(0, 1), gpu); }), "initial" + elsewhere);
    EXPECT_EQ(message_of([&] { problem.there->final_states(here, gpu); }), "trajectory" + elsewhere);
    const CellRecurrence<Unregistered, float> unknown(problem.there_inputs, problem.there_parameters);
    EXPECT_NE(message_of([&] { evaluate(unknown, there.view(), {.execution = gpu}); }).find("DEEPPCR_CELL_ON_GPU"),
              std::string::npos);
    EXPECT_EQ(message_of([&] {
                  decode<LeakyTanh, float>(problem.there_inputs.view().steps(0, 1), problem.there_parameters, {}, {},
                                           gpu);
              }),
              "state: expected a contiguous array of shape [1,1,2], got [0,1,1]");
    const Stream stream;
    Captured(stream, [&] {
        EXPECT_EQ(
            message_of([&] { evaluate(*problem.there, there.view(), {.execution = stream.execution()}); }),
            "options.execution.stream: expected one that is not captured, as the host waits for the outcome, got one "
            "that is captured into a graph");
    });
    // Processors do not compute with numbers of 16 bits.
    const Buffer<bfloat16> few({10, 1, 2});
    const Buffer<float> parameters({2, 1, 2});
    const CellRecurrence<LeakyTanh, bfloat16> narrow(few, parameters);
    for (const Backend backend : {Backend::cpu, Backend::reference}) {
        const std::string name = backend == Backend::cpu ? "cpu" : "reference";
        const std::string expected =
            "options.execution.backend: expected cuda, for numbers stored in 16 bits, got " + name;
        const Options options{.execution = {.backend = backend}};
        EXPECT_EQ(message_of([&] { evaluate(narrow, few.view(), options); }), expected);
        EXPECT_EQ(message_of([&] { adjoint<bfloat16>(narrow, few, Report(), few, options); }), expected);
        EXPECT_EQ(message_of([&] { evaluate_boundaries<bfloat16>(narrow, 5, few.view(), options); }), expected);
    }
}

}  // namespace
}  // namespace deeppcr
