// What include/deeppcr/device.cuh has, for the emulation.
#pragma once

#include <cuda_runtime.h>

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

template <class T>
Arithmetic<T> widen(T value) {
    return Arithmetic<T>(value);
}
template <class T>
T narrow(Arithmetic<T> value) {
    return T(value);
}

}  // namespace deeppcr::cuda
