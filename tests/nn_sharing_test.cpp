// Trainings that several ranks share: they compute what one process does, say alike how they end, and send what
// docs/scaling.md says. Simulated here, and as processes by mpirun (Processes*).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <mutex>

#include <deeppcr/group.hpp>
#include <deeppcr/nn/diffusion.hpp>
#include <deeppcr/nn/fashion_mnist.hpp>
#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/tokens.hpp>
#include <deeppcr/nn/training.hpp>

#include "nn/language_model.hpp"
#include "nn/saved_state.hpp"
#include "nn/sharing.hpp"
#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using testing::HasSubstr;

class OnRanks : public testing::TestWithParam<int> {
protected:
    /// body(group) on every rank: of mpirun, or simulated.
    static void run(const std::function<void(Group&)>& body) {
        if (GetParam() == 0)
            body(Group::world());
        else
            Group::simulate(GetParam(), body);
    }
    static int ranks() { return GetParam() == 0 ? Group::world().size() : GetParam(); }

    /// One folder for all ranks. Its text has a letter Q only in the sixth sequence of step 2.
    OnRanks() {
        folder =
            fs::temp_directory_path() / ("deeppcr-sharing-" + std::to_string(GetParam() == 0 ? getppid() : getpid()));
        if (GetParam() == 0) Group::world().barrier();
        if (first()) {
            fs::create_directories(folder);
            std::string text;
            for (int i = 0; i < 60; ++i) text += "line " + std::to_string(i * i % 97) + " of a text.\n";
            const index training = index(text.size()) - index(std::lround(0.05 * double(text.size())));
            const Tensor order = shuffled((training - 1) / context, 1, 0);
            text[std::size_t(order[batch + 5].item<index>() * context + 6)] = 'Q';
            std::ofstream(folder / "text", std::ios::binary) << text;
            PrepareOptions prepared;
            prepared.texts = {folder / "text"};
            prepared.output = folder / "tokens";
            prepare_tokens(prepared);
        }
        if (GetParam() == 0) Group::world().barrier();
    }
    ~OnRanks() override {
        if (GetParam() == 0) Group::world().barrier();
        if (first()) fs::remove_all(folder);
    }
    static bool first() { return GetParam() > 0 || Group::world().rank() == 0; }

    LanguageTrainingOptions small(Sharing share, Group* group) const {
        LanguageTrainingOptions options;
        options.model.width = 12;
        options.model.layers = 2;
        options.model.mixer = Mixer::para_gru;
        options.evaluation.method = Method::sequential;
        options.evaluation.execution.threads = 1;
        options.tokens = folder / "tokens";
        options.context = context;
        options.batch = batch;
        options.steps = 4;
        options.warm_up = 2;
        options.estimate_interval = 2;
        options.validation_interval = 3;
        options.group = group;
        options.share = share;
        return options;
    }

    static constexpr index context = 13, batch = 8;
    fs::path folder;
};
INSTANTIATE_TEST_SUITE_P(Processes, OnRanks, testing::Values(0));
INSTANTIATE_TEST_SUITE_P(Threads, OnRanks, testing::Values(1, 2, 4));

/// Floats of a few dozen terms, summed in another order, after a few steps of AdamW, which divides by the root of small
/// gradients.
constexpr double rounding = 2e-4;

void expect_near(const LanguageTraining& found, const LanguageTraining& expected, double tolerance = rounding) {
    ASSERT_EQ(found.steps.size(), expected.steps.size());
    for (std::size_t i = 0; i < found.steps.size(); ++i) {
        EXPECT_NEAR(found.steps[i].loss, expected.steps[i].loss, tolerance) << i;
        EXPECT_NEAR(found.steps[i].gradient_norm, expected.steps[i].gradient_norm, 20 * tolerance) << i;
        EXPECT_EQ(found.steps[i].tokens, expected.steps[i].tokens);
        EXPECT_EQ(found.steps[i].skipped, expected.steps[i].skipped);
    }
    ASSERT_EQ(found.validations.size(), expected.validations.size());
    for (std::size_t i = 0; i < found.validations.size(); ++i) {
        EXPECT_EQ(found.validations[i].tokens, expected.validations[i].tokens);
        EXPECT_NEAR(found.validations[i].loss, expected.validations[i].loss, tolerance) << i;
    }
}

