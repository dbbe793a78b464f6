// Newton's method for any recurrence on a GPU, pass by pass as evaluate.cpp has it on a processor:
//
//   linearise   the recurrence's callback: f and J at all states of the window
//   test        -r_t, and the first step of each sequence that fails the residual test. The last block to end confirms
//               the steps before it; the first step beyond is cut off from its predecessor (J = 0), so that the frozen
//               prefix passes nothing on
//   solve       d_t = J_t d_{t-1} - r_t
//   settle      x_t <- x_t + d_t beyond the confirmed steps; the residuals of those just confirmed
//
// After the test a few numbers (Summary) are in the host's memory, which hears them while the GPU solves, so that the
// next pass is enqueued before this one ends, and none too many. Where a solve takes long, it is not enqueued before
// the host knows that anything is left to solve for. Passes that nobody hears (EnqueuedEvaluation) change nothing after
// the one that confirms the last step. All sequences take part in all passes.
//
// The window slides by a pointer: states have room for two windows, and move back to the beginning once per window.
//
// test, settle: a row (one state of one sequence) has as many neighbouring threads as the width, up to a warp. Without
// J, which the callback writes and the solve reads, test reads x and f and writes -r; settle reads x and d and writes
// x: 6 numbers per element. Maxima and the first failing step are found by atomic maxima of integers, whose order does
// not matter: the same bits every time.
#include "newton/newton_gpu.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "device/cuda.hpp"
#include "newton/estimate.hpp"
#include "newton/lyapunov.hpp"
#include "newton/options.hpp"
#include "newton/review.hpp"
#include "newton/rows.cuh"
#include "newton/stopwatch.hpp"

