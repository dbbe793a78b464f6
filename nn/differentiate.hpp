// Jacobians of functions of LibTorch by automatic differentiation.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

/// Every row `copies` times, one after the other.
inline at::Tensor repeat_rows(const at::Tensor& tensor, index copies) {
    std::vector<index> sizes = tensor.sizes().vec(), wanted = sizes;
    sizes.insert(sizes.begin() + 1, copies);
    wanted[0] *= copies;
    return tensor.unsqueeze(1).expand(sizes).reshape(wanted);
}

/// How many copies of each row linearise_rows asks f for. Where launches cost more than rows, on a GPU and for few
/// rows, as many as it needs at once, else one.
inline index copies_to_linearise(const at::Tensor& states) {
    return states.is_cuda() || states.numel() <= 512 ? states.size(1) : 1;
}

/// after = f(states) [rows, width] and blocks = its Jacobian [rows, width, width], where no row of f influences
/// another: the gradient of a sum over the rows is then every row's own, and `width` vector-Jacobian products for all
/// rows are enough, each of them a call's or (copies = width) a row's. f(states, copies): of states whose every row is
/// there so many times. `after` has the bits of f(states, 1).
template <class Function>
void linearise_rows(const Function& f, const at::Tensor& states, const at::Tensor& after, const at::Tensor& blocks,
                    index copies) {
    const index rows = states.size(0), width = states.size(1);
    if (copies > 1) {
        const at::NoGradGuard no_gradients;
        after.copy_(f(states, 1));
    }
    at::Tensor before = repeat_rows(states, copies).clone(), result;
    {
        const at::AutoGradMode gradients(true);
        before.set_requires_grad(true);
        result = f(before, copies);
    }
    if (copies == 1) after.copy_(result.detach());
    if (!result.requires_grad()) {
        blocks.zero_();
        return;
    }
    for (index k = 0; k < width; k += copies) {
        at::Tensor sum;
        {
            const at::AutoGradMode gradients(true);
            sum = copies > 1 ? result.view({rows, width, width}).diagonal(0, 1, 2).sum() : result.select(1, k).sum();
        }
        const auto gradients = torch::autograd::grad({sum}, {before}, {}, k + copies < width, /*create_graph=*/false,
                                                     /*allow_unused=*/true);
        const at::Tensor part = blocks.slice(1, k, k + copies);
        if (gradients[0].defined())
            part.copy_(gradients[0].view({rows, copies, width}));
        else
            part.zero_();
    }
}

}  // namespace deeppcr::nn
