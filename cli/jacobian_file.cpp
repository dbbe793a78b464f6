#include "jacobian_file.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace deeppcr::program {
namespace {

std::string type_name(bool float64) { return float64 ? "float64" : "float32"; }

}  // namespace

BlockShape block_shape_of(const std::string& file, const std::vector<index>& shape) {
    const std::size_t dimensions = shape.size();
    const bool square = dimensions < 4 || shape[dimensions - 1] == shape[dimensions - 2];
    if (dimensions < 3 || dimensions > 5 || !square)
        throw FileError(file, "shape [T,B,D], [T,B,D,D] or [T,B,D/K,K,K]", files::to_string(shape));
    if (dimensions == 5) return {{shape[0], shape[1], shape[2] * shape[3]}, shape[3]};
    return {{shape[0], shape[1], shape[2]}, dimensions == 4 ? shape[2] : 1};
}

void refuse_if_not_matching(const std::string& right_side_file, const files::NpyHeader& right_side,
                            const std::string& subdiagonal_file, const files::NpyHeader& subdiagonal) {
    const Shape states = block_shape_of(subdiagonal_file, subdiagonal.shape).states;
    if (right_side.shape != std::vector<index>{states.steps, states.batch, states.width})
        throw Error(right_side_file + " has shape " + files::to_string(right_side.shape) + ", expected " +
                    to_string(states) + " to match " + subdiagonal_file + " " + files::to_string(subdiagonal.shape));
    if (right_side.float64 != subdiagonal.float64)
        throw Error(right_side_file + " has element type " + type_name(right_side.float64) + ", expected " +
                    type_name(subdiagonal.float64) + " to match " + subdiagonal_file);
}

void refuse_if_too_large(const std::string& what, std::initializer_list<Copies> needed) {
    index bytes = 0;
    for (const Copies& copies : needed) {
        index more = 0;
        if (__builtin_mul_overflow(copies.bytes, copies.count, &more) || __builtin_add_overflow(bytes, more, &bytes)) {
            bytes = std::numeric_limits<index>::max();
            break;
        }
    }
    if (const index available = available_memory(); bytes > available)
        throw OutOfMemory(what + " needs " + std::to_string(bytes) + " bytes of memory, and " +
                          std::to_string(available) + " are available");
}

template <class T, class U>
void refuse_if_not_finite(const std::string& file, const std::vector<U>& values, const std::vector<index>& shape) {
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (std::abs(double(values[i])) <= double(std::numeric_limits<T>::max())) continue;
        std::vector<index> position(shape.size());
        for (std::size_t d = shape.size(), rest = i; d-- > 0; rest /= std::size_t(shape[d]))
            position[d] = index(rest % std::size_t(shape[d]));
        std::ostringstream actual;
        actual << values[i] << " at " << files::to_string(position);
        throw FileError(file,
                        std::isfinite(values[i]) ? "numbers in the range of " + type_name(sizeof(T) == sizeof(double))
                                                 : "finite numbers",
                        actual.str());
    }
}

template <class T>
std::vector<T> read_finite(const std::string& file) {
    files::Tensor tensor = files::read_npy(file);
    auto& values = std::get<std::vector<T>>(tensor.values);
    refuse_if_not_finite<T>(file, values, tensor.shape);
    return std::move(values);
}

template <class T>
Residual residual_of(const BidiagonalSystem<T>& system, View<const T> solution, bool transposed) {
    Residual residual;
    const index block = system.subdiagonal.block();
    for (index step = 0; step < solution.steps(); ++step) {
        const index before = transposed ? step + 1 : step - 1;
        const bool coupled = before >= 0 && before < solution.steps();
        for (index sequence = 0; sequence < solution.batch(); ++sequence) {
            double largest = 0, scale_x = 0, scale_product = 0, scale_b = 0;
            for (index row = 0; row < solution.width(); ++row) {
                double product = 0;
                const index first = row - row % block;
                for (index column = first; coupled && column < first + block; ++column)
                    product += double(transposed ? system.subdiagonal(before, sequence, column, row)
                                                 : system.subdiagonal(step, sequence, row, column)) *
                               double(solution(before, sequence, column));
                const double x = solution(step, sequence, row), b = system.right_side(step, sequence, row);
                const double difference = std::abs(x - product - b);
                if (!std::isfinite(difference)) return {std::nan(""), std::nan("")};
                largest = std::max(largest, difference);
                scale_x = std::max(scale_x, std::abs(x));
                scale_product = std::max(scale_product, std::abs(product));
                scale_b = std::max(scale_b, std::abs(b));
            }
            residual.largest = std::max(residual.largest, largest);
            if (largest > 0)
                residual.relative = std::max(residual.relative, largest / (scale_x + scale_product + scale_b));
        }
    }
    residual.small = residual.relative <= std::sqrt(double(std::numeric_limits<T>::epsilon()));
    return residual;
}

template void refuse_if_not_finite<float>(const std::string&, const std::vector<float>&, const std::vector<index>&);
template void refuse_if_not_finite<float>(const std::string&, const std::vector<double>&, const std::vector<index>&);
template void refuse_if_not_finite<double>(const std::string&, const std::vector<float>&, const std::vector<index>&);
template void refuse_if_not_finite<double>(const std::string&, const std::vector<double>&, const std::vector<index>&);
template std::vector<float> read_finite(const std::string&);
template std::vector<double> read_finite(const std::string&);
template Residual residual_of(const BidiagonalSystem<float>&, View<const float>, bool);
template Residual residual_of(const BidiagonalSystem<double>&, View<const double>, bool);

}  // namespace deeppcr::program
