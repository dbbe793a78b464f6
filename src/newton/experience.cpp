#include "newton/experience.hpp"

#include <mutex>

namespace deeppcr::newton {
namespace {

std::mutex mutex;
std::map<ExperienceKey, Experience>& all() {
    static std::map<ExperienceKey, Experience> map;
    return map;
}

}  // namespace

Experience experience(const ExperienceKey& key) {
    const std::lock_guard lock(mutex);
    const auto found = all().find(key);
    return found == all().end() ? Experience() : found->second;
}

void learn(const ExperienceKey& key, const std::function<void(Experience&)>& change) {
    const std::lock_guard lock(mutex);
    change(all()[key]);
}

}  // namespace deeppcr::newton
