// LibTorch's threads, and those of the BLAS that it has loaded.
#pragma once

namespace deeppcr::nn {

/// The BLAS of this process, where it is OpenBLAS: its functions, else null.
struct Blas {
    Blas();
    using Config = char*();
    using SetThreads = void(int);
    Config* config;
    SetThreads* set_threads;
};

/// So many threads for LibTorch, in the whole process. One where what it does is too small for more: its idle threads
/// spin on the processors that the core needs.
void limit_threads(int count);

}  // namespace deeppcr::nn
