// Newton's method for recurrences of a user's own on a GPU, or on an emulated one: the contract of evaluate_test.cpp,
// against the cpu backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <sstream>
#include <thread>

#include <deeppcr/deeppcr.hpp>
#include <deeppcr/launch.cuh>

#include "tests/compare.hpp"
#include "tests/gpu.hpp"
#include "tests/messages.hpp"
#include "tests/streams.cuh"

namespace deeppcr {
namespace {

// --- recurrences: a Step is a functor of one state, on the processor as in a kernel

/// f and J (row-major, K x K), or only f where `jacobian` is null, of step `step` of sequence `sequence`.
template <class T>
struct Place {
    index step, sequence;
    const T* before;
    T* after;
    T* jacobian;
};

/// The README's: x_t = sin(x_{t-1}) / 2 + cos(t), with another phase for each sequence and number.
struct Sines {
    static constexpr index block = 1;
    template <class T>
    static constexpr index width = 3;
    template <class T>
    __host__ __device__ void operator()(const Place<T>& at) const {
        for (int k = 0; k < 3; ++k) {
            at.after[k] = std::sin(at.before[k]) / 2 + std::cos(T(at.step + 1 + k) + T(at.sequence));
            if (at.jacobian != nullptr) at.jacobian[k] = std::cos(at.before[k]) / 2;
        }
    }
};

/// A damped pendulum by the symplectic Euler method: angle and speed, a block of 2.
struct Pendulum {
    static constexpr index block = 2;
    template <class T>
    static constexpr index width = 2;
    template <class T>
    __host__ __device__ void operator()(const Place<T>& at) const {
        const T h = T(0.05), damping = T(2), angle = at.before[0], speed = at.before[1];
        const T push = T(0.3) * T(at.sequence + 1) * std::cos(T(0.05) * T(at.step));
        const T new_speed = speed + h * (push - std::sin(angle) - damping * speed);
        at.after[0] = angle + h * new_speed;
        at.after[1] = new_speed;
        if (at.jacobian == nullptr) return;
        at.jacobian[2] = -h * std::cos(angle);
        at.jacobian[3] = 1 - h * damping;
        at.jacobian[0] = 1 + h * at.jacobian[2];
        at.jacobian[1] = h * at.jacobian[3];
    }
};

/// x_t = tanh(gain M x_{t-1} + u_t), dense; from `bad_step` on f of sequence `bad_sequence` is not finite; at
/// `singular_step` one of its derivatives is infinite.
struct Network {
    static constexpr index block = 5;
    template <class T>
    static constexpr index width = 5;
    double gain = 0.7;
    index bad_step = -1, bad_sequence = -1, singular_step = -1;
    template <class T>
    __host__ __device__ T weight(int row, int column) const {
        return T(gain) * std::cos(T(3 * row + 5 * column + 1)) / std::sqrt(T(5));
    }
    template <class T>
    __host__ __device__ void operator()(const Place<T>& at) const {
        for (int row = 0; row < 5; ++row) {
            T sum = std::sin(T(7 * at.step + 3 * row) + T(at.sequence));
            for (int k = 0; k < 5; ++k) sum += weight<T>(row, k) * at.before[k];
            const T value = std::tanh(sum);
            at.after[row] = value;
            if (at.jacobian != nullptr)
                for (int k = 0; k < 5; ++k) at.jacobian[5 * row + k] = (1 - value * value) * weight<T>(row, k);
        }
        if (bad_step >= 0 && at.step >= bad_step && at.sequence == bad_sequence)
            at.after[0] = std::numeric_limits<T>::quiet_NaN();
        if (at.step == singular_step && at.sequence == bad_sequence && at.jacobian != nullptr)
            at.jacobian[7] = std::numeric_limits<T>::infinity();
    }
};

/// The logistic map at r = 4, chaotic.
struct Logistic {
    static constexpr index block = 1;
    template <class T>
    static constexpr index width = 1;
    template <class T>
    __host__ __device__ void operator()(const Place<T>& at) const {
        *at.after = 4 * *at.before * (1 - *at.before);
        if (at.jacobian != nullptr) *at.jacobian = 4 * (1 - 2 * *at.before);
    }
};

template <class S, class T>
__global__ void run_steps(const S f, index first, index steps, index batch, index width, index block, const T* before,
                          T* after, T* jacobian) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= steps * batch) return;
    f(Place<T>{first + i / batch, i % batch, before + i * width, after + i * width,
               jacobian == nullptr ? nullptr : jacobian + i * width * block});
}
template <class T>
__global__ void begin_with(T value, index count, T* state) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) state[i] = value / T(i + 1);
}

/// What a user writes: the callbacks, on either.
template <class S, class T>
class User : public Recurrence<T> {
public:
    /// first: of all steps, where this is a part of them.
    User(index steps, index batch, S f = {}, index first = 0)
        : Recurrence<T>({steps, batch, S::template width<T>}, S::block), f_(f), first_(first) {}
    bool runs_on(Backend) const override { return true; }
    void initial(const Section& section, View<T> state) const override {
        const index count = section.batch() * state.width();
        if (section.execution.backend == Backend::cuda)
            return cuda::launch(cuda::one_each(count, section.execution.stream), begin_with<T>, T(0.3), count,
                                state.data());
        for (index i = 0; i < count; ++i)
            state.data()[i] =
                T(0.3) / T(section.sequences[std::size_t(i / state.width())] * state.width() + i % state.width() + 1);
    }
    void step(const Section& section, View<const T> before, View<T> after) const override {
        run_section(section, before, after, {});
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        run_section(section, before, after, jacobian);
    }

private:
    void run_section(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const {
        const index width = before.width(), block = this->block(), count = section.steps() * section.batch();
        if (section.execution.backend == Backend::cuda) {
            EXPECT_EQ(section.batch(), this->shape().batch);
            if (count > 0)
                cuda::launch(cuda::one_each(count, section.execution.stream), run_steps<S, T>, f_,
                             first_ + section.first, section.steps(), section.batch(), width, block, before.data(),
                             after.data(), jacobian.data());
            return;
        }
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j)
                f_(Place<T>{first_ + section.first + i, section.sequences[std::size_t(j)], before.at(i, j),
                            after.at(i, j), jacobian.data() == nullptr ? nullptr : jacobian.at(i, j)});
    }
    S f_;
    index first_;
};

template <class T>
Evaluation<T> evaluate_there(const Recurrence<T>& recurrence, Options options, const Buffer<T>* given = nullptr) {
    if (options.method == Method::automatic) options.method = Method::newton;
    options.execution.backend = Backend::cuda;
    const Buffer<T> there = given != nullptr ? given->on(Device::cuda())
                                             : Buffer<T>(recurrence.shape(), Layout::batch_first, Device::cuda());
    Report report = evaluate(recurrence, there.view(), options);
    return {there.on(Device::host()), std::move(report)};
}

template <class T>
constexpr double epsilon = std::numeric_limits<T>::epsilon();

template <class T>
class NewtonOnGpu : public OnGpuTest {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(NewtonOnGpu, Types);

/// Every surrogate, guess, and reduction, for sizes that are not powers of two and less than a block.
template <class S, class T>
void agree_with_sequential(index steps, index batch, double tolerance) {
    const User<S, T> recurrence(steps, batch);
    const auto expected = evaluate(recurrence, {.method = Method::sequential});
    for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::identity, Surrogate::zero})
        for (const Guess guess : {Guess::initial_state, Guess::first_step, Guess::given})
            for (const Reduction reduction : {Reduction::automatic, Reduction::pcr}) {
                const Buffer<T> start = Buffer<T>::random(recurrence.shape(), 5);
                const auto [trajectory, report] = evaluate_there<T>(
                    recurrence, {.surrogate = surrogate, .reduction = reduction, .guess = guess}, &start);
                SCOPED_TRACE(report.method + ", " + std::to_string(steps) + " steps");
                EXPECT_TRUE(report.ok()) << report;
                EXPECT_LE(report.relative_residual, 1);
                EXPECT_LE(report.iterations, steps + 1);
                EXPECT_LE(largest_difference<T>(trajectory, expected.trajectory), tolerance * epsilon<T>);
            }
}

TYPED_TEST(NewtonOnGpu, EverySurrogateGuessAndReductionAgreesWithSequential) {
    for (const index steps : {1, 2, 23}) {
        agree_with_sequential<Sines, TypeParam>(steps, 3, 1000);
        agree_with_sequential<Pendulum, TypeParam>(steps, 2, 20000);  // forgets slowly
        agree_with_sequential<Network, TypeParam>(steps, 2, 1000);
    }
}

TYPED_TEST(NewtonOnGpu, ReportsAsTheProcessorDoes) {
    const User<Network, TypeParam> recurrence(131, 3);
    const Options options{.method = Method::newton, .tolerance = 1e-3};
    const auto here = evaluate(recurrence, options);
    const auto there = evaluate_there<TypeParam>(recurrence, options);
    ASSERT_EQ(there.report.status, Status::converged);
    EXPECT_EQ(there.report.iterations, here.report.iterations);
    const double rounding = 0.01 * here.report.residual + 4 * epsilon<TypeParam>;
    EXPECT_NEAR(there.report.residual, here.report.residual, rounding);
    EXPECT_NEAR(there.report.error, here.report.error, 0.05 * here.report.error);
    EXPECT_NEAR(there.report.lyapunov, here.report.lyapunov, 0.1);
    ASSERT_EQ(there.report.sequences.size(), 3U);
    for (std::size_t j = 0; j < 3; ++j) {
        EXPECT_EQ(there.report.sequences[j].confirmed, 131);
        EXPECT_EQ(there.report.sequences[j].iterations, here.report.sequences[j].iterations);
        EXPECT_NEAR(there.report.sequences[j].residual, here.report.sequences[j].residual, rounding);
    }
}

TYPED_TEST(NewtonOnGpu, NoSteps) {
    const User<Sines, TypeParam> recurrence(0, 2);
    const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {});
    EXPECT_TRUE(report.ok());
    EXPECT_EQ(report.sequences.size(), 2U);
}

TYPED_TEST(NewtonOnGpu, SequentialEqualsAWindowOfOneStepBitForBit) {
    const User<Network, TypeParam> recurrence(40, 3, {.gain = 3});
    const auto expected = evaluate_there<TypeParam>(recurrence, {.method = Method::sequential});
    EXPECT_EQ(expected.report.status, Status::converged);
    EXPECT_EQ(expected.report.sequential_steps, 120);
    EXPECT_LE(largest_difference<TypeParam>(
                  expected.trajectory.view().steps(0, 5),
                  evaluate(recurrence, {.method = Method::sequential}).trajectory.view().steps(0, 5)),
              1000 * epsilon<TypeParam>);
    const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {.window = 1});
    EXPECT_EQ(report.status, Status::converged) << report;
    EXPECT_TRUE(same_bits<TypeParam>(trajectory, expected.trajectory));
    // Also where the guess itself would pass the residual test.
    Buffer<TypeParam> near(expected.trajectory.shape());
    for (index i = 0; i < near.size(); ++i)
        near.data()[i] = std::nextafter(expected.trajectory.data()[i], TypeParam(2));
    const auto guessed = evaluate_there<TypeParam>(recurrence, {.guess = Guess::given, .window = 1}, &near);
    EXPECT_EQ(guessed.report.status, Status::converged) << guessed.report;
    EXPECT_TRUE(same_bits<TypeParam>(guessed.trajectory, expected.trajectory));
}

TYPED_TEST(NewtonOnGpu, WindowsOfAnyLengthGiveTheSameResult) {
    const User<Network, TypeParam> recurrence(70, 3, {.gain = 0.9});
    const auto expected = evaluate(recurrence, {.method = Method::sequential});
    for (const index window : {1, 2, 7, 31, 69, 70, 1000}) {
        const Guess guess = window % 3 == 1 ? Guess::initial_state : window % 3 == 2 ? Guess::first_step : Guess::given;
        const Buffer<TypeParam> start = Buffer<TypeParam>::random(recurrence.shape(), 5);
        const auto [trajectory, report] =
            evaluate_there<TypeParam>(recurrence, {.guess = guess, .window = window}, &start);
        EXPECT_EQ(report.status, Status::converged) << window;
        EXPECT_LE(largest_difference<TypeParam>(trajectory, expected.trajectory), 1000 * epsilon<TypeParam>);
        EXPECT_EQ(report.window, std::min<index>(window, 70));
        EXPECT_LE(report.error, 1000 * epsilon<TypeParam>);
    }
}

TYPED_TEST(NewtonOnGpu, AfterKPassesTheFirstKStepsAreExact) {
    const User<Network, TypeParam> recurrence(40, 2, {.gain = 3});
    const auto expected = evaluate_there<TypeParam>(recurrence, {.method = Method::sequential});
    for (const Surrogate surrogate : {Surrogate::full, Surrogate::zero})
        for (const index passes : {1, 2, 5, 17}) {
            const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {.surrogate = surrogate,
                                                                                     .absolute_tolerance = 0,
                                                                                     .relative_tolerance = 0,
                                                                                     .max_iterations = passes,
                                                                                     .on_failure = OnFailure::report});
            EXPECT_EQ(report.iterations, passes);
            for (const Report::Sequence& sequence : report.sequences) EXPECT_GE(sequence.confirmed, passes - 1);
            EXPECT_TRUE(same_bits<TypeParam>(trajectory.view().steps(0, passes - 1),
                                             expected.trajectory.view().steps(0, passes - 1)));
        }
}

TYPED_TEST(NewtonOnGpu, WhatDoesNotConvergeIsFinishedSequentiallyFromEachPrefix) {
    const User<Network, TypeParam> recurrence(70, 4, {.gain = 6});
    const auto expected = evaluate_there<TypeParam>(recurrence, {.method = Method::sequential});
    Options options{.absolute_tolerance = 0, .relative_tolerance = 0, .max_iterations = 20};
    const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, options);
    EXPECT_EQ(report.status, Status::finished_sequentially);
    EXPECT_TRUE(same_bits<TypeParam>(trajectory, expected.trajectory));
    EXPECT_LE(report.sequential_steps, 4 * (70 - 19));
    EXPECT_GT(report.sequential_steps, 0);
    EXPECT_TRUE(std::isnan(report.error));

    options.on_failure = OnFailure::report;
    const auto reported = evaluate_there<TypeParam>(recurrence, options);
    EXPECT_EQ(reported.report.status, Status::max_iterations);
    EXPECT_LT(reported.report.sequences[0].confirmed, 70);
    options.on_failure = OnFailure::raise;
    EXPECT_THROW(evaluate_there<TypeParam>(recurrence, options), NotConverged);
    Options stopping;
    stopping.method = Method::newton;
    stopping.progress = [](index, index, index iterations) { return iterations < 2; };
    EXPECT_EQ(evaluate_there<TypeParam>(recurrence, stopping).report.status, Status::max_iterations);
}

TYPED_TEST(NewtonOnGpu, ChaosEndsInTheLadder) {
    const User<Logistic, TypeParam> recurrence(300, 2);
    const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {});
    EXPECT_TRUE(report.ok()) << report;
    EXPECT_LT(report.iterations, 250);
    EXPECT_GT(report.window_shrinks + report.sequential_steps, 0);
    Buffer<TypeParam> after(recurrence.shape());
    Buffer<TypeParam> before(recurrence.shape());
    const std::vector<index> sequences = all(2);
    recurrence.initial({0, 0, sequences}, before.view().steps(0, 1));
    for (index t = 1; t < 300; ++t)
        for (index j = 0; j < 2; ++j) before(t, j, 0) = trajectory(t - 1, j, 0);
    recurrence.step({0, 300, sequences}, before.view(), after.view());
    EXPECT_LE(largest_difference<TypeParam>(trajectory, after), 200 * epsilon<TypeParam>);
}

TYPED_TEST(NewtonOnGpu, NaNOfOneSequenceIsReportedAndLeavesTheOthersRight) {
    for (const index window : {0, 16}) {
        const User<Network, TypeParam> recurrence(60, 3, {.gain = 0.8, .bad_step = 37, .bad_sequence = 1});
        const auto expected = evaluate_there<TypeParam>(recurrence, {.method = Method::sequential});
        EXPECT_EQ(expected.report.status, Status::non_finite);
        EXPECT_EQ(expected.report.sequences[1].confirmed, 37);
        const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {.window = window});
        EXPECT_EQ(report.status, Status::non_finite);
        for (const std::size_t j : {0U, 2U}) {
            EXPECT_EQ(report.sequences[j].status, Status::converged);
            EXPECT_LE(largest_difference<TypeParam>(trajectory.view().sequences(index(j), index(j) + 1),
                                                    expected.trajectory.view().sequences(index(j), index(j) + 1)),
                      1000 * epsilon<TypeParam>);
        }
        EXPECT_EQ(report.sequences[1].status, Status::non_finite);
        EXPECT_EQ(report.sequences[1].confirmed, 37);
        EXPECT_LE(
            largest_difference<TypeParam>(trajectory.view().steps(0, 37), expected.trajectory.view().steps(0, 37)),
            1000 * epsilon<TypeParam>);
        for (index t = 37; t < 60; ++t) EXPECT_TRUE(std::isnan(trajectory(t, 1, 0)));
    }
}

TYPED_TEST(NewtonOnGpu, AnInfiniteJacobianOfAConfirmedStepPassesNothingOn) {
    const User<Network, TypeParam> recurrence(90, 3, {.bad_sequence = 1, .singular_step = 4});
    const auto expected = evaluate(recurrence, {.method = Method::sequential});
    for (const Reduction reduction : {Reduction::sequential, Reduction::scan, Reduction::pcr}) {
        const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {.reduction = reduction});
        EXPECT_EQ(report.status, Status::converged) << report;
        EXPECT_LE(report.iterations, 25);
        EXPECT_LE(largest_difference<TypeParam>(trajectory, expected.trajectory), 1000 * epsilon<TypeParam>);
        EXPECT_LE(report.sequences[0].error, 1000 * epsilon<TypeParam>);
        EXPECT_EQ(report.sequences[1].error, std::numeric_limits<double>::infinity());
    }
}

TYPED_TEST(NewtonOnGpu, ABufferOfItsOwnLiesWhereTheCallRuns) {
    const User<Network, TypeParam> recurrence(20, 2);
    const auto found = evaluate(recurrence, {.method = Method::newton, .execution = gpu});
    EXPECT_EQ(found.trajectory.device(), Device::cuda());
    EXPECT_TRUE(same_bits<TypeParam>(found.trajectory.on({}), evaluate_there<TypeParam>(recurrence, {}).trajectory));
}

TYPED_TEST(NewtonOnGpu, AnyGuessEndsInTheSameTrajectory) {
    const User<Network, TypeParam> recurrence(80, 2);
    const auto expected = evaluate(recurrence, {.method = Method::sequential});
    Buffer<TypeParam> guess = Buffer<TypeParam>::random(recurrence.shape(), 5);
    guess(40, 1, 2) = std::numeric_limits<TypeParam>::quiet_NaN();
    guess(60, 0, 0) = std::numeric_limits<TypeParam>::infinity();
    const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {.guess = Guess::given}, &guess);
    EXPECT_TRUE(report.ok());
    EXPECT_GE(report.non_finite_resets, 2);
    EXPECT_LE(largest_difference<TypeParam>(trajectory, expected.trajectory), 1000 * epsilon<TypeParam>);
    const auto again = evaluate_there<TypeParam>(recurrence, {.guess = Guess::given}, &trajectory);
    EXPECT_EQ(again.report.iterations, 1);
    EXPECT_TRUE(same_bits<TypeParam>(again.trajectory, trajectory));
}

TYPED_TEST(NewtonOnGpu, SequencesConvergeAtDifferentPasses) {
    // A guess that is right for one sequence, for half of another, and for none of the third.
    const User<Network, TypeParam> recurrence(90, 3);
    const auto expected = evaluate_there<TypeParam>(recurrence, {});
    Buffer<TypeParam> guess = expected.trajectory.clone();
    for (index t = 0; t < 90; ++t)
        for (index k = 0; k < 5; ++k) {
            if (t > 45) guess(t, 1, k) = 0;
            guess(t, 2, k) = TypeParam(0.5);
        }
    const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {.guess = Guess::given}, &guess);
    EXPECT_EQ(report.sequences[0].iterations, 1);
    EXPECT_GT(report.sequences[1].iterations, 1);
    EXPECT_GE(report.sequences[2].iterations, report.sequences[1].iterations);
    EXPECT_TRUE(same_bits<TypeParam>(trajectory.view().sequences(0, 1), expected.trajectory.view().sequences(0, 1)));
    EXPECT_LE(largest_difference<TypeParam>(trajectory, expected.trajectory), 1000 * epsilon<TypeParam>);
}

TYPED_TEST(NewtonOnGpu, MoreSequencesThanOneBlockGetsThrough) {
    const User<Network, TypeParam> recurrence(4, 2700);
    const auto here = evaluate(recurrence, {.method = Method::newton});
    const auto [trajectory, report] = evaluate_there<TypeParam>(recurrence, {.method = Method::newton});
    EXPECT_TRUE(report.ok()) << report;
    EXPECT_EQ(report.iterations, here.report.iterations);
    EXPECT_LE(largest_difference<TypeParam>(trajectory, here.trajectory), 1000 * epsilon<TypeParam>);
}

TYPED_TEST(NewtonOnGpu, TheSameBitsEveryTimeAndInAStreamOfOnesOwn) {
    const User<Pendulum, TypeParam> recurrence(150, 2);
    const auto expected = evaluate_there<TypeParam>(recurrence, {});
    const Stream stream;
    Workspace workspace(Device::cuda());
    for (int times = 0; times < 2; ++times) {
        const auto found =
            evaluate_there<TypeParam>(recurrence, {.execution = stream.execution(), .workspace = &workspace});
        EXPECT_TRUE(same_bits<TypeParam>(found.trajectory, expected.trajectory));
        EXPECT_EQ(found.report.error, expected.report.error);
        EXPECT_EQ(workspace.used_bytes(), 0);
    }
}

/// Whose callbacks sleep, in main memory, so that one method is slower than the other by far. Each tag learns by
/// itself.
template <int tag, class T>
class Sleepy : public User<Network, T> {
public:
    Sleepy(index steps, std::chrono::milliseconds run_step, std::chrono::milliseconds linearised_step)
        : User<Network, T>(steps, 2), run_step_(run_step), linearised_step_(linearised_step) {}
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        std::this_thread::sleep_for(section.steps() * linearised_step_);
        User<Network, T>::linearise(section, before, after, jacobian);
    }
    void run(const Section& section, View<const T> state, View<T> trajectory) const override {
        std::this_thread::sleep_for(section.steps() * run_step_);
        User<Network, T>::run(section, state, trajectory);
    }

private:
    std::chrono::milliseconds run_step_, linearised_step_;
};

template <class T>
void expect_choice(const Recurrence<T>& recurrence, const std::string& method) {
    const Buffer<T> expected =
        evaluate(User<Network, T>(recurrence.shape().steps, 2), {.method = Method::sequential}).trajectory;
    for (int call = 0; call < 4; ++call) {
        const auto [trajectory, report] = evaluate(recurrence, {.execution = gpu});
        EXPECT_TRUE(report.ok()) << report;
        EXPECT_TRUE(report.method.starts_with(method)) << call << ": " << report.method;
        EXPECT_EQ(report.candidates.size(), 2U) << "no overlap, as there is no run_chunks";
        EXPECT_LE(largest_difference<T>(trajectory.on({}), expected), 1000 * epsilon<T>);
    }
}

TYPED_TEST(NewtonOnGpu, AutomaticTakesWhatIsFasterByFar) {
    using std::chrono::milliseconds;
    expect_choice<TypeParam>(Sleepy<0, TypeParam>(64, milliseconds(50), milliseconds(0)), "newton");
    expect_choice<TypeParam>(Sleepy<1, TypeParam>(64, milliseconds(0), milliseconds(50)), "sequential");
}

TYPED_TEST(NewtonOnGpu, APassThatIsCapturedIntoAGraphGivesTheSameBits) {
    const User<Network, TypeParam> recurrence(40, 3);
    const auto expected = evaluate_there<TypeParam>(recurrence, {});
    const Stream stream;
    const Options options{.max_iterations = 9, .execution = stream.execution()};
    const Buffer<TypeParam> there(recurrence.shape(), Layout::steps_first, Device::cuda());
    EnqueuedEvaluation<TypeParam> evaluation(recurrence, there.view(), options);
    const Captured graph(stream, [&] { evaluation.enqueue(); });
    for (int times = 0; times < 2; ++times) {
        detail::fill_zeros(there.data(), there.size() * index(sizeof(TypeParam)), Device::cuda());
        graph.launch();
        const Report report = evaluation.finish();
        EXPECT_EQ(report.status, Status::converged) << report;
        EXPECT_EQ(report.iterations, expected.report.iterations);
        EXPECT_EQ(report.error, expected.report.error);
        EXPECT_TRUE(same_bits<TypeParam>(there.on(Device::host()), expected.trajectory));
    }
}

TYPED_TEST(NewtonOnGpu, WhatIsEnqueuedIsFinishedSequentiallyOrReported) {
    const User<Network, TypeParam> recurrence(90, 2, {.gain = 6});
    const auto expected = evaluate_there<TypeParam>(recurrence, {.method = Method::sequential});
    const Buffer<TypeParam> there(recurrence.shape(), Layout::steps_first, Device::cuda());
    Options options{.absolute_tolerance = 0, .relative_tolerance = 0, .max_iterations = 4, .execution = gpu};
    EnqueuedEvaluation<TypeParam> finished(recurrence, there.view(), options);
    finished.enqueue();
    EXPECT_EQ(finished.finish().status, Status::finished_sequentially);
    EXPECT_TRUE(same_bits<TypeParam>(there.on(Device::host()), expected.trajectory));
    options.on_failure = OnFailure::report;
    EnqueuedEvaluation<TypeParam> reported(recurrence, there.view(), options);
    EXPECT_EQ(reported.finish().status, Status::max_iterations);
    options.on_failure = OnFailure::raise;
    EnqueuedEvaluation<TypeParam> raising(recurrence, there.view(), options);
    EXPECT_THROW(raising.finish(), NotConverged);
    options.max_iterations = 0;
    EXPECT_THROW(EnqueuedEvaluation<TypeParam>(recurrence, there.view(), options), InvalidArgument);
    options = {.window = 30, .max_iterations = 3, .execution = gpu};
    EXPECT_THROW(EnqueuedEvaluation<TypeParam>(recurrence, there.view(), options), InvalidArgument);
    for (const Method method : {Method::sequential, Method::overlap, Method::shooting})
        EXPECT_EQ(message_of([&] {
                      EnqueuedEvaluation<TypeParam>(recurrence, there.view(),
                                                    {.method = method, .max_iterations = 3, .execution = gpu});
                  }),
                  "options.method: expected automatic or newton, got " + to_string(method));
}

template <class S, class T>
void adjoints_agree(index steps, index batch) {
    const User<S, T> recurrence(steps, batch);
    const auto here = evaluate(recurrence, {.method = Method::sequential});
    const Buffer<T> gradient = Buffer<T>::random(recurrence.shape(), 3, Layout::batch_first);
    const auto expected = adjoint<T>(recurrence, here.trajectory, here.report, gradient);
    const Buffer<T> trajectory = here.trajectory.on(Device::cuda()), there = gradient.on(Device::cuda());
    for (const index window : {0, 1, 16}) {
        const auto found = adjoint<T>(recurrence, trajectory, here.report, there, {.window = window, .execution = gpu});
        EXPECT_LE(largest_difference<T>(found.states.on(Device::host()), expected.states), 2000 * epsilon<T>);
        EXPECT_LE(largest_difference<T>(found.initial.on(Device::host()), expected.initial), 2000 * epsilon<T>);
    }
}

TYPED_TEST(NewtonOnGpu, AdjointsEqualTheProcessors) {
    adjoints_agree<Sines, TypeParam>(1, 1);
    adjoints_agree<Sines, TypeParam>(67, 2);
    adjoints_agree<Pendulum, TypeParam>(50, 3);
    adjoints_agree<Network, TypeParam>(45, 2);
}

/// Without a wait, also replayed with another gradient of the loss, in one window and in several.
TYPED_TEST(NewtonOnGpu, AnAdjointThatIsEnqueuedHasTheSameBits) {
    using T = TypeParam;
    const User<Network, T> recurrence(45, 2);
    const auto here = evaluate(recurrence, {.method = Method::sequential});
    const Buffer<T> trajectory = here.trajectory.on(Device::cuda()),
                    gradient(recurrence.shape(), Layout::batch_first, Device::cuda()),
                    states(recurrence.shape(), Layout::batch_first, Device::cuda()),
                    initial({1, 2, recurrence.shape().width}, Layout::steps_first, Device::cuda());
    const Stream stream;
    for (const index window : {0, 16}) {
        Workspace workspace(Device::cuda());
        const Options options{.window = window, .execution = stream.execution(), .workspace = &workspace};
        const auto enqueued = [&] {
            enqueue_adjoint(recurrence, trajectory, gradient, states.view(), initial.view(), options);
        };
        enqueued();
        const Captured graph(stream, enqueued);
        for (const unsigned seed : {3U, 4U}) {
            const Buffer<T> numbers = Buffer<T>::random(recurrence.shape(), seed, Layout::batch_first);
            detail::copy(gradient.data(), numbers.data(), numbers.size() * index(sizeof(T)));
            const auto expected =
                adjoint<T>(recurrence, trajectory, here.report, gradient, {.window = window, .execution = gpu});
            graph.launch();
            stream.wait();
            EXPECT_TRUE(same_bits<T>(states.on(Device::host()), expected.states.on(Device::host())));
            EXPECT_TRUE(same_bits<T>(initial.on(Device::host()), expected.initial.on(Device::host())));
        }
    }
    const auto refusal = [&](const Buffer<T>& to, const Execution& execution) {
        return message_of([&] {
            enqueue_adjoint(recurrence, trajectory, gradient, to.view(), initial.view(), {.execution = execution});
        });
    };
    EXPECT_EQ(refusal(states, {}), "options.execution.backend: expected cuda, got cpu");
    EXPECT_NE(refusal(here.trajectory, gpu).find("states: expected "), std::string::npos);
    EXPECT_NE(refusal(initial, gpu).find("states: expected "), std::string::npos);
    const std::string captured = message_of([&] {
        Captured(stream, [&] {
            enqueue_adjoint(recurrence, trajectory, gradient, states.view(), initial.view(),
                            {.execution = stream.execution()});
        });
    });
    EXPECT_NE(captured.find("options.workspace: expected one that an earlier call"), std::string::npos) << captured;
    const User<Network, T> nothing(0, 2);
    const Buffer<T> none(nothing.shape(), Layout::steps_first, Device::cuda());
    enqueue_adjoint(nothing, none, none, none.view(), initial.view(), {.execution = gpu});
    const Buffer<T> cleared = initial.on(Device::host());
    EXPECT_TRUE(std::all_of(cleared.data(), cleared.data() + cleared.size(), [](T x) { return x == 0; }));
}

/// The same on the processor, another one on the GPU.
class Different : public User<Network, double> {
public:
    Different() : User(6, 2), here_(6, 2), there_(6, 2, {.gain = 0.71}) {}
    void step(const Section& section, View<const double> before, View<double> after) const override {
        which(section).step(section, before, after);
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        which(section).linearise(section, before, after, jacobian);
    }

private:
    const User<Network, double>& which(const Section& section) const {
        return section.execution.backend == Backend::cuda ? there_ : here_;
    }
    User<Network, double> here_, there_;
};

using CheckRecurrenceOnGpu = OnGpuTest;
TEST_F(CheckRecurrenceOnGpu, ComparesTheBackends) {
    const CheckReport good = check_recurrence(User<Pendulum, double>(6, 3));
    EXPECT_TRUE(good.ok()) << good;
    EXPECT_EQ(good.entries_checked, 2 * 4 * 3 * 2 * 2) << "both backends";
    EXPECT_TRUE(check_recurrence(User<Sines, float>(6, 2)).ok());
    const CheckReport bad = check_recurrence(Different());
    ASSERT_FALSE(bad.ok());
    std::ostringstream text;
    text << bad;
    EXPECT_NE(text.str().find("a step on the processor against the GPU's"), std::string::npos) << text.str();
    const CheckReport backends = check_backends();
    EXPECT_TRUE(backends.ok()) << backends;
}

// --- across ranks, which are threads here and share a GPU: as ranks on processors do it

template <class T>
struct Parts {
    Buffer<T> trajectory;  // of all ranks, in main memory
    Report report;         // of the last one
};

/// By `ranks` ranks that share the steps of f, on GPUs or on processors.
template <class S, class T>
Parts<T> evaluate_across(int ranks, index steps, index batch, const S& f, const Options& options, bool on_gpus,
                         const Buffer<T>* given = nullptr) {
    Parts<T> result{Buffer<T>({steps, batch, S::template width<T>}), {}};
    Group::simulate(ranks, [&](Group& group) {
        const auto [first, last] = group.part(steps);
        const User<S, T> part(last - first, batch, f, first);
        Buffer<T> states(part.shape());
        if (given != nullptr) std::copy_n(given->view().at(first, 0), states.size(), states.data());
        Options mine = options;
        mine.group = &group;
        mine.execution.backend = on_gpus ? Backend::cuda : Backend::cpu;
        const auto there = on_gpus ? states.on(Device::cuda()) : std::move(states);
        Report report = evaluate(part, there.view(), mine);
        const auto found = there.on(Device::host());
        std::copy_n(found.data(), found.size(), result.trajectory.view().at(first, 0));
        if (group.rank() == group.size() - 1) result.report = std::move(report);
    });
    return result;
}

template <class S, class T>
void agree_with_processors(int ranks, index steps, index batch, double tolerance, const Options& options,
                           const S& f = {}) {
    SCOPED_TRACE(std::to_string(ranks) + " ranks, " + std::to_string(steps) + " steps");
    const auto start = Buffer<T>::random({steps, batch, S::template width<T>}, 5);
    const auto here = evaluate_across<S, T>(ranks, steps, batch, f, options, false, &start);
    const auto there = evaluate_across<S, T>(ranks, steps, batch, f, options, true, &start);
    EXPECT_EQ(there.report.status, here.report.status) << there.report << here.report;
    EXPECT_EQ(there.report.iterations, here.report.iterations);
    EXPECT_EQ(there.report.sequential_steps, here.report.sequential_steps);
    EXPECT_EQ(there.report.method, here.report.method);
    EXPECT_NEAR(there.report.residual, here.report.residual, 0.01 * here.report.residual + 4 * epsilon<T>);
    EXPECT_EQ(std::isnan(there.report.error), std::isnan(here.report.error));
    if (!std::isnan(here.report.error)) {
        EXPECT_NEAR(there.report.error, here.report.error, 0.05 * here.report.error + 4 * epsilon<T>);
    }
    if (!std::isnan(here.report.lyapunov)) {
        EXPECT_NEAR(there.report.lyapunov, here.report.lyapunov, 0.1);
    }
    for (std::size_t j = 0; j < std::size_t(batch); ++j) {
        EXPECT_EQ(there.report.sequences[j].status, here.report.sequences[j].status);
        EXPECT_EQ(there.report.sequences[j].confirmed, here.report.sequences[j].confirmed);
        const index good = there.report.sequences[j].confirmed;
        EXPECT_LE(largest_difference<T>(
                      there.trajectory.view().steps(0, good).sequences(index(j), index(j) + 1),
                      View<const T>(here.trajectory.view().steps(0, good).sequences(index(j), index(j) + 1))),
                  tolerance * epsilon<T>);
    }
}

TYPED_TEST(NewtonOnGpu, RanksAgreeWithRanksOnProcessors) {
    for (const int ranks : {2, 3})
        for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::identity, Surrogate::zero})
            for (const Guess guess : {Guess::initial_state, Guess::first_step, Guess::given}) {
                const Options options{
                    .method = Method::newton, .surrogate = surrogate, .guess = guess, .tolerance = 1e-5};
                agree_with_processors<Sines, TypeParam>(ranks, 23, 3, 1e3, options);
                agree_with_processors<Network, TypeParam>(ranks, ranks, 2, 1e3, options);
                if (surrogate == Surrogate::full) {
                    agree_with_processors<Pendulum, TypeParam>(ranks, 23, 2, 2e4, options);
                    agree_with_processors<Network, TypeParam>(ranks, 41, 3, 1e4, options);
                }
            }
}

