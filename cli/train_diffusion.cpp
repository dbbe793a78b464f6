// deeppcr train diffusion: a diffusion model of Fashion-MNIST.
#include <memory>

#include <deeppcr/nn/diffusion.hpp>

#include "command.hpp"
#include "given_options.hpp"
#include "report.hpp"
#include "training_command.hpp"

namespace deeppcr::program {
namespace {

using nn::DiffusionOptions;

struct TrainDiffusionArguments {
    TrainingFiles files;
    std::string data;
    std::unique_ptr<GivenOptions<DiffusionOptions>> given;
};

Json to_json(const nn::DiffusionStep& step) {
    return {{"network", step.autoencoder ? "autoencoder" : "denoiser"},
            {"step", step.step},
            {"loss", step.loss},
            {"learning_rate", step.learning_rate},
            {"gradient_norm", step.gradient_norm},
            {"seconds", step.seconds}};
}

DiffusionOptions gather(const TrainDiffusionArguments& arguments, Group& group) {
    auto options = arguments.files.options(nn::diffusion_options);
    arguments.given->apply(options);
    options.group = &group;
    options.data = arguments.data;
    arguments.files.check();
    return options;
}

Exit run_train_diffusion(const TrainDiffusionArguments& arguments, Output& output) {
    const DiffusionOptions options = gather(arguments, output.group());
    Log log(arguments.files, output);
    output.line("Fashion-MNIST, a diffusion model of " +
                (options.space == nn::Space::latent ? count_text(options.latents) + " latents" : "its pixels") +
                ", which predicts the " + nn::name_of(nn::prediction_names, options.prediction));
    warn_about_slow_blas(output);

    TrainingProgress progress(output);
    bool autoencoder = false;
    RecentMean loss(50);
    nn::DiffusionCallbacks callbacks;
    callbacks.step = [&](const nn::DiffusionStep& step) {
        log.write(to_json(step));
        if (autoencoder != step.autoencoder) loss = RecentMean(50);
        autoencoder = step.autoencoder;
        loss.add(step.loss);
        progress.show(autoencoder ? "autoencoder" : "denoiser", double(step.step), double(step.steps),
                      "loss " + number_text(loss.mean()), double(step.step - 1));
    };
    callbacks.note = [&](const std::string& note) { progress.warn(note); };
    callbacks.interrupted = interrupted;
    const nn::DiffusionTraining result = nn::train_diffusion(options, callbacks);
    progress.end();

    const auto mean_of_last = [&](bool of_autoencoder) {
        double sum = 0;
        int count = 0;
        for (auto step = result.steps.rbegin(); step != result.steps.rend() && count < 100; ++step)
            if (step->autoencoder == of_autoencoder) sum += step->loss, ++count;
        return count > 0 ? sum / count : std::nan("");
    };
    std::string text = count_text(index(result.steps.size())) + " steps in " + seconds_text(result.seconds) + ", " +
                       count_text(result.parameters) + " parameters";
    if (options.space == nn::Space::latent) text += "; loss of the autoencoder " + number_text(mean_of_last(true));
    output.line(text + ", of the denoiser " + number_text(mean_of_last(false)) + " (means of the last steps)");
    const Exit exit = arguments.files.finish(result, output, "deeppcr sample");

    Json& json = output.result;
    json["seconds"] = result.seconds;
    json["steps"] = Json::array();
    for (const nn::DiffusionStep& step : result.steps) json["steps"].push_back(to_json(step));
    return exit;
}

}  // namespace

void add_train_diffusion(Program& program) {
    const auto arguments = std::make_shared<TrainDiffusionArguments>();
    CLI::App& command = program.add("train diffusion", "Train a diffusion model of Fashion-MNIST",
                                    "  deeppcr train diffusion --latents 32 --steps 20000\n"
                                    "  deeppcr train diffusion --space pixel --hidden 16 --blocks 3\n"
                                    "  deeppcr train diffusion --resume diffusion.safetensors",
                                    [arguments](Output& output) { return run_train_diffusion(*arguments, output); });
    arguments->given = std::make_unique<GivenOptions<DiffusionOptions>>(command);
    auto& given = *arguments->given;
    given.choice("--space", &DiffusionOptions::space, nn::space_names,
                 "What is denoised: an autoencoder's latents, or the pixels by a U-Net");
    given.value("--latents", &DiffusionOptions::latents, "Numbers that stand for an image");
    given.value("--hidden", &DiffusionOptions::hidden,
                "Width of the denoiser's blocks; of a U-Net its channels at full resolution");
    given.value("--blocks", &DiffusionOptions::blocks, "Blocks of the denoiser; of a U-Net its resolutions, 1 to 3");
    given.choice("--schedule", &DiffusionOptions::schedule, nn::schedule_names, "How the noise grows");
    given.value("--times", &DiffusionOptions::times, "Times of the schedule");
    given.choice("--prediction", &DiffusionOptions::prediction, nn::prediction_names, "What the denoiser predicts");
    given.value("--unconditional", &DiffusionOptions::unconditional,
                "Part of the images whose class the denoiser is not told, for --guidance");
    given.value("--batch", &DiffusionOptions::batch, "Images per step, of all processes together");
    given.value("--autoencoder-steps", &DiffusionOptions::autoencoder_steps, "Of the autoencoder, which is first");
    given.value("--steps", &DiffusionOptions::steps, "Of the denoiser");
    given.updates();
    given.value("--average", &DiffusionOptions::average,
                "Decay of the moving average of the denoiser's weights, which generates");
    given.value("--seed", &DiffusionOptions::seed, "Of weights, order and noise");
    given.value("--train-images", &DiffusionOptions::train_images, "Train on so many images only; 0: all 60,000");
    given.value("--checkpoint-interval", &DiffusionOptions::checkpoint_interval,
                "Save every so many steps, besides the end; 0: not");
    command.add_option("--data", arguments->data,
                       "Folder of Fashion-MNIST (default: DEEPPCR_DATA, else Debian's package)");
    arguments->files.add_options(command, "diffusion", "step");
}

}  // namespace deeppcr::program
