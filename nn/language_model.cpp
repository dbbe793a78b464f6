#include "nn/language_model.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <cmath>
#include <utility>
#include <variant>

#include <deeppcr/nn/cell.hpp>

#include "nn/basics.hpp"
#include "nn/jacobian_growth.hpp"
#include "nn/libtorch.hpp"
#include "nn/threads.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

// ---------------------------------------------------------------------------------------------- the options

CellKind cell_kind(Mixer mixer) {
    return mixer == Mixer::para_gru    ? CellKind::para_gru
           : mixer == Mixer::para_lstm ? CellKind::para_lstm
                                       : CellKind::slstm;
}

bool has_gate(Mixer mixer) { return mixer != Mixer::lstm && mixer != Mixer::attention; }

index mixer_parameters(const LanguageModelOptions& options) {
    const index width = options.width, hidden = options.hidden;
    switch (options.mixer) {
        case Mixer::linear:
            return hidden * width + 2 * hidden;
        case Mixer::lstm:
            return 4 * hidden * (width + hidden + 2);
        case Mixer::attention:
            return 3 * hidden * width;
        default:
            break;
    }
    const CellSizes sizes = sizes_of(cell_kind(options.mixer));
    return sizes.inputs * hidden * (width / options.heads + 1) + sizes.parameters * hidden;
}

index projection_parameters(const LanguageModelOptions& options) {
    return (has_gate(options.mixer) ? 2 : 1) * options.hidden * options.width;
}

index matching_mlp(const LanguageModelOptions& options) {
    LanguageModelOptions reference;
    reference.width = reference.hidden = options.width;
    reference.heads = 1;
    const index mlp = (8 * options.width / 3 + 7) / 8 * 8;
    const index rest = mixer_parameters(reference) + projection_parameters(reference) - mixer_parameters(options) -
                       projection_parameters(options);
    return std::max<index>(1, mlp + index(std::llround(double(rest) / double(3 * options.width))));
}

// ---------------------------------------------------------------------------------------------- the mixers

Tensor uniform(at::IntArrayRef sizes, index inputs, at::Generator& generator, double scale = 1) {
    const double bound = scale / std::sqrt(double(inputs));
    return at::empty(sizes).uniform_(-bound, bound, generator);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight) {
    return x * at::rsqrt(x.square().mean(-1, /*keepdim=*/true) + 1e-6) * weight;
}

/// Where 16 bits are too few.
Tensor at_least_float(const Tensor& x) { return x.to(c10::promoteTypes(x.scalar_type(), at::kFloat)); }

class CellMixer : public MixerModule {
public:
    CellMixer(const LanguageModelOptions& options, at::Generator& generator)
        : kind_(cell_kind(options.mixer)), layer_(register_module("cell", make(options, generator))) {}

    Tensor forward(const Tensor& input, MixerState* state) override {
        const Tensor initial = state != nullptr && !state->empty() ? state->front() : Tensor();
        std::vector<CellTensors> cells;
        RecurrentCall call;
        call.batch_first = false;
        call.evaluation = evaluation_;
        call.reports = &reports_;
        if (growth_rate_) call.cells = &cells;
        auto [output, last] = recurrent(kind_, input, layer_->parameters(), initial, call);
        growth_ = growth_rate_ ? jacobian_growth(kind_, cells.front(), *growth_rate_) : Tensor();
        if (state != nullptr) *state = {last};
        return output;
    }

    const Report* report() const override { return reports_.data(); }
    void measure_growth(std::optional<double> rate) override { growth_rate_ = rate; }
    Tensor growth() const override { return growth_; }
    void set_evaluation(const Options& evaluation) override { evaluation_ = evaluation; }
    Tensor recurrent_parameters() override { return layer_->named_parameters()["parameters_l0"]; }

private:
    static std::shared_ptr<torch::nn::Module> make(const LanguageModelOptions& options, at::Generator& generator) {
        const auto seed = at::empty({1}, at::kLong).random_(generator).item<std::int64_t>();
        const RecurrentOptions layer =
            RecurrentOptions(options.width, options.hidden).heads(options.heads).seed(std::uint64_t(seed));
        if (options.mixer == Mixer::para_gru) return ParaGRU(layer).ptr();
        if (options.mixer == Mixer::para_lstm) return ParaLSTM(layer).ptr();
        return SLSTM(layer).ptr();
    }

    CellKind kind_;
    std::shared_ptr<torch::nn::Module> layer_;
    Options evaluation_;
    std::vector<Report> reports_;
    std::optional<double> growth_rate_;
    Tensor growth_;
};

/// h_t = a h_{t-1} + sqrt(1 - a^2) u_t, a = exp(-exp(rate)): all steps as a product of Fourier transforms.
class LinearMixer : public MixerModule {
public:
    LinearMixer(const LanguageModelOptions& options, at::Generator& generator)
        : weight_(register_parameter("weight", uniform({options.hidden, options.width}, options.width, generator))),
          bias_(register_parameter("bias", at::zeros({options.hidden}))),
          // Time constants of 1 to 1,000 steps.
          rate_(register_parameter("rate", at::empty({options.hidden}).uniform_(-std::log(1000.0), 0, generator))) {}

    Tensor forward(const Tensor& input, MixerState* state) override {
        const index steps = input.size(0);
        const Tensor decay = at::exp(rate_);  // -log a
        const Tensor u = at::linear(input, weight_, bias_) * at::sqrt(1 - at::exp(-2 * decay));
        const Tensor times = at::arange(steps, u.options()).unsqueeze(1);
        const Tensor powers = at::exp(-times * decay);  // a^t, [steps,hidden]
        Tensor h = steps == 1
                       ? u
                       : at::fft_irfft(at::fft_rfft(u, 2 * steps, 0) * at::fft_rfft(powers, 2 * steps, 0).unsqueeze(1),
                                       2 * steps, 0)
                             .narrow(0, 0, steps);
        if (state == nullptr) return h;
        if (!state->empty()) h = h + (powers * at::exp(-decay)).unsqueeze(1) * state->front();
        *state = {h.select(0, steps - 1)};
        return h;
    }

private:
    Tensor weight_, bias_, rate_;
};

class LstmMixer : public MixerModule {
public:
    LstmMixer(const LanguageModelOptions& options, at::Generator& generator) : hidden_(options.hidden) {
        const index gates = 4 * hidden_;
        Tensor bias = at::zeros({gates});
        bias.slice(0, hidden_, 2 * hidden_).fill_(1);  // of the forget gate, as the cells here begin
        parameters_ = {
            register_parameter("weight_ih", uniform({gates, options.width}, options.width, generator)),
            register_parameter("weight_hh", uniform({gates, hidden_}, hidden_, generator)),
            register_parameter("bias_ih", bias),
            register_parameter("bias_hh", at::zeros({gates})),
        };
    }

    Tensor forward(const Tensor& input, MixerState* state) override {
        MixerState start = state != nullptr ? *state : MixerState();
        if (start.empty()) start.assign(2, at::zeros({1, input.size(1), hidden_}, input.options()));
        auto [output, h, c] = at::lstm(input, start, parameters_, /*has_biases=*/true, /*num_layers=*/1,
                                       /*dropout=*/0, is_training(), /*bidirectional=*/false, /*batch_first=*/false);
        if (state != nullptr) *state = {h, c};
        return output;
    }

private:
    index hidden_;
    std::vector<Tensor> parameters_;
};

class AttentionMixer : public MixerModule {
public:
    AttentionMixer(const LanguageModelOptions& options, at::Generator& generator)
        : heads_(options.heads),
          weight_(
              register_parameter("weight", uniform({3 * options.hidden, options.width}, options.width, generator))) {}

    /// The state: all keys and values, [batch,heads,steps,channels].
    Tensor forward(const Tensor& input, MixerState* state) override {
        const index steps = input.size(0), batch = input.size(1);
        const auto parts = at::linear(input, weight_).view({steps, batch, 3, heads_, -1}).permute({2, 1, 3, 0, 4});
        const index before = state != nullptr && !state->empty() ? state->front().size(2) : 0;
        const Tensor q = rotated(parts[0], before);
        Tensor k = rotated(parts[1], before), v = parts[2];
        if (before > 0) k = at::cat({state->at(0), k}, 2), v = at::cat({state->at(1), v}, 2);
        if (state != nullptr) *state = {k, v};
        const Tensor later = at::ones({steps, before + steps}, input.options().dtype(at::kBool)).triu(before + 1);
        const Tensor scores = at::matmul(q * (1 / std::sqrt(double(q.size(3)))), k.transpose(2, 3));
        const Tensor weights = at::softmax(at_least_float(scores).masked_fill(later, -INFINITY), 3);
        return at::matmul(weights, v).permute({2, 0, 1, 3}).reshape({steps, batch, -1});
    }

private:
    /// Each pair of channels (i, i + half) of step t is turned by the angle t / 10000^(i / half).
    static Tensor rotated(const Tensor& projected, index before) {
        const Tensor x = at_least_float(projected);
        const index half = x.size(3) / 2;
        const auto options = x.options();
        const Tensor angles = (at::arange(x.size(2), options) + double(before)).unsqueeze(1) *
                              at::exp(at::arange(half, options) * (-std::log(10000.0) / double(half)));
        const Tensor cosine = at::cos(angles), sine = at::sin(angles);
        const Tensor a = x.narrow(3, 0, half), b = x.narrow(3, half, half);
        return at::cat({a * cosine - b * sine, a * sine + b * cosine}, 3);
    }

    index heads_;
    Tensor weight_;
};

std::shared_ptr<MixerModule> make_mixer(const LanguageModelOptions& options, at::Generator& generator) {
    switch (options.mixer) {
        case Mixer::linear:
            return std::make_shared<LinearMixer>(options, generator);
        case Mixer::lstm:
            return std::make_shared<LstmMixer>(options, generator);
        case Mixer::attention:
            return std::make_shared<AttentionMixer>(options, generator);
        default:
            return std::make_shared<CellMixer>(options, generator);
    }
}

/// A block whose backward pass computes its forward pass again, from its input. Gives the block's output and its
/// growth, 0 where that is not measured.
struct RecomputedBlock : torch::autograd::Function<RecomputedBlock> {
    static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& input,
                                                  LanguageBlock* block, bool bfloat16) {
        context->save_for_backward({input});
        context->saved_data["block"] = std::int64_t(reinterpret_cast<std::intptr_t>(block));
        context->saved_data["bfloat16"] = bfloat16;
        const Tensor output = block->forward(input, nullptr), growth = block->mixer->growth();
        return {output, growth.defined() ? growth : at::zeros({}, input.options())};
    }
    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& output_gradients) {
        const Tensor input = context->get_saved_variables()[0].detach().requires_grad_();
        auto* const block = reinterpret_cast<LanguageBlock*>(std::intptr_t(context->saved_data["block"].toInt()));
        torch::autograd::variable_list outputs, gradients = {output_gradients[0]};
        {
            const at::AutoGradMode with_gradients(true);
            const Bfloat16Products products(input.device(), context->saved_data["bfloat16"].toBool());
            outputs.push_back(block->forward(input, nullptr));
        }
        if (const Tensor growth = block->mixer->growth(); growth.defined()) {
            outputs.push_back(growth);
            gradients.push_back(output_gradients[1]);
        }
        torch::autograd::backward(outputs, gradients);  // adds to the parameters' gradients
        return {input.grad(), Tensor(), Tensor()};
    }
};

}  // namespace

