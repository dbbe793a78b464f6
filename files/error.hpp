// What goes wrong with a file, as one type.
#pragma once

#include <filesystem>
#include <string>

#include <deeppcr/error.hpp>

namespace deeppcr {

/// A file that cannot be read, written or understood. The message begins with the file's name, and says what was
/// expected and what came.
struct FileError : Error {
    FileError(const std::filesystem::path& file, const std::string& problem) : Error(file.string() + ": " + problem) {}
    FileError(const std::filesystem::path& file, const std::string& expected, const std::string& actual)
        : FileError(file, "expected " + expected + ", got " + actual) {}
};

}  // namespace deeppcr
