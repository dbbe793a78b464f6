#include <files/idx.hpp>

#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include <files/read.hpp>

namespace deeppcr::files {
namespace {

constexpr std::uint8_t unsigned_byte = 0x08;
constexpr index largest_compression = 1032;  // of deflate: 258 bytes from 2 bits

/// The bytes of a file, decompressed where it is a gzip file.
class IdxStream {
public:
    explicit IdxStream(const std::filesystem::path& path) : file_(path) {
        std::array<std::uint8_t, 2> opening{};
        file_.read(opening.data(), std::min<index>(file_.size(), 2), "IDX file");
        compressed_ = opening == std::array<std::uint8_t, 2>{0x1F, 0x8B};
        if (lseek(file_.descriptor(), 0, SEEK_SET) != 0) throw FileError(path, "cannot be read");
        const int descriptor = dup(file_.descriptor());
        gzip_.reset(descriptor < 0 ? nullptr : gzdopen(descriptor, "rb"));
        if (!gzip_) {
            if (descriptor >= 0) close(descriptor);
            throw FileError(path, "cannot be read: out of memory or file descriptors");
        }
        gzbuffer(gzip_.get(), 1 << 17);
    }

    /// More bytes than this cannot come.
    index most_bytes() const { return compressed_ ? file_.size() * largest_compression : file_.size(); }

    /// Reads up to `bytes`; fewer only at the end of the stream.
    index read(std::uint8_t* destination, index bytes) {
        const int moved = gzread(gzip_.get(), destination, unsigned(bytes));
        int error = Z_OK;
        const std::string message = gzerror(gzip_.get(), &error);
        if (error == Z_BUF_ERROR) throw FileError(file_.path(), "the compressed data is truncated");
        // zlib's message begins with a name of its own for the file, "<fd:3>: ".
        if (moved < 0)
            throw FileError(file_.path(), "cannot be decompressed: " + message.substr(message.find(' ') + 1));
        return moved;
    }

private:
    struct Close {
        void operator()(gzFile file) const { gzclose_r(file); }
    };
    InputFile file_;
    bool compressed_ = false;
    std::unique_ptr<gzFile_s, Close> gzip_;
};

bool exists_with_or_without_gz(const std::filesystem::path& file) {
    std::error_code error;
    return std::filesystem::exists(file, error) || std::filesystem::exists(file.string() + ".gz", error);
}

std::filesystem::path with_or_without_gz(const std::filesystem::path& file) {
    std::error_code error;
    return std::filesystem::exists(file, error) ? file : std::filesystem::path(file.string() + ".gz");
}

constexpr const char* missing_package =
    "the data set is Debian's package dataset-fashion-mnist: `apt-get install dataset-fashion-mnist`, or name its "
    "folder with --data or DEEPPCR_DATA";

FashionMnist::Part read_part(const std::filesystem::path& folder, const std::string& name) {
    const std::filesystem::path image_file = with_or_without_gz(folder / (name + "-images-idx3-ubyte"));
    const std::filesystem::path label_file = with_or_without_gz(folder / (name + "-labels-idx1-ubyte"));
    Tensor images = read_idx(image_file), labels = read_idx(label_file);
    if (images.shape.size() != 3 || images.shape[0] == 0 || images.shape[1] != 28 || images.shape[2] != 28)
        throw FileError(image_file, "images of shape [count,28,28]", to_string(images.shape));
    if (labels.shape.size() != 1 || labels.shape[0] != images.shape[0])
        throw FileError(label_file, "labels of shape [" + std::to_string(images.shape[0]) + "], one per image",
                        to_string(labels.shape));
    auto& label_values = std::get<std::vector<std::uint8_t>>(labels.values);
    const auto wrong = std::find_if(label_values.begin(), label_values.end(), [](auto label) { return label > 9; });
    if (wrong != label_values.end())
        throw FileError(label_file, "labels from 0 to 9",
                        std::to_string(*wrong) + " at " + std::to_string(wrong - label_values.begin()));
    return {images.shape[0], std::move(std::get<std::vector<std::uint8_t>>(images.values)), std::move(label_values)};
}

}  // namespace

Tensor read_idx(const std::filesystem::path& path) {
    IdxStream stream(path);
    std::array<std::uint8_t, 4> magic{};
    const index came = stream.read(magic.data(), index(magic.size()));
    if (came < index(magic.size())) throw FileError(path, "an IDX file", std::to_string(came) + " bytes");
    if (magic[0] != 0 || magic[1] != 0)
        throw FileError(path, "an IDX file, which begins with two zero bytes", "others");
    if (magic[2] != unsigned_byte)
        throw FileError(path, "IDX element type 8 (unsigned byte)", "type " + std::to_string(magic[2]));
    const int dimensions = magic[3];
    if (dimensions < 1 || dimensions > 4)
        throw FileError(path, "an IDX file of 1 to 4 dimensions", std::to_string(dimensions));

    Tensor tensor{{}, std::vector<std::uint8_t>()};
    for (int i = 0; i < dimensions; ++i) {
        std::array<std::uint8_t, 4> size{};
        if (stream.read(size.data(), index(size.size())) < index(size.size()))
            throw FileError(path, std::to_string(dimensions) + " dimensions", "the end of the file");
        tensor.shape.push_back(index(size[0]) << 24 | index(size[1]) << 16 | index(size[2]) << 8 | index(size[3]));
    }
    const index header = 4 + 4 * dimensions;
    const std::optional<index> count = element_count(tensor.shape, 1);
    if (!count || *count > stream.most_bytes() - header)
        throw FileError(path, "as much data as its shape " + to_string(tensor.shape) + " says",
                        "a file that can hold at most " + std::to_string(stream.most_bytes() - header) + " bytes");

    auto& values = std::get<std::vector<std::uint8_t>>(tensor.values);
    constexpr index piece = 1 << 20;
    for (index read = 0; read < *count;) {
        const index wanted = std::min(piece, *count - read);
        values.resize(std::size_t(read + wanted));
        const index moved = stream.read(values.data() + read, wanted);
        read += moved;
        if (moved < wanted)
            throw FileError(path, std::to_string(*count) + " bytes of data for shape " + to_string(tensor.shape),
                            std::to_string(read) + ": the file is truncated");
    }
    // Also makes zlib compare the checksum at the end of a compressed file.
    std::uint8_t beyond = 0;
    if (stream.read(&beyond, 1) != 0)
        throw FileError(path, std::to_string(*count) + " bytes of data for shape " + to_string(tensor.shape), "more");
    values.shrink_to_fit();
    return tensor;
}

std::filesystem::path find_fashion_mnist(const std::filesystem::path& folder) {
    std::vector<std::filesystem::path> searched;
    if (!folder.empty())
        searched = {folder};
    else if (const char* named = std::getenv("DEEPPCR_DATA"); named != nullptr && *named != '\0')
        searched = {named};
    else
        searched = {"/usr/share/datasets/fashion-mnist", "/usr/local/share/datasets/fashion-mnist"};

    std::string missing;
    for (const std::filesystem::path& candidate : searched) {
        missing.clear();
        for (const char* part : {"train", "t10k"})
            for (const char* kind : {"-images-idx3-ubyte", "-labels-idx1-ubyte"})
                if (!exists_with_or_without_gz(candidate / (std::string(part) + kind)))
                    missing += (missing.empty() ? "" : ", ") + std::string(part) + kind + "[.gz]";
        if (missing.empty()) return candidate;
    }
    std::string places;
    for (const std::filesystem::path& candidate : searched) places += (places.empty() ? "" : ", ") + candidate.string();
    throw FileError("Fashion-MNIST",
                    "not found in " + places + " (missing there: " + missing + "); " + missing_package);
}

FashionMnist read_fashion_mnist(const std::filesystem::path& folder) {
    const std::filesystem::path found = find_fashion_mnist(folder);
    return {read_part(found, "train"), read_part(found, "t10k")};
}

}  // namespace deeppcr::files
