// What the kernels take of a GPU: a program of its own, without Google Benchmark, so that it can be carried to a
// machine that has only a driver (see gpu.sh).
//
//   gpu_benchmark [part ...] [--quick] [--json FILE]        parts: machine bidiagonal cells map backward; all of them
//
// Every case is verified before it is timed. Seconds are medians of calls as a user makes them, the final wait
// included; of what only enqueues, of CUDA events around it. "copy" is the rate of a device-to-device copy, bytes read
// plus bytes written, measured in the same run; a case's share of it counts only the bytes that must move, each once.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cub/device/device_scan.cuh>
#include <fstream>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <deeppcr/cell.cuh>
#include <deeppcr/deeppcr.hpp>

namespace deeppcr {
namespace {

using Json = nlohmann::ordered_json;

constexpr Device there = Device::cuda();
bool quick = false;

index sized(index count) { return quick ? std::max<index>(1, count >> 8) : count; }

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

/// Of work that is only enqueued.
double device_seconds(const std::function<void()>& body) {
    cudaEvent_t begin{}, end{};
    cuda::check(cudaEventCreate(&begin), "creating an event");
    cuda::check(cudaEventCreate(&end), "creating an event");
    std::vector<double> seconds;
    for (int run = 0; run < (quick ? 3 : 12); ++run) {
        cuda::check(cudaEventRecord(begin), "recording an event");
        body();
        cuda::check(cudaEventRecord(end), "recording an event");
        cuda::check(cudaEventSynchronize(end), "waiting");
        float milliseconds = 0;
        cuda::check(cudaEventElapsedTime(&milliseconds, begin, end), "reading events");
        if (run >= 2) seconds.push_back(double(milliseconds) * 1e-3);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return median(seconds);
}

/// Of a call that waits for its end; the first two warm up, and teach `automatic`.
double call_seconds(const std::function<double()>& body) {
    std::vector<double> seconds;
    double total = 0;
    for (int run = 0; run < (quick ? 4 : 40) && (run < 5 || total < 0.3); ++run) {
        const double taken = body();
        total += taken;
        if (run >= 2) seconds.push_back(taken);
    }
    return median(seconds);
}

double wall_seconds(const std::function<void()>& body) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Uniform numbers in [low, high), on the GPU.
__global__ void fill_kernel(float* data, index count, float low, float high, unsigned long long seed) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    unsigned long long bits = ((unsigned long long)(i) + seed) * 0x9e3779b97f4a7c15ULL;
    bits = (bits ^ bits >> 29) * 0xbf58476d1ce4e5b9ULL;
    bits ^= bits >> 32;
    data[i] = low + (high - low) * float(bits >> 40) * 0x1p-24F;
}
Buffer<float> uniform(const Shape& shape, float low, float high, unsigned long long seed) {
    Buffer<float> result = Buffer<float>::uninitialised(shape, Layout::steps_first, there);
    cuda::launch(cuda::one_each(result.size(), nullptr), fill_kernel, result.data(), result.size(), low, high, seed);
    return result;
}

struct Results {
    Json all = Json::object();
    double copy = 0;  // bytes per second
};

// --- machine

/// `count` dependent tanh of the fast functions, or of the hardware's own.
template <bool hardware>
__global__ void tanh_kernel(float* out, int count, long long* cycles) {
    float x = out[blockIdx.x * blockDim.x + threadIdx.x];
    const long long begin = clock64();
    for (int i = 0; i < count; ++i) {
        if (hardware)
            asm volatile("tanh.approx.f32 %0, %0;" : "+f"(x));
        else
            x = scalar_functions::hyperbolic_tangent(x);
    }
    const long long end = clock64();
    out[blockIdx.x * blockDim.x + threadIdx.x] = x;
    if (threadIdx.x == 0 && blockIdx.x == 0) *cycles = end - begin;
}

void measure_machine(Results& results) {
    const index bytes = sized(index(2) << 30);
    const auto from = detail::allocate(bytes, there), to = detail::allocate(bytes, there);
    const double seconds = device_seconds([&] {
        cuda::check(cudaMemcpyAsync(to.get(), from.get(), std::size_t(bytes), cudaMemcpyDeviceToDevice), "copying");
    });
    results.copy = 2 * double(bytes) / seconds;
    Json& machine = results.all["machine"];
    machine["gpu"] = cuda_devices().at(0);
    machine["copy_bytes_per_second"] = results.copy;
    int multiprocessors = 0;
    cuda::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "looking at a GPU");
    machine["multiprocessors"] = multiprocessors;
    std::printf("%s, %d multiprocessors, copy %.0f GB/s\n", cuda_devices().at(0).c_str(), multiprocessors,
                results.copy * 1e-9);

