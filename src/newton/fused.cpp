// Cells, chunks side by side. All methods end alike:
//
//   sweep     every chunk runs step after step from the state that it has for its start, and writes its trajectory
//   repair    every chunk but a sequence's first runs again from the end of the chunk before it, until it meets its old
//             states within the tolerance: that mismatch is the residual there, and everywhere else it is exactly 0
//   again     chunks whose predecessor's end has changed meanwhile are repaired again
//
// After k repairs the first k+1 chunks are those of sequential evaluation; so chunks are always enough, and where few
// of them meet their old states, the rest is finished step after step. Shooting first improves the starts by Newton's
// method on the unknowns between chunks:
//
//   start of chunk c  <-  end of c-1 + (product of the Jacobians over c-1) * (new - old start of c-1)

#include "newton/fused.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "device/threads.hpp"
#include "newton/cost_model.hpp"
#include "newton/experience.hpp"
#include "newton/fused_gpu.hpp"
#include "newton/lyapunov.hpp"
#include "newton/options.hpp"
#include "newton/stopwatch.hpp"
#include "recurrence/cell_rows.hpp"

namespace deeppcr::newton {
namespace {

constexpr index first_repair = 32;      // steps of a repair before the first look; then as many again, and again
constexpr index first_repair_shot = 4;  // after shooting, whose starts are already close
constexpr index warm_up = 32;           // steps before a chunk from which shooting guesses its start, at the least
constexpr index warm_up_share = 64;     // or this part of a chunk: next to nothing, and it may save a Newton sweep
constexpr index most_shots = 12;
constexpr index steps_worth_following = 1024;  // for the Lyapunov estimate, whose cost would show in shorter ones
constexpr double enough_shrinking = 0.5;       // of the largest mismatch, per shot, or the method is given up
constexpr double enough_met = 0.5;             // of the chunks, in the first repair, or the method is given up

struct Chunk {
    index part, sequence, first, last;
    bool leads;  // the first of its part
};

template <class T>
class FusedEvaluator {
public:
    FusedEvaluator(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options,
                   Workspace& workspace)
        : recurrence_(recurrence),
          trajectory_(trajectory),
          options_(options),
          workspace_(workspace),
          tolerance_(tolerance_of<T>(options)),
          width_(recurrence.shape().width),
          threads_(device::thread_count(options.execution)) {
        report_.sequences.resize(std::size_t(recurrence.shape().batch));
        for (Report::Sequence& sequence : report_.sequences) {
            sequence.confirmed = recurrence.shape().steps;
            sequence.error = std::numeric_limits<double>::quiet_NaN();
        }
        report_.lyapunov = report_.error = std::numeric_limits<double>::quiet_NaN();
    }

    Report run() {
        const Clock::time_point begin = Clock::now();
        const Workspace::Scope scope(workspace_);
        report_.method = "sequential";
        Method used = Method::sequential;
        if (!trajectory_.empty()) {
            auto [method, chunk, candidates] = choose();
            report_.candidates = std::move(candidates);
            used = method;
            if (method == Method::sequential)
                run_sequentially();
            else
                run_chunks(method, chunk);
            find_non_finite();
        }
        for (const Report::Sequence& sequence : report_.sequences) {
            report_.status = std::max(report_.status, sequence.status);
            report_.residual = std::max(report_.residual, sequence.residual);
            report_.relative_residual = std::max(report_.relative_residual, sequence.relative_residual);
        }
        report_.seconds = seconds_since(begin);
        // Only what came to its end says how long a method takes.
        if (options_.chunk == 0 && report_.ok() && !trajectory_.empty())
            learn([&](Experience& seen) { seen.observed[used].add(report_.seconds / elements()); });
        report_.workspace_bytes = workspace_.peak_bytes();
        return std::move(report_);
    }

private:
    index longest_part() const {
        index longest = 0;
        for (const SequencePart& part : recurrence_.parts()) longest = std::max(longest, part.last - part.first);
        return longest;
    }

