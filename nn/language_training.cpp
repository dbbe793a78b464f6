#include <ATen/CPUGeneratorImpl.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <fstream>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include <deeppcr/nn/fashion_mnist.hpp>
#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/tokens.hpp>
#include <files/tokens.hpp>

#include "nn/device_scope.hpp"
#include "nn/language_model.hpp"
#include "nn/threads.hpp"
#include "nn/training_loop.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

const std::string format = "deeppcr language model 1";

/// The most main memory that this process has had at a time, bytes; 0 where the system does not say.
index peak_memory() {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
        if (index kilobytes = 0; word == "VmHWM:" && status >> kilobytes) return 1024 * kilobytes;
    return 0;
}

// ------------------------------------------------------------------------------------------- the checkpoint

struct State {
    LanguageTrainingOptions options;
    index step = 0, updates = 0;  // done; a step that was skipped is no update
    index validated = 0;          // after so many steps for the last time
    std::uint64_t tokens_checksum = 0;
    std::string vocabulary;  // its description
    SavedTensors tensors;
};

/// What a resumed training must have in common with its checkpoint.
template <class S, class Visit>
void visit_fixed_fields(S& state, const Visit& visit) {
    visit_model(state.options.model, visit);
    auto& options = state.options;
    visit("context", options.context);
    visit("batch", options.batch);
    visit("steps", options.steps);
    visit("learning_rate", options.learning_rate);
    visit("warm_up", options.warm_up);
    visit("weight_decay", options.weight_decay);
    visit("gradient_clip", options.gradient_clip);
    visit("bound", options.bound);
    visit("penalty", options.penalty);
    visit("penalty_rate", options.penalty_rate);
    visit("number", options.number, number_names);
    visit("seed", options.seed);
    visit("tokens_checksum", state.tokens_checksum);
}

template <class S, class Visit>
void visit_fields(S& state, const Visit& visit) {
    visit("step", state.step);
    visit("updates", state.updates);
    visit("validated", state.validated);
    visit_fixed_fields(state, visit);
    auto& options = state.options;
    visit("micro_batch", options.micro_batch);
    visit("estimate_interval", options.estimate_interval);
    visit("recompute", options.recompute, yes_or_no);
    visit("on_divergence", options.on_divergence, on_divergence_names);
    visit("validation_interval", options.validation_interval);
    visit("validation_tokens", options.validation_tokens);
    visit("checkpoint_interval", options.checkpoint_interval);
    visit_evaluation(options.evaluation, cell_method_names, visit);
}

Metadata fixed_fields(const State& state) {
    Metadata fields;
    visit_fixed_fields(state, put_into(fields));
    return fields;
}

SavedState to_saved(const State& state) {
    SavedState saved{{{"format", format}, {"tokens", state.options.tokens.string()}}, state.tensors};
    visit_fields(state, put_into(saved.metadata));
    if (!state.vocabulary.empty()) {
        Tensor bytes = at::empty({index(state.vocabulary.size())}, at::kByte);
        std::copy(state.vocabulary.begin(), state.vocabulary.end(), bytes.data_ptr<std::uint8_t>());
        saved.tensors["vocabulary"] = bytes;
    }
    return saved;
}

/// Throws InvalidArgument for numbers out of their ranges.
void check(const LanguageTrainingOptions& options);

State from_saved(const std::filesystem::path& path, SavedState saved) {
    State state;
    saved.metadata.try_emplace("penalty", "0");  // checkpoints of earlier versions have none of them
    saved.metadata.try_emplace("penalty_rate", "-0.1");
    saved.metadata.try_emplace("number", "float32");
    saved.metadata.try_emplace("validated", "0");
    visit_fields(state, get_from(path, saved.metadata));
    state.options.tokens = saved.metadata["tokens"];
    try {
        check(state.options);
        if (const auto model = completed(state.options.model); model.mlp != state.options.model.mlp)
            throw InvalidArgument("mlp", std::to_string(model.mlp), std::to_string(state.options.model.mlp));
    } catch (const InvalidArgument& problem) {
        throw FileError(path, problem.what());
    }
    if (state.updates < 0 || state.updates > state.step || state.step > state.options.steps)
        throw FileError(path, "counts of steps as metadata \"step\" and \"updates\"",
                        std::to_string(state.step) + " and " + std::to_string(state.updates));
    if (state.validated < 0 || state.validated > state.step)
        throw FileError(path, "0 to " + std::to_string(state.step) + " as metadata \"validated\"",
                        std::to_string(state.validated));
    if (const auto found = saved.tensors.find("vocabulary"); found != saved.tensors.end()) {
        if (found->second.scalar_type() != at::kByte) throw FileError(path, "bytes as vocabulary", "another type");
        const auto* const bytes = found->second.data_ptr<std::uint8_t>();
        state.vocabulary.assign(bytes, bytes + found->second.numel());
        saved.tensors.erase(found);
    }
    state.tensors = std::move(saved.tensors);
    return state;
}

