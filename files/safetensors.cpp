#include <files/safetensors.hpp>

#include <zlib.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <type_traits>
#include <variant>

#include <files/read.hpp>
#include <files/write.hpp>

namespace deeppcr::files {
namespace {

using Json = nlohmann::json;

constexpr std::uint64_t longest_header = 100'000'000;
constexpr const char* metadata_key = "__metadata__";

/// Indexed as the variant of Tensor.
struct ElementType {
    const char* name;
    index bytes;
};
constexpr std::array<ElementType, 4> element_types = {{{"F32", 4}, {"F64", 8}, {"I64", 8}, {"U8", 1}}};

const ElementType& element_type_of(const Tensor& tensor) { return element_types[tensor.values.index()]; }

/// Where the header says that a tensor lies.
struct Entry {
    std::string name;
    std::size_t type = 0;
    std::vector<index> shape;
    index begin = 0, end = 0;
};

/// JSON of a hostile file, short enough for an error message.
std::string excerpt(const Json& value) {
    const std::string text = value.dump();
    return text.size() <= 80 ? text : text.substr(0, 80) + "...";
}

/// Parses the header; refuses repeated names, which the library would resolve silently, and deep nesting.
Json parse_json(const std::filesystem::path& path, const std::string& text) {
    constexpr int deepest = 3;  // header, tensor, shape
    std::array<std::set<std::string>, deepest + 1> keys;
    const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
        if (depth > deepest) throw FileError(path, "a header nested at most 3 deep", "deeper nesting");
        if (event == Json::parse_event_t::object_start && depth < deepest) keys[std::size_t(depth) + 1].clear();
        if (event == Json::parse_event_t::key && !keys[std::size_t(depth)].insert(value.get<std::string>()).second)
            throw FileError(path, "each name once in the header", excerpt(value) + " again");
        return true;
    };
    try {
        return Json::parse(text, watch);
    } catch (const Json::exception& error) {
        throw FileError(path, "the header is not JSON: " + std::string(error.what()));
    }
}

index whole_number(const std::filesystem::path& path, const std::string& name, const Json& value) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::uint64_t(std::numeric_limits<index>::max()))
        throw FileError(path, "whole numbers in shape and data_offsets of tensor " + name, excerpt(value));
    return value.get<index>();
}

Entry parse_entry(const std::filesystem::path& path, const std::string& key, const Json& value) {
    Entry entry{key, 0, {}, 0, 0};
    const std::string name = excerpt(key);
    const auto member = [&](const char* what) {
        if (!value.is_object() || !value.contains(what) || value.size() != 3)
            throw FileError(path, "dtype, shape and data_offsets of tensor " + name, excerpt(value));
        return value.at(what);
    };
    const Json type = member("dtype"), shape = member("shape"), offsets = member("data_offsets");

    const auto known = std::find_if(element_types.begin(), element_types.end(),
                                    [&](const ElementType& candidate) { return type == candidate.name; });
    if (known == element_types.end())
        throw FileError(path, "element type F32, F64, I64 or U8 of tensor " + name, excerpt(type));
    entry.type = std::size_t(known - element_types.begin());

    if (!shape.is_array()) throw FileError(path, "a list as shape of tensor " + name, excerpt(shape));
    for (const Json& size : shape) entry.shape.push_back(whole_number(path, name, size));
    if (!offsets.is_array() || offsets.size() != 2)
        throw FileError(path, "two data_offsets of tensor " + name, excerpt(offsets));
    entry.begin = whole_number(path, name, offsets[0]);
    entry.end = whole_number(path, name, offsets[1]);

    const std::optional<index> count = element_count(entry.shape, known->bytes);
    if (!count) throw FileError(path, "fewer than 2^63 bytes in tensor " + name, "shape " + excerpt(shape));
    if (entry.begin > entry.end || entry.end - entry.begin != *count * known->bytes)
        throw FileError(
            path, std::to_string(*count * known->bytes) + " bytes for tensor " + name + " of shape " + excerpt(shape),
            "data_offsets " + excerpt(offsets));
    return entry;
}

std::map<std::string, std::string> parse_metadata(const std::filesystem::path& path, const Json& value) {
    std::map<std::string, std::string> metadata;
    if (!value.is_object()) throw FileError(path, "an object as __metadata__", excerpt(value));
    for (const auto& [key, text] : value.items()) {
        if (!text.is_string()) throw FileError(path, "strings in __metadata__", excerpt(text));
        metadata[key] = text.get<std::string>();
    }
    return metadata;
}

