// Token files: a text as numbers, memory-mapped, with the vocabulary that they count in; its end is for validation.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include <deeppcr/array.hpp>
#include <files/error.hpp>
#include <files/write.hpp>

namespace deeppcr::files {

/// What the header of a token file says. The file: this header in 64 bytes, little-endian; the vocabulary, filled with
/// zeros to a multiple of 8 bytes; the tokens of training and then those of validation, each in token_bytes.
struct TokenCounts {
    index vocabulary_size = 0;   ///< tokens are 0 .. vocabulary_size - 1
    index vocabulary_bytes = 0;  ///< of its description; 0: tokens are bytes of the text
    index training = 0, validation = 0;
    std::uint32_t token_bytes = 1;  ///< 1, 2 or 4, the fewest that hold every token of the vocabulary
    std::uint32_t checksum = 0;     ///< CRC-32 of all that follows the header
};

/// A token file, mapped for reading; it must not be changed while it is. Any number of threads may read.
class TokenFile {
public:
    /// Reads all of it once, for its checksum. Throws FileError where it is damaged or no token file: where a count
    /// does not fit the file, the checksum is another, or a token is not in the vocabulary.
    explicit TokenFile(const std::filesystem::path& path);
    ~TokenFile();
    TokenFile(const TokenFile&) = delete;
    TokenFile& operator=(const TokenFile&) = delete;

    const std::filesystem::path& path() const { return path_; }
    const TokenCounts& counts() const { return counts_; }
    index tokens() const { return counts_.training + counts_.validation; }
    std::string vocabulary() const;
    /// Tokens first .. first + count - 1, of training and validation together, into `destination`. Throws
    /// InvalidArgument where the file does not have them.
    void read(index first, index count, std::int64_t* destination) const;

private:
    void check_contents() const;
    std::int64_t token(index position) const;

    std::filesystem::path path_;
    TokenCounts counts_;
    const std::uint8_t* contents_ = nullptr;
    std::size_t size_ = 0;
    const std::uint8_t* first_token_ = nullptr;
};

/// Writes a token file, atomically (see AtomicFile), as the tokens come.
class TokenFileWriter {
public:
    /// vocabulary: its description, any bytes. Throws InvalidArgument for a size that is not 1 to 2^31 - 1, FileError.
    TokenFileWriter(const std::filesystem::path& path, const std::string& vocabulary, index vocabulary_size);

    /// Throws InvalidArgument for a token that is not in the vocabulary, FileError.
    void append(std::span<const std::int32_t> tokens);
    index tokens() const { return counts_.training; }
    /// The last `validation` tokens are for validation. Nothing is at `path` before it returns. Throws InvalidArgument
    /// where there are fewer, FileError.
    TokenCounts finish(index validation);

private:
    void write(const void* data, std::size_t bytes);

    AtomicFile file_;
    TokenCounts counts_;
};

}  // namespace deeppcr::files
