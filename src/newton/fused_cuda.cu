// Cells on a GPU, chunks side by side, as fused.cpp has them on a processor:
//
//   shoot    (shooting only) every chunk runs from its start and carries the product of its Jacobians; the starts'
//            corrections d_c = P_{c-1} d_{c-1} + (end of c-1 - start of c) are one bidiagonal solve; shots that follow
//            one which left nothing to correct end at once
//   sweep    every chunk runs from its start and writes its trajectory
//   repair   every chunk runs again from the end of the one before it, until it meets its old states
//   collect  residuals, and what is not confirmed; where a state was not finite, the first of each sequence
//
// All is enqueued, and the host waits for the status. Where a chunk has not met, it enqueues some more rounds of
// repairs, then what is left step after step (finish), and collects again; the next time all of that comes at once.
// Who does not wait (enqueue.hpp) has all of it enqueued always, and learns later what the run tells.
//
// Where the channels of all sequences are many, but too few for step after step, shooting takes tiles instead, whose
// inputs are read once (shoot_tiles in cell.cuh). Each channel is tested by itself, against its own magnitude: at least
// as strict as the residual test of evaluate.hpp.
#include "newton/fused_gpu.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include <deeppcr/launch.cuh>

#include "device/cuda.hpp"
#include "newton/device_costs.hpp"
#include "newton/experience.hpp"
#include "newton/options.hpp"
#include "newton/rows.cuh"
#include "newton/stopwatch.hpp"
#include "recurrence/device_cells.hpp"
#include "reduce/reduce.hpp"

namespace deeppcr::newton {
namespace {

using cell::DeviceChunks;
using cell::DeviceKernel;
using cell::DeviceKernels;
using cell::repair_rounds;

constexpr index shortest_chunk = 64;          // where chunks are chosen
constexpr index fewest_steps = 128;           // below, the launches of anything but step after step are not worth it
constexpr index fewest_tile_bytes = 32;       // of a step of an input: a sector of memory
constexpr index chunks_to_collect = 8;        // by a thread
constexpr double worth_narrower_tiles = 0.8;  // of the time by wider ones
constexpr int most_sum_threads = 1024;        // of a block that adds up a parameter's gradient

/// mismatch[c] = ends[c] - starts[c + 1]
template <class A>
__global__ void __launch_bounds__(cuda::plain_threads)
    find_mismatches(const A* ends, const A* starts, index states, index count, A* mismatches) {
    const index i = this_thread();
    if (i < count) mismatches[i] = ends[i] - starts[i + states];
}

/// starts[c + 1] += corrections[c], or = ends[c] where the correction has overflowed. Tells whether a start moved by so
/// much that its error may still be above the tolerance; after a shot where none did, nothing is done.
template <class A>
__global__ void __launch_bounds__(cuda::plain_threads)
    correct_starts(const A* ends, const A* corrections, index states, index count, double absolute, double relative,
                   double close, int shot, cell::RunStatus* run, A* starts) {
    if (shot > 0 && run->shooting[shot - 1] == 0) return;
    const index i = this_thread();
    bool moves = false;
    if (i < count) {
        const A old = starts[i + states], corrected = old + corrections[i];
        const A now = corrected - corrected == A(0) ? corrected : ends[i];
        starts[i + states] = now;
        moves = !(fabs(double(now) - double(old)) <= close * (absolute + relative * fabs(double(now))));
    }
    const bool any = __any_sync(~0U, moves) != 0;
    if (any && threadIdx.x % 32 == 0) atomicAdd(&run->shooting[shot], 1U);
    if (i == 0) run->shots = unsigned(shot + 1);
}

/// The states before chunks 1.. of a trajectory, the initial state where one is not finite.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    gather_starts(const DeviceChunks<T> all, int states, Arithmetic<T>* starts) {
    using A = Arithmetic<T>;
    const index i = this_thread(), width = all.channels * states;
    if (i >= all.count * all.part_count * width) return;
    const index chunk = i / (all.part_count * width), part = i / width % all.part_count, k = i % width;
    const SequencePart whole = all.parts != nullptr ? all.parts[part] : SequencePart{part, 0, all.steps};
    const A initial = all.initial != nullptr ? cuda::widen(all.initial[part * all.initial_part + k]) : A(0);
    const index before = whole.first + chunk * all.length - 1;
    A start = initial;
    if (all.given && chunk > 0 && before < whole.last)
        start = cuda::widen(all.trajectory[before * all.trajectory_step + whole.sequence * all.trajectory_batch + k]);
    starts[i] = start - start == A(0) ? start : initial;
}

/// What a run tells, and to whom.
struct Account {
    const Word* told = nullptr;
    index words = 0;
    Word* letter = nullptr;   ///< in the host's memory; null: nobody reads it
    bool marked = false;      ///< another word of the letter says that the others are there
    index* status = nullptr;  ///< the worst of the sequences, on the GPU; null: not asked for
};

/// By all threads of a block.
inline __device__ void write_letter(const Account& account) {
    if (account.letter == nullptr) return;
    for (index i = threadIdx.x; i < account.words; i += blockDim.x) account.letter[i] = account.told[i];
    if (!account.marked) return;
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence_system();  // for what the barrier has put before it, too
    *static_cast<volatile Word*>(account.letter + account.words) = 1;
}
inline __device__ void write_status(const cell::SequenceStatus* sequences, index batch, index* status) {
    bool finished = false, stopped = false, broken = false;
    for (index i = threadIdx.x; i < batch; i += blockDim.x) {
        const cell::SequenceStatus& told = sequences[i];
        finished = finished || told.sequential_steps > 0;
        stopped = stopped || told.unconfirmed > 0;
        broken = broken || told.first_non_finite > told.unconfirmed;
    }
    finished = __syncthreads_or(int(finished)) != 0;
    stopped = __syncthreads_or(int(stopped)) != 0;
    broken = __syncthreads_or(int(broken)) != 0;
    if (threadIdx.x == 0)
        *status = index(broken     ? Status::non_finite
                        : stopped  ? Status::max_iterations
                        : finished ? Status::finished_sequentially
                                   : Status::converged);
}

/// Neighbouring threads that have the same row of the flags.
__host__ __device__ index lanes_of_row(index rows) { return rows < 32 ? 32 : 1; }

/// Of each sequence the largest residuals, the first step that chunks left unconfirmed, and, where the kernels have
/// seen a state that is not finite, the first step with one. A thread has every so many chunks of a group of a part;
/// the lanes of a warp have neighbouring groups, or, where those are few, neighbouring chunks of one. The last block to
/// end gives account.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    collect(const DeviceChunks<T> all, bool finished, index threads_per_row, index width, const Account account) {
    using A = Arithmetic<T>;
    if (all.residuals != nullptr) {
        const index rows = all.part_count * all.groups, lanes = lanes_of_row(rows);
        const index row = this_thread() / lanes % rows;
        const index place = this_thread() / (lanes * rows) * lanes + this_thread() % lanes;
        const SequencePart whole =
            all.parts != nullptr ? all.parts[row / all.groups] : SequencePart{row / all.groups, 0, all.steps};
        const bool complete = finished || all.run->pending[repair_rounds - 1] == 0;
        A residual = 0, relative = 0;
        index unconfirmed = 0;
        for (index c = place; c < all.count && place < threads_per_row; c += threads_per_row) {
            const index flag = c * rows + row;
            residual = larger(residual, all.residuals[2 * flag]);
            relative = larger(relative, all.residuals[2 * flag + 1]);
            // Where chunks still do not fit, nothing after them is confirmed.
            if (!complete && unconfirmed == 0 && all.old_changed[flag] != 0)
                unconfirmed = all.steps - (whole.first + (c + 1) * all.length);
        }
        cell::SequenceStatus& status = all.sequences[whole.sequence];
        // Bits of doubles of 0 and more order as they do.
        cuda::raise_from_warp(&status.residual, word_of(double(residual)));
        cuda::raise_from_warp(&status.relative_residual, word_of(double(relative)));
        if (unconfirmed > 0) atomicMax(&status.unconfirmed, Word(unconfirmed));
    }
    const index per_step = all.batch * width, total = all.run->non_finite != 0 ? all.steps * per_step : 0;
    for (index i = this_thread(); i < total; i += index(gridDim.x) * blockDim.x) {
        const index step = i / per_step, sequence = i % per_step / width, k = i % width;
        const A x = cuda::widen(all.trajectory[step * all.trajectory_step + sequence * all.trajectory_batch + k]);
        if (!(x - x == A(0))) atomicMax(&all.sequences[sequence].first_non_finite, Word(all.steps - step));
    }
    if ((account.letter == nullptr && account.status == nullptr) || !is_last_block(&all.run->collected)) return;
    if (threadIdx.x == 0) all.run->collected = 0;
    write_letter(account);
    if (account.status != nullptr) write_status(all.sequences, all.batch, account.status);
}

