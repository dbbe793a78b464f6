#include <deeppcr/nn/residual_network.hpp>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "nn/basics.hpp"

namespace deeppcr::nn {

DenseParameters::DenseParameters(at::Tensor initial_weight, at::Tensor initial_bias)
    : weight(register_parameter("weight", std::move(initial_weight))),
      bias(register_parameter("bias", std::move(initial_bias))) {}

ResidualNetworkImpl::ResidualNetworkImpl(const ResidualNetworkOptions& network_options) : options(network_options) {
    const index depth = options.layers(), width = options.width(), skip = options.skip();
    require(depth >= 1, "layers", "at least 1", depth);
    require(width >= 1, "width", "at least 1", width);
    require(options.inputs() >= 1, "inputs", "at least 1", options.inputs());
    require(options.outputs() >= 1, "outputs", "at least 1", options.outputs());
    require(skip >= 0, "skip", "at least 0", skip);
    require(skip == 0 || depth % skip == 0, "layers", "a multiple of skip = " + std::to_string(skip), depth);
    if (options.type() != at::kFloat && options.type() != at::kDouble)
        throw InvalidArgument("type", "float or double", c10::toString(options.type()));
    const double parameters = double(depth) * double(width + 1) * double(width) +
                              double(width) * double(options.inputs() + options.outputs());
    const double bytes = parameters * double(c10::elementSize(options.type()));
    if (bytes > double(available_memory()))
        throw OutOfMemory("a network of " + std::to_string(depth) + " layers x " + std::to_string(width) + " needs " +
                          std::to_string(index(std::min(bytes, 9e18))) + " bytes for its parameters alone, " +
                          std::to_string(available_memory()) + " are available");

    const auto type = at::TensorOptions(options.type());
    auto generator = at::make_generator<at::CPUGeneratorImpl>(options.seed());
    const auto normal = [&](at::IntArrayRef sizes) {
        return at::empty(sizes, type).normal_(0, 1 / std::sqrt(double(sizes.back())), generator);
    };
    encoder = register_module(
        "encoder", std::make_shared<DenseParameters>(normal({width, options.inputs()}), at::zeros({width}, type)));
    at::Tensor weights = normal({depth, width, width}), biases = at::zeros({depth, width}, type);
    if (skip > 0) {
        const double blocks = double(depth / skip);
        at::Tensor last_weights = weights.slice(0, skip - 1, depth, skip),
                   last_biases = biases.slice(0, skip - 1, depth, skip);
        switch (options.activation()) {
            case Activation::identity:
            case Activation::tanh:
            case Activation::gelu:
                last_weights.div_(std::sqrt(blocks));
                break;
            case Activation::relu:
                last_weights.div_(blocks);
                break;
            case Activation::sigmoid:
                last_weights.div_(std::sqrt(blocks));
                last_biases.fill_(-std::log(blocks));
                break;
        }
    }
    layers = register_module("layers", std::make_shared<DenseParameters>(weights, biases));
    decoder = register_module("decoder", std::make_shared<DenseParameters>(normal({options.outputs(), width}),
                                                                           at::zeros({options.outputs()}, type)));
}

at::Tensor ResidualNetworkImpl::forward(const at::Tensor& images) {
    DenseChainOptions chain;
    chain.activation = options.activation();
    chain.skip = options.skip();
    chain.evaluation = options.evaluation();
    const at::Tensor initial = at::linear(images, encoder->weight, encoder->bias);
    return at::linear(dense_chain(initial, layers->weight, layers->bias, chain, memory), decoder->weight,
                      decoder->bias);
}

}  // namespace deeppcr::nn
