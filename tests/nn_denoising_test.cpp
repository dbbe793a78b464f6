// Samplers as recurrences: against the update rules as they were published, by every method, with a network that a
// reader can compute: prediction_k = tanh(sum_m w_km x_m + time / 500 + image / 10).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/ops/from_blob.h>
#include <torch/types.h>

#include <cmath>
#include <vector>

#include <deeppcr/check.hpp>
#include <deeppcr/nn/denoisers.hpp>
#include <deeppcr/nn/denoising.hpp>

#include "tests/compare.hpp"
#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

using Numbers = std::vector<double>;
constexpr index numbers = 3, images = 2, times = 100;

double weight(index k, index m) { return 0.3 * std::sin(double(3 * k + m + 1)); }

Numbers network(const Numbers& x, double time, index image) {
    Numbers result;
    for (index k = 0; k < numbers; ++k) {
        double sum = time / 500 + double(image) / 10;
        for (index m = 0; m < numbers; ++m) sum += weight(k, m) * x[std::size_t(m)];
        result.push_back(std::tanh(sum));
    }
    return result;
}

at::Tensor network_of_tensors(const at::Tensor& inputs, const at::Tensor& at_times, const at::Tensor& of_images) {
    at::Tensor weights = torch::empty({numbers, numbers});
    for (index k = 0; k < numbers; ++k)
        for (index m = 0; m < numbers; ++m) weights[k][m] = float(weight(k, m));
    // Row by row, so that no product depends on how many rows there are.
    const at::Tensor sums = (inputs.unsqueeze(1) * weights).sum(2);
    return (sums + (at_times / 500 + of_images / 10.0F).unsqueeze(1)).tanh();
}

struct Given {
    at::Tensor initial, random;
    explicit Given(index steps) {
        torch::manual_seed(7);
        initial = torch::randn({images, numbers});
        random = torch::randn({steps, images, numbers});
    }
    double noise(index step, index image, index k) const { return random[step][image][k].item<double>(); }
};

NoiseSchedule schedule() { return NoiseSchedule::linear(times, 1e-3, 0.1); }

/// The network's estimates of sample and noise at a visited level, as the prediction types define them.
struct Estimate {
    Numbers sample, noise;
};
Estimate estimates(Prediction type, const Numbers& x, double kept, double time, index image) {
    const double a = std::sqrt(kept), s = std::sqrt(1 - kept);
    const Numbers out = network(x, time, image);
    Estimate result;
    for (std::size_t k = 0; k < x.size(); ++k) {
        switch (type) {
            case Prediction::noise:
                result.noise.push_back(out[k]);
                result.sample.push_back((x[k] - s * out[k]) / a);
                break;
            case Prediction::velocity:
                result.sample.push_back(a * x[k] - s * out[k]);
                result.noise.push_back(a * out[k] + s * x[k]);
                break;
            case Prediction::sample:
                result.sample.push_back(out[k]);
                result.noise.push_back((x[k] - a * out[k]) / s);
                break;
        }
    }
    return result;
}

/// Generation of one image by the published rules, in double, step after step.
Numbers published(const SamplerOptions& options, Prediction type, const Given& given, index image) {
    const std::vector<NoiseLevel> levels = noise_levels(schedule(), options.steps, options.spacing);
    const auto kept = [&](std::size_t i) { return levels[i].signal * levels[i].signal; };
    const auto sigma = [&](std::size_t i) { return levels[i].noise / levels[i].signal; };
    Numbers x, last_sample;
    for (index k = 0; k < numbers; ++k) x.push_back(given.initial[image][k].item<double>());
    const bool scaled = options.sampler == Sampler::euler || options.sampler == Sampler::heun;
    if (scaled)
        for (double& value : x) value *= std::sqrt(1 + sigma(0) * sigma(0));
    for (std::size_t i = 0; i + 1 < levels.size(); ++i) {
        const double kt = kept(i), ks = kept(i + 1);
        const auto denoise = [&](const Numbers& state, std::size_t at) {
            Numbers input = state;
            if (scaled)
                for (double& value : input) value /= std::sqrt(1 + sigma(at) * sigma(at));
            return estimates(type, input, kept(at), levels[at].time, image);
        };
        const Estimate now = denoise(x, i);
        Numbers next = x;
        for (std::size_t k = 0; k < x.size(); ++k) {
            const double z = given.noise(index(i), image, index(k));
            switch (options.sampler) {
                case Sampler::ddpm: {
                    // Ho et al. eq. 7, with alpha_t = kept_t / kept_{t-1}.
                    const double alpha = kt / ks, beta = 1 - alpha;
                    const double mean =
                        std::sqrt(ks) * beta / (1 - kt) * now.sample[k] + std::sqrt(alpha) * (1 - ks) / (1 - kt) * x[k];
                    next[k] = mean + std::sqrt((1 - ks) / (1 - kt) * beta) * z;
                    break;
                }
                case Sampler::ddim: {
                    // Song et al. eq. 12 and 16.
                    const double s = options.eta * std::sqrt((1 - ks) / (1 - kt)) * std::sqrt(1 - kt / ks);
                    next[k] = std::sqrt(ks) * now.sample[k] + std::sqrt(1 - ks - s * s) * now.noise[k] + s * z;
                    break;
                }
                case Sampler::dpm_solver_1:
                case Sampler::dpm_solver_2: {
                    const double at = std::sqrt(ks);
                    if (ks == 1) {  // lambda is infinite there: exp(-h) = 0
                        next[k] = at * now.sample[k];
                        break;
                    }
                    const auto lambda = [](double kept_there) { return std::log(kept_there / (1 - kept_there)) / 2; };
                    const double h = lambda(ks) - lambda(kt);
                    double d = now.sample[k];
                    if (options.sampler == Sampler::dpm_solver_2 && i > 0) {
                        const double r = (lambda(kt) - lambda(kept(i - 1))) / h;
                        d = (1 + 1 / (2 * r)) * now.sample[k] - 1 / (2 * r) * last_sample[k];
                    }
                    next[k] = std::sqrt((1 - ks) / (1 - kt)) * x[k] - at * (std::exp(-h) - 1) * d;
                    break;
                }
                case Sampler::euler:
                case Sampler::heun:
                    next[k] = x[k] + (sigma(i + 1) - sigma(i)) * (x[k] - now.sample[k]) / sigma(i);
                    break;
            }
        }
        if (options.sampler == Sampler::heun && ks < 1) {
            const Estimate then = denoise(next, i + 1);
            for (std::size_t k = 0; k < x.size(); ++k) {
                const double slope = (x[k] - now.sample[k]) / sigma(i);
                const double next_slope = (next[k] - then.sample[k]) / sigma(i + 1);
                next[k] = x[k] + (sigma(i + 1) - sigma(i)) * (slope + next_slope) / 2;
            }
        }
        last_sample = now.sample;
        x = next;
    }
    return x;
}

struct Case {
    SamplerOptions sampler;
    Prediction prediction;
    std::string name;
};

std::vector<Case> cases(index steps) {
    std::vector<Case> all;
    for (const auto& [sampler_name, sampler] : sampler_names)
        for (const auto& [spacing_name, spacing] : spacing_names)
            for (const auto& [prediction_name, prediction] : prediction_names)
                for (const double eta : {0.0, 0.5, 1.0}) {
                    if (eta > 0 && sampler != Sampler::ddim) continue;
                    all.push_back({{sampler, steps, spacing, eta},
                                   prediction,
                                   std::string(sampler_name) + ", " + spacing_name + ", " + prediction_name + ", eta " +
                                       std::to_string(eta)});
                }
    return all;
}

DenoisingRecurrence recurrence_of(const Case& now, const Given& given, const DenoisingOptions& more = {}) {
    DenoisingOptions options = more;
    options.prediction = now.prediction;
    return {denoising_plan(schedule(), now.sampler), network_of_tensors, given.initial, given.random, options};
}

TEST(Denoising, StepsAreThePublishedRules) {
    for (const index steps : {1, 2, 7, 20}) {
        const Given given(steps);
        for (const Case& now : cases(steps)) {
            const auto recurrence = recurrence_of(now, given);
            const auto [x, report] = evaluate(recurrence, {.method = Method::sequential});
            ASSERT_EQ(report.status, Status::converged);
            double magnified = 1;  // rounding, by Heun's correction
            for (const DenoisingStep& step : recurrence.plan().steps)
                magnified = std::max(magnified, std::abs(step.correction));
            for (index image = 0; image < images; ++image) {
                const Numbers expected = published(now.sampler, now.prediction, given, image);
                for (index k = 0; k < numbers; ++k)
                    EXPECT_NEAR(double(x(steps - 1, image, k)), expected[std::size_t(k)],
                                2e-5 * magnified * (1 + std::abs(expected[std::size_t(k)])))
                        << now.name << ", " << steps << " steps";
            }
        }
    }
}

TEST(Denoising, AWindowOfOneStepIsSequentialSamplingBitForBit) {
    const Given given(12);
    for (const Case& now : cases(12)) {
        const auto recurrence = recurrence_of(now, given);
        const auto [expected, sequential] = evaluate(recurrence, {.method = Method::sequential});
        for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::identity, Surrogate::zero}) {
            const auto [x, report] =
                evaluate(recurrence, {.method = Method::newton, .surrogate = surrogate, .window = 1});
            EXPECT_TRUE(same_bits(x, expected)) << now.name;
        }
    }
}

/// Matrix products, whose rounding depends on how many rows there are: the networks that are trained here.
TEST(Denoising, AWindowOfOneStepIsSequentialSamplingBitForBitWithTheNetworksOfThisLibrary) {
    const index steps = 6, count = 5, channels = 784;
    const at::NoGradGuard no_gradients;
    for (const bool pixels : {false, true}) {
        const DenoiserOptions sizes{
            .numbers = pixels ? channels : 32, .hidden = pixels ? 4 : 64, .blocks = 2, .times = times};
        const Denoiser denoiser = conditional(pixels ? unet_denoiser(sizes) : latent_denoiser(sizes),
                                              torch::arange(count, torch::kLong), 2.0);
        torch::manual_seed(3);
        const at::Tensor initial = torch::randn({count, sizes.numbers});
        const at::Tensor random = torch::randn({steps, count, sizes.numbers});
        for (const Case& now : cases(steps)) {
            const DenoisingRecurrence recurrence(denoising_plan(schedule(), now.sampler), denoiser, initial, random,
                                                 {.prediction = now.prediction, .clip = pixels ? 1.0 : 0.0});
            const auto [expected, sequential] = evaluate(recurrence, {.method = Method::sequential});
            for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal}) {
                if (pixels && surrogate == Surrogate::full) continue;  // 784 x 784 numbers a step and image
                const auto [x, report] =
                    evaluate(recurrence, {.method = Method::newton, .surrogate = surrogate, .window = 1});
                EXPECT_TRUE(same_bits(x, expected)) << now.name << (pixels ? ", pixels" : ", latents");
            }
        }
    }
}

TEST(Denoising, OtherNoiseMeansOtherSamples) {
    const Given first(8);
    torch::manual_seed(9);
    const at::Tensor initial = torch::randn({images, numbers}), random = torch::randn({8, images, numbers});
    for (const Case& now : cases(8)) {
        auto recurrence = recurrence_of(now, first);
        recurrence.draw(initial, random);
        const DenoisingRecurrence other(recurrence.plan(), network_of_tensors, initial, random,
                                        {.prediction = now.prediction});
        EXPECT_TRUE(same_bits(evaluate(recurrence, {.method = Method::sequential}).trajectory,
                              evaluate(other, {.method = Method::sequential}).trajectory))
            << now.name;
    }
}

TEST(Denoising, EveryMethodFindsTheSequentialSample) {
    const index steps = 40;
    const Given given(steps);
    for (const Case& now : cases(steps)) {
        const auto recurrence = recurrence_of(now, given, {.most_rows = 17});
        const auto [expected, sequential] = evaluate(recurrence, {.method = Method::sequential});
        for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::identity})
            for (const index anderson : {0, 3}) {
                const index before = recurrence.dependent_calls();
                const auto [x, report] = evaluate(
                    recurrence,
                    {.method = Method::newton, .surrogate = surrogate, .tolerance = 1e-5, .anderson = anderson});
                ASSERT_TRUE(report.ok()) << now.name;
                EXPECT_TRUE(near(x, expected, 2e-3)) << now.name;
                if (surrogate == Surrogate::full && anderson == 0) {
                    EXPECT_LT(report.iterations, steps / 2) << now.name;
                }
                EXPECT_GE(recurrence.dependent_calls() - before, report.iterations);
            }
    }
}

/// check_recurrence expects the Jacobian's own diagonal.
struct WithItsOwnDiagonal : Recurrence<float> {
    explicit WithItsOwnDiagonal(const DenoisingRecurrence& all) : Recurrence(all.shape()), inner(all) {}
    void initial(const Section& section, View<float> state) const override { inner.initial(section, state); }
    void step(const Section& section, View<const float> before, View<float> after) const override {
        inner.step(section, before, after);
    }
    void linearise(const Section& section, View<const float> before, View<float> after,
                   Jacobian<float> jacobian) const override {
        inner.linearise(section, before, after, jacobian);
    }
    const DenoisingRecurrence& inner;
};

TEST(Denoising, JacobiansAreThoseOfTheStep) {
    const Given given(6);
    for (const Case& now : cases(6)) {
        const auto recurrence = recurrence_of(now, given, {.most_rows = 5});
        const CheckReport check = check_recurrence<float>(WithItsOwnDiagonal(recurrence));
        EXPECT_TRUE(check.ok()) << now.name << "\n" << check;
    }
}

TEST(Denoising, EulerIsDdimInOtherCoordinates) {
    const Given given(15);
    const Case euler{{Sampler::euler, 15, Spacing::karras, 0}, Prediction::noise, "euler"};
    const Case ddim{{Sampler::ddim, 15, Spacing::karras, 0}, Prediction::noise, "ddim"};
    const auto first = evaluate(recurrence_of(euler, given), {.method = Method::sequential});
    const auto second = evaluate(recurrence_of(ddim, given), {.method = Method::sequential});
    for (index j = 0; j < images; ++j)
        for (index k = 0; k < numbers; ++k) EXPECT_NEAR(first.trajectory(14, j, k), second.trajectory(14, j, k), 1e-5);
}

TEST(Denoising, BlocksOfStepsEndWhereTheStepsDo) {
    const index steps = 23;
    const Given given(steps);
    for (const Case& now : cases(steps)) {
        const auto recurrence = recurrence_of(now, given);
        const auto [expected, sequential] = evaluate(recurrence, {.method = Method::sequential});
        for (const index length : {1, 5, 23, 40}) {
            const auto blocks = recurrence.blocks(length);
            const auto [direct, direct_report] = evaluate(*blocks, {.method = Method::sequential});
            EXPECT_TRUE(same_bits<float>(direct.view().steps(direct.shape().steps - 1, direct.shape().steps),
                                         expected.view().steps(steps - 1, steps)))
                << now.name;
            const auto [x, report] = evaluate(*blocks, {.method = Method::newton, .tolerance = 1e-5});
            ASSERT_TRUE(report.ok());
            EXPECT_LT(largest_difference<float>(x.view(), direct.view()), 5e-3) << now.name << ", " << length;
        }
    }
}

TEST(Denoising, ACoarseGuessSavesPasses) {
    const index steps = 100;
    const Given given(steps);
    index with = 0, without = 0;
    for (const Case& now : cases(steps)) {
        const auto recurrence = recurrence_of(now, given);
        const Options options{.method = Method::newton, .surrogate = Surrogate::diagonal, .tolerance = 1e-4};
        without += evaluate(recurrence, options).report.iterations;
        Options guessed = options;
        guessed.guess = Guess::given;
        Buffer<float> x = recurrence.coarse_guess(10);
        const Report report = evaluate(recurrence, x.view(), guessed);
        ASSERT_TRUE(report.ok()) << now.name;
        with += report.iterations;
        // With as many steps as the plan, and nothing drawn, DDIM guesses itself.
        if (now.sampler.sampler == Sampler::ddim && now.sampler.eta == 0) {
            const auto [expected, sequential] = evaluate(recurrence, {.method = Method::sequential});
            EXPECT_TRUE(near(recurrence.coarse_guess(steps), expected, 1e-3)) << now.name;
        }
    }
    EXPECT_LT(with, without);
}

TEST(Denoising, ANetworkThatFailsIsReported) {
    const Given given(10);
    const DenoisingPlan plan = denoising_plan(schedule(), {Sampler::ddim, 10, Spacing::trailing, 0});
    const auto nan_below = [](const at::Tensor& inputs, const at::Tensor& at_times, const at::Tensor& of_images) {
        const at::Tensor good = network_of_tensors(inputs, at_times, of_images);
        const at::Tensor bad = (at_times < 50).logical_and(of_images == 1);
        return at::where(bad.unsqueeze(1), at::full_like(good, NAN), good);
    };
    const DenoisingRecurrence recurrence(plan, nan_below, given.initial, {}, {});
    for (const Method method : {Method::sequential, Method::newton}) {
        const auto [x, report] = evaluate(recurrence, {.method = method, .surrogate = Surrogate::diagonal});
        EXPECT_EQ(report.status, Status::non_finite);
        EXPECT_EQ(report.sequences[1].status, Status::non_finite);
        EXPECT_EQ(report.sequences[1].confirmed, 5);
        EXPECT_EQ(report.sequences[0].status, Status::converged);
    }
}

TEST(Denoising, WrongArgumentsAreNamed) {
    const Given given(10);
    const DenoisingPlan plan = denoising_plan(schedule(), {Sampler::ddpm, 10, Spacing::trailing, 0});
    const Denoiser narrow = [](const at::Tensor& inputs, const at::Tensor&, const at::Tensor&) {
        return inputs.slice(1, 0, 2).contiguous();
    };
    EXPECT_THAT(message_of([&] { DenoisingRecurrence(plan, narrow, given.initial, {}, {}); }),
                testing::HasSubstr("random: expected Float [10, 2, 3]"));
    EXPECT_THAT(message_of([&] { DenoisingRecurrence(plan, narrow, given.initial.to(at::kDouble), given.random, {}); }),
                testing::HasSubstr("initial_noise: expected Float"));
    EXPECT_THAT(message_of([&] { evaluate(DenoisingRecurrence(plan, narrow, given.initial, given.random, {})); }),
                testing::HasSubstr("denoiser: expected predictions like its inputs"));
    EXPECT_THAT(message_of([] {
                    denoising_plan(schedule(), {Sampler::ddim, 101, Spacing::leading, 0});
                }),
                testing::HasSubstr("steps: expected 1 to the schedule's 100, got 101"));
    EXPECT_THAT(message_of([] {
                    denoising_plan(schedule(), {Sampler::ddim, 10, Spacing::leading, 1.5});
                }),
                testing::HasSubstr("eta: expected"));
    EXPECT_THAT(message_of([] {
                    denoising_plan(schedule(), {Sampler::ddpm, 10, Spacing::leading, 0.5});
                }),
                testing::HasSubstr("eta: expected 0"));
    EXPECT_THAT(message_of([] { NoiseSchedule(std::vector<double>{0.5, 0.7}); }), testing::HasSubstr("kept_variance"));
}

}  // namespace
}  // namespace deeppcr::nn
