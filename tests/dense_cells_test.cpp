// DenseCell against its equations in long double, its derivatives against finite differences of them, and its
// operations against each other bit for bit; one body for every backend, type and kind of cell.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include <deeppcr/check.hpp>
#include <deeppcr/dense_cells.hpp>
#include <deeppcr/evaluate.hpp>

#include "tests/compare.hpp"
#include "tests/messages.hpp"

namespace deeppcr {
namespace {

constexpr Backend backends[] = {Backend::reference, Backend::cpu};
constexpr DenseCellKind kinds[] = {DenseCellKind::elman_tanh, DenseCellKind::elman_relu, DenseCellKind::gru,
                                   DenseCellKind::lstm};

std::string name(Backend backend) { return backend == Backend::reference ? "reference" : "cpu"; }
std::string name(DenseCellKind kind) {
    constexpr const char* names[] = {"elman_tanh", "elman_relu", "gru", "lstm"};
    return names[int(kind)];
}

/// A size, and why it is tried.
struct Size {
    index value;
    const char* reason;
};
constexpr Size hidden_sizes[] = {{1, "scalar"},
                                 {2, "the smallest matrix"},
                                 {3, "odd, less than any vector"},
                                 {15, "one less than an AVX-512 vector of floats, a panel"},
                                 {16, "a panel"},
                                 {17, "one more than a panel"},
                                 {37, "prime"}};
constexpr Size batches[] = {
    {0, "none"}, {1, "one sequence"}, {3, "odd, less than a tile"}, {17, "prime, more than two tiles"}};

using Numbers = std::vector<long double>;

template <class T>
Numbers numbers(const Buffer<T>& buffer) {
    return {buffer.data(), buffer.data() + buffer.size()};
}

/// Weights of about 1 / sqrt(hidden), so that states neither vanish nor grow, and states and inputs of about 1.
template <class T>
struct Problem {
    DenseCellKind kind;
    index steps, batch, hidden, gates;
    Shape states;
    Buffer<T> inputs, weights, biases, initial;
    DenseCell<T> cell;

    Problem(DenseCellKind which, index step_count, index batch_size, index size, std::uint64_t seed = 1)
        : kind(which),
          steps(step_count),
          batch(batch_size),
          hidden(size),
          gates(gate_count(kind)),
          states{steps, batch, state_width(kind, hidden)},
          inputs(Buffer<T>::random({steps, batch, gates * hidden}, seed)),
          weights(Buffer<T>::random({gates, hidden, hidden}, seed + 1)),
          biases(Buffer<T>::random({gates, 1, hidden}, seed + 2)),
          initial(Buffer<T>::random({1, batch, states.width}, seed + 3)),
          cell(kind, inputs, scaled(), biases, initial) {}

    View<const T> scaled() const {
        for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= T(0.6 / std::sqrt(double(hidden)));
        return weights;
    }
    std::string description() const {
        return name(kind) + ", hidden " + std::to_string(hidden) + ", batch " + std::to_string(batch) + ", " +
               std::to_string(steps) + " steps";
    }

    /// x_0 .. x_{T-1} for the trajectory x_1 .. x_T.
    Buffer<T> before(const Buffer<T>& trajectory) const {
        Buffer<T> result(states);
        const index row = batch * states.width;
        std::copy_n(initial.data(), steps > 0 ? row : 0, result.data());
        for (index i = row; i < result.size(); ++i) result.data()[i] = trajectory.data()[i - row];
        return result;
    }

    Buffer<T> run(const Execution& execution) const {
        Buffer<T> trajectory(states);
        const auto sequences = all(batch);
        cell.run({0, steps, sequences, execution}, initial, trajectory);
        return trajectory;
    }

