// Argument checks and views shared by the ops of all backends, on libtorch's stable ABI.
//
// Python callers were checked in lfcc_kernels/functional.py. These checks protect memory from C++ callers and from
// direct calls of torch.ops.lfcc. A check that passes costs a comparison; messages are built on failure only.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
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

// An argument of an op, for messages: "lfcc::lowpass: x", or "lfcc::lowpass_foreach: maps[2]" for an element of a list.
struct Argument {
  const char *op, *name;
  int64_t index = -1;  // -1 if the argument is not a list

  Argument named(const char* other) const { return {op, other, index}; }
  Argument at(int64_t n) const { return {op, name, index < 0 ? index : n}; }
};

// Throws "lfcc::op: name" followed by the parts.
template <typename... Parts>
[[noreturn]] void fail(const Argument& argument, const Parts&... parts) {
  std::ostringstream message;
  message << "lfcc::" << argument.op << ": " << argument.name;
  if (argument.index >= 0) message << '[' << argument.index << ']';
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string to_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return torch::headeronly::toString(dtype);
  }
}

template <typename Range>
std::string join(const Range& values, const char* open, const char* close) {
  std::ostringstream text;
  text << open;
  const char* separator = "";
  for (int64_t value : values) text << separator << value, separator = ", ";
  text << close;
  return text.str();
}
inline std::string to_string(const Sizes& sizes) { return join(sizes, "[", "]"); }

// As in "(4, 8) float32" or "(4, 8) float32 on cuda:0".
inline std::string to_string(const Tensor& t) {
  std::string text = join(t.sizes(), "(", t.dim() == 1 ? ",) " : ") ") + to_string(t.scalar_type());
  return t.is_cpu() ? text : text + " on cuda:" + std::to_string(t.get_device());
}

[[noreturn]] inline void fail_dtype(const Argument& argument, const Tensor& t) {
  fail(argument, " is ", to_string(t), ", expected float64, float32, bfloat16 or float16");
}

// The dtype in which elements of `dtype` are accumulated.
inline ScalarType acc_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t count_cells(const Sizes& scales) {
  int64_t cells = 0;
  for (int64_t scale : scales) cells += scale * scale;
  return cells;
}

inline void check_rank(const Argument& argument, int64_t dims) {
  if (dims != 3 && dims != 4)
    fail(argument, " has ", dims, " dimensions, expected 4 for a map (B, C, H, W) or 3 for tokens (B, N, C)");
}

// The map, copied if neither channels nor columns are contiguous: kernels read the other layouts in place.
inline Tensor readable(const Argument& argument, const Tensor& x) {
  check_rank(argument, x.dim());
  const int64_t channel_stride = x.stride(x.dim() == 4 ? 1 : 2), column_stride = x.stride(x.dim() == 4 ? 3 : 1);
  return channel_stride == 1 || column_stride == 1 ? x : torch::stable::contiguous(x);
}

// An uninitialised gradient of a map of this size.
inline Tensor empty_map(const Argument& argument, const Tensor& grad, const Sizes& size, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  check_rank(argument, static_cast<int64_t>(size.size()));
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(size, grad.scalar_type(), std::nullopt, grad.device(), std::nullopt, format);
}

// A map (B, C, H, W), or tokens (B, N, C) viewed as one. The first pixel is `offset` elements after the tensor's data;
// strides are in elements.
struct MapShape {
  Argument argument;
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t offset;

  MapShape(const Argument& argument, const Tensor& x, const Sizes& grid, int64_t prefix_tokens) : argument(argument) {
    batch = x.size(0), stride_b = x.stride(0);
    if (x.dim() == 4) {
      if (!grid.empty() || prefix_tokens != 0)
        fail(argument, " is a map (B, C, H, W), which takes no grid and no prefix_tokens, but got grid=",
             to_string(grid), " and prefix_tokens=", prefix_tokens);
      channels = x.size(1), height = x.size(2), width = x.size(3);
      stride_c = x.stride(1), stride_h = x.stride(2), stride_w = x.stride(3);
      offset = 0;
    } else {
      if (grid.size() != 2 || grid[0] < 1 || grid[1] < 1)
        fail(argument.named("grid"), " is ", to_string(grid), ", expected [H, W] of the tokens, both positive");
      if (prefix_tokens < 0) fail(argument.named("prefix_tokens"), " is ", prefix_tokens, ", expected 0 or more");
      if (x.size(1) != prefix_tokens + grid[0] * grid[1])
        fail(argument, " has ", x.size(1), " tokens, expected ", prefix_tokens + grid[0] * grid[1],
             " for grid=", to_string(grid), " and prefix_tokens=", prefix_tokens);
      channels = x.size(2), height = grid[0], width = grid[1];
      stride_c = x.stride(2), stride_h = width * x.stride(1), stride_w = x.stride(1);
      offset = prefix_tokens * x.stride(1);
    }
  }

  // The gradient of the output (B, cells, C), which has the map's dtype.
  void check_gradient(const Argument& argument, const Tensor& grad, const Sizes& scales, ScalarType dtype) const {
    const int64_t cells = count_cells(scales);
    if (grad.dim() != 3 || grad.size(0) != batch || grad.size(1) != cells || grad.size(2) != channels ||
        grad.scalar_type() != dtype)
      fail(argument, " is ", to_string(grad), ", expected (", batch, ", ", cells, ", ", channels, ") ",
           to_string(dtype));
  }

