#include <files/tokens.hpp>

#include <sys/mman.h>
#include <zlib.h>

#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include <files/read.hpp>

namespace deeppcr::files {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are mapped as they are");

struct Header {
    char format[16] = {'d', 'e', 'e', 'p', 'p', 'c', 'r', ' ', 't', 'o', 'k', 'e', 'n', 's', ' ', '1'};
    std::uint64_t vocabulary_size = 0, vocabulary_bytes = 0, training = 0, validation = 0;
    std::uint32_t token_bytes = 0, contents_checksum = 0, unused = 0, header_checksum = 0;
};
static_assert(sizeof(Header) == 64);

constexpr std::uint64_t largest = std::numeric_limits<std::int32_t>::max();

std::uint32_t checksum_of(std::uint32_t before, const void* data, std::size_t bytes) {
    return bytes > 0 ? std::uint32_t(crc32_z(before, static_cast<const Bytef*>(data), bytes)) : before;
}

std::uint32_t header_checksum(const Header& header) {
    return checksum_of(0, &header, offsetof(Header, header_checksum));
}

std::uint32_t bytes_for(std::uint64_t vocabulary_size) {
    return vocabulary_size <= 1 << 8 ? 1 : vocabulary_size <= 1 << 16 ? 2 : 4;
}

std::uint64_t filled(std::uint64_t bytes) { return (bytes + 7) / 8 * 8; }

std::string hexadecimal(std::uint32_t value) {
    char text[16];
    std::snprintf(text, sizeof text, "%08x", unsigned(value));
    return text;
}

/// The counts of a header that fits a file of `size` bytes exactly.
TokenCounts checked(const std::filesystem::path& path, const Header& header, std::uint64_t size) {
    if (std::memcmp(header.format, Header().format, sizeof header.format) != 0)
        throw FileError(path, "a token file of deeppcr prepare", "another format");
    if (header.header_checksum != header_checksum(header))
        throw FileError(path, "checksum " + hexadecimal(header.header_checksum) + " of the header",
                        hexadecimal(header_checksum(header)));
    if (header.vocabulary_size < 1 || header.vocabulary_size > largest)
        throw FileError(path, "a vocabulary of 1 to " + std::to_string(largest) + " tokens",
                        std::to_string(header.vocabulary_size));
    if (header.token_bytes != bytes_for(header.vocabulary_size))
        throw FileError(path, std::to_string(bytes_for(header.vocabulary_size)) + " bytes per token",
                        std::to_string(header.token_bytes));
    // No sum or product below overflows, as each count is at most the size of the file.
    for (const std::uint64_t count : {header.vocabulary_bytes, header.training, header.validation})
        if (count > size)
            throw FileError(path, "counts that fit " + std::to_string(size) + " bytes", std::to_string(count));
    const std::uint64_t expected =
        sizeof header + filled(header.vocabulary_bytes) + (header.training + header.validation) * header.token_bytes;
    if (expected != size)
        throw FileError(path, std::to_string(expected) + " bytes, as the header says", std::to_string(size));
    return {index(header.vocabulary_size),
            index(header.vocabulary_bytes),
            index(header.training),
            index(header.validation),
            header.token_bytes,
            header.contents_checksum};
}

}  // namespace

TokenFile::TokenFile(const std::filesystem::path& path) : path_(path) {
    InputFile file(path);
    Header header;
    file.read(&header, sizeof header, "the header");
    counts_ = checked(path, header, std::uint64_t(file.size()));
    size_ = std::size_t(file.size());
    void* const mapped = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
    if (mapped == MAP_FAILED) throw FileError(path, std::string("cannot be mapped: ") + std::strerror(errno));
    contents_ = static_cast<const std::uint8_t*>(mapped);
    first_token_ = contents_ + sizeof header + filled(std::uint64_t(counts_.vocabulary_bytes));
    try {
        check_contents();
    } catch (...) {
        munmap(mapped, size_);
        throw;
    }
}

