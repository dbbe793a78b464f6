#include "newton/automatic.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <typeinfo>

#include "device/cuda.hpp"
#include "device/threads.hpp"
#include "newton/experience.hpp"
#include "newton/lyapunov.hpp"
#include "newton/options.hpp"
#include "newton/overlap.hpp"
#include "newton/stopwatch.hpp"

namespace deeppcr::newton {
namespace {

constexpr index fewest_steps = 8;  // below this two passes of Newton's method cannot pay
constexpr index part_timed = 32;   // one in so many steps, seven times over
constexpr index most_timed = 16;
constexpr index part_linearised = 128, fewest_linearised = 4;
constexpr index jacobian_numbers = index(1) << 22;  // that the timed pass may take
constexpr double fewest_passes = 2;                 // one that updates, and one that tests
constexpr double least_share = 0.25;                // of the mean, that a step more costs at the least
constexpr double starts = 3;                        // of the threads: overlap's sweep, and two repairs
constexpr double doubts = 2;  // how much longer than the rest may passes take that are known to be faster as a rule

/// What the costs of a type depend on beside its sizes.
template <class T>
index variant_of(const Recurrence<T>& recurrence) {
    if (const auto* const chain = dynamic_cast<const DenseChain<T>*>(&recurrence)) return chain->options().skip;
    if (const auto* const cell = dynamic_cast<const DenseCell<T>*>(&recurrence)) return cell->gates();
    return 0;
}

template <class T>
ExperienceKey key_of(const Recurrence<T>& recurrence, const Options& options, bool backward) {
    const Shape& shape = recurrence.shape();
    const bool on_gpu = options.execution.backend == Backend::cuda;
    return {.type = typeid(recurrence),
            .variant = variant_of(recurrence),
            .backward = backward,
            .backend = options.execution.backend,
            .workers = on_gpu ? device::current_gpu().ordinal() : device::thread_count(options.execution),
            .steps = std::ilogb(double(shape.steps)),
            .numbers = std::ilogb(double(shape.batch) * double(shape.width)),
            .tolerance = backward ? 0 : std::ilogb(tolerance_of<T>(options).relative) / 4,
            .block = recurrence.block()};
}

/// Times the methods on the first steps.
template <class T>
class Probe {
public:
    Probe(const Recurrence<T>& recurrence, const Options& options, Workspace& workspace)
        : recurrence_(recurrence),
          options_(options),
          workspace_(workspace),
          use_(workspace, options.execution),
          scope_(workspace),
          shape_(recurrence.shape()),
          length_(std::clamp<index>(shape_.steps / part_timed, 1, most_timed)),
          sequences_(std::size_t(shape_.batch)) {
        std::iota(sequences_.begin(), sequences_.end(), index(0));
        states_ = workspace.take_states<T>({7 * length_ + 1, shape_.batch, shape_.width});
        recurrence.initial(section(0, 0), states_.steps(0, 1));
    }

    void run(Experience& found) {
        const double numbers = double(shape_.count());
        const double sequential = sequential_seconds();
        found.predicted[Method::sequential] = sequential / numbers;
        found.predicted[Method::newton] = newton_seconds(sequential, found.lyapunov) / numbers;
        const index chunk = overlap_chunk(shape_, options_.execution);
        if (chunk < shape_.steps && runs_chunks())
            found.predicted[Method::overlap] =
                (sequential * double(chunk + found.repeated) / double(shape_.steps) + starts * seconds_to_start()) /
                numbers;
    }

private:
    Section section(index first, index last) const {
        return {first, last, sequences_, options_.execution, on_gpu() ? &workspace_ : nullptr};
    }
    bool on_gpu() const { return options_.execution.backend == Backend::cuda; }

    template <class Work>
    double seconds_of(const Work& work) const {
        const Clock::time_point begin = Clock::now();
        work();
        if (on_gpu()) device::synchronise(options_.execution.stream);
        return seconds_since(begin);
    }

    /// The least of two timings of some steps, and of twice as many: what disturbs one makes it longer.
    struct Timing {
        double shorter = std::numeric_limits<double>::infinity(), longer = shorter;

        void add(double once, double twice) {
            shorter = std::min(shorter, once);
            longer = std::min(longer, twice);
        }
        /// Of `steps`, of which `twice` have been timed and each other one takes `least` of the mean or more: the
        /// difference is free of what a call costs, whatever its steps.
        double seconds(index steps, index twice, double least) const {
            const double mean = longer / double(twice);
            const double each = std::clamp(2 * (longer - shorter) / double(twice), least * mean, mean);
            return longer + double(steps - twice) * each;
        }
    };

