// The gradients of the low-pass pyramid in its filters, from one pass over the map:
//
//   V[i, c, w] = sum_j K[j, w] dY[(i, j), c]   dR[i, h] = sum_bcw X[c, h, w] V[i, c, w]
//   U[i, c, w] = sum_h R[i, h] X[c, h, w]      dK[j, w] = sum_bci dY[(i, j), c] U[i, c, w]
//
// Tiling: lowpass_tiles.h. Sums over channels go over the lanes of a warp, then over warps, then over the units of a
// block, and a second kernel puts the blocks together: always in one order, and nothing is atomic.
//
// Bytes: X + dY for up to 8 filters. FLOPs: 32 an element of X for 8 filters, and 4 cells a column of a map.
//
// Resources, at most on any architecture:
//   filter_grad_kernel   248 registers   0 bytes of static shared memory
//   sum_parts_kernel     32 registers   0 bytes of static shared memory
// Dynamic shared memory: at most 82 KiB with up to 8 filters, 160 KiB with more (lowpass_tiling.h).
#include "cuda/lowpass_columns.h"
#include "cuda/lowpass_tiling.h"

namespace lfcc::cuda {

namespace {

constexpr int warps = pool_threads / warp_size;

// Sums pass_filters numbers over the warp, in 9 shuffles where each by itself takes 40: at every step a lane gives half
// of its numbers away and adds what it gets to the other half. Lane l returns the sum of values[l % pass_filters].
template <typename A>
__device__ __forceinline__ A warp_sums(A (&values)[pass_filters]) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
  for (int half = pass_filters / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < pass_filters / 2; ++i) {
      if (i >= half) break;
      const A given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    }
  }
  A sum = values[0];
#pragma unroll
  for (int other = pass_filters; other < warp_size; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  return sum;
}

// One job. A block keeps sums of its own, (filters padded, H) and (filters padded, W) at `parts`, which
// sum_parts_kernel puts together in the order of blocks.
template <typename T>
__global__ __launch_bounds__(pool_threads, 2) void filter_grad_kernel(
    const __grid_constant__ Jobs jobs, const __grid_constant__ Layout layout, acc_t<T>* parts) {
  using A = acc_t<T>;
  unsigned char* memory = dynamic_shared();
  const Tables tables(jobs, memory);
  const Job& job = jobs.job[0];
  const PooledMap& map = job.map;
  const Tiling& tile = job.tiling;
  const int filters = jobs.scales.passes() * pass_filters, warp = static_cast<int>(threadIdx.x) / warp_size;
  A* of_rows = parts + static_cast<int64_t>(blockIdx.x) * filters * (map.height + map.width);
  A* of_cols = of_rows + filters * map.height;
  for (int64_t n = threadIdx.x; n < static_cast<int64_t>(filters) * (map.height + map.width); n += pool_threads)
    of_rows[n] = 0;
  A* shared_sums = reinterpret_cast<A*>(memory + layout.sums);
  A* spreads = shared_sums;                                    // until there are sums of a unit
  A* warp_rows = reinterpret_cast<A*>(memory + layout.cells);  // (rows, warps, pass_filters)
  const unsigned passes = jobs.scales.passes();
  Cursor ahead(jobs, passes), here(jobs, passes);
  for (int n = 0; n < stages - 1; ++n) Stage<T>(layout, memory, n).fetch(jobs, tables, ahead);
  A sums[thread_columns][pass_filters], values[thread_columns][pass_filters];
  for (int n = 0; here.valid(jobs); here.advance(jobs), n = n + 1 < stages ? n + 1 : 0) {
    wait_copies<stages - 2>();
    __syncthreads();
    Stage<T>(layout, memory, n > 0 ? n - 1 : stages - 1).fetch(jobs, tables, ahead);
    const Stage<T> stage(layout, memory, n);
    const Columns columns(job, here);
    const int first = here.pass * pass_filters, rows = here.rows(job);
    if (here.h == 0) {
      spread_all<T>(job, jobs.scales, tables, here, columns, first, pass_filters, spreads);
      recall(spreads, tile, columns, 0, values);
#pragma unroll
      for (int k = 0; k < thread_columns; ++k)
#pragma unroll
        for (int i = 0; i < pass_filters; ++i) sums[k][i] = 0;
    }
    add_rows<false>(stage.tile, stage.weights, columns, rows, tile.shared_h, sums);
    for (int row = 0; row < rows; ++row) {
      A along[pass_filters] = {};
#pragma unroll
      for (int k = 0; k < thread_columns; ++k) {
        if (columns.sum[k] < 0) continue;
        const A value = widen(stage.tile[columns.place[k] + row * tile.shared_h]);
#pragma unroll
        for (int i = 0; i < pass_filters; ++i) along[i] += value * values[k][i];
      }
      const A sum = warp_sums(along);
      const int lane = static_cast<int>(threadIdx.x) % warp_size;
      if (lane < pass_filters) warp_rows[(row * warps + warp) * pass_filters + lane] = sum;
    }
    const bool last = here.h + tile.rows >= map.height;
    if (last) {
      __syncthreads();  // others may still read what they spread
      share_sums(tile, columns, sums, shared_sums);
    }
    __syncthreads();
    // Of every number the same thread for all units, so that nobody has to wait.
    for (int v = static_cast<int>(threadIdx.x); v < rows * pass_filters; v += pool_threads) {
      const int row = v / pass_filters, i = v % pass_filters;
      A total = 0;
      for (int other = 0; other < warps; ++other) total += warp_rows[(row * warps + other) * pass_filters + i];
      of_rows[static_cast<int64_t>(first + i) * map.height + here.h + row] += total;
    }
    if (!last) continue;
    const int channels = here.channels(job), width = here.width(job);
    const T* grad = static_cast<const T*>(map.y) +
        static_cast<int64_t>(here.image) * jobs.scales.cells * map.channels + here.channel;
    for (int v = static_cast<int>(threadIdx.x); v < filters * tile.width; v += pool_threads) {
      const int j = v / tile.width, w = v - j * tile.width;
      if (w >= width) continue;
      const Filter col = tables.filters[j];
      A total = 0;
      for (int i = 0; i < pass_filters; ++i) {
        const Filter row = tables.filters[first + i];
        if (row.scale == 0 || row.first != col.first) continue;
        const T* of_cell = grad + static_cast<int64_t>(row.cell + row.index * row.scale + col.index) * map.channels;
        for (int c = 0; c < channels; ++c)
          total += widen(of_cell[c]) * shared_sums[i * tile.sum_columns + c * tile.sum_c + w * tile.sum_w];
      }
      of_cols[static_cast<int64_t>(j) * map.width + here.w + w] += total;
    }
  }
  wait_copies<0>();
}

// dR and dK, (filters, H) and (filters, W), from the parts of all blocks. One thread a number.
template <typename A>
__global__ __launch_bounds__(pool_threads) void sum_parts_kernel(
    const A* parts, int blocks, int filters, int padded, int height, int width, A* grad_rows, A* grad_cols) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * pool_threads + threadIdx.x;
  const int64_t of_rows = static_cast<int64_t>(filters) * height, of_cols = static_cast<int64_t>(filters) * width;
  if (n >= of_rows + of_cols) return;
  const bool row = n < of_rows;
  const int64_t place = row ? n : static_cast<int64_t>(padded) * height + n - of_rows;
  const int64_t step = static_cast<int64_t>(padded) * (height + width);
  A total = 0;
#pragma unroll 4
  for (int block = 0; block < blocks; ++block) total += parts[block * step + place];
  (row ? grad_rows[n] : grad_cols[n - of_rows]) = total;
}

}  // namespace

