// Token files: round trips, and files that must be refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <cstring>
#include <fstream>
#include <numeric>
#include <sstream>

#include <files/tokens.hpp>

#include "tests/messages.hpp"

namespace deeppcr::files {
namespace {

namespace fs = std::filesystem;
using deeppcr::index;  // not strings.h's
using testing::HasSubstr;

class Tokens : public testing::Test {
protected:
    Tokens() {
        std::string name = testing::TempDir() + "deeppcr-tokens-XXXXXX";
        folder = mkdtemp(name.data());
    }
    ~Tokens() override { fs::remove_all(folder); }

    fs::path path() const { return folder / "text.tokens"; }
    TokenCounts write(const std::vector<std::int32_t>& tokens, index vocabulary_size, index validation,
                      const std::string& vocabulary = {}) const {
        TokenFileWriter writer(path(), vocabulary, vocabulary_size);
        const std::size_t half = tokens.size() / 2;
        writer.append({tokens.data(), half});
        writer.append({});
        writer.append({tokens.data() + half, tokens.size() - half});
        return writer.finish(validation);
    }
    std::string bytes() const {
        std::ostringstream text;
        text << std::ifstream(path(), std::ios::binary).rdbuf();
        return text.str();
    }
    std::string error_of(const std::string& contents) const {
        std::ofstream(path(), std::ios::binary) << contents;
        const std::string message = message_of<FileError>([&] { const TokenFile file(path()); });
        EXPECT_TRUE(message == nothing_thrown || message.find(path().string()) != std::string::npos) << message;
        return message;
    }

    fs::path folder;
};

/// Checksums that fit the rest of the file, so that what they would hide is seen.
std::string with_checksums(std::string contents) {
    const auto put = [&](std::size_t at, uLong checksum) {
        const auto value = std::uint32_t(checksum);
        std::memcpy(contents.data() + at, &value, sizeof value);
    };
    const auto* const data = reinterpret_cast<const Bytef*>(contents.data());
    put(52, crc32_z(0, data + 64, contents.size() - 64));
    put(60, crc32_z(0, data, 60));
    return contents;
}

TEST_F(Tokens, ComeBackAsTheyWereWritten) {
    // The sizes at which a token takes one byte more.
    for (const index size : {1, 2, 255, 256, 257, 65536, 65537, 1 << 30})
        for (const std::string vocabulary : {"", "seven b", "8 bytes.", "something longer"}) {
            const std::vector<std::int32_t> tokens = {0, std::int32_t(size - 1), std::int32_t(size / 2), 0,
                                                      std::int32_t(size - 1)};
            const TokenCounts counts = write(tokens, size, 2, vocabulary);
            const TokenFile file(path());
            EXPECT_EQ(file.counts().checksum, counts.checksum);
            EXPECT_EQ(file.counts().vocabulary_size, size);
            EXPECT_EQ(file.counts().training, 3);
            EXPECT_EQ(file.counts().validation, 2);
            EXPECT_EQ(file.counts().token_bytes, size <= 256 ? 1u : size <= 65536 ? 2u : 4u);
            EXPECT_EQ(file.vocabulary(), vocabulary);
            std::vector<std::int64_t> found(5);
            file.read(0, 5, found.data());
            EXPECT_TRUE(std::equal(tokens.begin(), tokens.end(), found.begin()));
            file.read(3, 2, found.data());
            EXPECT_EQ(found[1], size - 1);
        }
}

TEST_F(Tokens, ThatAreNotThereAreRefused) {
    write({1, 2, 3}, 4, 1);
    const TokenFile file(path());
    std::int64_t token = 0;
    for (const auto& [first, count] : {std::pair<index, index>{3, 1}, {-1, 1}, {0, 4}, {0, -1}, {INT64_MAX, 1}})
        EXPECT_THROW(file.read(first, count, &token), InvalidArgument) << first << " " << count;
    EXPECT_THROW(write({4}, 4, 0), InvalidArgument);
    EXPECT_THROW(write({-1}, 4, 0), InvalidArgument);
    EXPECT_THROW(write({1}, 4, 2), InvalidArgument);
    EXPECT_THROW(write({1}, 0, 0), InvalidArgument);
}

TEST_F(Tokens, AreWrittenWholeOrNotAtAll) {
    write({1, 2, 3}, 4, 1);
    const std::string before = bytes();
    EXPECT_THROW(write({1, 2, 3, 4}, 4, 1), InvalidArgument);
    EXPECT_EQ(bytes(), before);
    EXPECT_EQ(std::distance(fs::directory_iterator(folder), fs::directory_iterator()), 1);
}

TEST_F(Tokens, ThatAreDamagedAreRefused) {
    std::vector<std::int32_t> tokens(100);
    std::iota(tokens.begin(), tokens.end(), 0);
    write(tokens, 200, 10, "vocabulary");
    const std::string good = bytes();
    EXPECT_EQ(error_of(good), nothing_thrown);
    for (std::size_t at = 0; at < good.size(); ++at) {
        std::string bad = good;
        bad[at] = char(bad[at] ^ 0x10);
        EXPECT_NE(error_of(bad), nothing_thrown) << "byte " << at;
    }
    for (const std::size_t size : {std::size_t(0), std::size_t(1), std::size_t(63), std::size_t(64), good.size() - 1})
        EXPECT_NE(error_of(good.substr(0, size)), nothing_thrown) << size << " bytes";
    EXPECT_THAT(error_of(good + "x"), HasSubstr("as the header says"));
}

TEST_F(Tokens, WithHostileHeadersAreRefused) {
    write({1, 2, 3}, 4, 1, "words");
    const std::string good = bytes();
    ASSERT_EQ(with_checksums(good), good);
    const auto with = [&](std::size_t at, std::uint64_t value, std::size_t bytes) {
        std::string bad = good;
        std::memcpy(bad.data() + at, &value, bytes);
        return error_of(with_checksums(bad));
    };
    for (const std::size_t at : {16, 24, 32, 40})  // the four counts
        for (const std::uint64_t value :
             {std::uint64_t(1) << 31, std::uint64_t(1) << 62, ~std::uint64_t(0), ~std::uint64_t(0) - 6})
            EXPECT_NE(with(at, value, 8), nothing_thrown) << "count at " << at << ": " << value;
    EXPECT_THAT(with(16, 0, 8), HasSubstr("vocabulary of 1 to"));
    EXPECT_THAT(with(16, 3, 8), HasSubstr("tokens below 3"));
    EXPECT_THAT(with(16, 300, 8), HasSubstr("2 bytes per token"));
    EXPECT_THAT(with(48, 0, 4), HasSubstr("bytes per token"));
    EXPECT_THAT(with(0, 0, 8), HasSubstr("token file"));
}

}  // namespace
}  // namespace deeppcr::files
