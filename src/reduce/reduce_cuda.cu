// Block bidiagonal systems x_s = M_s x_{s-1} + b_s on a GPU, s = 0 .. steps-1, M_s of K x K blocks.
//
// scan: one launch; M and b are read once and x is written once, (K^2 + 2 K) numbers per step and block. A block of
// threads takes a tile of consecutive steps of up to 32 neighbouring rows (a row is one K x K chain) into shared
// memory:
//
//          rows ->                 each thread owns one row of one chunk of S steps
//   steps  [chunk 0 | 0 | 0 ...]   1. its product of M and sum of b over the chunk         (x -> M x + b is
//   associative)
//     |    [chunk 1 | 1 | 1 ...]   2. the chunks' maps joined by PCR, log2(chunks) steps of exchange in shared memory
//     v    [chunk 2 | 2 | 2 ...]   3. the state before the tile, from the tiles before it  (decoupled look-back)
//          [  ...              ]   4. the chunk again, from its true first state; x takes the place of b
//
// Look-back: a tile first publishes its map, then looks at the `window` tiles before it until one of them has published
// its last state, and applies the maps in between, nearest last. Tiles begin in the order of their tickets, so that
// those before a tile are done or running, and the order of the operations is always the same: the result is
// deterministic. Merrill & Garland (2016) describe the method for sums.
//
// sequential: a thread per row (K <= 4), or a block of threads per chain of larger blocks.
// pcr: DeepPCR's Algorithm 1, out of place, a launch per step of the elimination.
#include "reduce/reduce.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include <deeppcr/launch.cuh>

#include "device/cuda.hpp"

namespace deeppcr::reduce {
namespace {

using cuda::plain_threads;
using cuda::shared_memory;

constexpr int most_threads = 1024;
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
    index steps, batch, rows;  ///< rows of each sequence
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

/// x -> M x + b.
template <class T, int K>
struct Map {
    static constexpr int size = K * K + K;
    T m[K][K], b[K];

