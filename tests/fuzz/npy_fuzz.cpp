#include <files/npy.hpp>

#include "fuzz.hpp"

using namespace deeppcr;

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    for (const auto& folder : fuzz::corpus_folders(*argc, *argv)) {
        files::write_npy(folder / "float32", {{2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6}});
        files::write_npy(folder / "float64", {{2, 1, 2, 2}, std::vector<double>(8, 0.5)});
        files::write_npy(folder / "scalar", {{}, std::vector<double>(1)});
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::expect_result_or_file_error(data, size,
                                      [](const auto& path) { fuzz::expect_consistent(files::read_npy(path)); });
    return 0;
}
