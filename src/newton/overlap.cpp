// Overlap for any recurrence:
//
//   sweep    all chunks side by side, from the initial state or a given trajectory's
//   repair   every chunk runs again from the end of the one before it, until it meets its old states; some rounds,
//            while there is something left to do
//   finish   what has not met by then, step after step
//
// Every number is tested by itself, against its own magnitude: at least as strict as the residual test of evaluate.hpp.
// On a GPU all is enqueued up to the first round of repairs; the host waits for the status, and again only where
// something is left to repair or to finish.
#include "newton/overlap.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "device/cuda.hpp"
#include "device/threads.hpp"
#include "newton/options.hpp"
#include "newton/stopwatch.hpp"
#include "recurrence/states.hpp"

namespace deeppcr::newton {
namespace {

constexpr int rounds = 3;             // of repairs before what is left is finished step after step
constexpr index rows_at_once = 1024;  // that a chunk of a trajectory with gaps runs before they are copied
constexpr index first_piece = 8;      // steps of a repair between two comparisons; then twice as many, ...
constexpr index shortest_on_gpu = 32, shortest_on_processors = 64;
constexpr index numbers_per_multiprocessor = index(1) << 14;  // of a step's matrices that its registers hold

template <class T>
using Mismatch = typename Chunks<T>::Mismatch;

/// The chunks of a section on processors, by `run`. Threads share the chunks.
template <class T>
class ByRun {
public:
    ByRun(const Recurrence<T>& recurrence, const Section& section, const Chunks<T>& chunks)
        : recurrence_(recurrence), section_(section), chunks_(chunks), width_(recurrence.shape().width) {}

    void run() const {
        std::vector<std::vector<Mismatch<T>>> found(std::size_t(chunks_.starts.steps()));
        std::vector<index> repeated(found.size(), 0);
        device::parallel_ranges(device::thread_count(section_.execution), chunks_.starts.steps(), 1,
                                [&](index first, index last) {
                                    for (index c = first; c < last; ++c) {
                                        if (chunks_.asked == nullptr)
                                            sweep(c);
                                        else
                                            repeated[std::size_t(c)] = repair(c, found[std::size_t(c)]);
                                    }
                                });
        for (const std::vector<Mismatch<T>>& of_chunk : found)
            for (std::size_t j = 0; j < of_chunk.size(); ++j) {
                Mismatch<T>& largest = chunks_.mismatches[j];
                largest.residual = std::max(largest.residual, of_chunk[j].residual);
                largest.relative_residual = std::max(largest.relative_residual, of_chunk[j].relative_residual);
            }
        for (const index steps : repeated)
            *chunks_.repeated = std::max(*chunks_.repeated, static_cast<unsigned long long>(steps));
    }

private:
    index begin(index chunk) const { return chunk * chunks_.length; }
    index end(index chunk) const { return std::min(begin(chunk) + chunks_.length, section_.steps()); }
    Section part(index first, index last, const std::vector<index>& sequences) const {
        Execution alone = section_.execution;
        alone.threads = 1;
        return {section_.first + first, section_.first + last, sequences, alone};
    }

    void sweep(index chunk) const {
        const std::vector<index> all(section_.sequences.begin(), section_.sequences.end());
        const index batch = index(all.size());
        View<const T> state = chunks_.starts.steps(chunk, chunk + 1);
        if (const View<T> own = chunks_.trajectory.steps(begin(chunk), end(chunk)); own.contiguous())
            return recurrence_.run(part(begin(chunk), end(chunk), all), state, own);
        Buffer<T> rows = Buffer<T>::uninitialised({std::min(rows_at_once, chunks_.length), batch, width_});
        Buffer<T> last(Shape{1, batch, width_});
        for (index first = begin(chunk); first < end(chunk); first += rows.shape().steps) {
            const index count = std::min(rows.shape().steps, end(chunk) - first);
            recurrence_.run(part(first, first + count, all), state, rows.view().steps(0, count));
            copy_states<T>(rows.view().steps(0, count), chunks_.trajectory.steps(first, first + count),
                           section_.execution);
            std::copy_n(rows.view().at(count - 1, 0), batch * width_, last.data());
            state = last.view();
        }
    }

