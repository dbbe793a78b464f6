// Hard dynamics: damping, Anderson acceleration and the ladder, where Newton's method alone has a hard time; and the
// Report's estimates against the truth, which is the same recurrence in double, step after step.

#include <gtest/gtest.h>
#include <deeppcr/deeppcr.hpp>

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "newton/options.hpp"
#include "reduce/damped.hpp"
#include "tests/compare.hpp"

namespace deeppcr {
namespace {

Buffer<double> in_double(const Buffer<float>& buffer) {
    Buffer<double> result = Buffer<double>::uninitialised(buffer.shape());
    std::copy_n(buffer.data(), buffer.size(), result.data());
    return result;
}

Buffer<float> random(const Shape& shape, std::uint64_t seed, double scale) {
    Buffer<float> result = Buffer<float>::random(shape, seed);
    for (index k = 0; k < result.size(); ++k) result.data()[k] *= float(scale);
    return result;
}

/// A recurrence in float and the same in double, with the arrays that they look at.
struct Problem {
    std::vector<Buffer<float>> arrays;
    std::vector<Buffer<double>> arrays_double;
    std::unique_ptr<Recurrence<float>> recurrence;
    std::unique_ptr<Recurrence<double>> exact;

    explicit Problem(std::vector<Buffer<float>> all) : arrays(std::move(all)) {
        for (const Buffer<float>& array : arrays) arrays_double.push_back(in_double(array));
    }

    static Problem dense(DenseCellKind kind, const Shape& states, double weight, double input, std::uint64_t seed) {
        const index hidden = kind == DenseCellKind::lstm ? states.width / 2 : states.width, gates = gate_count(kind);
        std::vector<Buffer<float>> all;
        all.push_back(random({states.steps, states.batch, gates * hidden}, seed, input));
        all.push_back(random({gates, hidden, hidden}, seed + 100, weight / std::sqrt(double(hidden))));
        all.push_back(Buffer<float>({gates, 1, hidden}));
        all.push_back(Buffer<float>({1, states.batch, states.width}));
        Problem problem(std::move(all));
        const auto& [u, w, b, x] = std::tie(problem.arrays[0], problem.arrays[1], problem.arrays[2], problem.arrays[3]);
        problem.recurrence = std::make_unique<DenseCell<float>>(kind, u, w, b, x);
        const auto& d = problem.arrays_double;
        problem.exact = std::make_unique<DenseCell<double>>(kind, d[0], d[1], d[2], d[3]);
        return problem;
    }

    template <class C>
    static Problem cell(index steps, index batch, index channels, double weight, double input, std::uint64_t seed) {
        std::vector<Buffer<float>> all;
        all.push_back(random({steps, batch, C::inputs * channels}, seed, input));
        all.push_back(random({C::parameters, 1, channels}, seed + 100, weight));
        Problem problem(std::move(all));
        problem.recurrence = std::make_unique<CellRecurrence<C, float>>(problem.arrays[0], problem.arrays[1]);
        problem.exact = std::make_unique<CellRecurrence<C, double>>(problem.arrays_double[0], problem.arrays_double[1]);
        return problem;
    }

