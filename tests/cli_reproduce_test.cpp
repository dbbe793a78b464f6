// `deeppcr reproduce`, on tiny sizes: the report's two files, and what stops the command.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>
#include <string>

namespace {

using Json = nlohmann::ordered_json;

struct Outcome {
    int code = -1;
    std::string output, errors;
};

std::string contents(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    EXPECT_TRUE(file) << path;
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

/// A folder of its own for each test.
class ReproduceTest : public ::testing::Test {
protected:
    void SetUp() override {
        std::string name = (std::filesystem::temp_directory_path() / "deeppcr-reproduce-XXXXXX").string();
        ASSERT_NE(mkdtemp(name.data()), nullptr);
        folder = name;
    }
    void TearDown() override { std::filesystem::remove_all(folder); }

    /// `prefix` stands before the program: variables of the environment, `timeout`.
    Outcome reproduce(const std::string& arguments, const std::string& prefix = {}) const {
        const std::filesystem::path out = folder / "stdout", err = folder / "stderr";
        const std::string command = "cd '" + folder.string() + "' && " + prefix + " '" DEEPPCR_PROGRAM "' reproduce " +
                                    arguments + " >'" + out.string() + "' 2>'" + err.string() + "' </dev/null";
        const int status = std::system(command.c_str());
        return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, contents(out), contents(err)};
    }

    Json results(const std::string& name = "deeppcr-report") const {
        return Json::parse(contents(folder / name / "results.json"));
    }

    std::filesystem::path folder;
};

std::size_t occurrences(const std::string& text, const std::string& part) {
    std::size_t count = 0;
    for (std::size_t place = text.find(part); place != std::string::npos; place = text.find(part, place + 1)) ++count;
    return count;
}

void expect_header(const Json& results) {
    EXPECT_EQ(results["program"], "deeppcr reproduce");
    EXPECT_EQ(results["complete"], true);
    EXPECT_EQ(results["quick"], true);
    EXPECT_EQ(results["agreement"], true);
    EXPECT_TRUE(std::regex_match(results["date"].get<std::string>(), std::regex(R"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)")));
    EXPECT_GT(results["seconds"], 0.0);
    EXPECT_FALSE(results["version"].get<std::string>().empty());
    EXPECT_FALSE(results["schema"].empty());
    EXPECT_GE(results["machine"]["threads"], 1);
    for (const char* fact : {"processor", "simd", "system", "compiler"})
        EXPECT_FALSE(results["machine"][fact].get<std::string>().empty()) << fact;
}

/// What a ratio says must follow from the seconds beside it.
void expect_ratio(const Json& sequential, const Json& parallel, const std::string& pass) {
    const double expected = sequential[pass + "_seconds"].get<double>() / parallel[pass + "_seconds"].get<double>();
    EXPECT_GT(expected, 0);
    EXPECT_NEAR(parallel[pass + "_ratio"].get<double>(), expected, 1e-9 * expected);
}

void expect_mlp(const Json& mlp) {
    EXPECT_EQ(mlp["complete"], true);
    EXPECT_EQ(mlp["agreement"], true);
    EXPECT_NE(mlp["baseline"].get<std::string>().find("fused"), std::string::npos);
    ASSERT_EQ(mlp["configurations"].size(), 8U);  // 2 widths, 2 depths, 2 batches
    for (const Json& entry : mlp["configurations"]) {
        EXPECT_GE(entry["repetitions"], 3);
        for (const char* method : {"pcr", "scan"}) {
            const Json& parallel = entry[method];
            ASSERT_EQ(parallel["status"], "converged") << entry;
            EXPECT_GE(parallel["iterations"], 1);
            EXPECT_LE(parallel["iterations"], entry["depth"]);
            EXPECT_LE(parallel["state_difference"], mlp["state_tolerance"]);
            EXPECT_LE(parallel["gradient_difference"], mlp["gradient_tolerance"]);
            for (const char* pass : {"forward", "backward"}) {
                expect_ratio(entry["sequential"], parallel, pass);
                const Json& quartiles = parallel[std::string(pass) + "_quartiles"];
                EXPECT_LE(quartiles[0], parallel[std::string(pass) + "_seconds"]);
                EXPECT_GE(quartiles[1], parallel[std::string(pass) + "_seconds"]);
            }
        }
    }
}

/// Everything that the page shows is in the page.
void expect_page(const std::string& page, std::size_t plots) {
    EXPECT_EQ(page.rfind("<!DOCTYPE html>", 0), 0U);
    EXPECT_NE(page.find("</html>"), std::string::npos);
    for (const char* reference : {"http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link", "<img"})
        EXPECT_EQ(page.find(reference), std::string::npos) << reference;
    EXPECT_EQ(occurrences(page, "<svg "), plots);
    EXPECT_EQ(occurrences(page, "</svg>"), plots);
    EXPECT_NE(page.find("Quick run"), std::string::npos);
    EXPECT_EQ(page.find("Incomplete"), std::string::npos);
    EXPECT_EQ(page.find("nan"), std::string::npos);
    EXPECT_NE(page.find("prefers-color-scheme: dark"), std::string::npos);
}

constexpr std::size_t mlp_plots = 10;

TEST_F(ReproduceTest, Mlp) {
    const Outcome outcome = reproduce("mlp --quick");
    ASSERT_EQ(outcome.code, 0) << outcome.errors;
    EXPECT_NE(outcome.output.find("MLP forward pass, batch 1"), std::string::npos) << outcome.output;
    const Json found = results();
    expect_header(found);
    expect_mlp(found["mlp"]);
    EXPECT_FALSE(found.contains("resnet"));
    expect_page(contents(folder / "deeppcr-report" / "report.html"), mlp_plots);
}

TEST_F(ReproduceTest, JsonIsWhatTheFileHolds) {
    const Outcome outcome = reproduce("mlp --quick --json --output elsewhere/deep --seed 7");
    ASSERT_EQ(outcome.code, 0) << outcome.errors;
    const Json printed = Json::parse(outcome.output);
    EXPECT_EQ(printed, results("elsewhere/deep"));
    EXPECT_EQ(printed["seed"], 7);
    EXPECT_NE(printed["command"].get<std::string>().find("--seed 7"), std::string::npos);
}

TEST_F(ReproduceTest, AnOldReportIsReplaced) {
    std::filesystem::create_directory(folder / "report");
    std::ofstream(folder / "report" / "report.html") << "old";
    ASSERT_EQ(reproduce("mlp --quick -o report").code, 0);
    expect_page(contents(folder / "report" / "report.html"), mlp_plots);
    std::size_t files = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder / "report")) ++files;
    EXPECT_EQ(files, 2U) << "temporary files are left behind";
}

