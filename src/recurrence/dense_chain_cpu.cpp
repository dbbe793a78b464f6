// DenseChain with SIMD and threads.
//
// A layer is one matrix product (product-inl.hpp), z = W x + b for a group of sequences, followed by one elementwise
// sweep that applies the activation (and its slope, and the skip connection) in place. Every element of a product is
// the same chain of fused multiply-adds whatever its place, so that a single step, a fused run and a linearisation
// agree bit for bit.
//
// `run` takes a group of sequences, small enough for the first-level cache, through all layers before the next group;
// threads take different sequences and never wait for each other. Where layers are wide, threads instead take different
// outputs of the same layer, with a barrier after it, so that the weights are read once.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device/simd.hpp"
#include "device/threads.hpp"
#include "recurrence/dense_chain_kernels.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/dense_chain_cpu.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <hwy/highway.h>

#include "recurrence/activation-inl.hpp"
#include "recurrence/product-inl.hpp"

#ifndef DEEPPCR_RECURRENCE_DENSE_CHAIN_CPU_ONCE
#define DEEPPCR_RECURRENCE_DENSE_CHAIN_CPU_ONCE
namespace deeppcr::chain {

/// The operations of one instruction set, for one type.
template <class T>
struct Kernels {
    decltype(&run<Backend::cpu, T>) run;
    decltype(&linearise<Backend::cpu, T>) linearise;
    decltype(&parameter_gradients<Backend::cpu, T>) parameter_gradients;
    decltype(&run_backward<Backend::cpu, T>) run_backward;
};

/// Work, in multiplications, that is worth waking a thread for: about 10 microseconds.
constexpr index work_per_thread = index(1) << 18;
/// Bytes of states that a group of sequences keeps in the first-level cache.
constexpr index group_bytes = 16384;
/// Jacobians larger than this are written past the caches.
constexpr index stream_bytes = index(1) << 22;
/// Width from which a barrier after each layer is worth sharing the outputs of a layer among threads.
constexpr index wide_layer = 384;

}  // namespace deeppcr::chain
#endif

