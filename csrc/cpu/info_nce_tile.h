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

template <typename A>
LFCC_INLINE void add_body(A* to, const A* from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

template <typename A>
LFCC_INLINE void leave_out_body(A* logits, const int64_t* ids, int64_t id, int64_t n) {
  for (int64_t j = 0; j < n; ++j) logits[j] = ids[j] == id ? -std::numeric_limits<A>::infinity() : logits[j];
}

// Running statistics of the softmax along a row: the maximum, and the sums of exp(logit - maximum) and of
// (logit - maximum) exp(logit - maximum).
template <typename A>
struct Softmax {
  A maximum = -std::numeric_limits<A>::infinity(), sum = 0, mean = 0;
};

// Turns n products into logits, products[j] * by * scale[j], and adds them to the statistics; with WEIGHTS they become
// exp(logit - maximum) * scale[j], the factors of the keys as they lie in memory. Returns by how much what was summed
// under the old maximum must be multiplied.
template <bool WEIGHTS, typename A>
LFCC_INLINE A add_to_softmax_body(A* products, A by, const A* scale, int64_t n, Softmax<A>* softmax) {
  A maximum = softmax->maximum, correction = 1;
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < n; ++j) {
    // Stored, so that the maximum less itself is 0: from a register, the product would be fused with the subtraction.
    const A logit = products[j] *= by * scale[j];
    maximum = logit > maximum ? logit : maximum;
  }
  if (maximum != softmax->maximum) {
    const A change = softmax->maximum - maximum;
    correction = fast_exp(change);
    softmax->mean = softmax->sum > 0 ? (softmax->mean + change * softmax->sum) * correction : softmax->mean;
    softmax->sum *= correction;
    softmax->maximum = maximum;
  }
  // Everything left out, or all NaN: subtract nothing, so that neither becomes the other.
  const A base = maximum == -std::numeric_limits<A>::infinity() ? A(0) : maximum;
  A sum = 0, mean = 0;
#pragma omp simd reduction(+ : sum, mean)
  for (int64_t j = 0; j < n; ++j) {
    const A above = products[j] - base, weight = fast_exp(above);
    sum += weight;
    if (WEIGHTS) {
      mean += weight * (above > A(-700) ? above : A(0));  // of what is left out the product would be NaN
      products[j] = weight * scale[j];
    }
  }
  softmax->sum += sum;
  softmax->mean += mean;
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

// Weights of softmaxes, weight * exp(logit - lse), of the row itself and across it, in place of products as above and
// times their scale. An element without the one or the other has a weight of 0 and an infinite lse.
template <typename A>
LFCC_INLINE void own_softmax_body(A* products, A by, const A* scale, A weight, A lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    products[j] = weight * fast_exp(products[j] * (by * scale[j]) - lse) * scale[j];
}
template <typename A>
LFCC_INLINE void other_softmax_body(
    A* __restrict__ products, A by, const A* scale, const A* weight, const A* lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    products[j] = weight[j] * fast_exp(products[j] * (by * scale[j]) - lse[j]) * scale[j];
}
template <typename A>
LFCC_INLINE void both_softmaxes_body(
    A* __restrict__ products, A by, const A* scale, A own_weight, A own_lse, const A* weight, const A* lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const A logit = products[j] * (by * scale[j]);
    products[j] = (own_weight * fast_exp(logit - own_lse) + weight[j] * fast_exp(logit - lse[j])) * scale[j];
  }
}

// <gradient, u> for the unit row u = scale * row.
template <typename T, typename A>
LFCC_INLINE A along_row_body(const A* gradient, const T* row, A scale, int64_t n) {
  A along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t d = 0; d < n; ++d) along += gradient[d] * (load(row[d]) * scale);
  return along;
}

// Turns the gradient of a unit row u = scale * row, which is by * gradient, into the gradient of the row, in place:
// d = (g - <g, u> u) / |row|, where `along` is <g, u> and 1 / |row| is `inverse`.
template <typename T, typename A>
LFCC_INLINE void through_norm_body(A* gradient, A by, const T* row, A scale, A along, A inverse, int64_t n) {
  for (int64_t d = 0; d < n; ++d) gradient[d] = (gradient[d] * by - along * (load(row[d]) * scale)) * inverse;
}

