// DenseChain by plain loops.
#include <cmath>
#include <limits>
#include <numbers>
#include <utility>
#include <vector>

#include "recurrence/dense_chain_kernels.hpp"

namespace deeppcr::chain {
namespace {

template <class T>
T activate(Activation activation, T z) {
    switch (activation) {
        case Activation::identity:
            return z;
        case Activation::tanh:
            return std::tanh(z);
        case Activation::relu:
            return z < 0 ? T(0) : z;
        case Activation::sigmoid:
            return 1 / (1 + std::exp(-z));
        case Activation::gelu:
            return z == -std::numeric_limits<T>::infinity() ? T(0) : z * std::erfc(-z * T(std::numbers::sqrt2 / 2)) / 2;
    }
    return z;
}

template <class T>
T slope(Activation activation, T z) {
    switch (activation) {
        case Activation::identity:
            return 1;
        case Activation::tanh:
            return 1 - std::tanh(z) * std::tanh(z);
        case Activation::relu:
            return z > 0 ? T(1) : z <= 0 ? T(0) : z;
        case Activation::sigmoid:
            return 1 / (1 + std::exp(-z)) / (1 + std::exp(z));
        case Activation::gelu: {
            const T density = std::exp(-z * z / 2) * T(std::numbers::inv_sqrtpi * std::numbers::sqrt2 / 2);
            return std::erfc(-z * T(std::numbers::sqrt2 / 2)) / 2 + (density > 0 ? z * density : density);
        }
    }
    return z;
}

/// One step of one sequence: what goes into each of its layers, the slopes there, and the new state.
template <class T>
struct Step {
    std::vector<std::vector<T>> input, slopes;
    std::vector<T> after;

