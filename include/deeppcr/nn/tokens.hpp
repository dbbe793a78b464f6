// Tokens: text as numbers, by bytes or by SentencePiece, and `deeppcr prepare`, which writes them to a file. No
// LibTorch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::nn {

class SentencePieces;

/// What the tokens of a text stand for: bytes, of which there are 256, or the pieces of a SentencePiece model. Copies
/// share the model.
class Vocabulary {
public:
    /// description: as `description()` gives it; empty: bytes. Throws InvalidArgument where it is no SentencePiece
    /// model, or where this build has no SentencePiece.
    explicit Vocabulary(const std::string& description = {});

    index size() const;
    /// The SentencePiece model, as its file holds it; empty: bytes.
    const std::string& description() const { return description_; }
    /// "bytes", or "4,000 pieces, 1a2b3c4d": the last is a checksum of the model.
    std::string name() const;

    /// Text that is no UTF-8 loses the bytes that are not, where tokens are pieces.
    std::vector<std::int32_t> encode(std::string_view text) const;
    /// What a token adds to a text. Throws InvalidArgument for one that is not in the vocabulary.
    std::string text(index token) const;

private:
    std::string description_;
    std::shared_ptr<const SentencePieces> pieces_;
};

struct PrepareOptions {
    std::vector<std::filesystem::path> texts;  ///< one after the other; "-": standard input
    std::filesystem::path output;              ///< the token file; see files/tokens.hpp
    std::filesystem::path sentencepiece;       ///< a model of SentencePiece's; empty: none
    index pieces = 0;          ///< learn a model of so many pieces from the first 100 MB of text; 0: none
    double validation = 0.05;  ///< the part of the tokens, from the end, that is for validation
    std::function<void(index bytes, index all)> progress = {};  ///< all: 0 where standard input is read
    std::function<bool()> interrupted = {};                     ///< true: stops, and nothing is written
};

struct PreparedTokens {
    index bytes = 0, training = 0, validation = 0;  ///< of text; tokens
    index vocabulary_size = 0;
    std::string vocabulary;  ///< Vocabulary::name
    double seconds = 0;
    bool interrupted = false;
};

/// Writes the tokens of texts to a file: whole or not at all. Each line is encoded by itself, so that memory is for one
/// piece of the text at a time, but for the part that a model is learned from. Learned models have a piece for each
/// byte, and give any text of UTF-8 back as it was. Deterministic. Throws InvalidArgument (options, a text too small
/// for its validation or for so many pieces), FileError.
PreparedTokens prepare_tokens(const PrepareOptions& options);

}  // namespace deeppcr::nn