HWY_BEFORE_NAMESPACE();
namespace deeppcr::chain::HWY_NAMESPACE {

/// out = activation(z), + previous where not null; slopes = activation'(z) where not null. out may be z.
template <Activation activation, bool partial, class D, class T = hn::TFromD<D>>
HWY_INLINE void ActivateVector(D d, index count, const T* z, const T* previous, T* out, T* slopes) {
    using V = hn::Vec<D>;
    V value = Load<partial>(d, z, count);
    if (slopes != nullptr) {
        V slope;
        value = Function<activation>::ValueAndSlope(d, value, slope);
        Store<partial>(d, slope, slopes, count);
    } else {
        value = Function<activation>::Value(d, value);
    }
    if (previous != nullptr) value = hn::Add(Load<partial>(d, previous, count), value);
    Store<partial>(d, value, out, count);
}

template <Activation activation, class T>
HWY_NOINLINE void ActivateAll(index count, const T* z, const T* previous, T* out, T* slopes) {
    const hn::ScalableTag<T> d;
    const index lanes = index(hn::Lanes(d));
    index i = 0;
    for (; i + lanes <= count; i += lanes)
        ActivateVector<activation, false>(d, lanes, z + i, previous != nullptr ? previous + i : nullptr, out + i,
                                          slopes != nullptr ? slopes + i : nullptr);
    if (i < count)
        ActivateVector<activation, true>(d, count - i, z + i, previous != nullptr ? previous + i : nullptr, out + i,
                                         slopes != nullptr ? slopes + i : nullptr);
}

template <class T>
void Activate(Activation activation, index count, const T* z, const T* previous, T* out, T* slopes) {
    switch (activation) {
        case Activation::identity:
            return ActivateAll<Activation::identity>(count, z, previous, out, slopes);
        case Activation::tanh:
            return ActivateAll<Activation::tanh>(count, z, previous, out, slopes);
        case Activation::relu:
            return ActivateAll<Activation::relu>(count, z, previous, out, slopes);
        case Activation::sigmoid:
            return ActivateAll<Activation::sigmoid>(count, z, previous, out, slopes);
        case Activation::gelu:
            return ActivateAll<Activation::gelu>(count, z, previous, out, slopes);
    }
}

/// One layer for some sequences, its outputs first..last only. previous and slopes may be null.
template <class T>
void Layer(const Network<T>& network, index layer, index rows, index first, index last, const T* in, const T* previous,
           T* out, T* slopes) {
    const index width = network.width();
    Multiply<T>({rows, first, last, width, in, width, 1, Right<T>::Panels(network.layer_panels(layer), width, width),
                 nullptr, 0, out, width});
    const bool whole = last - first == width;
    for (index row = 0; row < (whole ? 1 : rows); ++row) {
        const index at = row * width + first;
        Activate(network.activation, whole ? rows * width : last - first, out + at,
                 previous == nullptr ? nullptr : previous + at, out + at, slopes == nullptr ? nullptr : slopes + at);
    }
}

/// One step for some sequences. hidden: the outputs of the layers but the last, [depth - 1, rows, width], its layers
/// `hidden_layer` apart; slopes: of each layer, `slopes_layer` apart, or null.
template <class T>
void Step(const Network<T>& network, index step, index rows, const T* before, T* after, T* hidden, index hidden_layer,
          T* slopes, index slopes_layer) {
    const index depth = network.depth();
    for (index i = 0; i < depth; ++i) {
        const bool last = i + 1 == depth;
        Layer(network, step * depth + i, rows, 0, network.width(), i == 0 ? before : hidden + (i - 1) * hidden_layer,
              last && network.residual() ? before : nullptr, last ? after : hidden + i * hidden_layer,
              slopes == nullptr ? nullptr : slopes + i * slopes_layer);
    }
}

/// Threads that share `work` multiplications.
int ThreadsFor(const Extent& extent, index work) {
    return int(std::clamp<index>(work / work_per_thread, 1, extent.threads));
}

/// Sequences whose states stay in the first-level cache.
template <class T>
index GroupRows(index width) {
    return std::max<index>(32, group_bytes / (width * index(sizeof(T))));
}

/// Threads take different outputs of each layer.
template <class T>
void RunWide(const Network<T>& network, const Extent& extent, int threads, const T* state, T* trajectory, T* slopes) {
    const index width = network.width(), depth = network.depth(), row = extent.batch * width;
    const index panels = (width + panel_width<T> - 1) / panel_width<T>;
    const Buffer<T> hidden = Buffer<T>::uninitialised({depth - 1, extent.batch, width});
    device::Barrier barrier(threads);
    device::run_together(threads, [&](int thread) {
        const index first = panels * thread / threads * panel_width<T>;
        const index last = std::min(width, panels * (thread + 1) / threads * panel_width<T>);
        for (index layer = 0; layer < extent.steps * depth; ++layer) {
            const index step = layer / depth, i = layer % depth;
            const bool end = i + 1 == depth;
            const T* before = step == 0 ? state : trajectory + (step - 1) * row;
            Layer(network, extent.first * depth + layer, extent.batch, first, last,
                  i == 0 ? before : hidden.data() + (i - 1) * row, end && network.residual() ? before : nullptr,
                  end ? trajectory + step * row : hidden.data() + i * row,
                  slopes == nullptr ? nullptr : slopes + layer * row);
            barrier.wait();
        }
    });
}

template <class T>
void Run(const Network<T>& network, const Extent& extent, const T* state, T* trajectory, T* slopes) {
    const index width = network.width(), depth = network.depth(), row = extent.batch * width;
    const index group = std::min(GroupRows<T>(width), extent.batch);
    const int threads = ThreadsFor(extent, extent.steps * depth * row * width);
    if (width >= wide_layer && threads > 1 && extent.batch < threads * tile_rows)
        return RunWide(network, extent, threads, state, trajectory, slopes);
    device::parallel_ranges(threads, extent.batch, tile_rows, [&](index first, index last) {
        Buffer<T> hidden;
        if (depth > 1) hidden = Buffer<T>::uninitialised({depth - 1, group, width});
        for (index j = first; j < last; j += group) {
            const index rows = std::min(group, last - j);
            const T* before = state + j * width;
            for (index i = 0; i < extent.steps; ++i) {
                T* after = trajectory + i * row + j * width;
                Step(network, extent.first + i, rows, before, after, hidden.data(), group * width,
                     slopes == nullptr ? nullptr : slopes + i * depth * row + j * width, row);
                before = after;
            }
        }
    });
}

/// Computes diag(slopes) matrix, + 1 on the diagonal where `residual`, for one matrix after the other.
template <class T>
class RowScaling {
public:
    RowScaling(index width, bool residual) : width_(width), residual_(residual) {
        // A matrix whose rows do not fill a vector is taken as one run of numbers: element e lies in row e / width.
        for (index e = 0; e < width * width && Short(width); ++e) {
            row_of_[e] = Lane(e / width);
            identity_[e] = T(residual && e / width == e % width);
        }
        one_[lanes] = 1;
    }

    /// matrix: rows of `stride`; out: [width,width]. slopes: [width], and readable for a whole vector.
    /// stream: past the caches, where the rows allow it.
    HWY_NOINLINE void operator()(const T* matrix, index stride, const T* slopes, bool stream, T* out) const {
        if (Short(width_) && stride == width_)
            return stream && Aligned(out, width_ * width_) ? Run<true>(matrix, slopes, out)
                                                           : Run<false>(matrix, slopes, out);
        return stream && Aligned(out, width_) ? ByRow<true>(matrix, stride, slopes, out)
                                              : ByRow<false>(matrix, stride, slopes, out);
    }

private:
    using D = hn::ScalableTag<T>;
    using Lane = hn::TFromD<hn::RebindToSigned<D>>;
    static constexpr index lanes = index(hn::MaxLanes(D()));

    static constexpr bool Short(index width) { return width <= lanes && HWY_TARGET != HWY_SCALAR; }
    static bool Aligned(const T* out, index run) {
        return run % lanes == 0 && reinterpret_cast<std::uintptr_t>(out) % (lanes * sizeof(T)) == 0;
    }

    template <bool stream>
    static HWY_INLINE void Put(hn::Vec<D> v, T* to) {
        if constexpr (stream)
            hn::Stream(v, D(), to);
        else
            hn::StoreU(v, D(), to);
    }

    template <bool stream>
    HWY_INLINE void Run(const T* matrix, const T* slopes, T* out) const {
        const D d;
        const auto slope = hn::LoadU(d, slopes);
        const index count = width_ * width_;
        index e = 0;
        const auto scaled = [&](auto entries) HWY_ATTR {
            const auto by_row = hn::TableLookupLanes(slope, hn::SetTableIndices(d, row_of_ + e));
            return hn::MulAdd(by_row, entries, hn::LoadU(d, identity_ + e));
        };
        for (; e + lanes <= count; e += lanes) Put<stream>(scaled(hn::LoadU(d, matrix + e)), out + e);
        if (e < count) Store<true>(d, scaled(Load<true>(d, matrix + e, count - e)), out + e, count - e);
    }

    template <bool stream>
    HWY_INLINE void ByRow(const T* matrix, index stride, const T* slopes, T* out) const {
        const D d;
        for (index o = 0; o < width_; ++o, matrix += stride, out += width_) {
            const auto slope = hn::Set(d, slopes[o]);
            const auto scaled = [&](index c, auto entries) HWY_ATTR {
                if (residual_ && o - c >= 0 && o - c < lanes)
                    return hn::MulAdd(slope, entries, hn::LoadU(d, one_ + lanes - (o - c)));
                return hn::Mul(slope, entries);
            };
            index c = 0;
            for (; c + lanes <= width_; c += lanes) Put<stream>(scaled(c, hn::LoadU(d, matrix + c)), out + c);
            if (c < width_) Store<true>(d, scaled(c, Load<true>(d, matrix + c, width_ - c)), out + c, width_ - c);
        }
    }