    __device__ static Map identity() {
        Map map;
        for (int i = 0; i < K; ++i) {
            map.b[i] = T(0);
            for (int j = 0; j < K; ++j) map.m[i][j] = T(i == j);
        }
        return map;
    }
    /// Entries `stride` apart.
    __device__ static Map read(const T* from, index stride) {
        Map map;
        for (int i = 0; i < K; ++i) {
            for (int j = 0; j < K; ++j) map.m[i][j] = from[(i * K + j) * stride];
            map.b[i] = from[(K * K + i) * stride];
        }
        return map;
    }
    __device__ void write(T* to, index stride) const {
        for (int i = 0; i < K; ++i) {
            for (int j = 0; j < K; ++j) to[(i * K + j) * stride] = m[i][j];
            to[(K * K + i) * stride] = b[i];
        }
    }
    __device__ void apply(T (&x)[K]) const {
        T next[K];
        for (int i = 0; i < K; ++i) {
            next[i] = b[i];
            for (int j = 0; j < K; ++j) next[i] += m[i][j] * x[j];
        }
        for (int i = 0; i < K; ++i) x[i] = next[i];
    }
    /// This map after `first`.
    __device__ Map after(const Map& first) const {
        Map map;
        for (int i = 0; i < K; ++i) {
            map.b[i] = b[i];
            for (int k = 0; k < K; ++k) map.b[i] += m[i][k] * first.b[k];
            for (int j = 0; j < K; ++j) {
                map.m[i][j] = m[i][0] * first.m[0][j];
                for (int k = 1; k < K; ++k) map.m[i][j] += m[i][k] * first.m[k][j];
            }
        }
        return map;
    }
};

/// The map of one step, from its block and its right side.
template <int K, bool transposed, class T>
__device__ Map<T, K> step_map(const T* factor, const T* right_side) {
    Map<T, K> map;
    for (int i = 0; i < K; ++i) {
        for (int j = 0; j < K; ++j) map.m[i][j] = transposed ? factor[j * K + i] : factor[i * K + j];
        map.b[i] = right_side[i];
    }
    return map;
}

// --- scan

constexpr int most_rows = 32;    // of a tile
constexpr int most_window = 32;  // tiles that are looked at at once
constexpr index tile_bytes = index(64) << 10;

/// Threads of a block, and the steps of a thread's chunk: odd, so that threads whose chunks follow each other in memory
/// read different banks of shared memory.
template <class T, int K>
struct TileShape {
    static constexpr int threads = K == 1 ? 512 : 256;
    static constexpr int fitting = int(tile_bytes / (threads * index(sizeof(T)) * (K * K + K)));
    static constexpr int chunk = fitting % 2 == 1 ? fitting : fitting - 1;
    static_assert(chunk >= 1);
};

/// How the sequences and rows are divided into groups of neighbours, and time into tiles.
struct Tiling {
    index sequences, rows;      ///< of a group, at most
    index row_groups, groups;   ///< per sequence; of all
    index tiles, steps;         ///< of a row; per tile
    int slots, chunks, window;  ///< rows of a tile; per row; see look_back
    int threads;
    int factor_bytes, right_bytes, solution_bytes;  ///< that can be copied at once
};

template <class T>
struct Summaries {
    unsigned *ticket, *flags;  ///< flags [tiles, groups]: 1: the map is there; 2: the last state too
    T *maps, *states;          ///< [tiles, groups, entries, slots]
};

/// The part of a tile that a group has of each array.
struct Group {
    index sequence, sequences, row, rows;
    __device__ index slots() const { return sequences * rows; }
};
template <class T>
__device__ Group group_of(const Arrays<T>& arrays, const Tiling& tiling, index group) {
    Group result;
    result.sequence = group / tiling.row_groups * tiling.sequences;
    result.sequences = min(tiling.sequences, arrays.batch - result.sequence);
    result.row = group % tiling.row_groups * tiling.rows;
    result.rows = min(tiling.rows, arrays.rows - result.row);
    return result;
}

/// Calls move(in shared memory, in the array) for pieces of `piece` numbers, neighbouring threads at neighbouring ones.
template <class T, class Move>
__device__ void for_pieces(const Group& group, const Tiling& tiling, const Strided<T>& array, int size, int piece,
                           index first, index steps, const Move& move) {
    const index pieces = group.rows * size / piece, in_sequence = pieces * steps;
    for (index i = threadIdx.x; i < group.sequences * in_sequence; i += blockDim.x) {
        const index sequence = i / in_sequence, rest = i % in_sequence, step = rest / pieces;
        const index at = rest % pieces * piece;
        move((step * tiling.slots + sequence * group.rows) * size + at,
             array.at(first + step, group.sequence + sequence, group.row, size) + at);
    }
}

template <int bytes, class T>
__device__ void begin_copying_pieces(const Group& group, const Tiling& tiling, const Strided<const T>& array, int size,
                                     index first, index steps, T* shared) {
    for_pieces(group, tiling, array, size, bytes / int(sizeof(T)), first, steps,
               [&](index at, const T* from) { cuda::begin_copy<bytes>(shared + at, from); });
}
template <class T>
__device__ void begin_copying(const Group& group, const Tiling& tiling, const Strided<const T>& array, int size,
                              int bytes, index first, index steps, T* shared) {
    if (bytes == 16)
        begin_copying_pieces<16>(group, tiling, array, size, first, steps, shared);
    else if (bytes == 8)
        begin_copying_pieces<8>(group, tiling, array, size, first, steps, shared);
    else if constexpr (sizeof(T) <= 4)
        begin_copying_pieces<4>(group, tiling, array, size, first, steps, shared);
}

template <int numbers, class T>
__device__ void store_pieces(const Group& group, const Tiling& tiling, const Strided<T>& array, int size, index first,
                             index steps, const T* shared) {
    struct alignas(numbers * sizeof(T)) Piece {
        T values[numbers];
    };
    for_pieces(group, tiling, array, size, numbers, first, steps,
               [&](index at, T* to) { *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(shared + at); });
}
template <class T>
__device__ void store(const Group& group, const Tiling& tiling, const Strided<T>& array, int size, int bytes,
                      index first, index steps, const T* shared) {
    constexpr int widest = 16 / int(sizeof(T));
    if (bytes == 16)
        store_pieces<widest>(group, tiling, array, size, first, steps, shared);
    else if (bytes == 8)
        store_pieces<widest / 2>(group, tiling, array, size, first, steps, shared);
    else
        store_pieces<1>(group, tiling, array, size, first, steps, shared);
}

/// The state before a tile, from those before it, to `carried` [K, slots] of shared memory. `window` tiles at a time
/// are looked at; `maps` [window, entries, slots] and `status` [window] are shared memory.
template <class T, int K>
__device__ void look_back(const Tiling& tiling, const Summaries<T>& summaries, index tile, index group, int chunk,
                          int slot, T* maps, unsigned* status, T* carried) {
    constexpr int entries = Map<T, K>::size;
    const index before = tile - 1 - chunk;
    const bool looks = chunk < tiling.window && slot < tiling.slots && before >= 0;
    int nearest = -1;
    while (true) {
        if (slot == 0 && chunk < tiling.window)
            status[chunk] = before >= 0 ? cuda::load_acquire(summaries.flags + before * tiling.groups + group) : 0;
        __syncthreads();
        for (int c = 0; c < tiling.window && status[c] > 0 && nearest < 0; ++c)
            if (status[c] == 2) nearest = c;
        __syncthreads();
        if (nearest >= 0) break;
        cuda::pause();
    }
    if (looks && chunk <= nearest) {
        const index at = before * tiling.groups + group;
        const T* const from =
            chunk == nearest ? summaries.states + at * K * tiling.slots : summaries.maps + at * entries * tiling.slots;
        for (int e = 0; e < (chunk == nearest ? K : entries); ++e)
            maps[(chunk * entries + e) * tiling.slots + slot] = from[e * tiling.slots + slot];
    }
    __syncthreads();
    if (chunk == 0 && slot < tiling.slots) {
        T x[K];
        for (int k = 0; k < K; ++k) x[k] = maps[(nearest * entries + k) * tiling.slots + slot];
        for (int c = nearest - 1; c >= 0; --c)
            Map<T, K>::read(maps + c * entries * tiling.slots + slot, tiling.slots).apply(x);
        for (int k = 0; k < K; ++k) carried[k * tiling.slots + slot] = x[k];
    }
}

template <class T, int K, bool transposed>
__global__ void __launch_bounds__(TileShape<T, K>::threads)
    scan_tiles(const Arrays<T> arrays, const Tiling tiling, const Summaries<T> summaries) {
    constexpr int S = TileShape<T, K>::chunk, entries = Map<T, K>::size;
    const int threads = int(blockDim.x);
    T* const factor = shared_memory<T>();
    T* const right_side = factor + tiling.steps * tiling.slots * K * K;
    T* const maps = right_side + tiling.steps * tiling.slots * K;  // [entries, threads]
    T* const window_maps = maps + entries * threads;               // [window, entries, slots]
    T* const carried = window_maps + tiling.window * entries * tiling.slots;
    unsigned* const status = reinterpret_cast<unsigned*>(carried + K * tiling.slots);
    unsigned* const ticket = status + tiling.window;

    if (threadIdx.x == 0) *ticket = atomicAdd(summaries.ticket, 1U);
    __syncthreads();
    const index tile = *ticket / tiling.groups, group_index = *ticket % tiling.groups;
    const Group group = group_of(arrays, tiling, group_index);
    const index first = tile * tiling.steps, steps = min(tiling.steps, arrays.steps - first);
    // Without an initial state the first step has no M: what lies there in memory is not to be read.
    const index skipped = first == 0 && arrays.initial.data == nullptr ? 1 : 0;
    for (index i = threadIdx.x; i < skipped * tiling.slots * K * K; i += threads) factor[i] = T(0);
    begin_copying(group, tiling, arrays.factor, K * K, tiling.factor_bytes, first + skipped, steps - skipped,
                  factor + skipped * tiling.slots * K * K);
    begin_copying(group, tiling, arrays.right_side, K, tiling.right_bytes, first, steps, right_side);
    cuda::wait_for_copies();
    __syncthreads();

    const int chunk = int(threadIdx.x) / tiling.slots, slot = int(threadIdx.x) % tiling.slots;
    const bool owns = chunk < tiling.chunks && slot < group.slots();
    const int begin = chunk * S, end = owns ? int(min(index(begin + S), steps)) : begin;
    const auto map_at = [&](int s) {
        const index at = index(s) * tiling.slots + slot;
        return step_map<K, transposed>(factor + at * K * K, right_side + at * K);
    };

    // 1. the chunk's map
    Map<T, K> whole = Map<T, K>::identity();
    if (begin < end) whole = map_at(begin);
    for (int s = begin + 1; s < end; ++s) whole = map_at(s).after(whole);

    // 2. of all chunks up to this one
    for (int distance = 1; distance < tiling.chunks; distance *= 2) {
        whole.write(maps + threadIdx.x, threads);
        __syncthreads();
        Map<T, K> before;
        const bool joins = chunk < tiling.chunks && chunk >= distance;
        if (joins) before = Map<T, K>::read(maps + threadIdx.x - distance * tiling.slots, threads);
        __syncthreads();
        if (joins) whole = whole.after(before);
    }
    whole.write(maps + threadIdx.x, threads);

    // 3. the state before the tile
    unsigned* const flag = summaries.flags + tile * tiling.groups + group_index;
    const index summary = tile * tiling.groups + group_index;
    const bool last_chunk = owns && chunk == tiling.chunks - 1;
    if (tile == 0) {
        if (owns && chunk == 0)
            for (int k = 0; k < K; ++k)
                carried[k * tiling.slots + slot] =
                    arrays.initial.data == nullptr
                        ? T(0)
                        : arrays.initial.at(0, group.sequence + slot / group.rows, group.row + slot % group.rows, K)[k];
    } else {
        if (tile + 1 < tiling.tiles) {
            if (last_chunk) whole.write(summaries.maps + summary * entries * tiling.slots + slot, tiling.slots);
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                cuda::store_release(flag, 1U);
            }
        }
        look_back<T, K>(tiling, summaries, tile, group_index, chunk, slot, window_maps, status, carried);
    }
    __syncthreads();
    T x[K];
    for (int k = 0; k < K; ++k) x[k] = owns ? carried[k * tiling.slots + slot] : T(0);
    if (tile + 1 < tiling.tiles) {
        if (last_chunk) {
            T state[K];
            for (int k = 0; k < K; ++k) state[k] = x[k];
            whole.apply(state);
            for (int k = 0; k < K; ++k) summaries.states[(summary * K + k) * tiling.slots + slot] = state[k];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            cuda::store_release(flag, 2U);
        }
    }

