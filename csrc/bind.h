// bind.h: the list of functions that a native module hands to Python, each of addresses and numbers alone.
// bind_cpu.cpp and bind_cuda.cpp write the list and know nothing of Python; bind_module.cpp, the one file that pays for
// pybind11's headers, makes the module of it. A signature costs a row of conversions; with pybind11 it would cost a type
// of function of its own.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace xrdfast {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

constexpr int kMaxArguments = 40;

// The name of a type of objects that functions give and take; a specialisation for each.
template <typename T>
constexpr const char* kObjectName = nullptr;

// An object that a function of the module gave, as an argument.
template <typename T>
struct Held {
    const T* object;
};

// What comes from Python: an integer of 64 bits, signed or not (an address, too), a float, which is none, or an object
// by its address and the name of its type.
struct Argument {
    bool is_integer;
    int64_t integer;
    double real;
    const char* object_name = nullptr;

    template <typename T>
    T as() const {
        if constexpr (std::is_arithmetic_v<T>) {
            if (object_name) throw std::invalid_argument("an object was given where a number belongs");
            if constexpr (std::is_floating_point_v<T>) return static_cast<T>(real);
            if (!is_integer) throw std::invalid_argument("a float was given where an integer belongs");
            return static_cast<T>(integer);
        } else {
            return held(T{});
        }
    }

    template <typename T>
    Held<T> held(Held<T>) const {
        static_assert(kObjectName<T> != nullptr, "name the type");
        if (!object_name || std::strcmp(object_name, kObjectName<T>) != 0)
            throw std::invalid_argument(std::string("an object of type ") + kObjectName<T> + " belongs here");
        return {reinterpret_cast<const T*>(integer)};
    }
};

// What a function gives back: nothing, a number, or an object for other functions of the module.
struct Result {
    enum Kind { kNone, kBoolean, kInteger, kObject } kind = kNone;
    int64_t integer = 0;
    void* object = nullptr;
    const char* object_name = nullptr;
    void (*release)(void*) = nullptr;
};

template <typename T>
Result object_of(T value) {
    return {Result::kObject, 0, new T(std::move(value)), kObjectName<T>,
            [](void* object) { delete static_cast<T*>(object); }};
}

using AnyFunction = void (*)();
using Call = Result (*)(AnyFunction, const Argument*);

struct Function {
    std::string name;
    AnyFunction function;
    Call call;
    int n_arguments;
};
using Functions = std::vector<Function>;

// All that the module hands on: defined by bind_cpu.cpp or bind_cuda.cpp, whichever is linked.
Functions module_functions();

template <typename Returned, typename... Parameters, size_t... Index>
Result call_with(AnyFunction any, const Argument* given, std::index_sequence<Index...>) {
    const auto function = reinterpret_cast<Returned (*)(Parameters...)>(any);
    if constexpr (std::is_void_v<Returned>) {
        function(given[Index].template as<Parameters>()...);
        return {};
    } else {
        Returned result = function(given[Index].template as<Parameters>()...);
        if constexpr (std::is_same_v<Returned, Result>) {
            return result;
        } else {
            static_assert(std::is_integral_v<Returned>, "integers, bool and objects only");
            constexpr bool kIsBoolean = std::is_same_v<Returned, bool>;
            return {kIsBoolean ? Result::kBoolean : Result::kInteger, static_cast<int64_t>(result)};
        }
    }
}

template <typename Returned, typename... Parameters>
void define(Functions& functions, const std::string& name, Returned (*function)(Parameters...)) {
    static_assert(sizeof...(Parameters) <= kMaxArguments, "raise kMaxArguments");
    const Call call = [](AnyFunction any, const Argument* given) {
        return call_with<Returned, Parameters...>(any, given, std::index_sequence_for<Parameters...>());
    };
    functions.push_back({name, reinterpret_cast<AnyFunction>(function), call, sizeof...(Parameters)});
}

// `lambda` captures nothing; it takes addresses (uintptr_t) and numbers and runs without the interpreter's lock.
template <typename Lambda>
void define(Functions& functions, const std::string& name, Lambda lambda) {
    define(functions, name, +lambda);
}

}  // namespace xrdfast
