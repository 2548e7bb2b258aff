// Tiling of the low-pass kernels: tiles of maps, their copies to and from shared memory, and the tile scheduler.
//
// The unit of work is a group of channels of one image. A block processes units one after the other, each in tiles of
// channels x rows x width. A thread owns columns, entries (channel, w) of a tile, for all rows: its sums over h and its
// factors stay in registers. Tiles have the map's layout in shared memory, so copies are runs of 16 bytes in every
// layout: contiguous maps or rows in NCHW, also with odd sides, and pixels in NHWC and tokens. If the address or
// strides of a map are not multiples of 16 bytes, copies are by element.
#pragma once

#include "cuda/lowpass.h"
#include "cuda/ptx.cuh"

namespace lfcc::cuda {

constexpr int block_threads = 128;
constexpr int thread_columns = 4;  // owned by a thread; they share the loads of the weights
constexpr int pass_filters = 8;    // whose sums a thread accumulates at once
constexpr int max_problems = 8;    // maps per launch
constexpr int stages = 3;          // of the pipeline: two tiles are copied while one is processed

struct Scales {
  int count, filters, cells;
  int scale[max_scales];

  // Passes over the map, of pass_filters filters each.
  LFCC_HOST_DEVICE int passes() const { return (filters + pass_filters - 1) / pass_filters; }
};

// Sizes of a tile and the number of tiles; the last ones are cut off by the end of the map.
struct Tiling {
  int channels, rows, width;
  int groups, width_tiles;
  int shared_c, shared_h, shared_w;  // strides of a tile in shared memory, in elements
  int u_c, u_w, u_columns;           // strides and number of the sums of a filter, without bank conflicts
  bool nhwc;                         // channels are contiguous; otherwise columns
  bool wide;                         // copies of 16 bytes
  bool rows_joined, maps_joined;     // rows, or whole maps, are contiguous in memory and in the tile
};

struct Problem {
  PooledMap map;
  Tiling tiling;
  unsigned first_unit;
};

struct Problems {
  Scales scales;
  int count;
  unsigned units;  // of all maps
  Problem problem[max_problems];
};

// Offsets in the shared memory of a block, after the tables, in bytes.
struct Layout {
  int stages, stage_bytes, tile_bytes;  // a stage is a tile and the weights of its rows
  int uv;                               // U or V of the columns (lowpass_columns.cuh), for all threads
  int cells;                            // sums of cells, or of rows per warp
  int bytes;                            // in total
};

// n / d for 1 <= d and n < 2^21 by a multiplication with 1 / d; adding a half exceeds both rounding errors.
__device__ __forceinline__ int quotient(int n, float inverse) {
  return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse);
}

// A filter: row `index` of its scale, whose first filter is `first` and whose first cell is `cell`. Scale 0 is padding.
struct Filter {
  int scale, index, first, cell;
};

// Pixels [start, stop) of an axis.
struct Window {
  int start, stop;
};

// (i * size + rounding) / scale, by a 64-bit division only if necessary.
__device__ __forceinline__ int window_bound(int i, int size, int scale, int rounding) {
  const int64_t product = static_cast<int64_t>(i) * size + rounding;
  return product >> 32 ? static_cast<int>(product / scale) : static_cast<int>(static_cast<uint32_t>(product) / scale);
}

// Tables in shared memory: all filters, padded to a multiple of pass_filters, and their windows on both axes of every
// problem.
struct Tables {
  Filter* filters;
  Window* windows;
  int padded;

  static LFCC_HOST_DEVICE int bytes(const Scales& scales, int problems) {
    return scales.passes() * pass_filters * static_cast<int>(sizeof(Filter) + 2 * problems * sizeof(Window));
  }

