// DenseCell by plain loops.
#include <algorithm>
#include <cmath>
#include <vector>

#include "recurrence/dense_cells_kernels.hpp"

namespace deeppcr::dense_cell {
namespace {

template <class T>
T logistic(T z) {
    return 1 / (1 + std::exp(-z));
}
template <class T>
T logistic_slope(T z) {
    return 1 / (1 + std::exp(-z)) / (1 + std::exp(z));
}
template <class T>
T tanh_slope(T z) {
    return 1 - std::tanh(z) * std::tanh(z);
}

/// One step of one sequence, and how the new state depends on what entered it.
template <class T>
struct Step {
    std::vector<T> after;
    /// d after[part * hidden + unit] / d (W_gate h + b_gate)[unit], and / d u_gate[unit], [part, gate, unit].
    std::vector<T> by_product, by_input;
    /// d after[part * hidden + unit] / d before[from * hidden + unit] that does not pass through a gate,
    /// [part, from, unit].
    std::vector<T> direct;

    Step(const Cell<T>& cell, const T* u, const T* before) {
        const index hidden = cell.hidden(), gates = cell.gates(), parts = cell.width() / hidden;
        after.resize(cell.width());
        by_product.resize(parts * gates * hidden);
        direct.resize(parts * parts * hidden);
        std::vector<T> product(gates), reset;
        for (index unit = 0; unit < hidden; ++unit) {
            for (index gate = 0; gate < gates; ++gate) {
                product[gate] = cell.biases(gate, 0, unit);
                for (index in = 0; in < hidden; ++in) product[gate] += cell.weights(gate, unit, in) * before[in];
            }
            const auto z = [&](index gate) { return u[gate * hidden + unit] + product[gate]; };
            const auto slope = [&](index part, index gate) -> T& {
                return by_product[(part * gates + gate) * hidden + unit];
            };
            switch (cell.kind) {
                case DenseCellKind::elman_tanh:
                    after[unit] = std::tanh(z(0));
                    slope(0, 0) = tanh_slope(z(0));
                    break;
                case DenseCellKind::elman_relu:
                    after[unit] = z(0) < 0 ? T(0) : z(0);
                    slope(0, 0) = z(0) > 0 ? T(1) : z(0) <= 0 ? T(0) : z(0);
                    break;
                case DenseCellKind::gru: {
                    const T r = logistic(z(0)), keep = logistic(z(1)),
                            candidate = u[2 * hidden + unit] + r * product[2];
                    const T n = std::tanh(candidate);
                    after[unit] = (1 - keep) * n + keep * before[unit];
                    slope(0, 2) = (1 - keep) * tanh_slope(candidate);  // of u_n; of the product, r times that
                    slope(0, 1) = (before[unit] - n) * logistic_slope(z(1));
                    slope(0, 0) = slope(0, 2) * product[2] * logistic_slope(z(0));
                    direct[unit] = keep;
                    reset.push_back(r);
                    break;
                }
                case DenseCellKind::lstm: {
                    const T i = logistic(z(0)), f = logistic(z(1)), g = std::tanh(z(2)), o = logistic(z(3));
                    const T c = f * before[hidden + unit] + i * g;
                    const T through = o * tanh_slope(c);  // dh / dc
                    after[unit] = o * std::tanh(c);
                    after[hidden + unit] = c;
                    slope(1, 0) = g * logistic_slope(z(0));
                    slope(1, 1) = before[hidden + unit] * logistic_slope(z(1));
                    slope(1, 2) = i * tanh_slope(z(2));
                    for (index gate = 0; gate < 3; ++gate) slope(0, gate) = through * slope(1, gate);
                    slope(0, 3) = std::tanh(c) * logistic_slope(z(3));
                    direct[1 * hidden + unit] = through * f;
                    direct[3 * hidden + unit] = f;
                    break;
                }
            }
        }
        by_input = by_product;
        for (index unit = 0; unit < index(reset.size()); ++unit) by_product[2 * hidden + unit] *= reset[unit];
    }
};

}  // namespace

template <Backend B, class T>
void run(const Cell<T>& cell, const Extent& extent, const T* state, T* trajectory) {
    const index width = cell.width(), row = extent.batch() * width;
    for (index i = 0; i < extent.steps; ++i)
        for (index j = 0; j < extent.batch(); ++j) {
            const T* before = (i == 0 ? state : trajectory + (i - 1) * row) + j * width;
            const Step<T> step(cell, cell.inputs.at(extent.first + i, extent.sequences[std::size_t(j)]), before);
            std::copy_n(step.after.data(), width, trajectory + i * row + j * width);
        }
}

template <Backend B, class T>
void linearise(const Cell<T>& cell, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    const index hidden = cell.hidden(), width = cell.width(), parts = width / hidden, gates = cell.gates();
    for (index at = 0; at < extent.steps * extent.batch(); ++at) {
        const index sequence = extent.sequences[std::size_t(at % extent.batch())];
        const Step<T> step(cell, cell.inputs.at(extent.first + at / extent.batch(), sequence), before + at * width);
        std::copy_n(step.after.data(), width, after + at * width);
        if (jacobian == nullptr && diagonal == nullptr) continue;
        for (index row = 0; row < width; ++row)
            for (index column = 0; column < width; ++column) {
                if (jacobian == nullptr && row != column) continue;
                const index part = row / hidden, unit = row % hidden;
                T entry =
                    column % hidden == unit ? step.direct[(part * parts + column / hidden) * hidden + unit] : T(0);
                for (index gate = 0; gate < gates && column < hidden; ++gate)
                    entry += step.by_product[(part * gates + gate) * hidden + unit] * cell.weights(gate, unit, column);
                if (jacobian != nullptr) jacobian[(at * width + row) * width + column] = entry;
                if (diagonal != nullptr && row == column) diagonal[at * width + row] = entry;
            }
    }
}

template <Backend B, class T>
void backward(const Cell<T>& cell, const Extent& extent, const T* before, const T* gradient, T* inputs, T* weights,
              T* biases, T* state) {
    const index hidden = cell.hidden(), width = cell.width(), parts = width / hidden, gates = cell.gates();
    for (index at = extent.steps * extent.batch() - 1; at >= 0; --at) {
        const index j = at % extent.batch();
        const T* x = before + at * width;
        const Step<T> step(cell, cell.inputs.at(extent.first + at / extent.batch(), extent.sequences[std::size_t(j)]),
                           x);
        std::vector<T> y(gradient + at * width, gradient + (at + 1) * width), previous(width);
        for (index k = 0; k < width && state != nullptr; ++k) y[k] += state[j * width + k];
        for (index unit = 0; unit < hidden; ++unit) {
            for (index part = 0; part < parts; ++part)
                for (index from = 0; from < parts; ++from)
                    previous[from * hidden + unit] +=
                        step.direct[(part * parts + from) * hidden + unit] * y[part * hidden + unit];
            for (index gate = 0; gate < gates; ++gate) {
                T input = 0, delta = 0;
                for (index part = 0; part < parts; ++part) {
                    input += step.by_input[(part * gates + gate) * hidden + unit] * y[part * hidden + unit];
                    delta += step.by_product[(part * gates + gate) * hidden + unit] * y[part * hidden + unit];
                }
                inputs[(at * gates + gate) * hidden + unit] = input;
                biases[gate * hidden + unit] += delta;
                for (index in = 0; in < hidden; ++in) {
                    weights[(gate * hidden + unit) * hidden + in] += delta * x[in];
                    previous[in] += cell.weights(gate, unit, in) * delta;
                }
            }
        }
        if (state != nullptr) std::copy(previous.begin(), previous.end(), state + j * width);
    }
}

#define DEEPPCR_INSTANTIATE(T)                                                                           \
    template void run<Backend::reference, T>(const Cell<T>&, const Extent&, const T*, T*);               \
    template void linearise<Backend::reference, T>(const Cell<T>&, const Extent&, const T*, T*, T*, T*); \
    template void backward<Backend::reference, T>(const Cell<T>&, const Extent&, const T*, const T*, T*, T*, T*, T*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::dense_cell
