// In-batch contrastive loss of rows (B, D) against keys (K, D); the positive of row i is key positive_offset + i.
//
// With unit rows q_i, k_j (or the rows themselves if `normalize` is false) and A_ij = <q_i, k_j> / temperature:
//   rows       L_i = LSE_j A_ij - A_ip
//   symmetric  L_i = (LSE_j A_ij + LSE_i' A_i'p - 2 A_ip) / 2, the second LSE over the B rows
// A pair with equal ids that is not a positive is excluded. Kernels are independent of torch.
#pragma once

#include <cstdint>

namespace lfcc {

template <typename T>
struct Pair {
  const T* rows;
  int64_t batch, row_stride;
  const T* keys;
  int64_t key_count, key_stride;
  int64_t width;  // D
  const int64_t* row_ids;  // both null without ids
  const int64_t* key_ids;
  int64_t positive_offset;
  double temperature;
  bool symmetric, normalize;
};

// losses and row_lse (B,); col_lse (B,) of the positives' columns, written only if symmetric. 2 B K D FLOPs.
template <typename T, typename A>
void info_nce(const Pair<T>& pair, A* losses, A* row_lse, A* col_lse);

// Also dL_i/drow_i (B, D) and dL_i/dtemperature (B,) in the same pass; not symmetric. 4 B K D FLOPs.
template <typename T, typename A>
void info_nce_one_pass(const Pair<T>& pair, A* losses, A* row_lse, A* row_grad, A* temperature_grad);

// Gradient of sum_i grad_i L_i for one side, (B, D) or (K, D), and for the temperature. 4 B K D FLOPs.
template <typename T, typename A>
void info_nce_grad(
    const Pair<T>& pair, const A* grad, const A* row_lse, const A* col_lse, bool of_keys, T* side_grad,
    A* temperature_grad);

}  // namespace lfcc
