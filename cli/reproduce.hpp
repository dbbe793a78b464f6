// What the experiments of `deeppcr reproduce` share. Each has a part that measures and fills JSON, and parts that
// read nothing but that JSON: a section of the report, a summary for the terminal.
#pragma once

#include <cstdlib>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <deeppcr/array.hpp>
#include <files/error.hpp>

#include "command.hpp"
#include "report.hpp"

namespace deeppcr::program {

struct Experiment {
    bool quick = false;  ///< tiny sizes, which show only that everything works
    bool full = false;   ///< more data and seeds, where an experiment has them
    std::uint64_t seed = 1;
    double tolerance = 1e-4;           ///< of states and logits, relative to the largest; of gradients ten times that
    std::filesystem::path data = {};   ///< folder of Fashion-MNIST; empty: where it usually is
    std::filesystem::path text = {};   ///< for language models; empty: that of Debian's package bible-kjv
    std::filesystem::path model = {};  ///< of `deeppcr train diffusion`; empty: one is trained here
    /// Told how much of the experiment is done, from 0 to 1, and what comes now. False: stop soon; what is finished is
    /// returned with "complete": false.
    std::function<bool(double done, const std::string& now)> advance;

    double gradient_tolerance() const { return 10 * tolerance; }
};

/// Forward and backward passes of multilayer perceptrons over a grid of widths, depths and batches: the fused
/// sequential method against Newton's method with PCR and with the scan. Fields: see `schema` in reproduce.cpp.
Json run_mlp(const Experiment& experiment);
void describe_mlp(const Json& mlp, Page& page);
std::string summarise_mlp(const Json& mlp);

/// A residual network trained twice from the same seed on Fashion-MNIST, sequentially and by DeepPCR.
/// Throws FileError, naming the package to install, where the data set is missing.
void check_resnet_data(const Experiment& experiment);
Json run_resnet(const Experiment& experiment);
void describe_resnet(const Json& resnet, Page& page);
std::string summarise_resnet(const Json& resnet);

/// Recurrent cells over time: every method against the fused sequential one on one long sequence, with weights as
/// initialised and as trained; which method is fastest over steps and channels; the results against double.
Json run_rnn(const Experiment& experiment);
void describe_rnn(const Json& rnn, Page& page);
std::string summarise_rnn(const Json& rnn);

/// Images by a diffusion model, trained here or Experiment::model: denoising steps in parallel against the sampler
/// itself, from the same noise; calls of the network that wait for each other, pixels, Fréchet distances, seconds.
void check_diffusion_data(const Experiment& experiment);
Json run_diffusion(const Experiment& experiment);
void describe_diffusion(const Json& diffusion, Page& page);
std::string summarise_diffusion(const Json& diffusion);

/// A classifier of Fashion-MNIST by SWAP against small and large batches, SWA and the ensemble of the workers, paired
/// by seed, after a search for learning rates on held-out images.
void check_swap_data(const Experiment& experiment);
Json run_swap(const Experiment& experiment);
void describe_swap(const Json& swap, Page& page);
std::string summarise_swap(const Json& swap);

/// Language models of every mixer at equal parameters and tokens: perplexity and speed against LibTorch's LSTM,
/// Newton's method over the training, losses by parallel against sequential evaluation, generation by position.
void check_language_model_data(const Experiment& experiment);
Json run_language_model(const Experiment& experiment);
void describe_language_model(const Json& lm, Page& page);
std::string summarise_language_model(const Json& lm);

/// Parity, recall and k-hop induction by models of every mixer: accuracy, and Newton's method over the trainings.
Json run_tasks(const Experiment& experiment);
void describe_tasks(const Json& tasks, Page& page);
std::string summarise_tasks(const Json& tasks);

/// For what an experiment trains, as long as it needs it.
class TemporaryFolder {
public:
    TemporaryFolder() {
        std::string name = (std::filesystem::temp_directory_path() / "deeppcr-XXXXXX").string();
        if (mkdtemp(name.data()) == nullptr) throw FileError(name, "the temporary folder cannot be created");
        path = name;
    }
    ~TemporaryFolder() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;

    std::filesystem::path path;
};

/// The three quartiles of a sample that is not empty.
struct Quartiles {
    double first = 0, median = 0, third = 0;
};
inline Quartiles quartiles(std::vector<double> sample) {
    std::sort(sample.begin(), sample.end());
    const auto at = [&](double part) {
        const double place = part * double(sample.size() - 1);
        const auto below = std::size_t(place);
        const std::size_t above = std::min(below + 1, sample.size() - 1);
        return sample[below] + (place - double(below)) * (sample[above] - sample[below]);
    };
    return {at(0.25), at(0.5), at(0.75)};
}

/// Largest difference of two contiguous arrays of the same shape, relative to the largest entry of `expected`;
/// infinite where it is not a number.
template <class T>
double largest_difference(View<const float> actual, View<const T> expected) {
    double difference = 0, size = 0;
    for (index i = 0; i < expected.shape().count(); ++i) {
        const double distance = std::abs(double(actual.data()[i]) - double(expected.data()[i]));
        difference = std::isnan(distance) ? INFINITY : std::max(difference, distance);
        size = std::max(size, std::abs(double(expected.data()[i])));
    }
    return size > 0 ? difference / size : difference;
}

/// A number of results.json, NaN where it is null: not measured.
inline double number(const Json& value) { return value.is_number() ? value.get<double>() : std::nan(""); }

}  // namespace deeppcr::program
