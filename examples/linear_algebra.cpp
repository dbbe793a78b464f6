// Only the linear algebra: x_t = A_t x_{t-1} + b_t by parallel cyclic reduction, and its transpose.
#include <cmath>
#include <iostream>

#include <deeppcr/deeppcr.hpp>

using namespace deeppcr;

static double inner_product(const Buffer<double>& a, const Buffer<double>& b) {
    double sum = 0;
    for (index i = 0; i < a.size(); ++i) sum += a.data()[i] * b.data()[i];
    return sum;
}

int main() {
    const Shape shape{.steps = 1000, .batch = 2, .width = 3};
    const auto A = Buffer<double>::random({shape.steps, shape.batch, 3 * 3}, /*seed=*/1);
    const auto b = Buffer<double>::random(shape, /*seed=*/2), c = Buffer<double>::random(shape, /*seed=*/3);
    for (index i = 0; i < A.size(); ++i) A.data()[i] *= 0.3;  // so that products of the A_t stay bounded

    const BidiagonalSystem<double> system{.subdiagonal = Jacobian<double>(A.data(), shape, /*block=*/3),
                                          .right_side = b.view()};
    const Buffer<double> x(shape), y(shape);
    solve(system, x, {.method = Reduction::pcr});
    solve_transposed<double>({system.subdiagonal, c.view()}, y, {.method = Reduction::pcr});

    // The solution is a linear map of b: x = S b. Its transpose, applied to any c, satisfies <c, S b> = <S^T c, b>.
    const double forward = inner_product(c, x), backward = inner_product(y, b);
    std::cout << "<c, x> = " << forward << ", <y, b> = " << backward << '\n';
    return std::abs(forward - backward) < 1e-9 * std::abs(forward) ? 0 : 1;
}
