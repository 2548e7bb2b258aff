// Products of row tiles on tensor cores, for csrc/cuda/info_nce_fused.cu.
//
// A block of 4 warps has 128 rows of q, 32 per warp, against tiles of k. In shared memory rows are 16 bytes further
// apart than they are long, which puts the 8 rows of a matrix, and the 32-bit words of a TF32 fragment, into different
// banks.
//
// A warp's accumulator fragment for 32 rows and n columns is float[2][n / 8][4] in mma's layout: with g = lane / 4 and
// t = lane % 4, [m][j][2 r + c] belongs to row 16 m + 8 r + g and column 8 j + 2 t + c. It serves as the left operand
// of the next product without moving data. For 16-bit types, two neighbours make one register. For TF32, columns 2 t
// and 2 t + 1 take the places t and t + 4 of the fragment, and so do the rows of the right operand; the order of a
// sum's terms is free.
//
// 3xTF32 replaces a float32 product: each value is a big and a small part, and the product of two small parts is left
// out. Tensor cores truncate sums instead of rounding them, so many terms of one sign lose more and more digits.
// Accumulation chains of float32 are therefore short, with the products of small parts apart, and combined by rounded
// additions.
//
// ldmatrix takes 4 cycles of shared memory for four matrices. They are the right operands of 4 mma, or the left ones of
// as many as a tile has groups of 8 columns: about 1 cycle per mma, or 1.4 if registers do not suffice for q.
#pragma once

#include <cstring>

#include "cuda/ptx.cuh"

namespace lfcc::cuda {

constexpr int tile_threads = 128;
constexpr int warp_rows = 32;
constexpr int block_rows = tile_threads / warp_size * warp_rows;

// Tiles for rows of `width` T.
template <typename T, int width_>
struct RowTiles {
  using Element = T;
  static constexpr int width = width_;
  static constexpr int row_bytes = width * sizeof(T), pitch = row_bytes + 16;
  static constexpr int k_steps = row_bytes / 32;  // an mma covers 32 bytes of a row, for every type
  static constexpr bool split = sizeof(T) == 4;  // into a big and a small part
  // Rows of k per tile: as many as fit in registers.
  static constexpr int columns = row_bytes == 128 ? 48 : 32;
};

template <int columns>
using AccFragment = float[2][columns / 8][4];

// Calls body(m, j, i) for the elements of `count` column blocks from `first` on; all indices are constants.
template <int count, typename Body>
__device__ __forceinline__ void for_elements(int first, const Body& body) {
#pragma unroll
  for (int j = 0; j < count; ++j)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(m, first + j, i);
}

// Calls body(m, j, r) for pairs of neighbours, [m][j][2 r] and [m][j][2 r + 1].
template <int count, typename Body>
__device__ __forceinline__ void for_pairs(int first, const Body& body) {
#pragma unroll
  for (int j = 0; j < count; ++j)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) body(m, first + j, r);
}

// An input fragment of mma.
template <typename Tiles, int count>
struct Fragment {
  uint32_t big[count], small[Tiles::split ? count : 1];

