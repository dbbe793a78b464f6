#include <deeppcr/nn/samplers.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace deeppcr::nn {
namespace {

constexpr double largest_beta = 0.999;
constexpr double karras_exponent = 7;

NoiseSchedule of_betas(const std::vector<double>& betas) {
    std::vector<double> kept;
    double product = 1;
    for (const double beta : betas) kept.push_back(product *= 1 - beta);
    return NoiseSchedule(kept);
}

void require_times(index times) {
    if (times < 1) throw InvalidArgument("times", "at least 1", std::to_string(times));
}

/// noise / signal, the deviation of the noise where the signal is scaled to 1.
double ratio(const NoiseLevel& level) { return level.noise / level.signal; }

NoiseLevel level_at(const NoiseSchedule& schedule, index time) {
    return {double(time), schedule.signal(time), schedule.noise(time)};
}

/// To the nearest, ties to even, as Python's round has it.
index rounded(double value) { return index(std::nearbyint(value)); }

/// The level of this ratio, at the time where the schedule's logarithm of the ratio, linear between its times, has it.
NoiseLevel level_of_ratio(const NoiseSchedule& schedule, double wanted) {
    const auto logarithm = [&](index time) { return std::log(ratio(level_at(schedule, time))); };
    index below = 0;
    while (below + 2 < schedule.times() && logarithm(below + 1) <= std::log(wanted)) ++below;
    double time = 0;
    if (schedule.times() > 1) {
        const double low = logarithm(below), high = logarithm(below + 1);
        time = double(below) + std::clamp((std::log(wanted) - low) / (high - low), 0.0, 1.0);
    }
    const double signal = 1 / std::sqrt(1 + wanted * wanted);
    return {time, signal, wanted * signal};
}

/// As a step of the equation in the state divided by its signal: the network's input is multiplied by it again.
DenoisingStep euler_step(const NoiseLevel& from, const NoiseLevel& to, bool corrected) {
    DenoisingStep step{.level = from, .input = from.signal};
    const double before = ratio(from), after = ratio(to);
    step.from_state = after / before;
    step.from_sample = 1 - after / before;
    if (corrected && after > 0) step.correction = (after - before) / (2 * after);
    return step;
}

DenoisingStep ddim_step(const NoiseLevel& from, const NoiseLevel& to, double eta) {
    const double kept_from = from.signal * from.signal, kept_to = to.signal * to.signal;
    const double deviation = eta * to.noise / from.noise * std::sqrt(std::max(0.0, 1 - kept_from / kept_to));
    // to.signal * sample + direction * noise, where noise = (state - from.signal * sample) / from.noise
    const double direction = std::sqrt(std::max(0.0, to.noise * to.noise - deviation * deviation));
    DenoisingStep step{.level = from};
    step.from_state = direction / from.noise;
    step.from_sample = to.signal - direction * from.signal / from.noise;
    step.from_random = deviation;
    return step;
}

DenoisingStep ddpm_step(const NoiseLevel& from, const NoiseLevel& to) {
    const double kept_from = from.signal * from.signal, kept_to = to.signal * to.signal;
    const double alpha = kept_from / kept_to, beta = 1 - alpha;
    const double variance_from = from.noise * from.noise, variance_to = to.noise * to.noise;
    DenoisingStep step{.level = from};
    step.from_sample = to.signal * beta / variance_from;
    step.from_state = std::sqrt(alpha) * variance_to / variance_from;
    step.from_random = std::sqrt(variance_to / variance_from * beta);
    return step;
}

/// `before`: the level before `from`, for the second order.
DenoisingStep dpm_solver_step(const NoiseLevel* before, const NoiseLevel& from, const NoiseLevel& to) {
    DenoisingStep step{.level = from};
    step.from_state = to.noise / from.noise;
    const double whole = to.signal * (1 - ratio(to) / ratio(from));
    step.from_sample = whole;
    // A step to no noise at all is infinitely long in the logarithm of the ratio: of first order.
    if (before != nullptr && to.noise > 0) {
        const double length = std::log(ratio(from) / ratio(to)), last = std::log(ratio(*before) / ratio(from));
        step.from_sample += whole * length / (2 * last);
        step.from_previous = -whole * length / (2 * last);
    }
    return step;
}

}  // namespace

NoiseSchedule::NoiseSchedule(std::vector<double> kept_variance) : kept_(std::move(kept_variance)) {
    require_times(times());
    double last = 1;
    for (const double kept : kept_) {
        if (!(kept > 0 && kept < last))
            throw InvalidArgument("kept_variance", "falling numbers between 1 and 0",
                                  std::to_string(kept) + " after " + std::to_string(last));
        last = kept;
    }
}

