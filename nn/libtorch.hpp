// What differs between LibTorch 1.13 and 2.x, in one place.
#pragma once

#include <torch/optim/optimizer.h>

#include <sstream>
#include <type_traits>

namespace deeppcr::nn {

/// The state that an optimiser keeps for a parameter; null before its first step. `State` is what the optimiser
/// documents, e.g. AdamWParamState.
/// The states are found by the parameter's address, which 1.13 writes out as text.
template <class State, class Optimiser>
State* optimiser_state(Optimiser& optimiser, const at::Tensor& parameter) {
    auto& states = optimiser.state();
    using Key = typename std::decay_t<decltype(states)>::key_type;
    Key key{};
    if constexpr (std::is_pointer_v<Key>) {
        key = parameter.unsafeGetTensorImpl();
    } else {
        std::ostringstream text;
        text << parameter.unsafeGetTensorImpl();
        key = text.str();
    }
    auto& state = states[key];
    return static_cast<State*>(state.get());
}

}  // namespace deeppcr::nn