namespace deeppcr::newton {
namespace {

constexpr index sequential_piece = 1024;  // steps between two copies to the caller's array
/// Read and written by a pass, per multiprocessor. The host waits for the outcome of each pass to spare the last one's
/// solve; of fewer bytes that should take less than all the waits (estimated, not measured).
constexpr index bytes_worth_waiting = 2 << 20;
constexpr index most_tracks_of_a_block = 1024, most_entries_of_a_block = 1 << 16;  // that one block gets through
/// Per multiprocessor: of more, finding out which is the last should take longer than a launch (estimated likewise).
constexpr index most_blocks_to_ask = 16;
constexpr index least_slide = 8;                  // a window slides by at least one part in so many
constexpr index growth_rows = 256;                // followed for the Report's Lyapunov exponent
constexpr index growth_entries = index(1) << 20;  // of Jacobians that are brought to the host at a time

/// What a pass knows of one sequence. Steps count from the beginning of the trajectory.
struct Track {
    Word confirmed;         ///< leading steps that passed the residual test; frozen
    Word confirmed_before;  ///< likewise, before this pass
    Word failed;            ///< from the first step that fails in this pass to the window's end; 0: none does
    Word bad;               ///< likewise, of the first whose f is not finite
    Word residual, relative_residual;  ///< maxima over the confirmed steps
    Word error;                        ///< likewise, of the estimate
    Word iterations;                   ///< passes until the last step was confirmed
    Word ended;                        ///< 1: f of the last confirmed state is not finite
    Word singular;                     ///< 1: a Jacobian of the confirmed steps is not finite
};

/// For the kernels of rows.cuh.
struct Tracks {
    Track* all;
    __device__ index confirmed(index j) const { return index(all[j].confirmed); }
    __device__ Word* error(index j) const { return &all[j].error; }
};

/// What the host hears of a pass.
struct Summary {
    Word left;       ///< steps not confirmed, of the sequence that has most of them; 0: all is done
    Word confirmed;  ///< the sum over the sequences
    Word worst;      ///< largest relative residual among the steps not confirmed
    Word tested;     ///< blocks of threads that have tested their rows
};
constexpr index summaries = 3;  // of the pass before, of this one, and of the next, which begins with zeros

/// The window in a pass.
template <class T>
struct Pass : Rows<T> {
    index first, steps;
    Track* tracks;
    const Summary* before;
    Summary *now, *next;
    Summary* heard;  ///< in the host's memory; null: nobody hears
    bool advances;   ///< whether the last block of the test advances the tracks
    Word* resets;
};

/// What the sequential finish found of one sequence.
struct Ending {
    Word bad;       ///< steps from the first state that is not finite on
    Word last_bad;  ///< 1: the last state is not finite
};

template <class T>
__device__ void test_row(const Pass<T>& pass, index row, int lane) {
    const index width = pass.width;
    const bool exists = row < pass.rows * pass.batch;
    const index step = pass.first + (exists ? row / pass.batch : 0);
    Track* const track = pass.tracks + (exists ? row % pass.batch : 0);
    const bool open = exists && track->ended == 0 && Word(step) >= track->confirmed;
    T* const state = pass.states + (row + pass.batch) * width;
    Norms<T> norms;
    for (index k = lane; exists && k < width; k += pass.lanes) {
        const T f = pass.after[row * width + k];
        if (pass.rows == 1 && open) state[k] = f;  // of a confirmed state: exact, as sequential evaluation has it
        const T x = state[k];
        pass.update[row * width + k] = open ? f - x : T(0);
        norms.add(x, f);
    }
    norms.join(pass.lanes);
    if (!open) {
        if (exists && track->singular != 0) pass.cut_off(row, lane, pass.lanes);  // infinity times 0 would be NaN
        return;
    }
    const double relative = norms.relative(pass.tolerance);
    const bool good = norms.bad == 0;
    if (good && relative <= 1) return;
    const Word left = Word(pass.first + pass.rows - step);
    if (lane == 0) {
        raise(&track->failed, left);
        if ((norms.bad & 2) != 0) raise(&track->bad, left);
        raise(&pass.now->worst, word_of(good ? relative : infinity()));
        if (!good) atomicAdd(pass.resets, Word(1));
    }
    if (!good) pass.isolate(row, lane, norms, index(track->confirmed) - pass.first);
}

/// When all rows of a sequence are tested.
template <class T>
__device__ void advance_track(const Pass<T>& pass, Track& track) {
    const Word last = Word(pass.first + pass.rows), steps = Word(pass.steps);
    track.confirmed_before = track.confirmed;
    if (track.ended == 0 && track.confirmed < steps) {
        track.confirmed = track.failed > 0 ? last - track.failed : larger(track.confirmed, last);
        track.ended = track.failed > 0 && track.bad == track.failed ? 1 : 0;
        ++track.iterations;
    }
    track.failed = track.bad = 0;
    atomicAdd(&pass.now->confirmed, track.confirmed);
    if (track.ended == 0) raise(&pass.now->left, steps - track.confirmed);
}
/// By so many threads: the first step beyond the confirmed ones.
template <class T>
__device__ void cut_off_track(const Pass<T>& pass, index j, index thread, index threads) {
    const Track& track = pass.tracks[j];
    if (track.ended == 0 && track.confirmed < Word(pass.first + pass.rows))
        pass.cut_off((index(track.confirmed) - pass.first) * pass.batch + j, thread, threads);
}

template <class T>
__global__ void __launch_bounds__(plain_threads) test_rows(const __grid_constant__ Pass<T> pass) {
    if (this_thread() == 0) *pass.next = {};
    if (pass.before->left == 0) return;
    test_row(pass, this_thread() / pass.lanes, int(threadIdx.x) % pass.lanes);
    if (!pass.advances || !is_last_block(&pass.now->tested)) return;
    const index thread = threadIdx.x, threads = blockDim.x;
    for (index j = thread; j < pass.batch; j += threads) advance_track(pass, pass.tracks[j]);
    __syncthreads();
    __threadfence();
    if (pass.heard != nullptr && thread == 0) *pass.heard = *pass.now;
    const index together = pass.batch < threads / 32 ? threads : index(pass.lanes);
    for (index j = thread / together; j < pass.batch; j += threads / together)
        cut_off_track(pass, j, thread % together, together);
}

/// A block of threads for each sequence, where they are too much for the last block of the test.
template <class T>
__global__ void __launch_bounds__(plain_threads) advance_tracks(const __grid_constant__ Pass<T> pass) {
    if (pass.before->left == 0) return;
    if (threadIdx.x == 0) advance_track(pass, pass.tracks[blockIdx.x]);
    __syncthreads();
    cut_off_track(pass, blockIdx.x, threadIdx.x, blockDim.x);
}

template <class T>
__global__ void __launch_bounds__(plain_threads) settle_rows(const __grid_constant__ Pass<T> pass) {
    if (pass.before->left == 0) return;
    const int lanes = pass.lanes, lane = int(threadIdx.x) % lanes;
    const index row = this_thread() / lanes, width = pass.width;
    const bool exists = row < pass.rows * pass.batch;
    const Word step = Word(pass.first + (exists ? row / pass.batch : 0));
    Track* const track = pass.tracks + (exists ? row % pass.batch : 0);
    const Word confirmed = track->confirmed;
    const bool fresh = exists && step >= track->confirmed_before && step < confirmed;
    const bool beyond = exists && track->ended == 0 && step >= confirmed;
    T* const state = pass.states + (row + pass.batch) * width;
    // The update of a confirmed step is finite, unless its Jacobian, or one before it, is not.
    if (exists && step < confirmed)
        for (index k = lane; k < width; k += lanes)
            if (!finite(pass.update[row * width + k])) track->singular = 1;
    // What the state is compared with, or what it becomes.
    const auto other = [&](index k) {
        const index at = row * width + k;
        return beyond && step > confirmed ? state[k] + pass.update[at] : pass.after[at];
    };
    Norms<T> norms;
    for (index k = lane; (fresh || beyond) && k < width; k += lanes) norms.add(state[k], other(k));
    norms.join(lanes);
    if (fresh && lane == 0) {
        raise(&track->residual, word_of(double(norms.residual)));
        raise(&track->relative_residual, word_of(norms.relative(pass.tolerance)));
    }
    if (!beyond) return;
    if (step > confirmed && (norms.bad & 2) != 0) {  // keeps its value
        if (lane == 0) atomicAdd(pass.resets, Word(1));
        return;
    }
    for (index k = lane; k < width; k += lanes) state[k] = other(k);
}

template <class T>
struct Strided {
    T* data;
    index step_stride, batch_stride;
    explicit Strided(const View<T>& view)
        : data(view.data()), step_stride(view.step_stride()), batch_stride(view.batch_stride()) {}
    __device__ T& at(index step, index sequence, index element) const {
        return data[step * step_stride + sequence * batch_stride + element];
    }
};

/// First guesses of the steps first.. : what is confirmed already, what the trajectory holds, or the state `last`.
template <class T>
__global__ void __launch_bounds__(plain_threads)
    enter_rows(const Strided<T> trajectory, const Track* tracks, index first, bool given, const T* last,
               const Elements all, T* states) {
    const index i = this_thread();
    if (i >= all.count) return;
    const index step = first + all.step(i), j = all.sequence(i), k = all.element(i);
    states[i] = given || Word(step) < tracks[j].confirmed ? trajectory.at(step, j, k) : last[j * all.width + k];
}

/// The guesses f(x) of what is not confirmed.
template <class T>
__global__ void __launch_bounds__(plain_threads)
    take_guesses(const T* guesses, const Track* tracks, index first, const Elements all, T* states) {
    const index i = this_thread();
    if (i < all.count && Word(first + all.step(i)) >= tracks[all.sequence(i)].confirmed) states[i] = guesses[i];
}

/// Writes the states of steps first.. to the caller's array: what is confirmed, or everything.
template <class T>
__global__ void __launch_bounds__(plain_threads)
    store_rows(const T* states, const Track* tracks, index first, bool everything, const Elements all,
               const Strided<T> trajectory) {
    const index i = this_thread();
    if (i >= all.count) return;
    const index step = first + all.step(i), j = all.sequence(i);
    if (everything || Word(step) < tracks[j].confirmed) trajectory.at(step, j, all.element(i)) = states[i];
}

/// Sequences whose sequential steps begin with `step` start from the step before it, which the caller's array holds.
template <class T>
__global__ void __launch_bounds__(plain_threads)
    join_states(const Strided<T> trajectory, const index* starts, index step, const Elements all, T* state) {
    const index i = this_thread();
    if (i < all.count && step > 0 && starts[all.sequence(i)] == step)
        state[i] = trajectory.at(step - 1, all.sequence(i), all.element(i));
}

/// Steps first.. of the sequences that have started go to the caller's array.
template <class T>
__global__ void __launch_bounds__(plain_threads)
    leave_states(const T* rows, const index* starts, index first, index steps, const Elements all,
                 const Strided<T> trajectory, Ending* endings) {
    const index i = this_thread();
    if (i >= all.count) return;
    const index step = first + all.step(i), j = all.sequence(i);
    if (starts[j] > step) return;
    T& there = trajectory.at(step, j, all.element(i));
    if (&there != rows + i) there = rows[i];
    if (finite(rows[i])) return;
    raise(&endings[j].bad, Word(steps - step));
    if (step == steps - 1) raise(&endings[j].last_bad, 1);
}

/// One evaluation. Rows count from `first_`, a step that all sequences that go on have confirmed.
template <class T>
class GpuNewton {
public:
    GpuNewton(const Recurrence<T>& recurrence, const View<T>& trajectory, const Options& options, Workspace& workspace)
        : recurrence_(recurrence),
          trajectory_(trajectory),
          options_(options),
          workspace_(workspace),
          scope_(workspace),
          stream_(options.execution.stream),
          steps_(recurrence.shape().steps),
          batch_(recurrence.shape().batch),
          width_(recurrence.shape().width),
          block_(jacobian_block(recurrence, options.surrogate)),
          multiprocessors_(device::multiprocessors()),
          sequences_(std::size_t(batch_)) {
        if (options.anderson > 0)
            throw InvalidArgument("options.anderson", "0, for Backend::cuda", std::to_string(options.anderson));
        if (options.damping > 0)
            throw InvalidArgument("options.damping", "0 or less, for Backend::cuda", std::to_string(options.damping));
        device::require_on_gpu("trajectory", trajectory.data());
        std::iota(sequences_.begin(), sequences_.end(), index(0));
        take_memory();
    }

