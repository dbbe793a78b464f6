// What the bidiagonal solvers take of a GPU, on emulated ones of several kinds: tiles small enough for spans of many,
// chunks enough for chunks of their ends, multiprocessors with little shared memory, blocks of threads in several
// orders.
#include <gtest/gtest.h>

#include <cuda_runtime.h>

#include <cmath>
#include <vector>

#include <deeppcr/bidiagonal.hpp>

namespace deeppcr {
namespace {

constexpr Device there = Device::cuda();

/// The emulated GPU as it was before, at the end of a test.
class EmulatedGpu : public testing::Test {
    emulation::Machine before_ = emulation::machine();
    void TearDown() override {
        emulation::machine().multiprocessors = before_.multiprocessors;
        emulation::machine().shared_bytes = before_.shared_bytes;
        emulation::machine().blocks_at_once = before_.blocks_at_once;
        emulation::machine().seed = before_.seed;
    }
};

template <class T>
struct Solved {
    Buffer<T> x;
    double error;  ///< the largest |x_t - A_t x_{t-1} - b_t|, as a share of the largest |x|
};

/// Solves a random contractive system on the emulated GPU.
template <class T>
Solved<T> solved(const Shape& shape, index block, bool transposed, Layout layout, const SolveOptions& options) {
    auto blocks = Buffer<T>::random({shape.steps, shape.batch, shape.width * block}, 1, layout);
    const auto right_side = Buffer<T>::random(shape, 2, layout),
               initial = Buffer<T>::random({1, shape.batch, shape.width}, 3);
    for (index i = 0; i < blocks.size(); ++i) blocks.data()[i] = std::sin(blocks.data()[i]) * T(0.9) / T(block);
    const auto there_blocks = blocks.on(there), there_right_side = right_side.on(there),
               there_initial = initial.on(there);
    auto there_x = Buffer<T>::uninitialised(shape, layout, there);
    const auto jacobian = [&](const Buffer<T>& from) { return Jacobian<const T>(from.data(), shape, block, layout); };
    const BidiagonalSystem<T> system{jacobian(there_blocks), there_right_side, there_initial};
    if (transposed)
        solve_transposed(system, there_x.view(), options);
    else
        solve(system, there_x.view(), options);
    Solved<T> result{there_x.on(Device::host()), 0};
    const auto a = jacobian(blocks);
    double largest = 0;
    for (index t = 0; t < shape.steps; ++t)
        for (index j = 0; j < shape.batch; ++j)
            for (index i = 0; i < shape.width; ++i) {
                double sum = right_side(t, j, i);
                const index first = i / block * block;
                for (index k = first; k < first + block; ++k) {
                    if (transposed)
                        sum += t + 1 < shape.steps ? double(a(t + 1, j, k, i)) * result.x(t + 1, j, k) : 0;
                    else
                        sum += double(a(t, j, i, k)) * (t > 0 ? result.x(t - 1, j, k) : initial(0, j, k));
                }
                const double apart = std::abs(sum - result.x(t, j, i));
                if (!(apart <= result.error)) result.error = apart;  // keeps NaN
                largest = std::max(largest, std::abs(double(result.x(t, j, i))));
            }
    result.error /= largest;
    return result;
}

template <class T>
bool same_bits(const Buffer<T>& a, const Buffer<T>& b) {
    return std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(T)) == 0;
}

/// Steps of several spans of tiles, or of several levels of chunks, in every order of the blocks of threads: a state is
/// found near, far, or not yet; the last of the chunks beside each other is another.
TEST_F(EmulatedGpu, SpansOfManyTilesAndLevelsOfChunksGiveTheSameBitsInEveryOrder) {
    emulation::machine().shared_bytes = std::size_t(64) << 10;  // small tiles
    const struct {
        Shape shape;
        index block;
        Layout layout;
        const char* what;
    } cases[] = {{{50'011, 1, 1}, 1, Layout::steps_first, "one series"},
                 {{4'001, 1, 9}, 1, Layout::steps_first, "a few, side by side"},
                 {{901, 1, 71}, 1, Layout::steps_first, "two groups"},
                 {{4'001, 3, 2}, 1, Layout::batch_first, "sequences apart"},
                 {{3'001, 1, 2}, 2, Layout::steps_first, "blocks of 2"},
                 {{1'301, 2, 3}, 3, Layout::batch_first, "blocks of 3"},
                 {{501, 1, 12}, 4, Layout::steps_first, "blocks of 4"},
                 {{1'001, 1, 4}, 4, Layout::steps_first, "a chunk of one row per thread, all bundles full"},
                 {{151, 1, 63}, 3, Layout::steps_first, "bundles and chunks left over"},
                 {{101, 1, 76}, 4, Layout::steps_first, "groups of rows of blocks of 4"},
                 {{3'301, 1, 5}, 5, Layout::steps_first, "blocks of 5"},
                 {{601, 2, 32}, 16, Layout::batch_first, "blocks of 16, two to a sequence"}};
    for (const auto& [shape, block, layout, what] : cases)
        for (const bool transposed : {false, true})
            for (const int multiprocessors : {1, 132}) {
                SCOPED_TRACE(std::string(what) + (transposed ? ", transposed, " : ", ") +
                             std::to_string(multiprocessors) + " multiprocessors");
                emulation::machine().multiprocessors = multiprocessors;
                const SolveOptions options{.method = Reduction::scan, .execution = {.backend = Backend::cuda}};
                Buffer<float> first;
                for (const auto& [blocks_at_once, seed] : {std::pair(2, 1U), std::pair(40, 2U)}) {
                    emulation::machine().blocks_at_once = blocks_at_once;
                    emulation::machine().seed = seed;
                    auto [x, error] = solved<float>(shape, block, transposed, layout, options);
                    EXPECT_TRUE(error <= 1e-6) << error;  // a few units of the last place; fails for NaN
                    EXPECT_TRUE(first.size() == 0 || same_bits(x, first));
                    first = std::move(x);
                }
            }
}

/// Every kernel fits a multiprocessor with as little shared memory as any since sm_80 has, 99 KiB.
TEST_F(EmulatedGpu, LittleSharedMemoryIsEnough) {
    emulation::machine().shared_bytes = std::size_t(99) << 10;
    for (const index block : {1, 2, 3, 4, 8, 16, 32, 64, 128, 130})
        for (const Reduction method : {Reduction::sequential, Reduction::scan}) {
            const SolveOptions options{.method = method, .execution = {.backend = Backend::cuda}, .chunk = 3};
            const Shape shape{11, 1, block};
            const auto single = solved<float>(shape, block, false, Layout::steps_first, options);
            const auto transposed = solved<double>(shape, block, true, Layout::steps_first, options);
            EXPECT_TRUE(single.error <= 1e-6) << block << ": " << single.error;
            EXPECT_TRUE(transposed.error <= 1e-14) << block << ": " << transposed.error;
        }
}

/// What a CUDA graph could capture: with a workspace that has been used before nothing is allocated.
TEST_F(EmulatedGpu, ALaterCallAllocatesNothing) {
    const Shape shape{700, 2, 12};  // steps of several tiles and chunks
    for (const index block : {1, 4, 12})
        for (const Reduction method : {Reduction::automatic, Reduction::sequential, Reduction::pcr, Reduction::scan}) {
            const Buffer<float> blocks({shape.steps, shape.batch, shape.width * block}, Layout::steps_first, there),
                right_side(shape, Layout::steps_first, there), x(shape, Layout::steps_first, there);
            Workspace workspace(there);
            const auto call = [&] {
                solve<float>({Jacobian<const float>(blocks.data(), shape, block), right_side}, x.view(),
                             {.method = method, .execution = {.backend = Backend::cuda}, .workspace = &workspace});
            };
            call();
            const long allocations = emulation::machine().allocations;
            call();
            EXPECT_EQ(emulation::machine().allocations, allocations) << block << ", method " << int(method);
        }
}

/// Rows that alone fill the multiprocessors are substituted, others scanned; blocks too.
TEST_F(EmulatedGpu, AutomaticGoesByTheShapeAndTheMultiprocessors) {
    emulation::machine().multiprocessors = 4;
    const auto chosen = [](const Shape& shape, index block) {
        const Buffer<float> blocks({shape.steps, shape.batch, shape.width * block}, Layout::steps_first, there),
            numbers(shape, Layout::steps_first, there), x(shape, Layout::steps_first, there);
        return solve<float>({Jacobian<const float>(blocks.data(), shape, block), numbers}, x.view(),
                            {.execution = {.backend = Backend::cuda}});
    };
    EXPECT_EQ(chosen({100, 1, 4096}, 1), Reduction::sequential);
    EXPECT_EQ(chosen({100, 1, 64}, 1), Reduction::scan);
    EXPECT_EQ(chosen({4, 1, 64}, 1), Reduction::sequential);
    EXPECT_EQ(chosen({2000, 1, 5}, 5), Reduction::scan);
    EXPECT_EQ(chosen({10, 1, 5}, 5), Reduction::sequential);
    EXPECT_EQ(chosen({20, 256, 16}, 16), Reduction::sequential);
}

}  // namespace
}  // namespace deeppcr
