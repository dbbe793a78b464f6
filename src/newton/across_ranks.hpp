// Evaluation and adjoint where a group of processes shares the steps.
#pragma once

#include <exception>
#include <functional>

#include <deeppcr/evaluate.hpp>
#include <deeppcr/group.hpp>

namespace deeppcr::newton {

/// Whether other ranks have a part of the steps.
inline bool is_shared(const Options& options) { return options.group != nullptr && options.group->size() > 1; }

/// What body throws, or null.
template <class Body>
std::exception_ptr caught(const Body& body) {
    try {
        body();
        return nullptr;
    } catch (...) {
        return std::current_exception();
    }
}

/// `evaluate` with options.group; the arguments are checked here.
template <class T>
Report evaluate_across_ranks(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options);

/// What `adjoint` needs of the other ranks, and where it goes; in and out [steps,batch,width] of this rank's part, or
/// [1,batch,width].
template <class T>
struct SharedSweep {
    View<const T> trajectory, output_gradient;  ///< in
    View<T> before = {};   ///< out: the state before the part; of the first rank the initial state. May be empty
    View<T> handed = {};   ///< out: what the later ranks add to dL/dx of the part's last state. May be empty
    View<T> initial = {};  ///< out: dL/dx of the state before the part. May be empty
    /// Is given x_{t-1} and dL/dx_t of the part, contiguous. Null, with an empty `initial`: dL/dx_t is not computed.
    std::function<void(const Section& section, View<const T> before, View<const T> adjoint)> visit = nullptr;
};

/// The transposed solve with the Jacobians at the states of the trajectory, which all ranks' parts make up, in one
/// window. Throws on all ranks what one throws; `problem`: what it has met already.
template <class T>
Report sweep_across_ranks(const Recurrence<T>& recurrence, const SharedSweep<T>& sweep, const Options& options,
                          std::exception_ptr problem);

/// The backward pass of one part: from the state before it and what later ranks add to dL/dx of its last state, both in
/// main memory as `first` is, where dL/dx of the state before the part goes. All [1,batch,width].
template <class T>
using BackwardPart = std::function<Report(View<const T> before, View<const T> handed, View<T> first)>;

/// The backward pass of a cell without Jacobians between the ranks: every part as if nothing came from the ranks after
/// it, and again with what does come, until that stays the same, bit by bit. After as many passes as there are ranks it
/// does; earlier where a part forgets what comes from behind. Report::iterations: the passes. Throws as above.
template <class T>
Report repeat_across_ranks(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,
                           const BackwardPart<T>& backward, const Options& options, std::exception_ptr problem);

}  // namespace deeppcr::newton
