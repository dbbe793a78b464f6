// Matrix products, for float and double.
//
// Per-target header of Highway: included once for each instruction set. Products of every kind (forward, transposed,
// weight gradients, chains of Jacobians) go through one register tile: a few rows times some vectors of columns,
//
//     sum[row][column] <- sum[row][column] + left[row, k] * right[k, column]      for k = 0, 1, 2, ...
//
// Each element is one chain of fused multiply-adds in ascending k, whatever the tile and whatever the vector width.
// That makes every result independent of the batch, of the position in it and of the number of threads.
#if defined(DEEPPCR_RECURRENCE_PRODUCT_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef DEEPPCR_RECURRENCE_PRODUCT_INL_HPP
#undef DEEPPCR_RECURRENCE_PRODUCT_INL_HPP
#else
#define DEEPPCR_RECURRENCE_PRODUCT_INL_HPP
#endif

#include <hwy/highway.h>

#include <algorithm>

#include "recurrence/panels.hpp"

HWY_BEFORE_NAMESPACE();
namespace deeppcr::chain::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Products of fewer terms than this are limited by writing their results, and write them row by row.
constexpr index few_terms = 32;
constexpr int tile_rows = HWY_TARGET <= HWY_AVX3 ? 8 : 4;

/// The first `count` lanes; memory beyond them is not touched.
template <bool partial, class D>
HWY_INLINE hn::Vec<D> Load(D d, const hn::TFromD<D>* from, index count) {
    if constexpr (!partial) {
        (void)count;
        return hn::LoadU(d, from);
    } else {
#if HWY_TARGET <= HWY_AVX2
        return hn::MaskedLoad(hn::FirstN(d, std::size_t(count)), d, from);
#else
        HWY_ALIGN hn::TFromD<D> lanes[hn::MaxLanes(d)] = {};
        std::copy_n(from, count, lanes);
        return hn::Load(d, lanes);
#endif
    }
}

template <bool partial, class D>
HWY_INLINE void Store(D d, hn::Vec<D> v, hn::TFromD<D>* to, index count) {
    if constexpr (!partial) {
        (void)count;
        hn::StoreU(v, d, to);
    } else {
#if HWY_TARGET <= HWY_AVX2
        hn::BlendedStore(v, hn::FirstN(d, std::size_t(count)), d, to);
#else
        HWY_ALIGN hn::TFromD<D> lanes[hn::MaxLanes(d)];
        hn::Store(v, d, lanes);
        std::copy_n(lanes, count, to);
#endif
    }
}

/// The right factor of a product: rows of a matrix, or panels (which also hold the biases to start from).
template <class T>
struct Right {
    const T* data;
    index stride;      // of rows
    index width;       // panels only: all columns
    index panel_size;  // panels only: elements of a full panel

    static Right Rows(const T* data, index stride) { return {data, stride, 0, 0}; }
    static Right Panels(const T* data, index outputs, index inputs) {
        return {data, panel_width<T>, outputs, panel_width<T> * (inputs + 1)};
    }

    bool panels() const { return panel_size != 0; }
    const T* At(index column) const {
        return panels() ? data + column / panel_width<T> * panel_size + column % panel_width<T> : data + column;
    }
    index StrideAt(index column) const {
        return panels() && column >= width / panel_width<T> * panel_width<T> ? narrow_width<T>(width) : stride;
    }
};

/// out[row, column] = start[row, column] + sum over k of left[row, k] * right[k, column], for columns first..last.
template <class T>
struct Product {
    index rows, first_column, last_column, inner;
    const T* left;
    index left_row, left_inner;
    Right<T> right;
    const T* start;  // null: zero, or the panels' biases
    index start_row;
    T* out;
    index out_row;
};

