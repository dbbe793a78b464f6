// deeppcr train task and validate, on good and bad input, interrupted and resumed.
#include <chrono>
#include <csignal>
#include <thread>

#include "program.hpp"

namespace deeppcr {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Json = nlohmann::json;

class TrainTask : public ProgramTest {
protected:
    static std::vector<std::string> small(const std::vector<std::string>& more = {}, const std::string& steps = "6") {
        std::vector<std::string> arguments = {"train",
                                              "task",
                                              "--width",
                                              "8",
                                              "--mlp",
                                              "8",
                                              "--layers",
                                              "1",
                                              "--batch",
                                              "4",
                                              "--chunk",
                                              "8",
                                              "--length",
                                              "20",
                                              "--steps",
                                              steps,
                                              "--threads",
                                              "1",
                                              "--validation-interval",
                                              "3",
                                              "--validation-sequences",
                                              "20"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return arguments;
    }
};

TEST_F(TrainTask, TrainsLogsAndValidates) {
    const Outcome trained = run(small({"hops", "--hops", "1", "--symbols", "3", "--log", "log", "--json"}));
    ASSERT_EQ(trained.exit_code, 0) << trained.errors;
    const Json result = trained.json();
    ASSERT_EQ(result["steps"].size(), 6u);
    ASSERT_EQ(result["validations"].size(), 2u);
    EXPECT_EQ(result["validations"][1]["answers"], 20 * 20);
    const auto lines = log("log");
    ASSERT_EQ(lines.size(), 8u);
    EXPECT_EQ(lines[0], result["steps"][0]);
    EXPECT_EQ(lines[3], result["validations"][0]);
    for (const char* field : {"length", "loss", "accuracy", "iterations", "residual", "lyapunov"})
        EXPECT_TRUE(lines[0][field].is_number()) << field;
    EXPECT_EQ(lines[0]["status"], "converged");

    const Outcome validated = run({"validate", "task.safetensors", "--json"});
    ASSERT_EQ(validated.exit_code, 0) << validated.errors;
    for (const char* field : {"validation_loss", "validation_accuracy", "last_accuracy", "iterations"})
        EXPECT_EQ(validated.json()[field], result["validations"][1][field]) << field;
    const Outcome longer = run({"validate", "task.safetensors", "--length", "40"});
    ASSERT_EQ(longer.exit_code, 0) << longer.errors;
    EXPECT_THAT(longer.output, AllOf(HasSubstr("validation accuracy"), HasSubstr("on 800 answers of 20 sequences")));
}

TEST_F(TrainTask, GoesOnAfterSigterm) {
    const Outcome whole = run(small({"parity", "--checkpoint", "whole.safetensors", "--log", "whole.log"}, "400"));
    ASSERT_EQ(whole.exit_code, 0) << whole.errors;
    const pid_t child = start(small({"parity", "--log", "log"}, "400"));
    for (int wait = 0; wait < 6000 && log("log").size() < 3; ++wait)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    kill(child, SIGTERM);
    const Outcome interrupted = wait_for(child);
    EXPECT_EQ(interrupted.exit_code, 130) << interrupted.errors;
    EXPECT_THAT(interrupted.output, HasSubstr("go on with: deeppcr train task --resume task.safetensors"));
    ASSERT_LT(log("log").size(), log("whole.log").size());
    const Outcome resumed = run({"train", "task", "--resume", "task.safetensors", "--log", "log"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    const auto found = log("log"), expected = log("whole.log");
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t step = 0; step < found.size(); ++step)
        for (const char* field : {"step", "length", "loss", "gradient_norm", "iterations", "validation_loss"})
            EXPECT_EQ(found[step].value(field, Json()), expected[step].value(field, Json())) << field << " " << step;
}

TEST_F(TrainTask, SaysWhatIsWrong) {
    expect_error(small({"sorting"}), HasSubstr("sorting"));
    expect_error(small({"--mixer", "toaster"}), HasSubstr("--mixer"));
    expect_error(small({"recall", "--pairs", "10"}), HasSubstr("pairs: expected 1 to keys = 4, got 10"));
    expect_error(small({"--first-length", "21"}), HasSubstr("first_length: expected 1 to length = 20"));
    expect_error(small({"--checkpoint", "nowhere/task.safetensors"}), HasSubstr("nowhere"));
    const Outcome diverged = run(small({"--learning-rate", "1e30", "--gradient-clip", "0"}));
    EXPECT_EQ(diverged.exit_code, 2);
    EXPECT_THAT(diverged.errors, HasSubstr("is not finite"));
    EXPECT_FALSE(std::filesystem::exists(folder / "task.safetensors"));
    ASSERT_EQ(run(small()).exit_code, 0);
    expect_error(small(), AllOf(HasSubstr("task.safetensors"), HasSubstr("--overwrite")));
    expect_error({"train", "task", "recall", "--resume", "task.safetensors"},
                 HasSubstr("task: expected parity, as in the checkpoint, got recall"));
    expect_error({"train", "lm", "--resume", "task.safetensors"}, HasSubstr("task.safetensors"));
    expect_error({"validate", "task.safetensors", "--length", "-3"}, HasSubstr("length"));
    expect_error({"validate", "task.safetensors", "--data", "text.tokens"}, HasSubstr("--data"));
}

}  // namespace
}  // namespace deeppcr