    index window() const { return window_; }

    /// patience: as Choice has it.
    Report evaluate(double patience) {
        const Clock::time_point begin = Clock::now();
        report_ = {};
        report_.method = describe(options_);
        if (options_.method == Method::sequential) {
            report_.sequences.resize(sequences_.size());
            run_sequentially(std::vector<index>(sequences_.size(), 0));
            for (Report::Sequence& sequence : report_.sequences) sequence.error = unknown;
        } else {
            begin_passes();
            const Status status = run_passes(patience);
            end_passes();
            complete(status);
        }
        summarise(begin);
        return std::move(report_);
    }

    void enqueue(index passes) {
        report_ = {};
        report_.method = describe(options_);
        begin_passes();
        for (index pass = 0; pass < passes; ++pass) {
            enqueue_test(nullptr);
            enqueue_update(true);
        }
        end_passes();
    }

    /// Of what was enqueued last, or replayed.
    Report finish() {
        const Clock::time_point begin = Clock::now();
        const Report enqueued = report_;
        complete(options_.on_failure == OnFailure::finish ? Status::finished_sequentially : Status::max_iterations);
        summarise(begin);
        return std::exchange(report_, enqueued);
    }

private:
    using Letter = device::Letter;
    static constexpr double unknown = std::numeric_limits<double>::quiet_NaN();

