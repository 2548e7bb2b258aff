// The device and stream on which the `cuda` overloads run, and their registration, for CUDA and for the emulation.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"
#include "cuda/runtime.h"

// Registers the function named like an op for its `cuda` overload, which Python calls, and for the default overload,
// whose schema is in csrc/bindings.cpp, so that C++ programs call one op for tensors on either device.
#ifdef LFCC_EMULATED
#define LFCC_CUDA_KEY CPU
#define LFCC_IMPLEMENT(library, op) library.impl(#op ".cuda", TORCH_BOX(&op))
#else
#define LFCC_CUDA_KEY CUDA
#define LFCC_IMPLEMENT(library, op) library.impl(#op ".cuda", TORCH_BOX(&op)).impl(#op, TORCH_BOX(&op))
// From libtorch_cuda; weak, so that the library also loads with a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace lfcc::cuda {

inline Type type_of(const Argument& argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Type::float64;
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: fail_dtype(argument, t);
  }
}

// Makes the tensor's device the current one until the end of the scope.
#ifdef LFCC_EMULATED
struct OnDevice {
  cudaStream_t stream = nullptr;
  explicit OnDevice(const Tensor&) {}
};
#else
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device()) {
    // Torch has its own copy of the CUDA runtime, with its own current device.
    check(cudaSetDevice(tensor.get_device()), "cudaSetDevice");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};
#endif

}  // namespace lfcc::cuda
