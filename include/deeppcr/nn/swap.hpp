// SWAP, Stochastic Weight Averaging in Parallel (arXiv 2001.02312): classifiers of Fashion-MNIST and language models
// trained by workers whose weights are averaged; and what else the averaging engine knows: data-parallel training,
// local SGD, DiLoCo, SWA, LAWA. No LibTorch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/names.hpp>
#include <deeppcr/nn/training.hpp>

namespace deeppcr::nn {

enum class Network {
    convolutional,  ///< three convolutions with batch norm, 33,658 parameters
    residual,       ///< ResidualNetwork: a deep trunk of dense layers
    language,       ///< a LanguageModel; what it predicts rightly are tokens
};
inline constexpr Names<Network, 3> network_names{
    {{"convolutional", Network::convolutional}, {"residual", Network::residual}, {"language", Network::language}}};

/// What one worker's own trajectory gives in place of its last weights.
enum class Trajectory {
    last,  ///< nothing: the last weights
    swa,   ///< their mean over the ends of its epochs (arXiv 1803.05407)
    lawa,  ///< the same over the latest few (arXiv 2209.14981)
};
inline constexpr Names<Trajectory, 3> trajectory_names{
    {{"last", Trajectory::last}, {"swa", Trajectory::swa}, {"lawa", Trajectory::lawa}}};

struct SwapOptions {
    // The network.
    Network network = Network::convolutional;
    index layers = 32, width = 32;  ///< of the residual one; its layers are evaluated one after the other

    LanguageModelOptions language;  ///< `vocabulary` is the token file's, `seed` the one below

    // The data. Examples are images, or sequences of tokens that follow one another in the training part of a token
    // file. The test set is Fashion-MNIST's, or of the file's validation part as many tokens as have 2^24
    // probabilities.
    std::filesystem::path data = {};  ///< the folder of Fashion-MNIST, as in TrainingOptions, or the token file
    index context = 128;              ///< tokens of a sequence
    index train_examples = 0;         ///< train on so many only; 0: all
    index held_out = 6000;            ///< so many of the training data are kept apart, chosen by the seed
    std::uint64_t seed = 1;           ///< of initial weights, split and orders

    index workers = 4;
    /// Each worker is a rank of this group, which has as many, to the same bits as workers that are simulated in this
    /// process (null). `train_swap` is called by all ranks alike; files are read by all, and written by the first one.
    Group* group = nullptr;
    int threads = 1;  ///< so many simulated workers side by side; the numbers do not depend on it

    // Phase 1: all workers together, their gradients averaged in every step.
    index large_batch = 2048;  ///< examples, of all workers together, a multiple of `workers`
    index large_epochs = 10;   ///< at most; 0: no phase 1
    double large_learning_rate = 0.2;
    index large_warm_up = 20;        ///< steps of linear growth; a cosine leads from there to 0 after large_epochs
    double stopping_accuracy = 0.9;  ///< the phase ends after an epoch of this training accuracy; above 1: never

    // Phase 2: each worker by itself, in an order of its own.
    index small_batch = 64;  ///< of each worker
    index small_epochs = 4;  ///< of each worker; 0: no phase 2
    double small_learning_rate = 0.05;
    index small_warm_up = 0;
    RateSchedule small_schedule = RateSchedule::cosine;
    /// Steps between averages. 0: none until phase 3, which is SWAP. 1: gradients are averaged in every step. Others:
    /// weights are averaged every so many steps and at the end (local SGD).
    index period = 0;
    /// The outer optimiser, SGD with Nesterov's momentum, takes the way from the last average to the mean of the
    /// weights for its gradient (DiLoCo, arXiv 2311.08105). 1 and 0: plain averages.
    double outer_learning_rate = 1, outer_momentum = 0;
    Trajectory trajectory = Trajectory::last;
    index trajectory_from = 1;    ///< the first epoch of phase 2 that counts
    index trajectory_window = 5;  ///< of lawa: the latest so many

    // Both phases.
    Optimiser optimiser = Optimiser::sgd;
    double momentum = 0.9;
    double weight_decay = 5e-4;
    double gradient_clip = 0;
    index micro_batch = 256;  ///< a larger batch passes through the network in pieces of this size
    OnDivergence on_not_finite = OnDivergence::stop;  ///< where a loss or gradient is not finite

