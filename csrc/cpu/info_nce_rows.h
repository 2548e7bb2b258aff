// The two sides of info_nce for its kernels: rows, read in place if the products may, with the inverses of their norms;
// and the workspace of a thread for a block of rows against tiles of keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/info_nce_tile.h"
#include "cpu/parallel.h"
#include "info_nce.h"

namespace lfcc {

constexpr int64_t MAX_PARTS = 64;

// The rows of one side, used as unit rows without a normalised copy of the whole side.
template <typename T, typename A>
struct Side {
  const T* data;
  int64_t count, stride, width;
  bool normalize;
  std::vector<A> scale;      // 1 / max(norm, EPSILON), or 1
  std::vector<char> tiny;    // norm below EPSILON
  bool in_place = true;      // products may read the rows without conversion

  Side(const T* data, int64_t count, int64_t stride, int64_t width, bool normalize)
      : data(data), count(count), stride(stride), width(width), normalize(normalize), scale(count, A(1)),
        tiny(count, 0) {
    const int64_t units = std::min(count, MAX_PARTS);
    if (normalize)
      parallel_for(units, count * width / units, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * count / units; row < end * count / units; ++row) {
          const double norm = std::sqrt(tile::square_sum(at(row), width));
          scale[row] = A(std::isnan(norm) ? norm : 1 / std::max(norm, tile::EPSILON));
          tiny[row] = norm < tile::EPSILON;
        }
      });
    // Products of rows with extreme norms would overflow or underflow float before they are scaled.
    for (A value : scale) in_place &= value > A(1e-12) && value < A(1e9);
    in_place &= std::is_same<T, A>::value && stride <= INT32_MAX;
  }

  const T* at(int64_t row) const { return data + row * stride; }

  // The factors of the gradient through the norm, (g - <g, u> u) / |row|; `dot` is <g, u>.
  A projection(int64_t row, A dot) const { return normalize && !tiny[row] ? dot : A(0); }
  A inverse_norm(int64_t row) const { return normalize ? scale[row] : A(1); }
};

// The memory of one thread for a block of rows against tiles of keys. A logit is
// products[i][j] * row_scale[i] * key_scale[j].
template <typename T, typename A>
struct Workspace {
  const Side<T, A>&rows, &keys;
  int64_t tile_keys;
  std::vector<A> products, row_scale, row_buffer, key_buffer, ones;
  const A *row_data = nullptr, *key_data = nullptr, *key_scale = nullptr;  // of the current block and tile
  int64_t row_stride = 0, key_stride = 0;

  Workspace(const Side<T, A>& rows, const Side<T, A>& keys, int64_t block, int64_t tile_keys)
      : rows(rows), keys(keys), tile_keys(tile_keys), products(block * tile_keys), row_scale(block),
        row_buffer(rows.in_place ? 0 : block * rows.width), key_buffer(keys.in_place ? 0 : tile_keys * keys.width),
        ones(tile_keys, A(1)) {}

  void load_rows(int64_t first, int64_t m, double temperature) {
    for (int64_t i = 0; i < m; ++i) row_scale[i] = (rows.in_place ? rows.scale[first + i] : A(1)) * A(1 / temperature);
    load(rows, first, m, row_buffer, &row_data, &row_stride);
  }

  // Computes products (m x n) of the block with keys [first, first + n).
  void load_tile(int64_t first, int64_t m, int64_t n) {
    key_scale = keys.in_place ? keys.scale.data() + first : ones.data();
    load(keys, first, n, key_buffer, &key_data, &key_stride);
    product_with_transpose(m, n, rows.width, row_data, row_stride, key_data, key_stride, products.data(), tile_keys);
  }

  // out (m x D) += products (m x n), by now weights, times the keys of the tile.
  void add_keys(int64_t m, int64_t n, A* out) {
    add_product(m, rows.width, n, products.data(), tile_keys, key_data, key_stride, out, rows.width);
  }

  A* row(int64_t i) { return products.data() + i * tile_keys; }
  A logit(int64_t i, int64_t j) { return row(i)[j] * (row_scale[i] * key_scale[j]); }

 private:
  // Rows [first, first + count) in place, or widened to unit rows in the buffer.
  static void load(
      const Side<T, A>& side, int64_t first, int64_t count, std::vector<A>& buffer, const A** data, int64_t* stride) {
    if constexpr (std::is_same<T, A>::value)
      if (side.in_place) {
        *data = side.at(first), *stride = side.stride;
        return;
      }
    for (int64_t i = 0; i < count; ++i)
      tile::widen(side.at(first + i), side.width, side.scale[first + i], buffer.data() + i * side.width);
    *data = buffer.data(), *stride = side.width;
  }
};

// Excludes pairs with equal ids from a row of products, except the positive if it is among them.
template <typename A>
void exclude_ids(A* products, const int64_t* ids, int64_t id, int64_t n, int64_t positive) {
  const A product = positive >= 0 && positive < n ? products[positive] : A(0);
  tile::exclude_ids(products, ids, id, n);
  if (positive >= 0 && positive < n) products[positive] = product;
}

}  // namespace lfcc