    /// All that will be needed, before anything is changed; the solver takes its own in the first pass.
    void take_memory() {
        const bool newton = options_.method != Method::sequential;
        if (newton) {
            window_ = next_window_ = window_length<T>(recurrence_, options_, block_);
            capacity_ = std::min(steps_, 2 * window_ + 1);
            const index elements = Shape{window_, batch_, width_}.count();
            states_ = workspace_.template take<T>(Shape{capacity_ + 1, batch_, width_}.count());
            after_ = workspace_.template take<T>(elements);
            update_ = workspace_.template take<T>(elements);
            if (block_ > 0) jacobian_ = workspace_.template take<T>(Shape{window_, batch_ * width_, block_}.count());
            if (estimating()) carried_ = workspace_.template take<T>(batch_ * width_);
        } else {
            after_ = workspace_.template take<T>(Shape{piece(), batch_, width_}.count());
        }
        state_ = workspace_.template take<T>(batch_ * width_);
        tracks_ = workspace_.template take<Track>(batch_);
        summaries_ = workspace_.template take<Summary>(summaries);
        resets_ = workspace_.template take<Word>(1);
        starts_ = workspace_.template take<index>(batch_);
        endings_ = workspace_.template take<Ending>(batch_);
    }

    Section section(index first, index last) const {
        return {first, last, sequences_, options_.execution, &workspace_};
    }
    /// Rows of the window at hand.
    index rows() const { return std::min(window_, steps_ - first_); }
    Shape shape(index count) const { return {count, batch_, width_}; }
    T* row(index i) const { return states_ + (base_ + i) * batch_ * width_; }
    Jacobian<T> jacobian() const { return {jacobian_, shape(rows()), block_}; }
    bool estimating() const {
        return options_.estimates != Estimates::none && block_ > 0 && options_.surrogate == Surrogate::full;
    }
    bool following_growth() const {
        return options_.estimates != Estimates::none && block_ == recurrence_.block() &&
               options_.surrogate != Surrogate::identity;
    }

    // --- passes

    void begin_passes() {
        first_ = base_ = stored_ = passes_ = 0;
        report_.window = window_;
        device::fill_bytes(tracks_, 0, batch_ * index(sizeof(Track)), stream_);
        device::fill_bytes(resets_, 0, index(sizeof(Word)), stream_);
        device::fill_bytes(summaries_, 0, index(sizeof(Summary)), stream_);
        // Before the first pass all is left.
        device::fill_bytes(summaries_ + summaries - 1, 0xFF, index(sizeof(Summary)), stream_);
        if (estimating()) device::fill_bytes(carried_, 0, batch_ * width_ * index(sizeof(T)), stream_);
        recurrence_.initial(section(0, 0), View<T>(row(0), shape(1)));
        enter(0);
    }

    Pass<T> pass() const {
        Pass<T> pass{};
        pass.states = row(0);
        pass.after = after_;
        pass.update = update_;
        pass.jacobian = jacobian_;
        pass.block = block_;
        pass.rows = rows();
        pass.batch = batch_;
        pass.width = width_;
        pass.lanes = lanes_of(width_);
        pass.tolerance = tolerance_of<T>(options_);
        pass.first = first_;
        pass.steps = steps_;
        pass.tracks = tracks_;
        pass.before = summaries_ + (passes_ + summaries - 1) % summaries;
        pass.now = summaries_ + passes_ % summaries;
        pass.next = summaries_ + (passes_ + 1) % summaries;
        pass.resets = resets_;
        return pass;
    }
    cuda::Launch by_row() const { return cuda::one_each(rows() * batch_ * lanes_of(width_), stream_); }
    index row_bytes() const { return rows() * batch_ * width_ * index(sizeof(T)); }