    // Checkpoints: after every epoch and phase, and of an interrupted training. The one before stays beside it as
    // <checkpoint>.previous.
    std::filesystem::path checkpoint = {};  ///< empty: none
    /// Continue from this file, to the same bits; from <resume>.previous where this one is missing or corrupt. All
    /// other options but `group`, `threads`, `data` and `on_not_finite` must be those of the checkpoint.
    std::filesystem::path resume = {};

    bool test = true;      ///< measure the test set at the end
    bool compare = false;  ///< and what SwapComparison holds, where phase 3 averages
};

struct SwapStep {
    index phase = 0;   ///< 1 or 2
    index worker = 0;  ///< 0..workers-1; of steps that all workers take together: 0
    index step = 0, steps = 0;
    index epoch = 0;                ///< from 1
    double loss = 0, accuracy = 0;  ///< of the batch, before the update
    double learning_rate = 0, gradient_norm = 0;
    double seconds = 0;    ///< of a processor, without waiting for others
    bool skipped = false;  ///< not finite, and left out
};

struct SwapMeasure {
    index examples = 0;  ///< images, or tokens that are predicted; 0: not measured
    double loss = 0, accuracy = 0;
};

struct SwapEpoch {
    index phase = 0, epoch = 0, epochs = 0;
    double loss = 0, accuracy = 0;  ///< of the training, means over its steps and workers
    SwapMeasure held_out;           ///< of worker 0
};

/// What averaging did, on the test set.
struct SwapComparison {
    std::vector<SwapMeasure> workers;  ///< each alone, before averaging
    SwapMeasure ensemble;              ///< the mean of all workers' probabilities
    // The averaged weights before the third phase's pass over the training images:
    SwapMeasure stale;                ///< with worker 0's running statistics
    SwapMeasure averaged_statistics;  ///< with the workers' running statistics averaged too
    /// On the line from worker 0 (weight 0) to worker 1 (weight 1), with statistics recomputed at each point.
    std::vector<double> line_weights;
    std::vector<SwapMeasure> line;
};

/// Of a group complete on the first rank; on the others `interrupted` alone counts.
struct SwapResult {
    std::vector<SwapStep> steps;  ///< of this call
    std::vector<SwapEpoch> epochs;
    SwapMeasure held_out, test;  ///< of the trained network
    SwapComparison comparison;
    bool interrupted = false;
    index parameters = 0;
    index examples = 0;            ///< that all workers together have trained on in this call
    double seconds = 0;            ///< wall clock
    double processor_seconds = 0;  ///< of all workers' steps and phase 3
    /// Modelled: as if each worker had a processor of its own and communication were free. For each phase the processor
    /// time of its slowest worker.
    double modelled_seconds = 0;
};

/// Of a group all but `interrupted` on the first rank alone.
struct SwapCallbacks {
    /// In the order of workers, once they have met: after each step of phase 1, after each epoch of a phase 2 alone.
    std::function<void(const SwapStep&)> step = {};
    std::function<void(const SwapEpoch&)> epoch = {};
    /// After every step of a worker: how much of the phase is done, 0..1 (of a group, by the first rank). From that
    /// worker's thread, never two at once.
    std::function<void(index phase, double done, double loss)> progress = {};
    /// What a person should know: a damaged checkpoint whose predecessor is used, a step that was skipped.
    std::function<void(const std::string&)> note = {};
    std::function<bool()> interrupted = {};  ///< asked after every step, from any thread
};

/// Trains. Deterministic: the same options, machine and LibTorch give the same numbers, whatever `threads` is,
/// interrupted and resumed or not. Throws InvalidArgument, FileError, TrainingDiverged. Sets LibTorch's number of
/// threads to 1 for the whole process.
SwapResult train_swap(const SwapOptions& options, const SwapCallbacks& callbacks = {});

/// The options that a checkpoint, or where it is missing or corrupt the one before, was written with. Throws FileError.
SwapOptions swap_options(const std::filesystem::path& checkpoint);

/// Whether a file is a checkpoint of `train_swap`. Throws FileError where it cannot be read.
bool is_swap(const std::filesystem::path& checkpoint);

/// Loss and accuracy of a checkpoint's network, before its third phase of worker 0's, on the test set or the examples
/// held out of the training. data: as in SwapOptions; empty: Fashion-MNIST where it usually is, or the training's token
/// file. note: as in SwapCallbacks. Throws FileError.
SwapMeasure validate_swap(const std::filesystem::path& checkpoint, const std::filesystem::path& data, bool held_out,
                          const std::function<void(const std::string&)>& note = {});

}  // namespace deeppcr::nn
