// evaluate: a recurrence's whole trajectory by Newton's method. adjoint: its gradient, by one transposed solve.
#pragma once

#include <functional>
#include <iosfwd>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include <deeppcr/bidiagonal.hpp>
#include <deeppcr/cell.hpp>
#include <deeppcr/dense_cells.hpp>
#include <deeppcr/dense_chain.hpp>
#include <deeppcr/recurrence.hpp>

namespace deeppcr {

enum class Method {
    /// The fastest, by measured costs and by what earlier calls have shown, so that two calls may differ within the
    /// tolerance: for a cell sequential, overlap or shooting, else newton, sequential or overlap. The first call of a
    /// kind (type of the recurrence, device, threads, magnitudes of the sizes) times the callbacks on a few steps. It
    /// is `newton` where another of the options is for Newton's method alone (see Options), and `sequential` for fewer
    /// than 8 steps.
    automatic,
    newton,      ///< all steps of a window at once: linearise, solve the bidiagonal system, repeat
    sequential,  ///< Recurrence::run, step after step
    /// Chunks side by side from guessed states; each is repaired from the end of the one before it until it meets its
    /// old states, within the tolerance. No Jacobian: for contractive recurrences. On a GPU of cells, DenseChain and
    /// DenseCell, and of recurrences with `run_chunks`.
    overlap,
    /// Cells only. Multiple shooting: Newton's method for the states between chunks, each chunk carrying the product of
    /// its Jacobians; then as overlap.
    shooting,
};
std::string to_string(Method method);

/// What stands for the Jacobian in Newton's method. Fewer operations per pass against more passes.
enum class Surrogate {
    full,      ///< Newton: converges quadratically
    diagonal,  ///< quasi-Newton: the Jacobian's diagonal
    identity,  ///< Picard iteration
    zero,      ///< Jacobi iteration: x_t <- f(x_{t-1})
};

/// Where Newton's method starts.
enum class Guess {
    initial_state,  ///< x_0, repeated
    first_step,     ///< f_t(x_0), each step from the initial state
    given,          ///< what the trajectory argument holds on entry
};

/// What to do where Newton's method does not converge.
enum class OnFailure {
    finish,  ///< go on sequentially from the confirmed prefix: the result is right
    report,  ///< stop, and say so in the Report
    raise,   ///< throw NotConverged
};

enum class Status {
    converged,              ///< every step passed the residual test
    finished_sequentially,  ///< right: the confirmed prefix by Newton, the rest step after step
    max_iterations,         ///< not converged; only the first `confirmed` steps are right
    non_finite,             ///< f is not finite from step `confirmed` + 1 on, sequentially too
};
std::string to_string(Status status);

/// How much is spent on the Report's error and Lyapunov estimates.
enum class Estimates {
    none,
    quick,  ///< the Lyapunov exponent from some steps; the error where Newton's method has the Jacobians at hand
    full,   ///< both along the whole trajectory, for every method: about two sequential evaluations more; not on a GPU
};

/// A surrogate, reduction, chunk, guess `given`, window, max_iterations, on_failure other than `finish`, positive
/// damping, anderson and Estimates::full ask for Newton's method: with any of them `automatic` is `newton` where the
/// recurrence is not a cell's.
struct Options {
    Method method = Method::automatic;
    Surrogate surrogate = Surrogate::full;
    Reduction reduction = Reduction::automatic;
    index chunk = 0;  ///< steps per chunk of the scan (see SolveOptions), overlap or shooting; 0: chosen
    /// Of the scan, on a GPU (see SolveOptions). tf32 makes updates inexact, which costs passes, not accuracy: the
    /// residual decides. `adjoint`, which has no residual, is as exact as its products.
    TensorCores tensor_cores = TensorCores::none;
    Guess guess = Guess::initial_state;
    /// A step is confirmed where max|x_t - f(x_{t-1})| <= absolute + relative * max|x_t| and every step before it is.
    /// Negative: `tolerance`. tolerance 0: 64 machine epsilons; where numbers are stored in 16 bits, half of one.
    double tolerance = 0;
    double absolute_tolerance = -1;
    double relative_tolerance = -1;
    index window = 0;          ///< steps solved at once, sliding; 0: as many as `memory_limit` allows
    index max_iterations = 0;  ///< passes per evaluation; 0: no limit but progress (see docs/method.md)
    OnFailure on_failure = OnFailure::finish;
    index memory_limit = 0;  ///< bytes of workspace; 0: half of what the machine has available
    /// Levenberg-Marquardt's damping of Newton's method: each pass minimises |r|^2 + damping |d|^2 (see docs/method.md)
    /// and changes the damping as the residual asks. Positive: from the first pass on, with this value; 0: never;
    /// negative: where plain passes make no progress (the ladder).
    double damping = -1;
    index anderson = 0;  ///< passes whose updates are combined by Anderson acceleration, at most 16; 0: none
    Estimates estimates = Estimates::quick;
    Execution execution = {};
    Workspace* workspace = nullptr;  ///< memory to reuse between calls; null: allocated and freed by the call
    /// Called with (confirmed steps of the slowest sequence, all steps, passes) after each pass of Newton's method and,
    /// on the processor of one process, from time to time while a recurrence that is not a cell is evaluated step after
    /// step; false stops the evaluation with Status::max_iterations. What is stopped step after step holds its last
    /// state from there on.
    std::function<bool(index confirmed, index steps, index iterations)> progress = {};
    /// Processes that hold consecutive parts of the steps, in the order of their ranks (group.hpp); null: this one
    /// alone.
    Group* group = nullptr;
};

/// What an evaluation did, and how far to trust its result.
struct Report {
    struct Sequence {
        Status status = Status::converged;
        index iterations = 0;  ///< Newton passes until the last step was confirmed
        index confirmed = 0;   ///< leading steps that are right
        double residual = 0;   ///< max over confirmed t of max|x_t - f(x_{t-1})|; 0 where evaluated sequentially
        double relative_residual = 0;  ///< the same, as a fraction of the tolerance: <= 1 where converged
        /// First-order estimate of max|x_t - exact| over the confirmed t, from the residuals and the rounding of f,
        /// each carried along by the Jacobians. Infinite where they overflow. NaN where not computed (see Estimates).
        double error = 0;
    };
    /// A method that `automatic` weighed.
    struct Candidate {
        Method method;
        double seconds;  ///< expected of this call
        bool measured;   ///< from earlier calls of about this size; else predicted from the costs of a step
    };
    struct Stage {
        double seconds = 0;
        index bytes = 0;  ///< read and written by the algorithm, counted, not measured
    };

