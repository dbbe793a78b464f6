// The built-in cells. x, u, p: states, inputs and parameters of one channel, in the order that each names.
#pragma once

#include <deeppcr/cell.hpp>

namespace deeppcr {

/// Gated recurrent unit with diagonal recurrent weights (ParaRNN, arXiv 2510.21450, section 3.3). State h, inputs
/// u_z, u_r, u_h (projections with their biases), parameters a_z, a_r, a_h:
///     z = sigmoid(a_z h + u_z),  r = sigmoid(a_r h + u_r),  c = tanh(a_h (r h) + u_h),  h' = (1 - z) h + z c
struct ParaGRU {
    static constexpr const char* name = "ParaGRU";
    static constexpr int states = 1, inputs = 3, parameters = 3;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 3> u, std::array<S, 3> p) {
        const S h = x[0], z = sigmoid(p[0] * h + u[0]), r = sigmoid(p[1] * h + u[1]);
        return {h + z * (tanh(p[2] * (r * h) + u[2]) - h)};
    }
};

/// Long short-term memory with coupled input and forget gates and peepholes, diagonal (ParaRNN, arXiv 2510.21450,
/// section 3.3). States c, h; inputs u_f, u_o, u_c; parameters a_f, a_o, a_c (of h) and the peepholes b_f, b_o (of c):
///     f = sigmoid(a_f h + b_f c + u_f),  n = tanh(a_c h + u_c),  c' = f c + (1 - f) n,
///     o = sigmoid(a_o h + b_o c' + u_o),  h' = o tanh(c')
struct ParaLSTM {
    static constexpr const char* name = "ParaLSTM";
    static constexpr int states = 2, inputs = 3, parameters = 5;
    template <class S>
    static constexpr std::array<S, 2> step(std::array<S, 2> x, std::array<S, 3> u, std::array<S, 5> p) {
        const S c = x[0], h = x[1];
        const S f = sigmoid(p[0] * h + p[3] * c + u[0]), n = tanh(p[2] * h + u[2]);
        const S next = n + f * (c - n);
        const S o = sigmoid(p[1] * h + p[4] * next + u[1]);
        return {next, o * tanh(next)};
    }
};

/// Elman's network (1990) with diagonal recurrent weights. State h, input u, parameter a: h' = tanh(a h + u)
struct DiagonalElman {
    static constexpr const char* name = "DiagonalElman";
    static constexpr int states = 1, inputs = 1, parameters = 1;
    template <class S>
    static constexpr std::array<S, 1> step(std::array<S, 1> x, std::array<S, 1> u, std::array<S, 1> p) {
        return {tanh(p[0] * x[0] + u[0])};
    }
};

/// sLSTM with exponential gating and its stabiliser, recurrent weights diagonal (xLSTM, arXiv 2405.04517, eqs. 8-17).
/// States c, n, m, h; inputs u_i, u_f, u_z, u_o; parameters r_i, r_f, r_z, r_o. With i, f, z, o short for r_i h + u_i
/// and so on, and log sigmoid(f) = -softplus(-f):
///     m' = max(log sigmoid(f) + m, i),  I = exp(i - m'),  F = exp(log sigmoid(f) + m - m'),
///     c' = F c + I tanh(z),  n' = F n + I,  h' = sigmoid(o) c' / n'
/// where the division takes at least 1e-30 for n', so that a weight that has underflowed gives h' = 0, not NaN.
struct SLSTM {
    static constexpr const char* name = "SLSTM";
    static constexpr int states = 4, inputs = 4, parameters = 4;
    template <class S>
    static constexpr std::array<S, 4> step(std::array<S, 4> x, std::array<S, 4> u, std::array<S, 4> p) {
        const S c = x[0], n = x[1], m = x[2], h = x[3];
        const S i = p[0] * h + u[0], f = -softplus(-(p[1] * h + u[1])) + m;
        const S larger = max(f, i), input = exp(i - larger), forget = exp(f - larger);
        const S cell = forget * c + input * tanh(p[2] * h + u[2]), weight = forget * n + input;
        return {cell, weight, larger, sigmoid(p[3] * h + u[3]) * (cell / max(weight, S(1e-30F)))};
    }
};

namespace cell {
// Compiled in the library, not wherever they are used.
#define DEEPPCR_KERNELS_OF(cell)                                     \
    extern template const Kernels<float>& kernels_of<cell, float>(); \
    extern template const Kernels<double>& kernels_of<cell, double>();
DEEPPCR_KERNELS_OF(ParaGRU)
DEEPPCR_KERNELS_OF(ParaLSTM)
DEEPPCR_KERNELS_OF(DiagonalElman)
DEEPPCR_KERNELS_OF(SLSTM)
#undef DEEPPCR_KERNELS_OF
}  // namespace cell

}  // namespace deeppcr
