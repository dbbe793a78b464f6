// What a Group is made of: messages between two ranks.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

namespace deeppcr::distribute {

class Messages {
public:
    Messages() = default;
    virtual ~Messages() = default;
    Messages(const Messages&) = delete;
    Messages& operator=(const Messages&) = delete;

    virtual int rank() const = 0;
    virtual int size() const = 0;
    /// Sends `sent` to rank `to`, while `received` comes from rank `from`; -1: nobody. Messages from one rank to
    /// another arrive in the order in which they were sent; one of another size than expected is an Error.
    virtual void exchange(int to, std::span<const std::byte> sent, int from, std::span<std::byte> received) = 0;
};

/// Between the processes that mpirun has started; null where this one was not started by it.
std::unique_ptr<Messages> connect_world();

/// Whether the environment is that of a process started by mpirun, or another launcher of MPI programs.
bool started_by_launcher();

}  // namespace deeppcr::distribute
