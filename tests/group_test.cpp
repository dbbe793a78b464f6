// Group, and what is computed across its ranks. `simulate` runs the ranks on threads, for many numbers of them; under
// mpirun (CTest does that with 1, 2 and 4 processes) the tests named Processes* run on those of Group::world() as well.
#include <gtest/gtest.h>
#include <deeppcr/deeppcr.hpp>

#include <bit>
#include <cmath>
#include <limits>
#include <mutex>

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

// ----------------------------------------------------------------------------------------------------- collectives

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
        const int ranks = group.size(), rank = group.rank(), power = int(std::bit_floor(unsigned(ranks)));
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
        const bool paired = rank < 2 * (ranks - power);
        const index reduce = paired && rank % 2 == 0 ? 1 : std::bit_width(unsigned(power)) - 1 + (paired ? 1 : 0);
        expect(Group::Purpose::reduce, reduce, reduce * 80);
        group.exclusive_scan(std::as_writable_bytes(std::span(values)),
                             [](std::span<const std::byte>, std::span<std::byte>, bool) {});
        index scan = 0;
        for (int distance = 1; rank + distance < ranks; distance *= 2) ++scan;
        expect(Group::Purpose::scan, scan, scan * 80);
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
            index scan = 0;
            for (int distance = 1; group.rank() + distance < group.size(); distance *= 2) ++scan;
            EXPECT_EQ(group.traffic(Group::Purpose::scan), (Group::Traffic{scan, scan * 2 * 6 * (3 + 1) * 8}));
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
        const System<double> wider({{40, 1, 4}, 2});
        Buffer<double> wide({40, 1, 4});
        const bool odd = group.rank() % 2 == 1;
        EXPECT_THROW(odd ? solve<double>(wider.part(0, 4), wide.view().steps(0, 4), {.group = &group})
                         : solve<double>(system.part(0, 4), solution.view().steps(0, 4), {.group = &group}),
                     InvalidArgument);
    });
}

}  // namespace
}  // namespace deeppcr
