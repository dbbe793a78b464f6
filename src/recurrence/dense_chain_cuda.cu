// DenseChain on a GPU. W_t is a layer's matrix, s its slopes, y = dL/dx.
//
//   run             one block per sequence, or four, through all layers (persistent.cuh)
//   step            the same with one step per block; of single layers, a warp for some rows of a layer and up to eight
//                   sequences, which writes their part of the Jacobian diag(s) W_t from the registers that hold W_t
//   Jacobian of a   block of several layers: its columns do not depend on each other: some columns per block, in shared
//                   memory, from layer to layer
//   run_backward    the states are known, so only y <- W_t^T (s y) is sequential: slopes (and what enters the layers
//                   within a block) first, for all steps side by side; then one persistent kernel over transposed
//                   copies of the weights, some megabytes at a time, which leaves s y; then the parameters' gradients,
//                   outer products of s y and what entered, all layers side by side
//
// Bytes that the memory moves, per layer of width D and batch B, in numbers: run D^2 + B D; Jacobian D^2 + B D^2;
// run_backward 4 D^2 + about 8 B D (weights read, transposed, read again; gradients written).
#include <array>
#include <cstdint>
#include <memory>

#include "recurrence/activation.cuh"
#include "recurrence/dense_chain_kernels.hpp"
#include "recurrence/persistent.cuh"

namespace deeppcr::chain {
namespace {

using persistent::Dimensions;
using persistent::Here;
using persistent::Piece;
using persistent::Place;
using persistent::Scratch;

constexpr int together = 8;                         // sequences that a warp linearises with the same part of a layer
constexpr index transposed_bytes = index(1) << 28;  // of copies at a time
constexpr index product_bytes = 96 << 10;           // of columns of a Jacobian in a block's shared memory

/// The layers of a section, and what its forward evaluation writes. Pointers are to the section's first layer or step.
template <class T>
struct Layers : Dimensions {
    const T *weights, *biases;
    Activation activation;
    bool residual;
};

template <class T>
Layers<T> layers_of(const Network<T>& network, const Extent& extent) {
    const index first = extent.first * network.depth(), width = network.width();
    const T* const weights = network.weights.at(first, 0);
    return {{int(width), int(width), int(extent.batch), int(network.depth()), persistent::rows_aligned(weights, width)},
            weights,
            network.biases.at(first, 0),
            network.activation,
            network.residual()};
}

/// x_t = f(x_{t-1}), chunk after chunk of `length` steps side by side, from `state` + chunk * state_stride on.
template <class T>
struct Forward : Layers<T> {
    using Number = T;
    static constexpr int matrices = 1, outputs = 1, carries = 1;
    static constexpr bool constant = false, stops = false;
    struct Operands {
        T bias;
    };

    index steps, length;
    const T* state;
    index state_stride;
    T* trajectory;  // as the next two, null where it is not wanted
    index trajectory_step, trajectory_batch;
    T *slopes, *inputs;  // inputs: what enters each layer

    __device__ __forceinline__ index items(index chunk) const {
        return std::min(length, steps - chunk * length) * this->phases;
    }
    __device__ __forceinline__ index layer(index chunk, index item) const {
        return chunk * length * this->phases + item;
    }
    __device__ __forceinline__ index at(index row_of_batch, int sequence, int row) const {
        return (row_of_batch * this->batch + sequence) * this->rows + row;
    }
    __device__ __forceinline__ T* state_at(index step, int sequence) const {
        return trajectory + step * trajectory_step + sequence * trajectory_batch;
    }
    __device__ __forceinline__ const T* matrix(index chunk, index item) const {
        return this->weights + layer(chunk, item) * this->rows * this->columns;
    }
    __device__ __forceinline__ Operands load(index chunk, const Place& place, int, int row) const {
        return {this->biases[layer(chunk, place.item) * this->rows + row]};
    }
    __device__ __forceinline__ void start(index chunk, int sequence, int row, T* carry, T (&x)[1]) const {
        *carry = x[0] = state[chunk * state_stride + at(0, sequence, row)];
        if (inputs != nullptr) inputs[at(layer(chunk, 0), sequence, row)] = x[0];
    }
    __device__ __forceinline__ bool finish(index chunk, const Place& place, int sequence, int row, const T (&sums)[1],
                                           const Operands& operands, T* carry, T (&x)[1]) const {
        const index layer = this->layer(chunk, place.item);
        T slope;
        x[0] = activate(this->activation, sums[0] + operands.bias, slopes != nullptr, slope);
        if (slopes != nullptr) slopes[at(layer, sequence, row)] = slope;
        const bool last = place.phase + 1 == this->phases;
        if (last) {
            if (this->residual) *carry = x[0] = *carry + x[0];
            if (trajectory != nullptr) state_at(chunk * length + place.group, sequence)[row] = x[0];
        }
        if (inputs != nullptr && place.item + 1 < items(chunk)) inputs[at(layer + 1, sequence, row)] = x[0];
        return false;
    }
};

/// The same again from other states, until the old trajectory is met (see Chunks).
template <class T>
struct Repair : Forward<T> {
    static constexpr bool stops = true;
    struct Operands {
        T bias, old;
    };