    /// The equations of dense_cells.hpp, in long double.
    Numbers exact(const Numbers& u, const Numbers& w, const Numbers& b, Numbers x) const {
        const auto logistic = [](long double z) { return 1 / (1 + std::exp(-z)); };
        Numbers trajectory;
        const index width = states.width;
        for (index step = 0; step < steps; ++step) {
            Numbers after(x.size());
            for (index j = 0; j < batch; ++j)
                for (index k = 0; k < hidden; ++k) {
                    const long double* h = &x[std::size_t(j * width)];
                    long double in[4], sum[4];
                    for (index gate = 0; gate < gates; ++gate) {
                        in[gate] = u[std::size_t(((step * batch + j) * gates + gate) * hidden + k)];
                        sum[gate] = b[std::size_t(gate * hidden + k)];
                        for (index i = 0; i < hidden; ++i)
                            sum[gate] += w[std::size_t((gate * hidden + k) * hidden + i)] * h[i];
                    }
                    long double& out = after[std::size_t(j * width + k)];
                    if (kind == DenseCellKind::elman_tanh) out = std::tanh(in[0] + sum[0]);
                    if (kind == DenseCellKind::elman_relu) out = std::max(0.0L, in[0] + sum[0]);
                    if (kind == DenseCellKind::gru) {
                        const long double z = logistic(in[1] + sum[1]);
                        out = (1 - z) * std::tanh(in[2] + logistic(in[0] + sum[0]) * sum[2]) + z * h[k];
                    }
                    if (kind == DenseCellKind::lstm) {
                        const long double c = logistic(in[1] + sum[1]) * h[hidden + k] +
                                              logistic(in[0] + sum[0]) * std::tanh(in[2] + sum[2]);
                        out = logistic(in[3] + sum[3]) * std::tanh(c);
                        after[std::size_t(j * width + hidden + k)] = c;
                    }
                }
            x = after;
            trajectory.insert(trajectory.end(), x.begin(), x.end());
        }
        return trajectory;
    }
};

template <class T>
class DenseCellTest : public ::testing::Test {
protected:
    static constexpr double epsilon = std::numeric_limits<T>::epsilon();
};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(DenseCellTest, Types, );

TYPED_TEST(DenseCellTest, RunsAsItsEquationsSay) {
    using T = TypeParam;
    for (const DenseCellKind kind : kinds)
        for (const Size& hidden : hidden_sizes)
            for (const Size& batch : batches) {
                const Problem<T> problem(kind, 5, batch.value, hidden.value);
                const Numbers exact = problem.exact(numbers(problem.inputs), numbers(problem.weights),
                                                    numbers(problem.biases), numbers(problem.initial));
                Buffer<double> expected(problem.states);
                std::copy(exact.begin(), exact.end(), expected.data());
                for (const Backend backend : backends) {
                    SCOPED_TRACE(name(backend) + ": " + problem.description() + " (" + hidden.reason + ", " +
                                 batch.reason + ")");
                    EXPECT_TRUE(
                        near(problem.run({backend}), expected, 100 * this->epsilon * std::sqrt(double(hidden.value))));
                }
            }
}

TYPED_TEST(DenseCellTest, JacobianIsTheDerivative) {
    using T = TypeParam;
    for (const DenseCellKind kind : kinds)
        for (const index hidden : {1, 3, 8, 17, 32}) {
            const Problem<T> problem(kind, 1, 3, hidden);
            const Numbers u = numbers(problem.inputs), w = numbers(problem.weights), b = numbers(problem.biases);
            const index width = problem.states.width, rows = problem.batch * width;
            Buffer<double> expected({1, rows, width}), expected_diagonal(problem.states);
            for (index column = 0; column < width; ++column) {
                const long double h = 1e-6L;
                Numbers up = numbers(problem.initial), down = up;
                for (index j = 0; j < problem.batch; ++j)
                    up[std::size_t(j * width + column)] += h, down[std::size_t(j * width + column)] -= h;
                const Numbers above = problem.exact(u, w, b, up), below = problem.exact(u, w, b, down);
                for (index row = 0; row < rows; ++row)
                    expected(0, row, column) = double((above[std::size_t(row)] - below[std::size_t(row)]) / (2 * h));
                for (index j = 0; j < problem.batch; ++j)
                    expected_diagonal(0, j, column) = expected(0, j * width + column, column);
            }
            const auto sequences = all(problem.batch);
            for (const Backend backend : backends) {
                SCOPED_TRACE(name(backend) + ": " + problem.description());
                const Section section{0, 1, sequences, {backend}};
                Buffer<T> after(problem.states), dense({1, rows, width}), diagonal(problem.states);
                problem.cell.linearise(section, problem.initial, after, {dense.data(), problem.states, width});
                problem.cell.linearise_diagonal(section, problem.initial, after, {diagonal.data(), problem.states, 1});
                EXPECT_TRUE(near(dense, expected, 1e-9 + 50 * this->epsilon));
                EXPECT_TRUE(near(diagonal, expected_diagonal, 1e-9 + 50 * this->epsilon));
            }
        }
}

TYPED_TEST(DenseCellTest, GradientsAreDerivatives) {
    using T = TypeParam;
    for (const DenseCellKind kind : kinds) {
        const Problem<T> problem(kind, 5, 2, 3);
        const Numbers u = numbers(problem.inputs), w = numbers(problem.weights), b = numbers(problem.biases),
                      x = numbers(problem.initial);
        const auto output_gradient = Buffer<T>::random(problem.states, 9);
        const auto loss = [&](const Numbers& trajectory) {
            long double sum = 0;
            for (std::size_t i = 0; i < trajectory.size(); ++i) sum += output_gradient.data()[i] * trajectory[i];
            return sum;
        };
        const auto differences = [&](Numbers values, const Shape& shape, const auto& trajectory_of) {
            Buffer<double> result(shape);
            for (std::size_t i = 0; i < values.size(); ++i) {
                const long double h = 1e-6L, value = values[i];
                values[i] = value + h;
                const long double above = loss(trajectory_of(values));
                values[i] = value - h;
                result.data()[i] = double((above - loss(trajectory_of(values))) / (2 * h));
                values[i] = value;
            }
            return result;
        };
        const auto for_inputs =
            differences(u, problem.inputs.shape(), [&](const Numbers& v) { return problem.exact(v, w, b, x); });
        const auto for_weights =
            differences(w, problem.weights.shape(), [&](const Numbers& v) { return problem.exact(u, v, b, x); });
        const auto for_biases =
            differences(b, problem.biases.shape(), [&](const Numbers& v) { return problem.exact(u, w, v, x); });
        const auto for_initial =
            differences(x, problem.initial.shape(), [&](const Numbers& v) { return problem.exact(u, w, b, v); });
        for (const Backend backend : backends)
            for (const Method method : {Method::newton, Method::sequential}) {
                SCOPED_TRACE(name(backend) + (method == Method::newton ? ", newton: " : ", sequential: ") +
                             problem.description());
                Options options;
                options.method = method;
                options.execution = {backend};
                options.window = method == Method::newton ? 2 : 0;  // weights' gradients add up over windows
                const auto evaluation = evaluate(problem.cell, options);
                const auto gradients =
                    adjoint(problem.cell, evaluation.trajectory, evaluation.report, output_gradient, options);
                const double tolerance = 1e-8 + 400 * this->epsilon;
                EXPECT_TRUE(near(gradients.inputs, for_inputs, tolerance));
                EXPECT_TRUE(near(gradients.weights, for_weights, tolerance));
                EXPECT_TRUE(near(gradients.biases, for_biases, tolerance));
                EXPECT_TRUE(near(gradients.initial, for_initial, tolerance));
            }
    }
}

/// What the operations compute for a problem, with so many threads.
template <class T>
struct Results {
    Buffer<T> trajectory, after, dense, diagonal, inputs, weights, biases, parameter_inputs, parameter_weights,
        parameter_biases, state;

