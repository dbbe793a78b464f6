// The SIMD kernels that the cpu backend of the bidiagonal solvers is made of. No threads in here.
#pragma once

#include <deeppcr/array.hpp>

namespace deeppcr::reduce {

/// A part of an OrderedSystem: some steps, sequences and neighbouring elements of it.
template <class T>
struct Strip {
    const T* factor;
    const T* right_side;
    T* solution;
    const T* before;  ///< the state before the first step; null: zero, and the first factor is not read
    index factor_step, right_side_step, solution_step;
    index factor_batch, right_side_batch, solution_batch, before_batch;
    index steps, batch, width, block;
    bool transposed;
    bool bypass_caches;  ///< whether the solution is too large for the caches to keep
    /// Elements that lie so far after those in use are fetched into the cache on the way.
    index factor_ahead, right_side_ahead;
};

template <class T>
struct Kernels {
    index lanes;  ///< elements in a vector

    /// x_s = M_s x_{s-1} + b_s, step after step.
    void (*substitute)(const Strip<T>& strip);

    /// The same for one sequence; a few channels that lie together are scanned along the steps within each vector.
    void (*replay)(const Strip<T>& strip);

    /// One sequence as a single long step x_end = product x_before + end: writes the product's blocks (the way the
    /// factors are stored) and `end`. `before` counts for nothing. scratch: block * (block + 1) elements.
    void (*summarise)(const Strip<T>& strip, T* product, T* end, T* scratch);

    /// product = left right, for `count` pairs of blocks that follow each other. `product` overlaps neither.
    void (*multiply)(const T* left, const T* right, index count, index block, T* product);
};

/// The kernels for this machine's SIMD target.
template <class T>
const Kernels<T>& kernels();

}  // namespace deeppcr::reduce