    // 4. the chunk from its first state
    if (owns && chunk > 0) Map<T, K>::read(maps + threadIdx.x - tiling.slots, threads).apply(x);
    for (int s = begin; s < end; ++s) {
        map_at(s).apply(x);
        for (int k = 0; k < K; ++k) right_side[(index(s) * tiling.slots + slot) * K + k] = x[k];
    }
    __syncthreads();
    store(group, tiling, arrays.solution, K, tiling.solution_bytes, first, steps, right_side);
}

/// The widest copy that every piece of an array allows: `size` numbers per row, `rows` of them side by side, or parts
/// of `rows` rows.
template <class T>
int bytes_at_once(const Strided<T>& array, index batch, index rows, index group_rows, int size) {
    for (const int bytes : {16, 8}) {
        const index numbers = bytes / index(sizeof(T));
        const auto fits = [&](index count) { return count % numbers == 0; };
        if (reinterpret_cast<std::uintptr_t>(array.data) % std::uintptr_t(bytes) == 0 && fits(array.step) &&
            (batch == 1 || fits(array.batch)) && fits(rows * size) && fits(group_rows * size))
            return bytes;
    }
    return int(sizeof(T));
}

template <class T, int K>
Tiling tiling_of(const Arrays<T>& arrays) {
    using Tile = TileShape<T, K>;
    Tiling tiling{};
    // Rows of several short sequences share a tile, but where each lies by itself in memory, as [batch, steps, width].
    const bool apart = arrays.factor.step == arrays.rows * K * K && arrays.steps > 1;
    tiling.rows = std::min<index>(arrays.rows, most_rows);
    tiling.sequences = apart ? 1 : std::clamp<index>(most_rows / tiling.rows, 1, arrays.batch);
    tiling.row_groups = (arrays.rows + tiling.rows - 1) / tiling.rows;
    tiling.groups = tiling.row_groups * ((arrays.batch + tiling.sequences - 1) / tiling.sequences);
    tiling.slots = int(tiling.sequences * tiling.rows);
    const index wanted = (arrays.steps + Tile::chunk - 1) / Tile::chunk;
    tiling.chunks = int(std::min<index>(Tile::threads / tiling.slots, wanted));
    tiling.threads = (tiling.chunks * tiling.slots + 31) / 32 * 32;
    tiling.steps = index(tiling.chunks) * Tile::chunk;
    tiling.tiles = (arrays.steps + tiling.steps - 1) / tiling.steps;
    tiling.window = std::min({most_window, tiling.chunks, std::max(8, 256 / tiling.slots)});
    const auto bytes = [&](const auto& array, int size) {
        return bytes_at_once(array, arrays.batch, arrays.rows, tiling.rows, size);
    };
    tiling.factor_bytes = bytes(arrays.factor, K * K);
    tiling.right_bytes = bytes(arrays.right_side, K);
    tiling.solution_bytes = bytes(arrays.solution, K);
    return tiling;
}

template <class T, int K>
std::size_t shared_bytes(const Tiling& tiling) {
    constexpr index entries = Map<T, K>::size;
    const index numbers = tiling.steps * tiling.slots * entries + entries * tiling.threads +
                          tiling.window * entries * tiling.slots + K * tiling.slots;
    return std::size_t(numbers) * sizeof(T) + std::size_t(tiling.window + 1) * sizeof(unsigned);
}

template <class T, int K>
void scan(const OrderedSystem<T>& system, CUstream_st* stream, Workspace& workspace) {
    const Arrays<T> arrays = arrays_of(system);
    const Tiling tiling = tiling_of<T, K>(arrays);
    const index blocks = tiling.tiles * tiling.groups;
    constexpr index most_blocks = std::numeric_limits<int>::max();
    if (blocks > most_blocks)
        throw InvalidArgument("system", "at most " + std::to_string(most_blocks) + " tiles", std::to_string(blocks));
    const Workspace::Scope scope(workspace);
    Summaries<T> summaries{};
    summaries.flags = workspace.take<unsigned>(blocks + 1);
    summaries.ticket = summaries.flags + blocks;
    summaries.maps = workspace.take<T>(blocks * Map<T, K>::size * tiling.slots);
    summaries.states = workspace.take<T>(blocks * K * tiling.slots);
    cuda::check(cudaMemsetAsync(summaries.flags, 0, std::size_t(blocks + 1) * sizeof(unsigned), stream),
                "filling with zeros");
    cuda::launch({dim3(unsigned(blocks)), dim3(unsigned(tiling.threads)), shared_bytes<T, K>(tiling), stream},
                 system.transposed ? scan_tiles<T, K, true> : scan_tiles<T, K, false>, arrays, tiling, summaries);
}

// --- substitution

template <class T, int K, bool transposed>
__global__ void __launch_bounds__(plain_threads) substitute_rows(const Arrays<T> arrays) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= arrays.batch * arrays.rows) return;
    const index sequence = i / arrays.rows, row = i % arrays.rows;
    T x[K];
    for (int k = 0; k < K; ++k)
        x[k] = arrays.initial.data == nullptr ? T(0) : arrays.initial.at(0, sequence, row, K)[k];
    for (index s = 0; s < arrays.steps; ++s) {
        const T* const b = arrays.right_side.at(s, sequence, row, K);
        if (s == 0 && arrays.initial.data == nullptr) {
            for (int k = 0; k < K; ++k) x[k] = b[k];
        } else {
            step_map<K, transposed>(arrays.factor.at(s, sequence, row, K * K), b).apply(x);
        }
        T* const to = arrays.solution.at(s, sequence, row, K);
        for (int k = 0; k < K; ++k) to[k] = x[k];
    }
}

/// Chunks of `length` steps of chains of blocks of any size.
struct Chunks {
    index length, count;
};

/// A block of threads per chunk of a chain: its warps share the rows of M x, their lanes the columns. The state before
/// chunk c > 0 is ends [c - 1].
template <class T>
__global__ void __launch_bounds__(most_threads)
    substitute_chains(const Arrays<T> arrays, int K, bool transposed, const Chunks chunks, const T* ends) {
    T* const x = shared_memory<T>();  // [2, K]: the state and the next one
    const index chains = arrays.batch * arrays.rows, chunk = index(blockIdx.x) / chains;
    const index chain = index(blockIdx.x) % chains, sequence = chain / arrays.rows, row = chain % arrays.rows;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
    const T* const initial = chunk > 0                        ? ends + ((chunk - 1) * chains + chain) * K
                             : arrays.initial.data == nullptr ? nullptr
                                                              : arrays.initial.at(0, sequence, row, K);
    for (int k = int(threadIdx.x); k < K; k += int(blockDim.x)) x[k] = initial == nullptr ? T(0) : initial[k];
    __syncthreads();
    const index first = chunk * chunks.length, last = min(first + chunks.length, arrays.steps);
    for (index s = first; s < last; ++s) {
        const bool alone = s == 0 && initial == nullptr;
        const T* const m = arrays.factor.at(s, sequence, row, K * K);
        const T* const b = arrays.right_side.at(s, sequence, row, K);
        const T* const before = x + ((s - first) % 2) * K;
        T* const after = x + ((s - first + 1) % 2) * K;
        T* const to = arrays.solution.at(s, sequence, row, K);
        if (transposed || alone) {
            for (int i = int(threadIdx.x); i < K; i += int(blockDim.x)) {
                T sum = b[i];
                for (int k = 0; k < K && !alone; ++k) sum += m[index(k) * K + i] * before[k];
                after[i] = to[i] = sum;
            }
        } else {
            for (int i = warp; i < K; i += warps) {
                T sum = T(0);
                for (int k = lane; k < K; k += 32) sum += m[index(i) * K + k] * before[k];
                for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0U, sum, d);
                if (lane == 0) after[i] = to[i] = sum + b[i];
            }
        }
        __syncthreads();
    }
}

