// What is aimed at on a GPU, what was measured of it, and how both are written: JSON while measuring goes on, and at
// its end one table in Markdown. No CUDA here.
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <deeppcr/array.hpp>

namespace deeppcr::benchmark {

using Json = nlohmann::ordered_json;

/// "16,384"
std::string text(index count);
/// "[16,384, 1, 256]"
std::string text(const Shape& shape);
/// Three digits of it, or as many as asked for.
std::string rounded(double value, int digits = 3);

/// A ratio that is aimed at: seconds of the baseline over ours, where nothing else is said.
struct Target {
    const char* name;
    const char* what;
    const char* baseline;
    double ratio;
};
/// In the order of the table.
extern const std::vector<Target> targets;

/// Seconds of a body, of several runs.
struct Timing {
    double median = 0, lower_quartile = 0, upper_quartile = 0;
    int runs = 0;
};
Timing summarise(std::vector<double> seconds);

/// A line of the table. What was not measured stays empty.
struct Row {
    std::string target = {};  ///< the name of one of `targets`, or empty: measured for its own sake
    std::string what = {}, shape = {}, type = {};
    std::string baseline_name = {};
    std::optional<Timing> ours = {}, baseline = {};
    std::optional<double> ratio = {};  ///< where it is not baseline over ours
    double bytes = 0, flops = 0;       ///< that must be moved and done; 0: not counted
    std::string value = {};            ///< of a line without a target: the result in words
    Json details = Json::object();
    std::string not_run = {}, failed = {};  ///< why
};

/// Thrown by a row's body: there is nothing to measure it with or against here.
struct NotRun : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// What the machine can do at most, measured in the same run.
struct Ceilings {
    double bytes_per_second = 0, flops_per_second = 0;
};

/// Collects rows; after each one all are written, so that what is stopped leaves what it has.
class Results {
public:
    Results(std::string part, std::string file, bool tiny);

    /// Fills `row` by `measure`. Out of memory and NotRun make it a row that was not run, other exceptions one that
    /// failed.
    void add(Row row, const std::function<void(Row&)>& measure);
    /// What is neither a row nor a ratio.
    void note(const std::string& name, Json value);

    /// Sizes that show that all works, and nothing else: no target counts as reached or missed.
    bool tiny() const { return tiny_; }
    bool failed() const { return failed_; }

    Ceilings ceilings;

private:
    void write() const;

    Json all_;
    std::string file_;
    bool tiny_, failed_ = false;
};

/// The files of several parts as one table.
std::string table(const std::vector<Json>& parts);

}  // namespace deeppcr::benchmark
