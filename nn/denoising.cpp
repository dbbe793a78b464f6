#include <deeppcr/nn/denoising.hpp>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>

#include "nn/differentiate.hpp"
#include "nn/libtorch.hpp"
#include "nn/tensors.hpp"

namespace deeppcr::nn {

using at::Tensor;

namespace {

void require_noise(const char* name, const Tensor& noise, at::IntArrayRef sizes) {
    bool fits = noise.defined() && noise.scalar_type() == at::kFloat && noise.dim() == index(sizes.size());
    for (std::size_t d = 0; fits && d < sizes.size(); ++d) fits = sizes[d] < 0 || noise.size(index(d)) == sizes[d];
    if (fits) return;
    std::ostringstream expected;
    expected << "Float " << sizes << " (-1: any)";
    throw InvalidArgument(name, expected.str(), describe(noise));
}

/// What a step has of numbers, in the columns of Rows::coefficients.
enum Column {
    time,
    input,
    estimate_of_input,
    estimate_of_prediction,
    from_state,
    from_sample,
    from_previous,
    from_random,
    correction,
    column_count
};

index width_of(const DenoisingPlan& plan, const Tensor& initial_noise) {
    require_noise("initial_noise", initial_noise, {-1, -1});
    return initial_noise.size(1) * (plan.remembers ? 2 : 1);
}

}  // namespace

/// The steps of a section, a row for each of them and each image.
struct DenoisingRecurrence::Rows {
    Tensor coefficients;  ///< [rows, column_count]
    Tensor next;          ///< likewise, of the step after; undefined where no step has a correction
    Tensor images;        ///< [rows]
    Tensor random;        ///< [rows, numbers]; undefined where the plan is not random

    Tensor column(Column which) const { return coefficients.slice(1, which, which + 1); }
    Rows part(index first, index last) const {
        return each([&](const Tensor& tensor) { return tensor.slice(0, first, last); });
    }
    /// Every row so many times, one after the other.
    Rows repeated(index copies) const {
        if (copies == 1) return *this;
        return each([&](const Tensor& tensor) { return repeat_rows(tensor, copies); });
    }

private:
    template <class Change>
    Rows each(const Change& change) const {
        const auto changed = [&](const Tensor& tensor) { return tensor.defined() ? change(tensor) : tensor; };
        return {changed(coefficients), changed(next), changed(images), changed(random)};
    }
};

DenoisingRecurrence::DenoisingRecurrence(DenoisingPlan plan, Denoiser denoiser, const Tensor& initial_noise,
                                         const Tensor& random, const DenoisingOptions& options)
    : Recurrence<float>({index(plan.steps.size()),
                         initial_noise.defined() && initial_noise.dim() == 2 ? initial_noise.size(0) : 0,
                         width_of(plan, initial_noise)}),
      plan_(std::move(plan)),
      denoiser_(std::move(denoiser)),
      initial_((initial_noise.detach() * plan_.initial_deviation).contiguous()),
      options_(options),
      evaluated_rows_(std::make_shared<index>(0)),
      dependent_calls_(std::make_shared<index>(0)) {
    if (!denoiser_) throw InvalidArgument("denoiser", "a function", "none");
    if (!(options.clip >= 0)) throw InvalidArgument("options.clip", "0 or more", std::to_string(options.clip));
    if (options.most_rows < 0)
        throw InvalidArgument("options.most_rows", "0 or more", std::to_string(options.most_rows));
    if (plan_.random) {
        require_noise("random", random, {shape().steps, shape().batch, numbers()});
        random_ = random.detach().clone(at::MemoryFormat::Contiguous);
    }
    // Behind the last step there is none, and nothing is corrected with it.
    Tensor numbers_of_steps = at::empty({shape().steps + 1, column_count}, at::kFloat);
    float* to = numbers_of_steps.data_ptr<float>();
    for (index number = 0; number <= shape().steps; ++number) {
        const DenoisingStep& step = plan_.steps[std::size_t(std::min(number, shape().steps - 1))];
        const SampleEstimate sample = sample_estimate(options_.prediction, step.level);
        for (const double value :
             {step.level.time, step.input, sample.from_input, sample.from_prediction, step.from_state, step.from_sample,
              step.from_previous, step.from_random, step.correction})
            *to++ = float(value);
    }
    coefficients_ = numbers_of_steps.to(initial_.device());
    slopes_ = slopes_of_steps().to(initial_.device());
    images_ = at::arange(shape().batch, initial_.options().dtype(at::kLong));
}

void DenoisingRecurrence::draw(const Tensor& initial_noise, const Tensor& random) {
    const at::NoGradGuard no_gradients;
    require("initial_noise", initial_noise, initial_.sizes(), at::kFloat, initial_.device());
    if (plan_.random) require("random", random, random_.sizes(), at::kFloat, initial_.device());
    initial_.copy_(initial_noise).mul_(plan_.initial_deviation);
    if (plan_.random) random_.copy_(random);
}

bool DenoisingRecurrence::runs_on(Backend backend) const { return (backend == Backend::cuda) == initial_.is_cuda(); }

Tensor DenoisingRecurrence::tensor_of(const float* data, at::IntArrayRef sizes) const {
    return at::from_blob(const_cast<float*>(data), sizes, initial_.options());
}

Tensor DenoisingRecurrence::images_of(std::span<const index> sequences) const {
    if (index(sequences.size()) == shape().batch) return images_;
    Tensor images = at::empty({index(sequences.size())}, at::kLong);
    std::copy(sequences.begin(), sequences.end(), images.data_ptr<std::int64_t>());
    return images.to(initial_.device());
}

DenoisingRecurrence::Rows DenoisingRecurrence::rows_of(index first, index count, index stride,
                                                       std::span<const index> sequences) const {
    const index batch = index(sequences.size());
    const auto of_steps = [&](const Tensor& tensor, index from) {
        return tensor.slice(0, from, from + (count - 1) * stride + 1, stride);
    };
    const auto for_images = [&](const Tensor& table) {
        return table.unsqueeze(1).expand({count, batch, column_count}).reshape({count * batch, column_count});
    };
    const Tensor images = images_of(sequences);
    Rows rows;
    rows.coefficients = for_images(of_steps(coefficients_, first));
    bool corrected = false;
    for (index i = 0; i < count; ++i)
        corrected = corrected || plan_.steps[std::size_t(first + i * stride)].correction != 0;
    if (corrected) rows.next = for_images(of_steps(coefficients_, first + 1));
    rows.images = images.unsqueeze(0).expand({count, batch}).reshape({count * batch});
    if (plan_.random) {
        Tensor random = of_steps(random_, first);
        if (batch < shape().batch) random = random.index_select(1, images);
        rows.random = random.reshape({count * batch, numbers()});
    }
    return rows;
}

Tensor DenoisingRecurrence::ask(const Tensor& inputs, const Tensor& times, const Tensor& images) const {
    Tensor predictions = denoiser_(inputs, times, images);
    if (!predictions.defined() || predictions.sizes() != inputs.sizes() ||
        predictions.scalar_type() != inputs.scalar_type()) {
        std::ostringstream expected;
        expected << "predictions like its inputs, " << inputs.scalar_type() << " " << inputs.sizes();
        throw InvalidArgument("denoiser", expected.str(), describe(predictions));
    }
    *evaluated_rows_ += inputs.size(0);
    return predictions;
}

Tensor DenoisingRecurrence::estimate(const Rows& rows, const Tensor& state, bool next) const {
    const Tensor& table = next ? rows.next : rows.coefficients;
    const auto column = [&](Column which) { return table.slice(1, which, which + 1); };
    const Tensor inputs = column(Column::input) * state;
    const Tensor predictions = ask(inputs, table.select(1, Column::time), rows.images);
    Tensor sample = at::addcmul(column(estimate_of_input) * inputs, column(estimate_of_prediction), predictions);
    return options_.clip > 0 ? sample.clamp(-options_.clip, options_.clip) : sample;
}

Tensor DenoisingRecurrence::follow(const Rows& rows, const Tensor& before, const Tensor& sample) const {
    Tensor after =
        at::addcmul(rows.column(from_state) * before.slice(1, 0, numbers()), rows.column(from_sample), sample);
    if (plan_.remembers)
        after = at::addcmul(after, rows.column(from_previous), before.slice(1, numbers(), 2 * numbers()));
    if (plan_.random) after = at::addcmul(after, rows.column(from_random), rows.random);
    return after;
}

Tensor DenoisingRecurrence::advance(const Rows& rows, const Tensor& before) const {
    const Tensor state = before.slice(1, 0, numbers());
    const Tensor sample = estimate(rows, state, false);
    Tensor after = follow(rows, before, sample);
    if (rows.next.defined()) {
        const Tensor correction = rows.column(Column::correction);
        const Tensor corrected = (state + after) / 2 + correction * (after - estimate(rows, after, true));
        after = at::where(correction != 0, corrected, after);
    }
    return plan_.remembers ? at::cat({after, sample}, 1) : after;
}

void DenoisingRecurrence::initial(const Section& section, View<float> state) const {
    Tensor rows = tensor_of(state.data(), {section.batch(), shape().width});
    if (plan_.remembers) rows.zero_();
    rows.slice(1, 0, numbers()).copy_(initial_.index_select(0, images_of(section.sequences)));
}

template <class Body>
void DenoisingRecurrence::for_parts(const Rows& rows, index copies, const Body& body) const {
    const index count = rows.images.size(0);
    if (count == 0) return;
    *dependent_calls_ += rows.next.defined() ? 2 : 1;
    const index at_once = options_.most_rows > 0 ? std::max<index>(1, options_.most_rows / copies) : count;
    for (index first = 0; first < count; first += at_once) {
        const index last = std::min(count, first + at_once);
        body(rows.part(first, last), first, last);
    }
}

DenoisingRecurrence::Rows DenoisingRecurrence::rows_of(const Section& section) const {
    if (initial_.is_cuda() && section.execution.stream != current_cuda_stream(initial_.device()))
        throw InvalidArgument("execution.stream", "LibTorch's current stream", "another one");
    return rows_of(section.first, section.steps(), 1, section.sequences);
}

void DenoisingRecurrence::step(const Section& section, View<const float> before, View<float> after) const {
    const at::NoGradGuard no_gradients;
    const index width = shape().width, count = section.steps() * section.batch();
    const Tensor from = tensor_of(before.data(), {count, width}), to = tensor_of(after.data(), {count, width});
    for_parts(rows_of(section), 1, [&](const Rows& rows, index first, index last) {
        to.slice(0, first, last).copy_(advance(rows, from.slice(0, first, last)));
    });
}

void DenoisingRecurrence::linearise(const Section& section, View<const float> before, View<float> after,
                                    Jacobian<float> jacobian) const {
    const index width = shape().width, count = section.steps() * section.batch();
    const Tensor from = tensor_of(before.data(), {count, width}), to = tensor_of(after.data(), {count, width});
    const Tensor blocks = tensor_of(jacobian.data(), {count, width, width});
    const index calls_before = *dependent_calls_;
    const index all_copies = copies_to_linearise(from);
    for_parts(rows_of(section), all_copies, [&](const Rows& rows, index first, index last) {
        linearise_rows([&](const Tensor& states, index copies) { return advance(rows.repeated(copies), states); },
                       from.slice(0, first, last), to.slice(0, first, last), blocks.slice(0, first, last), all_copies);
    });
    // The way back through the network waits for the way forward: it counts as much.
    *dependent_calls_ += *dependent_calls_ - calls_before;
}

/// Of each step the derivative, [steps, 1], with the network's prediction held fixed.
Tensor DenoisingRecurrence::slopes_of_steps() const {
    const index steps = shape().steps;
    Tensor slopes = at::empty({steps, 1}, at::kFloat);
    const auto of_sample = [&](index step) {
        const DenoisingStep& last = plan_.steps[std::size_t(std::min(step, steps - 1))];
        return last.input * sample_estimate(options_.prediction, last.level).from_input;
    };
    for (index i = 0; i < steps; ++i) {
        const DenoisingStep& step = plan_.steps[std::size_t(i)];
        double slope = step.from_state + step.from_sample * of_sample(i);
        if (step.correction != 0) slope = (1 + slope) / 2 + step.correction * (1 - of_sample(i + 1)) * slope;
        slopes.data_ptr<float>()[i] = float(slope);
    }
    return slopes;
}

/// Likewise, a row for each step and each image: [count * batch, 1].
Tensor DenoisingRecurrence::slopes(index first, index count, index stride, index batch) const {
    const Tensor of_steps = slopes_.slice(0, first, first + (count - 1) * stride + 1, stride);
    return of_steps.unsqueeze(1).expand({count, batch, 1}).reshape({count * batch, 1});
}

void DenoisingRecurrence::linearise_diagonal(const Section& section, View<const float> before, View<float> after,
                                             Jacobian<float> diagonal) const {
    step(section, before, after);
    const at::NoGradGuard no_gradients;
    if (section.steps() == 0) return;
    Tensor to = tensor_of(diagonal.data(), {section.steps() * section.batch(), shape().width});
    if (plan_.remembers) to.zero_();
    to.slice(1, 0, numbers()).copy_(slopes(section.first, section.steps(), 1, section.batch()).expand({-1, numbers()}));
}

// --- blocks of steps

class DenoisingRecurrence::Blocks : public Recurrence<float> {
public:
    Blocks(const DenoisingRecurrence& all, index length)
        : Recurrence<float>({(all.shape().steps + length - 1) / length, all.shape().batch, all.shape().width}, 1),
          all_(all),
          length_(length) {}

    bool runs_on(Backend backend) const override { return all_.runs_on(backend); }
    void initial(const Section& section, View<float> state) const override { all_.initial(section, state); }
    void step(const Section& section, View<const float> before, View<float> after) const override {
        advance(section, before, after, {});
    }
    void linearise(const Section& section, View<const float> before, View<float> after,
                   Jacobian<float> jacobian) const override {
        advance(section, before, after, jacobian);
    }

private:
    void advance(const Section& section, View<const float> before, View<float> after, Jacobian<float> slope) const {
        const at::NoGradGuard no_gradients;
        const index batch = section.batch(), width = shape().width, rows = section.steps() * batch;
        Tensor states = all_.tensor_of(before.data(), {rows, width}).clone();
        Tensor product;
        if (slope.data() != nullptr) {
            product = all_.tensor_of(slope.data(), {rows, width});
            product.zero_();
            product.slice(1, 0, all_.numbers()).fill_(1);
        }
        for (index i = 0; i < length_; ++i) {
            const index first_step = section.first * length_ + i;
            const index blocks = std::min(section.steps(), (all_.shape().steps - first_step + length_ - 1) / length_);
            if (blocks < 1) continue;
            const Rows now = all_.rows_of(first_step, blocks, length_, section.sequences);
            all_.for_parts(now, 1, [&](const Rows& part, index first, index last) {
                states.slice(0, first, last).copy_(all_.advance(part, states.slice(0, first, last)));
            });
            if (product.defined())
                product.slice(0, 0, now.images.size(0)).mul_(all_.slopes(first_step, blocks, length_, batch));
        }
        all_.tensor_of(after.data(), {rows, width}).copy_(states);
    }

