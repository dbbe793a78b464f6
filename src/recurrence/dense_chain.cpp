// DenseChain: checks arguments, packs the weights and hands over to the backend.
#include <deeppcr/dense_chain.hpp>

#include <algorithm>
#include <string>

#include "device/threads.hpp"
#include "recurrence/arguments.hpp"
#include "recurrence/dense_chain_kernels.hpp"
#include "recurrence/gather.hpp"

namespace deeppcr {
namespace {

template <class T>
Shape state_shape(const View<const T>& weights, const View<const T>& initial, index skip) {
    if (skip < 0) throw InvalidArgument("options.skip", "0 or more", std::to_string(skip));
    const index depth = std::max<index>(skip, 1);
    if (weights.width() < 1 || weights.batch() != weights.width())
        throw InvalidArgument("weights", "square layers, [layers,width,width]", to_string(weights.shape()));
    if (weights.steps() < 0 || weights.steps() % depth != 0)
        throw InvalidArgument("weights", "a multiple of skip = " + std::to_string(skip) + " layers",
                              std::to_string(weights.steps()) + " layers");
    return {weights.steps() / depth, initial.batch(), weights.width()};
}

template <class T>
void require_parameters(const View<T>& weights, const View<T>& biases, index layers, index width) {
    require_contiguous("weights", weights, {layers, width, width});
    require_contiguous("biases", biases, {layers, 1, width});
}

chain::Extent extent_of(const Section& section) {
    return {section.first,
            section.steps(),
            section.batch(),
            device::thread_count(section.execution),
            section.execution.stream,
            section.workspace};
}

template <class T>
Buffer<T> pack(const View<const T>& weights, const View<const T>& biases) {
    using Network = chain::Network<T>;
    const index width = weights.width(), panel = chain::panel_width<T>, layer_elements = Network::layer_elements(width);
    Buffer<T> packed(Shape{weights.steps(), 1, layer_elements});
    device::parallel_ranges(default_threads(), weights.steps(), std::max<index>(1, 65536 / layer_elements),
                            [&](index first, index last) {
                                for (index layer = first; layer < last; ++layer) {
                                    T* out = packed.view().at(layer, 0);
                                    for (index column = 0; column < width; column += panel) {
                                        const bool full = column + panel <= width;
                                        const index stride = full ? panel : chain::narrow_width<T>(width);
                                        chain::pack_panel(
                                            column, full ? panel : width - column, stride, width,
                                            [&](index i) { return biases(layer, 0, i); },
                                            [&](index i, index in) { return weights(layer, i, in); }, out);
                                        out += stride * (width + 1);
                                    }
                                }
                            });
    return packed;
}

}  // namespace

template <class T>
DenseChain<T>::DenseChain(View<const T> weights, View<const T> biases, View<const T> initial, const Options& options)
    : Recurrence<T>(state_shape(weights, initial, options.skip)),
      weights_(weights),
      biases_(biases),
      initial_(initial),
      options_(options) {
    const Shape& shape = this->shape();
    require_shape("weights", weights, {weights.steps(), shape.width, shape.width});
    require_shape("biases", biases, {weights.steps(), 1, shape.width});
    require_shape("initial", initial, {1, shape.batch, shape.width});
    if (options.activation < Activation::identity || options.activation > Activation::gelu)
        throw InvalidArgument("options.activation", "one of Activation", std::to_string(int(options.activation)));
    on_gpu_ = all_on_gpu<T>({{"weights", weights}, {"biases", biases}, {"initial", initial}});
    if (on_gpu_) {
        require_parameters(weights, biases, weights.steps(), shape.width);
        return;
    }
    packed_ = pack(weights_, biases_);
}

template <class T>
chain::Network<T> DenseChain<T>::network() const {
    return {weights_, biases_, packed_.data(), options_.activation, options_.skip};
}

template <class T>
void DenseChain<T>::initial(const Section& section, View<T> state) const {
    require_section(section, this->shape());
    require_shape("state", state, {1, section.batch(), this->shape().width});
    gather(initial_, section.sequences, state, on_gpu_, section.execution.stream);
}

template <class T>
void DenseChain<T>::step(const Section& section, View<const T> before, View<T> after) const {
    require_states<T>(section, this->shape(), {{"before", before}, {"after", after}});
    on_backend(section, on_gpu_, [&]<Backend B> {
        chain::linearise<B, T>(network(), extent_of(section), before.data(), after.data(), nullptr, nullptr);
    });
}

template <class T>
void DenseChain<T>::linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const {
    const Shape states = require_states<T>(section, this->shape(), {{"before", before}, {"after", after}});
    require_contiguous_blocks("jacobian", jacobian, states, states.width);
    on_backend(section, on_gpu_, [&]<Backend B> {
        chain::linearise<B, T>(network(), extent_of(section), before.data(), after.data(), jacobian.data(), nullptr);
    });
}

template <class T>
void DenseChain<T>::linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                                       Jacobian<T> diagonal) const {
    const Shape states = require_states<T>(section, this->shape(), {{"before", before}, {"after", after}});
    require_contiguous_blocks("diagonal", diagonal, states, 1);
    on_backend(section, on_gpu_, [&]<Backend B> {
        chain::linearise<B, T>(network(), extent_of(section), before.data(), after.data(), nullptr, diagonal.data());
    });
}

