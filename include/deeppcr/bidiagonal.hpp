// The linear algebra of DeepPCR: block bidiagonal systems, solved by substitution, by parallel cyclic reduction, or
// by a work-efficient scan.
#pragma once

#include <type_traits>

#include <deeppcr/array.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr {

class Group;

/// x_t = A_t x_{t-1} + b_t for t = 1..T, in each of `batch` sequences: identity on the diagonal, -A_t below it.
template <class T>
struct BidiagonalSystem {
    Jacobian<const T> subdiagonal;  ///< A: [steps,batch,width/block,block,block], in
    View<const T> right_side;       ///< b: [steps,batch,width], in
    View<const T> initial = {};     ///< x_0: [1,batch,width], in; zero where empty, so that A_1 then plays no part
};

/// How a bidiagonal system is solved.
enum class Reduction {
    automatic,   ///< sequential where the sequences alone fill the threads, scan otherwise
    sequential,  ///< forward substitution (block Thomas): T dependent steps, no products of Jacobians
    pcr,         ///< parallel cyclic reduction, DeepPCR's Algorithm 1: ceil(log2 T) dependent steps, T log2 T products
    /// Serial per chunk, the chunks' summaries, replay: T products. The reference backend solves the summaries by PCR,
    /// chunk + log2(T/chunk) + chunk dependent steps; the cpu backend hands each one on to the next chunk, since few
    /// chunks are in flight at a time there, and reads memory once. cuda: of blocks of up to 4 in one launch, which
    /// reads memory once and has chunks of its own; larger ones by the same scan over the chunks' summaries, read
    /// twice; those of more than 256 (128, where a multiprocessor has little shared memory) are one chunk.
    scan,
};

/// What multiplies blocks with each other on a GPU, where `scan` carries their product along a chunk: blocks of 33 to
/// 256, with Backend::cuda; all else is computed as ever, what follows a chunk's end by substitution too. Each choice
/// gives its own bits, the same every time on one GPU model. An infinite product may come out as NaN.
/// double: `split` and `tf32` are the same, tensor cores that multiply and add numbers of 64 bits.
enum class TensorCores {
    none,  ///< plain arithmetic
    /// float as sums of two numbers of TF32, three products for one (two where A is stored in 16 bits, which TF32 holds
    /// exactly). Tensor cores cut off what does not fit in their sums: on an H200, states of blocks of 64 to 256 were
    /// within 4e-5 to 2e-4 of substitution's, relative to the largest, where plain arithmetic leaves 2e-6 to 5e-6
    split,
    /// Products of numbers rounded to TF32's 11 bits: relative errors of up to 2^-11 of each, and so about three
    /// digits of the states at the chunks' ends
    tf32,
};

struct SolveOptions {
    Reduction method = Reduction::automatic;
    Execution execution = {};
    index chunk = 0;                 ///< steps per chunk of `scan`; 0: from the shape and the thread count or the GPU
    Workspace* workspace = nullptr;  ///< memory to reuse between calls, on the GPU for cuda; null: the call's own
    TensorCores tensor_cores = TensorCores::none;  ///< cuda; the other backends have none, and ignore it
    /// Processes that hold consecutive parts of the steps, in the order of their ranks (group.hpp); null: this one
    /// alone.
    Group* group = nullptr;
};

/// Solves `system` for `solution`: x, [steps,batch,width], out. `solution` may be the very view `right_side` (solved
/// in place); any other overlap with the inputs is refused. steps == 0 is a no-op. Non-finite inputs propagate as in
/// IEEE arithmetic (a sequence never affects another). Any sizes; width must be a multiple of block.
/// T: float, double, or, with Backend::cuda, bfloat16 and float16: A, b, x_0 and x are stored so, everything between
/// is computed and carried as float, and each x is rounded once, when it is stored.
/// cuda: the call returns when its work is enqueued in execution.stream. The arrays and the workspace must live, and
/// the arrays not be written by others, until the stream has done it (of the system and options structs themselves
/// nothing is kept); work enqueued in the same stream later sees the solution. Errors of the running kernels are
/// reported by a later call that waits. With a workspace that has been used for the same shape and method before,
/// nothing is allocated and the host waits for nothing, so that a CUDA graph can capture the call. A first call may
/// wait for the GPU: CUDA loads its kernels, and a workspace made for a Device grows by cudaMalloc and cudaFree.
/// Without a workspace the call takes memory from the GPU's pool and gives it back, both in the order of the stream,
/// and so without a wait but on GPUs that have no pools. Deterministic: the same inputs, options, SIMD target and
/// thread count give the same bits; `sequential` and `pcr` give the same bits for every thread count, `scan` for every
/// thread count where `chunk` is given. cuda: the same inputs, options and GPU model give the same bits. Returns the
/// method that was used, which `automatic` chooses. Throws InvalidArgument, OutOfMemory. Source: arXiv 2309.16318,
/// Algorithm 1 (pcr); Blelloch (1990) (scan).
/// With options.group all its ranks call together, each with its own part of the steps, at least one: `system` and
/// `solution` hold these, and `initial` counts on the first rank. Every part is reduced to one long step, one exclusive
/// scan tells each rank the state before its part, and `method` solves it from there: at most twice a scan's products,
/// ceil(log2(ranks)) messages per rank of B * D * (block + 1) numbers. The same bits every time for a number of
/// ranks. Throws on all ranks what one throws (Group::agree). With Backend::cuda: docs/scaling.md.
template <class T>
Reduction solve(const BidiagonalSystem<T>& system, View<std::type_identity_t<T>> solution,
                const SolveOptions& options = {});

/// Solves the transposed system: y_t = A_{t+1}^T y_{t+1} + b_t for t = T..1, with y_{T+1} = 0. A_1 and `initial` play
/// no part (the gradient with respect to x_0 is A_1^T y_1: `multiply_transposed`). Otherwise as `solve`; with
/// options.group A_1 plays no part on the first rank only, and y_{T+1} = 0 holds for the last.
template <class T>
Reduction solve_transposed(const BidiagonalSystem<T>& system, View<std::type_identity_t<T>> solution,
                           const SolveOptions& options = {});

/// product = A^T y for one step of every sequence; `subdiagonal` has one step, y and product are [1,batch,width].
/// `product` must not overlap the inputs. Types, streams, and errors as of `solve`.
template <class T>
void multiply_transposed(Jacobian<const T> subdiagonal, View<const T> y, View<T> product,
                         const Execution& execution = {});

}  // namespace deeppcr
