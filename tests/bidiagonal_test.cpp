// The bidiagonal solvers against substitution in long double, and what theory says of them; one body for every backend,
// method, type, block, layout and direction.
#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <deeppcr/bidiagonal.hpp>

#include "gpu.hpp"
#include "on_gpu.hpp"
#include "tests/messages.hpp"

namespace deeppcr {
namespace {

const std::vector<Backend> backends = every_backend();
constexpr Reduction methods[] = {Reduction::automatic, Reduction::sequential, Reduction::pcr, Reduction::scan};
constexpr bool directions[] = {false, true};

std::string name(Backend backend) {
    constexpr const char* names[] = {"reference", "cpu", "cuda"};
    return names[int(backend)];
}
std::string name(Reduction method) {
    constexpr const char* names[] = {"automatic", "sequential", "pcr", "scan"};
    return names[int(method)];
}

/// What stored numbers are compared as.
template <class T>
Arithmetic<T> number(T stored) {
    return Arithmetic<T>(stored);
}
template <class T>
T stored(double value) {
    return T(Arithmetic<T>(value));
}

/// A size, and why it is tried.
struct Size {
    index value;
    const char* reason;
};

/// How the arrays lie in memory. The gaps that a padding leaves hold NaN.
struct Placement {
    Layout layout = Layout::steps_first;
    index padding = 0;
    const char* description = "[T,B,D]";
};
constexpr Placement placements[] = {
    {Layout::steps_first, 0, "[T,B,D]"},
    {Layout::batch_first, 0, "[B,T,D]"},
    {Layout::steps_first, 3, "a slice of [T,B,D]"},
    {Layout::batch_first, 1, "a slice of [B,T,D]"},
};

/// A strided array in memory of its own.
template <class T>
struct Array {
    Shape shape;
    index step_stride, batch_stride, offset;
    std::vector<T> memory;

    Array(const Shape& size, const Placement& placement) : shape(size), offset(placement.padding) {
        const index row = shape.width + placement.padding;
        const bool steps_first = placement.layout == Layout::steps_first;
        step_stride = steps_first ? shape.batch * row + placement.padding : row;
        batch_stride = steps_first ? row : shape.steps * row + placement.padding;
        memory.assign(
            std::size_t(offset + shape.steps * shape.batch * row + (shape.steps + shape.batch + 2) * placement.padding),
            stored<T>(std::numeric_limits<double>::quiet_NaN()));
    }
    T* data() { return memory.data() + offset; }
    T& operator()(index step, index sequence, index element) { return view()(step, sequence, element); }
    View<T> view() { return {data(), shape, step_stride, batch_stride}; }
    Jacobian<T> jacobian(index block) {
        return {data(), {shape.steps, shape.batch, shape.width / block}, block, step_stride, batch_stride};
    }
    template <class Function>
    void fill(Function function) {
        for (index step = 0; step < shape.steps; ++step)
            for (index sequence = 0; sequence < shape.batch; ++sequence)
                for (index element = 0; element < shape.width; ++element)
                    (*this)(step, sequence, element) = stored<T>(double(function(step, sequence, element)));
    }
    /// The elements without the gaps, in [steps,batch,width] order, as bits to compare.
    std::vector<T> elements() {
        std::vector<T> result;
        for (index step = 0; step < shape.steps; ++step)
            for (index sequence = 0; sequence < shape.batch; ++sequence)
                result.insert(result.end(), view().at(step, sequence), view().at(step, sequence) + shape.width);
        return result;
    }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Size3 {
    Shape shape;
    index block;
};

/// A random system whose states remember some hundred steps and do not grow: each block is a signed permutation,
/// slightly shrunk, plus a little of everything.
template <class T>
struct Problem {
    Shape shape;
    index block;
    Array<T> subdiagonal, right_side, initial;
    bool with_initial = true;

    Problem(const Shape& size, index block_size, const Placement& placement, unsigned seed)
        : shape(size),
          block(block_size),
          subdiagonal({size.steps, size.batch, size.width * block_size}, placement),
          right_side(size, placement),
          initial({1, size.batch, size.width}, placement) {
        std::mt19937 random(seed);
        std::normal_distribution<double> normal;
        std::uniform_real_distribution<double> uniform;
        right_side.fill([&](index, index, index) { return normal(random); });
        initial.fill([&](index, index, index) { return normal(random); });
        std::vector<index> order(static_cast<std::size_t>(block));
        subdiagonal.fill([&](index, index, index element) {
            const index row = element / block % block, column = element % block;
            if (row == 0 && column == 0) {
                std::iota(order.begin(), order.end(), index(0));
                std::shuffle(order.begin(), order.end(), random);
            }
            const double noise = 0.004 * uniform(random) / double(block);
            return (order[std::size_t(row)] == column ? 0.996 - 0.004 * uniform(random) - noise : noise) *
                   (random() % 2 ? 1 : -1);
        });
    }

    BidiagonalSystem<T> system() {
        return {subdiagonal.jacobian(block), right_side.view(), with_initial ? initial.view() : View<T>()};
    }
};

/// Substitution in long double: the solution x, and the bound |x_t| <= |A_t| |x_{t-1}| + |b_t| that errors scale with.
template <class T>
struct Exact {
    Shape shape;
    std::vector<long double> values, bounds;

