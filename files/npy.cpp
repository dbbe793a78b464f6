#include <files/npy.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <set>

#include <files/read.hpp>
#include <files/write.hpp>

namespace deeppcr::files {
namespace {

static_assert(std::endian::native == std::endian::little, "the data of a file is read as it lies in memory");

constexpr std::array<char, 6> magic = {'\x93', 'N', 'U', 'M', 'P', 'Y'};
constexpr index longest_header = 1 << 20;
constexpr std::size_t most_dimensions = 32;

/// Text of a hostile file, fit for an error message: short, and printable.
std::string excerpt(std::string_view text) {
    std::string result = "'";
    for (const char character : text.substr(0, 60)) result += character >= ' ' && character <= '~' ? character : '?';
    return result + (text.size() > 60 ? "...'" : "'");
}

/// The header is a Python dictionary, {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }, then spaces.
class HeaderParser {
public:
    HeaderParser(const std::filesystem::path& path, std::string_view text) : path_(path), rest_(text) {}

    NpyHeader parse() {
        NpyHeader header;
        std::set<std::string, std::less<>> keys;
        expect('{');
        while (!accept('}')) {
            const std::string key(string("a key"));
            if (!keys.insert(key).second) fail("each key once", excerpt(key) + " again");
            expect(':');
            if (key == "descr")
                header.float64 = element_type();
            else if (key == "fortran_order")
                header.fortran_order = boolean();
            else if (key == "shape")
                header.shape = shape();
            else
                fail("the keys 'descr', 'fortran_order' and 'shape'", excerpt(key));
            if (!accept(',')) {
                expect('}');
                break;
            }
        }
        skip_spaces();
        if (!rest_.empty()) fail("nothing after the dictionary", excerpt(rest_));
        if (keys.size() != 3)
            fail("the keys 'descr', 'fortran_order' and 'shape'", std::to_string(keys.size()) + " keys");
        return header;
    }

private:
    [[noreturn]] void fail(const std::string& expected, const std::string& actual) const {
        throw FileError(path_, "a .npy header with " + expected, actual);
    }
    void skip_spaces() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\n\r"), rest_.size())); }
    bool accept(char character) {
        skip_spaces();
        if (!rest_.starts_with(character)) return false;
        rest_.remove_prefix(1);
        return true;
    }
    void expect(char character) {
        if (!accept(character)) fail(std::string("a '") + character + "'", excerpt(rest_));
    }
    bool accept_word(std::string_view word) {
        skip_spaces();
        if (!rest_.starts_with(word)) return false;
        rest_.remove_prefix(word.size());
        return true;
    }

    std::string_view string(const std::string& meaning) {
        skip_spaces();
        const char quote = rest_.empty() ? '\0' : rest_.front();
        const std::size_t end = quote == '\'' || quote == '"' ? rest_.find(quote, 1) : std::string_view::npos;
        if (end == std::string_view::npos) fail(meaning + " in quotes", excerpt(rest_));
        const std::string_view text = rest_.substr(1, end - 1);
        rest_.remove_prefix(end + 1);
        return text;
    }

    bool element_type() {
        const std::string supported = "element type float32 ('<f4') or float64 ('<f8')";
        skip_spaces();
        if (rest_.starts_with('[')) fail(supported, "a structured type");
        const std::string_view type = string("an element type");
        if (type == "<f4" || type == "<f8") return type == "<f8";
        if (type.find('O') != std::string_view::npos) fail(supported, "Python objects (" + excerpt(type) + ")");
        if (type.starts_with('>')) fail(supported, "big-endian " + excerpt(type));
        fail(supported, excerpt(type));
    }

    bool boolean() {
        if (accept_word("True")) return true;
        if (!accept_word("False")) fail("True or False after 'fortran_order'", excerpt(rest_));
        return false;
    }

    std::vector<index> shape() {
        std::vector<index> result;
        expect('(');
        while (!accept(')')) {
            result.push_back(number());
            if (result.size() > most_dimensions) fail("at most 32 dimensions", "more");
            if (!accept(',')) {
                expect(')');
                break;
            }
        }
        return result;
    }

    index number() {
        skip_spaces();
        const std::string_view before = rest_;
        index value = 0;
        while (!rest_.empty() && rest_.front() >= '0' && rest_.front() <= '9') {
            if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, rest_.front() - '0', &value))
                fail("sizes below 2^63", excerpt(before));
            rest_.remove_prefix(1);
        }
        if (rest_.size() == before.size()) fail("a size", excerpt(before));
        accept('L');  // Python 2 wrote 3L
        return value;
    }

    const std::filesystem::path& path_;
    std::string_view rest_;
};

