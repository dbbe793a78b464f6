#include "newton/cost_model.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

#include <unistd.h>

#include <deeppcr/evaluate.hpp>

#include "device/threads.hpp"
#include "newton/stopwatch.hpp"
#include "recurrence/cell_rows.hpp"

namespace deeppcr::newton {
namespace {

/// The least of several runs: what disturbs a measurement only ever makes it longer.
double seconds_of(const std::function<void()>& work, int repetitions) {
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i < repetitions; ++i) {
        const Clock::time_point begin = Clock::now();
        work();
        least = std::min(least, seconds_since(begin));
    }
    return least;
}

template <class T>
struct Smallest : ChannelwiseRecurrence<T> {
    Smallest(const cell::Kernels<T>& kernels, View<const T> inputs, View<const T> parameters)
        : ChannelwiseRecurrence<T>(kernels, inputs, parameters, {}, {}) {}
};

/// A bundle of one thread: `blocks` blocks of 16 neighbouring channels, or of 16 rows of one channel.
template <class T>
class Bundle {
public:
    static constexpr index steps = 192;

    Bundle(const cell::Kernels<T>& kernels, index blocks, bool grouped)
        : kernels_(kernels),
          channels_(grouped ? 1 : blocks * cell::lanes),
          rows_(std::size_t(grouped ? blocks * cell::lanes : 1)),
          inputs_(Buffer<T>::random({index(rows_.size()), steps, channels_ * kernels.inputs}, 1)),
          parameters_(Buffer<T>::random({kernels.parameters, 1, channels_}, 2)),
          after_({index(rows_.size()), steps, channels_ * kernels.states}),
          start_({index(rows_.size()), 1, channels_ * kernels.states}),
          end_(start_.shape()),
          product_({index(rows_.size()), channels_, kernels.states * kernels.states}) {
        for (index r = 0; r < index(rows_.size()); ++r) {
            cell::Row<T>& row = rows_[std::size_t(r)];
            row.steps = steps;
            row.inputs = inputs_.view().at(r, 0);
            row.start = start_.view().at(r, 0);
            row.end = end_.view().at(r, 0);
            row.product = product_.view().at(r, 0);
        }
    }
    void advance() {
        for (index r = 0; r < index(rows_.size()); ++r) rows_[std::size_t(r)].after = after_.view().at(r, 0);
        run(cell::Work::advance);
    }
    void multiply() {
        for (cell::Row<T>& row : rows_) row.after = nullptr;
        run(cell::Work::multiply);
    }

private:
    void run(cell::Work work) {
        cell::run_rows<T>(kernels_, work, channels_, parameters_.data(), rows_,
                          {.inputs = channels_ * kernels_.inputs, .after = channels_ * kernels_.states}, 1);
    }

    const cell::Kernels<T>& kernels_;
    index channels_;
    std::vector<cell::Row<T>> rows_;
    Buffer<T> inputs_, parameters_, after_, start_, end_, product_;
};

template <class T>
StepCosts measure(const cell::Kernels<T>& kernels, int threads) {
    StepCosts costs;
    const index K = kernels.states, G = kernels.inputs;
    if (threads > 1) costs.synchronise = seconds_of([&] { device::run_together(threads, [](int) {}); }, 20);
    for (std::size_t i = 0; i < StepCosts::blocks.size(); ++i)
        for (const bool grouped : {false, true}) {
            std::vector<Bundle<T>> bundles;
            for (int t = 0; t < threads; ++t) bundles.emplace_back(kernels, StepCosts::blocks[i], grouped);
            const auto together = [&](void (Bundle<T>::*work)()) {
                const double seconds = seconds_of(
                    [&] {
                        if (threads == 1) return (bundles[0].*work)();
                        device::run_together(threads, [&](int t) { (bundles[std::size_t(t)].*work)(); });
                    },
                    8);
                return std::max(0.5 * seconds, seconds - costs.synchronise) / double(Bundle<T>::steps);
            };
            (grouped ? costs.grouped : costs.direct)[i] = together(&Bundle<T>::advance);
            if (grouped) costs.product[i] = together(&Bundle<T>::multiply);
            if (i == 0 && !grouped)
                costs.alone = seconds_of([&] { bundles[0].advance(); }, 8) / double(Bundle<T>::steps);
        }
    // What is done beside more blocks cannot take longer than without them: such a number was disturbed.
    for (auto* list : {&costs.direct, &costs.grouped, &costs.product})
        for (std::size_t i = list->size() - 1; i > 0; --i) (*list)[i - 1] = std::min((*list)[i - 1], (*list)[i]);
    costs.alone = std::min(costs.alone, costs.direct[0]);
    // A whole evaluation of little more than nothing.
    const Buffer<T> inputs = Buffer<T>::random({32, 1, G}, 1);
    const Buffer<T> parameters = Buffer<T>::random({kernels.parameters, 1, 1}, 2);
    const Buffer<T> trajectory({32, 1, K});
    const Smallest<T> smallest(kernels, inputs, parameters);
    costs.fixed = seconds_of(
        [&] {
            (void)evaluate(smallest, trajectory.view(),
                           {.method = Method::overlap, .chunk = 16, .execution = {.threads = threads}});
        },
        20);
    costs.fixed = std::max(0.0, costs.fixed - 48 * costs.grouped[0]);  // 16 steps, and 32 of repair
    return costs;
}

std::filesystem::path cache_file() {
    const auto folder = [](const char* variable, const char* below) -> std::filesystem::path {
        const char* value = std::getenv(variable);
        return value == nullptr || *value == '\0' ? std::filesystem::path() : std::filesystem::path(value) / below;
    };
    for (const auto& path :
         {folder("DEEPPCR_CACHE", ""), folder("XDG_CACHE_HOME", "deeppcr"), folder("HOME", ".cache/deeppcr")})
        if (!path.empty()) return path / "costs.txt";
    return {};
}

std::string processor() {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);)
        if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 1);
    return "unknown";
}

constexpr int enough_measurements = 8;

/// What the file knows of a key: one line per cell and machine, its key, a tab, the numbers of StepCosts, and how many
/// measurements they are the least of. A line that is not whole counts as none.
struct Known {
    StepCosts costs;
    int measurements = 0;
};

bool is_of(const std::string& line, const std::string& key) {
    return line.size() > key.size() && line.starts_with(key) && line[key.size()] == '\t';
}

Known read_line(const std::string& line, const std::string& key) {
    std::istringstream numbers(line.substr(key.size() + 1));
    Known read;
    for (auto* list : {&read.costs.direct, &read.costs.grouped, &read.costs.product})
        for (double& number : *list)
            if (!(numbers >> number) || !(number > 0 && number < 1)) return {};
    for (double* number : {&read.costs.alone, &read.costs.synchronise, &read.costs.fixed})
        if (!(numbers >> *number) || !(*number >= 0 && *number < 1)) return {};
    if (!(numbers >> read.measurements) || read.measurements < 1) return {};
    return read;
}

/// A machine that was busy while it measured would believe in wrong costs for ever: the least of several processes'
/// measurements counts.
StepCosts least_of(StepCosts a, const StepCosts& b) {
    const auto lower = [](double& number, double other) { number = std::min(number, other); };
    for (std::size_t i = 0; i < StepCosts::blocks.size(); ++i) {
        lower(a.direct[i], b.direct[i]);
        lower(a.grouped[i], b.grouped[i]);
        lower(a.product[i], b.product[i]);
    }
    lower(a.alone, b.alone);
    lower(a.synchronise, b.synchronise);
    lower(a.fixed, b.fixed);
    return a;
}

std::mutex measuring;  // of both types: one measurement, one writer of the file at a time

Known read_file(const std::string& key) {
    std::ifstream file(cache_file());
    for (std::string line; std::getline(file, line);)
        if (is_of(line, key)) return read_line(line, key);
    return {};
}

void write_file(const std::string& key, const Known& known) {
    const std::filesystem::path path = cache_file();
    if (path.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(path.parent_path(), error);
    // The whole file anew under another name, then renamed: no reader sees half of it.
    std::ostringstream text;
    std::ifstream old(path);
    for (std::string line; std::getline(old, line);)
        if (!is_of(line, key)) text << line << '\n';
    text << key << '\t';
    for (const auto* list : {&known.costs.direct, &known.costs.grouped, &known.costs.product})
        for (const double number : *list) text << number << ' ';
    text << known.costs.alone << ' ' << known.costs.synchronise << ' ' << known.costs.fixed << ' ' << known.measurements
         << '\n';
    const std::filesystem::path temporary = path.string() + "." + std::to_string(getpid());
    std::ofstream file(temporary);
    file << text.str();
    file.close();
    if (file)
        std::filesystem::rename(temporary, path, error);
    else
        std::filesystem::remove(temporary, error);
}

}  // namespace

