// What earlier evaluations have shown, for those of the same kind that come.
#pragma once

#include <algorithm>
#include <compare>
#include <functional>
#include <limits>
#include <map>
#include <typeindex>
#include <vector>

#include <deeppcr/evaluate.hpp>

namespace deeppcr::newton {

/// The least seconds per number of the trajectory, and of how many evaluations.
struct Observed {
    double seconds = std::numeric_limits<double>::infinity();
    int count = 0;

    void add(double more) {
        seconds = std::min(seconds, more);
        ++count;
    }
    bool trusted() const { return count >= 2; }
    /// A method that was not tried twice is taken for so much faster than predicted.
    double expect(double predicted) const {
        constexpr double untried = 0.75;
        return trusted() ? seconds : untried * std::min(predicted, seconds);
    }
};

/// Of evaluations of about the same size.
struct Experience {
    index repeated = 64;  ///< steps until repairs met
    double shots = 2;     ///< Newton sweeps of shooting
    bool overlap_works = true, shooting_works = true;
    bool one_round_is_enough = true;  ///< of repairs; on a GPU, where the others are enqueued unasked if it is not
    std::map<Method, Observed> observed = {};
    // Of recurrences that are not a cell's:
    std::map<Method, double> predicted = {};  ///< seconds per number, from a few steps; empty: not measured yet
    double lyapunov = std::numeric_limits<double>::quiet_NaN();

    Observed seen(Method method) const {
        const auto found = observed.find(method);
        return found == observed.end() ? Observed() : found->second;
    }
};

/// A kind of evaluations.
struct ExperienceKey {
    std::type_index type = typeid(void);  ///< of a recurrence, where it is not a cell's
    index variant = 0;                    ///< what costs of a type depend on beside its sizes
    const void* kernels = nullptr;        ///< of a cell
    bool backward = false;
    Backend backend = Backend::cpu;
    int workers = 1;                            ///< threads, or the GPU's ordinal
    int steps = 0, numbers = 0, tolerance = 0;  ///< magnitudes of T, B*D and the tolerance
    index block = 0;

    auto operator<=>(const ExperienceKey&) const = default;  // NOLINT(modernize-use-nullptr)
};

Experience experience(const ExperienceKey& key);
void learn(const ExperienceKey& key, const std::function<void(Experience&)>& change);

/// Of the methods considered, the one that is expected to take least.
class Weighing {
public:
    /// numbers: of the trajectory.
    Weighing(const Experience& seen, double numbers) : seen_(seen), numbers_(numbers) {}

    /// predicted: seconds. Whether it is the best so far.
    bool consider(Method method, double predicted) {
        const Observed observed = seen_.seen(method);
        const double expected = observed.expect(predicted / numbers_);
        candidates_.push_back({method, observed.trusted() ? expected * numbers_ : predicted, observed.trusted()});
        if (expected >= least_) return false;
        least_ = expected;
        std::swap(candidates_.front(), candidates_.back());
        return true;
    }
    /// The best one first.
    const std::vector<Report::Candidate>& candidates() const { return candidates_; }

private:
    const Experience& seen_;
    double numbers_, least_ = std::numeric_limits<double>::infinity();
    std::vector<Report::Candidate> candidates_;
};

}  // namespace deeppcr::newton
