#include "command.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <new>
#include <thread>

#include <deeppcr/execution.hpp>
#include <files/write.hpp>

namespace deeppcr::program {
namespace {

volatile std::sig_atomic_t signal_came = 0;

void handle_signals() {
    struct sigaction action = {};
    action.sa_handler = [](int) { signal_came = 1; };
    action.sa_flags = SA_RESTART | SA_RESETHAND;  // the second signal finds the default action
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
    std::signal(SIGXFSZ, SIG_IGN);  // a file beyond the size limit is an error of write(), with a message
}

int terminal_columns() {
    winsize size = {};
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/// The first `columns` characters of UTF-8 text.
std::string shortened(const std::string& text, int columns) {
    std::size_t bytes = 0;
    for (int characters = 0; bytes < text.size(); ++bytes) {
        const bool begins_character = (static_cast<unsigned char>(text[bytes]) & 0xC0) != 0x80;
        if (begins_character && ++characters > columns) break;
    }
    return text.substr(0, bytes);
}

/// One JSON object on a line of its own; bytes that are no UTF-8 (from file names) are replaced.
void print(const Json& object) { std::cout << object.dump(-1, ' ', false, Json::error_handler_t::replace) << '\n'; }

/// "train lm"
std::string name_of(const CLI::App& command) {
    const CLI::App* const group = command.get_parent();
    return (group != nullptr && group->get_parent() != nullptr ? group->get_name() + " " : "") + command.get_name();
}

/// Whether processes that mpirun starts share the command's work, by Output::group.
bool can_be_shared(const std::string& command) { return command.starts_with("train "); }

int fail(const std::string& message, Exit code, bool json) {
    std::cout.flush();
    std::cerr << "deeppcr: error: " << message << std::endl;
    if (json) print({{"error", message}, {"exit_code", int(code)}});
    std::cout.flush();
    return int(code);
}

}  // namespace

void Output::line(const std::string& text) const {
    if (!json_ && !follows()) std::cout << text << std::endl;
}

Group& Output::group() {
    group_ = &Group::world();
    return *group_;
}

std::string Output::speaker() const { return follows() ? to_string(*group_) + ": " : std::string(); }

void Output::warn(const std::string& text) {
    if (follows()) return;
    std::cerr << "deeppcr: warning: " << text << std::endl;
    result["warnings"].push_back(text);
}

std::string clock_time(double seconds) {
    const auto whole = static_cast<long long>(std::llround(std::clamp(seconds, 0.0, 1e9)));
    char text[48];
    if (whole >= 3600)
        std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", whole / 3600, whole / 60 % 60, whole % 60);
    else
        std::snprintf(text, sizeof text, "%lld:%02lld", whole / 60, whole % 60);
    return text;
}

Progress::Progress(std::string title, double total)
    : title_(std::move(title)), total_(total), terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() {
    if (terminal_ && drawn_) std::cerr << "\r\x1b[K" << std::flush;
}

void Progress::update(double done, const std::string& note) {
    constexpr int cells = 14;
    const auto now = Clock::now();
    const std::chrono::duration<double> between = terminal_ ? std::chrono::milliseconds(100) : std::chrono::seconds(10);
    if (now - last_ < between && (drawn_ || !terminal_)) return;
    last_ = now;
    drawn_ = true;

    const double fraction = total_ > 0 ? std::clamp(done / total_, 0.0, 1.0) : 1.0;
    const double elapsed = seconds_since(begin_);
    std::string line = title_ + "  ";
    for (int cell = 0; cell < cells; ++cell) line += cell < int(std::lround(fraction * cells)) ? "█" : "░";
    line += "  " + std::to_string(int(std::floor(fraction * 100))) + " %";
    if (!note.empty()) line += "  " + note;
    if (fraction > 0) line += "  " + clock_time(elapsed * (1 - fraction) / fraction) + " left";
    if (terminal_)
        std::cerr << '\r' << shortened(line, terminal_columns() - 1) << "\x1b[K" << std::flush;
    else
        std::cerr << line << std::endl;
}

void check_output(const std::filesystem::path& output, bool overwrite) {
    std::error_code error;
    if (std::filesystem::exists(output, error) && !overwrite)
        throw FileError(output, "exists: name another with --output, or give --overwrite");
    files::check_writable(output);
}

CLI::Validator without_sign() {
    return {[](const std::string& text) {
                return text.starts_with('-') ? "expected a number of 0 or more, got " + text : std::string();
            },
            ""};
}

bool interrupted() { return signal_came != 0; }

Program::Program() : parser_("Sequential computations evaluated in parallel.", "deeppcr") {
    parser_.set_version_flag("--version", "deeppcr " + version());
    parser_.add_flag("--json", json_, "Print the result as one JSON object on standard output");
    parser_.fallthrough();
    parser_.require_subcommand(0, 1);
}

CLI::App& Program::add(const std::string& name, const std::string& description, const std::string& example,
                       std::function<Exit(Output&)> run) {
    const std::size_t space = name.find(' ');
    CLI::App* const group = space == std::string::npos ? &parser_ : parser_.get_subcommand(name.substr(0, space));
    CLI::App* const parser = group->add_subcommand(name.substr(space + 1), description);
    parser->footer("Example:\n" + example);
    commands_.push_back({parser, example, std::move(run)});
    return *parser;
}

void Program::add_group(const std::string& name, const std::string& description) {
    parser_.add_subcommand(name, description)->require_subcommand(0, 1);
}

int Program::run(int argc, char** argv) {
    handle_signals();
    std::string footer =
        "Exit codes:\n  0 done   1 error in the input, a file or the arguments\n"
        "  2 not converged, or a check failed   130 interrupted\n\nExamples:";
    for (const Command& command : commands_) footer += "\n" + command.example;
    parser_.footer(footer);

    // Known before parsing, so that errors of the parser come as JSON too.
    const bool json =
        std::any_of(argv, argv + argc, [](const char* argument) { return std::string(argument) == "--json"; });
    try {
        parser_.parse(argc, argv);
    } catch (const CLI::Success& help_or_version) {
        return parser_.exit(help_or_version);
    } catch (const CLI::ParseError& error) {
        const bool known = !parser_.get_subcommands().empty();
        return fail(std::string(error.what()) + (known ? "" : "; `deeppcr --help` lists the commands"), Exit::error,
                    json);
    }
    const auto chosen = std::find_if(commands_.begin(), commands_.end(),
                                     [](const Command& command) { return command.parser->parsed(); });
    if (chosen == commands_.end()) {
        const auto groups = parser_.get_subcommands();
        const std::string group = groups.empty() ? "" : groups.front()->get_name() + " ";
        return fail("no command is given; `deeppcr " + group + "--help` lists the commands", Exit::error, json_);
    }

    Output output(json_);
    const auto end = [&](const std::string& message, Exit code) {
        // What is wrong on all processes alike the first one says, and ends all; what is wrong here alone is said here.
        if (output.follows()) std::this_thread::sleep_for(std::chrono::seconds(1));
        return fail(output.speaker() + message, code, json_ && !output.follows());
    };
    Exit code = Exit::done;
    try {
        if (const std::string name = name_of(*chosen->parser); !can_be_shared(name) && output.group().size() > 1)
            throw InvalidArgument("mpirun -n", "1, as no processes share the work of `deeppcr " + name + "`",
                                  std::to_string(output.group().size()));
        code = chosen->run(output);
    } catch (const Interrupted& error) {
        return end(error.what(), Exit::interrupted);
    } catch (const NotConverged& error) {
        return end(error.what(), Exit::failed);
    } catch (const std::bad_alloc&) {
        return end("out of memory", Exit::error);
    } catch (const std::exception& error) {
        return end(error.what(), Exit::error);
    }
    if (output.follows()) return int(Exit::done);  // the first process tells how all have ended, and ends last
    if (json_) print(output.result);
    std::cout.flush();
    if (!std::cout) return fail("standard output cannot be written", Exit::error, false);
    return int(code);
}

}  // namespace deeppcr::program