// --- scan of larger blocks: the chunks' maps, substitution from chunk to chunk, substitution within each

/// The maps of all chunks but the last: products [2, chunks - 1, chains, K, K], the first half of which ends as the
/// products, stored as M is; sums [chunks - 1, chains, K]. A block of threads each.
template <class T>
__global__ void __launch_bounds__(most_threads)
    summarise_chunks(const Arrays<T> arrays, int K, bool transposed, const Chunks chunks, T* products, T* sums) {
    T* const b = shared_memory<T>();  // [2, K]
    const index chains = arrays.batch * arrays.rows, chunk = index(blockIdx.x) / chains;
    const index chain = index(blockIdx.x) % chains, sequence = chain / arrays.rows, row = chain % arrays.rows;
    const index first = chunk * chunks.length, size = index(K) * K;
    T* const halves[2] = {products + index(blockIdx.x) * size, products + (gridDim.x + index(blockIdx.x)) * size};
    for (index i = threadIdx.x; i < size; i += blockDim.x) {
        const bool nothing = first == 0 && arrays.initial.data == nullptr;
        halves[(chunks.length - 1) % 2][i] = nothing ? T(0) : arrays.factor.at(first, sequence, row, int(size))[i];
    }
    for (int k = int(threadIdx.x); k < K; k += int(blockDim.x)) b[k] = arrays.right_side.at(first, sequence, row, K)[k];
    __syncthreads();
    for (index n = 1; n < chunks.length; ++n) {
        const T* const m = arrays.factor.at(first + n, sequence, row, int(size));
        const T* const right_side = arrays.right_side.at(first + n, sequence, row, K);
        const T* const before = halves[(chunks.length - n) % 2];
        T* const after = halves[(chunks.length - 1 - n) % 2];
        for (index e = threadIdx.x; e < size; e += blockDim.x) {
            const index i = e / K, j = e % K;
            T sum = T(0);
            for (int l = 0; l < K; ++l)
                sum += transposed ? before[i * K + l] * m[l * K + j] : m[i * K + l] * before[l * K + j];
            after[e] = sum;
        }
        for (int i = int(threadIdx.x); i < K; i += int(blockDim.x)) {
            T sum = right_side[i];
            for (int l = 0; l < K; ++l)
                sum += (transposed ? m[index(l) * K + i] : m[index(i) * K + l]) * b[(n - 1) % 2 * K + l];
            b[n % 2 * K + i] = sum;
        }
        __syncthreads();
    }
    for (int k = int(threadIdx.x); k < K; k += int(blockDim.x))
        sums[index(blockIdx.x) * K + k] = b[(chunks.length - 1) % 2 * K + k];
}

