// deeppcr plan: what the training of a language model takes, without training it.
#include <unistd.h>

#include <cmath>
#include <memory>

#include "language_options.hpp"
#include "report.hpp"

namespace deeppcr::program {
namespace {

struct PlanArguments {
    std::string configuration;
    std::unique_ptr<GivenOptions<nn::LanguagePlanOptions>> given;
};

std::string bytes_text(double bytes) {
    const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
    int unit = 0;
    for (; bytes >= 1000 && unit < 4; ++unit) bytes /= 1000;
    return number_text(bytes) + " " + units[unit];
}

Exit run_plan(const PlanArguments& arguments, Output& output) {
    nn::LanguagePlanOptions options;
    apply_configuration(arguments.configuration, options.model);
    arguments.given->apply(options);
    print_plan(nn::plan_language_model(options), options, output);
    return Exit::done;
}

}  // namespace

void apply_configuration(const std::string& name, nn::LanguageModelOptions& model) {
    for (const auto& known : nn::language_configurations)
        if (name == known.name) {
            model.width = known.width;
            model.layers = known.layers;
        }
}

void print_plan(const nn::LanguagePlan& plan, const nn::LanguagePlanOptions& options, Output& output) {
    const nn::LanguageModelOptions& model = plan.model;
    const double machine = double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE));
    output.line(nn::name_of(nn::mixer_names, model.mixer) + ", " + count_text(model.layers) + " blocks x " +
                count_text(model.width) + ", mixer " + count_text(model.hidden) + ", MLP " + count_text(model.mlp) +
                ", vocabulary " + count_text(model.vocabulary));
    Table parameters{"", "", {{"part", false}, {"parameters"}}, {}};
    for (const auto& part : plan.parts) parameters.rows.push_back({part.name, count_text(part.parameters)});
    parameters.rows.push_back({"all", count_text(plan.parameters)});
    output.line(text(parameters));
    Table memory{"", "", {{"memory of a device", false}, {"bytes"}}, {}};
    const std::pair<const char*, index> kinds[] = {{"weights", plan.weights},
                                                   {"gradients", plan.gradients},
                                                   {"optimiser (AdamW)", plan.optimiser},
                                                   {"activations", plan.activations},
                                                   {"all", plan.bytes}};
    for (const auto& [name, bytes] : kinds) memory.rows.push_back({name, bytes_text(double(bytes))});
    output.line(text(memory));
    output.line("activations: " + bytes_text(double(plan.activations_per_token)) + " per token" +
                (options.recompute ? ", blocks recomputed" : "") + "; this machine has " + bytes_text(machine));
    output.line("operations: " + scientific_text(plan.forward_flops) + " per token forward, " +
                scientific_text(plan.training_flops) + " in training; " + scientific_text(plan.step_flops) +
                " per device in a step of " + count_text(plan.tokens_per_step) + " tokens");

    Json& json = output.result;
    json["mixer"] = nn::name_of(nn::mixer_names, model.mixer);
    json["vocabulary"] = model.vocabulary;
    json["width"] = model.width;
    json["layers"] = model.layers;
    json["hidden"] = model.hidden;
    json["mlp"] = model.mlp;
    json["parameters"] = plan.parameters;
    json["parts"] = Json::object();
    for (const auto& part : plan.parts) json["parts"][part.name] = part.parameters;
    json["memory"] = {{"weights", plan.weights},
                      {"gradients", plan.gradients},
                      {"optimiser", plan.optimiser},
                      {"activations", plan.activations},
                      {"activations_per_token", plan.activations_per_token},
                      {"all", plan.bytes},
                      {"machine", machine}};
    json["forward_flops_per_token"] = plan.forward_flops;
    json["training_flops_per_token"] = plan.training_flops;
    json["flops_per_step_and_device"] = plan.step_flops;
    json["tokens_per_step"] = plan.tokens_per_step;
}

void add_plan(Program& program) {
    const auto arguments = std::make_shared<PlanArguments>();
    CLI::App& command = program.add("plan", "Parameters, memory and operations that a language model takes",
                                    "  deeppcr plan --configuration 7B --vocabulary 32000 --batch 512 --devices 64 "
                                    "--micro-batch 1 --recompute 1 --number-bytes 2",
                                    [arguments](Output& output) { return run_plan(*arguments, output); });
    arguments->given = std::make_unique<GivenOptions<nn::LanguagePlanOptions>>(command);
    auto& given = *arguments->given;
    add_model_options(given, command, arguments->configuration, &nn::LanguagePlanOptions::model);
    given.value(
        "--vocabulary", [](nn::LanguagePlanOptions& options) -> index& { return options.model.vocabulary; },
        "Tokens that there are");
    given.value("--context", &nn::LanguagePlanOptions::context, "Steps per sequence");
    given.value("--batch", &nn::LanguagePlanOptions::batch, "Sequences per optimiser step");
    given.value("--micro-batch", &nn::LanguagePlanOptions::micro_batch,
                "Sequences that a device computes at once; 0: all of its own");
    given.value("--devices", &nn::LanguagePlanOptions::devices, "Devices that share the batch");
    given.value("--recompute", &nn::LanguagePlanOptions::recompute,
                "Whether blocks are computed again in the backward pass");
    given.value("--number-bytes", &nn::LanguagePlanOptions::number_bytes,
                "Bytes of what lies between matrix products: 4, or 2 for bfloat16");
}

}  // namespace deeppcr::program
