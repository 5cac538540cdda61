// compiler.h: what the CPU kernels ask of the compiler: inlining, and code for several levels of instruction set. Not for
// device code.
#pragma once

#define XRDFAST_INLINE inline __attribute__((always_inline))

// Wheels built ahead of time run on any x86-64: hot loops are cloned per instruction-set level and picked at load.
// Built just in time, -march=native makes the clones pointless; under a sanitizer the resolver must not run.
#if defined(XRDFAST_AOT) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define XRDFAST_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define XRDFAST_MULTIVERSION  // one instance per level, chosen at run time
#else
#define XRDFAST_CLONES
#endif
