// DenseChain against a network in long double, its derivatives against finite differences of that network, and its
// operations against each other bit for bit; one body for every backend, type, activation and skip length.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <deeppcr/dense_chain.hpp>

#include "tests/compare.hpp"
#include "tests/messages.hpp"

namespace deeppcr {
namespace {

constexpr Backend backends[] = {Backend::reference, Backend::cpu};
constexpr Activation activations[] = {Activation::identity, Activation::tanh, Activation::relu, Activation::sigmoid,
                                      Activation::gelu};
constexpr index skips[] = {0, 1, 2, 3};

std::string name(Backend backend) { return backend == Backend::reference ? "reference" : "cpu"; }
std::string name(Activation activation) {
    constexpr const char* names[] = {"identity", "tanh", "relu", "sigmoid", "gelu"};
    return names[int(activation)];
}

/// A size, and why it is tried.
struct Size {
    index value;
    const char* reason;
};
constexpr Size widths[] = {{1, "scalar"},
                           {2, "the smallest matrix"},
                           {3, "odd, less than any vector"},
                           {4, "an AVX2 vector of doubles"},
                           {7, "one less than an AVX2 vector"},
                           {8, "an AVX2 vector of floats, an AVX-512 vector of doubles"},
                           {9, "one more than that"},
                           {15, "one less than an AVX-512 vector of floats"},
                           {16, "an AVX-512 vector of floats, a panel"},
                           {17, "one more than that"},
                           {31, "one less than two vectors"},
                           {32, "two vectors side by side"},
                           {37, "prime"}};
constexpr Size batches[] = {
    {1, "one sequence"}, {2, "two"}, {5, "odd, less than a tile"}, {19, "prime, more than two tiles"}};

long double activate(Activation activation, long double z) {
    switch (activation) {
        case Activation::identity:
            return z;
        case Activation::tanh:
            return std::tanh(z);
        case Activation::relu:
            return z < 0 ? 0 : z;
        case Activation::sigmoid:
            return 1 / (1 + std::exp(-z));
        case Activation::gelu:
            return z * std::erfc(-z / std::numbers::sqrt2_v<long double>) / 2;
    }
    return z;
}

long double slope(Activation activation, long double z) {
    switch (activation) {
        case Activation::identity:
            return 1;
        case Activation::tanh:
            return 1 / (std::cosh(z) * std::cosh(z));
        case Activation::relu:
            return z > 0 ? 1 : 0;
        case Activation::sigmoid:
            return 1 / (1 + std::exp(-z)) / (1 + std::exp(z));
        case Activation::gelu:
            return std::erfc(-z / std::numbers::sqrt2_v<long double>) / 2 +
                   z * std::exp(-z * z / 2) / std::sqrt(2 * std::numbers::pi_v<long double>);
    }
    return z;
}

/// Weights of about 1 / sqrt(width), small biases, and states of about 1.
template <class T>
struct Problem {
    index layers, batch, width;
    DenseChain<double>::Options options;
    Buffer<T> weights, biases, initial;
    DenseChain<T> chain;

    Problem(index layer_count, index batch_size, index size, Activation activation, index skip, std::uint64_t seed = 1)
        : layers(layer_count),
          batch(batch_size),
          width(size),
          options{activation, skip},
          weights(Buffer<T>::random({layers, width, width}, seed)),
          biases(Buffer<T>::random({layers, 1, width}, seed + 1)),
          initial(Buffer<T>::random({1, batch, width}, seed + 2)),
          chain(scaled(), biases, initial, {activation, skip}) {}

    View<const T> scaled() const {
        for (index i = 0; i < weights.size(); ++i) weights.data()[i] *= T(0.9 / std::sqrt(double(width)));
        for (index i = 0; i < biases.size(); ++i) biases.data()[i] *= T(0.5);
        return weights;
    }
    index depth() const { return std::max<index>(options.skip, 1); }
    Shape states() const { return chain.shape(); }
    Shape per_layer() const { return {layers, batch, width}; }
    std::string description() const {
        return name(options.activation) + ", skip " + std::to_string(options.skip) + ", width " +
               std::to_string(width) + ", batch " + std::to_string(batch);
    }

