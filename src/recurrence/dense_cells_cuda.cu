// DenseCell on a GPU. W are the gates' matrices, u the gates' inputs, y = dL/dx.
//
//   run             one persistent kernel over all steps (persistent.cuh); up to 64 hidden units the matrices stay in
//                   registers from the first step to the last, wider ones come from the caches again at each step
//   step, Jacobian  all steps side by side: a warp keeps some units' rows of all gates in registers and goes through
//                   states; from the same registers it writes these units' rows of the Jacobians
//   run_backward    the states are known, so only y <- W^T (factors y) is sequential: the factors first, for all steps
//                   side by side; then a persistent kernel with W^T, which leaves the gradients of the gates' sums;
//                   then the parameters' gradients, one product over all steps and sequences, in parts whose sums are
//                   added in their order
//
// Bytes that the memory moves per step and sequence, with G gates and H units, in numbers: run G H + H, run_backward
// about (2 G + 2 F + 4) H, F the factors of a unit (Gates); a Jacobian H^2, of an LSTM 4 H^2.
#include <algorithm>
#include <array>
#include <cstdint>

#include <deeppcr/scalar.hpp>

#include "recurrence/dense_cells_kernels.hpp"
#include "recurrence/gather.hpp"
#include "recurrence/persistent.cuh"

namespace deeppcr::dense_cell {
namespace {

using persistent::Dimensions;
using persistent::Here;
using persistent::Piece;
using persistent::Place;
using persistent::Scratch;

namespace f = scalar_functions;

/// What a kind of cell does with one hidden unit: `products` are W h + b, `old` and `now` the parts of its state. The
/// factors say how the new state depends on what entered:
///   entry(part, gate)   d now[part] / d products[gate]      direct(part, from)   d now[part] / d old[from], past the
///   gates back                from y: gradients of the products and of u; y becomes what passes back past the gates
template <int gates_>
struct Gates;

template <>
struct Gates<1> {  // Elman
    static constexpr int parts = 1, factors = 1;
    bool relu;

    template <class T>
    __device__ __forceinline__ void forward(const T (&products)[1], const T (&u)[1], const T (&)[1], T (&now)[1],
                                            T (&factor)[1]) const {
        const T z = u[0] + products[0];
        now[0] = relu ? (z < 0 ? T(0) : z) : f::hyperbolic_tangent(z);
        factor[0] = relu ? (z > 0 ? T(1) : z <= 0 ? T(0) : z) : 1 - now[0] * now[0];
    }
    template <class T>
    __device__ __forceinline__ static T entry(const T (&factor)[1], int, int) {
        return factor[0];
    }
    template <class T>
    __device__ __forceinline__ static T direct(const T (&)[1], int, int) {
        return T(0);
    }
    template <class T>
    __device__ __forceinline__ static void back(const T (&factor)[1], T (&y)[1], T (&products)[1], T (&u)[1]) {
        products[0] = u[0] = factor[0] * y[0];
        y[0] = T(0);
    }
};

template <>
struct Gates<3> {  // GRU: r, z, n. Factors: by the products of r, z, n; z; by u of n
    static constexpr int parts = 1, factors = 5;
    bool relu;

    template <class T>
    __device__ __forceinline__ void forward(const T (&products)[3], const T (&u)[3], const T (&old)[1], T (&now)[1],
                                            T (&factor)[5]) const {
        const T sum_r = u[0] + products[0], sum_z = u[1] + products[1];
        const T r = f::logistic(sum_r), keep = f::logistic(sum_z), n = f::hyperbolic_tangent(u[2] + r * products[2]);
        now[0] = n + keep * (old[0] - n);
        factor[4] = (1 - keep) * (1 - n * n);
        factor[0] = factor[4] * products[2] * r * f::logistic(-sum_r);
        factor[1] = (old[0] - n) * keep * f::logistic(-sum_z);
        factor[2] = factor[4] * r;
        factor[3] = keep;
    }
    template <class T>
    __device__ __forceinline__ static T entry(const T (&factor)[5], int, int gate) {
        return factor[gate];
    }
    template <class T>
    __device__ __forceinline__ static T direct(const T (&factor)[5], int, int) {
        return factor[3];
    }
    template <class T>
    __device__ __forceinline__ static void back(const T (&factor)[5], T (&y)[1], T (&products)[3], T (&u)[3]) {
        DEEPPCR_UNROLL
        for (int gate = 0; gate < 3; ++gate) products[gate] = u[gate] = factor[gate] * y[0];
        u[2] = factor[4] * y[0];
        y[0] = factor[3] * y[0];
    }
};

template <>
struct Gates<4> {  // LSTM: i, f, g, o. Factors: of c by i, f, g; of h by o; dh/dc; f
    static constexpr int parts = 2, factors = 6;
    bool relu;