    /// The first half of a pass; letter: the Summary's, or null.
    void enqueue_test(Letter* letter) {
        linearise();
        Pass<T> tested = pass();
        const index entries = width_ * std::max<index>(block_, 1);
        tested.advances = batch_ <= most_tracks_of_a_block && batch_ * entries <= most_entries_of_a_block &&
                          index(by_row().blocks.x) <= most_blocks_to_ask * multiprocessors_;
        if (letter != nullptr && tested.advances) tested.heard = static_cast<Summary*>(letter->paper());
        cuda::launch(by_row(), test_rows<T>, tested);
        if (!tested.advances) {
            cuda::launch({dim3(unsigned(batch_)), cuda::one_each(entries, stream_).threads, 0, stream_},
                         advance_tracks<T>, tested);
            if (letter != nullptr) device::copy_from_gpu(letter->paper(), tested.now, index(sizeof(Summary)), stream_);
        }
        if (letter != nullptr) letter->send(stream_);
        report_.linearise.bytes += (2 + block_) * row_bytes();
    }

    /// The second half. Where nothing is left, there is nothing to solve for.
    void enqueue_update(bool left) {
        if (left && options_.surrogate != Surrogate::zero) {
            const View<T> update(update_, shape(rows()));
            solve(BidiagonalSystem<T>{jacobian(), update}, update, solve_options());
            report_.reduce.bytes += (2 + block_) * row_bytes();
        }
        cuda::launch(by_row(), settle_rows<T>, pass());
        ++passes_;
        report_.update.bytes += 6 * row_bytes();
    }

    void linearise() {
        const Section where = section(first_, first_ + rows());
        const View<const T> before(row(0), shape(rows()));
        const View<T> after(after_, shape(rows()));
        switch (options_.surrogate) {
            case Surrogate::full:
                return recurrence_.linearise(where, before, after, jacobian());
            case Surrogate::diagonal:
                return recurrence_.linearise_diagonal(where, before, after, jacobian());
            case Surrogate::identity:
                for_each(elements_of(shape(rows())), stream_, fill_ones<T>, jacobian_, rows() * batch_ * width_);
                [[fallthrough]];
            case Surrogate::zero:
                return recurrence_.step(where, before, after);
        }
    }

    /// Enqueues passes until the host hears that all is done, or that they do not help.
    Status run_passes(double patience) {
        Clock::time_point begin;  // of the second pass
        Letter letter;
        const index limit = options_.max_iterations > 0 ? options_.max_iterations : std::numeric_limits<index>::max();
        const Status failure =
            options_.on_failure == OnFailure::finish ? Status::finished_sequentially : Status::max_iterations;
        Review review;
        index confirmed = 0;  // by all sequences together
        for (;;) {
            enqueue_test(&letter);
            const bool waits = (4 + block_) * row_bytes() > bytes_worth_waiting * multiprocessors_;
            if (!waits) enqueue_update(true);
            const Summary summary = *static_cast<const Summary*>(letter.receive());
            if (waits) enqueue_update(summary.left > 0);
            const index everywhere = steps_ - index(summary.left);
            const bool go_on = !options_.progress || options_.progress(everywhere, steps_, passes_);
            report_.residuals.push_back(std::bit_cast<double>(summary.worst));
            if (summary.left == 0) return Status::converged;
            if (!go_on) return Status::max_iterations;
            if (passes_ >= limit) return failure;
            if (passes_ == 1) begin = Clock::now();  // the first pass may have loaded kernels
            if (seconds_since(begin) > patience * double(summary.left)) return Status::finished_sequentially;
            review.add(double(index(summary.confirmed) - confirmed) / double(batch_),
                       std::bit_cast<double>(summary.worst));
            confirmed = index(summary.confirmed);
            if (passes_ % review_period == 0 && !review.conclude(rows(), window_, report_.window_shrinks > 0) &&
                window_ > 1) {
                next_window_ = shorter_window();
                if (next_window_ < smallest_window) return failure;
                ++report_.window_shrinks;
            }
            const index shift = everywhere - first_;
            if (next_window_ < window_ || least_slide * shift >= rows()) slide(shift);
        }
    }

    /// As much as products of the Jacobians leave digits for, between an eighth and a half of the window.
    index shorter_window() {
        const index half = rows() / 2;
        if (options_.surrogate != Surrogate::full) return half;
        LyapunovEstimate<T> growth(width_, block_);
        follow_growth(growth, batch_, std::min(rows(), rows_to_follow));
        return shortened_window<T>(half, growth.exponent());
    }