    Status status = Status::converged;  ///< the worst of the sequences
    /// "newton, full Jacobian, scan", or "newton, full Jacobian, scan, then sequential", or "sequential"
    std::string method;
    /// Why `automatic` chose it: what it expected of each method, the chosen one first; a method not measured twice was
    /// preferred as if it took three quarters of what is predicted. Empty where another method was
    /// asked for, and where there was nothing to weigh: options for Newton's method (see Options), fewer than 8 steps,
    /// or of cells fewer than 128 steps or channels that fill all lanes (sequential).
    std::vector<Candidate> candidates;
    std::vector<Sequence> sequences;
    index iterations = 0;  ///< Newton passes, all windows
    /// Of each of them, the largest residual of its window's steps that were not confirmed yet, as a fraction of the
    /// tolerance; 0 where none was left. Empty for what has no passes, and for EnqueuedEvaluation.
    std::vector<double> residuals;
    double residual = 0, relative_residual = 0, error = 0;  ///< maxima over the sequences
    /// Largest Lyapunov exponent per step, estimated from the Jacobians along the trajectory (Estimates::quick: of a
    /// few sequences, up to 4,096 steps); negative: contractive, Newton converges fast; positive: chaotic, or where f
    /// is linear unstable. NaN where not computed.
    double lyapunov = 0;
    Stage linearise, reduce, update, sequential, estimate;
    double seconds = 0;
    index workspace_bytes = 0;    ///< peak memory beyond the trajectory itself
    index window = 0;             ///< steps solved at once, at the start
    index window_shrinks = 0;     ///< times the ladder shortened the window
    index damped_passes = 0;      ///< passes with damping
    index non_finite_resets = 0;  ///< states beyond the confirmed prefix that were reset
    index sequential_steps = 0;   ///< steps finished sequentially, the sum over the sequences

