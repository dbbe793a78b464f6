// What the tests of cells on a GPU, or on an emulated one, have in common: a problem there and in main memory.
#pragma once

#include <cmath>

#include <deeppcr/cell.cuh>
#include <deeppcr/deeppcr.hpp>

#include "tests/compare.hpp"
#include "tests/gpu.hpp"

namespace deeppcr {

/// Not built in, the example of the documentation.
struct LeakyTanh {
    static constexpr int states = 1, inputs = 1, parameters = 2;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 2> p) {
        const S a = p[0], w = p[1];
        return {(S(1) - a) * x[0] + a * tanh(w * x[0] + u[0])};
    }
};

/// From large states it overflows; from small ones it does not.
struct Squares {
    static constexpr int states = 1, inputs = 1, parameters = 1;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 1> p) {
        return {p[0] * x[0] * x[0] + u[0]};
    }
};

template <class T, class A>
Buffer<T> stored(const Buffer<A>& wide, Layout layout = Layout::steps_first) {
    Buffer<T> result = Buffer<T>::uninitialised(wide.shape(), layout);
    for (index i = 0; i < wide.shape().steps; ++i)
        for (index j = 0; j < wide.shape().batch; ++j)
            for (index k = 0; k < wide.shape().width; ++k) result(i, j, k) = T(wide(i, j, k));
    return result;
}
template <class T>
Buffer<Arithmetic<T>> widened(const Buffer<T>& narrow) {
    return stored<Arithmetic<T>>(narrow);
}

/// What rounding to T changes of a number of about 1.
template <class T>
constexpr double rounding = std::is_same_v<T, bfloat16>  ? 0x1p-8
                            : std::is_same_v<T, float16> ? 0x1p-11
                            : std::is_same_v<T, float>   ? 2e-5
                                                         : 1e-14;

/// Whether a GPU's tanh is that of its hardware, to 2^-11; the emulation's is not.
template <class T>
constexpr bool has_brief_tanh = std::is_same_v<T, bfloat16>;

/// With enough sequences for tiles, which are taken where every multiprocessor has one: the emulated GPU has three.
inline Shape wide_enough(Shape shape) {
    int multiprocessors = 0;
    cuda::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "looking at a GPU");
    shape.batch *= (multiprocessors + 2) / 3;
    return shape;
}

/// The same problem on the GPU, and in main memory in the numbers that it is computed with.
template <class C, class T>
struct Problem {
    using A = Arithmetic<T>;

    Problem(const Shape& channels, std::uint64_t seed, double scale = 0.5, Layout layout = Layout::steps_first,
            const std::vector<SequenceStart>& starts = {}, bool with_initial = true)
        : parameters(Buffer<A>::random({C::parameters, 1, channels.width}, seed + 1)) {
        for (index i = 0; i < parameters.size(); ++i) parameters.data()[i] *= A(scale);
        Buffer<A> first =
            Buffer<A>::random({1, channels.batch + index(starts.size()), channels.width * C::states}, seed + 2);
        if (std::is_same_v<C, SLSTM>)
            for (index i = 0; i < first.size(); ++i) first.data()[i] = std::abs(first.data()[i]);
        if (C::parameters == 2)
            for (index c = 0; c < channels.width; ++c)
                parameters(0, 0, c) = A(0.5) + A(0.4) * std::sin(parameters(0, 0, c));
        const Buffer<T> narrow_inputs =
            stored<T>(Buffer<A>::random({channels.steps, channels.batch, channels.width * C::inputs}, seed), layout);
        const Buffer<T> narrow_initial = stored<T>(first);
        const Buffer<T> narrow_gradient = stored<T>(
            Buffer<A>::random({channels.steps, channels.batch, channels.width * C::states}, seed + 3), layout);
        inputs = widened(narrow_inputs);
        gradient = widened(narrow_gradient);
        there_inputs = narrow_inputs.on(Device::cuda());
        there_parameters = parameters.on(Device::cuda());
        there_gradient = narrow_gradient.on(Device::cuda());
        if (with_initial) {
            initial = widened(narrow_initial);
            there_initial = narrow_initial.on(Device::cuda());
        }
        here = std::make_unique<CellRecurrence<C, A>>(inputs, parameters, initial, starts);
        there = std::make_unique<CellRecurrence<C, T>>(there_inputs, there_parameters, there_initial, starts);
    }

    std::pair<Buffer<A>, Report> evaluate_there(Options options, Layout layout = Layout::steps_first,
                                                const Buffer<T>& guess = {}) const {
        options.execution = gpu;
        const Buffer<T> trajectory =
            guess.size() > 0 ? guess.on(Device::cuda()) : Buffer<T>(here->shape(), layout, Device::cuda());
        Report report = evaluate(*there, trajectory.view(), options);
        return {widened(trajectory.on(Device::host())), std::move(report)};
    }
    /// The largest max|x_t - f(x_{t-1})|, relative to 1 + max|x_t|, of the first `steps` steps of a sequence.
    double residual(const Buffer<A>& trajectory, index sequence, index steps) const {
        const auto [all, batch, width] = here->shape();
        Buffer<A> before(here->shape()), after(here->shape());
        std::vector<index> sequences;
        for (index j = 0; j < batch; ++j) {
            sequences.push_back(j);
            for (index t = 0; t < all; ++t)
                for (index k = 0; k < width; ++k)
                    before(t, j, k) = t == 0 ? here->initial_state(j)[k] : trajectory(t - 1, j, k);
        }
        here->step({0, all, sequences}, before.view(), after.view());
        double largest = 0;
        for (index t = 0; t < steps; ++t) {
            double apart = 0, size = 0;
            for (index k = 0; k < width; ++k) {
                const double x = trajectory(t, sequence, k), difference = std::abs(x - double(after(t, sequence, k)));
                apart = scalar_functions::larger_or_nan(apart, difference);
                size = std::max(size, std::abs(x));
            }
            largest = scalar_functions::larger_or_nan(largest, apart / (1 + size));
        }
        return largest;
    }
    Buffer<A> expected() const { return evaluate(*here, {.method = Method::sequential}).trajectory; }

    Buffer<A> inputs, parameters, initial, gradient;
    Buffer<T> there_inputs, there_initial, there_gradient;
    Buffer<A> there_parameters;
    std::unique_ptr<CellRecurrence<C, A>> here;
    std::unique_ptr<CellRecurrence<C, T>> there;
};

/// Two sequences of Squares of three channels, of which the last channel of the second begins with `last`: with 1.01 it
/// overflows, with 0 it does not.
struct TwoOfSquares {
    TwoOfSquares(index steps, float last) : inputs({steps, 2, 3}), parameters({1, 1, 3}), initial({1, 2, 3}) {
        std::fill_n(inputs.data(), inputs.size(), 0.1F);
        std::fill_n(parameters.data(), parameters.size(), 1.0F);
        initial(0, 1, 2) = last;
        there_inputs = inputs.on(Device::cuda());
        there_parameters = parameters.on(Device::cuda());
        there_initial = initial.on(Device::cuda());
        here = std::make_unique<CellRecurrence<Squares, float>>(inputs, parameters, initial);
        there = std::make_unique<CellRecurrence<Squares, float>>(there_inputs, there_parameters, there_initial);
    }

    Buffer<float> inputs, parameters, initial, there_inputs, there_parameters, there_initial;
    std::unique_ptr<CellRecurrence<Squares, float>> here, there;
};

}  // namespace deeppcr
