// Launch plans of the low-pass kernels, on the host: tile sizes, the layout of shared memory, and the number of blocks.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda/lowpass_tiles.cuh"

namespace lfcc::cuda {

constexpr int tile_bytes_aim = 16 << 10;      // three blocks on a multiprocessor then copy 96 KiB at once
constexpr int shared_bytes_aim = 80 << 10;    // two blocks on a multiprocessor with 164 KiB
constexpr int shared_bytes_limit = 160 << 10;

enum class Pass { forward, input_grad, filter_grad };

struct Plan {
  Problems problems;
  Layout layout;
  unsigned blocks;
};

inline int ceil_div(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d); }
inline int round_up(int64_t n, int64_t d) { return static_cast<int>((n + d - 1) / d * d); }

// Size of the parts if n is divided into equal parts of at most `limit`.
inline int even_part(int n, int limit) { return ceil_div(n, ceil_div(n, std::max(1, std::min(n, limit)))); }

// A tile of at most these channels, rows and columns, for elements T.
template <typename T>
Tiling make_tiling(const PooledMap& map, int channels, int rows, int width) {
  constexpr int vector = 16 / sizeof(T);
  Tiling tile;
  tile.nhwc = map.stride_w != 1;
  tile.width = even_part(map.width, width);
  tile.channels = even_part(map.channels, channels);
  if (channels >= vector) tile.channels = std::min(map.channels, round_up(tile.channels, vector));
  tile.rows = even_part(map.height, rows);
  tile.rows_joined = !tile.nhwc && tile.width == map.width && (map.stride_h == map.width || map.height == 1);
  if (tile.rows_joined) {  // tiles then begin at multiples of 16 bytes
    const int step = vector / std::gcd(vector, map.width);
    tile.rows = std::min(map.height, round_up(tile.rows, step));
  }
  const int64_t size = static_cast<int64_t>(map.height) * map.width;
  tile.maps_joined = tile.rows_joined && tile.rows == map.height && (map.stride_c == size || map.channels == 1);
  tile.groups = ceil_div(map.channels, tile.channels);
  tile.width_tiles = ceil_div(map.width, tile.width);
  if (tile.nhwc) {
    tile.shared_c = 1, tile.shared_w = round_up(tile.channels, vector), tile.shared_h = tile.width * tile.shared_w;
    tile.u_c = 1, tile.u_w = tile.channels, tile.u_columns = tile.width * tile.channels;
  } else {
    tile.shared_w = 1, tile.shared_h = tile.rows_joined ? tile.width : round_up(tile.width, vector);
    tile.shared_c = tile.maps_joined ? static_cast<int>(size) : round_up(tile.rows * tile.shared_h, vector);
    tile.u_w = 1, tile.u_c = tile.width | 1, tile.u_columns = tile.channels * tile.u_c;
  }
  const auto even = [](int64_t step, int count) { return count == 1 || step % vector == 0; };
  tile.wide = reinterpret_cast<uintptr_t>(map.x) % 16 == 0 && even(map.stride_b, map.batch);
  if (tile.nhwc)
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

// The sizes that one problem needs; a launch needs the maximum of each.
template <typename T>
Layout layout_of(const Tiling& tile, const Scales& scales, Pass pass) {
  using A = acc_t<T>;
  const int number = sizeof(A), filters = scales.passes() * pass_filters;
  Layout need{};
  const int elements = tile.nhwc ? tile.rows * tile.shared_h : tile.channels * tile.shared_c;
  need.tile_bytes = round_up(elements * int64_t(sizeof(T)), 16);
  need.stage_bytes = need.tile_bytes + tile.rows * (pass == Pass::input_grad ? filters : pass_filters) * number;
  need.stage_bytes = round_up(need.stage_bytes, 16);
  need.uv = pass == Pass::input_grad ? filters * tile.channels * tile.width * number
                                       : pass_filters * tile.u_columns * number;
  if (pass == Pass::filter_grad) need.cells = tile.rows * (block_threads / warp_size) * pass_filters * number;
  if (pass == Pass::forward && tile.width_tiles > 1) {
    int most = 0;  // cells per pass
    std::vector<int> cells;
    for (int n = 0; n < scales.count; ++n) cells.insert(cells.end(), scales.scale[n], scales.scale[n]);
    for (size_t n = 0; n < cells.size(); n += pass_filters)
      most = std::max(most, std::accumulate(
          cells.begin() + n, cells.begin() + std::min(cells.size(), n + pass_filters), 0));
    need.cells = most * tile.channels * number;
  }
  need.bytes = (pass == Pass::input_grad ? 2 : stages) * need.stage_bytes + need.uv + need.cells;
  return need;
}

// The largest tile within the columns that a block's threads own and the aims above.
template <typename T>
Tiling choose_tiling(const PooledMap& map, const Scales& scales, Pass pass) {
  const int columns = block_threads * thread_columns;
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
        "lfcc: got " + std::to_string(given.size()) + " scales; the CUDA kernels support up to " +
        std::to_string(max_scales) + ", use_backend('triton') or use_backend('eager') has no limit");
  Scales scales{};
  for (int64_t scale : given) {
    scales.scale[scales.count++] = static_cast<int>(scale);
    scales.filters += static_cast<int>(scale);
    scales.cells += static_cast<int>(scale * scale);
  }
  return scales;
}

// One plan per launch; maps share a launch while the tables stay small.
template <typename T>
std::vector<Plan> plans(const std::vector<PooledMap>& maps, const std::vector<int64_t>& given, Pass pass) {
  const Scales scales = make_scales(given);
  const size_t together = std::clamp<size_t>((4 << 10) / Tables::bytes(scales, 1), 1, max_problems);
  std::vector<Plan> result;
  for (size_t first = 0; first < maps.size(); first += together) {
    Plan plan{};
    plan.problems.scales = scales;
    int64_t units = 0;
    for (size_t n = first; n < std::min(maps.size(), first + together); ++n) {
      Problem& problem = plan.problems.problem[plan.problems.count++];
      problem.map = maps[n], problem.tiling = choose_tiling<T>(maps[n], scales, pass);
      problem.first_unit = static_cast<unsigned>(units);
      units += int64_t(maps[n].batch) * problem.tiling.groups * (pass == Pass::input_grad ? 1 : scales.passes());
      if (units >= int64_t(1) << 31)
        throw std::runtime_error("lfcc: the CUDA kernels support up to 2^31 groups of channels; split the batch");
      const Layout need = layout_of<T>(problem.tiling, scales, pass);
      plan.layout.tile_bytes = std::max(plan.layout.tile_bytes, need.tile_bytes);
      plan.layout.stage_bytes = std::max(plan.layout.stage_bytes, need.stage_bytes - need.tile_bytes);
      plan.layout.uv = std::max(plan.layout.uv, need.uv);
      plan.layout.cells = std::max(plan.layout.cells, need.cells);
    }
    Layout& layout = plan.layout;  // from sizes to offsets
    const int uv = round_up(layout.uv, 16), cells = round_up(layout.cells, 16);
    layout.stage_bytes += layout.tile_bytes;
    layout.stages = round_up(Tables::bytes(scales, plan.problems.count), 16);
    layout.uv = layout.stages + (pass == Pass::input_grad ? 2 : stages) * layout.stage_bytes;
    layout.cells = layout.uv + uv;
    layout.bytes = layout.cells + cells;
    if (layout.bytes > shared_bytes_limit)
      throw std::runtime_error(
          "lfcc: scales with " + std::to_string(scales.filters) + " filters need more shared memory than a GPU has; "
          "use use_backend('triton') or use_backend('eager')");
    plan.problems.units = static_cast<unsigned>(units);
    // Blocks with several units load the next one while they process this one. For filter gradients every block stores
    // partial sums, so there are only as many blocks as run at once.
    const int64_t blocks = pass == Pass::filter_grad ? 2 * multiprocessors() : 16 * multiprocessors();
    plan.blocks = static_cast<unsigned>(units <= blocks ? units : ceil_div(units, ceil_div(units, blocks)));
    result.push_back(plan);
  }
  return result;
}

}  // namespace lfcc::cuda