/// Whether all ranks have the same bits.
void expect_shared(Group& group, const LanguageTraining& found) {
    std::vector<double> numbers;
    for (const auto& step : found.steps) numbers.insert(numbers.end(), {step.loss, step.gradient_norm});
    for (const auto& validation : found.validations) numbers.push_back(validation.loss);
    std::vector<double> all(numbers.size() * std::size_t(group.size()));
    group.gather(std::span<const double>(numbers), std::span(all));
    for (std::size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], numbers[i % numbers.size()]) << to_string(group);
}

TEST_P(OnRanks, SumsOfTensorsAreThoseOfTheGroup) {
    run([](Group& group) {
        EXPECT_THROW(sum_over(group, {at::zeros({2}, at::kLong)}), InvalidArgument);
        const double rank = group.rank(), ranks = group.size();
        const Tensor floats = at::full({3, 700}, 0.5 + rank, at::kFloat), numbers = at::full({2}, rank, at::kDouble);
        const Tensor columns = at::full({5, 4}, 1 + rank, at::kFloat).t(), none = at::empty({0});
        group.reset_traffic();
        sum_over(group, {floats, numbers, columns, none});
        EXPECT_TRUE(floats.equal(at::full({3, 700}, ranks * ranks / 2)));
        EXPECT_TRUE(numbers.equal(at::full({2}, ranks * (ranks - 1) / 2, at::kDouble)));
        EXPECT_TRUE(columns.equal(at::full({4, 5}, ranks * (ranks + 1) / 2)));
        if (group.size() == 2) {  // one message for each type
            EXPECT_EQ(group.traffic(), (Group::Traffic{2, 4 * (2100 + 20) + 8 * 2}));
        }
    });
}

TEST_P(OnRanks, LanguageModelsAreThoseOfOneProcess) {
    run([this](Group& group) {
        for (const Sharing share : {Sharing::sequences, Sharing::steps})
            for (const Mixer mixer : {Mixer::para_gru, Mixer::para_lstm, Mixer::slstm, Mixer::lstm}) {
                if (GetParam() == 0 && mixer != Mixer::para_lstm) continue;  // processes wait long for each other
                if (share == Sharing::steps && mixer == Mixer::lstm) continue;
                LanguageTrainingOptions options = small(share, nullptr);
                options.model.mixer = mixer;
                options.model.tied = mixer != Mixer::slstm;
                options.micro_batch = mixer == Mixer::para_lstm ? 2 : 0;
                options.recompute = mixer == Mixer::para_lstm;
                options.penalty = share == Sharing::sequences && mixer == Mixer::slstm ? 0.1 : 0;
                const LanguageTraining alone = train_language_model(options);
                options.group = &group;
                const LanguageTraining found = train_language_model(options);
                expect_near(found, alone);
                expect_shared(group, found);
                expect_near(train_language_model(options), found, 0);
                if (share == Sharing::sequences) {
                    for (std::size_t i = 0; i < found.steps.size(); ++i) {
                        const double expected = alone.steps[i].lyapunov;
                        if (std::isnan(expected))
                            EXPECT_TRUE(std::isnan(found.steps[i].lyapunov));
                        else
                            EXPECT_NEAR(found.steps[i].lyapunov, expected, 1e-3);
                    }
                }
            }
    });
}

TEST_P(OnRanks, StepsAreSharedByEveryMethod) {
    run([this](Group& group) {
        for (const Method method : {Method::newton, Method::overlap, Method::shooting}) {
            LanguageTrainingOptions options = small(Sharing::steps, nullptr);
            options.evaluation.method = method;
            options.evaluation.chunk = 3;
            const LanguageTraining alone = train_language_model(options);
            options.group = &group;
            const LanguageTraining found = train_language_model(options);
            expect_near(found, alone);
            for (const LanguageStep& step : found.steps) {
                EXPECT_LE(step.status, Status::finished_sequentially);
                EXPECT_GE(step.iterations, 1);
                EXPECT_EQ(std::isnan(step.lyapunov), step.step % 2 == 0 || (method != Method::newton && ranks() > 1));
            }
            expect_shared(group, found);
            expect_near(train_language_model(options), found, 0);
        }
    });
}

TEST_P(OnRanks, LanguageModelsGoOnOnOtherNumbersOfRanks) {
    run([this](Group& group) {
        for (const Sharing share : {Sharing::sequences, Sharing::steps}) {
            LanguageTrainingOptions options = small(share, nullptr);
            const LanguageTraining whole = train_language_model(options);
            index asked = 0, last = group.size() - 1;
            LanguageCallbacks callbacks;
            // One rank alone is told to stop, after two steps.
            callbacks.interrupted = [&] { return ++asked == 2 && group.rank() == last; };
            options.group = &group;
            options.checkpoint = folder / "lm.safetensors";
            LanguageTraining begun = train_language_model(options, callbacks);
            EXPECT_TRUE(begun.interrupted);
            ASSERT_EQ(begun.steps.size(), 2u);
            // Back to one process, which writes to another file on each rank.
            options.resume = options.checkpoint;
            options.checkpoint.clear();
            options.group = nullptr;
            LanguageTraining rest = train_language_model(options);
            begun.steps.insert(begun.steps.end(), rest.steps.begin(), rest.steps.end());
            begun.validations.insert(begun.validations.end(), rest.validations.begin(), rest.validations.end());
            expect_near(begun, whole);
            // The same number of ranks: the same bits.
            options.group = &group;
            const LanguageTraining shared = train_language_model(options);
            options.resume.clear();
            const LanguageTraining uninterrupted = train_language_model(options);
            ASSERT_EQ(shared.steps.size(), 2u);
            for (std::size_t i = 0; i < 2; ++i) EXPECT_EQ(shared.steps[i].loss, uninterrupted.steps[i + 2].loss);
        }
    });
}

TEST_P(OnRanks, ALossThatIsNoNumberOnOneRankStopsOrSkipsOnAll) {
    run([this](Group& group) {
        for (const Sharing share : {Sharing::sequences, Sharing::steps})
            for (const OnDivergence choice : {OnDivergence::stop, OnDivergence::skip}) {
                LanguageTrainingOptions options = small(share, &group);
                options.model.tied = false;  // or every logit would be no number
                options.on_divergence = choice;
                options.checkpoint = folder / "begun.safetensors";
                index asked = 0;
                LanguageCallbacks callbacks;
                callbacks.interrupted = [&] { return ++asked == 1; };
                (void)train_language_model(options, callbacks);
                if (group.rank() == 0) {
                    SavedState state = read_state(options.checkpoint, "deeppcr language model 1");
                    state.tensors.at("embedding")[index('Q')].fill_(std::nan(""));
                    write_state(options.checkpoint, state);
                }
                group.barrier();
                options.resume = options.checkpoint;
                options.checkpoint = folder / "goes-on.safetensors";
                asked = 0;
                index notes = 0;
                callbacks.note = [&](const std::string& note) {
                    EXPECT_THAT(note, HasSubstr("the loss of step 2 is not finite"));
                    ++notes;
                };
                if (choice == OnDivergence::stop) {
                    EXPECT_THROW(train_language_model(options), TrainingDiverged) << to_string(group);
                } else {
                    const LanguageTraining found = train_language_model(options, callbacks);
                    ASSERT_EQ(found.steps.size(), 1u);
                    EXPECT_TRUE(found.steps[0].skipped) << to_string(group);
                    EXPECT_TRUE(std::isnan(found.steps[0].loss));
                    EXPECT_EQ(notes, group.rank() == 0 ? 1 : 0);
                }
                group.barrier();
            }
    });
}

// Their data take longer to read than they to train: on few ranks.

TEST(Sharing, ResidualNetworksAreThoseOfOneProcess) {
    for (const Method method : {Method::sequential, Method::newton}) {
        TrainingOptions options;
        options.layers = options.width = 6;
        options.evaluation.method = method;
        options.evaluation.execution.threads = 1;
        options.train_images = 64;
        options.held_out = 90;  // no multiple of the batch
        options.batch = 16;
        options.steps = 5;  // an epoch and a step
        options.test = false;
        const TrainingResult alone = train(options);
        Group::simulate(2, [&](Group& group) {
            TrainingOptions shared = options;
            shared.group = &group;
            const TrainingResult found = train(shared), again = method == Method::newton ? train(shared) : found;
            ASSERT_EQ(found.steps.size(), 5u);
            for (std::size_t i = 0; i < 5; ++i) {
                EXPECT_NEAR(found.steps[i].loss, alone.steps[i].loss, rounding);
                EXPECT_NEAR(found.steps[i].gradient_norm, alone.steps[i].gradient_norm, 20 * rounding);
                EXPECT_NEAR(found.steps[i].accuracy, alone.steps[i].accuracy, 1e-12);
                EXPECT_EQ(found.steps[i].loss, again.steps[i].loss);
                EXPECT_EQ(found.steps[i].iterations > 0, method == Method::newton);
            }
            ASSERT_EQ(found.epochs.size(), 2u);
            EXPECT_EQ(found.epochs[0].validation.images, 90);
            EXPECT_NEAR(found.epochs[0].validation.loss, alone.epochs[0].validation.loss, rounding);
            EXPECT_NEAR(found.epochs[1].validation.accuracy, alone.epochs[1].validation.accuracy, 0.03);
        });
    }
}

TEST(Sharing, DiffusionModelsAreThoseOfOneProcess) {
    DiffusionOptions options;
    options.latents = 4;
    options.hidden = 16;
    options.blocks = 1;
    options.train_images = 64;
    options.batch = 16;
    options.autoencoder_steps = 3;
    options.steps = 4;
    const DiffusionTraining alone = train_diffusion(options);
    Group::simulate(4, [&](Group& group) {
        DiffusionOptions shared = options;
        shared.group = &group;
        const DiffusionTraining found = train_diffusion(shared);
        ASSERT_EQ(found.steps.size(), 7u);
        for (std::size_t i = 0; i < 7; ++i) {
            EXPECT_NEAR(found.steps[i].loss, alone.steps[i].loss, rounding);
            EXPECT_NEAR(found.steps[i].gradient_norm, alone.steps[i].gradient_norm, 20 * rounding);
        }
    });
}

TEST_P(OnRanks, WhatCannotBeSharedIsRefused) {
    run([this](Group& group) {
        const auto message = [&](Sharing share, const std::function<void(LanguageTrainingOptions&)>& change) {
            LanguageTrainingOptions options = small(share, &group);
            change(options);
            return message_of([&] { train_language_model(options); });
        };
        EXPECT_THAT(message(Sharing::steps, [](auto& o) { o.model.mixer = Mixer::attention; }),
                    HasSubstr("share: expected sequences"));
        if (group.size() == 1) return;
        const std::string ranks = std::to_string(group.size());
        EXPECT_THAT(message(Sharing::sequences, [](auto& o) { o.batch = 9; }),
                    HasSubstr("batch: expected a multiple of the " + ranks + " ranks, got 9"));
        EXPECT_THAT(message(Sharing::steps, [](auto& o) { o.context = 1; }),
                    HasSubstr("context: expected at least the " + ranks + " ranks, got 1"));
        EXPECT_THAT(message(Sharing::steps, [](auto& o) { o.penalty = 1; }),
                    HasSubstr("penalty: expected 0 where processes share the steps"));
        EXPECT_THAT(message(Sharing::sequences, [](auto& o) { o.micro_batch = 8; }),
                    HasSubstr("micro_batch: expected a divisor of " + std::to_string(8 / group.size())));
        TrainingOptions resnet;
        resnet.batch = 9;
        resnet.group = &group;
        EXPECT_THROW(train(resnet), InvalidArgument);
        DiffusionOptions diffusion;
        diffusion.batch = 9;
        diffusion.group = &group;
        EXPECT_THROW(train_diffusion(diffusion), InvalidArgument);
    });
}

// ---------------------------------------------------------------------------------------------- what is sent

