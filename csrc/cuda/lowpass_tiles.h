// How the low-pass kernels cut maps into tiles, bring those to shared memory and back, and who holds which sums.
//
// A block takes units, a unit being a group of channels of one image. It walks over the unit's map in tiles of
// channels x rows x width. A thread owns columns, entries (channel, w) of a tile, for all rows: what it sums over h,
// or multiplies with, stays in its registers. Tiles lie in shared memory as they do in the map, so that copies are runs
// of 16 bytes in every layout: whole maps or rows one after the other in NCHW, also of odd sides, positions in
// channels-last and tokens. Where a map's address or strides are no multiple of 16 bytes copies go by elements.
#pragma once

#include "cuda/lowpass.h"

namespace lfcc::cuda {

constexpr int pool_threads = 128;
constexpr int thread_columns = 4;  // owned by a thread: they share the loads of the weights
constexpr int pass_filters = 8;    // whose sums a thread holds at once
constexpr int max_jobs = 8;        // maps of one launch
constexpr int stages = 3;          // tiles that a pipeline holds: two under way while one is worked on

struct Scales {
  int count, filters, cells;
  int scale[max_scales];

  // Times that pass_filters are taken until there are no more.
  LFCC_HOST_DEVICE int passes() const { return (filters + pass_filters - 1) / pass_filters; }
};

// Sizes of a tile, and how many of them there are; what does not divide is cut off by the map's end.
struct Tiling {
  int channels, rows, width;
  int groups, width_tiles;
  int shared_c, shared_h, shared_w;  // strides of a tile in shared memory, in elements
  int sum_c, sum_w, sum_columns;     // strides and number of a filter's sums, free of bank conflicts
  bool lanes;                        // channels next to each other, else columns
  bool wide;                         // copies of 16 bytes
  bool rows_joined, maps_joined;     // rows, whole maps follow each other in the map and in the tile
};

struct Job {
  PooledMap map;
  Tiling tiling;
  unsigned first_unit;
};

struct Jobs {
  Scales scales;
  int count;
  unsigned units;  // of all maps
  Job job[max_jobs];
};

// Offsets in a block's shared memory, behind the tables, in bytes.
struct Layout {
  int stages, stage_bytes, tile_bytes;  // a stage is a tile and the weights of its rows
  int sums;                             // of columns, for all threads
  int cells;                            // of cells, or of rows by warps
  int bytes;                            // in all
};

// n / d for 1 <= d and n < 2^21, by a multiplication with 1 / d: half a unit is more than both roundings.
__device__ __forceinline__ int quotient(int n, float inverse) {
  return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse);
}

// A filter: row `index` of its scale, whose filters begin with `first` and cells with `cell`. Scale 0 is none.
struct Filter {
  int scale, index, first, cell;
};

// Positions [start, stop) of a side.
struct Window {
  int start, stop;
};

// i * size / scale, whose division takes 64 bits only where it must.
__device__ __forceinline__ int share(int i, int size, int scale, int rounding) {
  const int64_t product = static_cast<int64_t>(i) * size + rounding;
  return product >> 32 ? static_cast<int>(product / scale) : static_cast<int>(static_cast<uint32_t>(product) / scale);
}

// What is known of filters before a map is read, in shared memory: all filters, up to a multiple of pass_filters, and
// of every job their windows on both sides.
struct Tables {
  Filter* filters;
  Window* windows;
  int padded;

  static LFCC_HOST_DEVICE int bytes(const Scales& scales, int jobs) {
    return scales.passes() * pass_filters * static_cast<int>(sizeof(Filter) + 2 * jobs * sizeof(Window));
  }

  // Ends with a barrier.
  __device__ Tables(const Jobs& jobs, unsigned char* memory) {
    padded = jobs.scales.passes() * pass_filters;
    filters = reinterpret_cast<Filter*>(memory);
    windows = reinterpret_cast<Window*>(filters + padded);
    for (int n = static_cast<int>(threadIdx.x); n < padded; n += pool_threads) {
      int first = 0, cell = 0, found = 0;
      while (found < jobs.scales.count && n >= first + jobs.scales.scale[found]) {
        const int scale = jobs.scales.scale[found++];
        first += scale, cell += scale * scale;
      }
      const int scale = found < jobs.scales.count ? jobs.scales.scale[found] : 0, index = n - first;
      filters[n] = {scale, index, first, cell};
      for (int job = 0; job < jobs.count && scale > 0; ++job) {
        const int height = jobs.job[job].map.height, width = jobs.job[job].map.width;
        rows(job)[n] = {share(index, height, scale, 0), share(index + 1, height, scale, scale - 1)};
        cols(job)[n] = {share(index, width, scale, 0), share(index + 1, width, scale, scale - 1)};
      }
    }
    __syncthreads();
  }

  __device__ Window* rows(int job) const { return windows + 2 * job * padded; }
  __device__ Window* cols(int job) const { return rows(job) + padded; }
};

// Where a block is: a tile of a unit. `passes` is 1 for kernels that take all filters at once.
struct Cursor {
  unsigned unit, step, passes;
  int number;  // of the job
  int image, channel, pass, w, h;

  __device__ Cursor(const Jobs& jobs, unsigned passes) : unit(blockIdx.x), step(gridDim.x), passes(passes), number(0) {
    enter(jobs);
  }
  __device__ bool valid(const Jobs& jobs) const { return unit < jobs.units; }

  __device__ void enter(const Jobs& jobs) {
    if (!valid(jobs)) return;
    while (number + 1 < jobs.count && unit >= jobs.job[number + 1].first_unit) ++number;
    const Job& job = jobs.job[number];
    unsigned rest = unit - job.first_unit;
    pass = rest % passes, rest /= passes;
    channel = rest % job.tiling.groups * job.tiling.channels;
    image = rest / job.tiling.groups;
    w = h = 0;
  }

