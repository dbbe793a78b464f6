// What the fuzz targets share: bytes as a file without a disk, seeds, and the rule that a reader either reads or throws
// FileError.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include <files/error.hpp>
#include <files/tensor.hpp>

namespace deeppcr::fuzz {

/// The file that every call of the target reads: in memory, but with a path.
inline std::filesystem::path file_of(const std::uint8_t* data, std::size_t size) {
    static const int descriptor = memfd_create("input", 0);
    if (ftruncate(descriptor, 0) != 0 || pwrite(descriptor, data, size, 0) != ssize_t(size)) std::abort();
    return "/proc/self/fd/" + std::to_string(descriptor);
}

/// Calls `read` on the bytes. Any exception but FileError ends the program, which is what the fuzzer looks for.
template <class Read>
void expect_result_or_file_error(const std::uint8_t* data, std::size_t size, Read read) {
    const std::filesystem::path path = file_of(data, size);
    try {
        read(path);
    } catch (const FileError&) {
    }
}

/// A tensor that was read has as many values as its shape says; InvalidArgument ends the program too.
inline void expect_consistent(const files::Tensor& tensor) { files::check_consistent(tensor, "tensor"); }

/// The folders among the arguments of the program, made where missing: that is where seeds belong.
inline std::vector<std::filesystem::path> corpus_folders(int argc, char** argv) {
    std::vector<std::filesystem::path> folders;
    for (int i = 1; i < argc; ++i) {
        if (*argv[i] == '-' || std::filesystem::is_regular_file(argv[i])) continue;
        std::filesystem::create_directories(argv[i]);
        folders.emplace_back(argv[i]);
    }
    return folders;
}

}  // namespace deeppcr::fuzz