    /// Returns the steps that were repeated.
    index repair(index chunk, std::vector<Mismatch<T>>& found) const {
        std::vector<index> running;  // columns of the trajectory
        for (index j = 0; j < section_.batch(); ++j)
            if (chunks_.asked[chunk * section_.batch() + j] != 0) running.push_back(j);
        if (running.empty()) return 0;
        found.resize(std::size_t(section_.batch()));
        std::vector<T> states;
        for (const index j : running) {
            const T* const start = chunks_.starts.at(chunk, j);
            states.insert(states.end(), start, start + width_);
        }
        index repeated = 0, piece = first_piece;
        for (index first = begin(chunk); first < end(chunk) && !running.empty(); piece *= 2) {
            const index count = std::min({piece, rows_at_once, end(chunk) - first}), batch = index(running.size());
            std::vector<index> sequences;
            for (const index j : running) sequences.push_back(section_.sequences[std::size_t(j)]);
            const Buffer<T> rows = Buffer<T>::uninitialised({count, batch, width_});
            recurrence_.run(part(first, first + count, sequences), View<const T>(states.data(), {1, batch, width_}),
                            rows.view());
            std::vector<index> left;
            states.clear();
            for (index j = 0; j < batch; ++j) {
                const index column = running[std::size_t(j)];
                index i = 0;
                while (i < count && !meets(rows.view().at(i, j), chunks_.trajectory.at(first + i, column),
                                           found[std::size_t(column)])) {
                    std::copy_n(rows.view().at(i, j), width_, chunks_.trajectory.at(first + i, column));
                    ++i;
                }
                repeated = std::max(repeated, first - begin(chunk) + std::min(i + 1, count));
                if (i < count) continue;
                left.push_back(column);
                const T* const state = rows.view().at(count - 1, j);
                states.insert(states.end(), state, state + width_);
            }
            running = std::move(left);
            first += count;
        }
        for (const index j : running) chunks_.changed[chunk * section_.batch() + j] = 1;
        return repeated;
    }

    /// Whether a new state is the old one within the tolerance, and how far apart they are. NaN and infinity never are.
    bool meets(const T* now, const T* old, Mismatch<T>& mismatch) const {
        double residual = 0, relative = 0;
        for (index k = 0; k < width_; ++k) {
            const double apart = std::abs(double(now[k]) - double(old[k]));
            const double allowed = chunks_.absolute_tolerance + chunks_.relative_tolerance * std::abs(double(old[k]));
            if (!(apart <= allowed && std::isfinite(apart))) return false;
            residual = std::max(residual, apart);
            if (apart > 0) relative = std::max(relative, apart / allowed);
        }
        mismatch = {std::bit_cast<unsigned long long>(residual), std::bit_cast<unsigned long long>(relative)};
        return true;
    }

    const Recurrence<T>& recurrence_;
    const Section& section_;
    const Chunks<T>& chunks_;
    index width_;
};

template <class T>
class Overlap {
public:
    Overlap(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options, Workspace& workspace)
        : recurrence_(recurrence),
          trajectory_(trajectory),
          options_(options),
          workspace_(workspace),
          steps_(trajectory.steps()),
          batch_(trajectory.batch()),
          width_(trajectory.width()),
          on_gpu_(options.execution.backend == Backend::cuda),
          all_(static_cast<std::size_t>(trajectory.batch())) {
        std::iota(all_.begin(), all_.end(), index(0));
        chunks_.length =
            options.chunk > 0 ? std::min(options.chunk, steps_) : overlap_chunk(trajectory.shape(), options.execution);
        count_ = (steps_ + chunks_.length - 1) / chunks_.length;
    }

    Report run() {
        const Clock::time_point begin = Clock::now();
        const Workspace::Scope scope(workspace_);
        const Tolerance tolerance = tolerance_of<T>(options_);
        chunks_.absolute_tolerance = tolerance.absolute;
        chunks_.relative_tolerance = tolerance.relative;
        starts_ = workspace_.template take_states<T>({count_, batch_, width_});
        initial_ = workspace_.template take_states<T>({1, batch_, width_});
        chunks_.starts = starts_;
        chunks_.trajectory = trajectory_;
        take_told();

        recurrence_.initial({0, 0, all_, options_.execution}, initial_);
        gather(options_.guess == Guess::given ? View<const T>(trajectory_) : View<const T>());
        advance({0, steps_, all_, options_.execution}, chunks_);
        int round = 0;
        do {
            repair(round++);
        } while (!on_gpu_ && round < rounds && pending(list(round)));
        look_for_non_finite();
        Found found = fetch(list(round));
        if (on_gpu_ && std::find(found.left.begin(), found.left.end(), 1) != found.left.end()) {
            while (round < rounds) repair(round++);
            fill(non_finite_, 0, batch_ * index(sizeof *non_finite_));
            look_for_non_finite();
            found = fetch(list(round));
        }
        report_.iterations = 1 + round;
        describe_result(list(round), std::move(found));
        report_.seconds = seconds_since(begin);
        report_.workspace_bytes = workspace_.peak_bytes();
        return std::move(report_);
    }

private:
    index list_bytes() const { return (count_ + 1) * batch_; }
    /// Of each chunk of a round whether the one before it has changed, so that it is to be repaired; what a round
    /// leaves to the next goes there a chunk further on. That of round 1 lies first.
    unsigned char* list(int round) const { return lists_ + (round + rounds) % (rounds + 1) * list_bytes(); }

