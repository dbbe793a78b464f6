// The kernels of the built-in cells for processors.
#include <deeppcr/cells.hpp>

namespace deeppcr::cell {

template const Kernels<float>& kernels_of<ParaGRU, float>();
template const Kernels<double>& kernels_of<ParaGRU, double>();
template const Kernels<float>& kernels_of<ParaLSTM, float>();
template const Kernels<double>& kernels_of<ParaLSTM, double>();
template const Kernels<float>& kernels_of<DiagonalElman, float>();
template const Kernels<double>& kernels_of<DiagonalElman, double>();
template const Kernels<float>& kernels_of<SLSTM, float>();
template const Kernels<double>& kernels_of<SLSTM, double>();

}  // namespace deeppcr::cell
