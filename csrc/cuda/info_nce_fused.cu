// InfoNCE of narrow rows in one kernel, products, softmax and gradient, as FlashAttention does.
//
// A block has 128 rows of q and loops over its split of k in tiles of 48 rows (32 of 256 bytes), the next one copied by
// cp.async while this one is multiplied:
//
//   one pass    logits; m_i, a running maximum that rises only if a logit exceeds it by more than a slack; sums of
//               p = exp(logit - m_i) and of p times the rows of k, rescaled when m_i rises
//   gradient    weights from known log-sum-exps, their sum times the rows of k
//
// Logits and weights stay in registers from one product to the next. `splits` blocks take the tiles in turn. Logit and
// weight of a positive are computed apart, without the rounding that would keep equal terms from cancelling; the one
// pass leaves adding positives to fused_merge.
//
// Bytes: k once per block of q rows, from L2: 128 FLOPs per byte of 16-bit types, 256 with acc. FLOPs: 2 q_count
// k_count width for statistics, 4 with acc. In addition an exp per logit (two for a symmetric gradient) and 4 other
// instructions, 6.5 with acc.
//
// Resources, at most on any architecture:
//   one_pass_kernel   255 registers   0 bytes of static shared memory
//   gradient_kernel   255 registers   0 bytes of static shared memory
// Dynamic shared memory: at most 56 KiB; 37 KiB for rows of 128 bytes. Two blocks per multiprocessor; three for
// statistics alone (two on sm_80 for rows of 256 bytes).
#include "cuda/info_nce.h"
#include "cuda/info_nce_mainloop.cuh"

namespace lfcc::cuda {

namespace {

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;
constexpr unsigned all_lanes = 0xffffffffu;
// How far, in powers of two, logits may exceed m_i before acc is rescaled; weights are scaled down as much.
constexpr float slack = 4, slack_scale = 16;

// A logit from its product, rounded in the same way by every kernel, so that it cancels a log-sum-exp which is the
// logit of the positive alone. `scale` is a row's factor / temperature in powers of two.
__device__ __forceinline__ float logit_of(float product, float k_factor, float scale) {
  return __fmul_rn(__fmul_rn(__fmul_rn(product, k_factor), scale), ln_2);
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(all_lanes, value, 1);
  return value + __shfl_xor_sync(all_lanes, value, 2);
}
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(all_lanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(all_lanes, value, 2));
}

template <typename Tiles, bool with_acc>
__global__ void __launch_bounds__(tile_threads, with_acc ? 2 : 3) one_pass_kernel(
    const Fused fused, float* m_parts, float* l_parts, float* dtau_parts, float* positive_logits, float* acc_parts) {
  constexpr int blocks = Tiles::columns / 8;
  Mainloop<Tiles, with_acc> loop(fused);
  Shared<Tiles>& shared = loop.shared;
  const float inverse = *fused.inverse_temperature, loss_scale = fused.loss_scale / slack_scale;
  float scale[2][2], m_i[2][2], l_i[2][2], dtau[2][2];
  unsigned unset = 15;  // rows whose m_i has seen no logit, a bit each
  float acc[2][with_acc ? Tiles::width / 8 : 1][4] = {};
  shared.positives[threadIdx.x] = 0;  // if it is not in the split
  const auto copy_column = [](int, int64_t, int) {};
  loop.begin([](int) {}, copy_column);
  loop.for_rows([&](int m, int r, int row) {
    scale[m][r] = shared.q_factors[row] * inverse * log2_e;
    m_i[m][r] = l_i[m][r] = dtau[m][r] = 0;
  });

  loop.over_tiles(copy_column, [&] {
    AccFragment<Tiles::columns> qk;  // products, then logits over scale, then p
    loop.multiply(qk);
    const float* factors = shared.k_factors[loop.buffer];
    loop.to_logits(qk, [&](int m, int r, int row, int column, float product) {
      shared.positives[row] = logit_of(product, factors[column], scale[m][r]);
    });

    float tile_max[2][2] = {{lowest, lowest}, {lowest, lowest}};
    for_elements<blocks>(
        0, [&](int m, int j, int i) { tile_max[m][i / 2] = fmaxf(tile_max[m][i / 2], qk[m][j][i]); });
    bool rises = unset;
    loop.for_rows([&](int m, int r, int) { rises |= fmaf(tile_max[m][r], scale[m][r], -m_i[m][r]) > slack; });
    if (__any_sync(all_lanes, rises))
      loop.for_rows([&](int m, int r, int) {
        const float highest = row_max(tile_max[m][r]);
        const unsigned bit = 1u << (2 * m + r);
        if (unset & bit ? highest == lowest : !(fmaf(highest, scale[m][r], -m_i[m][r]) > slack)) return;
        const float m_new = __fmul_rn(highest, scale[m][r]);
        const float alpha = unset & bit ? 1.0f : fast_exp2(m_i[m][r] - m_new);
        m_i[m][r] = m_new;
        unset &= ~bit;
        l_i[m][r] *= alpha;
        dtau[m][r] *= alpha;
        if constexpr (with_acc) {
#pragma unroll
          for (int j = 0; j < Tiles::width / 8; ++j) {
            acc[m][j][2 * r] *= alpha;
            acc[m][j][2 * r + 1] *= alpha;
          }
        }
      });

    const auto compute_p = [&](int pair) {
      for_pairs<2>(2 * pair, [&](int m, int j, int r) {
        float &x = qk[m][j][2 * r], &y = qk[m][j][2 * r + 1];
        const float p_x = fast_exp2(fmaf(x, scale[m][r], -m_i[m][r]));
        const float p_y = fast_exp2(fmaf(y, scale[m][r], -m_i[m][r]));
        l_i[m][r] += p_x + p_y;
        if constexpr (with_acc) {
          const float2 factor = loop.of_columns(factors, j);
          dtau[m][r] = fmaf(p_x, x, fmaf(p_y, y, dtau[m][r]));
          x = p_x * (factor.x * loss_scale);
          y = p_y * (factor.y * loss_scale);
        }
      });
    };
    if constexpr (with_acc) {
      multiply_pk_all<Tiles>(acc, qk, shared.k[loop.buffer], loop.lane, compute_p);
    } else {
#pragma unroll
      for (int pair = 0; pair < blocks / 2; ++pair) compute_p(pair);
    }
  });

  __syncwarp();  // another lane may have stored the positive
  loop.for_rows([&](int m, int r, int row) {
    const float l_row = row_sum(l_i[m][r]), dtau_row = row_sum(dtau[m][r]);
    if (!loop.inside(row) || loop.lane % 4) return;
    m_parts[loop.place(row)] = unset >> (2 * m + r) & 1 ? -INFINITY : __fmul_rn(m_i[m][r], ln_2);
    l_parts[loop.place(row)] = l_row;
    dtau_parts[loop.place(row)] = dtau_row * scale[m][r] * ln_2;
    positive_logits[loop.place(row)] = shared.positives[row];
  });
  if constexpr (with_acc) loop.store(acc_parts, acc, slack_scale);
}

// The losses whose gradient is computed: of the rows of q (row softmax), of those of k (column softmax), or both
// halved.
struct Upstream {
  const float *grad, *row_lse, *col_lse, *grad_absmax;
  bool symmetric, of_teacher;
  int64_t batch, positive_offset;

  __device__ __forceinline__ bool row_softmax() const { return symmetric || !of_teacher; }
  __device__ __forceinline__ bool col_softmax() const { return symmetric || of_teacher; }
  __device__ __forceinline__ const float* q_lse() const { return of_teacher ? col_lse : row_lse; }
  __device__ __forceinline__ const float* k_lse() const { return of_teacher ? row_lse : col_lse; }
  // The student of a row; some keys have none in the batch.
  __device__ __forceinline__ int64_t q_student(int64_t row) const { return of_teacher ? row - positive_offset : row; }
  __device__ __forceinline__ int64_t k_student(int64_t row) const { return of_teacher ? row : row - positive_offset; }
};

template <typename Tiles>
__global__ void __launch_bounds__(tile_threads, 2) gradient_kernel(
    const Fused fused, const Upstream upstream, float* dtau_parts, float* acc_parts) {
  Mainloop<Tiles, true> loop(fused);
  Shared<Tiles>& shared = loop.shared;
  const float inverse = *fused.inverse_temperature, half = upstream.symmetric ? 0.5f : 1.0f;
  const float loss_scale = fused.loss_scale / (upstream.grad_absmax ? *upstream.grad_absmax : 1.0f);
  float scale[2][2], grad[2][2], lse[2][2], dtau[2][2];
  AccFragment<Tiles::width> acc = {};
  const auto copy_row = [&](int row) {
    const int64_t student = upstream.q_student(loop.q_row(row));
    const int64_t count = upstream.row_softmax() && loop.inside(row) ? upstream.batch : 0;
    copy_value(shared.q_grads[row], upstream.grad, student, count, 0);
    copy_value(shared.q_lse[row], upstream.q_lse(), student, count, INFINITY);
  };
  const auto copy_column = [&](int thread, int64_t column, int buffer) {
    if (!upstream.col_softmax()) return;
    const int64_t student = upstream.k_student(column);
    const int64_t count = column < fused.k_count ? upstream.batch : 0;
    copy_value(shared.k_grads[buffer][thread], upstream.grad, student, count, 0);
    copy_value(shared.k_lse[buffer][thread], upstream.k_lse(), student, count, INFINITY);
  };
  loop.begin(copy_row, copy_column);
  loop.for_rows([&](int m, int r, int row) {
    scale[m][r] = shared.q_factors[row] * inverse * log2_e;
    grad[m][r] = shared.q_grads[row] * half;
    lse[m][r] = shared.q_lse[row] * log2_e;
    dtau[m][r] = 0;
  });

  loop.over_tiles(copy_column, [&] {
    AccFragment<Tiles::columns> qk;  // products, then logits over scale, then weights
    loop.multiply(qk);
    const float *factors = shared.k_factors[loop.buffer], *k_grads = shared.k_grads[loop.buffer];
    const float* k_lse = shared.k_lse[loop.buffer];
    loop.to_logits(qk, [&](int m, int r, int row, int column, float product) {
      float weight = 0;
      if (upstream.row_softmax())
        weight = grad[m][r] * (expf(logit_of(product, factors[column], scale[m][r]) - shared.q_lse[row]) - 1);
      if (upstream.col_softmax()) {
        const float logit = logit_of(product, shared.q_factors[row], factors[column] * inverse * log2_e);
        weight += k_grads[column] * half * (expf(logit - k_lse[column]) - 1);
      }
      dtau[m][r] += weight * (product * factors[column]);
      shared.positives[row] = weight;
    });

    multiply_pk_all<Tiles>(acc, qk, shared.k[loop.buffer], loop.lane, [&](int pair) {
      float weights[2][2][4] = {};
      if (upstream.row_softmax())
        for_elements<2>(0, [&](int m, int j, int i) {
          const float logit = qk[m][2 * pair + j][i];
          weights[m][j][i] = grad[m][i / 2] * fast_exp2(fmaf(logit, scale[m][i / 2], -lse[m][i / 2]));
        });
      if (upstream.col_softmax())
        for_pairs<2>(0, [&](int m, int j, int r) {
          const float2 k_grad = loop.of_columns(k_grads, 2 * pair + j), lse = loop.of_columns(k_lse, 2 * pair + j);
          const float* logit = &qk[m][2 * pair + j][2 * r];
          float* weight = &weights[m][j][2 * r];
          weight[0] = fmaf(k_grad.x * half, fast_exp2(fmaf(logit[0], scale[m][r], lse.x * -log2_e)), weight[0]);
          weight[1] = fmaf(k_grad.y * half, fast_exp2(fmaf(logit[1], scale[m][r], lse.y * -log2_e)), weight[1]);
        });
      for_elements<2>(0, [&](int m, int j, int i) {
        dtau[m][i / 2] = fmaf(weights[m][j][i], qk[m][2 * pair + j][i], dtau[m][i / 2]);
      });
      if (loop.has_positives()) {
        int positives[2][2];
        loop.find_positives(positives);
        for_elements<2>(0, [&](int m, int j, int i) {
          const int at = (2 * pair + j) * 8 + i % 2;
          if (at == positives[m][i / 2]) weights[m][j][i] = shared.positives[loop.row(m, i / 2)];
        });
      }
      for_elements<2>(0, [&](int m, int j, int i) {
        const float2 factor = loop.of_columns(factors, 2 * pair + j);
        qk[m][2 * pair + j][i] = weights[m][j][i] * ((i % 2 ? factor.y : factor.x) * loss_scale);
      });
    });
  });

  loop.for_rows([&](int m, int r, int row) {
    const float sum = row_sum(dtau[m][r]);
    if (loop.inside(row) && loop.lane % 4 == 0) dtau_parts[loop.place(row)] = sum * scale[m][r] * ln_2 * -inverse;
  });
  loop.store(acc_parts, acc, 1);
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
  return dim3(static_cast<unsigned>((fused.q_count + block_rows - 1) / block_rows), fused.splits);
}

}  // namespace

