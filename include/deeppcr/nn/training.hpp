// Training a deep residual network on Fashion-MNIST: options, records of what happened, checkpoints, validation.
// No LibTorch in here: whoever only trains compiles in a second.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <deeppcr/error.hpp>
#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/names.hpp>

namespace deeppcr::nn {

struct TrainingOptions {
    // The network.
    index layers = 1024, width = 16, skip = 1;
    Activation activation = Activation::tanh;
    /// How its trunk is evaluated, in training and in validation. The guess `given` starts each step from what the
    /// last one predicts; with another, the method `automatic` is the one that has taken less, and the bits may differ
    /// from run to run. execution.threads are the trunk's; LibTorch gets one.
    Options evaluation = {.method = Method::newton, .guess = Guess::given, .estimates = Estimates::none};

    std::string device = "cpu";  ///< where it is trained: "cpu", "cuda" or "cuda:<number>"

    // The data: 60,000 training images, of which `held_out` are kept for validation, and 10,000 test images.
    std::filesystem::path data = {};  ///< folder of the four files; empty: DEEPPCR_DATA, else where Debian has them
    index train_images = 0;           ///< use this many of the 54,000; 0: all
    index held_out = 6000;

    /// The processes that train together, each with all parameters and its own images of every batch
    /// (docs/scaling.md); null: this one alone. The numbers are those of one process, to rounding and the evaluation's
    /// tolerance, and the same bits with a given number of ranks. `train` is called by all ranks alike; files are read
    /// by all, and written by the first one.
    Group* group = nullptr;

    // The training. One epoch sees every training image once, but for those that do not fill a last batch.
    index batch = 64;  ///< of all ranks together, a multiple of their number
    index epochs = 1;
    index steps = 0;  ///< 0: as `epochs` says
    Optimiser optimiser = Optimiser::adamw;
    double learning_rate = 3e-3;     ///< of encoder and decoder, at its highest
    double trunk_learning_rate = 0;  ///< of the layers; 0: learning_rate / layers
    index warm_up = 50;              ///< steps of linear growth; a cosine leads from there to 0
    double weight_decay = 0;
    double momentum = 0.9;      ///< of sgd
    double gradient_clip = 10;  ///< the norm of all gradients is limited to this; 0: not
    std::uint64_t seed = 1;     ///< of initial weights, split and shuffles

    // Checkpoints: written at the end of every epoch and of the training, also of an interrupted one. The one before
    // is kept beside it as <checkpoint>.previous.
    std::filesystem::path checkpoint = {};  ///< empty: none
    index checkpoint_interval = 0;          ///< also every so many steps; 0: not
    /// Continue from this file: everything goes on as if it had never stopped, to the bit (same device and threads; of
    /// several ranks within the evaluation's tolerance, as the first one's prediction is what is saved). Where it is
    /// damaged, from <resume>.previous. The network, the data and the seed must be those of the checkpoint.
    std::filesystem::path resume = {};