template <class T>
void DenseChain<T>::run(const Section& section, View<const T> state, View<T> trajectory) const {
    run_with_slopes(section, state, trajectory, {});
}

template <class T>
void DenseChain<T>::run_with_slopes(const Section& section, View<const T> state, View<T> trajectory,
                                    View<T> slopes) const {
    const Shape states = require_states<T>(section, this->shape(), {{"trajectory", trajectory}});
    require_shape("state", state, {1, states.batch, states.width});
    if (slopes.data() != nullptr)
        require_contiguous("slopes", slopes, {states.steps * network().depth(), states.batch, states.width});
    const ContiguousState<T> copy(state, on_gpu_, section.execution.stream);
    state = copy.view();
    on_backend(section, on_gpu_, [&]<Backend B> {
        chain::run<B, T>(network(), extent_of(section), state.data(), trajectory.data(), slopes.data());
    });
}

template <class T>
bool DenseChain<T>::run_chunks(const Section& section, const Chunks<T>& chunks) const {
    if (!on_gpu_ || section.execution.backend != Backend::cuda) return false;
    chain::run_chunks_on_gpu(network(), extent_of(section), chunks);
    return true;
}

template <class T>
void DenseChain<T>::parameter_gradients(const Section& section, View<const T> before, View<const T> adjoint,
                                        View<T> weights, View<T> biases) const {
    const Shape states = require_states<T>(section, this->shape(), {{"before", before}, {"adjoint", adjoint}});
    require_parameters(weights, biases, states.steps * network().depth(), states.width);
    on_backend(section, on_gpu_, [&]<Backend B> {
        chain::parameter_gradients<B, T>(network(), extent_of(section), before.data(), adjoint.data(), weights.data(),
                                         biases.data());
    });
}

template <class T>
void DenseChain<T>::run_backward(const Section& section, View<const T> before, View<const T> slopes,
                                 View<const T> output_gradient, View<T> weights, View<T> biases, View<T> adjoint,
                                 View<T> initial) const {
    const Shape states =
        require_states<T>(section, this->shape(), {{"before", before}, {"output_gradient", output_gradient}});
    const index layers = states.steps * network().depth();
    if (slopes.data() != nullptr) require_contiguous("slopes", slopes, {layers, states.batch, states.width});
    require_parameters(weights, biases, layers, states.width);
    if (adjoint.data() != nullptr) require_contiguous("adjoint", adjoint, states);
    require_contiguous("initial", initial, {1, states.batch, states.width});
    on_backend(section, on_gpu_, [&]<Backend B> {
        chain::run_backward<B, T>(network(), extent_of(section), before.data(), slopes.data(), output_gradient.data(),
                                  weights.data(), biases.data(), adjoint.data(), initial.data());
    });
}

template class DenseChain<float>;
template class DenseChain<double>;

}  // namespace deeppcr
