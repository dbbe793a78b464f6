// Evaluation where a group of processes shares the steps. A pass of Newton's method reads: receive the state before the
// part, linearise, test, agree, solve across the ranks, update. It ends as in evaluate.cpp, on all ranks at once; what
// it cannot finish is finished rank after rank. A rank with a problem takes part in what is collective until the others
// know.
#include "newton/across_ranks.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "device/cuda.hpp"
#include "device/states.hpp"
#include "device/threads.hpp"
#include "newton/estimate.hpp"
#include "newton/lyapunov.hpp"
#include "newton/newton_gpu.hpp"
#include "newton/options.hpp"
#include "newton/review.hpp"
#include "newton/stopwatch.hpp"
#include "newton/trajectory.hpp"
#include "newton/update.hpp"
#include "newton/update_gpu.hpp"
#include "reduce/across_ranks.hpp"

namespace deeppcr::newton {
namespace {

constexpr index piece = 256;                       // steps that are run at once, before a look at what came out
constexpr index fetched_entries = index(1) << 20;  // of Jacobians on a GPU, for the Lyapunov exponent
constexpr double infinity = std::numeric_limits<double>::infinity();

/// Bit by bit, so that NaN is equal to itself; both contiguous.
template <class T>
bool same_states(View<const T> a, View<const T> b) {
    return std::memcmp(a.data(), b.data(), std::size_t(a.shape().count()) * sizeof(T)) == 0;
}

template <class T>
bool all_finite(const T* values, index count) {
    return std::all_of(values, values + count, [](T value) { return std::isfinite(value); });
}

/// Every rank's `last` becomes the next one's `before`; both contiguous. The first one's stays.
template <class T>
void hand_on(Group& group, View<const T> last, const View<T>& before) {
    const int rank = group.rank(), next = rank + 1 < group.size() ? rank + 1 : -1;
    const std::size_t count = std::size_t(before.shape().count());
    group.pass(next, std::span(last.data(), count), rank - 1, std::span(before.data(), count));
}

bool is_on_gpu(const Options& options) { return options.execution.backend == Backend::cuda; }

/// States on the GPU, as `host` has them.
template <class T>
Buffer<T> on_gpu(View<const T> host) {
    Buffer<T> copy(host.shape());
    copy_states<T>(host, copy.view(), {});
    return copy.on(device::current_gpu());
}

/// x_0 of the listed rows, in main memory. On a GPU of a cell, or of all rows.
template <class T>
void initial_states(const Recurrence<T>& recurrence, std::span<const index> rows, const View<T>& states,
                    const Options& options) {
    const Section section{0, 0, rows, options.execution};
    if (!is_on_gpu(options)) return recurrence.initial(section, states);
    const auto* const cell = dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence);
    if (cell == nullptr) {
        const auto there = Buffer<T>::uninitialised(states.shape(), Layout::steps_first, device::current_gpu());
        recurrence.initial(section, there.view());
        return device::fetch<T>(there.view(), states, options.execution);
    }
    std::fill_n(states.data(), states.shape().count(), T(0));
    const View<const T> given = cell->initial_states();
    for (std::size_t p = 0; p < cell->parts().size() && !given.empty(); ++p) {
        const auto row = std::find(rows.begin(), rows.end(), cell->parts()[p].sequence);
        const index to = row - rows.begin();
        if (cell->parts()[p].first == 0 && row != rows.end())
            device::fetch<T>(given.sequences(index(p), index(p) + 1), states.sequences(to, to + 1), options.execution);
    }
}

/// The rows whose sequence begins with this part, on a rank after the first: nothing comes from the rank before.
template <class T>
class Beginnings {
public:
    Beginnings() = default;
    Beginnings(const Recurrence<T>& recurrence, const Options& options) {
        const auto* const cell = dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence);
        if (cell == nullptr || options.group->rank() == 0 || cell->named_first_steps().empty()) return;
        rows_ = cell->named_first_steps();
        states_ = Buffer<T>({1, index(rows_.size()), recurrence.shape().width});
        initial_states<T>(recurrence, rows_, states_, options);
    }
    /// before: what the rank before has handed on, [1,batch,width].
    void replace(const View<T>& before) const {
        for (std::size_t i = 0; i < rows_.size(); ++i)
            std::copy_n(states_.view().at(0, index(i)), before.width(), before.at(0, rows_[i]));
    }
    /// before: what would be handed back to the rank before.
    void clear(const View<T>& before) const {
        for (const index row : rows_) std::fill_n(before.at(0, row), before.width(), T(0));
    }
    /// first: the Jacobians of the part's first step.
    void cut(const Jacobian<T>& first) const {
        for (const index row : rows_) std::fill_n(first.at(0, row), first.width() * first.block(), T(0));
    }

private:
    std::vector<index> rows_;
    Buffer<T> states_;
};

/// What all ranks must share, in a form that shows by a maximum whether they do.
template <class T>
void require_shared(const Recurrence<T>& recurrence, const Options& options, std::exception_ptr& problem) {
    const Shape& shape = recurrence.shape();
    std::vector<index> shared = {shape.batch,
                                 shape.width,
                                 recurrence.block(),
                                 index(options.method),
                                 index(options.surrogate),
                                 index(options.guess),
                                 index(options.on_failure),
                                 index(options.estimates),
                                 options.max_iterations};
    const std::size_t count = shared.size();
    for (std::size_t i = 0; i < count; ++i) shared.push_back(-shared[i]);
    shared.push_back(problem ? 1 : 0);
    options.group->maximum(std::span<index>(shared));
    if (shared.back() != 0) options.group->agree(problem);
    for (std::size_t i = 0; i < count; ++i)
        if (shared[i] != -shared[count + i])
            throw InvalidArgument("options.group", "recurrences of the same kind and the same options on every rank",
                                  "others on " + to_string(*options.group));
}

void require_no_window(const Options& options) {
    if (options.window > 0)
        throw InvalidArgument("options.window", "0 with options.group: each part is one",
                              std::to_string(options.window));
}

