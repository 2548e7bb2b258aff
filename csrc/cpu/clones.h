// The CPU levels that kernels are compiled for; the loader selects the best one that the CPU supports.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
// One build; the instruction set is selected when the library is loaded. Functions called by a clone must be inlined.
#define LFCC_CLONED
#define LFCC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define LFCC_CPU_LEVELS "baseline, AVX2, AVX-512"
#else
#define LFCC_CLONES
#define LFCC_CPU_LEVELS "baseline"
#endif
