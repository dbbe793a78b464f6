// Tasks of sequences: that the data are what they are said to be, and training on them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include <deeppcr/nn/tasks.hpp>
#include <files/error.hpp>

#include "tests/messages.hpp"
#include "tests/trainings.hpp"

namespace deeppcr::nn {
namespace {

namespace fs = std::filesystem;
using deeppcr::index;  // not strings.h's
using testing::HasSubstr;
using Numbers = std::vector<std::int64_t>;

constexpr std::int64_t no_answer = SequenceTaskBatch::no_answer;

/// The steps of one sequence of a batch.
Numbers column(const Numbers& numbers, const SequenceTaskBatch& batch, index sequence) {
    Numbers steps;
    for (index step = 0; step < batch.length; ++step)
        steps.push_back(numbers[std::size_t(step * batch.batch + sequence)]);
    return steps;
}

SequenceTaskOptions of(SequenceTask task) {
    SequenceTaskOptions options;
    options.task = task;
    return options;
}

/// check(tokens, answers) for some sequences of several lengths.
template <class Check>
void for_sequences(const SequenceTaskOptions& options, const std::vector<index>& lengths, const Check& check) {
    for (const index length : lengths) {
        const SequenceTaskBatch batch = make_batch(options, length, 20, 5, 100);
        ASSERT_EQ(batch.tokens.size(), std::size_t(20 * length));
        ASSERT_EQ(batch.answers.size(), batch.tokens.size());
        for (index i = 0; i < 20; ++i) check(column(batch.tokens, batch, i), column(batch.answers, batch, i));
    }
}

TEST(SequenceTasks, ParityIsThatOfTheOnesSoFar) {
    index ones = 0, count = 0;
    for_sequences(of(SequenceTask::parity), {1, 2, 100}, [&](const Numbers& tokens, const Numbers& answers) {
        for (std::size_t step = 0; step < tokens.size(); ++step) {
            const auto end = tokens.begin() + index(step) + 1;
            EXPECT_EQ(answers[step], std::count(tokens.begin(), end, 1) % 2);
            ASSERT_TRUE(tokens[step] == 0 || tokens[step] == 1);
            ones += tokens[step];
            ++count;
        }
    });
    EXPECT_NEAR(double(ones) / double(count), 0.5, 4 * 0.5 / std::sqrt(double(count)));
}

TEST(SequenceTasks, RecallAsksForTheValueOfAKey) {
    SequenceTaskOptions options = of(SequenceTask::recall);
    options.pairs = 5;
    options.keys = 7;
    options.values = 3;
    std::set<std::int64_t> asked;
    for_sequences(options, {3, 24, 60, 100}, [&](const Numbers& tokens, const Numbers& answers) {
        const index pairs = std::clamp<index>(index(tokens.size()) / 12, 1, 5);
        std::map<std::int64_t, std::int64_t> values;
        for (index pair = 0; pair < pairs; ++pair) {
            const auto at = std::size_t(2 * pair);
            EXPECT_TRUE(values.emplace(tokens[at], tokens[at + 1]).second) << "a key comes twice";
            EXPECT_LT(tokens[at], 7);
            EXPECT_GE(tokens[at + 1], 7);
            EXPECT_LT(tokens[at + 1], 10);
            EXPECT_EQ(answers[at], no_answer);
            EXPECT_EQ(answers[at + 1], no_answer);
        }
        for (auto step = std::size_t(2 * pairs); step < tokens.size(); ++step) {
            ASSERT_TRUE(values.contains(tokens[step]));
            EXPECT_EQ(answers[step], values.at(tokens[step]));
            asked.insert(tokens[step]);
        }
    });
    EXPECT_EQ(asked.size(), 7u);
}

/// find(i), as the paper defines it, steps counted from 1; 0: nowhere.
index find(const Numbers& x, index i) {
    for (index j = i; j >= 2; --j)
        if (x[std::size_t(j - 2)] == x[std::size_t(i - 1)]) return j;
    return 0;
}

TEST(SequenceTasks, HopsAreThoseOfTheDefinition) {
    for (const index hops : {1, 2, 5}) {
        SequenceTaskOptions options = of(SequenceTask::hops);
        options.hops = hops;
        options.symbols = 3;
        index nowhere = 0, somewhere = 0;
        for_sequences(options, {1, 2, 40}, [&](const Numbers& tokens, const Numbers& answers) {
            for (index i = 1; i <= index(tokens.size()); ++i) {
                index place = i;
                for (index hop = 0; hop < hops && place > 0; ++hop) place = find(tokens, place);
                EXPECT_EQ(answers[std::size_t(i - 1)], place > 0 ? tokens[std::size_t(place - 1)] : 3) << i;
                (place > 0 ? somewhere : nowhere)++;
                EXPECT_LT(tokens[std::size_t(i - 1)], 3);
            }
        });
        EXPECT_GT(nowhere, 20);
        EXPECT_GT(somewhere, 300);
    }
}

TEST(SequenceTasks, ASequenceDependsOnSeedAndNumberAlone) {
    for (const auto& [name, task] : sequence_task_names) {
        const auto options = of(task);
        const SequenceTaskBatch all = make_batch(options, 30, 6, 9, 4), one = make_batch(options, 30, 1, 9, 7),
                                other = make_batch(options, 30, 1, 10, 7);
        EXPECT_EQ(column(all.tokens, all, 3), one.tokens) << name;
        EXPECT_EQ(column(all.answers, all, 3), one.answers) << name;
        EXPECT_NE(column(all.tokens, all, 2), one.tokens) << name;
        EXPECT_NE(other.tokens, one.tokens) << name;
    }
    // On every machine: std::mt19937_64 and std::seed_seq are prescribed to the bit.
    EXPECT_EQ(make_batch(of(SequenceTask::parity), 12, 1, 1, 0).tokens, Numbers({0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0}));
}

TEST(SequenceTasks, NameTheArgumentThatCannotBe) {
    const auto error_of = [](SequenceTask task, auto change, index length = 100) -> std::string {
        SequenceTaskOptions options = of(task);
        change(options);
        return message_of([&] { make_batch(options, length, 1, 1, 0); });
    };
    const auto same = [](auto&) {};
    EXPECT_THAT(error_of(SequenceTask::parity, same, 0), HasSubstr("length: expected at least 1, got 0"));
    EXPECT_THAT(error_of(SequenceTask::recall, same, 2), HasSubstr("length: expected at least 3, got 2"));
    EXPECT_THAT(error_of(SequenceTask::recall, [](auto& o) { o.pairs = 5; }),
                HasSubstr("pairs: expected 1 to keys = 4"));
    EXPECT_THAT(error_of(SequenceTask::recall, [](auto& o) { o.length = 8; }),
                HasSubstr("length: expected above 2 pairs"));
    EXPECT_THAT(error_of(SequenceTask::hops, [](auto& o) { o.hops = 0; }),
                HasSubstr("hops: expected at least 1, got 0"));
    EXPECT_THAT(error_of(SequenceTask::hops, [](auto& o) { o.symbols = 0; }), HasSubstr("symbols"));
}

class TaskTrainings : public testing::Test {
protected:
    TaskTrainings() {
        std::string name = testing::TempDir() + "deeppcr-tasks-XXXXXX";
        folder = mkdtemp(name.data());
    }
    ~TaskTrainings() override { fs::remove_all(folder); }

