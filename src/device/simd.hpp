// SIMD: which of the compiled instruction sets is used, and what becomes of subnormal numbers.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace deeppcr::device {

/// Applies DEEPPCR_SIMD, once; every function that dispatches through Highway calls it first.
void choose_simd_target();

/// While it lives, this thread takes subnormal numbers for 0, where the processor can. A decaying product otherwise
/// ends at the smallest of them, which rounding never lets go, and every operation with it takes about a hundred
/// cycles.
class SubnormalsAreZero {
public:
#if defined(__SSE2__)
    SubnormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | flush_results | flush_operands); }
    ~SubnormalsAreZero() { _mm_setcsr(before_); }
    SubnormalsAreZero(const SubnormalsAreZero&) = delete;
    SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

private:
    static constexpr unsigned flush_results = 1U << 15, flush_operands = 1U << 6;
    unsigned before_;
#endif
};

}  // namespace deeppcr::device
