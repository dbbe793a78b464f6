// What decides the designs, before any of them: the copy's rate, multiplications and additions, the functions of the
// hardware, CUB's scan of affine pairs, and the fused sequential kernel of a cell by itself.
#include <deeppcr/cells.hpp>
#include <deeppcr/scalar.hpp>

#include "affine.cuh"
#include "measuring.cuh"

namespace deeppcr::benchmark {
namespace {

int multiprocessors() {
    int count = 0;
    cuda::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "looking at a GPU");
    return count;
}

constexpr int chains_of_a_thread = 8, operations_of_a_chain = 4096;

/// Multiplications with additions, 8 chains of them side by side in each thread.
__global__ void multiply_add_kernel(float* out, float factor, float summand) {
    float x[chains_of_a_thread];
    for (int i = 0; i < chains_of_a_thread; ++i) x[i] = float(threadIdx.x + unsigned(i));
    for (int n = 0; n < operations_of_a_chain; ++n) {
        DEEPPCR_UNROLL
        for (float& value : x) value = value * factor + summand;
    }
    float sum = 0;
    for (const float value : x) sum += value;
    out[this_thread()] = sum;
}

/// The library's own, in float.
struct TanhOfTheLibrary {
    static constexpr const char *name = "tanh of scalar.hpp", *type = "float";
    static constexpr int numbers = 1;
    using Value = float;
    __device__ static float first(float x) { return x; }
    __device__ static float apply(float x) { return scalar_functions::hyperbolic_tangent(x); }
};

/// `count` applications, each to the result of the one before it, in each of `side_by_side` chains.
template <class Function, int side_by_side>
__global__ void chains_kernel(float* out, int count, long long* taken) {
    typename Function::Value x[side_by_side];
    for (int i = 0; i < side_by_side; ++i) x[i] = Function::first(out[this_thread()] + float(i) * 0.01F);
    const long long begin = cycles();
    for (int n = 0; n < count; ++n) {
        DEEPPCR_UNROLL
        for (auto& value : x) value = Function::apply(value);
    }
    float sum = 0;
    for (const auto& value : x) sum += as_float(value);
    const long long end = cycles();
    out[this_thread()] = sum;
    if (this_thread() == 0) *taken = end - begin;
}

template <class Function>
void measure_function(Results& results) {
    results.add({.what = Function::name, .type = Function::type}, [&](Row& row) {
        const int count = results.tiny() ? 16 : 4096, blocks = multiprocessors() * 4,
                  threads = results.tiny() ? 32 : 512;
        constexpr int side_by_side = 4;
        const Buffer<float> values = uniform<float>({1, blocks, threads}, 0.1, 0.2, 1);
        const auto cycles = detail::allocate(8, there);
        cuda::launch({dim3(1), dim3(32)}, chains_kernel<Function, 1>, values.data(), count,
                     static_cast<long long*>(cycles.get()));
        long long taken = 0;
        detail::copy(&taken, cycles.get(), 8);
        const double latency = double(taken) / count;
        row.ours = take_turns({on_gpu([&] {
                                  cuda::launch({dim3(unsigned(blocks)), dim3(unsigned(threads))},
                                               chains_kernel<Function, side_by_side>, values.data(), count,
                                               static_cast<long long*>(cycles.get()));
                              })},
                              results.tiny())[0];
        const double rate = double(Function::numbers) * side_by_side * count * blocks * threads / row.ours->median;
        row.details = {{"latency_cycles", latency}, {"numbers_per_second", rate}};
        row.value = rounded(latency) + " cycles one after the other, " + rounded(rate) + " numbers per second in all";
    });
}

void measure_copies(Results& results) {
    for (const index megabytes : {64, 256, 1024, 4096})
        results.add({.what = "device-to-device copy, bytes read and written", .shape = text(megabytes) + " MiB"},
                    [&](Row& row) {
                        row.bytes = double(results.tiny() ? megabytes * 16 : megabytes << 20);
                        row.ours = take_turns({Copy(row.bytes).timed()}, results.tiny())[0];
                        row.details["bytes_per_second"] = row.bytes / row.ours->median;
                        row.value = std::to_string(index(row.bytes / row.ours->median * 1e-9)) + " GB/s";
                    });
}

void measure_cub(Results& results) {
    const index count = results.tiny() ? 4096 : index(1) << 28;
    results.add({.what = "cub::DeviceScan of affine pairs", .shape = text(count), .type = "float"}, [&](Row& row) {
        const AffineScan scan(count);
        row.bytes = 16 * double(count);
        race(row, scan.timed(), copy_name, Copy(row.bytes).timed(), results.tiny());
    });
}

/// The fused sequential kernel of a cell: how long a step takes, by how many channels there are.
void measure_sequential_cell(Results& results) {
    for (const index channels : {32, 128, 512, 2048, 8192, 32768, 131072}) {
        const index steps = results.tiny() ? 16 : std::min<index>(65536, (index(1) << 28) / channels);
        const index width = results.tiny() ? std::max<index>(1, channels >> 10) : channels;
        results.add({.what = "fused sequential ParaGRU", .shape = text({steps, 1, width}), .type = "float"},
                    [&](Row& row) {
                        const Buffer<float> inputs = uniform<float>({steps, 1, 3 * width}, -1.7, 1.7, 3),
                                            parameters = uniform<float>({3, 1, width}, -0.8, 0.8, 4),
                                            trajectory = uniform<float>({steps, 1, width}, 0, 1, 5);
                        const CellRecurrence<ParaGRU, float> recurrence(inputs, parameters);
                        Workspace workspace(there);
                        row.bytes = 4 * double(inputs.size() + trajectory.size());
                        const auto ours = on_gpu([&] {
                            evaluate(recurrence, trajectory.view(),
                                     {.method = Method::sequential,
                                      .estimates = Estimates::none,
                                      .execution = on_the_gpu,
                                      .workspace = &workspace});
                        });
                        race(row, ours, copy_name, Copy(row.bytes).timed(), results.tiny());
                        row.details["ns_per_step"] = row.ours->median * 1e9 / double(steps);
                        row.value = rounded(row.ours->median * 1e9 / double(steps)) + " ns per step";
                    });
    }
}

}  // namespace

void measure_ceilings(Results& results) {
    const double bytes = results.tiny() ? 65536 : 4e9;
    const int blocks = multiprocessors() * 8, threads = results.tiny() ? 32 : 256;
    const Buffer<float> out = uniform<float>({1, blocks, threads}, 0, 1, 1);
    const std::vector<Timing> timings = take_turns({Copy(bytes).timed(), on_gpu([&] {
                                                        cuda::launch({dim3(unsigned(blocks)), dim3(unsigned(threads))},
                                                                     multiply_add_kernel, out.data(), 0.9F, 0.1F);
                                                    })},
                                                   results.tiny());
    results.ceilings = {bytes / timings[0].median,
                        2.0 * chains_of_a_thread * operations_of_a_chain * blocks * threads / timings[1].median};
    results.note("ceilings", {{"bytes_per_second", results.ceilings.bytes_per_second},
                              {"flops_per_second", results.ceilings.flops_per_second},
                              {"multiprocessors", multiprocessors()}});
    std::printf("copy %.0f GB/s, multiplications and additions %.1f TFLOP/s\n",
                results.ceilings.bytes_per_second * 1e-9, results.ceilings.flops_per_second * 1e-12);
}

void measure_first(Results& results) {
    measure_copies(results);
    measure_function<TanhInHardware>(results);
    measure_function<ExponentialInHardware>(results);
    measure_function<TanhOfHalves>(results);
    measure_function<TanhOfBfloats>(results);
    measure_function<ExponentialOfHalves>(results);
    measure_function<TanhOfTheLibrary>(results);
    measure_cub(results);
    measure_sequential_cell(results);
}

}  // namespace deeppcr::benchmark
