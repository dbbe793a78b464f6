// The activations of dense layers, and their slopes, on a GPU.
#pragma once

#include <cmath>
#include <limits>

#include <deeppcr/dense_chain.hpp>
#include <deeppcr/device.cuh>
#include <deeppcr/scalar.hpp>

namespace deeppcr::chain {

template <class T>
__device__ __forceinline__ T gelu(T z, T& slope) {
    constexpr T root_half = T(0.70710678118654752440), density_at_0 = T(0.39894228040143267794);
    const T cumulative = std::erfc(-z * root_half) / 2, density = std::exp(-z * z / 2) * density_at_0;
    slope = cumulative + (density > 0 ? z * density : density);  // 0 at infinity, NaN stays
    return z == -std::numeric_limits<T>::infinity() ? T(0) : z * cumulative;
}

/// The value, and where `with_slope` is set the slope, at z.
template <class T>
__device__ __forceinline__ T activate(Activation activation, T z, bool with_slope, T& slope) {
    namespace f = scalar_functions;
    switch (activation) {
        case Activation::tanh: {
            const T value = f::hyperbolic_tangent(z);
            slope = 1 - value * value;
            return value;
        }
        case Activation::relu:
            slope = z > 0 ? T(1) : z <= 0 ? T(0) : z;
            return z < 0 ? T(0) : z;
        case Activation::sigmoid: {
            const T value = f::logistic(z);
            if (with_slope) slope = value * f::logistic(-z);
            return value;
        }
        case Activation::gelu:
            return gelu(z, slope);
        default:
            slope = 1;
            return z;
    }
}

}  // namespace deeppcr::chain
