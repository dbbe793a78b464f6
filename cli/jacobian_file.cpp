#include "jacobian_file.hpp"

#include <cmath>

#include <files/error.hpp>
#include <files/tensor.hpp>

namespace deeppcr::program {

BlockShape block_shape_of(const std::string& file, const std::vector<index>& shape) {
    const std::size_t dimensions = shape.size();
    const bool square = dimensions < 4 || shape[dimensions - 1] == shape[dimensions - 2];
    if (dimensions < 3 || dimensions > 5 || !square)
        throw FileError(file, "shape [T,B,D], [T,B,D,D] or [T,B,D/K,K,K]", files::to_string(shape));
    if (dimensions == 5) return {{shape[0], shape[1], shape[2] * shape[3]}, shape[3]};
    return {{shape[0], shape[1], shape[2]}, dimensions == 4 ? shape[2] : 1};
}

template <class T>
void refuse_if_not_finite(const std::string& file, const std::vector<T>& values, const std::vector<index>& shape) {
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (std::isfinite(values[i])) continue;
        std::vector<index> position(shape.size());
        for (std::size_t d = shape.size(), rest = i; d-- > 0; rest /= std::size_t(shape[d]))
            position[d] = index(rest % std::size_t(shape[d]));
        throw FileError(file, "finite numbers", std::to_string(values[i]) + " at " + files::to_string(position));
    }
}
template void refuse_if_not_finite(const std::string&, const std::vector<float>&, const std::vector<index>&);
template void refuse_if_not_finite(const std::string&, const std::vector<double>&, const std::vector<index>&);

}  // namespace deeppcr::program
