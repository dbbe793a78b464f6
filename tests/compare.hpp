// What the tests of arrays share: comparisons that say where two arrays differ.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr {

/// Every sequence of a batch.
inline std::vector<index> all(index batch) {
    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), 0);
    return sequences;
}

template <class T>
testing::AssertionResult same_bits(const View<const T>& a, const std::type_identity_t<View<const T>>& b) {
    if (a.shape() != b.shape())
        return testing::AssertionFailure() << to_string(a.shape()) << " and " << to_string(b.shape());
    for (index i = 0; i < a.steps(); ++i)
        for (index j = 0; j < a.batch(); ++j)
            for (index k = 0; k < a.width(); ++k)
                if (std::memcmp(&a(i, j, k), &b(i, j, k), sizeof(T)) != 0)
                    return testing::AssertionFailure() << "step " << i << ", sequence " << j << ", element " << k
                                                       << ": " << a(i, j, k) << " and " << b(i, j, k);
    return testing::AssertionSuccess();
}
template <class T>
testing::AssertionResult same_bits(const Buffer<T>& a, const Buffer<T>& b) {
    return same_bits<T>(a.view(), b.view());
}

/// |a - b| <= tolerance max(1, |b|), everywhere.
template <class T, class U>
testing::AssertionResult near(const Buffer<T>& a, const Buffer<U>& b, double tolerance) {
    if (a.shape() != b.shape())
        return testing::AssertionFailure() << to_string(a.shape()) << " and " << to_string(b.shape());
    for (index i = 0; i < a.size(); ++i) {
        const double x = double(a.data()[i]), y = double(b.data()[i]);
        if (!(std::abs(x - y) <= tolerance * std::max(1.0, std::abs(y))))
            return testing::AssertionFailure() << "element " << i << " of " << to_string(a.shape()) << ": " << x
                                               << ", expected " << y << " within " << tolerance;
    }
    return testing::AssertionSuccess();
}

/// max|a - b|; NaN where any difference is.
template <class T, class U = T>
double largest_difference(const std::type_identity_t<View<const T>>& a, const std::type_identity_t<View<const U>>& b) {
    EXPECT_EQ(a.shape(), b.shape());
    double largest = 0;
    for (index i = 0; i < a.steps(); ++i)
        for (index j = 0; j < a.batch(); ++j)
            for (index k = 0; k < a.width(); ++k) {
                const double difference = std::abs(double(a(i, j, k)) - double(b(i, j, k)));
                if (!(difference <= largest)) largest = difference;
                if (std::isnan(difference)) return difference;
            }
    return largest;
}

}  // namespace deeppcr
