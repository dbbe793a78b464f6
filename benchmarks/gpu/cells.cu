// ParaGRU by every method: against the copy of its inputs and outputs, against its own fused sequential kernel, and
// what `automatic` makes of it. Weights and inputs leave it contractive, as the layers of a trained network mostly are.
#include <deeppcr/cells.hpp>

#include "measuring.cuh"

namespace deeppcr::benchmark {
namespace {

constexpr double tolerance = 1e-5, tolerance_in_16_bits = 4e-3;

template <class T>
struct Problem {
    explicit Problem(const Shape& shape)
        : inputs(uniform<T>({shape.steps, shape.batch, shape.width * 3}, -1.7, 1.7, 3)),
          parameters(uniform<Arithmetic<T>>({3, 1, shape.width}, -0.8, 0.8, 4)),
          trajectory(Buffer<T>::uninitialised(shape, Layout::steps_first, there)),
          recurrence(inputs, parameters) {}

    /// sweeps: of Newton's method at most, by shooting; 0: as many as it takes. chunk: its steps; 0: chosen.
    Options options(Method method, index sweeps = 0, index chunk = 0) {
        return {.method = method,
                .chunk = chunk,
                .tolerance = is_stored_in_16_bits<T> ? tolerance_in_16_bits : tolerance,
                .max_iterations = sweeps,
                .estimates = Estimates::none,
                .execution = on_the_gpu,
                .workspace = &workspace};
    }
    Report run(Method method, index sweeps = 0, index chunk = 0) {
        return evaluate(recurrence, trajectory.view(), options(method, sweeps, chunk));
    }
    /// Of a call that is waited for, from where the GPU has nothing to do.
    Timed timed(Method method) {
        return on_gpu([=, this] { run(method); });
    }
    /// Of one that is not, the host ahead.
    Timed timed_enqueued(Method method, index sweeps = 0, index chunk = 0) {
        return on_gpu([=, this] { enqueue(recurrence, trajectory.view(), status(), options(method, sweeps, chunk)); },
                      true);
    }
    /// What was timed so, once more, into zeros.
    void verify_enqueued(Row& row, Method method, const Buffer<T>& expected, index sweeps = 0, index chunk = 0) {
        detail::fill_zeros(trajectory.data(), trajectory.size() * index(sizeof(T)), there);
        enqueue(recurrence, trajectory.view(), status(), options(method, sweeps, chunk));
        verify(row, "enqueued, difference from sequential", difference(trajectory, expected),
               is_stored_in_16_bits<T> ? 0.05 : 1e-3);
        index told = -1;
        detail::copy(&told, status(), index(sizeof told));
        verify(row, "enqueued, status", double(told), double(Status::finished_sequentially));
    }
    index* status() { return static_cast<index*>(status_memory.get()); }
    double bytes() const { return double(inputs.size() + trajectory.size()) * double(sizeof(T)); }

    /// Runs it and compares it with the sequential trajectory, all of it; notes what it did.
    void verify_method(Row& row, Method method, const Buffer<T>& expected, index sweeps = 0, index chunk = 0) {
        Report report;
        for (int call = 0; call < 3; ++call) report = run(method, sweeps, chunk);  // learns how many chunks are best
        if (!report.ok()) throw Error("it ended as " + to_string(report.status));
        row.details["did"] = report.method;
        row.details["iterations"] = report.iterations;
        verify(row, "difference from sequential", difference(trajectory, expected),
               is_stored_in_16_bits<T> ? 0.05 : 1e-3);
    }
    /// The sequential trajectory; its beginning is compared with the processor's.
    Buffer<T> sequential(Row& row) {
        if (!run(Method::sequential).ok()) throw Error("the sequential trajectory is not finite");
        const auto [steps, batch, width] = trajectory.shape();
        const index some = std::min<index>(steps, std::max<index>(1, (index(1) << 18) / (batch * width)));
        Buffer<T> first_inputs({some, batch, width * 3}), first_states({some, batch, width});
        detail::copy(first_inputs.data(), inputs.data(), first_inputs.size() * index(sizeof(T)));
        detail::copy(first_states.data(), trajectory.data(), first_states.size() * index(sizeof(T)));
        const Buffer<Arithmetic<T>> p = parameters.on(Device::host());
        const auto widened = [](const Buffer<T>& numbers) {
            Buffer<float> result(numbers.shape());
            for (index i = 0; i < numbers.size(); ++i) result.data()[i] = float(numbers.data()[i]);
            return result;
        };
        const Buffer<float> u = widened(first_inputs), found = widened(first_states);
        const auto expected = evaluate(CellRecurrence<ParaGRU, float>(u, p), {.method = Method::sequential}).trajectory;
        verify(row, "difference from the processor's", difference(found.on(there), expected.on(there)),
               is_stored_in_16_bits<T> ? 0.05 : 1e-3);
        return trajectory.clone();
    }

