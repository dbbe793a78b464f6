// Group: the processes that compute together, each with memory of its own, and what they say to each other.
#pragma once

#include <array>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <deeppcr/array.hpp>
#include <deeppcr/error.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr {

namespace distribute {
class Gpus;
class Messages;
}  // namespace distribute

/// Another rank of a Group has failed: thrown where this one would otherwise wait for it, with what it said.
struct RankFailed : Error {
    using Error::Error;
};

/// The ranks of a computation, 0 .. size-1. Every function but the plain getters is collective: all ranks call the same
/// ones in the same order, with arrays of the same size, from one thread at a time. Elements are trivially copyable.
/// All results depend on the values and the number of ranks alone, never on timing; what is said to be on every rank
/// has the same bits there. Throws Error where MPI fails, RankFailed where another rank has said that it did, or has
/// ended (exit with status 0) while this one waits for it. Where a rank of world() ends without a word (killed, an
/// exception that leaves main, exit with a status other than 0), MPI ends all the others within seconds, with an error.
class Group {
public:
    /// What is sent is counted apart for each purpose.
    enum class Purpose { barrier, broadcast, reduce, gather, scan, pass };
    /// What this rank has sent.
    struct Traffic {
        index messages = 0, bytes = 0;
        bool operator==(const Traffic&) const = default;
    };
    /// values = earlier combined with values, where `earlier` is of lower ranks (or, in a scan from the last rank, of
    /// higher ones). from_first: `earlier` begins with the first rank of the scan, so that nothing will precede it.
    using Combine =
        std::function<void(std::span<const std::byte> earlier, std::span<std::byte> values, bool from_first)>;
    enum class Direction { from_first_rank, from_last_rank };

    /// This process, alone.
    Group();
    /// All processes that mpirun has started, or this one alone where it was not started by it. MPI is initialised by
    /// the first call, unless the caller has done so, and finalised when the program ends. Throws Error where this
    /// build has no MPI (DEEPPCR_BUILD_MPI) but was started as one of several.
    static Group& world();
    /// Calls body with each of `ranks` ranks on threads of this process: the same results as on as many processes.
    /// Throws what the first rank that failed did.
    static void simulate(int ranks, const std::function<void(Group& group)>& body);
    ~Group();
    Group(Group&&) noexcept;
    Group& operator=(Group&&) noexcept;

    int rank() const;
    int size() const;
    /// This rank's share [first, last) of `steps` steps: consecutive, in the order of ranks, lengths that differ by at
    /// most one.
    std::pair<index, index> part(index steps) const;
    /// This rank's number among those on its machine, 0, 1, ...: the GPU to take, for one. Collective the first time.
    int rank_on_machine();

    /// Returns when all ranks have called it.
    void barrier();
    /// values of rank `root`, on every rank.
    template <class T>
    void broadcast(std::span<T> values, int root = 0) {
        broadcast_bytes(std::as_writable_bytes(values), root);
    }
    /// Sums over the ranks, on every rank: ((0 + 1) + (2 + 3)) + ..., or, where there are many values per rank, from
    /// the first rank to the last. Float, double, index.
    template <class T>
    void sum(std::span<T> values);
    /// The same sums, bit for bit, of values that lie in the current GPU's memory where `execution` is on one; float
    /// and double. Where the ranks' GPUs are different ones, and NCCL is found, many values go from GPU to GPU, and the
    /// call returns before its stream has done it; else they go through main memory. The first such call decides, and
    /// with it the GPU of each rank. Throws InvalidArgument on another one then, and in a stream that is captured.
    template <class T>
    void sum(std::span<T> values, const Execution& execution);
    /// Whether it goes from GPU to GPU. Collective if it is the first such call.
    bool sums_between_gpus();
    /// Maxima over the ranks, on every rank; NaN where one is. Float, double, index.
    template <class T>
    void maximum(std::span<T> values);
    /// The ranks' values combined in the order of ranks, on every rank, in ceil(log2(size)) rounds (two more where size
    /// is not a power of two). combine must be associative.
    void reduce(std::span<std::byte> values, const Combine& combine);
    /// everything [size * values.size()]: the values of all ranks, one rank's after the other's, on every rank.
    template <class T>
    void gather(std::span<const T> values, std::span<T> everything) {
        gather_bytes(std::as_bytes(values), std::as_writable_bytes(everything));
    }
    /// values becomes the combination of those of all ranks before this one, in ceil(log2(size)) rounds of at most one
    /// message per rank; the first rank keeps its own. combine must be associative.
    void exclusive_scan(std::span<std::byte> values, const Combine& combine,
                        Direction direction = Direction::from_first_rank);
    /// Sends `sent` to rank `to`, while `received` comes from rank `from`; -1: nobody. Not collective: the ranks
    /// that are named take part, each with the other's size.
    template <class T>
    void pass(int to, std::span<const T> sent, int from, std::span<T> received) {
        exchange(Purpose::pass, to, std::as_bytes(sent), from, std::as_writable_bytes(received));
    }
    /// Where no rank has a problem, returns. Else throws: on a rank that has one, that; on the others RankFailed, with
    /// what the first such rank says.
    void agree(const std::exception_ptr& problem);

    /// What this rank has sent since it began, or since reset_traffic().
    const Traffic& traffic(Purpose purpose) const { return traffic_[std::size_t(purpose)]; }
    Traffic traffic() const;
    void reset_traffic() { traffic_ = {}; }

private:
    explicit Group(std::unique_ptr<distribute::Messages> messages);
    void exchange(Purpose purpose, int to, std::span<const std::byte> sent, int from, std::span<std::byte> received);
    void broadcast_bytes(std::span<std::byte> values, int root);
    void gather_bytes(std::span<const std::byte> values, std::span<std::byte> everything);
    template <class T>
    void sum_slices(std::span<T> values);
    bool sums_slices(index count) const;
    distribute::Gpus* gpus();

    std::unique_ptr<distribute::Messages> messages_;  // null: alone
    std::array<Traffic, 6> traffic_{};
    std::optional<std::unique_ptr<distribute::Gpus>> gpus_;  // null: through main memory
    int rank_on_machine_ = -1;
};

/// "rank 2 of 4"
std::string to_string(const Group& group);

}  // namespace deeppcr
