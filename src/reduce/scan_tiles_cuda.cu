// The scan of bidiagonal systems x_s = M_s x_{s-1} + b_s of K x K blocks, K up to 4, in one launch: M and b are read
// once and x is written once, K^2 + 2 K numbers per step and row (a row is one K x K chain).
//
// A block of threads takes a tile, consecutive steps of neighbouring rows, into shared memory:
//
//          rows ->                 each thread owns one row of one chunk of the steps
//   steps  [chunk 0 | 0 | 0 ...]   1. the chunk's map x -> M x + b: the product of its M, the sum of its b
//     |    [chunk 1 | 1 | 1 ...]   2. the maps joined: of K neighbouring chunks, a bundle, then of bundles by PCR
//     v    [chunk 2 | 2 | 2 ...]   3. the state before the tile, from the tiles before it
//          [  ...              ]   4. the chunk again, from its true first state; x takes the place of b
//
// Joining two maps costs K times what a step costs. But a row of a product needs one row of the later map only, with
// all of the earlier one: the K threads of a bundle have one row each of its product, and exchange rows in shared
// memory, log2(bundles) times. What leads to a chunk is the product of all bundles before its own, and the chunks
// between.
//
// The state before a tile (decoupled look-back, which Merrill & Garland (2016) describe for sums): as many tiles are on
// their way as the chip holds, and what is known of them grows by one look at memory at a time, so that a look has to
// reach far. Therefore `span` tiles in a row are one span:
//
//   a tile          publishes its map, and joins the maps of its span's earlier tiles;
//   a span's last   publishes the join of all of its span's, and the state after it once that is known;
//   every tile      looks at up to `window` spans before its own: the nearest published state, and the maps since.
//
// What is published is its own flag: memory starts as numbers that nothing publishes (NaN, all bits set), and a number
// that is another one has come. A number is one word, so that it comes whole, and nothing else hangs on it: no fence,
// no order between words, and one latency of memory for a look.
//
// Tiles begin in the order of their tickets, so that those before a tile are done or running. Which state a look finds
// depends on time, what follows from it does not: the state after a span is always the span's map of the state before
// it. The result is deterministic.
#include <numeric>

#include "reduce/arrays_cuda.cuh"

namespace deeppcr::reduce {
namespace {

using cuda::shared_memory;

/// Calls body(i) for all of [begin, end), `together` times before it looks for the end.
template <int together, class Body>
__device__ __forceinline__ void repeat(int begin, int end, const Body& body) {
    int i = begin;
    DEEPPCR_ROLLED
    for (; i + together <= end; i += together) {
        DEEPPCR_UNROLL
        for (int u = 0; u < together; ++u) body(i + u);
    }
    DEEPPCR_ROLLED
    for (; i < end; ++i) body(i);
}

/// x -> M x + b.
template <class A, int K>
struct Map {
    static constexpr int size = K * K + K;
    A m[K * K], b[K];

    /// Of the step x -> M x + b, M row-major or its transpose.
    template <bool transposed>
    __device__ static Map of(const A (&n)[K * K], const A (&c)[K]) {
        Map map;
        for (int i = 0; i < K; ++i) {
            for (int j = 0; j < K; ++j) map.m[i * K + j] = n[transposed ? j * K + i : i * K + j];
            map.b[i] = c[i];
        }
        return map;
    }
    __device__ static Map identity() {
        Map map;
        for (int i = 0; i < K; ++i) {
            map.b[i] = A(0);
            for (int j = 0; j < K; ++j) map.m[i * K + j] = A(i == j);
        }
        return map;
    }
    __device__ static Map read(const A* from) {
        A numbers[size];
        read_numbers<size>(from, numbers);
        Map map;
        for (int e = 0; e < K * K; ++e) map.m[e] = numbers[e];
        for (int i = 0; i < K; ++i) map.b[i] = numbers[K * K + i];
        return map;
    }
    __device__ void write(A* to) const {
        A numbers[size];
        for (int e = 0; e < K * K; ++e) numbers[e] = m[e];
        for (int i = 0; i < K; ++i) numbers[K * K + i] = b[i];
        write_numbers<size>(to, numbers);
    }
    __device__ void apply(A (&x)[K]) const { advance<K, false>(m, b, x); }
    /// Followed by x -> N x + c, N row-major or its transpose: column by column, in place.
    template <bool transposed>
    __device__ void then(const A (&n)[K * K], const A (&c)[K]) {
        DEEPPCR_UNROLL
        for (int j = 0; j < K; ++j) {
            A column[K];
            DEEPPCR_UNROLL
            for (int i = 0; i < K; ++i) {
                column[i] = n[transposed ? i : i * K] * m[j];
                DEEPPCR_UNROLL
                for (int k = 1; k < K; ++k) column[i] += n[transposed ? k * K + i : i * K + k] * m[k * K + j];
            }
            DEEPPCR_UNROLL
            for (int i = 0; i < K; ++i) m[i * K + j] = column[i];
        }
        advance<K, transposed>(n, c, b);
    }
};

/// One of the K rows of a map that lies in shared memory. That of a product needs of the later map its own row only.
template <class A, int K>
struct MapRow {
    A m[K], b;

