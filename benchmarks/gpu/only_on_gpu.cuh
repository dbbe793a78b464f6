// What the benchmarks use of CUDA that its emulation has no words for, each behind a class or function of its own
// (tests/emulation has a file of this name).
#pragma once

#include <dlfcn.h>

#include <cub/device/device_scan.cuh>
#include <functional>
#include <memory>

#include <deeppcr/launch.cuh>

#include "rows.hpp"

namespace deeppcr::benchmark {

/// Seconds on the GPU between begin() and end(), which are enqueued in the default stream.
class Stopwatch {
public:
    Stopwatch() {
        cuda::check(cudaEventCreate(&begin_), "creating an event");
        cuda::check(cudaEventCreate(&end_), "creating an event");
    }
    ~Stopwatch() {
        cudaEventDestroy(begin_);
        cudaEventDestroy(end_);
    }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

    void begin() { cuda::check(cudaEventRecord(begin_), "recording an event"); }
    double end() {
        cuda::check(cudaEventRecord(end_), "recording an event");
        cuda::check(cudaEventSynchronize(end_), "waiting for an event");
        float milliseconds = 0;
        cuda::check(cudaEventElapsedTime(&milliseconds, begin_, end_), "reading events");
        return double(milliseconds) * 1e-3;
    }

private:
    cudaEvent_t begin_{}, end_{};
};

template <class Cycles>
__global__ void spin(Cycles cycles) {
    const long long begin = clock64();
    while (clock64() - begin < cycles) {
    }
}
/// Lets the GPU do nothing for some 0.2 ms, in which the host gets ahead of it.
inline void keep_busy() { cuda::launch(cuda::one_each(1, nullptr), spin<long long>, 400000LL); }

/// What `body` enqueues in the stream that it is given, to be launched again and again. The body also runs once before,
/// so that whatever it needs is loaded.
class Graph {
public:
    explicit Graph(const std::function<void(cudaStream_t)>& body) {
        body(nullptr);
        cuda::check(cudaDeviceSynchronize(), "running what is to be a graph");
        cudaStream_t stream{};
        cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
        const std::shared_ptr<CUstream_st> owned(stream, [](cudaStream_t s) { cudaStreamDestroy(s); });
        cudaGraph_t graph{};
        cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), "capturing a graph");
        body(stream);
        cuda::check(cudaStreamEndCapture(stream, &graph), "capturing a graph");
        const cudaError_t made = cudaGraphInstantiate(&instance_, graph, 0);
        cudaGraphDestroy(graph);
        cuda::check(made, "making a graph");
        cuda::check(cudaGraphUpload(instance_, nullptr), "uploading a graph");
    }
    ~Graph() { cudaGraphExecDestroy(instance_); }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    /// In the default stream.
    void launch() { cuda::check(cudaGraphLaunch(instance_, nullptr), "launching a graph"); }

private:
    cudaGraphExec_t instance_{};
};

/// cuBLAS, looked for when it is needed: these programs are linked without it. Throws NotRun where there is none.
class Blas {
public:
    Blas() {
        for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"})
            if (library_ == nullptr) library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
        if (library_ == nullptr) throw NotRun("there is no cuBLAS here");
        find(create_, "cublasCreate_v2");
        find(destroy_, "cublasDestroy_v2");
        find(set_stream_, "cublasSetStream_v2");
        find(set_workspace_, "cublasSetWorkspace_v2");
        find(gemm_, "cublasSgemm_v2");
        find(gemm_batch_, "cublasSgemmStridedBatched");
        find(gemv_, "cublasSgemv_v2");
        check(create_(&handle_), "cublasCreate");
        workspace_ = detail::allocate(index(workspace_bytes), Device::cuda());
    }
    ~Blas() {
        if (handle_ != nullptr) destroy_(handle_);
    }
    Blas(const Blas&) = delete;
    Blas& operator=(const Blas&) = delete;