int threads_for(index block) { return int(std::clamp<index>((block + 31) / 32 * 32 * 4, 32, most_threads)); }

template <class T>
void substitute(const Arrays<T>& arrays, index block, bool transposed, const Chunks& chunks, const T* ends,
                CUstream_st* stream) {
    const index blocks = chunks.count * arrays.batch * arrays.rows;
    if (blocks > std::numeric_limits<int>::max())
        throw InvalidArgument("system", "fewer than 2^31 chunks of all chains", std::to_string(blocks));
    cuda::launch(
        {dim3(unsigned(blocks)), dim3(unsigned(threads_for(block))), std::size_t(2 * block) * sizeof(T), stream},
        substitute_chains<T>, arrays, int(block), transposed, chunks, ends);
}

template <class T>
void scan_large(const OrderedSystem<T>& system, index wanted, CUstream_st* stream, Workspace& workspace) {
    const Arrays<T> arrays = arrays_of(system);
    const index block = system.block(), chains = arrays.batch * arrays.rows, steps = arrays.steps;
    const index blocks_at_once = 2 * device::multiprocessors();
    const index length = wanted > 0 ? std::min(wanted, steps)
                                    : std::max<index>(2, (steps * chains + blocks_at_once - 1) / blocks_at_once);
    const Chunks chunks{length, (steps + length - 1) / length};
    if (chunks.count < 2) return substitute<T>(arrays, block, system.transposed, {steps, 1}, nullptr, stream);
    const Workspace::Scope scope(workspace);
    const index maps = (chunks.count - 1) * chains;
    T* const products = workspace.take<T>(2 * maps * block * block);
    T* const ends = workspace.take<T>(maps * block);
    cuda::launch({dim3(unsigned(maps)), dim3(unsigned(threads_for(block * block / 4))),
                  std::size_t(2 * block) * sizeof(T), stream},
                 summarise_chunks<T>, arrays, int(block), system.transposed, chunks, products, ends);
    Arrays<T> joined = arrays;  // in place: sums become ends
    joined.factor = {products, chains * block * block, arrays.rows * block * block};
    joined.right_side = {ends, chains * block, arrays.rows * block};
    joined.solution = {ends, chains * block, arrays.rows * block};
    joined.steps = chunks.count - 1;
    substitute<T>(joined, block, system.transposed, {joined.steps, 1}, nullptr, stream);
    substitute<T>(arrays, block, system.transposed, chunks, ends, stream);
}

