// The built-in cells on GPUs.
#include <deeppcr/cell.cuh>
#include <deeppcr/cells.hpp>

#include "recurrence/device_cells.hpp"

namespace deeppcr::cell {

void register_built_in_cells() {
    static const RegisteredOnGpu<ParaGRU> para_gru;
    static const RegisteredOnGpu<ParaLSTM> para_lstm;
    static const RegisteredOnGpu<DiagonalElman> diagonal_elman;
    static const RegisteredOnGpu<SLSTM> slstm;
}

}  // namespace deeppcr::cell
