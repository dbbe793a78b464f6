// deeppcr train under mpirun: several processes compute what one does, one of them speaks, and all end together.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <fstream>
#include <set>
#include <thread>

#include <files/safetensors.hpp>

#include "program.hpp"

namespace deeppcr {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Json = nlohmann::json;
namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

class Ranks : public ProgramTest {
protected:
    using Words = std::vector<std::string>;
    static Words joined(Words words, const Words& more) {
        words.insert(words.end(), more.begin(), more.end());
        return words;
    }
    pid_t start_on(int ranks, const Words& arguments) const {
        return start(
            joined({"-n", std::to_string(ranks), DEEPPCR_PROGRAM}, arguments), [] {}, DEEPPCR_MPIRUN);
    }
    Outcome run_on(int ranks, const Words& arguments) const { return wait_for(start_on(ranks, arguments)); }

    void prepare_tokens() const {
        std::ofstream text(folder / "text", std::ios::binary);
        for (int i = 0; i < 500; ++i) text << "line " << i * i % 97 << " of a text.\n";
        text.close();
        ASSERT_EQ(run({"prepare", "text"}).exit_code, 0);
    }
    static Words language(const std::string& steps, const Words& more = {}) {
        return joined({"train", "lm", "--width", "16", "--layers", "2", "--batch", "4", "--context", "32", "--chunk",
                       "8", "--threads", "1", "--steps", steps},
                      more);
    }
    static Words swap(const Words& more = {}) {
        return joined({"train", "swap", "--train-examples", "256", "--held-out", "0", "--large-batch", "64",
                       "--large-epochs", "1", "--small-epochs", "1", "--small-batch", "16"},
                      more);
    }
    void wait_for_lines(const std::string& name, std::size_t lines) const {
        for (int wait = 0; wait < 6000 && log(name).size() < lines; ++wait)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        ASSERT_GE(log(name).size(), lines);
    }
    void expect_same_losses(const std::string& found_name, const std::string& expected_name, double tolerance) const {
        const auto found = log(found_name), expected = log(expected_name);
        ASSERT_EQ(found.size(), expected.size());
        for (std::size_t line = 0; line < found.size(); ++line)
            for (const char* field : {"step", "loss", "validation_loss"})
                if (expected[line].contains(field)) {
                    EXPECT_NEAR(found[line].at(field).get<double>(), expected[line][field].get<double>(), tolerance)
                        << field << " of line " << line;
                }
    }
    /// The processes that mpirun has started.
    static std::set<pid_t> ranks_of(pid_t mpirun) {
        std::set<pid_t> found;
        for (const auto& thread : fs::directory_iterator("/proc/" + std::to_string(mpirun) + "/task")) {
            std::ifstream children(thread.path() / "children");
            for (pid_t child = 0; children >> child;) found.insert(child);
        }
        return found;
    }
};

TEST_F(Ranks, TrainALanguageModelTogether) {
    prepare_tokens();
    const Words more = {"--checkpoint", "alone", "--log", "alone.log"};
    ASSERT_EQ(run(language("6", more)).exit_code, 0);
    for (const auto& [name, ranks] : {std::pair<std::string, int>("sequences", 4), {"steps", 2}}) {
        const Outcome outcome =
            run_on(ranks, language("6", {"--share", name, "--log", name + ".log", "--checkpoint", name, "--json"}));
        ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
        EXPECT_EQ(outcome.json()["steps"].size(), 6u) << "one process prints: " << outcome.output;
        expect_same_losses(name + ".log", "alone.log", 1e-3);
    }
    const Outcome validated = run({"validate", "sequences", "--json"});
    ASSERT_EQ(validated.exit_code, 0) << validated.errors;
    EXPECT_NEAR(validated.json()["loss"].get<double>(), log("alone.log").back()["validation_loss"], 1e-3);
}

TEST_F(Ranks, SaveWhenMpirunIsToldToEnd) {
    prepare_tokens();
    // mpirun tells its processes after so many seconds, and gives them as many.
    setenv("OMPI_MCA_odls_base_sigkill_timeout", "3", 1);
    const pid_t child = start_on(4, language("1000000", {"--log", "log"}));
    unsetenv("OMPI_MCA_odls_base_sigkill_timeout");
    wait_for_lines("log", 3);
    kill(child, SIGTERM);
    const Outcome outcome = wait_for(child);
    EXPECT_NE(outcome.exit_code, 0);
    ASSERT_TRUE(fs::exists(folder / "lm.safetensors")) << outcome.output << outcome.errors;
    EXPECT_EQ(files::read_safetensors(folder / "lm.safetensors").metadata.at("step"),
              std::to_string(log("log").size()));
}

TEST_F(Ranks, GoOnInOtherNumbers) {
    prepare_tokens();
    ASSERT_EQ(run(language("100", {"--checkpoint", "whole", "--log", "whole.log"})).exit_code, 0);
    // One rank, then two, of which one is told to end, then four.
    pid_t child = start(language("100", {"--log", "log"}));
    wait_for_lines("log", 3);
    kill(child, SIGTERM);
    ASSERT_EQ(wait_for(child).exit_code, 130);
    const std::size_t begun = log("log").size();
    child = start_on(2, {"train", "lm", "--resume", "lm.safetensors", "--log", "log"});
    wait_for_lines("log", begun + 3);
    const std::set<pid_t> ranks = ranks_of(child);
    ASSERT_EQ(ranks.size(), 2u);
    kill(*ranks.rbegin(), SIGTERM);
    const Outcome interrupted = wait_for(child);
    EXPECT_EQ(interrupted.exit_code, 130) << interrupted.errors;
    EXPECT_THAT(interrupted.output, HasSubstr("go on with: deeppcr train lm --resume lm.safetensors"));
    const std::size_t done = log("log").size();
    ASSERT_LT(done, 100u);
    EXPECT_EQ(files::read_safetensors(folder / "lm.safetensors").metadata.at("step"), std::to_string(done));
    const Outcome resumed = run_on(4, {"train", "lm", "--resume", "lm.safetensors", "--log", "log"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    expect_same_losses("log", "whole.log", 0.02);
}

TEST_F(Ranks, OneThatIsKilledEndsAllAndTheCheckpointIsWhole) {
    prepare_tokens();
    const pid_t child = start_on(4, language("100000", {"--checkpoint-interval", "1", "--log", "log"}));
    wait_for_lines("log", 3);
    const std::set<pid_t> ranks = ranks_of(child);
    ASSERT_EQ(ranks.size(), 4u);
    const auto begin = Clock::now();
    kill(*ranks.rbegin(), SIGKILL);
    const Outcome outcome = wait_for(child);
    EXPECT_LT(Clock::now() - begin, std::chrono::seconds(20)) << "hangs, however slow the machine";
    EXPECT_NE(outcome.exit_code, 0);
    EXPECT_THAT(outcome.output + outcome.errors, AllOf(HasSubstr("rank"), HasSubstr("signal 9")));
    const auto is_there = [](pid_t rank) { return kill(rank, 0) == 0; };
    while (std::any_of(ranks.begin(), ranks.end(), is_there) && Clock::now() - begin < std::chrono::seconds(20))
        std::this_thread::sleep_for(std::chrono::milliseconds(100));  // mpirun does not wait for all
    EXPECT_TRUE(std::none_of(ranks.begin(), ranks.end(), is_there));
    const Outcome validated = run({"validate", "lm.safetensors", "--json"});
    EXPECT_EQ(validated.exit_code, 0) << validated.errors;
    const Outcome resumed = run({"train", "lm", "--resume", "lm.safetensors", "--plan"});
    EXPECT_EQ(resumed.exit_code, 0) << resumed.errors;
}

TEST_F(Ranks, AreTheWorkersOfSwapToTheBit) {
    const Outcome simulated = run(swap({"--workers", "4", "--checkpoint", "simulated", "--log", "simulated.log"}));
    ASSERT_EQ(simulated.exit_code, 0) << simulated.errors;
    const Outcome outcome = run_on(4, swap({"--checkpoint", "ranks", "--log", "ranks.log", "--compare"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_THAT(outcome.output, HasSubstr("worker 3: test accuracy"));
    EXPECT_TRUE(contents(folder / "ranks") == contents(folder / "simulated"));
    expect_same_losses("ranks.log", "simulated.log", 0);

    // What four simulated workers have begun four ranks finish, and the other way round.
    fs::copy_file(folder / "simulated.previous", folder / "begun");
    ASSERT_EQ(run_on(4, {"train", "swap", "--resume", "begun", "--checkpoint", "on-ranks"}).exit_code, 0);
    EXPECT_TRUE(contents(folder / "on-ranks") == contents(folder / "simulated"));
    ASSERT_EQ(run({"train", "swap", "--resume", "ranks.previous", "--checkpoint", "in-one"}).exit_code, 0);
    EXPECT_TRUE(contents(folder / "in-one") == contents(folder / "simulated"));

    const Outcome fewer = run_on(2, {"train", "swap", "--resume", "begun", "--checkpoint", "refused"});
    EXPECT_EQ(fewer.exit_code, 1);
    EXPECT_THAT(fewer.errors, HasSubstr("deeppcr: error: workers: expected 2, as there are ranks, got 4"));
    EXPECT_FALSE(fs::exists(folder / "refused"));
}

TEST_F(Ranks, TrainTheOtherModelsTogether) {
    const Words resnet = {"train",          "resnet", "--layers",   "20",  "--width", "6", "--batch", "16",
                          "--train-images", "64",     "--held-out", "100", "--steps", "5", "--log"};
    ASSERT_EQ(run(joined(resnet, {"alone.log", "--checkpoint", "alone"})).exit_code, 0);
    const Outcome outcome = run_on(2, joined(resnet, {"log"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    expect_same_losses("log", "alone.log", 1e-3);
    EXPECT_EQ(run({"validate", "resnet.safetensors"}).exit_code, 0);

    const Words diffusion = {
        "train",   "diffusion", "--latents",           "4", "--hidden",       "16", "--blocks", "1", "--batch", "16",
        "--steps", "3",         "--autoencoder-steps", "3", "--train-images", "64", "--json"};
    const Outcome alone = run(joined(diffusion, {"--checkpoint", "one"}));
    const Outcome shared = run_on(2, diffusion);
    ASSERT_EQ(shared.exit_code, 0) << shared.errors;
    for (std::size_t step = 0; step < 6; ++step)
        EXPECT_NEAR(shared.json()["steps"][step]["loss"].get<double>(), alone.json()["steps"][step]["loss"], 1e-4);
}

TEST_F(Ranks, TrainOnTasksTogether) {
    const Words task = {"train",    "task",      "recall",  "--length", "12",      "--width", "8",
                        "--layers", "1",         "--batch", "4",        "--steps", "12",      "--validation-sequences",
                        "4",        "--threads", "1",       "--log"};
    ASSERT_EQ(run(joined(task, {"alone.log", "--checkpoint", "alone"})).exit_code, 0);
    const Outcome outcome = run_on(2, joined(task, {"log"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    expect_same_losses("log", "alone.log", 1e-3);
    EXPECT_EQ(run({"validate", "task.safetensors"}).exit_code, 0);
}

TEST_F(Ranks, SayWhatIsWrongOnce) {
    prepare_tokens();
    const Outcome batch = run_on(2, {"train", "lm", "--batch", "3"});
    EXPECT_EQ(batch.exit_code, 1);
    const std::string message = "deeppcr: error: batch: expected a multiple of the 2 ranks, got 3";
    EXPECT_THAT(batch.errors, HasSubstr(message));
    EXPECT_EQ(batch.errors.find(message), batch.errors.rfind(message));
    const Outcome share = run_on(2, language("5", {"--share", "steps", "--mixer", "attention"}));
    EXPECT_EQ(share.exit_code, 1);
    const Outcome alone = run_on(2, {"prepare", "text", "-o", "other"});
    EXPECT_EQ(alone.exit_code, 1);
    EXPECT_THAT(alone.errors,
                HasSubstr("mpirun -n: expected 1, as no processes share the work of `deeppcr prepare`, got 2"));
    EXPECT_FALSE(fs::exists(folder / "other"));
    EXPECT_THAT(share.errors, HasSubstr("share: expected sequences, as steps can be shared where the mixer is a cell"));
}

}  // namespace
}  // namespace deeppcr
