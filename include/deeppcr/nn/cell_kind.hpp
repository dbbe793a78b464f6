// The built-in cells (cells.hpp) as values. No LibTorch in here.
#pragma once

namespace deeppcr::nn {

enum class CellKind { para_gru, para_lstm, diagonal_elman, slstm };

}  // namespace deeppcr::nn
