// The rows of some sequences, whose numbers lie in main memory: they travel with the launch.
#include <algorithm>

#include <deeppcr/execution.hpp>
#include <deeppcr/launch.cuh>

#include "recurrence/gather.hpp"

namespace deeppcr {
namespace {

struct Numbers {
    static constexpr index most = 256;
    index values[most];
};

template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    gather_rows(const __grid_constant__ Numbers numbers, index count, index width, const T* from, index from_stride,
                T* to, index to_stride) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count * width)
        to[i / width * to_stride + i % width] = from[numbers.values[i / width] * from_stride + i % width];
}

__global__ void __launch_bounds__(Numbers::most)
    write_numbers(const __grid_constant__ Numbers numbers, index count, index* to) {
    if (index(threadIdx.x) < count) to[threadIdx.x] = numbers.values[threadIdx.x];
}

/// Calls body(numbers, first, count) for as many as a launch takes at a time.
template <class Body>
void for_each_launch(std::span<const index> all, const Body& body) {
    for (index first = 0; first < index(all.size()); first += Numbers::most) {
        const index count = std::min<index>(Numbers::most, index(all.size()) - first);
        Numbers numbers;
        std::copy_n(all.begin() + std::ptrdiff_t(first), count, numbers.values);
        body(numbers, first, count);
    }
}

}  // namespace

void numbers_on_gpu(std::span<const index> numbers, index* to, CUstream_st* stream) {
    for_each_launch(numbers, [&](const Numbers& some, index first, index count) {
        cuda::launch(cuda::one_each(Numbers::most, stream, Numbers::most), write_numbers, some, count, to + first);
    });
}

template <class T>
void gather_on_gpu(View<const T> from, std::span<const index> sequences, View<T> to, CUstream_st* stream) {
    for_each_launch(sequences, [&](const Numbers& numbers, index first, index count) {
        cuda::launch(cuda::one_each(count * to.width(), stream), gather_rows<T>, numbers, count, to.width(),
                     from.data(), from.batch_stride(), to.at(0, first), to.batch_stride());
    });
}

template void gather_on_gpu(View<const float>, std::span<const index>, View<float>, CUstream_st*);
template void gather_on_gpu(View<const double>, std::span<const index>, View<double>, CUstream_st*);

}  // namespace deeppcr
