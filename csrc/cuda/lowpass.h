// Launchers of the low-pass pyramid Y_s = R_s F K_s^T for all scales s of a list of maps, by raw pointers and a stream.
//
// A filter is a row of the R_s, or of the K_s, stacked in the order of scales; there are sum of s. A cell is an entry
// (i, j) of the grid of a scale; there are sum of s * s. Null filters are the average over the windows
// [floor(i n / s), ceil((i + 1) n / s)) of an axis of length n; nothing outside a window contributes, not even NaN.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cuda/runtime.h"

namespace lfcc::cuda {

// A map (B, C, H, W), or tokens viewed as one, with strides in elements; the stride of channels or of columns is 1.
// Filters are contiguous (filters, H) and (filters, W) of the accumulator's type. Either all maps have both or none
// has.
struct PooledMap {
  const void* x;  // lowpass_input_grad writes it
  const void* y;  // the pyramid (B, cells, C), contiguous; lowpass writes it
  const void *row_filters, *col_filters;
  int batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

constexpr int max_scales = 32;

// Y of every map, each read once per 8 filters.
void lowpass(const std::vector<PooledMap>& maps, Type type, const std::vector<int64_t>& scales, cudaStream_t stream);

// dX of every map, from dY passed as `y`. Every element is written once.
void lowpass_input_grad(
    const std::vector<PooledMap>& maps, Type type, const std::vector<int64_t>& scales, cudaStream_t stream);

// dR and dK of one map, from x and from dY passed as `y`, in the shapes and type of its filters. `allocate` returns
// memory for that many values of that type, valid until the stream has passed.
void lowpass_filter_grad(
    const PooledMap& map, Type type, const std::vector<int64_t>& scales, const std::function<void*(int64_t)>& allocate,
    void* grad_rows, void* grad_cols, cudaStream_t stream);

}  // namespace lfcc::cuda
