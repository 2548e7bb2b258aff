// Narrow rows of the contrast in one kernel, products, softmax and gradient, as flash attention does.
//
// A block holds 128 own rows and walks over its share of the other side in tiles of 48 rows (32 of 256 bytes), the next
// one on its way by cp.async while this one is multiplied:
//
//   one pass    logits, a base near their maximum that only ever rises, sums of exp(logit - base) and of these times
//               the rows, rescaled where the base rises
//   gradient    weights from known log-sum-exps, their sums times the rows
//
// Logits and weights stay in registers from one product to the next. `splits` blocks take tiles in turn. Logit and
// weight of a positive are computed apart, where nothing rounds what should cancel; the one pass leaves it to
// fused_merge to add positives.
//
// Bytes: the other side once a block of own rows, from L2: 128 FLOPs a byte of two-byte types, 256 with sums.
// FLOPs: 2 own other width for statistics, 4 with sums. Beside them a logit takes one exp (two of a symmetric
// gradient) and 4 other instructions, 6.5 with sums.
//
// Resources, at most on any architecture:
//   one_pass_kernel   255 registers   0 bytes of static shared memory
//   gradient_kernel   255 registers   0 bytes of static shared memory
// Dynamic shared memory: at most 56 KiB; 37 KiB for rows of 128 bytes. Two blocks to a multiprocessor, for statistics
// alone three (two on sm_80 for rows of 256 bytes).
#include "cuda/info_nce.h"
#include "cuda/info_nce_walk.h"

namespace lfcc::cuda {

namespace {

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;
constexpr unsigned all_lanes = 0xffffffffu;
// How far logits may rise above the base, in powers of two, before sums are rescaled; weights are that much smaller.
constexpr float slack = 4, slack_scale = 16;

// A logit from its product, rounded the same way in every kernel: a log-sum-exp that is nothing but the positive's
// logit then takes all of it away. `scale` is a row's factor / temperature in powers of two.
__device__ __forceinline__ float logit_of(float product, float other_factor, float scale) {
  return __fmul_rn(__fmul_rn(__fmul_rn(product, other_factor), scale), ln_2);
}

// Over the four lanes that share a row.
__device__ __forceinline__ float sum_of_row(float value) {
  value += __shfl_xor_sync(all_lanes, value, 1);
  return value + __shfl_xor_sync(all_lanes, value, 2);
}
__device__ __forceinline__ float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(all_lanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(all_lanes, value, 2));
}

template <typename Tiles, bool with_sums>
__global__ void __launch_bounds__(tile_threads, with_sums ? 2 : 3) one_pass_kernel(
    const Fused fused, float* peaks, float* others, float* weighted, float* positives, float* result) {
  constexpr int blocks = Tiles::columns / 8;
  Walk<Tiles, with_sums> walk(fused);
  Shared<Tiles>& shared = walk.shared;
  const float inverse = *fused.inverse_temperature, gain = fused.gain / slack_scale;
  float scale[2][2], base[2][2], total[2][2], slope[2][2];
  unsigned unset = 15;  // rows whose base has no logit yet, a bit each
  float sums[2][with_sums ? Tiles::width / 8 : 1][4] = {};
  shared.positives[threadIdx.x] = 0;  // where it is not in the share
  const auto copy_column = [](int, int64_t, int) {};
  walk.begin([](int) {}, copy_column);
  walk.for_rows([&](int m, int r, int row) {
    scale[m][r] = shared.own_factors[row] * inverse * log2_e;
    base[m][r] = total[m][r] = slope[m][r] = 0;
  });

  walk.over_tiles(copy_column, [&] {
    Numbers<Tiles::columns> numbers;  // products, then logits over scale, then weights
    walk.multiply(numbers);
    const float* factors = shared.other_factors[walk.buffer];
    walk.to_logits(numbers, [&](int m, int r, int row, int column, float product) {
      shared.positives[row] = logit_of(product, factors[column], scale[m][r]);
    });

    float top[2][2] = {{lowest, lowest}, {lowest, lowest}};
    for_numbers<blocks>(0, [&](int m, int j, int i) { top[m][i / 2] = fmaxf(top[m][i / 2], numbers[m][j][i]); });
    bool rises = unset;
    walk.for_rows([&](int m, int r, int) { rises |= fmaf(top[m][r], scale[m][r], -base[m][r]) > slack; });
    if (__any_sync(all_lanes, rises))
      walk.for_rows([&](int m, int r, int) {
        const float highest = largest_of_row(top[m][r]);
        const unsigned bit = 1u << (2 * m + r);
        if (unset & bit ? highest == lowest : !(fmaf(highest, scale[m][r], -base[m][r]) > slack)) return;
        const float risen = __fmul_rn(highest, scale[m][r]);
        const float shrink = unset & bit ? 1.0f : fast_exp2(base[m][r] - risen);
        base[m][r] = risen;
        unset &= ~bit;
        total[m][r] *= shrink;
        slope[m][r] *= shrink;
        if constexpr (with_sums) {
#pragma unroll
          for (int j = 0; j < Tiles::width / 8; ++j) {
            sums[m][j][2 * r] *= shrink;
            sums[m][j][2 * r + 1] *= shrink;
          }
        }
      });

    const auto weigh = [&](int pair) {
      for_neighbours<2>(2 * pair, [&](int m, int j, int r) {
        float &x = numbers[m][j][2 * r], &y = numbers[m][j][2 * r + 1];
        const float share_x = fast_exp2(fmaf(x, scale[m][r], -base[m][r]));
        const float share_y = fast_exp2(fmaf(y, scale[m][r], -base[m][r]));
        total[m][r] += share_x + share_y;
        if constexpr (with_sums) {
          const float2 factor = walk.of_columns(factors, j);
          slope[m][r] = fmaf(share_x, x, fmaf(share_y, y, slope[m][r]));
          x = share_x * (factor.x * gain);
          y = share_y * (factor.y * gain);
        }
      });
    };
    if constexpr (with_sums) {
      add_weighted_rows<Tiles>(sums, numbers, shared.other[walk.buffer], walk.lane, weigh);
    } else {
#pragma unroll
      for (int pair = 0; pair < blocks / 2; ++pair) weigh(pair);
    }
  });

  __syncwarp();  // the positive may have been another lane's
  walk.for_rows([&](int m, int r, int row) {
    const float sum = sum_of_row(total[m][r]), weighted_sum = sum_of_row(slope[m][r]);
    if (!walk.is_there(row) || walk.lane % 4) return;
    peaks[walk.place(row)] = unset >> (2 * m + r) & 1 ? -INFINITY : __fmul_rn(base[m][r], ln_2);
    others[walk.place(row)] = sum;
    weighted[walk.place(row)] = weighted_sum * scale[m][r] * ln_2;
    positives[walk.place(row)] = shared.positives[row];
  });
  if constexpr (with_sums) walk.store(result, sums, slack_scale);
}

// What weights are made of: softmaxes along own rows, or across them, or half of both, times upstream gradients.
struct Upstream {
  const float *grad, *row_lse, *col_lse, *magnitude;
  bool symmetric, of_teacher;
  int64_t batch, positive_offset;

