// Work shared over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

namespace lfcc {

// Calls body(begin, end) on ranges that cover [0, units), in parallel; each unit is worth a thread of its own.
template <typename Body>
void parallel_for(int64_t units, const Body& body) {
  torch::stable::parallel_for(0, units, 1, body);
}

}  // namespace lfcc
