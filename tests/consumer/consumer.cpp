// Uses deeppcr as a stranger would: a system with a known solution, and a recurrence that has a closed form.
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
    right &= report.status == Status::converged;
    for (int t = 1; t <= 30; ++t) right &= same("evaluate", trajectory(t - 1, 0, 0), 2 - std::exp2(1 - t));

    if (right) std::printf("deeppcr %s\n", version().c_str());
    return right ? 0 : 1;
}
