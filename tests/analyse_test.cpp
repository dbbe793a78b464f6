// analyse, on recurrences of which everything is known.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include <deeppcr/deeppcr.hpp>

#include "tests/messages.hpp"

namespace deeppcr {
namespace {

/// A scalar recurrence x_t = f(x_{t-1}) + u_t in double.
struct Scalar : Recurrence<double> {
    using Function = std::function<double(double)>;
    Scalar(index steps, Function f, Function derivative, double first, double input = 0)
        : Recurrence({.steps = steps, .batch = 2}),
          f_(std::move(f)),
          derivative_(std::move(derivative)),
          first_(first),
          inputs_(Buffer<double>::random({steps, 2, 1}, 1)),
          input_(input) {}
    void initial(const Section& section, View<double> state) const override {
        for (index j = 0; j < section.batch(); ++j)
            state(0, j, 0) = first_ * (1 + 0.01 * double(section.sequences[std::size_t(j)]));
    }
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j)
                after(i, j, 0) =
                    f_(before(i, j, 0)) + input_ * inputs_(section.first + i, section.sequences[std::size_t(j)], 0);
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) jacobian(i, j, 0, 0) = derivative_(before(i, j, 0));
    }
    Function f_, derivative_;
    double first_;
    Buffer<double> inputs_;
    double input_;
};

Scalar halving(index steps) {
    return {steps, [](double x) { return x / 2; }, [](double) { return 0.5; }, 1, 1};
}
Scalar logistic(index steps) {
    return {steps, [](double x) { return 4 * x * (1 - x); }, [](double x) { return 4 - 8 * x; }, 0.3};
}

TEST(Analyse, ContractiveRecurrence) {
    const Analysis analysis = analyse(halving(5000), {.evaluation = {.tolerance = 1e-6}});
    EXPECT_NEAR(analysis.lyapunov, std::log(0.5), 1e-12);
    EXPECT_NEAR(analysis.lyapunov_error, 0, 1e-12);
    EXPECT_TRUE(analysis.linear);
    EXPECT_EQ(analysis.longest_window, 0);
    EXPECT_EQ(analysis.channels_that_pay, -1);
    EXPECT_EQ(analysis.tolerance, 1e-6);
    // Starts of size 1 are wrong by 2^-n after n steps, up to a few; the tolerance is 1e-6 = 2^-19.9.
    EXPECT_GE(analysis.forgetting, 17);
    EXPECT_LE(analysis.forgetting, 23);
    EXPECT_GT(analysis.places, 16);
    ASSERT_EQ(analysis.trials.size(), 2U);
    EXPECT_EQ(analysis.trials[0].method, Method::sequential);
    EXPECT_EQ(analysis.trials[0].difference, 0);
    const Trial& newton = analysis.trials[1];
    EXPECT_EQ(newton.method, Method::newton);
    EXPECT_EQ(newton.report.status, Status::converged);
    EXPECT_LE(newton.report.iterations, 3);  // one for an affine recurrence, and the test
    EXPECT_LE(newton.difference, 1e-5);
    EXPECT_GT(newton.seconds, 0);
}

TEST(Analyse, ChaoticRecurrence) {
    // The logistic map's exponent is log 2, for almost every trajectory.
    const Analysis analysis = analyse(logistic(4000));
    EXPECT_NEAR(analysis.lyapunov, std::log(2.0), 0.05);
    EXPECT_GT(analysis.lyapunov_error, 0);
    EXPECT_LT(analysis.lyapunov_error, 0.05);
    EXPECT_FALSE(analysis.linear);
    EXPECT_EQ(analysis.forgetting, -1);
    EXPECT_NEAR(double(analysis.longest_window), 52 * std::log(2.0) / analysis.lyapunov, 1);
    for (const Trial& trial : analysis.trials) EXPECT_TRUE(trial.right());
}

TEST(Analyse, LinearIsWhatHasTheSameJacobiansEverywhere) {
    // Grows by 1.2 a step, as far as steps go: unstable, not chaotic.
    const Scalar growing(
        1000, [](double x) { return 1.2 * x; }, [](double) { return 1.2; }, 1, 1);
    const Analysis unstable = analyse(growing, {.trials = false});
    EXPECT_TRUE(unstable.linear);
    EXPECT_NEAR(unstable.lyapunov, std::log(1.2), 1e-12);
    // A derivative that is even, and some that are constant where the trajectory is.
    const Scalar tangent(
        100, [](double x) { return std::tanh(2 * x); }, [](double x) { return 2 / std::pow(std::cosh(2 * x), 2); }, 1,
        1);
    EXPECT_FALSE(analyse(tangent, {.trials = false}).linear);
    const Scalar rectified(
        100, [](double x) { return std::max(x, 0.0) * 1.1 + 1; }, [](double x) { return x > 0 ? 1.1 : 0; }, 1);
    EXPECT_FALSE(analyse(rectified, {.trials = false}).linear);
    const Scalar leaky(
        100, [](double x) { return x > 0 ? x / 2 : x / 4 - 1; }, [](double x) { return x > 0 ? 0.5 : 0.25; }, -1);
    EXPECT_FALSE(analyse(leaky, {.trials = false}).linear);
}

