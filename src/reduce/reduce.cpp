// Solving bidiagonal systems: arguments are checked, the method and its chunk are chosen, the backend does the rest.
#include "reduce/reduce.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <optional>

#include "device/cuda.hpp"
#include "device/threads.hpp"
#include "reduce/across_ranks.hpp"

namespace deeppcr {
namespace {

using reduce::OrderedSystem;

/// Elements of an array that lie `step`, `batch` and 1 apart, `steps` x `batch` x `width` of them.
struct Extent {
    const void* data;
    index element_bytes, steps, batch, width, step_stride, batch_stride;

    index lowest() const {
        return std::min<index>(0, (steps - 1) * step_stride) + std::min<index>(0, (batch - 1) * batch_stride);
    }
    index highest() const {
        return std::max<index>(0, (steps - 1) * step_stride) + std::max<index>(0, (batch - 1) * batch_stride) + width;
    }
    const char* begin() const { return static_cast<const char*>(data) + lowest() * element_bytes; }
    const char* end() const { return static_cast<const char*>(data) + highest() * element_bytes; }
};

template <class T>
Extent extent(const View<T>& view) {
    return {view.data(), sizeof(T), view.steps(), view.batch(), view.width(), view.step_stride(), view.batch_stride()};
}
template <class T>
Extent extent(const Jacobian<T>& jacobian) {
    return {jacobian.data(),
            sizeof(T),
            jacobian.steps(),
            jacobian.batch(),
            jacobian.width() * jacobian.block(),
            jacobian.step_stride(),
            jacobian.batch_stride()};
}

/// Whether two arrays share an element: exact where their strides are equal (slices of one array), otherwise whether
/// their ranges of addresses meet.
bool overlap(const Extent& a, const Extent& b) {
    if (a.end() <= b.begin() || b.end() <= a.begin()) return false;
    const index bytes = static_cast<const char*>(b.data) - static_cast<const char*>(a.data);
    if (a.step_stride != b.step_stride || a.batch_stride != b.batch_stride || a.batch_stride <= 0 ||
        bytes % a.element_bytes != 0)
        return true;
    // Element (i, j, k) of a is element (i - di, j - dj, k - dk) of b: is there such a difference within both shapes?
    const index offset = bytes / a.element_bytes;
    for (index steps = 1 - b.steps; steps < a.steps; ++steps) {
        const index rest = offset - steps * a.step_stride;
        const index below = rest >= 0 ? rest / a.batch_stride : -((-rest + a.batch_stride - 1) / a.batch_stride);
        for (index sequences = below; sequences <= below + 1; ++sequences) {
            const index element = rest - sequences * a.batch_stride;
            if (sequences > -b.batch && sequences < a.batch && element > -b.width && element < a.width) return true;
        }
    }
    return false;
}

/// Whether no element of a view lies where another one does.
bool distinct(const Extent& a) {
    index inner = std::abs(a.step_stride), inner_count = a.steps;
    index outer = std::abs(a.batch_stride), outer_count = a.batch;
    if (inner > outer || inner_count <= 1) {
        std::swap(inner, outer);
        std::swap(inner_count, outer_count);
    }
    if (inner_count <= 1) inner = 0;
    return (inner_count <= 1 || inner >= a.width) && (outer_count <= 1 || outer >= (inner_count - 1) * inner + a.width);
}

void require_shape(const std::string& name, const Shape& expected, const std::string& of, const Shape& actual) {
    if (expected != actual)
        throw InvalidArgument(name, "shape " + to_string(expected) + " to match " + of, "shape " + to_string(actual));
}

template <class Array>
void require_data(const std::string& name, const Array& array) {
    if (array.data() == nullptr) throw InvalidArgument(name, "data", "a null pointer");
}

void require_apart(const std::string& name, const Extent& output, const std::string& other, const Extent& input) {
    if (overlap(output, input)) throw InvalidArgument(name, "memory apart from " + other, "memory that overlaps it");
}

void require_distinct(const std::string& name, const Extent& output) {
    if (!distinct(output))
        throw InvalidArgument(name, "strides that give every element a place of its own",
                              "strides " + std::to_string(output.step_stride) + " (steps) and " +
                                  std::to_string(output.batch_stride) + " (sequences) for width " +
                                  std::to_string(output.width));
}

template <class T>
void require_block(const std::string& name, const Jacobian<const T>& jacobian) {
    const index block = jacobian.block(), width = jacobian.width();
    if (block < 0 || (block == 0 && width != 0) || (block != 0 && width % block != 0))
        throw InvalidArgument(name, "a block size that divides the width " + std::to_string(width),
                              "block " + std::to_string(block));
}

/// Numbers of 16 bits are for GPUs.
template <class T>
void require_backend(const std::string& name, Backend backend) {
    if constexpr (is_stored_in_16_bits<T>)
        if (backend != Backend::cuda)
            throw InvalidArgument(name, "Backend::cuda, which alone computes with numbers of 16 bits",
                                  backend == Backend::cpu ? "Backend::cpu" : "Backend::reference");
}

/// Checks everything that a solve is given. False where there is nothing to solve.
template <class T>
bool check(const BidiagonalSystem<T>& system, const View<T>& solution, const SolveOptions& options) {
    const auto& [subdiagonal, right_side, initial] = system;
    const Shape& shape = subdiagonal.states();
    require_backend<T>("options.execution.backend", options.execution.backend);
    if (options.chunk < 0) throw InvalidArgument("options.chunk", "0 or more", std::to_string(options.chunk));
    if (options.tensor_cores < TensorCores::none || options.tensor_cores > TensorCores::tf32)
        throw InvalidArgument("options.tensor_cores", "one of TensorCores", std::to_string(int(options.tensor_cores)));
    const index count = shape.count();
    require_block("system.subdiagonal", subdiagonal);
    require_shape("system.right_side", shape, "system.subdiagonal", right_side.shape());
    require_shape("solution", shape, "system.subdiagonal", solution.shape());
    if (initial.data() != nullptr)
        require_shape("system.initial", {1, shape.batch, shape.width}, "system.subdiagonal", initial.shape());
    if (count == 0) return false;

    require_data("system.subdiagonal", subdiagonal);
    require_data("system.right_side", right_side);
    require_data("solution", solution);
    if (options.execution.backend == Backend::cuda) {
        device::require_gpu();
        device::require_on_gpu("system.subdiagonal", subdiagonal.data());
        device::require_on_gpu("system.right_side", right_side.data());
        device::require_on_gpu("solution", solution.data());
        if (!initial.empty()) device::require_on_gpu("system.initial", initial.data());
    }
    require_distinct("solution", extent(solution));
    require_apart("solution", extent(solution), "system.subdiagonal", extent(subdiagonal));
    if (!initial.empty()) require_apart("solution", extent(solution), "system.initial", extent(initial));
    const bool in_place = solution.data() == right_side.data() &&
                          (shape.steps == 1 || solution.step_stride() == right_side.step_stride()) &&
                          (shape.batch == 1 || solution.batch_stride() == right_side.batch_stride());
    if (!in_place)
        require_apart("solution", extent(solution), "system.right_side (or to be the same view)", extent(right_side));
    return true;
}

/// Bytes that `method` takes from the workspace; saturates where they exceed the address space.
template <class T>
index workspace_bytes(const OrderedSystem<T>& system, Reduction method, index chunk) {
    if (method == Reduction::sequential) return 0;
    const index rows = method == Reduction::pcr ? system.steps() : (system.steps() + chunk - 1) / chunk;
    // Two copies of the blocks and of the states; the reference's scan reduces its summaries by PCR: three of each.
    const index copies = method == Reduction::pcr ? 2 : 3;
    index elements = 0;
    if (__builtin_mul_overflow(rows * system.batch() * system.width(), (system.block() + 1) * copies, &elements) ||
        __builtin_mul_overflow(elements, index(sizeof(T)), &elements))
        return std::numeric_limits<index>::max();
    return elements;
}

/// The same system with as few sequences as possible: those that lie side by side in every array are one wide one.
template <class T>
OrderedSystem<T> merged(const OrderedSystem<T>& system) {
    const auto& [factor, right_side, initial, solution, transposed] = system;
    const index width = system.width(), block = system.block();
    if (system.batch() == 1 || factor.batch_stride() != width * block || right_side.batch_stride() != width ||
        solution.batch_stride() != width || (!initial.empty() && initial.batch_stride() != width))
        return system;
    const Shape shape{system.steps(), 1, system.batch() * width};
    return {{factor.data(), shape, block, factor.step_stride(), 0},
            {right_side.data(), shape, right_side.step_stride(), 0},
            initial.empty() ? View<const T>() : View<const T>(initial.data(), {1, 1, shape.width}),
            {solution.data(), shape, solution.step_stride(), 0},
            transposed};
}

/// Threads that have enough to do to be worth waking. Counts states: the elements of broadcast factors may exceed 63
/// bits.
int useful_threads(const Shape& states, index block, int threads) {
    const index states_per_thread = std::max<index>(1, (index(1) << 15) / block);
    return int(std::min<index>(threads, 1 + states.count() / states_per_thread));
}

/// The method for a merged system. Diagonal: sequential where the rows are long enough for each thread to run along a
/// part of them; a scan where they are short. Blocks: sequential, unless so many threads would be idle that
/// they make good for the products that a scan needs, about `block` times the work of substitution.
template <class T>
Reduction choose_method(const OrderedSystem<T>& system, int threads) {
    const index block = system.block();
    if (block == 1) {
        constexpr index line = 64 / sizeof(T), long_row = 16 * line;
        const bool sequences_fill_threads = system.batch() >= threads;
        const index row = sequences_fill_threads ? system.width() : system.batch() * system.width() / threads;
        return row >= (sequences_fill_threads ? line : long_row) ? Reduction::sequential : Reduction::scan;
    }
    const index chains = system.batch() * system.width() / block;
    return threads / std::min<index>(chains, threads) > block ? Reduction::scan : Reduction::sequential;
}

/// Steps per chunk of a merged system: one chunk where the sequences alone fill the threads; else a few chunks per
/// thread, so that none waits long for the others, and diagonal ones small enough to stay in the cache between their
/// summary and their replay.
template <class T>
index choose_chunk(const OrderedSystem<T>& system, int threads) {
    if (system.batch() >= threads) return system.steps();
    const index chunk = (system.steps() + 4 * threads - 1) / (4 * threads);
    if (system.block() > 1) return chunk;
    constexpr index cached_elements = (index(256) << 10) / (2 * sizeof(T));
    constexpr index line = 64 / sizeof(T);  // chunks that begin with a cache line, where the arrays do
    return std::clamp<index>(cached_elements / system.width() / line * line, 1, chunk);
}

template <Backend backend, class T>
Reduction run_method(Reduction method, const OrderedSystem<T>& system, index chunk, TensorCores tensor_cores,
                     const Execution& execution, Workspace& workspace) {
    switch (method) {
        case Reduction::sequential:
            reduce::solve_sequential<backend>(system, execution);
            return method;
        case Reduction::pcr:
            reduce::solve_pcr<backend>(system, execution, workspace);
            return method;
        case Reduction::scan:
            reduce::solve_scan<backend>(system, chunk, tensor_cores, execution, workspace);
            return method;
        case Reduction::automatic:
            break;
    }
    throw InvalidArgument("options.method", "a Reduction", std::to_string(int(method)));
}

template <Backend backend, class T>
Reduction run(const OrderedSystem<T>& given, const SolveOptions& options) {
    const OrderedSystem<T> system = merged(given);
    const int threads = useful_threads({system.steps(), system.batch(), system.width()}, system.block(),
                                       device::thread_count(options.execution));
    const Reduction method = options.method == Reduction::automatic ? choose_method(system, threads) : options.method;
    const index chunk = options.chunk > 0 ? std::min(options.chunk, system.steps()) : choose_chunk(system, threads);

    const index bytes = workspace_bytes(system, method, chunk);
    const index kept = options.workspace ? options.workspace->peak_bytes() - options.workspace->used_bytes() : 0;
    if (bytes > kept && bytes - kept > available_memory())
        throw OutOfMemory("solve: this method needs " + std::to_string(bytes) + " bytes of workspace, and " +
                          std::to_string(available_memory()) + " are available");
    Workspace local;
    Workspace& workspace = options.workspace ? *options.workspace : local;

    const Execution execution{.backend = backend, .threads = threads};
    return run_method<backend>(method, system, chunk, options.tensor_cores, execution, workspace);
}

/// Blocks of up to 4: a thread for each row where the rows lie side by side and alone keep the memory of every
/// multiprocessor busy, else the scan, which moves as many bytes. Larger ones: the scan moves the blocks twice, and a
/// product costs `block` times a step's operations, while the steps of substitution wait for each other. The smaller
/// estimate counts: nanoseconds of a Hopper GPU, of whose multiprocessors each moves 30 bytes and does 100 of the
/// products' multiplications in one.
template <class T>
Reduction choose_method_on_gpu(const OrderedSystem<T>& system) {
    const double block = double(system.block()), steps = double(system.steps());
    const double multiprocessors = device::multiprocessors();
    const double chains = double(system.batch()) * double(system.width()) / block;
    if (block <= 4) {
        constexpr index few_steps = 8, warp = 32, rows_that_fill = 480;
        const bool side_by_side = system.width() >= warp && block == 1;
        const bool fill = chains >= double(rows_that_fill) * multiprocessors;
        return system.steps() <= few_steps || (side_by_side && fill) ? Reduction::sequential : Reduction::scan;
    }
    const double moved = chains / multiprocessors * block * block * sizeof(T) / 30;
    const double multiplied = chains / multiprocessors * block * block * block / 100;
    const double latency = 150 * (1 + block / 16), launches = 40'000;
    const double sequential = steps * std::max(latency, moved), scan = launches + steps * (2 * moved + multiplied);
    return scan < sequential ? Reduction::scan : Reduction::sequential;
}

/// Arrays on a GPU. Only enqueues; allocates where no workspace is given, or the first time.
template <class T>
Reduction run_on_gpu(const OrderedSystem<T>& given, const SolveOptions& options) {
    if (options.workspace != nullptr && options.workspace->device() != device::current_gpu())
        throw InvalidArgument("options.workspace", "a workspace on the current GPU", "one elsewhere");
    const OrderedSystem<T> system = merged(given);
    const Reduction method = options.method == Reduction::automatic ? choose_method_on_gpu(system) : options.method;
    Workspace local(options.execution);
    Workspace& workspace = options.workspace ? *options.workspace : local;
    std::optional<Workspace::Use> use;
    if (options.workspace != nullptr) use.emplace(workspace, options.execution);
    return run_method<Backend::cuda>(method, system, options.chunk, options.tensor_cores, options.execution, workspace);
}

/// Of an empty system.
Reduction nothing_to_solve(const SolveOptions& options) {
    return options.method == Reduction::automatic ? Reduction::sequential : options.method;
}

/// The threads that a summary is worth.
template <class T>
Execution summary_execution(const OrderedSystem<T>& merged_system, const Execution& execution) {
    return {.backend = execution.backend,
            .threads =
                useful_threads(merged_system.solution.shape(), merged_system.block(), device::thread_count(execution))};
}

}  // namespace

namespace reduce {

template <class T>
Reduction solve_ordered(const OrderedSystem<T>& system, const SolveOptions& options) {
    if (options.execution.backend == Backend::cuda) return run_on_gpu(system, options);
    if constexpr (!is_stored_in_16_bits<T>) {
        if (options.execution.backend == Backend::reference) return run<Backend::reference>(system, options);
        if (options.execution.backend == Backend::cpu) return run<Backend::cpu>(system, options);
    }
    throw InvalidArgument("options.execution.backend", "a Backend", std::to_string(int(options.execution.backend)));
}

template <class T>
void summarise_ordered(const OrderedSystem<T>& given, const LongStep<T>& result, const SolveOptions& options) {
    const OrderedSystem<T> system = merged(given);
    const Execution execution = summary_execution(system, options.execution);
    if (execution.backend == Backend::reference)
        summarise<Backend::reference>(system, result, execution, *options.workspace);
    else
        summarise<Backend::cpu>(system, result, execution, *options.workspace);
}

template <class T>
void compose_ordered(const LongStep<T>& earlier, const LongStep<T>& later, bool transposed, bool with_product,
                     T* scratch, const Execution& execution) {
    const Execution used{.backend = execution.backend, .threads = device::thread_count(execution)};
    if (used.backend == Backend::reference)
        compose<Backend::reference>(earlier, later, transposed, with_product, scratch, used);
    else
        compose<Backend::cpu>(earlier, later, transposed, with_product, scratch, used);
}

#define DEEPPCR_INSTANTIATE(T)                                                                         \
    template Reduction solve_ordered(const OrderedSystem<T>&, const SolveOptions&);                    \
    template void summarise_ordered(const OrderedSystem<T>&, const LongStep<T>&, const SolveOptions&); \
    template void compose_ordered(const LongStep<T>&, const LongStep<T>&, bool, bool, T*, const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace reduce

namespace {

/// This rank's part of a system that a group shares. Nothing is sent before all ranks can go on.
template <class T>
Reduction solve_part(const BidiagonalSystem<T>& system, const View<T>& solution, bool transposed,
                     const SolveOptions& options) {
    Group& group = *options.group;
    std::optional<Workspace> own;
    std::optional<Workspace::Use> use;
    std::optional<Workspace::Scope> scope;
    const Shape& shape = solution.shape();
    std::optional<reduce::Part<T>> part;
    std::exception_ptr problem;
    try {
        Workspace& workspace = options.workspace != nullptr ? *options.workspace : own.emplace(options.execution);
        use.emplace(workspace, options.execution);
        scope.emplace(workspace);
        if (shape.steps == 0) throw InvalidArgument("system", "at least one step on every rank", to_string(shape));
        if (check<T>(system, solution, options)) {
            const int first = transposed ? group.size() - 1 : 0;
            const bool begins = group.rank() == first;
            const OrderedSystem<T> ordered =
                transposed ? reduce::reversed<T>(system, solution)
                           : OrderedSystem<T>{system.subdiagonal, system.right_side,
                                              begins ? system.initial : View<const T>(), solution, false};
            part.emplace(ordered, begins, options, workspace);
            part->summarise();
        }
    } catch (...) {
        problem = std::current_exception();
    }
    // What all must share, and its negative: the maxima say whether it is the same.
    const index block = system.subdiagonal.block();
    std::array<index, 7> sizes = {shape.batch, shape.width, block, -shape.batch, -shape.width, -block, problem ? 1 : 0};
    group.maximum(std::span<index>(sizes));
    if (sizes[6] != 0) group.agree(problem);
    if (sizes[0] != -sizes[3] || sizes[1] != -sizes[4] || sizes[2] != -sizes[5])
        throw InvalidArgument("system", "the same batch, width and block on every rank",
                              to_string(shape) + " with block " + std::to_string(block) + " on " + to_string(group));
    if (!part) return nothing_to_solve(options);
    part->scan();
    return part->solve();
}

}  // namespace

template <class T>
Reduction solve(const BidiagonalSystem<T>& system, View<std::type_identity_t<T>> solution,
                const SolveOptions& options) {
    if constexpr (!is_stored_in_16_bits<T>)
        if (options.group != nullptr && options.group->size() > 1)
            return solve_part<T>(system, solution, false, options);
    if (!check<T>(system, solution, options)) return nothing_to_solve(options);
    return reduce::solve_ordered<T>({system.subdiagonal, system.right_side, system.initial, solution, false}, options);
}

template <class T>
Reduction solve_transposed(const BidiagonalSystem<T>& system, View<std::type_identity_t<T>> solution,
                           const SolveOptions& options) {
    if constexpr (!is_stored_in_16_bits<T>)
        if (options.group != nullptr && options.group->size() > 1)
            return solve_part<T>(system, solution, true, options);
    if (!check<T>(system, solution, options)) return nothing_to_solve(options);
    return reduce::solve_ordered<T>(reduce::reversed<T>(system, solution), options);
}

template <class T>
void multiply_transposed(Jacobian<const T> subdiagonal, View<const T> y, View<T> product, const Execution& execution) {
    const Shape& shape = subdiagonal.states();
    require_backend<T>("execution.backend", execution.backend);
    if (shape.steps != 1) throw InvalidArgument("subdiagonal", "one step", to_string(shape));
    const index count = shape.count();
    require_block("subdiagonal", subdiagonal);
    require_shape("y", shape, "subdiagonal", y.shape());
    require_shape("product", shape, "subdiagonal", product.shape());
    if (count == 0) return;
    require_data("subdiagonal", subdiagonal);
    require_data("y", y);
    require_data("product", product);
    require_distinct("product", extent(product));
    require_apart("product", extent(product), "subdiagonal", extent(subdiagonal));
    require_apart("product", extent(product), "y", extent(y));
    Execution used = execution;
    if (execution.backend == Backend::cuda) {
        device::require_gpu();
        device::require_on_gpu("subdiagonal", subdiagonal.data());
        device::require_on_gpu("y", y.data());
        device::require_on_gpu("product", product.data());
        return reduce::multiply_transposed<Backend::cuda, T>(subdiagonal, y, product, used);
    }
    if constexpr (!is_stored_in_16_bits<T>) {
        used.threads = useful_threads(shape, subdiagonal.block(), device::thread_count(execution));
        if (execution.backend == Backend::reference)
            reduce::multiply_transposed<Backend::reference, T>(subdiagonal, y, product, used);
        else
            reduce::multiply_transposed<Backend::cpu, T>(subdiagonal, y, product, used);
    }
}

#define DEEPPCR_INSTANTIATE(T)                                                                                \
    template Reduction solve(const BidiagonalSystem<T>&, View<std::type_identity_t<T>>, const SolveOptions&); \
    template Reduction solve_transposed(const BidiagonalSystem<T>&, View<std::type_identity_t<T>>,            \
                                        const SolveOptions&);                                                 \
    template void multiply_transposed(Jacobian<const T>, View<const T>, View<T>, const Execution&);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(bfloat16)
DEEPPCR_INSTANTIATE(float16)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr
