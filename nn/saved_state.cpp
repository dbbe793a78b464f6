#include "nn/saved_state.hpp"

#include <ATen/ops/empty.h>

#include <cstdio>
#include <cstring>
#include <variant>
#include <vector>

#include <files/safetensors.hpp>

#include "nn/tensors.hpp"

namespace deeppcr::nn {
namespace {

files::Tensor to_file(const at::Tensor& tensor) {
    const at::Tensor values = tensor.detach().cpu().contiguous();
    files::Tensor result{values.sizes().vec(), {}};
    const auto fill = [&]<class T>(T) {
        result.values = std::vector<T>(values.data_ptr<T>(), values.data_ptr<T>() + values.numel());
    };
    switch (values.scalar_type()) {
        case at::kFloat:
            fill(float());
            break;
        case at::kDouble:
            fill(double());
            break;
        case at::kLong:
            fill(std::int64_t());
            break;
        case at::kByte:
            fill(std::uint8_t());
            break;
        default:
            throw InvalidArgument("tensor", "float, double, 64-bit integers or bytes",
                                  c10::toString(values.scalar_type()));
    }
    return result;
}

at::Tensor from_file(const files::Tensor& tensor) {
    return std::visit(
        [&]<class T>(const std::vector<T>& values) {
            at::Tensor result = at::empty(tensor.shape, c10::CppTypeToScalarType<T>::value);
            if (!values.empty()) std::memcpy(result.data_ptr<T>(), values.data(), values.size() * sizeof(T));
            return result;
        },
        tensor.values);
}

const std::string checksum_key = "checksum";

std::string checksum_text(const files::Safetensors& contents) {
    char text[16];
    std::snprintf(text, sizeof text, "%08x", unsigned(files::checksum(contents, checksum_key)));
    return text;
}

files::Safetensors read_whole(const std::filesystem::path& path) {
    files::Safetensors contents = files::read_safetensors(path);
    const auto found = contents.metadata.find(checksum_key);
    if (found != contents.metadata.end() && found->second != checksum_text(contents))
        throw FileError(path, "checksum " + found->second, checksum_text(contents) + ": it is damaged");
    return contents;
}

std::filesystem::path previous(const std::filesystem::path& path) { return path.string() + ".previous"; }

}  // namespace

const at::Tensor& find(const std::filesystem::path& path, const SavedTensors& tensors, const std::string& name,
                       const at::Tensor& like) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw FileError(path, "tensor " + name, "none");
    const at::Tensor& tensor = found->second;
    if (tensor.sizes() != like.sizes() || tensor.scalar_type() != like.scalar_type())
        throw FileError(path, type_and_shape(like) + " as " + name, type_and_shape(tensor));
    return tensor;
}

void write_state(const std::filesystem::path& path, const SavedState& state) {
    files::Safetensors contents;
    contents.metadata = state.metadata;
    for (const auto& [name, tensor] : state.tensors) contents.tensors.emplace(name, to_file(tensor));
    contents.metadata[checksum_key] = checksum_text(contents);
    files::write_safetensors(path, contents);
}

void write_state_and_keep_previous(const std::filesystem::path& path, const SavedState& state) {
    std::error_code error;
    if (std::filesystem::is_regular_file(path, error)) {
        // A second name for the old file: at no time is there neither an old nor a new one.
        std::filesystem::remove(previous(path), error);
        std::filesystem::create_hard_link(path, previous(path), error);
        if (error) std::filesystem::copy_file(path, previous(path), error);
    }
    write_state(path, state);
}

SavedState read_state(const std::filesystem::path& path, const std::string& format) {
    const files::Safetensors contents = read_whole(path);
    SavedState state;
    state.metadata = {contents.metadata.begin(), contents.metadata.end()};
    const auto found = state.metadata.find("format");
    if (found == state.metadata.end())
        throw FileError(path, "metadata \"format\"", "none: not a checkpoint of deeppcr train");
    if (found->second != format) throw FileError(path, "format \"" + format + "\"", '"' + found->second + '"');
    for (const auto& [name, tensor] : contents.tensors) state.tensors.emplace(name, from_file(tensor));
    return state;
}

SavedState read_state_or_previous(const std::filesystem::path& path, const std::string& format, std::string& note) {
    try {
        return read_state(path, format);
    } catch (const FileError& damage) {
        std::error_code error;
        if (!std::filesystem::exists(path, error) || !std::filesystem::exists(previous(path), error)) throw;
        SavedState state = read_state(previous(path), format);
        note = std::string(damage.what()) + "; " + previous(path).string() + " is used instead";
        return state;
    }
}

std::string format_of(const std::filesystem::path& path) {
    const auto metadata = files::read_safetensors(path).metadata;
    const auto found = metadata.find("format");
    return found == metadata.end() ? std::string() : found->second;
}

}  // namespace deeppcr::nn
