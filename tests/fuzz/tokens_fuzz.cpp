#include <files/tokens.hpp>

#include <zlib.h>

#include <cstring>

#include "fuzz.hpp"

using namespace deeppcr;

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    const std::vector<std::int32_t> tokens = {3, 1, 2, 0, 1};
    for (const auto& folder : fuzz::corpus_folders(*argc, *argv))
        for (const std::int64_t size : {4, 300, 70000}) {
            files::TokenFileWriter writer(folder / std::to_string(size), "vocabulary", size);
            writer.append(tokens);
            writer.finish(2);
        }
    return 0;
}

namespace {

void read(const std::uint8_t* data, std::size_t size) {
    fuzz::expect_result_or_file_error(data, size, [](const auto& path) {
        const files::TokenFile file(path);
        std::vector<std::int64_t> tokens(std::size_t(file.tokens()));
        file.read(0, file.tokens(), tokens.data());
        for (const std::int64_t token : tokens)
            if (token < 0 || token >= file.counts().vocabulary_size) std::abort();
        if (std::int64_t(file.vocabulary().size()) != file.counts().vocabulary_bytes) std::abort();
    });
}

}  // namespace

/// The bytes as they are, and with checksums that fit them: so that the checks behind those are reached.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    read(data, size);
    constexpr std::size_t header = 64;
    if (size < header) return 0;
    std::vector<std::uint8_t> fitting(data, data + size);
    const auto put = [&](std::size_t at, uLong checksum) {
        const auto value = std::uint32_t(checksum);
        std::memcpy(fitting.data() + at, &value, sizeof value);
    };
    put(52, crc32_z(0, fitting.data() + header, size - header));
    put(60, crc32_z(0, fitting.data(), 60));
    read(fitting.data(), size);
    return 0;
}
