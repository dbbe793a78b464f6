// Anderson acceleration of the passes, step by step of the trajectory: each step combines the last passes' updates so
// that, over all steps up to it, the combined update is smallest. A step so depends only on steps before it, and what
// is exact after k passes stays so.
#pragma once

#include <vector>

#include <deeppcr/array.hpp>

#include "newton/update.hpp"

namespace deeppcr::newton {

/// The history of one evaluation. All arrays have the window's layout, [rows, sequences, width], and move with it.
/// Source: Anderson (1965), in the variant whose coefficients respect the triangular structure (Tang et al.:
/// Accelerating Parallel Sampling of Diffusion Models, ICML 2024, arXiv 2402.09970).
template <class T>
class Anderson {
public:
    /// depth: earlier passes to combine, at least 1. `elements` of the largest window.
    Anderson(index depth, index elements, Workspace& workspace);

    /// Replaces the update d of the window's rows that are not confirmed by the combined one.
    void accelerate(const Window<T>& window, const std::vector<Progress>& progress, int threads);
    /// The window's first `shift` of `rows` rows go; those that enter at its end have no history.
    void slide(index shift, index rows, index row_elements);
    /// The sequences that leave go from the history as from the window.
    template <class Close>
    void close_gaps(const Close& close) {
        for (index k = 0; k < used_; ++k) {
            close(changes_[std::size_t(k)], known_);
            close(updates_[std::size_t(k)], known_);
        }
        close(last_states_, known_);
        close(last_update_, known_);
    }

private:
    index depth_, used_ = 0, next_ = 0;
    index known_ = 0;                    // rows that have a last pass
    std::vector<T*> changes_, updates_;  // of states and of updates, from one pass to the next; a ring
    T *last_states_ = nullptr, *last_update_ = nullptr;
};

}  // namespace deeppcr::newton
