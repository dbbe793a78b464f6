#include <deeppcr/nn/denoisers.hpp>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/types.h>

#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "nn/basics.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

torch::nn::Conv2d convolution(index from, index to, index stride = 1) {
    return torch::nn::Conv2d(torch::nn::Conv2dOptions(from, to, 3).stride(stride).padding(1));
}
Tensor as_images(const Tensor& rows) { return rows.reshape({rows.size(0), 1, image_side, image_side}); }

/// Sines and cosines of the time at geometrically falling frequencies: [rows, count].
Tensor waves(const Tensor& times, index count, index largest_time) {
    const Tensor exponents = torch::arange(count / 2, times.options()) / double(count / 2);
    const Tensor angles = times.unsqueeze(1) * (1000.0 / double(largest_time)) * torch::exp(exponents * -std::log(1e4));
    return torch::cat({angles.sin(), angles.cos()}, 1);
}

/// What all layers are told of time and class: [rows, width].
struct Condition : torch::nn::Module {
    Condition(const DenoiserOptions& options, index width) : times(options.times) {
        constexpr index wave_count = 64;
        first = register_module("first", torch::nn::Linear(wave_count, width));
        second = register_module("second", torch::nn::Linear(width, width));
        if (options.classes > 0)
            embedding = register_module("embedding", torch::nn::Embedding(options.classes + 1, width));
    }
    Tensor forward(const Tensor& at_times, const Tensor& classes) {
        Tensor sum = first(waves(at_times, 64, times));
        if (embedding) sum = sum + embedding(classes);
        return torch::silu(second(torch::silu(sum)));
    }

    index times;
    torch::nn::Linear first = nullptr, second = nullptr;
    torch::nn::Embedding embedding = nullptr;
};

struct DenseBlock : torch::nn::Module {
    explicit DenseBlock(index width) {
        norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
        first = register_module("first", torch::nn::Linear(width, width));
        condition = register_module("condition", torch::nn::Linear(width, width));
        second = register_module("second", torch::nn::Linear(width, width));
    }
    Tensor forward(const Tensor& x, const Tensor& told) {
        return x + second(torch::silu(first(norm(x)) + condition(told)));
    }

    torch::nn::LayerNorm norm = nullptr;
    torch::nn::Linear first = nullptr, condition = nullptr, second = nullptr;
};

class LatentDenoiser : public DenoiserModule {
public:
    explicit LatentDenoiser(const DenoiserOptions& denoiser_options) : DenoiserModule(denoiser_options) {
        const index width = options.hidden;
        condition_ = register_module("condition", std::make_shared<Condition>(options, width));
        enter_ = register_module("enter", torch::nn::Linear(options.numbers, width));
        for (index i = 0; i < options.blocks; ++i)
            blocks_.push_back(register_module("block" + std::to_string(i), std::make_shared<DenseBlock>(width)));
        norm_ = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})));
        leave_ = register_module("leave", torch::nn::Linear(width, options.numbers));
        initialise(*this, options.seed);
        const at::NoGradGuard no_gradients;
        leave_->weight.zero_();
    }
    Tensor forward(const Tensor& inputs, const Tensor& times, const Tensor& classes) override {
        const Tensor told = condition_->forward(times, classes);
        Tensor x = enter_(inputs);
        for (const auto& block : blocks_) x = block->forward(x, told);
        return leave_(torch::silu(norm_(x)));
    }

private:
    std::shared_ptr<Condition> condition_;
    torch::nn::Linear enter_ = nullptr, leave_ = nullptr;
    std::vector<std::shared_ptr<DenseBlock>> blocks_;
    torch::nn::LayerNorm norm_ = nullptr;
};

constexpr index norm_groups = 8;

struct ImageBlock : torch::nn::Module {
    ImageBlock(index from, index to, index told) {
        first_norm = register_module("first_norm", torch::nn::GroupNorm(std::gcd(norm_groups, from), from));
        first = register_module("first", convolution(from, to));
        condition = register_module("condition", torch::nn::Linear(told, to));
        second_norm = register_module("second_norm", torch::nn::GroupNorm(std::gcd(norm_groups, to), to));
        second = register_module("second", convolution(to, to));
        if (from != to) skip = register_module("skip", torch::nn::Conv2d(torch::nn::Conv2dOptions(from, to, 1)));
    }
    Tensor forward(const Tensor& x, const Tensor& told) {
        Tensor y = first(torch::silu(first_norm(x)));
        y = y + condition(told).unsqueeze(2).unsqueeze(3);
        y = second(torch::silu(second_norm(y)));
        return (skip ? skip(x) : x) + y;
    }

