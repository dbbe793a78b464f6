#include "rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include <deeppcr/error.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr::benchmark {

const std::vector<Target> targets{
    {"diagonal", "explicit diagonal, float, >= 4,096 rows, >= 256 MB", "copy of the same bytes", 0.93},
    {"one-row", "one row of 2^28, float", "copy of the same bytes", 0.85},
    {"one-row-scan", "one row of 2^28, float", "cub::DeviceScan of affine pairs", 2},
    {"blocks-2", "explicit 2x2", "copy of the same bytes", 0.90},
    {"blocks-4", "explicit 4x4", "copy of the same bytes", 0.85},
    {"gru-overlap", "ParaGRU forward by overlap, float", "copy of inputs + outputs", 0.90},
    {"gru-overlap-bf16", "ParaGRU forward by overlap, bf16", "copy of inputs + outputs", 0.80},
    {"gru-shooting", "ParaGRU forward by shooting, two sweeps, float", "copy of inputs + outputs", 0.85},
    {"gru-shooting-bf16", "ParaGRU forward by shooting, two sweeps, bf16", "copy of inputs + outputs", 0.60},
    {"gru-backward", "ParaGRU backward", "copy of its arrays", 0.85},
    {"gru-1024", "ParaGRU, T >= 16K, B*D <= 1,024", "own fused sequential kernel", 20},
    {"gru-256", "ParaGRU, T >= 16K, B*D <= 256", "own fused sequential kernel", 50},
    {"automatic", "automatic, the worst of the map T x B*D", "the fastest method", 0.98},
    {"pararnn", "ParaGRU forward", "Apple's fused kernel", 6},
    {"pararnn-1024", "ParaGRU forward, T <= 1,024", "Apple's fused kernel", 10},
    {"lstm", "ParaGRU forward, B = 16, hidden 768, T = 1,024, bf16", "torch's LSTM (cuDNN): a different cell", 40},
    {"mlp-32-graph", "MLP forward by Newton, D <= 32, L >= 2^14", "CUDA graph of cuBLAS calls", 100},
    {"mlp-32-persistent", "MLP forward by Newton, D <= 32, L >= 2^14", "persistent kernel", 20},
    {"mlp-64-graph", "MLP forward by Newton, D = 64", "CUDA graph of cuBLAS calls", 30},
    {"mlp-64-persistent", "MLP forward by Newton, D = 64", "persistent kernel", 6},
    {"mlp-128-graph", "MLP forward by Newton, D = 128", "CUDA graph of cuBLAS calls", 15},
    {"mlp-128-persistent", "MLP forward by Newton, D = 128", "persistent kernel", 4},
    {"mlp-overlap", "MLP forward by overlap, contractive, D <= 128, L >= 2^14", "persistent kernel", 50},
    {"mlp-backward", "MLP backward: its ratio", "the forward's ratio to the same baseline", 3},
    {"resnet", "training step of a residual network of 1,024 layers", "CUDA graph of cuBLAS calls", 7},
};

std::string text(index count) {
    std::string digits = std::to_string(count);
    for (std::size_t i = digits.size(); i > 3; i -= 3) digits.insert(i - 3, ",");
    return digits;
}
std::string text(const Shape& shape) {
    return "[" + text(shape.steps) + ", " + text(shape.batch) + ", " + text(shape.width) + "]";
}
std::string rounded(double value, int digits) {
    std::ostringstream text;
    text.precision(digits);
    text << value;
    return text.str();
}

Timing summarise(std::vector<double> seconds) {
    std::sort(seconds.begin(), seconds.end());
    const std::size_t count = seconds.size();
    return {seconds[count / 2], seconds[count / 4], seconds[count * 3 / 4], int(count)};
}

namespace {

Json to_json(const Timing& timing) {
    return {{"median", timing.median},
            {"lower_quartile", timing.lower_quartile},
            {"upper_quartile", timing.upper_quartile},
            {"runs", timing.runs}};
}

const Target* find_target(const std::string& name) {
    const auto found = std::find_if(targets.begin(), targets.end(), [&](const Target& t) { return t.name == name; });
    return found == targets.end() ? nullptr : &*found;
}

Json to_json(const Row& row, const Ceilings& ceilings) {
    Json result{{"what", row.what}, {"shape", row.shape}, {"type", row.type}};
    const Target* const target = find_target(row.target);
    if (target != nullptr) result["target"] = target->name;
    if (!row.not_run.empty()) result["not_run"] = row.not_run;
    if (!row.failed.empty()) result["failed"] = row.failed;
    if (row.not_run.empty() && row.failed.empty()) {
        if (row.ours) result["seconds"] = to_json(*row.ours);
        if (!row.baseline_name.empty()) result["baseline"] = row.baseline_name;
        if (row.baseline) result["baseline_seconds"] = to_json(*row.baseline);
        std::optional<double> ratio = row.ratio;
        if (!ratio && row.ours && row.baseline) ratio = row.baseline->median / row.ours->median;
        if (ratio) result["ratio"] = *ratio;
        if (target != nullptr) result["aimed_at"] = target->ratio;
        if (row.bytes > 0) result["bytes"] = row.bytes;
        if (row.flops > 0) result["flops"] = row.flops;
        const double floor = std::max(row.bytes / ceilings.bytes_per_second, row.flops / ceilings.flops_per_second);
        if (row.ours && floor > 0) result["share_of_roofline"] = floor / row.ours->median;
        if (!row.value.empty()) result["value"] = row.value;
    }
    if (!row.details.empty()) result["details"] = row.details;
    return result;
}

std::string duration(const Json& seconds) {
    const double median = seconds["median"].get<double>();
    const double spread =
        (seconds["upper_quartile"].get<double>() - seconds["lower_quartile"].get<double>()) / 2 / median;
    const std::string text = median >= 1      ? rounded(median) + " s"
                             : median >= 1e-3 ? rounded(median * 1e3) + " ms"
                                              : rounded(median * 1e6) + " µs";
    return text + " ± " + rounded(spread * 100, 2) + "%";
}

std::string text_of(const Json& row, const char* key) { return row.value(key, std::string()); }

std::string line(const Json& row, const Target& target, bool tiny) {
    const std::string begin =
        "| " + text_of(row, "what") + " | " + text_of(row, "shape") + " | " + text_of(row, "type") + " | ";
    const std::string aim = rounded(target.ratio) + "x | ";
    for (const char* missing : {"not_run", "failed"})
        if (row.contains(missing))
            return begin + "| " + target.baseline + " | | " + aim +
                   (row.contains("failed") ? "failed: " : "not run: ") + text_of(row, missing) + " | |\n";
    std::string result = begin + (row.contains("seconds") ? duration(row["seconds"]) : "") + " | " +
                         row.value("baseline", std::string(target.baseline));
    if (row.contains("baseline_seconds")) result += ", " + duration(row["baseline_seconds"]);
    const bool has_ratio = row.contains("ratio");
    result += " | " + (has_ratio ? rounded(row["ratio"].get<double>()) + "x" : "") + " | " + aim;
    result += !has_ratio ? "not run" : tiny ? "tiny sizes" : row["ratio"].get<double>() >= target.ratio ? "yes" : "no";
    return result + " | " +
           (row.contains("share_of_roofline") ? rounded(row["share_of_roofline"].get<double>(), 2) : "") + " |\n";
}

}  // namespace

