// The average where a row of the map is contiguous (NCHW).
//
// The edges of all windows cut the map into rectangles, which the windows are sums of. Forward, a unit of eight planes:
// each plane is read once from memory and its rows are summed segment by segment; these sums are transposed in 8 x 8
// blocks, so that all that follows runs with a channel a lane: rectangles, rows of windows, windows. Backward, the
// gradient has one value on a rectangle, so one row a segment is put together in cache and streamed out for all.
//
// A map of P values reads or writes P once; it takes P additions forward, and next to none backward: bound by memory.
#pragma once

#include "cpu/planes.h"

namespace lfcc::average {

using planes::Rows, planes::plane_rows, planes::load_columns;

// sums[r] = the rows of segment r added up, for N vectors of columns.
template <int N, typename A>
LFCC_INLINE void sum_segments_chunk(const Axis<A>& axis, const Rows<A>& rows, int64_t padded, A* sums) {
  for (size_t r = 0; r < axis.segments.size(); ++r) {
    vec<A> sum[N] = {};
    for (int64_t h = axis.segments[r].begin; h < axis.segments[r].end; ++h)
      for (int k = 0; k < N; ++k) sum[k] += load_vector(rows.data + h * rows.stride + k * LANES);
    for (int k = 0; k < N; ++k) store_vector(sums + r * padded + k * LANES, sum[k]);
  }
}

template <typename A>
LFCC_INLINE void sum_segments(const Axis<A>& axis, const Rows<A>& rows, int64_t padded, A* sums) {
  // Rows of up to eight vectors are one run, so that a plane is read in one stream.
  for_runs(padded / LANES, [&](auto n, int64_t v) LFCC_INLINE_LAMBDA {
    sum_segments_chunk<n>(axis, Rows<A>{rows.data + v * LANES, rows.stride}, padded, sums + v * LANES);
  });
}

// The rectangles of every segment of rows, a channel a lane.
template <typename A>
LFCC_INLINE void sum_rectangles(const Filters<A>& filters, const A* sums, int64_t padded, A* rectangles) {
  const Axis<A>& cols = filters.cols;
  const int64_t down = filters.rows.segments.size();
  for (int64_t r = 0; r < down; ++r) {
    vec<A> sum = {};
    auto segment = cols.segments.begin();
    for (int64_t w = 0; w < padded; w += LANES) {
      vec<A> block[8];
      load_columns(sums, down, padded, r, w, block);
      for (int64_t k = 0; k < LANES && w + k < cols.size; ++k) {
        sum += block[k];
        if (w + k + 1 < segment->end) continue;
        store_vector(rectangles, sum);
        rectangles += LANES, ++segment;
        sum = vec<A>{};
      }
    }
  }
}

// Where every position is a segment of its own, rectangles are the positions of eight planes, a plane a lane.
template <typename A>
LFCC_INLINE void load_positions(const A* const (&planes)[8], int64_t size, A* rectangles) {
  for (int64_t at = 0; at < size; at += LANES) {
    vec<A> block[8];
    for (int64_t p = 0; p < LANES; ++p) block[p] = load_vector(planes[p] + at);
    transpose8x8<A>(block);
    for (int64_t k = 0; k < LANES; ++k) store_vector(rectangles + (at + k) * LANES, block[k]);
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
      for (int64_t c = 0; c < across; ++c) {  // the rectangles of one row of windows, added up
        vec<A> sum = {};
        for (int64_t r = rows.from[row]; r < rows.to[row]; ++r) sum += load_vector(rectangles + (r * across + c) * LANES);
        store_vector(band + c * LANES, sum);
      }
      for (int64_t j = 0; j < filters.scales[s]; ++j) {
        const int64_t col = filters.row_offset[s] + j;
        vec<A> sum = {};
        for (int64_t c = cols.from[col]; c < cols.to[col]; ++c) sum += load_vector(band + c * LANES);
        store_vector(cells + (filters.cell_offset[s] + i * filters.scales[s] + j) * LANES, sum);
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
      for (int64_t j = 0; j < scale; ++j) {  // the cells of each column of windows, added up over the rows of windows
        vec<A> sum = {};
        for (int64_t i = rows.first[at]; i < rows.last[at]; ++i)
          sum += load_vector(cells + (filters.cell_offset[s] + (i - offset) * scale + j) * LANES);
        store_vector(band + (offset + j) * LANES, sum);
      }
    }
    for (const Segment& across : cols.segments) {
      vec<A> sum = {};
      for (int64_t j : across.rows) sum += load_vector(band + j * LANES);
      store_vector(rectangles, sum);
      rectangles += LANES;
    }
  }
}

// planes[p][at] = rectangles[index[at]] of plane p. From the end: a plane's last vector runs into the next plane.
template <typename A>
LFCC_INLINE void store_positions(const A* rectangles, const std::vector<int64_t>& index, int64_t stride, A* planes) {
  const int64_t size = index.size();
  for (int64_t at = (size - 1) / LANES * LANES; at >= 0; at -= LANES) {
    vec<A> block[8] = {};
    for (int64_t k = 0; k < LANES && at + k < size; ++k)
      block[k] = load_vector(rectangles + index[at + k] * LANES);
    transpose8x8<A>(block);
    for (int64_t p = 0; p < LANES; ++p) store_vector(planes + p * stride + at, block[p]);
  }
}

template <typename T, typename A>
LFCC_INLINE void forward_body(const Filters<A>& filters, const Map<const T>& x, T* y, int64_t begin, int64_t end) {
  const Axis<A>&rows = filters.rows, &cols = filters.cols;
  const int64_t padded = (x.width + LANES - 1) / LANES * LANES, size = x.height * x.width;
  const int64_t down = rows.segments.size(), across = cols.segments.size();
  const bool positions = down * across == size && x.stride_h == x.width;
  std::vector<A> scratch(LANES * size + LANES), sums(LANES * down * padded), cells(filters.cells * LANES);
  std::vector<A> rectangles((down * across + LANES) * LANES), band(across * LANES);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<LANES>(x, index);
    const A* planes[LANES];
    for (int64_t p = 0; p < unit.width; ++p) {
      const Rows<A> plane = plane_rows(x, unit.image, unit.channel + p, scratch.data() + p * size);
      planes[p] = plane.data;
      if (!positions) sum_segments(rows, plane, padded, sums.data() + p * down * padded);
    }
    if (positions) {
      for (int64_t p = unit.width; p < LANES; ++p) planes[p] = planes[0];
      load_positions(planes, size, rectangles.data());
    } else {
      sum_rectangles(filters, sums.data(), padded, rectangles.data());
    }
    sum_windows(filters, rectangles.data(), band.data(), cells.data());
    store_cells<LANES>(filters, cells.data(), unit, x.channels, y);
  }
}

