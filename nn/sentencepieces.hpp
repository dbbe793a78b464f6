// SentencePiece behind a name: sentencepieces.cpp, or no_sentencepieces.cpp where a build has none.
#pragma once

#include <cstdint>
#include <memory>
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

/// Throws InvalidArgument.
std::shared_ptr<const SentencePieces> load_sentencepieces(const std::string& model);

/// A model of so many pieces, learned from lines of text. Throws InvalidArgument.
std::string learn_sentencepieces(std::vector<std::string> lines, index pieces);

}  // namespace deeppcr::nn
