#include "device/simd.hpp"

#include <hwy/highway.h>

#include <cstdlib>

#include <deeppcr/execution.hpp>

namespace deeppcr {
namespace {

/// The sets that this build compiles and this machine runs; a smaller bit is a better set.
std::vector<std::int64_t> compiled_targets() {
    std::vector<std::int64_t> targets;
    const std::int64_t available = hwy::SupportedTargets() & HWY_TARGETS;
    for (int bit = 0; bit < 63; ++bit)
        if (available & (std::int64_t(1) << bit)) targets.push_back(std::int64_t(1) << bit);
    return targets;
}

std::vector<std::string> target_names() {
    std::vector<std::string> names;
    for (const std::int64_t target : compiled_targets()) names.emplace_back(hwy::TargetName(target));
    return names;
}

}  // namespace

namespace device {
void choose_simd_target() {
    static const bool chosen = [] {
        const char* wanted = std::getenv("DEEPPCR_SIMD");
        if (wanted == nullptr) return true;
        std::string known;
        for (const std::int64_t target : compiled_targets()) {
            if (hwy::TargetName(target) == std::string(wanted)) {
                hwy::SetSupportedTargetsForTest(target);
                return true;
            }
            known += (known.empty() ? "" : ", ") + std::string(hwy::TargetName(target));
        }
        throw InvalidArgument("DEEPPCR_SIMD", "one of " + known, wanted);
    }();
    (void)chosen;
}
}  // namespace device

std::vector<std::string> simd_targets() {
    static const std::vector<std::string> names = target_names();  // before DEEPPCR_SIMD hides the others
    device::choose_simd_target();
    return names;
}

std::string simd_target() {
    device::choose_simd_target();
    return target_names().front();
}

std::string version() { return DEEPPCR_VERSION; }

}  // namespace deeppcr
