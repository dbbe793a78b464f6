// Cells: every built-in one and one of a user's, over sizes around the 16 lanes, against the reference backend, against
// Newton's method and against finite differences.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>

#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"
#include "tests/messages.hpp"

namespace deeppcr {
namespace {

/// Not built in, the example of the documentation: x_t = (1 - a) x_{t-1} + a tanh(w x_{t-1} + u_t).
struct LeakyTanh {
    static constexpr int states = 1, inputs = 1, parameters = 2;
    template <class S>
    static std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 2> p) {
        auto [a, w] = p;
        return {(S(1) - a) * x[0] + a * tanh(w * x[0] + u[0])};
    }
};

template <class C, class T>
struct Problem {
    Problem(const Shape& channels, std::uint64_t seed, double scale = 0.5, Layout layout = Layout::steps_first,
            const std::vector<SequenceStart>& starts = {})
        : inputs(Buffer<T>::random({channels.steps, channels.batch, channels.width * C::inputs}, seed, layout)),
          parameters(Buffer<T>::random({C::parameters, 1, channels.width}, seed + 1)),
          initial(Buffer<T>::random({1, channels.batch + index(starts.size()), channels.width * C::states}, seed + 2)),
          recurrence(inputs.view(), scaled(parameters, scale), valid(initial), starts) {}

    static View<const T> scaled(Buffer<T>& values, double scale) {
        for (index i = 0; i < values.size(); ++i) values.data()[i] *= T(scale);
        // A weight between 0 and 1, as a leak is.
        if (std::is_same_v<C, LeakyTanh>)
            for (index c = 0; c < values.shape().width; ++c)
                values(0, 0, c) = T(0.5) + T(0.4) * std::sin(values(0, 0, c));
        return values.view();
    }
    /// sLSTM's second state is a sum of positive weights.
    static View<const T> valid(Buffer<T>& states) {
        if (std::is_same_v<C, SLSTM>)
            for (index i = 0; i < states.size(); ++i) states.data()[i] = std::abs(states.data()[i]);
        return states.view();
    }