    /// Whether the trajectory is right: converged or finished sequentially.
    bool ok() const { return status == Status::converged || status == Status::finished_sequentially; }
};
std::ostream& operator<<(std::ostream& out, const Report& report);

template <class T>
struct Evaluation {
    Buffer<T> trajectory;  ///< x_1..x_T, [steps,batch,width]
    Report report;
};

/// Evaluates `recurrence`: the trajectory satisfies the residual test of `options`, or the Report says which part of
/// it does (and under OnFailure::raise, NotConverged is thrown). Refuses, before it allocates, a problem whose window
/// of Jacobians does not fit `memory_limit`.
/// trajectory: [steps,batch,width], any strides, out, and in where options.guess is `given`.
/// With execution.backend cuda the recurrence must run there (Recurrence::runs_on), and trajectory, workspace and what
/// the recurrence reads lie on the current GPU. The passes are enqueued in execution.stream and the outcome of
/// their tests read while they solve; when the call returns all is done, so that the stream must not
/// be captured (InvalidArgument; see EnqueuedEvaluation). options.anderson and a positive options.damping are not there
/// yet (InvalidArgument), nor are damped passes in the ladder. Of the Report, stages have bytes but no seconds,
/// `lyapunov` is that of up to 256 steps of the first sequence, and Estimates::full is as quick.
/// After k passes at least the first k steps of a window are exact; confirmed steps are never changed again.
/// Deterministic: the same inputs, options, SIMD target and thread count give the same bits; window 1 gives those of
/// Method::sequential. Not so where the method is `automatic` and leaves a choice, of any recurrence, nor for cells
/// where it is overlap or shooting with chunk 0: these choose by measured costs and by what earlier calls have shown,
/// and may choose differently between calls, within the tolerance. Throws InvalidArgument, OutOfMemory, NotConverged,
/// and what the recurrence's callbacks throw. Source: arXiv 2309.16318, eqs. 2-5.
/// With options.group all its ranks call together, with the same options. Each has a recurrence of its own part of the
/// steps, at least one (Group::part), whose sections count from there, and that part of the trajectory; `initial`
/// counts on the first rank. A pass sends the state at a part's end on, solves across the ranks (see `solve`), and
/// agrees on what is confirmed; the same promises hold, and the Report's status, passes, sequences, residuals and error
/// are the same everywhere. Method::sequential runs rank after rank; overlap and shooting evaluate every part from a
/// guessed state and again from the one that the part before has handed over, until these agree within the tolerance;
/// automatic is newton, and overlap for cells. For a number of ranks the bits are the same as above, those of
/// Method::sequential for every number. Newton's method takes its part in one window, and goes on sequentially where it
/// makes no progress; window, positive damping and anderson are refused (InvalidArgument), with Backend::cuda Newton's
/// method of cells too; Estimates::full is as quick. What one rank throws is thrown on all (Group::agree).
template <class T>
Report evaluate(const Recurrence<T>& recurrence, View<std::type_identity_t<T>> trajectory, const Options& options = {});

/// The same, into a buffer of its own: in main memory, or on the current GPU for Backend::cuda.
template <class T>
Evaluation<T> evaluate(const Recurrence<T>& recurrence, const Options& options = {}) {
    Evaluation<T> result{Buffer<T>(recurrence.shape(), Layout::steps_first, detail::device_of(options.execution)), {}};
    result.report = evaluate(recurrence, result.trajectory.view(), options);
    return result;
}

/// Newton's method on a GPU, which `automatic` is here, without a wait: options.max_iterations passes over all steps at
/// once and the error estimate, enqueued in options.execution.stream, so that they can be captured into a CUDA graph
/// and replayed; the Report is computed where it is asked for.
///     EnqueuedEvaluation<float> evaluation(recurrence, trajectory, options);
///     evaluation.enqueue();                        // as often as wanted
///     const Report report = evaluation.finish();  // waits for the last one
/// Passes after the one that confirms the last step change nothing. The same bits as `evaluate` with as many passes.
template <class T>
class EnqueuedEvaluation {
public:
    /// Takes all memory and evaluates once, so that later calls allocate nothing and find their kernels loaded; with
    /// Guess::given that changes the trajectory. recurrence, trajectory and options.workspace must outlive this object.
    /// Throws InvalidArgument, where not said: options.method neither automatic nor newton, options.max_iterations 0, a
    /// window shorter than all steps, `progress`;
    /// OutOfMemory, NoDevice.
    EnqueuedEvaluation(const Recurrence<T>& recurrence, View<std::type_identity_t<T>> trajectory,
                       const Options& options);
    ~EnqueuedEvaluation();
    EnqueuedEvaluation(const EnqueuedEvaluation&) = delete;
    EnqueuedEvaluation& operator=(const EnqueuedEvaluation&) = delete;