    persistent::Meeting<T> meeting;

    __device__ __forceinline__ unsigned asked(index chunk, int first_sequence, int count) const {
        return meeting.asked(chunk, first_sequence, count, this->batch);
    }
    __device__ __forceinline__ Operands load(index chunk, const Place& place, int sequence, int row) const {
        Operands operands{Forward<T>::load(chunk, place, sequence, row).bias, T(0)};
        if (place.phase + 1 == this->phases)
            operands.old = this->state_at(chunk * this->length + place.group, sequence)[row];
        return operands;
    }
    __device__ __forceinline__ bool finish(index, const Place& place, int, int, const T (&sums)[1],
                                           const Operands& operands, T* carry, T (&x)[1]) const {
        T slope;
        x[0] = activate(this->activation, sums[0] + operands.bias, false, slope);
        if (place.phase + 1 < this->phases) return false;
        if (this->residual) *carry = x[0] = *carry + x[0];
        return !meeting.meets(x[0], operands.old);
    }
    __device__ __forceinline__ void settle(index chunk, index group, int first_sequence, unsigned running, unsigned met,
                                           const T* x, int stride, const T*) const {
        const bool last = (group + 1) * this->phases == Forward<T>::items(chunk);
        for (int s = 0; running >> s != 0; ++s)
            if ((running >> s & 1U) != 0)
                meeting.settle(chunk, group, first_sequence + s, this->batch, this->rows, x + s * stride, 1,
                               this->state_at(chunk * this->length + group, first_sequence + s), (met >> s & 1U) != 0,
                               last);
    }
};

/// The gradients y of what leaves the layers, from the last to the first; s y of each layer goes to `deltas`, and is x.
/// Either through all steps, or (by_steps) within each step from its adjoint state.
template <class T>
struct Backward : Layers<T> {
    using Number = T;
    static constexpr int matrices = 1, outputs = 1, carries = 1;
    static constexpr bool constant = false, stops = false;
    struct Operands {
        T slope, gradient;
    };

    bool by_steps;
    index steps;
    const T *transposed, *slopes, *gradient;  // of the outputs, or the adjoint states
    T *deltas, *adjoint, *initial;            // adjoint may be null; initial: after the section, then before it
    bool from_initial;