LanguageModelOptions completed(LanguageModelOptions options) {
    constexpr index most = 1 << 20;
    require(options.vocabulary >= 1 && options.vocabulary <= std::numeric_limits<std::int32_t>::max(), "vocabulary",
            "1 to 2^31 - 1", options.vocabulary);
    require(options.width >= 1 && options.width <= most, "width", "1 to 2^20", options.width);
    require(options.layers >= 1 && options.layers <= 10'000, "layers", "1 to 10,000", options.layers);
    require(options.hidden >= 0 && options.hidden <= most, "hidden", "0 to 2^20", options.hidden);
    require(options.heads >= 0, "heads", "at least 0", options.heads);
    require(options.mlp >= 0 && options.mlp <= 16 * most, "mlp", "0 to 2^24", options.mlp);
    const bool attention = options.mixer == Mixer::attention;
    if (options.hidden == 0) options.hidden = options.width;
    if (options.heads == 0) options.heads = attention ? std::max<index>(1, options.hidden / 64) : 1;
    const auto divides = [&](const char* argument, index value) {
        require(value % options.heads == 0, argument, "a multiple of heads = " + std::to_string(options.heads), value);
    };
    if (is_cell(options.mixer)) divides("width", options.width);
    divides("hidden", options.hidden);
    require(!attention || options.hidden / options.heads % 2 == 0, "hidden", "an even number of channels per head",
            options.hidden / options.heads);
    if (options.mlp == 0) options.mlp = matching_mlp(options);
    return options;
}

LanguageBlock::LanguageBlock(const LanguageModelOptions& options, at::Generator& generator)
    : mixer(register_module("mixer", make_mixer(options, generator))),
      mixer_norm_(register_parameter("mixer_norm", at::ones({options.width}))),
      mlp_norm_(register_parameter("mlp_norm", at::ones({options.width}))) {
    const index width = options.width, hidden = options.hidden, mlp = options.mlp;
    const double depth = 1 / std::sqrt(double(2 * options.layers));  // so that the sum over blocks does not grow
    if (has_gate(options.mixer)) gate_ = register_parameter("gate", uniform({hidden, width}, width, generator));
    output_ = register_parameter("output", uniform({width, hidden}, hidden, generator, depth));
    const std::vector<Tensor> up = uniform({2 * mlp, width}, width, generator).chunk(2);
    up_ = register_parameter("up", up[0].clone());
    value_ = register_parameter("value", up[1].clone());
    down_ = register_parameter("down", uniform({width, mlp}, mlp, generator, depth));
}

Tensor LanguageBlock::forward(const Tensor& input, MixerState* state) {
    const Tensor normed = rms_norm(input, mixer_norm_);
    Tensor mixed = mixer->forward(normed, state);
    if (gate_.defined()) mixed = mixed * at::silu(at::linear(normed, gate_));
    const Tensor between = input + at::linear(mixed, output_);
    const Tensor again = rms_norm(between, mlp_norm_);
    return between + at::linear(at::silu(at::linear(again, up_)) * at::linear(again, value_), down_);
}

LanguageModel::LanguageModel(const LanguageModelOptions& options) : options_(completed(options)) {
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
    const index vocabulary = options_.vocabulary, width = options_.width;
    embedding_ = register_parameter(
        "embedding", at::empty({vocabulary, width}).normal_(0, 0.5 / std::sqrt(double(width)), generator));
    for (index layer = 0; layer < options_.layers; ++layer) {
        blocks_.push_back(std::make_shared<LanguageBlock>(options_, generator));
        register_module("block_" + std::to_string(layer), blocks_.back());
    }
    norm_ = register_parameter("norm", at::ones({width}));
    if (!options_.tied) head_ = register_parameter("head", uniform({vocabulary, width}, width, generator));
}

Tensor LanguageModel::forward(const Tensor& tokens, State* state) {
    const Bfloat16Products products(tokens.device(), bfloat16);
    if (state != nullptr) state->resize(blocks_.size());
    Tensor x = at::embedding(embedding_, tokens);
    std::vector<Tensor> growths;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
        Tensor growth;
        if (recompute && at::GradMode::is_enabled() && state == nullptr) {
            const auto results = RecomputedBlock::apply(x, blocks_[i].get(), bfloat16);
            x = results[0];
            if (blocks_[i]->mixer->growth().defined()) growth = results[1];
        } else {
            x = blocks_[i]->forward(x, state != nullptr ? &(*state)[i] : nullptr);
            growth = blocks_[i]->mixer->growth();
        }
        if (growth.defined()) growths.push_back(growth);
    }
    growth_ = growths.empty() ? Tensor() : at::stack(growths).mean();
    return at::linear(rms_norm(x, norm_), head_.defined() ? head_ : embedding_);
}

Tensor LanguageModel::loss(const Tensor& tokens) {
    const index steps = tokens.size(0) - 1;
    const Tensor logits = at_least_float(forward(tokens.narrow(0, 0, steps)));
    return at::cross_entropy_loss(logits.view({-1, logits.size(2)}), tokens.narrow(0, 1, steps).reshape({-1}));
}

void LanguageModel::measure_growth(std::optional<double> rate) {
    for (const auto& block : blocks_) block->mixer->measure_growth(rate);
}

void LanguageModel::set_evaluation(const Options& evaluation) {
    for (const auto& block : blocks_) block->mixer->set_evaluation(evaluation);
}

std::vector<const Report*> LanguageModel::reports() const {
    std::vector<const Report*> found;
    for (const auto& block : blocks_)
        if (const Report* const report = block->mixer->report(); report != nullptr) found.push_back(report);
    return found;
}

std::vector<Tensor> LanguageModel::recurrent_parameters() const {
    std::vector<Tensor> found;
    for (const auto& block : blocks_)
        if (const Tensor parameters = block->mixer->recurrent_parameters(); parameters.defined())
            found.push_back(parameters);
    return found;
}

// ------------------------------------------------------------------------ what trainings of such a model share

std::shared_ptr<LanguageModel> make_model(const std::filesystem::path& path, const LanguageModelOptions& options,
                                          const SavedTensors& tensors) {
    index numbers = 0;
    for (const auto& [name, tensor] : tensors)
        if (!name.starts_with("optimiser.")) numbers += tensor.numel();
    LanguagePlanOptions planned;
    planned.model = options;
    if (const index expected = plan_language_model(planned).parameters; numbers != expected)
        throw FileError(path, std::to_string(expected) + " parameters", std::to_string(numbers));
    auto model = std::make_shared<LanguageModel>(options);
    const at::NoGradGuard no_gradients;
    for (auto& parameter : model->named_parameters())
        parameter.value().copy_(find(path, tensors, parameter.key(), parameter.value()));
    return model;
}

std::vector<Optimisation::Group> parameter_groups(const LanguageModel& model) {
    Optimisation::Group matrices, others;
    others.decays = false;
    for (const auto& parameter : model.named_parameters())
        (parameter.value().dim() == 2 && !parameter.key().ends_with("parameters_l0") ? matrices : others)
            .parameters.emplace_back(parameter.key(), parameter.value());
    return {matrices, others};
}

void add(NewtonFigures& figures, const Report& report, index number) {
    figures.iterations = std::max(figures.iterations, report.iterations);
    figures.mean_iterations += (double(report.iterations) - figures.mean_iterations) / double(number + 1);
    figures.residual = std::max(figures.residual, report.residual);
    figures.lyapunov = std::fmax(figures.lyapunov, report.lyapunov);
    figures.status = std::max(figures.status, report.status);
    if (report.status == Status::finished_sequentially) figures.sequential_steps += report.sequential_steps;
}

void gather(NewtonFigures& figures, const Share& share, index together) {
    std::vector<double> sums = {figures.mean_iterations, double(figures.sequential_steps)},
                        maxima = {double(figures.iterations), figures.residual, figures.lyapunov,
                                  double(figures.status)};
    share.reduce(sums, maxima);
    figures.mean_iterations = sums[0] / double(share.ranks());
    figures.sequential_steps = index(sums[1]) / together;
    figures.iterations = index(maxima[0]);
    figures.residual = maxima[1];
    figures.lyapunov = maxima[2];
    figures.status = Status(int(maxima[3]));
}

Tensor sequences(const files::TokenFile& file, const std::vector<index>& begins, index count, at::Device device) {
    Tensor rows = at::empty({index(begins.size()), count}, at::kLong);
    auto* const numbers = rows.data_ptr<std::int64_t>();
    for (std::size_t i = 0; i < begins.size(); ++i) file.read(begins[i], count, numbers + index(i) * count);
    return rows.t().contiguous().to(device);
}

Estimates estimates_of(index step, index interval, at::Device device) {
    if (interval == 0 || step % interval != 0) return Estimates::none;
    return device.is_cuda() ? Estimates::quick : Estimates::full;
}

void set_threads(const Options& evaluation) {
    limit_threads(evaluation.execution.threads > 0 ? evaluation.execution.threads : default_threads());
}

// -------------------------------------------------------------------------------------------------- the plan