    /// x_0 .. x_{T-1} for the trajectory x_1 .. x_T.
    Buffer<T> before(const Buffer<T>& trajectory) const {
        Buffer<T> result(states());
        const index row = batch * width;
        std::copy_n(initial.data(), states().steps > 0 ? row : 0, result.data());
        for (index i = row; i < result.size(); ++i) result.data()[i] = trajectory.data()[i - row];
        return result;
    }

    /// The trajectory of the sequences, step after step, in long double. `state` starts as the initial state.
    std::vector<long double> exact(const std::vector<long double>& w, const std::vector<long double>& b,
                                   std::vector<long double> state) const {
        std::vector<long double> trajectory, in, out(state.size());
        for (index step = 0; step < states().steps; ++step) {
            in = state;
            for (index layer = step * depth(); layer < (step + 1) * depth(); ++layer) {
                for (index j = 0; j < batch; ++j)
                    for (index o = 0; o < width; ++o) {
                        long double z = b[layer * width + o];
                        for (index i = 0; i < width; ++i) z += w[(layer * width + o) * width + i] * in[j * width + i];
                        out[j * width + o] = activate(options.activation, z);
                    }
                in = out;
            }
            for (std::size_t i = 0; i < state.size(); ++i) state[i] = in[i] + (options.skip > 0 ? state[i] : 0);
            trajectory.insert(trajectory.end(), state.begin(), state.end());
        }
        return trajectory;
    }
    static std::vector<long double> numbers(const Buffer<T>& buffer) {
        return {buffer.data(), buffer.data() + buffer.size()};
    }
};

template <class T>
class DenseChainTest : public ::testing::Test {
protected:
    static constexpr double epsilon = std::numeric_limits<T>::epsilon();
};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(DenseChainTest, Types, );

TYPED_TEST(DenseChainTest, ActivationsAreAccurate) {
    using T = TypeParam;
    // Values and slopes of single numbers, through a chain of one layer with weight 1 and bias 0.
    std::vector<T> numbers = {0,
                              -T(0),
                              1,
                              -1,
                              std::numeric_limits<T>::min(),
                              std::numeric_limits<T>::denorm_min(),
                              -std::numeric_limits<T>::max(),
                              std::numeric_limits<T>::max()};
    if constexpr (sizeof(T) == 4) {
        for (std::uint64_t bits = 0; bits < (std::uint64_t(1) << 32); bits += 4093) {
            const auto pattern = std::uint32_t(bits);
            float value = 0;
            std::memcpy(&value, &pattern, 4);
            if (std::isfinite(value)) numbers.push_back(value);
        }
    }
    std::mt19937_64 generator(7);
    for (double scale : {1e-8, 1e-3, 0.1, 1.0, 4.0, 20.0, 100.0, 750.0})
        for (int i = 0; i < 20000; ++i)
            numbers.push_back(T(std::uniform_real_distribution<>(-scale, scale)(generator)));

    const T one = 1, zero = 0;
    const Shape shape{1, index(numbers.size()), 1};
    Buffer<T> value(shape), derivative(shape);
    const View<const T> states(numbers.data(), shape);
    const auto sequences = all(shape.batch);
    for (const Activation activation : activations) {
        const DenseChain<T> chain(View<const T>(&one, {1, 1, 1}), View<const T>(&zero, {1, 1, 1}), states,
                                  {activation, 0});
        chain.linearise({0, 1, sequences}, states, value, Jacobian<T>(derivative.data(), shape, 1));
        double worst_value = 0, worst_slope = 0;
        T at_value = 0, at_slope = 0;
        for (index i = 0; i < shape.batch; ++i) {
            const T z = numbers[i];
            const long double exact = activate(activation, z), exact_slope = slope(activation, z);
            const T rounded = std::abs(T(exact));
            const long double unit = std::nextafter(rounded, std::numeric_limits<T>::infinity()) - rounded;
            const double error = double(std::abs(value.data()[i] - exact) / unit);
            const double slope_error = double(std::abs(derivative.data()[i] - exact_slope) /
                                              (this->epsilon * std::max(std::abs(exact_slope), 0.5L)));
            if (!(error <= worst_value)) worst_value = error, at_value = z;
            if (!(slope_error <= worst_slope)) worst_slope = slope_error, at_slope = z;
        }
        // The bounds that activation-inl.hpp states.
        EXPECT_LE(worst_value, activation == Activation::gelu ? 8 : 3) << name(activation) << " of " << at_value;
        EXPECT_LE(worst_slope, 4) << "slope of " << name(activation) << " at " << at_slope;
        this->RecordProperty(name(activation), std::to_string(worst_value) + ", slope " + std::to_string(worst_slope));
    }
}

TYPED_TEST(DenseChainTest, ActivationsOfInfinityAndNaN) {
    using T = TypeParam;
    const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    // More than one vector, so that whole vectors and remainders see each of them.
    std::vector<T> numbers;
    for (int i = 0; i < 7; ++i) numbers.insert(numbers.end(), {-infinity, infinity, nan});
    const T one = 1, zero = 0;
    const Shape shape{1, index(numbers.size()), 1};
    const View<const T> states(numbers.data(), shape);
    Buffer<T> value(shape), derivative(shape);
    const auto sequences = all(shape.batch);
    const T limits[][2] = {{-infinity, infinity}, {-1, 1}, {0, infinity}, {0, 1}, {0, infinity}};
    const T slopes[][2] = {{1, 1}, {0, 0}, {0, 1}, {0, 0}, {0, 1}};
    for (const Backend backend : backends)
        for (const Activation activation : activations) {
            SCOPED_TRACE(name(backend) + " " + name(activation));
            const DenseChain<T> chain(View<const T>(&one, {1, 1, 1}), View<const T>(&zero, {1, 1, 1}), states,
                                      {activation, 0});
            chain.linearise({0, 1, sequences, {backend}}, states, value, Jacobian<T>(derivative.data(), shape, 1));
            for (index i = 0; i < shape.batch; i += 3) {
                for (int side : {0, 1}) {
                    EXPECT_EQ(value.data()[i + side], limits[int(activation)][side]);
                    EXPECT_EQ(derivative.data()[i + side], slopes[int(activation)][side]);
                }
                EXPECT_TRUE(std::isnan(value.data()[i + 2]));
                EXPECT_TRUE(std::isnan(derivative.data()[i + 2]) || activation == Activation::identity);
            }
        }
}

TYPED_TEST(DenseChainTest, RunsAsTheExactNetworkDoes) {
    using T = TypeParam;
    for (const Size& width : widths)
        for (const Activation activation : activations)
            for (const index skip : skips) {
                const Problem<T> problem(6, 5, width.value, activation, skip);
                const auto exact = problem.exact(problem.numbers(problem.weights), problem.numbers(problem.biases),
                                                 problem.numbers(problem.initial));
                Buffer<double> expected(problem.states());
                std::copy(exact.begin(), exact.end(), expected.data());
                const auto sequences = all(problem.batch);
                for (const Backend backend : backends) {
                    SCOPED_TRACE(name(backend) + ": " + problem.description() + " (" + width.reason + ")");
                    Buffer<T> trajectory(problem.states());
                    problem.chain.run({0, problem.states().steps, sequences, {backend}}, problem.initial, trajectory);
                    EXPECT_TRUE(near(trajectory, expected, 100 * this->epsilon * std::sqrt(double(width.value))));
                }
            }
}

TYPED_TEST(DenseChainTest, JacobianIsTheDerivative) {
    using T = TypeParam;
    for (const index width : {1, 3, 8, 17})
        for (const Activation activation : activations)
            for (const index skip : skips) {
                // One step, so that exact() maps a state to its successor.
                const Problem<T> problem(std::max<index>(skip, 1), 3, width, activation, skip);
                const auto w = problem.numbers(problem.weights), b = problem.numbers(problem.biases);
                const auto state = problem.numbers(problem.initial);
                Buffer<double> expected({1, problem.batch * width, width}),
                    expected_diagonal({1, problem.batch, width});
                for (index column = 0; column < width; ++column) {
                    const long double h = 1e-6L;
                    auto up = state, down = state;
                    for (index j = 0; j < problem.batch; ++j)
                        up[j * width + column] += h, down[j * width + column] -= h;
                    const auto above = problem.exact(w, b, up), below = problem.exact(w, b, down);
                    for (index row = 0; row < problem.batch * width; ++row)
                        expected(0, row, column) = double((above[row] - below[row]) / (2 * h));
                    for (index j = 0; j < problem.batch; ++j)
                        expected_diagonal(0, j, column) = expected(0, j * width + column, column);
                }
                const auto sequences = all(problem.batch);
                for (const Backend backend : backends) {
                    SCOPED_TRACE(name(backend) + ": " + problem.description());
                    const Section section{0, 1, sequences, {backend}};
                    Buffer<T> after(problem.states()), dense({1, problem.batch * width, width}),
                        diagonal(problem.states());
                    problem.chain.linearise(section, problem.initial, after,
                                            Jacobian<T>(dense.data(), problem.states(), width));
                    problem.chain.linearise_diagonal(section, problem.initial, after,
                                                     Jacobian<T>(diagonal.data(), problem.states(), 1));
                    EXPECT_TRUE(near(dense, expected, 1e-9 + 50 * this->epsilon));
                    EXPECT_TRUE(near(diagonal, expected_diagonal, 1e-9 + 50 * this->epsilon));
                }
            }
}

TYPED_TEST(DenseChainTest, GradientsAreDerivatives) {
    using T = TypeParam;
    for (const Activation activation : activations)
        for (const index skip : skips) {
            const Problem<T> problem(6, 2, 3, activation, skip);
            const auto w = problem.numbers(problem.weights), b = problem.numbers(problem.biases);
            const auto state = problem.numbers(problem.initial);
            const auto output_gradient = Buffer<T>::random(problem.states(), 9);
            const auto loss = [&](const auto& weights, const auto& biases, const auto& initial) {
                const auto trajectory = problem.exact(weights, biases, initial);
                long double sum = 0;
                for (std::size_t i = 0; i < trajectory.size(); ++i) sum += output_gradient.data()[i] * trajectory[i];
                return sum;
            };
            const auto differences = [&](std::vector<long double> values, const Shape& shape, const auto& loss_of) {
                Buffer<double> result(shape);
                for (std::size_t i = 0; i < values.size(); ++i) {
                    const long double h = 1e-6L, value = values[i];
                    values[i] = value + h;
                    const long double above = loss_of(values);
                    values[i] = value - h;
                    result.data()[i] = double((above - loss_of(values)) / (2 * h));
                    values[i] = value;
                }
                return result;
            };
            const auto for_weights =
                differences(w, problem.weights.shape(), [&](auto& v) { return loss(v, b, state); });
            const auto for_biases = differences(b, problem.biases.shape(), [&](auto& v) { return loss(w, v, state); });
            const auto for_initial =
                differences(state, problem.initial.shape(), [&](auto& v) { return loss(w, b, v); });

            const auto sequences = all(problem.batch);
            for (const Backend backend : backends) {
                SCOPED_TRACE(name(backend) + ": " + problem.description());
                const Section section{0, problem.states().steps, sequences, {backend}};
                Buffer<T> trajectory(problem.states()), slopes(problem.per_layer()), adjoint(problem.states());
                problem.chain.run_with_slopes(section, problem.initial, trajectory, slopes);
                const auto before = problem.before(trajectory);
                Buffer<T> weights(problem.weights.shape()), biases(problem.biases.shape()),
                    initial(problem.initial.shape());
                const double tolerance = 1e-8 + 200 * this->epsilon;
                for (const bool given : {true, false}) {
                    problem.chain.run_backward(section, before, given ? slopes.view() : View<T>(), output_gradient,
                                               weights, biases, given ? adjoint.view() : View<T>(), initial);
                    EXPECT_TRUE(near(weights, for_weights, tolerance));
                    EXPECT_TRUE(near(biases, for_biases, tolerance));
                    EXPECT_TRUE(near(initial, for_initial, tolerance));
                }
                problem.chain.parameter_gradients(section, before, adjoint, weights, biases);
                EXPECT_TRUE(near(weights, for_weights, tolerance));
                EXPECT_TRUE(near(biases, for_biases, tolerance));
            }
        }
}

/// What the operations compute for a problem, with so many threads.
template <class T>
struct Results {
    Buffer<T> trajectory, slopes, after, dense, diagonal, adjoint, initial, weights, biases, parameter_weights,
        parameter_biases;

