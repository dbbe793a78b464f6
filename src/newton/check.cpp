#include <deeppcr/check.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <ostream>
#include <sstream>

#include <deeppcr/bidiagonal.hpp>
#include <deeppcr/scalar.hpp>

#include "device/cuda.hpp"

namespace deeppcr {
namespace {

constexpr std::size_t most_problems = 10;  // a wrong Jacobian is wrong in many places; the first ones say where

void add_problem(CheckReport& report, const std::string& problem) {
    if (report.problems.size() < most_problems)
        report.problems.push_back(problem);
    else if (report.problems.size() == most_problems)
        report.problems.push_back("... and more");
}

std::string at(index step, index sequence) {
    return "step " + std::to_string(step + 1) + ", sequence " + std::to_string(sequence);
}

std::string number(double value) {
    std::ostringstream text;
    text.precision(9);
    text << value;
    return text.str();
}

/// A number that is equal to another up to rounding, or NaN like it.
bool close(double a, double b, double scale, double tolerance) {
    return (std::isnan(a) && std::isnan(b)) || a == b || std::abs(a - b) <= tolerance * std::max(scale, std::abs(a));
}

/// The states at which a recurrence is tried, and what it made of them.
template <class T>
struct Trial {
    Trial(const Recurrence<T>& recurrence, index steps)
        : shape{steps, recurrence.shape().batch, recurrence.shape().width},
          before(shape),
          after(shape),
          jacobian(Shape{steps, shape.batch * shape.width, recurrence.block()}),
          sequences(std::size_t(shape.batch)) {
        std::iota(sequences.begin(), sequences.end(), index(0));
    }
    Section section(index first, index last) const { return {first, last, sequences, {}}; }
    Jacobian<T> jacobians(index block) const { return {jacobian.data(), shape, block}; }

    Shape shape;
    Buffer<T> before, after, jacobian;
    std::vector<index> sequences;
};

template <class T>
void compare_states(CheckReport& report, const std::string& what, View<const T> expected, View<const T> actual,
                    index first_step, double tolerance) {
    for (index i = 0; i < expected.steps(); ++i)
        for (index j = 0; j < expected.batch(); ++j)
            for (index k = 0; k < expected.width(); ++k)
                if (!close(expected(i, j, k), actual(i, j, k), 1, tolerance))
                    add_problem(report, what + " at " + at(first_step + i, j) + ", element " + std::to_string(k) +
                                            ": " + number(expected(i, j, k)) + " against " + number(actual(i, j, k)));
}

/// Column by column: the difference quotient of a step against the Jacobian that linearise gave.
template <class T>
void compare_jacobian(CheckReport& report, const Recurrence<T>& recurrence, const Trial<T>& trial) {
    const double epsilon = std::numeric_limits<T>::epsilon();
    const double tolerance = 50 * std::pow(epsilon, 2.0 / 3);
    const auto [steps, batch, width] = trial.shape;
    const index block = recurrence.block();
    const Jacobian<T> jacobian = trial.jacobians(block);
    const Buffer<T> moved = trial.before.clone(), up(trial.shape), down(trial.shape);
    const auto shift_column = [&](index column, double sign) {
        for (index i = 0; i < trial.shape.steps; ++i)
            for (index j = 0; j < trial.shape.batch; ++j) {
                const T value = trial.before(i, j, column);
                moved(i, j, column) =
                    T(double(value) + sign * std::cbrt(epsilon) * std::max(1.0, std::abs(double(value))));
            }
    };
    Buffer<double> largest({steps, batch, 1});
    for (index i = 0; i < steps; ++i)
        for (index j = 0; j < batch; ++j) {
            largest(i, j, 0) = 1e-30;
            for (index entry = 0; entry < width * block; ++entry)
                largest(i, j, 0) = std::max(largest(i, j, 0), std::abs(double(jacobian.at(i, j)[entry])));
        }
    for (index column = 0; column < width; ++column) {
        Buffer<T> above(trial.shape);
        shift_column(column, 1);
        std::copy_n(moved.data(), moved.size(), above.data());
        recurrence.step(trial.section(0, steps), moved, up);
        shift_column(column, -1);
        recurrence.step(trial.section(0, steps), moved, down);
        for (index i = 0; i < steps; ++i)
            for (index j = 0; j < batch; ++j)
                for (index row = 0; row < width; ++row) {
                    const double distance = double(above(i, j, column)) - double(moved(i, j, column));
                    const double quotient = (double(up(i, j, row)) - double(down(i, j, row))) / distance;
                    const bool stored = row / block == column / block;
                    const double entry = stored ? double(jacobian(i, j, row, column)) : 0;
                    const double scale = std::max({largest(i, j, 0), std::abs(quotient), 1e-3});
                    ++report.entries_checked;
                    report.largest_jacobian_error =
                        std::max(report.largest_jacobian_error, std::abs(entry - quotient) / scale);
                    if (!(std::abs(entry - quotient) <= tolerance * scale))
                        add_problem(report,
                                    "Jacobian at " + at(i, j) + ", row " + std::to_string(row) + ", column " +
                                        std::to_string(column) + ": " + number(entry) +
                                        (stored ? "" : " (outside its blocks of " + std::to_string(block) + ")") +
                                        ", finite differences give " + number(quotient));
                }
        for (index i = 0; i < steps; ++i)
            for (index j = 0; j < batch; ++j) moved(i, j, column) = trial.before(i, j, column);
    }
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const CheckReport& report) {
    if (report.ok())
        out << "ok: " << report.entries_checked << " entries checked";
    else
        out << report.problems.size() << (report.problems.size() == 1 ? " problem" : " problems");
    if (report.largest_jacobian_error > 0)
        out << ", largest relative Jacobian error " << number(report.largest_jacobian_error);
    for (const std::string& problem : report.problems) out << "\n  " << problem;
    return out;
}

namespace {

/// A recurrence that computes on the current GPU, for callers whose arrays lie in main memory.
template <class T>
class ByGpu : public Recurrence<T> {
public:
    explicit ByGpu(const Recurrence<T>& recurrence)
        : Recurrence<T>(recurrence.shape(), recurrence.block()),
          recurrence_(recurrence),
          sequences_(std::size_t(recurrence.shape().batch)) {
        std::iota(sequences_.begin(), sequences_.end(), index(0));
    }
    void initial(const Section& section, View<T> state) const override {
        const Array result = there(1, 1);
        recurrence_.initial(everything(section), result.view());
        back(section, result, state.data(), state.shape());
    }
    void step(const Section& section, View<const T> before, View<T> after) const override {
        const Array from = bring(section, before), to = there(before.steps(), 1);
        recurrence_.step(everything(section), View<const T>(from.view()), to.view());
        back(section, to, after.data(), after.shape());
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        linearise_by(&Recurrence<T>::linearise, section, before, after, jacobian);
    }
    void linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                            Jacobian<T> diagonal) const override {
        linearise_by(&Recurrence<T>::linearise_diagonal, section, before, after, diagonal);
    }
    void run(const Section& section, View<const T> state, View<T> trajectory) const override {
        const Array from = bring(section, state), to = there(trajectory.steps(), 1);
        recurrence_.run(everything(section), View<const T>(from.view()), to.view());
        back(section, to, trajectory.data(), trajectory.shape());
    }

private:
    using Array = Buffer<T>;