    template <class T>
    __device__ __forceinline__ void forward(const T (&products)[4], const T (&u)[4], const T (&old)[2], T (&now)[2],
                                            T (&factor)[6]) const {
        const T sum_i = u[0] + products[0], sum_f = u[1] + products[1], sum_o = u[3] + products[3];
        const T i = f::logistic(sum_i), forget = f::logistic(sum_f), g = f::hyperbolic_tangent(u[2] + products[2]),
                o = f::logistic(sum_o);
        now[1] = forget * old[1] + i * g;
        const T squashed = f::hyperbolic_tangent(now[1]);
        now[0] = o * squashed;
        factor[0] = g * i * f::logistic(-sum_i);
        factor[1] = old[1] * forget * f::logistic(-sum_f);
        factor[2] = i * (1 - g * g);
        factor[3] = squashed * o * f::logistic(-sum_o);
        factor[4] = o * (1 - squashed * squashed);
        factor[5] = forget;
    }
    template <class T>
    __device__ __forceinline__ static T entry(const T (&factor)[6], int part, int gate) {
        return gate == 3 ? (part == 0 ? factor[3] : T(0)) : part == 0 ? factor[4] * factor[gate] : factor[gate];
    }
    template <class T>
    __device__ __forceinline__ static T direct(const T (&factor)[6], int part, int from) {
        return from == 0 ? T(0) : part == 0 ? factor[4] * factor[5] : factor[5];
    }
    template <class T>
    __device__ __forceinline__ static void back(const T (&factor)[6], T (&y)[2], T (&products)[4], T (&u)[4]) {
        const T through = y[1] + factor[4] * y[0];
        DEEPPCR_UNROLL
        for (int gate = 0; gate < 3; ++gate) products[gate] = u[gate] = factor[gate] * through;
        products[3] = u[3] = factor[3] * y[0];
        y[0] = T(0);
        y[1] = factor[5] * through;
    }
};

/// The numbers of a section's sequences: `first` and following ones, or those in a list.
struct Sequences {
    index first;
    const index* list;

    __device__ __forceinline__ index operator[](int j) const { return list == nullptr ? first + j : list[j]; }
};

class SequencesOnGpu {
public:
    explicit SequencesOnGpu(const Extent& extent)
        : list_(consecutive(extent) ? 0 : extent.batch(), extent.stream, extent.workspace) {
        if (list_.data() != nullptr) numbers_on_gpu(extent.sequences, list_.data(), extent.stream);
        sequences_ = {extent.sequences.empty() ? 0 : extent.sequences[0], list_.data()};
    }
    const Sequences& get() const { return sequences_; }

private:
    static bool consecutive(const Extent& extent) {
        for (std::size_t j = 1; j < extent.sequences.size(); ++j)
            if (extent.sequences[j] != extent.sequences[0] + index(j)) return false;
        return true;
    }
    Scratch<index> list_;
    Sequences sequences_{};
};

/// A cell's matrices [gates, rows, columns] and inputs, from the section's first step on.
template <class T>
struct Arrays : Dimensions {
    const T *weights, *biases, *inputs;
    index input_step, input_batch;
    Sequences sequences;
    bool relu;

    __device__ __forceinline__ const T* inputs_at(index step, int sequence) const {
        return inputs + step * input_step + sequences[sequence] * input_batch;
    }
};

template <class T>
Arrays<T> arrays_of(const Cell<T>& cell, const Extent& extent, const SequencesOnGpu& sequences) {
    const index hidden = cell.hidden();
    return {{int(hidden), int(hidden), int(extent.batch()), 1, persistent::rows_aligned(cell.weights.data(), hidden)},
            cell.weights.data(),
            cell.biases.data(),
            cell.inputs.at(extent.first, 0),
            cell.inputs.step_stride(),
            cell.inputs.batch_stride(),
            sequences.get(),
            cell.kind == DenseCellKind::elman_relu};
}

/// x_t = f(x_{t-1}), chunk after chunk of `length` steps side by side, from `state` + chunk * state_stride on.
template <class T, int gates>
struct Forward : Arrays<T> {
    using Number = T;
    using Kind = Gates<gates>;
    static constexpr int matrices = gates, outputs = 1, parts = Kind::parts, carries = parts;
    static constexpr bool constant = true, stops = false;
    struct Operands {
        T u[gates];
    };

