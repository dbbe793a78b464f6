// Vectorised activations and their slopes, for float and double.
//
// Per-target header of Highway: included once for each instruction set. All are built from one exponential and follow
// the same operations in every lane, so that a result does not depend on its place in a vector.
//
// Largest errors, in units in the last place of the exact value (tests/dense_chain_test.cpp checks them):
//     tanh 3, sigmoid 3, gelu 8; their slopes 4 machine epsilons of max(|slope|, 1/2).
#if defined(DEEPPCR_RECURRENCE_ACTIVATION_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef DEEPPCR_RECURRENCE_ACTIVATION_INL_HPP
#undef DEEPPCR_RECURRENCE_ACTIVATION_INL_HPP
#else
#define DEEPPCR_RECURRENCE_ACTIVATION_INL_HPP
#endif

#include <hwy/highway.h>

#include <array>

#include <deeppcr/dense_chain.hpp>

HWY_BEFORE_NAMESPACE();
namespace deeppcr::chain::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// The smaller one; NaN where v is NaN.
template <class D, class V>
HWY_INLINE V LimitAbove(D d, hn::TFromD<D> limit, V v) {
    const V limits = hn::Set(d, limit);
#if HWY_TARGET == HWY_SCALAR
    return hn::IfThenElse(hn::Gt(v, limits), limits, v);
#else
    return hn::Min(limits, v);  // x86 returns the second operand where one is NaN
#endif
}

/// c[0] + x (c[1] + x (c[2] + ...)).
template <class D, class V, std::size_t n>
HWY_INLINE V Polynomial(D d, V x, const std::array<hn::TFromD<D>, n>& c) {
    V sum = hn::Set(d, c[n - 1]);
#pragma GCC unroll 32
    for (std::size_t i = 1; i < n; ++i) sum = hn::MulAdd(sum, x, hn::Set(d, c[n - 1 - i]));
    return sum;
}

template <class T>
struct Exponential;

template <>
struct Exponential<float> {
    static constexpr int mantissa_bits = 23, exponent_bias = 127;
    static constexpr float rounding = 0x1.8p23f;    // adding it rounds to an integer, held in the low bits
    static constexpr float log2_e = 0x1.715476p0f;  // 1 / ln 2
    static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // high: few bits, n * high is exact
    static constexpr float underflow = 105;                                     // exp is 0 below it
    static constexpr float ln2 = 0x1.62e43p-1f, two_to_minus_half_bias = 0x1p-63f;
    static constexpr float tanh_is_one = 10;
    // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, to 6.5e-8
    static constexpr std::array series = {0.5f, 0.166665770f, 0.0416665546f, 0.00836317763f, 0.00139261818f};
};

template <>
struct Exponential<double> {
    static constexpr int mantissa_bits = 52, exponent_bias = 1023;
    static constexpr double rounding = 0x1.8p52;
    static constexpr double log2_e = 0x1.71547652b82fep0;
    static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
    static constexpr double underflow = 746;
    static constexpr double ln2 = 0x1.62e42fefa39efp-1, two_to_minus_half_bias = 0x1p-511;
    static constexpr double tanh_is_one = 20;
    // to 1.4e-18
    static constexpr std::array series = {0.5,
                                          0.16666666666666671,
                                          0.0416666666666666698,
                                          0.0083333333333261365,
                                          0.00138888888888837493,
                                          0.000198412698748158331,
                                          0.0000248015873255443191,
                                          2.75572554062850437e-6,
                                          2.75572736474510896e-7,
                                          2.51052144747514137e-8,
                                          2.0914685161418068e-9};
};

/// 2^n for n = the low bits of `shifted` less the bias.
template <class D, class V>
HWY_INLINE V PowerOfTwo(D d, V shifted) {
    const hn::RebindToSigned<D> di;
    return hn::BitCast(d, hn::ShiftLeft<Exponential<hn::TFromD<D>>::mantissa_bits>(hn::BitCast(di, shifted)));
}

