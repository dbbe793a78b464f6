// The loops over time that a Cell is compiled into for GPUs, from the same functor as for processors. In one .cu file:
//
//     #include <deeppcr/cell.cuh>
//     DEEPPCR_CELL_ON_GPU(LeakyTanh);   // its step must be constexpr; nvcc --expt-relaxed-constexpr
//
// A thread runs one group of one chunk of steps (see cell_device.hpp): a channel, or two where numbers have 16 bits.
// The threads of a warp have neighbouring groups, so that inputs and states are read and written in whole lines, as
// they are, without a transposition. What the next `ahead` steps need is on its way, a slot of registers for each,
// while those at hand are computed with; states, products of Jacobians, adjoints and parameters stay in registers.
// Bytes per step and channel: G numbers read and K written; backward, 2 G + 2 K.
//
// Numbers of 16 bits are computed with as floats, and the state is carried from step to step as a float, between chunks
// too: what is stored is rounded, what goes on is not. A repair compares stored numbers.
//
// shoot_tiles: a block takes the steps of `tile_groups` neighbouring groups tile after tile. It copies the inputs of a
// tile to shared memory, once, and each of its threads has one chunk of the tile:
//
//     groups ->                            all chunks run from guesses, carrying the products of their Jacobians;
//     [chunk 0: exact carry | 0 | 0 ...]   starts <- Newton's update, a short linear recurrence over the chunks;
//     [chunk 1              | 1 | 1 ...]   again, until no start moves by more than what its square leaves below the
//     [  ...                           ]   tolerance; then all write their states. A chunk whose first state is not
//                                          f(end of the one before it), within the tolerance, is repaired, and so on
//                                          from chunk to chunk: what leaves the tile is right, whatever the guesses.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include <deeppcr/cell.hpp>
#include <deeppcr/cell_device.hpp>
#include <deeppcr/launch.cuh>

namespace deeppcr::cell {

constexpr int steps_per_sum = 64;          // of parameter gradients in A, before they are added up in double
constexpr int cell_threads = 128;          // of a block at most: no thread knows of any other but those of its warp
constexpr std::size_t tile_bytes = 73728;  // of its shared memory: three blocks on a multiprocessor of 227 KB

/// `n` neighbouring numbers, moved together where their address allows it.
template <class T, int n>
struct alignas(std::min<std::size_t>(16, (n * sizeof(T)) & -(n * sizeof(T)))) Pack {
    T at[n];
};

/// The group of a chunk that this thread runs.
template <class T>
struct Here {
    index group, channel, part, chunk, sequence, first, last, begins, ends;
    int there;  ///< channels of it
    bool exists;