// ---------------------------------------------------------------------------------------------- the options

/// This process's share of every batch.
class LanguageShare : public Share {
public:
    /// Throws InvalidArgument.
    explicit LanguageShare(const LanguageTrainingOptions& options)
        : Share(options.group), by_steps_(options.share == Sharing::steps) {
        if (by_steps_ && !is_cell(options.model.mixer))
            throw InvalidArgument("share",
                                  "sequences, as steps can be shared where the mixer is a cell: para_gru, para_lstm "
                                  "or slstm",
                                  "steps, with " + std::string(name_of(mixer_names, options.model.mixer)));
        if (by_steps_)
            require(options.context >= ranks(), "context", "at least the " + std::to_string(ranks()) + " ranks",
                    options.context);
        else
            require(options.batch % ranks() == 0, "batch", "a multiple of the " + std::to_string(ranks()) + " ranks",
                    options.batch);
    }

    index ranks_of_sequences() const { return by_steps_ ? 1 : ranks(); }
    /// This process's [first,last) of `count` sequences side by side, and of their steps.
    std::pair<index, index> sequences(index count) const {
        return by_steps_ ? std::pair(index(0), count) : part(count);
    }
    std::pair<index, index> steps(index count) const { return by_steps_ ? part(count) : std::pair(index(0), count); }
    /// Whether each rank has a part of so many steps of a sequence.
    bool divides(index count) const { return !by_steps_ || count >= ranks(); }
    /// What evaluates the cells, where each rank has its part of the steps: for them together.
    Options evaluation(Options options, bool together = true) const {
        options.group = by_steps_ && together ? group() : nullptr;
        return options;
    }
    /// Parameters whose gradients the core sums over the ranks.
    std::vector<Tensor> complete(const LanguageModel& model) const {
        return by_steps_ ? model.recurrent_parameters() : std::vector<Tensor>();
    }

private:
    bool by_steps_;
};

OptimisationOptions optimisation_options(const LanguageTrainingOptions& options) {
    return {.learning_rate = options.learning_rate,
            .warm_up = options.warm_up,
            .steps = options.steps,
            .weight_decay = options.weight_decay,
            .gradient_clip = options.gradient_clip};
}

void check(const LanguageTrainingOptions& options) {
    require(options.context >= 1, "context", "at least 1", options.context);
    require(options.batch >= 1, "batch", "at least 1", options.batch);
    const index own = options.batch / LanguageShare(options).ranks_of_sequences();
    require(options.micro_batch >= 0 && (options.micro_batch == 0 || own % options.micro_batch == 0), "micro_batch",
            "a divisor of " + std::to_string(own) + ", a rank's sequences of a batch, or 0", options.micro_batch);
    require(std::isfinite(options.bound) && options.bound >= 0, "bound", "a finite number, at least 0", options.bound);
    require(std::isfinite(options.penalty) && options.penalty >= 0, "penalty", "a finite number, at least 0",
            options.penalty);
    if (options.penalty > 0 && options.share == Sharing::steps && LanguageShare(options).ranks() > 1)
        throw InvalidArgument("penalty", "0 where processes share the steps", std::to_string(options.penalty));
    require(std::isfinite(options.penalty_rate), "penalty_rate", "a finite number", options.penalty_rate);
    require(options.estimate_interval >= 0, "estimate_interval", "at least 0", options.estimate_interval);
    require(options.validation_interval >= 0, "validation_interval", "at least 0", options.validation_interval);
    require(options.validation_tokens >= 0, "validation_tokens", "at least 0", options.validation_tokens);
    require(options.checkpoint_interval >= 0, "checkpoint_interval", "at least 0", options.checkpoint_interval);
    require(options.evaluation.execution.threads >= 0, "threads", "at least 0", options.evaluation.execution.threads);
    check(optimisation_options(options));
}

// ------------------------------------------------------------------------------------------------- the data

