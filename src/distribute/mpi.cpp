// Messages between the processes that mpirun has started.
#define OMPI_SKIP_MPICXX
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include <deeppcr/array.hpp>
#include <deeppcr/error.hpp>
#include <deeppcr/group.hpp>

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

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds patience(1);  // a rank that waits longer asks whether the other one has ended
enum Tag { message, question, answer };

void send_empty(MPI_Comm ranks, int to, Tag tag) { check("MPI_Send", MPI_Send(nullptr, 0, MPI_BYTE, to, tag, ranks)); }

/// Whether an empty message is there, which is received.
bool receive_empty(MPI_Comm ranks, int from, Tag tag, int& sender) {
    MPI_Status status;
    int there = 0;
    check("MPI_Iprobe", MPI_Iprobe(from, tag, ranks, &there, &status));
    if (there == 0) return false;
    sender = status.MPI_SOURCE;
    check("MPI_Recv", MPI_Recv(nullptr, 0, MPI_BYTE, sender, tag, ranks, MPI_STATUS_IGNORE));
    return true;
}

/// What MPI_Finalize begins with, whoever calls it: until all ranks have come so far, those that ask hear that this one
/// sends and receives no more.
int answer_until_all_end(MPI_Comm /*self*/, int /*key*/, void* communicator, void* /*unused*/) try {
    const MPI_Comm ranks = *static_cast<const MPI_Comm*>(communicator);
    MPI_Request all = MPI_REQUEST_NULL;
    check("MPI_Ibarrier", MPI_Ibarrier(ranks, &all));
    for (int done = 0, asker = 0; done == 0;) {
        check("MPI_Test", MPI_Test(&all, &done, MPI_STATUS_IGNORE));
        if (receive_empty(ranks, MPI_ANY_SOURCE, question, asker))
            send_empty(ranks, asker, answer);
        else if (done == 0)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return MPI_SUCCESS;
} catch (const Error&) {
    return MPI_ERR_OTHER;
}

/// MPI_Finalize waits for all ranks, and they may wait for this one: a rank that ends in failure takes them along.
void leave(int status, void* /*unused*/) {
    int finalised = 0;
    MPI_Finalized(&finalised);
    if (finalised != 0) return;
    if (status != 0) MPI_Abort(MPI_COMM_WORLD, status);
    MPI_Finalize();
}

/// A message that has begun. One that is not done in the end is given up.
struct Begun {
    MPI_Request request = MPI_REQUEST_NULL;
    MPI_Status status{};
    bool receives;

    explicit Begun(bool is_received) : receives(is_received) {}
    Begun(const Begun&) = delete;
    Begun& operator=(const Begun&) = delete;
    ~Begun() {
        if (request == MPI_REQUEST_NULL) return;
        if (receives) MPI_Cancel(&request);
        MPI_Request_free(&request);
    }
    bool done() {
        int result = 1;
        if (request != MPI_REQUEST_NULL) check("MPI_Test", MPI_Test(&request, &result, &status));
        return result != 0;
    }
};

class WorldMessages final : public Messages {
public:
    WorldMessages() {
        static MPI_Comm communicator = MPI_COMM_NULL;  // there until MPI_Finalize
        check("MPI_Comm_dup", MPI_Comm_dup(MPI_COMM_WORLD, &communicator));
        check("MPI_Comm_set_errhandler", MPI_Comm_set_errhandler(communicator, MPI_ERRORS_RETURN));
        check("MPI_Comm_rank", MPI_Comm_rank(communicator, &rank_));
        check("MPI_Comm_size", MPI_Comm_size(communicator, &size_));
        int key = MPI_KEYVAL_INVALID;
        check("MPI_Comm_create_keyval",
              MPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, answer_until_all_end, &key, nullptr));
        check("MPI_Comm_set_attr", MPI_Comm_set_attr(MPI_COMM_SELF, key, &communicator));
        communicator_ = communicator;
        others_.resize(std::size_t(size_));
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
            Begun receiving(true), sending(false);
            if (i < to_receive)
                check("MPI_Irecv",
                      MPI_Irecv(in.data(), int(in.size()), MPI_BYTE, from, message, communicator_, &receiving.request));
            if (i < to_send)
                check("MPI_Isend",
                      MPI_Isend(out.data(), int(out.size()), MPI_BYTE, to, message, communicator_, &sending.request));
            wait(receiving, from, sending, to);
            if (i >= to_receive) continue;
            int count = 0;
            check("MPI_Get_count", MPI_Get_count(&receiving.status, MPI_BYTE, &count));
            if (count != int(in.size()))
                throw Error("a message of " + std::to_string(count) + " bytes came from rank " + std::to_string(from) +
                            "; expected " + std::to_string(in.size()));
        }
    }

private:
    /// Until both are done. Throws RankFailed where one never will be.
    void wait(Begun& receiving, int from, Begun& sending, int to) {
        const Clock::time_point begin = Clock::now();
        for (;;) {
            const bool received = receiving.done(), sent = sending.done();
            if (received && sent) return;
            if (Clock::now() - begin < patience) continue;
            if (!received && has_ended(from) && !receiving.done())
                throw RankFailed("rank " + std::to_string(from) +
                                 " has ended, and this one waits for a message from it");
            if (!sent && has_ended(to) && !sending.done())
                throw RankFailed("rank " + std::to_string(to) + " has ended, and this one has a message for it");
        }
    }
    /// Asks the first time. What the other one sent before it ended has arrived before its answer.
    bool has_ended(int rank) {
        Other& other = others_[std::size_t(rank)];
        if (!other.asked) send_empty(communicator_, rank, question);
        other.asked = true;
        other.ended = other.ended || receive_empty(communicator_, rank, answer, rank);
        return other.ended;
    }

    struct Other {
        bool asked = false, ended = false;
    };
    MPI_Comm communicator_ = MPI_COMM_NULL;
    int rank_ = 0, size_ = 1;
    std::vector<Other> others_;
};

}  // namespace

std::unique_ptr<Messages> connect_world() {
    static bool initialised_here = false;
    int initialised = 0, provided = MPI_THREAD_SERIALIZED;
    check("MPI_Initialized", MPI_Initialized(&initialised));
    if (initialised == 0) {
        if (!started_by_launcher()) return nullptr;
        check("MPI_Init_thread", MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided));
        initialised_here = true;
        // With the status that the program ends with, which atexit does not tell.
        if (on_exit(leave, nullptr) != 0) throw Error("Group::world: on_exit failed");
    }
    if (initialised_here) check("MPI_Query_thread", MPI_Query_thread(&provided));
    if (provided < MPI_THREAD_SERIALIZED)  // LibTorch calls from threads of its own
        throw Error("Group::world: this MPI allows calls from one thread alone (no MPI_THREAD_SERIALIZED)");
    return std::make_unique<WorldMessages>();
}

}  // namespace deeppcr::distribute
