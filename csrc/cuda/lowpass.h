// Kernels of the low-pass pyramid Y_s = R_s F K_s^T for all scales s of a list of maps, by raw pointers and a stream.
//
// A filter is a row of the R_s, or of the K_s, stacked in the order of scales, `filters` = sum of scales in all; a cell
// is an entry (i, j) of a scale's grid, `cells` = sum of s * s in all. Null filters are the average over the windows
// [floor(i n / s), ceil((i + 1) n / s)) of a side of length n, outside of which nothing is read, not even NaN.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cuda/platform.h"

namespace lfcc::cuda {

// A map (B, C, H, W), or tokens seen as one, with strides in elements, of which that of channels or of columns is 1.
// Filters are of the type sums are taken in, contiguous (filters, H) and (filters, W): both of all maps, or none.
struct PooledMap {
  const void* x;  // written by lowpass_input_grad
  const void* y;  // the pyramid (B, cells, C), contiguous; written by lowpass
  const void *row_filters, *col_filters;
  int batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

constexpr int max_scales = 32;

// Y of every map, each read once if there are at most 8 filters, else once for every 8 of them.
void lowpass(const std::vector<PooledMap>& maps, Type type, const std::vector<int64_t>& scales, cudaStream_t stream);

// dX of every map, from dY in y's place. Every element is written once.
void lowpass_input_grad(
    const std::vector<PooledMap>& maps, Type type, const std::vector<int64_t>& scales, cudaStream_t stream);

// dR and dK of one map, from x and from dY in y's place, in the shapes and type of its filters. `memory` gives place
// for so many numbers of that type, until the stream has come past.
void lowpass_filter_grad(
    const PooledMap& map, Type type, const std::vector<int64_t>& scales, const std::function<void*(int64_t)>& memory,
    void* grad_rows, void* grad_cols, cudaStream_t stream);

}  // namespace lfcc::cuda
