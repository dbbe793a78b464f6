// Recurrences in safetensors files: recurrent layers with PyTorch's names, this library's, and deep networks.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include <deeppcr/recurrence.hpp>
#include <files/safetensors.hpp>

namespace deeppcr::program {

/// A layer's recurrence over given inputs, with the arrays that it looks at.
template <class T>
struct LayerRecurrence {
    std::string description;  ///< "layer 0, reversed: GRU, 64 hidden units"
    std::vector<Buffer<T>> arrays;
    std::unique_ptr<Recurrence<T>> recurrence;
    index first_output = 0, output_stride = 1, outputs = 0;  ///< which numbers of a state enter the next layer
    bool reversed = false;
};

/// What a model file holds, one of
///   weight_ih_l0, weight_hh_l0 [, bias_ih_l0, bias_hh_l0]   torch.nn.RNN, GRU or LSTM, told apart by their shapes
///   weight_ih_l0, bias_ih_l0, parameters_l0                 deeppcr::nn::ParaGRU, ParaLSTM, SLSTM, Elman
///   layers.weight, layers.bias                              a deep network, as `deeppcr train resnet` writes it
/// (recurrent layers also _l1, _l2 .. and _reverse), each name after one common prefix such as "rnn.". Further tensors
/// are ignored.
class ModelFile {
public:
    /// module: the prefix; empty: the only one in the file. Throws FileError, which names what is missing or does not
    /// fit, or the modules to choose from.
    ModelFile(std::filesystem::path path, const std::string& module);

    bool float64() const { return float64_; }
    bool recurrent() const { return !deep_; }
    index layers() const { return layers_; }
    index directions() const { return directions_; }
    /// Numbers per step that enter the first layer: of each head, where a layer has several; a deep network's width.
    index inputs() const { return inputs_; }

    /// The recurrence of a layer and direction (1: reversed in time) over `input` [steps,batch,inputs], whose width is
    /// a multiple of what the weights take where there are heads. relu: of torch.nn.RNN, in place of tanh. A deep
    /// network's input is its first state, [1,batch,width]. T must be the file's type. Throws FileError.
    template <class T>
    LayerRecurrence<T> layer(index layer, index direction, View<const T> input, bool relu) const;

private:
    const files::Tensor* find(const std::string& name) const;
    const files::Tensor& get(const std::string& name) const;
    /// Throws FileError unless `tensor`, of this name, has this shape and the file's type.
    void require(const files::Tensor& tensor, const std::string& name, const std::vector<index>& shape) const;
    template <class T>
    LayerRecurrence<T> deep_network(View<const T> first) const;

    std::filesystem::path path_;
    files::Safetensors contents_;
    std::string prefix_;
    bool float64_ = false, deep_ = false;
    index layers_ = 0, directions_ = 1, inputs_ = 0;
};

}  // namespace deeppcr::program