    index steps, length;
    const T* state;
    index state_stride;
    T* trajectory;
    index trajectory_step, trajectory_batch;

    __device__ __forceinline__ index items(index chunk) const { return std::min(length, steps - chunk * length); }
    __device__ __forceinline__ T* state_at(index step, int sequence) const {
        return trajectory + step * trajectory_step + sequence * trajectory_batch;
    }
    __device__ __forceinline__ const T* matrix(index, index) const { return this->weights; }
    __device__ __forceinline__ Operands load(index chunk, const Place& place, int sequence, int row) const {
        const T* const u = this->inputs_at(chunk * length + place.item, sequence);
        Operands operands;
        DEEPPCR_UNROLL
        for (int gate = 0; gate < gates; ++gate) operands.u[gate] = u[gate * this->rows + row];
        return operands;
    }
    __device__ __forceinline__ void start(index chunk, int sequence, int row, T* carry, T (&x)[1]) const {
        const T* const from = state + chunk * state_stride + index(sequence) * parts * this->rows;
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) carry[part] = from[part * this->rows + row];
        x[0] = carry[0];
    }
    __device__ __forceinline__ bool finish(index chunk, const Place& place, int sequence, int row,
                                           const T (&sums)[gates], const Operands& operands, T* carry,
                                           T (&x)[1]) const {
        T now[parts];
        advance(row, sums, operands, carry, now);
        T* const to = state_at(chunk * length + place.item, sequence);
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) to[part * this->rows + row] = now[part];
        x[0] = now[0];
        return false;
    }

protected:
    __device__ __forceinline__ void advance(int row, const T (&sums)[gates], const Operands& operands, T* carry,
                                            T (&now)[parts]) const {
        T products[gates], old[parts], factor[Kind::factors];
        DEEPPCR_UNROLL
        for (int gate = 0; gate < gates; ++gate) products[gate] = sums[gate] + this->biases[gate * this->rows + row];
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) old[part] = carry[part];
        Kind{this->relu}.forward(products, operands.u, old, now, factor);
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) carry[part] = now[part];
    }
};

/// The same again from other states, until the old trajectory is met (see Chunks).
template <class T, int gates>
struct Repair : Forward<T, gates> {
    using Base = Forward<T, gates>;
    using Base::parts;
    static constexpr bool stops = true;
    // The state is what the rows carry; x is h alone.
    struct Operands : Base::Operands {
        T old[parts];
    };

    persistent::Meeting<T> meeting;

    __device__ __forceinline__ unsigned asked(index chunk, int first_sequence, int count) const {
        return meeting.asked(chunk, first_sequence, count, this->batch);
    }
    __device__ __forceinline__ Operands load(index chunk, const Place& place, int sequence, int row) const {
        Operands operands{Base::load(chunk, place, sequence, row), {}};
        const T* const old = this->state_at(chunk * this->length + place.item, sequence);
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) operands.old[part] = old[part * this->rows + row];
        return operands;
    }
    __device__ __forceinline__ bool finish(index, const Place&, int, int row, const T (&sums)[gates],
                                           const Operands& operands, T* carry, T (&x)[1]) const {
        T now[parts];
        this->advance(row, sums, operands, carry, now);
        x[0] = now[0];
        bool met = true;
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) met = met && meeting.meets(now[part], operands.old[part]);
        return !met;
    }
    __device__ __forceinline__ void settle(index chunk, index group, int first_sequence, unsigned running, unsigned met,
                                           const T*, int, const T* carry) const {
        const bool last = group + 1 == Base::items(chunk);
        for (int s = 0; running >> s != 0; ++s) {
            if ((running >> s & 1U) == 0) continue;
            T* const old = this->state_at(chunk * this->length + group, first_sequence + s);
            DEEPPCR_UNROLL
            for (int part = 0; part < parts; ++part)
                meeting.settle(chunk, group, first_sequence + s, this->batch, this->rows,
                               carry + index(s) * parts * this->rows + part, parts, old + part * this->rows,
                               (met >> s & 1U) != 0, last);
        }
        __syncthreads();  // before the next step changes what the rows carry
    }
};