void lowpass_filter_grad(
    const PooledMap& map, Type type, const std::vector<int64_t>& scales, const std::function<void*(int64_t)>& memory,
    void* grad_rows, void* grad_cols, cudaStream_t stream) {
  for_type(type, [&](auto element) {
    using T = decltype(element);
    using A = acc_t<T>;
    const Plan plan = plans<T>({map}, scales, Pass::filter_grad).front();
    const int filters = plan.jobs.scales.filters, padded = plan.jobs.scales.passes() * pass_filters;
    A* parts = static_cast<A*>(memory(int64_t(plan.blocks) * padded * (map.height + map.width)));
    launch(
        "lowpass_filter_grad", filter_grad_kernel<T>, plan.blocks, pool_threads, plan.layout.bytes, stream, plan.jobs,
        plan.layout, parts);
    const int64_t numbers = int64_t(filters) * (map.height + map.width);
    launch(
        "lowpass_sum_parts", sum_parts_kernel<A>, static_cast<unsigned>(ceil_div(numbers, pool_threads)), pool_threads,
        0, stream, parts, static_cast<int>(plan.blocks), filters, padded, map.height, map.width,
        static_cast<A*>(grad_rows), static_cast<A*>(grad_cols));
  });
}

}  // namespace lfcc::cuda
