// deeppcr reproduce: the papers' experiments on this machine, as a summary, a page to read and a file of numbers.
#include "reproduce.hpp"

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>

#include <deeppcr/execution.hpp>
#include <deeppcr/nn/training.hpp>
#include <files/write.hpp>

namespace deeppcr::program {
namespace {

struct ReproduceArguments {
    std::string part = "all";
    std::filesystem::path output = "deeppcr-report";
    Experiment experiment;

    bool wants(const std::string& name) const { return part == name || part == "all"; }

    std::string command() const {
        return "deeppcr reproduce " + part + " --output " + output.string() + " --seed " +
               std::to_string(experiment.seed) + " --tolerance " + scientific_text(experiment.tolerance) +
               (experiment.data.empty() ? "" : " --data " + experiment.data.string()) +
               (experiment.text.empty() ? "" : " --text " + experiment.text.string()) +
               (experiment.model.empty() ? "" : " --model " + experiment.model.string()) +
               (experiment.quick ? " --quick" : "") + (experiment.full ? " --full" : "");
    }
};

std::string processor_name() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
        if (line.rfind("model name", 0) == 0 && line.find(": ") != std::string::npos)
            return line.substr(line.find(": ") + 2);
    return "unknown";
}

std::string compiler() {
#ifdef __clang__
    return std::string("Clang ") + __clang_version__;
#else
    return std::string("GCC ") + __VERSION__;
#endif
}

/// Of OpenBLAS' long description, its name and version.
std::string first_words(const std::string& text, int words) {
    std::size_t end = 0;
    while (words-- > 0 && end != std::string::npos) end = text.find(' ', end + (end > 0 ? 1 : 0));
    return text.substr(0, end);
}

Json machine() {
    utsname system = {};
    uname(&system);
    const nn::LibTorch torch = nn::libtorch();
    return {{"processor", processor_name()},
            {"architecture", system.machine},
            {"processors", sysconf(_SC_NPROCESSORS_ONLN)},
            {"threads", default_threads()},
            {"simd", simd_target()},
            {"memory_bytes", std::int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE)},
            {"system", std::string(system.sysname) + " " + system.release},
            {"compiler", compiler()},
            {"libtorch", torch.version},
            {"blas", first_words(torch.blas, 2)}};
}

std::string now() {
    const std::time_t time = std::time(nullptr);
    std::tm parts = {};
    gmtime_r(&time, &parts);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
    return text;
}

