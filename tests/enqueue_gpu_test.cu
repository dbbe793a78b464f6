// Cells on a GPU, or on an emulated one, without a wait: the same numbers as with one, what cannot be right said, and
// graphs.
#include <optional>

#include "tests/cells_on_gpu.hpp"
#include "tests/messages.hpp"
#include "tests/streams.cuh"

namespace deeppcr {
namespace {

const std::vector<Options> every_way{{.method = Method::sequential, .execution = gpu},
                                     {.method = Method::overlap, .chunk = 40, .execution = gpu},
                                     {.method = Method::shooting, .chunk = 40, .execution = gpu},
                                     {.method = Method::shooting, .execution = gpu}};

/// Wide enough for the tiles that the last of these takes.
Shape shape_for(const Options& way, const Shape& narrow) {
    return way.method == Method::shooting && way.chunk == 0 ? wide_enough(narrow) : narrow;
}
/// Backward, chunks that are chosen depend on whether somebody waits: their rounds are others.
bool has_the_same_gradients(const Options& way) { return way.method == Method::sequential || way.chunk > 0; }

/// What `enqueue` and `enqueue_adjoint` write, on the GPU.
template <class C, class T>
struct Enqueued {
    explicit Enqueued(const CellRecurrence<C, T>& cell, View<const T> output_gradient)
        : recurrence(cell),
          gradient(output_gradient),
          trajectory(cell.shape(), Layout::steps_first, Device::cuda()),
          inputs(cell.inputs().shape(), Layout::steps_first, Device::cuda()),
          initial({1, index(cell.parts().size()), cell.shape().width}, Layout::steps_first, Device::cuda()),
          parameters(cell.parameters().shape(), Layout::steps_first, Device::cuda()),
          memory(detail::allocate(index(sizeof(index)), Device::cuda())) {}

    index* status() const { return static_cast<index*>(memory.get()); }
    void forward(const Options& options) const { enqueue(recurrence, trajectory.view(), status(), options); }
    void backward(const Options& options) const {
        enqueue_adjoint(recurrence, trajectory.view(), status(), gradient, {inputs, parameters, initial}, options);
    }
    /// `forward` as a graph, which finds no trajectory there. Waits.
    void capture_and_launch(const Stream& stream, const Options& options) const {
        const Captured graph(stream, [&] { forward(options); });
        clear_trajectory();
        graph.launch();
        stream.wait();
    }
    void clear_trajectory() const {
        detail::fill_zeros(trajectory.data(), trajectory.size() * index(sizeof(T)), Device::cuda());
    }
    /// Waits.
    Status outcome() const {
        index told = -1;
        detail::copy(&told, status(), index(sizeof told));
        return Status(told);
    }

