// A core without CUDA: there are no GPUs.
#include "device/cuda.hpp"

namespace deeppcr {

std::vector<std::string> cuda_devices() { return {}; }
std::string cuda_problem() { return "this build of deeppcr is without CUDA"; }

namespace device {

void require_gpu() { throw NoDevice("there is no GPU to use: " + cuda_problem()); }
Device current_gpu() {
    require_gpu();
    return {};
}
int multiprocessors() { return 0; }
index shared_bytes_per_block() { return 0; }
void require_on_gpu(const std::string&, const void*) { require_gpu(); }
bool is_on_gpu(const void*) { return false; }
std::shared_ptr<void> allocate_on_gpu(index, Device) {
    require_gpu();
    return {};
}
std::shared_ptr<void> allocate_in_stream(index, CUstream_st*) {
    require_gpu();
    return {};
}
void copy_by_gpu(void*, const void*, index) { require_gpu(); }
void fill_zeros_on_gpu(void*, index, Device) { require_gpu(); }
void copy_to_gpu(void*, const void*, index, CUstream_st*) { require_gpu(); }
void copy_from_gpu(void*, const void*, index, CUstream_st*) { require_gpu(); }
void copy_on_gpu(void*, const void*, index, CUstream_st*) { require_gpu(); }
void fill_bytes(void*, int, index, CUstream_st*) { require_gpu(); }
index available_on_gpu() { return 0; }
void synchronise(CUstream_st*) {}
bool is_captured(CUstream_st*) { return false; }
Mark::Mark() { require_gpu(); }
void Mark::set(CUstream_st*) {}
void Mark::wait_in(CUstream_st*) const {}
struct Letter::Paper {};
Letter::Letter() { require_gpu(); }
void* Letter::paper() { return nullptr; }
void Letter::send(CUstream_st*) {}
const void* Letter::receive() { return nullptr; }
void Letter::fetch(void*, const void*, index, CUstream_st*) {}

}  // namespace device
}  // namespace deeppcr
