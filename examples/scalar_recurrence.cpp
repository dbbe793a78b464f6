// x_t = cos(x_{t-1}) / 2 + sin(t) for t = 1..100,000: every step waits for the one before it, unless one lets Newton
// guess.
#include <cmath>
#include <iostream>

#include <deeppcr/deeppcr.hpp>

using namespace deeppcr;

struct Cosines : Recurrence<double> {
    Cosines() : Recurrence({.steps = 100'000}) {}
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            after(i, 0, 0) = std::cos(before(i, 0, 0)) / 2 + std::sin(section.first + i + 1);
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i) jacobian(i, 0, 0, 0) = -std::sin(before(i, 0, 0)) / 2;
    }
};

int main() {
    const auto [x, report] = evaluate(Cosines());
    std::cout << report << "\nx_100000 = " << x(99'999, 0, 0) << '\n';
    return report.ok() ? 0 : 1;
}
