// The work of info_nce between the library products, on one tile of logits in cache, cloned for each instruction set.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace lfcc::tile {

constexpr double EPSILON = 1e-12;  // least norm, as torch.nn.functional.normalize

// Sum of squares of a row, in double over runs short enough for the accumulator; a row whose squares leave its range
// is summed in double throughout.
template <typename T>
LFCC_INLINE double square_sum_body(const T* row, int64_t n) {
  constexpr int64_t RUN = 256;
  double sum = 0;
  for (int64_t first = 0; first < n; first += RUN) {
    acc_t<T> run = 0;
#pragma omp simd reduction(+ : run)
    for (int64_t d = first; d < std::min(first + RUN, n); ++d) run += load(row[d]) * load(row[d]);
    sum += double(run);
  }
  if (sum > 1e-30 && sum < 1e30) return sum;
  sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += double(load(row[d])) * double(load(row[d]));
  return sum;
}

// out = scale * row, raised to the accumulator's type.
template <typename T, typename A>
LFCC_INLINE void raise_body(const T* row, int64_t n, A scale, A* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = load(row[d]) * scale;
}

// gradient = by * gradient - scale * row: the softmax's mean of keys less the positive.
template <typename T, typename A>
LFCC_INLINE void less_row_body(A* gradient, A by, const T* row, A scale, int64_t n) {
  for (int64_t d = 0; d < n; ++d) gradient[d] = by * gradient[d] - scale * load(row[d]);
}

// logits[j] *= scale[j]: keys used in place by the product are not unit rows yet.
template <typename A>
LFCC_INLINE void scale_body(A* logits, const A* scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) logits[j] *= scale[j];
}

template <typename A>
LFCC_INLINE void leave_out_body(A* logits, const int64_t* ids, int64_t id, int64_t n) {
  for (int64_t j = 0; j < n; ++j) logits[j] = ids[j] == id ? -std::numeric_limits<A>::infinity() : logits[j];
}

// Adds a row of logits to the running statistics of its softmax and turns it into exp(logit - maximum). Returns by
// how much what was summed under the old maximum must be multiplied.
template <typename A>
LFCC_INLINE A online_softmax_body(A* logits, int64_t n, A* maximum, A* sum) {
  A tile_maximum = *maximum;
#pragma omp simd reduction(max : tile_maximum)
  for (int64_t j = 0; j < n; ++j) tile_maximum = logits[j] > tile_maximum ? logits[j] : tile_maximum;
  // Everything left out, or all NaN: subtract nothing, so that neither becomes the other.
  const A base = tile_maximum == -std::numeric_limits<A>::infinity() ? A(0) : tile_maximum;
  A tile_sum = 0;
#pragma omp simd reduction(+ : tile_sum)
  for (int64_t j = 0; j < n; ++j) {
    logits[j] = fast_exp(logits[j] - base);
    tile_sum += logits[j];
  }
  const A correction = *maximum == tile_maximum ? A(1) : fast_exp(*maximum - tile_maximum);
  *sum = *sum * correction + tile_sum;
  *maximum = tile_maximum;
  return correction;
}

// The same statistics of every column of a tile of m rows, without changing the logits.
template <typename A>
LFCC_INLINE void online_columns_body(
    const A* logits, int64_t m, int64_t n, int64_t stride, A* __restrict__ maximum, A* __restrict__ sum,
    A* __restrict__ before) {
  for (int64_t j = 0; j < n; ++j) before[j] = maximum[j];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const A logit = logits[i * stride + j];
      maximum[j] = logit > maximum[j] ? logit : maximum[j];
    }
  for (int64_t j = 0; j < n; ++j) sum[j] *= before[j] == maximum[j] ? A(1) : fast_exp(before[j] - maximum[j]);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const A base = maximum[j] == -std::numeric_limits<A>::infinity() ? A(0) : maximum[j];
      sum[j] += fast_exp(logits[i * stride + j] - base);
    }
}

