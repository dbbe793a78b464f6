// Linear recurrences x_t = A_t x_{t-1} + b_t in .npy files, as `solve` and `analyse` take them.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include <deeppcr/bidiagonal.hpp>
#include <files/npy.hpp>

namespace deeppcr::program {

struct BlockShape {
    Shape states;
    index block = 1;
};

/// The sizes that A has room for: [T,B,D] diagonal, [T,B,D,D] dense, [T,B,D/K,K,K] block-diagonal. Throws FileError.
BlockShape block_shape_of(const std::string& file, const std::vector<index>& shape);

/// Throws Error unless b is [T,B,D] of A's type.
void refuse_if_not_matching(const std::string& right_side_file, const files::NpyHeader& right_side,
                            const std::string& subdiagonal_file, const files::NpyHeader& subdiagonal);

struct Copies {
    index bytes, count;
};
/// Throws OutOfMemory, which begins with `what`, where that needs more memory than is available.
void refuse_if_too_large(const std::string& what, std::initializer_list<Copies> needed);

/// Throws FileError, which names the first place whose number is not finite as a T.
template <class T, class U>
void refuse_if_not_finite(const std::string& file, const std::vector<U>& values, const std::vector<index>& shape);

/// The numbers of a file of type T, which are finite. Throws FileError.
template <class T>
std::vector<T> read_finite(const std::string& file);

struct Residual {
    double largest = 0;   ///< max |x_t - A_t x_{t-1} - b_t|
    double relative = 0;  ///< the same, over max |x_t| + max |A_t x_{t-1}| + max |b_t| of the same step
    bool small = false;   ///< relative is at most the root of T's epsilon
};

/// In double, so that what is measured is the error of the solution. NaN where the solution is not finite.
template <class T>
Residual residual_of(const BidiagonalSystem<T>& system, View<const T> solution, bool transposed);

}  // namespace deeppcr::program
