// safetensors files: named tensors and metadata, as Python's safetensors reads and writes them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

#include <files/error.hpp>
#include <files/tensor.hpp>

namespace deeppcr::files {

struct Safetensors {
    std::map<std::string, Tensor> tensors;  ///< F32, F64, I64 and U8
    std::map<std::string, std::string> metadata;
};

/// Reads a whole file. Throws FileError where the header is longer than 100 MB or than the file, is not the JSON that
/// the format asks for, repeats a name, or describes tensors that leave holes, overlap, do not fill the file exactly
/// or do not match their shapes; and for other element types, naming the one that came.
/// Source: github.com/huggingface/safetensors, "Format".
Safetensors read_safetensors(const std::filesystem::path& path);

/// Writes a file, atomically (see AtomicFile); the same contents give the same bytes. Names and metadata are UTF-8.
/// Throws InvalidArgument, FileError.
void write_safetensors(const std::filesystem::path& path, const Safetensors& contents);

/// CRC-32 of everything in it but the metadata "checksum", where such a number can be kept.
std::uint32_t checksum(const Safetensors& contents);

}  // namespace deeppcr::files