  __device__ __forceinline__ bool along() const { return symmetric || !of_teacher; }
  __device__ __forceinline__ bool across() const { return symmetric || of_teacher; }
  __device__ __forceinline__ const float* own_lse() const { return of_teacher ? col_lse : row_lse; }
  __device__ __forceinline__ const float* other_lse() const { return of_teacher ? row_lse : col_lse; }
  // A row's student, of which some keys have none in the batch.
  __device__ __forceinline__ int64_t own_student(int64_t row) const { return of_teacher ? row - positive_offset : row; }
  __device__ __forceinline__ int64_t other_student(int64_t row) const {
    return of_teacher ? row : row - positive_offset;
  }
};

template <typename Tiles>
__global__ void __launch_bounds__(tile_threads, 2) gradient_kernel(
    const Fused fused, const Upstream upstream, float* slopes, float* result) {
  Walk<Tiles, true> walk(fused);
  Shared<Tiles>& shared = walk.shared;
  const float inverse = *fused.inverse_temperature, half = upstream.symmetric ? 0.5f : 1.0f;
  const float gain = fused.gain / (upstream.magnitude ? *upstream.magnitude : 1.0f);
  float scale[2][2], grad[2][2], base[2][2], slope[2][2];
  Numbers<Tiles::width> sums = {};
  const auto copy_row = [&](int row) {
    const int64_t student = upstream.own_student(walk.own_row(row));
    const int64_t count = upstream.along() && walk.is_there(row) ? upstream.batch : 0;
    copy_number(shared.own_grads[row], upstream.grad, student, count, 0);
    copy_number(shared.own_lse[row], upstream.own_lse(), student, count, INFINITY);
  };
  const auto copy_column = [&](int thread, int64_t column, int buffer) {
    if (!upstream.across()) return;
    const int64_t student = upstream.other_student(column);
    const int64_t count = column < fused.other_count ? upstream.batch : 0;
    copy_number(shared.other_grads[buffer][thread], upstream.grad, student, count, 0);
    copy_number(shared.other_lse[buffer][thread], upstream.other_lse(), student, count, INFINITY);
  };
  walk.begin(copy_row, copy_column);
  walk.for_rows([&](int m, int r, int row) {
    scale[m][r] = shared.own_factors[row] * inverse * log2_e;
    grad[m][r] = shared.own_grads[row] * half;
    base[m][r] = shared.own_lse[row] * log2_e;
    slope[m][r] = 0;
  });

  walk.over_tiles(copy_column, [&] {
    Numbers<Tiles::columns> numbers;  // products, then logits over scale, then weights
    walk.multiply(numbers);
    const float *factors = shared.other_factors[walk.buffer], *grads = shared.other_grads[walk.buffer];
    const float* bases = shared.other_lse[walk.buffer];
    walk.to_logits(numbers, [&](int m, int r, int row, int column, float product) {
      float weight = 0;
      if (upstream.along())
        weight = grad[m][r] * (expf(logit_of(product, factors[column], scale[m][r]) - shared.own_lse[row]) - 1);
      if (upstream.across()) {
        const float logit = logit_of(product, shared.own_factors[row], factors[column] * inverse * log2_e);
        weight += grads[column] * half * (expf(logit - bases[column]) - 1);
      }
      slope[m][r] += weight * (product * factors[column]);
      shared.positives[row] = weight;
    });

    add_weighted_rows<Tiles>(sums, numbers, shared.other[walk.buffer], walk.lane, [&](int pair) {
      float weights[2][2][4] = {};
      if (upstream.along())
        for_numbers<2>(0, [&](int m, int j, int i) {
          const float number = numbers[m][2 * pair + j][i];
          weights[m][j][i] = grad[m][i / 2] * fast_exp2(fmaf(number, scale[m][i / 2], -base[m][i / 2]));
        });
      if (upstream.across())
        for_neighbours<2>(0, [&](int m, int j, int r) {
          const float2 other = walk.of_columns(grads, 2 * pair + j), lse = walk.of_columns(bases, 2 * pair + j);
          const float* number = &numbers[m][2 * pair + j][2 * r];
          float* weight = &weights[m][j][2 * r];
          weight[0] = fmaf(other.x * half, fast_exp2(fmaf(number[0], scale[m][r], lse.x * -log2_e)), weight[0]);
          weight[1] = fmaf(other.y * half, fast_exp2(fmaf(number[1], scale[m][r], lse.y * -log2_e)), weight[1]);
        });
      for_numbers<2>(0, [&](int m, int j, int i) {
        slope[m][i / 2] = fmaf(weights[m][j][i], numbers[m][2 * pair + j][i], slope[m][i / 2]);
      });
      if (walk.has_positives()) {
        int positives[2][2];
        walk.find_positives(positives);
        for_numbers<2>(0, [&](int m, int j, int i) {
          const int at = (2 * pair + j) * 8 + i % 2;
          if (at == positives[m][i / 2]) weights[m][j][i] = shared.positives[walk.row(m, i / 2)];
        });
      }
      for_numbers<2>(0, [&](int m, int j, int i) {
        const float2 factor = walk.of_columns(factors, 2 * pair + j);
        numbers[m][2 * pair + j][i] = weights[m][j][i] * ((i % 2 ? factor.y : factor.x) * gain);
      });
    });
  });

  walk.for_rows([&](int m, int r, int row) {
    const float sum = sum_of_row(slope[m][r]);
    if (walk.is_there(row) && walk.lane % 4 == 0) slopes[walk.place(row)] = sum * scale[m][r] * ln_2 * -inverse;
  });
  walk.store(result, sums, 1);
}

// Calls body(RowTiles()) with the tiles of such rows.
template <typename Body>
void for_tiles(const Fused& fused, const Body& body) {
  if (fused.type == Type::float32) return body(RowTiles<float, 64>());
  const bool narrow = fused.width == 64;
  if (fused.type == Type::bfloat16)
    return narrow ? body(RowTiles<__nv_bfloat16, 64>()) : body(RowTiles<__nv_bfloat16, 128>());
  return narrow ? body(RowTiles<__half, 64>()) : body(RowTiles<__half, 128>());
}

dim3 grid_of(const Fused& fused) {
  return dim3(static_cast<unsigned>((fused.own_count + block_rows - 1) / block_rows), fused.splits);
}

}  // namespace