    /// Calls the recurrence's callbacks; nothing waits, and nothing is allocated.
    void enqueue();
    /// Waits for the stream. Of what was enqueued, or replayed, last; under OnFailure::finish it goes on step after
    /// step where that did not converge. Throws NotConverged under OnFailure::raise.
    Report finish();

private:
    struct Implementation;
    std::unique_ptr<Implementation> implementation_;
};

template <class T>
struct Adjoint {
    Buffer<T> states;   ///< dL/dx_t, t = 1..T, [steps,batch,width]
    Buffer<T> initial;  ///< dL/dx_0, [1,batch,width]
    Report report;      ///< stages and bytes; exact, so no residual
};

/// Gradient of a loss L with respect to every state, given output_gradient = the part of dL/dx_t that does not pass
/// through later states ([steps,batch,width], in): one transposed solve with the Jacobians at the final states,
/// window after window from the end, exact. Of `options`, reduction, chunk, tensor_cores, window, memory_limit,
/// execution and workspace count. Refuses (InvalidArgument) a trajectory whose `report` is not ok(). Deterministic as
/// `evaluate`. With execution.backend cuda all arrays lie on the current GPU, the result's too.
/// With options.group each rank passes its part, as to `evaluate`, and gets its part of the gradients: `initial` is
/// that of the state before the part, so dL/dx_0 on the first rank, and the overloads below sum the gradients of
/// parameters that all steps share over the ranks, in a fixed order.
template <class T>
Adjoint<T> adjoint(const Recurrence<T>& recurrence, View<const std::type_identity_t<T>> trajectory,
                   const Report& report, View<const std::type_identity_t<T>> output_gradient,
                   const Options& options = {});

template <class T>
struct DenseChainGradients {
    Buffer<T> weights;  ///< dL/dW, [layers, out, in]
    Buffer<T> biases;   ///< dL/db, [layers, 1, width]
    Buffer<T> initial;  ///< dL/dx_0, [1,batch,width]
    Report report;
};

/// The same for a chain, with the gradients of its parameters. options.method sequential takes the fused backward
/// pass instead of the transposed solve; automatic the one that has taken less in earlier calls (the fused pass twice,
/// then the solve where it may be faster), unless reduction, chunk or window ask for the solve. slopes: what
/// DenseChain::run_with_slopes wrote, or empty.
template <class T>
DenseChainGradients<T> adjoint(const DenseChain<T>& chain, View<const std::type_identity_t<T>> trajectory,
                               const Report& report, View<const std::type_identity_t<T>> output_gradient,
                               const Options& options = {}, View<const std::type_identity_t<T>> slopes = {});

template <class T>
struct DenseCellGradients {
    Buffer<T> inputs;   ///< dL/du, of the gates' inputs, [steps, batch, gates * hidden]
    Buffer<T> weights;  ///< dL/dW_hh, [gates,hidden,hidden]
    Buffer<T> biases;   ///< dL/db_hh, [gates,1,hidden]
    Buffer<T> initial;  ///< dL/dx_0, [1,batch,width]
    Report report;
};

/// The same for a recurrent cell, with the gradients of its inputs and parameters. options.method as for a chain.
template <class T>
DenseCellGradients<T> adjoint(const DenseCell<T>& cell, View<const std::type_identity_t<T>> trajectory,
                              const Report& report, View<const std::type_identity_t<T>> output_gradient,
                              const Options& options = {});

template <class T>
struct CellGradients {
    Buffer<T> inputs;                  ///< dL/du, [steps, batch, G*C]
    Buffer<Arithmetic<T>> parameters;  ///< dL/dp, [P, 1, C]
    Buffer<T> initial;                 ///< dL/dx_0, [1, parts, C*K]
    Report report;
};

/// The same in memory of the caller's: for calls that allocate nothing.
template <class T>
struct CellGradientViews {
    View<T> inputs;                  ///< any strides
    View<Arithmetic<T>> parameters;  ///< contiguous
    View<T> initial;                 ///< any strides
};

/// Gradients of a loss L from output_gradient = the part of dL/dx_t that does not pass through later states: one fused
/// pass from the last step to the first. With Method::sequential step after step; otherwise in chunks side by side,
/// whose missing adjoints from later chunks are added afterwards (the adjoint is linear), exact to rounding (in 16
/// bits: that of what is stored before the addition). The sums of the parameters' gradients run in a fixed order, in
/// double over blocks of steps: the same inputs, options, SIMD target and thread count give the same bits, but where
/// the chunk is chosen (chunk 0) by measured costs and, on a GPU, by what earlier calls have shown. Refuses
/// (InvalidArgument) a trajectory whose `report` is not ok(). The Jacobians are those at the states of `trajectory`, as
/// they are stored.
template <class T>
CellGradients<T> adjoint(const ChannelwiseRecurrence<T>& recurrence, View<const std::type_identity_t<T>> trajectory,
                         const Report& report, View<const std::type_identity_t<T>> output_gradient,
                         const Options& options = {});

/// The same, into `gradients`. With a workspace of `options` a GPU's later calls of the same sizes allocate nothing
/// there.
template <class T>
Report adjoint(const ChannelwiseRecurrence<T>& recurrence, View<const std::type_identity_t<T>> trajectory,
               const Report& report, View<const std::type_identity_t<T>> output_gradient,
               const CellGradientViews<std::type_identity_t<T>>& gradients, const Options& options = {});

/// Evaluates a cell segment after segment of `segment` steps and keeps only the states before each: memory for one
/// segment's states instead of all. boundaries: [ceil(steps / segment), batch, width], out; row s is x_{s * segment}.
/// visit, where given, sees each segment's states x_{first+1}.. [rows,batch,width] before they are overwritten.
/// Every segment is evaluated as by `evaluate` with `options` (guess `given` counts as initial_state); the Report is of
/// them all. Where a segment does not converge, those after it are not evaluated. Deterministic as `evaluate`. Throws
/// InvalidArgument, OutOfMemory, NotConverged.
template <class T>
Report evaluate_boundaries(const ChannelwiseRecurrence<T>& recurrence, index segment,
                           View<std::type_identity_t<T>> boundaries, const Options& options = {},
                           const std::function<void(index first, View<const T> states)>& visit = {});

/// `adjoint` of a cell from what evaluate_boundaries kept: computes each segment's states again, the last segment
/// first, so that the whole trajectory is never in memory. The same gradients to rounding; the parameters' are sums
/// over the segments, in double. Otherwise as `adjoint`.
template <class T>
CellGradients<T> adjoint_from_boundaries(const ChannelwiseRecurrence<T>& recurrence, index segment,
                                         View<const std::type_identity_t<T>> boundaries, const Report& report,
                                         View<const std::type_identity_t<T>> output_gradient,
                                         const Options& options = {});

}  // namespace deeppcr
