// A report as one self-contained HTML page: prose, tables, line plots and maps, the pictures inline as SVG.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace deeppcr::program {

/// How numbers are written for people: 1,024; 3 significant digits; 12.3 µs; 1.2e-6. "-" where not finite.
std::string count_text(long long value);
std::string number_text(double value, int digits = 3);
std::string seconds_text(double seconds);
std::string scientific_text(double value);
std::string percent_text(double fraction, int decimals = 1);
/// What sequential / parallel seconds say: "1.38x faster", "13.5x slower"; "-" where not finite.
std::string speed_text(double ratio);

enum class Unit { number, seconds, percent };

/// One axis of a plot. Without `first` and `last` it spans the data, with a little space around it.
struct Axis {
    std::string label;
    Unit unit = Unit::number;
    int logarithm = 0;  ///< base of a logarithmic scale, 2 or 10; 0: linear
    std::optional<double> first = {}, last = {};
};

/// A line through points; it is broken where a coordinate is not finite (or not positive, on a logarithmic axis).
/// Up to 24 points are marked, and each mark tells its coordinates when pointed at.
struct Series {
    enum class Stroke { solid, wide, dashed };

    std::string name;
    std::vector<double> x, y;
    Stroke stroke = Stroke::solid;
    int colour = -1;  ///< position in the palette; -1: that of the series
};

struct Plot {
    std::string title, caption;
    Axis x, y;
    std::vector<Series> series;
    std::optional<double> reference = {};  ///< a horizontal line at this y
    std::string reference_label = {};
};

/// The plot as an <svg> element; its colours are defined by the page's style.
std::string svg(const Plot& plot);

/// A grid of squares, coloured by which of the `legend` they belong to.
struct Map {
    struct Square {
        int colour = -1;              ///< position in the legend; -1: nothing here
        std::string text, note = {};  ///< what it says, and in smaller letters below
        std::string details = {};     ///< what it tells when pointed at
    };

    std::string title, caption;
    std::string across, up;                    ///< what the axes mean
    std::vector<std::string> columns, rows;    ///< their values; the first row is the lowest
    std::vector<std::string> legend;           ///< at most as many as the palette has colours, 6
    std::vector<std::vector<Square>> squares;  ///< [rows][columns]
};

/// The map as an <svg> element.
std::string svg(const Map& map);

struct Table {
    enum class Tone { plain, good, bad };
    struct Column {
        std::string heading;
        bool number = true;  ///< aligned to the right
    };
    struct Cell {
        std::string text;
        Tone tone = Tone::plain;

        Cell(std::string content, Tone mood = Tone::plain)  // NOLINT(google-explicit-constructor)
            : text(std::move(content)), tone(mood) {}
        Cell(const char* content) : text(content) {}  // NOLINT(google-explicit-constructor)
    };

    std::string title, caption;
    std::vector<Column> columns;
    std::vector<std::vector<Cell>> rows;
};

/// The table in aligned columns, for a terminal: title, headings, rows, caption; each line ends with a newline.
std::string text(const Table& table);

/// RFC 4648, section 4.
std::string base64(const std::vector<std::uint8_t>& bytes);

/// Put together from top to bottom. All texts are plain: they are escaped here.
class Page {
public:
    explicit Page(std::string title) : title_(std::move(title)) {}

    void heading(std::string_view content);
    void paragraph(std::string_view content);
    void list(const std::vector<std::string>& items);
    /// A framed message: good, bad, or plain.
    void notice(std::string_view content, Table::Tone tone);
    void table(const Table& table);
    /// Text with its line breaks; what is not printable ASCII becomes a dot.
    void preformatted(std::string_view title, std::string_view content);
    /// Plots side by side, as many as fit.
    void plots(const std::vector<Plot>& plots);
    void maps(const std::vector<Map>& maps);
    /// png: a file's bytes in base64.
    void picture(std::string_view title, std::string_view png);

    std::string html() const;

private:
    template <class Picture>
    void figures(const std::vector<Picture>& pictures);

    std::string title_, body_;
};

}  // namespace deeppcr::program