/// The sequences of the training part in the order of the epochs.
class Order {
public:
    Order(const files::TokenFile& file, index context, std::uint64_t seed)
        : context_(context), seed_(seed), count_((file.counts().training - 1) / context) {
        if (count_ < 1)
            throw InvalidArgument("context",
                                  "less than the " + std::to_string(file.counts().training) + " tokens for training",
                                  std::to_string(context));
    }
    /// Where the sequence begins that is `number` of all epochs.
    index begin(index number) {
        if (const index epoch = number / count_; !order_.defined() || epoch != epoch_) {
            order_ = shuffled(count_, seed_, epoch);
            epoch_ = epoch;
        }
        return order_.data_ptr<std::int64_t>()[number % count_] * context_;
    }

private:
    index context_;
    std::uint64_t seed_;
    index count_, epoch_ = 0;
    Tensor order_;
};

LanguageValidation measure(LanguageModel& model, const files::TokenFile& file, index first, index count, index context,
                           index batch, at::Device device, const Options& evaluation, const LanguageShare& share,
                           const std::function<void(double)>& progress, const std::function<bool()>& interrupted) {
    const at::NoGradGuard no_gradients;
    const auto begin = Clock::now();
    LanguageValidation result;
    const index last = first + count - 1;  // the last token is only predicted
    for (index at = first; at < last && !share.any(interrupted && interrupted());) {
        const index steps = std::min(context, last - at);
        const index side_by_side = std::clamp<index>((last - at) / steps, 1, batch * share.ranks_of_sequences());
        const bool together = share.divides(steps);  // else each rank computes them all
        const auto [first_step, last_step] = together ? share.steps(steps) : std::pair(index(0), steps);
        const auto [first_sequence, last_sequence] = share.sequences(side_by_side);
        std::vector<index> begins;
        for (index i = first_sequence; i < last_sequence; ++i) begins.push_back(at + i * steps + first_step);
        if (!begins.empty()) {
            const index own_steps = last_step - first_step;
            const Tensor tokens = sequences(file, begins, own_steps + 1, device);
            model.set_evaluation(share.evaluation(evaluation, together));
            const double loss = model.loss(tokens).item<double>() * double(own_steps * index(begins.size()));
            result.loss += together || share.speaks() ? loss : 0;
        }
        at += steps * side_by_side;
        result.tokens += steps * side_by_side;
        if (progress) progress(double(result.tokens) / double(count - 1));
    }
    result.loss = share.sum(result.loss) / double(std::max<index>(1, result.tokens));
    result.perplexity = std::exp(result.loss);
    result.seconds = seconds_since(begin);
    return result;
}

// --------------------------------------------------------------------------------------------- the training

class Training : TrainingLoop<LanguageTrainingOptions, LanguageCallbacks, LanguageTraining, LanguageShare> {
public:
    Training(const LanguageTrainingOptions& options, const LanguageCallbacks& callbacks)
        : TrainingLoop(options, callbacks, LanguageShare(options)),
          device_(device_of(options.device, options.group)),
          file_(options.tokens),
          order_(file_, options.context, options.seed) {
        state_.options = options;
        state_.options.model.vocabulary = file_.counts().vocabulary_size;
        state_.options.model = completed(state_.options.model);
        state_.tokens_checksum = file_.counts().checksum;
        if (options.resume.empty()) {
            model_ = std::make_shared<LanguageModel>(state_.options.model);
        } else {
            State saved = from_saved(options.resume, load(format));
            check_continues(fixed_fields(state_), fixed_fields(saved));
            model_ = make_model(options.resume, saved.options.model, saved.tensors);
            saved.options = state_.options;
            state_ = std::move(saved);
        }
        state_.vocabulary = file_.vocabulary();
        model_->to(device_);
        model_->recompute = options.recompute;
        model_->bfloat16 = options.number == Number::bfloat16;
        if (options.penalty > 0 && model_->recurrent_parameters().empty())
            throw InvalidArgument("penalty", "0, as " + name_of(mixer_names, options.model.mixer) + " is no cell",
                                  std::to_string(options.penalty));
        optimisation_.emplace(parameter_groups(*model_), optimisation_options(options));
        if (share_.group() != nullptr) optimisation_->share(*share_.group(), share_.complete(*model_));
        optimisation_->restore(state_.updates, options.resume, state_.tensors);
        state_.tensors.clear();
    }

