// info_nce on the CPU. A block of up to 256 rows is the unit of work of a thread, which loops over tiles of keys: a
// product by the library gives the logits of a tile, which fit in cache, the functions of info_nce_tile.h turn them
// into softmax weights, and a second product adds weights times keys to the block's gradient. The softmax is online
// ("Online normalizer calculation for softmax", arXiv 1805.02867), so any temperature is safe and B x K is never
// stored.
//
// Blocks depend on the shapes only, not on the number of threads. Workspace per thread: a tile of logits, a block of
// the gradient unless it is the output, and, if they are widened or have extreme norms, a block of rows and a tile of
// keys. Reads B D values, and (B / 256) K D from the last-level cache; FLOPs are in info_nce.h. Small batches use
// info_nce_small.h.
#include "info_nce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/info_nce_rows.h"
#include "cpu/info_nce_small.h"

namespace lfcc {
namespace {

constexpr int64_t TILE_KEYS = 1024;  // with 256 rows a MiB of products, which fits in L2

int64_t block_rows(int64_t count, int64_t width) {
  // Products of fewer than 64 rows are slow; otherwise eight blocks to distribute, of at most 2 MiB each.
  const int64_t eighth = (count + 7) / 8, fitting = (int64_t(1) << 19) / width;
  return std::max<int64_t>(64, std::min({int64_t(256), (eighth + 15) / 16 * 16, fitting / 16 * 16}));
}

int64_t tile_keys(int64_t count, int64_t width) {
  const int64_t fitting = std::max<int64_t>(64, (int64_t(1) << 20) / width);
  return std::min({TILE_KEYS, fitting, count});
}

// A block of rows, and the part of all blocks that contains it; parts are fixed and are the unit of work.
struct Block {
  int64_t part, first, rows;
};

// Calls worker(next) on each thread, where next(&block) returns whether there is another block of up to `size` rows for
// it. A part has `work` products.
template <typename Worker>
void for_blocks(int64_t rows, int64_t size, int64_t work, const Worker& worker) {
  const int64_t blocks = (rows + size - 1) / size, parts = std::min(blocks, MAX_PARTS);
  distribute(parts, work, [&](Ranges& ranges) {
    int64_t part = 0, parts_end = 0, at = 0, end = 0;
    worker([&](Block* block) {
      if (at == end) {
        if (++part >= parts_end && !ranges.take(&part, &parts_end)) return false;
        at = part * blocks / parts, end = (part + 1) * blocks / parts;
      }
      *block = {part, at * size, std::min(size, rows - at * size)};
      ++at;
      return true;
    });
  });
}

}  // namespace

template <typename T, typename A>
void info_nce(const Pair<T>& pair, A* losses, A* row_lse, A* col_lse) {
  const Side<T, A> rows(pair.rows, pair.batch, pair.row_stride, pair.width, pair.normalize);
  const Side<T, A> keys(pair.keys, pair.key_count, pair.key_stride, pair.width, pair.normalize);
  if constexpr (std::is_same<T, A>::value)
    if (!pair.symmetric && small::fits(rows, keys))
      return small::info_nce<A>(pair, rows, keys, losses, row_lse, nullptr, nullptr);
  const int64_t block = block_rows(rows.count, rows.width), n_tile = tile_keys(keys.count, keys.width);
  const int64_t blocks = (rows.count + block - 1) / block, offset = pair.positive_offset;
  const A none = -std::numeric_limits<A>::infinity();
  std::vector<std::vector<A>> col_m(MAX_PARTS), col_l(MAX_PARTS);  // of each part of the rows

  for_blocks(rows.count, block, block * keys.count * keys.width, [&](const auto& next) {
    Workspace<T, A> work(rows, keys, block, n_tile);
    std::vector<tile::Softmax<A>> softmax(block);
    std::vector<A> m_old(n_tile);
    for (Block taken; next(&taken);) {
      const auto [part, first, m] = taken;
      if (pair.symmetric && col_l[part].empty())
        col_m[part].assign(rows.count, none), col_l[part].assign(rows.count, A(0));
      work.load_rows(first, m, pair.temperature);
      std::fill(softmax.begin(), softmax.end(), tile::Softmax<A>());
      for (int64_t key = 0; key < keys.count; key += n_tile) {
        const int64_t n = std::min(n_tile, keys.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t positive = offset + first + i - key;
          if (pair.row_ids) exclude_ids(work.row(i), pair.key_ids + key, pair.row_ids[first + i], n, positive);
          if (positive >= 0 && positive < n) losses[first + i] = -work.logit(i, positive);
          tile::online_softmax(work.row(i), work.row_scale[i], work.key_scale, n, &softmax[i]);
        }
        const int64_t col = std::max(key, offset), col_end = std::min(key + n, offset + rows.count);
        if (!pair.symmetric || col >= col_end) continue;
        tile::online_columns(
            work.row(0) + (col - key), m, col_end - col, n_tile, col_m[part].data() + (col - offset),
            col_l[part].data() + (col - offset), m_old.data());
      }
      for (int64_t i = 0; i < m; ++i) row_lse[first + i] = softmax[i].m_i + std::log(softmax[i].l_i);
    }
  });
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!pair.symmetric) {
      losses[i] += row_lse[i];
      continue;
    }
    A m_i = none, l_i = 0;
    const int64_t parts = std::min(blocks, MAX_PARTS);
    for (int64_t part = 0; part < parts; ++part) m_i = std::max(m_i, col_m[part][i]);
    for (int64_t part = 0; part < parts; ++part) l_i += col_l[part][i] * std::exp(col_m[part][i] - m_i);
    col_lse[i] = m_i + std::log(l_i);
    losses[i] += (row_lse[i] + col_lse[i]) / 2;
  }
}

