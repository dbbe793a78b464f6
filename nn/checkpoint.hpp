// Checkpoints: everything that a training needs to go on to the same numbers, as a safetensors file.
#pragma once

#include <filesystem>

#include <deeppcr/nn/training.hpp>

#include "nn/saved_state.hpp"

namespace deeppcr::nn {

/// What is in the file: the tensors by their names, the rest as metadata (text).
struct Checkpoint {
    TrainingOptions options;  ///< without `resume`, `checkpoint`, `data`: they are the caller's
    index step = 0;           ///< done so far
    double epoch_loss = 0, epoch_accuracy = 0, epoch_seconds = 0;  ///< sums over the steps of the epoch under way
    /// Parameters by their names in the network; the optimiser's state of each under "optimiser.<what>.<parameter>";
    /// "prediction": DenseChainMemory's, where there is one.
    SavedTensors tensors;
};

/// Atomically. Throws FileError.
void write_checkpoint(const std::filesystem::path& path, const Checkpoint& checkpoint);

/// Throws FileError where the file is corrupt or not a checkpoint of this program.
Checkpoint read_checkpoint(const std::filesystem::path& path);

}  // namespace deeppcr::nn
