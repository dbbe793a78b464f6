// deeppcr train diffusion, sample and evaluate, on models trained here and on files that PyTorch writes.
#include <chrono>
#include <csignal>
#include <thread>

#include <files/npy.hpp>

#include "program.hpp"

namespace deeppcr {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Json = nlohmann::json;

class Sample : public ProgramTest {
protected:
    /// A model and a training that take no time.
    static std::vector<std::string> small(const std::string& steps = "5",
                                          const std::string& checkpoint = "diffusion.safetensors") {
        return {"train",
                "diffusion",
                "--latents",
                "4",
                "--hidden",
                "16",
                "--blocks",
                "1",
                "--batch",
                "8",
                "--train-images",
                "64",
                "--autoencoder-steps",
                "3",
                "--steps",
                steps,
                "--checkpoint",
                checkpoint,
                "--json"};
    }
    /// Few steps of the sampler, and few images.
    static std::vector<std::string> sample(const std::vector<std::string>& more, const std::string& steps = "20",
                                           const std::string& images = "3") {
        std::vector<std::string> arguments = {"sample", "diffusion.safetensors", "--images", images, "--steps", steps};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return arguments;
    }
    std::vector<float> numbers(const std::string& name) const {
        return std::get<std::vector<float>>(files::read_npy(folder / name).values);
    }
    /// Debian's Python writes the models of `code` with its PyTorch; false where it has none.
    bool written_by_python(const std::string& code) const {
        std::ofstream(folder / "write.py") << "import torch\n" << code;
        const std::string command = "cd '" + folder.string() + "' && /usr/bin/python3 write.py >python.log 2>&1";
        return std::system(command.c_str()) == 0;
    }
};

TEST_F(Sample, ATrainedModelIsSampledInParallelAsSequentially) {
    const Outcome trained = run(small());
    ASSERT_EQ(trained.exit_code, 0) << trained.errors;
    EXPECT_EQ(trained.json()["checkpoint"], "diffusion.safetensors");
    ASSERT_EQ(trained.json()["steps"].size(), 8U);

    for (const char* sampler : {"ddpm", "ddim", "dpm_solver_1", "dpm_solver_2", "euler", "heun"})
        for (const char* surrogate : {"full", "diagonal"}) {
            const Outcome outcome =
                run(sample({"--sampler", sampler, "--method", "newton", "--surrogate", surrogate, "--tolerance", "1e-6",
                            "--compare", "--json", "--overwrite", "-o", "x.npy"}));
            ASSERT_EQ(outcome.exit_code, 0) << sampler << outcome.errors;
            const Json result = outcome.json();
            EXPECT_EQ(result["status"], "converged") << sampler << " " << surrogate;
            EXPECT_LT(result["largest_difference"], 1e-3) << sampler << " " << surrogate;
            EXPECT_GE(result["dependent_calls"], result["iterations"]);
        }
    const std::vector<float> found = numbers("x.npy");
    ASSERT_EQ(found.size(), 3U * 28 * 28);

    // One step at a time is the sampler itself, bit for bit.
    ASSERT_EQ(run(sample({"--method", "newton", "--window", "1", "-o", "window.npy"})).exit_code, 0);
    ASSERT_EQ(run(sample({"--method", "sequential", "-o", "sequential.npy"})).exit_code, 0);
    EXPECT_EQ(numbers("window.npy"), numbers("sequential.npy"));
}

TEST_F(Sample, WritesAPictureAndReplacesNoneUnasked) {
    ASSERT_EQ(run(small()).exit_code, 0);
    const Outcome outcome = run(sample({"--class", "7", "--guidance", "2", "--columns", "2"}));
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_THAT(outcome.output, AllOf(HasSubstr("3 images in 20 denoising steps"), HasSubstr("samples: samples.png")));
    const std::string picture = contents(folder / "samples.png");
    EXPECT_EQ(picture.substr(1, 3), "PNG");
    expect_error(sample({"--seed", "2"}), AllOf(HasSubstr("samples.png"), HasSubstr("--overwrite")));
    EXPECT_EQ(contents(folder / "samples.png"), picture);
    ASSERT_EQ(run(sample({"--seed", "2", "--overwrite"})).exit_code, 0);
    EXPECT_NE(contents(folder / "samples.png"), picture);
}

TEST_F(Sample, AnInterruptedTrainingGoesOnToTheSameModel) {
    std::vector<std::string> arguments = small("1500", "whole.safetensors");
    arguments.insert(arguments.end(), {"--log", "whole.log"});
    ASSERT_EQ(run(arguments).exit_code, 0);
    arguments = small("1500");
    arguments.insert(arguments.end(), {"--checkpoint-interval", "5", "--log", "log"});
    const pid_t child = start(arguments);
    for (int wait = 0; wait < 6000 && !std::filesystem::exists(folder / "diffusion.safetensors"); ++wait)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    kill(child, SIGINT);
    const Outcome interrupted = wait_for(child);
    ASSERT_EQ(interrupted.exit_code, 130) << interrupted.errors;
    const std::size_t done = interrupted.json()["steps"].size();
    ASSERT_LT(done, 1503U);
    const Outcome resumed = run({"train", "diffusion", "--resume", "diffusion.safetensors", "--log", "log", "--json"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.errors;
    EXPECT_EQ(resumed.json()["steps"].size(), 1503U - done);
    const auto found = log(), expected = log("whole.log");
    ASSERT_EQ(found.size(), 1503U);
    ASSERT_EQ(expected.size(), 1503U);
    for (std::size_t line = 0; line < found.size(); ++line)
        for (const char* field : {"network", "step", "loss", "gradient_norm"})
            EXPECT_EQ(found[line].at(field), expected[line].at(field)) << field << " of line " << line;
    ASSERT_EQ(run(sample({"-o", "x.npy"})).exit_code, 0);
    ASSERT_EQ(run({"sample", "whole.safetensors", "--images", "3", "--steps", "20", "-o", "whole.npy"}).exit_code, 0);
    EXPECT_EQ(numbers("x.npy"), numbers("whole.npy"));

    // The checkpoint before stands in for one that is damaged.
    damage(folder / "diffusion.safetensors");
    expect_error(sample({"-o", "y.npy"}), HasSubstr("checksum"));
    const Outcome again = run({"train", "diffusion", "--resume", "diffusion.safetensors", "--json"});
    ASSERT_EQ(again.exit_code, 0) << again.errors;
    EXPECT_THAT(again.errors, AllOf(HasSubstr("checksum"), HasSubstr("diffusion.safetensors.previous is used")));
    EXPECT_EQ(again.json()["steps"].size(), 5U);
    ASSERT_EQ(run(sample({"-o", "y.npy"})).exit_code, 0);
    EXPECT_EQ(numbers("y.npy"), numbers("whole.npy"));
}

TEST_F(Sample, SaysWhatIsWrong) {
    ASSERT_EQ(run(small()).exit_code, 0);
    expect_error({"train", "diffusion", "--latents", "0", "--checkpoint", "x"}, HasSubstr("latents"));
    expect_error({"train", "diffusion", "--prediction", "weather"}, HasSubstr("--prediction"));
    expect_error({"sample"}, HasSubstr("model"));
    expect_error({"sample", "nowhere.safetensors"}, HasSubstr("nowhere.safetensors"));
    expect_error({"sample", "nowhere.pt"}, HasSubstr("nowhere.pt"));
    expect_error(sample({"--sampler", "magic"}), HasSubstr("--sampler"));
    expect_error(sample({"--class", "11"}), HasSubstr("class"));
    expect_error(sample({"--class", "1", "2"}), HasSubstr("one for each of the 3 images"));
    expect_error(sample({}, "1001"), HasSubstr("1 to the schedule's 1000"));
    expect_error(sample({}, "20", "0"), HasSubstr("images"));
    expect_error(sample({"--eta", "0.5", "--sampler", "ddpm"}), HasSubstr("eta"));
    expect_error(sample({"-o", "nowhere/x.png"}), HasSubstr("nowhere"));
    EXPECT_FALSE(std::filesystem::exists(folder / "samples.png"));
    // A checkpoint of another network.
    ASSERT_EQ(run({"train", "resnet", "--layers", "2", "--width", "4", "--train-images", "64", "--held-out", "100",
                   "--steps", "1"})
                  .exit_code,
              0);
    expect_error({"sample", "resnet.safetensors"}, HasSubstr("resnet.safetensors"));
    EXPECT_FALSE(std::filesystem::exists(folder / "samples.png"));
}

TEST_F(Sample, CtrlCLeavesNoPicture) {
    ASSERT_EQ(run(small()).exit_code, 0);
    const pid_t child = start({"sample", "diffusion.safetensors", "--images", "800", "--steps", "1000", "--method",
                               "newton", "--surrogate", "full", "--tolerance", "1e-7"});
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    kill(child, SIGINT);
    const Outcome outcome = wait_for(child);
    EXPECT_EQ(outcome.exit_code, 130) << outcome.errors;
    EXPECT_FALSE(std::filesystem::exists(folder / "samples.png"));
}

TEST_F(Sample, TakesDenoisersThatPyTorchWrote) {
    if (!written_by_python(R"(
class Denoiser(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Conv2d(2, 2, 3, padding=1)
    def forward(self, x, t):
        return torch.tanh(self.layer(x) + (t / 1000)[:, None, None, None]) * 0.5 + 0.5 * x
class Nothing(torch.nn.Module):
    def forward(self, x, t):
        return x * float("nan")
class Smaller(torch.nn.Module):
    def forward(self, x, t):
        return x[:, :1]
for module in Denoiser(), Nothing(), Smaller():
    torch.jit.script(module).save(type(module).__name__ + ".pt")
)"))
        GTEST_SKIP() << contents(folder / "python.log");
    const Outcome outcome = run({"sample", "Denoiser.pt", "--shape", "2", "5", "6", "--images", "3", "--steps", "20",
                                 "--method", "newton", "--tolerance", "1e-6", "--compare", "--json", "-o", "x.npy"});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_LT(outcome.json()["largest_difference"], 1e-3);
    EXPECT_EQ(files::read_npy(folder / "x.npy").shape, (std::vector<std::int64_t>{3, 2, 5, 6}));
    expect_error({"sample", "Denoiser.pt", "--shape", "2", "5", "6"}, AllOf(HasSubstr("--output"), HasSubstr(".npy")));
    expect_error({"sample", "Denoiser.pt", "--shape", "3", "5", "6", "-o", "y.npy"}, HasSubstr("Denoiser.pt"));
    expect_error({"sample", "Smaller.pt", "--shape", "2", "5", "6", "-o", "y.npy"}, HasSubstr("Smaller.pt"));
    std::ofstream(folder / "text.pt") << "no model";
    expect_error({"sample", "text.pt", "-o", "y.npy"}, HasSubstr("text.pt"));

    // What is not finite is never written as a picture, but where asked for.
    const std::vector<std::string> nothing{"sample", "Nothing.pt", "--images", "2", "--steps", "5", "--json"};
    const Outcome failed = run(nothing);
    EXPECT_EQ(failed.exit_code, 2) << failed.errors;
    EXPECT_EQ(failed.json()["status"], "not finite");
    EXPECT_FALSE(std::filesystem::exists(folder / "samples.png"));
    std::vector<std::string> partial = nothing;
    partial.insert(partial.end(), {"--partial", "-o", "partial.npy"});
    EXPECT_EQ(run(partial).exit_code, 2);
    EXPECT_TRUE(std::filesystem::exists(folder / "partial.npy"));
}

TEST_F(Sample, EvaluatesStepsThatPyTorchWrote) {
    if (!written_by_python(R"(
class Step(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.cell = torch.nn.GRUCell(3, 8).double()
    def forward(self, x, u):
        return self.cell(u, x)
class Map(torch.nn.Module):
    def forward(self, x):
        return 0.9 * torch.cos(x)
for module in Step(), Map():
    torch.jit.script(module).save(type(module).__name__ + ".pt")
import struct
torch.manual_seed(2)
u = torch.randn(400, 2, 3, dtype=torch.double)
def save(name, tensor):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': %s, }" % (tuple(tensor.shape),)
    header += " " * (-(len(header) + 11) % 64) + "\n"
    with open(name, "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        file.write(struct.pack("<%dd" % tensor.numel(), *tensor.flatten().tolist()))
save("u.npy", u)
x = torch.zeros(2, 8, dtype=torch.double)
states = []
with torch.no_grad():
    step = Step()
    for t in range(400):
        x = step(x, u[t])
        states.append(x)
save("expected.npy", torch.stack(states))
)"))
        GTEST_SKIP() << contents(folder / "python.log");
    const Outcome outcome = run({"evaluate", "--model", "Step.pt", "--inputs", "u.npy", "--width", "8", "-o", "x.npy",
                                 "--method", "newton", "--compare", "--json"});
    ASSERT_EQ(outcome.exit_code, 0) << outcome.errors;
    EXPECT_EQ(outcome.json()["status"], "converged");
    EXPECT_LT(outcome.json()["iterations"], 20);
    const auto found = std::get<std::vector<double>>(files::read_npy(folder / "x.npy").values);
    const auto expected = std::get<std::vector<double>>(files::read_npy(folder / "expected.npy").values);
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], 1e-10);

    const Outcome map = run({"evaluate", "--model", "Map.pt", "--steps", "1000", "--width", "3"});
    EXPECT_EQ(map.exit_code, 0) << map.errors;
    EXPECT_THAT(map.output, HasSubstr("1,000 steps of 1 sequences of 3 numbers"));
    EXPECT_THAT(map.output, HasSubstr("; chosen ")) << "automatic is the default";
    const pid_t child = start({"evaluate", "--model", "Map.pt", "--steps", "1000000", "--width", "3", "--method",
                               "sequential", "-o", "map.npy"});
    ASSERT_TRUE(catches_interrupts(child));
    kill(child, SIGINT);
    const Outcome interrupted = wait_for(child);
    EXPECT_EQ(interrupted.exit_code, 130) << interrupted.errors;
    EXPECT_FALSE(std::filesystem::exists(folder / "map.npy"));
    expect_error({"evaluate", "--model", "Step.pt", "--width", "8"}, HasSubstr("--inputs"));
    expect_error({"evaluate", "--model", "Step.pt", "--inputs", "u.npy"}, HasSubstr("--initial"));
    expect_error({"evaluate", "--model", "Step.pt", "--inputs", "u.npy", "--width", "7"}, HasSubstr("Step.pt"));
    expect_error({"evaluate", "--model", "Step.pt", "--inputs", "u.npy", "--width", "8", "-o", "x.npy"},
                 AllOf(HasSubstr("x.npy"), HasSubstr("--overwrite")));
}

}  // namespace
}  // namespace deeppcr
