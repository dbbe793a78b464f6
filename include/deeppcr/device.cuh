// What the kernels use beyond CUDA C++ itself, each behind a function of its own, so that they can also be run where
// there is no GPU (tests/emulation has a file of this name).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <deeppcr/array.hpp>

/// Before a loop whose arrays are to lie in registers.
#define DEEPPCR_UNROLL _Pragma("unroll")
/// Before a loop that is not worth more instructions than one pass has.
#define DEEPPCR_ROLLED _Pragma("unroll 1")

namespace deeppcr::cuda {

/// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

/// Everything that another block wrote before its store_release to `word` is seen after it.
__device__ __forceinline__ unsigned load_acquire(const unsigned* word) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(unsigned* word, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
/// A number that another block waits for is its own flag: memory whose bits are all set holds nothing yet. It comes
/// whole, in no order with others.
__device__ __forceinline__ float load_published(const float* word) {
    float value;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(word) : "memory");
    return value;
}
__device__ __forceinline__ double load_published(const double* word) {
    double value;
    asm volatile("ld.relaxed.gpu.global.f64 %0, [%1];" : "=d"(value) : "l"(word) : "memory");
    return value;
}
__device__ __forceinline__ bool is_published(float value) { return __float_as_int(value) != -1; }
__device__ __forceinline__ bool is_published(double value) { return __double_as_longlong(value) != -1; }
/// Of what is NaN, that it is NaN.
__device__ __forceinline__ void publish(float* word, float value) {
    if (!is_published(value)) value = __int_as_float(0x7fffffff);
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(word), "f"(value) : "memory");
}
__device__ __forceinline__ void publish(double* word, double value) {
    if (!is_published(value)) value = __longlong_as_double(0x7fffffffffffffff);
    asm volatile("st.relaxed.gpu.global.f64 [%0], %1;" ::"l"(word), "d"(value) : "memory");
}
/// Keeps a value in registers, where a compiler would compute it anew, or look it up among the kernel's arguments, each
/// time that it is needed.
__device__ __forceinline__ void keep(index& value) { asm volatile("" : "+l"(value)); }
template <class T>
__device__ __forceinline__ void keep(T*& value) {
    asm volatile("" : "+l"(value));
}
/// Lets what follows from a value be computed anew each time, where a compiler would keep it all in registers.
__device__ __forceinline__ void compute_anew_from(int& value) { asm volatile("" : "+r"(value)); }
/// While waiting for another block.
__device__ __forceinline__ void pause() { __nanosleep(20); }

/// Of all lanes' values; all lanes call.
__device__ __forceinline__ unsigned largest_in_warp(unsigned value) { return __reduce_max_sync(~0U, value); }

/// Small matrices that a warp multiplies in tensor cores: sums += a b. The lanes share their entries; with g = lane / 4
/// and t = lane % 4 a lane has, of a, row g + 8 (i % (rows / 8)) and column t + 4 (i / (rows / 8)) as a[i]; of b, row
/// t + 4 i and column g as b[i]; of the sums, row g + 8 (i / 2) and column 2 t + i % 2 as sums[i].
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
/// float: a and b are numbers of TF32, products exact, and sums rounded as the GPU's model does it.
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const float (&a)[4], const float (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
__device__ __forceinline__ void multiply_tile(double (&sums)[2], const double (&a)[1], const double (&b)[1]) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(sums[0]), "+d"(sums[1])
        : "d"(a[0]), "d"(b[0]));
}
/// The nearest number of TF32: of its 24 bits the first 11. What is not finite stays so.
__device__ __forceinline__ float round_to_tf32(float value) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return __uint_as_float(bits);
}
/// value = big + rest, both of TF32, but for at most a unit of its last place. Of what is not finite, one of them
/// isn't.
__device__ __forceinline__ void split_to_tf32(float value, float& big, float& rest) {
    constexpr unsigned kept = ~0x1fffU, half = 0x1000;
    big = __uint_as_float((__float_as_uint(value) + half) & kept);
    rest = __uint_as_float(__float_as_uint(value - big) & kept);
}

