// info_nce on the CPU. A block of up to 256 rows is one unit of work for one thread, which walks over tiles of keys:
// a library product gives the tile's logits, cache-sized, the functions of info_nce_tile.h turn them into softmax
// weights, and a second product adds weights times keys to the block's gradient. The maximum runs along (as in
// "Online normalizer calculation for softmax", arXiv 1805.02867), so any temperature is safe and B x K is never held.
//
// Blocks are fixed by the shapes, never by the number of threads. Working memory a thread: two blocks of rows x D and
// one tile of logits; a third, of keys x D, where keys are raised from a smaller type or have extreme norms.
// Reads B D values and (B / 256) K D from the last cache; FLOPs are in info_nce.h.
#include "info_nce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/info_nce_tile.h"
#include "cpu/parallel.h"

namespace lfcc {
namespace {

constexpr int64_t TILE_KEYS = 512;
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
    if (normalize)
      parallel_for(std::min<int64_t>(count, MAX_UNITS), count * width / std::min<int64_t>(count, MAX_UNITS), [&](int64_t begin, int64_t end) {
        const int64_t units = std::min<int64_t>(count, MAX_UNITS);
        for (int64_t row = begin * count / units; row < end * count / units; ++row) {
          const double norm = std::sqrt(tile::square_sum(data + row * stride, width));
          scale[row] = A(std::isnan(norm) ? norm : 1 / std::max(norm, tile::EPSILON));
          shrunk[row] = norm < tile::EPSILON;
        }
      });
    // Products of rows with extreme norms would leave float's range before the scale brings them back.
    for (A value : scale) in_place &= value > A(1e-12) && value < A(1e9);
    in_place &= std::is_same<T, A>::value && stride <= INT32_MAX;
  }

  // The unit row times `by`.
  void raise(int64_t row, A by, A* out) const { tile::raise(data + row * stride, width, scale[row] * by, out); }
};

// What one thread needs for a block of rows against tiles of keys.
template <typename T, typename A>
struct Workspace {
  const Side<T, A>&rows, &keys;
  int64_t block, tile_keys;
  std::vector<A> units, logits, key_buffer;
  const A* key_rows = nullptr;  // of the current tile, with their stride
  int64_t key_stride = 0;

  Workspace(const Side<T, A>& rows, const Side<T, A>& keys, int64_t block, int64_t tile_keys)
      : rows(rows), keys(keys), block(block), tile_keys(tile_keys), units(block * rows.width),
        logits(block * tile_keys), key_buffer(keys.in_place ? 0 : tile_keys * keys.width) {}

  // Unit rows divided by the temperature.
  void load_rows(int64_t first, int64_t m, double temperature) {
    for (int64_t i = 0; i < m; ++i) rows.raise(first + i, A(1 / temperature), units.data() + i * rows.width);
  }

  // logits (m x n) of the block against keys [first, first + n).
  void load_tile(int64_t first, int64_t m, int64_t n) {
    if constexpr (std::is_same<T, A>::value) {
      key_rows = keys.data + first * keys.stride;
      key_stride = keys.stride;
    }
    if (!keys.in_place) {
      for (int64_t j = 0; j < n; ++j) keys.raise(first + j, A(1), key_buffer.data() + j * keys.width);
      key_rows = key_buffer.data();
      key_stride = keys.width;
    }
    product_with_transpose(
        m, n, rows.width, units.data(), rows.width, key_rows, key_stride, logits.data(), tile_keys);
    if (keys.in_place && keys.normalize)
      for (int64_t i = 0; i < m; ++i) tile::scale(row(i), keys.scale.data() + first, n);
  }

  // out (m x D) += weights (m x n, in place of the logits) times the tile's unit keys.
  void add_keys(int64_t first, int64_t m, int64_t n, A* out) {
    if (keys.in_place && keys.normalize)
      for (int64_t i = 0; i < m; ++i) tile::scale(row(i), keys.scale.data() + first, n);
    add_product(m, rows.width, n, logits.data(), tile_keys, key_rows, key_stride, out, rows.width);
  }

  A* row(int64_t i) { return logits.data() + i * tile_keys; }
};

