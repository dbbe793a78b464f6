// Newton's method over a sliding window. Each pass reads: linearise, test, (report and slide), solve, update. It ends
//   converged              every row of every sequence passed the residual test
//   non_finite             f of a confirmed state is not finite: the sequence ends there, as it does sequentially
//   max_iterations         the limit, or the caller's `progress`, said stop, also step after step
//   finished_sequentially  no progress even after the window was shortened, or passes that take longer than the rest
//                          would (where the method was chosen): step after step from the confirmed prefix

#include <deeppcr/evaluate.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>

#include "device/cuda.hpp"
#include "device/threads.hpp"
#include "newton/across_ranks.hpp"
#include "newton/anderson.hpp"
#include "newton/automatic.hpp"
#include "newton/estimate.hpp"
#include "newton/fused.hpp"
#include "newton/fused_gpu.hpp"
#include "newton/lyapunov.hpp"
#include "newton/newton_gpu.hpp"
#include "newton/options.hpp"
#include "newton/overlap.hpp"
#include "newton/review.hpp"
#include "newton/stopwatch.hpp"
#include "newton/update.hpp"
#include "reduce/damped.hpp"

namespace deeppcr {
namespace newton {
namespace {

constexpr double first_damping = 1, more_damping = 3, less_damping = 0.1, least_damping = 1e-4;
constexpr index sequential_piece = 1024;  // steps between two copies to the caller's array
constexpr double piece_seconds = 0.05;    // of a sequential evaluation that tells how far it is

/// One evaluation. Rows count from `first_`, the step that every active sequence has confirmed.
template <class T>
class Evaluator {
public:
    /// patience: as Choice has it.
    Evaluator(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options, double patience,
              Workspace& workspace)
        : recurrence_(recurrence),
          trajectory_(trajectory),
          options_(options),
          patience_(patience),
          workspace_(workspace),
          tolerance_(tolerance_of<T>(options)),
          steps_(recurrence.shape().steps),
          width_(recurrence.shape().width),
          block_(jacobian_block(recurrence, options.surrogate)) {
        report_.sequences.resize(std::size_t(recurrence.shape().batch));
        active_.resize(report_.sequences.size());
        std::iota(active_.begin(), active_.end(), index(0));
        report_.method = describe(options);
    }

    Report run() {
        if (!trajectory_.empty()) {
            if (options_.method == Method::sequential) {
                std::vector<Progress> none(active_.size());
                run_sequentially(none, Status::converged);
            } else {
                run_newton();
            }
        }
        summarise();
        report_.seconds = seconds_since(begin_);
        report_.workspace_bytes = workspace_.peak_bytes();
        return std::move(report_);
    }

private:
    index batch() const { return index(active_.size()); }

    Section section(index first, index last) const { return {first, last, active_, options_.execution}; }

    void run_newton() {
        window_ = window_length<T>(recurrence_, options_, block_);
        next_window_ = report_.window = window_;
        const Workspace::Scope scope(workspace_);
        const Shape whole{window_, batch(), width_};
        states_memory_ = workspace_.take<T>(Shape{window_ + 1, batch(), width_}.count());
        after_memory_ = workspace_.take<T>(whole.count());
        update_memory_ = workspace_.take<T>(whole.count());
        if (block_ > 0) jacobian_memory_ = workspace_.take<T>(whole.count() * block_);
        if (estimating()) error_memory_ = workspace_.take<T>(whole.count() + batch() * width_);
        if (estimating()) std::fill_n(error_memory_, batch() * width_, T(0));
        if (options_.estimates != Estimates::none && block_ > 0 && (estimating() || block_ == recurrence_.block()))
            lyapunov_.emplace(width_, block_, options_.estimates == Estimates::full);
        if (options_.anderson > 0) anderson_.emplace(options_.anderson, whole.count(), workspace_);
        damped_ = options_.damping > 0;

        progress_.assign(active_.size(), {});
        recurrence_.initial(section(0, 0), states().steps(0, 1));
        enter_rows(0);
        review_ = {};
        while (true) {
            linearise();
            test();
            if (active_.empty()) return;
            if (const std::optional<Status> stop = outcome()) return give_up(*stop);
            solve_update();
            apply();
            slide();
        }
    }