/// A block per parameter sums over chunks and parts: each thread in their order, then the threads as a tree.
template <class A>
__global__ void __launch_bounds__(most_sum_threads)
    sum_parameter_gradients(const double* parts, index terms, index parameters, A* sums) {
    double* const shared = cuda::shared_memory<double>();
    const index q = blockIdx.x;
    double sum = 0;
    for (index i = threadIdx.x; i < terms; i += blockDim.x) sum += parts[i * parameters + q];
    shared[threadIdx.x] = sum;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[q] = A(shared[0]);
}

/// Where gradients go beside those that the chunks write.
template <class T>
struct Gradients {
    index input_width, width;  ///< of the inputs, of the states
    Arithmetic<T>* parameters;
    index parameter_count;
    T* initial;
    index initial_part;
    const index* status;  ///< of the trajectory; null: it is right
};

/// The initial states' gradients, as they are stored. All gradients become NaN where the trajectory is not right. Gives
/// account.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    store_gradients(const DeviceChunks<T> all, const Gradients<T> to, const Account account) {
    using A = Arithmetic<T>;
    const bool right = to.status == nullptr || *to.status <= index(Status::finished_sequentially);
    const A nothing = std::numeric_limits<A>::quiet_NaN();
    const index first = this_thread(), threads = index(gridDim.x) * blockDim.x;
    for (index i = first; i < all.part_count * to.width; i += threads)
        to.initial[i / to.width * to.initial_part + i % to.width] =
            cuda::narrow<T>(right ? all.initial_gradient[i] : nothing);
    if (!right) {
        for (index i = first; i < to.parameter_count; i += threads) to.parameters[i] = nothing;
        for (index i = first; i < all.steps * all.batch * to.input_width; i += threads) {
            const index row = i / to.input_width;
            all.input_gradient[row / all.batch * all.input_gradient_step + row % all.batch * all.input_gradient_batch +
                               i % to.input_width] = cuda::narrow<T>(nothing);
        }
    }
    if (blockIdx.x == 0) write_letter(account);
}

