// Bidiagonal systems x_s = M_s x_{s-1} + b_s of K x K blocks, K from 5 on: substitution along chunks of the steps.
//
//   substitution   each chunk of each chain from the state before it; all steps are one chunk where the chains alone
//                  fill the chip: K^2 + 2 K numbers per step and chain, each moved once
//   scan           1. of each chunk the product of its M and the sum of its b, carried along it
//                  2. the states at the chunks' ends: the same kind of system, a chunk for a step, solved the same way
//                  3. substitution along each chunk: M is read twice, b too, and a product costs K times a step's work
//
// A product's columns are independent: P <- M P takes M from shared memory, where the steps to come are copied
// meanwhile, and keeps P
//
//   K <= 32        in registers: a thread has one column, the threads of a column's K neighbours read the same entry of
//   M
//                  at the same time; 32, 16 or 8 threads make a chunk, and none waits for more than its warp
//   K <= 256       in shared memory, `panel` columns to a block of 256 threads, each of which has up to 16 rows of
//                  4 columns of the next P in registers; M comes in slices of 16 of its columns. Where tensor cores are
//                  asked for, a warp has tiles of the next P
//   larger ones    are substituted only
//
// M^T, of transposed solves, is the same memory read along the other side, and P is stored transposed.
#include <bit>

#include "reduce/arrays_cuda.cuh"

namespace deeppcr::reduce {
namespace {

using cuda::shared_memory;

/// Chunks of `length` steps, the last one maybe shorter.
struct Chunks {
    index length, count;
};

/// What is carried along the chunks: to `products` [chunks - 1, chains, K, K] and `sums` [chunks - 1, chains, K], of
/// all chunks but the last, or, where there is no `products`, to the solution, from `sums`, the states at the chunks'
/// ends.
template <class A>
struct Carried {
    A *products, *sums;
};

/// A chunk of a chain.
struct Run {
    index chunk, sequence, row, first;
    int steps;
    bool from_nothing;  ///< no state is before the first step, whose M is not to be read

    template <class T>
    __device__ Run(const Arrays<T>& arrays, const Chunks& chunks, index number) {
        const index chains = arrays.batch * arrays.rows, chain = number % chains;
        sequence = chain / arrays.rows;
        row = chain % arrays.rows;
        enter(arrays, chunks, number / chains);
    }
    /// Another chunk of the same chain.
    template <class T>
    __device__ void enter(const Arrays<T>& arrays, const Chunks& chunks, index other) {
        chunk = other;
        first = chunk * chunks.length;
        steps = int(min(chunks.length, arrays.steps - first));
        from_nothing = chunk == 0 && arrays.initial.data == nullptr;
    }
};

/// An entry of the state before a chunk.
template <class T>
__device__ Arithmetic<T> before(const Arrays<T>& arrays, const Carried<Arithmetic<T>>& carried, const Run& run, int K,
                                int entry) {
    if (run.from_nothing) return 0;
    if (run.chunk == 0) return cuda::widen(arrays.initial.at(0, run.sequence, run.row, K)[entry]);
    return carried.sums[(((run.chunk - 1) * arrays.batch + run.sequence) * arrays.rows + run.row) * K + entry];
}

/// Bytes of a copy that every row of K numbers of every block allows.
template <class T>
int bytes_at_once(const Arrays<T>& arrays, int K) {
    int bytes = int(sizeof(T));
    for (const index wider : {4, 8, 16}) {
        const auto fits = [&](index count) { return count * index(sizeof(T)) % wider == 0; };
        if (wider > bytes && reinterpret_cast<std::uintptr_t>(arrays.factor.data) % std::uintptr_t(wider) == 0 &&
            fits(K) && (arrays.steps == 1 || fits(arrays.factor.step)) &&
            (arrays.batch == 1 || fits(arrays.factor.batch)))
            bytes = int(wider);
    }
    return bytes;
}

/// Numbers from row to row of shared memory: an odd number of pieces of 16 bytes, so that neighbouring rows lie in
/// different banks.
template <class T, int numbers>
inline constexpr int pitch_of = (numbers * int(sizeof(T)) / 16 | 1) * 16 / int(sizeof(T));

/// Four neighbours in a row of M, or of M^T, that lies in shared memory.
template <bool transposed, class T>
__device__ __forceinline__ void read_line(const T* m, int pitch, int row, int column, Arithmetic<T> (&entries)[4]) {
    if constexpr (transposed) {
        DEEPPCR_UNROLL
        for (int e = 0; e < 4; ++e) entries[e] = cuda::widen(m[(column + e) * pitch + row]);
    } else {
        read_numbers<4>(m + row * pitch + column, entries);
    }
}

// --- blocks of up to 32
//
// The scan takes two launches, however many times chunks are made of chunks' ends. In the first, who ends a chunk of
// ends last goes on with it, and whoever ends the last of all has the states of the top level. In the second, each
// chunk comes down from there by itself, over a few maps of each level, which lie in the second-level cache: as many
// steps one after the other as level by level, and no wait for a launch in between.

constexpr int largest_in_registers = 32;
constexpr int stages = 4;  // steps that are in shared memory: one in use, the others coming
/// Of a block.
template <class T, int side>
constexpr int warps = side * sizeof(T) <= 128 ? 4 : 2;
/// Chunks that a multiprocessor summarises at once, as registers and shared memory allow; of larger blocks, blocks of
/// threads.
template <class A>
constexpr int chunks_at_once(int K) {
    const bool wide = sizeof(A) > 4;
    return K <= 8 ? 64 : K <= 16 ? (wide ? 24 : 32) : K <= 32 ? (wide ? 6 : 12) : 2;
}

/// A system in chunks.
template <class T>
struct System {
    Arrays<T> arrays;
    Chunks chunks;
    int K, bytes;  ///< bytes: of a copy
    __host__ __device__ index chains() const { return arrays.batch * arrays.rows; }
};

/// The system of the ends of chunks; of the last level the solution is wanted, in the place of `sums`.
template <class A>
struct Level : System<A> {
    A *products, *sums;  ///< written by the chunks: the system's arrays
    unsigned* ended;     ///< [chunks, chains]: how many steps of a chunk have been written
};
template <class A>
struct Levels {
    static constexpr int most = 12;
    Level<A> all[most];
    int count;
};

/// Steps that a team runs along, from the first one's arrays on.
template <class T>
struct Path {
    const T *factor, *right_side;
    T* solution;  ///< null: not wanted
    index factor_step, right_side_step, solution_step;
    int steps;
    bool from_nothing;  ///< as Run has it