TokenFile::~TokenFile() { munmap(const_cast<std::uint8_t*>(contents_), size_); }

void TokenFile::check_contents() const {
    const std::uint32_t found = checksum_of(0, contents_ + sizeof(Header), size_ - sizeof(Header));
    if (found != counts_.checksum)
        throw FileError(path_, "checksum " + hexadecimal(counts_.checksum), hexadecimal(found) + ": it is damaged");
    for (index position = 0; position < tokens(); ++position)
        if (const std::int64_t value = token(position); value >= counts_.vocabulary_size)
            throw FileError(path_, "tokens below " + std::to_string(counts_.vocabulary_size), std::to_string(value));
}

std::string TokenFile::vocabulary() const {
    return {reinterpret_cast<const char*>(contents_) + sizeof(Header), std::size_t(counts_.vocabulary_bytes)};
}

std::int64_t TokenFile::token(index position) const {
    std::uint32_t value = 0;
    std::memcpy(&value, first_token_ + position * counts_.token_bytes, counts_.token_bytes);
    return value;
}

void TokenFile::read(index first, index count, std::int64_t* destination) const {
    if (first < 0 || count < 0 || first > tokens() - count)
        throw InvalidArgument("tokens", "part of the " + std::to_string(tokens()) + " of " + path_.string(),
                              std::to_string(count) + " from " + std::to_string(first) + " on");
    for (index i = 0; i < count; ++i) destination[i] = token(first + i);
}

TokenFileWriter::TokenFileWriter(const std::filesystem::path& path, const std::string& vocabulary,
                                 index vocabulary_size)
    : file_(path) {
    if (vocabulary_size < 1 || vocabulary_size > index(largest))
        throw InvalidArgument("vocabulary_size", "1 to " + std::to_string(largest), std::to_string(vocabulary_size));
    counts_.vocabulary_size = vocabulary_size;
    counts_.vocabulary_bytes = index(vocabulary.size());
    counts_.token_bytes = bytes_for(std::uint64_t(vocabulary_size));
    const Header room{};
    file_.write(&room, sizeof room);
    file_.rewrite_beginning(&room, sizeof room);  // as `finish` will: a pipe refuses it here, before the work
    write(vocabulary.data(), vocabulary.size());
    const std::string fill(filled(vocabulary.size()) - vocabulary.size(), '\0');
    write(fill.data(), fill.size());
}

void TokenFileWriter::write(const void* data, std::size_t bytes) {
    counts_.checksum = checksum_of(counts_.checksum, data, bytes);
    file_.write(data, bytes);
}

void TokenFileWriter::append(std::span<const std::int32_t> tokens) {
    std::vector<std::uint8_t> bytes(tokens.size() * counts_.token_bytes);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i] < 0 || tokens[i] >= counts_.vocabulary_size)
            throw InvalidArgument("tokens", "0 to " + std::to_string(counts_.vocabulary_size - 1),
                                  std::to_string(tokens[i]));
        std::memcpy(bytes.data() + i * counts_.token_bytes, &tokens[i], counts_.token_bytes);
    }
    write(bytes.data(), bytes.size());
    counts_.training += index(tokens.size());
}

TokenCounts TokenFileWriter::finish(index validation) {
    if (validation < 0 || validation > counts_.training)
        throw InvalidArgument("validation",
                              "0 to the " + std::to_string(counts_.training) + " tokens that were written",
                              std::to_string(validation));
    counts_.training -= validation;
    counts_.validation = validation;
    Header header;
    header.vocabulary_size = std::uint64_t(counts_.vocabulary_size);
    header.vocabulary_bytes = std::uint64_t(counts_.vocabulary_bytes);
    header.training = std::uint64_t(counts_.training);
    header.validation = std::uint64_t(counts_.validation);
    header.token_bytes = counts_.token_bytes;
    header.contents_checksum = counts_.checksum;
    header.header_checksum = header_checksum(header);
    file_.rewrite_beginning(&header, sizeof header);
    file_.commit();
    return counts_;
}

}  // namespace deeppcr::files
