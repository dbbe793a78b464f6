// The averaging engine: what theory says that its methods must equal, and what must not change them.
#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <mutex>

#include <deeppcr/nn/denoisers.hpp>
#include <deeppcr/nn/fashion_mnist.hpp>

#include "nn/averaging.hpp"
#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;
using testing::HasSubstr;
using Module = torch::nn::Module;

constexpr index inputs = 6, classes = 3;

struct Network : Module {
    Network(bool with_norm, std::uint64_t seed) {
        first = register_module("first", torch::nn::Linear(inputs, 8));
        if (with_norm) norm = register_module("norm", torch::nn::BatchNorm1d(8));
        last = register_module("last", torch::nn::Linear(8, classes));
        to(at::kDouble);
        initialise(*this, seed);
    }
    Tensor forward(const Tensor& x) {
        const Tensor hidden = first(x);
        return last(torch::tanh(norm ? norm(hidden) : hidden));
    }
    torch::nn::Linear first = nullptr, last = nullptr;
    torch::nn::BatchNorm1d norm = nullptr;
};

/// Points of three clouds.
class Clouds : public Task {
public:
    explicit Clouds(bool with_norm, index count = 96) : with_norm_(with_norm) {
        auto generator = at::make_generator<at::CPUGeneratorImpl>(std::uint64_t(5));
        labels = torch::arange(count, at::kLong) % classes;
        points =
            torch::empty({count, inputs}, at::kDouble).normal_(0, 1, generator) + labels.to(at::kDouble).unsqueeze(1);
    }
    std::shared_ptr<Module> make_model() const override { return std::make_shared<Network>(with_norm_, 11); }
    index examples() const override { return points.size(0); }
    Loss loss(Module& model, const Tensor& rows) const override {
        const Tensor logits = dynamic_cast<Network&>(model).forward(points.index_select(0, rows));
        const Tensor expected = labels.index_select(0, rows);
        Tensor mean = torch::nn::functional::cross_entropy(logits, expected);
        if (index(rows[0].item<std::int64_t>()) == broken) mean = mean * std::nan("");
        return {mean, logits.argmax(1).eq(expected).to(at::kDouble).mean().item<double>()};
    }

    Tensor points, labels;
    index broken = -1;  ///< a batch that begins with this example has no finite loss

private:
    bool with_norm_;
};

/// A team of one, of any rank: what a worker of a larger team does by itself.
class Alone : public Team {
public:
    explicit Alone(index rank) : rank_(rank) {}
    index rank() const override { return rank_; }
    index size() const override { return 1; }
    void average(const std::vector<Tensor>&) override {}
    std::vector<std::vector<double>> gather(const std::vector<double>& record) override { return {record}; }
    std::vector<SavedTensors> collect(const SavedTensors& tensors) override { return {tensors}; }

private:
    index rank_;
};

PhaseOptions small_phase(Optimiser optimiser = Optimiser::sgd) {
    PhaseOptions options;
    options.batch = 8;
    options.epochs = 3;
    options.optimisation.optimiser = optimiser;
    options.optimisation.learning_rate = optimiser == Optimiser::sgd ? 0.1 : 0.01;
    options.optimisation.weight_decay = 1e-3;
    return options;
}

using State = std::map<std::string, Tensor>;

State copy_of(const Module& model) {
    State state;
    for (const auto& [name, tensor] : state_of(model)) state[name] = tensor.detach().clone();
    return state;
}

/// The models of all workers, in the order of ranks.
std::vector<State> train(const Task& task, const PhaseOptions& options, index workers, int threads = 2) {
    std::vector<State> states{std::size_t(workers)};
    run_team(workers, threads, [&](Team& team) {
        const auto model = task.make_model();
        Phase phase(model, task, options, team);
        while (!phase.finished()) phase.advance({});
        phase.take_trajectory();
        states[std::size_t(team.rank())] = copy_of(*model);
    });
    return states;
}

