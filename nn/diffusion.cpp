#include <deeppcr/nn/diffusion.hpp>

#include <ATen/CPUGeneratorImpl.h>
#include <torch/types.h>

#include <cmath>
#include <memory>
#include <string>
#include <utility>

#include <deeppcr/nn/denoisers.hpp>
#include <deeppcr/nn/fashion_mnist.hpp>
#include <deeppcr/nn/script.hpp>

#include "nn/tensors.hpp"
#include "nn/training_loop.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

const std::string format = "deeppcr diffusion model 1";
constexpr index pixel_count = image_side * image_side;
constexpr index class_count = 10;
constexpr index rows_at_once = 1000;  // of images that pass through the autoencoder outside of its training

/// Numbers that nothing else draws from: of one step of the training, or of one image.
at::Generator generator_of(std::uint64_t seed, std::uint32_t purpose, std::uint64_t number) {
    return at::make_generator<at::CPUGeneratorImpl>(mixed_seed(seed, purpose, number));
}
enum Purpose : std::uint32_t {
    training_noise = 1,
    generation_noise = 2,
    order_of_autoencoder = 3,
    order_of_denoiser = 4
};

// ------------------------------------------------------------------------------------------------ the model

struct Networks {
    Autoencoder autoencoder = nullptr;  // of latents only
    std::shared_ptr<DenoiserModule> denoiser;

    explicit Networks(const DiffusionOptions& options) {
        const DenoiserOptions denoising{.numbers = options.space == Space::latent ? options.latents : pixel_count,
                                        .hidden = options.hidden,
                                        .blocks = options.blocks,
                                        .classes = class_count,
                                        .times = options.times,
                                        .seed = options.seed};
        if (options.space == Space::latent) {
            autoencoder = Autoencoder(AutoencoderOptions{.latents = options.latents, .seed = options.seed});
            denoiser = latent_denoiser(denoising);
        } else {
            denoiser = unet_denoiser(denoising);
        }
    }

    NamedTensors autoencoder_parameters() const {
        NamedTensors all;
        if (autoencoder)
            for (const auto& parameter : autoencoder->named_parameters())
                all.emplace_back("autoencoder." + parameter.key(), parameter.value());
        return all;
    }
    NamedTensors denoiser_parameters() const {
        NamedTensors all;
        for (const auto& parameter : denoiser->named_parameters())
            all.emplace_back("denoiser." + parameter.key(), parameter.value());
        return all;
    }
    NamedTensors buffers() const {
        NamedTensors all;
        if (autoencoder)
            for (const auto& buffer : autoencoder->named_buffers())
                all.emplace_back("autoencoder." + buffer.key(), buffer.value());
        return all;
    }
};

void copy_from(const std::filesystem::path& path, const SavedTensors& saved, const NamedTensors& to,
               const std::string& prefix = {}) {
    const at::NoGradGuard no_gradients;
    for (const auto& [name, tensor] : to) tensor.copy_(find(path, saved, prefix + name, tensor));
}

// ------------------------------------------------------------------------------------------- the checkpoint

struct State {
    DiffusionOptions options;
    index autoencoder_steps = 0, steps = 0;  // done
    SavedTensors tensors;
};

template <class S, class Visit>
void visit_fields(S& state, const Visit& visit) {
    auto& options = state.options;
    visit("autoencoder_done", state.autoencoder_steps);
    visit("done", state.steps);
    visit("space", options.space, space_names);
    visit("latents", options.latents);
    visit("hidden", options.hidden);
    visit("blocks", options.blocks);
    visit("schedule", options.schedule, schedule_names);
    visit("times", options.times);
    visit("prediction", options.prediction, prediction_names);
    visit("unconditional", options.unconditional);
    visit("train_images", options.train_images);
    visit("batch", options.batch);
    visit("autoencoder_steps", options.autoencoder_steps);
    visit("steps", options.steps);
    visit("learning_rate", options.learning_rate);
    visit("warm_up", options.warm_up);
    visit("gradient_clip", options.gradient_clip);
    visit("average", options.average);
    visit("seed", options.seed);
    visit("checkpoint_interval", options.checkpoint_interval);
}

