// lowpass of maps whose channels are contiguous (channels-last maps, tokens). A block of up to 512 channels of an image
// is the unit of work, and every loop runs over its channels.
//
// Forward, per row h of the map: T_j += K[j,w] F[h,w] over its pixels, four at a time if the same windows j cover them,
// then Y[i,j] += R[i,h] T_j. Backward: Z_j = sum_i R[i,h] dY[i,j], then dF[h,w] = sum_j K[j,w] Z_j, written once. Bytes
// and FLOPs are those of lowpass_nchw.h with rows and columns exchanged.
#pragma once

#include "cpu/lowpass_layout.h"

namespace lfcc::nhwc {

constexpr int64_t BLOCK = 512;  // channels: S rows of T stay in L1

template <typename T>
int64_t units(const Map<T>& map) {
  return units_of<BLOCK>(map);
}

// to[c] += sum_q k[q] F[q][c] over a run of pixels, four at a time to load and store `to` less often.
template <typename T, typename A>
LFCC_INLINE void add_pixels(A* __restrict__ to, const T* pixels, int64_t stride, const A* k, int64_t count, int64_t n) {
  int64_t q = 0;
  for (; q + 4 <= count; q += 4) {
    const T *p0 = pixels + q * stride, *p1 = p0 + stride, *p2 = p1 + stride, *p3 = p2 + stride;
    const A k0 = k[q], k1 = k[q + 1], k2 = k[q + 2], k3 = k[q + 3];
    for (int64_t c = 0; c < n; ++c)
      to[c] += (k0 * load(p0[c]) + k1 * load(p1[c])) + (k2 * load(p2[c]) + k3 * load(p3[c]));
  }
  for (; q < count; ++q)
    for (int64_t c = 0; c < n; ++c) to[c] += k[q] * load(pixels[q * stride + c]);
}

template <typename A>
LFCC_INLINE void add_scaled(A* __restrict__ to, A weight, const A* from, int64_t n) {
  for (int64_t c = 0; c < n; ++c) to[c] += weight * from[c];
}

// sums[j] = sum_w K[j,w] F[w] over a row of pixels; the average sums each segment of pixels once.
template <typename T, typename A>
LFCC_INLINE void sum_columns(const Axis<A>& cols, const T* row, int64_t stride_w, int64_t n, A* sums, A* total) {
  std::fill(sums, sums + cols.rows * BLOCK, A(0));
  for (const Segment& segment : cols.segments) {
    const T* pixels = row + segment.begin * stride_w;
    const int64_t count = segment.end - segment.begin;
    if (cols.uniform && !segment.rows.empty()) {
      std::fill(total, total + n, A(0));
      add_pixels(total, pixels, stride_w, cols.weights.data() + segment.rows[0] * cols.size + segment.begin, count, n);
      for (int64_t j : segment.rows) add_scaled(sums + j * BLOCK, A(1), total, n);
    } else {
      for (int64_t j : segment.rows)
        add_pixels(sums + j * BLOCK, pixels, stride_w, cols.weights.data() + j * cols.size + segment.begin, count, n);
    }
  }
}

// spread[j] = sum_i R[i,h] cells[i,j], for every output column j.
template <typename A>
LFCC_INLINE void spread_rows(const Filters<A>& filters, const A* cells, int64_t h, int64_t n, A* spread) {
  const Axis<A>& rows = filters.rows;
  std::fill(spread, spread + rows.rows * BLOCK, A(0));
  for (size_t s = 0; s < filters.scales.size(); ++s)
    for (int64_t i = rows.first[s * rows.size + h]; i < rows.last[s * rows.size + h]; ++i) {
      const A weight = rows.weights[i * rows.size + h];
      const int64_t cell = filters.cell_offset[s] + (i - filters.row_offset[s]) * filters.scales[s];
      for (int64_t j = 0; j < filters.scales[s]; ++j)
        add_scaled(spread + (filters.row_offset[s] + j) * BLOCK, weight, cells + (cell + j) * BLOCK, n);
    }
}

// sums[i * stride] += <a, b_i> for N vectors b_i of up to BLOCK channels.
template <int N, typename A>
LFCC_INLINE void dots(const A* a, const A* b, int64_t n, A* sums, int64_t stride) {
  vec<A> sum[N] = {};
  int64_t c = 0;
  for (; c + VEC <= n; c += VEC)
    for (int i = 0; i < N; ++i) sum[i] += load_vector(a + c) * load_vector(b + i * BLOCK + c);
  for (int i = 0; i < N; ++i) {
    A total = sum_elements<A>(sum[i]);
    for (int64_t rest = c; rest < n; ++rest) total += a[rest] * b[i * BLOCK + rest];
    sums[i * stride] += total;
  }
}

template <typename T, typename A>
LFCC_INLINE void forward_body(const Filters<A>& filters, const Map<const T>& x, T* y, int64_t begin, int64_t end) {
  const Axis<A>& rows = filters.rows;
  std::vector<A> sums(rows.rows * BLOCK), cells(filters.cells * BLOCK), total(BLOCK);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<BLOCK>(x, index);
    const T* pixels = x.data + unit.image * x.stride_b + unit.channel;
    std::fill(cells.begin(), cells.end(), A(0));
    for (int64_t h = 0; h < x.height; ++h) {
      sum_columns(filters.cols, pixels + h * x.stride_h, x.stride_w, unit.width, sums.data(), total.data());
      for (size_t s = 0; s < filters.scales.size(); ++s)
        for (int64_t i = rows.first[s * rows.size + h]; i < rows.last[s * rows.size + h]; ++i) {
          const A weight = rows.weights[i * rows.size + h];
          const int64_t cell = filters.cell_offset[s] + (i - filters.row_offset[s]) * filters.scales[s];
          for (int64_t j = 0; j < filters.scales[s]; ++j)
            add_scaled(
                cells.data() + (cell + j) * BLOCK, weight, sums.data() + (filters.row_offset[s] + j) * BLOCK,
                unit.width);
        }
    }
    store_cells<BLOCK>(filters, cells.data(), unit, x.channels, y);
  }
}

