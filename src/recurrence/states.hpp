// Arrays of states in main memory or on a GPU, any strides.
#pragma once

#include <algorithm>
#include <type_traits>

#include <deeppcr/execution.hpp>

#include "device/cuda.hpp"
#include "device/states.hpp"
#include "recurrence/device_cells.hpp"

namespace deeppcr {

/// to = from, element by element; nothing where `from` is empty.
template <class T>
void copy_states(const std::type_identity_t<View<const T>>& from, const View<T>& to, const Execution& execution) {
    if (execution.backend == Backend::cuda) return cell::copy_on_gpu<T>(from, to, false, execution.stream);
    device::copy_in_main_memory<T>(from, to);
}

/// to += from
template <class T>
void add_states(const std::type_identity_t<View<const T>>& from, const View<T>& to, const Execution& execution) {
    if (execution.backend == Backend::cuda) return cell::copy_on_gpu<T>(from, to, true, execution.stream);
    if constexpr (!is_stored_in_16_bits<T>)  // only GPUs compute with those
        for (index i = 0; i < from.steps(); ++i)
            for (index j = 0; j < from.batch(); ++j)
                for (index k = 0; k < from.width(); ++k) to(i, j, k) += from(i, j, k);
}

/// Sets `count` numbers to 0.
template <class T>
void clear(T* data, index count, const Execution& execution) {
    if (execution.backend != Backend::cuda)
        std::fill_n(data, count, T(0));
    else if (count > 0)
        device::fill_bytes(data, 0, count * index(sizeof(T)), execution.stream);
}

}  // namespace deeppcr
