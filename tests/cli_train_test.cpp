// deeppcr train and deeppcr validate, on good and bad input, interrupted and resumed.
#include <chrono>
#include <csignal>
#include <thread>

#include <files/safetensors.hpp>

#include "program.hpp"

namespace deeppcr {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Json = nlohmann::json;

class Train : public ProgramTest {
protected:
    /// A network and a training that take no time.
    static std::vector<std::string> small(const std::vector<std::string>& more = {}) {
        std::vector<std::string> arguments = {"train",   "resnet", "--layers",       "20", "--width",    "6",
                                              "--batch", "16",     "--train-images", "64", "--held-out", "200"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return arguments;
    }
};

TEST_F(Train, TrainsSavesAndReports) {
    const Outcome outcome = run(small({"--steps", "6", "--json", "--log", "log"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    const Json result = outcome.json();
    EXPECT_EQ(result["interrupted"], false);
    EXPECT_EQ(result["checkpoint"], "resnet.safetensors");
    EXPECT_EQ(result["parameters"], 784 * 6 + 6 + 20 * (36 + 6) + 6 * 10 + 10);
    ASSERT_EQ(result["steps"].size(), 6u);
    EXPECT_EQ(result["steps"][5]["step"], 6);
    EXPECT_EQ(result["steps"][5]["epoch"], 2);
    EXPECT_GE(result["steps"][0]["iterations"], 1);
    EXPECT_EQ(result["steps"][0]["status"], "converged");
    ASSERT_EQ(result["epochs"].size(), 2u);
    EXPECT_EQ(result["epochs"][0]["held_out"]["images"], 200);
    EXPECT_EQ(result["test"]["images"], 10000);
    const auto lines = log();
    ASSERT_EQ(lines.size(), 6u);
    EXPECT_EQ(lines[3], result["steps"][3]);

    const Outcome validated = run({"validate", "resnet.safetensors", "--json"});
    ASSERT_EQ(validated.exit_code, 0) << validated.errors;
    EXPECT_EQ(validated.json()["accuracy"], result["test"]["accuracy"]);
    EXPECT_EQ(validated.json()["loss"], result["test"]["loss"]);
}

TEST_F(Train, TellsAPersonWhatItDoes) {
    const Outcome outcome = run(small({"--steps", "4", "--method", "sequential"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_THAT(outcome.output,
                AllOf(HasSubstr("20 layers x 6"), HasSubstr("layer by layer"), HasSubstr("epoch 1: loss"),
                      HasSubstr("test accuracy"), HasSubstr("checkpoint: resnet.safetensors")));
    const Outcome validated = run({"validate", "resnet.safetensors", "--method", "newton", "--held-out"});
    EXPECT_EQ(validated.exit_code, 0);
    EXPECT_THAT(validated.output, AllOf(HasSubstr("held-out accuracy"), HasSubstr("200 images"), HasSubstr("Newton")));
}

TEST_F(Train, LeavesTheMethodToWhatTakesLess) {
    ASSERT_EQ(run(small({"--steps", "4", "--method", "sequential", "--log", "sequential.log"})).exit_code, 0);
    const Outcome outcome = run(small({"--steps", "4", "--method", "automatic", "--log", "log", "--overwrite"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_THAT(outcome.output, HasSubstr("whichever takes less"));
    const auto found = log(), expected = log("sequential.log");
    ASSERT_EQ(found.size(), 4u);
    for (std::size_t step = 0; step < found.size(); ++step)
        EXPECT_NEAR(found[step]["loss"].get<double>(), expected[step]["loss"].get<double>(), 1e-3) << step;

    // A guess of one's own makes it Newton's method, in every step: here from what the step before predicts.
    const auto metadata = [&] { return files::read_safetensors(folder / "resnet.safetensors").metadata; };
    EXPECT_EQ(metadata().at("method"), "automatic");
    EXPECT_EQ(metadata().at("guess"), "initial_state");
    const Outcome resumed =
        run({"train", "resnet", "--resume", "resnet.safetensors", "--steps", "6", "--guess", "predicted", "--json"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    EXPECT_EQ(metadata().at("method"), "automatic");
    EXPECT_EQ(metadata().at("guess"), "predicted");
    for (const Json& step : resumed.json()["steps"]) EXPECT_GE(step["iterations"], 1);
    EXPECT_EQ(run({"validate", "resnet.safetensors", "--method", "automatic"}).exit_code, 0);
}

TEST_F(Train, GoesOnAfterCtrlC) {
    const Outcome whole =
        run(small({"--steps", "200", "--checkpoint", "whole.safetensors", "--log", "whole.log", "--json"}));
    ASSERT_EQ(whole.exit_code, 0) << whole.errors;

    const pid_t child = start(small({"--steps", "200", "--log", "log"}));
    for (int wait = 0; wait < 6000 && log().size() < 3; ++wait)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    kill(child, SIGINT);
    const Outcome interrupted = wait_for(child);
    EXPECT_EQ(interrupted.exit_code, 130) << interrupted.errors;
    EXPECT_THAT(interrupted.output, HasSubstr("go on with: deeppcr train resnet --resume resnet.safetensors"));
    const std::size_t done = log().size();
    ASSERT_GE(done, 3u);
    ASSERT_LT(done, 200u);
    EXPECT_EQ(files::read_safetensors(folder / "resnet.safetensors").metadata.at("step"), std::to_string(done));

    const Outcome resumed = run({"train", "resnet", "--resume", "resnet.safetensors", "--log", "log", "--json"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    const auto found = log(), expected = log("whole.log");
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t step = 0; step < found.size(); ++step)
        for (const char* field : {"step", "loss", "accuracy", "gradient_norm", "iterations", "residual"})
            EXPECT_EQ(found[step][field], expected[step][field]) << field << " of step " << step + 1;
    EXPECT_EQ(resumed.json()["test"]["loss"], whole.json()["test"]["loss"]);

    // The checkpoint before, of the end of the last epoch but one, stands in for one that is damaged.
    damage(folder / "resnet.safetensors");
    const Outcome again = run({"train", "resnet", "--resume", "resnet.safetensors", "--json"});
    ASSERT_EQ(again.exit_code, 0) << again.errors;
    EXPECT_THAT(again.errors, AllOf(HasSubstr("checksum"), HasSubstr("resnet.safetensors.previous is used")));
    EXPECT_EQ(again.json()["steps"].size(), 4u);
    EXPECT_EQ(again.json()["test"]["loss"], whole.json()["test"]["loss"]);
}

TEST_F(Train, KeepsWhatIsThere) {
    ASSERT_EQ(run(small({"--steps", "1"})).exit_code, 0);
    const std::string before = contents(folder / "resnet.safetensors");
    expect_error(small({"--steps", "1"}), AllOf(HasSubstr("resnet.safetensors"), HasSubstr("--overwrite")));
    EXPECT_EQ(contents(folder / "resnet.safetensors"), before);
    EXPECT_EQ(run(small({"--steps", "1", "--overwrite", "--seed", "2"})).exit_code, 0);
    EXPECT_NE(contents(folder / "resnet.safetensors"), before);
}

TEST_F(Train, ChangesOnResumeOnlyWhatIsGiven) {
    ASSERT_EQ(run(small({"--steps", "2", "--tolerance", "1e-4"})).exit_code, 0);
    const Outcome resumed = run({"train", "resnet", "--resume", "resnet.safetensors", "--steps", "3", "--method",
                                 "sequential", "--checkpoint", "more.safetensors"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    const auto metadata = files::read_safetensors(folder / "more.safetensors").metadata;
    EXPECT_EQ(metadata.at("step"), "3");
    EXPECT_EQ(metadata.at("method"), "sequential");
    EXPECT_EQ(metadata.at("tolerance"), "1e-04");
    EXPECT_EQ(metadata.at("layers"), "20");
    expect_error({"train", "resnet", "--resume", "resnet.safetensors", "--width", "7"},
                 HasSubstr("width: expected 6, as in the checkpoint, got 7"));
}

TEST_F(Train, RefusesBadOptions) {
    expect_error({"train"}, HasSubstr("deeppcr train --help"));
    expect_error({"train", "gru"}, HasSubstr("gru"));
    expect_error({"train", "resnet", "--activation", "cosine"}, AllOf(HasSubstr("--activation"), HasSubstr("cosine")));
    expect_error({"train", "resnet", "--method", "magic"}, HasSubstr("--method"));
    expect_error({"train", "resnet", "--layers", "many"}, HasSubstr("--layers"));
    expect_error({"train", "resnet", "--layers", "1023", "--skip", "2"}, HasSubstr("a multiple of skip = 2, got 1023"));
    expect_error({"train", "resnet", "--layers", "-4"}, HasSubstr("layers"));
    expect_error({"train", "resnet", "--batch", "0"}, HasSubstr("batch: expected at least 1"));
    expect_error({"train", "resnet", "--train-images", "70000"}, HasSubstr("train_images: expected 0 to 54000"));
    expect_error({"train", "resnet", "--learning-rate", "-1"}, HasSubstr("learning_rate"));
    expect_error({"train", "resnet", "--seed", "-1"}, HasSubstr("--seed: expected a number of 0 or more, got -1"));
    expect_error({"train", "resnet", "--tolerance", "nan"}, HasSubstr("tolerance"));
    expect_error({"train", "resnet", "--data", "nowhere"}, HasSubstr("dataset-fashion-mnist"));
    expect_error({"train", "resnet", "--checkpoint", "nowhere/file"}, HasSubstr("nowhere"));
    expect_error({"train", "resnet", "--checkpoint", "/proc/file"}, HasSubstr("/proc/file: cannot be written"));
    expect_error({"train", "resnet", "--resume", "none.safetensors"}, HasSubstr("none.safetensors"));
    expect_error({"train", "resnet", "--log", "nowhere/log"}, HasSubstr("nowhere/log"));
    expect_error({"train", "resnet", "--layers", "4", "--width", "2000000"}, HasSubstr("bytes"));
    // The dense Jacobians of 1,024 layers and 10,000 images: 168 GB.
    expect_error({"train", "resnet", "--width", "64", "--batch", "10000", "--window", "1024"}, HasSubstr("bytes"));
    EXPECT_FALSE(std::filesystem::exists(folder / "resnet.safetensors"));
}

TEST_F(Train, RefusesWhatIsNoCheckpoint) {
    ASSERT_EQ(run(small({"--steps", "1"})).exit_code, 0);
    const auto checkpoint = folder / "resnet.safetensors";
    expect_error({"validate"}, HasSubstr("checkpoint"));
    expect_error({"validate", "none.safetensors"}, HasSubstr("none.safetensors"));
    expect_error({"validate", "resnet.safetensors", "--data", "nowhere"}, HasSubstr("dataset-fashion-mnist"));
    expect_error({"validate", "resnet.safetensors", "--batch", "-1"}, HasSubstr("batch"));
    expect_error({"validate", "resnet.safetensors", "--length", "5"}, HasSubstr("--length"));
    files::write_safetensors(folder / "other.safetensors", {{{"x", {{1}, std::vector<float>{1}}}}, {}});
    expect_error({"validate", "other.safetensors"}, HasSubstr("not a checkpoint"));
    std::filesystem::resize_file(checkpoint, std::filesystem::file_size(checkpoint) / 2);
    expect_error({"validate", "resnet.safetensors"}, HasSubstr("resnet.safetensors"));
    expect_error({"train", "resnet", "--resume", "resnet.safetensors"}, HasSubstr("resnet.safetensors"));
}

TEST_F(Train, HelpShowsExamples) {
    EXPECT_THAT(run({"train", "resnet", "--help"}).output,
                AllOf(HasSubstr("deeppcr train resnet --layers 1024"), HasSubstr("--guess")));
    EXPECT_THAT(run({"validate", "--help"}).output, HasSubstr("deeppcr validate resnet.safetensors"));
}

}  // namespace
}  // namespace deeppcr
