// How good generated images are: the Fréchet distance between the features of two sets of images. No LibTorch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

struct FeatureOptions {
    std::filesystem::path data = {};  ///< folder of Fashion-MNIST
    index epochs = 2, batch = 128;
    index features = 64;
    double learning_rate = 2e-3;
    std::uint64_t seed = 1;
    /// Told how much of the training is done, 0..1; false stops it (Interrupted is thrown by the caller's choice).
    std::function<bool(double done)> progress = {};
};

/// A small convolutional classifier, trained on Fashion-MNIST's 60,000 training images when it is made; the numbers
/// before its last layer are an image's features. Deterministic: the same options, machine, thread count and LibTorch
/// give the same features. Throws InvalidArgument, FileError.
class ImageFeatures {
public:
    explicit ImageFeatures(const FeatureOptions& options = {});
    ~ImageFeatures();
    ImageFeatures(ImageFeatures&&) noexcept;
    ImageFeatures& operator=(ImageFeatures&&) noexcept;

    index count() const;
    double test_accuracy() const;  ///< on the 10,000 test images: what the features are worth
    /// pixels: [images, 784], -1 .. 1. Returns [images, count()].
    std::vector<float> of(const std::vector<float>& pixels) const;
    /// Of the first `images` test images of the data set.
    std::vector<float> of_test_images(index images) const;
    /// The class that it takes each image for.
    std::vector<index> classes_of(const std::vector<float>& pixels) const;

private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

/// |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the means and covariances of two sets of features, [images, count]
/// each: 0 for equal ones. It has a bias of the order of count / images; compare only distances of equal numbers of
/// images. Throws InvalidArgument for fewer than two images, sizes that do not fit, or features that are not finite.
/// Source: Heusel et al. 2017 (FID), with other features than theirs.
double frechet_distance(const std::vector<float>& first, const std::vector<float>& second, index count);

}  // namespace deeppcr::nn