/// Explains results.json to those who read it later.
Json schema() {
    return {
        {"units",
         "seconds are wall-clock; *_ratio is sequential / parallel of the seconds beside it, above 1 parallel "
         "is faster; *_difference is the largest absolute difference from sequential over the largest "
         "absolute sequential value; accuracies are fractions; null: not measured"},
        {"complete", "false: interrupted, or failed after this was written; the lists hold what was finished"},
        {"quick", "true: tiny sizes, which show only that everything works"},
        {"agreement",
         "whether every difference measured is within its tolerance and no training failed; null where none was "
         "measured"},
        {"mlp.configurations[]",
         "width, depth (layers), batch, repetitions, and for each of sequential, pcr, scan: forward_seconds and "
         "backward_seconds (medians), *_quartiles (first and third), and of pcr and scan also status, iterations "
         "(Newton), ratios, and the differences of all states and of all gradients; a method whose status is not "
         "converged has no numbers beyond iterations"},
        {"resnet.training",
         "for each of sequential and deeppcr: lists with one value per training step (loss, accuracy, seconds; "
         "forward_seconds and backward_seconds of the residual layers alone; of deeppcr also iterations of the slowest "
         "sequence, mean_iterations, status, residual), their medians, and the result on the test set"},
        {"resnet.seconds_ratio", "median seconds per training step, sequential / deeppcr"},
        {"resnet.same_parameters[]",
         "both methods on one batch with the same parameters, after so many training steps: differences of the logits "
         "and of the gradients, the largest and by parameter"},
        {"rnn.training[]",
         "cell, how it was trained, loss on sequences kept apart before and after, lyapunov: the exponent of each "
         "channel, channel: the one measured, counted from 0; or failure: why the training failed"},
        {"rnn.single[]",
         "one channel: cell, weights (initialised, trained), steps, lyapunov, repetitions, methods: of each method as "
         "the Report has it (method, status, iterations), seconds (median), quartiles (first and third), runs (timed), "
         "ratio and difference; a method whose status is neither converged nor finished_sequentially has no numbers "
         "beyond iterations; where lyapunov is not below 0 differences do not count"},
        {"rnn.map[]",
         "the same by steps and channels, weights as initialised, without Newton's method; winner: overlap or "
         "shooting, the faster whose third quartile is below sequential's first, else sequential; best_ratio: the "
         "larger of the ratios of overlap and shooting; best_over_automatic: seconds of the fastest of the three / of "
         "automatic; lyapunov only where a difference exceeds the tolerance"},
        {"rnn.accuracy[]",
         "cell, variance of the recurrent coefficients, name of the method, error: largest difference from the double "
         "sequential result over the largest value, estimate: the Report's own, relative likewise, \"infinite\" "
         "where it overflows, null where it has none, good: the error is at most 2e-6, or the estimate is more than "
         "that"},
        {"diffusion.trials[]",
         "sampler, steps, surrogate and tolerance; status, iterations; sequential_calls, dependent_calls: calls of the "
         "network that wait for each other, a pass with full Jacobians counts as two; rows_ratio: noisy images that "
         "the network saw, parallel / sequential; pixel_difference: the largest, as a fraction of the range; "
         "residuals: per pass, as a fraction of the tolerance; null where it did not converge"},
        {"diffusion.quality",
         "Fréchet distances of parallel from sequential images of the same noise; images in each set; features of the "
         "classifier; sets: by sampler and steps, noise_floor: between two sequential sets of different noise, "
         "to_test_images: from as many of the test set"},
        {"diffusion.in_flight[]", "the same by the number of images, and the method that automatic takes"},
        {"diffusion.picture", "PNG in base64: sequential images above parallel ones"},
        {"swap.search[]",
         "arm, learning_rate (of swap and swa: of phase 2), stopping_accuracy of phase 1 and how many epochs it took; "
         "held_out_accuracy: null where the training diverged; chosen: taken for the trials"},
        {"swap.trials[]",
         "seed; arms: accuracy and loss on the test set, and of those that were trained images (by all workers), "
         "seconds "
         "(wall clock, workers one after the other), processor_seconds, modelled_seconds (not measured: the slowest "
         "worker of each phase); workers: the mean before averaging; line: between the weights of two workers; "
         "barrier: the most that the line's loss exceeds the straight line between its ends"},
        {"lm.trainings[]",
         "mixer, seed, parameters, tokens (bytes, in all steps), seconds (beside another training); loss (nats), "
         "perplexity and bits_per_byte on final_tokens bytes of validation text; validations: the same loss on "
         "validation_tokens bytes during the training; curve: lists by optimiser step: loss, and of cells "
         "mean_iterations (Newton), residual (the largest), lyapunov (the largest exponent; null where not estimated); "
         "or failure: why the training failed"},
        {"lm.comparisons[]",
         "trainings with the same seed: differences: of each step's loss, parallel from sequential evaluation, over "
         "the "
         "sequential loss; rounding_differences: the same of sequential evaluation with the batch in two halves from "
         "that in one piece; difference and rounding_difference: the largest; agrees: difference is at most "
         "loss_tolerance; sequential: its losses"},
        {"lm.speed[]",
         "tokens_per_second of training with all threads: the median of rounds; against_lstm: the median of the "
         "ratios to lstm in the same round"},
        {"lm.generation[]",
         "seconds_per_token at position (tokens generated by then), the median of the last 100; state_bytes at the "
         "end; "
         "text: the first bytes"},
        {"tasks.trainings[]",
         "task, mixer, seed, parameters; steps: at most, steps_done: until every answer of a validation was right; "
         "seconds (beside another training); accuracy and loss (nats) of all answers and last_accuracy of each "
         "sequence's last one, on validation_sequences sequences after the last step; of cells there iterations (the "
         "most), lyapunov (the largest exponent), sequential_loss (of the same model evaluated sequentially) and "
         "loss_difference, at most loss_tolerance; validations: the same during the training; curve: lists by "
         "optimiser step: loss, accuracy, length of the sequences, and of cells as in lm.trainings[]; or failure: why "
         "the training failed"}};
}

constexpr const char* disagreement =
    "Sequential and parallel disagree beyond the stated tolerances, or a training failed.";

std::string facts_text(const Json& value) { return value.is_string() ? value.get<std::string>() : value.dump(); }

std::string report_page(const Json& results) {
    Page page("deeppcr reproduce: parallel against sequential evaluation");
    if (results["quick"].get<bool>())
        page.notice("Quick run: tiny sizes, which show only that everything works. The times mean nothing.",
                    Table::Tone::plain);
    if (!results["complete"].get<bool>())
        page.notice("Incomplete: the run was interrupted or failed. This page shows what was finished before.",
                    Table::Tone::bad);
    if (results["agreement"].is_boolean()) {
        if (results["agreement"].get<bool>())
            page.notice("Sequential and parallel agree within the stated tolerances in everything measured.",
                        Table::Tone::good);
        else
            page.notice(disagreement, Table::Tone::bad);
    }
    page.paragraph(
        "A network evaluated in parallel over its layers (DeepPCR, arXiv 2309.16318) computes what layer-by-layer "
        "evaluation computes: Newton's method over all layers at once, each iteration one block bidiagonal system "
        "solved by parallel cyclic reduction (PCR) or by a work-efficient scan. This page compares both on this "
        "machine, over the layers of networks, the time steps of recurrent cells and the denoising steps of diffusion "
        "models. The baseline is the fastest "
        "sequential method here, a fused kernel, not a loop over layers.");

    Table facts{.title = {}, .caption = {}, .columns = {{"This run", false}, {"", false}}, .rows = {}};
    const Json& machine = results["machine"];
    facts.rows = {
        {"command", results["command"].get<std::string>()},
        {"version", results["version"].get<std::string>() + ", " + facts_text(machine["compiler"]) + ", LibTorch " +
                        facts_text(machine["libtorch"]) + " with " + facts_text(machine["blas"])},
        {"date", results["date"].get<std::string>()},
        {"duration", clock_time(results["seconds"].get<double>())},
        {"seed", facts_text(results["seed"])},
        {"processor", facts_text(machine["processor"]) + ", " + facts_text(machine["processors"]) + " processors, " +
                          facts_text(machine["architecture"])},
        {"threads, SIMD", facts_text(machine["threads"]) + " threads, " + facts_text(machine["simd"])},
        {"memory", number_text(machine["memory_bytes"].get<double>() / (1 << 30)) + " GiB"},
        {"system", facts_text(machine["system"])}};
    page.table(facts);
    if (results.contains("mlp")) describe_mlp(results["mlp"], page);
    if (results.contains("resnet")) describe_resnet(results["resnet"], page);
    if (results.contains("rnn")) describe_rnn(results["rnn"], page);
    if (results.contains("diffusion")) describe_diffusion(results["diffusion"], page);
    if (results.contains("swap")) describe_swap(results["swap"], page);
    if (results.contains("lm")) describe_language_model(results["lm"], page);
    if (results.contains("tasks")) describe_tasks(results["tasks"], page);
    return page.html();
}

