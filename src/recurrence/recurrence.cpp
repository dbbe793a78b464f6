#include <deeppcr/recurrence.hpp>

#include <algorithm>
#include <optional>
#include <string>

#include "device/cuda.hpp"
#include "recurrence/diagonal_gpu.hpp"

namespace deeppcr {
namespace {

/// `linearise_diagonal` holds at most this many bytes of blocks at a time.
constexpr index block_bytes = index(1) << 20, block_bytes_on_gpu = index(1) << 28;

}  // namespace

template <class T>
Recurrence<T>::Recurrence(const Shape& shape, index block) : shape_(shape), block_(block == -1 ? shape.width : block) {
    if (shape.steps < 0 || shape.batch < 0 || shape.width < 1)
        throw InvalidArgument("shape", "steps >= 0, batch >= 0 and width >= 1", to_string(shape));
    (void)shape.count();
    if (block_ < 1 || shape.width % block_ != 0)
        throw InvalidArgument("block", "-1 or a divisor of the width " + std::to_string(shape.width),
                              std::to_string(block));
}

template <class T>
void Recurrence<T>::initial(const Section& section, View<T> state) const {
    for (index j = 0; j < section.batch(); ++j) {
        if (section.execution.backend == Backend::cuda)
            device::fill_bytes(state.at(0, j), 0, shape_.width * index(sizeof(T)), section.execution.stream);
        else
            std::fill_n(state.at(0, j), shape_.width, T(0));
    }
}

template <class T>
void Recurrence<T>::linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                                       Jacobian<T> diagonal) const {
    const index batch = section.batch(), width = shape_.width;
    const index step_bytes = std::max<index>(1, batch * width * block_ * index(sizeof(T)));
    const bool on_gpu = section.execution.backend == Backend::cuda;
    const index at_once = std::clamp<index>((on_gpu ? block_bytes_on_gpu : block_bytes) / step_bytes, 1,
                                            std::max<index>(1, section.steps()));
    std::optional<Workspace> own;
    Workspace& workspace = section.workspace != nullptr ? *section.workspace : own.emplace(section.execution);
    const Workspace::Scope scope(workspace);
    T* const memory = workspace.take<T>(Shape{at_once, batch * width, block_}.count());
    for (index first = 0; first < section.steps(); first += at_once) {
        const index last = std::min(first + at_once, section.steps());
        const Jacobian<T> blocks(memory, {last - first, batch, width}, block_);
        const Section part{section.first + first, section.first + last, section.sequences, section.execution,
                           section.workspace};
        linearise(part, before.steps(first, last), after.steps(first, last), blocks);
        if (on_gpu) {
            recurrence::take_diagonal_on_gpu<T>(blocks, diagonal.steps(first, last), section.execution.stream);
            continue;
        }
        for (index i = first; i < last; ++i)
            for (index j = 0; j < batch; ++j)
                for (index row = 0; row < width; ++row) diagonal.at(i, j)[row] = blocks(i - first, j, row, row);
    }
}

template <class T>
void Recurrence<T>::run(const Section& section, View<const T> state, View<T> trajectory) const {
    for (index i = 0; i < section.steps(); ++i) {
        const Section one{section.first + i, section.first + i + 1, section.sequences, section.execution};
        step(one, i == 0 ? state : View<const T>(trajectory.steps(i - 1, i)), trajectory.steps(i, i + 1));
    }
}

template <class T>
bool Recurrence<T>::run_chunks(const Section&, const Chunks<T>&) const {
    return false;
}

template class Recurrence<float>;
template class Recurrence<double>;
template class Recurrence<bfloat16>;
template class Recurrence<float16>;

}  // namespace deeppcr
