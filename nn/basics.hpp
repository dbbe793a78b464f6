// What any file of nn/ may need: arguments that are checked, seconds, seeds made of several numbers.
#pragma once

#include <chrono>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <deeppcr/error.hpp>

namespace deeppcr::nn {

template <class Number>
void require(bool condition, const std::string& argument, const std::string& expected, Number actual) {
    if (!condition) throw InvalidArgument(argument, expected, std::to_string(actual));
}

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// For a generator: the words of these integers, of each the lower one first.
template <class... Numbers>
std::seed_seq seeds(Numbers... numbers) {
    std::vector<std::uint32_t> words;
    const auto add = [&](auto number) {
        words.push_back(std::uint32_t(number));
        if constexpr (sizeof(number) > sizeof(std::uint32_t))
            words.push_back(std::uint32_t(std::uint64_t(number) >> 32));
    };
    (add(numbers), ...);
    return std::seed_seq(words.begin(), words.end());
}

/// One seed of these integers.
template <class... Numbers>
std::uint64_t mixed_seed(Numbers... numbers) {
    std::uint32_t words[2];
    seeds(numbers...).generate(words, words + 2);
    return std::uint64_t(words[0]) << 32 | words[1];
}

}  // namespace deeppcr::nn
