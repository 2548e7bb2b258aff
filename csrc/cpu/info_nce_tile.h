// The work of info_nce between the library's products, on one tile of logits in cache, cloned for each instruction set.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace lfcc::tile {

constexpr double EPSILON = 1e-12;  // lower bound of a norm, as in torch.nn.functional.normalize

// Sum of squares of a row: runs short enough for the accumulator are added in double. A row whose squares overflow or
// underflow the accumulator is summed in double throughout.
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

// out = scale * row in the accumulator's type.
template <typename T, typename A>
LFCC_INLINE void widen_body(const T* row, int64_t n, A scale, A* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = load(row[d]) * scale;
}

template <typename A>
LFCC_INLINE void add_body(A* to, const A* from, int64_t n) {
  for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

template <typename A>
LFCC_INLINE void exclude_ids_body(A* logits, const int64_t* ids, int64_t id, int64_t n) {
  for (int64_t j = 0; j < n; ++j) logits[j] = ids[j] == id ? -std::numeric_limits<A>::infinity() : logits[j];
}

// Online softmax of a row: the running maximum m_i, l_i = sum of exp(logit - m_i), and dtau = sum of
// (logit - m_i) exp(logit - m_i).
template <typename A>
struct Softmax {
  A m_i = -std::numeric_limits<A>::infinity(), l_i = 0, dtau = 0;
};

// Turns n products into logits, products[j] * row_scale * key_scale[j], and adds them to the statistics. With WEIGHTS
// they become p * key_scale[j], the weights of the keys as stored, p = exp(logit - m_i). Returns alpha, the factor that
// rescales what was accumulated under the previous maximum.
template <bool WEIGHTS, typename A>
LFCC_INLINE A online_softmax_body(A* products, A row_scale, const A* key_scale, int64_t n, Softmax<A>* softmax) {
  A m_new = softmax->m_i, alpha = 1;
#pragma omp simd reduction(max : m_new)
  for (int64_t j = 0; j < n; ++j) {
    // Stored, so that the maximum minus itself is 0: from a register, the product would be fused with the subtraction.
    const A logit = products[j] *= row_scale * key_scale[j];
    m_new = logit > m_new ? logit : m_new;
  }
  if (m_new != softmax->m_i) {
    const A change = softmax->m_i - m_new;
    alpha = fast_exp(change);
    softmax->dtau = softmax->l_i > 0 ? (softmax->dtau + change * softmax->l_i) * alpha : softmax->dtau;
    softmax->l_i *= alpha;
    softmax->m_i = m_new;
  }
  // If all logits are excluded or NaN, subtract nothing: -inf - -inf would be NaN.
  const A m_safe = m_new == -std::numeric_limits<A>::infinity() ? A(0) : m_new;
  A sum = 0, dtau = 0;
#pragma omp simd reduction(+ : sum, dtau)
  for (int64_t j = 0; j < n; ++j) {
    const A above = products[j] - m_safe, p = fast_exp(above);
    sum += p;
    if (WEIGHTS) {
      dtau += p * (above > A(-700) ? above : A(0));  // 0 * -inf of an excluded logit would be NaN
      products[j] = p * key_scale[j];
    }
  }
  softmax->l_i += sum;
  softmax->dtau += dtau;
  return alpha;
}

// m_i and l_i of every column of a tile of m rows, leaving the logits unchanged.
template <typename A>
LFCC_INLINE void online_columns_body(
    const A* logits, int64_t m, int64_t n, int64_t stride, A* __restrict__ m_i, A* __restrict__ l_i,
    A* __restrict__ m_old) {
  for (int64_t j = 0; j < n; ++j) m_old[j] = m_i[j];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const A logit = logits[i * stride + j];
      m_i[j] = logit > m_i[j] ? logit : m_i[j];
    }
  for (int64_t j = 0; j < n; ++j) l_i[j] *= m_old[j] == m_i[j] ? A(1) : fast_exp(m_old[j] - m_i[j]);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const A m_safe = m_i[j] == -std::numeric_limits<A>::infinity() ? A(0) : m_i[j];
      l_i[j] += fast_exp(logits[i * stride + j] - m_safe);
    }
}

// Replaces products by gradient weights, grad * exp(logit - lse) * key_scale[j], with grad and lse of the row (row
// softmax), of the columns (column softmax), or both. A row or column without a loss has a grad of 0 and an infinite
// lse.
template <typename A>
LFCC_INLINE void row_weights_body(A* products, A row_scale, const A* key_scale, A grad, A lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    products[j] = grad * fast_exp(products[j] * (row_scale * key_scale[j]) - lse) * key_scale[j];
}
template <typename A>
LFCC_INLINE void col_weights_body(
    A* __restrict__ products, A row_scale, const A* key_scale, const A* grad, const A* lse, int64_t n) {
  for (int64_t j = 0; j < n; ++j)
    products[j] = grad[j] * fast_exp(products[j] * (row_scale * key_scale[j]) - lse[j]) * key_scale[j];
}
template <typename A>
LFCC_INLINE void row_col_weights_body(
    A* __restrict__ products, A row_scale, const A* key_scale, A row_grad, A row_lse, const A* grad, const A* lse,
    int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const A logit = products[j] * (row_scale * key_scale[j]);
    products[j] = (row_grad * fast_exp(logit - row_lse) + grad[j] * fast_exp(logit - lse[j])) * key_scale[j];
  }
}