    __device__ static MapRow read(const A* map, int row) {
        MapRow result;
        read_numbers<K>(map + row * K, result.m);
        result.b = map[K * K + row];
        return result;
    }
    __device__ void write(A* map, int row) const {
        write_numbers<K>(map + row * K, m);
        map[K * K + row] = b;
    }
    /// Preceded by a map.
    __device__ void after(const Map<A, K>& before) {
        A next[K];
        DEEPPCR_UNROLL
        for (int j = 0; j < K; ++j) {
            next[j] = m[0] * before.m[j];
            DEEPPCR_UNROLL
            for (int k = 1; k < K; ++k) next[j] += m[k] * before.m[k * K + j];
        }
        DEEPPCR_UNROLL
        for (int k = 0; k < K; ++k) b += m[k] * before.b[k];
        DEEPPCR_UNROLL
        for (int j = 0; j < K; ++j) m[j] = next[j];
    }
};

/// How the numbers of a row and step lie in shared memory, `pitch` from row to row: blocks of 16 are apart, so that
/// threads that read neighbouring ones as pieces of 16 bytes read different banks.
template <class T, int numbers>
struct Layout {
    static constexpr int size = numbers;
    static constexpr int pitch = numbers == 16 && sizeof(T) >= 4 ? 16 + 16 / int(sizeof(T)) : numbers;
    static constexpr int unit = piece_numbers<T, numbers> * int(sizeof(T));  // bytes that are read at once
    __device__ static int place(int number) { return pitch == size ? number : number / size * pitch + number % size; }
};

/// How a tile's part of an array lies in memory.
struct Lie {
    int bytes;      ///< that can be copied at once
    bool flat;      ///< all of it side by side, else each step of each sequence
    bool reversed;  ///< the last step first
};

/// How the sequences and rows are divided into groups of neighbours, and time into tiles.
struct Tiling {
    int sequences, rows;       ///< of a group, at most
    int row_groups, groups;    ///< per sequence; of all
    int tiles, spans;          ///< of a group
    int slots, chunks, chunk;  ///< rows of a tile; chunks; steps of one
    int steps;                 ///< of a tile
    int span, window;          ///< tiles of a span; spans that are looked at at once
    int threads;
    Lie factor, right_side, solution;
};

/// What tiles tell each other: every number starts as unpublished, the ticket as all bits.
template <class A, int K>
struct Summaries {
    static constexpr int map = Map<A, K>::size, record = (map + K + 3) / 4 * 4;  ///< numbers
    unsigned* ticket;
    A* maps;     ///< [groups, tiles, slots, map]
    A* records;  ///< [groups, spans, slots, map and state]
};

/// The part of a tile that a group has of each array.
struct Group {
    index sequence, row;
    int sequences, rows;
    __device__ int slots() const { return sequences * rows; }
};
template <class T>
__device__ Group group_of(const Arrays<T>& arrays, const Tiling& tiling, unsigned group) {
    Group result;
    result.sequence = index(group / unsigned(tiling.row_groups)) * tiling.sequences;
    result.sequences = int(min(index(tiling.sequences), arrays.batch - result.sequence));
    result.row = index(group % unsigned(tiling.row_groups)) * tiling.rows;
    result.rows = int(min(index(tiling.rows), arrays.rows - result.row));
    return result;
}

/// A tile's part of an array: steps [first, first + steps), of which the first `skipped` are left out.
struct Part {
    Group group;
    index first;
    int steps, skipped, slots;
};

/// Where the tile's part of a flat array begins: the numbers of its first place in shared memory, which is that of the
/// last step where the array is reversed.
template <int size, class T>
__device__ T* beginning(const Strided<T>& array, const Lie& lie, const Part& part) {
    return array.at(part.first + (lie.reversed ? part.steps - 1 : 0), part.group.sequence, part.group.row, size);
}
/// Numbers by which the tile's part is moved in shared memory, so that pieces of 16 bytes there are such in the array.
template <int size, class T>
__device__ int offset_of(const Strided<T>& array, const Lie& lie, const Part& part) {
    if (!lie.flat || lie.bytes < 16) return 0;
    return int(reinterpret_cast<std::uintptr_t>(beginning<size>(array, lie, part)) % 16 / sizeof(T));
}

constexpr int at_once = 4;  ///< pieces that a thread moves before it looks whether there are more

/// Calls move(in shared memory, in the array) for each `numbers` numbers of an array that is not flat, neighbouring
/// threads at neighbouring ones. `reversed`: how the tile lies in shared memory.
template <int numbers, class Shape, class Shared, class T, class Move>
__device__ void for_pieces(Shared* shared, const Strided<T>& array, bool reversed, const Part& part, const Move& move) {
    const Group& group = part.group;
    const int pieces = group.rows * Shape::size / numbers, threads = int(blockDim.x), thread = int(threadIdx.x);
    const int stride = max(threads / pieces, 1);  // steps that the threads take together
    if (thread / pieces >= stride) return;
    const int first = part.skipped + thread / pieces;
    const int places = (reversed ? -stride : stride) * part.slots * Shape::pitch;
    const index advance = stride * array.step;
    for (int sequence = 0; sequence < group.sequences; ++sequence)
        for (int piece = thread % pieces; piece < pieces; piece += threads) {
            const int number =
                ((reversed ? part.steps - 1 - first : first) * part.slots + sequence * group.rows) * Shape::size +
                piece * numbers;
            Shared* place = shared + Shape::place(number);
            T* at = array.at(part.first + first, group.sequence + sequence, group.row, Shape::size) + piece * numbers;
            for (int step = first; step < part.steps; step += at_once * stride) {
                DEEPPCR_UNROLL
                for (int u = 0; u < at_once; ++u) {
                    if (step + u * stride < part.steps) move(place, at);
                    place += places;
                    at += advance;
                }
            }
        }
}

/// Of a flat array, [begin, end) in shared memory: move_piece for what makes up pieces of 16 bytes, move for the rest.
template <class Shape, class Shared, class T, class MovePiece, class Move>
__device__ void for_flat(Shared* shared, T* first, int begin, int end, bool pieces, const MovePiece& move_piece,
                         const Move& move) {
    constexpr int numbers = 16 / int(sizeof(T)), of_warp = 32 * numbers;
    const int threads = int(blockDim.x), thread = int(threadIdx.x);
    const auto address = reinterpret_cast<std::uintptr_t>(first + begin);
    const int head = pieces ? min(end, begin + int((16 - address % 16) % 16 / sizeof(T))) : end;
    const int tail = head + (end - head) / numbers * numbers;
    for (int i = begin + thread; i < head; i += threads) move(shared + Shape::place(i), first + i);
    const int begin_of_thread = head + thread / 32 * at_once * of_warp + thread % 32 * numbers;
    const int stride = threads * at_once * numbers;
    T* at = first + begin_of_thread;
    int place = Shape::place(begin_of_thread);
    for (int left = tail - begin_of_thread; left > 0; left -= stride) {
        if constexpr (std::is_const_v<T>) cuda::keep(at);  // of a store, it would hide that the memory is global
        DEEPPCR_UNROLL
        for (int u = 0; u < at_once; ++u)
            if (left > u * of_warp) move_piece(shared + place + u * Shape::place(of_warp), at + u * of_warp);
        at += stride;
        place += Shape::place(stride);
    }
    for (int i = tail + thread; i < end; i += threads) move(shared + Shape::place(i), first + i);
}

/// Begins to copy what is `bytes` long, or copies it where nothing so short is copied in the background.
template <int bytes, class T>
__device__ __forceinline__ void begin_copy(T* shared, const T* from) {
    if constexpr (bytes >= 4)
        cuda::begin_copy<bytes>(shared, from);
    else
        *shared = *from;
}

template <class Shape, class T>
__device__ void begin_copying(const Strided<const T>& array, const Lie& lie, const Part& part, T* shared) {
    constexpr int one = int(sizeof(T));
    const auto pieces_of = [&]<int bytes>() {
        for_pieces<bytes / one, Shape>(shared, array, lie.reversed, part,
                                       [](T* place, const T* from) { begin_copy<bytes>(place, from); });
    };
    if (lie.flat)
        for_flat<Shape>(
            shared, beginning<Shape::size>(array, lie, part),
            (lie.reversed ? 0 : part.skipped) * part.slots * Shape::size,
            (part.steps - (lie.reversed ? part.skipped : 0)) * part.slots * Shape::size, lie.bytes == 16,
            [](T* place, const T* from) { begin_copy<16>(place, from); },
            [](T* place, const T* from) { begin_copy<one>(place, from); });
    else if (lie.bytes == 16)
        pieces_of.template operator()<16>();
    else if (lie.bytes == 8 && one < 8)
        pieces_of.template operator()<(one < 8 ? 8 : one)>();
    else if (lie.bytes == 4 && one < 4)
        pieces_of.template operator()<(one < 4 ? 4 : one)>();
    else
        pieces_of.template operator()<one>();
}

/// `reversed`: how the tile lies in shared memory.
template <class Shape, class T>
__device__ void store(const Strided<T>& array, const Lie& lie, bool reversed, const Part& part, const T* shared) {
    constexpr int numbers = 16 / int(sizeof(T));
    const auto move_one = [](const T* place, T* to) { *to = *place; };
    const auto move_piece = [](const T* place, T* to) {
        *reinterpret_cast<Piece<T, numbers>*>(to) = *reinterpret_cast<const Piece<T, numbers>*>(place);
    };
    // What was copied to shared memory lies there as it did in its own array, which may be aligned otherwise.
    T* const first = beginning<Shape::size>(array, lie, part);
    const auto apart =
        reinterpret_cast<std::uintptr_t>(shared) - (lie.flat ? reinterpret_cast<std::uintptr_t>(first) : 0);
    const bool pieces = lie.bytes == 16 && apart % 16 == 0;
    if (lie.flat)
        for_flat<Shape>(shared, first, 0, part.steps * part.slots * Shape::size, pieces, move_piece, move_one);
    else if (pieces)
        for_pieces<numbers, Shape>(shared, array, reversed, part, move_piece);
    else
        for_pieces<1, Shape>(shared, array, reversed, part, move_one);
}

/// To `staged`, of shared memory, what has come of `count` numbers since the last call; whether this thread's share is
/// complete. Each thread reads and writes its own share only.
template <class A>
__device__ bool collect(const A* from, A* staged, int count) {
    bool complete = true;
    const int threads = int(blockDim.x);
    for (int i = int(threadIdx.x); i < count; i += at_once * threads) {
        A values[at_once];
        DEEPPCR_UNROLL
        for (int u = 0; u < at_once; ++u)
            if (const int at = i + u * threads; at < count) values[u] = cuda::load_published(from + at);
        DEEPPCR_UNROLL
        for (int u = 0; u < at_once; ++u)
            if (const int at = i + u * threads; at < count) {
                complete = complete && cuda::is_published(values[u]);
                staged[at] = values[u];
            }
    }
    return complete;
}

/// The shared memory of a block.
template <class T, int K>
struct Memory {
    using A = Arithmetic<T>;
    static constexpr int map = Map<A, K>::size;
    T *factor, *right_side;  // [steps, slots, pitch]
    A* maps;                 // [chunks, slots, map]: of a chunk; of a bundle's last: of all chunks up to it
    A* staged;               // of other tiles: [span - 1, slots, map], then [window, slots, record]
    A* before;               // [slots, map]: of the span's tiles before this one
    A* through;              // [slots, map]: and of this one too
    A* carried;              // [slots, K]: the state before the tile

