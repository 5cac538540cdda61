// bind_module.cpp: the pybind11 module, of the functions that bind_cpu.cpp or bind_cuda.cpp list; XRDFAST_MODULE names
// it (_cpu, _cuda, or _emu: the CUDA sources against the emulator, for the tests). One type of pybind11 function serves
// all: what it hands on are numbers and objects, read here once. No torch header, so that one build serves every torch
// version.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "bind.h"

#ifndef XRDFAST_MODULE
#define XRDFAST_MODULE _cpu
#endif

namespace py = pybind11;
using namespace xrdfast;

namespace {

Argument argument_of(PyObject* object) {
    if (PyFloat_Check(object)) return {false, 0, PyFloat_AS_DOUBLE(object)};
    if (PyCapsule_CheckExact(object)) {
        const char* name = PyCapsule_GetName(object);
        return {true, reinterpret_cast<int64_t>(PyCapsule_GetPointer(object, name)), 0.0, name ? name : ""};
    }
    int overflow = 0;
    int64_t integer = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow > 0) integer = static_cast<int64_t>(PyLong_AsUnsignedLongLong(object));
    if (overflow < 0) PyErr_SetString(PyExc_OverflowError, "an integer below -2^63");
    if (PyErr_Occurred()) throw py::error_already_set();
    return {true, integer, static_cast<double>(integer)};
}

py::object python_of(const Result& result) {
    switch (result.kind) {
        case Result::kBoolean: return py::bool_(result.integer != 0);
        case Result::kInteger: return py::int_(result.integer);
        case Result::kObject: {
            std::unique_ptr<void, void (*)(void*)> object(result.object, result.release);
            py::capsule capsule(object.get(), result.object_name, result.release);
            object.release();
            return capsule;
        }
        default: return py::none();
    }
}

}  // namespace

PYBIND11_MODULE(XRDFAST_MODULE, m) {
    m.doc() = "xrdfast native kernels; call them through xrdfast.ops";
    for (const Function& listed : module_functions()) {
        m.def(listed.name.c_str(), [listed](const py::args& given) {
            if (PyTuple_GET_SIZE(given.ptr()) != listed.n_arguments)
                throw py::type_error(listed.name + " takes " + std::to_string(listed.n_arguments) +
                                     " arguments, got " + std::to_string(given.size()));
            Argument arguments[kMaxArguments];
            for (int i = 0; i < listed.n_arguments; ++i)
                arguments[i] = argument_of(PyTuple_GET_ITEM(given.ptr(), i));
            Result result;
            {
                const py::gil_scoped_release unlocked;
                result = listed.call(listed.function, arguments);
            }
            return python_of(result);
        });
    }
}
