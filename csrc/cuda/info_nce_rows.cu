// Prologue and epilogue per row: rows of both sides are packed before the products, and the gradients of packed rows
// are turned into those of the rows after them. csrc/cuda/info_nce.h has the formulas.
//
// Tiling: one thread group per row, from a warp to a block of 256 by its width, in steps of 16 bytes if the row is
// aligned, otherwise by elements. Each row is read twice, the second time from L1.
//
// Bytes: pack, a row read once from memory and written once; epilogue, acc and packed row read once, the gradient
// written. FLOPs: 4 per element.
//
// Resources, at most on any architecture:
//   pack_kernel       48 registers   256 bytes of static shared memory
//   epilogue_kernel   44 registers   128 bytes of static shared memory
#include "cuda/info_nce.h"
#include "cuda/thread_group.cuh"

namespace lfcc::cuda {

namespace {

constexpr int block_threads = 256;
constexpr double epsilon = 1e-12;  // lower bound of a norm, as in torch.nn.functional.normalize

// Threads for a row of `width` T: two steps each.
template <typename T>
int row_threads(int64_t width) {
  return group_size_for(width, 32 / sizeof(T), block_threads);
}

// One over the largest power of two up to `value`, clamped to 2^-100 and 2^100 (2^-900 and 2^900 for float64).
__device__ __forceinline__ float inverse_power_of_two(float value) {
  const int exponent = static_cast<int>(__float_as_uint(value) >> 23 & 0xff);
  return __uint_as_float(static_cast<uint32_t>(254 - min(max(exponent, 127 - 100), 127 + 100)) << 23);
}
__device__ __forceinline__ double inverse_power_of_two(double value) {
  const int exponent = static_cast<int>(__double_as_longlong(value) >> 52 & 0x7ff);
  return __longlong_as_double(static_cast<long long>(2046 - min(max(exponent, 1023 - 900), 1023 + 900)) << 52);
}

// NaN if a temperature in device memory, which the host does not read, is not positive and finite.
template <typename A>
__device__ __forceinline__ A inverse_temperature(const Pack& pack) {
  A value = static_cast<A>(pack.temperature);
  if (pack.temperature_at)
    value = pack.temperature_is_double ? static_cast<A>(*static_cast<const double*>(pack.temperature_at))
                                       : static_cast<A>(*static_cast<const float*>(pack.temperature_at));
  return value > 0 && value < A(INFINITY) ? 1 / value : A(NAN);
}

// Loads steps of an input row, zeros past its end.
template <typename T>
struct Source {
  static constexpr int step = 16 / sizeof(T);
  const T* row;
  int64_t width;
  bool wide;

  __device__ __forceinline__ Source(const T* row, int64_t width) : row(row), width(width), wide(aligned(row)) {}

  __device__ __forceinline__ Vector<T> at(int64_t d) const {
    if (wide && d + step <= width) return *reinterpret_cast<const Vector<T>*>(row + d);
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < step; ++i) result.values[i] = d + i < width ? row[d + i] : narrow<T>(0);
    return result;
  }
};

template <typename T>
__global__ void __launch_bounds__(block_threads) pack_kernel(Pack pack, int group_size) {
  using A = acc_t<T>;
  constexpr int step = Source<T>::step;
  const ThreadGroup group(group_size);
  const int64_t rows = pack.batch + pack.keys, row = min(group.row, rows - 1);
  const bool of_teacher = row >= pack.batch;
  const int64_t side_row = of_teacher ? row - pack.batch : row;
  const Source<T> source(
      static_cast<const T*>(of_teacher ? pack.teacher : pack.student) +
          side_row * (of_teacher ? pack.teacher_row : pack.student_row),
      pack.width);

  A scale = 1;
  if (pack.normalize) {
    A absmax = 0;
    for (int64_t d = group.rank * step; d < pack.width; d += group_size * step) {
      const Vector<T> vector = source.at(d);
#pragma unroll
      for (int i = 0; i < step; ++i) absmax = fmax(absmax, fabs(widen(vector.values[i])));
    }
    scale = inverse_power_of_two(group.max(absmax));
  }

  T* target = static_cast<T*>(pack.packed) + row * pack.padded;
  A squares = 0;
  for (int64_t d = group.rank * step; d < pack.padded; d += group_size * step) {
    Vector<T> vector = source.at(d);
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const A value = widen(vector.values[i]) * scale;
      squares += value * value;
      vector.values[i] = narrow<T>(value);
    }
    if (group.row < rows) *reinterpret_cast<Vector<T>*>(target + d) = vector;
  }
  squares = group.sum(squares);