/// Runs that nobody waited for, until what they tell is here.
class Outcomes {
public:
    using Read = std::function<void(const cell::RunStatus&)>;
    static constexpr index words = index(sizeof(cell::RunStatus) / sizeof(Word));
    static_assert(sizeof(cell::RunStatus) % sizeof(Word) == 0);

    /// Kept until the process ends: a letter may still be written.
    static Outcomes& all() {
        static Outcomes& one = *new Outcomes;
        return one;
    }
    /// Whether more may be expected: the host may be far ahead.
    bool has_room() {
        const std::lock_guard lock(mutex_);
        return unread_.size() < most;
    }
    /// Of a run that is enqueued.
    void expect(device::Letter letter, Read read) {
        const std::lock_guard lock(mutex_);
        unread_.push_back({std::move(letter), std::move(read)});
    }
    void read() {
        const std::lock_guard lock(mutex_);
        std::erase_if(unread_, [](Outcome& outcome) {
            const void* const told = outcome.letter.look(words);
            if (told == nullptr) return false;
            cell::RunStatus run;
            std::memcpy(&run, told, sizeof run);
            outcome.read(run);
            return true;
        });
    }

private:
    static constexpr std::size_t most = device::Letter::made_at_once / 2;  // the others are for calls on their way
    struct Outcome {
        device::Letter letter;
        Read read;
    };
    std::mutex mutex_;
    std::vector<Outcome> unread_;
};

/// What evaluation and gradients share: the arrays on the GPU, and how the steps are cut.
template <class T>
class OnGpu {
public:
    using A = Arithmetic<T>;

    OnGpu(const ChannelwiseRecurrence<T>& recurrence, const Options& options, Workspace& workspace)
        : recurrence_(recurrence),
          options_(options),
          workspace_(workspace),
          kernels_(cell::device_kernels_of(recurrence.kernels())),
          stream_(options.execution.stream),
          states_(recurrence.kernels().states),
          tolerance_(tolerance_of<T>(options)),
          captured_(device::is_captured(stream_)) {
        Outcomes::all().read();  // whose letters are free again
        if (!captured_) letter_.emplace();
        const auto& parts = recurrence.parts();
        all_.inputs = recurrence.inputs().data();
        all_.input_step = recurrence.inputs().step_stride();
        all_.input_batch = recurrence.inputs().batch_stride();
        all_.parameters = recurrence.parameters().data();
        if (const View<const T> initial = recurrence.initial_states(); !initial.empty()) {
            all_.initial = initial.data();
            all_.initial_part = initial.batch_stride();
            device::require_on_gpu("initial", all_.initial);
        }
        device::require_on_gpu("inputs", all_.inputs);
        device::require_on_gpu("parameters", all_.parameters);
        all_.steps = recurrence.shape().steps;
        all_.batch = recurrence.shape().batch;
        all_.channels = recurrence.channels();
        all_.groups = (all_.channels + kernels_.channels_per_group - 1) / kernels_.channels_per_group;
        all_.multiprocessors = device::multiprocessors();
        all_.part_count = index(parts.size());
        for (const SequencePart& part : parts) longest_ = std::max(longest_, part.last - part.first);
        if (longest_ > std::numeric_limits<int>::max())  // a thread counts them so
            throw InvalidArgument("recurrence", "fewer than 2^31 steps of a sequence, for Backend::cuda",
                                  std::to_string(longest_));
        if (all_.part_count != all_.batch) {
            if (captured_)
                throw InvalidArgument("recurrence", "whole rows, in a stream that is captured",
                                      "sequences that begin within rows");
            auto* const there = workspace_.template take<SequencePart>(all_.part_count);
            device::copy_to_gpu(there, parts.data(), all_.part_count * index(sizeof(SequencePart)), stream_);
            all_.parts = there;
        }
        all_.absolute_tolerance = tolerance_.absolute;
        all_.relative_tolerance = tolerance_.relative;
        key_ = ExperienceKey{.kernels = &kernels_,
                             .backend = Backend::cuda,
                             .workers = device::current_gpu().ordinal(),
                             .steps = std::ilogb(double(longest_)),
                             .numbers = std::ilogb(chains())};
        status_bytes_ = index(sizeof(cell::RunStatus)) + all_.batch * index(sizeof(cell::SequenceStatus));
        all_.sequences =
            reinterpret_cast<cell::SequenceStatus*>(workspace_.template take<unsigned char>(status_bytes_));
        all_.run = reinterpret_cast<cell::RunStatus*>(all_.sequences + all_.batch);
        device::fill_bytes(all_.sequences, 0, status_bytes_, stream_);
    }

protected:
    index rows() const { return all_.part_count * all_.groups; }
    double chains() const { return double(all_.part_count) * double(all_.channels); }
    index boundary_size() const { return all_.count * all_.part_count * all_.channels * states_; }
    DeviceCosts costs() const { return device_costs(kernels_, recurrence_.kernels(), stream_, !captured_); }

    void cut(index length) {
        all_.length = length;
        all_.count = std::max<index>(1, (longest_ + length - 1) / length);
    }

