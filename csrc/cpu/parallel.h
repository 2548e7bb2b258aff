// Work shared over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace lfcc {

// Hands out ranges of [0, units) to the threads, a few units at a time: the cores of a hybrid or a shared machine are
// not equally fast.
class Ranges {
 public:
  Ranges(int64_t units, int64_t step) : units(units), step(step) {}

  // Whether there is another range, [*begin, *end).
  bool take(int64_t* begin, int64_t* end) {
    *begin = next.fetch_add(step, std::memory_order_relaxed);
    *end = std::min(units, *begin + step);
    return *begin < units;
  }

 private:
  const int64_t units, step;
  std::atomic<int64_t> next{0};
};

// Calls worker(ranges) on as many threads as are worth waking for units of `work` values read or multiplied each; the
// workers take ranges until none is left.
template <typename Worker>
void share_out(int64_t units, int64_t work, const Worker& worker) {
  constexpr int64_t WORTH_A_THREAD = 1 << 15, RANGES_A_THREAD = 8;
  const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, work));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (units + grain - 1) / grain);
  Ranges ranges(units, threads > 1 ? std::max<int64_t>(1, units / (threads * RANGES_A_THREAD)) : units);
  if (threads <= 1) return worker(ranges);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) worker(ranges);
  });
}

// Calls body(begin, end) on ranges that cover [0, units), likewise.
template <typename Body>
void parallel_for(int64_t units, int64_t work, const Body& body) {
  share_out(units, work, [&](Ranges& ranges) {
    for (int64_t begin, end; ranges.take(&begin, &end);) body(begin, end);
  });
}

}  // namespace lfcc