    Evaluation<double> truth() const { return evaluate(*exact, {.method = Method::sequential}); }
};

/// Largest |x_t - f(x_{t-1})| / (1 + |x_t|), f in double: computed anew, from nothing but the recurrence.
double largest_residual(const Problem& problem, View<const float> trajectory) {
    const auto [steps, batch, width] = trajectory.shape();
    Buffer<double> before({steps, batch, width}), after({steps, batch, width});
    const std::vector<index> sequences = all(batch);
    const Section section{0, steps, sequences};
    problem.exact->initial(section, before.view().steps(0, 1));
    for (index i = 1; i < steps; ++i)
        for (index j = 0; j < batch; ++j) std::copy_n(trajectory.at(i - 1, j), width, before.view().at(i, j));
    problem.exact->step(section, View<const double>(before.view()), after);
    double largest = 0;
    for (index i = 0; i < steps; ++i)
        for (index j = 0; j < batch; ++j) {
            double size = 0, residual = 0;
            for (index k = 0; k < width; ++k) {
                size = std::max(size, std::abs(double(trajectory(i, j, k))));
                residual = std::max(residual, std::abs(double(trajectory(i, j, k)) - after(i, j, k)));
            }
            largest = std::max(largest, residual / (1 + size));
        }
    return largest;
}

// --- the damped system

double gradient_of_damped(const Jacobian<const double>& A, View<const double> b, View<const double> x,
                          const std::vector<double>& damping) {
    const index K = A.block();
    const auto residual = [&](index t, index j, index k) {
        double sum = x(t, j, k) - b(t, j, k);
        for (index m = 0; t > 0 && m < K; ++m) sum -= A(t, j, k, m) * x(t - 1, j, k / K * K + m);
        return sum;
    };
    double largest = 0;
    for (index t = 0; t < x.steps(); ++t)
        for (index j = 0; j < x.batch(); ++j)
            for (index k = 0; k < x.width(); ++k) {
                double gradient = residual(t, j, k) + damping[std::size_t(j)] * x(t, j, k);
                for (index m = 0; t + 1 < x.steps() && m < K; ++m)
                    gradient -= A(t + 1, j, k / K * K + m, k % K) * residual(t + 1, j, k / K * K + m);
                largest = std::max(largest, std::abs(gradient) / (1 + std::abs(x(t, j, k))));
            }
    return largest;
}

TEST(Damped, SolutionIsWhereTheGradientVanishesForEveryChunk) {
    std::uint64_t seed = 1;
    for (const index block : {1, 2, 3, 4, 8})
        for (const double scale : {0.5, 1.5, 3.0})
            for (const double damping : {1e-6, 1e-2, 1.0, 100.0})
                for (const auto& [steps, chunk] : std::vector<std::pair<index, index>>{
                         {1, 0}, {2, 1}, {50, 0}, {50, 1}, {50, 7}, {50, 25}, {50, 49}}) {
                    const Shape shape{steps, 2, 2 * block};
                    Buffer<double> A = Buffer<double>::random({steps, 2, 2 * block * block}, ++seed);
                    for (index k = 0; k < A.size(); ++k) A.data()[k] *= scale / std::sqrt(double(block));
                    const Buffer<double> b = Buffer<double>::random(shape, ++seed);
                    const Buffer<double> x = b.clone();
                    const Jacobian<const double> jacobian(A.data(), shape, block);
                    const std::vector<double> each{damping, 2 * damping};
                    reduce::solve_damped<double>(jacobian, x, each, chunk, 2);
                    EXPECT_LE(gradient_of_damped(jacobian, b, x, each), 1e-8)
                        << block << " " << scale << " " << damping << " " << steps << " " << chunk;
                }
}

TEST(Damped, WithoutDampingItIsTheBidiagonalSolve) {
    for (const index block : {1, 2, 5}) {
        const Shape shape{40, 3, 2 * block};
        Buffer<double> A = Buffer<double>::random({40, 3, 2 * block * block}, 3);
        for (index k = 0; k < A.size(); ++k) A.data()[k] *= 0.7 / std::sqrt(double(block));
        const Buffer<double> b = Buffer<double>::random(shape, 4), x = b.clone(), expected = b.clone();
        const Jacobian<const double> jacobian(A.data(), shape, block);
        reduce::solve_damped<double>(jacobian, x, std::vector<double>(3, 0.0), 7, 1);
        solve(BidiagonalSystem<double>{jacobian, b}, expected, {.method = Reduction::sequential});
        for (index k = 0; k < x.size(); ++k) EXPECT_NEAR(x.data()[k], expected.data()[k], 1e-11);
    }
}

// --- an 8-wide network tanh(W h + u) over 1,024 steps, from contractive to chaotic

constexpr index network_steps = 1024, network_width = 8;
constexpr double scales[] = {0.5, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 2.8, 3.0};

Problem network(double scale) {
    return Problem::dense(DenseCellKind::elman_tanh, {network_steps, 1, network_width}, scale, 0.2, 5);
}

TEST(HardDynamics, EveryRowOfTheTableIsRight) {
    std::printf("dense tanh network, 8 wide, 1,024 steps, float, tolerance 7.6e-6 absolute and relative\n");
    std::printf("%8s %9s  %-32s %7s %7s %7s  %-22s %9s %9s %9s\n", "weights", "Lyapunov", "method", "passes", "damped",
                "serial", "status", "residual", "error", "estimate");
    double smallest = 1, largest = -1;
    for (const double scale : scales) {
        const Problem problem = network(scale);
        const Evaluation<double> truth =
            evaluate(*problem.exact, {.method = Method::sequential, .estimates = Estimates::full});
        const double exponent = truth.report.lyapunov;
        smallest = std::min(smallest, exponent);
        largest = std::max(largest, exponent);
        std::vector<Options> all;
        for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::identity, Surrogate::zero})
            all.push_back({.surrogate = surrogate});
        all.push_back({.damping = 0});
        all.push_back({.damping = 1});
        all.push_back({.surrogate = Surrogate::zero, .anderson = 3});
        for (Options options : all) {
            options.method = Method::newton;
            options.reduction = Reduction::scan;
            options.estimates = Estimates::full;
            const auto [trajectory, report] = evaluate(*problem.recurrence, options);
            const double error = largest_difference<float, double>(trajectory, truth.trajectory);
            std::string method = report.method.substr(8);
            method = method.substr(0, method.find(','));
            if (options.damping >= 0) method += options.damping > 0 ? ", damped" : ", never damped";
            if (options.anderson > 0) method += ", Anderson";
            std::printf("%8.1f %9.3f  %-32s %7d %7d %7d  %-22s %9.1e %9.1e %9.1e\n", scale, exponent, method.c_str(),
                        int(report.iterations), int(report.damped_passes), int(report.sequential_steps),
                        to_string(report.status).c_str(), report.residual, error, report.error);
            EXPECT_TRUE(report.ok());
            EXPECT_LE(report.relative_residual, 1);
            EXPECT_LE(largest_residual(problem, trajectory), 64 * std::numeric_limits<float>::epsilon() + 1e-6);
            EXPECT_GE(report.error, error / 10);
            // Not a bound so loose that it says nothing, where there is something to say.
            if (exponent < -0.1) {
                EXPECT_LE(report.error, 100 * error);
            }
        }
    }
    EXPECT_LE(smallest, -0.8);
    EXPECT_GE(largest, 0.08);
}

