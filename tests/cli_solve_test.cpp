// The program as a user meets it: deeppcr solve, check and info, on good and bad input, and what is common to all
// commands.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include <deeppcr/array.hpp>
#include <deeppcr/execution.hpp>
#include <files/npy.hpp>

#include "program.hpp"

namespace deeppcr {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

/// cuda where there is a GPU.
std::vector<std::string> backends() {
    std::vector<std::string> all{"cpu", "reference"};
    if (!cuda_devices().empty()) all.emplace_back("cuda");
    return all;
}

class Solve : public ProgramTest {
protected:
    /// An error of the program: exit code 1, the message on standard error, and the same as JSON on standard output.
    void expect_error(std::vector<std::string> arguments, const testing::Matcher<std::string>& message) const {
        arguments.emplace_back("--json");
        const Outcome outcome = run(arguments);
        EXPECT_EQ(outcome.exit_code, 1);
        EXPECT_THAT(outcome.errors, AllOf(StartsWith("deeppcr: error: "), message));
        EXPECT_EQ("deeppcr: error: " + outcome.json().value("error", "") + "\n", outcome.errors);
        EXPECT_EQ(outcome.json().value("exit_code", 0), 1);
    }

    template <class T>
    void write(const std::string& name, const std::vector<index>& shape, const std::vector<T>& values) const {
        files::write_npy(folder / name, {shape, values});
    }
    template <class T>
    void write_random(const std::string& name, const std::vector<index>& shape, double scale) const {
        const index count = *files::element_count(shape, 8);
        const auto random = Buffer<T>::random({count, 1, 1}, 7);
        std::vector<T> values(random.data(), random.data() + count);
        for (T& value : values) value *= T(scale);
        write(name, shape, values);
    }
    template <class T>
    std::vector<T> read(const std::string& name) const {
        return std::get<std::vector<T>>(files::read_npy(folder / name).values);
    }

