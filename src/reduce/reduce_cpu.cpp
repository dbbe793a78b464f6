// The bidiagonal solvers for processors: how the work is shared among threads. The arithmetic is in kernels_cpu.cpp.
#include <hwy/cache_control.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "device/threads.hpp"
#include "reduce/kernels_cpu.hpp"
#include "reduce/reduce.hpp"

namespace deeppcr::reduce {
namespace {

/// A diagonal solution of this size bypasses the caches on its way to memory.
constexpr index large_bytes = index(16) << 20;

/// How many elements ahead to fetch: the same place of a later row, which the processor does not foresee. Long rows it
/// foresees better by itself.
template <class T>
index distance_ahead(index row, index stride) {
    constexpr index distance = 8192 / sizeof(T);
    return row >= distance ? 0 : (1 + distance / row) * stride;
}

/// Steps [first, last), sequences [sequence, end_sequence) and elements [element, end_element) of a system. A part that
/// does not begin with the first step goes on from the solution before it, unless `before` is set by the caller.
template <class T>
Strip<T> strip(const OrderedSystem<T>& system, index first, index last, index sequence, index end_sequence,
               index element, index end_element) {
    const auto& [factor, right_side, initial, solution, transposed] = system;
    const index bytes = system.steps() * system.batch() * system.width() * index(sizeof(T));
    return {.factor = factor.at(first, sequence) + element * system.block(),
            .right_side = right_side.at(first, sequence) + element,
            .solution = solution.at(first, sequence) + element,
            .before = first > 0         ? solution.at(first - 1, sequence) + element
                      : initial.empty() ? nullptr
                                        : initial.at(0, sequence) + element,
            .factor_step = factor.step_stride(),
            .right_side_step = right_side.step_stride(),
            .solution_step = solution.step_stride(),
            .factor_batch = factor.batch_stride(),
            .right_side_batch = right_side.batch_stride(),
            .solution_batch = solution.batch_stride(),
            .before_batch = first > 0 ? solution.batch_stride() : initial.batch_stride(),
            .steps = last - first,
            .batch = end_sequence - sequence,
            .width = end_element - element,
            .block = system.block(),
            .transposed = transposed,
            .bypass_caches = system.block() == 1 && !system.in_place() && bytes >= large_bytes,
            .factor_ahead = 0,
            .right_side_ahead = 0};
}

/// A contiguous strip of one step: `width` elements in blocks.
template <class T>
Strip<T> one_step(const T* factor, const T* before, const T* right_side, T* solution, index width, index block,
                  bool transposed) {
    Strip<T> result{};
    result.factor = factor;
    result.before = before;
    result.right_side = right_side;
    result.solution = solution;
    result.steps = result.batch = 1;
    result.width = width;
    result.block = block;
    result.transposed = transposed;
    return result;
}

}  // namespace

// Threads take neighbouring blocks (or cache lines of channels): each block's arithmetic is the same wherever it runs.
template <Backend backend, class T>
void solve_sequential(const OrderedSystem<T>& system, const Execution& execution) {
    const index unit = system.block() == 1 ? 64 / index(sizeof(T)) : system.block();
    const index units = (system.width() + unit - 1) / unit;
    const Kernels<T>& kernel = kernels<T>();
    // Enough sequences at a time that their steps need not wait for each other; all, where they lie side by side.
    const bool steps_first = std::abs(system.factor.batch_stride()) < std::abs(system.factor.step_stride());
    const index side_by_side = steps_first ? system.batch() : std::max<index>(1, 4 / units);
    device::parallel_ranges(execution.threads, system.batch() * units, 1, [&](index first, index last) {
        // Whole sequences together, and parts of a sequence at either end.
        while (first < last) {
            const index sequence = first / units, begin = first % units;
            const bool whole = begin == 0 && last - first >= units;
            const index sequences = whole ? std::min((last - first) / units, side_by_side) : 1;
            const index end = whole ? units : std::min(units, begin + last - first);
            auto part = strip(system, 0, system.steps(), sequence, sequence + sequences, begin * unit,
                              std::min(end * unit, system.width()));
            part.factor_ahead = distance_ahead<T>(part.width * part.block, part.factor_step);
            part.right_side_ahead = distance_ahead<T>(part.width, part.right_side_step);
            kernel.substitute(part);
            first += whole ? sequences * units : end - begin;
        }
    });
}

// As in the reference, on rows that lie together: with `row` elements in a step, element e meets element
// e - distance * row, so that one pass is one long step, shared by the threads.
template <Backend backend, class T>
void solve_pcr(const OrderedSystem<T>& system, const Execution& execution, Workspace& workspace) {
    const int threads = execution.threads;
    const index steps = system.steps(), batch = system.batch(), width = system.width(), block = system.block();
    const index row = batch * width;
    const Kernels<T>& kernel = kernels<T>();
    const Workspace::Scope scope(workspace);
    T* state = workspace.take<T>(steps * row);
    T* next_state = workspace.take<T>(steps * row);
    T* product = workspace.take<T>(steps * row * block);
    T* next_product = workspace.take<T>(steps * row * block);

    device::parallel_ranges(threads, steps, 1, [&](index first, index last) {
        for (index step = first; step < last; ++step)
            for (index sequence = 0; sequence < batch; ++sequence) {
                T* target = state + step * row + sequence * width;
                if (step == 0) {
                    auto begin = strip(system, 0, 1, sequence, sequence + 1, 0, width);
                    begin.solution = target;
                    begin.bypass_caches = false;
                    kernel.substitute(begin);
                    continue;
                }
                std::copy_n(system.right_side.at(step, sequence), width, target);
                std::copy_n(system.factor.at(step, sequence), width * block,
                            product + (step * row + sequence * width) * block);
            }
    });
    for (index distance = 1; distance < steps; distance *= 2) {
        device::parallel_ranges(threads, steps * row / block, 1, [&](index first, index last) {
            const index back = distance * row, begin = first * block, end = last * block;
            const index moved = std::clamp(back, begin, end), multiplied = std::clamp(2 * back, begin, end);
            std::copy(state + begin, state + moved, next_state + begin);
            if (moved < end)
                kernel.substitute(one_step<T>(product + moved * block, state + moved - back, state + moved,
                                              next_state + moved, end - moved, block, system.transposed));
            if (multiplied == end) return;
            const T* late = product + multiplied * block;
            const T* early = late - back * block;
            kernel.multiply(system.transposed ? early : late, system.transposed ? late : early,
                            (end - multiplied) / block, block, next_product + multiplied * block);
        });
        std::swap(state, next_state);
        std::swap(product, next_product);
    }
    device::parallel_ranges(threads, steps, 1, [&](index first, index last) {
        for (index step = first; step < last; ++step)
            for (index sequence = 0; sequence < batch; ++sequence)
                std::copy_n(state + step * row + sequence * width, width, system.solution.at(step, sequence));
    });
}

// Threads take the chunks in order. A chunk's summary needs no other chunk; the state at its end is then one
// multiplication from the state at the end of the chunk before, which some thread has taken earlier and is about to
// pass on; so the chunks' ends follow each other quickly (by substitution: on few threads there are few chunks at a
// time, and reducing their summaries in parallel would only add products), and each thread replays its chunk while
// it is still in its cache:
//
//     thread 0   summary 1 . replay 1 ..... summary 3 . replay 3 .....
//     thread 1       summary 2 . replay 2 ..... summary 4 . replay 4 .....        . waits for the end before it
//
// Memory is read once. The chunks alone decide on the bits, not which thread takes them.
template <Backend backend, class T>
void solve_scan(const OrderedSystem<T>& system, index chunk, TensorCores /*tensor_cores*/, const Execution& execution,
                Workspace& workspace) {
    const int threads = execution.threads;
    const index steps = system.steps(), batch = system.batch(), width = system.width(), block = system.block();
    const index chunks = (steps + chunk - 1) / chunk;
    const Kernels<T>& kernel = kernels<T>();
    const Workspace::Scope scope(workspace);
    const auto end = workspace.take_states<T>({chunks, batch, width});
    const auto product = workspace.take_jacobian<T>({threads, 1, width}, block);
    const auto scratch = workspace.take_states<T>({threads, 1, block * (block + 1)});
    std::vector<std::atomic<index>> ends_known(static_cast<std::size_t>(batch));
    std::atomic<index> next{0};
    const bool fetches = block == 1 && batch == 1;

    device::run_together(int(std::min<index>(threads, chunks * batch)), [&](int thread) {
        for (index item = next++, following; item < chunks * batch; item = following) {
            following = next++;
            const index part = item / batch, sequence = item % batch;
            auto here =
                strip(system, part * chunk, std::min((part + 1) * chunk, steps), sequence, sequence + 1, 0, width);
            std::atomic<index>& known = ends_known[std::size_t(sequence)];
            if (part == 0) {
                kernel.replay(here);
                std::copy_n(system.solution.at(here.steps - 1, sequence), width, end.at(0, sequence));
                known.store(1, std::memory_order_release);
                continue;
            }
            // Memory must not rest while a chunk is replayed from the cache: the next one is fetched on the way.
            const index ahead = fetches && following < chunks ? (following - part) * chunk : 0;
            const bool passes_on = part + 1 < chunks;
            here.factor_ahead = ahead * here.factor_step;
            if (passes_on) kernel.summarise(here, product.at(thread, 0), end.at(part, sequence), scratch.at(thread, 0));
            for (int spins = 0; known.load(std::memory_order_acquire) < part; ++spins)
                spins < 4000 ? hwy::Pause() : std::this_thread::yield();
            here.before = end.at(part - 1, sequence);
            if (passes_on) {
                kernel.substitute(one_step<T>(product.at(thread, 0), here.before, end.at(part, sequence),
                                              end.at(part, sequence), width, block, system.transposed));
                known.store(part + 1, std::memory_order_release);
            }
            here.factor_ahead = 0;
            here.right_side_ahead = ahead * here.right_side_step;
            kernel.replay(here);
        }
    });
}

// Pieces of the sequences, enough to keep the threads busy, and then these in order.
template <Backend backend, class T>
void summarise(const OrderedSystem<T>& system, const LongStep<T>& result, const Execution& execution,
               Workspace& workspace) {
    const index steps = system.steps(), batch = system.batch(), width = system.width(), block = system.block();
    const index pieces = batch >= execution.threads ? 1 : std::min<index>(steps, execution.threads);
    const Kernels<T>& kernel = kernels<T>();
    const Workspace::Scope scope(workspace);
    const auto end = workspace.take_states<T>({pieces, batch, width});
    const auto product = workspace.take_jacobian<T>({pieces, batch, width}, block);
    const auto scratch = workspace.take_states<T>({pieces, batch, block * (block + 1)});
    device::parallel_ranges(execution.threads, pieces * batch, 1, [&](index first, index last) {
        for (index item = first; item < last; ++item) {
            const index piece = item / batch, sequence = item % batch;
            const auto here =
                strip(system, steps * piece / pieces, steps * (piece + 1) / pieces, sequence, sequence + 1, 0, width);
            kernel.summarise(here, product.at(piece, sequence), end.at(piece, sequence), scratch.at(piece, sequence));
        }
    });
    const auto piece_at = [&](index piece) {
        const Shape state{1, 1, batch * width};
        return LongStep<T>{Jacobian<T>(product.at(piece, 0), state, block), View<T>(end.at(piece, 0), state)};
    };
    T* const other = workspace.take<T>(batch * width * block);
    for (index piece = 1; piece < pieces; ++piece)
        compose<backend, T>(piece_at(piece - 1), piece_at(piece), system.transposed, true, other, execution);
    std::copy_n(product.at(pieces - 1, 0), batch * width * block, result.product.data());
    std::copy_n(end.at(pieces - 1, 0), batch * width, result.end.data());
}

template <Backend backend, class T>
void compose(const LongStep<T>& earlier, const LongStep<T>& later, bool transposed, bool with_product, T* scratch,
             const Execution& execution) {
    const Kernels<T>& kernel = kernels<T>();
    const index block = later.product.block(), width = later.end.width();
    // Below this a second thread costs more than it brings.
    const index grain = std::max<index>(64 / index(sizeof(T)), (index(1) << 15) / (block * block * block));
    device::parallel_ranges(execution.threads, width / block, grain, [&](index first, index last) {
        const index begin = first * block, count = (last - first) * block;
        T *const product = later.product.data() + begin * block, *const end = later.end.data() + begin;
        kernel.substitute(one_step<T>(product, earlier.end.data() + begin, end, end, count, block, transposed));
        if (!with_product) return;
        const T* const before = earlier.product.data() + begin * block;
        T* const multiplied = scratch + begin * block;
        kernel.multiply(transposed ? before : product, transposed ? product : before, last - first, block, multiplied);
        std::copy_n(multiplied, count * block, product);
    });
}

template <Backend backend, class T>
void multiply_transposed(const Jacobian<const T>& subdiagonal, const View<const T>& y, const View<T>& product,
                         const Execution& execution) {
    const Kernels<T>& kernel = kernels<T>();
    device::parallel_ranges(execution.threads, y.batch(), 1, [&](index first, index last) {
        for (index sequence = first; sequence < last; ++sequence) {
            T* result = product.at(0, sequence);
            std::fill_n(result, y.width(), T(0));
            kernel.substitute(one_step<T>(subdiagonal.at(0, sequence), y.at(0, sequence), result, result, y.width(),
                                          subdiagonal.block(), true));
        }
    });
}

#define DEEPPCR_INSTANTIATE(T)                                                                                         \
    template void solve_sequential<Backend::cpu, T>(const OrderedSystem<T>&, const Execution&);                        \
    template void solve_pcr<Backend::cpu, T>(const OrderedSystem<T>&, const Execution&, Workspace&);                   \
    template void solve_scan<Backend::cpu, T>(const OrderedSystem<T>&, index, TensorCores, const Execution&,           \
                                              Workspace&);                                                             \
    template void summarise<Backend::cpu, T>(const OrderedSystem<T>&, const LongStep<T>&, const Execution&,            \
                                             Workspace&);                                                              \
    template void compose<Backend::cpu, T>(const LongStep<T>&, const LongStep<T>&, bool, bool, T*, const Execution&);  \
    template void multiply_transposed<Backend::cpu, T>(const Jacobian<const T>&, const View<const T>&, const View<T>&, \
                                                       const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::reduce
