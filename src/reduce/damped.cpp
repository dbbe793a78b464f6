// Block elimination from the last step to the first. What the steps behind step t add to the sum is, with all of them
// at their best, a quadratic in x_t: (x' Q x) / 2 - q' x. One step further to the front it is, with
//
//     P = (1 + damping) I + Q,  h = b_t + q           x_t = P^-1 (h + A_t x_{t-1})
//     Q <- A' P^-1 (damping A + Q A),  q <- -A' P^-1 (damping b_t + Q b_t - q)
//
// (A' for the transpose), written so that nothing cancels and that damping 0 leaves Q = q = 0: then x_t = b_t + A_t
// x_{t-1}. The pass back to the front fills in x_t. For several chunks at once, a chunk's quadratic also depends on the
// state x_r of its own last step, which is fixed afterwards:
//
//     (x' Q x) / 2 - q' x - x' R x_r + (x_r' W x_r) / 2 - w' x_r        x the state before the chunk
//
//        chunk 1         chunk 2         chunk 3
//     o o o o o o r | o o o o o o r | o o o o o o r       1. every chunk's Q, q, R, W, w     (side by side)
//                 r ------------- r ------------- r       2. the states r from these         (a short serial pass)
//     x x x x x x r   x x x x x x r   x x x x x x r       3. every chunk again, from its r   (side by side)

#include "reduce/damped.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "device/threads.hpp"

namespace deeppcr::reduce {
namespace {

constexpr index bytes_per_chunk = index(64) << 20;  // of factors that a chunk keeps between its two passes
constexpr index shortest_chunk = 64;                // steps

/// Small dense algebra with a size known to the compiler, or (0) not. Matrices are row-major.
template <int fixed>
struct Algebra {
    explicit Algebra(index size) : dynamic(size) {}
    index dynamic;
    index n() const { return fixed > 0 ? fixed : dynamic; }

    /// Replaces the lower triangle of a symmetric positive definite matrix by its Cholesky factor.
    void factorise(double* a) const {
        for (index i = 0; i < n(); ++i)
            for (index j = 0; j <= i; ++j) {
                double sum = a[i * n() + j];
                for (index k = 0; k < j; ++k) sum -= a[i * n() + k] * a[j * n() + k];
                if (i == j)
                    a[i * n() + i] = std::sqrt(std::max(sum, std::numeric_limits<double>::min()));
                else
                    a[i * n() + j] = sum / a[j * n() + j];
            }
    }
    /// Solves with the factor, in place, for `columns` right sides: b is [n, columns].
    void solve(const double* factor, double* b, index columns) const {
        for (index i = 0; i < n(); ++i) {
            double* row = b + i * columns;
            for (index k = 0; k < i; ++k) subtract(row, b + k * columns, factor[i * n() + k], columns);
            for (index c = 0; c < columns; ++c) row[c] /= factor[i * n() + i];
        }
        for (index i = n() - 1; i >= 0; --i) {
            double* row = b + i * columns;
            for (index k = i + 1; k < n(); ++k) subtract(row, b + k * columns, factor[k * n() + i], columns);
            for (index c = 0; c < columns; ++c) row[c] /= factor[i * n() + i];
        }
    }
    /// c = a b (a [n,n], b and c [n, columns]).
    void multiply(const double* a, const double* b, double* c, index columns) const {
        for (index i = 0; i < n(); ++i) {
            std::fill_n(c + i * columns, columns, 0.0);
            for (index k = 0; k < n(); ++k) subtract(c + i * columns, b + k * columns, -a[i * n() + k], columns);
        }
    }
    /// c = a' b.
    void multiply_transposed(const double* a, const double* b, double* c, index columns) const {
        std::fill_n(c, n() * columns, 0.0);
        for (index k = 0; k < n(); ++k)
            for (index i = 0; i < n(); ++i) subtract(c + i * columns, b + k * columns, -a[k * n() + i], columns);
    }
    void symmetrise(double* a) const {
        for (index i = 0; i < n(); ++i)
            for (index j = 0; j < i; ++j) a[i * n() + j] = a[j * n() + i] = (a[i * n() + j] + a[j * n() + i]) / 2;
    }

private:
    static void subtract(double* to, const double* from, double factor, index count) {
        for (index c = 0; c < count; ++c) to[c] -= factor * from[c];
    }
};

/// What a chunk, or all chunks behind it, add to the sum. `spike`: with R, W and w.
struct Quadratic {
    explicit Quadratic(index n, bool spike)
        : Q(std::size_t(n * n), 0.0), q(std::size_t(n), 0.0), R(spike ? Q : std::vector<double>()), W(R), w(q) {}
    std::vector<double> Q, q, R, W, w;
};

/// One sequence's one block of channels.
template <class T, int fixed>
class DampedSystem {
public:
    DampedSystem(const Jacobian<const T>& subdiagonal, const View<T>& solution, index sequence, index block,
                 double damping)
        : algebra_(subdiagonal.block()),
          subdiagonal_(subdiagonal),
          solution_(solution),
          sequence_(sequence),
          block_(block),
          damping_(damping) {}

