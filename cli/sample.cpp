// deeppcr sample: images from a diffusion model, its denoising steps evaluated in parallel.
#include <cmath>
#include <memory>
#include <optional>

#include <deeppcr/nn/diffusion.hpp>
#include <files/npy.hpp>
#include <files/png.hpp>

#include "command.hpp"
#include "given_options.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

struct Target {
    Target() {
        generation.evaluation.method = Method::automatic;
        generation.evaluation.surrogate = Surrogate::diagonal;
        generation.evaluation.tolerance = 1e-4;
        generation.evaluation.estimates = Estimates::none;
    }

    nn::GenerationOptions generation;
    nn::ScriptModelOptions script;
};

struct SampleArguments {
    std::string model, output = "samples.png";
    std::vector<index> classes, shape;
    index columns = 8;
    bool compare = false, partial = false, overwrite = false;
    std::unique_ptr<GivenOptions<Target>> given;
};

nn::Generation generate(const SampleArguments& arguments, const Target& target, bool script) {
    if (script) return nn::generate_by_script(arguments.model, target.script, target.generation);
    return nn::DiffusionModel(arguments.model).generate(target.generation);
}

files::Picture picture_of(const nn::Generation& result, index image, index width, index height) {
    files::Picture picture{width, height, std::vector<std::uint8_t>(std::size_t(width * height))};
    for (index i = 0; i < width * height; ++i) {
        const float value = result.pixels[std::size_t(image * width * height + i)];
        picture.pixels[std::size_t(i)] = std::uint8_t(std::lround(std::clamp((value + 1) * 127.5F, 0.0F, 255.0F)));
    }
    return picture;
}

/// Width and height where a sample is a grey picture.
std::optional<std::pair<index, index>> picture_size(const std::vector<index>& shape) {
    if (shape.size() == 2) return {{shape[1], shape[0]}};
    if (shape.size() == 3 && shape[0] == 1) return {{shape[2], shape[1]}};
    return {};
}

void write_samples(const SampleArguments& arguments, const nn::Generation& result) {
    if (arguments.output.ends_with(".npy")) {
        std::vector<std::int64_t> shape{result.images};
        shape.insert(shape.end(), result.shape.begin(), result.shape.end());
        return files::write_npy(arguments.output, {shape, result.pixels});
    }
    const auto [width, height] = *picture_size(result.shape);
    std::vector<files::Picture> pictures;
    for (index image = 0; image < result.images; ++image) pictures.push_back(picture_of(result, image, width, height));
    files::write_png(arguments.output, files::grid(pictures, arguments.columns));
}

double largest_difference(const nn::Generation& a, const nn::Generation& b) {
    double largest = 0;
    for (std::size_t i = 0; i < a.pixels.size(); ++i) {
        const double difference = std::abs(double(a.pixels[i]) - double(b.pixels[i]));
        if (!(difference <= largest)) largest = difference;
        if (std::isnan(difference)) return difference;
    }
    return largest;
}

Exit run_sample(const SampleArguments& arguments, Output& output) {
    Target target;
    arguments.given->apply(target);
    nn::GenerationOptions& options = target.generation;
    options.classes = arguments.classes;
    if (options.classes.size() == 1)
        options.classes.assign(std::size_t(std::max<index>(options.images, 0)), options.classes[0]);
    if (!arguments.shape.empty()) target.script.shape = arguments.shape;
    const bool script = !arguments.model.ends_with(".safetensors");
    const std::vector<index> shape = script ? target.script.shape : std::vector<index>{28, 28};
    if (!arguments.output.ends_with(".npy") && !picture_size(shape))
        throw InvalidArgument("--output", "a .npy file, as samples of this shape are no grey pictures",
                              arguments.output);
    check_output(arguments.output, arguments.overwrite);
    warn_about_slow_blas(output);

    std::optional<Progress> bar(std::in_place, "denoising", double(std::max<index>(1, options.sampler.steps)));
    options.evaluation.progress = [&](index confirmed, index steps, index passes) {
        bar->update(double(confirmed) / double(std::max<index>(1, steps)) * double(options.sampler.steps),
                    passes > 0 ? std::to_string(passes) + " passes" : "one after the other");
        return !interrupted();
    };
    const nn::Generation result = generate(arguments, target, script);
    std::optional<nn::Generation> sequential;
    if (arguments.compare && !interrupted()) {
        Target other = target;
        other.generation.evaluation.method = Method::sequential;
        other.generation.coarse = 0;
        other.generation.block = 1;
        sequential = generate(arguments, other, script);
    }
    bar.reset();

    const bool right = result.report.ok();
    const bool written = right || arguments.partial;
    if (written) write_samples(arguments, result);
    output.line(count_text(result.images) + " images in " + count_text(result.steps) +
                " denoising steps: " + to_string(result.report.status) + ", " + result.report.method + ", " +
                count_text(result.dependent_calls) + " calls of the network one after the other, " +
                seconds_text(result.seconds));
    if (result.call_seconds > 0)
        output.line("one call takes " + seconds_text(result.call_seconds) + ", one for " + count_text(nn::trial_steps) +
                    " steps " + seconds_text(result.trial_seconds));
    if (sequential)
        output.line("sequentially " + seconds_text(sequential->seconds) + "; largest difference of a number " +
                    scientific_text(largest_difference(result, *sequential)));
    output.line(written ? "samples: " + arguments.output
                        : "no samples are written, as they are not right (--partial writes them nevertheless)");

    Json& json = output.result;
    json["samples"] = written ? Json(arguments.output) : Json();
    json["images"] = result.images;
    json["steps"] = result.steps;
    json["status"] = to_string(result.report.status);
    json["method"] = result.report.method;
    json["iterations"] = result.report.iterations;
    json["dependent_calls"] = result.dependent_calls;
    json["evaluated_rows"] = result.evaluated_rows;
    json["residual"] = result.report.residual;
    json["seconds"] = result.seconds;
    if (result.call_seconds > 0) {
        json["call_seconds"] = result.call_seconds;
        json["trial_seconds"] = result.trial_seconds;
    }
    if (sequential) {
        json["sequential_seconds"] = sequential->seconds;
        json["largest_difference"] = largest_difference(result, *sequential);
    }
    if (interrupted()) return Exit::interrupted;
    return right ? Exit::done : Exit::failed;
}

}  // namespace

