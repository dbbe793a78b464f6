// deeppcr prepare, train lm, validate, generate and plan, on good and bad input, interrupted and resumed.
#include <sys/stat.h>

#include <chrono>
#include <csignal>
#include <fstream>
#include <thread>

#include <files/safetensors.hpp>

#include "program.hpp"

namespace deeppcr {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Json = nlohmann::json;

class Language : public ProgramTest {
protected:
    Language() {
        std::ofstream text(folder / "text", std::ios::binary);
        for (int i = 0; i < 500; ++i) text << "line " << i * i % 97 << " of a text.\n";
    }
    void prepare() const { ASSERT_EQ(run({"prepare", "text"}).exit_code, 0); }
    static std::vector<std::string> small(const std::vector<std::string>& more = {}, const std::string& steps = "5") {
        std::vector<std::string> arguments = {"train",     "lm", "--width", "16", "--layers",  "2", "--batch", "4",
                                              "--context", "32", "--chunk", "8",  "--threads", "1", "--steps", steps};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return arguments;
    }
};

TEST_F(Language, FromTextToText) {
    const Outcome prepared = run({"prepare", "text", "--json"});
    ASSERT_EQ(prepared.exit_code, 0) << prepared.errors;
    EXPECT_EQ(prepared.json()["bytes"], contents(folder / "text").size());
    EXPECT_EQ(prepared.json()["vocabulary"], "bytes");

    const Outcome trained = run(small({"--log", "log", "--json", "--validation-interval", "2"}));
    ASSERT_EQ(trained.exit_code, 0) << trained.errors;
    const Json result = trained.json();
    ASSERT_EQ(result["steps"].size(), 5u);
    ASSERT_EQ(result["validations"].size(), 3u);
    EXPECT_EQ(result["steps"][4]["tokens"], 5 * 4 * 32);
    EXPECT_GT(result["peak_memory"], 1000000);
    const auto lines = log("log");
    ASSERT_EQ(lines.size(), 8u);
    EXPECT_EQ(lines[0], result["steps"][0]);
    for (const char* field : {"iterations", "residual", "lyapunov", "tokens_per_second"})
        EXPECT_TRUE(lines[0][field].is_number()) << field;

    const Outcome validated = run({"validate", "lm.safetensors", "--json"});
    expect_error({"validate", "lm.safetensors", "--held-out"}, HasSubstr("--held-out"));
    ASSERT_EQ(validated.exit_code, 0) << validated.errors;
    EXPECT_EQ(validated.json()["loss"], result["validations"][2]["validation_loss"]);

    const Outcome plan = run(small({"--plan", "--json"}));
    ASSERT_EQ(plan.exit_code, 0) << plan.errors;
    EXPECT_EQ(plan.json()["parameters"], result["parameters"]);

    const std::vector<std::string> generate = {"generate", "lm.safetensors", "--prompt", "line ", "--tokens", "40"};
    const Outcome shown = run(generate);
    ASSERT_EQ(shown.exit_code, 0) << shown.errors;
    EXPECT_THAT(shown.output, testing::StartsWith("line "));
    EXPECT_EQ(shown.output.size(), 5u + 40 + 1);
    EXPECT_EQ(run(generate).output, shown.output);
}

TEST_F(Language, ReadsStandardInputAndPieces) {
    const auto from_text = [&] {
        if (freopen((folder / "text").c_str(), "rb", stdin) == nullptr) _exit(126);
    };
    ASSERT_EQ(run({"prepare", "-", "-o", "piped"}, from_text).exit_code, 0);
    ASSERT_EQ(run({"prepare", "text", "-o", "read"}).exit_code, 0);
    EXPECT_EQ(contents(folder / "piped"), contents(folder / "read"));
    ASSERT_EQ(run({"prepare", "-", "-o", "piped", "--overwrite", "--pieces", "300"}, from_text).exit_code, 0);
    ASSERT_EQ(run({"prepare", "text", "-o", "read", "--overwrite", "--pieces", "300"}).exit_code, 0);
    EXPECT_EQ(contents(folder / "piped"), contents(folder / "read"));
    ASSERT_EQ(run(small({"--tokens", "read"})).exit_code, 0);
    const Outcome shown = run({"generate", "lm.safetensors", "--json", "--tokens", "5"});
    ASSERT_EQ(shown.exit_code, 0) << shown.errors;
    EXPECT_EQ(shown.json()["tokens"], 5);
}

TEST_F(Language, GoesOnAfterSigterm) {
    prepare();
    const Outcome whole = run(small({"--checkpoint", "whole.safetensors", "--log", "whole.log"}, "150"));
    ASSERT_EQ(whole.exit_code, 0) << whole.errors;
    const pid_t child = start(small({"--log", "log"}, "150"));
    for (int wait = 0; wait < 6000 && log("log").size() < 3; ++wait)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    kill(child, SIGTERM);
    const Outcome interrupted = wait_for(child);
    EXPECT_EQ(interrupted.exit_code, 130) << interrupted.errors;
    EXPECT_THAT(interrupted.output, HasSubstr("go on with: deeppcr train lm --resume lm.safetensors"));
    ASSERT_LT(log("log").size(), 150u);
    const Outcome resumed = run({"train", "lm", "--resume", "lm.safetensors", "--log", "log"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    const auto found = log("log"), expected = log("whole.log");
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t step = 0; step < found.size(); ++step)
        for (const char* field : {"step", "loss", "gradient_norm", "iterations", "validation_loss"})
            EXPECT_EQ(found[step].value(field, Json()), expected[step].value(field, Json())) << field << " " << step;
}

TEST_F(Language, UsesThePreviousCheckpointAndSaysSo) {
    prepare();
    ASSERT_EQ(run(small({"--checkpoint-interval", "2"})).exit_code, 0);
    std::filesystem::resize_file(folder / "lm.safetensors", 1000);
    expect_error({"validate", "lm.safetensors"}, HasSubstr("lm.safetensors"));
    expect_error({"generate", "lm.safetensors"}, HasSubstr("lm.safetensors"));
    const Outcome resumed = run({"train", "lm", "--resume", "lm.safetensors", "--json"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    EXPECT_THAT(resumed.errors, HasSubstr("warning: lm.safetensors"));
    EXPECT_EQ(resumed.json()["steps"].size(), 1u);
}

TEST_F(Language, SaysWhatIsWrong) {
    expect_error(small(), HasSubstr("text.tokens"));
    expect_error({"prepare", "nowhere"}, HasSubstr("nowhere"));
    expect_error({"prepare", "text", "--validation", "1"}, HasSubstr("validation: expected 0 to below 1"));
    expect_error({"prepare", "text", "--pieces", "100000000"}, HasSubstr("pieces"));
    expect_error({"prepare", "text", "--sentencepiece", "text"}, HasSubstr("vocabulary: expected a model"));
    EXPECT_FALSE(std::filesystem::exists(folder / "text.tokens"));
    std::ofstream(folder / "empty").flush();
    expect_error({"prepare", "empty"}, HasSubstr("0 tokens"));

    prepare();
    ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
    const int reader = open((folder / "pipe").c_str(), O_RDONLY | O_NONBLOCK);
    expect_error({"prepare", "text", "-o", "pipe", "--overwrite"}, HasSubstr("pipe: cannot be written"));
    close(reader);
    expect_error({"prepare", "text"}, AllOf(HasSubstr("text.tokens"), HasSubstr("--overwrite")));
    expect_error(small({"--mixer", "toaster"}), HasSubstr("--mixer"));
    expect_error(small({"--context", "1000000"}), HasSubstr("context"));
    expect_error(small({"--mixer", "lstm", "--penalty", "1"}), HasSubstr("penalty: expected 0, as lstm is no cell"));
    expect_error(small({"--number", "int8"}), HasSubstr("--number"));
    expect_error(small({"--tokens", "text"}), HasSubstr("token file"));
    expect_error({"plan", "--batch", "8", "--devices", "3"}, HasSubstr("batch: expected a multiple of devices = 3"));
    expect_error({"generate", "text"}, HasSubstr("text"));
    const Outcome diverged = run(small({"--learning-rate", "1e30", "--gradient-clip", "0"}));
    EXPECT_EQ(diverged.exit_code, 2);
    EXPECT_THAT(diverged.errors, HasSubstr("is not finite"));
    EXPECT_FALSE(std::filesystem::exists(folder / "lm.safetensors"));
    ASSERT_EQ(run(small()).exit_code, 0);
    expect_error(small(), AllOf(HasSubstr("lm.safetensors"), HasSubstr("--overwrite")));
    expect_error({"generate", "lm.safetensors", "--top-p", "2"}, HasSubstr("top_p: expected above 0 to 1"));
}

TEST_F(Language, PlansWhatIsTooLargeForTheMachine) {
    const Outcome outcome = run({"plan", "--configuration", "7B", "--vocabulary", "32000", "--json"});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_NEAR(outcome.json()["parameters"].get<double>(), 7e9, 0.3e9);
    const Outcome text = run({"plan", "--configuration", "1B", "--recompute", "true", "--devices", "4"});
    ASSERT_EQ(text.exit_code, 0) << text.errors;
    EXPECT_THAT(text.output, AllOf(HasSubstr("optimiser"), HasSubstr("blocks recomputed"), HasSubstr("device")));
}

}  // namespace
}  // namespace deeppcr
