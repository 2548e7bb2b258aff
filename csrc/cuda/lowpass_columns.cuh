// Per-column work shared by the low-pass kernels, for entries (channel c, w) of a tile:
//
//   U[i, c, w] = sum_h R[i, h] X[c, h, w]        the forward sum over rows
//   V[i, c, w] = sum_j K[j, w] dY[(i, j), c]     the factor of row h of the gradient
#pragma once

#include "cuda/lowpass_tiles.cuh"

namespace lfcc::cuda {

// Places of the columns (channel, w) that this thread owns. Columns outside the tile point at its start, where loads
// are harmless, and have no sum.
struct Columns {
  int place[thread_columns];    // in the tile, in its first row
  int u[thread_columns];        // in U of a filter; -1 outside the tile
  int channel[thread_columns];  // relative to the tile's first
  int w[thread_columns];        // relative to the tile's first

  __device__ Columns(const Problem& problem, const TileScheduler& work) {
    const Tiling& tile = problem.tiling;
    const int fast = tile.nhwc ? tile.channels : tile.width;
    const float by_fast = 1.0f / static_cast<float>(fast);
#pragma unroll
    for (int k = 0; k < thread_columns; ++k) {
      const int column = static_cast<int>(threadIdx.x) + k * block_threads, slow = quotient(column, by_fast);
      channel[k] = tile.nhwc ? column - slow * fast : slow;
      w[k] = tile.nhwc ? slow : column - slow * fast;
      const bool inside = channel[k] < work.channels(problem) && w[k] < work.width(problem);
      place[k] = inside ? channel[k] * tile.shared_c + w[k] * tile.shared_w : 0;
      u[k] = inside ? channel[k] * tile.u_c + w[k] * tile.u_w : -1;
    }
  }
};

// The weights of a pass at one row, loaded 16 bytes at a time.
template <typename A>
struct alignas(16) Weights {
  A of[pass_filters];
};

// Adds a tile's rows to U of the columns a thread owns. Rows outside a window of the average are skipped, which
// confines NaN to the windows that cover it; filters are multiplied as they are.
template <bool average, typename T, typename A>
__device__ __forceinline__ void add_rows(
    const T* tile, const Weights<A>* rows_weights, const Columns& columns, int rows, int stride,
    A (&u)[thread_columns][pass_filters]) {
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
          u[k][i] += weights.of[i] * values[k];
        else if (weights.of[i] != A(0))  // it is one, and uniform across threads
          u[k][i] += values[k];
  }
}

// A stage of the pipeline: a tile and the weights of its rows.
template <typename T>
struct Stage {
  using A = acc_t<T>;
  T* tile;
  Weights<A>* weights;

  __device__ Stage(const Layout& layout, unsigned char* memory, int n)
      : tile(reinterpret_cast<T*>(memory + layout.stages + n * layout.stage_bytes)),
        weights(reinterpret_cast<Weights<A>*>(memory + layout.stages + n * layout.stage_bytes + layout.tile_bytes)) {}

  // Starts loading the tile at `work` and advances it. Always commits a group of copies, so that groups can be counted.
  __device__ void prefetch(const Problems& problems, const Tables& tables, TileScheduler& work) const {
    if (work.valid(problems)) {
      const Problem& problem = problems.problem[work.index];
      load_tile(problem, work, tile);
      load_weights(problem, tables, work, work.pass * pass_filters, pass_filters, false, weights->of);
      work.advance(problems);
    }
    commit_copies();
  }
};

// Stores U of the columns a thread owns to shared memory, (pass_filters, columns).
template <typename A>
__device__ __forceinline__ void store_u(
    const Tiling& tile, const Columns& columns, const A (&u)[thread_columns][pass_filters], A* shared) {
#pragma unroll
  for (int k = 0; k < thread_columns; ++k)
    if (columns.u[k] >= 0)
#pragma unroll
      for (int i = 0; i < pass_filters; ++i) shared[i * tile.u_columns + columns.u[k]] = u[k][i];
}

// V of one column and one filter, zero past the last filter; the average has weights of one over the window's length.
template <typename T, typename A = acc_t<T>>
__device__ __forceinline__ A compute_v(
    const Problem& problem, const Scales& scales, const Tables& tables, const TileScheduler& work, int number,
    int channel, int w) {
  const PooledMap& map = problem.map;
  const A* matrix = static_cast<const A*>(map.col_filters);
  const Window* windows = tables.cols(work.index);
  const Filter filter = tables.filters[number];
  const int64_t channels = map.channels;
  const T* grad = static_cast<const T*>(map.y) +
      (static_cast<int64_t>(work.image) * scales.cells + filter.cell + filter.index * filter.scale) * channels +
      work.channel + channel;
  const int pixel = work.w + w;
  A total = 0;
  for (int j = 0; j < filter.scale; ++j) {
    A weight;
    if (matrix != nullptr) {
      weight = __ldg(matrix + static_cast<int64_t>(filter.first + j) * map.width + pixel);
    } else {
      const Window window = windows[filter.first + j];
      const bool inside = pixel >= window.start && pixel < window.stop;
      weight = inside ? A(1) / static_cast<A>(window.stop - window.start) : A(0);
    }
    if (weight != A(0)) total += weight * widen(grad[j * channels]);
  }
  return total;
}

// V of the columns a thread owns, loaded from and stored to `shared_v` (filters, columns), which no other thread
// accesses.
template <typename A>
__device__ __forceinline__ void load_v(
    const A* shared_v, const Tiling& tile, const Columns& columns, int first, A (&v)[thread_columns][pass_filters]) {
  const int stride = tile.channels * tile.width;
#pragma unroll
  for (int k = 0; k < thread_columns; ++k)
#pragma unroll
    for (int i = 0; i < pass_filters; ++i)
      v[k][i] = columns.u[k] < 0 ? A(0) : shared_v[(first + i) * stride + k * block_threads + threadIdx.x];
}
template <typename T, typename A>
__device__ __forceinline__ void store_v(
    const Problem& problem, const Scales& scales, const Tables& tables, const TileScheduler& work,
    const Columns& columns, int first, int count, A* shared_v) {
  const int stride = problem.tiling.channels * problem.tiling.width;
#pragma unroll
  for (int k = 0; k < thread_columns; ++k) {
    if (columns.u[k] < 0) continue;
#pragma unroll 1
    for (int n = 0; n < count; ++n)
      shared_v[n * stride + k * block_threads + threadIdx.x] =
          compute_v<T>(problem, scales, tables, work, first + n, columns.channel[k], columns.w[k]);
  }
}

}  // namespace lfcc::cuda
