#include <deeppcr/nn/script.hpp>
#include <deeppcr/nn/script_step.hpp>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/script.h>

#include <algorithm>
#include <sstream>
#include <string>

#include <files/error.hpp>

#include "nn/differentiate.hpp"
#include "nn/tensors.hpp"

namespace deeppcr::nn {

using at::Tensor;

struct Script::Module {
    torch::jit::Module module;
};

Script::Script(const std::filesystem::path& file, at::ScalarType type, at::Device device)
    : file_(file), module_(std::make_shared<Module>()) {
    if (!std::filesystem::exists(file)) throw FileError(file, "does not exist");
    try {
        module_->module = torch::jit::load(file.string(), device);
        module_->module.eval();
        module_->module.to(type);
        const auto& schema = module_->module.get_method("forward").function().getSchema();
        for (const auto& argument : schema.arguments()) {
            ++most_;
            fewest_ += !argument.default_value().has_value();
        }
        most_ -= 1, fewest_ -= 1;  // self
    } catch (const c10::Error& problem) {
        throw FileError(file, "a TorchScript module with a forward method",
                        "what LibTorch refuses: " + std::string(problem.what_without_backtrace()));
    }
    for (Tensor parameter : module_->module.parameters()) parameter.set_requires_grad(false);
}
Script::~Script() = default;

Tensor Script::forward(const std::vector<Tensor>& arguments, at::IntArrayRef sizes) const {
    torch::jit::IValue value;
    // Or the module would be rewritten after its first calls, and round differently.
    const torch::jit::GraphOptimizerEnabledGuard no_rewriting(false);
    try {
        value = module_->module.forward({arguments.begin(), arguments.end()});
    } catch (const std::exception& problem) {
        const std::string text = problem.what();
        throw FileError(file_, "its forward method failed: " + text.substr(0, text.find("\nException raised from")));
    }
    if (!value.isTensor()) throw FileError(file_, "a tensor from its forward method", value.tagKind());
    const Tensor result = value.toTensor();
    if (result.sizes() != sizes || result.scalar_type() != arguments[0].scalar_type()) {
        std::ostringstream expected;
        expected << arguments[0].scalar_type() << " " << sizes << " from its forward method";
        throw FileError(file_, expected.str(), describe(result));
    }
    return result;
}

namespace {

const Tensor& checked_inputs(const Script& script, const Tensor& inputs, const Tensor& initial, at::ScalarType type) {
    if (script.fewest_arguments() > 2 || script.most_arguments() < 1)
        throw FileError(script.file(), "a forward method of one or two tensors, states and inputs",
                        std::to_string(script.fewest_arguments()) + " arguments");
    if (!inputs.defined() || inputs.dim() != 3 || inputs.scalar_type() != type)
        throw InvalidArgument("inputs", std::string(c10::toString(type)) + " [steps, batch, width]", describe(inputs));
    if (!initial.defined() || initial.dim() != 2 || initial.size(0) != inputs.size(1) || initial.scalar_type() != type)
        throw InvalidArgument("initial",
                              std::string(c10::toString(type)) + " [" + std::to_string(inputs.size(1)) + ", width]",
                              describe(initial));
    return inputs;
}

template <class T>
Tensor tensor_of(const T* data, at::IntArrayRef sizes) {
    return at::from_blob(const_cast<T*>(data), sizes, c10::CppTypeToScalarType<T>::value);
}

}  // namespace

template <class T>
ScriptRecurrence<T>::ScriptRecurrence(const std::filesystem::path& file, const Tensor& inputs, const Tensor& initial)
    : Recurrence<T>({inputs.defined() && inputs.dim() == 3 ? inputs.size(0) : 0,
                     inputs.defined() && inputs.dim() == 3 ? inputs.size(1) : 0,
                     initial.defined() && initial.dim() == 2 ? initial.size(1) : 1}),
      script_(file, c10::CppTypeToScalarType<T>::value),
      inputs_(checked_inputs(script_, inputs, initial, c10::CppTypeToScalarType<T>::value).contiguous()),
      initial_(initial.contiguous()) {}

template <class T>
void ScriptRecurrence<T>::initial(const Section& section, View<T> state) const {
    for (index j = 0; j < section.batch(); ++j)
        std::copy_n(initial_.data_ptr<T>() + section.sequences[std::size_t(j)] * this->shape().width,
                    this->shape().width, state.at(0, j));
}

template <class T>
Tensor ScriptRecurrence<T>::advance(const Section& section, const Tensor& states, index copies) const {
    std::vector<Tensor> arguments{states};
    if (script_.most_arguments() > 1) {
        Tensor sequences = at::empty({section.batch()}, at::kLong);
        std::copy(section.sequences.begin(), section.sequences.end(), sequences.data_ptr<std::int64_t>());
        arguments.push_back(repeat_rows(inputs_.slice(0, section.first, section.last)
                                            .index_select(1, sequences)
                                            .reshape({section.steps() * section.batch(), inputs_.size(2)}),
                                        copies));
    }
    return script_.forward(arguments, states.sizes());
}

template <class T>
void ScriptRecurrence<T>::step(const Section& section, View<const T> before, View<T> after) const {
    const at::NoGradGuard no_gradients;
    const index rows = section.steps() * section.batch(), width = this->shape().width;
    if (rows == 0) return;
    tensor_of(after.data(), {rows, width}).copy_(advance(section, tensor_of(before.data(), {rows, width}), 1));
}

template <class T>
void ScriptRecurrence<T>::linearise(const Section& section, View<const T> before, View<T> after,
                                    Jacobian<T> jacobian) const {
    const index rows = section.steps() * section.batch(), width = this->shape().width;
    if (rows == 0) return;
    const Tensor from = tensor_of(before.data(), {rows, width});
    linearise_rows([&](const Tensor& states, index copies) { return advance(section, states, copies); }, from,
                   tensor_of(after.data(), {rows, width}), tensor_of(jacobian.data(), {rows, width, width}),
                   copies_to_linearise(from));
}

template class ScriptRecurrence<float>;
template class ScriptRecurrence<double>;

template <class T>
std::unique_ptr<Recurrence<T>> script_recurrence(const std::filesystem::path& file, View<const T> inputs,
                                                 View<const T> initial) {
    const auto copied = [](View<const T> states, at::IntArrayRef sizes) {
        Tensor tensor = at::empty(sizes, c10::CppTypeToScalarType<T>::value);
        const View<T> to(tensor.data_ptr<T>(), states.shape());
        for (index i = 0; i < states.steps(); ++i)
            for (index j = 0; j < states.batch(); ++j) std::copy_n(states.at(i, j), states.width(), to.at(i, j));
        return tensor;
    };
    if (initial.steps() != 1) throw InvalidArgument("initial", "one step", to_string(initial.shape()));
    return std::make_unique<ScriptRecurrence<T>>(file, copied(inputs, {inputs.steps(), inputs.batch(), inputs.width()}),
                                                 copied(initial, {initial.batch(), initial.width()}));
}
template std::unique_ptr<Recurrence<float>> script_recurrence(const std::filesystem::path&, View<const float>,
                                                              View<const float>);
template std::unique_ptr<Recurrence<double>> script_recurrence(const std::filesystem::path&, View<const double>,
                                                               View<const double>);

Denoiser script_denoiser(const Script& script, const std::vector<index>& shape, const Tensor& classes) {
    index numbers = 1;
    for (const index size : shape) {
        if (size < 1) throw InvalidArgument("shape", "sizes of 1 or more", std::to_string(size));
        numbers *= size;
    }
    const bool takes_classes = script.most_arguments() > 2;
    if (script.fewest_arguments() > 3 || script.most_arguments() < 2)
        throw FileError(script.file(), "a forward method of two or three tensors: samples, times and classes",
                        std::to_string(script.most_arguments()) + " arguments");
    if (script.fewest_arguments() > 2 && !classes.defined())
        throw InvalidArgument("classes", "one for each image, as the model takes them", "none");
    return [=](const Tensor& inputs, const Tensor& times, const Tensor& images) {
        if (inputs.size(1) != numbers)
            throw InvalidArgument("shape", "sizes whose product is " + std::to_string(inputs.size(1)),
                                  std::to_string(numbers));
        std::vector<index> sizes{inputs.size(0)};
        sizes.insert(sizes.end(), shape.begin(), shape.end());
        std::vector<Tensor> arguments{inputs.reshape(sizes), times};
        if (takes_classes && classes.defined()) arguments.push_back(classes.index_select(0, images));
        return script.forward(arguments, sizes).reshape(inputs.sizes());
    };
}

}  // namespace deeppcr::nn
