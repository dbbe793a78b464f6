// What the kernels of the bidiagonal solvers share: the arrays of a system as they see them. Numbers are stored as T
// and computed with as Arithmetic<T>, float for those of 16 bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string>

#include <deeppcr/launch.cuh>

#include "device/cuda.hpp"
#include "reduce/reduce.hpp"

namespace deeppcr::reduce {

constexpr index largest_block_in_tiles = 4;  // of the scan in one launch

/// How an array [steps, batch, rows, size] lies: `size` neighbouring numbers per row, rows side by side.
template <class T>
struct Strided {
    T* data;
    index step, batch;

    __device__ T* at(index s, index sequence, index row, int size) const {
        return data + s * step + sequence * batch + row * size;
    }
};

template <class T>
struct Arrays {
    Strided<const T> factor, right_side, initial;
    Strided<T> solution;
    index steps, batch, rows;  ///< rows of each sequence, K x K chains
};

template <class T>
Arrays<T> arrays_of(const OrderedSystem<T>& system) {
    const auto& [factor, right_side, initial, solution, transposed] = system;
    return {{factor.data(), factor.step_stride(), factor.batch_stride()},
            {right_side.data(), right_side.step_stride(), right_side.batch_stride()},
            {initial.empty() ? nullptr : initial.data(), 0, initial.batch_stride()},
            {solution.data(), solution.step_stride(), solution.batch_stride()},
            system.steps(),
            system.batch(),
            system.width() / system.block()};
}

/// As many numbers as one load or store takes.
template <class T, int numbers>
struct alignas(numbers * sizeof(T)) Piece {
    T values[numbers];
};
/// How many of `count` neighbouring numbers, of which the first is aligned so.
template <class T, int count>
inline constexpr int piece_numbers = std::min(count & -count, 16 / int(sizeof(T)));

/// Neighbouring numbers, aligned to their pieces.
template <int count, class T>
__device__ __forceinline__ void read_numbers(const T* from, Arithmetic<T> (&to)[count]) {
    constexpr int numbers = piece_numbers<T, count>;
    DEEPPCR_UNROLL
    for (int p = 0; p < count / numbers; ++p) {
        const auto piece = reinterpret_cast<const Piece<T, numbers>*>(from)[p];
        cuda::widen<numbers>(piece.values, to + p * numbers);
    }
}
template <int count, class T>
__device__ __forceinline__ void write_numbers(T* to, const Arithmetic<T> (&from)[count]) {
    constexpr int numbers = piece_numbers<T, count>;
    DEEPPCR_UNROLL
    for (int p = 0; p < count / numbers; ++p) {
        Piece<T, numbers> piece;
        cuda::narrow<numbers>(from + p * numbers, piece.values);
        reinterpret_cast<Piece<T, numbers>*>(to)[p] = piece;
    }
}

/// x <- M x + b, M row-major, or its transpose.
template <int K, bool transposed, class A>
__device__ __forceinline__ void advance(const A (&m)[K * K], const A (&b)[K], A (&x)[K]) {
    A next[K];
    DEEPPCR_UNROLL
    for (int i = 0; i < K; ++i) {
        next[i] = b[i];
        DEEPPCR_UNROLL
        for (int k = 0; k < K; ++k) next[i] += m[transposed ? k * K + i : i * K + k] * x[k];
    }
    DEEPPCR_UNROLL
    for (int i = 0; i < K; ++i) x[i] = next[i];
}

/// Calls body with K as a constant of 1 to 4.
template <class Body>
void with_block(index block, const Body& body) {
    switch (block) {
        case 1:
            return body.template operator()<1>();
        case 2:
            return body.template operator()<2>();
        case 3:
            return body.template operator()<3>();
        default:
            return body.template operator()<4>();
    }
}

/// Shared memory of `blocks` blocks on a multiprocessor: it has what one block may have and 1 KiB, and keeps as much of
/// each.
inline index shared_bytes_of_each(int blocks) { return (device::shared_bytes_per_block() + 1024) / blocks - 1024; }

/// The scan of blocks of up to 4 in one launch: scan_tiles_cuda.cu.
template <class T>
void scan_tiles(const OrderedSystem<T>& system, CUstream_st* stream, Workspace& workspace);

/// Of larger blocks: scan_dense_cuda.cu. chunk: steps per chunk; 0: from the shape and the GPU.
template <class T>
void scan_dense(const OrderedSystem<T>& system, index chunk, TensorCores tensor_cores, CUstream_st* stream,
                Workspace& workspace);
template <class T>
void substitute_dense(const OrderedSystem<T>& system, CUstream_st* stream);

}  // namespace deeppcr::reduce
