// thread_own.h: workspaces that a thread keeps from call to call.
#pragma once
#include <memory>

namespace xrdfast {

// The calling thread's own T, made at its first use. Behind a pointer: the place of a plain thread_local is looked up at
// every access, in inner loops too, once the compiler has seen where a reference comes from.
template <typename T>
T& thread_own() {
    static thread_local std::unique_ptr<T> own;
    if (!own) own = std::make_unique<T>();
    return *own;
}

}  // namespace xrdfast
