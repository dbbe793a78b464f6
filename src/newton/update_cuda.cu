#include <bit>
#include <limits>

#include "device/cuda.hpp"
#include "newton/rows.cuh"
#include "newton/update_gpu.hpp"

namespace deeppcr::newton {
namespace {

/// What a sweep finds of one sequence.
struct Found {
    Word failed;                              ///< rows from the first that does not pass to the end; 0: all pass
    Word residual, relative_residual, worst;  ///< as Progress has them
    Word reset;                               ///< states that were reset, or kept
};

/// Of one row, for the kernel that knows which rows passed.
struct Measure {
    double residual, relative;
};

template <class T>
struct Sweep : Rows<T> {
    const index* confirmed;  ///< per sequence
    Found* found;
    Measure* measures;
};

template <class T>
__global__ void __launch_bounds__(plain_threads) measure_rows(const Sweep<T> sweep) {
    const int lanes = sweep.lanes, lane = int(threadIdx.x) % lanes;
    const index row = this_thread() / lanes, width = sweep.width;
    const bool exists = row < sweep.rows * sweep.batch;
    const index i = exists ? row / sweep.batch : 0, j = exists ? row % sweep.batch : 0;
    const bool open = exists && i >= sweep.confirmed[j];
    T* const state = sweep.states + (row + sweep.batch) * width;
    T* const update = sweep.update + row * width;
    Norms<T> norms;
    for (index k = lane; exists && k < width; k += lanes) {
        const T x = state[k], f = sweep.after[row * width + k];
        update[k] = open ? f - x : T(0);
        norms.add(x, f);
    }
    norms.join(lanes);
    if (!open) return;
    const double relative = norms.bad == 0 ? norms.relative(sweep.tolerance) : infinity();
    if (lane == 0) {
        sweep.measures[row] = {double(norms.residual), relative};
        if (!(relative <= 1)) raise(&sweep.found[j].failed, Word(sweep.rows - i));
        if (norms.bad != 0) atomicAdd(&sweep.found[j].reset, Word(1));
    }
    if (norms.bad != 0) sweep.isolate(row, lane, norms, sweep.confirmed[j]);
}

/// A thread for each row.
template <class T>
__global__ void __launch_bounds__(plain_threads) gather_measures(const Sweep<T> sweep) {
    const index row = this_thread();
    if (row >= sweep.rows * sweep.batch) return;
    const index i = row / sweep.batch, j = row % sweep.batch;
    if (i < sweep.confirmed[j]) return;
    Found& found = sweep.found[j];
    const Measure& measure = sweep.measures[row];
    if (i >= sweep.rows - index(found.failed)) return raise(&found.worst, word_of(measure.relative));
    raise(&found.residual, word_of(measure.residual));
    raise(&found.relative_residual, word_of(measure.relative));
}

template <class T>
__global__ void __launch_bounds__(plain_threads) update_rows(const Sweep<T> sweep) {
    const int lanes = sweep.lanes, lane = int(threadIdx.x) % lanes;
    const index row = this_thread() / lanes, width = sweep.width;
    const bool exists = row < sweep.rows * sweep.batch;
    const index i = exists ? row / sweep.batch : 0, j = exists ? row % sweep.batch : 0;
    const bool open = exists && i >= sweep.confirmed[j], exact = open && i == sweep.confirmed[j];
    T* const state = sweep.states + (row + sweep.batch) * width;
    Norms<T> norms;
    for (index k = lane; open && !exact && k < width; k += lanes)
        norms.add(state[k], state[k] + sweep.update[row * width + k]);
    norms.join(lanes);
    if (!open) return;
    if ((norms.bad & 2) != 0) {  // keeps its value
        if (lane == 0) atomicAdd(&sweep.found[j].reset, Word(1));
        return;
    }
    for (index k = lane; k < width; k += lanes)
        state[k] = exact ? sweep.after[row * width + k] : state[k] + sweep.update[row * width + k];
}

template <class T>
__global__ void __launch_bounds__(plain_threads) repeat_rows(const T* state, index width, T* rows, index count) {
    const index i = this_thread();
    if (i < count) rows[i] = state[i % width];
}

struct Counts {
    const index* counts;
    Word* errors;
    index first;
    __device__ index confirmed(index j) const { return first + counts[j]; }
    __device__ Word* error(index j) const { return errors + j; }
};

/// On the GPU, for what is enqueued in the stream.
template <class E>
std::shared_ptr<E> allocate(index count, CUstream_st* stream) {
    return std::static_pointer_cast<E>(device::allocate_in_stream(count * index(sizeof(E)), stream));
}
template <class E>
std::shared_ptr<E> zeros(index count, CUstream_st* stream) {
    auto memory = allocate<E>(count, stream);
    device::fill_bytes(memory.get(), 0, count * index(sizeof(E)), stream);
    return memory;
}
std::shared_ptr<index> copied(std::span<const index> numbers, CUstream_st* stream) {
    auto memory = allocate<index>(index(numbers.size()), stream);
    device::copy_to_gpu(memory.get(), numbers.data(), index(numbers.size_bytes()), stream);
    return memory;
}
template <class E>
std::vector<E> fetched(const E* from, index count, CUstream_st* stream) {
    std::vector<E> here(static_cast<std::size_t>(count));
    device::copy_from_gpu(here.data(), from, count * index(sizeof(E)), stream);
    device::synchronise(stream);
    return here;
}

/// Calls launch(sweep, launch by rows of lanes, launch by rows); returns what was found.
template <class T, class Launch>
std::vector<Found> sweep(const Window<T>& window, const std::vector<Progress>& progress, Tolerance tolerance,
                         bool measured, CUstream_st* stream, const Launch& launch) {
    const auto [rows, batch, width] = window.after.shape();
    std::vector<index> confirmed;
    for (const Progress& sequence : progress) confirmed.push_back(sequence.confirmed);
    const auto there = copied(confirmed, stream);
    const auto found = zeros<Found>(batch, stream);
    const auto measures = allocate<Measure>(measured ? rows * batch : 0, stream);
    const Sweep<T> all{{window.states.data(), window.after.data(), window.update.data(), window.jacobian.data(),
                        window.jacobian.data() != nullptr ? window.jacobian.block() : 0, rows, batch, width,
                        lanes_of(width), tolerance},
                       there.get(),
                       found.get(),
                       measures.get()};
    launch(all, cuda::one_each(rows * batch * all.lanes, stream), cuda::one_each(rows * batch, stream));
    return fetched(found.get(), batch, stream);
}

index resets(const std::vector<Found>& found) {
    index total = 0;
    for (const Found& sequence : found) total += index(sequence.reset);
    return total;
}

}  // namespace

template <class T>
index test_residual_on_gpu(const Window<T>& window, std::vector<Progress>& progress, Tolerance tolerance,
                           CUstream_st* stream) {
    const index rows = window.after.steps();
    const std::vector<Found> found =
        sweep(window, progress, tolerance, true, stream,
              [](const Sweep<T>& all, const cuda::Launch& by_lanes, const cuda::Launch& by_row) {
                  cuda::launch(by_lanes, measure_rows<T>, all);
                  cuda::launch(by_row, gather_measures<T>, all);
              });
    for (std::size_t j = 0; j < found.size(); ++j) {
        Progress& sequence = progress[j];
        sequence.worst = std::bit_cast<double>(found[j].worst);
        sequence.confirmed = std::max(sequence.confirmed, rows - index(found[j].failed));
        sequence.residual = std::max(sequence.residual, std::bit_cast<double>(found[j].residual));
        sequence.relative_residual =
            std::max(sequence.relative_residual, std::bit_cast<double>(found[j].relative_residual));
    }
    return resets(found);
}

template <class T>
index apply_update_on_gpu(const Window<T>& window, const std::vector<Progress>& progress, CUstream_st* stream) {
    return resets(sweep(window, progress, {}, false, stream,
                        [](const Sweep<T>& all, const cuda::Launch& by_lanes, const cuda::Launch&) {
                            cuda::launch(by_lanes, update_rows<T>, all);
                        }));
}

template <class T>
void error_sources_on_gpu(View<const T> states, View<const T> after, index first, index block,
                          std::span<const index> confirmed, View<T> sources, CUstream_st* stream) {
    constexpr T unit = T(rounding_of_a_step) * std::numeric_limits<T>::epsilon();
    const auto there = copied(confirmed, stream);
    const Elements all = elements_of(sources.shape());
    for_each(all, stream, find_error_sources<T, Counts>, states.data(), after.data(),
             Counts{there.get(), nullptr, first}, first, block, unit, all, sources.data());
}

template <class T>
std::vector<double> largest_errors_on_gpu(View<const T> errors, std::span<const index> confirmed, CUstream_st* stream) {
    const auto there = copied(confirmed, stream);
    const auto largest = zeros<Word>(errors.batch(), stream);
    const Elements all = elements_of(errors.shape());
    for_each(all, stream, raise_errors<T, Counts>, errors.data(), 0, all, Counts{there.get(), largest.get(), 0});
    std::vector<double> result;
    for (const Word word : fetched(largest.get(), errors.batch(), stream))
        result.push_back(std::bit_cast<double>(word));
    return result;
}

template <class T>
void repeat_on_gpu(View<const T> state, View<T> rows, CUstream_st* stream) {
    const Elements all = elements_of(rows.shape());
    for_each(all, stream, repeat_rows<T>, state.data(), state.shape().count(), rows.data(), all.count);
}

template <class T>
void fill_ones_on_gpu(T* data, index count, CUstream_st* stream) {
    if (count > 0) cuda::launch(cuda::one_each(count, stream), fill_ones<T>, data, count);
}

#define DEEPPCR_INSTANTIATE(T)                                                                                      \
    template index test_residual_on_gpu(const Window<T>&, std::vector<Progress>&, Tolerance, CUstream_st*);         \
    template index apply_update_on_gpu(const Window<T>&, const std::vector<Progress>&, CUstream_st*);               \
    template void error_sources_on_gpu(View<const T>, View<const T>, index, index, std::span<const index>, View<T>, \
                                       CUstream_st*);                                                               \
    template std::vector<double> largest_errors_on_gpu(View<const T>, std::span<const index>, CUstream_st*);        \
    template void repeat_on_gpu(View<const T>, View<T>, CUstream_st*);                                              \
    template void fill_ones_on_gpu(T*, index, CUstream_st*);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
#undef DEEPPCR_INSTANTIATE

}  // namespace deeppcr::newton