    const DenoisingRecurrence& all_;
    index length_;
};

std::unique_ptr<Recurrence<float>> DenoisingRecurrence::blocks(index length) const {
    if (length < 1) throw InvalidArgument("length", "at least 1", std::to_string(length));
    return std::make_unique<Blocks>(*this, length);
}

Buffer<float> DenoisingRecurrence::coarse_guess(index steps) const {
    const index all = shape().steps, batch = shape().batch, width = shape().width;
    if (steps < 1 || steps > all)
        throw InvalidArgument("steps", "1 to the " + std::to_string(all) + " of the plan", std::to_string(steps));
    const at::NoGradGuard no_gradients;
    std::vector<index> sequences(static_cast<std::size_t>(batch));
    std::iota(sequences.begin(), sequences.end(), index(0));
    auto guess = Buffer<float>::uninitialised(
        shape(), Layout::steps_first, initial_.is_cuda() ? Device::cuda(initial_.get_device()) : Device::host());
    Tensor states = at::zeros({batch, width}, initial_.options());
    states.slice(1, 0, numbers()).copy_(initial_);
    // The coarse run in the same coordinates: input * state = signal * sample + noise * estimate of the noise.
    Tensor coarse = initial_, sample;
    for (index i = 0; i < all; ++i) {
        const Rows rows = rows_of(i, 1, 1, sequences);
        if (i * steps % all < steps) {
            const DenoisingStep& from = plan_.steps[std::size_t(i)];
            const index next = std::min(all, ((i * steps / all + 1) * all + steps - 1) / steps);
            *dependent_calls_ += 1;
            sample = estimate(rows, coarse, false);
            if (next < all) {
                const DenoisingStep& to = plan_.steps[std::size_t(next)];
                const Tensor noise = (from.input * coarse - from.level.signal * sample) / from.level.noise;
                coarse = (to.level.signal * sample + to.level.noise * noise) / to.input;
            }
        }
        const Tensor after = follow(rows, states, sample);
        states = plan_.remembers ? at::cat({after, sample}, 1) : after;
        tensor_of(guess.view().at(i, 0), {batch, width}).copy_(states);
    }
    return guess;
}

}  // namespace deeppcr::nn
