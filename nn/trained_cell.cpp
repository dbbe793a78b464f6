#include <deeppcr/nn/trained_cell.hpp>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mse_loss.h>
#include <ATen/ops/zeros.h>
#include <torch/optim/adam.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <deeppcr/nn/cell.hpp>

namespace deeppcr::nn {
namespace {

using at::Tensor;

class Layer {
public:
    Layer(CellKind kind, const TrainedCellOptions& options)
        : kind_(kind), options_(options), generator_(at::make_generator<at::CPUGeneratorImpl>(options.seed)) {
        const CellSizes sizes = sizes_of(kind);
        const index channels = options.channels;
        weights_ = at::empty({sizes.inputs * channels, 1}).uniform_(-1, 1, generator_).requires_grad_();
        biases_ = at::zeros({sizes.inputs * channels}).requires_grad_();
        parameters_ = at::empty({sizes.parameters, channels}).normal_(0, 0.5, generator_).requires_grad_();
        const double bound = 1 / std::sqrt(double(channels));
        read_out_ = at::empty({1, channels}).uniform_(-bound, bound, generator_).requires_grad_();
        offset_ = at::zeros({1}).requires_grad_();
        // So many lanes are full without chunks, and a fixed method gives the same bits every time.
        cell_.evaluation = {.method = Method::sequential, .estimates = Estimates::none, .execution = {.threads = 1}};
    }

    std::vector<Tensor> leaves() const { return {weights_, biases_, parameters_, read_out_, offset_}; }

    struct Batch {
        Tensor input, target;  // [steps, batch, 1]
    };
    Batch draw() {
        const index steps = options_.steps, batch = options_.batch, delay = options_.delay;
        Batch result{at::empty({steps, batch, 1}).normal_(0, 1, generator_), at::zeros({steps, batch, 1})};
        const double keep = std::exp(-1 / options_.time_constant), scale = std::sqrt(1 - keep * keep);
        const float* const input = result.input.data_ptr<float>();
        float* const target = result.target.data_ptr<float>();
        for (index j = 0; j < batch; ++j) {
            double average = 0;
            for (index t = 0; t < steps; ++t) {
                average = keep * average + scale * double(input[t * batch + j]);
                target[t * batch + j] = float(average) + (t < delay ? 0 : input[(t - delay) * batch + j]);
            }
        }
        return result;
    }

    Tensor loss(const Batch& batch) const {
        const Tensor states = cell(kind_, at::linear(batch.input, weights_, biases_), parameters_, {}, cell_);
        const index values = sizes_of(kind_).states;
        const Tensor hidden = states.view({states.size(0), states.size(1), -1, values}).select(3, values - 1);
        return at::mse_loss(at::linear(hidden, read_out_, offset_), batch.target);
    }

    void keep_in(TrainedCell& result) const {
        result.weights = copy(weights_);
        result.biases = copy(biases_);
        result.parameters = copy(parameters_);
    }

private:
    /// [rows, 1, channels]
    Buffer<float> copy(const Tensor& tensor) const {
        const Tensor values = tensor.detach().contiguous();
        Buffer<float> result({values.numel() / options_.channels, 1, options_.channels});
        std::copy_n(values.data_ptr<float>(), values.numel(), result.data());
        return result;
    }

    CellKind kind_;
    const TrainedCellOptions& options_;
    at::Generator generator_;
    Tensor weights_, biases_, parameters_, read_out_, offset_;
    CellOptions cell_;
};

/// So little work at a time is not worth a second thread, whose waiting would disturb what is measured afterwards.
class OneThread {
public:
    OneThread() { at::set_num_threads(1); }
    ~OneThread() { at::set_num_threads(before_); }
    OneThread(const OneThread&) = delete;
    OneThread& operator=(const OneThread&) = delete;

private:
    int before_ = at::get_num_threads();
};

void check(const TrainedCellOptions& options) {
    const auto at_least = [](const char* argument, index least, index value) {
        if (value < least) throw InvalidArgument(argument, "at least " + std::to_string(least), std::to_string(value));
    };
    at_least("channels", 1, options.channels);
    at_least("steps", 1, options.steps);
    at_least("batch", 1, options.batch);
    at_least("updates", 1, options.updates);
    at_least("delay", 0, options.delay);
    for (const auto& [argument, value] :
         {std::pair{"learning_rate", options.learning_rate}, {"time_constant", options.time_constant}})
        if (!(value > 0 && std::isfinite(value)))
            throw InvalidArgument(argument, "a finite number above 0", std::to_string(value));
}

}  // namespace

TrainedCell train_cell(CellKind kind, const TrainedCellOptions& options) {
    check(options);
    const OneThread one_thread;
    Layer layer(kind, options);
    const Layer::Batch kept_apart = layer.draw();
    TrainedCell result;
    result.first_loss = layer.loss(kept_apart).item<double>();
    result.last_loss = std::numeric_limits<double>::quiet_NaN();
    torch::optim::Adam optimiser(layer.leaves(), torch::optim::AdamOptions(options.learning_rate));
    for (index update = 0; update < options.updates && !result.interrupted; ++update) {
        const double done = double(update) / double(options.updates);
        for (auto& group : optimiser.param_groups())
            static_cast<torch::optim::AdamOptions&>(group.options())
                .lr(options.learning_rate * (1 + std::cos(M_PI * done)) / 2);
        optimiser.zero_grad();
        layer.loss(layer.draw()).backward();
        optimiser.step();
        result.interrupted = options.progress && !options.progress(double(update + 1) / double(options.updates));
    }
    layer.keep_in(result);
    if (result.interrupted) return result;
    result.last_loss = layer.loss(kept_apart).item<double>();
    if (!(result.last_loss < result.first_loss))
        throw NotConverged("the training made the loss no smaller: " + std::to_string(result.first_loss) + " before, " +
                           std::to_string(result.last_loss) + " after");
    return result;
}

}  // namespace deeppcr::nn
