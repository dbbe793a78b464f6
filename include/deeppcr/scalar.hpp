// The numbers that a Cell computes with: Scalar, a plain number, and Dual, a number with its derivatives; and the
// functions of both, free of branches, so that a loop over neighbouring channels becomes SIMD code.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <deeppcr/storage.hpp>

// GCC tells of its sanitizers by macros, Clang by features.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DEEPPCR_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define DEEPPCR_SANITIZED
#endif
#endif

// What a loop over lanes is made of must all lie in the loop itself. Under a sanitizer, which multiplies code, it need
// not, and one instruction set is enough: compilers would work on each kernel for minutes.
#if defined(__CUDACC__)
#define DEEPPCR_INLINE __host__ __device__ __forceinline__
#define DEEPPCR_FLATTEN noinline
#define DEEPPCR_ONE_KERNEL_SET false
#elif defined(DEEPPCR_SANITIZED)
#define DEEPPCR_INLINE inline
#define DEEPPCR_FLATTEN noinline
#define DEEPPCR_ONE_KERNEL_SET true
#else
#define DEEPPCR_INLINE __attribute__((always_inline)) inline
#define DEEPPCR_FLATTEN flatten, noinline
#define DEEPPCR_ONE_KERNEL_SET false
#endif
#if defined(__CUDA_ARCH__)
#define DEEPPCR_UNROLLED _Pragma("unroll")
#else
#define DEEPPCR_UNROLLED
#endif

namespace deeppcr {

/// A plain number of type T, float or double. A class of its own, so that exp, tanh, ... in a Cell find the functions
/// below. Arithmetic is T's. Stored: what a Cell's states are kept as, T or, on a GPU, a type of 16 bits, for which
/// functions need not be exact to T's last place.
template <class T, class Stored = T>
struct Scalar {
    T value{};

    constexpr Scalar() = default;
    template <class U>
    requires std::is_arithmetic_v<U> DEEPPCR_INLINE constexpr Scalar(U number)
        : value(T(number)) {}  // NOLINT(google-explicit-constructor)