// Weights of softmaxes, weight * exp(logit - lse): of the row itself, or of every column.
template <typename A>
LFCC_INLINE void own_softmax_body(A* out, const A* logits, A weight, A lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = weight * fast_exp(logits[j] - lse);
}
template <typename A>
LFCC_INLINE void other_softmax_body(
    A* __restrict__ out, const A* logits, const A* weight, const A* lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] = weight[j] * fast_exp(logits[j] - lse[j]);
}
template <typename A>
LFCC_INLINE void both_softmaxes_body(
    A* out, const A* logits, A own_weight, A own_lse, const A* weight, const A* lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const A logit = logits[j];
    out[j] = own_weight * fast_exp(logit - own_lse) + weight[j] * fast_exp(logit - lse[j]);
  }
}

// Turns the gradient of a unit row (in place) into the gradient of the row, d = (g - <g, u> u) / |row|, and returns
// <g, u>. `unit` is u times unit_scale; `inverse` is 1/|row|, and `shrunk` says the norm was below EPSILON, where
// normalize divides by that constant and nothing is projected out.
template <typename A>
LFCC_INLINE A through_norm_body(
    A* gradient, const A* unit, A unit_scale, A inverse, bool shrunk, bool normalize, int64_t n) {
  A along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t d = 0; d < n; ++d) along += gradient[d] * unit[d];
  along *= unit_scale;
  if (normalize) {
    const A projected = shrunk ? A(0) : along * unit_scale;
    for (int64_t d = 0; d < n; ++d) gradient[d] = (gradient[d] - projected * unit[d]) * inverse;
  }
  return along;
}

template <typename T, typename A>
LFCC_INLINE void lower_body(const A* row, int64_t n, T* out) {
  for (int64_t d = 0; d < n; ++d) store(out + d, row[d]);
}

#define LFCC_TILE(A)                                                                                                \
  LFCC_CLONES void scale(A* logits, const A* by, int64_t n) { scale_body(logits, by, n); }                          \
  LFCC_CLONES void leave_out(A* logits, const int64_t* ids, int64_t id, int64_t n) {                                \
    leave_out_body(logits, ids, id, n);                                                                             \
  }                                                                                                                 \
  LFCC_CLONES A online_softmax(A* logits, int64_t n, A* maximum, A* sum) {                                          \
    return online_softmax_body(logits, n, maximum, sum);                                                            \
  }                                                                                                                 \
  LFCC_CLONES void online_columns(                                                                                  \
      const A* logits, int64_t m, int64_t n, int64_t stride, A* maximum, A* sum, A* before) {                       \
    online_columns_body(logits, m, n, stride, maximum, sum, before);                                                \
  }                                                                                                                 \
  LFCC_CLONES void own_softmax(A* out, const A* logits, A weight, A lse, int64_t n) {                               \
    own_softmax_body(out, logits, weight, lse, n);                                                                  \
  }                                                                                                                 \
  LFCC_CLONES void other_softmax(A* out, const A* logits, const A* weight, const A* lse, int64_t n) {               \
    other_softmax_body(out, logits, weight, lse, n);                                                                \
  }                                                                                                                 \
  LFCC_CLONES void both_softmaxes(                                                                                  \
      A* out, const A* logits, A own_weight, A own_lse, const A* weight, const A* lse, int64_t n) {                 \
    both_softmaxes_body(out, logits, own_weight, own_lse, weight, lse, n);                                          \
  }                                                                                                                 \
  LFCC_CLONES A through_norm(                                                                                       \
      A* gradient, const A* unit, A unit_scale, A inverse, bool shrunk, bool normalize, int64_t n) {           \
    return through_norm_body(gradient, unit, unit_scale, inverse, shrunk, normalize, n);                            \
  }
LFCC_TILE(float)
LFCC_TILE(double)

#define LFCC_ROWS(T, A)                                                                                             \
  LFCC_CLONES double square_sum(const T* row, int64_t n) { return square_sum_body(row, n); }                        \
  LFCC_CLONES void raise(const T* row, int64_t n, A scale, A* out) { raise_body(row, n, scale, out); }              \
  LFCC_CLONES void less_row(A* gradient, A by, const T* row, A scale, int64_t n) {                                  \
    less_row_body(gradient, by, row, scale, n);                                                                     \
  }                                                                                                                 \
  LFCC_CLONES void lower(const A* row, int64_t n, T* out) { lower_body(row, n, out); }
LFCC_ROWS(double, double)
LFCC_ROWS(float, float)
LFCC_ROWS(BFloat16, float)
LFCC_ROWS(Half, float)

}  // namespace lfcc::tile
