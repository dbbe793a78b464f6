// The diagonal of Jacobians on a GPU: diagonal_cuda.cu, or no_cuda.cpp.
#pragma once

#include <deeppcr/array.hpp>

namespace deeppcr::recurrence {

/// diagonal: [steps,batch,width], block 1, out. Both contiguous, on the current GPU.
template <class T>
void take_diagonal_on_gpu(const Jacobian<const T>& blocks, const Jacobian<T>& diagonal, CUstream_st* stream);

}  // namespace deeppcr::recurrence