    DEEPPCR_INLINE friend constexpr Scalar operator+(Scalar a, Scalar b) { return a.value + b.value; }
    DEEPPCR_INLINE friend constexpr Scalar operator-(Scalar a, Scalar b) { return a.value - b.value; }
    DEEPPCR_INLINE friend constexpr Scalar operator*(Scalar a, Scalar b) { return a.value * b.value; }
    DEEPPCR_INLINE friend constexpr Scalar operator/(Scalar a, Scalar b) { return a.value / b.value; }
    DEEPPCR_INLINE friend constexpr Scalar operator-(Scalar a) { return -a.value; }
    DEEPPCR_INLINE friend constexpr bool operator<(Scalar a, Scalar b) { return a.value < b.value; }
    DEEPPCR_INLINE friend constexpr bool operator>(Scalar a, Scalar b) { return a.value > b.value; }
};

namespace scalar_functions {

template <class T>
struct Format;
template <>
struct Format<float> {
    using bits = std::int32_t;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float to_integer = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float ln2_high = 0x1.62e4p-1F, ln2_low = 0x1.7f7d1cp-20F;
    static constexpr float least = -104, greatest = 89;  // exp is 0 and infinite beyond
    // (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2, and (2 atanh(s) - 2 s) / s^3 in powers of s^2 for s^2 <= 1/9: minimax
    DEEPPCR_INLINE static constexpr std::array<float, 5> exponential() {
        return {0.5000000095188965F, 0.1666651883972037F, 0.0416662057894660F, 0.0083688893514160F,
                0.0013950491951150F};
    }
    DEEPPCR_INLINE static constexpr std::array<float, 4> logarithm() {
        return {0.6666641302403560F, 0.4002170613948769F, 0.2799901338302693F, 0.2802514034984297F};
    }
};
template <>
struct Format<double> {
    using bits = std::int64_t;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double to_integer = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
    static constexpr double least = -746, greatest = 710;
    DEEPPCR_INLINE static constexpr std::array<double, 10> exponential() {
        return {0.50000000000000127418,     0.16666666666666699052,   0.041666666666515416203,
                0.0083333333333072163251,   0.0013888888947016294747, 0.00019841269917354885189,
                0.000024801489941986953631, 2.7557216329515087804e-6, 2.7631280378061360781e-7,
                2.5117851188768949662e-8};
    }
    DEEPPCR_INLINE static constexpr std::array<double, 12> logarithm() {
        return {0.66666666666666666295, 0.40000000000000226056, 0.28571428571380695286,  0.22222222227303265506,
                0.18181817866218674999, 0.15384627840701968939, 0.13333006461012617953,  0.11770532745691205366,
                0.10455656911013419386, 0.10094430316877743505, 0.057969160325849998473, 0.16057043347053677746};
    }
};

template <class T>
DEEPPCR_INLINE constexpr T two_to(typename Format<T>::bits power) {
    return std::bit_cast<T>((power + Format<T>::bias) << Format<T>::mantissa);
}

template <class T, std::size_t n, std::size_t i = 0>
DEEPPCR_INLINE constexpr T polynomial(std::array<T, n> coefficients, T x) {
    if constexpr (i + 1 == n)
        return coefficients[i];
    else
        return coefficients[i] + x * polynomial<T, n, i + 1>(coefficients, x);
}

/// x = power ln 2 + remainder, |remainder| <= ln 2 / 2, and exp(remainder) - 1.
template <class T>
struct Reduced {
    typename Format<T>::bits power;
    T exponential_less_one;
};
template <class T>
DEEPPCR_INLINE constexpr Reduced<T> reduce(T x) {
    using F = Format<T>;
    const T shifted = x * T(1.442695040888963407359924681) + F::to_integer;
    const T whole = shifted - F::to_integer;
    const T r = (x - whole * F::ln2_high) - whole * F::ln2_low;
    using bits = typename F::bits;
    return {bits(std::bit_cast<bits>(shifted) - std::bit_cast<bits>(F::to_integer)),
            r + r * r * polynomial(F::exponential(), r)};
}

/// condition ? a : b without a branch: compilers turn the operator into jumps where an operand is expensive, and a loop
/// with jumps into no SIMD code.
template <class T>
DEEPPCR_INLINE constexpr T select(bool condition, T a, T b) {
    using bits = typename Format<T>::bits;
    const bits mask = -bits(condition);
    return std::bit_cast<T>((std::bit_cast<bits>(a) & mask) | (std::bit_cast<bits>(b) & ~mask));
}
template <class T>
DEEPPCR_INLINE constexpr T clamp(T x, T least, T greatest) {  // NaN stays
    x = select(x < least, least, x);
    return select(x > greatest, greatest, x);
}
template <class T>
DEEPPCR_INLINE constexpr T magnitude(T x) {
    using bits = typename Format<T>::bits;
    return std::bit_cast<T>(std::bit_cast<bits>(x) & ~(bits(1) << (8 * sizeof(T) - 1)));
}
template <class T>
DEEPPCR_INLINE constexpr T with_sign(T x, T sign) {
    using bits = typename Format<T>::bits;
    constexpr bits mask = bits(1) << (8 * sizeof(T) - 1);
    return std::bit_cast<T>((std::bit_cast<bits>(x) & ~mask) | (std::bit_cast<bits>(sign) & mask));
}

/// The larger, as running maxima of errors are taken: NaN once either is.
template <class T>
DEEPPCR_INLINE constexpr T larger_or_nan(T largest, T more) {
    return largest != largest || more <= largest ? largest : more;  // NOLINT(misc-redundant-expression)
}

// A GPU has 2^x and 1/x in hardware, to about two units and one unit in the last place of a float; subnormal numbers
// are 0. The functions of float made of them take that hardware as a parameter, so that a test can put in its own.
#if defined(__CUDA_ARCH__)
struct Hardware {
    __device__ __forceinline__ static float power_of_two(float x) {
        float result;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
        return result;
    }
    __device__ __forceinline__ static float reciprocal(float x) {
        float result;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
        return result;
    }
    /// To 2^-11, relative.
    __device__ __forceinline__ static float tangent(float x) {
        float result;
        asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
        return result;
    }
    /// Left whole: of -(a b) the compiler would make another product, where an operand takes its sign for nothing.
    __device__ __forceinline__ static float product(float a, float b) { return __fmul_rn(a, b); }
};
#endif
constexpr float log2_e = 1.44269504F, log2_e_low = 1.92596299e-8F, ln_2 = 0.693147181F;

/// x log2(e) as a sum: the product's rounding error is up to |x| units.
struct Power {
    float rounded, rest;
};
template <class Hardware>
DEEPPCR_INLINE Power power_of(float x) {
    const float rounded = Hardware::product(x, log2_e);
    return {rounded, std::fma(x, log2_e_low, std::fma(x, log2_e, -rounded))};
}

template <class Hardware>
DEEPPCR_INLINE float fast_exponential(float x) {
    const Power power = power_of<Hardware>(clamp(x, Format<float>::least, Format<float>::greatest));
    const float result = Hardware::power_of_two(power.rounded);
    return select(result > std::numeric_limits<float>::max(), result, std::fma(result, power.rest * ln_2, result));
}
template <class Hardware>
DEEPPCR_INLINE float fast_logistic(float x) {
    // Beyond 88 the result is 1, or below the smallest normal number, thus 0.
    const Power power = power_of<Hardware>(clamp(x, -88.0F, 88.0F));
    return Hardware::reciprocal(
        std::fma(Hardware::power_of_two(-power.rounded), std::fma(power.rest, -ln_2, 1.0F), 1.0F));
}
template <class Hardware>
DEEPPCR_INLINE float fast_hyperbolic_tangent(float x) {
    // Odd powers where 1 - 2 / (1 + e^2|x|) would cancel.
    const float square = x * x, power = Hardware::power_of_two(std::fabs(x) * (2 * log2_e));
    const float far = std::fma(-2.0F, Hardware::reciprocal(1 + power), 1.0F);  // positive, where it counts
    const float even = std::fma(square, std::fma(square, std::fma(square, 0.0179887444F, -0.0533871106F), 0.133304765F),
                                -0.333333111F);
    const auto sign = std::bit_cast<std::int32_t>(x) & std::numeric_limits<std::int32_t>::min();
    return square < 0.25F ? x * std::fma(square, even, 1.0F)
                          : std::bit_cast<float>(std::bit_cast<std::int32_t>(far) | sign);
}

// For numbers of 16 bits, whose units are 2^-8 or 2^-11: the product with log2(e) is not corrected, which leaves
// |x| 2^-24 of e^x; a bfloat16's tanh is the hardware's.
template <class Hardware>
DEEPPCR_INLINE float brief_exponential(float x) {
    return Hardware::power_of_two(Hardware::product(x, log2_e));
}
template <class Hardware>
DEEPPCR_INLINE float brief_logistic(float x) {
    return Hardware::reciprocal(1 + Hardware::power_of_two(Hardware::product(x, -log2_e)));
}

template <class T, class Stored = T>
DEEPPCR_INLINE constexpr T exponential(T x) {
#if defined(__CUDA_ARCH__)
    if constexpr (is_stored_in_16_bits<Stored>) return brief_exponential<Hardware>(x);
    if constexpr (std::is_same_v<T, float>) return fast_exponential<Hardware>(x);
#endif
    const auto [power, less_one] = reduce(clamp(x, Format<T>::least, Format<T>::greatest));
    const auto half = power >> 1;  // in two steps, so that subnormal results and the largest ones come out right
    return ((1 + less_one) * two_to<T>(half)) * two_to<T>(power - half);
}

/// exp(-|x|), 0 where that would be below the smallest normal number.
template <class T>
DEEPPCR_INLINE constexpr T decay(T x) {
    constexpr T least = -T(Format<T>::bias - 1) * T(0.69314718055994530942);
    const T argument = -magnitude(x);
    const auto [power, less_one] = reduce(select(argument < least, least, argument));
    return select(argument < least, T(0), (1 + less_one) * two_to<T>(power));
}

template <class T, class Stored = T>
DEEPPCR_INLINE constexpr T logistic(T x) {
#if defined(__CUDA_ARCH__)
    if constexpr (is_stored_in_16_bits<Stored>) return brief_logistic<Hardware>(x);
    if constexpr (std::is_same_v<T, float>) return fast_logistic<Hardware>(x);
#endif
    const T e = decay(x);
    return select(x < 0, e, T(1)) / (1 + e);
}

template <class T, class Stored = T>
DEEPPCR_INLINE constexpr T hyperbolic_tangent(T x) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<Stored, bfloat16>) return Hardware::tangent(x);
    if constexpr (std::is_same_v<T, float>) return fast_hyperbolic_tangent<Hardware>(x);
#endif
    // With e = exp(-2|x|) - 1, without cancellation: tanh|x| = -e / (2 + e).
    constexpr T least = -T(Format<T>::mantissa + 3);
    const T argument = -2 * magnitude(x);
    const auto [power, less_one] = reduce(select(argument < least, least, argument));
    const T scale = two_to<T>(power);
    const T e = (scale - 1) + scale * less_one;
    return with_sign(-e / (2 + e), x);
}

