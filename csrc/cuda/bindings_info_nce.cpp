// The ops lfcc::info_nce... of the overload `cuda`, on libtorch's stable ABI; their schemas are in
// lfcc_kernels/ops/info_nce.py. The emulation registers the same functions for tensors on the CPU. Each goes one of two
// ways:
//
//   fused    narrow rows, many of them: nothing of size B x K in memory, info_nce_fused.cu
//   chunks   wide rows, or few: torch multiplies them chunk by chunk, info_nce_chunks.cu
//
// Nothing waits for the GPU, and no allocation depends on data, so that both can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "arguments.h"
#include "cuda/context.h"
#include "cuda/info_nce.h"

// Tests set both lower, so that small sizes go both ways and take several chunks.
#ifndef LFCC_FUSED_FEWEST_ROWS
#define LFCC_FUSED_FEWEST_ROWS 4096
#endif
#ifndef LFCC_CHUNK_BYTES  // of products, which are to stay in the last cache
#define LFCC_CHUNK_BYTES (32 << 20)
#endif

namespace {

using lfcc::Optional, lfcc::Rows, lfcc::ScalarType, lfcc::Tensor, lfcc::read, lfcc::write;
using lfcc::cuda::Chunk, lfcc::cuda::Fused, lfcc::cuda::OnDevice, lfcc::cuda::Total, lfcc::cuda::Type;
using lfcc::cuda::type_of;

constexpr int64_t most_splits = 8;

void* at(const Tensor& t, int64_t element) {
  return static_cast<char*>(t.data_ptr()) + element * static_cast<int64_t>(t.element_size());
}

// Both sides packed, and what else the kernels of a pair read. Makes the rows' device the current one.
struct Packed : Rows {
  OnDevice device;
  Type type;
  int64_t batch, keys, width, padded;
  double gain;  // keeps weights, at most 1 in size, inside the range of float16
  Tensor packed;  // student rows, then teacher rows
  Tensor numbers;  // factors, inverse lengths and tangents of both sides, then the inverse temperature

  Packed(const char* op, const Tensor& student, const Tensor& teacher, const Tensor& temperature,
         const Optional& student_ids, const Optional& teacher_ids, int64_t positive_offset, bool normalize)
      : Rows(op, student, teacher, temperature, student_ids, teacher_ids, positive_offset),
        device(student),
        type(type_of({op, "student"}, student)),
        batch(student.size(0)),
        keys(teacher.size(0)),
        width(student.size(1)),
        padded(fused_width()),
        gain(type == Type::float16 ? 0x1p15 : 1.0) {
    if (keys >= int64_t(1) << 30) lfcc::fail({op, "teacher"}, " has ", keys, " rows, expected less than 2^30");
    if (padded == 0) padded = (width + 15) / 16 * 16;
    packed = torch::stable::new_empty(student, {batch + keys, padded});
    numbers = empty({3 * (batch + keys) + 1});
    const bool by_value = temperature.is_cpu();
    lfcc::cuda::pack_rows(
        {type, this->student.data_ptr(), this->teacher.data_ptr(), batch, keys, width, padded, this->student.stride(0),
         this->teacher.stride(0), normalize, this->temperature, by_value ? nullptr : temperature.data_ptr(),
         temperature.scalar_type() == ScalarType::Double, packed.data_ptr(), at(numbers, 0), at(numbers, batch + keys),
         at(numbers, 2 * (batch + keys)), inverse_temperature()},
        device.stream);
  }

  // The padded width of fused tiles, or 0 where they are not the way to go.
  int fused_width() const { return batch < LFCC_FUSED_FEWEST_ROWS ? 0 : lfcc::cuda::fused_width(type, width); }
  bool fused() const { return fused_width() > 0; }
  Type sum_type() const { return type == Type::float64 ? Type::float64 : Type::float32; }
  int64_t count(bool of_teacher) const { return of_teacher ? keys : batch; }
  void* inverse_temperature() const { return at(numbers, 3 * (batch + keys)); }

