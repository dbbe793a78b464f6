// States [steps,batch,width] of any strides, between main memory and where an Execution computes.
#pragma once

#include <algorithm>
#include <type_traits>

#include <deeppcr/array.hpp>
#include <deeppcr/execution.hpp>

#include "device/cuda.hpp"

namespace deeppcr::device {

/// Calls copy(to, from, count) for contiguous runs that together are all elements; for none where `from` is empty.
template <class T, class Copy>
void copy_runs(const View<const T>& from, const View<T>& to, const Copy& copy) {
    if (from.empty()) return;
    if (from.contiguous() && to.contiguous()) return copy(to.data(), from.data(), from.shape().count());
    for (index i = 0; i < from.steps(); ++i)
        for (index j = 0; j < from.batch(); ++j) copy(to.at(i, j), from.at(i, j), from.width());
}

template <class T>
void copy_in_main_memory(const std::type_identity_t<View<const T>>& from, const View<T>& to) {
    copy_runs<T>(from, to, [](T* there, const T* here, index count) { std::copy_n(here, count, there); });
}

/// From where `execution` computes to main memory; it is there when this returns.
template <class T>
void fetch(const std::type_identity_t<View<const T>>& from, const View<T>& to, const Execution& execution) {
    if (execution.backend != Backend::cuda) return copy_in_main_memory<T>(from, to);
    copy_runs<T>(from, to, [&](T* here, const T* there, index count) {
        copy_from_gpu(here, there, count * index(sizeof(T)), execution.stream);
    });
    synchronise(execution.stream);
}

/// From main memory, which is read before this returns, to where `execution` computes.
template <class T>
void put(const std::type_identity_t<View<const T>>& from, const View<T>& to, const Execution& execution) {
    if (execution.backend != Backend::cuda) return copy_in_main_memory<T>(from, to);
    copy_runs<T>(from, to, [&](T* there, const T* here, index count) {
        copy_to_gpu(there, here, count * index(sizeof(T)), execution.stream);
    });
}

}  // namespace deeppcr::device