double StepCosts::step(const std::array<double, 5>& costs, double count) const {
    if (count <= double(blocks[0])) return costs[0];
    for (std::size_t i = 1; i < blocks.size(); ++i)
        if (count <= double(blocks[i])) {
            const double part = (count - double(blocks[i - 1])) / double(blocks[i] - blocks[i - 1]);
            return costs[i - 1] + part * (costs[i] - costs[i - 1]);
        }
    return costs.back() * count / double(blocks.back());
}

template <class T>
const StepCosts& step_costs(const ChannelwiseRecurrence<T>& recurrence, int threads) {
    static std::map<std::pair<const void*, int>, StepCosts> known;
    const cell::Kernels<T>& kernels = recurrence.kernels();
    const std::lock_guard lock(measuring);
    if (const auto found = known.find({&kernels, threads}); found != known.end()) return found->second;
    const std::string key = version() + "|" + processor() + "|" + simd_target() + "|" + std::to_string(threads) + "|" +
                            std::to_string(sizeof(T)) + "|" + kernels.name;
    Known found = read_file(key);
    if (found.measurements < enough_measurements) {
        const StepCosts measured = measure(kernels, threads);
        found.costs = found.measurements > 0 ? least_of(measured, found.costs) : measured;
        ++found.measurements;
        write_file(key, found);
    }
    return known.emplace(std::pair<const void*, int>{&kernels, threads}, found.costs).first->second;
}
template const StepCosts& step_costs(const ChannelwiseRecurrence<float>&, int);
template const StepCosts& step_costs(const ChannelwiseRecurrence<double>&, int);

Plan plan_chunks(const StepCosts& costs, index steps, index rows, index channels, index repeated, double sweeps,
                 int threads) {
    const bool direct = channels >= cell::lanes;
    // Seconds per step of `count` rows side by side, and of the same with products.
    const auto step = [&](index count, bool with_product) {
        const index blocks = direct       ? count * ((channels + cell::lanes - 1) / cell::lanes)
                             : count == 1 ? 1
                                          : channels * ((count + cell::lanes - 1) / cell::lanes);
        const double share = std::ceil(double(blocks) / threads);
        const bool in_place = direct || count == 1;
        const double plain =
            in_place && blocks < threads ? costs.alone : costs.step(in_place ? costs.direct : costs.grouped, share);
        if (!with_product) return plain;
        return plain * costs.step(costs.product, share) / costs.step(costs.grouped, share);
    };
    const auto synchronise = [&](index count) {
        return direct || count * channels > cell::lanes ? costs.synchronise : 0.0;
    };
    Plan best;
    best.sequential_seconds = double(steps) * step(rows, false) + synchronise(rows);
    best.seconds = std::numeric_limits<double>::infinity();
    const index least = std::max<index>(16, repeated);
    // 16 chunks fill the lanes where there are fewer channels than that.
    const auto next = [](index chunks) {
        return chunks < 16 ? 2 * chunks : chunks < 64 ? chunks + 16 : chunks + chunks / 64 * 16;
    };
    for (index chunks = 2; chunks * rows <= (index(1) << 20); chunks = next(chunks)) {
        const index chunk = (steps + chunks - 1) / chunks;
        if (chunk < least) break;
        const index count = chunks * rows;
        // Beside the steps: the arrays of chunk states, and a few starts of the threads.
        const double overhead = costs.fixed + double(count) * double(channels) * 20e-9 + 4 * synchronise(count);
        const double seconds = double(chunk) * (step(count, false) + sweeps * step(count, true)) +
                               double(repeated) * step(count, false) + overhead;
        if (seconds < 0.9 * best.seconds) {
            best.seconds = seconds;
            best.chunk = chunk;
        }
    }
    return best;
}

}  // namespace deeppcr::newton
