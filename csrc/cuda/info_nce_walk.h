// The way of a block of own rows over tiles of the other side, for csrc/cuda/info_nce_fused.cu: what lies in shared
// memory, the copies of the next tile beside the work on this one, and logits from products.
#pragma once

#include "cuda/info_nce.h"
#include "cuda/info_nce_tiles.h"

namespace lfcc::cuda {

constexpr float lowest = -3.402823466e38f;  // for what is left out: finite, so that 0 times it is 0

template <typename Tiles>
struct Shared {
  unsigned char own[block_rows * Tiles::pitch], other[2][Tiles::columns * Tiles::pitch];
  int64_t own_ids[block_rows], other_ids[2][Tiles::columns];
  float other_factors[2][Tiles::columns], other_grads[2][Tiles::columns], other_lse[2][Tiles::columns];
  float own_factors[block_rows], own_grads[block_rows], own_lse[block_rows];
  float positives[block_rows];  // logits, or in the gradient weights
};

// Copies rows first..., as many as are there; zeros stand for the others, that no NaN comes out of them.
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

// Copies from[at] to `to`, or puts there what stands for it where there is none.
__device__ __forceinline__ void copy_number(float& to, const float* from, int64_t at, int64_t count, float otherwise) {
  if (at >= 0 && at < count)
    copy_async_4(&to, &from[at]);
  else
    to = otherwise;
}

// A thread on its way over the tiles.
template <typename Tiles, bool with_sums>
struct Walk {
  static constexpr int blocks = Tiles::columns / 8;
  // Steps whose own operands stay in registers, as far as there is room; those of the others are loaded every time.
  static constexpr int room = (144 - (with_sums ? Tiles::width : 0)) / 8;
  static constexpr int kept = Tiles::split ? 0 : room < Tiles::steps ? room : Tiles::steps;

  Shared<Tiles>& shared = *reinterpret_cast<Shared<Tiles>*>(dynamic_shared());
  const Fused& fused;
  const int lane = threadIdx.x % warp_size, warp_row = threadIdx.x / warp_size * warp_rows;
  int64_t first_column = int64_t(blockIdx.y) * Tiles::columns;  // of the tile
  int buffer = 0;
  Operand<Tiles, 4> own[kept + 1][2];  // the last for those that are loaded

  __device__ __forceinline__ explicit Walk(const Fused& fused) : fused(fused) {}

  // Of the block's rows the one that the thread's numbers [m][...][2 r + c] are of.
  __device__ __forceinline__ int row(int m, int r) const { return warp_row + m * 16 + r * 8 + lane / 4; }
  // Of the tile's columns the one of its first number; others are at constant distances, which take no registers.
  __device__ __forceinline__ int column() const { return lane % 4 * 2; }
  __device__ __forceinline__ float2 of_columns(const float* numbers, int j) const {
    return *reinterpret_cast<const float2*>(numbers + column() + j * 8);
  }

  // Calls body(m, r, row) for the rows of the thread.
  template <typename Body>
  __device__ __forceinline__ void for_rows(const Body& body) const {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) body(m, r, row(m, r));
  }
  // The row among all own rows, and in results.
  __device__ __forceinline__ int64_t own_row(int row) const { return int64_t(blockIdx.x) * block_rows + row; }
  __device__ __forceinline__ int64_t place(int row) const { return blockIdx.y * fused.own_count + own_row(row); }
  __device__ __forceinline__ bool is_there(int row) const { return own_row(row) < fused.own_count; }

