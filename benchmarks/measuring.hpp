// How the benchmarks on processors measure: the size that is asked for, seconds of a body, medians of what takes turns.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <vector>

#include <deeppcr/array.hpp>

#include "newton/stopwatch.hpp"

namespace deeppcr::benchmarks {

using newton::Clock;
using newton::seconds_since;

/// Of DEEPPCR_BENCHMARK_ELEMENTS, at least 1, or else `usual`.
inline index case_elements(index usual) {
    const char* text = std::getenv("DEEPPCR_BENCHMARK_ELEMENTS");
    return text ? std::max<index>(1, std::atoll(text)) : usual;
}

inline double seconds(const std::function<void()>& body) {
    const auto begin = Clock::now();
    body();
    return seconds_since(begin);
}

/// The upper one of two in the middle.
inline double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(values.size() / 2), values.end());
    return values[values.size() / 2];
}

/// Seconds of what can use several threads: [0] with all, [1] with one; the faster counts.
using Times = std::vector<double>[2];
inline double best(const Times& times) { return std::min(median(times[0]), median(times[1])); }

}  // namespace deeppcr::benchmarks
