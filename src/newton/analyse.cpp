#include <deeppcr/analyse.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "device/threads.hpp"
#include "newton/cost_model.hpp"
#include "newton/lyapunov.hpp"
#include "newton/options.hpp"
#include "newton/stopwatch.hpp"
#include "newton/trajectory.hpp"

namespace deeppcr {
namespace newton {
namespace {

constexpr index stretches = 16;  // of the trajectory, for the standard error
constexpr index places = 16;     // where forgetting is measured
constexpr index most_runs = 5;   // of a method
constexpr index few_steps = 64;  // of each stretch, whose Jacobians are compared with those at other states
constexpr double seconds_of_repeating = 0.3;
constexpr double operations_of_a_pass = 4e9;  // with dense Jacobians; beyond, fewer steps are tried

std::vector<index> all_sequences(index batch) {
    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), index(0));
    return sequences;
}

/// The first steps of another recurrence.
template <class T>
class Beginning : public Recurrence<T> {
public:
    Beginning(const Recurrence<T>& whole, index steps)
        : Recurrence<T>({steps, whole.shape().batch, whole.shape().width}, whole.block()), whole_(whole) {}
    void initial(const Section& section, View<T> state) const override { whole_.initial(section, state); }
    void step(const Section& section, View<const T> before, View<T> after) const override {
        whole_.step(section, before, after);
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        whole_.linearise(section, before, after, jacobian);
    }
    void linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                            Jacobian<T> diagonal) const override {
        whole_.linearise_diagonal(section, before, after, diagonal);
    }
    void run(const Section& section, View<const T> state, View<T> trajectory) const override {
        whole_.run(section, state, trajectory);
    }

private:
    const Recurrence<T>& whole_;
};

template <class T>
class Analyst {
public:
    Analyst(const Recurrence<T>& recurrence, const AnalysisOptions& options)
        : recurrence_(recurrence),
          analysis_options_(options),
          options_(options.evaluation),
          sequences_(all_sequences(recurrence.shape().batch)),
          trajectory_(Buffer<T>::uninitialised(recurrence.shape())) {
        options_.guess = Guess::initial_state;
        options_.on_failure = OnFailure::finish;
        options_.estimates = Estimates::none;
        options_.workspace = &workspace_;
        options_.progress = {};
        result_.tolerance = tolerance_of<T>(options_).relative;
    }

    Analysis run() {
        evaluate_sequentially();
        measure_growth();
        measure_forgetting();
        if (analysis_options_.trials) try_methods();
        if (const auto* cell = dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence_)) count_channels(*cell);
        return std::move(result_);
    }

