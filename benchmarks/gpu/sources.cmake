# Of gpu_benchmark, which is also compiled over the emulation (tests/).
set(gpu_benchmark_sources gpu_benchmark.cu first.cu solves.cu cells.cu chains.cu rows.cpp)
list(TRANSFORM gpu_benchmark_sources PREPEND "${CMAKE_CURRENT_LIST_DIR}/")
