// What differs between LibTorch 1.13 and 2.x, in one place.
#pragma once

#include <torch/optim/optimizer.h>

#include <sstream>
#include <type_traits>

namespace deeppcr::nn {

/// Under which key an optimiser keeps the state of a parameter: its address, which 1.13 writes out as text.
template <class Optimiser>
auto state_key(Optimiser& optimiser, const at::Tensor& parameter) {
    using Key = typename std::decay_t<decltype(optimiser.state())>::key_type;
    if constexpr (std::is_pointer_v<Key>) {
        return static_cast<Key>(parameter.unsafeGetTensorImpl());
    } else {
        std::ostringstream address;
        address << parameter.unsafeGetTensorImpl();
        return address.str();
    }
}

}  // namespace deeppcr::nn