Metadata fields_of(const State& state) {
    Metadata fields;
    visit_fields(state, put_into(fields));
    return fields;
}

void check(const DiffusionOptions& options);

State from_saved(const std::filesystem::path& path, SavedState saved) {
    State state;
    visit_fields(state, get_from(path, saved.metadata));
    try {
        check(state.options);
    } catch (const InvalidArgument& problem) {
        throw FileError(path, problem.what());
    }
    if (state.steps < 0 || state.steps > state.options.steps || state.autoencoder_steps < 0)
        throw FileError(path, "a count of steps as metadata \"done\"", std::to_string(state.steps));
    state.tensors = std::move(saved.tensors);
    return state;
}

// ---------------------------------------------------------------------------------------------- the options

void check(const DiffusionOptions& options) {
    require(options.latents >= 1 && options.latents <= pixel_count, "latents", "1 to 784", options.latents);
    require(options.hidden >= 1 && options.hidden <= 1 << 16, "hidden", "1 to 65,536", options.hidden);
    require(options.blocks >= 1 && options.blocks <= 1000, "blocks", "1 to 1,000", options.blocks);
    require(options.times >= 1 && options.times <= 1'000'000, "times", "1 to 1,000,000", options.times);
    require(options.unconditional >= 0 && options.unconditional <= 1, "unconditional", "0 to 1", options.unconditional);
    require(options.train_images >= 0, "train_images", "at least 0", options.train_images);
    require(options.batch >= 1, "batch", "at least 1", options.batch);
    const index ranks = Share(options.group).ranks();
    require(options.batch % ranks == 0, "batch", "a multiple of the " + std::to_string(ranks) + " ranks",
            options.batch);
    require(options.autoencoder_steps >= 0, "autoencoder_steps", "at least 0", options.autoencoder_steps);
    require(options.steps >= 0, "steps", "at least 0", options.steps);
    require(options.average >= 0 && options.average < 1, "average", "0 to below 1", options.average);
    require(options.checkpoint_interval >= 0, "checkpoint_interval", "at least 0", options.checkpoint_interval);
}

OptimisationOptions optimisation_options(const DiffusionOptions& options, index steps) {
    return {.learning_rate = options.learning_rate,
            .warm_up = options.warm_up,
            .steps = steps,
            .gradient_clip = options.gradient_clip};
}

// --------------------------------------------------------------------------------------------- the training

class Training : TrainingLoop<DiffusionOptions, DiffusionCallbacks, DiffusionTraining> {
public:
    Training(const DiffusionOptions& options, const DiffusionCallbacks& callbacks)
        : TrainingLoop(options, callbacks, Share(options.group)),
          networks_(options),
          schedule_(NoiseSchedule::of(options.schedule, options.times)),
          autoencoder_({{networks_.autoencoder_parameters()}},
                       optimisation_options(options, options.autoencoder_steps)),
          denoiser_({{networks_.denoiser_parameters()}}, optimisation_options(options, options.steps)) {
        state_.options = options;
        if (share_.group() != nullptr)
            for (Optimisation* const optimisation : {&autoencoder_, &denoiser_}) optimisation->share(*share_.group());
        for (const auto& [name, tensor] : networks_.denoiser_parameters())
            average_.emplace_back(name, tensor.detach().clone());
        if (!options.resume.empty()) resume();
        const FashionMnist data = load_fashion_mnist(options.data, options.seed, 0, options.train_images);
        require(data.training.size() >= options.batch, "batch",
                "at most the number of training images, " + std::to_string(data.training.size()), options.batch);
        images_ = data.training.images;
        classes_ = data.training.labels;
    }

