// Sums between GPUs. Of NCCL only send and receive are used: the order in which its own reductions add depends on how
// the machines are wired. The library is opened when it is first needed: it has 200 MB, and most have no use for it.
// Its calls do not block the host: a rank where one fails could not say so to the others, which would wait for it.
#include <dlfcn.h>
#include <nccl.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <deeppcr/launch.cuh>

#include "device/cuda.hpp"
#include "distribute/gpus.hpp"

namespace deeppcr::distribute {
namespace {

struct Nccl {
    decltype(&ncclGetErrorString) error_string = nullptr;
    decltype(&ncclGetUniqueId) unique_id = nullptr;
    decltype(&ncclCommInitRankConfig) init_rank = nullptr;
    decltype(&ncclCommGetAsyncError) ask = nullptr;
    decltype(&ncclCommAbort) abort = nullptr;
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
                find(init_rank, "ncclCommInitRankConfig") && find(ask, "ncclCommGetAsyncError") &&
                find(abort, "ncclCommAbort") && find(group_start, "ncclGroupStart") &&
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

/// Whether a condition holds on every rank.
bool everywhere(Group& group, bool condition) {
    index missing = condition ? 0 : 1;
    group.maximum(std::span(&missing, 1));
    return missing == 0;
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
    NcclGpus(int rank, int ranks) : rank_(rank), ranks_(ranks), ordinal_(device::current_gpu().ordinal()) {}

    /// Whether all ranks have met, and bytes have come from all of them: only then NCCL has connected them. Collective.
    bool connect(Group& group, const ncclUniqueId& id) {
        bool connected = false;
        try {
            connected = meets(group, id) && exchanges(group);
        } catch (...) {
            abort();
            throw;
        }
        if (!connected) abort();
        return connected;
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
        if (const int current = device::current_gpu().ordinal(); current != ordinal_)
            throw InvalidArgument("values",
                                  "on GPU " + std::to_string(ordinal_) + ", as in the first sum of this group",
                                  "on GPU " + std::to_string(current));
        const Slice mine = slice(count, rank_, ranks_);
        reserve(group, (count / ranks_ + 1) * ranks_ * index(sizeof(T)));
        done_.wait_in(stream);
        T* const received = static_cast<T*>(received_.get());
        finish(exchange(
            [&](int other, const auto& send, const auto& receive) {
                const Slice theirs = slice(count, other, ranks_);
                send(values + theirs.first, theirs.count());
                receive(received + mine.count() * other, mine.count());
            },
            stream));
        if (mine.count() > 0)
            cuda::launch(cuda::one_each(mine.count(), stream), add_slices<T>, received, rank_, ranks_, mine.count(),
                         values + mine.first);
        finish(exchange(
            [&](int other, const auto& send, const auto& receive) {
                const Slice theirs = slice(count, other, ranks_);
                send(values + mine.first, mine.count());
                receive(values + theirs.first, theirs.count());
            },
            stream));
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
    /// has gone wrong first, when NCCL's group of calls has ended, or the next would be a part of it.
    template <class Body>
    ncclResult_t exchange(const Body& body, CUstream_st* stream) {
        ncclResult_t first = nccl().group_start();
        const auto note = [&](ncclResult_t result) { first = has_failed(first) ? first : result; };
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
        return first;
    }
    static bool has_failed(ncclResult_t result) { return result != ncclSuccess && result != ncclInProgress; }

    /// How far what has begun so is by now.
    ncclResult_t look(ncclResult_t result) const {
        ncclResult_t now = result;
        if (result == ncclInProgress && nccl().ask(communicator_, &now) != ncclSuccess) return ncclSystemError;
        return now;
    }
    /// Until what has begun is in the stream, and what comes behind it may be enqueued.
    void finish(ncclResult_t result) const {
        while ((result = look(result)) == ncclInProgress) std::this_thread::yield();
        check(result, "exchanging values");
    }
    /// Until what has begun is done on all ranks, or has failed on one, or takes longer than anything that works:
    /// whether it is done. now(): how far it is here. Collective.
    template <class Now>
    static bool settles(Group& group, const Now& now) {
        using Clock = std::chrono::steady_clock;
        constexpr std::chrono::minutes patience(5);
        std::optional<Clock::time_point> begin;  // when all ranks were here
        for (;;) {
            const ncclResult_t state = now();
            const bool in_progress = state == ncclInProgress;
            const bool late = in_progress && begin && Clock::now() - *begin > patience;
            std::array<index, 2> told{in_progress, has_failed(state) || late};
            group.maximum(std::span<index>(told));
            if (told[1] != 0) return false;
            if (told[0] == 0) return true;
            if (!begin) begin = Clock::now();
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
    bool meets(Group& group, const ncclUniqueId& id) {
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.blocking = 0;
        ncclResult_t state = nccl().init_rank(&communicator_, ranks_, id, rank_, &config);
        return settles(group, [&] { return state = look(state); });
    }
    /// A byte from every rank to every other.
    bool exchanges(Group& group) {
        const auto byte_of = [](int rank) { return static_cast<unsigned char>(rank + 1); };
        ncclResult_t state = ncclSystemError;
        try {
            received_ = device::allocate_on_gpu(ranks_, device::current_gpu());
            auto* const bytes = static_cast<unsigned char*>(received_.get());
            device::fill_bytes(bytes, 0, ranks_, nullptr);
            device::fill_bytes(bytes + rank_, byte_of(rank_), 1, nullptr);
            state = exchange(
                [&](int other, const auto& send, const auto& receive) {
                    send(bytes + rank_, 1);
                    receive(bytes + other, 1);
                },
                nullptr);
        } catch (...) {  // as with any other failure, there are sums through main memory
        }
        const auto now = [&]() -> ncclResult_t {
            if ((state = look(state)) != ncclSuccess) return state;
            // It is in the stream. What happens on the way is told there, or, later, by NCCL.
            if (const ncclResult_t later = look(ncclInProgress); later != ncclSuccess) return later;
            const cudaError_t done = cudaStreamQuery(nullptr);
            return done == cudaSuccess         ? ncclSuccess
                   : done == cudaErrorNotReady ? ncclInProgress
                                               : ncclUnhandledCudaError;
        };
        if (!settles(group, now)) return false;
        std::vector<unsigned char> bytes(static_cast<std::size_t>(ranks_));
        device::copy_by_gpu(bytes.data(), received_.get(), ranks_);
        bool right = true;
        for (int other = 0; other < ranks_; ++other) right = right && bytes[std::size_t(other)] == byte_of(other);
        return everywhere(group, right);
    }
    /// Ends what NCCL may still be doing, also on the GPU. Not collective.
    void abort() {
        if (communicator_ != nullptr) nccl().abort(communicator_);
        communicator_ = nullptr;
    }

    int rank_, ranks_, ordinal_;
    ncclComm_t communicator_ = nullptr;  // to the end of the process: its end would wait for ranks that have failed
    std::shared_ptr<void> received_;
    index bytes_ = 0;
    device::Mark done_;  // with received_
};

using Name = std::array<char, 384>;

/// What NCCL tells GPUs apart by: their machine as it runs, or NCCL_HOSTID where that is set, and their place on its
/// bus.
Name name_of_gpu() {
    constexpr int place_bytes = 64;
    Name name{};
    cuda::check(cudaDeviceGetPCIBusId(name.data(), place_bytes, device::current_gpu().ordinal()), "looking at a GPU");
    std::string machine;
    if (const char* const chosen = std::getenv("NCCL_HOSTID"); chosen != nullptr) {
        machine = chosen;
    } else {
        std::array<char, 256> host{};
        gethostname(host.data(), host.size() - 1);
        std::ifstream("/proc/sys/kernel/random/boot_id") >> machine;
        machine += host.data();
    }
    machine.copy(name.data() + place_bytes, name.size() - place_bytes);
    return name;
}

}  // namespace

std::unique_ptr<Gpus> connect_gpus(Group& group) {
    if (!everywhere(group, nccl().found)) return nullptr;
    Name name{};
    std::unique_ptr<NcclGpus> gpus;
    std::exception_ptr problem;
    try {
        name = name_of_gpu();
        gpus = std::make_unique<NcclGpus>(group.rank(), group.size());
    } catch (...) {
        problem = std::current_exception();
    }
    group.agree(problem);
    std::vector<char> names(name.size() * std::size_t(group.size()));
    group.gather(std::span<const char>(name), std::span<char>(names));
    std::set<std::string> different;
    for (std::size_t i = 0; i < names.size(); i += name.size()) different.emplace(names.data() + i, name.size());
    if (index(different.size()) < group.size()) return nullptr;
    ncclUniqueId id{};
    const bool good = group.rank() != 0 || nccl().unique_id(&id) == ncclSuccess;
    if (!everywhere(group, good)) return nullptr;
    group.broadcast(std::span<char>(id.internal));
    if (!gpus->connect(group, id)) return nullptr;  // no way between them, or a limit of the machine's
    return gpus;
}

}  // namespace deeppcr::distribute
