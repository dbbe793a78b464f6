// What the experiments of `deeppcr reproduce` that train share: several trainings side by side, the mixers that are
// compared, samples over seeds, curves over the steps.
#pragma once

#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include <deeppcr/nn/language_model.hpp>

#include "reproduce.hpp"

namespace deeppcr::program {

/// Runs jobs in threads, and tells the experiment how much of all its work is done.
class SideBySide {
public:
    /// all_work: of all jobs, in any unit.
    SideBySide(const Experiment& experiment, double all_work) : experiment_(experiment), all_work_(all_work) {}

    /// Does job(0), .., job(count - 1), as many at a time as there are processors: each should compute in one thread.
    /// The first exception lets the others end and is thrown on. False: stopped.
    bool run(std::size_t count, const std::function<void(std::size_t)>& job);

    /// From any thread: so much more is done, and by what.
    void advance(double work, const std::string& what);
    bool stopped();

private:
    const Experiment& experiment_;
    const double all_work_;
    double work_ = 0;
    std::mutex mutex_;
    bool going_on_ = true;
};

/// What models of sequences are compared by.
struct MixerArm {
    nn::Mixer mixer;
    const char* title;
    bool is_cell;
};
inline constexpr MixerArm mixer_arms[] = {
    {nn::Mixer::para_gru, "ParaGRU", true},
    {nn::Mixer::para_lstm, "ParaLSTM", true},
    {nn::Mixer::slstm, "sLSTM", true},
    {nn::Mixer::lstm, "LibTorch's LSTM", false},
    {nn::Mixer::linear, "linear recurrence", false},
    {nn::Mixer::attention, "attention", false},
};

/// The same measured for several seeds.
struct Sample {
    std::vector<double> values;
    /// NaN where there are none.
    double mean() const;
    /// Standard deviation, of what the values are a sample of; NaN where there are fewer than two.
    double deviation() const;
};

/// Values over the steps of a training, lists of results.json, as means over at most 150 windows of steps, or in each
/// the largest; without what is null: not measured.
enum class OfWindow { mean, largest };
Series curve(const std::string& name, const Json& steps, const Json& values, OfWindow kind = OfWindow::mean);

/// What Newton's method did in a step, at the end of the lists that newton_plots shows.
void add_figures(Json& curve, const nn::NewtonFigures& step);

/// Newton's method over trainings: a plot of each of iterations, residual and Lyapunov exponent. trainings: a list of
/// objects with "title" and the lists "step", "mean_iterations", "residual", "lyapunov" of their "curve".
std::vector<Plot> newton_plots(const Json& trainings);

}  // namespace deeppcr::program
