// Combines the results of several blocks: the splits of fused tiles, and reductions to one value.
//
// merge_kernel, one thread group per row, sized by its width: m, l and acc of all splits are rescaled to one maximum;
// the positive, which no split's acc contains, is added with minus the weight of all others. reduce_kernel, one block,
// an equal part per thread, then a tree: the order of the sum is fixed.
//
// Bytes: merge, the splits read once, their sum written; reduce, all values read once. FLOPs: 2 per value.
//
// Resources, at most on any architecture:
//   merge_kernel    51 registers   0 bytes of static shared memory
//   reduce_kernel   30 registers   256 bytes of static shared memory
#include <type_traits>

#include "cuda/info_nce.h"
#include "cuda/thread_group.cuh"

namespace lfcc::cuda {

namespace {

constexpr int merge_threads = 256, reduce_threads = 512;

// Arguments of fused_merge.
struct Splits {
  const float *m, *l, *dtau, *positive_logits, *acc_parts, *row_losses;
  float *losses, *lse, *temperature_grad, *acc;
};

template <typename T>
__global__ void __launch_bounds__(merge_threads) merge_kernel(Fused fused, Splits splits, int group_size) {
  constexpr int step = 4;
  const ThreadGroup group(group_size);
  const int64_t row = group.row, rows = fused.q_count;
  if (row >= rows) return;
  float positive_logit = 0;
  for (int n = 0; n < fused.splits; ++n) positive_logit += splits.positive_logits[n * rows + row];
  float m_i = positive_logit;
  for (int n = 0; n < fused.splits; ++n) m_i = fmaxf(m_i, splits.m[n * rows + row]);
  float l_i = 0, dtau = 0;
  for (int n = 0; n < fused.splits; ++n) {
    const float alpha = expf(splits.m[n * rows + row] - m_i);
    l_i += alpha * splits.l[n * rows + row];
    dtau += alpha * splits.dtau[n * rows + row];
  }
  const float denominator = l_i + expf(positive_logit - m_i);
  if (group.rank == 0) {
    const float loss = (m_i - positive_logit) + logf(denominator);
    splits.losses[row] = splits.row_losses ? (splits.row_losses[row] + loss) / 2 : loss;
    splits.lse[row] = m_i + logf(denominator);
    if (splits.acc)
      splits.temperature_grad[row] = -(dtau - l_i * positive_logit) / denominator * *fused.inverse_temperature;
  }
  if (!splits.acc) return;

  const int64_t positive = row + fused.shift, width = fused.width;
  const float weight = -l_i / denominator * fused.k_factors[positive] * fused.loss_scale;
  const T* packed = static_cast<const T*>(fused.k) + positive * width;
  for (int64_t d = group.rank * step; d < width; d += group_size * step) {
    Vector<float, step> acc;
#pragma unroll
    for (int i = 0; i < step; ++i) acc.values[i] = weight * widen(packed[d + i]);
    for (int n = 0; n < fused.splits; ++n) {
      const float alpha = expf(splits.m[n * rows + row] - m_i) / denominator;
      const auto part = *reinterpret_cast<const Vector<float, step>*>(splits.acc_parts + (n * rows + row) * width + d);
#pragma unroll
      for (int i = 0; i < step; ++i) acc.values[i] += alpha * part.values[i];
    }
    *reinterpret_cast<Vector<float, step>*>(splits.acc + row * width + d) = acc;
  }
}

template <typename A, typename R>
__global__ void __launch_bounds__(reduce_threads) reduce_kernel(
    Reduction reduction, const A* values, int64_t count, R* result) {
  const ThreadGroup group(reduce_threads);
  A sum = 0, absmax = A(0x1p-100);
#pragma unroll 4
  for (int64_t i = group.rank; i < count; i += reduce_threads) {
    sum += values[i];
    absmax = fmax(absmax, fabs(values[i]));
  }
  sum = group.sum(sum);
  if (reduction == Reduction::mean) sum /= static_cast<A>(count);
  if (reduction == Reduction::absmax) sum = group.max(absmax);
  if (group.rank == 0) *result = static_cast<R>(sum);
}

}  // namespace

void fused_merge(
    const Fused& fused, const float* m, const float* l, const float* dtau, const float* positive_logits,
    const float* acc_parts, const float* row_losses, float* losses, float* lse, float* temperature_grad, float* acc,
    cudaStream_t stream) {
  const Splits splits{m, l, dtau, positive_logits, acc_parts, row_losses, losses, lse, temperature_grad, acc};
  const int group_size = group_size_for(acc ? fused.width : 1, 4, merge_threads);
  for_type(fused.type, [&](auto value) {
    using T = decltype(value);
    if constexpr (!std::is_same_v<T, double>)  // which has no tiles
      launch(
          "fused_merge", merge_kernel<T>, blocks_for(fused.q_count, group_size, merge_threads), merge_threads, 0,
          stream, fused, splits, group_size);
  });
}

void reduce(
    Reduction reduction, Type type, const void* values, int64_t count, Type result_type, void* result,
    cudaStream_t stream) {
  const auto start = [&](auto value, auto to) {
    using A = decltype(value);
    using R = decltype(to);
    launch(
        "reduce", reduce_kernel<A, R>, dim3(1), reduce_threads, 0, stream, reduction, static_cast<const A*>(values),
        count, static_cast<R*>(result));
  };
  const bool to_double = result_type == Type::float64;
  if (type == Type::float64)
    to_double ? start(double(), double()) : start(double(), float());
  else
    to_double ? start(float(), double()) : start(float(), float());
}

}  // namespace lfcc::cuda
