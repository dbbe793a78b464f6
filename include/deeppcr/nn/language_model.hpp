// Language models whose blocks mix over time by a recurrence: what they are, how many parameters, bytes and operations
// they take, their training, validation and generation of text. No LibTorch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <deeppcr/error.hpp>
#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/names.hpp>

namespace deeppcr::nn {

// ------------------------------------------------------------------------------------------------- the model

/// What mixes the steps of a block: a cell of this library, or one of three to compare with: a linear recurrence
/// h' = a h + sqrt(1 - a^2) u per channel, 0 < a < 1 (computed as a convolution by LibTorch's FFT), LibTorch's LSTM,
/// and causal attention with rotary positions (RoFormer, arXiv 2104.09864).
enum class Mixer { para_gru, para_lstm, slstm, linear, lstm, attention };

inline constexpr Names<Mixer, 6> mixer_names{{{"para_gru", Mixer::para_gru},
                                              {"para_lstm", Mixer::para_lstm},
                                              {"slstm", Mixer::slstm},
                                              {"linear", Mixer::linear},
                                              {"lstm", Mixer::lstm},
                                              {"attention", Mixer::attention}}};

/// Tokens are embedded, pass `layers` blocks and a last RMSNorm, and become logits. A block, with RMSNorm n() and
/// Hadamard product *:
///     x <- x + O (mix(n(x)) * silu(G n(x)))         no gate G for lstm and attention
///     x <- x + D (silu(U n(x)) * (V n(x)))          a gated MLP of `mlp` channels (SwiGLU, arXiv 2002.05202)
/// after ParaRNN, arXiv 2510.21450.
struct LanguageModelOptions {
    Mixer mixer = Mixer::para_gru;
    index vocabulary = 256;
    index width = 128, layers = 4;
    index hidden = 0;  ///< channels of the mixer; 0: width
    /// Of a cell: its projection is block diagonal, in so many blocks; of attention: its heads. 0: 1, and of attention
    /// one for each 64 channels.
    index heads = 0;
    /// 0: so that the block has as many parameters as one of ParaGRU (hidden = width, 1 head) with an MLP of
    /// 8/3 width, rounded up to a multiple of 8.
    index mlp = 0;
    bool tied = true;  ///< logits are products with the embedding, instead of a matrix of their own
    std::uint64_t seed = 1;
};

/// The same, with numbers for zeros. Throws InvalidArgument for what cannot be.
LanguageModelOptions completed(LanguageModelOptions options);

/// Named sizes, from 1M to 7B parameters.
struct LanguageConfiguration {
    const char* name;
    index width, layers;
};
inline constexpr LanguageConfiguration language_configurations[] = {
    {"1M", 128, 4},     {"4M", 256, 5},   {"16M", 384, 8},  {"50M", 640, 10}, {"125M", 768, 16},
    {"400M", 1280, 18}, {"1B", 2048, 18}, {"3B", 3072, 24}, {"7B", 4096, 32},
};

// -------------------------------------------------------------------------------------------------- the plan

struct LanguagePlanOptions {
    LanguageModelOptions model;
    index context = 2048, batch = 8;  ///< steps per sequence; sequences per optimiser step
    index micro_batch = 0;            ///< sequences that a device computes at once; 0: all of its own
    index devices = 1;                ///< that share the batch, each with all parameters
    bool recompute = false;           ///< as in LanguageTrainingOptions
    index number_bytes = 4;           ///< of what lies between matrix products: 4 float, 2 bfloat16
};

/// What a training takes, counted from the model's equations.
struct LanguagePlan {
    LanguageModelOptions model;  ///< completed
    struct Part {
        std::string name;
        index parameters = 0;
    };
    std::vector<Part> parts;  ///< embedding; of all blocks: mixers, gates and outputs, MLPs; norms, head
    index parameters = 0;
    /// Bytes on each device.
    index weights = 0, gradients = 0, optimiser = 0;
    index activations_per_token = 0;  ///< kept for the backward pass; what that holds for moments comes on top
    index activations = 0;            ///< of a micro-batch
    index bytes = 0;                  ///< the sum
    double forward_flops = 0;   ///< per token: two per multiplication and addition of a matrix or attention product
    double training_flops = 0;  ///< per token: three times as many, four with recomputation
    double step_flops = 0;      ///< per device and optimiser step
    index tokens_per_step = 0;
};

/// Throws InvalidArgument.
LanguagePlan plan_language_model(const LanguagePlanOptions& options);

// ---------------------------------------------------------------------------------------------- the training

/// In which a training computes: bfloat16 for matrix products and what lies between them, with weights, norms, losses
/// and the recurrences themselves in float.
enum class Number { float32, bfloat16 };
inline constexpr Names<Number, 2> number_names{{{"float32", Number::float32}, {"bfloat16", Number::bfloat16}}};

enum class OnDivergence { stop, skip };  ///< TrainingDiverged; or the step changes nothing, and that is told
inline constexpr Names<OnDivergence, 2> on_divergence_names{
    {{"stop", OnDivergence::stop}, {"skip", OnDivergence::skip}}};

/// What the ranks of a group divide among themselves.
enum class Sharing {
    sequences,  ///< those of every batch, which is then a multiple of the ranks
    steps,      ///< those of every sequence: of cells alone, on processors
};
inline constexpr Names<Sharing, 2> sharing_names{{{"sequences", Sharing::sequences}, {"steps", Sharing::steps}}};

struct LanguageTrainingOptions {
    LanguageTrainingOptions();

