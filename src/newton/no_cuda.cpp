// Never called: without CUDA there is no GPU for the arrays to lie on.
#include "device/cuda.hpp"
#include "newton/fused_gpu.hpp"
#include "newton/newton_gpu.hpp"
#include "newton/overlap.hpp"
#include "newton/update_gpu.hpp"

namespace deeppcr::newton {

template <class T>
Report evaluate_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, const Options&) {
    device::require_gpu();
    return {};
}
template <class T>
Report adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, View<const T>, const CellGradientViews<T>&,
                      const Options&) {
    device::require_gpu();
    return {};
}

template <class T>
void enqueue_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, index*, const Options&) {
    device::require_gpu();
}
template <class T>
void enqueue_adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, const index*, View<const T>,
                            const CellGradientViews<T>&, const Options&) {
    device::require_gpu();
}

template <class T>
Report evaluate_newton_on_gpu(const Recurrence<T>&, View<T>, const Options&, double) {
    device::require_gpu();
    return {};
}
template <class T>
void gather_starts(View<const T>, View<const T>, index, View<T>, CUstream_st*) {
    device::require_gpu();
}
template <class T>
void find_non_finite(View<const T>, unsigned long long*, CUstream_st*) {
    device::require_gpu();
}

template <class T>
index test_residual_on_gpu(const Window<T>&, std::vector<Progress>&, Tolerance, CUstream_st*) {
    device::require_gpu();
    return 0;
}
template <class T>
index apply_update_on_gpu(const Window<T>&, const std::vector<Progress>&, CUstream_st*) {
    device::require_gpu();
    return 0;
}
template <class T>
void error_sources_on_gpu(View<const T>, View<const T>, index, index, std::span<const index>, View<T>, CUstream_st*) {
    device::require_gpu();
}
template <class T>
std::vector<double> largest_errors_on_gpu(View<const T>, std::span<const index>, CUstream_st*) {
    device::require_gpu();
    return {};
}
template <class T>
void repeat_on_gpu(View<const T>, View<T>, CUstream_st*) {
    device::require_gpu();
}
template <class T>
void fill_ones_on_gpu(T*, index, CUstream_st*) {
    device::require_gpu();
}

#define DEEPPCR_INSTANTIATE(T)                                                                                      \
    template Report evaluate_newton_on_gpu(const Recurrence<T>&, View<T>, const Options&, double);                  \
    template void gather_starts(View<const T>, View<const T>, index, View<T>, CUstream_st*);                        \
    template void find_non_finite(View<const T>, unsigned long long*, CUstream_st*);                                \
    template index test_residual_on_gpu(const Window<T>&, std::vector<Progress>&, Tolerance, CUstream_st*);         \
    template index apply_update_on_gpu(const Window<T>&, const std::vector<Progress>&, CUstream_st*);               \
    template void error_sources_on_gpu(View<const T>, View<const T>, index, index, std::span<const index>, View<T>, \
                                       CUstream_st*);                                                               \
    template std::vector<double> largest_errors_on_gpu(View<const T>, std::span<const index>, CUstream_st*);        \
    template void repeat_on_gpu(View<const T>, View<T>, CUstream_st*);                                              \
    template void fill_ones_on_gpu(T*, index, CUstream_st*);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE
#define DEEPPCR_INSTANTIATE(T)                                                                                        \
    template Report evaluate_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, const Options&);                        \
    template void enqueue_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, index*, const Options&);                   \
    template Report adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, View<const T>,                     \
                                   const CellGradientViews<T>&, const Options&);                                      \
    template void enqueue_adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, const index*, View<const T>, \
                                         const CellGradientViews<T>&, const Options&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton

namespace deeppcr {

template <class T>
struct EnqueuedEvaluation<T>::Implementation {};
template <class T>
EnqueuedEvaluation<T>::EnqueuedEvaluation(const Recurrence<T>&, View<std::type_identity_t<T>>, const Options&) {
    device::require_gpu();
}
template <class T>
EnqueuedEvaluation<T>::~EnqueuedEvaluation() = default;
template <class T>
void EnqueuedEvaluation<T>::enqueue() {}
template <class T>
Report EnqueuedEvaluation<T>::finish() {
    return {};
}
template class EnqueuedEvaluation<float>;
template class EnqueuedEvaluation<double>;

}  // namespace deeppcr