    Step(const Network<T>& network, index step, const T* before) {
        const index width = network.width();
        after.assign(before, before + width);
        for (index layer = step * network.depth(); layer < (step + 1) * network.depth(); ++layer) {
            std::vector<T> output(width), derivative(output);
            for (index out = 0; out < width; ++out) {
                T z = network.biases.at(layer, 0)[out];
                for (index in = 0; in < width; ++in) z += network.weights(layer, out, in) * after[in];
                output[out] = activate(network.activation, z);
                derivative[out] = slope(network.activation, z);
            }
            input.push_back(std::exchange(after, output));
            slopes.push_back(derivative);
        }
        if (network.residual())
            for (index i = 0; i < width; ++i) after[i] += before[i];
    }
};

/// Adds one step's part of the parameters' gradients to weights [depth, width, width] and biases [depth, width], and
/// replaces the adjoint state [width] after the step by the one before it.
template <class T>
void back(const Network<T>& network, index step, const Step<T>& values, T* weights, T* biases, T* adjoint) {
    const index width = network.width();
    std::vector<T> gradient(adjoint, adjoint + width);
    for (index layer = network.depth() - 1; layer >= 0; --layer) {
        std::vector<T> previous(width, T(0));
        for (index out = 0; out < width; ++out) {
            const T delta = values.slopes[layer][out] * gradient[out];
            biases[layer * width + out] += delta;
            for (index in = 0; in < width; ++in) {
                weights[(layer * width + out) * width + in] += delta * values.input[layer][in];
                previous[in] += network.weights(step * network.depth() + layer, out, in) * delta;
            }
        }
        gradient = previous;
    }
    for (index i = 0; i < width; ++i) adjoint[i] = (network.residual() ? adjoint[i] : T(0)) + gradient[i];
}

/// jacobian [width,width] of one step.
template <class T>
void multiply_out(const Network<T>& network, index step, const Step<T>& values, T* jacobian) {
    const index width = network.width();
    std::vector<T> product(width * width, T(0));
    for (index i = 0; i < width; ++i) product[i * width + i] = 1;
    for (index layer = 0; layer < network.depth(); ++layer) {
        std::vector<T> next(product.size(), T(0));
        for (index out = 0; out < width; ++out)
            for (index column = 0; column < width; ++column) {
                T sum = 0;
                for (index k = 0; k < width; ++k)
                    sum += network.weights(step * network.depth() + layer, out, k) * product[k * width + column];
                next[out * width + column] = values.slopes[layer][out] * sum;
            }
        product = next;
    }
    if (network.residual())
        for (index i = 0; i < width; ++i) product[i * width + i] += 1;
    std::copy(product.begin(), product.end(), jacobian);
}

}  // namespace

template <Backend B, class T>
void run(const Network<T>& network, const Extent& extent, const T* state, T* trajectory, T* slopes) {
    const index width = network.width(), row = extent.batch * width;
    for (index i = 0; i < extent.steps; ++i)
        for (index j = 0; j < extent.batch; ++j) {
            const T* before = (i == 0 ? state : trajectory + (i - 1) * row) + j * width;
            const Step<T> values(network, extent.first + i, before);
            std::copy(values.after.begin(), values.after.end(), trajectory + i * row + j * width);
            if (slopes != nullptr)
                for (index layer = 0; layer < network.depth(); ++layer)
                    std::copy_n(values.slopes[layer].data(), width,
                                slopes + (i * network.depth() + layer) * row + j * width);
        }
}

template <Backend B, class T>
void linearise(const Network<T>& network, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    const index width = network.width();
    std::vector<T> block(width * width);
    for (index i = 0; i < extent.steps; ++i)
        for (index j = 0; j < extent.batch; ++j) {
            const index at = i * extent.batch + j;
            const Step<T> values(network, extent.first + i, before + at * width);
            std::copy(values.after.begin(), values.after.end(), after + at * width);
            if (jacobian == nullptr && diagonal == nullptr) continue;
            multiply_out(network, extent.first + i, values, block.data());
            if (jacobian != nullptr) std::copy(block.begin(), block.end(), jacobian + at * width * width);
            if (diagonal != nullptr)
                for (index k = 0; k < width; ++k) diagonal[at * width + k] = block[k * width + k];
        }
}

template <Backend B, class T>
void parameter_gradients(const Network<T>& network, const Extent& extent, const T* before, const T* adjoint, T* weights,
                         T* biases) {
    const index width = network.width(), depth = network.depth();
    std::fill_n(weights, extent.steps * depth * width * width, T(0));
    std::fill_n(biases, extent.steps * depth * width, T(0));
    for (index i = 0; i < extent.steps; ++i)
        for (index j = 0; j < extent.batch; ++j) {
            const index at = (i * extent.batch + j) * width;
            std::vector<T> gradient(adjoint + at, adjoint + at + width);
            back(network, extent.first + i, Step<T>(network, extent.first + i, before + at),
                 weights + i * depth * width * width, biases + i * depth * width, gradient.data());
        }
}

template <Backend B, class T>
void run_backward(const Network<T>& network, const Extent& extent, const T* before, const T* /*slopes*/,
                  const T* output_gradient, T* weights, T* biases, T* adjoint, T* initial) {
    const index width = network.width(), depth = network.depth(), row = extent.batch * width;
    std::fill_n(weights, extent.steps * depth * width * width, T(0));
    std::fill_n(biases, extent.steps * depth * width, T(0));
    std::fill_n(initial, row, T(0));
    for (index i = extent.steps - 1; i >= 0; --i) {
        for (index k = 0; k < row; ++k) initial[k] += output_gradient[i * row + k];
        if (adjoint != nullptr) std::copy_n(initial, row, adjoint + i * row);
        for (index j = 0; j < extent.batch; ++j)
            back(network, extent.first + i, Step<T>(network, extent.first + i, before + i * row + j * width),
                 weights + i * depth * width * width, biases + i * depth * width, initial + j * width);
    }
}

#define DEEPPCR_INSTANTIATE(T)                                                                                         \
    template void run<Backend::reference, T>(const Network<T>&, const Extent&, const T*, T*, T*);                      \
    template void linearise<Backend::reference, T>(const Network<T>&, const Extent&, const T*, T*, T*, T*);            \
    template void parameter_gradients<Backend::reference, T>(const Network<T>&, const Extent&, const T*, const T*, T*, \
                                                             T*);                                                      \
    template void run_backward<Backend::reference, T>(const Network<T>&, const Extent&, const T*, const T*, const T*,  \
                                                      T*, T*, T*, T*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::chain