    /// On a GPU a section lists all sequences.
    Section everything(const Section& section) const {
        return {section.first, section.last, sequences_, {.backend = Backend::cuda}};
    }
    Array there(index steps, index block) const {
        const auto [all, batch, width] = this->shape();
        return Array({steps, batch, width * block}, Layout::steps_first, device::current_gpu());
    }
    /// The listed sequences' states among those of all, the others 0.
    Array bring(const Section& section, const View<const T>& states) const {
        const auto [all, batch, width] = this->shape();
        const Array here({states.steps(), batch, width});
        for (index i = 0; i < states.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j)
                std::copy_n(states.at(i, j), width, here.view().at(i, section.sequences[std::size_t(j)]));
        return here.on(device::current_gpu());
    }
    void back(const Section& section, const Array& array, T* data, const Shape& shape) const {
        const Array here = array.on(Device::host());
        const index size = here.shape().width;
        for (index i = 0; i < shape.steps; ++i)
            for (index j = 0; j < section.batch(); ++j, data += size)
                std::copy_n(here.view().at(i, section.sequences[std::size_t(j)]), size, data);
    }
    template <class Callback>
    void linearise_by(Callback callback, const Section& section, const View<const T>& before, const View<T>& after,
                      const Jacobian<T>& jacobian) const {
        const Array from = bring(section, before), to = there(before.steps(), 1),
                    blocks = there(before.steps(), jacobian.block());
        (recurrence_.*callback)(everything(section), View<const T>(from.view()), to.view(),
                                Jacobian<T>(blocks.data(), to.shape(), jacobian.block()));
        back(section, to, after.data(), after.shape());
        back(section, blocks, jacobian.data(), jacobian.states());
    }

