// columns.h: rows of decimal numbers in text to doubles.
#pragma once
#include <cstdint>

namespace xrdfast {

struct ColumnsParams {
    const char* text;   // (n_bytes)
    double* value;      // (n_bytes / 2 + 1), filled row by row
    int64_t n_bytes;
    int64_t max_line;   // bytes; a longer line is no row
    int64_t n_columns;  // set: numbers of every row
};

// Numbers found; 0 where the text holds anything but rows of equally many decimal numbers of at most 15 digits between
// spaces and tabs.
int64_t parse_columns(ColumnsParams& params);

}  // namespace xrdfast