/// y through all steps, from the last to the first; the gradients of the gates' sums are x. `weights` are W^T.
template <class T, int gates>
struct Backward : Arrays<T> {
    using Number = T;
    using Kind = Gates<gates>;
    static constexpr int matrices = 1, outputs = gates, parts = Kind::parts, carries = parts;
    static constexpr bool constant = true, stops = false;
    struct Operands {
        T factor[Kind::factors], gradient[parts];
    };

    index steps;
    const T *factors, *gradient;
    T *products, *input_gradient, *state;  // products null: as those of the inputs

    __device__ __forceinline__ index items(index) const { return steps; }
    __device__ __forceinline__ const T* matrix(index, index) const { return this->weights; }
    __device__ __forceinline__ Operands load(index, const Place& place, int sequence, int row) const {
        const index step = steps - 2 - place.item;
        return step >= 0 ? at(step, sequence, row) : Operands{};
    }
    __device__ __forceinline__ void start(index, int sequence, int row, T* carry, T (&x)[gates]) const {
        T y[parts];
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) y[part] = state[(index(sequence) * parts + part) * this->rows + row];
        put(steps - 1, sequence, row, at(steps - 1, sequence, row), y, carry, x);
    }
    __device__ __forceinline__ bool finish(index, const Place& place, int sequence, int row, const T (&sums)[1],
                                           const Operands& operands, T* carry, T (&x)[gates]) const {
        T y[parts];
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) y[part] = carry[part];
        y[0] += sums[0];
        if (place.item + 1 < steps) {
            put(steps - 2 - place.item, sequence, row, operands, y, carry, x);
            return false;
        }
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) state[(index(sequence) * parts + part) * this->rows + row] = y[part];
        DEEPPCR_UNROLL
        for (int gate = 0; gate < gates; ++gate) x[gate] = T(0);
        return false;
    }

private:
    __device__ __forceinline__ Operands at(index step, int sequence, int row) const {
        const index of_state = step * this->batch + sequence;
        Operands operands;
        DEEPPCR_UNROLL
        for (int i = 0; i < Kind::factors; ++i)
            operands.factor[i] = factors[(of_state * Kind::factors + i) * this->rows + row];
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part)
            operands.gradient[part] = gradient[(of_state * parts + part) * this->rows + row];
        return operands;
    }
    __device__ __forceinline__ void put(index step, int sequence, int row, const Operands& operands, T (&y)[parts],
                                        T* carry, T (&x)[gates]) const {
        T of_inputs[gates];
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) y[part] += operands.gradient[part];
        Kind::back(operands.factor, y, x, of_inputs);
        const index of_state = step * this->batch + sequence;
        DEEPPCR_UNROLL
        for (int gate = 0; gate < gates; ++gate) {
            input_gradient[(of_state * gates + gate) * this->rows + row] = of_inputs[gate];
            if (products != nullptr) products[(of_state * gates + gate) * this->rows + row] = x[gate];
        }
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part) carry[part] = y[part];
    }
};

/// What linearise_states writes, each null where it is not wanted.
template <class T>
struct Linearised {
    T *after = nullptr, *jacobian = nullptr, *diagonal = nullptr, *factors = nullptr;
    const T* adjoint = nullptr;  // with the next two: gradients from the adjoint states
    T *products = nullptr, *input_gradient = nullptr;
};

constexpr int states_per_warp = 16;

/// f at all states: a warp for some units and some states.
template <class T, int gates, class L>
__global__ void __launch_bounds__(cuda::plain_threads, sizeof(T) > 4 ? 1 : 2)
    linearise_states(const __grid_constant__ Arrays<T> of, index count, const T* before,
                     const __grid_constant__ Linearised<T> to) {
    using Kind = Gates<gates>;
    constexpr int parts = Kind::parts;
    const int hidden = of.rows, width = parts * hidden, tiles = (hidden + L::warp_rows - 1) / L::warp_rows;
    const index warp = (index(blockIdx.x) * blockDim.x + threadIdx.x) / 32, begin = warp / tiles * states_per_warp;
    if (begin >= count) return;
    const int first_row = int(warp % tiles) * L::warp_rows;
    const Here<L> here(0);
    const int row = first_row + here.row;
    const bool owns = here.owns && row < hidden;
    const bool states_aligned = of.aligned && reinterpret_cast<std::uintptr_t>(before) % 16 == 0;
    const bool rows_aligned = of.aligned && reinterpret_cast<std::uintptr_t>(to.jacobian) % 16 == 0;
    const bool whole = of.columns <= L::columns;

    Piece<T, L, gates> piece;
    piece.load(of.weights, here, first_row, 0, of);
    for (index state = begin; state < std::min(count, begin + states_per_warp); ++state) {
        const T* const x = before + state * width;
        T sums[gates][L::sets]{};
        for (int column = 0; column < of.columns; column += L::columns) {
            if (!whole) piece.load(of.weights, here, first_row, column, of);
            const int first = column + here.first_column();
            T four[4];
            persistent::load_up_to_four(x + first, of.columns - first, states_aligned, four);
            piece.multiply(four, sums);
        }
        T products[gates]{}, u[gates]{}, old[parts]{}, now[parts], factor[Kind::factors];
        const T* const inputs = of.inputs_at(state / of.batch, int(state % of.batch));
        DEEPPCR_UNROLL
        for (int gate = 0; gate < gates; ++gate) {
            const T sum = persistent::add_lanes<L::lanes / 2>(sums[gate], here.part);
            if (row >= hidden) continue;
            products[gate] = sum + of.biases[gate * hidden + row];
            u[gate] = inputs[gate * hidden + row];
        }
        DEEPPCR_UNROLL
        for (int part = 0; part < parts; ++part)
            if (row < hidden) old[part] = x[part * hidden + row];
        Kind{of.relu}.forward(products, u, old, now, factor);
        if (owns && to.after != nullptr) {
            DEEPPCR_UNROLL
            for (int part = 0; part < parts; ++part) to.after[state * width + part * hidden + row] = now[part];
        }
        if (owns && to.factors != nullptr) {
            DEEPPCR_UNROLL
            for (int i = 0; i < Kind::factors; ++i) to.factors[(state * Kind::factors + i) * hidden + row] = factor[i];
        }
        if (owns && to.adjoint != nullptr) {
            T y[parts], of_products[gates], of_inputs[gates];
            DEEPPCR_UNROLL
            for (int part = 0; part < parts; ++part) y[part] = to.adjoint[state * width + part * hidden + row];
            Kind::back(factor, y, of_products, of_inputs);
            DEEPPCR_UNROLL
            for (int gate = 0; gate < gates; ++gate) {
                to.input_gradient[(state * gates + gate) * hidden + row] = of_inputs[gate];
                if (to.products != nullptr) to.products[(state * gates + gate) * hidden + row] = of_products[gate];
            }
        }
        if (to.jacobian == nullptr && to.diagonal == nullptr) continue;
        for (int column = 0; column < of.columns; column += L::columns) {
            if (!whole) piece.load(of.weights, here, first_row, column, of);
            const int first = column + here.first_column(), left = of.columns - first;
            DEEPPCR_UNROLL
            for (int n = 0; n < L::sets; ++n) {
                const int other = first_row + here.first_row + n * L::set_rows;
                T factors[Kind::factors];
                DEEPPCR_UNROLL
                for (int i = 0; i < Kind::factors; ++i) factors[i] = here.from_owner(factor[i], n);
                if (other >= hidden) continue;
                DEEPPCR_UNROLL
                for (int part = 0; part < parts; ++part) {
                    DEEPPCR_UNROLL
                    for (int from = 0; from < parts; ++from) {
                        T four[4];
                        DEEPPCR_UNROLL
                        for (int v = 0; v < 4; ++v) {
                            four[v] = first + v == other ? Kind::direct(factors, part, from) : T(0);
                            if (from > 0) continue;
                            DEEPPCR_UNROLL
                            for (int gate = 0; gate < gates; ++gate)
                                four[v] = persistent::multiply_add(Kind::entry(factors, part, gate),
                                                                   piece.numbers[gate][n][v], four[v]);
                        }
                        const index line = state * width + part * hidden + other;
                        if (to.jacobian != nullptr)
                            persistent::store_up_to_four(to.jacobian + line * width + from * hidden + first, four, left,
                                                         rows_aligned);
                        DEEPPCR_UNROLL
                        for (int v = 0; v < 4; ++v)
                            if (to.diagonal != nullptr && part == from && first + v == other)
                                to.diagonal[line] = four[v];
                    }
                }
            }
        }
    }
}

