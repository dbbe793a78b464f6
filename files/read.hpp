// Reading files whose every byte may be hostile: nothing is allocated for data that the file does not hold.
#pragma once

#include <cstdint>
#include <filesystem>

#include <files/error.hpp>

namespace deeppcr::files {

/// A regular file, open for reading from its beginning. Every failure is a FileError.
class InputFile {
public:
    explicit InputFile(const std::filesystem::path& path);
    ~InputFile();
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    const std::filesystem::path& path() const { return path_; }
    std::int64_t size() const { return size_; }
    std::int64_t remaining() const { return size_ - position_; }
    int descriptor() const { return descriptor_; }

    /// Reads exactly `bytes`; `part` names what is being read, for the error message of a truncated file.
    void read(void* destination, std::int64_t bytes, const std::string& part);

private:
    std::filesystem::path path_;
    int descriptor_ = -1;
    std::int64_t size_ = 0, position_ = 0;
};

}  // namespace deeppcr::files