    Buffer<T> inputs, parameters, initial;
    CellRecurrence<C, T> recurrence;
};

template <class C>
class CellTest : public testing::Test {};
using Cells = testing::Types<ParaGRU, ParaLSTM, DiagonalElman, SLSTM, LeakyTanh>;
TYPED_TEST_SUITE(CellTest, Cells);

// Channels: 1, fewer than the 16 lanes, one fewer, as many, one more, a prime. Batch: one row, fewer and more than
// lanes.
const std::vector<index> channel_counts{1, 3, 15, 16, 17, 37}, batches{1, 3, 17};

TYPED_TEST(CellTest, SequentialEqualsReference) {
    for (const index channels : channel_counts)
        for (const index batch : batches)
            for (const index steps : {1, 2, 67})
                for (const Layout layout : {Layout::steps_first, Layout::batch_first}) {
                    SCOPED_TRACE(to_string(Shape{steps, batch, channels}));
                    const Problem<TypeParam, float> problem({steps, batch, channels}, 1, 0.5, layout);
                    const auto plain = evaluate(problem.recurrence, {.method = Method::sequential,
                                                                     .execution = {.backend = Backend::reference}});
                    const auto fast = evaluate(problem.recurrence, {.method = Method::sequential});
                    EXPECT_LE(largest_difference<float>(plain.trajectory, fast.trajectory), 2e-5);
                    const auto one =
                        evaluate(problem.recurrence, {.method = Method::sequential, .execution = {.threads = 1}});
                    EXPECT_TRUE(same_bits<float>(one.trajectory, fast.trajectory));
                }
}

TYPED_TEST(CellTest, StepAndLinearise) {
    for (const index channels : channel_counts)
        for (const index batch : batches) {
            SCOPED_TRACE(to_string(Shape{5, batch, channels}));
            const Problem<TypeParam, double> problem({5, batch, channels}, 3);
            const CheckReport report = check_recurrence(problem.recurrence, 5);
            // sLSTM divides by a weight that may be small: finite differences are poor there.
            const bool steep = std::is_same_v<TypeParam, SLSTM>;
            EXPECT_TRUE(report.ok() || steep) << report;
            EXPECT_LE(report.largest_jacobian_error, steep ? 1e-4 : 1e-8);
        }
}

TYPED_TEST(CellTest, SequencesInOneRow) {
    // Rows of the batch that hold several sequences equal those sequences on their own, whatever the method.
    const index width = 3;
    const std::vector<SequenceStart> starts{{0, 4}, {0, 5}, {2, 30}};
    const Problem<TypeParam, double> problem({40, 3, width}, 5, 0.5, Layout::steps_first, starts);
    const auto& parts = problem.recurrence.parts();
    ASSERT_EQ(parts.size(), 6U);
    for (const Method method : {Method::sequential, Method::newton}) {
        const auto whole = evaluate(problem.recurrence, {.method = method, .tolerance = 1e-12});
        ASSERT_TRUE(whole.report.ok()) << whole.report;
        for (std::size_t p = 0; p < parts.size(); ++p) {
            const auto [sequence, first, last] = parts[p];
            const CellRecurrence<TypeParam, double> alone(
                problem.inputs.view().steps(first, last).sequences(sequence, sequence + 1), problem.parameters.view(),
                problem.initial.view().sequences(index(p), index(p) + 1));
            const auto part = evaluate(alone, {.method = Method::sequential});
            EXPECT_LE(largest_difference<double>(
                          part.trajectory.view(),
                          whole.trajectory.view().steps(first, last).sequences(sequence, sequence + 1)),
                      1e-9);
            const Buffer<double> ends = problem.recurrence.final_states(whole.trajectory.view());
            EXPECT_EQ(ends(0, index(p), 0), whole.trajectory(last - 1, sequence, 0));
        }
    }
}

TYPED_TEST(CellTest, NewtonEqualsSequential) {
    const Problem<TypeParam, float> problem({300, 2, 17}, 7);
    const auto sequential = evaluate(problem.recurrence, {.method = Method::sequential});
    const auto newton = evaluate(problem.recurrence, {.method = Method::newton, .tolerance = 1e-6});
    EXPECT_TRUE(newton.report.ok()) << newton.report;
    EXPECT_LE(largest_difference<float>(sequential.trajectory, newton.trajectory), 1e-4);
    const auto narrow = evaluate(problem.recurrence, {.method = Method::newton, .window = 1});
    EXPECT_TRUE(same_bits<float>(sequential.trajectory, narrow.trajectory));
}

/// The loss is the sum of weights times states; its gradients by finite differences of sequential evaluations.
TYPED_TEST(CellTest, GradientsAgainstFiniteDifferences) {
    const std::vector<SequenceStart> starts{{1, 5}};
    for (const index channels : {1, 17}) {
        Problem<TypeParam, double> problem({9, 2, channels}, 11, 0.5, Layout::steps_first, starts);
        const Buffer<double> weights = Buffer<double>::random(problem.recurrence.shape(), 12);
        const auto loss = [&] {
            const auto x = evaluate(problem.recurrence, {.method = Method::sequential}).trajectory;
            double sum = 0;
            for (index i = 0; i < x.size(); ++i) sum += x.data()[i] * weights.data()[i];
            return sum;
        };
        const auto [x, report] = evaluate(problem.recurrence, {.method = Method::sequential});
        for (const Backend backend : {Backend::reference, Backend::cpu}) {
            const CellGradients<double> gradients =
                adjoint(problem.recurrence, x.view(), report, weights.view(), {.execution = {.backend = backend}});
            const auto check = [&](Buffer<double>& values, const Buffer<double>& gradient, const char* name) {
                for (index i = 0; i < values.size(); i += std::max<index>(1, values.size() / 23)) {
                    const double here = values.data()[i], step = 1e-5;
                    values.data()[i] = here + step;
                    const double up = loss();
                    values.data()[i] = here - step;
                    const double down = loss();
                    values.data()[i] = here;
                    const double quotient = (up - down) / (2 * step);
                    EXPECT_NEAR(gradient.data()[i], quotient, 1e-5 * std::max(1.0, std::abs(quotient)))
                        << name << " " << i;
                }
            };
            check(problem.inputs, gradients.inputs, "inputs");
            check(problem.parameters, gradients.parameters, "parameters");
            check(problem.initial, gradients.initial, "initial");
        }
    }
}

TYPED_TEST(CellTest, ChunkedGradientsEqualSequential) {
    for (const index channels : {1, 3, 16, 37})
        for (const index batch : {1, 3}) {
            const Problem<TypeParam, float> problem({700, batch, channels}, 13, 0.5, Layout::batch_first, {{0, 300}});
            const Buffer<float> weights = Buffer<float>::random(problem.recurrence.shape(), 14);
            const auto [x, report] = evaluate(problem.recurrence, {.method = Method::sequential});
            const auto expected =
                adjoint(problem.recurrence, x.view(), report, weights.view(), {.method = Method::sequential});
            const auto chunked = adjoint(problem.recurrence, x.view(), report, weights.view(), {.chunk = 50});
            const auto compare = [&](const Buffer<float>& a, const Buffer<float>& b) {
                double size = 0;
                for (index i = 0; i < a.size(); ++i) size = std::max(size, std::abs(double(a.data()[i])));
                EXPECT_LE(largest_difference<float>(a, b), 2e-5 * size) << chunked.report.method;
            };
            compare(expected.inputs, chunked.inputs);
            compare(expected.parameters, chunked.parameters);
            compare(expected.initial, chunked.initial);
        }
}

TYPED_TEST(CellTest, ReversedInTime) {
    // Reversed views give what reversed copies give, for every method and for the gradients.
    for (const index channels : {1, 3, 17}) {
        const Problem<TypeParam, float> problem({500, 2, channels}, 19);
        const auto flip = [](const Buffer<float>& values) {
            Buffer<float> flipped(values.shape());
            for (index i = 0; i < values.shape().steps; ++i)
                std::copy_n(values.view().reversed().at(i, 0), values.shape().batch * values.shape().width,
                            flipped.view().at(i, 0));
            return flipped;
        };
        const Buffer<float> flipped = flip(problem.inputs);
        const CellRecurrence<TypeParam> backwards(problem.inputs.view().reversed(), problem.parameters.view(),
                                                  problem.initial.view());
        const CellRecurrence<TypeParam> copied(flipped.view(), problem.parameters.view(), problem.initial.view());
        for (const Method method : {Method::sequential, Method::overlap, Method::shooting, Method::newton}) {
            const Buffer<float> x(problem.recurrence.shape());
            const Report report = evaluate(backwards, x.view().reversed(), {.method = method, .chunk = 100});
            const auto expected = evaluate(copied, {.method = method, .chunk = 100});
            EXPECT_TRUE(same_bits<float>(flip(x), expected.trajectory)) << to_string(method);
            const Buffer<float> weights = Buffer<float>::random(x.shape(), 20);
            const auto gradients = adjoint(backwards, x.view().reversed(), report, weights.view(), {.chunk = 100});
            const auto expected_gradients =
                adjoint(copied, expected.trajectory.view(), expected.report, weights.view(), {.chunk = 100});
            EXPECT_TRUE(same_bits<float>(gradients.inputs, expected_gradients.inputs));
            EXPECT_TRUE(same_bits<float>(gradients.parameters, expected_gradients.parameters));
        }
    }
}

TYPED_TEST(CellTest, OverlapAndShootingEqualSequential) {
    for (const index channels : {1, 3, 16, 37})
        for (const index batch : {1, 3, 17})
            for (const Method method : {Method::overlap, Method::shooting, Method::automatic})
                for (const index chunk : {0, 13, 100}) {
                    SCOPED_TRACE(to_string(method) + to_string(Shape{1000, batch, channels}) + std::to_string(chunk));
                    const Problem<TypeParam, float> problem({1000, batch, channels}, 15, 0.5, Layout::steps_first,
                                                            {{0, 300}, {0, 301}});
                    const auto expected = evaluate(problem.recurrence, {.method = Method::sequential});
                    const auto found = evaluate(problem.recurrence, {.method = method, .chunk = chunk});
                    EXPECT_TRUE(found.report.ok()) << found.report;
                    if (method != Method::automatic) {
                        EXPECT_TRUE(found.report.method.starts_with(to_string(method)) &&
                                    found.report.method.find("chunks") != std::string::npos)
                            << found.report.method;
                    }
                    double size = 1;
                    for (index i = 0; i < expected.trajectory.size(); ++i)
                        size = std::max(size, std::abs(double(expected.trajectory.data()[i])));
                    EXPECT_LE(largest_difference<float>(expected.trajectory, found.trajectory), 2e-4 * size)
                        << found.report;
                    EXPECT_LE(found.report.relative_residual, 1);
                }
}

/// The largest |x_t - f(x_{t-1})| over what is allowed, computed anew, step by step; NaN counts as infinite.
template <class T>
double largest_relative_residual(const ChannelwiseRecurrence<T>& recurrence, View<const T> x, double tolerance) {
    const auto [steps, batch, width] = recurrence.shape();
    const Buffer<T> before({steps, batch, width}), after({steps, batch, width});
    std::vector<index> sequences;
    for (index j = 0; j < batch; ++j) sequences.push_back(j);
    const Section section{0, steps, sequences, {}};
    recurrence.initial(section, before.view().steps(0, 1));
    for (index i = 1; i < steps; ++i)
        for (index j = 0; j < batch; ++j) std::copy_n(x.at(i - 1, j), width, before.view().at(i, j));
    recurrence.step(section, before.view(), after.view());
    double largest = 0;
    for (index i = 0; i < steps; ++i)
        for (index j = 0; j < batch; ++j) {
            double residual = 0, size = 0;
            for (index k = 0; k < width; ++k) {
                const double difference = std::abs(double(x(i, j, k)) - double(after(i, j, k)));
                residual = scalar_functions::larger_or_nan(residual, difference);
                size = std::max(size, std::abs(double(x(i, j, k))));
            }
            const double relative = residual / (tolerance * (1 + size));
            largest = std::max(largest, std::isnan(relative) ? HUGE_VAL : relative);
        }
    return largest;
}

/// Whatever the cell, its weights (chaotic ones among them), sizes and options: a result that calls itself right is.
TYPED_TEST(CellTest, RandomProblemsAreRightOrSayThatTheyAreNot) {
    std::mt19937_64 random(17);
    const auto draw = [&](index least, index most) {
        return std::uniform_int_distribution<index>(least, most)(random);
    };
    index finished = 0;
    for (int round = 0; round < 300; ++round) {
        const Shape channels{draw(1, round % 10 == 0 ? 3000 : 400), draw(1, 3), draw(1, 20)};
        const double scale = std::exp2(double(draw(-2, 3)));
        std::vector<SequenceStart> starts;
        if (channels.steps > 3 && draw(0, 1) == 1)
            starts.push_back({draw(0, channels.batch - 1), draw(1, channels.steps - 2)});
        const Problem<TypeParam, float> problem(channels, 100 + std::uint64_t(round), scale, Layout::steps_first,
                                                starts);
        const double tolerance = std::pow(10.0, double(draw(-6, -3)));
        Options options{
            .method = std::array{Method::automatic, Method::overlap, Method::shooting}[std::size_t(round % 3)],
            .chunk = draw(0, 1) * draw(1, 100),
            .guess = draw(0, 1) == 1 ? Guess::given : Guess::initial_state,
            .tolerance = tolerance,
            .max_iterations = draw(0, 3) == 0 ? draw(1, 5) : 0,
            .on_failure = draw(0, 2) == 0 ? OnFailure::report : OnFailure::finish,
            .execution = {.threads = int(draw(1, 3))}};
        const auto x = Buffer<float>::random(problem.recurrence.shape(), 5);
        if (draw(0, 3) == 0) x(0, 0, 0) = std::numeric_limits<float>::quiet_NaN();
        const Report report = evaluate(problem.recurrence, x.view(), options);
        SCOPED_TRACE(testing::Message() << "round " << round << ", " << to_string(channels) << ", scale " << scale
                                        << ": " << report);
        finished += report.status == Status::finished_sequentially;
        if (report.ok()) {
            EXPECT_LE(largest_relative_residual<float>(problem.recurrence, x.view(), tolerance), 1.0001);
            EXPECT_LE(report.relative_residual, 1);
        } else {
            EXPECT_TRUE(options.on_failure == OnFailure::report || report.status == Status::non_finite);
        }
    }
    if (!std::is_same_v<TypeParam, DiagonalElman>) {
        EXPECT_GT(finished, 0);
    }
}

/// Backward from boundary states alone, for segments of every kind, against the backward pass from all states.
TYPED_TEST(CellTest, RecomputedGradientsEqualThoseFromAllStates) {
    const std::vector<SequenceStart> starts{{0, 7}, {1, 20}, {1, 24}};
    for (const index channels : {1, 5, 17}) {
        Problem<TypeParam, double> problem({40, 2, channels}, 31, 0.5, Layout::steps_first, starts);
        const auto& recurrence = problem.recurrence;
        const Buffer<double> weights = Buffer<double>::random(recurrence.shape(), 5);
        const Options options{.method = Method::sequential};
        const auto [trajectory, report] = evaluate(recurrence, options);
        const auto expected = adjoint(recurrence, trajectory, report, weights, options);
        for (const index segment : {1, 3, 8, 20, 39, 40, 100})
            for (const Method method : {Method::sequential, Method::overlap}) {
                const Options again{.method = method, .chunk = 5, .tolerance = 1e-14};
                const index count = (40 + segment - 1) / segment;
                Buffer<double> boundaries({count, 2, recurrence.shape().width});
                Buffer<double> seen(recurrence.shape());
                const Report kept = evaluate_boundaries<double>(
                    recurrence, segment, boundaries, again, [&](index first, View<const double> states) {
                        std::copy_n(states.data(), states.shape().count(), seen.view().at(first, 0));
                    });
                EXPECT_TRUE(kept.ok());
                EXPECT_LE(largest_difference<double>(seen, trajectory), method == Method::sequential ? 0 : 1e-11);
                for (index s = 1; s < count; ++s)
                    EXPECT_TRUE(same_bits<double>(boundaries.view().steps(s, s + 1),
                                                  seen.view().steps(s * segment - 1, s * segment)));
                const auto found = adjoint_from_boundaries(recurrence, segment, boundaries, kept, weights, again);
                EXPECT_LE(largest_difference<double>(found.inputs, expected.inputs), 1e-10) << segment;
                EXPECT_LE(largest_difference<double>(found.parameters, expected.parameters), 1e-9) << segment;
                EXPECT_LE(largest_difference<double>(found.initial, expected.initial), 1e-10) << segment;
            }
    }
}

TEST(CellAutomatic, SaysWhatItWeighedAndGoesByWhatItMeasured) {
    const auto inputs = Buffer<float>::random({6000, 1, 6}, 1), parameters = Buffer<float>::random({3, 1, 2}, 2);
    const CellRecurrence<ParaGRU> recurrence(inputs, parameters);
    for (int call = 0; call < 8; ++call) {
        const Report report = evaluate(recurrence).report;
        ASSERT_FALSE(report.candidates.empty());
        EXPECT_TRUE(report.method.starts_with(to_string(report.candidates.front().method))) << report;
        bool sequential = false;
        for (const Report::Candidate& candidate : report.candidates) {
            EXPECT_GT(candidate.seconds, 0);
            sequential |= candidate.method == Method::sequential;
        }
        EXPECT_TRUE(sequential) << "the baseline is always weighed";
        if (call >= 6) {  // two of each method
            EXPECT_TRUE(report.candidates.front().measured) << report;
        }
    }
    std::ostringstream text;
    text << evaluate(recurrence).report;
    EXPECT_NE(text.str().find("chosen as expected to take"), std::string::npos) << text.str();
    EXPECT_TRUE(evaluate(recurrence, {.method = Method::overlap}).report.candidates.empty());
}

TEST(CellSegments, TakeMemoryOfOneSegment) {
    const Problem<ParaGRU, float> problem({4096, 1, 64}, 3);
    const Buffer<float> weights = Buffer<float>::random(problem.recurrence.shape(), 5);
    Buffer<float> boundaries({64, 1, 64});
    const Options options{.method = Method::sequential};
    const Report report = evaluate_boundaries<float>(problem.recurrence, 64, boundaries, options);
    const auto gradients = adjoint_from_boundaries(problem.recurrence, 64, boundaries, report, weights, options);
    // The trajectory alone would be 1 MiB.
    EXPECT_LE(report.workspace_bytes, 64 << 10);
    EXPECT_LE(gradients.report.workspace_bytes, 256 << 10);
}

TEST(CellSegments, RefuseWhatDoesNotFit) {
    const Problem<ParaGRU, float> problem({10, 1, 2}, 3);
    Buffer<float> boundaries({4, 1, 2}), output_gradient(problem.recurrence.shape());
    const Report report = evaluate_boundaries<float>(problem.recurrence, 3, boundaries);
    EXPECT_THROW(evaluate_boundaries<float>(problem.recurrence, 0, boundaries), InvalidArgument);
    EXPECT_THROW(evaluate_boundaries<float>(problem.recurrence, 2, boundaries), InvalidArgument);
    EXPECT_THROW(adjoint_from_boundaries(problem.recurrence, 4, boundaries, report, output_gradient), InvalidArgument);
    EXPECT_THROW(adjoint_from_boundaries(problem.recurrence, 3, boundaries, report, boundaries), InvalidArgument);
    Report bad = report;
    bad.status = Status::max_iterations;
    EXPECT_THROW(adjoint_from_boundaries(problem.recurrence, 3, boundaries, bad, output_gradient), InvalidArgument);
    EXPECT_THROW(problem.recurrence.segment(5, 5, boundaries.view().steps(0, 1)), InvalidArgument);
    EXPECT_THROW(problem.recurrence.segment(0, 5, boundaries), InvalidArgument);
}

TEST(CellArguments, SayWhatIsWrong) {
    const Buffer<float> inputs({5, 2, 9}), parameters({3, 1, 3}), odd({5, 2, 10}), states({1, 2, 3});
    using GRU = CellRecurrence<ParaGRU>;
    EXPECT_NE(message_of([&] { GRU(odd.view(), parameters.view()); }).find("inputs"), std::string::npos);
    EXPECT_NE(message_of([&] { GRU(inputs.view(), states.view()); }).find("parameters"), std::string::npos);
    EXPECT_NE(message_of([&] { GRU(inputs.view(), parameters.view(), parameters.view()); }).find("initial"),
              std::string::npos);
    EXPECT_NE(message_of([&] {
                  GRU(inputs.view(), parameters.view(), {}, {{0, 3}, {0, 3}});
              }).find("starts[1].step"),
              std::string::npos);
    EXPECT_NE(message_of([&] {
                  GRU(inputs.view(), parameters.view(), {}, {{0, 5}});
              }).find("starts[0].step"),
              std::string::npos);
    EXPECT_NE(message_of([&] {
                  GRU(inputs.view(), parameters.view(), {}, {{1, 3}, {0, 3}});
              }).find("starts[1].sequence"),
              std::string::npos);
    EXPECT_EQ(message_of([&] { GRU(inputs.view(), parameters.view(), states.view()); }), nothing_thrown);
}

}  // namespace
}  // namespace deeppcr