    ExperienceKey key() const {
        return {.kernels = &recurrence_.kernels(),
                .workers = threads_,
                .steps = std::ilogb(double(longest_part())),
                .numbers = std::ilogb(double(recurrence_.parts().size()) * double(recurrence_.channels())),
                .tolerance = std::ilogb(tolerance_.relative) / 4};
    }
    template <class Change>
    void learn(const Change& change) const {
        newton::learn(key(), change);
    }

    struct Choice {
        Method method;
        index chunk;
        std::vector<Report::Candidate> candidates = {};
    };

    Choice choose() const {
        const index steps = longest_part();
        if (options_.method == Method::sequential || options_.execution.backend == Backend::reference)
            return {Method::sequential, 0};
        // Below this not even two lanes' worth of chunks would pay for the bookkeeping, on any machine.
        if (options_.method == Method::automatic && steps < 128) return {Method::sequential, 0};
        const index rows = index(recurrence_.parts().size()), channels = recurrence_.channels();
        if (options_.method == Method::automatic && lanes_are_full(rows, channels, threads_))
            return {Method::sequential, 0};
        if (options_.chunk > 0 && options_.method != Method::automatic)
            return {options_.method, std::min(options_.chunk, steps)};
        const StepCosts& costs = step_costs(recurrence_, threads_);
        const Experience seen = experience(key());
        const Plan overlap = plan_chunks(costs, steps, rows, channels, seen.repeated, 0, threads_);
        const Plan shooting =
            plan_chunks(costs, steps, rows, channels, first_repair_shot + warm_up, seen.shots, threads_);
        const auto length = [&](const Plan& plan) {
            if (options_.chunk > 0) return std::min(options_.chunk, steps);
            return plan.chunk > 0 ? plan.chunk : std::max<index>(1, (steps + 15) / 16);
        };
        if (options_.method == Method::overlap) return {Method::overlap, length(overlap)};
        if (options_.method == Method::shooting) return {Method::shooting, length(shooting)};
        Weighing weighing(seen, elements());
        Choice best{Method::sequential, 0};
        const auto consider = [&](Method method, double predicted, index chunk) {
            if (!weighing.consider(method, predicted)) return;
            best.method = method;
            best.chunk = chunk;
        };
        consider(Method::sequential, overlap.sequential_seconds, 0);
        if (seen.overlap_works && overlap.chunk > 0) consider(Method::overlap, overlap.seconds, length(overlap));
        if (seen.shooting_works && shooting.chunk > 0) consider(Method::shooting, shooting.seconds, length(shooting));
        best.candidates = weighing.candidates();
        return best;
    }

    double elements() const { return double(recurrence_.shape().count()); }

    void run_sequentially() {
        const Clock::time_point begin = Clock::now();
        std::vector<index> sequences(report_.sequences.size());
        std::iota(sequences.begin(), sequences.end(), index(0));
        const Section section{0, recurrence_.shape().steps, sequences, options_.execution};
        const View<T> state = workspace_.take_states<T>({1, section.batch(), width_});
        recurrence_.initial(section, state);
        recurrence_.run(section, View<const T>(state), trajectory_);
        report_.sequential_steps = recurrence_.shape().steps * section.batch();
        report_.sequential.seconds += seconds_since(begin);
        report_.sequential.bytes += bytes_of(recurrence_.shape().steps * section.batch());
    }

    /// Inputs read and states written in so many steps.
    index bytes_of(index steps) const { return steps * (recurrence_.inputs().width() + width_) * index(sizeof(T)); }

    void cut(index length) {
        const auto& parts = recurrence_.parts();
        for (index p = 0; p < index(parts.size()); ++p) {
            const auto [sequence, first, last] = parts[std::size_t(p)];
            // Chunks of a part are alike to one step, so that 16 of them fill the lanes.
            const index steps = last - first, count = std::max<index>(1, (steps + length - 1) / length);
            for (index c = 0; c < count; ++c)
                if (steps > 0)
                    chunks_.push_back(
                        {p, sequence, first + steps * c / count, first + steps * (c + 1) / count, c == 0});
        }
    }

