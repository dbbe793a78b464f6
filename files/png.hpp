// Pictures as PNG files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace deeppcr::files {

/// A grey picture: rows from the top, pixels from the left, 0 black to 255 white.
struct Picture {
    std::int64_t width = 0, height = 0;
    std::vector<std::uint8_t> pixels;  ///< [height, width]
};

/// Small pictures of one size side by side, `columns` to a row, with a margin of `margin` grey pixels between them. The
/// last row may be short.
Picture grid(const std::vector<Picture>& pictures, std::int64_t columns, std::int64_t margin = 2);

/// The bytes of a PNG file. Throws InvalidArgument where the sizes do not fit the pixels.
std::vector<std::uint8_t> encode_png(const Picture& picture);

/// Writes a file, atomically (see AtomicFile). Throws FileError, InvalidArgument.
void write_png(const std::filesystem::path& path, const Picture& picture);

}  // namespace deeppcr::files