/// Keeps the state that a recurrence starts from.
template <class T>
class Continued final : public Recurrence<T> {
public:
    Continued(const Recurrence<T>& recurrence, View<const T> before)
        : Recurrence<T>(recurrence.shape(), recurrence.block()), recurrence_(recurrence), before_(before) {}
    void initial(const Section& section, View<T> state) const override {
        for (index j = 0; j < section.batch(); ++j)
            std::copy_n(before_.at(0, section.sequences[std::size_t(j)]), state.width(), state.at(0, j));
    }
    void step(const Section& section, View<const T> before, View<T> after) const override {
        recurrence_.step(section, before, after);
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        recurrence_.linearise(section, before, after, jacobian);
    }
    void run(const Section& section, View<const T> state, View<T> trajectory) const override {
        recurrence_.run(section, state, trajectory);
    }

private:
    const Recurrence<T>& recurrence_;
    View<const T> before_;
};

template <class T>
class SharedEvaluation {
public:
    SharedEvaluation(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options, Workspace& workspace)
        : recurrence_(recurrence),
          trajectory_(trajectory),
          options_(options),
          group_(*options.group),
          workspace_(workspace),
          tolerance_(tolerance_of<T>(options)),
          steps_(recurrence.shape().steps),
          batch_(recurrence.shape().batch),
          width_(recurrence.shape().width),
          block_(jacobian_block(recurrence, options.surrogate)),
          sequences_(std::size_t(batch_)) {
        std::iota(sequences_.begin(), sequences_.end(), index(0));
        report_.lyapunov = report_.error = std::numeric_limits<double>::quiet_NaN();
    }

