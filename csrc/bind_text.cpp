// bind_text.cpp: the pybind11 module _text, which processes load that read files and have no torch.
#include <pybind11/pybind11.h>

#include "columns.h"

namespace py = pybind11;

PYBIND11_MODULE(_text, m) {
    m.def(
        "parse_columns",
        [](uintptr_t text, uintptr_t value, int64_t n_bytes, int64_t max_line) {
            xrdfast::ColumnsParams params{reinterpret_cast<const char*>(text), reinterpret_cast<double*>(value),
                                          n_bytes, max_line, 0};
            int64_t n_values = 0;
            {
                py::gil_scoped_release release;
                n_values = xrdfast::parse_columns(params);
            }
            return py::make_tuple(n_values, n_values ? params.n_columns : 0);
        },
        py::arg("text"), py::arg("value"), py::arg("n_bytes"), py::arg("max_line"));
}
