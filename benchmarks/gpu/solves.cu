// Explicit bidiagonal systems against the copy of the bytes that a solve must move: A, b and x, each once.
#include "affine.cuh"
#include "measuring.cuh"

namespace deeppcr::benchmark {
namespace {

/// |x_t - A_t x_{t-1} - b_t| of all steps, in double. All arrays are contiguous, `width` numbers per step.
template <class T>
__global__ void residual_kernel(const T* a, const T* b, const T* x, index width, index block, index count,
                                Extremes* extremes) {
    Largest apart, size;
    for (index i = this_thread(); i < count; i += all_threads()) {
        double sum = double(cuda::widen(b[i]));
        if (i >= width) {
            const T* const before = x + (i / block * block - width);
            for (index k = 0; k < block; ++k)
                sum += double(cuda::widen(a[i * block + k])) * double(cuda::widen(before[k]));
        }
        const double found = double(cuda::widen(x[i]));
        apart.see(fabs(found - sum));
        size.see(fabs(found));
    }
    apart.raise(&extremes->apart);
    size.raise(&extremes->size);
}

struct Case {
    std::string target;  ///< of Reduction::automatic, or empty
    std::string what;
    index steps, batch, width, block;
};

/// The largest entry of random blocks with which every step makes states smaller.
double contracting(index block) { return 0.9 / double(block); }
/// With which they forget over about a hundred steps.
double remembering(index block) { return 0.99 * std::sqrt(3 / double(block)); }

/// A system and its solution on the GPU.
template <class T>
struct Problem {
    /// `largest`: that an entry of A can be.
    Problem(const Shape& shape, index block, double largest)
        : a(uniform<T>({shape.steps, shape.batch, shape.width * block}, -largest, largest, 1)),
          b(uniform<T>(shape, -1, 1, 2)),
          x(Buffer<T>::uninitialised(shape, Layout::steps_first, there)),
          system{Jacobian<const T>(a.data(), shape, block), b} {}

    Reduction run(Reduction method, TensorCores tensor_cores = TensorCores::none) {
        return solve(
            system, x.view(),
            {.method = method, .execution = on_the_gpu, .workspace = &workspace, .tensor_cores = tensor_cores});
    }
    double bytes() const { return double(a.size() + b.size() + x.size()) * double(sizeof(T)); }
    double residual() const {
        const index width = x.shape().batch * x.shape().width;
        return relative_extreme(x.size(), residual_kernel<T>, static_cast<const T*>(a.data()),
                                static_cast<const T*>(b.data()), static_cast<const T*>(x.data()), width,
                                system.subdiagonal.block());
    }

