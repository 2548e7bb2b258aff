// The gradients of the low-pass pyramid with respect to its filters, from one pass over the map:
//
//   V[i, c, w] = sum_j K[j, w] dY[(i, j), c]   dR[i, h] = sum_bcw X[c, h, w] V[i, c, w]
//   U[i, c, w] = sum_h R[i, h] X[c, h, w]      dK[j, w] = sum_bci dY[(i, j), c] U[i, c, w]
//
// Tiling: lowpass_tiles.cuh. Channels are summed over the lanes of a warp, then over warps, then over the units of a
// block, and a second kernel adds the blocks: the order is fixed and nothing is atomic.
//
// Bytes: X + dY for up to 8 filters. FLOPs: 32 per element of X for 8 filters, and 4 cells per column of a map.
//
// Resources, at most on any architecture:
//   filter_grad_kernel   248 registers   0 bytes of static shared memory
//   sum_parts_kernel     32 registers   0 bytes of static shared memory
// Dynamic shared memory: at most 82 KiB with up to 8 filters, 160 KiB with more (lowpass_plan.h).
#include "cuda/lowpass_columns.cuh"
#include "cuda/lowpass_plan.h"

namespace lfcc::cuda {

namespace {

constexpr int warps = block_threads / warp_size;

// Sums pass_filters values over the warp in 9 shuffles instead of 40: at every step a lane sends half of its values and
// adds those it receives to the other half. Lane l returns the sum of values[l % pass_filters].
template <typename A>
__device__ __forceinline__ A warp_sums(A (&values)[pass_filters]) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
  for (int half = pass_filters / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < pass_filters / 2; ++i) {
      if (i >= half) break;
      const A sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, half);
    }
  }
  A sum = values[0];
#pragma unroll
  for (int other = pass_filters; other < warp_size; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  return sum;
}

// One problem. Every block stores partial sums to `parts`, (padded filters, H) and (padded filters, W), which
// sum_parts_kernel adds in the order of blocks.
template <typename T>
__global__ __launch_bounds__(block_threads, 2) void filter_grad_kernel(
    const __grid_constant__ Problems problems, const __grid_constant__ Layout layout, acc_t<T>* parts) {
  using A = acc_t<T>;
  unsigned char* memory = dynamic_shared();
  const Tables tables(problems, memory);
  const Problem& problem = problems.problem[0];
  const PooledMap& map = problem.map;
  const Tiling& tile = problem.tiling;
  const int filters = problems.scales.passes() * pass_filters, warp = static_cast<int>(threadIdx.x) / warp_size;
  A* row_grads = parts + static_cast<int64_t>(blockIdx.x) * filters * (map.height + map.width);
  A* col_grads = row_grads + filters * map.height;
  for (int64_t n = threadIdx.x; n < static_cast<int64_t>(filters) * (map.height + map.width); n += block_threads)
    row_grads[n] = 0;
  A* shared_u = reinterpret_cast<A*>(memory + layout.uv);
  A* shared_v = shared_u;                                      // until U of a unit is stored
  A* warp_parts = reinterpret_cast<A*>(memory + layout.cells);  // (rows, warps, pass_filters)
  const unsigned passes = problems.scales.passes();
  TileScheduler ahead(problems, passes), here(problems, passes);
  for (int n = 0; n < stages - 1; ++n) Stage<T>(layout, memory, n).prefetch(problems, tables, ahead);
  A u[thread_columns][pass_filters], v[thread_columns][pass_filters];
  for (int n = 0; here.valid(problems); here.advance(problems), n = n + 1 < stages ? n + 1 : 0) {
    wait_copies<stages - 2>();
    __syncthreads();
    Stage<T>(layout, memory, n > 0 ? n - 1 : stages - 1).prefetch(problems, tables, ahead);
    const Stage<T> stage(layout, memory, n);
    const Columns columns(problem, here);
    const int first = here.pass * pass_filters, rows = here.rows(problem);
    if (here.h == 0) {
      store_v<T>(problem, problems.scales, tables, here, columns, first, pass_filters, shared_v);
      load_v(shared_v, tile, columns, 0, v);
#pragma unroll
      for (int k = 0; k < thread_columns; ++k)
#pragma unroll
        for (int i = 0; i < pass_filters; ++i) u[k][i] = 0;
    }
    add_rows<false>(stage.tile, stage.weights, columns, rows, tile.shared_h, u);
    for (int row = 0; row < rows; ++row) {
      A row_grad[pass_filters] = {};
#pragma unroll
      for (int k = 0; k < thread_columns; ++k) {
        if (columns.u[k] < 0) continue;
        const A value = widen(stage.tile[columns.place[k] + row * tile.shared_h]);
#pragma unroll
        for (int i = 0; i < pass_filters; ++i) row_grad[i] += value * v[k][i];
      }
      const A sum = warp_sums(row_grad);
      const int lane = static_cast<int>(threadIdx.x) % warp_size;
      if (lane < pass_filters) warp_parts[(row * warps + warp) * pass_filters + lane] = sum;
    }
    const bool last = here.h + tile.rows >= map.height;
    if (last) {
      __syncthreads();  // other threads may still load V
      store_u(tile, columns, u, shared_u);
    }
    __syncthreads();
    // The same thread adds to an element for all units, so no barrier is needed.
    for (int n = static_cast<int>(threadIdx.x); n < rows * pass_filters; n += block_threads) {
      const int row = n / pass_filters, i = n % pass_filters;
      A total = 0;
      for (int other = 0; other < warps; ++other) total += warp_parts[(row * warps + other) * pass_filters + i];
      row_grads[static_cast<int64_t>(first + i) * map.height + here.h + row] += total;
    }
    if (!last) continue;
    const int channels = here.channels(problem), width = here.width(problem);
    const T* grad = static_cast<const T*>(map.y) +
        static_cast<int64_t>(here.image) * problems.scales.cells * map.channels + here.channel;
    for (int n = static_cast<int>(threadIdx.x); n < filters * tile.width; n += block_threads) {
      const int j = n / tile.width, w = n - j * tile.width;
      if (w >= width) continue;
      const Filter col = tables.filters[j];
      A total = 0;
      for (int i = 0; i < pass_filters; ++i) {
        const Filter row = tables.filters[first + i];
        if (row.scale == 0 || row.first != col.first) continue;
        const T* cell_grad = grad + static_cast<int64_t>(row.cell + row.index * row.scale + col.index) * map.channels;
        for (int c = 0; c < channels; ++c)
          total += widen(cell_grad[c]) * shared_u[i * tile.u_columns + c * tile.u_c + w * tile.u_w];
      }
      col_grads[static_cast<int64_t>(j) * map.width + here.w + w] += total;
    }
  }
  wait_copies<0>();
}

// dR and dK, (filters, H) and (filters, W), from the parts of all blocks, one thread per element.
template <typename A>
__global__ __launch_bounds__(block_threads) void sum_parts_kernel(
    const A* parts, int blocks, int filters, int padded, int height, int width, A* grad_rows, A* grad_cols) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const int64_t row_values = static_cast<int64_t>(filters) * height, values = row_values + int64_t(filters) * width;
  if (n >= values) return;
  const bool row = n < row_values;
  const int64_t place = row ? n : static_cast<int64_t>(padded) * height + n - row_values;
  const int64_t step = static_cast<int64_t>(padded) * (height + width);
  A total = 0;
#pragma unroll 4
  for (int block = 0; block < blocks; ++block) total += parts[block * step + place];
  (row ? grad_rows[n] : grad_cols[n - row_values]) = total;
}

}  // namespace

void lowpass_filter_grad(
    const PooledMap& map, Type type, const std::vector<int64_t>& scales, const std::function<void*(int64_t)>& allocate,
    void* grad_rows, void* grad_cols, cudaStream_t stream) {
  for_type(type, [&](auto element) {
    using T = decltype(element);
    using A = acc_t<T>;
    const Plan plan = plans<T>({map}, scales, Pass::filter_grad).front();
    const int filters = plan.problems.scales.filters, padded = plan.problems.scales.passes() * pass_filters;
    A* parts = static_cast<A*>(allocate(int64_t(plan.blocks) * padded * (map.height + map.width)));
    launch(
        "lowpass_filter_grad", filter_grad_kernel<T>, plan.blocks, block_threads, plan.layout.bytes, stream,
        plan.problems, plan.layout, parts);
    const int64_t values = int64_t(filters) * (map.height + map.width);
    launch(
        "lowpass_sum_parts", sum_parts_kernel<A>, static_cast<unsigned>(ceil_div(values, block_threads)), block_threads,
        0, stream, parts, static_cast<int>(plan.blocks), filters, padded, map.height, map.width,
        static_cast<A*>(grad_rows), static_cast<A*>(grad_cols));
  });
}

}  // namespace lfcc::cuda
