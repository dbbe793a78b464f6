// Dense layers over their depth: Newton's method and overlap against the persistent kernel (Method::sequential) and
// against CUDA graphs of cuBLAS calls. Layers are x_t = tanh(W_t x_{t-1} + b_t) with Xavier's weights; for overlap the
// weights are half as large, so that a state is soon forgotten.
#include "library_chain.cuh"
#include "measuring.cuh"

namespace deeppcr::benchmark {
namespace {

constexpr const char *graph_name = "CUDA graph of cuBLAS calls", *persistent_name = "persistent kernel";
constexpr double limit = 1e-3;  // of relative differences

/// A network on the GPU and in main memory.
struct Network {
    Network(index layers, index batch, index width, index skip_over, double gain)
        : skip(skip_over),
          weights(uniform<float>({layers, width, width}, -gain * std::sqrt(3.0 / double(width)),
                                 gain * std::sqrt(3.0 / double(width)), 1)),
          biases(uniform<float>({layers, 1, width}, -1 / std::sqrt(double(width)), 1 / std::sqrt(double(width)), 2)),
          initial(uniform<float>({1, batch, width}, -1.7, 1.7, 3)),
          here_weights(weights.on(Device::host())),
          here_biases(biases.on(Device::host())),
          here_initial(initial.on(Device::host())),
          here(here_weights, here_biases, here_initial, {Activation::tanh, skip}),
          trajectory(Buffer<float>::uninitialised(here.shape(), Layout::steps_first, there)) {}

    DenseChain<float> on_gpu() const { return {weights, biases, initial, {Activation::tanh, skip}}; }
    /// Of the processor.
    Buffer<float> expected() const { return evaluate(here, {.method = Method::sequential}).trajectory.on(there); }
    double flops() const { return 2 * double(weights.size()) * double(initial.shape().batch); }
    double weight_bytes() const { return 4 * double(weights.size() + biases.size() + trajectory.size()); }

    index skip;
    Buffer<float> weights, biases, initial, here_weights, here_biases, here_initial;
    DenseChain<float> here;
    Buffer<float> trajectory;
};

/// A chain on the GPU, evaluated by one of the library's methods.
struct Evaluated {
    Evaluated(const Network& of, Method by) : network(of), method(by), chain(of.on_gpu()) {}

    Options options() {
        return {.method = method, .estimates = Estimates::none, .execution = on_the_gpu, .workspace = &workspace};
    }
    Report run() { return evaluate(chain, network.trajectory.view(), options()); }
    Timed timed() {
        return benchmark::on_gpu([this] { run(); });
    }
    void verify_trajectory(Row& row, const Buffer<float>& expected) {
        const Report report = run();
        if (!report.ok()) throw Error("it ended as " + to_string(report.status));
        row.details["did"] = report.method;
        row.details["iterations"] = report.iterations;
        verify(row, "difference from the processor's", difference(network.trajectory, expected), limit);
    }
    DenseChainGradients<float> backward(const Buffer<float>& output_gradient) {
        const Report report = run();
        return adjoint<float>(chain, network.trajectory, report, output_gradient, options());
    }
    /// Of the backward pass alone, as its Report has them.
    Timed timed_backward(const Buffer<float>& output_gradient) {
        report_ = run();
        return [this, &output_gradient] {
            return adjoint<float>(chain, network.trajectory, report_, output_gradient, options()).report.seconds;
        };
    }

