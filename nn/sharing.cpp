#include "nn/sharing.hpp"

#include <ATen/ops/cat.h>

#include <algorithm>
#include <span>

#include <deeppcr/error.hpp>

#include "nn/device_scope.hpp"

namespace deeppcr::nn {
namespace {

using at::Tensor;

template <class T>
void sum_in_place(Group& group, const Tensor& values) {
    const DeviceScope here(values);
    group.sum(std::span(values.data_ptr<T>(), std::size_t(values.numel())), here.options({}).execution);
}

/// Tensors of one type on one device become their sums.
void sum_alike(Group& group, const std::vector<Tensor>& tensors) {
    std::vector<Tensor> flat;
    for (const Tensor& tensor : tensors) flat.push_back(tensor.detach().reshape({-1}));
    const Tensor values = at::cat(flat);
    if (values.scalar_type() == at::kFloat)
        sum_in_place<float>(group, values);
    else
        sum_in_place<double>(group, values);
    index first = 0;
    for (const Tensor& tensor : tensors) {
        Tensor(tensor).copy_(values.narrow(0, first, tensor.numel()).view(tensor.sizes()));
        first += tensor.numel();
    }
}

}  // namespace

void sum_over(Group& group, const std::vector<Tensor>& tensors) {
    const at::NoGradGuard no_gradients;
    for (const Tensor& tensor : tensors)
        if (tensor.scalar_type() != at::kFloat && tensor.scalar_type() != at::kDouble)
            throw InvalidArgument("tensors", "float or double", c10::toString(tensor.scalar_type()));
    std::vector<Tensor> left = tensors;
    while (!left.empty()) {
        const Tensor first = left.front();
        const auto others = std::stable_partition(left.begin(), left.end(), [&](const Tensor& tensor) {
            return tensor.scalar_type() == first.scalar_type() && tensor.device() == first.device();
        });
        sum_alike(group, {left.begin(), others});
        left.erase(left.begin(), others);
    }
}

double Share::sum(double value) const {
    if (group_ != nullptr) group_->sum(std::span(&value, 1));
    return value;
}

bool Share::any(bool condition) const {
    index found = condition ? 1 : 0;
    if (group_ != nullptr) group_->maximum(std::span(&found, 1));
    return found != 0;
}

void Share::reduce(std::vector<double>& sums, std::vector<double>& maxima) const {
    if (group_ == nullptr) return;
    group_->sum(std::span(sums));
    group_->maximum(std::span(maxima));
}

void Share::barrier() const {
    if (group_ != nullptr) group_->barrier();
}

}  // namespace deeppcr::nn