    __device__ Path(const System<T>& system, const Run& run, bool present)
        : factor(system.arrays.factor.at(run.first, run.sequence, run.row, system.K * system.K)),
          right_side(system.arrays.right_side.at(run.first, run.sequence, run.row, system.K)),
          solution(system.arrays.solution.data == nullptr
                       ? nullptr
                       : system.arrays.solution.at(run.first, run.sequence, run.row, system.K)),
          factor_step(system.arrays.factor.step),
          right_side_step(system.arrays.right_side.step),
          solution_step(system.arrays.solution.step),
          steps(present ? run.steps : 0),
          from_nothing(run.from_nothing) {}
};

/// How `side` threads copy a block of K x K numbers, which lie side by side, to rows of shared memory: each the same
/// parts of every block, whose places are known before the first.
template <class T, int side>
class BlockCopy {
    static constexpr int pitch = pitch_of<T, side>;

public:
    __device__ BlockCopy(int K, int bytes, int me) : K_(K), bytes_(bytes), me_(me), many_(bytes / int(sizeof(T))) {
        if (whole()) return;
        const int pieces = K / many_;
        piece_ = me % pieces * many_;
        place_ = me / pieces * pitch + piece_;
        piece_step_ = side % pieces * many_;
        step_ = side / pieces * pitch + piece_step_;
    }
    __device__ __forceinline__ void begin(const T* from, T* to) const {
        if (whole()) {
            constexpr int many = 16 / int(sizeof(T)), pieces = side / many, rows = side / pieces;
            from += me_ * many;
            to += me_ / pieces * pitch + me_ % pieces * many;
            DEEPPCR_UNROLL
            for (int row = 0; row < side; row += rows) cuda::begin_copy<16>(to + row * pitch, from + row * side);
        } else if (bytes_ == 16) {
            begin_as<16>(from, to);
        } else if (bytes_ == 8) {
            begin_as<8>(from, to);
        } else if (bytes_ == 4) {
            begin_as<4>(from, to);
        } else {
            begin_as<2>(from, to);
        }
    }

private:
    __device__ bool whole() const { return K_ == side && bytes_ == 16; }
    template <int bytes>
    __device__ __forceinline__ void begin_as(const T* from, T* to) const {
        int piece = piece_;
        to += place_;
        DEEPPCR_ROLLED
        for (int i = me_ * many_; i < K_ * K_; i += side * many_) {
            if constexpr (bytes >= 4)
                cuda::begin_copy<bytes>(to, from + i);
            else
                *to = from[i];
            to += step_;
            piece += piece_step_;
            if (piece >= K_) {
                piece -= K_;
                to += pitch - K_;
            }
        }
    }

    int K_, bytes_, me_, many_, piece_ = 0, place_ = 0, piece_step_ = 0, step_ = 0;
};

/// `side` threads run along a path: thread `me` has row `me` of the state, and column `me` of the product. The teams of
/// a warp go side by side, as far as the longest path. T: what their shared memory is made for, or smaller numbers.
template <class T, int side, bool transposed>
struct Team {
    using A = Arithmetic<T>;
    static constexpr int threads = warps<T, side> * 32, teams = threads / side;
    /// To a multiprocessor. Wider numbers than T would spill within the loop.
    static constexpr int blocks = std::is_same_v<T, A> ? chunks_at_once<A>(side) / teams : 1;
    static constexpr int ring_bytes = stages * side * pitch_of<T, side> * int(sizeof(T));
    static constexpr std::size_t shared_bytes = std::size_t(teams) * (ring_bytes + side * sizeof(A));
    static_assert(blocks * (shared_bytes + 1024) <= 228 << 10,
                  "of compute capability 9.0, which keeps 1 KiB per block");

    unsigned char* ring;
    A* state;
    index number;  ///< among all teams
    int me;

    __device__ Team() : me(int(threadIdx.x) % side) {
        const int team = int(threadIdx.x) / side;
        number = index(blockIdx.x) * teams + team;
        ring = shared_memory<unsigned char>() + team * ring_bytes;
        state = reinterpret_cast<A*>(shared_memory<unsigned char>() + teams * ring_bytes) + team * side;
    }