  __device__ void advance(const Jobs& jobs) {
    const Job& job = jobs.job[number];
    h += job.tiling.rows;
    if (h < job.map.height) return;
    h = 0, w += job.tiling.width;
    if (w < job.map.width) return;
    unit += step;
    enter(jobs);
  }

  __device__ int channels(const Job& job) const { return min(job.tiling.channels, job.map.channels - channel); }
  __device__ int rows(const Job& job) const { return min(job.tiling.rows, job.map.height - h); }
  __device__ int width(const Job& job) const { return min(job.tiling.width, job.map.width - w); }
  __device__ int64_t offset(const Job& job) const {
    return image * job.map.stride_b + channel * job.map.stride_c + h * job.map.stride_h + w * job.map.stride_w;
  }
};

// Calls body(offset in the map, offset in the tile, true for 16 bytes or false for an element) for all of a tile, from
// the tile's first element on, by all threads of the block.
template <typename T, typename Body>
__device__ __forceinline__ void for_pieces(const Job& job, const Cursor& at, const Body& body) {
  const Tiling& tile = job.tiling;
  const PooledMap& map = job.map;
  const int channels = at.channels(job), rows = at.rows(job), width = at.width(job);
  // Runs of `length` elements: `outer` times `inner` of them.
  int outer = rows, inner = width, length = channels, shared_outer = tile.shared_h, shared_inner = tile.shared_w;
  int64_t stride_outer = map.stride_h, stride_inner = map.stride_w;
  if (!tile.lanes) {
    outer = tile.maps_joined ? 1 : channels, inner = tile.rows_joined ? 1 : rows;
    length = width * (tile.rows_joined ? rows : 1) * (tile.maps_joined ? channels : 1);
    shared_outer = tile.shared_c, shared_inner = tile.shared_h;
    stride_outer = map.stride_c, stride_inner = map.stride_h;
  }
  constexpr int vector = 16 / sizeof(T);
  const int vectors = tile.wide ? length / vector : 0, rest = length - vectors * vector;
  const auto visit = [&](int pieces, int first, int size, bool wide) {
    // A number of three digits, piece, inner and outer, which starts with the thread and grows by the threads' number.
    // Both places follow by additions: 26 instructions where no digit carries, and products of the digits took 42.
    const float by_pieces = 1.0f / static_cast<float>(pieces), by_inner = 1.0f / static_cast<float>(inner);
    const auto digits = [&](int number, int& piece, int& i, int& o) {
      const int run = quotient(number, by_pieces);
      piece = number - run * pieces, o = quotient(run, by_inner), i = run - o * inner;
    };
    const auto offset_of = [&](int piece, int i, int o) { return piece * size + i * stride_inner + o * stride_outer; };
    const auto place_of = [&](int piece, int i, int o) { return piece * size + i * shared_inner + o * shared_outer; };
    int piece, i, o, piece_step, i_step, o_step;
    digits(pool_threads, piece_step, i_step, o_step);
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

// Copies of an element beside the computation where cp.async has its size.
__device__ __forceinline__ void copy_element(double* to, const double* from) { copy_async_8(to, from); }
__device__ __forceinline__ void copy_element(float* to, const float* from) { copy_async_4(to, from); }
__device__ __forceinline__ void copy_element(__nv_bfloat16* to, const __nv_bfloat16* from) { *to = *from; }
__device__ __forceinline__ void copy_element(__half* to, const __half* from) { *to = *from; }

template <typename T>
__device__ __forceinline__ void load_tile(const Job& job, const Cursor& at, T* tile) {
  const T* from = static_cast<const T*>(job.map.x) + at.offset(job);
  for_pieces<T>(job, at, [&](int64_t offset, int place, bool wide) {
    if (wide)
      copy_async_16(tile + place, from + offset);
    else
      copy_element(tile + place, from + offset);
  });
}

template <typename T>
__device__ __forceinline__ void store_tile(const Job& job, const Cursor& at, const T* tile) {
  T* to = const_cast<T*>(static_cast<const T*>(job.map.x)) + at.offset(job);
  for_pieces<T>(job, at, [&](int64_t offset, int place, bool wide) {
    if (wide)
      *reinterpret_cast<uint4*>(to + offset) = *reinterpret_cast<const uint4*>(tile + place);
    else
      to[offset] = tile[place];
  });
}

// Weights (rows, count) of `count` filters from `first` on at the rows of a tile; zero past the last filter. Windows
// hold one, or with `mean` one over their length.
template <typename A>
__device__ __forceinline__ void load_weights(
    const Job& job, const Tables& tables, const Cursor& at, int first, int count, bool mean, A* weights) {
  const A* matrix = static_cast<const A*>(job.map.row_filters);
  const Window* windows = tables.rows(at.number);
  const int values = at.rows(job) * count;
  for (int n = static_cast<int>(threadIdx.x); n < values; n += pool_threads) {
    const int row = n / count, number = first + n - row * count, h = at.h + row;
    const bool any = tables.filters[number].scale > 0;
    if (any && matrix != nullptr) {
      copy_element(weights + n, matrix + static_cast<int64_t>(number) * job.map.height + h);
    } else {
      const Window window = windows[number];
      const bool inside = any && h >= window.start && h < window.stop;
      weights[n] = !inside ? A(0) : mean ? A(1) / static_cast<A>(window.stop - window.start) : A(1);
    }
  }
}

}  // namespace lfcc::cuda
