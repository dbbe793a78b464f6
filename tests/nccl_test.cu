// Sums over ranks whose GPUs are different ones, from GPU to GPU. Ranks are threads here, GPUs and NCCL are emulated.
#include <gtest/gtest.h>
#include <nccl.h>

#include <deeppcr/group.hpp>
#include <deeppcr/launch.cuh>

#include "distribute/gpus.hpp"
#include "tests/compare.hpp"
#include "tests/messages.hpp"
#include "tests/streams.cuh"

namespace deeppcr {
namespace {

/// As many GPUs as ranks, until the test ends.
class Gpus : public testing::TestWithParam<int> {
protected:
    Gpus() { emulation::machine().devices = ranks(); }
    ~Gpus() override { emulation::machine().devices = 1; }
    static int ranks() { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Ranks, Gpus, testing::Values(2, 3, 4, 5));

const Execution on_gpu{.backend = Backend::cuda};

/// The sums of numbers that every rank draws, by both ways; the traffic of the one between GPUs.
template <class T>
Group::Traffic expect_sums_of_main_memory(Group& group, index count, Device gpu) {
    const auto mine = Buffer<T>::random({1, 1, count}, std::uint64_t(group.rank() + 1));
    const auto expected = mine.clone();
    group.sum(std::span<T>(expected.data(), std::size_t(count)));
    const auto there = mine.on(gpu), again = mine.on(gpu);
    group.sum(std::span<T>(there.data(), std::size_t(count)), on_gpu);
    group.reset_traffic();
    group.sum(std::span<T>(again.data(), std::size_t(count)), on_gpu);  // in the memory of the first
    const auto traffic = group.traffic();
    EXPECT_EQ(largest_difference<T>(again.on(Device::host()), there.on(Device::host())), 0);
    const auto found = there.on(Device::host());
    for (index i = 0; i < count; ++i) EXPECT_EQ(found.data()[i], expected.data()[i]) << i << ", " << to_string(group);
    return traffic;
}

TEST_P(Gpus, SumsHaveTheBitsOfMainMemory) {
    Group::simulate(ranks(), [](Group& group) {
        cuda::check(cudaSetDevice(group.rank_on_machine()), "choosing a GPU");
        const Device gpu = Device::cuda(group.rank());
        EXPECT_TRUE(group.sums_between_gpus());
        const index others = group.size() - 1;
        for (const index count : {index(1024) * group.size(), index(6007)}) {
            const index mine = distribute::slice(count, group.rank(), group.size()).count();
            EXPECT_EQ(expect_sums_of_main_memory<float>(group, count, gpu),
                      (Group::Traffic{2 * others, 4 * (count - mine + others * mine)}))
                << count;
            expect_sums_of_main_memory<double>(group, count, gpu);
        }
        expect_sums_of_main_memory<double>(group, 7, gpu);  // few go through main memory
        expect_sums_of_main_memory<double>(group, 0, gpu);
    });
}

TEST_P(Gpus, WhatTheStreamHasBeforeAndAfterIsInOrder) {
    Group::simulate(ranks(), [](Group& group) {
        cuda::check(cudaSetDevice(group.rank()), "choosing a GPU");
        const index count = 1024 * group.size();
        const Device gpu = Device::cuda(group.rank());
        const Buffer<float> ones({1, 1, count});
        std::fill_n(ones.data(), count, 1.F);
        const auto there_ones = ones.on(gpu);
        const auto values = Buffer<float>({1, 1, count}, Layout::steps_first, gpu), copy = values.clone();
        const Stream stream;
        const std::size_t bytes = std::size_t(count) * sizeof(float);
        cudaMemcpyAsync(values.data(), there_ones.data(), bytes, cudaMemcpyDeviceToDevice, stream.stream);
        group.sum(std::span<float>(values.data(), std::size_t(count)), stream.execution());
        cudaMemcpyAsync(copy.data(), values.data(), bytes, cudaMemcpyDeviceToDevice, stream.stream);
        stream.wait();
        const auto found = copy.on(Device::host());
        for (index i = 0; i < count; ++i) EXPECT_EQ(found.data()[i], float(group.size()));
    });
}

TEST_P(Gpus, RanksThatShareAGpuSumThroughMainMemory) {
    Group::simulate(ranks(), [](Group& group) {
        const int shared = group.rank() / 2;
        cuda::check(cudaSetDevice(shared), "choosing a GPU");
        EXPECT_FALSE(group.sums_between_gpus());
        expect_sums_of_main_memory<float>(group, 1024 * group.size(), Device::cuda(shared));
    });
}

/// The others would wait for it.
TEST_P(Gpus, WhereNcclFailsOnARankSumsGoThroughMainMemory) {
    using emulation::NcclFailure;
    emulation::FailingNccl& failing = emulation::failing_nccl();
    failing.rank = ranks() - 1;
    for (const NcclFailure failure : {NcclFailure::meeting_at_once, NcclFailure::meeting, NcclFailure::exchange_at_once,
                                      NcclFailure::exchange, NcclFailure::wrong_bytes}) {
        SCOPED_TRACE(int(failure));
        failing.failure = failure;
        failing.aborts = 0;
        Group::simulate(ranks(), [](Group& group) {
            cuda::check(cudaSetDevice(group.rank()), "choosing a GPU");
            EXPECT_FALSE(group.sums_between_gpus());
            expect_sums_of_main_memory<float>(group, 1024 * group.size(), Device::cuda(group.rank()));
        });
        EXPECT_EQ(failing.aborts, ranks() - (failure == NcclFailure::meeting_at_once ? 1 : 0));
    }
    failing.failure = NcclFailure::none;
}

/// One rank has no memory for the first exchange.
TEST_P(Gpus, WithoutMemoryOnARankSumsGoThroughMainMemory) {
    Group::simulate(ranks(), [](Group& group) {
        cuda::check(cudaSetDevice(group.rank()), "choosing a GPU");
        if (group.rank() == 0) emulation::machine().good_allocations = 0;
        EXPECT_FALSE(group.sums_between_gpus());
    });
    EXPECT_EQ(emulation::machine().good_allocations, -1);
}

TEST_P(Gpus, SayWhatIsWrong) {
    Group::simulate(ranks(), [](Group& group) {
        const auto sum_on = [&](int ordinal) {
            cuda::check(cudaSetDevice(ordinal), "choosing a GPU");
            const Buffer<float> values({1, 1, 1024 * group.size()}, Layout::steps_first, Device::cuda(ordinal));
            group.sum(std::span<float>(values.data(), std::size_t(values.size())), on_gpu);
        };
        const int mine = group.rank(), other = (mine + 1) % group.size();
        sum_on(mine);
        EXPECT_EQ(message_of([&] { sum_on(other); }), "values: expected on GPU " + std::to_string(mine) +
                                                          ", as in the first sum of this group, got on GPU " +
                                                          std::to_string(other));
        cuda::check(cudaSetDevice(mine), "choosing a GPU");
        const Buffer<float> values({1, 1, 7}, Layout::steps_first, Device::cuda(mine));
        const Stream stream;
        group.barrier();
        Captured(stream, [&] {
            EXPECT_EQ(message_of([&] { group.sum(std::span<float>(values.data(), 7), stream.execution()); }),
                      "execution.stream: expected one that is not captured, got one that is captured into a graph");
        });
        group.barrier();
    });
}

TEST(GpusAlone, ARankAloneHasNothingToSum) {
    Group group;
    const auto values = Buffer<float>::random({1, 1, 5000}, 1);
    const auto there = values.on(Device::cuda());
    group.sum(std::span<float>(there.data(), 5000), on_gpu);
    EXPECT_FALSE(group.sums_between_gpus());
    EXPECT_EQ(there.on(Device::host())(0, 0, 4999), values(0, 0, 4999));
}

}  // namespace
}  // namespace deeppcr
