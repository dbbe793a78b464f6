// ChannelwiseRecurrence: the callbacks of a Recurrence, on top of run_rows.

#include <deeppcr/cell.hpp>

#include <algorithm>
#include <string>
#include <utility>

#include "device/cuda.hpp"
#include "device/simd.hpp"
#include "device/threads.hpp"
#include "recurrence/cell_rows.hpp"
#include "recurrence/device_cells.hpp"
#include "recurrence/states.hpp"

namespace deeppcr {

namespace cell {
int vector_bits() {
    const std::string target = simd_target();
    if (target.rfind("AVX3", 0) == 0) return 512;
    return target == "AVX2" ? 256 : 0;
}
}  // namespace cell

namespace {

Shape states_shape(const Shape& inputs, int gates, int states) {
    if (inputs.width % gates != 0 || inputs.width == 0)
        throw InvalidArgument("inputs", "a width that is a multiple of " + std::to_string(gates) + " gates",
                              to_string(inputs));
    return {inputs.steps, inputs.batch, inputs.width / gates * states};
}

std::vector<SequencePart> parts_of(const Shape& shape, const std::vector<SequenceStart>& starts) {
    std::vector<SequencePart> parts;
    std::size_t next = 0;
    for (index j = 0; j < shape.batch; ++j) {
        parts.push_back({j, 0, shape.steps});
        for (; next < starts.size() && starts[next].sequence == j; ++next) {
            const index step = starts[next].step;
            if (step == 0 && parts.back().first == 0 && parts.back().last == shape.steps) continue;
            if (step <= parts.back().first || step >= shape.steps)
                throw InvalidArgument("starts[" + std::to_string(next) + "].step",
                                      "more than the start before it (" + std::to_string(parts.back().first) +
                                          ") and less than the number of steps " + std::to_string(shape.steps),
                                      std::to_string(step));
            parts.back().last = step;
            parts.push_back({j, step, shape.steps});
        }
    }
    if (next < starts.size())
        throw InvalidArgument("starts[" + std::to_string(next) + "].sequence",
                              "a row of the batch of " + std::to_string(shape.batch) + ", in ascending order",
                              std::to_string(starts[next].sequence));
    return parts;
}

}  // namespace

template <class T>
ChannelwiseRecurrence<T>::ChannelwiseRecurrence(const cell::Kernels<T>& kernels, View<const T> inputs,
                                                View<const Arithmetic<T>> parameters, View<const T> initial,
                                                const std::vector<SequenceStart>& starts)
    : Recurrence<T>(states_shape(inputs.shape(), kernels.inputs, kernels.states), kernels.states),
      kernels_(kernels),
      inputs_(inputs),
      parameters_(parameters),
      initial_(initial),
      channels_(inputs.width() / kernels.inputs),
      parts_(parts_of(inputs.shape(), starts)) {
    if (inputs.data() == nullptr && inputs.shape().count() > 0)
        throw InvalidArgument("inputs", "memory of shape " + to_string(inputs.shape()), "a null pointer");
    const Shape expected{kernels.parameters, 1, channels_};
    if (parameters.shape() != expected || !parameters.contiguous() || parameters.data() == nullptr)
        throw InvalidArgument("parameters", "a contiguous array of shape " + to_string(expected),
                              to_string(parameters.shape()));
    const Shape states{1, index(parts_.size()), this->shape().width};
    if (initial.data() == nullptr && initial.shape().count() == 0) {
        zeros_ = Buffer<T>(states);
        initial_ = zeros_.view();
    } else if (initial.shape() != states || initial.data() == nullptr) {
        throw InvalidArgument("initial", "one state for each sequence, " + to_string(states),
                              to_string(initial.shape()));
    }
    for (const SequenceStart& start : starts)
        if (start.step == 0) named_first_steps_.push_back(start.sequence);
    for (index part = 0; part < index(parts_.size()); ++part)
        if (parts_[std::size_t(part)].first == 0) first_part_.push_back(part);
}

namespace {

/// A segment's recurrence, which keeps the states that it starts from.
template <class T>
class Segment final : public ChannelwiseRecurrence<T> {
public:
    Segment(const cell::Kernels<T>& kernels, View<const T> inputs, View<const Arithmetic<T>> parameters,
            Buffer<T> initial, const std::vector<SequenceStart>& starts)
        : ChannelwiseRecurrence<T>(kernels, inputs, parameters, initial.view(), starts), initial_(std::move(initial)) {}

private:
    Buffer<T> initial_;
};

}  // namespace

namespace {

/// With Backend::cuda: throws InvalidArgument where kernels cannot read states.
template <class T>
void check_device(const std::string& name, const View<const T>& states, const Execution& execution) {
    if (execution.backend == Backend::cuda && !states.empty()) device::require_on_gpu(name, states.data());
}

}  // namespace

template <class T>
std::unique_ptr<ChannelwiseRecurrence<T>> ChannelwiseRecurrence<T>::segment(index first, index last,
                                                                            View<const T> before,
                                                                            const Execution& execution) const {
    const Shape& shape = this->shape();
    if (first < 0 || first >= last || last > shape.steps)
        throw InvalidArgument("segment", "0 <= first < last <= " + std::to_string(shape.steps),
                              std::to_string(first) + " and " + std::to_string(last));
    if (before.shape() != Shape{1, shape.batch, shape.width} || before.data() == nullptr)
        throw InvalidArgument("before", to_string(Shape{1, shape.batch, shape.width}), to_string(before.shape()));
    check_device("before", before, execution);
    check_device("initial", initial_states(), execution);
    std::vector<SequenceStart> starts;
    std::vector<View<const T>> states;
    bool none_begins = true;  // here
    for (index p = 0; p < index(parts_.size()); ++p) {
        const SequencePart& part = parts_[std::size_t(p)];
        if (part.last <= first || part.first >= last) continue;
        const bool goes_on = part.first < first || part.first == 0;  // from `before`
        none_begins = none_begins && goes_on;
        states.push_back(goes_on                    ? before.sequences(part.sequence, part.sequence + 1)
                         : initial_states().empty() ? View<const T>()
                                                    : initial_.sequences(p, p + 1));
        if (part.first > first) starts.push_back({part.sequence, part.first - first});
    }
    const index count = index(states.size());
    Buffer<T> initial({1, count, shape.width}, Layout::steps_first, detail::device_of(execution));
    if (none_begins)
        copy_states<T>(before, initial.view(), execution);
    else if (starts.empty() && count == index(parts_.size()))
        copy_states<T>(initial_states(), initial.view(), execution);
    else
        for (index p = 0; p < count; ++p)
            copy_states<T>(states[std::size_t(p)], initial.view().sequences(p, p + 1), execution);
    return std::make_unique<Segment<T>>(kernels_, inputs_.steps(first, last), parameters_, std::move(initial), starts);
}

template <class T>
Buffer<T> ChannelwiseRecurrence<T>::final_states(View<const T> trajectory, const Execution& execution) const {
    if (trajectory.shape() != this->shape())
        throw InvalidArgument("trajectory", "the recurrence's shape " + to_string(this->shape()),
                              to_string(trajectory.shape()));
    check_device("trajectory", trajectory, execution);
    const index steps = this->shape().steps, count = index(parts_.size());
    Buffer<T> result({1, count, this->shape().width}, Layout::steps_first, detail::device_of(execution));
    if (count == this->shape().batch && steps > 0) {
        copy_states<T>(trajectory.steps(steps - 1, steps), result.view(), execution);
        return result;
    }
    for (index p = 0; p < count; ++p) {
        const SequencePart& part = parts_[std::size_t(p)];
        const View<T> to = result.view().sequences(p, p + 1);
        if (part.last > part.first) {
            copy_states<T>(trajectory.steps(part.last - 1, part.last).sequences(part.sequence, part.sequence + 1), to,
                           execution);
        } else if (const View<const T> initial = initial_states(); !initial.empty()) {
            check_device("initial", initial, execution);
            copy_states<T>(initial.sequences(p, p + 1), to, execution);
        }
    }
    return result;
}

template <class T>
bool ChannelwiseRecurrence<T>::runs_on(Backend backend) const {
    return !is_stored_in_16_bits<T> && Recurrence<T>::runs_on(backend);
}

template <class T>
void ChannelwiseRecurrence<T>::initial(const Section& section, View<T> state) const {
    for (index j = 0; j < section.batch(); ++j)
        std::copy_n(initial_state(first_part_[std::size_t(section.sequences[std::size_t(j)])]), this->shape().width,
                    state.at(0, j));
}

namespace {

/// Calls visit(column, part, first, last): the steps of a section, cut where new sequences begin. A piece that is the
/// first of its sequence starts at `part`'s first step.
template <class T, class Visit>
void each_piece(const ChannelwiseRecurrence<T>& recurrence, const Section& section, const Visit& visit) {
    const std::vector<SequencePart>& parts = recurrence.parts();
    for (index j = 0; j < section.batch(); ++j) {
        const index sequence = section.sequences[std::size_t(j)];
        auto part = std::lower_bound(parts.begin(), parts.end(), sequence,
                                     [](const SequencePart& a, index b) { return a.sequence < b; });
        for (; part != parts.end() && part->sequence == sequence; ++part) {
            const index first = std::max(section.first, part->first), last = std::min(section.last, part->last);
            if (first < last) visit(j, index(part - parts.begin()), first, last);
        }
    }
}

template <class T>
void run(const ChannelwiseRecurrence<T>& recurrence, const Execution& execution, cell::Work work,
         const std::vector<cell::Row<T>>& rows, const cell::RowStrides& strides) {
    if constexpr (is_stored_in_16_bits<T>) {
        cell::require_gpu_for_16_bits<T>(Backend::cpu);
    } else {
        const T* const parameters = recurrence.parameters().data();
        if (execution.backend == Backend::reference)
            cell::run_rows_plainly<T>(recurrence.kernels(), work, recurrence.channels(), parameters, rows, strides);
        else
            cell::run_rows<T>(recurrence.kernels(), work, recurrence.channels(), parameters, rows, strides,
                              device::thread_count(execution));
    }
}

constexpr index steps_at_once = 64;  // rows of independent steps: enough of them to share among lanes and threads

/// Rows for work whose steps are independent. The first step of a sequence other than the first of its row of the
/// batch starts from that sequence's initial state.
template <class T, class Fill>
void independent_rows(const ChannelwiseRecurrence<T>& recurrence, const Section& section, View<const T> before,
                      std::vector<cell::Row<T>>& rows, const Fill& fill) {
    each_piece(recurrence, section, [&](index j, index part, index first, index last) {
        const SequencePart& here = recurrence.parts()[std::size_t(part)];
        while (first < last) {
            const bool restarts = first == here.first && first > 0;
            const index end = restarts ? first + 1 : std::min(last, first + steps_at_once);
            cell::Row<T> row;
            row.steps = end - first;
            row.inputs = recurrence.inputs().at(first, here.sequence);
            row.before = restarts ? recurrence.initial_state(part) : before.at(first - section.first, j);
            fill(row, j, first);
            rows.push_back(row);
            first = end;
        }
    });
}

}  // namespace

template <class T>
void ChannelwiseRecurrence<T>::step(const Section& section, View<const T> before, View<T> after) const {
    std::vector<cell::Row<T>> rows;
    independent_rows(*this, section, before, rows,
                     [&](cell::Row<T>& row, index j, index first) { row.after = after.at(first - section.first, j); });
    deeppcr::run(*this, section.execution, cell::Work::apply, rows,
                 {.inputs = inputs_.step_stride(), .after = after.step_stride(), .before = before.step_stride()});
}

template <class T>
void ChannelwiseRecurrence<T>::linearise(const Section& section, View<const T> before, View<T> after,
                                         Jacobian<T> jacobian) const {
    step(section, before, after);  // the bits of `run`: the value part of a Dual may round differently
    jacobians(section, before, jacobian);
}

template <class T>
void ChannelwiseRecurrence<T>::jacobians(const Section& section, View<const T> before, Jacobian<T> jacobian) const {
    std::vector<cell::Row<T>> rows;
    independent_rows(*this, section, before, rows, [&](cell::Row<T>& row, index j, index first) {
        row.jacobian = jacobian.at(first - section.first, j);
    });
    deeppcr::run(*this, section.execution, cell::Work::linearise, rows,
                 {.inputs = inputs_.step_stride(), .before = before.step_stride(), .jacobian = jacobian.step_stride()});
    // A sequence does not depend on those before it in its row.
    each_piece(*this, section, [&](index j, index part, index first, index) {
        if (first == parts_[std::size_t(part)].first && first > 0)
            std::fill_n(jacobian.at(first - section.first, j), this->shape().width * this->block(), T(0));
    });
}

template <class T>
void ChannelwiseRecurrence<T>::run(const Section& section, View<const T> state, View<T> trajectory) const {
    std::vector<cell::Row<T>> rows;
    each_piece(*this, section, [&](index j, index part, index first, index last) {
        const SequencePart& here = parts_[std::size_t(part)];
        cell::Row<T> row;
        row.steps = last - first;
        row.inputs = inputs_.at(first, here.sequence);
        row.start = first == here.first && first > 0 ? initial_state(part) : state.at(0, j);
        row.after = trajectory.at(first - section.first, j);
        rows.push_back(row);
    });
    deeppcr::run(*this, section.execution, cell::Work::advance, rows,
                 {.inputs = inputs_.step_stride(), .after = trajectory.step_stride()});
}

template class ChannelwiseRecurrence<float>;
template class ChannelwiseRecurrence<double>;
template class ChannelwiseRecurrence<bfloat16>;
template class ChannelwiseRecurrence<float16>;

namespace cell {

template <class T>
void decode(const Kernels<T>& kernels, View<const T> inputs, View<const Arithmetic<T>> parameters,
            View<Arithmetic<T>> state, View<T> output, const Execution& execution) {
    require_gpu_for_16_bits<T>(execution.backend);
    const Shape states = states_shape(inputs.shape(), kernels.inputs, kernels.states);
    const Shape sizes{kernels.parameters, 1, inputs.width() / kernels.inputs};
    if (inputs.steps() != 1 || (inputs.data() == nullptr && inputs.batch() > 0))
        throw InvalidArgument("inputs", "memory of one step", to_string(inputs.shape()));
    if (parameters.shape() != sizes || !parameters.contiguous() || parameters.data() == nullptr)
        throw InvalidArgument("parameters", "a contiguous array of shape " + to_string(sizes),
                              to_string(parameters.shape()));
    if (state.shape() != states || !state.contiguous() || (state.data() == nullptr && states.count() > 0))
        throw InvalidArgument("state", "a contiguous array of shape " + to_string(states), to_string(state.shape()));
    if (output.data() != nullptr && output.shape() != states)
        throw InvalidArgument("output", to_string(states) + ", or nothing", to_string(output.shape()));
    if (states.batch == 0) return;
    if (execution.backend == Backend::cuda)
        return decode_on_gpu(kernels, inputs, parameters, state, output, execution.stream);
    if constexpr (!is_stored_in_16_bits<T>) {
        std::vector<Row<T>> rows(std::size_t(states.batch));
        for (index j = 0; j < states.batch; ++j) {
            Row<T>& row = rows[std::size_t(j)];
            row.steps = 1;
            row.inputs = inputs.at(0, j);
            row.start = row.end = state.at(0, j);
            if (output.data() != nullptr) row.after = output.at(0, j);
        }
        run_rows<T>(kernels, Work::advance, sizes.width, parameters.data(), rows,
                    {.inputs = inputs.step_stride(), .after = output.step_stride()}, device::thread_count(execution));
    }
}

#define DEEPPCR_INSTANTIATE(T)                                                                                      \
    template void decode(const Kernels<T>&, View<const T>, View<const Arithmetic<T>>, View<Arithmetic<T>>, View<T>, \
                         const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace cell

}  // namespace deeppcr
