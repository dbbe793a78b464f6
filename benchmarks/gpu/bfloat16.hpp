// Whether `solve` and the cells are there for bfloat16: this file goes when they are.
#pragma once

namespace deeppcr::benchmark {

constexpr bool bfloat16_runs_on_gpu = false;

}  // namespace deeppcr::benchmark
