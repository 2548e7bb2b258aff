// The work on tiles that the low-pass kernels share: what a thread sums over h, and what it multiplies rows with.
#pragma once

#include "cuda/lowpass_tiles.h"

namespace lfcc::cuda {

// Of the columns (channel, w) that this thread owns: where they lie. Those outside the tile are at its start, so that
// reading them is harmless, and have no sum.
struct Columns {
  int place[thread_columns];    // in the tile, of its first row
  int sum[thread_columns];      // among the sums of a filter; -1 outside
  int channel[thread_columns];  // from the tile's first
  int w[thread_columns];        // from the tile's first

  __device__ Columns(const Job& job, const Cursor& at) {
    const Tiling& tile = job.tiling;
    const int fast = tile.lanes ? tile.channels : tile.width;
    const float by_fast = 1.0f / static_cast<float>(fast);
#pragma unroll
    for (int k = 0; k < thread_columns; ++k) {
      const int column = static_cast<int>(threadIdx.x) + k * pool_threads, slow = quotient(column, by_fast);
      channel[k] = tile.lanes ? column - slow * fast : slow;
      w[k] = tile.lanes ? slow : column - slow * fast;
      const bool inside = channel[k] < at.channels(job) && w[k] < at.width(job);
      place[k] = inside ? channel[k] * tile.shared_c + w[k] * tile.shared_w : 0;
      sum[k] = inside ? channel[k] * tile.sum_c + w[k] * tile.sum_w : -1;
    }
  }
};

// The weights of a pass's filters at one row, read 16 bytes at a time.
template <typename A>
struct alignas(16) Weights {
  A of[pass_filters];
};

// Adds a tile's rows to sums[k][i] of the columns a thread owns. The average's windows hold zeros, which add nothing,
// so that NaN stays where it is; matrices are multiplied with as they are.
template <bool average, typename T, typename A>
__device__ __forceinline__ void add_rows(
    const T* tile, const Weights<A>* rows_weights, const Columns& columns, int rows, int stride,
    A (&sums)[thread_columns][pass_filters]) {
#pragma unroll 4
  for (int row = 0; row < rows; ++row) {
    const Weights<A> weights = rows_weights[row];
    A values[thread_columns];
#pragma unroll
    for (int k = 0; k < thread_columns; ++k) values[k] = widen(tile[columns.place[k] + row * stride]);
#pragma unroll
    for (int i = 0; i < pass_filters; ++i)
#pragma unroll
      for (int k = 0; k < thread_columns; ++k)
        if (!average)
          sums[k][i] += weights.of[i] * values[k];
        else if (weights.of[i] != A(0))  // it is one, and the same for all threads
          sums[k][i] += values[k];
  }
}

// A tile and the weights of its rows, in one of the pipeline's stages.
template <typename T>
struct Stage {
  using A = acc_t<T>;
  T* tile;
  Weights<A>* weights;

  __device__ Stage(const Layout& layout, unsigned char* memory, int n)
      : tile(reinterpret_cast<T*>(memory + layout.stages + n * layout.stage_bytes)),
        weights(reinterpret_cast<Weights<A>*>(memory + layout.stages + n * layout.stage_bytes + layout.tile_bytes)) {}

  // Starts to load where `at` is, which then moves on; a group of copies in any case, so that groups can be counted.
  __device__ void fetch(const Jobs& jobs, const Tables& tables, Cursor& at) const {
    if (at.valid(jobs)) {
      const Job& job = jobs.job[at.number];
      load_tile(job, at, tile);
      load_weights(job, tables, at, at.pass * pass_filters, pass_filters, false, weights->of);
      at.advance(jobs);
    }
    commit_copies();
  }
};

// Writes what a thread summed for its columns where all threads find it: (pass_filters, columns).
template <typename A>
__device__ __forceinline__ void share_sums(
    const Tiling& tile, const Columns& columns, const A (&sums)[thread_columns][pass_filters], A* shared) {
#pragma unroll
  for (int k = 0; k < thread_columns; ++k)
    if (columns.sum[k] >= 0)
#pragma unroll
      for (int i = 0; i < pass_filters; ++i) shared[i * tile.sum_columns + columns.sum[k]] = sums[k][i];
}

// sum_j K[j, w] dY[(i, j)] of one column and one filter, zero past the last; windows hold one over their length.
template <typename T, typename A = acc_t<T>>
__device__ __forceinline__ A spread(
    const Job& job, const Scales& scales, const Tables& tables, const Cursor& at, int number, int channel, int w) {
  const PooledMap& map = job.map;
  const A* matrix = static_cast<const A*>(map.col_filters);
  const Window* windows = tables.cols(at.number);
  const Filter filter = tables.filters[number];
  const int64_t channels = map.channels;
  const T* grad = static_cast<const T*>(map.y) +
      (static_cast<int64_t>(at.image) * scales.cells + filter.cell + filter.index * filter.scale) * channels +
      at.channel + channel;
  const int position = at.w + w;
  A total = 0;
  for (int j = 0; j < filter.scale; ++j) {
    A weight;
    if (matrix != nullptr) {
      weight = __ldg(matrix + static_cast<int64_t>(filter.first + j) * map.width + position);
    } else {
      const Window window = windows[filter.first + j];
      const bool inside = position >= window.start && position < window.stop;
      weight = inside ? A(1) / static_cast<A>(window.stop - window.start) : A(0);
    }
    if (weight != A(0)) total += weight * widen(grad[j * channels]);
  }
  return total;
}

// V of the columns a thread owns, at `spreads` (filters, columns), which no other thread reads or writes.
template <typename A>
__device__ __forceinline__ void recall(
    const A* spreads, const Tiling& tile, const Columns& columns, int first, A (&values)[thread_columns][pass_filters]) {
  const int stride = tile.channels * tile.width;
#pragma unroll
  for (int k = 0; k < thread_columns; ++k)
#pragma unroll
    for (int i = 0; i < pass_filters; ++i)
      values[k][i] = columns.sum[k] < 0 ? A(0) : spreads[(first + i) * stride + k * pool_threads + threadIdx.x];
}
template <typename T, typename A>
__device__ __forceinline__ void spread_all(
    const Job& job, const Scales& scales, const Tables& tables, const Cursor& at, const Columns& columns, int first,
    int count, A* spreads) {
  const int stride = job.tiling.channels * job.tiling.width;
#pragma unroll
  for (int k = 0; k < thread_columns; ++k) {
    if (columns.sum[k] < 0) continue;
#pragma unroll 1
    for (int n = 0; n < count; ++n)
      spreads[n * stride + k * pool_threads + threadIdx.x] =
          spread<T>(job, scales, tables, at, first + n, columns.channel[k], columns.w[k]);
  }
}

}  // namespace lfcc::cuda
