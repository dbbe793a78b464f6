// deeppcr generate: text from a language model, token after token.
#include <cstdio>
#include <iostream>
#include <memory>

#include "language_options.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

struct GenerateArguments {
    std::string model, device = "cpu";
    std::unique_ptr<GivenOptions<nn::TextOptions>> given;
};

Exit run_generate(const GenerateArguments& arguments, Output& output) {
    nn::TextOptions options;
    arguments.given->apply(options);
    const nn::TextGenerator generator(arguments.model, arguments.device);
    warn_about_slow_blas(output);
    if (!output.json()) {
        std::cout << options.prompt << std::flush;
        options.write = [](std::string_view text) { std::cout << text << std::flush; };
    }
    options.interrupted = interrupted;
    const nn::GeneratedText result = generator.generate(options);
    if (!output.json()) std::cout << std::endl;
    if (!result.paces.empty())
        std::cerr << count_text(result.tokens) << " tokens in " << seconds_text(result.seconds) << ", "
                  << seconds_text(result.paces.back().seconds_per_token) << " per token at the end" << std::endl;

    Json& json = output.result;
    json["text"] = result.text;
    json["prompt_tokens"] = result.prompt_tokens;
    json["tokens"] = result.tokens;
    json["prompt_seconds"] = result.prompt_seconds;
    json["seconds"] = result.seconds;
    json["state_bytes"] = result.state_bytes;
    json["paces"] = Json::array();
    for (const auto& pace : result.paces)
        json["paces"].push_back({{"position", pace.position}, {"seconds_per_token", pace.seconds_per_token}});
    return result.interrupted ? Exit::interrupted : Exit::done;
}

}  // namespace

void add_generate(Program& program) {
    const auto arguments = std::make_shared<GenerateArguments>();
    CLI::App& command =
        program.add("generate", "Generate text by a language model",
                    "  deeppcr generate lm.safetensors --prompt \"In the beginning\" --temperature 0.8 --top-p 0.95",
                    [arguments](Output& output) { return run_generate(*arguments, output); });
    command.add_option("model", arguments->model, "What `deeppcr train lm` wrote (.safetensors)")->required();
    command.add_option("--device", arguments->device, "Where: cpu, cuda or cuda:<number>")->capture_default_str();
    arguments->given = std::make_unique<GivenOptions<nn::TextOptions>>(command);
    auto& given = *arguments->given;
    given.value("--prompt", &nn::TextOptions::prompt, "What the text begins with; a line begins without");
    given.value("--tokens", &nn::TextOptions::tokens, "How many to generate");
    given.value("--temperature", &nn::TextOptions::temperature, "Of the probabilities; 0: always the likeliest token");
    given.value("--top-k", &nn::TextOptions::top_k, "Draw from so many of the likeliest tokens; 0: all");
    given.value("--top-p", &nn::TextOptions::top_p,
                "Draw from the fewest likeliest tokens that have this probability together");
    given.value("--seed", &nn::TextOptions::seed, "Of the draws");
}

}  // namespace deeppcr::program
