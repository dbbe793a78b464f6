// The backends of the bidiagonal solvers: each method is declared here once and instantiated by every backend. Of an
// Execution, the number of threads (already resolved) and the stream count here.
#pragma once

#include <deeppcr/bidiagonal.hpp>

namespace deeppcr::reduce {

/// A bidiagonal system in the order in which it is solved: x_s = M_s x_{s-1} + b_s for s = 0 .. steps-1.
/// The transposed solve runs from the last step to the first: the same recurrence on views with reversed steps,
/// where M_s is the transpose of the stored block. Products of transposes are kept the way A is stored, too:
/// M_s M_r is held as (M_s M_r)^T = A_r A_s.
template <class T>
struct OrderedSystem {
    Jacobian<const T> factor;  ///< M; the first one is read only where `initial` is not empty
    View<const T> right_side;  ///< b
    View<const T> initial;     ///< x_{-1}; zero where empty
    View<T> solution;          ///< x; either b itself or apart from every input
    bool transposed = false;   ///< whether M_s is the transpose of what `factor` holds

    index steps() const { return solution.steps(); }
    index batch() const { return solution.batch(); }
    index width() const { return solution.width(); }
    index block() const { return factor.block(); }
    bool in_place() const { return right_side.data() == solution.data(); }
};

/// The transposed system, in the order in which it is solved: y_t = A_{t+1}^T y_{t+1} + b_t from the last step on.
template <class T>
OrderedSystem<T> reversed(const BidiagonalSystem<T>& system, const View<T>& solution) {
    const auto& [factor, right_side, initial] = system;
    const Shape& shape = solution.shape();
    return {{factor.at(shape.steps, 0), shape, factor.block(), -factor.step_stride(), factor.batch_stride()},
            {right_side.at(shape.steps - 1, 0), shape, -right_side.step_stride(), right_side.batch_stride()},
            {},
            {solution.at(shape.steps - 1, 0), shape, -solution.step_stride(), solution.batch_stride()},
            true};
}

/// Forward substitution.
template <Backend backend, class T>
void solve_sequential(const OrderedSystem<T>& system, const Execution& execution);

/// Parallel cyclic reduction, out of place: takes two copies of the blocks and of the right sides from `workspace`.
template <Backend backend, class T>
void solve_pcr(const OrderedSystem<T>& system, const Execution& execution, Workspace& workspace);

/// Chunk summaries, the states at the chunks' ends from the summaries, and the chunks again from those states.
/// Takes the summaries from `workspace`. chunk >= 1; of the cuda backend 0 too, where the shape and the GPU decide;
/// blocks of up to 4 always have chunks of their own there, and are solved in one launch. tensor_cores: of the cuda
/// backend.
template <Backend backend, class T>
void solve_scan(const OrderedSystem<T>& system, index chunk, TensorCores tensor_cores, const Execution& execution,
                Workspace& workspace);

/// x_end = product x_before + end: what steps amount to, as one. Each has one step, contiguous; the product is kept
/// the way the factors are stored.
template <class T>
struct LongStep {
    Jacobian<T> product;
    View<T> end;
};

/// The system as one long step; what `initial` holds counts for nothing. Contiguous sequences of a system may be
/// `result`'s one wide one. Processors only.
template <Backend backend, class T>
void summarise(const OrderedSystem<T>& system, const LongStep<T>& result, const Execution& execution,
               Workspace& workspace);

/// later = later after earlier; the product only where asked for. scratch: as large as a product. Processors only.
template <Backend backend, class T>
void compose(const LongStep<T>& earlier, const LongStep<T>& later, bool transposed, bool with_product, T* scratch,
             const Execution& execution);

/// product = A^T y for the one step of `subdiagonal`.
template <Backend backend, class T>
void multiply_transposed(const Jacobian<const T>& subdiagonal, const View<const T>& y, const View<T>& product,
                         const Execution& execution);

/// By the backend, method and chunk of `options`, which a caller has checked: `solve`, `summarise` and `compose`.
/// summarise and compose: float and double.
template <class T>
Reduction solve_ordered(const OrderedSystem<T>& system, const SolveOptions& options);
template <class T>
void summarise_ordered(const OrderedSystem<T>& system, const LongStep<T>& result, const SolveOptions& options);
template <class T>
void compose_ordered(const LongStep<T>& earlier, const LongStep<T>& later, bool transposed, bool with_product,
                     T* scratch, const Execution& execution);

}  // namespace deeppcr::reduce