    __device__ Here(const DeviceChunks<T>& all, index thread, int channels_per_group) {
        const index rows = all.part_count * all.groups;
        chunk = thread / rows;
        set_row(all, thread % rows, channels_per_group);
        set_chunk(all, chunk);
        exists = chunk < all.count && first < last;
    }
    __device__ void set_row(const DeviceChunks<T>& all, index row, int channels_per_group) {
        part = row / all.groups;
        group = row % all.groups;
        channel = group * channels_per_group;
        there = int(all.channels - channel < channels_per_group ? all.channels - channel : channels_per_group);
        const SequencePart whole = all.parts != nullptr ? all.parts[part] : SequencePart{part, 0, all.steps};
        sequence = whole.sequence;
        begins = whole.first;
        ends = whole.last;
    }
    __device__ void set_chunk(const DeviceChunks<T>& all, index number) {
        chunk = number;
        first = begins + chunk * all.length;
        last = first + all.length < ends ? first + all.length : ends;
    }
    /// Where this group's entry of [count, parts, C, size] begins; `distance` chunks further on.
    __device__ index boundary(const DeviceChunks<T>& all, int size, index distance = 0) const {
        return (((chunk + distance) * all.part_count + part) * all.channels + channel) * size;
    }
    /// Of [count, parts, groups].
    __device__ index flag(const DeviceChunks<T>& all, index distance = 0) const {
        return ((chunk + distance) * all.part_count + part) * all.groups + group;
    }
    __device__ bool has_next() const { return last < ends; }
};

__device__ inline unsigned long long bits_of(double value) {
    unsigned long long bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/// Counts the warps of which a lane says so. All lanes call.
__device__ inline void count_warp(unsigned* counter, bool value) {
    const bool any = __any_sync(~0U, value) != 0;
    if (any && threadIdx.x % 32 == 0) atomicAdd(counter, 1U);
}

/// whole: all addresses are such that the numbers of a group of two channels can be moved together.
template <class Cell, class T, bool whole = true>
struct OnGpu {
    using A = Arithmetic<T>;
    using Chunks = DeviceChunks<T>;
    using LaneOfCell = Lane<Cell, A, T>;
    static constexpr int K = Cell::states, G = Cell::inputs, P = Cell::parameters;
    static constexpr int V = is_stored_in_16_bits<T> ? 2 : 1;  // channels per group
    using InputPack = Pack<T, V>;
    using StatePack = Pack<T, V * K>;
    /// Of a group's channels.
    using State = std::array<std::array<A, K>, V>;

    // --- memory

    /// Whether a group of `there` channels has channel v.
    __device__ __forceinline__ static bool exists(int v, int there) { return V == 1 || whole || v < there; }
    /// V * per neighbouring numbers; where a channel does not exist, those of the one before it.
    template <int per>
    __device__ __forceinline__ static Pack<T, V * per> load(const Chunks& all, const T* from, int there) {
        if constexpr (V * per == 1) {
            return {*from};
        } else {
            if (V == 1 ? all.packed : whole) return *reinterpret_cast<const Pack<T, V * per>*>(from);
            Pack<T, V * per> pack;
            for (int e = 0; e < V * per; ++e) pack.at[e] = from[exists(e / per, there) ? e : e - per];
            return pack;
        }
    }
    /// Of inputs, which nothing writes meanwhile: no store holds such a read up.
    template <class Held>
    __device__ __forceinline__ static void load_constant(const Chunks& all, const T* from, int there, Held& held) {
        if constexpr (V == 1)
            held.put({__ldg(from)});
        else if constexpr (whole)
            held.held = {__ldg(reinterpret_cast<const unsigned*>(from))};
        else
            held.put(load<1>(all, from, there));
    }
    template <int per>
    __device__ __forceinline__ static void store(const Chunks& all, T* to, int there, const Pack<T, V * per>& pack) {
        if constexpr (V * per == 1) {
            *to = pack.at[0];
        } else if (V == 1 ? all.packed : whole) {
            *reinterpret_cast<Pack<T, V * per>*>(to) = pack;
        } else {
            for (int e = 0; e < V * per; ++e)
                if (exists(e / per, there)) to[e] = pack.at[e];
        }
    }

    /// A group's entry of a boundary array.
    __device__ static State read(const A* from, int there) {
        State x;
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int k = 0; k < K; ++k)
                x[std::size_t(v)][std::size_t(k)] = from[(exists(v, there) ? v : v - 1) * K + k];
        return x;
    }
    __device__ static void write(A* to, int there, const State& x) {
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int k = 0; k < K; ++k)
                if (exists(v, there)) to[v * K + k] = x[std::size_t(v)][std::size_t(k)];
    }
    __device__ __forceinline__ static State widen(const StatePack& pack) {
        A numbers[V * K];
        cuda::widen<V * K>(pack.at, numbers);
        State x;
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int k = 0; k < K; ++k) x[std::size_t(v)][std::size_t(k)] = numbers[v * K + k];
        return x;
    }
    __device__ __forceinline__ static StatePack narrow(const State& x) {
        A numbers[V * K];
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int k = 0; k < K; ++k) numbers[v * K + k] = x[std::size_t(v)][std::size_t(k)];
        StatePack pack;
        cuda::narrow<V * K>(numbers, pack.at);
        return pack;
    }
    __device__ static State zeros() {
        State x;
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int k = 0; k < K; ++k) x[std::size_t(v)][std::size_t(k)] = A(0);
        return x;
    }

    __device__ static T* state_at(const Chunks& all, const Here<T>& here, index step) {
        return all.trajectory + step * all.trajectory_step + here.sequence * all.trajectory_batch + here.channel * K;
    }
    __device__ static T* input_gradient_at(const Chunks& all, const Here<T>& here, index step) {
        return all.input_gradient + step * all.input_gradient_step + here.sequence * all.input_gradient_batch +
               here.channel;
    }
    __device__ static State initial_state(const Chunks& all, const Here<T>& here) {
        if (all.initial == nullptr) return zeros();
        return widen(load<K>(all, all.initial + here.part * all.initial_part + here.channel * K, here.there));
    }
    __device__ static State start_state(const Chunks& all, const Here<T>& here) {
        if (all.starts != nullptr) return read(all.starts + here.boundary(all, K), here.there);
        return initial_state(all, here);
    }

    /// What a step reads.
    struct Item {
        InputPack u[G];
        StatePack x, gradient;
        InputPack input_gradient[G];
    };

    /// Neighbouring numbers, in words of 32 bits where they make some: numbers of 16 bits that are moved one by one
    /// would each have a register of their own.
    template <class Numbers>
    struct Held {
        static constexpr bool in_words = sizeof(T) == 2 && sizeof(Numbers) % 4 == 0;
        struct Words {
            unsigned word[(sizeof(Numbers) + 3) / 4];
        };
        std::conditional_t<in_words, Words, Numbers> held;

        __device__ __forceinline__ void put(const Numbers& numbers) {
            memcpy(static_cast<void*>(&held), &numbers, sizeof numbers);
        }
        __device__ __forceinline__ Numbers get() const {
            Numbers numbers;
            memcpy(static_cast<void*>(&numbers), &held, sizeof numbers);
            return numbers;
        }
    };

    /// Reads of successive steps: a batch of `ahead` is on its way while the one before it is passed. backward: from
    /// the last step to the first.
    //
    // The reads of a batch wait together, on one of the six counters that a warp has for what takes its time; reads
    // that were issued step after step would each wait for the newest.
    template <bool with_states, bool with_gradient, bool with_input_gradient, bool backward>
    struct Stream {
        static constexpr int numbers =
            (G * (with_input_gradient ? 2 : 1) + (with_states ? K : 0) + (with_gradient ? K : 0)) *
            (sizeof(A) > 4 ? 2 : 1);
        static constexpr int ahead = numbers <= 1 ? 16 : numbers <= 4 ? 8 : numbers <= 12 ? 4 : 2;
        const Chunks& all;
        const int there;

        /// A step's numbers as they are held until its turn.
        struct Slot {
            Held<InputPack> u[G];
            Held<StatePack> x, gradient;
            Held<InputPack> input_gradient[G];

            __device__ __forceinline__ Item get() const {
                Item item;
                for (int g = 0; g < G; ++g) item.u[g] = u[g].get();
                if (with_states) item.x = x.get();
                if (with_gradient) item.gradient = gradient.get();
                if (with_input_gradient)
                    for (int g = 0; g < G; ++g) item.input_gradient[g] = input_gradient[g].get();
                return item;
            }
        };

        /// An array of which each step has its place: the next one's, and the bytes from one to the next.
        struct Places {
            const unsigned char* next = nullptr;
            index step = 0;

            Places() = default;
            __device__ __forceinline__ Places(const T* first, index distance)
                : next(reinterpret_cast<const unsigned char*>(first)),
                  step((backward ? -distance : distance) * index(sizeof(T))) {
                cuda::keep(step);
            }
            __device__ __forceinline__ const T* at(index bytes = 0) const {
                return reinterpret_cast<const T*>(next + bytes);
            }
        };
        Places inputs, states, gradients, input_gradients;
        index apart;  ///< bytes from one input's numbers to the next one's

        /// From step `first` on; states and gradients are those of `states_from`.
        __device__ __forceinline__ Stream(const Chunks& chunks, const Here<T>& here, index first, index states_from)
            : all(chunks), there(here.there), apart(chunks.channels * index(sizeof(T))) {
            cuda::keep(apart);
            inputs = Places(all.inputs + first * all.input_step + here.sequence * all.input_batch + here.channel,
                            all.input_step);
            if (with_states) states = Places(state_at(all, here, states_from), all.trajectory_step);
            if (with_gradient)
                gradients = Places(all.output_gradient + first * all.gradient_step +
                                       here.sequence * all.gradient_batch + here.channel * K,
                                   all.gradient_step);
            if (with_input_gradient)
                input_gradients = Places(input_gradient_at(all, here, first), all.input_gradient_step);
        }
        /// The next step's numbers, where there is one.
        __device__ __forceinline__ void load(bool wanted, Slot& slot) {
            if (wanted) {
                for (int g = 0; g < G; ++g) load_constant(all, inputs.at(g * apart), there, slot.u[g]);
                if (with_states) slot.x.put(OnGpu::load<K>(all, states.at(), there));
                if (with_gradient) slot.gradient.put(OnGpu::load<K>(all, gradients.at(), there));
                if (with_input_gradient)
                    for (int g = 0; g < G; ++g)
                        slot.input_gradient[g].put(OnGpu::load<1>(all, input_gradients.at(g * apart), there));
            }
            inputs.next += inputs.step;
            if (with_states) states.next += states.step;
            if (with_gradient) gradients.next += gradients.step;
            if (with_input_gradient) input_gradients.next += input_gradients.step;
        }
        template <int... slots>
        __device__ __forceinline__ void load_batch(Slot (&batch)[ahead], int count,
                                                   std::integer_sequence<int, slots...>) {
            (load(slots < count, batch[slots]), ...);
        }
        template <int... slots, class Visit>
        __device__ __forceinline__ static bool pass(const Slot (&batch)[ahead], int count, const Visit& visit,
                                                    std::integer_sequence<int, slots...>) {
            return ((slots < count && visit(batch[slots].get())) && ...);
        }

        /// Calls visit(item) for `count` steps, fewer than 2^31; stops where it says false.
        template <class Visit>
        __device__ __forceinline__ void run(index count, const Visit& visit) {
            constexpr auto slots = std::make_integer_sequence<int, ahead>();
            Slot now[ahead], next[ahead];
            load_batch(now, int(count), slots);
            DEEPPCR_ROLLED
            for (int left = int(count); left > 0; left -= ahead) {
                load_batch(next, left - ahead, slots);
                if (!pass(now, left, visit, slots)) return;
                DEEPPCR_UNROLL
                for (int i = 0; i < ahead; ++i) now[i] = next[i];
            }
        }
    };
    using Inputs = Stream<false, false, false, false>;

    // --- steps

    /// The group's channels, each with its parameters.
    struct Group {
        LaneOfCell lane[V];

        __device__ __forceinline__ Group(const Chunks& all, const Here<T>& here) {
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v)
                for (int q = 0; q < P; ++q)
                    lane[v].p[std::size_t(q)] =
                        all.parameters[q * all.channels + here.channel + (exists(v, here.there) ? v : v - 1)];
        }
        __device__ __forceinline__ void set(const State& x) {
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v) lane[v].x = x[std::size_t(v)];
        }
        __device__ __forceinline__ State state() const {
            State x;
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v) x[std::size_t(v)] = lane[v].x;
            return x;
        }
        __device__ __forceinline__ void step(const InputPack (&u)[G]) {
            set_inputs(u);
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v) lane[v].x = lane[v].step();
        }
        __device__ __forceinline__ void set_inputs(const InputPack (&u)[G]) {
            DEEPPCR_UNROLL
            for (int g = 0; g < G; ++g) {
                A numbers[V];
                cuda::widen<V>(u[g].at, numbers);
                DEEPPCR_UNROLL
                for (int v = 0; v < V; ++v) lane[v].u[std::size_t(g)] = numbers[v];
            }
        }
        /// A step, and product <- J product: the columns of the product are the directions.
        __device__ __forceinline__ void step(const InputPack (&u)[G], A (&product)[V][K * K]) {
            set_inputs(u);
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v) {
                std::array<Duals<A, K, T>, K> x;
                std::array<Duals<A, K, T>, G> us;
                std::array<Duals<A, K, T>, P> p;
                for (int k = 0; k < K; ++k) {
                    x[std::size_t(k)].value = lane[v].x[std::size_t(k)];
                    for (int m = 0; m < K; ++m) {
                        x[std::size_t(k)].derivative[m] = product[v][k * K + m];
                        x[std::size_t(k)].constant[m] = false;
                    }
                }
                for (int g = 0; g < G; ++g) us[std::size_t(g)] = lane[v].u[std::size_t(g)];
                for (int q = 0; q < P; ++q) p[std::size_t(q)] = lane[v].p[std::size_t(q)];
                const std::array<Duals<A, K, T>, K> next = Cell::step(x, us, p);
                for (int k = 0; k < K; ++k) {
                    lane[v].x[std::size_t(k)] = next[std::size_t(k)].value;
                    for (int m = 0; m < K; ++m) product[v][k * K + m] = next[std::size_t(k)].derivative[m];
                }
            }
        }
        /// The derivatives of channel v's step with respect to x, u and p in a row, times `adjoint`, summed over the
        /// states.
        __device__ __forceinline__ void sensitivities(int v, const std::array<A, K>& adjoint,
                                                      A (&result)[K + G + P]) const {
            using D = Duals<A, K + G + P, T>;
            std::array<D, K> x;
            std::array<D, G> u;
            std::array<D, P> p;
            for (int k = 0; k < K; ++k) x[std::size_t(k)] = D::along(lane[v].x[std::size_t(k)], k);
            for (int g = 0; g < G; ++g) u[std::size_t(g)] = D::along(lane[v].u[std::size_t(g)], K + g);
            for (int q = 0; q < P; ++q) p[std::size_t(q)] = D::along(lane[v].p[std::size_t(q)], K + G + q);
            const std::array<D, K> next = Cell::step(x, u, p);
            for (int i = 0; i < K + G + P; ++i) {
                result[i] = A(0);
                for (int k = 0; k < K; ++k)
                    if (!next[std::size_t(k)].constant[i])
                        result[i] += adjoint[std::size_t(k)] * next[std::size_t(k)].derivative[i];
            }
        }
    };

    /// Whether all states seen are finite, as they are stored: what is finite where it is computed may overflow where
    /// it is rounded to 16 bits.
    class Finite {
    public:
        __device__ __forceinline__ void see(const StatePack& stored) {
            DEEPPCR_UNROLL
            for (int e = 0; e < V * K; e += V) cuda::see(stored.at + e, zeros_);
        }
        __device__ __forceinline__ bool all() const { return cuda::all_zero(zeros_); }

    private:
        cuda::Zeros<T> zeros_{};
    };
    /// Where the first one is, collect looks up afterwards: this state may yet be replaced.
    __device__ static void note_non_finite(const Chunks& all, const Finite& states) {
        if (!states.all() && all.run != nullptr) atomicOr(&all.run->non_finite, 1U);
    }

    /// Whether every channel's new state agrees with its old one, both as they are stored. False for NaN, and where the
    /// difference is infinite. Raises the residuals where it agrees.
    __device__ __forceinline__ static bool meet(const Chunks& all, const StatePack& old, const StatePack& now,
                                                A& residual, A& relative) {
        const State olds = widen(old), news = widen(now);
        A most = A(0), fraction = A(0);
        bool all_meet = true;
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v) {
            A apart = A(0), size = A(0);
            for (int k = 0; k < K; ++k) {
                const A before = olds[std::size_t(v)][std::size_t(k)], after = news[std::size_t(v)][std::size_t(k)];
                apart = scalar_functions::larger_or_nan(apart, scalar_functions::magnitude(after - before));
                size = max(size, scalar_functions::magnitude(before));
            }
            const A allowed = A(all.absolute_tolerance) + A(all.relative_tolerance) * size;
            all_meet = all_meet && apart <= allowed && apart < std::numeric_limits<A>::infinity();
            most = max(most, apart);
            if (apart > A(0)) fraction = max(fraction, apart / allowed);
        }
        if (all_meet) {
            residual = max(residual, most);
            relative = max(relative, fraction);
        }
        return all_meet;
    }
    __device__ __forceinline__ static A max(A a, A b) { return b > a ? b : a; }

    // --- kernels

    __device__ static void advance(const Chunks& all, index thread) {
        const Here<T> here(all, thread, V);
        if (!here.exists) return;
        Group group(all, here);
        group.set(start_state(all, here));
        Finite finite;
        const bool kept = all.trajectory != nullptr;
        T* to = kept ? state_at(all, here, here.first) : nullptr;
        const index step = kept ? all.trajectory_step : 0;
        Inputs stream(all, here, here.first, here.first);
        stream.run(here.last - here.first, [&](const Item& item) {
            group.step(item.u);
            const StatePack stored = narrow(group.state());
            if (kept) store<K>(all, to, here.there, stored);
            to += step;
            finite.see(stored);
            return true;
        });
        if (all.ends != nullptr) write(all.ends + here.boundary(all, K), here.there, group.state());
        if (kept) note_non_finite(all, finite);
    }

    __device__ static void multiply(const Chunks& all, index thread) {
        if (all.round > 0 && all.run->shooting[all.round - 1] == 0) return;
        const Here<T> here(all, thread, V);
        if (here.chunk >= all.count) return;
        State end = zeros();
        A product[V][K * K];
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int e = 0; e < K * K; ++e) product[v][e] = A(here.exists && e / K == e % K);
        if (here.exists) {
            Group group(all, here);
            group.set(start_state(all, here));
            Inputs stream(all, here, here.first, here.first);
            stream.run(here.last - here.first, [&](const Item& item) {
                group.step(item.u, product);
                return true;
            });
            end = group.state();
        }
        write(all.ends + here.boundary(all, K), here.there, end);
        A* const products = all.products + here.boundary(all, K * K);
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int e = 0; e < K * K; ++e)
                if (exists(v, here.there)) products[v * K * K + e] = product[v][e];
    }

    __device__ static void repair(const Chunks& all, index thread) {
        if (all.round > 0 && all.run->pending[all.round - 1] == 0) return;
        const Here<T> here(all, thread, V);
        const bool asked =
            here.exists && here.chunk > 0 && (all.old_changed == nullptr || all.old_changed[here.flag(all, -1)] != 0);
        A residual = A(0), relative = A(0);
        unsigned repeated = 0;
        bool met = true;
        if (asked) {
            Group group(all, here);
            group.set(read(all.old_ends + here.boundary(all, K, -1), here.there));
            met = false;
            Finite finite;
            T* to = state_at(all, here, here.first);
            Stream<true, false, false, false> stream(all, here, here.first, here.first);
            stream.run(here.last - here.first, [&](const Item& item) {
                group.step(item.u);
                const StatePack stored = narrow(group.state());
                ++repeated;
                // The old state stays where they meet, and the mismatch is a residual that was tested.
                met = meet(all, item.x, stored, residual, relative);
                if (met) return false;
                store<K>(all, to, here.there, stored);
                to += all.trajectory_step;
                finite.see(stored);
                return true;
            });
            if (!met) write(all.ends + here.boundary(all, K), here.there, group.state());
            note_non_finite(all, finite);
        }
        const bool pending = asked && !met && here.has_next();
        if (here.chunk < all.count) {
            all.changed[here.flag(all)] = pending ? 1 : 0;
            if (asked || all.round == 0) {
                A* const largest = all.residuals + 2 * here.flag(all);
                // Where it has met, what an earlier round left behind that step stays; elsewhere all states are new.
                const bool earlier = all.round > 0 && met;
                largest[0] = earlier ? max(largest[0], residual) : residual;
                largest[1] = earlier ? max(largest[1], relative) : relative;
            }
        }
        tell_repeated(all, repeated);
        count_warp(&all.run->pending[all.round], pending);
    }
    __device__ static void tell_repeated(const Chunks& all, unsigned repeated) {
        const unsigned most = cuda::largest_in_warp(repeated);
        if (threadIdx.x % 32 == 0 && most > 0) atomicMax(&all.run->repeated, most);
    }

    __device__ static void finish(const Chunks& all, index thread) {
        if (all.run->pending[repair_rounds - 1] == 0 || thread >= all.part_count * all.groups) return;
        Here<T> here(all, thread, V);
        if (here.begins == here.ends) return;
        // The first chunk whose predecessor's end is new.
        for (here.chunk = 1; here.chunk < all.count; ++here.chunk)
            if (all.old_changed[here.flag(all, -1)] != 0) break;
        if (here.chunk == all.count) return;
        here.first = here.begins + here.chunk * all.length;
        Group group(all, here);
        group.set(read(all.old_ends + here.boundary(all, K, -1), here.there));
        Finite finite;
        T* to = state_at(all, here, here.first);
        Inputs stream(all, here, here.first, here.first);
        stream.run(here.ends - here.first, [&](const Item& item) {
            group.step(item.u);
            const StatePack stored = narrow(group.state());
            store<K>(all, to, here.there, stored);
            to += all.trajectory_step;
            finite.see(stored);
            return true;
        });
        note_non_finite(all, finite);
        atomicAdd(&all.sequences[here.sequence].sequential_steps,
                  (unsigned long long)((here.ends - here.first) * here.there));
        for (; here.chunk < all.count; ++here.chunk)
            all.residuals[2 * here.flag(all)] = all.residuals[2 * here.flag(all) + 1] = A(0);
    }

    // --- tiles

    /// The shared memory of a block: W chunks of a tile of `groups` groups, S steps each.
    struct Tile {
        T* inputs;                    ///< [W] rows of groups * V numbers: S * G of them, and one where that is even
        A *starts, *ends, *products;  ///< [threads, V * K] and [threads, V * K * K]
        int groups, steps, chunks, chunk_rows;

        __device__ explicit Tile(const Chunks& all)
            : groups(all.tile_groups),
              steps(all.tile_steps),
              chunks(tile_threads / all.tile_groups),
              chunk_rows(rows_of_chunk(all.tile_steps)) {
            starts = cuda::shared_memory<A>();
            ends = starts + tile_threads * V * K;
            products = ends + tile_threads * V * K;
            inputs = reinterpret_cast<T*>(products + tile_threads * V * K * K);
        }
        /// Odd, so that the chunks of a warp lie in different banks.
        __host__ __device__ static int rows_of_chunk(int steps) { return steps * G | 1; }
        static std::size_t bytes(int steps) {
            return std::size_t(tile_threads) *
                   (std::size_t(V * K * (2 + K)) * sizeof(A) + std::size_t(rows_of_chunk(steps) * V) * sizeof(T));
        }
        /// The most steps of a chunk that leave three blocks to a multiprocessor.
        static int most_steps() {
            int steps = 1;
            while (steps < 64 && bytes(steps + 1) <= tile_bytes) ++steps;
            return steps;
        }

        /// The lanes of a chunk begin to copy the inputs of its `count` steps from `first` on, of the groups from
        /// `channel` on.
        __device__ void copy(const Chunks& all, const Here<T>& here, index channel, index first, int count, int c,
                             int lane) const {
            const index left = all.channels - channel;
            const int there = int(left < groups * V ? left : groups * V);
            const T* const from = all.inputs + first * all.input_step + here.sequence * all.input_batch + channel;
            constexpr int wide = 16 / int(sizeof(T)), narrow = 4 / int(sizeof(T));
            if (all.wide)
                copy_pieces<wide, 16>(all, from, count, there, c, lane);
            else if constexpr (sizeof(T) == 8)
                copy_pieces<1, 8>(all, from, count, there, c, lane);
            else if (sizeof(T) == 4 || whole)
                copy_pieces<narrow, 4>(all, from, count, there, c, lane);
            else
                copy_pieces<1, 0>(all, from, count, there, c, lane);
        }
        /// Pieces of `size` numbers; bytes 0: by plain loads.
        template <int size, int bytes>
        __device__ void copy_pieces(const Chunks& all, const T* from, int count, int there, int c, int lane) const {
            const int width = groups * V, across = width / size < groups ? width / size : groups;  // lanes to a row
            const int first_step = lane / across, step_stride = groups / across;
            const int first_at = lane % across * size, at_stride = across * size;
            for (int step = first_step; step < count; step += step_stride)
                for (int at = first_at; at < there; at += at_stride) {
                    const T* source = from + step * all.input_step + at;
                    T* to = inputs + (c * chunk_rows + step * G) * width + at;
                    for (int g = 0; g < G; ++g, source += all.channels, to += width)
                        if constexpr (bytes > 0)
                            cuda::begin_copy<bytes>(to, source);
                        else
                            *to = *source;
                }
        }
        /// Of step i of chunk c; where a channel does not exist, those of the one before it.
        __device__ __forceinline__ void read(int c, int i, int lane, int there, InputPack (&u)[G]) const {
            const T* const row = inputs + (c * chunk_rows + i * G) * (groups * V) + lane * V;
            for (int g = 0; g < G; ++g) {
                u[g] = *reinterpret_cast<const InputPack*>(row + g * (groups * V));
                if (!exists(V - 1, there)) u[g].at[V - 1] = u[g].at[0];
            }
        }
        __device__ State state(const A* from, int c, int lane) const {
            return OnGpu::read(from + (c * groups + lane) * V * K, V);
        }
        __device__ void set_state(A* to, int c, int lane, const State& x) const {
            OnGpu::write(to + (c * groups + lane) * V * K, V, x);
        }
    };

    /// Newton's update of the start of chunk `c`.
    __device__ static State corrected_start(const Tile& tile, const State& carry, int c, int lane) {
        State start = carry;
        for (int b = 0; b < c; ++b) {
            const State reached = tile.state(tile.ends, b, lane), before = tile.state(tile.starts, b, lane);
            const A* const product = tile.products + (b * tile.groups + lane) * V * K * K;
            State next;
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v)
                for (int k = 0; k < K; ++k) {
                    A sum = reached[std::size_t(v)][std::size_t(k)];
                    for (int m = 0; m < K; ++m)
                        sum += product[(v * K + k) * K + m] *
                               (start[std::size_t(v)][std::size_t(m)] - before[std::size_t(v)][std::size_t(m)]);
                    // Where the products overflow, the end itself.
                    next[std::size_t(v)][std::size_t(k)] =
                        sum - sum == A(0) ? sum : reached[std::size_t(v)][std::size_t(k)];
                }
            start = next;
        }
        return start;
    }
    /// Whether a start has moved by so much that its error may be above the tolerance: corrections shrink
    /// quadratically.
    __device__ static bool far(const Chunks& all, const State& before, const State& now) {
        bool any = false;
        const A close = A(0.1) / A(std::sqrt(max(A(all.relative_tolerance), A(1e-30))));
        DEEPPCR_UNROLL
        for (int v = 0; v < V; ++v)
            for (int k = 0; k < K; ++k) {
                const A x = now[std::size_t(v)][std::size_t(k)];
                const A allowed =
                    A(all.absolute_tolerance) + A(all.relative_tolerance) * scalar_functions::magnitude(x);
                any = any ||
                      !(scalar_functions::magnitude(x - before[std::size_t(v)][std::size_t(k)]) <= close * allowed);
            }
        return any;
    }

    __device__ static void shoot_tiles(const Chunks& all) {
        const Tile tile(all);
        const index blocks = (all.groups + tile.groups - 1) / tile.groups;
        const int lane = int(threadIdx.x) % tile.groups, c = int(threadIdx.x) / tile.groups;
        const index first_group = index(blockIdx.x) % blocks * tile.groups;
        const bool exists = first_group + lane < all.groups;
        Here<T> here(all, 0, V);
        // A group that does not exist runs the last one's states, writes nothing and decides nothing: it does not take
        // part in repairs, after which its states are other ones.
        here.set_row(all, index(blockIdx.x) / blocks * all.groups + (exists ? first_group + lane : all.groups - 1), V);
        Group group(all, here);
        State carry = initial_state(all, here);
        A residual = A(0), relative = A(0);
        Finite finite;
        unsigned repeated = 0, most = 0;
        const int column = exists ? lane : int(all.groups - 1 - first_group);  // of the tile
        for (index begin = here.begins; begin < here.ends; begin += tile.chunks * tile.steps) {
            const index left = here.ends - begin;
            const int count = int(left < tile.chunks * tile.steps ? left : tile.chunks * tile.steps);
            const int steps = count - c * tile.steps < 0            ? 0
                              : count - c * tile.steps < tile.steps ? count - c * tile.steps
                                                                    : tile.steps;
            const index first = begin + c * tile.steps;
            tile.copy(all, here, first_group * V, first, steps, c, lane);
            State start = carry;
            if (all.given && c > 0 && steps > 0) {
                const StatePack guess = load<K>(all, state_at(all, here, first - 1), here.there);
                Finite known;
                known.see(guess);
                if (known.all()) start = widen(guess);
            }
            tile.set_state(tile.starts, c, lane, start);
            cuda::wait_for_copies();
            __syncthreads();
            InputPack u[G];
            int shot = 0;
            for (bool moves = tile.chunks > 1; moves && shot < all.tile_shots; ++shot) {
                A product[V][K * K];
                DEEPPCR_UNROLL
                for (int v = 0; v < V; ++v)
                    for (int e = 0; e < K * K; ++e) product[v][e] = A(e / K == e % K);
                group.set(start);
                for (int i = 0; i < steps; ++i) {
                    tile.read(c, i, column, here.there, u);
                    group.step(u, product);
                }
                tile.set_state(tile.ends, c, lane, group.state());
                DEEPPCR_UNROLL
                for (int v = 0; v < V; ++v)
                    for (int e = 0; e < K * K; ++e)
                        tile.products[((c * tile.groups + lane) * V + v) * K * K + e] = product[v][e];
                __syncthreads();
                const State before = start;
                start = corrected_start(tile, carry, c, lane);
                moves = __syncthreads_or(exists && steps > 0 && far(all, before, start)) != 0;
                tile.set_state(tile.starts, c, lane, start);
            }
            most = shot > int(most) ? unsigned(shot) : most;

            group.set(start);
            StatePack first_state = narrow(start);
            T* to = state_at(all, here, first);
            for (int i = 0; i < steps; ++i) {
                tile.read(c, i, column, here.there, u);
                group.step(u);
                const StatePack stored = narrow(group.state());
                if (i == 0) first_state = stored;
                if (exists) store<K>(all, to, here.there, stored);
                to += all.trajectory_step;
                finite.see(stored);
            }
            tile.set_state(tile.ends, c, lane, group.state());
            __syncthreads();
            bool met = true;
            A met_residual = A(0), met_relative = A(0);
            if (exists && c > 0 && steps > 0) {
                group.set(tile.state(tile.ends, c - 1, lane));
                tile.read(c, 0, column, here.there, u);
                group.step(u);
                met = meet(all, first_state, narrow(group.state()), met_residual, met_relative);
            }
            if (__syncthreads_or(!met) == 0) {
                residual = max(residual, met_residual);
                relative = max(relative, met_relative);
            } else {
                // Chunk after chunk, each from the end of the one before it, until it meets its old states.
                for (int turn = 1; turn < tile.chunks; ++turn) {
                    if (exists && turn == c && steps > 0) {
                        group.set(tile.state(tile.ends, c - 1, lane));
                        T* at = state_at(all, here, first);
                        unsigned again = 0;
                        met = false;
                        for (int i = 0; i < steps && !met; ++i) {
                            tile.read(c, i, column, here.there, u);
                            group.step(u);
                            const StatePack stored = narrow(group.state());
                            met = meet(all, load<K>(all, at, here.there), stored, residual, relative);
                            if (!met) {
                                finite.see(stored);
                                store<K>(all, at, here.there, stored);
                            }
                            at += all.trajectory_step;
                            ++again;
                        }
                        if (!met) tile.set_state(tile.ends, c, lane, group.state());
                        repeated += again;
                    }
                    __syncthreads();
                }
            }
            carry = tile.state(tile.ends, (count - 1) / tile.steps, lane);
            __syncthreads();
        }
        if (exists) note_non_finite(all, finite);
        SequenceStatus* const status = exists ? all.sequences + here.sequence : nullptr;
        cuda::raise_from_warp(status != nullptr ? &status->residual : nullptr, bits_of(double(residual)));
        cuda::raise_from_warp(status != nullptr ? &status->relative_residual : nullptr, bits_of(double(relative)));
        tell_repeated(all, repeated);
        if (threadIdx.x == 0) atomicMax(&all.run->shots, most);
    }

    // --- gradients

    /// The backward pass of a chunk, step after step.
    struct Backward {
        const Chunks& all;
        const Here<T>& here;
        Group group;
        State adjoint;
        A sums[V][P];
        bool first_sum;  ///< whether the parameters' gradients are still to be set
        T* input_gradient;

        __device__ Backward(const Chunks& chunks, const Here<T>& place, const State& arriving, bool sets)
            : all(chunks), here(place), group(chunks, place), adjoint(arriving), first_sum(sets) {
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v)
                for (int q = 0; q < P; ++q) sums[v][q] = A(0);
            input_gradient = input_gradient_at(all, here, here.last - 1);
        }
        /// The adjoint becomes J^T times itself. Gradients of the inputs are set, or added to.
        template <bool adding>
        __device__ __forceinline__ void step(const Item& item, const State& before) {
            group.set_inputs(item.u);
            group.set(before);
            A gradient[G][V];
            if constexpr (adding)
                for (int g = 0; g < G; ++g) cuda::widen<V>(item.input_gradient[g].at, gradient[g]);
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v) {
                A result[K + G + P];
                group.sensitivities(v, adjoint[std::size_t(v)], result);
                for (int k = 0; k < K; ++k) adjoint[std::size_t(v)][std::size_t(k)] = result[k];
                for (int g = 0; g < G; ++g) gradient[g][v] = adding ? gradient[g][v] + result[K + g] : result[K + g];
                for (int q = 0; q < P; ++q) sums[v][q] += result[K + G + q];
            }
            DEEPPCR_UNROLL
            for (int g = 0; g < G; ++g) {
                InputPack stored;
                cuda::narrow<V>(gradient[g], stored.at);
                store<1>(all, input_gradient + g * all.channels, here.there, stored);
            }
            input_gradient -= all.input_gradient_step;
        }
        __device__ void add_sums() {
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v)
                for (int q = 0; q < P; ++q) {
                    if (exists(v, here.there)) {
                        double& sum =
                            all.parameter_gradient[((here.chunk * all.part_count + here.part) * P + q) * all.channels +
                                                   here.channel + v];
                        sum = (first_sum ? 0 : sum) + double(sums[v][q]);
                    }
                    sums[v][q] = A(0);
                }
            first_sum = false;
        }
        __device__ A largest() const {
            A size = A(0);
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v)
                for (int k = 0; k < K; ++k)
                    size = scalar_functions::larger_or_nan(
                        size, scalar_functions::magnitude(adjoint[std::size_t(v)][std::size_t(k)]));
            return size;
        }
        /// The first step of a part comes after its initial state, all others after one in the trajectory.
        template <bool adding, bool with_gradient, class Visit>
        __device__ __forceinline__ void run(const Visit& visit) {
            const bool leads = here.first == here.begins;
            const index count = here.last - here.first - (leads ? 1 : 0);
            bool goes_on = true;
            int until_sum = steps_per_sum;
            {
                Stream<true, with_gradient, adding, true> stream(all, here, here.last - 1, here.last - 2);
                stream.run(count, [&](const Item& item) {
                    if (with_gradient) add_gradient(item.gradient);
                    step<adding>(item, OnGpu::widen(item.x));
                    if (--until_sum == 0) {
                        add_sums();
                        until_sum = steps_per_sum;
                    }
                    return goes_on = visit();
                });
            }
            if (leads && goes_on) {
                Stream<false, with_gradient, adding, true> stream(all, here, here.first, here.first);
                typename decltype(stream)::Slot slot;
                stream.load(true, slot);
                const Item item = slot.get();
                if (with_gradient) add_gradient(item.gradient);
                step<adding>(item, initial_state(all, here));
                visit();
            }
            add_sums();
        }
        __device__ __forceinline__ void add_gradient(const StatePack& gradient) {
            const State more = OnGpu::widen(gradient);
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v)
                for (int k = 0; k < K; ++k)
                    adjoint[std::size_t(v)][std::size_t(k)] += more[std::size_t(v)][std::size_t(k)];
        }
    };
    __device__ static A* initial_gradient(const Chunks& all, const Here<T>& here) {
        return all.initial_gradient + (here.part * all.channels + here.channel) * K;
    }

    __device__ static void backward(const Chunks& all, index thread) {
        const Here<T> here(all, thread, V);
        if (here.chunk >= all.count) return;
        State adjoint = zeros();
        if (here.exists) {
            Backward pass(all, here, adjoint, true);
            pass.template run<false, true>([] { return true; });
            adjoint = pass.adjoint;
            write(all.ends + here.boundary(all, K), here.there, adjoint);
        } else {
            for (int q = 0; q < P; ++q)
                for (int v = 0; v < here.there; ++v)
                    all.parameter_gradient[((here.chunk * all.part_count + here.part) * P + q) * all.channels +
                                           here.channel + v] = 0;
        }
        if (here.chunk == 0) write(initial_gradient(all, here), here.there, adjoint);
    }

    /// Sends `adjoint` from behind a chunk through it; true where something is left of it at the chunk's start.
    __device__ static bool send(const Chunks& all, const Here<T>& here, State& adjoint, unsigned& corrected) {
        Backward pass(all, here, adjoint, false);
        const A negligible = pass.largest() * std::numeric_limits<A>::epsilon() / A(16);
        bool left = pass.largest() != A(0);
        if (left)
            pass.template run<true, false>([&] {
                ++corrected;
                return left = !(pass.largest() <= negligible);
            });
        adjoint = pass.adjoint;
        if (left && here.chunk == 0) {
            State sum = read(initial_gradient(all, here), here.there);
            DEEPPCR_UNROLL
            for (int v = 0; v < V; ++v)
                for (int k = 0; k < K; ++k)
                    sum[std::size_t(v)][std::size_t(k)] += adjoint[std::size_t(v)][std::size_t(k)];
            write(initial_gradient(all, here), here.there, sum);
        }
        return left;
    }

    __device__ static void correct(const Chunks& all, index thread) {
        if (all.round > 0 && all.run->pending[all.round - 1] == 0) return;
        const Here<T> here(all, thread, V);
        const bool asked =
            here.exists && here.has_next() && (all.old_changed == nullptr || all.old_changed[here.flag(all, 1)] != 0);
        bool pending = false;
        unsigned corrected = 0;
        if (asked) {
            State adjoint = read(all.old_ends + here.boundary(all, K, 1), here.there);
            pending = send(all, here, adjoint, corrected) && here.chunk > 0;
            write(all.ends + here.boundary(all, K), here.there, adjoint);
        }
        if (here.chunk < all.count) all.changed[here.flag(all)] = pending ? 1 : 0;
        tell_repeated(all, corrected);
        count_warp(&all.run->pending[all.round], pending);
    }

    __device__ static void finish_backward(const Chunks& all, index thread) {
        if (all.run->pending[repair_rounds - 1] == 0 || thread >= all.part_count * all.groups) return;
        Here<T> here(all, thread, V);
        if (here.begins == here.ends) return;
        State adjoint = zeros();
        unsigned corrected = 0;
        for (index c = (here.ends - here.begins - 1) / all.length - 1; c >= 0; --c) {
            here.set_chunk(all, c);
            if (all.old_changed[here.flag(all, 1)] != 0) {
                const State more = read(all.old_ends + here.boundary(all, K, 1), here.there);
                DEEPPCR_UNROLL
                for (int v = 0; v < V; ++v)
                    for (int k = 0; k < K; ++k)
                        adjoint[std::size_t(v)][std::size_t(k)] += more[std::size_t(v)][std::size_t(k)];
            }
            if (!send(all, here, adjoint, corrected)) adjoint = zeros();
        }
    }

    // --- launches

    /// Whether whole packs can be moved, and 16 bytes of inputs at once.
    static Chunks looked_at(Chunks all) {
        const auto fits = [](const void* memory, std::size_t bytes, std::initializer_list<index> numbers) {
            bool good = memory == nullptr || reinterpret_cast<std::uintptr_t>(memory) % bytes == 0;
            for (const index n : numbers) good = good && std::size_t(n < 0 ? -n : n) * sizeof(T) % bytes == 0;
            return good;
        };
        constexpr std::size_t states = alignof(StatePack), inputs = alignof(InputPack);
        all.packed = all.channels % V == 0 && fits(all.inputs, inputs, {all.input_step, all.input_batch}) &&
                     fits(all.initial, states, {all.initial_part}) &&
                     fits(all.trajectory, states, {all.trajectory_step, all.trajectory_batch}) &&
                     fits(all.output_gradient, states, {all.gradient_step, all.gradient_batch}) &&
                     fits(all.input_gradient, inputs, {all.input_gradient_step, all.input_gradient_batch});
        all.wide = fits(all.inputs, 16, {all.input_step, all.input_batch, all.channels, index(all.tile_groups) * V});
        return all;
    }
    /// One thread for each group of each chunk, in blocks small enough to go to all multiprocessors.
    static cuda::Launch everywhere(const Chunks& all, CUstream_st* stream) {
        const index threads = all.count * all.part_count * all.groups;
        const index share = (threads / all.multiprocessors + 31) / 32 * 32;
        return cuda::one_each(threads, stream, int(std::clamp<index>(share, 32, cell_threads)));
    }
};

