// What `train lm`, `train task`, `validate` and `plan` have in common: a language model's options, its plan and what
// Newton's method did, as text or JSON.
#pragma once

#include <string>
#include <vector>

#include <deeppcr/nn/language_model.hpp>

#include "command.hpp"
#include "given_options.hpp"

namespace deeppcr::nn {
struct TaskValidation;
}

namespace deeppcr::program {

inline std::vector<std::string> configuration_names() {
    std::vector<std::string> names;
    for (const auto& known : nn::language_configurations) names.emplace_back(known.name);
    return names;
}

/// access: the nn::LanguageModelOptions, as GivenOptions::value has it. The vocabulary is not among them.
template <class Target, class Access>
void add_model_options(GivenOptions<Target>& given, CLI::App& command, std::string& configuration, Access access) {
    command.add_option("--configuration", configuration, "A named size, which gives --width and --layers")
        ->check(CLI::IsMember(configuration_names()));
    const auto field = [access](auto member) {
        return [=](Target & target) -> auto& { return std::invoke(access, target).*member; };
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

/// What trainings of such models have in common, also where they are no language models.
template <class Target>
void add_training_options(GivenOptions<Target>& given, CLI::App& command, std::string& configuration) {
    add_model_options(given, command, configuration, &Target::model);
    given.value(
        "--model-seed", [](Target & target) -> auto& { return target.model.seed; }, "Of the initial weights");
    given.cells(&Target::evaluation);
    given.device();
    given.value("--steps", &Target::steps, "Optimiser steps");
    given.updates();
    given.value("--estimate-interval", &Target::estimate_interval,
                "Estimate the Lyapunov exponent every so many steps; 0: never");
    given.choice("--on-divergence", &Target::on_divergence, nn::on_divergence_names,
                 "What to do about a loss or gradient that is not finite");
    given.value("--validation-interval", &Target::validation_interval,
                "Validate every so many steps, besides the end; 0: not");
    given.value("--checkpoint-interval", &Target::checkpoint_interval,
                "Save every so many steps, besides the end; 0: not");
}

/// Before the options that are given are applied.
void apply_configuration(const std::string& name, nn::LanguageModelOptions& model);

/// For people, and as JSON.
void print_plan(const nn::LanguagePlan& plan, const nn::LanguagePlanOptions& options, Output& output);

inline Json newton_json(const nn::NewtonFigures& figures) {
    return {{"iterations", figures.iterations},    {"mean_iterations", figures.mean_iterations},
            {"residual", figures.residual},        {"lyapunov", figures.lyapunov},
            {"status", to_string(figures.status)}, {"sequential_steps", figures.sequential_steps}};
}

Json validation_json(const nn::TaskValidation& validation);
std::string validation_text(const nn::TaskValidation& validation);

}  // namespace deeppcr::program
