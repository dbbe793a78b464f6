// ResidualNetwork: a classifier with a deep residual trunk of narrow dense layers.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <string>

#include <deeppcr/nn/dense_chain.hpp>

namespace deeppcr::nn {

struct ResidualNetworkOptions {
    ResidualNetworkOptions(index layer_count, index layer_width) : layers_(layer_count), width_(layer_width) {}

    TORCH_ARG(index, layers);                              ///< of the trunk; a multiple of skip
    TORCH_ARG(index, width);                               ///< of every layer
    TORCH_ARG(index, skip) = 1;                            ///< layers per residual block; 0: no skip connections
    TORCH_ARG(Activation, activation) = Activation::tanh;  ///< of the trunk's layers
    TORCH_ARG(index, inputs) = 784;
    TORCH_ARG(index, outputs) = 10;
    TORCH_ARG(std::uint64_t, seed) = 1;            ///< of the initial parameters
    TORCH_ARG(at::ScalarType, type) = at::kFloat;  ///< float or double
    TORCH_ARG(Options, evaluation) = {};           ///< of the trunk: see DenseChainOptions
};

/// Dense layers of one shape: weight and bias, and nothing else.
struct DenseParameters : torch::nn::Module {
    DenseParameters(at::Tensor initial_weight, at::Tensor initial_bias);
    at::Tensor weight, bias;
};

/// logits = decoder(trunk(encoder(images))): the encoder [inputs -> width] and the decoder [width -> outputs] are
/// affine, the trunk is a `dense_chain`. Parameters: encoder.weight [width,inputs], encoder.bias, layers.weight
/// [layers,width,width], layers.bias [layers,width], decoder.weight [outputs,width], decoder.bias.
///
/// Initial weights are independent normal numbers of variance 1 / inputs of their layer, biases zero. The last layer
/// of each residual block is scaled down, so that the sum of all blocks is of the size of the state that they are
/// added to, at any depth: by 1 / sqrt(blocks) where the activation is odd around 0 (identity, tanh, gelu nearly), for
/// the sums of blocks then grow like a random walk; by 1 / blocks for relu, whose outputs all push the same way; and a
/// sigmoid, scaled as tanh is, starts at 1 / blocks by its bias. The numbers come from a generator of the network's
/// own, not from LibTorch's global one: the same seed gives the same network.
class ResidualNetworkImpl : public torch::nn::Module {
public:
    /// Throws InvalidArgument.
    explicit ResidualNetworkImpl(const ResidualNetworkOptions& options);

    /// images [batch,inputs] -> logits [batch,outputs]
    at::Tensor forward(const at::Tensor& images);

    ResidualNetworkOptions options;  ///< `evaluation` may be changed between calls, the rest not
    std::shared_ptr<DenseParameters> encoder, layers, decoder;
    std::shared_ptr<DenseChainMemory> memory = std::make_shared<DenseChainMemory>();
};
TORCH_MODULE(ResidualNetwork);

}  // namespace deeppcr::nn