  // Ends with a barrier.
  __device__ Tables(const Problems& problems, unsigned char* memory) {
    padded = problems.scales.passes() * pass_filters;
    filters = reinterpret_cast<Filter*>(memory);
    windows = reinterpret_cast<Window*>(filters + padded);
    for (int n = static_cast<int>(threadIdx.x); n < padded; n += block_threads) {
      int first = 0, cell = 0, found = 0;
      while (found < problems.scales.count && n >= first + problems.scales.scale[found]) {
        const int scale = problems.scales.scale[found++];
        first += scale, cell += scale * scale;
      }
      const int scale = found < problems.scales.count ? problems.scales.scale[found] : 0, index = n - first;
      filters[n] = {scale, index, first, cell};
      for (int problem = 0; problem < problems.count && scale > 0; ++problem) {
        const int height = problems.problem[problem].map.height, width = problems.problem[problem].map.width;
        rows(problem)[n] = {window_bound(index, height, scale, 0), window_bound(index + 1, height, scale, scale - 1)};
        cols(problem)[n] = {window_bound(index, width, scale, 0), window_bound(index + 1, width, scale, scale - 1)};
      }
    }
    __syncthreads();
  }

  __device__ Window* rows(int problem) const { return windows + 2 * problem * padded; }
  __device__ Window* cols(int problem) const { return rows(problem) + padded; }
};

// The current tile of a block: a part of a unit. `passes` is 1 for kernels that process all filters at once.
struct TileScheduler {
  unsigned unit, step, passes;
  int index;  // of the problem
  int image, channel, pass, w, h;

  __device__ TileScheduler(const Problems& problems, unsigned passes)
      : unit(blockIdx.x), step(gridDim.x), passes(passes), index(0) {
    enter(problems);
  }
  __device__ bool valid(const Problems& problems) const { return unit < problems.units; }

  __device__ void enter(const Problems& problems) {
    if (!valid(problems)) return;
    while (index + 1 < problems.count && unit >= problems.problem[index + 1].first_unit) ++index;
    const Problem& problem = problems.problem[index];
    unsigned rest = unit - problem.first_unit;
    pass = rest % passes, rest /= passes;
    channel = rest % problem.tiling.groups * problem.tiling.channels;
    image = rest / problem.tiling.groups;
    w = h = 0;
  }

  __device__ void advance(const Problems& problems) {
    const Problem& problem = problems.problem[index];
    h += problem.tiling.rows;
    if (h < problem.map.height) return;
    h = 0, w += problem.tiling.width;
    if (w < problem.map.width) return;
    unit += step;
    enter(problems);
  }

  __device__ int channels(const Problem& problem) const {
    return min(problem.tiling.channels, problem.map.channels - channel);
  }
  __device__ int rows(const Problem& problem) const { return min(problem.tiling.rows, problem.map.height - h); }
  __device__ int width(const Problem& problem) const { return min(problem.tiling.width, problem.map.width - w); }
  __device__ int64_t offset(const Problem& problem) const {
    const PooledMap& map = problem.map;
    return image * map.stride_b + channel * map.stride_c + h * map.stride_h + w * map.stride_w;
  }
};