int64_t block_rows(int64_t count, int64_t width) {
  // Fewer than 64 rows make slow products; from there on eight blocks to share, and at most 2 MiB a block.
  const int64_t shared = (count + 7) / 8, fitting = (int64_t(1) << 19) / width;
  return std::max<int64_t>(64, std::min({int64_t(256), (shared + 15) / 16 * 16, fitting / 16 * 16}));
}

int64_t tile_keys(int64_t count, int64_t width) {
  const int64_t fitting = std::max<int64_t>(64, (int64_t(1) << 20) / width);
  return std::min({TILE_KEYS, fitting, count});
}

// Calls body(unit, block_begin, block_end) for fixed shares of the blocks, in parallel; a block has `work` products.
template <typename Body>
void for_shares(int64_t blocks, int64_t work, const Body& body) {
  const int64_t units = std::min(blocks, MAX_UNITS);
  parallel_for(units, work, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) body(unit, unit * blocks / units, (unit + 1) * blocks / units);
  });
}

// Leaves pairs with equal ids out of a row of logits but for its positive, whose logit it returns where it is here.
template <typename A>
void leave_out(A* logits, const int64_t* ids, int64_t id, int64_t n, int64_t positive) {
  const A kept = positive >= 0 && positive < n ? logits[positive] : A(0);
  tile::leave_out(logits, ids, id, n);
  if (positive >= 0 && positive < n) logits[positive] = kept;
}

}  // namespace

template <typename T, typename A>
void info_nce(const Pair<T>& pair, A* losses, A* row_lse, A* col_lse) {
  const Side<T, A> rows(pair.rows, pair.batch, pair.row_stride, pair.width, pair.normalize);
  const Side<T, A> keys(pair.keys, pair.key_count, pair.key_stride, pair.width, pair.normalize);
  const int64_t block = block_rows(rows.count, rows.width), n_tile = tile_keys(keys.count, keys.width);
  const int64_t blocks = (rows.count + block - 1) / block, offset = pair.positive_offset;
  const A none = -std::numeric_limits<A>::infinity();
  std::vector<std::vector<A>> col_maximum(MAX_UNITS), col_sum(MAX_UNITS);  // of each share of the rows

  for_shares(blocks, block * keys.count * keys.width, [&](int64_t unit, int64_t begin, int64_t end) {
    Workspace<T, A> work(rows, keys, block, n_tile);
    std::vector<A> maximum(block), sum(block), before(n_tile);
    if (pair.symmetric) col_maximum[unit].assign(rows.count, none), col_sum[unit].assign(rows.count, A(0));
    for (int64_t first = begin * block; first < std::min(end * block, rows.count); first += block) {
      const int64_t m = std::min(block, rows.count - first);
      work.load_rows(first, m, pair.temperature);
      std::fill(maximum.begin(), maximum.end(), none);
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t key = 0; key < keys.count; key += n_tile) {
        const int64_t n = std::min(n_tile, keys.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t positive = offset + first + i - key;
          if (pair.row_ids) leave_out(work.row(i), pair.key_ids + key, pair.row_ids[first + i], n, positive);
          if (positive >= 0 && positive < n) losses[first + i] = -work.row(i)[positive];
        }
        const int64_t col = std::max(key, offset), col_end = std::min(key + n, offset + rows.count);
        if (pair.symmetric && col < col_end)
          tile::online_columns(
              work.row(0) + (col - key), m, col_end - col, n_tile, col_maximum[unit].data() + (col - offset),
              col_sum[unit].data() + (col - offset), before.data());
        for (int64_t i = 0; i < m; ++i) tile::online_softmax(work.row(i), n, &maximum[i], &sum[i]);
      }
      for (int64_t i = 0; i < m; ++i) row_lse[first + i] = maximum[i] + std::log(sum[i]);
    }
  });
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!pair.symmetric) {
      losses[i] += row_lse[i];
      continue;
    }
    A maximum = none, sum = 0;
    for (int64_t unit = 0; unit < std::min(blocks, MAX_UNITS); ++unit) maximum = std::max(maximum, col_maximum[unit][i]);
    for (int64_t unit = 0; unit < std::min(blocks, MAX_UNITS); ++unit)
      sum += col_sum[unit][i] * std::exp(col_maximum[unit][i] - maximum);
    col_lse[i] = maximum + std::log(sum);
    losses[i] += (row_lse[i] + col_lse[i]) / 2;
  }
}

