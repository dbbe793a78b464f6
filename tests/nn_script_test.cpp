// TorchScript files of others: steps as recurrences, denoisers, and everything that can be wrong with such a file.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <torch/autograd.h>
#include <torch/script.h>
#include <torch/types.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include <deeppcr/check.hpp>
#include <deeppcr/evaluate.hpp>
#include <deeppcr/nn/script.hpp>
#include <files/error.hpp>

#include "tests/compare.hpp"
#include "tests/messages.hpp"

namespace deeppcr::nn {
namespace {

using testing::HasSubstr;

class Scripts : public testing::Test {
protected:
    void SetUp() override {
        folder = std::filesystem::temp_directory_path() / "deeppcr_nn_script_test";
        std::filesystem::remove_all(folder);
        std::filesystem::create_directories(folder);
    }
    void TearDown() override { std::filesystem::remove_all(folder); }

    std::filesystem::path save(const std::string& name, const std::string& forward) const {
        torch::jit::Module module("step");
        torch::manual_seed(3);
        module.register_parameter("w", torch::randn({4, 4}) * 0.4, false);
        module.register_parameter("v", torch::randn({2, 4}), false);
        module.define(forward);
        module.save((folder / name).string());
        return folder / name;
    }

    std::filesystem::path folder;
};

constexpr const char* recurrent = R"(
def forward(self, x, u):
    return torch.tanh(torch.mm(x, self.w) + torch.mm(u, self.v))
)";

TEST_F(Scripts, AStepIsEvaluatedInParallel) {
    const auto file = save("step.pt", recurrent);
    torch::manual_seed(4);
    const at::Tensor inputs = torch::randn({300, 3, 2}), initial = torch::randn({3, 4});
    const ScriptRecurrence<float> recurrence(file, inputs, initial);
    EXPECT_EQ(recurrence.shape(), (Shape{300, 3, 4}));
    const CheckReport check = check_recurrence(recurrence);
    EXPECT_TRUE(check.ok()) << check;

    // The same step, written here.
    torch::jit::Module module = torch::jit::load(file.string());
    at::Tensor x = initial;
    const auto [sequential, one] = evaluate(recurrence, {.method = Method::sequential});
    for (index t = 0; t < 300; ++t) {
        x = torch::tanh(x.mm(module.attr("w").toTensor()) + inputs[t].mm(module.attr("v").toTensor()));
        for (index j = 0; j < 3; ++j)
            for (index k = 0; k < 4; ++k) ASSERT_NEAR(sequential(t, j, k), x[j][k].item<float>(), 1e-4);
    }
    const auto [parallel, report] = evaluate(recurrence, {.method = Method::newton});
    EXPECT_EQ(report.status, Status::converged);
    EXPECT_LT(report.iterations, 60);
    EXPECT_TRUE(near(parallel, sequential, 1e-4));

    const ScriptRecurrence<double> precise(file, inputs.to(at::kDouble), initial.to(at::kDouble));
    const auto [wide, wide_report] = evaluate(precise, {.method = Method::newton});
    EXPECT_EQ(wide_report.status, Status::converged);
    EXPECT_TRUE(near(sequential, wide, 1e-4));
}

TEST_F(Scripts, AStepMayHaveNoInputsOrNoDerivative) {
    const at::Tensor inputs = torch::zeros({20, 2, 1}), initial = torch::ones({2, 4});
    const ScriptRecurrence<float> alone(save("alone.pt", "def forward(self, x):\n    return torch.cos(x)\n"), inputs,
                                        initial);
    const auto [x, report] = evaluate(alone, {.method = Method::newton});
    EXPECT_EQ(report.status, Status::converged);
    EXPECT_NEAR(x(19, 1, 3), 0.739, 1e-2);
    const ScriptRecurrence<float> constant(
        save("constant.pt", "def forward(self, x):\n    return torch.ones_like(x) * 2\n"), inputs, initial);
    EXPECT_EQ(evaluate(constant, {.method = Method::newton}).trajectory(19, 0, 0), 2);
}

TEST_F(Scripts, WhatIsWrongWithAFileIsSaid) {
    const at::Tensor inputs = torch::randn({5, 3, 2}), initial = torch::randn({3, 4});
    const auto evaluated = [&](const std::filesystem::path& file) {
        return message_of<Error>(
            [&] { evaluate(ScriptRecurrence<float>(file, inputs, initial), {.method = Method::newton}); });
    };
    EXPECT_THAT(evaluated(folder / "none.pt"), HasSubstr("none.pt: does not exist"));
    std::ofstream(folder / "text.pt") << "not a model";
    EXPECT_THAT(evaluated(folder / "text.pt"), HasSubstr("text.pt: expected a TorchScript module"));
    EXPECT_THAT(evaluated(save("narrow.pt", "def forward(self, x, u):\n    return x[:, 0:2]\n")),
                HasSubstr("expected Float [15, 4] from its forward method, got Float [15,2]"));
    EXPECT_THAT(evaluated(save("pair.pt", "def forward(self, x, u):\n    return x, u\n")),
                HasSubstr("expected a tensor from its forward method, got Tuple"));
    EXPECT_THAT(evaluated(save("wide.pt", "def forward(self, x, u):\n    return torch.mm(x, self.v)\n")),
                HasSubstr("its forward method failed"));
    EXPECT_THAT(evaluated(save("three.pt", "def forward(self, x, u, v):\n    return x + u + v\n")),
                HasSubstr("expected a forward method of one or two tensors"));
    const auto file = save("step.pt", recurrent);
    EXPECT_THAT(message_of([&] { ScriptRecurrence<float>(file, inputs[0], initial); }),
                HasSubstr("inputs: expected Float [steps, batch, width], got Float [3,2]"));
    EXPECT_THAT(message_of([&] { ScriptRecurrence<float>(file, inputs, initial[0]); }),
                HasSubstr("initial: expected Float [3, width], got Float [4]"));
}

TEST_F(Scripts, ADenoiserSamples) {
    torch::manual_seed(5);
    const at::Tensor initial = torch::randn({3, 4});
    const DenoisingPlan plan = denoising_plan(NoiseSchedule::linear(), {Sampler::ddim, 50, Spacing::trailing, 0});
    const at::Tensor classes = torch::tensor({0, 1, 2});
    const auto sampled = [&](const std::string& forward, const at::Tensor& given) {
        const Script script(save("denoiser.pt", forward));
        return evaluate(DenoisingRecurrence(plan, script_denoiser(script, {2, 2}, given), initial, {}, {}),
                        {.method = Method::newton, .surrogate = Surrogate::diagonal, .tolerance = 1e-5})
            .trajectory;
    };
    // The best guess of the noise where all samples are 0, and where they are their class.
    const auto zeros = sampled("def forward(self, x, t):\n    assert x.dim() == 3\n    return x.clone()\n", {});
    for (index j = 0; j < 3; ++j) EXPECT_LT(std::abs(zeros(49, j, 0)), 0.5);
    const auto told = sampled("def forward(self, x, t, c):\n    return x - 0.1 * c.view(-1, 1, 1)\n", classes);
    EXPECT_NE(told(49, 0, 0), told(49, 2, 0));
    EXPECT_THAT(message_of([&] { sampled("def forward(self, x, t, c):\n    return x * c.view(-1, 1, 1)\n", {}); }),
                HasSubstr("classes: expected one for each image"));
    EXPECT_THAT(message_of<Error>([&] { sampled("def forward(self, x):\n    return x\n", {}); }),
                HasSubstr("expected a forward method of two or three tensors"));
}

}  // namespace
}  // namespace deeppcr::nn
