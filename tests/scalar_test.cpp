// The functions of a Cell: their error over all floats, in units in the last place, as the kernels of this instruction
// set compute them (ctest runs this under each). The bounds are those that scalar.hpp states.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>

#include <deeppcr/cell_kernels.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr {
namespace {

#define DEEPPCR_FUNCTION_CELL(Name, function)                                                  \
    struct Name {                                                                              \
        static constexpr int states = 1, inputs = 1, parameters = 1;                           \
        template <class S>                                                                     \
        static std::array<S, 1> step(std::array<S, 1>, std::array<S, 1> u, std::array<S, 1>) { \
            return {function(u[0])};                                                           \
        }                                                                                      \
    };
DEEPPCR_FUNCTION_CELL(Exponential, exp)
DEEPPCR_FUNCTION_CELL(Sigmoid, sigmoid)
DEEPPCR_FUNCTION_CELL(Tanh, tanh)
DEEPPCR_FUNCTION_CELL(Softplus, softplus)

template <class C, class T>
void evaluate_all(const std::vector<T>& x, std::vector<T>& result) {
    const std::vector<T> zeros(cell::lanes);
    cell::LaneBlock<T> block{};
    block.inputs = x.data();
    block.parameters = block.before = zeros.data();
    block.after = result.data();
    cell::LaneSweep<T> sweep;
    sweep.steps = index(x.size()) / cell::lanes;
    sweep.count = 1;
    sweep.blocks = &block;
    sweep.input_step = sweep.after_step = cell::lanes;
    cell::kernels_of<C, T>().apply(sweep);
}

/// Distance in units of the last place of the exact value; subnormal exact values count in units of the smallest normal
/// number's, and an infinite result is right from half a unit below 2^128 on.
double units(float result, double exact) {
    if (std::isnan(exact) || std::isnan(result)) return std::isnan(exact) && std::isnan(result) ? 0 : HUGE_VAL;
    if (std::isinf(result)) return exact >= 0x1.ffffffp127 ? 0 : HUGE_VAL;
    int exponent = 0;
    (void)std::frexp(exact, &exponent);
    return std::abs(double(result) - exact) / std::ldexp(1.0, std::max(exponent, -125) - 24);
}

/// The largest error over every float. Beyond `saturated` (towards either end) and below 2^-30 the exact value is
/// `low`, `high` or `near_zero(x)` to float's rounding: no double function is called for those three quarters.
/// `flushes`: results below the smallest normal number may be 0.
template <class C>
double largest_error(double (*exact)(double), double least, double greatest, double low, double (*high)(double),
                     double (*near_zero)(double), bool flushes) {
    constexpr std::uint64_t block = 1 << 16;
    std::vector<float> x(block), result(block);
    double largest = 0;
    for (std::uint64_t first = 0; first < (std::uint64_t(1) << 32); first += block) {
        for (std::uint64_t i = 0; i < block; ++i) x[i] = std::bit_cast<float>(std::uint32_t(first + i));
        evaluate_all<C>(x, result);
        for (std::uint64_t i = 0; i < block; ++i) {
            const double value = x[i];
            const double truth = std::abs(value) < 0x1p-30 ? near_zero(value)
                                 : value < least           ? low
                                 : value > greatest        ? high(value)
                                                           : exact(value);
            if (result[i] == float(truth)) continue;  // no nearer float
            if (flushes && result[i] == 0 && truth < 0x1p-126) continue;
            const double error = units(result[i], truth);
            if (!(error <= largest)) largest = error;
        }
    }
    return largest;
}

constexpr auto infinite = [](double) { return HUGE_VAL; };
constexpr auto one = [](double) { return 1.0; };

TEST(ScalarFunctions, ExponentialOverAllFloats) {
    const double error =
        largest_error<Exponential>([](double x) { return std::exp(x); }, -110, 89, 0, infinite, one, false);
    std::cout << simd_target() << ": exp " << error << " ULP\n";
    EXPECT_LE(error, 1.05);
}

TEST(ScalarFunctions, SigmoidOverAllFloats) {
    const double error = largest_error<Sigmoid>([](double x) { return 1 / (1 + std::exp(-x)); }, -88.5, 20, 0, one,
                                                [](double) { return 0.5; }, true);
    std::cout << simd_target() << ": sigmoid " << error << " ULP\n";
    EXPECT_LE(error, 2.5);
}

TEST(ScalarFunctions, TanhOverAllFloats) {
    const double error =
        largest_error<Tanh>([](double x) { return std::tanh(x); }, -10, 10, -1, one, [](double x) { return x; }, false);
    std::cout << simd_target() << ": tanh " << error << " ULP\n";
    EXPECT_LE(error, 2.5);
}

TEST(ScalarFunctions, SoftplusOverAllFloats) {
    const double error =
        largest_error<Softplus>([](double x) { return x > 30 ? x : std::log1p(std::exp(x)); }, -88.5, 30, 0,
                                [](double x) { return x; }, [](double x) { return 0.69314718055994531 + x / 2; }, true);
    std::cout << simd_target() << ": softplus " << error << " ULP\n";
    EXPECT_LE(error, 3);
}

double units_double(double result, long double exact) {
    int exponent = 0;
    (void)std::frexp(double(exact), &exponent);
    return double(std::abs((long double)(result)-exact) / std::ldexp(1.0L, std::max(exponent, -1021) - 53));
}

template <class C>
double largest_double_error(long double (*exact)(long double), double range) {
    std::mt19937_64 random(1);
    std::uniform_real_distribution<double> wide(-range, range), exponents(-40, 0);
    double largest = 0;
    std::vector<double> x(1 << 16), result(1 << 16);
    for (int round = 0; round < 16; ++round) {
        for (std::size_t i = 0; i < x.size(); ++i)
            x[i] = i % 2 == 0 ? wide(random) : std::copysign(std::exp2(exponents(random)), wide(random));
        evaluate_all<C>(x, result);
        for (std::size_t i = 0; i < x.size(); ++i)
            largest = std::max(largest, units_double(result[i], exact((long double)(x[i]))));
    }
    return largest;
}

TEST(ScalarFunctions, DoubleOverRandomNumbers) {
    const double exponential = largest_double_error<Exponential>([](long double x) { return expl(x); }, 700);
    const double sigmoid = largest_double_error<Sigmoid>([](long double x) { return 1 / (1 + expl(-x)); }, 700);
    const double tangent = largest_double_error<Tanh>([](long double x) { return tanhl(x); }, 30);
    const double softplus = largest_double_error<Softplus>([](long double x) { return log1pl(expl(x)); }, 700);
    std::cout << simd_target() << ": double: exp " << exponential << ", sigmoid " << sigmoid << ", tanh " << tangent
              << ", softplus " << softplus << " ULP\n";
    EXPECT_LE(exponential, 1.05);
    EXPECT_LE(sigmoid, 2.5);
    EXPECT_LE(tangent, 2.5);
    EXPECT_LE(softplus, 3);
}

TEST(ScalarFunctions, DerivativesOfDuals) {
    const auto check = [](const auto& function, double x) {
        const double h = 1e-6;
        const Dual<double> dual = function(Dual<double>(x, 1));
        const double quotient =
            (function(Scalar<double>(x + h)).value - function(Scalar<double>(x - h)).value) / (2 * h);
        EXPECT_NEAR(dual.derivative, quotient, 1e-8 * std::max(1.0, std::abs(quotient)));
        EXPECT_NEAR(dual.value, function(Scalar<double>(x)).value, 1e-15 * std::max(1.0, std::abs(dual.value)));
    };
    for (const double x : {0.3, 1.7, 2.9}) {
        check([](auto v) { return exp(v); }, x);
        check([](auto v) { return sigmoid(v); }, x);
        check([](auto v) { return tanh(v); }, x);
        check([](auto v) { return softplus(v); }, x);
        check([](auto v) { return abs(-v); }, x);
        check([](auto v) { return max(v, 2 - v) + min(v, v * v); }, x);
        check([](auto v) { return sqrt(v) * log(v) / (1 + v); }, x);
        check([](auto v) { return sin(v) - cos(v) / v; }, x);
    }
}

}  // namespace
}  // namespace deeppcr
