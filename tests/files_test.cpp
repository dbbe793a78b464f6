// Readers and writers of files: round trips, what NumPy and safetensors themselves wrote, and hostile bytes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>

#include <files/idx.hpp>
#include <files/npy.hpp>
#include <files/safetensors.hpp>
#include <files/write.hpp>

#include "tests/messages.hpp"

namespace deeppcr::files {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

/// A folder of its own for each test, removed at its end.
class Files : public testing::Test {
protected:
    Files() {
        std::string name = testing::TempDir() + "deeppcr-files-XXXXXX";
        folder = mkdtemp(name.data());
    }
    ~Files() override { fs::remove_all(folder); }

    fs::path file(const std::string& name) const { return folder / name; }
    fs::path file_with(const std::string& bytes, const std::string& name = "input") const {
        std::ofstream(file(name), std::ios::binary) << bytes;
        return file(name);
    }
    std::size_t files_in_folder() const {
        return std::size_t(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
    }

    fs::path folder;
};

std::string contents(const fs::path& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
}

/// What is wrong with a file, by the FileError that reading it throws.
std::string error_of(const std::function<void()>& read) { return message_of<FileError>(read); }

template <class Value>
std::string bytes_of(const Value& value) {
    return {reinterpret_cast<const char*>(&value), sizeof value};
}

template <class Value>
std::string bytes_of_all(const std::vector<Value>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(Value)};
}

void expect_equal(const Tensor& one, const Tensor& other) {
    EXPECT_EQ(one.shape, other.shape);
    EXPECT_EQ(one.values, other.values);
}

/// A Python that has `module`, or nothing.
std::string python_with(const std::string& module) {
    for (const std::string python : {"python3", "/usr/bin/python3"})
        if (std::system((python + " -c 'import " + module + "' >/dev/null 2>&1").c_str()) == 0) return python;
    return "";
}

/// Runs a Python program in `folder`; its asserts decide.
int run_python(const std::string& python, const fs::path& folder, const std::string& program) {
    std::ofstream(folder / "program.py") << program;
    return std::system(("cd '" + folder.string() + "' && " + python + " program.py").c_str());
}

// ---------------------------------------------------------------------------------------------------------------- npy

/// A .npy file of the given version, from its dictionary and its data.
std::string npy(const std::string& dictionary, const std::string& data, char major = 1) {
    std::string file = "\x93NUMPY";
    file += major;
    file += '\0';
    const auto length = std::uint32_t(dictionary.size());
    file += bytes_of(length).substr(0, major == 1 ? 2 : 4);
    return file + dictionary + data;
}

std::string dictionary(const std::string& shape, const std::string& type = "'<f4'",
                       const std::string& order = "False") {
    return "{'descr': " + type + ", 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}

TEST_F(Files, NpyRoundTripsEveryShapeAndType) {
    const std::vector<std::vector<index>> shapes = {
        {}, {1}, {5}, {0}, {2, 3}, {3, 0, 2}, {2, 3, 4}, {2, 1, 3, 3}, {2, 2, 2, 3, 3}};
    for (const auto& shape : shapes) {
        const auto count = std::size_t(*element_count(shape, 8));
        std::vector<float> floats(count);
        std::vector<double> doubles(count);
        for (std::size_t i = 0; i < count; ++i) floats[i] = float(doubles[i] = double(i) / 3 - 1);
        for (const Tensor& tensor : {Tensor{shape, floats}, Tensor{shape, doubles}}) {
            SCOPED_TRACE(to_string(shape) + " " + element_type(tensor));
            write_npy(file("x.npy"), tensor);
            expect_equal(read_npy(file("x.npy")), tensor);
            const NpyHeader header = read_npy_header(file("x.npy"));
            EXPECT_EQ(header.shape, shape);
            EXPECT_EQ(header.float64, element_type(tensor) == "float64");
            EXPECT_EQ(header.bytes, index(count) * (header.float64 ? 8 : 4));
            EXPECT_EQ((fs::file_size(file("x.npy")) - std::size_t(header.bytes)) % 64, 0U);
        }
    }
}

TEST_F(Files, NpyReadsAllVersionsAndSpellings) {
    const std::vector<float> values = {1, 2, 3, 4, 5, 6};
    const std::string data = bytes_of_all(values);
    for (const char version : {1, 2, 3})
        for (const std::string& header : {dictionary("(2, 3)"), dictionary("(2,3,)") + "   \n", dictionary("(2L, 3L)"),
                                          std::string("{\"shape\":(2,3),\"fortran_order\":False,\"descr\":\"<f4\"}")})
            expect_equal(read_npy(file_with(npy(header, data, version))), {{2, 3}, values});
}

TEST_F(Files, NpyConvertsFortranOrder) {
    // a[i,j,k] = 100 i + 10 j + k, shape (2,3,2), the first index fastest
    const std::vector<double> fortran = {0, 100, 10, 110, 20, 120, 1, 101, 11, 111, 21, 121};
    const std::vector<double> row_major = {0, 1, 10, 11, 20, 21, 100, 101, 110, 111, 120, 121};
    expect_equal(read_npy(file_with(npy(dictionary("(2, 3, 2)", "'<f8'", "True"), bytes_of_all(fortran)))),
                 {{2, 3, 2}, row_major});
    expect_equal(read_npy(file_with(npy(dictionary("(0, 3)", "'<f8'", "True"), ""))), {{0, 3}, std::vector<double>()});
}

TEST_F(Files, NpyRefusesWhatItCannotRead) {
    const std::string data(24, '\0');
    const struct {
        std::string bytes, message;
    } cases[] = {
        {"", "expected a .npy file, got 0 bytes"},
        {"\x93NUM", "expected a .npy file"},
        {"PK\x03\x04 this is a zip file", "begins with \\x93NUMPY, got 'PK"},
        {npy(dictionary("(2, 3)"), data, 4), "expected .npy version 1.0, 2.0 or 3.0, got version 4.0"},
        {npy(dictionary("(2, 3)"), data).substr(0, 9), "expected 2 bytes of header length, got 1"},
        {npy(dictionary("(2, 3)"), data).substr(0, 30), "got 20: the file is truncated"},
        {npy(dictionary("(2, 3)"), data).substr(0, 80), "the file is truncated"},
        {npy(dictionary("(2, 3)"), data + "x"), "expected 24 bytes of data for shape [2,3], got 25: too many"},
        {npy(dictionary("(2, 2)"), data), "expected 16 bytes of data for shape [2,2], got 24: too many"},
        {npy(dictionary("(2, 4)"), data), "expected 32 bytes of data for shape [2,4], got 24: the file is truncated"},
        {npy(dictionary("(4294967296, 4294967296)"), data), "fewer than 2^63 bytes"},
        {npy(dictionary("(0, 4294967296, 4294967296)"), ""), "fewer than 2^63 bytes"},
        {npy(dictionary("(99999999999999999999,)"), data), "sizes below 2^63"},
        {npy(dictionary("(9223372036854775807,)"), data), "fewer than 2^63 bytes"},
        {npy(dictionary("(-2, 3)"), data), "a size, got '-2, 3)"},
        {npy(dictionary("(2.5, 3)"), data), "a ')', got '.5"},
        {npy(dictionary("(2 3)"), data), "a ')', got '3)"},
        {npy(dictionary("6"), data), "a '('"},
        {npy(dictionary("(" + std::string(100, '1') + ")"), data), "sizes below 2^63"},
        {npy(dictionary("(1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1)"), data), "32 dimensions"},
        {npy(dictionary("(2, 3)", "'>f4'"), data), "float32 ('<f4') or float64 ('<f8'), got big-endian '>f4'"},
        {npy(dictionary("(2, 3)", "'<i4'"), data), "float32 ('<f4') or float64 ('<f8'), got '<i4'"},
        {npy(dictionary("(2, 3)", "'<f2'"), data), "got '<f2'"},
        {npy(dictionary("(2, 3)", "'|O'"), data), "got Python objects ('|O')"},
        {npy(dictionary("(2, 3)", "[('a', '<f4')]"), data), "got a structured type"},
        {npy(dictionary("(2, 3)", "'<f4'", "1"), data), "True or False after 'fortran_order'"},
        {npy("{'descr': '<f4', 'shape': (2, 3)}", data), "got 2 keys"},
        {npy("{'descr': '<f4', 'descr': '<f4', 'shape': (2, 3)}", data), "each key once, got 'descr' again"},
        {npy("{'descr': '<f4', 'colour': 'red'}", data), "got 'colour'"},
        {npy(dictionary("(2, 3)") + "os.system('x')", data), "nothing after the dictionary"},
        {npy("{'descr", data), "a key in quotes"},
        {npy("", data), "a '{'"},
        {"\x93NUMPY\x02" + std::string(1, '\0') + "\xff\xff\xff\xff" + data, "a header of at most 1048576 bytes"},
    };
    for (const auto& [bytes, message] : cases) {
        const fs::path input = file_with(bytes);
        EXPECT_THAT(error_of([&] { read_npy(input); }), AllOf(StartsWith(input.string() + ": "), HasSubstr(message)));
        EXPECT_THAT(error_of([&] { read_npy_header(input); }), HasSubstr(message));
    }
}

TEST_F(Files, NpyRefusesEveryTruncation) {
    const std::string whole = npy(dictionary("(2, 3)"), std::string(24, '\0'));
    for (std::size_t length = 0; length < whole.size(); ++length)
        EXPECT_THROW(read_npy(file_with(whole.substr(0, length))), FileError) << length;
}

TEST_F(Files, NpyRefusesWhatIsNoFile) {
    EXPECT_THAT(error_of([&] { read_npy(file("missing.npy")); }), HasSubstr("No such file"));
    EXPECT_THAT(error_of([&] { read_npy(folder); }), HasSubstr("expected a regular file, got a folder"));
    ASSERT_EQ(mkfifo(file("pipe").c_str(), 0600), 0);
    EXPECT_THAT(error_of([&] { read_npy(file("pipe")); }), HasSubstr("got a device or pipe"));
}

TEST_F(Files, NpyWritesOnlyConsistentFloatingPointArrays) {
    EXPECT_THROW(write_npy(file("x.npy"), {{2, 3}, std::vector<float>(5)}), InvalidArgument);
    EXPECT_THROW(write_npy(file("x.npy"), {{-1}, std::vector<float>(1)}), InvalidArgument);
    EXPECT_THROW(write_npy(file("x.npy"), {{1}, std::vector<std::int64_t>(1)}), InvalidArgument);
    EXPECT_THROW(write_npy(file("x.npy"), {std::vector<index>(33, 1), std::vector<float>(1)}), InvalidArgument);
    EXPECT_EQ(files_in_folder(), 0U);
}

TEST_F(Files, NpyAndNumpyReadEachOther) {
    const std::string python = python_with("numpy");
    if (python.empty()) GTEST_SKIP() << "Python has no numpy";
    write_npy(file("ours.npy"), {{2, 3}, std::vector<double>{1, 2, 3, 4, 5, 6}});
    write_npy(file("scalar.npy"), {{}, std::vector<float>{0.5F}});
    write_npy(file("line.npy"), {{3}, std::vector<float>{1, 2, 3}});
    ASSERT_EQ(run_python(python, folder, R"(
import numpy as np
ours = np.load("ours.npy", allow_pickle=False)
assert ours.dtype == np.float64 and ours.shape == (2, 3) and (ours.ravel() == [1, 2, 3, 4, 5, 6]).all()
assert np.load("scalar.npy").shape == () and np.load("scalar.npy") == 0.5
assert np.load("line.npy").shape == (3,)
a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
np.save("c.npy", a)
np.save("f.npy", np.asfortranarray(a))
np.lib.format.write_array(open("v2.npy", "wb"), a, version=(2, 0))
np.lib.format.write_array(open("v3.npy", "wb"), a, version=(3, 0))
np.save("int.npy", a.astype(np.int32))
np.save("big.npy", a.astype(">f4"))
np.save("object.npy", np.array([{}, None]), allow_pickle=True)
np.save("record.npy", np.zeros(3, dtype=[("x", "<f4"), ("y", "<f8")]))
)"),
              0);
    std::vector<float> counting(24);
    for (std::size_t i = 0; i < counting.size(); ++i) counting[i] = float(i);
    for (const char* name : {"c.npy", "f.npy", "v2.npy", "v3.npy"})
        expect_equal(read_npy(file(name)), {{2, 3, 4}, counting});
    for (const char* name : {"int.npy", "big.npy", "object.npy", "record.npy"})
        EXPECT_THROW(read_npy(file(name)), FileError) << name;
}

// -------------------------------------------------------------------------------------------------------- safetensors

std::string safetensors(const std::string& header, const std::string& data) {
    return bytes_of(std::uint64_t(header.size())) + header + data;
}

const Safetensors example = {{{"weight", {{2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6}}},
                              {"bias", {{3}, std::vector<double>{0.1, 0.2, 0.3}}},
                              {"step", {{}, std::vector<std::int64_t>{-7}}},
                              {"bytes", {{5}, std::vector<std::uint8_t>{0, 1, 2, 254, 255}}},
                              {"nothing", {{0, 4}, std::vector<float>{}}},
                              {"größe \"x\"", {{1}, std::vector<float>{1}}}},
                             {{"format", "deeppcr"}, {"größe", "1\n2"}}};

TEST_F(Files, SafetensorsRoundTrip) {
    write_safetensors(file("x"), example);
    const Safetensors read = read_safetensors(file("x"));
    EXPECT_EQ(read.metadata, example.metadata);
    ASSERT_EQ(read.tensors.size(), example.tensors.size());
    for (const auto& [name, tensor] : example.tensors) {
        SCOPED_TRACE(name);
        ASSERT_TRUE(read.tensors.contains(name));
        expect_equal(read.tensors.at(name), tensor);
    }
    const std::string first = contents(file("x"));
    write_safetensors(file("x"), read);
    EXPECT_EQ(contents(file("x")), first);
    std::uint64_t header = 0;
    std::memcpy(&header, first.data(), sizeof header);
    EXPECT_EQ(header % 8, 0U);

    write_safetensors(file("x"), {});
    EXPECT_TRUE(read_safetensors(file("x")).tensors.empty());
}

TEST_F(Files, SafetensorsRefusesWhatItCannotRead) {
    const std::string data(24, '\0');
    const auto one = [](const std::string& type, const std::string& shape, const std::string& offsets) {
        return R"({"w":{"dtype":")" + type + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
    };
    const auto two = [](const std::string& first, const std::string& second) {
        return R"({"a":{"dtype":"F32","shape":[2],"data_offsets":)" + first +
               R"(},"b":{"dtype":"F32","shape":[4],"data_offsets":)" + second + "}}";
    };
    ASSERT_NO_THROW(read_safetensors(file_with(safetensors(one("F32", "[2,3]", "[0,24]") + "   ", data))));
    ASSERT_NO_THROW(read_safetensors(file_with(safetensors(two("[16,24]", "[0,16]"), data))));
    const struct {
        std::string bytes, message;
    } cases[] = {
        {"", "expected 8 bytes of header length, got 0"},
        {"\x02", "expected 8 bytes of header length, got 1"},
        {bytes_of(std::uint64_t(100'000'001)) + "{}",
         "a safetensors file, whose header takes at most 100000000 bytes, got 100000001"},
        {bytes_of(~std::uint64_t(0)) + "{}", "at most 100000000 bytes, got 18446744073709551615"},
        {bytes_of(std::uint64_t(99'999'999)) + "{}", "a header of 99999999 bytes, got 2: the file is truncated"},
        {safetensors("", ""), "begins with {"},
        {safetensors(" {}", ""), "begins with {"},
        {safetensors("[]", ""), "a safetensors file, whose header begins with {"},
        {safetensors("{", ""), "the header is not JSON"},
        {safetensors("{}}", ""), "the header is not JSON"},
        {safetensors("{\"\xff\":1}", ""), "the header is not JSON"},
        {safetensors(R"({"w":1})", ""), "dtype, shape and data_offsets of tensor \"w\""},
        {safetensors(R"({"w":{}})", ""), "dtype, shape and data_offsets of tensor \"w\""},
        {safetensors(R"({"w":{"dtype":"F32","shape":[]}})", ""), "dtype, shape and data_offsets"},
        {safetensors(R"({"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":0}})", ""), "dtype, shape and"},
        {safetensors(one("F32", "[2,3]", "[0,24]"), data.substr(1)), "expected 24 bytes of tensors, got 23"},
        {safetensors(one("F32", "[2,3]", "[0,24]"), data + "x"), "expected 24 bytes of tensors, got 25"},
        {safetensors("{}", "x"), "expected 0 bytes of tensors, got 1"},
        {safetensors(one("F32", "[2,2]", "[0,24]"), data), "expected 16 bytes for tensor \"w\" of shape [2,2]"},
        {safetensors(one("F64", "[2,3]", "[0,24]"), data), "expected 48 bytes for tensor \"w\""},
        {safetensors(one("F32", "[2,3]", "[24,0]"), data), "data_offsets [24,0]"},
        {safetensors(one("F32", "[0]", "[24,24]"), data), "to begin at byte 0, got 24: a hole"},
        {safetensors(one("F32", "[4611686018427387904,4]", "[0,24]"), data), "fewer than 2^63 bytes"},
        {safetensors(one("F32", "[0,4611686018427387904,4]", "[0,0]"), ""), "fewer than 2^63 bytes"},
        {safetensors(one("F32", "[18446744073709551616]", "[0,24]"), data), "whole numbers"},
        {safetensors(one("F32", "[-2,-3]", "[0,24]"), data), "whole numbers in shape and data_offsets"},
        {safetensors(one("F32", "[2.0,3]", "[0,24]"), data), "whole numbers"},
        {safetensors(one("F32", "[\"2\"]", "[0,24]"), data), "whole numbers"},
        {safetensors(one("F32", "6", "[0,24]"), data), "a list as shape"},
        {safetensors(one("F32", "[2,3]", "[0,24,24]"), data), "two data_offsets"},
        {safetensors(one("F32", "[2,3]", "24"), data), "two data_offsets"},
        {safetensors(one("BF16", "[2,3]", "[0,12]"), data), "F32, F64, I64 or U8 of tensor \"w\", got \"BF16\""},
        {safetensors(two("[0,8]", "[4,20]"), data.substr(4)),
         "tensor \"b\" to begin at byte 8, got 4: tensors overlap"},
        {safetensors(two("[0,8]", "[8,24]").replace(2, 1, "b"), data), "each name once in the header, got \"b\" again"},
        {safetensors(R"({"w":{"dtype":"F32","dtype":"F64","shape":[3],"data_offsets":[0,24]}})", data),
         "each name once in the header, got \"dtype\" again"},
        {safetensors(two("[0,8]", "[9,25]"), data + "x"), "got 9: a hole"},
        {safetensors(R"({"__metadata__":{"a":1}})", ""), "strings in __metadata__"},
        {safetensors(R"({"__metadata__":"a"})", ""), "an object as __metadata__"},
        {safetensors(R"({"w":[[[1]]]})", ""), "nested at most 3 deep"},
        {safetensors("{\"w\":" + std::string(1'000'000, '['), ""), "nested at most 3 deep"},
        {safetensors(R"({"w":{"dtype":"F32","shape":[{"a":1}],"data_offsets":[0,24]}})", data),
         "nested at most 3 deep"},
    };
    for (const auto& [bytes, message] : cases) {
        const fs::path input = file_with(bytes);
        EXPECT_THAT(error_of([&] { read_safetensors(input); }),
                    AllOf(StartsWith(input.string() + ": "), HasSubstr(message)));
    }
}

TEST_F(Files, SafetensorsRefusesEveryTruncation) {
    write_safetensors(file("x"), example);
    const std::string whole = contents(file("x"));
    for (std::size_t length = 0; length < whole.size(); ++length)
        EXPECT_THROW(read_safetensors(file_with(whole.substr(0, length))), FileError) << length;
}

TEST_F(Files, SafetensorsWritesOnlyWhatTheFormatAllows) {
    const Tensor tensor{{1}, std::vector<float>{1}};
    EXPECT_THROW(write_safetensors(file("x"), {{{"__metadata__", tensor}}, {}}), InvalidArgument);
    EXPECT_THROW(write_safetensors(file("x"), {{{"\xff", tensor}}, {}}), InvalidArgument);
    EXPECT_THROW(write_safetensors(file("x"), {{}, {{"a", "\xff"}}}), InvalidArgument);
    EXPECT_THROW(write_safetensors(file("x"), {{{"w", {{2}, std::vector<float>{1}}}}, {}}), InvalidArgument);
    EXPECT_EQ(files_in_folder(), 0U);
}

TEST_F(Files, SafetensorsAndPythonReadEachOther) {
    const std::string python = python_with("safetensors.numpy");
    if (python.empty()) GTEST_SKIP() << "Python has no safetensors with numpy";
    write_safetensors(file("ours.safetensors"), example);
    ASSERT_EQ(run_python(python, folder, R"(
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
ours = load_file("ours.safetensors")
assert set(ours) == {"weight", "bias", "step", "bytes", "nothing", 'größe "x"'}
assert ours["weight"].dtype == np.float32 and (ours["weight"] == [[1, 2, 3], [4, 5, 6]]).all()
assert ours["bias"].dtype == np.float64 and (ours["bias"] == [0.1, 0.2, 0.3]).all()
assert ours["step"].dtype == np.int64 and ours["step"].shape == () and ours["step"] == -7
assert ours["bytes"].dtype == np.uint8 and (ours["bytes"] == [0, 1, 2, 254, 255]).all()
assert ours["nothing"].shape == (0, 4)
assert safe_open("ours.safetensors", "np").metadata() == {"format": "deeppcr", "größe": "1\n2"}
save_file(ours, "theirs.safetensors", metadata={"format": "deeppcr", "größe": "1\n2"})
)"),
              0);
    const Safetensors theirs = read_safetensors(file("theirs.safetensors"));
    EXPECT_EQ(theirs.metadata, example.metadata);
    ASSERT_EQ(theirs.tensors.size(), example.tensors.size());
    for (const auto& [name, tensor] : example.tensors) expect_equal(theirs.tensors.at(name), tensor);
}

// ---------------------------------------------------------------------------------------------------------------- idx

std::string idx(const std::vector<std::uint32_t>& shape, const std::string& data, char type = 8) {
    std::string file{'\0', '\0', type, char(shape.size())};
    for (const std::uint32_t size : shape)
        for (int shift = 24; shift >= 0; shift -= 8) file += char(size >> shift & 0xFF);
    return file + data;
}

std::string gzip(const std::string& text) {
    z_stream stream = {};
    deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 9, Z_DEFAULT_STRATEGY);
    std::string compressed(deflateBound(&stream, text.size()) + 64, '\0');
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
    stream.avail_in = uInt(text.size());
    stream.next_out = reinterpret_cast<Bytef*>(compressed.data());
    stream.avail_out = uInt(compressed.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    compressed.resize(stream.total_out);
    deflateEnd(&stream);
    return compressed;
}

TEST_F(Files, IdxReadsPlainAndCompressed) {
    const std::string file = idx({2, 3}, "abcdef");
    const Tensor expected{{2, 3}, std::vector<std::uint8_t>{'a', 'b', 'c', 'd', 'e', 'f'}};
    expect_equal(read_idx(file_with(file)), expected);
    expect_equal(read_idx(file_with(gzip(file))), expected);
    // Compressed in two members, as `cat a.gz b.gz` makes them.
    expect_equal(read_idx(file_with(gzip(file.substr(0, 9)) + gzip(file.substr(9)))), expected);
    expect_equal(read_idx(file_with(idx({0}, ""))), {{0}, std::vector<std::uint8_t>()});
    // More than one piece of reading, with a last one that is not full.
    const std::string large(3'000'001, 'x');
    EXPECT_EQ(std::get<std::vector<std::uint8_t>>(read_idx(file_with(gzip(idx({3'000'001}, large)))).values),
              std::vector<std::uint8_t>(large.begin(), large.end()));
}

TEST_F(Files, IdxRefusesWhatItCannotRead) {
    const std::string whole = idx({2, 3}, "abcdef");
    std::string wrong_checksum = gzip(whole), wrong_data = gzip(idx({1000}, std::string(1000, 'a')));
    wrong_checksum[wrong_checksum.size() - 5] ^= 1;
    wrong_data[14] ^= 0x55;
    const struct {
        std::string bytes, message;
    } cases[] = {
        {"", "expected an IDX file, got 0 bytes"},
        {std::string(3, '\0'), "expected an IDX file, got 3 bytes"},
        {gzip(""), "expected an IDX file, got 0 bytes"},
        {"%PDF-1.4", "begins with two zero bytes"},
        {idx({2, 3}, "abcdef", 0x0D), "element type 8 (unsigned byte), got type 13"},
        {idx({}, ""), "1 to 4 dimensions, got 0"},
        {idx({1, 1, 1, 1, 1}, "a"), "1 to 4 dimensions, got 5"},
        {whole.substr(0, 10), "expected 2 dimensions, got the end of the file"},
        {gzip(whole.substr(0, 10)), "expected 2 dimensions, got the end of the file"},
        {idx({2, 3}, "abcde"), "a file that can hold at most 5 bytes"},
        {gzip(idx({2, 3}, "abcde")), "expected 6 bytes of data for shape [2,3], got 5: the file is truncated"},
        {idx({2, 3}, "abcdefg"), "expected 6 bytes of data for shape [2,3], got more"},
        {gzip(idx({2, 3}, "abcdefg")), "expected 6 bytes of data for shape [2,3], got more"},
        {idx({0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF}, "a"), "as much data as its shape"},
        {idx({0x7FFFFFFF, 0x7FFFFFFF}, "a"), "a file that can hold at most 1 bytes"},
        {gzip(idx({0x7FFFFFFF, 0x7FFFFFFF}, "a")), "a file that can hold at most"},
        {wrong_checksum, "cannot be decompressed: incorrect data check"},
        {wrong_data, "cannot be decompressed"},
        {"\x1f\x8b", "truncated"},
    };
    for (const auto& [bytes, message] : cases) {
        const fs::path input = file_with(bytes);
        EXPECT_THAT(error_of([&] { read_idx(input); }), AllOf(StartsWith(input.string() + ": "), HasSubstr(message)));
    }
    EXPECT_THAT(error_of([&] { read_idx(file("missing")); }), HasSubstr("No such file"));
}

TEST_F(Files, IdxRefusesEveryTruncation) {
    const std::string whole = idx({2, 3}, "abcdef"), compressed = gzip(whole);
    for (std::size_t length = 0; length < whole.size(); ++length)
        EXPECT_THROW(read_idx(file_with(whole.substr(0, length))), FileError) << length;
    for (std::size_t length = 0; length < compressed.size(); ++length)
        EXPECT_THROW(read_idx(file_with(compressed.substr(0, length))), FileError) << length;
}

TEST_F(Files, FashionMnistIsCheckedAsAWhole) {
    const auto write = [&](const std::string& part, std::uint32_t images, const std::string& labels) {
        file_with(idx({images, 28, 28}, std::string(images * 784UL, '\1')), part + "-images-idx3-ubyte");
        file_with(gzip(idx({std::uint32_t(labels.size())}, labels)), part + "-labels-idx1-ubyte.gz");
    };
    write("train", 3, std::string("\0\5\11", 3));
    EXPECT_THAT(error_of([&] { read_fashion_mnist(folder); }),
                AllOf(HasSubstr("missing there: t10k-images-idx3-ubyte[.gz], t10k-labels-idx1-ubyte[.gz]"),
                      HasSubstr(folder.string()), HasSubstr("apt-get install dataset-fashion-mnist")));
    write("t10k", 1, "\2");
    const FashionMnist data = read_fashion_mnist(folder);
    EXPECT_EQ(data.train.count, 3);
    EXPECT_EQ(data.train.images, std::vector<std::uint8_t>(3 * 784, 1));
    EXPECT_EQ(data.train.labels, (std::vector<std::uint8_t>{0, 5, 9}));
    EXPECT_EQ(data.test.labels, (std::vector<std::uint8_t>{2}));

    write("t10k", 2, "\2");
    EXPECT_THAT(error_of([&] { read_fashion_mnist(folder); }),
                HasSubstr("labels of shape [2], one per image, got [1]"));
    write("t10k", 1, "\12");
    EXPECT_THAT(error_of([&] { read_fashion_mnist(folder); }), HasSubstr("labels from 0 to 9, got 10 at 0"));
    file_with(idx({1, 27, 28}, std::string(27 * 28, '\0')), "t10k-images-idx3-ubyte");
    EXPECT_THAT(error_of([&] { read_fashion_mnist(folder); }),
                HasSubstr("images of shape [count,28,28], got [1,27,28]"));
}

TEST_F(Files, FashionMnistIsSearchedWhereTheEnvironmentSays) {
    setenv("DEEPPCR_DATA", folder.c_str(), 1);
    EXPECT_THAT(error_of([] { find_fashion_mnist(); }), HasSubstr("not found in " + folder.string()));
    // A folder that is given counts more.
    EXPECT_THAT(error_of([] { find_fashion_mnist("/nowhere"); }), HasSubstr("not found in /nowhere"));
    unsetenv("DEEPPCR_DATA");
}

TEST(FashionMnist, IsReadFromThePackage) {
    if (!fs::exists("/usr/share/datasets/fashion-mnist")) GTEST_SKIP() << "dataset-fashion-mnist is not installed";
    const FashionMnist data = read_fashion_mnist("/usr/share/datasets/fashion-mnist");
    EXPECT_EQ(data.train.count, 60'000);
    EXPECT_EQ(data.test.count, 10'000);
    EXPECT_EQ(data.train.images.size(), 60'000U * 784);
    for (const FashionMnist::Part* part : {&data.train, &data.test}) {
        std::array<index, 10> count{};
        for (const std::uint8_t label : part->labels) ++count[label];
        EXPECT_THAT(count, testing::Each(part->count / 10));
    }
}

// -------------------------------------------------------------------------------------------------------------- write

TEST_F(Files, WritingReplacesTheFileAtTheEndOnly) {
    write_file(file("x"), "old");
    {
        AtomicFile abandoned(file("x"));
        abandoned.write("new");
        EXPECT_EQ(contents(file("x")), "old");
    }
    EXPECT_EQ(contents(file("x")), "old");
    EXPECT_EQ(files_in_folder(), 1U);
    AtomicFile kept(file("x"));
    kept.write("new, ");
    kept.write("longer");
    EXPECT_EQ(contents(file("x")), "old");
    kept.commit();
    EXPECT_EQ(contents(file("x")), "new, longer");
    EXPECT_EQ(files_in_folder(), 1U);
}

TEST_F(Files, WritingKeepsLinksAndPermissions) {
    write_file(file("x"), "old");
    EXPECT_EQ(fs::status(file("x")).permissions() & fs::perms::owner_write, fs::perms::owner_write);
    fs::permissions(file("x"), fs::perms(0640));
    fs::create_symlink("x", file("link"));
    write_file(file("link"), "new");
    EXPECT_TRUE(fs::is_symlink(file("link")));
    EXPECT_EQ(contents(file("x")), "new");
    EXPECT_EQ(fs::status(file("x")).permissions(), fs::perms(0640));

    fs::create_symlink("yet-to-come", file("dangling"));
    write_file(file("dangling"), "made");
    EXPECT_EQ(contents(file("yet-to-come")), "made");
    fs::create_symlink("circle", file("circle"));
    EXPECT_THAT(error_of([&] { write_file(file("circle"), "x"); }), HasSubstr("too many symbolic links"));
}

TEST_F(Files, WritingToADeviceKeepsTheDevice) {
    write_file("/dev/null", "gone");
    EXPECT_TRUE(fs::is_character_file("/dev/null"));
    EXPECT_THAT(error_of([] { write_file("/dev/full", "x"); }),
                AllOf(StartsWith("/dev/full: "), HasSubstr("No space left")));
    EXPECT_TRUE(fs::is_character_file("/dev/full"));
}

TEST_F(Files, WritingWhereItCannotBeIsAnErrorBeforehandToo) {
    const struct {
        fs::path path;
        std::string message;
    } cases[] = {{file("missing") / "x", "No such file or directory"},
                 {folder, "expected a file name, got a folder"},
                 {file("x/"), "expected a file name, got a folder"},
                 {file("plain") / "x", "Not a directory"},
                 {file(std::string(300, 'n')), "File name too long"}};
    write_file(file("plain"), "old");
    for (const auto& [path, message] : cases) {
        EXPECT_THAT(error_of([&, &target = path] { write_file(target, "x"); }),
                    AllOf(StartsWith(path.string() + ": "), HasSubstr(message)));
        EXPECT_THAT(error_of([&, &target = path] { check_writable(target); }), StartsWith(path.string() + ": "));
    }
    EXPECT_NO_THROW(check_writable(file("new")));
    EXPECT_NO_THROW(check_writable(file("plain")));
    EXPECT_EQ(files_in_folder(), 1U);
}

/// Calls `write` in a child process in which no file can grow beyond 64 KiB, which is how a full disk looks to it.
/// Returns the message of its FileError.
std::string message_on_full_disk(const std::function<void()>& write) {
    std::array<int, 2> pipe_ends{};
    if (pipe(pipe_ends.data()) != 0) return "no pipe";
    const pid_t child = fork();
    if (child == 0) {
        std::signal(SIGXFSZ, SIG_IGN);
        const rlimit limit = {1 << 16, 1 << 16};
        setrlimit(RLIMIT_FSIZE, &limit);
        const std::string message = error_of(write);
        const ssize_t written = ::write(pipe_ends[1], message.data(), message.size());
        _exit(written == ssize_t(message.size()) ? 0 : 1);
    }
    close(pipe_ends[1]);
    std::string message(4096, '\0');
    message.resize(std::size_t(std::max<ssize_t>(0, read(pipe_ends[0], message.data(), message.size()))));
    close(pipe_ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? message : "the child process crashed";
}

TEST_F(Files, AFullDiskLeavesTheOldFileAndNoTemporary) {
    write_file(file("x"), "old");
    const std::vector<float> large(1 << 20);
    const std::function<void()> writers[] = {[&] {
                                                 write_npy(file("x"), {{1 << 20}, large});
                                             },
                                             [&] {
                                                 write_safetensors(file("x"), {{{"w", {{1 << 20}, large}}}, {}});
                                             },
                                             [&] { write_file(file("x"), std::string(1 << 20, 'x')); }};
    for (const auto& write : writers) {
        EXPECT_THAT(message_on_full_disk(write),
                    AllOf(StartsWith(file("x").string() + ": cannot be written: File too large"),
                          HasSubstr("the file stays as it was before")));
        EXPECT_EQ(contents(file("x")), "old");
        EXPECT_EQ(files_in_folder(), 1U);
    }
    EXPECT_THAT(message_on_full_disk([&] { write_npy(file("y"), {{1 << 20}, large}); }), HasSubstr("File too large"));
    EXPECT_EQ(files_in_folder(), 1U);
}

}  // namespace
}  // namespace deeppcr::files
