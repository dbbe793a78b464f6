#include "nccl.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

struct Meeting;
struct Call {
    ncclComm_t communicator;
    bool sends;
    void* memory;
    std::size_t bytes;
    int other;
    cudaStream_t stream;
};
struct ncclComm {
    int rank, ranks;
    Meeting& meeting;
    std::vector<Call> awaited = {};  // receives
    ncclResult_t state = ncclInProgress;
    bool met = false;
};
struct Meeting {
    std::mutex mutex;
    std::map<int, int> gpus;  // of the ranks that have come
    std::vector<std::unique_ptr<ncclComm>> communicators;
    std::map<std::pair<int, int>, std::deque<std::vector<std::byte>>> letters;  // from, to
};

namespace {

Meeting& meeting_of(int number) {
    static std::mutex mutex;
    static std::map<int, Meeting> all;
    const std::lock_guard lock(mutex);
    return all[number];
}

thread_local bool in_group = false;
thread_local std::vector<Call> calls;

ncclResult_t add(const Call& call) {
    if (!in_group || call.communicator == nullptr || call.communicator->state != ncclSuccess) return ncclInvalidUsage;
    cudaPointerAttributes attributes{};
    if (call.bytes > 0 && cudaPointerGetAttributes(&attributes, call.memory) != cudaSuccess) return ncclInvalidArgument;
    calls.push_back(call);
    return ncclSuccess;
}

bool fails(emulation::NcclFailure where, int rank) {
    return emulation::failing_nccl().failure == where && emulation::failing_nccl().rank == rank;
}

/// The meeting's mutex is held.
ncclResult_t look(ncclComm& here) {
    if (fails(here.met ? emulation::NcclFailure::exchange : emulation::NcclFailure::meeting, here.rank))
        return ncclSystemError;
    if (!here.met) {
        if (int(here.meeting.gpus.size()) < here.ranks) return ncclInProgress;
        const int gpu = here.meeting.gpus.at(here.rank);
        here.met = std::count_if(here.meeting.gpus.begin(), here.meeting.gpus.end(),
                                 [&](const auto& other) { return other.second == gpu; }) == 1;
        if (!here.met) return ncclInvalidUsage;
    }
    while (!here.awaited.empty()) {
        const Call& call = here.awaited.back();
        auto& letters = here.meeting.letters[{call.other, here.rank}];
        if (letters.empty()) return ncclInProgress;
        if (letters.front().size() != call.bytes) return ncclInvalidArgument;
        std::copy(letters.front().begin(), letters.front().end(), static_cast<std::byte*>(call.memory));
        if (fails(emulation::NcclFailure::wrong_bytes, here.rank)) std::memset(call.memory, 0, call.bytes);
        letters.pop_front();
        here.awaited.pop_back();
    }
    return ncclSuccess;
}

}  // namespace

emulation::FailingNccl& emulation::failing_nccl() {
    static FailingNccl one;
    return one;
}

const char* ncclGetErrorString(ncclResult_t result) {
    return result == ncclSuccess ? "no error" : result == ncclInvalidUsage ? "invalid usage" : "invalid argument";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    static int given = 0;
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    *id = {};
    ++given;
    std::memcpy(id->internal, &given, sizeof given);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* communicator, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
    if (config->blocking != 0) return ncclInvalidUsage;  // which would block where a rank fails
    int number = 0, gpu = 0;
    std::memcpy(&number, id.internal, sizeof number);
    cudaGetDevice(&gpu);
    Meeting& meeting = meeting_of(number);
    const std::lock_guard lock(meeting.mutex);
    *communicator = nullptr;
    if (fails(emulation::NcclFailure::meeting_at_once, rank)) return ncclSystemError;
    *communicator = meeting.communicators.emplace_back(new ncclComm{rank, ranks, meeting}).get();
    meeting.gpus[rank] = gpu;
    return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t* state) {
    const std::lock_guard lock(communicator->meeting.mutex);
    if (communicator->state == ncclInProgress) communicator->state = look(*communicator);
    *state = communicator->state;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t communicator) {
    ++emulation::failing_nccl().aborts;
    const std::lock_guard lock(communicator->meeting.mutex);
    communicator->awaited.clear();
    communicator->state = ncclSystemError;
    return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
    in_group = true;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    const std::vector<Call> all = std::exchange(calls, {});
    in_group = false;
    if (all.empty()) return ncclSuccess;
    ncclComm& here = *all.front().communicator;
    if (fails(emulation::NcclFailure::exchange_at_once, here.rank)) return here.state = ncclSystemError;
    cudaStreamSynchronize(all.front().stream);
    const std::lock_guard lock(here.meeting.mutex);
    for (const Call& call : all) {
        if (!call.sends) {
            here.awaited.push_back(call);
            continue;
        }
        const auto* const from = static_cast<const std::byte*>(call.memory);
        here.meeting.letters[{here.rank, call.other}].emplace_back(from, from + call.bytes);
    }
    return here.state = ncclInProgress;
}

ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t, int to, ncclComm_t communicator,
                      cudaStream_t stream) {
    return add({communicator, true, const_cast<void*>(from), count, to, stream});
}

ncclResult_t ncclRecv(void* to, std::size_t count, ncclDataType_t, int from, ncclComm_t communicator,
                      cudaStream_t stream) {
    return add({communicator, false, to, count, from, stream});
}
