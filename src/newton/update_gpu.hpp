// The sweeps of update.hpp and estimate.hpp over arrays on a GPU, for a pass whose outcome the host needs before it
// goes on: update_cuda.cu, or no_cuda.cpp. Enqueued in the stream; what returns a result waits for it.
#pragma once

#include <span>
#include <vector>

#include "newton/update.hpp"

namespace deeppcr::newton {

/// As test_residual.
template <class T>
index test_residual_on_gpu(const Window<T>& window, std::vector<Progress>& progress, Tolerance tolerance,
                           CUstream_st* stream);
/// As apply_update.
template <class T>
index apply_update_on_gpu(const Window<T>& window, const std::vector<Progress>& progress, CUstream_st* stream);
/// As error_sources.
template <class T>
void error_sources_on_gpu(View<const T> states, View<const T> after, index first, index block,
                          std::span<const index> confirmed, View<T> sources, CUstream_st* stream);
/// Of every sequence the largest absolute value of its first confirmed[j] rows; infinity where one is not finite.
template <class T>
std::vector<double> largest_errors_on_gpu(View<const T> errors, std::span<const index> confirmed, CUstream_st* stream);
/// rows[i] = state, [1,batch,width]; all contiguous.
template <class T>
void repeat_on_gpu(View<const T> state, View<T> rows, CUstream_st* stream);
template <class T>
void fill_ones_on_gpu(T* data, index count, CUstream_st* stream);

}  // namespace deeppcr::newton