    /// What the sweeps tell, in one piece of memory, which begins with what is fetched after one round.
    void take_told() {
        using Word = unsigned long long;
        constexpr index word = index(sizeof(Word));
        const index bytes = batch_ * (index(sizeof(Mismatch<T>)) + word) + word,
                    all = bytes + (rounds + 1) * list_bytes();
        told_ = workspace_.template take<unsigned char>(all);
        if (on_gpu_) letter_.emplace();
        chunks_.mismatches = reinterpret_cast<Mismatch<T>*>(told_);
        non_finite_ = reinterpret_cast<Word*>(chunks_.mismatches + batch_);
        chunks_.repeated = non_finite_ + batch_;
        lists_ = told_ + bytes;
        fill(told_, 0, all);
        fill(list(0) + batch_, 1, (count_ - 1) * batch_);
    }
    void fill(void* memory, int value, index bytes) const {
        if (on_gpu_)
            device::fill_bytes(memory, value, bytes, options_.execution.stream);
        else
            std::fill_n(static_cast<unsigned char*>(memory), bytes, static_cast<unsigned char>(value));
    }
    /// What there is to report, brought to main memory.
    struct Found {
        std::vector<unsigned char> left;  // chunks to be repaired
        std::vector<Mismatch<T>> mismatches;
        std::vector<unsigned long long> non_finite, repeated;
    };
    Found fetch(const unsigned char* list) {
        std::vector<unsigned char> told(static_cast<std::size_t>(list + count_ * batch_ - told_));
        if (on_gpu_)
            letter_->fetch(told.data(), told_, index(told.size()), options_.execution.stream);
        else
            std::copy_n(told_, told.size(), told.begin());
        const auto part = [&]<class Number>(const Number* from, index count) {
            std::vector<Number> numbers(static_cast<std::size_t>(count));
            std::memcpy(numbers.data(), told.data() + (reinterpret_cast<const unsigned char*>(from) - told_),
                        numbers.size() * sizeof(Number));
            return numbers;
        };
        return {part(list, count_ * batch_), part(chunks_.mismatches, batch_), part(non_finite_, batch_),
                part(chunks_.repeated, 1)};
    }

    void gather(View<const T> trajectory) {
        if (on_gpu_) return gather_starts<T>(trajectory, initial_, chunks_.length, starts_, options_.execution.stream);
        for (index c = 0; c < count_; ++c)
            for (index j = 0; j < batch_; ++j)
                std::copy_n(c == 0 || trajectory.data() == nullptr ? initial_.at(0, j)
                                                                   : trajectory.at(c * chunks_.length - 1, j),
                            width_, starts_.at(c, j));
    }

    void advance(const Section& section, const Chunks<T>& chunks) const {
        if (!on_gpu_)
            ByRun<T>(recurrence_, section, chunks).run();
        else if (!recurrence_.run_chunks(section, chunks))
            throw InvalidArgument("options.method", "newton or sequential, as the recurrence has no run_chunks",
                                  to_string(options_.method));
    }

    void repair(int round) {
        gather(trajectory_);
        chunks_.asked = list(round);
        chunks_.changed = list(round + 1) + batch_;
        advance({0, steps_, all_, options_.execution}, chunks_);
    }

    /// Of processors: whether a chunk is still to be repaired.
    bool pending(const unsigned char* list) const {
        return std::find(list, list + count_ * batch_, 1) != list + count_ * batch_;
    }

    void look_for_non_finite() {
        if (on_gpu_) return find_non_finite<T>(trajectory_, non_finite_, options_.execution.stream);
        for (index j = 0; j < batch_; ++j) {
            index i = 0;
            const auto finite = [](T value) { return std::isfinite(value); };
            while (i < steps_ && std::all_of(trajectory_.at(i, j), trajectory_.at(i, j) + width_, finite)) ++i;
            non_finite_[j] = static_cast<unsigned long long>(steps_ - i);
        }
    }