    const CellRecurrence<C, T>& recurrence;
    View<const T> gradient;
    Buffer<T> trajectory, inputs, initial;
    Buffer<Arithmetic<T>> parameters;
    std::shared_ptr<void> memory;
};

template <class T>
bool all_nan(const Buffer<T>& there) {
    const Buffer<T> here = there.on(Device::host());
    for (index i = 0; i < here.size(); ++i)
        if (!std::isnan(float(here.data()[i]))) return false;
    return here.size() > 0;
}

class Enqueue : public OnGpuTest {
protected:
    void SetUp() override {
        OnGpuTest::SetUp();
        cell::register_on_gpu<LeakyTanh, float>();
        cell::register_on_gpu<LeakyTanh, bfloat16>();
        cell::register_on_gpu<Squares, float>();
    }
};

template <class T>
testing::AssertionResult same_numbers(const Buffer<T>& there, const Buffer<T>& expected) {
    return same_bits<Arithmetic<T>>(widened(there.on(Device::host())), widened(expected.on(Device::host())));
}

template <class C, class T>
void same_as_with_a_wait(const std::vector<SequenceStart>& starts) {
    for (const Options& options : every_way) {
        const Problem<C, T> problem(shape_for(options, {300, 2, 17}), 5, 0.5, Layout::steps_first, starts);
        SCOPED_TRACE(to_string(options.method) + " chunk " + std::to_string(options.chunk));
        const Enqueued<C, T> found(*problem.there, problem.there_gradient);
        const auto expected = evaluate(*problem.there, options);
        EXPECT_EQ(expected.report.method.find("tiles") != std::string::npos,
                  options.method == Method::shooting && options.chunk == 0);
        for (int times = 0; times < 2; ++times) {
            found.forward(options);
            found.backward(options);
            EXPECT_EQ(found.outcome(), expected.report.status);
            EXPECT_TRUE(same_numbers(found.trajectory, expected.trajectory));
            const auto gradients =
                adjoint<T>(*problem.there, expected.trajectory, expected.report, problem.there_gradient, options);
            if (!has_the_same_gradients(options)) continue;
            EXPECT_TRUE(same_numbers(found.inputs, gradients.inputs));
            EXPECT_TRUE(same_numbers(found.initial, gradients.initial));
            EXPECT_TRUE(same_numbers(found.parameters, gradients.parameters));
        }
    }
}

TEST_F(Enqueue, TheSameBitsAsWithAWait) {
    same_as_with_a_wait<ParaGRU, float>({});
    same_as_with_a_wait<ParaGRU, float>({{0, 40}, {1, 7}, {1, 100}});
    same_as_with_a_wait<ParaLSTM, double>({});
    same_as_with_a_wait<LeakyTanh, bfloat16>({});
    same_as_with_a_wait<ParaGRU, float16>({});
}

TEST_F(Enqueue, AutomaticIsRightFromTheFirstCallOn) {
    const Problem<ParaLSTM, float> problem({700, 2, 5}, 9);
    const Enqueued<ParaLSTM, float> found(*problem.there, problem.there_gradient);
    const Buffer<float> expected = problem.expected();
    for (int times = 0; times < 12; ++times) {
        found.clear_trajectory();
        found.forward({.execution = gpu});
        EXPECT_EQ(found.outcome(), Status::converged) << times;
        EXPECT_LE(largest_difference<float>(found.trajectory.on(Device::host()), expected), 1e-4) << times;
    }
}

// Chunks that meet in the second or third round: the same bits whether an earlier run was heard of or not.
TEST_F(Enqueue, TheSameBitsInEveryCall) {
    const Problem<ParaGRU, float> problem({400, 2, 9}, 3);
    const Options options{.method = Method::overlap, .chunk = 16, .tolerance = 1e-6, .execution = gpu};
    std::vector<std::unique_ptr<Enqueued<ParaGRU, float>>> all;
    for (int pairs = 0; pairs < 3; ++pairs) {
        for (int one = 0; one < 2; ++one) {
            all.push_back(std::make_unique<Enqueued<ParaGRU, float>>(*problem.there, problem.there_gradient));
            all.back()->forward(options);
            all.back()->backward(options);
        }
        all.back()->outcome();
    }
    // After these, as what it learns is what they would have learnt.
    const auto expected = evaluate(*problem.there, options);
    const auto gradients =
        adjoint<float>(*problem.there, expected.trajectory, expected.report, problem.there_gradient, options);
    ASSERT_GT(expected.report.iterations, 2);
    for (const auto& found : all) {
        EXPECT_EQ(found->outcome(), expected.report.status);
        EXPECT_TRUE(same_numbers(found->trajectory, expected.trajectory));
        EXPECT_TRUE(same_numbers(found->inputs, gradients.inputs));
        EXPECT_TRUE(same_numbers(found->parameters, gradients.parameters));
    }
}

TEST_F(Enqueue, WhatForgetsNothingIsFinishedStepAfterStep) {
    const Problem<ParaGRU, double> strong({400, 2, 9}, 3, 8);
    const Options options{.method = Method::overlap, .chunk = 20, .tolerance = 1e-10, .execution = gpu};
    const Enqueued<ParaGRU, double> hard(*strong.there, strong.there_gradient);
    const Buffer<double> expected = strong.expected();
    const auto here = evaluate(*strong.here, {.method = Method::sequential});
    const auto gradients = adjoint<double>(*strong.here, here.trajectory, here.report, strong.gradient);
    double largest = 0;  // errors of rounding are amplified as much as the gradients are
    for (index i = 0; i < gradients.parameters.size(); ++i)
        largest = std::max(largest, std::abs(gradients.parameters.data()[i]));
    for (int times = 0; times < 3; ++times) {
        hard.forward(options);
        hard.backward(options);
        EXPECT_EQ(hard.outcome(), Status::finished_sequentially);
        EXPECT_LE(largest_difference<double>(hard.trajectory.on(Device::host()), expected), 1e-6);
        EXPECT_LE(largest_difference<double>(hard.inputs.on(Device::host()), gradients.inputs), 1e-6);
        EXPECT_LE(largest_difference<double>(hard.parameters.on(Device::host()), gradients.parameters), 1e-8 * largest);
    }
}

// What forgets and what does not, in turns, of one size: chunks are given up for both.
TEST_F(Enqueue, WhatChunksDoNotMeetIsLearnt) {
    const Problem<DiagonalElman, float> weak({1000, 2, 9}, 3, 0.1), strong({1000, 2, 9}, 3, 8);
    const Enqueued<DiagonalElman, float> easy(*weak.there, weak.there_gradient),
        hard(*strong.there, strong.there_gradient);
    for (int times = 0; times < 3; ++times) {
        easy.forward({.method = Method::overlap, .chunk = 100, .execution = gpu});
        hard.forward({.method = Method::overlap, .chunk = 100, .execution = gpu});
        EXPECT_EQ(hard.outcome(), Status::finished_sequentially);
    }
    const Report report = evaluate(*strong.there, {.execution = gpu}).report;
    ASSERT_FALSE(report.candidates.empty()) << report;
    for (const Report::Candidate& candidate : report.candidates) EXPECT_NE(candidate.method, Method::overlap);
}

// With a wait or without one: chunks that do not meet for states that are not finite say nothing of others.
TEST_F(Enqueue, WhatIsNotFiniteDoesNotGiveUpAMethod) {
    const TwoOfSquares finite(1100, 0), overflows(1100, 1.01F);
    const Enqueued<Squares, float> found(*overflows.there, overflows.there_inputs);
    for (const Method method : {Method::overlap, Method::shooting})
        for (const bool waits : {true, false}) {
            const Options options{.method = method, .chunk = 100, .execution = gpu};
            if (waits) {
                EXPECT_EQ(evaluate(*overflows.there, options).report.status, Status::non_finite);
            } else {
                found.forward(options);
                EXPECT_EQ(found.outcome(), Status::non_finite);
            }
            const Report report = evaluate(*finite.there, {.execution = gpu}).report;
            EXPECT_TRUE(report.ok()) << report;
            EXPECT_EQ(std::count_if(report.candidates.begin(), report.candidates.end(),
                                    [&](const Report::Candidate& candidate) { return candidate.method == method; }),
                      1)
                << report;
        }
}

TEST_F(Enqueue, WhatIsMeasuredIsWithoutWhatIsEnqueuedBefore) {
    const Problem<SLSTM, float> small({600, 1, 3}, 4), large({6000, 2, 33}, 5);
    const Enqueued<SLSTM, float> found(*small.there, small.there_gradient), before(*large.there, large.there_gradient);
    evaluate(*large.there, {.method = Method::sequential, .execution = gpu});  // loads kernels
    const auto [trajectory, ended] = evaluate(*large.there, {.method = Method::sequential, .execution = gpu});
    // Measures what kernels cost, which would empty the stream of the first call below.
    adjoint<float>(*large.there, trajectory, ended, large.there_gradient, {.execution = gpu});
    for (int times = 0; times < 8; ++times) {
        before.forward({.method = Method::sequential, .execution = gpu});
        found.forward({.execution = gpu});
    }
    const Report report = evaluate(*small.there, {.execution = gpu}).report;
    ASSERT_FALSE(report.candidates.empty()) << report;
    EXPECT_TRUE(report.candidates.front().measured);
    EXPECT_LT(report.candidates.front().seconds, 0.5 * ended.seconds);
}

TEST_F(Enqueue, WhatIsNotFiniteIsSaidAndHasNoGradient) {
    for (const bool overflows : {true, false, true}) {
        const TwoOfSquares squares(300, overflows ? 1.01F : 0);
        const Enqueued<Squares, float> found(*squares.there, squares.there_inputs);
        for (const Options& options : every_way) {
            found.forward(options);
            found.backward(options);
            EXPECT_EQ(found.outcome() == Status::non_finite, overflows);
            EXPECT_EQ(all_nan(found.inputs), overflows);
            EXPECT_EQ(all_nan(found.parameters), overflows);
            EXPECT_EQ(all_nan(found.initial), overflows);
        }
    }
}

/// Memory of a pool as another library has one: what is given back is handed out again, so that a graph may use it.
class Pool {
public:
    std::shared_ptr<void> allocate(index bytes) {
        for (std::shared_ptr<void>& block : blocks_)
            if (bytes <= block_bytes && block.use_count() == 1) return block;
        throw OutOfMemory("the pool is used up");
    }

private:
    static constexpr index block_bytes = index(1) << 20;
    std::vector<std::shared_ptr<void>> blocks_ = [] {
        std::vector<std::shared_ptr<void>> blocks;
        for (int i = 0; i < 16; ++i) blocks.push_back(detail::allocate(block_bytes, Device::cuda()));
        return blocks;
    }();
};

/// Both passes in a graph: `first`, and with the numbers of `second`. pool: where memory comes from, unless from a
/// workspace of `options`; with neither the graph has its own.
void a_graph_is_replayed(const Stream& stream, const Options& options, Pool* pool, const Problem<ParaGRU, float>& first,
                         const Problem<ParaGRU, float>& second) {
    const Enqueued<ParaGRU, float> found(*first.there, first.there_gradient);
    const auto both_passes = [&] {
        std::optional<MemorySource> source;
        if (pool != nullptr)
            source.emplace(
                Device::cuda(), [&](index bytes) { return pool->allocate(bytes); }, stream.stream);
        found.forward(options);
        found.backward(options);
    };
    both_passes();  // grows the workspace
    stream.wait();
    const Captured graph(stream, both_passes);
    for (const auto* problem : {&second, &first}) {
        detail::copy(const_cast<float*>(first.there_inputs.data()), problem->inputs.data(),
                     first.there_inputs.size() * index(sizeof(float)));
        detail::copy(const_cast<float*>(first.there_parameters.data()), problem->parameters.data(),
                     first.there_parameters.size() * index(sizeof(float)));
        const auto expected = evaluate(*first.there, options);
        const auto gradients =
            adjoint<float>(*first.there, expected.trajectory, expected.report, first.there_gradient, options);
        graph.launch();
        stream.wait();
        EXPECT_EQ(found.outcome(), expected.report.status);
        EXPECT_TRUE(same_numbers(found.trajectory, expected.trajectory));
        if (!has_the_same_gradients(options)) continue;
        EXPECT_TRUE(same_numbers(found.inputs, gradients.inputs));
        EXPECT_TRUE(same_numbers(found.parameters, gradients.parameters));
    }
}

TEST_F(Enqueue, AGraphOfBothPassesIsReplayed) {
    const Stream stream;
    for (const double scale : {0.5, 8.0})
        for (const std::string memory : {"workspace", "pool", "graph"})
            for (Options options : every_way) {
                SCOPED_TRACE(memory + ", " + to_string(options.method));
                const Shape shape = shape_for(options, {300, 2, 17});
                const Problem<ParaGRU, float> first(shape, 21), second(shape, 22, scale);
                options.execution = stream.execution();
                Workspace workspace(Device::cuda());
                Pool pool;
                if (memory == "workspace") options.workspace = &workspace;
                a_graph_is_replayed(stream, options, memory == "pool" ? &pool : nullptr, first, second);
            }
}

/// However few calls there were before.
TEST_F(Enqueue, AutomaticIsCapturedAfterAnyCall) {
    const Stream stream;
    for (int calls = 1; calls < 5; ++calls) {
        SCOPED_TRACE(calls);
        const Problem<ParaLSTM, float> problem({1400, index(1) << calls, 5}, 9);
        const Enqueued<ParaLSTM, float> found(*problem.there, problem.there_gradient);
        Workspace workspace(Device::cuda());
        const Options options{.execution = stream.execution(), .workspace = &workspace};
        for (int times = 0; times < calls; ++times) {
            found.forward(options);
            stream.wait();
        }
        found.capture_and_launch(stream, options);
        EXPECT_EQ(found.outcome(), Status::converged);
        EXPECT_LE(largest_difference<float>(found.trajectory.on(Device::host()), problem.expected()), 1e-4);
    }
}

/// After a call whose method will not be chosen again.
TEST_F(Enqueue, ACaptureAfterWhatDoesNotWorkIsRight) {
    const Problem<DiagonalElman, float> problem({3000, 1, 3}, 3, 8);
    const Enqueued<DiagonalElman, float> found(*problem.there, problem.there_gradient);
    const Stream stream;
    Workspace workspace(Device::cuda());
    const Options options{.execution = stream.execution(), .workspace = &workspace};
    for (int calls = 1; calls < 4; ++calls) {
        found.forward(options);
        stream.wait();
        found.capture_and_launch(stream, options);
        EXPECT_LE(found.outcome(), Status::finished_sequentially);
        EXPECT_LE(problem.residual(found.trajectory.on(Device::host()), 0, 3000), 1e-4) << calls;
    }
}

/// Those that a call took memory for, also where that call has shown that others are better: the same bits. (With so
/// few channels a GPU has the shortest chunks before and after.)
TEST_F(Enqueue, ChunksThatRanAreCaptured) {
    const Problem<ParaGRU, float> slow({3000, 1, 3}, 9, 3), fast({3000, 1, 3}, 9, 0.1);
    const Stream stream;
    Workspace workspace(Device::cuda());
    Options options{.method = Method::overlap, .execution = stream.execution()};
    EXPECT_TRUE(evaluate(*slow.there, options).report.ok());  // cells like this are expected to forget slowly
    options.workspace = &workspace;
    const Enqueued<ParaGRU, float> found(*fast.there, fast.there_gradient);
    found.forward(options);
    stream.wait();
    const Buffer<float> expected = found.trajectory.on(Device::host());
    EXPECT_LE(largest_difference<float>(expected, fast.expected()), 1e-4);
    found.capture_and_launch(stream, options);
    EXPECT_EQ(found.outcome(), Status::converged);
    EXPECT_TRUE(same_numbers(found.trajectory, expected));
}

TEST_F(Enqueue, NoSteps) {
    const Buffer<float> inputs({0, 2, 9}, Layout::steps_first, Device::cuda()),
        parameters({3, 1, 3}, Layout::steps_first, Device::cuda());
    const CellRecurrence<ParaGRU, float> cell(inputs, parameters);
    const Enqueued<ParaGRU, float> found(cell, View<const float>(nullptr, {0, 2, 3}));
    found.forward({.execution = gpu});
    EXPECT_EQ(found.outcome(), Status::converged);
    found.backward({.execution = gpu});
    const Buffer<float> gradient = found.parameters.on(Device::host());
    for (index i = 0; i < gradient.size(); ++i) EXPECT_EQ(gradient.data()[i], 0);
}

TEST_F(Enqueue, SayWhatIsWrong) {
    const Problem<LeakyTanh, float> problem({10, 1, 2}, 1);
    const Enqueued<LeakyTanh, float> found(*problem.there, problem.there_gradient);
    index here = 0;
    const auto message = [&](const Options& options, index* status) -> std::string {
        const std::string forward =
            message_of([&] { enqueue(*problem.there, found.trajectory.view(), status, options); });
        const std::string backward = message_of([&] {
            enqueue_adjoint(*problem.there, found.trajectory.view(), status, problem.there_gradient,
                            {found.inputs, found.parameters, found.initial}, options);
        });
        EXPECT_EQ(forward, backward);
        return forward;
    };
    EXPECT_EQ(message({}, found.status()), "options.execution.backend: expected cuda, got cpu");
    EXPECT_EQ(message({.method = Method::newton, .execution = gpu}, found.status()),
              "options.method: expected automatic, sequential, overlap or shooting, for a cell on a GPU, got newton");
    EXPECT_EQ(message({.on_failure = OnFailure::raise, .execution = gpu}, found.status()),
              "options.on_failure: expected finish, as nobody waits for the outcome, got raise");
    EXPECT_EQ(message({.execution = gpu}, nullptr), "status: expected a number on the GPU, got a null pointer");
    EXPECT_EQ(message({.execution = gpu}, &here),
              "status: expected memory of a GPU, for Backend::cuda, got main memory");
    EXPECT_THROW(
        enqueue(*problem.there, View<float>(found.trajectory.view().steps(0, 5)), found.status(), {.execution = gpu}),
        InvalidArgument);
    EXPECT_THROW(
        enqueue_adjoint(*problem.there, found.trajectory.view(), found.status(), problem.there_gradient,
                        {found.inputs.view().steps(0, 5), found.parameters, found.initial}, {.execution = gpu}),
        InvalidArgument);
    const Problem<LeakyTanh, float> parts({10, 1, 2}, 1, 0.5, Layout::steps_first, {{0, 5}});
    const Stream stream;
    Workspace workspace(Device::cuda());
    const Options captured{.execution = stream.execution(), .workspace = &workspace};
    Captured(stream, [&] {
        const std::string parts_refused =
            message_of([&] { enqueue(*parts.there, found.trajectory.view(), found.status(), captured); });
        EXPECT_NE(parts_refused.find("whole rows"), std::string::npos) << parts_refused;
        EXPECT_NE(message(captured, found.status()).find("options.workspace"), std::string::npos);
    });
}

}  // namespace
}  // namespace deeppcr
