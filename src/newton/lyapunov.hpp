// How fast neighbouring trajectories part: the largest Lyapunov exponent, from the Jacobians at hand.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::newton {

/// Carries one vector per sequence and Jacobian block through the Jacobians and averages the logarithm of its growth
/// (Benettin's method). Bounded work, unless `everything` is asked for: up to 4,096 steps of a sequence, and beyond
/// 2^18 Jacobian entries in all only 256 steps of the first, so that a few sequences stand for the others where there
/// are many.
template <class T>
class LyapunovEstimate {
public:
    LyapunovEstimate(index width, index block, bool everything = false)
        : width_(width), block_(block), everything_(everything) {}

    /// Follows rows [0, rows) of column `column` of `jacobian`, which continue what `sequence` has followed before.
    void follow(index sequence, const Jacobian<T>& jacobian, index column, index rows) {
        auto found = paths_.find(sequence);
        if (found == paths_.end()) {
            if (entries_ >= entry_limit && !everything_) return;
            found = paths_.emplace(sequence, Path(width_, block_)).first;
        }
        Path& path = found->second;
        std::vector<double> next(static_cast<std::size_t>(block_));
        for (index i = 0; i < rows && (everything_ || (path.steps < step_limit &&
                                                       (entries_ < entry_limit || path.steps < step_minimum)));
             ++i) {
            const T* entry = jacobian.at(i, column);
            for (index first = 0; first < width_; first += block_) {
                double* vector = path.vector.data() + first;
                for (index row = 0; row < block_; ++row) {
                    double sum = 0;
                    for (index k = 0; k < block_; ++k) sum += double(*entry++) * vector[k];
                    next[std::size_t(row)] = sum;
                }
                const double norm = norm_of(next);
                path.growth[std::size_t(first / block_)] += std::log(norm);
                // A vector that has died grows from anywhere again; its exponent stays minus infinity.
                for (index k = 0; k < block_; ++k) vector[k] = norm > 0 ? next[std::size_t(k)] / norm : 1;
            }
            ++path.steps;
            entries_ += width_ * block_;
        }
    }

    /// Sums of log(growth) so far, of every sequence and block that was followed.
    std::vector<double> growths() const {
        std::vector<double> all;
        for (const auto& [sequence, path] : paths_) all.insert(all.end(), path.growth.begin(), path.growth.end());
        return all;
    }

    /// The largest of the sequences and blocks, per step; NaN where nothing was followed.
    double exponent() const {
        double largest = std::numeric_limits<double>::quiet_NaN();
        for (const auto& [sequence, path] : paths_)
            for (const double growth : path.growth)
                if (path.steps > 0 && !(growth / double(path.steps) <= largest)) largest = growth / double(path.steps);
        return largest;
    }

private:
    /// Euclidean, also where the squares of the numbers are beyond the range of double.
    static double norm_of(const std::vector<double>& numbers) {
        if (numbers.size() == 1) return std::abs(numbers[0]);
        double largest = 0, squares = 0;
        for (const double number : numbers) largest = std::max(largest, std::abs(number));
        const double scale = largest > 0 && std::isfinite(largest) ? largest : 1;
        for (const double number : numbers) squares += (number / scale) * (number / scale);
        return scale * std::sqrt(squares);
    }

    static constexpr index step_limit = 4096, step_minimum = 256, entry_limit = index(1) << 18;
    struct Path {
        Path(index width, index block)
            : vector(std::size_t(width), 1 / std::sqrt(double(block))), growth(std::size_t(width / block), 0) {}
        std::vector<double> vector, growth;
        index steps = 0;
    };
    index width_, block_, entries_ = 0;
    bool everything_;
    std::map<index, Path> paths_;
};

}  // namespace deeppcr::newton
