// evaluate and adjoint: the numerics contract, as properties, on recurrences small enough to know.

#include <gtest/gtest.h>
#include <deeppcr/deeppcr.hpp>

#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <sstream>

#include "tests/compare.hpp"
#include "tests/messages.hpp"

namespace deeppcr {
namespace {

/// x_t = tanh(gain * M x_{t-1} + u_t) with a fixed full M for each sequence alike; gain sets how contractive it is.
/// Counts its calls, and can be told to return NaN from some step of some sequence on.
template <class T>
class TanhNetwork : public Recurrence<T> {
public:
    TanhNetwork(const Shape& shape, double gain, bool affine = false)
        : Recurrence<T>(shape), gain_(gain), affine_(affine), input_(Buffer<T>::random(shape, 7)) {}

    index bad_step = -1, bad_sequence = -1;
    mutable index evaluated = 0;  // states computed by step and linearise

    void initial(const Section& section, View<T> state) const override {
        for (index j = 0; j < section.batch(); ++j)
            for (index k = 0; k < state.width(); ++k)
                state(0, j, k) = T(0.1) * T(section.sequences[std::size_t(j)] + 1) / T(k + 1);
    }
    void step(const Section& section, View<const T> before, View<T> after) const override {
        compute(section, before, after, {});
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        compute(section, before, after, jacobian);
    }

private:
    T entry(index row, index column) const {
        return T(gain_ * std::cos(double(3 * row + 5 * column + 1)) / std::sqrt(double(this->shape().width)));
    }
    void compute(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const {
        const index width = this->shape().width;
        evaluated += section.steps() * section.batch();
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                const index step = section.first + i, sequence = section.sequences[std::size_t(j)];
                for (index row = 0; row < width; ++row) {
                    T sum = input_(step, sequence, row);
                    for (index k = 0; k < width; ++k) sum += entry(row, k) * before(i, j, k);
                    const T value = affine_ ? sum : std::tanh(sum);
                    after(i, j, row) = value;
                    if (jacobian.data() != nullptr)
                        for (index k = 0; k < width; ++k)
                            jacobian(i, j, row, k) = (affine_ ? T(1) : 1 - value * value) * entry(row, k);
                }
                if (bad_step >= 0 && step >= bad_step && sequence == bad_sequence)
                    after(i, j, 0) = std::numeric_limits<T>::quiet_NaN();
            }
    }
    double gain_;
    bool affine_;
    Buffer<T> input_;
};

/// The logistic map: Lyapunov exponent exactly ln 2 at r = 4.
template <class T>
class LogisticMap : public Recurrence<T> {
public:
    LogisticMap(index steps, double r) : Recurrence<T>({steps, 1, 1}), r_(T(r)) {}
    void initial(const Section&, View<T> state) const override { state(0, 0, 0) = T(0.3); }
    void step(const Section& section, View<const T> before, View<T> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) after(i, j, 0) = r_ * before(i, j, 0) * (1 - before(i, j, 0));
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) jacobian(i, j, 0, 0) = r_ * (1 - 2 * before(i, j, 0));
    }

private:
    T r_;
};

template <class T>
double residual(const Recurrence<T>& recurrence, View<const T> trajectory) {
    std::vector<index> sequences;
    for (index j = 0; j < recurrence.shape().batch; ++j) sequences.push_back(j);
    const Shape row{1, recurrence.shape().batch, recurrence.shape().width};
    Buffer<T> before(row), after(row);
    recurrence.initial({0, 0, sequences, {}}, before);
    double largest = 0;
    for (index t = 0; t < recurrence.shape().steps; ++t) {
        recurrence.step({t, t + 1, sequences, {}}, before, after);
        largest = std::max(largest, largest_difference<T>(after, trajectory.steps(t, t + 1)));
        for (index j = 0; j < row.batch; ++j) std::copy_n(trajectory.at(t, j), row.width, before.view().at(0, j));
    }
    return largest;
}

template <class T>
Evaluation<T> sequentially(const Recurrence<T>& recurrence) {
    return evaluate(recurrence, {.method = Method::sequential});
}

template <class T>
class Evaluate : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Evaluate, Types);

// Steps: none, one, two, a review period, primes, a power of two and its neighbours.
constexpr index step_counts[] = {0, 1, 2, 3, 8, 63, 64, 65, 211};

