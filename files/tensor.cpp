#include <files/tensor.hpp>

namespace deeppcr::files {

std::optional<index> element_count(const std::vector<index>& shape, index element_bytes) {
    index bytes = element_bytes;
    bool empty = false;
    for (const index size : shape) {
        if (size < 0) return std::nullopt;
        if (size == 0)
            empty = true;
        else if (__builtin_mul_overflow(bytes, size, &bytes))
            return std::nullopt;
    }
    return empty ? 0 : bytes / element_bytes;
}

std::string to_string(const std::vector<index>& shape) {
    std::string text;
    for (const index size : shape) text += (text.empty() ? "" : ",") + std::to_string(size);
    return "[" + text + "]";
}

std::string element_type(const Tensor& tensor) {
    static constexpr const char* names[] = {"float32", "float64", "int64", "uint8"};
    return names[tensor.values.index()];
}

void check_consistent(const Tensor& tensor, const std::string& argument) {
    std::visit(
        [&](const auto& values) {
            if (element_count(tensor.shape, sizeof values[0]) != index(values.size()))
                throw InvalidArgument(argument, "as many values as its shape " + to_string(tensor.shape) + " says",
                                      std::to_string(values.size()) + " values");
        },
        tensor.values);
}

}  // namespace deeppcr::files
