// The samplers of diffusion models, as numbers: which noise levels a generation visits, and how each step combines what
// it has with what the network says. No LibTorch in here.
#pragma once

#include <vector>

#include <deeppcr/array.hpp>
#include <deeppcr/nn/names.hpp>

namespace deeppcr::nn {

enum class ScheduleKind { linear, cosine };
inline constexpr Names<ScheduleKind, 2> schedule_names{
    {{"linear", ScheduleKind::linear}, {"cosine", ScheduleKind::cosine}}};

/// How training mixes a sample x with standard normal noise z: signal(n) x + noise(n) z at times n = 0 .. times - 1,
/// with signal^2 + noise^2 = 1 (variance-preserving).
class NoiseSchedule {
public:
    /// From the products of 1 - beta ("alpha bar"), falling, each within (0,1). Throws InvalidArgument.
    explicit NoiseSchedule(std::vector<double> kept_variance);
    /// beta from `first` to `last` in equal steps. Source: Ho et al. 2020 (DDPM), section 4.
    static NoiseSchedule linear(index times = 1000, double first = 1e-4, double last = 0.02);
    /// Source: Nichol and Dhariwal 2021, eq. 17, betas at most 0.999.
    static NoiseSchedule cosine(index times = 1000);
    static NoiseSchedule of(ScheduleKind kind, index times) {
        return kind == ScheduleKind::cosine ? cosine(times) : linear(times);
    }

    index times() const { return index(kept_.size()); }
    double kept_variance(index time) const { return kept_[std::size_t(time)]; }
    double signal(index time) const;
    double noise(index time) const;

private:
    std::vector<double> kept_;
};

/// Which times a generation of fewer steps visits.
enum class Spacing {
    leading,   ///< multiples of times / steps, from 0 on; DDPM's and DDIM's own
    trailing,  ///< as leading, from the last time down. Source: Lin et al. 2024, table 2
    linspace,  ///< from the last time to 0 in equal steps, rounded
    karras,  ///< noise/signal^(1/7) in equal steps, between the schedule's extremes. Source: Karras et al. 2022, eq. 5
};
/// What the network predicts, of x_n = signal x + noise z.
enum class Prediction {
    noise,     ///< z ("epsilon")
    velocity,  ///< signal z - noise x ("v"). Source: Salimans and Ho 2022
    sample,    ///< x ("x0")
};
enum class Sampler {
    ddpm,          ///< ancestral. Source: Ho et al. 2020, algorithm 2, with the posterior's variance (eq. 7)
    ddim,          ///< Source: Song et al. 2021, eq. 12 and 16 (eta)
    dpm_solver_1,  ///< DPM-Solver++, first order. Source: Lu et al. 2022 (arXiv 2211.01095), eq. 9
    dpm_solver_2,  ///< its multistep method of second order, 2M. Source: ibid., algorithm 2
    euler,  ///< on the probability-flow equation, in noise/signal. Source: Karras et al. 2022, algorithm 1 without
            ///< corrections
    heun,   ///< likewise with them: two evaluations of the network per step, one in the last
};
inline constexpr Names<Spacing, 4> spacing_names{{{"leading", Spacing::leading},
                                                  {"trailing", Spacing::trailing},
                                                  {"linspace", Spacing::linspace},
                                                  {"karras", Spacing::karras}}};
inline constexpr Names<Prediction, 3> prediction_names{
    {{"noise", Prediction::noise}, {"velocity", Prediction::velocity}, {"sample", Prediction::sample}}};
inline constexpr Names<Sampler, 6> sampler_names{{{"ddpm", Sampler::ddpm},
                                                  {"ddim", Sampler::ddim},
                                                  {"dpm_solver_1", Sampler::dpm_solver_1},
                                                  {"dpm_solver_2", Sampler::dpm_solver_2},
                                                  {"euler", Sampler::euler},
                                                  {"heun", Sampler::heun}}};

struct SamplerOptions {
    Sampler sampler = Sampler::ddim;
    index steps = 50;
    Spacing spacing = Spacing::trailing;
    double eta = 0;  ///< of ddim: 0 is deterministic, 1 as much noise as ddpm
};

/// A level of noise: signal x + noise z, at a time that may lie between those of the training.
struct NoiseLevel {
    double time = 0, signal = 1, noise = 0;
};

/// The levels before each step, the noisiest first, and the one after the last, which has no noise. Throws
/// InvalidArgument for fewer than one step, or more than the schedule has times.
std::vector<NoiseLevel> noise_levels(const NoiseSchedule& schedule, index steps, Spacing spacing);

/// One step of the recurrence. The network sees input * state at `time`; its prediction gives an estimate of the
/// sample, and with `previous`, the estimate of the step before, and z, standard normal noise of this step:
///   state' = from_state * state + from_sample * sample + from_previous * previous + from_random * z
/// Where `correction` is not 0 (heun), the network is asked again, at the next step's level, for the sample of state':
///   state'' = (state + state') / 2 + correction * (state' - sample')
struct DenoisingStep {
    NoiseLevel level;
    double input = 1;
    double from_state = 0, from_sample = 0, from_previous = 0, from_random = 0;
    double correction = 0;
};

/// A sampler, in the order of generation. The first state is initial_deviation times standard normal noise; the last
/// one is the sample.
struct DenoisingPlan {
    std::vector<DenoisingStep> steps;
    double initial_deviation = 1;
    bool remembers =
        false;            ///< whether a state holds, after its numbers, the last estimate of the sample (dpm_solver_2)
    bool random = false;  ///< whether any step draws noise
};
/// Throws InvalidArgument.
DenoisingPlan denoising_plan(const NoiseSchedule& schedule, const SamplerOptions& options);

/// The sample that a prediction means, as from_input * input + from_prediction * prediction.
struct SampleEstimate {
    double from_input, from_prediction;
};
SampleEstimate sample_estimate(Prediction prediction, const NoiseLevel& level);

}  // namespace deeppcr::nn
