// One layer of a cell, trained on a task that needs memory: weights as training makes them, to measure with. No
// LibTorch in here.
#pragma once

#include <cstdint>
#include <functional>

#include <deeppcr/array.hpp>
#include <deeppcr/nn/cell_kind.hpp>

namespace deeppcr::nn {

struct TrainedCellOptions {
    index channels = 16;
    index steps = 256, batch = 16;  ///< of the sequences that an update sees
    index updates = 400;
    double learning_rate = 2e-2;  ///< at first; it falls to 0 along a cosine
    double time_constant = 30;    ///< of the average that is asked for, in steps
    index delay = 3;              ///< of the input that is asked for, in steps
    std::uint64_t seed = 1;       ///< of the initial weights and of the data
    /// Told after each update how much is done, 0..1; false ends the training.
    std::function<bool(double done)> progress = {};
};

/// A layer's weights, with G inputs and P parameters per channel and C channels: the gates of channel c at an input u
/// are weights(g, 0, c) u + biases(g, 0, c).
struct TrainedCell {
    Buffer<float> weights, biases;         ///< [G, 1, C]
    Buffer<float> parameters;              ///< [P, 1, C], as CellRecurrence takes them
    double first_loss = 0, last_loss = 0;  ///< before and after the training, on sequences kept apart
    bool interrupted = false;              ///< by `progress`; last_loss is NaN then
};

/// Trains a cell of one input and a linear read-out by Adam, on new noise in each update. The input u is N(0, 1); the
/// target is u delayed, plus the exponential average of u, scaled to the variance of u; the loss is the mean squared
/// error. Deterministic in the seed: the same bits from the same options on one machine. Throws InvalidArgument, and
/// NotConverged where the loss has not fallen.
TrainedCell train_cell(CellKind kind, const TrainedCellOptions& options = {});

}  // namespace deeppcr::nn