    /// A length of chunks, and what they are predicted to take.
    struct Plan {
        index length = 0;
        double seconds = std::numeric_limits<double>::infinity();
    };
    /// The best of the powers of two, or the chunk that was asked for; seconds(number of chunks, their length).
    /// before: of the last call, whose chunks a captured one keeps, as there is memory for them; 0: there was none.
    template <class Seconds>
    Plan plan(const Seconds& seconds, index before = 0) const {
        const auto with = [&](index length) {
            return Plan{length, seconds(double((longest_ + length - 1) / length), double(length))};
        };
        if (options_.chunk > 0) return with(std::min(options_.chunk, longest_));
        if (captured_ && before > 0) return with(std::min(before, longest_));
        Plan best = with(std::min(shortest_chunk, longest_));
        for (index length = 2 * shortest_chunk; length < longest_; length *= 2)
            if (const Plan next = with(length); next.seconds < best.seconds) best = next;
        return best;
    }

    /// What rounds of repairs, or of corrections, need: the ends before and after a round, and which are new.
    struct Rounds {
        A* ends[2];
        A* residuals;
        unsigned char* changed[2];
    };
    /// Taken before anything of the caller's is written: where memory is short, that stays as it was.
    /// All at once: an allocator takes its time for each piece.
    void take_rounds() {
        const index ends = boundary_size(), flags = all_.count * rows();
        A* const numbers =
            workspace_.template take<A>(2 * ends + 2 * flags + (2 * flags + index(sizeof(A)) - 1) / index(sizeof(A)));
        auto* const changed = reinterpret_cast<unsigned char*>(numbers + 2 * ends + 2 * flags);
        rounds_ = {{numbers, numbers + ends}, numbers + 2 * ends, {changed, changed + flags}};
    }
    /// The first one goes on from rounds_.ends[0].
    void run_round(const DeviceKernel<T>& kernel, int round) {
        all_.round = round;
        all_.old_ends = rounds_.ends[round % 2];
        all_.ends = rounds_.ends[(round + 1) % 2];
        all_.old_changed = round > 0 ? rounds_.changed[(round - 1) % 2] : nullptr;
        all_.changed = rounds_.changed[round % 2];
        kernel(all_, stream_);
    }
    /// Launches: one round, or all and what is left of them.
    double rounds_expected() const {
        return experience(key_).one_round_is_enough && !enqueues_ ? 1 : repair_rounds + 1;
    }
    /// Where the first one was not enough.
    void run_other_rounds(const DeviceKernel<T>& kernel) {
        for (int round = 1; round < repair_rounds; ++round) run_round(kernel, round);
    }
    /// What the last round has left, step after step.
    void run_rest(const DeviceKernel<T>& kernel) {
        all_.old_changed = all_.changed;
        all_.old_ends = all_.ends;
        all_.ends = nullptr;
        kernel(all_, stream_);
    }

    bool is_brief() const { return status_bytes_ <= device::Letter::most_bytes; }
    /// Of a run that nobody waits for: `launch` enqueues the kernel that gives the account.
    template <class Launch>
    void account_later(const Launch& launch, Outcomes::Read read) {
        if (captured_ || !Outcomes::all().has_room()) return launch(Account());
        launch({.told = reinterpret_cast<const Word*>(all_.run),
                .words = Outcomes::words,
                .letter = static_cast<Word*>(letter_->marked_paper(Outcomes::words)),
                .marked = true});
        Outcomes::all().expect(*std::exchange(letter_, std::nullopt), std::move(read));
    }
    /// What a run without a wait begins with. The parts lie in pageable memory of the caller's.
    void begin_enqueued() {
        enqueues_ = true;
        if (all_.parts != nullptr) device::synchronise(stream_);
    }
    /// Waits for everything, and for what the kernels tell; written: they have written it to the letter, which is sent.
    cell::RunStatus wait(std::vector<cell::SequenceStatus>& sequences, bool written = false) {
        std::vector<unsigned char> bytes(static_cast<std::size_t>(status_bytes_));
        if (written)
            std::memcpy(bytes.data(), letter_->receive(), bytes.size());
        else
            letter_->fetch(bytes.data(), all_.sequences, status_bytes_, stream_);
        sequences.resize(std::size_t(all_.batch));
        std::memcpy(sequences.data(), bytes.data(), sequences.size() * sizeof(cell::SequenceStatus));
        cell::RunStatus run;
        std::memcpy(&run, bytes.data() + sequences.size() * sizeof(cell::SequenceStatus), sizeof run);
        return run;
    }

    const ChannelwiseRecurrence<T>& recurrence_;
    const Options& options_;
    Workspace& workspace_;
    const DeviceKernels<T>& kernels_;
    CUstream_st* stream_;
    index states_, longest_ = 0, status_bytes_ = 0;
    Tolerance tolerance_;
    DeviceChunks<T> all_;
    Rounds rounds_ = {};
    ExperienceKey key_;
    bool captured_, enqueues_ = false;
    std::optional<device::Letter> letter_;  // asked for before anything is written; none where captured
};

template <class T>
class GpuEvaluator : OnGpu<T> {
    using Base = OnGpu<T>;
    using Base::all_, Base::key_, Base::kernels_, Base::options_, Base::recurrence_, Base::workspace_, Base::stream_,
        Base::states_, Base::longest_, Base::status_bytes_, Base::letter_, Base::is_brief, Base::tolerance_, Base::rows,
        Base::chains, Base::boundary_size, Base::costs, Base::cut, Base::plan, Base::take_rounds, Base::rounds_,
        Base::rounds_expected, Base::run_round, Base::run_other_rounds, Base::run_rest, Base::begin_enqueued,
        Base::account_later, Base::captured_, Base::enqueues_, Base::wait;
    using typename Base::A;
    using typename Base::Plan;

public:
    GpuEvaluator(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options,
                 Workspace& workspace)
        : Base(recurrence, options, workspace) {
        device::require_on_gpu("trajectory", trajectory.data());
        all_.trajectory = trajectory.data();
        all_.trajectory_step = trajectory.step_stride();
        all_.trajectory_batch = trajectory.batch_stride();
        all_.given = options.guess == Guess::given;
        key_.tolerance = std::ilogb(tolerance_.relative) / 4;
    }