TEST_F(ReproduceTest, AnOutputFolderThatCannotBeWrittenIsRefusedAtOnce) {
    std::ofstream(folder / "file") << "a file, not a folder";
    for (const char* output : {"file", "file/inside", "/proc/deeppcr"}) {
        const Outcome outcome = reproduce(std::string("mlp --quick -o ") + output);
        EXPECT_EQ(outcome.code, 1) << output;
        EXPECT_NE(outcome.errors.find(output), std::string::npos) << outcome.errors;
        EXPECT_EQ(outcome.errors.find("MLP"), std::string::npos) << "it had begun: " << outcome.errors;
    }
    EXPECT_EQ(contents(folder / "file"), "a file, not a folder");
}

TEST_F(ReproduceTest, ArgumentsThatMakeNoSenseAreRefused) {
    for (const char* arguments :
         {"rnn", "mlp resnet", "mlp --seed -1", "mlp --seed one", "mlp --quick=perhaps", "mlp --output", "--fast"}) {
        const Outcome outcome = reproduce(arguments);
        EXPECT_EQ(outcome.code, 1) << arguments;
        EXPECT_EQ(outcome.errors.rfind("deeppcr: error: ", 0), 0U) << arguments << ": " << outcome.errors;
    }
    EXPECT_FALSE(std::filesystem::exists(folder / "deeppcr-report"));
}

TEST_F(ReproduceTest, HelpNamesThePartsAndAnExample) {
    const Outcome outcome = reproduce("--help");
    EXPECT_EQ(outcome.code, 0);
    for (const char* expected :
         {"mlp", "resnet", "all", "--output", "--quick", "--seed", "Example", "deeppcr reproduce"})
        EXPECT_NE(outcome.output.find(expected), std::string::npos) << expected;
}

TEST_F(ReproduceTest, AnInterruptedRunWritesWhatIsFinished) {
    const Outcome outcome = reproduce("mlp", "timeout --preserve-status --signal=INT 3");
    EXPECT_EQ(outcome.code, 130) << outcome.errors;
    const Json found = results();
    EXPECT_EQ(found["complete"], false);
    EXPECT_EQ(found["mlp"]["complete"], false);
    EXPECT_NE(contents(folder / "deeppcr-report" / "report.html").find("Incomplete"), std::string::npos);
}

}  // namespace
