// Shared by the layouts of lowpass: units of work, the output cells of a unit, cells[c * WIDTH + k] for output cell c
// and channel k of the unit, and for NCHW the rows of a plane.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/simd.h"
#include "lowpass.h"

namespace lfcc {

// A block of up to WIDTH channels of one image.
struct Unit {
  int64_t image, channel, width;  // the first channel and how many there are
};

template <int64_t WIDTH, typename T>
int64_t units_of(const Map<T>& map) {
  return map.batch * ((map.channels + WIDTH - 1) / WIDTH);
}

template <int64_t WIDTH, typename T>
LFCC_INLINE Unit unit_at(const Map<T>& map, int64_t index) {
  const int64_t blocks = (map.channels + WIDTH - 1) / WIDTH, channel = index % blocks * WIDTH;
  return {index / blocks, channel, std::min(WIDTH, map.channels - channel)};
}

// Calls body(cell, gain) for every output cell, where gain is the product of the gains of its row and column.
template <typename A, typename Body>
LFCC_INLINE void for_cells(const Filters<A>& filters, const Body& body) {
  for (size_t s = 0; s < filters.scales.size(); ++s)
    for (int64_t i = 0; i < filters.scales[s]; ++i)
      for (int64_t j = 0; j < filters.scales[s]; ++j)
        body(filters.cell_offset[s] + i * filters.scales[s] + j,
             filters.rows.gain[filters.row_offset[s] + i] * filters.cols.gain[filters.row_offset[s] + j]);
}

// Loads the gradients of a unit's cells from (B, cells, channels), times their gains; missing channels are zero.
template <int64_t WIDTH, typename T, typename A>
LFCC_INLINE void load_cells(const Filters<A>& filters, const T* grad, const Unit& unit, int64_t channels, A* cells) {
  std::fill(cells, cells + filters.cells * WIDTH, A(0));
  for_cells(filters, [&](int64_t cell, A gain) LFCC_INLINE_LAMBDA {
    const T* from = grad + (unit.image * filters.cells + cell) * channels + unit.channel;
    if (unit.width == WIDTH)
      for (int64_t k = 0; k < WIDTH; ++k) cells[cell * WIDTH + k] = gain * load(from[k]);
    else
      for (int64_t k = 0; k < unit.width; ++k) cells[cell * WIDTH + k] = gain * load(from[k]);
  });
}

// Stores a unit's cells, times their gains, to (B, cells, channels).
template <int64_t WIDTH, typename T, typename A>
LFCC_INLINE void store_cells(const Filters<A>& filters, const A* cells, const Unit& unit, int64_t channels, T* y) {
  for_cells(filters, [&](int64_t cell, A gain) LFCC_INLINE_LAMBDA {
    T* to = y + (unit.image * filters.cells + cell) * channels + unit.channel;
    if (unit.width == WIDTH)
      for (int64_t k = 0; k < WIDTH; ++k) store(to + k, gain * cells[cell * WIDTH + k]);
    else
      for (int64_t k = 0; k < unit.width; ++k) store(to + k, gain * cells[cell * WIDTH + k]);
  });
}

namespace nchw {

// Rows of a plane in the accumulator's type; vectors may be loaded up to seven values past the end of each row.
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
    if (offset + rows_end + VEC <= map_end) return {plane, x.stride_h};
  }
  for (int64_t h = 0; h < x.height; ++h)
    for (int64_t w = 0; w < x.width; ++w) scratch[h * x.width + w] = load(plane[h * x.stride_h + w]);
  return {scratch, x.width};
}

// Columns [w, w + 8) of row `row` of the sums of eight planes, one plane per vector element.
template <typename A>
LFCC_INLINE void load_columns(
    const A* sums, int64_t count, int64_t padded, int64_t row, int64_t w, vec<A> (&block)[8]) {
  for (int64_t p = 0; p < VEC; ++p) block[p] = load_vector(sums + (p * count + row) * padded + w);
  transpose8x8<A>(block);
}

}  // namespace nchw

}  // namespace lfcc

// The functions of a layout that lowpass.cpp calls: a clone of each body per instruction set.
#define LFCC_LOWPASS_LAYOUT(T, A)                                                                                    \
  LFCC_CLONES void forward(const Filters<A>& f, const Map<const T>& x, T* y, int64_t begin, int64_t end) {           \
    forward_body(f, x, y, begin, end);                                                                               \
  }                                                                                                                  \
  LFCC_CLONES void input_grad(const Filters<A>& f, const T* grad, const Map<T>& x, int64_t begin, int64_t end) {     \
    input_grad_body(f, grad, x, begin, end);                                                                         \
  }                                                                                                                  \
  LFCC_CLONES void filter_grad(                                                                                      \
      const Filters<A>& f, const T* grad, const Map<const T>& x, A* rows, A* cols, int64_t begin, int64_t end) {     \
    filter_grad_body(f, grad, x, rows, cols, begin, end);                                                            \
  }
