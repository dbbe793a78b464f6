// Rows of some sequences, wherever they lie. On a GPU: gather_cuda.cu, or no_cuda.cpp.
#pragma once

#include <algorithm>
#include <memory>
#include <span>

#include <deeppcr/array.hpp>

#include "device/cuda.hpp"
#include "recurrence/states.hpp"

namespace deeppcr {

/// On a GPU, in the stream: row j of `to` [1,sequences,width] becomes row sequences[j] of `from` [1,batch,width].
template <class T>
void gather_on_gpu(View<const T> from, std::span<const index> sequences, View<T> to, CUstream_st* stream);
/// On a GPU, in the stream: a copy of `numbers`.
void numbers_on_gpu(std::span<const index> numbers, index* to, CUstream_st* stream);

template <class T>
void gather(View<const T> from, std::span<const index> sequences, View<T> to, bool on_gpu, CUstream_st* stream) {
    if (on_gpu) return gather_on_gpu(from, sequences, to, stream);
    for (index j = 0; j < index(sequences.size()); ++j)
        std::copy_n(from.at(0, sequences[std::size_t(j)]), to.width(), to.at(0, j));
}

/// A state [1,batch,width] itself, or a contiguous copy where it has gaps.
template <class T>
class ContiguousState {
public:
    ContiguousState(View<const T> state, bool on_gpu, CUstream_st* stream) : view_(state) {
        if (state.contiguous()) return;
        const index bytes = state.shape().count() * index(sizeof(T));
        memory_ = on_gpu ? device::allocate_in_stream(bytes, stream) : detail::allocate(bytes, Device::host());
        const View<T> copy(static_cast<T*>(memory_.get()), state.shape());
        copy_states<T>(state, copy, {.backend = on_gpu ? Backend::cuda : Backend::cpu, .stream = stream});
        view_ = copy;
    }
    View<const T> view() const { return view_; }

private:
    std::shared_ptr<void> memory_;
    View<const T> view_;
};

}  // namespace deeppcr
