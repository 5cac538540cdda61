// bind.h: hands functions of addresses and numbers to Python. pybind11 alone would compile a call for each signature,
// which took most of a build; here one pybind11 function type serves all, and a signature costs a row of conversions.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace xrdfast {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

constexpr int kMaxArguments = 40;

// A Python number: an integer of 64 bits, signed or not, or a float, which is none.
struct Number {
    bool is_integer;
    int64_t integer;
    double real;

    template <typename T>
    T as() const {
        static_assert(std::is_arithmetic_v<T>, "addresses and numbers only");
        if constexpr (std::is_floating_point_v<T>) return static_cast<T>(real);
        if (!is_integer) throw std::invalid_argument("a float was given where an integer belongs");
        return static_cast<T>(integer);
    }
};

inline Number number_of(PyObject* object) {
    if (PyFloat_Check(object)) return {false, 0, PyFloat_AS_DOUBLE(object)};
    int overflow = 0;
    int64_t integer = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow > 0) integer = static_cast<int64_t>(PyLong_AsUnsignedLongLong(object));
    if (overflow < 0) PyErr_SetString(PyExc_OverflowError, "an integer below -2^63");
    if (PyErr_Occurred()) throw pybind11::error_already_set();
    return {true, integer, static_cast<double>(integer)};
}

using AnyFunction = void (*)();
using Call = pybind11::object (*)(AnyFunction, const Number*);

template <typename Result, typename... Parameters, size_t... Index>
pybind11::object call_unlocked(AnyFunction any, const Number* given, std::index_sequence<Index...>) {
    const auto function = reinterpret_cast<Result (*)(Parameters...)>(any);
    if constexpr (std::is_void_v<Result>) {
        {
            const pybind11::gil_scoped_release unlocked;
            function(given[Index].template as<Parameters>()...);
        }
        return pybind11::none();
    } else {
        auto result = [&] {
            const pybind11::gil_scoped_release unlocked;
            return function(given[Index].template as<Parameters>()...);
        }();
        return pybind11::cast(std::move(result));
    }
}

inline void define_any(pybind11::module_& m, const std::string& name, AnyFunction function, Call call, int n) {
    m.def(name.c_str(), [=](const pybind11::args& given) {
        if (PyTuple_GET_SIZE(given.ptr()) != n)
            throw pybind11::type_error(name + " takes " + std::to_string(n) + " arguments, got " +
                                       std::to_string(given.size()));
        Number numbers[kMaxArguments];
        for (int i = 0; i < n; ++i) numbers[i] = number_of(PyTuple_GET_ITEM(given.ptr(), i));
        return call(function, numbers);
    });
}

template <typename Result, typename... Parameters>
void define(pybind11::module_& m, const std::string& name, Result (*function)(Parameters...)) {
    static_assert(sizeof...(Parameters) <= kMaxArguments, "raise kMaxArguments");
    const Call call = [](AnyFunction any, const Number* given) {
        return call_unlocked<Result, Parameters...>(any, given, std::index_sequence_for<Parameters...>());
    };
    define_any(m, name, reinterpret_cast<AnyFunction>(function), call, sizeof...(Parameters));
}

// `lambda` captures nothing; it takes addresses (uintptr_t) and numbers and runs without the interpreter's lock.
template <typename Lambda>
void define(pybind11::module_& m, const std::string& name, Lambda lambda) {
    define(m, name, +lambda);
}

}  // namespace xrdfast
