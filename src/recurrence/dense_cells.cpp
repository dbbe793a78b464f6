// DenseCell: checks arguments, packs the weights and hands over to the backend.
#include <deeppcr/dense_cells.hpp>

#include <algorithm>
#include <string>

#include "device/threads.hpp"
#include "recurrence/arguments.hpp"
#include "recurrence/dense_cells_kernels.hpp"
#include "recurrence/gather.hpp"

namespace deeppcr {
namespace {

template <class T>
Shape state_shape(DenseCellKind kind, const View<const T>& inputs, const View<const T>& weights) {
    if (kind < DenseCellKind::elman_tanh || kind > DenseCellKind::lstm)
        throw InvalidArgument("kind", "one of DenseCellKind", std::to_string(int(kind)));
    if (weights.width() < 1 || weights.batch() != weights.width() || weights.steps() != gate_count(kind))
        throw InvalidArgument("weights",
                              "one square matrix per gate, [" + std::to_string(gate_count(kind)) + ",hidden,hidden]",
                              to_string(weights.shape()));
    return {inputs.steps(), inputs.batch(), state_width(kind, weights.width())};
}

dense_cell::Extent extent_of(const Section& section) {
    return {section.first,
            section.steps(),
            section.sequences,
            device::thread_count(section.execution),
            section.execution.stream,
            section.workspace};
}

template <class T>
Buffer<T> pack(const dense_cell::Cell<T>& cell) {
    const index hidden = cell.hidden(), size = cell.panel_size(), panel = dense_cell::panel_width<T>;
    Buffer<T> packed(Shape{cell.panel_count(), cell.gates(), size});
    device::parallel_ranges(default_threads(), cell.panel_count(), std::max<index>(1, 65536 / (size * cell.gates())),
                            [&](index first, index last) {
                                for (index unit = first * panel; unit < last * panel; unit += panel)
                                    for (index gate = 0; gate < cell.gates(); ++gate)
                                        chain::pack_panel(
                                            unit, std::min(panel, hidden - unit), panel, hidden,
                                            [&](index out) { return cell.biases(gate, 0, out); },
                                            [&](index out, index in) { return cell.weights(gate, out, in); },
                                            packed.view().at(unit / panel, gate));
                            });
    return packed;
}

}  // namespace

template <class T>
DenseCell<T>::DenseCell(DenseCellKind kind, View<const T> inputs, View<const T> weights, View<const T> biases,
                        View<const T> initial)
    : Recurrence<T>(state_shape(kind, inputs, weights)),
      kind_(kind),
      inputs_(inputs),
      weights_(weights),
      biases_(biases),
      initial_(initial) {
    const Shape& shape = this->shape();
    require_shape("inputs", inputs, {shape.steps, shape.batch, gates() * hidden()});
    require_shape("weights", weights, {gates(), hidden(), hidden()});
    require_shape("biases", biases, {gates(), 1, hidden()});
    require_shape("initial", initial, {1, shape.batch, shape.width});
    on_gpu_ = all_on_gpu<T>({{"inputs", inputs}, {"weights", weights}, {"biases", biases}, {"initial", initial}});
    if (on_gpu_) {
        require_contiguous("weights", weights, weights.shape());
        require_contiguous("biases", biases, biases.shape());
        return;
    }
    packed_ = pack(cell());
}

template <class T>
dense_cell::Cell<T> DenseCell<T>::cell() const {
    return {kind_, inputs_, weights_, biases_, packed_.data()};
}

template <class T>
void DenseCell<T>::initial(const Section& section, View<T> state) const {
    require_section(section, this->shape());
    require_shape("state", state, {1, section.batch(), this->shape().width});
    gather(initial_, section.sequences, state, on_gpu_, section.execution.stream);
}

template <class T>
void DenseCell<T>::step(const Section& section, View<const T> before, View<T> after) const {
    require_states<T>(section, this->shape(), {{"before", before}, {"after", after}});
    on_backend(section, on_gpu_, [&]<Backend B> {
        dense_cell::linearise<B, T>(cell(), extent_of(section), before.data(), after.data(), nullptr, nullptr);
    });
}

template <class T>
void DenseCell<T>::linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const {
    const Shape states = require_states<T>(section, this->shape(), {{"before", before}, {"after", after}});
    require_contiguous_blocks("jacobian", jacobian, states, states.width);
    on_backend(section, on_gpu_, [&]<Backend B> {
        dense_cell::linearise<B, T>(cell(), extent_of(section), before.data(), after.data(), jacobian.data(), nullptr);
    });
}

template <class T>
void DenseCell<T>::linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                                      Jacobian<T> diagonal) const {
    const Shape states = require_states<T>(section, this->shape(), {{"before", before}, {"after", after}});
    require_contiguous_blocks("diagonal", diagonal, states, 1);
    on_backend(section, on_gpu_, [&]<Backend B> {
        dense_cell::linearise<B, T>(cell(), extent_of(section), before.data(), after.data(), nullptr, diagonal.data());
    });
}

template <class T>
void DenseCell<T>::run(const Section& section, View<const T> state, View<T> trajectory) const {
    const Shape states = require_states<T>(section, this->shape(), {{"trajectory", trajectory}});
    require_shape("state", state, {1, states.batch, states.width});
    const ContiguousState<T> from(state, on_gpu_, section.execution.stream);
    on_backend(section, on_gpu_, [&]<Backend B> {
        dense_cell::run<B, T>(cell(), extent_of(section), from.view().data(), trajectory.data());
    });
}

template <class T>
bool DenseCell<T>::run_chunks(const Section& section, const Chunks<T>& chunks) const {
    if (!on_gpu_ || section.execution.backend != Backend::cuda) return false;
    dense_cell::run_chunks_on_gpu(cell(), extent_of(section), chunks);
    return true;
}

template <class T>
void DenseCell<T>::parameter_gradients(const Section& section, View<const T> before, View<const T> adjoint,
                                       View<T> inputs, View<T> weights, View<T> biases) const {
    const Shape states = require_states<T>(section, this->shape(), {{"before", before}, {"adjoint", adjoint}});
    require_contiguous("inputs", inputs, {states.steps, states.batch, gates() * hidden()});
    require_contiguous("weights", weights, {gates(), hidden(), hidden()});
    require_contiguous("biases", biases, {gates(), 1, hidden()});
    on_backend(section, on_gpu_, [&]<Backend B> {
        dense_cell::backward<B, T>(cell(), extent_of(section), before.data(), adjoint.data(), inputs.data(),
                                   weights.data(), biases.data(), nullptr);
    });
}

template <class T>
void DenseCell<T>::run_backward(const Section& section, View<const T> before, View<const T> output_gradient,
                                View<T> inputs, View<T> weights, View<T> biases, View<T> state) const {
    const Shape states =
        require_states<T>(section, this->shape(), {{"before", before}, {"output_gradient", output_gradient}});
    require_contiguous("inputs", inputs, {states.steps, states.batch, gates() * hidden()});
    require_contiguous("weights", weights, {gates(), hidden(), hidden()});
    require_contiguous("biases", biases, {gates(), 1, hidden()});
    require_contiguous("state", state, {1, states.batch, states.width});
    if (states.steps == 0 || states.batch == 0) return;
    on_backend(section, on_gpu_, [&]<Backend B> {
        dense_cell::backward<B, T>(cell(), extent_of(section), before.data(), output_gradient.data(), inputs.data(),
                                   weights.data(), biases.data(), state.data());
    });
}

template class DenseCell<float>;
template class DenseCell<double>;

}  // namespace deeppcr