    index width_;
    bool residual_;
    HWY_ALIGN Lane row_of_[lanes * lanes] = {};
    HWY_ALIGN T identity_[lanes * lanes] = {};
    HWY_ALIGN T one_[2 * lanes] = {};  // a window of it is a row of the identity
};

template <class T>
void Linearise(const Network<T>& network, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    const index width = network.width(), depth = network.depth(), square = width * width;
    const bool wanted = jacobian != nullptr || diagonal != nullptr;
    const index group = std::min(GroupRows<T>(width), extent.batch);
    const index grain = std::max<index>(1, work_per_thread / (square * depth));
    const RowScaling<T> scale(width, false), scale_last(width, network.residual());
    const bool stream = jacobian != nullptr && extent.steps * extent.batch * square * index(sizeof(T)) > stream_bytes;
    device::parallel_ranges(extent.threads, extent.steps * extent.batch, grain, [&](index first, index last) {
        const Buffer<T> memory = Buffer<T>::uninitialised({1, 1, (2 * depth * group + 1) * width + panel_width<T>});
        const Buffer<T> products = Buffer<T>::uninitialised({depth > 1 || diagonal != nullptr ? 3 : 0, width, width});
        T* const hidden = memory.data();
        T* const slopes = hidden + depth * group * width;
        for (index at = first; at < last;) {
            const index step = extent.first + at / extent.batch;
            const index rows = std::min({group, last - at, extent.batch - at % extent.batch});
            Step(network, step, rows, before + at * width, after + at * width, hidden, group * width,
                 wanted ? slopes : nullptr, group * width);
            for (index j = 0; wanted && j < rows; ++j) {
                const T* matrix = network.weights.at(step * depth, 0);
                index stride = network.weights.batch_stride();
                for (index i = 0; i + 1 < depth; ++i) {
                    T* const scaled = products.data() + square;
                    T* const product = products.data() + 2 * square;
                    scale(matrix, stride, slopes + (i * group + j) * width, false, scaled);
                    Multiply<T>({width, 0, width, width, network.weights.at(step * depth + i + 1, 0),
                                 network.weights.batch_stride(), 1, Right<T>::Rows(scaled, width), nullptr, 0, product,
                                 width});
                    matrix = product;
                    stride = width;
                }
                T* const target = jacobian != nullptr ? jacobian + (at + j) * square : products.data();
                scale_last(matrix, stride, slopes + ((depth - 1) * group + j) * width, stream, target);
                if (diagonal != nullptr)
                    for (index k = 0; k < width; ++k) diagonal[(at + j) * width + k] = target[k * width + k];
            }
            at += rows;
        }
        if (stream) hwy::FlushStream();
    });
}

/// y <- y + gradient (where not null), adjoint = y (where not null), delta = slopes * y.
/// `next` is how far away the slopes and gradients of the next step are, to fetch them ahead of time.
template <class T>
HWY_NOINLINE void Deltas(index count, T* y, const T* gradient, T* adjoint, const T* slopes, T* delta, index next) {
    const hn::ScalableTag<T> d;
    const index lanes = index(hn::Lanes(d));
    const auto part = [&](auto partial, index i) HWY_ATTR {
        constexpr bool p = decltype(partial)::value;
        auto v = Load<p>(d, y + i, count - i);
        if (gradient != nullptr) {
            v = hn::Add(v, Load<p>(d, gradient + i, count - i));
            Store<p>(d, v, y + i, count - i);
            hwy::Prefetch(gradient + i + next);
        }
        if (adjoint != nullptr) Store<p>(d, v, adjoint + i, count - i);
        Store<p>(d, hn::Mul(Load<p>(d, slopes + i, count - i), v), delta + i, count - i);
        hwy::Prefetch(slopes + i + next);
    };
    index i = 0;
    for (; i + lanes <= count; i += lanes) part(std::false_type(), i);
    if (i < count) part(std::true_type(), i);
}

/// previous = start + W^T delta, for `rows` sequences.
template <class T>
void MultiplyTransposed(const Network<T>& network, index layer, index rows, const T* delta, const T* start,
                        T* previous) {
    const index width = network.width();
    Multiply<T>({rows, 0, width, width, delta, width, 1,
                 Right<T>::Rows(network.weights.at(layer, 0), network.weights.batch_stride()), start, width, previous,
                 width});
}

/// weights [width,width] and biases [width]: the sums over the sequences of delta input^T and of delta.
template <class T>
void LayerGradients(index width, index batch, const T* delta, const T* input, T* weights, T* biases) {
    Multiply<T>({width, 0, width, batch, delta, 1, width, Right<T>::Rows(input, width), nullptr, 0, weights, width});
    const T one = 1;
    Multiply<T>({1, 0, width, batch, &one, 0, 0, Right<T>::Rows(delta, width), nullptr, 0, biases, width});
}

/// Some layers' worth of arrays that the backward passes keep between the two halves of their work.
template <class T>
struct Tape {
    Tape(const Network<T>& network, index steps, index batch)
        : row(batch * network.width()),
          depth(network.depth()),
          memory(Buffer<T>::uninitialised({steps * (3 * depth + 1), batch, network.width()})) {}

