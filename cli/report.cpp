#include "report.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

namespace deeppcr::program {
namespace {

constexpr int palette_size = 6;
constexpr std::size_t most_marks = 24;

template <class... Values>
std::string format(const char* pattern, Values... values) {
    std::array<char, 256> line{};
    std::snprintf(line.data(), line.size(), pattern, values...);
    return line.data();
}

std::string escape(std::string_view content) {
    std::string result;
    for (const char c : content) switch (c) {
            case '&':
                result += "&amp;";
                break;
            case '<':
                result += "&lt;";
                break;
            case '>':
                result += "&gt;";
                break;
            case '"':
                result += "&quot;";
                break;
            default:
                result += c;
        }
    return result;
}

/// Characters, not bytes, of UTF-8 text.
int length(std::string_view content) {
    return int(std::count_if(content.begin(), content.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

/// "12345.6" -> "12,345.6"
std::string with_thousands(std::string digits) {
    const std::size_t first = digits.find_first_of("0123456789");
    std::size_t end = digits.find_first_not_of("0123456789", first);
    if (end == std::string::npos) end = digits.size();
    for (std::size_t i = end; i > first + 3; i -= 3) digits.insert(i - 3, 1, ',');
    return digits;
}

std::string superscript(int exponent) {
    static constexpr std::array digits{"⁰", "¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹"};
    std::string result = exponent < 0 ? "⁻" : "";
    for (const char c : std::to_string(std::abs(exponent))) result += digits[std::size_t(c - '0')];
    return result;
}

/// A number without trailing zeros: ticks are round, so that few digits say them exactly.
std::string plain_text(double value) { return with_thousands(format("%.10g", value)); }

std::string tick_text(double value, const Axis& axis) {
    if (axis.unit == Unit::percent) return plain_text(value * 100) + " %";
    if (axis.unit == Unit::seconds) {
        if (value == 0) return "0 s";
        const double size = std::abs(value);
        if (size < 0.99e-6) return plain_text(value * 1e9) + " ns";
        if (size < 0.99e-3) return plain_text(value * 1e6) + " µs";
        if (size < 0.99) return plain_text(value * 1e3) + " ms";
        return plain_text(value) + " s";
    }
    if (axis.logarithm != 2 && value != 0 && (std::abs(value) < 0.99e-3 || std::abs(value) >= 0.99e6)) {
        const int exponent = int(std::floor(std::log10(std::abs(value)) + 1e-9));
        const double mantissa = value / std::pow(10.0, exponent);
        const std::string power = "10" + superscript(exponent);
        return std::abs(mantissa - 1) < 1e-6 ? power : format("%.3g·", mantissa) + power;
    }
    return plain_text(value);
}

std::vector<double> linear_ticks(double first, double last, int wanted) {
    const double rough = (last - first) / wanted, power = std::pow(10.0, std::floor(std::log10(rough)));
    double step = power * 10;
    for (const double factor : {1.0, 2.0, 5.0})
        if (power * factor >= rough * 0.999) {
            step = power * factor;
            break;
        }
    std::vector<double> ticks;
    for (double i = std::ceil(first / step - 1e-9); i * step <= last + 1e-9 * step; ++i)
        ticks.push_back(i * step + 0.0);  // no "-0"
    return ticks;
}

std::vector<double> logarithmic_ticks(double first, double last, int base, int wanted) {
    const double log_base = std::log(double(base));
    const double low = std::log(first) / log_base, high = std::log(last) / log_base;
    std::vector<double> ticks;
    const int stride = std::max(1, int(std::ceil((high - low) / wanted)));
    for (int power = int(std::ceil(low - 1e-9)); power <= high + 1e-9; ++power)
        if (power % stride == 0) ticks.push_back(std::pow(double(base), power));
    if (base != 10 || ticks.size() >= 3) return ticks;
    ticks.clear();
    for (int power = int(std::floor(low)); power <= high; ++power)
        for (const double factor : {1.0, 2.0, 5.0}) {
            const double tick = factor * std::pow(10.0, power);
            if (tick >= first * 0.999 && tick <= last * 1.001) ticks.push_back(tick);
        }
    return ticks.size() >= 2 ? ticks : linear_ticks(first, last, wanted);
}

/// An axis that has met its data: from values to places in the picture.
struct Scale {
    const Axis& axis;
    double first, last;  ///< values at the axis' ends
    double begin, end;   ///< their places

    bool shows(double value) const { return std::isfinite(value) && (axis.logarithm == 0 || value > 0); }
    double place(double value) const {
        const double part =
            axis.logarithm != 0 ? std::log(value / first) / std::log(last / first) : (value - first) / (last - first);
        return begin + (end - begin) * part;
    }
    std::vector<double> ticks(int wanted) const {
        return axis.logarithm != 0 ? logarithmic_ticks(first, last, axis.logarithm, wanted)
                                   : linear_ticks(first, last, wanted);
    }
};

Scale scale(const Axis& axis, const std::vector<const std::vector<double>*>& data, std::optional<double> reference,
            double begin, double end) {
    Scale result{axis, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(), begin, end};
    const auto include = [&](double value) {
        if (!result.shows(value)) return;
        result.first = std::min(result.first, value);
        result.last = std::max(result.last, value);
    };
    for (const std::vector<double>* values : data) std::for_each(values->begin(), values->end(), include);
    if (reference) include(*reference);
    if (result.first > result.last) result.first = result.last = 1;
    constexpr double space = 0.04;
    if (axis.logarithm != 0) {
        const double spread = std::max(std::log(result.last / result.first), 0.5);
        result.first *= std::exp(-space * spread);
        result.last *= std::exp(space * spread);
    } else {
        double spread = result.last - result.first;
        if (spread == 0) spread = std::max(std::abs(result.last), 1.0);
        result.first -= space * spread;
        result.last += space * spread;
    }
    if (axis.first) result.first = *axis.first;
    if (axis.last) result.last = *axis.last;
    if (!(result.first < result.last)) result.last = result.first + 1;
    return result;
}

/// Circle, square, diamond, triangle: series are told apart without colour too.
std::string mark(int shape, double x, double y) {
    switch (shape % 4) {
        case 0:
            return format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.2\"", x, y);
        case 1:
            return format("<rect x=\"%.1f\" y=\"%.1f\" width=\"6\" height=\"6\"", x - 3, y - 3);
        case 2:
            return format("<path d=\"M%.1f %.1fl4 4l-4 4l-4 -4z\"", x, y - 4);
        default:
            return format("<path d=\"M%.1f %.1fl4 7h-8z\"", x, y - 4.5);
    }
}

int colour_of(const Plot& plot, std::size_t i) {
    return (plot.series[i].colour >= 0 ? plot.series[i].colour : int(i)) % palette_size;
}

const char* stroke_class(Series::Stroke stroke) {
    switch (stroke) {
        case Series::Stroke::wide:
            return " wide";
        case Series::Stroke::dashed:
            return " dashed";
        default:
            return "";
    }
}

std::string line(const Series& series, int colour, const Scale& across, const Scale& up) {
    std::string path, marks;
    bool drawing = false;
    const std::size_t points = std::min(series.x.size(), series.y.size());
    for (std::size_t i = 0; i < points; ++i) {
        if (!across.shows(series.x[i]) || !up.shows(series.y[i])) {
            drawing = false;
            continue;
        }
        const double x = across.place(series.x[i]), y = up.place(series.y[i]);
        path += format("%c%.1f %.1f", drawing ? 'L' : 'M', x, y);
        drawing = true;
        if (points > most_marks) continue;
        const std::string value =
            up.axis.unit == Unit::seconds ? seconds_text(series.y[i]) : number_text(series.y[i], 4);
        marks += mark(colour, x, y) + format(" class=\"f%d\"><title>", colour) + escape(series.name) + ": " +
                 escape(value) + " at " + escape(number_text(series.x[i], 6)) + "</title></" +
                 (colour % 4 == 0   ? "circle"
                  : colour % 4 == 1 ? "rect"
                                    : "path") +
                 ">";
    }
    return format("<path class=\"line s%d%s\" d=\"", colour, stroke_class(series.stroke)) + path + "\"/>" + marks;
}

constexpr std::string_view style = R"(
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2530; --soft: #5b6775; --frame: #d5dbe2; --grid: #e6eaee;
  --shade: #f4f6f8; --good: #0a6b4c; --good-shade: #e5f4ee; --bad: #a33b00; --bad-shade: #fdeee4;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #a6539a; --s4: #b98300; --s5: #3fa3dc; }
@media (prefers-color-scheme: dark) { :root { --page: #14191f; --text: #e4e9ee; --soft: #9aa7b4; --frame: #36414d;
  --grid: #29323c; --shade: #1c232b; --good: #5fd3a8; --good-shade: #14322a; --bad: #ff9d62; --bad-shade: #3a2417;
  --s0: #58b0ea; --s1: #ff8b43; --s2: #35cba1; --s3: #e296d3; --s4: #eebd3f; --s5: #a9d8f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--frame); }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p, ul { max-width: 86ch; margin: .6rem 0; }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
.notice { border-left: 4px solid var(--soft); background: var(--shade); padding: .6rem 1rem; margin: .8rem 0; }
.notice.good { border-color: var(--good); background: var(--good-shade); }
.notice.bad { border-color: var(--bad); background: var(--bad-shade); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1.6rem;
  margin: 1.2rem 0; }
figure { margin: 0; }
figcaption, .caption { color: var(--soft); font-size: .87rem; line-height: 1.45; margin-top: .4rem; max-width: 90ch; }
.table { margin: 1.4rem 0; }
.scroll { overflow-x: auto; }
pre { background: var(--shade); padding: .6rem 1rem; margin: .4rem 0 1.2rem; font-size: .85rem; line-height: 1.4;
  white-space: pre-wrap; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .26rem .75rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 2px solid var(--frame);
  white-space: normal; }
.number { text-align: right; }
td.good { color: var(--good); font-weight: 600; }
td.bad { color: var(--bad); }
img { display: block; width: 100%; image-rendering: pixelated; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--text); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
svg .tick { fill: var(--soft); font-size: 11.5px; }
svg .halo { paint-order: stroke; stroke: var(--page); stroke-width: 4; }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--soft); }
svg .reference { stroke: var(--text); stroke-dasharray: 2 4; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .square { fill-opacity: .3; stroke-width: 1; }
svg .empty { fill: var(--shade); }
svg .strong { font-weight: 600; } svg .note { font-size: 9.5px; }
svg .wide { stroke-width: 5; opacity: .45; } svg .dashed { stroke-dasharray: 6 4; }
svg .s0 { stroke: var(--s0); } svg .s1 { stroke: var(--s1); } svg .s2 { stroke: var(--s2); }
svg .s3 { stroke: var(--s3); } svg .s4 { stroke: var(--s4); } svg .s5 { stroke: var(--s5); }
svg .f0 { fill: var(--s0); } svg .f1 { fill: var(--s1); } svg .f2 { fill: var(--s2); }
svg .f3 { fill: var(--s3); } svg .f4 { fill: var(--s4); } svg .f5 { fill: var(--s5); }
)";

std::string tone_class(Table::Tone tone) {
    switch (tone) {
        case Table::Tone::good:
            return " good";
        case Table::Tone::bad:
            return " bad";
        default:
            return "";
    }
}

}  // namespace

std::string count_text(long long value) { return with_thousands(std::to_string(value)); }

std::string number_text(double value, int digits) {
    if (!std::isfinite(value)) return "-";
    if (value == 0) return "0";
    const double size = std::abs(value);
    if (size < 1e-3 || size >= 1e9) return format("%.*e", std::max(digits - 1, 0), value);
    const int decimals = std::clamp(digits - 1 - int(std::floor(std::log10(size))), 0, 12);
    return with_thousands(format("%.*f", decimals, value));
}

std::string seconds_text(double seconds) {
    if (!std::isfinite(seconds)) return "-";
    if (seconds < 0.9995e-6) return number_text(seconds * 1e9) + " ns";
    if (seconds < 0.9995e-3) return number_text(seconds * 1e6) + " µs";
    if (seconds < 0.9995) return number_text(seconds * 1e3) + " ms";
    if (seconds < 120) return number_text(seconds) + " s";
    return format("%d:%02d min", int(seconds) / 60, int(seconds) % 60);
}

std::string scientific_text(double value) {
    if (!std::isfinite(value)) return "-";
    if (value == 0) return "0";
    std::string digits = format("%.1e", value);  // "1.0e-05"
    const std::size_t exponent = digits.find('e');
    std::string mantissa = digits.substr(0, exponent);
    if (mantissa.ends_with(".0")) mantissa.resize(mantissa.size() - 2);
    return mantissa + "e" + std::to_string(std::stoi(digits.substr(exponent + 1)));
}

std::string percent_text(double fraction, int decimals) {
    return std::isfinite(fraction) ? format("%.*f %%", decimals, fraction * 100) : "-";
}

std::string speed_text(double ratio) {
    if (!std::isfinite(ratio) || ratio <= 0) return "-";
    return ratio >= 1 ? number_text(ratio) + "x faster" : number_text(1 / ratio) + "x slower";
}

std::string svg(const Plot& plot) {
    constexpr double width = 540, left = 62, right = 16, row = 20, height_of_area = 250;
    std::vector<const std::vector<double>*> across_data, up_data;
    for (const Series& series : plot.series) {
        across_data.push_back(&series.x);
        up_data.push_back(&series.y);
    }

    std::string legend;
    double legend_x = left, y = 14;
    if (plot.series.size() > 1) {
        for (std::size_t i = 0; i < plot.series.size(); ++i) {
            const Series& series = plot.series[i];
            const double needed = 30 + 6.7 * length(series.name) + 16;
            if (legend_x + needed > width && legend_x > left) {
                legend_x = left;
                y += row;
            }
            const int colour = colour_of(plot, i);
            legend += format("<path class=\"line s%d%s\" d=\"M%.1f %.1fh24\"/>", colour, stroke_class(series.stroke),
                             legend_x, y - 4);
            if (series.x.size() <= most_marks)
                legend += mark(colour, legend_x + 12, y - 4) + format(" class=\"f%d\"/>", colour);
            legend += format("<text x=\"%.1f\" y=\"%.1f\">", legend_x + 30, y) + escape(series.name) + "</text>";
            legend_x += needed;
        }
        y += row + 4;
    }
    const double top = y + 16, bottom = top + height_of_area, height = bottom + 44;
    const Scale across = scale(plot.x, across_data, {}, left, width - right);
    const Scale up = scale(plot.y, up_data, plot.reference, bottom, top);

    std::string result = format("<svg viewBox=\"0 0 %.0f %.0f\" role=\"img\"><title>", width, height) +
                         escape(plot.title) + "</title>" + legend + format("<text x=\"4\" y=\"%.1f\">", y) +
                         escape(plot.y.label) + "</text>";
    for (const double tick : up.ticks(6)) {
        const double place = up.place(tick);
        result += format("<path class=\"grid\" d=\"M%.1f %.1fH%.1f\"/>", left, place, width - right) +
                  format("<text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">", left - 6, place + 4) +
                  escape(tick_text(tick, plot.y)) + "</text>";
    }
    for (const double tick : across.ticks(8)) {
        const double place = across.place(tick);
        result += format("<path class=\"axis\" d=\"M%.1f %.1fv5\"/>", place, bottom) +
                  format("<text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", place, bottom + 18) +
                  escape(tick_text(tick, plot.x)) + "</text>";
    }
    result += format("<path class=\"axis\" d=\"M%.1f %.1fH%.1f\"/>", left, bottom, width - right) +
              format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", (left + width - right) / 2, bottom + 38) +
              escape(plot.x.label) + "</text>";
    for (std::size_t i = 0; i < plot.series.size(); ++i) result += line(plot.series[i], colour_of(plot, i), across, up);
    if (plot.reference) {
        const double place = up.place(*plot.reference);
        result +=
            format("<path class=\"reference\" d=\"M%.1f %.1fH%.1f\"/>", left, place, width - right) +
            format("<text class=\"tick halo\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">", width - right, place - 5) +
            escape(plot.reference_label) + "</text>";
    }
    return result + "</svg>\n";
}

std::string svg(const Map& map) {
    constexpr double width = 540, left = 62, right = 4, row = 20, square_height = 36, gap = 2;
    std::string legend;
    double x = 4;
    for (std::size_t i = 0; i < map.legend.size(); ++i) {
        legend += format("<rect class=\"square s%d f%d\" x=\"%.1f\" y=\"3\" width=\"14\" height=\"14\"/>", int(i),
                         int(i), x) +
                  format("<text x=\"%.1f\" y=\"14\">", x + 20) + escape(map.legend[i]) + "</text>";
        x += 20 + 6.7 * length(map.legend[i]) + 20;
    }
    const double top = 2 * row + 20, square_width = (width - left - right) / std::max(1.0, double(map.columns.size()));
    const double bottom = top + square_height * double(map.rows.size()), height = bottom + 44;
    std::string result = format("<svg viewBox=\"0 0 %.0f %.0f\" role=\"img\"><title>", width, height) +
                         escape(map.title) + "</title>" + legend + format("<text x=\"4\" y=\"%.1f\">", top - 10) +
                         escape(map.up) + "</text>";
    for (std::size_t i = 0; i < map.rows.size(); ++i) {
        const double y = bottom - square_height * double(i + 1), middle = y + square_height / 2;
        result += format("<text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">", left - 8, middle + 4) +
                  escape(map.rows[i]) + "</text>";
        for (std::size_t j = 0; j < std::min(map.columns.size(), map.squares[i].size()); ++j) {
            const Map::Square& square = map.squares[i][j];
            const double place = left + square_width * double(j), centre = place + square_width / 2;
            result += "<g><title>" + escape(square.details) + "</title>" +
                      (square.colour < 0 ? std::string("<rect class=\"empty\"")
                                         : format("<rect class=\"square s%d f%d\"", square.colour, square.colour)) +
                      format(" x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\"/>", place + gap / 2, y + gap / 2,
                             square_width - gap, square_height - gap) +
                      format("<text class=\"strong\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", centre,
                             square.note.empty() ? middle + 4 : middle - 1) +
                      escape(square.text) + "</text>";
            if (!square.note.empty())
                result +=
                    format("<text class=\"note\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", centre, middle + 12) +
                    escape(square.note) + "</text>";
            result += "</g>";
        }
    }
    for (std::size_t j = 0; j < map.columns.size(); ++j)
        result += format("<text class=\"tick\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">",
                         left + square_width * (double(j) + 0.5), bottom + 16) +
                  escape(map.columns[j]) + "</text>";
    return result +
           format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", (left + width - right) / 2, bottom + 36) +
           escape(map.across) + "</text></svg>\n";
}

std::string text(const Table& table) {
    std::vector<int> widths;
    for (const Table::Column& column : table.columns) widths.push_back(length(column.heading));
    for (const auto& row : table.rows)
        for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], length(row[i].text));

    std::string result = table.title.empty() ? "" : table.title + "\n";
    const auto add_row = [&](const auto& cell_text, std::size_t cells) {
        std::string row;
        for (std::size_t i = 0; i < cells; ++i) {
            const std::string content = cell_text(i);
            const std::string space(std::size_t(widths[i] - length(content)), ' ');
            row += "  " + (table.columns[i].number ? space + content : content + space);
        }
        row.erase(row.find_last_not_of(' ') + 1);
        result += row + "\n";
    };
    add_row([&](std::size_t i) { return table.columns[i].heading; }, table.columns.size());
    for (const auto& row : table.rows) add_row([&](std::size_t i) { return row[i].text; }, row.size());
    return table.caption.empty() ? result : result + table.caption + "\n";
}

void Page::heading(std::string_view content) { body_ += "<h2>" + escape(content) + "</h2>\n"; }

void Page::paragraph(std::string_view content) { body_ += "<p>" + escape(content) + "</p>\n"; }

void Page::list(const std::vector<std::string>& items) {
    body_ += "<ul>";
    for (const std::string& item : items) body_ += "<li>" + escape(item) + "</li>\n";
    body_ += "</ul>\n";
}

void Page::notice(std::string_view content, Table::Tone tone) {
    body_ += "<p class=\"notice" + tone_class(tone) + "\">" + escape(content) + "</p>\n";
}

void Page::table(const Table& table) {
    const auto number = [&](std::size_t column) { return table.columns[column].number ? "number" : ""; };
    body_ += "<div class=\"table\">";
    if (!table.title.empty()) body_ += "<h3>" + escape(table.title) + "</h3>";
    body_ += "<div class=\"scroll\"><table>\n<tr>";
    for (std::size_t i = 0; i < table.columns.size(); ++i)
        body_ += std::string("<th class=\"") + number(i) + "\">" + escape(table.columns[i].heading) + "</th>";
    body_ += "</tr>\n";
    for (const auto& row : table.rows) {
        body_ += "<tr>";
        for (std::size_t i = 0; i < row.size(); ++i)
            body_ += std::string("<td class=\"") + number(i) + tone_class(row[i].tone) + "\">" + escape(row[i].text) +
                     "</td>";
        body_ += "</tr>\n";
    }
    body_ += "</table></div>";
    if (!table.caption.empty()) body_ += "<p class=\"caption\">" + escape(table.caption) + "</p>";
    body_ += "</div>\n";
}

void Page::preformatted(std::string_view title, std::string_view content) {
    std::string printable(content);
    for (char& c : printable)
        if (c != '\n' && (c < ' ' || c > '~')) c = '.';
    body_ += "<h3>" + escape(title) + "</h3>\n<pre>" + escape(printable) + "</pre>\n";
}

template <class Picture>
void Page::figures(const std::vector<Picture>& pictures) {
    body_ += "<div class=\"plots\">\n";
    for (const Picture& picture : pictures) {
        body_ += "<figure><h3>" + escape(picture.title) + "</h3>" + svg(picture);
        if (!picture.caption.empty()) body_ += "<figcaption>" + escape(picture.caption) + "</figcaption>";
        body_ += "</figure>\n";
    }
    body_ += "</div>\n";
}

void Page::plots(const std::vector<Plot>& plots) { figures(plots); }

void Page::maps(const std::vector<Map>& maps) { figures(maps); }

std::string base64(const std::vector<std::uint8_t>& bytes) {
    constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    for (std::size_t i = 0; i < bytes.size(); i += 3) {
        const std::size_t count = std::min<std::size_t>(3, bytes.size() - i);
        unsigned three = 0;
        for (std::size_t k = 0; k < 3; ++k) three = three << 8 | (k < count ? bytes[i + k] : 0);
        for (std::size_t k = 0; k < 4; ++k) text += k <= count ? digits[three >> (18 - 6 * k) & 63] : '=';
    }
    return text;
}

void Page::picture(std::string_view title, std::string_view png) {
    body_ += "<figure><h3>" + escape(title) + "</h3><img alt=\"" + escape(title) + "\" src=\"data:image/png;base64," +
             std::string(png) + "\"></figure>\n";
}

std::string Page::html() const {
    return "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
           "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>" +
           escape(title_) + "</title>\n<style>" + std::string(style) + "</style>\n</head>\n<body>\n<main>\n<h1>" +
           escape(title_) + "</h1>\n" + body_ + "</main>\n</body>\n</html>\n";
}

}  // namespace deeppcr::program