template <class T>
DEEPPCR_INLINE constexpr T logarithm_of_one_plus_exponential(T x) {
    // log(1 + e) = 2 atanh(e / (2 + e)), e = exp(-|x|)
    const T e = decay(x), s = e / (2 + e), square = s * s;
    return select(x < 0, T(0), x) + (2 * s + s * square * polynomial(Format<T>::logarithm(), square));
}

}  // namespace scalar_functions

/// Each function below states its error against the exact value in units in the last place (ULP) for float, a bound of
/// the largest over all 2^32 floats under the widest instruction set at hand, and over one in 61 under the others
/// (tests/scalar_test.cpp counts); for double, over many random ones. NaN gives NaN; overflow gives infinity. On a GPU,
/// float's exp, sigmoid and tanh are made of its 2^x and 1/x; their errors are given beside, for the largest that
/// CUDA's documentation allows those, and results below the smallest normal number are 0. There, where states are
/// stored in 16 bits, exp and sigmoid are exact to 2^-16, relative, and bfloat16's tanh to 2^-11; what a derivative
/// makes of it, 1 - tanh^2, to 2^-10, absolute.

/// e^x. At most 1.05 ULP; on a GPU 4.
template <class T, class Stored>
DEEPPCR_INLINE constexpr Scalar<T, Stored> exp(Scalar<T, Stored> x) {
    return scalar_functions::exponential<T, Stored>(x.value);
}
/// 1 / (1 + e^-x). At most 2.5 ULP, on a GPU 8; results below the smallest normal number are 0.
template <class T, class Stored>
DEEPPCR_INLINE constexpr Scalar<T, Stored> sigmoid(Scalar<T, Stored> x) {
    return scalar_functions::logistic<T, Stored>(x.value);
}
/// At most 2.6 ULP (2.5 as GCC fuses operations); on a GPU 7.
template <class T, class Stored>
DEEPPCR_INLINE constexpr Scalar<T, Stored> tanh(Scalar<T, Stored> x) {
    return scalar_functions::hyperbolic_tangent<T, Stored>(x.value);
}
/// log(1 + e^x). At most 3 ULP; results below the smallest normal number are 0.
template <class T, class Stored>
DEEPPCR_INLINE constexpr Scalar<T, Stored> softplus(Scalar<T, Stored> x) {
    return scalar_functions::logarithm_of_one_plus_exponential(x.value);
}
template <class T, class Stored>
DEEPPCR_INLINE constexpr Scalar<T, Stored> abs(Scalar<T, Stored> x) {
    return scalar_functions::magnitude(x.value);
}
/// The larger; `b` where either is NaN.
template <class T, class Stored>
DEEPPCR_INLINE constexpr Scalar<T, Stored> max(Scalar<T, Stored> a, Scalar<T, Stored> b) {
    return scalar_functions::select(a.value > b.value, a.value, b.value);
}
template <class T, class Stored>
DEEPPCR_INLINE constexpr Scalar<T, Stored> min(Scalar<T, Stored> a, Scalar<T, Stored> b) {
    return scalar_functions::select(a.value < b.value, a.value, b.value);
}
/// Correctly rounded.
template <class T, class Stored>
DEEPPCR_INLINE Scalar<T, Stored> sqrt(Scalar<T, Stored> x) {
    return std::sqrt(x.value);
}
/// The standard library's: no SIMD.
template <class T, class Stored>
DEEPPCR_INLINE Scalar<T, Stored> log(Scalar<T, Stored> x) {
    return std::log(x.value);
}
template <class T, class Stored>
DEEPPCR_INLINE Scalar<T, Stored> sin(Scalar<T, Stored> x) {
    return std::sin(x.value);
}
template <class T, class Stored>
DEEPPCR_INLINE Scalar<T, Stored> cos(Scalar<T, Stored> x) {
    return std::cos(x.value);
}

