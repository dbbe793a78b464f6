// What the core asks of a GPU, without CUDA's headers: cuda.cu, or no_cuda.cpp where it is built without CUDA.
#pragma once

#include <memory>
#include <string>

#include <deeppcr/array.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr::device {

/// Throws NoDevice, with cuda_problem(), where there is no GPU.
void require_gpu();
/// The current one. Throws NoDevice.
Device current_gpu();
/// Of the current one.
int multiprocessors();
/// Throws InvalidArgument where a GPU cannot read or write what `name` points to.
void require_on_gpu(const std::string& name, const void* memory);
/// Whether a GPU can; false where there is none.
bool is_on_gpu(const void* memory);

/// Throws OutOfMemory, NoDevice.
std::shared_ptr<void> allocate_on_gpu(index bytes, Device device);
/// There for what follows in the stream, and given back after what the stream has by then.
std::shared_ptr<void> allocate_in_stream(index bytes, CUstream_st* stream);
/// False, and nothing is done, where both are in main memory; else it is done when it returns.
bool copy_by_gpu(void* to, const void* from, index bytes);
void fill_zeros_on_gpu(void* data, index bytes);
/// In the stream: from main memory, which is read before this returns, or to it, when the stream gets there.
void copy_to_gpu(void* to, const void* from, index bytes, CUstream_st* stream);
void copy_from_gpu(void* to, const void* from, index bytes, CUstream_st* stream);
void fill_bytes(void* data, int value, index bytes, CUstream_st* stream);
/// Bytes that the current GPU has available.
index available_on_gpu();
/// Until everything in the stream is done. Throws Error where something in it went wrong.
void synchronise(CUstream_st* stream);

}  // namespace deeppcr::device