/// Enqueues the kernel that the addresses allow. Only groups of two channels have another one.
template <class Cell, class T>
void launch_looked_at(const DeviceChunks<T>& chunks, const cuda::Launch& where, void (*whole)(DeviceChunks<T>),
                      void (*pieces)(DeviceChunks<T>)) {
    const DeviceChunks<T> all = OnGpu<Cell, T>::looked_at(chunks);
    cuda::launch(where, all.packed || pieces == nullptr ? whole : pieces, all);
}

#define DEEPPCR_CELL_KERNEL(name)                                                                                    \
    template <class Cell, class T, bool whole>                                                                       \
    __global__ void __launch_bounds__(cell_threads) name##_kernel(const __grid_constant__ DeviceChunks<T> all) {     \
        OnGpu<Cell, T, whole>::name(all, cuda::this_thread());                                                       \
    }                                                                                                                \
    template <class Cell, class T>                                                                                   \
    DeviceKernel<T> name##_on_gpu() {                                                                                \
        return {[](const DeviceChunks<T>& all, CUstream_st* stream) {                                                \
                    using On = OnGpu<Cell, T>;                                                                       \
                    if constexpr (On::V == 1)                                                                        \
                        launch_looked_at<Cell, T>(all, On::everywhere(all, stream), name##_kernel<Cell, T, true>,    \
                                                  nullptr);                                                          \
                    else                                                                                             \
                        launch_looked_at<Cell, T>(all, On::everywhere(all, stream), name##_kernel<Cell, T, true>,    \
                                                  name##_kernel<Cell, T, false>);                                    \
                },                                                                                                   \
                [] { return cell_threads * cuda::resident_blocks(name##_kernel<Cell, T, true>, cell_threads, 0); }}; \
    }
DEEPPCR_CELL_KERNEL(advance)
DEEPPCR_CELL_KERNEL(multiply)
DEEPPCR_CELL_KERNEL(repair)
DEEPPCR_CELL_KERNEL(finish)
DEEPPCR_CELL_KERNEL(backward)
DEEPPCR_CELL_KERNEL(correct)
DEEPPCR_CELL_KERNEL(finish_backward)
#undef DEEPPCR_CELL_KERNEL

template <class Cell, class T, bool whole>
__global__ void __launch_bounds__(tile_threads) shoot_tiles_kernel(const __grid_constant__ DeviceChunks<T> all) {
    OnGpu<Cell, T, whole>::shoot_tiles(all);
}
/// None for a cell of so many states that the ends and products of its chunks leave no room for inputs.
template <class Cell, class T>
DeviceKernel<T> shoot_tiles_on_gpu() {
    using On = OnGpu<Cell, T>;
    if (On::Tile::bytes(2) > tile_bytes) return {};
    return {[](const DeviceChunks<T>& chunks, CUstream_st* stream) {
                DeviceChunks<T> all = chunks;
                all.tile_steps = On::Tile::most_steps();
                const index blocks = all.part_count * ((all.groups + all.tile_groups - 1) / all.tile_groups);
                cuda::Launch where = cuda::one_each(blocks, stream, 1);
                where.threads = dim3(tile_threads);
                where.shared_bytes = On::Tile::bytes(all.tile_steps);
                if constexpr (On::V == 1)
                    launch_looked_at<Cell, T>(all, where, shoot_tiles_kernel<Cell, T, true>, nullptr);
                else
                    launch_looked_at<Cell, T>(all, where, shoot_tiles_kernel<Cell, T, true>,
                                              shoot_tiles_kernel<Cell, T, false>);
            },
            [] {
                return tile_threads * cuda::resident_blocks(shoot_tiles_kernel<Cell, T, true>, tile_threads,
                                                            On::Tile::bytes(On::Tile::most_steps()));
            }};
}

/// All of a Cell's.
template <class Cell, class T>
DeviceKernels<T> kernels_on_gpu() {
    return {OnGpu<Cell, T>::V,          advance_on_gpu<Cell, T>(), multiply_on_gpu<Cell, T>(),
            repair_on_gpu<Cell, T>(),   finish_on_gpu<Cell, T>(),  shoot_tiles_on_gpu<Cell, T>(),
            backward_on_gpu<Cell, T>(), correct_on_gpu<Cell, T>(), finish_backward_on_gpu<Cell, T>()};
}

/// Tells the library of the kernels for a Cell, for numbers of these types.
template <deeppcr::Cell C, class... Types>
void register_on_gpu() {
    // What the concept alone names, as with 16 bits, nvcc calls unused (#177-D) in a Cell of an unnamed namespace.
    (void)[](std::array<Scalar<float>, std::size_t(C::states)> x, std::array<Scalar<float>, std::size_t(C::inputs)> u,
             std::array<Scalar<float>, std::size_t(C::parameters)> p) {
        (void)C::step(x, u, p);
    };
    (register_device_kernels<Types>(typeid(C), kernels_on_gpu<C, Types>()), ...);
}

/// Its constructor does so for all types.
template <deeppcr::Cell C>
struct RegisteredOnGpu {
    RegisteredOnGpu() { register_on_gpu<C, float, double, bfloat16, float16>(); }
};

}  // namespace deeppcr::cell

#define DEEPPCR_JOINED_WITH(a, b) a##b
#define DEEPPCR_JOINED(a, b) DEEPPCR_JOINED_WITH(a, b)
/// In one .cu file, at namespace scope: `evaluate` and `adjoint` then run recurrences of this Cell with Backend::cuda.
/// A linker leaves out an object file of a static library that nothing else refers to, and this with it: call
/// cell::register_on_gpu<Cell, float, ...>() instead there, from a function that the program calls.
#define DEEPPCR_CELL_ON_GPU(...) \
    static const ::deeppcr::cell::RegisteredOnGpu<__VA_ARGS__> DEEPPCR_JOINED(deeppcr_registered_on_gpu_, __COUNTER__)
