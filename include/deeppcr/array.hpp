// Arrays: the shape of a trajectory, non-owning views of states and Jacobians, buffers that own them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <deeppcr/error.hpp>
#include <deeppcr/storage.hpp>

// CUDA's stream, without its headers.
struct CUstream_st;

namespace deeppcr {

using index = std::int64_t;

/// Shape of a trajectory: `steps` states of `width` numbers for each of `batch` independent sequences.
struct Shape {
    index steps = 0;
    index batch = 1;
    index width = 1;

    /// Number of elements. Throws InvalidArgument where a size is negative or the product overflows 63 bits.
    index count() const;
    bool operator==(const Shape&) const = default;
};

/// "[steps,batch,width]", as error messages print it.
std::string to_string(const Shape& shape);

/// Where memory is: in main memory, or on a GPU.
class Device {
public:
    constexpr Device() = default;
    static constexpr Device host() { return {}; }
    /// The GPU of this ordinal (see cuda_devices()).
    static constexpr Device cuda(int ordinal = 0) {
        Device device;
        device.ordinal_ = ordinal;
        return device;
    }
    constexpr bool is_host() const { return ordinal_ < 0; }
    constexpr int ordinal() const { return ordinal_; }  ///< -1: main memory
    bool operator==(const Device&) const = default;

private:
    int ordinal_ = -1;
};

/// Which of the two outer dimensions of a contiguous array comes first in memory; width is always innermost.
enum class Layout { steps_first, batch_first };

/// Non-owning view of states [steps,batch,width]. The width is contiguous; steps and sequences have strides,
/// so that [T,B,D] and [B,T,D] arrays and slices of either are views alike. Cheap to copy.
template <class T>
class View {
public:
    View() = default;

    /// Contiguous memory of `shape`, in `layout`.
    View(T* data, const Shape& shape, Layout layout = Layout::steps_first)
        : View(data, shape, layout == Layout::steps_first ? shape.batch * shape.width : shape.width,
               layout == Layout::steps_first ? shape.width : shape.steps * shape.width) {}

    /// Strides count elements, from one step (or sequence) to the next.
    View(T* data, const Shape& shape, index step_stride, index batch_stride)
        : data_(data), shape_(shape), step_stride_(step_stride), batch_stride_(batch_stride) {}

    /// A view that may be written is also a view that may be read.
    template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
        View(const View<U>& other)  // NOLINT(google-explicit-constructor)
        : View(other.data(), other.shape(), other.step_stride(), other.batch_stride()) {}

    T* data() const { return data_; }
    const Shape& shape() const { return shape_; }
    index steps() const { return shape_.steps; }
    index batch() const { return shape_.batch; }
    index width() const { return shape_.width; }
    index step_stride() const { return step_stride_; }
    index batch_stride() const { return batch_stride_; }
    bool empty() const { return data_ == nullptr || shape_.steps == 0 || shape_.batch == 0 || shape_.width == 0; }

    /// The state of one sequence at one step: `width` contiguous elements.
    T* at(index step, index sequence) const { return data_ + step * step_stride_ + sequence * batch_stride_; }
    T& operator()(index step, index sequence, index element) const { return at(step, sequence)[element]; }

    /// Steps [first, last) of every sequence.
    View steps(index first, index last) const {
        return {data_ + first * step_stride_, {last - first, shape_.batch, shape_.width}, step_stride_, batch_stride_};
    }
    /// Every step of sequences [first, last).
    View sequences(index first, index last) const {
        return {data_ + first * batch_stride_, {shape_.steps, last - first, shape_.width}, step_stride_, batch_stride_};
    }
    /// The same memory, the last step first.
    View reversed() const {
        return {shape_.steps > 0 ? data_ + (shape_.steps - 1) * step_stride_ : data_, shape_, -step_stride_,
                batch_stride_};
    }
    /// Whether the elements fill one run of memory in [steps,batch,width] order.
    bool contiguous() const {
        return (shape_.batch <= 1 || batch_stride_ == shape_.width) &&
               (shape_.steps <= 1 || step_stride_ == shape_.batch * shape_.width);
    }

private:
    T* data_ = nullptr;
    Shape shape_{};
    index step_stride_ = 0;
    index batch_stride_ = 0;
};

/// Non-owning view of the Jacobians of a trajectory: at each step and sequence, width / block square blocks of
/// block x block elements, row-major, one after the other ([steps, batch, width/block, block, block]).
/// block 1 is a diagonal Jacobian [steps,batch,width], block == width a dense one [steps,batch,width,width].
/// The blocks of one step of one sequence are contiguous; steps and sequences have strides.
template <class T>
class Jacobian {
public:
    Jacobian() = default;

    Jacobian(T* data, const Shape& states, index block, Layout layout = Layout::steps_first)
        : Jacobian(data, states, block,
                   layout == Layout::steps_first ? states.batch * states.width * block : states.width * block,
                   layout == Layout::steps_first ? states.width * block : states.steps * states.width * block) {}

