// Bidiagonal systems across ranks: what a rank sends is the summary of its steps, however many they are.
#include "reduce/across_ranks.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "device/cuda.hpp"
#include "device/states.hpp"

namespace deeppcr::reduce {
namespace {

/// A long step in memory of its own, where one message holds it: the product's blocks, then the end.
template <class T>
LongStep<T> long_step(T* memory, index width, index block) {
    const Shape state{1, 1, width};
    return {Jacobian<T>(memory, state, block), View<T>(memory + width * block, state)};
}

/// Steps [1, steps) of a system, from the state before them.
template <class T>
OrderedSystem<T> rest(const OrderedSystem<T>& system, View<const T> initial) {
    const index steps = system.steps();
    return {system.factor.steps(1, steps), system.right_side.steps(1, steps), initial, system.solution.steps(1, steps),
            system.transposed};
}

}  // namespace

template <class T>
Part<T>::Part(const Shape& states, index block, const SolveOptions& options, Workspace& workspace)
    : begins_(true), idle_(true), options_(options), group_(*options.group), state_{1, states.batch, states.width} {
    options_.workspace = &workspace;
    options_.group = nullptr;
    const index width = state_.count(), message = width * (block + 1);
    T* memory = nullptr;
    if (on_gpu()) {
        memory_ = Buffer<T>({1, 1, 3 * message});
        memory = memory_.data();
    } else {
        memory = workspace.take<T>(3 * message - width);
    }
    summary_ = long_step(memory, width, block);
    other_ = long_step(memory + message, width, block);
    product_ = memory + 2 * message;
    row_memory_ = product_ + width * block;
}

template <class T>
Part<T>::Part(const OrderedSystem<T>& system, bool begins, const SolveOptions& options, Workspace& workspace)
    : Part(system.solution.shape(), system.block(), options, workspace) {
    system_ = system;
    begins_ = begins;
    idle_ = false;
}

template <class T>
void Part<T>::compose(const LongStep<T>& earlier, const LongStep<T>& later, bool with_product) const {
    const Execution here = on_gpu() ? Execution() : options_.execution;
    compose_ordered(earlier, later, system_.transposed, with_product, product_, here);
}

template <class T>
void Part<T>::summarise(const OrderedSystem<T>& system, const LongStep<T>& result) {
    if (on_gpu())
        summarise_on_gpu(system, result);
    else
        summarise_ordered(system, result, options_);
}

// From zero the steps give the end; without right sides, from the unit vectors, the columns of the product: one of
// every block at a time.
template <class T>
void Part<T>::summarise_on_gpu(const OrderedSystem<T>& system, const LongStep<T>& result) {
    const index steps = system.steps(), width = state_.count(), block = result.product.block();
    const View<T> solved = solved_.steps(0, steps), last = solved.steps(steps - 1, steps), row(row_memory_, state_);
    solve_ordered<T>({system.factor, system.right_side, {}, solved, system.transposed}, options_);
    device::fetch<T>(last, end_of(result), options_.execution);
    for (index column = 0; column < block; ++column) {
        for (index i = 0; i < width; ++i) row.data()[i] = T(i % block == column ? 1 : 0);
        device::put<T>(row, row_, options_.execution);
        device::fill_bytes(solved.data(), 0, solved.shape().count() * index(sizeof(T)), options_.execution.stream);
        solve_ordered<T>({system.factor, solved, row_, solved, system.transposed}, options_);
        device::fetch<T>(last, row, options_.execution);
        // Kept as the factors are: transposed, a column is a row.
        for (index i = 0; i < width; ++i)
            result.product
                .data()[system.transposed ? (i - i % block + column) * block + i % block : i * block + column] =
                row.data()[i];
    }
}

// Transposed, what comes from the part before is added to the right side of the first row, y_0 = b_0 + before; the
// other rows follow from that one; and what is handed on is M y_end, with the block of the array's first step. Three
// long steps.
template <class T>
void Part<T>::summarise() {
    const index width = state_.count(), block = summary_.product.block();
    std::fill_n(summary_.product.data(), width * block, T(0));
    std::fill_n(summary_.end.data(), width, T(0));
    if (idle_) return;
    const index steps = system_.steps();
    if (on_gpu()) {
        row_ = options_.workspace->template take_states<T>(state_);
        if (!begins_) solved_ = options_.workspace->template take_states<T>(system_.solution.shape());
    }
    if (begins_) {
        used_ = solve_ordered(system_, options_);
        device::fetch<T>(system_.solution.steps(steps - 1, steps), end_of(summary_), options_.execution);
    } else if (!system_.transposed) {
        return summarise(system_, summary_);
    } else if (steps == 1) {
        device::fetch<T>(system_.right_side, end_of(summary_), options_.execution);
    } else {
        summarise(rest<T>(system_, {}), summary_);
        device::fetch<T>(system_.right_side.steps(0, 1), end_of(other_), options_.execution);
        compose(other_, summary_, false);
    }
    if (!system_.transposed) return;
    // The factor of an ordered row is that of the row before it in the array: the array's first one comes last.
    const Shape row{1, state_.batch, state_.width * block};
    const Jacobian<const T> factor = system_.factor.steps(steps, steps + 1);
    device::fetch<T>(View<const T>(factor.data(), row, 0, factor.batch_stride()), View<T>(other_.product.data(), row),
                     options_.execution);
    std::fill_n(other_.end.data(), width, T(0));
    compose(summary_, other_, !begins_ && steps > 1);
    std::swap(summary_, other_);
    if (begins_) std::fill_n(summary_.product.data(), width * block, T(0));
}

template <class T>
void Part<T>::scan() {
    const index width = state_.count(), block = summary_.product.block();
    const std::span<T> message(summary_.product.data(), std::size_t(width * (block + 1)));
    group_.exclusive_scan(
        std::as_writable_bytes(message),
        [&](std::span<const std::byte> earlier, std::span<std::byte> later, bool from_first) {
            std::memcpy(other_.product.data(), earlier.data(), earlier.size());
            compose(other_, long_step(reinterpret_cast<T*>(later.data()), width, block), !from_first);
        },
        system_.transposed ? Group::Direction::from_last_rank : Group::Direction::from_first_rank);
}

template <class T>
Reduction Part<T>::solve() {
    if (begins_) return used_;
    if (!system_.transposed) {
        OrderedSystem<T> part = system_;
        part.initial = before();
        if (on_gpu()) {
            device::put<T>(before(), row_, options_.execution);
            part.initial = row_;
        }
        return solve_ordered(part, options_);
    }
    device::fetch<T>(system_.right_side.steps(0, 1), end_of(other_), options_.execution);
    for (index i = 0; i < state_.count(); ++i) other_.end.data()[i] += before().data()[i];
    device::put<T>(end_of(other_), system_.solution.steps(0, 1), options_.execution);
    if (system_.steps() == 1) return used_;
    return solve_ordered(rest<T>(system_, system_.solution.steps(0, 1)), options_);
}

template class Part<float>;
template class Part<double>;

}  // namespace deeppcr::reduce
