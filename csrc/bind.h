// bind.h: the list of functions that a native module hands to Python, each of addresses and numbers alone.
// bind_cpu.cpp and bind_cuda.cpp write the list and know nothing of Python; bind_module.cpp, the one file that pays for
// pybind11's headers, makes the module of it. A signature costs a row of conversions here, a class of calls there.
#pragma once
#include <cstdint>
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

// A number from Python: an integer of 64 bits, signed or not (an address, too), or a float, which is none.
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

// What a function gives back: nothing, a number, or an object whose address other functions of the module take.
struct Result {
    enum Kind { kNone, kBoolean, kInteger, kObject } kind = kNone;
    int64_t integer = 0;
    void* object = nullptr;
    void (*release)(void*) = nullptr;
};

template <typename T>
Result object_of(T value) {
    return {Result::kObject, 0, new T(std::move(value)), [](void* object) { delete static_cast<T*>(object); }};
}

using AnyFunction = void (*)();
using Call = Result (*)(AnyFunction, const Number*);

struct Function {
    std::string name;
    AnyFunction function;
    Call call;
    int n_arguments;
};
using Functions = std::vector<Function>;

// All that the module hands on: defined by bind_cpu.cpp or bind_cuda.cpp, whichever is linked.
Functions module_functions();

template <typename Given, typename... Parameters, size_t... Index>
Result call_with(AnyFunction any, const Number* given, std::index_sequence<Index...>) {
    const auto function = reinterpret_cast<Given (*)(Parameters...)>(any);
    if constexpr (std::is_void_v<Given>) {
        function(given[Index].template as<Parameters>()...);
        return {};
    } else {
        Given result = function(given[Index].template as<Parameters>()...);
        if constexpr (std::is_same_v<Given, Result>) return result;
        else return {std::is_same_v<Given, bool> ? Result::kBoolean : Result::kInteger, static_cast<int64_t>(result)};
    }
}

template <typename Given, typename... Parameters>
void define(Functions& functions, const std::string& name, Given (*function)(Parameters...)) {
    static_assert(sizeof...(Parameters) <= kMaxArguments, "raise kMaxArguments");
    const Call call = [](AnyFunction any, const Number* given) {
        return call_with<Given, Parameters...>(any, given, std::index_sequence_for<Parameters...>());
    };
    functions.push_back({name, reinterpret_cast<AnyFunction>(function), call, sizeof...(Parameters)});
}

// `lambda` captures nothing; it takes addresses (uintptr_t) and numbers and runs without the interpreter's lock.
template <typename Lambda>
void define(Functions& functions, const std::string& name, Lambda lambda) {
    define(functions, name, +lambda);
}

}  // namespace xrdfast
