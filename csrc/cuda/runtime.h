// The CUDA runtime as host code needs it: headers, checked calls, and element types for launchers without torch.
//
// With -DLFCC_EMULATED the same sources compile for the CPU, and tests/emulation/cuda_emulation.h replaces CUDA's
// headers and the functions in ptx.cuh. Kernels therefore avoid <<< >>>, extern __shared__ and inline asm.
#pragma once

#ifdef LFCC_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lfcc::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("lfcc: ") + what + " failed: " + cudaGetErrorString(error));
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

enum class Type { float64, float32, bfloat16, float16 };

// Calls body(T()) with the element type that `type` names.
template <typename Body>
void for_type(Type type, const Body& body) {
  switch (type) {
    case Type::float64: return body(double());
    case Type::float32: return body(float());
    case Type::bfloat16: return body(__nv_bfloat16());
    case Type::float16: return body(__half());
  }
}

}  // namespace lfcc::cuda