    Results(const Problem<T>& problem, const Execution& execution)
        : trajectory(problem.states()),
          slopes(problem.per_layer()),
          after(problem.states()),
          dense({problem.states().steps, problem.batch * problem.width, problem.width}),
          diagonal(problem.states()),
          adjoint(problem.states()),
          initial(problem.initial.shape()),
          weights(problem.weights.shape()),
          biases(problem.biases.shape()),
          parameter_weights(problem.weights.shape()),
          parameter_biases(problem.biases.shape()) {
        const auto sequences = all(problem.batch);
        const Section section{0, problem.states().steps, sequences, execution};
        problem.chain.run_with_slopes(section, problem.initial, trajectory, slopes);
        const auto before = problem.before(trajectory);
        problem.chain.linearise(section, before, after, Jacobian<T>(dense.data(), problem.states(), problem.width));
        problem.chain.linearise_diagonal(section, before, after, Jacobian<T>(diagonal.data(), problem.states(), 1));
        const auto output_gradient = Buffer<T>::random(problem.states(), 9);
        problem.chain.run_backward(section, before, slopes, output_gradient, weights, biases, adjoint, initial);
        problem.chain.parameter_gradients(section, before, adjoint, parameter_weights, parameter_biases);
    }
};

TYPED_TEST(DenseChainTest, BackendsAgree) {
    using T = TypeParam;
    for (const Size& width : widths)
        for (const Size& batch : batches)
            for (const index skip : skips) {
                const Problem<T> problem(6, batch.value, width.value, Activation::tanh, skip);
                SCOPED_TRACE(problem.description() + " (" + width.reason + ", " + batch.reason + ")");
                const Results<T> expected(problem, {Backend::reference}), results(problem, {Backend::cpu});
                const double tolerance = 200 * this->epsilon * std::sqrt(double(width.value));
                EXPECT_TRUE(near(results.trajectory, expected.trajectory, tolerance));
                EXPECT_TRUE(near(results.slopes, expected.slopes, tolerance));
                EXPECT_TRUE(near(results.dense, expected.dense, tolerance));
                EXPECT_TRUE(near(results.diagonal, expected.diagonal, tolerance));
                EXPECT_TRUE(near(results.adjoint, expected.adjoint, tolerance));
                EXPECT_TRUE(near(results.initial, expected.initial, tolerance));
                EXPECT_TRUE(near(results.weights, expected.weights, tolerance));
                EXPECT_TRUE(near(results.biases, expected.biases, tolerance));
            }
}

TYPED_TEST(DenseChainTest, EveryWayToAStateGivesTheSameBits) {
    using T = TypeParam;
    for (const Backend backend : backends)
        for (const Size& width : widths)
            for (const Size& batch : batches)
                for (const index skip : skips) {
                    const Activation activation = skip % 2 == 1 ? Activation::tanh : Activation::gelu;
                    const Problem<T> problem(6, batch.value, width.value, activation, skip);
                    SCOPED_TRACE(name(backend) + ": " + problem.description() + " (" + width.reason + ", " +
                                 batch.reason + ")");
                    const index steps = problem.states().steps;
                    const Results<T> results(problem, {backend, 1});
                    const auto& trajectory = results.trajectory;
                    const auto before = problem.before(trajectory);
                    const auto sequences = all(problem.batch);
                    const Section section{0, steps, sequences, {backend, 2}};
                    Buffer<T> after(problem.states());

                    problem.chain.run(section, problem.initial, after);
                    EXPECT_TRUE(same_bits(after, trajectory)) << "run without slopes";
                    problem.chain.step(section, before, after);
                    EXPECT_TRUE(same_bits(after, trajectory)) << "step of all steps at once";
                    problem.chain.Recurrence<T>::run(section, problem.initial, after);
                    EXPECT_TRUE(same_bits(after, trajectory)) << "step after step";
                    EXPECT_TRUE(same_bits(results.after, trajectory)) << "linearise";

                    const Section end{steps / 2, steps, sequences, {backend, 2}};
                    problem.chain.run(end, before.view().steps(steps / 2, steps / 2 + 1),
                                      after.view().steps(steps / 2, steps));
                    EXPECT_TRUE(same_bits(after, trajectory)) << "run of the second half";

                    std::vector<index> some;
                    for (index j = problem.batch - 1; j >= 0; j -= 2) some.push_back(j);
                    const Section part{0, steps, some, {backend, 2}};
                    Buffer<T> start({1, part.batch(), problem.width}), few({steps, part.batch(), problem.width});
                    Buffer<T> dense({steps, part.batch() * problem.width, problem.width});
                    problem.chain.initial(part, start);
                    problem.chain.run(part, start, few);
                    for (index j = 0; j < part.batch(); ++j)
                        EXPECT_TRUE(same_bits<T>(few.view().sequences(j, j + 1),
                                                 trajectory.view().sequences(some[j], some[j] + 1)))
                            << "run of some sequences, in another order";

                    for (index i = 0; i < problem.states().count(); ++i) {
                        const T entry = results.dense.data()[i * problem.width + i % problem.width];
                        ASSERT_EQ(std::memcmp(&results.diagonal.data()[i], &entry, sizeof(T)), 0)
                            << "linearise_diagonal, element " << i;
                    }
                    if (backend == Backend::cpu) {  // the reference sums a gradient in another order
                        EXPECT_TRUE(same_bits(results.parameter_weights, results.weights));
                        EXPECT_TRUE(same_bits(results.parameter_biases, results.biases));
                    }
                }
}

template <class T>
void expect_same_bits_for_every_thread_count(const Problem<T>& problem) {
    SCOPED_TRACE(problem.description());
    const Results<T> expected(problem, {Backend::cpu, 1});
    for (const int threads : {2, 3}) {
        SCOPED_TRACE(std::to_string(threads) + " threads");
        const Results<T> results(problem, {Backend::cpu, threads});
        EXPECT_TRUE(same_bits(results.trajectory, expected.trajectory));
        EXPECT_TRUE(same_bits(results.slopes, expected.slopes));
        EXPECT_TRUE(same_bits(results.dense, expected.dense));
        EXPECT_TRUE(same_bits(results.diagonal, expected.diagonal));
        EXPECT_TRUE(same_bits(results.adjoint, expected.adjoint));
        EXPECT_TRUE(same_bits(results.initial, expected.initial));
        EXPECT_TRUE(same_bits(results.weights, expected.weights));
        EXPECT_TRUE(same_bits(results.biases, expected.biases));
        EXPECT_TRUE(same_bits(results.parameter_weights, expected.parameter_weights));
        EXPECT_TRUE(same_bits(results.parameter_biases, expected.parameter_biases));
    }
}

TYPED_TEST(DenseChainTest, EveryThreadCountGivesTheSameBits) {
    using T = TypeParam;
    for (const index skip : skips) {
        // Enough work for several threads; batches that no thread count divides.
        expect_same_bits_for_every_thread_count(Problem<T>(60, 67, 17, Activation::tanh, skip));
        expect_same_bits_for_every_thread_count(Problem<T>(600, 5, 16, Activation::gelu, skip));
        expect_same_bits_for_every_thread_count(Problem<T>(600, 1, 33, Activation::relu, skip));
    }
    // Wide layers, whose outputs the threads share: neither width nor batch a multiple of anything.
    expect_same_bits_for_every_thread_count(Problem<T>(5, 3, 391, Activation::tanh, 1));
    expect_same_bits_for_every_thread_count(Problem<T>(4, 1, 385, Activation::sigmoid, 2));
}

TYPED_TEST(DenseChainTest, ASequenceNeverAffectsAnother) {
    using T = TypeParam;
    Problem<T> problem(6, 9, 16, Activation::tanh, 1);
    const Results<T> expected(problem, {Backend::cpu, 1});
    problem.initial(0, 4, 3) = std::numeric_limits<T>::quiet_NaN();
    const Results<T> results(problem, {Backend::cpu, 1});
    for (index j = 0; j < problem.batch; ++j)
        EXPECT_EQ(bool(same_bits<T>(results.trajectory.view().sequences(j, j + 1),
                                    expected.trajectory.view().sequences(j, j + 1))),
                  j != 4);
    EXPECT_TRUE(std::isnan(results.trajectory(5, 4, 0)));
}

TYPED_TEST(DenseChainTest, StridedParametersAndStates) {
    using T = TypeParam;
    const index layers = 4, batch = 3, width = 5;
    const Problem<T> problem(layers, batch, width, Activation::tanh, 1);
    // The same numbers with gaps of NaN between rows, and the initial state as one step of a [B,T,D] array.
    const T nan = std::numeric_limits<T>::quiet_NaN();
    std::vector<T> weights(layers * width * 8, nan), biases(layers * 7, nan), states(batch * 3 * width, nan);
    const View<T> strided_weights(weights.data(), {layers, width, width}, width * 8, 8);
    const View<T> strided_biases(biases.data(), {layers, 1, width}, 7, 7);
    const View<T> strided_initial(states.data() + width, {1, batch, width}, width, 3 * width);
    for (index k = 0; k < width; ++k) {
        for (index layer = 0; layer < layers; ++layer) {
            strided_biases(layer, 0, k) = problem.biases(layer, 0, k);
            for (index i = 0; i < width; ++i) strided_weights(layer, i, k) = problem.weights(layer, i, k);
        }
        for (index j = 0; j < batch; ++j) strided_initial(0, j, k) = problem.initial(0, j, k);
    }
    const DenseChain<T> chain(strided_weights, strided_biases, strided_initial, {Activation::tanh, 1});
    const auto sequences = all(batch);
    for (const Backend backend : backends) {
        const Results<T> expected(problem, {backend});
        const Section section{0, layers, sequences, {backend}};
        Buffer<T> trajectory(problem.states()), after(problem.states()), dense({layers, batch * width, width});
        chain.run(section, strided_initial, trajectory);
        chain.linearise(section, problem.before(trajectory), after, Jacobian<T>(dense.data(), problem.states(), width));
        EXPECT_TRUE(same_bits(trajectory, expected.trajectory)) << name(backend);
        EXPECT_TRUE(same_bits(dense, expected.dense)) << name(backend);
    }
}

TYPED_TEST(DenseChainTest, NothingToDo) {
    using T = TypeParam;
    for (const Backend backend : backends) {
        const Problem<T> no_layers(0, 3, 4, Activation::tanh, 1), no_sequences(4, 0, 4, Activation::tanh, 1);
        const Results<T> a(no_layers, {backend}), b(no_sequences, {backend});
        EXPECT_EQ(no_layers.states().steps, 0);
        EXPECT_TRUE(near(a.initial, Buffer<T>({1, 3, 4}), 0)) << "no step, no gradient";
        EXPECT_TRUE(near(b.weights, Buffer<T>({4, 4, 4}), 0)) << "a sum over no sequences";
    }
}

TEST(DenseChain, RefusesWhatItCannotUse) {
    const index layers = 6, batch = 2, width = 3;
    const Buffer<float> weights({layers, width, width}), biases({layers, 1, width}), initial({1, batch, width});
    const auto construct = [&](View<const float> w, View<const float> b, View<const float> x, index skip) {
        return message_of([&] { DenseChain<float>(w, b, x, {Activation::tanh, skip}); });
    };
    EXPECT_EQ(construct(weights, biases, initial, 4), "weights: expected a multiple of skip = 4 layers, got 6 layers");
    EXPECT_EQ(construct(weights, biases, initial, -1), "options.skip: expected 0 or more, got -1");
    EXPECT_EQ(construct(Buffer<float>({6, 3, 2}), biases, initial, 1),
              "weights: expected square layers, [layers,width,width], got [6,3,2]");
    EXPECT_EQ(construct(weights, Buffer<float>({5, 1, 3}), initial, 1), "biases: expected [6,1,3], got [5,1,3]");
    EXPECT_EQ(construct(weights, biases, Buffer<float>({1, 2, 4}), 1), "initial: expected [1,2,3], got [1,2,4]");
    EXPECT_EQ(construct(View<const float>(nullptr, {6, 3, 3}), biases, initial, 1),
              "weights: expected an array of shape [6,3,3], got a null pointer");
    EXPECT_EQ(message_of([&] {
                  DenseChain<float>(weights, biases, initial, {Activation(9), 1});
              }),
              "options.activation: expected one of Activation, got 9");

    const DenseChain<float> chain(weights, biases, initial, {Activation::tanh, 2});
    const std::vector<index> sequences{0, 1}, unknown{0, 2};
    const Buffer<float> state({1, 2, 3}), states({3, 2, 3}), dense({3, 6, 3});
    const Jacobian<float> jacobian(dense.data(), {3, 2, 3}, 3);
    const Section section{0, 3, sequences};
    EXPECT_EQ(message_of([&] {
                  chain.run({0, 4, sequences}, state, states);
              }),
              "section: expected 0 <= first <= last <= 3, got first 0, last 4");
    EXPECT_EQ(message_of([&] {
                  chain.run({0, 3, unknown}, state, states);
              }),
              "section.sequences: expected numbers from 0 to 1, got 2");
    EXPECT_EQ(message_of([&] {
                  chain.run(section, Buffer<float>({1, 1, 3}), states);
              }),
              "state: expected [1,2,3], got [1,1,3]");
    EXPECT_EQ(message_of([&] {
                  chain.run(section, state, View<float>(states.data(), {3, 2, 3}, 8, 4));
              }),
              "trajectory: expected contiguous memory, got strides of 8 and 4 elements");
    EXPECT_EQ(message_of([&] {
                  chain.run_with_slopes(section, state, states, Buffer<float>({3, 2, 3}));
              }),
              "slopes: expected [6,2,3], got [3,2,3]");
    EXPECT_EQ(message_of([&] { chain.step(section, states, state); }), "after: expected [3,2,3], got [1,2,3]");
    EXPECT_EQ(message_of([&] { chain.linearise_diagonal(section, states, states, jacobian); }),
              "diagonal: expected blocks of 1 for states [3,2,3], got blocks of 3 for states [3,2,3]");
    EXPECT_EQ(message_of([&] {
                  chain.parameter_gradients(section, states, states, Buffer<float>({6, 3, 3}), state);
              }),
              "biases: expected [6,1,3], got [1,2,3]");
    EXPECT_EQ(message_of([&] {
                  chain.run({0, 3, sequences, {Backend::cpu, -2}}, state, states);
              }),
              "execution.threads: expected 0 or more, got -2");
}

/// x_t = t x_{t-1} with a block-diagonal Jacobian, which leaves everything to the base class that it can.
struct Growth : Recurrence<double> {
    explicit Growth(const Shape& shape, index block) : Recurrence(shape, block) {}
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j)
                for (index k = 0; k < before.width(); ++k)
                    after(i, j, k) = double(section.first + i + 1) * (before(i, j, k) + 1);
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j)
                for (index k = 0; k < before.width(); ++k)
                    for (index column = k / block() * block(); column < (k / block() + 1) * block(); ++column)
                        jacobian(i, j, k, column) = k == column ? double(section.first + i + 1) : 99;
    }
};