    Exact(Problem<T>& problem, bool transposed) : shape(problem.shape) {
        values.resize(std::size_t(shape.count()));
        bounds.resize(values.size());
        const index steps = shape.steps, block = problem.block;
        for (index i = 0; i < steps; ++i) {
            const index step = transposed ? steps - 1 - i : i, before = transposed ? step + 1 : step - 1;
            for (index sequence = 0; sequence < shape.batch; ++sequence)
                for (index row = 0; row < shape.width; ++row) {
                    long double value = number(problem.right_side(step, sequence, row)), bound = std::abs(value);
                    for (index column = 0; column < block; ++column) {
                        const index other = row / block * block + column;
                        long double factor = 0, state = 0, state_bound = 0;
                        if (i > 0) {
                            state = values[at(before, sequence, other)];
                            state_bound = bounds[at(before, sequence, other)];
                        } else if (!transposed && problem.with_initial) {
                            state = number(problem.initial(0, sequence, other));
                            state_bound = std::abs(state);
                        } else {
                            continue;
                        }
                        factor =
                            number(transposed ? problem.subdiagonal(step + 1, sequence, other * block + row % block)
                                              : problem.subdiagonal(step, sequence, row * block + column));
                        value += factor * state;
                        bound += std::abs(factor) * state_bound;
                    }
                    values[at(step, sequence, row)] = value;
                    bounds[at(step, sequence, row)] = bound;
                }
        }
    }
    std::size_t at(index step, index sequence, index element) const {
        return std::size_t((step * shape.batch + sequence) * shape.width + element);
    }
};

/// The one tolerance: rounding errors of `steps` dependent steps of `block` terms each add up like a random walk, in
/// units of the bound that the exact solution has.
template <class T>
double tolerance(index steps, index block, double bound) {
    return 8 * double(std::numeric_limits<Arithmetic<T>>::epsilon()) * std::sqrt(double(steps)) *
           std::sqrt(double(block + 1)) * bound;
}

/// What storing `value` may change in it: nothing where it is stored as it was computed.
template <class T>
double rounding(double value) {
    if constexpr (std::is_same_v<T, bfloat16>) return std::abs(value) / 256;
    if constexpr (std::is_same_v<T, float16>) return std::abs(value) / 2048 + 0x1p-25;
    return 0;
}

/// `more`: errors besides those of Arithmetic<T>, in units of the bound.
template <class T>
void expect_solution(Array<T>& solution, const Exact<T>& exact, index block, double more = 0) {
    const Shape& shape = solution.shape;
    for (index step = 0; step < shape.steps; ++step)
        for (index sequence = 0; sequence < shape.batch; ++sequence)
            for (index element = 0; element < shape.width; ++element) {
                const std::size_t at = exact.at(step, sequence, element);
                const double error =
                    double(std::abs((long double)(number(solution(step, sequence, element))) - exact.values[at]));
                const double bound = double(exact.bounds[at]);
                const double allowed =
                    tolerance<T>(shape.steps, block, bound) + more * bound + rounding<T>(double(exact.values[at]));
                ASSERT_TRUE(error <= allowed)  // fails for NaN
                    << "step " << step << " sequence " << sequence << " element " << element << ": "
                    << number(solution(step, sequence, element)) << " instead of " << double(exact.values[at])
                    << ", error " << error << " > " << allowed;
            }
}

template <class T>
void solve_either(const BidiagonalSystem<T>& system, View<T> solution, const SolveOptions& options, bool transposed) {
    solve_anywhere(system, solution, options, transposed);
}

std::string describe(const Shape& shape, index block, const Placement& placement, const SolveOptions& options,
                     bool transposed) {
    return to_string(shape) + " block " + std::to_string(block) + " as " + placement.description + ", " +
           name(options.execution.backend) + " " + name(options.method) + (transposed ? " transposed" : "") +
           " chunk " + std::to_string(options.chunk) + " threads " + std::to_string(options.execution.threads);
}

/// Solves one problem in one way, and compares with the exact solution; the gaps of the output must stay as they are.
template <class T>
void expect_solved(Problem<T>& problem, const Exact<T>& exact, const Placement& placement, const SolveOptions& options,
                   bool transposed) {
    SCOPED_TRACE(describe(problem.shape, problem.block, placement, options, transposed));
    Array<T> solution(problem.shape, placement);
    const T untouched = stored<T>(12345);
    std::fill(solution.memory.begin(), solution.memory.end(), untouched);
    solve_either(problem.system(), solution.view(), options, transposed);
    expect_solution(solution, exact, problem.block);
    const index outside = std::count_if(solution.memory.begin(), solution.memory.end(),
                                        [&](T value) { return number(value) == number(untouched); });
    EXPECT_EQ(outside, index(solution.memory.size()) - problem.shape.count()) << "wrote between the elements";
}

template <class T>
class Bidiagonal : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Bidiagonal, Types);

template <class T>
class BidiagonalOf16Bits : public OnGpuTest {};
using TypesOf16Bits = testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(BidiagonalOf16Bits, TypesOf16Bits);

constexpr Size step_counts[] = {
    {1, "only the first step"},
    {2, "one substitution, one reduction step"},
    {3, "not a power of two"},
    {7, "one below a vector of doubles"},
    {8, "a power of two, a vector of doubles"},
    {17, "one above a vector of floats, and prime"},
    {37, "prime; several chunks"},
    {64, "a power of two"},
};

struct Blocks {
    index batch, width, block;
    const char* reason;
};
constexpr Blocks block_shapes[] = {
    {1, 1, 1, "a single scalar series"},
    {1, 2, 1, "two channels in a vector"},
    {3, 5, 1, "an odd number of channels"},
    {1, 15, 1, "one channel less than a vector of floats"},
    {2, 16, 1, "vectors of channels"},
    {1, 67, 1, "vectors of channels and a rest"},
    {5, 2, 2, "the smallest dense block"},
    {2, 3, 3, "an odd block"},
    {3, 4, 4, "a quarter of a vector of floats"},
    {2, 6, 3, "two blocks a step"},
    {9, 4, 2, "vectors of the smallest blocks and a rest"},
    {7, 8, 4, "vectors of blocks and a rest"},
    {3, 24, 8, "two blocks to a vector of floats, and a rest"},
    {1, 8, 8, "a vector of doubles"},
    {2, 12, 4, "three blocks a step"},
    {1, 16, 16, "a vector of floats"},
    {2, 17, 17, "a vector and one more"},
    {1, 37, 37, "vectors and a rest"},
};

/// Numbers of 16 bits are computed with on GPUs only.
template <class T>
std::vector<Backend> backends_of() {
    std::vector<Backend> all = backends;
    if (is_stored_in_16_bits<T>) std::erase_if(all, [](Backend backend) { return backend != Backend::cuda; });
    return all;
}

template <class T>
void every_method_solves_every_size() {
    for (const Size& steps : step_counts)
        for (const Blocks& size : block_shapes)
            for (const Placement& placement : {placements[0], placements[3]}) {
                const Shape shape{steps.value, size.batch, size.width};
                Problem<T> problem(shape, size.block, placement, unsigned(steps.value * 100 + size.width));
                for (const bool transposed : directions) {
                    const Exact<T> exact(problem, transposed);
                    for (const Backend backend : backends_of<T>())
                        for (const Reduction method : methods) {
                            SCOPED_TRACE(std::string(steps.reason) + "; " + size.reason);
                            const SolveOptions options{.method = method, .execution = {backend, 2}};
                            expect_solved(problem, exact, placement, options, transposed);
                            if (testing::Test::HasFatalFailure()) return;
                        }
                }
            }
}
TYPED_TEST(Bidiagonal, EveryMethodSolvesEverySize) { every_method_solves_every_size<TypeParam>(); }
TYPED_TEST(BidiagonalOf16Bits, EveryMethodSolvesEverySize) { every_method_solves_every_size<TypeParam>(); }

/// 43 rows are the most that share a tile, and leave it fewer chunks than a block has rows; several tiles, and one.
TYPED_TEST(BidiagonalOf16Bits, FewChunksOfManyRows) {
    using T = TypeParam;
    for (const index steps : {300, 8}) {
        Problem<T> problem({steps, 1, 3 * 43}, 3, placements[0], 7);
        for (const bool transposed : directions)
            expect_solved(problem, Exact<T>(problem, transposed), placements[0],
                          {.method = Reduction::scan, .execution = {Backend::cuda, 1}}, transposed);
    }
}

TYPED_TEST(Bidiagonal, RandomShapesChunksAndThreads) {
    using T = TypeParam;
    const auto draw = [](index low, index high) { return *rc::gen::inRange<index>(low, high + 1); };
    EXPECT_TRUE(rc::check([&] {
        const index block = draw(0, 1) ? 1 : draw(1, 20);
        const Shape shape{draw(1, 150), draw(1, 4), block * draw(1, block == 1 ? 90 : 3)};
        const Placement& placement = placements[draw(0, 3)];
        Problem<T> problem(shape, block, placement, unsigned(draw(1, 1000)));
        problem.with_initial = draw(0, 1);
        const bool transposed = draw(0, 1);
        const Exact<T> exact(problem, transposed);
        for (const Backend backend : backends) {
            const SolveOptions options{.method = methods[draw(0, 3)],
                                       .execution = {backend, int(draw(1, 5))},
                                       .chunk = draw(0, 1) ? 0 : draw(1, shape.steps + 3)};
            testing::TestPartResultArray failures;  // not of this test: rapidcheck goes on to a smaller example
            {
                using Reporter = testing::ScopedFakeTestPartResultReporter;
                const Reporter reporter(Reporter::INTERCEPT_ONLY_CURRENT_THREAD, &failures);
                expect_solved(problem, exact, placement, options, transposed);
            }
            if (failures.size() > 0)
                RC_FAIL(describe(shape, block, placement, options, transposed) + ": " +
                        failures.GetTestPartResult(0).message());
        }
    }));
}

TYPED_TEST(Bidiagonal, ChunksOfEverySizeAroundTheSteps) {
    using T = TypeParam;
    const Size chunks[] = {{1, "every step its own chunk"},
                           {2, "the smallest chunk that composes"},
                           {29, "steps - 1"},
                           {30, "one chunk"},
                           {31, "steps + 1"},
                           {15, "divides the steps"},
                           {7, "leaves a rest"}};
    for (const Blocks& size : {Blocks{1, 1, 1, ""}, Blocks{2, 20, 1, ""}, Blocks{2, 5, 5, ""}}) {
        Problem<T> problem({30, size.batch, size.width}, size.block, placements[0], 5);
        for (const bool transposed : directions) {
            const Exact<T> exact(problem, transposed);
            for (const Size& chunk : chunks)
                for (const Backend backend : backends) {
                    SCOPED_TRACE(chunk.reason);
                    expect_solved(problem, exact, placements[0],
                                  {.method = Reduction::scan, .execution = {backend, 2}, .chunk = chunk.value},
                                  transposed);
                }
        }
    }
}

/// Long series run through many cache tiles on several threads; some outputs are large enough to bypass the caches.
TYPED_TEST(Bidiagonal, LongSeries) {
    using T = TypeParam;
    constexpr index past_caches = (index(17) << 20) / sizeof(T), many_tiles = 300'000;
    const struct {
        index elements, batch, width;
        Placement placement;
        const char* reason;
    } cases[] = {
        {past_caches, 1, 1, placements[0], "a single series"},
        {past_caches, 1, 17, placements[0], "a vector and one more"},
        {past_caches, 2, 1'025, placements[0], "many channels, rows not aligned"},
        {many_tiles, 1, 3, placements[0], "channels that do not fill a vector"},
        {many_tiles, 1, 64, placements[0], "a few vectors"},
        {many_tiles, 3, 2, placements[1], "series apart in memory"},
        {many_tiles, 2, 9, placements[2], "rows with gaps"},
    };
    for (const auto& [elements, batch, width, placement, reason] : cases) {
        SCOPED_TRACE(reason);
        const Shape shape{elements / (batch * width), batch, width};
        Array<T> subdiagonal(shape, placement), right_side(shape, placement), expected(shape, placement),
            solution(shape, placement);
        std::uint64_t bits = 1;
        const auto uniform = [&] { return double((bits = bits * 6364136223846793005u + 1) >> 11) * 0x1p-53; };
        subdiagonal.fill([&](index, index, index) { return 1 - 0.02 * uniform(); });
        right_side.fill([&](index, index, index) { return uniform() - 0.5; });
        const BidiagonalSystem<T> system{subdiagonal.jacobian(1), right_side.view()};
        for (const bool transposed : directions) {
            solve_either(system, expected.view(), {.execution = {Backend::reference, 1}}, transposed);
            for (const Reduction method : {Reduction::sequential, Reduction::scan}) {
                const SolveOptions options{.method = method, .execution = {Backend::cpu, 3}};
                SCOPED_TRACE(describe(shape, 1, placement, options, transposed));
                std::fill(solution.memory.begin(), solution.memory.end(), T(0));
                solve_either(system, solution.view(), options, transposed);
                T error = 0, bound = 0;
                for (index step = 0; step < shape.steps; ++step)
                    for (index sequence = 0; sequence < batch; ++sequence) {
                        const T* now = solution.view().at(step, sequence);
                        const T* exact = expected.view().at(step, sequence);
                        for (index element = 0; element < width; ++element) {
                            const T difference = std::abs(now[element] - exact[element]);
                            error = difference <= error ? error : difference;  // keeps NaN
                            bound = std::max(bound, std::abs(exact[element]));
                        }
                    }
                // A state remembers about 100 steps.
                EXPECT_TRUE(double(error) <= 4 * tolerance<T>(100, 1, double(bound))) << error << " of " << bound;
            }
        }
    }
}

TYPED_TEST(Bidiagonal, NothingToSolveIsNoError) {
    using T = TypeParam;
    for (const Shape& shape : {Shape{0, 2, 3}, Shape{4, 0, 3}, Shape{4, 2, 0}, Shape{0, 0, 0}})
        for (const Backend backend : backends)
            for (const Reduction method : methods) {
                Buffer<T> subdiagonal(shape), right_side(shape), solution(shape);
                const BidiagonalSystem<T> system{Jacobian<const T>(subdiagonal.data(), shape, 1), right_side.view()};
                EXPECT_NO_THROW(solve(system, solution.view(), {.method = method, .execution = {backend, 2}}));
                EXPECT_NO_THROW(solve_transposed(system, solution.view(), {.method = method, .execution = {backend}}));
            }
}

/// Runs body(options, transposed) for every backend, method and direction.
template <class T = float, class Body>
void for_every_method(const Body& body) {
    for (const Backend backend : backends_of<T>())
        for (const Reduction method : methods)
            for (const bool transposed : directions) {
                const SolveOptions options{.method = method, .execution = {backend, 3}};
                SCOPED_TRACE(name(backend) + " " + name(method) + (transposed ? " transposed" : ""));
                body(options, transposed);
            }
}

const Size3 several[] = {{{41, 1, 1}, 1}, {{41, 3, 6}, 1}, {{23, 2, 40}, 1}, {{19, 3, 4}, 4}, {{13, 2, 10}, 5}};

TYPED_TEST(Bidiagonal, ZeroJacobianMakesTheSolveTheIdentity) {
    using T = TypeParam;
    for (const auto& [shape, block] : several)
        for_every_method([&, &shape = shape, &block = block](const SolveOptions& options, bool transposed) {
            Problem<T> problem(shape, block, placements[0], 1);
            problem.subdiagonal.fill([](index, index, index) { return 0; });
            Array<T> solution(shape, placements[0]);
            solve_either(problem.system(), solution.view(), options, transposed);
            EXPECT_EQ(solution.elements(), problem.right_side.elements());
        });
}

TYPED_TEST(Bidiagonal, SplitSequenceEqualsTheWhole) {
    using T = TypeParam;
    for (const auto& [shape, block] : several)
        for_every_method([&, &shape = shape, &block = block](const SolveOptions& options, bool transposed) {
            if (transposed) return;
            Problem<T> problem(shape, block, placements[0], 2);
            const Exact<T> exact(problem, false);
            Array<T> solution(shape, placements[0]);
            const auto [subdiagonal, right_side, initial] = problem.system();
            const index cut = shape.steps / 3;
            solve_either<T>({subdiagonal.steps(0, cut), right_side.steps(0, cut), initial},
                            solution.view().steps(0, cut), options, false);
            solve_either<T>({subdiagonal.steps(cut, shape.steps), right_side.steps(cut, shape.steps),
                             solution.view().steps(cut - 1, cut)},
                            solution.view().steps(cut, shape.steps), options, false);
            expect_solution(solution, exact, block);
        });
}

TYPED_TEST(Bidiagonal, FirstBlockPlaysNoPartWithoutAnInitialState) {
    using T = TypeParam;
    for (const auto& [shape, block] : several)
        for_every_method([&, &shape = shape, &block = block](const SolveOptions& options, bool transposed) {
            Problem<T> problem(shape, block, placements[0], 3);
            problem.with_initial = transposed;  // the transposed solve ignores it
            std::vector<T> before;
            for (const T first :
                 {T(0), T(1e30), std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()}) {
                std::fill_n(problem.subdiagonal.data(), shape.batch * shape.width * block, first);
                Array<T> solution(shape, placements[0]);
                solve_either(problem.system(), solution.view(), options, transposed);
                if (before.empty()) before = solution.elements();
                EXPECT_TRUE(same_bits(before, solution.elements())) << "A_1 = " << first;
            }
            EXPECT_TRUE(std::all_of(before.begin(), before.end(), [](T x) { return std::isfinite(x); }));
        });
}

template <class T>
void in_place_gives_the_same_bits() {
    for (const auto& [shape, block] : several)
        for (const Placement& placement : placements)
            for_every_method<T>([&, &shape = shape, &block = block](const SolveOptions& options, bool transposed) {
                Problem<T> problem(shape, block, placement, 4);
                Array<T> solution(shape, placement);
                solve_either(problem.system(), solution.view(), options, transposed);
                solve_either(problem.system(), problem.right_side.view(), options, transposed);
                EXPECT_TRUE(same_bits(solution.elements(), problem.right_side.elements()));
            });
}
TYPED_TEST(Bidiagonal, InPlaceGivesTheSameBits) { in_place_gives_the_same_bits<TypeParam>(); }
TYPED_TEST(BidiagonalOf16Bits, InPlaceGivesTheSameBits) { in_place_gives_the_same_bits<TypeParam>(); }

/// <y, L x> = <L^T y, x>, where L is the bidiagonal matrix: with x = L^-1 b and y = L^-T c this is <c, x> = <y, b>.
TYPED_TEST(Bidiagonal, TransposedIsTheAdjoint) {
    using T = TypeParam;
    for (const auto& [shape, block] : several)
        for (const Backend backend : backends)
            for (const Reduction method : methods) {
                Problem<T> problem(shape, block, placements[1], 5), other(shape, block, placements[1], 6);
                problem.with_initial = false;
                const SolveOptions options{.method = method, .execution = {backend, 2}};
                Array<T> x(shape, placements[1]), y(shape, placements[1]);
                solve_either(problem.system(), x.view(), options, false);
                solve_either<T>({problem.subdiagonal.jacobian(block), other.right_side.view()}, y.view(), options,
                                true);
                const auto dot = [](std::vector<T> a, std::vector<T> b) {
                    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0L);
                };
                const auto c = other.right_side.elements(), b = problem.right_side.elements();
                const double norm = double(std::sqrt(dot(c, c) * dot(x.elements(), x.elements())));
                EXPECT_NEAR(double(dot(c, x.elements())), double(dot(y.elements(), b)),
                            tolerance<T>(shape.steps, block, norm));
            }
}

template <class T>
void multiply_transposed_is_the_gradient_of_the_initial_state() {
    for (const Blocks& size : block_shapes)
        for (const Placement& placement : placements)
            for (const Backend backend : backends_of<T>()) {
                const Shape shape{1, size.batch, size.width};
                Problem<T> problem(shape, size.block, placement, 7);
                Array<T> product(shape, placement);
                multiply_transposed_anywhere<T>(problem.subdiagonal.jacobian(size.block), problem.right_side.view(),
                                                product.view(), {backend, 2});
                for (index sequence = 0; sequence < size.batch; ++sequence)
                    for (index column = 0; column < size.width; ++column) {
                        const index base = column / size.block * size.block;
                        long double sum = 0, bound = 0;
                        for (index row = base; row < base + size.block; ++row) {
                            const long double term =
                                (long double)(number(problem.right_side(0, sequence, row))) *
                                number(problem.subdiagonal(0, sequence, row * size.block + column - base));
                            sum += term;
                            bound += std::abs(term);
                        }
                        EXPECT_NEAR(double(number(product(0, sequence, column))), double(sum),
                                    tolerance<T>(1, size.block, double(bound)) + rounding<T>(double(sum)))
                            << size.reason << ", " << placement.description;
                    }
            }
}
TYPED_TEST(Bidiagonal, MultiplyTransposedIsTheGradientOfTheInitialState) {
    multiply_transposed_is_the_gradient_of_the_initial_state<TypeParam>();
}
TYPED_TEST(BidiagonalOf16Bits, MultiplyTransposedIsTheGradientOfTheInitialState) {
    multiply_transposed_is_the_gradient_of_the_initial_state<TypeParam>();
}

/// On the cpu backend, with enough to do for all threads; the reference has one thread and nothing to vary.
TYPED_TEST(Bidiagonal, TheSameBitsEveryTimeAndForEveryThreadCountAsDocumented) {
    using T = TypeParam;
    const Size3 cases[] = {
        {{164'001, 1, 1}, 1}, {{16'411, 2, 5}, 1}, {{1'103, 3, 50}, 1}, {{5'201, 2, 4}, 4}, {{521, 2, 18}, 9}};
    for (const auto& [shape, block] : cases) {
        Problem<T> problem(shape, block, placements[1], 8);
        for_every_method([&, &shape = shape](SolveOptions options, bool transposed) {
            if (options.execution.backend != Backend::cpu) return;
            const auto run = [&](int threads, index chunk) {
                options.execution.threads = threads;
                options.chunk = chunk;
                Array<T> solution(shape, placements[1]);
                solve_either(problem.system(), solution.view(), options, transposed);
                return solution.elements();
            };
            const index chunk = options.method == Reduction::scan ? 37 : 0;
            const auto alone = run(1, chunk);
            for (const int threads : {2, 5}) {
                EXPECT_TRUE(same_bits(run(threads, 0), run(threads, 0))) << threads << " threads, again";
                if (options.method == Reduction::automatic) continue;
                EXPECT_TRUE(same_bits(alone, run(threads, chunk))) << threads << " threads";
            }
        });
    }
}

/// Many tiles, which look back on each other in an order that differs from run to run.
template <class T>
void the_same_bits_whatever_the_order_of_blocks() {
    if (std::find(backends.begin(), backends.end(), Backend::cuda) == backends.end()) GTEST_SKIP() << cuda_problem();
    const struct {
        Size3 size;
        Placement placement;
        const char* reason;
    } cases[] = {{{{40'003, 1, 1}, 1}, placements[0], "a single series"},
                 {{{12'007, 2, 1}, 1}, placements[1], "series apart in memory"},
                 {{{2'051, 2, 5}, 1}, placements[0], "ten channels side by side"},
                 {{{1'511, 3, 45}, 1}, placements[3], "more channels than a tile has room for, and a rest"},
                 {{{611, 2, 34}, 2}, placements[0], "17 blocks in a sequence"},
                 {{{301, 1, 12}, 4}, placements[0], "blocks of 4"},
                 {{{131, 2, 18}, 9}, placements[0], "blocks whose products are in registers"},
                 {{{67, 1, 24}, 24}, placements[3], "the largest of them, rows not aligned"},
                 {{{53, 2, 40}, 40}, placements[0], "blocks whose products are in shared memory"},
                 {{{51, 1, 67}, 67}, placements[3], "a second panel, with a rest"}};
    for (const auto& [size, placement, reason] : cases) {
        Problem<T> problem(size.shape, size.block, placement, 8);
        for (const bool transposed : directions) {
            const SolveOptions options{.method = Reduction::scan, .execution = {.backend = Backend::cuda}};
            SCOPED_TRACE(describe(size.shape, size.block, placement, options, transposed) + ": " + reason);
            const Exact<T> exact(problem, transposed);
            Array<T> first(size.shape, placement), second(size.shape, placement);
            solve_either(problem.system(), first.view(), options, transposed);
            expect_solution(first, exact, size.block);
            solve_either(problem.system(), second.view(), options, transposed);
            EXPECT_TRUE(same_bits(first.elements(), second.elements()));
        }
    }
}
TYPED_TEST(Bidiagonal, TheSameBitsWhateverTheOrderOfBlocksOnAGpu) {
    the_same_bits_whatever_the_order_of_blocks<TypeParam>();
}
TYPED_TEST(BidiagonalOf16Bits, TheSameBitsWhateverTheOrderOfBlocksOnAGpu) {
    the_same_bits_whatever_the_order_of_blocks<TypeParam>();
}

constexpr TensorCores kinds_of_tensor_cores[] = {TensorCores::none, TensorCores::split, TensorCores::tf32};

/// Blocks whose products are carried in tensor cores where that is asked for: `split` is as near as plain arithmetic,
/// and `tf32` as the rounding of each product's two factors to 11 bits allows, 2^-11 of each.
template <class T>
void tensor_cores_solve() {
    if (std::find(backends.begin(), backends.end(), Backend::cuda) == backends.end()) GTEST_SKIP() << cuda_problem();
    const struct {
        index steps, chunk;
        Blocks blocks;
        bool forward, transposed;
    } cases[] = {{13, 4, {2, 33, 33, "a rest of one column, a panel of double and one more"}, true, true},
                 {11, 5, {1, 48, 48, "rows that are whole pieces, and a rest of a tile's"}, true, true},
                 {11, 5, {1, 64, 64, "the smallest of the kernels, full"}, true, true},
                 {7, 3, {1, 96, 96, "a panel and a half of float"}, true, false},
                 {7, 3, {1, 128, 128, "the second of the kernels, full"}, false, true},
                 {5, 2, {1, 130, 130, "the largest of the kernels, mostly empty"}, true, false},
                 {5, 2, {1, 256, 256, "full"}, false, true}};
    for (const auto& [steps, chunk, blocks, forward, backward] : cases)
        for (const bool transposed : directions) {
            if (!(transposed ? backward : forward)) continue;
            const Shape shape{steps, blocks.batch, blocks.width};
            const Placement& placement = placements[blocks.block % 2 == 0 ? 0 : 3];
            Problem<T> problem(shape, blocks.block, placement, unsigned(blocks.block));
            const Exact<T> exact(problem, transposed);
            std::vector<std::vector<T>> found;
            for (const TensorCores kind : kinds_of_tensor_cores) {
                const SolveOptions options{.method = Reduction::scan,
                                           .execution = {.backend = Backend::cuda},
                                           .chunk = chunk,
                                           .tensor_cores = kind};
                SCOPED_TRACE(describe(shape, blocks.block, placement, options, transposed) + ", tensor cores " +
                             std::to_string(int(kind)) + ": " + blocks.reason);
                Array<T> solution(shape, placement);
                solve_either(problem.system(), solution.view(), options, transposed);
                const bool rounded = kind == TensorCores::tf32 && !std::is_same_v<T, double>;
                expect_solution(solution, exact, blocks.block, rounded ? 2 * 0x1p-11 * double(steps) : 0);
                found.push_back(solution.elements());
            }
            if constexpr (std::is_same_v<T, float>) {
                EXPECT_FALSE(same_bits(found[0], found[1])) << blocks.block << ": no split products";
                EXPECT_FALSE(same_bits(found[0], found[2])) << blocks.block << ": no products of TF32";
            }
            if (testing::Test::HasFatalFailure()) return;
        }
}
TYPED_TEST(Bidiagonal, TensorCoresSolveOnAGpu) { tensor_cores_solve<TypeParam>(); }
TYPED_TEST(BidiagonalOf16Bits, TensorCoresSolveOnAGpu) { tensor_cores_solve<TypeParam>(); }

TYPED_TEST(Bidiagonal, ProcessorsHaveNoTensorCores) {
    using T = TypeParam;
    const Shape shape{30, 1, 34};
    Problem<T> problem(shape, 34, placements[0], 13);
    for (const Backend backend : {Backend::reference, Backend::cpu}) {
        SolveOptions options{.method = Reduction::scan, .execution = {backend, 1}, .chunk = 7};
        Array<T> plain(shape, placements[0]), asked(shape, placements[0]);
        solve_either(problem.system(), plain.view(), options, false);
        options.tensor_cores = TensorCores::tf32;
        solve_either(problem.system(), asked.view(), options, false);
        EXPECT_TRUE(same_bits(plain.elements(), asked.elements())) << name(backend);
    }
}

/// In tensor cores infinity may become NaN, but nothing that is neither: the same states are finite.
template <class T>
void tensor_cores_keep_what_is_not_finite() {
    if (std::find(backends.begin(), backends.end(), Backend::cuda) == backends.end()) GTEST_SKIP() << cuda_problem();
    for (const auto& [block, transposed] : {std::pair(index(40), false), std::pair(index(70), true)})
        for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
            const Shape shape{9, 1, block};
            Problem<T> problem(shape, block, placements[0], 12);
            problem.subdiagonal(5, 0, 3 * block + 8) = stored<T>(bad);
            problem.subdiagonal(6, 0, 7 * block + 2) = stored<T>(bad);
            std::vector<std::vector<bool>> finite;
            for (const TensorCores kind : kinds_of_tensor_cores) {
                Array<T> solution(shape, placements[0]);
                solve_either(problem.system(), solution.view(),
                             {.method = Reduction::scan,
                              .execution = {.backend = Backend::cuda},
                              .chunk = 4,
                              .tensor_cores = kind},
                             transposed);
                finite.emplace_back();
                for (const T value : solution.elements()) finite.back().push_back(std::isfinite(number(value)));
            }
            EXPECT_NE(std::count(finite[0].begin(), finite[0].end(), false), 0);
            EXPECT_EQ(finite[1], finite[0]) << block << (transposed ? " transposed, " : ", ") << bad << " split";
            EXPECT_EQ(finite[2], finite[0]) << block << (transposed ? " transposed, " : ", ") << bad << " in TF32";
        }
}
TYPED_TEST(Bidiagonal, TensorCoresKeepWhatIsNotFiniteOnAGpu) { tensor_cores_keep_what_is_not_finite<TypeParam>(); }
TYPED_TEST(BidiagonalOf16Bits, TensorCoresKeepWhatIsNotFiniteOnAGpu) {
    tensor_cores_keep_what_is_not_finite<TypeParam>();
}

TYPED_TEST(Bidiagonal, NaNStaysInItsSequence) {
    using T = TypeParam;
    for (const auto& [shape, block] : {Size3{{41, 3, 1}, 1}, Size3{{41, 3, 6}, 1}, Size3{{19, 3, 5}, 5}})
        for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()})
            for (const Placement& placement : placements)
                for_every_method([&, &shape = shape, &block = block](const SolveOptions& options, bool transposed) {
                    Problem<T> problem(shape, block, placement, 9);
                    Array<T> clean(shape, placement), solution(shape, placement);
                    solve_either(problem.system(), clean.view(), options, transposed);
                    problem.subdiagonal(7, 1, 0) = bad;
                    problem.right_side(11, 1, 0) = bad;
                    problem.initial(0, 1, 0) = bad;
                    solve_either(problem.system(), solution.view(), options, transposed);
                    for (const index sequence : {0, 2})
                        for (index step = 0; step < shape.steps; ++step)
                            for (index element = 0; element < shape.width; ++element)
                                ASSERT_EQ(solution(step, sequence, element), clean(step, sequence, element))
                                    << "step " << step << " sequence " << sequence;
                    EXPECT_FALSE(std::isfinite(solution(11, 1, 0)));
                });
}

// Of positive numbers an infinite one makes others infinite, and none NaN, which 0, where kernels fill up blocks,
// would.
TYPED_TEST(Bidiagonal, AnInfiniteNumberIsNotMultipliedByWhatFillsUpBlocks) {
    using T = TypeParam;
    constexpr index steps = 9, bad = 5, row = 3, column = 5;
    for (const index block : {6, 12, 20, 50, 70})
        for (const Backend backend : backends)
            for (const Reduction method : {Reduction::sequential, Reduction::scan})
                for (const bool transposed : {false, true}) {
                    const Shape shape{steps, 1, block};
                    Buffer<T> factors({steps, 1, block * block}), right_side(shape), solution(shape);
                    std::fill_n(factors.data(), factors.size(), T(0.5) / T(block));
                    std::fill_n(right_side.data(), right_side.size(), T(1));
                    factors(bad, 0, row * block + column) = std::numeric_limits<T>::infinity();
                    const SolveOptions options{.method = method, .execution = {backend}, .chunk = 4};
                    SCOPED_TRACE(describe(shape, block, placements[0], options, transposed));
                    solve_either<T>({Jacobian<const T>(factors.data(), shape, block), right_side}, solution.view(),
                                    options, transposed);
                    for (index t = 0; t < steps; ++t)
                        for (index k = 0; k < block; ++k) {
                            const index after = transposed ? bad - 1 - t : t - bad;
                            const bool infinite = after > 0 || (after == 0 && k == (transposed ? column : row));
                            ASSERT_EQ(std::isinf(solution(t, 0, k)), infinite) << t << ", " << k;
                            ASSERT_FALSE(std::isnan(solution(t, 0, k))) << t << ", " << k;
                        }
                }
}

TYPED_TEST(Bidiagonal, AWorkspaceIsReused) {
    using T = TypeParam;
    Problem<T> problem({2'000, 2, 6}, 3, placements[0], 10);  // steps of several tiles on a GPU
    Array<T> solution(problem.shape, placements[0]);
    for (const Backend backend : backends)
        for (const Reduction method : {Reduction::pcr, Reduction::scan}) {
            Workspace workspace(backend == Backend::cuda ? Device::cuda() : Device::host());
            const SolveOptions options{
                .method = method, .execution = {backend, 2}, .chunk = 10, .workspace = &workspace};
            solve_either(problem.system(), solution.view(), options, false);
            const index peak = workspace.peak_bytes();
            EXPECT_GT(peak, 0);
            EXPECT_EQ(workspace.used_bytes(), 0);
            solve_either(problem.system(), solution.view(), options, false);
            EXPECT_EQ(workspace.peak_bytes(), peak);
        }
}

TYPED_TEST(Bidiagonal, ASharedJacobianMayBeBroadcast) {
    using T = TypeParam;
    const Shape shape{20, 3, 4};
    Problem<T> problem(shape, 4, placements[0], 11);
    for (index step = 0; step < shape.steps; ++step)
        for (index sequence = 1; sequence < shape.batch; ++sequence)
            std::copy_n(&problem.subdiagonal(step, 0, 0), 16, &problem.subdiagonal(step, sequence, 0));
    const Jacobian<const T> shared(problem.subdiagonal.data(), shape, 4, problem.subdiagonal.step_stride, 0);
    for_every_method([&](const SolveOptions& options, bool transposed) {
        Array<T> expected(shape, placements[0]), solution(shape, placements[0]);
        solve_either(problem.system(), expected.view(), options, transposed);
        solve_either<T>({shared, problem.right_side.view(), problem.initial.view()}, solution.view(), options,
                        transposed);
        const Exact<T> exact(problem, transposed);
        expect_solution(solution, exact, 4);
    });
}

TEST(BidiagonalErrors, NameTheArgumentTheExpectedAndTheActual) {
    const Shape shape{8, 2, 3};
    Buffer<float> blocks({8, 2, 9}), right_side(shape), solution(shape), initial({1, 2, 3});
    const Jacobian<const float> dense(blocks.data(), shape, 3);
    const auto solving = [&](const BidiagonalSystem<float>& system, View<float> x, SolveOptions options = {}) {
        const std::string forward = message_of([&] { solve(system, x, options); });
        EXPECT_EQ(forward, message_of([&] { solve_transposed(system, x, options); }));
        return forward;
    };
    const BidiagonalSystem<float> good{dense, right_side, initial};
    EXPECT_EQ(solving(good, solution), nothing_thrown);

    EXPECT_EQ(solving({dense, right_side.view().steps(0, 5)}, solution),
              "system.right_side: expected shape [8,2,3] to match system.subdiagonal, got shape [5,2,3]");
    EXPECT_EQ(solving(good, solution.view().sequences(0, 1)),
              "solution: expected shape [8,2,3] to match system.subdiagonal, got shape [8,1,3]");
    EXPECT_EQ(solving({dense, right_side, initial.view().sequences(0, 1)}, solution),
              "system.initial: expected shape [1,2,3] to match system.subdiagonal, got shape [1,1,3]");
    EXPECT_EQ(solving({Jacobian<const float>(blocks.data(), shape, 2), right_side}, solution),
              "system.subdiagonal: expected a block size that divides the width 3, got block 2");
    EXPECT_EQ(solving({Jacobian<const float>(blocks.data(), shape, 0), right_side}, solution),
              "system.subdiagonal: expected a block size that divides the width 3, got block 0");
    EXPECT_EQ(solving({Jacobian<const float>(nullptr, shape, 3), right_side}, solution),
              "system.subdiagonal: expected data, got a null pointer");
    EXPECT_EQ(solving({Jacobian<const float>(blocks.data(), {-1, 2, 3}, 3), right_side}, solution),
              "shape: expected sizes of 0 or more, got [-1,2,3]");
    EXPECT_EQ(solving(good, View<float>(solution.data(), shape, 2, 3)),
              "solution: expected strides that give every element a place of its own, got strides 2 (steps) and 3 "
              "(sequences) for width 3");
    EXPECT_EQ(solving(good, solution, {.chunk = -1}), "options.chunk: expected 0 or more, got -1");
    EXPECT_EQ(solving(good, solution, {.execution = {.threads = -2}}), "execution.threads: expected 0 or more, got -2");
    EXPECT_EQ(solving(good, solution, {.method = Reduction(17)}), "options.method: expected a Reduction, got 17");
    EXPECT_EQ(solving(good, solution, {.tensor_cores = TensorCores(9)}),
              "options.tensor_cores: expected one of TensorCores, got 9");
}

TEST(BidiagonalErrors, NumbersOf16BitsAreForGpus) {
    const Shape shape{2, 1, 1};
    Buffer<bfloat16> numbers(shape), solution(shape);
    const Jacobian<const bfloat16> diagonal(numbers.data(), shape, 1);
    const std::string refused =
        "execution.backend: expected Backend::cuda, which alone computes with numbers of 16 bits, got Backend::";
    for (const auto& [backend, actual] : {std::pair(Backend::reference, "reference"), std::pair(Backend::cpu, "cpu")}) {
        const Execution execution{.backend = backend};
        EXPECT_EQ(message_of([&] {
                      solve<bfloat16>({diagonal, numbers}, solution.view(), {.execution = execution});
                  }),
                  "options." + refused + actual);
        EXPECT_EQ(message_of([&] {
                      multiply_transposed<bfloat16>(diagonal.steps(0, 1), numbers.view().steps(0, 1),
                                                    solution.view().steps(0, 1), execution);
                  }),
                  refused + actual);
    }
}

TEST(BidiagonalErrors, OverlapIsRefusedAndInterleavingIsNot) {
    const Shape shape{8, 2, 3};
    Buffer<double> memory({10, 8, 3});
    Buffer<double> blocks({8, 2, 9}), apart(shape), initial({1, 2, 3});
    const View<double> whole = memory.view();
    const View<double> right_side = whole.steps(0, 8).sequences(0, 2);
    const Jacobian<const double> dense(blocks.data(), shape, 3);
    const BidiagonalSystem<double> system{dense, right_side, initial};
    const auto solving = [](const BidiagonalSystem<double>& s, View<double> x) {
        return message_of([&] { solve(s, x); });
    };
    const std::string with_right_side =
        "solution: expected memory apart from system.right_side (or to be the same view), got memory that overlaps it";
    EXPECT_EQ(solving(system, right_side), nothing_thrown) << "in place";
    EXPECT_EQ(solving(system, whole.steps(0, 8).sequences(2, 4)), nothing_thrown)
        << "other sequences of the same array";
    EXPECT_EQ(solving(system, whole.steps(0, 8).sequences(1, 3)), with_right_side);
    EXPECT_EQ(solving(system, whole.steps(1, 9).sequences(0, 2)), with_right_side);
    EXPECT_EQ(solving(system, View<double>(right_side.data() + 1, shape, 24, 3)), with_right_side);
    EXPECT_EQ(solving(system, View<double>(right_side.data(), shape, 24, 6)), with_right_side);
    EXPECT_EQ(solving({dense, apart}, View<double>(blocks.data() + 40, shape)),
              "solution: expected memory apart from system.subdiagonal, got memory that overlaps it");
    EXPECT_EQ(solving({dense, apart, View<double>(whole.data(), {1, 2, 3})}, right_side),
              "solution: expected memory apart from system.initial, got memory that overlaps it");

    Buffer<double> row({1, 2, 3}), product({1, 2, 3});
    const Jacobian<const double> one_step = dense.steps(0, 1);
    const auto multiplying = [&](View<const double> y, View<double> result) {
        return message_of([&] { multiply_transposed<double>(one_step, y, result); });
    };
    EXPECT_EQ(multiplying(row, product), nothing_thrown);
    EXPECT_EQ(multiplying(row, row), "product: expected memory apart from y, got memory that overlaps it");
    EXPECT_EQ(multiplying(row, product.view().sequences(0, 1)),
              "product: expected shape [1,2,3] to match subdiagonal, got shape [1,1,3]");
    EXPECT_EQ(message_of([&] { multiply_transposed<double>(dense, row, product.view()); }),
              "subdiagonal: expected one step, got [8,2,3]");
}

/// A solution of a hundredth of the memory that the machine has, in address space that is only reserved: PCR would
/// need more than all of it, and must say so before it touches anything.
TEST(BidiagonalErrors, PcrThatDoesNotFitIsRefusedWithTheByteCount) {
    const index width = 64;
    const index steps = available_memory() / 100 / (width * index(sizeof(float)));
    const std::size_t bytes = std::size_t(steps * width) * sizeof(float);
    void* reserved = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ASSERT_NE(reserved, MAP_FAILED);
    Buffer<float> block({1, width, width}), state({1, 1, width});
    const Shape shape{steps, 1, width};
    const BidiagonalSystem<float> system{Jacobian<const float>(block.data(), shape, width, 0, 0),
                                         View<const float>(state.data(), shape, 0, 0)};
    const View<float> solution(static_cast<float*>(reserved), shape);
    for (const Backend backend : {Backend::reference, Backend::cpu}) {
        const std::string refused = message_of<OutOfMemory>([&] {
            solve(system, solution, {.method = Reduction::pcr, .execution = {backend, 1}});
        });
        EXPECT_NE(refused.find(std::to_string(2 * steps * width * (width + 1) * index(sizeof(float)))),
                  std::string::npos)
            << refused;
    }
    munmap(reserved, bytes);
}

}  // namespace
}  // namespace deeppcr
