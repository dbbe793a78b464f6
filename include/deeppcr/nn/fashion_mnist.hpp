// Fashion-MNIST as tensors: split, shuffles, batches.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

struct ImageSet {
    at::Tensor images;  ///< [count,784], bytes
    at::Tensor labels;  ///< [count], 64-bit, 0..9
    index size() const { return images.size(0); }

    struct Batch {
        at::Tensor images;  ///< [batch,784], normalised to mean 0 and deviation 1 over the training images
        at::Tensor labels;  ///< [batch]
    };
    /// On that device, where the batches are then.
    ImageSet to(at::Device device) const { return {images.to(device), labels.to(device)}; }
    /// rows: which images, 64-bit, on the images' device. type: float or double.
    Batch batch(const at::Tensor& rows, at::ScalarType type = at::kFloat) const;
    /// Images [first, last).
    Batch batch(index first, index last, at::ScalarType type = at::kFloat) const;
};

struct FashionMnist {
    ImageSet training, held_out, test;
    FashionMnist to(at::Device device) const { return {training.to(device), held_out.to(device), test.to(device)}; }
};

/// Reads the data set (folder: see files::find_fashion_mnist) and splits the 60,000 training images: `held_out` of
/// them, chosen by the seed, are kept apart; of the others the first `train_images` are used (0: all).
/// Throws FileError where the data is missing or corrupt, InvalidArgument for impossible sizes.
FashionMnist load_fashion_mnist(const std::filesystem::path& folder, std::uint64_t seed, index held_out = 6000,
                                index train_images = 0);

/// A permutation of 0..count-1, [count], 64-bit: the order of the images in an epoch. The same on every machine.
at::Tensor shuffled(index count, std::uint64_t seed, index epoch);

}  // namespace deeppcr::nn