    /// Rows of the window at hand.
    index rows() const { return std::min(window_, steps_ - first_); }
    View<T> states() const { return {states_memory_, {rows() + 1, batch(), width_}}; }
    Window<T> window() const {
        const Shape shape{rows(), batch(), width_};
        return {states(), View<T>(after_memory_, shape),
                block_ > 0 ? Jacobian<T>(jacobian_memory_, shape, block_) : Jacobian<T>(),
                View<T>(update_memory_, shape)};
    }
    /// Only the true Jacobian carries an error from step to step.
    bool estimating() const {
        return options_.estimates != Estimates::none && block_ > 0 && options_.surrogate == Surrogate::full;
    }

    void linearise() {
        const Stopwatch watch(report_.linearise.seconds);
        const Window<T> now = window();
        const Section where = section(first_, first_ + rows());
        const View<const T> before = states().steps(0, rows());
        const index elements = rows() * batch() * width_;
        report_.linearise.bytes += elements * (2 + (block_ > 0 ? block_ : 0)) * index(sizeof(T));
        switch (options_.surrogate) {
            case Surrogate::full:
                return recurrence_.linearise(where, before, now.after, now.jacobian);
            case Surrogate::diagonal:
                return recurrence_.linearise_diagonal(where, before, now.after, now.jacobian);
            case Surrogate::identity:
                std::fill_n(jacobian_memory_, elements, T(1));
                [[fallthrough]];
            case Surrogate::zero:
                return recurrence_.step(where, before, now.after);
        }
    }

    /// Confirms what passes, estimates its error, and lets finished sequences go.
    void test() {
        ++report_.iterations;
        std::vector<index> confirmed_before(progress_.size());
        {
            const Stopwatch watch(report_.update.seconds);
            for (std::size_t j = 0; j < progress_.size(); ++j) confirmed_before[j] = progress_[j].confirmed;
            // One step from confirmed states: f is exact, as sequential evaluation has it.
            for (index j = 0; j < batch() && rows() == 1; ++j)
                if (confirmed_before[std::size_t(j)] == 0)
                    std::copy_n(window().after.at(0, j), width_, window().states.at(1, j));
            report_.non_finite_resets += test_residual(window(), progress_, tolerance_, options_.execution);
            report_.update.bytes += 3 * rows() * batch() * width_ * index(sizeof(T));
        }
        double newly = 0;
        double worst = 0;
        for (std::size_t j = 0; j < progress_.size(); ++j) {
            newly += double(progress_[j].confirmed - confirmed_before[j]);
            worst = std::max(worst, progress_[j].worst);
        }
        review_.add(newly / double(batch()), worst);
        report_.residuals.push_back(worst);

        std::vector<bool> leaving(progress_.size());
        for (std::size_t j = 0; j < progress_.size(); ++j) leaving[j] = leaves(index(j));
        shift_ = rows();
        for (std::size_t j = 0; j < progress_.size(); ++j)
            if (!leaving[j]) shift_ = std::min(shift_, progress_[j].confirmed);
        const bool any_leaving = std::find(leaving.begin(), leaving.end(), true) != leaving.end();
        if (any_leaving || shift_ > 0) {
            const Stopwatch watch(report_.estimate.seconds);
            follow_growth(leaving);
            if (estimating()) estimate_errors(any_leaving ? rows() : shift_);
        }
        if (any_leaving) release(leaving);
        if (options_.progress &&
            !options_.progress(first_ + (active_.empty() ? rows() : shift_), steps_, report_.iterations))
            stopped_ = true;
    }

    /// A sequence leaves when it is done, or when f of its last confirmed state is not finite.
    bool leaves(index j) {
        const index confirmed = progress_[std::size_t(j)].confirmed;
        if (first_ + confirmed == steps_) return true;
        if (confirmed == rows()) return false;
        const T* after = window().after.at(confirmed, j);
        return !std::all_of(after, after + width_, [](T value) { return std::isfinite(value); });
    }

    /// The Jacobians of rows that go are those at the final states: the Lyapunov estimate follows them.
    void follow_growth(const std::vector<bool>& leaving) {
        if (!lyapunov_) return;
        for (index j = 0; j < batch(); ++j)
            lyapunov_->follow(active_[std::size_t(j)], window().jacobian, j,
                              leaving[std::size_t(j)] ? progress_[std::size_t(j)].confirmed : shift_);
    }

