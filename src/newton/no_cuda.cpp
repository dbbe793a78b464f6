// Never called: without CUDA there is no GPU for the arrays to lie on.
#include "device/cuda.hpp"
#include "newton/fused_gpu.hpp"

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

#define DEEPPCR_INSTANTIATE(T)                                                                    \
    template Report evaluate_on_gpu(const ChannelwiseRecurrence<T>&, View<T>, const Options&);    \
    template Report adjoint_on_gpu(const ChannelwiseRecurrence<T>&, View<const T>, View<const T>, \
                                   const CellGradientViews<T>&, const Options&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton
