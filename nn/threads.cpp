#include "nn/threads.hpp"

#include <ATen/Parallel.h>
#include <dlfcn.h>

namespace deeppcr::nn {

Blas::Blas()
    : config(reinterpret_cast<Config*>(dlsym(RTLD_DEFAULT, "openblas_get_config"))),
      set_threads(reinterpret_cast<SetThreads*>(dlsym(RTLD_DEFAULT, "openblas_set_num_threads"))) {}

void limit_threads(int count) {
    at::set_num_threads(count);
    if (const Blas blas; blas.set_threads) blas.set_threads(count);
}

}  // namespace deeppcr::nn
