// What the kernels need of CUDA beyond the language: launches that are checked, and the PTX of sm_80 behind functions.
//
// The same sources compile for the CPU with -DLFCC_EMULATED, where tests/emulation/cuda_emulation.h takes the place of
// CUDA's headers and of the PTX here. So a kernel keeps to what both have: no <<< >>>, no extern __shared__, no asm.
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

#include "accumulator.h"

// Functions of both sides.
#define LFCC_HOST_DEVICE __host__ __device__

namespace lfcc::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("lfcc: ") + what + ": " + cudaGetErrorString(error));
}

// Multiprocessors of the current device, for kernels whose blocks take one piece of work after the other.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

#ifdef __CUDACC__  // not for the C++ compiler, which has the bindings

// The dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char lfcc_dynamic_shared[];
  return lfcc_dynamic_shared;
}

// Arguments are converted to the kernel's own types. A grid without blocks launches nothing.
template <typename... Parameters, typename... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
    const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 << 10)  // more must be asked for
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), name);
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), name);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies global memory to shared memory beside the computation; both addresses are multiples of the bytes copied.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_8(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;\n" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `pending` of this thread's newest groups are under way; others see them after a barrier.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of two-byte elements from shared memory; thread t gives the address of row t % 8 of matrix
// t / 8 (16 bytes, aligned), and gets of each matrix elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4, or with
// `transposed` those of the transposed matrix. PTX ISA, ldmatrix.
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b with a of 16 x 16, b of 16 x 8, sums in float32. PTX ISA, mma.m16n8k16: with g = lane / 4 and t = lane % 4,
// a holds rows g, g + 8 (registers 0, 1) of columns 2t, 2t + 1 and the same of columns + 8 (registers 2, 3), b rows
// 2t, 2t + 1 and these + 8 of column g, d columns 2t, 2t + 1 of rows g (0, 1) and g + 8 (2, 3).
__device__ __forceinline__ void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with a of 16 x 8 and b of 8 x 8 in TF32, the upper 19 bits of float32. PTX ISA, mma.m16n8k8: a holds rows g,
// g + 8 of column t and the same of column t + 4, b rows t and t + 4 of column g.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// 2^x to 22 bits in one instruction, where exp2f takes four; below 2^-126 zero. PTX ISA, ex2.approx.ftz.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

#endif

// To the type in which sums are taken, and back (rounded to nearest even).
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T narrow(acc_t<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// Element types as launchers take them, which know no torch.
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

constexpr int warp_size = 32;

}  // namespace lfcc::cuda
