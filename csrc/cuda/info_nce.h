// Kernels of the in-batch contrastive loss, by raw pointers and a stream; what they compute is in csrc/info_nce.h.
//
// A packed row is the row times a power of two that brings its largest value near one: an exact step, after which no
// product of two rows overflows. With `factor` f the unit row is f times the packed one, so
//
//   A_ij = <packed_i, packed_j> f_i f_j / temperature
//
// and rows as they are (normalize = false) are packed with all factors 1. Packed rows lie without gaps, padded with
// zeros to a multiple of 16 values. `A` below is the type sums are taken in: double for float64, else float. All
// numbers of A lie in device memory.
#pragma once

#include <cstdint>

#include "cuda/platform.h"

namespace lfcc::cuda {

// Rows of both sides as they came, `student_row` and `teacher_row` elements apart, and where their packed form goes:
// student rows, then teacher rows, (batch + keys, padded) of `type`; factors, inverse_lengths and tangents
// (batch + keys,) of A:
//   factor          f
//   inverse_length  1 / max(norm, 1e-12), or 1 for rows as they are
//   tangent         f where the gradient of a unit row must lose its part along the row, else 0
// inverse_temperature (1,) of A: NaN where the temperature in device memory is not positive and finite.
struct Pack {
  Type type;
  const void *student, *teacher;
  int64_t batch, keys, width, padded, student_row, teacher_row;
  bool normalize;
  double temperature;  // by value, where the next is null
  const void* temperature_at;  // one number in device memory,
  bool temperature_is_double;  // of float64 or else float32
  void *packed, *factors, *inverse_lengths, *tangents, *inverse_temperature;
};
void pack_rows(const Pack& pack, cudaStream_t stream);

// Gradients (rows, width) of `type` with contiguous rows, or of A where `into_sums_type`: from sums (rows, padded) of
// A, which hold gain / magnitude sum_j W_ij f_j packed_j. `magnitude` is one number of A in device memory, or null for
// 1.
struct Finish {
  Type type;
  const void *sums, *packed, *inverse_lengths, *tangents, *inverse_temperature, *magnitude;
  void* result;
  bool into_sums_type;
  int64_t rows, width, padded;
  double gain;
};
void finish_rows(const Finish& finish, cudaStream_t stream);

// A chunk: products (rows, keys) of A, packed student rows first_row... with all packed keys; and of the whole batch
// the numbers that turn products into logits.
struct Chunk {
  Type type;
  const void *products, *factors, *inverse_temperature;
  const int64_t *student_ids, *teacher_ids;  // both null without ids
  int64_t batch, keys, first_row, rows, positive_offset;
};
// Of the chunk's rows, in arrays of the whole batch: loss, log-sum-exp, positive logit; and where `weights`, (rows,
// keys) of `type`, is not null: gain W_ij f_j there, and the gradient of the temperature.
void chunk_softmax(
    const Chunk& chunk, void* losses, void* row_lse, void* positives, void* temperature_grad, void* weights,
    double gain, cudaStream_t stream);
// Of the positives' columns, chunk after chunk from the first, each after its softmax: `col_lse` and `totals` (batch,)
// are running maximum and sum of exponentials. The last chunk leaves the log-sum-exps in `col_lse` and in `losses` the
// mean of the rows' and the columns'.
void chunk_columns(
    const Chunk& chunk, const void* positives, void* totals, void* col_lse, void* losses, cudaStream_t stream);
// gain / magnitude W_ij f_j of `type`, with upstream gradients (batch,) in W; and of each row the gradient of the
// temperature, slopes. With `of_teacher` the chunk's rows are keys and the columns students: (rows, batch).
void chunk_gradient(
    const Chunk& chunk, const void* grad, const void* row_lse, const void* col_lse, const void* magnitude,
    bool symmetric, bool of_teacher, void* slopes, void* weights, double gain, cudaStream_t stream);

// Fused tiles: `own` packed rows against `other` packed rows, of float32, bfloat16 or float16, whose `width` (padded)
// is one of fused_width. The positive of own row r is other row r + shift. Where own rows are too few to fill the
// chip, `splits` blocks share the other side, and every result has a leading dimension of `splits`.
struct Fused {
  Type type;
  const void *own, *other;
  const float *own_factors, *other_factors, *inverse_temperature;
  const int64_t *own_ids, *other_ids;  // both null without ids
  int64_t own_count, other_count, shift;
  int width, splits;
  float gain;
};
// The padded width that fused tiles take for rows of this width, or 0 where they have none.
int fused_width(Type type, int64_t width);
// Own rows that one block holds.
int fused_rows();
// Over a share of the negatives: a peak, the maximum of the logits or up to 2.8 less, sum of exp(A - peak), with sums
// the same times A, and the positive's logit if it is in the share, else 0, all (splits, own_count); where `sums`,
// (splits, own_count, width), is not null: gain sum_j exp(A_ij - peak) f_j packed_j there. 2 B K D FLOPs, with sums 4.
void fused_one_pass(
    const Fused& fused, float* peaks, float* others, float* weighted, float* positives, float* sums,
    cudaStream_t stream);
// Puts the shares together: loss and log-sum-exp (own_count,); where `along_rows` is not null, the mean of those losses
// and these; where `sums` (own_count, width) is not null: gain sum_j W_ij f_j packed_j there, and the gradient of the
// temperature.
void fused_merge(
    const Fused& fused, const float* peaks, const float* others, const float* weighted, const float* positives,
    const float* parts, const float* along_rows, float* losses, float* lse, float* temperature_grad, float* sums,
    cudaStream_t stream);
// gain / magnitude sum_j W_ij f_j packed_j, (splits, own_count, width), and the temperature's gradient (splits,
// own_count), from known log-sum-exps. With `of_teacher` own rows are keys and others students. 4 B K D FLOPs.
void fused_gradient(
    const Fused& fused, const float* grad, const float* row_lse, const float* col_lse, const float* magnitude,
    bool symmetric, bool of_teacher, int64_t batch, int64_t positive_offset, float* slopes, float* sums,
    cudaStream_t stream);

// One number out of `count` of A: their mean or sum, or the largest absolute value, but at least 2^-100, by which
// weights are divided. The result is of `result_type`, float32 or float64.
enum class Total { mean, sum, largest };
void total_of(
    Total total, Type type, const void* values, int64_t count, Type result_type, void* result, cudaStream_t stream);

}  // namespace lfcc::cuda