    __host__ __device__ static constexpr index round_up(index bytes) { return (bytes + 15) / 16 * 16; }
    __host__ __device__ static index factor_bytes(const Tiling& tiling) {
        return round_up(index(tiling.steps) * tiling.slots * Layout<T, K * K>::pitch * index(sizeof(T)) + 16);
    }
    __host__ __device__ static index right_bytes(const Tiling& tiling) {
        return round_up(index(tiling.steps) * tiling.slots * K * index(sizeof(T)) + 16);
    }
    __host__ __device__ static int staged_numbers(const Tiling& tiling) {
        const int window = tiling.tiles > 1 ? tiling.window * Summaries<A, K>::record : 0;
        return max((tiling.span - 1) * map, window) * tiling.slots;
    }
    static index bytes(const Tiling& tiling) {
        return factor_bytes(tiling) + right_bytes(tiling) +
               (index(map) * tiling.threads + staged_numbers(tiling) + (2 * map + K) * tiling.slots) * index(sizeof(A));
    }
    __device__ explicit Memory(const Tiling& tiling) {
        unsigned char* const memory = shared_memory<unsigned char>();
        factor = reinterpret_cast<T*>(memory);
        right_side = reinterpret_cast<T*>(memory + factor_bytes(tiling));
        maps = reinterpret_cast<A*>(memory + factor_bytes(tiling) + right_bytes(tiling));
        staged = maps + map * tiling.threads;
        before = staged + staged_numbers(tiling);
        through = before + map * tiling.slots;
        carried = through + map * tiling.slots;
    }
};

/// Joins the maps of the span's tiles before this one, and with this one's, which the last tile of a span publishes.
/// The columns of a product are independent: a thread for each, and one for the sum.
template <class A, int K, class Memory>
__device__ void join_span(const Tiling& tiling, int earlier, const A* published, const Memory& memory, A* whole_span) {
    constexpr int map = Map<A, K>::size;
    const int slots = tiling.slots, count = earlier * map * slots;
    while (!collect(published, memory.staged, count)) cuda::pause();
    __syncthreads();
    for (int i = int(threadIdx.x); i < (K + 1) * slots; i += int(blockDim.x)) {
        const int column = i / slots, slot = i % slots;
        const auto advance_column = [&](const Map<A, K>& tile, A(&x)[K]) {
            A shift[K];
            for (int k = 0; k < K; ++k) shift[k] = column == K ? tile.b[k] : A(0);
            advance<K, false>(tile.m, shift, x);
        };
        const auto entry = [&](int k) { return slot * map + (column == K ? K * K + k : k * K + column); };
        A x[K];
        for (int k = 0; k < K; ++k) x[k] = A(k == column);
        repeat<2>(0, earlier,
                  [&](int t) { advance_column(Map<A, K>::read(memory.staged + (t * slots + slot) * map), x); });
        for (int k = 0; k < K; ++k) memory.before[entry(k)] = x[k];
        if (whole_span == nullptr) continue;
        advance_column(Map<A, K>::read(memory.maps + ((tiling.chunks - 1) * slots + slot) * map), x);
        for (int k = 0; k < K; ++k) {
            memory.through[entry(k)] = x[k];
            cuda::publish(whole_span + entry(k) + slot * (Summaries<A, K>::record - map), x[k]);
        }
    }
    __syncthreads();
}

/// Whether all of `count` numbers had been published when they were staged.
template <int count, class A>
__device__ bool has_come(const A* staged) {
    A numbers[count];
    read_numbers<count>(staged, numbers);
    bool all = true;
    for (const A number : numbers) all = cuda::is_published(number) && all;
    return all;
}

/// The state after the last of `window` spans, to `carried`: the nearest state that has come, and the maps since.
template <class A, int K, class Memory>
__device__ void look_back(const Tiling& tiling, const A* records, int window, const Memory& memory) {
    constexpr int map = Map<A, K>::size, record = Summaries<A, K>::record;
    const int slots = tiling.slots;
    while (true) {
        collect(records, memory.staged, window * record * slots);
        __syncthreads();
        bool waits = false;
        for (int slot = int(threadIdx.x); slot < slots; slot += int(blockDim.x)) {
            const auto record_of = [&](int span) { return memory.staged + (span * slots + slot) * record; };
            int nearest = window - 1;
            while (nearest >= 0 && !has_come<K>(record_of(nearest) + map))
                nearest = has_come<map>(record_of(nearest)) ? nearest - 1 : -1;
            waits = waits || nearest < 0;
            if (nearest < 0) continue;
            A x[K];
            read_numbers<K>(record_of(nearest) + map, x);
            repeat<2>(nearest + 1, window, [&](int span) { Map<A, K>::read(record_of(span)).apply(x); });
            write_numbers<K>(memory.carried + slot * K, x);
        }
        if (__syncthreads_or(int(waits)) == 0) return;
        cuda::pause();
    }
}

/// Threads of a block, and blocks of a multiprocessor, between which the shared memory is divided. Few threads have
/// long chunks: there are fewer maps to join, each of which costs K times a step's operations.
template <class T, int K>
struct TileShape {
    static constexpr int threads = K == 1 ? 256 : 128;
    static constexpr int blocks = sizeof(T) <= 4 ? 3 : 2;
};

template <class T, int K, bool transposed>
__global__ void __launch_bounds__(TileShape<T, K>::threads, TileShape<T, K>::blocks)
    scan_tile(const __grid_constant__ Arrays<T> arrays, const __grid_constant__ Tiling tiling,
              const __grid_constant__ Summaries<Arithmetic<T>, K> summaries) {
    using A = Arithmetic<T>;
    using Factors = Layout<T, K * K>;
    using States = Layout<T, K>;
    const Memory<T, K> memory(tiling);
    const int threads = int(blockDim.x), slots = tiling.slots;

    unsigned number = blockIdx.x;
    if (tiling.tiles > 1) {
        auto* const ticket = reinterpret_cast<unsigned*>(memory.carried);
        if (threadIdx.x == 0) *ticket = atomicAdd(summaries.ticket, 1U) + 1;  // from all bits on
        __syncthreads();
        number = *ticket;
        __syncthreads();
    }
    const int tile = int(number / unsigned(tiling.groups));
    const unsigned group = number % unsigned(tiling.groups);
    Part part{group_of(arrays, tiling, group), index(tile) * tiling.steps, 0, 0, slots};
    part.steps = int(min(index(tiling.steps), arrays.steps - part.first));
    T* const factor = memory.factor + offset_of<Factors::size>(arrays.factor, tiling.factor, part);
    T* const right_side = memory.right_side + offset_of<States::size>(arrays.right_side, tiling.right_side, part);
    begin_copying<States>(arrays.right_side, tiling.right_side, part, right_side);
    if (tile == 0 && arrays.initial.data == nullptr) {
        // Without an initial state the first step has no M: what lies there in memory is not to be read.
        const int place = (tiling.factor.reversed ? part.steps - 1 : 0) * slots * Factors::size;
        for (int i = int(threadIdx.x); i < slots * Factors::size; i += threads) factor[Factors::place(place + i)] = T();
        part.skipped = 1;
    }
    begin_copying<Factors>(arrays.factor, tiling.factor, part, factor);
    cuda::wait_for_copies();
    __syncthreads();

    const int chunk = int(threadIdx.x) / slots, slot = int(threadIdx.x) % slots;
    const bool present = chunk < tiling.chunks, owns = present && slot < part.group.slots();
    const int begin = min(chunk * tiling.chunk, part.steps);
    const int count = owns ? min(tiling.chunk, part.steps - begin) : 0;
    const T* const my_factor =
        factor + ((tiling.factor.reversed ? part.steps - 1 - begin : begin) * slots + slot) * Factors::pitch;
    T* const my_right_side =
        right_side + ((tiling.right_side.reversed ? part.steps - 1 - begin : begin) * slots + slot) * K;
    const int factor_step = (tiling.factor.reversed ? -slots : slots) * Factors::pitch;
    const int right_step = (tiling.right_side.reversed ? -slots : slots) * K;
    const auto read_step = [&](int s, A(&m)[K * K], A(&b)[K]) {
        read_numbers<K * K>(my_factor + s * factor_step, m);
        read_numbers<K>(my_right_side + s * right_step, b);
    };

    // 1. the chunk's map
    auto whole = Map<A, K>::identity();
    if (count > 0) {
        A m[K * K], b[K];
        read_step(0, m, b);
        whole = Map<A, K>::template of<transposed>(m, b);
        constexpr int together = K == 1 ? 16 : K == 4 ? 2 : 4;
        repeat<together>(1, count, [&](int s) {
            read_step(s, m, b);
            whole.template then<transposed>(m, b);
        });
    }

    // 2. joined: the threads of a bundle have a row each of its product; the last bundle has what chunks are left over
    constexpr int map = Map<A, K>::size, record = Summaries<A, K>::record;
    const int bundles = max(tiling.chunks / K, 1), bundle = min(chunk / K, bundles - 1), in_bundle = chunk - bundle * K;
    const int last = bundle + 1 < bundles ? bundle * K + K - 1 : tiling.chunks - 1;
    const auto map_of = [&](int of_chunk) { return memory.maps + (of_chunk * slots + slot) * map; };
    if (present) whole.write(map_of(chunk));
    __syncthreads();
    MapRow<A, K> joined;
    for (int row = in_bundle; present && row < K; row += tiling.chunks) {  // several, where chunks are fewer than K
        joined = MapRow<A, K>::read(map_of(last), row);
        DEEPPCR_ROLLED
        for (int earlier = last - 1; earlier >= bundle * K; --earlier) joined.after(Map<A, K>::read(map_of(earlier)));
        joined.write(map_of(last), row);
    }
    __syncthreads();
    for (int distance = 1; distance < bundles; distance *= 2) {
        const bool joins = present && in_bundle < K && bundle >= distance;
        if (joins) joined.after(Map<A, K>::read(map_of((bundle - distance + 1) * K - 1)));
        __syncthreads();
        if (joins) joined.write(map_of(last), in_bundle);
        __syncthreads();
    }

    // 3. the state before the tile
    const int span = tile / tiling.span, in_span = tile % tiling.span;
    const bool last_tile = tile + 1 == tiling.tiles, ends_span = in_span + 1 == tiling.span && !last_tile;
    A* const maps = summaries.maps + (index(group) * tiling.tiles + tile) * (map * slots);
    A* const own_record = summaries.records + (index(group) * tiling.spans + span) * (record * slots);
    if (!ends_span && !last_tile)
        for (int i = int(threadIdx.x); i < slots * map; i += threads)
            cuda::publish(maps + i, memory.maps[(tiling.chunks - 1) * slots * map + i]);
    if (in_span > 0 || ends_span) {
        __syncthreads();
        join_span<A, K>(tiling, in_span, maps - in_span * (map * slots), memory, ends_span ? own_record : nullptr);
    }
    if (span > 0) {
        const int window = min(tiling.window, span);
        look_back<A, K>(tiling, own_record - window * (record * slots), window, memory);
    } else if (present && chunk == 0) {
        for (int k = 0; k < K; ++k)
            memory.carried[slot * K + k] =
                owns && arrays.initial.data != nullptr
                    ? cuda::widen(arrays.initial.at(0, part.group.sequence + slot / part.group.rows,
                                                    part.group.row + slot % part.group.rows, K)[k])
                    : A(0);
    }
    __syncthreads();
    A x[K];
    read_numbers<K>(memory.carried + slot * K, x);
    if (ends_span && present && chunk == 0) {
        A state[K];
        for (int k = 0; k < K; ++k) state[k] = x[k];
        Map<A, K>::read(memory.through + slot * map).apply(state);
        for (int k = 0; k < K; ++k) cuda::publish(own_record + slot * record + map + k, state[k]);
    }

    // 4. the chunk from its first state
    if (in_span > 0) Map<A, K>::read(memory.before + slot * map).apply(x);
    DEEPPCR_ROLLED
    for (int earlier = max(bundle * K - 1, 0); present && earlier < chunk; ++earlier)
        Map<A, K>::read(map_of(earlier)).apply(x);
    const auto replay = [&]<int steps>(int first) {  // all are read before one is written
        A m[steps][K * K], b[steps][K];
        DEEPPCR_UNROLL
        for (int u = 0; u < steps; ++u) read_step(first + u, m[u], b[u]);
        DEEPPCR_UNROLL
        for (int u = 0; u < steps; ++u) {
            advance<K, transposed>(m[u], b[u], x);
            write_numbers<K>(my_right_side + (first + u) * right_step, x);
        }
    };
    constexpr int ahead = K == 1 ? 4 : 2;
    int step = 0;
    for (; step + ahead <= count; step += ahead) replay.template operator()<ahead>(step);
    DEEPPCR_ROLLED
    for (; step < count; ++step) replay.template operator()<1>(step);
    __syncthreads();
    part.skipped = 0;
    store<States>(arrays.solution, tiling.solution, tiling.right_side.reversed, part, right_side);
}

/// How an array of `numbers` per row lies for tiles of these groups. Where a tile is not flat, the widest copy that
/// every step of every group allows.
template <int numbers, class T, class U>
Lie lie_of(const Strided<U>& array, const Arrays<T>& arrays, const Tiling& tiling, bool may_be_flat = true) {
    constexpr index one = sizeof(T), unit = Layout<T, numbers>::unit;
    const index address = index(reinterpret_cast<std::uintptr_t>(array.data) % 16);
    const bool one_batch = arrays.batch == 1;
    Lie lie{};
    lie.reversed = array.step < 0;
    lie.flat = may_be_flat && tiling.row_groups == 1 && tiling.sequences == 1 &&
               (arrays.steps == 1 || std::abs(array.step) == arrays.rows * numbers);
    if (lie.flat) {
        const bool aligned = address % unit == 0 && (one_batch || array.batch * one % unit == 0);
        lie.bytes = aligned ? 16 : int(one);
        return lie;
    }
    lie.bytes = int(one);
    for (const index bytes : {index(4), index(8), index(16)}) {
        const auto fits = [&](index count) { return count * one % bytes == 0; };
        if (bytes > one && address % bytes == 0 && (arrays.steps == 1 || fits(array.step)) &&
            (one_batch || fits(array.batch)) && fits(arrays.rows * numbers) && fits(tiling.rows * numbers))
            lie.bytes = int(bytes);
    }
    return lie;
}

/// The tiles of a group of rows are many and far on their way only where the groups are few: spans only as long as
/// what the chip holds of one group needs.
int tiles_of_a_span(int groups, int multiprocessors) {
    int span = 1;
    while (span < 32 && 2 * index(span) * span * groups < 3 * index(multiprocessors)) span *= 2;
    return span;
}

void require_fewer(index tiles) {
    if (tiles > std::numeric_limits<int>::max())
        throw InvalidArgument("system", "fewer than 2^31 tiles", std::to_string(tiles));
}

template <class T, int K>
Tiling tiling_of(const Arrays<T>& arrays) {
    using Tile = TileShape<T, K>;
    constexpr index line = 128;                                                  // bytes
    constexpr index fewest_rows = (line + K * sizeof(T) - 1) / (K * sizeof(T));  // of a group, where there are more
    Tiling tiling{};
    // Rows of several sequences share a tile, but where the steps of each are nearer to each other than those.
    const bool apart = arrays.batch == 1 || std::abs(arrays.solution.step) < std::abs(arrays.solution.batch);
    const auto parts = [](index count, index part) { return (count + part - 1) / part; };
    index rows = parts(arrays.rows, std::max<index>(1, arrays.rows / fewest_rows));
    if (rows < arrays.rows) {
        constexpr index together = 16 / std::gcd(16, K * int(sizeof(T)));  // whose numbers make pieces of 16 bytes
        rows = parts(rows, together) * together;
    }
    const index row_groups = parts(arrays.rows, rows);
    const index sequences = apart ? 1 : std::clamp<index>(fewest_rows / rows, 1, arrays.batch);
    const index groups = row_groups * parts(arrays.batch, sequences);
    require_fewer(groups);
    tiling.rows = int(rows);
    tiling.row_groups = int(row_groups);
    tiling.sequences = int(sequences);
    tiling.groups = int(groups);
    tiling.slots = int(sequences * rows);
    tiling.span = tiles_of_a_span(tiling.groups, device::multiprocessors());
    tiling.window = std::max(tiling.span, 4);
    tiling.factor = lie_of<K * K>(arrays.factor, arrays, tiling);
    tiling.right_side = lie_of<K>(arrays.right_side, arrays, tiling);
    tiling.solution =
        lie_of<K>(arrays.solution, arrays, tiling, (arrays.solution.step < 0) == tiling.right_side.reversed);

    // The longest spans, and then the longest chunk, whose tile fits; odd, so that threads whose chunks follow each
    // other in memory read different banks of shared memory.
    const index shared = shared_bytes_of_each(Tile::blocks);
    const auto with = [&](int threads, int chunk) {
        tiling.chunk = chunk;
        tiling.chunks = int(std::min<index>(threads / tiling.slots, (arrays.steps + chunk - 1) / chunk));
        tiling.threads = (tiling.chunks * tiling.slots + 31) / 32 * 32;
        // A multiple of 16 bytes of each array, so that all tiles lie as the first does.
        const int steps = tiling.chunks * chunk;
        tiling.steps = steps >= arrays.steps ? int(arrays.steps) : steps >= 8 ? steps / 8 * 8 : steps;
        require_fewer(parts(arrays.steps, tiling.steps) * groups);
        tiling.tiles = int(parts(arrays.steps, tiling.steps));
        tiling.spans = (tiling.tiles + tiling.span - 1) / tiling.span;
        return Memory<T, K>::bytes(tiling) <= shared;
    };
    constexpr int fewest_threads = std::max(64, 2 * int(fewest_rows));  // a tile has fewer rows
    while (tiling.span > 1 && !with(fewest_threads, 3)) {
        tiling.span /= 2;
        tiling.window = std::max(tiling.span, 4);
    }
    int threads = Tile::threads, chunk = 1;
    while (threads > fewest_threads && !with(threads, 3)) threads /= 2;
    while (chunk < 63 && with(threads, chunk + 2)) chunk += 2;
    if (!with(threads, chunk)) throw Error("a multiprocessor has too little shared memory");
    return tiling;
}

/// Sequences that lie side by side in all arrays are rows of one sequence.
template <class T, int K>
Arrays<T> joined(Arrays<T> arrays) {
    const auto side_by_side = [&](const auto& array, index size) {
        return array.data == nullptr || array.batch == arrays.rows * size;
    };
    if (side_by_side(arrays.factor, K * K) && side_by_side(arrays.right_side, K) && side_by_side(arrays.initial, K) &&
        side_by_side(arrays.solution, K)) {
        arrays.rows *= arrays.batch;
        arrays.batch = 1;
    }
    return arrays;
}

template <class T, int K>
void scan(const OrderedSystem<T>& system, CUstream_st* stream, Workspace& workspace) {
    using A = Arithmetic<T>;
    const Arrays<T> arrays = joined<T, K>(arrays_of(system));
    const Tiling tiling = tiling_of<T, K>(arrays);
    const index blocks = index(tiling.tiles) * tiling.groups;
    const Workspace::Scope scope(workspace);
    Summaries<A, K> summaries{};
    if (tiling.tiles > 1) {
        const index maps = blocks * summaries.map * tiling.slots;
        const index records = index(tiling.groups) * tiling.spans * summaries.record * tiling.slots;
        summaries.maps = workspace.take<A>(maps + records + 1);
        summaries.records = summaries.maps + maps;
        summaries.ticket = reinterpret_cast<unsigned*>(summaries.records + records);
        device::fill_bytes(summaries.maps, 0xFF, (maps + records + 1) * index(sizeof(A)), stream);
    }
    cuda::launch(
        {dim3(unsigned(blocks)), dim3(unsigned(tiling.threads)), std::size_t(Memory<T, K>::bytes(tiling)), stream},
        system.transposed ? scan_tile<T, K, true> : scan_tile<T, K, false>, arrays, tiling, summaries);
}

}  // namespace

template <class T>
void scan_tiles(const OrderedSystem<T>& system, CUstream_st* stream, Workspace& workspace) {
    with_block(system.block(), [&]<int K>() { scan<T, K>(system, stream, workspace); });
}

template void scan_tiles(const OrderedSystem<float>&, CUstream_st*, Workspace&);
template void scan_tiles(const OrderedSystem<double>&, CUstream_st*, Workspace&);
template void scan_tiles(const OrderedSystem<bfloat16>&, CUstream_st*, Workspace&);
template void scan_tiles(const OrderedSystem<float16>&, CUstream_st*, Workspace&);

}  // namespace deeppcr::reduce
