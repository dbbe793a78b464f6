// deeppcr analyse, on files of every kind that it takes, and of others.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include <deeppcr/array.hpp>
#include <files/npy.hpp>
#include <files/safetensors.hpp>

#include "program.hpp"

namespace deeppcr {
namespace {

using files::Tensor;
using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

Tensor random(const std::vector<index>& shape, std::uint64_t seed, double scale = 0.3) {
    const index count = *files::element_count(shape, 8);
    const auto numbers = Buffer<float>::random({count, 1, 1}, seed);
    std::vector<float> values(numbers.data(), numbers.data() + count);
    for (float& value : values) value *= float(scale);
    return {shape, values};
}

class Analyse : public ProgramTest {
protected:
    nlohmann::json analyse(std::vector<std::string> arguments) const {
        arguments.insert(arguments.begin(), "analyse");
        arguments.emplace_back("--json");
        const Outcome outcome = run(arguments);
        EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
        return outcome.json();
    }
    std::string error(std::vector<std::string> arguments) const {
        arguments.insert(arguments.begin(), "analyse");
        const Outcome outcome = run(arguments);
        EXPECT_EQ(outcome.exit_code, 1) << outcome.output;
        return outcome.errors;
    }
    void write(const std::string& name, const std::map<std::string, Tensor>& tensors,
               const std::map<std::string, std::string>& metadata = {}) const {
        files::write_safetensors(folder / name, {tensors, metadata});
    }
};

TEST_F(Analyse, JacobiansOfAFile) {
    std::vector<float> values;
    for (int t = 0; t < 2000; ++t) values.insert(values.end(), {0.5F, 0.25F});
    files::write_npy(folder / "A.npy", {{2000, 1, 2}, values});
    const auto found = analyse({"A.npy"})["recurrences"][0];
    EXPECT_NEAR(found["lyapunov"], std::log(0.5), 1e-6);
    EXPECT_EQ(found["steps"], 2000);
    EXPECT_GT(found["forgetting_steps"], 10);
    EXPECT_LT(found["forgetting_steps"], 30);
    EXPECT_TRUE(found["overflows_from_step"].is_null());
    EXPECT_EQ(found["solutions"].size(), 4U);
    for (const auto& solution : found["solutions"]) {
        EXPECT_EQ(solution["outcome"], "right");
        EXPECT_NEAR(solution["substitution_over_this"],
                    double(found["solutions"][0]["seconds"]) / double(solution["seconds"]), 1e-9);
    }

    const Outcome outcome = run({"analyse", "A.npy"});
    EXPECT_THAT(outcome.output,
                AllOf(HasSubstr("Lyapunov exponent -0.69"), HasSubstr("contractive"), HasSubstr("substitution")));
}

TEST_F(Analyse, JacobiansThatExpand) {
    files::write_npy(folder / "A.npy", {{1000, 2, 1}, std::vector<float>(2000, 1.2F)});
    const auto found = analyse({"A.npy"})["recurrences"][0];
    EXPECT_NEAR(found["lyapunov"], std::log(1.2), 1e-6);
    EXPECT_EQ(found["linear"], true);
    EXPECT_EQ(found["longest_window"], 87);              // 1.2^87 is 1 / the epsilon of float
    EXPECT_NEAR(found["overflows_from_step"], 487, 15);  // 1.2^487 is the largest float
    EXPECT_TRUE(found["forgetting_steps"].is_null());
    EXPECT_EQ(found["forgetting_starts"], 0);
    EXPECT_TRUE(found["fastest"].is_null());
    for (const auto& solution : found["solutions"]) {
        EXPECT_EQ(solution["outcome"], "not finite");
        EXPECT_TRUE(solution["seconds"].is_null());
    }
    const Outcome outcome = run({"analyse", "A.npy"});
    EXPECT_EQ(outcome.exit_code, 0);
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("Lyapunov exponent 0.18"), HasSubstr("per step: unstable"),
                                      testing::Not(HasSubstr("chaotic")), HasSubstr("x overflows from step 4"),
                                      HasSubstr("was not measured"), HasSubstr("no solution is right")));
}