TYPED_TEST(Evaluate, EverySurrogateReductionAndBackendAgreesWithSequential) {
    for (const index steps : step_counts) {
        const TanhNetwork<TypeParam> recurrence({steps, 3, 5}, 0.7);
        const auto expected = sequentially<TypeParam>(recurrence);
        EXPECT_EQ(expected.report.status, Status::converged);
        for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::identity, Surrogate::zero})
            for (const Reduction reduction : {Reduction::sequential, Reduction::pcr, Reduction::scan})
                for (const Backend backend : {Backend::reference, Backend::cpu}) {
                    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton,
                                                                            .surrogate = surrogate,
                                                                            .reduction = reduction,
                                                                            .chunk = 7,
                                                                            .execution = {.backend = backend}});
                    SCOPED_TRACE(report.method + ", " + std::to_string(steps) + " steps");
                    EXPECT_TRUE(report.ok());
                    EXPECT_LE(report.relative_residual, 1);
                    EXPECT_LE(largest_difference<TypeParam>(trajectory, expected.trajectory),
                              1000 * double(std::numeric_limits<TypeParam>::epsilon()));
                }
    }
}

TYPED_TEST(Evaluate, AnAffineStepConvergesAfterOneUpdate) {
    const TanhNetwork<TypeParam> recurrence({100, 2, 4}, 0.5, /*affine=*/true);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton});
    EXPECT_EQ(report.status, Status::converged);
    EXPECT_LE(report.iterations, 2) << "one pass updates, the next one tests";
}

TYPED_TEST(Evaluate, ResidualInTheReportIsTheResidual) {
    const TanhNetwork<TypeParam> recurrence({130, 4, 3}, 1.0);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton, .tolerance = 1e-3});
    ASSERT_EQ(report.status, Status::converged);
    const double actual = residual<TypeParam>(recurrence, trajectory);
    EXPECT_NEAR(report.residual, actual, 1e-6 * 1e-3 + 4 * double(std::numeric_limits<TypeParam>::epsilon()));
    EXPECT_GT(actual, 0);
    EXPECT_LE(report.relative_residual, 1);
    ASSERT_EQ(report.sequences.size(), 4U);
    for (const Report::Sequence& sequence : report.sequences) {
        EXPECT_EQ(sequence.confirmed, 130);
        EXPECT_LE(sequence.residual, report.residual);
        EXPECT_LE(sequence.iterations, report.iterations);
    }
}

TYPED_TEST(Evaluate, ResidualsOfThePassesFall) {
    const TanhNetwork<TypeParam> recurrence({100, 2, 4}, 1.5);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton});
    ASSERT_EQ(report.residuals.size(), std::size_t(report.iterations));
    EXPECT_GT(report.residuals.front(), 1);
    EXPECT_EQ(report.residuals.back(), 0);
    EXPECT_LT(report.residuals[report.residuals.size() - 2], report.residuals.front());
    EXPECT_TRUE(sequentially<TypeParam>(recurrence).report.residuals.empty());
}

TYPED_TEST(Evaluate, ErrorEstimateIsTheError) {
    // A loose tolerance leaves an error far above rounding; the linear estimate is right up to its square.
    const TanhNetwork<double> recurrence({200, 3, 4}, 0.9);
    const auto exact = sequentially<double>(recurrence);
    for (const double tolerance : {1e-2, 1e-3, 1e-5}) {
        const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton, .tolerance = tolerance});
        ASSERT_EQ(report.status, Status::converged);
        const double error = largest_difference<double>(trajectory, exact.trajectory);
        EXPECT_NEAR(report.error, error, 0.2 * error + 1e-14) << "tolerance " << tolerance;
    }
}

TYPED_TEST(Evaluate, ErrorEstimateHoldsAcrossWindows) {
    const TanhNetwork<double> recurrence({200, 3, 4}, 0.9);
    const auto exact = sequentially<double>(recurrence);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton, .tolerance = 1e-3, .window = 17});
    ASSERT_EQ(report.status, Status::converged);
    const double error = largest_difference<double>(trajectory, exact.trajectory);
    EXPECT_NEAR(report.error, error, 0.2 * error + 1e-14);
}