TEST(Recurrence, DefaultsOfTheBaseClass) {
    const Growth growth({5, 3, 4}, 2);
    const std::vector<index> sequences{2, 0};
    const Section section{1, 5, sequences};
    Buffer<double> state({1, 2, 4}), trajectory({4, 2, 4}), after({4, 2, 4}), diagonal({4, 2, 4});
    state(0, 1, 3) = 7;
    growth.initial(section, state);
    growth.run(section, state, trajectory);
    double x = 0;
    for (index i = 0; i < 4; ++i) {
        x = double(i + 2) * (x + 1);
        for (index j = 0; j < 2; ++j) EXPECT_EQ(trajectory(i, j, 3), x);
    }
    growth.linearise_diagonal(section, trajectory, after, Jacobian<double>(diagonal.data(), {4, 2, 4}, 1));
    for (index i = 0; i < 4; ++i)
        for (index k = 0; k < 4; ++k) {
            EXPECT_EQ(diagonal(i, 1, k), double(i + 2));
            EXPECT_EQ(after(i, 1, k), double(i + 2) * (trajectory(i, 1, k) + 1));
        }
}

TEST(Recurrence, LinearisesALongDiagonalInParts) {
    // 40,000 steps of 4 x 4 blocks are more than it holds at once.
    const Growth growth({40000, 2, 4}, -1);
    const std::vector<index> sequences{0, 1};
    Buffer<double> before({40000, 2, 4}), after({40000, 2, 4}), diagonal({40000, 2, 4});
    growth.linearise_diagonal({0, 40000, sequences}, before, after,
                              Jacobian<double>(diagonal.data(), growth.shape(), 1));
    for (index i = 0; i < 40000; ++i) {
        ASSERT_EQ(diagonal(i, 1, 2), double(i + 1));
        ASSERT_EQ(after(i, 1, 2), double(i + 1));
    }
}

TEST(Recurrence, RefusesShapesAndBlocks) {
    EXPECT_EQ(message_of([] { Growth({4, 2, 6}, 4); }), "block: expected -1 or a divisor of the width 6, got 4");
    EXPECT_EQ(message_of([] { Growth({4, 2, 6}, 0); }), "block: expected -1 or a divisor of the width 6, got 0");
    EXPECT_EQ(message_of([] {
                  Growth({4, 2, 0}, -1);
              }),
              "shape: expected steps >= 0, batch >= 0 and width >= 1, got [4,2,0]");
    EXPECT_EQ(Growth({4, 2, 6}, -1).block(), 6);
}

}  // namespace
}  // namespace deeppcr
