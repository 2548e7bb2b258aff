// Work shared over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace lfcc {

// Calls body(begin, end) on ranges that cover [0, units), in parallel where a unit's `work`, in values read or
// multiplied, is enough to be worth waking a thread for.
template <typename Body>
void parallel_for(int64_t units, int64_t work, const Body& body) {
  constexpr int64_t WORTH_A_THREAD = 1 << 15;
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, work)), body);
}

}  // namespace lfcc