TYPED_TEST(Evaluate, LyapunovEstimateIsThatOfTheLogisticMap) {
    // At r = 3.2 the map has a cycle of two, whose multiplier 4 + 2r - r^2 is known; at r = 4 the exponent is ln 2.
    const auto exponent = [](const Recurrence<double>& recurrence, Options options) {
        auto [trajectory, sequential] = sequentially<double>(recurrence);
        options.method = Method::newton;
        options.guess = Guess::given;
        const Report report = evaluate(recurrence, trajectory.view(), options);
        EXPECT_EQ(report.status, Status::converged);
        return report.lyapunov;
    };
    for (const index window : {0, 100, 1}) {
        EXPECT_NEAR(exponent(LogisticMap<double>(4000, 3.2), {.window = window}),
                    0.5 * std::log(std::abs(4 + 2 * 3.2 - 3.2 * 3.2)), 0.01);
        EXPECT_NEAR(exponent(LogisticMap<double>(4000, 4.0), {.window = window}), std::numbers::ln2, 0.02);
    }
    EXPECT_TRUE(std::isnan(sequentially<double>(LogisticMap<double>(10, 4.0)).report.lyapunov));
}

TYPED_TEST(Evaluate, WindowOfOneIsSequentialBitForBit) {
    const TanhNetwork<TypeParam> recurrence({50, 3, 6}, 2.0);
    const auto expected = sequentially<TypeParam>(recurrence);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton, .window = 1});
    EXPECT_EQ(report.status, Status::converged);
    EXPECT_EQ(report.iterations, 50);
    EXPECT_TRUE(same_bits<TypeParam>(trajectory, expected.trajectory));
    // Also where the guess itself would pass the residual test.
    Buffer<TypeParam> guessed(recurrence.shape());
    for (index i = 0; i < guessed.size(); ++i)
        guessed.data()[i] = std::nextafter(expected.trajectory.data()[i], TypeParam(2));
    EXPECT_EQ(
        evaluate(recurrence, guessed.view(), {.method = Method::newton, .guess = Guess::given, .window = 1}).status,
        Status::converged);
    EXPECT_TRUE(same_bits<TypeParam>(guessed, expected.trajectory));
}

TYPED_TEST(Evaluate, AfterKPassesTheFirstKStepsAreExact) {
    const TanhNetwork<TypeParam> recurrence({40, 2, 3}, 3.0);
    const auto expected = sequentially<TypeParam>(recurrence);
    for (const Surrogate surrogate : {Surrogate::full, Surrogate::zero})
        for (const index passes : {1, 2, 5, 17}) {
            Buffer<TypeParam> trajectory(recurrence.shape());
            const Report report = evaluate(recurrence, trajectory.view(),
                                           {.method = Method::newton,
                                            .surrogate = surrogate,
                                            .absolute_tolerance = 0,
                                            .relative_tolerance = 0,
                                            .max_iterations = passes,
                                            .on_failure = OnFailure::report});
            for (const Report::Sequence& sequence : report.sequences) EXPECT_GE(sequence.confirmed, passes - 1);
            EXPECT_TRUE(same_bits<TypeParam>(trajectory.view().steps(0, passes - 1),
                                             expected.trajectory.view().steps(0, passes - 1)));
        }
}

TYPED_TEST(Evaluate, AToleranceOfZeroStillEndsInTheSequentialResult) {
    const TanhNetwork<TypeParam> recurrence({60, 2, 4}, 0.8);
    const auto expected = sequentially<TypeParam>(recurrence);
    const auto [trajectory, report] =
        evaluate(recurrence, {.method = Method::newton, .absolute_tolerance = 0, .relative_tolerance = 0});
    EXPECT_TRUE(report.ok());
    EXPECT_TRUE(same_bits<TypeParam>(trajectory, expected.trajectory));
}

TYPED_TEST(Evaluate, ChaosIsFinishedSequentiallyBitForBitOrWithinTheResidual) {
    const LogisticMap<TypeParam> recurrence(3000, 4.0);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton});
    EXPECT_TRUE(report.ok());
    EXPECT_LE(residual<TypeParam>(recurrence, trajectory), 200 * double(std::numeric_limits<TypeParam>::epsilon()));
    EXPECT_LT(report.iterations, 2000) << "the ladder, not step after step by Newton";
    EXPECT_GT(report.window_shrinks + report.sequential_steps, 0);
}

