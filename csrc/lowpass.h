// The low-pass pyramid Y_s = R_s F K_s^T for all scales s of one map, and its gradients.
//
// Kernels are independent of torch. They read a map in either of two layouts, with arbitrary other strides:
//   nchw  stride_w == 1: contiguous NCHW and its slices
//   nhwc  stride_c == 1: channels-last maps and tokens
// Both distribute images and blocks of channels, whose sums are independent, so results do not depend on the number of
// threads. The gradients of the filters are summed over a fixed number of parts, in order.
#pragma once

#include <cstdint>
#include <vector>

namespace lfcc {

// A map (B, C, H, W) with strides in elements.
template <typename T>
struct Map {
  T* data;
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

// The pixels [begin, end) of an axis that the same rows of the filters cover.
struct Segment {
  int64_t begin, end;
  std::vector<int64_t> rows;
};

// The filters of one axis of length `size`: `rows` = sum of scales, each with its support [start, stop) and a gain that
// multiplies the sum. The average has weights of 1 and a gain of 1/|window|, which keeps constant maps exact.
template <typename A>
struct Axis {
  int64_t size, rows;
  std::vector<int64_t> start, stop;  // of each row
  std::vector<A> weights, gain;      // rows x size; of each row
  std::vector<int64_t> first, last;  // scales x size: the rows [first, last) of a scale that may cover a pixel
  std::vector<Segment> segments;
  bool uniform;  // the average: all weights in the supports are 1, and a support is the segments [from, to)
  std::vector<int64_t> from, to;
};

template <typename A>
struct Filters {
  std::vector<int64_t> scales, row_offset, cell_offset;  // of each scale: first row on an axis, first output cell
  int64_t cells;
  Axis<A> rows, cols;
};

// Filters are matrices stacked in the order of scales, (sum of scales) x size, or null for the average.
template <typename A>
Filters<A> make_filters(
    const std::vector<int64_t>& scales, const A* row_filters, const A* col_filters, int64_t height, int64_t width);

// y and grad are contiguous (B, cells, C). T is double, float, BFloat16 or Half; A is double for double, otherwise
// float.
template <typename T, typename A>
void lowpass(const Filters<A>& filters, const Map<const T>& x, T* y);
template <typename T, typename A>
void lowpass_input_grad(const Filters<A>& filters, const T* grad, const Map<T>& grad_x);
template <typename T, typename A>
void lowpass_filter_grad(
    const Filters<A>& filters, const T* grad, const Map<const T>& x, A* grad_rows, A* grad_cols);

}  // namespace lfcc
