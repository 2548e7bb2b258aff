// The state of the emulated machine: its threads, its warps, and the order in which they run.
#pragma once

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "numbers.h"

namespace lfcc::emulation {

// An asynchronous copy of 16, 8 or 4 bytes to shared memory.
struct Copy {
  unsigned char* to;
  unsigned bytes, group;
  std::array<unsigned char, 16> data;
};

struct Thread {
  Fiber fiber;
  unsigned number = 0;
  bool prepared = false;  // its thread has not begun or has ended
  const char* waits_in = nullptr;
  int line = 0;
  std::vector<Copy> copies;
  unsigned groups = 0;  // committed groups of copies
};

struct Warp;

// An operation of several lanes, run when the last of them has arrived.
struct Operation {
  const char* name;
  void (*act)(Warp& warp, uint32_t mask);
};

struct Meeting {
  const Operation* operation;
  uint32_t mask, arrived;
};

struct alignas(64) Warp {
  uint32_t lanes = 0;    // lanes in the block
  uint32_t running = 0;  // not finished
  uint32_t ready = 0;    // not waiting
  int first = 0;         // the lane that runs first, and whether the others follow in descending order
  bool descending = false;
  unsigned pending = 0;
  std::array<Meeting, 32> meetings;

  // Inputs and results of the lanes. A lane's entries are valid until its next operation.
  std::array<uint64_t, 32> values, results;
  std::array<int, 32> sources;
  alignas(32) std::array<std::array<uint32_t, 4>, 32> rows, matrices;
  alignas(32) float a[16][16], b[16][8], d[16][8];

  int next_lane() {
    const uint32_t turned = std::rotr(ready, first);
    const int lane = ((descending ? 31 - std::countl_zero(turned) : std::countr_zero(turned)) + first) % 32;
    ready &= ~(1u << lane);
    return lane;
  }
};

constexpr int most_threads = 1024;
constexpr size_t most_shared_bytes = 227 << 10;

// The machine of the library, locked during a launch.
struct Machine {
  std::mutex mutex;
  unsigned schedule = 0;
  uint64_t random = 0;
  std::map<std::string, size_t> shared_bytes_of;  // the largest dynamic shared memory of each kernel, until it is read

  const char* name = nullptr;
  void (*kernel)(const void* arguments) = nullptr;
  const void* arguments = nullptr;

  Fiber scheduler;
  std::vector<Thread> threads;
  std::array<Warp, most_threads / 32> warps;
  std::vector<unsigned> order;  // order of the warps
  Thread* thread = nullptr;
  Warp* warp = nullptr;
  unsigned running = 0, at_barrier = 0;
  int barrier_line = 0;
  unsigned char *shared = nullptr, *static_shared = nullptr;
  size_t shared_bytes = 0, static_shared_bytes = 0;
  uint3 thread_index{}, block_index{};
  dim3 block_size, grid_size;
  std::string error;

  int lane() const { return static_cast<int>(thread->number % 32); }
};
inline Machine machine;

inline std::string located(const std::string& what) {
  const Machine& m = machine;
  char where[160];
  std::snprintf(
      where, sizeof where, "block (%u, %u, %u), schedule %u: ", m.block_index.x, m.block_index.y, m.block_index.z,
      m.schedule);
  return std::string("lfcc emulation: ") + m.name + ", " + where + what;
}

inline unsigned random_below(unsigned count) {
  uint64_t& x = machine.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return static_cast<unsigned>((x >> 32) * count >> 32);
}

inline void order(std::vector<unsigned>& numbers, size_t count) {
  numbers.resize(count);
  std::iota(numbers.begin(), numbers.end(), 0u);
  if (machine.schedule == 1) std::reverse(numbers.begin(), numbers.end());
  if (machine.schedule > 1)
    for (size_t i = count; i > 1; --i) std::swap(numbers[i - 1], numbers[random_below(static_cast<unsigned>(i))]);
}

inline void order_threads() {
  order(machine.order, machine.order.size());
  for (unsigned number : machine.order) {
    Warp& warp = machine.warps[number];
    warp.first = machine.schedule > 1 ? static_cast<int>(random_below(32)) : 0;
    warp.descending = machine.schedule > 1 ? random_below(2) == 1 : machine.schedule == 1;
    warp.ready = warp.running;
  }
}

}  // namespace lfcc::emulation
