// A core without CUDA has no kernels for GPUs.
#include "recurrence/device_cells.hpp"

namespace deeppcr::cell {

void register_built_in_cells() {}

}  // namespace deeppcr::cell
