// The `cuda` overloads of lfcc::info_nce..., on libtorch's stable ABI; their schemas are in
// lfcc_kernels/ops/info_nce.py. The emulation registers the same functions for CPU tensors. Each op runs one of two
// algorithms:
//
//   fused    many narrow rows: nothing of size B x K is stored, info_nce_fused.cu
//   chunks   wide or few rows: torch multiplies them chunk by chunk, info_nce_chunks.cu
//
// Nothing synchronises with the GPU and no allocation depends on data, so both can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "arguments.h"
#include "cuda/context.h"
#include "cuda/info_nce.h"

// Tests set both lower, so that small inputs run both algorithms and several chunks.
#ifndef LFCC_FUSED_FEWEST_ROWS
#define LFCC_FUSED_FEWEST_ROWS 4096
#endif
#ifndef LFCC_CHUNK_BYTES  // of products, which should stay in L2
#define LFCC_CHUNK_BYTES (32 << 20)
#endif

namespace {

using lfcc::Optional, lfcc::Rows, lfcc::ScalarType, lfcc::Tensor, lfcc::read, lfcc::write;
using lfcc::cuda::Chunk, lfcc::cuda::Fused, lfcc::cuda::OnDevice, lfcc::cuda::Reduction, lfcc::cuda::Type;
using lfcc::cuda::type_of;

constexpr int64_t max_splits = 8;

void* at(const Tensor& t, int64_t element) {
  return static_cast<char*>(t.data_ptr()) + element * static_cast<int64_t>(t.element_size());
}

// Packed rows of both sides and the other inputs of the kernels. Makes the device of the rows the current one.
struct Packed : Rows {
  OnDevice device;
  Type type;
  int64_t batch, keys, width, padded;
  double loss_scale;  // keeps weights, at most 1 in magnitude, inside the range of float16
  Tensor packed;  // student rows, then teacher rows
  Tensor stats;  // factors, inverse norms and projections of both sides, then the inverse temperature

  Packed(const char* op, const Tensor& student, const Tensor& teacher, const Tensor& temperature,
         const Optional& student_ids, const Optional& teacher_ids, int64_t positive_offset, bool normalize)
      : Rows(op, student, teacher, temperature, student_ids, teacher_ids, positive_offset),
        device(student),
        type(type_of({op, "student"}, student)),
        batch(student.size(0)),
        keys(teacher.size(0)),
        width(student.size(1)),
        padded(fused_width()),
        loss_scale(type == Type::float16 ? 0x1p15 : 1.0) {
    if (keys >= int64_t(1) << 30) lfcc::fail({op, "teacher"}, " has ", keys, " rows, expected less than 2^30");
    if (padded == 0) padded = (width + 15) / 16 * 16;
    packed = torch::stable::new_empty(student, {batch + keys, padded});
    stats = empty({3 * (batch + keys) + 1});
    const bool by_value = temperature.is_cpu();
    lfcc::cuda::pack_rows(
        {type, this->student.data_ptr(), this->teacher.data_ptr(), batch, keys, width, padded, this->student.stride(0),
         this->teacher.stride(0), normalize, this->temperature, by_value ? nullptr : temperature.data_ptr(),
         temperature.scalar_type() == ScalarType::Double, packed.data_ptr(), at(stats, 0), at(stats, batch + keys),
         at(stats, 2 * (batch + keys)), inverse_temperature()},
        device.stream);
  }

  // The padded width of fused tiles, or 0 if the chunked algorithm is used.
  int fused_width() const { return batch < LFCC_FUSED_FEWEST_ROWS ? 0 : lfcc::cuda::fused_width(type, width); }
  bool fused() const { return fused_width() > 0; }
  Type acc_type() const { return type == Type::float64 ? Type::float64 : Type::float32; }
  int64_t count(bool of_teacher) const { return of_teacher ? keys : batch; }
  void* inverse_temperature() const { return at(stats, 3 * (batch + keys)); }

  Tensor side(bool of_teacher) const {
    Tensor both = packed;
    return torch::stable::narrow(both, 0, of_teacher ? batch : 0, count(of_teacher));
  }

