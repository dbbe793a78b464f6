// A recurrence x <- rule(M x) whose steps follow each other within one kernel: the layers of a chain, the steps of a
// dense cell, and both backwards.
//
// A block advances `together` sequences. The matrix of a step never lies in shared memory: its numbers go from global
// memory to the registers that multiply them, each read once per block, 16 bytes per load, a warp's loads side by side.
// `lanes` neighbouring lanes share a row, four columns each; a warp holds `sets` times 32 / lanes rows, here for 8
// lanes and 2 sets:
//
//             columns 0-3 | 4-7 | ... | 28-31
//     row 0        lane 0 |  1  | ... |  7          set 0
//     row 1             8 |  9  | ... |  15
//     row 2            16 | 17  | ... |  23
//     row 3            24 | 25  | ... |  31
//     row 4             0 |  1  | ... |  7          set 1
//     ...
//
// A lane multiplies its columns of all its rows by four numbers of x; then the lanes of a row add up, each round
// handing half of its rows' sums to the other half of the lanes, so that a lane ends with the sum of one row, which it
// owns: it applies the rule, and puts the row's new number into shared memory, where the next step finds x. One barrier
// per step (none but the warp's own, where a warp holds all rows), since x is kept twice.
//
// What a step needs besides x does not depend on it: matrices and operands are asked for `depth` - 1 pieces ahead, into
// registers, and the matrices' lines are called into the second-level cache some steps before. A matrix that one piece
// does not hold is passed in several: row block after row block, and within one, chunks of columns.
//
// The order in which a row's products are added depends on the number of columns alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include <deeppcr/launch.cuh>
#include <deeppcr/recurrence.hpp>

#include "device/cuda.hpp"

namespace deeppcr::persistent {

/// How a piece of a matrix lies in a block. `whole`: one piece holds all rows and columns.
template <int lanes_, int sets_, int warps_, bool whole_>
struct Layout {
    static constexpr int lanes = lanes_, sets = sets_, warps = warps_;
    static constexpr bool whole = whole_;
    static constexpr int threads = 32 * warps, set_rows = 32 / lanes, warp_rows = sets * set_rows,
                         rows = warps * warp_rows, columns = 4 * lanes;
    static_assert(sets <= lanes);
};

/// Calls body(Layout) for matrices of that size, which have at most as many rows as columns; `square`: as many. The
/// number of lanes, and with it the order of additions, depends on the columns alone; `fewer`: half as many sets per
/// warp, for large numbers or several matrices.
template <bool fewer, bool square, class Body>
void with_layout(index rows, index columns, const Body& body) {
    constexpr int sets = fewer ? 4 : 8;
    if (columns <= 16) return body(Layout<4, 2, 1, true>());
    if (columns <= 32) return body(Layout<8, sets, 8 / sets, true>());
    if (columns <= 64) return body(Layout<16, sets, 32 / sets, true>());
    if constexpr (!fewer || !square)
        if (columns <= 128 && rows <= 16 * sets) return body(Layout<32, sets, 16, true>());
    return body(Layout<32, sets / 2, 16, false>());
}

template <class T>
__device__ __forceinline__ T multiply_add(T a, T b, T c) {
    return std::fma(a, b, c);
}

template <class T>
struct alignas(16) Pack {
    static constexpr int count = 16 / int(sizeof(T));
    T values[count];
};

/// Four neighbouring numbers, of an array that is aligned to 16 bytes there.
template <class T>
__device__ __forceinline__ void load_four(const T* from, T (&four)[4]) {
    DEEPPCR_UNROLL
    for (int i = 0; i < 4; i += Pack<T>::count) {
        const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
        DEEPPCR_UNROLL
        for (int j = 0; j < Pack<T>::count; ++j) four[i + j] = pack.values[j];
    }
}
/// The same of any array, 0 from `left` on.
template <class T>
__device__ __forceinline__ void load_up_to_four(const T* from, int left, bool aligned, T (&four)[4]) {
    if (aligned && left >= 4) return load_four(from, four);
    DEEPPCR_UNROLL
    for (int i = 0; i < 4; ++i) four[i] = i < left ? from[i] : T(0);
}

template <class T>
__device__ __forceinline__ void store_up_to_four(T* to, const T (&four)[4], int left, bool aligned) {
    if (aligned && left >= 4) {
        DEEPPCR_UNROLL
        for (int i = 0; i < 4; i += Pack<T>::count) {
            Pack<T> pack;
            DEEPPCR_UNROLL
            for (int j = 0; j < Pack<T>::count; ++j) pack.values[j] = four[i + j];
            *reinterpret_cast<Pack<T>*>(to + i) = pack;
        }
        return;
    }
    DEEPPCR_UNROLL
    for (int i = 0; i < 4; ++i)
        if (i < left) to[i] = four[i];
}

/// What all rules have in common: the size of a step's matrices, the sequences, the steps that make a group. A rule
/// derives from it and adds (`chunk` is a part of the steps that blocks of their own take)
///   Number                            float or double
///   static constexpr int matrices     of a step, which share x; a row's owner gets a sum for each
///                        outputs      numbers of x, `rows` apart, that a row becomes
///                        carries      numbers of a row that stay with it from step to step
///   static constexpr bool constant    whether all steps share their matrices
///                         stops       whether a chunk may end before its last step, each sequence at one of its own
///   items(chunk)                                    its number of steps
///   matrix(chunk, item)
///   Operands load(chunk, place, sequence, row)      what else the row's new numbers need
///   start(chunk, sequence, row, carry, x)           x and carries before the first step
///   finish(chunk, place, sequence, row, sums, operands, carry, x)   a step; whether the sequence must go on (stops)
///   asked(chunk, first_sequence, count)             stops: the sequences that run, a bit for each
///   settle(chunk, group, first_sequence, running, met, x, stride, carry)   stops: by all threads, after a group's last
///                                                   step, with the bits of the sequences that run, and of those among
///                                                   them of which no row must go on
struct Dimensions {
    int rows, columns, batch, phases;  // all matrices of a step together have less than 2^31 numbers
    bool aligned;                      // rows of the matrices, to 16 bytes
};

/// Where a thread's rows and columns begin in a piece, and the row that it owns.
template <class L>
struct Here {
    int part, first_row, row;
    bool owns;  // several lanes may hold the same sum; one of them acts

