// What the core asks of a GPU, without CUDA's headers: cuda.cu, or no_cuda.cpp where it is built without CUDA.
#pragma once

#include <memory>
#include <string>

#include <deeppcr/array.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr::device {

/// Throws NoDevice, with cuda_problem(), where there is no GPU or the current one cannot run the kernels.
void require_gpu();
/// The current one. Throws NoDevice.
Device current_gpu();
/// Of the current one.
int multiprocessors();
/// Of the current one: what a block may have.
index shared_bytes_per_block();
/// Throws InvalidArgument where the current GPU's kernels cannot read or write what `name` points to.
void require_on_gpu(const std::string& name, const void* memory);
/// Whether a GPU can; false where there is none.
bool is_on_gpu(const void* memory);

/// Throws OutOfMemory, NoDevice.
std::shared_ptr<void> allocate_on_gpu(index bytes, Device device);
/// From the current GPU's pool: there for what follows in the stream, and given back after what the stream has by then.
/// Nothing waits, so that it may be called in a stream that is captured into a graph.
std::shared_ptr<void> allocate_in_stream(index bytes, CUstream_st* stream);

/// Between any two places; done when it returns.
void copy_by_gpu(void* to, const void* from, index bytes);
void fill_zeros_on_gpu(void* data, index bytes, Device device);
/// In the stream: from main memory, which is read before this returns, or to it, when the stream gets there.
void copy_to_gpu(void* to, const void* from, index bytes, CUstream_st* stream);
void copy_from_gpu(void* to, const void* from, index bytes, CUstream_st* stream);
void copy_on_gpu(void* to, const void* from, index bytes, CUstream_st* stream);
void fill_bytes(void* data, int value, index bytes, CUstream_st* stream);
/// Bytes that the current GPU has available: free, or kept by the pool and not in use.
index available_on_gpu();
/// Until everything in the stream is done. Throws Error where something in it went wrong.
void synchronise(CUstream_st* stream);
/// Whether what is enqueued there is captured into a graph.
bool is_captured(CUstream_st* stream);

/// A point in a stream of the current GPU that other streams can wait for.
class Mark {
public:
    Mark();
    void set(CUstream_st* stream);
    void wait_in(CUstream_st* stream) const;

private:
    std::shared_ptr<void> event_;
};

/// Few bytes from a kernel of the current GPU to the host, while both go on. What it needs is taken from earlier ones,
/// where there are any.
class Letter {
public:
    static constexpr index most_bytes = 4096;
    static constexpr index made_at_once = 64;
    Letter();
    /// Main memory that the kernel writes, or a copy.
    void* paper();
    /// Enqueued right behind it.
    void send(CUstream_st* stream);
    /// In place of both: main memory for `words` of 8 bytes and a mark, not 0, that the kernel writes after them.
    void* marked_paper(index words);
    /// What lies there, once it is marked; null before. No call of CUDA.
    const void* look(index words);
    /// Waits for what was sent last. Throws as `synchronise`.
    const void* receive();
    /// Copies from the GPU to `to`, where it is once this returns, and all before it in the stream is done. What fits
    /// goes through the letter, which spares the driver a copy of its own.
    void fetch(void* to, const void* from, index bytes, CUstream_st* stream);

private:
    struct Paper;
    std::shared_ptr<Paper> paper_;
};

}  // namespace deeppcr::device
