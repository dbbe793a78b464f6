// Arrays of states in main memory or on a GPU, and reading a trajectory that is already there.
#pragma once

#include <algorithm>

#include <deeppcr/recurrence.hpp>

#include "device/cuda.hpp"
#include "recurrence/device_cells.hpp"

namespace deeppcr::newton {

/// to = from, element by element; any strides.
template <class T>
void copy_states(const std::type_identity_t<View<const T>>& from, const View<T>& to, const Execution& execution) {
    if (execution.backend == Backend::cuda) return cell::copy_on_gpu<T>(from, to, false, execution.stream);
    for (index i = 0; i < from.steps(); ++i)
        for (index j = 0; j < from.batch(); ++j) std::copy_n(from.at(i, j), from.width(), to.at(i, j));
}

/// to += from
template <class T>
void add_states(const std::type_identity_t<View<const T>>& from, const View<T>& to, const Execution& execution) {
    if (execution.backend == Backend::cuda) return cell::copy_on_gpu<T>(from, to, true, execution.stream);
    if constexpr (!is_stored_in_16_bits<T>)  // only GPUs compute with those
        for (index i = 0; i < from.steps(); ++i)
            for (index j = 0; j < from.batch(); ++j)
                for (index k = 0; k < from.width(); ++k) to(i, j, k) += from(i, j, k);
}

/// Sets `count` numbers to 0.
template <class T>
void clear(T* data, index count, const Execution& execution) {
    if (execution.backend == Backend::cuda)
        device::fill_bytes(data, 0, count * index(sizeof(T)), execution.stream);
    else
        std::fill_n(data, count, T(0));
}

/// Copies x_{t-1} of the section's steps (x_0 is the initial state) to `before`, contiguous
/// [section.steps(), section.batch(), width]. On a GPU the section lists all sequences.
template <class T>
void gather_before(const Recurrence<T>& recurrence, View<const T> trajectory, const Section& section, View<T> before) {
    if (section.first == 0 && section.last > 0) recurrence.initial(section, before.steps(0, 1));
    const index first = std::max<index>(section.first, 1), last = section.last;
    if (section.execution.backend == Backend::cuda)
        return copy_states<T>(trajectory.steps(first - 1, last - 1),
                              before.steps(first - section.first, section.steps()), section.execution);
    for (index i = first; i < last; ++i)
        for (index j = 0; j < section.batch(); ++j)
            std::copy_n(trajectory.at(i - 1, section.sequences[std::size_t(j)]), before.width(),
                        before.at(i - section.first, j));
}

}  // namespace deeppcr::newton
