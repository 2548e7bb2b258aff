// The host's side of lowpass_tiles.h: how large tiles are, where a block keeps what, and how many blocks there are.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda/lowpass_tiles.h"

namespace lfcc::cuda {

constexpr int tile_bytes_aim = 16 << 10;      // per tile, so that three blocks of a multiprocessor have 96 KiB under way
constexpr int shared_bytes_aim = 80 << 10;    // of two blocks on a multiprocessor with 164 KiB
constexpr int shared_bytes_limit = 160 << 10;

enum class Pass { forward, input_grad, filter_grad };

struct Plan {
  Jobs jobs;
  Layout layout;
  unsigned blocks;
};

inline int ceil_div(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); }
inline int round_up(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d * d); }

// The number of parts of at most `limit` that n makes, of about the same size.
inline int even_part(int n, int limit) { return ceil_div(n, ceil_div(n, std::max(1, std::min(n, limit)))); }

// A tile of at most these channels, rows and columns. T decides how many elements make 16 bytes.
template <typename T>
Tiling make_tiling(const PooledMap& map, int channels, int rows, int width) {
  constexpr int vector = 16 / sizeof(T);
  Tiling tile;
  tile.lanes = map.stride_w != 1;
  tile.width = even_part(map.width, width);
  tile.channels = even_part(map.channels, channels);
  if (channels >= vector) tile.channels = std::min(map.channels, round_up(tile.channels, vector));
  tile.rows = even_part(map.height, rows);
  tile.rows_joined = !tile.lanes && tile.width == map.width && (map.stride_h == map.width || map.height == 1);
  if (tile.rows_joined) {  // so that tiles begin at multiples of 16 bytes
    const int step = vector / std::gcd(vector, map.width);
    tile.rows = std::min(map.height, round_up(tile.rows, step));
  }
  const int64_t size = static_cast<int64_t>(map.height) * map.width;
  tile.maps_joined = tile.rows_joined && tile.rows == map.height && (map.stride_c == size || map.channels == 1);
  tile.groups = ceil_div(map.channels, tile.channels);
  tile.width_tiles = ceil_div(map.width, tile.width);
  if (tile.lanes) {
    tile.shared_c = 1, tile.shared_w = round_up(tile.channels, vector), tile.shared_h = tile.width * tile.shared_w;
    tile.sum_c = 1, tile.sum_w = tile.channels, tile.sum_columns = tile.width * tile.channels;
  } else {
    tile.shared_w = 1, tile.shared_h = tile.rows_joined ? tile.width : round_up(tile.width, vector);
    tile.shared_c = tile.maps_joined ? static_cast<int>(size) : round_up(tile.rows * tile.shared_h, vector);
    tile.sum_w = 1, tile.sum_c = tile.width | 1, tile.sum_columns = tile.channels * tile.sum_c;
  }
  const auto even = [](int64_t step, int count) { return count == 1 || step % vector == 0; };
  tile.wide = reinterpret_cast<uintptr_t>(map.x) % 16 == 0 && even(map.stride_b, map.batch);
  if (tile.lanes)
    tile.wide &= even(map.stride_h, map.height) && even(map.stride_w, map.width) && even(tile.channels, tile.groups);
  else if (tile.maps_joined)
    tile.wide &= even(tile.channels * size, tile.groups);
  else if (tile.rows_joined)
    tile.wide &= even(map.stride_c, map.channels) &&
        even(int64_t(tile.rows) * map.width, ceil_div(map.height, tile.rows));
  else
    tile.wide &= even(map.stride_c, map.channels) && even(map.stride_h, map.height) &&
        even(tile.width, tile.width_tiles);
  return tile;
}

// What one job needs; that of a launch is the largest of each part.
template <typename T>
Layout layout_of(const Tiling& tile, const Scales& scales, Pass pass) {
  using A = acc_t<T>;
  const int number = sizeof(A), filters = scales.passes() * pass_filters;
  Layout need{};
  const int elements = tile.lanes ? tile.rows * tile.shared_h : tile.channels * tile.shared_c;
  need.tile_bytes = round_up(elements * int64_t(sizeof(T)), 16);
  need.stage_bytes = need.tile_bytes + tile.rows * (pass == Pass::input_grad ? filters : pass_filters) * number;
  need.stage_bytes = round_up(need.stage_bytes, 16);
  need.sums = pass == Pass::input_grad ? filters * tile.channels * tile.width * number
                                       : pass_filters * tile.sum_columns * number;
  if (pass == Pass::filter_grad) need.cells = tile.rows * (pool_threads / warp_size) * pass_filters * number;
  if (pass == Pass::forward && tile.width_tiles > 1) {
    int most = 0;  // cells of a pass
    std::vector<int> cells;
    for (int n = 0; n < scales.count; ++n) cells.insert(cells.end(), scales.scale[n], scales.scale[n]);
    for (size_t n = 0; n < cells.size(); n += pass_filters)
      most = std::max(most, std::accumulate(
          cells.begin() + n, cells.begin() + std::min(cells.size(), n + pass_filters), 0));
    need.cells = most * tile.channels * number;
  }
  need.bytes = (pass == Pass::input_grad ? 2 : stages) * need.stage_bytes + need.sums + need.cells;
  return need;
}

// The largest tile up to what a block's threads own and to the aims above.
template <typename T>
Tiling choose_tiling(const PooledMap& map, const Scales& scales, Pass pass) {
  const int columns = pool_threads * thread_columns;
  int channels = 128 / sizeof(T), width = columns;
  if (map.stride_w != 1)
    width = columns / std::min(channels, round_up(map.channels, 16 / sizeof(T)));
  else
    channels = std::max(1, columns / even_part(map.width, columns));
  if (map.stride_w == 1 && channels > static_cast<int>(16 / sizeof(T))) channels -= channels % (16 / sizeof(T));
  int rows = map.height;
  while (true) {
    const Tiling tile = make_tiling<T>(map, channels, rows, width);
    const Layout need = layout_of<T>(tile, scales, pass);
    const bool owned = tile.channels * tile.width <= columns;
    if (owned && need.tile_bytes <= tile_bytes_aim && need.bytes <= shared_bytes_aim) return tile;
    if (tile.rows > 4 && owned)
      rows = (tile.rows + 1) / 2;
    else if (tile.channels > 1)
      channels = (tile.channels + 1) / 2;
    else if (tile.width > 1)
      width = (tile.width + 1) / 2;
    else if (tile.rows > 1)
      rows = (tile.rows + 1) / 2;
    else
      return tile;
  }
}

inline Scales make_scales(const std::vector<int64_t>& given) {
  if (given.size() > max_scales)
    throw std::runtime_error(
        "lfcc: " + std::to_string(given.size()) + " scales; the CUDA kernels take up to " + std::to_string(max_scales) +
        ", use_backend('triton') or use_backend('eager') takes more");
  Scales scales{};
  for (int64_t scale : given) {
    scales.scale[scales.count++] = static_cast<int>(scale);
    scales.filters += static_cast<int>(scale);
    scales.cells += static_cast<int>(scale * scale);
  }
  return scales;
}

// One plan a launch; maps go together while tables stay small.
template <typename T>
std::vector<Plan> plans(const std::vector<PooledMap>& maps, const std::vector<int64_t>& given, Pass pass) {
  const Scales scales = make_scales(given);
  const size_t together = std::clamp<size_t>((4 << 10) / Tables::bytes(scales, 1), 1, max_jobs);
  std::vector<Plan> result;
  for (size_t first = 0; first < maps.size(); first += together) {
    Plan plan{};
    plan.jobs.scales = scales;
    int64_t units = 0;
    for (size_t n = first; n < std::min(maps.size(), first + together); ++n) {
      Job& job = plan.jobs.job[plan.jobs.count++];
      job.map = maps[n], job.tiling = choose_tiling<T>(maps[n], scales, pass);
      job.first_unit = static_cast<unsigned>(units);
      units += int64_t(maps[n].batch) * job.tiling.groups * (pass == Pass::input_grad ? 1 : scales.passes());
      if (units >= int64_t(1) << 31)
        throw std::runtime_error("lfcc: the CUDA kernels take up to 2^31 groups of channels; split the batch");
      const Layout need = layout_of<T>(job.tiling, scales, pass);
      plan.layout.tile_bytes = std::max(plan.layout.tile_bytes, need.tile_bytes);
      plan.layout.stage_bytes = std::max(plan.layout.stage_bytes, need.stage_bytes - need.tile_bytes);
      plan.layout.sums = std::max(plan.layout.sums, need.sums);
      plan.layout.cells = std::max(plan.layout.cells, need.cells);
    }
    Layout& layout = plan.layout;  // from sizes to offsets
    const int sums = round_up(layout.sums, 16), cells = round_up(layout.cells, 16);
    layout.stage_bytes += layout.tile_bytes;
    layout.stages = round_up(Tables::bytes(scales, plan.jobs.count), 16);
    layout.sums = layout.stages + (pass == Pass::input_grad ? 2 : stages) * layout.stage_bytes;
    layout.cells = layout.sums + sums;
    layout.bytes = layout.cells + cells;
    if (layout.bytes > shared_bytes_limit)
      throw std::runtime_error(
          "lfcc: scales with " + std::to_string(scales.filters) + " filters need more shared memory than a GPU has; "
          "use_backend('triton') or use_backend('eager') takes them");
    plan.jobs.units = static_cast<unsigned>(units);
    // Blocks that take one unit after the other load the next while they work on this one. Filter gradients leave sums
    // of each block behind, so there are no more blocks than run at once.
    const int64_t blocks = pass == Pass::filter_grad ? 2 * multiprocessors() : 16 * multiprocessors();
    plan.blocks = static_cast<unsigned>(units <= blocks ? units : ceil_div(units, ceil_div(units, blocks)));
    result.push_back(plan);
  }
  return result;
}

}  // namespace lfcc::cuda