    std::size_t files_in_folder() const {
        return std::size_t(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
    }
};

// -------------------------------------------------------------------------------------------------------------- solve

TEST_F(Solve, WhatCanBeCheckedByHand) {
    // Two sequences of one number: x_t = 2 x_{t-1} + 1 and x_t = 10 x_{t-1} + 1; A_1 plays no part.
    write<double>("A.npy", {3, 2, 1}, {99, 99, 2, 10, 2, 10});
    write<double>("b.npy", {3, 2, 1}, {1, 1, 1, 1, 1, 1});
    for (const char* method : {"automatic", "sequential", "pcr", "scan"})
        for (const std::string& backend : backends()) {
            SCOPED_TRACE(std::string(method) + " on " + backend);
            const Outcome outcome =
                run({"solve", "A.npy", "b.npy", "-o", "x.npy", "--method", method, "--backend", backend});
            EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
            // One channel per sequence: `automatic` scans.
            const std::string used = std::string(method) == "automatic" ? "scan" : method;
            EXPECT_THAT(outcome.output, AllOf(StartsWith("x.npy: [3,2,1] float64, " + used + " on " + backend),
                                              HasSubstr("residual 0 ")));
            EXPECT_THAT(read<double>("x.npy"), ElementsAre(1, 1, 3, 11, 7, 111));
        }
    // y_t = A_{t+1} y_{t+1} + 1, from the end
    for (const char* method : {"sequential", "pcr", "scan"}) {
        EXPECT_EQ(run({"solve", "A.npy", "b.npy", "-o", "y.npy", "--method", method, "--transposed"}).exit_code, 0);
        EXPECT_THAT(read<double>("y.npy"), ElementsAre(7, 111, 3, 11, 1, 1));
    }
    EXPECT_EQ(files_in_folder(), 4U);
}

TEST_F(Solve, DenseAndTransposedByHand) {
    // A_2 = [[0,1],[2,0]]: x_2 = (x_1[1], 2 x_1[0]) + b_2, y_1 = (2 y_2[1], y_2[0]) + b_1.
    write<float>("A.npy", {2, 1, 2, 2}, {9, 9, 9, 9, 0, 1, 2, 0});
    write<float>("b.npy", {2, 1, 2}, {3, 5, 100, 200});
    EXPECT_EQ(run({"solve", "A.npy", "b.npy", "-o", "x.npy"}).exit_code, 0);
    EXPECT_THAT(read<float>("x.npy"), ElementsAre(3, 5, 105, 206));
    EXPECT_EQ(run({"solve", "A.npy", "b.npy", "-o", "y.npy", "--transposed"}).exit_code, 0);
    EXPECT_THAT(read<float>("y.npy"), ElementsAre(403, 105, 100, 200));
}

TEST_F(Solve, EveryKindOfJacobianTypeAndMethodHasASmallResidual) {
    bool float64 = false;  // alternates, so that each method meets both types without twice as many runs
    for (const std::vector<index>& shape :
         {std::vector<index>{37, 3, 6}, {37, 3, 6, 6}, {37, 3, 3, 2, 2}, {1, 1, 6}, {37, 0, 6, 6}}) {
        float64 = !float64;
        for (const char* method : {"automatic", "sequential", "pcr", "scan"}) {
            float64 = !float64;
            SCOPED_TRACE(files::to_string(shape) + (float64 ? " float64 " : " float32 ") + method);
            const std::vector<index> states = {shape[0], shape[1], 6};
            if (float64) {
                write_random<double>("A.npy", shape, 0.4);
                write_random<double>("b.npy", states, 1);
            } else {
                write_random<float>("A.npy", shape, 0.4);
                write_random<float>("b.npy", states, 1);
            }
            const Outcome outcome = run({"--json", "solve", "A.npy", "b.npy", "-o", "x.npy", "--method", method,
                                         "--threads", "2", "--chunk", "5"});
            ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
            const Json result = outcome.json();
            EXPECT_EQ(result["shape"], Json(states));
            EXPECT_EQ(result["element_type"], float64 ? "float64" : "float32");
            EXPECT_EQ(result["block"], shape.size() == 3 ? 1 : shape.back());
            if (std::string(method) == "automatic")
                EXPECT_NE(result["method"], "automatic");  // it says what it chose
            else
                EXPECT_EQ(result["method"], method);
            EXPECT_EQ(result["backend"], "cpu");
            EXPECT_GE(result["seconds"], 0.0);
            EXPECT_LT(result["relative_residual"], float64 ? 1e-13 : 1e-4);
            EXPECT_EQ(files::read_npy(folder / "x.npy").shape, states);
        }
    }
}

TEST_F(Solve, NoStepsAtAll) {
    write<float>("A.npy", {0, 2, 3, 3}, {});
    write<float>("b.npy", {0, 2, 3}, {});
    EXPECT_EQ(run({"solve", "A.npy", "b.npy", "-o", "x.npy"}).exit_code, 0);
    EXPECT_EQ(files::read_npy(folder / "x.npy").shape, (std::vector<index>{0, 2, 3}));
}

TEST_F(Solve, ShapesThatDoNotMatch) {
    write<float>("A.npy", {8, 1, 3, 3}, std::vector<float>(72));
    write<float>("b.npy", {5, 1, 3}, std::vector<float>(15));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy"},
                 "deeppcr: error: b.npy has shape [5,1,3], expected [8,1,3] to match A.npy [8,1,3,3]\n");
    write<float>("b.npy", {8, 3}, std::vector<float>(24));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy"}, HasSubstr("b.npy has shape [8,3], expected [8,1,3]"));
    write<float>("blocks.npy", {8, 1, 2, 3, 3}, std::vector<float>(144));
    expect_error({"solve", "blocks.npy", "b.npy", "-o", "x.npy"}, HasSubstr("expected [8,1,6] to match blocks.npy"));
    for (const std::vector<index>& shape :
         {std::vector<index>{24}, {8, 3}, {8, 1, 3, 2}, {2, 2, 2, 3, 2}, {1, 1, 1, 1, 1, 1}}) {
        write<float>("A.npy", shape, std::vector<float>(std::size_t(*files::element_count(shape, 4))));
        expect_error(
            {"solve", "A.npy", "b.npy", "-o", "x.npy"},
            HasSubstr("A.npy: expected shape [T,B,D], [T,B,D,D] or [T,B,D/K,K,K], got " + files::to_string(shape)));
    }
    EXPECT_FALSE(fs::exists(folder / "x.npy"));
}

TEST_F(Solve, ElementTypesThatDoNotMatch) {
    write<float>("A.npy", {2, 1, 1}, {1, 1});
    write<double>("b.npy", {2, 1, 1}, {1, 1});
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy"},
                 HasSubstr("b.npy has element type float64, expected float32 to match A.npy"));
}

TEST_F(Solve, NumbersThatAreNotFinite) {
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    write<float>("A.npy", {2, 1, 2, 2}, {1, 1, 1, 1, 1, 1, nan, nan});
    write<float>("b.npy", {2, 1, 2}, {1, 1, 1, 1});
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy"},
                 HasSubstr("A.npy: expected finite numbers, got nan at [1,0,1,0]"));
    write<float>("A.npy", {2, 1, 2}, {1, 1, 1, 1});
    write<float>("b.npy", {2, 1, 2}, {1, 1, 1, -infinity});
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy"},
                 HasSubstr("b.npy: expected finite numbers, got -inf at [1,0,1]"));
    EXPECT_FALSE(fs::exists(folder / "x.npy"));
}

TEST_F(Solve, FilesThatCannotBeRead) {
    write<float>("A.npy", {2, 1, 1}, {1, 1});
    write<float>("b.npy", {2, 1, 1}, {1, 1});
    expect_error({"solve", "A.npy", "missing.npy", "-o", "x.npy"},
                 HasSubstr("missing.npy: cannot be opened: No such file"));
    fs::resize_file(folder / "b.npy", fs::file_size(folder / "b.npy") - 1);
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy"},
                 HasSubstr("b.npy: expected 8 bytes of data for shape [2,1,1], got 7"));
    std::ofstream(folder / "b.npy") << "no array";
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy"}, HasSubstr("b.npy: expected a .npy file"));
}

TEST_F(Solve, OutputsThatCannotBeWritten) {
    write<float>("A.npy", {2, 1, 1}, {1, 1});
    write<float>("b.npy", {2, 1, 1}, {1, 1});
    const std::string before = contents(folder / "b.npy");
    expect_error({"solve", "A.npy", "b.npy", "-o", "b.npy"}, HasSubstr("b.npy: is an input too"));
    expect_error({"solve", "A.npy", "b.npy", "-o", "./A.npy"}, HasSubstr("./A.npy: is an input too"));
    fs::create_hard_link(folder / "b.npy", folder / "link.npy");
    expect_error({"solve", "A.npy", "b.npy", "-o", "link.npy"}, HasSubstr("link.npy: is an input too"));
    EXPECT_EQ(contents(folder / "b.npy"), before);
    expect_error({"solve", "A.npy", "b.npy", "-o", "missing/x.npy"}, HasSubstr("missing/x.npy: cannot be written"));
    expect_error({"solve", "A.npy", "b.npy", "-o", "."}, HasSubstr("expected a file name, got a folder"));
    expect_error({"solve", "A.npy", "b.npy", "-o", "/dev/full"},
                 HasSubstr("/dev/full: cannot be written: No space left"));
}

TEST_F(Solve, AFullDiskLeavesTheOldFileAndNoTemporary) {
    write<float>("A.npy", {100'000, 1, 1}, std::vector<float>(100'000, 0.5F));
    write<float>("b.npy", {100'000, 1, 1}, std::vector<float>(100'000, 1));
    std::ofstream(folder / "x.npy") << "old";
    const Outcome outcome = run({"solve", "A.npy", "b.npy", "-o", "x.npy"}, [] {
        const rlimit limit = {1 << 16, 1 << 16};
        setrlimit(RLIMIT_FSIZE, &limit);
    });
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_EQ(outcome.errors,
              "deeppcr: error: x.npy: cannot be written: File too large; the file stays as it was before\n");
    EXPECT_EQ(contents(folder / "x.npy"), "old");
    EXPECT_EQ(files_in_folder(), 3U);
}

TEST_F(Solve, WhatDoesNotFitIntoMemory) {
    // 2^41 bytes are claimed and, to stat, there.
    if (!write_sparse("A.npy", "(536870912, 1, 32, 32)", std::uintmax_t(1) << 41) ||
        !write_sparse("b.npy", "(536870912, 1, 32)", std::uintmax_t(1) << 36))
        GTEST_SKIP() << "this file system has no room for a sparse file of 2 TiB";
    // A once, b and the solution.
    expect_error(
        {"solve", "A.npy", "b.npy", "-o", "x.npy"},
        HasSubstr("solving this needs " + std::to_string((index(1) << 41) + (index(1) << 37)) + " bytes of memory"));
}

TEST_F(Solve, ASolutionBeyondTheRangeOfNumbersIsNotWritten) {
    write<float>("A.npy", {50, 1, 1}, std::vector<float>(50, 1000));
    write<float>("b.npy", {50, 1, 1}, std::vector<float>(50, 1));
    for (const char* method : {"automatic", "sequential", "pcr", "scan"}) {
        const Outcome outcome = run({"solve", "A.npy", "b.npy", "-o", "x.npy", "--method", method, "--json"});
        EXPECT_EQ(outcome.exit_code, 2);
        EXPECT_THAT(outcome.errors, HasSubstr("deeppcr: error: the result is not finite"));
        EXPECT_EQ(outcome.json().value("exit_code", 0), 2);
        EXPECT_FALSE(fs::exists(folder / "x.npy"));
    }
}

