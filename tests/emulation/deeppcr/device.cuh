// What include/deeppcr/device.cuh has, for the emulation.
#pragma once

#include <cuda_runtime.h>

#include <deeppcr/array.hpp>

#define DEEPPCR_UNROLL

namespace deeppcr::cuda {

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulation::shared_memory());
}
inline unsigned load_acquire(const unsigned* word) { return *word; }
inline void store_release(unsigned* word, unsigned value) { *word = value; }
inline void pause() { emulation::yield(); }

template <int bytes>
void begin_copy(void* shared, const void* global) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16);
    std::memcpy(shared, global, bytes);
}
inline void wait_for_copies() {}
inline void prefetch(const void*) {}

template <class T>
Arithmetic<T> widen(T value) {
    return Arithmetic<T>(value);
}
template <class T>
T narrow(Arithmetic<T> value) {
    return T(value);
}

}  // namespace deeppcr::cuda