    Jacobian(T* data, const Shape& states, index block, index step_stride, index batch_stride)
        : data_(data), states_(states), block_(block), step_stride_(step_stride), batch_stride_(batch_stride) {}

    template <class U>
    requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>)
        Jacobian(const Jacobian<U>& other)  // NOLINT(google-explicit-constructor)
        : Jacobian(other.data(), other.states(), other.block(), other.step_stride(), other.batch_stride()) {}

    T* data() const { return data_; }
    /// Shape of the states that the Jacobians act on.
    const Shape& states() const { return states_; }
    index steps() const { return states_.steps; }
    index batch() const { return states_.batch; }
    index width() const { return states_.width; }
    index block() const { return block_; }
    index step_stride() const { return step_stride_; }
    index batch_stride() const { return batch_stride_; }
    bool diagonal() const { return block_ == 1; }
    bool dense() const { return block_ == states_.width; }

    /// The blocks at one step of one sequence: [width/block, block, block], contiguous.
    T* at(index step, index sequence) const { return data_ + step * step_stride_ + sequence * batch_stride_; }
    /// d x_t[row] / d x_{t-1}[column] at one step of one sequence; row and column must lie in the same block.
    T& operator()(index step, index sequence, index row, index column) const {
        return at(step, sequence)[row * block_ + column % block_];
    }

    Jacobian steps(index first, index last) const {
        return {data_ + first * step_stride_,
                {last - first, states_.batch, states_.width},
                block_,
                step_stride_,
                batch_stride_};
    }
    Jacobian sequences(index first, index last) const {
        return {data_ + first * batch_stride_,
                {states_.steps, last - first, states_.width},
                block_,
                step_stride_,
                batch_stride_};
    }

private:
    T* data_ = nullptr;
    Shape states_{};
    index block_ = 1;
    index step_stride_ = 0;
    index batch_stride_ = 0;
};

namespace detail {
/// 64-byte aligned, uninitialised memory; OutOfMemory names the byte count where it cannot be had.
std::shared_ptr<void> allocate(index bytes, Device device);
/// Between any two places, by CUDA; done when it returns.
void copy(void* to, const void* from, index bytes);
void fill_zeros(void* data, index bytes, Device device);
void fill_normal(float* data, index count, std::uint64_t seed);
void fill_normal(double* data, index count, std::uint64_t seed);
}  // namespace detail

/// While it lives, the memory of `device` that this thread asks for comes from `allocate`: that of Buffers and
/// Workspaces, and so of every call. For another library's allocator whose memory belongs to a stream: `stream` is
/// where Buffers are then filled with zeros, and where the calls meanwhile are to run.
class MemorySource {
public:
    /// Uninitialised, 64-byte aligned; throws OutOfMemory.
    using Allocate = std::function<std::shared_ptr<void>(index bytes)>;

    explicit MemorySource(Device device, Allocate allocate, CUstream_st* stream = nullptr);
    ~MemorySource();
    MemorySource(const MemorySource&) = delete;
    MemorySource& operator=(const MemorySource&) = delete;

    /// The innermost one of this thread for `device`, or null.
    static const MemorySource* find(Device device);
    const Allocate& allocate() const { return allocate_; }
    CUstream_st* stream() const { return stream_; }

private:
    Device device_;
    Allocate allocate_;
    CUstream_st* stream_;
    const MemorySource* outer_;
};

/// Owns a contiguous, 64-byte aligned array of states, in main memory or on a GPU; there its elements cannot be read by
/// operator() or data(). Moves are cheap; copies are explicit (`clone`, `on`). Throws OutOfMemory, NoDevice.
template <class T>
class Buffer {
    static_assert(std::is_floating_point_v<T> || is_stored_in_16_bits<T>);

public:
    Buffer() = default;

    /// Zeros.
    explicit Buffer(const Shape& shape, Layout layout = Layout::steps_first, Device device = {})
        : Buffer(uninitialised(shape, layout, device)) {
        detail::fill_zeros(data(), size() * index(sizeof(T)), device);
    }
    Buffer(Buffer&&) noexcept = default;
    Buffer& operator=(Buffer&&) noexcept = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    static Buffer uninitialised(const Shape& shape, Layout layout = Layout::steps_first, Device device = {}) {
        Buffer result;
        const index count = shape.count();
        if (count > std::numeric_limits<index>::max() / index(sizeof(T)))
            throw OutOfMemory("an array of shape " + to_string(shape) + " is larger than the address space");
        result.storage_ = detail::allocate(count * index(sizeof(T)), device);
        result.device_ = device;
        result.view_ = View<T>(static_cast<T*>(result.storage_.get()), shape, layout);
        return result;
    }