    /// First-order error of the confirmed rows among the window's first `count`: e_t = J_t e_{t-1} + r_t.
    void estimate_errors(index count) {
        const Window<T> now = window();
        const View<T> carried(error_memory_, {1, batch(), width_});
        const View<T> errors(error_memory_ + batch() * width_, {count, batch(), width_});
        std::vector<index> confirmed(progress_.size());
        for (std::size_t j = 0; j < progress_.size(); ++j) confirmed[j] = progress_[j].confirmed;
        error_sources<T>(states().steps(1, count + 1), now.after.steps(0, count), first_, block_, confirmed, errors,
                         device::thread_count(options_.execution));
        solve(BidiagonalSystem<T>{now.jacobian.steps(0, count), errors, carried}, errors, solve_options());
        report_.estimate.bytes += count * batch() * width_ * (block_ + 4) * index(sizeof(T));
        for (index j = 0; j < batch(); ++j) {
            double& largest = report_.sequences[std::size_t(active_[std::size_t(j)])].error;
            for (index i = 0; i < std::min(count, confirmed[std::size_t(j)]); ++i)
                raise_error(largest, errors.at(i, j), width_);
        }
        if (shift_ > 0) std::copy_n(errors.at(shift_ - 1, 0), batch() * width_, carried.data());
    }

    /// Writes the leaving sequences' rows to the caller's array and closes their gaps in the window.
    void release(const std::vector<bool>& leaving) {
        for (index j = 0; j < batch(); ++j) {
            if (!leaving[std::size_t(j)]) continue;
            const index sequence = active_[std::size_t(j)];
            const Progress& progress = progress_[std::size_t(j)];
            store(j, 0, progress.confirmed);
            Report::Sequence& result = record(j);
            result.status = result.confirmed == steps_ ? Status::converged : Status::non_finite;
            if (result.status == Status::non_finite) run_past_end(sequence, progress.confirmed, j);
        }
        close_gaps(states_memory_, rows() + 1, width_, leaving);
        close_gaps(after_memory_, rows(), width_, leaving);
        close_gaps(update_memory_, rows(), width_, leaving);
        if (block_ > 0) close_gaps(jacobian_memory_, rows(), width_ * block_, leaving);
        if (estimating()) close_gaps(error_memory_, 1, width_, leaving);
        if (anderson_)
            anderson_->close_gaps([&](T* memory, index count) { close_gaps(memory, count, width_, leaving); });
        index kept = 0;
        for (index j = 0; j < index(leaving.size()); ++j) {
            if (leaving[std::size_t(j)]) continue;
            active_[std::size_t(kept)] = active_[std::size_t(j)];
            progress_[std::size_t(kept)] = progress_[std::size_t(j)];
            ++kept;
        }
        active_.resize(std::size_t(kept));
        progress_.resize(std::size_t(kept));
    }

    /// Removes the leaving sequences' columns from a [count, batch, size] array, in place.
    void close_gaps(T* memory, index count, index size, const std::vector<bool>& leaving) const {
        T* to = memory;
        for (index i = 0; i < count; ++i)
            for (index j = 0; j < index(leaving.size()); ++j) {
                if (leaving[std::size_t(j)]) continue;
                const T* from = memory + (i * index(leaving.size()) + j) * size;
                if (from != to) std::copy_n(from, size, to);
                to += size;
            }
    }

    /// The states after f ceases to be finite are those that sequential evaluation has.
    void run_past_end(index sequence, index confirmed, index j) {
        std::vector<T> state(states().at(confirmed, j), states().at(confirmed, j) + width_);
        const index one[] = {sequence};
        run_pieces(first_ + confirmed, steps_, one, state.data(), {});
    }

