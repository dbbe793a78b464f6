// What the kernels of a Cell on a GPU are given, and how the library finds them. No CUDA headers: see cell.cuh.
#pragma once

#include <typeinfo>

#include <deeppcr/array.hpp>

struct CUstream_st;

namespace deeppcr {

/// Steps first+1 .. last of row `sequence` of the batch: one sequence, from its own initial state.
struct SequencePart {
    index sequence = 0, first = 0, last = 0;
};

namespace cell {

/// One flag and the extremes of a sequence, as the kernels write them. Residuals are bits of doubles, which order as
/// they do.
struct SequenceStatus {
    unsigned long long residual = 0;           ///< the largest mismatch where a chunk met its old states
    unsigned long long relative_residual = 0;  ///< likewise, as a fraction of the tolerance
    unsigned long long sequential_steps = 0;   ///< of channels, finished step after step
    unsigned long long first_non_finite = 0;   ///< steps - it, so that the first is the largest; 0: none
};

/// What a run over all chunks tells.
struct RunStatus {
    unsigned long long repeated = 0;  ///< the longest repair, in steps
    unsigned pending = 0;             ///< chunks of channels that did not meet their old states in the last round
    unsigned non_finite = 0;          ///< whether any state is
};

/// All channels of all parts of a recurrence, cut into chunks of `length` steps: chunk c of a part has its steps
/// c * length + 1 .. (c + 1) * length. A thread runs one channel of one chunk; neighbouring threads have neighbouring
/// channels. All memory is the GPU's. With C channels, and K, G, P states, inputs and parameters of each:
///   inputs [steps, batch, G*C]    parameters [P, C]    trajectory, output_gradient [steps, batch, C*K]
///   boundary arrays [count, parts, C*K]    products [count, parts, C, K, K]
template <class T>
struct DeviceChunks {
    const T* inputs = nullptr;
    index input_step = 0, input_batch = 0;
    const T* parameters = nullptr;
    const T* initial = nullptr;  ///< x_0 of each part; null: zeros
    index initial_part = 0;
    const SequencePart* parts = nullptr;  ///< null: part p is all of row p of the batch
    index steps = 0, batch = 0, channels = 0, part_count = 0;
    index length = 0, count = 0;

    T* trajectory = nullptr;  ///< null: not kept
    index trajectory_step = 0, trajectory_batch = 0;
    const T* starts = nullptr;  ///< boundary array: the state before each chunk; null: the part's initial state
    T* ends = nullptr;          ///< boundary array: the state after each chunk, out
    T* products = nullptr;      ///< of the Jacobians of each chunk, out

    // Repairs.
    const T* old_ends = nullptr;                 ///< boundary array
    const unsigned char* old_changed = nullptr;  ///< [count, parts, C]: ends that are new; null: all
    unsigned char* changed = nullptr;            ///< likewise, out
    double absolute_tolerance = 0, relative_tolerance = 0;

    // Gradients.
    const T* output_gradient = nullptr;
    index gradient_step = 0, gradient_batch = 0;
    T* input_gradient = nullptr;           ///< [steps, batch, G*C], out; contiguous
    double* parameter_gradient = nullptr;  ///< [count, parts, P, C], added to
    T* initial_gradient = nullptr;         ///< [parts, C*K], out

    SequenceStatus* sequences = nullptr;  ///< [batch]
    RunStatus* run = nullptr;
};

template <class T>
using DeviceKernel = void (*)(const DeviceChunks<T>& chunks, CUstream_st* stream);

/// What a Cell is compiled into for GPUs. All are enqueued; exceptions are those of a launch.
template <class T>
struct DeviceKernels {
    DeviceKernel<T> advance;   ///< every chunk from its start: trajectory, ends
    DeviceKernel<T> multiply;  ///< every chunk from its start: ends, products
    /// Every chunk whose predecessor's end is new runs again from there, in place, until it meets its old states. One
    /// that does not has a new end itself.
    DeviceKernel<T> repair;
    DeviceKernel<T> finish;  ///< every channel step after step from its first chunk whose predecessor's end is new
    /// Every chunk from its last step, with nothing arriving from behind: gradients; `ends` is what it hands to the
    /// chunk before it.
    DeviceKernel<T> backward;
    /// What arrives behind each chunk (`old_ends` of the next one) is sent through it and added, until it is below
    /// rounding; what is left goes to `ends`.
    DeviceKernel<T> correct;
    DeviceKernel<T> finish_backward;  ///< what is left, step after step to the first
};

/// Kernels that cell.cuh has registered for a Cell's type; null: none.
template <class T>
const DeviceKernels<T>* find_device_kernels(const std::type_info& cell);
template <class T>
void register_device_kernels(const std::type_info& cell, const DeviceKernels<T>& kernels);

}  // namespace cell
}  // namespace deeppcr
