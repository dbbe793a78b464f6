// What the tests of trainings of sequence models share, whatever the models are for.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <deeppcr/error.hpp>
#include <deeppcr/nn/language_model.hpp>
#include <files/safetensors.hpp>

namespace deeppcr::nn {

template <class Training>
std::vector<double> losses(const Training& training) {
    std::vector<double> all;
    for (const auto& step : training.steps) all.push_back(step.loss);
    return all;
}

/// A training that is interrupted after `steps` steps, before its first validation, and resumed has the losses,
/// validations and checkpoint of `whole`.
template <class Training, class Options, class Callbacks>
void expect_same_bits_where_resumed(Training train(const Options&, const Callbacks&), const Options& whole,
                                    index steps) {
    const Training expected = train(whole, {});
    Options part = whole;
    part.checkpoint += ".part";
    Callbacks callbacks;
    index asked = 0;
    callbacks.interrupted = [&] { return ++asked == steps; };
    const Training first = train(part, callbacks);
    ASSERT_TRUE(first.interrupted);
    part.resume = part.checkpoint;
    const Training second = train(part, {});
    auto found = losses(first);
    ASSERT_EQ(found.size(), std::size_t(steps));
    for (const double loss : losses(second)) found.push_back(loss);
    EXPECT_EQ(found, losses(expected));
    EXPECT_TRUE(first.validations.empty());
    ASSERT_EQ(second.validations.size(), expected.validations.size());  // also what the interrupt came before
    for (std::size_t i = 0; i < expected.validations.size(); ++i) {
        EXPECT_EQ(second.validations[i].step, expected.validations[i].step);
        EXPECT_EQ(second.validations[i].loss, expected.validations[i].loss);
    }
    EXPECT_EQ(files::read_safetensors(part.checkpoint).tensors.at("norm").values,
              files::read_safetensors(whole.checkpoint).tensors.at("norm").values);
}

/// A training whose losses grow beyond all numbers stops, or skips those steps.
template <class Training, class Options, class Callbacks>
void expect_stop_or_skip(Training train(const Options&, const Callbacks&), Options training) {
    training.learning_rate = 1e30;
    training.gradient_clip = 0;
    training.steps = 8;
    EXPECT_THROW(train(training, {}), NotConverged);
    EXPECT_FALSE(std::filesystem::exists(training.checkpoint));
    training.on_divergence = OnDivergence::skip;
    std::vector<std::string> notes;
    Callbacks callbacks;
    callbacks.note = [&](const std::string& text) { notes.push_back(text); };
    const Training result = train(training, callbacks);
    ASSERT_EQ(result.steps.size(), 8u);
    EXPECT_FALSE(result.steps.front().skipped);
    EXPECT_TRUE(result.steps.back().skipped);
    ASSERT_FALSE(notes.empty());
    EXPECT_THAT(notes.back(), testing::HasSubstr("step 8 is not finite: it is skipped"));
}

/// Changes a bit near the end of a file.
inline void damage(const std::filesystem::path& file) {
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekg(-5, std::ios::end);
    const auto changed = char(stream.get() ^ 1);
    stream.seekp(-5, std::ios::end);
    stream.put(changed);
}

}  // namespace deeppcr::nn
