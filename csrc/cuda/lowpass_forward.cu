// The low-pass pyramid, one separable pass over a map for all scales:
//
//   U[i, c, w] = sum_h R[i, h] X[c, h, w]   in registers
//   Y[(i, j), c] = sum_w K[j, w] U[i, c, w]   from shared memory
//
// Tiling: lowpass_tiles.h. A block owns whole windows of its channels, so that nothing is atomic; where a map is small
// it takes one unit after the other, and loads the next tile while it works on this one.
//
// Bytes: X + Y for up to 8 filters (scales 1, 2, 4 have 7), another X for every 8 more. FLOPs: 16 an element of X for 8
// filters, and 2 cells a column of a map.
//
// Resources, at most on any architecture:
//   forward_kernel   168 registers   0 bytes of static shared memory
// Dynamic shared memory: at most 82 KiB with up to 8 filters, 160 KiB with more (lowpass_tiling.h).
#include "cuda/lowpass_columns.h"
#include "cuda/lowpass_tiling.h"

namespace lfcc::cuda {

namespace {

// Cells of a pass's filters.
__device__ __forceinline__ int pass_cells(const Tables& tables, int pass) {
  int cells = 0;
  for (int i = 0; i < pass_filters; ++i) cells += tables.filters[pass * pass_filters + i].scale;
  return cells;
}

// Y of a unit's cells from U of this tile's columns; of several tiles across a map one after the other, the same
// thread for the same cell, with what they summed so far in `cells`.
template <typename T, typename A>
__device__ __forceinline__ void finish_cells(
    const Job& job, const Scales& scales, const Tables& tables, const Cursor& at, const A* sums, A* cells) {
  const PooledMap& map = job.map;
  const Tiling& tile = job.tiling;
  const A* matrix = static_cast<const A*>(map.col_filters);
  const int channels = at.channels(job), width = at.width(job), first = at.pass * pass_filters;
  const bool last = at.w + width == map.width;
  const float by_channels = 1.0f / static_cast<float>(tile.channels);
  T* y = static_cast<T*>(const_cast<void*>(map.y));
  for (int n = static_cast<int>(threadIdx.x); n < pass_cells(tables, at.pass) * tile.channels; n += pool_threads) {
    int j = quotient(n, by_channels), i = 0;
    const int c = n - j * tile.channels;
    if (c >= channels) continue;
    while (j >= tables.filters[first + i].scale) j -= tables.filters[first + i++].scale;
    const Filter filter = tables.filters[first + i];
    const Window along = tables.cols(at.number)[filter.first + j];
    const int start = matrix != nullptr ? at.w : max(at.w, along.start);
    const int stop = matrix != nullptr ? at.w + width : min(at.w + width, along.stop);
    const A* of_channel = sums + i * tile.sum_columns + c * tile.sum_c;
    const A* weights = matrix + static_cast<int64_t>(filter.first + j) * map.width;
    A total = at.w == 0 ? A(0) : cells[n];
    for (int w = start; w < stop; ++w) {
      const A weight = matrix != nullptr ? __ldg(weights + w) : A(1);
      if (weight != A(0)) total += weight * of_channel[(w - at.w) * tile.sum_w];
    }
    if (!last) {
      cells[n] = total;
      continue;
    }
    if (matrix == nullptr) {
      const Window down = tables.rows(at.number)[first + i];
      total /= static_cast<A>((down.stop - down.start) * (along.stop - along.start));
    }
    const int64_t cell = filter.cell + filter.index * filter.scale + j;
    y[(static_cast<int64_t>(at.image) * scales.cells + cell) * map.channels + at.channel + c] = narrow<T>(total);
  }
}

template <typename T, bool average>
__global__ __launch_bounds__(pool_threads, 3) void forward_kernel(
    const __grid_constant__ Jobs jobs, const __grid_constant__ Layout layout) {
  using A = acc_t<T>;
  unsigned char* memory = dynamic_shared();
  const Tables tables(jobs, memory);
  A* shared_sums = reinterpret_cast<A*>(memory + layout.sums);
  A* cells = reinterpret_cast<A*>(memory + layout.cells);
  const unsigned passes = jobs.scales.passes();
  Cursor ahead(jobs, passes), here(jobs, passes);
  for (int n = 0; n < stages - 1; ++n) Stage<T>(layout, memory, n).fetch(jobs, tables, ahead);
  A sums[thread_columns][pass_filters];
  for (int n = 0; here.valid(jobs); here.advance(jobs), n = n + 1 < stages ? n + 1 : 0) {
    wait_copies<stages - 2>();
    __syncthreads();
    Stage<T>(layout, memory, n > 0 ? n - 1 : stages - 1).fetch(jobs, tables, ahead);
    const Stage<T> stage(layout, memory, n);
    const Job& job = jobs.job[here.number];
    const Columns columns(job, here);
    if (here.h == 0)
#pragma unroll
      for (int k = 0; k < thread_columns; ++k)
#pragma unroll
        for (int i = 0; i < pass_filters; ++i) sums[k][i] = 0;
    add_rows<average>(stage.tile, stage.weights, columns, here.rows(job), job.tiling.shared_h, sums);
    if (here.h + job.tiling.rows < job.map.height) continue;
    share_sums(job.tiling, columns, sums, shared_sums);
    __syncthreads();
    finish_cells<T>(job, jobs.scales, tables, here, shared_sums, cells);
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
          "lowpass_forward", kernel, plan.blocks, pool_threads, plan.layout.bytes, stream, plan.jobs, plan.layout);
  });
}

}  // namespace lfcc::cuda
