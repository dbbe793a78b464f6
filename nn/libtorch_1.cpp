// LibTorch 1.13: Debian's, which is built without CUDA.
#include "nn/libtorch.hpp"

namespace deeppcr::nn {

CUstream_st* current_cuda_stream(c10::Device device) {
    throw NoDevice("tensors on " + device.str() + " need LibTorch 2, this is 1.13");
}

index available_cuda_memory(c10::Device) { return 0; }

}  // namespace deeppcr::nn
