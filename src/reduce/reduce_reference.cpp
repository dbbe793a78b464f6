// The bidiagonal solvers as plain loops: one sequence, one block, one row after the other, to be checked by hand.
#include "reduce/reduce.hpp"

namespace deeppcr::reduce {
namespace {

/// M(row, column) of the diagonal block that holds `row`; `column` counts within the block.
template <class T>
T entry(const T* blocks, index block, index row, index column, bool transposed) {
    const T* first = blocks + row / block * block * block;
    return transposed ? first[column * block + row % block] : first[row % block * block + column];
}

/// result = M state + right_side, for one step of one sequence; `result` may be `right_side`.
template <class T>
void advance(const T* blocks, index width, index block, bool transposed, const T* state, const T* right_side,
             T* result) {
    for (index row = 0; row < width; ++row) {
        T sum = right_side[row];
        for (index column = 0; column < block; ++column)
            sum += entry(blocks, block, row, column, transposed) * state[row / block * block + column];
        result[row] = sum;
    }
}

/// result = left right, block by block. The blocks of M_s M_r, the way they are stored, are A_s A_r, or A_r A_s where
/// transposed.
template <class T>
void multiply(const T* left, const T* right, index width, index block, T* result) {
    for (index row = 0; row < width; ++row) {
        const T* below = right + row / block * block * block;
        for (index column = 0; column < block; ++column) {
            T sum = 0;
            for (index inner = 0; inner < block; ++inner)
                sum += left[row * block + inner] * below[inner * block + column];
            result[row * block + column] = sum;
        }
    }
}

/// The first state, which needs no M where there is no initial state.
template <class T>
void begin(const OrderedSystem<T>& system, index sequence, T* state) {
    const T* right_side = system.right_side.at(0, sequence);
    if (system.initial.empty())
        std::copy_n(right_side, system.width(), state);
    else
        advance(system.factor.at(0, sequence), system.width(), system.block(), system.transposed,
                system.initial.at(0, sequence), right_side, state);
}

/// Steps [first, last) of a sequence as one long step: x_end = product x_before + end, where `end` is what they make of
/// a zero state. scratch: width * block elements.
template <class T>
void summarise_steps(const OrderedSystem<T>& system, index sequence, index first, index last, T* product, T* end,
                     T* scratch) {
    const index width = system.width(), block = system.block();
    std::copy_n(system.right_side.at(first, sequence), width, end);
    std::copy_n(system.factor.at(first, sequence), width * block, product);
    for (index step = first + 1; step < last; ++step) {
        const T* now = system.factor.at(step, sequence);
        std::copy_n(end, width, scratch);
        advance<T>(now, width, block, system.transposed, scratch, system.right_side.at(step, sequence), end);
        multiply<T>(system.transposed ? product : now, system.transposed ? now : product, width, block, scratch);
        std::copy_n(scratch, width * block, product);
    }
}

}  // namespace

template <Backend backend, class T>
void solve_sequential(const OrderedSystem<T>& system, const Execution& /*execution*/) {
    const auto& [factor, right_side, initial, solution, transposed] = system;
    for (index sequence = 0; sequence < system.batch(); ++sequence) {
        begin(system, sequence, solution.at(0, sequence));
        for (index step = 1; step < system.steps(); ++step)
            advance(factor.at(step, sequence), system.width(), system.block(), transposed,
                    solution.at(step - 1, sequence), right_side.at(step, sequence), solution.at(step, sequence));
    }
}

// Algorithm 1 of arXiv 2309.16318. Before the pass with distance i, row s holds x_s = M_s x_{s-i} + b_s for s >= i, and
// the solution for s < i. Substituting row s-i into row s doubles the distance:
//
//     i = 1     x0   x1<-x0  x2<-x1  x3<-x2  x4<-x3        b_s <- b_s + M_s b_{s-i}
//     i = 2     x0   x1      x2<-x0  x3<-x1  x4<-x2        M_s <- M_s M_{s-i}
//     i = 4     x0   x1      x2      x3      x4<-x0
//
// Row s needs its product only while s >= 2i: M_0 never enters a product.
template <Backend backend, class T>
void solve_pcr(const OrderedSystem<T>& system, const Execution& /*execution*/, Workspace& workspace) {
    const index steps = system.steps(), batch = system.batch(), width = system.width(), block = system.block();
    const Workspace::Scope scope(workspace);
    auto state = workspace.take_states<T>({steps, batch, width});
    auto next_state = workspace.take_states<T>({steps, batch, width});
    auto product = workspace.take_jacobian<T>({steps, batch, width}, block);
    auto next_product = workspace.take_jacobian<T>({steps, batch, width}, block);
    for (index sequence = 0; sequence < batch; ++sequence) {
        begin(system, sequence, state.at(0, sequence));
        for (index step = 1; step < steps; ++step) {
            std::copy_n(system.right_side.at(step, sequence), width, state.at(step, sequence));
            std::copy_n(system.factor.at(step, sequence), width * block, product.at(step, sequence));
        }
    }
    for (index distance = 1; distance < steps; distance *= 2) {
        for (index step = 0; step < steps; ++step) {
            for (index sequence = 0; sequence < batch; ++sequence) {
                if (step < distance) {
                    std::copy_n(state.at(step, sequence), width, next_state.at(step, sequence));
                    continue;
                }
                advance<T>(product.at(step, sequence), width, block, system.transposed,
                           state.at(step - distance, sequence), state.at(step, sequence),
                           next_state.at(step, sequence));
                if (step < 2 * distance) continue;
                const T* late = product.at(step, sequence);
                const T* early = product.at(step - distance, sequence);
                multiply(system.transposed ? early : late, system.transposed ? late : early, width, block,
                         next_product.at(step, sequence));
            }
        }
        std::swap(state, next_state);
        std::swap(product, next_product);
    }
    for (index step = 0; step < steps; ++step)
        for (index sequence = 0; sequence < batch; ++sequence)
            std::copy_n(state.at(step, sequence), width, system.solution.at(step, sequence));
}

template <Backend backend, class T>
void solve_scan(const OrderedSystem<T>& system, index chunk, TensorCores /*tensor_cores*/, const Execution& execution,
                Workspace& workspace) {
    const auto& [factor, right_side, initial, solution, transposed] = system;
    const index steps = system.steps(), batch = system.batch(), width = system.width(), block = system.block();
    const index chunks = (steps + chunk - 1) / chunk;
    const Workspace::Scope scope(workspace);
    const auto product = workspace.take_jacobian<T>({chunks, batch, width}, block);
    const auto end = workspace.take_states<T>({chunks, batch, width});
    T* scratch = workspace.take<T>(width * block);

    // The first chunk is solved, the others become one long step each.
    for (index sequence = 0; sequence < batch; ++sequence) {
        T* state = end.at(0, sequence);
        begin(system, sequence, state);
        for (index step = 1; step < std::min(chunk, steps); ++step) {
            std::copy_n(state, width, scratch);
            advance<T>(factor.at(step, sequence), width, block, transposed, scratch, right_side.at(step, sequence),
                       state);
        }
        for (index part = 1; part < chunks; ++part)
            summarise_steps(system, sequence, part * chunk, std::min((part + 1) * chunk, steps),
                            product.at(part, sequence), end.at(part, sequence), scratch);
    }
    solve_pcr<backend, T>({product, end, {}, end, transposed}, execution, workspace);

    // Replay every chunk from the state before it.
    for (index sequence = 0; sequence < batch; ++sequence) {
        begin(system, sequence, solution.at(0, sequence));
        for (index step = 1; step < steps; ++step)
            advance<T>(factor.at(step, sequence), width, block, transposed,
                       step % chunk == 0 ? end.at(step / chunk - 1, sequence) : solution.at(step - 1, sequence),
                       right_side.at(step, sequence), solution.at(step, sequence));
    }
}

template <Backend backend, class T>
void summarise(const OrderedSystem<T>& system, const LongStep<T>& result, const Execution& /*execution*/,
               Workspace& workspace) {
    const index width = system.width(), block = system.block();
    const Workspace::Scope scope(workspace);
    T* const scratch = workspace.take<T>(width * block);
    for (index sequence = 0; sequence < system.batch(); ++sequence)
        summarise_steps(system, sequence, 0, system.steps(), result.product.data() + sequence * width * block,
                        result.end.data() + sequence * width, scratch);
}

template <Backend backend, class T>
void compose(const LongStep<T>& earlier, const LongStep<T>& later, bool transposed, bool with_product, T* scratch,
             const Execution& /*execution*/) {
    const index width = later.end.width(), block = later.product.block();
    T* const product = later.product.data();
    advance<T>(product, width, block, transposed, earlier.end.data(), later.end.data(), later.end.data());
    if (!with_product) return;
    const T* const before = earlier.product.data();
    multiply<T>(transposed ? before : product, transposed ? product : before, width, block, scratch);
    std::copy_n(scratch, width * block, product);
}

template <Backend backend, class T>
void multiply_transposed(const Jacobian<const T>& subdiagonal, const View<const T>& y, const View<T>& product,
                         const Execution& /*execution*/) {
    for (index sequence = 0; sequence < y.batch(); ++sequence) {
        std::fill_n(product.at(0, sequence), y.width(), T(0));
        advance<T>(subdiagonal.at(0, sequence), y.width(), subdiagonal.block(), true, y.at(0, sequence),
                   product.at(0, sequence), product.at(0, sequence));
    }
}

#define DEEPPCR_INSTANTIATE(T)                                                                                     \
    template void solve_sequential<Backend::reference, T>(const OrderedSystem<T>&, const Execution&);              \
    template void solve_pcr<Backend::reference, T>(const OrderedSystem<T>&, const Execution&, Workspace&);         \
    template void solve_scan<Backend::reference, T>(const OrderedSystem<T>&, index, TensorCores, const Execution&, \
                                                    Workspace&);                                                   \
    template void summarise<Backend::reference, T>(const OrderedSystem<T>&, const LongStep<T>&, const Execution&,  \
                                                   Workspace&);                                                    \
    template void compose<Backend::reference, T>(const LongStep<T>&, const LongStep<T>&, bool, bool, T*,           \
                                                 const Execution&);                                                \
    template void multiply_transposed<Backend::reference, T>(const Jacobian<const T>&, const View<const T>&,       \
                                                             const View<T>&, const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::reduce
