// What a caller that has only pointers can have of the library on a GPU: Python, by ctypes (see compare_torch.py). All
// arrays are contiguous and lie on the current GPU; the work is done when a function returns: 0, or 1 where it failed
// and deeppcr_problem says why.
#include <exception>
#include <string>

#include <deeppcr/cells.hpp>
#include <deeppcr/evaluate.hpp>

namespace deeppcr {
namespace {

std::string problem;

template <class Body>
int attempt(const Body& body) {
    try {
        body();
        return 0;
    } catch (const InvalidArgument& error) {
        problem = error.what();
        return 2;
    } catch (const std::exception& error) {
        problem = error.what();
        return 1;
    }
}

Workspace& workspace() {
    static Workspace one(Device::cuda());
    return one;
}

template <class T>
void run(const void* inputs, const void* parameters, void* states, const Shape& shape, const Options& options) {
    const CellRecurrence<ParaGRU, T> recurrence(
        View<const T>(static_cast<const T*>(inputs), {shape.steps, shape.batch, 3 * shape.width}),
        View<const Arithmetic<T>>(static_cast<const Arithmetic<T>*>(parameters), {3, 1, shape.width}));
    const Report report = evaluate(recurrence, View<T>(static_cast<T*>(states), shape), options);
    if (!report.ok()) throw Error("the evaluation ended as " + to_string(report.status));
}

}  // namespace
}  // namespace deeppcr

#define DEEPPCR_FOR_C extern "C" __attribute__((visibility("default")))

/// ParaGRU from x_0 = 0. inputs [steps,batch,3*width] (gates z, r, h), parameters [3,width], in; states
/// [steps,batch,width], out. bits of a number: 64 double, 32 float, 16 bfloat16, whose parameters are float. tolerance:
/// as in Options.
DEEPPCR_FOR_C int deeppcr_para_gru(const void* inputs, const void* parameters, void* states, long long steps,
                                   long long batch, long long width, int bits, int sequential, double tolerance) {
    using namespace deeppcr;
    return attempt([&] {
        const Options options{.method = sequential != 0 ? Method::sequential : Method::automatic,
                              .tolerance = tolerance,
                              .estimates = Estimates::none,
                              .execution = {.backend = Backend::cuda},
                              .workspace = &workspace()};
        const Shape shape{steps, batch, width};
        if (bits == 64) return run<double>(inputs, parameters, states, shape, options);
        if (bits == 32) return run<float>(inputs, parameters, states, shape, options);
        if (bits == 16) return run<bfloat16>(inputs, parameters, states, shape, options);
        throw InvalidArgument("bits", "64, 32 or 16", std::to_string(bits));
    });
}

/// x_t = a_t x_{t-1} + b_t from x_0 = 0, all [steps,width], in float.
DEEPPCR_FOR_C int deeppcr_solve_diagonal(const float* a, const float* b, float* x, long long steps, long long width) {
    using namespace deeppcr;
    return attempt([&] {
        const Shape shape{steps, 1, width};
        solve(BidiagonalSystem<float>{Jacobian<const float>(a, shape, 1), View<const float>(b, shape)},
              View<float>(x, shape), {.execution = {.backend = Backend::cuda}, .workspace = &workspace()});
    });
}

DEEPPCR_FOR_C const char* deeppcr_problem() { return deeppcr::problem.c_str(); }