    /// Evaluates [first, last) of the listed sequences from `state` [1, sequences, width] on, which ends as the last,
    /// unless `progress` stops it. Returns the step where it ends.
    index run_pieces(index first, index last, std::span<const index> sequences, T* state,
                     const std::function<bool(index, index, index)>& progress) {
        const Stopwatch watch(report_.sequential.seconds);
        const index count = index(sequences.size());
        const Workspace::Scope scope(workspace_);
        const index longest =
            std::min(last - first, window_ > 0 ? std::min(window_, sequential_piece) : sequential_piece);
        index piece = progress ? 1 : longest;
        // All sequences at once are written where they belong.
        const bool in_place =
            trajectory_.contiguous() && count == trajectory_.batch() && std::ranges::is_sorted(sequences);
        T* memory = in_place ? nullptr : workspace_.take<T>(Shape{longest, count, width_}.count());
        for (index begin = first, end = first; begin < last; begin = end) {
            const Clock::time_point started = Clock::now();
            end = std::min(last, begin + piece);
            const View<T> rows =
                in_place ? trajectory_.steps(begin, end) : View<T>(memory, {end - begin, count, width_});
            recurrence_.run({begin, end, sequences, options_.execution}, View<const T>(state, {1, count, width_}),
                            rows);
            for (index i = begin; i < end && !in_place; ++i)
                for (index j = 0; j < count; ++j)
                    std::copy_n(rows.at(i - begin, j), width_, trajectory_.at(i, sequences[std::size_t(j)]));
            std::copy_n(rows.at(end - begin - 1, 0), count * width_, state);
            report_.sequential.bytes += (end - begin) * count * width_ * index(sizeof(T));
            if (progress && !progress(end, steps_, report_.iterations)) {
                stopped_ = true;
                return end;
            }
            if (seconds_since(started) < piece_seconds) piece = std::min(longest, 2 * piece);
        }
        return last;
    }

    std::optional<Status> outcome() {
        if (stopped_) return Status::max_iterations;
        if (options_.max_iterations > 0 && report_.iterations >= options_.max_iterations)
            return options_.on_failure == OnFailure::finish ? Status::finished_sequentially : Status::max_iterations;
        if (seconds_since(begin_) > patience_ * double(steps_ - first_ - shift_)) return Status::finished_sequentially;
        if (report_.iterations % review_period != 0) return {};
        const bool good = review_.conclude(rows(), window_, report_.window_shrinks > 0);
        if (good || window_ == 1) return {};
        if (!damped_ && block_ > 0 && options_.damping < 0) {
            damped_ = true;
            return {};
        }
        const index shorter = shorter_window();
        if (shorter < smallest_window)
            return options_.on_failure == OnFailure::finish ? Status::finished_sequentially : Status::max_iterations;
        next_window_ = shorter;
        ++report_.window_shrinks;
        return {};
    }

    /// Between an eighth and a half of the window.
    index shorter_window() const {
        const index half = rows() / 2;
        if (options_.surrogate != Surrogate::full) return half;
        LyapunovEstimate<T> here(width_, block_);
        for (index j = 0; j < batch(); ++j) here.follow(j, window().jacobian, j, std::min(rows(), rows_to_follow));
        return shortened_window<T>(half, here.exponent());
    }

    void solve_update() {
        if (options_.surrogate == Surrogate::zero) return;
        const Stopwatch watch(report_.reduce.seconds);
        const Window<T> now = window();
        const index last = rows();
        const Jacobian<T> jacobian = now.jacobian.steps(shift_, last);
        const View<T> update = now.update.steps(shift_, last);
        if (damped_ && choose_damping()) {
            ++report_.damped_passes;
            reduce::solve_damped<T>(jacobian, update, damping_, 0, device::thread_count(options_.execution));
        } else {
            solve(BidiagonalSystem<T>{jacobian, update}, update, solve_options());
        }
        report_.reduce.bytes += (last - shift_) * batch() * width_ * (block_ + 2) * index(sizeof(T));
    }

