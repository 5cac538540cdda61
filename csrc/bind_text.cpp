// bind_text.cpp: the module _text, which processes load that read files and have no torch. Its one function is handed to
// Python by the interpreter's own interface: compiling pybind11's headers would take four seconds, this takes half of one.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "columns.h"

namespace {

// parse_columns(text, value, n_bytes, max_line) -> (numbers found, numbers of every row); addresses and sizes.
PyObject* parse_columns(PyObject*, PyObject* arguments) {
    unsigned long long text = 0, value = 0;
    long long n_bytes = 0, max_line = 0;
    if (!PyArg_ParseTuple(arguments, "KKLL", &text, &value, &n_bytes, &max_line)) return nullptr;
    xrdfast::ColumnsParams params{reinterpret_cast<const char*>(text), reinterpret_cast<double*>(value), n_bytes,
                                  max_line, 0};
    long long n_values = 0;
    Py_BEGIN_ALLOW_THREADS
    n_values = xrdfast::parse_columns(params);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("LL", n_values, n_values ? static_cast<long long>(params.n_columns) : 0LL);
}

PyMethodDef functions[] = {{"parse_columns", parse_columns, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_text", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__text() { return PyModule_Create(&module); }
