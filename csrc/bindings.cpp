// Op schemas and CPU implementations of the namespace lfcc.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "arguments.h"
#include "cpu/memory.h"
#include "cpu/simd.h"
#include "info_nce.h"
#include "lowpass.h"

namespace {

using lfcc::BFloat16, lfcc::Half, lfcc::acc_t;
using lfcc::Argument, lfcc::MapShape, lfcc::Optional, lfcc::Rows, lfcc::ScalarType, lfcc::Sizes, lfcc::Tensor;
using lfcc::read, lfcc::write;

// Calls body(T()) with the kernel's element type for the dtype of `t`.
template <typename Body>
void for_dtype(const Argument& argument, const Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return body(double());
    case ScalarType::Float: return body(float());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Half: return body(Half());
    default: lfcc::fail_dtype(argument, t);
  }
}

template <typename T>
lfcc::Map<T> map_of(const MapShape& shape, T* data) {
  return {data + shape.offset, shape.batch, shape.channels, shape.height, shape.width,
          shape.stride_b, shape.stride_c, shape.stride_h, shape.stride_w};
}

template <typename A>
lfcc::Filters<A> filters_of(
    const MapShape& shape, const Sizes& scales, const Optional& row_filters, const Optional& col_filters,
    ScalarType dtype) {
  shape.check_filters(scales, row_filters, col_filters, dtype);
  if (!row_filters) return lfcc::make_filters<A>(scales, nullptr, nullptr, shape.height, shape.width);
  const Tensor rows = torch::stable::contiguous(*row_filters), cols = torch::stable::contiguous(*col_filters);
  return lfcc::make_filters<A>(scales, read<A>(rows), read<A>(cols), shape.height, shape.width);
}

Tensor lowpass(
    const Tensor& input, Sizes scales, Optional row_filters, Optional col_filters, Sizes grid, int64_t prefix_tokens) {
  const Argument argument{"lowpass", "x"};
  const Tensor x = lfcc::readable(argument, input);
  const MapShape shape(argument, x, grid, prefix_tokens);
  const Tensor y = torch::stable::new_empty(x, {shape.batch, lfcc::count_cells(scales), shape.channels});
  for_dtype(argument, x, [&](auto type) {
    using T = decltype(type);
    const auto filters = filters_of<acc_t<T>>(shape, scales, row_filters, col_filters, x.scalar_type());
    lfcc::lowpass(filters, map_of(shape, read<T>(x)), write<T>(y));
  });
  return y;
}

