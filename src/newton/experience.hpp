// What earlier evaluations have shown, for those of the same kind that come.
#pragma once

#include <algorithm>
#include <compare>
#include <functional>
#include <limits>
#include <map>
#include <typeindex>
#include <utility>
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
    /// explores: a method that was not tried twice is taken for so much faster than predicted.
    double expect(double predicted, bool explores) const {
        constexpr double untried = 0.75;
        if (trusted() || (!explores && count > 0)) return seconds;
        return explores ? untried * std::min(predicted, seconds) : predicted;
    }
};

/// Of evaluations of about the same size.
struct Experience {
    index repeated = 64;  ///< steps until repairs met
    double shots = 2;     ///< Newton sweeps of shooting
    bool overlap_works = true, shooting_works = true;
    bool one_round_is_enough = true;  ///< of repairs; on a GPU, where the others are enqueued unasked if it is not
    std::map<Method, Observed> observed = {};
    std::map<Method, index> lengths = {};  ///< of the chunks that a method last had, on a GPU
    // Of recurrences that are not a cell's:
    std::map<Method, double> predicted = {};  ///< seconds per number, from a few steps; empty: not measured yet
    double lyapunov = std::numeric_limits<double>::quiet_NaN();

    Observed seen(Method method) const {
        const auto found = observed.find(method);
        return found == observed.end() ? Observed() : found->second;
    }
    /// 0: it did not run in chunks.
    index length(Method method) const {
        const auto found = lengths.find(method);
        return found == lengths.end() ? 0 : found->second;
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
    /// numbers: of the trajectory. explores: a method that was not tried may be the best one; else all that were come
    /// first.
    Weighing(const Experience& seen, double numbers, bool explores = true)
        : seen_(seen), numbers_(numbers), explores_(explores) {}

    /// predicted: seconds. Whether it is the best so far.
    bool consider(Method method, double predicted) {
        const Observed observed = seen_.seen(method);
        const double expected = observed.expect(predicted / numbers_, explores_);
        candidates_.push_back({method, observed.trusted() ? expected * numbers_ : predicted, observed.trusted()});
        const std::pair<bool, double> rank{!explores_ && observed.count == 0, expected};
        if (rank >= best_) return false;
        best_ = rank;
        std::swap(candidates_.front(), candidates_.back());
        return true;
    }
    /// The best one first.
    const std::vector<Report::Candidate>& candidates() const { return candidates_; }

private:
    const Experience& seen_;
    double numbers_;
    bool explores_;
    std::pair<bool, double> best_{true, std::numeric_limits<double>::infinity()};  // whether untried; seconds
    std::vector<Report::Candidate> candidates_;
};

}  // namespace deeppcr::newton
