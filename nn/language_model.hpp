// The module of a language model: see <deeppcr/nn/language_model.hpp> for what it computes.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/recurrent.hpp>

namespace deeppcr::nn {

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

}  // namespace deeppcr::nn