  // Copies own rows and the first tile, and what copy_row(row) and copy_column(thread, column, buffer) add. Own rows
  // have come then.
  template <typename CopyRow, typename CopyColumn>
  __device__ __forceinline__ void begin(const CopyRow& copy_row, const CopyColumn& copy_column) {
    const int thread = threadIdx.x;
    copy_rows<Tiles, block_rows>(shared.own, fused.own, own_row(0), fused.own_count);
    copy_number(shared.own_factors[thread], fused.own_factors, own_row(thread), fused.own_count, 0);
    if (fused.own_ids && is_there(thread)) copy_async_8(&shared.own_ids[thread], &fused.own_ids[own_row(thread)]);
    copy_row(thread);
    commit_copies();
    copy_tile(first_column, 0, copy_column);
    wait_copies<1>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kept; ++step)
      load_own<Tiles>(own[step], shared.own + warp_row * Tiles::pitch, lane, step);
  }

  // Calls on_tile() for each tile of the share, and copies the next one meanwhile.
  template <typename CopyColumn, typename OnTile>
  __device__ __forceinline__ void over_tiles(const CopyColumn& copy_column, const OnTile& on_tile) {
    const int64_t step = int64_t(gridDim.y) * Tiles::columns;
    for (; first_column < fused.other_count; first_column += step, buffer ^= 1) {
      wait_copies<0>();
      __syncthreads();  // all have seen the last tile, and see this one
      copy_tile(first_column + step, buffer ^ 1, copy_column);
      on_tile();
    }
    wait_copies<0>();
  }

  template <typename CopyColumn>
  __device__ __forceinline__ void copy_tile(int64_t first, int buffer, const CopyColumn& copy_column) const {
    if (first < fused.other_count) {
      copy_rows<Tiles, Tiles::columns>(shared.other[buffer], fused.other, first, fused.other_count);
      const int thread = threadIdx.x;
      const int64_t column = first + thread;
      if (thread < Tiles::columns) {
        copy_number(shared.other_factors[buffer][thread], fused.other_factors, column, fused.other_count, 0);
        if (fused.other_ids && column < fused.other_count)
          copy_async_8(&shared.other_ids[buffer][thread], &fused.other_ids[column]);
        copy_column(thread, column, buffer);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void multiply(Numbers<Tiles::columns>& products) {
    multiply_rows<Tiles>(products, shared.other[buffer], lane, [&](int step) -> const Operand<Tiles, 4>(&)[2] {
      const int at = step < kept ? step : kept;
      if (at == kept) load_own<Tiles>(own[at], shared.own + warp_row * Tiles::pitch, lane, step);
      return own[at];
    });
  }

  // The column of the tile that is the positive of the block's first row; the other rows' follow.
  __device__ __forceinline__ int64_t positive() const { return own_row(0) + fused.shift - first_column; }
  // Whether the tile has positives of the warp's rows.
  __device__ __forceinline__ bool has_positives() const {
    return positive() + warp_row > -warp_rows && positive() + warp_row < Tiles::columns;
  }
  __device__ __forceinline__ int end() const {
    return static_cast<int>(min(fused.other_count - first_column, int64_t(Tiles::columns)));
  }
  // Columns of the rows' positives, where there are some, counted from the thread's first; below 0 where not in the
  // tile.
  __device__ __forceinline__ void find_positives(int (&columns)[2][2]) const {
    const int first = static_cast<int>(positive());
    for_rows([&](int m, int r, int row) { columns[m][r] = first + row < end() ? first + row - column() : -1; });
  }

  // Turns products into products times other factor, which times own scale are logits. Those that are left out become
  // `lowest`: positives, which go to on_positive(m, r, row, column, product), equal ids, what is past the end.
  template <typename OnPositive>
  __device__ __forceinline__ void to_logits(Numbers<Tiles::columns>& numbers, const OnPositive& on_positive) const {
    const float* factors = shared.other_factors[buffer];
    if (has_positives() || end() < Tiles::columns) {
      int positives[2][2] = {{-1, -1}, {-1, -1}};
      if (has_positives()) find_positives(positives);
      float products[2][2] = {};
      for_numbers<blocks>(0, [&](int m, int j, int i) {
        const int at = j * 8 + i % 2;
        float& number = numbers[m][j][i];
        if (at == positives[m][i / 2]) products[m][i / 2] = number;
        const bool left_out = at == positives[m][i / 2] || at >= end() - column();
        number = left_out ? lowest : number * factors[column() + at];
      });
      for_rows([&](int m, int r, int row) {
        const int at = positives[m][r];
        if (at >= 0 && at % 8 < 2) on_positive(m, r, row, column() + at, products[m][r]);
      });
    } else {
      for_numbers<blocks>(0, [&](int m, int j, int i) {
        const float2 factor = of_columns(factors, j);
        numbers[m][j][i] *= i % 2 ? factor.y : factor.x;
      });
    }
    if (fused.other_ids)
      for_numbers<blocks>(0, [&](int m, int j, int i) {
        if (shared.own_ids[row(m, i / 2)] == shared.other_ids[buffer][column() + j * 8 + i % 2])
          numbers[m][j][i] = lowest;
      });
  }

  // Stores the sums of the share, times `by`.
  __device__ __forceinline__ void store(float* result, const Numbers<Tiles::width>& sums, float by) const {
    for_rows([&](int m, int r, int row) {
      if (!is_there(row)) return;
#pragma unroll
      for (int j = 0; j < Tiles::width / 8; ++j)
        *reinterpret_cast<float2*>(result + place(row) * Tiles::width + column() + j * 8) =
            make_float2(sums[m][j][2 * r] * by, sums[m][j][2 * r + 1] * by);
    });
  }
};

}  // namespace lfcc::cuda
