// Never called: without CUDA there is no GPU for the arrays to lie on.
#include "device/cuda.hpp"
#include "newton/fused_gpu.hpp"
#include "newton/overlap.hpp"

namespace deeppcr::newton {

template <class T>
Report evaluate_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, const Options&) {
    device::require_gpu();
    return {};
}
template <class T>
CellGradients<T> adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, View<const T>, const Options&) {
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

#define DEEPPCR_INSTANTIATE(T)                                                                              \
    template void gather_starts(View<const T>, View<const T>, index, View<T>, CUstream_st*);                \
    template void find_non_finite(View<const T>, unsigned long long*, CUstream_st*);                        \
    template Report evaluate_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, const Options&);              \
    template CellGradients<T> adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, View<const T>, \
                                             const Options&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton
