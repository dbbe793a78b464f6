// check: does a recurrence compute what it says, and do the backends agree?
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include <deeppcr/recurrence.hpp>

namespace deeppcr {

/// Outcome of a check: empty `problems` means that everything agreed.
struct CheckReport {
    std::vector<std::string> problems;  ///< each names step, sequence, row and column, and both numbers
    double largest_jacobian_error = 0;  ///< relative to the largest entry of the Jacobian, over all tried states
    index entries_checked = 0;
    bool ok() const { return problems.empty(); }
};
std::ostream& operator<<(std::ostream& out, const CheckReport& report);

/// Compares a recurrence's Jacobian with central finite differences of its step, at random states around x_0; `step`
/// with what `linearise` returns as `after`; `linearise_diagonal` with the diagonal of `linearise`; `run` with repeated
/// `step`; and the result of a whole section with that of single steps. Tries up to `steps` steps and all sequences.
/// Where the recurrence runs on cuda and there is a GPU, all this there too, and the processor's results with the
/// GPU's. Throws InvalidArgument; NoDevice where it runs on nothing else.
template <class T>
CheckReport check_recurrence(const Recurrence<T>& recurrence, index steps = 4, std::uint64_t seed = 1);

/// Solves random systems with every backend (cuda where there is a GPU) and reduction and compares with the reference
/// backend's substitution: what `deeppcr check` runs.
CheckReport check_backends(std::uint64_t seed = 1);

}  // namespace deeppcr