    DiffusionTraining run() {
        std::vector<Tensor> parameters;
        for (const auto& all : {networks_.autoencoder_parameters(), networks_.denoiser_parameters()})
            for (const auto& [name, tensor] : all) parameters.push_back(tensor);
        start(parameters);
        if (options_.space == Space::latent) {
            while (state_.autoencoder_steps < options_.autoencoder_steps && !result_.interrupted) {
                one_step(true, state_.autoencoder_steps, options_.autoencoder_steps, options_.steps, autoencoder_);
                if (due(options_.checkpoint_interval, state_.autoencoder_steps)) save();
            }
            if (!result_.interrupted) encode_all();
        }
        while (state_.steps < options_.steps && !result_.interrupted) {
            one_step(false, state_.steps, options_.steps, 0, denoiser_);
            if (due(options_.checkpoint_interval, state_.steps) && state_.steps < options_.steps) save();
        }
        save();
        return conclude();
    }

private:
    void resume() {
        const auto& path = options_.resume;
        const State saved = from_saved(path, load(format));
        check_continues(fields_of({options_, saved.autoencoder_steps, saved.steps, {}}), fields_of(saved),
                        "checkpoint_interval");
        copy_from(path, saved.tensors, networks_.autoencoder_parameters());
        copy_from(path, saved.tensors, networks_.buffers());
        copy_from(path, saved.tensors, networks_.denoiser_parameters());
        copy_from(path, saved.tensors, average_, "average.");
        if (saved.autoencoder_steps < options_.autoencoder_steps)
            autoencoder_.restore(saved.autoencoder_steps, path, saved.tensors);
        denoiser_.restore(saved.steps, path, saved.tensors);
        state_.autoencoder_steps = saved.autoencoder_steps;
        state_.steps = saved.steps;
    }

    void save() {
        if (!saves()) return;
        SavedState saved{fields_of(state_), {}};
        saved.metadata["format"] = format;
        autoencoder_.save(saved.tensors);
        denoiser_.save(saved.tensors);
        for (const auto& [name, tensor] : networks_.buffers()) saved.tensors[name] = tensor;
        for (const auto& [name, tensor] : average_) saved.tensors["average." + name] = tensor;
        checkpoint_.save(saved);
    }

    /// Images -1 .. 1 of a step's batch, and which they are.
    Tensor rows_of_step(bool autoencoder, index step) {
        const index epoch_steps = images_.size(0) / options_.batch;
        const index epoch = step / epoch_steps, position = step % epoch_steps;
        if (!order_.defined() || position == 0 || order_is_autoencoders_ != autoencoder)
            order_ = shuffled(images_.size(0), options_.seed + (autoencoder ? order_of_autoencoder : order_of_denoiser),
                              epoch);
        order_is_autoencoders_ = autoencoder;
        return order_.slice(0, position * options_.batch, (position + 1) * options_.batch);
    }
    /// This process's rows of a batch.
    Tensor own(const Tensor& batch) const {
        const auto [first, last] = share_.part(batch.size(0));
        return batch.slice(0, first, last);
    }
    static Tensor scaled(const Tensor& bytes) { return bytes.to(at::kFloat).div_(127.5).sub_(1); }

    /// The deviations of the latents are learned from all images, once the autoencoder has been.
    void encode_all() {
        const at::NoGradGuard no_gradients;
        const auto encode = [&] {
            std::vector<Tensor> parts;
            for (index first = 0; first < images_.size(0); first += rows_at_once)
                parts.push_back(networks_.autoencoder->encode(
                    scaled(images_.slice(0, first, std::min(first + rows_at_once, images_.size(0))))));
            return at::cat(parts);
        };
        samples_ = encode();
        if (state_.steps > 0) return;  // they are in the checkpoint
        networks_.autoencoder->normalise(samples_);
        samples_ = encode();
    }

    Tensor autoencoder_loss(index step) {
        const Tensor images = scaled(images_.index_select(0, own(rows_of_step(true, step))));
        return torch::mse_loss(networks_.autoencoder->decode(networks_.autoencoder->encode(images)), images);
    }