// --- parallel cyclic reduction

/// One row (step s of one chain) of one elimination step: r_s += M_s r_{s-distance}, M_s <- M_s M_{s-distance}; where
/// `transposed`, M is held as its transpose.
template <class T>
struct Elimination {
    const T *factor, *right_side;  ///< [steps, chains, K, K], [steps, chains, K]
    T *next_factor, *next_right_side;
};
template <class T>
__global__ void __launch_bounds__(plain_threads)
    eliminate(const Elimination<T> rows, index steps, index chains, int K, index distance, bool transposed) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;  // an entry of a right side
    if (i >= steps * chains * K) return;
    const int k = int(i % K);
    const index row = i / K, before = row - distance * chains;
    const bool first = before < 0;
    const T* const m = rows.factor + row * K * K;
    T sum = rows.right_side[i];
    for (int j = 0; j < K && !first; ++j)
        sum += (transposed ? m[j * K + k] : m[k * K + j]) * rows.right_side[before * K + j];
    rows.next_right_side[i] = sum;
    for (int j = 0; j < K; ++j) {
        T entry = T(0);  // nothing before the first step remains
        for (int l = 0; l < K && !first; ++l)
            entry += transposed ? rows.factor[before * K * K + index(k) * K + l] * m[index(l) * K + j]
                                : m[index(k) * K + l] * rows.factor[before * K * K + index(l) * K + j];
        rows.next_factor[row * K * K + index(k) * K + j] = entry;
    }
}

/// To contiguous rows; the first step has its initial state taken in.
template <class T>
__global__ void __launch_bounds__(plain_threads)
    gather_rows(const Arrays<T> arrays, int K, bool transposed, T* factor, T* right_side) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x, chains = arrays.batch * arrays.rows;
    if (i >= arrays.steps * chains * K) return;
    const int k = int(i % K);
    const index s = i / K / chains, chain = i / K % chains, sequence = chain / arrays.rows, row = chain % arrays.rows;
    const T* const m = arrays.factor.at(s, sequence, row, K * K);
    T sum = arrays.right_side.at(s, sequence, row, K)[k];
    if (s == 0 && arrays.initial.data != nullptr) {
        const T* const x = arrays.initial.at(0, sequence, row, K);
        for (int j = 0; j < K; ++j) sum += (transposed ? m[j * K + k] : m[k * K + j]) * x[j];
    }
    right_side[i] = sum;
    for (int j = 0; j < K; ++j) factor[i * K + j] = s == 0 ? T(0) : m[index(k) * K + j];
}

