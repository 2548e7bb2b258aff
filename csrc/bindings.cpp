// Schemas and CPU kernels of the namespace lfcc, on libtorch's stable ABI. Arguments were checked in
// lfcc_kernels/functional.py; what is checked here guards memory against callers from elsewhere.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/memory.h"
#include "cpu/simd.h"
#include "info_nce.h"
#include "lowpass.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using lfcc::BFloat16, lfcc::Half, lfcc::acc_t;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <typename T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls body(T()) with the kernel's type for a dtype.
template <typename Body>
void for_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double: return body(double());
    case ScalarType::Float: return body(float());
    case ScalarType::BFloat16: return body(BFloat16());
    case ScalarType::Half: return body(Half());
    default: STD_TORCH_CHECK(false, "lfcc: expected float64, float32, bfloat16 or float16");
  }
}

ScalarType accumulator(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_map(const Tensor& x, const Sizes& grid, int64_t prefix_tokens) {
  const bool map = x.dim() == 4 && grid.empty() && prefix_tokens == 0;
  const bool tokens = x.dim() == 3 && grid.size() == 2 && grid[0] > 0 && grid[1] > 0 && prefix_tokens >= 0 &&
      x.size(1) == prefix_tokens + grid[0] * grid[1];
  STD_TORCH_CHECK(map || tokens, "lfcc: expected a map (B, C, H, W), or tokens (B, N, C) that fit grid and prefix");
}

// A map (B, C, H, W), or tokens (B, N, C) seen as one, in a layout the kernels read in place.
template <typename T>
lfcc::Map<T> map_of(const Tensor& x, T* data, const Sizes& grid, int64_t prefix_tokens) {
  if (x.dim() == 4)
    return {data, x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  const int64_t height = grid[0], width = grid[1];
  return {data + prefix_tokens * x.stride(1), x.size(0), x.size(2), height, width,
          x.stride(0), x.stride(2), width * x.stride(1), x.stride(1)};
}

Tensor readable(const Tensor& x) {
  const int64_t channel_stride = x.stride(x.dim() == 4 ? 1 : 2), column_stride = x.stride(x.dim() == 4 ? 3 : 1);
  return channel_stride == 1 || column_stride == 1 ? x : torch::stable::contiguous(x);
}

int64_t cells_of(const Sizes& scales) {
  int64_t cells = 0;
  for (int64_t scale : scales) cells += scale * scale;
  return cells;
}

template <typename T>
void check_gradient(const Tensor& grad, const lfcc::Map<T>& map, const Sizes& scales) {
  STD_TORCH_CHECK(
      grad.dim() == 3 && grad.size(0) == map.batch && grad.size(1) == cells_of(scales) && grad.size(2) == map.channels,
      "lfcc: the gradient does not fit the output (B, cells, C)");
}

template <typename A>
lfcc::Filters<A> filters_of(
    const Sizes& scales, const Optional& row_filters, const Optional& col_filters, int64_t height, int64_t width,
    std::vector<Tensor>& kept) {
  int64_t rows = 0;
  for (int64_t scale : scales) {
    STD_TORCH_CHECK(scale > 0 && scale <= height && scale <= width, "lfcc: scale ", scale, " does not fit the map");
    rows += scale;
  }
  const auto matrix = [&](const Optional& filters, int64_t size) -> const A* {
    if (!filters) return nullptr;
    const auto dtype = sizeof(A) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(
        filters->scalar_type() == dtype && filters->dim() == 2 && filters->size(0) == rows && filters->size(1) == size,
        "lfcc: filters do not fit scales, map and type");
    kept.push_back(torch::stable::contiguous(*filters));
    return read<A>(kept.back());
  };
  return lfcc::make_filters<A>(scales, matrix(row_filters, height), matrix(col_filters, width), height, width);
}

Tensor lowpass(
    const Tensor& input, Sizes scales, Optional row_filters, Optional col_filters, Sizes grid, int64_t prefix_tokens) {
  check_map(input, grid, prefix_tokens);
  const Tensor x = readable(input);
  const Tensor y = torch::stable::new_empty(x, {x.size(0), cells_of(scales), x.size(x.dim() == 4 ? 1 : 2)});
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    std::vector<Tensor> kept;
    const auto map = map_of(x, read<T>(x), grid, prefix_tokens);
    lfcc::lowpass(filters_of<acc_t<T>>(scales, row_filters, col_filters, map.height, map.width, kept), map, write<T>(y));
  });
  return y;
}