// Calls body(offset in the map, offset in the tile, wide) for all pieces of a tile, 16 bytes if `wide`, otherwise an
// element, by all threads of the block. Offsets are from the tile's first element.
template <typename T, typename Body>
__device__ __forceinline__ void for_pieces(const Problem& problem, const TileScheduler& work, const Body& body) {
  const Tiling& tile = problem.tiling;
  const PooledMap& map = problem.map;
  const int channels = work.channels(problem), rows = work.rows(problem), width = work.width(problem);
  // Runs of `length` elements: `outer` times `inner` of them.
  int outer = rows, inner = width, length = channels, shared_outer = tile.shared_h, shared_inner = tile.shared_w;
  int64_t stride_outer = map.stride_h, stride_inner = map.stride_w;
  if (!tile.nhwc) {
    outer = tile.maps_joined ? 1 : channels, inner = tile.rows_joined ? 1 : rows;
    length = width * (tile.rows_joined ? rows : 1) * (tile.maps_joined ? channels : 1);
    shared_outer = tile.shared_c, shared_inner = tile.shared_h;
    stride_outer = map.stride_c, stride_inner = map.stride_h;
  }
  constexpr int vector = 16 / sizeof(T);
  const int vectors = tile.wide ? length / vector : 0, rest = length - vectors * vector;
  const auto visit = [&](int pieces, int first, int size, bool wide) {
    // Piece, inner and outer index are the digits of a number that starts at the thread's and grows by the number of
    // threads. Both offsets follow by additions, 26 instructions without a carry; multiplying the digits took 42.
    const float by_pieces = 1.0f / static_cast<float>(pieces), by_inner = 1.0f / static_cast<float>(inner);
    const auto digits = [&](int number, int& piece, int& i, int& o) {
      const int run = quotient(number, by_pieces);
      piece = number - run * pieces, o = quotient(run, by_inner), i = run - o * inner;
    };
    const auto offset_of = [&](int piece, int i, int o) { return piece * size + i * stride_inner + o * stride_outer; };
    const auto place_of = [&](int piece, int i, int o) { return piece * size + i * shared_inner + o * shared_outer; };
    int piece, i, o, piece_step, i_step, o_step;
    digits(block_threads, piece_step, i_step, o_step);
    const int64_t step = offset_of(piece_step, i_step, o_step), inner_carry = offset_of(-pieces, 1, 0);
    const int64_t outer_carry = offset_of(0, -inner, 1);
    const int place_step = place_of(piece_step, i_step, o_step), place_inner_carry = place_of(-pieces, 1, 0);
    const int place_outer_carry = place_of(0, -inner, 1);
    digits(static_cast<int>(threadIdx.x), piece, i, o);
    int64_t offset = first + offset_of(piece, i, o);
    int place = first + place_of(piece, i, o);
    while (o < outer) {
      body(offset, place, wide);
      piece += piece_step, i += i_step, o += o_step, offset += step, place += place_step;
      if (piece >= pieces) piece -= pieces, ++i, offset += inner_carry, place += place_inner_carry;
      if (i >= inner) i -= inner, ++o, offset += outer_carry, place += place_outer_carry;
    }
  };
  if (vectors > 0) visit(vectors, 0, vector, true);
  if (rest > 0) visit(rest, vectors * vector, 1, false);
}

// Asynchronous copies of an element if cp.async supports its size.
__device__ __forceinline__ void copy_element(double* to, const double* from) { copy_async_8(to, from); }
__device__ __forceinline__ void copy_element(float* to, const float* from) { copy_async_4(to, from); }
__device__ __forceinline__ void copy_element(__nv_bfloat16* to, const __nv_bfloat16* from) { *to = *from; }
__device__ __forceinline__ void copy_element(__half* to, const __half* from) { *to = *from; }

template <typename T>
__device__ __forceinline__ void load_tile(const Problem& problem, const TileScheduler& work, T* tile) {
  const T* from = static_cast<const T*>(problem.map.x) + work.offset(problem);
  for_pieces<T>(problem, work, [&](int64_t offset, int place, bool wide) {
    if (wide)
      copy_async_16(tile + place, from + offset);
    else
      copy_element(tile + place, from + offset);
  });
}

template <typename T>
__device__ __forceinline__ void store_tile(const Problem& problem, const TileScheduler& work, const T* tile) {
  T* to = const_cast<T*>(static_cast<const T*>(problem.map.x)) + work.offset(problem);
  for_pieces<T>(problem, work, [&](int64_t offset, int place, bool wide) {
    if (wide)
      *reinterpret_cast<uint4*>(to + offset) = *reinterpret_cast<const uint4*>(tile + place);
    else
      to[offset] = tile[place];
  });
}

// Weights (rows, count) of `count` filters from `first` on at the rows of a tile, zero past the last filter. The
// average has weights of one, or with `mean` one over the window's length.
template <typename A>
__device__ __forceinline__ void load_weights(
    const Problem& problem, const Tables& tables, const TileScheduler& work, int first, int count, bool mean,
    A* weights) {
  const A* matrix = static_cast<const A*>(problem.map.row_filters);
  const Window* windows = tables.rows(work.index);
  const int values = work.rows(problem) * count;
  for (int n = static_cast<int>(threadIdx.x); n < values; n += block_threads) {
    const int row = n / count, number = first + n - row * count, h = work.h + row;
    const bool any = tables.filters[number].scale > 0;
    if (any && matrix != nullptr) {
      copy_element(weights + n, matrix + static_cast<int64_t>(number) * problem.map.height + h);
    } else {
      const Window window = windows[number];
      const bool inside = any && h >= window.start && h < window.stop;
      weights[n] = !inside ? A(0) : mean ? A(1) / static_cast<A>(window.stop - window.start) : A(1);
    }
  }
}

}  // namespace lfcc::cuda