    LanguageModelOptions model;  ///< `vocabulary` is the token file's
    /// Of the cells. By default shooting in chunks of 64 steps: in parallel, and the same bits in every run.
    Options evaluation;
    std::string device;            ///< "cpu", "cuda" or "cuda:<number>"
    std::filesystem::path tokens;  ///< what `prepare_tokens` wrote

    /// The processes that train together, each with all parameters and its own share of every batch (docs/scaling.md);
    /// null: this one alone. The numbers are those of one process to rounding, and the same bits with a given number of
    /// ranks. `train_language_model` is called by all ranks alike; files are read by all, and written by the first one.
    Group* group = nullptr;
    Sharing share = Sharing::sequences;

    index context = 256;  ///< steps per sequence
    index batch = 16;     ///< sequences per optimiser step
    /// Sequences at once, whose gradients are added up; divides a rank's sequences of a batch; 0: all of them.
    index micro_batch = 0;
    index steps = 1000;
    double learning_rate = 3e-3;  ///< at its highest
    index warm_up = 50;           ///< steps of linear growth; a cosine leads from there to 0
    double weight_decay = 0.1;    ///< of matrices
    double gradient_clip = 1;     ///< the norm of all gradients is limited to this; 0: not
    /// After each step the cells' recurrent parameters are limited to +-this, which bounds their Jacobians and so keeps
    /// an evaluation in parallel fast (docs/language-models.md); 0: not.
    double bound = 0;
    /// So many times the growth of disturbances along the sequences is added to what is minimised: the mean over
    /// windows of 16 steps, sequences, channels and blocks of how much the rate per step at which a disturbance grows
    /// exceeds `penalty_rate`, where it does (docs/language-models.md). Keeps an evaluation in parallel fast. 0: not;
    /// above 0 the mixer must be a cell.
    double penalty = 0;
    double penalty_rate = -0.1;       ///< below 0: disturbances are to die out
    Number number = Number::float32;  ///< of matrix products and activations
    /// Steps between those whose Lyapunov exponent is estimated, along all sequences (on a GPU along some); 0: none.
    index estimate_interval = 10;
    bool recompute = false;  ///< keep each block's input alone, and compute the rest again in the backward pass
    OnDivergence on_divergence = OnDivergence::stop;  ///< where a loss or gradient is not finite
    std::uint64_t seed = 1;                           ///< of the order of the data; model.seed: of the weights

    index validation_interval = 0;  ///< steps between validations, besides the end; 0: none
    index validation_tokens = 0;    ///< validate on so many; 0: all

