// A network of equal dense layers as CUDA graphs of calls of cuBLAS: the baseline that anybody can write. Per layer and
// direction one product and one kernel for all that is elementwise; the weights' gradients are one batched product at
// the end. States are [layers + 1, batch, width], row-major: column-major they are [width, batch], and a layer's
// weights [out, in] are [in, out].
#pragma once

#include "measuring.cuh"

namespace deeppcr::benchmark {

/// state = tanh(state + bias) (+ before), and the slope of the activation where wanted.
static __global__ void activate_kernel(const float* bias, const float* before, float* state, float* slope, index width,
                                       index count) {
    const index i = this_thread();
    if (i >= count) return;
    const float activation = tanhf(state[i] + bias[i % width]);
    if (slope != nullptr) slope[i] = 1 - activation * activation;
    state[i] = before != nullptr ? before[i] + activation : activation;
}
static __global__ void multiply_kernel(const float* adjoint, const float* slope, float* delta, index count) {
    const index i = this_thread();
    if (i < count) delta[i] = adjoint[i] * slope[i];
}
/// sums[t][k] over the batch of deltas[t][j][k]
static __global__ void sum_kernel(const float* deltas, float* sums, index batch, index width, index count) {
    const index i = this_thread();
    if (i >= count) return;
    float sum = 0;
    for (index j = 0; j < batch; ++j) sum += deltas[(i / width * batch + j) * width + i % width];
    sums[i] = sum;
}
static __global__ void descend_kernel(const float* gradient, float rate, float* parameters, index count) {
    for (index i = this_thread(); i < count; i += all_threads()) parameters[i] -= rate * gradient[i];
}

class LibraryChain {
public:
    /// Copies what it is given. skip: 0 or 1, as in DenseChain.
    LibraryChain(const Buffer<float>& weights, const Buffer<float>& biases, const Buffer<float>& initial, index skip,
                 bool products_of_vectors)
        : layers_(weights.shape().steps),
          batch_(initial.shape().batch),
          width_(initial.shape().width),
          skip_(skip),
          by_vectors_(products_of_vectors && batch_ == 1),
          weights_(weights.clone()),
          biases_(biases.clone()),
          states_(Buffer<float>::uninitialised({layers_ + 1, batch_, width_}, Layout::steps_first, there)) {
        detail::copy(states_.data(), initial.data(), initial.size() * 4);
    }

    View<float> trajectory() const { return states_.view().steps(1, layers_ + 1); }
    const Buffer<float>& weight_gradients() const { return weight_gradients_; }
    const Buffer<float>& bias_gradients() const { return bias_gradients_; }

    void forward(cudaStream_t stream) {
        blas_.use(stream);
        for (index layer = 0; layer < layers_; ++layer) {
            const float* const before = states_.view().at(layer, 0);
            float* const after = states_.view().at(layer + 1, 0);
            const float* const weights = weights_.view().at(layer, 0);
            if (by_vectors_)
                blas_.gemv(true, w(), w(), 1, weights, w(), before, 0, after);
            else
                blas_.gemm(true, false, w(), b(), w(), 1, weights, w(), before, w(), 0, after, w());
            cuda::launch(elementwise(stream), activate_kernel, biases_.view().at(layer, 0),
                         skip_ > 0 ? before : nullptr, after, slope(layer), width_, batch_ * width_);
        }
    }

    /// Memory for the backward pass. output_gradient: dL/dx_T, [1,batch,width].
    void prepare_backward(const Buffer<float>& output_gradient) {
        const auto some = [](const Shape& shape) {
            return Buffer<float>::uninitialised(shape, Layout::steps_first, there);
        };
        output_gradient_ = output_gradient.clone();
        slopes_ = some({layers_, batch_, width_});
        deltas_ = some({layers_, batch_, width_});
        adjoint_ = some({1, batch_, width_});
        weight_gradients_ = some(weights_.shape());
        bias_gradients_ = some(biases_.shape());
    }
    void backward(cudaStream_t stream) {
        blas_.use(stream);
        cuda::check(cudaMemcpyAsync(adjoint_.data(), output_gradient_.data(), std::size_t(adjoint_.size()) * 4,
                                    cudaMemcpyDeviceToDevice, stream),
                    "copying");
        for (index layer = layers_ - 1; layer >= 0; --layer) {
            float* const delta = deltas_.view().at(layer, 0);
            const float* const weights = weights_.view().at(layer, 0);
            cuda::launch(elementwise(stream), multiply_kernel, static_cast<const float*>(adjoint_.data()),
                         static_cast<const float*>(slope(layer)), delta, batch_ * width_);
            const float kept = skip_ > 0 ? 1 : 0;
            if (by_vectors_)
                blas_.gemv(false, w(), w(), 1, weights, w(), delta, kept, adjoint_.data());
            else
                blas_.gemm(false, false, w(), b(), w(), 1, weights, w(), delta, w(), kept, adjoint_.data(), w());
        }
        const index state = batch_ * width_;
        blas_.gemm_batch(false, true, w(), w(), b(), states_.data(), w(), state, deltas_.data(), w(), state,
                         weight_gradients_.data(), w(), width_ * width_, int(layers_));
        cuda::launch(cuda::one_each(layers_ * width_, stream), sum_kernel, static_cast<const float*>(deltas_.data()),
                     bias_gradients_.data(), batch_, width_, layers_ * width_);
    }
    void descend(cudaStream_t stream, float rate) {
        for (const auto& [gradient, parameters] :
             {std::pair(&weight_gradients_, &weights_), std::pair(&bias_gradients_, &biases_)}) {
            cuda::Launch where = threads_for(parameters->size());
            where.stream = stream;
            cuda::launch(where, descend_kernel, static_cast<const float*>(gradient->data()), rate, parameters->data(),
                         parameters->size());
        }
    }

private:
    int w() const { return int(width_); }
    int b() const { return int(batch_); }
    float* slope(index layer) const { return slopes_.data() == nullptr ? nullptr : slopes_.view().at(layer, 0); }
    cuda::Launch elementwise(cudaStream_t stream) const { return cuda::one_each(batch_ * width_, stream, 128); }

    index layers_, batch_, width_, skip_;
    bool by_vectors_;
    Blas blas_;
    Buffer<float> weights_, biases_, states_;
    Buffer<float> output_gradient_, slopes_, deltas_, adjoint_, weight_gradients_, bias_gradients_;
};

}  // namespace deeppcr::benchmark
