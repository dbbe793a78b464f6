#include <deeppcr/nn/tasks.hpp>

#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "nn/device_scope.hpp"
#include "nn/language_model.hpp"
#include "nn/threads.hpp"
#include "nn/training_loop.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

const std::string format = "deeppcr task 1";

// ------------------------------------------------------------------------------------------------- the data

/// Numbers that are the same on every machine, which the standard's distributions do not promise.
class Random {
public:
    Random(std::uint64_t seed, std::uint64_t number) {
        std::seed_seq words = seeds(seed, number);
        engine_.seed(words);
    }
    /// 0..count-1. The bias, count / 2^64, is not one that could be seen.
    index below(index count) { return index(engine_() % std::uint64_t(count)); }

private:
    std::mt19937_64 engine_;
};

/// One sequence of a batch.
struct Column {
    std::int64_t *tokens, *answers;
    index length, stride;
    std::int64_t& token(index step) const { return tokens[step * stride]; }
    std::int64_t& answer(index step) const { return answers[step * stride]; }
};

void fill_parity(const Column& column, Random& random) {
    std::int64_t odd = 0;
    for (index step = 0; step < column.length; ++step) {
        const index bit = random.below(2);
        column.token(step) = bit;
        column.answer(step) = odd ^= bit;
    }
}

void fill_recall(const SequenceTaskOptions& options, const Column& column, Random& random) {
    const index pairs = std::clamp<index>(column.length / 12, 1, options.pairs);
    std::vector<std::int64_t> keys(static_cast<std::size_t>(options.keys)), values;
    std::iota(keys.begin(), keys.end(), 0);
    for (index pair = 0; pair < pairs; ++pair) {
        std::swap(keys[std::size_t(pair)], keys[std::size_t(pair + random.below(options.keys - pair))]);
        values.push_back(options.keys + random.below(options.values));
        column.token(2 * pair) = keys[std::size_t(pair)];
        column.token(2 * pair + 1) = values.back();
    }
    for (index step = 2 * pairs; step < column.length; ++step) {
        const auto pair = std::size_t(random.below(pairs));
        column.token(step) = keys[pair];
        column.answer(step) = values[pair];
    }
}

void fill_hops(const SequenceTaskOptions& options, const Column& column, Random& random) {
    std::vector<index> after(std::size_t(options.symbols), -1);  // where the last occurrence of a symbol ended
    std::vector<index> found;                                    // of each step
    for (index step = 0; step < column.length; ++step) {
        column.token(step) = random.below(options.symbols);
        if (step > 0) after[std::size_t(column.token(step - 1))] = step;
        found.push_back(after[std::size_t(column.token(step))]);
        index place = step;
        for (index hop = 0; hop < options.hops && place >= 0; ++hop) place = found[std::size_t(place)];
        column.answer(step) = place >= 0 ? column.token(place) : options.symbols;
    }
}

/// Of the sequences for validation, and the first one's number; a training counts its sequences from 0.
constexpr std::uint64_t validation_seed = 1, validation_first = std::uint64_t(1) << 63;

/// A sequence has an answer.
index least_length(SequenceTask task) { return task == SequenceTask::recall ? 3 : 1; }

}  // namespace

index vocabulary_of(const SequenceTaskOptions& options) {
    constexpr index most = 1 << 20;
    switch (options.task) {
        case SequenceTask::parity:
            return 2;
        case SequenceTask::recall:
            require(options.keys >= 1 && options.keys <= most, "keys", "1 to 2^20", options.keys);
            require(options.values >= 1 && options.values <= most, "values", "1 to 2^20", options.values);
            require(options.pairs >= 1 && options.pairs <= options.keys, "pairs",
                    "1 to keys = " + std::to_string(options.keys), options.pairs);
            require(options.length > 2 * options.pairs, "length",
                    "above 2 pairs = " + std::to_string(2 * options.pairs) + " steps", options.length);
            return options.keys + options.values;
        case SequenceTask::hops:
            require(options.hops >= 1, "hops", "at least 1", options.hops);
            require(options.symbols >= 1 && options.symbols <= most, "symbols", "1 to 2^20", options.symbols);
            return options.symbols + 1;
    }
    throw InvalidArgument("task", "one of SequenceTask", std::to_string(int(options.task)));
}

