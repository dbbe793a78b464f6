// IDX files (the format of MNIST), plain or compressed by gzip, and the Fashion-MNIST data set.
#pragma once

#include <filesystem>
#include <vector>

#include <files/error.hpp>
#include <files/tensor.hpp>

namespace deeppcr::files {

/// Reads an array of unsigned bytes, 1 to 4 dimensions. values: std::uint8_t. Memory is taken as the data arrives,
/// not as the header claims. Throws FileError.
/// Source: yann.lecun.com/exdb/mnist, "the IDX file format".
Tensor read_idx(const std::filesystem::path& path);

/// Pictures of 28 x 28 grey values in ten classes.
struct FashionMnist {
    struct Part {
        index count = 0;
        std::vector<std::uint8_t> images;  ///< [count,28,28]
        std::vector<std::uint8_t> labels;  ///< [count], 0..9
    };
    Part train, test;
};

/// The folder that holds the four files of Fashion-MNIST (each with or without .gz): `folder` where one is given, else
/// DEEPPCR_DATA from the environment where set, else where Debian's package puts them. Throws FileError, which says
/// where was searched and which package has the data.
std::filesystem::path find_fashion_mnist(const std::filesystem::path& folder = {});

/// Reads training and test set. Throws FileError where something is missing, corrupt or inconsistent.
FashionMnist read_fashion_mnist(const std::filesystem::path& folder = {});

}  // namespace deeppcr::files