/// e^-(high + low) for arguments from 0 on, gradual underflow included; low is a small correction of high.
template <class D, class V>
HWY_INLINE V ExpMinus(D d, V high, V low) {
    using T = hn::TFromD<D>;
    using C = Exponential<T>;
    // = 2^n (1 + q). 2^n is made of two factors, as n may lie below the smallest normal exponent.
    constexpr T half = C::exponent_bias >> 1, magic = C::rounding + C::exponent_bias + half;
    const V limited = LimitAbove(d, C::underflow, high);
    const V shifted = hn::NegMulAdd(limited, hn::Set(d, C::log2_e), hn::Set(d, magic));
    const V n = hn::Sub(hn::Set(d, magic), shifted);
    const V r = hn::Sub(hn::MulAdd(n, hn::Set(d, C::ln2_low), hn::MulSub(n, hn::Set(d, C::ln2_high), limited)), low);
    const V q = hn::MulAdd(hn::Mul(r, r), Polynomial(d, r, C::series), r);
    const V scale = PowerOfTwo(d, shifted);
    return hn::Mul(hn::MulAdd(scale, q, scale), hn::Set(d, C::two_to_minus_half_bias));
}

/// Each activation: value(d, z), and value and slope at once.
template <Activation activation>
struct Function;

template <>
struct Function<Activation::identity> {
    template <class D, class V>
    static HWY_INLINE V Value(D, V z) {
        return z;
    }
    template <class D, class V>
    static HWY_INLINE V ValueAndSlope(D d, V z, V& slope) {
        slope = hn::Set(d, 1);
        return z;
    }
};

template <>
struct Function<Activation::relu> {
    template <class D, class V>
    static HWY_INLINE V Value(D d, V z) {
        return hn::IfThenElse(hn::Lt(z, hn::Zero(d)), hn::Zero(d), z);
    }
    template <class D, class V>
    static HWY_INLINE V ValueAndSlope(D d, V z, V& slope) {
        const V one_if_positive = hn::IfThenElseZero(hn::Gt(z, hn::Zero(d)), hn::Set(d, 1));
        slope = hn::IfThenElse(hn::IsNaN(z), z, one_if_positive);
        return Value(d, z);
    }
};

template <>
struct Function<Activation::tanh> {
    // h / (h + 1) with h = (e^(2 |z|) - 1) / 2 = 2^(n-1) q + 2^(n-1) - 1/2, q = e^r - 1. Where n > 0, tanh changes so
    // little with its argument that ln 2 needs no second part. Additions, where they will do, leave the multipliers
    // free.
    template <class D, class V>
    static HWY_INLINE V Value(D d, V z) {
        using T = hn::TFromD<D>;
        using C = Exponential<T>;
        constexpr T magic = C::rounding + C::exponent_bias - 1;
        const V limited = LimitAbove(d, C::tanh_is_one, hn::Abs(z));
        const V shifted = hn::MulAdd(limited, hn::Set(d, 2 * C::log2_e), hn::Set(d, magic));
        const V n = hn::Sub(shifted, hn::Set(d, magic));
        const V r = hn::NegMulAdd(n, hn::Set(d, C::ln2), hn::Add(limited, limited));
        const V q = hn::MulAdd(hn::Mul(r, r), Polynomial(d, r, C::series), r);
        const V scale = PowerOfTwo(d, shifted);
        const V h = hn::MulAdd(scale, q, hn::Sub(scale, hn::Set(d, T(0.5))));
        return hn::CopySign(hn::Div(h, hn::Add(h, hn::Set(d, 1))), z);
    }
    template <class D, class V>
    static HWY_INLINE V ValueAndSlope(D d, V z, V& slope) {
        const V value = Value(d, z);
        slope = hn::NegMulAdd(value, value, hn::Set(d, 1));
        return value;
    }
};

template <>
struct Function<Activation::sigmoid> {
    // with e = exp(-|z|): 1 / (1 + e) for z >= 0, e / (1 + e) below
    template <class D, class V>
    static HWY_INLINE V ValueAndSlope(D d, V z, V& slope) {
        const V e = ExpMinus(d, hn::Abs(z), hn::Zero(d));
        const V positive = hn::Div(hn::Set(d, 1), hn::Add(hn::Set(d, 1), e)), negative = hn::Mul(e, positive);
        slope = hn::Mul(positive, negative);
        return hn::IfThenElse(hn::Lt(z, hn::Zero(d)), negative, positive);
    }
    template <class D, class V>
    static HWY_INLINE V Value(D d, V z) {
        V slope;
        return ValueAndSlope(d, z, slope);
    }
};

