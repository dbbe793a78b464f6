// Pictures, as libpng itself reads them.
#include <gtest/gtest.h>
#include <png.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include <files/error.hpp>
#include <files/png.hpp>

namespace deeppcr::files {
namespace {

namespace fs = std::filesystem;

/// A folder of its own for each test, removed at its end.
class Png : public testing::Test {
protected:
    Png() {
        std::string name = testing::TempDir() + "deeppcr-png-XXXXXX";
        folder = mkdtemp(name.data());
    }
    ~Png() override { fs::remove_all(folder); }

    fs::path folder;
};

/// As libpng reads it.
Picture decoded(const fs::path& path) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    EXPECT_NE(png_image_begin_read_from_file(&image, path.c_str()), 0) << image.message;
    image.format = PNG_FORMAT_GRAY;
    Picture picture{image.width, image.height, std::vector<std::uint8_t>(PNG_IMAGE_SIZE(image))};
    EXPECT_NE(png_image_finish_read(&image, nullptr, picture.pixels.data(), 0, nullptr), 0) << image.message;
    return picture;
}

TEST_F(Png, PicturesAreWrittenAsPng) {
    Picture picture{7, 5, {}};
    for (int i = 0; i < 35; ++i) picture.pixels.push_back(std::uint8_t(i * 7));
    write_png(folder / "picture.png", picture);
    const Picture read = decoded(folder / "picture.png");
    EXPECT_EQ(read.width, 7);
    EXPECT_EQ(read.height, 5);
    EXPECT_EQ(read.pixels, picture.pixels);
}

TEST_F(Png, PicturesStandInAGrid) {
    const std::vector<Picture> pictures(5, Picture{2, 3, std::vector<std::uint8_t>(6, 255)});
    const Picture all = grid(pictures, 3, 1);
    EXPECT_EQ(all.width, 3 * 2 + 2);
    EXPECT_EQ(all.height, 2 * 3 + 1);
    EXPECT_EQ(std::count(all.pixels.begin(), all.pixels.end(), 255), 5 * 6);
    EXPECT_EQ(all.pixels[2], 128);                               // between two pictures
    EXPECT_EQ(all.pixels[std::size_t(4 * all.width + 7)], 128);  // where the sixth would be
    EXPECT_EQ(grid({pictures[0]}, 8).pixels, pictures[0].pixels);
}

TEST_F(Png, ImpossiblePicturesAreRefused) {
    EXPECT_THROW(write_png(folder / "none.png", Picture{3, 2, std::vector<std::uint8_t>(5)}), InvalidArgument);
    EXPECT_THROW(write_png(folder / "none.png", Picture{0, 0, {}}), InvalidArgument);
    EXPECT_THROW(grid({}, 3), InvalidArgument);
    EXPECT_THROW(grid({Picture{1, 1, {0}}}, 0), InvalidArgument);
    EXPECT_THROW(grid({Picture{1, 1, {0}}, Picture{2, 1, {0, 0}}}, 2), InvalidArgument);
    EXPECT_FALSE(fs::exists(folder / "none.png"));
    EXPECT_THROW(write_png(folder / "missing" / "x.png", Picture{1, 1, {0}}), FileError);
}

}  // namespace
}  // namespace deeppcr::files
