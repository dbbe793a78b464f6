// Uses deeppcr as a stranger would: a system with a known solution, and a recurrence that has a closed form.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <vector>

#include <deeppcr/deeppcr.hpp>

using namespace deeppcr;

/// x_t = x_{t-1} / 2 + 1 from x_0 = 0: x_t = 2 - 2^(1-t).
struct Halving : Recurrence<double> {
    Halving() : Recurrence({.steps = 30}) {}
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i) after(i, 0, 0) = before(i, 0, 0) / 2 + 1;
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i) jacobian(i, 0, 0, 0) = 0.5;
    }
};

/// A cell of one's own: x_t = (1 - a) x_{t-1} + a tanh(w x_{t-1} + u_t).
struct LeakyTanh {
    static constexpr int states = 1, inputs = 1, parameters = 2;
    template <class S>
    static std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 2> p) {
        auto [a, w] = p;
        return {(S(1) - a) * x[0] + a * tanh(w * x[0] + u[0])};
    }
};

/// Least seconds of several sequential evaluations.
template <class C>
static double seconds_of(const Buffer<float>& u, const Buffer<float>& p) {
    const CellRecurrence<C> recurrence(u, p);
    Buffer<float> trajectory(recurrence.shape());
    double least = 1e9;
    for (int i = 0; i < 10; ++i)
        least = std::min(least, evaluate(recurrence, trajectory, {.method = Method::sequential}).seconds);
    return least;
}

/// The user's cell in chunks side by side, and as fast as the library's own, however little this program is optimised.
static bool cell_is_right_and_fast() {
    const auto u = Buffer<float>::random({.steps = 5000, .batch = 1, .width = 256}, 1);
    const Buffer<float> p({2, 1, 256});
    for (index k = 0; k < p.size(); ++k) p.data()[k] = k < 256 ? 0.5F : 0.8F;
    const CellRecurrence<LeakyTanh> recurrence(u, p);
    const auto expected = evaluate(recurrence, {.method = Method::sequential}),
               found = evaluate(recurrence, {.method = Method::overlap, .chunk = 500});
    double largest = 0;
    for (index k = 0; k < expected.trajectory.size(); ++k)
        largest =
            std::max(largest, std::abs(double(expected.trajectory.data()[k]) - double(found.trajectory.data()[k])));
    const double own = seconds_of<LeakyTanh>(u, p), built_in = seconds_of<DiagonalElman>(u, Buffer<float>({1, 1, 256}));
    std::printf("own cell %.0f us, built-in cell %.0f us, difference %.1e\n", own * 1e6, built_in * 1e6, largest);
    if (found.report.ok() && largest <= 1e-4 && own <= 4 * built_in) return true;
    std::fprintf(stderr, "a cell of one's own: wrong, or more than 4 times slower than the built-in one\n");
    return false;
}

static bool same(const char* what, double actual, double expected) {
    if (std::abs(actual - expected) <= 1e-12 * std::abs(expected)) return true;
    std::fprintf(stderr, "%s: expected %.17g, got %.17g\n", what, expected, actual);
    return false;
}

int main() {
    bool right = true;

    // x_t = 2 x_{t-1} + 1 from x_0 = 0: x_t = 2^t - 1.
    const Shape shape{.steps = 5};
    std::vector<double> A(5, 2.0), b(5, 1.0), x(5);
    solve(BidiagonalSystem<double>{.subdiagonal = Jacobian<const double>(A.data(), shape, 1),
                                   .right_side = View<const double>(b.data(), shape)},
          View<double>(x.data(), shape), {.method = Reduction::pcr});
    for (int t = 1; t <= 5; ++t) right &= same("solve", x[t - 1], std::exp2(t) - 1);

    const auto [trajectory, report] = evaluate(Halving());
    right &= report.ok();
    for (int t = 1; t <= 30; ++t) right &= same("evaluate", trajectory(t - 1, 0, 0), 2 - std::exp2(1 - t));

    right &= cell_is_right_and_fast();

    if (right) std::printf("deeppcr %s\n", version().c_str());
    return right ? 0 : 1;
}