    T* Deltas(index step) const { return At(step, 0); }             // [depth, batch, width]
    T* Slopes(index step) const { return At(step, depth); }         // [depth, batch, width]
    T* Hidden(index step) const { return At(step, 2 * depth); }     // [depth - 1, batch, width]
    T* After(index step) const { return At(step, 3 * depth - 1); }  // [1, batch, width]
    T* Temporary(index step) const { return At(step, 3 * depth); }  // [1, batch, width]

    index row, depth;

private:
    T* At(index step, index array) const { return memory.data() + (step * (3 * depth + 1) + array) * row; }
    Buffer<T> memory;
};

/// Back through one step for sequences first..last: y (at the step's end, in) becomes the adjoint state before it,
/// where that is wanted. Leaves the deltas of its layers, and what went into them, on the tape. `next`: see Deltas.
template <class T>
void StepBack(const Network<T>& network, index step, index first, index last, const Tape<T>& tape, index slot,
              const T* before, const T* slopes, const T* gradient, T* adjoint, T* y, bool previous_wanted, index next) {
    const index width = network.width(), depth = network.depth(), rows = last - first, row = tape.row;
    const index at = first * width;
    if (slopes == nullptr || depth > 1)
        Step(network, step, rows, before + at, tape.After(slot) + at, tape.Hidden(slot) + at, row,
             slopes == nullptr ? tape.Slopes(slot) + at : nullptr, row);
    if (slopes == nullptr) slopes = tape.Slopes(slot);
    const T* outer = y + at;
    for (index i = depth - 1; i >= 0; --i) {
        T* const delta = tape.Deltas(slot) + i * row + at;
        const bool end = i + 1 == depth, begin = i == 0;
        T* const in = end ? y + at : tape.Temporary(slot) + at;
        Deltas(rows * width, in, end && gradient != nullptr ? gradient + at : nullptr,
               end && adjoint != nullptr ? adjoint + at : nullptr, slopes + i * row + at, delta, next);
        if (begin && !previous_wanted) break;
        MultiplyTransposed(network, step * depth + i, rows, delta, begin && network.residual() ? outer : nullptr,
                           begin ? y + at : tape.Temporary(slot) + at);
    }
}

template <class T>
void StepGradients(const Network<T>& network, index batch, const Tape<T>& tape, index slot, const T* before, T* weights,
                   T* biases) {
    const index width = network.width();
    for (index i = 0; i < network.depth(); ++i)
        LayerGradients(width, batch, tape.Deltas(slot) + i * tape.row,
                       i == 0 ? before : tape.Hidden(slot) + (i - 1) * tape.row, weights + i * width * width,
                       biases + i * width);
}

template <class T>
void ParameterGradients(const Network<T>& network, const Extent& extent, const T* before, const T* adjoint, T* weights,
                        T* biases) {
    const index width = network.width(), depth = network.depth(), row = extent.batch * width;
    const index grain = std::max<index>(1, work_per_thread / std::max<index>(1, 2 * row * width * depth));
    device::parallel_ranges(extent.threads, extent.steps, grain, [&](index first, index last) {
        const Tape<T> tape(network, 1, extent.batch);
        const Buffer<T> y = Buffer<T>::uninitialised({1, extent.batch, width});
        for (index i = first; i < last; ++i) {
            std::copy_n(adjoint + i * row, row, y.data());
            StepBack<T>(network, extent.first + i, 0, extent.batch, tape, 0, before + i * row, nullptr, nullptr,
                        nullptr, y.data(), false, 0);
            StepGradients(network, extent.batch, tape, 0, before + i * row, weights + i * depth * width * width,
                          biases + i * depth * width);
        }
    });
}

template <class T>
void RunBackward(const Network<T>& network, const Extent& extent, const T* before, const T* slopes,
                 const T* output_gradient, T* weights, T* biases, T* adjoint, T* initial) {
    const index width = network.width(), depth = network.depth(), row = extent.batch * width;
    const int threads = ThreadsFor(extent, 2 * extent.steps * depth * row * width);
    // As many steps at a time as keep the tape in the second-level cache.
    const index chunk = std::clamp<index>((index(1) << 18) / std::max<index>(1, row * 2 * depth * index(sizeof(T))), 1,
                                          std::max<index>(1, extent.steps));
    const Tape<T> tape(network, chunk, extent.batch);
    std::fill_n(initial, row, T(0));
    device::Barrier barrier(threads);
    device::run_together(threads, [&](int thread) {
        const index first = extent.batch * thread / threads, last = extent.batch * (thread + 1) / threads;
        for (index end = extent.steps; end > 0; end -= chunk) {
            const index begin = std::max<index>(0, end - chunk);
            for (index i = end - 1; first < last && i >= begin; --i)
                StepBack(network, extent.first + i, first, last, tape, i - begin, before + i * row,
                         slopes == nullptr ? nullptr : slopes + i * depth * row, output_gradient + i * row,
                         adjoint == nullptr ? nullptr : adjoint + i * row, initial, true, i > 0 ? -depth * row : 0);
            barrier.wait();
            for (index i = begin + thread; i < end; i += threads)
                StepGradients(network, extent.batch, tape, i - begin, before + i * row,
                              weights + i * depth * width * width, biases + i * depth * width);
            barrier.wait();
        }
    });
}

const Kernels<float>& FloatKernels() {
    static constexpr Kernels<float> kernels{Run<float>, Linearise<float>, ParameterGradients<float>,
                                            RunBackward<float>};
    return kernels;
}
const Kernels<double>& DoubleKernels() {
    static constexpr Kernels<double> kernels{Run<double>, Linearise<double>, ParameterGradients<double>,
                                             RunBackward<double>};
    return kernels;
}

}  // namespace deeppcr::chain::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace deeppcr::chain {
namespace {

HWY_EXPORT(FloatKernels);
HWY_EXPORT(DoubleKernels);

template <class T>
const Kernels<T>& kernels() {
    device::choose_simd_target();
    if constexpr (sizeof(T) == sizeof(float))
        return HWY_DYNAMIC_DISPATCH(FloatKernels)();
    else
        return HWY_DYNAMIC_DISPATCH(DoubleKernels)();
}

}  // namespace

