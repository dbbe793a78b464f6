#include <files/png.hpp>

#include <png.h>

#include <algorithm>
#include <string>

#include <files/write.hpp>

namespace deeppcr::files {
namespace {

constexpr std::int64_t largest_side = 1 << 16;
constexpr std::uint8_t margin_grey = 128;

void check(const Picture& picture) {
    const bool sides =
        picture.width >= 1 && picture.height >= 1 && picture.width <= largest_side && picture.height <= largest_side;
    if (!sides || std::int64_t(picture.pixels.size()) != picture.width * picture.height)
        throw InvalidArgument("picture", "as many pixels as width x height, 1 to 65,536 each",
                              std::to_string(picture.pixels.size()) + " for " + std::to_string(picture.width) + " x " +
                                  std::to_string(picture.height));
}

png_image header(const Picture& picture) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    image.width = png_uint_32(picture.width);
    image.height = png_uint_32(picture.height);
    image.format = PNG_FORMAT_GRAY;
    return image;
}

}  // namespace

Picture grid(const std::vector<Picture>& pictures, std::int64_t columns, std::int64_t margin) {
    if (pictures.empty()) throw InvalidArgument("pictures", "at least one", "none");
    if (columns < 1) throw InvalidArgument("columns", "at least 1", std::to_string(columns));
    if (margin < 0) throw InvalidArgument("margin", "at least 0", std::to_string(margin));
    const Picture& first = pictures.front();
    columns = std::min(columns, std::int64_t(pictures.size()));
    const std::int64_t rows = (std::int64_t(pictures.size()) + columns - 1) / columns;
    Picture all{columns * (first.width + margin) - margin, rows * (first.height + margin) - margin, {}};
    if (all.width > largest_side || all.height > largest_side)
        throw InvalidArgument("pictures", "few enough for sides of 65,536 pixels", std::to_string(pictures.size()));
    all.pixels.assign(std::size_t(all.width * all.height), margin_grey);
    for (std::size_t i = 0; i < pictures.size(); ++i) {
        const Picture& one = pictures[i];
        check(one);
        if (one.width != first.width || one.height != first.height)
            throw InvalidArgument("pictures", "pictures of one size",
                                  std::to_string(one.width) + " x " + std::to_string(one.height));
        const std::int64_t left = std::int64_t(i) % columns * (first.width + margin);
        const std::int64_t top = std::int64_t(i) / columns * (first.height + margin);
        for (std::int64_t y = 0; y < one.height; ++y)
            std::copy_n(one.pixels.begin() + y * one.width, one.width,
                        all.pixels.begin() + (top + y) * all.width + left);
    }
    return all;
}

std::vector<std::uint8_t> encode_png(const Picture& picture) {
    check(picture);
    png_image image = header(picture);
    png_alloc_size_t bytes = PNG_IMAGE_PNG_SIZE_MAX(image);
    std::vector<std::uint8_t> file(bytes);
    if (png_image_write_to_memory(&image, file.data(), &bytes, 0, picture.pixels.data(), 0, nullptr) == 0)
        throw Error(std::string("libpng: ") + image.message);
    file.resize(bytes);
    return file;
}

void write_png(const std::filesystem::path& path, const Picture& picture) {
    const std::vector<std::uint8_t> file = encode_png(picture);
    AtomicFile out(path);
    out.write(file.data(), file.size());
    out.commit();
}

}  // namespace deeppcr::files
