// The diagonal of Jacobians, for recurrences that have no linearise_diagonal of their own: a thread for each entry. Of
// a block's row it reads one sector.
#include "recurrence/diagonal_gpu.hpp"

#include <deeppcr/launch.cuh>

namespace deeppcr::recurrence {
namespace {

template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    take_diagonal(const T* blocks, index block, index count, T* diagonal) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) diagonal[i] = blocks[i * block + i % block];
}

}  // namespace

template <class T>
void take_diagonal_on_gpu(const Jacobian<const T>& blocks, const Jacobian<T>& diagonal, CUstream_st* stream) {
    const index count = blocks.steps() * blocks.batch() * blocks.width();
    if (count > 0)
        cuda::launch(cuda::one_each(count, stream), take_diagonal<T>, blocks.data(), blocks.block(), count,
                     diagonal.data());
}

#define DEEPPCR_INSTANTIATE(T) \
    template void take_diagonal_on_gpu(const Jacobian<const T>&, const Jacobian<T>&, CUstream_st*);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::recurrence