Tensor lowpass_input_grad(
    const Tensor& grad, Sizes size, bool channels_last, Sizes scales, Optional row_filters, Optional col_filters,
    Sizes grid, int64_t prefix_tokens) {
  using torch::headeronly::MemoryFormat;
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor grad_x = torch::stable::empty(
      size, grad.scalar_type(), std::nullopt, grad.device(), std::nullopt, format);
  check_map(grad_x, grid, prefix_tokens);
  const Tensor dense = torch::stable::contiguous(grad);
  for_dtype(grad.scalar_type(), [&](auto type) {
    using T = decltype(type);
    std::vector<Tensor> kept;
    T* data = write<T>(grad_x);
    lfcc::advise_huge_pages(data, grad_x.numel() * sizeof(T));
    const auto map = map_of(grad_x, data, grid, prefix_tokens);
    check_gradient(grad, map, scales);
    for (int64_t b = 0; b < map.batch; ++b)
      std::fill(data + b * map.stride_b, data + b * map.stride_b + prefix_tokens * map.stride_w, T());
    lfcc::lowpass_input_grad(
        filters_of<acc_t<T>>(scales, row_filters, col_filters, map.height, map.width, kept), read<T>(dense), map);
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> lowpass_filter_grad(
    const Tensor& grad, const Tensor& input, Sizes scales, const Tensor& row_filters, const Tensor& col_filters,
    Sizes grid, int64_t prefix_tokens) {
  check_map(input, grid, prefix_tokens);
  STD_TORCH_CHECK(grad.scalar_type() == input.scalar_type(), "lfcc: the gradient is not of the map's type");
  const Tensor x = readable(input);
  const Tensor dense = torch::stable::contiguous(grad);
  const Tensor grad_rows = torch::stable::new_empty(row_filters, row_filters.sizes());
  const Tensor grad_cols = torch::stable::new_empty(col_filters, col_filters.sizes());
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    std::vector<Tensor> kept;
    const auto map = map_of(x, read<T>(x), grid, prefix_tokens);
    check_gradient(grad, map, scales);
    lfcc::lowpass_filter_grad(
        filters_of<A>(scales, row_filters, col_filters, map.height, map.width, kept), read<T>(dense), map,
        write<A>(grad_rows), write<A>(grad_cols));
  });
  return {grad_rows, grad_cols};
}

// The arguments of the three info_nce ops, with rows the kernels read in place.
struct Rows {
  Tensor student, teacher;
  Optional student_ids, teacher_ids;
  int64_t positive_offset;
  double temperature;

  Rows(const Tensor& student, const Tensor& teacher, const Tensor& temperature, const Optional& student_ids,
       const Optional& teacher_ids, int64_t positive_offset)
      : student(in_rows(student)), teacher(in_rows(teacher)), positive_offset(positive_offset) {
    STD_TORCH_CHECK(
        student.dim() == 2 && teacher.dim() == 2 && student.scalar_type() == teacher.scalar_type() &&
            student.size(1) == teacher.size(1) && positive_offset >= 0 &&
            positive_offset + student.size(0) <= teacher.size(0),
        "lfcc: student and teacher rows do not fit each other");
    const auto check_ids = [](const Tensor& ids, int64_t count) {
      STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.numel() == count, "lfcc: ids do not fit the rows");
    };
    STD_TORCH_CHECK(student_ids.has_value() == teacher_ids.has_value(), "lfcc: ids on one side only");
    if (student_ids) {
      check_ids(*student_ids, student.size(0)), check_ids(*teacher_ids, teacher.size(0));
      this->student_ids = torch::stable::contiguous(*student_ids);
      this->teacher_ids = torch::stable::contiguous(*teacher_ids);
    }
    STD_TORCH_CHECK(
        temperature.numel() == 1 && temperature.is_cpu() &&
            (temperature.scalar_type() == ScalarType::Double || temperature.scalar_type() == ScalarType::Float),
        "lfcc: temperature must be one float64 or float32 number on the CPU");
    this->temperature = temperature.scalar_type() == ScalarType::Double ? *read<double>(temperature)
                                                                         : double(*read<float>(temperature));
    STD_TORCH_CHECK(
        this->temperature > 0 && std::isfinite(this->temperature), "info_nce: temperature is ", this->temperature,
        "; expected a positive finite number, as 0.1");
  }

  static Tensor in_rows(const Tensor& t) {
    return t.stride(1) == 1 && t.stride(0) >= t.size(1) ? t : torch::stable::contiguous(t);
  }

  template <typename T>
  lfcc::Pair<T> pair(bool symmetric, bool normalize) const {
    return {read<T>(student), student.size(0), student.stride(0), read<T>(teacher), teacher.size(0), teacher.stride(0),
            student.size(1), student_ids ? read<int64_t>(*student_ids) : nullptr,
            teacher_ids ? read<int64_t>(*teacher_ids) : nullptr, positive_offset, temperature, symmetric, normalize};
  }

  Tensor empty(std::initializer_list<int64_t> size) const {
    return torch::stable::new_empty(student, size, accumulator(student.scalar_type()));
  }

  // The losses (B,), or their mean as a scalar.
  template <typename A>
  Tensor reduced(const Tensor& losses, bool mean) const {
    if (!mean) return losses;
    const Tensor result = empty({});
    const A* values = read<A>(losses);
    *write<A>(result) = A(std::accumulate(values, values + losses.numel(), 0.0) / double(losses.numel()));
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> info_nce(
    const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool symmetric, bool normalize, bool mean) {
  const Rows rows(student, teacher, temperature, student_ids, teacher_ids, positive_offset);
  const int64_t batch = student.size(0);
  Tensor losses = rows.empty({batch});
  const Tensor row_lse = rows.empty({batch}), col_lse = rows.empty({symmetric ? batch : 0});
  for_dtype(student.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    lfcc::info_nce(rows.pair<T>(symmetric, normalize), write<A>(losses), write<A>(row_lse), write<A>(col_lse));
    losses = rows.reduced<A>(losses, mean);
  });
  return {losses, row_lse, col_lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_one_pass(
    const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool normalize, bool mean) {
  const Rows rows(student, teacher, temperature, student_ids, teacher_ids, positive_offset);
  const int64_t batch = student.size(0);
  Tensor losses = rows.empty({batch});
  const Tensor row_lse = rows.empty({batch}), temperature_grad = rows.empty({batch});
  const Tensor student_grad = rows.empty({batch, student.size(1)});
  for_dtype(student.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    lfcc::info_nce_one_pass(
        rows.pair<T>(false, normalize), write<A>(losses), write<A>(row_lse), write<A>(student_grad),
        write<A>(temperature_grad));
    losses = rows.reduced<A>(losses, mean);
  });
  return {losses, row_lse, student_grad, temperature_grad};
}

std::tuple<Tensor, Tensor> info_nce_grad(
    const Tensor& grad, const Tensor& student, const Tensor& teacher, const Tensor& temperature, Optional student_ids,
    Optional teacher_ids, int64_t positive_offset, bool symmetric, bool normalize, const Tensor& row_lse,
    const Tensor& col_lse, bool of_teacher) {
  const Rows rows(student, teacher, temperature, student_ids, teacher_ids, positive_offset);
  const auto check_rows = [&](const Tensor& values) {
    STD_TORCH_CHECK(
        values.scalar_type() == accumulator(student.scalar_type()) && values.numel() == student.size(0),
        "lfcc: gradients or log-sum-exps do not fit the rows");
  };
  check_rows(grad), check_rows(row_lse);
  if (symmetric) check_rows(col_lse);
  const Tensor& side = of_teacher ? teacher : student;
  const Tensor side_grad = torch::stable::new_empty(side, {side.size(0), side.size(1)});
  const Tensor temperature_grad = torch::stable::new_empty(temperature, {});
  const Tensor upstream = torch::stable::contiguous(grad), along_rows = torch::stable::contiguous(row_lse);
  const Tensor along_cols = torch::stable::contiguous(col_lse);
  for_dtype(student.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    A total;
    lfcc::info_nce_grad(
        rows.pair<T>(symmetric, normalize), read<A>(upstream), read<A>(along_rows), read<A>(along_cols), of_teacher,
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