    Report run() {
        const Clock::time_point begin = Clock::now();
        return run(choose(), begin);
    }

    /// Without a wait, but where `automatic` wants to know what the method takes.
    void enqueue(index* status) {
        begin_enqueued();
        status_ = status;
        const Method method = choose();
        if (is_to_be_measured() && !captured_) {
            run(method, Clock::now());
            return;
        }
        start(method);
        account_later([&](const Account& account) { collect_all(account); },
                      [key = key_, method, in_tiles = all_.tile_groups > 0](const cell::RunStatus& told) {
                          learn_of(key, method, in_tiles, told);
                      });
    }

private:
    bool is_to_be_measured() const {
        return options_.chunk == 0 && !report_.candidates.empty() && !report_.candidates.front().measured;
    }

    Report run(Method method, Clock::time_point begin) {
        // What it takes is learnt without what is enqueued before it.
        if (options_.chunk == 0 && !experience(key_).seen(method).trusted()) {
            device::synchronise(stream_);
            begin = Clock::now();
        }
        start(method);
        std::vector<cell::SequenceStatus> sequences;
        cell::RunStatus status = collected(sequences);
        if (status.pending[0] > 0 && !went_on_) {
            device::fill_bytes(all_.sequences, 0, all_.batch * index(sizeof(cell::SequenceStatus)), stream_);
            go_on();
            status = collected(sequences);
        }
        describe_result(method, sequences, status);
        report_.seconds = seconds_since(begin);
        if (options_.chunk == 0 && report_.ok())
            learn(key_, [&](Experience& now) { now.observed[method].add(report_.seconds / numbers()); });
        report_.workspace_bytes = workspace_.peak_bytes();
        return std::move(report_);
    }

    void start(Method method) {
        report_.method = "sequential";
        if (method == Method::sequential) {
            cut(longest_);
            kernels_.advance(all_, stream_);
        } else if (all_.tile_groups > 0) {
            all_.tile_shots = cell::most_shots;
            if (options_.max_iterations > 0)
                all_.tile_shots = int(std::min<index>(options_.max_iterations, cell::most_shots));
            kernels_.shoot_tiles(all_, stream_);
        } else {
            run_chunks(method);
        }
    }

    double numbers() const { return double(recurrence_.shape().count()); }

    /// Groups side by side in a tile: as few as read whole sectors, more where there are enough blocks all the same,
    /// and of these as many as leave the last round of blocks not much emptier than the others. 0: there are too few
    /// channels for tiles. at_once(): blocks.
    template <class AtOnce>
    int tile_groups(const AtOnce& at_once) const {
        if (kernels_.shoot_tiles.launch == nullptr || options_.chunk > 0 ||
            all_.channels * index(sizeof(T)) < fewest_tile_bytes)
            return 0;
        const auto blocks = [&](index size) { return all_.part_count * ((all_.groups + size - 1) / size); };
        if (blocks(fewest_tile_groups) < all_.multiprocessors) return 0;
        int best = fewest_tile_groups;
        if (blocks(2 * best) < index(2) * all_.multiprocessors) return best;
        const index in_a_round = at_once();
        double least = std::numeric_limits<double>::infinity();
        for (int groups = most_tile_groups; groups > fewest_tile_groups; groups /= 2) {
            if (blocks(groups) < index(2) * all_.multiprocessors) continue;
            const double time = double((blocks(groups) + in_a_round - 1) / in_a_round) * groups;
            if (time > worth_narrower_tiles * least) continue;
            least = time;
            best = groups;
        }
        return best;
    }

    Plan plan_overlap(const DeviceCosts& cost, const Experience& seen) const {
        const double launches = 3 + rounds_expected();
        const auto seconds = [&](double chunks, double length) {
            return launches * cost.launch + cost.advance.seconds(chunks * chains(), length) +
                   cost.advance.seconds(chunks * chains(), std::min(length, double(seen.repeated)));
        };
        return plan(seconds, seen.length(Method::overlap));
    }
    Plan plan_shooting(const DeviceCosts& cost, const Experience& seen) const {
        const double launches = 4 + rounds_expected() + 5 * seen.shots;
        const auto seconds = [&](double chunks, double length) {
            return launches * cost.launch + cost.advance.seconds(chunks * chains(), length) +
                   seen.shots * cost.multiply.seconds(chunks * chains(), length);
        };
        return plan(seconds, seen.length(Method::shooting));
    }

