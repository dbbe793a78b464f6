// Wall-clock seconds of a stage of an evaluation.
#pragma once

#include <chrono>

namespace deeppcr::newton {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Adds the seconds of its own life to `seconds`.
class Stopwatch {
public:
    explicit Stopwatch(double& seconds) : seconds_(seconds) {}
    ~Stopwatch() { seconds_ += seconds_since(begin_); }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

private:
    double& seconds_;
    Clock::time_point begin_ = Clock::now();
};

}  // namespace deeppcr::newton
