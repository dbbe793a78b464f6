// What a cell's step costs on this machine: measured once, kept in the user's cache folder.
#pragma once

#include <array>

#include <deeppcr/cell.hpp>

namespace deeppcr::newton {

/// Seconds per step of a bundle of 1, 2, 4, 8 and 16 blocks of 16 lanes on each thread, all threads at work: they may
/// share a core's units.
struct StepCosts {
    static constexpr std::array<index, 5> blocks{1, 2, 4, 8, 16};
    std::array<double, 5> direct{};   ///< blocks of neighbouring channels
    std::array<double, 5> grouped{};  ///< one channel, 16 rows to a block
    std::array<double, 5> product{};  ///< as grouped, carrying the product of Jacobians
    double alone = 0;                 ///< one direct block while the other threads rest
    double synchronise = 0;           ///< seconds for all threads to start and finish a piece of work
    double fixed = 0;                 ///< seconds of an evaluation in two chunks, whatever its size

    double step(const std::array<double, 5>& costs, double count) const;
};

/// The costs of a cell for this machine, instruction set and thread count. From memory, else measured, in some
/// milliseconds, and kept in the file `costs.txt` in $DEEPPCR_CACHE, $XDG_CACHE_HOME/deeppcr or ~/.cache/deeppcr, where
/// the least of the first eight processes' measurements counts; after those it is only read. A cache that cannot be
/// read or written is no error.
template <class T>
const StepCosts& step_costs(const ChannelwiseRecurrence<T>& recurrence, int threads);

/// How to evaluate `rows` sequences of `steps` steps in chunks of `chunk` steps each; 0: they are too short.
struct Plan {
    index chunk = 0;
    double seconds = 0;             ///< predicted
    double sequential_seconds = 0;  ///< predicted for step after step

    /// Whether chunks are clearly faster, by what is predicted.
    bool pays() const { return chunk > 0 && seconds < 0.9 * sequential_seconds; }
};

/// The cheapest plan for chunks of which `repeated` steps are run twice and which are swept `sweeps` times with
/// products.
Plan plan_chunks(const StepCosts& costs, index steps, index rows, index channels, index repeated, double sweeps,
                 int threads);

/// Whether so many channels, of all rows together, fill the lanes of all threads: then chunks have nothing to gain.
inline bool lanes_are_full(index rows, index channels, int threads) {
    return double(rows) * double(channels) >= double(cell::lanes * 16 * threads);
}

}  // namespace deeppcr::newton