    /// The method; how chunks, shots and tiles are to be is set.
    Method choose() {
        const Experience seen = experience(key_);
        // Chunks that are given ask for the same bits in every call.
        shots_ = options_.chunk > 0 ? cell::most_shots : int(std::min<double>(seen.shots + 1, cell::most_shots));
        if (options_.max_iterations > 0) shots_ = int(std::min<index>(shots_, options_.max_iterations));
        const bool automatic = options_.method == Method::automatic;
        if (options_.method == Method::sequential || (automatic && longest_ < fewest_steps)) return Method::sequential;
        if (options_.chunk > 0 && !automatic) {
            cut(std::min(options_.chunk, longest_));
            return options_.method;
        }
        int groups = options_.method == Method::shooting ? tile_groups([&] { return tiles_at_once(kernels_); }) : 0;
        if (groups > 0) {
            all_.tile_groups = groups;
            return Method::shooting;
        }
        const DeviceCosts cost = costs();
        if (automatic) groups = tile_groups([&] { return cost.tiles_at_once; });
        const Plan overlap = plan_overlap(cost, seen);
        Plan shooting;
        if (groups > 0)
            shooting.seconds =
                3 * cost.launch + double(longest_) * std::hypot(cost.tiles.latency * groups / fewest_tile_groups,
                                                                cost.tiles.throughput * chains());
        else
            shooting = plan_shooting(cost, seen);
        Method best = options_.method;
        if (automatic) {
            Weighing weighing(seen, numbers(), !captured_);
            weighing.consider(Method::sequential, 3 * cost.launch + cost.advance.seconds(chains(), double(longest_)));
            if (seen.overlap_works) weighing.consider(Method::overlap, overlap.seconds);
            if (seen.shooting_works) weighing.consider(Method::shooting, shooting.seconds);
            report_.candidates = weighing.candidates();
            best = report_.candidates.front().method;
            // What ran does not work, and a workspace may be too small for others: this one takes the least.
            if (captured_ && options_.workspace != nullptr && !seen.observed.empty() && seen.seen(best).count == 0)
                best = Method::sequential;
        }
        const bool in_tiles = best == Method::shooting && groups > 0;
        if (in_tiles)
            all_.tile_groups = groups;
        else if (best != Method::sequential)
            cut_and_remember(best, best == Method::overlap ? overlap.length : shooting.length, seen);
        return best;
    }
    void cut_and_remember(Method method, index length, const Experience& seen) {
        cut(length);
        if (!captured_ && options_.chunk == 0 && seen.length(method) != length)
            learn(key_, [&](Experience& now) { now.lengths[method] = length; });
    }

    void run_chunks(Method method) {
        const index size = boundary_size();
        take_rounds();
        A* const ends = rounds_.ends[0];
        all_.residuals = rounds_.residuals;
        if (method == Method::shooting || all_.given) {
            A* const starts = workspace_.template take<A>(size);
            all_.starts = starts;
            cuda::launch(cuda::one_each(size, stream_), gather_starts<T>, all_, int(states_), starts);
            if (method == Method::shooting) shoot(starts, ends);
        }
        all_.ends = ends;
        kernels_.advance(all_, stream_);
        ++report_.iterations;
        run_round(kernels_.repair, 0);
        ++report_.iterations;
        if (enqueues_ || !experience(key_).one_round_is_enough) go_on();
    }
    bool finishes() const { return options_.on_failure == OnFailure::finish; }
    /// With chunks that one round of repairs has left.
    void go_on() {
        went_on_ = true;
        run_other_rounds(kernels_.repair);
        report_.iterations += repair_rounds - 1;
        if (finishes()) run_rest(kernels_.finish);
    }

    void collect_all(Account account) {
        account.status = status_;
        const index lanes = lanes_of_row(rows());
        const index per_row = (all_.count + chunks_to_collect * lanes - 1) / (chunks_to_collect * lanes) * lanes;
        const index to_search = std::min(index(numbers()), index(all_.multiprocessors) * cuda::plain_threads);
        cuda::launch(cuda::one_each(std::max(per_row * rows(), to_search), stream_), collect<T>, all_, finishes(),
                     per_row, all_.channels * states_, account);
    }
    cell::RunStatus collected(std::vector<cell::SequenceStatus>& sequences) {
        constexpr index word = index(sizeof(Word));
        static_assert(sizeof(cell::SequenceStatus) % word == 0 && sizeof(cell::RunStatus) % word == 0);
        Account account;
        if (is_brief())
            account = {.told = reinterpret_cast<const Word*>(all_.sequences),
                       .words = status_bytes_ / word,
                       .letter = static_cast<Word*>(letter_->paper())};
        collect_all(account);
        if (is_brief()) letter_->send(stream_);
        return wait(sequences, is_brief());
    }

    /// Newton's method for the chunks' starts; the repairs test them.
    void shoot(A* starts, A* ends) {
        const index width = all_.channels * states_, states = all_.part_count * width;
        const index between = (all_.count - 1) * states;
        all_.products = workspace_.template take<A>(all_.count * states * states_);
        all_.ends = ends;
        A* const mismatches = workspace_.template take<A>(between);
        // Corrections this small leave errors far below the tolerance, as they shrink quadratically.
        const double close = 0.1 / std::sqrt(std::max(tolerance_.relative, 1e-30));
        for (int shot = 0; between > 0 && shot < shots_; ++shot) {
            all_.round = shot;
            kernels_.multiply(all_, stream_);
            cuda::launch(cuda::one_each(between, stream_), find_mismatches<A>, ends, starts, states, between,
                         mismatches);
            const Shape shape{all_.count - 1, all_.part_count, width};
            const View<A> corrections(mismatches, shape);
            reduce::solve_ordered<A>({Jacobian<const A>(all_.products, shape, states_), corrections, {}, corrections},
                                     {.execution = options_.execution, .workspace = options_.workspace});
            cuda::launch(cuda::one_each(between, stream_), correct_starts<A>, ends, mismatches, states, between,
                         tolerance_.absolute, tolerance_.relative, close, shot, all_.run, starts);
        }
    }

