// The register of the Cells' kernels for GPUs.
#include "recurrence/device_cells.hpp"

#include <map>
#include <mutex>
#include <typeindex>

#include <deeppcr/cell_device.hpp>

namespace deeppcr::cell {
namespace {

template <class T>
struct Register {
    std::mutex mutex;
    std::map<std::type_index, DeviceKernels<T>> kernels;
};
template <class T>
Register<T>& all() {
    static Register<T> one;
    return one;
}

}  // namespace

template <class T>
void register_device_kernels(const std::type_info& cell, const DeviceKernels<T>& kernels) {
    const std::lock_guard lock(all<T>().mutex);
    all<T>().kernels.insert_or_assign(cell, kernels);
}

template <class T>
const DeviceKernels<T>* find_device_kernels(const std::type_info& cell) {
    static std::once_flag once;
    std::call_once(once, register_built_in_cells);
    const std::lock_guard lock(all<T>().mutex);
    const auto found = all<T>().kernels.find(cell);
    return found == all<T>().kernels.end() ? nullptr : &found->second;
}

#define DEEPPCR_INSTANTIATE(T)                                                             \
    template void register_device_kernels(const std::type_info&, const DeviceKernels<T>&); \
    template const DeviceKernels<T>* find_device_kernels(const std::type_info&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::cell
