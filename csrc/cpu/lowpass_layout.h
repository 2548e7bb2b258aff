// What the two layouts of lowpass share: units of work, and the output cells of a unit as the kernels hold them,
// cells[c * WIDTH + k] for output cell c and the unit's channel k.
#pragma once

#include <algorithm>

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

// Calls body(cell, gain) for every output cell, with the product of the gains of its row and column.
template <typename A, typename Body>
LFCC_INLINE void for_cells(const Filters<A>& filters, const Body& body) {
  for (size_t s = 0; s < filters.scales.size(); ++s)
    for (int64_t i = 0; i < filters.scales[s]; ++i)
      for (int64_t j = 0; j < filters.scales[s]; ++j)
        body(filters.cell_offset[s] + i * filters.scales[s] + j,
             filters.rows.gain[filters.row_offset[s] + i] * filters.cols.gain[filters.row_offset[s] + j]);
}

// Gradients of a unit's cells from (B, cells, channels), with their gains; channels it lacks stay zero.
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

// A unit's cells with their gains into (B, cells, channels).
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

}  // namespace lfcc

// The functions of a layout's namespace that the driver calls: one clone of each body an instruction set.
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