Tensor lowpass_input_grad(
    const Tensor& grad, Sizes size, bool channels_last, Sizes scales, Optional row_filters, Optional col_filters,
    Sizes grid, int64_t prefix_tokens) {
  const Argument argument{"lowpass_input_grad", "size"};
  const Tensor grad_x = lfcc::empty_map(argument, grad, size, channels_last);
  const MapShape shape(argument, grad_x, grid, prefix_tokens);
  shape.check_gradient(argument.named("grad"), grad, scales, grad.scalar_type());
  const Tensor dense = torch::stable::contiguous(grad);
  for_dtype(argument.named("grad"), grad, [&](auto type) {
    using T = decltype(type);
    const auto filters = filters_of<acc_t<T>>(shape, scales, row_filters, col_filters, grad.scalar_type());
    T* data = write<T>(grad_x);
    lfcc::advise_huge_pages(data, grad_x.numel() * sizeof(T));
    for (int64_t b = 0; b < shape.batch; ++b)
      std::fill(data + b * shape.stride_b, data + b * shape.stride_b + shape.offset, T());
    lfcc::lowpass_input_grad(filters, read<T>(dense), map_of(shape, data));
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> lowpass_filter_grad(
    const Tensor& grad, const Tensor& input, Sizes scales, const Tensor& row_filters, const Tensor& col_filters,
    Sizes grid, int64_t prefix_tokens) {
  const Argument argument{"lowpass_filter_grad", "x"};
  const Tensor x = lfcc::readable(argument, input);
  const MapShape shape(argument, x, grid, prefix_tokens);
  shape.check_gradient(argument.named("grad"), grad, scales, x.scalar_type());
  const Tensor dense = torch::stable::contiguous(grad);
  const Tensor grad_rows = torch::stable::new_empty(row_filters, row_filters.sizes());
  const Tensor grad_cols = torch::stable::new_empty(col_filters, col_filters.sizes());
  for_dtype(argument, x, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const auto filters = filters_of<A>(shape, scales, row_filters, col_filters, x.scalar_type());
    lfcc::lowpass_filter_grad(
        filters, read<T>(dense), map_of(shape, read<T>(x)), write<A>(grad_rows), write<A>(grad_cols));
  });
  return {grad_rows, grad_cols};
}

template <typename T>
lfcc::Pair<T> pair_of(const Rows& rows, bool symmetric, bool normalize) {
  const Tensor &student = rows.student, &teacher = rows.teacher;
  return {read<T>(student), student.size(0), student.stride(0), read<T>(teacher), teacher.size(0), teacher.stride(0),
          student.size(1), rows.student_id(), rows.teacher_id(), rows.positive_offset, rows.temperature, symmetric,
          normalize};
}

// The losses (B,), or their mean as a scalar.
template <typename A>
Tensor reduced(const Rows& rows, const Tensor& losses, bool mean) {
  if (!mean) return losses;
  const Tensor result = rows.empty({});
  const A* values = read<A>(losses);
  *write<A>(result) = A(std::accumulate(values, values + losses.numel(), 0.0) / double(losses.numel()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> info_nce(
    const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool symmetric, bool normalize, bool mean) {
  const Rows rows("info_nce", student, teacher, temperature, student_ids, teacher_ids, positive_offset);
  const int64_t batch = student.size(0);
  Tensor losses = rows.empty({batch});
  const Tensor row_lse = rows.empty({batch}), col_lse = rows.empty({symmetric ? batch : 0});
  for_dtype({rows.op, "student"}, student, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    lfcc::info_nce(pair_of<T>(rows, symmetric, normalize), write<A>(losses), write<A>(row_lse), write<A>(col_lse));
    losses = reduced<A>(rows, losses, mean);
  });
  return {losses, row_lse, col_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_one_pass(
    const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool normalize, bool mean) {
  const Rows rows("info_nce_one_pass", student, teacher, temperature, student_ids, teacher_ids, positive_offset);
  const int64_t batch = student.size(0);
  Tensor losses = rows.empty({batch});
  const Tensor row_lse = rows.empty({batch}), temperature_grad = rows.empty({batch});
  const Tensor student_grad = rows.empty({batch, student.size(1)});
  for_dtype({rows.op, "student"}, student, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    lfcc::info_nce_one_pass(
        pair_of<T>(rows, false, normalize), write<A>(losses), write<A>(row_lse), write<A>(student_grad),
        write<A>(temperature_grad));
    losses = reduced<A>(rows, losses, mean);
  });
  return {losses, row_lse, student_grad, temperature_grad};
}

std::tuple<Tensor, Tensor> info_nce_grad(
    const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool symmetric, bool normalize, const Tensor& row_lse,
    const Tensor& col_lse, bool of_teacher) {
  const Rows rows("info_nce_grad", student, teacher, temperature, student_ids, teacher_ids, positive_offset);
  rows.check_per_row("grad", grad), rows.check_per_row("row_lse", row_lse);
  if (symmetric) rows.check_per_row("col_lse", col_lse);
  const Tensor& side = of_teacher ? teacher : student;
  const Tensor side_grad = torch::stable::new_empty(side, {side.size(0), side.size(1)});
  const Tensor temperature_grad = torch::stable::new_empty(temperature, {});
  const Tensor upstream = torch::stable::contiguous(grad), along_rows = torch::stable::contiguous(row_lse);
  const Tensor along_cols = torch::stable::contiguous(col_lse);
  for_dtype({rows.op, "student"}, student, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    A total;
    lfcc::info_nce_grad(
        pair_of<T>(rows, symmetric, normalize), read<A>(upstream), read<A>(along_rows), read<A>(along_cols), of_teacher,
        write<T>(side_grad), &total);
    if (temperature.scalar_type() == ScalarType::Double)
      *write<double>(temperature_grad) = total;
    else
      *write<float>(temperature_grad) = float(total);
  });
  return {side_grad, temperature_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lfcc, m) {
#define LFCC_FILTERS "int[] scales, Tensor? row_filters, Tensor? col_filters, int[] grid, int prefix_tokens"
#define LFCC_PAIR                                                                                                   \
  "Tensor student, Tensor teacher, Tensor temperature, Tensor? student_ids, Tensor? teacher_ids, int positive_offset"
  m.def("lowpass(Tensor x, " LFCC_FILTERS ") -> Tensor");
  m.def("lowpass_input_grad(Tensor grad, SymInt[] size, bool channels_last, " LFCC_FILTERS ") -> Tensor");
  m.def(
      "lowpass_filter_grad(Tensor grad, Tensor x, int[] scales, Tensor row_filters, Tensor col_filters, int[] grid, "
      "int prefix_tokens) -> (Tensor, Tensor)");
  m.def(
      "info_nce(" LFCC_PAIR
      ", bool symmetric, bool normalize, bool mean) -> (Tensor loss, Tensor row_lse, Tensor col_lse)");
  m.def(
      "info_nce_one_pass(" LFCC_PAIR
      ", bool normalize, bool mean) -> (Tensor loss, Tensor row_lse, Tensor student_grad, Tensor temperature_grad)");
  m.def(
      "info_nce_grad(Tensor grad, " LFCC_PAIR
      ", bool symmetric, bool normalize, Tensor row_lse, Tensor col_lse, bool of_teacher) -> (Tensor side_grad, Tensor "
      "temperature_grad)");
}

STABLE_TORCH_LIBRARY_IMPL(lfcc, CPU, m) {
  m.impl("lowpass", TORCH_BOX(&lowpass));
  m.impl("lowpass_input_grad", TORCH_BOX(&lowpass_input_grad));
  m.impl("lowpass_filter_grad", TORCH_BOX(&lowpass_filter_grad));
  m.impl("info_nce", TORCH_BOX(&info_nce));
  m.impl("info_nce_one_pass", TORCH_BOX(&info_nce_one_pass));
  m.impl("info_nce_grad", TORCH_BOX(&info_nce_grad));
}
