// NCCL over the emulation of CUDA, as far as this library uses it. Ranks are threads of this process. What is enqueued
// happens when a group of calls ends: as if each rank waited for the others there.
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

enum ncclResult_t { ncclSuccess = 0, ncclInvalidArgument = 4, ncclInvalidUsage = 5 };
enum ncclDataType_t { ncclUint8 = 1 };
struct ncclUniqueId {
    char internal[128];
};
struct ncclComm;
using ncclComm_t = ncclComm*;

extern "C" {
const char* ncclGetErrorString(ncclResult_t result);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
/// Returns when all ranks have called it. ncclInvalidUsage where two have the same GPU.
ncclResult_t ncclCommInitRank(ncclComm_t* communicator, int ranks, ncclUniqueId id, int rank);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();
ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t type, int to, ncclComm_t communicator,
                      cudaStream_t stream);
ncclResult_t ncclRecv(void* to, std::size_t count, ncclDataType_t type, int from, ncclComm_t communicator,
                      cudaStream_t stream);
}