  __device__ __forceinline__ void set(int i, uint32_t bits) {
    if constexpr (Tiles::split) {
      // Rounded to the 11 bits of TF32 by an integer addition, where the instruction for it takes four steps. A NaN is
      // left to the small part, which mma truncates.
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

// acc += a b, with the products of small parts added to `small_acc`.
template <typename Tiles>
__device__ __forceinline__ void multiply_add_split(
    float (&acc)[4], float (&small_acc)[4], const Fragment<Tiles, 4>& a, const Fragment<Tiles, 2>& b) {
  using T = typename Tiles::Element;
  if constexpr (Tiles::split) {
    multiply_add(small_acc, a.big, b.small, T());
    multiply_add(small_acc, a.small, b.big, T());
  }
  multiply_add(acc, a.big, b.big, T());
}

// Left operands of a warp's rows of q for one step.
template <typename Tiles>
__device__ __forceinline__ void load_q(Fragment<Tiles, 4> (&q)[2], const unsigned char* rows, int lane, int step) {
  rows += lane % 16 * Tiles::pitch + lane / 16 * 16 + step * 32;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t bits[4];
    load_matrices(bits, rows + m * 16 * Tiles::pitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) q[m].set(i, bits[i]);
  }
}

// qk = q k^T, where q_at(step) returns the left operands.
template <typename Tiles, typename LeftOperands>
__device__ __forceinline__ void multiply_qk(
    AccFragment<Tiles::columns>& qk, const unsigned char* k, int lane, const LeftOperands& q_at) {
  constexpr int blocks = Tiles::columns / 8;
  float small[2][Tiles::split ? blocks : 1][4] = {};
  for_elements<blocks>(0, [&](int m, int j, int i) { qk[m][j][i] = 0; });
  k += (lane % 8 + lane / 16 * 8) * Tiles::pitch + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < Tiles::k_steps; ++step) {
    const Fragment<Tiles, 4>(&a)[2] = q_at(step);
#pragma unroll
    for (int pair = 0; pair < blocks / 2; ++pair) {
      uint32_t bits[4];
      load_matrices(bits, k + pair * 16 * Tiles::pitch + step * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * pair + half;
        Fragment<Tiles, 2> b;
        b.set(0, bits[2 * half]);
        b.set(1, bits[2 * half + 1]);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add_split<Tiles>(qk[m][j], small[m][Tiles::split ? j : 0], a[m], b);
      }
    }
  }
  if constexpr (Tiles::split)
    for_elements<blocks>(0, [&](int m, int j, int i) { qk[m][j][i] += small[m][j][i]; });
}

// acc += p k for 16 columns of p, which are rows of the tile, from 16 pair on.
template <typename Tiles>
__device__ __forceinline__ void multiply_pk(
    AccFragment<Tiles::width>& acc, const AccFragment<Tiles::columns>& p, int pair, const unsigned char* k, int lane) {
  using T = typename Tiles::Element;
  k += pair * 16 * Tiles::pitch;
  if constexpr (!Tiles::split) {
    k += lane % 16 * Tiles::pitch + lane / 16 * 16;
    Fragment<Tiles, 4> a[2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&block)[4] = p[m][2 * pair + i / 2];
        a[m].set(i, block[i % 2 * 2], block[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int step = 0; step < Tiles::k_steps; ++step) {
      uint32_t bits[4];
      load_matrices_transposed(bits, k + step * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t b[2] = {bits[2 * half], bits[2 * half + 1]};
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add(acc[m][2 * step + half], a[m].big, b, T());
      }
    }
  } else {
    k += lane % 4 * 2 * Tiles::pitch + lane / 4 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half, k += 8 * Tiles::pitch) {
      Fragment<Tiles, 4> a[2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m].set(i, p[m][2 * pair + half][i % 2 * 2 + i / 2]);
#pragma unroll
      for (int j = 0; j < Tiles::width / 8; ++j) {
        Fragment<Tiles, 2> b;
        b.set(0, *reinterpret_cast<const float*>(k + j * 32));
        b.set(1, *reinterpret_cast<const float*>(k + Tiles::pitch + j * 32));
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_add_split<Tiles>(acc[m][j], acc[m][j], a[m], b);
      }
    }
  }
}

// acc += p k for all columns of the tile, where compute_p(pair) computes 16 columns of p.
template <typename Tiles, typename ComputeP>
__device__ __forceinline__ void multiply_pk_all(
    AccFragment<Tiles::width>& acc, const AccFragment<Tiles::columns>& p, const unsigned char* k, int lane,
    const ComputeP& compute_p) {
  if constexpr (Tiles::split) {
    AccFragment<Tiles::width> tile_acc = {};
#pragma unroll
    for (int pair = 0; pair < Tiles::columns / 16; ++pair) {
      compute_p(pair);
      multiply_pk<Tiles>(tile_acc, p, pair, k, lane);
    }
    for_elements<Tiles::width / 8>(0, [&](int m, int j, int i) { acc[m][j][i] += tile_acc[m][j][i]; });
  } else {
#pragma unroll
    for (int pair = 0; pair < Tiles::columns / 16; ++pair) {
      compute_p(pair);
      multiply_pk<Tiles>(acc, p, pair, k, lane);
    }
  }
}

}  // namespace lfcc::cuda