    /// Independent standard normal numbers; the same seed gives the same numbers on every machine.
    static Buffer random(const Shape& shape, std::uint64_t seed, Layout layout = Layout::steps_first,
                         Device device = {}) {
        Buffer result = uninitialised(shape, layout);
        detail::fill_normal(result.data(), result.size(), seed);
        return device.is_host() ? std::move(result) : result.on(device);
    }

    Buffer clone() const { return on(device_); }
    /// A copy in the memory of `device`.
    Buffer on(Device device) const {
        Buffer result = uninitialised(shape(), Layout::steps_first, device);
        result.view_ = View<T>(result.data(), shape(), view_.step_stride(), view_.batch_stride());
        if (device.is_host() && device_.is_host())
            std::copy_n(data(), size(), result.data());
        else
            detail::copy(result.data(), data(), size() * index(sizeof(T)));
        return result;
    }
    Device device() const { return device_; }
    /// Who frees it: what MemorySource::Allocate returned, where there was one.
    const std::shared_ptr<void>& memory() const { return storage_; }

    T* data() const { return view_.data(); }
    index size() const { return view_.steps() * view_.batch() * view_.width(); }
    const Shape& shape() const { return view_.shape(); }
    T& operator()(index step, index sequence, index element) const { return view_(step, sequence, element); }

    const View<T>& view() const { return view_; }
    operator View<T>() const { return view_; }        // NOLINT(google-explicit-constructor)
    operator View<const T>() const { return view_; }  // NOLINT(google-explicit-constructor)

private:
    std::shared_ptr<void> storage_;
    Device device_;
    View<T> view_;
};

struct Execution;
namespace device {
class Mark;
}

/// Memory that calls reuse: a first call grows it, later calls of the same sizes allocate nothing. Not for use by two
/// threads at once. `peak_bytes` is the largest amount in use at any time.
/// On a GPU calls may be in different streams: one in another stream than the call before waits there, on the GPU, for
/// that call's work. A call that is captured into a graph must find the workspace grown by an earlier one of the same
/// sizes (InvalidArgument); the memory that it takes is not freed before the workspace. A graph waits for nobody: its
/// launches must be ordered with other work in the workspace as if they were calls in one stream.
class Workspace {
public:
    explicit Workspace(Device device = {});
    /// Where `execution` runs: on a GPU in the order of its stream, from a pool, so that neither growing nor the end of
    /// the workspace waits for the work in it. Calls in other streams refuse it (InvalidArgument).
    explicit Workspace(const Execution& execution);
    ~Workspace();
    Workspace(Workspace&&) noexcept;
    Workspace& operator=(Workspace&&) noexcept;

    /// 64-byte aligned and uninitialised; valid until the enclosing Scope ends. Throws OutOfMemory.
    template <class T>
    T* take(index count) {
        if (count > std::numeric_limits<index>::max() / index(sizeof(T)))
            throw OutOfMemory("workspace of " + std::to_string(count) + " elements exceeds the address space");
        return static_cast<T*>(take_bytes(count * index(sizeof(T))));
    }
    template <class T>
    View<T> take_states(const Shape& shape) {
        return View<T>(take<T>(shape.count()), shape);
    }
    template <class T>
    Jacobian<T> take_jacobian(const Shape& states, index block) {
        return Jacobian<T>(take<T>(Shape{states.steps, states.batch * states.width, block}.count()), states, block);
    }

    Device device() const { return device_; }
    index used_bytes() const;
    index peak_bytes() const;

    /// Gives back, at its end, everything taken since its begin.
    class Scope {
    public:
        explicit Scope(Workspace& workspace);
        ~Scope();
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;

    private:
        Workspace& workspace_;
        std::size_t block_, offset_;
        index used_;
        int exceptions_;  // on their way when the scope began
    };

    /// A call, from its begin to its end, that enqueues work in execution.stream and takes the memory for it. Of nested
    /// ones the outermost counts. In main memory it does nothing.
    class Use {
    public:
        Use(Workspace& workspace, const Execution& execution);
        ~Use();
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;

    private:
        Workspace& workspace_;
    };

private:
    void begin_use(CUstream_st* stream);
    void end_use();
    void join_blocks();
    void* take_bytes(index bytes);
    std::shared_ptr<void> allocate(index bytes) const;
    struct Block {
        std::shared_ptr<void> memory;
        index bytes;
        bool captured = false;  // a graph may use it
    };
    Device device_;
    CUstream_st* stream_ = nullptr;  // of the last use without a capture
    bool in_stream_ = false;
    std::vector<Block> blocks_;
    std::size_t block_ = 0, offset_ = 0;
    index used_ = 0, peak_ = 0;
    int uses_ = 0;                        // nested
    bool capturing_ = false;              // the stream of this use
    std::shared_ptr<device::Mark> mark_;  // the end of the last use, where nothing was captured
};

/// Bytes of main memory that a call may plan with: what the machine has available now, never below 0.
index available_memory();

}  // namespace deeppcr