TYPED_TEST(Evaluate, FinishesSequentiallyFromEachPrefix) {
    const TanhNetwork<TypeParam> recurrence({300, 5, 4}, 6.0);  // strongly expanding: no Newton step helps
    const auto expected = sequentially<TypeParam>(recurrence);
    const auto [trajectory, report] = evaluate(
        recurrence, {.method = Method::newton, .absolute_tolerance = 0, .relative_tolerance = 0, .max_iterations = 20});
    EXPECT_EQ(report.status, Status::finished_sequentially);
    EXPECT_TRUE(same_bits<TypeParam>(trajectory, expected.trajectory));
    EXPECT_LE(report.sequential_steps, 5 * (300 - 19));
    EXPECT_GT(report.sequential_steps, 0);
}

TYPED_TEST(Evaluate, FailurePolicies) {
    const TanhNetwork<TypeParam> recurrence({300, 2, 4}, 6.0);
    Options options{.method = Method::newton, .max_iterations = 3, .on_failure = OnFailure::report};
    const auto reported = evaluate(recurrence, options);
    EXPECT_EQ(reported.report.status, Status::max_iterations);
    EXPECT_FALSE(reported.report.ok());
    EXPECT_LT(reported.report.sequences[0].confirmed, 300);
    options.on_failure = OnFailure::raise;
    EXPECT_THROW(evaluate(recurrence, options), NotConverged);
    options = {.method = Method::newton, .progress = [](index, index, index iterations) { return iterations < 2; }};
    const auto stopped = evaluate(recurrence, options);
    EXPECT_EQ(stopped.report.status, Status::max_iterations);
    EXPECT_EQ(stopped.report.iterations, 2);
}

/// What `progress` is told, and until which step.
TYPED_TEST(Evaluate, TellsHowFarItIsStepAfterStep) {
    const TanhNetwork<TypeParam> recurrence({300, 2, 4}, 6.0);
    const auto expected = sequentially<TypeParam>(recurrence);
    std::vector<index> told;
    index until = 300;
    const auto progress = [&](index confirmed, index steps, index) {
        EXPECT_EQ(steps, 300);
        told.push_back(confirmed);
        return confirmed < until;
    };
    const auto whole = evaluate(recurrence, {.method = Method::sequential, .progress = progress});
    EXPECT_TRUE(whole.report.ok()) << whole.report;
    EXPECT_TRUE(same_bits<TypeParam>(whole.trajectory, expected.trajectory));
    EXPECT_GT(told.size(), 1U);
    EXPECT_TRUE(std::is_sorted(told.begin(), told.end()));
    EXPECT_EQ(told.back(), 300);

    until = 100;
    for (const Options& options : {Options{.method = Method::sequential, .progress = progress},
                                   Options{.method = Method::newton, .max_iterations = 3, .progress = progress}}) {
        const auto [trajectory, report] = evaluate(recurrence, options);
        EXPECT_EQ(report.status, Status::max_iterations) << report;
        EXPECT_EQ(report.sequences[0].confirmed, told.back());
        EXPECT_GE(told.back(), 100);
        EXPECT_LT(told.back(), 300);
        for (index j = 0; j < 2; ++j)
            for (index step = 0; step < 300; ++step) {
                const index held = std::min(step, report.sequences[std::size_t(j)].confirmed - 1);
                for (index k = 0; k < 4; ++k)
                    ASSERT_EQ(trajectory.view().at(step, j)[k], expected.trajectory.view().at(held, j)[k]);
            }
    }
}

TYPED_TEST(Evaluate, WindowsOfAnyLengthGiveTheSameResult) {
    const TanhNetwork<TypeParam> recurrence({150, 3, 4}, 0.9);
    const auto expected = sequentially<TypeParam>(recurrence);
    for (const index window : {1, 2, 7, 64, 149, 150, 1000}) {
        const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton, .window = window});
        EXPECT_EQ(report.status, Status::converged) << window;
        EXPECT_LE(largest_difference<TypeParam>(trajectory, expected.trajectory),
                  1000 * double(std::numeric_limits<TypeParam>::epsilon()));
        EXPECT_EQ(report.window, std::min<index>(window, 150));
    }
}

TYPED_TEST(Evaluate, MemoryGrowsWithTheWindowNotWithTheSteps) {
    index bytes[2];
    for (const int longer : {0, 1}) {
        const TanhNetwork<TypeParam> recurrence({longer ? 4000 : 500, 2, 8}, 0.5);
        bytes[longer] = evaluate(recurrence, {.method = Method::newton, .window = 50}).report.workspace_bytes;
    }
    EXPECT_EQ(bytes[0], bytes[1]);
    const TanhNetwork<TypeParam> recurrence({4000, 2, 8}, 0.5);
    EXPECT_GT(evaluate(recurrence, {.method = Method::newton, .window = 500}).report.workspace_bytes, 5 * bytes[0]);
}