template <std::size_t... Types>
Tensor read_values(InputFile& file, const Entry& entry, std::index_sequence<Types...>) {
    Tensor tensor{entry.shape, {}};
    const auto read = [&]<std::size_t Type>() {
        if (entry.type != Type) return;
        auto& values = tensor.values.emplace<Type>();
        values.resize(std::size_t((entry.end - entry.begin) / element_types[Type].bytes));
        file.read(values.data(), entry.end - entry.begin, "tensor " + entry.name);
    };
    (read.template operator()<Types>(), ...);
    return tensor;
}

}  // namespace

Safetensors read_safetensors(const std::filesystem::path& path) {
    InputFile file(path);
    std::uint64_t length = 0;
    file.read(&length, sizeof length, "header length");
    if (length > longest_header)
        throw FileError(path, "a safetensors file, whose header takes at most 100000000 bytes", std::to_string(length));
    if (index(length) > file.remaining())
        throw FileError(path, "a header of " + std::to_string(length) + " bytes",
                        std::to_string(file.remaining()) + ": the file is truncated");
    std::string text(length, '\0');
    file.read(text.data(), index(length), "header");
    if (!text.starts_with('{'))
        throw FileError(path, "a safetensors file, whose header begins with {", "something else");

    const Json header = parse_json(path, text);
    Safetensors contents;
    std::vector<Entry> entries;
    for (const auto& [key, value] : header.items()) {
        if (key == metadata_key)
            contents.metadata = parse_metadata(path, value);
        else
            entries.push_back(parse_entry(path, key, value));
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& one, const Entry& other) {
        return std::pair(one.begin, one.end) < std::pair(other.begin, other.end);
    });
    index end = 0;
    for (const Entry& entry : entries) {
        if (entry.begin != end)
            throw FileError(path, "tensor " + excerpt(entry.name) + " to begin at byte " + std::to_string(end),
                            std::to_string(entry.begin) + (entry.begin < end ? ": tensors overlap" : ": a hole"));
        end = entry.end;
    }
    if (end != file.remaining())
        throw FileError(path, std::to_string(end) + " bytes of tensors", std::to_string(file.remaining()) + " bytes");

    for (const Entry& entry : entries)
        contents.tensors.emplace(entry.name,
                                 read_values(file, entry, std::make_index_sequence<element_types.size()>()));
    return contents;
}

void write_safetensors(const std::filesystem::path& path, const Safetensors& contents) {
    // The widest elements first, so that every tensor is aligned to its own elements.
    std::vector<std::pair<const std::string*, const Tensor*>> order;
    for (const auto& [name, tensor] : contents.tensors) {
        check_consistent(tensor, "tensor " + name);
        if (name == metadata_key) throw InvalidArgument("tensor", "a name other than __metadata__", name);
        order.emplace_back(&name, &tensor);
    }
    std::stable_sort(order.begin(), order.end(), [](const auto& one, const auto& other) {
        return element_type_of(*one.second).bytes > element_type_of(*other.second).bytes;
    });

    Json header = Json::object();
    if (!contents.metadata.empty()) header[metadata_key] = contents.metadata;
    index end = 0;
    for (const auto& [name, tensor] : order) {
        const ElementType& type = element_type_of(*tensor);
        const index begin = end;
        end += *element_count(tensor->shape, type.bytes) * type.bytes;
        header[*name] = {{"dtype", type.name}, {"shape", tensor->shape}, {"data_offsets", {begin, end}}};
    }
    std::string text;
    try {
        text = header.dump();
    } catch (const Json::exception&) {
        throw InvalidArgument("contents", "names and metadata in UTF-8", "other bytes");
    }
    text.append((8 - text.size() % 8) % 8, ' ');
    const std::uint64_t length = text.size();
    if (length > longest_header)
        throw InvalidArgument("contents", "a header of at most 100000000 bytes", std::to_string(length));

    AtomicFile file(path);
    file.write(&length, sizeof length);
    file.write(text);
    for (const auto& [name, tensor] : order)
        std::visit([&](const auto& values) { file.write(values.data(), values.size() * sizeof values[0]); },
                   tensor->values);
    file.commit();
}

std::uint32_t checksum(const Safetensors& contents) {
    uLong result = 0;
    const auto add = [&](const void* data, std::size_t bytes) {
        if (bytes > 0) result = crc32_z(result, static_cast<const Bytef*>(data), bytes);
    };
    const auto add_text = [&](const std::string& text) { add(text.c_str(), text.size() + 1); };
    for (const auto& [key, value] : contents.metadata) {
        if (key == "checksum") continue;
        add_text(key);
        add_text(value);
    }
    for (const auto& [name, tensor] : contents.tensors) {
        add_text(name);
        add_text(element_type(tensor) + to_string(tensor.shape));
        std::visit([&](const auto& values) { add(values.data(), values.size() * sizeof values[0]); }, tensor.values);
    }
    return std::uint32_t(result);
}

}  // namespace deeppcr::files