TEST_F(Analyse, SolutionsWhoseProductsOverflowAreNotRight) {
    // The right side is 0 until the last step, and so is x; but products of more than three Jacobians overflow.
    files::write_npy(folder / "A.npy", {{1000, 1, 1}, std::vector<float>(1000, 1e10F)});
    std::vector<float> right_side(1000);
    right_side.back() = 1;
    files::write_npy(folder / "b.npy", {{1000, 1, 1}, right_side});
    const auto found = analyse({"A.npy", "--inputs", "b.npy", "--threads", "2"})["recurrences"][0];
    EXPECT_TRUE(found["overflows_from_step"].is_null());
    EXPECT_TRUE(found["forgetting_steps"].is_null());
    const auto& solutions = found["solutions"];
    EXPECT_EQ(solutions[0]["outcome"], "right");
    for (const std::size_t i : {1, 2}) {  // the scan and PCR
        EXPECT_EQ(solutions[i]["outcome"], "not finite");
        EXPECT_TRUE(solutions[i]["substitution_over_this"].is_null());
    }
    EXPECT_EQ(found["fastest"], "substitution");
}

TEST_F(Analyse, JacobiansThatCannotBeUsed) {
    for (const std::vector<index>& shape : {std::vector<index>{0, 1, 2}, {5, 0, 2, 2}, {5, 1, 2, 0, 0}}) {
        files::write_npy(folder / "A.npy", {shape, std::vector<float>()});
        EXPECT_THAT(error({"A.npy"}), StartsWith("deeppcr: error: A.npy: expected at least one step"));
    }
    files::write_npy(folder / "A.npy", random({50, 1, 3}, 1));
    files::write_npy(folder / "b.npy", random({50, 1, 4}, 1));
    EXPECT_THAT(error({"A.npy", "--inputs", "b.npy"}), HasSubstr("b.npy has shape [50,1,4], expected [50,1,3]"));
    // Files of 2^41 bytes, to stat: refused by their headers.
    if (!write_sparse("A.npy", "(17179869184, 32)", std::uintmax_t(1) << 41))
        GTEST_SKIP() << "this file system has no room for a sparse file of 2 TiB";
    EXPECT_THAT(error({"A.npy"}), HasSubstr("A.npy: expected shape [T,B,D]"));
    ASSERT_TRUE(write_sparse("A.npy", "(536870912, 1, 32, 32)", std::uintmax_t(1) << 41));
    EXPECT_THAT(error({"A.npy"}), HasSubstr("analysing this needs"));
}

TEST_F(Analyse, RecurrentLayers) {
    std::map<std::string, Tensor> gru, lstm, rnn;
    for (const auto& [name, gates, tensors] :
         {std::tuple{"GRU", 3, &gru}, std::tuple{"LSTM", 4, &lstm}, std::tuple{"RNN (tanh)", 1, &rnn}}) {
        for (const std::string suffix : {"_l0", "_l0_reverse", "_l1", "_l1_reverse"}) {
            const index inputs = suffix.starts_with("_l0") ? 3 : 8;
            (*tensors)["rnn.weight_ih" + suffix] = random({gates * 4, inputs}, 1);
            (*tensors)["rnn.weight_hh" + suffix] = random({gates * 4, 4}, 2);
            (*tensors)["rnn.bias_ih" + suffix] = random({gates * 4}, 3);
            (*tensors)["rnn.bias_hh" + suffix] = random({gates * 4}, 4);
        }
        (*tensors)["head.weight"] = random({1, 8}, 5);
        write("model.safetensors", *tensors);
        const auto found = analyse({"model.safetensors", "--steps", "300", "--batch", "2"})["recurrences"];
        ASSERT_EQ(found.size(), 4U) << name;
        EXPECT_EQ(found[1]["recurrence"], "layer 0, reversed: " + std::string(name) + ", 4 hidden units");
        for (const auto& layer : found) {
            EXPECT_LT(layer["lyapunov"], 0);
            EXPECT_EQ(layer["batch"], 2);
            EXPECT_EQ(layer["trials"].size(), 3U);
            for (const auto& trial : layer["trials"]) EXPECT_EQ(trial["status"], "converged");
        }
    }
}

