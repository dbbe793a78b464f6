#include "nn/jacobian_growth.hpp"

#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <utility>

#include <deeppcr/cells.hpp>

namespace deeppcr::nn {
namespace {

using at::Tensor;

/// a + b and a * b, where undefined is 0.
Tensor sum(const Tensor& a, const Tensor& b) { return !a.defined() ? b : b.defined() ? a + b : a; }
Tensor product(const Tensor& a, const Tensor& b) { return a.defined() && b.defined() ? a * b : Tensor(); }

/// What a Cell's step computes with: the numbers of all steps, sequences and channels at once, with their derivatives
/// in `n` directions, undefined where 0.
template <std::size_t n>
struct TensorDual {
    Tensor value;
    std::array<Tensor, n> derivative;

    explicit TensorDual(Tensor numbers) : value(std::move(numbers)) {}
    explicit TensorDual(double number) : value(at::scalar_tensor(number)) {}

    /// f, given the slope of f at a.
    static TensorDual chain(Tensor f, const Tensor& slope, const TensorDual& a) {
        TensorDual result(std::move(f));
        for (std::size_t i = 0; i < n; ++i) result.derivative[i] = product(slope, a.derivative[i]);
        return result;
    }
    friend TensorDual operator+(const TensorDual& a, const TensorDual& b) {
        TensorDual result(a.value + b.value);
        for (std::size_t i = 0; i < n; ++i) result.derivative[i] = sum(a.derivative[i], b.derivative[i]);
        return result;
    }
    friend TensorDual operator-(const TensorDual& a) {
        TensorDual result(-a.value);
        for (std::size_t i = 0; i < n; ++i)
            if (a.derivative[i].defined()) result.derivative[i] = -a.derivative[i];
        return result;
    }
    friend TensorDual operator-(const TensorDual& a, const TensorDual& b) { return a + -b; }
    friend TensorDual operator*(const TensorDual& a, const TensorDual& b) {
        TensorDual result(a.value * b.value);
        for (std::size_t i = 0; i < n; ++i)
            result.derivative[i] = sum(product(a.derivative[i], b.value), product(a.value, b.derivative[i]));
        return result;
    }
    friend TensorDual operator/(const TensorDual& a, const TensorDual& b) {
        const Tensor slope = 1 / b.value;
        return a * chain(slope, -slope * slope, b);
    }
    friend TensorDual exp(const TensorDual& a) {
        const Tensor f = at::exp(a.value);
        return chain(f, f, a);
    }
    friend TensorDual sigmoid(const TensorDual& a) {
        const Tensor f = at::sigmoid(a.value);
        return chain(f, f * (1 - f), a);
    }
    friend TensorDual tanh(const TensorDual& a) {
        const Tensor f = at::tanh(a.value);
        return chain(f, 1 - f * f, a);
    }
    friend TensorDual softplus(const TensorDual& a) { return chain(at::softplus(a.value), at::sigmoid(a.value), a); }
    friend TensorDual max(const TensorDual& a, const TensorDual& b) {
        const Tensor first = a.value > b.value;
        TensorDual result(at::where(first, a.value, b.value));
        for (std::size_t i = 0; i < n; ++i) {
            const Tensor &da = a.derivative[i], &db = b.derivative[i];
            if (da.defined() || db.defined())
                result.derivative[i] = sum(product(first, da), product(first.logical_not(), db));
        }
        return result;
    }
};

/// Entries of matrices, undefined where 0; each [steps, sequences, channels].
template <std::size_t n>
using Matrices = std::array<std::array<Tensor, n>, n>;

template <class Cell>
auto jacobians(const CellTensors& layer) {
    constexpr std::size_t states = Cell::states, inputs = Cell::inputs, parameters = Cell::parameters;
    using Number = TensorDual<states>;
    const index steps = layer.states.size(0), sequences = layer.states.size(1);
    const auto wide = [](const Tensor& numbers) {
        return numbers.to(c10::promoteTypes(numbers.scalar_type(), at::kFloat));
    };
    const Tensor all = wide(layer.states).view({steps, sequences, -1, index(states)});
    const Tensor first = layer.initial.defined() ? wide(layer.initial).view({1, sequences, -1, index(states)})
                                                 : at::zeros_like(all.narrow(0, 0, 1));
    const Tensor before = at::cat({first, all.narrow(0, 0, steps - 1)});
    const std::vector<Tensor> gates = wide(layer.gates).chunk(index(inputs), 2);
    const auto numbers = [&]<std::size_t... i>(std::index_sequence<i...>, const auto& part) {
        return std::array{Number(part(index(i)))...};
    };
    auto x = numbers(std::make_index_sequence<states>(), [&](index i) { return before.select(3, i); });
    for (std::size_t i = 0; i < states; ++i) x[i].derivative[i] = at::ones({}, before.options());
    const auto next = Cell::step(
        x, numbers(std::make_index_sequence<inputs>(), [&](index i) { return gates[std::size_t(i)]; }),
        numbers(std::make_index_sequence<parameters>(), [&](index i) { return wide(layer.parameters).select(0, i); }));
    Matrices<states> result;
    for (std::size_t i = 0; i < states; ++i)
        for (std::size_t j = 0; j < states; ++j)
            if (next[i].derivative[j].defined()) result[i][j] = next[i].derivative[j].expand_as(before.select(3, 0));
    return result;
}

template <std::size_t n>
Matrices<n> map(const Matrices<n>& matrices, const auto& function) {
    Matrices<n> result;
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            if (matrices[i][j].defined()) result[i][j] = function(matrices[i][j]);
    return result;
}

/// Each step's matrix times that of the step before, for every second step.
template <std::size_t n>
Matrices<n> pairs(const Matrices<n>& matrices) {
    const Matrices<n> earlier = map(matrices, [](const Tensor&entry) { return entry.slice(0, 0, {}, 2); }),
                      later = map(matrices, [](const Tensor&entry) { return entry.slice(0, 1, {}, 2); });
    Matrices<n> result;
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            for (std::size_t k = 0; k < n; ++k) result[i][j] = sum(result[i][j], product(later[i][k], earlier[k][j]));
    return result;
}

template <class Cell>
Tensor growth(const CellTensors& layer, double rate) {
    constexpr std::size_t states = Cell::states;
    const index steps = layer.states.size(0);
    index window = 16;
    while (window > steps) window /= 2;
    Matrices<states> matrices =
        map(jacobians<Cell>(layer), [&](const Tensor& entry) { return entry.narrow(0, 0, steps / window * window); });
    for (index length = 1; length < window; length *= 2) matrices = pairs(matrices);
    Tensor squares;
    for (const auto& row : matrices)
        for (const Tensor& entry : row)
            if (entry.defined()) squares = sum(squares, entry.square());
    // What grows slower has no gradient: a norm of 0 must not get one through the logarithm.
    const double least = std::exp(2 * double(window) * rate);
    return at::log(at::clamp_min(squares / double(states), least) / least).mean() / double(2 * window);
}

}  // namespace

Tensor jacobian_growth(CellKind kind, const CellTensors& layer, double rate) {
    switch (kind) {
        case CellKind::para_gru:
            return growth<deeppcr::ParaGRU>(layer, rate);
        case CellKind::para_lstm:
            return growth<deeppcr::ParaLSTM>(layer, rate);
        case CellKind::diagonal_elman:
            return growth<DiagonalElman>(layer, rate);
        case CellKind::slstm:
            break;
    }
    return growth<deeppcr::SLSTM>(layer, rate);
}

}  // namespace deeppcr::nn
