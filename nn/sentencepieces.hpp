// SentencePiece in a library of its own, which is loaded where it is needed: Debian's libsentencepiece brings a
// protobuf that must not meet LibTorch's in one name space.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

class SentencePieces {
public:
    virtual ~SentencePieces() = default;
    virtual index size() const = 0;
    virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;
    virtual std::string text(index token) const = 0;
};

/// deeppcr_load_sentencepieces: a model, as its file holds it; the caller deletes it. Throws InvalidArgument.
using LoadSentencePieces = SentencePieces*(const std::string& model);

/// deeppcr_learn_sentencepieces: a model of so many pieces, learned from lines of text. Throws InvalidArgument.
using LearnSentencePieces = std::string(const std::vector<std::string>& lines, index pieces);

}  // namespace deeppcr::nn
