// Planes of a map in which a row is contiguous, eight of them a unit of work: rows in the accumulator's type, and
// 8 x 8 blocks with a plane a lane.
#pragma once

#include <vector>

#include "cpu/lowpass_layout.h"

namespace lfcc::planes {

// Rows of a plane in the accumulator's type; vectors may be read up to seven values past the end of each row.
template <typename A>
struct Rows {
  const A* data;
  int64_t stride;
};

template <typename T, typename A>
LFCC_INLINE Rows<A> plane_rows(const Map<const T>& x, int64_t image, int64_t channel, A* scratch) {
  const int64_t offset = image * x.stride_b + channel * x.stride_c;
  const T* plane = x.data + offset;
  if constexpr (std::is_same<T, A>::value) {
    const int64_t rows_end = (x.height - 1) * x.stride_h + x.width;
    const int64_t map_end = (x.batch - 1) * x.stride_b + (x.channels - 1) * x.stride_c + rows_end;
    if (offset + rows_end + LANES <= map_end) return {plane, x.stride_h};
  }
  for (int64_t h = 0; h < x.height; ++h)
    for (int64_t w = 0; w < x.width; ++w) scratch[h * x.width + w] = load(plane[h * x.stride_h + w]);
  return {scratch, x.width};
}

// Columns [w, w + 8) of row `row` of the sums of eight planes, a plane a lane.
template <typename A>
LFCC_INLINE void load_columns(const A* sums, int64_t count, int64_t padded, int64_t row, int64_t w, vec<A> (&block)[8]) {
  for (int64_t p = 0; p < LANES; ++p) block[p] = load_vector(sums + (p * count + row) * padded + w);
  transpose8x8<A>(block);
}

}  // namespace lfcc::planes