TEST_F(Solve, ASolutionThatIsNotFiniteInItsLastStepOnly) {
    write<double>("A.npy", {2, 1, 1}, {0, 1e200});
    write<double>("b.npy", {2, 1, 1}, {1e200, 1});
    EXPECT_EQ(run({"solve", "A.npy", "b.npy", "-o", "x.npy"}).exit_code, 2);
    write<float>("A.npy", {2, 1, 1}, {0, 1e30F});
    write<float>("b.npy", {2, 1, 1}, {1e30F, 1});
    EXPECT_EQ(run({"solve", "A.npy", "b.npy", "-o", "x.npy"}).exit_code, 2);
    EXPECT_FALSE(fs::exists(folder / "x.npy"));
}

TEST_F(Solve, ProductsBeyondTheRangeOfNumbersAreSolvedSequentially) {
    // b is 0 until the last step, so the solution is 0 until then; but the products of A overflow.
    const index steps = 100'000;
    write<float>("A.npy", {steps, 1, 1}, std::vector<float>(std::size_t(steps), 1e10F));
    std::vector<float> right_side(steps);
    right_side.back() = 1;
    write<float>("b.npy", {steps, 1, 1}, right_side);
    const Outcome pcr = run({"solve", "A.npy", "b.npy", "-o", "x.npy", "--method", "pcr"});
    EXPECT_EQ(pcr.exit_code, 2);
    EXPECT_THAT(pcr.errors, HasSubstr("--method sequential may succeed"));
    const Outcome automatic = run({"solve", "A.npy", "b.npy", "-o", "x.npy", "--json"});
    EXPECT_EQ(automatic.exit_code, 0) << automatic.errors;
    EXPECT_EQ(read<float>("x.npy"), right_side);
}

TEST_F(Solve, ArgumentsThatMakeNoSense) {
    write<float>("A.npy", {2, 1, 1}, {1, 1});
    write<float>("b.npy", {2, 1, 1}, {1, 1});
    expect_error({"solve"}, HasSubstr("A is required"));
    expect_error({"solve", "A.npy", "b.npy"}, HasSubstr("--output is required"));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy", "--method", "magic"},
                 AllOf(HasSubstr("--method"), HasSubstr("magic"), HasSubstr("pcr")));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy", "--backend", "abacus"}, HasSubstr("--backend"));
    if (cuda_devices().empty())
        expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy", "--backend", "cuda"},
                     HasSubstr("there is no GPU to use: " + cuda_problem()));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy", "--threads", "-1"}, HasSubstr("--threads"));
    expect_error({"check", "--seed", "-1"}, HasSubstr("--seed: expected a number of 0 or more, got -1"));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy", "--threads", "two"}, HasSubstr("--threads"));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy", "--chunk", "-5"}, HasSubstr("--chunk"));
    expect_error({"solve", "A.npy", "b.npy", "c.npy", "-o", "x.npy"}, HasSubstr("c.npy"));
    expect_error({"solve", "A.npy", "b.npy", "-o", "x.npy", "--colour"}, HasSubstr("--colour"));
}

// ----------------------------------------------------------------------------------------------------- check and info

TEST_F(Solve, CheckAgreesOnThisMachine) {
    const Outcome text = run({"check"});
    EXPECT_EQ(text.exit_code, 0) << text.output << text.errors;
    EXPECT_FALSE(text.output.empty());
    const Outcome outcome = run({"check", "--seed", "5", "--json"});
    EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
    EXPECT_EQ(outcome.json().value("ok", false), true);
    EXPECT_EQ(outcome.json().value("seed", 0), 5);
    EXPECT_GT(outcome.json().value("entries_checked", 0), 100);
    EXPECT_THAT(outcome.json()["problems"], IsEmpty());
    expect_error({"check", "--seed", "x"}, HasSubstr("--seed"));
    expect_error({"check", "everything"}, HasSubstr("everything"));
}

