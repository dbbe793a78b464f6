// What the ranks of a Group tell each other from GPU to GPU.
#pragma once

#include <memory>

#include <deeppcr/array.hpp>
#include <deeppcr/group.hpp>

namespace deeppcr::distribute {

/// This rank's slice [first, last) of values that all ranks have: the one that it sums.
struct Slice {
    index first, last;
    index count() const { return last - first; }
};
inline Slice slice(index count, int rank, int ranks) { return {count * rank / ranks, count * (rank + 1) / ranks}; }

class Gpus {
public:
    Gpus() = default;
    virtual ~Gpus() = default;
    Gpus(const Gpus&) = delete;
    Gpus& operator=(const Gpus&) = delete;

    /// values [count], of the current GPU, become their sums from the first rank to the last: every rank sums one slice
    /// of all ranks' values, and gives the sum to all. Enqueued in the stream. Keeps memory for as many; where one rank
    /// has not enough, throws on all.
    virtual void sum(Group& group, float* values, index count, CUstream_st* stream) = 0;
    virtual void sum(Group& group, double* values, index count, CUstream_st* stream) = 0;
};

/// Between the current GPUs of all ranks, by NCCL; null where two ranks have the same one, the library is not found or
/// cannot connect them (tried by exchanging something), or this build has no NCCL (no_nccl.cpp). Collective.
std::unique_ptr<Gpus> connect_gpus(Group& group);

}  // namespace deeppcr::distribute