    /// problem: what the caller's checks have found.
    Report run(std::exception_ptr problem) {
        std::optional<Workspace::Use> use;
        const Workspace::Scope scope(workspace_);
        problem_ = std::move(problem);
        attempt([&] {
            use.emplace(workspace_, options_.execution);
            take_memory();
            beginnings_ = Beginnings<T>(recurrence_, options_);
        });
        require_shared(recurrence_, options_, problem_);
        place_part();
        report_.method = by_parts() ? to_string(options_.method) : describe(options_);
        report_.method += ", on " + std::to_string(group_.size()) + " ranks";
        report_.sequences.assign(std::size_t(batch_), {.error = std::numeric_limits<double>::quiet_NaN()});
        progress_.assign(std::size_t(batch_), {});
        confirmed_.assign(std::size_t(batch_), 0);
        ended_.assign(std::size_t(batch_), false);
        if (recurrence_.shape().count() > 0) {
            share_initial_state();
            if (options_.method == Method::sequential)
                finish_sequentially(Status::converged);
            else if (by_parts())
                run_by_parts();
            else
                run_newton();
        }
        summarise();
        report_.seconds = seconds_since(begin_);
        report_.workspace_bytes = workspace_.peak_bytes();
        raise_failure(report_, options_, all_steps_);
        return std::move(report_);
    }

private:
    bool by_parts() const { return options_.method == Method::overlap || options_.method == Method::shooting; }
    bool newton() const { return options_.method == Method::newton; }
    bool on_gpu() const { return is_on_gpu(options_); }
    /// Null: it is none.
    const ChannelwiseRecurrence<T>* cell() const { return dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence_); }
    /// Does what may throw on one rank alone; the others learn of it when they next agree.
    template <class Body>
    void attempt(const Body& body) {
        if (!problem_) problem_ = caught(body);
    }
    Section section(index first, index last) const {
        return {first, last, sequences_, options_.execution, on_gpu() ? &workspace_ : nullptr};
    }
    /// The state before the part, from the rank before.
    void receive(View<const T> last, const View<T>& before) {
        hand_on<T>(group_, last, before);
        beginnings_.replace(before);
    }
    View<T> states() const { return {states_memory_, {steps_ + 1, batch_, width_}}; }
    /// The state before the part, and the one that the rank before has handed on last; in main memory.
    View<T> state_before() const { return before_.view(); }
    View<T> handed() const { return handed_.view(); }
    /// A copy of the part's last state in main memory.
    View<const T> last_state() { return last_state(trajectory_.steps(steps_ - 1, steps_)); }
    View<const T> last_state(View<const T> state) {
        attempt([&] { device::fetch<T>(state, last_.view(), options_.execution); });
        return last_.view();
    }
    Window<T> window() const {
        const Shape& shape = recurrence_.shape();
        return {states(), View<T>(after_memory_, shape),
                block_ > 0 ? Jacobian<T>(jacobian_memory_, shape, block_) : Jacobian<T>(),
                View<T>(update_memory_, shape)};
    }
    bool estimating() const {
        return options_.estimates != Estimates::none && block_ > 0 && options_.surrogate == Surrogate::full;
    }
    SolveOptions solve_options() const {
        return {options_.reduction, options_.execution, options_.chunk, &workspace_, options_.tensor_cores, &group_};
    }

    void take_memory() {
        if (newton()) {
            Options whole = options_;
            whole.window = std::max<index>(1, steps_);
            window_length<T>(recurrence_, whole, block_);
        }
        for (Buffer<T>* const row : {&before_, &handed_, &last_}) *row = Buffer<T>({1, batch_, width_});
        if (!newton()) return;
        const index row = batch_ * width_;
        states_memory_ = workspace_.take<T>((steps_ + 1) * row);
        after_memory_ = workspace_.take<T>(steps_ * row);
        update_memory_ = workspace_.take<T>(steps_ * row);
        if (block_ > 0) jacobian_memory_ = workspace_.take<T>(steps_ * row * block_);
        (void)reduce::Part<T>(recurrence_.shape(), std::max<index>(1, block_), solve_options(), workspace_);
    }

    /// Which steps of all these are this rank's.
    void place_part() {
        first_ = steps_;
        const Group::Combine add = [](std::span<const std::byte> earlier, std::span<std::byte> values, bool) {
            *reinterpret_cast<index*>(values.data()) += *reinterpret_cast<const index*>(earlier.data());
        };
        group_.exclusive_scan(std::as_writable_bytes(std::span(&first_, 1)), add);
        if (group_.rank() == 0) first_ = 0;
        all_steps_ = steps_;
        group_.sum(std::span(&all_steps_, 1));
    }

    /// x_0, where every rank's guess begins.
    void share_initial_state() {
        if (group_.rank() == 0) attempt([&] { initial_states<T>(recurrence_, sequences_, state_before(), options_); });
        group_.broadcast(std::span<T>(before_.data(), std::size_t(batch_ * width_)));
        beginnings_.replace(state_before());
    }

    // ------------------------------------------------------------------------------------------------ Newton's method

    void run_newton() {
        report_.window = all_steps_;
        attempt([&] { guess(); });
        while (true) {
            receive(last_state(states().steps(steps_, steps_ + 1)), state_before());
            attempt([&] {
                put_state_before();
                linearise();
            });
            test();
            if (std::all_of(ended_.begin(), ended_.end(), [](bool ended) { return ended; })) break;
            if (const std::optional<Status> stop = outcome()) {
                estimate_errors();
                return give_up(*stop);
            }
            solve_update();
            apply();
        }
        estimate_errors();
        attempt([&] { store(); });
        if (std::any_of(report_.sequences.begin(), report_.sequences.end(),
                        [](const Report::Sequence& sequence) { return sequence.status == Status::non_finite; }))
            finish_sequentially(Status::non_finite);
    }

    void put_state_before() { device::put<T>(state_before(), states().steps(0, 1), options_.execution); }

    void guess() {
        put_state_before();
        const View<T> entering = states().steps(1, steps_ + 1);
        if (options_.guess == Guess::given) return copy_states<T>(trajectory_, entering, options_.execution);
        if (on_gpu())
            repeat_on_gpu<T>(states().steps(0, 1), entering, options_.execution.stream);
        else
            for (index i = 0; i < steps_; ++i) std::copy_n(states_memory_, batch_ * width_, entering.at(i, 0));
        if (options_.guess != Guess::first_step) return;
        const View<T> result(after_memory_, entering.shape());
        recurrence_.step(section(0, steps_), View<const T>(entering), result);
        copy_states<T>(result, entering, options_.execution);
    }

    /// Whether there is nothing to do here: all rows of the sequences that go on are confirmed. Their Jacobians stay.
    bool idle() const { return shift_ == steps_; }

    void linearise() {
        if (idle()) return;
        fill_jacobians();
        if (block_ > 0) beginnings_.cut(window().jacobian.steps(0, 1));
    }
    void fill_jacobians() {
        const Stopwatch watch(report_.linearise.seconds);
        const Window<T> now = window();
        const View<const T> before = states().steps(0, steps_);
        const index elements = steps_ * batch_ * width_;
        report_.linearise.bytes += elements * (2 + block_) * index(sizeof(T));
        switch (options_.surrogate) {
            case Surrogate::full:
                return recurrence_.linearise(section(0, steps_), before, now.after, now.jacobian);
            case Surrogate::diagonal:
                return recurrence_.linearise_diagonal(section(0, steps_), before, now.after, now.jacobian);
            case Surrogate::identity:
                if (on_gpu())
                    fill_ones_on_gpu(jacobian_memory_, elements, options_.execution.stream);
                else
                    std::fill_n(jacobian_memory_, elements, T(1));
                [[fallthrough]];
            case Surrogate::zero:
                return recurrence_.step(section(0, steps_), before, now.after);
        }
    }

    /// What a pass tells the other ranks of a sequence: how far it goes, and the largest residual beyond. The first
    /// entry is of the pass itself: a problem, or that a caller has asked to stop after the last one.
    struct Entry {
        /// 2 * the first step that did not pass + 1; without the 1 where f is not finite there, or where all did
        index reach;
        double worst;
    };
    static constexpr index problem_here = -2, stop_here = -1;

    /// The first step of any rank that did not pass is where the confirmed steps end, for all.
    void test() {
        ++report_.iterations;
        const std::vector<Progress> before = progress_;
        if (!idle())
            attempt([&] {
                const Stopwatch watch(report_.update.seconds);
                report_.non_finite_resets +=
                    on_gpu() ? test_residual_on_gpu(window(), progress_, tolerance_, options_.execution.stream)
                             : test_residual(window(), progress_, tolerance_, options_.execution);
                report_.update.bytes += 3 * steps_ * batch_ * width_ * index(sizeof(T));
            });
        std::vector<Entry> entries = {{problem_ ? problem_here : stopped_ ? stop_here : 0, 0}};
        attempt([&] {
            for (index j = 0; j < batch_; ++j) entries.push_back(entry(j));
        });
        if (problem_) entries.assign(std::size_t(batch_ + 1), {problem_here, 0});
        group_.reduce(std::as_writable_bytes(std::span(entries)),
                      [](std::span<const std::byte> earlier, std::span<std::byte> later, bool) {
                          const auto* const lower = reinterpret_cast<const Entry*>(earlier.data());
                          auto* const values = reinterpret_cast<Entry*>(later.data());
                          for (std::size_t i = 0; i < later.size() / sizeof(Entry); ++i) {
                              values[i].reach = std::min(values[i].reach, lower[i].reach);
                              values[i].worst = std::max(values[i].worst, lower[i].worst);
                          }
                      });
        if (entries[0].reach == problem_here) group_.agree(problem_);
        stop_agreed_ = entries[0].reach == stop_here;
        settle(entries, before);
    }

    Entry entry(index j) const {
        const Progress& here = progress_[std::size_t(j)];
        if (ended_[std::size_t(j)] || idle()) return {2 * all_steps_, 0};
        if (here.confirmed == steps_) return {2 * all_steps_, here.worst};
        const View<T> row = last_.view().sequences(0, 1);
        device::fetch<T>(window().after.steps(here.confirmed, here.confirmed + 1).sequences(j, j + 1), row,
                         options_.execution);
        const bool finite = all_finite(row.data(), width_);
        return {2 * (first_ + here.confirmed) + (finite ? 1 : 0), here.worst};
    }

    void settle(const std::vector<Entry>& entries, const std::vector<Progress>& before) {
        double newly = 0, worst = 0, active = 0;
        index slowest = all_steps_;
        shift_ = steps_;
        for (index j = 0; j < batch_; ++j) {
            const std::size_t at = std::size_t(j);
            if (ended_[at]) continue;
            const Entry& agreed = entries[at + 1];
            const index reached = agreed.reach / 2;
            ++active;
            newly += double(reached - confirmed_[at]);
            worst = std::max(worst, agreed.worst);
            confirmed_[at] = reached;
            Progress& here = progress_[at];
            if (reached <= first_) {  // what passed here stands on steps that may change
                here = before[at];
                here.confirmed = 0;
            }
            if (agreed.reach % 2 == 0) {
                ended_[at] = true;
                Report::Sequence& result = report_.sequences[at];
                result.status = reached == all_steps_ ? Status::converged : Status::non_finite;
                result.iterations = report_.iterations;
                here.confirmed = steps_;  // frozen
                continue;
            }
            slowest = std::min(slowest, reached);
            shift_ = std::min(shift_, here.confirmed);
        }
        review_.add(newly / std::max(active, 1.0), worst);
        report_.residuals.push_back(worst);
        if (options_.progress)
            attempt([&] { stopped_ = stopped_ || !options_.progress(slowest, all_steps_, report_.iterations); });
    }
    /// Rows of this part among the confirmed steps.
    index confirmed_here(index j) const { return std::clamp<index>(confirmed_[std::size_t(j)] - first_, 0, steps_); }

    std::optional<Status> outcome() {
        const bool finish = options_.on_failure == OnFailure::finish;
        const Status failed = finish ? Status::finished_sequentially : Status::max_iterations;
        if (stop_agreed_) return Status::max_iterations;
        if (options_.max_iterations > 0 && report_.iterations >= options_.max_iterations) return failed;
        if (report_.iterations % review_period != 0 || review_.conclude(all_steps_, all_steps_, false)) return {};
        return failed;
    }

    void solve_update() {
        if (options_.surrogate == Surrogate::zero) return;
        const Stopwatch watch(report_.reduce.seconds);
        const Window<T> now = window();
        const View<T> update = now.update.steps(shift_, steps_);
        // Where rows are confirmed here, those of all ranks before are: nothing comes from them.
        const bool begins = group_.rank() == 0 || shift_ > 0;
        solve_across({idle() ? Jacobian<const T>() : now.jacobian.steps(shift_, steps_), update, {}, update}, begins);
        report_.reduce.bytes += (steps_ - shift_) * batch_ * width_ * (block_ + 2) * index(sizeof(T));
    }

    /// This rank's part of a system that all of them share.
    void solve_across(const reduce::OrderedSystem<T>& system, bool begins) {
        const Workspace::Scope scope(workspace_);
        auto part = system.steps() == 0 ? reduce::Part<T>(recurrence_.shape(), block_, solve_options(), workspace_)
                                        : reduce::Part<T>(system, begins, solve_options(), workspace_);
        attempt([&] { part.summarise(); });
        part.scan();
        attempt([&] { part.solve(); });
    }

    void apply() {
        if (idle()) return;
        const Stopwatch watch(report_.update.seconds);
        // Of the first row that is not confirmed, f is known exactly; of one that stands on such rows it is not.
        constexpr index none = -1;
        const auto stands_on_others = [&](index j) {
            return !ended_[std::size_t(j)] && confirmed_[std::size_t(j)] < first_;
        };
        for (index j = 0; j < batch_; ++j)
            if (stands_on_others(j)) progress_[std::size_t(j)].confirmed = none;
        attempt([&] {
            report_.non_finite_resets += on_gpu() ? apply_update_on_gpu(window(), progress_, options_.execution.stream)
                                                  : apply_update(window(), progress_, options_.execution);
        });
        for (index j = 0; j < batch_; ++j)
            if (stands_on_others(j)) progress_[std::size_t(j)].confirmed = 0;
        report_.update.bytes += 3 * steps_ * batch_ * width_ * index(sizeof(T));
    }

    void store() { copy_states<T>(states().steps(1, steps_ + 1), trajectory_, options_.execution); }

    void give_up(Status status) {
        attempt([&] { store(); });
        for (index j = 0; j < batch_; ++j) {
            if (ended_[std::size_t(j)]) continue;
            Report::Sequence& result = report_.sequences[std::size_t(j)];
            result.status = status;
            result.iterations = report_.iterations;
        }
        if (status != Status::finished_sequentially) return;
        report_.method += ", then sequential";
        finish_sequentially(status);
    }

    /// First order: e_t = J_t e_{t-1} + r_t over the confirmed rows. The Lyapunov exponent is that of the first part.
    void estimate_errors() {
        const Stopwatch watch(report_.estimate.seconds);
        const Window<T> now = window();
        std::vector<index> confirmed;
        for (index j = 0; j < batch_; ++j) confirmed.push_back(confirmed_here(j));
        if (options_.estimates != Estimates::none && block_ > 0 && (estimating() || block_ == recurrence_.block())) {
            if (group_.rank() == 0) attempt([&] { report_.lyapunov = exponent(confirmed); });
            group_.broadcast(std::span(&report_.lyapunov, 1));
        }
        if (!estimating()) return;
        attempt([&] {
            const View<T> reached = states().steps(1, steps_ + 1);
            if (on_gpu())
                error_sources_on_gpu<T>(reached, now.after, first_, block_, confirmed, now.update,
                                        options_.execution.stream);
            else
                error_sources<T>(reached, now.after, first_, block_, confirmed, now.update,
                                 device::thread_count(options_.execution));
        });
        solve_across({now.jacobian, now.update, {}, now.update}, group_.rank() == 0);
        std::vector<double> largest(std::size_t(batch_), 0);
        if (on_gpu())
            attempt([&] { largest = largest_errors_on_gpu<T>(now.update, confirmed, options_.execution.stream); });
        for (index j = 0; j < batch_; ++j) {
            double& error = report_.sequences[std::size_t(j)].error;
            error = largest[std::size_t(j)];
            for (index i = 0; i < confirmed[std::size_t(j)] && !on_gpu(); ++i)
                raise_error(error, now.update.at(i, j), width_);
        }
        report_.estimate.bytes += steps_ * batch_ * width_ * (block_ + 4) * index(sizeof(T));
    }

    /// Of the part's confirmed rows; on a GPU of as many as are brought to the host.
    double exponent(std::span<const index> confirmed) const {
        LyapunovEstimate<T> growth(width_, block_);
        const index rows =
            on_gpu() ? std::min(steps_, fetched_entries / std::max<index>(1, batch_ * width_ * block_)) : steps_;
        Jacobian<T> jacobian = window().jacobian;
        std::vector<T> here;
        if (on_gpu() && rows > 0) {
            here.resize(std::size_t(rows * batch_ * width_ * block_));
            device::copy_from_gpu(here.data(), jacobian.data(), index(here.size() * sizeof(T)),
                                  options_.execution.stream);
            device::synchronise(options_.execution.stream);
            jacobian = Jacobian<T>(here.data(), {rows, batch_, width_}, block_);
        }
        for (index j = 0; j < batch_; ++j) growth.follow(j, jacobian, j, std::min(rows, confirmed[std::size_t(j)]));
        return growth.exponent();
    }

    // ------------------------------------------------------------------------------------------------- rank after rank

    /// Step after step from each sequence's confirmed steps to the end, and past an end where f is not finite.
    void finish_sequentially(Status status) {
        {
            const Stopwatch watch(report_.sequential.seconds);
            const int rank = group_.rank();
            const std::size_t count = std::size_t(batch_ * width_);
            if (rank == 0)
                std::copy_n(before_.data(), batch_ * width_, handed_.data());
            else
                group_.pass(-1, std::span<const T>(), rank - 1, std::span(handed_.data(), count));
            beginnings_.replace(handed());
            attempt([&] {
                on_gpu() && cell() != nullptr ? (void)evaluate_part(handed(), Method::sequential) : run_rest();
            });
            if (rank + 1 < group_.size())
                group_.pass(rank + 1, std::span(last_state().data(), count), -1, std::span<T>());
        }
        std::vector<index> broken(std::size_t(batch_), 0);  // of the sequences that were to be finished
        for (index j = 0; j < batch_; ++j) {
            const std::size_t at = std::size_t(j);
            if (ended_[at]) continue;
            report_.sequential_steps += all_steps_ - confirmed_[at];
            report_.sequences[at].status = status;
            confirmed_[at] = all_steps_;
            broken[at] = all_finite(last_state().at(0, j), width_) ? 0 : 1;
        }
        group_.broadcast(std::span<index>(broken), group_.size() - 1);
        if (std::find(broken.begin(), broken.end(), 1) == broken.end()) return;
        std::vector<index> from_end(std::size_t(batch_), 0);  // steps from the first that is not finite on
        attempt([&] {
            const Buffer<T> copy = on_gpu() ? trajectory_on_host() : Buffer<T>();
            const View<const T> states = on_gpu() ? View<const T>(copy.view()) : View<const T>(trajectory_);
            for (index j = 0; j < batch_; ++j)
                for (index i = 0; i < steps_ && broken[std::size_t(j)] == 1 && from_end[std::size_t(j)] == 0; ++i)
                    if (!all_finite(states.at(i, j), width_)) from_end[std::size_t(j)] = all_steps_ - first_ - i;
        });
        group_.maximum(std::span<index>(from_end));
        for (std::size_t j = 0; j < from_end.size(); ++j) {
            if (broken[j] == 0) continue;
            report_.sequences[j].status = Status::non_finite;
            confirmed_[j] = all_steps_ - from_end[j];
        }
    }

    void run_rest() {
        std::map<index, std::vector<index>> starts;  // by the row of this part where they begin
        for (index j = 0; j < batch_; ++j)
            if (const index begin = confirmed_here(j); begin < steps_) starts[begin].push_back(j);
        for (const auto& start : starts) {
            const index begin = start.first;
            const std::vector<index>& sequences = start.second;
            const View<const T> from =
                begin == 0 ? View<const T>(handed()) : View<const T>(trajectory_.steps(begin - 1, begin));
            if (on_gpu())
                run_pieces_on_gpu(begin, sequences);
            else
                run_pieces(begin, sequences, from, [&](index row, View<const T> states) {
                    for (index j = 0; j < states.batch(); ++j)
                        std::copy_n(states.at(0, j), width_, trajectory_.at(row, sequences[std::size_t(j)]));
                    return true;
                });
            report_.sequential.bytes += (steps_ - begin) * index(sequences.size()) * width_ * index(sizeof(T));
        }
    }

    /// Runs rows [begin, steps) of the listed sequences from `state`, until visit(row, states [1, sequences, width])
    /// says that it is enough.
    template <class Visit>
    void run_pieces(index begin, std::span<const index> sequences, View<const T> state, const Visit& visit) {
        const Workspace::Scope scope(workspace_);
        const index count = index(sequences.size());
        const View<T> start = workspace_.take_states<T>({1, count, width_});
        const View<T> rows = workspace_.take_states<T>({std::min(piece, steps_), count, width_});
        for (index j = 0; j < count; ++j) std::copy_n(state.at(0, sequences[std::size_t(j)]), width_, start.at(0, j));
        for (; begin < steps_; begin += piece) {
            const index end = std::min(steps_, begin + piece);
            const View<T> now = rows.steps(0, end - begin);
            recurrence_.run({begin, end, sequences, options_.execution}, View<const T>(start), now);
            for (index i = begin; i < end; ++i)
                if (!visit(i, View<const T>(now.steps(i - begin, i - begin + 1)))) return;
            std::copy_n(now.at(end - begin - 1, 0), count * width_, start.data());
        }
    }

    /// Runs rows [begin, steps) of all sequences, and writes those of the listed ones.
    void run_pieces_on_gpu(index begin, std::span<const index> sequences) {
        const Workspace::Scope scope(workspace_);
        const View<T> start = workspace_.take_states<T>({1, batch_, width_});
        const View<T> rows = workspace_.take_states<T>({std::min(piece, steps_), batch_, width_});
        if (begin == 0)
            device::put<T>(handed(), start, options_.execution);
        else
            copy_states<T>(trajectory_.steps(begin - 1, begin), start, options_.execution);
        for (; begin < steps_; begin += piece) {
            const index end = std::min(steps_, begin + piece);
            const View<T> now = rows.steps(0, end - begin), result = trajectory_.steps(begin, end);
            recurrence_.run(section(begin, end), View<const T>(start), now);
            if (index(sequences.size()) == batch_)
                copy_states<T>(now, result, options_.execution);
            else
                for (const index j : sequences)
                    copy_states<T>(now.sequences(j, j + 1), result.sequences(j, j + 1), options_.execution);
            copy_states<T>(now.steps(end - begin - 1, end - begin), start, options_.execution);
        }
    }

    // -------------------------------------------------------------------------- overlap and shooting: part beside part

    /// Every part from a guessed state, and again from what the part before hands over, until it meets its old states.
    void run_by_parts() {
        if (options_.guess == Guess::given) receive(last_state(), state_before());
        Report own;
        attempt([&] { own = evaluate_part(state_before(), options_.method); });
        for (const Report::Sequence& sequence : own.sequences) {
            Progress& here = progress_[std::size_t(&sequence - own.sequences.data())];
            here.residual = sequence.residual;
            here.relative_residual = sequence.relative_residual;
        }
        report_.window = steps_;
        while (true) {
            ++report_.iterations;
            std::copy_n(before_.data(), batch_ * width_, handed_.data());
            receive(last_state(), handed());
            const double mismatch = compare(handed(), state_before());
            std::array<double, 3> worst = {mismatch, own.ok() ? 0.0 : 1.0, problem_ ? 1.0 : 0.0};
            group_.maximum(std::span<double>(worst));
            if (worst[2] > 0) group_.agree(problem_);
            report_.residuals.push_back(std::isnan(worst[0]) ? infinity : worst[0]);
            if (worst[0] <= 1 && worst[1] == 0) break;
            // After as many passes as there are ranks only what is not a number can differ.
            if (worst[1] > 0 || report_.iterations > group_.size()) {
                report_.method += ", then sequential";
                return finish_sequentially(Status::finished_sequentially);
            }
            if (mismatch <= 1) continue;
            std::copy_n(handed_.data(), batch_ * width_, before_.data());
            attempt([&] {
                if (on_gpu())
                    own = evaluate_part(state_before(), options_.method, Guess::given);
                else
                    repair();
            });
        }
        for (index j = 0; j < batch_; ++j) {
            confirmed_[std::size_t(j)] = all_steps_;
            report_.sequences[std::size_t(j)].iterations = report_.iterations;
        }
        (void)compare(handed(), state_before(), true);
    }

    /// before: in main memory.
    Report evaluate_part(View<const T> before, Method method, Guess guess = Guess::initial_state) const {
        Options own = options_;
        own.group = nullptr;
        own.method = method;
        own.guess = guess;
        own.estimates = Estimates::none;
        if (on_gpu()) {
            const Buffer<T> there = newton::on_gpu<T>(before);
            return evaluate<T>(*cell()->segment(0, steps_, there, own.execution), trajectory_, own);
        }
        own.workspace = &workspace_;
        if (cell() != nullptr) return evaluate<T>(*cell()->segment(0, steps_, before), trajectory_, own);
        return evaluate<T>(Continued<T>(recurrence_, before), trajectory_, own);
    }

    Buffer<T> trajectory_on_host() const {
        const Shape& shape = recurrence_.shape();
        Buffer<T> there = Buffer<T>::uninitialised(shape, Layout::steps_first, device::current_gpu());
        copy_states<T>(trajectory_, there.view(), options_.execution);
        device::synchronise(options_.execution.stream);
        return there.on(Device::host());
    }

    /// Largest difference of two rows of states against the tolerance; NaN where one is not a number. record: it is the
    /// residual of what stays.
    double compare(View<const T> state, View<const T> other, bool record = false) {
        double largest = 0;
        for (index j = 0; j < state.batch(); ++j) {
            double difference = 0, size = 0;
            for (index k = 0; k < width_; ++k) {
                difference = scalar_functions::larger_or_nan(difference,
                                                             std::abs(double(state(0, j, k)) - double(other(0, j, k))));
                size = std::max(size, std::abs(double(other(0, j, k))));
            }
            const double relative =
                difference == 0 ? 0 : difference / (tolerance_.absolute + tolerance_.relative * size);
            largest = scalar_functions::larger_or_nan(largest, relative);
            if (!record) continue;
            Progress& here = progress_[std::size_t(j)];
            here.residual = std::max(here.residual, difference);
            here.relative_residual = std::max(here.relative_residual, relative);
        }
        return largest;
    }

    void repair() {
        run_pieces(0, sequences_, state_before(), [&](index row, View<const T> states) {
            const View<T> old = trajectory_.steps(row, row + 1);
            if (compare(states, old) <= 1) {
                (void)compare(states, old, true);
                return false;
            }
            copy_states<T>(states, old, options_.execution);
            return true;
        });
    }

    // --------------------------------------------------------------------------------------------------------- report

    /// The same on all ranks, but for seconds and bytes.
    void summarise() {
        if (on_gpu()) attempt([&] { device::synchronise(options_.execution.stream); });
        group_.agree(problem_);
        std::vector<double> largest;
        for (std::size_t j = 0; j < progress_.size(); ++j)
            largest.insert(largest.end(),
                           {progress_[j].residual, progress_[j].relative_residual, report_.sequences[j].error});
        group_.maximum(std::span<double>(largest));
        group_.sum(std::span(&report_.non_finite_resets, 1));
        if (!report_.sequences.empty()) report_.error = 0;
        for (std::size_t j = 0; j < progress_.size(); ++j) {
            Report::Sequence& sequence = report_.sequences[j];
            sequence.confirmed = confirmed_[j];
            sequence.residual = largest[3 * j];
            sequence.relative_residual = largest[3 * j + 1];
            sequence.error = sequence.status == Status::finished_sequentially ? std::numeric_limits<double>::quiet_NaN()
                                                                              : largest[3 * j + 2];
            report_.status = std::max(report_.status, sequence.status);
            report_.residual = std::max(report_.residual, sequence.residual);
            report_.relative_residual = std::max(report_.relative_residual, sequence.relative_residual);
            report_.error = scalar_functions::larger_or_nan(report_.error, sequence.error);
        }
    }

    const Recurrence<T>& recurrence_;
    View<T> trajectory_;
    const Options& options_;
    Group& group_;
    Workspace& workspace_;
    Tolerance tolerance_;
    index steps_, batch_, width_, block_;  // of this rank's part
    Beginnings<T> beginnings_;
    index first_ = 0, all_steps_ = 0;  // steps before it, and of all parts
    std::vector<index> sequences_;
    Report report_;
    const Clock::time_point begin_ = Clock::now();
    std::exception_ptr problem_;

    std::vector<index> confirmed_;    // steps of all, the same on every rank
    std::vector<bool> ended_;         // converged, or not finite: nothing is changed any more
    std::vector<Progress> progress_;  // in rows of this part
    index shift_ = 0;                 // leading rows that all sequences which go on have confirmed
    bool stopped_ = false, stop_agreed_ = false;
    Review review_;
    Buffer<T> before_, handed_, last_;  // one state each, in main memory
    // Of Newton's method, where the recurrence computes.
    T *states_memory_ = nullptr, *after_memory_ = nullptr, *update_memory_ = nullptr, *jacobian_memory_ = nullptr;
};

