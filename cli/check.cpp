// deeppcr check: do the backends and methods agree on this machine?
#include <memory>
#include <sstream>

#include <deeppcr/check.hpp>

#include "command.hpp"

namespace deeppcr::program {

void add_check(Program& program) {
    auto seed = std::make_shared<std::uint64_t>(1);
    CLI::App& command = program.add(
        "check", "Solve random systems with every backend and method, on a GPU too where there is one, and compare",
        "  deeppcr check", [seed](Output& output) {
            const CheckReport report = check_backends(*seed);
            std::ostringstream text;
            text << report;
            output.line(text.str());
            output.result.update(Json{{"ok", report.ok()},
                                      {"seed", *seed},
                                      {"entries_checked", report.entries_checked},
                                      {"problems", report.problems}});
            return report.ok() ? Exit::done : Exit::failed;
        });
    command.add_option("--seed", *seed, "Seed of the random systems")->check(without_sign())->capture_default_str();
}

}  // namespace deeppcr::program
