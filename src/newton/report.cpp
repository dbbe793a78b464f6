#include <cmath>
#include <ostream>
#include <sstream>

#include <deeppcr/evaluate.hpp>

namespace deeppcr {

std::string to_string(Status status) {
    switch (status) {
        case Status::converged:
            return "converged";
        case Status::finished_sequentially:
            return "finished sequentially";
        case Status::max_iterations:
            return "not converged";
        case Status::non_finite:
            break;
    }
    return "not finite";
}

namespace {
std::string duration(double seconds) {
    std::ostringstream text;
    text.precision(3);
    if (seconds < 1e-3)
        text << seconds * 1e6 << " us";
    else if (seconds < 1)
        text << seconds * 1e3 << " ms";
    else
        text << seconds << " s";
    return text.str();
}
}  // namespace

std::ostream& operator<<(std::ostream& out, const Report& report) {
    std::ostringstream text;
    text.precision(2);
    text << to_string(report.status);
    if (report.iterations > 0) text << " in " << report.iterations << (report.iterations == 1 ? " pass" : " passes");
    text << " (" << report.method << ")";
    if (!report.ok()) {
        index confirmed = -1;
        for (const Report::Sequence& sequence : report.sequences)
            if (confirmed < 0 || sequence.confirmed < confirmed) confirmed = sequence.confirmed;
        text << ", right up to step " << confirmed;
    }
    if (report.iterations > 0) text << ", residual " << report.residual;
    if (report.iterations > 0 && std::isfinite(report.error)) text << ", error about " << report.error;
    if (!std::isnan(report.lyapunov)) text << ", Lyapunov exponent " << report.lyapunov;
    if (report.sequential_steps > 0 && report.iterations > 0)
        text << ", " << report.sequential_steps << " steps finished sequentially";
    if (report.window_shrinks > 0) text << ", window shortened " << report.window_shrinks << " times";
    if (report.damped_passes > 0) text << ", " << report.damped_passes << " damped passes";
    if (report.non_finite_resets > 0) text << ", " << report.non_finite_resets << " non-finite states reset";
    text << ", " << duration(report.seconds);
    for (std::size_t i = 0; i < report.candidates.size(); ++i) {
        const Report::Candidate& candidate = report.candidates[i];
        if (i == 0)
            text << (candidate.measured ? "; chosen as expected to take " : "; chosen to be tried, predicted to take ");
        else
            text << (i == 1 ? ", not " : " or ");
        if (i > 0) text << to_string(candidate.method) << ' ';
        text << duration(candidate.seconds) << (candidate.measured ? " (measured)" : "");
    }
    return out << text.str();
}

}  // namespace deeppcr
