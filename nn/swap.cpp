#include <deeppcr/nn/swap.hpp>

#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include <deeppcr/group.hpp>
#include <deeppcr/nn/denoisers.hpp>
#include <deeppcr/nn/fashion_mnist.hpp>
#include <deeppcr/nn/residual_network.hpp>
#include <files/tokens.hpp>
#include <files/write.hpp>

#include "nn/averaging.hpp"
#include "nn/basics.hpp"
#include "nn/language_model.hpp"
#include "nn/optimisation.hpp"
#include "nn/saved_state.hpp"
#include "nn/threads.hpp"

namespace deeppcr::nn {
namespace {

const std::string format = "deeppcr swap 1";

using at::Tensor;

constexpr index images_at_once = 1000, sequences_at_once = 64;  // that are classified
constexpr index all_images = 60'000;                            // that Fashion-MNIST has for training
constexpr index line_intervals = 4;                             // of the line between two workers

// ------------------------------------------------------------------------------------------------- networks

struct Classifier : torch::nn::Module {
    virtual Tensor forward(const Tensor& images) = 0;  ///< [batch,784] -> logits [batch,10]
};

/// Three convolutions of stride 2, each with batch norm and relu, and a linear layer.
struct ConvolutionalNetwork : Classifier {
    explicit ConvolutionalNetwork(std::uint64_t seed) {
        index from = 1;
        for (const index to : {16, 32, 64}) {
            const std::string name = std::to_string(to);
            const auto options = torch::nn::Conv2dOptions(from, to, 3).stride(2).padding(1).bias(false);
            convolutions.push_back(register_module("convolution" + name, torch::nn::Conv2d(options)));
            norms.push_back(register_module("norm" + name, torch::nn::BatchNorm2d(to)));
            from = to;
        }
        constexpr index last_side = 4;
        last = register_module("last", torch::nn::Linear(from * last_side * last_side, 10));
        initialise(*this, seed);
    }
    Tensor forward(const Tensor& images) override {
        Tensor x = images.reshape({images.size(0), 1, image_side, image_side});
        for (std::size_t i = 0; i < norms.size(); ++i) x = torch::relu(norms[i](convolutions[i](x)));
        return last(x.flatten(1));
    }

    std::vector<torch::nn::Conv2d> convolutions;
    std::vector<torch::nn::BatchNorm2d> norms;
    torch::nn::Linear last = nullptr;
};

struct ResidualClassifier : Classifier {
    explicit ResidualClassifier(const SwapOptions& options) {
        const Options sequential{.method = Method::sequential, .execution = {.threads = 1}};
        network = register_module(
            "network",
            ResidualNetwork(
                ResidualNetworkOptions(options.layers, options.width).seed(options.seed).evaluation(sequential)));
    }
    Tensor forward(const Tensor& images) override { return network->forward(images); }