    void describe_result(const unsigned char* list, Found found) {
        report_.sequences.resize(all_.size());
        report_.lyapunov = report_.error = std::numeric_limits<double>::quiet_NaN();
        index first_left = count_;
        for (index c = count_ - 1; c > 0; --c)
            for (index j = 0; j < batch_; ++j) {
                Report::Sequence& sequence = report_.sequences[std::size_t(j)];
                if (found.left[std::size_t(c * batch_ + j)] == 0) continue;
                first_left = c;
                sequence.confirmed = c * chunks_.length;
                sequence.status = Status::max_iterations;
            }
        if (first_left < count_ && options_.on_failure == OnFailure::finish) {
            finish(first_left);
            found = fetch(list);
        }
        for (std::size_t j = 0; j < all_.size(); ++j) {
            Report::Sequence& sequence = report_.sequences[j];
            if (sequence.status != Status::max_iterations) sequence.confirmed = steps_;
            sequence.error = std::numeric_limits<double>::quiet_NaN();
            sequence.iterations = report_.iterations;
            sequence.residual = std::bit_cast<double>(found.mismatches[j].residual);
            sequence.relative_residual = std::bit_cast<double>(found.mismatches[j].relative_residual);
            if (const index rest = index(found.non_finite[j]); rest > 0 && steps_ - rest < sequence.confirmed) {
                sequence.confirmed = steps_ - rest;
                sequence.status = Status::non_finite;
            }
            report_.status = std::max(report_.status, sequence.status);
            report_.residual = std::max(report_.residual, sequence.residual);
            report_.relative_residual = std::max(report_.relative_residual, sequence.relative_residual);
        }
        report_.window = chunks_.length;
        report_.method = "overlap, " + std::to_string(count_) + " chunks of " + std::to_string(chunks_.length) +
                         " steps, " + std::to_string(found.repeated[0]) + " steps repeated";
    }

    /// All sequences from the first chunk on that does not fit, step after step: those that fit get the states of their
    /// own f again.
    void finish(index chunk) {
        gather(trajectory_);
        const index first = chunk * chunks_.length;
        Chunks<T> rest;
        rest.length = steps_ - first;
        rest.starts = starts_.steps(chunk, chunk + 1);
        rest.trajectory = trajectory_.steps(first, steps_);
        rest.mismatches = chunks_.mismatches;
        rest.repeated = chunks_.repeated;
        advance({first, steps_, all_, options_.execution}, rest);
        for (Report::Sequence& sequence : report_.sequences) {
            if (sequence.status != Status::max_iterations) continue;
            sequence.status = Status::finished_sequentially;
            report_.sequential_steps += steps_ - first;
        }
        fill(non_finite_, 0, batch_ * index(sizeof *non_finite_));
        look_for_non_finite();
    }

    const Recurrence<T>& recurrence_;
    View<T> trajectory_;
    const Options& options_;
    Workspace& workspace_;
    index steps_, batch_, width_, count_ = 0;
    bool on_gpu_;
    std::vector<index> all_;
    Chunks<T> chunks_;
    View<T> starts_, initial_;
    unsigned char *told_ = nullptr, *lists_ = nullptr;
    std::optional<device::Letter> letter_;
    unsigned long long* non_finite_ = nullptr;
    Report report_;
};

}  // namespace

index overlap_chunk(const Shape& shape, const Execution& execution) {
    index wanted = device::thread_count(execution), shortest = shortest_on_processors;
    if (execution.backend == Backend::cuda) {
        const index side_by_side = std::clamp<index>(numbers_per_multiprocessor / (shape.width * shape.width), 1, 16);
        wanted = device::multiprocessors() * side_by_side / shape.batch;
        shortest = shortest_on_gpu;
    }
    wanted = std::max<index>(1, wanted);
    return std::min(shape.steps, std::max(shortest, (shape.steps + wanted - 1) / wanted));
}

template <class T>
Report evaluate_by_overlap(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    const bool on_gpu = options.execution.backend == Backend::cuda;
    if (on_gpu) {
        check_gpu_arguments(recurrence, options);
        device::require_on_gpu("trajectory", trajectory.data());
    } else if (options.workspace != nullptr && !options.workspace->device().is_host()) {
        throw InvalidArgument("options.workspace", "a workspace where the arrays are", "one elsewhere");
    }
    Workspace own(options.execution);
    return Overlap<T>(recurrence, trajectory, options, options.workspace != nullptr ? *options.workspace : own).run();
}

template Report evaluate_by_overlap(const Recurrence<float>&, View<float>, const Options&);
template Report evaluate_by_overlap(const Recurrence<double>&, View<double>, const Options&);

}  // namespace deeppcr::newton