TEST_F(Solve, InfoTellsWhatThereIs) {
    const Outcome text = run({"info"});
    EXPECT_EQ(text.exit_code, 0) << text.errors;
    for (const std::string& word :
         {version(), simd_target(), std::string("cpu, reference"), std::string("threads"), std::string("memory")})
        EXPECT_THAT(text.output, HasSubstr(word));
    const Outcome outcome = run({"info", "--json"}, [] {
        setenv("DEEPPCR_THREADS", "3", 1);
        setenv("DEEPPCR_DATA", "/nowhere", 1);
    });
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    const Json info = outcome.json();
    EXPECT_EQ(info["version"], version());
    EXPECT_EQ(info["simd_target"], simd_target());
    EXPECT_EQ(info["simd_targets"], Json(simd_targets()));
    EXPECT_EQ(info["threads"], 3);
    EXPECT_EQ(info["gpus"], Json(cuda_devices()));
    EXPECT_GT(info["memory_available"], 1 << 20);
    EXPECT_TRUE(info["fashion_mnist"].is_null());
    EXPECT_TRUE(info.contains("blas") && info.contains("libtorch") && info.contains("compiler"));
}

TEST_F(Solve, InfoFindsTheDataThatItIsToldOf) {
    for (const char* name :
         {"train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"})
        std::ofstream(folder / name) << "x";
    EXPECT_EQ(run({"info", "--json", "--data", "."}).json()["fashion_mnist"], ".");
    expect_error({"info", "--data", "/nowhere"},
                 AllOf(HasSubstr("not found in /nowhere"), HasSubstr("apt-get install dataset-fashion-mnist")));
    expect_error({"info", "--verbose"}, HasSubstr("--verbose"));
}

// --------------------------------------------------------------------------------------------------- common to all

TEST_F(Solve, HelpHasAnExampleForEveryCommandAndTheExitCodes) {
    const Outcome help = run({"--help"});
    EXPECT_EQ(help.exit_code, 0);
    for (const char* part :
         {"deeppcr solve A.npy b.npy -o x.npy", "deeppcr check", "deeppcr info", "Exit codes", "130"})
        EXPECT_THAT(help.output, HasSubstr(part));
    for (const char* command : {"solve", "check", "info"}) {
        const Outcome own = run({command, "--help"});
        EXPECT_EQ(own.exit_code, 0);
        EXPECT_THAT(own.output, AllOf(HasSubstr("Example"), HasSubstr("deeppcr " + std::string(command))));
    }
    const Outcome shown = run({"--version"});
    EXPECT_EQ(shown.exit_code, 0);
    EXPECT_EQ(shown.output, "deeppcr " + version() + "\n");
}

TEST_F(Solve, ErrorsWithoutJsonLeaveStandardOutputEmpty) {
    for (const std::vector<std::string>& arguments :
         {std::vector<std::string>{"solve", "missing.npy", "b.npy", "-o", "x.npy"}, {"dissolve"}}) {
        const Outcome outcome = run(arguments);
        EXPECT_EQ(outcome.exit_code, 1);
        EXPECT_THAT(outcome.output, IsEmpty());
        EXPECT_THAT(outcome.errors, StartsWith("deeppcr: error: "));
    }
}

TEST_F(Solve, CommandsThatDoNotExist) {
    expect_error({}, HasSubstr("no command is given"));
    expect_error({"dissolve"}, AllOf(HasSubstr("dissolve"), HasSubstr("deeppcr --help")));
    expect_error({"--loud"}, HasSubstr("--loud"));
}

TEST_F(Solve, StandardOutputThatCannotBeWrittenIsAnError) {
    const Outcome outcome = run({"info"}, [] { dup2(open("/dev/full", O_WRONLY), 1); });
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_THAT(outcome.errors, HasSubstr("standard output cannot be written"));
}

TEST_F(Solve, AnInterruptEndsIt) {
    const index steps = 1'000'000;  // a second or so of work, which the signal cuts short
    write<float>("A.npy", {steps, 1, 2, 2}, std::vector<float>(std::size_t(steps) * 4, 0.25F));
    write<float>("b.npy", {steps, 1, 2}, std::vector<float>(std::size_t(steps) * 2, 1));
    const pid_t child = start({"solve", "A.npy", "b.npy", "-o", "x.npy", "--method", "pcr", "--backend", "reference"});
    ASSERT_TRUE(catches_interrupts(child));
    kill(child, SIGINT);
    const Outcome outcome = wait_for(child);
    EXPECT_EQ(outcome.exit_code, 130);
    EXPECT_EQ(outcome.errors, "deeppcr: error: interrupted\n");
    EXPECT_EQ(files_in_folder(), 2U);
}

}  // namespace
}  // namespace deeppcr
