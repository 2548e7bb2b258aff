// Groups of threads that share one row: one warp or several, depending on the row's length.
#pragma once

#include "cuda/ptx.cuh"

namespace lfcc::cuda {

// Elements that are loaded or stored at once, 16 bytes by default.
template <typename T, int count = 16 / sizeof(T)>
struct alignas(sizeof(T) * count < 16 ? sizeof(T) * count : 16) Vector {
  T values[count];
};

LFCC_HOST_DEVICE inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

constexpr int max_group_size = 512;

// Size of a group for rows of `length` if a thread processes `elements` per step; `block` threads are a multiple of it.
inline int group_size_for(int64_t length, int elements, int block) {
  int size = warp_size;
  while (size < block && int64_t(size) * elements < length) size *= 2;
  return size;
}

// Blocks of `block` threads for one group of `size` threads per row.
inline dim3 blocks_for(int64_t rows, int size, int block) {
  return dim3(static_cast<unsigned>((rows + block / size - 1) / (block / size)));
}

// The group of a thread. All threads of a block take part in its reductions, also those without a row.
struct ThreadGroup {
  int size, rank;
  int64_t row;

  __device__ __forceinline__ explicit ThreadGroup(int size)
      : size(size), rank(threadIdx.x % size),
        row(int64_t(blockIdx.x) * (blockDim.x / size) + threadIdx.x / size) {}

  template <typename A>
  __device__ __forceinline__ A sum(A value) const {
    return reduce(value, [](A x, A y) { return x + y; });
  }

  // Ignores NaN.
  template <typename A>
  __device__ __forceinline__ A max(A value) const {
    return reduce(value, [](A x, A y) { return fmax(x, y); });
  }

 private:
  template <typename A, typename Operation>
  __device__ __forceinline__ A reduce(A value, Operation operation) const {
    __shared__ A warp_values[max_group_size / warp_size];
    for (int offset = warp_size / 2; offset > 0; offset /= 2)
      value = operation(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (size == warp_size) return value;
    const int warp = threadIdx.x / warp_size, first = warp - rank / warp_size;
    if (rank % warp_size == 0) warp_values[warp] = value;
    __syncthreads();
    value = warp_values[first];
    for (int i = 1; i < size / warp_size; ++i) value = operation(value, warp_values[first + i]);
    __syncthreads();  // before the next reduction writes
    return value;
  }
};

}  // namespace lfcc::cuda
