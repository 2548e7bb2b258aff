// The low-pass pyramid, one separable pass over a map for all scales:
//
//   U[i, c, w] = sum_h R[i, h] X[c, h, w]     in registers
//   Y[(i, j), c] = sum_w K[j, w] U[i, c, w]   from shared memory
//
// Tiling: lowpass_tiles.cuh. A block owns whole windows of its channels, so nothing is atomic. If maps are small it
// processes several units, and always loads the next tile while it processes this one.
//
// Bytes: X + Y for up to 8 filters (scales 1, 2, 4 have 7), another X per 8 more. FLOPs: 16 per element of X for 8
// filters, and 2 cells per column of a map.
//
// Resources, at most on any architecture:
//   forward_kernel   168 registers   0 bytes of static shared memory
// Dynamic shared memory: at most 82 KiB with up to 8 filters, 160 KiB with more (lowpass_plan.h).
#include "cuda/lowpass_columns.cuh"
#include "cuda/lowpass_plan.h"

namespace lfcc::cuda {

namespace {

// Cells of a pass's filters.
__device__ __forceinline__ int pass_cells(const Tables& tables, int pass) {
  int cells = 0;
  for (int i = 0; i < pass_filters; ++i) cells += tables.filters[pass * pass_filters + i].scale;
  return cells;
}

// Y of a unit's cells from U of this tile's columns. If a map has several tiles along its width, partial sums are in
// `cells`, where the same thread always processes the same cell.
template <typename T, typename A>
__device__ __forceinline__ void write_cells(
    const Problem& problem, const Scales& scales, const Tables& tables, const TileScheduler& work, const A* u,
    A* cells) {
  const PooledMap& map = problem.map;
  const Tiling& tile = problem.tiling;
  const A* matrix = static_cast<const A*>(map.col_filters);
  const int channels = work.channels(problem), width = work.width(problem), first = work.pass * pass_filters;
  const bool last = work.w + width == map.width;
  const float by_channels = 1.0f / static_cast<float>(tile.channels);
  T* y = static_cast<T*>(const_cast<void*>(map.y));
  for (int n = static_cast<int>(threadIdx.x); n < pass_cells(tables, work.pass) * tile.channels; n += block_threads) {
    int j = quotient(n, by_channels), i = 0;
    const int c = n - j * tile.channels;
    if (c >= channels) continue;
    while (j >= tables.filters[first + i].scale) j -= tables.filters[first + i++].scale;
    const Filter filter = tables.filters[first + i];
    const Window across = tables.cols(work.index)[filter.first + j];
    const int start = matrix != nullptr ? work.w : max(work.w, across.start);
    const int stop = matrix != nullptr ? work.w + width : min(work.w + width, across.stop);
    const A* channel_u = u + i * tile.u_columns + c * tile.u_c;
    const A* weights = matrix + static_cast<int64_t>(filter.first + j) * map.width;
    A total = work.w == 0 ? A(0) : cells[n];
    for (int w = start; w < stop; ++w) {
      const A weight = matrix != nullptr ? __ldg(weights + w) : A(1);
      if (weight != A(0)) total += weight * channel_u[(w - work.w) * tile.u_w];
    }
    if (!last) {
      cells[n] = total;
      continue;
    }
    if (matrix == nullptr) {
      const Window down = tables.rows(work.index)[first + i];
      total /= static_cast<A>((down.stop - down.start) * (across.stop - across.start));
    }
    const int64_t cell = filter.cell + filter.index * filter.scale + j;
    y[(static_cast<int64_t>(work.image) * scales.cells + cell) * map.channels + work.channel + c] = narrow<T>(total);
  }
}

template <typename T, bool average>
__global__ __launch_bounds__(block_threads, 3) void forward_kernel(
    const __grid_constant__ Problems problems, const __grid_constant__ Layout layout) {
  using A = acc_t<T>;
  unsigned char* memory = dynamic_shared();
  const Tables tables(problems, memory);
  A* shared_u = reinterpret_cast<A*>(memory + layout.uv);
  A* cells = reinterpret_cast<A*>(memory + layout.cells);
  const unsigned passes = problems.scales.passes();
  TileScheduler ahead(problems, passes), here(problems, passes);
  for (int n = 0; n < stages - 1; ++n) Stage<T>(layout, memory, n).prefetch(problems, tables, ahead);
  A u[thread_columns][pass_filters];
  for (int n = 0; here.valid(problems); here.advance(problems), n = n + 1 < stages ? n + 1 : 0) {
    wait_copies<stages - 2>();
    __syncthreads();
    Stage<T>(layout, memory, n > 0 ? n - 1 : stages - 1).prefetch(problems, tables, ahead);
    const Stage<T> stage(layout, memory, n);
    const Problem& problem = problems.problem[here.index];
    const Columns columns(problem, here);
    if (here.h == 0)
#pragma unroll
      for (int k = 0; k < thread_columns; ++k)
#pragma unroll
        for (int i = 0; i < pass_filters; ++i) u[k][i] = 0;
    add_rows<average>(stage.tile, stage.weights, columns, here.rows(problem), problem.tiling.shared_h, u);
    if (here.h + problem.tiling.rows < problem.map.height) continue;
    store_u(problem.tiling, columns, u, shared_u);
    __syncthreads();
    write_cells<T>(problem, problems.scales, tables, here, shared_u, cells);
  }
  wait_copies<0>();
}

}  // namespace

void lowpass(const std::vector<PooledMap>& maps, Type type, const std::vector<int64_t>& scales, cudaStream_t stream) {
  for_type(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel = maps[0].row_filters ? forward_kernel<T, false> : forward_kernel<T, true>;
    for (const Plan& plan : plans<T>(maps, scales, Pass::forward))
      launch(
          "lowpass_forward", kernel, plan.blocks, block_threads, plan.layout.bytes, stream, plan.problems, plan.layout);
  });
}

}  // namespace lfcc::cuda