  // Filters of all scales, stacked: (sum of scales, H) and (sum of scales, W) of the accumulator's dtype.
  void check_filters(const Sizes& scales, const Optional& rows, const Optional& cols, ScalarType dtype) const {
    int64_t filters = 0;
    for (int64_t scale : scales) {
      if (scale < 1 || scale > height || scale > width)
        fail(argument.named("scales"), " has ", scale, ", expected 1 to ", std::min(height, width), " for a map of ",
             height, " x ", width);
      filters += scale;
    }
    if (rows.has_value() != cols.has_value())
      fail(argument.named(rows ? "col_filters" : "row_filters"), " is missing, expected both filters or neither");
    const auto check = [&](const char* name, const Tensor& matrix, int64_t size) {
      if (matrix.scalar_type() != acc_dtype(dtype) || matrix.dim() != 2 || matrix.size(0) != filters ||
          matrix.size(1) != size)
        fail(argument.named(name), " is ", to_string(matrix), ", expected (", filters, ", ", size, ") ",
             to_string(acc_dtype(dtype)));
    };
    if (rows) check("row_filters", *rows, height), check("col_filters", *cols, width);
  }
};

// The arguments of the three info_nce ops, with rows that kernels read in place. A temperature on the CPU is checked
// and read. One on a GPU is neither, because reading it would synchronise.
struct Rows {
  const char* op;
  Tensor student, teacher;
  Optional student_ids, teacher_ids;
  int64_t positive_offset;
  double temperature = 0;

  Rows(const char* op, const Tensor& student, const Tensor& teacher, const Tensor& temperature,
       const Optional& student_ids, const Optional& teacher_ids, int64_t positive_offset)
      : op(op), student(in_rows({op, "student"}, student)), teacher(in_rows({op, "teacher"}, teacher)),
        positive_offset(positive_offset) {
    const auto fail_pair = [&](const char* what) {
      fail({op, "student"}, " is ", to_string(student), ", teacher is ", to_string(teacher), "; both need the same ",
           what);
    };
    if (teacher.scalar_type() != student.scalar_type()) fail_pair("dtype");
    if (teacher.size(1) != student.size(1)) fail_pair("width");
    if (teacher.get_device() != student.get_device()) fail_pair("device");
    if (positive_offset < 0) fail({op, "positive_offset"}, " is ", positive_offset, ", expected 0 or more");
    if (teacher.size(0) < positive_offset + student.size(0))
      fail({op, "teacher"}, " has ", teacher.size(0), " rows, expected at least ", positive_offset + student.size(0),
           " for positive_offset=", positive_offset, " and ", student.size(0), " student rows");
    if (student_ids.has_value() != teacher_ids.has_value())
      fail({op, student_ids ? "teacher_ids" : "student_ids"}, " is missing, expected the ids of both sides or neither");
    if (student_ids) {
      check_vector("student_ids", *student_ids, student.size(0), ScalarType::Long);
      check_vector("teacher_ids", *teacher_ids, teacher.size(0), ScalarType::Long);
      this->student_ids = torch::stable::contiguous(*student_ids);
      this->teacher_ids = torch::stable::contiguous(*teacher_ids);
    }
    read_temperature(temperature);
  }

  const int64_t* student_id() const { return student_ids ? read<int64_t>(*student_ids) : nullptr; }
  const int64_t* teacher_id() const { return teacher_ids ? read<int64_t>(*teacher_ids) : nullptr; }

  Tensor empty(std::initializer_list<int64_t> size) const {
    return torch::stable::new_empty(student, size, acc_dtype(student.scalar_type()));
  }

  // One value per student row: upstream gradients, log-sum-exps.
  void check_per_row(const char* name, const Tensor& values) const {
    check_vector(name, values, student.size(0), acc_dtype(student.scalar_type()));
  }

 private:
  static Tensor in_rows(const Argument& argument, const Tensor& t) {
    if (t.dim() != 2) fail(argument, " is ", to_string(t), ", expected two dimensions, (rows, width)");
    return t.stride(1) == 1 && t.stride(0) >= t.size(1) ? t : torch::stable::contiguous(t);
  }

  void check_vector(const char* name, const Tensor& values, int64_t count, ScalarType dtype) const {
    if (values.scalar_type() != dtype || values.numel() != count)
      fail({op, name}, " is ", to_string(values), ", expected (", count, ",) ", to_string(dtype));
    if (values.get_device() != student.get_device())
      fail({op, name}, " is ", to_string(values), ", student is ", to_string(student), "; both need the same device");
  }

  void read_temperature(const Tensor& t) {
    if (t.numel() != 1 || (t.scalar_type() != ScalarType::Double && t.scalar_type() != ScalarType::Float))
      fail({op, "temperature"}, " is ", to_string(t), ", expected one value of float64 or float32");
    if (!t.is_cpu()) {
      if (t.get_device() != student.get_device())
        fail({op, "temperature"}, " is ", to_string(t), ", student is ", to_string(student),
             "; expected a temperature on the CPU or on the student's device");
      return;
    }
    temperature = t.scalar_type() == ScalarType::Double ? *read<double>(t) : double(*read<float>(t));
    if (!(temperature > 0 && std::isfinite(temperature)))
      fail({op, "temperature"}, " is ", temperature, "; expected a positive finite number, such as 0.1");
  }
};

}  // namespace lfcc