    /// Levenberg-Marquardt: more damping where the residual has grown since the last pass, less where it has shrunk.
    /// False where no sequence needs any. Makes what is confirmed, and the first row that is not, the fixed start of
    /// the damped system, as `apply` will.
    bool choose_damping() {
        const Window<T> now = window();
        damping_.assign(progress_.size(), 0.0);
        bool any = false;
        for (index j = 0; j < batch(); ++j) {
            Progress& sequence = progress_[std::size_t(j)];
            double sum = 0;
            for (index i = sequence.confirmed; i < rows(); ++i)
                for (index k = 0; k < width_; ++k) sum += double(now.update(i, j, k)) * double(now.update(i, j, k));
            const double merit = sum;
            if (sequence.merit == std::numeric_limits<double>::infinity())
                sequence.damping = options_.damping > 0 ? options_.damping : first_damping;
            else
                sequence.damping *= merit < sequence.merit ? less_damping : more_damping;
            sequence.merit = merit;
            if (sequence.damping < least_damping) sequence.damping = 0;
            damping_[std::size_t(j)] = sequence.damping;
            any = any || sequence.damping > 0;
        }
        if (!any) return false;
        for (index j = 0; j < batch(); ++j) {
            const index fixed = progress_[std::size_t(j)].confirmed;
            if (fixed + 1 >= rows()) continue;
            T* const entry = now.jacobian.at(fixed + 1, j);
            for (index row = 0; row < width_; ++row)
                for (index k = 0; k < block_; ++k)
                    now.update(fixed + 1, j, row) +=
                        entry[row * block_ + k] * now.update(fixed, j, row / block_ * block_ + k);
            std::fill_n(entry, width_ * block_, T(0));
        }
        return true;
    }

    void apply() {
        const Stopwatch watch(report_.update.seconds);
        if (anderson_) anderson_->accelerate(window(), progress_, device::thread_count(options_.execution));
        report_.non_finite_resets += apply_update(window(), progress_, options_.execution);
        report_.update.bytes += 3 * rows() * batch() * width_ * index(sizeof(T));
    }

    /// Writes out the rows that all active sequences have confirmed and moves the window to the first that they
    /// have not; new rows enter at its end.
    void slide() {
        const Stopwatch watch(report_.update.seconds);
        const index kept = rows() - shift_;
        for (index j = 0; j < batch(); ++j) store(j, 0, shift_);
        if (anderson_) anderson_->slide(shift_, rows(), batch() * width_);
        if (shift_ > 0)
            std::copy_n(states_memory_ + shift_ * batch() * width_, (kept + 1) * batch() * width_, states_memory_);
        index longest = 1;
        for (Progress& sequence : progress_) {
            sequence.confirmed -= shift_;
            longest = std::max(longest, sequence.confirmed);
        }
        first_ += shift_;
        window_ = std::max(next_window_, longest);  // a shorter window still holds all that is confirmed
        if (rows() > kept) enter_rows(kept);
    }

    /// First guesses for the window's rows from `row` on.
    void enter_rows(index row) {
        const View<T> all = states();
        const View<T> entering = all.steps(row + 1, rows() + 1);
        if (entering.steps() == 0) return;
        if (options_.guess == Guess::given) {
            for (index i = 0; i < entering.steps(); ++i)
                for (index j = 0; j < batch(); ++j)
                    std::copy_n(trajectory_.at(first_ + row + i, active_[std::size_t(j)]), width_, entering.at(i, j));
            return;
        }
        // Later windows start from the last state that there is.
        for (index i = 0; i < entering.steps(); ++i) std::copy_n(all.at(row, 0), batch() * width_, entering.at(i, 0));
        if (options_.guess == Guess::first_step) {
            const View<T> result(after_memory_, entering.shape());
            recurrence_.step(section(first_ + row, first_ + rows()), View<const T>(entering), result);
            std::copy_n(after_memory_, entering.steps() * batch() * width_, entering.data());
        }
    }

    /// Copies rows [begin, end) of one active sequence to the caller's array.
    void store(index j, index begin, index end) const {
        for (index i = begin; i < end; ++i)
            std::copy_n(states().at(i + 1, j), width_, trajectory_.at(first_ + i, active_[std::size_t(j)]));
    }

    Report::Sequence& record(index j) {
        const Progress& progress = progress_[std::size_t(j)];
        Report::Sequence& result = report_.sequences[std::size_t(active_[std::size_t(j)])];
        result.confirmed = first_ + progress.confirmed;
        result.iterations = report_.iterations;
        result.residual = progress.residual;
        result.relative_residual = progress.relative_residual;
        return result;
    }

    void give_up(Status status) {
        for (index j = 0; j < batch(); ++j) {
            record(j).status = status;
            store(j, 0, status == Status::finished_sequentially ? progress_[std::size_t(j)].confirmed : rows());
        }
        if (status != Status::finished_sequentially) return;
        report_.method += ", then sequential";
        run_sequentially(progress_, status);
    }

