// The ops lfcc::lowpass... of the overload `cuda`, on libtorch's stable ABI; their schemas are in
// lfcc_kernels/ops/lowpass.py. The emulation registers the same functions for tensors on the CPU.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "arguments.h"
#include "cuda/context.h"
#include "cuda/lowpass.h"

namespace {

using lfcc::MapShape, lfcc::Optional, lfcc::Sizes, lfcc::Tensor;
using lfcc::cuda::OnDevice, lfcc::cuda::PooledMap, lfcc::cuda::type_of;
using Tensors = std::vector<Tensor>;

// A map as the launchers take it, with the filters that it points at.
struct Pooled {
  PooledMap map;
  Optional row_filters, col_filters;

  Pooled(const Tensor& x, const MapShape& shape, const Tensor& y, const Sizes& scales, const Optional& rows,
         const Optional& cols) {
    shape.check_filters(scales, rows, cols, x.scalar_type());
    for (int64_t size : {shape.batch, shape.channels, shape.height, shape.width})
      STD_TORCH_CHECK(size < std::numeric_limits<int32_t>::max(), "lfcc: a map with a side of ", size, " is too large");
    for (const Optional& filters : {rows, cols})
      STD_TORCH_CHECK(!filters || filters->get_device() == x.get_device(), "lfcc: filters are on another device");
    STD_TORCH_CHECK(y.get_device() == x.get_device(), "lfcc: the gradient is on another device");
    if (rows) row_filters = torch::stable::contiguous(*rows), col_filters = torch::stable::contiguous(*cols);
    map.x = static_cast<char*>(x.data_ptr()) + shape.offset * x.element_size();
    map.y = y.data_ptr();
    map.row_filters = rows ? row_filters->data_ptr() : nullptr;
    map.col_filters = cols ? col_filters->data_ptr() : nullptr;
    map.batch = static_cast<int>(shape.batch), map.channels = static_cast<int>(shape.channels);
    map.height = static_cast<int>(shape.height), map.width = static_cast<int>(shape.width);
    map.stride_b = shape.stride_b, map.stride_c = shape.stride_c;
    map.stride_h = shape.stride_h, map.stride_w = shape.stride_w;
  }
};

// Lists of a group, `tensors` being maps or gradients; `grids` has two numbers a map, both 0 for one that is no tokens,
// and filters may be empty.
void check_foreach(
    const Tensors& tensors, const Tensors& row_filters, const Tensors& col_filters, const Sizes& grids,
    const Sizes& prefixes) {
  const size_t count = tensors.size();
  STD_TORCH_CHECK(
      count > 0 && grids.size() == 2 * count && prefixes.size() == count &&
          (row_filters.empty() || row_filters.size() == count) && row_filters.size() == col_filters.size(),
      "lfcc: the lists of a group differ in length");
  for (const Tensor& tensor : tensors)
    STD_TORCH_CHECK(
        tensor.scalar_type() == tensors[0].scalar_type() && tensor.get_device() == tensors[0].get_device(),
        "lfcc: maps of a group have one type and lie on one device");
}

Sizes grid_of(const Sizes& grids, size_t n) {
  return grids[2 * n] == 0 ? Sizes() : Sizes{grids[2 * n], grids[2 * n + 1]};
}

Optional filter_of(const Tensors& filters, size_t n) { return filters.empty() ? Optional() : Optional(filters[n]); }

Tensors lowpass_foreach(
    Tensors inputs, Sizes scales, Tensors row_filters, Tensors col_filters, Sizes grids, Sizes prefixes) {
  check_foreach(inputs, row_filters, col_filters, grids, prefixes);
  const OnDevice device(inputs[0]);
  Tensors results, kept;
  std::vector<Pooled> pooled;
  std::vector<PooledMap> maps;
  for (size_t n = 0; n < inputs.size(); ++n) {
    const Tensor x = lfcc::readable(inputs[n]);
    const MapShape shape(x, grid_of(grids, n), prefixes[n]);
    results.push_back(torch::stable::new_empty(x, {shape.batch, lfcc::cells_of(scales), shape.channels}));
    pooled.emplace_back(x, shape, results[n], scales, filter_of(row_filters, n), filter_of(col_filters, n));
    maps.push_back(pooled[n].map);
    kept.push_back(x);
  }
  lfcc::cuda::lowpass(maps, type_of(inputs[0].scalar_type()), scales, device.stream);
  return results;
}

// Sizes of all maps one after the other: four numbers a map, three for tokens.
Tensors lowpass_foreach_input_grad(
    Tensors grads, Sizes sizes, Sizes channels_last, Sizes scales, Tensors row_filters, Tensors col_filters,
    Sizes grids, Sizes prefixes) {
  check_foreach(grads, row_filters, col_filters, grids, prefixes);
  STD_TORCH_CHECK(channels_last.size() == grads.size(), "lfcc: the lists of a group differ in length");
  const OnDevice device(grads[0]);
  Tensors results, kept;
  std::vector<Pooled> pooled;
  std::vector<PooledMap> maps;
  size_t place = 0;
  for (size_t n = 0; n < grads.size(); ++n) {
    const Sizes grid = grid_of(grids, n);
    const size_t dimensions = grid.empty() ? 4 : 3;
    STD_TORCH_CHECK(place + dimensions <= sizes.size(), "lfcc: the lists of a group differ in length");
    const Sizes size(sizes.begin() + place, sizes.begin() + place + dimensions);
    place += dimensions;
    results.push_back(lfcc::empty_map(grads[n], size, channels_last[n] != 0));
    const MapShape shape(results[n], grid, prefixes[n]);
    shape.check_gradient(grads[n], scales);
    kept.push_back(torch::stable::contiguous(grads[n]));
    if (prefixes[n] > 0) {
      Tensor unused = torch::stable::narrow(results[n], 1, 0, prefixes[n]);
      torch::stable::zero_(unused);
    }
    pooled.emplace_back(results[n], shape, kept[n], scales, filter_of(row_filters, n), filter_of(col_filters, n));
    maps.push_back(pooled[n].map);
  }
  lfcc::cuda::lowpass_input_grad(maps, type_of(grads[0].scalar_type()), scales, device.stream);
  return results;
}

Tensors listed(const Optional& filters) { return filters ? Tensors{*filters} : Tensors(); }
Sizes listed(const Sizes& grid) { return grid.empty() ? Sizes{0, 0} : grid; }

Tensor lowpass(
    const Tensor& x, Sizes scales, Optional row_filters, Optional col_filters, Sizes grid, int64_t prefix_tokens) {
  return lowpass_foreach({x}, scales, listed(row_filters), listed(col_filters), listed(grid), {prefix_tokens})[0];
}

Tensor lowpass_input_grad(
    const Tensor& grad, Sizes size, bool channels_last, Sizes scales, Optional row_filters, Optional col_filters,
    Sizes grid, int64_t prefix_tokens) {
  return lowpass_foreach_input_grad(
      {grad}, size, {channels_last}, scales, listed(row_filters), listed(col_filters), listed(grid),
      {prefix_tokens})[0];
}

std::tuple<Tensor, Tensor> lowpass_filter_grad(
    const Tensor& grad, const Tensor& input, Sizes scales, const Tensor& row_filters, const Tensor& col_filters,
    Sizes grid, int64_t prefix_tokens) {
  const OnDevice device(input);
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type(), "lfcc: the gradient is not of the map's type");
  const Tensor x = lfcc::readable(input), dense = torch::stable::contiguous(grad);
  const MapShape shape(x, grid, prefix_tokens);
  shape.check_gradient(grad, scales);
  const Tensor grad_rows = torch::stable::new_empty(row_filters, row_filters.sizes());
  const Tensor grad_cols = torch::stable::new_empty(col_filters, col_filters.sizes());
  const Pooled pooled(x, shape, dense, scales, row_filters, col_filters);
  Tensor parts;
  const auto memory = [&](int64_t numbers) {
    parts = torch::stable::new_empty(row_filters, {numbers});
    return parts.data_ptr();
  };
  lfcc::cuda::lowpass_filter_grad(
      pooled.map, type_of(x.scalar_type()), scales, memory, grad_rows.data_ptr(), grad_cols.data_ptr(), device.stream);
  return {grad_rows, grad_cols};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfcc, LFCC_CUDA_KEY, m) {
  LFCC_IMPLEMENT(m, lowpass);
  LFCC_IMPLEMENT(m, lowpass_input_grad);
  LFCC_IMPLEMENT(m, lowpass_filter_grad);
  // Of these Python alone has schemas.
  m.impl("lowpass_foreach.cuda", TORCH_BOX(&lowpass_foreach));
  m.impl("lowpass_foreach_input_grad.cuda", TORCH_BOX(&lowpass_foreach_input_grad));
}