int fused_width(Type type, int64_t width) {
  if (type == Type::float64 || width > (type == Type::float32 ? 64 : 128)) return 0;
  return width <= 64 ? 64 : 128;
}

int fused_rows() { return block_rows; }

void fused_one_pass(
    const Fused& fused, float* peaks, float* others, float* weighted, float* positives, float* sums,
    cudaStream_t stream) {
  for_tiles(fused, [&](auto tiles) {
    using Tiles = decltype(tiles);
    launch(
        "fused_one_pass", sums ? one_pass_kernel<Tiles, true> : one_pass_kernel<Tiles, false>, grid_of(fused),
        tile_threads, sizeof(Shared<Tiles>), stream, fused, peaks, others, weighted, positives, sums);
  });
}

void fused_gradient(
    const Fused& fused, const float* grad, const float* row_lse, const float* col_lse, const float* magnitude,
    bool symmetric, bool of_teacher, int64_t batch, int64_t positive_offset, float* slopes, float* sums,
    cudaStream_t stream) {
  const Upstream upstream = {grad, row_lse, col_lse, magnitude, symmetric, of_teacher, batch, positive_offset};
  for_tiles(fused, [&](auto tiles) {
    using Tiles = decltype(tiles);
    launch(
        "fused_gradient", gradient_kernel<Tiles>, grid_of(fused), tile_threads, sizeof(Shared<Tiles>), stream, fused,
        upstream, slopes, sums);
  });
}

}  // namespace lfcc::cuda