    /// Follows the window's first rows of the first sequences, up to the first row that is cut off.
    void follow_growth(LyapunovEstimate<T>& growth, index sequences, index count) {
        const index entries = width_ * block_;
        count = std::min(count, growth_entries / std::max<index>(1, batch_ * entries));
        if (count <= 0) return;
        std::vector<T> here(std::size_t(count * batch_ * entries));
        device::copy_from_gpu(here.data(), jacobian_, index(here.size() * sizeof(T)), stream_);
        device::synchronise(stream_);
        const Jacobian<T> blocks(here.data(), shape(count), block_);
        for (index j = 0; j < sequences; ++j) {
            const auto cut_off = [&](index i) {
                return std::all_of(blocks.at(i, j), blocks.at(i, j) + entries, [](T entry) { return entry == T(0); });
            };
            index connected = 0;
            while (connected < count && !cut_off(connected)) ++connected;
            growth.follow(j, blocks, j, connected);
        }
    }

    /// Moves the window to the first step that not all sequences have confirmed; new rows enter at its end.
    void slide(index shift) {
        const index kept = rows() - shift;
        estimate_errors(shift);
        follow(shift);
        if (next_window_ < window_) store(first_ + rows(), false);  // what is confirmed leaves the window, too
        base_ += shift;
        first_ += shift;
        window_ = std::min(window_, next_window_);
        if (rows() <= kept) return;
        if (base_ + rows() > capacity_) {  // what is kept lies behind all that it moves to
            store(first_, false);
            stored_ = first_;
            device::copy_on_gpu(states_, row(0), (kept + 1) * batch_ * width_ * index(sizeof(T)), stream_);
            base_ = 0;
        }
        enter(kept);
    }

    /// First guesses for the window's rows from `from` on.
    void enter(index from) {
        const Elements entering = elements_of(shape(rows() - from));
        T* const states = row(from + 1);
        for_each(entering, stream_, enter_rows<T>, Strided<T>(trajectory_), tracks_, first_ + from,
                 options_.guess == Guess::given, row(from), entering, states);
        if (options_.guess != Guess::first_step || entering.count == 0) return;
        recurrence_.step(section(first_ + from, first_ + rows()), View<const T>(states, shape(rows() - from)),
                         View<T>(after_, shape(rows() - from)));
        for_each(entering, stream_, take_guesses<T>, after_, tracks_, first_ + from, entering, states);
    }

    /// Writes the steps up to `last` that have not been to the caller's array: what is confirmed, or everything. As
    /// late as possible, so that a first pass that fails leaves the array as it was.
    void store(index last, bool everything) {
        const Elements stored = elements_of(shape(last - stored_));
        for_each(stored, stream_, store_rows<T>, row(stored_ - first_ + 1), tracks_, stored_, everything, stored,
                 Strided<T>(trajectory_));
    }

    /// First-order error of the confirmed rows among the window's first `count`: e_t = J_t e_{t-1} + r_t. Between
    /// passes the update's memory is free.
    void estimate_errors(index count) {
        if (!estimating() || count == 0) return;
        const Elements all = elements_of(shape(count));
        constexpr T unit = T(rounding_of_a_step) * std::numeric_limits<T>::epsilon();
        for_each(all, stream_, find_error_sources<T, Tracks>, row(1), after_, Tracks{tracks_}, first_, block_, unit,
                 all, update_);
        const View<T> errors(update_, shape(count));
        solve(BidiagonalSystem<T>{jacobian().steps(0, count), errors, View<const T>(carried_, shape(1))}, errors,
              solve_options());
        for_each(all, stream_, raise_errors<T, Tracks>, update_, first_, all, Tracks{tracks_});
        device::copy_on_gpu(carried_, errors.at(count - 1, 0), batch_ * width_ * index(sizeof(T)), stream_);
        report_.estimate.bytes += count * batch_ * width_ * (block_ + 6) * index(sizeof(T));
    }

    /// The Report's Lyapunov exponent, from the first sequence's first steps.
    void follow(index count) {
        if (!following_growth() || followed_ >= growth_rows) return;
        if (!growth_) growth_.emplace(width_, block_);
        count = std::min(count, growth_rows - followed_);
        follow_growth(*growth_, 1, count);
        followed_ += count;
    }

    void end_passes() {
        estimate_errors(rows());
        store(first_ + rows(), true);
    }

    // --- outcome

