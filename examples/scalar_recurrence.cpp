// x_t = sin(x_{t-1}) / 2 + cos(t), t = 1..100,000, from x_0 = 0: all steps at once, by Newton's method.
#include <cmath>
#include <iostream>

#include <deeppcr/deeppcr.hpp>

using namespace deeppcr;

struct Sines : Recurrence<double> {
    Sines() : Recurrence({.steps = 100'000}) {}
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            after(i, 0, 0) = std::sin(before(i, 0, 0)) / 2 + std::cos(section.first + i + 1);
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i) jacobian(i, 0, 0, 0) = std::cos(before(i, 0, 0)) / 2;
    }
};

int main() {
    const auto [x, report] = evaluate(Sines(), {.method = Method::newton});
    std::cout << report << "\nx_100000 = " << x(99'999, 0, 0) << '\n';
    return report.ok() ? 0 : 1;
}
