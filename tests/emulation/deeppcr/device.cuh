// What include/deeppcr/device.cuh has, for the emulation.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <limits>

#include <deeppcr/array.hpp>

#define DEEPPCR_UNROLL
#define DEEPPCR_ROLLED

namespace deeppcr::cuda {

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulation::shared_memory());
}
inline unsigned load_acquire(const unsigned* word) { return *word; }
inline void store_release(unsigned* word, unsigned value) { *word = value; }
template <class T>
T load_published(const T* word) {
    return *word;
}
template <class T>
bool is_published(T value) {
    constexpr unsigned char nothing[] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
    return std::memcmp(&value, nothing, sizeof value) != 0;
}
template <class T>
void publish(T* word, T value) {
    *word = is_published(value) ? value : -value;
}
inline void pause() { emulation::yield(); }

inline unsigned largest_in_warp(unsigned value) {
    for (int d = 16; d > 0; d /= 2) value = ::max(value, __shfl_xor_sync(~0U, value, d));
    return value;
}

template <class T>
struct Tile;
template <>
struct Tile<float> {
    static constexpr int rows = 16, columns = 8, depth = 8, of_a = 4, of_b = 2, of_sum = 4;
};
template <>
struct Tile<double> {
    static constexpr int rows = 8, columns = 8, depth = 4, of_a = 1, of_b = 1, of_sum = 2;
};
/// What is no number of TF32 loses its last bits.
inline float first_bits(float value) { return std::bit_cast<float>(std::bit_cast<unsigned>(value) & ~0x1fffU); }
inline double first_bits(double value) { return value; }
template <class T, std::size_t of_sum, std::size_t of_a, std::size_t of_b>
void multiply_tile(T (&sums)[of_sum], const T (&a)[of_a], const T (&b)[of_b]) {
    using Of = Tile<T>;
    static_assert(of_sum == Of::of_sum && of_a == Of::of_a && of_b == Of::of_b);
    constexpr int bytes_of_lane = 16, groups = Of::rows / 8;
    const auto number = [](const unsigned char* all, int lane, int i) {
        T value;
        std::memcpy(&value, all + bytes_of_lane * lane + sizeof(T) * std::size_t(i), sizeof value);
        return first_bits(value);
    };
    const int g = emulation::lane() / 4, t = emulation::lane() % 4;
    T rows[groups][Of::depth];
    const unsigned char* all = emulation::exchange_in_warp(~0U, a, sizeof a);
    for (int h = 0; h < groups; ++h)
        for (int k = 0; k < Of::depth; ++k) rows[h][k] = number(all, 4 * g + k % 4, h + groups * (k / 4));
    all = emulation::exchange_in_warp(~0U, b, sizeof b);
    for (int i = 0; i < Of::of_sum; ++i)
        for (int k = 0; k < Of::depth; ++k) sums[i] += rows[i / 2][k] * number(all, 4 * (2 * t + i % 2) + k % 4, k / 4);
}
inline float round_to_tf32(float value) {
    if (!(std::abs(value) <= std::numeric_limits<float>::max())) return value;
    return std::bit_cast<float>((std::bit_cast<unsigned>(value) + 0x1000U) & ~0x1fffU);
}
inline void split_to_tf32(float value, float& big, float& rest) {
    big = std::bit_cast<float>((std::bit_cast<unsigned>(value) + 0x1000U) & ~0x1fffU);
    rest = first_bits(value - big);
}

template <int bytes>
void begin_copy(void* shared, const void* global) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    emulation::begin_copy(shared, global, bytes);
}
inline void wait_for_copies() { emulation::wait_for_copies(0); }
inline void commit_copies() { emulation::commit_copies(); }
template <int groups>
void wait_for_copies_but() {
    emulation::wait_for_copies(groups);
}
inline void prefetch(const void*) {}
template <class T>
void keep(T&) {}
inline void compute_anew_from(int&) {}

template <class T>
Arithmetic<T> widen(T value) {
    return Arithmetic<T>(value);
}
template <class T>
T narrow(Arithmetic<T> value) {
    return T(value);
}
template <int n, class T>
void widen(const T* stored, Arithmetic<T>* numbers) {
    for (int i = 0; i < n; ++i) numbers[i] = widen(stored[i]);
}
template <int n, class T>
void narrow(const Arithmetic<T>* numbers, T* stored) {
    for (int i = 0; i < n; ++i) stored[i] = narrow<T>(numbers[i]);
}

template <class T>
using Zeros = std::conditional_t<is_stored_in_16_bits<T>, unsigned, T>;
template <class T>
void see(const T* stored, Zeros<T>& zeros) {
    for (int i = 0; i < (is_stored_in_16_bits<T> ? 2 : 1); ++i)
        if (const Arithmetic<T> number = widen(stored[i]); !(number - number == 0)) zeros = 1;
}
template <class T>
bool all_zero(T zeros) {
    return zeros == T(0);
}

}  // namespace deeppcr::cuda