    index count() const { return index(chunks_.size()); }
    T* start(index c) const { return starts_ + c * width_; }
    T* end(index c) const { return ends_ + c * width_; }

    cell::Row<T> row(index c, index first, index last) const {
        cell::Row<T> row;
        row.steps = last - first;
        row.inputs = recurrence_.inputs().at(first, chunks_[std::size_t(c)].sequence);
        return row;
    }

    void run_rows(cell::Work work, const std::vector<cell::Row<T>>& rows, index after_stride) const {
        cell::run_rows<T>(recurrence_.kernels(), work, recurrence_.channels(), recurrence_.parameters().data(), rows,
                          {.inputs = recurrence_.inputs().step_stride(), .after = after_stride}, threads_);
    }

    void run_chunks(Method method, index length) {
        cut(length);
        starts_ = workspace_.take<T>(count() * width_);
        ends_ = workspace_.take<T>(count() * width_);
        for (index c = 0; c < count(); ++c) {
            const Chunk& chunk = chunks_[std::size_t(c)];
            const T* guess = options_.guess == Guess::given && !chunk.leads
                                 ? trajectory_.at(chunk.first - 1, chunk.sequence)
                                 : recurrence_.initial_state(chunk.part);
            std::copy_n(guess, width_, start(c));
            if (!std::all_of(guess, guess + width_, [](T value) { return std::isfinite(value); }))
                std::copy_n(recurrence_.initial_state(chunk.part), width_, start(c));
        }
        index shots = 0;
        const bool converging = method != Method::shooting || shoot(shots);
        sweep();
        const bool met = repair(method) && converging;
        report_.method =
            to_string(method) + ", " + std::to_string(count()) + " chunks of " + std::to_string(length) + " steps, ";
        if (method == Method::shooting) report_.method += std::to_string(shots) + " Newton sweeps, ";
        report_.method += std::to_string(repeated_) + " steps repeated";
        report_.window = length;
        if (stopped_) return;  // by the caller: nothing is known of the method
        learn([&](Experience& seen) {
            if (method == Method::overlap) {
                seen.overlap_works = met;
                if (met) seen.repeated = std::max<index>(first_repair, repeated_);
            } else {
                seen.shooting_works = met;
                if (met) seen.shots = double(shots);
            }
        });
        if (options_.estimates == Estimates::quick && longest_part() >= steps_worth_following) estimate_growth();
    }