/// Newton's method as it is usually written: whole-trajectory updates until the residual is small. `frozen`: the first
/// step that does not pass the test takes f itself, and what is before it stays. Passes, or -1 after `steps` of them.
index plain_newton(const Recurrence<float>& recurrence, bool frozen) {
    const Shape& shape = recurrence.shape();
    const auto [steps, batch, width] = shape;
    Buffer<float> states({steps + 1, 1, width}), after(shape), update(shape), jacobian({steps, 1, width * width});
    const index sequences[] = {0};
    const Section section{0, steps, sequences};
    recurrence.initial(section, states.view().steps(0, 1));
    const float tolerance = 64 * std::numeric_limits<float>::epsilon();
    for (index pass = 1; pass <= steps; ++pass) {
        const Jacobian<float> J(jacobian.data(), shape, width);
        recurrence.linearise(section, View<const float>(states.view().steps(0, steps)), after, J);
        index confirmed = steps;
        for (index i = steps - 1; i >= 0; --i) {
            float residual = 0, size = 0;
            for (index k = 0; k < width; ++k) {
                update(i, 0, k) = after(i, 0, k) - states(i + 1, 0, k);
                residual = std::max(residual, std::abs(update(i, 0, k)));
                size = std::max(size, std::abs(states(i + 1, 0, k)));
                if (!std::isfinite(update(i, 0, k))) residual = std::numeric_limits<float>::infinity();
            }
            if (!(residual <= tolerance * (1 + size))) confirmed = i;
        }
        if (confirmed == steps) return pass;
        const index from = frozen ? confirmed : 0;
        const View<float> rest = update.view().steps(from, steps);
        solve(BidiagonalSystem<float>{J.steps(from, steps), rest}, rest, {.method = Reduction::scan, .chunk = 32});
        for (index i = from; i < steps; ++i)
            for (index k = 0; k < width; ++k) {
                const float next = states(i + 1, 0, k) + update(i, 0, k);
                if (frozen && i == from)
                    states(i + 1, 0, k) = after(i, 0, k);
                else if (!frozen || std::isfinite(next))
                    states(i + 1, 0, k) = next;
            }
    }
    return -1;
}

