// Operations of the lanes of a warp, and asynchronous copies to shared memory, which complete when they are waited for.
#pragma once

#include <type_traits>

#include "block.h"

namespace lfcc::emulation {

// ---- votes and shuffles

inline void count_votes(Warp& warp, uint32_t mask) {
  uint64_t votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= warp.values[i] << i;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) warp.results[i] = votes;
}
inline constexpr Operation ballot = {"__ballot_sync", count_votes}, any = {"__any_sync", count_votes},
                           all = {"__all_sync", count_votes}, sync = {"__syncwarp", count_votes};

inline uint32_t vote(const Operation& operation, uint32_t mask, bool predicate, int line) {
  Warp& warp = *machine.warp;
  const int lane = machine.lane();
  warp.values[lane] = predicate;
  meet(operation, mask, line);
  return static_cast<uint32_t>(warp.results[lane]);
}

// The value of a lane outside the mask is NaN.
inline void exchange(Warp& warp, uint32_t mask) {
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) warp.results[i] = mask >> warp.sources[i] & 1 ? warp.values[warp.sources[i]] : ~uint64_t(0);
}
inline constexpr Operation shuffle_from = {"__shfl_sync", exchange}, shuffle_xor = {"__shfl_xor_sync", exchange},
                           shuffle_down = {"__shfl_down_sync", exchange}, shuffle_up = {"__shfl_up_sync", exchange};

template <typename T>
T shuffle(const Operation& operation, uint32_t mask, T value, int source, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Warp& warp = *machine.warp;
  const int lane = machine.lane();
  std::memcpy(&warp.values[lane], &value, sizeof value);
  warp.sources[lane] = source;
  meet(operation, mask, line);
  std::memcpy(&value, &warp.results[lane], sizeof value);
  return value;
}

// ---- matrices

// Lane 8 m + r has the address of row r of matrix m; result m of lane t is the pair 2 (t % 4) of row t / 4.
inline void give_matrices(Warp& warp, uint32_t) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) warp.matrices[lane][m] = warp.rows[8 * m + lane / 4][lane % 4];
}
// The pair is in column t / 4.
inline void give_columns(Warp& warp, uint32_t) {
  const auto element = [&](int m, int row, int column) {
    return warp.rows[8 * m + row][column / 2] >> column % 2 * 16 & 0xffffu;
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int row = 2 * (lane % 4), column = lane / 4;
      warp.matrices[lane][m] = element(m, row, column) | element(m, row + 1, column) << 16;
    }
}
inline constexpr Operation ldmatrix = {"load_matrices", give_matrices},
                           ldmatrix_transposed = {"load_matrices_transposed", give_columns};

inline void load(const Operation& operation, uint32_t (&result)[4], const void* row, int line) {
  if (reinterpret_cast<uintptr_t>(row) % 16 || !in_shared(row, 16))
    fail("%s of line %d: %p is not 16 aligned bytes of shared memory", operation.name, line, row);
  Warp& warp = *machine.warp;
  const int lane = machine.lane();
  std::memcpy(&warp.rows[lane], row, 16);  // now: the arrival of other lanes does not make their writes visible
  meet_all(operation, line);
  std::memcpy(result, &warp.matrices[lane], sizeof result);
}

typedef float Four __attribute__((vector_size(16), may_alias));

// d = a b, four rows at a time. The hardware adds in another order, and truncates instead of rounding.
template <int depth>
__attribute__((no_sanitize("address", "undefined"))) void multiply(Warp& warp, uint32_t) {
  const auto* b = reinterpret_cast<const Four(*)[2]>(warp.b);
  for (int row = 0; row < 16; row += 4) {
    Four sums[4][2] = {};
    for (int k = 0; k < depth; ++k)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        sums[i][0] += warp.a[row + i][k] * b[k][0];
        sums[i][1] += warp.a[row + i][k] * b[k][1];
      }
    std::memcpy(warp.d[row], sums, sizeof sums);
  }
}
inline constexpr Operation mma_bfloat16 = {"multiply_add of bfloat16", multiply<16>},
                           mma_half = {"multiply_add of half", multiply<16>},
                           mma_tf32 = {"multiply_add of TF32", multiply<8>};

inline void add_product(const Operation& operation, float (&d)[4], int line) {
  Warp& warp = *machine.warp;
  const int lane = machine.lane(), g = lane / 4, t = lane % 4;
  meet_all(operation, line);
  d[0] += warp.d[g][2 * t];
  d[1] += warp.d[g][2 * t + 1];
  d[2] += warp.d[g + 8][2 * t];
  d[3] += warp.d[g + 8][2 * t + 1];
}

// Layouts of PTX's m16n8k16 and m16n8k8, as in ptx.cuh.
template <typename Low, typename High>
void multiply_add_pairs(
    const Operation& operation, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Low& low,
    const High& high, int line) {
  Warp& warp = *machine.warp;
  const int lane = machine.lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    float* to = &warp.a[g + i % 2 * 8][2 * t + i / 2 * 8];
    to[0] = low(a[i]), to[1] = high(a[i]);
  }
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i * 8;
    warp.b[row][g] = low(b[i]), warp.b[row + 1][g] = high(b[i]);
  }
  add_product(operation, d, line);
}

inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  Warp& warp = *machine.warp;
  const int lane = machine.lane(), g = lane / 4, t = lane % 4;
  const auto value = [](uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); };  // other bits are ignored
  for (int i = 0; i < 4; ++i) warp.a[g + i % 2 * 8][t + i / 2 * 4] = value(a[i]);
  for (int i = 0; i < 2; ++i) warp.b[t + i * 4][g] = value(b[i]);
  add_product(mma_tf32, d, line);
}

// ---- asynchronous copies

// The source is read now, and the destination is written when the copy is waited for; until then it is NaN.
inline void copy_async(void* shared, const void* global, unsigned bytes, int line) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || !in_shared(shared, bytes))
    fail("copy_async_%u of line %d: %p is not as many aligned bytes of shared memory", bytes, line, shared);
  if (reinterpret_cast<uintptr_t>(global) % bytes || in_shared(global, bytes))
    fail("copy_async_%u of line %d: %p is not as many aligned bytes of global memory", bytes, line, global);
  Copy& copy = machine.thread->copies.emplace_back();
  copy.to = static_cast<unsigned char*>(shared);
  copy.bytes = bytes;
  copy.group = machine.thread->groups;
  std::memcpy(copy.data.data(), global, bytes);
  std::memset(shared, 0xff, bytes);
}

inline void wait_copies(unsigned pending) {
  Thread& thread = *machine.thread;
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group + pending < thread.groups; ++copy)
    std::memcpy(copy->to, copy->data.data(), copy->bytes);
  thread.copies.erase(thread.copies.begin(), copy);
}

}  // namespace lfcc::emulation