    /// Newton's method for the chunks' starts; false where it does not converge.
    bool shoot(index& shots) {
        const Clock::time_point begin = Clock::now();
        const index K = recurrence_.kernels().states, channels = recurrence_.channels();
        T* const products = workspace_.take<T>(count() * width_ * K);
        T* const old = workspace_.take<T>(width_);
        if (options_.guess != Guess::given) {
            std::vector<cell::Row<T>> rows;
            for (index c = 0; c < count(); ++c) {
                const Chunk& chunk = chunks_[std::size_t(c)];
                if (chunk.leads) continue;
                const index steps = std::max(warm_up, (chunk.last - chunk.first) / warm_up_share);
                const index from = std::max(recurrence_.parts()[std::size_t(chunk.part)].first, chunk.first - steps);
                rows.push_back(row(c, from, chunk.first));
                rows.back().start = rows.back().end = start(c);
            }
            run_rows(cell::Work::advance, rows, 0);
        }
        double before = std::numeric_limits<double>::infinity();
        bool converging = true;
        const index limit = options_.max_iterations > 0 ? std::min(options_.max_iterations, most_shots) : most_shots;
        while (shots < limit) {
            std::vector<cell::Row<T>> rows;
            for (index c = 0; c < count(); ++c) {
                const Chunk& chunk = chunks_[std::size_t(c)];
                if (c + 1 == count() || chunks_[std::size_t(c + 1)].leads) continue;  // nothing starts from its end
                rows.push_back(row(c, chunk.first, chunk.last));
                rows.back().start = start(c);
                rows.back().end = end(c);
                rows.back().product = products + c * width_ * K;
                report_.linearise.bytes += bytes_of(chunk.last - chunk.first);
            }
            run_rows(cell::Work::multiply, rows, 0);
            ++shots;
            ++report_.iterations;
            // The largest correction of a start, as a fraction of the tolerance.
            double largest = 0;
            std::vector<T> correction(std::size_t(width_), T(0)), carried(static_cast<std::size_t>(K));
            for (index c = 1; c < count(); ++c) {
                if (chunks_[std::size_t(c)].leads) {
                    std::fill(correction.begin(), correction.end(), T(0));
                    continue;
                }
                std::copy_n(start(c), width_, old);
                for (index channel = 0; channel < channels; ++channel) {
                    const T* product = products + (c - 1) * width_ * K + channel * K * K;
                    T* const d = correction.data() + channel * K;
                    for (index k = 0; k < K; ++k) {
                        T sum = 0;
                        for (index m = 0; m < K; ++m) sum += product[k * K + m] * d[m];
                        carried[std::size_t(k)] = sum;
                    }
                    bool finite = true;
                    for (index k = 0; k < K; ++k) finite = finite && std::isfinite(carried[std::size_t(k)]);
                    for (index k = 0; k < K; ++k) {
                        const T reached = end(c - 1)[channel * K + k];
                        T& here = start(c)[channel * K + k];
                        here = finite ? reached + carried[std::size_t(k)] : reached;
                        if (!finite) ++report_.non_finite_resets;
                        d[k] = here - old[channel * K + k];
                        const double relative = std::abs(double(d[k])) /
                                                (tolerance_.absolute + tolerance_.relative * std::abs(double(here)));
                        largest = scalar_functions::larger_or_nan(largest, relative);
                    }
                }
            }
            // Quadratic convergence: corrections this small leave errors far below the tolerance, and the repair tests.
            const double close = 0.1 / std::sqrt(std::max(tolerance_.relative, 1e-30));
            if (largest <= close) break;
            if (!(largest <= enough_shrinking * before) && shots >= 4) {
                converging = false;
                break;
            }
            before = largest;
        }
        report_.linearise.seconds += seconds_since(begin);
        return converging;
    }

    void sweep() {
        const Clock::time_point begin = Clock::now();
        std::vector<cell::Row<T>> rows;
        for (index c = 0; c < count(); ++c) {
            const Chunk& chunk = chunks_[std::size_t(c)];
            rows.push_back(row(c, chunk.first, chunk.last));
            rows.back().start = start(c);
            rows.back().after = trajectory_.at(chunk.first, chunk.sequence);
            report_.update.bytes += bytes_of(chunk.last - chunk.first);
        }
        run_rows(cell::Work::advance, rows, trajectory_.step_stride());
        ++report_.iterations;
        report_.update.seconds += seconds_since(begin);
    }

    /// Repairs until all chunks fit together; false where too few meet, and the rest was finished sequentially.
    bool repair(Method method) {
        const Clock::time_point begin = Clock::now();
        std::vector<index> pending;
        for (index c = 0; c < count(); ++c)
            if (!chunks_[std::size_t(c)].leads) pending.push_back(c);
        bool met = true;
        for (index round = 0; !pending.empty(); ++round) {
            const bool stopped =
                (options_.max_iterations > 0 && report_.iterations >= options_.max_iterations) ||
                (options_.progress && !options_.progress(pending.front() * recurrence_.shape().steps / count(),
                                                         recurrence_.shape().steps, report_.iterations));
            ++report_.iterations;
            const std::size_t asked = pending.size();
            std::vector<index> changed;
            if (!stopped) changed = repair_once(pending, method == Method::shooting ? first_repair_shot : first_repair);
            const bool slow = round > 0 || double(changed.size()) > (1 - enough_met) * double(asked);
            if (stopped || (!changed.empty() && slow && changed.size() > 2)) {
                report_.update.seconds += seconds_since(begin);
                stopped_ = stopped;
                give_up(stopped ? pending : followers(changed), stopped);
                return false;
            }
            pending = followers(changed);
        }
        report_.update.seconds += seconds_since(begin);
        return met;
    }

