// Replaces CUDA when the kernels are compiled for the CPU: the names of CUDA's headers and of csrc/cuda/ptx.cuh that the
// kernels use. Results equal those of a GPU up to rounding. An error in a kernel shows as NaN, as results that differ
// between schedules, or as an exception.
//
// Not modelled: races between warps finer than whole stretches between barriers, memory order, launch bounds,
// registers, static shared memory of more than 48 KiB, clocks, streams.
#pragma once

#include <math.h>  // with float overloads of plain names, as in CUDA
#include <tuple>
#include <utility>

#include "block.h"
#include "numbers.h"
#include "warp.h"

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static thread_local  // see block.h

inline constexpr const uint3& threadIdx = lfcc::emulation::machine.thread_index;
inline constexpr const uint3& blockIdx = lfcc::emulation::machine.block_index;
inline constexpr const dim3& blockDim = lfcc::emulation::machine.block_size;
inline constexpr const dim3& gridDim = lfcc::emulation::machine.grid_size;

// ---- the runtime

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
typedef struct CUstream_st* cudaStream_t;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount || device != 0) return cudaErrorInvalidValue;
  *value = 2;
  return cudaSuccess;
}

// ---- the language; `line` is the line of the call

inline void __syncthreads(int line = __builtin_LINE()) { lfcc::emulation::barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  lfcc::emulation::vote(lfcc::emulation::sync, mask, false, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return lfcc::emulation::vote(lfcc::emulation::ballot, mask, predicate != 0, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return lfcc::emulation::vote(lfcc::emulation::any, mask, predicate != 0, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return lfcc::emulation::vote(lfcc::emulation::all, mask, predicate == 0, line) == 0;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = lfcc::emulation::machine.lane(), from = (lane & -width) | (source & (width - 1));
  return lfcc::emulation::shuffle(lfcc::emulation::shuffle_from, mask, value, from, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = lfcc::emulation::machine.lane(), from = lane ^ bits, last = lane | (width - 1);
  return lfcc::emulation::shuffle(lfcc::emulation::shuffle_xor, mask, value, from <= last ? from : lane, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = lfcc::emulation::machine.lane(), from = lane + static_cast<int>(delta), last = lane | (width - 1);
  return lfcc::emulation::shuffle(lfcc::emulation::shuffle_down, mask, value, from <= last ? from : lane, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = lfcc::emulation::machine.lane(), from = lane - static_cast<int>(delta), first = lane & -width;
  return lfcc::emulation::shuffle(lfcc::emulation::shuffle_up, mask, value, from >= first ? from : lane, line);
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }

// If one argument is NaN, returns the other.
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

// ---- ptx.cuh

namespace lfcc::cuda {

inline unsigned char* dynamic_shared() { return emulation::machine.shared; }

template <typename... Parameters, typename... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
    const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto call = [kernel, values = std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)] {
    std::apply(kernel, values);
  };
  emulation::run_grid(
      name, grid, threads, shared_bytes, [](const void* what) { (*static_cast<decltype(&call)>(what))(); }, &call);
}

inline void copy_async_16(void* shared, const void* global, int line = __builtin_LINE()) {
  emulation::copy_async(shared, global, 16, line);
}
inline void copy_async_8(void* shared, const void* global, int line = __builtin_LINE()) {
  emulation::copy_async(shared, global, 8, line);
}
inline void copy_async_4(void* shared, const void* global, int line = __builtin_LINE()) {
  emulation::copy_async(shared, global, 4, line);
}
inline void commit_copies() { ++emulation::machine.thread->groups; }
template <int pending>
void wait_copies() {
  emulation::wait_copies(pending);
}

inline void load_matrices(uint32_t (&result)[4], const void* row, int line = __builtin_LINE()) {
  emulation::load(emulation::ldmatrix, result, row, line);
}
inline void load_matrices_transposed(uint32_t (&result)[4], const void* row, int line = __builtin_LINE()) {
  emulation::load(emulation::ldmatrix_transposed, result, row, line);
}

inline void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16, int line = __builtin_LINE()) {
  emulation::multiply_add_pairs(
      emulation::mma_bfloat16, d, a, b, [](uint32_t pair) { return __uint_as_float(pair << 16); },
      [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }, line);
}
inline void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half, int line = __builtin_LINE()) {
  emulation::multiply_add_pairs(
      emulation::mma_half, d, a, b, [](uint32_t pair) { return __half2float({static_cast<uint16_t>(pair)}); },
      [](uint32_t pair) { return __half2float({static_cast<uint16_t>(pair >> 16)}); }, line);
}
inline void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float, int line = __builtin_LINE()) {
  emulation::multiply_add_tf32(d, a, b, line);
}
inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace lfcc::cuda

// ---- for tests

extern "C" {

// The order of blocks, warps and threads: 0 ascending, 1 descending, otherwise shuffled again after every barrier.
__attribute__((used, visibility("default"))) inline void lfcc_emulation_schedule(unsigned schedule) {
  lfcc::emulation::machine.schedule = schedule;
}
// The largest dynamic shared memory with which a kernel was launched since the last call, 0 if it was not launched.
__attribute__((used, visibility("default"))) inline size_t lfcc_emulation_shared_bytes(const char* kernel) {
  return std::exchange(lfcc::emulation::machine.shared_bytes_of[kernel], 0);
}

}
