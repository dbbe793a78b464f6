// Panels: how the weights of a dense layer are packed for its products.
//
// The biases and the transposed weights are cut into panels of `panel_width` outputs (the last one narrower, of the
// next power of two), so that a kernel reads them front to back:
//
//     panel 0: b[0..w)            panel 1: b[w..2w)
//              W[0..w, 0]                  W[w..2w, 0]          (row k + 1 holds the weights from input k)
//              W[0..w, 1]                  W[w..2w, 1]
//              ...                         ...
#pragma once

#include <algorithm>

#include <deeppcr/array.hpp>

namespace deeppcr::chain {

/// Outputs per panel: 64 bytes, one cache line.
template <class T>
constexpr index panel_width = 64 / index(sizeof(T));

/// Columns of the last panel, where the outputs are no multiple of `panel_width`.
template <class T>
index narrow_width(index outputs) {
    index narrow = 1;
    while (narrow < outputs % panel_width<T>) narrow *= 2;
    return narrow;
}

/// Elements of the panels of a layer.
template <class T>
index panel_elements(index outputs, index inputs) {
    const index whole = outputs / panel_width<T> * panel_width<T>;
    return (whole + (outputs % panel_width<T> != 0 ? narrow_width<T>(outputs) : 0)) * (inputs + 1);
}

/// Packs outputs [first, first + count), at most one panel, `columns` wide: biases[first + i], weights(first + i, in).
/// Elements of `out` beyond `count` in a row are left as they are.
template <class T, class Bias, class Weight>
void pack_panel(index first, index count, index columns, index inputs, const Bias& bias, const Weight& weight, T* out) {
    for (index i = 0; i < count; ++i) out[i] = bias(first + i);
    for (index in = 0; in < inputs; ++in)
        for (index i = 0; i < count; ++i) out[(in + 1) * columns + i] = weight(first + i, in);
}

}  // namespace deeppcr::chain
