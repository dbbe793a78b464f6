// What tests that need a GPU, or an emulated one, begin with.
#pragma once

#include <gtest/gtest.h>

#include <deeppcr/execution.hpp>

namespace deeppcr {

constexpr Execution gpu{.backend = Backend::cuda};

/// Skips where there is none.
class OnGpuTest : public testing::Test {
protected:
    void SetUp() override {
        if (!cuda_problem().empty()) GTEST_SKIP() << cuda_problem();
    }
};

}  // namespace deeppcr