    /// Where calls are enqueued from now on. They may be captured: the workspace is there already.
    void use(cudaStream_t stream) {
        check(set_stream_(handle_, stream), "cublasSetStream");
        check(set_workspace_(handle_, workspace_.get(), workspace_bytes), "cublasSetWorkspace");
    }
    /// Column-major, as BLAS has it: C [m,n] = alpha op(A) op(B) + beta C, in float (no TF32).
    void gemm(bool transpose_a, bool transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
              const float* b, int ldb, float beta, float* c, int ldc) {
        check(gemm_(handle_, transpose_a, transpose_b, m, n, k, &alpha, a, lda, b, ldb, &beta, c, ldc), "cublasSgemm");
    }
    /// `count` of them, whose matrices lie `stride` apart; alpha 1, beta 0.
    void gemm_batch(bool transpose_a, bool transpose_b, int m, int n, int k, const float* a, int lda, index stride_a,
                    const float* b, int ldb, index stride_b, float* c, int ldc, index stride_c, int count) {
        const float one = 1, zero = 0;
        check(gemm_batch_(handle_, transpose_a, transpose_b, m, n, k, &one, a, lda, stride_a, b, ldb, stride_b, &zero,
                          c, ldc, stride_c, count),
              "cublasSgemmStridedBatched");
    }
    /// y = alpha op(A) x + beta y, A [m,n].
    void gemv(bool transpose, int m, int n, float alpha, const float* a, int lda, const float* x, float beta,
              float* y) {
        check(gemv_(handle_, transpose, m, n, &alpha, a, lda, x, 1, &beta, y, 1), "cublasSgemv");
    }

private:
    using Handle = void*;
    static constexpr std::size_t workspace_bytes = std::size_t(32) << 20;

    template <class Function>
    void find(Function*& function, const char* name) {
        function = reinterpret_cast<Function*>(dlsym(library_, name));
        if (function == nullptr) throw NotRun(std::string("the cuBLAS here has no ") + name);
    }
    static void check(int status, const char* doing) {
        if (status != 0) throw Error(std::string(doing) + " says " + std::to_string(status));
    }

    void* library_ = nullptr;
    Handle handle_ = nullptr;
    std::shared_ptr<void> workspace_;
    int (*create_)(Handle*) = nullptr;
    int (*destroy_)(Handle) = nullptr;
    int (*set_stream_)(Handle, cudaStream_t) = nullptr;
    int (*set_workspace_)(Handle, void*, std::size_t) = nullptr;
    int (*gemm_)(Handle, int, int, int, int, int, const float*, const float*, int, const float*, int, const float*,
                 float*, int) = nullptr;
    int (*gemm_batch_)(Handle, int, int, int, int, int, const float*, const float*, int, long long, const float*, int,
                       long long, const float*, float*, int, long long, int) = nullptr;
    int (*gemv_)(Handle, int, int, int, const float*, const float*, int, const float*, int, const float*, float*,
                 int) = nullptr;
};

/// CUB's inclusive scan; without `memory`, the bytes of it that it needs.
template <class T, class Operation>
void inclusive_scan(void* memory, std::size_t& bytes, const T* from, T* to, Operation operation, index count) {
    cuda::check(cub::DeviceScan::InclusiveScan(memory, bytes, from, to, operation, count), "scanning by CUB");
}

/// Cycles of this multiprocessor's clock.
__device__ __forceinline__ long long cycles() { return clock64(); }

// Functions of the hardware, of one number or of two in 32 bits.
struct TanhInHardware {
    static constexpr const char *name = "tanh.approx.f32", *type = "float";
    static constexpr int numbers = 1;
    using Value = float;
    __device__ static float first(float x) { return x; }
    __device__ static float apply(float x) {
        asm volatile("tanh.approx.f32 %0, %0;" : "+f"(x));
        return x;
    }
};
struct ExponentialInHardware {
    static constexpr const char *name = "ex2.approx.f32", *type = "float";
    static constexpr int numbers = 1;
    using Value = float;
    __device__ static float first(float x) { return x; }
    __device__ static float apply(float x) {
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
        return x;
    }
};
struct TanhOfHalves {
    static constexpr const char *name = "tanh.approx.f16x2", *type = "fp16 x 2";
    static constexpr int numbers = 2;
    using Value = __half2;
    __device__ static __half2 first(float x) { return __float2half2_rn(x); }
    __device__ static __half2 apply(__half2 x) { return h2tanh_approx(x); }
};
struct TanhOfBfloats {
    static constexpr const char *name = "tanh.approx.bf16x2", *type = "bf16 x 2";
    static constexpr int numbers = 2;
    using Value = __nv_bfloat162;
    __device__ static __nv_bfloat162 first(float x) { return __float2bfloat162_rn(x); }
    __device__ static __nv_bfloat162 apply(__nv_bfloat162 x) { return h2tanh_approx(x); }
};
struct ExponentialOfHalves {
    static constexpr const char *name = "ex2.approx.f16x2", *type = "fp16 x 2";
    static constexpr int numbers = 2;
    using Value = __half2;
    __device__ static __half2 first(float x) { return __float2half2_rn(x); }
    __device__ static __half2 apply(__half2 x) { return h2exp2(x); }
};
/// Whether a result is a number, and not optimised away.
__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__half2 x) { return __low2float(x); }
__device__ __forceinline__ float as_float(__nv_bfloat162 x) { return __low2float(x); }

}  // namespace deeppcr::benchmark
