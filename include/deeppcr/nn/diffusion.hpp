// Diffusion models of Fashion-MNIST: training, checkpoints, and generating images by any sampler and method. No
// LibTorch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/samplers.hpp>

namespace deeppcr::nn {

enum class Space {
    latent,  ///< an autoencoder's latents, denoised by residual dense blocks
    pixel,   ///< the images themselves, denoised by a small U-Net
};
inline constexpr Names<Space, 2> space_names{{{"latent", Space::latent}, {"pixel", Space::pixel}}};

struct DiffusionOptions {
    // The model.
    Space space = Space::latent;
    index latents = 32;
    index hidden = 256, blocks = 4;  ///< see DenoiserOptions; of a U-Net 16 and 3 are sensible
    ScheduleKind schedule = ScheduleKind::linear;
    index times = 1000;
    Prediction prediction = Prediction::noise;
    double unconditional = 0.1;  ///< part of the images whose class the network is not told

    // The data: the 60,000 training images.
    std::filesystem::path data = {};
    index train_images = 0;  ///< use this many; 0: all

    /// The processes that train together, each with all parameters and its own images of every batch
    /// (docs/scaling.md); null: this one alone. The numbers are those of one process to rounding, and the same bits
    /// with a given number of ranks. `train_diffusion` is called by all ranks alike; files are read by all, and written
    /// by the first one.
    Group* group = nullptr;

    // The training: the autoencoder first (where the space is latent), then the denoiser.
    index batch = 128;  ///< of all ranks together, a multiple of their number
    index autoencoder_steps = 2000, steps = 5000;
    double learning_rate = 1e-3;
    index warm_up = 100;
    double gradient_clip = 1;
    double average = 0.999;  ///< decay of the moving average of the denoiser's weights, which is what generates
    std::uint64_t seed = 1;

    /// Written at the end, also of an interrupted training; empty: none. What was there before is kept beside it as
    /// <name>.previous.
    std::filesystem::path checkpoint = {};
    index checkpoint_interval = 0;  ///< also every so many steps; 0: not
    /// Continue from this file, to the same numbers; where it is damaged, from <name>.previous. Model, data, batch and
    /// seed must be those of the checkpoint.
    std::filesystem::path resume = {};
};

struct DiffusionStep {
    bool autoencoder = false;
    index step = 0, steps = 0;  ///< 1..steps, of the autoencoder or of the denoiser
    double loss = 0, learning_rate = 0, gradient_norm = 0;
    double seconds = 0, elapsed = 0, remaining = 0;
};
/// Of a group all but `interrupted` on the first rank alone.
struct DiffusionCallbacks {
    std::function<void(const DiffusionStep&)> step = {};
    std::function<void(const std::string&)> note = {};  ///< a damaged checkpoint whose predecessor is used
    std::function<bool()> interrupted = {};             ///< true on any rank ends the training
};
struct DiffusionTraining {
    std::vector<DiffusionStep> steps;  ///< of this call
    bool interrupted = false;
    index parameters = 0;
    double seconds = 0;
};

/// Trains by the usual loss, the mean squared error of the prediction at random times. Deterministic: the same options,
/// machine, thread count and LibTorch give the same numbers, interrupted or not. Throws InvalidArgument, FileError,
/// TrainingDiverged.
DiffusionTraining train_diffusion(const DiffusionOptions& options, const DiffusionCallbacks& callbacks = {});

/// The options that a checkpoint was written with; of a damaged one those of its predecessor. Throws FileError.
DiffusionOptions diffusion_options(const std::filesystem::path& checkpoint);

struct GenerationOptions {
    SamplerOptions sampler = {};
    /// How the steps are evaluated. The method `sequential` is the sampler as everyone runs it; `automatic` measures
    /// whether the network has more rows to give at no cost, and else is sequential.
    Options evaluation = {.method = Method::newton, .surrogate = Surrogate::diagonal, .estimates = Estimates::none};
    index coarse = 0;  ///< steps of a coarse run that gives the first guess; 0: none
    index block = 1;   ///< steps per block of multiple shooting; 1: every step is an unknown
    std::vector<index> classes =
        {};  ///< of each image, 0 to 9, or 10: any; empty: 0, 1, .. 9, 0, .., of a script: none
    index images = 16;
    double guidance = 1;
    double clip = 0;         ///< of estimates of the sample (pixels: 1 holds them in range); 0: not
    std::uint64_t seed = 1;  ///< of the noise; image i has the same noise whatever `images` is
    index most_rows = 0;     ///< of one call of the network; 0: all of a pass
};

struct Generation {
    index images = 0;
    std::vector<index> shape;   ///< of one: [28, 28], or as the model of a script has them
    std::vector<float> pixels;  ///< [images, shape...], images here -1 (black) to 1; not clamped
    Report report;
    index steps = 0;
    index dependent_calls = 0;  ///< calls of the network that waited for each other; sequentially as many as steps
    index evaluated_rows = 0;   ///< noisy images that the network has seen
    double seconds = 0;         ///< of the denoising, with a coarse run, without decoding
    /// What `automatic` measured: seconds of one call of the network for all images at one step, and at
    /// `trial_steps` steps at once; 0 where another method was asked for.
    double call_seconds = 0, trial_seconds = 0;
};
/// Steps of the larger trial call of the method `automatic`: from it and the smaller one it takes what a call and a row
/// cost, and chooses parallel evaluation where what that usually asks for (docs/diffusion.md) would take less.
inline constexpr index trial_steps = 16;

/// A trained model, ready to generate.
class DiffusionModel {
public:
    /// Throws FileError.
    explicit DiffusionModel(const std::filesystem::path& checkpoint);
    ~DiffusionModel();
    DiffusionModel(DiffusionModel&&) noexcept;
    DiffusionModel& operator=(DiffusionModel&&) noexcept;

    const DiffusionOptions& options() const;
    /// Deterministic. An image whose evaluation is not ok() is in the report; its pixels are not to be used.
    /// Throws InvalidArgument, OutOfMemory, NotConverged (see Options::on_failure).
    Generation generate(const GenerationOptions& options) const;

private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

/// What a TorchScript file does not say of its denoiser.
struct ScriptModelOptions {
    std::vector<index> shape = {28, 28};  ///< of one sample
    ScheduleKind schedule = ScheduleKind::linear;
    index times = 1000;
    Prediction prediction = Prediction::noise;
};

/// Generates by a denoiser from a TorchScript file: forward(samples [rows, shape...], times [rows]), or with a third
/// argument, classes [rows]. Throws FileError, and as DiffusionModel::generate.
Generation generate_by_script(const std::filesystem::path& file, const ScriptModelOptions& model,
                              const GenerationOptions& options);

}  // namespace deeppcr::nn
