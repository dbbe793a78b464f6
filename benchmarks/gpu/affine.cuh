// CUB's scan of affine pairs (a, b): what a row of a bidiagonal system is to a library that has only scans.
#pragma once

#include "measuring.cuh"

namespace deeppcr::benchmark {

struct Affine {
    float a, b;
};
struct Compose {
    __host__ __device__ Affine operator()(const Affine& first, const Affine& second) const {
        return {second.a * first.a, second.a * first.b + second.b};
    }
};

static __global__ void pair_kernel(const float* a, const float* b, Affine* pairs, index count) {
    for (index i = this_thread(); i < count; i += all_threads()) pairs[i] = {a[i], b[i]};
}
static __global__ void compare_pairs_kernel(const Affine* pairs, const float* x, index count, Extremes* extremes) {
    Largest apart, size;
    for (index i = this_thread(); i < count; i += all_threads()) {
        apart.see(fabs(double(pairs[i].b) - double(x[i])));
        size.see(fabs(double(x[i])));
    }
    apart.raise(&extremes->apart);
    size.raise(&extremes->size);
}

/// The inclusive scan of `count` pairs, random ones or those of a row x_t = a_t x_{t-1} + b_t.
class AffineScan {
public:
    explicit AffineScan(index count)
        : AffineScan(uniform<float>({count, 1, 1}, -0.9, 0.9, 1), uniform<float>({count, 1, 1}, -1, 1, 2)) {}
    AffineScan(const Buffer<float>& a, const Buffer<float>& b)
        : count_(a.size()),
          pairs_(detail::allocate(count_ * index(sizeof(Affine)), there)),
          sums_(detail::allocate(count_ * index(sizeof(Affine)), there)) {
        cuda::launch(threads_for(count_), pair_kernel, static_cast<const float*>(a.data()),
                     static_cast<const float*>(b.data()), static_cast<Affine*>(pairs_.get()), count_);
        inclusive_scan(nullptr, bytes_, pairs(), sums(), Compose(), count_);
        memory_ = detail::allocate(index(bytes_), there);
        run();
    }

    void run() const {
        std::size_t bytes = bytes_;
        inclusive_scan(memory_.get(), bytes, pairs(), sums(), Compose(), count_);
    }
    Timed timed() const {
        return on_gpu([copy = *this] { copy.run(); });
    }
    /// From the solution of the row, from x_0 = 0.
    double difference(const Buffer<float>& x) const {
        return relative_extreme(count_, compare_pairs_kernel, static_cast<const Affine*>(sums()),
                                static_cast<const float*>(x.data()));
    }

private:
    const Affine* pairs() const { return static_cast<const Affine*>(pairs_.get()); }
    Affine* sums() const { return static_cast<Affine*>(sums_.get()); }

    index count_;
    std::shared_ptr<void> pairs_, sums_, memory_;
    std::size_t bytes_ = 0;
};

}  // namespace deeppcr::benchmark
