// Distribution of work over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace lfcc {

// Assigns ranges of [0, units) to the threads, a few units at a time, because the cores of a hybrid or shared machine
// are not equally fast.
class Ranges {
 public:
  Ranges(int64_t units, int64_t step) : units(units), step(step) {}

  // Returns whether there is another range, [*begin, *end).
  bool take(int64_t* begin, int64_t* end) {
    *begin = next.fetch_add(step, std::memory_order_relaxed);
    *end = std::min(units, *begin + step);
    return *begin < units;
  }

 private:
  const int64_t units, step;
  std::atomic<int64_t> next{0};
};

// Calls worker(ranges) on as many threads as pay off if a unit reads or multiplies `work` values. Workers take ranges
// until none is left.
template <typename Worker>
void distribute(int64_t units, int64_t work, const Worker& worker) {
  constexpr int64_t MIN_WORK_PER_THREAD = 1 << 15, RANGES_PER_THREAD = 8;
  const int64_t grain = std::max<int64_t>(1, MIN_WORK_PER_THREAD / std::max<int64_t>(1, work));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (units + grain - 1) / grain);
  Ranges ranges(units, threads > 1 ? std::max<int64_t>(1, units / (threads * RANGES_PER_THREAD)) : units);
  if (threads <= 1) return worker(ranges);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) worker(ranges);
  });
}

// Calls body(begin, end) in the same way on ranges that cover [0, units).
template <typename Body>
void parallel_for(int64_t units, int64_t work, const Body& body) {
  distribute(units, work, [&](Ranges& ranges) {
    for (int64_t begin, end; ranges.take(&begin, &end);) body(begin, end);
  });
}

}  // namespace lfcc
