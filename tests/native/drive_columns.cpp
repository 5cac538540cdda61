// drive_columns.cpp: the part of drive_cpu that parses text.
#include "columns.h"

#include <cmath>

#include "hostile.h"

using namespace xrdfast;

void drive_columns(Random& random) {
    static const char kinds[] = "0123456789012345678901234567890.-  \t\n\n+e,\0";
    const int64_t n_bytes = random.integer(0, 200), n_kinds = random.one_in(3) ? 42 : 38;
    Block<char> text(n_bytes);
    for (int64_t i = 0; i < n_bytes; ++i) text[i] = kinds[random.integer(0, n_kinds - 1)];
    Block<double> value(n_bytes / 2 + 1);
    ColumnsParams params{text.get(), value.get(), n_bytes, random.integer(0, 300), 0};
    const int64_t n_values = parse_columns(params);
    expect(n_values >= 0 && n_values <= value.size(), "values fit");
    if (n_values == 0) return;
    expect(params.n_columns > 0 && n_values % params.n_columns == 0, "rows are whole");
    for (int64_t i = 0; i < n_values; ++i) expect(std::fabs(value[i]) < 1e15, "numbers have at most 15 digits");
}
