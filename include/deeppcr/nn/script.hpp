// Anybody's networks from TorchScript files: a step x_t = f(x_{t-1}, u_t) as a recurrence, a denoiser for sampling.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <memory>
#include <vector>

#include <deeppcr/nn/denoising.hpp>
#include <deeppcr/recurrence.hpp>

namespace deeppcr::nn {

/// A TorchScript module, as torch.jit.save writes it, in evaluation mode.
class Script {
public:
    /// Its parameters become numbers of `type`. Throws FileError where the file is missing or is no TorchScript.
    explicit Script(const std::filesystem::path& file, at::ScalarType type = at::kFloat, at::Device device = at::kCPU);
    ~Script();

    const std::filesystem::path& file() const { return file_; }
    /// How many tensors `forward` takes, at least: those without a default; and at most.
    index fewest_arguments() const { return fewest_; }
    index most_arguments() const { return most_; }
    /// forward(arguments...), one tensor. Throws FileError, with what LibTorch says, where it fails or returns another
    /// thing, `sizes` or a type other than the first argument's among them.
    at::Tensor forward(const std::vector<at::Tensor>& arguments, at::IntArrayRef sizes) const;

private:
    struct Module;
    std::filesystem::path file_;
    std::shared_ptr<Module> module_;
    index fewest_ = 0, most_ = 0;
};

/// x_t = f(x_{t-1}, u_t): a module that maps states [rows, width] and inputs [rows, width of u] (if it takes two
/// arguments) to the next states, each row by itself. Jacobians, dense, come by automatic differentiation: `width`
/// vector-Jacobian products for all rows of a call at once. T: float or double, to which the module is converted.
template <class T>
class ScriptRecurrence : public Recurrence<T> {
public:
    /// inputs: [steps, batch, width of u]; where the module takes none, only the first two sizes count.
    /// initial: [batch, width]. Throws InvalidArgument, FileError.
    ScriptRecurrence(const std::filesystem::path& file, const at::Tensor& inputs, const at::Tensor& initial);

    void initial(const Section& section, View<T> state) const override;
    void step(const Section& section, View<const T> before, View<T> after) const override;
    void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const override;

private:
    at::Tensor advance(const Section& section, const at::Tensor& states, index copies) const;

    Script script_;
    at::Tensor inputs_, initial_;
};

/// A module that maps noisy samples [rows, shape...] and times [rows] (and, where it takes three arguments, classes
/// [rows], long) to predictions of the samples' shape. classes: of each image; undefined where the module takes two.
/// Throws InvalidArgument.
Denoiser script_denoiser(const Script& script, const std::vector<index>& shape, const at::Tensor& classes);

}  // namespace deeppcr::nn
