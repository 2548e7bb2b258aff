// info_nce on the CPU. A block of up to 256 rows is one unit of work for one thread, which walks over tiles of keys:
// a library product gives the tile's logits, cache-sized, the functions of info_nce_tile.h turn them into softmax
// weights, and a second product adds weights times keys to the block's gradient. The maximum runs along (as in
// "Online normalizer calculation for softmax", arXiv 1805.02867), so any temperature is safe and B x K is never held.
//
// Blocks are fixed by the shapes, never by the number of threads. Working memory a thread: one tile of logits, and a
// block of the gradient where it is not the result; also a block of rows and a tile of keys where they are raised from
// a smaller type or have extreme norms. Reads B D values and (B / 256) K D from the last cache; FLOPs are in info_nce.h.
// Small batches have a way of their own, in info_nce_small.h.
#include "info_nce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/info_nce_rows.h"
#include "cpu/info_nce_small.h"

namespace lfcc {
namespace {

constexpr int64_t TILE_KEYS = 1024;  // with 256 rows a MiB of products, which the second cache holds

int64_t block_rows(int64_t count, int64_t width) {
  // Fewer than 64 rows make slow products; from there on eight blocks to share, and at most 2 MiB a block.
  const int64_t shared = (count + 7) / 8, fitting = (int64_t(1) << 19) / width;
  return std::max<int64_t>(64, std::min({int64_t(256), (shared + 15) / 16 * 16, fitting / 16 * 16}));
}

int64_t tile_keys(int64_t count, int64_t width) {
  const int64_t fitting = std::max<int64_t>(64, (int64_t(1) << 20) / width);
  return std::min({TILE_KEYS, fitting, count});
}

// A block of rows, and the fixed share of all blocks that it is in; shares are the unit of work.
struct Block {
  int64_t share, first, rows;
};

// Calls worker(next) on each thread, where next(&block) is whether there is another block of up to `size` rows for it;
// a share has `work` products.
template <typename Worker>
void for_blocks(int64_t rows, int64_t size, int64_t work, const Worker& worker) {
  const int64_t blocks = (rows + size - 1) / size, shares = std::min(blocks, MAX_UNITS);
  share_out(shares, work, [&](Ranges& ranges) {
    int64_t share = 0, shares_end = 0, at = 0, end = 0;
    worker([&](Block* block) {
      if (at == end) {
        if (++share >= shares_end && !ranges.take(&share, &shares_end)) return false;
        at = share * blocks / shares, end = (share + 1) * blocks / shares;
      }
      *block = {share, at * size, std::min(size, rows - at * size)};
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
  std::vector<std::vector<A>> col_maximum(MAX_UNITS), col_sum(MAX_UNITS);  // of each share of the rows

  for_blocks(rows.count, block, block * keys.count * keys.width, [&](const auto& next) {
    Workspace<T, A> work(rows, keys, block, n_tile);
    std::vector<tile::Softmax<A>> softmax(block);
    std::vector<A> before(n_tile);
    for (Block taken; next(&taken);) {
      const auto [share, first, m] = taken;
      if (pair.symmetric && col_sum[share].empty())
        col_maximum[share].assign(rows.count, none), col_sum[share].assign(rows.count, A(0));
      work.load_rows(first, m, pair.temperature);
      std::fill(softmax.begin(), softmax.end(), tile::Softmax<A>());
      for (int64_t key = 0; key < keys.count; key += n_tile) {
        const int64_t n = std::min(n_tile, keys.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t positive = offset + first + i - key;
          if (pair.row_ids) leave_out(work.row(i), pair.key_ids + key, pair.row_ids[first + i], n, positive);
          if (positive >= 0 && positive < n) losses[first + i] = -work.logit(i, positive);
          tile::add_to_softmax(work.row(i), work.by[i], work.key_scale, n, &softmax[i]);
        }
        const int64_t col = std::max(key, offset), col_end = std::min(key + n, offset + rows.count);
        if (!pair.symmetric || col >= col_end) continue;
        tile::online_columns(
            work.row(0) + (col - key), m, col_end - col, n_tile, col_maximum[share].data() + (col - offset),
            col_sum[share].data() + (col - offset), before.data());
      }
      for (int64_t i = 0; i < m; ++i) row_lse[first + i] = softmax[i].maximum + std::log(softmax[i].sum);
    }
  });
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!pair.symmetric) {
      losses[i] += row_lse[i];
      continue;
    }
    A maximum = none, sum = 0;
    const int64_t shares = std::min(blocks, MAX_UNITS);
    for (int64_t share = 0; share < shares; ++share) maximum = std::max(maximum, col_maximum[share][i]);
    for (int64_t share = 0; share < shares; ++share)
      sum += col_sum[share][i] * std::exp(col_maximum[share][i] - maximum);
    col_lse[i] = maximum + std::log(sum);
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
      const auto [share, first, m] = taken;
      A* output = row_grad + first * width;  // sum of softmax weights times keys, then the gradient
      work.load_rows(first, m, pair.temperature);
      std::fill(output, output + m * width, A(0));
      std::fill(softmax.begin(), softmax.end(), tile::Softmax<A>());
      for (int64_t key = 0; key < keys.count; key += n_tile) {
        const int64_t n = std::min(n_tile, keys.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t positive = pair.positive_offset + first + i - key;
          if (pair.row_ids) leave_out(work.row(i), pair.key_ids + key, pair.row_ids[first + i], n, positive);
          if (positive >= 0 && positive < n) losses[first + i] = -work.logit(i, positive);
          const A correction =
              tile::turn_to_weights(work.row(i), work.by[i], work.key_scale, n, &softmax[i]);
          if (correction != 1) tile::raise(output + i * width, width, correction, output + i * width);
        }
        work.add_keys(m, n, output);
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = first + i, positive = pair.positive_offset + row;
        const auto [maximum, sum, mean] = softmax[i];
        const A along = keys.count == 1 ? A(0) : mean / sum + (losses[row] + maximum);  // sum_j softmax_j A_j - A_p
        tile::through_norm(
            output + i * width, 1 / (sum * temperature), keys.at(positive), keys.scale[positive] / temperature,
            rows.at(row), rows.scale[row], rows.projected(row, along), rows.inverse(row), width);
        if (keys.count == 1) std::fill(output, output + width, A(0));  // constant, but for rounding
        temperature_grad[row] = -along / temperature;
        row_lse[row] = maximum + std::log(sum);
        losses[row] += row_lse[row];
      }
    }
  });
}

template <typename T, typename A>
void info_nce_grad(
    const Pair<T>& pair, const A* grad, const A* row_lse, const A* col_lse, bool of_keys, T* side_grad,
    A* temperature_grad) {
  if (pair.batch == 1 && pair.key_count == 1) {  // constant, but for rounding
    std::fill(side_grad, side_grad + pair.width, T());
    *temperature_grad = 0;
    return;
  }
  const Side<T, A> rows(pair.rows, pair.batch, pair.row_stride, pair.width, pair.normalize);
  const Side<T, A> keys(pair.keys, pair.key_count, pair.key_stride, pair.width, pair.normalize);
  // Softmaxes along one's own row and across it, each with a weight and a log-sum-exp an element; a weight of 0 with
  // an infinite lse where an element has none.
  const A infinity = std::numeric_limits<A>::infinity();
  std::vector<A> row_weight(rows.count), key_weight(keys.count, A(0)), key_lse(keys.count, infinity);
  for (int64_t i = 0; i < rows.count; ++i) {
    row_weight[i] = pair.symmetric ? grad[i] / 2 : grad[i];
    if (!pair.symmetric) continue;
    key_weight[pair.positive_offset + i] = grad[i] / 2;
    key_lse[pair.positive_offset + i] = col_lse[i];
  }
  const Side<T, A>&own = of_keys ? keys : rows, &other = of_keys ? rows : keys;
  const A *own_weight = of_keys ? key_weight.data() : row_weight.data(), *own_lse = of_keys ? key_lse.data() : row_lse;
  const A *other_weight = of_keys ? row_weight.data() : key_weight.data();
  const A *other_lse = of_keys ? row_lse : key_lse.data();
  const int64_t *own_ids = of_keys ? pair.key_ids : pair.row_ids, *other_ids = of_keys ? pair.row_ids : pair.key_ids;
  const int64_t to_positive = of_keys ? -pair.positive_offset : pair.positive_offset;
  const bool along_own = pair.symmetric || !of_keys, along_other = pair.symmetric || of_keys;

  const int64_t block = block_rows(own.count, own.width), n_tile = tile_keys(other.count, other.width);
  const int64_t width = own.width;
  const A temperature = A(pair.temperature);
  std::vector<A> along(own.count);

  for_blocks(own.count, block, block * other.count * width, [&](const auto& next) {
    Workspace<T, A> work(own, other, block, n_tile);
    std::vector<A> output(block * width);
    for (Block taken; next(&taken);) {
      const auto [share, first, m] = taken;
      work.load_rows(first, m, pair.temperature);
      std::fill(output.begin(), output.end(), A(0));
      for (int64_t key = 0; key < other.count; key += n_tile) {
        const int64_t n = std::min(n_tile, other.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          A* products = work.row(i);
          const A by = work.by[i], *scale = work.key_scale;
          const int64_t row = first + i, positive = row + to_positive - key;
          if (own_ids) leave_out(products, other_ids + key, own_ids[row], n, positive);
          if (along_own && along_other)
            tile::both_softmaxes(
                products, by, scale, own_weight[row], own_lse[row], other_weight + key, other_lse + key, n);
          else if (along_own)
            tile::own_softmax(products, by, scale, own_weight[row], own_lse[row], n);
          else
            tile::other_softmax(products, by, scale, other_weight + key, other_lse + key, n);
          if (positive >= 0 && positive < n)
            products[positive] -= grad[of_keys ? key + positive : row] * scale[positive];
        }
        work.add_keys(m, n, output.data());
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = first + i;
        A* gradient = output.data() + i * width;
        along[row] = tile::along_row(gradient, own.at(row), own.scale[row], width) / temperature;
        tile::through_norm(
            gradient, 1 / temperature, own.at(row), own.scale[row], own.projected(row, along[row]), own.inverse(row),
            width);
        tile::lower(gradient, width, side_grad + row * width);
      }
    }
  });
  *temperature_grad = 0;
  for (A value : along) *temperature_grad -= value / temperature;
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
