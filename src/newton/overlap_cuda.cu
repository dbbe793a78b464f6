// What overlap does on a GPU between two sweeps: a thread per number.
#include <deeppcr/launch.cuh>

#include "newton/overlap.hpp"

namespace deeppcr::newton {
namespace {

template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    gather(const T* trajectory, index step_stride, index batch_stride, const T* initial, index length, index batch,
           index width, index count, T* starts) {
    const index i = cuda::this_thread();
    if (i >= count) return;
    const index chunk = i / (batch * width), sequence = i / width % batch, k = i % width;
    starts[i] = chunk == 0 || trajectory == nullptr
                    ? initial[sequence * width + k]
                    : trajectory[(chunk * length - 1) * step_stride + sequence * batch_stride + k];
}

template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    find(const T* trajectory, index step_stride, index batch_stride, index steps, index batch, index width,
         unsigned long long* first) {
    const index i = cuda::this_thread();
    if (i >= steps * batch * width) return;
    const index step = i / (batch * width), sequence = i / width % batch;
    const T value = trajectory[step * step_stride + sequence * batch_stride + i % width];
    if (!(value - value == T(0))) atomicMax(first + sequence, (unsigned long long)(steps - step));
}

}  // namespace

template <class T>
void gather_starts(View<const T> trajectory, View<const T> initial, index length, View<T> starts, CUstream_st* stream) {
    const index count = starts.shape().count();
    cuda::launch(cuda::one_each(count, stream), gather<T>, trajectory.data(), trajectory.step_stride(),
                 trajectory.batch_stride(), initial.data(), length, starts.batch(), starts.width(), count,
                 starts.data());
}

template <class T>
void find_non_finite(View<const T> trajectory, unsigned long long* first, CUstream_st* stream) {
    const auto [steps, batch, width] = trajectory.shape();
    cuda::launch(cuda::one_each(steps * batch * width, stream), find<T>, trajectory.data(), trajectory.step_stride(),
                 trajectory.batch_stride(), steps, batch, width, first);
}

#define DEEPPCR_INSTANTIATE(T)                                                               \
    template void gather_starts(View<const T>, View<const T>, index, View<T>, CUstream_st*); \
    template void find_non_finite(View<const T>, unsigned long long*, CUstream_st*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton
