// SIMD dispatch: which of the compiled instruction sets is used.
#pragma once

namespace deeppcr::device {

/// Applies DEEPPCR_SIMD, once; every function that dispatches through Highway calls it first.
void choose_simd_target();

}  // namespace deeppcr::device