    torch::nn::GroupNorm first_norm = nullptr, second_norm = nullptr;
    torch::nn::Conv2d first = nullptr, second = nullptr, skip = nullptr;
    torch::nn::Linear condition = nullptr;
};

class UNetDenoiser : public DenoiserModule {
public:
    explicit UNetDenoiser(const DenoiserOptions& denoiser_options) : DenoiserModule(denoiser_options) {
        const index told = 4 * options.hidden;
        condition_ = register_module("condition", std::make_shared<Condition>(options, told));
        enter_ = register_module("enter", convolution(1, options.hidden));
        const auto channels = [&](index level) { return options.hidden << std::min<index>(level, 1); };
        index at = options.hidden;
        for (index level = 0; level < options.blocks; ++level) {
            const std::string name = std::to_string(level);
            down_.push_back(register_module("down" + name, std::make_shared<ImageBlock>(at, channels(level), told)));
            at = channels(level);
            if (level + 1 < options.blocks) halve_.push_back(register_module("halve" + name, convolution(at, at, 2)));
        }
        middle_ = register_module("middle", std::make_shared<ImageBlock>(at, at, told));
        for (index level = options.blocks - 1; level >= 0; --level) {
            const index to = channels(level);
            up_.push_back(register_module("up" + std::to_string(level),
                                          std::make_shared<ImageBlock>(at + channels(level), to, told)));
            at = to;
        }
        norm_ = register_module("norm", torch::nn::GroupNorm(std::gcd(norm_groups, at), at));
        leave_ = register_module("leave", convolution(at, 1));
        initialise(*this, options.seed);
        const at::NoGradGuard no_gradients;
        leave_->weight.zero_();
    }
    Tensor forward(const Tensor& inputs, const Tensor& times, const Tensor& classes) override {
        const Tensor told = condition_->forward(times, classes);
        Tensor x = enter_(as_images(inputs));
        std::vector<Tensor> kept;
        for (std::size_t level = 0; level < down_.size(); ++level) {
            x = down_[level]->forward(x, told);
            kept.push_back(x);
            if (level < halve_.size()) x = halve_[level](x);
        }
        x = middle_->forward(x, told);
        for (const auto& up : up_) {
            const Tensor skip = kept.back();
            kept.pop_back();
            if (x.size(2) != skip.size(2))
                x = torch::upsample_nearest2d(x, at::IntArrayRef{skip.size(2), skip.size(3)});
            x = up->forward(torch::cat({x, skip}, 1), told);
        }
        return leave_(torch::silu(norm_(x))).reshape(inputs.sizes());
    }

private:
    std::shared_ptr<Condition> condition_;
    torch::nn::Conv2d enter_ = nullptr, leave_ = nullptr;
    std::vector<std::shared_ptr<ImageBlock>> down_, up_;
    std::vector<torch::nn::Conv2d> halve_;
    std::shared_ptr<ImageBlock> middle_;
    torch::nn::GroupNorm norm_ = nullptr;
};

void check(const DenoiserOptions& options) {
    require(options.numbers >= 1, "numbers", "at least 1", options.numbers);
    require(options.hidden >= 1, "hidden", "at least 1", options.hidden);
    require(options.blocks >= 1, "blocks", "at least 1", options.blocks);
    require(options.classes >= 0, "classes", "at least 0", options.classes);
    require(options.times >= 1, "times", "at least 1", options.times);
}

}  // namespace

void initialise(torch::nn::Module& module, std::uint64_t seed) {
    const at::NoGradGuard no_gradients;
    auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    for (auto& parameter : module.named_parameters()) {
        Tensor& values = parameter.value();
        if (values.dim() < 2) {
            // Norms' scales are ones already.
            if (parameter.key().ends_with("bias")) values.zero_();
        } else {
            const double inputs = double(values.numel()) / double(values.size(0));
            values.normal_(0, std::sqrt(2 / inputs), generator);
        }
    }
}

struct AutoencoderImpl::Layers : torch::nn::Module {
    explicit Layers(const AutoencoderOptions& options) {
        const index few = options.channels, many = 2 * few, last_side = image_side / 4;
        first = register_module("first", convolution(1, few, 2));
        second = register_module("second", convolution(few, many, 2));
        to_latents = register_module("to_latents", torch::nn::Linear(many * last_side * last_side, options.latents));
        from_latents =
            register_module("from_latents", torch::nn::Linear(options.latents, many * last_side * last_side));
        const auto doubling = [](index from, index to) {
            return torch::nn::ConvTranspose2d(torch::nn::ConvTranspose2dOptions(from, to, 4).stride(2).padding(1));
        };
        up = register_module("up", doubling(many, few));
        last = register_module("last", doubling(few, few));
        leave = register_module("leave", convolution(few, 1));
    }
    torch::nn::Conv2d first = nullptr, second = nullptr, leave = nullptr;
    torch::nn::Linear to_latents = nullptr, from_latents = nullptr;
    torch::nn::ConvTranspose2d up = nullptr, last = nullptr;
};

AutoencoderImpl::AutoencoderImpl(const AutoencoderOptions& autoencoder_options) : options(autoencoder_options) {
    require(options.latents >= 1 && options.latents <= image_side * image_side, "latents", "1 to 784", options.latents);
    require(options.channels >= 1, "channels", "at least 1", options.channels);
    layers_ = register_module("layers", std::make_shared<Layers>(options));
    mean = register_buffer("mean", torch::zeros({options.latents}));
    deviation = register_buffer("deviation", torch::ones({options.latents}));
    initialise(*this, options.seed);
}

Tensor AutoencoderImpl::encode(const Tensor& images) {
    Tensor x = torch::silu(layers_->first(as_images(images)));
    x = torch::silu(layers_->second(x));
    return (layers_->to_latents(x.flatten(1)) - mean) / deviation;
}

Tensor AutoencoderImpl::decode(const Tensor& latents) {
    const index last_side = image_side / 4;
    Tensor x = torch::silu(layers_->from_latents(latents * deviation + mean));
    x = torch::silu(layers_->up(x.reshape({latents.size(0), -1, last_side, last_side})));
    return layers_->leave(torch::silu(layers_->last(x))).reshape({latents.size(0), image_side * image_side});
}

void AutoencoderImpl::normalise(const Tensor& latents) {
    const at::NoGradGuard no_gradients;
    const Tensor raw = latents * deviation + mean;
    mean.copy_(raw.mean(0));
    deviation.copy_(raw.std(0).clamp_min(1e-6));
}

std::shared_ptr<DenoiserModule> latent_denoiser(const DenoiserOptions& options) {
    check(options);
    return std::make_shared<LatentDenoiser>(options);
}

std::shared_ptr<DenoiserModule> unet_denoiser(const DenoiserOptions& options) {
    check(options);
    require(options.numbers == image_side * image_side, "numbers", "784, as it is for images", options.numbers);
    require(options.blocks <= 3, "blocks", "1 to 3 resolutions", options.blocks);
    return std::make_shared<UNetDenoiser>(options);
}

Denoiser conditional(const std::shared_ptr<DenoiserModule>& network, const Tensor& classes, double guidance) {
    const index none = network->options.classes;
    if (!std::isfinite(guidance)) throw InvalidArgument("guidance", "a finite number", std::to_string(guidance));
    if (guidance != 1 && (none == 0 || !classes.defined()))
        throw InvalidArgument("guidance", "1, as there are no classes to be guided by", std::to_string(guidance));
    if (classes.defined() && (classes.scalar_type() != at::kLong || classes.dim() != 1))
        throw InvalidArgument("classes", "Long [images]", c10::toString(classes.scalar_type()));
    if (classes.defined() && classes.numel() > 0 &&
        (classes.min().item<index>() < 0 || classes.max().item<index>() > none))
        throw InvalidArgument(
            "classes", "numbers from 0 to " + std::to_string(none) + ", which is none",
            std::to_string(classes.min().item<index>()) + " to " + std::to_string(classes.max().item<index>()));
    return [=](const Tensor& inputs, const Tensor& times, const Tensor& images) {
        const Tensor nothing = torch::full_like(images, none);
        if (!classes.defined()) return network->forward(inputs, times, nothing);
        const Tensor given = classes.index_select(0, images);
        if (guidance == 1) return network->forward(inputs, times, given);
        const std::vector<Tensor> both =
            network->forward(torch::cat({inputs, inputs}), torch::cat({times, times}), torch::cat({given, nothing}))
                .chunk(2);
        return both[1] + guidance * (both[0] - both[1]);
    };
}

}  // namespace deeppcr::nn
