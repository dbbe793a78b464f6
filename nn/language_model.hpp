// The module of a language model: see <deeppcr/nn/language_model.hpp> for what it computes.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/recurrent.hpp>
#include <files/tokens.hpp>

#include "nn/optimisation.hpp"
#include "nn/saved_state.hpp"
#include "nn/sharing.hpp"

namespace deeppcr::nn {

inline bool is_cell(Mixer mixer) {
    return mixer == Mixer::para_gru || mixer == Mixer::para_lstm || mixer == Mixer::slstm;
}

/// What a mixer carries from step to step; empty before the first.
using MixerState = std::vector<at::Tensor>;

/// One of a block's ways to mix over time. Inputs [steps,batch,width], outputs [steps,batch,hidden].
class MixerModule : public torch::nn::Module {
public:
    /// state: read where not empty, and written, where not null.
    virtual at::Tensor forward(const at::Tensor& input, MixerState* state) = 0;
    /// Of the last call, where the mixer is a cell.
    virtual const Report* report() const { return nullptr; }
    /// Whether forward passes also compute `jacobian_growth` of the cell, above which rate; and that of the last one,
    /// undefined else.
    virtual void measure_growth(std::optional<double>) {}
    virtual at::Tensor growth() const { return {}; }
    virtual void set_evaluation(const Options&) {}
    /// The parameters that the cell multiplies its states by; undefined where there are none.
    virtual at::Tensor recurrent_parameters() { return {}; }
};

class LanguageBlock : public torch::nn::Module {
public:
    LanguageBlock(const LanguageModelOptions& options, at::Generator& generator);
    at::Tensor forward(const at::Tensor& input, MixerState* state);

    std::shared_ptr<MixerModule> mixer;

private:
    at::Tensor mixer_norm_, gate_, output_, mlp_norm_, up_, value_, down_;
};

class LanguageModel : public torch::nn::Module {
public:
    using State = std::vector<MixerState>;  ///< of each block

    /// Initial weights by a generator of options.seed alone.
    explicit LanguageModel(const LanguageModelOptions& options);

    /// tokens: [steps,batch], 64-bit. Returns logits [steps,batch,vocabulary]. state: where the sequences stand, or
    /// null: they begin, and nothing is kept.
    at::Tensor forward(const at::Tensor& tokens, State* state = nullptr);
    /// Mean loss per token, nats. tokens: [steps + 1,batch]; each is predicted from those before it.
    at::Tensor loss(const at::Tensor& tokens);

    void set_evaluation(const Options& evaluation);
    /// Of the cells of the last forward pass.
    std::vector<const Report*> reports() const;
    std::vector<at::Tensor> recurrent_parameters() const;
    const LanguageModelOptions& options() const { return options_; }

    /// Whether forward passes also compute `growth`, above which rate.
    void measure_growth(std::optional<double> rate);
    /// The mean of `jacobian_growth` over the blocks in the last forward pass, differentiable with its logits;
    /// undefined where it was not computed, or no mixer is a cell.
    const at::Tensor& growth() const { return growth_; }

    bool recompute = false;
    bool bfloat16 = false;  ///< matrix products, and what lies between them, in bfloat16

private:
    LanguageModelOptions options_;
    at::Tensor embedding_, norm_, head_, growth_;
    std::vector<std::shared_ptr<LanguageBlock>> blocks_;
};

// ------------------------------------------------------------------------ what trainings of such a model share

/// Lists the options as fields of a checkpoint: visit(key, field), or visit(key, field, names) for choices.
template <class Model, class Visit>
void visit_model(Model& model, const Visit& visit) {
    visit("mixer", model.mixer, mixer_names);
    visit("vocabulary", model.vocabulary);
    visit("width", model.width);
    visit("layers", model.layers);
    visit("hidden", model.hidden);
    visit("heads", model.heads);
    visit("mlp", model.mlp);
    visit("tied", model.tied, yes_or_no);
    visit("model_seed", model.seed);
}

/// The model of a checkpoint; tensors of an optimiser may be among the others. They are compared with the options
/// before anything is built. Throws FileError, about `path`.
std::shared_ptr<LanguageModel> make_model(const std::filesystem::path& path, const LanguageModelOptions& options,
                                          const SavedTensors& tensors);

/// Matrices, whose weights decay, and the rest.
std::vector<Optimisation::Group> parameter_groups(const LanguageModel& model);

/// Adds the report of the `number`th cell, from 0, of those that the figures are about.
void add(NewtonFigures& figures, const Report& report, index number);

/// Of all ranks' cells in place of this one's. together: so many ranks have the same sequences. Collective.
void gather(NewtonFigures& figures, const Share& share, index together = 1);

/// `count` tokens from each of those places on, side by side: [count,begins], 64-bit. Throws as TokenFile::read.
at::Tensor sequences(const files::TokenFile& file, const std::vector<index>& begins, index count, at::Device device);

/// What is estimated on a device in each `interval`th step (0: in none).
Estimates estimates_of(index step, index interval, at::Device device);

/// LibTorch's threads: as many as the cells'.
void set_threads(const Options& evaluation);

}  // namespace deeppcr::nn
