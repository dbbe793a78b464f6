// A step of one's own, for every channel with its own weights: x_t = (1 - a) x_{t-1} + a tanh(w x_{t-1} + u_t).
// Evaluated by the fastest method of this machine, differentiated without a derivative written by hand.
#include <cmath>
#include <iostream>

#include <deeppcr/deeppcr.hpp>

struct LeakyTanh {
    static constexpr int states = 1, inputs = 1, parameters = 2;
    template <class S>
    static std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 2> p) {
        auto [a, w] = p;
        return {(S(1) - a) * x[0] + a * tanh(w * x[0] + u[0])};
    }
};

int main() {
    using namespace deeppcr;
    const auto u = Buffer<float>::random({.steps = 100'000, .batch = 1, .width = 4}, /*seed=*/1);
    const Buffer<float> p({.steps = 2, .batch = 1, .width = 4});
    for (index channel = 0; channel < 4; ++channel) {
        p(0, 0, channel) = 0.2F * float(channel + 1);
        p(1, 0, channel) = 0.9F;
    }
    const CellRecurrence<LeakyTanh> recurrence(u, p);

    const auto [x, report] = evaluate(recurrence);
    const auto sequential = evaluate(recurrence, {.method = Method::sequential});
    std::cout << report << "\n(step after step: " << sequential.report.seconds * 1e3 << " ms)\n";

    // The gradient of the sum of the last states: it reaches back as far as the cells remember.
    const Buffer<float> gradient(recurrence.shape());
    for (index channel = 0; channel < 4; ++channel) gradient(99'999, 0, channel) = 1;
    const auto gradients = adjoint(recurrence, x, report, gradient);
    std::cout << "d x_T / d u_T = " << gradients.inputs(99'999, 0, 0)
              << ", d x_T / d u_{T-10} = " << gradients.inputs(99'989, 0, 0) << '\n';

    double difference = 0;
    for (index i = 0; i < x.size(); ++i)
        difference = std::max(difference, std::abs(double(x.data()[i]) - double(sequential.trajectory.data()[i])));
    return report.ok() && difference < 1e-3 ? 0 : 1;
}