TEST_F(Analyse, ModulesOfThisLibrary) {
    for (const auto& [name, gates, parameters] : {std::tuple{"ParaGRU", 3, 3}, std::tuple{"ParaLSTM", 3, 5},
                                                  std::tuple{"SLSTM", 4, 4}, std::tuple{"DiagonalElman", 1, 1}}) {
        write("model.safetensors", {{"weight_ih_l0", random({gates * 4, 3}, 1)},
                                    {"bias_ih_l0", random({gates * 4}, 2)},
                                    {"parameters_l0", random({parameters, 4}, 3)}});
        files::write_npy(folder / "u.npy", random({500, 2, 6}, 4, 1));  // two heads
        const auto found = analyse({"model.safetensors", "--inputs", "u.npy"})["recurrences"];
        ASSERT_EQ(found.size(), 1U);
        EXPECT_EQ(found[0]["recurrence"], "layer 0: " + std::string(name) + ", 4 channels");
        EXPECT_EQ(found[0]["trials"].size(),
                  parameters == 3 || parameters == 1 ? 5U : 6U);  // a Jacobian's diagonal too
        EXPECT_GE(found[0]["channels_that_pay"], 0);
    }
    const Outcome outcome = run({"analyse", "model.safetensors", "--heads", "2", "--steps", "200"});
    EXPECT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("overlap"), HasSubstr("shooting"), HasSubstr("from one start)"),
                                      HasSubstr("On this machine: ")));
}

TEST_F(Analyse, DeepNetwork) {
    write("model.safetensors", {{"layers.weight", random({64, 4, 4}, 1)}, {"layers.bias", random({64, 4}, 2)}},
          {{"skip", "2"}, {"activation", "tanh"}});
    const auto found = analyse({"model.safetensors", "--batch", "3"})["recurrences"][0];
    EXPECT_EQ(found["recurrence"], "deep network: 64 layers x 4, tanh, residual blocks of 2 layers");
    EXPECT_EQ(found["steps"], 32);
    EXPECT_EQ(found["batch"], 3);
    files::write_npy(folder / "x.npy", random({5, 4}, 4, 1));
    EXPECT_EQ(analyse({"model.safetensors", "--inputs", "x.npy"})["recurrences"][0]["batch"], 5);
}

