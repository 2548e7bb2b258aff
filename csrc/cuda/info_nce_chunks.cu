// Softmax over a chunk of products that the library has left in the last cache, (rows, keys) of float32 or float64:
//
//   softmax   losses of rows; where a gradient is wanted, what the library multiplies with the keys next: the weights
//             W_ij = P_ij - [j positive of i], P = softmax over the keys of i, in the rows' type and times f_j
//   columns   running maximum and sum of exponentials of the positives' columns
//
// The positive is kept out of sums and of rounding: its weight is minus the share of all others.
//
// Tiling: softmax, a team of threads a row, from a warp to a block of 512, 16 products a thread and step (8 of
// float64); those of the last step, for up to 8192 keys all, are not read twice. columns, a block 32 columns, a warp
// every sixteenth row of them, four rows a step; the warps meet at the end.
//
// Bytes a product: 4 read for the loss, and 2 written with a gradient (8 and 8 of float64). FLOPs: about 20, an exp.
//
// Resources, at most on any architecture:
//   softmax_kernel   122 registers   256 bytes of static shared memory
//   columns_kernel   96 registers   8192 bytes of static shared memory
#include "cuda/info_nce_logits.h"

namespace lfcc::cuda {

namespace {

constexpr int block_columns = warp_size, block_warps = chunk_threads / warp_size, rows_at_once = 4;

struct Softmax {
  void *losses, *row_lse, *positives, *temperature_grad, *weights;
  double gain;
};

template <typename T, bool wide>
__global__ void __launch_bounds__(chunk_threads, wide && sizeof(acc_t<T>) == 4 ? 2 : 1) softmax_kernel(
    Chunk chunk, Softmax results, int lanes) {
  using A = acc_t<T>;
  const Team team(lanes);
  const Row<A> row(chunk, min(team.row, chunk.rows - 1), false);
  const int groups = (row.count + per_step<A> * lanes - 1) / (per_step<A> * lanes);
  const A at_positive = row.at_positive();
  Vector<A, 4> those[vectors<A>];
  const auto load = [&](int group) {
#pragma unroll
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(team, group * vectors<A> + v);
      those[v] = row.logits_at(columns, row.factors_at(columns));
    }
    bool all = !row.ids && (group + 1) * per_step<A> * lanes <= row.count;
#pragma unroll
    for (int v = 0; v < vectors<A>; ++v) all &= !Columns<wide>(team, group * vectors<A> + v).have(row.positive);
    if (all) return;
    uint32_t mask = 0;
#pragma unroll 1  // ids take registers
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(team, group * vectors<A> + v);
      mask |= row.left_out(columns) << 4 * v;
      for (int i = 0; i < 4; ++i)
        if (columns.at(i) == row.positive) mask |= 1u << (4 * v + i);
    }
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n)
      if (mask >> n & 1) those[n / 4].values[n % 4] = nothing<A>;
  };

  // Of the negatives: maximum, sum of exp(A - maximum), the same times what lies between A and the positive's. What is
  // left in `those` after the last group: exp(A - peak).
  A peak = nothing<A>, others = 0, weighted = 0;
  for (int group = 0; group < groups; ++group) {
    load(group);
    A highest = peak;
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n) highest = fmax(highest, those[n / 4].values[n % 4]);
    const A base = highest == nothing<A> ? A(0) : highest, shrink = exp(peak - base);
    others *= shrink;
    weighted *= shrink;
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n) {
      A& value = those[n / 4].values[n % 4];
      const A share = exp(value - base);
      others += share;
      weighted += share * fmax(value - at_positive, lowest<A>);
      value = share;
    }
    peak = highest;
  }
  const A top = fmax(team.maximum(peak), at_positive), shrink = exp(peak - top);
  others = team.sum(others * shrink);
  weighted = team.sum(weighted * shrink);
  if (team.row >= chunk.rows) return;

  const A total = others + exp(at_positive - top);
  const int64_t place = chunk.first_row + team.row;
  if (team.lane == 0) {
    static_cast<A*>(results.losses)[place] = (top - at_positive) + log(total);
    static_cast<A*>(results.row_lse)[place] = top + log(total);
    static_cast<A*>(results.positives)[place] = at_positive;
    if (results.weights)
      static_cast<A*>(results.temperature_grad)[place] = -weighted / total * row.inverse_temperature;
  }
  if (!results.weights) return;

  T* weights = static_cast<T*>(results.weights) + team.row * row.count;
  const A scale = static_cast<A>(results.gain) / total;
  A of_share = scale * shrink;
  for (int group = groups - 1;;) {
#pragma unroll
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(team, group * vectors<A> + v);
      const Vector<A, 4> factors = row.factors_at(columns);
      Vector<T, 4> narrowed;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        narrowed.values[i] = narrow<T>(those[v].values[i] * of_share * factors.values[i]);
      columns.store(weights, narrowed, row.count);
      if (columns.have(row.positive)) weights[row.positive] = narrow<T>(-others * scale * row.factors[row.positive]);
    }
    if (--group < 0) return;
    load(group);
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n) those[n / 4].values[n % 4] = exp(those[n / 4].values[n % 4] - top);
    of_share = scale;
  }
}