template <typename T, typename A>
LFCC_INLINE void input_grad_body(
    const Filters<A>& filters, const T* grad, const Map<T>& grad_x, int64_t begin, int64_t end) {
  const Axis<A>& cols = filters.cols;
  std::vector<A> cells(filters.cells * BLOCK), spread(cols.rows * BLOCK), pixel(BLOCK);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<BLOCK>(grad_x, index);
    load_cells<BLOCK>(filters, grad, unit, grad_x.channels, cells.data());
    for (int64_t h = 0; h < grad_x.height; ++h) {
      spread_rows(filters, cells.data(), h, unit.width, spread.data());
      T* row = grad_x.data + unit.image * grad_x.stride_b + unit.channel + h * grad_x.stride_h;
      for (const Segment& segment : cols.segments)
        for (int64_t w = segment.begin; w < segment.end; ++w) {
          if (w == segment.begin || !cols.uniform) {
            std::fill(pixel.begin(), pixel.begin() + unit.width, A(0));
            for (int64_t j : segment.rows)
              add_scaled(pixel.data(), cols.weights[j * cols.size + w], spread.data() + j * BLOCK, unit.width);
          }
          stream_out(row + w * grad_x.stride_w, pixel.data(), unit.width);
        }
    }
  }
  stream_fence();
}

template <typename T, typename A>
LFCC_INLINE void filter_grad_body(
    const Filters<A>& filters, const T* grad, const Map<const T>& x, A* grad_rows, A* grad_cols, int64_t begin,
    int64_t end) {
  const Axis<A>&rows = filters.rows, &cols = filters.cols;
  std::vector<A> cells(filters.cells * BLOCK), sums(cols.rows * BLOCK), spread(cols.rows * BLOCK), pixel(BLOCK);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_at<BLOCK>(x, index);
    load_cells<BLOCK>(filters, grad, unit, x.channels, cells.data());
    const T* pixels = x.data + unit.image * x.stride_b + unit.channel;
    for (int64_t h = 0; h < x.height; ++h) {
      sum_columns(cols, pixels + h * x.stride_h, x.stride_w, unit.width, sums.data(), pixel.data());
      spread_rows(filters, cells.data(), h, unit.width, spread.data());
      // dR[i,h] += sum_j <dY[i,j], T_j>
      for (size_t s = 0; s < filters.scales.size(); ++s)
        for (int64_t i = 0; i < filters.scales[s]; ++i)
          for (int64_t j = 0; j < filters.scales[s]; ++j)
            dots<1>(
                cells.data() + (filters.cell_offset[s] + i * filters.scales[s] + j) * BLOCK,
                sums.data() + (filters.row_offset[s] + j) * BLOCK, unit.width,
                grad_rows + (filters.row_offset[s] + i) * rows.size + h, 0);
      // dK[j,w] += <F[h,w], Z_j>
      for (int64_t w = 0; w < x.width; ++w) {
        for (int64_t c = 0; c < unit.width; ++c) pixel[c] = load(pixels[h * x.stride_h + w * x.stride_w + c]);
        for_runs(cols.rows, [&](auto n, int64_t j) LFCC_INLINE_LAMBDA {
          dots<n>(pixel.data(), spread.data() + j * BLOCK, unit.width, grad_cols + j * cols.size + w, cols.size);
        });
      }
    }
  }
}

LFCC_LOWPASS_LAYOUT(double, double)
LFCC_LOWPASS_LAYOUT(float, float)
LFCC_LOWPASS_LAYOUT(BFloat16, float)
LFCC_LOWPASS_LAYOUT(Half, float)

}  // namespace lfcc::nhwc