    index n() const { return algebra_.n(); }

    /// A chunk's quadratic in the state before it and its own last state.
    Quadratic summarise(index first, index last) const {
        Quadratic value(n(), true);
        Scratch scratch(n());
        // The last step: |x_r - A x - b|^2 + damping |x_r|^2.
        read(last - 1, scratch);
        algebra_.multiply_transposed(scratch.A.data(), scratch.A.data(), value.Q.data(), n());
        algebra_.multiply_transposed(scratch.A.data(), scratch.b.data(), value.q.data(), 1);
        for (double& number : value.q) number = -number;
        for (index i = 0; i < n(); ++i) {
            for (index j = 0; j < n(); ++j) value.R[std::size_t(i * n() + j)] = scratch.A[std::size_t(j * n() + i)];
            value.W[std::size_t(i * n() + i)] = 1 + damping_;
        }
        value.w = scratch.b;
        for (index t = last - 2; t >= first; --t) {
            read(t, scratch);
            prepare(value, scratch);
            // W <- W - R' P^-1 R,  w <- w + R' P^-1 h,  R <- A' P^-1 R
            scratch.V = value.R;
            algebra_.solve(scratch.P.data(), scratch.V.data(), n());
            algebra_.multiply_transposed(value.R.data(), scratch.V.data(), scratch.Y.data(), n());
            for (std::size_t i = 0; i < value.W.size(); ++i) value.W[i] -= scratch.Y[i];
            algebra_.multiply_transposed(scratch.V.data(), scratch.h.data(), scratch.y.data(), 1);
            for (std::size_t i = 0; i < value.w.size(); ++i) value.w[i] += scratch.y[i];
            algebra_.multiply_transposed(scratch.A.data(), scratch.V.data(), value.R.data(), n());
            pass_on(value, scratch);
        }
        return value;
    }

    /// The states of a chunk, given what the steps behind it add, and the state before it (null: zero).
    void fill(index first, index last, Quadratic value, const double* before) const {
        Scratch scratch(n());
        const index count = last - first;
        std::vector<double> factors(std::size_t(count * n() * n())), sides(std::size_t(count * n()));
        for (index t = last - 1; t >= first; --t) {
            read(t, scratch);
            prepare(value, scratch);
            std::copy_n(scratch.P.data(), n() * n(), factors.data() + (t - first) * n() * n());
            std::copy_n(scratch.h.data(), n(), sides.data() + (t - first) * n());
            if (t > first) pass_on(value, scratch);
        }
        std::vector<double> state(std::size_t(n()), 0.0);
        if (before != nullptr) std::copy_n(before, n(), state.data());
        for (index t = first; t < last; ++t) {
            read(t, scratch);
            algebra_.multiply(scratch.A.data(), state.data(), scratch.y.data(), 1);
            for (index k = 0; k < n(); ++k)
                state[std::size_t(k)] = sides[std::size_t((t - first) * n() + k)] + scratch.y[std::size_t(k)];
            algebra_.solve(factors.data() + (t - first) * n() * n(), state.data(), 1);
            T* const to = solution_.at(t, sequence_) + block_ * n();
            for (index k = 0; k < n(); ++k) to[k] = T(state[std::size_t(k)]);
        }
    }

    /// Whole chunks: value becomes what chunk and everything behind add, `value` having been that of what is behind.
    /// Keeps what `last_state` needs in the chunk's own quadratic: W factorised and w + q.
    void join(Quadratic& chunk, Quadratic& value) const {
        for (std::size_t i = 0; i < chunk.W.size(); ++i) chunk.W[i] += value.Q[i];
        for (std::size_t i = 0; i < chunk.w.size(); ++i) chunk.w[i] += value.q[i];
        algebra_.factorise(chunk.W.data());
        std::vector<double> transposed(chunk.R.size()), product(chunk.R.size()), side = chunk.w, image(side.size());
        for (index i = 0; i < n(); ++i)
            for (index j = 0; j < n(); ++j) transposed[std::size_t(i * n() + j)] = chunk.R[std::size_t(j * n() + i)];
        std::vector<double> solved = transposed;
        algebra_.solve(chunk.W.data(), solved.data(), n());
        algebra_.multiply(chunk.R.data(), solved.data(), product.data(), n());
        algebra_.solve(chunk.W.data(), side.data(), 1);
        algebra_.multiply(chunk.R.data(), side.data(), image.data(), 1);
        for (std::size_t i = 0; i < value.Q.size(); ++i) value.Q[i] = chunk.Q[i] - product[i];
        for (std::size_t i = 0; i < value.q.size(); ++i) value.q[i] = chunk.q[i] + image[i];
        algebra_.symmetrise(value.Q.data());
    }

    /// The last state of a joined chunk from the state before it.
    void last_state(const Quadratic& chunk, const double* before, double* state) const {
        algebra_.multiply_transposed(chunk.R.data(), before, state, 1);
        for (index k = 0; k < n(); ++k) state[k] += chunk.w[std::size_t(k)];
        algebra_.solve(chunk.W.data(), state, 1);
    }

private:
    struct Scratch {
        explicit Scratch(index n) : A(std::size_t(n * n)), P(A), Y(A), V(A), b(std::size_t(n)), h(b), y(b) {}
        std::vector<double> A, P, Y, V, b, h, y;
    };

    void read(index t, Scratch& scratch) const {
        const T* const b = solution_.at(t, sequence_) + block_ * n();
        for (index k = 0; k < n(); ++k) scratch.b[std::size_t(k)] = double(b[k]);
        if (t == 0) return std::fill(scratch.A.begin(), scratch.A.end(), 0.0);
        const T* const a = subdiagonal_.at(t, sequence_) + block_ * n() * n();
        for (index k = 0; k < n() * n(); ++k) scratch.A[std::size_t(k)] = double(a[k]);
    }
    /// P, factorised, and h.
    void prepare(const Quadratic& value, Scratch& scratch) const {
        scratch.P = value.Q;
        for (index i = 0; i < n(); ++i) scratch.P[std::size_t(i * n() + i)] += 1 + damping_;
        algebra_.factorise(scratch.P.data());
        for (index k = 0; k < n(); ++k) scratch.h[std::size_t(k)] = scratch.b[std::size_t(k)] + value.q[std::size_t(k)];
    }
    /// Q and q for the state before.
    void pass_on(Quadratic& value, Scratch& scratch) const {
        algebra_.multiply(value.Q.data(), scratch.b.data(), scratch.y.data(), 1);
        for (std::size_t k = 0; k < scratch.y.size(); ++k)
            scratch.y[k] = value.q[k] - scratch.y[k] - damping_ * scratch.b[k];
        algebra_.solve(scratch.P.data(), scratch.y.data(), 1);
        algebra_.multiply_transposed(scratch.A.data(), scratch.y.data(), value.q.data(), 1);
        algebra_.multiply(value.Q.data(), scratch.A.data(), scratch.Y.data(), n());
        for (std::size_t i = 0; i < scratch.Y.size(); ++i) scratch.Y[i] += damping_ * scratch.A[i];
        algebra_.solve(scratch.P.data(), scratch.Y.data(), n());
        algebra_.multiply_transposed(scratch.A.data(), scratch.Y.data(), value.Q.data(), n());
        algebra_.symmetrise(value.Q.data());
    }