// <gradient, u> for the unit row u = scale * row.
template <typename T, typename A>
LFCC_INLINE A dot_unit_body(const A* gradient, const T* row, A scale, int64_t n) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < n; ++d) dot += gradient[d] * (load(row[d]) * scale);
  return dot;
}

// Turns the gradient g = grad_scale * gradient of a unit row u = scale * row into the gradient of the row, in place:
// (g - <g, u> u) / |row|, with `dot` = <g, u>.
template <typename T, typename A>
LFCC_INLINE void norm_backward_body(
    A* gradient, A grad_scale, const T* row, A scale, A dot, A inverse_norm, int64_t n) {
  for (int64_t d = 0; d < n; ++d)
    gradient[d] = (gradient[d] * grad_scale - dot * (load(row[d]) * scale)) * inverse_norm;
}

// The same for g = grad_scale * gradient - key_scale * key, the softmax's mean of the keys minus the positive.
template <typename T, typename A>
LFCC_INLINE void norm_backward_body(
    A* gradient, A grad_scale, const T* key, A key_scale, const T* row, A scale, A dot, A inverse_norm, int64_t n) {
  for (int64_t d = 0; d < n; ++d)
    gradient[d] =
        (gradient[d] * grad_scale - load(key[d]) * key_scale - dot * (load(row[d]) * scale)) * inverse_norm;
}

template <typename T, typename A>
LFCC_INLINE void narrow_body(const A* row, int64_t n, T* out) {
  for (int64_t d = 0; d < n; ++d) store(out + d, row[d]);
}

#define LFCC_TILE(A)                                                                                                   \
  LFCC_CLONES void add(A* to, const A* from, int64_t n) { add_body(to, from, n); }                                     \
  LFCC_CLONES void exclude_ids(A* logits, const int64_t* ids, int64_t id, int64_t n) {                                 \
    exclude_ids_body(logits, ids, id, n);                                                                              \
  }                                                                                                                    \
  LFCC_CLONES void online_softmax(A* products, A row_scale, const A* key_scale, int64_t n, Softmax<A>* s) {            \
    online_softmax_body<false>(products, row_scale, key_scale, n, s);                                                  \
  }                                                                                                                    \
  LFCC_CLONES A online_softmax_weights(A* products, A row_scale, const A* key_scale, int64_t n, Softmax<A>* s) {       \
    return online_softmax_body<true>(products, row_scale, key_scale, n, s);                                            \
  }                                                                                                                    \
  LFCC_CLONES void online_columns(                                                                                     \
      const A* logits, int64_t m, int64_t n, int64_t stride, A* m_i, A* l_i, A* m_old) {                               \
    online_columns_body(logits, m, n, stride, m_i, l_i, m_old);                                                        \
  }                                                                                                                    \
  LFCC_CLONES void row_weights(A* products, A row_scale, const A* key_scale, A grad, A lse, int64_t n) {               \
    row_weights_body(products, row_scale, key_scale, grad, lse, n);                                                    \
  }                                                                                                                    \
  LFCC_CLONES void col_weights(                                                                                        \
      A* products, A row_scale, const A* key_scale, const A* grad, const A* lse, int64_t n) {                          \
    col_weights_body(products, row_scale, key_scale, grad, lse, n);                                                    \
  }                                                                                                                    \
  LFCC_CLONES void row_col_weights(                                                                                    \
      A* products, A row_scale, const A* key_scale, A row_grad, A row_lse, const A* grad, const A* lse, int64_t n) {   \
    row_col_weights_body(products, row_scale, key_scale, row_grad, row_lse, grad, lse, n);                             \
  }
LFCC_TILE(float)
LFCC_TILE(double)

#define LFCC_ROWS(T, A)                                                                                                \
  LFCC_CLONES double square_sum(const T* row, int64_t n) { return square_sum_body(row, n); }                           \
  LFCC_CLONES void widen(const T* row, int64_t n, A scale, A* out) { widen_body(row, n, scale, out); }                 \
  LFCC_CLONES void narrow(const A* row, int64_t n, T* out) { narrow_body(row, n, out); }                               \
  LFCC_CLONES A dot_unit(const A* gradient, const T* row, A scale, int64_t n) {                                        \
    return dot_unit_body(gradient, row, scale, n);                                                                     \
  }                                                                                                                    \
  LFCC_CLONES void norm_backward(                                                                                      \
      A* gradient, A grad_scale, const T* row, A scale, A dot, A inverse_norm, int64_t n) {                            \
    norm_backward_body(gradient, grad_scale, row, scale, dot, inverse_norm, n);                                        \
  }                                                                                                                    \
  LFCC_CLONES void norm_backward(                                                                                      \
      A* gradient, A grad_scale, const T* key, A key_scale, const T* row, A scale, A dot, A inverse_norm, int64_t n) { \
    norm_backward_body(gradient, grad_scale, key, key_scale, row, scale, dot, inverse_norm, n);                        \
  }
LFCC_ROWS(double, double)
LFCC_ROWS(float, float)
LFCC_ROWS(BFloat16, float)
LFCC_ROWS(Half, float)

}  // namespace lfcc::tile
