#include "model_file.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <variant>

#include <deeppcr/cells.hpp>
#include <deeppcr/dense_cells.hpp>
#include <deeppcr/dense_chain.hpp>
#include <deeppcr/nn/names.hpp>

namespace deeppcr::program {
namespace {

using files::Tensor;

std::string count_of(index count, const std::string& what) {
    return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

/// The numbers of a tensor whose shape is known, as an array of another.
template <class T>
Buffer<T> buffer(const Tensor& tensor, const Shape& shape) {
    Buffer<T> result(shape);
    const auto& values = std::get<std::vector<T>>(tensor.values);
    std::copy(values.begin(), values.end(), result.data());
    return result;
}

/// weight x + bias for every step and sequence. The weight's rows are gates x channels; the channels, and the inputs,
/// are cut into heads.
template <class T>
Buffer<T> project(View<const T> input, const Tensor& weight_tensor, const Tensor* bias, index gates) {
    const auto& weight = std::get<std::vector<T>>(weight_tensor.values);
    const index rows = weight_tensor.shape[0], columns = weight_tensor.shape[1], channels = rows / gates,
                heads = input.width() / columns, per_head = channels / heads;
    std::vector<T> transposed(weight.size());  // so that the inner loop below runs along memory
    for (index row = 0; row < rows; ++row)
        for (index column = 0; column < columns; ++column)
            transposed[std::size_t(column * rows + row)] = weight[std::size_t(row * columns + column)];
    Buffer<T> result({input.steps(), input.batch(), rows});
    for (index t = 0; t < input.steps(); ++t)
        for (index j = 0; j < input.batch(); ++j) {
            T* const to = result.view().at(t, j);
            if (bias != nullptr) std::copy_n(std::get<std::vector<T>>(bias->values).data(), rows, to);
            for (index head = 0; head < heads; ++head)
                for (index column = 0; column < columns; ++column) {
                    const T x = input(t, j, head * columns + column);
                    for (index gate = 0; gate < gates; ++gate) {
                        const index first = gate * channels + head * per_head;
                        const T* const from = transposed.data() + column * rows + first;
                        for (index row = 0; row < per_head; ++row) to[first + row] += from[row] * x;
                    }
                }
        }
    return result;
}

template <Cell C, class T>
std::unique_ptr<Recurrence<T>> make_cell(View<const T> gates, View<const T> parameters) {
    return std::make_unique<CellRecurrence<C, T>>(gates, parameters);
}

/// A kind of cell, known by its gates and parameters per channel.
template <class T>
struct CellOfFile {
    index gates, parameters, states;
    const char* name;
    std::unique_ptr<Recurrence<T>> (*make)(View<const T>, View<const T>);
};
template <class C, class T>
constexpr CellOfFile<T> cell_of_file() {
    return {C::inputs, C::parameters, C::states, C::name, &make_cell<C, T>};
}
template <class T>
constexpr std::array<CellOfFile<T>, 4> cells_of_files{cell_of_file<ParaGRU, T>(), cell_of_file<ParaLSTM, T>(),
                                                      cell_of_file<SLSTM, T>(), cell_of_file<DiagonalElman, T>()};

/// "rnn." of "rnn.weight_ih_l0_reverse", for any layer; nothing where the name is of another form.
std::optional<std::string> module_of_recurrent(std::string_view name) {
    constexpr std::string_view reverse = "_reverse", weight = "weight_ih_l";
    if (name.ends_with(reverse)) name.remove_suffix(reverse.size());
    const std::size_t digits = name.size() - (name.find_last_not_of("0123456789") + 1);
    if (digits < 1 || digits > 6) return {};
    name.remove_suffix(digits);
    if (!name.ends_with(weight)) return {};
    return std::string(name.substr(0, name.size() - weight.size()));
}

/// A file's names may be of any length.
std::string excerpt(const std::string& name) { return name.size() <= 60 ? name : name.substr(0, 57) + "..."; }

}  // namespace

ModelFile::ModelFile(std::filesystem::path path, const std::string& module)
    : path_(std::move(path)), contents_(files::read_safetensors(path_)) {
    std::set<std::string> recurrent, deep;
    for (const auto& [name, tensor] : contents_.tensors) {
        constexpr std::string_view deep_name = "layers.weight";
        if (name.starts_with("optimiser.")) continue;  // of a checkpoint: in the shapes of the weights
        if (const auto found = module_of_recurrent(name)) recurrent.insert(*found);
        if (name.ends_with(deep_name)) deep.insert(name.substr(0, name.size() - deep_name.size()));
    }
    std::set<std::string> modules = recurrent;
    modules.insert(deep.begin(), deep.end());
    std::string found;
    for (const std::string& prefix : modules) found += (found.empty() ? "\"" : ", \"") + excerpt(prefix) + '"';
    prefix_ = module.empty() || module.ends_with('.') || modules.contains(module) ? module : module + '.';
    if (module.empty() && modules.size() == 1) prefix_ = *modules.begin();
    if (!modules.contains(prefix_)) {
        if (!modules.empty())
            throw FileError(path_, module.empty() ? "the option --module" : "a module with weights",
                            (module.empty() ? "" : '"' + module + "\"; there are ") + "modules " + found);
        std::string names;
        index listed = 0;
        for (const auto& [name, tensor] : contents_.tensors)
            if (++listed <= 8) names += (names.empty() ? "" : ", ") + excerpt(name);
        throw FileError(path_, "tensors weight_ih_l0 of a recurrent layer, or layers.weight of a deep network",
                        names.empty() ? "none" : names + (listed > 8 ? ", ..." : ""));
    }

    deep_ = !recurrent.contains(prefix_);
    const Tensor& first = get(deep_ ? "layers.weight" : "weight_ih_l0");
    if (!std::holds_alternative<std::vector<float>>(first.values) &&
        !std::holds_alternative<std::vector<double>>(first.values))
        throw FileError(path_, "weights of type float32 or float64", files::element_type(first));
    float64_ = std::holds_alternative<std::vector<double>>(first.values);
    const std::size_t dimensions = deep_ ? 3 : 2;
    if (first.shape.size() != dimensions || *std::min_element(first.shape.begin(), first.shape.end()) < 1)
        throw FileError(path_, deep_ ? "layers.weight [layers,width,width]" : "weight_ih_l0 [gates * hidden, inputs]",
                        files::to_string(first.shape));
    inputs_ = first.shape.back();
    layers_ = 1;
    if (deep_) return;
    if (find("weight_hr_l0") != nullptr)
        throw FileError(path_, "a recurrent layer without projected states", "weight_hr_l0");
    while (find("weight_ih_l" + std::to_string(layers_)) != nullptr) ++layers_;
    directions_ = find("weight_ih_l0_reverse") != nullptr ? 2 : 1;
}

const Tensor* ModelFile::find(const std::string& name) const {
    const auto found = contents_.tensors.find(prefix_ + name);
    return found == contents_.tensors.end() ? nullptr : &found->second;
}

const Tensor& ModelFile::get(const std::string& name) const {
    if (const Tensor* found = find(name)) return *found;
    throw FileError(path_, "a tensor " + prefix_ + name, "none");
}

void ModelFile::require(const Tensor& tensor, const std::string& name, const std::vector<index>& shape) const {
    const std::string type = float64_ ? "float64" : "float32";
    if (tensor.shape != shape || files::element_type(tensor) != type)
        throw FileError(path_, prefix_ + name + " " + files::to_string(shape) + " of " + type,
                        files::to_string(tensor.shape) + " of " + files::element_type(tensor));
}

template <class T>
LayerRecurrence<T> ModelFile::layer(index layer, index direction, View<const T> input, bool relu) const {
    if (deep_) return deep_network<T>(input);
    const std::string suffix = "_l" + std::to_string(layer) + (direction == 1 ? "_reverse" : "");
    const Tensor& weight = get("weight_ih" + suffix);
    const Tensor *const parameters = find("parameters" + suffix), *const bias = find("bias_ih" + suffix);
    const Tensor& recurrent = parameters != nullptr ? *parameters : get("weight_hh" + suffix);
    const auto matrix = [](const Tensor& tensor) {
        return tensor.shape.size() == 2 && tensor.shape[0] > 0 && tensor.shape[1] > 0;
    };
    if (!matrix(weight) || !matrix(recurrent) || weight.shape[0] % recurrent.shape[1] != 0)
        throw FileError(
            path_,
            prefix_ + "weight_ih" + suffix + " [gates * hidden, inputs], with " +
                (parameters != nullptr ? "parameters [count, hidden]" : "weight_hh [gates * hidden, hidden]"),
            files::to_string(weight.shape) + " and " + files::to_string(recurrent.shape));
    const index rows = weight.shape[0], columns = weight.shape[1], hidden = recurrent.shape[1], gates = rows / hidden;
    const index heads = input.width() % columns == 0 ? input.width() / columns : 0;
    const bool heads_fit = heads == 1 || (parameters != nullptr && heads > 1 && hidden % heads == 0);
    require(weight, "weight_ih" + suffix, {rows, heads_fit ? columns : input.width()});
    if (parameters == nullptr) require(recurrent, "weight_hh" + suffix, {gates * hidden, hidden});
    const auto* const other = directions_ == 2 ? find((parameters != nullptr ? "parameters_l" : "weight_hh_l") +
                                                      std::to_string(layer) + (direction == 1 ? "" : "_reverse"))
                                               : nullptr;
    if (directions_ == 2 && (other == nullptr || !matrix(*other) || other->shape[1] != hidden))
        throw FileError(
            path_,
            "both directions of layer " + std::to_string(layer) + " with " + std::to_string(hidden) + " hidden units",
            other == nullptr ? "one alone" : "another of shape " + files::to_string(other->shape));
    if (bias != nullptr) require(*bias, "bias_ih" + suffix, {rows});

    LayerRecurrence<T> result;
    result.reversed = direction == 1;
    result.outputs = hidden;
    result.description = "layer " + std::to_string(layer) + (result.reversed ? ", reversed: " : ": ");
    result.arrays.push_back(project<T>(result.reversed ? input.reversed() : input, weight, bias, gates));
    const Buffer<T>& inputs = result.arrays[0];
    if (parameters != nullptr) {
        for (const CellOfFile<T>& cell : cells_of_files<T>) {
            if (cell.gates != gates || cell.parameters != parameters->shape[0]) continue;
            require(*parameters, "parameters" + suffix, {cell.parameters, hidden});
            result.arrays.push_back(buffer<T>(*parameters, {cell.parameters, 1, hidden}));
            result.recurrence = cell.make(inputs, result.arrays[1]);
            result.first_output = cell.states - 1;
            result.output_stride = cell.states;
            result.description += std::string(cell.name) + ", " + count_of(hidden, "channel");
            return result;
        }
        throw FileError(path_,
                        "gates and parameters per channel of ParaGRU (3, 3), ParaLSTM (3, 5), SLSTM (4, 4) or "
                        "Elman (1, 1)",
                        std::to_string(gates) + ", " + std::to_string(parameters->shape[0]));
    }
    if (gates != 1 && gates != 3 && gates != 4)
        throw FileError(path_, "1, 3 or 4 gates in weight_ih" + suffix + " (RNN, GRU, LSTM)", std::to_string(gates));
    const DenseCellKind kind = gates == 4   ? DenseCellKind::lstm
                               : gates == 3 ? DenseCellKind::gru
                               : relu       ? DenseCellKind::elman_relu
                                            : DenseCellKind::elman_tanh;
    result.arrays.push_back(buffer<T>(recurrent, {gates, hidden, hidden}));
    const Tensor* const recurrent_bias = find("bias_hh" + suffix);
    if (recurrent_bias != nullptr) require(*recurrent_bias, "bias_hh" + suffix, {gates * hidden});
    result.arrays.push_back(recurrent_bias != nullptr ? buffer<T>(*recurrent_bias, {gates, 1, hidden})
                                                      : Buffer<T>({gates, 1, hidden}));
    result.arrays.emplace_back(Shape{1, input.batch(), state_width(kind, hidden)});
    result.recurrence = std::make_unique<DenseCell<T>>(kind, inputs.view(), result.arrays[1].view(),
                                                       result.arrays[2].view(), result.arrays[3].view());
    result.description += std::string(gates == 4   ? "LSTM"
                                      : gates == 3 ? "GRU"
                                      : relu       ? "RNN (relu)"
                                                   : "RNN (tanh)") +
                          ", " + count_of(hidden, "hidden unit");
    return result;
}

template <class T>
LayerRecurrence<T> ModelFile::deep_network(View<const T> first) const {
    const Tensor &weight = get("layers.weight"), &bias = get("layers.bias");
    const index depth = weight.shape[0], width = weight.shape[2];
    require(weight, "layers.weight", {depth, width, width});
    require(bias, "layers.bias", {depth, width});
    typename DenseChain<T>::Options options;
    const auto metadata = [&](const std::string& key) {
        const auto found = contents_.metadata.find(key);
        if (found == contents_.metadata.end())
            throw FileError(path_, "metadata \"" + key + "\", as deeppcr train writes it", "none");
        return found->second;
    };
    const std::string skip = metadata("skip"), activation = metadata("activation");
    const auto [end, problem] = std::from_chars(skip.data(), skip.data() + skip.size(), options.skip);
    if (problem != std::errc() || end != skip.data() + skip.size() || options.skip < 0 ||
        (options.skip > 0 && depth % options.skip != 0))
        throw FileError(path_, "a divisor of " + std::to_string(depth) + " layers, or 0, as metadata \"skip\"", skip);
    const auto known = std::find_if(nn::activation_names.begin(), nn::activation_names.end(),
                                    [&](const auto& entry) { return entry.first == activation; });
    if (known == nn::activation_names.end())
        throw FileError(path_, "tanh, relu, sigmoid, gelu or identity as metadata \"activation\"", activation);
    options.activation = known->second;

    LayerRecurrence<T> result;
    result.description = "deep network: " + count_of(depth, "layer") + " x " + std::to_string(width) + ", " +
                         activation +
                         (options.skip > 0 ? ", residual blocks of " + count_of(options.skip, "layer") : "");
    result.arrays.push_back(buffer<T>(weight, {depth, width, width}));
    result.arrays.push_back(buffer<T>(bias, {depth, 1, width}));
    result.arrays.emplace_back(Shape{1, first.batch(), width});
    for (index j = 0; j < first.batch(); ++j) std::copy_n(first.at(0, j), width, result.arrays.back().view().at(0, j));
    result.recurrence = std::make_unique<DenseChain<T>>(result.arrays[0].view(), result.arrays[1].view(),
                                                        result.arrays[2].view(), options);
    result.outputs = width;
    return result;
}

template LayerRecurrence<float> ModelFile::layer(index, index, View<const float>, bool) const;
template LayerRecurrence<double> ModelFile::layer(index, index, View<const double>, bool) const;

}  // namespace deeppcr::program