    /// Step after step from each active sequence's confirmed prefix to the end: the sequences with the shortest
    /// prefix begin, the others join where theirs ends.
    void run_sequentially(const std::vector<Progress>& progress, Status status) {
        const Workspace::Scope scope(workspace_);
        const std::vector<index> all = active_;
        std::vector<index> order(all.size());
        std::iota(order.begin(), order.end(), index(0));
        std::stable_sort(order.begin(), order.end(), [&](index a, index b) {
            return progress[std::size_t(a)].confirmed < progress[std::size_t(b)].confirmed;
        });
        T* state = workspace_.take<T>(index(all.size()) * width_);
        std::vector<index> running;
        for (std::size_t next = 0; next < order.size() && !stopped_;) {
            const index begin = progress[std::size_t(order[next])].confirmed;
            for (; next < order.size() && progress[std::size_t(order[next])].confirmed == begin; ++next) {
                const index sequence = all[std::size_t(order[next])];
                T* entering = state + index(running.size()) * width_;
                running.push_back(sequence);
                if (options_.method == Method::newton)
                    std::copy_n(states().at(begin, order[next]), width_, entering);
                else {
                    const index one[] = {sequence};
                    recurrence_.initial({0, 0, one, options_.execution}, View<T>(entering, {1, 1, width_}));
                }
                report_.sequences[std::size_t(sequence)].status = status;
            }
            const index end = next < order.size() ? first_ + progress[std::size_t(order[next])].confirmed : steps_;
            const index done = run_pieces(first_ + begin, end, running, state, options_.progress);
            report_.sequential_steps += (done - first_ - begin) * index(running.size());
            for (const index sequence : running) report_.sequences[std::size_t(sequence)].confirmed = done;
        }
        for (const index sequence : all) {
            Report::Sequence& result = report_.sequences[std::size_t(sequence)];
            const T* last = trajectory_.at(result.confirmed - 1, sequence);
            if (result.confirmed < steps_) result.status = Status::max_iterations;
            for (index step = result.confirmed; step < steps_; ++step)
                std::copy_n(last, width_, trajectory_.at(step, sequence));
            if (std::all_of(last, last + width_, [](T value) { return std::isfinite(value); })) continue;
            result.status = Status::non_finite;
            result.confirmed = 0;
            while (std::all_of(trajectory_.at(result.confirmed, sequence),
                               trajectory_.at(result.confirmed, sequence) + width_,
                               [](T value) { return std::isfinite(value); }))
                ++result.confirmed;
        }
    }

    void summarise() {
        for (const Report::Sequence& sequence : report_.sequences) {
            report_.status = std::max(report_.status, sequence.status);
            report_.residual = std::max(report_.residual, sequence.residual);
            report_.relative_residual = std::max(report_.relative_residual, sequence.relative_residual);
        }
        constexpr double unknown = std::numeric_limits<double>::quiet_NaN();
        report_.lyapunov = lyapunov_ ? lyapunov_->exponent() : unknown;
        for (Report::Sequence& sequence : report_.sequences) {
            // Steps that were finished sequentially have no Jacobians at hand.
            if (!estimating() || options_.method == Method::sequential ||
                sequence.status == Status::finished_sequentially)
                sequence.error = unknown;
            const bool known = !std::isnan(sequence.error) && !std::isnan(report_.error);
            report_.error = known ? std::max(report_.error, sequence.error) : unknown;
        }
    }

    SolveOptions solve_options() const {
        return {options_.reduction, options_.execution, options_.chunk, &workspace_, options_.tensor_cores};
    }

    const Recurrence<T>& recurrence_;
    View<T> trajectory_;
    const Options& options_;
    double patience_;
    Workspace& workspace_;
    Tolerance tolerance_;
    index steps_, width_, block_;
    Report report_;
    const Clock::time_point begin_ = Clock::now();

