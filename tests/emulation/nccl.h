// NCCL over the emulation of CUDA, as far as this library uses it: without blocking the host. Ranks are threads of this
// process. What is enqueued happens when it is asked for: as if each rank waited for the others there.
#pragma once

#include <atomic>
#include <cstddef>

#include <cuda_runtime.h>

enum ncclResult_t {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclInProgress = 7
};
enum ncclDataType_t { ncclUint8 = 1 };
struct ncclUniqueId {
    char internal[128];
};
struct ncclConfig_t {
    int blocking;
};
#define NCCL_CONFIG_INITIALIZER \
    { 1 }
struct ncclComm;
using ncclComm_t = ncclComm*;

namespace emulation {

/// Where NCCL fails, by the call itself or when it is asked, and on which rank alone: the others wait for it for ever.
enum class NcclFailure { none, meeting_at_once, meeting, exchange_at_once, exchange, wrong_bytes };
struct FailingNccl {
    std::atomic<NcclFailure> failure = NcclFailure::none;
    std::atomic<int> rank = 0;
    std::atomic<int> aborts = 0;
};
FailingNccl& failing_nccl();

}  // namespace emulation

extern "C" {
const char* ncclGetErrorString(ncclResult_t result);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
/// In progress until all ranks have called it; then ncclInvalidUsage on those that have another's GPU.
ncclResult_t ncclCommInitRankConfig(ncclComm_t* communicator, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config);
ncclResult_t ncclCommGetAsyncError(ncclComm_t communicator, ncclResult_t* state);
ncclResult_t ncclCommAbort(ncclComm_t communicator);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();
ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t type, int to, ncclComm_t communicator,
                      cudaStream_t stream);
ncclResult_t ncclRecv(void* to, std::size_t count, ncclDataType_t type, int from, ncclComm_t communicator,
                      cudaStream_t stream);
}