    /// Written at the end, also of an interrupted training, and every `checkpoint_interval` steps (0: not). What was
    /// there before is kept beside it as <name>.previous.
    std::filesystem::path checkpoint;
    index checkpoint_interval = 0;
    /// Continue from this file: everything goes on as if it had never stopped, to the bit (same device, threads and
    /// ranks; others: to rounding). Where it is damaged, from <name>.previous.
    std::filesystem::path resume;
};

/// Of the cells' forward passes, over all layers: Newton iterations, the most and the mean; the largest residual, the
/// largest Lyapunov exponent (NaN where not estimated), the steps that were finished sequentially, the worst status.
struct NewtonFigures {
    index iterations = 0;
    double mean_iterations = 0, residual = 0, lyapunov = std::numeric_limits<double>::quiet_NaN();
    index sequential_steps = 0;
    Status status = Status::converged;
};

struct LanguageStep : NewtonFigures {
    index step = 0, steps = 0;  ///< 1..steps
    index tokens = 0;           ///< seen so far, in all steps
    double loss = 0;            ///< nats per token, of this step's batch before the update
    double learning_rate = 0, gradient_norm = 0;
    double growth = std::numeric_limits<double>::quiet_NaN();  ///< what `penalty` multiplies; NaN where that is 0
    bool skipped = false;                                      ///< as the loss or gradient was not finite
    double seconds = 0, tokens_per_second = 0;
    double elapsed = 0, remaining = 0;  ///< of the training (remaining: estimated)
};

struct LanguageValidation {
    index step = 0;    ///< after which it was
    index tokens = 0;  ///< that were predicted
    double loss = 0;   ///< nats per token
    double perplexity = 0;
    double seconds = 0;
};

struct LanguageTraining {
    std::vector<LanguageStep> steps;              ///< of this call
    std::vector<LanguageValidation> validations;  ///< the last one is of the end, where there is validation text
    bool interrupted = false;
    index parameters = 0;
    index peak_memory = 0;  ///< bytes of main memory that a process has taken at most; 0: unknown
    double seconds = 0;
};

/// Of a group all but `interrupted` on the first rank alone.
struct LanguageCallbacks {
    std::function<void(const LanguageStep&)> step = {};
    std::function<void(const LanguageValidation&)> validation = {};
    std::function<void(double done)> validating = {};  ///< how much of a validation is done, 0..1
    /// What a person should know: a damaged checkpoint whose predecessor is used, a step that was skipped.
    std::function<void(const std::string&)> note = {};
    /// Asked after every step and batch of a validation; true on any rank ends the training with its checkpoint saved.
    std::function<bool()> interrupted = {};
};

/// Trains by AdamW. An epoch visits each sequence of `context` tokens of the file once, in an order of its own.
/// Deterministic: the same options, machine, thread count and LibTorch give the same numbers, but for
/// evaluation.method automatic, or overlap and shooting with chunk 0; on a GPU as far as LibTorch's own operations are.
/// evaluation.execution.threads are LibTorch's too. Throws InvalidArgument, OutOfMemory, FileError, NoDevice,
/// NotConverged: a loss or gradient that is not finite, where that stops the training; the last checkpoint stays.
LanguageTraining train_language_model(const LanguageTrainingOptions& options, const LanguageCallbacks& callbacks = {});

/// Whether a file is a checkpoint of `train_language_model`. Throws FileError where it cannot be read.
bool is_language_model(const std::filesystem::path& checkpoint);

/// The options that a checkpoint was written with; of a damaged one those of its predecessor. Throws FileError.
LanguageTrainingOptions language_options(const std::filesystem::path& checkpoint);

struct LanguageValidationOptions {
    std::filesystem::path tokens = {};  ///< empty: the file of the training
    std::string device = "cpu";
    index batch = 0;     ///< sequences at once; 0: as in the training
    index at_most = 0;   ///< validate on so many tokens; 0: all
    bool whole = false;  ///< on all of the file, instead of its part for validation
    Options evaluation = {};
    std::function<void(double done)> progress = {};
    std::function<bool()> interrupted = {};
};

/// Loss and perplexity on the validation part of a token file, in sequences of the training's context, each from its
/// beginning. Throws InvalidArgument (where its vocabulary is not the checkpoint's, too), FileError, NoDevice.
LanguageValidation validate_language_model(const std::filesystem::path& checkpoint,
                                           const LanguageValidationOptions& options);

// ----------------------------------------------------------------------------------------------- generation

struct TextOptions {
    std::string prompt = {};  ///< empty: a line begins
    index tokens = 200;       ///< to generate
    double temperature = 1;   ///< 0: always the likeliest token
    index top_k = 0;          ///< draw from so many of the likeliest; 0: all
    double top_p = 1;         ///< draw from the fewest likeliest that have this probability together
    std::uint64_t seed = 1;
    std::function<void(std::string_view)> write = {};  ///< receives the text as it comes, the prompt not
    std::function<bool()> interrupted = {};
};

struct GeneratedText {
    std::string text;
    index prompt_tokens = 0, tokens = 0;
    double prompt_seconds = 0, seconds = 0;
    struct Pace {
        index position = 0;            ///< tokens generated by then: 100, 1,000, 10,000, .., and all
        double seconds_per_token = 0;  ///< the median of the last 100
    };
    std::vector<Pace> paces;
    index state_bytes = 0;  ///< of what is carried from token to token
    bool interrupted = false;
};

/// Generates text by one step after the other from the state of the recurrences: seconds per token do not depend on the
/// position (but for attention, whose state is all that it has seen).
class TextGenerator {
public:
    /// Throws FileError, InvalidArgument, NoDevice.
    explicit TextGenerator(const std::filesystem::path& checkpoint, const std::string& device = "cpu");
    ~TextGenerator();
    TextGenerator(TextGenerator&&) noexcept;

    /// Deterministic: the same options, machine and threads give the same text. Throws InvalidArgument.
    GeneratedText generate(const TextOptions& options) const;

private:
    struct Implementation;
    std::unique_ptr<Implementation> implementation_;
};

}  // namespace deeppcr::nn