/// Every rank's `first` becomes the `after` of the one before it; both contiguous, in main memory. The last one's
/// stays.
template <class T>
void hand_back(Group& group, View<const T> first, const View<T>& after) {
    const int rank = group.rank(), next = rank + 1 < group.size() ? rank + 1 : -1;
    const std::size_t count = std::size_t(after.shape().count());
    group.pass(rank - 1, std::span(first.data(), count), next, std::span(after.data(), count));
}

void require_steps(const Shape& shape) {
    if (shape.steps == 0)
        throw InvalidArgument("recurrence", "at least one step on every rank of options.group", to_string(shape));
}

}  // namespace

template <class T>
Report evaluate_across_ranks(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    Options chosen = options;
    const auto* const cell = dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence);
    if (options.method == Method::automatic) chosen.method = cell != nullptr ? Method::overlap : Method::newton;
    std::exception_ptr problem = caught([&] {
        check_arguments<T>(recurrence, trajectory, options);
        require_no_window(options);
        require_steps(recurrence.shape());
        if (options.damping > 0)
            throw InvalidArgument("options.damping", "none with options.group", std::to_string(options.damping));
        if (options.anderson > 0)
            throw InvalidArgument("options.anderson", "0 with options.group", std::to_string(options.anderson));
        if (options.method == Method::shooting && cell == nullptr)
            throw InvalidArgument("options.method",
                                  "automatic, newton, overlap or sequential, as the recurrence is not a cell's",
                                  to_string(options.method));
        if (!is_on_gpu(options)) return;
        if (cell == nullptr) check_gpu_arguments(recurrence, options);
        if (!trajectory.empty()) device::require_on_gpu("trajectory", trajectory.data());
        if (cell != nullptr && chosen.method == Method::newton)
            throw InvalidArgument("options.method", "automatic, overlap, shooting or sequential, for cells on a GPU",
                                  to_string(options.method));
        if (cell == nullptr && chosen.method == Method::overlap)
            throw InvalidArgument("options.method",
                                  "automatic, newton or sequential, for what is not a cell on several GPUs",
                                  to_string(options.method));
    });
    Workspace own(problem ? Execution() : options.execution);
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    return SharedEvaluation<T>(recurrence, trajectory, chosen, workspace).run(std::move(problem));
}

