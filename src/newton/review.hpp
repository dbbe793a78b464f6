// Whether Newton's passes make progress, and how far a window is shortened where they do not.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <deeppcr/array.hpp>

namespace deeppcr::newton {

constexpr index review_period = 8;    // passes between two looks at the progress
constexpr index rows_to_follow = 64;  // of the window, for its Lyapunov exponent
constexpr index smallest_window = 8;  // below this, step after step is as good

/// What happened since the last look.
class Review {
public:
    /// A pass has confirmed `rows` more, the mean of the active sequences; worst: the largest relative residual left.
    void add(double rows, double worst) {
        confirmed_ += rows;
        worst_ = std::min(worst_, worst);
    }

    /// Whether it was good enough; begins anew. A short window that the caller asked for may take its time; one that
    /// the ladder made (`shortened`) must pay.
    bool conclude(index rows, index window, bool shortened) {
        const double least = shortened ? enough_rows : std::min(enough_rows, double(window) / 8);
        const double wanted = std::max(enough_confirmed * double(rows), least);
        const bool good = confirmed_ >= wanted * double(review_period) ||
                          (std::isfinite(worst_) && worst_ <= enough_decrease * worst_before_);
        worst_before_ = good ? std::min(worst_, worst_before_) : std::numeric_limits<double>::infinity();
        confirmed_ = 0;
        worst_ = std::numeric_limits<double>::infinity();
        return good;
    }

private:
    static constexpr double enough_decrease = 0.8;        // of the worst residual, from one review to the next
    static constexpr double enough_confirmed = 1.0 / 32;  // of the window's rows per pass
    static constexpr double enough_rows = 4;              // per pass; fewer are as fast step after step
    double confirmed_ = 0;
    double worst_ = std::numeric_limits<double>::infinity(), worst_before_ = std::numeric_limits<double>::infinity();
};

/// As much as products of the Jacobians leave digits for, but between a quarter of `half` a window and all of it: far
/// from the solution the exponent is a poor estimate.
template <class T>
index shortened_window(index half, double exponent) {
    if (!(exponent > 0)) return half;
    const double digits = -std::log(double(std::numeric_limits<T>::epsilon()));
    return index(std::clamp(digits / exponent, double(half) / 4, double(half)));
}

}  // namespace deeppcr::newton
