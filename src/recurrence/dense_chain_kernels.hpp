// What a backend does for DenseChain: four operations on contiguous arrays. Arguments were checked by dense_chain.cpp.
#pragma once

#include <algorithm>

#include <deeppcr/dense_chain.hpp>

#include "recurrence/panels.hpp"

namespace deeppcr::chain {

/// A chain as its kernels see it. `panels` holds the packed layers one after the other (panels.hpp).
template <class T>
struct Network {
    View<const T> weights;  ///< [layers, out, in]
    View<const T> biases;   ///< [layers, 1, width]
    const T* panels;        ///< [layers, layer_elements(width)]; null where the weights lie on a GPU
    Activation activation;
    index skip;

    index width() const { return weights.width(); }
    index depth() const { return std::max<index>(skip, 1); }  ///< layers per step
    bool residual() const { return skip > 0; }
    const T* layer_panels(index layer) const { return panels + layer * layer_elements(width()); }

    static index layer_elements(index width) { return panel_elements<T>(width, width); }
};

/// Steps first+1 .. first+steps of `batch` sequences; arrays are contiguous [steps,batch,width] unless they say
/// otherwise, those per layer [steps * depth, batch, width].
struct Extent {
    index first, steps, batch;
    int threads;
    CUstream_st* stream;             // cuda
    Workspace* workspace = nullptr;  // as in a Section
};

/// trajectory[i] = f(trajectory[i-1]) from state [1,batch,width] on; slopes (per layer) or null.
template <Backend B, class T>
void run(const Network<T>& network, const Extent& extent, const T* state, T* trajectory, T* slopes);

/// Recurrence::run_chunks on a GPU.
template <class T>
void run_chunks_on_gpu(const Network<T>& network, const Extent& extent, const Chunks<T>& chunks);

/// after = f(before); with the Jacobians [steps,batch,width,width], or their diagonals [steps,batch,width], where not
/// null.
template <Backend B, class T>
void linearise(const Network<T>& network, const Extent& extent, const T* before, T* after, T* jacobian, T* diagonal);

/// Gradients of the parameters, weights [steps * depth, width, width] and biases [steps * depth, width], from the
/// adjoint states.
template <Backend B, class T>
void parameter_gradients(const Network<T>& network, const Extent& extent, const T* before, const T* adjoint, T* weights,
                         T* biases);

/// The same from the gradients of the outputs, going back through the steps. slopes (per layer) and adjoint or null;
/// initial [1,batch,width].
template <Backend B, class T>
void run_backward(const Network<T>& network, const Extent& extent, const T* before, const T* slopes,
                  const T* output_gradient, T* weights, T* biases, T* adjoint, T* initial);

}  // namespace deeppcr::chain