NpyHeader read_header(InputFile& file) {
    std::array<char, 8> opening{};
    if (file.size() < index(opening.size()))
        throw FileError(file.path(), "a .npy file", std::to_string(file.size()) + " bytes");
    file.read(opening.data(), index(opening.size()), "magic number");
    if (!std::equal(magic.begin(), magic.end(), opening.begin()))
        throw FileError(file.path(), "a .npy file, which begins with \\x93NUMPY", excerpt({opening.data(), 6}));
    const int major = static_cast<unsigned char>(opening[6]), minor = static_cast<unsigned char>(opening[7]);
    if (major < 1 || major > 3 || minor != 0)
        throw FileError(file.path(), ".npy version 1.0, 2.0 or 3.0",
                        "version " + std::to_string(major) + "." + std::to_string(minor));

    std::uint32_t length = 0;
    file.read(&length, major == 1 ? 2 : 4, "header length");
    if (index(length) > longest_header)
        throw FileError(file.path(), "a header of at most " + std::to_string(longest_header) + " bytes",
                        std::to_string(length));
    if (index(length) > file.remaining())
        throw FileError(file.path(), "a header of " + std::to_string(length) + " bytes",
                        std::to_string(file.remaining()) + ": the file is truncated");
    std::string text(length, ' ');
    file.read(text.data(), index(length), "header");

    NpyHeader header = HeaderParser(file.path(), text).parse();
    const index element_bytes = header.float64 ? sizeof(double) : sizeof(float);
    const std::optional<index> count = element_count(header.shape, element_bytes);
    if (!count) throw FileError(file.path(), "fewer than 2^63 bytes", "shape " + to_string(header.shape));
    header.bytes = *count * element_bytes;
    if (header.bytes != file.remaining())
        throw FileError(file.path(),
                        std::to_string(header.bytes) + " bytes of data for shape " + to_string(header.shape),
                        std::to_string(file.remaining()) +
                            (file.remaining() < header.bytes ? ": the file is truncated" : ": too many"));
    return header;
}

/// From Fortran's order, whose first dimension is contiguous, to row-major order.
template <class T>
std::vector<T> row_major(const std::vector<T>& values, const std::vector<index>& shape) {
    std::vector<T> result(values.size());
    std::vector<index> strides(shape.size()), position(shape.size());
    for (std::size_t i = 0, stride = 1; i < shape.size(); stride *= std::size_t(shape[i++])) strides[i] = index(stride);
    index source = 0;
    for (T& value : result) {
        value = values[std::size_t(source)];
        for (std::size_t i = shape.size(); i-- > 0;) {
            source += strides[i];
            if (++position[i] < shape[i]) break;
            source -= strides[i] * shape[i];
            position[i] = 0;
        }
    }
    return result;
}

template <class T>
Tensor read_values(InputFile& file, const NpyHeader& header) {
    std::vector<T> values(std::size_t(header.bytes) / sizeof(T));
    file.read(values.data(), header.bytes, "data");
    if (header.fortran_order && header.shape.size() > 1) values = row_major(values, header.shape);
    return {header.shape, std::move(values)};
}

}  // namespace

NpyHeader read_npy_header(const std::filesystem::path& path) {
    InputFile file(path);
    return read_header(file);
}

Tensor read_npy(const std::filesystem::path& path) {
    InputFile file(path);
    const NpyHeader header = read_header(file);
    return header.float64 ? read_values<double>(file, header) : read_values<float>(file, header);
}

void write_npy(const std::filesystem::path& path, const Tensor& tensor) {
    check_consistent(tensor, "tensor");
    const std::string type = element_type(tensor);
    if (type != "float32" && type != "float64") throw InvalidArgument("tensor", "float32 or float64 values", type);
    if (tensor.shape.size() > most_dimensions)
        throw InvalidArgument("tensor", "at most 32 dimensions", std::to_string(tensor.shape.size()));

    std::string header =
        "{'descr': '" + std::string(type == "float64" ? "<f8" : "<f4") + "', 'fortran_order': False, 'shape': (";
    for (const index size : tensor.shape) header += std::to_string(size) + ", ";
    if (tensor.shape.size() > 1) header.resize(header.size() - 2);
    header += "), }";
    // The data begins at a multiple of 64 bytes; the header ends with a newline.
    constexpr std::size_t preamble = magic.size() + 4, alignment = 64;
    header.append((alignment - (preamble + header.size() + 1) % alignment) % alignment, ' ');
    header += '\n';
    const auto length = std::uint16_t(header.size());

    AtomicFile file(path);
    file.write(magic.data(), magic.size());
    file.write("\x01\x00", 2);
    file.write(&length, sizeof length);
    file.write(header);
    std::visit([&](const auto& values) { file.write(values.data(), values.size() * sizeof values[0]); }, tensor.values);
    file.commit();
}

}  // namespace deeppcr::files