    __device__ __forceinline__ explicit Here(int warp) {
        constexpr int sharing = L::lanes / L::sets;
        const int lane = int(threadIdx.x) % 32;
        part = lane % L::lanes;
        first_row = warp * L::warp_rows + lane / L::lanes;
        row = first_row + part / sharing * L::set_rows;
        owns = part % sharing == 0;
    }
    __device__ __forceinline__ int first_column() const { return 4 * part; }
    /// Of what the owners of this thread's rows of a set hold.
    template <class T>
    __device__ __forceinline__ T from_owner(T value, int set) const {
        return __shfl_sync(~0U, value, int(threadIdx.x) % 32 - part + set * (L::lanes / L::sets));
    }
};

/// What one thread holds of a piece of `matrices` matrices.
template <class T, class L, int matrices>
struct Piece {
    T numbers[matrices][L::sets][4];

    /// Its part of the rows and columns from (row, column) on, of matrices [rows, columns] one after the other.
    __device__ __forceinline__ void load(const T* all, const Here<L>& here, int row, int column, const Dimensions& of) {
        const int first = column + here.first_column(), left = of.columns - first, top = row + here.first_row;
        const T* const from = all + index(top) * of.columns + first;
        const int stride = L::set_rows * of.columns, apart = of.rows * of.columns;
        const int valid = left > 0 ? of.rows - top : 0;  // of its rows, n * set_rows, those below
        if (of.aligned) {
            DEEPPCR_UNROLL
            for (int m = 0; m < matrices; ++m) {
                DEEPPCR_UNROLL
                for (int n = 0; n < L::sets; ++n) {
                    if (n * L::set_rows < valid)
                        load_four(from + (m * apart + n * stride), numbers[m][n]);
                    else
                        load_up_to_four(from, 0, false, numbers[m][n]);
                }
            }
        } else {
            DEEPPCR_UNROLL
            for (int m = 0; m < matrices; ++m) {
                DEEPPCR_UNROLL
                for (int n = 0; n < L::sets; ++n)
                    load_up_to_four(from + (m * apart + n * stride), n * L::set_rows < valid ? left : 0, false,
                                    numbers[m][n]);
            }
        }
    }
    __device__ __forceinline__ void multiply(const T (&x)[4], T (&sums)[matrices][L::sets]) const {
        DEEPPCR_UNROLL
        for (int m = 0; m < matrices; ++m) {
            DEEPPCR_UNROLL
            for (int n = 0; n < L::sets; ++n) {
                DEEPPCR_UNROLL
                for (int v = 0; v < 4; ++v) sums[m][n] = multiply_add(numbers[m][n][v], x[v], sums[m][n]);
            }
        }
    }
};

/// The sum over lanes that differ in the bits below 2 * distance, of one of the `count` rows: that which `owned_set`
/// says. `part`: the lane's number among those of a row.
template <int distance, int count, class T>
__device__ __forceinline__ T add_lanes(const T (&partial)[count], int part) {
    if constexpr (distance == 0) {
        return partial[0];
    } else if constexpr (count == 1) {
        const T both[1] = {partial[0] + __shfl_xor_sync(~0U, partial[0], distance)};
        return add_lanes<distance / 2>(both, part);
    } else {
        constexpr int half = count / 2;
        const bool upper = (part & distance) != 0;
        T kept[half];
        DEEPPCR_UNROLL
        for (int i = 0; i < half; ++i) {
            const T mine = upper ? partial[half + i] : partial[i], theirs = upper ? partial[i] : partial[half + i];
            kept[i] = mine + __shfl_xor_sync(~0U, theirs, distance);
        }
        return add_lanes<distance / 2>(kept, part);
    }
}

/// A place in the stream of pieces: of which step (`item`, which is the `phase`-th of `group`), row block and chunk.
struct Place {
    index item = 0, group = 0;
    int phase = 0, block = 0, chunk = 0;