    /// Everything random is drawn for the whole batch, so that it does not depend on the number of ranks.
    Tensor denoiser_loss(index step) {
        const Tensor batch = rows_of_step(false, step), rows = own(batch);
        const Tensor sample =
            samples_.defined() ? samples_.index_select(0, rows) : scaled(images_.index_select(0, rows));
        at::Generator generator = generator_of(options_.seed, training_noise, std::uint64_t(step));
        const index count = rows.size(0), drawn = batch.size(0);
        auto sizes = sample.sizes().vec();
        sizes[0] = drawn;
        const Tensor times = own(at::empty({drawn}, at::kLong).random_(0, options_.times, generator));
        const Tensor noise = own(at::empty(sizes, sample.options()).normal_(0, 1, generator));
        const Tensor untold = own(at::empty({drawn}, at::kFloat).uniform_(0, 1, generator) < options_.unconditional);
        const Tensor classes = at::where(untold, at::full_like(rows, class_count), classes_.index_select(0, rows));
        Tensor signals = at::empty({count, 1}), noises = at::empty({count, 1});
        for (index i = 0; i < count; ++i) {
            const index time = times.data_ptr<std::int64_t>()[i];
            signals.data_ptr<float>()[i] = float(schedule_.signal(time));
            noises.data_ptr<float>()[i] = float(schedule_.noise(time));
        }
        const Tensor mixed = signals * sample + noises * noise;
        const Tensor prediction = networks_.denoiser->forward(mixed, times.to(at::kFloat), classes);
        switch (options_.prediction) {
            case Prediction::noise:
                return torch::mse_loss(prediction, noise);
            case Prediction::velocity:
                return torch::mse_loss(prediction, signals * noise - noises * sample);
            case Prediction::sample:
                break;
        }
        return torch::mse_loss(prediction, sample);
    }

    /// done: of `steps`; so many `later` ones are of another network.
    void one_step(bool autoencoder, index& done, index steps, index later, Optimisation& optimisation) {
        const auto begin = Clock::now();
        optimisation.clear_gradients();
        const Tensor loss = (autoencoder ? autoencoder_loss(done) : denoiser_loss(done)) / double(share_.ranks());
        DiffusionStep record{.autoencoder = autoencoder, .step = done + 1, .steps = steps};
        record.loss = share_.sum(loss.item<double>());
        if (std::isfinite(record.loss)) loss.backward();
        record.learning_rate = optimisation.learning_rate(done);
        record.gradient_norm = optimisation.step(done, record.loss);
        updated(record.loss, record.gradient_norm,
                "step " + std::to_string(record.step) + " of the " + (autoencoder ? "autoencoder" : "denoiser"));
        if (!autoencoder) update_average();
        ++done;
        record.seconds = seconds_since(begin);
        tell(record, steps - done + later);
    }

    /// The first steps count less: the average forgets where the weights began.
    void update_average() {
        const at::NoGradGuard no_gradients;
        const double decay = std::min(options_.average, double(1 + state_.steps) / double(10 + state_.steps));
        const NamedTensors now = networks_.denoiser_parameters();
        for (std::size_t i = 0; i < now.size(); ++i) average_[i].second.lerp_(now[i].second, 1 - decay);
    }

    Networks networks_;
    NoiseSchedule schedule_;
    Optimisation autoencoder_, denoiser_;
    NamedTensors average_;
    State state_;
    Tensor images_, classes_, samples_, order_;
    bool order_is_autoencoders_ = false;
};

}  // namespace

DiffusionTraining train_diffusion(const DiffusionOptions& options, const DiffusionCallbacks& callbacks) {
    check(options);
    return Training(options, callbacks).run();
}

DiffusionOptions diffusion_options(const std::filesystem::path& checkpoint) {
    return from_saved(checkpoint, SavedStates(checkpoint).load(format, {})).options;
}

// -------------------------------------------------------------------------------------------- the generation

struct DiffusionModel::Parts {
    DiffusionOptions options;
    Networks networks;
    NoiseSchedule schedule;
};