TEST(HardDynamics, TheFrozenPrefixIsWhatConverges) {
    // Where the exponent is about -0.04 (how many passes differs from network to network), and above 0.
    struct Case {
        std::uint64_t seed;
        double scale;
        index most;  // passes with the frozen prefix
    };
    for (const auto& [seed, scale, most] : {Case{3, 1.3, 75}, Case{9, 1.5, 75}, Case{21, 1.6, 75}, Case{5, 1.6, 820},
                                            Case{5, 2.8, 820}, Case{5, 3.0, 820}}) {
        const Problem problem =
            Problem::dense(DenseCellKind::elman_tanh, {network_steps, 1, network_width}, scale, 0.2, seed);
        const double exponent =
            evaluate(*problem.exact, {.method = Method::sequential, .estimates = Estimates::full}).report.lyapunov;
        const index without = plain_newton(*problem.recurrence, false), with = plain_newton(*problem.recurrence, true);
        const Report ladder = evaluate(*problem.recurrence, {.method = Method::newton}).report;
        std::printf(
            "weights %.1f, Lyapunov exponent %.3f: plain Newton %d passes, with the frozen prefix %d, deeppcr %d "
            "and %d steps sequentially\n",
            scale, exponent, int(without), int(with), int(ladder.iterations), int(ladder.sequential_steps));
        EXPECT_TRUE(without == -1 || without > 100);
        EXPECT_GT(with, 0);
        EXPECT_LE(with, most);
        EXPECT_TRUE(ladder.ok());
        EXPECT_LE(ladder.iterations, most);
    }
}

TEST(HardDynamics, DampingAndAndersonReachTheSameTrajectory) {
    for (const double scale : {0.6, 1.4, 3.0}) {
        const Problem problem = network(scale);
        const Buffer<float> expected = evaluate(*problem.recurrence, {.method = Method::sequential}).trajectory;
        for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::identity, Surrogate::zero})
            for (const double damping : {-1.0, 0.0, 1.0})
                for (const index anderson : {0, 1, 16})
                    for (const index window : {0, 1, 100}) {
                        const Options options{.method = Method::newton,
                                              .surrogate = surrogate,
                                              .tolerance = 1e-6,
                                              .window = window,
                                              .damping = damping,
                                              .anderson = anderson};
                        const auto [trajectory, report] = evaluate(*problem.recurrence, options);
                        EXPECT_TRUE(report.ok());
                        EXPECT_LE(largest_residual(problem, trajectory), 3e-6);
                        for (index k = 0; window == 1 && k < expected.size(); ++k)
                            ASSERT_EQ(trajectory.data()[k], expected.data()[k]);
                        const auto again = evaluate(*problem.recurrence, options);
                        for (index k = 0; k < expected.size(); ++k)
                            ASSERT_EQ(trajectory.data()[k], again.trajectory.data()[k]);
                    }
    }
}

/// x_t = x_{t-1} + h g(x_{t-1}) for a pendulum with friction: small steps, as of a differential equation.
class Pendulum : public Recurrence<double> {
public:
    explicit Pendulum(index steps) : Recurrence<double>({steps, 2, 2}) {}
    void initial(const Section& section, View<double> state) const override {
        for (index j = 0; j < section.batch(); ++j) {
            state(0, j, 0) = 1 + 0.5 * double(section.sequences[std::size_t(j)]);
            state(0, j, 1) = 0;
        }
    }
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                after(i, j, 0) = before(i, j, 0) + h * before(i, j, 1);
                after(i, j, 1) = before(i, j, 1) - h * (std::sin(before(i, j, 0)) + 0.1 * before(i, j, 1));
            }
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                jacobian(i, j, 0, 0) = 1;
                jacobian(i, j, 0, 1) = h;
                jacobian(i, j, 1, 0) = -h * std::cos(before(i, j, 0));
                jacobian(i, j, 1, 1) = 1 - 0.1 * h;
            }
    }

private:
    static constexpr double h = 0.01;
};