    template <bool whole>
    __device__ __forceinline__ void advance(int phases, int blocks, int chunks) {
        if constexpr (!whole) {
            if (++chunk < chunks) return;
            chunk = 0;
            if (++block < blocks) return;
            block = 0;
        }
        ++item;
        if (++phase == phases) {
            phase = 0;
            ++group;
        }
    }
};

/// Bytes of matrices ahead of those being multiplied that are called into the second-level cache, and steps at most.
constexpr int bytes_ahead = 1 << 18, steps_ahead = 8;

/// How rules with `stops` compare with what was there before.
template <class T>
struct Meeting {
    const unsigned char* chunks_asked = nullptr;
    unsigned char* changed = nullptr;
    double absolute = 0, relative = 0;
    typename Chunks<T>::Mismatch* mismatches = nullptr;
    unsigned long long* repeated = nullptr;

    Meeting() = default;
    explicit Meeting(const Chunks<T>& chunks)
        : chunks_asked(chunks.asked),
          changed(chunks.changed),
          absolute(chunks.absolute_tolerance),
          relative(chunks.relative_tolerance),
          mismatches(chunks.mismatches),
          repeated(chunks.repeated) {}

    /// The sequences of which a chunk is, a bit for each.
    __device__ __forceinline__ unsigned asked(index chunk, int first_sequence, int count, int batch) const {
        unsigned bits = 0;
        for (int s = 0; s < count; ++s)
            if (chunks_asked[chunk * batch + first_sequence + s] != 0) bits |= 1U << s;
        return bits;
    }
    __device__ __forceinline__ double allowed(T old) const { return absolute + relative * fabs(double(old)); }
    __device__ __forceinline__ bool meets(T now, T old) const {  // not where either is NaN, or infinite
        const double apart = fabs(double(now) - double(old));
        return apart <= allowed(old) && apart < std::numeric_limits<double>::infinity();
    }
    /// Of `width` numbers of one sequence, by all threads: notes how far they are apart where the states met, else puts
    /// the new ones in the old ones' place.
    __device__ void settle(index chunk, index step, int sequence, int batch, int width, const T* now, int now_stride,
                           T* old, bool met, bool last) const {
        double residual = 0, fraction = 0;
        for (int i = int(threadIdx.x); i < width; i += int(blockDim.x)) {
            if (met) {
                const double apart = fabs(double(now[i * now_stride]) - double(old[i]));
                residual = fmax(residual, apart);
                if (apart > 0) fraction = fmax(fraction, apart / allowed(old[i]));
            } else {
                old[i] = now[i * now_stride];
            }
        }
        if (residual > 0) {
            atomicMax(&mismatches[sequence].residual, bits_of(residual));
            atomicMax(&mismatches[sequence].relative_residual, bits_of(fraction));
        }
        if (threadIdx.x != 0) return;
        if (met || last) atomicMax(repeated, (unsigned long long)(step + 1));
        if (!met && last) changed[chunk * batch + sequence] = 1;
    }

private:
    __device__ static unsigned long long bits_of(double value) {
        unsigned long long bits;
        memcpy(&bits, &value, sizeof bits);
        return bits;
    }
};

constexpr int votes = 3;

/// All threads' bits, or-ed. `ballots`: `votes` words of shared memory, 0 at first; each vote takes the next one, and
/// clears that of the last vote, which everybody has read.
template <int together>
__device__ __forceinline__ unsigned vote(unsigned bits, unsigned* ballots, index number) {
    if constexpr (together == 1) return __syncthreads_or(int(bits)) != 0 ? 1 : 0;
    unsigned of_warp = 0;
    DEEPPCR_UNROLL
    for (int s = 0; s < together; ++s)
        if (__any_sync(~0U, int(bits >> s & 1U)) != 0) of_warp |= 1U << s;
    unsigned* const ballot = ballots + number % votes;
    if (threadIdx.x % 32 == 0 && of_warp != 0) atomicOr(ballot, of_warp);
    __syncthreads();
    if (threadIdx.x == 0) ballots[(number + votes - 1) % votes] = 0;
    return *ballot;
}

/// Shared memory of a block for `together` sequences of `rows` numbers: x twice, what the rows carry, and the ballots.
template <class Rule, class L>
index shared_bytes(index rows, int together) {
    const index columns = (Rule::outputs * rows + L::columns - 1) / L::columns * L::columns;
    return together * (2 * columns + Rule::carries * rows) * index(sizeof(typename Rule::Number)) +
           (Rule::stops && together > 1 ? votes * index(sizeof(unsigned)) : 0);
}

template <class Rule, class L, int together>
__global__ void __launch_bounds__(L::threads, sizeof(typename Rule::Number) > 4 ? 1 : 0)
    advance(const __grid_constant__ Rule rule) {
    using T = typename Rule::Number;
    constexpr bool resident = Rule::constant && L::whole;
    constexpr int words = Rule::matrices * L::sets * 4 * int(sizeof(T) / 4);  // registers of a piece
    constexpr int depth = resident                      ? 4
                          : L::warps > 8 && words >= 48 ? 1
                          : L::warps > 8 || words > 48  ? 2
                          : words > 24                  ? 3
                                                        : 4;
    const int chunks = L::whole ? 1 : (rule.columns + L::columns - 1) / L::columns;
    const int blocks = L::whole ? 1 : (rule.rows + L::rows - 1) / L::rows;
    const int stride = chunks * L::columns, groups = (rule.batch + together - 1) / together;
    const index chunk = index(blockIdx.x) / groups;
    const int first_sequence = int(index(blockIdx.x) % groups) * together;
    const index items = rule.items(chunk);
    const index bytes = index(Rule::matrices) * rule.rows * rule.columns * index(sizeof(T));
    const int steps_before = ::max(1, ::min(steps_ahead, int(bytes_ahead / bytes)));
    unsigned running = 0;
    if constexpr (Rule::stops) {
        running = rule.asked(chunk, first_sequence, std::min(together, rule.batch - first_sequence));
        if (running == 0) return;
    }
    const Here<L> here(int(threadIdx.x) / 32);
    T* const x = cuda::shared_memory<T>();
    T* const carry = x + 2 * together * stride;
    auto* const ballots = reinterpret_cast<unsigned*>(carry + together * rule.rows * Rule::carries);
    const auto wait = [] {
        if constexpr (L::warps == 1)
            __syncwarp();
        else
            __syncthreads();
    };
    const auto exists = [&](int s) { return together == 1 || first_sequence + s < rule.batch; };

    for (int i = int(threadIdx.x); i < 2 * together * stride; i += L::threads) x[i] = T(0);
    if (Rule::stops && together > 1 && threadIdx.x < votes) ballots[threadIdx.x] = 0;
    wait();
    for (int row = here.row; here.owns && row < rule.rows; row += L::rows)
        for (int s = 0; s < together && exists(s); ++s) {
            T values[Rule::outputs];
            rule.start(chunk, first_sequence + s, row, carry + (s * rule.rows + row) * Rule::carries, values);
            DEEPPCR_UNROLL
            for (int o = 0; o < Rule::outputs; ++o) x[s * stride + o * rule.rows + row] = values[o];
        }
    wait();

    Piece<T, L, Rule::matrices> pieces[resident ? 1 : depth];
    typename Rule::Operands operands[depth][together];
    if (resident) pieces[0].load(rule.matrix(chunk, 0), here, 0, 0, rule);
    const auto load = [&](const Place& place, auto& piece, auto& operand) {
        if (place.item >= items) return;
        if constexpr (!resident)
            piece.load(rule.matrix(chunk, place.item), here, place.block * L::rows, place.chunk * L::columns, rule);
        if constexpr (!Rule::constant) {
            if (place.block == 0 && place.chunk == 0 && place.item + steps_before < items) {
                const auto* const lines = reinterpret_cast<const char*>(rule.matrix(chunk, place.item + steps_before));
                for (index at = index(threadIdx.x) * 128; at < bytes; at += L::threads * 128)
                    cuda::prefetch(lines + at);
            }
        }
        const int row = place.block * L::rows + here.row;
        if (place.chunk + 1 < chunks || row >= rule.rows) return;
        DEEPPCR_UNROLL
        for (int s = 0; s < together; ++s)
            if (exists(s)) operand[s] = rule.load(chunk, place, first_sequence + s, row);
    };

    Place ahead, now;
    DEEPPCR_UNROLL
    for (int i = 0; i + 1 < depth; ++i) {
        load(ahead, pieces[resident ? 0 : i], operands[i]);
        ahead.template advance<L::whole>(rule.phases, blocks, chunks);
    }
    T sums[together][Rule::matrices][L::sets];
    T *old_x = x, *new_x = x + together * stride;
    unsigned differ = 0;  // sequences of which a row of this thread's must go on
    // Multiplies piece i of those at hand; whether that was the last one.
    const auto turn = [&]<int i>(std::integral_constant<int, i>) {
        constexpr int last = (i + depth - 1) % depth;
        load(ahead, pieces[resident ? 0 : last], operands[last]);
        ahead.template advance<L::whole>(rule.phases, blocks, chunks);
        if (now.item >= items) return true;

        DEEPPCR_UNROLL
        for (int s = 0; s < together; ++s) {
            if (now.chunk == 0) {
                DEEPPCR_UNROLL
                for (auto& of_matrix : sums[s]) {
                    DEEPPCR_UNROLL
                    for (T& sum : of_matrix) sum = T(0);
                }
            }
            T four[4];
            load_four(old_x + s * stride + now.chunk * L::columns + here.first_column(), four);
            pieces[resident ? 0 : i].multiply(four, sums[s]);
        }
        if (now.chunk + 1 == chunks) {
            const int row = now.block * L::rows + here.row;
            DEEPPCR_UNROLL
            for (int s = 0; s < together; ++s) {
                T totals[Rule::matrices], values[Rule::outputs];
                DEEPPCR_UNROLL
                for (int m = 0; m < Rule::matrices; ++m) totals[m] = add_lanes<L::lanes / 2>(sums[s][m], here.part);
                if (!here.owns || row >= rule.rows || !exists(s)) continue;
                if (rule.finish(chunk, now, first_sequence + s, row, totals, operands[i][s],
                                carry + (s * rule.rows + row) * Rule::carries, values))
                    differ |= 1U << s;
                DEEPPCR_UNROLL
                for (int o = 0; o < Rule::outputs; ++o) new_x[s * stride + o * rule.rows + row] = values[o];
            }
            if (now.block + 1 == blocks) {
                if constexpr (Rule::stops) {
                    if (now.phase + 1 == rule.phases) {
                        const unsigned met = running & ~vote<together>(differ, ballots, now.group);
                        differ = 0;
                        rule.settle(chunk, now.group, first_sequence, running, met, new_x, stride, carry);
                        running &= ~met;
                        if (running == 0) return true;
                    } else {
                        wait();
                    }
                } else {
                    wait();
                }
                T* const before = old_x;
                old_x = new_x;
                new_x = before;
            }
        }
        now.template advance<L::whole>(rule.phases, blocks, chunks);
        return false;
    };
    [&]<int... i>(std::integer_sequence<int, i...>) {
        while (!(turn(std::integral_constant<int, i>()) || ...)) {
        }
    }
    (std::make_integer_sequence<int, depth>());
}

/// Whether rows of `columns` numbers from there on are all aligned to 16 bytes.
template <class T>
bool rows_aligned(const T* matrix, index columns) {
    return reinterpret_cast<std::uintptr_t>(matrix) % 16 == 0 && columns * index(sizeof(T)) % 16 == 0 &&
           columns % 4 == 0;
}

/// Memory for what is enqueued in a stream before it ends: from the workspace, or of its own where there is none.
template <class T>
class Scratch {
public:
    Scratch(index count, CUstream_st* stream, Workspace* workspace = nullptr) {
        if (count <= 0) return;
        if (workspace == nullptr) {
            memory_ = device::allocate_in_stream(count * index(sizeof(T)), stream);
            data_ = static_cast<T*>(memory_.get());
        } else {
            scope_.emplace(*workspace);
            data_ = workspace->take<T>(count);
        }
    }
    T* data() const { return data_; }

private:
    std::shared_ptr<void> memory_;
    std::optional<Workspace::Scope> scope_;
    T* data_ = nullptr;
};

constexpr int tile_side = 32, tile_threads = 256;

/// to[column][row] = from[row][column] of many matrices, a tile per block.
template <class T>
__global__ void __launch_bounds__(tile_threads) transpose_tiles(const T* from, int rows, int columns, T* to) {
    T* const tile = cuda::shared_memory<T>();
    const int down = (rows + tile_side - 1) / tile_side, across = (columns + tile_side - 1) / tile_side;
    const index matrix = index(blockIdx.x) / (index(down) * across) * rows * columns;
    const int row = int(index(blockIdx.x) / across % down) * tile_side;
    const int column = int(index(blockIdx.x) % across) * tile_side;
    const int inner = int(threadIdx.x) % tile_side, first = int(threadIdx.x) / tile_side;
    for (int i = first; i < tile_side; i += tile_threads / tile_side)
        if (row + i < rows && column + inner < columns)
            tile[i * (tile_side + 1) + inner] = from[matrix + index(row + i) * columns + column + inner];
    __syncthreads();
    for (int i = first; i < tile_side; i += tile_threads / tile_side)
        if (column + i < columns && row + inner < rows)
            to[matrix + index(column + i) * rows + row + inner] = tile[inner * (tile_side + 1) + i];
}

/// from [count, rows, columns] to [count, columns, rows], both contiguous.
template <class T>
void transpose(const T* from, index count, index rows, index columns, T* to, CUstream_st* stream) {
    const index tiles = ((rows + tile_side - 1) / tile_side) * ((columns + tile_side - 1) / tile_side);
    cuda::Launch where = cuda::one_each(count * tiles, stream, 1);
    where.threads = dim3(tile_threads);
    where.shared_bytes = tile_side * (tile_side + 1) * sizeof(T);
    cuda::launch(where, transpose_tiles<T>, from, int(rows), int(columns), to);
}

/// Enqueues `chunks` parts of the steps, all sequences of each. Where there are blocks enough, a block takes several
/// sequences, as many as its registers and shared memory hold, so that the matrices are read less often. Throws
/// InvalidArgument where not even one sequence has room.
template <class Rule>
void launch_advance(const Rule& rule, index chunks, CUstream_st* stream) {
    if (chunks == 0 || rule.batch == 0) return;
    constexpr bool fewer = Rule::matrices > 1 || sizeof(typename Rule::Number) > 4;
    with_layout<fewer, Rule::outputs == 1>(rule.rows, rule.columns, [&]<class L>(L) {
        const auto go = [&]<int together>(std::integral_constant<int, together>) {
            cuda::Launch where = cuda::one_each(chunks * ((rule.batch + together - 1) / together), stream, 1);
            where.threads = dim3(L::threads);
            where.shared_bytes = std::size_t(shared_bytes<Rule, L>(rule.rows, together));
            cuda::launch(where, advance<Rule, L, together>, rule);
        };
        // Resident matrices are read once. Of many warps a thread has registers for what one sequence of a cell needs
        // in double.
        constexpr int several = Rule::constant && L::whole                                             ? 1
                                : L::warps <= 8                                                        ? 4
                                : Rule::stops || (Rule::constant && sizeof(typename Rule::Number) > 4) ? 1
                                                                                                       : 2;
        const index most = device::shared_bytes_per_block();
        if (several > 1 && rule.batch > 1 && chunks * rule.batch >= 4 * index(device::multiprocessors()) &&
            shared_bytes<Rule, L>(rule.rows, several) <= most)
            return go(std::integral_constant<int, several>());
        index widest = rule.rows;
        while (widest > 0 && shared_bytes<Rule, L>(widest, 1) > most) --widest;
        if (widest < rule.rows)
            throw InvalidArgument("weights",
                                  "a width of at most " + std::to_string(widest) + ", for the " + std::to_string(most) +
                                      " bytes of shared memory that a block has on this GPU",
                                  std::to_string(rule.rows));
        go(std::integral_constant<int, 1>());
    });
}

}  // namespace deeppcr::persistent