    /// The chunks that start where these end.
    std::vector<index> followers(const std::vector<index>& changed) const {
        std::vector<index> result;
        for (const index c : changed)
            if (c + 1 < count() && !chunks_[std::size_t(c + 1)].leads) result.push_back(c + 1);
        return result;
    }

    /// Runs the chunks again from the ends before them; returns those that did not meet their old states before their
    /// own end, which has changed.
    std::vector<index> repair_once(std::vector<index> pending, index length) {
        for (const index c : pending)
            std::copy_n(trajectory_.at(chunks_[std::size_t(c)].first - 1, chunks_[std::size_t(c)].sequence), width_,
                        start(c));
        std::vector<index> changed;
        index done = 0;  // steps
        for (; !pending.empty(); done += length, length = std::min<index>(2 * length, 256)) {
            const Workspace::Scope scope(workspace_);
            const index at_once = std::max<index>(1, (index(1) << 20) / std::max<index>(1, length * width_));
            std::vector<index> still;
            for (std::size_t from = 0; from < pending.size(); from += std::size_t(at_once)) {
                const std::size_t to = std::min(pending.size(), from + std::size_t(at_once));
                repair_piece({pending.begin() + std::ptrdiff_t(from), pending.begin() + std::ptrdiff_t(to)}, done,
                             length, still, changed);
            }
            repeated_ = std::max(repeated_, done + length);
            pending = std::move(still);
        }
        std::sort(changed.begin(), changed.end());
        return changed;
    }

    void repair_piece(const std::vector<index>& pending, index done, index length, std::vector<index>& still,
                      std::vector<index>& changed) {
        const Workspace::Scope scope(workspace_);
        T* const states = workspace_.take<T>(index(pending.size()) * length * width_);
        std::vector<cell::Row<T>> rows;
        for (std::size_t i = 0; i < pending.size(); ++i) {
            const index c = pending[i];
            const Chunk& chunk = chunks_[std::size_t(c)];
            rows.push_back(row(c, chunk.first + done, std::min(chunk.last, chunk.first + done + length)));
            rows.back().start = rows.back().end = start(c);
            rows.back().after = states + index(i) * length * width_;
        }
        run_rows(cell::Work::advance, rows, width_);
        std::vector<double> mismatch(pending.size()), relative(pending.size());
        std::vector<char> meets(pending.size());
        device::parallel_ranges(index(pending.size()) * length * width_ > 16384 ? threads_ : 1, index(pending.size()),
                                1, [&](index begin, index finish) {
                                    for (index i = begin; i < finish; ++i) {
                                        const Chunk& chunk = chunks_[std::size_t(pending[std::size_t(i)])];
                                        const index steps = rows[std::size_t(i)].steps, first = chunk.first + done;
                                        const T* const old = trajectory_.at(first + steps - 1, chunk.sequence);
                                        const T* const now = states + (i * length + steps - 1) * width_;
                                        double size = 0, apart = 0;
                                        for (index k = 0; k < width_; ++k) {
                                            size = std::max(size, std::abs(double(old[k])));
                                            const double difference = std::abs(double(now[k]) - double(old[k]));
                                            apart = scalar_functions::larger_or_nan(apart, difference);
                                        }
                                        const double allowed = tolerance_.absolute + tolerance_.relative * size;
                                        // False for NaN, and where both are infinite.
                                        const bool meet = apart <= allowed && std::isfinite(apart);
                                        mismatch[std::size_t(i)] = apart;
                                        relative[std::size_t(i)] = apart == 0 ? 0 : apart / allowed;
                                        meets[std::size_t(i)] = char(meet);
                                        // Where they meet, the old state stays: the mismatch there is a residual, and
                                        // it was tested.
                                        for (index step = 0; step < steps - index(meet); ++step)
                                            std::copy_n(states + (i * length + step) * width_, width_,
                                                        trajectory_.at(first + step, chunk.sequence));
                                    }
                                });
        for (std::size_t i = 0; i < pending.size(); ++i) {
            const Chunk& chunk = chunks_[std::size_t(pending[i])];
            report_.update.bytes += bytes_of(rows[i].steps);
            if (meets[i]) {
                Report::Sequence& result = report_.sequences[std::size_t(chunk.sequence)];
                result.residual = std::max(result.residual, mismatch[i]);
                result.relative_residual = std::max(result.relative_residual, relative[i]);
            } else if (chunk.first + done + rows[i].steps == chunk.last) {
                changed.push_back(pending[i]);
            } else {
                still.push_back(pending[i]);
            }
        }
    }

