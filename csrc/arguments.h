// What the ops of every backend make of their arguments, on libtorch's stable ABI. They were checked in
// lfcc_kernels/functional.py; what is checked here guards memory against callers from elsewhere.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <vector>

namespace lfcc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
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

// The type in which sums over elements of `dtype` are taken.
inline ScalarType sum_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t cells_of(const Sizes& scales) {
  int64_t cells = 0;
  for (int64_t scale : scales) cells += scale * scale;
  return cells;
}

// A map (B, C, H, W), or tokens (B, N, C) seen as one, whose data begin `offset` elements after the tensor's; strides
// in elements.
struct MapShape {
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t offset;

  MapShape(const Tensor& x, const Sizes& grid, int64_t prefix_tokens) {
    const bool map = x.dim() == 4 && grid.empty() && prefix_tokens == 0;
    const bool tokens = x.dim() == 3 && grid.size() == 2 && grid[0] > 0 && grid[1] > 0 && prefix_tokens >= 0 &&
        x.size(1) == prefix_tokens + grid[0] * grid[1];
    STD_TORCH_CHECK(map || tokens, "lfcc: expected a map (B, C, H, W), or tokens (B, N, C) that fit grid and prefix");
    batch = x.size(0), stride_b = x.stride(0);
    if (map) {
      channels = x.size(1), height = x.size(2), width = x.size(3);
      stride_c = x.stride(1), stride_h = x.stride(2), stride_w = x.stride(3);
      offset = 0;
    } else {
      channels = x.size(2), height = grid[0], width = grid[1];
      stride_c = x.stride(2), stride_h = width * x.stride(1), stride_w = x.stride(1);
      offset = prefix_tokens * x.stride(1);
    }
  }

  void check_gradient(const Tensor& grad, const Sizes& scales) const {
    STD_TORCH_CHECK(
        grad.dim() == 3 && grad.size(0) == batch && grad.size(1) == cells_of(scales) && grad.size(2) == channels,
        "lfcc: the gradient does not fit the output (B, cells, C)");
  }

  // The rows of all filters, which have to be of these sizes and of the type that sums of `dtype` are taken in.
  void check_filters(const Sizes& scales, const Optional& rows, const Optional& cols, ScalarType dtype) const {
    int64_t filters = 0;
    for (int64_t scale : scales) {
      STD_TORCH_CHECK(scale > 0 && scale <= height && scale <= width, "lfcc: scale ", scale, " does not fit the map");
      filters += scale;
    }
    STD_TORCH_CHECK(rows.has_value() == cols.has_value(), "lfcc: filters of one side only");
    const auto check = [&](const Tensor& matrix, int64_t size) {
      STD_TORCH_CHECK(
          matrix.scalar_type() == sum_type(dtype) && matrix.dim() == 2 && matrix.size(0) == filters &&
              matrix.size(1) == size,
          "lfcc: filters do not fit scales, map and type");
    };
    if (rows) check(*rows, height), check(*cols, width);
  }
};

// The map in a layout that kernels read in place: channels or columns next to each other.
inline Tensor readable(const Tensor& x) {
  const int64_t channel_stride = x.stride(x.dim() == 4 ? 1 : 2), column_stride = x.stride(x.dim() == 4 ? 3 : 1);
  return channel_stride == 1 || column_stride == 1 ? x : torch::stable::contiguous(x);
}

// An empty gradient of a map of this size.
inline Tensor empty_map(const Tensor& grad, const Sizes& size, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(size, grad.scalar_type(), std::nullopt, grad.device(), std::nullopt, format);
}

// The arguments of the three info_nce ops, with rows the kernels read in place. A temperature on the CPU is checked
// and read; one in a GPU's memory is not, since that would wait for it.
struct Rows {
  Tensor student, teacher;
  Optional student_ids, teacher_ids;
  int64_t positive_offset;
  double temperature = 0;

  Rows(const Tensor& student, const Tensor& teacher, const Tensor& temperature, const Optional& student_ids,
       const Optional& teacher_ids, int64_t positive_offset)
      : student(in_rows(student)), teacher(in_rows(teacher)), positive_offset(positive_offset) {
    STD_TORCH_CHECK(
        student.dim() == 2 && teacher.dim() == 2 && student.scalar_type() == teacher.scalar_type() &&
            student.size(1) == teacher.size(1) && student.get_device() == teacher.get_device() &&
            positive_offset >= 0 && positive_offset + student.size(0) <= teacher.size(0),
        "lfcc: student and teacher rows do not fit each other");
    const auto check_ids = [&](const Tensor& ids, int64_t count) {
      STD_TORCH_CHECK(
          ids.scalar_type() == ScalarType::Long && ids.numel() == count && ids.get_device() == student.get_device(),
          "lfcc: ids do not fit the rows");
    };
    STD_TORCH_CHECK(student_ids.has_value() == teacher_ids.has_value(), "lfcc: ids on one side only");
    if (student_ids) {
      check_ids(*student_ids, student.size(0)), check_ids(*teacher_ids, teacher.size(0));
      this->student_ids = torch::stable::contiguous(*student_ids);
      this->teacher_ids = torch::stable::contiguous(*teacher_ids);
    }
    STD_TORCH_CHECK(
        temperature.numel() == 1 && (temperature.is_cpu() || temperature.get_device() == student.get_device()) &&
            (temperature.scalar_type() == ScalarType::Double || temperature.scalar_type() == ScalarType::Float),
        "lfcc: temperature must be one float64 or float32 number, on the CPU or beside the rows");
    if (!temperature.is_cpu()) return;
    this->temperature = temperature.scalar_type() == ScalarType::Double ? *read<double>(temperature)
                                                                        : double(*read<float>(temperature));
    STD_TORCH_CHECK(
        this->temperature > 0 && std::isfinite(this->temperature), "info_nce: temperature is ", this->temperature,
        "; expected a positive finite number, as 0.1");
  }

  static Tensor in_rows(const Tensor& t) {
    return t.stride(1) == 1 && t.stride(0) >= t.size(1) ? t : torch::stable::contiguous(t);
  }

  const int64_t* student_id() const { return student_ids ? read<int64_t>(*student_ids) : nullptr; }
  const int64_t* teacher_id() const { return teacher_ids ? read<int64_t>(*teacher_ids) : nullptr; }

  Tensor empty(std::initializer_list<int64_t> size) const {
    return torch::stable::new_empty(student, size, sum_type(student.scalar_type()));
  }

  // Numbers of each row: upstream gradients, log-sum-exps.
  void check_numbers(const Tensor& values) const {
    STD_TORCH_CHECK(
        values.scalar_type() == sum_type(student.scalar_type()) && values.numel() == student.size(0) &&
            values.get_device() == student.get_device(),
        "lfcc: gradients or log-sum-exps do not fit the rows");
  }
};

}  // namespace lfcc