/// sums[part] = sum over the part's states of deltas x^T, [lines, columns], then of deltas, [lines]: four lines and
/// columns per thread.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    sum_outer_products(index states, int parts, int lines, int columns, int width, const T* deltas, const T* before,
                       T* sums) {
    const int down = (lines + 3) / 4, across = (columns + 3) / 4;
    const index thread = index(blockIdx.x) * blockDim.x + threadIdx.x, part = thread / (index(down) * across);
    if (part >= parts) return;
    const int line = int(thread / across % down) * 4, column = int(thread % across) * 4;
    const index length = (states + parts - 1) / parts, last = std::min(states, (part + 1) * length);
    T products[4][4]{}, total[4]{};
    for (index state = part * length; state < last; ++state) {
        T delta[4], x[4];
        persistent::load_up_to_four(deltas + state * lines + line, lines - line, false, delta);
        persistent::load_up_to_four(before + state * width + column, columns - column, false, x);
        DEEPPCR_UNROLL
        for (int i = 0; i < 4; ++i) {
            total[i] += delta[i];
            DEEPPCR_UNROLL
            for (int j = 0; j < 4; ++j) products[i][j] = persistent::multiply_add(delta[i], x[j], products[i][j]);
        }
    }
    T* const to = sums + part * lines * (columns + 1);
    DEEPPCR_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (line + i >= lines) break;
        persistent::store_up_to_four(to + index(line + i) * columns + column, products[i], columns - column, false);
        if (column == 0) to[index(lines) * columns + line + i] = total[i];
    }
}

/// Adds the parts' sums, in their order.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    add_parts(const T* sums, int parts, index of_weights, index of_biases, T* weights, T* biases) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x, stride = of_weights + of_biases;
    if (i >= stride) return;
    T sum = 0;
    for (int part = 0; part < parts; ++part) sum += sums[part * stride + i];
    T& to = i < of_weights ? weights[i] : biases[i - of_weights];
    to += sum;
}

/// Calls body<gates>().
template <class Body>
void on_gates(DenseCellKind kind, const Body& body) {
    if (kind == DenseCellKind::gru) return body.template operator()<3>();
    if (kind == DenseCellKind::lstm) return body.template operator()<4>();
    body.template operator()<1>();
}

template <class T>
void linearise_all(const Cell<T>& cell, const Extent& extent, const T* before, const Linearised<T>& to) {
    const SequencesOnGpu sequences(extent);
    const Arrays<T> arrays = arrays_of(cell, extent, sequences);
    on_gates(cell.kind, [&]<int gates> {
        persistent::with_layout<true, true>(arrays.rows, arrays.columns, [&]<class L>(L) {
            const index count = extent.steps * extent.batch(), tiles = (arrays.rows + L::warp_rows - 1) / L::warp_rows;
            const index warps = (count + states_per_warp - 1) / states_per_warp * tiles;
            cuda::launch(cuda::one_each(32 * warps, extent.stream), linearise_states<T, gates, L>, arrays, count,
                         before, to);
        });
    });
}

template <class T, int gates>
Forward<T, gates> forward(const Cell<T>& cell, const Extent& extent, const SequencesOnGpu& sequences) {
    Forward<T, gates> rule{};
    static_cast<Arrays<T>&>(rule) = arrays_of(cell, extent, sequences);
    rule.steps = extent.steps;
    return rule;
}

}  // namespace

template <Backend B, class T>
void run(const Cell<T>& cell, const Extent& extent, const T* state, T* trajectory) {
    if (extent.steps == 0 || extent.batch() == 0) return;
    const SequencesOnGpu sequences(extent);
    on_gates(cell.kind, [&]<int gates> {
        Forward<T, gates> rule = forward<T, gates>(cell, extent, sequences);
        rule.length = extent.steps;
        rule.state = state;
        rule.trajectory = trajectory;
        rule.trajectory_step = extent.batch() * cell.width();
        rule.trajectory_batch = cell.width();
        persistent::launch_advance(rule, 1, extent.stream);
    });
}

