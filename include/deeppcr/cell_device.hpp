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

constexpr int repair_rounds = 3;   // before what is left is finished step after step
constexpr int most_shots = 8;      // Newton sweeps for the states between chunks, or of a tile
constexpr int tile_threads = 256;  // of a block that shoots tiles

/// What a sequence's kernels tell. Residuals are bits of doubles, which order as they do.
struct SequenceStatus {
    unsigned long long residual = 0;           ///< the largest mismatch where a chunk met its old states
    unsigned long long relative_residual = 0;  ///< likewise, as a fraction of the tolerance
    unsigned long long sequential_steps = 0;   ///< of channels, finished step after step
    unsigned long long first_non_finite = 0;   ///< steps - it, so that the first is the largest; 0: none
    unsigned long long unconfirmed = 0;        ///< steps - the first step that is not confirmed; 0: all are
};

/// What a run over all chunks tells.
struct RunStatus {
    unsigned pending[repair_rounds] = {};  ///< warps with chunks that did not meet their old states, of each round
    unsigned shooting[most_shots] = {};    ///< warps whose starts Newton's method still moves, after each shot
    unsigned repeated = 0;                 ///< the longest repair, in steps
    unsigned shots = 0;                    ///< the most Newton sweeps that any tile took
    unsigned non_finite = 0;               ///< whether some state was not, be it one that was replaced afterwards
    unsigned long long collected = 0;      ///< blocks of threads that have collected what the others tell
};

/// All channels of all parts of a recurrence, cut into chunks of `length` steps: chunk c of a part has its steps
/// c * length + 1 .. (c + 1) * length. A thread runs one group of one chunk: a channel, or two neighbouring ones where
/// numbers are stored in 16 bits; neighbouring threads have neighbouring groups. All memory is the GPU's. With C
/// channels in `groups` groups, and K, G, P states, inputs and parameters of each:
///   inputs [steps, batch, G*C]    parameters [P, C]    trajectory, output_gradient [steps, batch, C*K]
///   boundary arrays [count, parts, C*K]    products [count, parts, C, K, K]    flags [count, parts, groups]
/// What lies between chunks, and parameters, are numbers that are computed with: float where T has 16 bits.
template <class T>
struct DeviceChunks {
    using A = Arithmetic<T>;

    const T* inputs = nullptr;
    index input_step = 0, input_batch = 0;
    const A* parameters = nullptr;
    const T* initial = nullptr;  ///< x_0 of each part; null: zeros
    index initial_part = 0;
    const SequencePart* parts = nullptr;  ///< null: part p is all of row p of the batch
    index steps = 0, batch = 0, channels = 0, groups = 0, part_count = 0;
    index length = 0, count = 0;
    int multiprocessors = 1;
    bool packed = false, wide = false;  ///< what the addresses allow: moving a group's numbers together, 16 bytes

    T* trajectory = nullptr;  ///< null: not kept
    index trajectory_step = 0, trajectory_batch = 0;
    bool given = false;         ///< whether the trajectory holds guesses on entry
    const A* starts = nullptr;  ///< boundary array: the state before each chunk; null: the part's initial state
    A* ends = nullptr;          ///< boundary array: the state after each chunk, out; may be `starts`
    A* products = nullptr;      ///< of the Jacobians of each chunk, out

    int round = 0;  ///< of repairs or shots: one that follows a round which left nothing to do ends at once
    const A* old_ends = nullptr;                 ///< boundary array
    const unsigned char* old_changed = nullptr;  ///< flags: ends that are new; null: all
    unsigned char* changed = nullptr;            ///< likewise, out
    A* residuals = nullptr;  ///< [count, parts, groups, 2]: where a chunk met; and as a fraction of the tolerance
    double absolute_tolerance = 0, relative_tolerance = 0;

    // Tiles: `tile_groups` groups side by side, `tile_steps` steps of each thread.
    int tile_groups = 0, tile_steps = 0, tile_shots = 0;

    // Gradients.
    const T* output_gradient = nullptr;
    index gradient_step = 0, gradient_batch = 0;
    T* input_gradient = nullptr;  ///< [steps, batch, G*C], out
    index input_gradient_step = 0, input_gradient_batch = 0;
    double* parameter_gradient = nullptr;  ///< [count, parts, P, C], out
    A* initial_gradient = nullptr;         ///< [parts, C*K], out

    SequenceStatus* sequences = nullptr;  ///< [batch]
    RunStatus* run = nullptr;             ///< null: nothing is told
};

/// One of the kernels: enqueues it (exceptions are those of a launch), and says how many of its threads a
/// multiprocessor of the current GPU holds at once.
template <class T>
struct DeviceKernel {
    void (*launch)(const DeviceChunks<T>& chunks, CUstream_st* stream) = nullptr;
    int (*resident_threads)() = nullptr;

    void operator()(const DeviceChunks<T>& chunks, CUstream_st* stream) const { launch(chunks, stream); }
};

/// What a Cell is compiled into for GPUs.
template <class T>
struct DeviceKernels {
    int channels_per_group = 1;
    DeviceKernel<T> advance;   ///< every chunk from its start: trajectory, ends
    DeviceKernel<T> multiply;  ///< every chunk from its start: ends, products
    /// Every chunk whose predecessor's end is new runs again from there, in place, until it meets its old states. One
    /// that does not has a new end itself.
    DeviceKernel<T> repair;
    DeviceKernel<T> finish;  ///< every group step after step from its first chunk whose predecessor's end is new
    /// Shooting of one tile of steps after the other, whose inputs are read once; see cell.cuh. Ignores chunks.
    DeviceKernel<T> shoot_tiles;
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