    ResidualNetwork network = nullptr;
};

// ------------------------------------------------------------------------------------------------- subjects

/// What is trained, and what it is measured on.
class Subject : public Task {
public:
    enum class Part { held_out, test };
    /// Probabilities, [examples,classes].
    virtual Tensor classify(torch::nn::Module& model, Part part) const = 0;
    /// The right classes, [examples].
    virtual Tensor answers(Part part) const = 0;
    /// Tells other data from these; empty where there are no others.
    virtual std::string fingerprint() const { return {}; }

protected:
    static Loss loss_of(const Tensor& logits, const Tensor& answers) {
        return {torch::nn::functional::cross_entropy(logits, answers),
                logits.detach().argmax(1).eq(answers).to(at::kDouble).mean().item<double>()};
    }
    /// What body gives for [first, last) of `count` examples, `at_once` at a time, one after the other; the model
    /// evaluates.
    static Tensor in_pieces(torch::nn::Module& model, index count, index at_once,
                            const std::function<Tensor(index first, index last)>& body) {
        const at::NoGradGuard no_gradients;
        const bool was_training = model.is_training();
        model.eval();
        std::vector<Tensor> pieces;
        for (index first = 0; first < count; first += at_once)
            pieces.push_back(body(first, std::min(first + at_once, count)).softmax(1));
        model.train(was_training);
        return at::cat(pieces);
    }
};

class ImageSubject : public Subject {
public:
    explicit ImageSubject(const SwapOptions& options)
        : options_(options),
          data_(load_fashion_mnist(options.data, options.seed, options.held_out, options.train_examples)) {}
    std::shared_ptr<torch::nn::Module> make_model() const override {
        if (options_.network == Network::residual) return std::make_shared<ResidualClassifier>(options_);
        return std::make_shared<ConvolutionalNetwork>(options_.seed);
    }
    index examples() const override { return data_.training.size(); }
    Loss loss(torch::nn::Module& model, const Tensor& rows) const override {
        const ImageSet::Batch batch = data_.training.batch(rows);
        return loss_of(dynamic_cast<Classifier&>(model).forward(batch.images), batch.labels);
    }
    Tensor classify(torch::nn::Module& model, Part part) const override {
        const ImageSet& images = set(part);
        return in_pieces(model, images.size(), images_at_once, [&](index first, index last) {
            return dynamic_cast<Classifier&>(model).forward(images.batch(first, last).images);
        });
    }
    Tensor answers(Part part) const override { return set(part).labels; }

private:
    const ImageSet& set(Part part) const { return part == Part::test ? data_.test : data_.held_out; }

    const SwapOptions options_;
    const FashionMnist data_;
};

class LanguageSubject : public Subject {
public:
    explicit LanguageSubject(const SwapOptions& options) : options_(options), file_(options.data) {
        const index all = (file_.counts().training - 1) / options.context, held_out = options.held_out;
        require(held_out < all, "held_out", "below the number of sequences, " + std::to_string(all), held_out);
        const index most = all - held_out, wanted = options.train_examples;
        require(wanted <= most, "train_examples", "at most " + std::to_string(most), wanted);
        const Tensor order = shuffled(all, options.seed, 0);
        held_out_ = order.narrow(0, 0, held_out);
        training_ = order.narrow(0, held_out, wanted > 0 ? wanted : most);
        options_.language.vocabulary = file_.counts().vocabulary_size;
        options_.language.seed = options.seed;
        options_.language = completed(options_.language);
        evaluation_.execution.threads = 1;
    }
    std::shared_ptr<torch::nn::Module> make_model() const override {
        auto model = std::make_shared<LanguageModel>(options_.language);
        model->set_evaluation(evaluation_);
        return model;
    }
    index examples() const override { return training_.numel(); }
    Loss loss(torch::nn::Module& model, const Tensor& rows) const override {
        const Tensor tokens = sequences_of(training_.index_select(0, rows));
        return loss_of(logits(model, tokens), answers_in(tokens));
    }
    Tensor classify(torch::nn::Module& model, Part part) const override {
        const std::vector<index> begins = begins_of(part);
        return in_pieces(model, index(begins.size()), sequences_at_once, [&](index first, index last) {
            return logits(model, read({begins.begin() + first, begins.begin() + last}));
        });
    }
    Tensor answers(Part part) const override {
        const std::vector<index> begins = begins_of(part);
        std::vector<Tensor> pieces = {at::empty({0}, at::kLong)};
        for (index first = 0; first < index(begins.size()); first += sequences_at_once)
            pieces.push_back(answers_in(read(
                {begins.begin() + first, begins.begin() + std::min(first + sequences_at_once, index(begins.size()))})));
        return at::cat(pieces);
    }

    std::string fingerprint() const override { return std::to_string(file_.counts().checksum); }

private:
    Tensor read(const std::vector<index>& begins) const {
        return sequences(file_, begins, options_.context + 1, at::kCPU);
    }
    Tensor sequences_of(const Tensor& numbers) const {
        std::vector<index> begins;
        for (index i = 0; i < numbers.numel(); ++i)
            begins.push_back(numbers[i].item<std::int64_t>() * options_.context);
        return read(begins);
    }
    /// Where the sequences of a part begin in the file; of the test so many whole ones as there is room for.
    std::vector<index> begins_of(Part part) const {
        std::vector<index> begins;
        if (part == Part::held_out) {
            for (index i = 0; i < held_out_.numel(); ++i)
                begins.push_back(held_out_[i].item<std::int64_t>() * options_.context);
        } else {
            constexpr index probabilities = 1 << 24;
            const index tokens = std::min(file_.counts().validation - 1, probabilities / options_.language.vocabulary);
            for (index i = 0; i < tokens / options_.context; ++i)
                begins.push_back(file_.counts().training + i * options_.context);
        }
        return begins;
    }
    Tensor logits(torch::nn::Module& model, const Tensor& tokens) const {
        return dynamic_cast<LanguageModel&>(model)
            .forward(tokens.narrow(0, 0, options_.context))
            .reshape({-1, options_.language.vocabulary});
    }
    Tensor answers_in(const Tensor& tokens) const { return tokens.narrow(0, 1, options_.context).reshape({-1}); }

    SwapOptions options_;
    Options evaluation_ = LanguageTrainingOptions().evaluation;
    const files::TokenFile file_;
    Tensor training_, held_out_;  // the numbers of sequences
};

/// Throws FileError, InvalidArgument.
std::unique_ptr<Subject> make_subject(const SwapOptions& options) {
    if (options.network == Network::language) return std::make_unique<LanguageSubject>(options);
    return std::make_unique<ImageSubject>(options);
}

SwapMeasure measure(const Tensor& probabilities, const Tensor& answers) {
    const Tensor right = probabilities.gather(1, answers.unsqueeze(1)).to(at::kDouble);
    return {answers.numel(), -right.clamp_min(1e-30).log().mean().item<double>(),
            probabilities.argmax(1).eq(answers).to(at::kDouble).mean().item<double>()};
}

SwapMeasure measure(torch::nn::Module& model, const Subject& subject, Subject::Part part) {
    const Tensor answers = subject.answers(part);
    return answers.numel() > 0 ? measure(subject.classify(model, part), answers) : SwapMeasure();
}

// -------------------------------------------------------------------------------------------------- options

PhaseOptions phase_options(const SwapOptions& options, index number) {
    const bool large = number == 1;
    PhaseOptions phase;
    phase.number = number;
    phase.seed = options.seed;
    phase.micro_batch = options.micro_batch;
    phase.on_not_finite = options.on_not_finite;
    phase.optimisation.optimiser = options.optimiser;
    phase.optimisation.weight_decay = options.weight_decay;
    phase.optimisation.momentum = options.momentum;
    phase.optimisation.gradient_clip = options.gradient_clip;
    phase.optimisation.learning_rate = large ? options.large_learning_rate : options.small_learning_rate;
    phase.optimisation.warm_up = large ? options.large_warm_up : options.small_warm_up;
    if (large) {
        phase.period = 1;
        phase.shared_order = true;
        phase.batch = options.large_batch / options.workers;
        phase.epochs = options.large_epochs;
        phase.stopping_accuracy = options.stopping_accuracy;
    } else {
        phase.period = options.period;
        phase.batch = options.small_batch;
        phase.epochs = options.small_epochs;
        phase.optimisation.schedule = options.small_schedule;
        phase.outer_learning_rate = options.outer_learning_rate;
        phase.outer_momentum = options.outer_momentum;
        phase.trajectory = options.trajectory;
        phase.trajectory_from = options.trajectory_from;
        phase.trajectory_window = options.trajectory_window;
    }
    return phase;
}

void check_batches(const SwapOptions& options, index examples) {
    const std::string most = "at most the number of training examples, " + std::to_string(examples);
    if (options.large_epochs > 0) {
        require(options.large_batch <= examples, "large_batch", most, options.large_batch);
        nn::check(phase_options(options, 1), examples, options.workers);
    }
    if (options.small_epochs > 0) {
        require(options.small_batch <= examples, "small_batch", most, options.small_batch);
        nn::check(phase_options(options, 2), examples, options.workers);
    }
}

void check(const SwapOptions& options) {
    const auto at_least = [](const char* name, index value, index least) {
        require(value >= least, name, "at least " + std::to_string(least), value);
    };
    at_least("workers", options.workers, 1);
    at_least("threads", options.threads, 1);
    if (options.group != nullptr && options.group->size() > 1)
        require(options.workers == options.group->size(), "workers",
                std::to_string(options.group->size()) + ", as there are ranks", options.workers);
    at_least("large_epochs", options.large_epochs, 0);
    at_least("small_epochs", options.small_epochs, 0);
    require(options.large_epochs + options.small_epochs > 0, "small_epochs", "at least 1, as there is no phase 1",
            options.small_epochs);
    at_least("large_batch", options.large_batch, 1);
    require(options.large_batch % options.workers == 0, "large_batch",
            "a multiple of the " + std::to_string(options.workers) + " workers", options.large_batch);
    at_least("small_batch", options.small_batch, 1);
    at_least("large_warm_up", options.large_warm_up, 0);
    at_least("small_warm_up", options.small_warm_up, 0);
    for (const auto& [name, rate] : {std::pair{"large_learning_rate", options.large_learning_rate},
                                     std::pair{"small_learning_rate", options.small_learning_rate}})
        require(std::isfinite(rate) && rate > 0, name, "a finite number above 0", rate);
    if (options.network == Network::language) {  // what else depends on its file is checked with it
        at_least("context", options.context, 1);
        at_least("held_out", options.held_out, 0);
        at_least("train_examples", options.train_examples, 0);
        return check_batches(options, std::numeric_limits<index>::max());
    }
    const bool holds_out = options.held_out > 0 && options.held_out < all_images;  // else reading the data refuses
    const index most = all_images - (holds_out ? options.held_out : 0);
    require(options.train_examples >= 0 && options.train_examples <= most, "train_examples",
            "0 to " + std::to_string(most), options.train_examples);
    check_batches(options, options.train_examples > 0 ? options.train_examples : most);
}

// ----------------------------------------------------------------------------------------------- checkpoints

struct State {
    SwapOptions options;
    index phase = 1;  // 1 and 2: under way or at its end; 3: the trained network
    /// Of phases 1 and 2: each worker's Phase::state under "worker.<rank>." (where all are equal, of worker 0 only); of
    /// phase 3 the network's parameters and buffers.
    SavedTensors tensors;
    std::string data_fingerprint;  // Subject::fingerprint
};

template <class S, class Visit>
void visit_fields(S& state, const Visit& visit) {
    auto& options = state.options;
    visit("phase", state.phase);
    visit("network", options.network, network_names);
    visit("layers", options.layers);
    visit("width", options.width);
    visit_model(options.language,
                [&](const std::string& key, auto&... field) { visit(("language_" + key).c_str(), field...); });
    visit("context", options.context);
    visit("train_examples", options.train_examples);
    visit("held_out", options.held_out);
    visit("seed", options.seed);
    visit("workers", options.workers);
    visit("large_batch", options.large_batch);
    visit("large_epochs", options.large_epochs);
    visit("large_learning_rate", options.large_learning_rate);
    visit("large_warm_up", options.large_warm_up);
    visit("stopping_accuracy", options.stopping_accuracy);
    visit("small_batch", options.small_batch);
    visit("small_epochs", options.small_epochs);
    visit("small_learning_rate", options.small_learning_rate);
    visit("small_warm_up", options.small_warm_up);
    visit("small_schedule", options.small_schedule, rate_schedule_names);
    visit("period", options.period);
    visit("outer_learning_rate", options.outer_learning_rate);
    visit("outer_momentum", options.outer_momentum);
    visit("trajectory", options.trajectory, trajectory_names);
    visit("trajectory_from", options.trajectory_from);
    visit("trajectory_window", options.trajectory_window);
    visit("optimiser", options.optimiser, optimiser_names);
    visit("momentum", options.momentum);
    visit("weight_decay", options.weight_decay);
    visit("gradient_clip", options.gradient_clip);
    visit("micro_batch", options.micro_batch);
    visit("on_not_finite", options.on_not_finite, on_divergence_names);
}

State from_saved(const std::filesystem::path& path, SavedState saved) {
    State state;
    visit_fields(state, get_from(path, saved.metadata));
    try {
        check(state.options);
        require(state.phase >= 1 && state.phase <= 3, "phase", "1 to 3", state.phase);
    } catch (const InvalidArgument& problem) {
        throw FileError(path, problem.what());
    }
    state.options.data = saved.metadata["data"];
    state.data_fingerprint = saved.metadata["data_fingerprint"];
    state.tensors = std::move(saved.tensors);
    return state;
}

Metadata fields_of(const State& state) {
    Metadata fields;
    visit_fields(state, put_into(fields));
    return fields;
}

std::string prefix_of(index worker) { return "worker." + std::to_string(worker) + "."; }

void copy_to(torch::nn::Module& model, const std::filesystem::path& path, const State& saved) {
    const at::NoGradGuard no_gradients;
    const std::string prefix = saved.phase == 3 ? "" : prefix_of(0);
    for (const auto& [name, tensor] : state_of(model))
        Tensor(tensor).copy_(find(path, saved.tensors, prefix + name, tensor));
}

// ----------------------------------------------------------------------------------------------- the training

class Training {
public:
    Training(const SwapOptions& options, const SwapCallbacks& callbacks)
        : options_(options),
          callbacks_(callbacks),
          file_(options.checkpoint),
          subject_(make_subject(options)),
          group_(options.group != nullptr && options.group->size() > 1 ? options.group : nullptr),
          done_(std::size_t(group_ != nullptr ? 1 : options.workers)) {
        check_batches(options, subject_->examples());
        if (options_.resume.empty()) return;
        saved_ = from_saved(options_.resume,
                            file_.load_from(options_.resume, format,
                                            group_ == nullptr || group_->rank() == 0 ? callbacks_.note : nullptr));
        check_continues(fields_of({options_, saved_->phase, {}, {}}), fields_of(*saved_), "on_not_finite");
        if (saved_->data_fingerprint != subject_->fingerprint())
            throw InvalidArgument("data", "the token file of the checkpoint", options_.data.string());
    }

    SwapResult run() {
        const auto begin = Clock::now();
        if (group_ != nullptr) {
            GroupTeam team(*group_);
            work(team);
            group_->barrier();  // so that no rank ends the program before the first one has written
        } else {
            run_team(options_.workers, options_.threads, [this](Team& team) { work(team); });
        }
        result_.seconds = seconds_since(begin);
        return std::move(result_);
    }

private:
    using Model = torch::nn::Module;
    using Part = Subject::Part;

    /// One worker's whole training.
    void work(Team& team) {
        const std::shared_ptr<Model> model = subject_->make_model();
        if (team.rank() == 0)
            for (const Tensor& parameter : model->parameters()) result_.parameters += parameter.numel();
        const index first = saved_ ? saved_->phase : 1;
        bool stale = false;
        for (index number = first; number <= 2; ++number)
            if (has_phase(number) && !work_on_phase(number, model, team, stale)) return;
        if (first == 3)
            copy_to(*model, options_.resume, *saved_);
        else
            finish(*model, team, stale);
        if (team.rank() != 0) return;
        result_.held_out = measure(*model, *subject_, Part::held_out);
        if (options_.test) result_.test = measure(*model, *subject_, Part::test);
    }

    /// False: interrupted. stale: the weights are a mean over a trajectory, with other weights' running statistics.
    bool work_on_phase(index number, const std::shared_ptr<Model>& model, Team& team, bool& stale) {
        Phase phase(model, *subject_, phase_options(options_, number), team);
        if (saved_ && saved_->phase == number) {
            const std::string prefix = prefix_of(all_are_equal(number) ? 0 : team.rank());
            phase.restore([&](const std::string& name, const Tensor& like) -> Tensor {
                return find(options_.resume, saved_->tensors, prefix + name, like);
            });
        }
        const index steps_before = phase.step();
        const double seconds_before = phase.processor_seconds();
        bool interrupted = false;
        while (!phase.finished() && !interrupted) {
            const Phase::Outcome outcome = phase.advance(callbacks_of(number, team.rank()));
            interrupted = outcome == Phase::Outcome::interrupted;
            if (outcome == Phase::Outcome::epoch_ended) report_epoch(number, phase, *model, team);
            if (outcome != Phase::Outcome::met) save(number, phase, team);
        }
        count(number, phase.step() - steps_before, phase.processor_seconds() - seconds_before, team);
        if (interrupted) {
            if (team.rank() == 0 || group_ != nullptr) result_.interrupted = true;
            return false;
        }
        stale = phase.take_trajectory();
        return true;
    }

    bool has_phase(index number) const { return (number == 1 ? options_.large_epochs : options_.small_epochs) > 0; }
    bool all_are_equal(index number) const { return number == 1 || options_.period == 1 || options_.workers == 1; }

    Phase::Callbacks callbacks_of(index number, index rank) {
        Phase::Callbacks callbacks;
        callbacks.step = [this](const SwapStep& step) {
            result_.steps.push_back(step);
            const std::lock_guard lock(mutex_);
            if (step.skipped) warn(step);
            if (callbacks_.step) callbacks_.step(step);
        };
        callbacks.progress = [this, number, rank](double done, double loss) {
            const std::lock_guard lock(mutex_);
            done_[group_ != nullptr ? 0 : std::size_t(rank)] = done;
            double sum = 0;
            for (const double part : done_) sum += part;
            if (callbacks_.progress && (group_ == nullptr || rank == 0))
                callbacks_.progress(number, sum / double(done_.size()), loss);
        };
        callbacks.interrupted = [this] {
            const std::lock_guard lock(mutex_);
            return callbacks_.interrupted && callbacks_.interrupted();
        };
        return callbacks;
    }

    void warn(const SwapStep& step) const {
        if (callbacks_.note)
            callbacks_.note("phase " + std::to_string(step.phase) + ", step " + std::to_string(step.step) +
                            (all_are_equal(step.phase) ? "" : " of worker " + std::to_string(step.worker)) +
                            " is left out: its " + (std::isfinite(step.loss) ? "gradient" : "loss") + " is not finite");
    }

    void report_epoch(index number, const Phase& phase, Model& model, Team& team) {
        if (team.rank() != 0) return;
        const SwapMeasure held_out = measure(model, *subject_, Part::held_out);
        const index epochs = number == 1 ? options_.large_epochs : options_.small_epochs;
        result_.epochs.push_back({number, phase.epoch(), epochs, phase.epoch_loss(), phase.epoch_accuracy(), held_out});
        const std::lock_guard lock(mutex_);
        if (phase.finished()) done_.assign(done_.size(), 0);
        if (callbacks_.epoch) callbacks_.epoch(result_.epochs.back());
    }

    void save(index number, const Phase& phase, Team& team) {
        if (options_.checkpoint.empty()) return;
        const std::vector<SavedTensors> all = team.collect(phase.state());
        if (team.rank() != 0) return;
        SavedTensors tensors;
        for (std::size_t worker = 0; worker < (all_are_equal(number) ? 1 : all.size()); ++worker)
            for (const auto& [name, tensor] : all[worker]) tensors[prefix_of(index(worker)) + name] = tensor;
        write({options_, number, std::move(tensors), {}});
    }
    void write(const State& state) {
        Metadata metadata = fields_of(state);
        metadata["format"] = format;
        metadata["data"] = options_.data.string();
        metadata["data_fingerprint"] = subject_->fingerprint();
        file_.save({metadata, state.tensors});
    }

    void count(index number, index steps, double seconds, Team& team) {
        const index batch = number == 1 ? options_.large_batch / options_.workers : options_.small_batch;
        const auto all = team.gather({double(steps * batch), seconds});
        if (team.rank() != 0) return;
        double slowest = 0;
        for (const auto& one : all) {
            result_.examples += index(one[0]);
            result_.processor_seconds += one[1];
            slowest = std::max(slowest, one[1]);
        }
        result_.modelled_seconds += slowest;
    }