template <typename T, typename A>
void info_nce_one_pass(const Pair<T>& pair, A* losses, A* row_lse, A* row_grad, A* temperature_grad) {
  const Side<T, A> rows(pair.rows, pair.batch, pair.row_stride, pair.width, pair.normalize);
  const Side<T, A> keys(pair.keys, pair.key_count, pair.key_stride, pair.width, pair.normalize);
  const int64_t block = block_rows(rows.count, rows.width), n_tile = tile_keys(keys.count, keys.width);
  const int64_t blocks = (rows.count + block - 1) / block, width = rows.width;
  const A temperature = A(pair.temperature);

  for_shares(blocks, block * keys.count * width, [&](int64_t, int64_t begin, int64_t end) {
    Workspace<T, A> work(rows, keys, block, n_tile);
    std::vector<A> maximum(block), sum(block);
    for (int64_t first = begin * block; first < std::min(end * block, rows.count); first += block) {
      const int64_t m = std::min(block, rows.count - first);
      A* output = row_grad + first * width;  // sum of softmax weights times keys, then the gradient
      work.load_rows(first, m, pair.temperature);
      std::fill(output, output + m * width, A(0));
      std::fill(maximum.begin(), maximum.end(), -std::numeric_limits<A>::infinity());
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t key = 0; key < keys.count; key += n_tile) {
        const int64_t n = std::min(n_tile, keys.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          const int64_t positive = pair.positive_offset + first + i - key;
          if (pair.row_ids) leave_out(work.row(i), pair.key_ids + key, pair.row_ids[first + i], n, positive);
          if (positive >= 0 && positive < n) losses[first + i] = -work.row(i)[positive];
          const A correction = tile::online_softmax(work.row(i), n, &maximum[i], &sum[i]);
          if (correction != 1) tile::raise(output + i * width, width, correction, output + i * width);
        }
        work.add_keys(key, m, n, output);
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = first + i;
        A* gradient = output + i * width;
        row_lse[row] = maximum[i] + std::log(sum[i]);
        losses[row] += row_lse[row];
        const int64_t positive = pair.positive_offset + row;
        tile::less_row(
            gradient, 1 / (sum[i] * temperature), keys.data + positive * keys.stride, keys.scale[positive] / temperature,
            width);
        if (keys.count == 1) std::fill(gradient, gradient + width, A(0));  // constant, but for rounding
        const A along = tile::through_norm(
            gradient, work.units.data() + i * width, temperature, rows.scale[row], rows.shrunk[row], pair.normalize,
            width);
        temperature_grad[row] = -along / temperature;
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
  const int64_t blocks = (own.count + block - 1) / block, width = own.width;
  const A temperature = A(pair.temperature);
  std::vector<A> along(own.count);

  for_shares(blocks, block * other.count * width, [&](int64_t, int64_t begin, int64_t end) {
    Workspace<T, A> work(own, other, block, n_tile);
    std::vector<A> output(block * width);
    for (int64_t first = begin * block; first < std::min(end * block, own.count); first += block) {
      const int64_t m = std::min(block, own.count - first);
      work.load_rows(first, m, pair.temperature);
      std::fill(output.begin(), output.end(), A(0));
      for (int64_t key = 0; key < other.count; key += n_tile) {
        const int64_t n = std::min(n_tile, other.count - key);
        work.load_tile(key, m, n);
        for (int64_t i = 0; i < m; ++i) {
          A* logits = work.row(i);
          const int64_t row = first + i, positive = row + to_positive - key;
          if (own_ids) leave_out(logits, other_ids + key, own_ids[row], n, positive);
          if (along_own && along_other)
            tile::both_softmaxes(
                logits, logits, own_weight[row], own_lse[row], other_weight + key, other_lse + key, n);
          else if (along_own)
            tile::own_softmax(logits, logits, own_weight[row], own_lse[row], n);
          else
            tile::other_softmax(logits, logits, other_weight + key, other_lse + key, n);
          if (positive >= 0 && positive < n) logits[positive] -= grad[of_keys ? key + positive : row];
        }
        work.add_keys(key, m, n, output.data());
      }
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = first + i;
        A* gradient = output.data() + i * width;
        for (int64_t d = 0; d < width; ++d) gradient[d] /= temperature;
        along[row] = tile::through_norm(
            gradient, work.units.data() + i * width, temperature, own.scale[row], own.shrunk[row], pair.normalize,
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
