// check_recurrence finds each mistake that a user can make, and nothing where there is none.

#include <gtest/gtest.h>
#include <deeppcr/deeppcr.hpp>

#include <cmath>
#include <sstream>

namespace deeppcr {
namespace {

enum class Mistake { none, entry, sign, after, diagonal, section, run, missing_block };

/// A rotation that a nonlinearity damps, with one mistake.
class Oscillator : public Recurrence<double> {
public:
    explicit Oscillator(Mistake mistake)
        : Recurrence({6, 2, 4}, mistake == Mistake::missing_block ? 2 : 4), mistake_(mistake) {}

    void step(const Section& section, View<const double> before, View<double> after) const override {
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j)
                for (index k = 0; k < 4; ++k) {
                    const double shift = mistake_ == Mistake::section ? 0.01 * double(i) : 0;
                    after(i, j, k) = std::sin(before(i, j, k) - 0.5 * before(i, j, (k + 1) % 4)) + shift;
                }
    }
    void linearise(const Section& section, View<const double> before, View<double> after,
                   Jacobian<double> jacobian) const override {
        step(section, before, after);
        for (index i = 0; i < section.steps(); ++i)
            for (index j = 0; j < section.batch(); ++j) {
                std::fill_n(jacobian.at(i, j), 4 * jacobian.block(), 0.0);
                for (index k = 0; k < 4; ++k) {
                    const index other = (k + 1) % 4;
                    const double slope = std::cos(before(i, j, k) - 0.5 * before(i, j, other));
                    jacobian(i, j, k, k) = slope;
                    if (k / jacobian.block() == other / jacobian.block()) jacobian(i, j, k, other) = -0.5 * slope;
                }
                if (mistake_ == Mistake::entry && section.first + i == 2 && j == 1) jacobian(i, j, 3, 1) = 0.05;
                if (mistake_ == Mistake::sign) jacobian(i, j, 0, 1) *= -1;
                if (mistake_ == Mistake::after) after(i, j, 2) += 1e-3;
            }
    }
    void linearise_diagonal(const Section& section, View<const double> before, View<double> after,
                            Jacobian<double> diagonal) const override {
        Recurrence::linearise_diagonal(section, before, after, diagonal);
        if (mistake_ == Mistake::diagonal) diagonal(0, 0, 1, 1) = 7;
    }
    void run(const Section& section, View<const double> state, View<double> trajectory) const override {
        Recurrence::run(section, state, trajectory);
        if (mistake_ == Mistake::run) trajectory(1, 0, 0) += 1e-3;
    }

private:
    Mistake mistake_;
};

std::string text_of(const CheckReport& report) {
    std::ostringstream text;
    text << report;
    return text.str();
}

TEST(CheckRecurrence, FindsNothingWhereNothingIsWrong) {
    const CheckReport report = check_recurrence(Oscillator(Mistake::none));
    EXPECT_TRUE(report.ok()) << text_of(report);
    EXPECT_EQ(report.entries_checked, 4 * 2 * 4 * 4);
    EXPECT_LT(report.largest_jacobian_error, 1e-8);
}

TEST(CheckRecurrence, SaysWhereAnEntryIsWrong) {
    const CheckReport report = check_recurrence(Oscillator(Mistake::entry));
    ASSERT_EQ(report.problems.size(), 1U);
    EXPECT_EQ(
        report.problems[0].rfind("Jacobian at step 3, sequence 1, row 3, column 1: 0.05, finite differences give", 0),
        0U)
        << report.problems[0];
}

TEST(CheckRecurrence, FindsEveryKindOfMistake) {
    const std::pair<Mistake, const char*> kinds[] = {{Mistake::sign, "row 0, column 1"},
                                                     {Mistake::after, "linearise's result"},
                                                     {Mistake::diagonal, "linearise_diagonal"},
                                                     {Mistake::section, "the same step alone"},
                                                     {Mistake::run, "against run"},
                                                     {Mistake::missing_block, "outside its blocks of 2"}};
    for (const auto& [mistake, words] : kinds) {
        const CheckReport report = check_recurrence(Oscillator(mistake));
        EXPECT_FALSE(report.ok()) << words;
        EXPECT_NE(text_of(report).find(words), std::string::npos) << text_of(report);
    }
}

TEST(CheckRecurrence, FloatHasItsOwnTolerance) {
    class Float : public Recurrence<float> {
    public:
        Float() : Recurrence({3, 1, 1}) {}
        void step(const Section& section, View<const float> before, View<float> after) const override {
            for (index i = 0; i < section.steps(); ++i) after(i, 0, 0) = std::tanh(before(i, 0, 0));
        }
        void linearise(const Section& section, View<const float> before, View<float> after,
                       Jacobian<float> jacobian) const override {
            step(section, before, after);
            for (index i = 0; i < section.steps(); ++i) jacobian(i, 0, 0, 0) = 1 - after(i, 0, 0) * after(i, 0, 0);
        }
    };
    const CheckReport report = check_recurrence(Float());
    EXPECT_TRUE(report.ok()) << text_of(report);
}

TEST(CheckBackends, AllAgree) {
    const CheckReport report = check_backends();
    EXPECT_TRUE(report.ok()) << text_of(report);
    EXPECT_GT(report.entries_checked, 10000);
}

}  // namespace
}  // namespace deeppcr