    Results(const Problem<T>& problem, const Execution& execution)
        : trajectory(problem.run(execution)),
          after(problem.states),
          dense({problem.steps, problem.batch * problem.states.width, problem.states.width}),
          diagonal(problem.states),
          inputs(problem.inputs.shape()),
          weights(problem.weights.shape()),
          biases(problem.biases.shape()),
          parameter_inputs(problem.inputs.shape()),
          parameter_weights(problem.weights.shape()),
          parameter_biases(problem.biases.shape()),
          state(problem.initial.shape()) {
        const auto sequences = all(problem.batch);
        const Section section{0, problem.steps, sequences, execution};
        const Buffer<T> before = problem.before(trajectory), gradient = Buffer<T>::random(problem.states, 9);
        problem.cell.linearise(section, before, after, {dense.data(), problem.states, problem.states.width});
        problem.cell.linearise_diagonal(section, before, after, {diagonal.data(), problem.states, 1});
        problem.cell.run_backward(section, before, gradient, inputs, weights, biases, state);
        problem.cell.parameter_gradients(section, before, gradient, parameter_inputs, parameter_weights,
                                         parameter_biases);
    }
};

TYPED_TEST(DenseCellTest, BackendsAgree) {
    using T = TypeParam;
    for (const DenseCellKind kind : kinds)
        for (const Size& hidden : hidden_sizes)
            for (const Size& batch : batches) {
                const Problem<T> problem(kind, 7, batch.value, hidden.value);
                SCOPED_TRACE(problem.description());
                const Results<T> reference(problem, {Backend::reference}), cpu(problem, {Backend::cpu});
                // Sums over the hidden units; those of gradients over steps and sequences too.
                const double tolerance = 100 * this->epsilon * std::sqrt(double(hidden.value)),
                             of_sums = 10 * tolerance;
                EXPECT_TRUE(near(cpu.trajectory, reference.trajectory, tolerance));
                EXPECT_TRUE(near(cpu.after, reference.after, tolerance));
                EXPECT_TRUE(near(cpu.dense, reference.dense, tolerance));
                EXPECT_TRUE(near(cpu.diagonal, reference.diagonal, tolerance));
                EXPECT_TRUE(near(cpu.inputs, reference.inputs, of_sums));
                EXPECT_TRUE(near(cpu.weights, reference.weights, of_sums));
                EXPECT_TRUE(near(cpu.biases, reference.biases, of_sums));
                EXPECT_TRUE(near(cpu.state, reference.state, of_sums));
                EXPECT_TRUE(near(cpu.parameter_inputs, reference.parameter_inputs, of_sums));
                EXPECT_TRUE(near(cpu.parameter_weights, reference.parameter_weights, of_sums));
                EXPECT_TRUE(near(cpu.parameter_biases, reference.parameter_biases, of_sums));
            }
}

TYPED_TEST(DenseCellTest, ThreadsDoNotChangeTheBits) {
    using T = TypeParam;
    struct Sizes {
        index steps, batch, hidden;
    };
    for (const DenseCellKind kind : kinds)
        for (const Sizes& sizes : {Sizes{30, 100, 16}, Sizes{40, 23, 37}}) {
            const Problem<T> problem(kind, sizes.steps, sizes.batch, sizes.hidden);
            const Results<T> one(problem, {Backend::cpu, 1});
            for (const int threads : {2, 3, 5}) {
                SCOPED_TRACE(problem.description() + ", threads " + std::to_string(threads));
                const Results<T> many(problem, {Backend::cpu, threads});
                EXPECT_TRUE(same_bits(many.trajectory, one.trajectory));
                EXPECT_TRUE(same_bits(many.after, one.after));
                EXPECT_TRUE(same_bits(many.dense, one.dense));
                EXPECT_TRUE(same_bits(many.diagonal, one.diagonal));
                EXPECT_TRUE(same_bits(many.inputs, one.inputs));
                EXPECT_TRUE(same_bits(many.weights, one.weights));
                EXPECT_TRUE(same_bits(many.biases, one.biases));
                EXPECT_TRUE(same_bits(many.state, one.state));
                EXPECT_TRUE(same_bits(many.parameter_inputs, one.parameter_inputs));
                EXPECT_TRUE(same_bits(many.parameter_weights, one.parameter_weights));
                EXPECT_TRUE(same_bits(many.parameter_biases, one.parameter_biases));
            }
        }
}

TYPED_TEST(DenseCellTest, SharedUnitsDoNotChangeTheBits) {
    using T = TypeParam;
    // Threads share the hidden units: of few sequences, and of weights that exceed a core's cache. The last panel is
    // narrow in both.
    struct Sizes {
        index steps, batch, hidden;
    };
    for (const DenseCellKind kind : kinds)
        for (const Sizes& sizes : {Sizes{7, 4, 250}, Sizes{3, 20, 475}}) {
            const Problem<T> problem(kind, sizes.steps, sizes.batch, sizes.hidden);
            const auto sequences = all(sizes.batch);
            const auto gradient = Buffer<T>::random(problem.states, 9);
            const auto backward = [&](const Buffer<T>& trajectory, int threads) {
                DenseCellGradients<T> result{Buffer<T>(problem.inputs.shape()),
                                             Buffer<T>(problem.weights.shape()),
                                             Buffer<T>(problem.biases.shape()),
                                             Buffer<T>(problem.initial.shape()),
                                             {}};
                problem.cell.run_backward({0, problem.steps, sequences, {Backend::cpu, threads}},
                                          problem.before(trajectory), gradient, result.inputs, result.weights,
                                          result.biases, result.initial);
                return result;
            };
            const Buffer<T> trajectory = problem.run({Backend::cpu, 1});
            const auto one = backward(trajectory, 1);
            for (const int threads : {2, 3}) {
                SCOPED_TRACE(problem.description() + ", threads " + std::to_string(threads));
                EXPECT_TRUE(same_bits(problem.run({Backend::cpu, threads}), trajectory));
                const auto many = backward(trajectory, threads);
                EXPECT_TRUE(same_bits(many.inputs, one.inputs));
                EXPECT_TRUE(same_bits(many.weights, one.weights));
                EXPECT_TRUE(same_bits(many.biases, one.biases));
                EXPECT_TRUE(same_bits(many.initial, one.initial));
            }
            // One step, so that what it says is plain: against plain loops.
            const Problem<T> first(kind, 1, sizes.batch, sizes.hidden);
            EXPECT_TRUE(near(first.run({Backend::cpu, 2}), first.run({Backend::reference}), 1000 * this->epsilon));
        }
}

TYPED_TEST(DenseCellTest, StepRunAndLineariseAgreeBitForBit) {
    using T = TypeParam;
    for (const Backend backend : backends)
        for (const DenseCellKind kind : kinds)
            for (const Size& hidden : hidden_sizes)
                for (const Size& batch : batches) {
                    const Problem<T> problem(kind, 6, batch.value, hidden.value);
                    SCOPED_TRACE(name(backend) + ": " + problem.description());
                    const Execution execution{backend};
                    const Results<T> results(problem, execution);
                    EXPECT_TRUE(same_bits(results.after, results.trajectory));
                    const index width = problem.states.width;
                    for (index row = 0; row < problem.steps * problem.batch * width; ++row)
                        ASSERT_EQ(results.dense.data()[row * width + row % width], results.diagonal.data()[row]);
                    Buffer<T> repeated(problem.states);
                    const auto sequences = all(problem.batch);
                    for (index i = 0; i < problem.steps; ++i)
                        problem.cell.step({i, i + 1, sequences, execution},
                                          i == 0 ? View<const T>(problem.initial) : repeated.view().steps(i - 1, i),
                                          repeated.view().steps(i, i + 1));
                    EXPECT_TRUE(same_bits(repeated, results.trajectory));
                }
}

TYPED_TEST(DenseCellTest, ASequenceDoesNotDependOnItsNeighbours) {
    using T = TypeParam;
    for (const Backend backend : backends)
        for (const DenseCellKind kind : kinds) {
            const Problem<T> problem(kind, 9, 17, 17);
            SCOPED_TRACE(name(backend) + ": " + problem.description());
            const Buffer<T> whole = problem.run({backend});
            const std::vector<index> sequences = {11, 2, 16};
            const Section section{4, 9, sequences, {backend}};
            Buffer<T> state({1, 3, problem.states.width}), part({5, 3, problem.states.width});
            for (index j = 0; j < 3; ++j)
                std::copy_n(whole.view().at(3, sequences[std::size_t(j)]), problem.states.width, state.view().at(0, j));
            problem.cell.run(section, state, part);
            for (index j = 0; j < 3; ++j)
                EXPECT_TRUE(same_bits<T>(
                    part.view().sequences(j, j + 1),
                    whole.view().steps(4, 9).sequences(sequences[std::size_t(j)], sequences[std::size_t(j)] + 1)));
        }
}

TYPED_TEST(DenseCellTest, InputsMayHaveStrides) {
    using T = TypeParam;
    for (const Backend backend : backends)
        for (const DenseCellKind kind : kinds) {
            const Problem<T> problem(kind, 6, 5, 7);
            const Buffer<T> swapped(problem.inputs.shape(), Layout::batch_first);
            for (index i = 0; i < 6; ++i)
                for (index j = 0; j < 5; ++j)
                    std::copy_n(problem.inputs.view().at(i, j), problem.inputs.shape().width, swapped.view().at(i, j));
            const DenseCell<T> cell(kind, swapped, problem.weights, problem.biases, problem.initial);
            Options options;
            options.method = Method::sequential;
            options.execution = {backend};
            EXPECT_TRUE(same_bits(evaluate(cell, options).trajectory, problem.run({backend})));
        }
}

TYPED_TEST(DenseCellTest, NewtonEqualsSequential) {
    using T = TypeParam;
    for (const Backend backend : backends)
        for (const DenseCellKind kind : kinds)
            for (const index steps : {0, 1, 2, 100})
                for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::zero}) {
                    const Problem<T> problem(kind, steps, 3, 5);
                    SCOPED_TRACE(name(backend) + ": " + problem.description() + ", surrogate " +
                                 std::to_string(int(surrogate)));
                    Options options;
                    options.method = Method::newton;
                    options.surrogate = surrogate;
                    options.execution = {backend};
                    const auto evaluation = evaluate(problem.cell, options);
                    EXPECT_EQ(evaluation.report.status, Status::converged);
                    // The residuals of all steps may add up, and states grow under relu.
                    const double tolerance = 64 * 50 * this->epsilon;
                    EXPECT_TRUE(near(evaluation.trajectory, problem.run({backend}), tolerance));
                }
}