template <int rows, int vectors, bool partial, class D, class T = hn::TFromD<D>>
HWY_INLINE void Tile(D d, const Product<T>& p, index row, index column) {
    using V = hn::Vec<D>;
    const index count = p.last_column - column, stride = p.right.StrideAt(column);
    const T* right[vectors];
    const T* start[vectors];
    index start_row = p.start_row;
    for (int c = 0; c < vectors; ++c) {
        const index at = column + c * index(hn::Lanes(d));
        right[c] = p.right.At(at);
        start[c] = p.start != nullptr ? p.start + row * p.start_row + at : nullptr;
        if (p.right.panels()) {
            if (p.start == nullptr) start[c] = right[c], start_row = 0;
            right[c] += stride;
        }
    }
    V sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < vectors; ++c)
            sum[r][c] = start[c] == nullptr ? hn::Zero(d) : Load<partial>(d, start[c] + r * start_row, count);
    const T* left = p.left + row * p.left_row;
    for (index k = 0; k < p.inner; ++k) {
        V b[vectors];
#pragma GCC unroll 8
        for (int c = 0; c < vectors; ++c) {
            b[c] = Load<partial>(d, right[c], count);
            right[c] += stride;
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const V a = hn::Set(d, left[r * p.left_row]);
#pragma GCC unroll 8
            for (int c = 0; c < vectors; ++c) sum[r][c] = hn::MulAdd(a, b[c], sum[r][c]);
        }
        left += p.left_inner;
    }
    T* out = p.out + row * p.out_row + column;
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < vectors; ++c)
            Store<partial>(d, sum[r][c], out + r * p.out_row + c * index(hn::Lanes(d)), count);
}

template <int rows, int vectors, bool partial, class D, class T = hn::TFromD<D>>
HWY_INLINE void Rows(D d, const Product<T>& p, index row, index column) {
    for (; row + rows <= p.rows; row += rows) Tile<rows, vectors, partial>(d, p, row, column);
    if constexpr (rows > 1) Rows<rows / 2, vectors, partial>(d, p, row, column);
}

/// Columns that do not fill a vector: the narrowest vector that holds them.
template <class D, class T = hn::TFromD<D>>
HWY_INLINE void NarrowColumns(D d, const Product<T>& p, index column) {
    const index count = p.last_column - column, lanes = index(hn::Lanes(d));
    if constexpr (hn::MaxLanes(D()) > 1) {
        if (count <= lanes / 2) return NarrowColumns(hn::Half<D>(), p, column);
    }
    if (count == lanes)
        Rows<tile_rows, 1, false>(d, p, 0, column);
    else
        Rows<tile_rows, 1, true>(d, p, 0, column);
}

template <class T>
HWY_NOINLINE void Multiply(const Product<T>& p) {
    if (p.inner < few_terms && p.rows > tile_rows && p.last_column > panel_width<T>) {
        Product<T> part = p;
        for (index row = 0; row < p.rows; row += tile_rows) {
            part.rows = std::min<index>(tile_rows, p.rows - row);
            part.left = p.left + row * p.left_row;
            part.start = p.start == nullptr ? nullptr : p.start + row * p.start_row;
            part.out = p.out + row * p.out_row;
            Multiply(part);
        }
        return;
    }
    const hn::ScalableTag<T> d;
    const index lanes = index(hn::Lanes(d));
    // Vectors side by side must lie in rows of the same stride.
    const index paired =
        p.right.panels() ? std::min(p.last_column, p.right.width / panel_width<T> * panel_width<T>) : p.last_column;
    index column = p.first_column;
    if (p.rows == 1)  // enough independent sums to fill the pipeline
        for (; column + 8 * lanes <= paired; column += 8 * lanes) Tile<1, 8, false>(d, p, 0, column);
    if (p.rows == 1)
        for (; column + 4 * lanes <= paired; column += 4 * lanes) Tile<1, 4, false>(d, p, 0, column);
    for (; column + 2 * lanes <= paired; column += 2 * lanes) Rows<tile_rows, 2, false>(d, p, 0, column);
    for (; column + lanes <= p.last_column; column += lanes) Rows<tile_rows, 1, false>(d, p, 0, column);
    if (column < p.last_column) NarrowColumns(d, p, column);
}

}  // namespace deeppcr::chain::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif
