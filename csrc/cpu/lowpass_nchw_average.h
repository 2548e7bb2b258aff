// The average of maps whose rows are contiguous (NCHW).
//
// The edges of all windows cut the map into rectangles, and every window is a sum of rectangles. Forward, per unit of
// eight planes: each plane is read once from memory and its rows are summed segment by segment. The sums are transposed
// in 8 x 8 blocks, so that all following steps have one channel per vector element: rectangles, rows of windows,
// windows. Backward, the gradient is constant on a rectangle, so one row per segment is built in cache and streamed out
// for all its rows.
//
// A map of P values is read or written once. P additions forward, almost none backward: bound by memory.
#pragma once

#include "cpu/lowpass_layout.h"

namespace lfcc::nchw_average {

using nchw::Rows, nchw::plane_rows, nchw::load_columns;

// sums[r] = the sum of the rows of segment r, for N vectors of columns.
template <int N, typename A>
LFCC_INLINE void sum_segments_chunk(const Axis<A>& axis, const Rows<A>& rows, int64_t padded, A* sums) {
  for (size_t r = 0; r < axis.segments.size(); ++r) {
    vec<A> sum[N] = {};
    for (int64_t h = axis.segments[r].begin; h < axis.segments[r].end; ++h)
      for (int k = 0; k < N; ++k) sum[k] += load_vector(rows.data + h * rows.stride + k * VEC);
    for (int k = 0; k < N; ++k) store_vector(sums + r * padded + k * VEC, sum[k]);
  }
}

template <typename A>
LFCC_INLINE void sum_segments(const Axis<A>& axis, const Rows<A>& rows, int64_t padded, A* sums) {
  // Rows of up to eight vectors are one run, which reads a plane in one stream.
  for_runs(padded / VEC, [&](auto n, int64_t v) LFCC_INLINE_LAMBDA {
    sum_segments_chunk<n>(axis, Rows<A>{rows.data + v * VEC, rows.stride}, padded, sums + v * VEC);
  });
}

// The rectangles of every segment of rows, one channel per vector element.
template <typename A>
LFCC_INLINE void sum_rectangles(const Filters<A>& filters, const A* sums, int64_t padded, A* rectangles) {
  const Axis<A>& cols = filters.cols;
  const int64_t down = filters.rows.segments.size();
  for (int64_t r = 0; r < down; ++r) {
    vec<A> sum = {};
    auto segment = cols.segments.begin();
    for (int64_t w = 0; w < padded; w += VEC) {
      vec<A> block[8];
      load_columns(sums, down, padded, r, w, block);
      for (int64_t k = 0; k < VEC && w + k < cols.size; ++k) {
        sum += block[k];
        if (w + k + 1 < segment->end) continue;
        store_vector(rectangles, sum);
        rectangles += VEC, ++segment;
        sum = vec<A>{};
      }
    }
  }
}

// If every pixel is a segment, the rectangles are the pixels of eight planes, one plane per vector element.
template <typename A>
LFCC_INLINE void load_pixels(const A* const (&planes)[8], int64_t size, A* rectangles) {
  for (int64_t at = 0; at < size; at += VEC) {
    vec<A> block[8];
    for (int64_t p = 0; p < VEC; ++p) block[p] = load_vector(planes[p] + at);
    transpose8x8<A>(block);
    for (int64_t k = 0; k < VEC; ++k) store_vector(rectangles + (at + k) * VEC, block[k]);
  }
}

// cells[i,j] = sum of the rectangles in its window.
template <typename A>
LFCC_INLINE void sum_windows(const Filters<A>& filters, const A* rectangles, A* band, A* cells) {
  const Axis<A>&rows = filters.rows, &cols = filters.cols;
  const int64_t across = cols.segments.size();
  for (size_t s = 0; s < filters.scales.size(); ++s)
    for (int64_t i = 0; i < filters.scales[s]; ++i) {
      const int64_t row = filters.row_offset[s] + i;
      for (int64_t c = 0; c < across; ++c) {  // sums of rectangles over the height of one row of windows
        vec<A> sum = {};
        for (int64_t r = rows.from[row]; r < rows.to[row]; ++r) sum += load_vector(rectangles + (r * across + c) * VEC);
        store_vector(band + c * VEC, sum);
      }
      for (int64_t j = 0; j < filters.scales[s]; ++j) {
        const int64_t col = filters.row_offset[s] + j;
        vec<A> sum = {};
        for (int64_t c = cols.from[col]; c < cols.to[col]; ++c) sum += load_vector(band + c * VEC);
        store_vector(cells + (filters.cell_offset[s] + i * filters.scales[s] + j) * VEC, sum);
      }
    }
}

// The gradient of every rectangle: the sum of the cells whose windows cover it.
template <typename A>
LFCC_INLINE void spread_windows(const Filters<A>& filters, const A* cells, A* band, A* rectangles) {
  const Axis<A>&rows = filters.rows, &cols = filters.cols;
  for (const Segment& down : rows.segments) {
    for (size_t s = 0; s < filters.scales.size(); ++s) {
      const int64_t at = s * rows.size + down.begin, scale = filters.scales[s], offset = filters.row_offset[s];
      for (int64_t j = 0; j < scale; ++j) {  // sums of cells over the rows of windows that cover it
        vec<A> sum = {};
        for (int64_t i = rows.first[at]; i < rows.last[at]; ++i)
          sum += load_vector(cells + (filters.cell_offset[s] + (i - offset) * scale + j) * VEC);
        store_vector(band + (offset + j) * VEC, sum);
      }
    }
    for (const Segment& across : cols.segments) {
      vec<A> sum = {};
      for (int64_t j : across.rows) sum += load_vector(band + j * VEC);
      store_vector(rectangles, sum);
      rectangles += VEC;
    }
  }
}

// planes[p][at] = rectangles[index[at]] of plane p. From the end, since the last vector of a plane overlaps the next
// plane.
template <typename A>
LFCC_INLINE void store_pixels(const A* rectangles, const std::vector<int64_t>& index, int64_t stride, A* planes) {
  const int64_t size = index.size();
  for (int64_t at = (size - 1) / VEC * VEC; at >= 0; at -= VEC) {
    vec<A> block[8] = {};
    for (int64_t k = 0; k < VEC && at + k < size; ++k)
      block[k] = load_vector(rectangles + index[at + k] * VEC);
    transpose8x8<A>(block);
    for (int64_t p = 0; p < VEC; ++p) store_vector(planes + p * stride + at, block[p]);
  }
}

template <typename T, typename A>
LFCC_INLINE void forward_body(const Filters<A>& filters, const Map<const T>& x, T* y, int64_t begin, int64_t end) {
  const Axis<A>&rows = filters.rows, &cols = filters.cols;
  const int64_t padded = (x.width + VEC - 1) / VEC * VEC, size = x.height * x.width;
  const int64_t down = rows.segments.size(), across = cols.segments.size();
  const bool pixels = down * across == size && x.stride_h == x.width;
  std::vector<A> scratch(VEC * size + VEC), sums(VEC * down * padded), cells(filters.cells * VEC);
  std::vector<A> rectangles((down * across + VEC) * VEC), band(across * VEC);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<VEC>(x, index);
    const A* planes[VEC];
    for (int64_t p = 0; p < unit.width; ++p) {
      const Rows<A> plane = plane_rows(x, unit.image, unit.channel + p, scratch.data() + p * size);
      planes[p] = plane.data;
      if (!pixels) sum_segments(rows, plane, padded, sums.data() + p * down * padded);
    }
    if (pixels) {
      for (int64_t p = unit.width; p < VEC; ++p) planes[p] = planes[0];
      load_pixels(planes, size, rectangles.data());
    } else {
      sum_rectangles(filters, sums.data(), padded, rectangles.data());
    }
    sum_windows(filters, rectangles.data(), band.data(), cells.data());
    store_cells<VEC>(filters, cells.data(), unit, x.channels, y);
  }
}

// Rows of whole quads are streamed from one cached row, since all rows of a segment are equal.
template <typename T, typename A>
LFCC_INLINE void input_grad_body(
    const Filters<A>& filters, const T* grad, const Map<T>& grad_x, int64_t begin, int64_t end) {
  const Axis<A>&rows = filters.rows, &cols = filters.cols;
  const int64_t down = rows.segments.size(), across = cols.segments.size();
  const bool by_row = grad_x.width * sizeof(T) % 16 == 0;
  std::vector<int64_t> index;  // the rectangle of each stored pixel
  for (int64_t r = 0; r < down; ++r)
    for (int64_t h = rows.segments[r].begin; h < (by_row ? rows.segments[r].begin + 1 : rows.segments[r].end); ++h)
      for (int64_t c = 0; c < across; ++c)
        index.insert(index.end(), cols.segments[c].end - cols.segments[c].begin, r * across + c);
  const int64_t stored = index.size();
  std::vector<A> planes(VEC * stored + VEC), cells(filters.cells * VEC);
  std::vector<A> rectangles(down * across * VEC), band(cols.rows * VEC);
  for (int64_t at = begin; at < end; ++at) {
    const Unit unit = unit_at<VEC>(grad_x, at);
    load_cells<VEC>(filters, grad, unit, grad_x.channels, cells.data());
    spread_windows(filters, cells.data(), band.data(), rectangles.data());
    store_pixels(rectangles.data(), index, stored, planes.data());
    T* to = grad_x.data + unit.image * grad_x.stride_b + unit.channel * grad_x.stride_c;
    if (by_row) {
      for (int64_t p = 0; p < unit.width; ++p)
        for (int64_t r = 0; r < down; ++r)
          stream_repeated(
              to + p * grad_x.stride_c + rows.segments[r].begin * grad_x.width,
              planes.data() + p * stored + r * grad_x.width, grad_x.width,
              rows.segments[r].end - rows.segments[r].begin);
    } else {
      stream_out(to, planes.data(), unit.width * stored);
    }
  }
  stream_fence();
}

}  // namespace lfcc::nchw_average