    const Network& network;
    Method method;
    DenseChain<float> chain;
    Workspace workspace{there};

private:
    Report report_;
};

Buffer<float> copy_of(View<const float> view) {
    Buffer<float> result = Buffer<float>::uninitialised(view.shape(), Layout::steps_first, there);
    detail::copy(result.data(), view.data(), result.size() * 4);
    return result;
}

/// The graph of a network's forward pass: with products of matrices, or with those of vectors where these are faster.
struct ForwardGraph {
    ForwardGraph(Row& row, const Network& network, bool tiny)
        : by_matrices(network.weights, network.biases, network.initial, network.skip, false),
          by_vectors(network.weights, network.biases, network.initial, network.skip, true),
          matrices([this](cudaStream_t stream) { by_matrices.forward(stream); }),
          vectors([this](cudaStream_t stream) { by_vectors.forward(stream); }) {
        const std::vector<Timing> timings =
            take_turns({on_gpu([&] { matrices.launch(); }), on_gpu([&] { vectors.launch(); })}, tiny);
        faster = timings[1].median < timings[0].median ? &vectors : &matrices;
        row.details["the graph calls"] = faster == &vectors ? "gemv" : "gemm";
        const Buffer<float> expected = network.expected();
        for (const LibraryChain* chain : {&by_matrices, &by_vectors})
            verify(row, "difference of the graph", difference(copy_of(chain->trajectory()), expected), limit);
    }
    Timed timed() {
        return on_gpu([this] { faster->launch(); });
    }

