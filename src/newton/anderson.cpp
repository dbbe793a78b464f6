#include "newton/anderson.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "device/threads.hpp"
#include "newton/options.hpp"

namespace deeppcr::newton {
namespace {

constexpr double ridge = 1e-10;         // of the Gram matrix's diagonal: parallel updates must not divide by zero
constexpr double largest_weight = 1e4;  // beyond, the step takes its plain update
constexpr std::size_t most = std::size_t(most_anderson);
using Matrix = std::array<std::array<double, most>, most>;
using Vector = std::array<double, most>;

/// Solves the symmetric positive definite system of the first n equations; false where it cannot.
bool solve_normal(Matrix a, Vector& x, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        if (a[i][i] <= 0) a[i][i] = 1;  // a pass that changed nothing up to here
        a[i][i] *= 1 + ridge;
    }
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            double sum = a[i][j];
            for (std::size_t k = 0; k < j; ++k) sum -= a[i][k] * a[j][k];
            if (i == j && !(sum > 0)) return false;
            a[i][j] = i == j ? std::sqrt(sum) : sum / a[j][j];
        }
        for (std::size_t k = 0; k < i; ++k) x[i] -= a[i][k] * x[k];
        x[i] /= a[i][i];
    }
    for (std::size_t i = n; i-- > 0;) {
        for (std::size_t k = i + 1; k < n; ++k) x[i] -= a[k][i] * x[k];
        x[i] /= a[i][i];
    }
    return std::all_of(x.begin(), x.begin() + std::ptrdiff_t(n),
                       [](double weight) { return std::abs(weight) <= largest_weight; });
}

}  // namespace

template <class T>
Anderson<T>::Anderson(index depth, index elements, Workspace& workspace) : depth_(depth) {
    for (index k = 0; k < depth; ++k) {
        changes_.push_back(workspace.take<T>(elements));
        updates_.push_back(workspace.take<T>(elements));
    }
    last_states_ = workspace.take<T>(elements);
    last_update_ = workspace.take<T>(elements);
}

template <class T>
void Anderson<T>::accelerate(const Window<T>& window, const std::vector<Progress>& progress, int threads) {
    const index rows = window.update.steps(), sequences = window.update.batch(), width = window.update.width();
    const index elements = rows * sequences * width, known = known_ * sequences * width;
    const T* const states = window.states.at(1, 0);
    T* const update = window.update.data();
    if (known > 0) {
        T *const change = changes_[std::size_t(next_)], *const difference = updates_[std::size_t(next_)];
        for (index k = 0; k < elements; ++k) {
            change[k] = k < known ? states[k] - last_states_[k] : T(0);
            difference[k] = k < known ? update[k] - last_update_[k] : T(0);
        }
        next_ = (next_ + 1) % depth_;
        used_ = std::min(used_ + 1, depth_);
    }
    std::copy_n(states, elements, last_states_);
    std::copy_n(update, elements, last_update_);
    known_ = rows;
    const auto count = std::size_t(used_);
    if (count == 0) return;
    device::parallel_ranges(threads, sequences, 1, [&](index begin, index end) {
        for (index j = begin; j < end; ++j) {
            Matrix gram{};
            Vector side{};
            for (index i = progress[std::size_t(j)].confirmed; i < rows; ++i) {
                const index at = (i * sequences + j) * width;
                for (std::size_t a = 0; a < count; ++a) {
                    const T* const left = updates_[a] + at;
                    for (std::size_t b = 0; b <= a; ++b) {
                        const T* const right = updates_[b] + at;
                        double sum = 0;
                        for (index k = 0; k < width; ++k) sum += double(left[k]) * double(right[k]);
                        gram[a][b] += sum;
                    }
                    double sum = 0;
                    for (index k = 0; k < width; ++k) sum += double(left[k]) * double(last_update_[at + k]);
                    side[a] += sum;
                }
                Vector weight = side;
                if (!solve_normal(gram, weight, count)) continue;
                for (std::size_t a = 0; a < count; ++a)
                    for (index k = 0; k < width; ++k)
                        update[at + k] -= T(weight[a] * (double(changes_[a][at + k]) + double(updates_[a][at + k])));
            }
        }
    });
}

template <class T>
void Anderson<T>::slide(index shift, index rows, index row_elements) {
    known_ = std::max<index>(0, std::min(known_, rows) - shift);
    if (shift == 0) return;
    const auto move = [&](T* memory) { std::copy_n(memory + shift * row_elements, known_ * row_elements, memory); };
    for (index k = 0; k < used_; ++k) {
        move(changes_[std::size_t(k)]);
        move(updates_[std::size_t(k)]);
    }
    move(last_states_);
    move(last_update_);
}

template class Anderson<float>;
template class Anderson<double>;

}  // namespace deeppcr::newton
