// The bidiagonal solvers of a core without CUDA: never called, as there is no GPU whose memory a system could lie in.
#include "device/cuda.hpp"
#include "reduce/reduce.hpp"

namespace deeppcr::reduce {

template <Backend backend, class T>
void solve_sequential(const OrderedSystem<T>&, const Execution&) {
    device::require_gpu();
}
template <Backend backend, class T>
void solve_pcr(const OrderedSystem<T>&, const Execution&, Workspace&) {
    device::require_gpu();
}
template <Backend backend, class T>
void solve_scan(const OrderedSystem<T>&, index, TensorCores, const Execution&, Workspace&) {
    device::require_gpu();
}
template <Backend backend, class T>
void multiply_transposed(const Jacobian<const T>&, const View<const T>&, const View<T>&, const Execution&) {
    device::require_gpu();
}

#define DEEPPCR_INSTANTIATE(T)                                                                                \
    template void solve_sequential<Backend::cuda, T>(const OrderedSystem<T>&, const Execution&);              \
    template void solve_pcr<Backend::cuda, T>(const OrderedSystem<T>&, const Execution&, Workspace&);         \
    template void solve_scan<Backend::cuda, T>(const OrderedSystem<T>&, index, TensorCores, const Execution&, \
                                               Workspace&);                                                   \
    template void multiply_transposed<Backend::cuda, T>(const Jacobian<const T>&, const View<const T>&,       \
                                                        const View<T>&, const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::reduce