TYPED_TEST(NewtonOnGpu, RanksEndAsRanksOnProcessorsWhereFIsNotFinite) {
    for (const index bad : {0, 12, 13, 39})  // of 40 steps, on 3 ranks
        for (const Method method : {Method::newton, Method::sequential})
            agree_with_processors<Network, TypeParam>(3, 40, 3, 1e4, {.method = method, .tolerance = 1e-5},
                                                      {.bad_step = bad, .bad_sequence = 1});
}

TYPED_TEST(NewtonOnGpu, RanksFinishChaosSequentiallyWithTheBitsOfOneGpu) {
    const User<Logistic, TypeParam> whole(400, 2);
    const auto expected = evaluate_there<TypeParam>(whole, {.method = Method::sequential});
    for (const int ranks : {2, 3}) {
        const auto sequential =
            evaluate_across<Logistic, TypeParam>(ranks, 400, 2, {}, {.method = Method::sequential}, true);
        EXPECT_TRUE(sequential.report.ok());
        EXPECT_EQ(sequential.report.sequential_steps, 800);
        EXPECT_TRUE(same_bits<TypeParam>(sequential.trajectory, expected.trajectory));
        const auto found = evaluate_across<Logistic, TypeParam>(
            ranks, 400, 2, {}, {.method = Method::newton, .tolerance = 1e-9, .max_iterations = 5}, true);
        EXPECT_EQ(found.report.status, Status::finished_sequentially) << found.report;
        EXPECT_TRUE(same_bits<TypeParam>(
            found.trajectory,
            evaluate_across<Logistic, TypeParam>(
                ranks, 400, 2, {}, {.method = Method::newton, .tolerance = 1e-9, .max_iterations = 5}, true)
                .trajectory));
        const Buffer<TypeParam>& x = found.trajectory;
        for (index i = 1; i < 400; ++i)
            EXPECT_NEAR(x(i, 1, 0), 4 * x(i - 1, 1, 0) * (1 - x(i - 1, 1, 0)), 4 * epsilon<TypeParam>) << i;
        const auto stopped = evaluate_across<Logistic, TypeParam>(
            ranks, 400, 2, {}, {.method = Method::newton, .max_iterations = 5, .on_failure = OnFailure::report}, true);
        EXPECT_EQ(stopped.report.status, Status::max_iterations) << stopped.report;
    }
}

TYPED_TEST(NewtonOnGpu, TheAdjointAcrossRanksIsThatOfOneProcessor) {
    const index steps = 41, batch = 2;
    const User<Network, TypeParam> whole(steps, batch);
    const auto expected = evaluate(whole, {.method = Method::sequential});
    const auto output_gradient = Buffer<TypeParam>::random(whole.shape(), 5);
    const auto gradients = adjoint<TypeParam>(whole, expected.trajectory, expected.report, output_gradient);
    const auto trajectory = expected.trajectory.on(Device::cuda()), gradient = output_gradient.on(Device::cuda());
    for (const int ranks : {1, 2, 3})
        Group::simulate(ranks, [&](Group& group) {
            const auto [first, last] = group.part(steps);
            const User<Network, TypeParam> part(last - first, batch, {}, first);
            Workspace workspace(gpu);
            const auto found =
                adjoint<TypeParam>(part, View<const TypeParam>(trajectory.view().steps(first, last)), expected.report,
                                   View<const TypeParam>(gradient.view().steps(first, last)),
                                   {.execution = gpu, .workspace = &workspace, .group = &group});
            EXPECT_LE(largest_difference<TypeParam>(found.states.on(Device::host()),
                                                    gradients.states.view().steps(first, last)),
                      1e4 * epsilon<TypeParam>);
            if (group.rank() == 0) {
                EXPECT_TRUE(near(found.initial.on(Device::host()), gradients.initial, 1e4 * epsilon<TypeParam>));
            }
        });
}

using NewtonOnGpuArguments = OnGpuTest;
TEST_F(NewtonOnGpuArguments, SayWhatIsWrong) {
    const User<Sines, float> recurrence(10, 2);
    const Buffer<float> here(recurrence.shape()), there(recurrence.shape(), Layout::steps_first, Device::cuda());
    EXPECT_EQ(message_of([&] { evaluate(recurrence, here.view(), {.execution = gpu}); }),
              "trajectory: expected memory of a GPU, for Backend::cuda, got main memory");
    EXPECT_EQ(message_of([&] { evaluate(recurrence, there.view(), {.anderson = 2, .execution = gpu}); }),
              "options.anderson: expected 0, for Backend::cuda, got 2");
    Workspace workspace;
    EXPECT_EQ(message_of([&] { evaluate(recurrence, there.view(), {.execution = gpu, .workspace = &workspace}); }),
              "options.workspace: expected a workspace on the current GPU, got one elsewhere");
    const auto good = evaluate(recurrence, there.view(), {.execution = gpu});
    EXPECT_EQ(message_of([&] { adjoint<float>(recurrence, there, good, here, {.execution = gpu}); }),
              "output_gradient: expected memory of a GPU, for Backend::cuda, got main memory");
}

}  // namespace
}  // namespace deeppcr
