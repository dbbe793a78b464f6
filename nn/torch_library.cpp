// torch.ops.deeppcr.*: what Python (or TorchScript) gets by loading libdeeppcr_nn.so. Each is differentiable.
#include <torch/library.h>

#include <deeppcr/nn/cell.hpp>
#include <deeppcr/nn/dense_cell.hpp>
#include <deeppcr/nn/names.hpp>

namespace {

using at::Tensor;
using namespace deeppcr::nn;

constexpr Names<deeppcr::DenseCellKind, 4> dense_names{{{"elman_tanh", deeppcr::DenseCellKind::elman_tanh},
                                                        {"elman_relu", deeppcr::DenseCellKind::elman_relu},
                                                        {"gru", deeppcr::DenseCellKind::gru},
                                                        {"lstm", deeppcr::DenseCellKind::lstm}}};

template <CellKind kind>
Tensor cell_op(const Tensor& gates, const Tensor& parameters, const c10::optional<Tensor>& initial, bool reversed) {
    CellOptions options;
    options.reversed = reversed;
    return cell(kind, gates, parameters, initial.value_or(Tensor()), options);
}

Tensor dense_op(const std::string& kind, const Tensor& gates, const Tensor& weight_hh, const Tensor& bias_hh,
                const Tensor& initial) {
    DenseCellOptions options;
    options.evaluation.method = deeppcr::Method::sequential;
    return dense_cell(choice_of(dense_names, "kind", kind), gates, weight_hh, bias_hh, initial, options);
}

}  // namespace

// gates [T,B,G*C], parameters [P,C], initial [B,C*K] -> states [T,B,C*K]; see include/deeppcr/nn/cell.hpp.
TORCH_LIBRARY(deeppcr, library) {
    library.def("para_gru(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::para_gru>);
    library.def("para_lstm(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::para_lstm>);
    library.def("diagonal_elman(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::diagonal_elman>);
    library.def("slstm(Tensor gates, Tensor parameters, Tensor? initial=None, bool reversed=False) -> Tensor",
                cell_op<CellKind::slstm>);
    library.def("dense_cell(str kind, Tensor gates, Tensor weight_hh, Tensor bias_hh, Tensor initial) -> Tensor",
                dense_op);
}