DiffusionModel::DiffusionModel(const std::filesystem::path& checkpoint) {
    const State saved = from_saved(checkpoint, read_state(checkpoint, format));
    parts_ = std::make_unique<Parts>(
        Parts{saved.options, Networks(saved.options), NoiseSchedule::of(saved.options.schedule, saved.options.times)});
    copy_from(checkpoint, saved.tensors, parts_->networks.autoencoder_parameters());
    copy_from(checkpoint, saved.tensors, parts_->networks.buffers());
    copy_from(checkpoint, saved.tensors, parts_->networks.denoiser_parameters(), "average.");
}
DiffusionModel::~DiffusionModel() = default;
DiffusionModel::DiffusionModel(DiffusionModel&&) noexcept = default;
DiffusionModel& DiffusionModel::operator=(DiffusionModel&&) noexcept = default;

const DiffusionOptions& DiffusionModel::options() const { return parts_->options; }

namespace {

struct Noise {
    Tensor initial, random;  ///< [images, numbers], [steps, images, numbers]
};

/// Every image's from numbers of its own, so that it is the same in every batch.
Noise draw_noise(const DenoisingPlan& plan, const GenerationOptions& options, index numbers) {
    const index steps = index(plan.steps.size());
    Noise noise{at::empty({options.images, numbers}), {}};
    if (plan.random) noise.random = at::empty({steps, options.images, numbers});
    for (index i = 0; i < options.images; ++i) {
        at::Generator generator = generator_of(options.seed, generation_noise, std::uint64_t(i));
        noise.initial[i].normal_(0, 1, generator);
        if (plan.random) noise.random.select(1, i).copy_(at::empty({steps, numbers}).normal_(0, 1, generator));
    }
    return noise;
}

void check(const GenerationOptions& options) {
    require(options.images >= 1, "images", "at least 1", options.images);
    require(options.block >= 1, "block", "at least 1", options.block);
    require(options.coarse >= 0, "coarse", "at least 0", options.coarse);
    if (!options.classes.empty() && index(options.classes.size()) != options.images)
        throw InvalidArgument("classes", "one for each of the " + std::to_string(options.images) + " images",
                              std::to_string(options.classes.size()));
}

Tensor classes_of(const GenerationOptions& options) {
    Tensor classes = at::empty({options.images}, at::kLong);
    for (index i = 0; i < options.images; ++i)
        classes[i] = options.classes.empty() ? i % class_count : options.classes[std::size_t(i)];
    return classes;
}

/// What an evaluation in parallel asks of the network: calls that wait for each other, and rows, as a multiple of
/// sequential sampling's, a Jacobian's among them. Measured: docs/diffusion.md.
struct Demand {
    double calls, rows;
};
Demand demand(Surrogate surrogate, index width) {
    return surrogate == Surrogate::full ? Demand{16, 5 * double(1 + width)} : Demand{30, 16};
}

/// Whether so many rows more cost so little that steps side by side can pay.
bool parallel_pays(const Denoiser& denoiser, const DenoisingPlan& plan, const Noise& noise, Surrogate surrogate,
                   Generation& result) {
    const index images = noise.initial.size(0);
    const auto best_of_three = [&](index steps) {
        const Tensor inputs = noise.initial.repeat({steps, 1});
        const Tensor times = at::full({inputs.size(0)}, plan.steps.front().level.time, at::kFloat);
        const Tensor rows = at::arange(images, at::kLong).repeat({steps});
        double best = std::numeric_limits<double>::infinity();
        for (int i = 0; i < 3; ++i) {
            const auto start = Clock::now();
            denoiser(inputs, times, rows);
            best = std::min(best, seconds_since(start));
        }
        return best;
    };
    result.call_seconds = best_of_three(1);
    result.trial_seconds = best_of_three(trial_steps);
    const double row = std::max(0.0, result.trial_seconds - result.call_seconds) / double(trial_steps - 1);
    const double call = result.call_seconds - row;  // of all images, but for what grows with them
    const auto steps = double(plan.steps.size());
    const Demand parallel = demand(surrogate, noise.initial.size(1) * (plan.remembers ? 2 : 1));
    return parallel.calls * call + parallel.rows * steps * row < steps * result.call_seconds;
}

/// The last states, [images, numbers].
Tensor denoise(const Denoiser& denoiser, const DenoisingPlan& plan, const Noise& noise, Prediction prediction,
               const GenerationOptions& options, Generation& result) {
    const DenoisingRecurrence recurrence(
        plan, denoiser, noise.initial, noise.random,
        {.prediction = prediction, .clip = options.clip, .most_rows = options.most_rows});
    Options evaluation = options.evaluation;
    if (evaluation.method == Method::automatic)
        evaluation.method =
            parallel_pays(denoiser, plan, noise, evaluation.surrogate, result) ? Method::newton : Method::sequential;

    const auto start = Clock::now();
    const index steps = index(plan.steps.size());
    std::unique_ptr<Recurrence<float>> blocks;
    if (options.block > 1) blocks = recurrence.blocks(options.block);
    const Recurrence<float>& chosen = blocks ? *blocks : static_cast<const Recurrence<float>&>(recurrence);
    const Buffer<float> states = Buffer<float>::uninitialised(chosen.shape());
    if (options.coarse > 0 && evaluation.method != Method::sequential) {
        const Buffer<float> guess = recurrence.coarse_guess(options.coarse);
        for (index i = 0; i < chosen.shape().steps; ++i) {
            const index last = std::min((i + 1) * options.block, steps) - 1;
            std::copy_n(guess.view().at(last, 0), options.images * chosen.shape().width, states.view().at(i, 0));
        }
        evaluation.guess = Guess::given;
    }
    result.report = evaluate(chosen, states.view(), evaluation);
    result.seconds = seconds_since(start);
    result.images = options.images;
    result.steps = steps;
    result.dependent_calls = recurrence.dependent_calls();
    result.evaluated_rows = recurrence.evaluated_rows();
    return at::from_blob(states.view().at(chosen.shape().steps - 1, 0), {options.images, chosen.shape().width},
                         at::kFloat)
        .slice(1, 0, recurrence.numbers())
        .clone();
}

std::vector<float> numbers_of(const Tensor& tensor) {
    const Tensor values = tensor.contiguous();
    return {values.data_ptr<float>(), values.data_ptr<float>() + values.numel()};
}

}  // namespace