    /// Waits for the passes, and goes on step after step where they have not reached the end. `unfinished`: what has
    /// become of sequences with steps that are not confirmed.
    void complete(Status unfinished) {
        std::vector<Track> tracks(sequences_.size());
        Word resets = 0;
        device::copy_from_gpu(tracks.data(), tracks_, batch_ * index(sizeof(Track)), stream_);
        device::copy_from_gpu(&resets, resets_, index(sizeof resets), stream_);
        device::synchronise(stream_);
        if (batch_ > 0) follow(std::clamp<index>(index(tracks[0].confirmed) - first_, 0, rows()));
        report_.non_finite_resets = index(resets);
        std::vector<index> starts(tracks.size(), steps_);
        report_.sequences.resize(tracks.size());
        for (std::size_t j = 0; j < tracks.size(); ++j) {
            const Track& track = tracks[j];
            Report::Sequence& result = report_.sequences[j];
            result.confirmed = index(track.confirmed);
            result.iterations = index(track.iterations);
            result.residual = std::bit_cast<double>(track.residual);
            result.relative_residual = std::bit_cast<double>(track.relative_residual);
            result.error = !estimating()         ? unknown
                           : track.singular != 0 ? std::numeric_limits<double>::infinity()
                                                 : std::bit_cast<double>(track.error);
            result.status = track.ended != 0             ? Status::non_finite
                            : result.confirmed == steps_ ? Status::converged
                                                         : unfinished;
            report_.iterations = std::max(report_.iterations, result.iterations);
            if (result.status == Status::finished_sequentially || result.status == Status::non_finite)
                starts[j] = result.confirmed;
        }
        for (const Report::Sequence& sequence : report_.sequences)
            if (sequence.status == Status::finished_sequentially) {
                report_.method += ", then sequential";
                break;
            }
        run_sequentially(starts);
    }

    index piece() const {
        return std::min(steps_, window_ > 0 ? std::min(window_, sequential_piece) : sequential_piece);
    }

    /// Step after step, each sequence from its start to the end: the first begin, and the others join where they start.
    /// All sequences run, but only those that have started are written.
    void run_sequentially(const std::vector<index>& starts) {
        std::vector<index> joints;
        for (const index start : starts)
            if (start < steps_) joints.push_back(start);
        if (joints.empty()) return;
        std::sort(joints.begin(), joints.end());
        joints.erase(std::unique(joints.begin(), joints.end()), joints.end());
        const Elements one = elements_of(shape(1));
        device::copy_to_gpu(starts_, starts.data(), batch_ * index(sizeof(index)), stream_);
        device::fill_bytes(endings_, 0, batch_ * index(sizeof(Ending)), stream_);
        recurrence_.initial(section(0, 0), View<T>(state_, shape(1)));
        for (std::size_t next = 0; next < joints.size(); ++next) {
            for_each(one, stream_, join_states<T>, Strided<T>(trajectory_), starts_, joints[next], one, state_);
            run_pieces(joints[next], next + 1 < joints.size() ? joints[next + 1] : steps_,
                       trajectory_.contiguous() && joints.size() == 1 &&
                           std::all_of(starts.begin(), starts.end(), [&](index s) { return s == joints[0]; }));
        }
        std::vector<Ending> endings(starts.size());
        device::copy_from_gpu(endings.data(), endings_, batch_ * index(sizeof(Ending)), stream_);
        device::synchronise(stream_);
        for (std::size_t j = 0; j < starts.size(); ++j) {
            Report::Sequence& result = report_.sequences[j];
            if (starts[j] == steps_) continue;
            if (result.status == Status::non_finite) continue;  // known from Newton's passes
            report_.sequential_steps += steps_ - starts[j];
            result.confirmed = steps_;
            result.error = unknown;
            if (endings[j].last_bad == 0) continue;
            result.status = Status::non_finite;
            result.confirmed = steps_ - index(endings[j].bad);
        }
    }

    /// Evaluates [first, last) of all sequences from `state_` on, which ends as the last; in the caller's array itself
    /// where all of it is wanted.
    void run_pieces(index first, index last, bool in_place) {
        const index length = in_place ? last - first : piece();
        for (index begin = first; begin < last; begin += length) {
            const index end = std::min(last, begin + length);
            T* const rows = in_place ? trajectory_.at(begin, 0) : after_;
            const Elements all = elements_of(shape(end - begin));
            recurrence_.run(section(begin, end), View<const T>(state_, shape(1)), View<T>(rows, shape(end - begin)));
            for_each(all, stream_, leave_states<T>, rows, starts_, begin, steps_, all, Strided<T>(trajectory_),
                     endings_);
            device::copy_on_gpu(state_, rows + (end - begin - 1) * batch_ * width_, batch_ * width_ * index(sizeof(T)),
                                stream_);
        }
        report_.sequential.bytes += (last - first) * batch_ * width_ * index(sizeof(T));
    }

    void summarise(Clock::time_point begin) {
        report_.error = 0;
        for (const Report::Sequence& sequence : report_.sequences) {
            report_.status = std::max(report_.status, sequence.status);
            report_.residual = std::max(report_.residual, sequence.residual);
            report_.relative_residual = std::max(report_.relative_residual, sequence.relative_residual);
            const bool known = !std::isnan(sequence.error) && !std::isnan(report_.error);
            report_.error = known ? std::max(report_.error, sequence.error) : unknown;
        }
        report_.lyapunov = growth_ ? growth_->exponent() : unknown;
        growth_.reset();
        followed_ = 0;
        report_.seconds = seconds_since(begin);
        report_.workspace_bytes = workspace_.peak_bytes();
    }

