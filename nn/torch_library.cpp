// torch.ops.deeppcr.*: what Python (or TorchScript) gets by loading libdeeppcr_nn.so. Each is differentiable.
#include <torch/library.h>

#include <deeppcr/nn/cell.hpp>
#include <deeppcr/nn/dense_cell.hpp>
#include <deeppcr/nn/names.hpp>
#include <deeppcr/nn/recurrent.hpp>

namespace {

using at::Tensor;
using namespace deeppcr::nn;

constexpr Names<deeppcr::DenseCellKind, 4> dense_names{{{"elman_tanh", deeppcr::DenseCellKind::elman_tanh},
                                                        {"elman_relu", deeppcr::DenseCellKind::elman_relu},
                                                        {"gru", deeppcr::DenseCellKind::gru},
                                                        {"lstm", deeppcr::DenseCellKind::lstm}}};

constexpr Names<CellKind, 4> cell_names{{{"para_gru", CellKind::para_gru},
                                         {"para_lstm", CellKind::para_lstm},
                                         {"diagonal_elman", CellKind::diagonal_elman},
                                         {"slstm", CellKind::slstm}}};

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

std::tuple<Tensor, Tensor> recurrent_op(const std::string& cell, const Tensor& input,
                                        const std::vector<Tensor>& weights, const c10::optional<Tensor>& initial,
                                        const c10::optional<Tensor>& batch_sizes, bool bidirectional, bool batch_first,
                                        double dropout) {
    RecurrentCall call;
    call.bidirectional = bidirectional;
    call.batch_first = batch_first;
    call.batch_sizes = batch_sizes.value_or(Tensor());
    call.dropout = dropout;
    return recurrent(choice_of(cell_names, "cell", cell), input, weights, initial.value_or(Tensor()), call);
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
    // Whole layers, as torch's own _VF.gru: see `recurrent` in include/deeppcr/nn/recurrent.hpp.
    library.def(
        "recurrent(str cell, Tensor input, Tensor[] weights, Tensor? initial=None, Tensor? batch_sizes=None, "
        "bool bidirectional=False, bool batch_first=True, float dropout=0.0) -> (Tensor output, Tensor last)",
        [](const std::string& cell, const Tensor& input, const c10::List<Tensor>& weights,
           const c10::optional<Tensor>& initial, const c10::optional<Tensor>& batch_sizes, bool bidirectional,
           bool batch_first, double dropout) {
            return recurrent_op(cell, input, weights.vec(), initial, batch_sizes, bidirectional, batch_first, dropout);
        });
}
