// Sums between GPUs. Of NCCL only send and receive are used: the order in which its own reductions add depends on how
// the machines are wired. The library is opened when it is first needed: it has 200 MB, and most have no use for it.
#include <dlfcn.h>
#include <nccl.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include <deeppcr/launch.cuh>

#include "device/cuda.hpp"
#include "distribute/gpus.hpp"

namespace deeppcr::distribute {
namespace {

struct Nccl {
    decltype(&ncclGetErrorString) error_string = nullptr;
    decltype(&ncclGetUniqueId) unique_id = nullptr;
    decltype(&ncclCommInitRank) init_rank = nullptr;
    decltype(&ncclGroupStart) group_start = nullptr;
    decltype(&ncclGroupEnd) group_end = nullptr;
    decltype(&ncclSend) send = nullptr;
    decltype(&ncclRecv) receive = nullptr;
    bool found = false;

    /// From what the process has loaded, PyTorch's for one, else from the dynamic linker's places.
    Nccl() {
        void* library = RTLD_DEFAULT;
        if (dlsym(library, "ncclSend") == nullptr) library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
        // RTLD_DEFAULT is the null pointer.
        if (dlsym(library, "ncclSend") == nullptr) return;
        const auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            return function != nullptr;
        };
        found = find(error_string, "ncclGetErrorString") && find(unique_id, "ncclGetUniqueId") &&
                find(init_rank, "ncclCommInitRank") && find(group_start, "ncclGroupStart") &&
                find(group_end, "ncclGroupEnd") && find(send, "ncclSend") && find(receive, "ncclRecv");
    }
};
const Nccl& nccl() {
    static const Nccl library;
    return library;
}

void check(ncclResult_t result, const char* doing) {
    if (result != ncclSuccess) throw Error(std::string("NCCL, ") + doing + ": " + nccl().error_string(result));
}

/// own[i] = slices[0][i] + slices[1][i] + ..., from the first rank to the last; own itself is what `rank` has.
template <class T>
__global__ void __launch_bounds__(cuda::plain_threads)
    add_slices(const T* slices, int rank, int ranks, index count, T* own) {
    const index i = index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    T sum = rank == 0 ? own[i] : slices[i];
    for (int other = 1; other < ranks; ++other) sum += other == rank ? own[i] : slices[other * count + i];
    own[i] = sum;
}

class NcclGpus final : public Gpus {
public:
    NcclGpus(int rank, int ranks, const ncclUniqueId& id) : rank_(rank), ranks_(ranks) {
        check(nccl().init_rank(&communicator_, ranks, id, rank), "meeting the other ranks");
    }

    void sum(float* values, index count, CUstream_st* stream) override { sum_slices(values, count, stream); }
    void sum(double* values, index count, CUstream_st* stream) override { sum_slices(values, count, stream); }

private:
    template <class T>
    void sum_slices(T* values, index count, CUstream_st* stream) {
        const Slice mine = slice(count, rank_, ranks_);
        const auto received = allocate<T>(mine.count() * ranks_, stream);
        exchange(
            [&](int other, const auto& send, const auto& receive) {
                const Slice theirs = slice(count, other, ranks_);
                send(values + theirs.first, theirs.count());
                receive(received.get() + mine.count() * other, mine.count());
            },
            stream);
        if (mine.count() > 0)
            cuda::launch(cuda::one_each(mine.count(), stream), add_slices<T>, received.get(), rank_, ranks_,
                         mine.count(), values + mine.first);
        exchange(
            [&](int other, const auto& send, const auto& receive) {
                const Slice theirs = slice(count, other, ranks_);
                send(values + mine.first, mine.count());
                receive(values + theirs.first, theirs.count());
            },
            stream);
    }

    template <class T>
    static std::shared_ptr<T> allocate(index count, CUstream_st* stream) {
        return std::static_pointer_cast<T>(device::allocate_in_stream(count * index(sizeof(T)), stream));
    }

    /// For every other rank body(rank, send, receive), which call send(from, count) and receive(to, count) once.
    template <class Body>
    void exchange(const Body& body, CUstream_st* stream) {
        check(nccl().group_start(), "beginning an exchange");
        for (int distance = 1; distance < ranks_; ++distance) {
            const int other = (rank_ + distance) % ranks_;
            body(
                other,
                [&](const auto* from, index count) {
                    check(nccl().send(from, std::size_t(count) * sizeof *from, ncclUint8, other, communicator_, stream),
                          "sending");
                },
                [&](auto* to, index count) {
                    check(nccl().receive(to, std::size_t(count) * sizeof *to, ncclUint8, other, communicator_, stream),
                          "receiving");
                });
        }
        check(nccl().group_end(), "ending an exchange");
    }

    int rank_, ranks_;
    ncclComm_t communicator_ = nullptr;  // to the end of the process: its end would wait for ranks that have failed
};

/// The machine and the current GPU, as long as a name can be.
std::array<char, 272> name_of_gpu() {
    std::array<char, 272> name{};
    gethostname(name.data(), 255);
    cudaDeviceProp properties{};
    cuda::check(cudaGetDeviceProperties(&properties, device::current_gpu().ordinal()), "looking at a GPU");
    std::memcpy(name.data() + 256, properties.uuid.bytes, 16);
    return name;
}

}  // namespace

std::unique_ptr<Gpus> connect_gpus(Group& group) {
    index without = nccl().found ? 0 : 1;
    group.maximum(std::span(&without, 1));
    if (without != 0) return nullptr;
    std::array<char, 272> name{};
    ncclUniqueId id{};
    std::exception_ptr problem;
    try {
        name = name_of_gpu();
        if (group.rank() == 0) check(nccl().unique_id(&id), "asking for a name");
    } catch (...) {
        problem = std::current_exception();
    }
    group.agree(problem);
    std::vector<char> names(name.size() * std::size_t(group.size()));
    group.gather(std::span<const char>(name), std::span<char>(names));
    std::set<std::string> different;
    for (std::size_t i = 0; i < names.size(); i += name.size()) different.emplace(names.data() + i, name.size());
    if (index(different.size()) < group.size()) return nullptr;
    group.broadcast(std::span<char>(id.internal));
    return std::make_unique<NcclGpus>(group.rank(), group.size(), id);
}

}  // namespace deeppcr::distribute
