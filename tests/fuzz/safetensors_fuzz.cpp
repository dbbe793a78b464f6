#include <files/safetensors.hpp>

#include "fuzz.hpp"

using namespace deeppcr;

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
    for (const auto& folder : fuzz::corpus_folders(*argc, *argv)) {
        files::write_safetensors(folder / "empty", {});
        files::write_safetensors(folder / "every-type", {{{"a", {{2, 2}, std::vector<float>(4)}},
                                                          {"b", {{1}, std::vector<double>(1)}},
                                                          {"c", {{}, std::vector<std::int64_t>(1)}},
                                                          {"d", {{3}, std::vector<std::uint8_t>(3)}}},
                                                         {{"key", "value"}}});
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::expect_result_or_file_error(data, size, [](const auto& path) {
        for (const auto& [name, tensor] : files::read_safetensors(path).tensors) fuzz::expect_consistent(tensor);
    });
    return 0;
}