    LibraryChain by_matrices, by_vectors;
    Graph matrices, vectors, *faster = nullptr;
};

std::string shape_of(index layers, index batch, index width) {
    return "L = " + text(layers) + ", B = " + text(batch) + ", D = " + text(width);
}
void note_time_of_a_layer(Row& row, index layers) {
    row.value = rounded(row.ours->median * 1e6 / double(layers)) + " µs per layer";
}

/// The two sequential baselines by themselves.
void measure_baselines(Results& results, index layers, index batch, index width) {
    const std::string shape = shape_of(layers, batch, width);
    results.add({.what = "MLP forward, persistent kernel", .shape = shape, .type = "float"}, [&](Row& row) {
        const Network network(layers, batch, width, 0, 1);
        Evaluated persistent(network, Method::sequential);
        persistent.verify_trajectory(row, network.expected());
        row.bytes = network.weight_bytes();
        row.flops = network.flops();
        row.ours = take_turns({persistent.timed()}, results.tiny())[0];
        note_time_of_a_layer(row, layers);
    });
    results.add({.what = "MLP forward, CUDA graph of cuBLAS calls", .shape = shape, .type = "float"}, [&](Row& row) {
        const Network network(layers, batch, width, 0, 1);
        ForwardGraph graph(row, network, results.tiny());
        row.bytes = network.weight_bytes();
        row.flops = network.flops();
        row.ours = take_turns({graph.timed()}, results.tiny())[0];
        note_time_of_a_layer(row, layers);
    });
}

void measure_forward(Results& results, index layers, index width) {
    const std::string shape = shape_of(layers, 1, width);
    const std::string target = "mlp-" + std::to_string(std::max<index>(32, width));
    Row row{.target = target + "-graph", .what = "MLP forward by Newton", .shape = shape, .type = "float"};
    results.add(row, [&](Row& against_graph) {
        const Network network(layers, 1, width, 0, 1);
        Evaluated newton(network, Method::newton);
        newton.verify_trajectory(against_graph, network.expected());
        ForwardGraph graph(against_graph, network, results.tiny());
        against_graph.bytes = network.weight_bytes();
        against_graph.flops = network.flops();
        race(against_graph, newton.timed(), graph_name, graph.timed(), results.tiny());
    });
    const auto against_persistent = [&](Row begun, Method method, double gain) {
        results.add(std::move(begun), [&](Row& filled) {
            const Network network(layers, 1, width, 0, gain);
            Evaluated ours(network, method), persistent(network, Method::sequential);
            const Buffer<float> expected = network.expected();
            persistent.verify_trajectory(filled, expected);
            ours.verify_trajectory(filled, expected);
            filled.bytes = network.weight_bytes();
            filled.flops = network.flops();
            race(filled, ours.timed(), persistent_name, persistent.timed(), results.tiny());
        });
    };
    row.target = target + "-persistent";
    against_persistent(row, Method::newton, 1);
    row.target = "mlp-overlap";
    row.what = "MLP forward by overlap";
    against_persistent(row, Method::overlap, 0.5);
}

/// Zero but for the last step.
Buffer<float> gradient_of_the_last(const Shape& shape) {
    Buffer<float> gradient(shape, Layout::steps_first, there);
    const Buffer<float> last = uniform<float>({1, shape.batch, shape.width}, -1, 1, 6);
    detail::copy(gradient.view().at(shape.steps - 1, 0), last.data(), last.size() * 4);
    return gradient;
}
Buffer<float> last_of(const Buffer<float>& gradient) {
    return copy_of(gradient.view().steps(gradient.shape().steps - 1, gradient.shape().steps));
}

/// How much more the backward pass gains over a baseline than the forward pass does over the same.
void measure_backward(Results& results, index layers, index width, bool against_graph) {
    const std::string baseline = against_graph ? graph_name : persistent_name;
    results.add({.target = "mlp-backward",
                 .what = "MLP backward",
                 .shape = shape_of(layers, 1, width),
                 .type = "float",
                 .baseline_name = "the forward's ratio to the " + baseline},
                [&](Row& row) {
                    const Network network(layers, 1, width, 0, 1);
                    Evaluated newton(network, Method::newton), persistent(network, Method::sequential);
                    newton.verify_trajectory(row, network.expected());
                    const Buffer<float> gradient = gradient_of_the_last(network.here.shape());
                    const DenseChainGradients<float> expected = persistent.backward(gradient);
                    verify(row, "difference of the weights' gradients",
                           difference(newton.backward(gradient).weights, expected.weights), limit);
                    std::vector<Timing> forward, backward;
                    if (against_graph) {
                        LibraryChain chain(network.weights, network.biases, network.initial, 0, true);
                        chain.prepare_backward(last_of(gradient));
                        Graph forward_graph([&](cudaStream_t stream) { chain.forward(stream); }),
                            backward_graph([&](cudaStream_t stream) { chain.backward(stream); });
                        forward_graph.launch();
                        backward_graph.launch();
                        verify(row, "difference of the graph's gradients",
                               difference(chain.weight_gradients(), expected.weights), limit);
                        forward = take_turns({newton.timed(), on_gpu([&] { forward_graph.launch(); })}, results.tiny());
                        backward =
                            take_turns({newton.timed_backward(gradient), on_gpu([&] { backward_graph.launch(); })},
                                       results.tiny());
                    } else {
                        forward = take_turns({newton.timed(), persistent.timed()}, results.tiny());
                        backward = take_turns({newton.timed_backward(gradient), persistent.timed_backward(gradient)},
                                              results.tiny());
                    }
                    row.ours = backward[0];
                    row.details["forward_ratio"] = forward[1].median / forward[0].median;
                    row.details["backward_ratio"] = backward[1].median / backward[0].median;
                    row.ratio = backward[1].median / backward[0].median * forward[0].median / forward[1].median;
                    // Weights read and their gradients written; states, adjoints and slopes beside them.
                    row.bytes = 2 * network.weight_bytes();
                    row.flops = 2 * network.flops();
                });
}

/// The library's training step: the weights have changed since the last one, so that the chain is made anew.
struct TrainingStep {
    TrainingStep(const Network& of, const Buffer<float>& gradient_of_output, float rate)
        : network(of),
          gradient(gradient_of_output),
          learning_rate(rate),
          weights(of.weights.clone()),
          biases(of.biases.clone()) {}

    void run() {
        const DenseChain<float> chain(weights, biases, network.initial, {Activation::tanh, network.skip});
        const Options options{
            .method = Method::newton, .estimates = Estimates::none, .execution = on_the_gpu, .workspace = &workspace};
        const Report report = evaluate(chain, network.trajectory.view(), options);
        gradients = adjoint<float>(chain, network.trajectory, report, gradient, options);
        did = report.method;
        iterations = report.iterations;
        for (const auto& [of, parameters] :
             {std::pair(&gradients.weights, &weights), std::pair(&gradients.biases, &biases)})
            cuda::launch(threads_for(parameters->size()), descend_kernel, static_cast<const float*>(of->data()),
                         learning_rate, parameters->data(), parameters->size());
    }

