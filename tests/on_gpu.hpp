// The tests' own arrays for Backend::cuda: copied to the GPU, there and back, gaps included.
#pragma once

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include <deeppcr/bidiagonal.hpp>

namespace deeppcr {

/// cuda where there is a GPU, or an emulated one.
inline std::vector<Backend> every_backend() {
    std::vector<Backend> all{Backend::reference, Backend::cpu};
    if (cuda_problem().empty()) all.push_back(Backend::cuda);
    return all;
}

/// Copies of stretches of main memory. Arrays that overlap are one stretch, so that what is solved in place still is.
class OnGpu {
public:
    /// Of `steps` x `batch` rows of `width` numbers.
    template <class T>
    void bring(const T* data, index steps, index batch, index width, index step_stride, index batch_stride) {
        if (data == nullptr || steps * batch * width == 0) return;
        const index far_step = (steps - 1) * step_stride, far_batch = (batch - 1) * batch_stride;
        const auto* const begin =
            reinterpret_cast<const char*>(data + std::min<index>(0, far_step) + std::min<index>(0, far_batch));
        const auto* const end =
            reinterpret_cast<const char*>(data + std::max<index>(0, far_step) + std::max<index>(0, far_batch) + width);
        Stretch stretch{begin, end, {}};
        std::erase_if(stretches_, [&](const Stretch& other) {
            if (other.end <= stretch.begin || stretch.end <= other.begin) return false;
            stretch.begin = std::min(stretch.begin, other.begin);
            stretch.end = std::max(stretch.end, other.end);
            return true;
        });
        const index bytes = stretch.end - stretch.begin;
        stretch.copy = detail::allocate(bytes, Device::cuda());
        detail::copy(stretch.copy.get(), stretch.begin, bytes);
        stretches_.push_back(std::move(stretch));
    }
    template <class T>
    void bring(const View<T>& view) {
        bring(view.data(), view.steps(), view.batch(), view.width(), view.step_stride(), view.batch_stride());
    }
    template <class T>
    void bring(const Jacobian<T>& jacobian) {
        bring(jacobian.data(), jacobian.steps(), jacobian.batch(), jacobian.width() * jacobian.block(),
              jacobian.step_stride(), jacobian.batch_stride());
    }

    /// Where `data` is on the GPU.
    template <class T>
    T* there(T* data) const {
        for (const Stretch& stretch : stretches_)
            if (reinterpret_cast<const char*>(data) >= stretch.begin &&
                reinterpret_cast<const char*>(data) < stretch.end)
                return reinterpret_cast<T*>(static_cast<char*>(stretch.copy.get()) +
                                            (reinterpret_cast<const char*>(data) - stretch.begin));
        return data;
    }
    template <class T>
    View<T> there(const View<T>& view) const {
        return {there(view.data()), view.shape(), view.step_stride(), view.batch_stride()};
    }
    template <class T>
    Jacobian<T> there(const Jacobian<T>& jacobian) const {
        return {there(jacobian.data()), jacobian.states(), jacobian.block(), jacobian.step_stride(),
                jacobian.batch_stride()};
    }

    /// Copies the stretch that `data` lies in back.
    template <class T>
    void back(T* data) const {
        for (const Stretch& stretch : stretches_)
            if (reinterpret_cast<char*>(data) >= stretch.begin && reinterpret_cast<char*>(data) < stretch.end)
                detail::copy(const_cast<char*>(stretch.begin), stretch.copy.get(), stretch.end - stretch.begin);
    }

private:
    struct Stretch {
        const char *begin, *end;
        std::shared_ptr<void> copy;
    };
    std::vector<Stretch> stretches_;
};

/// `solve` or `solve_transposed` with arrays in main memory, whatever the backend.
template <class T>
Reduction solve_anywhere(const BidiagonalSystem<T>& system, View<std::type_identity_t<T>> solution,
                         const SolveOptions& options, bool transposed) {
    const auto run = [&](const BidiagonalSystem<T>& s, const View<T>& x) {
        return transposed ? solve_transposed(s, x, options) : solve(s, x, options);
    };
    if (options.execution.backend != Backend::cuda) return run(system, solution);
    OnGpu copies;
    copies.bring(system.subdiagonal);
    copies.bring(system.right_side);
    copies.bring(system.initial);
    copies.bring(solution);
    const Reduction used =
        run({copies.there(system.subdiagonal), copies.there(system.right_side), copies.there(system.initial)},
            copies.there(solution));
    copies.back(solution.data());
    return used;
}

template <class T>
void multiply_transposed_anywhere(Jacobian<const T> subdiagonal, View<const T> y, View<T> product,
                                  const Execution& execution) {
    if (execution.backend != Backend::cuda) return multiply_transposed<T>(subdiagonal, y, product, execution);
    OnGpu copies;
    copies.bring(subdiagonal);
    copies.bring(y);
    copies.bring(product);
    multiply_transposed<T>(copies.there(subdiagonal), copies.there(y), copies.there(product), execution);
    copies.back(product.data());
}

}  // namespace deeppcr