    Buffer<T> inputs;
    Buffer<Arithmetic<T>> parameters;
    Buffer<T> trajectory;
    CellRecurrence<ParaGRU, T> recurrence;
    Workspace workspace{there};
    std::shared_ptr<void> status_memory = detail::allocate(index(sizeof(index)), there);
};

template <class T>
std::string with_type(const std::string& target) {
    return is_stored_in_16_bits<T> ? target + "-bf16" : target;
}

/// By shooting: one sweep of Newton's method for the starts of chunks, and the one that writes the states.
template <class T>
void measure_forward(Results& results, const Shape& shape, Method method, const std::string& target) {
    const index sweeps = method == Method::shooting ? 1 : 0;
    results.add({.target = with_type<T>(target),
                 .what = "ParaGRU forward, " + to_string(method) + (sweeps > 0 ? ", two sweeps" : ""),
                 .shape = text(shape),
                 .type = type_name<T>},
                [&](Row& row) {
                    Problem<T> problem(shape);
                    const Buffer<T> expected = problem.sequential(row);
                    problem.verify_method(row, method, expected, sweeps);
                    row.bytes = problem.bytes();
                    race(row, problem.timed_enqueued(method, sweeps), "copy of inputs + outputs",
                         Copy(row.bytes).timed(true), results.tiny());
                    problem.verify_enqueued(row, method, expected, sweeps);
                });
}

/// Gradients in memory of their own, so that a pass allocates nothing.
template <class T>
struct Backward {
    explicit Backward(const Shape& shape)
        : problem(shape),
          gradient(uniform<T>(shape, -1, 1, 5)),
          inputs(Buffer<T>::uninitialised(problem.inputs.shape(), Layout::steps_first, there)),
          parameters(Buffer<Arithmetic<T>>::uninitialised(problem.parameters.shape(), Layout::steps_first, there)),
          initial(Buffer<T>::uninitialised({1, shape.batch, shape.width}, Layout::steps_first, there)) {}

    CellGradientViews<T> gradients() { return {inputs.view(), parameters.view(), initial.view()}; }
    Report run(Method method, index chunk = 0) {
        const Report report = problem.run(Method::sequential);
        return adjoint<T>(problem.recurrence, problem.trajectory, report, gradient, gradients(),
                          problem.options(method, 0, chunk));
    }
    void run_enqueued(index chunk) {
        enqueue_adjoint(problem.recurrence, problem.trajectory.view(), problem.status(), gradient, gradients(),
                        problem.options(Method::automatic, 0, chunk));
    }
    Timed timed_enqueued(index chunk = 0) {
        enqueue(problem.recurrence, problem.trajectory.view(), problem.status(), problem.options(Method::sequential));
        return on_gpu([this, chunk] { run_enqueued(chunk); }, true);
    }
    double bytes() const { return problem.bytes() + double(inputs.size() + gradient.size()) * double(sizeof(T)); }

    /// Against the pass step after step; notes what it did.
    void verify_gradients(Row& row, index chunk = 0) {
        run(Method::sequential);
        expected_inputs = inputs.clone();
        expected_parameters = parameters.clone();
        for (int call = 0; call < 3; ++call) row.details["did"] = run(Method::automatic, chunk).method;
        compare(row, "difference");
    }
    /// What was timed, once more, into zeros.
    void verify_enqueued(Row& row, index chunk = 0) {
        detail::fill_zeros(inputs.data(), inputs.size() * index(sizeof(T)), there);
        detail::fill_zeros(parameters.data(), parameters.size() * index(sizeof(Arithmetic<T>)), there);
        run_enqueued(chunk);
        compare(row, "enqueued, difference");
    }
    void compare(Row& row, const std::string& what) {
        const double limit = is_stored_in_16_bits<T> ? 0.05 : 1e-3;
        verify(row, what + " of the inputs' gradients", difference(inputs, expected_inputs), limit);
        verify(row, what + " of the parameters' gradients", difference(parameters, expected_parameters), limit);
    }