template <class T>
void run_chunks_on_gpu(const Cell<T>& cell, const Extent& extent, const Chunks<T>& chunks) {
    if (extent.steps == 0 || extent.batch() == 0) return;
    const SequencesOnGpu sequences(extent);
    on_gates(cell.kind, [&]<int gates> {
        Repair<T, gates> rule{};
        static_cast<Forward<T, gates>&>(rule) = forward<T, gates>(cell, extent, sequences);
        rule.length = chunks.length;
        rule.state = chunks.starts.data();
        rule.state_stride = extent.batch() * cell.width();
        rule.trajectory = chunks.trajectory.data();
        rule.trajectory_step = chunks.trajectory.step_stride();
        rule.trajectory_batch = chunks.trajectory.batch_stride();
        rule.meeting = persistent::Meeting<T>(chunks);
        const index count = (extent.steps + chunks.length - 1) / chunks.length;
        if (chunks.asked == nullptr)
            persistent::launch_advance(static_cast<const Forward<T, gates>&>(rule), count, extent.stream);
        else
            persistent::launch_advance(rule, count, extent.stream);
    });
}

template <Backend B, class T>
void linearise(const Cell<T>& cell, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    if (extent.steps == 0 || extent.batch() == 0) return;
    Linearised<T> to;
    to.after = after;
    to.jacobian = jacobian;
    to.diagonal = diagonal;
    linearise_all(cell, extent, before, to);
}

template <Backend B, class T>
void backward(const Cell<T>& cell, const Extent& extent, const T* before, const T* gradient, T* inputs, T* weights,
              T* biases, T* state) {
    if (extent.steps == 0 || extent.batch() == 0) return;
    const index hidden = cell.hidden(), lines = cell.gates() * hidden, states = extent.steps * extent.batch();
    const bool apart = cell.kind == DenseCellKind::gru;  // gradients of sums and inputs
    const Scratch<T> products(apart ? states * lines : 0, extent.stream, extent.workspace);
    Linearised<T> to;
    if (state == nullptr) {
        to.adjoint = gradient;
        to.products = products.data();
        to.input_gradient = inputs;
        linearise_all(cell, extent, before, to);
    } else {
        on_gates(cell.kind, [&]<int gates> {
            const Scratch<T> factors(states * Gates<gates>::factors * hidden, extent.stream, extent.workspace);
            const Scratch<T> transposed(lines * hidden, extent.stream, extent.workspace);
            to.factors = factors.data();
            linearise_all(cell, extent, before, to);
            persistent::transpose(cell.weights.data(), 1, lines, hidden, transposed.data(), extent.stream);
            Backward<T, gates> rule{};
            const SequencesOnGpu sequences(extent);
            static_cast<Arrays<T>&>(rule) = arrays_of(cell, extent, sequences);
            rule.columns = int(lines);
            rule.weights = transposed.data();
            rule.aligned = persistent::rows_aligned(transposed.data(), lines);
            rule.steps = extent.steps;
            rule.factors = factors.data();
            rule.gradient = gradient;
            rule.products = products.data();
            rule.input_gradient = inputs;
            rule.state = state;
            persistent::launch_advance(rule, 1, extent.stream);
        });
    }
    const index blocks = (lines + 3) / 4 * ((hidden + 3) / 4), enough = index(device::multiprocessors()) * 1024;
    const index parts = std::clamp<index>(enough / blocks, 1, (states + 31) / 32);
    const Scratch<T> sums(parts * lines * (hidden + 1), extent.stream, extent.workspace);
    cuda::launch(cuda::one_each(parts * blocks, extent.stream), sum_outer_products<T>, states, int(parts), int(lines),
                 int(hidden), int(cell.width()), apart ? products.data() : inputs, before, sums.data());
    cuda::launch(cuda::one_each(lines * (hidden + 1), extent.stream), add_parts<T>, sums.data(), int(parts),
                 lines * hidden, lines, weights, biases);
}

#define DEEPPCR_INSTANTIATE(T)                                                                      \
    template void run_chunks_on_gpu(const Cell<T>&, const Extent&, const Chunks<T>&);               \
    template void run<Backend::cuda, T>(const Cell<T>&, const Extent&, const T*, T*);               \
    template void linearise<Backend::cuda, T>(const Cell<T>&, const Extent&, const T*, T*, T*, T*); \
    template void backward<Backend::cuda, T>(const Cell<T>&, const Extent&, const T*, const T*, T*, T*, T*, T*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::dense_cell