    __device__ index last_step(index chunk) const { return by_steps ? chunk : steps - 1; }
    __device__ __forceinline__ index items(index) const { return by_steps ? this->phases - 1 : steps * this->phases; }
    __device__ __forceinline__ index layer(index chunk, index item) const {
        return (last_step(chunk) + 1) * this->phases - 1 - item;
    }
    __device__ __forceinline__ index at(index row_of_batch, int sequence, int row) const {
        return (row_of_batch * this->batch + sequence) * this->rows + row;
    }
    __device__ __forceinline__ const T* matrix(index chunk, index item) const {
        return transposed + layer(chunk, item) * this->rows * this->columns;
    }
    __device__ __forceinline__ Operands load(index chunk, const Place& place, int sequence, int row) const {
        const index layer = this->layer(chunk, place.item), step = last_step(chunk) - place.group;
        Operands operands{T(0), T(0)};
        if (layer > 0) operands.slope = slopes[at(layer - 1, sequence, row)];
        if (place.phase + 1 == this->phases && step > 0) operands.gradient = gradient[at(step - 1, sequence, row)];
        return operands;
    }
    __device__ __forceinline__ void start(index chunk, int sequence, int row, T* carry, T (&x)[1]) const {
        T y = gradient[at(last_step(chunk), sequence, row)];
        if (from_initial) y += initial[at(0, sequence, row)];
        if (adjoint != nullptr) adjoint[at(last_step(chunk), sequence, row)] = y;
        *carry = y;
        put(layer(chunk, 0), sequence, row, slopes[at(layer(chunk, 0), sequence, row)], y, x);
    }
    __device__ __forceinline__ bool finish(index chunk, const Place& place, int sequence, int row, const T (&sums)[1],
                                           const Operands& operands, T* carry, T (&x)[1]) const {
        const index layer = this->layer(chunk, place.item), step = last_step(chunk) - place.group;
        T y = sums[0];
        if (place.phase + 1 == this->phases) {
            if (this->residual) y += *carry;
            if (step == 0) {
                initial[at(0, sequence, row)] = x[0] = y;
                return false;
            }
            *carry = y += operands.gradient;
            if (adjoint != nullptr) adjoint[at(step - 1, sequence, row)] = y;
        }
        put(layer - 1, sequence, row, operands.slope, y, x);
        return false;
    }

private:
    __device__ __forceinline__ void put(index layer, int sequence, int row, T slope, T y, T (&x)[1]) const {
        deltas[at(layer, sequence, row)] = x[0] = slope * y;
    }
};

/// Steps of one layer: a warp for each step, eight sequences and some rows.
template <class T, class L>
__global__ void __launch_bounds__(cuda::plain_threads, 2)
    linearise_layers(const __grid_constant__ Layers<T> of, index steps, const T* before, T* after, T* jacobian,
                     T* diagonal) {
    const int tiles = (of.rows + L::warp_rows - 1) / L::warp_rows, groups = (of.batch + together - 1) / together;
    const index warp = (index(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (warp >= steps * groups * tiles) return;
    const index step = warp / (index(groups) * tiles);
    const int first_sequence = int(warp / tiles % groups) * together, first_row = int(warp % tiles) * L::warp_rows;
    const Here<L> here(0);
    const int row = first_row + here.row;
    const T* const weights = of.weights + step * of.rows * of.columns;
    const T bias = row < of.rows ? of.biases[step * of.rows + row] : T(0);
    const bool states_aligned = of.aligned && reinterpret_cast<std::uintptr_t>(before) % 16 == 0;
    const bool rows_aligned = of.aligned && reinterpret_cast<std::uintptr_t>(jacobian) % 16 == 0;

    Piece<T, L, 1> piece;
    piece.load(weights, here, first_row, 0, of);
    for (int s = first_sequence; s < std::min(of.batch, first_sequence + together); ++s) {
        const index at = (step * of.batch + s) * of.rows;
        T sums[1][L::sets]{};
        for (int column = 0; column < of.columns; column += L::columns) {
            if (of.columns > L::columns) piece.load(weights, here, first_row, column, of);
            T four[4];
            persistent::load_up_to_four(before + at + column + here.first_column(),
                                        of.columns - column - here.first_column(), states_aligned, four);
            piece.multiply(four, sums);
        }
        T slope;
        const T z = persistent::add_lanes<L::lanes / 2>(sums[0], here.part) + bias;
        T value = activate(of.activation, z, true, slope);
        if (here.owns && row < of.rows) {
            if (of.residual) value = before[at + row] + value;
            after[at + row] = value;
        }
        if (jacobian == nullptr && diagonal == nullptr) continue;
        for (int column = 0; column < of.columns; column += L::columns) {
            if (of.columns > L::columns) piece.load(weights, here, first_row, column, of);
            const int first = column + here.first_column();
            DEEPPCR_UNROLL
            for (int n = 0; n < L::sets; ++n) {
                const int other = first_row + here.first_row + n * L::set_rows;
                const T of_row = here.from_owner(slope, n);
                if (other >= of.rows) continue;
                T four[4];
                DEEPPCR_UNROLL
                for (int v = 0; v < 4; ++v) {
                    four[v] = of_row * piece.numbers[0][n][v];
                    if (first + v != other) continue;
                    if (of.residual) four[v] += T(1);
                    if (diagonal != nullptr) diagonal[at + other] = four[v];
                }
                if (jacobian != nullptr)
                    persistent::store_up_to_four(jacobian + (at + other) * of.columns + first, four, of.columns - first,
                                                 rows_aligned);
            }
        }
    }
}

/// `count` columns per block of the product of a step's layers' Jacobians, each [rows, count] in shared memory.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    multiply_layers(const __grid_constant__ Layers<T> of, int count, const T* slopes, T* jacobian, T* diagonal) {
    const int parts = (of.columns + count - 1) / count;
    const index which = index(blockIdx.x) / parts, step = which / of.batch, sequence = which % of.batch;
    const int first = int(index(blockIdx.x) % parts) * count;
    T* product = cuda::shared_memory<T>();
    T* next = product + of.rows * count;
    for (int i = int(threadIdx.x); i < of.rows * count; i += int(blockDim.x))
        product[i] = i / count == first + i % count ? T(1) : T(0);
    for (int phase = 0; phase < of.phases; ++phase) {
        __syncthreads();
        const index layer = step * of.phases + phase;
        for (int i = int(threadIdx.x); i < of.rows * count; i += int(blockDim.x)) {
            const T* const row = of.weights + (layer * of.rows + i / count) * of.columns;
            T sum = 0;
            for (int k = 0; k < of.columns; ++k)
                sum = persistent::multiply_add(row[k], product[k * count + i % count], sum);
            next[i] = slopes[(layer * of.batch + sequence) * of.rows + i / count] * sum;
        }
        T* const done = product;
        product = next;
        next = done;
    }
    for (int i = int(threadIdx.x); i < of.rows * count; i += int(blockDim.x)) {
        const int row = i / count, column = first + i % count;
        if (column >= of.columns) continue;
        const T value = product[i] + (of.residual && row == column ? T(1) : T(0));
        if (jacobian != nullptr) jacobian[(which * of.rows + row) * of.columns + column] = value;
        if (diagonal != nullptr && row == column) diagonal[which * of.rows + row] = value;
    }
}

template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    scale(const T* slopes, const T* adjoint, index count, T* deltas) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) deltas[i] = slopes[i] * adjoint[i];
}

/// The gradients of four rows and columns of a layer per thread, sums over the sequences in their order.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    add_outer_products(const __grid_constant__ Layers<T> of, index layers, const T* deltas, const T* inputs, T* weights,
                       T* biases) {
    const int quads = (of.columns + 3) / 4;
    const index thread = index(blockIdx.x) * blockDim.x + threadIdx.x, layer = thread / (index(quads) * quads);
    if (layer >= layers) return;
    const int row = int(thread / quads % quads) * 4, column = int(thread % quads) * 4;
    const bool aligned = of.columns % 4 == 0 && reinterpret_cast<std::uintptr_t>(inputs) % 16 == 0 &&
                         reinterpret_cast<std::uintptr_t>(weights) % 16 == 0;
    T products[4][4]{}, sums[4]{};
    for (int s = 0; s < of.batch; ++s) {
        const index at = (layer * of.batch + s) * of.rows;
        T delta[4], input[4];
        persistent::load_up_to_four(deltas + at + row, of.rows - row, aligned, delta);
        persistent::load_up_to_four(inputs + at + column, of.columns - column, aligned, input);
        DEEPPCR_UNROLL
        for (int i = 0; i < 4; ++i) {
            sums[i] += delta[i];
            DEEPPCR_UNROLL
            for (int j = 0; j < 4; ++j) products[i][j] = persistent::multiply_add(delta[i], input[j], products[i][j]);
        }
    }
    DEEPPCR_UNROLL
    for (int i = 0; i < 4; ++i)
        if (row + i < of.rows)
            persistent::store_up_to_four(weights + (layer * of.rows + row + i) * of.columns + column, products[i],
                                         of.columns - column, aligned);
    if (column == 0) persistent::store_up_to_four(biases + layer * of.rows + row, sums, of.rows - row, false);
}

