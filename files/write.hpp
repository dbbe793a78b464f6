// Writing files that are either complete or untouched.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include <files/error.hpp>

namespace deeppcr::files {

/// A file that replaces `path` once it is complete. Writes go to a temporary file in the same folder; `commit` brings
/// it to the disk and renames it. Until then, and after any failure, the old file is as it was, and no temporary is
/// left behind. A symbolic link stays, and its target is replaced; permissions of an old file are kept. A device or
/// pipe (/dev/stdout) is written directly. Every failure is a FileError with the system's reason.
class AtomicFile {
public:
    explicit AtomicFile(const std::filesystem::path& path);
    ~AtomicFile();
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;

    void write(const void* data, std::size_t bytes);
    void write(std::string_view text) { write(text.data(), text.size()); }
    /// Replaces what was written first, in place: for a header that counts what follows it. Not on a device or pipe.
    void rewrite_beginning(const void* data, std::size_t bytes);
    void commit();

private:
    [[noreturn]] void fail(const std::string& action);
    std::filesystem::path path_, target_;
    std::string temporary_;  ///< empty where the target is written directly
    int descriptor_ = -1;
};

/// Replaces the file by `contents`, as AtomicFile does.
void write_file(const std::filesystem::path& path, std::string_view contents);

/// Throws FileError where `path` could not be written to: its folder is missing or not writable, or it is a folder
/// itself. For use before a long computation.
void check_writable(const std::filesystem::path& path);

}  // namespace deeppcr::files