template <Backend B, class T>
void run(const Network<T>& network, const Extent& extent, const T* state, T* trajectory, T* slopes) {
    if (extent.steps > 0 && extent.batch > 0) kernels<T>().run(network, extent, state, trajectory, slopes);
}

template <Backend B, class T>
void linearise(const Network<T>& network, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal) {
    if (extent.steps > 0 && extent.batch > 0)
        kernels<T>().linearise(network, extent, before, after, jacobian, diagonal);
}

template <Backend B, class T>
void parameter_gradients(const Network<T>& network, const Extent& extent, const T* before, const T* adjoint, T* weights,
                         T* biases) {
    kernels<T>().parameter_gradients(network, extent, before, adjoint, weights, biases);
}

template <Backend B, class T>
void run_backward(const Network<T>& network, const Extent& extent, const T* before, const T* slopes,
                  const T* output_gradient, T* weights, T* biases, T* adjoint, T* initial) {
    kernels<T>().run_backward(network, extent, before, slopes, output_gradient, weights, biases, adjoint, initial);
}

#define DEEPPCR_INSTANTIATE(T)                                                                                        \
    template void run<Backend::cpu, T>(const Network<T>&, const Extent&, const T*, T*, T*);                           \
    template void linearise<Backend::cpu, T>(const Network<T>&, const Extent&, const T*, T*, T*, T*);                 \
    template void parameter_gradients<Backend::cpu, T>(const Network<T>&, const Extent&, const T*, const T*, T*, T*); \
    template void run_backward<Backend::cpu, T>(const Network<T>&, const Extent&, const T*, const T*, const T*, T*,   \
                                                T*, T*, T*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::chain
#endif
