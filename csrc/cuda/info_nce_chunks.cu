// Softmax over a chunk of products, which the library left in L2, (rows, keys) of float32 or float64:
//
//   softmax   losses of rows. If a gradient is needed, also what the library multiplies with the keys next: the weights
//             W_ij = P_ij - [j positive of i], P = softmax over the keys of i, in the rows' dtype and times f_j
//   columns   online softmax of the positives' columns
//
// The positive is left out of the sums and so of their rounding: its weight is minus the sum of the others'.
//
// Tiling: softmax, one thread group per row, from a warp to a block of 512, 16 products per thread and step (8 of
// float64); the last step's, which for up to 8192 keys are all, are not read twice. columns, 32 columns per block,
// every sixteenth row per warp, four rows per step; the warps are combined at the end.
//
// Bytes per product: 4 read for the loss, and 2 written with a gradient (8 and 8 of float64). FLOPs: about 20, an exp.
//
// Resources, at most on any architecture:
//   softmax_kernel   122 registers   256 bytes of static shared memory
//   columns_kernel   96 registers   8192 bytes of static shared memory
#include "cuda/info_nce_logits.cuh"

namespace lfcc::cuda {

namespace {

constexpr int block_columns = warp_size, block_warps = chunk_threads / warp_size, rows_per_step = 4;

struct Softmax {
  void *losses, *row_lse, *positive_logits, *temperature_grad, *weights;
  double loss_scale;
};

template <typename T, bool wide>
__global__ void __launch_bounds__(chunk_threads, wide && sizeof(acc_t<T>) == 4 ? 2 : 1) softmax_kernel(
    Chunk chunk, Softmax results, int group_size) {
  using A = acc_t<T>;
  const ThreadGroup group(group_size);
  const Row<A> row(chunk, min(group.row, chunk.rows - 1), false);
  const int steps = (row.count + per_step<A> * group_size - 1) / (per_step<A> * group_size);
  const A positive_logit = row.positive_logit();
  Vector<A, 4> logits[vectors<A>];
  const auto load = [&](int step) {
#pragma unroll
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(group, step * vectors<A> + v);
      logits[v] = row.load_logits(columns, row.load_factors(columns));
    }
    bool all = !row.ids && (step + 1) * per_step<A> * group_size <= row.count;
#pragma unroll
    for (int v = 0; v < vectors<A>; ++v) all &= !Columns<wide>(group, step * vectors<A> + v).contain(row.positive);
    if (all) return;
    uint32_t mask = 0;
#pragma unroll 1  // ids take registers
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(group, step * vectors<A> + v);
      mask |= row.excluded(columns) << 4 * v;
      for (int i = 0; i < 4; ++i)
        if (columns.at(i) == row.positive) mask |= 1u << (4 * v + i);
    }
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n)
      if (mask >> n & 1) logits[n / 4].values[n % 4] = minus_infinity<A>;
  };

  // Over the negatives. dtau sums p times the logit's distance from the positive's. After the last step `logits` has
  // p = exp(logit - m_i).
  A m_i = minus_infinity<A>, l_i = 0, dtau = 0;
  for (int step = 0; step < steps; ++step) {
    load(step);
    A m_new = m_i;
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n) m_new = fmax(m_new, logits[n / 4].values[n % 4]);
    const A m_safe = m_new == minus_infinity<A> ? A(0) : m_new, alpha = exp(m_i - m_safe);
    l_i *= alpha;
    dtau *= alpha;
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n) {
      A& value = logits[n / 4].values[n % 4];
      const A p = exp(value - m_safe);
      l_i += p;
      dtau += p * fmax(value - positive_logit, lowest<A>);
      value = p;
    }
    m_i = m_new;
  }
  const A m_row = fmax(group.max(m_i), positive_logit), alpha = exp(m_i - m_row);
  l_i = group.sum(l_i * alpha);
  dtau = group.sum(dtau * alpha);
  if (group.row >= chunk.rows) return;

  const A denominator = l_i + exp(positive_logit - m_row);
  const int64_t place = chunk.first_row + group.row;
  if (group.rank == 0) {
    static_cast<A*>(results.losses)[place] = (m_row - positive_logit) + log(denominator);
    static_cast<A*>(results.row_lse)[place] = m_row + log(denominator);
    static_cast<A*>(results.positive_logits)[place] = positive_logit;
    if (results.weights)
      static_cast<A*>(results.temperature_grad)[place] = -dtau / denominator * row.inverse_temperature;
  }
  if (!results.weights) return;

  T* weights = static_cast<T*>(results.weights) + group.row * row.count;
  const A scale = static_cast<A>(results.loss_scale) / denominator;
  A p_scale = scale * alpha;
  for (int step = steps - 1;;) {
#pragma unroll
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(group, step * vectors<A> + v);
      const Vector<A, 4> factors = row.load_factors(columns);
      Vector<T, 4> narrowed;
#pragma unroll
      for (int i = 0; i < 4; ++i) narrowed.values[i] = narrow<T>(logits[v].values[i] * p_scale * factors.values[i]);
      columns.store(weights, narrowed, row.count);
      if (columns.contain(row.positive)) weights[row.positive] = narrow<T>(-l_i * scale * row.factors[row.positive]);
    }
    if (--step < 0) return;
    load(step);
#pragma unroll
    for (int n = 0; n < per_step<A>; ++n) logits[n / 4].values[n % 4] = exp(logits[n / 4].values[n % 4] - m_row);
    p_scale = scale;
  }
}

template <typename A>
__global__ void __launch_bounds__(chunk_threads) columns_kernel(
    Chunk chunk, const A* positive_logits, A* l, A* col_lse, A* losses) {
  __shared__ A warp_m[block_warps][block_columns], warp_l[block_warps][block_columns];
  const int lane = threadIdx.x % block_columns, warp = threadIdx.x / block_columns;
  const int64_t place = int64_t(blockIdx.x) * block_columns + lane, student = min(place, chunk.batch - 1);
  const int64_t column = student + chunk.positive_offset;
  const A* products = static_cast<const A*>(chunk.products) + column;
  const A* factors = static_cast<const A*>(chunk.factors);
  const A col_factor = factors[chunk.batch + column], inverse = *static_cast<const A*>(chunk.inverse_temperature);
  const int64_t col_id = chunk.teacher_ids ? chunk.teacher_ids[column] : 0;

  const bool resume = warp == 0 && chunk.first_row > 0;
  A m_i = resume ? col_lse[student] : minus_infinity<A>, l_i = resume ? l[student] : A(0);
  for (int64_t first = warp; first < chunk.rows; first += block_warps * rows_per_step) {
    A logits[rows_per_step], m_new = m_i;
#pragma unroll
    for (int i = 0; i < rows_per_step; ++i) {
      const int64_t row = first + i * block_warps, row_student = chunk.first_row + row;
      logits[i] = minus_infinity<A>;
      if (row < chunk.rows &&
          (!chunk.teacher_ids || row_student == student || chunk.student_ids[row_student] != col_id))
        logits[i] = logit(products[row * chunk.keys], col_factor, factors[row_student], inverse);
      m_new = fmax(m_new, logits[i]);
    }
    const A m_safe = m_new == minus_infinity<A> ? A(0) : m_new;
    l_i *= exp(m_i - m_safe);
#pragma unroll
    for (int i = 0; i < rows_per_step; ++i) l_i += exp(logits[i] - m_safe);
    m_i = m_new;
  }
  warp_m[warp][lane] = m_i;
  warp_l[warp][lane] = l_i;
  __syncthreads();
  if (warp > 0 || place >= chunk.batch) return;

  A m_col = minus_infinity<A>;
  for (int i = 0; i < block_warps; ++i) m_col = fmax(m_col, warp_m[i][lane]);
  const A m_safe = m_col == minus_infinity<A> ? A(0) : m_col;
  l_i = 0;
  for (int i = 0; i < block_warps; ++i) l_i += warp_l[i][lane] * exp(warp_m[i][lane] - m_safe);
  l[student] = l_i;
  col_lse[student] = m_col;
  if (chunk.first_row + chunk.rows < chunk.batch) return;
  col_lse[student] = m_col + log(l_i);
  losses[student] = (losses[student] + ((m_col - positive_logits[student]) + log(l_i))) / 2;
}

}  // namespace

void chunk_softmax(
    const Chunk& chunk, void* losses, void* row_lse, void* positive_logits, void* temperature_grad, void* weights,
    double loss_scale, cudaStream_t stream) {
  const Softmax results{losses, row_lse, positive_logits, temperature_grad, weights, loss_scale};
  const bool wide = in_fours(chunk, {weights});
  for_type(chunk.type, [&](auto value) {
    using T = decltype(value);
    const int group_size = group_size_for(chunk.keys, per_step<acc_t<T>>, chunk_threads);
    launch(
        "chunk_softmax", wide ? softmax_kernel<T, true> : softmax_kernel<T, false>,
        blocks_for(chunk.rows, group_size, chunk_threads), chunk_threads, 0, stream, chunk, results, group_size);
  });
}

void chunk_columns(
    const Chunk& chunk, const void* positive_logits, void* l, void* col_lse, void* losses, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((chunk.batch + block_columns - 1) / block_columns));
  for_type(chunk.type, [&](auto value) {
    using A = acc_t<decltype(value)>;
    launch(
        "chunk_columns", columns_kernel<A>, blocks, chunk_threads, 0, stream, chunk,
        static_cast<const A*>(positive_logits), static_cast<A*>(l), static_cast<A*>(col_lse), static_cast<A*>(losses));
  });
}

}  // namespace lfcc::cuda
