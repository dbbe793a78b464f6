// A core without CUDA has no kernels for GPUs.
#include "device/cuda.hpp"
#include "recurrence/device_cells.hpp"
#include "recurrence/diagonal_gpu.hpp"

namespace deeppcr {

void cell::register_built_in_cells() {}

template <class T>
void recurrence::take_diagonal_on_gpu(const Jacobian<const T>&, const Jacobian<T>&, CUstream_st*) {
    device::require_gpu();
}
template void recurrence::take_diagonal_on_gpu(const Jacobian<const float>&, const Jacobian<float>&, CUstream_st*);
template void recurrence::take_diagonal_on_gpu(const Jacobian<const double>&, const Jacobian<double>&, CUstream_st*);

}  // namespace deeppcr
