// Generation by a diffusion model as a recurrence over its denoising steps, for every method of `evaluate`.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/samplers.hpp>

namespace deeppcr::nn {

/// What a network predicts (see Prediction) for noisy samples: inputs [rows, numbers], times [rows] and the image of
/// the batch that each row belongs to, images [rows] (long), to predictions [rows, numbers]. Rows do not influence each
/// other, and the same row gives the same prediction in every batch, to rounding. Called without gradients, or with
/// them recorded where the Jacobian is wanted.
using Denoiser = std::function<at::Tensor(const at::Tensor& inputs, const at::Tensor& times, const at::Tensor& images)>;

struct DenoisingOptions {
    Prediction prediction = Prediction::noise;
    double clip = 0;      ///< estimates of the sample are held within -clip .. clip; 0: not
    index most_rows = 0;  ///< of one call of the network; 0: all rows of a pass in one call
};

/// x_t = the state after t denoising steps of every image of a batch, t = 1 .. steps; float. The width is that of a
/// sample, or twice that where the plan remembers. All noise is given, so that the trajectory is a function of it.
///
/// Jacobians, dense, are those of the step including the network, by `numbers` vector-Jacobian products for all rows at
/// once. linearise_diagonal does not ask for them: it gives the derivative with the network's prediction held fixed,
/// the step's own linear part; with it Surrogate::diagonal is a Picard iteration that knows by how much the steps
/// scale.
///
/// On a GPU the callbacks run in LibTorch's current stream, which has to be that of the evaluation's Options, and the
/// vector-Jacobian products of a row are rows of one call: `numbers` times as many, so that few kernels are launched.
class DenoisingRecurrence : public Recurrence<float> {
public:
    /// initial_noise: standard normal, [batch, numbers]; random: likewise, [steps, batch, numbers], undefined where the
    /// plan is not random. Both float, on the device of the network. Throws InvalidArgument.
    DenoisingRecurrence(DenoisingPlan plan, Denoiser denoiser, const at::Tensor& initial_noise,
                        const at::Tensor& random, const DenoisingOptions& options);

    /// Other noise, of the same sizes, for the evaluations to come. Throws InvalidArgument.
    void draw(const at::Tensor& initial_noise, const at::Tensor& random);

    const DenoisingPlan& plan() const { return plan_; }
    /// Of one sample.
    index numbers() const { return initial_.size(1); }
    /// Rows that the network has been asked for since construction, and how often, one call waiting for the last: the
    /// steps of sequential sampling have as many dependent calls as steps. A pass with Jacobians counts as two, one of
    /// them the way back.
    index evaluated_rows() const { return *evaluated_rows_; }
    index dependent_calls() const { return *dependent_calls_; }

    /// The same as a recurrence over blocks of `length` steps each (the last may be shorter): its step is a block of
    /// steps, one after the other, for all blocks of a pass in the same calls of the network, and its states those
    /// after each block. With `evaluate` and the guess of `coarse_guess`: multiple shooting, `length` dependent calls a
    /// pass. Has no Jacobian but that of linearise_diagonal. Must not outlive this.
    std::unique_ptr<Recurrence<float>> blocks(index length) const;

    /// A first guess of all states [steps, batch, width] for Guess::given: the plan followed step after step with the
    /// samples that a run of DDIM over `steps` of its levels estimates, between them the last one. `steps` dependent
    /// calls of the network.
    Buffer<float> coarse_guess(index steps) const;

    bool runs_on(Backend backend) const override;
    void initial(const Section& section, View<float> state) const override;
    void step(const Section& section, View<const float> before, View<float> after) const override;
    void linearise(const Section& section, View<const float> before, View<float> after,
                   Jacobian<float> jacobian) const override;
    void linearise_diagonal(const Section& section, View<const float> before, View<float> after,
                            Jacobian<float> diagonal) const override;

private:
    class Blocks;
    struct Rows;
    /// Memory of a callback, where the network's tensors are.
    at::Tensor tensor_of(const float* data, at::IntArrayRef sizes) const;
    at::Tensor images_of(std::span<const index> sequences) const;
    Rows rows_of(const Section& section) const;
    /// Of the steps first, first + stride, .. , `count` of them.
    Rows rows_of(index first, index count, index stride, std::span<const index> sequences) const;
    /// Calls body(part of the rows, first of them, last) for as many rows as one call of the network may have, each of
    /// them `copies` times.
    template <class Body>
    void for_parts(const Rows& rows, index copies, const Body& body) const;
    /// The states after, [rows, width]. With gradients recorded: differentiable.
    at::Tensor advance(const Rows& rows, const at::Tensor& before) const;
    /// The step with this estimate of the sample.
    at::Tensor follow(const Rows& rows, const at::Tensor& before, const at::Tensor& estimate) const;
    /// The network's estimate of the sample, from the states before the steps (or, `next`, after them).
    at::Tensor estimate(const Rows& rows, const at::Tensor& state, bool next) const;
    at::Tensor ask(const at::Tensor& inputs, const at::Tensor& times, const at::Tensor& images) const;
    at::Tensor slopes_of_steps() const;
    at::Tensor slopes(index first, index count, index stride, index batch) const;

    DenoisingPlan plan_;
    Denoiser denoiser_;
    at::Tensor initial_, random_, coefficients_, images_, slopes_;
    DenoisingOptions options_;
    std::shared_ptr<index> evaluated_rows_, dependent_calls_;
};

}  // namespace deeppcr::nn
