// `deeppcr reproduce`, on tiny sizes: the report's two files, and what stops the command.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>
#include <string>

#include "program.hpp"

namespace deeppcr {
namespace {

using Json = nlohmann::ordered_json;

class ReproduceTest : public ProgramTest {
protected:
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

/// Everything that the page shows is in the page; a picture's bytes too.
void expect_page(std::string page, std::size_t plots, std::size_t pictures = 0) {
    const std::string inside = " src=\"data:image/png;base64,iVBOR";
    EXPECT_EQ(occurrences(page, inside), pictures);
    for (std::size_t place = 0; (place = page.find("<img ")) != std::string::npos;)
        page.erase(place, page.find('>', place) - place);
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
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_NE(outcome.output.find("MLP forward pass, batch 1"), std::string::npos) << outcome.output;
    const Json found = results();
    expect_header(found);
    expect_mlp(found["mlp"]);
    EXPECT_FALSE(found.contains("resnet"));
    expect_page(contents(folder / "deeppcr-report" / "report.html"), mlp_plots);
}

void expect_resnet(const Json& resnet) {
    EXPECT_EQ(resnet["complete"], true);
    EXPECT_EQ(resnet["agreement"], true);
    const Json &sequential = resnet["training"]["sequential"], &deeppcr = resnet["training"]["deeppcr"];
    const std::size_t steps = 6;
    for (const Json* trial : {&sequential, &deeppcr}) {
        EXPECT_EQ((*trial)["complete"], true);
        EXPECT_EQ((*trial)["test_images"], 10000);
        EXPECT_GT((*trial)["test_accuracy"], 0.1) << "no better than guessing";
        EXPECT_LE((*trial)["test_accuracy"], 1.0);
        for (const char* list : {"loss", "accuracy", "seconds", "forward_seconds", "backward_seconds"}) {
            ASSERT_EQ((*trial)[list].size(), steps) << list;
            for (const Json& value : (*trial)[list]) EXPECT_GE(value, 0.0) << list;
        }
    }
    EXPECT_NEAR(resnet["seconds_ratio"].get<double>(),
                sequential["median_seconds"].get<double>() / deeppcr["median_seconds"].get<double>(), 1e-9);
    EXPECT_FALSE(sequential.contains("iterations"));
    ASSERT_EQ(deeppcr["iterations"].size(), steps);
    for (std::size_t i = 0; i < steps; ++i) {
        EXPECT_GE(deeppcr["iterations"][i], 1);
        EXPECT_LE(deeppcr["mean_iterations"][i], deeppcr["iterations"][i]);
        EXPECT_EQ(deeppcr["status"][i], "converged");
        EXPECT_NEAR(sequential["loss"][i].get<double>(), deeppcr["loss"][i].get<double>(), 1e-3);
    }
    ASSERT_EQ(resnet["same_parameters"].size(), 2U);
    EXPECT_EQ(resnet["same_parameters"][0]["step"], 0);
    EXPECT_EQ(resnet["same_parameters"][1]["step"], steps);
    for (const Json& comparison : resnet["same_parameters"]) {
        EXPECT_LE(comparison["logits_difference"], resnet["logits_tolerance"]);
        EXPECT_LE(comparison["gradient_difference"], resnet["gradient_tolerance"]);
        EXPECT_EQ(comparison["gradient_differences"].size(), 6U) << "three layers with weight and bias";
        for (const Json& difference : comparison["gradient_differences"])
            EXPECT_LE(difference, comparison["gradient_difference"]);
    }
}

constexpr std::size_t resnet_plots = 4;

TEST_F(ReproduceTest, ResNet) {
    const Outcome outcome = reproduce("resnet --quick");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_NE(outcome.output.find("test accuracy"), std::string::npos) << outcome.output;
    const Json found = results();
    expect_header(found);
    expect_resnet(found["resnet"]);
    EXPECT_FALSE(found.contains("mlp"));
    expect_page(contents(folder / "deeppcr-report" / "report.html"), resnet_plots);
}

void expect_methods(const Json& entry) {
    const Json& methods = entry["methods"];
    EXPECT_EQ(methods.begin().key(), "sequential") << "the baseline";
    EXPECT_FALSE(methods["sequential"].contains("ratio"));
    for (const auto& [name, method] : methods.items()) {
        if (!method.contains("seconds")) {
            EXPECT_EQ(method["status"], "not converged") << name;
            continue;
        }
        EXPECT_GE(method["runs"], 3) << name;
        EXPECT_LE(method["quartiles"][0], method["seconds"]) << name;
        EXPECT_GE(method["quartiles"][1], method["seconds"]) << name;
        if (name == "sequential") continue;
        const double expected = methods["sequential"]["seconds"].get<double>() / method["seconds"].get<double>();
        EXPECT_NEAR(method["ratio"].get<double>(), expected, 1e-9 * expected) << name;
    }
}

void expect_rnn(const Json& rnn) {
    EXPECT_EQ(rnn["complete"], true);
    EXPECT_EQ(rnn["agreement"], true);
    EXPECT_NE(rnn["baseline"].get<std::string>().find("fused"), std::string::npos);
    ASSERT_EQ(rnn["training"].size(), 2U);
    for (const Json& training : rnn["training"]) {
        EXPECT_LT(training["last_loss"], training["first_loss"]);
        const auto exponents = training["lyapunov"].get<std::vector<double>>();
        EXPECT_EQ(exponents.at(training["channel"]), *std::max_element(exponents.begin(), exponents.end()));
    }
    ASSERT_EQ(rnn["single"].size(), 18U);  // 3 lengths, 4 cells, 2 of them trained too
    for (const Json& entry : rnn["single"]) {
        EXPECT_EQ(entry["methods"].size(), 5U);
        expect_methods(entry);
    }
    ASSERT_EQ(rnn["map"].size(), 10U);  // 2 cells, 3 lengths, 2 numbers of channels, but not the largest of both
    for (const Json& point : rnn["map"]) {
        expect_methods(point);
        const Json& methods = point["methods"];
        double least = INFINITY;
        for (const char* method : {"sequential", "overlap", "shooting"})
            least = std::min(least, methods[method].value("seconds", double(INFINITY)));
        if (const std::string winner = point["winner"]; winner != "sequential") {
            EXPECT_LT(methods[winner]["quartiles"][1], methods["sequential"]["quartiles"][0]);
        }
        EXPECT_NEAR(point["best_over_automatic"].get<double>(), least / methods["automatic"]["seconds"].get<double>(),
                    1e-9);
    }
    ASSERT_EQ(rnn["accuracy"].size(), 30U);  // 2 cells, 3 variances, 5 methods
    for (const Json& row : rnn["accuracy"]) {
        EXPECT_EQ(row["good"], true) << row;
        EXPECT_TRUE(row["estimate"].is_number() || row["estimate"] == "infinite") << row;
    }
}

/// The schema explains every field of a method.
void expect_methods_explained(const Json& results) {
    const std::string explained = results["schema"]["rnn.single[]"];
    for (const auto& [name, method] : results["rnn"]["single"][0]["methods"].items())
        for (const auto& [field, value] : method.items()) EXPECT_NE(explained.find(field), std::string::npos) << field;
}

constexpr std::size_t rnn_pictures = 3 + 6 + 2;

TEST_F(ReproduceTest, Rnn) {
    const Outcome outcome = reproduce("rnn --quick");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    for (const char* expected : {"against fused sequential", "the fastest method", "Automatic reaches", "trained"})
        EXPECT_NE(outcome.output.find(expected), std::string::npos) << expected;
    const Json found = results();
    expect_header(found);
    expect_rnn(found["rnn"]);
    expect_methods_explained(found);
    const std::string page = contents(folder / "deeppcr-report" / "report.html");
    expect_page(page, rnn_pictures);
    EXPECT_NE(page.find("sequences × channels"), std::string::npos) << "the map";
}

void expect_diffusion(const Json& diffusion, std::size_t sets = 1) {
    EXPECT_EQ(diffusion["complete"], true);
    EXPECT_EQ(diffusion["agreement"], true);
    ASSERT_EQ(diffusion["trials"].size(), 2U);
    for (const Json& trial : diffusion["trials"]) {
        EXPECT_EQ(trial["status"], "converged");
        EXPECT_EQ(trial["sequential_calls"], 20);
        EXPECT_GE(trial["dependent_calls"], trial["iterations"]);
        EXPECT_NEAR(trial["calls_ratio"].get<double>(), 20 / trial["dependent_calls"].get<double>(), 1e-9);
        EXPECT_LE(trial["pixel_difference"], diffusion["pixel_tolerance"]);
        ASSERT_EQ(trial["residuals"].size(), trial["iterations"].get<std::size_t>());
        EXPECT_EQ(trial["residuals"].back(), 0.0);
    }
    const Json& quality = diffusion["quality"];
    EXPECT_GT(quality["classifier_accuracy"], 0.7);
    ASSERT_EQ(quality["sets"].size(), sets);
    for (const Json& set : quality["sets"]) {
        ASSERT_EQ(set["tolerances"].size(), 1U);
        EXPECT_LT(set["tolerances"][0]["distance"], set["noise_floor"]);
    }
    ASSERT_EQ(diffusion["in_flight"].size(), 2U);
}

constexpr std::size_t diffusion_plots = 1;

TEST_F(ReproduceTest, Diffusion) {
    const Outcome outcome = reproduce("diffusion --quick --full");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_NE(outcome.output.find("fewer calls"), std::string::npos) << outcome.output;
    const Json found = results();
    expect_header(found);
    expect_diffusion(found["diffusion"], 2);
    expect_page(contents(folder / "deeppcr-report" / "report.html"), diffusion_plots, 1);
}

/// What is said of SWAP follows from its parts; it has no tolerance to agree within.
void expect_swap(const Json& swap) {
    EXPECT_EQ(swap["complete"], true);
    EXPECT_EQ(swap["agreement"], nullptr);
    std::map<std::string, double> best, chosen;
    for (const Json& entry : swap["search"]) {
        const auto accuracy = entry["held_out_accuracy"].get<double>();
        EXPECT_GT(accuracy, 0.1);
        double& most = best[entry["arm"]];
        most = std::max(most, accuracy);
        if (entry["chosen"]) {
            EXPECT_TRUE(chosen.emplace(entry["arm"], accuracy).second) << "two are chosen";
        }
    }
    EXPECT_EQ(best.size(), 5U);
    EXPECT_EQ(chosen, best);
    ASSERT_EQ(swap["trials"].size(), 1U);
    const Json &trial = swap["trials"][0], &arms = trial["arms"];
    ASSERT_EQ(arms.size(), 9U);
    for (const auto& [name, arm] : arms.items()) {
        EXPECT_GT(arm["accuracy"], 0.05) << name;
        EXPECT_TRUE(std::isfinite(arm["loss"].get<double>())) << name;
    }
    EXPECT_EQ(arms["small_batch"]["images"], 256);
    EXPECT_EQ(arms["large_batch"]["images"], 256);
    EXPECT_EQ(arms["longer_large_batch"]["images"], 3 * 256);
    EXPECT_EQ(arms["swap"]["images"], 3 * 256) << "one epoch together, one of each of two workers";
    EXPECT_LT(arms["swap"]["modelled_seconds"], arms["swap"]["processor_seconds"]);
    EXPECT_NE(arms["swap"]["loss"], arms["stale_statistics"]["loss"]);
    const Json& line = trial["line"];
    ASSERT_EQ(line.size(), 5U);
    double barrier = 0;
    for (const Json& point : line) {
        const double weight = point["weight"], straight = (1 - weight) * line.front()["loss"].get<double>() +
                                                          weight * line.back()["loss"].get<double>();
        barrier = std::max(barrier, point["loss"].get<double>() - straight);
    }
    EXPECT_NEAR(trial["barrier"].get<double>(), barrier, 1e-12);
}

constexpr std::size_t swap_plots = 2;

TEST_F(ReproduceTest, Swap) {
    const Outcome outcome = reproduce("swap --quick");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    for (const char* expected : {"Chosen on held-out", "paired by seed", "Loss barrier", "Modelled, not measured"})
        EXPECT_NE(outcome.output.find(expected), std::string::npos) << expected;
    expect_swap(results()["swap"]);
    expect_page(contents(folder / "deeppcr-report" / "report.html"), swap_plots);
}

/// What is said of language models follows from their parts.
void expect_language_models(const Json& lm) {
    EXPECT_EQ(lm["complete"], true);
    EXPECT_EQ(lm["agreement"], true);
    EXPECT_GT(lm["bytes"], 4'000'000);
    ASSERT_EQ(lm["trainings"].size(), 6U);
    for (const Json& training : lm["trainings"]) {
        EXPECT_EQ(training["tokens"], 12 * 4 * 32);
        EXPECT_NEAR(training["parameters"].get<double>(), 11'520, 100) << training["mixer"];
        EXPECT_LT(training["perplexity"], 256.0) << "no better than guessing";
        EXPECT_NEAR(training["perplexity"].get<double>(), std::exp(training["loss"].get<double>()), 1e-9);
        const Json& curve = training["curve"];
        const std::size_t steps = 12;
        ASSERT_EQ(curve["loss"].size(), steps);
        EXPECT_LT(curve["loss"].back(), curve["loss"].front());
        EXPECT_GE(training["validations"]["loss"].size(), 8U);
        EXPECT_EQ(curve.contains("mean_iterations"), training["is_cell"].get<bool>());
        if (!training["is_cell"].get<bool>()) continue;
        for (const char* list : {"mean_iterations", "residual", "lyapunov"}) ASSERT_EQ(curve[list].size(), steps);
        for (std::size_t i = 0; i < steps; ++i) {
            EXPECT_GE(curve["mean_iterations"][i], 1);
            EXPECT_LE(curve["residual"][i], 1e-4);
            EXPECT_EQ(curve["lyapunov"][i].is_number(), i % 10 == 0);
        }
    }
    ASSERT_EQ(lm["comparisons"].size(), 3U);
    for (const Json& comparison : lm["comparisons"]) {
        EXPECT_EQ(comparison["agrees"], true);
        ASSERT_EQ(comparison["differences"].size(), 6U);
        double largest = 0;
        for (const Json& difference : comparison["differences"]) largest = std::max(largest, difference.get<double>());
        EXPECT_EQ(comparison["difference"], largest);
        EXPECT_GT(comparison["rounding_difference"], 0.0) << "halves of a batch are rounded otherwise";
    }
    ASSERT_EQ(lm["speed"].size(), 9U) << "three cells by two methods, three others";
    for (const Json& row : lm["speed"]) {
        ASSERT_EQ(row["rounds"].size(), 2U);
        if (row["mixer"] == "lstm") {
            EXPECT_EQ(row["against_lstm"], 1.0);
        }
    }
    ASSERT_EQ(lm["generation"].size(), 6U);
    for (const Json& entry : lm["generation"]) {
        EXPECT_EQ(entry["position"], Json({100, 150}));
        EXPECT_EQ(entry["text"].get<std::string>().empty(), false);
    }
    EXPECT_EQ(lm["generation"][0]["state_bytes"], 2 * 16 * 4);
}

constexpr std::size_t language_plots = 8;

TEST_F(ReproduceTest, LanguageModels) {
    const Outcome outcome = reproduce("lm --quick");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    for (const char* expected : {"Perplexity per byte at equal parameters", "Tokens per second of training",
                                 "than that of LibTorch's LSTM", "rounding alone", "bytes of state"})
        EXPECT_NE(outcome.output.find(expected), std::string::npos) << expected;
    const Json found = results();
    expect_header(found);
    expect_language_models(found["lm"]);
    expect_page(contents(folder / "deeppcr-report" / "report.html"), language_plots);
}

TEST_F(ReproduceTest, LanguageModelsOfAnotherText) {
    std::ofstream text(folder / "text");
    for (int i = 0; i < 2000; ++i) text << "line " << i * i % 97 << " of a text.\n";
    text.close();
    ASSERT_EQ(reproduce("lm --quick --text text").exit_code, 0);
    EXPECT_EQ(results()["lm"]["text"], "text");
    EXPECT_EQ(results()["lm"]["bytes"], std::filesystem::file_size(folder / "text"));
    const Outcome missing = reproduce("lm --quick --text nowhere -o report");
    EXPECT_EQ(missing.exit_code, 1);
    EXPECT_NE(missing.errors.find("nowhere"), std::string::npos) << missing.errors;
    const Outcome no_package = reproduce("lm --quick -o report", "PATH=/nowhere");
    EXPECT_EQ(no_package.exit_code, 1);
    EXPECT_NE(no_package.errors.find("bible-kjv"), std::string::npos) << no_package.errors;
    EXPECT_FALSE(std::filesystem::exists(folder / "report"));
}

void expect_tasks(const Json& tasks) {
    EXPECT_EQ(tasks["complete"], true);
    EXPECT_EQ(tasks["agreement"], true);
    ASSERT_EQ(tasks["trainings"].size(), 18U) << "three tasks, six mixers";
    for (const Json& training : tasks["trainings"]) {
        const auto steps = training["steps_done"].get<std::size_t>();
        EXPECT_LE(steps, 6U);
        EXPECT_EQ(training["accuracy"], training["validations"]["accuracy"].back());
        EXPECT_GE(training["accuracy"], 0.0);
        EXPECT_LE(training["accuracy"], 1.0);
        EXPECT_EQ(training["validations"]["step"].back(), steps);
        const Json& curve = training["curve"];
        for (const char* list : {"step", "loss", "accuracy", "length"}) ASSERT_EQ(curve[list].size(), steps) << list;
        EXPECT_EQ(curve["length"].front(), 4);
        EXPECT_EQ(curve.contains("mean_iterations"), training["is_cell"].get<bool>());
        EXPECT_EQ(training.contains("lyapunov"), training["is_cell"].get<bool>());
        if (!training["is_cell"].get<bool>()) continue;
        EXPECT_LE(training["loss_difference"], tasks["loss_tolerance"]);
        EXPECT_NEAR(training["sequential_loss"].get<double>(), training["loss"].get<double>(), 1e-4);
        for (std::size_t i = 0; i < steps; ++i) {
            EXPECT_GE(curve["mean_iterations"][i], 1);
            EXPECT_LE(curve["residual"][i], 1e-4);
            EXPECT_EQ(curve["lyapunov"][i].is_number(), i % 10 == 0);
        }
    }
}

constexpr std::size_t task_plots = 3 * 5;

TEST_F(ReproduceTest, Tasks) {
    const Outcome outcome = reproduce("tasks --quick");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    for (const char* expected : {"Accuracy, parity", "Accuracy, recall", "Accuracy, hops", "linear recurrence"})
        EXPECT_NE(outcome.output.find(expected), std::string::npos) << expected;
    const Json found = results();
    expect_header(found);
    expect_tasks(found["tasks"]);
    const std::string page = contents(folder / "deeppcr-report" / "report.html");
    expect_page(page, task_plots);
    EXPECT_NE(page.find("Right by guessing: 50 %"), std::string::npos);
    const std::string explained = found["schema"]["tasks.trainings[]"];
    for (const auto& [field, value] : found["tasks"]["trainings"][0].items())
        if (field != "title" && field != "is_cell") {
            EXPECT_NE(explained.find(field), std::string::npos) << field;
        }
}

TEST_F(ReproduceTest, AllIsTheDefault) {
    const Outcome outcome = reproduce("--quick");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    const Json found = results();
    expect_header(found);
    expect_mlp(found["mlp"]);
    expect_resnet(found["resnet"]);
    expect_rnn(found["rnn"]);
    expect_diffusion(found["diffusion"]);
    expect_swap(found["swap"]);
    expect_language_models(found["lm"]);
    expect_tasks(found["tasks"]);
    expect_page(contents(folder / "deeppcr-report" / "report.html"),
                mlp_plots + resnet_plots + rnn_pictures + diffusion_plots + swap_plots + language_plots + task_plots,
                1);
}

TEST_F(ReproduceTest, ADisagreementBeyondTheToleranceFails) {
    for (const char* part : {"mlp", "resnet"}) {
        const Outcome outcome = reproduce(std::string(part) + " --quick --tolerance 1e-12");
        EXPECT_EQ(outcome.exit_code, 2) << outcome.errors;
        EXPECT_NE(outcome.output.find("disagree"), std::string::npos) << outcome.output;
        const Json found = results();
        EXPECT_EQ(found["agreement"], false);
        EXPECT_EQ(found[part]["agreement"], false);
        EXPECT_EQ(found["complete"], true);
        EXPECT_NE(contents(folder / "deeppcr-report" / "report.html").find("disagree beyond"), std::string::npos);
    }
}

TEST_F(ReproduceTest, AMissingDataSetNamesThePackageBeforeAnythingRuns) {
    for (const char* arguments : {"all --quick", "resnet --quick", "swap --quick"}) {
        const Outcome outcome = reproduce(arguments, "DEEPPCR_DATA=/nowhere");
        EXPECT_EQ(outcome.exit_code, 1);
        EXPECT_NE(outcome.errors.find("dataset-fashion-mnist"), std::string::npos) << outcome.errors;
        EXPECT_NE(outcome.errors.find("/nowhere"), std::string::npos) << outcome.errors;
    }
    EXPECT_EQ(reproduce("resnet --quick --data /nowhere").exit_code, 1);
    EXPECT_FALSE(std::filesystem::exists(folder / "deeppcr-report"));
    EXPECT_EQ(reproduce("mlp --quick", "DEEPPCR_DATA=/nowhere").exit_code, 0) << "the MLP needs no data";
}

TEST_F(ReproduceTest, JsonIsWhatTheFileHolds) {
    const Outcome outcome = reproduce("mlp --quick --json --output elsewhere/deep --seed 7");
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    const Json printed = Json::parse(outcome.output);
    EXPECT_EQ(printed, results("elsewhere/deep"));
    EXPECT_EQ(printed["seed"], 7);
    EXPECT_NE(printed["command"].get<std::string>().find("--seed 7"), std::string::npos);
}

TEST_F(ReproduceTest, AnOldReportIsReplaced) {
    std::filesystem::create_directory(folder / "report");
    std::ofstream(folder / "report" / "report.html") << "old";
    ASSERT_EQ(reproduce("mlp --quick -o report").exit_code, 0);
    expect_page(contents(folder / "report" / "report.html"), mlp_plots);
    std::size_t files = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder / "report")) ++files;
    EXPECT_EQ(files, 2U) << "temporary files are left behind";
}

TEST_F(ReproduceTest, AnOutputFolderThatCannotBeWrittenIsRefusedAtOnce) {
    std::ofstream(folder / "file") << "a file, not a folder";
    for (const char* output : {"file", "file/inside", "/proc/deeppcr"}) {
        const Outcome outcome = reproduce(std::string("mlp --quick -o ") + output);
        EXPECT_EQ(outcome.exit_code, 1) << output;
        EXPECT_NE(outcome.errors.find(output), std::string::npos) << outcome.errors;
        EXPECT_EQ(outcome.errors.find("MLP"), std::string::npos) << "it had begun: " << outcome.errors;
    }
    EXPECT_EQ(contents(folder / "file"), "a file, not a folder");
}

TEST_F(ReproduceTest, ArgumentsThatMakeNoSenseAreRefused) {
    for (const char* arguments : {"gan", "mlp resnet", "mlp --seed -1", "mlp --seed one", "mlp --quick=perhaps",
                                  "--fast", "mlp --tolerance 0", "mlp --tolerance nan", "mlp --output"}) {
        const Outcome outcome = reproduce(std::string("--quick ") + arguments);
        EXPECT_EQ(outcome.exit_code, 1) << arguments;
        EXPECT_EQ(outcome.errors.rfind("deeppcr: error: ", 0), 0U) << arguments << ": " << outcome.errors;
    }
    EXPECT_FALSE(std::filesystem::exists(folder / "deeppcr-report"));
}

TEST_F(ReproduceTest, HelpNamesThePartsAndAnExample) {
    const Outcome outcome = reproduce("--help");
    EXPECT_EQ(outcome.exit_code, 0);
    for (const char* expected : {"mlp", "resnet", "rnn", "diffusion", "swap", "lm", "tasks", "all", "--model",
                                 "--output", "--quick", "--full", "--text", "--seed", "Example", "deeppcr reproduce"})
        EXPECT_NE(outcome.output.find(expected), std::string::npos) << expected;
}

TEST_F(ReproduceTest, AnInterruptedRunWritesWhatIsFinished) {
    // In the foreground, `timeout` signals the program once; otherwise twice, and the second signal ends it at once.
    for (const std::string part : {"mlp", "rnn"}) {
        const Outcome outcome = reproduce(part, "timeout --foreground --preserve-status --signal=INT 5");
        EXPECT_EQ(outcome.exit_code, 130) << outcome.errors;
        const Json found = results();
        EXPECT_EQ(found["complete"], false);
        EXPECT_EQ(found[part]["complete"], false);
        EXPECT_NE(contents(folder / "deeppcr-report" / "report.html").find("Incomplete"), std::string::npos);
    }
}

}  // namespace
}  // namespace deeppcr
