// Options of the command line that change a structure of options only where they are given: so that a resumed training
// keeps the options of its checkpoint, but for those that the user names. And what else trainings share.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <deeppcr/nn/names.hpp>
#include <files/error.hpp>

#include "command.hpp"

namespace deeppcr::program {

/// Throws FileError where `checkpoint` exists and is not the one that is continued.
inline void refuse_to_overwrite(const std::filesystem::path& checkpoint, const std::filesystem::path& resume,
                                bool overwrite) {
    std::error_code error;
    if (std::filesystem::exists(checkpoint, error) && !overwrite &&
        !(std::filesystem::equivalent(checkpoint, resume, error) && !error))
        throw FileError(checkpoint,
                        "exists: continue it with --resume, name another with --checkpoint, or give --overwrite");
}

/// What a training reports, one JSON object per line, at the end of a file; nowhere where `path` is empty. Throws
/// FileError.
class Log {
public:
    explicit Log(const std::string& path) : path_(path) {
        if (path.empty()) return;
        file_.open(path, std::ios::app);
        if (!file_) throw FileError(path, "cannot be opened for writing");
    }
    void write(const Json& object) {
        if (path_.empty()) return;
        file_ << object.dump() << std::endl;
        if (!file_) throw FileError(path_, "cannot be written to");
    }

private:
    std::string path_;
    std::ofstream file_;
};

template <class Target>
class GivenOptions {
public:
    explicit GivenOptions(CLI::App& command) : command_(command) {}

    /// access(Target&): the field. Its default is shown by --help.
    template <class Access>
    void value(const std::string& flag, Access access, const std::string& help) {
        using Value = std::remove_reference_t<std::invoke_result_t<Access, Target&>>;
        Target defaults{};
        std::ostringstream text;
        text << access(defaults);
        CLI::Option* option = command_.add_option_function<Value>(
            flag,
            [this, access](const Value& value) {
                changes_.push_back([access, value](Target& target) { access(target) = value; });
            },
            help);
        option->default_str(text.str());
        if constexpr (std::is_unsigned_v<Value>) option->check(without_sign());
    }

    /// A field that is one of `names`.
    template <class Access, class Choice, std::size_t count>
    void choice(const std::string& flag, Access access, const nn::Names<Choice, count>& names,
                const std::string& help) {
        Target defaults{};
        std::vector<std::string> known;
        for (const auto& name : names) known.emplace_back(name.first);
        command_
            .add_option_function<std::string>(
                flag,
                [this, access, &names, flag](const std::string& name) {
                    const Choice chosen = nn::choice_of(names, flag, name);
                    changes_.push_back([access, chosen](Target& target) { access(target) = chosen; });
                },
                help)
            ->check(CLI::IsMember(known))
            ->default_str(nn::name_of(names, access(defaults)));
    }

    /// The options of evaluate that both training and validation offer; access(Target&): the deeppcr::Options.
    template <class Access>
    void evaluation(Access access) {
        const auto field = [access](auto member) {
            return [=](Target & target) -> auto& { return access(target).*member; };
        };
        choice("--method", field(&Options::method), nn::method_names,
               "How the layers are evaluated: all at once, or one after the other");
        choice("--surrogate", field(&Options::surrogate), nn::surrogate_names, "What stands for the Jacobian");
        choice("--reduction", field(&Options::reduction), nn::reduction_names, "How the bidiagonal systems are solved");
        value("--chunk", field(&Options::chunk), "Layers per chunk of the scan; 0: chosen");
        choice("--guess", field(&Options::guess), nn::guess_names,
               "Where Newton's method starts; predicted: from a linear fit to the last step's trajectories");
        value("--tolerance", field(&Options::tolerance), "Of the residual of each layer; 0: 64 machine epsilons");
        value("--window", field(&Options::window), "Layers evaluated at once; 0: as many as fit the memory");
        choice("--on-failure", field(&Options::on_failure), nn::on_failure_names,
               "What to do where Newton's method does not converge");
        value(
            "--threads", [access](Target& target) -> int& { return access(target).execution.threads; },
            "Threads; 0: as many as there are processors");
    }

    /// The options of evaluate for cells; access(Target&): the deeppcr::Options.
    template <class Access>
    void cells(Access access) {
        const auto field = [access](auto member) {
            return [=](Target & target) -> auto& { return access(target).*member; };
        };
        choice("--method", field(&Options::method), nn::cell_method_names,
               "How the cells' steps are evaluated; automatic may give other bits in every run");
        value("--chunk", field(&Options::chunk), "Steps per chunk of shooting or overlap; 0: chosen, by measuring");
        value("--tolerance", field(&Options::tolerance), "Of the residual of each step; 0: 64 machine epsilons");
        choice("--on-failure", field(&Options::on_failure), nn::on_failure_names,
               "What to do where a parallel evaluation does not converge");
        value(
            "--threads", [access](Target& target) -> int& { return access(target).execution.threads; },
            "Threads; 0: as many as there are processors");
    }

    void apply(Target& target) const {
        for (const auto& change : changes_) change(target);
    }

private:
    CLI::App& command_;
    std::vector<std::function<void(Target&)>> changes_;
};

}  // namespace deeppcr::program