template <class T>
Forward<T> forward(const Network<T>& network, const Extent& extent) {
    Forward<T> rule{};
    static_cast<Layers<T>&>(rule) = layers_of(network, extent);
    rule.steps = extent.steps;
    return rule;
}

/// All steps side by side, from the states before each.
template <class T>
void run_each_step(const Network<T>& network, const Extent& extent, const T* before, T* after, T* slopes, T* inputs) {
    Forward<T> rule = forward(network, extent);
    rule.length = 1;
    rule.state = before;
    rule.state_stride = extent.batch * network.width();
    rule.trajectory = after;
    rule.trajectory_step = extent.batch * network.width();
    rule.trajectory_batch = network.width();
    rule.slopes = slopes;
    rule.inputs = inputs;
    persistent::launch_advance(rule, extent.steps, extent.stream);
}

/// Both backward passes; `initial` null: from adjoint states, within each step.
template <class T>
void back(const Network<T>& network, const Extent& extent, const T* before, const T* slopes, const T* gradient,
          T* weights, T* biases, T* adjoint, T* initial) {
    const index width = network.width(), depth = network.depth(), layers = extent.steps * depth;
    const index row = extent.batch * width;
    const Scratch<T> deltas(layers * row, extent.stream, extent.workspace);
    const Scratch<T> own_slopes(slopes == nullptr ? layers * row : 0, extent.stream, extent.workspace);
    const Scratch<T> own_inputs(depth > 1 ? layers * row : 0, extent.stream, extent.workspace);
    if (slopes == nullptr || depth > 1)
        run_each_step<T>(network, extent, before, nullptr, slopes == nullptr ? own_slopes.data() : nullptr,
                         own_inputs.data());
    if (slopes == nullptr) slopes = own_slopes.data();

    const bool by_steps = initial == nullptr;
    if (by_steps && depth == 1) {
        if (row > 0)
            cuda::launch(cuda::one_each(layers * row, extent.stream), scale<T>, slopes, gradient, layers * row,
                         deltas.data());
    } else {
        const index layer_bytes = width * width * index(sizeof(T));
        const index piece = std::clamp<index>(transposed_bytes / (layer_bytes * depth), 1, extent.steps);
        const Scratch<T> transposed(piece * depth * width * width, extent.stream, extent.workspace);
        for (index last = extent.steps; last > 0; last -= std::min(last, piece)) {
            const index first = std::max<index>(0, last - piece);
            const Extent part{extent.first + first, last - first, extent.batch, 1, extent.stream};
            Backward<T> rule{};
            static_cast<Layers<T>&>(rule) = layers_of(network, part);
            persistent::transpose(rule.weights, part.steps * depth, width, width, transposed.data(), extent.stream);
            rule.aligned = persistent::rows_aligned(transposed.data(), width);
            rule.by_steps = by_steps;
            rule.steps = part.steps;
            rule.transposed = transposed.data();
            rule.slopes = slopes + first * depth * row;
            rule.gradient = gradient + first * row;
            rule.deltas = deltas.data() + first * depth * row;
            rule.adjoint = adjoint == nullptr ? nullptr : adjoint + first * row;
            rule.initial = initial;
            rule.from_initial = last < extent.steps && !by_steps;
            persistent::launch_advance(rule, by_steps ? part.steps : 1, extent.stream);
        }
    }
    const index quads = (width + 3) / 4;
    cuda::launch(cuda::one_each(layers * quads * quads, extent.stream), add_outer_products<T>,
                 layers_of(network, extent), layers, deltas.data(), depth > 1 ? own_inputs.data() : before, weights,
                 biases);
}

}  // namespace

