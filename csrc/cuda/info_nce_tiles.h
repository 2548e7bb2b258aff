// Products of row tiles on tensor cores, for csrc/cuda/info_nce_fused.cu.
//
// A block of 4 warps holds 128 own rows, a warp 32 of them, against tiles of the other side's. Rows lie 16 bytes
// further apart than they are long: so the 8 rows of a matrix, and the 32-bit words of an operand of TF32, are in
// different banks.
//
// A warp's numbers for 32 rows and n columns are float[2][n / 8][4] as mma leaves them: with g = lane / 4 and
// t = lane % 4, [m][j][2 r + c] is of row 16 m + 8 r + g and column 8 j + 2 t + c. They are the left operand of the
// next product as they lie: of two-byte types two neighbours are one register; of TF32 columns 2 t and 2 t + 1 take
// the places t and t + 4 of an operand and the right one's rows likewise, as the order of a sum's terms is free.
//
// Three products of TF32 make one of float32: each number is a big part and a small one, and two small ones are left
// out. Tensor cores cut off the end of a sum where others round it, so many terms of one sign lose more and more: sums
// of float32 are kept short, those with small parts apart, and put together by rounded additions.
//
// ldmatrix takes 4 cycles of shared memory for four matrices, which serve 4 mma as right operands, and as left ones as
// many as a tile has 8 columns: about 1 cycle an mma, or 1.4 where registers have no room for own rows.
#pragma once

#include <cstring>

#include "cuda/platform.h"

namespace lfcc::cuda {

constexpr int tile_threads = 128;
constexpr int warp_rows = 32;
constexpr int block_rows = tile_threads / warp_size * warp_rows;

// Rows of `width` T.
template <typename T, int width_>
struct RowTiles {
  using Element = T;
  static constexpr int width = width_;
  static constexpr int row_bytes = width * sizeof(T), pitch = row_bytes + 16;
  static constexpr int steps = row_bytes / 32;  // mma takes 32 bytes of a row at a time, of every type
  static constexpr bool split = sizeof(T) == 4;  // into a big and a small part
  // Rows of the other side in a tile: as many as registers have room for.
  static constexpr int columns = row_bytes == 128 ? 48 : 32;
};

// A warp's numbers for so many columns.
template <int columns>
using Numbers = float[2][columns / 8][4];

// Calls body(m, j, i) for each of a thread's numbers of `count` blocks from first on; all indices are constants.
template <int count, typename Body>
__device__ __forceinline__ void for_numbers(int first, const Body& body) {
#pragma unroll
  for (int j = 0; j < count; ++j)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(m, first + j, i);
}

// The same for two neighbours at a time, [m][j][2 r] and the next: body(m, j, r).
template <int count, typename Body>
__device__ __forceinline__ void for_neighbours(int first, const Body& body) {
#pragma unroll
  for (int j = 0; j < count; ++j)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) body(m, first + j, r);
}

// An operand of mma, of registers as they come from memory.
template <typename Tiles, int count>
struct Operand {
  uint32_t big[count], small[Tiles::split ? count : 1];

  __device__ __forceinline__ void set(int i, uint32_t bits) {
    if constexpr (Tiles::split) {
      // Rounded to the 11 bits of TF32, but that NaN is left to the small part, of which mma cuts what TF32 has not;
      // an integer sum where the instruction that rounds takes four steps.
      big[i] = (bits + 0x1000u) & ~0x1fffu;
      small[i] = __float_as_uint(__uint_as_float(bits) - __uint_as_float(big[i]));
    } else {
      big[i] = bits;
    }
  }
  __device__ __forceinline__ void set(int i, float value) { set(i, __float_as_uint(value)); }
  __device__ __forceinline__ void set(int i, float low, float high) {
    using T = typename Tiles::Element;
    const T neighbours[2] = {narrow<T>(low), narrow<T>(high)};
    uint32_t bits;
    memcpy(&bits, neighbours, sizeof bits);
    set(i, bits);
  }
};

// sums += a b, products with small parts to `small_sums`.
template <typename Tiles>
__device__ __forceinline__ void multiply_add_to(
    float (&sums)[4], float (&small_sums)[4], const Operand<Tiles, 4>& a, const Operand<Tiles, 2>& b) {
  using T = typename Tiles::Element;
  if constexpr (Tiles::split) {
    multiply_add(small_sums, a.big, b.small, T());
    multiply_add(small_sums, a.small, b.big, T());
  }
  multiply_add(sums, a.big, b.big, T());
}

