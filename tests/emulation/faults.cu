// Small kernels whose results are known, and kernels with faults that the emulation must find: test_emulation.py.
#include "cuda/ptx.cuh"

namespace {

using lfcc::acc_t;
using lfcc::cuda::launch;

constexpr unsigned all_lanes = ~0u;

__device__ float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(all_lanes, value, distance);
  return value;
}

// One sum per block.
__global__ void __launch_bounds__(1024) block_sum_kernel(const float* x, float* sums, int64_t fours) {
  __shared__ float of_warp[32];
  const float4* x4 = reinterpret_cast<const float4*>(x);
  float sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < fours; i += int64_t(gridDim.x) * blockDim.x) {
    const float4 four = __ldg(x4 + i);
    sum += (four.x + four.y) + (four.z + four.w);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = warp_sum(threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

enum Fault {
  none,
  no_barrier,
  no_warp_barrier,
  past_shared,
  no_wait,
  weak_wait,
  never_waited,
  misaligned_copy,
  copy_from_shared,
  divergent_barrier,
  two_barriers,
  two_operations,
  lane_missing,
  lane_not_in_mask,
  misaligned_matrix,
  half_a_warp,
};

// Log-sum-exp of a row in shared memory.
__global__ void row_lse_kernel(const float* x, float* lse, int width, Fault fault) {
  float* row = reinterpret_cast<float*>(lfcc::cuda::dynamic_shared());
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = x[blockIdx.x * width + i];
  if (fault != no_barrier) __syncthreads();
  float peak = -INFINITY;
  for (int i = 0; i < width + (fault == past_shared); ++i) peak = max(peak, row[i]);
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += blockDim.x) row[i] = __expf(row[i] - peak);
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < width; ++i) sum += row[i];
  if (threadIdx.x == 0) lse[blockIdx.x] = peak + logf(sum);
}

// Every warp reverses its 32 numbers through shared memory.
__global__ void turn_kernel(const float* x, float* result, Fault fault) {
  __shared__ float numbers[2][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  numbers[warp][lane] = x[threadIdx.x];
  if (fault != no_warp_barrier) __syncwarp();
  result[threadIdx.x] = numbers[warp][31 - lane];
}

// Reads shared memory that was not written.
__global__ void unwritten_kernel(float* result) {
  __shared__ float fixed[64];
  float* dynamic = reinterpret_cast<float*>(lfcc::cuda::dynamic_shared());
  result[(blockIdx.x * 2) * 64 + threadIdx.x] = fixed[threadIdx.x];
  result[(blockIdx.x * 2 + 1) * 64 + threadIdx.x] = dynamic[threadIdx.x];
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 1;
}

// The sum of tiles of 4 numbers per thread; the next tile is copied while one is added. Every thread adds the numbers
// that its neighbour copied.
__global__ void staged_sum_kernel(const float* x, float* result, int tiles, Fault fault) {
  float* stages = reinterpret_cast<float*>(lfcc::cuda::dynamic_shared());
  const int numbers = 4 * blockDim.x, neighbour = (threadIdx.x + 1) % blockDim.x;
  const auto copy = [&](int tile) {
    float* to = stages + tile % 2 * numbers + 4 * threadIdx.x;
    const float* from = fault == copy_from_shared ? stages : x + tile * numbers + 4 * threadIdx.x;
    if (tile < tiles) lfcc::cuda::copy_async_16(to + (fault == misaligned_copy), from);
    lfcc::cuda::commit_copies();
  };
  copy(0);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    copy(tile + 1);
    if (fault == weak_wait)
      lfcc::cuda::wait_copies<2>();
    else if (fault != no_wait)
      lfcc::cuda::wait_copies<1>();
    __syncthreads();
    const float4 four = reinterpret_cast<const float4*>(stages + tile % 2 * numbers)[neighbour];
    sum += (four.x + four.y) + (four.z + four.w);
    __syncthreads();
  }
  if (fault == never_waited) copy(0);
  if (fault == no_wait || fault == weak_wait) lfcc::cuda::wait_copies<0>();
  result[neighbour] = sum;
}

// Deadlocks and invalid operations.
__global__ void stuck_kernel(float* result, Fault fault) {
  const unsigned i = threadIdx.x;
  alignas(16) uint32_t matrices[4] = {};
  unsigned char* shared = lfcc::cuda::dynamic_shared();
  if (fault == divergent_barrier && i < 48) __syncthreads();
  if (fault == divergent_barrier && i >= 48) __ballot_sync(all_lanes, 1);
  if (fault == two_barriers && i < 32) __syncthreads();
  if (fault == two_barriers && i >= 32) __syncthreads();
  if (fault == two_operations && i % 2) __ballot_sync(all_lanes, 1);
  if (fault == two_operations && !(i % 2)) __any_sync(all_lanes, 1);
  if (fault == lane_missing && i != 5) __shfl_sync(all_lanes, i, 0);
  if (fault == lane_not_in_mask) __shfl_sync(0xffu, i, 0);
  if (fault == misaligned_matrix) lfcc::cuda::load_matrices(matrices, shared + 8);
  if (fault == half_a_warp) lfcc::cuda::load_matrices(matrices, shared);
  result[i] = static_cast<float>(matrices[0]);
}

