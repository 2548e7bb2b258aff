// Launchers of the info_nce kernels, by raw pointers and a stream; csrc/info_nce.h has the loss.
//
// Rows are packed first: scaled by a power of two and padded, with `factors` that restore the unit row
// (docs/kernels.md, "Packed rows"). Below, A is the accumulator's type, double for float64 and otherwise float. All
// values of A are in device memory. The weights W_ij are the derivatives of the losses with respect to the logits, up
// to the temperature: P_ij - [j positive of i] times upstream gradients, P the softmax.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace lfcc::cuda {

// Rows of both sides, `student_row` and `teacher_row` elements apart, and the outputs: packed student rows, then
// teacher rows, (batch + keys, padded) of `type`; inverse_temperature (1,) of A, NaN if the temperature in device
// memory is not positive and finite; and (batch + keys,) of A each:
//   factors         f, so that f times the packed row is the unit row
//   inverse_norms   1 / max(norm, 1e-12), or 1 without normalize
//   projections     f if the gradient of the row loses its part along the row, otherwise 0
struct Pack {
  Type type;
  const void *student, *teacher;
  int64_t batch, keys, width, padded, student_row, teacher_row;
  bool normalize;
  double temperature;          // used if temperature_at is null
  const void* temperature_at;  // in device memory
  bool temperature_is_double;  // otherwise float32
  void *packed, *factors, *inverse_norms, *projections, *inverse_temperature;
};
void pack_rows(const Pack& pack, cudaStream_t stream);

// Gradients (rows, width) of `type`, or of A if `result_is_acc`, contiguous, from acc (rows, padded) of A, which is
// loss_scale / grad_absmax sum_j W_ij f_j packed_j. `grad_absmax` is one value of A, or null for 1.
struct Epilogue {
  Type type;
  const void *acc, *packed, *inverse_norms, *projections, *inverse_temperature, *grad_absmax;
  void* result;
  bool result_is_acc;
  int64_t rows, width, padded;
  double loss_scale;
};
void epilogue_rows(const Epilogue& epilogue, cudaStream_t stream);

// A chunk: products (rows, keys) of A of the packed student rows from first_row on with all packed keys, and the inputs
// of the whole batch that turn products into logits.
struct Chunk {
  Type type;
  const void *products, *factors, *inverse_temperature;
  const int64_t *student_ids, *teacher_ids;  // both null without ids
  int64_t batch, keys, first_row, rows, positive_offset;
};
// Loss, log-sum-exp and positive logit of the chunk's rows, in arrays of the whole batch. If `weights` (rows, keys) of
// `type` is not null: also loss_scale W_ij f_j and the gradient of the temperature.
void chunk_softmax(
    const Chunk& chunk, void* losses, void* row_lse, void* positive_logits, void* temperature_grad, void* weights,
    double loss_scale, cudaStream_t stream);
// Online softmax of the positives' columns, (batch,) each: running maximum in `col_lse`, sum of exponentials in `l`.
// Call it for all chunks in order, after their chunk_softmax. The last call turns `col_lse` into log-sum-exps and
// `losses` into the mean of the rows' and the columns' losses.
void chunk_columns(
    const Chunk& chunk, const void* positive_logits, void* l, void* col_lse, void* losses, cudaStream_t stream);
// loss_scale / grad_absmax W_ij f_j of `type` with the upstream gradients `grad` (batch,) in W, and the temperature's
// gradient per row, `dtau`. With `of_teacher` the chunk's rows are keys and its columns students: (rows, batch).
void chunk_gradient(
    const Chunk& chunk, const void* grad, const void* row_lse, const void* col_lse, const void* grad_absmax,
    bool symmetric, bool of_teacher, void* dtau, void* weights, double loss_scale, cudaStream_t stream);

// Fused tiles of packed rows q against packed rows k, of float32, bfloat16 or float16, with `width` from fused_width.
// The positive of row r of q is row r + shift of k. If q has too few rows to fill the GPU, `splits` blocks share k, and
// every output has a leading dimension of `splits`.
struct Fused {
  Type type;
  const void *q, *k;
  const float *q_factors, *k_factors, *inverse_temperature;
  const int64_t *q_ids, *k_ids;  // both null without ids
  int64_t q_count, k_count, shift;
  int width, splits;
  float loss_scale;
};
// The padded width of fused tiles for rows of this width, or 0 if there are none.
int fused_width(Type type, int64_t width);
// Rows of q per block.
int fused_rows();
// Over a split of the negatives, all (splits, q_count): m, the maximum of the logits or up to 2.8 less; l, the sum of
// exp(A - m); and the positive's logit if it is in the split, otherwise 0. If `acc` (splits, q_count, width) is not
// null: also dtau, the sum of exp(A - m) A, and acc, loss_scale sum_j exp(A_ij - m) f_j packed_j. 2 B K D FLOPs, with
// acc 4.
void fused_one_pass(
    const Fused& fused, float* m, float* l, float* dtau, float* positive_logits, float* acc, cudaStream_t stream);
// Combines the splits: loss and log-sum-exp (q_count,). If `row_losses` is not null, the loss is the mean of both. If
// `acc` (q_count, width) is not null: also loss_scale sum_j W_ij f_j packed_j and the gradient of the temperature.
void fused_merge(
    const Fused& fused, const float* m, const float* l, const float* dtau, const float* positive_logits,
    const float* acc_parts, const float* row_losses, float* losses, float* lse, float* temperature_grad, float* acc,
    cudaStream_t stream);
// loss_scale / grad_absmax sum_j W_ij f_j packed_j (splits, q_count, width) and the temperature's gradient
// (splits, q_count), from known log-sum-exps. With `of_teacher` q are the keys and k the students. 4 B K D FLOPs.
void fused_gradient(
    const Fused& fused, const float* grad, const float* row_lse, const float* col_lse, const float* grad_absmax,
    bool symmetric, bool of_teacher, int64_t batch, int64_t positive_offset, float* dtau, float* acc,
    cudaStream_t stream);

// Reduces `count` values of A to one of `result_type`, float32 or float64. absmax is the largest absolute value but at
// least 2^-100, because weights are divided by it.
enum class Reduction { mean, sum, absmax };
void reduce(
    Reduction reduction, Type type, const void* values, int64_t count, Type result_type, void* result,
    cudaStream_t stream);

}  // namespace lfcc::cuda