// Left operands of a warp's rows at one step.
template <typename Tiles>
__device__ __forceinline__ void load_own(Operand<Tiles, 4> (&own)[2], const unsigned char* rows, int lane, int step) {
  rows += lane % 16 * Tiles::pitch + lane / 16 * 16 + step * 32;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t bits[4];
    load_matrices(bits, rows + m * 16 * Tiles::pitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) own[m].set(i, bits[i]);
  }
}

// products = own other^T, own(step) being the left operands.
template <typename Tiles, typename Own>
__device__ __forceinline__ void multiply_rows(
    Numbers<Tiles::columns>& products, const unsigned char* other, int lane, const Own& own) {
  constexpr int blocks = Tiles::columns / 8;
  float small[2][Tiles::split ? blocks : 1][4] = {};
  for_numbers<blocks>(0, [&](int m, int j, int i) { products[m][j][i] = 0; });
  other += (lane % 8 + lane / 16 * 8) * Tiles::pitch + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < Tiles::steps; ++step) {
    const Operand<Tiles, 4>(&a)[2] = own(step);
#pragma unroll
    for (int pair = 0; pair < blocks / 2; ++pair) {
      uint32_t bits[4];
      load_matrices(bits, other + pair * 16 * Tiles::pitch + step * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * pair + half;
        Operand<Tiles, 2> b;
        b.set(0, bits[2 * half]);
        b.set(1, bits[2 * half + 1]);
#pragma unroll
        for (int m = 0; m < 2; ++m)
          multiply_add_to<Tiles>(products[m][j], small[m][Tiles::split ? j : 0], a[m], b);
      }
    }
  }
  if constexpr (Tiles::split)
    for_numbers<blocks>(0, [&](int m, int j, int i) { products[m][j][i] += small[m][j][i]; });
}

// sums += weights other for 16 of the weights' columns, which are rows of the tile, from 16 pair on.
template <typename Tiles>
__device__ __forceinline__ void multiply_weights(
    Numbers<Tiles::width>& sums, const Numbers<Tiles::columns>& weights, int pair, const unsigned char* other,
    int lane) {
  using T = typename Tiles::Element;
  other += pair * 16 * Tiles::pitch;
  if constexpr (!Tiles::split) {
    other += lane % 16 * Tiles::pitch + lane / 16 * 16;
    Operand<Tiles, 4> a[2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&block)[4] = weights[m][2 * pair + i / 2];
        a[m].set(i, block[i % 2 * 2], block[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int step = 0; step < Tiles::steps; ++step) {
      uint32_t bits[4];
      load_matrices_transposed(bits, other + step * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t b[2] = {bits[2 * half], bits[2 * half + 1]};
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add(sums[m][2 * step + half], a[m].big, b, T());
      }
    }
  } else {
    other += lane % 4 * 2 * Tiles::pitch + lane / 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half, other += 8 * Tiles::pitch) {
      Operand<Tiles, 4> a[2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m].set(i, weights[m][2 * pair + half][i % 2 * 2 + i / 2]);
#pragma unroll
      for (int j = 0; j < Tiles::width / 8; ++j) {
        Operand<Tiles, 2> b;
        b.set(0, *reinterpret_cast<const float*>(other + j * 32));
        b.set(1, *reinterpret_cast<const float*>(other + Tiles::pitch + j * 32));
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add_to<Tiles>(sums[m][j], sums[m][j], a[m], b);
      }
    }
  }
}

// The same for all columns of the tile, after weigh(pair) has made weights of 16 of them.
template <typename Tiles, typename Weigh>
__device__ __forceinline__ void add_weighted_rows(
    Numbers<Tiles::width>& sums, const Numbers<Tiles::columns>& weights, const unsigned char* other, int lane,
    const Weigh& weigh) {
  if constexpr (Tiles::split) {
    Numbers<Tiles::width> of_tile = {};
#pragma unroll
    for (int pair = 0; pair < Tiles::columns / 16; ++pair) {
      weigh(pair);
      multiply_weights<Tiles>(of_tile, weights, pair, other, lane);
    }
    for_numbers<Tiles::width / 8>(0, [&](int m, int j, int i) { sums[m][j][i] += of_tile[m][j][i]; });
  } else {
#pragma unroll
    for (int pair = 0; pair < Tiles::columns / 16; ++pair) {
      weigh(pair);
      multiply_weights<Tiles>(sums, weights, pair, other, lane);
    }
  }
}

}  // namespace lfcc::cuda