    const Buffer<float> values = uniform({1, multiprocessors * 4, 512}, -1, 1, 1);
    const auto cycles = detail::allocate(8, there);
    const auto latency = [&](auto kernel, const char* name) {
        constexpr int count = 4096;
        cuda::launch({dim3(1), dim3(32)}, kernel, values.data(), count, static_cast<long long*>(cycles.get()));
        long long taken = 0;
        detail::copy(&taken, cycles.get(), 8);
        const double all = device_seconds([&] {
            cuda::launch({dim3(unsigned(multiprocessors) * 4), dim3(512)}, kernel, values.data(), count,
                         static_cast<long long*>(cycles.get()));
        });
        const double rate = double(count) * multiprocessors * 4 * 512 / all;
        machine[name] = {{"latency_cycles", double(taken) / count}, {"per_second", rate}};
        std::printf("%s: %.1f cycles one after the other, %.3g per second in all\n", name, double(taken) / count, rate);
    };
    latency(tanh_kernel<true>, "tanh.approx");
    latency(tanh_kernel<false>, "tanh");
}

// --- bidiagonal systems

/// The largest |x_t - A_t x_{t-1} - b_t| at some places, relative to the largest |x| there.
double residual(const BidiagonalSystem<float>& system, const Buffer<float>& solution) {
    const index K = system.subdiagonal.block(), width = system.subdiagonal.width(), steps = solution.shape().steps;
    const index batch = solution.shape().batch, row = batch * width;
    double worst = 0, largest = 0;
    std::vector<float> a(std::size_t(width * K)), b(static_cast<std::size_t>(width)),
        x(static_cast<std::size_t>(width)), before(x);
    for (int sample = 0; sample < 64; ++sample) {
        const index t = 1 + (steps - 2) * sample / 63, j = batch * sample / 64;
        if (t < 1 || t >= steps) continue;
        detail::copy(a.data(), system.subdiagonal.at(t, j), width * K * 4);
        detail::copy(b.data(), system.right_side.at(t, j), width * 4);
        detail::copy(x.data(), solution.data() + t * row + j * width, width * 4);
        detail::copy(before.data(), solution.data() + (t - 1) * row + j * width, width * 4);
        for (index i = 0; i < width; ++i) {
            double sum = b[std::size_t(i)];
            for (index k = 0; k < K; ++k) sum += double(a[std::size_t(i * K + k)]) * before[std::size_t(i / K * K + k)];
            const double apart = std::abs(sum - x[std::size_t(i)]);
            if (!(apart <= worst)) worst = apart;
            largest = std::max(largest, std::abs(double(x[std::size_t(i)])));
        }
    }
    return worst / largest;
}

struct Affine {
    float a, b;
};
struct Compose {
    __host__ __device__ Affine operator()(const Affine& first, const Affine& second) const {
        return {second.a * first.a, second.a * first.b + second.b};
    }
};

void measure_bidiagonal(Results& results) {
    struct Case {
        index batch, width, block, elements;  // of A
        const char* name;
    };
    const index mi = index(1) << 20;
    const std::vector<Case> cases{{1, 65536, 1, 128 * mi, "diagonal, 65,536 rows"},
                                  {1, 16384, 1, 128 * mi, "diagonal, 16,384 rows"},
                                  {1, 4096, 1, 128 * mi, "diagonal, 4,096 rows"},
                                  {1, 256, 1, 128 * mi, "diagonal, 256 rows"},
                                  {1, 32, 1, 128 * mi, "diagonal, 32 rows"},
                                  {1, 1, 1, 256 * mi, "diagonal, one row of 2^28"},
                                  {4096, 2, 2, 128 * mi, "blocks of 2, 4,096 sequences"},
                                  {4096, 3, 3, 144 * mi, "blocks of 3, 4,096 sequences"},
                                  {4096, 4, 4, 128 * mi, "blocks of 4, 4,096 sequences"},
                                  {1, 4, 4, 64 * mi, "blocks of 4, one sequence"},
                                  {4096, 16, 16, 128 * mi, "dense 16, 4,096 sequences"},
                                  {1024, 64, 64, 128 * mi, "dense 64, 1,024 sequences"},
                                  {1, 16, 16, 16 * mi, "dense 16, one sequence"}};
    std::printf("\n| bidiagonal, float | method | seconds | share of copy |\n| --- | --- | --- | --- |\n");
    for (const Case& c : cases) {
        const index steps = std::max<index>(8, sized(c.elements) / (c.batch * c.width * c.block));
        const Shape shape{steps, c.batch, c.width};
        const float scale = 0.9F / float(c.block);
        const Buffer<float> a = uniform({steps, c.batch, c.width * c.block}, -scale, scale, 1),
                            b = uniform(shape, -1, 1, 2);
        const Buffer<float> x = Buffer<float>::uninitialised(shape, Layout::steps_first, there);
        const BidiagonalSystem<float> system{Jacobian<const float>(a.data(), shape, c.block), b};
        Workspace workspace(there);
        for (const Reduction method : {Reduction::automatic, Reduction::sequential}) {
            // One thread per row is for many rows.
            if (method == Reduction::sequential && c.batch * c.width < 4096) continue;
            const SolveOptions options{
                .method = method, .execution = {.backend = Backend::cuda}, .workspace = &workspace};
            const Reduction used = solve(system, x.view(), options);
            const double wrong = residual(system, x);
            if (!(wrong <= 1e-5)) throw Error(std::string(c.name) + ": residual " + std::to_string(wrong));
            const double seconds = device_seconds([&] { solve(system, x.view(), options); });
            const double bytes = double(shape.count()) * double(c.block + 2) * 4,
                         share = bytes / seconds / results.copy;
            const char* names[] = {"automatic", "sequential", "pcr", "scan"};
            results.all["bidiagonal"].push_back({{"name", c.name},
                                                 {"shape", {steps, c.batch, c.width}},
                                                 {"block", c.block},
                                                 {"method", names[int(used)]},
                                                 {"seconds", seconds},
                                                 {"bytes", bytes},
                                                 {"share_of_copy", share},
                                                 {"residual", wrong}});
            std::printf("| %s | %s | %.3g | %.2f |\n", c.name, names[int(used)], seconds, share);
        }
        if (c.batch * c.width == 1) {
            const auto pairs = detail::allocate(steps * 8, there), sums = detail::allocate(steps * 8, there);
            detail::fill_zeros(pairs.get(), steps * 8, there);
            std::size_t bytes = 0;
            const auto scan = [&](void* memory) {
                return cub::DeviceScan::InclusiveScan(memory, bytes, static_cast<const Affine*>(pairs.get()),
                                                      static_cast<Affine*>(sums.get()), Compose(), steps);
            };
            cuda::check(scan(nullptr), "asking CUB for its size");
            const auto memory = detail::allocate(index(bytes), there);
            const double seconds = device_seconds([&] { cuda::check(scan(memory.get()), "running CUB"); });
            results.all["bidiagonal"].push_back(
                {{"name", std::string(c.name) + ", cub::DeviceScan of pairs"}, {"seconds", seconds}});
            std::printf("| %s | cub::DeviceScan of pairs | %.3g | |\n", c.name, seconds);
        }
    }
}

// --- cells

template <class C>
struct Problem {
    Problem(index steps, index channels)
        : inputs(uniform({steps, 1, channels * C::inputs}, -1.7F, 1.7F, 3)),
          parameters(uniform({C::parameters, 1, channels}, -0.8F, 0.8F, 4)),
          trajectory(Buffer<float>::uninitialised({steps, 1, channels * C::states}, Layout::steps_first, there)),
          recurrence(inputs, parameters) {}

