// A core without CUDA has no kernels for GPUs. What is called nevertheless says that there is no GPU.
#include "device/cuda.hpp"
#include "recurrence/dense_cells_kernels.hpp"
#include "recurrence/dense_chain_kernels.hpp"
#include "recurrence/device_cells.hpp"
#include "recurrence/diagonal_gpu.hpp"
#include "recurrence/gather.hpp"

namespace deeppcr {

template <class T>
void recurrence::take_diagonal_on_gpu(const Jacobian<const T>&, const Jacobian<T>&, CUstream_st*) {
    device::require_gpu();
}
#define DEEPPCR_INSTANTIATE(T) \
    template void recurrence::take_diagonal_on_gpu(const Jacobian<const T>&, const Jacobian<T>&, CUstream_st*);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

namespace cell {

void register_built_in_cells() {}

template <class T>
void copy_on_gpu(View<const T>, View<T>, bool, CUstream_st*) {
    device::require_gpu();
}
template <class T>
void decode_on_gpu(const Kernels<T>&, View<const T>, View<const Arithmetic<T>>, View<Arithmetic<T>>, View<T>,
                   CUstream_st*) {
    device::require_gpu();
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

}  // namespace cell

template <class T>
void gather_on_gpu(View<const T>, std::span<const index>, View<T>, CUstream_st*) {
    device::require_gpu();
}

void numbers_on_gpu(std::span<const index>, index*, CUstream_st*) { device::require_gpu(); }

namespace dense_cell {

template <class T>
void run_chunks_on_gpu(const Cell<T>&, const Extent&, const Chunks<T>&) {
    device::require_gpu();
}

template <Backend B, class T>
void run(const Cell<T>&, const Extent&, const T*, T*) {
    device::require_gpu();
}
template <Backend B, class T>
void linearise(const Cell<T>&, const Extent&, const T*, T*, T*, T*) {
    device::require_gpu();
}
template <Backend B, class T>
void backward(const Cell<T>&, const Extent&, const T*, const T*, T*, T*, T*, T*) {
    device::require_gpu();
}

}  // namespace dense_cell

namespace chain {

template <Backend B, class T>
void run(const Network<T>&, const Extent&, const T*, T*, T*) {
    device::require_gpu();
}
template <class T>
void run_chunks_on_gpu(const Network<T>&, const Extent&, const Chunks<T>&) {
    device::require_gpu();
}
template <Backend B, class T>
void linearise(const Network<T>&, const Extent&, const T*, T*, T*, T*) {
    device::require_gpu();
}
template <Backend B, class T>
void parameter_gradients(const Network<T>&, const Extent&, const T*, const T*, T*, T*) {
    device::require_gpu();
}
template <Backend B, class T>
void run_backward(const Network<T>&, const Extent&, const T*, const T*, const T*, T*, T*, T*, T*) {
    device::require_gpu();
}

}  // namespace chain

#define DEEPPCR_INSTANTIATE(T)                                                                                         \
    template void dense_cell::run_chunks_on_gpu(const dense_cell::Cell<T>&, const dense_cell::Extent&,                 \
                                                const Chunks<T>&);                                                     \
    template void gather_on_gpu(View<const T>, std::span<const index>, View<T>, CUstream_st*);                         \
    template void dense_cell::run<Backend::cuda, T>(const dense_cell::Cell<T>&, const dense_cell::Extent&, const T*,   \
                                                    T*);                                                               \
    template void dense_cell::linearise<Backend::cuda, T>(const dense_cell::Cell<T>&, const dense_cell::Extent&,       \
                                                          const T*, T*, T*, T*);                                       \
    template void dense_cell::backward<Backend::cuda, T>(const dense_cell::Cell<T>&, const dense_cell::Extent&,        \
                                                         const T*, const T*, T*, T*, T*, T*);                          \
    template void chain::run<Backend::cuda, T>(const chain::Network<T>&, const chain::Extent&, const T*, T*, T*);      \
    template void chain::run_chunks_on_gpu(const chain::Network<T>&, const chain::Extent&, const Chunks<T>&);          \
    template void chain::linearise<Backend::cuda, T>(const chain::Network<T>&, const chain::Extent&, const T*, T*, T*, \
                                                     T*);                                                              \
    template void chain::parameter_gradients<Backend::cuda, T>(const chain::Network<T>&, const chain::Extent&,         \
                                                               const T*, const T*, T*, T*);                            \
    template void chain::run_backward<Backend::cuda, T>(const chain::Network<T>&, const chain::Extent&, const T*,      \
                                                        const T*, const T*, T*, T*, T*, T*)
DEEPPCR_INSTANTIATE(float);
DEEPPCR_INSTANTIATE(double);
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr
