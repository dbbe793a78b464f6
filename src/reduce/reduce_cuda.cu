// Block bidiagonal systems x_s = M_s x_{s-1} + b_s on a GPU, s = 0 .. steps-1, M_s of K x K blocks.
//
// scan: of blocks of up to 4 in one launch (scan_tiles_cuda.cu), of larger ones in a few (scan_dense_cuda.cu).
// sequential: a thread per row (K <= 4), here, or a block of threads per chain of larger blocks (scan_dense_cuda.cu).
// pcr: DeepPCR's Algorithm 1, out of place, a launch per step of the elimination.
#include <utility>

#include "reduce/arrays_cuda.cuh"

namespace deeppcr::reduce {
namespace {

using cuda::plain_threads;

// --- substitution

/// A thread runs along one row. The steps that are next are on their way through memory while it computes: 48 to 80
/// bytes of each thread are (more in double), so that about 500 rows for each multiprocessor keep its memory busy.
template <class T, int K, bool transposed>
__global__ void __launch_bounds__(plain_threads) substitute_rows(const __grid_constant__ Arrays<T> arrays) {
    using A = Arithmetic<T>;
    constexpr int ahead = (K == 1 ? 8 : K == 2 ? 2 : 1) * (is_stored_in_16_bits<T> ? 2 : 1);
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= arrays.batch * arrays.rows) return;
    const index sequence = i / arrays.rows, row = i % arrays.rows;
    const bool without_initial = arrays.initial.data == nullptr;
    A x[K];
    for (int k = 0; k < K; ++k) x[k] = without_initial ? A(0) : cuda::widen(arrays.initial.at(0, sequence, row, K)[k]);
    T m[ahead][K * K], b[ahead][K];
    const auto read = [&](index first) {
        DEEPPCR_UNROLL
        for (int u = 0; u < ahead; ++u) {
            const index s = first + u;
            if (s >= arrays.steps) break;
            const T* const from = arrays.factor.at(s, sequence, row, K * K);
            DEEPPCR_UNROLL
            for (int e = 0; e < K * K; ++e) m[u][e] = s == 0 && without_initial ? T() : from[e];
            DEEPPCR_UNROLL
            for (int k = 0; k < K; ++k) b[u][k] = arrays.right_side.at(s, sequence, row, K)[k];
        }
    };
    read(0);
    for (index first = 0; first < arrays.steps; first += ahead) {
        A now_m[ahead][K * K], now_b[ahead][K];
        DEEPPCR_UNROLL
        for (int u = 0; u < ahead; ++u) {
            DEEPPCR_UNROLL
            for (int e = 0; e < K * K; ++e) now_m[u][e] = cuda::widen(m[u][e]);
            DEEPPCR_UNROLL
            for (int k = 0; k < K; ++k) now_b[u][k] = cuda::widen(b[u][k]);
        }
        read(first + ahead);
        DEEPPCR_UNROLL
        for (int u = 0; u < ahead; ++u) {
            if (first + u >= arrays.steps) break;
            advance<K, transposed>(now_m[u], now_b[u], x);
            T* const to = arrays.solution.at(first + u, sequence, row, K);
            DEEPPCR_UNROLL
            for (int k = 0; k < K; ++k) to[k] = cuda::narrow<T>(x[k]);
        }
    }
}

// --- parallel cyclic reduction

/// One row (step s of one chain) of one elimination step: r_s += M_s r_{s-distance}, M_s <- M_s M_{s-distance}; where
/// `transposed`, M is held as its transpose.
template <class T>
struct Elimination {
    const T *factor, *right_side;  ///< [steps, chains, K, K], [steps, chains, K]
    T *next_factor, *next_right_side;
};
template <class T>
__global__ void __launch_bounds__(plain_threads)
    eliminate(const Elimination<T> rows, index steps, index chains, int K, index distance, bool transposed) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;  // an entry of a right side
    if (i >= steps * chains * K) return;
    const int k = int(i % K);
    const index row = i / K, before = row - distance * chains;
    const bool first = before < 0;
    const T* const m = rows.factor + row * K * K;
    T sum = rows.right_side[i];
    for (int j = 0; j < K && !first; ++j)
        sum += (transposed ? m[j * K + k] : m[k * K + j]) * rows.right_side[before * K + j];
    rows.next_right_side[i] = sum;
    for (int j = 0; j < K; ++j) {
        T entry = T(0);  // nothing before the first step remains
        for (int l = 0; l < K && !first; ++l)
            entry += transposed ? rows.factor[before * K * K + index(k) * K + l] * m[index(l) * K + j]
                                : m[index(k) * K + l] * rows.factor[before * K * K + index(l) * K + j];
        rows.next_factor[row * K * K + index(k) * K + j] = entry;
    }
}