private:
    const Shape& shape() const { return recurrence_.shape(); }
    Section section(index first, index last) const { return {first, last, sequences_, options_.execution}; }

    /// Each stage has its part of the progress; the trials have most.
    struct Stage {
        double first, last;
    };
    static constexpr Stage evaluation{0, 0.05}, growth{0.05, 0.2}, forgetting{0.2, 0.3}, trials{0.3, 1};

    /// A method that is run again has nothing new to show.
    bool going_on(const Stage& stage, double part) {
        shown_ = std::max(shown_, stage.first + (stage.last - stage.first) * part);
        return !analysis_options_.progress || analysis_options_.progress(shown_);
    }
    void ask(const Stage& stage, index done, index of) {
        if (!going_on(stage, double(done) / double(of))) throw NotConverged("the analysis was stopped");
    }

    void evaluate_sequentially() {
        ask(evaluation, 0, 1);
        const Buffer<T> state({1, shape().batch, shape().width});
        recurrence_.initial(section(0, shape().steps), state);
        recurrence_.run(section(0, shape().steps), state.view(), trajectory_);
        for (index i = 0; i < shape().steps; ++i)
            for (index j = 0; j < shape().batch; ++j)
                for (index k = 0; k < shape().width; ++k) {
                    const double value = std::abs(double(trajectory_(i, j, k)));
                    if (!std::isfinite(value))
                        throw NotConverged("the recurrence is not finite from step " + std::to_string(i + 1) +
                                           " of sequence " + std::to_string(j) + " on, sequentially too");
                    largest_ = std::max(largest_, value);
                }
    }

    void measure_growth() {
        const auto [steps, batch, width] = shape();
        const index block = recurrence_.block();
        const index count = std::clamp<index>(steps / 8, 1, stretches);
        LyapunovEstimate<T> estimate(width, block, true);
        std::vector<std::vector<double>> sums;
        Options windows = options_;
        windows.surrogate = Surrogate::full;
        windows.window = 0;
        const index length = std::min(window_length(recurrence_, windows, block), index(4096));
        result_.linear = true;
        for (index s = 0; s < count; ++s) {
            const index first = steps * s / count, last = steps * (s + 1) / count;
            for (index from = first; from < last; from += length) {
                ask(growth, from, steps);
                const index rows = std::min(length, last - from);
                const Workspace::Scope scope(workspace_);
                const View<T> before = workspace_.take_states<T>({rows, batch, width}),
                              after = workspace_.take_states<T>({rows, batch, width});
                const Jacobian<T> jacobian = workspace_.take_jacobian<T>({rows, batch, width}, block);
                gather_before<T>(recurrence_, trajectory_.view(), section(from, from + rows), before);
                recurrence_.linearise(section(from, from + rows), View<const T>(before), after, jacobian);
                for (index j = 0; j < batch; ++j) estimate.follow(j, jacobian, j, rows);
                const index compared = std::min(rows, few_steps);
                if (from == first && result_.linear)
                    result_.linear = same_elsewhere(section(from, from + compared), before.steps(0, compared),
                                                    after.steps(0, compared), jacobian.steps(0, compared));
            }
            sums.push_back(estimate.growths());
        }
        result_.lyapunov = estimate.exponent();
        result_.lyapunov_error = std::numeric_limits<double>::quiet_NaN();
        if (count >= 4 && std::isfinite(result_.lyapunov)) {
            const std::vector<double>& last = sums.back();
            const auto leading = std::size_t(std::max_element(last.begin(), last.end()) - last.begin());
            double squares = 0;
            for (index s = 0; s < count; ++s) {
                const double sum = sums[std::size_t(s)][leading] - (s > 0 ? sums[std::size_t(s - 1)][leading] : 0);
                const index rows = steps * (s + 1) / count - steps * s / count;
                squares += std::pow(sum / double(rows) - result_.lyapunov, 2);
            }
            result_.lyapunov_error = std::sqrt(squares / double(count - 1) / double(count));
        }
        if (result_.lyapunov > 0)
            result_.longest_window =
                std::max<index>(1, index(-std::log(double(std::numeric_limits<T>::epsilon())) / result_.lyapunov));
    }

    /// Whether the Jacobians at states far from `before`, on both sides, are the given ones; `before` and `after` are
    /// overwritten.
    bool same_elsewhere(const Section& section, View<T> before, View<T> after, const Jacobian<T>& expected) {
        const Workspace::Scope scope(workspace_);
        const Shape& states = before.shape();
        const Jacobian<T> found = workspace_.take_jacobian<T>(states, expected.block());
        const index size = states.count() * expected.block();
        for (const T factor : {T(-2), T(-3)}) {  // of the states, and then of those again
            for (index i = 0; i < states.count(); ++i) before.data()[i] = factor * before.data()[i] - 1;
            recurrence_.linearise(section, View<const T>(before), after, found);
            if (!std::equal(found.data(), found.data() + size, expected.data())) return false;
        }
        return true;
    }

    /// From several places on, starts from the initial state and from the state half a trajectory away, where these are
    /// wrong there.
    void measure_forgetting() {
        const auto [steps, batch, width] = shape();
        const index look = std::min(steps, std::max<index>(256, steps / places));
        result_.forgetting_looked = look;
        const index count = std::min(places, steps - look + 1);
        const Workspace::Scope scope(workspace_);
        const View<T> right = workspace_.take_states<T>({1, batch, width}),
                      state = workspace_.take_states<T>({1, batch, width});
        const index piece = std::min<index>(look, 64);
        const View<T> tried = workspace_.take_states<T>({piece, batch, width});
        for (index p = 0; p < count; ++p) {
            const index first = count == 1 ? 0 : (steps - look) * p / (count - 1);
            ask(forgetting, p, count);
            gather_before<T>(recurrence_, trajectory_.view(), section(first, first + 1), right);
            for (const bool elsewhere : {false, true}) {
                if (elsewhere)
                    for (index j = 0; j < batch; ++j)
                        std::copy_n(trajectory_.view().at((first + steps / 2) % steps, j), width, state.at(0, j));
                else
                    recurrence_.initial(section(0, steps), state);
                if (agree(state, right)) continue;
                ++result_.places;
                const index needed = steps_until_equal(first, look, piece, state, tried);
                if (needed < 0) {
                    result_.forgetting = -1;
                    return;
                }
                result_.forgetting = std::max(result_.forgetting, needed);
            }
        }
    }

    /// Within the tolerance.
    bool agree(const T* found, const T* expected) const {
        const Tolerance tolerance = tolerance_of<T>(options_);
        double size = 0;
        for (index k = 0; k < shape().width; ++k) size = std::max(size, std::abs(double(expected[k])));
        for (index k = 0; k < shape().width; ++k)
            if (!(std::abs(double(found[k]) - double(expected[k])) <= tolerance.absolute + tolerance.relative * size))
                return false;  // NaN too
        return true;
    }
    bool agree(View<const T> found, View<const T> expected) const {
        for (index j = 0; j < shape().batch; ++j)
            if (!agree(found.at(0, j), expected.at(0, j))) return false;
        return true;
    }

    /// Steps from `first` on until all sequences agree with the trajectory; -1: not within `look`.
    index steps_until_equal(index first, index look, index piece, View<T> state, View<T> tried) const {
        const index batch = shape().batch;
        std::vector<char> equal(std::size_t(batch), 0);
        index left = batch;
        for (index done = 0; done < look; done += piece) {
            const index rows = std::min(piece, look - done);
            const View<T> part = tried.steps(0, rows);
            recurrence_.run(section(first + done, first + done + rows), View<const T>(state), part);
            for (index i = 0; i < rows; ++i)
                for (index j = 0; j < batch; ++j) {
                    if (equal[std::size_t(j)] != 0 || !agree(part.at(i, j), trajectory_.view().at(first + done + i, j)))
                        continue;
                    equal[std::size_t(j)] = 1;
                    if (--left == 0) return done + i + 1;
                }
            std::copy_n(part.at(rows - 1, 0), batch * shape().width, state.data());
        }
        return -1;
    }

    void try_methods() {
        const auto [steps, batch, width] = shape();
        const auto* cell = dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence_);
        const double block = double(recurrence_.block()), per_step = double(batch) * double(width) * block * block;
        result_.steps_tried =
            cell != nullptr ? steps : std::clamp<index>(index(operations_of_a_pass / per_step), 1, steps);
        const Beginning<T> beginning(recurrence_, result_.steps_tried);
        const Recurrence<T>& tried = result_.steps_tried < steps ? beginning : recurrence_;
        std::vector<std::pair<Method, Surrogate>> methods{{Method::sequential, Surrogate::full}};
        if (cell != nullptr)
            for (const Method method : {Method::overlap, Method::shooting, Method::automatic})
                methods.emplace_back(method, Surrogate::full);
        methods.emplace_back(Method::newton, Surrogate::full);
        if (recurrence_.block() > 1) methods.emplace_back(Method::newton, Surrogate::diagonal);
        for (std::size_t m = 0; m < methods.size(); ++m) {
            const double share = (trials.last - trials.first) / double(methods.size());
            const Stage stage{trials.first + share * double(m), trials.first + share * double(m + 1)};
            ask(stage, 0, 1);
            Options options = options_;
            options.method = methods[m].first;
            options.surrogate = methods[m].second;
            result_.trials.push_back(try_method(tried, options, stage));
        }
    }

    Trial try_method(const Recurrence<T>& recurrence, Options options, const Stage& stage) {
        Trial trial{.method = options.method, .surrogate = options.surrogate, .report = {}};
        const double limit = analysis_options_.seconds;
        const Buffer<T> found = Buffer<T>::uninitialised(recurrence.shape());
        std::vector<double> seconds;
        Clock::time_point begin = Clock::now();
        bool stopped = false;
        if (options.method != Method::sequential)
            options.progress = [&](index confirmed, index of, index) {
                if (!going_on(stage, double(confirmed) / double(of))) stopped = true;
                trial.out_of_time = seconds_since(begin) > limit;
                return !stopped && !trial.out_of_time;
            };
        // The first run fetches memory, measures a cell's costs and learns how far repairs reach: it does not count.
        for (double total = 0;
             index(seconds.size()) <= most_runs && (seconds.size() < 2 || total < seconds_of_repeating);
             total += seconds.back()) {
            begin = Clock::now();
            trial.report = evaluate(recurrence, found, options);
            seconds.push_back(seconds_since(begin));
            if (stopped) throw NotConverged("the analysis was stopped");
            if (trial.out_of_time || seconds.back() > limit / 4) break;
        }
        if (seconds.size() > 1) seconds.erase(seconds.begin());
        std::sort(seconds.begin(), seconds.end());
        trial.seconds = seconds[seconds.size() / 2];
        trial.difference = trial.right() ? difference(found) : std::numeric_limits<double>::quiet_NaN();
        return trial;
    }

    double difference(const Buffer<T>& found) const {
        double largest = 0;
        for (index i = 0; i < found.shape().steps; ++i)
            for (index j = 0; j < shape().batch; ++j)
                for (index k = 0; k < shape().width; ++k) {
                    const double apart = std::abs(double(found(i, j, k)) - double(trajectory_(i, j, k)));
                    largest = scalar_functions::larger_or_nan(largest, apart);
                }
        return largest_ > 0 ? largest / largest_ : largest;
    }

    void count_channels(const ChannelwiseRecurrence<T>& cell) {
        if (result_.forgetting < 0) return;
        result_.channels_that_pay = 0;
        const int threads = device::thread_count(options_.execution);
        const StepCosts& costs = step_costs(cell, threads);
        const auto pays = [&](index channels) {
            const Plan plan = plan_chunks(costs, shape().steps, 1, channels, result_.forgetting, 0, threads);
            return !lanes_are_full(1, channels, threads) && plan.pays();
        };
        for (index channels = 1; pays(channels); ++channels) result_.channels_that_pay = channels;
    }

    const Recurrence<T>& recurrence_;
    const AnalysisOptions& analysis_options_;
    Options options_;
    std::vector<index> sequences_;
    Buffer<T> trajectory_;
    double largest_ = 0;  // of the trajectory
    double shown_ = 0;    // of the progress
    Workspace workspace_;
    Analysis result_;
};

}  // namespace
}  // namespace newton

const Trial& Analysis::fastest() const {
    const Trial* best = &trials.front();
    for (const Trial& trial : trials)
        if (trial.right() && trial.seconds < best->seconds) best = &trial;
    return *best;
}

template <class T>
Analysis analyse(const Recurrence<T>& recurrence, const AnalysisOptions& options) {
    newton::check_options(options.evaluation);
    newton::require_alone(options.evaluation);
    if (!(options.seconds > 0))
        throw InvalidArgument("options.seconds", "a number above 0", std::to_string(options.seconds));
    if (recurrence.shape().count() < 1)
        throw InvalidArgument("recurrence", "at least one step, sequence and number", to_string(recurrence.shape()));
    return newton::Analyst<T>(recurrence, options).run();
}

template Analysis analyse(const Recurrence<float>&, const AnalysisOptions&);
template Analysis analyse(const Recurrence<double>&, const AnalysisOptions&);

}  // namespace deeppcr
