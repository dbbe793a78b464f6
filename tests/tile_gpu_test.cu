// Products of small matrices in a warp's tensor cores, on a GPU or an emulated one, against plain multiplication.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <deeppcr/bidiagonal.hpp>
#include <deeppcr/launch.cuh>

#include "tests/gpu.hpp"

namespace deeppcr {
namespace {

constexpr Device there = Device::cuda();
constexpr int lanes = 32;

using Tiles = OnGpuTest;

/// Matrices that lie row by row.
template <class T>
__global__ void multiply_kernel(const T* a, const T* b, T* sums) {
    using Tile = cuda::Tile<T>;
    const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    T of_a[Tile::of_a], of_b[Tile::of_b], of_sums[Tile::of_sum];
    for (int i = 0; i < Tile::of_a; ++i)
        of_a[i] = a[(g + 8 * (i % (Tile::rows / 8))) * Tile::depth + t + 4 * (i / (Tile::rows / 8))];
    for (int i = 0; i < Tile::of_b; ++i) of_b[i] = b[(t + 4 * i) * Tile::columns + g];
    const auto place = [&](int i) { return (g + 8 * (i / 2)) * Tile::columns + 2 * t + i % 2; };
    for (int i = 0; i < Tile::of_sum; ++i) of_sums[i] = sums[place(i)];
    cuda::multiply_tile(of_sums, of_a, of_b);
    for (int i = 0; i < Tile::of_sum; ++i) sums[place(i)] = of_sums[i];
}

/// Small whole numbers, whose products and sums are exact: every entry must be in its place.
template <class T>
void expect_exact_product() {
    using Tile = cuda::Tile<T>;
    Buffer<T> a({1, Tile::rows, Tile::depth}), b({1, Tile::depth, Tile::columns}), sums({1, Tile::rows, Tile::columns});
    std::mt19937 random(1);
    for (Buffer<T>* matrix : {&a, &b, &sums})
        for (index i = 0; i < matrix->size(); ++i) matrix->data()[i] = T(int(random() % 2001) - 1000);
    const auto there_a = a.on(there), there_b = b.on(there), there_sums = sums.on(there);
    cuda::launch({dim3(1), dim3(lanes)}, multiply_kernel<T>, there_a.data(), there_b.data(),
                 const_cast<T*>(there_sums.data()));
    const Buffer<T> found = there_sums.on(Device::host());
    for (int i = 0; i < Tile::rows; ++i)
        for (int j = 0; j < Tile::columns; ++j) {
            T expected = sums(0, i, j);
            for (int k = 0; k < Tile::depth; ++k) expected += a(0, i, k) * b(0, k, j);
            EXPECT_EQ(found(0, i, j), expected) << i << ", " << j;
        }
}
TEST_F(Tiles, MultiplyWholeNumbersOfTf32) { expect_exact_product<float>(); }
TEST_F(Tiles, MultiplyWholeNumbersOf64Bits) { expect_exact_product<double>(); }

__global__ void round_kernel(const float* values, int count, float* rounded, float* big, float* rest) {
    for (int i = int(threadIdx.x); i < count; i += lanes) {
        rounded[i] = cuda::round_to_tf32(values[i]);
        cuda::split_to_tf32(values[i], big[i], rest[i]);
    }
}

bool is_tf32(float value) { return (std::bit_cast<unsigned>(value) & 0x1fffU) == 0; }

TEST_F(Tiles, RoundToTheNearestAndSplitButForAUnitOfTheLastPlace) {
    std::vector<float> values{0, 1, 1 + 0x1p-10F, 1 + 0x1p-11F, 1 + 0x1p-12F, -1 - 0x1p-11F, 2 - 0x1p-23F, 0x1p-126F};
    std::mt19937 random(2);
    for (int i = 0; i < 1000; ++i) {
        const float value = std::bit_cast<float>(unsigned(random()));
        if (std::abs(value) >= 0x1p-100F && std::abs(value) < 0x1p127F) values.push_back(value);
    }
    const std::size_t finite = values.size();
    // Infinities, and what is not a number by its first or last bit, by all of them, and with a sign.
    for (const unsigned bits : {0x7f800000U, 0xff800000U, 0x7fc00000U, 0x7f800001U, 0x7fffffffU, 0xffffffffU})
        values.push_back(std::bit_cast<float>(bits));
    Buffer<float> given({1, 1, index(values.size())});
    std::copy(values.begin(), values.end(), given.data());
    const auto there_given = given.on(there);
    auto rounded = given.on(there), big = given.on(there), rest = given.on(there);
    cuda::launch({dim3(1), dim3(lanes)}, round_kernel, there_given.data(), int(values.size()), rounded.data(),
                 big.data(), rest.data());
    rounded = rounded.on(Device::host());
    big = big.on(Device::host());
    rest = rest.on(Device::host());
    for (std::size_t i = 0; i < values.size(); ++i) {
        SCOPED_TRACE(values[i]);
        const float a = rounded.data()[i], b = big.data()[i], c = rest.data()[i];
        if (i >= finite) {
            EXPECT_FALSE(std::isfinite(a));
            EXPECT_FALSE(std::isfinite(b) && std::isfinite(c));
            continue;
        }
        const double value = double(values[i]), unit = std::ldexp(1.0, value == 0 ? 0 : std::ilogb(value) - 10);
        EXPECT_EQ(double(a), std::round(value / unit) * unit);  // halves away from 0
        EXPECT_EQ(a, b);
        EXPECT_TRUE(is_tf32(b) && is_tf32(c));
        EXPECT_LE(std::abs(value - double(b) - double(c)), unit / 8192);
    }
}

}  // namespace
}  // namespace deeppcr