SequenceTaskBatch make_batch(const SequenceTaskOptions& options, index length, index batch, std::uint64_t seed,
                             std::uint64_t first) {
    vocabulary_of(options);
    const index least = least_length(options.task);
    require(length >= least, "length", "at least " + std::to_string(least), length);
    require(batch >= 1, "batch", "at least 1", batch);
    SequenceTaskBatch result{length, batch, {}, {}};
    result.tokens.assign(std::size_t(length * batch), 0);
    result.answers.assign(std::size_t(length * batch), SequenceTaskBatch::no_answer);
    for (index i = 0; i < batch; ++i) {
        Random random(seed, first + std::uint64_t(i));
        const Column column{result.tokens.data() + i, result.answers.data() + i, length, batch};
        if (options.task == SequenceTask::parity)
            fill_parity(column, random);
        else if (options.task == SequenceTask::recall)
            fill_recall(options, column, random);
        else
            fill_hops(options, column, random);
    }
    return result;
}

// ------------------------------------------------------------------------------------------- the checkpoint

namespace {

struct State {
    TaskTrainingOptions options;
    index step = 0, updates = 0;  // done; a step that was skipped is no update
    index length = 0;             // of the next step's sequences
    index sequences = 0;          // drawn
    double recent_accuracy = 0;
    index validated = 0;  // after so many steps for the last time
    double validation_accuracy = 0;
    SavedTensors tensors;
};

/// What a resumed training must have in common with its checkpoint.
template <class S, class Visit>
void visit_fixed_fields(S& state, const Visit& visit) {
    auto& task = state.options.task;
    visit("task", task.task, sequence_task_names);
    visit("length", task.length);
    visit("pairs", task.pairs);
    visit("keys", task.keys);
    visit("values", task.values);
    visit("hops", task.hops);
    visit("symbols", task.symbols);
    visit_model(state.options.model, visit);
    auto& options = state.options;
    visit("recurrent_scale", options.recurrent_scale);
    visit("batch", options.batch);
    visit("steps", options.steps);
    visit("first_length", options.first_length);
    visit("growth", options.growth);
    visit("learning_rate", options.learning_rate);
    visit("warm_up", options.warm_up);
    visit("weight_decay", options.weight_decay);
    visit("gradient_clip", options.gradient_clip);
    visit("seed", options.seed);
}

template <class S, class Visit>
void visit_fields(S& state, const Visit& visit) {
    visit("step", state.step);
    visit("updates", state.updates);
    visit("next_length", state.length);
    visit("sequences", state.sequences);
    visit("recent_accuracy", state.recent_accuracy);
    visit("validated", state.validated);
    visit("validation_accuracy", state.validation_accuracy);
    visit_fixed_fields(state, visit);
    auto& options = state.options;
    visit("estimate_interval", options.estimate_interval);
    visit("on_divergence", options.on_divergence, on_divergence_names);
    visit("validation_interval", options.validation_interval);
    visit("validation_sequences", options.validation_sequences);
    visit("enough", options.enough);
    visit("checkpoint_interval", options.checkpoint_interval);
    visit_evaluation(options.evaluation, cell_method_names, visit);
}

Metadata fixed_fields(const State& state) {
    Metadata fields;
    visit_fixed_fields(state, put_into(fields));
    return fields;
}

SavedState to_saved(const State& state) {
    SavedState saved{{{"format", format}}, state.tensors};
    visit_fields(state, put_into(saved.metadata));
    return saved;
}

/// Throws InvalidArgument for what cannot be.
void check(const TaskTrainingOptions& options);

State from_saved(const std::filesystem::path& path, SavedState saved) {
    State state;
    saved.metadata.try_emplace("validated", "0");  // checkpoints of earlier versions have none of them
    saved.metadata.try_emplace("validation_accuracy", "0");
    visit_fields(state, get_from(path, saved.metadata));
    try {
        check(state.options);
        if (const index vocabulary = vocabulary_of(state.options.task); vocabulary != state.options.model.vocabulary)
            throw InvalidArgument("vocabulary", std::to_string(vocabulary),
                                  std::to_string(state.options.model.vocabulary));
    } catch (const InvalidArgument& problem) {
        throw FileError(path, problem.what());
    }
    if (state.updates < 0 || state.updates > state.step || state.step > state.options.steps)
        throw FileError(path, "counts of steps as metadata \"step\" and \"updates\"",
                        std::to_string(state.step) + " and " + std::to_string(state.updates));
    if (state.validated < 0 || state.validated > state.step)
        throw FileError(path, "0 to " + std::to_string(state.step) + " as metadata \"validated\"",
                        std::to_string(state.validated));
    if (state.sequences < 0)
        throw FileError(path, "at least 0 as metadata \"sequences\"", std::to_string(state.sequences));
    if (state.length < least_length(state.options.task.task) || state.length > state.options.task.length)
        throw FileError(
            path, "a length of at most " + std::to_string(state.options.task.length) + " as metadata \"next_length\"",
            std::to_string(state.length));
    state.tensors = std::move(saved.tensors);
    return state;
}

// ---------------------------------------------------------------------------------------------- the options

OptimisationOptions optimisation_options(const TaskTrainingOptions& options) {
    return {.learning_rate = options.learning_rate,
            .warm_up = options.warm_up,
            .steps = options.steps,
            .weight_decay = options.weight_decay,
            .gradient_clip = options.gradient_clip};
}

void check(const TaskTrainingOptions& options) {
    vocabulary_of(options.task);
    const index least = least_length(options.task.task), length = options.task.length;
    require(length >= least, "length", "at least " + std::to_string(least), length);
    require(options.first_length == 0 || (options.first_length >= least && options.first_length <= length),
            "first_length", std::to_string(least) + " to length = " + std::to_string(length) + ", or 0",
            options.first_length);
    require(options.growth >= 0 && options.growth <= 1, "growth", "0 to 1", options.growth);
    require(options.enough >= 0 && options.enough <= 1, "enough", "0 to 1", options.enough);
    require(std::isfinite(options.recurrent_scale) && options.recurrent_scale >= 0, "recurrent_scale",
            "a finite number, at least 0", options.recurrent_scale);
    require(options.batch >= 1, "batch", "at least 1", options.batch);
    const index ranks = Share(options.group).ranks();
    require(options.batch % ranks == 0, "batch", "a multiple of the " + std::to_string(ranks) + " ranks",
            options.batch);
    require(options.estimate_interval >= 0, "estimate_interval", "at least 0", options.estimate_interval);
    require(options.validation_interval >= 0, "validation_interval", "at least 0", options.validation_interval);
    require(options.validation_sequences >= 1, "validation_sequences", "at least 1", options.validation_sequences);
    require(options.checkpoint_interval >= 0, "checkpoint_interval", "at least 0", options.checkpoint_interval);
    require(options.evaluation.execution.threads >= 0, "threads", "at least 0", options.evaluation.execution.threads);
    check(optimisation_options(options));
}

// ------------------------------------------------------------------------------------------------ measuring

struct Answered {
    Tensor loss;  ///< the mean over the answers, nats
    index answers = 0, right = 0, last_right = 0;
};

Answered answer(LanguageModel& model, const SequenceTaskBatch& batch, at::Device device) {
    const auto tensor = [&](const std::vector<std::int64_t>& numbers) {
        return at::tensor(numbers, at::kLong).view({batch.length, batch.batch}).to(device);
    };
    const Tensor answers = tensor(batch.answers), logits = model.forward(tensor(batch.tokens));
    const Tensor right = logits.detach().argmax(2).eq(answers);
    const auto count = [](const Tensor& marks) { return marks.sum().item<index>(); };
    return {at::cross_entropy_loss(logits.view({-1, logits.size(2)}), answers.view({-1}), {}, at::Reduction::Mean,
                                   SequenceTaskBatch::no_answer),
            count(answers.ne(SequenceTaskBatch::no_answer)), count(right), count(right[batch.length - 1])};
}

/// Of the validation's sequences, in pieces of `at_once`.
TaskValidation measure(LanguageModel& model, const SequenceTaskOptions& task, index length, index sequences,
                       index at_once, at::Device device) {
    const at::NoGradGuard no_gradients;
    const auto begin = Clock::now();
    TaskValidation result;
    double right = 0, last_right = 0;
    index cells = 0;
    while (result.sequences < sequences) {
        const index count = std::min(at_once, sequences - result.sequences);
        const auto batch =
            make_batch(task, length, count, validation_seed, validation_first + std::uint64_t(result.sequences));
        const Answered found = answer(model, batch, device);
        for (const Report* const report : model.reports()) add(result.newton, *report, cells++);
        result.loss += found.loss.item<double>() * double(found.answers);
        right += double(found.right);
        last_right += double(found.last_right);
        result.answers += found.answers;
        result.sequences += count;
    }
    result.loss /= double(result.answers);
    result.accuracy = right / double(result.answers);
    result.last_accuracy = last_right / double(result.sequences);
    result.seconds = seconds_since(begin);
    return result;
}

// --------------------------------------------------------------------------------------------- the training

class Training : TrainingLoop<TaskTrainingOptions, TaskCallbacks, TaskTraining> {
public:
    Training(const TaskTrainingOptions& options, const TaskCallbacks& callbacks)
        : TrainingLoop(options, callbacks, Share(options.group)), device_(device_of(options.device, options.group)) {
        state_.options = options;
        state_.options.model.vocabulary = vocabulary_of(options.task);
        state_.options.model = completed(state_.options.model);
        state_.length = options.first_length > 0 ? options.first_length : options.task.length;
        if (options.resume.empty()) {
            model_ = std::make_shared<LanguageModel>(state_.options.model);
            const at::NoGradGuard no_gradients;
            for (Tensor& parameters : model_->recurrent_parameters()) parameters.mul_(options.recurrent_scale);
        } else {
            State saved = from_saved(options.resume, load(format));
            check_continues(fixed_fields(state_), fixed_fields(saved));
            model_ = make_model(options.resume, saved.options.model, saved.tensors);
            saved.options = state_.options;
            state_ = std::move(saved);
        }
        model_->to(device_);
        optimisation_.emplace(parameter_groups(*model_), optimisation_options(options));
        if (share_.group() != nullptr) optimisation_->share(*share_.group());
        optimisation_->restore(state_.updates, options.resume, state_.tensors);
        state_.tensors.clear();
    }

    TaskTraining run() {
        start(model_->parameters());
        if (validation_is_due()) validate();  // an interrupt came before it
        while (state_.step < options_.steps && !result_.interrupted && !enough()) {
            TaskStep step = one_step();
            tell(step, options_.steps - state_.step);
            if (validation_is_due()) validate();
            if (due(options_.checkpoint_interval, state_.step) && state_.step < options_.steps) save();
        }
        const bool told = !result_.validations.empty() && result_.validations.back().step == state_.step;
        if (!result_.interrupted && !told) validate();
        save();
        return conclude();
    }

private:
    void save() {
        if (!saves()) return;
        optimisation_->save(state_.tensors);
        checkpoint_.save(to_saved(state_));
        state_.tensors.clear();
    }

    TaskStep one_step() {
        const auto begin = Clock::now();
        if (double(state_.step) >= options_.growth * double(options_.steps)) state_.length = options_.task.length;
        TaskStep record;
        record.step = state_.step + 1;
        record.steps = options_.steps;
        record.length = state_.length;
        record.learning_rate = optimisation_->learning_rate(state_.step);
        optimisation_->clear_gradients();
        set_estimates(estimates_of(state_.step, options_.estimate_interval, device_));
        // Of shorter sequences more, as they have fewer answers.
        const index count = options_.batch * std::clamp<index>(options_.task.length / state_.length, 1, 4);
        const auto [first, last] = share_.part(count);
        const auto batch = make_batch(options_.task, state_.length, last - first, options_.seed,
                                      std::uint64_t(state_.sequences + first));
        state_.sequences += count;
        const Answered found = answer(*model_, batch, device_);
        index cells = 0;
        for (const Report* const report : model_->reports()) add(record, *report, cells++);
        // All sequences of a batch have as many answers, and all ranks as many sequences.
        const Tensor loss = found.loss / double(share_.ranks());
        record.loss = share_.sum(loss.item<double>());
        record.accuracy = share_.sum(double(found.right)) / share_.sum(double(found.answers));
        if (std::isfinite(record.loss)) loss.backward();
        record.gradient_norm = optimisation_->step(state_.step, record.loss);
        record.skipped =
            !updated(record.loss, record.gradient_norm, "step " + std::to_string(record.step), options_.on_divergence);
        if (!record.skipped) {
            ++state_.updates;
            lengthen(record.accuracy);
        }
        ++state_.step;
        gather(record, share_);
        record.seconds = seconds_since(begin);
        return record;
    }

