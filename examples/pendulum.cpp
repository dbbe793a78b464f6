// A recurrence of one's own with a dense Jacobian: the semi-implicit Euler steps of damped pendulums, each with its own
// initial angle. Checks the Jacobian, then evaluates 20,000 time steps in windows of about one swing each: from the
// guess that a pendulum stands still, Newton's method does not look much further ahead.
#include <cmath>
#include <iostream>

#include <deeppcr/deeppcr.hpp>

using namespace deeppcr;

struct Pendulum : Recurrence<double> {
    static constexpr double time_step = 0.01, damping = 0.5, gravity_over_length = 9.81;

    explicit Pendulum(index pendulums) : Recurrence({.steps = 20'000, .batch = pendulums, .width = 2}) {}

    void initial(const Section& section, View<double> state) const override {
        for (index j = 0; j < section.batch(); ++j) {
            const index pendulum = section.sequences[std::size_t(j)];
            state(0, j, 0) = 2.5 * double(pendulum + 1) / double(shape().batch);
            state(0, j, 1) = 0;
        }
    }

    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                const double angle = before(i, j, 0), velocity = before(i, j, 1);
                const double force = -gravity_over_length * std::sin(angle) - damping * velocity;
                after(i, j, 1) = velocity + time_step * force;
                after(i, j, 0) = angle + time_step * after(i, j, 1);
            }
    }

    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                const double slope = -time_step * gravity_over_length * std::cos(before(i, j, 0));
                jacobian(i, j, 1, 0) = slope;
                jacobian(i, j, 1, 1) = 1 - time_step * damping;
                jacobian(i, j, 0, 0) = 1 + time_step * jacobian(i, j, 1, 0);
                jacobian(i, j, 0, 1) = time_step * jacobian(i, j, 1, 1);
            }
    }
};

int main() {
    const Pendulum pendulum(/*pendulums=*/4);

    const CheckReport check = check_recurrence(pendulum);
    std::cout << check << '\n';

    const auto [parallel, report] = evaluate(pendulum, {.method = Method::newton, .tolerance = 1e-10, .window = 256});
    std::cout << report << '\n';

    const auto [sequential, sequential_report] = evaluate(pendulum, {.method = Method::sequential});
    double difference = 0;
    for (index i = 0; i < parallel.size(); ++i)
        difference = std::max(difference, std::abs(parallel.data()[i] - sequential.data()[i]));
    std::cout << "largest difference to the sequential evaluation: " << difference << '\n';
    return check.ok() && report.ok() && difference < 1e-6 ? 0 : 1;
}
