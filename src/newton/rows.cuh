// What the kernels of Newton's method share: rows (one state of one sequence) and their norms, maxima by atomic
// integers, what the last block of a grid does, and the sources of the error.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include <deeppcr/launch.cuh>

#include "newton/estimate.hpp"
#include "newton/update.hpp"

namespace deeppcr::newton {

using cuda::plain_threads;
using cuda::this_thread;

/// A count, or the bits of a non-negative double, which order as it does.
using Word = unsigned long long;

template <class T>
__device__ bool finite(T value) {
    return value - value == T(0);
}

/// The comparison spares most of the atomic operations: where it sees an old value, it only spares one fewer.
inline __device__ void raise(Word* largest, Word value) {
    if (value > *static_cast<const volatile Word*>(largest)) atomicMax(largest, value);
}
template <class T>
__device__ T larger(T a, T b) {
    return a < b ? b : a;
}
inline __device__ Word word_of(double value) { return Word(__double_as_longlong(value)); }
inline __device__ double infinity() { return __longlong_as_double(0x7FF0000000000000LL); }

/// Of a row's residual and state, over its lanes; all threads of a warp call it.
template <class T>
struct Norms {
    T residual = T(0), state = T(0);
    int bad = 0;  // bits: 1 the state, 2 f, 4 their difference is not finite

    __device__ void add(T x, T f) {
        const T r = f - x;
        residual = larger(residual, r < T(0) ? -r : r);
        state = larger(state, x < T(0) ? -x : x);
        bad |= (finite(x) ? 0 : 1) | (finite(f) ? 0 : 2) | (finite(r) ? 0 : 4);
    }
    __device__ void join(int lanes) {
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
            residual = larger(residual, __shfl_xor_sync(~0U, residual, distance, lanes));
            state = larger(state, __shfl_xor_sync(~0U, state, distance, lanes));
            bad |= __shfl_xor_sync(~0U, bad, distance, lanes);
        }
    }
    /// Of the tolerance; a tolerance of 0 asks for a residual of 0.
    __device__ double relative(const Tolerance& tolerance) const {
        return residual == T(0) ? 0.0 : double(residual) / (tolerance.absolute + tolerance.relative * double(state));
    }
};

/// The arrays of a window. Rows are i * batch + j, contiguous.
template <class T>
struct Rows {
    T* states;  ///< x_{t-1} in row i, x_t in row i + 1
    T *after, *update, *jacobian;
    index block, rows, batch, width;
    int lanes;  ///< threads per row
    Tolerance tolerance;

    /// By so many threads: nothing comes to the row from its predecessor.
    __device__ void cut_off(index row, index thread, index threads) const {
        const index entries = width * block;
        for (index k = thread; k < entries; k += threads) jacobian[row * entries + k] = T(0);
    }
    /// By the lanes of a row whose residual is not finite: it is cut off from both its neighbours, and a state that is
    /// not finite itself restarts from the confirmed one, that of row i = `confirmed`.
    __device__ void isolate(index row, int lane, const Norms<T>& norms, index confirmed) const {
        const T* const restart = states + (confirmed * batch + row % batch) * width;
        for (index k = lane; k < width; k += lanes) {
            update[row * width + k] = T(0);
            if ((norms.bad & 1) != 0) states[(row + batch) * width + k] = restart[k];
        }
        cut_off(row, lane, lanes);
    }
};

/// Whether the block is the last of its grid to get here, and so sees what the others wrote. All its threads call.
/// arrived: 0 before the first.
inline __device__ bool is_last_block(Word* arrived) {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();  // one is enough for what the barrier has put before it
        last = atomicAdd(arrived, Word(1)) + 1 == gridDim.x;
    }
    last = __syncthreads_or(last) != 0;
    if (last) __threadfence();
    return last;
}

/// Elements of [steps,batch,width] arrays, a thread for each.
struct Elements {
    index count, batch, width;
    __device__ index step(index i) const { return i / width / batch; }
    __device__ index sequence(index i) const { return i / width % batch; }
    __device__ index element(index i) const { return i % width; }
};

template <class T>
__global__ void __launch_bounds__(plain_threads) fill_ones(T* data, index count) {
    const index i = this_thread();
    if (i < count) data[i] = T(1);
}

/// As error_sources of estimate.hpp. tracks: confirmed(j) are the steps of sequence j that count.
template <class T, class Tracks>
__global__ void __launch_bounds__(plain_threads)
    find_error_sources(const T* states, const T* after, const Tracks tracks, index first, index block, T unit,
                       const Elements all, T* sources) {
    const index i = this_thread();
    if (i >= all.count) return;
    const index step = first + all.step(i), j = all.sequence(i), k = all.element(i);
    T source = T(0);
    if (step < tracks.confirmed(j)) {
        const T* const f = after + i - k % block;
        T largest = T(0);
        for (index m = 0; m < block; ++m) largest = larger(largest, f[m] < T(0) ? -f[m] : f[m]);
        source = states[i] - after[i] + (rounding_sign(step, j, k) ? unit : -unit) * largest;
    }
    sources[i] = source;
}

/// Raises error(j) to the largest of the confirmed steps.
template <class T, class Tracks>
__global__ void __launch_bounds__(plain_threads)
    raise_errors(const T* errors, index first, const Elements all, const Tracks tracks) {
    const index i = this_thread();
    if (i >= all.count) return;
    const index j = all.sequence(i);
    if (first + all.step(i) >= tracks.confirmed(j)) return;
    const double error = double(errors[i]);
    raise(tracks.error(j), word_of(!finite(error) ? infinity() : error < 0 ? -error : error));
}

/// Threads for each row: as many as the width, up to a warp.
inline int lanes_of(index width) { return int(std::bit_ceil(std::uint64_t(std::min<index>(width, 32)))); }

inline Elements elements_of(const Shape& shape) { return {shape.count(), shape.batch, shape.width}; }

/// A kernel with a thread for each element.
template <class... Parameters, class... Arguments>
void for_each(const Elements& all, CUstream_st* stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
    if (all.count > 0) cuda::launch(cuda::one_each(all.count, stream), kernel, static_cast<Arguments&&>(arguments)...);
}

}  // namespace deeppcr::newton
