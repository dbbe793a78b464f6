// The frame that every subcommand of the program fits into: how it registers itself, how it prints, how it fails.
//
// A command is one file, cli/<name>.cpp, that defines add_<name>(Program&); it is listed in three places: below, in
// main.cpp and in cli/CMakeLists.txt.
#pragma once

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <deeppcr/error.hpp>
#include <deeppcr/group.hpp>

namespace deeppcr::program {

using Json = nlohmann::ordered_json;

/// Null where the number is not finite.
inline Json finite(double number) { return std::isfinite(number) ? Json(number) : Json(); }

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// Exit codes, as `deeppcr --help` documents them.
enum class Exit {
    done = 0,
    error = 1,          ///< in the input, a file or the arguments
    failed = 2,         ///< the computation did not converge, or a check failed
    interrupted = 130,  ///< by Ctrl-C or SIGTERM
};

/// Where a command prints to. Human text and the machine-readable result are both always given; --json decides which
/// of them is seen.
class Output {
public:
    explicit Output(bool json) : json_(json) {}

    /// A line of human text on standard output; silent under --json.
    void line(const std::string& text) const;
    /// "deeppcr: warning: ..." on standard error; under --json also in result["warnings"].
    void warn(const std::string& text);
    bool json() const { return json_; }

    /// The processes that mpirun has started, for a command that they compute together: from this call on only the
    /// first one prints, and the others say what is wrong with them alone.
    Group& group();
    /// Whether this process is not the first one of those.
    bool follows() const { return group_ != nullptr && group_->rank() > 0; }
    /// "", or the name of one of several processes, as the beginning of a message.
    std::string speaker() const;

    Json result = Json::object();  ///< what --json prints, as one object, when the command returns

private:
    bool json_;
    Group* group_ = nullptr;
};

/// A progress bar on standard error, with the time that remains:
///     epoch 1/3  ███████░░░░░░░  52 %  loss 0.61  accuracy 78.9 %  0:41 left
/// Redrawn in place on a terminal, up to ten times a second; elsewhere a plain line every ten seconds. The bar is
/// erased at the end of its life, so that a line of text can take its place: end it before printing.
class Progress {
public:
    Progress(std::string title, double total);
    ~Progress();
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;

    /// done: of `total`. note: what stands between the bar and the remaining time.
    void update(double done, const std::string& note = {});

private:
    std::string title_;
    double total_;
    bool terminal_;
    bool drawn_ = false;
    Clock::time_point begin_ = Clock::now(), last_ = begin_;
};

/// "0:41", "12:05", "1:02:03"
std::string clock_time(double seconds);

/// Before a long computation: throws FileError where its output exists and --overwrite is not given, or where it cannot
/// be written.
void check_output(const std::filesystem::path& output, bool overwrite);

/// For options whose type has no sign: CLI11 alone reads "-1" as 2^64 - 1.
CLI::Validator without_sign();

/// Whether Ctrl-C (SIGINT) or SIGTERM came: a command stops at its next safe point and returns Exit::interrupted. A
/// second Ctrl-C ends the program at once.
bool interrupted();

/// What a command may throw at a safe point instead of returning Exit::interrupted.
struct Interrupted : Error {
    Interrupted() : Error("interrupted") {}
};

/// The program: its commands, and what is common to them.
class Program {
public:
    Program();

    /// Adds the command `deeppcr <name>`; a name of two words is a command of a group (see below). example: one or more
    /// complete command lines for --help. `run` is called once the arguments are parsed; exceptions that it throws
    /// become error messages and exit codes: NotConverged 2, Interrupted 130, every other one 1. Returns the parser,
    /// for the command's own options.
    CLI::App& add(const std::string& name, const std::string& description, const std::string& example,
                  std::function<Exit(Output&)> run);

    /// Adds `deeppcr <name>`, whose commands, `deeppcr <name> <what>`, are added next.
    void add_group(const std::string& name, const std::string& description);

    /// Parses the command line and runs the command that it names; returns the exit code.
    int run(int argc, char** argv);

private:
    struct Command {
        CLI::App* parser;
        std::string example;
        std::function<Exit(Output&)> run;
    };
    CLI::App parser_;
    bool json_ = false;
    std::vector<Command> commands_;
};

/// Warns where LibTorch is loaded but would compute on the slow reference BLAS.
void warn_about_slow_blas(Output& output);

// The commands, in the order of --help.
void add_reproduce(Program& program);
void add_train(Program& program);
void add_train_diffusion(Program& program);
void add_train_language_model(Program& program);
void add_train_swap(Program& program);
void add_train_task(Program& program);
void add_prepare(Program& program);
void add_plan(Program& program);
void add_validate(Program& program);
void add_generate(Program& program);
void add_sample(Program& program);
void add_evaluate(Program& program);
void add_analyse(Program& program);
void add_solve(Program& program);
void add_check(Program& program);
void add_info(Program& program);

}  // namespace deeppcr::program