template <typename T, typename A>
void info_nce_one_pass(const Pair<T>& pair, A* losses, A* row_lse, A* row_grad, A* temperature_grad) {
  const Side<T, A> rows(pair.rows, pair.batch, pair.row_stride, pair.width, pair.normalize);
  const Side<T, A> keys(pair.keys, pair.key_count, pair.key_stride, pair.width, pair.normalize);
  if constexpr (std::is_same<T, A>::value)
    if (small::fits(rows, keys))
      return small::info_nce<A>(pair, rows, keys, losses, row_lse, row_grad, temperature_grad);
  const int64_t block = block_rows(rows.count, rows.width), n_tile = tile_keys(keys.count, keys.width);
  const int64_t width = rows.width;
  const A temperature = A(pair.temperature);

  for_blocks(rows.count, block, block * keys.count * width, [&](const auto& next) {
    Workspace<T, A> work(rows, keys, block, n_tile);
    std::vector<tile::Softmax<A>> softmax(block);
    for (Block taken; next(&taken);) {
      const auto [part, first, m] = taken;
      A* acc = row_grad + first * width;  // sum_j p_ij k_j, then the gradient
      work.load_rows(first, m, pair.temperature);
      std::fill(acc, acc + m * width, A(0));
      std::fill(softmax.begin(), softmax.end(), tile::Softmax<A>());
      for (int64_t key = 0; key < keys.count; key += n_tile) {
        const int64_t n = std::min(n_tile, keys.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t positive = pair.positive_offset + first + i - key;
          if (pair.row_ids) exclude_ids(work.row(i), pair.key_ids + key, pair.row_ids[first + i], n, positive);
          if (positive >= 0 && positive < n) losses[first + i] = -work.logit(i, positive);
          const A alpha =
              tile::online_softmax_weights(work.row(i), work.row_scale[i], work.key_scale, n, &softmax[i]);
          if (alpha != 1) tile::widen(acc + i * width, width, alpha, acc + i * width);
        }
        work.add_keys(m, n, acc);
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = first + i, positive = pair.positive_offset + row;
        const auto [m_i, l_i, dtau] = softmax[i];
        const A dot = keys.count == 1 ? A(0) : dtau / l_i + (losses[row] + m_i);  // sum_j softmax_j A_j - A_p
        tile::norm_backward(
            acc + i * width, 1 / (l_i * temperature), keys.at(positive), keys.scale[positive] / temperature,
            rows.at(row), rows.scale[row], rows.projection(row, dot), rows.inverse_norm(row), width);
        if (keys.count == 1) std::fill(acc, acc + width, A(0));  // exactly: the loss is constant
        temperature_grad[row] = -dot / temperature;
        row_lse[row] = m_i + std::log(l_i);
        losses[row] += row_lse[row];
      }
    }
  });
}

