// Streams of the tests' own, and graphs of what is enqueued there.
#pragma once

#include <deeppcr/execution.hpp>
#include <deeppcr/launch.cuh>

namespace deeppcr {

/// One that does not wait for the null stream.
struct Stream {
    Stream() { cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream"); }
    ~Stream() { cudaStreamDestroy(stream); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    Execution execution() const { return {.backend = Backend::cuda, .stream = stream}; }
    void wait() const { cuda::check(cudaStreamSynchronize(stream), "running"); }

    cudaStream_t stream = nullptr;
};

/// The graph that what `call` enqueues in a stream is captured into.
class Captured {
public:
    template <class Call>
    explicit Captured(const Stream& stream, const Call& call) : stream_(stream) {
        cudaGraph_t graph = nullptr;
        cuda::check(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeGlobal), "capturing");
        try {
            call();
        } catch (...) {
            cudaStreamEndCapture(stream.stream, &graph);
            cudaGraphDestroy(graph);
            throw;
        }
        cuda::check(cudaStreamEndCapture(stream.stream, &graph), "capturing");
        cuda::check(cudaGraphInstantiate(&executable_, graph, 0), "making a graph");
        cuda::check(cudaGraphDestroy(graph), "ending a graph");
    }
    ~Captured() { cudaGraphExecDestroy(executable_); }
    Captured(const Captured&) = delete;
    Captured& operator=(const Captured&) = delete;
    void launch() const { cuda::check(cudaGraphLaunch(executable_, stream_.stream), "launching a graph"); }

private:
    const Stream& stream_;
    cudaGraphExec_t executable_ = nullptr;
};

}  // namespace deeppcr