    Algebra<fixed> algebra_;
    const Jacobian<const T>& subdiagonal_;
    const View<T>& solution_;
    index sequence_, block_;
    double damping_;
};

template <int fixed, class T>
void solve_sized(const Jacobian<const T>& subdiagonal, const View<T>& solution, std::span<const double> damping,
                 index chunk, int threads) {
    const index steps = solution.steps(), n = subdiagonal.block(), blocks = solution.width() / n;
    const index systems = solution.batch() * blocks;
    if (chunk <= 0) {
        const index wanted = systems >= threads ? 1 : 2 * threads / systems;
        const index longest = std::max<index>(1, bytes_per_chunk / (index(sizeof(double)) * n * (n + 1)));
        chunk = std::clamp<index>((steps + wanted - 1) / wanted, std::min(shortest_chunk, longest), longest);
    }
    const index chunks = (steps + chunk - 1) / chunk;
    const auto system = [&](index s) {
        return DampedSystem<T, fixed>(subdiagonal, solution, s / blocks, s % blocks, damping[std::size_t(s / blocks)]);
    };
    const auto first_of = [&](index c) { return steps * c / chunks; };
    const auto each = [&](index count, const auto& body) {
        device::parallel_ranges(threads, count, 1, [&](index begin, index end) {
            for (index i = begin; i < end; ++i) body(i);
        });
    };
    // What is behind each chunk, and the state before it.
    std::vector<Quadratic> summaries, behind;
    for (index i = 0; i < systems * chunks; ++i) {
        summaries.emplace_back(chunks > 1 ? n : 0, chunks > 1);
        behind.emplace_back(n, false);
    }
    std::vector<double> before(std::size_t(systems * chunks * n), 0.0);
    if (chunks > 1) {
        each(systems * chunks, [&](index i) {
            summaries[std::size_t(i)] = system(i / chunks).summarise(first_of(i % chunks), first_of(i % chunks + 1));
        });
        each(systems, [&](index s) {
            const auto here = system(s);
            Quadratic value(n, false);
            for (index c = chunks - 1; c >= 0; --c) {
                behind[std::size_t(s * chunks + c)] = value;
                here.join(summaries[std::size_t(s * chunks + c)], value);
            }
            for (index c = 0; c + 1 < chunks; ++c)
                here.last_state(summaries[std::size_t(s * chunks + c)], before.data() + (s * chunks + c) * n,
                                before.data() + (s * chunks + c + 1) * n);
        });
    }
    each(systems * chunks, [&](index i) {
        system(i / chunks)
            .fill(first_of(i % chunks), first_of(i % chunks + 1), behind[std::size_t(i)], before.data() + i * n);
    });
}

}  // namespace

template <class T>
void solve_damped(const Jacobian<const T>& subdiagonal, const View<T>& solution, std::span<const double> damping,
                  index chunk, int threads) {
    if (solution.empty()) return;
    switch (subdiagonal.block()) {
        case 1:
            return solve_sized<1>(subdiagonal, solution, damping, chunk, threads);
        case 2:
            return solve_sized<2>(subdiagonal, solution, damping, chunk, threads);
        case 4:
            return solve_sized<4>(subdiagonal, solution, damping, chunk, threads);
        default:
            return solve_sized<0>(subdiagonal, solution, damping, chunk, threads);
    }
}
template void solve_damped(const Jacobian<const float>&, const View<float>&, std::span<const double>, index, int);
template void solve_damped(const Jacobian<const double>&, const View<double>&, std::span<const double>, index, int);

}  // namespace deeppcr::reduce
