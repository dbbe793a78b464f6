// Block matrices A_t in .npy files, as `solve` and `analyse` take them.
#pragma once

#include <string>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::program {

struct BlockShape {
    Shape states;
    index block = 1;
};

/// The sizes that A has room for: [T,B,D] diagonal, [T,B,D,D] dense, [T,B,D/K,K,K] block-diagonal. Throws FileError.
BlockShape block_shape_of(const std::string& file, const std::vector<index>& shape);

/// Throws FileError, which names the first place.
template <class T>
void refuse_if_not_finite(const std::string& file, const std::vector<T>& values, const std::vector<index>& shape);

}  // namespace deeppcr::program
