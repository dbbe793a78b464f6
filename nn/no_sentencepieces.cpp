#include <deeppcr/error.hpp>

#include "nn/sentencepieces.hpp"

namespace deeppcr::nn {

std::shared_ptr<const SentencePieces> load_sentencepieces(const std::string&) {
    throw InvalidArgument("vocabulary", "bytes, as this program was built without libsentencepiece-dev", "pieces");
}

std::string learn_sentencepieces(std::vector<std::string>, index pieces) {
    throw InvalidArgument("pieces", "0, as this program was built without libsentencepiece-dev",
                          std::to_string(pieces));
}

}  // namespace deeppcr::nn