int fused_width(Type type, int64_t width) {
  if (type == Type::float64 || width > (type == Type::float32 ? 64 : 128)) return 0;
  return width <= 64 ? 64 : 128;
}

int fused_rows() { return block_rows; }

void fused_one_pass(
    const Fused& fused, float* m, float* l, float* dtau, float* positive_logits, float* acc, cudaStream_t stream) {
  for_tiles(fused, [&](auto tiles) {
    using Tiles = decltype(tiles);
    launch(
        "fused_one_pass", acc ? one_pass_kernel<Tiles, true> : one_pass_kernel<Tiles, false>, grid_of(fused),
        tile_threads, sizeof(Shared<Tiles>), stream, fused, m, l, dtau, positive_logits, acc);
  });
}

void fused_gradient(
    const Fused& fused, const float* grad, const float* row_lse, const float* col_lse, const float* grad_absmax,
    bool symmetric, bool of_teacher, int64_t batch, int64_t positive_offset, float* dtau, float* acc,
    cudaStream_t stream) {
  const Upstream upstream = {grad, row_lse, col_lse, grad_absmax, symmetric, of_teacher, batch, positive_offset};
  for_tiles(fused, [&](auto tiles) {
    using Tiles = decltype(tiles);
    launch(
        "fused_gradient", gradient_kernel<Tiles>, grid_of(fused), tile_threads, sizeof(Shared<Tiles>), stream, fused,
        upstream, dtau, acc);
  });
}

}  // namespace lfcc::cuda