    const Recurrence<T>& recurrence_;
    std::vector<index> sequences_;
};

template <class T>
CheckReport check_recurrence_here(const Recurrence<T>& recurrence, index wanted, std::uint64_t seed) {
    if (wanted < 1) throw InvalidArgument("steps", "1 or more", std::to_string(wanted));
    CheckReport report;
    const index steps = std::min(wanted, recurrence.shape().steps);
    if (steps == 0 || recurrence.shape().count() == 0) return report;
    const double tolerance = 100 * double(std::numeric_limits<T>::epsilon());
    const Trial<T> trial(recurrence, steps);
    const auto [count, batch, width] = trial.shape;
    const Section whole = trial.section(0, steps);

    const Buffer<T> state({1, batch, width}), noise = Buffer<T>::random(trial.shape, seed);
    recurrence.initial(whole, state);
    for (index i = 0; i < steps; ++i)
        for (index k = 0; k < batch * width; ++k)
            trial.before.data()[i * batch * width + k] = state.data()[k] + T(0.5) * noise.data()[i * batch * width + k];

    recurrence.linearise(whole, trial.before, trial.after, trial.jacobians(recurrence.block()));
    compare_jacobian(report, recurrence, trial);

    const Buffer<T> other(trial.shape), diagonal(trial.shape);
    recurrence.step(whole, trial.before, other);
    compare_states<T>(report, "step against linearise's result", other, trial.after, 0, tolerance);

    recurrence.linearise_diagonal(whole, trial.before, other, Jacobian<T>(diagonal.data(), trial.shape, 1));
    compare_states<T>(report, "linearise against linearise_diagonal's result", trial.after, other, 0, tolerance);
    Buffer<T> expected_diagonal(trial.shape);
    for (index i = 0; i < steps; ++i)
        for (index j = 0; j < batch; ++j)
            for (index k = 0; k < width; ++k)
                expected_diagonal(i, j, k) = trial.jacobians(recurrence.block())(i, j, k, k);
    compare_states<T>(report, "the Jacobian's diagonal against linearise_diagonal", expected_diagonal, diagonal, 0,
                      tolerance);

    // One step of one sequence must not depend on what it is evaluated together with.
    for (index i = 0; i < steps; ++i)
        for (index j = 0; j < batch; ++j) {
            const index one[] = {j};
            const Buffer<T> alone({1, 1, width});
            recurrence.step({i, i + 1, one, {}}, View<const T>(trial.before.view().at(i, j), {1, 1, width}), alone);
            compare_states<T>(report, "a section's step against the same step alone",
                              View<const T>(trial.after.view().at(i, j), {1, 1, width}), alone, i, tolerance);
        }

    const Buffer<T> run(trial.shape);
    recurrence.run(whole, state, run);
    View<const T> before = state;
    for (index i = 0; i < steps; ++i) {
        const View<T> after = other.view().steps(i, i + 1);
        recurrence.step(trial.section(i, i + 1), before, after);
        before = after;
    }
    compare_states<T>(report, "repeated step against run", other, run, 0, tolerance);
    return report;
}

/// Both compute the same states and Jacobians at the same places, up to rounding.
template <class T>
void compare_backends(CheckReport& report, const Recurrence<T>& here, const Recurrence<T>& there, index wanted,
                      std::uint64_t seed) {
    const Trial<T> one(here, std::min(wanted, here.shape().steps)), other(there, one.shape.steps);
    const auto [steps, batch, width] = one.shape;
    const index block = here.block();
    const double tolerance = 100 * double(std::numeric_limits<T>::epsilon());
    const Buffer<T> states = Buffer<T>::random(one.shape, seed), starts({1, batch, width}),
                    starts_there(starts.shape());
    const Section whole = one.section(0, steps);
    here.initial(whole, starts);
    there.initial(whole, starts_there);
    compare_states<T>(report, "the initial state on the processor against the GPU's", starts, starts_there, 0, 0);
    here.linearise(whole, states, one.after, one.jacobians(block));
    there.linearise(whole, states, other.after, other.jacobians(block));
    compare_states<T>(report, "a step on the processor against the GPU's", one.after, other.after, 0, tolerance);
    const Shape entries{steps, batch, width * block};
    compare_states<T>(report, "the Jacobian on the processor against the GPU's",
                      View<const T>(one.jacobian.data(), entries), View<const T>(other.jacobian.data(), entries), 0,
                      tolerance);
}

template <class T>
CheckReport check_recurrence_of(const Recurrence<T>& recurrence, index steps, std::uint64_t seed) {
    const bool here = recurrence.runs_on(Backend::cpu);
    CheckReport report;
    if (here) report = check_recurrence_here(recurrence, steps, seed);
    if (!recurrence.runs_on(Backend::cuda) || recurrence.shape().count() == 0) return report;
    if (!cuda_problem().empty()) {
        if (!here) throw NoDevice("there is no GPU to check the recurrence on: " + cuda_problem());
        return report;
    }
    const ByGpu<T> there(recurrence);
    const CheckReport other = check_recurrence_here<T>(there, steps, seed);
    for (const std::string& problem : other.problems) add_problem(report, "on the GPU, " + problem);
    report.largest_jacobian_error = std::max(report.largest_jacobian_error, other.largest_jacobian_error);
    report.entries_checked += other.entries_checked;
    if (here) compare_backends<T>(report, recurrence, there, steps, seed);
    return report;
}

}  // namespace

template <>
CheckReport check_recurrence(const Recurrence<float>& recurrence, index steps, std::uint64_t seed) {
    return check_recurrence_of(recurrence, steps, seed);
}
template <>
CheckReport check_recurrence(const Recurrence<double>& recurrence, index steps, std::uint64_t seed) {
    return check_recurrence_of(recurrence, steps, seed);
}

namespace {

struct Case {
    Shape shape;
    index block;
};

template <class T>
void check_backends_of(CheckReport& report, const Case& one, std::uint64_t seed, bool transposed) {
    const auto [shape, block] = one;
    const Buffer<T> jacobians = Buffer<T>::random({shape.steps, shape.batch * shape.width, block}, seed);
    // Spectral radius about 0.9: neither dying out at once nor growing.
    for (index i = 0; i < jacobians.size(); ++i) jacobians.data()[i] *= T(0.9 / std::sqrt(double(block)));
    const Buffer<T> right = Buffer<T>::random(shape, seed + 1), expected(shape), actual(shape);
    const BidiagonalSystem<T> system{Jacobian<T>(jacobians.data(), shape, block), right};
    const auto solve_by = [&](const BidiagonalSystem<T>& given, const View<T>& solution, Reduction method,
                              Backend backend) {
        const SolveOptions options{.method = method, .execution = {.backend = backend}};
        transposed ? solve_transposed(given, solution, options) : solve(given, solution, options);
    };
    const auto run = [&](View<T> solution, Reduction method, Backend backend) {
        if (backend != Backend::cuda) return solve_by(system, solution, method, backend);
        const Buffer<T> factors = jacobians.on(device::current_gpu()), sides = right.on(device::current_gpu());
        solve_by({Jacobian<T>(factors.data(), one.shape, one.block), sides}, sides, method, backend);
        const Buffer<T> solved = sides.on(Device::host());
        std::copy_n(solved.data(), solved.size(), solution.data());
    };
    run(expected, Reduction::sequential, Backend::reference);
    double largest = 1;
    for (index i = 0; i < expected.size(); ++i) largest = std::max(largest, std::abs(double(expected.data()[i])));
    const double tolerance = double(std::numeric_limits<T>::epsilon()) * 32 * std::sqrt(double(shape.steps + block));
    std::vector<Backend> backends{Backend::reference, Backend::cpu};
    if (cuda_problem().empty()) backends.push_back(Backend::cuda);
    for (const Backend backend : backends)
        for (const Reduction method : {Reduction::sequential, Reduction::pcr, Reduction::scan}) {
            run(actual, method, backend);
            double worst = 0;
            for (index i = 0; i < actual.size(); ++i) {
                const double difference = std::abs(double(actual.data()[i]) - double(expected.data()[i]));
                worst = scalar_functions::larger_or_nan(worst, difference);
            }
            report.entries_checked += actual.size();
            if (!(worst <= tolerance * largest))
                add_problem(report, std::string(sizeof(T) == 4 ? "float" : "double") + ", shape " + to_string(shape) +
                                        ", blocks of " + std::to_string(block) + (transposed ? ", transposed" : "") +
                                        ", backend " +
                                        (backend == Backend::cpu    ? "cpu"
                                         : backend == Backend::cuda ? "cuda"
                                                                    : "reference") +
                                        ", method " +
                                        (method == Reduction::sequential ? "sequential"
                                         : method == Reduction::pcr      ? "pcr"
                                                                         : "scan") +
                                        ": differs by " + number(worst) + " from the reference, at most " +
                                        number(tolerance * largest) + " is rounding");
        }
}

}  // namespace

CheckReport check_backends(std::uint64_t seed) {
    // One sequence and many, one step and powers of two and not, each kind of block.
    const Case cases[] = {{{1, 1, 1}, 1},    {{1000, 1, 1}, 1}, {{257, 3, 40}, 1},  {{64, 5, 12}, 2},
                          {{100, 2, 12}, 4}, {{37, 3, 5}, 5},   {{200, 1, 16}, 16}, {{33, 9, 32}, 32}};
    CheckReport report;
    for (const Case& one : cases)
        for (const bool transposed : {false, true}) {
            check_backends_of<float>(report, one, seed, transposed);
            check_backends_of<double>(report, one, seed, transposed);
        }
    return report;
}

}  // namespace deeppcr