template <typename A>
__global__ void __launch_bounds__(chunk_threads) columns_kernel(
    Chunk chunk, const A* positives, A* totals, A* col_lse, A* losses) {
  __shared__ A peaks[block_warps][block_columns], sums[block_warps][block_columns];
  const int lane = threadIdx.x % block_columns, warp = threadIdx.x / block_columns;
  const int64_t place = int64_t(blockIdx.x) * block_columns + lane, own = min(place, chunk.batch - 1);
  const int64_t column = own + chunk.positive_offset;
  const A* products = static_cast<const A*>(chunk.products) + column;
  const A* factors = static_cast<const A*>(chunk.factors);
  const A own_factor = factors[chunk.batch + column], inverse = *static_cast<const A*>(chunk.inverse_temperature);
  const int64_t own_id = chunk.teacher_ids ? chunk.teacher_ids[column] : 0;

  const bool goes_on = warp == 0 && chunk.first_row > 0;
  A peak = goes_on ? col_lse[own] : nothing<A>, total = goes_on ? totals[own] : A(0);
  for (int64_t first = warp; first < chunk.rows; first += block_warps * rows_at_once) {
    A logits[rows_at_once], highest = peak;
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) {
      const int64_t row = first + i * block_warps, student = chunk.first_row + row;
      logits[i] = nothing<A>;
      if (row < chunk.rows && (!chunk.teacher_ids || student == own || chunk.student_ids[student] != own_id))
        logits[i] = logit(products[row * chunk.keys], own_factor, factors[student], inverse);
      highest = fmax(highest, logits[i]);
    }
    const A base = highest == nothing<A> ? A(0) : highest;
    total *= exp(peak - base);
#pragma unroll
    for (int i = 0; i < rows_at_once; ++i) total += exp(logits[i] - base);
    peak = highest;
  }
  peaks[warp][lane] = peak;
  sums[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || place >= chunk.batch) return;

  A highest = nothing<A>;
  for (int i = 0; i < block_warps; ++i) highest = fmax(highest, peaks[i][lane]);
  const A base = highest == nothing<A> ? A(0) : highest;
  total = 0;
  for (int i = 0; i < block_warps; ++i) total += sums[i][lane] * exp(peaks[i][lane] - base);
  totals[own] = total;
  col_lse[own] = highest;
  if (chunk.first_row + chunk.rows < chunk.batch) return;
  col_lse[own] = highest + log(total);
  losses[own] = (losses[own] + ((highest - positives[own]) + log(total))) / 2;
}

}  // namespace

void chunk_softmax(
    const Chunk& chunk, void* losses, void* row_lse, void* positives, void* temperature_grad, void* weights,
    double gain, cudaStream_t stream) {
  const Softmax results{losses, row_lse, positives, temperature_grad, weights, gain};
  const bool wide = in_fours(chunk, {weights});
  for_type(chunk.type, [&](auto value) {
    using T = decltype(value);
    const int lanes = lanes_for(chunk.keys, per_step<acc_t<T>>, chunk_threads);
    launch(
        "chunk_softmax", wide ? softmax_kernel<T, true> : softmax_kernel<T, false>,
        blocks_for(chunk.rows, lanes, chunk_threads), chunk_threads, 0, stream, chunk, results, lanes);
  });
}

void chunk_columns(
    const Chunk& chunk, const void* positives, void* totals, void* col_lse, void* losses, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((chunk.batch + block_columns - 1) / block_columns));
  for_type(chunk.type, [&](auto value) {
    using A = acc_t<decltype(value)>;
    launch(
        "chunk_columns", columns_kernel<A>, blocks, chunk_threads, 0, stream, chunk, static_cast<const A*>(positives),
        static_cast<A*>(totals), static_cast<A*>(col_lse), static_cast<A*>(losses));
  });
}

}  // namespace lfcc::cuda