    /// From the state at hand, or, where the path is `apart`, from a state of 0 and a product of 1.
    template <bool summarises, class N>
    __device__ __forceinline__ void run_along(const Path<N>& path, int K, int bytes, bool apart,
                                              A (&column)[summarises ? side : 1]) const {
        constexpr int pitch = pitch_of<N, side>, vector = 4, at_once = 16 / int(sizeof(N));
        const int longest = int(cuda::largest_in_warp(unsigned(path.steps)));
        if (longest == 0) return;
        N* const matrices = reinterpret_cast<N*>(ring);
        __syncwarp();
        for (int i = me; i < stages * side * pitch / at_once; i += side)  // beyond K it stays so
            reinterpret_cast<Piece<N, at_once>*>(matrices)[i] = {};
        __syncwarp();
        const BlockCopy<N, side> copy(K, bytes, me);
        const N *ahead = path.factor, *ahead_right_side = path.right_side + me;
        const auto right_side = [&](int n) {
            const N value = me < K && n < path.steps ? *ahead_right_side : N();
            ahead_right_side += path.right_side_step;
            return value;
        };
        const auto begin = [&](int n) {
            if (n < path.steps && !(n == 0 && path.from_nothing))
                copy.begin(ahead, matrices + n % stages * (side * pitch));
            ahead += path.factor_step;
            cuda::commit_copies();
        };
        for (int n = 0; n < stages - 1; ++n) begin(n);
        N next_right_side = right_side(0);
        for (int n = 0; n < longest; ++n) {
            cuda::wait_for_copies_but<stages - 2>();
            __syncwarp();
            begin(n + stages - 1);
            const N* const m = matrices + n % stages * (side * pitch);
            A sums[vector] = {cuda::widen(next_right_side)};
            next_right_side = right_side(n + 1);
            if (n > 0 || !(apart || path.from_nothing)) {
                DEEPPCR_UNROLL
                for (int l = 0; l < side; l += vector) {
                    A entries[vector];
                    read_line<transposed>(m, pitch, me, l, entries);
                    DEEPPCR_UNROLL
                    for (int v = 0; v < vector; ++v) sums[v] += entries[v] * state[l + v];
                }
            }
            if constexpr (summarises) {
                if (n == 0) {  // also beyond a path: those of the teams that are present end together
                    DEEPPCR_UNROLL
                    for (int i = 0; i < side; ++i)
                        column[i] = cuda::widen(m[transposed ? me * pitch + i : i * pitch + me]);
                } else {
                    A next[side];
                    DEEPPCR_UNROLL
                    for (int i = 0; i < side; ++i) next[i] = A(0);
                    DEEPPCR_UNROLL
                    for (int i = 0; i < side; ++i) {
                        DEEPPCR_UNROLL
                        for (int l = 0; l < side; l += vector) {
                            A entries[vector];
                            read_numbers<vector>(m + i * pitch + l, entries);
                            DEEPPCR_UNROLL
                            for (int v = 0; v < vector; ++v) {
                                if constexpr (transposed)
                                    next[l + v] += entries[v] * column[i];
                                else
                                    next[i] += entries[v] * column[l + v];
                            }
                        }
                    }
                    // Beyond K nothing, which infinity times 0 is not.
                    DEEPPCR_UNROLL
                    for (int i = 0; i < side; ++i) column[i] = i < K ? next[i] : A(0);
                }
            }
            __syncwarp();
            if (n >= path.steps) continue;
            const A sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            state[me] = me < K ? sum : A(0);
            if constexpr (!summarises)
                if (path.solution != nullptr && me < K)
                    path.solution[n * path.solution_step + me] = cuda::narrow<N>(sum);
        }
    }

    /// Whether the team is the last of `members` to write, and so sees what the others wrote. All of a warp call.
    __device__ bool is_last(bool present, unsigned* ended, index members) const {
        __threadfence();
        __syncwarp();
        if (me == 0) __threadfence();  // for the team
        const unsigned before = present && me == 0 ? atomicAdd(ended, 1U) : 0U;
        const bool last = __shfl_sync(~0U, before, 0, side) + 1 == members;
        __threadfence();
        return present && last;
    }
};

/// The maps of all chunks but the last, to the first level, and where they are A's, of all levels.
template <class T, int side, bool transposed>
__global__ void __launch_bounds__(Team<T, side, transposed>::threads, Team<T, side, transposed>::blocks)
    summarise_small(const __grid_constant__ System<T> system, const __grid_constant__ Levels<Arithmetic<T>> levels) {
    using A = Arithmetic<T>;
    const Team<T, side, transposed> team;
    const int K = system.K, me = team.me;
    const index chains = system.chains(), runs = (system.chunks.count - 1) * chains;
    bool present = team.number < runs;  // the others go along, for the sake of their warp
    Run run(system.arrays, system.chunks, min(team.number, runs - 1));
    const index chain = run.sequence * system.arrays.rows + run.row;
    A column[side];
    [[maybe_unused]] A none[1];
    const System<T>* from = &system;
    for (int l = 0;; ++l) {
        const bool apart = run.chunk > 0;
        team.state[me] = !apart && me < K ? before(from->arrays, {}, run, K, me) : A(0);
        team.template run_along<true>(Path<T>(*from, run, present), K, from->bytes, apart, column);
        const Level<A>& ends = levels.all[l];
        if (present && me < K) {
            const index map = run.chunk * chains + chain;
            ends.sums[map * K + me] = team.state[me];
            A* const product = ends.products + map * K * K;
            DEEPPCR_UNROLL
            for (int i = 0; i < side; ++i)
                if (i < K) product[transposed ? me * K + i : i * K + me] = column[i];
        }
        if constexpr (std::is_same_v<T, A>) {
            const bool top = ends.chunks.count == 1;
            run.enter(ends.arrays, ends.chunks, top ? 0 : run.chunk / ends.chunks.length);
            present = team.is_last(present && (top || run.chunk < ends.chunks.count - 1),
                                   ends.ended + run.chunk * chains + chain, run.steps);
            if (!__any_sync(~0U, present)) return;
            if (!top) {
                from = &ends;
                continue;
            }
            team.state[me] = A(0);
            team.template run_along<false>(Path<A>(ends, run, present), K, ends.bytes, false, none);
        }
        return;
    }
}

/// All states, from those of the last level.
template <class T, int side, bool transposed>
__global__ void __launch_bounds__(Team<Arithmetic<T>, side, transposed>::threads)
    substitute_small(const __grid_constant__ System<T> system, const __grid_constant__ Levels<Arithmetic<T>> levels) {
    using A = Arithmetic<T>;
    const Team<A, side, transposed> team;
    const int K = system.K, me = team.me;
    const index chains = system.chains(), runs = system.chunks.count * chains;
    const bool present = team.number < runs;
    const Run run(system.arrays, system.chunks, min(team.number, runs - 1));
    const index chain = run.sequence * system.arrays.rows + run.row;
    A none[1];
    team.state[me] = run.chunk == 0 && me < K ? before(system.arrays, {}, run, K, me) : A(0);
    for (int l = levels.count - 1; l >= 0; --l) {
        index last = run.chunk - 1;  // the step of this level that is before the chunk, if any is
        for (int m = 0; m < l && last >= 0; ++m) last = last / levels.all[m].chunks.length - 1;
        const bool some = present && last >= 0;
        const Level<A>& level = levels.all[l];
        if (l == levels.count - 1) {
            if (some && me < K) team.state[me] = level.sums[(last * chains + chain) * K + me];
            continue;
        }
        Run to = run;
        to.enter(level.arrays, level.chunks, some ? last / level.chunks.length : 0);
        to.steps = int(last - to.first) + 1;
        Path<A> path(level, to, some);
        path.solution = nullptr;
        team.template run_along<false>(path, K, level.bytes, false, none);
    }
    team.template run_along<false>(Path<T>(system, run, present), K, system.bytes, false, none);
}

// --- blocks of up to 256

constexpr int most_threads = 1024;
constexpr int large_threads = 256, slice = 16;  // columns of M
constexpr int large_stages = 3;                 // slices in shared memory

/// A panel of the product's columns.
template <class T, int rows>
struct Panel {
    using A = Arithmetic<T>;
    static constexpr int columns = 16 / int(sizeof(A));  // of a thread
    static constexpr int width = 16 * columns, side = 16 * rows;
};

/// The next P of a panel by multiplications and additions. A thread has `rows` rows of a few columns: ti + 16 r, or,
/// where M is read transposed, neighbours by four.
template <class T, int rows, bool transposed>
class PlainProduct {
    using Of = Panel<T, rows>;
    using A = Arithmetic<T>;
    static constexpr int columns = Of::columns;

public:
    static constexpr int pitch = transposed ? pitch_of<T, Of::side> : pitch_of<T, slice>;  // of a slice of M
    static constexpr int product_pitch = Of::width;

