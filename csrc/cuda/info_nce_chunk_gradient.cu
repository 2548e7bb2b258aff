// Gradient weights of a chunk of products that the library has left in the last cache, from known log-sum-exps: in the
// rows' type, times the factor of the row that each multiplies, what the library multiplies with the other side next.
//
//   of rows      W_ij = g_i (exp(A_ij - LSE_i) - [j positive of i])
//   of columns   the same with gradient and log-sum-exp of the positive's column j
//   symmetric    the mean of both
//
// Rows are those of the side whose gradient is wanted, so that no chunk adds to what another one wrote.
//
// Tiling: a team of threads a row, from a warp to a block of 512, 16 products a thread and step (8 of float64).
//
// Bytes a product: 4 read and 2 written (8 and 8 of float64). FLOPs: about 20, an exp, symmetric 25 and two.
//
// Resources, at most on any architecture:
//   gradient_kernel   122 registers   128 bytes of static shared memory
#include <type_traits>

#include "cuda/info_nce_logits.h"

namespace lfcc::cuda {

namespace {

struct Gradient {
  const void *grad, *row_lse, *col_lse, *magnitude;
  void *slopes, *weights;
  double gain;
};

// With `along_rows` the losses of the chunk's rows, with `along_columns` those of its columns.
template <typename T, bool along_rows, bool along_columns, bool wide>
__global__ void __launch_bounds__(chunk_threads, wide && sizeof(acc_t<T>) == 4 ? 2 : 1) gradient_kernel(
    Chunk chunk, Gradient given, bool of_teacher, int lanes) {
  using A = acc_t<T>;
  const Team team(lanes);
  const int64_t own = min(team.row, chunk.rows - 1);
  const Row<A> row(chunk, own, of_teacher);
  const int batch = static_cast<int>(chunk.batch), shift = of_teacher ? 0 : static_cast<int>(chunk.positive_offset);
  const A *grad = static_cast<const A*>(given.grad), *lse_of_students = static_cast<const A*>(given.row_lse),
          *lse_of_keys = static_cast<const A*>(given.col_lse);
  A gain = static_cast<A>(given.gain);
  if (given.magnitude) gain /= *static_cast<const A*>(given.magnitude);

  // Where a row or column has no loss, its gradient is 0 and its log-sum-exp leaves no share of it.
  A own_grad = 0, own_lse = -nothing<A>;
  const int64_t student = chunk.first_row + own - (of_teacher ? chunk.positive_offset : 0);
  if (along_rows && student >= 0 && student < batch) {
    own_grad = grad[student];
    own_lse = (of_teacher ? lse_of_keys : lse_of_students)[student];
  }
  const A* column_lse = of_teacher ? lse_of_students : lse_of_keys;

  A slope = 0;
  T* weights = static_cast<T*>(given.weights) + own * row.count;
  const int groups = (row.count + per_step<A> * lanes - 1) / (per_step<A> * lanes);
  for (int group = 0; group < groups; ++group) {
#pragma unroll 2
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(team, group * vectors<A> + v);
      const Vector<A, 4> factors = row.factors_at(columns);
      Vector<A, 4> logits = row.logits_at(columns, factors), of_row, of_columns, grads, lses;
      const bool all = !row.ids && (group + 1) * per_step<A> * lanes <= row.count;
      if (!all) {
        const uint32_t mask = row.left_out(columns);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (mask >> i & 1) logits.values[i] = nothing<A>;
      }
      if (along_columns) {
        grads = columns.load(grad, batch, A(0), shift);
        lses = columns.load(column_lse, batch, -nothing<A>, shift);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (along_rows) of_row.values[i] = exp(logits.values[i] - own_lse);
        if (along_columns) of_columns.values[i] = exp(logits.values[i] - lses.values[i]);
      }
      if (columns.have(row.positive)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (columns.at(i) != row.positive) continue;
          if (along_rows) of_row.values[i] -= 1;
          if (along_columns) of_columns.values[i] -= 1;
        }
      }
      Vector<T, 4> those;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        A weight = 0;
        if (along_rows) weight += own_grad * of_row.values[i];
        if (along_columns) weight += grads.values[i] * of_columns.values[i];
        if (along_rows && along_columns) weight /= 2;
        slope += weight * fmax(logits.values[i], lowest<A>);
        those.values[i] = narrow<T>(weight * gain * factors.values[i]);
      }
      if (team.row < chunk.rows) columns.store(weights, those, row.count);
    }
  }
  slope = team.sum(slope);
  if (team.lane == 0 && team.row < chunk.rows)
    static_cast<A*>(given.slopes)[chunk.first_row + own] = -slope * row.inverse_temperature;
}

}  // namespace

void chunk_gradient(
    const Chunk& chunk, const void* grad, const void* row_lse, const void* col_lse, const void* magnitude,
    bool symmetric, bool of_teacher, void* slopes, void* weights, double gain, cudaStream_t stream) {
  const Gradient given{grad, row_lse, col_lse, magnitude, slopes, weights, gain};
  const bool wide = in_fours(chunk, {weights, grad, row_lse, col_lse});
  for_type(chunk.type, [&](auto value) {
    using T = decltype(value);
    const int lanes = lanes_for(of_teacher ? chunk.batch : chunk.keys, per_step<acc_t<T>>, chunk_threads);
    const auto start = [&](auto fours) {
      constexpr bool wide = decltype(fours)::value;
      const auto kernel = symmetric ? gradient_kernel<T, true, true, wide>
          : of_teacher              ? gradient_kernel<T, false, true, wide>
                                    : gradient_kernel<T, true, false, wide>;
      launch(
          "chunk_gradient", kernel, blocks_for(chunk.rows, lanes, chunk_threads), chunk_threads, 0, stream, chunk,
          given, of_teacher, lanes);
    };
    wide ? start(std::true_type()) : start(std::false_type());
  });
}

}  // namespace lfcc::cuda
