// The networks of diffusion models here: an autoencoder whose small latents stand for images, a denoiser of latents, a
// denoiser of images.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <memory>

#include <deeppcr/nn/denoising.hpp>

namespace deeppcr::nn {

/// Images of 28 x 28 numbers, one channel, as rows of 784.
inline constexpr index image_side = 28;

struct AutoencoderOptions {
    index latents = 32;   ///< 1 to 784
    index channels = 16;  ///< of the first convolution; the second has twice as many
    std::uint64_t seed = 1;
};

/// Two convolutions of stride 2 and a linear layer to the latents, and back. Latents leave `encode` normalised: the
/// training sets `mean` and `deviation` (buffers) to those of the latents of its images.
class AutoencoderImpl : public torch::nn::Module {
public:
    explicit AutoencoderImpl(const AutoencoderOptions& options);
    at::Tensor encode(const at::Tensor& images);   ///< [rows, 784] to [rows, latents]
    at::Tensor decode(const at::Tensor& latents);  ///< and back
    /// Sets mean and deviation from latents that `encode` has given.
    void normalise(const at::Tensor& latents);

    const AutoencoderOptions options;
    at::Tensor mean, deviation;  ///< [latents]

private:
    struct Layers;
    std::shared_ptr<Layers> layers_;
};
TORCH_MODULE(Autoencoder);

struct DenoiserOptions {
    index numbers = 32;  ///< of a sample
    index hidden = 256;  ///< width of the residual blocks; of a U-Net: channels at full resolution
    index blocks = 4;    ///< residual blocks of latents; of a U-Net: resolutions, each half the last, at most 3
    index classes = 10;  ///< 0: not conditional
    index times = 1000;  ///< of the schedule
    std::uint64_t seed = 1;
};

/// Weights of a network from a generator of its own, by He's rule, biases 0, scales of norms as they are.
void initialise(torch::nn::Module& module, std::uint64_t seed);

/// What every denoiser here is: a prediction for noisy samples at their times, given their classes.
class DenoiserModule : public torch::nn::Module {
public:
    explicit DenoiserModule(const DenoiserOptions& denoiser_options) : options(denoiser_options) {}
    /// inputs [rows, numbers]; times [rows], from 0 to times - 1; classes [rows], long, `classes` meaning none.
    virtual at::Tensor forward(const at::Tensor& inputs, const at::Tensor& times, const at::Tensor& classes) = 0;

    const DenoiserOptions options;
};

/// Residual blocks of two dense layers each, with the time and the class added in the middle: for latents.
std::shared_ptr<DenoiserModule> latent_denoiser(const DenoiserOptions& options);
/// Convolutions over halving and doubling resolutions, with skips between them: for images (numbers 784).
std::shared_ptr<DenoiserModule> unet_denoiser(const DenoiserOptions& options);

/// The network as DenoisingRecurrence asks it: every image with its class (long, [images], on the network's device;
/// undefined: none), and with classifier-free guidance: prediction = none + guidance (given class - none), both in one
/// call; guidance 1 asks for the class alone. Source: Ho and Salimans 2022.
Denoiser conditional(const std::shared_ptr<DenoiserModule>& network, const at::Tensor& classes, double guidance = 1);

}  // namespace deeppcr::nn