TYPED_TEST(DenseCellTest, NewtonOfManyStepsTakesFewPasses) {
    using T = TypeParam;
    for (const DenseCellKind kind : {DenseCellKind::elman_tanh, DenseCellKind::gru, DenseCellKind::lstm}) {
        const Problem<T> problem(kind, 1000, 2, 4);
        const auto evaluation = evaluate(problem.cell, {.method = Method::newton});
        EXPECT_EQ(evaluation.report.status, Status::converged) << name(kind);
        EXPECT_LE(evaluation.report.iterations, 12) << name(kind);
    }
}

TYPED_TEST(DenseCellTest, BothAdjointsAgree) {
    using T = TypeParam;
    for (const DenseCellKind kind : kinds)
        for (const index steps : {0, 1, 2, 100})
            for (const Size& batch : batches) {
                const Problem<T> problem(kind, steps, batch.value, 5);
                SCOPED_TRACE(problem.description());
                Options options;
                options.method = Method::sequential;
                const auto evaluation = evaluate(problem.cell, options);
                const auto gradient = Buffer<T>::random(problem.states, 9);
                const auto sequential =
                    adjoint(problem.cell, evaluation.trajectory, evaluation.report, gradient, options);
                options.method = Method::newton;
                const auto solved = adjoint(problem.cell, evaluation.trajectory, evaluation.report, gradient, options);
                // Sums of up to 1,700 numbers of about 1, and of 10 for relu.
                const double tolerance = 64 * 50 * this->epsilon;
                EXPECT_TRUE(near(solved.inputs, sequential.inputs, tolerance));
                EXPECT_TRUE(near(solved.weights, sequential.weights, 10 * tolerance));
                EXPECT_TRUE(near(solved.biases, sequential.biases, 10 * tolerance));
                EXPECT_TRUE(near(solved.initial, sequential.initial, tolerance));
            }
}