void expect_equal(const State& found, const State& expected) {
    ASSERT_EQ(found.size(), expected.size());
    for (const auto& [name, tensor] : expected) EXPECT_TRUE(found.at(name).equal(tensor)) << name;
}

/// Sums of a few dozen terms in another order, over a few dozen steps.
void expect_near(const State& found, const State& expected, double tolerance = 1e-12) {
    ASSERT_EQ(found.size(), expected.size());
    for (const auto& [name, tensor] : expected)
        EXPECT_LE((found.at(name) - tensor).abs().max().item<double>(), tolerance) << name;
}

bool differ(const State& one, const State& other) {
    for (const auto& [name, tensor] : one)
        if (!tensor.equal(other.at(name))) return true;
    return false;
}

TEST(Averaging, EveryStepIsOneWorkerWithTheWholeBatch) {
    const Clouds task(false);
    for (const Optimiser optimiser : {Optimiser::sgd, Optimiser::adamw})
        for (const index workers : {2, 3, 4}) {
            PhaseOptions together = small_phase(optimiser), whole = together;
            together.period = 1;
            together.shared_order = true;
            whole.batch *= workers;
            whole.shared_order = true;
            const auto found = train(task, together, workers);
            expect_near(found[0], train(task, whole, 1)[0]);
            for (index worker = 1; worker < workers; ++worker) expect_equal(found[std::size_t(worker)], found[0]);
        }
}

TEST(Averaging, MicroBatchesAreTheBatch) {
    const Clouds task(false);
    PhaseOptions pieces = small_phase(), whole = pieces;
    whole.batch = pieces.batch = 24;
    pieces.micro_batch = 7;  // three pieces and a rest
    expect_near(train(task, pieces, 1)[0], train(task, whole, 1)[0]);
}

TEST(Averaging, OneWorkerIsPlainTraining) {
    const Clouds task(true);
    const PhaseOptions options = small_phase();
    const auto model = task.make_model();
    torch::optim::SGD optimiser(model->parameters(), torch::optim::SGDOptions(0.1).momentum(0.9).weight_decay(1e-3));
    const index epoch_steps = task.examples() / options.batch, steps = epoch_steps * options.epochs;
    for (index step = 0; step < steps; ++step) {
        const Tensor order = order_of_examples(task.examples(), options.seed, 1, 0, step / epoch_steps);
        const index first = step % epoch_steps * options.batch;
        optimiser.zero_grad();
        task.loss(*model, order.slice(0, first, first + options.batch)).mean.backward();
        const double rate = 0.1 * 0.5 * (1 + std::cos(M_PI * (double(step) / double(steps))));
        dynamic_cast<torch::optim::SGDOptions&>(optimiser.param_groups()[0].options()).lr(rate);
        optimiser.step();
    }
    expect_equal(train(task, options, 1)[0], copy_of(*model));
    PhaseOptions periodic = options;
    periodic.period = 5;  // an average of one
    expect_equal(train(task, periodic, 1)[0], copy_of(*model));
}

TEST(Averaging, MeansAreSumsInTheOrderOfRanks) {
    const std::vector<float> values = {1e8F, -1e8F, 3.7F};  // another order gives another sum
    std::vector<Tensor> tensors;
    for (const float value : values) tensors.push_back(torch::full({5}, value));
    run_team(3, 3, [&](Team& team) { team.average({tensors[std::size_t(team.rank())]}); });
    for (const Tensor& tensor : tensors) EXPECT_TRUE(tensor.equal(torch::full({5}, ((1e8F + -1e8F) + 3.7F) / 3)));
}

TEST(Averaging, EqualWorkersStayAsTheyAre) {
    const Clouds task(true);
    const State before = copy_of(*task.make_model());
    for (const index workers : {1, 2, 3, 4, 8})
        run_team(workers, 2, [&](Team& team) {
            const auto model = task.make_model();
            average_models(*model, team);
            if (workers <= 2)  // larger sums are rounded
                expect_equal(copy_of(*model), before);
            else
                expect_near(copy_of(*model), before, 1e-15);
        });
}

