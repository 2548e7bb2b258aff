// info_nce of small batches, the loss alone or with gradients in one pass: the products of all pairs are one
// cache-sized tile and rows are read in place. Long rows, as fine scales have, are split over threads by their width
// (split-K): every thread multiplies a part of all rows by the same part of all keys, the parts of the products are
// added in order, and each thread writes its part of the gradient, in one pass:
//
//   d_i = s_i (sum_j M_ij s_j y_j / tau - <g_i, u_i> s_i x_i),   <g_i, u_i> = sum_j M_ij A_ij,   M = softmax(A) - I_p
//
// with rows x_i, keys y_j and s the inverses of their norms. 2 B K D FLOPs, 4 with the gradient. Rows and keys are read
// once, or twice with the gradient, which is written once.
#pragma once

#include "cpu/info_nce_rows.h"

namespace lfcc::small {

constexpr int64_t PAIRS = int64_t(1) << 18;       // a MiB of float products
constexpr int64_t PART_WIDTH = 1024, PARTS = 16;  // least width of a part; most parts

template <typename T, typename A>
bool fits(const Side<T, A>& rows, const Side<T, A>& keys) {
  return rows.in_place && keys.in_place && rows.count * keys.count <= PAIRS;
}

// row_grad and temperature_grad are null for the loss alone.
template <typename A>
void info_nce(
    const Pair<A>& pair, const Side<A, A>& rows, const Side<A, A>& keys, A* losses, A* row_lse, A* row_grad,
    A* temperature_grad) {
  const int64_t width = rows.width, parts = std::max<int64_t>(1, std::min(width / PART_WIDTH, PARTS));
  const int64_t block = std::max<int64_t>(64, (rows.count * parts / 8 + 15) / 16 * 16);
  const int64_t blocks = (rows.count + block - 1) / block, pairs = rows.count * keys.count;
  std::vector<A> products(parts * pairs), self_weight(rows.count);  // of the row in its own gradient

  // Calls body(part, first row, rows, first value, values) for the blocks of all parts, in parallel.
  const auto for_parts = [&](const auto& body) {
    parallel_for(parts * blocks, block * keys.count * (width / parts), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t part = unit / blocks, first = unit % blocks * block, d = part * width / parts;
        body(part, first, std::min(block, rows.count - first), d, (part + 1) * width / parts - d);
      }
    });
  };

  for_parts([&](int64_t part, int64_t first, int64_t m, int64_t d, int64_t n) {
    product_with_transpose(
        m, keys.count, n, rows.at(first) + d, rows.stride, keys.data + d, keys.stride,
        products.data() + part * pairs + first * keys.count, keys.count);
  });

  parallel_for(rows.count, keys.count * (parts + 16), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* row = products.data() + i * keys.count;
      for (int64_t part = 1; part < parts; ++part) tile::add(row, row + part * pairs, keys.count);
      const int64_t positive = pair.positive_offset + i;
      if (pair.row_ids) exclude_ids(row, pair.key_ids, pair.row_ids[i], keys.count, positive);
      const A temperature = A(pair.temperature), row_scale = rows.scale[i] * A(1 / pair.temperature);
      const A logit = row[positive] * (row_scale * keys.scale[positive]);
      tile::Softmax<A> softmax;
      if (row_grad)
        tile::online_softmax_weights(row, row_scale, keys.scale.data(), keys.count, &softmax);
      else
        tile::online_softmax(row, row_scale, keys.scale.data(), keys.count, &softmax);
      row_lse[i] = softmax.m_i + std::log(softmax.l_i);
      losses[i] = row_lse[i] - logit;
      if (!row_grad) continue;
      const A dot = keys.count == 1 ? A(0) : softmax.dtau / softmax.l_i - (logit - softmax.m_i);
      tile::widen(row, keys.count, rows.inverse_norm(i) / (softmax.l_i * temperature), row);
      row[positive] -= rows.inverse_norm(i) * keys.scale[positive] / temperature;
      if (keys.count == 1) row[positive] = 0;  // exactly: the loss is constant
      self_weight[i] = -rows.projection(i, dot) * rows.scale[i] * rows.inverse_norm(i);
      temperature_grad[i] = -dot / temperature;
    }
  });

  if (row_grad)
    for_parts([&](int64_t, int64_t first, int64_t m, int64_t d, int64_t n) {
      for (int64_t i = first; i < first + m; ++i)
        tile::widen(rows.at(i) + d, n, self_weight[i], row_grad + i * width + d);
      add_product(
          m, n, keys.count, products.data() + first * keys.count, keys.count, keys.data + d, keys.stride,
          row_grad + first * width + d, width);
    });
}

}  // namespace lfcc::small
