// What `deeppcr reproduce rnn` makes of measurements that no seed brings about: the program's own functions, with a
// training in place of nn/'s.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/report.cpp"         // NOLINT(bugprone-suspicious-include)
#include "cli/reproduce_rnn.cpp"  // NOLINT(bugprone-suspicious-include)

namespace deeppcr {

/// Trains ParaLSTM only.
nn::TrainedCell nn::train_cell(CellKind kind, const TrainedCellOptions& options) {
    if (kind == CellKind::para_gru) throw NotConverged("the loss is what it was");
    const index channels = options.channels;
    return {.weights = Buffer<float>::random({ParaLSTM::inputs, 1, channels}, 1),
            .biases = Buffer<float>({ParaLSTM::inputs, 1, channels}),
            .parameters = Buffer<float>({ParaLSTM::parameters, 1, channels}),
            .first_loss = 2,
            .last_loss = 1};
}

namespace program {
namespace {

using testing::HasSubstr;

TEST(ReproduceRnn, ATrainingThatFailsIsSaidAndTheRestMeasured) {
    Experiment experiment;
    experiment.quick = true;
    experiment.advance = [](double, const std::string&) { return true; };
    const Json rnn = run_rnn(experiment);
    EXPECT_EQ(rnn["complete"], true);
    EXPECT_EQ(rnn["agreement"], false);
    ASSERT_EQ(rnn["training"].size(), 2U);
    EXPECT_EQ(rnn["training"][0]["failure"], "the loss is what it was");
    EXPECT_FALSE(rnn["training"][1].contains("failure"));
    EXPECT_EQ(rnn["single"].size(), 15U);  // 3 lengths, 4 cells, 1 of them trained too
    EXPECT_EQ(rnn["accuracy"].size(), 30U);
    EXPECT_THAT(summarise_rnn(rnn), HasSubstr("ParaGRU was not measured as trained: the loss is what it was."));
    Page page("test");
    describe_rnn(rnn, page);
    EXPECT_THAT(page.html(), HasSubstr("failed"));
}

Json times(double first, double median, double third) {
    return {{"status", "converged"}, {"seconds", median}, {"quartiles", {first, third}}, {"ratio", 1 / median}};
}

TEST(ReproduceRnn, AMethodIsFasterWhereTheQuartilesAreApart) {
    Json point{{"methods", {{"sequential", times(0.95, 1, 1.1)}, {"overlap", times(0.8, 0.85, 0.94)}}}};
    EXPECT_EQ(winner(point), "overlap");
    point["methods"]["shooting"] = times(0.7, 0.8, 0.96);  // faster still by its median only
    EXPECT_EQ(winner(point), "overlap");
    point["methods"]["shooting"] = times(0.7, 0.8, 0.94);
    EXPECT_EQ(winner(point), "shooting");
    point["methods"].erase("shooting");
    point["methods"]["overlap"] = times(0.8, 0.9, 0.96);
    EXPECT_EQ(winner(point), "sequential");
    point["methods"] = {{"sequential", times(0.95, 1, 1.1)}, {"overlap", {{"status", "not converged"}}}};
    EXPECT_EQ(winner(point), "sequential");
}

TEST(ReproduceRnn, WhereTrajectoriesPartThePlaceIsNamed) {
    const Json methods{{"sequential", times(1, 1, 1)}};
    const Json rnn{
        {"state_tolerance", 1e-4},
        {"single",
         {{{"cell", "SLSTM"}, {"weights", "trained"}, {"steps", 64}, {"lyapunov", 0.5}, {"methods", methods}}}},
        {"map", {{{"cell", "ParaGRU"}, {"steps", 1024}, {"channels", 16}, {"lyapunov", 0.25}, {"methods", methods}}}}};
    std::vector<std::string> sentences;
    add_single_verdicts(rnn, sentences);
    EXPECT_THAT(sentences, testing::Contains(
                               HasSubstr("SLSTM, trained, 64 steps (0.50); ParaGRU, 1,024 steps, 16 channels (0.25)")));
}

TEST(ReproduceRnn, AnEstimateMayBeInfiniteOrNone) {
    const auto estimate_text = [](const Json& estimate) {
        const Json row{{"cell", "ParaGRU"}, {"variance", 1}, {"name", "overlap"},    {"status", "converged"},
                       {"lyapunov", -1},    {"error", 1e-6}, {"estimate", estimate}, {"good", true}};
        return accuracy_table({{"accuracy", {row}}}).rows[0][6].text;
    };
    EXPECT_EQ(estimate_text(2e-6), "2e-6");
    EXPECT_EQ(estimate_text("infinite"), "infinite");
    EXPECT_EQ(estimate_text(nullptr), "-");
}

}  // namespace
}  // namespace program
}  // namespace deeppcr