TYPED_TEST(Evaluate, ASplitSequenceEqualsTheWhole) {
    // The second half, started from the first half's last state, through the guess of a window of its own.
    const TanhNetwork<TypeParam> recurrence({90, 2, 3}, 0.8);
    const auto whole = evaluate(recurrence, {.method = Method::newton});
    const auto windows = evaluate(recurrence, {.method = Method::newton, .window = 45});
    EXPECT_LE(largest_difference<TypeParam>(whole.trajectory, windows.trajectory),
              500 * double(std::numeric_limits<TypeParam>::epsilon()));
}

TYPED_TEST(Evaluate, AGoodGuessIsConfirmedInOnePassAndUnchanged) {
    const TanhNetwork<TypeParam> recurrence({120, 3, 4}, 0.9);
    auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton});
    const Buffer<TypeParam> guess = trajectory.clone();
    const Report again = evaluate(recurrence, trajectory.view(), {.method = Method::newton, .guess = Guess::given});
    EXPECT_EQ(again.iterations, 1);
    EXPECT_TRUE(same_bits<TypeParam>(trajectory, guess));
}

TYPED_TEST(Evaluate, AnyGuessEndsInTheSameTrajectory) {
    const TanhNetwork<TypeParam> recurrence({80, 2, 4}, 0.9);
    const auto expected = sequentially<TypeParam>(recurrence);
    Buffer<TypeParam> trajectory = Buffer<TypeParam>::random(recurrence.shape(), 5);
    trajectory(40, 1, 2) = std::numeric_limits<TypeParam>::quiet_NaN();
    trajectory(60, 0, 0) = std::numeric_limits<TypeParam>::infinity();
    const Report report = evaluate(recurrence, trajectory.view(), {.method = Method::newton, .guess = Guess::given});
    EXPECT_TRUE(report.ok());
    EXPECT_GE(report.non_finite_resets, 2);
    EXPECT_LE(largest_difference<TypeParam>(trajectory, expected.trajectory),
              1000 * double(std::numeric_limits<TypeParam>::epsilon()));
    const auto first_step = evaluate(recurrence, {.method = Method::newton, .guess = Guess::first_step});
    EXPECT_LE(largest_difference<TypeParam>(first_step.trajectory, expected.trajectory),
              1000 * double(std::numeric_limits<TypeParam>::epsilon()));
}

TYPED_TEST(Evaluate, NaNOfOneSequenceIsReportedAndLeavesTheOthersRight) {
    TanhNetwork<TypeParam> recurrence({100, 3, 4}, 0.8);
    recurrence.bad_step = 37;
    recurrence.bad_sequence = 1;
    const auto expected = sequentially<TypeParam>(recurrence);
    EXPECT_EQ(expected.report.status, Status::non_finite);
    for (const index window : {0, 10, 1}) {
        const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton, .window = window});
        EXPECT_EQ(report.status, Status::non_finite);
        EXPECT_FALSE(report.ok());
        EXPECT_EQ(report.sequences[0].status, Status::converged);
        EXPECT_EQ(report.sequences[1].status, Status::non_finite);
        EXPECT_EQ(report.sequences[1].confirmed, 37);
        EXPECT_EQ(report.sequences[2].status, Status::converged);
        for (const index sequence : {0, 2})
            EXPECT_LE(largest_difference<TypeParam>(trajectory.view().sequences(sequence, sequence + 1),
                                                    expected.trajectory.view().sequences(sequence, sequence + 1)),
                      1000 * double(std::numeric_limits<TypeParam>::epsilon()));
        EXPECT_TRUE(std::isnan(trajectory(37, 1, 0)));
        EXPECT_THROW(adjoint(recurrence, trajectory, report, Buffer<TypeParam>(recurrence.shape())), InvalidArgument);
    }
}