  Tensor mean(const Tensor& losses) const {
    const Tensor result = empty({});
    lfcc::cuda::reduce(
        Reduction::mean, acc_type(), losses.data_ptr(), batch, acc_type(), result.data_ptr(), device.stream);
    return result;
  }

  // The gradient of one side's rows from acc (rows, padded).
  void epilogue(const Tensor& acc, bool of_teacher, const void* grad_absmax, const Tensor& result) const {
    const int64_t first = of_teacher ? batch : 0;
    lfcc::cuda::epilogue_rows(
        {type, acc.data_ptr(), at(packed, first * padded), at(stats, batch + keys + first),
         at(stats, 2 * (batch + keys) + first), inverse_temperature(), grad_absmax, result.data_ptr(),
         result.scalar_type() != student.scalar_type(), count(of_teacher), width, padded, loss_scale},
        device.stream);
  }
};

// result = left @ right, in the dtype of `result` without rounding to that of the inputs.
void multiply(const Tensor& left, const Tensor& right, const Tensor& result) {
  using torch::stable::detail::from;
  const ScalarType type = result.scalar_type();
  if (left.scalar_type() == type) {
    std::array<StableIValue, 3> stack{from(left), from(right), from(result)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // frees it
    return;
  }
#ifdef LFCC_EMULATED  // torch supports a different output dtype on GPUs only
  multiply(torch::stable::to(left, type), torch::stable::to(right, type), result);
#else
  std::array<StableIValue, 4> stack{from(left), from(right), from(type), from(result)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
#endif
}

// Calls body(chunk, weights) with the products of each chunk of a side's rows and, if `with_weights`, memory for as
// many weights. All chunks use the same memory, so products stay in L2 until those of the next chunk overwrite them.
template <typename Body>
void for_chunks(const Packed& pair, bool of_teacher, bool with_weights, const Body& body) {
  Tensor q = pair.side(of_teacher);
  const Tensor k = torch::stable::transpose(pair.side(!of_teacher), 0, 1);
  const int64_t rows = pair.count(of_teacher), columns = pair.count(!of_teacher);
  const int64_t row_bytes = std::max<int64_t>(columns, 1) * static_cast<int64_t>(pair.stats.element_size());
  const int64_t size = std::min(rows, std::max<int64_t>(LFCC_CHUNK_BYTES / row_bytes / 16 * 16, 16));
  Tensor all_products = pair.empty({size, columns});
  Tensor all_weights = torch::stable::new_empty(pair.packed, {with_weights ? size : 0, columns});
  for (int64_t first = 0; first < rows; first += size) {
    const int64_t count = std::min(size, rows - first);
    const Tensor products = torch::stable::narrow(all_products, 0, 0, count);
    multiply(torch::stable::narrow(q, 0, first, count), k, products);
    const Chunk chunk{
        pair.type, products.data_ptr(), pair.stats.data_ptr(), pair.inverse_temperature(), pair.student_id(),
        pair.teacher_id(), pair.batch, pair.keys, first, count, pair.positive_offset};
    body(chunk, torch::stable::narrow(all_weights, 0, 0, with_weights ? count : 0));
  }
}

// Rows `first` to `first + count` of one side against all of the other; the positive of row r is r + shift.
Fused fused_tiles(const Packed& pair, bool of_teacher, int64_t first, int64_t count, int64_t shift) {
  const int64_t q = (of_teacher ? pair.batch : 0) + first, k = of_teacher ? 0 : pair.batch;
  const int64_t *q_ids = of_teacher ? pair.teacher_id() : pair.student_id(),
                *k_ids = of_teacher ? pair.student_id() : pair.teacher_id();
  Fused fused;
  fused.type = pair.type;
  fused.q = at(pair.packed, q * pair.padded), fused.k = at(pair.packed, k * pair.padded);
  fused.q_factors = static_cast<const float*>(at(pair.stats, q));
  fused.k_factors = static_cast<const float*>(at(pair.stats, k));
  fused.inverse_temperature = static_cast<const float*>(pair.inverse_temperature());
  fused.q_ids = q_ids ? q_ids + first : nullptr, fused.k_ids = k_ids;
  fused.q_count = count, fused.k_count = pair.count(!of_teacher), fused.shift = shift;
  fused.width = static_cast<int>(pair.padded);
  fused.loss_scale = static_cast<float>(pair.loss_scale);
  // As many splits of k as give every multiprocessor two blocks.
  const int64_t block = lfcc::cuda::fused_rows(), blocks = (count + block - 1) / block;
  const int64_t wanted = 2 * lfcc::cuda::multiprocessors() / std::max<int64_t>(blocks, 1);
  const int64_t most = std::min(max_splits, (fused.k_count + block - 1) / block);
  fused.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  return fused;
}

// Losses and log-sum-exps of the rows, or of the positives' columns, averaged with `row_losses`. If `acc` is not null,
// also acc and the temperature's gradient.
void fused_pass(
    const Packed& pair, bool of_columns, const float* row_losses, const Tensor& losses, const Tensor& lse,
    float* temperature_grad, float* acc) {
  const Fused fused = of_columns ? fused_tiles(pair, true, pair.positive_offset, pair.batch, 0)
                                 : fused_tiles(pair, false, 0, pair.batch, pair.positive_offset);
  const int64_t size = fused.splits * pair.batch;
  const Tensor parts = pair.empty({4, size}), acc_tensor = pair.empty({acc ? size : 0, pair.padded});
  float *m = write<float>(parts), *acc_parts = acc ? write<float>(acc_tensor) : nullptr;
  float *l = m + size, *dtau = l + size, *positive_logits = dtau + size;
  lfcc::cuda::fused_one_pass(fused, m, l, dtau, positive_logits, acc_parts, pair.device.stream);
  lfcc::cuda::fused_merge(
      fused, m, l, dtau, positive_logits, acc_parts, row_losses, write<float>(losses), write<float>(lse),
      temperature_grad, acc, pair.device.stream);
}

std::tuple<Tensor, Tensor, Tensor> info_nce(
    const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool symmetric, bool normalize, bool mean) {
  const Packed pair("info_nce", student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize);
  const Tensor losses = pair.empty({pair.batch}), row_lse = pair.empty({pair.batch});
  const Tensor col_lse = pair.empty({symmetric ? pair.batch : 0});
  if (pair.fused()) {
    fused_pass(pair, false, nullptr, losses, row_lse, nullptr, nullptr);
    if (symmetric) fused_pass(pair, true, read<float>(losses), losses, col_lse, nullptr, nullptr);
  } else {
    const Tensor positive_logits = pair.empty({pair.batch}), col_l = pair.empty({symmetric ? pair.batch : 0});
    for_chunks(pair, false, false, [&](const Chunk& chunk, const Tensor&) {
      lfcc::cuda::chunk_softmax(
          chunk, losses.data_ptr(), row_lse.data_ptr(), positive_logits.data_ptr(), nullptr, nullptr, pair.loss_scale,
          pair.device.stream);
      if (symmetric)
        lfcc::cuda::chunk_columns(
            chunk, positive_logits.data_ptr(), col_l.data_ptr(), col_lse.data_ptr(), losses.data_ptr(),
            pair.device.stream);
    });
  }
  return {mean ? pair.mean(losses) : losses, row_lse, col_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_one_pass(
    const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool normalize, bool mean) {
  const Packed pair(
      "info_nce_one_pass", student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize);
  const Tensor losses = pair.empty({pair.batch}), row_lse = pair.empty({pair.batch});
  const Tensor temperature_grad = pair.empty({pair.batch}), student_grad = pair.empty({pair.batch, pair.width});
  Tensor acc = pair.empty({pair.batch, pair.padded});
  if (pair.fused()) {
    fused_pass(pair, false, nullptr, losses, row_lse, write<float>(temperature_grad), write<float>(acc));
  } else {
    const Tensor positive_logits = pair.empty({pair.batch}), keys = pair.side(true);
    for_chunks(pair, false, true, [&](const Chunk& chunk, const Tensor& weights) {
      lfcc::cuda::chunk_softmax(
          chunk, losses.data_ptr(), row_lse.data_ptr(), positive_logits.data_ptr(), temperature_grad.data_ptr(),
          weights.data_ptr(), pair.loss_scale, pair.device.stream);
      multiply(weights, keys, torch::stable::narrow(acc, 0, chunk.first_row, chunk.rows));
    });
  }
  pair.epilogue(acc, false, nullptr, student_grad);
  return {mean ? pair.mean(losses) : losses, row_lse, student_grad, temperature_grad};
}

std::tuple<Tensor, Tensor> info_nce_grad(
    const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool symmetric, bool normalize, const Tensor& row_lse,
    const Tensor& col_lse, bool of_teacher) {
  const Packed pair(
      "info_nce_grad", student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize);
  pair.check_per_row("grad", grad), pair.check_per_row("row_lse", row_lse);
  if (symmetric) pair.check_per_row("col_lse", col_lse);
  const Tensor upstream = torch::stable::contiguous(grad), row_lses = torch::stable::contiguous(row_lse);
  const Tensor col_lses = torch::stable::contiguous(col_lse);
  const cudaStream_t stream = pair.device.stream;

  // float16 weights are divided by the largest upstream gradient, which may have any magnitude.
  const Tensor absmax = pair.empty({});
  const void* grad_absmax = pair.type == Type::float16 ? absmax.data_ptr() : nullptr;
  if (grad_absmax)
    lfcc::cuda::reduce(
        Reduction::absmax, pair.acc_type(), upstream.data_ptr(), pair.batch, pair.acc_type(), absmax.data_ptr(),
        stream);

  const int64_t rows = pair.count(of_teacher);
  Tensor acc, dtau;
  if (pair.fused()) {
    const Fused fused = fused_tiles(pair, of_teacher, 0, rows, of_teacher ? -positive_offset : positive_offset);
    acc = pair.empty({fused.splits, rows, pair.padded}), dtau = pair.empty({fused.splits * rows});
    lfcc::cuda::fused_gradient(
        fused, read<float>(upstream), read<float>(row_lses), read<float>(col_lses),
        static_cast<const float*>(grad_absmax), symmetric, of_teacher, pair.batch, positive_offset, write<float>(dtau),
        write<float>(acc), stream);
    const int64_t dimension = 0;
    if (fused.splits > 1) acc = torch::stable::sum(acc, torch::headeronly::IntHeaderOnlyArrayRef(&dimension, 1));
  } else {
    acc = pair.empty({rows, pair.padded}), dtau = pair.empty({rows});
    const Tensor k = pair.side(!of_teacher);
    for_chunks(pair, of_teacher, true, [&](const Chunk& chunk, const Tensor& weights) {
      lfcc::cuda::chunk_gradient(
          chunk, upstream.data_ptr(), row_lses.data_ptr(), col_lses.data_ptr(), grad_absmax, symmetric, of_teacher,
          dtau.data_ptr(), weights.data_ptr(), pair.loss_scale, stream);
      multiply(weights, k, torch::stable::narrow(acc, 0, chunk.first_row, chunk.rows));
    });
  }

  const Tensor side_grad = torch::stable::new_empty(student, {rows, pair.width});
  pair.epilogue(acc, of_teacher, grad_absmax, side_grad);
  if (temperature.get_device() != student.get_device())  // a constant: a learned one was moved to the GPU
    return {side_grad, torch::stable::new_zeros(temperature, temperature.sizes())};
  const Tensor temperature_grad = torch::stable::new_empty(temperature, temperature.sizes());
  lfcc::cuda::reduce(
      Reduction::sum, pair.acc_type(), dtau.data_ptr(), dtau.numel(), type_of({pair.op, "temperature"}, temperature),
      temperature_grad.data_ptr(), stream);
  return {side_grad, temperature_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfcc, LFCC_CUDA_KEY, m) {
  LFCC_IMPLEMENT(m, info_nce);
  LFCC_IMPLEMENT(m, info_nce_one_pass);
  LFCC_IMPLEMENT(m, info_nce_grad);
}
