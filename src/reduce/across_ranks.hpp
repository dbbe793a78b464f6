// A bidiagonal system whose steps are shared among the ranks of a group, each of which holds a part of its own.
#pragma once

#include <span>

#include <deeppcr/group.hpp>

#include "reduce/reduce.hpp"

namespace deeppcr::reduce {

/// This rank's part, in the order in which it is solved:
///
///     summarise   the part as one long step x_end = product x_before + end; may throw, and sends nothing
///     scan        collective: from the long steps before it, the state that this part begins with
///     solve       the part from there, by options.method; may throw, and sends nothing
///
/// so that a rank whose summary has failed can still take part in the scan. The part that begins (there is nothing
/// before it) is solved by `summarise`, and its end is what it hands on.
///
/// With Backend::cuda the system is on a GPU; what is sent passes through main memory, and the calls wait for the
/// stream. A summary takes one solve for the end and `block` more for the product's columns, in memory for another
/// solution.
template <class T>
class Part {
public:
    /// system: with at least one step; without `initial`, but where the part begins. Transposed, its steps are those of
    /// this rank's array, the last first, and what one rank hands to the next is A_first^T y_first, of the array's
    /// first step. Memory is taken from `workspace`, on a GPU by `summarise`, until the caller's Scope ends.
    Part(const OrderedSystem<T>& system, bool begins, const SolveOptions& options, Workspace& workspace);
    /// One where there is nothing to do; it hands on zeros.
    Part(const Shape& states, index block, const SolveOptions& options, Workspace& workspace);

    void summarise();
    void scan();
    Reduction solve();

    /// After `scan`: what the parts before hand on, [1,batch,width]. Where the part begins it counts for nothing.
    View<T> before() const { return end_of(summary_); }

private:
    bool on_gpu() const { return options_.execution.backend == Backend::cuda; }
    /// With the system's sequences.
    View<T> end_of(const LongStep<T>& step) const { return View<T>(step.end.data(), state_); }
    /// `system` as one long step, result.
    void summarise(const OrderedSystem<T>& system, const LongStep<T>& result);
    void summarise_on_gpu(const OrderedSystem<T>& system, const LongStep<T>& result);
    /// later = later after earlier; without the product where it will not count.
    void compose(const LongStep<T>& earlier, const LongStep<T>& later, bool with_product) const;

    OrderedSystem<T> system_;
    bool begins_, idle_ = false;
    SolveOptions options_;
    Group& group_;
    Shape state_;
    Reduction used_ = Reduction::sequential;
    LongStep<T> summary_, other_;  // in main memory
    T* product_;
    // Of a system on a GPU: memory_ holds the above and a row; row_ and solved_ are there.
    Buffer<T> memory_;
    T* row_memory_ = nullptr;
    View<T> row_, solved_;
};

}  // namespace deeppcr::reduce