    TaskTrainingOptions options(Mixer mixer = Mixer::para_gru, SequenceTask task = SequenceTask::parity) const {
        TaskTrainingOptions result;
        result.task.task = task;
        result.task.length = 24;
        result.task.pairs = 2;
        result.model.mixer = mixer;
        result.model.width = result.model.mlp = 16;
        result.model.layers = 1;
        result.evaluation.chunk = 8;
        result.evaluation.execution.threads = 1;
        result.batch = 8;
        result.steps = 30;
        result.warm_up = 5;
        result.validation_interval = 10;
        result.validation_sequences = 50;
        result.checkpoint = folder / "task.safetensors";
        return result;
    }

    fs::path folder;
};

TEST_F(TaskTrainings, LearnParityWhereTheStateIsNotLinear) {
    for (const Mixer mixer : {Mixer::para_gru, Mixer::para_lstm, Mixer::linear}) {
        TaskTrainingOptions training = options(mixer);
        training.task.length = 60;
        training.steps = 200;
        training.learning_rate = 2e-2;
        training.enough = 1;
        const TaskTraining result = train_task(training);
        const TaskValidation& last = result.validations.back();
        EXPECT_EQ(last.sequences, 50);
        EXPECT_EQ(last.answers, 50 * 60);
        if (mixer == Mixer::linear) {
            EXPECT_LT(last.accuracy, 0.7);
            EXPECT_EQ(result.steps.size(), 200u);
        } else {
            EXPECT_EQ(last.accuracy, 1) << name_of(mixer_names, mixer);
            EXPECT_EQ(last.last_accuracy, 1);
            EXPECT_LT(result.steps.size(), 200u) << "it was enough";
            EXPECT_EQ(index(result.steps.size()) % 10, 0);
            training.resume = training.checkpoint;
            EXPECT_TRUE(train_task(training).steps.empty()) << "it still is";
            TaskValidationOptions longer;
            longer.length = 150;
            EXPECT_GT(validate_task(training.checkpoint, longer).accuracy, 0.9) << name_of(mixer_names, mixer);
        }
    }
}

TEST_F(TaskTrainings, LowerTheLossOfEveryTaskAndMixer) {
    for (const auto& [task_name, task] : sequence_task_names)
        for (const auto& [mixer_name, mixer] : mixer_names) {
            TaskTrainingOptions training = options(mixer, task);
            training.first_length = 0;
            training.steps = 40;
            const TaskTraining result = train_task(training);
            ASSERT_EQ(result.steps.size(), 40u);
            double first = 0, last = 0;
            for (int i = 0; i < 5; ++i)
                first += result.steps[std::size_t(i)].loss, last += result.steps[std::size_t(39 - i)].loss;
            EXPECT_LT(last, first) << task_name << " " << mixer_name;
            EXPECT_EQ(result.steps[0].length, 24);
            ASSERT_EQ(result.validations.size(), 4u);
            EXPECT_EQ(result.validations.back().step, 40);
        }
}

TEST_F(TaskTrainings, LengthenTheirSequencesOnceTheseAreAnswered) {
    TaskTrainingOptions training = options();
    training.steps = 100;
    training.growth = 0.9;
    training.learning_rate = 2e-2;
    const TaskTraining result = train_task(training);
    EXPECT_EQ(result.steps.front().length, 4);
    for (std::size_t i = 1; i < result.steps.size(); ++i) {
        const index before = result.steps[i - 1].length, now = result.steps[i].length;
        if (i == 90) {
            EXPECT_EQ(now, 24);
        } else if (now != before) {
            EXPECT_EQ(now, std::min<index>(24, before + 1 + before / 8));
            EXPECT_GT(result.steps[i - 1].accuracy, 0.8);
        }
    }
    // Nothing is learned at this rate: the lengths wait for the part of the steps.
    training.learning_rate = 1e-9;
    training.steps = 10;
    const TaskTraining unable = train_task(training);
    for (const TaskStep& step : unable.steps) EXPECT_EQ(step.length, step.step <= 9 ? 4 : 24);
}

TEST_F(TaskTrainings, InParallelAndSequentiallyHaveTheSameLosses) {
    for (const Mixer mixer : {Mixer::para_gru, Mixer::para_lstm, Mixer::slstm}) {
        TaskTrainingOptions parallel = options(mixer, SequenceTask::recall), plain = parallel;
        plain.evaluation.method = Method::sequential;
        parallel.first_length = plain.first_length = 0;
        const TaskTraining first = train_task(parallel), second = train_task(plain);
        for (std::size_t i = 0; i < first.steps.size(); ++i) {
            EXPECT_NEAR(first.steps[i].loss, second.steps[i].loss, 1e-3) << name_of(mixer_names, mixer) << " " << i;
            EXPECT_GE(first.steps[i].iterations, 1);
            EXPECT_EQ(second.steps[i].iterations, 0);
            EXPECT_LE(first.steps[i].residual, 1e-4);
            EXPECT_EQ(std::isfinite(first.steps[i].lyapunov), i % 10 == 0) << i;
        }
    }
}

TEST_F(TaskTrainings, ResumeToTheSameBits) {
    for (const Mixer mixer : {Mixer::para_lstm, Mixer::attention}) {
        TaskTrainingOptions whole = options(mixer);
        whole.steps = 60;
        whole.learning_rate = 2e-2;
        whole.validation_interval = 27;
        SCOPED_TRACE(name_of(mixer_names, mixer));
        expect_same_bits_where_resumed(train_task, whole, 27);
    }
}

TEST_F(TaskTrainings, ValidateAsTheTrainingDid) {
    TaskTrainingOptions training = options(Mixer::slstm, SequenceTask::hops);
    const TaskTraining result = train_task(training);
    EXPECT_TRUE(is_task(training.checkpoint));
    const TaskTrainingOptions kept = task_options(training.checkpoint);
    EXPECT_EQ(kept.task.task, SequenceTask::hops);
    EXPECT_EQ(kept.model.vocabulary, 5);
    TaskValidationOptions validation;
    validation.evaluation = kept.evaluation;
    validation.batch = 7;  // other pieces of the same sequences
    const TaskValidation found = validate_task(training.checkpoint, validation);
    EXPECT_EQ(found.accuracy, result.validations.back().accuracy);
    EXPECT_NEAR(found.loss, result.validations.back().loss, 1e-5);
    EXPECT_EQ(found.step, 30);
    validation.length = -1;
    EXPECT_THROW(validate_task(training.checkpoint, validation), InvalidArgument);
}

TEST_F(TaskTrainings, StopOrSkipWhereALossIsNotFinite) { expect_stop_or_skip(train_task, options()); }

TEST_F(TaskTrainings, UseThePreviousCheckpointWhereOneIsDamaged) {
    TaskTrainingOptions training = options();
    training.checkpoint_interval = 10;
    const auto expected = losses(train_task(training));
    damage(training.checkpoint);
    EXPECT_THROW(validate_task(training.checkpoint, {}), FileError);
    std::string note;
    TaskCallbacks callbacks;
    callbacks.note = [&](const std::string& text) { note = text; };
    training.resume = training.checkpoint;
    const TaskTraining resumed = train_task(training, callbacks);
    EXPECT_THAT(note, HasSubstr("task.safetensors.previous is used"));
    ASSERT_EQ(resumed.steps.size(), 10u);
    EXPECT_EQ(resumed.steps.back().loss, expected.back());
}

TEST_F(TaskTrainings, RefuseWhatCannotBeOrDoesNotContinue) {
    TaskTrainingOptions training = options();
    training.steps = 3;
    train_task(training);
    const auto with = [&](auto change) -> std::string {
        TaskTrainingOptions changed = training;
        change(changed);
        return message_of<Error>([&] { train_task(changed); });
    };
    EXPECT_THAT(with([](auto& o) { o.first_length = 25; }), HasSubstr("first_length: expected 1 to length = 24, or 0"));
    EXPECT_THAT(with([](auto& o) { o.growth = 1.5; }), HasSubstr("growth: expected 0 to 1"));
    EXPECT_THAT(with([](auto& o) { o.enough = -1; }), HasSubstr("enough"));
    EXPECT_THAT(with([](auto& o) { o.recurrent_scale = INFINITY; }), HasSubstr("recurrent_scale"));
    training.resume = training.checkpoint;
    EXPECT_THAT(with([](auto& o) { o.batch = 5; }), HasSubstr("batch: expected 8, as in the checkpoint, got 5"));
    EXPECT_THAT(with([](auto& o) { o.task.task = SequenceTask::hops; }), HasSubstr("task: expected parity"));
    EXPECT_THAT(with([](auto& o) { o.device = "toaster"; }), HasSubstr("device: expected cpu"));
    EXPECT_THAT(with([&](auto& o) { o.resume = folder / "nowhere"; }), HasSubstr("nowhere"));
}

}  // namespace
}  // namespace deeppcr::nn