    Problem<T> problem;
    Buffer<T> gradient, inputs, expected_inputs;
    Buffer<Arithmetic<T>> parameters, expected_parameters;
    Buffer<T> initial;
};

template <class T>
void measure_backward(Results& results, const Shape& shape) {
    results.add({.target = "gru-backward", .what = "ParaGRU backward", .shape = text(shape), .type = type_name<T>},
                [&](Row& row) {
                    Backward<T> backward(shape);
                    backward.verify_gradients(row);
                    row.bytes = backward.bytes();
                    race(row, backward.timed_enqueued(), "copy of its arrays", Copy(row.bytes).timed(true),
                         results.tiny());
                    backward.verify_enqueued(row);
                });
}

/// Whether the chunks that are chosen are the best ones: others beside them.
template <class T>
void measure_chunks(Results& results, const Shape& shape) {
    const auto other = [&](const std::string& what, index chunk) {
        return Row{.what = what + " in chunks of " + text(chunk), .shape = text(shape), .type = type_name<T>};
    };
    for (index chunk = shape.steps / 8; chunk < shape.steps; chunk *= 2) {
        results.add(other("ParaGRU forward, overlap", chunk), [&](Row& row) {
            Problem<T> problem(shape);
            const Buffer<T> expected = problem.sequential(row);
            problem.verify_method(row, Method::overlap, expected, 0, chunk);
            row.bytes = problem.bytes();
            race(row, problem.timed_enqueued(Method::overlap, 0, chunk), "copy of inputs + outputs",
                 Copy(row.bytes).timed(true), results.tiny());
            problem.verify_enqueued(row, Method::overlap, expected, 0, chunk);
        });
        results.add(other("ParaGRU backward", chunk), [&](Row& row) {
            Backward<T> backward(shape);
            backward.verify_gradients(row, chunk);
            row.bytes = backward.bytes();
            race(row, backward.timed_enqueued(chunk), "copy of its arrays", Copy(row.bytes).timed(true),
                 results.tiny());
            backward.verify_enqueued(row, chunk);
        });
    }
}

template <class T>
void measure_against_sequential(Results& results, index steps, index channels) {
    const Shape shape{steps, 1, channels};
    const std::string target = channels <= 256 ? "gru-256" : channels <= 1024 ? "gru-1024" : "";
    for (const bool enqueued : {true, false})
        results.add({.target = target,
                     .what = std::string("ParaGRU forward, automatic, ") + (enqueued ? "enqueued" : "a call alone"),
                     .shape = text(shape),
                     .type = type_name<T>},
                    [&](Row& row) {
                        Problem<T> problem(shape);
                        const Buffer<T> expected = problem.sequential(row);
                        problem.verify_method(row, Method::automatic, expected);
                        row.bytes = problem.bytes();
                        const auto timed = [&](Method method) {
                            return enqueued ? problem.timed_enqueued(method) : problem.timed(method);
                        };
                        race(row, timed(Method::automatic), "own fused sequential kernel", timed(Method::sequential),
                             results.tiny());
                        if (enqueued) problem.verify_enqueued(row, Method::automatic, expected);
                    });
}

template <class T>
void measure_cells_of(Results& results) {
    const index mi = index(1) << 20;
    const std::vector<Shape> large = results.tiny()
                                         ? std::vector<Shape>{{160, 2, 5}, {300, 1, 1}}
                                         : std::vector<Shape>{{4096, 32, 1024}, {16384, 8, 1024}, {mi, 1, 128}};
    for (const Shape& shape : large) {
        measure_forward<T>(results, shape, Method::overlap, "gru-overlap");
        measure_forward<T>(results, shape, Method::shooting, "gru-shooting");
        measure_backward<T>(results, shape);
    }
    measure_chunks<T>(results, large.front());
    const std::vector<std::pair<index, index>> narrow =
        results.tiny() ? std::vector<std::pair<index, index>>{{200, 3}}
                       : std::vector<std::pair<index, index>>{{16384, 1024}, {16384, 256}, {131072, 1024},
                                                              {131072, 256}, {mi, 32},     {4 * mi, 1}};
    for (const auto& [steps, channels] : narrow) measure_against_sequential<T>(results, steps, channels);
}

}  // namespace

void measure_cells(Results& results) {
    measure_cells_of<float>(results);
    measure_cells_of<bfloat16>(results);
}

void measure_map(Results& results) {
    const std::vector<Method> methods{Method::sequential, Method::overlap, Method::shooting, Method::automatic};
    const index longest = results.tiny() ? 256 : index(1) << 20, widest = results.tiny() ? 4 : 65536,
                most = results.tiny() ? 1024 : index(1) << 26;
    Json map = Json::array();
    double worst = 1;
    std::string where;
    results.add({.target = "automatic",
                 .what = "ParaGRU forward, automatic",
                 .type = "float",
                 .baseline_name = "the fastest method at each point"},
                [&](Row& row) {
                    index points = 0, below = 0;
                    for (index steps = 64; steps <= longest; steps *= 4)
                        for (index channels = 1; channels <= widest && steps * channels <= most; channels *= 4) {
                            Problem<float> problem({steps, 1, channels});
                            Row of_point;
                            const Buffer<float> expected = problem.sequential(of_point);
                            std::vector<Timed> bodies;
                            for (const Method method : methods) {
                                problem.verify_method(of_point, method, expected);
                                bodies.push_back(problem.timed(method));
                            }
                            const std::string did = of_point.details["did"].get<std::string>();
                            const std::vector<Timing> timings = take_turns(bodies, results.tiny());
                            const double sequential = timings[0].median, automatic = timings[3].median;
                            const double fastest = std::min({sequential, timings[1].median, timings[2].median});
                            map.push_back({{"steps", steps},
                                           {"channels", channels},
                                           {"sequential_ns_per_number", sequential * 1e9 / double(steps * channels)},
                                           {"overlap", sequential / timings[1].median},
                                           {"shooting", sequential / timings[2].median},
                                           {"automatic", sequential / automatic},
                                           {"of_the_fastest", fastest / automatic},
                                           {"did", did}});
                            results.note("map", map);
                            ++points;
                            if (fastest / automatic < 0.98) ++below;
                            if (fastest / automatic < worst || where.empty()) {
                                worst = fastest / automatic;
                                where = text({steps, 1, channels});
                            }
                        }
                    row.ratio = worst;
                    row.shape = "worst of " + text(points) + " points: " + where + "; " + text(below) + " below 0.98";
                });
}

}  // namespace deeppcr::benchmark
