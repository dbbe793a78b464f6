#include <files/read.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace deeppcr::files {

InputFile::InputFile(const std::filesystem::path& path) : path_(path) {
    // Without O_NONBLOCK, opening a named pipe would wait for its writer.
    descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) throw FileError(path, std::string("cannot be opened: ") + std::strerror(errno));
    struct stat status = {};
    if (fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(descriptor_);
        throw FileError(path, "a regular file", S_ISDIR(status.st_mode) ? "a folder" : "a device or pipe");
    }
    size_ = status.st_size;
}

InputFile::~InputFile() { close(descriptor_); }

void InputFile::read(void* destination, std::int64_t bytes, const std::string& part) {
    const auto truncated = [&](std::int64_t present) {
        throw FileError(path_, std::to_string(bytes) + " bytes of " + part,
                        std::to_string(present) + ": the file is truncated");
    };
    if (bytes > remaining()) truncated(remaining());
    for (std::int64_t done = 0; done < bytes;) {
        // Linux moves at most 2 GiB per call.
        const auto count = std::size_t(std::min<std::int64_t>(bytes - done, std::int64_t(1) << 30));
        const ssize_t moved = ::read(descriptor_, static_cast<char*>(destination) + done, count);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) throw FileError(path_, std::string("cannot be read: ") + std::strerror(errno));
        if (moved == 0) truncated(done);
        done += moved;
    }
    position_ += bytes;
}

}  // namespace deeppcr::files
