// What trainings have in common, whatever it is that they train: the processes that take part, whom they tell, where
// they are saved and go on from, and what becomes of a step that is not finite.
#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/training.hpp>
#include <files/write.hpp>

#include "nn/basics.hpp"
#include "nn/optimisation.hpp"
#include "nn/saved_state.hpp"
#include "nn/sharing.hpp"

namespace deeppcr::nn {

/// The base of a training's own class, of whose loop it does what follows each step. Options has `checkpoint` and
/// `resume`; Callbacks `step`, `note` and `interrupted`; Result `steps`, `interrupted`, `parameters` and `seconds`.
template <class Options, class Callbacks, class Result, class Part = Share>
class TrainingLoop {
protected:
    /// share: this process's. Throws FileError where the checkpoint cannot be written.
    TrainingLoop(const Options& options, const Callbacks& callbacks, const Part& share)
        : options_(options), share_(share), callbacks_(callbacks), checkpoint_(options.checkpoint) {
        if (!share_.speaks()) {
            callbacks_ = Callbacks();
            callbacks_.interrupted = callbacks.interrupted;
        }
        if (!options.checkpoint.empty()) files::check_writable(options.checkpoint);
    }

    /// What options.resume holds. Throws FileError.
    SavedState load(const std::string& format) {
        return checkpoint_.load_from(options_.resume, format, callbacks_.note);
    }
    /// Whether this process saves.
    bool saves() const { return !options_.checkpoint.empty() && share_.speaks(); }

    /// Before the first step. parameters: what is trained.
    void start(const std::vector<at::Tensor>& parameters) {
        for (const at::Tensor& parameter : parameters) result_.parameters += parameter.numel();
        begin_ = Clock::now();
    }
    /// Tells of a step that was done; `left` are to come. Collective.
    template <class Step>
    void tell(Step& step, index left) {
        step.elapsed = seconds_since(begin_);
        step.remaining = step.elapsed / double(result_.steps.size() + 1) * double(left);
        result_.steps.push_back(step);
        if (callbacks_.step) callbacks_.step(step);
        result_.interrupted = share_.any(callbacks_.interrupted && callbacks_.interrupted());
    }
    /// Whether what is done every `interval` steps (0: never) is to be done after so many.
    bool due(index interval, index steps) const {
        return !result_.interrupted && interval > 0 && steps % interval == 0;
    }
    /// Whether a step with this loss and gradient was an update. Where not, throws TrainingDiverged, or says that the
    /// step is skipped.
    bool updated(double loss, double gradient_norm, const std::string& step,
                 OnDivergence on_divergence = OnDivergence::stop) {
        if (std::isfinite(gradient_norm)) return true;
        const std::string what = not_finite(loss, step);
        if (on_divergence == OnDivergence::stop) throw TrainingDiverged(what + "; a smaller learning rate may help");
        if (callbacks_.note) callbacks_.note(what + ": it is skipped");
        return false;
    }

    /// After the last step. Collective.
    Result conclude() {
        share_.barrier();  // so that no rank ends the program before the first one has written
        result_.seconds = seconds_since(begin_);
        return std::move(result_);
    }

    const Options& options_;
    const Part share_;
    Callbacks callbacks_;  ///< of other ranks than the first `interrupted` alone
    SavedStates checkpoint_;
    Result result_;
    Clock::time_point begin_;
};

}  // namespace deeppcr::nn