void add_sample(Program& program) {
    const auto arguments = std::make_shared<SampleArguments>();
    CLI::App& command =
        program.add("sample", "Generate images by a diffusion model, its denoising steps in parallel",
                    "  deeppcr sample diffusion.safetensors --steps 1000 --sampler ddim -o samples.png\n"
                    "  deeppcr sample diffusion.safetensors --class 7 --guidance 2 --method sequential\n"
                    "  deeppcr sample denoiser.pt --shape 3 32 32 --prediction velocity -o samples.npy",
                    [arguments](Output& output) { return run_sample(*arguments, output); });
    command
        .add_option("model", arguments->model,
                    "What `deeppcr train diffusion` wrote (.safetensors), or a TorchScript denoiser: forward(x, t) or "
                    "forward(x, t, class)")
        ->required();
    command.add_option("--model", arguments->model, "The same");
    command.add_option("-o,--output", arguments->output, "A picture (.png), or the numbers (.npy)")
        ->capture_default_str();
    command.add_flag("--overwrite", arguments->overwrite, "Replace an output that exists");
    command.add_option("--class", arguments->classes,
                       "Of each image, or one for all; 10: any (default: 0, 1, .. 9, 0, ..)");
    command.add_option("--columns", arguments->columns, "Images to a row of the picture")->capture_default_str();
    command.add_flag("--compare", arguments->compare, "Sample sequentially too, and say how far the two are apart");
    command.add_flag("--partial", arguments->partial,
                     "Write the samples also where the evaluation did not converge or was interrupted");
    command.add_option("--shape", arguments->shape, "Of one sample of a TorchScript denoiser (default: 28 28)");

    arguments->given = std::make_unique<GivenOptions<Target>>(command);
    auto& given = *arguments->given;
    const auto generation = [](auto member) {
        return [=](Target & target) -> auto& { return target.generation.*member; };
    };
    const auto sampler = [](auto member) {
        return [=](Target & target) -> auto& { return target.generation.sampler.*member; };
    };
    const auto evaluation = [](auto member) {
        return [=](Target & target) -> auto& { return target.generation.evaluation.*member; };
    };
    const auto script = [](auto member) {
        return [=](Target & target) -> auto& { return target.script.*member; };
    };
    given.value("--images", generation(&nn::GenerationOptions::images), "How many");
    given.choice("--sampler", sampler(&nn::SamplerOptions::sampler), nn::sampler_names, "The update rule");
    given.value("--steps", sampler(&nn::SamplerOptions::steps), "Denoising steps");
    given.choice("--spacing", sampler(&nn::SamplerOptions::spacing), nn::spacing_names, "Which times they visit");
    given.value("--eta", sampler(&nn::SamplerOptions::eta), "Noise of ddim, 0 to 1");
    given.value("--guidance", generation(&nn::GenerationOptions::guidance),
                "How much more of its class an image is to have; 1: as trained");
    given.value("--clip", generation(&nn::GenerationOptions::clip), "Hold estimates of the sample within this; 0: not");
    given.value("--seed", generation(&nn::GenerationOptions::seed), "Of the noise");
    given.choice("--method", evaluation(&Options::method), nn::open_method_names,
                 "How the steps are evaluated; automatic measures whether side by side can pay");
    given.choice("--surrogate", evaluation(&Options::surrogate), nn::surrogate_names,
                 "What stands for the Jacobian: full for small latents only");
    given.value("--tolerance", evaluation(&Options::tolerance), "Of the residual of each step");
    given.value("--window", evaluation(&Options::window), "Steps evaluated at once; 0: as many as fit the memory");
    given.value("--anderson", evaluation(&Options::anderson), "Passes combined by Anderson acceleration; 0: none");
    given.value("--coarse", generation(&nn::GenerationOptions::coarse),
                "Steps of a coarse run that gives the first guess; 0: none");
    given.value("--block", generation(&nn::GenerationOptions::block), "Steps per block of multiple shooting; 1: none");
    given.value("--most-rows", generation(&nn::GenerationOptions::most_rows),
                "Noisy images in one call of the network; 0: all of a pass");
    given.choice("--prediction", script(&nn::ScriptModelOptions::prediction), nn::prediction_names,
                 "What a TorchScript denoiser predicts");
    given.choice("--schedule", script(&nn::ScriptModelOptions::schedule), nn::schedule_names,
                 "The schedule that a TorchScript denoiser was trained with");
    given.value("--times", script(&nn::ScriptModelOptions::times), "Times of that schedule");
}

}  // namespace deeppcr::program