  if (group.rank == 0 && group.row < rows) {
    A factor = 1, inverse_norm = 1, projection = 0;
    if (pack.normalize) {
      const A norm = sqrt(squares), least = scale * A(epsilon);
      factor = 1 / (norm < least ? least : norm);  // NaN if the norm is
      inverse_norm = factor * scale;
      projection = norm > least ? factor : 0;
    }
    static_cast<A*>(pack.factors)[row] = factor;
    static_cast<A*>(pack.inverse_norms)[row] = inverse_norm;
    static_cast<A*>(pack.projections)[row] = projection;
    if (row == 0) *static_cast<A*>(pack.inverse_temperature) = inverse_temperature<A>(pack);
  }
}

// R is T or A.
template <typename T, typename R>
__global__ void __launch_bounds__(block_threads) epilogue_kernel(Epilogue epilogue, int group_size) {
  using A = acc_t<T>;
  constexpr int step = 16 / sizeof(T);
  const ThreadGroup group(group_size);
  const int64_t row = min(group.row, epilogue.rows - 1), width = epilogue.width;
  const A* acc = static_cast<const A*>(epilogue.acc) + row * epilogue.padded;
  const T* packed = static_cast<const T*>(epilogue.packed) + row * epilogue.padded;
  const auto load_acc = [&](int64_t d) { return *reinterpret_cast<const Vector<A, step>*>(acc + d); };
  const auto load_packed = [&](int64_t d) { return *reinterpret_cast<const Vector<T>*>(packed + d); };

  A dot = 0;
  for (int64_t d = group.rank * step; d < width; d += group_size * step) {
    const Vector<A, step> acc_vector = load_acc(d);
    const Vector<T> packed_vector = load_packed(d);
#pragma unroll
    for (int i = 0; i < step; ++i)
      if (d + i < width) dot += acc_vector.values[i] * widen(packed_vector.values[i]);
  }
  const A projection = static_cast<const A*>(epilogue.projections)[row];
  dot = group.sum(dot) * projection;

  A scale = *static_cast<const A*>(epilogue.inverse_temperature) / static_cast<A>(epilogue.loss_scale);
  if (epilogue.grad_absmax) scale *= *static_cast<const A*>(epilogue.grad_absmax);
  scale *= static_cast<const A*>(epilogue.inverse_norms)[row];
  if (group.row >= epilogue.rows) return;
  R* result = static_cast<R*>(epilogue.result) + row * width;
  const bool wide = aligned(result);
  for (int64_t d = group.rank * step; d < width; d += group_size * step) {
    const Vector<A, step> acc_vector = load_acc(d);
    const Vector<T> packed_vector = load_packed(d);
    Vector<R, step> gradients;
#pragma unroll
    for (int i = 0; i < step; ++i)
      gradients.values[i] =
          narrow<R>(scale * (acc_vector.values[i] - dot * (projection * widen(packed_vector.values[i]))));
    if (wide && d + step <= width) {
      *reinterpret_cast<Vector<R, step>*>(result + d) = gradients;
      continue;
    }
#pragma unroll
    for (int i = 0; i < step; ++i)
      if (d + i < width) result[d + i] = gradients.values[i];
  }
}

}  // namespace

void pack_rows(const Pack& pack, cudaStream_t stream) {
  for_type(pack.type, [&](auto value) {
    using T = decltype(value);
    const int group_size = row_threads<T>(pack.padded);
    launch(
        "pack_rows", pack_kernel<T>, blocks_for(pack.batch + pack.keys, group_size, block_threads), block_threads, 0,
        stream, pack, group_size);
  });
}

void epilogue_rows(const Epilogue& epilogue, cudaStream_t stream) {
  for_type(epilogue.type, [&](auto value) {
    using T = decltype(value);
    const int group_size = row_threads<T>(epilogue.width);
    launch(
        "epilogue_rows", epilogue.result_is_acc ? epilogue_kernel<T, acc_t<T>> : epilogue_kernel<T, T>,
        blocks_for(epilogue.rows, group_size, block_threads), block_threads, 0, stream, epilogue, group_size);
  });
}

}  // namespace lfcc::cuda
