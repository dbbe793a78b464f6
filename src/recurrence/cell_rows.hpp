// Runs a Cell's kernels over rows: stretches of steps of one sequence with all its channels. No order between rows.
#pragma once

#include <span>

#include <deeppcr/cell_kernels.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr::cell {

/// Pointers to a row's first step; what a kernel does not use stays null. [C,K] arrays hold one state of all channels.
template <class T>
struct Row {
    index steps = 0;
    const T* inputs = nullptr;             ///< [steps, G, C]
    const T* start = nullptr;              ///< [C,K]: the state before the first step; backward: after the last
    T* end = nullptr;                      ///< [C,K]: the state after the last step; backward: before the first
    T* product = nullptr;                  ///< [C,K,K]: of the Jacobians of all steps, out
    T* after = nullptr;                    ///< [steps, C,K]
    const T* before = nullptr;             ///< [steps, C,K]
    T* jacobian = nullptr;                 ///< [steps, C,K,K]
    const T* gradient = nullptr;           ///< [steps, C,K]
    T* input_gradient = nullptr;           ///< [steps, G, C]
    double* parameter_gradient = nullptr;  ///< [P, C], added to
};

/// Elements from step to step, for all rows.
struct RowStrides {
    index inputs = 0, after = 0, before = 0, jacobian = 0, gradient = 0, input_gradient = 0;
};

enum class Work { advance, multiply, apply, linearise, backward, correct };

/// Blocks of 16 lanes that one thread interleaves.
constexpr index most_blocks = 64;

/// Throws InvalidArgument where numbers have 16 bits and the backend is not cuda.
template <class T>
void require_gpu_for_16_bits(Backend backend) {
    if (is_stored_in_16_bits<T> && backend != Backend::cuda)
        throw InvalidArgument("options.execution.backend", "cuda, for numbers stored in 16 bits",
                              backend == Backend::cpu ? "cpu" : "reference");
}

/// Does `work` on every row, the rows and channels shared among `threads`. Channels are taken 16 at a time where there
/// are as many; fewer channels are filled up with 15 other rows of the same length. parameters: [P, 1, C].
/// The same bits for any threads and any set of rows beside it. Products of Jacobians and adjoints below the smallest
/// normal number are 0.
template <class T>
void run_rows(const Kernels<T>& kernels, Work work, index channels, const T* parameters, std::span<const Row<T>> rows,
              const RowStrides& strides, int threads);

/// advance, apply, linearise and backward without SIMD and threads, lane after lane: the reference backend.
template <class T>
void run_rows_plainly(const Kernels<T>& kernels, Work work, index channels, const T* parameters,
                      std::span<const Row<T>> rows, const RowStrides& strides);

}  // namespace deeppcr::cell
