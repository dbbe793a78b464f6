// The names by which checkpoints and the command line know the choices of the core.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include <deeppcr/error.hpp>
#include <deeppcr/evaluate.hpp>

namespace deeppcr::nn {

template <class Choice, std::size_t count>
using Names = std::array<std::pair<const char*, Choice>, count>;

enum class Optimiser { adamw, sgd };
/// Learning rates after the warm-up: half a cosine to 0, or the same to the end.
enum class RateSchedule { cosine, constant };

inline constexpr Names<Activation, 5> activation_names{{{"tanh", Activation::tanh},
                                                        {"relu", Activation::relu},
                                                        {"sigmoid", Activation::sigmoid},
                                                        {"gelu", Activation::gelu},
                                                        {"identity", Activation::identity}}};
inline constexpr Names<Method, 2> method_names{{{"newton", Method::newton}, {"sequential", Method::sequential}}};
/// Where the choice between them can be left to what they have taken.
inline constexpr Names<Method, 3> open_method_names{
    {{"automatic", Method::automatic}, {"newton", Method::newton}, {"sequential", Method::sequential}}};
/// For cells there is more than for layers.
inline constexpr Names<Method, 5> cell_method_names{{{"automatic", Method::automatic},
                                                     {"newton", Method::newton},
                                                     {"sequential", Method::sequential},
                                                     {"overlap", Method::overlap},
                                                     {"shooting", Method::shooting}}};
inline constexpr Names<Surrogate, 4> surrogate_names{{{"full", Surrogate::full},
                                                      {"diagonal", Surrogate::diagonal},
                                                      {"identity", Surrogate::identity},
                                                      {"zero", Surrogate::zero}}};
inline constexpr Names<Reduction, 4> reduction_names{{{"automatic", Reduction::automatic},
                                                      {"sequential", Reduction::sequential},
                                                      {"pcr", Reduction::pcr},
                                                      {"scan", Reduction::scan}}};
inline constexpr Names<Guess, 3> guess_names{
    {{"initial_state", Guess::initial_state}, {"first_step", Guess::first_step}, {"predicted", Guess::given}}};
inline constexpr Names<OnFailure, 3> on_failure_names{
    {{"finish", OnFailure::finish}, {"report", OnFailure::report}, {"raise", OnFailure::raise}}};
inline constexpr Names<Backend, 2> backend_names{{{"cpu", Backend::cpu}, {"reference", Backend::reference}}};
inline constexpr Names<Optimiser, 2> optimiser_names{{{"adamw", Optimiser::adamw}, {"sgd", Optimiser::sgd}}};
inline constexpr Names<RateSchedule, 2> rate_schedule_names{
    {{"cosine", RateSchedule::cosine}, {"constant", RateSchedule::constant}}};

template <class Choice, std::size_t count>
std::string name_of(const Names<Choice, count>& names, Choice choice) {
    const auto found =
        std::find_if(names.begin(), names.end(), [&](const auto& name) { return name.second == choice; });
    return found == names.end() ? "?" : found->first;
}

/// Throws InvalidArgument, which lists the names.
template <class Choice, std::size_t count>
Choice choice_of(const Names<Choice, count>& names, const std::string& argument, const std::string& name) {
    std::string expected = "one of";
    for (const auto& [known, choice] : names) {
        if (known == name) return choice;
        expected += std::string(" ") + known;
    }
    throw InvalidArgument(argument, expected, name.empty() ? "nothing" : name);
}

}  // namespace deeppcr::nn