/// A number with its derivative in one direction (forward-mode automatic differentiation). Directions are cheap: where
/// a step is evaluated once per direction in a row, the compiler computes all values once.
template <class T>
struct Dual {
    using value_type = T;
    using stored_type = T;
    T value{}, derivative{};

    constexpr Dual() = default;
    template <class U>
    requires std::is_arithmetic_v<U> DEEPPCR_INLINE constexpr Dual(U number)
        : value(T(number)) {}  // NOLINT(google-explicit-constructor)
    DEEPPCR_INLINE constexpr Dual(T number, T slope) : value(number), derivative(slope) {}
    // Copied member by member: GCC leaves some copies of whole structures in memory, and loops with them as they are.
    DEEPPCR_INLINE constexpr Dual(const Dual& other) : value(other.value), derivative(other.derivative) {}
    DEEPPCR_INLINE constexpr Dual& operator=(const Dual& other) {
        value = other.value;
        derivative = other.derivative;
        return *this;
    }

    DEEPPCR_INLINE friend constexpr Dual operator+(Dual a, Dual b) {
        return {a.value + b.value, plus(a.derivative, b.derivative)};
    }
    DEEPPCR_INLINE friend constexpr Dual operator-(Dual a, Dual b) {
        return {a.value - b.value, plus(a.derivative, times(T(-1), b.derivative))};
    }
    DEEPPCR_INLINE friend constexpr Dual operator*(Dual a, Dual b) {
        return {a.value * b.value, plus(times(b.value, a.derivative), times(a.value, b.derivative))};
    }
    DEEPPCR_INLINE friend constexpr Dual operator/(Dual a, Dual b) {
        const T quotient = a.value / b.value, slope = 1 / b.value;
        return {quotient, plus(times(slope, a.derivative), times(-quotient * slope, b.derivative))};
    }
    DEEPPCR_INLINE friend constexpr Dual operator-(Dual a) { return {-a.value, times(T(-1), a.derivative)}; }
    DEEPPCR_INLINE friend constexpr bool operator<(Dual a, Dual b) { return a.value < b.value; }
    DEEPPCR_INLINE friend constexpr bool operator>(Dual a, Dual b) { return a.value > b.value; }