    const Network& network;
    const Buffer<float>& gradient;
    float learning_rate;
    Buffer<float> weights, biases;
    DenseChainGradients<float> gradients;
    Workspace workspace{there};
    std::string did;
    index iterations = 0;
};

/// x_t = x_{t-1} + tanh(W_t x_{t-1} + b_t): forward, backward and a step of gradient descent.
void measure_training(Results& results, index layers, index batch, index width) {
    constexpr float learning_rate = 1e-12F;  // the problem stays the same, whichever step is compared with which
    const double gain = 1 / std::sqrt(double(layers));
    const auto graph_of = [&](LibraryChain& chain) {
        return std::make_shared<Graph>([&](cudaStream_t stream) {
            chain.forward(stream);
            chain.backward(stream);
            chain.descend(stream, learning_rate);
        });
    };
    const std::string what = "training step of a residual network, ", shape = shape_of(layers, batch, width);
    results.add({.what = what + graph_name, .shape = shape, .type = "float"}, [&](Row& row) {
        const Network network(layers, batch, width, 1, gain);
        LibraryChain chain(network.weights, network.biases, network.initial, 1, false);
        const Buffer<float> gradient = gradient_of_the_last(network.here.shape());
        chain.prepare_backward(last_of(gradient));
        const auto graph = graph_of(chain);
        graph->launch();
        const Evaluation<float> here = evaluate(network.here, {.method = Method::sequential});
        verify(row, "difference of the states", difference(copy_of(chain.trajectory()), here.trajectory.on(there)),
               limit);
        const DenseChainGradients<float> expected = adjoint<float>(
            network.here, here.trajectory, here.report, gradient.on(Device::host()), {.method = Method::sequential});
        verify(row, "difference of the weights' gradients",
               difference(chain.weight_gradients(), expected.weights.on(there)), limit);
        verify(row, "difference of the biases' gradients",
               difference(chain.bias_gradients(), expected.biases.on(there)), limit);
        row.flops = 3 * network.flops();
        row.ours = take_turns({on_gpu([&] { graph->launch(); })}, results.tiny())[0];
    });
    results.add({.target = "resnet", .what = what + "Newton", .shape = shape, .type = "float"}, [&](Row& row) {
        const Network network(layers, batch, width, 1, gain);
        const Buffer<float> gradient = gradient_of_the_last(network.here.shape());
        TrainingStep ours(network, gradient, learning_rate);
        LibraryChain chain(network.weights, network.biases, network.initial, 1, false);
        chain.prepare_backward(last_of(gradient));
        const auto graph = graph_of(chain);
        ours.run();
        graph->launch();
        row.details["did"] = ours.did;
        row.details["iterations"] = ours.iterations;
        verify(row, "difference of the weights' gradients",
               difference(ours.gradients.weights, chain.weight_gradients()), limit);
        row.flops = 3 * network.flops();
        race(row, on_gpu([&] { ours.run(); }), graph_name, on_gpu([&] { graph->launch(); }), results.tiny());
    });
}

}  // namespace

void measure_chains(Results& results) {
    const index layers = results.tiny() ? 24 : index(1) << 14;
    const std::vector<index> widths = results.tiny() ? std::vector<index>{5} : std::vector<index>{16, 32, 64, 128};
    for (const index width : widths) {
        measure_baselines(results, layers, 1, width);
        measure_forward(results, layers, width);
        for (const bool against_graph : {true, false}) measure_backward(results, layers, width, against_graph);
    }
    if (results.tiny())
        measure_training(results, 12, 3, 4);
    else
        measure_training(results, 1024, 64, 16);
}

}  // namespace deeppcr::benchmark