TYPED_TEST(Evaluate, ConvergedSequencesAreNotEvaluatedAgain) {
    // One sequence far from its guess, many that start at their solution.
    const TanhNetwork<TypeParam> recurrence({200, 8, 4}, 0.9);
    auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton, .tolerance = 1e-6});
    for (index t = 0; t < 200; ++t) std::fill_n(trajectory.view().at(t, 3), 4, TypeParam(0.5));
    const index before = recurrence.evaluated;
    const Report again =
        evaluate(recurrence, trajectory.view(), {.method = Method::newton, .guess = Guess::given, .tolerance = 1e-5});
    EXPECT_GT(again.iterations, 1);
    EXPECT_EQ(again.sequences[0].iterations, 1);
    EXPECT_LE(recurrence.evaluated - before, 200 * 8 + 200 * (again.iterations - 1));
}

TYPED_TEST(Evaluate, StridedTrajectories) {
    const TanhNetwork<TypeParam> recurrence({70, 3, 4}, 0.8);
    const auto expected = evaluate(recurrence, {.method = Method::newton});
    Buffer<TypeParam> batch_first(recurrence.shape(), Layout::batch_first);
    evaluate(recurrence, batch_first.view(), {.method = Method::newton});
    EXPECT_TRUE(same_bits<TypeParam>(batch_first, expected.trajectory));
    Buffer<TypeParam> padded({70, 3, 9});
    const View<TypeParam> view(padded.data() + 2, recurrence.shape(), 27, 9);
    evaluate(recurrence, view, {.method = Method::newton});
    EXPECT_TRUE(same_bits<TypeParam>(view, expected.trajectory));
    EXPECT_EQ(padded(0, 0, 1), 0) << "nothing beside the view is touched";
    EXPECT_EQ(padded(69, 2, 6), 0);
    evaluate(recurrence, batch_first.view(), {.method = Method::sequential});
    EXPECT_TRUE(same_bits<TypeParam>(batch_first, sequentially<TypeParam>(recurrence).trajectory));
}

TYPED_TEST(Evaluate, SameBitsOnEveryRunAndWithAReusedWorkspace) {
    const TanhNetwork<TypeParam> recurrence({300, 3, 5}, 0.9);
    Workspace workspace;
    const Options options{
        .method = Method::newton, .reduction = Reduction::scan, .execution = {.threads = 2}, .workspace = &workspace};
    const auto first = evaluate(recurrence, options);
    const index bytes = workspace.peak_bytes();
    const auto second = evaluate(recurrence, options);
    EXPECT_TRUE(same_bits<TypeParam>(first.trajectory, second.trajectory));
    EXPECT_EQ(workspace.peak_bytes(), bytes);
    EXPECT_EQ(workspace.used_bytes(), 0);
}

template <class T>
class Gradient : public testing::Test {};
TYPED_TEST_SUITE(Gradient, Types);

/// L = sum of weight * x, as a function of x_0, moved in one element.
double loss(const TanhNetwork<double>& recurrence, View<const double> weight) {
    const auto [trajectory, report] = sequentially<double>(recurrence);
    double sum = 0;
    for (index i = 0; i < trajectory.size(); ++i) sum += trajectory.data()[i] * weight.data()[i];
    return sum;
}

/// The same network from another initial state.
class Moved : public TanhNetwork<double> {
public:
    Moved(const Shape& shape, double gain, index sequence, index element, double distance)
        : TanhNetwork<double>(shape, gain), sequence_(sequence), element_(element), distance_(distance) {}
    void initial(const Section& section, View<double> state) const override {
        TanhNetwork<double>::initial(section, state);
        for (index j = 0; j < section.batch(); ++j)
            if (section.sequences[std::size_t(j)] == sequence_) state(0, j, element_) += distance_;
    }

private:
    index sequence_, element_;
    double distance_;
};

TEST(Adjoint, EqualsFiniteDifferences) {
    const Shape shape{23, 2, 3};
    const TanhNetwork<double> recurrence(shape, 0.9);
    const Buffer<double> weight = Buffer<double>::random(shape, 9);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton});
    for (const index window : {0, 1, 5, 23})
        for (const Reduction reduction : {Reduction::sequential, Reduction::pcr, Reduction::scan}) {
            const auto gradient =
                adjoint(recurrence, trajectory, report, weight, {.reduction = reduction, .chunk = 4, .window = window});
            for (index j = 0; j < 2; ++j)
                for (index k = 0; k < 3; ++k) {
                    const double h = 1e-5;
                    const double up = loss(Moved(shape, 0.9, j, k, h), weight);
                    const double down = loss(Moved(shape, 0.9, j, k, -h), weight);
                    EXPECT_NEAR(gradient.initial(0, j, k), (up - down) / (2 * h), 1e-8);
                }
            // dL/dx_T is the loss' own gradient there.
            for (index j = 0; j < 2; ++j)
                for (index k = 0; k < 3; ++k) EXPECT_EQ(gradient.states(22, j, k), weight(22, j, k));
        }
}

