// Messages between the processes that mpirun has started.
#define OMPI_SKIP_MPICXX
#include <mpi.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include <deeppcr/array.hpp>
#include <deeppcr/error.hpp>

#include "distribute/messages.hpp"

namespace deeppcr::distribute {
namespace {

constexpr std::size_t piece_bytes = std::size_t(1) << 30;  // MPI counts in int

void check(const char* call, int code) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw Error(std::string(call) + ": " + text);
}

/// MPI_Finalize waits for all ranks, and they may wait for this one: a rank that ends in failure takes them along.
void leave(int status, void* /*unused*/) {
    int finalised = 0;
    MPI_Finalized(&finalised);
    if (finalised != 0) return;
    if (status != 0) MPI_Abort(MPI_COMM_WORLD, status);
    MPI_Finalize();
}

class WorldMessages final : public Messages {
public:
    WorldMessages() {
        check("MPI_Comm_dup", MPI_Comm_dup(MPI_COMM_WORLD, &communicator_));
        check("MPI_Comm_set_errhandler", MPI_Comm_set_errhandler(communicator_, MPI_ERRORS_RETURN));
        check("MPI_Comm_rank", MPI_Comm_rank(communicator_, &rank_));
        check("MPI_Comm_size", MPI_Comm_size(communicator_, &size_));
    }
    int rank() const override { return rank_; }
    int size() const override { return size_; }

    void exchange(int to, std::span<const std::byte> sent, int from, std::span<std::byte> received) override {
        const auto pieces = [](int other, std::size_t bytes) {
            return other < 0 ? 0 : std::max<std::size_t>(1, (bytes + piece_bytes - 1) / piece_bytes);
        };
        const std::size_t to_send = pieces(to, sent.size()), to_receive = pieces(from, received.size());
        for (std::size_t i = 0; i < std::max(to_send, to_receive); ++i) {
            const auto piece = [&](auto bytes) {
                const std::size_t first = std::min(i * piece_bytes, bytes.size());
                return bytes.subspan(first, std::min(piece_bytes, bytes.size() - first));
            };
            const auto out = piece(sent);
            const auto in = piece(received);
            MPI_Status status;
            check("MPI_Sendrecv", MPI_Sendrecv(out.data(), int(out.size()), MPI_BYTE, i < to_send ? to : MPI_PROC_NULL,
                                               0, in.data(), int(in.size()), MPI_BYTE,
                                               i < to_receive ? from : MPI_PROC_NULL, 0, communicator_, &status));
            int count = 0;
            check("MPI_Get_count", MPI_Get_count(&status, MPI_BYTE, &count));
            if (i < to_receive && count != int(in.size()))
                throw Error("a message of " + std::to_string(count) + " bytes came from rank " + std::to_string(from) +
                            "; expected " + std::to_string(in.size()));
        }
    }

private:
    MPI_Comm communicator_ = MPI_COMM_NULL;
    int rank_ = 0, size_ = 1;
};

}  // namespace

std::unique_ptr<Messages> connect_world() {
    int initialised = 0;
    check("MPI_Initialized", MPI_Initialized(&initialised));
    if (initialised == 0) {
        if (!started_by_launcher()) return nullptr;
        int provided = MPI_THREAD_SINGLE;
        check("MPI_Init_thread", MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided));
        // With the status that the program ends with, which atexit does not tell.
        if (on_exit(leave, nullptr) != 0) throw Error("Group::world: on_exit failed");
    }
    return std::make_unique<WorldMessages>();
}

}  // namespace deeppcr::distribute
