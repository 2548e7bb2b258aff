// The low-pass pyramid Y_s = R_s F K_s^T for all scales s of one map, and its gradients.
//
// Kernels know pointers and sizes, no torch. They read a map in either of two layouts, whatever its other strides:
//   planes  stride_w == 1: contiguous NCHW and its slices
//   lanes   stride_c == 1: channels-last maps, and tokens
// Both split the work over images and blocks of channels whose sums never meet, so the bits do not depend on the
// number of threads; the gradients of the filters are summed over a fixed number of parts, in order.
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

// The positions [begin, end) of a side that the same rows of the filters cover.
struct Segment {
  int64_t begin, end;
  std::vector<int64_t> rows;
};

// The filters of one axis: `rows` = sum of scales, each row with its support [start, stop) on the side of length
// `size`, and a gain that multiplies the sum. The average has weights 1 and gain 1/|window|, which keeps a constant
// map exact.
template <typename A>
struct Axis {
  int64_t size, rows;
  std::vector<int64_t> start, stop;  // of each row
  std::vector<A> weights, gain;      // rows x size; of each row
  std::vector<int64_t> first, last;  // scales x size: the rows [first, last) of a scale that may cover a position
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

// Matrices stacked in the order of scales, (sum of scales) x size, or null for the average.
template <typename A>
Filters<A> make_filters(
    const std::vector<int64_t>& scales, const A* row_filters, const A* col_filters, int64_t height, int64_t width);

// y and grad are contiguous (B, cells, C). T is double, float, BFloat16 or Half; A is double for double, else float.
template <typename T, typename A>
void lowpass(const Filters<A>& filters, const Map<const T>& x, T* y);
template <typename T, typename A>
void lowpass_input_grad(const Filters<A>& filters, const T* grad, const Map<T>& grad_x);
template <typename T, typename A>
void lowpass_filter_grad(
    const Filters<A>& filters, const T* grad, const Map<const T>& x, A* grad_rows, A* grad_cols);

}  // namespace lfcc
