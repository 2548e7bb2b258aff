// Threads that work on one row together: one warp or several, as many as its length is worth.
#pragma once

#include "cuda/platform.h"

namespace lfcc::cuda {

// Elements that are read or written together, by default as many as 16 bytes hold.
template <typename T, int count = 16 / sizeof(T)>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Vector {
  T values[count];
};

LFCC_HOST_DEVICE inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

constexpr int most_lanes = 512;

// Threads for rows of `length`, of which each takes `share` elements at a time; `block` threads are a multiple.
inline int lanes_for(int64_t length, int share, int block) {
  int lanes = warp_size;
  while (lanes < block && int64_t(lanes) * share < length) lanes *= 2;
  return lanes;
}

// Blocks of so many threads for teams of so many lanes, each with a row.
inline dim3 blocks_for(int64_t rows, int lanes, int block) {
  return dim3(static_cast<unsigned>((rows + block / lanes - 1) / (block / lanes)));
}

// The team of a thread. All threads of a block take part in its sums and maxima, also those without a row.
struct Team {
  int lanes, lane;
  int64_t row;

  __device__ __forceinline__ explicit Team(int lanes)
      : lanes(lanes), lane(threadIdx.x % lanes),
        row(int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes) {}

  template <typename A>
  __device__ __forceinline__ A sum(A value) const {
    return combine(value, [](A x, A y) { return x + y; });
  }

  // Of those that are numbers.
  template <typename A>
  __device__ __forceinline__ A maximum(A value) const {
    return combine(value, [](A x, A y) { return fmax(x, y); });
  }

 private:
  template <typename A, typename Operation>
  __device__ __forceinline__ A combine(A value, Operation operation) const {
    __shared__ A of_warps[most_lanes / warp_size];
    for (int offset = warp_size / 2; offset > 0; offset /= 2)
      value = operation(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (lanes == warp_size) return value;
    const int warp = threadIdx.x / warp_size, first = warp - lane / warp_size;
    if (lane % warp_size == 0) of_warps[warp] = value;
    __syncthreads();
    value = of_warps[first];
    for (int i = 1; i < lanes / warp_size; ++i) value = operation(value, of_warps[first + i]);
    __syncthreads();  // before the next one writes
    return value;
  }
};

}  // namespace lfcc::cuda
