// Tasks that show what a model of sequences can remember and compute: parity, recall of pairs, k-hop induction. Their
// data, made from a seed, and the training of a LanguageModel on them. No LibTorch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <deeppcr/array.hpp>
#include <deeppcr/nn/language_model.hpp>

namespace deeppcr::nn {

// ------------------------------------------------------------------------------------------------- the data

/// parity: tokens are bits; the answer at each step is whether the ones so far are odd in number.
/// recall: multi-query associative recall (arXiv 2312.04927): `pairs` pairs of a key and its value, keys different,
/// then
///     keys among them in any order; the answer at each of these steps is the key's value.
/// hops: k-hop induction (arXiv 2402.09268, section 4): tokens x_1, x_2, .. are drawn from `symbols`; find(i) is the
/// last
///     j <= i with x_{j-1} = x_i; the answer at step i is x at find(find(..(i))), `hops` times, or a token of its own
///     where there is no such place. hops = 1 is the induction head.
enum class SequenceTask { parity, recall, hops };

inline constexpr Names<SequenceTask, 3> sequence_task_names{
    {{"parity", SequenceTask::parity}, {"recall", SequenceTask::recall}, {"hops", SequenceTask::hops}}};

struct SequenceTaskOptions {
    SequenceTask task = SequenceTask::parity;
    index length = 100;  ///< steps of a sequence
    /// Of recall: shorter sequences, of the beginning of a training, have at most a pair for each 12 steps.
    index pairs = 4;
    index keys = 4, values = 4;   ///< of recall: so many different ones
    index hops = 2, symbols = 4;  ///< of hops
};

/// Numbers of different tokens, which are also the answers. Throws InvalidArgument for options that cannot be.
index vocabulary_of(const SequenceTaskOptions& options);

/// `batch` sequences side by side.
struct SequenceTaskBatch {
    static constexpr std::int64_t no_answer = -100;  ///< what LibTorch's losses leave out

    index length = 0, batch = 0;
    std::vector<std::int64_t> tokens, answers;  ///< [length,batch], contiguous
};

/// The sequences first, first + 1, .. of all that there are by this seed, of `length` steps. Each is drawn by its
/// number and the seed alone, and is the same on any machine. Throws InvalidArgument.
SequenceTaskBatch make_batch(const SequenceTaskOptions& options, index length, index batch, std::uint64_t seed,
                             std::uint64_t first);

// ---------------------------------------------------------------------------------------------- the training

struct TaskTrainingOptions {
    TaskTrainingOptions();

    SequenceTaskOptions task;
    LanguageModelOptions model;  ///< `vocabulary` is the task's
    Options evaluation;          ///< of the cells; as in LanguageTrainingOptions
    std::string device;          ///< "cpu", "cuda" or "cuda:<number>"
    Group* group = nullptr;      ///< as in LanguageTrainingOptions, with shares of the sequences

    /// The cells' recurrent parameters are initially so many times those of the modules, which have a standard
    /// deviation of 1/2: a state that a one turns over, as parity asks for, needs some of more than 1 in size.
    double recurrent_scale = 3;
    index batch = 32;  ///< sequences per step, drawn anew for each; of shorter ones more, up to four times as many
    index steps = 2000;
    /// Sequences have this length at first. They get longer, by an eighth and a step, whenever the mean accuracy of the
    /// last steps (the last counts 1/5, the one before it 4/25, ..) is 90 %, up to task.length, which they have in any
    /// case after the part `growth` of all steps. 0: task.length from the beginning.
    index first_length = 4;
    double growth = 0.5;
    double learning_rate = 3e-3;   ///< at its highest
    index warm_up = 50;            ///< steps of linear growth; a cosine leads from there to 0
    double weight_decay = 0;       ///< of matrices
    double gradient_clip = 1;      ///< the norm of all gradients is limited to this; 0: not
    index estimate_interval = 10;  ///< as in LanguageTrainingOptions
    OnDivergence on_divergence = OnDivergence::stop;
    std::uint64_t seed = 1;  ///< of the training data; model.seed: of the weights

    index validation_interval = 100;   ///< steps between validations, besides the end; 0: none
    index validation_sequences = 500;  ///< of task.length, the same for all seeds and trainings
    /// The training ends after a validation of at least this accuracy, as a fraction; 0: not before the last step.
    double enough = 0;

    /// As in LanguageTrainingOptions.
    std::filesystem::path checkpoint;
    index checkpoint_interval = 0;
    std::filesystem::path resume;
};

struct TaskStep : NewtonFigures {
    index step = 0, steps = 0;  ///< 1..steps
    index length = 0;           ///< of this step's sequences
    double loss = 0;            ///< nats per answer, of this step's batch before the update
    double accuracy = 0;        ///< of its answers, the part that is right
    double learning_rate = 0, gradient_norm = 0;
    bool skipped = false;  ///< as the loss or gradient was not finite
    double seconds = 0;
    double elapsed = 0, remaining = 0;  ///< of the training (remaining: estimated)
};

struct TaskValidation {
    index step = 0;     ///< after which it was
    index answers = 0;  ///< that were asked for, in `sequences` sequences
    index sequences = 0;
    double loss = 0;           ///< nats per answer
    double accuracy = 0;       ///< of all answers
    double last_accuracy = 0;  ///< of each sequence's last answer
    NewtonFigures newton;
    double seconds = 0;
};

struct TaskTraining {
    std::vector<TaskStep> steps;              ///< of this call
    std::vector<TaskValidation> validations;  ///< the last one is of the end
    bool interrupted = false;
    index parameters = 0;
    double seconds = 0;
};

struct TaskCallbacks {
    std::function<void(const TaskStep&)> step = {};
    std::function<void(const TaskValidation&)> validation = {};
    /// What a person should know: a damaged checkpoint whose predecessor is used, a step that was skipped.
    std::function<void(const std::string&)> note = {};
    /// Asked after every step; true ends the training with its checkpoint saved.
    std::function<bool()> interrupted = {};
};

/// Trains by AdamW; the loss is of the steps that have an answer. Deterministic as `train_language_model`; throws as it
/// does.
TaskTraining train_task(const TaskTrainingOptions& options, const TaskCallbacks& callbacks = {});

/// Whether a file is a checkpoint of `train_task`. Throws FileError where it cannot be read.
bool is_task(const std::filesystem::path& checkpoint);

/// The options that a checkpoint was written with; of a damaged one those of its predecessor. Throws FileError.
TaskTrainingOptions task_options(const std::filesystem::path& checkpoint);

struct TaskValidationOptions {
    index length = 0;     ///< of the sequences; 0: as in the training
    index sequences = 0;  ///< 0: as in the training
    index batch = 0;      ///< sequences at once; 0: as in the training
    std::string device = "cpu";
    Options evaluation = {};
};

/// On the sequences that the training kept for validation, or others of another length. Throws InvalidArgument,
/// FileError, NoDevice.
TaskValidation validate_task(const std::filesystem::path& checkpoint, const TaskValidationOptions& options);

}  // namespace deeppcr::nn