/// (1 + 2 a) exp(a^2) erfc(a) / 2 as a polynomial in (a - centre) / (a + centre): a Chebyshev fit on a >= 0 as far as
/// exp(-a^2) is not 0.
template <class T>
struct ScaledTail;

template <>
struct ScaledTail<float> {
    static constexpr float centre = 3, limit = 10.4f;
    static constexpr unsigned keep = 0xFFFFF000u;  // the leading half of a mantissa: its square is exact
    static constexpr std::array series = {0.626504029f,   -0.0678105738f,   -0.0237811541f,  0.064823341f,
                                          -0.0596360537f, 0.0341465636f,    -0.011896782f,   0.00128877728f,
                                          0.00100001168f, -0.000395319812f, -0.000137262254f};
};

template <>
struct ScaledTail<double> {
    static constexpr double centre = 3.75, limit = 27.4;
    static constexpr unsigned long long keep = 0xFFFFFFFFF8000000ull;
    static constexpr std::array series = {
        0.618756315418913827,     -0.0701202992927733852,   0.00179270774272042224,  0.0411383692450575846,
        -0.0544019650702558611,   0.046152160580888995,     -0.0293466993073807219,  0.0141811386948865248,
        -0.00487328965010829007,  0.000877813088363762173,  0.00014685608200026238,  -0.000145078090289197778,
        0.0000258271423576025611, 0.0000111962921201618628, -5.72728107852899405e-6, -4.97073037961309154e-7,
        8.81065287192789151e-7,   -1.32138449315176904e-8,  -1.29869192911138273e-7, -1.22525582652454342e-9,
        1.5589527008109661e-8,    2.85667425607807568e-9};
};

template <>
struct Function<Activation::gelu> {
    // z Phi(z), Phi(-|z|) = erfc(|z| / sqrt 2) / 2; slope Phi(z) + z phi(z)
    template <class D, class V>
    static HWY_INLINE V ValueAndSlope(D d, V z, V& slope) {
        using T = hn::TFromD<D>;
        using C = ScaledTail<T>;
        const hn::RebindToUnsigned<D> du;
        const V one = hn::Set(d, 1);
        // exp(-z^2 / 2), with z^2 to twice the precision: z = high + low, z^2 = high^2 + low (z + high)
        const V limited = LimitAbove(d, T(C::limit * 1.4142135623730951), hn::Abs(z));
        const V high = hn::And(limited, hn::BitCast(d, hn::Set(du, C::keep)));
        const V low = hn::Mul(hn::Sub(limited, high), hn::Add(limited, high));
        const V e = ExpMinus(d, hn::Mul(hn::Set(d, T(0.5)), hn::Mul(high, high)), hn::Mul(hn::Set(d, T(0.5)), low));
        const V a = hn::Mul(limited, hn::Set(d, T(0.70710678118654752)));
        const V t = hn::Div(hn::Sub(a, hn::Set(d, C::centre)), hn::Add(a, hn::Set(d, C::centre)));
        const V scaled = hn::Div(Polynomial(d, t, C::series), hn::MulAdd(hn::Set(d, 2), a, one));
        const auto below = hn::Lt(z, hn::Zero(d));
        const V tail = hn::Mul(e, scaled);
        const V cumulative = hn::IfThenElse(below, tail, hn::Sub(one, tail));
        slope = hn::MulAdd(hn::Mul(hn::CopySign(limited, z), hn::Set(d, T(0.39894228040143268))), e, cumulative);
        // Below 0, e comes last: it may have few digits, and the product with the other two is less than 1.
        return hn::IfThenElse(below, hn::Neg(hn::Mul(hn::Mul(limited, scaled), e)), hn::Mul(z, cumulative));
    }
    template <class D, class V>
    static HWY_INLINE V Value(D d, V z) {
        V slope;
        return ValueAndSlope(d, z, slope);
    }
};

}  // namespace deeppcr::chain::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