    void describe_result(Method method, const std::vector<cell::SequenceStatus>& sequences,
                         const cell::RunStatus& status) {
        report_.lyapunov = report_.error = std::numeric_limits<double>::quiet_NaN();
        report_.sequences.resize(sequences.size());
        for (std::size_t j = 0; j < sequences.size(); ++j) {
            Report::Sequence& result = report_.sequences[j];
            const cell::SequenceStatus& told = sequences[j];
            result.confirmed = all_.steps - index(told.unconfirmed);
            result.error = std::numeric_limits<double>::quiet_NaN();
            result.residual = std::bit_cast<double>(told.residual);
            result.relative_residual = std::bit_cast<double>(told.relative_residual);
            if (told.sequential_steps > 0) result.status = Status::finished_sequentially;
            if (told.unconfirmed > 0) result.status = Status::max_iterations;
            report_.sequential_steps += index(told.sequential_steps) / all_.channels;
            if (told.first_non_finite > told.unconfirmed) {
                result.confirmed = all_.steps - index(told.first_non_finite);
                result.status = Status::non_finite;
            }
            report_.status = std::max(report_.status, result.status);
            report_.residual = std::max(report_.residual, result.residual);
            report_.relative_residual = std::max(report_.relative_residual, result.relative_residual);
        }
        if (method == Method::sequential) {
            report_.sequential_steps = all_.steps * all_.batch;
            return;
        }
        report_.method = to_string(method) + ", ";
        if (all_.tile_groups > 0) {
            report_.iterations = index(status.shots) + 1;
            report_.method +=
                "tiles of " + std::to_string(all_.tile_groups * kernels_.channels_per_group) + " channels, ";
        } else {
            report_.iterations += index(status.shots);
            report_.method += std::to_string(all_.count) + " chunks of " + std::to_string(all_.length) + " steps, ";
            report_.window = all_.length;
        }
        if (method == Method::shooting) report_.method += std::to_string(status.shots) + " Newton sweeps, ";
        report_.method += std::to_string(status.repeated) + " steps repeated";
        learn_of(key_, method, all_.tile_groups > 0, status);
    }
    static void learn_of(const ExperienceKey& key, Method method, bool in_tiles, const cell::RunStatus& status) {
        if (method == Method::sequential) return;
        const bool met = in_tiles || status.pending[repair_rounds - 1] == 0;
        learn(key, [&](Experience& now) {
            if (!in_tiles) now.one_round_is_enough = status.pending[0] == 0;
            // Where states are not finite that says nothing of others.
            if (!met && status.non_finite != 0) return;
            if (method == Method::overlap) {
                now.overlap_works = met;
                if (met) now.repeated = std::max<index>(32, index(status.repeated));
            } else {
                // One shot more than the last time is tried, and no more than that.
                now.shooting_works = met || now.shots + 1 < cell::most_shots;
                now.shots = double(status.shots);
            }
        });
    }

    Report report_;
    index* status_ = nullptr;
    int shots_ = 0;
    bool went_on_ = false;
};

template <class T>
class GpuAdjoint : OnGpu<T> {
    using Base = OnGpu<T>;
    using Base::all_, Base::key_, Base::kernels_, Base::options_, Base::recurrence_, Base::workspace_, Base::stream_,
        Base::states_, Base::longest_, Base::chains, Base::boundary_size, Base::costs, Base::cut, Base::plan,
        Base::take_rounds, Base::rounds_, Base::rounds_expected, Base::run_round, Base::run_other_rounds,
        Base::run_rest, Base::begin_enqueued, Base::account_later, Base::wait;
    using typename Base::A;
    using typename Base::Plan;

public:
    GpuAdjoint(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, View<const T> output_gradient,
               const CellGradientViews<T>& gradients, const Options& options, Workspace& workspace)
        : Base(recurrence, options, workspace), gradients_(gradients) {
        device::require_on_gpu("trajectory", trajectory.data());
        device::require_on_gpu("output_gradient", output_gradient.data());
        device::require_on_gpu("gradients.inputs", gradients.inputs.data());
        device::require_on_gpu("gradients.parameters", gradients.parameters.data());
        device::require_on_gpu("gradients.initial", gradients.initial.data());
        all_.trajectory = const_cast<T*>(trajectory.data());  // only read
        all_.trajectory_step = trajectory.step_stride();
        all_.trajectory_batch = trajectory.batch_stride();
        all_.output_gradient = output_gradient.data();
        all_.gradient_step = output_gradient.step_stride();
        all_.gradient_batch = output_gradient.batch_stride();
        all_.input_gradient = gradients.inputs.data();
        all_.input_gradient_step = gradients.inputs.step_stride();
        all_.input_gradient_batch = gradients.inputs.batch_stride();
        key_.backward = true;
    }

    Report run() {
        const Clock::time_point begin = Clock::now();
        start();
        const bool goes_on = all_.count > 1 && !experience(key_).one_round_is_enough;
        if (goes_on) go_on();
        store();
        Report report;
        report.method = "adjoint, sequential";
        if (all_.count > 1)
            report.method =
                "adjoint, " + std::to_string(all_.count) + " chunks of " + std::to_string(all_.length) + " steps";
        std::vector<cell::SequenceStatus> sequences;
        const bool enough = wait(sequences).pending[0] == 0;
        if (!enough && !goes_on) {
            go_on();
            store();
            device::synchronise(stream_);
        }
        if (all_.count > 1) learn_whether(key_, enough);
        report.window = all_.length;
        report.lyapunov = std::numeric_limits<double>::quiet_NaN();
        report.sequences.resize(std::size_t(all_.batch));
        for (Report::Sequence& sequence : report.sequences) sequence.confirmed = all_.steps;
        report.seconds = seconds_since(begin);
        report.workspace_bytes = workspace_.peak_bytes();
        return report;
    }

