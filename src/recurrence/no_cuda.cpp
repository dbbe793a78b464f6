// A core without CUDA has no kernels for GPUs, and nothing that could lie on one.
#include "device/cuda.hpp"
#include "recurrence/device_cells.hpp"
#include "recurrence/diagonal_gpu.hpp"

namespace deeppcr {

template <class T>
void recurrence::take_diagonal_on_gpu(const Jacobian<const T>&, const Jacobian<T>&, CUstream_st*) {
    device::require_gpu();
}
template void recurrence::take_diagonal_on_gpu(const Jacobian<const float>&, const Jacobian<float>&, CUstream_st*);
template void recurrence::take_diagonal_on_gpu(const Jacobian<const double>&, const Jacobian<double>&, CUstream_st*);

namespace cell {

void register_built_in_cells() {}

template <class T>
void copy_on_gpu(View<const T>, View<T>, bool, CUstream_st*) {
    device::require_gpu();
}
template <class T>
void decode_on_gpu(const Kernels<T>&, View<const T>, View<const Arithmetic<T>>, View<Arithmetic<T>>, View<T>,
                   CUstream_st*) {
    device::require_gpu();
}

#define DEEPPCR_INSTANTIATE(T)                                                                                    \
    template void copy_on_gpu(View<const T>, View<T>, bool, CUstream_st*);                                        \
    template void decode_on_gpu(const Kernels<T>&, View<const T>, View<const Arithmetic<T>>, View<Arithmetic<T>>, \
                                View<T>, CUstream_st*);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace cell
}  // namespace deeppcr
