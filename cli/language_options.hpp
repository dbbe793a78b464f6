// What `train lm` and `plan` have in common: the options of a language model, and its plan as text.
#pragma once

#include <string>

#include <deeppcr/nn/language_model.hpp>

#include "command.hpp"
#include "given_options.hpp"

namespace deeppcr::program {

/// access(Target&): the nn::LanguageModelOptions. The vocabulary is not among them.
template <class Target, class Access>
void add_model_options(GivenOptions<Target>& given, CLI::App& command, std::string& configuration, Access access) {
    std::vector<std::string> names;
    for (const auto& known : nn::language_configurations) names.emplace_back(known.name);
    command.add_option("--configuration", configuration, "A named size, which gives --width and --layers")
        ->check(CLI::IsMember(names));
    const auto field = [access](auto member) {
        return [=](Target & target) -> auto& { return access(target).*member; };
    };
    using Model = nn::LanguageModelOptions;
    given.choice("--mixer", field(&Model::mixer), nn::mixer_names, "What mixes the steps of a block");
    given.value("--width", field(&Model::width), "Numbers per token");
    given.value("--layers", field(&Model::layers), "Blocks");
    given.value("--hidden", field(&Model::hidden), "Channels of the mixer; 0: --width");
    given.value("--heads", field(&Model::heads), "Parts of the mixer's projection, or of attention; 0: chosen");
    given.value("--mlp", field(&Model::mlp),
                "Channels of the MLP; 0: so that the parameters are as many as of para_gru");
    given.value("--tied", field(&Model::tied), "Whether the logits are products with the embedding");
}

/// Before the options that are given are applied.
void apply_configuration(const std::string& name, nn::LanguageModelOptions& model);

/// For people, and as JSON.
void print_plan(const nn::LanguagePlan& plan, const nn::LanguagePlanOptions& options, Output& output);

}  // namespace deeppcr::program