TEST(Averaging, WorkersOfAnEndlessPeriodAreAlone) {
    const Clouds task(true);
    const auto states = train(task, small_phase(), 3);
    EXPECT_TRUE(differ(states[0], states[1])) << "each worker has its own order";
    for (index rank = 0; rank < 3; ++rank) {
        Alone team(rank);
        const auto model = task.make_model();
        Phase phase(model, task, small_phase(), team);
        while (!phase.finished()) phase.advance({});
        expect_equal(states[std::size_t(rank)], copy_of(*model));
    }
}

TEST(Averaging, PeriodsAverageWeights) {
    const Clouds task(true);
    PhaseOptions options = small_phase();
    options.period = 12;
    options.epochs = 1;  // 12 steps
    const auto found = train(task, options, 2);
    expect_equal(found[0], found[1]);
    PhaseOptions alone = options;
    alone.period = 0;
    const auto apart = train(task, alone, 2);
    for (const auto& [name, tensor] : found[0])
        if (tensor.is_floating_point()) {
            EXPECT_TRUE(tensor.equal((apart[0].at(name) + apart[1].at(name)) / 2)) << name;
        }
    options.period = 5;  // does not divide the epoch: averages after 5 and 10 steps, and at the end
    const auto more_often = train(task, options, 2);
    expect_equal(more_often[0], more_often[1]);
    EXPECT_TRUE(differ(more_often[0], found[0]));
}

TEST(Averaging, TheOuterOptimiserIsNesterovs) {
    const Clouds task(false);
    PhaseOptions options = small_phase();
    options.period = 12;
    options.epochs = 2;
    options.optimisation.schedule = RateSchedule::constant;
    options.outer_learning_rate = 0.7;
    options.outer_momentum = 0.9;
    std::vector<State> after_inner, after_outer = {copy_of(*task.make_model())};
    const auto model = task.make_model();
    class Watch : public Alone {  // sees the weights as they are when they are averaged
    public:
        Watch(const Module& model, std::vector<State>& states) : Alone(0), model_(model), states_(states) {}
        void average(const std::vector<Tensor>&) override { states_.push_back(copy_of(model_)); }

    private:
        const Module& model_;
        std::vector<State>& states_;
    } team(*model, after_inner);
    Phase phase(model, task, options, team);
    while (!phase.finished()) {
        phase.advance({});
        after_outer.push_back(copy_of(*model));
    }
    ASSERT_EQ(after_inner.size(), 2u);
    State expected = after_outer[0], momentum;
    for (std::size_t i = 0; i < 2; ++i) {
        for (auto& [name, weight] : expected) {
            const Tensor gradient = weight - after_inner[i].at(name);
            momentum[name] = i == 0 ? gradient : 0.9 * momentum[name] + gradient;
            weight = weight - 0.7 * (gradient + 0.9 * momentum[name]);
        }
        expect_near(after_outer[i + 1], expected);
    }
}

TEST(Averaging, ThreadsDoNotChangeTheNumbers) {
    const Clouds task(true);
    for (const index period : {0, 1, 5}) {
        PhaseOptions options = small_phase(Optimiser::adamw);
        options.period = period;
        const auto one = train(task, options, 4, 1), four = train(task, options, 4, 4);
        for (std::size_t worker = 0; worker < 4; ++worker) expect_equal(one[worker], four[worker]);
    }
}

TEST(Averaging, TrajectoriesAreMeansOfEpochs) {
    const Clouds task(false);
    for (const Trajectory trajectory : {Trajectory::swa, Trajectory::lawa}) {
        PhaseOptions options = small_phase();
        options.epochs = 5;
        options.trajectory = trajectory;
        options.trajectory_from = 2;
        options.trajectory_window = 3;
        Alone team(0);
        const auto model = task.make_model();
        Phase phase(model, task, options, team);
        std::vector<State> ends;
        while (!phase.finished())
            if (phase.advance({}) == Phase::Outcome::epoch_ended) ends.push_back(copy_of(*model));
        ASSERT_EQ(ends.size(), 5u);
        State expected;
        const std::size_t first = trajectory == Trajectory::swa ? 1 : 2;
        for (const auto& [name, tensor] : ends[0]) {
            expected[name] = torch::zeros_like(tensor);
            for (std::size_t epoch = first; epoch < 5; ++epoch) expected[name] += ends[epoch].at(name);
            expected[name] /= double(5 - first);
        }
        EXPECT_TRUE(phase.take_trajectory());
        expect_near(copy_of(*model), expected, 1e-15);
    }
}

TEST(Averaging, StatisticsAreThoseOfOnePass) {
    const Clouds task(true);
    const index batch = 20;  // 4 batches; 16 examples are left
    const auto model = std::dynamic_pointer_cast<Network>(task.make_model());
    model->norm->running_mean.fill_(17);
    model->eval();
    recompute_statistics(*model, task, batch);
    Tensor mean = torch::zeros({8}, at::kDouble), variance = mean.clone();
    for (index i = 0; i < 4; ++i) {
        const Tensor hidden = model->first(task.points.slice(0, i * batch, (i + 1) * batch)).detach();
        mean += hidden.mean(0) / 4;
        variance += hidden.var(0, /*unbiased=*/true) / 4;
    }
    EXPECT_LE((model->norm->running_mean - mean).abs().max().item<double>(), 1e-14);
    EXPECT_LE((model->norm->running_var - variance).abs().max().item<double>(), 1e-14);
    EXPECT_EQ(model->norm->options.momentum(), 0.1) << "as it was";
    EXPECT_FALSE(model->is_training()) << "as it was";
}

TEST(Averaging, StaleStatisticsAreOthers) {
    const Clouds task(true);
    std::vector<State> states(2);
    run_team(2, 1, [&](Team& team) {
        const auto model = task.make_model();
        Phase phase(model, task, small_phase(), team);
        while (!phase.finished()) phase.advance({});
        average_models(*model, team);
        if (team.rank() != 0) return;
        states[0] = copy_of(*model);
        recompute_statistics(*model, task, 32);
        states[1] = copy_of(*model);
    });
    EXPECT_TRUE(states[0].at("first.weight").equal(states[1].at("first.weight")));
    EXPECT_GT((states[0].at("norm.running_var") - states[1].at("norm.running_var")).abs().max().item<double>(), 1e-3);
}

TEST(Averaging, GoesOnToTheSameBits) {
    const Clouds task(true);
    for (const Optimiser optimiser : {Optimiser::sgd, Optimiser::adamw})
        for (const index period : {0, 1, 5})
            for (const index stop_after : {1, 7, 12, 29}) {
                PhaseOptions options = small_phase(optimiser);
                options.period = period;
                options.trajectory = stop_after % 2 == 0 ? Trajectory::swa : Trajectory::lawa;
                options.trajectory_window = 2;
                if (period == 5) options.outer_momentum = 0.5;
                const auto whole = train(task, options, 3);

                // Someone is asked after every step; from then on everyone is interrupted, at steps of their own.
                std::atomic<index> asked = 0;
                std::vector<SavedTensors> saved(3);
                std::vector<index> steps(3);
                run_team(3, 2, [&](Team& team) {
                    const auto model = task.make_model();
                    Phase phase(model, task, options, team);
                    auto outcome = Phase::Outcome::met;
                    while (outcome != Phase::Outcome::interrupted && !phase.finished())
                        outcome = phase.advance({.interrupted = [&] { return ++asked >= 3 * stop_after; }});
                    EXPECT_EQ(outcome, Phase::Outcome::interrupted);
                    saved[std::size_t(team.rank())] = phase.state();
                    steps[std::size_t(team.rank())] = phase.step();
                });
                EXPECT_LT(*std::min_element(steps.begin(), steps.end()), 36) << "interrupted before the end";
                std::vector<State> resumed(3);
                run_team(3, 2, [&](Team& team) {
                    const auto model = task.make_model();
                    Phase phase(model, task, options, team);
                    phase.restore([&](const std::string& name, const Tensor& like) {
                        return find("state", saved[std::size_t(team.rank())], name, like);
                    });
                    while (!phase.finished()) phase.advance({});
                    phase.take_trajectory();
                    resumed[std::size_t(team.rank())] = copy_of(*model);
                });
                for (std::size_t worker = 0; worker < 3; ++worker) expect_equal(resumed[worker], whole[worker]);
            }
}

TEST(Averaging, APhaseEndsAtItsAccuracy) {
    const Clouds task(false);
    PhaseOptions options = small_phase();
    options.epochs = 50;
    options.optimisation.schedule = RateSchedule::constant;
    options.stopping_accuracy = 0.85;
    Alone team(0);
    Phase phase(task.make_model(), task, options, team);
    std::vector<double> accuracies;
    while (!phase.finished())
        if (phase.advance({}) == Phase::Outcome::epoch_ended) accuracies.push_back(phase.epoch_accuracy());
    ASSERT_GT(accuracies.size(), 1u);
    ASSERT_LT(accuracies.size(), 50u);
    EXPECT_GE(accuracies.back(), 0.85);
    for (std::size_t epoch = 0; epoch + 1 < accuracies.size(); ++epoch) EXPECT_LT(accuracies[epoch], 0.85);
}

TEST(Averaging, ALossThatIsNotFiniteStopsOrIsLeftOut) {
    for (const index period : {0, 1}) {
        Clouds task(true);
        PhaseOptions options = small_phase();
        options.period = period;
        options.epochs = 1;
        task.broken = order_of_examples(task.examples(), options.seed, 1, 1, 0)[4 * options.batch].item<index>();
        try {
            train(task, options, 2);
            ADD_FAILURE() << "no exception";
        } catch (const TrainingDiverged& problem) {
            EXPECT_THAT(problem.what(), HasSubstr("loss of step 5 of phase 1"));
            if (period == 0) {
                EXPECT_THAT(problem.what(), HasSubstr("worker 1"));
            }
        }

        options.on_not_finite = OnDivergence::skip;
        std::vector<SwapStep> skipped;
        run_team(2, 2, [&](Team& team) {
            const auto model = task.make_model();
            Phase phase(model, task, options, team);
            State before;
            Phase::Callbacks callbacks;
            callbacks.step = [&](const SwapStep& step) {
                if (step.skipped) skipped.push_back(step);
            };
            callbacks.progress = [&](double, double loss) {
                if (!std::isfinite(loss)) expect_equal(copy_of(*model), before);
                before = copy_of(*model);
            };
            while (!phase.finished()) phase.advance(callbacks);
            EXPECT_TRUE(std::isfinite(phase.epoch_loss()));
        });
        ASSERT_EQ(skipped.size(), 1u);
        EXPECT_EQ(skipped[0].step, 5);
        EXPECT_EQ(skipped[0].worker, period == 0 ? 1 : 0);
    }
}

TEST(Averaging, OneFailureEndsAll) {
    std::atomic<int> ended = 0;
    const auto worker = [&](Team& team) {
        struct End {
            std::atomic<int>& count;
            ~End() { ++count; }
        } end{ended};
        team.gather({1});
        if (team.rank() == 2) throw FileError("disk", "is full");
        for (;;) team.gather({1});
    };
    EXPECT_THROW(run_team(4, 2, worker), FileError);
    EXPECT_EQ(ended, 4);
}