    bool test = true;  ///< measure the test set at the end (not after an interruption)
};

struct StepRecord {
    index step = 0, steps = 0;              ///< 1..steps
    index epoch = 0, epochs = 0;            ///< 1..epochs
    index epoch_step = 0, epoch_steps = 0;  ///< 1..epoch_steps: the step's place in its epoch
    double loss = 0, accuracy = 0;          ///< of this step's batch, before the update
    double learning_rate = 0, gradient_norm = 0;
    index iterations = 0;        ///< Newton passes of the forward pass; 0 where sequential
    double mean_iterations = 0;  ///< of the batch's sequences
    double residual = 0;         ///< the largest of the forward pass
    Status status = Status::converged;
    index sequential_steps = 0;  ///< that the forward pass had to finish sequentially, the sum over the batch
    double forward_seconds = 0, backward_seconds = 0;  ///< of the trunk alone
    double seconds = 0;                                ///< of the whole step
    double elapsed = 0, remaining = 0;                 ///< of the training (remaining: estimated)
};

struct ValidationResult {
    index images = 0;
    double loss = 0, accuracy = 0;
    double iterations = 0;  ///< Newton passes, the mean over the batches
    double residual = 0;
    double seconds = 0;
};

struct EpochRecord {
    index epoch = 0, step = 0;
    double loss = 0, accuracy = 0;  ///< means over the epoch's steps
    ValidationResult validation;    ///< on the held-out images
    double seconds = 0;
};

struct TrainingResult {
    std::vector<StepRecord> steps;  ///< of this call: a resumed training begins where it had stopped
    std::vector<EpochRecord> epochs;
    ValidationResult test;  ///< images 0 where not wanted or interrupted
    bool interrupted = false;
    index parameters = 0;
    double seconds = 0;
};

/// Of a group all but `interrupted` on the first rank alone.
struct TrainingCallbacks {
    std::function<void(const StepRecord&)> step = {};
    std::function<void(const EpochRecord&)> epoch = {};
    /// During validation on the held-out and test images: how much of it is done, 0..1.
    std::function<void(double done)> validation = {};
    std::function<void(const std::string&)> note = {};  ///< a damaged checkpoint whose predecessor is used
    /// Asked after every step and every batch of a validation; true on any rank ends the training with its checkpoint
    /// saved.
    std::function<bool()> interrupted = {};
};

/// A loss or gradient that is not finite. The last checkpoint stays as it was.
struct TrainingDiverged : NotConverged {
    using NotConverged::NotConverged;
};

/// Trains. Deterministic: the same options, machine, thread count and LibTorch give the same numbers (on a GPU as far
/// as LibTorch's own operations do). Sets LibTorch's number of threads to 1 for the whole process, as `validate` and
/// `compare_methods` do. Throws InvalidArgument, OutOfMemory, FileError (data, checkpoint), TrainingDiverged,
/// NotConverged, NoDevice.
TrainingResult train(const TrainingOptions& options, const TrainingCallbacks& callbacks = {});

/// The options that a checkpoint was written with; of a damaged one those of its predecessor. Throws FileError.
TrainingOptions checkpoint_options(const std::filesystem::path& checkpoint);

struct ValidationOptions {
    std::string device = "cpu";       ///< as in TrainingOptions
    std::filesystem::path data = {};  ///< as in TrainingOptions
    bool held_out = false;            ///< validate on the images held out of the training instead of the test set
    index batch = 0;                  ///< 0: the checkpoint's
    Options evaluation = {.method = Method::newton, .guess = Guess::given, .estimates = Estimates::none};
    std::function<void(double done)> progress = {};
    /// Asked after every batch; true stops, and the result counts the images so far.
    std::function<bool()> interrupted = {};
};

/// Loss and accuracy of a checkpoint's network. Throws InvalidArgument, OutOfMemory, FileError, NotConverged.
ValidationResult validate(const std::filesystem::path& checkpoint, const ValidationOptions& options = {});

/// The same network and batch, forward and backward, by two methods.
struct MethodComparison {
    struct Difference {
        std::string name;      ///< "logits", or the parameter whose gradient it is
        double largest = 0;    ///< max |second - first|
        double magnitude = 0;  ///< max |first|
    };
    Difference logits;
    std::vector<Difference> gradients;
    Report first_forward, first_backward, second_forward, second_backward;
};

/// Compares two ways of evaluating the trunk on the first batch of an epoch of `training`: with the parameters of
/// `checkpoint`, or with the initial ones where that is empty. Each evaluation starts without a prediction.
MethodComparison compare_methods(const TrainingOptions& training, const std::filesystem::path& checkpoint,
                                 const Options& first, const Options& second);

/// LibTorch as this process has loaded it.
struct LibTorch {
    std::string version;
    std::string blas;       ///< "OpenBLAS 0.3.21 ...", "MKL", or "reference"
    bool fast_blas = true;  ///< false: matrix products take 20 times as long as they should; install OpenBLAS
    int threads = 1;
};
LibTorch libtorch();

}  // namespace deeppcr::nn
