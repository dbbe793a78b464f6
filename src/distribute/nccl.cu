// Sums between GPUs. Of NCCL only send and receive are used: the order in which its own reductions add depends on how
// the machines are wired. The library is opened when it is first needed: it has 200 MB, and most have no use for it.
#include <dlfcn.h>
#include <nccl.h>

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

    void sum(Group& group, float* values, index count, CUstream_st* stream) override {
        sum_slices(group, values, count, stream);
    }
    void sum(Group& group, double* values, index count, CUstream_st* stream) override {
        sum_slices(group, values, count, stream);
    }

private:
    template <class T>
    void sum_slices(Group& group, T* values, index count, CUstream_st* stream) {
        const Slice mine = slice(count, rank_, ranks_);
        reserve(group, (count / ranks_ + 1) * ranks_ * index(sizeof(T)));
        done_.wait_in(stream);
        T* const received = static_cast<T*>(received_.get());
        exchange(
            [&](int other, const auto& send, const auto& receive) {
                const Slice theirs = slice(count, other, ranks_);
                send(values + theirs.first, theirs.count());
                receive(received + mine.count() * other, mine.count());
            },
            stream);
        if (mine.count() > 0)
            cuda::launch(cuda::one_each(mine.count(), stream), add_slices<T>, received, rank_, ranks_, mine.count(),
                         values + mine.first);
        exchange(
            [&](int other, const auto& send, const auto& receive) {
                const Slice theirs = slice(count, other, ranks_);
                send(values + mine.first, mine.count());
                receive(values + theirs.first, theirs.count());
            },
            stream);
        done_.set(stream);
    }

    /// All ranks ask for the same, so that they grow at the same time. Not from a pool: NCCL may write there from
    /// another GPU of this process, to which pools are closed.
    void reserve(Group& group, index bytes) {
        if (bytes <= bytes_) return;
        std::exception_ptr problem;
        try {
            received_ = device::allocate_on_gpu(bytes, device::current_gpu());
        } catch (...) {
            problem = std::current_exception();
        }
        group.agree(problem);
        bytes_ = bytes;
    }

    /// For every other rank body(rank, send, receive), which call send(from, count) and receive(to, count) once. What
    /// goes wrong is thrown when NCCL's group of calls has ended, or the next would be a part of it.
    template <class Body>
    void exchange(const Body& body, CUstream_st* stream) {
        check(nccl().group_start(), "beginning an exchange");
        ncclResult_t first = ncclSuccess;
        const auto note = [&](ncclResult_t result) { first = first == ncclSuccess ? result : first; };
        for (int distance = 1; distance < ranks_; ++distance) {
            const int other = (rank_ + distance) % ranks_;
            body(
                other,
                [&](const auto* from, index count) {
                    note(nccl().send(from, std::size_t(count) * sizeof *from, ncclUint8, other, communicator_, stream));
                },
                [&](auto* to, index count) {
                    note(nccl().receive(to, std::size_t(count) * sizeof *to, ncclUint8, other, communicator_, stream));
                });
        }
        note(nccl().group_end());
        check(first, "exchanging values");
    }

    int rank_, ranks_;
    ncclComm_t communicator_ = nullptr;  // to the end of the process: its end would wait for ranks that have failed
    std::shared_ptr<void> received_;
    index bytes_ = 0;
    device::Mark done_;  // with received_
};

using Name = std::array<char, 16>;

Name name_of_gpu() {
    cudaDeviceProp properties{};
    cuda::check(cudaGetDeviceProperties(&properties, device::current_gpu().ordinal()), "looking at a GPU");
    Name name{};
    std::memcpy(name.data(), properties.uuid.bytes, name.size());
    return name;
}

/// Whether a condition holds on every rank.
bool everywhere(Group& group, bool condition) {
    index missing = condition ? 0 : 1;
    group.maximum(std::span(&missing, 1));
    return missing == 0;
}

}  // namespace

std::unique_ptr<Gpus> connect_gpus(Group& group) {
    if (!everywhere(group, nccl().found)) return nullptr;
    Name name{};
    ncclUniqueId id{};
    bool good = true;
    std::exception_ptr problem;
    try {
        name = name_of_gpu();
        if (group.rank() == 0) good = nccl().unique_id(&id) == ncclSuccess;
    } catch (...) {
        problem = std::current_exception();
    }
    group.agree(problem);
    std::vector<char> names(name.size() * std::size_t(group.size()));
    group.gather(std::span<const char>(name), std::span<char>(names));
    std::set<std::string> different;
    for (std::size_t i = 0; i < names.size(); i += name.size()) different.emplace(names.data() + i, name.size());
    if (!everywhere(group, good && index(different.size()) == group.size())) return nullptr;
    group.broadcast(std::span<char>(id.internal));
    std::unique_ptr<Gpus> gpus;
    try {
        gpus = std::make_unique<NcclGpus>(group.rank(), group.size(), id);
    } catch (const Error&) {  // no way between them, or a limit of the machine's
    }
    return everywhere(group, gpus != nullptr) ? std::move(gpus) : nullptr;
}

}  // namespace deeppcr::distribute