TEST(Averaging, RefusesBadOptions) {
    const Clouds task(true);
    const auto message = [&](const auto& change, index workers = 2) -> std::string {
        PhaseOptions options = small_phase();
        change(options);
        return message_of([&] { train(task, options, workers); });
    };
    EXPECT_THAT(message([](auto& o) { o.batch = 0; }), HasSubstr("batch: expected at least 1, got 0"));
    EXPECT_THAT(message([](auto& o) { o.batch = 97; }), HasSubstr("batch: expected at most the number of training"));
    EXPECT_THAT(message([](auto& o) { o.shared_order = true, o.batch = 49; }), HasSubstr("of all workers together"));
    EXPECT_THAT(message([](auto& o) { o.epochs = 0; }), HasSubstr("epochs"));
    EXPECT_THAT(message([](auto& o) { o.period = -1; }), HasSubstr("period"));
    EXPECT_THAT(message([](auto& o) { o.micro_batch = 0; }), HasSubstr("micro_batch"));
    EXPECT_THAT(message([](auto& o) { o.outer_momentum = 0.5; }), HasSubstr("period: expected 2 or more"));
    EXPECT_THAT(message([](auto& o) { o.outer_momentum = 1; }), HasSubstr("outer_momentum"));
    EXPECT_THAT(message([](auto& o) { o.stopping_accuracy = std::nan(""); }), HasSubstr("stopping_accuracy"));
    EXPECT_THAT(message([](auto& o) { o.optimisation.learning_rate = -1; }), HasSubstr("learning_rate"));
    EXPECT_THAT(message([](auto&) {}, 0), HasSubstr("workers: expected at least 1, got 0"));
    EXPECT_EQ(message([](auto&) {}), nothing_thrown);
}

class SavedStatesTest : public testing::Test {
protected:
    SavedStatesTest() {
        std::string name = testing::TempDir() + "deeppcr-states-XXXXXX";
        folder_ = mkdtemp(name.data());
        path = folder_ / "state";
    }
    ~SavedStatesTest() override { std::filesystem::remove_all(folder_); }
    static SavedState state(double value) {
        return {{{"format", "test"}}, {{"number", torch::full({100}, value, at::kDouble)}}};
    }
    static double value(const SavedState& saved) { return saved.tensors.at("number")[0].item<double>(); }
    static void flip_a_bit(const std::filesystem::path& file) {
        std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
        stream.seekg(-400, std::ios::end);
        const auto byte = char(stream.get() ^ 1);
        stream.seekp(-400, std::ios::end);
        stream.put(byte);
    }
    std::filesystem::path path, folder_;
};

TEST_F(SavedStatesTest, TheOneBeforeStandsInForACorruptOne) {
    SavedStates file(path);
    std::string warning;
    const auto load = [&] {
        warning.clear();
        return value(SavedStates(path).load("test", [&](const std::string& text) { warning = text; }));
    };
    file.save(state(1));
    file.save(state(2));
    EXPECT_EQ(load(), 2);
    EXPECT_EQ(warning, "");
    flip_a_bit(path);
    EXPECT_EQ(load(), 1);
    EXPECT_THAT(warning, testing::AllOf(HasSubstr("corrupt"), HasSubstr("state.previous is used")));
    std::filesystem::remove(path);
    EXPECT_EQ(load(), 1);
    flip_a_bit(path.string() + ".previous");
    EXPECT_THROW(load(), FileError);
}

TEST_F(SavedStatesTest, WhatIsCorruptOrOfAnotherTrainingIsNotKept) {
    SavedStates(path).save(state(1));
    SavedStates second(path);
    second.save(state(2));
    EXPECT_FALSE(std::filesystem::exists(path.string() + ".previous")) << "1 is of another training";
    second.save(state(3));
    flip_a_bit(path);
    SavedStates third(path);
    EXPECT_EQ(value(third.load("test", {})), 2);
    third.save(state(4));
    EXPECT_EQ(value(SavedStates(path).load("test", {})), 4);
    EXPECT_FALSE(std::filesystem::exists(path.string() + ".previous"));
}

}  // namespace
}  // namespace deeppcr::nn
