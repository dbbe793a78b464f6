// One trajectory on several machines: every process holds its own part of the steps. Run it by
//     mpirun -n 4 several_machines
// or alone. Memory and work per process are those of its part.
#include <cmath>
#include <iostream>

#include <deeppcr/deeppcr.hpp>

using namespace deeppcr;

// A driven pendulum with friction, for steps first+1 .. of a longer trajectory: a rank has its own part only.
struct Pendulum : Recurrence<double> {
    Pendulum(index steps, index first_) : Recurrence({.steps = steps, .width = 2}), first(first_) {}
    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i) {
            const double angle = before(i, 0, 0), speed = before(i, 0, 1);
            const double push = std::sin(0.01 * double(first + section.first + i));
            after(i, 0, 1) = speed + pause * (push - std::sin(angle) - 4 * speed);
            after(i, 0, 0) = angle + pause * after(i, 0, 1);
        }
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i) {
            jacobian(i, 0, 1, 0) = -pause * std::cos(before(i, 0, 0));
            jacobian(i, 0, 1, 1) = 1 - 4 * pause;
            jacobian(i, 0, 0, 0) = 1 + pause * jacobian(i, 0, 1, 0);
            jacobian(i, 0, 0, 1) = pause * jacobian(i, 0, 1, 1);
        }
    }
    static constexpr double pause = 0.05;
    index first;
};

int main() {
    Group& group = Group::world();
    constexpr index steps = 100'000;
    const auto [first, last] = group.part(steps);
    const Pendulum part(last - first, first);
    const auto [x, report] = evaluate(part, {.method = Method::newton, .group = &group});
    const auto [exact, baseline] = evaluate(part, {.method = Method::sequential, .group = &group});

    double difference = 0;
    for (index i = 0; i < x.size(); ++i) difference = std::max(difference, std::abs(x.data()[i] - exact.data()[i]));
    group.maximum(std::span(&difference, 1));
    if (group.rank() == 0)
        std::cout << report << "\nsequentially, rank after rank, " << baseline.seconds * 1e3
                  << " ms; largest difference " << difference << "\nsteps on this rank: " << last - first << " of "
                  << steps << '\n';
    return report.ok() && difference < 1e-9 ? 0 : 1;
}