template <Backend B, class T>
void run(const Network<T>& network, const Extent& extent, const T* state, T* trajectory, T* slopes) {
    if (extent.steps == 0 || extent.batch == 0) return;
    Forward<T> rule = forward(network, extent);
    rule.length = extent.steps;
    rule.state = state;
    rule.trajectory = trajectory;
    rule.trajectory_step = extent.batch * network.width();
    rule.trajectory_batch = network.width();
    rule.slopes = slopes;
    persistent::launch_advance(rule, 1, extent.stream);
}

template <class T>
void run_chunks_on_gpu(const Network<T>& network, const Extent& extent, const Chunks<T>& chunks) {
    if (extent.steps == 0 || extent.batch == 0) return;
    Repair<T> rule{};
    static_cast<Forward<T>&>(rule) = forward(network, extent);
    rule.length = chunks.length;
    rule.state = chunks.starts.data();
    rule.state_stride = extent.batch * network.width();
    rule.trajectory = chunks.trajectory.data();
    rule.trajectory_step = chunks.trajectory.step_stride();
    rule.trajectory_batch = chunks.trajectory.batch_stride();
    rule.meeting = persistent::Meeting<T>(chunks);
    const index count = (extent.steps + chunks.length - 1) / chunks.length;
    if (chunks.asked == nullptr)
        persistent::launch_advance(static_cast<const Forward<T>&>(rule), count, extent.stream);
    else
        persistent::launch_advance(rule, count, extent.stream);
}

