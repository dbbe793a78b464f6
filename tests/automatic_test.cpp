// Method::automatic of recurrences that are not a cell's: what it chooses, on recurrences whose callbacks sleep, so
// that one method is faster than the others by far, on any machine.

#include <gtest/gtest.h>
#include <deeppcr/deeppcr.hpp>

#include <chrono>
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "newton/experience.hpp"
#include "tests/compare.hpp"

namespace deeppcr {
namespace {

using Microseconds = std::chrono::microseconds;

/// How long the callbacks sleep.
struct Costs {
    Microseconds run_step{0}, linearised_step{0}, linearised_call{0};
};

struct Map {
    std::function<double(index t, double x)> value, slope;
};
const Map forgets{[](index t, double x) { return std::sin(x) / 2 + std::cos(double(t)); },
                  [](index, double x) { return std::cos(x) / 2; }};
const Map chaotic{[](index, double x) { return 4 * x * (1 - x); }, [](index, double x) { return 4 - 8 * x; }};
/// Forgets in the beginning, where it is looked at, and nothing later.
const Map deceptive{[](index t, double x) { return (t < 200 ? 0.5 : 1) * x + std::cos(double(t)); },
                    [](index t, double) { return t < 200 ? 0.5 : 1.0; }};

/// Each test has a tag, and thereby a type, of its own: what one learns is of no use to another.
template <int tag>
class Sleepy : public Recurrence<double> {
public:
    Sleepy(index steps, Map map, Costs costs) : Recurrence({steps, 1, 1}), map_(std::move(map)), costs_(costs) {}

    mutable index linearised = 0;  // steps

    void initial(const Section&, View<double> state) const override { state(0, 0, 0) = 0.3; }
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i) after(i, 0, 0) = map_.value(section.first + i, before(i, 0, 0));
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        std::this_thread::sleep_for(costs_.linearised_call + section.steps() * costs_.linearised_step);
        linearised += section.steps();
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            jacobian(i, 0, 0, 0) = map_.slope(section.first + i, before(i, 0, 0));
    }
    void run(const Section& section, View<const double> state, View<double> trajectory) const override {
        std::this_thread::sleep_for(section.steps() * costs_.run_step);
        double x = state(0, 0, 0);
        for (index i = 0; i < section.steps(); ++i) trajectory(i, 0, 0) = x = map_.value(section.first + i, x);
    }

private:
    Map map_;
    Costs costs_;
};

bool is_by(const Report& report, const std::string& method) { return report.method.starts_with(method); }

/// The trajectory as sequential evaluation has it, and of `report` what holds for every choice.
void expect_right(const Recurrence<double>& recurrence, View<const double> trajectory, const Report& report,
                  double tolerance) {
    EXPECT_TRUE(report.ok()) << report;
    const auto expected = evaluate(recurrence, {.method = Method::sequential});
    EXPECT_LE(largest_difference<double>(trajectory, expected.trajectory), tolerance) << report.method;
}

