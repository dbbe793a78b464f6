// Bidiagonal systems across ranks: what a rank sends is the summary of its steps, however many they are.
#include "reduce/across_ranks.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

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
    const index width = state_.count();
    summary_ = long_step(workspace.take<T>(width * (block + 1)), width, block);
    other_ = long_step(workspace.take<T>(width * (block + 1)), width, block);
    product_ = workspace.take<T>(width * block);
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
    compose_ordered(earlier, later, system_.transposed, with_product, product_, options_.execution);
}

// Transposed, what comes from the part before is added to the right side of the first row, y_0 = b_0 + before; the
// other rows follow from that one; and what is handed on is M y_end, with the block of the array's first step. Three
// long steps.
template <class T>
void Part<T>::summarise() {
    const index width = state_.count(), block = summary_.product.block();
    const auto copy_row = [&](View<const T> from, const View<T>& to) {
        for (index j = 0; j < state_.batch; ++j) std::copy_n(from.at(0, j), state_.width, to.data() + j * state_.width);
    };
    std::fill_n(summary_.product.data(), width * block, T(0));
    std::fill_n(summary_.end.data(), width, T(0));
    if (idle_) return;
    const index steps = system_.steps();
    if (begins_) {
        used_ = solve_ordered(system_, options_);
        copy_row(system_.solution.steps(steps - 1, steps), summary_.end);
    } else if (!system_.transposed) {
        return summarise_ordered(system_, summary_, options_);
    } else if (steps == 1) {
        copy_row(system_.right_side, summary_.end);
    } else {
        summarise_ordered(rest<T>(system_, {}), summary_, options_);
        copy_row(system_.right_side.steps(0, 1), other_.end);
        compose(other_, summary_, false);
    }
    if (!system_.transposed) return;
    // The factor of an ordered row is that of the row before it in the array: the array's first one comes last.
    for (index j = 0; j < state_.batch; ++j)
        std::copy_n(system_.factor.at(steps, j), state_.width * block,
                    other_.product.data() + j * state_.width * block);
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
        return solve_ordered(part, options_);
    }
    for (index j = 0; j < state_.batch; ++j) {
        const T *const right_side = system_.right_side.at(0, j), *const handed = before().at(0, j);
        T* const row = system_.solution.at(0, j);
        for (index k = 0; k < state_.width; ++k) row[k] = right_side[k] + handed[k];
    }
    if (system_.steps() == 1) return used_;
    return solve_ordered(rest<T>(system_, system_.solution.steps(0, 1)), options_);
}

template class Part<float>;
template class Part<double>;

}  // namespace deeppcr::reduce
