// Options of the command line that change a structure of options only where they are given: so that a resumed training
// keeps the options of its checkpoint, but for those that the user names.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include <deeppcr/nn/names.hpp>

#include "command.hpp"

namespace deeppcr::program {

template <class Target>
class GivenOptions {
public:
    explicit GivenOptions(CLI::App& command) : command_(command) {}

    /// access: the field, as std::invoke(access, Target&) gives it; a pointer to a member does. Its default is shown by
    /// --help.
    template <class Access>
    void value(const std::string& flag, Access access, const std::string& help) {
        using Value = std::remove_reference_t<std::invoke_result_t<Access, Target&>>;
        std::ostringstream text;
        text << std::invoke(access, defaults_);
        CLI::Option* option = command_.add_option_function<Value>(
            flag,
            [this, access](const Value& value) {
                changes_.push_back([access, value](Target& target) { std::invoke(access, target) = value; });
            },
            help);
        option->default_str(text.str());
        if constexpr (std::is_unsigned_v<Value>) option->check(without_sign());
    }

    /// A field that is one of `names`. consequence: of giving it.
    template <class Access, class Choice, std::size_t count>
    void choice(const std::string& flag, Access access, const nn::Names<Choice, count>& names, const std::string& help,
                const std::function<void(Target&)>& consequence = {}) {
        std::vector<std::string> known;
        for (const auto& name : names) known.emplace_back(name.first);
        command_
            .add_option_function<std::string>(
                flag,
                [this, access, &names, flag, consequence](const std::string& name) {
                    const Choice chosen = nn::choice_of(names, flag, name);
                    changes_.push_back([access, chosen](Target& target) { std::invoke(access, target) = chosen; });
                    if (consequence) changes_.push_back(consequence);
                },
                help)
            ->check(CLI::IsMember(known))
            ->default_str(nn::name_of(names, std::invoke(access, defaults_)));
    }

    /// The options of evaluate that both training and validation offer; access: the deeppcr::Options.
    template <class Access>
    void evaluation(Access access) {
        const auto field = [access](auto member) {
            return [=](Target & target) -> auto& { return std::invoke(access, target).*member; };
        };
        choice(
            "--method", field(&Options::method), nn::open_method_names,
            "How the layers are evaluated: all at once, or one after the other; automatic: by what takes less, which "
            "may give other bits in every run, or all at once where options below ask for it",
            // As the usual guess would; where --guess names it, that is applied later.
            [access](Target& target) {
                Options& options = std::invoke(access, target);
                if (options.method == Method::automatic) options.guess = Guess::initial_state;
            });
        choice("--surrogate", field(&Options::surrogate), nn::surrogate_names, "What stands for the Jacobian");
        choice("--reduction", field(&Options::reduction), nn::reduction_names, "How the bidiagonal systems are solved");
        value("--chunk", field(&Options::chunk), "Layers per chunk of the scan; 0: chosen");
        choice("--guess", field(&Options::guess), nn::guess_names,
               "Where Newton's method starts; predicted: from a linear fit to the last step's trajectories");
        value("--tolerance", field(&Options::tolerance), "Of the residual of each layer; 0: 64 machine epsilons");
        value("--window", field(&Options::window), "Layers evaluated at once; 0: as many as fit the memory");
        choice("--on-failure", field(&Options::on_failure), nn::on_failure_names,
               "What to do where Newton's method does not converge");
        threads(access);
    }

    /// The options of evaluate for cells; access: the deeppcr::Options.
    template <class Access>
    void cells(Access access) {
        const auto field = [access](auto member) {
            return [=](Target & target) -> auto& { return std::invoke(access, target).*member; };
        };
        choice("--method", field(&Options::method), nn::cell_method_names,
               "How the cells' steps are evaluated; automatic may give other bits in every run");
        value("--chunk", field(&Options::chunk), "Steps per chunk of shooting or overlap; 0: chosen, by measuring");
        value("--tolerance", field(&Options::tolerance), "Of the residual of each step; 0: 64 machine epsilons");
        choice("--on-failure", field(&Options::on_failure), nn::on_failure_names,
               "What to do where a parallel evaluation does not converge");
        threads(access);
    }

    /// How a training updates its parameters. rate: of what --learning-rate is; decayed: what decays.
    void updates(const std::string& rate = "At its highest", const std::string& decayed = "matrices") {
        value("--learning-rate", &Target::learning_rate, rate);
        value("--warm-up", &Target::warm_up, "Steps until the learning rate is at its highest");
        if constexpr (requires(Target & target) { target.weight_decay; })
            value("--weight-decay", &Target::weight_decay, "Decay of the " + decayed);
        value("--gradient-clip", &Target::gradient_clip, "Largest norm of the gradient; 0: any");
    }
    void device() { value("--device", &Target::device, "Where to train: cpu, cuda or cuda:<number>"); }

    void apply(Target& target) const {
        for (const auto& change : changes_) change(target);
    }

private:
    template <class Access>
    void threads(Access access) {
        value(
            "--threads", [access](Target& target) -> int& { return std::invoke(access, target).execution.threads; },
            "Threads; 0: as many as there are processors");
    }

    CLI::App& command_;
    Target defaults_ = {};
    std::vector<std::function<void(Target&)>> changes_;
};

}  // namespace deeppcr::program
