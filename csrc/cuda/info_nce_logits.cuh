// Logits of a chunk of products: a thread reads four columns of a row at a time, contiguous if batch, keys and offset
// are multiples of four.
#pragma once

#include <initializer_list>
#include <limits>

#include "cuda/info_nce.h"
#include "cuda/thread_group.cuh"

namespace lfcc::cuda {

constexpr int chunk_threads = 512;  // per block

// Vectors of four that a thread processes per step, and the number of their elements.
template <typename A>
constexpr int vectors = sizeof(A) == 4 ? 4 : 2;
template <typename A>
constexpr int per_step = 4 * vectors<A>;

// An excluded logit, and a finite stand-in whose product with its p = 0 is 0.
template <typename A>
constexpr A minus_infinity = -std::numeric_limits<A>::infinity();
template <typename A>
constexpr A lowest = std::numeric_limits<A>::lowest();

// Rounded: a plain product could become part of a fused multiply-add.
__device__ __forceinline__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double product(double x, double y) { return __dmul_rn(x, y); }

// The same bits with the two sides exchanged.
template <typename A>
__device__ __forceinline__ A logit(A dot, A row_factor, A col_factor, A inverse_temperature) {
  return product(dot, product(product(row_factor, col_factor), inverse_temperature));
}

// Four columns of a thread: contiguous, or a group's size apart if rows are not aligned.
template <bool wide>
struct Columns {
  int first, stride;

  __device__ __forceinline__ Columns(const ThreadGroup& group, int vector)
      : first(vector * 4 * group.size + (wide ? 4 * group.rank : group.rank)), stride(wide ? 1 : group.size) {}

  __device__ __forceinline__ int at(int i) const { return first + i * stride; }

  __device__ __forceinline__ bool contain(int column) const {
    const int distance = column - first;  // the size of a group is a power of two
    return distance >= 0 && distance < 4 * stride && (distance & (stride - 1)) == 0;
  }

  // Loads from `count` values, the first of which belongs to column `shift`.
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
  __device__ __forceinline__ void store(V* values, const Vector<V, 4>& vector, int count) const {
    if constexpr (wide) {
      if (first < count) *reinterpret_cast<Vector<V, 4>*>(values + first) = vector;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at(i) < count) values[at(i)] = vector.values[i];
    }
  }
};

// Logits of one row of a chunk.
template <typename A>
struct Row {
  const A *products, *factors;  // of the columns, as the ids
  const int64_t* ids;
  int64_t row_id = 0;
  int count, positive;  // number of columns; column of the positive, outside of them if a key has none
  A row_factor, inverse_temperature;

  __device__ __forceinline__ Row(const Chunk& chunk, int64_t row, bool of_teacher)
      : count(static_cast<int>(of_teacher ? chunk.batch : chunk.keys)) {
    const int64_t place = chunk.first_row + row;
    const A* all_factors = static_cast<const A*>(chunk.factors);
    products = static_cast<const A*>(chunk.products) + row * count;
    factors = of_teacher ? all_factors : all_factors + chunk.batch;
    row_factor = all_factors[of_teacher ? chunk.batch + place : place];
    inverse_temperature = *static_cast<const A*>(chunk.inverse_temperature);
    positive = static_cast<int>(of_teacher ? place - chunk.positive_offset : place + chunk.positive_offset);
    ids = of_teacher ? chunk.student_ids : chunk.teacher_ids;
    if (ids) row_id = (of_teacher ? chunk.teacher_ids : chunk.student_ids)[place];
  }

  __device__ __forceinline__ A positive_logit() const {
    return logit(products[positive], row_factor, factors[positive], inverse_temperature);
  }

  template <bool wide>
  __device__ __forceinline__ Vector<A, 4> load_factors(const Columns<wide>& columns) const {
    return columns.load(factors, count, A(0));
  }

  // Includes the columns that `excluded` masks.
  template <bool wide>
  __device__ __forceinline__ Vector<A, 4> load_logits(
      const Columns<wide>& columns, const Vector<A, 4>& col_factors) const {
    Vector<A, 4> logits = columns.load(products, count, A(0));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      logits.values[i] = logit(logits.values[i], row_factor, col_factors.values[i], inverse_temperature);
    return logits;
  }

  // Bit i is set if the i-th of these columns is not part of the softmax.
  template <bool wide>
  __device__ __forceinline__ uint32_t excluded(const Columns<wide>& columns) const {
    uint32_t mask = 0;
    if (ids) {
      const Vector<int64_t, 4> col_ids = columns.load(ids, count, row_id);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (col_ids.values[i] == row_id && columns.at(i) != positive) mask |= 1u << i;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (columns.at(i) >= count) mask |= 1u << i;
    return mask;
  }
};

// Whether all arrays that are accessed in vectors of four are aligned and have a multiple of four elements.
inline bool in_fours(const Chunk& chunk, std::initializer_list<const void*> others) {
  bool result = chunk.batch % 4 == 0 && chunk.keys % 4 == 0 && chunk.positive_offset % 4 == 0;
  for (const void* pointer : {chunk.products, chunk.factors, static_cast<const void*>(chunk.student_ids),
                              static_cast<const void*>(chunk.teacher_ids)})
    result &= aligned(pointer);
  for (const void* pointer : others) result &= aligned(pointer);
  return result;
}

}  // namespace lfcc::cuda
