// deeppcr train swap, on good and bad input, interrupted and resumed.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <fstream>
#include <map>
#include <thread>

#include <files/safetensors.hpp>

#include "program.hpp"

namespace deeppcr {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Json = nlohmann::json;

class TrainSwap : public ProgramTest {
protected:
    /// A training that takes no time, with the options that `more` does not give.
    static std::vector<std::string> small(const std::vector<std::string>& more = {}) {
        std::vector<std::string> arguments = {"train", "swap"};
        for (const auto& [option, value] : std::map<std::string, std::string>{{"--train-examples", "256"},
                                                                              {"--held-out", "64"},
                                                                              {"--workers", "2"},
                                                                              {"--large-batch", "64"},
                                                                              {"--large-epochs", "2"},
                                                                              {"--small-epochs", "2"},
                                                                              {"--small-batch", "16"}})
            if (std::find(more.begin(), more.end(), option) == more.end())
                arguments.insert(arguments.end(), {option, value});
        arguments.insert(arguments.end(), more.begin(), more.end());
        return arguments;
    }
    static bool is_step(const Json& line) { return line.contains("step"); }
};

TEST_F(TrainSwap, TrainsSavesAndReports) {
    const Outcome outcome = run(small({"--json", "--log", "log", "--compare", "--threads", "2"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    const Json result = outcome.json();
    EXPECT_EQ(result["interrupted"], false);
    EXPECT_EQ(result["parameters"], 33658);
    EXPECT_EQ(result["examples"], 256 * 2 + 2 * 256 * 2);
    ASSERT_EQ(result["steps"].size(), 2u * 4 + 2 * 2 * 16);
    EXPECT_EQ(result["steps"][0]["phase"], 1);
    EXPECT_EQ(result["steps"].back()["phase"], 2);
    EXPECT_EQ(result["steps"].back()["worker"], 1);
    ASSERT_EQ(result["epochs"].size(), 4u);
    EXPECT_EQ(result["epochs"][0]["held_out"]["examples"], 64);
    EXPECT_EQ(result["test"]["examples"], 10000);
    EXPECT_GT(result["test"]["accuracy"], 0.3) << "better than guessing";
    const Json& comparison = result["comparison"];
    ASSERT_EQ(comparison["workers"].size(), 2u);
    EXPECT_NE(comparison["stale_statistics"]["loss"], result["test"]["loss"]);
    ASSERT_EQ(comparison["line"].size(), 5u);
    EXPECT_EQ(comparison["line"][2]["weight"], 0.5);
    EXPECT_NEAR(comparison["line"][2]["loss"].get<double>(), result["test"]["loss"].get<double>(), 1e-5)
        << "the middle of the line between two workers is their average";
    const auto lines = log();
    ASSERT_EQ(lines.size(), result["steps"].size() + result["epochs"].size());
    EXPECT_EQ(lines[0], result["steps"][0]);
    const Outcome validated = run({"validate", "swap.safetensors", "--json"});
    expect_error({"validate", "swap.safetensors", "--batch", "3"}, HasSubstr("--batch"));
    ASSERT_EQ(validated.exit_code, 0) << validated.errors;
    EXPECT_EQ(validated.json()["loss"], result["test"]["loss"]);
    const auto saved = files::read_safetensors(folder / "swap.safetensors");
    EXPECT_EQ(saved.metadata.at("phase"), "3");
    EXPECT_EQ(saved.tensors.at("last.weight").shape, (std::vector<index>{10, 1024}));
    const auto before = files::read_safetensors(folder / "swap.safetensors.previous");
    EXPECT_EQ(before.metadata.at("phase"), "2");
    EXPECT_TRUE(before.tensors.contains("worker.1.optimiser.momentum_buffer.last.weight"));
}

TEST_F(TrainSwap, GoesOnAfterASignal) {
    // A phase 1 of 80 steps, then 2 x 320 steps alone; interrupted in each.
    const auto with = [&](std::vector<std::string> more) {
        more.insert(more.end(),
                    {"--large-epochs", "20", "--small-epochs", "20", "--stopping-accuracy", "2", "--held-out", "0"});
        return small(more);
    };
    const Outcome whole = run(with({"--checkpoint", "whole.safetensors", "--log", "whole.log", "--json"}));
    ASSERT_EQ(whole.exit_code, 0) << whole.errors;
    const auto interrupt = [&](const std::vector<std::string>& arguments, std::size_t lines, int signal) {
        const pid_t child = start(arguments);
        for (int wait = 0; wait < 6000 && log().size() < lines; ++wait)
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        kill(child, signal);
        const Outcome outcome = wait_for(child);
        EXPECT_EQ(outcome.exit_code, 130) << outcome.errors;
        EXPECT_THAT(outcome.output, HasSubstr("go on with: deeppcr train swap --resume swap.safetensors"));
        return files::read_safetensors(folder / "swap.safetensors").metadata.at("phase");
    };
    EXPECT_EQ(interrupt(with({"--log", "log"}), 5, SIGINT), "1");
    EXPECT_EQ(interrupt({"train", "swap", "--resume", "swap.safetensors", "--log", "log"}, 150, SIGTERM), "2");
    const Outcome resumed =
        run({"train", "swap", "--resume", "swap.safetensors", "--log", "log", "--threads", "2", "--json"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    EXPECT_EQ(resumed.json()["test"]["loss"], whole.json()["test"]["loss"]);
    EXPECT_EQ(files::read_safetensors(folder / "swap.safetensors").tensors.at("last.weight").values,
              files::read_safetensors(folder / "whole.safetensors").tensors.at("last.weight").values);

    // The same lines, but for the order of the workers' where they were interrupted.
    std::map<std::string, Json> found;
    for (const Json& line : log())
        if (is_step(line))
            found[line["phase"].dump() + " " + line["worker"].dump() + " " + line["step"].dump()] = line["loss"];
    std::size_t steps = 0;
    for (const Json& line : log("whole.log"))
        if (is_step(line)) {
            ++steps;
            EXPECT_EQ(found.at(line["phase"].dump() + " " + line["worker"].dump() + " " + line["step"].dump()),
                      line["loss"]);
        }
    EXPECT_EQ(found.size(), steps);
}

TEST_F(TrainSwap, ACorruptCheckpointIsRefusedAndTheOneBeforeUsed) {
    const Outcome whole = run(small({"--json"}));
    ASSERT_EQ(whole.exit_code, 0) << whole.errors;
    const auto checkpoint = folder / "swap.safetensors";
    damage(checkpoint);
    const Outcome resumed = run({"train", "swap", "--resume", "swap.safetensors", "--json"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    EXPECT_THAT(resumed.errors, AllOf(HasSubstr("checksum"), HasSubstr("swap.safetensors.previous is used")));
    EXPECT_EQ(resumed.json()["test"]["loss"], whole.json()["test"]["loss"]);
    EXPECT_FALSE(std::filesystem::exists(checkpoint.string() + ".previous")) << "the corrupt one is not kept";

    std::filesystem::resize_file(checkpoint, std::filesystem::file_size(checkpoint) / 2);
    expect_error({"train", "swap", "--resume", "swap.safetensors"}, HasSubstr("swap.safetensors"));
    files::write_safetensors(checkpoint, {{{"x", {{1}, std::vector<float>{1}}}}, {}});
    expect_error({"train", "swap", "--resume", "swap.safetensors"}, HasSubstr("format"));
}

TEST_F(TrainSwap, ALossThatIsNotFiniteStopsOrIsLeftOut) {
    const Outcome stopped = run(small({"--large-learning-rate", "1e38", "--large-warm-up", "0"}));
    EXPECT_EQ(stopped.exit_code, 2) << "as other trainings that diverge";
    EXPECT_THAT(stopped.errors, AllOf(HasSubstr("step 2 of phase 1"), HasSubstr("not finite")));
    EXPECT_FALSE(std::filesystem::exists(folder / "swap.safetensors"));
    const Outcome skipped = run(small({"--large-learning-rate", "1e38", "--large-warm-up", "0", "--small-epochs", "0",
                                       "--on-not-finite", "skip", "--json"}));
    EXPECT_EQ(skipped.exit_code, 0) << skipped.errors;
    EXPECT_THAT(skipped.errors, HasSubstr("phase 1, step 2 is left out"));
    EXPECT_EQ(skipped.json()["steps"][1]["skipped"], true);
}

TEST_F(TrainSwap, TrainsOtherwiseToo) {
    const auto accuracy = [&](const std::vector<std::string>& more) -> double {
        auto arguments = small(more);
        arguments.insert(arguments.end(), {"--json", "--overwrite"});
        const Outcome outcome = run(arguments);
        EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
        return outcome.exit_code == 0 ? outcome.json()["test"]["accuracy"].get<double>() : 0;
    };
    EXPECT_GT(accuracy({"--network", "residual", "--layers", "4", "--width", "16"}), 0.3) << "another module";
    EXPECT_GT(accuracy({"--large-epochs", "0", "--optimiser", "adamw", "--small-learning-rate", "3e-3", "--period", "5",
                        "--outer-learning-rate", "0.7", "--outer-momentum", "0.5"}),
              0.3)
        << "DiLoCo";
    EXPECT_GT(accuracy({"--workers", "1", "--small-schedule", "constant", "--trajectory", "swa"}), 0.3) << "SWA";
}

/// Words in an order that can be learnt.
TEST_F(TrainSwap, TrainsLanguageModels) {
    std::string text;
    for (int i = 0; i < 3000; ++i) text += i % 7 < 4 ? "abc " : "xyz. ";
    std::ofstream(folder / "text") << text;
    ASSERT_EQ(run({"prepare", "text", "--validation", "0.1"}).exit_code, 0);
    const std::vector<std::string> arguments = small(
        {"--network", "language", "--width", "16", "--layers", "1", "--context", "16", "--train-examples", "512",
         "--held-out", "8", "--optimiser", "adamw", "--large-learning-rate", "1e-2", "--small-learning-rate", "5e-3"});
    auto first = arguments;
    first.insert(first.end(), {"--compare", "--json"});
    const Outcome outcome = run(first);
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    const Json result = outcome.json();
    EXPECT_EQ(result["examples"], 512 * 2 + 2 * 512 * 2) << "sequences";
    EXPECT_EQ(result["epochs"][0]["held_out"]["examples"], 8 * 16) << "tokens";
    EXPECT_GT(result["test"]["accuracy"], 0.6) << "of the next character";
    EXPECT_EQ(result["comparison"]["workers"].size(), 2U);
    EXPECT_GE(result["comparison"]["ensemble"]["accuracy"], 0.6);
    const Outcome validated = run({"validate", "swap.safetensors", "--json"});
    ASSERT_EQ(validated.exit_code, 0) << validated.errors;
    EXPECT_EQ(validated.json()["loss"], result["test"]["loss"]);

    // The same bits whatever the threads, and from the end of the second phase.
    auto again = arguments;
    again.insert(again.end(), {"--threads", "2", "--checkpoint", "again.safetensors", "--json"});
    EXPECT_EQ(run(again).json()["test"]["loss"], result["test"]["loss"]);
    std::filesystem::rename(folder / "again.safetensors.previous", folder / "again.safetensors");
    const Outcome resumed = run({"train", "swap", "--resume", "again.safetensors", "--json"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    EXPECT_EQ(resumed.json()["test"]["loss"], result["test"]["loss"]);

    std::ofstream(folder / "other") << text.substr(5);
    ASSERT_EQ(run({"prepare", "other", "-o", "other.tokens"}).exit_code, 0);
    expect_error({"train", "swap", "--resume", "again.safetensors", "--data", "other.tokens"},
                 HasSubstr("data: expected the token file of the checkpoint, got other.tokens"));
    expect_error(small({"--network", "language", "--context", "20000", "--overwrite"}),
                 HasSubstr("held_out: expected below"));
    expect_error(small({"--network", "language", "--data", "none.tokens", "--overwrite"}), HasSubstr("none.tokens"));
}

TEST_F(TrainSwap, RefusesBadOptions) {
    expect_error(small({"--workers", "0"}), HasSubstr("workers: expected at least 1, got 0"));
    expect_error(small({"--workers", "3"}), HasSubstr("large_batch: expected a multiple of the 3 workers, got 64"));
    expect_error(small({"--large-batch", "1024"}), HasSubstr("large_batch: expected at most the number of training"));
    expect_error(small({"--train-examples", "60000"}), HasSubstr("train_examples: expected 0 to 59936, got 60000"));
    expect_error(small({"--outer-momentum", "0.9"}), HasSubstr("period: expected 2 or more"));
    expect_error(small({"--trajectory", "zigzag"}), AllOf(HasSubstr("--trajectory"), HasSubstr("zigzag")));
    expect_error(small({"--data", "nowhere"}), HasSubstr("dataset-fashion-mnist"));
    expect_error(small({"--log", "nowhere/log"}), HasSubstr("nowhere/log"));
    expect_error({"train", "swap", "--resume", "none.safetensors"}, HasSubstr("none.safetensors"));
    EXPECT_FALSE(std::filesystem::exists(folder / "swap.safetensors"));
    ASSERT_EQ(run(small({"--small-epochs", "0"})).exit_code, 0);
    expect_error({"train", "swap", "--resume", "swap.safetensors", "--period", "7"},
                 HasSubstr("period: expected 0, as in the checkpoint, got 7"));
    expect_error(small(), AllOf(HasSubstr("swap.safetensors"), HasSubstr("--overwrite")));
}

}  // namespace
}  // namespace deeppcr