Results::Results(std::string part, std::string file, bool tiny)
    : all_{{"part", std::move(part)}, {"rows", Json::array()}}, file_(std::move(file)), tiny_(tiny) {
    const std::vector<std::string> gpus = cuda_devices();
    all_["gpu"] = gpus.empty() ? "" : gpus.front();
    all_["version"] = version();
    if (tiny) all_["tiny"] = true;
}

void Results::add(Row row, const std::function<void(Row&)>& measure) {
    try {
        measure(row);
    } catch (const OutOfMemory& error) {
        row.not_run = error.what();
    } catch (const NotRun& reason) {
        row.not_run = reason.what();
    } catch (const std::exception& error) {
        row.failed = error.what();
        failed_ = true;
    }
    all_["rows"].push_back(to_json(row, ceilings));
    const Json& last = all_["rows"].back();
    std::cout << row.what << ", " << row.shape << ", " << row.type << ": ";
    if (!row.failed.empty()) std::cout << "FAILED: " << row.failed;
    if (!row.not_run.empty()) std::cout << "not run: " << row.not_run;
    if (last.contains("seconds")) std::cout << duration(last["seconds"]) << ' ';
    if (last.contains("ratio"))
        std::cout << rounded(last["ratio"].get<double>()) << "x of " << row.baseline_name << ' ';
    std::cout << row.value << std::endl;
    write();
}

void Results::note(const std::string& name, Json value) {
    all_[name] = std::move(value);
    write();
}

void Results::write() const {
    if (file_.empty()) return;
    const std::string unfinished = file_ + ".tmp";
    std::ofstream out(unfinished);
    out << all_.dump(1) << '\n';
    out.close();
    if (!out) throw Error(unfinished + " cannot be written");
    std::filesystem::rename(unfinished, file_);
}

std::string table(const std::vector<Json>& parts) {
    std::string result =
        "| what | shape | type | ours | baseline | ratio | target | reached | of the roofline |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    for (const Target& target : targets) {
        bool any = false;
        for (const Json& part : parts)
            for (const Json& row : part["rows"])
                if (text_of(row, "target") == target.name) {
                    result += line(row, target, part.value("tiny", false));
                    any = true;
                }
        if (!any)
            result += std::string("| ") + target.what + " | | | | " + target.baseline + " | | " +
                      rounded(target.ratio) + "x | not run | |\n";
    }
    result += "\n| measured beside | shape | type | seconds | result |\n| --- | --- | --- | --- | --- |\n";
    for (const Json& part : parts)
        for (const Json& row : part["rows"]) {
            if (row.contains("target")) continue;
            std::string value = text_of(row, "value");
            if (row.contains("ratio")) {
                if (!value.empty()) value += ", ";
                value += rounded(row["ratio"].get<double>()) + "x of " + text_of(row, "baseline");
            }
            if (row.contains("not_run")) value = "not run: " + text_of(row, "not_run");
            if (row.contains("failed")) value = "failed: " + text_of(row, "failed");
            result += "| " + text_of(row, "what") + " | " + text_of(row, "shape") + " | " + text_of(row, "type") +
                      " | " + (row.contains("seconds") ? duration(row["seconds"]) : "") + " | " + value + " |\n";
        }
    for (const Json& part : parts) {
        if (!part.contains("map")) continue;
        result +=
            "\n| ParaGRU, steps | B*D | sequential, ns per number | overlap against it | shooting | automatic | of the "
            "fastest | what automatic did |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n";
        for (const Json& point : part["map"]) {
            result += "| " + std::to_string(point["steps"].get<long long>()) + " | " +
                      std::to_string(point["channels"].get<long long>()) + " | " +
                      rounded(point["sequential_ns_per_number"].get<double>());
            for (const char* method : {"overlap", "shooting", "automatic"})
                result += " | " + rounded(point[method].get<double>()) + "x";
            result += " | " + rounded(point["of_the_fastest"].get<double>()) + " | " + text_of(point, "did") + " |\n";
        }
    }
    return result;
}

}  // namespace deeppcr::benchmark
