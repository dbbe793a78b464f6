// A pool of threads, and the two ways in which everything else uses it.
#pragma once

#include <atomic>
#include <functional>

#include <deeppcr/execution.hpp>

namespace deeppcr::device {

/// The number of threads that a call with this execution uses, at least 1; 1 for the reference backend.
int thread_count(const Execution& execution);

/// Calls body(thread) for thread = 0 .. threads-1, all at the same time: they may wait for each other with a Barrier.
/// The first exception that a body throws is rethrown here. Nested or concurrent calls run one after the other, or
/// on fresh threads where they must.
void run_together(int threads, const std::function<void(int thread)>& body);

/// Splits [0, count) into one range per thread, each a multiple of `grain` but for the last, and calls
/// body(first, last) for those that are not empty. The split depends on count, grain and threads only.
void parallel_ranges(int threads, index count, index grain, const std::function<void(index first, index last)>& body);

/// A barrier for the threads of one run_together; spins a little before it yields the processor.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

private:
    int threads_;
    std::atomic<int> arrived_{0};
    std::atomic<unsigned> round_{0};
};

}  // namespace deeppcr::device