    Buffer<T> a, b, x;
    BidiagonalSystem<T> system;
    Workspace workspace{there};
};

constexpr const char* method_names[] = {"automatic", "sequential", "pcr", "scan"};

template <class T>
void measure_case(Results& results, const Case& c, Reduction method) {
    const Shape shape{c.steps, c.batch, c.width};
    const std::string what = c.what + (method == Reduction::sequential ? ", substitution" : "");
    results.add({.target = method == Reduction::automatic ? c.target : "",
                 .what = what,
                 .shape = text(shape),
                 .type = type_name<T>},
                [&](Row& row) {
                    Problem<T> problem(shape, c.block, contracting(c.block));
                    row.details["method"] = method_names[int(problem.run(method))];
                    // Rounding of x_t, x_{t-1} and sums: a few units of the last place.
                    verify(row, "residual", problem.residual(), is_stored_in_16_bits<T> ? 0.02 : 1e-5);
                    row.bytes = problem.bytes();
                    row.flops = 2 * double(problem.a.size());
                    race(row, on_gpu([&] { problem.run(method); }), copy_name, Copy(row.bytes).timed(), results.tiny());
                });
}

/// The same row by CUB's scan of pairs, which solves it too.
void measure_against_cub(Results& results, index steps) {
    const Shape shape{steps, 1, 1};
    results.add({.target = "one-row-scan", .what = "one row", .shape = text(shape), .type = "float"}, [&](Row& row) {
        Problem<float> problem(shape, 1, contracting(1));
        problem.run(Reduction::automatic);
        const AffineScan scan(problem.a, problem.b);
        verify(row, "difference", scan.difference(problem.x), 1e-5);
        row.bytes = problem.bytes();
        race(row, on_gpu([&] { problem.run(Reduction::automatic); }), "cub::DeviceScan of affine pairs", scan.timed(),
             results.tiny());
    });
}

/// The scan of one sequence of dense blocks, whose products tensor cores may multiply, and how far it is from
/// substitution.
template <class T>
void measure_tensor_cores(Results& results, index steps, index block) {
    const Shape shape{steps, 1, block};
    constexpr const char* names[] = {"none", "split", "tf32"};
    for (const TensorCores kind : {TensorCores::none, TensorCores::split, TensorCores::tf32})
        results.add(
            {.what = "dense " + std::to_string(block) + ", one sequence, scan, tensor cores " + names[int(kind)],
             .shape = text(shape),
             .type = type_name<T>},
            [&](Row& row) {
                Problem<T> problem(shape, block, remembering(block));
                problem.run(Reduction::sequential);
                const Buffer<T> substituted = problem.x.on(there);
                problem.run(Reduction::scan, kind);
                // What products of two halves of a float leave grows with their number.
                const double limit = kind == TensorCores::tf32 || is_stored_in_16_bits<T> ? 0.05
                                     : kind == TensorCores::split                         ? 1e-3
                                                                                          : 1e-4;
                verify(row, "difference to substitution", difference(problem.x, substituted), limit);
                verify(row, "residual", problem.residual(), limit);
                row.details["operations of products"] = 2 * double(problem.a.size()) * double(block);
                row.bytes = problem.bytes();
                row.flops = 2 * double(problem.a.size());
                race(row, on_gpu([&] { problem.run(Reduction::scan, kind); }), copy_name, Copy(row.bytes).timed(),
                     results.tiny());
            });
}

}  // namespace

void measure_solves(Results& results) {
    const index mi = index(1) << 20;
    const std::vector<Case> cases =
        results.tiny() ? std::vector<Case>{{"diagonal", "diagonal, 40 rows", 30, 1, 40, 1},
                                           {"", "diagonal, 8 sequences", 20, 8, 3, 1},
                                           {"one-row", "one row", 5000, 1, 1, 1},
                                           {"blocks-2", "blocks of 2", 40, 9, 2, 2},
                                           {"blocks-4", "blocks of 4", 40, 3, 4, 4},
                                           {"", "dense 6", 20, 2, 6, 6}}
                       : std::vector<Case>{{"diagonal", "diagonal, 65,536 rows", 2048, 1, 65536, 1},
                                           {"diagonal", "diagonal, 16,384 rows", 8192, 16, 1024, 1},
                                           {"diagonal", "diagonal, 4,096 rows", 32768, 1, 4096, 1},
                                           {"", "diagonal, 256 rows", mi / 2, 1, 256, 1},
                                           {"", "diagonal, 32 rows", 4 * mi, 1, 32, 1},
                                           {"one-row", "one row of 2^28", 256 * mi, 1, 1, 1},
                                           {"blocks-2", "blocks of 2, 4,096 sequences", 16384, 4096, 2, 2},
                                           {"blocks-2", "blocks of 2, 64 x 64 of them", 16384, 64, 128, 2},
                                           {"", "blocks of 3, 4,096 sequences", 4096, 4096, 3, 3},
                                           {"blocks-4", "blocks of 4, 4,096 sequences", 4096, 4096, 4, 4},
                                           {"blocks-4", "blocks of 4, 64 x 64 of them", 4096, 64, 256, 4},
                                           {"", "blocks of 4, one sequence", 8 * mi, 1, 4, 4},
                                           {"", "dense 16, 4,096 sequences", 256, 4096, 16, 16},
                                           {"", "dense 64, 1,024 sequences", 64, 1024, 64, 64},
                                           {"", "dense 16, one sequence", mi / 2, 1, 16, 16},
                                           {"", "dense 64, one sequence", 16384, 1, 64, 64}};
    for (const Case& c : cases) {
        measure_case<float>(results, c, Reduction::automatic);
        if (c.target == "diagonal") measure_case<float>(results, c, Reduction::sequential);
        Case untargeted = c;
        untargeted.target = "";
        measure_case<bfloat16>(results, untargeted, Reduction::automatic);
        if (c.target == "one-row") measure_against_cub(results, c.steps);
    }
    // Steps of several chunks.
    const std::vector<std::pair<index, index>> dense =
        results.tiny() ? std::vector<std::pair<index, index>>{{50, 40}}
                       : std::vector<std::pair<index, index>>{{16384, 64}, {8192, 128}, {2048, 256}};
    for (const auto& [steps, block] : dense) {
        measure_tensor_cores<float>(results, steps, block);
        measure_tensor_cores<bfloat16>(results, steps, block);
    }
}

}  // namespace deeppcr::benchmark