TEST(Analyse, CellTriesEveryMethod) {
    const auto inputs = Buffer<float>::random({3000, 2, 3 * 5}, 1), parameters = Buffer<float>::random({3, 1, 5}, 2);
    for (index i = 0; i < parameters.size(); ++i) parameters.data()[i] /= 2;
    const CellRecurrence<ParaGRU> recurrence(inputs, parameters);
    const Analysis analysis = analyse(recurrence);
    EXPECT_LT(analysis.lyapunov, 0);
    EXPECT_FALSE(analysis.linear);
    EXPECT_GT(analysis.forgetting, 0);
    EXPECT_LT(analysis.forgetting, 200);
    EXPECT_GE(analysis.channels_that_pay, 0);
    EXPECT_EQ(analysis.steps_tried, 3000);
    std::vector<Method> methods;
    for (const Trial& trial : analysis.trials) {
        methods.push_back(trial.method);
        EXPECT_TRUE(trial.right()) << to_string(trial.method);
        EXPECT_LE(trial.difference, 1e-3) << to_string(trial.method);
        EXPECT_GE(trial.seconds, analysis.fastest().seconds);
    }
    EXPECT_THAT(methods, testing::ElementsAre(Method::sequential, Method::overlap, Method::shooting, Method::automatic,
                                              Method::newton));
}

/// x_t = factor * (x_{t-1} with its two numbers swapped).
struct Swap : Recurrence<double> {
    explicit Swap(double factor) : Recurrence({.steps = 100, .batch = 1, .width = 2}), factor_(factor) {}
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            for (index k : {0, 1}) after(i, 0, k) = factor_ * before(i, 0, 1 - k);
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index k : {0, 1}) {
                jacobian(i, 0, k, k) = 0;
                jacobian(i, 0, k, 1 - k) = factor_;
            }
    }
    double factor_;
};

TEST(Analyse, GrowthWhoseSquareIsBeyondTheRangeOfNumbers) {
    for (const double factor : {1e200, 1e-200}) {
        const Analysis analysis = analyse(Swap(factor), {.trials = false});
        EXPECT_NEAR(analysis.lyapunov, std::log(factor), 1e-9);
        EXPECT_NEAR(analysis.lyapunov_error, 0, 1e-9);
    }
}

TEST(Analyse, WhereNoStartIsWrongNothingIsForgotten) {
    const Analysis analysis = analyse(Swap(1.5), {.trials = false});  // x stays 0
    EXPECT_EQ(analysis.places, 0);
    EXPECT_EQ(analysis.forgetting, -1);
    EXPECT_EQ(analysis.longest_window, index(52 * std::log(2.0) / std::log(1.5)));
}

TEST(Analyse, DenseJacobiansAreTriedOnWhatTakesSeconds) {
    // 2 * 48^3 operations per step and sequence: 4e9 are the limit.
    const index hidden = 48, steps = 60000;
    const auto inputs = Buffer<float>::random({steps, 1, hidden}, 1),
               weights = Buffer<float>::random({1, hidden, hidden}, 2);
    for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= 0.05F;
    const Buffer<float> biases({1, 1, hidden}), initial({1, 1, hidden});
    const DenseCell<float> cell(DenseCellKind::elman_tanh, inputs, weights, biases, initial);
    const Analysis analysis = analyse(cell, {.seconds = 0.5});
    EXPECT_GT(analysis.steps_tried, 1000);
    EXPECT_LT(analysis.steps_tried, steps);
    EXPECT_EQ(analysis.trials.size(), 3U);  // sequential, Newton with the full Jacobian and with its diagonal
    EXPECT_TRUE(analysis.fastest().right());
}

TEST(Analyse, SmallestAndNoTrials) {
    const Analysis one = analyse(halving(1));
    EXPECT_NEAR(one.lyapunov, std::log(0.5), 1e-12);
    EXPECT_TRUE(std::isnan(one.lyapunov_error));
    EXPECT_TRUE(one.fastest().right());
    EXPECT_THAT(analyse(halving(100), {.trials = false}).trials, testing::IsEmpty());
    // J = 0: the past is forgotten in a step.
    const Scalar none(
        100, [](double) { return 0; }, [](double) { return 0; }, 1, 1);
    const Analysis forgetful = analyse(none);
    EXPECT_EQ(forgetful.lyapunov, -std::numeric_limits<double>::infinity());
    EXPECT_EQ(forgetful.forgetting, 1);
}

TEST(Analyse, ProgressGoesOnAndMayStop) {
    double last = 0;
    index calls = 0;
    AnalysisOptions options;
    options.progress = [&](double done) {
        EXPECT_GE(done, last);
        EXPECT_LE(done, 1);
        last = done;
        ++calls;
        return true;
    };
    (void)analyse(halving(1000), options);
    EXPECT_GT(calls, 20);
    for (const double until : {0.0, 0.1, 0.25, 0.9}) {
        options.progress = [&](double done) { return done < until; };
        EXPECT_THROW((void)analyse(halving(1000), options), NotConverged) << until;
    }
}

TEST(Analyse, SaysWhatIsWrong) {
    EXPECT_EQ(message_of([] { (void)analyse(halving(10), {.seconds = 0}); }),
              "options.seconds: expected a number above 0, got 0.000000");
    EXPECT_THAT(message_of([] { (void)analyse(halving(0)); }), testing::HasSubstr("at least one step"));
    EXPECT_THAT(message_of([] { (void)analyse(halving(10), {.evaluation = {.tolerance = -1}}); }),
                testing::HasSubstr("options.tolerance"));
    const Scalar doubling(
        5000, [](double x) { return 2 * x; }, [](double) { return 2; }, 1);
    EXPECT_EQ(message_of<NotConverged>([&] { (void)analyse(doubling); }),
              "the recurrence is not finite from step 1024 of sequence 0 on, sequentially too");
}

}  // namespace
}  // namespace deeppcr