// Rows of whole quads leave straight from the cached row that all rows of a segment are.
template <typename T, typename A>
LFCC_INLINE void input_grad_body(
    const Filters<A>& filters, const T* grad, const Map<T>& grad_x, int64_t begin, int64_t end) {
  const Axis<A>&rows = filters.rows, &cols = filters.cols;
  const int64_t down = rows.segments.size(), across = cols.segments.size();
  const bool by_row = grad_x.width * sizeof(T) % 16 == 0;
  std::vector<int64_t> index;  // of the rectangle of each position that is stored
  for (int64_t r = 0; r < down; ++r)
    for (int64_t h = rows.segments[r].begin; h < (by_row ? rows.segments[r].begin + 1 : rows.segments[r].end); ++h)
      for (int64_t c = 0; c < across; ++c)
        index.insert(index.end(), cols.segments[c].end - cols.segments[c].begin, r * across + c);
  const int64_t stored = index.size();
  std::vector<A> planes(LANES * stored + LANES), cells(filters.cells * LANES);
  std::vector<A> rectangles(down * across * LANES), band(cols.rows * LANES);
  for (int64_t at = begin; at < end; ++at) {
    const Unit unit = unit_at<LANES>(grad_x, at);
    load_cells<LANES>(filters, grad, unit, grad_x.channels, cells.data());
    spread_windows(filters, cells.data(), band.data(), rectangles.data());
    store_positions(rectangles.data(), index, stored, planes.data());
    T* to = grad_x.data + unit.image * grad_x.stride_b + unit.channel * grad_x.stride_c;
    if (by_row) {
      for (int64_t p = 0; p < unit.width; ++p)
        for (int64_t r = 0; r < down; ++r)
          stream_repeated(
              to + p * grad_x.stride_c + rows.segments[r].begin * grad_x.width,
              planes.data() + p * stored + r * grad_x.width, grad_x.width, rows.segments[r].end - rows.segments[r].begin);
    } else {
      stream_out(to, planes.data(), unit.width * stored);
    }
  }
  stream_fence();
}

}  // namespace lfcc::average