TEST_F(Analyse, SaysWhatIsWrong) {
    EXPECT_THAT(error({"none.safetensors"}), HasSubstr("none.safetensors"));
    EXPECT_THAT(error({"none.npy"}), HasSubstr("none.npy"));
    write("other.safetensors", {{"conv.weight", random({3, 3}, 1)}});
    EXPECT_THAT(error({"other.safetensors"}), HasSubstr("expected tensors weight_ih_l0"));
    const std::map<std::string, Tensor> good{{"a.weight_ih_l0", random({12, 3}, 1)},
                                             {"a.weight_hh_l0", random({12, 4}, 2)}};
    auto two = good;
    two["b.weight_ih_l0"] = random({12, 3}, 1);
    two["optimiser.exp_avg.b.weight_ih_l0"] = random({12, 3}, 1);  // of a checkpoint, and no module
    write("two.safetensors", two);
    EXPECT_THAT(error({"two.safetensors"}), HasSubstr("modules \"a.\", \"b.\"\n"));
    EXPECT_EQ(analyse({"two.safetensors", "--module", "a", "--steps", "50"})["recurrences"].size(), 1U);
    EXPECT_THAT(error({"two.safetensors", "--module", "b"}), HasSubstr("b.weight_hh_l0"));
    EXPECT_THAT(error({"two.safetensors", "--module", "c"}), HasSubstr("\"c\""));

    const auto with = [&](const std::string& name, const Tensor& tensor) {
        auto changed = good;
        changed["a." + name] = tensor;
        write("bad.safetensors", changed);
        return error({"bad.safetensors", "--steps", "50"});
    };
    EXPECT_THAT(with("weight_hh_l0", random({8, 4}, 1)), HasSubstr("a.weight_hh_l0 [12,4]"));
    EXPECT_THAT(with("weight_hh_l0", random({12}, 1)), HasSubstr("weight_ih"));
    EXPECT_THAT(with("weight_ih_l0", random({8, 3}, 1)), HasSubstr("a.weight_hh_l0 [8,4]"));
    EXPECT_THAT(with("weight_ih_l0", random({12}, 1)), HasSubstr("[gates * hidden, inputs]"));
    EXPECT_THAT(with("bias_ih_l0", random({11}, 1)), HasSubstr("a.bias_ih_l0 [12]"));
    EXPECT_THAT(with("parameters_l0", random({4, 4}, 1)), HasSubstr("ParaGRU (3, 3)"));
    EXPECT_THAT(with("weight_hr_l0", random({4, 4}, 1)), HasSubstr("weight_hr_l0"));
    write("bad.safetensors",
          {{"layers.weight", random({8, 2, 2}, 1)}, {"layers.bias", {{8, 2}, std::vector<double>(16)}}},
          {{"skip", "0"}, {"activation", "tanh"}});
    EXPECT_THAT(error({"bad.safetensors"}), HasSubstr("layers.bias [8,2] of float32, got [8,2] of float64"));
    // Files made to do harm: no gates at all, directions of different width, a name that never ends.
    write("bad.safetensors", {{"weight_ih_l0", random({3, 1}, 1)}, {"weight_hh_l0", random({9}, 2)}});
    EXPECT_THAT(error({"bad.safetensors"}), HasSubstr("[3,1] and [9]"));
    write("bad.safetensors", {{"weight_ih_l0", random({3, 1}, 1)},
                              {"weight_hh_l0", random({3, 1}, 2)},
                              {"weight_ih_l0_reverse", random({192, 1}, 3)},
                              {"weight_hh_l0_reverse", random({192, 64}, 4)}});
    EXPECT_THAT(error({"bad.safetensors"}), HasSubstr("both directions of layer 0"));
    write("bad.safetensors", {{std::string(400000, 'a'), random({3, 1}, 1)}});
    EXPECT_THAT(error({"bad.safetensors"}), HasSubstr("aaa..."));
    write("good.safetensors", good);
    files::write_npy(folder / "u.npy", random({50, 1, 4}, 4));
    EXPECT_THAT(error({"good.safetensors", "--inputs", "u.npy"}),
                AllOf(StartsWith("deeppcr: error: u.npy"), HasSubstr("3]")));
    auto infinite = random({50, 1, 3}, 4);
    std::get<std::vector<float>>(infinite.values)[7] = INFINITY;
    files::write_npy(folder / "u.npy", infinite);
    EXPECT_THAT(error({"good.safetensors", "--inputs", "u.npy"}), HasSubstr("finite numbers"));
    files::write_npy(folder / "u.npy", {{2, 1, 3}, std::vector<double>{1, 1, 1, 1, 1e300, 1}});
    EXPECT_THAT(error({"good.safetensors", "--inputs", "u.npy"}),
                HasSubstr("u.npy: expected numbers in the range of float32, got 1e+300 at [1,0,1]"));
    if (write_sparse("u.npy", "(183251937962, 1, 3)", std::uintmax_t(183251937962) * 12)) {
        EXPECT_THAT(error({"good.safetensors", "--inputs", "u.npy"}), HasSubstr("reading u.npy needs"));
    }
    EXPECT_THAT(error({"good.safetensors", "--tolerance", "-1"}), HasSubstr("--tolerance"));
    files::write_npy(folder / "bad.npy", random({50, 3}, 4));
    EXPECT_THAT(error({"bad.npy"}), HasSubstr("[T,B,D]"));
}

}  // namespace
}  // namespace deeppcr
