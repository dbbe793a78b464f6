// The arguments of what enqueue.hpp enqueues.
#include <deeppcr/enqueue.hpp>

#include <string>

#include "device/cuda.hpp"
#include "newton/fused.hpp"
#include "newton/fused_gpu.hpp"
#include "newton/options.hpp"
#include "recurrence/arguments.hpp"

namespace deeppcr {
namespace {

void check(const Options& options, const index* status) {
    newton::require_cuda(options);
    newton::check_values(options);
    newton::require_alone(options);
    if (options.method == Method::newton)
        throw InvalidArgument("options.method", newton::fused_methods, to_string(options.method));
    if (options.on_failure != OnFailure::finish)
        throw InvalidArgument("options.on_failure", "finish, as nobody waits for the outcome",
                              options.on_failure == OnFailure::report ? "report" : "raise");
    if (status == nullptr) throw InvalidArgument("status", "a number on the GPU", "a null pointer");
    device::require_on_gpu("status", status);
}

}  // namespace

template <class T>
void enqueue(const ChannelwiseRecurrence<T>& recurrence, View<std::type_identity_t<T>> trajectory, index* status,
             const Options& options) {
    check(options, status);
    require_shape("trajectory", trajectory, recurrence.shape());
    if (trajectory.empty())
        device::fill_bytes(status, 0, index(sizeof *status), options.execution.stream);
    else
        newton::enqueue_on_gpu(recurrence, trajectory, status, options);
}

template <class T>
void enqueue_adjoint(const ChannelwiseRecurrence<T>& recurrence, View<const std::type_identity_t<T>> trajectory,
                     const index* status, View<const std::type_identity_t<T>> output_gradient,
                     const CellGradientViews<std::type_identity_t<T>>& gradients, const Options& options) {
    check(options, status);
    require_shape("trajectory", trajectory, recurrence.shape());
    require_shape("output_gradient", output_gradient, recurrence.shape());
    require_shape("gradients.inputs", gradients.inputs, recurrence.inputs().shape());
    require_contiguous("gradients.parameters", gradients.parameters, recurrence.parameters().shape());
    require_shape("gradients.initial", gradients.initial,
                  {1, index(recurrence.parts().size()), recurrence.shape().width});
    if (trajectory.empty())
        newton::clear_gradients(gradients, options.execution);
    else
        newton::enqueue_adjoint_on_gpu(recurrence, trajectory, status, output_gradient, gradients, options);
}

static_assert(int(Status::converged) == 0, "what an empty trajectory is");

#define DEEPPCR_INSTANTIATE(T)                                                                                 \
    template void enqueue(const ChannelwiseRecurrence<T>&, View<T>, index*, const Options&);                   \
    template void enqueue_adjoint(const ChannelwiseRecurrence<T>&, View<const T>, const index*, View<const T>, \
                                  const CellGradientViews<T>&, const Options&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr
