// Rows of both sides packed before the products, and their gradients finished after them; csrc/cuda/info_nce.h has the
// formulas.
//
// A team of threads takes a row, from a warp to a block of 256 by its width, in steps of 16 bytes where it is aligned
// and element by element where not. A row is read twice, the second time from the first cache.
//
// Bytes: pack, a row read once from memory, written once; finish, sums and packed row read once, the gradient written.
// FLOPs: 4 an element.
//
// Resources, at most on any architecture:
//   pack_kernel     48 registers   256 bytes of static shared memory
//   finish_kernel   44 registers   128 bytes of static shared memory
#include "cuda/info_nce.h"
#include "cuda/team.h"

namespace lfcc::cuda {

namespace {

constexpr int block_threads = 256;
constexpr double least_norm = 1e-12;  // as in torch.nn.functional.normalize

// Lanes for rows of so many T: two steps each.
template <typename T>
int row_lanes(int64_t width) {
  return lanes_for(width, 32 / sizeof(T), block_threads);
}

// One over the largest power of two up to `value`, between 2^-100 and 2^100 (2^-900 and 2^900 of float64).
__device__ __forceinline__ float inverse_power_of_two(float value) {
  const int exponent = static_cast<int>(__float_as_uint(value) >> 23 & 0xff);
  return __uint_as_float(static_cast<uint32_t>(254 - min(max(exponent, 127 - 100), 127 + 100)) << 23);
}
__device__ __forceinline__ double inverse_power_of_two(double value) {
  const int exponent = static_cast<int>(__double_as_longlong(value) >> 52 & 0x7ff);
  return __longlong_as_double(static_cast<long long>(2046 - min(max(exponent, 1023 - 900), 1023 + 900)) << 52);
}

// NaN where a temperature in device memory, which no host reads, is not positive and finite.
template <typename A>
__device__ __forceinline__ A inverse_temperature(const Pack& pack) {
  A value = static_cast<A>(pack.temperature);
  if (pack.temperature_at)
    value = pack.temperature_is_double ? static_cast<A>(*static_cast<const double*>(pack.temperature_at))
                                       : static_cast<A>(*static_cast<const float*>(pack.temperature_at));
  return value > 0 && value < A(INFINITY) ? 1 / value : A(NAN);
}

// Steps of a row as it came, zeros behind its end.
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
__global__ void __launch_bounds__(block_threads) pack_kernel(Pack pack, int lanes) {
  using A = acc_t<T>;
  constexpr int step = Source<T>::step;
  const Team team(lanes);
  const int64_t rows = pack.batch + pack.keys, row = min(team.row, rows - 1);
  const bool of_teacher = row >= pack.batch;
  const int64_t of_side = of_teacher ? row - pack.batch : row;
  const Source<T> source(
      static_cast<const T*>(of_teacher ? pack.teacher : pack.student) +
          of_side * (of_teacher ? pack.teacher_row : pack.student_row),
      pack.width);

  A scale = 1;
  if (pack.normalize) {
    A largest = 0;
    for (int64_t d = team.lane * step; d < pack.width; d += lanes * step) {
      const Vector<T> vector = source.at(d);
#pragma unroll
      for (int i = 0; i < step; ++i) largest = fmax(largest, fabs(widen(vector.values[i])));
    }
    scale = inverse_power_of_two(team.maximum(largest));
  }

  T* target = static_cast<T*>(pack.packed) + row * pack.padded;
  A squares = 0;
  for (int64_t d = team.lane * step; d < pack.padded; d += lanes * step) {
    Vector<T> vector = source.at(d);
#pragma unroll
    for (int i = 0; i < step; ++i) {
      const A value = widen(vector.values[i]) * scale;
      squares += value * value;
      vector.values[i] = narrow<T>(value);
    }
    if (team.row < rows) *reinterpret_cast<Vector<T>*>(target + d) = vector;
  }
  squares = team.sum(squares);

  if (team.lane == 0 && team.row < rows) {
    A factor = 1, inverse_length = 1, tangent = 0;
    if (pack.normalize) {
      const A norm = sqrt(squares), least = scale * A(least_norm);
      factor = 1 / (norm < least ? least : norm);  // of NaN it is NaN
      inverse_length = factor * scale;
      tangent = norm > least ? factor : 0;
    }
    static_cast<A*>(pack.factors)[row] = factor;
    static_cast<A*>(pack.inverse_lengths)[row] = inverse_length;
    static_cast<A*>(pack.tangents)[row] = tangent;
    if (row == 0) *static_cast<A*>(pack.inverse_temperature) = inverse_temperature<A>(pack);
  }
}

// R is T or A.
template <typename T, typename R>
__global__ void __launch_bounds__(block_threads) finish_kernel(Finish finish, int lanes) {
  using A = acc_t<T>;
  constexpr int step = 16 / sizeof(T);
  const Team team(lanes);
  const int64_t row = min(team.row, finish.rows - 1), width = finish.width;
  const A* sums = static_cast<const A*>(finish.sums) + row * finish.padded;
  const T* packed = static_cast<const T*>(finish.packed) + row * finish.padded;
  const auto sums_at = [&](int64_t d) { return *reinterpret_cast<const Vector<A, step>*>(sums + d); };
  const auto packed_at = [&](int64_t d) { return *reinterpret_cast<const Vector<T>*>(packed + d); };

  A along = 0;
  for (int64_t d = team.lane * step; d < width; d += lanes * step) {
    const Vector<A, step> of_sums = sums_at(d);
    const Vector<T> of_packed = packed_at(d);
#pragma unroll
    for (int i = 0; i < step; ++i)
      if (d + i < width) along += of_sums.values[i] * widen(of_packed.values[i]);
  }
  const A tangent = static_cast<const A*>(finish.tangents)[row];
  along = team.sum(along) * tangent;

  A outer = *static_cast<const A*>(finish.inverse_temperature) / static_cast<A>(finish.gain);
  if (finish.magnitude) outer *= *static_cast<const A*>(finish.magnitude);
  outer *= static_cast<const A*>(finish.inverse_lengths)[row];
  if (team.row >= finish.rows) return;
  R* result = static_cast<R*>(finish.result) + row * width;
  const bool wide = aligned(result);
  for (int64_t d = team.lane * step; d < width; d += lanes * step) {
    const Vector<A, step> of_sums = sums_at(d);
    const Vector<T> of_packed = packed_at(d);
    Vector<R, step> gradients;
#pragma unroll
    for (int i = 0; i < step; ++i)
      gradients.values[i] = narrow<R>(outer * (of_sums.values[i] - along * (tangent * widen(of_packed.values[i]))));
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
    const int lanes = row_lanes<T>(pack.padded);
    launch(
        "pack_rows", pack_kernel<T>, blocks_for(pack.batch + pack.keys, lanes, block_threads), block_threads, 0, stream,
        pack, lanes);
  });
}

void finish_rows(const Finish& finish, cudaStream_t stream) {
  for_type(finish.type, [&](auto value) {
    using T = decltype(value);
    const int lanes = row_lanes<T>(finish.width);
    launch(
        "finish_rows", finish.into_sums_type ? finish_kernel<T, acc_t<T>> : finish_kernel<T, T>,
        blocks_for(finish.rows, lanes, block_threads), block_threads, 0, stream, finish, lanes);
  });
}

}  // namespace lfcc::cuda
