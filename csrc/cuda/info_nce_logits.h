// Logits of a chunk of products as its kernels read them: four columns of a row at a time, side by side where batch,
// keys and offset are multiples of four.
#pragma once

#include <initializer_list>
#include <limits>

#include "cuda/info_nce.h"
#include "cuda/team.h"

namespace lfcc::cuda {

constexpr int chunk_threads = 512;  // of a block

// Vectors of four that a thread takes at a time, and how many elements that makes.
template <typename A>
constexpr int vectors = sizeof(A) == 4 ? 4 : 2;
template <typename A>
constexpr int per_step = 4 * vectors<A>;

// A logit that is left out, and a number that its share of 0 leaves 0.
template <typename A>
constexpr A nothing = -std::numeric_limits<A>::infinity();
template <typename A>
constexpr A lowest = std::numeric_limits<A>::lowest();

// Rounded, where a plain product would become part of a fused multiply-add.
__device__ __forceinline__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double product(double x, double y) { return __dmul_rn(x, y); }

// The same bits with the two sides exchanged.
template <typename A>
__device__ __forceinline__ A logit(A of_rows, A factor, A other_factor, A inverse_temperature) {
  return product(of_rows, product(product(factor, other_factor), inverse_temperature));
}

// Four columns of a thread: side by side, or where rows are not aligned every lanes-th.
template <bool wide>
struct Columns {
  int first, step;

  __device__ __forceinline__ Columns(const Team& team, int vector)
      : first(vector * 4 * team.lanes + (wide ? 4 * team.lane : team.lane)), step(wide ? 1 : team.lanes) {}

  __device__ __forceinline__ int at(int i) const { return first + i * step; }

  __device__ __forceinline__ bool have(int column) const {
    const int distance = column - first;  // lanes are a power of two
    return distance >= 0 && distance < 4 * step && (distance & (step - 1)) == 0;
  }

  // Of `count` values, of which the first belongs to column `shift`.
  template <typename V>
  __device__ __forceinline__ Vector<V, 4> load(const V* values, int count, V outside, int shift = 0) const {
    Vector<V, 4> result;
    if constexpr (wide) {
      if (first >= shift && first - shift < count)
        return *reinterpret_cast<const Vector<V, 4>*>(values + (first - shift));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = at(i) - shift;
      result.values[i] = !wide && place >= 0 && place < count ? values[place] : outside;
    }
    return result;
  }

  template <typename V>
  __device__ __forceinline__ void store(V* values, const Vector<V, 4>& those, int count) const {
    if constexpr (wide) {
      if (first < count) *reinterpret_cast<Vector<V, 4>*>(values + first) = those;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at(i) < count) values[at(i)] = those.values[i];
    }
  }
};

// Logits of one row of a chunk.
template <typename A>
struct Row {
  const A *products, *factors;  // of the columns, as the ids
  const int64_t* ids;
  int64_t own_id = 0;
  int count, positive;  // columns; that of the positive, which a key may not have
  A own_factor, inverse_temperature;

  __device__ __forceinline__ Row(const Chunk& chunk, int64_t row, bool of_teacher)
      : count(static_cast<int>(of_teacher ? chunk.batch : chunk.keys)) {
    const int64_t own = chunk.first_row + row;
    const A* all_factors = static_cast<const A*>(chunk.factors);
    products = static_cast<const A*>(chunk.products) + row * count;
    factors = of_teacher ? all_factors : all_factors + chunk.batch;
    own_factor = all_factors[of_teacher ? chunk.batch + own : own];
    inverse_temperature = *static_cast<const A*>(chunk.inverse_temperature);
    positive = static_cast<int>(of_teacher ? own - chunk.positive_offset : own + chunk.positive_offset);
    ids = of_teacher ? chunk.student_ids : chunk.teacher_ids;
    if (ids) own_id = (of_teacher ? chunk.teacher_ids : chunk.student_ids)[own];
  }

  __device__ __forceinline__ A at_positive() const {
    return logit(products[positive], own_factor, factors[positive], inverse_temperature);
  }

  template <bool wide>
  __device__ __forceinline__ Vector<A, 4> factors_at(const Columns<wide>& columns) const {
    return columns.load(factors, count, A(0));
  }

  // As if all took part.
  template <bool wide>
  __device__ __forceinline__ Vector<A, 4> logits_at(
      const Columns<wide>& columns, const Vector<A, 4>& column_factors) const {
    Vector<A, 4> logits = columns.load(products, count, A(0));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      logits.values[i] = logit(logits.values[i], own_factor, column_factors.values[i], inverse_temperature);
    return logits;
  }

  // Bit i: the i-th of these columns does not take part.
  template <bool wide>
  __device__ __forceinline__ uint32_t left_out(const Columns<wide>& columns) const {
    uint32_t mask = 0;
    if (ids) {
      const Vector<int64_t, 4> those = columns.load(ids, count, own_id);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (those.values[i] == own_id && columns.at(i) != positive) mask |= 1u << i;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (columns.at(i) >= count) mask |= 1u << i;
    return mask;
  }
};

// Whether all that is read or written in fours begins and ends with one.
inline bool in_fours(const Chunk& chunk, std::initializer_list<const void*> others) {
  bool result = chunk.batch % 4 == 0 && chunk.keys % 4 == 0 && chunk.positive_offset % 4 == 0;
  for (const void* pointer : {chunk.products, chunk.factors, static_cast<const void*>(chunk.student_ids),
                              static_cast<const void*>(chunk.teacher_ids)})
    result &= aligned(pointer);
  for (const void* pointer : others) result &= aligned(pointer);
  return result;
}

}  // namespace lfcc::cuda
