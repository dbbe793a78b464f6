#include <deeppcr/array.hpp>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <numbers>
#include <random>
#include <utility>

#include <deeppcr/execution.hpp>

#include "device/cuda.hpp"

namespace deeppcr {

index Shape::count() const {
    if (steps < 0 || batch < 0 || width < 0) throw InvalidArgument("shape", "sizes of 0 or more", to_string(*this));
    index count = 0;
    if (__builtin_mul_overflow(steps, batch, &count) || __builtin_mul_overflow(count, width, &count))
        throw InvalidArgument("shape", "fewer than 2^63 elements", to_string(*this));
    return count;
}

std::string to_string(const Shape& shape) {
    return "[" + std::to_string(shape.steps) + "," + std::to_string(shape.batch) + "," + std::to_string(shape.width) +
           "]";
}

index available_memory() {
    std::ifstream file("/proc/meminfo");
    std::string name;
    index kilobytes = 0;
    while (file >> name >> kilobytes) {
        if (name == "MemAvailable:") return kilobytes * 1024;
        file.ignore(64, '\n');
    }
    return index(sysconf(_SC_AVPHYS_PAGES)) * index(sysconf(_SC_PAGESIZE));
}

namespace {
thread_local const MemorySource* innermost_source = nullptr;
}

MemorySource::MemorySource(Device device, Allocate allocate, CUstream_st* stream)
    : device_(device), allocate_(std::move(allocate)), stream_(stream), outer_(innermost_source) {
    innermost_source = this;
}
MemorySource::~MemorySource() { innermost_source = outer_; }

const MemorySource* MemorySource::find(Device device) {
    const MemorySource* source = innermost_source;
    while (source != nullptr && source->device_ != device) source = source->outer_;
    return source;
}

namespace detail {

std::shared_ptr<void> allocate(index bytes, Device device) {
    if (const MemorySource* const source = MemorySource::find(device)) return source->allocate()(bytes);
    if (!device.is_host()) return device::allocate_on_gpu(bytes, device);
    // Large arrays lie on huge pages where the system grants them: streams through them then miss the TLB rarely.
    constexpr std::size_t cache_line = 64, huge_page = std::size_t(2) << 20;
    const bool large = std::size_t(bytes) >= 2 * huge_page;
    const std::size_t alignment = large ? huge_page : cache_line;
    const std::size_t rounded = (std::size_t(bytes) / alignment + 1) * alignment;
    void* memory = std::aligned_alloc(alignment, rounded);
    if (memory == nullptr) throw OutOfMemory("cannot allocate " + std::to_string(bytes) + " bytes");
    if (large) madvise(memory, rounded, MADV_HUGEPAGE);
    return {memory, [](void* pointer) { std::free(pointer); }};
}

void copy(void* to, const void* from, index bytes) { device::copy_by_gpu(to, from, bytes); }

void fill_zeros(void* data, index bytes, Device device) {
    if (device.is_host())
        std::memset(data, 0, std::size_t(bytes));
    else if (const MemorySource* const source = MemorySource::find(device))
        device::fill_bytes(data, 0, bytes, source->stream());
    else
        device::fill_zeros_on_gpu(data, bytes, device);
}

namespace {
/// Box-Muller on a Mersenne Twister: both are specified exactly, unlike std::normal_distribution.
template <class T>
void fill(T* data, index count, std::uint64_t seed) {
    std::mt19937_64 generator(seed);
    const auto uniform = [&] { return (double(generator() >> 11) + 0.5) * 0x1p-53; };
    for (index i = 0; i < count; i += 2) {
        const double radius = std::sqrt(-2 * std::log(uniform())), angle = 2 * std::numbers::pi * uniform();
        data[i] = T(radius * std::cos(angle));
        if (i + 1 < count) data[i + 1] = T(radius * std::sin(angle));
    }
}
}  // namespace

void fill_normal(float* data, index count, std::uint64_t seed) { fill(data, count, seed); }
void fill_normal(double* data, index count, std::uint64_t seed) { fill(data, count, seed); }

Device device_of(const Execution& execution) {
    return execution.backend == Backend::cuda ? device::current_gpu() : Device::host();
}

}  // namespace detail

Workspace::Workspace(Device device) : device_(device) {}
Workspace::Workspace(const Execution& execution)
    : device_(detail::device_of(execution)), stream_(execution.stream), in_stream_(!device_.is_host()) {}
Workspace::~Workspace() = default;
Workspace::Workspace(Workspace&&) noexcept = default;
Workspace& Workspace::operator=(Workspace&&) noexcept = default;

void* Workspace::take_bytes(index bytes) {
    constexpr index alignment = 64;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    while (block_ < blocks_.size() && index(offset_) + bytes > blocks_[block_].bytes) {
        ++block_;
        offset_ = 0;
    }
    if (block_ == blocks_.size()) {
        const index grown = std::max(bytes, index(1) << 16);
        if (capturing_)
            throw InvalidArgument("options.workspace",
                                  "one that an earlier call of the same sizes has grown, as the stream is being "
                                  "captured: call once before",
                                  "one that lacks " + std::to_string(bytes) + " bytes");
        blocks_.push_back({allocate(grown), grown});
        offset_ = 0;
    }
    void* memory = static_cast<char*>(blocks_[block_].memory.get()) + offset_;
    if (capturing_) blocks_[block_].captured = true;
    offset_ += std::size_t(bytes);
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    return memory;
}

std::shared_ptr<void> Workspace::allocate(index bytes) const {
    if (in_stream_ && MemorySource::find(device_) == nullptr) return device::allocate_in_stream(bytes, stream_);
    return detail::allocate(bytes, device_);
}

index Workspace::used_bytes() const { return used_; }
index Workspace::peak_bytes() const { return peak_; }

Workspace::Scope::Scope(Workspace& workspace)
    : workspace_(workspace),
      block_(workspace.block_),
      offset_(workspace.offset_),
      used_(workspace.used_),
      exceptions_(std::uncaught_exceptions()) {}

Workspace::Scope::~Scope() {
    workspace_.block_ = block_;
    workspace_.offset_ = offset_;
    workspace_.used_ = used_;
    if (used_ == 0 && !workspace_.capturing_ && std::uncaught_exceptions() == exceptions_) workspace_.join_blocks();
}

/// Once everything has been given back, many small blocks become one large one, beside those that graphs use.
void Workspace::join_blocks() {
    const auto captured = [](const Block& block) { return block.captured; };
    if (index(blocks_.size()) - std::count_if(blocks_.begin(), blocks_.end(), captured) < 2) return;
    std::erase_if(blocks_, [&](const Block& block) { return !captured(block); });
    block_ = offset_ = 0;
    try {
        blocks_.push_back({allocate(peak_), peak_});
    } catch (...) {  // the next call allocates what it needs, or says why it cannot
    }
}

Workspace::Use::Use(Workspace& workspace, const Execution& execution) : workspace_(workspace) {
    if (workspace.uses_ == 0 && !workspace.device_.is_host()) workspace.begin_use(execution.stream);
    ++workspace.uses_;
}

Workspace::Use::~Use() {
    if (--workspace_.uses_ == 0 && !workspace_.device_.is_host()) workspace_.end_use();
}

void Workspace::begin_use(CUstream_st* stream) {
    if (in_stream_ && stream != stream_)
        throw InvalidArgument("options.workspace", "a workspace of the call's stream, or one made for a Device",
                              "one made for another stream");
    capturing_ = device::is_captured(stream);
    if (capturing_) return;
    if (mark_ != nullptr && stream != stream_) mark_->wait_in(stream);
    stream_ = stream;
}

void Workspace::end_use() {
    if (!std::exchange(capturing_, false) && !in_stream_) {
        try {
            if (mark_ == nullptr) mark_ = std::make_shared<device::Mark>();
            mark_->set(stream_);
        } catch (...) {  // every later call says what is wrong
        }
    }
}

}  // namespace deeppcr