    Report run(Method method) {
        return evaluate(recurrence, trajectory.view(),
                        {.method = method,
                         .tolerance = 1e-5,
                         .estimates = Estimates::none,
                         .execution = {.backend = Backend::cuda},
                         .workspace = &workspace});
    }
    double bytes() const { return double(inputs.size() + trajectory.size()) * 4; }

    Buffer<float> inputs, parameters, trajectory;
    CellRecurrence<C, float> recurrence;
    Workspace workspace{there};
};

/// Of the beginning, against the processor's.
template <class C>
double difference(const Problem<C>& problem, const Buffer<float>& trajectory) {
    const auto [steps, batch, width] = trajectory.shape();
    const index some = std::min<index>(steps, std::max<index>(1, (index(1) << 20) / width));
    Buffer<float> inputs({some, 1, problem.inputs.shape().width}), states({some, 1, width});
    detail::copy(inputs.data(), problem.inputs.data(), inputs.size() * 4);
    detail::copy(states.data(), trajectory.data(), states.size() * 4);
    const Buffer<float> parameters = problem.parameters.on(Device::host());
    const auto expected =
        evaluate(CellRecurrence<C, float>(inputs, parameters), {.method = Method::sequential}).trajectory;
    double largest = 0, apart = 0;
    for (index i = 0; i < states.size(); ++i) {
        const double d = std::abs(double(states.data()[i]) - double(expected.data()[i]));
        if (!(d <= apart)) apart = d;
        largest = std::max(largest, std::abs(double(expected.data()[i])));
    }
    return apart / largest;
}

template <class C>
Json measure_cell(Results& results, index steps, index channels) {
    Problem<C> problem(steps, channels);
    Json entry{{"cell", C::name}, {"steps", steps}, {"channels", channels}};
    double baseline = 0;
    for (const Method method : {Method::sequential, Method::overlap, Method::shooting, Method::automatic}) {
        const Report first = problem.run(method);
        const double apart = difference(problem, problem.trajectory);
        if (!first.ok() || !(apart <= 1e-3))
            throw Error(std::string(C::name) + ", " + to_string(method) + ": differs by " + std::to_string(apart));
        Report report;
        const double seconds = call_seconds([&] { return wall_seconds([&] { report = problem.run(method); }); });
        if (method == Method::sequential) baseline = seconds;
        entry[to_string(method)] = {{"seconds", seconds},
                                    {"ns_per_number", seconds * 1e9 / double(steps * channels)},
                                    {"times_as_fast_as_sequential", baseline / seconds},
                                    {"share_of_copy", problem.bytes() / seconds / results.copy},
                                    {"what_it_did", report.method},
                                    {"difference", apart}};
    }
    return entry;
}

void print(const Json& entry) {
    std::printf("| %s | %lld | %lld |", entry["cell"].get<std::string>().c_str(), entry["steps"].get<long long>(),
                entry["channels"].get<long long>());
    std::printf(" %.3g ns |", entry["sequential"]["ns_per_number"].get<double>());
    for (const char* method : {"overlap", "shooting", "automatic"})
        std::printf(" %.2fx, %.2f |", entry[method]["times_as_fast_as_sequential"].get<double>(),
                    entry[method]["share_of_copy"].get<double>());
    std::printf(" %s |\n", entry["automatic"]["what_it_did"].get<std::string>().c_str());
    std::fflush(stdout);
}
void print_head() {
    std::printf(
        "\n| cell | steps | channels | sequential per number | overlap: against it, share of copy | shooting | "
        "automatic | which was |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n");
}

void measure_cells(Results& results) {
    print_head();
    const index mi = index(1) << 20;
    for (const auto& [steps, channels] : std::vector<std::pair<index, index>>{
             {1024, 65536}, {16384, 4096}, {16384, 1024}, {65536, 256}, {mi, 32}, {4 * mi, 1}}) {
        results.all["cells"].push_back(measure_cell<ParaGRU>(results, sized(steps), channels));
        print(results.all["cells"].back());
        results.all["cells"].push_back(measure_cell<ParaLSTM>(results, sized(steps), channels));
        print(results.all["cells"].back());
    }
}

void measure_map(Results& results) {
    print_head();
    for (index steps = 64; steps <= (quick ? 256 : index(1) << 20); steps *= 4)
        for (index channels = 1; channels <= 65536; channels *= 4) {
            if (steps * channels > sized(index(64) << 20)) continue;
            results.all["map"].push_back(measure_cell<ParaGRU>(results, steps, channels));
            print(results.all["map"].back());
        }
}

template <class C>
void measure_backward_of(Results& results, index steps, index channels) {
    Problem<C> problem(steps, channels);
    const Report report = problem.run(Method::sequential);
    const Buffer<float> gradient = uniform(problem.trajectory.shape(), -1, 1, 5);
    const double bytes = 2 * double(problem.inputs.size() + problem.trajectory.size()) * 4;
    Json entry{{"cell", C::name}, {"steps", steps}, {"channels", channels}};
    std::printf("| %s | %lld | %lld |", C::name, (long long)(steps), (long long)(channels));
    for (const Method method : {Method::sequential, Method::automatic}) {
        std::string what;
        // The seconds of the pass alone: the gradients' memory is allocated before it.
        const double seconds = call_seconds([&] {
            const auto gradients = adjoint<float>(
                problem.recurrence, problem.trajectory, report, gradient,
                {.method = method, .execution = {.backend = Backend::cuda}, .workspace = &problem.workspace});
            what = gradients.report.method;
            return gradients.report.seconds;
        });
        entry[to_string(method)] = {
            {"seconds", seconds}, {"share_of_copy", bytes / seconds / results.copy}, {"what_it_did", what}};
        std::printf(" %.3g s, %.2f of copy |", seconds, bytes / seconds / results.copy);
    }
    std::printf("\n");
    results.all["backward"].push_back(entry);
}

void measure_backward(Results& results) {
    std::printf("\n| backward | steps | channels | sequential | automatic |\n| --- | --- | --- | --- | --- |\n");
    for (const auto& [steps, channels] :
         std::vector<std::pair<index, index>>{{1024, 65536}, {16384, 1024}, {65536, 256}}) {
        measure_backward_of<ParaGRU>(results, sized(steps), channels);
        measure_backward_of<ParaLSTM>(results, sized(steps), channels);
    }
}

int run(const std::vector<std::string>& arguments) {
    const std::vector<std::pair<std::string, void (*)(Results&)>> parts{{"machine", measure_machine},
                                                                        {"bidiagonal", measure_bidiagonal},
                                                                        {"cells", measure_cells},
                                                                        {"map", measure_map},
                                                                        {"backward", measure_backward}};
    std::vector<std::string> asked;
    std::string file;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& argument = arguments[i];
        const auto named = [&](const auto& part) { return part.first == argument; };
        if (argument == "--quick")
            quick = true;
        else if (argument == "--json" && i + 1 < arguments.size())
            file = arguments[++i];
        else if (std::find_if(parts.begin(), parts.end(), named) != parts.end())
            asked.push_back(argument);
        else
            throw InvalidArgument("argument", "machine, bidiagonal, cells, map, backward, --quick or --json FILE",
                                  argument);
    }
    Results results;
    for (const auto& [name, measure] : parts)
        // The copy's rate is what all others are compared with.
        if (name == "machine" || asked.empty() || std::find(asked.begin(), asked.end(), name) != asked.end()) {
            measure(results);
            if (!file.empty()) std::ofstream(file) << results.all.dump(1) << '\n';
        }
    return 0;
}

}  // namespace
}  // namespace deeppcr

int main(int argc, char** argv) {
    try {
        return deeppcr::run({argv + 1, argv + argc});
    } catch (const std::exception& error) {
        std::fprintf(stderr, "gpu_benchmark: %s\n", error.what());
        return 1;
    }
}
