// Language models: what they compute, their gradients, their plan, their training, and text from them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <cmath>
#include <fstream>

#include <deeppcr/nn/cell.hpp>
#include <deeppcr/nn/language_model.hpp>
#include <deeppcr/nn/tokens.hpp>
#include <files/error.hpp>
#include <files/safetensors.hpp>
#include <files/tokens.hpp>

#include "nn/jacobian_growth.hpp"
#include "nn/language_model.hpp"
#include "tests/messages.hpp"
#include "tests/trainings.hpp"

namespace deeppcr::nn {
namespace {

namespace fs = std::filesystem;
using at::Tensor;
using deeppcr::index;  // not strings.h's
using testing::HasSubstr;

const std::vector<Mixer> mixers = {Mixer::para_gru, Mixer::para_lstm, Mixer::slstm,
                                   Mixer::linear,   Mixer::lstm,      Mixer::attention};

LanguageModelOptions small(Mixer mixer) {
    LanguageModelOptions options;
    options.mixer = mixer;
    options.vocabulary = 11;
    options.width = 12;
    options.layers = 2;
    options.heads = 2;
    if (mixer == Mixer::lstm || mixer == Mixer::linear) options.heads = 1;
    return options;
}

Options sequential() {
    Options options;
    options.execution.threads = 1;
    options.method = Method::sequential;
    return options;
}

Tensor some_tokens(index steps, index batch, std::uint64_t seed = 1) {
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    return at::empty({steps, batch}, at::kLong).random_(0, 11, generator);
}

double difference(const Tensor& a, const Tensor& b) { return (a - b).abs().max().item<double>(); }

class LanguageModels : public testing::TestWithParam<Mixer> {};

TEST_P(LanguageModels, CountTheirParametersAsThePlanDoes) {
    for (const bool tied : {true, false})
        for (const index heads : {0, 2})
            for (const index hidden : {0, 20}) {
                LanguagePlanOptions planned;
                planned.model = small(GetParam());
                planned.model.tied = tied;
                planned.model.heads = heads;
                planned.model.hidden = hidden;
                const LanguagePlan plan = plan_language_model(planned);
                const LanguageModel model(planned.model);
                index found = 0;
                for (const auto& parameter : model.parameters()) found += parameter.numel();
                EXPECT_EQ(plan.parameters, found) << tied << heads << hidden;
            }
}

TEST_P(LanguageModels, HaveAboutAsManyParametersAsParaGru) {
    for (const auto& size : language_configurations) {
        LanguagePlanOptions planned;
        planned.model.width = size.width;
        planned.model.layers = size.layers;
        const double expected = double(plan_language_model(planned).parameters);
        planned.model.mixer = GetParam();
        EXPECT_NEAR(double(plan_language_model(planned).parameters), expected, 0.005 * expected) << size.name;
    }
}

TEST_P(LanguageModels, GenerateWhatTheForwardPassGives) {
    // A prompt in one piece, then token after token: the logits of the whole text at once.
    const at::NoGradGuard no_gradients;
    LanguageModel model(small(GetParam()));
    model.set_evaluation(sequential());
    const Tensor tokens = some_tokens(23, 3);
    const Tensor all = model.forward(tokens);
    LanguageModel::State state;
    std::vector<Tensor> parts = {model.forward(tokens.narrow(0, 0, 9), &state)};
    for (index t = 9; t < 23; ++t) parts.push_back(model.forward(tokens.narrow(0, t, 1), &state));
    EXPECT_LT(difference(at::cat(parts), all), 2e-5);
}

TEST_P(LanguageModels, DoNotSeeTheFuture) {
    const at::NoGradGuard no_gradients;
    LanguageModel model(small(GetParam()));
    const Tensor tokens = some_tokens(16, 2);
    Tensor changed = tokens.clone();
    changed.narrow(0, 10, 6).copy_(some_tokens(6, 2, 7));
    const Tensor first = model.forward(tokens), second = model.forward(changed);
    EXPECT_LT(difference(first.narrow(0, 0, 10), second.narrow(0, 0, 10)), 1e-5);
    EXPECT_GT(difference(first.narrow(0, 11, 5), second.narrow(0, 11, 5)), 1e-3);
}

TEST_P(LanguageModels, HaveTheGradientsOfFiniteDifferences) {
    LanguageModelOptions options = small(GetParam());
    options.layers = 1;
    LanguageModel model(options);
    model.to(at::kDouble);
    model.set_evaluation(sequential());
    const Tensor tokens = some_tokens(8, 2);
    model.loss(tokens).backward();
    const at::NoGradGuard no_gradients;
    for (auto& named : model.named_parameters()) {
        Tensor values = named.value().view({-1});
        const Tensor gradient = named.value().grad().reshape({-1});
        // The largest component, and another one.
        for (const index at : {gradient.abs().argmax().item<index>(), values.numel() / 2}) {
            const double step = 1e-5, before = values[at].item<double>();
            values[at] = before + step;
            const double above = model.loss(tokens).item<double>();
            values[at] = before - step;
            const double below = model.loss(tokens).item<double>();
            values[at] = before;
            EXPECT_NEAR((above - below) / (2 * step), gradient[at].item<double>(), 1e-8) << named.key() << " " << at;
        }
    }
}

TEST_P(LanguageModels, RecomputeTheSameGradients) {
    std::vector<Tensor> gradients[2];
    for (const bool recompute : {false, true}) {
        LanguageModel model(small(GetParam()));
        model.set_evaluation(sequential());
        model.recompute = recompute;
        model.loss(some_tokens(9, 3)).backward();
        for (const auto& parameter : model.parameters()) gradients[recompute].push_back(parameter.grad());
    }
    for (std::size_t i = 0; i < gradients[0].size(); ++i) EXPECT_TRUE(gradients[0][i].equal(gradients[1][i]));
}

INSTANTIATE_TEST_SUITE_P(Each, LanguageModels, testing::ValuesIn(mixers),
                         [](const auto& mixer) { return name_of(mixer_names, mixer.param); });

// ------------------------------------------------------------------------------------------------- the penalty

class JacobianGrowth : public testing::TestWithParam<Mixer> {
protected:
    CellKind kind() const {
        return GetParam() == Mixer::para_gru    ? CellKind::para_gru
               : GetParam() == Mixer::para_lstm ? CellKind::para_lstm
                                                : CellKind::slstm;
    }
    /// A model in double, recurrent enough for disturbances to grow here and there.
    LanguageModel growing() const {
        LanguageModelOptions options = small(GetParam());
        LanguageModel model(options);
        model.to(at::kDouble);
        model.set_evaluation(sequential());
        model.measure_growth(-0.05);
        const at::NoGradGuard no_gradients;
        for (Tensor& parameters : model.recurrent_parameters()) parameters.mul_(5);
        return model;
    }
};

TEST_P(JacobianGrowth, IsWhatDisturbancesOfTheStateGrowBy) {
    const CellSizes sizes = sizes_of(kind());
    const index channels = 6, batch = 3, window = 16, states = sizes.states;
    at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(std::uint64_t(3));
    const auto random = [&](at::IntArrayRef shape, double scale) {
        return at::empty(shape, at::kDouble).normal_(0, scale, generator);
    };
    CellTensors layer;
    layer.gates = random({3 * window + 7, batch, sizes.inputs * channels}, 1);
    layer.parameters = random({sizes.parameters, channels}, 2);
    CellOptions options;
    options.evaluation = sequential();
    layer.states = cell(kind(), layer.gates, layer.parameters, {}, options);

    std::vector<Tensor> rates;
    for (const index first : {index(0), window, 2 * window}) {
        const Tensor gates = layer.gates.narrow(0, first, window);
        const Tensor before = first == 0 ? at::zeros({batch, channels * states}, at::kDouble) : layer.states[first - 1];
        Tensor squares = at::zeros({batch, channels}, at::kDouble);
        for (index k = 0; k < states; ++k) {
            Tensor disturbance = at::zeros({batch, channels, states}, at::kDouble);
            const double size = 1e-6;
            disturbance.select(2, k).fill_(size);
            disturbance = disturbance.view({batch, -1});
            const auto end = [&](const Tensor& initial) {
                return cell(kind(), gates, layer.parameters, initial, options)[window - 1];
            };
            const Tensor gain = (end(before + disturbance) - end(before - disturbance)) / (2 * size);
            squares += gain.view({batch, channels, states}).square().sum(2);
        }
        rates.push_back(at::log(squares / double(states)) / (2 * window));
    }
    for (const double rate : {-0.3, 0.0, 0.02}) {
        const double expected = (at::stack(rates) - rate).clamp_min(0).mean().item<double>();
        EXPECT_GT(expected, 1e-4) << rate;
        EXPECT_NEAR(jacobian_growth(kind(), layer, rate).item<double>(), expected, 1e-8) << rate;
    }
}

TEST_P(JacobianGrowth, HasTheGradientOfFiniteDifferences) {
    LanguageModel model = growing();
    const Tensor tokens = some_tokens(38, 2);
    const auto goal = [&] {
        const Tensor loss = model.loss(tokens);
        return loss + 3 * model.growth();
    };
    goal().backward();
    EXPECT_GT(model.growth().item<double>(), 3e-4);
    const at::NoGradGuard no_gradients;
    for (auto& named : model.named_parameters()) {
        Tensor values = named.value().view({-1});
        const Tensor gradient = named.value().grad().reshape({-1});
        const auto at = gradient.abs().argmax().item<index>();
        const double step = 1e-6, before = values[at].item<double>();
        values[at] = before + step;
        const double above = goal().item<double>();
        values[at] = before - step;
        const double below = goal().item<double>();
        values[at] = before;
        EXPECT_NEAR((above - below) / (2 * step), gradient[at].item<double>(), 1e-6) << named.key();
    }
}

TEST_P(JacobianGrowth, IsTheSameWhereBlocksAreRecomputed) {
    std::vector<Tensor> gradients[2];
    double growths[2];
    for (const bool recompute : {false, true}) {
        LanguageModel model = growing();
        model.recompute = recompute;
        const Tensor loss = model.loss(some_tokens(20, 2));
        growths[recompute] = model.growth().item<double>();
        (loss + model.growth()).backward();
        for (const auto& parameter : model.parameters()) gradients[recompute].push_back(parameter.grad());
    }
    EXPECT_EQ(growths[0], growths[1]);
    for (std::size_t i = 0; i < gradients[0].size(); ++i)
        EXPECT_LT(difference(gradients[0][i], gradients[1][i]), 1e-12);
}

INSTANTIATE_TEST_SUITE_P(Each, JacobianGrowth, testing::Values(Mixer::para_gru, Mixer::para_lstm, Mixer::slstm),
                         [](const auto& mixer) { return name_of(mixer_names, mixer.param); });

TEST(LanguagePlan, CountsBytesAndOperations) {
    LanguagePlanOptions options;
    options.model.width = 16;
    options.model.layers = 1;
    options.model.mlp = 8;
    options.model.vocabulary = 10;
    options.context = 4;
    options.batch = 6;
    options.devices = 3;
    const LanguagePlan plan = plan_language_model(options);
    // Projection 3 x 16 x 16, gate and output 2 x 16 x 16, MLP 3 x 16 x 8, embedding as the head 10 x 16.
    EXPECT_EQ(plan.forward_flops, 2.0 * (5 * 256 + 3 * 128 + 160));
    EXPECT_EQ(plan.training_flops, 3 * plan.forward_flops);
    EXPECT_EQ(plan.step_flops, plan.training_flops * 8);
    EXPECT_EQ(plan.optimiser, 8 * plan.parameters);
    EXPECT_EQ(plan.activations, plan.activations_per_token * 4 * 2);
    options.recompute = true;
    EXPECT_EQ(plan_language_model(options).training_flops, 4 * plan.forward_flops);
    options.batch = 7;
    EXPECT_THROW(plan_language_model(options), InvalidArgument);
}

TEST(LanguagePlan, NamesTheArgumentThatCannotBe) {
    const auto error_of = [](auto change) -> std::string {
        LanguageModelOptions options = small(Mixer::para_gru);
        change(options);
        return message_of([&] { completed(options); });
    };
    EXPECT_THAT(error_of([](auto& o) { o.width = 0; }), HasSubstr("width: expected 1 to 2^20, got 0"));
    EXPECT_THAT(error_of([](auto& o) { o.heads = 5; }), HasSubstr("width: expected a multiple of heads = 5, got 12"));
    EXPECT_THAT(error_of([](auto& o) { o.layers = -1; }), HasSubstr("layers"));
    EXPECT_THAT(error_of([](auto& o) { o.mixer = Mixer::attention, o.hidden = 9, o.heads = 3; }), HasSubstr("hidden"));
}

TEST(Vocabulary, GivesTextBack) {
    std::string text;
    for (int i = 0; i < 300; ++i)
        text += "line " + std::to_string(i * i) + ":  two spaces, a \t tab, caf\xc3\xa9 \xe2\x82\xac\n";
    const fs::path folder = testing::TempDir();
    const fs::path input = folder / "vocabulary-test.txt", output = folder / "vocabulary-test.tokens";
    std::ofstream(input, std::ios::binary) << text;
    for (const index pieces : {0, 400}) {
        PrepareOptions options;
        options.texts = {input};
        options.output = output;
        options.pieces = pieces;
        options.validation = 0.1;
        const PreparedTokens prepared = prepare_tokens(options);
        EXPECT_EQ(prepared.bytes, index(text.size()));
        EXPECT_EQ(prepared.vocabulary_size, pieces > 0 ? pieces : 256);
        const files::TokenFile file(output);
        EXPECT_NEAR(double(file.counts().validation), 0.1 * double(file.tokens()), 1);
        EXPECT_LE(file.tokens(), index(text.size()) / (pieces > 0 ? 2 : 1));
        const Vocabulary vocabulary(file.vocabulary());
        EXPECT_EQ(vocabulary.name(), prepared.vocabulary);
        std::vector<std::int64_t> tokens(std::size_t(file.tokens()));
        file.read(0, file.tokens(), tokens.data());
        std::string found;
        for (const auto token : tokens) found += vocabulary.text(token);
        EXPECT_EQ(found, text) << pieces << " pieces";
    }
    EXPECT_THROW(Vocabulary("no model"), InvalidArgument);
    EXPECT_THROW(Vocabulary().text(256), InvalidArgument);
    fs::remove(input);
    fs::remove(output);
}

/// Trains on a text that repeats itself with variations.
class LanguageTrainings : public testing::Test {
protected:
    LanguageTrainings() {
        std::string name = testing::TempDir() + "deeppcr-language-XXXXXX";
        folder = mkdtemp(name.data());
        std::string text;
        std::uint32_t random = 1;
        for (int i = 0; i < 400; ++i) {
            random = random * 1664525 + 1013904223;
            text +=
                std::string(random >> 31 != 0 ? "the cat " : "the dog ") + (random >> 30 & 1 ? "sat" : "ran") + ".\n";
        }
        std::ofstream(folder / "text", std::ios::binary) << text;
        PrepareOptions prepare;
        prepare.texts = {folder / "text"};
        prepare.output = folder / "tokens";
        prepare_tokens(prepare);
    }
    ~LanguageTrainings() override { fs::remove_all(folder); }