TEST(Anderson, SavesPassesOfPicardIterationOnADifferentialEquation) {
    const Pendulum pendulum(500);
    index before = std::numeric_limits<index>::max();
    for (const index anderson : {0, 2, 5}) {
        const Report report = evaluate(pendulum, {.method = Method::newton,
                                                  .surrogate = Surrogate::identity,
                                                  .tolerance = 1e-10,
                                                  .damping = 0,
                                                  .anderson = anderson})
                                  .report;
        std::printf("Picard, Anderson %d: %d passes\n", int(anderson), int(report.iterations));
        EXPECT_EQ(report.status, Status::converged);
        EXPECT_LT(report.iterations, before);
        before = report.iterations;
    }
}

// --- the Report's estimates against the truth

TEST(Estimates, LyapunovExponentOfKnownProducts) {
    // x' = tanh(a x) at x = 0: the Jacobian is a.
    const Buffer<float> u({2000, 1, 3}), p = Buffer<float>({1, 1, 3});
    p.data()[0] = 0.5F;
    p.data()[1] = -0.9F;
    p.data()[2] = 0.1F;
    const CellRecurrence<DiagonalElman> cell(u, p);
    for (const Method method : {Method::newton, Method::sequential, Method::overlap, Method::shooting}) {
        const Report report = evaluate(cell, {.method = method, .estimates = Estimates::full}).report;
        EXPECT_NEAR(report.lyapunov, std::log(0.9), 1e-5) << to_string(method);
        EXPECT_EQ(report.error, 0) << to_string(method);
    }
}

TEST(Estimates, LyapunovExponentIsHowFastTwoTrajectoriesPart) {
    for (const double scale : {1.0, 2.8, 3.0}) {
        const Problem problem = network(scale);
        const double exponent =
            evaluate(*problem.exact, {.method = Method::sequential, .estimates = Estimates::full}).report.lyapunov;
        // Two trajectories a hair apart, brought back to a hair after every step: growth along the true dynamics.
        std::vector<double> a(network_width, 0.0), b(network_width, 1e-7);
        double growth = 0;
        const Buffer<double>&u = problem.arrays_double[0], &w = problem.arrays_double[1];
        for (index t = 0; t < network_steps; ++t) {
            const auto advance = [&](const std::vector<double>& x) {
                std::vector<double> next(network_width);
                for (index i = 0; i < network_width; ++i) {
                    double sum = u(t, 0, i);
                    for (index k = 0; k < network_width; ++k) sum += w(0, i, k) * x[std::size_t(k)];
                    next[std::size_t(i)] = std::tanh(sum);
                }
                return next;
            };
            const auto distance = [&] {
                double sum = 0;
                for (std::size_t k = 0; k < a.size(); ++k) sum += (a[k] - b[k]) * (a[k] - b[k]);
                return std::sqrt(sum);
            };
            const double before = distance();
            a = advance(a);
            b = advance(b);
            const double after = distance();
            growth += std::log(after / before);
            for (std::size_t k = 0; k < a.size(); ++k) b[k] = a[k] + (b[k] - a[k]) * 1e-7 / after;
        }
        // Where it is chaotic, rounding makes another trajectory of it: another sample of the same exponent.
        EXPECT_NEAR(exponent, growth / double(network_steps), 0.03) << scale;
    }
}

Problem random_problem(std::mt19937_64& draw) {
    const auto uniform = [&](double low, double high) {
        return std::uniform_real_distribution<double>(low, high)(draw);
    };
    const auto steps = index(std::exp(uniform(0, std::log(5000.0))));
    const auto channels = index(uniform(1, 9)), batch = index(uniform(1, 4));
    const double weight = std::exp(uniform(std::log(0.1), std::log(4.0)));
    const double input = std::exp(uniform(std::log(0.05), std::log(3.0)));
    const std::uint64_t seed = draw() % 100000;
    switch (draw() % 7) {
        case 0:
            return Problem::cell<ParaGRU>(steps, batch, channels, weight, input, seed);
        case 1:
            return Problem::cell<ParaLSTM>(steps, batch, channels, weight, input, seed);
        case 2:
            return Problem::cell<DiagonalElman>(steps, batch, channels, weight, input, seed);
        case 3:
            return Problem::cell<SLSTM>(steps, batch, channels, weight, input, seed);
        case 4:
            return Problem::dense(DenseCellKind::elman_tanh, {steps, batch, channels}, weight, input, seed);
        case 5:
            return Problem::dense(DenseCellKind::gru, {steps, batch, channels}, weight, input, seed);
        default:
            return Problem::dense(DenseCellKind::lstm, {steps, batch, 2 * channels}, weight, input, seed);
    }
}

