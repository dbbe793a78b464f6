// Images from a diffusion model, its denoising steps one after the other and in parallel, from the same noise
// (arXiv 2309.16318, section 4.3).
#include <algorithm>
#include <cmath>
#include <optional>

#include <deeppcr/nn/diffusion.hpp>
#include <deeppcr/nn/quality.hpp>
#include <files/idx.hpp>
#include <files/png.hpp>

#include "reproduce.hpp"

namespace deeppcr::program {
namespace {

constexpr double range = 2;                   // of a pixel, -1 to 1
constexpr double one_grey_value = 1.0 / 255;  // of the range
constexpr index classes = 10;

/// A way to generate, that is set against the same sampler step after step.
struct Trial {
    nn::Sampler sampler;
    index steps;
    Surrogate surrogate;
    double tolerance;
};

/// Images whose Fréchet distance from the same sampler's, step after step, is measured.
struct Quality {
    nn::Sampler sampler;
    index steps;
    std::vector<double> tolerances;
};

struct Sizes {
    nn::DiffusionOptions model;
    index images;
    std::vector<Trial> trials;
    index quality_images;
    std::vector<Quality> qualities;
    index in_flight_steps;
    std::vector<index> in_flight;
};

Sizes sizes_of(const Experiment& experiment) {
    Sizes sizes;
    sizes.model.latents = 16;
    sizes.model.autoencoder_steps = 1500;
    sizes.model.steps = 6000;
    sizes.model.data = experiment.data;
    sizes.model.seed = experiment.seed;
    if (experiment.quick) {
        sizes.model.latents = 4;
        sizes.model.hidden = 16;
        sizes.model.blocks = 1;
        sizes.model.batch = 8;
        sizes.model.train_images = 64;
        sizes.model.autoencoder_steps = sizes.model.steps = 5;
        sizes.images = 4;
        sizes.trials = {{nn::Sampler::ddim, 20, Surrogate::full, 1e-5},
                        {nn::Sampler::ddpm, 20, Surrogate::diagonal, 1e-5}};
        sizes.quality_images = 8;
        sizes.qualities = {{nn::Sampler::ddim, 5, {1e-4}}};
        if (experiment.full) sizes.qualities.push_back({nn::Sampler::ddpm, 5, {1e-4}});
        sizes.in_flight_steps = 5;
        sizes.in_flight = {1, 2};
        return sizes;
    }
    sizes.images = 16;
    for (const double tolerance : {1e-5, 1e-6})
        sizes.trials.push_back({nn::Sampler::ddim, 1000, Surrogate::full, tolerance});
    sizes.trials.push_back({nn::Sampler::ddim, 1000, Surrogate::diagonal, 1e-6});
    sizes.trials.push_back({nn::Sampler::ddpm, 1000, Surrogate::full, 1e-5});
    for (const double tolerance : {1e-4, 1e-5})
        sizes.trials.push_back({nn::Sampler::ddim, 100, Surrogate::full, tolerance});
    sizes.trials.push_back({nn::Sampler::ddim, 100, Surrogate::diagonal, 1e-5});
    sizes.trials.push_back({nn::Sampler::dpm_solver_2, 100, Surrogate::full, 1e-5});
    sizes.trials.push_back({nn::Sampler::heun, 100, Surrogate::full, 1e-5});
    sizes.quality_images = 256;
    sizes.qualities = {{nn::Sampler::ddim, 100, {1e-2, 1e-3, 1e-4, 1e-5}}};
    if (experiment.full) {
        sizes.qualities.push_back({nn::Sampler::ddim, 1000, {1e-6}});
        sizes.qualities.push_back({nn::Sampler::ddpm, 1000, {1e-5}});
    }
    sizes.in_flight_steps = 100;
    sizes.in_flight = {1, 4, 16, 64};
    return sizes;
}

nn::GenerationOptions generation(const Trial& trial, index images, std::uint64_t seed) {
    nn::GenerationOptions options;
    options.sampler.sampler = trial.sampler;
    options.sampler.steps = trial.steps;
    options.images = images;
    options.seed = seed;
    options.evaluation.surrogate = trial.surrogate;
    options.evaluation.tolerance = trial.tolerance;
    return options;
}
nn::GenerationOptions sequentially(nn::GenerationOptions options) {
    options.evaluation.method = Method::sequential;
    return options;
}

/// The largest difference of a pixel, as a fraction of the range; infinite where it is not a number.
double pixel_difference(const nn::Generation& a, const nn::Generation& b) {
    double largest = 0;
    for (std::size_t i = 0; i < a.pixels.size(); ++i) {
        const double difference = std::abs(double(a.pixels[i]) - double(b.pixels[i])) / range;
        largest = std::isnan(difference) ? INFINITY : std::max(largest, difference);
    }
    return largest;
}

/// Sequential images above parallel ones, as the bytes of a PNG file.
std::vector<std::uint8_t> picture_of(const nn::Generation& above, const nn::Generation& below) {
    const index count = std::min<index>(above.images, classes), side = above.shape[0];
    std::vector<files::Picture> pictures;
    for (const nn::Generation* row : {&above, &below})
        for (index image = 0; image < count; ++image) {
            files::Picture picture{side, side, {}};
            for (index i = 0; i < side * side; ++i) {
                const float grey = (row->pixels[std::size_t(image * side * side + i)] + 1) * 127.5F;
                picture.pixels.push_back(std::uint8_t(std::lround(std::clamp(grey, 0.0F, 255.0F))));
            }
            pictures.push_back(std::move(picture));
        }
    return files::encode_png(files::grid(pictures, count));
}

/// An experiment's progress as that of parts of it.
class Course {
public:
    explicit Course(const Experiment& experiment) : experiment_(experiment) {}
    /// The part that comes takes so much of all.
    void begin(double share, std::string what) {
        done_ += share_;
        share_ = share;
        what_ = std::move(what);
        report(0);
    }
    /// False: stop.
    bool report(double done) {
        going_on_ = going_on_ && experiment_.advance(done_ + share_ * done, what_);
        return going_on_;
    }
    bool going_on() const { return going_on_; }

private:
    const Experiment& experiment_;
    double done_ = 0, share_ = 0;
    std::string what_;
    bool going_on_ = true;
};

nn::Generation generate(const nn::DiffusionModel& model, nn::GenerationOptions options, Course& course) {
    options.evaluation.progress = [&](index confirmed, index steps, index) {
        return course.report(double(confirmed) / double(steps));
    };
    return model.generate(options);
}

std::string title_of(const Json& entry) {
    return entry["sampler"].get<std::string>() + ", " + count_text(entry["steps"].get<index>()) + " steps, " +
           entry["surrogate"].get<std::string>() + ", tolerance " + scientific_text(number(entry["tolerance"]));
}

Json run_trial(const nn::DiffusionModel& model, const Trial& trial, index images, std::uint64_t seed, Course& course,
               std::vector<std::uint8_t>* picture) {
    const nn::GenerationOptions options = generation(trial, images, seed);
    const nn::Generation sequential = generate(model, sequentially(options), course);
    const nn::Generation parallel = generate(model, options, course);
    const bool right = parallel.report.status == Status::converged;
    if (right && picture != nullptr) *picture = picture_of(sequential, parallel);
    Json entry{{"sampler", nn::name_of(nn::sampler_names, trial.sampler)},
               {"steps", trial.steps},
               {"surrogate", nn::name_of(nn::surrogate_names, trial.surrogate)},
               {"tolerance", trial.tolerance},
               {"status", to_string(parallel.report.status)},
               {"iterations", parallel.report.iterations},
               {"sequential_calls", sequential.dependent_calls},
               {"dependent_calls", parallel.dependent_calls},
               {"calls_ratio", nullptr},
               {"rows_ratio", double(parallel.evaluated_rows) / double(sequential.evaluated_rows)},
               {"pixel_difference", nullptr},
               {"sequential_seconds", sequential.seconds},
               {"seconds", parallel.seconds},
               {"ratio", nullptr},
               {"residuals", parallel.report.residuals}};
    if (right) {
        entry["calls_ratio"] = double(sequential.dependent_calls) / double(parallel.dependent_calls);
        entry["pixel_difference"] = pixel_difference(sequential, parallel);
        entry["ratio"] = sequential.seconds / parallel.seconds;
    }
    return entry;
}

/// The Fréchet distance of parallel from sequential images of the same noise, and what it is between two sequential
/// sets of different noise: its floor.
Json measure_quality(const nn::DiffusionModel& model, const Quality& quality, index images,
                     const nn::ImageFeatures& features, std::uint64_t seed, double share, Course& course) {
    const Trial first{quality.sampler, quality.steps, Surrogate::full, quality.tolerances.front()};
    const std::string title = "images for the Fréchet distance, " +
                              std::string(nn::name_of(nn::sampler_names, quality.sampler)) + " of " +
                              count_text(quality.steps) + " steps, ";
    course.begin(share / 5, title + "sequentially");
    const auto of = [&](const nn::GenerationOptions& options) { return generate(model, options, course); };
    const nn::Generation sequential = of(sequentially(generation(first, images, seed)));
    const nn::Generation other = of(sequentially(generation(first, images, seed + 1)));
    const std::vector<float> expected = features.of(sequential.pixels);
    Json result{{"sampler", nn::name_of(nn::sampler_names, quality.sampler)},
                {"steps", quality.steps},
                {"noise_floor", nn::frechet_distance(expected, features.of(other.pixels), features.count())},
                {"to_test_images", nn::frechet_distance(expected, features.of_test_images(images), features.count())},
                {"tolerances", Json::array()}};
    for (const double tolerance : quality.tolerances) {
        if (!course.going_on()) break;
        course.begin(share * 4 / 5 / double(quality.tolerances.size()),
                     title + "tolerance " + scientific_text(tolerance));
        Trial trial = first;
        trial.tolerance = tolerance;
        const nn::Generation parallel = of(generation(trial, images, seed));
        if (!parallel.report.ok() || !course.going_on()) continue;
        result["tolerances"].push_back(
            {{"tolerance", tolerance},
             {"dependent_calls", parallel.dependent_calls},
             {"distance", nn::frechet_distance(expected, features.of(parallel.pixels), features.count())},
             {"pixel_difference", pixel_difference(sequential, parallel)}});
    }
    return result;
}

Json measure_qualities(const nn::DiffusionModel& model, const Sizes& sizes, const Experiment& experiment,
                       Course& course) {
    Json result{{"images", sizes.quality_images}, {"sets", Json::array()}};
    course.begin(0.05, "a classifier, whose features tell images apart");
    const nn::ImageFeatures features({.data = experiment.data,
                                      .epochs = experiment.quick ? 1 : 2,
                                      .seed = experiment.seed,
                                      .progress = [&](double done) { return course.report(done); }});
    if (!course.going_on()) return result;
    result["features"] = features.count();
    result["classifier_accuracy"] = features.test_accuracy();
    double all_steps = 0;
    for (const Quality& quality : sizes.qualities) all_steps += double(quality.steps);
    for (const Quality& quality : sizes.qualities) {
        if (!course.going_on()) break;
        result["sets"].push_back(measure_quality(model, quality, sizes.quality_images, features, experiment.seed,
                                                 0.3 * double(quality.steps) / all_steps, course));
    }
    return result;
}

bool agrees(const Json& entry) {
    return entry["status"] == "converged" && number(entry["pixel_difference"]) <= one_grey_value;
}

/// Every sampler by its strictest tolerance with the full Jacobian.
std::optional<bool> agreement(const Json& trials) {
    std::optional<bool> all;
    for (const Json& entry : trials) {
        const bool stricter_follows = std::any_of(trials.begin(), trials.end(), [&](const Json& other) {
            return other["sampler"] == entry["sampler"] && other["steps"] == entry["steps"] &&
                   other["surrogate"] == entry["surrogate"] && number(other["tolerance"]) < number(entry["tolerance"]);
        });
        if (entry["surrogate"] == "full" && !stricter_follows) all = all.value_or(true) && agrees(entry);
    }
    return all;
}

Table trials_table(const Json& diffusion) {
    Table table{
        .title = "The same images in fewer calls of the network that wait for each other",
        .caption = count_text(diffusion["images"].get<index>()) +
                   " images. Calls: of the network, one after the other; a pass with full Jacobians counts as two. "
                   "Rows: noisy images that the network saw, as a multiple. Difference: the largest of a pixel, as a "
                   "fraction of the range; one grey value is 3.9e-3. Seconds are those of this machine's processors.",
        .columns = {{"sampler, steps, Jacobian", false},
                    {"status", false},
                    {"passes"},
                    {"calls"},
                    {"fewer calls"},
                    {"rows"},
                    {"difference"},
                    {"sequential"},
                    {"parallel"},
                    {"time", false}},
        .rows = {}};
    for (const Json& entry : diffusion["trials"]) {
        const bool far = !(number(entry["pixel_difference"]) <= one_grey_value);
        table.rows.push_back(
            {title_of(entry),
             entry["status"].get<std::string>(),
             count_text(entry["iterations"].get<index>()),
             count_text(entry["dependent_calls"].get<index>()),
             number_text(number(entry["calls_ratio"])) + "x",
             number_text(number(entry["rows_ratio"])),
             {scientific_text(number(entry["pixel_difference"])), far ? Table::Tone::bad : Table::Tone::plain},
             seconds_text(number(entry["sequential_seconds"])),
             seconds_text(number(entry["seconds"])),
             speed_text(number(entry["ratio"]))});
    }
    return table;
}

Table quality_table(const Json& quality) {
    Table table{.title = "Fréchet distance of parallel from sequential images",
                .caption = count_text(quality["images"].get<index>()) + " images each, full Jacobian; " +
                           count_text(quality.value("features", index(0))) +
                           " features of a classifier trained here, right for " +
                           percent_text(number(quality.value("classifier_accuracy", Json()))) +
                           " of the test images. The floor is the distance of two sequential sets of different noise.",
                .columns = {{"sampler, steps", false},
                            {"tolerance"},
                            {"calls"},
                            {"distance"},
                            {"floor"},
                            {"of the floor"},
                            {"from test images"},
                            {"difference of a pixel"}},
                .rows = {}};
    for (const Json& set : quality["sets"])
        for (const Json& entry : set["tolerances"])
            table.rows.push_back(
                {set["sampler"].get<std::string>() + ", " + count_text(set["steps"].get<index>()),
                 scientific_text(number(entry["tolerance"])), count_text(entry["dependent_calls"].get<index>()),
                 scientific_text(number(entry["distance"])), number_text(number(set["noise_floor"])),
                 scientific_text(number(entry["distance"]) / number(set["noise_floor"])),
                 number_text(number(set["to_test_images"])), scientific_text(number(entry["pixel_difference"]))});
    return table;
}

Table in_flight_table(const Json& diffusion) {
    Table table{
        .title = "Images at once",
        .caption = "DDIM, " + count_text(diffusion["in_flight_steps"].get<index>()) +
                   " steps, diagonal Jacobian, tolerance 1e-3. Where one call for all images keeps the machine "
                   "busy already, steps side by side cannot pay.",
        .columns = {{"images"}, {"sequential"}, {"parallel"}, {"time", false}, {"method automatic takes", false}},
        .rows = {}};
    for (const Json& entry : diffusion["in_flight"])
        table.rows.push_back({count_text(entry["images"].get<index>()),
                              seconds_text(number(entry["sequential_seconds"])), seconds_text(number(entry["seconds"])),
                              speed_text(number(entry["ratio"])), entry["automatic"].get<std::string>()});
    return table;
}

Plot residual_plot(const Json& diffusion) {
    Plot plot{.title = "Residual against passes",
              .caption = "The largest residual of a step that is not confirmed, as a fraction of the tolerance.",
              .x = {.label = "passes"},
              .y = {.label = "residual / tolerance", .logarithm = 10},
              .series = {},
              .reference = 1,
              .reference_label = "tolerance"};
    for (const Json& entry : diffusion["trials"]) {
        if (plot.series.size() == 6) break;
        Series series{.name = title_of(entry), .x = {}, .y = {}};
        for (const Json& residual : entry["residuals"]) {
            series.x.push_back(double(series.x.size() + 1));
            series.y.push_back(number(residual));
        }
        plot.series.push_back(std::move(series));
    }
    return plot;
}

std::vector<std::string> diffusion_verdicts(const Json& diffusion) {
    std::vector<std::string> sentences;
    const Json* best = nullptr;
    for (const Json& entry : diffusion["trials"])
        if (agrees(entry) && (best == nullptr || number(entry["calls_ratio"]) > number((*best)["calls_ratio"])))
            best = &entry;
    if (best != nullptr)
        sentences.push_back("Within one grey value of the sequential images: " + title_of(*best) + ", in " +
                            count_text((*best)["dependent_calls"].get<index>()) +
                            " calls that wait for each other instead of " +
                            count_text((*best)["sequential_calls"].get<index>()) + ", " +
                            number_text(number((*best)["calls_ratio"])) + "x fewer.");
    const bool slower = std::all_of(diffusion["trials"].begin(), diffusion["trials"].end(),
                                    [](const Json& entry) { return !(number(entry["ratio"]) >= 1); });
    if (slower && !diffusion["trials"].empty())
        sentences.push_back(
            "In seconds, parallel loses on these processors: they have no room for more rows at no cost.");
    return sentences;
}

}  // namespace

void check_diffusion_data(const Experiment& experiment) { files::find_fashion_mnist(experiment.data); }

Json run_diffusion(const Experiment& experiment) {
    const Sizes sizes = sizes_of(experiment);
    Course course(experiment);
    Json result{{"complete", false},
                {"agreement", nullptr},
                {"images", sizes.images},
                {"pixel_tolerance", one_grey_value},
                {"trials", Json::array()},
                {"quality", nullptr},
                {"in_flight_steps", sizes.in_flight_steps},
                {"in_flight", Json::array()},
                {"picture", nullptr}};

    const TemporaryFolder folder;
    std::filesystem::path checkpoint = experiment.model;
    if (checkpoint.empty()) {
        course.begin(0.25, "training a model");
        nn::DiffusionOptions options = sizes.model;
        options.checkpoint = checkpoint = folder.path / "diffusion.safetensors";
        const double all = double(options.autoencoder_steps + options.steps);
        double done = 0;
        const nn::DiffusionTraining training =
            nn::train_diffusion(options, {.step = [&](const nn::DiffusionStep&) { course.report(++done / all); },
                                          .interrupted = [&] { return !course.going_on(); }});
        result["training_seconds"] = training.seconds;
        if (training.interrupted) return result;
    }
    const nn::DiffusionModel model(checkpoint);
    const nn::DiffusionOptions& made = model.options();
    result["model"] = {{"space", nn::name_of(nn::space_names, made.space)},
                       {"latents", made.latents},
                       {"hidden", made.hidden},
                       {"blocks", made.blocks},
                       {"prediction", nn::name_of(nn::prediction_names, made.prediction)},
                       {"schedule", nn::name_of(nn::schedule_names, made.schedule)},
                       {"autoencoder_steps", made.autoencoder_steps},
                       {"steps", made.steps},
                       {"file", experiment.model.string()}};

    for (const Trial& trial : sizes.trials) {
        course.begin(0.35 / double(sizes.trials.size()),
                     "generating by " + std::string(nn::name_of(nn::sampler_names, trial.sampler)) + ", " +
                         count_text(trial.steps) + " steps");
        std::vector<std::uint8_t> picture;
        Json entry = run_trial(model, trial, sizes.images, experiment.seed, course, &picture);
        if (!course.going_on()) return result;
        result["trials"].push_back(std::move(entry));
        if (!picture.empty() && result["picture"].is_null()) {
            result["picture"] = base64(picture);
            result["picture_of"] = title_of(result["trials"].back());
        }
        if (const std::optional<bool> all = agreement(result["trials"])) result["agreement"] = *all;
    }
    result["quality"] = measure_qualities(model, sizes, experiment, course);
    if (!course.going_on()) return result;
    for (const index images : sizes.in_flight) {
        course.begin(0.05 / double(sizes.in_flight.size()), count_text(images) + " images at once");
        const Trial trial{nn::Sampler::ddim, sizes.in_flight_steps, Surrogate::diagonal, 1e-3};
        Json entry = run_trial(model, trial, images, experiment.seed, course, nullptr);
        nn::GenerationOptions options = generation(trial, images, experiment.seed);
        options.evaluation.method = Method::automatic;
        entry["automatic"] = generate(model, options, course).report.method;
        if (!course.going_on()) return result;
        entry["images"] = images;
        result["in_flight"].push_back(std::move(entry));
    }
    result["complete"] = true;
    return result;
}

void describe_diffusion(const Json& diffusion, Page& page) {
    page.heading("Diffusion model");
    if (!diffusion.contains("model")) return page.paragraph("Interrupted before the model was trained.");
    const Json& model = diffusion["model"];
    page.paragraph(
        "A diffusion model of Fashion-MNIST (" + model["space"].get<std::string>() + ", " +
        count_text(model["latents"].get<index>()) + " latents, " + count_text(model["steps"].get<index>()) +
        " training steps) generates images by denoising steps. As a recurrence over the steps they are evaluated in "
        "parallel, from the same noise; the baseline is the sampler itself, one call of the network per step "
        "for all images.");
    page.list(diffusion_verdicts(diffusion));
    if (diffusion["picture"].is_string())
        page.picture("Sequential above, parallel below: " + diffusion["picture_of"].get<std::string>(),
                     diffusion["picture"].get<std::string>());
    page.table(trials_table(diffusion));
    page.plots({residual_plot(diffusion)});
    if (diffusion["quality"].is_object()) page.table(quality_table(diffusion["quality"]));
    if (!diffusion["in_flight"].empty()) page.table(in_flight_table(diffusion));
}

std::string summarise_diffusion(const Json& diffusion) {
    std::string summary = text(trials_table(diffusion)) + "\n";
    if (diffusion["quality"].is_object()) summary += text(quality_table(diffusion["quality"])) + "\n";
    if (!diffusion["in_flight"].empty()) summary += text(in_flight_table(diffusion)) + "\n";
    for (const std::string& sentence : diffusion_verdicts(diffusion)) summary += sentence + "\n";
    return summary;
}

}  // namespace deeppcr::program