    SolveOptions solve_options() const {
        return {options_.reduction, options_.execution, options_.chunk, &workspace_, options_.tensor_cores};
    }

    const Recurrence<T>& recurrence_;
    const View<T> trajectory_;
    const Options options_;
    Workspace& workspace_;
    const Workspace::Scope scope_;
    CUstream_st* stream_;
    index steps_, batch_, width_, block_, multiprocessors_;
    std::vector<index> sequences_;  // all of them
    Report report_;

    index window_ = 0;       // rows at most, of this pass
    index next_window_ = 0;  // and of the next
    index capacity_ = 0;     // rows that `states_` has room for, beside the first state
    index first_ = 0;        // steps before the window
    index base_ = 0;         // rows before it in `states_`
    index stored_ = 0;       // steps that are in the caller's array for good
    index passes_ = 0;
    std::optional<LyapunovEstimate<T>> growth_;
    index followed_ = 0;
    T *states_ = nullptr, *after_ = nullptr, *update_ = nullptr, *jacobian_ = nullptr, *carried_ = nullptr,
      *state_ = nullptr;
    Track* tracks_ = nullptr;
    Summary* summaries_ = nullptr;
    Word* resets_ = nullptr;
    index* starts_ = nullptr;
    Ending* endings_ = nullptr;
};

}  // namespace

template <class T>
Report evaluate_newton_on_gpu(const Recurrence<T>& recurrence, View<T> trajectory, const Options& options,
                              double patience) {
    check_gpu_arguments(recurrence, options);
    std::optional<Workspace> own;
    Workspace& workspace = options.workspace != nullptr ? *options.workspace : own.emplace(options.execution);
    return GpuNewton<T>(recurrence, trajectory, options, workspace).evaluate(patience);
}

}  // namespace deeppcr::newton

namespace deeppcr {

template <class T>
struct EnqueuedEvaluation<T>::Implementation {
    Implementation(const Recurrence<T>& given_recurrence, const View<T>& trajectory, const Options& given_options)
        : recurrence(given_recurrence), options(by_newton(given_options)) {
        newton::check_arguments<T>(recurrence, trajectory, options);
        newton::check_gpu_arguments(recurrence, options);
        newton::require_alone(options);
        if (given_options.method != Method::automatic && given_options.method != Method::newton)
            throw InvalidArgument("options.method", "automatic or newton", to_string(given_options.method));
        if (options.max_iterations == 0) throw InvalidArgument("options.max_iterations", "1 or more passes", "0");
        if (options.progress) throw InvalidArgument("options.progress", "none, as nobody waits for the passes", "one");
        if (trajectory.empty()) return;
        const Workspace::Use use(workspace(), options.execution);
        newton.emplace(recurrence, trajectory, options, workspace());
        if (newton->window() < recurrence.shape().steps)
            throw InvalidArgument("options.window", "all " + std::to_string(recurrence.shape().steps) + " steps",
                                  std::to_string(newton->window()));
        newton->enqueue(options.max_iterations);
        device::synchronise(options.execution.stream);
    }

    static Options by_newton(Options options) {
        options.method = Method::newton;
        return options;
    }
    Workspace& workspace() {
        if (options.workspace != nullptr) return *options.workspace;
        return own ? *own : own.emplace(device::current_gpu());
    }

    const Recurrence<T>& recurrence;
    const Options options;
    std::optional<Workspace> own;
    std::optional<newton::GpuNewton<T>> newton;
};

template <class T>
EnqueuedEvaluation<T>::EnqueuedEvaluation(const Recurrence<T>& recurrence, View<std::type_identity_t<T>> trajectory,
                                          const Options& options)
    : implementation_(std::make_unique<Implementation>(recurrence, trajectory, options)) {}

template <class T>
EnqueuedEvaluation<T>::~EnqueuedEvaluation() = default;

template <class T>
void EnqueuedEvaluation<T>::enqueue() {
    if (!implementation_->newton) return;
    const Workspace::Use use(implementation_->workspace(), implementation_->options.execution);
    implementation_->newton->enqueue(implementation_->options.max_iterations);
}

template <class T>
Report EnqueuedEvaluation<T>::finish() {
    Report report;
    if (implementation_->newton) {
        const Workspace::Use use(implementation_->workspace(), implementation_->options.execution);
        report = implementation_->newton->finish();
    }
    newton::raise_failure(report, implementation_->options, implementation_->recurrence.shape().steps);
    return report;
}

template class EnqueuedEvaluation<float>;
template class EnqueuedEvaluation<double>;

namespace newton {
#define DEEPPCR_INSTANTIATE(T) \
    template Report evaluate_newton_on_gpu(const Recurrence<T>&, View<T>, const Options&, double);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE
}  // namespace newton

}  // namespace deeppcr