    /// Steps whose parameters no step before them has brought into a cache.
    double sequential_seconds() const {
        const auto run = [&](index first, index last) {
            const Section steps = section(first * length_, last * length_);
            return seconds_of([&] {
                recurrence_.run(steps, View<const T>(states_.steps(steps.first, steps.first + 1)),
                                states_.steps(steps.first + 1, steps.last + 1));
            });
        };
        run(0, 1);  // warms up
        Timing timing;
        for (const index first : {1, 4}) {
            const double once = run(first, first + 1);
            timing.add(once, run(first + 1, first + 3));
        }
        return timing.seconds(shape_.steps, 2 * length_, least_share);
    }

    /// Of the fewest passes that are of use, at the states that `sequential_seconds` left. The more steps a pass has,
    /// the fewer of the threads wait: an optimistic estimate, as steps beyond those timed cost the difference.
    double newton_seconds(double sequential, double& lyapunov) const {
        const index numbers = shape_.batch * shape_.width * recurrence_.block();
        const index wanted = std::min(std::max(shape_.steps / part_linearised, fewest_linearised), 3 * length_);
        const index length = std::clamp<index>(jacobian_numbers / (2 * numbers), 1, wanted);
        const View<T> after = workspace_.take_states<T>({2 * length, shape_.batch, shape_.width});
        const Jacobian<T> jacobian = workspace_.take_jacobian<T>(after.shape(), recurrence_.block());
        const auto pass = [&](index rows) {
            return seconds_of([&] {
                const View<T> update = after.steps(0, rows);
                recurrence_.linearise(section(0, rows), View<const T>(states_.steps(0, rows)), update,
                                      jacobian.steps(0, rows));
                solve(BidiagonalSystem<T>{jacobian.steps(0, rows), update}, update,
                      {.execution = options_.execution, .workspace = &workspace_});
            });
        };
        pass(length);  // warms up
        Timing timing;
        for (int times = 0; times < 2; ++times) {
            const double once = pass(length);
            if (times == 0) lyapunov = exponent(jacobian, {length, shape_.batch, shape_.width});
            if (fewest_passes * once > sequential) return fewest_passes * once;
            timing.add(once, pass(2 * length));
        }
        const int workers = on_gpu() ? device::multiprocessors() : device::thread_count(options_.execution);
        return fewest_passes * timing.seconds(shape_.steps, 2 * length, least_share / workers);
    }

    /// Of the first sequence.
    double exponent(const Jacobian<T>& jacobian, const Shape& rows) const {
        LyapunovEstimate<T> growth(shape_.width, recurrence_.block());
        std::vector<T> copied;
        Jacobian<T> here = jacobian;
        if (on_gpu()) {
            copied.resize(std::size_t(rows.count() * recurrence_.block()));
            device::copy_from_gpu(copied.data(), jacobian.data(), index(copied.size() * sizeof(T)),
                                  options_.execution.stream);
            device::synchronise(options_.execution.stream);
            here = Jacobian<T>(copied.data(), rows, recurrence_.block());
        }
        growth.follow(0, here, 0, rows.steps);
        return growth.exponent();
    }

    /// Of threads.
    double seconds_to_start() const {
        const int threads = on_gpu() ? 1 : device::thread_count(options_.execution);
        const auto start = [threads] { device::run_together(threads, [](int) {}); };
        start();
        return seconds_of(start);
    }

    /// Whether the recurrence knows how to: on a GPU by trying.
    bool runs_chunks() const {
        if (!on_gpu()) return true;
        Chunks<T> chunks;
        chunks.length = 2 * length_;
        chunks.starts = states_.steps(0, 1);
        chunks.trajectory = states_.steps(1, 2 * length_ + 1);
        chunks.mismatches = workspace_.take<typename Chunks<T>::Mismatch>(shape_.batch);
        chunks.repeated = workspace_.take<unsigned long long>(1);
        const bool runs = recurrence_.run_chunks(section(0, 2 * length_), chunks);
        device::synchronise(options_.execution.stream);
        return runs;
    }