namespace {

/// Per token, for the backward pass: floats, and numbers of the type in which products are computed.
struct Kept {
    index floats = 0, numbers = 0;
    index bytes(index number_bytes) const { return 4 * floats + number_bytes * numbers; }
};

/// Of a block. Exact for the cells; LibTorch's LSTM and attention keep about so many.
Kept kept_by_block(const LanguageModelOptions& options, index context, index number_bytes) {
    const index hidden = options.hidden;
    // Of each norm: what came, normed, both float; and weighted, rounded for each of the two products that read it.
    Kept kept{4 * options.width, (number_bytes == 4 ? 2 : 4) * options.width};
    switch (options.mixer) {
        case Mixer::linear:  // the projection, scaled; two transforms of twice the length
            kept.floats += hidden * 7;
            break;
        case Mixer::lstm:  // gates before and after their functions, c, tanh c, h
            kept.numbers += 11 * hidden;
            break;
        case Mixer::attention:  // q, k, v, the first two turned, the result; the weights
            kept.numbers += 6 * hidden + options.heads * context;
            break;
        default: {
            const CellSizes sizes = sizes_of(cell_kind(options.mixer));
            kept.numbers += (sizes.inputs + sizes.states) * hidden;
        }
    }
    if (has_gate(options.mixer)) kept.numbers += 3 * hidden;  // before and after silu, the product
    kept.numbers += 4 * options.mlp;                          // two parts, silu of one, the product
    return kept;
}

}  // namespace

LanguagePlan plan_language_model(const LanguagePlanOptions& options) {
    require(options.context >= 1, "context", "at least 1", options.context);
    require(options.devices >= 1, "devices", "at least 1", options.devices);
    require(options.batch >= 1 && options.batch % options.devices == 0, "batch",
            "a multiple of devices = " + std::to_string(options.devices) + ", at least 1", options.batch);
    const index own = options.batch / options.devices;
    require(options.micro_batch >= 0 && (options.micro_batch == 0 || own % options.micro_batch == 0), "micro_batch",
            "a divisor of a device's batch, " + std::to_string(own), options.micro_batch);
    require(options.number_bytes == 2 || options.number_bytes == 4, "number_bytes", "2 or 4", options.number_bytes);

    LanguagePlan plan;
    plan.model = completed(options.model);
    const LanguageModelOptions& model = plan.model;
    const index layers = model.layers, width = model.width, table = model.vocabulary * width;
    plan.parts = {{"embedding", table},
                  {"mixers", layers * mixer_parameters(model)},
                  {"gates and outputs", layers * projection_parameters(model)},
                  {"MLPs", layers * 3 * width * model.mlp},
                  {"norms", (2 * layers + 1) * width},
                  {"head", model.tied ? 0 : table}};
    for (const auto& part : plan.parts) plan.parameters += part.parameters;

    plan.weights = plan.gradients = 4 * plan.parameters;  // floats, also where activations are not
    plan.optimiser = 8 * plan.parameters;
    const index block = kept_by_block(model, options.context, options.number_bytes).bytes(options.number_bytes);
    // The norm; logits, their logarithms, their gradients.
    const Kept end{2 * width + 2 * model.vocabulary, width + model.vocabulary};
    plan.activations_per_token =
        (options.recompute ? 4 * layers * width + block : layers * block) + end.bytes(options.number_bytes);
    const index at_once = options.micro_batch > 0 ? options.micro_batch : own;
    plan.activations = plan.activations_per_token * options.context * at_once;
    plan.bytes = plan.weights + plan.gradients + plan.optimiser + plan.activations;

    index matrices =
        plan.parameters - (model.tied ? 0 : table) - (2 * layers + 1) * width;  // the embedding as the head
    if (model.mixer == Mixer::lstm) matrices -= layers * 8 * model.hidden;
    if (model.mixer == Mixer::linear) matrices -= layers * 2 * model.hidden;
    if (is_cell(model.mixer)) {
        const CellSizes sizes = sizes_of(cell_kind(model.mixer));
        matrices -= layers * (sizes.inputs + sizes.parameters) * model.hidden;
    }
    plan.forward_flops = 2 * double(matrices);
    if (model.mixer == Mixer::attention)
        plan.forward_flops += 4 * double(layers) * double(options.context) * double(model.hidden);
    plan.training_flops = (options.recompute ? 4 : 3) * plan.forward_flops;
    plan.tokens_per_step = options.batch * options.context;
    plan.step_flops = plan.training_flops * double(plan.tokens_per_step / options.devices);
    return plan;
}

}  // namespace deeppcr::nn