template <typename T, typename A>
void info_nce_grad(
    const Pair<T>& pair, const A* grad, const A* row_lse, const A* col_lse, bool of_keys, T* side_grad,
    A* temperature_grad) {
  if (pair.batch == 1 && pair.key_count == 1) {  // the loss is constant
    std::fill(side_grad, side_grad + pair.width, T());
    *temperature_grad = 0;
    return;
  }
  const Side<T, A> rows(pair.rows, pair.batch, pair.row_stride, pair.width, pair.normalize);
  const Side<T, A> keys(pair.keys, pair.key_count, pair.key_stride, pair.width, pair.normalize);
  // Upstream gradient and log-sum-exp of the row softmax, one per row, and of the column softmax, one per key. A key
  // without a loss has a gradient of 0 and an infinite log-sum-exp.
  const A infinity = std::numeric_limits<A>::infinity();
  std::vector<A> grad_of_rows(rows.count), grad_of_keys(keys.count, A(0)), lse_of_keys(keys.count, infinity);
  for (int64_t i = 0; i < rows.count; ++i) {
    grad_of_rows[i] = pair.symmetric ? grad[i] / 2 : grad[i];
    if (!pair.symmetric) continue;
    grad_of_keys[pair.positive_offset + i] = grad[i] / 2;
    lse_of_keys[pair.positive_offset + i] = col_lse[i];
  }
  // q is the side whose gradient is computed.
  const Side<T, A>&q = of_keys ? keys : rows, &k = of_keys ? rows : keys;
  const A *q_grad = of_keys ? grad_of_keys.data() : grad_of_rows.data();
  const A *k_grad = of_keys ? grad_of_rows.data() : grad_of_keys.data();
  const A *q_lse = of_keys ? lse_of_keys.data() : row_lse, *k_lse = of_keys ? row_lse : lse_of_keys.data();
  const int64_t *q_ids = of_keys ? pair.key_ids : pair.row_ids, *k_ids = of_keys ? pair.row_ids : pair.key_ids;
  const int64_t shift = of_keys ? -pair.positive_offset : pair.positive_offset;
  const bool row_softmax = pair.symmetric || !of_keys, col_softmax = pair.symmetric || of_keys;

  const int64_t block = block_rows(q.count, q.width), n_tile = tile_keys(k.count, k.width);
  const int64_t width = q.width;
  const A temperature = A(pair.temperature);
  std::vector<A> dots(q.count);

  for_blocks(q.count, block, block * k.count * width, [&](const auto& next) {
    Workspace<T, A> work(q, k, block, n_tile);
    std::vector<A> acc(block * width);
    for (Block taken; next(&taken);) {
      const auto [part, first, m] = taken;
      work.load_rows(first, m, pair.temperature);
      std::fill(acc.begin(), acc.end(), A(0));
      for (int64_t key = 0; key < k.count; key += n_tile) {
        const int64_t n = std::min(n_tile, k.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          A* products = work.row(i);
          const A row_scale = work.row_scale[i], *key_scale = work.key_scale;
          const int64_t row = first + i, positive = row + shift - key;
          if (q_ids) exclude_ids(products, k_ids + key, q_ids[row], n, positive);
          if (row_softmax && col_softmax)
            tile::row_col_weights(
                products, row_scale, key_scale, q_grad[row], q_lse[row], k_grad + key, k_lse + key, n);
          else if (row_softmax)
            tile::row_weights(products, row_scale, key_scale, q_grad[row], q_lse[row], n);
          else
            tile::col_weights(products, row_scale, key_scale, k_grad + key, k_lse + key, n);
          if (positive >= 0 && positive < n)
            products[positive] -= grad[of_keys ? key + positive : row] * key_scale[positive];
        }
        work.add_keys(m, n, acc.data());
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = first + i;
        A* gradient = acc.data() + i * width;
        dots[row] = tile::dot_unit(gradient, q.at(row), q.scale[row], width) / temperature;
        tile::norm_backward(
            gradient, 1 / temperature, q.at(row), q.scale[row], q.projection(row, dots[row]), q.inverse_norm(row),
            width);
        tile::narrow(gradient, width, side_grad + row * width);
      }
    }
  });
  *temperature_grad = 0;
  for (A dot : dots) *temperature_grad -= dot / temperature;
}

#define LFCC_INSTANTIATE(T, A)                                                       \
  template void info_nce<T, A>(const Pair<T>&, A*, A*, A*);                          \
  template void info_nce_one_pass<T, A>(const Pair<T>&, A*, A*, A*, A*);             \
  template void info_nce_grad<T, A>(const Pair<T>&, const A*, const A*, const A*, bool, T*, A*);
LFCC_INSTANTIATE(double, double)
LFCC_INSTANTIATE(float, float)
LFCC_INSTANTIATE(BFloat16, float)
LFCC_INSTANTIATE(Half, float)

}  // namespace lfcc