TYPED_TEST(DenseCellTest, PassesTheGeneralCheck) {
    using T = TypeParam;
    for (const DenseCellKind kind : {DenseCellKind::elman_tanh, DenseCellKind::gru, DenseCellKind::lstm})
        for (const index hidden : {1, 3, 16}) {
            const Problem<T> problem(kind, 4, 3, hidden);
            const CheckReport report = check_recurrence(problem.cell);
            EXPECT_TRUE(report.ok()) << problem.description() << "\n" << report;
        }
}

TYPED_TEST(DenseCellTest, ANumberThatIsNotFiniteStaysInItsSequence) {
    using T = TypeParam;
    for (const Backend backend : backends)
        for (const DenseCellKind kind : kinds) {
            Problem<T> problem(kind, 3, 3, 5);
            const Buffer<T> clean = problem.run({backend});
            for (index gate = 0; gate < problem.gates; ++gate)
                problem.inputs(1, 1, gate * 5) = std::numeric_limits<T>::quiet_NaN();
            const Buffer<T> marked = problem.run({backend});
            EXPECT_TRUE(std::isnan(marked(1, 1, 0))) << name(kind);
            EXPECT_TRUE(std::isnan(marked(2, 1, 4))) << name(kind);
            for (const index j : {0, 2})
                EXPECT_TRUE(same_bits<T>(marked.view().sequences(j, j + 1), clean.view().sequences(j, j + 1)));
        }
}

