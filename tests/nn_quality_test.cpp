// The Fréchet distance, against what it must be: of shifted, scaled and equal sets, and of normal ones in one
// dimension.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include <deeppcr/error.hpp>
#include <deeppcr/nn/quality.hpp>

namespace deeppcr::nn {
namespace {

std::vector<float> normal(index images, index count, double mean, double deviation, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> draw{float(mean), float(deviation)};
    std::vector<float> numbers;
    for (index i = 0; i < images * count; ++i) numbers.push_back(draw(random));
    return numbers;
}

TEST(FrechetDistance, OfEqualSetsIsZero) {
    const auto features = normal(50, 7, 1, 2, 1);
    EXPECT_NEAR(frechet_distance(features, features, 7), 0, 1e-6);
}

TEST(FrechetDistance, OfAShiftIsItsSquare) {
    const auto features = normal(200, 5, 0, 1, 2);
    auto moved = features;
    for (float& number : moved) number += 3;
    EXPECT_NEAR(frechet_distance(features, moved, 5), 5 * 9, 1e-4);
    EXPECT_NEAR(frechet_distance(moved, features, 5), 5 * 9, 1e-4);
}

TEST(FrechetDistance, OfNormalNumbersIsKnown) {
    // (m1 - m2)^2 + (s1 - s2)^2 in one dimension, up to the sampling error.
    const double distance = frechet_distance(normal(100'000, 1, 0, 1, 3), normal(100'000, 1, 0.5, 2, 4), 1);
    EXPECT_NEAR(distance, 0.25 + 1, 0.05);
}

TEST(FrechetDistance, FewerImagesThanFeaturesAreNoError) {
    EXPECT_GT(frechet_distance(normal(4, 16, 0, 1, 5), normal(4, 16, 0, 1, 6), 16), 0);
}

TEST(FrechetDistance, RefusesWhatItCannotCompare) {
    const auto features = normal(10, 4, 0, 1, 7);
    EXPECT_THROW(frechet_distance(features, features, 0), InvalidArgument);
    EXPECT_THROW(frechet_distance(features, features, 3), InvalidArgument);
    EXPECT_THROW(frechet_distance(features, {1, 2, 3, 4}, 4), InvalidArgument);
    auto bad = features;
    bad[3] = NAN;
    EXPECT_THROW(frechet_distance(features, bad, 4), InvalidArgument);
}

TEST(ImageFeatures, TellImagesApart) {
    const ImageFeatures features({.epochs = 1});
    EXPECT_GT(features.test_accuracy(), 0.8);
    const auto some = features.of_test_images(1000);
    EXPECT_EQ(index(some.size()), 1000 * features.count());
    const std::vector<float> grey(100 * 784, 0.0F);
    EXPECT_GT(
        frechet_distance(features.of(grey), features.of_test_images(100), features.count()),
        10 * frechet_distance(std::vector<float>(some.begin(), some.begin() + 500 * features.count()),
                              std::vector<float>(some.begin() + 500 * features.count(), some.end()), features.count()));
    EXPECT_EQ(features.classes_of(grey).size(), 100U);
}

}  // namespace
}  // namespace deeppcr::nn