/// What a rank sends in a sum or maximum of so many values of so many bytes.
Group::Traffic reduction(const Group& group, index values, index bytes) {
    const index ranks = group.size(), rank = group.rank();
    if (values / ranks >= 1024 && ranks > 2) {
        const index own = values * (rank + 1) / ranks - values * rank / ranks;
        return {2 * (ranks - 1), bytes * (values - own + (ranks - 1) * own)};
    }
    const index messages = std::bit_width(unsigned(ranks)) - 1;  // powers of two only
    return {messages, messages * values * bytes};
}

/// docs/scaling.md has these formulas.
TEST_P(OnRanks, TrainingsSendWhatTheDocumentationSays) {
    if (!std::has_single_bit(unsigned(ranks()))) GTEST_SKIP() << "for powers of two";
    run([this](Group& group) {
        for (const Sharing share : {Sharing::sequences, Sharing::steps}) {
            LanguageTrainingOptions options = small(share, &group);
            options.micro_batch = 2;
            options.estimate_interval = 0;
            options.validation_interval = 0;
            const auto sent = [&](index steps) {
                options.steps = steps;
                group.reset_traffic();
                (void)train_language_model(options);
                return std::array<Group::Traffic, 3>{group.traffic(Group::Purpose::reduce),
                                                     group.traffic(Group::Purpose::scan),
                                                     group.traffic(Group::Purpose::pass)};
            };
            const auto two = sent(2), five = sent(5);
            LanguageModel model(small(share, nullptr).model);
            index parameters = 0, recurrent = 0;
            for (const Tensor& tensor : model.parameters()) parameters += tensor.numel();
            for (const Tensor& tensor : model.recurrent_parameters()) recurrent += tensor.numel();

            Group::Traffic reduced, scanned, passed;
            const auto add = [](Group::Traffic& sum, const Group::Traffic& more, index times = 1) {
                sum.messages += times * more.messages;
                sum.bytes += times * more.bytes;
            };
            const bool steps = share == Sharing::steps;
            const index layers = options.model.layers, width = options.model.width, at_once = options.micro_batch;
            const index micro_batches = options.batch / at_once / (steps ? 1 : group.size());
            const index summed = steps ? parameters - recurrent : parameters;
            add(reduced, reduction(group, summed, 4));            // gradients
            add(reduced, reduction(group, 1, 8), micro_batches);  // losses
            add(reduced, reduction(group, 2, 8));                 // figures
            add(reduced, reduction(group, 4, 8));
            add(reduced, reduction(group, 1, 8));  // interruptions
            if (steps && group.size() > 1) {
                const index cells = layers * micro_batches, state = at_once * width * 4;
                const index scans = [&] {
                    index messages = 0;
                    for (int distance = 1; group.rank() + distance < group.size(); distance *= 2) ++messages;
                    return messages;
                }();
                index back = 0;  // from the last rank
                for (int distance = 1; group.size() - 1 - group.rank() + distance < group.size(); distance *= 2) ++back;
                const index next = group.rank() + 1 < group.size() ? 1 : 0;
                // Evaluated sequentially, and the adjoint.
                for (const index bytes : {152, 8, 8, 24 * int(at_once), 8, 8, 152, 8, 8})
                    add(reduced, reduction(group, bytes, 1), cells);
                add(reduced, reduction(group, recurrent / layers, 4), cells);
                add(scanned, {scans, scans * 8}, cells);
                add(scanned, {back, back * state * 2}, cells);
                add(passed, {2 * next, 2 * next * state}, cells);
            }
            const auto expect_sent = [&](std::size_t purpose, const Group::Traffic& expected, const char* what) {
                EXPECT_EQ(five[purpose].messages - two[purpose].messages, 3 * expected.messages)
                    << what << ", " << to_string(group) << ", " << int(share);
                EXPECT_EQ(five[purpose].bytes - two[purpose].bytes, 3 * expected.bytes)
                    << what << ", " << to_string(group) << ", " << int(share);
            };
            expect_sent(0, reduced, "reductions");
            expect_sent(1, scanned, "scans");
            expect_sent(2, passed, "states");
        }
    });
}

}  // namespace
}  // namespace deeppcr::nn
