// deeppcr prepare: text as tokens, for a language model.
#include <memory>
#include <optional>

#include <deeppcr/nn/tokens.hpp>

#include "command.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

struct PrepareArguments {
    std::vector<std::string> texts;
    std::string output = "text.tokens", sentencepiece;
    index pieces = 0;
    double validation = nn::PrepareOptions().validation;
    bool overwrite = false;
};

Exit run_prepare(const PrepareArguments& arguments, Output& output) {
    nn::PrepareOptions options;
    options.texts.assign(arguments.texts.begin(), arguments.texts.end());
    options.output = arguments.output;
    options.sentencepiece = arguments.sentencepiece;
    options.pieces = arguments.pieces;
    options.validation = arguments.validation;
    check_output(options.output, arguments.overwrite);

    std::optional<Progress> bar(std::in_place, "preparing", 1.0);
    options.progress = [&](index bytes, index all) {
        bar->update(all > 0 ? double(bytes) / double(all) : 0, count_text(bytes) + " bytes");
    };
    options.interrupted = interrupted;
    const nn::PreparedTokens result = nn::prepare_tokens(options);
    bar.reset();
    if (result.interrupted) throw Interrupted();

    output.line(count_text(result.bytes) + " bytes of text as " + count_text(result.training + result.validation) +
                " tokens (" + result.vocabulary + ") in " + seconds_text(result.seconds) + ": " +
                count_text(result.training) + " for training, " + count_text(result.validation) + " for validation");
    output.line("tokens: " + arguments.output + "; next: deeppcr train lm --tokens " + arguments.output);
    output.result.update(Json{{"tokens", arguments.output},
                              {"bytes", result.bytes},
                              {"training", result.training},
                              {"validation", result.validation},
                              {"vocabulary", result.vocabulary},
                              {"vocabulary_size", result.vocabulary_size},
                              {"seconds", result.seconds}});
    return Exit::done;
}

}  // namespace

void add_prepare(Program& program) {
    const auto arguments = std::make_shared<PrepareArguments>();
    CLI::App& command = program.add("prepare", "Turn text into the tokens that a language model is trained on",
                                    "  deeppcr prepare book.txt more.txt -o text.tokens\n"
                                    "  deeppcr prepare book.txt --pieces 4000\n"
                                    "  zcat texts.gz | deeppcr prepare - --sentencepiece tokeniser.model",
                                    [arguments](Output& output) { return run_prepare(*arguments, output); });
    command.add_option("texts", arguments->texts, "Text files, one after the other; -: standard input")->required();
    command.add_option("-o,--output", arguments->output, "The token file")->capture_default_str();
    command.add_option("--sentencepiece", arguments->sentencepiece,
                       "Tokens are the pieces of this SentencePiece model, instead of bytes");
    command.add_option("--pieces", arguments->pieces, "Learn a SentencePiece model of so many pieces from the text")
        ->capture_default_str();
    command.add_option("--validation", arguments->validation, "The part of the text, its end, that is for validation")
        ->capture_default_str();
    command.add_flag("--overwrite", arguments->overwrite, "Replace a token file that exists");
}

}  // namespace deeppcr::program