/// To contiguous rows; the first step has its initial state taken in.
template <class T, class A>
__global__ void __launch_bounds__(plain_threads)
    gather_rows(const Arrays<T> arrays, int K, bool transposed, A* factor, A* right_side) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x, chains = arrays.batch * arrays.rows;
    if (i >= arrays.steps * chains * K) return;
    const int k = int(i % K);
    const index s = i / K / chains, chain = i / K % chains, sequence = chain / arrays.rows, row = chain % arrays.rows;
    const T* const m = arrays.factor.at(s, sequence, row, K * K);
    A sum = cuda::widen(arrays.right_side.at(s, sequence, row, K)[k]);
    if (s == 0 && arrays.initial.data != nullptr) {
        const T* const x = arrays.initial.at(0, sequence, row, K);
        for (int j = 0; j < K; ++j) sum += cuda::widen(m[transposed ? j * K + k : k * K + j]) * cuda::widen(x[j]);
    }
    right_side[i] = sum;
    for (int j = 0; j < K; ++j) factor[i * K + j] = s == 0 ? A(0) : cuda::widen(m[index(k) * K + j]);
}

template <class T, class A>
__global__ void __launch_bounds__(plain_threads) scatter_rows(const A* right_side, const Arrays<T> arrays, int K) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x, chains = arrays.batch * arrays.rows;
    if (i >= arrays.steps * chains * K) return;
    const index chain = i / K % chains;
    arrays.solution.at(i / K / chains, chain / arrays.rows, chain % arrays.rows, K)[i % K] =
        cuda::narrow<T>(right_side[i]);
}

template <class T>
__global__ void __launch_bounds__(plain_threads) multiply_rows(const Arrays<T> arrays, int K) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= arrays.batch * arrays.rows * K) return;
    const index chain = i / K, sequence = chain / arrays.rows, row = chain % arrays.rows;
    const T* const m = arrays.factor.at(0, sequence, row, K * K);
    const T* const y = arrays.right_side.at(0, sequence, row, K);
    Arithmetic<T> sum = 0;
    for (int j = 0; j < K; ++j) sum += cuda::widen(m[index(j) * K + i % K]) * cuda::widen(y[j]);
    arrays.solution.at(0, sequence, row, K)[i % K] = cuda::narrow<T>(sum);
}

}  // namespace

template <Backend backend, class T>
void solve_sequential(const OrderedSystem<T>& system, const Execution& execution) {
    const Arrays<T> arrays = arrays_of(system);
    const index block = system.block(), chains = arrays.batch * arrays.rows;
    if (block <= largest_block_in_tiles)
        return with_block(block, [&]<int K>() {
            cuda::launch(cuda::one_each(chains, execution.stream),
                         system.transposed ? substitute_rows<T, K, true> : substitute_rows<T, K, false>, arrays);
        });
    substitute_dense(system, execution.stream);
}

template <Backend backend, class T>
void solve_pcr(const OrderedSystem<T>& system, const Execution& execution, Workspace& workspace) {
    using A = Arithmetic<T>;
    const Workspace::Scope scope(workspace);
    const Arrays<T> arrays = arrays_of(system);
    const index block = system.block(), chains = arrays.batch * arrays.rows, count = system.steps() * chains * block;
    const cuda::Launch launch = cuda::one_each(count, execution.stream);
    A *factor = workspace.take<A>(count * block), *next_factor = workspace.take<A>(count * block);
    A *right_side = workspace.take<A>(count), *next_right_side = workspace.take<A>(count);
    cuda::launch(launch, gather_rows<T, A>, arrays, int(block), system.transposed, factor, right_side);
    for (index distance = 1; distance < system.steps(); distance *= 2) {
        cuda::launch(launch, eliminate<A>, Elimination<A>{factor, right_side, next_factor, next_right_side},
                     system.steps(), chains, int(block), distance, system.transposed);
        std::swap(factor, next_factor);
        std::swap(right_side, next_right_side);
    }
    cuda::launch(launch, scatter_rows<T, A>, right_side, arrays, int(block));
}

template <Backend backend, class T>
void solve_scan(const OrderedSystem<T>& system, index chunk, TensorCores tensor_cores, const Execution& execution,
                Workspace& workspace) {
    if (system.block() <= largest_block_in_tiles)
        scan_tiles(system, execution.stream, workspace);
    else
        scan_dense(system, chunk, tensor_cores, execution.stream, workspace);
}

template <Backend backend, class T>
void multiply_transposed(const Jacobian<const T>& subdiagonal, const View<const T>& y, const View<T>& product,
                         const Execution& execution) {
    const Arrays<T> arrays = arrays_of<T>({subdiagonal, y, {}, product, true});
    cuda::launch(cuda::one_each(y.batch() * y.width(), execution.stream), multiply_rows<T>, arrays,
                 int(subdiagonal.block()));
}

#define DEEPPCR_INSTANTIATE(T)                                                                                \
    template void solve_sequential<Backend::cuda, T>(const OrderedSystem<T>&, const Execution&);              \
    template void solve_pcr<Backend::cuda, T>(const OrderedSystem<T>&, const Execution&, Workspace&);         \
    template void solve_scan<Backend::cuda, T>(const OrderedSystem<T>&, index, TensorCores, const Execution&, \
                                               Workspace&);                                                   \
    template void multiply_transposed<Backend::cuda, T>(const Jacobian<const T>&, const View<const T>&,       \
                                                        const View<T>&, const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::reduce