    LanguageTraining run() {
        start(model_->parameters());
        if (validation_is_due()) validate();  // an interrupt came before it
        while (state_.step < options_.steps && !result_.interrupted) {
            LanguageStep step = one_step();
            tell(step, options_.steps - state_.step);
            if (validation_is_due()) validate();
            if (due(options_.checkpoint_interval, state_.step) && state_.step < options_.steps) save();
        }
        save();
        if (!result_.interrupted) validate();
        std::vector<double> none, most = {double(peak_memory())};
        share_.reduce(none, most);
        result_.peak_memory = index(most[0]);
        return conclude();
    }

private:
    void save() {
        if (!saves()) return;
        optimisation_->save(state_.tensors);
        checkpoint_.save(to_saved(state_));
        state_.tensors.clear();
    }

    LanguageStep one_step() {
        const auto begin = Clock::now();
        LanguageStep record;
        record.step = state_.step + 1;
        record.steps = options_.steps;
        record.tokens = record.step * options_.batch * options_.context;
        record.learning_rate = optimisation_->learning_rate(state_.step);
        optimisation_->clear_gradients();
        model_->set_evaluation(evaluation(estimates_of(state_.step, options_.estimate_interval, device_)));
        const auto [first_step, last_step] = share_.steps(options_.context);
        const auto [first_sequence, last_sequence] = share_.sequences(options_.batch);
        const index steps = last_step - first_step, at_once = sequences_at_once();
        index cells = 0;
        model_->measure_growth(options_.penalty > 0 ? std::optional(options_.penalty_rate) : std::nullopt);
        for (index done = first_sequence; done < last_sequence && std::isfinite(record.loss); done += at_once) {
            std::vector<index> begins;
            for (index i = 0; i < at_once; ++i)
                begins.push_back(order_.begin(state_.step * options_.batch + done + i) + first_step);
            const double part = double(at_once * steps) / double(options_.batch * options_.context);
            const Tensor loss = model_->loss(sequences(file_, begins, steps + 1, device_)) * part;
            for (const Report* const report : model_->reports()) add(record, *report, cells++);
            record.loss += share_.sum(loss.item<double>());
            if (!std::isfinite(record.loss)) break;
            if (options_.penalty > 0) {
                const Tensor growth = model_->growth() * part;
                record.growth = (done > first_sequence ? record.growth : 0) + share_.sum(growth.item<double>());
                (loss + growth * options_.penalty).backward();
            } else {
                loss.backward();
            }
        }
        record.gradient_norm = optimisation_->step(state_.step, record.loss);
        record.skipped =
            !updated(record.loss, record.gradient_norm, "step " + std::to_string(record.step), options_.on_divergence);
        if (!record.skipped) {
            ++state_.updates;
            limit_parameters();
        }
        ++state_.step;
        gather(record, share_, share_.ranks() / share_.ranks_of_sequences());
        record.seconds = seconds_since(begin);
        record.tokens_per_second = double(options_.batch * options_.context) / record.seconds;
        return record;
    }

    index sequences_at_once() const {
        return options_.micro_batch > 0 ? options_.micro_batch : options_.batch / share_.ranks_of_sequences();
    }

    Options evaluation(Estimates estimates) const {
        Options evaluation = options_.evaluation;
        evaluation.estimates = estimates;
        return share_.evaluation(evaluation);
    }

    void limit_parameters() {
        if (options_.bound == 0) return;
        const at::NoGradGuard no_gradients;
        for (Tensor& parameters : model_->recurrent_parameters()) parameters.clamp_(-options_.bound, options_.bound);
    }

    /// The one after the last step comes when all is saved.
    bool validation_is_due() const {
        return due(options_.validation_interval, state_.step) && state_.validated < state_.step &&
               state_.step < options_.steps;
    }

    void validate() {
        const files::TokenCounts& counts = file_.counts();
        const index tokens = options_.validation_tokens > 0
                                 ? std::min(options_.validation_tokens + 1, counts.validation)
                                 : counts.validation;
        if (tokens < 2) return;
        model_->measure_growth(std::nullopt);
        LanguageValidation found =
            measure(*model_, file_, counts.training, tokens, options_.context, sequences_at_once(), device_,
                    evaluation(Estimates::none), share_, callbacks_.validating, callbacks_.interrupted);
        result_.interrupted = found.tokens < tokens - 1;
        if (result_.interrupted) return;
        found.step = state_.validated = state_.step;
        result_.validations.push_back(found);
        if (callbacks_.validation) callbacks_.validation(found);
    }

    at::Device device_;
    files::TokenFile file_;
    Order order_;
    State state_;
    std::shared_ptr<LanguageModel> model_;
    std::optional<Optimisation> optimisation_;
};

}  // namespace

LanguageTrainingOptions::LanguageTrainingOptions() : device("cpu") {
    evaluation.method = Method::shooting;
    evaluation.chunk = 64;
}

LanguageTraining train_language_model(const LanguageTrainingOptions& options, const LanguageCallbacks& callbacks) {
    check(options);
    set_threads(options.evaluation);
    return Training(options, callbacks).run();
}

bool is_language_model(const std::filesystem::path& checkpoint) { return format_of(checkpoint) == format; }

LanguageTrainingOptions language_options(const std::filesystem::path& checkpoint) {
    return from_saved(checkpoint, SavedStates(checkpoint).load(format, {})).options;
}

LanguageValidation validate_language_model(const std::filesystem::path& checkpoint,
                                           const LanguageValidationOptions& options) {
    require(options.batch >= 0, "batch", "at least 0", options.batch);
    require(options.at_most >= 0, "at_most", "at least 0", options.at_most);
    const at::Device device = device_of(options.device);
    set_threads(options.evaluation);
    const State state = from_saved(checkpoint, read_state(checkpoint, format));
    const files::TokenFile file(options.tokens.empty() ? state.options.tokens : options.tokens);
    if (file.vocabulary() != state.vocabulary || file.counts().vocabulary_size != state.options.model.vocabulary)
        throw InvalidArgument("tokens", "the vocabulary of the checkpoint, " + Vocabulary(state.vocabulary).name(),
                              Vocabulary(file.vocabulary()).name());
    const auto model = make_model(checkpoint, state.options.model, state.tensors);
    model->bfloat16 = state.options.number == Number::bfloat16;
    model->to(device);
    const index first = options.whole ? 0 : file.counts().training;
    index tokens = file.tokens() - first;
    if (options.at_most > 0) tokens = std::min(tokens, options.at_most + 1);
    if (tokens < 2) throw InvalidArgument("tokens", "a file with at least 2 for validation", std::to_string(tokens));
    LanguageValidation result = measure(
        *model, file, first, tokens, state.options.context, options.batch > 0 ? options.batch : state.options.batch,
        device, options.evaluation, LanguageShare(state.options), options.progress, options.interrupted);
    result.step = state.step;
    return result;
}

// ----------------------------------------------------------------------------------------------- generation

namespace {

/// Draws tokens by their logits.
class Sampler {
public:
    explicit Sampler(const TextOptions& options) : options_(options), random_(options.seed) {
        require(options.tokens >= 0, "tokens", "at least 0", options.tokens);
        require(std::isfinite(options.temperature) && options.temperature >= 0, "temperature",
                "a finite number, at least 0", options.temperature);
        require(options.top_k >= 0, "top_k", "at least 0", options.top_k);
        require(options.top_p > 0 && options.top_p <= 1, "top_p", "above 0 to 1", options.top_p);
    }

    /// logits: [vocabulary], float.
    index draw(const Tensor& logits) {
        const Tensor numbers = logits.cpu().contiguous();
        const float* const values = numbers.data_ptr<float>();
        const index count = numbers.numel();
        const index likeliest = std::max_element(values, values + count) - values;
        if (!std::isfinite(values[likeliest])) throw NotConverged("the logits of the next token are not finite");
        if (options_.temperature == 0) return likeliest;
        tokens_.resize(std::size_t(count));
        std::iota(tokens_.begin(), tokens_.end(), index(0));
        index kept = count;
        if (options_.top_k > 0 || options_.top_p < 1) {
            if (options_.top_k > 0) kept = std::min(kept, options_.top_k);
            std::partial_sort(tokens_.begin(), tokens_.begin() + kept, tokens_.end(),
                              [&](index a, index b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
        }
        sums_.resize(std::size_t(kept));
        double sum = 0;
        for (std::size_t i = 0; i < sums_.size(); ++i)
            sums_[i] = sum += std::exp(double(values[tokens_[i]] - values[likeliest]) / options_.temperature);
        const auto end = std::lower_bound(sums_.begin(), sums_.end(), options_.top_p * sum);
        const double all = end == sums_.end() ? sum : *end;
        const double drawn = double(random_() >> 11) * 0x1p-53 * all;  // [0, all)
        const auto found = std::upper_bound(sums_.begin(), sums_.end(), drawn);
        return tokens_[std::size_t(std::min(found, sums_.end() - 1) - sums_.begin())];
    }

private:
    const TextOptions& options_;
    std::mt19937_64 random_;
    std::vector<index> tokens_;
    std::vector<double> sums_;
};

/// Seconds per token at some positions, from the times of the last tokens.
class Pacer {
public:
    void add(GeneratedText& result, double seconds) {
        last_.push_back(seconds);
        if (last_.size() > 100) last_.pop_front();
        if (result.tokens < next_) return;
        keep(result);
        next_ *= 10;
    }
    void keep(GeneratedText& result) const {
        if (last_.empty() || (!result.paces.empty() && result.paces.back().position == result.tokens)) return;
        std::vector<double> sorted(last_.begin(), last_.end());
        std::nth_element(sorted.begin(), sorted.begin() + index(sorted.size() / 2), sorted.end());
        result.paces.push_back({result.tokens, sorted[sorted.size() / 2]});
    }

private:
    std::deque<double> last_;
    index next_ = 100;
};

}  // namespace

struct TextGenerator::Implementation {
    Implementation(const std::filesystem::path& checkpoint, const std::string& device_name)
        : device(device_of(device_name)) {
        const State state = from_saved(checkpoint, read_state(checkpoint, format));
        try {
            vocabulary = Vocabulary(state.vocabulary);
        } catch (const InvalidArgument& problem) {
            throw FileError(checkpoint, problem.what());
        }
        if (vocabulary.size() != state.options.model.vocabulary)
            throw FileError(checkpoint, std::to_string(state.options.model.vocabulary) + " tokens in the vocabulary",
                            std::to_string(vocabulary.size()));
        set_threads(state.options.evaluation);
        model = make_model(checkpoint, state.options.model, state.tensors);
        model->to(device);
        model->eval();
        evaluation = state.options.evaluation;
        evaluation.estimates = Estimates::none;
    }

    Tensor logits(const std::vector<std::int64_t>& tokens, LanguageModel::State& state) const {
        const Tensor all = model->forward(at::tensor(tokens, at::kLong).unsqueeze(1).to(device), &state);
        return all[index(tokens.size()) - 1][0];
    }

    at::Device device;
    Vocabulary vocabulary;
    std::shared_ptr<LanguageModel> model;
    Options evaluation;
};

TextGenerator::TextGenerator(const std::filesystem::path& checkpoint, const std::string& device)
    : implementation_(std::make_unique<Implementation>(checkpoint, device)) {}
TextGenerator::~TextGenerator() = default;
TextGenerator::TextGenerator(TextGenerator&&) noexcept = default;

GeneratedText TextGenerator::generate(const TextOptions& options) const {
    const at::NoGradGuard no_gradients;
    const Implementation& it = *implementation_;
    Sampler sampler(options);
    const auto encoded = it.vocabulary.encode(options.prompt.empty() ? "\n" : options.prompt);
    if (encoded.empty()) throw InvalidArgument("prompt", "text with at least one token", options.prompt);
    GeneratedText result;
    result.prompt_tokens = index(encoded.size());
    auto begin = Clock::now();
    LanguageModel::State state;
    it.model->set_evaluation(it.evaluation);
    Tensor logits = it.logits({encoded.begin(), encoded.end()}, state);
    result.prompt_seconds = seconds_since(begin);

    Options one_step = it.evaluation;
    one_step.method = Method::sequential;
    one_step.execution.threads = 1;
    it.model->set_evaluation(one_step);
    begin = Clock::now();
    Pacer pacer;
    while (result.tokens < options.tokens && !result.interrupted) {
        const auto token_begin = Clock::now();
        const index token = sampler.draw(logits);
        const std::string piece = it.vocabulary.text(token);
        result.text += piece;
        if (options.write) options.write(piece);
        if (++result.tokens < options.tokens) logits = it.logits({token}, state);
        pacer.add(result, seconds_since(token_begin));
        result.interrupted = options.interrupted && options.interrupted();
    }
    pacer.keep(result);
    result.seconds = seconds_since(begin);
    for (const MixerState& mixer : state)
        for (const Tensor& tensor : mixer) result.state_bytes += tensor.numel() * index(tensor.element_size());
    return result;
}

}  // namespace deeppcr::nn
