// The functions of a Cell: their error over all floats, in units in the last place, as the kernels of this instruction
// set compute them (ctest runs this under each). The bounds are those that scalar.hpp states.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
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

/// The largest error over every float. Beyond `least` and `greatest` and below 2^-30 the exact value is `low`,
/// `high` or `near_zero(x)` to float's rounding: no double function is called for those three quarters.
/// `flushes`: results below the smallest normal number may be 0. `evaluate_block` fills an array of results; `stride`:
/// every so-manieth float alone.
template <class Evaluate>
double largest_error(const Evaluate& evaluate_block, double (*exact)(double), double least, double greatest, double low,
                     double (*high)(double), double (*near_zero)(double), bool flushes, std::uint64_t stride = 1) {
    constexpr std::uint64_t block = 1 << 16;
    std::vector<float> x(block), result(block);
    double largest = 0;
    for (std::uint64_t first = 0; first < (std::uint64_t(1) << 32); first += block * stride) {
        for (std::uint64_t i = 0; i < block; ++i) x[i] = std::bit_cast<float>(std::uint32_t(first + i * stride));
        evaluate_block(x, result);
        for (std::uint64_t i = 0; i < block; ++i) {
            const double value = x[i];
            const double truth = std::abs(value) < 0x1p-30 ? near_zero(value)
                                 : value < least           ? low
                                 : value > greatest        ? high(value)
                                                           : exact(value);
            if (result[i] == float(truth)) continue;  // no nearer float
            if (flushes && result[i] == 0 && std::abs(truth) < 0x1p-126) continue;
            const double error = units(result[i], truth);
            if (!(error <= largest)) largest = error;
        }
    }
    return largest;
}
template <class C>
double largest_error(double (*exact)(double), double least, double greatest, double low, double (*high)(double),
                     double (*near_zero)(double), bool flushes) {
    // Every float under the instruction set that this machine chooses; under one that a test asks for, one in 61:
    // over 100,000 between any power of two and the next.
    const std::uint64_t stride = std::getenv("DEEPPCR_SIMD") == nullptr ? 1 : 61;
    return largest_error(evaluate_all<C, float>, exact, least, greatest, low, high, near_zero, flushes, stride);
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

/// A GPU's instructions with the largest errors that CUDA's documentation allows them, relative: 2^-22.5 for
/// ex2.approx, 2^-23 for rcp.approx; one way or the other by the argument's bits.
struct WorstHardware {
    static float off(double exact, double units, float x) {
        const double sign = (std::bit_cast<std::uint32_t>(x) * 0x9E3779B9U >> 31) != 0 ? 1 : -1;
        const float result = float(exact * (1 + sign * units * 0x1p-24));
        return std::abs(result) < 0x1p-126F ? 0 : result;
    }
    static float power_of_two(float x) { return off(std::exp2(double(x)), 2.8284, x); }
    static float reciprocal(float x) { return off(1 / double(x), 2, x); }
    static float product(float a, float b) { return a * b; }
};
template <float (*function)(float)>
void apply_to_all(const std::vector<float>& x, std::vector<float>& result) {
    for (std::size_t i = 0; i < x.size(); ++i) result[i] = function(x[i]);
}

TEST(ScalarFunctions, OfGpusOverManyFloats) {
    using namespace scalar_functions;
    constexpr std::uint64_t stride = 127;
    const double exponential = largest_error(
        apply_to_all<fast_exponential<WorstHardware>>, [](double x) { return std::exp(x); }, -110, 89, 0, infinite, one,
        true, stride);
    const double sigmoid = largest_error(
        apply_to_all<fast_logistic<WorstHardware>>, [](double x) { return 1 / (1 + std::exp(-x)); }, -88.5, 20, 0, one,
        [](double) { return 0.5; }, true, stride);
    const double tangent = largest_error(
        apply_to_all<fast_hyperbolic_tangent<WorstHardware>>, [](double x) { return std::tanh(x); }, -10, 10, -1, one,
        [](double x) { return x; }, true, stride);
    // Every float near the end of exp's range, and where tanh changes its formula.
    for (float x = 88.5F; x <= 89; x = std::nextafter(x, 100.0F))
        EXPECT_LE(units(fast_exponential<WorstHardware>(x), std::exp(double(x))), 4) << x;
    for (float x = 0.4999F; x <= 0.5001F; x = std::nextafter(x, 1.0F))
        EXPECT_LE(units(fast_hyperbolic_tangent<WorstHardware>(x), std::tanh(double(x))), 7) << x;
    std::cout << "GPU: exp " << exponential << ", sigmoid " << sigmoid << ", tanh " << tangent << " ULP\n";
    EXPECT_LE(exponential, 4);
    EXPECT_LE(sigmoid, 8);
    EXPECT_LE(tangent, 7);
}

TEST(ScalarFunctions, OfGpusAreOddOrReachTheirLimits) {
    using namespace scalar_functions;
    EXPECT_TRUE(std::isinf(fast_exponential<WorstHardware>(88.8F)));
    EXPECT_TRUE(std::isinf(fast_exponential<WorstHardware>(HUGE_VALF)));
    EXPECT_EQ(fast_logistic<WorstHardware>(-HUGE_VALF), 0);
    EXPECT_NEAR(fast_logistic<WorstHardware>(HUGE_VALF), 1, 0x1p-22);
    for (const float x : {0.0F, 1e-42F, 1e-20F, 0.2F, 0.31F, 3.0F, 100.0F, HUGE_VALF})
        EXPECT_EQ(std::bit_cast<std::uint32_t>(fast_hyperbolic_tangent<WorstHardware>(-x)),
                  std::bit_cast<std::uint32_t>(-fast_hyperbolic_tangent<WorstHardware>(x)));
}

TEST(ScalarFunctions, OfGpusForNumbersOf16Bits) {
    using namespace scalar_functions;
    double exponential = 0, sigmoid = 0;
    for (float x = -87; x <= 87; x += 0x1p-10F) {
        exponential = std::max(exponential, std::abs(brief_exponential<WorstHardware>(x) / std::exp(double(x)) - 1));
        sigmoid = std::max(sigmoid, std::abs(brief_logistic<WorstHardware>(x) * (1 + std::exp(-double(x))) - 1));
    }
    std::cout << "GPU, 16 bits: exp " << exponential << ", sigmoid " << sigmoid << ", relative\n";
    EXPECT_LE(exponential, 0x1p-16);
    EXPECT_LE(sigmoid, 0x1p-16);
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    EXPECT_EQ(brief_exponential<WorstHardware>(-infinity), 0);
    EXPECT_EQ(brief_exponential<WorstHardware>(infinity), infinity);
    EXPECT_TRUE(std::isnan(brief_exponential<WorstHardware>(nan)));
    for (const float x : {-infinity, -1e38F, -100.0F}) EXPECT_EQ(brief_logistic<WorstHardware>(x), 0) << x;
    for (const float x : {infinity, 1e38F, 100.0F}) EXPECT_NEAR(brief_logistic<WorstHardware>(x), 1, 0x1p-22) << x;
    EXPECT_TRUE(std::isnan(brief_logistic<WorstHardware>(nan)));
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
    EXPECT_LE(tangent, 2.6);
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