/// Begins to copy 4, 8 or 16 bytes, aligned so, to shared memory; there after wait_for_copies and a barrier.
template <int bytes>
__device__ __forceinline__ void begin_copy(void* shared, const void* global) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(bytes) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
/// The copies begun since the last call are a group; waits for all groups but the last `groups`.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

/// Calls the line of 128 bytes there into the second-level cache.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

/// From what is stored to what is computed with, and back, rounded to the nearest.
template <class T>
__device__ __forceinline__ T widen(T value) {
    return value;
}
__device__ __forceinline__ float widen(bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
__device__ __forceinline__ float widen(float16 value) { return __half2float(__ushort_as_half(value.bits)); }

/// Two numbers of 16 bits in a word, in one instruction of those that do arithmetic: a conversion of one of them would
/// be left to the unit of special functions, which has a quarter of their rate.
template <class T>
__device__ __forceinline__ unsigned narrow_two(float low, float high) {
    unsigned word;
    if constexpr (std::is_same_v<T, bfloat16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <class T>
__device__ __forceinline__ T narrow(Arithmetic<T> value) {
    if constexpr (is_stored_in_16_bits<T>) {
        T stored;
        stored.bits = static_cast<unsigned short>(narrow_two<T>(value, 0.0F));
        return stored;
    } else {
        return value;
    }
}

/// `n` neighbours, two at once where they have 16 bits.
template <int n, class T>
__device__ __forceinline__ void widen(const T* stored, Arithmetic<T>* numbers) {
    if constexpr (is_stored_in_16_bits<T> && n % 2 == 0) {
        DEEPPCR_UNROLL
        for (int i = 0; i < n; i += 2) {
            unsigned word;
            memcpy(&word, stored + i, sizeof word);
            if constexpr (std::is_same_v<T, bfloat16>) {
                numbers[i] = __uint_as_float(word << 16);
                numbers[i + 1] = __uint_as_float(word & 0xffff0000U);
            } else {
                __half2 pair;
                memcpy(&pair, &word, sizeof word);
                const float2 both = __half22float2(pair);
                numbers[i] = both.x;
                numbers[i + 1] = both.y;
            }
        }
    } else {
        DEEPPCR_UNROLL
        for (int i = 0; i < n; ++i) numbers[i] = widen(stored[i]);
    }
}
/// What stays 0 as long as all numbers seen are finite; of both halves of a word where they have 16 bits.
template <class T>
using Zeros = std::conditional_t<is_stored_in_16_bits<T>, unsigned, T>;
/// zeros + 0 * stored[0], of 16 bits two numbers at once.
template <class T>
__device__ __forceinline__ void see(const T* stored, Zeros<T>& zeros) {
    if constexpr (is_stored_in_16_bits<T>) {
        unsigned word;
        memcpy(&word, stored, sizeof word);
        if constexpr (std::is_same_v<T, bfloat16>)
            asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(word), "r"(0U));
        else
            asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(word), "r"(0U));
    } else {
        zeros += T(0) * *stored;
    }
}
__device__ __forceinline__ bool all_zero(unsigned zeros) { return (zeros & 0x7fff7fffU) == 0; }
template <class T>
__device__ __forceinline__ bool all_zero(T zeros) {
    return zeros == T(0);
}

template <int n, class T>
__device__ __forceinline__ void narrow(const Arithmetic<T>* numbers, T* stored) {
    if constexpr (is_stored_in_16_bits<T> && n % 2 == 0) {
        DEEPPCR_UNROLL
        for (int i = 0; i < n; i += 2) {
            const unsigned word = narrow_two<T>(numbers[i], numbers[i + 1]);
            memcpy(static_cast<void*>(stored + i), &word, sizeof word);
        }
    } else {
        DEEPPCR_UNROLL
        for (int i = 0; i < n; ++i) stored[i] = narrow<T>(numbers[i]);
    }
}

}  // namespace deeppcr::cuda
