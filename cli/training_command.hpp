// What the commands `deeppcr train ..` have in common: what a training goes on from, where it is saved and logged, its
// progress and its end.
#pragma once

#include <CLI/CLI.hpp>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>

#include "command.hpp"

namespace deeppcr::program {

/// The options --resume, --checkpoint, --overwrite and --log.
class TrainingFiles {
public:
    /// name: of the command, after "train"; its checkpoint is <name>.safetensors where none is named. logged: what an
    /// object of --log is of.
    void add_options(CLI::App& command, const std::string& name, const std::string& logged);

    /// The options of the checkpoint that is continued, which read(path) gives, or else the usual ones; with the paths
    /// of the checkpoints.
    template <class Options>
    Options options(Options (*read)(const std::filesystem::path& path)) const {
        Options result = resume_.empty() ? Options{} : read(resume_);
        result.resume = resume_;
        result.checkpoint = checkpoint();
        return result;
    }
    /// Throws FileError where the checkpoint exists, is not the one that is continued, and is not to be overwritten.
    void check() const;
    /// Prints the last line, begins the result with what those of all trainings begin with, and returns the exit code.
    /// next: a command for the checkpoint, or empty.
    template <class Result>
    Exit finish(const Result& result, Output& output, const std::string& next = {}) const {
        const std::string path = checkpoint().string();
        output.line(result.interrupted ? "interrupted; go on with: deeppcr train " + name_ + " --resume " + path
                                       : "checkpoint: " + path + (next.empty() ? "" : "; next: " + next + " " + path));
        output.result["checkpoint"] = path;
        output.result["interrupted"] = result.interrupted;
        output.result["parameters"] = result.parameters;
        return result.interrupted ? Exit::interrupted : Exit::done;
    }

    bool continues() const { return !resume_.empty(); }
    /// Empty: none.
    const std::string& log() const { return log_; }

private:
    std::filesystem::path checkpoint() const;

    std::string name_, checkpoint_, resume_, log_;
    bool overwrite_ = false;
};

/// What a training reports, one JSON object per line, at the end of the file of --log.
class Log {
public:
    /// Throws FileError. Of the processes that train together the first one writes.
    Log(const TrainingFiles& files, const Output& output);
    void write(const Json& object);

private:
    std::string path_;
    std::ofstream file_;
};

/// The progress bar of what is under way, which makes room for lines of text.
class TrainingProgress {
public:
    explicit TrainingProgress(Output& output) : output_(output) {}

    /// done: of `total`. Where no bar of this title is shown, one begins; `before` of the total had been done then.
    void show(const std::string& title, double done, double total, const std::string& note = {}, double before = 0);
    void line(const std::string& text);
    void warn(const std::string& text);
    void end() { bar_.reset(); }

private:
    Output& output_;
    std::optional<Progress> bar_;
    std::string title_;
    double before_ = 0;
};

/// A mean that follows the last values, about so many; what is not finite does not count.
class RecentMean {
public:
    explicit RecentMean(double values) : values_(values) {}
    void add(double value) {
        if (!std::isfinite(value)) return;
        mean_ += begun_ ? (value - mean_) / values_ : value;
        begun_ = true;
    }
    double mean() const { return mean_; }

private:
    double values_, mean_ = 0;
    bool begun_ = false;
};

}  // namespace deeppcr::program
