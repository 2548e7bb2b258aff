// lowpass of maps whose rows are contiguous (NCHW), with filters; the average is in lowpass_nchw_average.h. Eight
// channels of an image are the unit of work.
//
// Forward, per unit: each plane is read once from memory and its rows are summed to U_i = sum_h R[i,h] F[h,:] while it
// is in cache. Then U of the eight planes is transposed in 8 x 8 blocks, so that the sums over columns have one channel
// per vector element and end as eight neighbours of the (B, cells, C) output. Backward is the reverse: V_i = sum_j
// K[j,:] dY[i,j] with one channel per vector element, transposed, then dF[h,:] = sum_i R[i,h] V_i into a plane in
// cache, streamed out once.
//
// With S = sum of scales and n = number of scales, a map of P values and windows that tile it:
//   forward      reads P, writes cells / HW of it;  2 n P + 2 S P / H FLOPs
//   input grad   the same reversed
//   filter grads read P;  2 (n + S) P + 2 cells P / H FLOPs
// Forward and input grad are bound by memory.
#pragma once

#include "cpu/lowpass_nchw_average.h"

namespace lfcc::nchw {

template <typename T>
int64_t units(const Map<T>& map) {
  return units_of<VEC>(map);
}

// sums[i][w] = sum_h R[i,h] rows[h][w] for N vectors of columns.
template <int N, typename A>
LFCC_INLINE void sum_rows_chunk(const Axis<A>& axis, const Rows<A>& rows, int64_t padded, A* sums) {
  for (const Segment& segment : axis.segments)
    for (int64_t i : segment.rows) {
      const A* weights = axis.weights.data() + i * axis.size;
      vec<A> sum[N];
      for (int k = 0; k < N; ++k) sum[k] = load_vector(sums + i * padded + k * VEC);
      for (int64_t h = segment.begin; h < segment.end; ++h)
        for (int k = 0; k < N; ++k) sum[k] += weights[h] * load_vector(rows.data + h * rows.stride + k * VEC);
      for (int k = 0; k < N; ++k) store_vector(sums + i * padded + k * VEC, sum[k]);
    }
}

template <typename A>
LFCC_INLINE void sum_rows(const Axis<A>& axis, const Rows<A>& rows, int64_t padded, A* sums) {
  std::fill(sums, sums + axis.rows * padded, A(0));
  for_runs(padded / VEC, [&](auto n, int64_t v) LFCC_INLINE_LAMBDA {
    sum_rows_chunk<n>(axis, Rows<A>{rows.data + v * VEC, rows.stride}, padded, sums + v * VEC);
  });
}

// cells[i,j] = sum_w K[j,w] sums[i][w], one channel per vector element.
template <typename A>
LFCC_INLINE void sum_columns(const Filters<A>& filters, const A* sums, int64_t padded, A* cells) {
  const Axis<A>& cols = filters.cols;
  std::fill(cells, cells + filters.cells * VEC, A(0));
  for (size_t s = 0; s < filters.scales.size(); ++s)
    for (int64_t i = 0; i < filters.scales[s]; ++i) {
      A* row_cells = cells + (filters.cell_offset[s] + i * filters.scales[s]) * VEC;
      for (int64_t w = 0; w < padded; w += VEC) {
        vec<A> block[8];
        load_columns(sums, filters.rows.rows, padded, filters.row_offset[s] + i, w, block);
        for (int64_t k = 0; k < VEC && w + k < cols.size; ++k) {
          const int64_t at = s * cols.size + w + k;
          for (int64_t j = cols.first[at]; j < cols.last[at]; ++j) {
            A* cell = row_cells + (j - filters.row_offset[s]) * VEC;
            store_vector(cell, load_vector(cell) + cols.weights[j * cols.size + w + k] * block[k]);
          }
        }
      }
    }
}

// plane[h][w] = sum_i R[i,h] spread[i][w] for N vectors of columns of a segment of rows.
template <int N, typename A>
LFCC_INLINE void spread_rows_chunk(
    const Axis<A>& axis, const Segment& segment, const A* spread, int64_t padded, A* plane, int64_t width) {
  for (int64_t h = segment.begin; h < segment.end; ++h) {
    vec<A> sum[N] = {};
    for (int64_t i : segment.rows) {
      const A weight = axis.weights[i * axis.size + h];
      for (int k = 0; k < N; ++k) sum[k] += weight * load_vector(spread + i * padded + k * VEC);
    }
    for (int k = 0; k < N; ++k) store_vector(plane + h * width + k * VEC, sum[k]);
  }
}

// From right to left: the last vector of a row overlaps the next row, which is written after it.
template <typename A>
LFCC_INLINE void spread_rows(const Axis<A>& axis, const A* spread, int64_t padded, A* plane, int64_t width) {
  for (const Segment& segment : axis.segments)
    for_runs(padded / VEC, [&](auto n, int64_t v) LFCC_INLINE_LAMBDA {
      spread_rows_chunk<n>(axis, segment, spread + v * VEC, padded, plane + v * VEC, width);
    });
}

// spread[p][i][w] = sum_j K[j,w] cells[i,j] of channel p, for w below `padded`, zero past the width of the map.
template <typename A>
LFCC_INLINE void spread_columns(const Filters<A>& filters, const A* cells, int64_t padded, A* spread) {
  const Axis<A>& cols = filters.cols;
  for (size_t s = 0; s < filters.scales.size(); ++s)
    for (int64_t i = 0; i < filters.scales[s]; ++i) {
      const int64_t row = filters.row_offset[s] + i;
      const A* row_cells = cells + (filters.cell_offset[s] + i * filters.scales[s]) * VEC;
      for (int64_t w = 0; w < padded; w += VEC) {
        vec<A> block[8] = {};
        for (int64_t k = 0; k < VEC && w + k < cols.size; ++k) {
          const int64_t at = s * cols.size + w + k;
          for (int64_t j = cols.first[at]; j < cols.last[at]; ++j)
            block[k] += cols.weights[j * cols.size + w + k] *
                load_vector(row_cells + (j - filters.row_offset[s]) * VEC);
        }
        transpose8x8<A>(block);
        for (int64_t p = 0; p < VEC; ++p) store_vector(spread + (p * cols.rows + row) * padded + w, block[p]);
      }
    }
}

template <typename T, typename A>
LFCC_INLINE void forward_body(const Filters<A>& filters, const Map<const T>& x, T* y, int64_t begin, int64_t end) {
  if (filters.rows.uniform) return nchw_average::forward_body(filters, x, y, begin, end);
  const int64_t rows = filters.rows.rows, padded = (x.width + VEC - 1) / VEC * VEC;
  std::vector<A> scratch(x.height * x.width + VEC), sums(VEC * rows * padded), cells(filters.cells * VEC);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<VEC>(x, index);
    for (int64_t p = 0; p < unit.width; ++p)
      sum_rows(
          filters.rows, plane_rows(x, unit.image, unit.channel + p, scratch.data()), padded,
          sums.data() + p * rows * padded);
    sum_columns(filters, sums.data(), padded, cells.data());
    store_cells<VEC>(filters, cells.data(), unit, x.channels, y);
  }
}

template <typename T, typename A>
LFCC_INLINE void input_grad_body(
    const Filters<A>& filters, const T* grad, const Map<T>& grad_x, int64_t begin, int64_t end) {
  if (filters.rows.uniform) return nchw_average::input_grad_body(filters, grad, grad_x, begin, end);
  const int64_t rows = filters.rows.rows, padded = (grad_x.width + VEC - 1) / VEC * VEC;
  const int64_t size = grad_x.height * grad_x.width;
  // Small planes are streamed out together, a few KiB at a time: reading a plane right after its overlapping stores
  // stalls.
  const int64_t together = std::max<int64_t>(1, std::min(VEC, 2048 / size));
  std::vector<A> planes(together * size + VEC), spread(VEC * rows * padded), cells(filters.cells * VEC);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<VEC>(grad_x, index);
    load_cells<VEC>(filters, grad, unit, grad_x.channels, cells.data());
    spread_columns(filters, cells.data(), padded, spread.data());
    for (int64_t p = 0; p < unit.width; p += together) {
      const int64_t count = std::min(together, unit.width - p);
      for (int64_t k = 0; k < count; ++k)
        spread_rows(
            filters.rows, spread.data() + (p + k) * rows * padded, padded, planes.data() + k * size, grad_x.width);
      T* to = grad_x.data + unit.image * grad_x.stride_b + (unit.channel + p) * grad_x.stride_c;
      stream_out(to, planes.data(), count * size);
    }
  }
  stream_fence();
}

// sums[i] += row * others[i], element by element, for N rows.
template <int N, typename A>
LFCC_INLINE void dot_rows(
    const A* row, const A* others, int64_t stride, int64_t width, A* sums, int64_t sums_stride) {
  vec<A> sum[N];
  for (int i = 0; i < N; ++i) sum[i] = load_vector(sums + i * sums_stride);
  for (int64_t w = 0; w < width; w += VEC) {
    vec<A> values = load_vector(row + w);
    // Values past the row are arbitrary, possibly NaN, so they are masked and not multiplied by zero.
    if (w + VEC > width) values = first_elements<A>(values, width - w);
    for (int i = 0; i < N; ++i) sum[i] += values * load_vector(others + i * stride + w);
  }
  for (int i = 0; i < N; ++i) store_vector(sums + i * sums_stride, sum[i]);
}

template <typename T, typename A>
LFCC_INLINE void filter_grad_body(
    const Filters<A>& filters, const T* grad, const Map<const T>& x, A* grad_rows, A* grad_cols, int64_t begin,
    int64_t end) {
  const int64_t rows = filters.rows.rows, padded = (x.width + VEC - 1) / VEC * VEC;
  std::vector<A> scratch(x.height * x.width + VEC), sums(rows * padded), spread(VEC * rows * padded);
  std::vector<A> cells(filters.cells * VEC), row_parts(rows * x.height * VEC), col_sums(rows * padded);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<VEC>(x, index);
    load_cells<VEC>(filters, grad, unit, x.channels, cells.data());
    spread_columns(filters, cells.data(), padded, spread.data());
    for (int64_t p = 0; p < unit.width; ++p) {
      const Rows<A> plane = plane_rows(x, unit.image, unit.channel + p, scratch.data());
      sum_rows(filters.rows, plane, padded, sums.data());
      // dK[j,w] += sum_i dY[i,j] U_i[w]
      for (size_t s = 0; s < filters.scales.size(); ++s)
        for (int64_t j = 0; j < filters.scales[s]; ++j)
          for (int64_t i = 0; i < filters.scales[s]; ++i) {
            const A weight = cells[(filters.cell_offset[s] + i * filters.scales[s] + j) * VEC + p];
            const A* from = sums.data() + (filters.row_offset[s] + i) * padded;
            A* to = col_sums.data() + (filters.row_offset[s] + j) * padded;
            for (int64_t w = 0; w < padded; w += VEC)
              store_vector(to + w, load_vector(to + w) + weight * load_vector(from + w));
          }
      // dR[i,h] += <F[h,:], V_i>, as VEC partial sums until the end
      for (int64_t h = 0; h < x.height; ++h)
        for_runs(rows, [&](auto n, int64_t i) LFCC_INLINE_LAMBDA {
          dot_rows<n>(
              plane.data + h * plane.stride, spread.data() + (p * rows + i) * padded, padded, x.width,
              row_parts.data() + (i * x.height + h) * VEC, x.height * VEC);
        });
    }
  }
  for (int64_t k = 0; k < rows * x.height; ++k)
    grad_rows[k] += sum_elements<A>(load_vector(row_parts.data() + k * VEC));
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t w = 0; w < x.width; ++w) grad_cols[j * x.width + w] += col_sums[j * padded + w];
}

LFCC_LOWPASS_LAYOUT(double, double)
LFCC_LOWPASS_LAYOUT(float, float)
LFCC_LOWPASS_LAYOUT(BFloat16, float)
LFCC_LOWPASS_LAYOUT(Half, float)

}  // namespace lfcc::nchw