  Tensor side(bool of_teacher) const {
    Tensor both = packed;
    return torch::stable::narrow(both, 0, of_teacher ? batch : 0, count(of_teacher));
  }

  Tensor mean(const Tensor& losses) const {
    const Tensor result = empty({});
    lfcc::cuda::total_of(
        Total::mean, sum_type(), losses.data_ptr(), batch, sum_type(), result.data_ptr(), device.stream);
    return result;
  }

  // From sums (rows, padded) of one side the gradient of its rows as they came.
  void finish(const Tensor& sums, bool of_teacher, const void* magnitude, const Tensor& result) const {
    const int64_t first = of_teacher ? batch : 0;
    lfcc::cuda::finish_rows(
        {type, sums.data_ptr(), at(packed, first * padded), at(numbers, batch + keys + first),
         at(numbers, 2 * (batch + keys) + first), inverse_temperature(), magnitude, result.data_ptr(),
         result.scalar_type() != student.scalar_type(), count(of_teacher), width, padded, gain},
        device.stream);
  }
};

// result = left right, in result's type straight from the sums.
void multiply(const Tensor& left, const Tensor& right, const Tensor& result) {
  using torch::stable::detail::from;
  const ScalarType type = result.scalar_type();
  if (left.scalar_type() == type) {
    std::array<StableIValue, 3> stack{from(left), from(right), from(result)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // frees it
    return;
  }
#ifdef LFCC_EMULATED  // where torch has no products into another type
  multiply(torch::stable::to(left, type), torch::stable::to(right, type), result);
#else
  std::array<StableIValue, 4> stack{from(left), from(right), from(type), from(result)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
#endif
}

// Calls body(chunk, weights) with the products of one chunk of a side's rows after the other, and a place for as many
// weights, where asked for. Products of the next chunk take the place of these in the last cache.
template <typename Body>
void for_chunks(const Packed& pair, bool of_teacher, bool with_weights, const Body& body) {
  Tensor own = pair.side(of_teacher);
  const Tensor others = torch::stable::transpose(pair.side(!of_teacher), 0, 1);
  const int64_t rows = pair.count(of_teacher), columns = pair.count(!of_teacher);
  const int64_t row_bytes = std::max<int64_t>(columns, 1) * static_cast<int64_t>(pair.numbers.element_size());
  const int64_t size = std::min(rows, std::max<int64_t>(LFCC_CHUNK_BYTES / row_bytes / 16 * 16, 16));
  Tensor all_products = pair.empty({size, columns});
  Tensor all_weights = torch::stable::new_empty(pair.packed, {with_weights ? size : 0, columns});
  for (int64_t first = 0; first < rows; first += size) {
    const int64_t count = std::min(size, rows - first);
    const Tensor products = torch::stable::narrow(all_products, 0, 0, count);
    multiply(torch::stable::narrow(own, 0, first, count), others, products);
    const Chunk chunk{
        pair.type, products.data_ptr(), pair.numbers.data_ptr(), pair.inverse_temperature(), pair.student_id(),
        pair.teacher_id(), pair.batch, pair.keys, first, count, pair.positive_offset};
    body(chunk, torch::stable::narrow(all_weights, 0, 0, with_weights ? count : 0));
  }
}

// Rows `first` to `first + count` of one side against all of the other; the positive of row r is r + shift.
Fused fused_tiles(const Packed& pair, bool of_teacher, int64_t first, int64_t count, int64_t shift) {
  const int64_t own = (of_teacher ? pair.batch : 0) + first, other = of_teacher ? 0 : pair.batch;
  const int64_t *own_ids = of_teacher ? pair.teacher_id() : pair.student_id(),
                *other_ids = of_teacher ? pair.student_id() : pair.teacher_id();
  Fused fused;
  fused.type = pair.type;
  fused.own = at(pair.packed, own * pair.padded), fused.other = at(pair.packed, other * pair.padded);
  fused.own_factors = static_cast<const float*>(at(pair.numbers, own));
  fused.other_factors = static_cast<const float*>(at(pair.numbers, other));
  fused.inverse_temperature = static_cast<const float*>(pair.inverse_temperature());
  fused.own_ids = own_ids ? own_ids + first : nullptr, fused.other_ids = other_ids;
  fused.own_count = count, fused.other_count = pair.count(!of_teacher), fused.shift = shift;
  fused.width = static_cast<int>(pair.padded);
  fused.gain = static_cast<float>(pair.gain);
  // As many shares of the other side as give every multiprocessor two blocks.
  const int64_t block = lfcc::cuda::fused_rows(), blocks = (count + block - 1) / block;
  const int64_t wanted = 2 * lfcc::cuda::multiprocessors() / std::max<int64_t>(blocks, 1);
  const int64_t most = std::min(most_splits, (fused.other_count + block - 1) / block);
  fused.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  return fused;
}

// Losses and log-sum-exps of rows, or of the positives' columns, averaged with `along_rows`; with `sums` the sums that
// finish takes and the temperature's gradient.
void fused_pass(
    const Packed& pair, bool of_columns, const float* along_rows, const Tensor& losses, const Tensor& lse,
    float* temperature_grad, float* sums) {
  const Fused fused = of_columns ? fused_tiles(pair, true, pair.positive_offset, pair.batch, 0)
                                 : fused_tiles(pair, false, 0, pair.batch, pair.positive_offset);
  const int64_t size = fused.splits * pair.batch;
  const Tensor statistics = pair.empty({4, size}), parts = pair.empty({sums ? size : 0, pair.padded});
  float *peaks = write<float>(statistics), *sums_of_parts = sums ? write<float>(parts) : nullptr;
  float *others = peaks + size, *weighted = others + size, *positives = weighted + size;
  lfcc::cuda::fused_one_pass(fused, peaks, others, weighted, positives, sums_of_parts, pair.device.stream);
  lfcc::cuda::fused_merge(
      fused, peaks, others, weighted, positives, sums_of_parts, along_rows, write<float>(losses), write<float>(lse),
      temperature_grad, sums, pair.device.stream);
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
    const Tensor positives = pair.empty({pair.batch}), totals = pair.empty({symmetric ? pair.batch : 0});
    for_chunks(pair, false, false, [&](const Chunk& chunk, const Tensor&) {
      lfcc::cuda::chunk_softmax(
          chunk, losses.data_ptr(), row_lse.data_ptr(), positives.data_ptr(), nullptr, nullptr, pair.gain,
          pair.device.stream);
      if (symmetric)
        lfcc::cuda::chunk_columns(
            chunk, positives.data_ptr(), totals.data_ptr(), col_lse.data_ptr(), losses.data_ptr(), pair.device.stream);
    });
  }
  return {mean ? pair.mean(losses) : losses, row_lse, col_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_one_pass(
    const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool normalize, bool mean) {
  const Packed pair("info_nce_one_pass", student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize);
  const Tensor losses = pair.empty({pair.batch}), row_lse = pair.empty({pair.batch});
  const Tensor temperature_grad = pair.empty({pair.batch}), student_grad = pair.empty({pair.batch, pair.width});
  Tensor sums = pair.empty({pair.batch, pair.padded});
  if (pair.fused()) {
    fused_pass(pair, false, nullptr, losses, row_lse, write<float>(temperature_grad), write<float>(sums));
  } else {
    const Tensor positives = pair.empty({pair.batch}), keys = pair.side(true);
    for_chunks(pair, false, true, [&](const Chunk& chunk, const Tensor& weights) {
      lfcc::cuda::chunk_softmax(
          chunk, losses.data_ptr(), row_lse.data_ptr(), positives.data_ptr(), temperature_grad.data_ptr(),
          weights.data_ptr(), pair.gain, pair.device.stream);
      multiply(weights, keys, torch::stable::narrow(sums, 0, chunk.first_row, chunk.rows));
    });
  }
  pair.finish(sums, false, nullptr, student_grad);
  return {mean ? pair.mean(losses) : losses, row_lse, student_grad, temperature_grad};
}

std::tuple<Tensor, Tensor> info_nce_grad(
    const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool symmetric, bool normalize, const Tensor& row_lse,
    const Tensor& col_lse, bool of_teacher) {
  const Packed pair("info_nce_grad", student, teacher, temperature, student_ids, teacher_ids, positive_offset, normalize);
  pair.check_per_row("grad", grad), pair.check_per_row("row_lse", row_lse);
  if (symmetric) pair.check_per_row("col_lse", col_lse);
  const Tensor upstream = torch::stable::contiguous(grad), along_rows = torch::stable::contiguous(row_lse);
  const Tensor along_columns = torch::stable::contiguous(col_lse);
  const cudaStream_t stream = pair.device.stream;

  // Weights of float16 are taken relative to the largest upstream gradient, which may be of any size.
  const Tensor largest = pair.empty({});
  const void* magnitude = pair.type == Type::float16 ? largest.data_ptr() : nullptr;
  if (magnitude)
    lfcc::cuda::total_of(
        Total::largest, pair.sum_type(), upstream.data_ptr(), pair.batch, pair.sum_type(), largest.data_ptr(), stream);

  const int64_t rows = pair.count(of_teacher);
  Tensor sums, slopes;
  if (pair.fused()) {
    const Fused fused = fused_tiles(pair, of_teacher, 0, rows, of_teacher ? -positive_offset : positive_offset);
    sums = pair.empty({fused.splits, rows, pair.padded}), slopes = pair.empty({fused.splits * rows});
    lfcc::cuda::fused_gradient(
        fused, read<float>(upstream), read<float>(along_rows), read<float>(along_columns),
        static_cast<const float*>(magnitude), symmetric, of_teacher, pair.batch, positive_offset, write<float>(slopes),
        write<float>(sums), stream);
    const int64_t splits = 0;  // the dimension
    if (fused.splits > 1) sums = torch::stable::sum(sums, torch::headeronly::IntHeaderOnlyArrayRef(&splits, 1));
  } else {
    sums = pair.empty({rows, pair.padded}), slopes = pair.empty({rows});
    const Tensor others = pair.side(!of_teacher);
    for_chunks(pair, of_teacher, true, [&](const Chunk& chunk, const Tensor& weights) {
      lfcc::cuda::chunk_gradient(
          chunk, upstream.data_ptr(), along_rows.data_ptr(), along_columns.data_ptr(), magnitude, symmetric, of_teacher,
          slopes.data_ptr(), weights.data_ptr(), pair.gain, stream);
      multiply(weights, others, torch::stable::narrow(sums, 0, chunk.first_row, chunk.rows));
    });
  }

  const Tensor side_grad = torch::stable::new_empty(student, {rows, pair.width});
  pair.finish(sums, of_teacher, magnitude, side_grad);
  if (temperature.get_device() != student.get_device())  // a constant: one that learns was brought to the GPU
    return {side_grad, torch::stable::new_zeros(temperature, temperature.sizes())};
  const Tensor temperature_grad = torch::stable::new_empty(temperature, temperature.sizes());
  lfcc::cuda::total_of(
      Total::sum, pair.sum_type(), slopes.data_ptr(), slopes.numel(), type_of({pair.op, "temperature"}, temperature),
      temperature_grad.data_ptr(), stream);
  return {side_grad, temperature_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lfcc, LFCC_CUDA_KEY, m) {
  LFCC_IMPLEMENT(m, info_nce);
  LFCC_IMPLEMENT(m, info_nce_one_pass);
  LFCC_IMPLEMENT(m, info_nce_grad);
}