template <class T, std::size_t n>
T one_of(std::mt19937_64& draw, const T (&values)[n]) {
    return values[draw() % n];
}

TEST(Estimates, ErrorOfAThousandRandomRecurrences) {
    std::mt19937_64 draw(1);
    index covered = 0, tight = 0, unreported = 0;
    constexpr index count = 1000;
    std::vector<double> ratios;
    for (index n = 0; n < count; ++n) {
        const Problem problem = random_problem(draw);
        const bool cell = dynamic_cast<const ChannelwiseRecurrence<float>*>(problem.recurrence.get()) != nullptr;
        const Method methods[] = {Method::automatic, Method::newton, Method::sequential, Method::overlap,
                                  Method::shooting};
        Options options{.method = methods[draw() % (cell ? 5 : 3)], .estimates = Estimates::full};
        if (draw() % 2 == 0) options.tolerance = 1e-5;
        const auto [trajectory, report] = evaluate(*problem.recurrence, options);
        const double error = largest_difference<float, double>(trajectory, problem.truth().trajectory);
        const double tolerance = newton::tolerance_of<float>(options).relative;
        if (!report.ok() || !(largest_residual(problem, trajectory) <= tolerance + 2e-6)) ++unreported;
        covered += index(report.error >= error / 10);
        tight += index(report.error >= error / 10 && report.error <= error * 10);
        ratios.push_back(error > 0 ? report.error / error : 1);
    }
    std::sort(ratios.begin(), ratios.end());
    std::printf(
        "estimate / error: smallest %.2g, 1%% %.2g, median %.2g, 99%% %.2g; at least a tenth in %d of %d, within "
        "a factor of ten in %d; not right and not reported: %d\n",
        ratios.front(), ratios[count / 100], ratios[count / 2], ratios[count * 99 / 100], int(covered), int(count),
        int(tight), int(unreported));
    EXPECT_GE(covered, count * 99 / 100);
    EXPECT_GE(tight, count * 2 / 3);
    EXPECT_EQ(unreported, 0);
}

template <class C>
void check_accuracy(double weight) {
    const Problem problem = Problem::cell<C>(2048, 1, 256, weight, 1, 11);
    const Buffer<double> truth = problem.truth().trajectory;
    double size = 0;
    for (index k = 0; k < truth.size(); ++k) size = std::max(size, std::abs(truth.data()[k]));
    for (const Method method :
         {Method::automatic, Method::sequential, Method::overlap, Method::shooting, Method::newton}) {
        const auto [trajectory, report] =
            evaluate(*problem.recurrence, {.method = method, .estimates = Estimates::full});
        const double error = largest_difference<float, double>(trajectory, truth) / size;
        std::printf("%s, coefficients N(0, %g), %-10s: error %.1e, estimate %.1e, Lyapunov exponent %.3f, %s\n",
                    C::name, weight * weight, to_string(method).c_str(), error, report.error / size, report.lyapunov,
                    to_string(report.status).c_str());
        EXPECT_TRUE(report.ok());
        EXPECT_TRUE(error <= 2e-6 || report.error / size >= error / 10);
        EXPECT_TRUE(report.lyapunov < 0 || report.error / size > 2e-6);
    }
}

TEST(Estimates, AccuracyOfParaGRUAndParaLSTM) {
    for (const double weight : {1.0, 2.0, 4.0}) {
        check_accuracy<ParaGRU>(weight);
        check_accuracy<ParaLSTM>(weight);
    }
}

TEST(Fuzz, TenThousandOptionsRaiseAClearErrorOrGiveARightResult) {
    std::mt19937_64 draw(2);
    index refused = 0, right = 0, reported = 0;
    for (index n = 0; n < 10000; ++n) {
        const auto steps = index(draw() % 40), batch = index(draw() % 3), channels = index(1 + draw() % 5);
        const double weight = double(draw() % 40) / 10;
        const std::uint64_t seed = draw() % 1000;
        const bool cell = draw() % 2 == 0;
        const Problem problem =
            cell ? Problem::cell<ParaLSTM>(steps, batch, channels, weight, 1, seed)
                 : Problem::dense(DenseCellKind::elman_tanh, {steps, batch, channels}, weight, 1, seed);
        constexpr double infinity = std::numeric_limits<double>::infinity(),
                         nothing = std::numeric_limits<double>::quiet_NaN();
        // Each value is a good one, but for one in thirty.
        const auto from = [&](const auto& good, const auto& bad) {
            return draw() % 30 == 0 ? one_of(draw, bad) : one_of(draw, good);
        };
        const index counts[] = {0, 0, 0, 1, 2, 3, 7, 40, 1000, std::numeric_limits<index>::max()};
        const index bad_counts[] = {-1, std::numeric_limits<index>::min()};
        const double tolerances[] = {0, 0, 1e-5, 1e-4, 1e-7, 1e-30}, own_tolerances[] = {-1, -1, 0, 1e-5};
        const double bad_tolerances[] = {infinity, -infinity, nothing};
        const double dampings[] = {-1, -1, 0, 1e-3, 1, 1e300};
        const index depths[] = {0, 0, 1, 4, 16}, bad_depths[] = {17, -1};
        const index limits[] = {0, 0, index(1) << 30}, bad_limits[] = {1000, 1, -5};
        const int threads[] = {0, 1, 2, 3}, bad_threads[] = {-1};
        Options options;
        options.method =
            one_of(draw, {Method::automatic, Method::newton, Method::sequential, Method::overlap, Method::shooting});
        options.surrogate = one_of(draw, {Surrogate::full, Surrogate::diagonal, Surrogate::identity, Surrogate::zero});
        options.reduction =
            one_of(draw, {Reduction::automatic, Reduction::sequential, Reduction::pcr, Reduction::scan});
        options.guess = one_of(draw, {Guess::initial_state, Guess::first_step, Guess::given});
        options.on_failure = one_of(draw, {OnFailure::finish, OnFailure::report, OnFailure::raise});
        options.estimates = one_of(draw, {Estimates::none, Estimates::quick, Estimates::full});
        options.chunk = from(counts, bad_counts);
        options.tolerance = from(tolerances, bad_tolerances);
        options.absolute_tolerance = from(own_tolerances, bad_tolerances);
        options.relative_tolerance = from(own_tolerances, bad_tolerances);
        options.window = from(counts, bad_counts);
        options.max_iterations = from(counts, bad_counts);
        options.memory_limit = from(limits, bad_limits);
        options.damping = from(dampings, bad_tolerances);
        options.anderson = from(depths, bad_depths);
        options.execution.threads = from(threads, bad_threads);
        options.execution.backend = one_of(draw, {Backend::cpu, Backend::cpu, Backend::reference});
        Buffer<float> trajectory = Buffer<float>::random(problem.recurrence->shape(), seed + 1);
        if (draw() % 4 == 0 && trajectory.size() > 0) trajectory.data()[0] = float(nothing);
        try {
            const Report report = evaluate(*problem.recurrence, trajectory, options);
            if (!report.ok()) {
                ++reported;
                EXPECT_NE(options.on_failure, OnFailure::raise);
                EXPECT_EQ(report.status, Status::max_iterations);
                continue;
            }
            ++right;
            if (trajectory.size() == 0) continue;
            const auto [absolute, relative] = newton::tolerance_of<float>(options);
            EXPECT_LE(largest_residual(problem, trajectory), std::max(absolute, relative) + 2e-6) << "problem " << n;
        } catch (const InvalidArgument& error) {
            ++refused;
            EXPECT_NE(std::string(error.what()).find("expected"), std::string::npos);
        } catch (const OutOfMemory&) {
            ++refused;
            EXPECT_GT(options.memory_limit, 0);
        } catch (const NotConverged&) {
            ++reported;
            EXPECT_EQ(options.on_failure, OnFailure::raise);
        }
    }
    std::printf("%d right, %d said to be not, %d refused\n", int(right), int(reported), int(refused));
    EXPECT_GT(right, 3000);
    EXPECT_GT(reported, 500);
    EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace deeppcr