    std::vector<index> active_;       // sequences that still run; column j of the window is active_[j]
    std::vector<Progress> progress_;  // of the active sequences
    index first_ = 0;                 // steps before the window, confirmed and written out
    index window_ = 0;                // rows at most, of this pass
    index next_window_ = 0;           // and of the next
    index shift_ = 0;                 // leading rows that all active sequences have confirmed
    bool stopped_ = false;
    bool damped_ = false;
    std::vector<double> damping_;  // of the active sequences
    Review review_;
    std::optional<LyapunovEstimate<T>> lyapunov_;
    std::optional<Anderson<T>> anderson_;
    T *states_memory_ = nullptr, *after_memory_ = nullptr, *update_memory_ = nullptr, *jacobian_memory_ = nullptr,
      *error_memory_ = nullptr;
};

}  // namespace
}  // namespace newton

namespace newton {
namespace {

/// By options.method, one that every recurrence knows.
template <class T>
Report evaluate_by(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options,
                   double patience = std::numeric_limits<double>::infinity()) {
    if (options.method == Method::overlap) return evaluate_by_overlap(recurrence, trajectory, options);
    if (options.execution.backend == Backend::cuda)
        return evaluate_newton_on_gpu(recurrence, trajectory, options, patience);
    Workspace own;
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    return Evaluator<T>(recurrence, trajectory, options, patience, workspace).run();
}

template <class T>
Report evaluate_by_choice(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    if (options.execution.backend == Backend::cuda) {
        check_gpu_arguments(recurrence, options);
        device::require_on_gpu("trajectory", trajectory.data());
    }
    const Clock::time_point begin = Clock::now();
    Choice choice = choose(recurrence, options);
    const double choosing = seconds_since(begin);
    Options chosen = options;
    chosen.method = choice.method;
    Report report = evaluate_by(recurrence, trajectory, chosen, choice.patience);
    learn_from(recurrence, options, choice, report, seconds_since(begin) - choosing);
    report.candidates = std::move(choice.candidates);
    report.seconds += choosing;
    return report;
}

template <class T>
Report evaluate_checked(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    if (is_shared(options)) return evaluate_across_ranks(recurrence, trajectory, options);
    check_arguments<T>(recurrence, trajectory, options);
    const auto* const cell = dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence);
    if (options.method == Method::shooting && cell == nullptr)
        throw InvalidArgument("options.method",
                              "automatic, newton, overlap or sequential, as the recurrence is not a cell's",
                              to_string(options.method));
    const bool on_gpu = options.execution.backend == Backend::cuda;
    if (on_gpu && cell != nullptr && options.method == Method::newton)
        throw InvalidArgument("options.method", fused_methods, to_string(options.method));
    Options chosen = options;
    if (options.method == Method::automatic || (options.method == Method::overlap && trajectory.empty()))
        chosen.method = Method::newton;
    Report report;
    std::optional<Workspace::Use> use;
    if (on_gpu && options.workspace != nullptr) use.emplace(*options.workspace, options.execution);
    if (on_gpu && trajectory.empty()) {
        report.method = describe(chosen);
        report.sequences.resize(std::size_t(recurrence.shape().batch));
    } else if (cell != nullptr && options.method != Method::newton) {
        report = on_gpu ? evaluate_on_gpu(*cell, trajectory, options) : evaluate_fused(*cell, trajectory, options);
    } else if (leaves_choice(options) && !trajectory.empty()) {
        report = evaluate_by_choice(recurrence, trajectory, options);
    } else {
        report = evaluate_by(recurrence, trajectory, chosen);
    }
    if (options.estimates == Estimates::full && std::isnan(report.error) && !on_gpu)
        estimate_along<T>(recurrence, trajectory, options, report);
    raise_failure(report, options, recurrence.shape().steps);
    return report;
}

}  // namespace

void raise_failure(const Report& report, const Options& options, index steps) {
    if (options.on_failure != OnFailure::raise || report.ok()) return;
    index confirmed = steps;
    for (const Report::Sequence& sequence : report.sequences) confirmed = std::min(confirmed, sequence.confirmed);
    throw NotConverged("the evaluation ended as " + to_string(report.status) + " after " +
                       std::to_string(report.iterations) + " iterations: " + std::to_string(confirmed) + " of " +
                       std::to_string(steps) + " steps are confirmed");
}

}  // namespace newton

template <>
Report evaluate(const Recurrence<float>& recurrence, View<float> trajectory, const Options& options) {
    return newton::evaluate_checked(recurrence, trajectory, options);
}
template <>
Report evaluate(const Recurrence<double>& recurrence, View<double> trajectory, const Options& options) {
    return newton::evaluate_checked(recurrence, trajectory, options);
}

}  // namespace deeppcr