// The same where g is by * gradient - key_by * key: the softmax's mean of keys less the positive.
template <typename T, typename A>
LFCC_INLINE void through_norm_body(
    A* gradient, A by, const T* key, A key_by, const T* row, A scale, A along, A inverse, int64_t n) {
  for (int64_t d = 0; d < n; ++d)
    gradient[d] = (gradient[d] * by - load(key[d]) * key_by - along * (load(row[d]) * scale)) * inverse;
}

template <typename T, typename A>
LFCC_INLINE void lower_body(const A* row, int64_t n, T* out) {
  for (int64_t d = 0; d < n; ++d) store(out + d, row[d]);
}

#define LFCC_TILE(A)                                                                                                \
  LFCC_CLONES void add(A* to, const A* from, int64_t n) { add_body(to, from, n); }                                  \
  LFCC_CLONES void leave_out(A* logits, const int64_t* ids, int64_t id, int64_t n) {                                \
    leave_out_body(logits, ids, id, n);                                                                             \
  }                                                                                                                 \
  LFCC_CLONES void add_to_softmax(A* products, A by, const A* scale, int64_t n, Softmax<A>* s) {      \
    add_to_softmax_body<false>(products, by, scale, n, s);                                                 \
  }                                                                                                                 \
  LFCC_CLONES A turn_to_weights(A* products, A by, const A* scale, int64_t n, Softmax<A>* s) {        \
    return add_to_softmax_body<true>(products, by, scale, n, s);                                           \
  }                                                                                                                 \
  LFCC_CLONES void online_columns(                                                                                  \
      const A* logits, int64_t m, int64_t n, int64_t stride, A* maximum, A* sum, A* before) {                       \
    online_columns_body(logits, m, n, stride, maximum, sum, before);                                                \
  }                                                                                                                 \
  LFCC_CLONES void own_softmax(A* products, A by, const A* scale, A weight, A lse, int64_t n) {                     \
    own_softmax_body(products, by, scale, weight, lse, n);                                                          \
  }                                                                                                                 \
  LFCC_CLONES void other_softmax(A* products, A by, const A* scale, const A* weight, const A* lse, int64_t n) {     \
    other_softmax_body(products, by, scale, weight, lse, n);                                                        \
  }                                                                                                                 \
  LFCC_CLONES void both_softmaxes(                                                                                  \
      A* products, A by, const A* scale, A own_weight, A own_lse, const A* weight, const A* lse, int64_t n) {       \
    both_softmaxes_body(products, by, scale, own_weight, own_lse, weight, lse, n);                                  \
  }
LFCC_TILE(float)
LFCC_TILE(double)

#define LFCC_ROWS(T, A)                                                                                             \
  LFCC_CLONES double square_sum(const T* row, int64_t n) { return square_sum_body(row, n); }                        \
  LFCC_CLONES void raise(const T* row, int64_t n, A scale, A* out) { raise_body(row, n, scale, out); }              \
  LFCC_CLONES A along_row(const A* gradient, const T* row, A scale, int64_t n) {                                    \
    return along_row_body(gradient, row, scale, n);                                                                 \
  }                                                                                                                 \
  LFCC_CLONES void through_norm(A* gradient, A by, const T* row, A scale, A along, A inverse, int64_t n) {          \
    through_norm_body(gradient, by, row, scale, along, inverse, n);                                                 \
  }                                                                                                                 \
  LFCC_CLONES void through_norm(                                                                                    \
      A* gradient, A by, const T* key, A key_by, const T* row, A scale, A along, A inverse, int64_t n) {            \
    through_norm_body(gradient, by, key, key_by, row, scale, along, inverse, n);                                    \
  }                                                                                                                 \
  LFCC_CLONES void lower(const A* row, int64_t n, T* out) { lower_body(row, n, out); }
LFCC_ROWS(double, double)
LFCC_ROWS(float, float)
LFCC_ROWS(BFloat16, float)
LFCC_ROWS(Half, float)

}  // namespace lfcc::tile