    __device__ explicit PlainProduct(int thread) : ti_(thread / 16), tj_(thread % 16) {}

    __device__ __forceinline__ void clear() {
        DEEPPCR_UNROLL
        for (auto& row : next_) {
            DEEPPCR_UNROLL
            for (A& entry : row) entry = A(0);
        }
    }
    /// A slice of M times the rows of P that it meets.
    __device__ __forceinline__ void add(const T* m, const A* product) {
        DEEPPCR_UNROLL
        for (int v = 0; v < slice; v += 4) {
            A of_product[4][columns];
            DEEPPCR_UNROLL
            for (int w = 0; w < 4; ++w)
                read_numbers<columns>(product + (v + w) * product_pitch + columns * tj_, of_product[w]);
            DEEPPCR_UNROLL
            for (int r = 0; r < rows; r += transposed ? 4 : 1) {
                DEEPPCR_UNROLL
                for (int w = 0; w < (transposed ? 4 : 1); ++w) {
                    A entries[4];
                    read_numbers<4>(m + (transposed ? (v + w) * pitch + row_of(r) : row_of(r) * pitch + v), entries);
                    DEEPPCR_UNROLL
                    for (int e = 0; e < 4; ++e) {
                        DEEPPCR_UNROLL
                        for (int c = 0; c < columns; ++c)
                            next_[transposed ? r + e : r][c] += entries[e] * of_product[transposed ? w : e][c];
                    }
                }
            }
        }
    }
    /// To the first K rows of P; `last`: no further product is computed from it.
    __device__ __forceinline__ void store(A* product, int K, bool /*last*/) const {
        DEEPPCR_UNROLL
        for (int r = 0; r < rows; ++r) {
            if (row_of(r) >= K) continue;
            write_numbers<columns>(product + row_of(r) * product_pitch + columns * tj_, next_[r]);
        }
    }
    /// An entry of P as it is kept for the next product.
    __device__ static A kept(A entry, bool /*last*/) { return entry; }

private:
    __device__ int row_of(int r) const { return transposed ? r / 4 * 64 + 4 * ti_ + r % 4 : ti_ + 16 * r; }

    A next_[rows][columns];
    int ti_, tj_;
};

/// The same in tensor cores: 4 x 2 warps share the panel, each in tiles of cuda::multiply_tile. The pitches let the 32
/// numbers of a fragment lie in different banks.
template <class T, int rows, bool transposed, TensorCores tensor_cores>
class TiledProduct {
    using Of = Panel<T, rows>;
    using A = Arithmetic<T>;
    using Tile = cuda::Tile<A>;
    static constexpr bool in_tf32 = std::is_same_v<A, float>, exact = !std::is_same_v<T, float>;
    static constexpr bool split = in_tf32 && tensor_cores == TensorCores::split;
    static constexpr bool rounded = in_tf32 && tensor_cores == TensorCores::tf32;
    static constexpr int warp_rows = Of::side / 4, warp_columns = Of::width / 2;
    static constexpr int row_tiles = warp_rows / Tile::rows, column_tiles = warp_columns / Tile::columns;
    static constexpr int apart = in_tf32 ? 8 : 4;

public:
    static constexpr int pitch = transposed ? Of::side + apart : slice + (sizeof(T) == 2 ? 8 : 4);
    static constexpr int product_pitch = Of::width + apart;

    __device__ explicit TiledProduct(int thread)
        : g_(thread % 32 / 4), t_(thread % 4), row_(thread / 64 * warp_rows), column_(thread / 32 % 2 * warp_columns) {}

