// Runs the blocks of a grid one after the other, with every thread of a block as a fiber.
//
// A warp runs until each of its threads waits at a barrier or has finished, then the next warp of the schedule runs;
// within a warp a thread runs until it synchronises with other lanes. So an access that lacks a barrier comes too early
// in some schedule. An error ends the launch with an exception.
#pragma once

#include <link.h>

#include <cstdarg>
#include <cstring>
#include <new>
#include <stdexcept>

#include "machine.h"

namespace lfcc::emulation {

// ---- threads

// Called by the running thread; ends the launch.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  machine.error = located("thread " + std::to_string(machine.thread->number) + ": " + text);
  switch_fiber(machine.thread->fiber, machine.scheduler);
  __builtin_unreachable();  // it is not resumed
}

inline void enter(Thread& thread) {
  machine.thread = &thread;
  machine.thread_index.x = thread.number;
}

// The thread waits: another thread of its warp continues, or the scheduler if none can.
inline void leave(const char* waits_in, int line) {
  Thread& thread = *machine.thread;
  Warp& warp = *machine.warp;
  thread.waits_in = waits_in;
  thread.line = line;
  if (!warp.ready) return switch_fiber(thread.fiber, machine.scheduler);
  Thread& next = machine.threads[thread.number / 32 * 32 + warp.next_lane()];
  enter(next);
  switch_fiber(thread.fiber, next.fiber);
}

inline void thread_main() {
  begin_fiber();
  for (;;) {
    machine.kernel(machine.arguments);
    Thread& thread = *machine.thread;
    if (!thread.copies.empty()) fail("%zu asynchronous copies were not waited for", thread.copies.size());
    thread.groups = 0;
    machine.warp->running &= ~(1u << machine.lane());
    --machine.running;
    leave("the end", 0);  // resumed for the next block
  }
}

// All threads must reach the same barrier, except those that have finished.
inline void barrier(int line) {
  if (machine.at_barrier++ == 0) machine.barrier_line = line;
  if (machine.barrier_line != line)
    fail("__syncthreads of line %d, where others wait in that of line %d", line, machine.barrier_line);
  leave("__syncthreads", line);
}

// The lanes of the warp wait for each other; the last one computes the results of all and continues first.
inline void meet(const Operation& operation, uint32_t mask, int line) {
  Warp& warp = *machine.warp;
  const uint32_t self = 1u << machine.lane();
  mask &= warp.lanes;
  if (!(mask & self)) fail("%s of line %d with mask %#x, which leaves it out", operation.name, line, mask);
  unsigned i = 0;
  while (i < warp.pending && warp.meetings[i].mask != mask) ++i;
  if (i == warp.pending) warp.meetings[warp.pending++] = {&operation, mask, 0};
  Meeting& meeting = warp.meetings[i];
  if (meeting.operation != &operation)
    fail("%s of line %d, where other lanes wait in %s", operation.name, line, meeting.operation->name);
  meeting.arrived |= self;
  if (meeting.arrived != mask) return leave(operation.name, line);
  meeting = warp.meetings[--warp.pending];
  operation.act(warp, mask);
  warp.ready |= mask & ~self;
}

// All 32 lanes synchronise, as the matrix instructions require.
inline void meet_all(const Operation& operation, int line) {
  if (machine.warp->lanes != ~0u) fail("%s of line %d in a warp of less than 32 lanes", operation.name, line);
  meet(operation, ~0u, line);
}

// ---- shared memory

// __shared__ makes a variable thread_local, so that all of them are in one known place: the library's thread-local
// storage, which contains nothing else.
inline thread_local unsigned char shared_mark;

struct Storage {
  unsigned char* begin;
  size_t bytes;
};

// The storage of the library with the mark, for this operating system thread.
inline Storage find_static_shared() {
  shared_mark = 0;  // allocates the storage
  Storage found = {};
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* result) {
        auto* begin = static_cast<unsigned char*>(library->dlpi_tls_data);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const ElfW(Phdr)& part = library->dlpi_phdr[i];
          if (part.p_type != PT_TLS || !begin || &shared_mark < begin || &shared_mark >= begin + part.p_memsz) continue;
          *static_cast<Storage*>(result) = {begin, part.p_memsz};
          return 1;
        }
        return 0;
      },
      &found);
  if (!found.begin) throw std::runtime_error("lfcc emulation: shared memory was not found");
  return found;
}

inline bool in_shared(const void* pointer, size_t bytes) {
  const auto inside = [&](const unsigned char* begin, size_t length) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(begin);
    return offset < length && bytes <= length - offset;
  };
  return inside(machine.shared, machine.shared_bytes) || inside(machine.static_shared, machine.static_shared_bytes);
}

// ---- blocks

inline std::string waiting() {
  std::map<std::pair<std::string, int>, int> counts;
  for (size_t i = 0; i < machine.threads.size(); ++i) {
    const Thread& thread = machine.threads[i];
    if (machine.warps[i / 32].lanes >> i % 32 & 1) ++counts[{thread.waits_in, thread.line}];
  }
  std::string text;
  for (const auto& [place, count] : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads in " + place.first;
    if (place.second) text += " of line " + std::to_string(place.second);
  }
  return text;
}

inline void run_block() {
  Machine& m = machine;
  std::memset(m.static_shared, 0xff, m.static_shared_bytes);  // NaN
  std::memset(m.shared, 0xff, m.shared_bytes);
  for (Warp& warp : m.warps) warp.running = warp.lanes, warp.pending = 0;
  m.running = m.block_size.x;
  while (m.running) {
    m.at_barrier = 0;
    order_threads();
    for (unsigned number : m.order) {
      m.warp = &m.warps[number];
      if (!m.warp->ready) continue;
      Thread& thread = m.threads[number * 32 + m.warp->next_lane()];
      enter(thread);
      switch_fiber(m.scheduler, thread.fiber);
      if (!m.error.empty()) throw std::runtime_error(std::exchange(m.error, {}));
    }
    if (m.at_barrier != m.running) throw std::runtime_error(located("deadlock, " + waiting()));
  }
}

inline void run_grid(
    const char* name, dim3 grid, int threads, size_t shared_bytes, void (*kernel)(const void*), const void* arguments) {
  Machine& m = machine;
  const std::lock_guard lock(m.mutex);
  if (threads < 1 || threads > most_threads || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string("lfcc: ") + name + ": invalid configuration argument");
  if (shared_bytes > most_shared_bytes)
    throw std::runtime_error(
        std::string("lfcc: ") + name + ": " + std::to_string(shared_bytes) + " bytes of dynamic shared memory");
  m.shared_bytes_of[name] = std::max(m.shared_bytes_of[name], shared_bytes);
  m.name = name;
  m.kernel = kernel;
  m.arguments = arguments;
  m.random = 0x9e3779b97f4a7c15u * (m.schedule + 1);
  m.grid_size = grid;
  m.block_size = dim3(static_cast<unsigned>(threads));
  static const Storage storage = find_static_shared();
  static const ptrdiff_t mark = &shared_mark - storage.begin;  // the same for all threads
  m.static_shared = &shared_mark - mark;
  m.static_shared_bytes = storage.bytes;

  m.order.resize((threads + 31) / 32);
  for (unsigned i = 0; i < m.warps.size(); ++i) {
    const int lanes = threads - static_cast<int>(i) * 32;
    m.warps[i].lanes = lanes >= 32 ? ~0u : lanes > 0 ? (1u << lanes) - 1 : 0;
  }
  m.threads.reserve(most_threads);  // a fiber that was entered cannot move
  while (m.threads.size() < static_cast<size_t>(threads)) {
    Thread& thread = m.threads.emplace_back();
    thread.number = static_cast<unsigned>(m.threads.size() - 1);
    allocate_stack(thread.fiber);
  }
  for (Thread& thread : m.threads) {
    if (std::exchange(thread.prepared, true)) continue;
    thread.copies.clear();
    thread.groups = 0;
    prepare_fiber(thread.fiber, thread_main, thread.number);
  }

  // Exactly as many bytes as requested, so that AddressSanitizer detects an access past them.
  struct Shared {
    unsigned char* bytes;
    explicit Shared(size_t count) : bytes(new (std::align_val_t(128)) unsigned char[count]) {}
    ~Shared() { ::operator delete[](bytes, std::align_val_t(128)); }
  } shared(shared_bytes);
  m.shared = shared.bytes;
  m.shared_bytes = shared_bytes;

  std::vector<unsigned> blocks;
  order(blocks, static_cast<size_t>(grid.x) * grid.y * grid.z);
  try {
    for (unsigned block : blocks) {
      m.block_index = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
      run_block();
    }
  } catch (...) {  // some threads have not finished
    for (Thread& thread : m.threads) thread.prepared = false;
    throw;
  }
}

}  // namespace lfcc::emulation