TEST(DenseCellArguments, AreNamedWhereTheyAreWrong) {
    const Problem<double> problem(DenseCellKind::gru, 4, 3, 5);
    const auto make = [&](DenseCellKind kind, View<const double> inputs, View<const double> weights,
                          View<const double> biases, View<const double> initial) {
        return message_of([&] { const DenseCell<double> cell(kind, inputs, weights, biases, initial); });
    };
    const View<const double> u = problem.inputs, w = problem.weights, b = problem.biases, x = problem.initial;
    const auto shaped = [](View<const double> view, const Shape& shape) {
        return View<const double>(view.data(), shape);
    };
    EXPECT_NE(make(DenseCellKind(7), u, w, b, x).find("kind"), std::string::npos);
    EXPECT_NE(make(DenseCellKind::lstm, u, w, b, x).find("weights"), std::string::npos);
    EXPECT_NE(make(DenseCellKind::gru, u, shaped(w, {3, 5, 4}), b, x).find("weights"), std::string::npos);
    EXPECT_NE(make(DenseCellKind::gru, u, shaped(w, {1, 15, 5}), b, x).find("weights"), std::string::npos);
    EXPECT_NE(make(DenseCellKind::gru, shaped(u, {4, 3, 14}), w, b, x).find("inputs"), std::string::npos);
    EXPECT_NE(make(DenseCellKind::gru, {nullptr, {4, 3, 15}}, w, b, x).find("inputs"), std::string::npos);
    EXPECT_NE(make(DenseCellKind::gru, u, w, shaped(b, {1, 1, 15}), x).find("biases"), std::string::npos);
    EXPECT_NE(make(DenseCellKind::gru, u, w, b, shaped(x, {1, 2, 5})).find("initial"), std::string::npos);

    const auto sequences = all(3);
    const Section section{0, 4, sequences};
    Buffer<double> states(problem.states), trajectory = problem.run({}), other({4, 3, 4}), inputs({4, 3, 15}),
                                           weights({3, 5, 5}), biases({3, 1, 5}), state({1, 3, 5});
    const auto says = [&](const char* argument, const auto& action) {
        EXPECT_NE(message_of(action).find(argument), std::string::npos) << argument << ": " << message_of(action);
    };
    const DenseCell<double>& cell = problem.cell;
    says("section", [&] { cell.run({2, 5, sequences}, state, trajectory); });
    says("sequences", [&] {
        const std::vector<index> beyond = {0, 1, 3};
        cell.run({0, 4, beyond}, state, trajectory);
    });
    says("state", [&] { cell.run(section, other, trajectory); });
    says("trajectory", [&] { cell.run(section, state, other); });
    says("before", [&] { cell.step(section, other, states); });
    says("after", [&] { cell.step(section, trajectory, other); });
    says("jacobian", [&] { cell.linearise(section, trajectory, states, {states.data(), problem.states, 1}); });
    says("diagonal", [&] { cell.linearise_diagonal(section, trajectory, states, {states.data(), problem.states, 5}); });
    says("adjoint", [&] { cell.parameter_gradients(section, trajectory, other, inputs, weights, biases); });
    says("inputs", [&] { cell.parameter_gradients(section, trajectory, states, states, weights, biases); });
    says("weights", [&] { cell.parameter_gradients(section, trajectory, states, inputs, biases, biases); });
    says("biases", [&] { cell.parameter_gradients(section, trajectory, states, inputs, weights, weights); });
    says("output_gradient", [&] { cell.run_backward(section, trajectory, other, inputs, weights, biases, state); });
    says("state", [&] { cell.run_backward(section, trajectory, states, inputs, weights, biases, states); });
    says("report", [&] {
        Report failed;
        failed.status = Status::max_iterations;
        adjoint(cell, trajectory, failed, states);
    });
}

}  // namespace
}  // namespace deeppcr
