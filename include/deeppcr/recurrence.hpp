// Recurrence: what a user extends. A step x_t = f_t(x_{t-1}), given for many steps at once.
#pragma once

#include <span>

#include <deeppcr/array.hpp>
#include <deeppcr/execution.hpp>

namespace deeppcr {

/// A part of a trajectory: steps first+1 .. last of the listed sequences. In the arrays that come with it, row (i, j)
/// belongs to step first + i + 1 of sequence sequences[j]: `before` holds x_{t-1}, `after` receives x_t.
/// `sequences` lies in main memory, on every backend, and until the callback returns. On a GPU the library lists all
/// sequences of the recurrence, in order, so that kernels need not be given the list.
struct Section {
    index first = 0;
    index last = 0;
    std::span<const index> sequences;
    Execution execution = {};
    /// Memory for what a callback needs beside the arrays, where the backend works, to be taken in a Scope of its own;
    /// null: none is offered.
    Workspace* workspace = nullptr;

    index steps() const { return last - first; }
    index batch() const { return index(sequences.size()); }
};

/// Chunks of a section's steps, side by side (Method::overlap). All arrays lie where the backend works.
template <class T>
struct Chunks {
    index length = 0;      ///< steps of a chunk; the last may have fewer
    View<const T> starts;  ///< [chunks,batch,width], in: the state before each chunk
    View<T> trajectory;    ///< [steps,batch,width], any strides, out; of a repair also in

    /// A repair: null for a first run. [chunks,batch], in: the chunks of each sequence that run again, until a new
    /// state differs from the one that is there by at most absolute + relative * |old| in every number. That one stays,
    /// and the chunk ends; states before it are replaced.
    const unsigned char* asked = nullptr;
    unsigned char* changed = nullptr;  ///< [chunks,batch], out: 1 where a chunk came to its end, else not written
    double absolute_tolerance = 0, relative_tolerance = 0;

    /// What chunks that met their old states found, kept as bits: of numbers >= 0 the larger has the larger ones.
    struct Mismatch {
        unsigned long long residual = 0, relative_residual = 0;  ///< of a double; relative: to what is allowed
    };
    Mismatch* mismatches = nullptr;          ///< [batch], in and out, the largest of each sequence
    unsigned long long* repeated = nullptr;  ///< in and out: the most steps that a chunk repeated
};

/// A recurrence x_t = f_t(x_{t-1}), t = 1..T, over `batch` independent sequences of width numbers.
/// All callbacks are const and deterministic, and are called once per pass for a whole section, not per step.
/// On a GPU (section.execution.backend is cuda; see runs_on) all arrays lie in its memory, and a callback enqueues its
/// work in section.execution.stream, without waiting for it; it may be called more often than is reported, since the
/// host learns late that the passes are done.
template <class T>
class Recurrence {
public:
    using value_type = T;

    /// `block`: size of the Jacobian's diagonal blocks: 1 diagonal, width dense (the default, -1), or a divisor of
    /// width. Throws InvalidArgument.
    explicit Recurrence(const Shape& shape, index block = -1);
    virtual ~Recurrence() = default;

    const Shape& shape() const { return shape_; }
    index block() const { return block_; }

    /// Whether the callbacks know what to do on this backend. Unless overridden: all but cuda.
    virtual bool runs_on(Backend backend) const { return backend != Backend::cuda; }

    /// Writes x_0 of the sequences of `section` to `state` [1, section.batch(), width]. Zeros unless overridden.
    virtual void initial(const Section& section, View<T> state) const;

    /// after = f(before) for every step of the section, independently. before, after: contiguous
    /// [section.steps(), section.batch(), width], not overlapping.
    virtual void step(const Section& section, View<const T> before, View<T> after) const = 0;

    /// As `step`, and the Jacobian of each step at `before`: contiguous, all entries must be written.
    virtual void linearise(const Section& section, View<const T> before, View<T> after, Jacobian<T> jacobian) const = 0;

    /// Only the diagonal of the Jacobian ([steps,batch,width], block 1), for quasi-Newton. Unless overridden it is
    /// taken from `linearise`, a few steps at a time.
    virtual void linearise_diagonal(const Section& section, View<const T> before, View<T> after,
                                    Jacobian<T> diagonal) const;

    /// Sequential evaluation: trajectory[i] = f(trajectory[i-1]) from `state` [1,batch,width] on. The same numbers,
    /// bit for bit, as repeated `step`. Unless overridden it calls `step` once per step; a fused kernel here is the
    /// baseline that every parallel method is measured against. trajectory: contiguous [steps,batch,width].
    virtual void run(const Section& section, View<const T> state, View<T> trajectory) const;

    /// Runs all chunks from their starts, for Method::overlap on a GPU: whether it knows how to. Unless overridden it
    /// does not. (On processors `run` serves.)
    virtual bool run_chunks(const Section& section, const Chunks<T>& chunks) const;

protected:
    Recurrence(const Recurrence&) = default;
    Recurrence& operator=(const Recurrence&) = default;

private:
    Shape shape_;
    index block_;
};

}  // namespace deeppcr
