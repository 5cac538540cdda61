// columns.cpp: rows of decimal numbers in text to doubles, one pass. Floor and what is reached: benchmarks/NOTES.md.
#include "columns.h"

namespace xrdfast {
namespace {

constexpr int kMaxDigits = 15;  // below 2^53, so the digits are an exact integer
// Exact, so one division rounds right (Clinger, PLDI 1990).
constexpr double kPower[kMaxDigits + 1] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                           1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};

bool is_digit(char c) { return static_cast<unsigned char>(c - '0') < 10; }

// The number at `at`, which goes on behind it; false where none is. A digit, a point and a sign are all it may hold.
bool number_at(const char*& at, const char* end, double& value) {
    const bool negative = *at == '-';
    if (negative) ++at;
    int64_t digits = 0, n_digits = 0, n_after = 0;
    for (; at < end && is_digit(*at) && n_digits < kMaxDigits; ++n_digits) digits = 10 * digits + (*at++ - '0');
    if (at < end && *at == '.') {
        ++at;
        for (; at < end && is_digit(*at) && n_digits < kMaxDigits; ++n_digits, ++n_after)
            digits = 10 * digits + (*at++ - '0');
    }
    if (n_digits == 0 || (at < end && *at != ' ' && *at != '\t' && *at != '\n')) return false;
    const double magnitude = static_cast<double>(digits) / kPower[n_after];
    value = negative ? -magnitude : magnitude;
    return true;
}

}  // namespace

int64_t parse_columns(ColumnsParams& params) {
    const char *at = params.text, *end = at + params.n_bytes, *line = at;
    int64_t n_values = 0, in_row = 0;
    params.n_columns = 0;
    const auto row_ends = [&] {  // blank lines are passed over
        if (in_row == 0) return true;
        if (params.n_columns == 0) params.n_columns = in_row;
        const bool fits = in_row == params.n_columns;
        in_row = 0;
        return fits;
    };
    while (at < end) {
        if (*at == '\n') {
            if (at - line > params.max_line || !row_ends()) return 0;
            line = ++at;
        } else if (*at == ' ' || *at == '\t') {
            ++at;
        } else {
            if (!number_at(at, end, params.value[n_values])) return 0;
            ++n_values, ++in_row;
        }
    }
    return end - line <= params.max_line && row_ends() ? n_values : 0;
}

}  // namespace xrdfast
