// Filters of both axes, and dispatch by layout to the kernels of lowpass_nchw.h and lowpass_nhwc.h.
#include "lowpass.h"

#include <algorithm>

#include "cpu/lowpass_nchw.h"
#include "cpu/lowpass_nhwc.h"
#include "cpu/parallel.h"

namespace lfcc {
namespace {

template <typename A>
Axis<A> make_axis(const std::vector<int64_t>& scales, const A* matrix, int64_t size) {
  Axis<A> axis;
  axis.size = size;
  axis.rows = 0;
  axis.uniform = !matrix;
  for (int64_t scale : scales) {
    const int64_t offset = axis.rows;
    for (int64_t i = 0; i < scale; ++i, ++axis.rows) {
      int64_t start = i * size / scale, stop = ((i + 1) * size + scale - 1) / scale;
      A gain = A(1) / A(stop - start);
      if (matrix) {
        const A* row = matrix + axis.rows * size;
        start = 0, stop = size, gain = 1;
        while (start < stop && row[start] == 0) ++start;
        while (start < stop && row[stop - 1] == 0) --stop;
        axis.weights.insert(axis.weights.end(), row, row + size);
      } else {
        axis.weights.insert(axis.weights.end(), size, A(0));
        std::fill(axis.weights.end() - size + start, axis.weights.end() - size + stop, A(1));
      }
      axis.start.push_back(start), axis.stop.push_back(stop), axis.gain.push_back(gain);
    }
    for (int64_t pixel = 0; pixel < size; ++pixel) {
      int64_t first = axis.rows, last = offset;
      for (int64_t row = offset; row < axis.rows; ++row)
        if (axis.start[row] <= pixel && pixel < axis.stop[row]) first = std::min(first, row), last = row + 1;
      axis.first.push_back(first), axis.last.push_back(std::max(first, last));
    }
  }
  for (int64_t pixel = 0; pixel < size; ++pixel) {
    std::vector<int64_t> rows;
    for (size_t s = 0; s < scales.size(); ++s)
      for (int64_t row = axis.first[s * size + pixel]; row < axis.last[s * size + pixel]; ++row)
        rows.push_back(row);
    if (pixel == 0 || rows != axis.segments.back().rows) axis.segments.push_back({pixel, pixel, rows});
    axis.segments.back().end = pixel + 1;
  }
  axis.from.assign(axis.rows, 0), axis.to.assign(axis.rows, 0);
  for (size_t segment = axis.segments.size(); segment-- > 0;)
    for (int64_t row : axis.segments[segment].rows) {
      if (axis.to[row] == 0) axis.to[row] = segment + 1;
      axis.from[row] = segment;
    }
  return axis;
}

// Number of partial sums of the filters' gradients: fixed, so that results do not depend on the number of threads.
constexpr int64_t FILTER_GRAD_PARTS = 64;

}  // namespace

template <typename A>
Filters<A> make_filters(
    const std::vector<int64_t>& scales, const A* row_filters, const A* col_filters, int64_t height, int64_t width) {
  Filters<A> filters{scales, {}, {}, 0, make_axis(scales, row_filters, height), make_axis(scales, col_filters, width)};
  int64_t row = 0;
  for (int64_t scale : scales) {
    filters.row_offset.push_back(row), filters.cell_offset.push_back(filters.cells);
    row += scale, filters.cells += scale * scale;
  }
  return filters;
}

template <typename T, typename A>
void lowpass(const Filters<A>& filters, const Map<const T>& x, T* y) {
  const int64_t size = x.height * x.width;
  if (x.stride_w == 1)
    parallel_for(nchw::units(x), VEC * size, [&](int64_t begin, int64_t end) {
      nchw::forward(filters, x, y, begin, end);
    });
  else
    parallel_for(nhwc::units(x), nhwc::BLOCK * size, [&](int64_t begin, int64_t end) {
      nhwc::forward(filters, x, y, begin, end);
    });
}

template <typename T, typename A>
void lowpass_input_grad(const Filters<A>& filters, const T* grad, const Map<T>& grad_x) {
  const int64_t size = grad_x.height * grad_x.width;
  if (grad_x.stride_w == 1)
    parallel_for(nchw::units(grad_x), VEC * size, [&](int64_t begin, int64_t end) {
      nchw::input_grad(filters, grad, grad_x, begin, end);
    });
  else
    parallel_for(nhwc::units(grad_x), nhwc::BLOCK * size, [&](int64_t begin, int64_t end) {
      nhwc::input_grad(filters, grad, grad_x, begin, end);
    });
}

template <typename T, typename A>
void lowpass_filter_grad(
    const Filters<A>& filters, const T* grad, const Map<const T>& x, A* grad_rows, A* grad_cols) {
  const int64_t row_values = filters.rows.rows * x.height, col_values = filters.cols.rows * x.width;
  const bool is_nchw = x.stride_w == 1;
  const int64_t units = is_nchw ? nchw::units(x) : nhwc::units(x);
  const int64_t parts = std::min(FILTER_GRAD_PARTS, units), stride = row_values + col_values;
  std::vector<A> sums(parts * stride, A(0));
  const int64_t work = x.batch * x.channels * x.height * x.width / parts;
  parallel_for(parts, work, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      A* rows = sums.data() + part * stride;
      const int64_t from = part * units / parts, to = (part + 1) * units / parts;
      if (is_nchw)
        nchw::filter_grad(filters, grad, x, rows, rows + row_values, from, to);
      else
        nhwc::filter_grad(filters, grad, x, rows, rows + row_values, from, to);
    }
  });
  std::fill(grad_rows, grad_rows + row_values, A(0));
  std::fill(grad_cols, grad_cols + col_values, A(0));
  for (int64_t part = 0; part < parts; ++part) {
    const A* rows = sums.data() + part * stride;
    for (int64_t i = 0; i < row_values; ++i) grad_rows[i] += rows[i];
    for (int64_t i = 0; i < col_values; ++i) grad_cols[i] += rows[row_values + i];
  }
}

#define LFCC_INSTANTIATE(T, A)                                                                                   \
  template void lowpass<T, A>(const Filters<A>&, const Map<const T>&, T*);                                       \
  template void lowpass_input_grad<T, A>(const Filters<A>&, const T*, const Map<T>&);                            \
  template void lowpass_filter_grad<T, A>(const Filters<A>&, const T*, const Map<const T>&, A*, A*);
LFCC_INSTANTIATE(double, double)
LFCC_INSTANTIATE(float, float)
LFCC_INSTANTIATE(BFloat16, float)
LFCC_INSTANTIATE(Half, float)
template Filters<double> make_filters(const std::vector<int64_t>&, const double*, const double*, int64_t, int64_t);
template Filters<float> make_filters(const std::vector<int64_t>&, const float*, const float*, int64_t, int64_t);

}  // namespace lfcc
