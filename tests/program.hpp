// Runs the program deeppcr as a user does, in a folder of its own.
#pragma once

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace deeppcr {

inline std::string contents(const std::filesystem::path& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
}

/// Changes a bit in the middle of a file.
inline void damage(const std::filesystem::path& path) {
    std::string bytes = contents(path);
    bytes[bytes.size() / 2] = char(bytes[bytes.size() / 2] ^ 4);
    std::ofstream(path, std::ios::binary) << bytes;
}

/// Waits until the process has installed its handler of SIGINT, as Linux tells in /proc.
inline bool catches_interrupts(pid_t process) {
    for (int milliseconds = 0; milliseconds < 60'000; ++milliseconds) {
        std::ifstream status("/proc/" + std::to_string(process) + "/status");
        for (std::string word; status >> word;)
            if (unsigned long long caught = 0; word == "SigCgt:" && status >> std::hex >> caught)
                if ((caught >> (SIGINT - 1) & 1) != 0) return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
}

class ProgramTest : public testing::Test {
protected:
    struct Outcome {
        int exit_code = -1;  ///< negative: the signal that ended the program
        std::string output, errors;
        nlohmann::json json() const { return nlohmann::json::parse(output, nullptr, false); }
    };

    ProgramTest() {
        std::string name = testing::TempDir() + "deeppcr-program-XXXXXX";
        folder = mkdtemp(name.data());
    }
    ~ProgramTest() override { std::filesystem::remove_all(folder); }

    /// Starts `deeppcr arguments...` in `folder`; `prepare` runs in the child process, before the program.
    pid_t start(
        const std::vector<std::string>& arguments, const std::function<void()>& prepare = [] {},
        const char* program = DEEPPCR_PROGRAM) const {
        std::vector<char*> words = {const_cast<char*>(program)};
        for (const std::string& argument : arguments) words.push_back(const_cast<char*>(argument.c_str()));
        words.push_back(nullptr);
        const pid_t child = fork();
        if (child == 0) {
            const std::string output = outside("output"), errors = outside("errors");
            const int output_file = open(output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
            const int error_file = open(errors.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
            if (chdir(folder.c_str()) != 0 || dup2(output_file, 1) < 0 || dup2(error_file, 2) < 0) _exit(126);
            prepare();
            execv(program, words.data());
            _exit(127);
        }
        return child;
    }
    Outcome wait_for(pid_t child) const {
        int status = 0;
        waitpid(child, &status, 0);
        const Outcome outcome{WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), contents(outside("output")),
                              contents(outside("errors"))};
        std::filesystem::remove(outside("output"));
        std::filesystem::remove(outside("errors"));
        return outcome;
    }
    Outcome run(
        const std::vector<std::string>& arguments, const std::function<void()>& prepare = [] {}) const {
        return wait_for(start(arguments, prepare));
    }

    /// An error of the program: exit code 1 and the message on standard error.
    void expect_error(const std::vector<std::string>& arguments, const testing::Matcher<std::string>& message) const {
        const Outcome outcome = run(arguments);
        EXPECT_EQ(outcome.exit_code, 1) << testing::PrintToString(arguments);
        EXPECT_THAT(outcome.errors, testing::AllOf(testing::StartsWith("deeppcr: error: "), message));
    }

    /// What a training has written to --log so far; a line that is not whole yet does not count.
    std::vector<nlohmann::json> log(const std::string& name = "log") const {
        std::vector<nlohmann::json> lines;
        std::ifstream file(folder / name);
        for (std::string line; std::getline(file, line);)
            if (auto object = nlohmann::json::parse(line, nullptr, false); object.is_object()) lines.push_back(object);
        return lines;
    }

    /// A .npy file of float32 whose data, all zeros, take no room on the disk; false where the file system cannot.
    bool write_sparse(const std::string& name, const std::string& shape, std::uintmax_t bytes) const {
        const std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + ", }\n";
        std::ofstream(folder / name, std::ios::binary)
            << std::string("\x93NUMPY\x01\0", 8) << char(header.size()) << '\0' << header;
        std::error_code error;
        std::filesystem::resize_file(folder / name, std::filesystem::file_size(folder / name) + bytes, error);
        return !error;
    }

    /// Files for captured output lie beside the folder, so that the folder shows what the program itself left.
    std::string outside(const std::string& name) const { return folder.string() + "." + name; }

    std::filesystem::path folder;
};

}  // namespace deeppcr
