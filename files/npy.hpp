// NumPy's .npy files: float32 and float64 arrays.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <files/error.hpp>
#include <files/tensor.hpp>

namespace deeppcr::files {

/// What the header of a .npy file says, checked against the size of the file.
struct NpyHeader {
    std::vector<index> shape;
    bool float64 = false;  ///< else float32
    bool fortran_order = false;
    index bytes = 0;  ///< of the data
};

/// Reads the header only. Versions 1.0, 2.0 and 3.0; little-endian float32 and float64, up to 32 dimensions. Throws
/// FileError for everything else, and where the file is not exactly as long as its header says.
NpyHeader read_npy_header(const std::filesystem::path& path);

/// Reads an array; Fortran order is converted. values: float or double. Throws FileError as `read_npy_header`.
/// Source: numpy.org, NEP 1 and numpy.lib.format.
Tensor read_npy(const std::filesystem::path& path);

/// Writes an array of float or double as version 1.0, atomically (see AtomicFile). Throws InvalidArgument, FileError.
void write_npy(const std::filesystem::path& path, const Tensor& tensor);

}  // namespace deeppcr::files