TEST(Adjoint, RefusesWhatIsNotRight) {
    const TanhNetwork<float> recurrence({50, 1, 3}, 6.0);
    auto [trajectory, report] =
        evaluate(recurrence, {.method = Method::newton, .max_iterations = 2, .on_failure = OnFailure::report});
    const Buffer<float> gradient(recurrence.shape());
    EXPECT_THROW(adjoint(recurrence, trajectory, report, gradient), InvalidArgument);
    report = evaluate(recurrence, trajectory.view());
    EXPECT_NO_THROW(adjoint(recurrence, trajectory, report, gradient));
    EXPECT_THROW(adjoint(recurrence, trajectory, report, Buffer<float>({50, 2, 3})), InvalidArgument);
}

TEST(Adjoint, NoStepsGiveNoGradient) {
    const TanhNetwork<float> recurrence({0, 2, 3}, 1.0);
    const auto [trajectory, report] = evaluate(recurrence, {.method = Method::newton});
    const auto gradient = adjoint(recurrence, trajectory, report, Buffer<float>({0, 2, 3}));
    EXPECT_EQ(gradient.initial(0, 1, 2), 0);
}

TEST(Misuse, NamesArgumentExpectationAndValue) {
    const TanhNetwork<float> recurrence({50, 2, 3}, 0.5);
    Buffer<float> wrong({50, 3, 3});
    EXPECT_EQ(message_of([&] { evaluate(recurrence, wrong.view()); }),
              "trajectory: expected the recurrence's shape [50,2,3], got [50,3,3]");
    EXPECT_EQ(message_of([&] { evaluate(recurrence, {.window = -1}); }), "options.window: expected 0 or more, got -1");
    EXPECT_NE(message_of([&] { evaluate(recurrence, {.tolerance = std::nan("")}); }).find("options.tolerance"),
              std::string::npos);
    EXPECT_NE(message_of([&] { evaluate(recurrence, {.execution = {.threads = -3}}); }).find("execution.threads"),
              std::string::npos);
    EXPECT_NE(message_of([&] { evaluate(recurrence, View<float>()); }).find("trajectory"), std::string::npos);
}

TEST(Misuse, JacobiansThatDoNotFitAreRefusedWithTheirSize) {
    const TanhNetwork<float> recurrence({1000, 10, 20}, 0.5);
    const std::string message = message_of<OutOfMemory>(
        [&] { evaluate(recurrence, {.method = Method::newton, .window = 1000, .memory_limit = 1 << 20}); });
    EXPECT_NE(message.find("needs"), std::string::npos) << message;
    EXPECT_NE(message.find("bytes"), std::string::npos) << message;
    EXPECT_THROW(evaluate(recurrence, {.method = Method::newton, .memory_limit = 1000}), OutOfMemory);
    const auto fitting = evaluate(recurrence, {.method = Method::newton, .memory_limit = 2 << 20});
    EXPECT_TRUE(fitting.report.ok()) << "without a window of one's own it is chosen to fit";
    EXPECT_LE(fitting.report.workspace_bytes, 2 << 20);
}

TEST(Misuse, CallbackErrorsReachTheCaller) {
    class Failing : public LogisticMap<double> {
    public:
        Failing() : LogisticMap<double>(10, 2.0) {}
        void linearise(const Section&, View<const double>, View<double>, Jacobian<double>) const override {
            throw std::runtime_error("no Jacobian today");
        }
    };
    EXPECT_THROW(evaluate(Failing(), {.method = Method::newton}), std::runtime_error);
}

TEST(ReportText, SaysWhatHappened) {
    const TanhNetwork<float> recurrence({50, 2, 3}, 0.5);
    std::ostringstream text;
    text << evaluate(recurrence, {.method = Method::newton}).report;
    EXPECT_NE(text.str().find("converged in"), std::string::npos) << text.str();
    EXPECT_NE(text.str().find("residual"), std::string::npos);
    EXPECT_NE(text.str().find("Lyapunov exponent"), std::string::npos);
}

}  // namespace
}  // namespace deeppcr
