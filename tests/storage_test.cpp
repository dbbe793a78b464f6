// Numbers of 16 bits: every one is itself after a conversion there and back, and every float becomes a nearest one.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>

#include <deeppcr/storage.hpp>

namespace deeppcr {
namespace {

template <class T>
class Storage : public testing::Test {};
using Types = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(Storage, Types);

template <class T>
T of_bits(std::uint32_t bits) {
    T value;
    value.bits = std::uint16_t(bits);
    return value;
}

TYPED_TEST(Storage, RoundTripsEveryNumber) {
    for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
        const auto wide = float(of_bits<TypeParam>(bits));
        const TypeParam back(wide);
        if (std::isnan(wide))
            EXPECT_TRUE(std::isnan(float(back))) << bits;
        else
            EXPECT_EQ(back.bits, bits);
    }
}

TYPED_TEST(Storage, RoundsToTheNearestTiesToEven) {
    std::mt19937 random(1);
    constexpr float largest = std::is_same_v<TypeParam, float16> ? 65504 : 0x1.fep127F;
    constexpr double half_step = std::is_same_v<TypeParam, float16> ? 16 : 0x1p119;
    for (int i = 0; i < 1'000'000; ++i) {
        // Every third is exactly between two neighbours.
        auto wide = std::bit_cast<float>(std::uint32_t(random()));
        if (i % 3 == 0) {
            const std::uint32_t bits = random() & 0x7fffU;
            const double low = float(of_bits<TypeParam>(bits)), high = float(of_bits<TypeParam>(bits + 1));
            if (!std::isfinite(low) || !std::isfinite(high)) continue;
            wide = float((low + high) / 2);
            ASSERT_EQ(TypeParam(wide).bits, bits + (bits & 1U)) << wide;
            continue;
        }
        if (std::isnan(wide)) continue;
        const TypeParam stored(wide);
        const auto narrow = double(float(stored));
        ASSERT_EQ(std::signbit(narrow), std::signbit(wide));
        if (std::abs(double(wide)) >= double(largest) + half_step) {
            ASSERT_TRUE(std::isinf(narrow)) << wide;
            continue;
        }
        ASSERT_LE(std::abs(narrow), double(largest)) << wide;
        const double error = std::abs(narrow - double(wide));
        for (const int step : {-1, 1}) {
            const auto neighbour = double(float(of_bits<TypeParam>(std::uint32_t(stored.bits + step))));
            if (!std::isfinite(neighbour)) continue;
            ASSERT_LE(error, std::abs(neighbour - double(wide))) << wide;
        }
    }
}

TYPED_TEST(Storage, KnowsWhatItIsComputedWith) {
    static_assert(std::is_same_v<Arithmetic<TypeParam>, float>);
    static_assert(std::is_same_v<Arithmetic<double>, double>);
    static_assert(sizeof(TypeParam) == 2);
    EXPECT_EQ(float(TypeParam(1.0F)), 1.0F);
    EXPECT_EQ(float(TypeParam(0.0F)), 0.0F);
}

}  // namespace
}  // namespace deeppcr