template <class T>
Report repeat_across_ranks(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,
                           const BackwardPart<T>& backward, const Options& options, std::exception_ptr problem) {
    Group& group = *options.group;
    const index batch = recurrence.shape().batch, width = recurrence.shape().width;
    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), index(0));
    Buffer<T> before, last, first, handed, old;
    Beginnings<T> beginnings;
    const auto attempt = [&](const auto& body) {
        if (!problem) problem = caught(body);
    };
    attempt([&] {
        require_no_window(options);
        require_steps(recurrence.shape());
        for (Buffer<T>* const row : {&before, &last, &first, &handed, &old}) *row = Buffer<T>({1, batch, width});
        beginnings = Beginnings<T>(recurrence, options);
        if (group.rank() == 0) initial_states<T>(recurrence, sequences, before.view(), options);
        device::fetch<T>(trajectory.steps(recurrence.shape().steps - 1, recurrence.shape().steps), last.view(),
                         options.execution);
    });
    require_shared(recurrence, options, problem);
    hand_on<T>(group, last, before.view());
    beginnings.replace(before.view());
    Report report;
    index passes = 0;
    for (bool changed = true; changed; ++passes) {
        if (passes == 0 || !same_states<T>(handed, old))
            attempt([&] {
                report = backward(before, handed, first.view());
                beginnings.clear(first.view());
            });
        std::copy_n(handed.data(), batch * width, old.data());
        hand_back<T>(group, first, handed.view());
        std::array<index, 2> worst = {same_states<T>(handed, old) ? 0 : 1, problem ? 1 : 0};
        group.maximum(std::span<index>(worst));
        if (worst[1] != 0) group.agree(problem);
        changed = worst[0] != 0 && passes < group.size();
    }
    report.iterations = passes;
    return report;
}

