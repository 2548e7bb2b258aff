// Row-major matrix products by the BLAS inside libtorch, called directly from one thread, without torch's overhead.
#pragma once

#include <cstdint>

extern "C" {
// Weak, so that the library also loads with a libtorch whose BLAS has no Fortran symbols; it then uses the loops below.
__attribute__((weak)) void sgemm_(
    const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
    const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(
    const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
    const double*, const int*, const double*, double*, const int*);
}

namespace lfcc {

inline auto blas(float) { return &sgemm_; }
inline auto blas(double) { return &dgemm_; }

// c (m x n) = a (m x k) b^T, with b (n x k); lda, ldb, ldc are row strides.
template <typename A>
void product_with_transpose(
    int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc) {
  if (auto gemm = blas(A())) {
    const int rows = int(m), cols = int(n), depth = int(k);
    const int stride_a = int(lda), stride_b = int(ldb), stride_c = int(ldc);
    const A one = 1, zero = 0;
    gemm("T", "N", &cols, &rows, &depth, &one, b, &stride_b, a, &stride_a, &zero, c, &stride_c);
    return;
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < k; ++d) sum += a[i * lda + d] * b[j * ldb + d];
      c[i * ldc + j] = sum;
    }
}

// c (m x n) += a (m x k) b, with b (k x n).
template <typename A>
void add_product(
    int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc) {
  if (auto gemm = blas(A())) {
    const int rows = int(m), cols = int(n), depth = int(k);
    const int stride_a = int(lda), stride_b = int(ldb), stride_c = int(ldc);
    const A one = 1;
    gemm("N", "N", &cols, &rows, &depth, &one, b, &stride_b, a, &stride_a, &one, c, &stride_c);
    return;
  }
  for (int64_t i = 0; i < m; ++i)
    for (int64_t d = 0; d < k; ++d) {
      const A weight = a[i * lda + d];
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += weight * b[d * ldb + j];
    }
}

}  // namespace lfcc