    /// Step after step from the first chunk of each part that does not fit, or, where asked to, no further.
    void give_up(const std::vector<index>& pending, bool stopped) {
        const bool finish = options_.on_failure == OnFailure::finish;
        if (!finish || stopped) {
            for (const index c : pending) {
                const Chunk& chunk = chunks_[std::size_t(c)];
                Report::Sequence& result = report_.sequences[std::size_t(chunk.sequence)];
                result.confirmed = std::min(result.confirmed, chunk.first);
                result.status = Status::max_iterations;
            }
            if (!finish) return;
        }
        const Clock::time_point begin = Clock::now();
        std::vector<cell::Row<T>> rows;
        index part = -1;
        for (const index c : pending) {
            const Chunk& chunk = chunks_[std::size_t(c)];
            if (chunk.part == part) continue;
            part = chunk.part;
            const index last = recurrence_.parts()[std::size_t(part)].last;
            rows.push_back(row(c, chunk.first, last));
            std::copy_n(trajectory_.at(chunk.first - 1, chunk.sequence), width_, start(c));
            rows.back().start = start(c);
            rows.back().after = trajectory_.at(chunk.first, chunk.sequence);
            report_.sequential_steps += last - chunk.first;
            report_.sequential.bytes += bytes_of(last - chunk.first);
            Report::Sequence& result = report_.sequences[std::size_t(chunk.sequence)];
            result.status = Status::finished_sequentially;
            result.confirmed = recurrence_.shape().steps;
        }
        run_rows(cell::Work::advance, rows, trajectory_.step_stride());
        report_.sequential.seconds += seconds_since(begin);
    }

    /// 0 exactly where all are finite.
    static T zero_of(const T* values, index count) {
        std::array<T, 16> sums{};
        index k = 0;
        for (; k + 16 <= count; k += 16)
            for (std::size_t l = 0; l < 16; ++l) sums[l] += T(0) * values[k + index(l)];
        for (; k < count; ++k) sums[0] += T(0) * values[k];
        return std::accumulate(sums.begin(), sums.end(), T(0));
    }

    /// A sequence ends at its first state that is not finite.
    void find_non_finite() {
        if (trajectory_.contiguous() && zero_of(trajectory_.data(), trajectory_.shape().count()) == 0) return;
        for (index j = 0; j < recurrence_.shape().batch; ++j) {
            Report::Sequence& result = report_.sequences[std::size_t(j)];
            for (index i = 0; i < result.confirmed; ++i)
                if (zero_of(trajectory_.at(i, j), width_) != 0) {
                    result.confirmed = i;
                    result.status = Status::non_finite;
                }
        }
    }

