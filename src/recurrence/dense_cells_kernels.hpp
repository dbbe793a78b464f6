// What a backend does for DenseCell: four operations. Arguments were checked by dense_cells.cpp.
#pragma once

#include <span>

#include <deeppcr/dense_cells.hpp>

#include "recurrence/panels.hpp"

namespace deeppcr::dense_cell {

using chain::panel_width;

/// A cell as its kernels see it. `panels` holds full panels (panels.hpp; the last ones padded), those of the same
/// hidden units side by side: gate 0 of units [0, panel_width), gate 1 of them, ..., gate 0 of the next units, ... So
/// the columns that some units need are neighbours, whatever the gate.
template <class T>
struct Cell {
    DenseCellKind kind;
    View<const T> inputs;   ///< [steps, batch, gates * hidden]
    View<const T> weights;  ///< [gates, hidden, hidden]
    View<const T> biases;   ///< [gates, 1, hidden]
    const T* panels;        ///< null where the weights lie on a GPU

    index hidden() const { return weights.width(); }
    index gates() const { return gate_count(kind); }
    index width() const { return state_width(kind, hidden()); }
    /// Panels per gate, and the elements of one.
    index panel_count() const { return (hidden() + panel_width<T> - 1) / panel_width<T>; }
    index panel_size() const { return panel_width<T> * (hidden() + 1); }
};

/// Steps first+1 .. first+steps of some sequences; arrays are contiguous [steps,batch,width] unless they say otherwise.
struct Extent {
    index first, steps;
    std::span<const index> sequences;
    int threads;
    CUstream_st* stream;             // cuda
    Workspace* workspace = nullptr;  // as in a Section

    index batch() const { return index(sequences.size()); }
};

/// trajectory[i] = f(trajectory[i-1]) from state [1,batch,width] on.
template <Backend B, class T>
void run(const Cell<T>& cell, const Extent& extent, const T* state, T* trajectory);

/// Recurrence::run_chunks on a GPU.
template <class T>
void run_chunks_on_gpu(const Cell<T>& cell, const Extent& extent, const Chunks<T>& chunks);

/// after = f(before); with the Jacobians [steps,batch,width,width], or their diagonals [steps,batch,width], where not
/// null.
template <Backend B, class T>
void linearise(const Cell<T>& cell, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal);

/// Writes the gradients of the inputs [steps, batch, gates * hidden] and adds those of weights [gates,hidden,hidden]
/// and biases [gates,hidden]. state null: gradient holds the adjoint states. Otherwise it holds the gradients of the
/// outputs, and the steps are gone back through one after the other; state [1,batch,width] is the adjoint state after
/// the last step, in, and before the first one, out.
template <Backend B, class T>
void backward(const Cell<T>& cell, const Extent& extent, const T* before, const T* gradient, T* inputs, T* weights,
              T* biases, T* state);

}  // namespace deeppcr::dense_cell
