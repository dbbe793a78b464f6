// What the built-in recurrences check of the arrays and sections that they are given.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include <deeppcr/recurrence.hpp>

#include "device/cuda.hpp"

namespace deeppcr {

template <class T>
void require_shape(const char* name, const View<T>& view, const Shape& shape) {
    if (view.shape() != shape) throw InvalidArgument(name, to_string(shape), to_string(view.shape()));
    if (view.data() == nullptr && shape.count() != 0)
        throw InvalidArgument(name, "an array of shape " + to_string(shape), "a null pointer");
}

template <class T>
void require_contiguous(const char* name, const View<T>& view, const Shape& shape) {
    require_shape(name, view, shape);
    if (!view.contiguous())
        throw InvalidArgument(name, "contiguous memory",
                              "strides of " + std::to_string(view.step_stride()) + " and " +
                                  std::to_string(view.batch_stride()) + " elements");
}

template <class T>
void require_contiguous_blocks(const char* name, const Jacobian<T>& jacobian, const Shape& states, index block) {
    if (jacobian.states() != states || jacobian.block() != block)
        throw InvalidArgument(
            name, "blocks of " + std::to_string(block) + " for states " + to_string(states),
            "blocks of " + std::to_string(jacobian.block()) + " for states " + to_string(jacobian.states()));
    const Shape rows{states.steps, states.batch, states.width * block};
    require_contiguous(name, View<T>(jacobian.data(), rows, jacobian.step_stride(), jacobian.batch_stride()), rows);
}

inline void require_section(const Section& section, const Shape& shape) {
    if (section.first < 0 || section.last < section.first || section.last > shape.steps)
        throw InvalidArgument("section", "0 <= first <= last <= " + std::to_string(shape.steps),
                              "first " + std::to_string(section.first) + ", last " + std::to_string(section.last));
    for (const index sequence : section.sequences)
        if (sequence < 0 || sequence >= shape.batch)
            throw InvalidArgument("section.sequences", "numbers from 0 to " + std::to_string(shape.batch - 1),
                                  std::to_string(sequence));
}

/// That the section is one of `shape`, and that all arrays are contiguous states of its steps and sequences; their
/// shape.
template <class T>
Shape require_states(const Section& section, const Shape& shape,
                     std::initializer_list<std::pair<const char*, View<const T>>> arrays) {
    require_section(section, shape);
    const Shape states{section.steps(), section.batch(), shape.width};
    for (const auto& array : arrays) require_contiguous(array.first, array.second, states);
    return states;
}

/// Calls body<B>() for the backend of the section.
template <class Body>
void on_backend(const Section& section, const Body& body) {
    if (section.execution.backend == Backend::reference)
        body.template operator()<Backend::reference>();
    else
        body.template operator()<Backend::cpu>();
}

/// The same for recurrences that a GPU knows too, whose parameters lie in its memory or not.
template <class Body>
void on_backend(const Section& section, bool on_gpu, const Body& body) {
    if ((section.execution.backend == Backend::cuda) != on_gpu)
        throw InvalidArgument(
            "section.execution.backend",
            on_gpu ? "cuda, as the parameters lie on a GPU" : "cpu or reference, as the parameters lie in main memory",
            on_gpu ? "another" : "cuda");
    if (on_gpu)
        body.template operator()<Backend::cuda>();
    else
        on_backend(section, body);
}

/// All on a GPU, or none. Throws InvalidArgument.
template <class T>
bool all_on_gpu(std::initializer_list<std::pair<const char*, View<const T>>> arrays) {
    bool any = false;
    for (const auto& [name, view] : arrays) any = any || (!view.empty() && device::is_on_gpu(view.data()));
    for (const auto& [name, view] : arrays)
        if (any && !view.empty()) device::require_on_gpu(name, view.data());
    return any;
}

}  // namespace deeppcr