double seconds_of(const std::function<void()>& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

TEST(Automatic, TakesSequentialWhereLinearisingIsDear) {
    constexpr index steps = 256;
    const Sleepy<0> recurrence(steps, forgets, {.run_step = Microseconds(100), .linearised_step = Microseconds(5000)});
    const Options options{.execution = {.threads = 1}};
    for (int call = 0; call < 4; ++call) {
        Report report;
        Buffer<double> trajectory(recurrence.shape());
        const double seconds = seconds_of([&] { report = evaluate(recurrence, trajectory.view(), options); });
        EXPECT_TRUE(is_by(report, "sequential")) << call << ": " << report.method;
        EXPECT_LE(seconds, 0.25 * steps * 5000e-6) << "a quarter of what one pass of Newton's method takes";
        expect_right(recurrence, trajectory, report, 0);
        ASSERT_EQ(report.candidates.size(), 2U);
        EXPECT_EQ(report.candidates.front().method, Method::sequential);
        EXPECT_EQ(report.candidates.front().measured, call >= 2);
        if (call >= 2) {
            EXPECT_GE(report.candidates.front().seconds, steps * 100e-6);
        }
    }
    EXPECT_LE(recurrence.linearised, steps / 8) << "some steps, to be timed, once";
}

TEST(Automatic, KeepsNewtonWhereStepsAreDear) {
    constexpr index steps = 256;
    const Sleepy<1> recurrence(steps, forgets, {.run_step = Microseconds(1000), .linearised_call = Microseconds(500)});
    for (int call = 0; call < 4; ++call) {
        const auto [trajectory, report] = evaluate(recurrence, {.execution = {.threads = 2}});
        EXPECT_TRUE(is_by(report, "newton")) << call << ": " << report.method;
        EXPECT_EQ(report.status, Status::converged);
        ASSERT_GE(report.candidates.size(), 2U);
        EXPECT_EQ(report.candidates.front().method, Method::newton);
        EXPECT_EQ(report.candidates.front().measured, call >= 2);
        if (call == 3) expect_right(recurrence, trajectory, report, 1e-12);
    }
}

TEST(Automatic, FirstCallGivesNewtonUpWhenItHasTakenAsLongAsTheRestWould) {
    constexpr index steps = 256;
    const Sleepy<2> recurrence(steps, chaotic, {.run_step = Microseconds(1000), .linearised_step = Microseconds(50)});
    const double sequential = seconds_of([&] { evaluate(recurrence, {.method = Method::sequential}); });
    for (int call = 0; call < 4; ++call) {
        Report report;
        Buffer<double> trajectory(recurrence.shape());
        const double seconds = seconds_of([&] { report = evaluate(recurrence, trajectory.view(), {}); });
        EXPECT_LE(seconds, 4 * sequential) << "of about 1 more for the passes, and what disturbs it";
        EXPECT_TRUE(report.ok());
        if (call == 0) {
            EXPECT_TRUE(is_by(report, "newton") && report.method.ends_with(", then sequential")) << report.method;
            EXPECT_EQ(report.status, Status::finished_sequentially);
            EXPECT_GT(report.sequential_steps, 0);
        } else {
            EXPECT_TRUE(is_by(report, "sequential")) << call << ": " << report.method;
            expect_right(recurrence, trajectory, report, 0);
        }
    }
}

TEST(Automatic, TakesOverlapWhereTheRecurrenceForgets) {
    const Sleepy<3> recurrence(2048, forgets, {.run_step = Microseconds(100), .linearised_step = Microseconds(2000)});
    for (int call = 0; call < 3; ++call) {
        const auto [trajectory, report] = evaluate(recurrence, {.execution = {.threads = 8}});
        EXPECT_TRUE(is_by(report, "overlap")) << call << ": " << report.method;
        expect_right(recurrence, trajectory, report, 1e-12);
        EXPECT_EQ(report.candidates.size(), 3U);
    }
}

TEST(Automatic, TakesOverlapNoMoreWhereItHasFailed) {
    const Sleepy<4> recurrence(1024, deceptive, {.run_step = Microseconds(200), .linearised_step = Microseconds(2000)});
    for (int call = 0; call < 3; ++call) {
        const auto [trajectory, report] = evaluate(recurrence, {.execution = {.threads = 8}});
        EXPECT_TRUE(is_by(report, call == 0 ? "overlap" : "sequential")) << call << ": " << report.method;
        EXPECT_EQ(report.status, call == 0 ? Status::finished_sequentially : Status::converged);
        expect_right(recurrence, trajectory, report, 1e-9);
    }
}

TEST(Automatic, TakesSequentialForAFewSteps) {
    const Sleepy<5> recurrence(7, forgets, {});
    const auto [trajectory, report] = evaluate(recurrence);
    EXPECT_TRUE(is_by(report, "sequential"));
    EXPECT_TRUE(report.candidates.empty());
    EXPECT_EQ(recurrence.linearised, 0);
    expect_right(recurrence, trajectory, report, 0);
}

TEST(Automatic, IsNewtonWhereItIsAskedForWhatOnlyNewtonHas) {
    const Sleepy<6> recurrence(64, forgets, {.linearised_call = Microseconds(2000)});
    evaluate(recurrence);
    ASSERT_TRUE(is_by(evaluate(recurrence).report, "sequential")) << "unless it is asked for";
    for (const Options& options :
         {Options{.surrogate = Surrogate::diagonal}, Options{.reduction = Reduction::scan}, Options{.chunk = 8},
          Options{.guess = Guess::given}, Options{.window = 16}, Options{.max_iterations = 50},
          Options{.on_failure = OnFailure::report}, Options{.damping = 1}, Options{.anderson = 2},
          Options{.estimates = Estimates::full}}) {
        const auto [trajectory, report] = evaluate(recurrence, options);
        EXPECT_TRUE(is_by(report, "newton")) << report.method;
        EXPECT_TRUE(report.candidates.empty());
        expect_right(recurrence, trajectory, report, 1e-12);
    }
}

TEST(Automatic, KeepsToTheMemoryLimit) {
    const Sleepy<7> recurrence(256, forgets, {});
    EXPECT_THROW(evaluate(recurrence, {.memory_limit = 16}), OutOfMemory);
    EXPECT_TRUE(evaluate(recurrence, {.memory_limit = 1 << 20}).report.ok());
}

TEST(Automatic, AWorkspaceIsGivenBack) {
    const Sleepy<8> recurrence(256, forgets, {});
    Workspace workspace;
    for (int call = 0; call < 4; ++call) EXPECT_TRUE(evaluate(recurrence, {.workspace = &workspace}).report.ok());
    EXPECT_EQ(workspace.used_bytes(), 0);
}

TEST(Automatic, OfGradientsChoosesToo) {
    constexpr index steps = 200, width = 8;
    Buffer<double> weights = Buffer<double>::random({steps, width, width}, 1);
    for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= 0.3;
    const Buffer<double> biases = Buffer<double>::random({steps, 1, width}, 2);
    const Buffer<double> initial = Buffer<double>::random({1, 2, width}, 3);
    const DenseChain<double> chain(weights, biases, initial, {Activation::tanh, 0});
    const auto [trajectory, report] = evaluate(chain);
    const Buffer<double> gradient = Buffer<double>::random(chain.shape(), 4);
    const auto expected = adjoint(chain, trajectory, report, gradient, {.method = Method::sequential});
    EXPECT_TRUE(expected.report.candidates.empty());
    const auto solved = adjoint(chain, trajectory, report, gradient, {.method = Method::newton});
    EXPECT_TRUE(is_by(solved.report, "adjoint, newton"));
    for (int call = 0; call < 6; ++call) {
        const auto found = adjoint(chain, trajectory, report, gradient);
        ASSERT_EQ(found.report.candidates.size(), call < 2 ? 0U : 2U);
        const Method method = call < 2 ? Method::sequential : found.report.candidates.front().method;
        EXPECT_TRUE(is_by(found.report, "adjoint, " + to_string(method))) << found.report.method;
        EXPECT_LE(largest_difference<double>(found.weights, expected.weights), 1e-10);
        EXPECT_LE(largest_difference<double>(found.biases, expected.biases), 1e-10);
        EXPECT_LE(largest_difference<double>(found.initial, expected.initial), 1e-10);
    }
    EXPECT_TRUE(is_by(adjoint(chain, trajectory, report, gradient, {.window = 50}).report, "adjoint, newton"));
}

TEST(Weighing, WhatHasNotRunIsTriedUnlessItMayNotExplore) {
    newton::Experience seen;
    const auto best = [&](bool explores) {
        newton::Weighing weighing(seen, 10, explores);
        weighing.consider(Method::sequential, 40);
        weighing.consider(Method::overlap, 30);
        weighing.consider(Method::shooting, 60);
        return weighing.candidates().front().method;
    };
    for (const bool explores : {true, false}) EXPECT_EQ(best(explores), Method::overlap);
    seen.observed[Method::sequential] = {.seconds = 3.5, .count = 2};
    EXPECT_EQ(best(true), Method::overlap);
    EXPECT_EQ(best(false), Method::sequential);
    seen.observed[Method::shooting] = {.seconds = 2.9, .count = 1};
    EXPECT_EQ(best(true), Method::shooting);
    EXPECT_EQ(best(false), Method::shooting);
}

}  // namespace
}  // namespace deeppcr
