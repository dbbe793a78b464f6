// The built-in cells on GPUs, one step of a cell, and copies of states.
#include <deeppcr/cell.cuh>
#include <deeppcr/cells.hpp>

#include "device/cuda.hpp"
#include "recurrence/device_cells.hpp"

namespace deeppcr::cell {
namespace {

/// to = from, or to += from, of [steps, batch, width].
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    copy_rows(const T* from, index from_step, index from_batch, index batch, index width, index count, bool adding,
              T* to, index to_step, index to_batch) {
    const index i = cuda::this_thread();
    if (i >= count) return;
    const index step = i / (batch * width), sequence = i / width % batch, k = i % width;
    const T value = from[step * from_step + sequence * from_batch + k];
    T& target = to[step * to_step + sequence * to_batch + k];
    target = adding ? cuda::narrow<T>(cuda::widen(target) + cuda::widen(value)) : value;
}

}  // namespace

void register_built_in_cells() {
    static const RegisteredOnGpu<ParaGRU> para_gru;
    static const RegisteredOnGpu<ParaLSTM> para_lstm;
    static const RegisteredOnGpu<DiagonalElman> diagonal_elman;
    static const RegisteredOnGpu<SLSTM> slstm;
}

template <class T>
void copy_on_gpu(View<const T> from, View<T> to, bool adding, CUstream_st* stream) {
    const index count = from.shape().count();
    if (count == 0) return;
    cuda::launch(cuda::one_each(count, stream), copy_rows<T>, from.data(), from.step_stride(), from.batch_stride(),
                 from.batch(), from.width(), count, adding, to.data(), to.step_stride(), to.batch_stride());
}

template <class T>
void decode_on_gpu(const Kernels<T>& kernels, View<const T> inputs, View<const Arithmetic<T>> parameters,
                   View<Arithmetic<T>> state, View<T> output, CUstream_st* stream) {
    const DeviceKernels<T>& device_kernels = device_kernels_of(kernels);
    device::require_on_gpu("inputs", inputs.data());
    device::require_on_gpu("parameters", parameters.data());
    device::require_on_gpu("state", state.data());
    if (output.data() != nullptr) device::require_on_gpu("output", output.data());
    DeviceChunks<T> all;
    all.inputs = inputs.data();
    all.input_step = inputs.step_stride();
    all.input_batch = inputs.batch_stride();
    all.parameters = parameters.data();
    all.steps = all.length = all.count = 1;
    all.batch = all.part_count = inputs.batch();
    all.channels = inputs.width() / kernels.inputs;
    all.groups = (all.channels + device_kernels.channels_per_group - 1) / device_kernels.channels_per_group;
    all.multiprocessors = device::multiprocessors();
    all.trajectory = output.data();
    all.trajectory_step = output.step_stride();
    all.trajectory_batch = output.batch_stride();
    all.starts = all.ends = state.data();
    device_kernels.advance(all, stream);
}

#define DEEPPCR_INSTANTIATE(T)                                                                                    \
    template void copy_on_gpu(View<const T>, View<T>, bool, CUstream_st*);                                        \
    template void decode_on_gpu(const Kernels<T>&, View<const T>, View<const Arithmetic<T>>, View<Arithmetic<T>>, \
                                View<T>, CUstream_st*);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::cell