// All exchanges between lanes, 12 results per lane.
__global__ void exchange_kernel(const float* x, float* result) {
  const int i = threadIdx.x;
  const float value = x[i];
  const unsigned half = i < 16 ? 0xffffu : 0xffff0000u;
  const float results[12] = {
      __shfl_sync(all_lanes, value, 5),
      __shfl_sync(all_lanes, value, i + 3, 8),
      __shfl_xor_sync(all_lanes, value, 3),
      __shfl_xor_sync(all_lanes, value, 16, 8),  // from a later group: its own value
      __shfl_down_sync(all_lanes, value, 7),
      __shfl_down_sync(all_lanes, value, 3, 8),
      __shfl_up_sync(all_lanes, value, 7),
      __shfl_up_sync(all_lanes, value, 3, 8),
      static_cast<float>(__ballot_sync(half, value > 0) >> (i & 16)),
      static_cast<float>(__any_sync(half, i == 20)),
      static_cast<float>(__all_sync(half, i < 16)),
      static_cast<float>(__shfl_sync(half, double(value), i & 16)),
  };
  for (int k = 0; k < 12; ++k) result[12 * i + k] = results[k];
}

// Rows of 16 bytes through shared memory, 4 results per lane.
template <bool transposed>
__global__ void matrices_kernel(const uint4* rows, uint32_t* result) {
  uint4* shared = reinterpret_cast<uint4*>(lfcc::cuda::dynamic_shared());
  shared[threadIdx.x] = rows[threadIdx.x];
  __syncwarp();
  uint32_t matrices[4];
  if (transposed)
    lfcc::cuda::load_matrices_transposed(matrices, shared + threadIdx.x);
  else
    lfcc::cuda::load_matrices(matrices, shared + threadIdx.x);
  for (int m = 0; m < 4; ++m) result[4 * threadIdx.x + m] = matrices[m];
}

// c (16, 8) += a (16, depth) b (depth, 8), fragments as in ptx.cuh.
template <typename T, int depth>
__global__ void product_kernel(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + i % 2 * 8;
    if constexpr (sizeof(T) == 2) {
      const T* pair = a + row * depth + 2 * t + i / 2 * 8;
      left[i] = pair[0].bits | uint32_t(pair[1].bits) << 16;
    } else {
      left[i] = __float_as_uint(a[row * depth + t + i / 2 * 4]);
    }
  }
  for (int i = 0; i < 2; ++i) {
    if constexpr (sizeof(T) == 2) {
      const T* pair = b + (2 * t + i * 8) * 8 + g;
      right[i] = pair[0].bits | uint32_t(pair[8].bits) << 16;
    } else {
      right[i] = __float_as_uint(b[(t + i * 4) * 8 + g]);
    }
  }
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  lfcc::cuda::multiply_add(d, left, right, T());
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// The message of the exception that `body` throws, or null.
template <typename Body>
const char* message_of(const Body& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* block_sum(const float* x, float* sums, int64_t fours, int blocks, int threads) {
  return message_of([&] { launch("block_sum", block_sum_kernel, blocks, threads, 0, nullptr, x, sums, fours); });
}
const char* row_lse(const float* x, float* lse, int rows, int width, int fault) {
  return message_of([&] {
    launch("row_lse", row_lse_kernel, rows, 96, width * sizeof(float), nullptr, x, lse, width, fault);
  });
}
const char* turn(const float* x, float* result, int fault) {
  return message_of([&] { launch("turn", turn_kernel, 1, 64, 0, nullptr, x, result, fault); });
}
const char* unwritten(float* result, int blocks) {
  return message_of([&] { launch("unwritten", unwritten_kernel, blocks, 64, 256, nullptr, result); });
}
const char* staged_sum(const float* x, float* result, int tiles, int fault) {
  return message_of([&] { launch("staged_sum", staged_sum_kernel, 1, 64, 2048, nullptr, x, result, tiles, fault); });
}
const char* stuck(float* result, int threads, int fault) {
  return message_of([&] { launch("stuck", stuck_kernel, 2, threads, 1024, nullptr, result, fault); });
}
const char* exchange(const float* x, float* result) {
  return message_of([&] { launch("exchange", exchange_kernel, 1, 32, 0, nullptr, x, result); });
}
const char* matrices(const uint4* rows, uint32_t* result, bool transposed) {
  return message_of([&] {
    launch(
        "matrices", transposed ? matrices_kernel<true> : matrices_kernel<false>, 1, 32, 512, nullptr, rows, result);
  });
}
const char* product(const void* a, const void* b, float* c, int type) {
  return message_of([&] {
    lfcc::cuda::for_type(static_cast<lfcc::cuda::Type>(type), [&](auto number) {
      using T = decltype(number);
      if constexpr (!std::is_same_v<T, double>)
        launch("product", product_kernel<T, 32 / sizeof(T)>, 1, 32, 0, nullptr, a, b, c);
    });
  });
}
// A launch beyond the limits of a GPU.
const char* oversized(int threads, int64_t bytes, int blocks) {
  return message_of([&] {
    launch("oversized", unwritten_kernel, dim3(1, blocks), threads, bytes, nullptr, nullptr);
  });
}

// Conversions of `count` numbers between float and `type`.
void narrow_all(const float* from, void* to, int64_t count, int type) {
  lfcc::cuda::for_type(static_cast<lfcc::cuda::Type>(type), [&](auto number) {
    using T = decltype(number);
    for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = lfcc::cuda::narrow<T>(from[i]);
  });
}
void widen_all(const void* from, float* to, int64_t count, int type) {
  lfcc::cuda::for_type(static_cast<lfcc::cuda::Type>(type), [&](auto number) {
    for (int64_t i = 0; i < count; ++i) to[i] = lfcc::cuda::widen(static_cast<const decltype(number)*>(from)[i]);
  });
}

}
#pragma GCC visibility pop
