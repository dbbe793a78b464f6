// What benchmarks/gpu/only_on_gpu.cuh has, for the emulation: on this processor, once what is enqueued before has
// happened.
#pragma once

#include <chrono>
#include <cmath>
#include <functional>

#include <deeppcr/launch.cuh>

#include "benchmarks/gpu/rows.hpp"

namespace deeppcr::benchmark {

inline void wait_for(cudaStream_t stream) { cuda::check(cudaStreamSynchronize(stream), "waiting"); }

class Stopwatch {
public:
    void begin() {
        wait_for(nullptr);
        begin_ = std::chrono::steady_clock::now();
    }
    double end() {
        wait_for(nullptr);
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
    }

private:
    std::chrono::steady_clock::time_point begin_;
};

inline void keep_busy() {}

class Graph {
public:
    explicit Graph(const std::function<void(cudaStream_t)>& body) : body_(body) {}
    void launch() { body_(nullptr); }

private:
    std::function<void(cudaStream_t)> body_;
};

/// Plain loops.
class Blas {
public:
    void use(cudaStream_t stream) { stream_ = stream; }
    void gemm(bool transpose_a, bool transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
              const float* b, int ldb, float beta, float* c, int ldc) {
        wait_for(stream_);
        for (int j = 0; j < n; ++j)
            for (int i = 0; i < m; ++i) {
                float sum = 0;
                for (int l = 0; l < k; ++l)
                    sum += (transpose_a ? a[l + i * lda] : a[i + l * lda]) *
                           (transpose_b ? b[j + l * ldb] : b[l + j * ldb]);
                float& entry = c[i + j * ldc];
                entry = alpha * sum + (beta == 0 ? 0 : beta * entry);
            }
    }
    void gemm_batch(bool transpose_a, bool transpose_b, int m, int n, int k, const float* a, int lda, index stride_a,
                    const float* b, int ldb, index stride_b, float* c, int ldc, index stride_c, int count) {
        for (int i = 0; i < count; ++i)
            gemm(transpose_a, transpose_b, m, n, k, 1, a + i * stride_a, lda, b + i * stride_b, ldb, 0,
                 c + i * stride_c, ldc);
    }
    void gemv(bool transpose, int m, int n, float alpha, const float* a, int lda, const float* x, float beta,
              float* y) {
        gemm(transpose, false, transpose ? n : m, 1, transpose ? m : n, alpha, a, lda, x, transpose ? m : n, beta, y,
             transpose ? n : m);
    }

private:
    cudaStream_t stream_ = nullptr;
};

template <class T, class Operation>
void inclusive_scan(void* memory, std::size_t& bytes, const T* from, T* to, Operation operation, index count) {
    bytes = 1;
    wait_for(nullptr);
    for (index i = 0; memory != nullptr && i < count; ++i) to[i] = i == 0 ? from[i] : operation(to[i - 1], from[i]);
}

inline long long cycles() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

template <int how_many>
struct EmulatedFunction {
    static constexpr int numbers = how_many;
    using Value = float;
    static float first(float x) { return x; }
};
struct TanhInHardware : EmulatedFunction<1> {
    static constexpr const char *name = "tanh.approx.f32", *type = "float";
    static float apply(float x) { return std::tanh(x); }
};
struct ExponentialInHardware : EmulatedFunction<1> {
    static constexpr const char *name = "ex2.approx.f32", *type = "float";
    static float apply(float x) { return std::exp2(x); }
};
struct TanhOfHalves : EmulatedFunction<2> {
    static constexpr const char *name = "tanh.approx.f16x2", *type = "fp16 x 2";
    static float apply(float x) { return std::tanh(x); }
};
struct TanhOfBfloats : EmulatedFunction<2> {
    static constexpr const char *name = "tanh.approx.bf16x2", *type = "bf16 x 2";
    static float apply(float x) { return std::tanh(x); }
};
struct ExponentialOfHalves : EmulatedFunction<2> {
    static constexpr const char *name = "ex2.approx.f16x2", *type = "fp16 x 2";
    static float apply(float x) { return std::exp2(x); }
};
inline float as_float(float x) { return x; }

}  // namespace deeppcr::benchmark
