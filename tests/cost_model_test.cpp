// What the cache of measured costs survives. Each case is a process of its own: within one, costs are read only once.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include <deeppcr/cells.hpp>

#include "newton/cost_model.hpp"

namespace deeppcr {
namespace {

namespace fs = std::filesystem;

class Costs : public testing::Test {
protected:
    Costs() {
        std::string name = testing::TempDir() + "deeppcr-costs-XXXXXX";
        folder = mkdtemp(name.data());
        setenv("DEEPPCR_CACHE", folder.c_str(), 1);
    }
    ~Costs() override {
        unsetenv("DEEPPCR_CACHE");
        fs::remove_all(folder);
    }

    /// Whether what another process is told of the costs is what `right` wants.
    static bool in_another_process(const std::function<bool(const newton::StepCosts&)>& right) {
        const pid_t child = fork();
        if (child == 0) {
            const Buffer<float> inputs({8, 1, 3}), parameters({3, 1, 1});
            _exit(right(newton::step_costs(CellRecurrence<ParaGRU>(inputs, parameters), 1)) ? 0 : 1);
        }
        int status = 0;
        waitpid(child, &status, 0);
        return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }

    fs::path file() const { return folder / "costs.txt"; }
    std::vector<std::string> lines() const {
        std::vector<std::string> found;
        std::ifstream stream(file());
        for (std::string line; std::getline(stream, line);) found.push_back(line);
        return found;
    }
    void write(const std::vector<std::string>& text) const {
        std::ofstream stream(file());
        for (const std::string& line : text) stream << line << '\n';
    }
    /// A line of the file with the same key: 18 times `number`, then `measurements`.
    static std::string with(const std::string& line, const std::string& number, int measurements) {
        std::string changed = line.substr(0, line.find('\t') + 1);
        for (int i = 0; i < 18; ++i) changed += number + ' ';
        return changed + std::to_string(measurements);
    }

    fs::path folder;
};

bool plausible(const newton::StepCosts& costs) {
    bool right = costs.fixed < 0.1;
    for (const auto* list : {&costs.direct, &costs.grouped, &costs.product})
        for (const double seconds : *list) right = right && seconds > 1e-10 && seconds < 1e-3;
    return right;
}

TEST_F(Costs, AreMeasuredByEightProcessesAndThenOnlyRead) {
    for (int process = 1; process <= 10; ++process) {
        EXPECT_TRUE(in_another_process(plausible));
        ASSERT_EQ(lines().size(), 1U);
        EXPECT_TRUE(lines()[0].ends_with(" " + std::to_string(std::min(process, 8)))) << lines()[0];
    }
    write({with(lines()[0], "0.25", 8)});
    EXPECT_TRUE(in_another_process([](const auto& costs) { return costs.direct[0] == 0.25 && costs.fixed == 0.25; }));
}

TEST_F(Costs, OfABusyMachineAreForgotten) {
    EXPECT_TRUE(in_another_process(plausible));
    write({with(lines()[0], "0.5", 1)});
    EXPECT_TRUE(in_another_process(plausible));
    EXPECT_TRUE(lines()[0].ends_with(" 2"));
}

TEST_F(Costs, SurviveAFileOfNonsense) {
    EXPECT_TRUE(in_another_process(plausible));
    const std::string good = lines()[0], key = good.substr(0, good.find('\t'));
    for (const std::string& bad : {key + "\t", key + "\tnan 1", with(good, "-1", 3), with(good, "1e300", 3),
                                   with(good, "0.1", -4), good.substr(0, good.size() - 12), key}) {
        write({"", "another cell\t1 2 3", bad, std::string(100, '\t')});
        EXPECT_TRUE(in_another_process(plausible)) << bad;
        // Lines of others stay; a damaged one of one's own is replaced.
        EXPECT_EQ(lines().size(), bad == key ? 5U : 4U) << bad;
        EXPECT_EQ(lines()[1], "another cell\t1 2 3");
        EXPECT_TRUE(lines().back().starts_with(key + "\t"));
    }
}

TEST_F(Costs, NeedNoFolder) {
    setenv("DEEPPCR_CACHE", "/proc/no/such/folder", 1);
    EXPECT_TRUE(in_another_process(plausible));
    write({});
    setenv("DEEPPCR_CACHE", file().c_str(), 1);  // a file where the folder should be
    EXPECT_TRUE(in_another_process(plausible));
}

}  // namespace
}  // namespace deeppcr
