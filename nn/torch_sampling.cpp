// torch.classes.deeppcr.Sampling: what Python (or TorchScript) gets, by loading libdeeppcr_nn.so, to sample from a
// diffusion model with its denoising steps in parallel. The model is a TorchScript file.
//
//     sampling = torch.classes.deeppcr.Sampling("denoiser.pt", [32], 16, "ddim", 1000, "trailing", 0.0, "noise",
//                                               "linear", 1000, "newton", "full", 1e-5, 0, "cuda")
//     sampling.draw(torch.randn(16, 32, device="cuda"), None, None)
//     samples = sampling.sample()                      # [16, 32]; sampling.report() says how
//
// On a GPU also without a wait, so that a CUDA graph can capture it; the object is made in the stream that captures:
//
//     stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
//     with torch.cuda.stream(stream):
//         sampling = torch.classes.deeppcr.Sampling(.., passes, "cuda")
//         sampling.enqueue()
//     with torch.cuda.graph(graph, stream=stream): sampling.enqueue()
//     sampling.draw(noise, None, None); graph.replay(); samples = sampling.finish()
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <functional>
#include <numeric>
#include <optional>
#include <sstream>

#include <deeppcr/nn/script.hpp>

#include "nn/device_scope.hpp"
#include "nn/tensors.hpp"

namespace {

using at::Tensor;
using namespace deeppcr::nn;
using deeppcr::index;

class Sampling : public torch::CustomClassHolder {
public:
    /// shape: of one sample, as the model takes it. passes: of Newton's method in `enqueue`, and at most in `sample`;
    /// 0: as many as it takes, and no `enqueue`. The other arguments: see SamplerOptions, ScriptModelOptions and
    /// Options.
    Sampling(const std::string& file, const std::vector<int64_t>& shape, int64_t images, const std::string& sampler,
             int64_t steps, const std::string& spacing, double eta, const std::string& prediction,
             const std::string& schedule, int64_t times, const std::string& method, const std::string& surrogate,
             double tolerance, int64_t passes, const std::string& device)
        : numbers_(at::zeros({images, std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<>())},
                             at::TensorOptions(at::Device(device)).dtype(at::kFloat))),
          plan_(denoising_plan(deeppcr::nn::NoiseSchedule::of(choice_of(schedule_names, "schedule", schedule), times),
                               {choice_of(sampler_names, "sampler", sampler), steps,
                                choice_of(spacing_names, "spacing", spacing), eta})),
          classes_(at::zeros({images}, numbers_.options().dtype(at::kLong))),
          recurrence_(plan_, denoiser_of(file, shape, device), numbers_,
                      plan_.random ? at::zeros({steps, images, numbers_.size(1)}, numbers_.options()) : Tensor(),
                      {.prediction = choice_of(prediction_names, "prediction", prediction)}),
          states_(at::zeros({steps, images, recurrence_.shape().width}, numbers_.options())) {
        evaluation_.method = choice_of(method_names, "method", method);
        evaluation_.surrogate = choice_of(surrogate_names, "surrogate", surrogate);
        evaluation_.tolerance = tolerance;
        evaluation_.max_iterations = passes;
        evaluation_.estimates = deeppcr::Estimates::none;
    }

    /// The noise (see DenoisingRecurrence) and the classes [images] of what is sampled from here on.
    void draw(const Tensor& initial, const c10::optional<Tensor>& random, const c10::optional<Tensor>& classes) {
        recurrence_.draw(initial, random.value_or(Tensor()));
        drawn_ = true;
        if (!classes) return;
        require("classes", *classes, classes_.sizes(), at::kLong, classes_.device());
        classes_.copy_(*classes);
    }

    Tensor sample() {
        if (!drawn_) throw deeppcr::InvalidArgument("sample", "to be called after draw", "no noise drawn");
        const at::NoGradGuard no_gradients;
        const DeviceScope scope(numbers_);
        report_ = evaluate(recurrence_, view<float>(states_), scope.options_of_windows(evaluation_));
        return samples();
    }

    void enqueue() {
        const at::NoGradGuard no_gradients;
        const DeviceScope scope(numbers_);
        if (!enqueued_) enqueued_.emplace(recurrence_, view<float>(states_), scope.options(evaluation_));
        enqueued_->enqueue();
    }
    Tensor finish() {
        if (!enqueued_) throw deeppcr::InvalidArgument("finish", "to be called after enqueue", "nothing enqueued");
        const at::NoGradGuard no_gradients;
        const DeviceScope scope(numbers_);
        report_ = enqueued_->finish();
        return samples();
    }

    std::string report() const {
        std::ostringstream text;
        text << report_;
        return text.str();
    }
    bool ok() const { return report_.ok(); }
    int64_t iterations() const { return report_.iterations; }
    /// Calls of the model that waited for each other, of all that was sampled so far; see DenoisingRecurrence.
    int64_t dependent_calls() const { return recurrence_.dependent_calls(); }

private:
    Denoiser denoiser_of(const std::string& file, const std::vector<int64_t>& shape, const std::string& device) const {
        const Script script(file, at::kFloat, at::Device(device));
        return script_denoiser(script, {shape.begin(), shape.end()},
                               script.fewest_arguments() > 2 ? classes_ : Tensor());
    }
    Tensor samples() const { return states_.select(0, states_.size(0) - 1).slice(1, 0, numbers_.size(1)).clone(); }

    Tensor numbers_;  // of all images
    bool drawn_ = false;
    DenoisingPlan plan_;
    Tensor classes_;
    DenoisingRecurrence recurrence_;
    Tensor states_;
    deeppcr::Options evaluation_;
    std::optional<deeppcr::EnqueuedEvaluation<float>> enqueued_;
    deeppcr::Report report_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(deeppcr, library) {
    library.class_<Sampling>("Sampling")
        .def(torch::init<const std::string&, const std::vector<int64_t>&, int64_t, const std::string&, int64_t,
                         const std::string&, double, const std::string&, const std::string&, int64_t,
                         const std::string&, const std::string&, double, int64_t, const std::string&>(),
             "",
             {torch::arg("file"), torch::arg("shape"), torch::arg("images") = 1, torch::arg("sampler") = "ddim",
              torch::arg("steps") = 1000, torch::arg("spacing") = "trailing", torch::arg("eta") = 0.0,
              torch::arg("prediction") = "noise", torch::arg("schedule") = "linear", torch::arg("times") = 1000,
              torch::arg("method") = "newton", torch::arg("surrogate") = "full", torch::arg("tolerance") = 1e-5,
              torch::arg("passes") = 0, torch::arg("device") = "cpu"})
        .def("draw", &Sampling::draw)
        .def("sample", &Sampling::sample)
        .def("enqueue", &Sampling::enqueue)
        .def("finish", &Sampling::finish)
        .def("report", &Sampling::report)
        .def("ok", &Sampling::ok)
        .def("iterations", &Sampling::iterations)
        .def("dependent_calls", &Sampling::dependent_calls);
}