/// Both files, each whole or untouched. With `complete` false until the last part is done, so that what was finished
/// outlives whatever goes wrong later.
void write_report(const ReproduceArguments& arguments, const Json& results) {
    files::write_file(arguments.output / "report.html", report_page(results));
    files::write_file(arguments.output / "results.json",
                      results.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

void prepare_folder(const ReproduceArguments& arguments) {
    std::error_code error;
    std::filesystem::create_directories(arguments.output, error);
    if (error || !std::filesystem::is_directory(arguments.output))
        throw FileError(arguments.output, "the folder for the report cannot be created: " +
                                              (error ? error.message() : "a file of this name exists"));
    for (const char* name : {"report.html", "results.json"}) files::check_writable(arguments.output / name);
}

Exit reproduce(const ReproduceArguments& arguments, Output& output) {
    const double tolerance = arguments.experiment.tolerance;
    if (!(tolerance > 0 && std::isfinite(tolerance)))
        throw InvalidArgument("--tolerance", "a finite number above 0", std::to_string(tolerance));
    if (arguments.wants("resnet")) {
        check_resnet_data(arguments.experiment);
        warn_about_slow_blas(output);
    }
    if (arguments.wants("diffusion")) check_diffusion_data(arguments.experiment);
    if (arguments.wants("swap")) check_swap_data(arguments.experiment);
    if (arguments.wants("lm")) check_language_model_data(arguments.experiment);
    prepare_folder(arguments);

    const auto begin = Clock::now();
    Json results{{"program", "deeppcr reproduce"},
                 {"version", version()},
                 {"complete", false},
                 {"quick", arguments.experiment.quick},
                 {"agreement", nullptr},
                 {"date", now()},
                 {"seconds", 0.0},
                 {"command", arguments.command()},
                 {"seed", arguments.experiment.seed},
                 {"machine", machine()},
                 {"schema", schema()}};
    results.update(output.result);  // warnings
    output.line("deeppcr " + version() + " on " + results["machine"]["processor"].get<std::string>() + ", " +
                std::to_string(default_threads()) + " threads, " + simd_target() + ", seed " +
                std::to_string(arguments.experiment.seed) +
                (arguments.experiment.quick ? ", quick run: the times mean nothing" : "") + "\n");

    using Run = Json (*)(const Experiment&);
    using Summarise = std::string (*)(const Json&);
    struct Part {
        std::string name, title;
        Run run;
        Summarise summarise;
    };
    std::vector<Part> parts;
    if (arguments.wants("mlp")) parts.push_back({"mlp", "MLP", run_mlp, summarise_mlp});
    if (arguments.wants("resnet")) parts.push_back({"resnet", "ResNet", run_resnet, summarise_resnet});
    if (arguments.wants("rnn")) parts.push_back({"rnn", "RNN", run_rnn, summarise_rnn});
    if (arguments.wants("diffusion")) parts.push_back({"diffusion", "Diffusion", run_diffusion, summarise_diffusion});
    if (arguments.wants("swap")) parts.push_back({"swap", "SWAP", run_swap, summarise_swap});
    if (arguments.wants("lm")) parts.push_back({"lm", "Language models", run_language_model, summarise_language_model});
    if (arguments.wants("tasks")) parts.push_back({"tasks", "Tasks", run_tasks, summarise_tasks});

    bool complete = true, agreement = true;
    for (std::size_t i = 0; i < parts.size() && complete; ++i) {
        {
            const std::string place =
                parts.size() > 1 ? " (" + std::to_string(i + 1) + "/" + std::to_string(parts.size()) + ")" : "";
            Progress progress(parts[i].title + place, 1);
            Experiment experiment = arguments.experiment;
            experiment.advance = [&](double done, const std::string& what) {
                progress.update(done, what);
                return !interrupted();
            };
            results[parts[i].name] = parts[i].run(experiment);
        }
        const Json& part = results[parts[i].name];
        complete = part["complete"].get<bool>();
        if (part["agreement"].is_boolean()) {
            agreement = agreement && part["agreement"].get<bool>();
            results["agreement"] = agreement;
        }
        results["complete"] = complete && i + 1 == parts.size();
        results["seconds"] = seconds_since(begin);
        write_report(arguments, results);
        output.line(parts[i].summarise(part));
    }
    if (!complete) output.line("Interrupted: the report is incomplete.");
    if (!agreement) output.line(disagreement);
    output.line("Report: " + (arguments.output / "report.html").string() + " and results.json, after " +
                clock_time(results["seconds"].get<double>()));
    output.result = std::move(results);
    return !complete ? Exit::interrupted : agreement ? Exit::done : Exit::failed;
}

}  // namespace

void add_reproduce(Program& program) {
    auto arguments = std::make_shared<ReproduceArguments>();
    CLI::App& command =
        program.add("reproduce", "Compare parallel with sequential evaluation on this machine and write a report",
                    "  deeppcr reproduce mlp --output report",
                    [arguments](Output& output) { return reproduce(*arguments, output); });
    command
        .add_option("part", arguments->part,
                    "mlp (about 1 minute), resnet (about 4), rnn (about 1.5), diffusion (about 5), swap (about 4), "
                    "lm (about 6), tasks (about 4), or all")
        ->check(CLI::IsMember({"mlp", "resnet", "rnn", "diffusion", "swap", "lm", "tasks", "all"}))
        ->capture_default_str();
    command.add_option("--output,-o", arguments->output, "Folder for report.html and results.json")
        ->capture_default_str();
    command.add_option("--seed", arguments->experiment.seed, "Seed of networks, inputs and training")
        ->check(without_sign())
        ->capture_default_str();
    command
        .add_option("--tolerance", arguments->experiment.tolerance,
                    "Largest relative difference of states and logits; of gradients ten times that")
        ->capture_default_str();
    command.add_option("--data", arguments->experiment.data, "Folder of Fashion-MNIST's four files");
    command.add_option("--text", arguments->experiment.text,
                       "Text for lm, in place of the King James Bible of Debian's package bible-kjv");
    command.add_option("--model", arguments->experiment.model,
                       "A model of `deeppcr train diffusion`, in place of a small one that is trained here");
    command.add_flag(
        "--full", arguments->experiment.full,
        "Of diffusion: Fréchet distances of 1,000 steps too, half an hour; of swap: 10,240 images and 5 seeds in place "
        "of 5,120 and 2, and more learning rates, 10 minutes; of lm: 4,000 steps and 3 seeds in place of 400 and 1, "
        "over an hour; of tasks: four times the steps and 3 seeds in place of 1, up to hours");
    command.add_flag("--quick", arguments->experiment.quick,
                     "Tiny sizes, seconds in all: shows only that everything works");
}

}  // namespace deeppcr::program
