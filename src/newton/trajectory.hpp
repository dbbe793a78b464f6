// Reading a trajectory that is already there.
#pragma once

#include <algorithm>

#include <deeppcr/recurrence.hpp>

namespace deeppcr::newton {

/// Copies x_{t-1} of the section's steps (x_0 is the initial state) to `before`, contiguous
/// [section.steps(), section.batch(), width].
template <class T>
void gather_before(const Recurrence<T>& recurrence, View<const T> trajectory, const Section& section, View<T> before) {
    for (index i = section.first; i < section.last; ++i) {
        if (i == 0) {
            recurrence.initial(section, before.steps(0, 1));
            continue;
        }
        for (index j = 0; j < section.batch(); ++j)
            std::copy_n(trajectory.at(i - 1, section.sequences[std::size_t(j)]), before.width(),
                        before.at(i - section.first, j));
    }
}

}  // namespace deeppcr::newton