    /// f(a), given f and f' at a.
    DEEPPCR_INLINE static constexpr Dual chain(T f, T slope, Dual a) { return {f, times(slope, a.derivative)}; }
    /// condition ? a : b
    DEEPPCR_INLINE static constexpr Dual select(bool condition, Dual a, Dual b) {
        using scalar_functions::select;
        return {select(condition, a.value, b.value), select(condition, a.derivative, b.derivative)};
    }

private:
    // A derivative that the compiler knows to be 0 costs nothing: a direction does not reach most intermediate values.
    DEEPPCR_INLINE static constexpr T times(T factor, T derivative) {
#if !defined(__CUDA_ARCH__)
        if (__builtin_constant_p(derivative) && derivative == T(0)) return T(0);
#endif
        return factor * derivative;
    }
    DEEPPCR_INLINE static constexpr T plus(T a, T b) {
#if !defined(__CUDA_ARCH__)
        if (__builtin_constant_p(a) && a == T(0)) return b;
        if (__builtin_constant_p(b) && b == T(0)) return a;
#endif
        return a + b;
    }
};

/// A number with its derivatives in `n` directions, for GPUs: their compiler would compute the values of a Dual again
/// for each direction, and cannot be asked what it knows to be 0. So flags go along, which are gone once all is
/// inlined.
template <class T, int n, class Stored = T>
struct Duals {
    using value_type = T;
    using stored_type = Stored;
    T value{}, derivative[n] = {};
    bool constant[n] = {};  ///< whether the derivative is known to be 0

    DEEPPCR_INLINE constexpr Duals() : Duals(T(0)) {}
    template <class U>
    requires std::is_arithmetic_v<U> DEEPPCR_INLINE constexpr Duals(U number)  // NOLINT(google-explicit-constructor)
        : value(T(number)) {
        DEEPPCR_UNROLLED
        for (int i = 0; i < n; ++i) constant[i] = true;
    }
    /// x, with derivative 1 in one direction.
    DEEPPCR_INLINE static constexpr Duals along(T number, int direction) {
        Duals x(number);
        x.derivative[direction] = T(1);
        x.constant[direction] = false;
        return x;
    }

    DEEPPCR_INLINE friend constexpr Duals operator+(const Duals& a, const Duals& b) {
        return combine(a.value + b.value, T(1), a, T(1), b);
    }
    DEEPPCR_INLINE friend constexpr Duals operator-(const Duals& a, const Duals& b) {
        return combine(a.value - b.value, T(1), a, T(-1), b);
    }
    DEEPPCR_INLINE friend constexpr Duals operator*(const Duals& a, const Duals& b) {
        return combine(a.value * b.value, b.value, a, a.value, b);
    }
    DEEPPCR_INLINE friend constexpr Duals operator/(const Duals& a, const Duals& b) {
        const T quotient = a.value / b.value, slope = 1 / b.value;
        return combine(quotient, slope, a, -quotient * slope, b);
    }
    DEEPPCR_INLINE friend constexpr Duals operator-(const Duals& a) { return chain(-a.value, T(-1), a); }
    DEEPPCR_INLINE friend constexpr bool operator<(const Duals& a, const Duals& b) { return a.value < b.value; }
    DEEPPCR_INLINE friend constexpr bool operator>(const Duals& a, const Duals& b) { return a.value > b.value; }