template <class T>
__global__ void __launch_bounds__(plain_threads) scatter_rows(const T* right_side, const Arrays<T> arrays, int K) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x, chains = arrays.batch * arrays.rows;
    if (i >= arrays.steps * chains * K) return;
    const index chain = i / K % chains;
    arrays.solution.at(i / K / chains, chain / arrays.rows, chain % arrays.rows, K)[i % K] = right_side[i];
}

template <class T>
__global__ void __launch_bounds__(plain_threads) multiply_rows(const Arrays<T> arrays, int K) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= arrays.batch * arrays.rows * K) return;
    const index chain = i / K, sequence = chain / arrays.rows, row = chain % arrays.rows;
    const T* const m = arrays.factor.at(0, sequence, row, K * K);
    const T* const y = arrays.right_side.at(0, sequence, row, K);
    T sum = T(0);
    for (int j = 0; j < K; ++j) sum += m[index(j) * K + i % K] * y[j];
    arrays.solution.at(0, sequence, row, K)[i % K] = sum;
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

}  // namespace

template <Backend backend, class T>
void solve_sequential(const OrderedSystem<T>& system, const Execution& execution) {
    const Arrays<T> arrays = arrays_of(system);
    const index block = system.block(), chains = arrays.batch * arrays.rows;
    if (block <= largest_block_in_tiles)
        return with_block(block, [&]<int K>() {
            cuda::launch(cuda::one_each(chains, execution.stream),
                         system.transposed ? substitute_rows<T, K, true> : substitute_rows<T, K, false>, arrays);
        });
    substitute<T>(arrays, block, system.transposed, {system.steps(), 1}, nullptr, execution.stream);
}

template <Backend backend, class T>
void solve_pcr(const OrderedSystem<T>& system, const Execution& execution, Workspace& workspace) {
    const Workspace::Scope scope(workspace);
    const Arrays<T> arrays = arrays_of(system);
    const index block = system.block(), chains = arrays.batch * arrays.rows, count = system.steps() * chains * block;
    const cuda::Launch launch = cuda::one_each(count, execution.stream);
    T *factor = workspace.take<T>(count * block), *next_factor = workspace.take<T>(count * block);
    T *right_side = workspace.take<T>(count), *next_right_side = workspace.take<T>(count);
    cuda::launch(launch, gather_rows<T>, arrays, int(block), system.transposed, factor, right_side);
    for (index distance = 1; distance < system.steps(); distance *= 2) {
        cuda::launch(launch, eliminate<T>, Elimination<T>{factor, right_side, next_factor, next_right_side},
                     system.steps(), chains, int(block), distance, system.transposed);
        std::swap(factor, next_factor);
        std::swap(right_side, next_right_side);
    }
    cuda::launch(launch, scatter_rows<T>, right_side, arrays, int(block));
}

template <Backend backend, class T>
void solve_scan(const OrderedSystem<T>& system, index chunk, const Execution& execution, Workspace& workspace) {
    if (system.block() <= largest_block_in_tiles)
        with_block(system.block(), [&]<int K>() { scan<T, K>(system, execution.stream, workspace); });
    else
        scan_large(system, chunk, execution.stream, workspace);
}

template <Backend backend, class T>
void multiply_transposed(const Jacobian<const T>& subdiagonal, const View<const T>& y, const View<T>& product,
                         const Execution& execution) {
    const Arrays<T> arrays = arrays_of<T>({subdiagonal, y, {}, product, true});
    cuda::launch(cuda::one_each(y.batch() * y.width(), execution.stream), multiply_rows<T>, arrays,
                 int(subdiagonal.block()));
}

#define DEEPPCR_INSTANTIATE(T)                                                                                \
    template void solve_sequential<Backend::cuda, T>(const OrderedSystem<T>&, const Execution&);              \
    template void solve_pcr<Backend::cuda, T>(const OrderedSystem<T>&, const Execution&, Workspace&);         \
    template void solve_scan<Backend::cuda, T>(const OrderedSystem<T>&, index, const Execution&, Workspace&); \
    template void multiply_transposed<Backend::cuda, T>(const Jacobian<const T>&, const View<const T>&,       \
                                                        const View<T>&, const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::reduce
