// The built-in cells' kernels for GPUs: cells_cuda.cu, or no_cuda.cpp.
#pragma once

namespace deeppcr::cell {

/// With register_device_kernels; what is done once is not done again.
void register_built_in_cells();

}  // namespace deeppcr::cell
