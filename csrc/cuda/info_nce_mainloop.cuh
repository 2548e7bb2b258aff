// The mainloop of csrc/cuda/info_nce_fused.cu, a block of q rows against tiles of k: shared memory, the copies of the
// next tile during the work on this one, and logits from products.
#pragma once

#include "cuda/info_nce.h"
#include "cuda/info_nce_mma.cuh"

namespace lfcc::cuda {

constexpr float lowest = -3.402823466e38f;  // an excluded logit: finite, so that 0 times it is 0

template <typename Tiles>
struct Shared {
  unsigned char q[block_rows * Tiles::pitch], k[2][Tiles::columns * Tiles::pitch];
  int64_t q_ids[block_rows], k_ids[2][Tiles::columns];
  float k_factors[2][Tiles::columns], k_grads[2][Tiles::columns], k_lse[2][Tiles::columns];
  float q_factors[block_rows], q_grads[block_rows], q_lse[block_rows];
  float positives[block_rows];  // logits, or in the gradient weights
};

// Copies `rows` rows from `first` on. Rows past `count` become zeros, because stale values could be NaN.
template <typename Tiles, int rows>
__device__ __forceinline__ void copy_rows(unsigned char* to, const void* from, int64_t first, int64_t count) {
  constexpr int pieces = Tiles::row_bytes / 16, step = tile_threads / pieces;
  const int row = threadIdx.x / pieces, place = threadIdx.x % pieces * 16;
  const unsigned char* source = static_cast<const unsigned char*>(from) + (first + row) * Tiles::row_bytes + place;
  unsigned char* target = to + row * Tiles::pitch + place;
  if (count - first >= rows) {
#pragma unroll
    for (int i = 0; i < rows; i += step) copy_async_16(target + i * Tiles::pitch, source + i * Tiles::row_bytes);
  } else {
#pragma unroll 1
    for (int i = 0; i < rows; i += step) {
      if (row + i < count - first)
        copy_async_16(target + i * Tiles::pitch, source + i * Tiles::row_bytes);
      else
        *reinterpret_cast<uint4*>(target + i * Tiles::pitch) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Copies from[at] to `to`, or stores `outside` there if `at` is not in [0, count).
__device__ __forceinline__ void copy_value(float& to, const float* from, int64_t at, int64_t count, float outside) {
  if (at >= 0 && at < count)
    copy_async_4(&to, &from[at]);
  else
    to = outside;
}

// The state of a thread in the loop.
template <typename Tiles, bool with_acc>
struct Mainloop {
  static constexpr int blocks = Tiles::columns / 8;
  // Steps whose q fragments stay in registers, as many as fit; those of the other steps are loaded for every tile.
  static constexpr int room = (144 - (with_acc ? Tiles::width : 0)) / 8;
  static constexpr int in_registers = Tiles::split ? 0 : room < Tiles::k_steps ? room : Tiles::k_steps;

  Shared<Tiles>& shared = *reinterpret_cast<Shared<Tiles>*>(dynamic_shared());
  const Fused& fused;
  const int lane = threadIdx.x % warp_size, warp_row = threadIdx.x / warp_size * warp_rows;
  int64_t first_column = int64_t(blockIdx.y) * Tiles::columns;  // of the tile
  int buffer = 0;
  Fragment<Tiles, 4> q[in_registers + 1][2];  // the last one for those that are loaded

  __device__ __forceinline__ explicit Mainloop(const Fused& fused) : fused(fused) {}

  // The row of the block to which the thread's elements [m][...][2 r + c] belong.
  __device__ __forceinline__ int row(int m, int r) const { return warp_row + m * 16 + r * 8 + lane / 4; }
  // The column of the tile of its first element; the others are at constant distances, which take no registers.
  __device__ __forceinline__ int column() const { return lane % 4 * 2; }
  __device__ __forceinline__ float2 of_columns(const float* values, int j) const {
    return *reinterpret_cast<const float2*>(values + column() + j * 8);
  }

  // Calls body(m, r, row) for the rows of the thread.
  template <typename Body>
  __device__ __forceinline__ void for_rows(const Body& body) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) body(m, r, row(m, r));
  }
  // The row of q, and its place in outputs with splits.
  __device__ __forceinline__ int64_t q_row(int row) const { return int64_t(blockIdx.x) * block_rows + row; }
  __device__ __forceinline__ int64_t place(int row) const { return blockIdx.y * fused.q_count + q_row(row); }
  __device__ __forceinline__ bool inside(int row) const { return q_row(row) < fused.q_count; }

  // Copies the rows of q and the first tile, and what copy_row(row) and copy_column(thread, column, buffer) add.
  // Returns when q has arrived.
  template <typename CopyRow, typename CopyColumn>
  __device__ __forceinline__ void begin(const CopyRow& copy_row, const CopyColumn& copy_column) {
    const int thread = threadIdx.x;
    copy_rows<Tiles, block_rows>(shared.q, fused.q, q_row(0), fused.q_count);
    copy_value(shared.q_factors[thread], fused.q_factors, q_row(thread), fused.q_count, 0);
    if (fused.q_ids && inside(thread)) copy_async_8(&shared.q_ids[thread], &fused.q_ids[q_row(thread)]);
    copy_row(thread);
    commit_copies();
    copy_tile(first_column, 0, copy_column);
    wait_copies<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < in_registers; ++step)
      load_q<Tiles>(q[step], shared.q + warp_row * Tiles::pitch, lane, step);
  }

  // Calls on_tile() for each tile of the split while the next one is copied.
  template <typename CopyColumn, typename OnTile>
  __device__ __forceinline__ void over_tiles(const CopyColumn& copy_column, const OnTile& on_tile) {
    const int64_t step = int64_t(gridDim.y) * Tiles::columns;
    for (; first_column < fused.k_count; first_column += step, buffer ^= 1) {
      wait_copies<0>();
      __syncthreads();  // this tile is visible to all, and all are done with the last one
      copy_tile(first_column + step, buffer ^ 1, copy_column);
      on_tile();
    }
    wait_copies<0>();
  }

  template <typename CopyColumn>
  __device__ __forceinline__ void copy_tile(int64_t first, int buffer, const CopyColumn& copy_column) const {
    if (first < fused.k_count) {
      copy_rows<Tiles, Tiles::columns>(shared.k[buffer], fused.k, first, fused.k_count);
      const int thread = threadIdx.x;
      const int64_t column = first + thread;
      if (thread < Tiles::columns) {
        copy_value(shared.k_factors[buffer][thread], fused.k_factors, column, fused.k_count, 0);
        if (fused.k_ids && column < fused.k_count) copy_async_8(&shared.k_ids[buffer][thread], &fused.k_ids[column]);
        copy_column(thread, column, buffer);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void multiply(AccFragment<Tiles::columns>& qk) {
    multiply_qk<Tiles>(qk, shared.k[buffer], lane, [&](int step) -> const Fragment<Tiles, 4>(&)[2] {
      const int at = step < in_registers ? step : in_registers;
      if (at == in_registers) load_q<Tiles>(q[at], shared.q + warp_row * Tiles::pitch, lane, step);
      return q[at];
    });
  }

  // The column of the tile that is the positive of the block's first row; those of the other rows follow.
  __device__ __forceinline__ int64_t positive() const { return q_row(0) + fused.shift - first_column; }
  // Whether the tile has positives of the warp's rows.
  __device__ __forceinline__ bool has_positives() const {
    return positive() + warp_row > -warp_rows && positive() + warp_row < Tiles::columns;
  }
  __device__ __forceinline__ int end() const {
    return static_cast<int>(min(fused.k_count - first_column, int64_t(Tiles::columns)));
  }
  // Columns of the positives of the thread's rows, relative to the thread's first column; negative outside the tile.
  __device__ __forceinline__ void find_positives(int (&columns)[2][2]) const {
    const int first = static_cast<int>(positive());
    for_rows([&](int m, int r, int row) { columns[m][r] = first + row < end() ? first + row - column() : -1; });
  }

  // Multiplies products by the factors of k; times the rows' scale they are logits. Excluded ones become `lowest`:
  // equal ids, columns past the end, and positives, whose product goes to on_positive(m, r, row, column, product).
  template <typename OnPositive>
  __device__ __forceinline__ void to_logits(AccFragment<Tiles::columns>& qk, const OnPositive& on_positive) const {
    const float* factors = shared.k_factors[buffer];
    if (has_positives() || end() < Tiles::columns) {
      int positives[2][2] = {{-1, -1}, {-1, -1}};
      if (has_positives()) find_positives(positives);
      float products[2][2] = {};
      for_elements<blocks>(0, [&](int m, int j, int i) {
        const int at = j * 8 + i % 2;
        float& value = qk[m][j][i];
        if (at == positives[m][i / 2]) products[m][i / 2] = value;
        const bool excluded = at == positives[m][i / 2] || at >= end() - column();
        value = excluded ? lowest : value * factors[column() + at];
      });
      for_rows([&](int m, int r, int row) {
        const int at = positives[m][r];
        if (at >= 0 && at % 8 < 2) on_positive(m, r, row, column() + at, products[m][r]);
      });
    } else {
      for_elements<blocks>(0, [&](int m, int j, int i) {
        const float2 factor = of_columns(factors, j);
        qk[m][j][i] *= i % 2 ? factor.y : factor.x;
      });
    }
    if (fused.k_ids)
      for_elements<blocks>(0, [&](int m, int j, int i) {
        if (shared.q_ids[row(m, i / 2)] == shared.k_ids[buffer][column() + j * 8 + i % 2]) qk[m][j][i] = lowest;
      });
  }

  // Stores acc of the split, times `scale`.
  __device__ __forceinline__ void store(float* result, const AccFragment<Tiles::width>& acc, float scale) const {
    for_rows([&](int m, int r, int row) {
      if (!inside(row)) return;
#pragma unroll
      for (int j = 0; j < Tiles::width / 8; ++j)
        *reinterpret_cast<float2*>(result + place(row) * Tiles::width + column() + j * 8) =
            make_float2(acc[m][j][2 * r] * scale, acc[m][j][2 * r + 1] * scale);
    });
  }
};

}  // namespace lfcc::cuda