    LanguageTrainingOptions options(Mixer mixer = Mixer::para_gru) const {
        LanguageTrainingOptions result;
        result.model = small(mixer);
        result.model.width = 16;
        result.tokens = folder / "tokens";
        result.checkpoint = folder / "lm.safetensors";
        result.context = 24;
        result.batch = 6;
        result.steps = 30;
        result.warm_up = 5;
        result.learning_rate = 1e-2;
        result.evaluation.chunk = 8;
        result.evaluation.execution.threads = 1;  // so small that more would wait for each other
        return result;
    }

    fs::path folder;
};

TEST_F(LanguageTrainings, LowerTheLoss) {
    for (const Mixer mixer : mixers) {
        LanguageTrainingOptions training = options(mixer);
        training.steps = 40;
        const LanguageTraining result = train_language_model(training);
        ASSERT_EQ(result.steps.size(), 40u);
        EXPECT_GT(result.steps.front().loss, 4.5) << name_of(mixer_names, mixer);
        ASSERT_EQ(result.validations.size(), 1u);
        EXPECT_LT(result.validations[0].loss, 2.6) << name_of(mixer_names, mixer);
        EXPECT_NEAR(result.validations[0].perplexity, std::exp(result.validations[0].loss), 1e-9);
    }
}

TEST_F(LanguageTrainings, InParallelAndSequentiallyHaveTheSameLosses) {
    for (const Mixer mixer : {Mixer::para_gru, Mixer::para_lstm, Mixer::slstm}) {
        LanguageTrainingOptions parallel = options(mixer), plain = options(mixer);
        plain.evaluation.method = Method::sequential;
        const LanguageTraining first = train_language_model(parallel), second = train_language_model(plain);
        for (std::size_t i = 0; i < first.steps.size(); ++i) {
            EXPECT_NEAR(first.steps[i].loss, second.steps[i].loss, 1e-3) << name_of(mixer_names, mixer) << " " << i;
            EXPECT_GE(first.steps[i].iterations, 1);
            EXPECT_EQ(second.steps[i].iterations, 0);
            EXPECT_LE(first.steps[i].residual, 1e-4);
            for (const auto& step : {first.steps[i], second.steps[i]})
                EXPECT_EQ(std::isfinite(step.lyapunov), i % 10 == 0) << i;
            if (i % 10 == 0) {
                EXPECT_NEAR(first.steps[i].lyapunov, second.steps[i].lyapunov, 1e-2);
            }
        }
    }
}

TEST_F(LanguageTrainings, ResumeToTheSameBits) {
    for (const Mixer mixer : {Mixer::para_gru, Mixer::lstm}) {
        LanguageTrainingOptions whole = options(mixer);
        whole.micro_batch = 3;
        whole.validation_interval = 11;
        SCOPED_TRACE(name_of(mixer_names, mixer));
        expect_same_bits_where_resumed(train_language_model, whole, 11);
    }
}

TEST_F(LanguageTrainings, AccumulateMicroBatches) {
    LanguageTrainingOptions whole = options(), parts = options();
    parts.micro_batch = 2;
    whole.steps = parts.steps = 5;
    const auto expected = losses(train_language_model(whole)), found = losses(train_language_model(parts));
    for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-4);
}

TEST_F(LanguageTrainings, UseThePreviousCheckpointWhereOneIsDamaged) {
    LanguageTrainingOptions training = options();
    const auto expected = losses(train_language_model(training));
    fs::remove(training.checkpoint);
    training.checkpoint_interval = 10;
    train_language_model(training);
    damage(training.checkpoint);
    EXPECT_THROW(TextGenerator{training.checkpoint}, FileError);
    std::string note;
    LanguageCallbacks callbacks;
    callbacks.note = [&](const std::string& text) { note = text; };
    training.resume = training.checkpoint;
    const LanguageTraining resumed = train_language_model(training, callbacks);
    EXPECT_THAT(note, testing::AllOf(HasSubstr("expected checksum"), HasSubstr("lm.safetensors.previous is used")));
    ASSERT_EQ(resumed.steps.size(), 10u);
    EXPECT_EQ(resumed.steps.back().loss, expected.back());
}

TEST_F(LanguageTrainings, StopOrSkipWhereALossIsNotFinite) { expect_stop_or_skip(train_language_model, options()); }

TEST_F(LanguageTrainings, LimitTheRecurrentParameters) {
    LanguageTrainingOptions training = options();
    training.bound = 0.25;
    train_language_model(training);
    const auto contents = files::read_safetensors(training.checkpoint);
    const auto& values = std::get<std::vector<float>>(contents.tensors.at("block_0.mixer.cell.parameters_l0").values);
    float largest = 0;
    for (const float value : values) largest = std::max(largest, std::abs(value));
    EXPECT_EQ(largest, 0.25F);  // half of the initial ones are beyond
}

TEST_F(LanguageTrainings, ArePenalisedForGrowth) {
    LanguageTrainingOptions plain = options(), penalised = options();
    plain.learning_rate = penalised.learning_rate = 3e-2;
    plain.steps = penalised.steps = 60;
    plain.penalty_rate = penalised.penalty_rate = -0.5;
    plain.penalty = 1e-9;
    penalised.penalty = 3;
    LanguageTrainingOptions none = plain;
    none.penalty = 0;
    none.steps = 1;
    const LanguageTraining first = train_language_model(plain), second = train_language_model(penalised);
    const LanguageStep without = train_language_model(none).steps.front();
    EXPECT_TRUE(std::isnan(without.growth));
    EXPECT_EQ(second.steps.front().loss, without.loss) << "the penalty is no part of the loss";
    EXPECT_EQ(first.steps.front().growth, second.steps.front().growth);
    EXPECT_GT(first.steps.back().growth, 1e-4);
    EXPECT_LT(second.steps.back().growth, 0.5 * first.steps.back().growth);
    plain.model.mixer = Mixer::lstm;
    EXPECT_THROW(train_language_model(plain), InvalidArgument);
    penalised.penalty = -1;
    EXPECT_THROW(train_language_model(penalised), InvalidArgument);
}

TEST_F(LanguageTrainings, InBfloat16HaveAboutTheSameLosses) {
    for (const Mixer mixer : mixers) {
        LanguageTrainingOptions wide = options(mixer), narrow = options(mixer);
        narrow.number = Number::bfloat16;
        narrow.recompute = mixer == Mixer::para_lstm;
        const LanguageTraining first = train_language_model(wide), second = train_language_model(narrow);
        EXPECT_NE(losses(first), losses(second)) << "computed in float";
        for (std::size_t i = 0; i < first.steps.size(); ++i)
            EXPECT_NEAR(first.steps[i].loss, second.steps[i].loss, 0.05) << name_of(mixer_names, mixer) << " " << i;
        LanguageValidationOptions validation;
        validation.evaluation = narrow.evaluation;
        EXPECT_EQ(validate_language_model(narrow.checkpoint, validation).loss, second.validations.back().loss);
        EXPECT_EQ(TextGenerator(narrow.checkpoint).generate({.tokens = 5}).tokens, 5);
        // Weights are kept in float.
        const auto contents = files::read_safetensors(narrow.checkpoint);
        EXPECT_TRUE(std::holds_alternative<std::vector<float>>(contents.tensors.at("embedding").values));
    }
}

TEST_F(LanguageTrainings, KeepPenaltyAndNumberWhereTheyResume) {
    LanguageTrainingOptions whole = options();
    whole.penalty = 0.5;
    whole.number = Number::bfloat16;
    whole.steps = 12;
    const auto expected = losses(train_language_model(whole));
    LanguageTrainingOptions part = whole;
    part.checkpoint = folder / "part.safetensors";
    LanguageCallbacks callbacks;
    index steps = 0;
    callbacks.interrupted = [&] { return ++steps == 7; };
    auto found = losses(train_language_model(part, callbacks));
    part = language_options(part.checkpoint);
    EXPECT_EQ(part.penalty, 0.5);
    EXPECT_EQ(part.number, Number::bfloat16);
    part.checkpoint = part.resume = folder / "part.safetensors";
    for (const double loss : losses(train_language_model(part))) found.push_back(loss);
    EXPECT_EQ(found, expected);
}

TEST_F(LanguageTrainings, ResumeCheckpointsOfEarlierVersions) {
    LanguageTrainingOptions training = options();
    training.steps = 3;
    train_language_model(training);
    auto contents = files::read_safetensors(training.checkpoint);
    for (const char* field : {"penalty", "penalty_rate", "number", "validated", "checksum"})
        EXPECT_EQ(contents.metadata.erase(field), 1U) << field;
    files::write_safetensors(training.checkpoint, contents);
    const LanguageTrainingOptions read = language_options(training.checkpoint);
    EXPECT_EQ(read.penalty, 0);
    EXPECT_EQ(read.penalty_rate, LanguageTrainingOptions().penalty_rate);
    EXPECT_EQ(read.number, Number::float32);
    EXPECT_EQ(TextGenerator(training.checkpoint).generate({.tokens = 5}).tokens, 5);
}

TEST_F(LanguageTrainings, RefuseWhatDoesNotContinue) {
    LanguageTrainingOptions training = options();
    training.steps = 3;
    train_language_model(training);
    training.resume = training.checkpoint;
    const auto error_of = [&](const LanguageTrainingOptions& changed) -> std::string {
        return message_of<Error>([&] { train_language_model(changed); });
    };
    const auto with = [&](auto change) {
        LanguageTrainingOptions changed = training;
        change(changed);
        return error_of(changed);
    };
    EXPECT_THAT(with([](auto& o) { o.batch = 5; }), HasSubstr("batch: expected 6, as in the checkpoint, got 5"));
    EXPECT_THAT(with([](auto& o) { o.model.mixer = Mixer::lstm; }), HasSubstr("mixer: expected para_gru"));
    EXPECT_THAT(with([](auto& o) { o.penalty = 1; }), HasSubstr("penalty: expected 0, as in the checkpoint, got 1"));
    EXPECT_THAT(with([](auto& o) { o.number = Number::bfloat16; }), HasSubstr("number: expected float32"));
    EXPECT_THAT(with([](auto& o) { o.context = 1 << 20; }), HasSubstr("context: expected less than the"));
    EXPECT_THAT(with([](auto& o) { o.micro_batch = 4; }), HasSubstr("micro_batch: expected a divisor of 6"));
    EXPECT_THAT(with([&](auto& o) { o.resume = folder / "tokens"; }), HasSubstr("tokens"));
    EXPECT_THAT(with([](auto& o) { o.device = "toaster"; }), HasSubstr("device: expected cpu"));
    // Other text of the same length.
    files::TokenFileWriter writer(folder / "tokens", "", 256);
    writer.append(std::vector<std::int32_t>(6000, 65));
    writer.finish(100);
    EXPECT_THAT(error_of(training), HasSubstr("tokens_checksum"));
}

TEST_F(LanguageTrainings, GiveTextByTheirSeed) {
    LanguageTrainingOptions training = options();
    training.steps = 80;
    train_language_model(training);
    const TextGenerator generator(training.checkpoint);
    TextOptions text;
    text.prompt = "the cat ";
    text.tokens = 120;
    text.temperature = 0;
    std::string streamed;
    text.write = [&](std::string_view piece) { streamed += piece; };
    const GeneratedText likeliest = generator.generate(text);
    EXPECT_EQ(streamed, likeliest.text);
    EXPECT_EQ(likeliest.text.size(), 120u);
    EXPECT_EQ(likeliest.prompt_tokens, 8);
    EXPECT_THAT(likeliest.text, HasSubstr(".\nthe "));
    EXPECT_EQ(likeliest.state_bytes, 2 * 16 * 4);
    ASSERT_EQ(likeliest.paces.size(), 2u);
    EXPECT_EQ(likeliest.paces[0].position, 100);
    // The likeliest token alone: whichever way it is asked for.
    text.temperature = 1;
    text.top_k = 1;
    EXPECT_EQ(generator.generate(text).text, likeliest.text);
    text.top_k = 0;
    text.top_p = 1e-9;
    EXPECT_EQ(generator.generate(text).text, likeliest.text);
    text.top_p = 1;
    text.temperature = 3;
    const std::string drawn = generator.generate(text).text;
    EXPECT_EQ(generator.generate(text).text, drawn);
    text.seed = 2;
    EXPECT_NE(generator.generate(text).text, drawn);
    text.top_p = 0;
    EXPECT_THROW(generator.generate(text), InvalidArgument);
}

TEST_F(LanguageTrainings, AreValidatedAsAtTheirEnd) {
    LanguageTrainingOptions training = options();
    const LanguageTraining result = train_language_model(training);
    LanguageValidationOptions validation;
    validation.evaluation = training.evaluation;
    EXPECT_TRUE(is_language_model(training.checkpoint));
    const LanguageValidation found = validate_language_model(training.checkpoint, validation);
    EXPECT_EQ(found.loss, result.validations.back().loss);
    EXPECT_EQ(found.tokens, result.validations.back().tokens);
    EXPECT_EQ(found.tokens, files::TokenFile(training.tokens).counts().validation - 1);
    files::TokenFileWriter writer(folder / "other", "", 100);
    writer.append(std::vector<std::int32_t>(100, 65));
    writer.finish(100);
    validation.tokens = folder / "other";
    EXPECT_THROW(validate_language_model(training.checkpoint, validation), InvalidArgument);
}

}  // namespace
}  // namespace deeppcr::nn
