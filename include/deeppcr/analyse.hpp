// analyse: can this recurrence be evaluated in parallel, by which method, and does it pay on this machine?
#pragma once

#include <functional>
#include <vector>

#include <deeppcr/evaluate.hpp>

namespace deeppcr {

/// One method, tried.
struct Trial {
    Method method;
    Surrogate surrogate;
    Report report;             ///< of the last run
    double seconds = 0;        ///< median of up to five runs after one that does not count, where that one was not long
    double difference = 0;     ///< max|x - sequential x| over max|sequential x|; NaN where the trajectory is not right
    bool out_of_time = false;  ///< stopped because it took too long: iterations are those until then

    bool right() const { return report.ok() && !out_of_time; }
};

/// What `analyse` measured. Nothing in it is predicted but `channels_that_pay`.
struct Analysis {
    /// Largest Lyapunov exponent per step along the whole sequential trajectory; its standard error, from the means of
    /// up to 16 stretches (NaN where there are fewer than 4).
    double lyapunov = 0, lyapunov_error = 0;
    /// Whether the Jacobians at other states, at some steps of every stretch, were bit for bit those along the
    /// trajectory, as they are where f is linear (affine) in the state. An exponent above 0 then means unstable, not
    /// chaotic: a difference grows without end, and as a rule the trajectory with it.
    bool linear = false;
    /// Steps after which a trajectory that starts from a wrong state agrees with the right one within the tolerance:
    /// the most that was found from `places` starts; -1: not within `forgetting_looked` steps at one of them, or not
    /// measured, as no start was wrong (places 0).
    index forgetting = -1, forgetting_looked = 0, places = 0;
    double tolerance = 0;  ///< relative and absolute, of the residual and of `forgetting`
    /// log(1/epsilon) / lyapunov steps, beyond which products of Jacobians have no digits left; 0: no limit.
    index longest_window = 0;
    index steps_tried = 0;      ///< of the trials: fewer than all where dense Jacobians would take too long
    std::vector<Trial> trials;  ///< the first is sequential
    /// Cells: up to how many channels (of all sequences together, counted from 1) overlap is predicted to be at least a
    /// tenth faster than sequential, by the measured costs of a step and `forgetting`. 0: for none; -1: not a cell, or
    /// forgetting is unknown.
    index channels_that_pay = -1;

    /// The fastest of the trials whose trajectory is right; there must be trials.
    const Trial& fastest() const;
};

struct AnalysisOptions {
    Options evaluation = {};  ///< tolerances, execution, window, chunk, reduction and memory_limit count
    bool trials = true;       ///< whether methods are tried
    double seconds = 10;      ///< a method is stopped after about so many
    /// Told how much is done, from 0 to 1. False: `analyse` throws NotConverged.
    std::function<bool(double done)> progress = {};
};

/// Evaluates `recurrence` sequentially and by every method, and measures how it forgets. Iterations, exponent and
/// forgetting are deterministic as `evaluate`; the rest is time. Throws InvalidArgument, OutOfMemory, NotConverged
/// where the trajectory is not finite, and what the callbacks throw.
template <class T>
Analysis analyse(const Recurrence<T>& recurrence, const AnalysisOptions& options = {});

}  // namespace deeppcr
