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

files::Safetensors to_file(const SavedState& state) {
    files::Safetensors contents;
    contents.metadata = state.metadata;
    for (const auto& [name, tensor] : state.tensors) contents.tensors.emplace(name, to_file(tensor));
    return contents;
}

SavedState from_file(const std::filesystem::path& path, const files::Safetensors& contents, const std::string& format) {
    SavedState state;
    state.metadata = {contents.metadata.begin(), contents.metadata.end()};
    const auto found = state.metadata.find("format");
    if (found == state.metadata.end())
        throw FileError(path, "metadata \"format\"", "none: not a checkpoint of deeppcr train");
    if (found->second != format) throw FileError(path, "format \"" + format + "\"", '"' + found->second + '"');
    for (const auto& [name, tensor] : contents.tensors) state.tensors.emplace(name, from_file(tensor));
    return state;
}

std::string checksum_text(const files::Safetensors& contents) {
    char text[16];
    std::snprintf(text, sizeof text, "%08x", unsigned(files::checksum(contents)));
    return text;
}

/// Throws FileError also where there is a checksum that does not match.
files::Safetensors read_whole(const std::filesystem::path& path) {
    files::Safetensors contents = files::read_safetensors(path);
    const auto written = contents.metadata.find("checksum");
    if (const std::string found = checksum_text(contents);
        written != contents.metadata.end() && written->second != found)
        throw FileError(path, "checksum " + written->second, found + ": the file is corrupt");
    return contents;
}

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
    files::Safetensors contents = to_file(state);
    contents.metadata["checksum"] = checksum_text(contents);
    files::write_safetensors(path, contents);
}

SavedState read_state(const std::filesystem::path& path, const std::string& format) {
    return from_file(path, read_whole(path), format);
}

void SavedStates::save(const SavedState& state) {
    const std::filesystem::path next = path_.string() + ".next", previous = path_.string() + ".previous";
    std::error_code error;
    if (whole_) {
        write_state(next, state);
        std::filesystem::rename(path_, previous, error);
        if (!error) std::filesystem::rename(next, path_, error);
        if (error) throw FileError(path_, "cannot be replaced: " + error.message());
    } else {
        write_state(path_, state);
        std::filesystem::remove(previous, error);  // of another training, or what this one went on from
    }
    whole_ = true;
}

SavedState SavedStates::load(const std::string& format, const std::function<void(const std::string&)>& note) {
    try {
        SavedState state = read_state(path_, format);
        whole_ = true;
        return state;
    } catch (const FileError& problem) {
        const std::filesystem::path previous = path_.string() + ".previous";
        std::error_code error;
        if (!std::filesystem::exists(previous, error)) throw;
        SavedState state;
        try {
            state = read_state(previous, format);
        } catch (const FileError&) {
            throw problem;
        }
        if (note) note(std::string(problem.what()) + "; " + previous.string() + " is used in its place");
        return state;
    }
}

SavedState SavedStates::load_from(const std::filesystem::path& from, const std::string& format,
                                  const std::function<void(const std::string&)>& note) {
    std::error_code error;
    if (std::filesystem::equivalent(path_, from, error) && !error) return load(format, note);
    return SavedStates(from).load(format, note);
}

void check_continues(const Metadata& wanted, const Metadata& saved, const std::string& free) {
    for (const auto& [name, value] : saved)
        if (name != free && wanted.at(name) != value)
            throw InvalidArgument(name, value + ", as in the checkpoint", wanted.at(name));
}

std::string format_of(const std::filesystem::path& path) {
    const auto metadata = files::read_safetensors(path).metadata;
    const auto found = metadata.find("format");
    return found == metadata.end() ? std::string() : found->second;
}

}  // namespace deeppcr::nn
