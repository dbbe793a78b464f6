#include "trainings.hpp"

#include <algorithm>
#include <cmath>
#include <exception>
#include <numeric>
#include <thread>

#include <deeppcr/execution.hpp>

namespace deeppcr::program {

bool SideBySide::run(std::size_t count, const std::function<void(std::size_t)>& job) {
    std::size_t next = 0;
    std::exception_ptr error;
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < std::min(count, std::size_t(std::max(1, default_threads()))); ++i)
        threads.emplace_back([&] {
            for (;;) {
                std::size_t mine = 0;
                {
                    const std::lock_guard lock(mutex_);
                    if (next == count || error || !going_on_) return;
                    mine = next++;
                }
                try {
                    job(mine);
                } catch (...) {
                    const std::lock_guard lock(mutex_);
                    error = std::current_exception();
                }
            }
        });
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
    return going_on_;
}

void SideBySide::advance(double work, const std::string& what) {
    const std::lock_guard lock(mutex_);
    work_ += work;
    going_on_ = going_on_ && experiment_.advance(work_ / all_work_, what);
}

bool SideBySide::stopped() {
    const std::lock_guard lock(mutex_);
    return !going_on_;
}

double Sample::mean() const {
    return values.empty() ? std::nan("") : std::accumulate(values.begin(), values.end(), 0.0) / double(values.size());
}

double Sample::deviation() const {
    if (values.size() < 2) return std::nan("");
    double sum = 0;
    for (const double value : values) sum += (value - mean()) * (value - mean());
    return std::sqrt(sum / double(values.size() - 1));
}

Series curve(const std::string& name, const Json& steps, const Json& values, OfWindow kind) {
    std::vector<double> x, y;
    for (std::size_t i = 0; i < values.size(); ++i)
        if (const double value = number(values[i]); std::isfinite(value)) {
            x.push_back(number(steps[i]));
            y.push_back(value);
        }
    constexpr std::size_t most = 150;
    const std::size_t window = (x.size() + most - 1) / most;
    Series series{.name = name, .x = {}, .y = {}};
    for (std::size_t first = 0; first < x.size(); first += window) {
        const auto begin = y.begin() + index(first), end = y.begin() + index(std::min(first + window, y.size()));
        series.x.push_back(x[std::size_t(end - y.begin()) - 1]);
        series.y.push_back(kind == OfWindow::largest ? *std::max_element(begin, end)
                                                     : std::accumulate(begin, end, 0.0) / double(end - begin));
    }
    return series;
}

void add_figures(Json& curve, const nn::NewtonFigures& step) {
    curve["mean_iterations"].push_back(step.mean_iterations);
    curve["residual"].push_back(step.residual);
    curve["lyapunov"].push_back(finite(step.lyapunov));
}

std::vector<Plot> newton_plots(const Json& trainings) {
    Plot iterations{.title = "Newton iterations over the training",
                    .caption = "Of a step's evaluations of cells, the mean.",
                    .x = {.label = "optimiser step"},
                    .y = {.label = "iterations"},
                    .series = {}},
        residual{.title = "Residual over the training",
                 .caption =
                     "The largest of a step's evaluations: by how much a state differs from what the cell makes "
                     "of the one before it.",
                 .x = {.label = "optimiser step"},
                 .y = {.label = "residual"},
                 .series = {}},
        lyapunov{.title = "Lyapunov exponent over the training",
                 .caption =
                     "The largest of a step's evaluations, where it was estimated. Below 0 disturbances die "
                     "out, and an evaluation in parallel converges in few iterations.",
                 .x = {.label = "optimiser step"},
                 .y = {.label = "per step of the sequence"},
                 .series = {},
                 .reference = 0.0};
    for (const Json& training : trainings) {
        const auto title = training["title"].get<std::string>();
        const Json& measured = training["curve"];
        iterations.series.push_back(curve(title, measured["step"], measured["mean_iterations"]));
        residual.series.push_back(curve(title, measured["step"], measured["residual"], OfWindow::largest));
        lyapunov.series.push_back(curve(title, measured["step"], measured["lyapunov"]));
    }
    return {iterations, residual, lyapunov};
}

}  // namespace deeppcr::program