    /// Longer sequences once these are answered.
    void lengthen(double accuracy) {
        state_.recent_accuracy += (accuracy - state_.recent_accuracy) / 5;
        if (state_.recent_accuracy < 0.9) return;
        state_.length = std::min(options_.task.length, state_.length + 1 + state_.length / 8);
        state_.recent_accuracy = 0.7;
    }

    void set_estimates(Estimates estimates) {
        Options evaluation = options_.evaluation;
        evaluation.estimates = estimates;
        model_->set_evaluation(evaluation);
    }

    bool enough() const {
        return options_.enough > 0 && state_.validated == state_.step && state_.validation_accuracy >= options_.enough;
    }

    bool validation_is_due() const {
        return due(options_.validation_interval, state_.step) && state_.validated < state_.step;
    }

    void validate() {
        set_estimates(estimates_of(0, 1, device_));
        TaskValidation found = measure(*model_, options_.task, options_.task.length, options_.validation_sequences,
                                       options_.batch, device_);
        found.step = state_.validated = state_.step;
        state_.validation_accuracy = found.accuracy;
        result_.validations.push_back(found);
        if (callbacks_.validation) callbacks_.validation(found);
    }

    at::Device device_;
    State state_;
    std::shared_ptr<LanguageModel> model_;
    std::optional<Optimisation> optimisation_;
};

}  // namespace

TaskTrainingOptions::TaskTrainingOptions() : device("cpu") {
    model.width = 64;
    model.layers = 2;
    evaluation.method = Method::shooting;
    evaluation.chunk = 16;
}

TaskTraining train_task(const TaskTrainingOptions& options, const TaskCallbacks& callbacks) {
    check(options);
    set_threads(options.evaluation);
    return Training(options, callbacks).run();
}

bool is_task(const std::filesystem::path& checkpoint) { return format_of(checkpoint) == format; }

TaskTrainingOptions task_options(const std::filesystem::path& checkpoint) {
    return from_saved(checkpoint, SavedStates(checkpoint).load(format, {})).options;
}

TaskValidation validate_task(const std::filesystem::path& checkpoint, const TaskValidationOptions& options) {
    require(options.length >= 0, "length", "at least 0", options.length);
    require(options.sequences >= 0, "sequences", "at least 0", options.sequences);
    require(options.batch >= 0, "batch", "at least 0", options.batch);
    const at::Device device = device_of(options.device);
    set_threads(options.evaluation);
    const State state = from_saved(checkpoint, read_state(checkpoint, format));
    const TaskTrainingOptions& trained = state.options;
    const auto model = make_model(checkpoint, trained.model, state.tensors);
    model->to(device);
    Options evaluation = options.evaluation;
    evaluation.estimates = estimates_of(0, 1, device);
    model->set_evaluation(evaluation);
    const auto chosen = [](index given, index usual) { return given > 0 ? given : usual; };
    TaskValidation result =
        measure(*model, trained.task, chosen(options.length, trained.task.length),
                chosen(options.sequences, trained.validation_sequences), chosen(options.batch, trained.batch), device);
    result.step = state.step;
    return result;
}

}  // namespace deeppcr::nn
