// Group, and what is computed across its ranks. `simulate` runs the ranks on threads, for many numbers of them; under
// mpirun (CTest does that with 1, 2 and 4 processes) the tests named Processes* run on those of Group::world() as well.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <deeppcr/deeppcr.hpp>

#include <bit>
#include <cmath>
#include <limits>
#include <sstream>

#include "tests/compare.hpp"

namespace deeppcr {
namespace {

/// Runs a test on the ranks that there are, and where they are simulated on several numbers of them: none, a pair, not
/// a power of two, a power of two, one more.
class OnRanks : public testing::TestWithParam<int> {
protected:
    /// 0: those of Group::world().
    static void run(const std::function<void(Group&)>& body) {
        GetParam() == 0 ? body(Group::world()) : Group::simulate(GetParam(), body);
    }
};
INSTANTIATE_TEST_SUITE_P(Processes, OnRanks, testing::Values(0));
INSTANTIATE_TEST_SUITE_P(Threads, OnRanks, testing::Values(1, 2, 3, 4, 5, 8));

int rounds(int ranks) { return std::bit_width(unsigned(ranks - 1)); }

/// What this rank sends in a scan from the first rank, and in a reduction.
index scan_messages(const Group& group) {
    index messages = 0;
    for (int distance = 1; group.rank() + distance < group.size(); distance *= 2) ++messages;
    return messages;
}
index reduce_messages(const Group& group) {
    const int power = int(std::bit_floor(unsigned(group.size())));
    const bool paired = group.rank() < 2 * (group.size() - power);
    return paired && group.rank() % 2 == 0 ? 1 : std::bit_width(unsigned(power)) - 1 + (paired ? 1 : 0);
}

// ----------------------------------------------------------------------------------------------------- collectives

TEST_P(OnRanks, RanksOfOneMachineAreNumbered) {
    run([](Group& group) { EXPECT_EQ(group.rank_on_machine(), group.rank()); });
}

TEST_P(OnRanks, PartsFollowEachOtherAndDifferByOneStepAtMost) {
    run([](Group& group) {
        for (const index steps : {0, 1, 7, 1000}) {
            const auto [first, last] = group.part(steps);
            std::vector<index> bounds(std::size_t(2 * group.size()));
            const index mine[] = {first, last};
            group.gather(std::span<const index>(mine), std::span<index>(bounds));
            EXPECT_EQ(bounds.front(), 0);
            EXPECT_EQ(bounds.back(), steps);
            for (std::size_t i = 2; i < bounds.size(); i += 2) EXPECT_EQ(bounds[i], bounds[i - 1]);
            EXPECT_GE(last - first, steps / group.size());
            EXPECT_LE(last - first, steps / group.size() + 1);
        }
    });
}

TEST_P(OnRanks, BroadcastGivesEveryRankTheRootsValues) {
    run([](Group& group) {
        for (int root = 0; root < group.size(); ++root) {
            std::vector<double> values(3, group.rank() == root ? 10.5 + root : -1);
            group.broadcast(std::span<double>(values), root);
            EXPECT_EQ(values, std::vector<double>(3, 10.5 + root));
        }
    });
}

TEST_P(OnRanks, SumsAndMaximaAreTheSameBitsEverywhereAndRightToRounding) {
    run([](Group& group) {
        for (const index count : {1, 5, 20'000}) {  // of 20,000 the ranks sum slices
            const auto mine = Buffer<float>::random({count, 1, 1}, std::uint64_t(group.rank()));
            std::vector<float> sums(mine.data(), mine.data() + count), maxima(sums);
            group.sum(std::span<float>(sums));
            group.maximum(std::span<float>(maxima));
            std::vector<double> expected(std::size_t(count), 0.0);
            std::vector<float> largest(std::size_t(count), -std::numeric_limits<float>::infinity());
            for (int rank = 0; rank < group.size(); ++rank) {
                const auto others = Buffer<float>::random({count, 1, 1}, std::uint64_t(rank));
                for (std::size_t i = 0; i < sums.size(); ++i) {
                    expected[i] += others.data()[i];
                    largest[i] = std::max(largest[i], others.data()[i]);
                }
            }
            for (std::size_t i = 0; i < sums.size(); ++i) EXPECT_NEAR(sums[i], expected[i], 1e-5);
            EXPECT_EQ(maxima, largest);
            std::vector<float> all(sums.size() * std::size_t(group.size()));
            group.gather(std::span<const float>(sums), std::span<float>(all));
            for (std::size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], sums[i % sums.size()]);
        }
        double value = group.rank() == group.size() - 1 ? std::numeric_limits<double>::quiet_NaN() : 1;
        group.maximum(std::span(&value, 1));
        EXPECT_TRUE(std::isnan(value));
    });
}

/// The text of the ranks that were combined, in order: no operation is less commutative.
struct Names {
    std::array<char, 16> text{};
};

TEST_P(OnRanks, ScansAndReductionsKeepTheOrderOfTheRanks) {
    run([](Group& group) {
        const Group::Combine join = [](std::span<const std::byte> earlier, std::span<std::byte> values, bool) {
            const auto* const before = reinterpret_cast<const Names*>(earlier.data());
            auto* const after = reinterpret_cast<Names*>(values.data());
            const std::string joined = std::string(before->text.data()) + after->text.data();
            std::copy(joined.begin(), joined.end(), after->text.begin());
        };
        const auto own = [&] { return Names{{char('a' + group.rank())}}; };
        const std::string all = std::string("abcdefgh").substr(0, std::size_t(group.size()));
        const auto backwards = std::string(all.rbegin(), all.rend());
        const std::size_t here = std::size_t(group.rank()), after = std::size_t(group.size()) - 1 - here;

        Names names = own();
        group.reduce(std::as_writable_bytes(std::span(&names, 1)), join);
        EXPECT_EQ(names.text.data(), all);
        names = own();
        group.exclusive_scan(std::as_writable_bytes(std::span(&names, 1)), join);
        EXPECT_EQ(names.text.data(), here == 0 ? "a" : all.substr(0, here));
        names = own();
        group.exclusive_scan(std::as_writable_bytes(std::span(&names, 1)), join, Group::Direction::from_last_rank);
        EXPECT_EQ(names.text.data(), after == 0 ? backwards.substr(0, 1) : backwards.substr(0, after));
    });
}

TEST_P(OnRanks, AProblemOfOneRankIsThrownOnAll) {
    run([](Group& group) {
        EXPECT_NO_THROW(group.agree(nullptr));
        const int failed = group.size() / 2;
        std::exception_ptr problem;
        if (group.rank() == failed) problem = std::make_exception_ptr(OutOfMemory("no room"));
        try {
            group.agree(problem);
            ADD_FAILURE() << "nothing was thrown on " << to_string(group);
        } catch (const OutOfMemory& error) {
            EXPECT_EQ(group.rank(), failed);
            EXPECT_STREQ(error.what(), "no room");
        } catch (const RankFailed& error) {
            EXPECT_NE(group.rank(), failed);
            EXPECT_EQ(error.what(),
                      "rank " + std::to_string(failed) + " of " + std::to_string(group.size()) + ": no room");
        }
        group.barrier();  // and the group goes on
    });
}

TEST_P(OnRanks, WhatIsSentIsCounted) {
    run([](Group& group) {
        const int ranks = group.size(), rank = group.rank();
        std::vector<double> values(10), everything(std::size_t(10 * ranks));
        const auto expect = [&](Group::Purpose purpose, index messages, index bytes) {
            EXPECT_EQ(group.traffic(purpose), (Group::Traffic{messages, bytes}))
                << "purpose " << int(purpose) << ", " << to_string(group) << ": " << group.traffic(purpose).messages
                << " messages of " << group.traffic(purpose).bytes << " bytes";
        };
        group.reset_traffic();
        group.barrier();
        expect(Group::Purpose::barrier, rounds(ranks), 0);
        group.gather(std::span<const double>(values), std::span<double>(everything));
        expect(Group::Purpose::gather, rounds(ranks), (ranks - 1) * 80);
        group.sum(std::span<double>(values));
        expect(Group::Purpose::reduce, reduce_messages(group), reduce_messages(group) * 80);
        group.exclusive_scan(std::as_writable_bytes(std::span(values)),
                             [](std::span<const std::byte>, std::span<std::byte>, bool) {});
        expect(Group::Purpose::scan, scan_messages(group), scan_messages(group) * 80);
        group.broadcast(std::span<double>(values));
        index sent[] = {group.traffic(Group::Purpose::broadcast).messages};
        group.sum(std::span<index>(sent));
        EXPECT_EQ(sent[0], ranks - 1);  // each of the others receives one

        group.reset_traffic();
        std::vector<float> many(20'000);
        group.sum(std::span<float>(many));
        if (ranks == 1)
            expect(Group::Purpose::reduce, 0, 0);
        else if (ranks == 2)
            expect(Group::Purpose::reduce, 1, 80'000);
        else
            expect(Group::Purpose::reduce, 2 * (ranks - 1),
                   4 * (20'000 + (ranks - 2) * (20'000 * (rank + 1) / ranks - 20'000 * rank / ranks)));
        EXPECT_EQ(group.traffic().messages, group.traffic(Group::Purpose::reduce).messages);
    });
}

TEST(Group, NobodyWaitsForASimulatedRankThatHasFailedOrEnded) {
    EXPECT_THROW(Group::simulate(3,
                                 [](Group& group) {
                                     if (group.rank() == 1) throw OutOfMemory("as the test wants it");
                                     group.barrier();
                                 }),
                 OutOfMemory);
    EXPECT_THROW(Group::simulate(2,
                                 [](Group& group) {
                                     if (group.rank() == 0) group.barrier();
                                 }),
                 RankFailed);
    EXPECT_THROW(Group::simulate(0, [](Group&) {}), InvalidArgument);
}

TEST(Group, AloneItSendsNothing) {
    Group alone;
    double value = 2;
    alone.sum(std::span(&value, 1));
    alone.barrier();
    EXPECT_EQ(value, 2);
    EXPECT_EQ(alone.part(7), (std::pair<index, index>{0, 7}));
    EXPECT_EQ(alone.traffic(), Group::Traffic());
    EXPECT_THROW(alone.broadcast(std::span(&value, 1), 1), InvalidArgument);
}

// ---------------------------------------------------------------------------------------------------------- solving

struct Problem {
    Shape shape;
    index block;
    Backend backend = Backend::cpu;
    Reduction method = Reduction::automatic;
};

/// Random blocks that neither grow nor shrink much; the same on every rank.
template <class T>
struct System {
    explicit System(const Problem& problem)
        : shape(problem.shape),
          block(problem.block),
          factors(Buffer<T>::random({shape.steps, shape.batch, shape.width * block}, 1)),
          right_side(Buffer<T>::random(shape, 2)),
          initial(Buffer<T>::random({1, shape.batch, shape.width}, 3)) {
        for (index i = 0; i < factors.size(); ++i) factors.data()[i] *= T(0.8 / std::sqrt(double(block)));
    }
    BidiagonalSystem<T> part(index first, index last) const {
        const Jacobian<const T> all(factors.data(), shape, block);
        return {all.steps(first, last), right_side.view().steps(first, last), initial.view()};
    }
    Shape shape;
    index block;
    Buffer<T> factors, right_side, initial;
};

/// Largest difference from one rank's solution, over all ranks; the solution here is kept in `found`.
template <class T>
void expect_solved(Group& group, const Problem& problem, bool transposed, bool in_place, double tolerance) {
    const System<T> system(problem);
    const auto [first, last] = group.part(problem.shape.steps);
    const auto solve_by = [&](const BidiagonalSystem<T>& given, View<T> solution, Group* shared) {
        const SolveOptions options{.method = problem.method, .execution = {problem.backend, 2}, .group = shared};
        transposed ? solve_transposed(given, solution, options) : solve(given, solution, options);
    };
    Buffer<T> expected(problem.shape), found(problem.shape), again(problem.shape);
    solve_by(system.part(0, problem.shape.steps), expected, nullptr);
    for (Buffer<T>* const target : {&found, &again}) {
        BidiagonalSystem<T> part = system.part(first, last);
        const View<T> solution = target->view().steps(first, last);
        if (in_place) {
            std::copy_n(part.right_side.data(), solution.shape().count(), solution.data());
            part.right_side = solution;
        }
        solve_by(part, solution, &group);
    }
    EXPECT_LE(largest_difference<T>(found.view().steps(first, last), expected.view().steps(first, last)), tolerance)
        << to_string(problem.shape) << " block " << problem.block << (transposed ? " transposed, " : ", ")
        << to_string(group);
    EXPECT_TRUE(same_bits(found, again));
}

TEST_P(OnRanks, SolvesEveryKindOfBlockAsOneRankDoes) {
    run([](Group& group) {
        // A step for each rank and no more; a prime; parts that differ by one; diagonal, in blocks, dense.
        for (const Problem& problem :
             {Problem{{std::max(group.size(), 2), 1, 1}, 1}, Problem{{101, 2, 6}, 1}, Problem{{101, 3, 6}, 3},
              Problem{{67, 2, 5}, 5}, Problem{{1000, 1, 1}, 1}, Problem{{67, 2, 4}, 2, Backend::reference},
              Problem{{101, 1, 3}, 3, Backend::cpu, Reduction::pcr},
              Problem{{101, 1, 3}, 3, Backend::cpu, Reduction::scan},
              Problem{{67, 2, 4}, 4, Backend::cpu, Reduction::sequential}}) {
            if (problem.shape.steps < group.size()) continue;
            for (const bool transposed : {false, true})
                for (const bool in_place : {false, true}) {
                    expect_solved<double>(group, problem, transposed, in_place, 1e-13);
                    expect_solved<float>(group, problem, transposed, in_place, 1e-5);
                }
        }
    });
}

TEST_P(OnRanks, ASolveSendsOneScanOfSummariesWhateverItsSteps) {
    run([](Group& group) {
        for (const index steps : {20, 200}) {
            const Problem problem{{steps, 2, 6}, 3};
            const System<double> system(problem);
            const auto [first, last] = group.part(steps);
            Buffer<double> solution(problem.shape);
            group.reset_traffic();
            solve<double>(system.part(first, last), solution.view().steps(first, last), {.group = &group});
            const index scan = scan_messages(group), reduce = reduce_messages(group);
            EXPECT_EQ(group.traffic(Group::Purpose::scan), (Group::Traffic{scan, scan * 2 * 6 * (3 + 1) * 8}));
            EXPECT_EQ(group.traffic(Group::Purpose::reduce), (Group::Traffic{reduce, reduce * 56}));
            EXPECT_EQ(group.traffic(Group::Purpose::pass), Group::Traffic());
        }
    });
}

TEST_P(OnRanks, NumbersThatAreNotFiniteStayInTheirSequence) {
    run([](Group& group) {
        const Problem problem{{40, 3, 2}, 2};
        const System<double> system(problem);
        system.right_side(17, 1, 0) = std::numeric_limits<double>::quiet_NaN();
        const auto [first, last] = group.part(problem.shape.steps);
        Buffer<double> expected(problem.shape), found(problem.shape);
        solve<double>(system.part(0, 40), expected);
        solve<double>(system.part(first, last), found.view().steps(first, last), {.group = &group});
        for (index i = first; i < last; ++i)
            for (index j = 0; j < 3; ++j)
                for (index k = 0; k < 2; ++k) {
                    if (j == 1 && (i > 17 || (i == 17 && k == 0))) {
                        EXPECT_TRUE(std::isnan(found(i, j, k)));
                    } else {
                        EXPECT_NEAR(found(i, j, k), expected(i, j, k), 1e-13);
                    }
                }
    });
}

TEST_P(OnRanks, WhatOneRankCannotSolveIsAnErrorOnAll) {
    run([](Group& group) {
        if (group.size() == 1) return;
        const System<double> system({{40, 1, 2}, 2});
        auto [first, last] = group.part(40);
        if (group.rank() == group.size() - 1) first = last;  // no step
        Buffer<double> solution({40, 1, 2});
        EXPECT_THROW(solve<double>(system.part(first, last), solution.view().steps(first, last), {.group = &group}),
                     Error);
        EXPECT_THROW(solve<double>(system.part(0, 4), solution.view().steps(0, 4),
                                   {.execution = {.backend = Backend::cuda}, .group = &group}),
                     Error);
        const System<double> wider({{40, 1, 4}, 2});
        Buffer<double> wide({40, 1, 4});
        const bool odd = group.rank() % 2 == 1;
        EXPECT_THROW(odd ? solve<double>(wider.part(0, 4), wide.view().steps(0, 4), {.group = &group})
                         : solve<double>(system.part(0, 4), solution.view().steps(0, 4), {.group = &group}),
                     InvalidArgument);
    });
}

// ------------------------------------------------------------------------------------------------------- evaluation

/// x_t = tanh(gain M x_{t-1} + u_t), or that without tanh, for steps first+1 .. of a longer trajectory; M and u_t are
/// functions of their place. f is not a number from step bad_step of bad_sequence on, and throws where it is asked to.
template <class T>
class Network : public Recurrence<T> {
public:
    Network(const Shape& part, index first, double gain, bool affine = false)
        : Recurrence<T>(part), first_(first), gain_(gain), affine_(affine) {}

    index bad_step = -1, bad_sequence = 0;
    bool throws = false;

    void initial(const Section& section, View<T> state) const override {
        for (index j = 0; j < section.batch(); ++j)
            for (index k = 0; k < state.width(); ++k)
                state(0, j, k) = T(0.1) * T(section.sequences[std::size_t(j)] + 1) / T(k + 1);
    }
    void step(const Section& section, View<const T> before, View<T> after) const override {
        compute(section, before, after, {});
    }
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override {
        compute(section, before, after, jacobian);
    }

private:
    void compute(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const {
        if (throws) throw std::runtime_error("the sensor is off");
        const index width = this->shape().width;
        const auto entry = [&](index row, index column) {
            return T(gain_ * std::cos(double(3 * row + 5 * column + 1)) / std::sqrt(double(width)));
        };
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                const index step = first_ + section.first + i, sequence = section.sequences[std::size_t(j)];
                for (index row = 0; row < width; ++row) {
                    T sum = T(std::sin(double(7 * step + 3 * sequence + row)));
                    for (index k = 0; k < width; ++k) sum += entry(row, k) * before(i, j, k);
                    const T value = affine_ ? sum : std::tanh(sum);
                    after(i, j, row) = value;
                    if (jacobian.data() != nullptr)
                        for (index k = 0; k < width; ++k)
                            jacobian(i, j, row, k) = (affine_ ? T(1) : 1 - value * value) * entry(row, k);
                }
                if (bad_step >= 0 && step >= bad_step && sequence == bad_sequence)
                    after(i, j, 0) = std::numeric_limits<T>::quiet_NaN();
            }
    }
    index first_;
    double gain_;
    bool affine_;
};

/// Whether all ranks have this text: what of a Report they must share.
void expect_shared(Group& group, const Report& report) {
    std::ostringstream text;
    text << report.method << ' ' << to_string(report.status) << ' ' << report.iterations << ' ' << report.residual
         << ' ' << report.relative_residual << ' ' << report.error << ' ' << report.lyapunov << ' '
         << report.sequential_steps;
    for (const double residual : report.residuals) text << ' ' << residual;
    for (const Report::Sequence& sequence : report.sequences)
        text << '\n'
             << int(sequence.status) << ' ' << sequence.iterations << ' ' << sequence.confirmed << ' '
             << sequence.residual << ' ' << sequence.error;
    std::string mine = text.str();
    mine.resize(2000);
    std::string first = mine;
    group.broadcast(std::span<char>(first));
    EXPECT_EQ(mine.c_str(), std::string(first.c_str())) << to_string(group);
}

template <class T>
struct Evaluated {
    Evaluation<T> alone;  ///< all steps, by one rank
    Evaluation<T> part;   ///< this rank's
    index first, last;
    View<T> expected() const { return alone.trajectory.view().steps(first, last); }
};

/// All steps on each rank alone, and shared by the ranks; change: what is to be done to the recurrences before.
template <class T>
Evaluated<T> evaluate_both(Group& group, const Shape& shape, double gain, Options options,
                           const std::function<void(Network<T>&)>& change = {}, bool affine = false) {
    const auto [first, last] = group.part(shape.steps);
    Network<T> whole(shape, 0, gain, affine), part({last - first, shape.batch, shape.width}, first, gain, affine);
    if (change) change(whole), change(part);
    Evaluated<T> result{evaluate(whole, options), {}, first, last};
    options.group = &group;
    result.part = evaluate(part, options);
    if (group.size() > 1) expect_shared(group, result.part.report);
    return result;
}

TEST_P(OnRanks, NewtonsMethodConvergesAsOnOneRank) {
    run([](Group& group) {
        for (const Shape& shape : {Shape{97, 1, 1}, Shape{97, 3, 2}, Shape{std::max(group.size(), 8), 2, 3}})
            for (const Surrogate surrogate : {Surrogate::full, Surrogate::diagonal, Surrogate::zero}) {
                const auto [alone, part, first, last] = evaluate_both<double>(
                    group, shape, 0.9, {.method = Method::newton, .surrogate = surrogate, .max_iterations = 200});
                EXPECT_EQ(part.report.status, Status::converged) << part.report;
                EXPECT_EQ(part.report.iterations, alone.report.iterations) << part.report << '\n' << alone.report;
                EXPECT_LE(part.report.relative_residual, 1);
                EXPECT_LE(largest_difference<double>(part.trajectory, alone.trajectory.view().steps(first, last)),
                          1e-12);
                ASSERT_EQ(part.report.sequences.size(), std::size_t(shape.batch));
                for (index j = 0; j < shape.batch; ++j)
                    EXPECT_EQ(part.report.sequences[std::size_t(j)].confirmed, shape.steps);
                if (surrogate == Surrogate::full) {
                    EXPECT_GT(part.report.error, alone.report.error / 4);
                    EXPECT_LT(part.report.error, alone.report.error * 4 + 1e-15);
                    EXPECT_LT(part.report.lyapunov, 0);
                }
            }
    });
}

TEST_P(OnRanks, ARankTakesMemoryForItsPartOnly) {
    run([](Group& group) {
        const Options options{.method = Method::newton, .reduction = Reduction::sequential};
        const auto both = evaluate_both<double>(group, {8'000, 2, 4}, 0.5, options);
        const double whole = double(both.alone.report.workspace_bytes), part = double(both.part.report.workspace_bytes);
        EXPECT_LT(part, 1.1 * whole / group.size() + 20'000);
    });
}

TEST_P(OnRanks, AnAffineRecurrenceTakesOneUpdate) {
    run([](Group& group) {
        const auto both = evaluate_both<double>(group, {200, 2, 3}, 1.0, {.method = Method::newton}, {}, true);
        EXPECT_EQ(both.part.report.status, Status::converged);
        EXPECT_EQ(both.part.report.iterations, both.alone.report.iterations);
        EXPECT_LE(both.part.report.iterations, 3);
        EXPECT_LE(largest_difference<double>(both.part.trajectory, both.expected()), 1e-11);
    });
}

TEST_P(OnRanks, TheSameRanksGiveTheSameBits) {
    run([](Group& group) {
        for (const Method method : {Method::newton, Method::sequential}) {
            const Options options{.method = method};
            const auto one = evaluate_both<float>(group, {500, 3, 4}, 1.1, options);
            const auto other = evaluate_both<float>(group, {500, 3, 4}, 1.1, options);
            EXPECT_TRUE(same_bits(one.part.trajectory, other.part.trajectory));
            if (method == Method::sequential) {  // and those of one rank
                EXPECT_TRUE(same_bits<float>(one.part.trajectory.view(), one.expected()));
                EXPECT_EQ(one.part.report.sequential_steps, 1500);
            }
        }
    });
}

// docs/scaling.md has these formulas.
TEST_P(OnRanks, EvaluationsAndAdjointsSendWhatTheDocumentationSays) {
    run([](Group& group) {
        const int ranks = group.size();
        if (ranks == 1) return;  // AloneItSendsNothing
        const Shape shape{400, 2, 3};
        const auto [first, last] = group.part(shape.steps);
        const Network<double> part({last - first, 2, 3}, first, 0.9);
        const index state = 2 * 3 * 8, summary = state * (3 + 1), scans = scan_messages(group);
        const index reductions = reduce_messages(group), next = group.rank() + 1 < ranks ? 1 : 0;
        const auto expect_sent = [&](Group::Purpose purpose, index messages, index bytes) {
            EXPECT_EQ(group.traffic(purpose).messages, messages) << int(purpose) << ", " << to_string(group);
            EXPECT_EQ(group.traffic(purpose).bytes, bytes) << int(purpose) << ", " << to_string(group);
        };
        for (const Estimates estimates : {Estimates::none, Estimates::quick}) {
            group.reset_traffic();
            const auto found = evaluate(part, {.method = Method::newton, .estimates = estimates, .group = &group});
            const index passes = found.report.iterations, solves = passes - (estimates == Estimates::none ? 1 : 0);
            EXPECT_GE(passes, 3);
            expect_sent(Group::Purpose::pass, next * passes, next * passes * state);
            expect_sent(Group::Purpose::scan, scans * (1 + solves), scans * (8 + solves * summary));
            expect_sent(Group::Purpose::reduce, reductions * (5 + passes),
                        reductions * (152 + 8 + passes * 16 * (1 + 2) + 8 + 24 * 2 + 8));
            index broadcasts = group.traffic(Group::Purpose::broadcast).messages;
            group.sum(std::span(&broadcasts, 1));
            EXPECT_EQ(broadcasts, (ranks - 1) * (estimates == Estimates::none ? 1 : 2));

            group.reset_traffic();
            adjoint(part, found.trajectory, found.report, View<const double>(found.trajectory.view()),
                    {.group = &group});
            expect_sent(Group::Purpose::pass, next, next * state);
            expect_sent(Group::Purpose::reduce, reductions * 3, reductions * (8 + 152 + 8));
            index scanned[] = {group.traffic(Group::Purpose::scan).messages, group.traffic(Group::Purpose::scan).bytes};
            group.sum(std::span<index>(scanned));
            index expected = 0;  // over all ranks: this scan runs from the last one
            for (int distance = 1; distance < ranks; distance *= 2) expected += ranks - distance;
            EXPECT_EQ(scanned[0], expected);
            EXPECT_EQ(scanned[1], expected * summary);
        }
        group.reset_traffic();
        (void)evaluate(part, {.method = Method::sequential, .group = &group});
        expect_sent(Group::Purpose::pass, next, next * state);
        expect_sent(Group::Purpose::scan, scans, scans * 8);
    });
}

TEST_P(OnRanks, ASequenceThatIsNotFiniteEndsThereAndNoOtherDoes) {
    run([](Group& group) {
        for (const Method method : {Method::newton, Method::sequential, Method::overlap})
            for (const index bad : {0, 3, 59, 79}) {
                const auto both =
                    evaluate_both<double>(group, {80, 3, 2}, 0.8, {.method = method}, [&](Network<double>& network) {
                        network.bad_step = bad;
                        network.bad_sequence = 1;
                    });
                const Report &found = both.part.report, &expected = both.alone.report;
                EXPECT_EQ(found.status, Status::non_finite) << found;
                for (std::size_t j = 0; j < 3; ++j) {
                    EXPECT_EQ(found.sequences[j].confirmed, j == 1 ? bad : 80) << found;
                    EXPECT_EQ(found.sequences[j].status == Status::non_finite, j == 1) << found << expected;
                }
                for (index i = both.first; i < both.last; ++i)
                    for (index j = 0; j < 3; ++j)
                        for (index k = 0; k < 2; ++k) {
                            const double state = both.part.trajectory(i - both.first, j, k);
                            const double right = both.alone.trajectory(i, j, k);
                            EXPECT_TRUE(std::isnan(right) ? std::isnan(state) : std::abs(state - right) < 1e-12)
                                << "step " << i << ", sequence " << j << ": " << state << ", expected " << right;
                        }
            }
    });
}

TEST_P(OnRanks, WhatNewtonsMethodCannotFinishIsFinishedRankAfterRank) {
    run([](Group& group) {
        // Chaotic: gain 6. Sequentially finished from exact states on, so the bits of one rank's sequential evaluation.
        const Shape shape{300, 2, 3};
        for (const auto on_failure : {OnFailure::finish, OnFailure::report}) {
            const auto both = evaluate_both<double>(
                group, shape, 6, {.method = Method::newton, .max_iterations = 12, .on_failure = on_failure});
            const Report& report = both.part.report;
            const bool finishes = on_failure == OnFailure::finish;
            EXPECT_EQ(report.status, finishes ? Status::finished_sequentially : Status::max_iterations) << report;
            EXPECT_EQ(report.iterations, 12);
            const auto sequential = evaluate_both<double>(group, shape, 6, {.method = Method::sequential});
            for (const Report::Sequence& sequence : report.sequences)
                EXPECT_GE(sequence.confirmed, finishes ? 300 : 12);
            for (index i = both.first; i < both.last; ++i)
                for (index j = 0; j < 2; ++j) {
                    if (i < 12) {
                        EXPECT_NEAR(both.part.trajectory(i - both.first, j, 0), sequential.alone.trajectory(i, j, 0),
                                    1e-9);
                    } else if (finishes && i > 0) {  // the residual, where the trajectory itself means nothing
                        Buffer<double> before({1, 2, 3}), after({1, 2, 3});
                        if (i == both.first) continue;
                        for (index k = 0; k < 3; ++k) before(0, j, k) = both.part.trajectory(i - 1 - both.first, j, k);
                        const std::vector<index> sequences = all(2);
                        Network<double>(shape, 0, 6).step({i, i + 1, sequences}, before.view(), after.view());
                        EXPECT_NEAR(both.part.trajectory(i - both.first, j, 1), after(0, j, 1), 1e-12);
                    }
                }
            if (finishes) {
                EXPECT_GT(report.sequential_steps, 0);
            }
        }
        const auto [first, last] = group.part(300);
        const Network<double> part({last - first, 2, 3}, first, 6);
        EXPECT_THROW(
            evaluate(part,
                     {.method = Method::newton, .max_iterations = 3, .on_failure = OnFailure::raise, .group = &group}),
            NotConverged);
        const auto stopped = evaluate(part, {.method = Method::newton,
                                             .progress =
                                                 [](index, index of, index passes) {
                                                     EXPECT_EQ(of, 300);
                                                     return passes < 2;
                                                 },
                                             .group = &group});
        EXPECT_EQ(stopped.report.status, Status::max_iterations);
        EXPECT_LE(stopped.report.iterations, 3);
    });
}

TEST_P(OnRanks, AnExceptionOfOneRanksCallbackReachesAll) {
    run([](Group& group) {
        if (group.size() == 1) return;
        for (const Method method : {Method::newton, Method::sequential, Method::overlap}) {
            const auto [first, last] = group.part(100);
            Network<double> part({last - first, 1, 2}, first, 0.5);
            part.throws = group.rank() == 1;
            try {
                evaluate(part, {.method = method, .group = &group});
                ADD_FAILURE() << to_string(method) << " on " << to_string(group);
            } catch (const RankFailed& error) {
                EXPECT_NE(group.rank(), 1);
                EXPECT_THAT(error.what(), testing::HasSubstr("rank 1 of"));
                EXPECT_THAT(error.what(), testing::HasSubstr("the sensor is off"));
            } catch (const std::runtime_error& error) {
                EXPECT_EQ(group.rank(), 1);
                EXPECT_STREQ(error.what(), "the sensor is off");
            }
        }
        const Network<double> part({group.rank() == 0 ? 0 : 10, 1, 2}, 0, 0.5);
        EXPECT_THROW(evaluate(part, {.group = &group}), Error);
        const Network<double> other({10, group.rank() == 0 ? 1 : 2, 2}, 0, 0.5);
        EXPECT_THROW(evaluate(other, {.group = &group}), InvalidArgument);
        EXPECT_THROW(evaluate(part, {.window = 4, .group = &group}), Error);
        EXPECT_THROW(evaluate(part, {.anderson = 2, .group = &group}), Error);
    });
}

TEST_P(OnRanks, PartsFromGuessedStatesMeetWhereTheRecurrenceForgets) {
    run([](Group& group) {
        for (const double gain : {0.5, 6.0}) {  // forgets; never does
            const auto both = evaluate_both<double>(group, {400, 2, 3}, gain, {.method = Method::overlap, .chunk = 50});
            const Report& report = both.part.report;
            EXPECT_TRUE(report.ok()) << report;
            if (gain < 1) {
                EXPECT_LE(report.iterations, 3) << report;
                EXPECT_LE(largest_difference<double>(both.part.trajectory, both.expected()), 1e-12);
            } else {
                EXPECT_LE(report.iterations, std::max(group.size() + 1, 8)) << report;  // alone there are 8 chunks
            }
        }
    });
}

// ---------------------------------------------------------------------------------------------------- cells, gradients

TEST_P(OnRanks, CellsAndTheirGradientsAreThoseOfOneRank) {
    run([](Group& group) {
        const index steps = 150, batch = 2, channels = 3;
        const auto inputs = Buffer<double>::random({steps, batch, ParaLSTM::inputs * channels}, 1);
        const auto parameters = Buffer<double>::random({ParaLSTM::parameters, 1, channels}, 2);
        const auto initial = Buffer<double>::random({1, batch, ParaLSTM::states * channels}, 3);
        const auto output_gradient = Buffer<double>::random({steps, batch, ParaLSTM::states * channels}, 4);
        const auto [first, last] = group.part(steps);
        const CellRecurrence<ParaLSTM, double> whole(inputs, parameters, initial);
        const CellRecurrence<ParaLSTM, double> part(inputs.view().steps(first, last), parameters, initial);
        const auto expected = evaluate(whole, {.method = Method::sequential});
        const auto gradients = adjoint(whole, expected.trajectory, expected.report, output_gradient);
        for (const Method method :
             {Method::automatic, Method::newton, Method::overlap, Method::shooting, Method::sequential}) {
            const Options options{.method = method, .chunk = 16, .group = &group};
            const auto found = evaluate(part, options);
            EXPECT_TRUE(found.report.ok()) << found.report;
            EXPECT_LE(largest_difference<double>(found.trajectory, expected.trajectory.view().steps(first, last)),
                      1e-12)
                << to_string(method);
            const auto own = adjoint(part, found.trajectory, found.report,
                                     View<const double>(output_gradient.view().steps(first, last)), options);
            EXPECT_LE(largest_difference<double>(own.inputs, gradients.inputs.view().steps(first, last)), 1e-11);
            EXPECT_TRUE(near(own.parameters, gradients.parameters, 1e-11));
            if (group.rank() == 0) {
                EXPECT_TRUE(near(own.initial, gradients.initial, 1e-11));
            }
        }
    });
}

/// Rows with several sequences, one after the other: one that begins inside a part, and one that begins with it.
TEST_P(OnRanks, ASequenceMayBeginAnywhere) {
    run([](Group& group) {
        const index steps = 150, batch = 2, channels = 3;
        const auto inputs = Buffer<double>::random({steps, batch, ParaLSTM::inputs * channels}, 1);
        const auto parameters = Buffer<double>::random({ParaLSTM::parameters, 1, channels}, 2);
        const auto output_gradient = Buffer<double>::random({steps, batch, ParaLSTM::states * channels}, 4);
        const auto [first, last] = group.part(steps);
        index bound = 60;  // where the second rank's part begins
        if (group.size() > 1) {
            bound = group.rank() == 1 ? first : 0;
            group.broadcast(std::span(&bound, 1), 1);
        }
        const std::vector<SequenceStart> starts = {{0, 0}, {0, 7}, {0, bound}, {1, 0}, {1, 97}};
        const auto initial = Buffer<double>::random({1, index(starts.size()), ParaLSTM::states * channels}, 3);
        const CellRecurrence<ParaLSTM, double> whole(inputs, parameters, initial, starts);

        std::vector<SequenceStart> here;     // that begin in this part
        std::vector<std::size_t> sequences;  // that have steps in it
        for (std::size_t i = 0; i < starts.size(); ++i) {
            const bool more = i + 1 < starts.size() && starts[i + 1].sequence == starts[i].sequence;
            const index begin = starts[i].step, end = more ? starts[i + 1].step : steps;
            if (begin >= last || end <= first) continue;
            sequences.push_back(i);
            if (begin >= first) here.push_back({starts[i].sequence, begin - first});
        }
        Buffer<double> own({1, index(sequences.size()), initial.view().width()});
        for (std::size_t i = 0; i < sequences.size(); ++i)
            std::copy_n(initial.view().at(0, index(sequences[i])), own.view().width(), own.view().at(0, index(i)));
        const CellRecurrence<ParaLSTM, double> part(inputs.view().steps(first, last), parameters, own, here);

        const auto expected = evaluate(whole, {.method = Method::sequential});
        const auto gradients = adjoint(whole, expected.trajectory, expected.report, output_gradient);
        for (const Method method : {Method::newton, Method::overlap, Method::shooting, Method::sequential}) {
            const Options options{.method = method, .chunk = 16, .group = &group};
            const auto found = evaluate(part, options);
            EXPECT_TRUE(found.report.ok()) << found.report;
            EXPECT_LE(largest_difference<double>(found.trajectory, expected.trajectory.view().steps(first, last)),
                      1e-12)
                << to_string(method);
            const auto mine = adjoint(part, found.trajectory, found.report,
                                      View<const double>(output_gradient.view().steps(first, last)), options);
            EXPECT_LE(largest_difference<double>(mine.inputs, gradients.inputs.view().steps(first, last)), 1e-11);
            EXPECT_TRUE(near(mine.parameters, gradients.parameters, 1e-11));
            for (std::size_t i = 0; i < sequences.size(); ++i) {
                const index k = index(sequences[i]);
                if (starts[sequences[i]].step < first) continue;  // it began on another rank
                EXPECT_LE(largest_difference<double>(mine.initial.view().sequences(index(i), index(i) + 1),
                                                     View<const double>(gradients.initial.view().sequences(k, k + 1))),
                          1e-11)
                    << k << " on " << to_string(group);
            }
        }
    });
}

TEST_P(OnRanks, WhatOneProcessComputesAloneRefusesAGroup) {
    run([](Group& group) {
        if (group.size() == 1) return;
        const auto inputs = Buffer<double>::random({40, 1, 2}, 1), parameters = Buffer<double>::random({1, 1, 2}, 2);
        const CellRecurrence<DiagonalElman, double> part(inputs, parameters);
        const Buffer<double> boundaries({4, 1, 2});
        EXPECT_THROW(evaluate_boundaries<double>(part, 10, boundaries, {.group = &group}), InvalidArgument);
        EXPECT_THROW(analyse(part, {.evaluation = {.group = &group}}), InvalidArgument);
    });
}

TEST_P(OnRanks, TheAdjointIsThatOfOneRank) {
    run([](Group& group) {
        for (const Shape& shape : {Shape{std::max(group.size(), 3), 2, 2}, Shape{120, 3, 4}}) {
            const auto both = evaluate_both<double>(group, shape, 0.9, {.method = Method::newton});
            const auto output_gradient = Buffer<double>::random(shape, 5);
            const auto expected =
                adjoint(Network<double>(shape, 0, 0.9), both.alone.trajectory, both.alone.report, output_gradient);
            const Network<double> part(both.part.trajectory.shape(), both.first, 0.9);
            const View<const double> own(output_gradient.view().steps(both.first, both.last));
            const auto found = adjoint(part, both.part.trajectory, both.part.report, own, {.group = &group});
            EXPECT_LE(largest_difference<double>(found.states, expected.states.view().steps(both.first, both.last)),
                      1e-12);
            if (group.rank() == 0) {
                EXPECT_TRUE(near(found.initial, expected.initial, 1e-12));
            }
            const auto again = adjoint(part, both.part.trajectory, both.part.report, own, {.group = &group});
            EXPECT_TRUE(same_bits(found.states, again.states));
            Report failed = both.part.report;
            if (group.rank() == group.size() - 1) failed.status = Status::max_iterations;
            EXPECT_THROW(adjoint(part, both.part.trajectory, failed, own, {.group = &group}), Error);
        }
    });
}

TEST_P(OnRanks, ADenseCellsWeightsGatherTheGradientsOfAllRanks) {
    run([](Group& group) {
        const index steps = 60, batch = 2, hidden = 3;
        const auto inputs = Buffer<double>::random({steps, batch, 3 * hidden}, 1);
        const auto weights = Buffer<double>::random({3, hidden, hidden}, 2),
                   biases = Buffer<double>::random({3, 1, hidden}, 3);
        const auto output_gradient = Buffer<double>::random({steps, batch, hidden}, 4);
        const auto [first, last] = group.part(steps);
        const auto initial = Buffer<double>::random({1, batch, hidden}, 5);
        const DenseCell<double> whole(DenseCellKind::gru, inputs, weights, biases, initial);
        const DenseCell<double> part(DenseCellKind::gru, inputs.view().steps(first, last), weights, biases, initial);
        const auto expected = evaluate(whole, {.method = Method::sequential});
        const auto gradients = adjoint(whole, expected.trajectory, expected.report, output_gradient);
        const auto found = evaluate(part, {.group = &group});
        EXPECT_TRUE(found.report.ok()) << found.report;
        const auto own = adjoint(part, found.trajectory, found.report,
                                 View<const double>(output_gradient.view().steps(first, last)), {.group = &group});
        EXPECT_LE(largest_difference<double>(own.inputs, gradients.inputs.view().steps(first, last)), 1e-11);
        EXPECT_TRUE(near(own.weights, gradients.weights, 1e-11));
        EXPECT_TRUE(near(own.biases, gradients.biases, 1e-11));
    });
}

}  // namespace
}  // namespace deeppcr
