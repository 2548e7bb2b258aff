// Gradient weights of a chunk of products, which the library left in L2, from known log-sum-exps. They are stored in
// the rows' dtype, times the factor of the row that each multiplies, for the library's product with the other side:
//
//   of rows      W_ij = g_i (exp(A_ij - LSE_i) - [j positive of i])
//   of columns   the same with gradient and log-sum-exp of the positive's column j
//   symmetric    the mean of both
//
// Rows are those of the side whose gradient is computed, so chunks do not accumulate into each other's output.
//
// Tiling: one thread group per row, from a warp to a block of 512, 16 products per thread and step (8 of float64).
//
// Bytes per product: 4 read and 2 written (8 and 8 of float64). FLOPs: about 20 and an exp; symmetric 25 and two.
//
// Resources, at most on any architecture:
//   gradient_kernel   122 registers   128 bytes of static shared memory
#include <type_traits>

#include "cuda/info_nce_logits.cuh"

namespace lfcc::cuda {

namespace {

struct Gradient {
  const void *grad, *row_lse, *col_lse, *grad_absmax;
  void *dtau, *weights;
  double loss_scale;
};

// row_softmax: the losses of the chunk's rows; col_softmax: those of its columns.
template <typename T, bool row_softmax, bool col_softmax, bool wide>
__global__ void __launch_bounds__(chunk_threads, wide && sizeof(acc_t<T>) == 4 ? 2 : 1) gradient_kernel(
    Chunk chunk, Gradient given, bool of_teacher, int group_size) {
  using A = acc_t<T>;
  const ThreadGroup group(group_size);
  const int64_t row_in_chunk = min(group.row, chunk.rows - 1);
  const Row<A> row(chunk, row_in_chunk, of_teacher);
  const int batch = static_cast<int>(chunk.batch), shift = of_teacher ? 0 : static_cast<int>(chunk.positive_offset);
  const A *grad = static_cast<const A*>(given.grad), *lse_of_students = static_cast<const A*>(given.row_lse),
          *lse_of_keys = static_cast<const A*>(given.col_lse);
  A loss_scale = static_cast<A>(given.loss_scale);
  if (given.grad_absmax) loss_scale /= *static_cast<const A*>(given.grad_absmax);

  // A row or column without a loss has a gradient of 0 and an infinite log-sum-exp, which makes its p 0.
  A row_grad = 0, row_lse = -minus_infinity<A>;
  const int64_t student = chunk.first_row + row_in_chunk - (of_teacher ? chunk.positive_offset : 0);
  if (row_softmax && student >= 0 && student < batch) {
    row_grad = grad[student];
    row_lse = (of_teacher ? lse_of_keys : lse_of_students)[student];
  }
  const A* col_lse = of_teacher ? lse_of_students : lse_of_keys;

  A dtau = 0;
  T* weights = static_cast<T*>(given.weights) + row_in_chunk * row.count;
  const int steps = (row.count + per_step<A> * group_size - 1) / (per_step<A> * group_size);
  for (int step = 0; step < steps; ++step) {
#pragma unroll 2
    for (int v = 0; v < vectors<A>; ++v) {
      const Columns<wide> columns(group, step * vectors<A> + v);
      const Vector<A, 4> factors = row.load_factors(columns);
      Vector<A, 4> logits = row.load_logits(columns, factors), row_p, col_p, grads, lses;
      const bool all = !row.ids && (step + 1) * per_step<A> * group_size <= row.count;
      if (!all) {
        const uint32_t mask = row.excluded(columns);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (mask >> i & 1) logits.values[i] = minus_infinity<A>;
      }
      if (col_softmax) {
        grads = columns.load(grad, batch, A(0), shift);
        lses = columns.load(col_lse, batch, -minus_infinity<A>, shift);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row_softmax) row_p.values[i] = exp(logits.values[i] - row_lse);
        if (col_softmax) col_p.values[i] = exp(logits.values[i] - lses.values[i]);
      }
      if (columns.contain(row.positive)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (columns.at(i) != row.positive) continue;
          if (row_softmax) row_p.values[i] -= 1;
          if (col_softmax) col_p.values[i] -= 1;
        }
      }
      Vector<T, 4> narrowed;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        A weight = 0;
        if (row_softmax) weight += row_grad * row_p.values[i];
        if (col_softmax) weight += grads.values[i] * col_p.values[i];
        if (row_softmax && col_softmax) weight /= 2;
        dtau += weight * fmax(logits.values[i], lowest<A>);
        narrowed.values[i] = narrow<T>(weight * loss_scale * factors.values[i]);
      }
      if (group.row < chunk.rows) columns.store(weights, narrowed, row.count);
    }
  }
  dtau = group.sum(dtau);
  if (group.rank == 0 && group.row < chunk.rows)
    static_cast<A*>(given.dtau)[chunk.first_row + row_in_chunk] = -dtau * row.inverse_temperature;
}

}  // namespace

void chunk_gradient(
    const Chunk& chunk, const void* grad, const void* row_lse, const void* col_lse, const void* grad_absmax,
    bool symmetric, bool of_teacher, void* dtau, void* weights, double loss_scale, cudaStream_t stream) {
  const Gradient given{grad, row_lse, col_lse, grad_absmax, dtau, weights, loss_scale};
  const bool wide = in_fours(chunk, {weights, grad, row_lse, col_lse});
  for_type(chunk.type, [&](auto value) {
    using T = decltype(value);
    const int group_size =
        group_size_for(of_teacher ? chunk.batch : chunk.keys, per_step<acc_t<T>>, chunk_threads);
    const auto start = [&](auto fours) {
      constexpr bool wide = decltype(fours)::value;
      const auto kernel = symmetric ? gradient_kernel<T, true, true, wide>
          : of_teacher              ? gradient_kernel<T, false, true, wide>
                                    : gradient_kernel<T, true, false, wide>;
      launch(
          "chunk_gradient", kernel, blocks_for(chunk.rows, group_size, chunk_threads), chunk_threads, 0, stream, chunk,
          given, of_teacher, group_size);
    };
    wide ? start(std::true_type()) : start(std::false_type());
  });
}

}  // namespace lfcc::cuda