template <Backend B, class T>
void linearise(const Network<T>& network, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    if (extent.steps == 0 || extent.batch == 0) return;
    const index width = network.width(), depth = network.depth();
    const Layers<T> layers = layers_of(network, extent);
    if (depth == 1) {
        persistent::with_layout<true, true>(width, width, [&]<class L>(L) {
            const index groups = (extent.batch + together - 1) / together;
            const index tiles = (width + L::warp_rows - 1) / L::warp_rows;
            cuda::launch(cuda::one_each(32 * extent.steps * groups * tiles, extent.stream), linearise_layers<T, L>,
                         layers, extent.steps, before, after, jacobian, diagonal);
        });
        return;
    }
    const bool wanted = jacobian != nullptr || diagonal != nullptr;
    const Scratch<T> slopes(wanted ? extent.steps * depth * extent.batch * width : 0, extent.stream, extent.workspace);
    run_each_step<T>(network, extent, before, after, slopes.data(), nullptr);
    if (!wanted) return;
    const index most = product_bytes / (2 * width * index(sizeof(T)));
    const int count = int(std::clamp<index>(most, 1, std::min<index>(32, width)));
    cuda::Launch where = cuda::one_each(extent.steps * extent.batch * ((width + count - 1) / count), extent.stream, 1);
    where.threads = dim3(cuda::plain_threads);
    where.shared_bytes = std::size_t(2 * width * count) * sizeof(T);
    cuda::launch(where, multiply_layers<T>, layers, count, slopes.data(), jacobian, diagonal);
}

template <Backend B, class T>
void parameter_gradients(const Network<T>& network, const Extent& extent, const T* before, const T* adjoint, T* weights,
                         T* biases) {
    if (extent.steps > 0) back<T>(network, extent, before, nullptr, adjoint, weights, biases, nullptr, nullptr);
}

template <Backend B, class T>
void run_backward(const Network<T>& network, const Extent& extent, const T* before, const T* slopes,
                  const T* output_gradient, T* weights, T* biases, T* adjoint, T* initial) {
    if (extent.steps > 0)
        return back(network, extent, before, slopes, output_gradient, weights, biases, adjoint, initial);
    if (extent.batch > 0)
        device::fill_bytes(initial, 0, extent.batch * network.width() * index(sizeof(T)), extent.stream);
}

#define DEEPPCR_INSTANTIATE(T)                                                                                         \
    template void run_chunks_on_gpu(const Network<T>&, const Extent&, const Chunks<T>&);                               \
    template void run<Backend::cuda, T>(const Network<T>&, const Extent&, const T*, T*, T*);                           \
    template void linearise<Backend::cuda, T>(const Network<T>&, const Extent&, const T*, T*, T*, T*);                 \
    template void parameter_gradients<Backend::cuda, T>(const Network<T>&, const Extent&, const T*, const T*, T*, T*); \
    template void run_backward<Backend::cuda, T>(const Network<T>&, const Extent&, const T*, const T*, const T*, T*,   \
                                                 T*, T*, T*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::chain
