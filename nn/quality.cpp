#include <deeppcr/nn/quality.hpp>

#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include <deeppcr/nn/denoisers.hpp>
#include <deeppcr/nn/fashion_mnist.hpp>

#include "nn/basics.hpp"
#include "nn/optimisation.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

constexpr index pixel_count = image_side * image_side;
constexpr index class_count = 10;
constexpr index rows_at_once = 500;

struct Classifier : torch::nn::Module {
    Classifier(index features, std::uint64_t seed) {
        const auto convolution = [](index from, index to) {
            return torch::nn::Conv2d(torch::nn::Conv2dOptions(from, to, 3).stride(2).padding(1));
        };
        first = register_module("first", convolution(1, 16));
        second = register_module("second", convolution(16, 32));
        dense = register_module("dense", torch::nn::Linear(32 * image_side * image_side / 16, features));
        last = register_module("last", torch::nn::Linear(features, class_count));
        initialise(*this, seed);
    }
    Tensor features(const Tensor& images) {
        Tensor x = torch::relu(first(images.reshape({images.size(0), 1, image_side, image_side})));
        return torch::relu(dense(torch::relu(second(x)).flatten(1)));
    }
    Tensor forward(const Tensor& images) { return last(features(images)); }

    torch::nn::Conv2d first = nullptr, second = nullptr;
    torch::nn::Linear dense = nullptr, last = nullptr;
};

Tensor scaled(const Tensor& bytes) { return bytes.to(at::kFloat).div_(127.5).sub_(1); }

/// f of all rows, some at a time.
template <class Function>
Tensor in_parts(const Tensor& rows, const Function& f) {
    const at::NoGradGuard no_gradients;
    std::vector<Tensor> parts;
    for (index first = 0; first < rows.size(0); first += rows_at_once)
        parts.push_back(f(rows.slice(0, first, std::min(first + rows_at_once, rows.size(0)))));
    return at::cat(parts);
}

Tensor pixels_of(const std::vector<float>& pixels) {
    if (pixels.empty() || index(pixels.size()) % pixel_count != 0)
        throw InvalidArgument("pixels", "784 numbers for each image", std::to_string(pixels.size()));
    return at::from_blob(const_cast<float*>(pixels.data()), {index(pixels.size()) / pixel_count, pixel_count},
                         at::kFloat);
}

std::vector<float> numbers_of(const Tensor& tensor) {
    const Tensor values = tensor.contiguous();
    return {values.data_ptr<float>(), values.data_ptr<float>() + values.numel()};
}

/// Symmetric positive semi-definite; eigenvalues below 0 are rounding.
Tensor square_root(const Tensor& matrix) {
    const auto [values, vectors] = at::linalg_eigh(matrix);
    return vectors.mul(values.clamp_min(0).sqrt().unsqueeze(0)).mm(vectors.t());
}

}  // namespace

struct ImageFeatures::Parts {
    std::shared_ptr<Classifier> classifier;
    Tensor test_images;
    index features = 0;
    double accuracy = 0;
};

ImageFeatures::ImageFeatures(const FeatureOptions& options) : parts_(std::make_unique<Parts>()) {
    require(options.epochs >= 1, "epochs", "at least 1", options.epochs);
    require(options.batch >= 1, "batch", "at least 1", options.batch);
    require(options.features >= 1, "features", "at least 1", options.features);
    const FashionMnist data = load_fashion_mnist(options.data, options.seed, 0, 0);
    parts_->classifier = std::make_shared<Classifier>(options.features, options.seed);
    parts_->features = options.features;
    parts_->test_images = data.test.images;

    const index epoch_steps = data.training.size() / options.batch, steps = options.epochs * epoch_steps;
    Optimisation::Group all;
    for (const auto& parameter : parts_->classifier->named_parameters())
        all.parameters.emplace_back(parameter.key(), parameter.value());
    Optimisation optimisation({all}, {.learning_rate = options.learning_rate, .warm_up = 20, .steps = steps});
    Tensor order;
    for (index step = 0; step < steps; ++step) {
        const index position = step % epoch_steps;
        if (position == 0) order = shuffled(data.training.size(), options.seed, step / epoch_steps);
        const Tensor rows = order.slice(0, position * options.batch, (position + 1) * options.batch);
        optimisation.clear_gradients();
        torch::nn::functional::cross_entropy(
            parts_->classifier->forward(scaled(data.training.images.index_select(0, rows))),
            data.training.labels.index_select(0, rows))
            .backward();
        optimisation.step(step);
        if (options.progress && !options.progress(double(step + 1) / double(steps))) break;
    }
    const Tensor guessed = in_parts(
        data.test.images, [&](const Tensor& bytes) { return parts_->classifier->forward(scaled(bytes)).argmax(1); });
    parts_->accuracy = guessed.eq(data.test.labels).to(at::kDouble).mean().item<double>();
}
ImageFeatures::~ImageFeatures() = default;
ImageFeatures::ImageFeatures(ImageFeatures&&) noexcept = default;
ImageFeatures& ImageFeatures::operator=(ImageFeatures&&) noexcept = default;

index ImageFeatures::count() const { return parts_->features; }
double ImageFeatures::test_accuracy() const { return parts_->accuracy; }

std::vector<float> ImageFeatures::of(const std::vector<float>& pixels) const {
    return numbers_of(
        in_parts(pixels_of(pixels), [&](const Tensor& images) { return parts_->classifier->features(images); }));
}

std::vector<float> ImageFeatures::of_test_images(index images) const {
    if (images < 1 || images > parts_->test_images.size(0))
        throw InvalidArgument("images", "1 to " + std::to_string(parts_->test_images.size(0)), std::to_string(images));
    return numbers_of(in_parts(parts_->test_images.slice(0, 0, images),
                               [&](const Tensor& bytes) { return parts_->classifier->features(scaled(bytes)); }));
}

std::vector<index> ImageFeatures::classes_of(const std::vector<float>& pixels) const {
    const Tensor classes = in_parts(
        pixels_of(pixels), [&](const Tensor& images) { return parts_->classifier->forward(images).argmax(1); });
    return {classes.data_ptr<std::int64_t>(), classes.data_ptr<std::int64_t>() + classes.numel()};
}

double frechet_distance(const std::vector<float>& first, const std::vector<float>& second, index count) {
    struct Moments {
        Tensor mean, covariance;
    };
    const auto moments = [&](const char* name, const std::vector<float>& features) -> Moments {
        if (count < 1) throw InvalidArgument("count", "at least 1", std::to_string(count));
        if (index(features.size()) % count != 0 || index(features.size()) / count < 2)
            throw InvalidArgument(name, std::to_string(count) + " features for each of two or more images",
                                  std::to_string(features.size()));
        const Tensor rows =
            at::from_blob(const_cast<float*>(features.data()), {index(features.size()) / count, count}, at::kFloat)
                .to(at::kDouble);
        if (!rows.isfinite().all().item<bool>()) throw InvalidArgument(name, "finite features", "others among them");
        const Tensor mean = rows.mean(0), centred = rows - mean;
        return {mean, centred.t().mm(centred) / double(rows.size(0) - 1)};
    };
    const at::NoGradGuard no_gradients;
    const Moments a = moments("first", first), b = moments("second", second);
    const Tensor root = square_root(a.covariance);
    const Tensor product = square_root(root.mm(b.covariance).mm(root));
    const double distance = (a.mean - b.mean).square().sum().item<double>() +
                            (a.covariance.trace() + b.covariance.trace() - 2 * product.trace()).item<double>();
    return std::max(0.0, distance);  // rounding can leave less
}

}  // namespace deeppcr::nn
