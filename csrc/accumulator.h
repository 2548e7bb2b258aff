#pragma once

namespace lfcc {

// The type that accumulates values of T.
template <typename T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <typename T>
using acc_t = typename accumulator<T>::type;

}  // namespace lfcc