    DEEPPCR_INLINE static constexpr Duals chain(T f, T slope, const Duals& a) {
        Duals result(f);
        DEEPPCR_UNROLLED
        for (int i = 0; i < n; ++i) {
            if (!a.constant[i]) result.derivative[i] = slope * a.derivative[i];
            result.constant[i] = a.constant[i];
        }
        return result;
    }
    DEEPPCR_INLINE static constexpr Duals select(bool condition, const Duals& a, const Duals& b) {
        Duals result(condition ? a.value : b.value);
        DEEPPCR_UNROLLED
        for (int i = 0; i < n; ++i) {
            result.derivative[i] = condition ? a.derivative[i] : b.derivative[i];
            result.constant[i] = a.constant[i] && b.constant[i];
        }
        return result;
    }

private:
    /// f(a, b), given f and its slopes.
    DEEPPCR_INLINE static constexpr Duals combine(T f, T slope_a, const Duals& a, T slope_b, const Duals& b) {
        Duals result(f);
        DEEPPCR_UNROLLED
        for (int i = 0; i < n; ++i) {
            const T of_a = slope_a * a.derivative[i], of_b = slope_b * b.derivative[i];
            result.derivative[i] = a.constant[i] ? (b.constant[i] ? T(0) : of_b) : b.constant[i] ? of_a : of_a + of_b;
            result.constant[i] = a.constant[i] && b.constant[i];
        }
        return result;
    }
};

template <class D>
inline constexpr bool is_dual = false;
template <class T>
inline constexpr bool is_dual<Dual<T>> = true;
template <class T, int n, class Stored>
inline constexpr bool is_dual<Duals<T, n, Stored>> = true;
template <class D>
concept AnyDual = is_dual<D>;

template <AnyDual D>
DEEPPCR_INLINE constexpr D exp(D x) {
    const auto f = scalar_functions::exponential<typename D::value_type, typename D::stored_type>(x.value);
    return D::chain(f, f, x);
}
template <AnyDual D>
DEEPPCR_INLINE constexpr D sigmoid(D x) {
    const auto f = scalar_functions::logistic<typename D::value_type, typename D::stored_type>(x.value);
    return D::chain(f, f * (1 - f), x);
}
template <AnyDual D>
DEEPPCR_INLINE constexpr D tanh(D x) {
    const auto f = scalar_functions::hyperbolic_tangent<typename D::value_type, typename D::stored_type>(x.value);
    return D::chain(f, 1 - f * f, x);
}
template <AnyDual D>
DEEPPCR_INLINE constexpr D softplus(D x) {
    return D::chain(scalar_functions::logarithm_of_one_plus_exponential(x.value),
                    scalar_functions::logistic<typename D::value_type, typename D::stored_type>(x.value), x);
}
template <AnyDual D>
DEEPPCR_INLINE constexpr D abs(D x) {
    using T = typename D::value_type;
    return D::chain(scalar_functions::magnitude(x.value), scalar_functions::select(x.value < 0, T(-1), T(1)), x);
}
template <AnyDual D>
DEEPPCR_INLINE constexpr D max(D a, D b) {
    return D::select(a.value > b.value, a, b);
}
template <AnyDual D>
DEEPPCR_INLINE constexpr D min(D a, D b) {
    return -max(-a, -b);
}
template <AnyDual D>
DEEPPCR_INLINE D sqrt(D x) {
    using T = typename D::value_type;
    const T f = std::sqrt(x.value);
    return D::chain(f, T(0.5) / f, x);
}
template <AnyDual D>
DEEPPCR_INLINE D log(D x) {
    return D::chain(std::log(x.value), 1 / x.value, x);
}
template <AnyDual D>
DEEPPCR_INLINE D sin(D x) {
    return D::chain(std::sin(x.value), std::cos(x.value), x);
}
template <AnyDual D>
DEEPPCR_INLINE D cos(D x) {
    return D::chain(std::cos(x.value), -std::sin(x.value), x);
}

}  // namespace deeppcr
