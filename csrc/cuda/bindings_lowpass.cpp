// The `cuda` overloads of lfcc::lowpass..., on libtorch's stable ABI; their schemas are in lfcc_kernels/ops/lowpass.py.
// The emulation registers the same functions for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "arguments.h"
#include "cuda/context.h"
#include "cuda/lowpass.h"

namespace {

using lfcc::Argument, lfcc::MapShape, lfcc::Optional, lfcc::Sizes, lfcc::Tensor, lfcc::fail, lfcc::to_string;
using lfcc::cuda::OnDevice, lfcc::cuda::PooledMap, lfcc::cuda::type_of;
using Tensors = std::vector<Tensor>;
using Grids = std::vector<Sizes>;  // of each map, empty if it is not tokens

// A map for the launchers, and ownership of the filters that it points to.
struct Pooled {
  PooledMap map;
  Optional row_filters, col_filters;

  Pooled(const Tensor& x, const MapShape& shape, const Tensor& y, const Sizes& scales, const Optional& rows,
         const Optional& cols) {
    shape.check_filters(scales, rows, cols, x.scalar_type());
    for (int64_t size : {shape.batch, shape.channels, shape.height, shape.width})
      if (size >= std::numeric_limits<int32_t>::max())
        fail(shape.argument, " has a dimension of ", size, ", expected less than 2^31 - 1");
    const auto check_device = [&](const char* name, const Tensor& t) {
      if (t.get_device() != x.get_device())
        fail(shape.argument.named(name), " is ", to_string(t), ", the map is ", to_string(x),
             "; both need the same device");
    };
    if (rows) check_device("row_filters", *rows), check_device("col_filters", *cols);
    check_device("grad", y);
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

Optional filter_of(const Tensors& filters, size_t n) { return filters.empty() ? Optional() : Optional(filters[n]); }

// The pyramid of each map; filters are lists as long as that of the maps, or empty.
Tensors forward(
    const Argument& argument, const Tensors& inputs, const Sizes& scales, const Tensors& row_filters,
    const Tensors& col_filters, const Grids& grids, const Sizes& prefixes) {
  const OnDevice device(inputs[0]);
  Tensors results, kept;
  std::vector<Pooled> pooled;
  std::vector<PooledMap> maps;
  for (size_t n = 0; n < inputs.size(); ++n) {
    const Argument nth = argument.at(n);
    const Tensor x = lfcc::readable(nth, inputs[n]);
    const MapShape shape(nth, x, grids[n], prefixes[n]);
    results.push_back(torch::stable::new_empty(x, {shape.batch, lfcc::count_cells(scales), shape.channels}));
    pooled.emplace_back(x, shape, results[n], scales, filter_of(row_filters, n), filter_of(col_filters, n));
    maps.push_back(pooled[n].map);
    kept.push_back(x);
  }
  lfcc::cuda::lowpass(maps, type_of(argument, inputs[0]), scales, device.stream);
  return results;
}

// The gradient of each map, of these sizes.
Tensors input_grad(
    const Argument& argument, const Tensors& grads, const std::vector<Sizes>& sizes, const Sizes& channels_last,
    const Sizes& scales, const Tensors& row_filters, const Tensors& col_filters, const Grids& grids,
    const Sizes& prefixes) {
  const OnDevice device(grads[0]);
  const char* name_of_grads = argument.index < 0 ? "grad" : "grads";
  Tensors results, kept;
  std::vector<Pooled> pooled;
  std::vector<PooledMap> maps;
  for (size_t n = 0; n < grads.size(); ++n) {
    const Argument nth = argument.at(n);
    results.push_back(lfcc::empty_map(nth, grads[n], sizes[n], channels_last[n] != 0));
    const MapShape shape(nth, results[n], grids[n], prefixes[n]);
    shape.check_gradient(nth.named(name_of_grads), grads[n], scales, grads[n].scalar_type());
    kept.push_back(torch::stable::contiguous(grads[n]));
    if (prefixes[n] > 0) {
      Tensor unused = torch::stable::narrow(results[n], 1, 0, prefixes[n]);
      torch::stable::zero_(unused);
    }
    pooled.emplace_back(results[n], shape, kept[n], scales, filter_of(row_filters, n), filter_of(col_filters, n));
    maps.push_back(pooled[n].map);
  }
  lfcc::cuda::lowpass_input_grad(maps, type_of(argument.named(name_of_grads), grads[0]), scales, device.stream);
  return results;
}

Tensors listed(const Optional& filters) { return filters ? Tensors{*filters} : Tensors(); }

Tensor lowpass(
    const Tensor& x, Sizes scales, Optional row_filters, Optional col_filters, Sizes grid, int64_t prefix_tokens) {
  return forward(
      {"lowpass", "x"}, {x}, scales, listed(row_filters), listed(col_filters), {grid}, {prefix_tokens})[0];
}

Tensor lowpass_input_grad(
    const Tensor& grad, Sizes size, bool channels_last, Sizes scales, Optional row_filters, Optional col_filters,
    Sizes grid, int64_t prefix_tokens) {
  return input_grad(
      {"lowpass_input_grad", "size"}, {grad}, {size}, {channels_last}, scales, listed(row_filters),
      listed(col_filters), {grid}, {prefix_tokens})[0];
}

// Checks the lists of a foreach op and returns its grids: the flat list has two numbers per map, both 0 if the map is
// not tokens.
Grids check_foreach(
    const Argument& list, const Tensors& tensors, const Tensors& row_filters, const Tensors& col_filters,
    const Sizes& grids, const Sizes& prefixes) {
  const size_t count = tensors.size();
  if (count == 0) fail(list, " is empty, expected at least one tensor");
  const auto check_length = [&](const char* name, size_t length, size_t expected) {
    if (length != expected)
      fail(list.named(name), " has length ", length, ", expected ", expected, " for ", count, " maps");
  };
  check_length("grids", grids.size(), 2 * count);
  check_length("prefix_tokens", prefixes.size(), count);
  if (!row_filters.empty() || !col_filters.empty()) {
    check_length("row_filters", row_filters.size(), count);
    check_length("col_filters", col_filters.size(), count);
  }
  Grids result;
  for (size_t n = 0; n < count; ++n) {
    if (tensors[n].scalar_type() != tensors[0].scalar_type() || tensors[n].get_device() != tensors[0].get_device())
      fail(Argument{list.op, list.name, int64_t(n)}, " is ", to_string(tensors[n]), ", the first is ",
           to_string(tensors[0]), "; all need the same dtype and device");
    result.push_back(grids[2 * n] == 0 ? Sizes() : Sizes{grids[2 * n], grids[2 * n + 1]});
  }
  return result;
}

Tensors lowpass_foreach(
    Tensors inputs, Sizes scales, Tensors row_filters, Tensors col_filters, Sizes flat_grids, Sizes prefixes) {
  const Argument list{"lowpass_foreach", "maps"};
  const Grids grids = check_foreach(list, inputs, row_filters, col_filters, flat_grids, prefixes);
  return forward({list.op, list.name, 0}, inputs, scales, row_filters, col_filters, grids, prefixes);
}

// `flat_sizes` has four numbers per map and three per tokens.
Tensors lowpass_foreach_input_grad(
    Tensors grads, Sizes flat_sizes, Sizes channels_last, Sizes scales, Tensors row_filters, Tensors col_filters,
    Sizes flat_grids, Sizes prefixes) {
  const Argument list{"lowpass_foreach_input_grad", "grads"};
  const Grids grids = check_foreach(list, grads, row_filters, col_filters, flat_grids, prefixes);
  if (channels_last.size() != grads.size())
    fail(list.named("channels_last"), " has length ", channels_last.size(), ", expected ", grads.size());
  std::vector<Sizes> sizes;
  auto next = flat_sizes.begin();
  for (const Sizes& grid : grids) {
    const int64_t dimensions = grid.empty() ? 4 : 3;
    if (flat_sizes.end() - next < dimensions)
      fail(list.named("sizes"), " has length ", flat_sizes.size(), ", expected 4 numbers per map and 3 per tokens");
    sizes.emplace_back(next, next + dimensions);
    next += dimensions;
  }
  return input_grad(
      {list.op, "sizes", 0}, grads, sizes, channels_last, scales, row_filters, col_filters, grids, prefixes);
}

std::tuple<Tensor, Tensor> lowpass_filter_grad(
    const Tensor& grad, const Tensor& input, Sizes scales, const Tensor& row_filters, const Tensor& col_filters,
    Sizes grid, int64_t prefix_tokens) {
  const OnDevice device(input);
  const Argument argument{"lowpass_filter_grad", "x"};
  const Tensor x = lfcc::readable(argument, input), dense = torch::stable::contiguous(grad);
  const MapShape shape(argument, x, grid, prefix_tokens);
  shape.check_gradient(argument.named("grad"), grad, scales, x.scalar_type());
  const Tensor grad_rows = torch::stable::new_empty(row_filters, row_filters.sizes());
  const Tensor grad_cols = torch::stable::new_empty(col_filters, col_filters.sizes());
  const Pooled pooled(x, shape, dense, scales, row_filters, col_filters);
  Tensor parts;
  const auto allocate = [&](int64_t count) {
    parts = torch::stable::new_empty(row_filters, {count});
    return parts.data_ptr();
  };
  lfcc::cuda::lowpass_filter_grad(
      pooled.map, type_of(argument, x), scales, allocate, grad_rows.data_ptr(), grad_cols.data_ptr(), device.stream);
  return {grad_rows, grad_cols};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfcc, LFCC_CUDA_KEY, m) {
  LFCC_IMPLEMENT(m, lowpass);
  LFCC_IMPLEMENT(m, lowpass_input_grad);
  LFCC_IMPLEMENT(m, lowpass_filter_grad);
  // Their schemas are defined in Python only.
  m.impl("lowpass_foreach.cuda", TORCH_BOX(&lowpass_foreach));
  m.impl("lowpass_foreach_input_grad.cuda", TORCH_BOX(&lowpass_foreach_input_grad));
}