template <class T>
Report sweep_across_ranks(const Recurrence<T>& recurrence, const SharedSweep<T>& sweep, const Options& options,
                          std::exception_ptr problem) {
    const Clock::time_point begin = Clock::now();
    Group& group = *options.group;
    const index steps = recurrence.shape().steps, batch = recurrence.shape().batch, width = recurrence.shape().width;
    const index block = recurrence.block(), row = batch * width;
    Options solving = options;
    solving.surrogate = Surrogate::full;
    solving.window = std::max<index>(1, steps);
    Report report;
    report.method = "adjoint, " + describe(solving) + ", on " + std::to_string(group.size()) + " ranks";
    Workspace own(options.execution);
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    std::optional<Workspace::Use> use;
    const Workspace::Scope scope(workspace);
    const SolveOptions solve_options{options.reduction, options.execution,    options.chunk,
                                     &workspace,        options.tensor_cores, &group};
    View<T> before, after, adjoint;
    Jacobian<T> jacobian;
    Buffer<T> last, given;  // the part's last state, and the one before it; in main memory
    Beginnings<T> beginnings;
    const auto attempt = [&](const auto& body) {
        if (!problem) problem = caught(body);
    };
    attempt([&] {
        use.emplace(workspace, options.execution);
        require_no_window(options);
        require_steps(recurrence.shape());
        window_length(recurrence, solving, block);
        before = workspace.take_states<T>({steps + 1, batch, width});
        after = workspace.take_states<T>(recurrence.shape());
        adjoint = workspace.take_states<T>(recurrence.shape());
        jacobian = workspace.take_jacobian<T>(recurrence.shape(), block);
        for (Buffer<T>* const one : {&last, &given}) *one = Buffer<T>({1, batch, width});
        (void)reduce::Part<T>(recurrence.shape(), block, solve_options, workspace);
        beginnings = Beginnings<T>(recurrence, options);
    });
    require_shared(recurrence, solving, problem);
    report.sequences.assign(std::size_t(batch), {.confirmed = steps});
    if (row == 0) return report;

    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), index(0));
    const Section section{0, steps, sequences, options.execution, is_on_gpu(options) ? &workspace : nullptr};
    attempt([&] {
        copy_states<T>(sweep.trajectory, before.steps(1, steps + 1), options.execution);
        device::fetch<T>(before.steps(steps, steps + 1), last.view(), options.execution);
        if (group.rank() == 0) initial_states<T>(recurrence, sequences, given.view(), options);
    });
    hand_on<T>(group, last, given.view());
    beginnings.replace(given.view());
    attempt([&] { device::put<T>(given.view(), before.steps(0, 1), options.execution); });
    if (!sweep.before.empty()) copy_states<T>(before.steps(0, 1), sweep.before, options.execution);
    {
        const Stopwatch watch(report.linearise.seconds);
        attempt([&] { recurrence.linearise(section, View<const T>(before.steps(0, steps)), after, jacobian); });
        beginnings.cut(jacobian.steps(0, 1));
        report.linearise.bytes += steps * row * (4 + block) * index(sizeof(T));
    }
    {
        const Stopwatch watch(report.reduce.seconds);
        attempt([&] { copy_states<T>(sweep.output_gradient, adjoint, options.execution); });
        reduce::Part<T> part(reduce::reversed<T>({jacobian, adjoint}, adjoint), group.rank() == group.size() - 1,
                             solve_options, workspace);
        attempt([&] { part.summarise(); });
        part.scan();
        if (!sweep.handed.empty()) {
            copy_states<T>(part.before(), sweep.handed, options.execution);
            if (group.rank() == group.size() - 1) std::fill_n(sweep.handed.data(), row, T(0));
        }
        if (sweep.visit != nullptr || !sweep.initial.empty()) attempt([&] { part.solve(); });
        if (!sweep.initial.empty())
            attempt([&] {
                multiply_transposed<T>(jacobian.steps(0, 1), adjoint.steps(0, 1), sweep.initial, options.execution);
            });
        report.reduce.bytes += steps * row * (4 + block) * index(sizeof(T));
    }
    if (sweep.visit != nullptr) {
        const Stopwatch watch(report.update.seconds);
        attempt([&] { sweep.visit(section, View<const T>(before.steps(0, steps)), View<const T>(adjoint)); });
    }
    if (is_on_gpu(options)) attempt([&] { device::synchronise(options.execution.stream); });
    group.agree(problem);
    report.window = steps;
    report.seconds = seconds_since(begin);
    report.workspace_bytes = workspace.peak_bytes();
    return report;
}

template Report evaluate_across_ranks(const Recurrence<float>&, View<float>, const Options&);
template Report evaluate_across_ranks(const Recurrence<double>&, View<double>, const Options&);
template Report repeat_across_ranks(const ChannelwiseRecurrence<float>&, View<const float>, const BackwardPart<float>&,
                                    const Options&, std::exception_ptr);
template Report repeat_across_ranks(const ChannelwiseRecurrence<double>&, View<const double>,
                                    const BackwardPart<double>&, const Options&, std::exception_ptr);
template Report sweep_across_ranks(const Recurrence<float>&, const SharedSweep<float>&, const Options&,
                                   std::exception_ptr);
template Report sweep_across_ranks(const Recurrence<double>&, const SharedSweep<double>&, const Options&,
                                   std::exception_ptr);

}  // namespace deeppcr::newton
