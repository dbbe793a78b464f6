#include <files/idx.hpp>

#include <zlib.h>

#include <files/write.hpp>

#include "fuzz.hpp"

using namespace deeppcr;

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    const std::string plain("\0\0\x08\x02\0\0\0\x02\0\0\0\x03pixels", 18);
    for (const auto& folder : fuzz::corpus_folders(*argc, *argv)) {
        files::write_file(folder / "plain", plain);
        gzFile compressed = gzopen((folder / "compressed").c_str(), "wb");
        gzwrite(compressed, plain.data(), unsigned(plain.size()));
        gzclose(compressed);
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::expect_result_or_file_error(data, size,
                                      [](const auto& path) { fuzz::expect_consistent(files::read_idx(path)); });
    return 0;
}