    /// The Lyapunov estimate, from the Jacobians of some steps in the middle of the first sequence.
    void estimate_growth() {
        const Clock::time_point begin = Clock::now();
        const SequencePart& part = recurrence_.parts().front();
        const index steps = part.last - part.first;
        const index wanted = std::min<index>(steps / 32, 4096 / std::max<index>(1, width_ * recurrence_.block()));
        const index sample = std::min(steps, std::max<index>(8, wanted));
        if (sample < 1 || part.sequence != 0) return;
        const Workspace::Scope scope(workspace_);
        const index first = part.first + (steps - sample) / 2;
        const index one[] = {0};
        const Section section{first, first + sample, one, options_.execution};
        const Shape shape{sample, 1, width_};
        const View<T> before = workspace_.take_states<T>(shape);
        const Jacobian<T> jacobian = workspace_.take_jacobian<T>(shape, recurrence_.block());
        for (index i = 0; i < sample; ++i)
            std::copy_n(first + i == part.first ? recurrence_.initial_state(0) : trajectory_.at(first + i - 1, 0),
                        width_, before.at(i, 0));
        recurrence_.jacobians(section, View<const T>(before), jacobian);
        LyapunovEstimate<T> estimate(width_, recurrence_.block());
        estimate.follow(0, jacobian, 0, sample);
        report_.lyapunov = estimate.exponent();
        report_.estimate.seconds += seconds_since(begin);
    }

    const ChannelwiseRecurrence<T>& recurrence_;
    View<T> trajectory_;
    const Options& options_;
    Workspace& workspace_;
    Tolerance tolerance_;
    index width_;
    int threads_;
    Report report_;
    std::vector<Chunk> chunks_;
    T *starts_ = nullptr, *ends_ = nullptr;  // [chunks, width]
    index repeated_ = 0;                     // the longest repair, in steps
    bool stopped_ = false;                   // by max_iterations or progress
};

}  // namespace

template <class T>
Report evaluate_fused(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    Workspace own;
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own;
    return FusedEvaluator<T>(recurrence, trajectory, options, workspace).run();
}
template Report evaluate_fused(const ChannelwiseRecurrence<float>&, View<float>, const Options&);
template Report evaluate_fused(const ChannelwiseRecurrence<double>&, View<double>, const Options&);

namespace {

/// Numbers stored in 16 bits: cells on a GPU, and nothing else.
template <class T>
Report evaluate_stored(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    check_options(options);
    require_alone(options);
    const auto* const cell = dynamic_cast<const ChannelwiseRecurrence<T>*>(&recurrence);
    if (cell == nullptr) throw InvalidArgument("recurrence", "a cell's, for numbers stored in 16 bits", "another");
    cell::require_gpu_for_16_bits<T>(options.execution.backend);
    if (options.method == Method::newton)
        throw InvalidArgument("options.method", fused_methods, to_string(options.method));
    const Shape& shape = recurrence.shape();
    if (trajectory.shape() != shape || (trajectory.data() == nullptr && shape.count() > 0))
        throw InvalidArgument("trajectory", "memory of shape " + to_string(shape), to_string(trajectory.shape()));
    Report report;
    report.method = "sequential";
    report.sequences.resize(std::size_t(shape.batch));
    if (!trajectory.empty()) report = evaluate_on_gpu(*cell, trajectory, options);
    if (options.on_failure == OnFailure::raise && !report.ok())
        throw NotConverged("the evaluation ended as " + to_string(report.status) + ": " + report.method);
    return report;
}

}  // namespace
}  // namespace deeppcr::newton

namespace deeppcr {

template <>
Report evaluate(const Recurrence<bfloat16>& recurrence, View<bfloat16> trajectory, const Options& options) {
    return newton::evaluate_stored(recurrence, trajectory, options);
}
template <>
Report evaluate(const Recurrence<float16>& recurrence, View<float16> trajectory, const Options& options) {
    return newton::evaluate_stored(recurrence, trajectory, options);
}

}  // namespace deeppcr
