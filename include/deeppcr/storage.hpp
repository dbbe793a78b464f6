// Numbers that are stored in 16 bits and computed with in 32: bfloat16 and float16. Only GPUs compute with them.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace deeppcr {

/// The upper half of a float: 8 bits of precision, float's range. Conversions round to the nearest, ties to even.
struct bfloat16 {
    std::uint16_t bits = 0;

    constexpr bfloat16() = default;
    explicit constexpr bfloat16(float value) {
        const std::uint32_t wide = std::bit_cast<std::uint32_t>(value);
        const bool nan = (wide & 0x7fffffffU) > 0x7f800000U;
        bits = std::uint16_t(nan ? wide >> 16 | 0x40U : (wide + 0x7fffU + (wide >> 16 & 1U)) >> 16);
    }
    explicit constexpr operator float() const { return std::bit_cast<float>(std::uint32_t(bits) << 16); }
};

/// IEEE's binary16: 11 bits of precision, up to 65,504. Conversions round to the nearest, ties to even.
struct float16 {
    std::uint16_t bits = 0;

    constexpr float16() = default;
    explicit constexpr float16(float value) {
        const std::uint32_t wide = std::bit_cast<std::uint32_t>(value), sign = wide >> 16 & 0x8000U;
        const std::uint32_t size = wide & 0x7fffffffU;
        if (size > 0x7f800000U) {
            bits = std::uint16_t(sign | 0x7e00U);  // NaN
        } else if (size >= 0x477ff000U) {
            bits = std::uint16_t(sign | 0x7c00U);  // from halfway to 2^16 on: infinity
        } else if (size >= 0x38800000U) {
            bits = std::uint16_t(sign | (size + 0xfffU + (size >> 13 & 1U) - 0x38000000U) >> 13);
        } else {
            // Below 2^-14 the units are 2^-24, as those of a float of 1/2 to 1 are: an addition rounds.
            const float sum = std::bit_cast<float>(size) + 0.5F;
            bits = std::uint16_t(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3f000000U));
        }
    }
    explicit constexpr operator float() const {
        const std::uint32_t sign = std::uint32_t(bits & 0x8000U) << 16, size = bits & 0x7fffU;
        if (size >= 0x7c00U) return std::bit_cast<float>(sign | 0x7f800000U | (size & 0x3ffU) << 13);
        if (size >= 0x400U) return std::bit_cast<float>(sign | ((size << 13) + 0x38000000U));
        const float small = float(size) * 0x1p-24F;
        return sign != 0 ? -small : small;
    }
};

template <class T>
inline constexpr bool is_stored_in_16_bits = std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>;

/// What is computed with where numbers are stored as T.
template <class T>
using Arithmetic = std::conditional_t<is_stored_in_16_bits<T>, float, T>;

}  // namespace deeppcr
