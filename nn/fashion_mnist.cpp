#include <deeppcr/nn/fashion_mnist.hpp>

#include <ATen/ops/empty.h>

#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include <deeppcr/error.hpp>
#include <files/idx.hpp>

#include "nn/basics.hpp"

namespace deeppcr::nn {
namespace {

constexpr index pixels = 28 * 28;
// Of the 60,000 training images.
constexpr double mean = 0.2860, deviation = 0.3530;

ImageSet to_tensors(const files::FashionMnist::Part& part) {
    ImageSet set{at::empty({part.count, pixels}, at::kByte), at::empty({part.count}, at::kLong)};
    std::memcpy(set.images.data_ptr<std::uint8_t>(), part.images.data(), part.images.size());
    std::copy(part.labels.begin(), part.labels.end(), set.labels.data_ptr<std::int64_t>());
    return set;
}

ImageSet::Batch normalise(const at::Tensor& images, const at::Tensor& labels, at::ScalarType type) {
    return {images.to(type).div_(255 * deviation).sub_(mean / deviation), labels};
}

/// Uniform in [0, limit): rejection instead of std::uniform_int_distribution, whose numbers differ between libraries.
std::uint64_t below(std::mt19937_64& random, std::uint64_t limit) {
    const std::uint64_t accepted = std::mt19937_64::max() / limit * limit;
    for (;;)
        if (const std::uint64_t number = random(); number < accepted) return number % limit;
}

}  // namespace

ImageSet::Batch ImageSet::batch(const at::Tensor& rows, at::ScalarType type) const {
    return normalise(images.index_select(0, rows), labels.index_select(0, rows), type);
}

ImageSet::Batch ImageSet::batch(index first, index last, at::ScalarType type) const {
    return normalise(images.slice(0, first, last), labels.slice(0, first, last), type);
}

at::Tensor shuffled(index count, std::uint64_t seed, index epoch) {
    std::seed_seq words = seeds(seed, epoch);
    std::mt19937_64 random(words);
    at::Tensor order = at::empty({count}, at::kLong);
    auto* rows = order.data_ptr<std::int64_t>();
    std::iota(rows, rows + count, std::int64_t(0));
    for (index last = count - 1; last > 0; --last) std::swap(rows[last], rows[below(random, std::uint64_t(last) + 1)]);
    return order;
}

FashionMnist load_fashion_mnist(const std::filesystem::path& folder, std::uint64_t seed, index held_out,
                                index train_images) {
    const files::FashionMnist data = files::read_fashion_mnist(folder);
    const ImageSet all = to_tensors(data.train);
    if (held_out < 0 || held_out >= all.size())
        throw InvalidArgument("held_out", "0 to " + std::to_string(all.size() - 1), std::to_string(held_out));
    const index rest = all.size() - held_out;
    if (train_images < 0 || train_images > rest)
        throw InvalidArgument("train_images", "0 to " + std::to_string(rest), std::to_string(train_images));

    const at::Tensor order = shuffled(all.size(), seed, -1);  // epochs count from 0
    const auto take = [&](index first, index last) {
        const at::Tensor rows = order.slice(0, first, last);
        return ImageSet{all.images.index_select(0, rows), all.labels.index_select(0, rows)};
    };
    return {take(held_out, train_images ? held_out + train_images : all.size()), take(0, held_out),
            to_tensors(data.test)};
}

}  // namespace deeppcr::nn