NoiseSchedule NoiseSchedule::linear(index times, double first, double last) {
    require_times(times);
    std::vector<double> betas;
    for (index n = 0; n < times; ++n)
        betas.push_back(times == 1 ? first : first + (last - first) * double(n) / double(times - 1));
    return of_betas(betas);
}

NoiseSchedule NoiseSchedule::cosine(index times) {
    require_times(times);
    const auto kept = [](double part) {
        const double cosine = std::cos((part + 0.008) / 1.008 * std::numbers::pi / 2);
        return cosine * cosine;
    };
    std::vector<double> betas;
    for (index n = 0; n < times; ++n)
        betas.push_back(
            std::min(largest_beta, 1 - kept(double(n + 1) / double(times)) / kept(double(n) / double(times))));
    return of_betas(betas);
}

double NoiseSchedule::signal(index time) const { return std::sqrt(kept_variance(time)); }
double NoiseSchedule::noise(index time) const { return std::sqrt(1 - kept_variance(time)); }

std::vector<NoiseLevel> noise_levels(const NoiseSchedule& schedule, index steps, Spacing spacing) {
    const index times = schedule.times();
    if (steps < 1 || steps > times)
        throw InvalidArgument("steps", "1 to the schedule's " + std::to_string(times), std::to_string(steps));
    std::vector<NoiseLevel> levels;
    const double highest = std::pow(ratio(level_at(schedule, times - 1)), 1 / karras_exponent);
    const double lowest = std::pow(ratio(level_at(schedule, 0)), 1 / karras_exponent);
    for (index i = 0; i < steps; ++i) {
        const double part = steps == 1 ? 0 : double(i) / double(steps - 1);
        switch (spacing) {
            case Spacing::leading:
                levels.push_back(level_at(schedule, (steps - 1 - i) * (times / steps)));
                break;
            case Spacing::trailing:
                levels.push_back(
                    level_at(schedule, rounded(double(times) - double(i) * double(times) / double(steps)) - 1));
                break;
            case Spacing::linspace:
                levels.push_back(level_at(schedule, rounded(double(times - 1) * (1 - part))));
                break;
            case Spacing::karras:
                levels.push_back(
                    level_of_ratio(schedule, std::pow(highest + part * (lowest - highest), karras_exponent)));
                break;
        }
    }
    levels.push_back({});
    return levels;
}

DenoisingPlan denoising_plan(const NoiseSchedule& schedule, const SamplerOptions& options) {
    if (!(options.eta >= 0 && options.eta <= 1))
        throw InvalidArgument("eta", "a number from 0 to 1", std::to_string(options.eta));
    if (options.eta > 0 && options.sampler != Sampler::ddim)
        throw InvalidArgument("eta", "0, as only ddim has it", std::to_string(options.eta));
    const std::vector<NoiseLevel> levels = noise_levels(schedule, options.steps, options.spacing);
    DenoisingPlan plan;
    plan.remembers = options.sampler == Sampler::dpm_solver_2;
    for (std::size_t i = 0; i + 1 < levels.size(); ++i) {
        const NoiseLevel &from = levels[i], &to = levels[i + 1];
        switch (options.sampler) {
            case Sampler::ddpm:
                plan.steps.push_back(ddpm_step(from, to));
                break;
            case Sampler::ddim:
                plan.steps.push_back(ddim_step(from, to, options.eta));
                break;
            case Sampler::dpm_solver_1:
                plan.steps.push_back(dpm_solver_step(nullptr, from, to));
                break;
            case Sampler::dpm_solver_2:
                plan.steps.push_back(dpm_solver_step(i > 0 ? &levels[i - 1] : nullptr, from, to));
                break;
            case Sampler::euler:
            case Sampler::heun:
                plan.steps.push_back(euler_step(from, to, options.sampler == Sampler::heun));
                plan.initial_deviation = 1 / levels.front().signal;
                break;
        }
        plan.random = plan.random || plan.steps.back().from_random > 0;
    }
    return plan;
}

SampleEstimate sample_estimate(Prediction prediction, const NoiseLevel& level) {
    switch (prediction) {
        case Prediction::noise:
            return {1 / level.signal, -level.noise / level.signal};
        case Prediction::velocity:
            return {level.signal, -level.noise};
        case Prediction::sample:
            break;
    }
    return {0, 1};
}

}  // namespace deeppcr::nn