    /// Without a wait.
    void enqueue(const index* status) {
        begin_enqueued();
        start();
        if (all_.count == 1) return store(status);
        go_on();
        account_later([&](const Account& account) { store(status, account); },
                      [key = key_](const cell::RunStatus& told) { learn_whether(key, told.pending[0] == 0); });
    }

private:
    /// The pass, and one round of corrections.
    void start() {
        cut(chunk_length());
        take_rounds();
        all_.parameter_gradient = workspace_.template take<double>(terms() * recurrence_.parameters().shape().count());
        all_.initial_gradient = workspace_.template take<A>(all_.part_count * all_.channels * states_);
        all_.ends = rounds_.ends[0];
        kernels_.backward(all_, stream_);
        if (all_.count > 1) run_round(kernels_.correct, 0);
    }
    void go_on() {
        run_other_rounds(kernels_.correct);
        run_rest(kernels_.finish_backward);
    }
    index terms() const { return all_.count * all_.part_count; }
    void store(const index* status = nullptr, const Account& account = {}) {
        const index parameters = recurrence_.parameters().shape().count(), width = all_.channels * states_;
        cuda::Launch sums = cuda::one_each(parameters, stream_, 1);
        sums.threads = dim3(std::bit_ceil(unsigned(std::clamp<index>(terms(), 32, most_sum_threads))));
        sums.shared_bytes = sums.threads.x * sizeof(double);
        cuda::launch(sums, sum_parameter_gradients<A>, all_.parameter_gradient, terms(), parameters,
                     gradients_.parameters.data());
        const Gradients<T> to{recurrence_.inputs().width(),
                              width,
                              gradients_.parameters.data(),
                              parameters,
                              gradients_.initial.data(),
                              gradients_.initial.batch_stride(),
                              status};
        // Enough threads where the inputs' gradients may have to become NaN.
        const index to_fill = status == nullptr ? 0
                                                : std::min(recurrence_.inputs().shape().count(),
                                                           index(all_.multiprocessors) * cuda::plain_threads);
        cuda::launch(cuda::one_each(std::max(all_.part_count * width, to_fill), stream_), store_gradients<T>, all_, to,
                     account);
    }
    static void learn_whether(const ExperienceKey& key, bool one_round_is_enough) {
        learn(key, [&](Experience& now) { now.one_round_is_enough = one_round_is_enough; });
    }

    index chunk_length() const {
        if (options_.method == Method::sequential || longest_ < fewest_steps) return longest_;
        if (options_.chunk > 0) return std::min(options_.chunk, longest_);
        const DeviceCosts cost = costs();
        const double launches = rounds_expected();
        const Plan chunks = plan([&](double count, double length) {
            return launches * cost.launch + cost.backward.seconds(count * chains(), length) +
                   cost.backward.seconds(count * chains(), std::min(length, double(shortest_chunk)));
        });
        return chunks.seconds < cost.backward.seconds(chains(), double(longest_)) ? chunks.length : longest_;
    }

    CellGradientViews<T> gradients_;
};

/// Calls body with the caller's workspace, or one that lives as long as the call.
template <class Body>
auto with_workspace(const Options& options, const Body& body) {
    const Device here = device::current_gpu();
    if (options.workspace == nullptr) {
        Workspace own(options.execution);
        return body(own);
    }
    if (options.workspace->device() != here)
        throw InvalidArgument("options.workspace", "a workspace on the current GPU", "one elsewhere");
    const Workspace::Use use(*options.workspace, options.execution);  // ends after what the scope gives back
    const Workspace::Scope scope(*options.workspace);
    return body(*options.workspace);
}

}  // namespace

template <class T>
Report evaluate_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, const Options& options) {
    return with_workspace(options, [&](Workspace& workspace) {
        return GpuEvaluator<T>(recurrence, trajectory, options, workspace).run();
    });
}

template <class T>
void enqueue_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<T> trajectory, index* status,
                    const Options& options) {
    with_workspace(options, [&](Workspace& workspace) {
        GpuEvaluator<T>(recurrence, trajectory, options, workspace).enqueue(status);
    });
}

template <class T>
void enqueue_adjoint_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory, const index* status,
                            View<const T> output_gradient, const CellGradientViews<T>& gradients,
                            const Options& options) {
    with_workspace(options, [&](Workspace& workspace) {
        GpuAdjoint<T>(recurrence, trajectory, output_gradient, gradients, options, workspace).enqueue(status);
    });
}

template <class T>
Report adjoint_on_gpu(const ChannelwiseRecurrence<T>& recurrence, View<const T> trajectory,
                      View<const T> output_gradient, const CellGradientViews<T>& gradients, const Options& options) {
    return with_workspace(options, [&](Workspace& workspace) {
        return GpuAdjoint<T>(recurrence, trajectory, output_gradient, gradients, options, workspace).run();
    });
}

#define DEEPPCR_INSTANTIATE(T)                                                                                        \
    template Report evaluate_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, const Options&);                        \
    template void enqueue_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, index*, const Options&);                   \
    template Report adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, View<const T>,                     \
                                   const CellGradientViews<T>&, const Options&);                                      \
    template void enqueue_adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, const index*, View<const T>, \
                                         const CellGradientViews<T>&, const Options&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton
