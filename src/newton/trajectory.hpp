// Reading a trajectory that is already there.
#pragma once

#include <algorithm>

#include <deeppcr/recurrence.hpp>

#include "recurrence/states.hpp"

namespace deeppcr::newton {

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