    /// Phase 3, where there is something to average.
    void finish(Model& model, Team& team, bool stale) {
        const bool averages = has_phase(2) && !all_are_equal(2);
        const bool compares =
            averages && options_.compare && options_.test && subject_->answers(Part::test).numel() > 0;
        if (compares) {
            if (stale) recompute_statistics(model, *subject_, options_.micro_batch);
            compare_workers(model, team);
        }
        SavedTensors own;
        for (const auto& buffer : model.named_buffers()) own[buffer.key()] = buffer.value().clone();
        if (averages) average_models(model, team);
        if (team.rank() != 0) return;
        if (compares) {
            const at::NoGradGuard no_gradients;
            result_.comparison.averaged_statistics = measure(model, *subject_, Part::test);
            for (auto& buffer : model.named_buffers()) buffer.value().copy_(own.at(buffer.key()));
            result_.comparison.stale = measure(model, *subject_, Part::test);
        }
        const double begin = thread_seconds();
        if (averages || stale) recompute_statistics(model, *subject_, options_.micro_batch);
        const double seconds = thread_seconds() - begin;
        result_.processor_seconds += seconds;
        result_.modelled_seconds += seconds;
        if (options_.checkpoint.empty()) return;
        State state{options_, 3, {}, {}};
        for (const auto& [name, tensor] : state_of(model)) state.tensors[name] = tensor;
        write(state);
    }

    void compare_workers(Model& model, Team& team) {
        SavedTensors tensors;
        for (const auto& [name, tensor] : state_of(model)) tensors[name] = tensor;
        tensors["probabilities"] = subject_->classify(model, Part::test);
        const std::vector<SavedTensors> all = team.collect(tensors);
        if (team.rank() != 0) return;
        SwapComparison& comparison = result_.comparison;
        const Tensor answers = subject_->answers(Part::test);
        Tensor sum = at::zeros_like(tensors.at("probabilities"));
        for (const SavedTensors& worker : all) {
            comparison.workers.push_back(measure(worker.at("probabilities"), answers));
            sum.add_(worker.at("probabilities"));
        }
        comparison.ensemble = measure(sum.div_(double(all.size())), answers);

        const std::shared_ptr<Model> between = subject_->make_model();
        const at::NoGradGuard no_gradients;
        for (index i = 0; i <= line_intervals; ++i) {
            const double weight = double(i) / double(line_intervals);
            for (auto& parameter : between->named_parameters())
                parameter.value().copy_(at::lerp(all[0].at(parameter.key()), all[1].at(parameter.key()), weight));
            recompute_statistics(*between, *subject_, options_.micro_batch);
            comparison.line_weights.push_back(weight);
            comparison.line.push_back(measure(*between, *subject_, Part::test));
        }
    }

    const SwapOptions& options_;
    const SwapCallbacks& callbacks_;
    SavedStates file_;
    const std::unique_ptr<Subject> subject_;
    std::optional<State> saved_;
    Group* group_;       // null: the workers are simulated
    SwapResult result_;  // worker 0's
    std::mutex mutex_;   // of the callbacks
    std::vector<double> done_;
};

}  // namespace

SwapResult train_swap(const SwapOptions& options, const SwapCallbacks& callbacks) {
    check(options);
    if (!options.checkpoint.empty()) files::check_writable(options.checkpoint);
    limit_threads(1);
    return Training(options, callbacks).run();
}

bool is_swap(const std::filesystem::path& checkpoint) { return format_of(checkpoint) == format; }

SwapOptions swap_options(const std::filesystem::path& checkpoint) {
    return from_saved(checkpoint, SavedStates(checkpoint).load(format, {})).options;
}

SwapMeasure validate_swap(const std::filesystem::path& checkpoint, const std::filesystem::path& data, bool held_out,
                          const std::function<void(const std::string&)>& note) {
    limit_threads(1);
    const State saved = from_saved(checkpoint, SavedStates(checkpoint).load(format, note));
    SwapOptions options = saved.options;
    if (!data.empty() || options.network != Network::language) options.data = data;
    const std::unique_ptr<Subject> subject = make_subject(options);
    const auto model = subject->make_model();
    copy_to(*model, checkpoint, saved);
    return measure(*model, *subject, held_out ? Subject::Part::held_out : Subject::Part::test);
}

}  // namespace deeppcr::nn
