// The built-in cells' kernels for GPUs, and what else of cells runs there: cells_cuda.cu, or no_cuda.cpp.
#pragma once

#include <deeppcr/cell.hpp>

namespace deeppcr::cell {

/// With register_device_kernels; what is done once is not done again.
void register_built_in_cells();

/// Throws InvalidArgument for a Cell without.
template <class T>
const DeviceKernels<T>& device_kernels_of(const Kernels<T>& kernels) {
    const DeviceKernels<T>* const found = find_device_kernels<T>(*kernels.cell);
    if (found == nullptr)
        throw InvalidArgument("recurrence", "a Cell with kernels for GPUs (see cell.cuh, DEEPPCR_CELL_ON_GPU)",
                              kernels.name);
    return *found;
}

/// to = from, or to += from; enqueued.
template <class T>
void copy_on_gpu(View<const T> from, View<T> to, bool adding, CUstream_st* stream);

/// `decode` (cell.hpp), whose arguments fit each other; enqueued.
template <class T>
void decode_on_gpu(const Kernels<T>& kernels, View<const T> inputs, View<const Arithmetic<T>> parameters,
                   View<Arithmetic<T>> state, View<T> output, CUstream_st* stream);

}  // namespace deeppcr::cell