Generation DiffusionModel::generate(const GenerationOptions& options) const {
    check(options);
    const at::NoGradGuard no_gradients;
    const DenoisingPlan plan = denoising_plan(parts_->schedule, options.sampler);
    const Noise noise = draw_noise(plan, options, parts_->networks.denoiser->options.numbers);
    Generation result;
    result.shape = {image_side, image_side};
    const Tensor last = denoise(conditional(parts_->networks.denoiser, classes_of(options), options.guidance), plan,
                                noise, parts_->options.prediction, options, result);
    result.pixels = numbers_of(parts_->networks.autoencoder ? parts_->networks.autoencoder->decode(last) : last);
    return result;
}

Generation generate_by_script(const std::filesystem::path& file, const ScriptModelOptions& model,
                              const GenerationOptions& options) {
    check(options);
    if (options.guidance != 1)
        throw InvalidArgument("guidance", "1, as a script says nothing of images without a class",
                              std::to_string(options.guidance));
    const at::NoGradGuard no_gradients;
    const Denoiser denoiser =
        script_denoiser(Script(file), model.shape, options.classes.empty() ? Tensor() : classes_of(options));
    const DenoisingPlan plan = denoising_plan(NoiseSchedule::of(model.schedule, model.times), options.sampler);
    index numbers = 1;
    for (const index size : model.shape) numbers *= size;
    const Noise noise = draw_noise(plan, options, numbers);
    Generation result;
    result.shape = model.shape;
    result.pixels = numbers_of(denoise(denoiser, plan, noise, model.prediction, options, result));
    return result;
}

}  // namespace deeppcr::nn
