// Jacobians of functions of LibTorch by automatic differentiation.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

/// after = f(states) [rows, width] and blocks = its Jacobian [rows, width, width], where no row of f influences
/// another: the gradient of the sum over the rows is then every row's own, and `width` vector-Jacobian products are
/// enough.
template <class Function>
void linearise_rows(const Function& f, const at::Tensor& states, const at::Tensor& after, const at::Tensor& blocks) {
    at::Tensor before = states.clone(), result;
    {
        const at::AutoGradMode gradients(true);
        before.set_requires_grad(true);
        result = f(before);
    }
    after.copy_(result.detach());
    if (!result.requires_grad()) {
        blocks.zero_();
        return;
    }
    const index width = states.size(1);
    for (index k = 0; k < width; ++k) {
        at::Tensor sum;
        {
            const at::AutoGradMode gradients(true);
            sum = result.select(1, k).sum();
        }
        const auto gradients = torch::autograd::grad({sum}, {before}, {}, k + 1 < width, /*create_graph=*/false,
                                                     /*allow_unused=*/true);
        const at::Tensor row = blocks.select(1, k);
        if (gradients[0].defined())
            row.copy_(gradients[0]);
        else
            row.zero_();
    }
}

}  // namespace deeppcr::nn
