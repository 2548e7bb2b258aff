// The two sides of info_nce as its kernels take them: rows read where they lie wherever the products may, their norms
// kept beside them; and what a thread holds of them for a block of rows against tiles of keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/info_nce_tile.h"
#include "cpu/parallel.h"
#include "info_nce.h"

namespace lfcc {

constexpr int64_t MAX_UNITS = 64;

// One side's rows, taken as unit rows without a normalised copy of them all.
template <typename T, typename A>
struct Side {
  const T* data;
  int64_t count, stride, width;
  bool normalize;
  std::vector<A> scale;      // 1 / max(norm, EPSILON), or 1
  std::vector<char> shrunk;  // norm below EPSILON
  bool in_place = true;      // the products may read the rows as they are

  Side(const T* data, int64_t count, int64_t stride, int64_t width, bool normalize)
      : data(data), count(count), stride(stride), width(width), normalize(normalize), scale(count, A(1)),
        shrunk(count, 0) {
    const int64_t units = std::min(count, MAX_UNITS);
    if (normalize)
      parallel_for(units, count * width / units, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * count / units; row < end * count / units; ++row) {
          const double norm = std::sqrt(tile::square_sum(at(row), width));
          scale[row] = A(std::isnan(norm) ? norm : 1 / std::max(norm, tile::EPSILON));
          shrunk[row] = norm < tile::EPSILON;
        }
      });
    // Products of rows with extreme norms would leave float's range before the scale brings them back.
    for (A value : scale) in_place &= value > A(1e-12) && value < A(1e9);
    in_place &= std::is_same<T, A>::value && stride <= INT32_MAX;
  }

  const T* at(int64_t row) const { return data + row * stride; }

  // How much of the unit row's direction a gradient keeps, and what divides it: d = (g - <g, u> u) / |row|.
  A projected(int64_t row, A along) const { return normalize && !shrunk[row] ? along : A(0); }
  A inverse(int64_t row) const { return normalize ? scale[row] : A(1); }
};

// What one thread needs for a block of rows against tiles of keys. A logit is products[i][j] * by[i] * key_scale[j].
template <typename T, typename A>
struct Workspace {
  const Side<T, A>&rows, &keys;
  int64_t tile_keys;
  std::vector<A> products, by, row_buffer, key_buffer, ones;
  const A *row_data = nullptr, *key_data = nullptr, *key_scale = nullptr;  // of the current block and tile
  int64_t row_stride = 0, key_stride = 0;

  Workspace(const Side<T, A>& rows, const Side<T, A>& keys, int64_t block, int64_t tile_keys)
      : rows(rows), keys(keys), tile_keys(tile_keys), products(block * tile_keys), by(block),
        row_buffer(rows.in_place ? 0 : block * rows.width), key_buffer(keys.in_place ? 0 : tile_keys * keys.width),
        ones(tile_keys, A(1)) {}

  void load_rows(int64_t first, int64_t m, double temperature) {
    for (int64_t i = 0; i < m; ++i) by[i] = (rows.in_place ? rows.scale[first + i] : A(1)) * A(1 / temperature);
    load(rows, first, m, row_buffer, &row_data, &row_stride);
  }

  // products (m x n) of the block with keys [first, first + n).
  void load_tile(int64_t first, int64_t m, int64_t n) {
    key_scale = keys.in_place ? keys.scale.data() + first : ones.data();
    load(keys, first, n, key_buffer, &key_data, &key_stride);
    product_with_transpose(m, n, rows.width, row_data, row_stride, key_data, key_stride, products.data(), tile_keys);
  }

  // out (m x D) += what the products were turned into (m x n) times the tile's keys.
  void add_keys(int64_t m, int64_t n, A* out) {
    add_product(m, rows.width, n, products.data(), tile_keys, key_data, key_stride, out, rows.width);
  }

  A* row(int64_t i) { return products.data() + i * tile_keys; }
  A logit(int64_t i, int64_t j) { return row(i)[j] * (by[i] * key_scale[j]); }

 private:
  // Rows [first, first + count) where they lie, or raised to unit rows in the buffer.
  static void load(
      const Side<T, A>& side, int64_t first, int64_t count, std::vector<A>& buffer, const A** data, int64_t* stride) {
    if constexpr (std::is_same<T, A>::value)
      if (side.in_place) {
        *data = side.at(first), *stride = side.stride;
        return;
      }
    for (int64_t i = 0; i < count; ++i)
      tile::raise(side.at(first + i), side.width, side.scale[first + i], buffer.data() + i * side.width);
    *data = buffer.data(), *stride = side.width;
  }
};

// Leaves pairs with equal ids out of a row of products but for its positive, which stays where it is here.
template <typename A>
void leave_out(A* products, const int64_t* ids, int64_t id, int64_t n, int64_t positive) {
  const A kept = positive >= 0 && positive < n ? products[positive] : A(0);
  tile::leave_out(products, ids, id, n);
  if (positive >= 0 && positive < n) products[positive] = kept;
}

}  // namespace lfcc
