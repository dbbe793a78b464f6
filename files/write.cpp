#include <files/write.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace deeppcr::files {
namespace {

std::filesystem::path folder_of(const std::filesystem::path& file) {
    return file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
}

/// Where writing to `path` really goes: symbolic links are followed, also one whose target is yet to be made.
std::filesystem::path target_of(const std::filesystem::path& path) {
    std::filesystem::path target = path;
    std::error_code error;
    for (int links = 0; std::filesystem::is_symlink(target, error); ++links) {
        if (links == 40) throw FileError(path, "cannot be written: too many symbolic links");
        const std::filesystem::path next = std::filesystem::read_symlink(target, error);
        if (error) throw FileError(path, "cannot be written: " + error.message());
        target = next.is_absolute() ? next : folder_of(target) / next;
    }
    return target;
}

void bring_folder_to_disk(const std::filesystem::path& folder) {
    const int descriptor = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) return;  // the new file is complete; only a power cut could still bring the old one back
    fsync(descriptor);
    close(descriptor);
}

/// The status of the file that writing would replace, after the checks that need no descriptor.
bool existing(const std::filesystem::path& path, const std::filesystem::path& target, struct stat& status) {
    if (!target.has_filename()) throw FileError(path, "a file name", "a folder");
    if (stat(target.c_str(), &status) != 0) {
        if (errno != ENOENT) throw FileError(path, std::string("cannot be written: ") + std::strerror(errno));
        return false;
    }
    if (S_ISDIR(status.st_mode)) throw FileError(path, "a file name", "a folder");
    if (access(target.c_str(), W_OK) != 0)
        throw FileError(path, std::string("cannot be written: ") + std::strerror(errno));
    return true;
}

}  // namespace

AtomicFile::AtomicFile(const std::filesystem::path& path) : path_(path), target_(target_of(path)) {
    struct stat status = {};
    const bool exists = existing(path_, target_, status);
    if (exists && !S_ISREG(status.st_mode)) {
        descriptor_ = open(target_.c_str(), O_WRONLY | O_CLOEXEC);
        if (descriptor_ < 0) fail("opened");
        return;
    }
    static std::atomic<unsigned> files_written{0};
    const std::string name = "." + target_.filename().string().substr(0, 200) + ".partial-" + std::to_string(getpid());
    do {
        temporary_ = (folder_of(target_) / (name + "-" + std::to_string(++files_written))).string();
        descriptor_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (descriptor_ < 0 && errno == EEXIST);
    if (descriptor_ < 0) {
        temporary_.clear();
        fail("written");
    }
    if (exists && fchmod(descriptor_, status.st_mode & 07777) != 0) fail("written");
}

AtomicFile::~AtomicFile() {
    if (descriptor_ >= 0) close(descriptor_);
    if (!temporary_.empty()) unlink(temporary_.c_str());
}

void AtomicFile::fail(const std::string& action) {
    const int reason = errno;
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
    if (!temporary_.empty()) unlink(temporary_.c_str());
    temporary_.clear();
    std::error_code error;
    const bool kept = std::filesystem::is_regular_file(target_, error);
    throw FileError(path_, "cannot be " + action + ": " + std::strerror(reason) +
                               (kept ? "; the file stays as it was before" : ""));
}

void AtomicFile::write(const void* data, std::size_t bytes) {
    for (std::size_t done = 0; done < bytes;) {
        const std::size_t count = std::min(bytes - done, std::size_t(1) << 30);
        const ssize_t moved = ::write(descriptor_, static_cast<const char*>(data) + done, count);
        if (moved < 0 && errno == EINTR) continue;
        if (moved < 0) fail("written");
        done += std::size_t(moved);
    }
}

void AtomicFile::rewrite_beginning(const void* data, std::size_t bytes) {
    if (pwrite(descriptor_, data, bytes, 0) != ssize_t(bytes)) fail("written");
}

void AtomicFile::commit() {
    if (temporary_.empty()) {
        const int closed = close(descriptor_);
        descriptor_ = -1;
        if (closed != 0) fail("written");
        return;
    }
    if (fsync(descriptor_) != 0) fail("written");
    const int closed = close(descriptor_);
    descriptor_ = -1;
    if (closed != 0 || rename(temporary_.c_str(), target_.c_str()) != 0) fail("written");
    temporary_.clear();
    bring_folder_to_disk(folder_of(target_));
}

void write_file(const std::filesystem::path& path, std::string_view contents) {
    AtomicFile file(path);
    file.write(contents);
    file.commit();
}

void check_writable(const std::filesystem::path& path) {
    const std::filesystem::path target = target_of(path);
    struct stat status = {};
    if (existing(path, target, status) && !S_ISREG(status.st_mode)) return;
    const std::filesystem::path folder = folder_of(target);
    if (access(folder.c_str(), W_OK | X_OK) != 0)
        throw FileError(path, "cannot be written: the folder " + folder.string() + ": " + std::strerror(errno));
    const AtomicFile trial(path);  // what permissions do not tell, as of /proc
}

}  // namespace deeppcr::files
