// Tensor: what the file formats hold, an array of numbers and its shape.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::files {

/// An array in row-major order (the last dimension is contiguous). shape {} is a single number.
struct Tensor {
    std::vector<index> shape;
    std::variant<std::vector<float>, std::vector<double>, std::vector<std::int64_t>, std::vector<std::uint8_t>> values;
};

/// Product of the dimensions; nothing where one is negative or where the product of those that are not 0, times
/// `element_bytes`, exceeds 63 bits.
std::optional<index> element_count(const std::vector<index>& shape, index element_bytes);

/// "[3,4]"
std::string to_string(const std::vector<index>& shape);

/// "float32", "float64", "int64" or "uint8"
std::string element_type(const Tensor& tensor);

/// Throws InvalidArgument unless there are as many values as the shape says.
void check_consistent(const Tensor& tensor, const std::string& argument);

}  // namespace deeppcr::files
