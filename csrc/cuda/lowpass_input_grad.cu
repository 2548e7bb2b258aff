// The gradient of the low-pass pyramid with respect to the map, as a gather: every element is written once.
//
//   V[i, c, w] = sum_j K[j, w] dY[(i, j), c]      once per column of a map
//   dX[c, h, w] = sum_i R[i, h] V[i, c, w]        with V in registers
//
// Tiling: lowpass_tiles.cuh. Tiles are stored through shared memory, in runs of 16 bytes.
//
// Bytes: dX + dY. FLOPs: 16 per element of dX for 8 filters, and 2 cells per column of a map.
//
// Resources, at most on any architecture:
//   input_grad_kernel   168 registers   0 bytes of static shared memory
// Dynamic shared memory: at most 57 KiB with up to 8 filters, 160 KiB with more (lowpass_plan.h).
#include "cuda/lowpass_columns.cuh"
#include "cuda/lowpass_plan.h"

namespace lfcc::cuda {

namespace {

template <typename T, bool average>
__global__ __launch_bounds__(block_threads, 3) void input_grad_kernel(
    const __grid_constant__ Problems problems, const __grid_constant__ Layout layout) {
  using A = acc_t<T>;
  constexpr int block = 4;  // rows that are processed together
  unsigned char* memory = dynamic_shared();
  const Tables tables(problems, memory);
  const int passes = problems.scales.passes();
  A* shared_v = reinterpret_cast<A*>(memory + layout.uv);
  TileScheduler here(problems, 1);
  for (int n = 0; here.valid(problems); here.advance(problems), n = 1 - n) {
    const Problem& problem = problems.problem[here.index];
    const Stage<T> stage(layout, memory, n);
    load_weights(problem, tables, here, 0, passes * pass_filters, true, stage.weights->of);
    commit_copies();
    const Columns columns(problem, here);
    if (here.h == 0) store_v<T>(problem, problems.scales, tables, here, columns, 0, passes * pass_filters, shared_v);
    A v[thread_columns][pass_filters];
    load_v(shared_v, problem.tiling, columns, 0, v);
    wait_copies<0>();
    __syncthreads();
    const int rows = here.rows(problem);
    for (int first = 0; first < rows; first += block) {
      A result[block][thread_columns] = {};
      for (int pass = 0; pass < passes; ++pass) {
        if (passes > 1) load_v(shared_v, problem.tiling, columns, pass * pass_filters, v);
#pragma unroll
        for (int row = 0; row < block; ++row) {
          const Weights<A> weights = stage.weights[min(first + row, rows - 1) * passes + pass];
#pragma unroll
          for (int i = 0; i < pass_filters; ++i)
#pragma unroll
            for (int k = 0; k < thread_columns; ++k)
              if (!average || weights.of[i] != A(0)) result[row][k] += weights.of[i] * v[k][i];
        }
      }
#pragma unroll
      for (int row = 0; row < block; ++row)
#pragma unroll
        for (int k = 0; k < thread_columns; ++k)
          if (first + row < rows && columns.u[k] >= 0)
            stage.tile[columns.place[k] + (first + row) * problem.tiling.shared_h] = narrow<T>(result[row][k]);
    }
    __syncthreads();
    store_tile(problem, here, stage.tile);
  }
}

}  // namespace

void lowpass_input_grad(
    const std::vector<PooledMap>& maps, Type type, const std::vector<int64_t>& scales, cudaStream_t stream) {
  for_type(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel = maps[0].row_filters ? input_grad_kernel<T, false> : input_grad_kernel<T, true>;
    for (const Plan& plan : plans<T>(maps, scales, Pass::input_grad))
      launch(
          "lowpass_input_grad", kernel, plan.blocks, block_threads, plan.layout.bytes, stream, plan.problems,
          plan.layout);
  });
}

}  // namespace lfcc::cuda
