// What earlier evaluations of a cell have shown, for those that come.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <map>
#include <tuple>

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
    std::map<Method, Observed> observed = {};
};

/// Kernels, threads, and the magnitudes of T, B*D and the tolerance.
using ExperienceKey = std::tuple<const void*, int, int, int, int>;

Experience experience(const ExperienceKey& key);
void learn(const ExperienceKey& key, const std::function<void(Experience&)>& change);

}  // namespace deeppcr::newton
