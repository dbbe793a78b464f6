// The collectives of a Group, from messages between two ranks, so that what is sent and the order of all sums are
// known. Rounds double the distance between the ranks that talk to each other: ceil(log2(size)) of them.
#include <deeppcr/group.hpp>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "device/cuda.hpp"
#include "distribute/gpus.hpp"
#include "distribute/messages.hpp"

namespace deeppcr {

namespace distribute {
namespace {

/// Between threads of this process.
class Post {
public:
    explicit Post(int ranks) : ended_(std::size_t(ranks), false) {}
    int ranks() const { return int(ended_.size()); }

    void send(int from, int to, std::span<const std::byte> sent) {
        const std::lock_guard lock(mutex_);
        letters_[{from, to}].emplace_back(sent.begin(), sent.end());
        arrived_.notify_all();
    }
    void receive(int from, int to, std::span<std::byte> received) {
        std::unique_lock lock(mutex_);
        auto& letters = letters_[{from, to}];
        arrived_.wait(lock, [&] { return !letters.empty() || failed_ || ended_[std::size_t(from)]; });
        if (letters.empty())
            throw RankFailed("rank " + std::to_string(from) + " has ended, and this one waits for a message from it");
        if (letters.front().size() != received.size())
            throw Error("a message of " + std::to_string(letters.front().size()) + " bytes came from rank " +
                        std::to_string(from) + "; expected " + std::to_string(received.size()));
        std::copy(letters.front().begin(), letters.front().end(), received.begin());
        letters.pop_front();
    }
    /// Nobody waits for this rank any more; for no rank, where it failed.
    void end(int rank, bool failed) {
        const std::lock_guard lock(mutex_);
        ended_[std::size_t(rank)] = true;
        failed_ = failed_ || failed;
        arrived_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable arrived_;
    std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> letters_;
    std::vector<bool> ended_;
    bool failed_ = false;
};

class ThreadMessages final : public Messages {
public:
    ThreadMessages(Post& post, int rank) : post_(post), rank_(rank) {}
    int rank() const override { return rank_; }
    int size() const override { return post_.ranks(); }
    void exchange(int to, std::span<const std::byte> sent, int from, std::span<std::byte> received) override {
        if (to >= 0) post_.send(rank_, to, sent);
        if (from >= 0) post_.receive(from, rank_, received);
    }

private:
    Post& post_;
    int rank_;
};

}  // namespace

bool started_by_launcher() {
    return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMIX_RANK") != nullptr ||
           std::getenv("PMI_SIZE") != nullptr;
}

}  // namespace distribute

namespace {

constexpr index many_values = 1024;  // per rank: then sums are of slices

template <class T>
void add(std::span<const T> added, std::span<T> values) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = added[i] + values[i];
}

template <class T>
std::span<const T> values_in(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
}
template <class T>
std::span<T> values_in(std::span<std::byte> bytes) {
    return {reinterpret_cast<T*>(bytes.data()), bytes.size() / sizeof(T)};
}

}  // namespace

Group::Group() = default;
Group::~Group() = default;
Group::Group(Group&&) noexcept = default;
Group& Group::operator=(Group&&) noexcept = default;
Group::Group(std::unique_ptr<distribute::Messages> messages) : messages_(std::move(messages)) {}

Group& Group::world() {
    static Group group{distribute::connect_world()};
    return group;
}

void Group::simulate(int ranks, const std::function<void(Group& group)>& body) {
    if (ranks < 1) throw InvalidArgument("ranks", "1 or more", std::to_string(ranks));
    distribute::Post post(ranks);
    std::vector<std::exception_ptr> failures(static_cast<std::size_t>(ranks)), followers(failures);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank)
        threads.emplace_back([&, rank] {
            Group group(std::make_unique<distribute::ThreadMessages>(post, rank));
            try {
                body(group);
            } catch (const RankFailed&) {
                followers[std::size_t(rank)] = std::current_exception();
            } catch (...) {
                failures[std::size_t(rank)] = std::current_exception();
            }
            post.end(rank, failures[std::size_t(rank)] || followers[std::size_t(rank)]);
        });
    for (std::thread& thread : threads) thread.join();
    failures.insert(failures.end(), followers.begin(), followers.end());
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

int Group::rank() const { return messages_ ? messages_->rank() : 0; }
int Group::size() const { return messages_ ? messages_->size() : 1; }
std::string to_string(const Group& group) {
    return "rank " + std::to_string(group.rank()) + " of " + std::to_string(group.size());
}

std::pair<index, index> Group::part(index steps) const {
    const index each = steps / size(), longer = steps % size(), here = rank();
    const index first = here * each + std::min(here, longer);
    return {first, first + each + (here < longer ? 1 : 0)};
}

Group::Traffic Group::traffic() const {
    return std::accumulate(traffic_.begin(), traffic_.end(), Traffic{}, [](const Traffic& sum, const Traffic& one) {
        return Traffic{sum.messages + one.messages, sum.bytes + one.bytes};
    });
}

void Group::exchange(Purpose purpose, int to, std::span<const std::byte> sent, int from,
                     std::span<std::byte> received) {
    for (const int other : {to, from})
        if (other < -1 || other >= size() || other == rank())
            throw InvalidArgument("rank", "-1 or another rank of the group of " + std::to_string(size()),
                                  std::to_string(other));
    if (to < 0 && from < 0) return;
    messages_->exchange(to, sent, from, received);
    if (to < 0) return;
    Traffic& traffic = traffic_[std::size_t(purpose)];
    ++traffic.messages;
    traffic.bytes += index(sent.size());
}

void Group::barrier() {
    for (int distance = 1; distance < size(); distance *= 2)
        exchange(Purpose::barrier, (rank() + distance) % size(), {}, (rank() - distance + size()) % size(), {});
}

void Group::broadcast_bytes(std::span<std::byte> values, int root) {
    if (root < 0 || root >= size())
        throw InvalidArgument("root", "a rank of the group of " + std::to_string(size()), std::to_string(root));
    const int ranks = size(), place = (rank() - root + ranks) % ranks;
    const auto rank_at = [&](int other) { return (other + root) % ranks; };
    for (int distance = int(std::bit_ceil(unsigned(ranks)) / 2); distance > 0; distance /= 2) {
        if (place % (2 * distance) == distance)
            exchange(Purpose::broadcast, -1, {}, rank_at(place - distance), values);
        else if (place % (2 * distance) == 0 && place + distance < ranks)
            exchange(Purpose::broadcast, rank_at(place + distance), values, -1, {});
    }
}

// Where size is not a power of two, the first ranks meet in pairs before, and share the result afterwards:
//
//     0 1 2 3 4 5    0 > 1, 2 > 3;  then {01} {23} {4} {5} as four;  then 1 > 0, 3 > 2
void Group::reduce(std::span<std::byte> values, const Combine& combine) {
    const int ranks = size(), power = int(std::bit_floor(unsigned(ranks))), pairs = ranks - power;
    std::vector<std::byte> other(values.size());
    const bool paired = rank() < 2 * pairs;
    if (paired && rank() % 2 == 0) {
        exchange(Purpose::reduce, rank() + 1, values, -1, {});
        return exchange(Purpose::reduce, -1, {}, rank() + 1, values);
    }
    if (paired) {
        exchange(Purpose::reduce, -1, {}, rank() - 1, other);
        combine(other, values, false);
    }
    const int place = paired ? rank() / 2 : rank() - pairs;
    for (int distance = 1; distance < power; distance *= 2) {
        const int there = place ^ distance, partner = there < pairs ? 2 * there + 1 : there + pairs;
        exchange(Purpose::reduce, partner, values, partner, other);
        if (there < place) {
            combine(other, values, false);
        } else {
            combine(values, other, false);
            std::copy(other.begin(), other.end(), values.begin());
        }
    }
    if (paired) exchange(Purpose::reduce, rank() - 1, values, -1, {});
}

template <class T>
void Group::sum(std::span<T> values) {
    if (sums_slices(index(values.size())) && size() > 2) return sum_slices(values);
    reduce(std::as_writable_bytes(values), [](std::span<const std::byte> earlier, std::span<std::byte> later, bool) {
        add(values_in<T>(earlier), values_in<T>(later));
    });
}

// Every rank sums one slice of all ranks' values, and gives the sum to all: 2 (size - 1) / size times the values are
// sent, where whole ones would be sent log2(size) times.
template <class T>
void Group::sum_slices(std::span<T> values) {
    const std::size_t ranks = std::size_t(size()), here = std::size_t(rank());
    const auto slice = [&](std::size_t rank) {
        const auto [first, last] = distribute::slice(index(values.size()), int(rank), size());
        return values.subspan(std::size_t(first), std::size_t(last - first));
    };
    const std::span<T> mine = slice(here);
    std::vector<T> received(mine.size() * ranks);
    for (std::size_t distance = 1; distance < ranks; ++distance) {
        const std::size_t to = (here + distance) % ranks, from = (here + ranks - distance) % ranks;
        exchange(Purpose::reduce, int(to), std::as_bytes(slice(to)), int(from),
                 std::as_writable_bytes(std::span<T>(received).subspan(from * mine.size(), mine.size())));
    }
    std::copy(mine.begin(), mine.end(), received.begin() + std::ptrdiff_t(here * mine.size()));
    for (std::size_t i = 0; i < mine.size(); ++i) {
        mine[i] = received[i];
        for (std::size_t rank = 1; rank < ranks; ++rank) mine[i] += received[rank * mine.size() + i];
    }
    for (std::size_t distance = 1; distance < ranks; ++distance) {
        const std::size_t to = (here + distance) % ranks, from = (here + ranks - distance) % ranks;
        exchange(Purpose::reduce, int(to), std::as_bytes(mine), int(from), std::as_writable_bytes(slice(from)));
    }
}

bool Group::sums_slices(index count) const { return count / size() >= many_values && size() > 1; }

// Two ranks sum in the one order that there is: slices of them have the bits of the whole.
template <class T>
void Group::sum(std::span<T> values, const Execution& execution) {
    if (execution.backend != Backend::cuda) return sum(values);
    if (size() == 1 || values.empty()) return;
    const index count = index(values.size()), bytes = index(values.size_bytes());
    device::require_on_gpu("values", values.data());
    if (device::is_captured(execution.stream))
        throw InvalidArgument("execution.stream", "one that is not captured", "one that is captured into a graph");
    if (sums_slices(count) && gpus() != nullptr) {
        gpus()->sum(*this, values.data(), count, execution.stream);
        Traffic& traffic = traffic_[std::size_t(Purpose::reduce)];
        const index mine = distribute::slice(count, rank(), size()).count();
        traffic.messages += 2 * (size() - 1);
        traffic.bytes += index(sizeof(T)) * (count - mine + mine * (size() - 1));
        return;
    }
    std::vector<T> here(values.size());
    device::copy_from_gpu(here.data(), values.data(), bytes, execution.stream);
    device::synchronise(execution.stream);
    sum(std::span<T>(here));
    device::copy_to_gpu(values.data(), here.data(), bytes, execution.stream);
}

bool Group::sums_between_gpus() { return size() > 1 && gpus() != nullptr; }

distribute::Gpus* Group::gpus() {
    if (gpus_) return gpus_->get();
    const auto before = traffic_;
    gpus_ = distribute::connect_gpus(*this);
    traffic_ = before;  // without messages that are as many as time has it
    return gpus_->get();
}

int Group::rank_on_machine() {
    if (rank_on_machine_ >= 0) return rank_on_machine_;
    std::array<char, 256> name{};
    gethostname(name.data(), name.size() - 1);
    std::vector<char> names(name.size() * std::size_t(size()));
    gather(std::span<const char>(name), std::span<char>(names));
    rank_on_machine_ = 0;
    for (int other = 0; other < rank(); ++other)
        if (std::equal(name.begin(), name.end(), names.begin() + other * std::ptrdiff_t(name.size())))
            ++rank_on_machine_;
    return rank_on_machine_;
}

template <class T>
void Group::maximum(std::span<T> values) {
    reduce(std::as_writable_bytes(values), [](std::span<const std::byte> bytes, std::span<std::byte> target, bool) {
        const std::span<const T> earlier = values_in<T>(bytes);
        const std::span<T> later = values_in<T>(target);
        for (std::size_t i = 0; i < later.size(); ++i)
            if (!(earlier[i] <= later[i]) && !std::isnan(double(later[i]))) later[i] = earlier[i];
    });
}

// Blocks of the ranks from this one on, this one's first; after the round with distance d there are 2 d.
void Group::gather_bytes(std::span<const std::byte> values, std::span<std::byte> everything) {
    const std::size_t ranks = std::size_t(size()), here = std::size_t(rank()), bytes = values.size();
    if (everything.size() != ranks * bytes)
        throw InvalidArgument("everything", std::to_string(ranks * bytes) + " bytes, the values of all ranks",
                              std::to_string(everything.size()));
    std::vector<std::byte> blocks(everything.size());
    std::copy(values.begin(), values.end(), blocks.begin());
    for (std::size_t distance = 1; distance < ranks; distance *= 2) {
        const std::size_t count = std::min(distance, ranks - distance);
        exchange(Purpose::gather, int((here + ranks - distance) % ranks),
                 std::span<const std::byte>(blocks).first(count * bytes), int((here + distance) % ranks),
                 std::span<std::byte>(blocks).subspan(distance * bytes, count * bytes));
    }
    const auto wrapped = blocks.begin() + std::ptrdiff_t((ranks - here) * bytes);
    std::copy(blocks.begin(), wrapped, everything.begin() + std::ptrdiff_t(here * bytes));
    std::copy(wrapped, blocks.end(), everything.begin());
}

// Before the round with distance d, `sum` is of the d ranks up to this one (or all there are), and values of those
// without this one. Everything moves in one direction.
void Group::exclusive_scan(std::span<std::byte> values, const Combine& combine, Direction direction) {
    const bool forwards = direction == Direction::from_first_rank;
    const int ranks = size(), place = forwards ? rank() : ranks - 1 - rank();
    const auto rank_at = [&](int other) { return forwards ? other : ranks - 1 - other; };
    std::vector<std::byte> sum(values.begin(), values.end()), earlier(values.size());
    for (int distance = 1; distance < ranks; distance *= 2) {
        const bool sends = place + distance < ranks, receives = place >= distance;
        exchange(Purpose::scan, sends ? rank_at(place + distance) : -1, sum, receives ? rank_at(place - distance) : -1,
                 earlier);
        if (!receives) continue;
        const bool from_first = place - 2 * distance + 1 <= 0;
        if (distance == 1)
            std::copy(earlier.begin(), earlier.end(), values.begin());
        else
            combine(earlier, values, from_first);
        if (place + 2 * distance < ranks) combine(earlier, sum, from_first);
    }
}

void Group::agree(const std::exception_ptr& problem) {
    index first = problem ? size() - rank() : 0;
    maximum(std::span(&first, 1));
    if (first == 0) return;
    const int failed = size() - int(first);
    std::string text;
    try {
        if (problem) std::rethrow_exception(problem);
    } catch (const std::exception& exception) {
        text = exception.what();
    } catch (...) {
        text = "an exception without a text";
    }
    index length = index(text.size());
    broadcast(std::span(&length, 1), failed);
    text.resize(std::size_t(length));
    broadcast(std::span(text), failed);
    if (problem) std::rethrow_exception(problem);
    throw RankFailed("rank " + std::to_string(failed) + " of " + std::to_string(size()) + ": " + text);
}

#define DEEPPCR_INSTANTIATE(T)                 \
    template void Group::sum<T>(std::span<T>); \
    template void Group::maximum<T>(std::span<T>);
DEEPPCR_INSTANTIATE(float)
DEEPPCR_INSTANTIATE(double)
DEEPPCR_INSTANTIATE(index)
#undef DEEPPCR_INSTANTIATE
template void Group::sum<float>(std::span<float>, const Execution&);
template void Group::sum<double>(std::span<double>, const Execution&);

}  // namespace deeppcr
