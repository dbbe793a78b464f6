#include "nn/sentencepieces.hpp"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <unordered_map>

#include <deeppcr/error.hpp>

namespace deeppcr::nn {
namespace {

constexpr std::string_view space = "\xe2\x96\x81";  // U+2581, which stands for a space in a piece

class Model : public SentencePieces {
public:
    explicit Model(const std::string& model) {
        if (const auto status = processor_.LoadFromSerializedProto(model); !status.ok())
            throw InvalidArgument("vocabulary", "a model of SentencePiece", status.message());
        for (int token = 0; token < processor_.GetPieceSize(); ++token) texts_.push_back(text_of(token));
    }

    index size() const override { return index(texts_.size()); }

    std::vector<std::int32_t> encode(std::string_view text) const override {
        std::vector<int> tokens;
        if (const auto status = processor_.Encode(text, &tokens); !status.ok())
            throw InvalidArgument("text", "what SentencePiece can encode", status.message());
        return {tokens.begin(), tokens.end()};
    }

    std::string text(index token) const override { return texts_.at(std::size_t(token)); }

private:
    std::string text_of(int token) const {
        if (processor_.IsControl(token) || processor_.IsUnused(token)) return {};
        if (processor_.IsUnknown(token)) return "\xef\xbf\xbd";  // U+FFFD
        std::string piece = processor_.IdToPiece(token);
        if (processor_.IsByte(token)) return {char(std::stoi(piece.substr(3, 2), nullptr, 16))};  // <0x0A>
        for (auto at = piece.find(space); at != std::string::npos; at = piece.find(space, at + 1))
            piece.replace(at, space.size(), " ");
        return piece;
    }

    sentencepiece::SentencePieceProcessor processor_;
    std::vector<std::string> texts_;
};

class Lines : public sentencepiece::SentenceIterator {
public:
    explicit Lines(const std::vector<std::string>& lines) : lines_(lines) {}
    bool done() const override { return at_ == lines_.size(); }
    void Next() override { ++at_; }
    const std::string& value() const override { return lines_[at_]; }
    sentencepiece::util::Status status() const override { return {}; }

private:
    const std::vector<std::string>& lines_;
    std::size_t at_ = 0;
};

}  // namespace
}  // namespace deeppcr::nn

extern "C" {

extern deeppcr::nn::LoadSentencePieces deeppcr_load_sentencepieces;
extern deeppcr::nn::LearnSentencePieces deeppcr_learn_sentencepieces;

deeppcr::nn::SentencePieces* deeppcr_load_sentencepieces(const std::string& model) {
    return new deeppcr::nn::Model(model);
}

std::string deeppcr_learn_sentencepieces(const std::vector<std::string>& lines, deeppcr::index pieces) {
    // Nothing of a text is normalised away, and a byte that is in no piece has one of its own: it comes back as it was.
    const std::unordered_map<std::string, std::string> options = {{"vocab_size", std::to_string(pieces)},
                                                                  {"model_type", "bpe"},
                                                                  {"byte_fallback", "true"},
                                                                  {"normalization_rule_name", "identity"},
                                                                  {"remove_extra_whitespaces", "false"},
                                                                  {"add_dummy_prefix", "false"},
                                                                  {"max_sentence_length", "1048576"},
                                                                  {"num_threads", "1"},
                                                                  {"minloglevel", "2"}};
    deeppcr::nn::Lines all(lines);
    std::string model;
    if (const auto status = sentencepiece::SentencePieceTrainer::Train(options, &all, &model); !status.ok())
        throw deeppcr::InvalidArgument(
            "pieces", "a number that SentencePiece can learn from this text (" + std::string(status.message()) + ")",
            std::to_string(pieces));
    return model;
}

}  // extern "C"