    __device__ __forceinline__ void clear() {
        DEEPPCR_UNROLL
        for (auto& row : next_) {
            DEEPPCR_UNROLL
            for (auto& tile : row) {
                DEEPPCR_UNROLL
                for (A& entry : tile) entry = A(0);
            }
        }
    }
    __device__ __forceinline__ void add(const T* m, const A* product) {
        DEEPPCR_UNROLL
        for (int k = 0; k < slice; k += Tile::depth) {
            A b[column_tiles][Tile::of_b], b_rest[column_tiles][Tile::of_b];
            DEEPPCR_UNROLL
            for (int c = 0; c < column_tiles; ++c) {
                DEEPPCR_UNROLL
                for (int i = 0; i < Tile::of_b; ++i) {
                    b[c][i] = product[(k + t_ + 4 * i) * product_pitch + column_ + Tile::columns * c + g_];
                    if constexpr (split) cuda::split_to_tf32(b[c][i], b[c][i], b_rest[c][i]);
                }
            }
            DEEPPCR_UNROLL
            for (int r = 0; r < row_tiles; ++r) {
                A a[Tile::of_a], a_rest[Tile::of_a];
                DEEPPCR_UNROLL
                for (int i = 0; i < Tile::of_a; ++i) {
                    const int row = row_ + Tile::rows * r + g_ + 8 * (i % (Tile::rows / 8));
                    const int l = k + t_ + 4 * (i / (Tile::rows / 8));
                    a[i] = cuda::widen(m[transposed ? l * pitch + row : row * pitch + l]);
                    if constexpr (split && !exact) cuda::split_to_tf32(a[i], a[i], a_rest[i]);
                    if constexpr (rounded && !exact) a[i] = cuda::round_to_tf32(a[i]);
                }
                if constexpr (split) {
                    DEEPPCR_UNROLL
                    for (int c = 0; c < column_tiles; ++c) cuda::multiply_tile(next_[r][c], a, b_rest[c]);
                    DEEPPCR_UNROLL
                    for (int c = 0; c < column_tiles && !exact; ++c) cuda::multiply_tile(next_[r][c], a_rest, b[c]);
                }
                DEEPPCR_UNROLL
                for (int c = 0; c < column_tiles; ++c) cuda::multiply_tile(next_[r][c], a, b[c]);
            }
        }
    }
    __device__ __forceinline__ void store(A* product, int K, bool last) const {
        DEEPPCR_UNROLL
        for (int r = 0; r < row_tiles; ++r) {
            DEEPPCR_UNROLL
            for (int i = 0; i < Tile::of_sum; i += 2) {
                const int row = row_ + Tile::rows * r + g_ + 4 * i;
                if (row >= K) continue;
                DEEPPCR_UNROLL
                for (int c = 0; c < column_tiles; ++c) {
                    const A pair[2] = {kept(next_[r][c][i], last), kept(next_[r][c][i + 1], last)};
                    write_numbers<2>(product + row * product_pitch + column_ + Tile::columns * c + 2 * t_, pair);
                }
            }
        }
    }
    __device__ static A kept(A entry, bool last) {
        if constexpr (rounded)
            if (!last) return cuda::round_to_tf32(entry);
        return entry;
    }

private:
    A next_[row_tiles][column_tiles][Tile::of_sum];
    int g_, t_, row_, column_;
};

/// As begin_copying, of rows of up to `most_numbers`: each thread has its place in a row, in every so many rows.
template <int most_numbers, class T>
__device__ __forceinline__ void begin_copying_slice(int bytes, const T* from, int stride, int rows, int numbers,
                                                    T* shared, int pitch, int thread) {
    cuda::compute_anew_from(thread);
    cuda::compute_anew_from(bytes);
    // All powers of two: by shifts.
    constexpr int log_numbers = std::bit_width(unsigned(most_numbers)) - 1;
    const int log_many = 31 - __clz(bytes / int(sizeof(T))), log_pieces = log_numbers - log_many;
    const int rows_at_once = large_threads >> log_pieces, row = thread >> log_pieces;
    const int column = (thread & ((1 << log_pieces) - 1)) << log_many;
    if (column >= numbers) return;
    from += row * stride + column;
    shared += row * pitch + column;
    DEEPPCR_ROLLED
    for (int r = row; r < rows; r += rows_at_once) {
        if (bytes == 16)
            cuda::begin_copy<16>(shared, from);
        else if (bytes == 8)
            cuda::begin_copy<8>(shared, from);
        else if (bytes == 4)
            cuda::begin_copy<4>(shared, from);
        else
            *shared = *from;
        from += rows_at_once * stride;
        shared += rows_at_once * pitch;
    }
}

/// How shared memory is divided: large_stages of slices of M, two states, the panel of P.
template <class T, int rows, bool transposed, bool summarises, TensorCores tensor_cores>
struct LargeShape {
    using A = Arithmetic<T>;
    using Of = Panel<T, rows>;
    using Product = std::conditional_t<tensor_cores == TensorCores::none, PlainProduct<T, rows, transposed>,
                                       TiledProduct<T, rows, transposed, tensor_cores>>;
    static constexpr int slice_numbers = (transposed ? slice : Of::side) * Product::pitch;
    static constexpr std::size_t bytes =
        large_stages * slice_numbers * sizeof(T) +
        ((summarises ? Of::side * Product::product_pitch : 0) + 2 * Of::side) * sizeof(A);
};

/// A block of threads runs along a chunk: thread i has row i of the state, and its part of a panel of the product.
template <class T, int rows, bool transposed, bool summarises, TensorCores tensor_cores>
__global__ void __launch_bounds__(large_threads, rows <= 8 ? 2 : 1)
    run_large(const __grid_constant__ Arrays<T> arrays, int K, int bytes, Chunks chunks,
              Carried<Arithmetic<T>> carried) {
    using A = Arithmetic<T>;
    using Shape = LargeShape<T, rows, transposed, summarises, tensor_cores>;
    using Product = typename Shape::Product;
    constexpr int panel = Panel<T, rows>::width, side = Panel<T, rows>::side, pitch = Product::pitch;
    const int panels = summarises ? (K + panel - 1) / panel : 1;
    const index number = index(blockIdx.x) / panels;
    const int first_column = int(index(blockIdx.x) % panels) * panel;
    const Run run(arrays, chunks, number);
    // The product of the first chunk is of no use.
    if (summarises && run.chunk == 0 && first_column > 0) return;
    T* const ring = shared_memory<T>();
    A* const state = reinterpret_cast<A*>(ring + large_stages * Shape::slice_numbers);  // [2, side]
    A* const product = state + 2 * side;                                                // [side, panel]
    const int me = int(threadIdx.x);

    const bool from_first = !summarises || (run.chunk == 0 && !run.from_nothing);
    const bool keeps_state = first_column == 0;
    for (int i = me; i < large_stages * Shape::slice_numbers; i += large_threads) ring[i] = T();
    for (int i = me; i < 2 * side; i += large_threads) state[i] = A(0);
    if constexpr (summarises)
        for (int i = me; i < side * panel; i += large_threads) {
            const int row = i / panel, column = first_column + i % panel;
            A& entry = product[row * Product::product_pitch + i % panel];
            entry = A(0);
            if (run.chunk > 0 && row < K && column < K)
                entry = Product::kept(
                    cuda::widen(arrays.factor.at(run.first, run.sequence, run.row,
                                                 K * K)[transposed ? column * K + row : row * K + column]),
                    run.steps == 1);
        }
    __syncthreads();
    const auto right_side = [&](int n) {
        return me < K && n < run.steps ? arrays.right_side.at(run.first + n, run.sequence, run.row, K)[me] : T();
    };
    const int begin_step = from_first && !run.from_nothing ? 0 : 1;
    if (me < K) {
        if (begin_step == 1) {
            state[me] = cuda::widen(right_side(0));
            if constexpr (!summarises)
                arrays.solution.at(run.first, run.sequence, run.row, K)[me] = cuda::narrow<T>(state[me]);
        } else {
            state[me] = before(arrays, carried, run, K, me);
        }
    }

    const auto after = [](int stage) { return stage == large_stages - 1 ? 0 : stage + 1; };
    int ahead_step = begin_step, ahead_column = 0, ahead_stage = 0;  // of the next slice to be copied
    const T* ahead = arrays.factor.at(run.first + begin_step, run.sequence, run.row, K * K);
    const auto begin = [&] {
        if (ahead_step < run.steps) {
            const int width = min(slice, K - ahead_column);
            T* const to = ring + ahead_stage * Shape::slice_numbers;
            begin_copying_slice<transposed ? side : slice>(
                bytes, ahead + (transposed ? ahead_column * K : ahead_column), K, transposed ? width : K,
                transposed ? K : width, to, pitch, me);
            // What an earlier slice left beside a narrower one would be multiplied by 0, and may be infinite.
            if constexpr (transposed) {
                DEEPPCR_ROLLED
                for (int i = width * pitch + me; i < slice * pitch; i += large_threads) to[i] = T();
            } else {
                DEEPPCR_ROLLED
                for (int i = me * pitch + width; i < me * pitch + slice && me < K; ++i) to[i] = T();
            }
            ahead_stage = after(ahead_stage);
            ahead_column += slice;
            if (ahead_column >= K) {
                ahead_column = 0;
                ++ahead_step;
                ahead += arrays.factor.step;
            }
        }
        cuda::commit_copies();
    };
    for (int i = 0; i < large_stages - 1; ++i) begin();
    T next_right_side = right_side(begin_step);
    Product next(me);
    int stage = 0;
    for (int n = begin_step; n < run.steps; ++n) {
        const A* const last = state + (n - begin_step) % 2 * side;
        A sum = cuda::widen(next_right_side);
        next_right_side = right_side(n + 1);
        if constexpr (summarises) next.clear();
        for (int l = 0; l < K; l += slice, stage = after(stage)) {
            cuda::wait_for_copies_but<large_stages - 2>();
            __syncthreads();
            begin();
            const T* const m = ring + stage * Shape::slice_numbers;
            if (keeps_state && me < K) {
                DEEPPCR_UNROLL
                for (int v = 0; v < slice; v += 4) {
                    A entries[4];
                    read_line<transposed>(m, pitch, me, v, entries);
                    DEEPPCR_UNROLL
                    for (int e = 0; e < 4; ++e) sum += entries[e] * last[l + v + e];
                }
            }
            if constexpr (summarises) {
                if (run.chunk == 0) continue;
                next.add(m, product + l * Product::product_pitch);
            }
        }
        if (keeps_state && me < K) {
            state[(n - begin_step + 1) % 2 * side + me] = sum;
            if constexpr (!summarises)
                arrays.solution.at(run.first + n, run.sequence, run.row, K)[me] = cuda::narrow<T>(sum);
        }
        if constexpr (summarises) {
            if (run.chunk == 0) continue;
            __syncthreads();
            next.store(product, K, n + 1 == run.steps);
        }
    }
    if constexpr (summarises) {
        __syncthreads();
        if (keeps_state && me < K) carried.sums[number * K + me] = state[(run.steps - begin_step) % 2 * side + me];
        A* const to = carried.products + number * K * K;
        for (int i = me; i < side * panel; i += large_threads) {
            const int row = transposed ? i % side : i / panel, column = transposed ? i / side : i % panel;
            if (row < K && first_column + column < K)
                to[transposed ? (first_column + column) * K + row : row * K + first_column + column] =
                    product[row * Product::product_pitch + column];
        }
    }
}

// --- larger blocks

/// A block of threads runs along a chain, all of it: its warps share the rows of M x, their lanes the columns.
template <class T>
__global__ void __launch_bounds__(most_threads)
    substitute_largest(const __grid_constant__ Arrays<T> arrays, int K, bool transposed) {
    using A = Arithmetic<T>;
    A* const x = shared_memory<A>();  // [2, K]: the state and the next one
    const Run run(arrays, {arrays.steps, 1}, blockIdx.x);
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    for (int k = int(threadIdx.x); k < K; k += most_threads) x[k] = before(arrays, {}, run, K, k);
    __syncthreads();
    for (index s = 0; s < arrays.steps; ++s) {
        const bool alone = s == 0 && run.from_nothing;
        const T* const m = arrays.factor.at(s, run.sequence, run.row, K * K);
        const T* const b = arrays.right_side.at(s, run.sequence, run.row, K);
        T* const to = arrays.solution.at(s, run.sequence, run.row, K);
        const A* const last = x + s % 2 * K;
        A* const next = x + (s + 1) % 2 * K;
        if (transposed || alone) {
            for (int i = int(threadIdx.x); i < K; i += most_threads) {
                A sum = cuda::widen(b[i]);
                for (int k = 0; k < K && !alone; ++k) sum += cuda::widen(m[index(k) * K + i]) * last[k];
                next[i] = sum;
                to[i] = cuda::narrow<T>(sum);
            }
        } else {
            for (int i = warp; i < K; i += most_threads / 32) {
                A sum = 0;
                for (int k = lane; k < K; k += 32) sum += cuda::widen(m[index(i) * K + k]) * last[k];
                for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0U, sum, d);
                if (lane > 0) continue;
                next[i] = sum + cuda::widen(b[i]);
                to[i] = cuda::narrow<T>(next[i]);
            }
        }
        __syncthreads();
    }
}

// --- on the host

template <class... Parameters, class... Arguments>
void launch(index blocks, int threads, std::size_t shared_bytes, CUstream_st* stream, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
    if (blocks > std::numeric_limits<int>::max())
        throw InvalidArgument("system", "fewer than 2^31 chunks of all chains", std::to_string(blocks));
    cuda::launch({dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes, stream}, kernel, arguments...);
}

/// Steps of a chunk: as many chunks as the chip runs at once, but none so short that the chunks' own system is not much
/// shorter than this one. Of 2^14 steps of one chain, chunks of 4 leave 15 products and 35 other steps one after the
/// other, and 5 times maps are passed on from one multiprocessor to another; of 8, 21, 55 and 3; of 16, 45, 51 and 3. A
/// product of blocks of 16 is 454 instructions, another step 105. Of larger blocks a level takes two launches.
template <class A>
index chunk_length(index steps, index chains, int K) {
    constexpr index few_steps = 48;  // take less than another level
    const index shortest = K <= largest_in_registers ? 4 : 8;
    if (steps <= few_steps) return steps;
    const index at_once = index(device::multiprocessors()) * chunks_at_once<A>(K);
    return std::min(steps, std::max(shortest, (steps * chains + at_once - 1) / at_once));
}
Chunks chunks_of(index steps, index length) { return {length, (steps + length - 1) / length}; }

/// The ends of chunks, where the maps of `chunks` go: their sums become the states there. The initial state is in the
/// first sum.
template <class A>
Arrays<A> ends_of(const Chunks& chunks, index batch, index rows, int K, A* products, A* sums) {
    const index chains = batch * rows, block = index(K) * K;
    return {{products, chains * block, rows * block},
            {sums, chains * K, rows * K},
            {nullptr, 0, 0},
            {sums, chains * K, rows * K},
            chunks.count - 1,
            batch,
            rows};
}

/// Where the ends are of the system's own type, one upon the other until one chunk holds them all; else the first.
template <class T>
Levels<Arithmetic<T>> levels_of(const System<T>& system, CUstream_st* stream, Workspace* workspace) {
    using A = Arithmetic<T>;
    constexpr int most = std::is_same_v<T, A> ? Levels<A>::most : 1;
    Levels<A> levels{};
    const index chains = system.chains();
    const int K = system.K;
    index chunks = 0;
    for (const Chunks* below = &system.chunks; below->count > 1 && levels.count < most;) {
        const index steps = below->count - 1;
        Level<A>& level = levels.all[levels.count++];
        level.products = workspace->take<A>(steps * chains * K * K);
        level.sums = workspace->take<A>(steps * chains * K);
        level.arrays = ends_of(*below, system.arrays.batch, system.arrays.rows, K, level.products, level.sums);
        level.chunks = chunks_of(steps, levels.count < most ? chunk_length<A>(steps, chains, K) : steps);
        level.K = K;
        level.bytes = bytes_at_once(level.arrays, K);
        chunks += level.chunks.count;
        below = &level.chunks;
    }
    if (most == 1 || levels.count == 0) return levels;
    unsigned* ended = workspace->take<unsigned>(chunks * chains);
    device::fill_bytes(ended, 0, chunks * chains * index(sizeof(unsigned)), stream);
    for (int l = 0; l < levels.count; ++l) {
        levels.all[l].ended = ended;
        ended += levels.all[l].chunks.count * chains;
    }
    return levels;
}

template <class T, int side, bool transposed>
void scan_small(const System<T>& system, CUstream_st* stream, Workspace* workspace) {
    using A = Arithmetic<T>;
    const Levels<A> levels = levels_of(system, stream, workspace);
    const auto along = [&]<class Of>(index chunks, auto kernel) {
        launch((chunks * system.chains() + Of::teams - 1) / Of::teams, Of::threads, Of::shared_bytes, stream, kernel,
               system, levels);
    };
    if (levels.count > 0) {
        along.template operator()<Team<T, side, transposed>>(system.chunks.count - 1,
                                                             summarise_small<T, side, transposed>);
        if constexpr (!std::is_same_v<T, A>) {
            System<A> ends = levels.all[0];
            ends.chunks = chunks_of(ends.arrays.steps, chunk_length<A>(ends.arrays.steps, ends.chains(), ends.K));
            scan_small<A, side, transposed>(ends, stream, workspace);
        }
    }
    along.template operator()<Team<A, side, transposed>>(system.chunks.count, substitute_small<T, side, transposed>);
}
template <class T, bool transposed>
void scan_small_as(const System<T>& system, CUstream_st* stream, Workspace* workspace) {
    if (system.K <= 8)
        scan_small<T, 8, transposed>(system, stream, workspace);
    else if (system.K <= 16)
        scan_small<T, 16, transposed>(system, stream, workspace);
    else
        scan_small<T, largest_in_registers, transposed>(system, stream, workspace);
}

constexpr int largest_panel_block = 256;
/// The largest block that is carried in slices on the current GPU.
template <class T>
int largest_in_slices() {
    using Shape = LargeShape<T, largest_panel_block / 16, false, true, TensorCores::none>;
    return index(Shape::bytes) <= shared_bytes_of_each(1) ? largest_panel_block : largest_panel_block / 2;
}

template <class T, bool transposed, bool summarises>
void run_large_as(const Arrays<T>& arrays, int K, const Chunks& chunks, const Carried<Arithmetic<T>>& carried,
                  TensorCores tensor_cores, CUstream_st* stream) {
    const index runs = (chunks.count - (summarises ? 1 : 0)) * arrays.batch * arrays.rows;
    const auto large_by = [&]<int rows, TensorCores by>() {
        constexpr int panel = Panel<T, rows>::width;
        launch(runs * (summarises ? (K + panel - 1) / panel : 1), large_threads,
               LargeShape<T, rows, transposed, summarises, by>::bytes, stream,
               run_large<T, rows, transposed, summarises, by>, arrays, K, bytes_at_once(arrays, K), chunks, carried);
    };
    const auto large = [&]<int rows>() {
        if constexpr (summarises) {
            constexpr auto split = TensorCores::split;
            constexpr std::size_t bytes = LargeShape<T, rows, transposed, summarises, split>::bytes;
            if (tensor_cores != TensorCores::none && index(bytes) <= shared_bytes_of_each(1)) {
                constexpr auto rounded = std::is_same_v<T, double> ? split : TensorCores::tf32;  // double has one kind
                return tensor_cores == split ? large_by.template operator()<rows, split>()
                                             : large_by.template operator()<rows, rounded>();
            }
        }
        large_by.template operator()<rows, TensorCores::none>();
    };
    if (K <= 64)
        large.template operator()<4>();
    else if (K <= 128)
        large.template operator()<8>();
    else if (K <= largest_in_slices<T>())
        large.template operator()<16>();
    else  // one chunk
        launch(runs, most_threads, std::size_t(2 * K) * sizeof(Arithmetic<T>), stream, substitute_largest<T>, arrays, K,
               transposed);
}
template <bool summarises, class T>
void run_large_chunks(const Arrays<T>& arrays, int K, bool transposed, const Chunks& chunks,
                      const Carried<Arithmetic<T>>& carried, TensorCores tensor_cores, CUstream_st* stream) {
    if (transposed)
        run_large_as<T, true, summarises>(arrays, K, chunks, carried, tensor_cores, stream);
    else
        run_large_as<T, false, summarises>(arrays, K, chunks, carried, tensor_cores, stream);
}

/// length: of a chunk; 0: from the shape and the GPU. workspace: null where all steps are one chunk.
template <class T>
void scan_chunks(const Arrays<T>& arrays, int K, bool transposed, index length, TensorCores tensor_cores,
                 CUstream_st* stream, Workspace* workspace) {
    using A = Arithmetic<T>;
    const index chains = arrays.batch * arrays.rows, steps = arrays.steps;
    if (length == 0) length = chunk_length<A>(steps, chains, K);
    if (length > steps || K > largest_in_slices<T>()) length = steps;
    const Chunks chunks = chunks_of(steps, length);
    if (K <= largest_in_registers) {
        const System<T> system{arrays, chunks, K, bytes_at_once(arrays, K)};
        return transposed ? scan_small_as<T, true>(system, stream, workspace)
                          : scan_small_as<T, false>(system, stream, workspace);
    }
    if (chunks.count == 1) return run_large_chunks<false, T>(arrays, K, transposed, chunks, {}, tensor_cores, stream);
    const index maps = (chunks.count - 1) * chains;
    const Carried<A> carried{workspace->take<A>(maps * K * K), workspace->take<A>(maps * K)};
    run_large_chunks<true, T>(arrays, K, transposed, chunks, carried, tensor_cores, stream);
    scan_chunks<A>(ends_of(chunks, arrays.batch, arrays.rows, K, carried.products, carried.sums), K, transposed, 0,
                   tensor_cores, stream, workspace);
    run_large_chunks<false, T>(arrays, K, transposed, chunks, carried, tensor_cores, stream);
}

}  // namespace

template <class T>
void scan_dense(const OrderedSystem<T>& system, index chunk, TensorCores tensor_cores, CUstream_st* stream,
                Workspace& workspace) {
    const Workspace::Scope scope(workspace);
    scan_chunks<T>(arrays_of(system), int(system.block()), system.transposed, chunk, tensor_cores, stream, &workspace);
}

template <class T>
void substitute_dense(const OrderedSystem<T>& system, CUstream_st* stream) {
    scan_chunks<T>(arrays_of(system), int(system.block()), system.transposed, system.steps(), TensorCores::none, stream,
                   nullptr);
}

#define DEEPPCR_INSTANTIATE(T)                                                                       \
    template void scan_dense(const OrderedSystem<T>&, index, TensorCores, CUstream_st*, Workspace&); \
    template void substitute_dense(const OrderedSystem<T>&, CUstream_st*);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::reduce