    const Recurrence<T>& recurrence_;
    const Options& options_;
    Workspace& workspace_;
    const Workspace::Use use_;
    const Workspace::Scope scope_;
    Shape shape_;
    index length_;  // of the shorter timings
    std::vector<index> sequences_;
    View<T> states_;  // from the initial one on
};

}  // namespace

bool leaves_choice(const Options& options) {
    return options.method == Method::automatic && options.surrogate == Surrogate::full &&
           options.reduction == Reduction::automatic && options.chunk == 0 && options.guess != Guess::given &&
           options.window == 0 && options.max_iterations == 0 && options.on_failure == OnFailure::finish &&
           options.damping <= 0 && options.anderson == 0 && options.estimates != Estimates::full;
}

bool leaves_backward_choice(const Options& options) {
    return options.method == Method::automatic && options.reduction == Reduction::automatic && options.chunk == 0 &&
           options.window == 0;
}

template <class T>
Choice choose(const Recurrence<T>& recurrence, const Options& options) {
    const Shape& shape = recurrence.shape();
    if (options.memory_limit > 0) window_length(recurrence, options, recurrence.block());
    if (shape.steps < fewest_steps) return {.method = Method::sequential};
    const ExperienceKey key = key_of(recurrence, options, false);
    Experience seen = experience(key);
    if (seen.predicted.empty()) {
        Workspace own(options.execution);
        Probe<T>(recurrence, options, options.workspace != nullptr ? *options.workspace : own).run(seen);
        learn(key, [&](Experience& now) {
            now.predicted = seen.predicted;
            now.lyapunov = seen.lyapunov;
        });
    }
    const double numbers = double(shape.count());
    Weighing weighing(seen, numbers);
    for (const auto& [method, seconds] : seen.predicted)
        if (method != Method::overlap || (seen.overlap_works && seen.lyapunov < 0))
            weighing.consider(method, seconds * numbers);
    Choice choice{weighing.candidates().front().method, weighing.candidates()};
    const Observed sequential = seen.seen(Method::sequential);
    const double rest = sequential.trusted() ? sequential.seconds : seen.predicted[Method::sequential];
    choice.patience = (seen.seen(Method::newton).trusted() ? doubts : 1) * rest * numbers / double(shape.steps);
    return choice;
}

template <class T>
void learn_from(const Recurrence<T>& recurrence, const Options& options, const Choice& choice, const Report& report,
                double seconds) {
    if (choice.candidates.empty() || report.status == Status::max_iterations) return;  // or it was stopped
    learn(key_of(recurrence, options, false), [&](Experience& now) {
        const double per_number = seconds / double(recurrence.shape().count());
        now.observed[choice.method].add(per_number);
        // What was predicted of Newton's method is the least that it may take: given up, it is not tried again for
        // that.
        if (choice.method == Method::newton && report.status == Status::finished_sequentially)
            now.predicted[Method::newton] = std::max(now.predicted[Method::newton], per_number);
        if (choice.method == Method::overlap) now.overlap_works = report.status != Status::finished_sequentially;
        if (choice.method == Method::newton && !std::isnan(report.lyapunov)) now.lyapunov = report.lyapunov;
    });
}

template <class T>
Choice choose_backward(const Recurrence<T>& recurrence, const Options& options) {
    const Experience seen = experience(key_of(recurrence, options, true));
    const Observed fused = seen.seen(Method::sequential);
    if (!fused.trusted()) return {.method = Method::sequential};
    // A transposed solve does what a pass of the evaluation does.
    const Experience forward = experience(key_of(recurrence, options, false));
    const auto pass = forward.predicted.find(Method::newton);
    const double numbers = double(recurrence.shape().count());
    Weighing weighing(seen, numbers);
    weighing.consider(Method::sequential, fused.seconds * numbers);
    weighing.consider(Method::newton,
                      (pass != forward.predicted.end() ? pass->second / fewest_passes : fused.seconds) * numbers);
    return {weighing.candidates().front().method, weighing.candidates()};
}

template <class T>
void learn_from_backward(const Recurrence<T>& recurrence, const Options& options, Method method, double seconds) {
    learn(key_of(recurrence, options, true),
          [&](Experience& now) { now.observed[method].add(seconds / double(recurrence.shape().count())); });
}

#define DEEPPCR_INSTANTIATE(T)                                                                            \
    template Choice choose(const Recurrence<T>&, const Options&);                                         \
    template void learn_from(const Recurrence<T>&, const Options&, const Choice&, const Report&, double); \
    template Choice choose_backward(const Recurrence<T>&, const Options&);                                \
    template void learn_from_backward(const Recurrence<T>&, const Options&, Method, double);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton
