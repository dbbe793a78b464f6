#include <deeppcr/nn/tokens.hpp>

#include <dlfcn.h>
#include <unistd.h>
#include <zlib.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <optional>

#include <files/read.hpp>
#include <files/tokens.hpp>

#include "nn/basics.hpp"
#include "nn/sentencepieces.hpp"

namespace deeppcr::nn {
namespace {

constexpr index part_bytes = 1 << 20;            // of text at a time
constexpr index learned_from = 100'000'000;      // bytes
constexpr std::size_t longest_line = 1'000'000;  // longer ones are cut

std::string grouped(index value) {
    std::string text = std::to_string(value);
    for (index at = index(text.size()) - 3; at > 0; at -= 3) text.insert(std::size_t(at), ",");
    return text;
}

std::string contents_of(const std::filesystem::path& path) {
    files::InputFile file(path);
    std::string contents(std::size_t(file.size()), '\0');
    file.read(contents.data(), file.size(), "the model");
    return contents;
}

/// A function of the library that holds SentencePiece, by its name.
template <class Function>
Function* sentencepiece_function(const char* name) {
    // Its names for itself come first, and nobody else sees them: see sentencepieces.hpp.
    static void* const library = dlopen("libdeeppcr_sentencepiece.so", RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
    if (library == nullptr)
        throw InvalidArgument("vocabulary", "bytes, as SentencePiece cannot be loaded",
                              std::string("pieces: ") + dlerror());
    return reinterpret_cast<Function*>(dlsym(library, name));
}

/// A text in parts: of a file, or of standard input.
class Text {
public:
    explicit Text(const std::filesystem::path& path) : path_(path) {
        if (path != "-") file_.emplace(path);
    }
    index size() const { return file_ ? file_->size() : 0; }

    /// Empty: the end.
    std::string next() {
        std::string part(std::size_t(file_ ? std::min<index>(part_bytes, file_->remaining()) : part_bytes), '\0');
        if (file_) {
            file_->read(part.data(), index(part.size()), "the text");
            return part;
        }
        ssize_t count = 0;
        do count = ::read(STDIN_FILENO, part.data(), part.size());
        while (count < 0 && errno == EINTR);
        if (count < 0) throw FileError(path_, std::string("standard input cannot be read: ") + std::strerror(errno));
        part.resize(std::size_t(count));
        return part;
    }

private:
    std::filesystem::path path_;
    std::optional<files::InputFile> file_;
};

/// A text's lines, each with its end, from the parts that it comes in. What is too long for a line is cut where a
/// character of UTF-8 begins.
class LineReader {
public:
    template <class Visit>
    void add(std::string_view part, const Visit& visit) {
        rest_ += part;
        std::size_t begin = 0;
        for (;;) {
            std::size_t end = rest_.find('\n', begin);
            if (end == std::string::npos && rest_.size() - begin < longest_line + 4) break;
            end = end == std::string::npos ? rest_.size() : end + 1;
            if (end - begin > longest_line) {
                end = begin + longest_line;
                while (end > begin + longest_line - 4 && (std::uint8_t(rest_[end]) & 0xC0) == 0x80) --end;
            }
            visit(std::string_view(rest_).substr(begin, end - begin));
            begin = end;
        }
        rest_.erase(0, begin);
    }
    template <class Visit>
    void finish(const Visit& visit) {
        if (!rest_.empty()) visit(std::string_view(rest_));
        rest_.clear();
    }

private:
    std::string rest_;
};

void check(const PrepareOptions& options) {
    if (options.texts.empty()) throw InvalidArgument("texts", "at least one file, or -", "none");
    if (!(options.validation >= 0 && options.validation < 1))
        throw InvalidArgument("validation", "0 to below 1", std::to_string(options.validation));
    if (options.pieces < 0) throw InvalidArgument("pieces", "at least 0", std::to_string(options.pieces));
    if (options.pieces > 0 && !options.sentencepiece.empty())
        throw InvalidArgument("pieces", "0 where a model is given", std::to_string(options.pieces));
}

class Preparation {
public:
    explicit Preparation(const PrepareOptions& options) : options_(options) {}

    PreparedTokens run() {
        for (const auto& path : options_.texts) {
            texts_.push_back(std::make_unique<Text>(path));
            if (path == "-") unknown_size_ = true;
            all_ += texts_.back()->size();
        }
        const Vocabulary vocabulary(options_.pieces > 0              ? learn()
                                    : options_.sentencepiece.empty() ? std::string()
                                                                     : contents_of(options_.sentencepiece));
        files::TokenFileWriter writer(options_.output, vocabulary.description(), vocabulary.size());
        const bool bytes = vocabulary.description().empty();
        const auto write = [&](std::string_view text) { writer.append(vocabulary.encode(text)); };
        result_.bytes = 0;
        each_part([&](std::string_view part) { bytes ? write(part) : lines_.add(part, write); });
        if (result_.interrupted) return result_;
        lines_.finish(write);
        const auto validation = index(std::llround(options_.validation * double(writer.tokens())));
        if (validation >= writer.tokens())
            throw InvalidArgument("texts", "a text with tokens for training",
                                  std::to_string(writer.tokens()) + " tokens");
        const files::TokenCounts counts = writer.finish(validation);
        result_.training = counts.training;
        result_.validation = counts.validation;
        result_.vocabulary_size = counts.vocabulary_size;
        result_.vocabulary = vocabulary.name();
        return result_;
    }

private:
    /// First what was read ahead, then the texts to their ends.
    template <class Visit>
    void each_part(const Visit& visit) {
        for (const std::string& part : read_ahead_) take(part, visit);
        read_ahead_.clear();
        while (!result_.interrupted) {
            const std::string part = next();
            if (part.empty()) break;
            take(part, visit);
        }
    }
    template <class Visit>
    void take(const std::string& part, const Visit& visit) {
        if (result_.interrupted) return;
        visit(part);
        result_.bytes += index(part.size());
        if (options_.progress) options_.progress(result_.bytes, unknown_size_ ? 0 : all_);
        result_.interrupted = options_.interrupted && options_.interrupted();
    }
    std::string next() {
        for (; at_ < texts_.size(); ++at_)
            if (std::string part = texts_[at_]->next(); !part.empty()) return part;
        return {};
    }

    std::string learn() {
        std::vector<std::string> lines;
        LineReader reader;
        const auto keep = [&](std::string_view line) {
            if (line.ends_with('\n')) line.remove_suffix(1);
            if (!line.empty()) lines.emplace_back(line);
        };
        for (index bytes = 0; bytes < learned_from;) {
            std::string part = next();
            if (part.empty()) break;
            reader.add(part, keep);
            bytes += index(part.size());
            read_ahead_.push_back(std::move(part));
        }
        reader.finish(keep);
        return sentencepiece_function<LearnSentencePieces>("deeppcr_learn_sentencepieces")(lines, options_.pieces);
    }

    const PrepareOptions& options_;
    std::vector<std::unique_ptr<Text>> texts_;
    std::size_t at_ = 0;
    index all_ = 0;
    bool unknown_size_ = false;
    std::vector<std::string> read_ahead_;
    LineReader lines_;
    PreparedTokens result_;
};

}  // namespace

Vocabulary::Vocabulary(const std::string& description) : description_(description) {
    if (!description.empty())
        pieces_.reset(sentencepiece_function<LoadSentencePieces>("deeppcr_load_sentencepieces")(description));
}

index Vocabulary::size() const { return pieces_ ? pieces_->size() : 256; }

std::string Vocabulary::name() const {
    if (!pieces_) return "bytes";
    char checksum[16];
    std::snprintf(checksum, sizeof checksum, "%08lx",
                  crc32_z(0, reinterpret_cast<const Bytef*>(description_.data()), description_.size()));
    return grouped(size()) + " pieces, " + checksum;
}

std::vector<std::int32_t> Vocabulary::encode(std::string_view text) const {
    if (pieces_) return pieces_->encode(text);
    std::vector<std::int32_t> tokens;
    tokens.reserve(text.size());
    for (const char byte : text) tokens.push_back(std::uint8_t(byte));
    return tokens;
}

std::string Vocabulary::text(index token) const {
    if (token < 0 || token >= size())
        throw InvalidArgument("token", "0 to " + std::to_string(size() - 1), std::to_string(token));
    return pieces_ ? pieces_->text(token) : std::string(1, char(token));
}

PreparedTokens prepare_tokens(const PrepareOptions& options) {
    check(options);
    files::check_writable(options.output);
    const auto begin = Clock::now();
    PreparedTokens result = Preparation(options).run();
    result.seconds = seconds_since(begin);
    return result;
}

}  // namespace deeppcr::nn
