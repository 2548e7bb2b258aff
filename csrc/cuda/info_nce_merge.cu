// Puts together what several blocks found: the shares of fused tiles, and sums over rows.
//
// merge_kernel, a team of threads a row, as many as its width is worth: maxima, sums and weighted keys of all shares
// brought to one maximum; the positive, which no share's sums hold, is added with minus the weight of all others.
// total_kernel, one block, each thread an equal part, then a tree: the order of the sum is always the same.
//
// Bytes: merge, the shares read once, their sum written; total, all numbers read once. FLOPs: 2 a number.
//
// Resources, at most on any architecture:
//   merge_kernel   51 registers   0 bytes of static shared memory
//   total_kernel   30 registers   256 bytes of static shared memory
#include <type_traits>

#include "cuda/info_nce.h"
#include "cuda/team.h"

namespace lfcc::cuda {

namespace {

constexpr int block_threads = 256, total_threads = 512;

// What fused_merge takes beside the tiles' arguments.
struct Shares {
  const float *peaks, *others, *weighted, *positives, *parts, *along_rows;
  float *losses, *lse, *temperature_grad, *sums;
};

template <typename T>
__global__ void __launch_bounds__(block_threads) merge_kernel(Fused fused, Shares shares, int lanes) {
  constexpr int step = 4;
  const Team team(lanes);
  const int64_t row = team.row, rows = fused.own_count;
  if (row >= rows) return;
  float at_positive = 0;
  for (int n = 0; n < fused.splits; ++n) at_positive += shares.positives[n * rows + row];
  float top = at_positive;
  for (int n = 0; n < fused.splits; ++n) top = fmaxf(top, shares.peaks[n * rows + row]);
  float others = 0, weighted = 0;
  for (int n = 0; n < fused.splits; ++n) {
    const float shrink = expf(shares.peaks[n * rows + row] - top);
    others += shrink * shares.others[n * rows + row];
    weighted += shrink * shares.weighted[n * rows + row];
  }
  const float total = others + expf(at_positive - top);
  if (team.lane == 0) {
    const float loss = (top - at_positive) + logf(total);
    shares.losses[row] = shares.along_rows ? (shares.along_rows[row] + loss) / 2 : loss;
    shares.lse[row] = top + logf(total);
    if (shares.sums)
      shares.temperature_grad[row] = -(weighted - others * at_positive) / total * *fused.inverse_temperature;
  }
  if (!shares.sums) return;

  const int64_t positive = row + fused.shift, width = fused.width;
  const float of_positive = -others / total * fused.other_factors[positive] * fused.gain;
  const T* packed = static_cast<const T*>(fused.other) + positive * width;
  for (int64_t d = team.lane * step; d < width; d += lanes * step) {
    Vector<float, step> sums;
#pragma unroll
    for (int i = 0; i < step; ++i) sums.values[i] = of_positive * widen(packed[d + i]);
    for (int n = 0; n < fused.splits; ++n) {
      const float shrink = expf(shares.peaks[n * rows + row] - top) / total;
      const auto part = *reinterpret_cast<const Vector<float, step>*>(shares.parts + (n * rows + row) * width + d);
#pragma unroll
      for (int i = 0; i < step; ++i) sums.values[i] += shrink * part.values[i];
    }
    *reinterpret_cast<Vector<float, step>*>(shares.sums + row * width + d) = sums;
  }
}

template <typename A, typename R>
__global__ void __launch_bounds__(total_threads) total_kernel(Total total, const A* values, int64_t count, R* result) {
  const Team team(total_threads);
  A sum = 0, largest = A(0x1p-100);
#pragma unroll 4
  for (int64_t i = team.lane; i < count; i += total_threads) {
    sum += values[i];
    largest = fmax(largest, fabs(values[i]));
  }
  sum = team.sum(sum);
  if (total == Total::mean) sum /= static_cast<A>(count);
  if (total == Total::largest) sum = team.maximum(largest);
  if (team.lane == 0) *result = static_cast<R>(sum);
}

}  // namespace

void fused_merge(
    const Fused& fused, const float* peaks, const float* others, const float* weighted, const float* positives,
    const float* parts, const float* along_rows, float* losses, float* lse, float* temperature_grad, float* sums,
    cudaStream_t stream) {
  const Shares shares{peaks, others, weighted, positives, parts, along_rows, losses, lse, temperature_grad, sums};
  const int lanes = lanes_for(sums ? fused.width : 1, 4, block_threads);
  for_type(fused.type, [&](auto value) {
    using T = decltype(value);
    if constexpr (!std::is_same_v<T, double>)  // which has no tiles
      launch(
          "fused_merge", merge_kernel<T>, blocks_for(fused.own_count, lanes, block_threads), block_threads, 0, stream,
          fused, shares, lanes);
  });
}

void total_of(
    Total total, Type type, const void* values, int64_t count, Type result_type, void* result, cudaStream_t stream) {
  const auto add = [&](auto value, auto to) {
    using A = decltype(value);
    using R = decltype(to);
    launch(
        "total_of", total_kernel<A, R>, dim3(1), total_threads, 0, stream, total, static_cast<const A*>(values), count,
        static_cast<R*>(result));
  };
  const bool into_double = result_type == Type::float64;
  if (type == Type::float64)
    into_double ? add(double(), double()) : add(double(), float());
  else
    into_double ? add(float(), double()) : add(float(), float());
}

}  // namespace lfcc::cuda
