#include "device/threads.hpp"

#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace deeppcr {

int default_threads() {
    static const int threads = [] {
        if (const char* text = std::getenv("DEEPPCR_THREADS")) {
            char* end = nullptr;
            const long value = std::strtol(text, &end, 10);
            if (end == text || *end != '\0' || value < 1 || value > 4096)
                throw InvalidArgument("DEEPPCR_THREADS", "a number of threads from 1 to 4096", text);
            return int(value);
        }
        cpu_set_t processors;
        if (sched_getaffinity(0, sizeof processors, &processors) == 0) return std::max(1, CPU_COUNT(&processors));
        return std::max(1, int(std::thread::hardware_concurrency()));
    }();
    return threads;
}

namespace device {
namespace {

constexpr int spins_before_sleep = 4000;
/// A few microseconds: the thread that a barrier waits for may want this very processor.
constexpr int spins_before_yield = 200;

/// The workers wait for a job, run their part of it, and report back. The caller is thread 0.
class Pool {
public:
    static Pool& instance() {
        static Pool pool;
        return pool;
    }

    ~Pool() {
        {
            const std::lock_guard lock(mutex_);
            stopping_ = true;
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    /// False where the pool is busy with another call (a nested one, or one from another thread).
    bool try_run(int threads, const std::function<void(int)>& body) {
        const std::unique_lock busy(busy_, std::try_to_lock);
        if (!busy) return false;
        while (int(workers_.size()) < threads - 1) {
            const int thread = int(workers_.size()) + 1;
            workers_.emplace_back([this, thread, seen = round_.load()] { work(thread, seen); });
        }
        body_ = &body;
        threads_ = threads;
        failure_ = nullptr;
        remaining_.store(int(workers_.size()), std::memory_order_relaxed);
        {
            const std::lock_guard lock(mutex_);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        call(0);
        while (remaining_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
        if (failure_) std::rethrow_exception(failure_);
        return true;
    }

private:
    void call(int thread) {
        try {
            (*body_)(thread);
        } catch (...) {
            const std::lock_guard lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
    }

    void work(int thread, unsigned seen) {
        while (true) {
            for (int i = 0; i < spins_before_sleep && round_.load(std::memory_order_acquire) == seen; ++i)
                __builtin_ia32_pause();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
            }
            if (stopping_) return;
            seen = round_.load(std::memory_order_acquire);
            if (thread < threads_) call(thread);
            remaining_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    const std::function<void(int)>* body_ = nullptr;
    int threads_ = 0;
    std::atomic<unsigned> round_{0};
    std::atomic<int> remaining_{0};
    std::atomic<bool> stopping_{false};
    std::exception_ptr failure_;
};

}  // namespace

int thread_count(const Execution& execution) {
    if (execution.threads < 0)
        throw InvalidArgument("execution.threads", "0 or more", std::to_string(execution.threads));
    if (execution.backend == Backend::reference) return 1;
    return execution.threads > 0 ? execution.threads : default_threads();
}

void run_together(int threads, const std::function<void(int)>& body) {
    if (threads <= 1) return body(0);
    if (Pool::instance().try_run(threads, body)) return;
    std::exception_ptr failure;
    std::mutex mutex;
    std::vector<std::thread> team;
    for (int thread = 0; thread < threads; ++thread)
        team.emplace_back([&, thread] {
            try {
                body(thread);
            } catch (...) {
                const std::lock_guard lock(mutex);
                if (!failure) failure = std::current_exception();
            }
        });
    for (std::thread& member : team) member.join();
    if (failure) std::rethrow_exception(failure);
}

void parallel_ranges(int threads, index count, index grain, const std::function<void(index, index)>& body) {
    if (count <= 0) return;
    grain = std::max<index>(grain, 1);
    const index grains = (count + grain - 1) / grain;
    const int used = int(std::min<index>(threads, grains));
    const auto bound = [&](int thread) { return std::min(count, grains * thread / used * grain); };
    run_together(used, [&](int thread) {
        const index first = bound(thread), last = thread + 1 == used ? count : bound(thread + 1);
        if (first < last) body(first, last);
    });
}

void Barrier::wait() {
    const unsigned round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_acq_rel);
        return;
    }
    for (int i = 0; round_.load(std::memory_order_acquire) == round; ++i)
        if (i < spins_before_yield)
            __builtin_ia32_pause();
        else
            std::this_thread::yield();
}

}  // namespace device
}  // namespace deeppcr
