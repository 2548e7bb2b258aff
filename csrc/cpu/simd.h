// Shared by all CPU kernels: clones per instruction set, vectors of eight elements, dtype conversions, exp, streaming
// stores.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "accumulator.h"
#include "cpu/clones.h"

#define LFCC_INLINE inline __attribute__((always_inline))
#define LFCC_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace lfcc {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename To, typename From>
LFCC_INLINE To bit_cast(From value) {
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

LFCC_INLINE double load(double x) { return x; }
LFCC_INLINE float load(float x) { return x; }
LFCC_INLINE float load(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
// Without branches, so that loops over halves vectorise on every instruction set.
LFCC_INLINE float load(Half x) {
  const uint32_t exponent_mantissa = uint32_t(x.bits & 0x7fff) << 13;
  float value = bit_cast<float>(exponent_mantissa) * 0x1p112f;  // rebias the exponent; exact for subnormals too
  const uint32_t special = exponent_mantissa >= (0x7c00u << 13) ? 0x7f800000u : 0u;  // infinity and NaN
  return bit_cast<float>(bit_cast<uint32_t>(value) | special | uint32_t(x.bits & 0x8000) << 16);
}

LFCC_INLINE void store(double* p, double x) { *p = x; }
LFCC_INLINE void store(float* p, float x) { *p = x; }
// Round to nearest even; a NaN keeps its sign and becomes quiet.
LFCC_INLINE void store(BFloat16* p, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  p->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
LFCC_INLINE void store(Half* p, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the adder round a subnormal half to its last place.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // rounds past the largest half
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  p->bits = uint16_t(result | sign);
}

// Eight elements at any alignment; the compiler splits them for narrower registers.
template <typename A>
struct vector_of {
  typedef A type __attribute__((vector_size(8 * sizeof(A)), aligned(sizeof(A)), may_alias));
};
template <typename A>
using vec = typename vector_of<A>::type;
constexpr int64_t VEC = 8;

template <typename A>
LFCC_INLINE vec<A> load_vector(const A* p) {
  return *reinterpret_cast<const vec<A>*>(p);
}
template <typename A>
LFCC_INLINE void store_vector(A* p, const vec<A>& v) {
  *reinterpret_cast<vec<A>*>(p) = v;
}
template <typename A>
LFCC_INLINE A sum_elements(const vec<A>& v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

// Calls body(N, first) for runs of up to eight that cover [0, count), the last run first. N is a compile-time constant,
// so N sums stay in registers and their chains of additions overlap.
template <typename Body>
LFCC_INLINE void for_runs(int64_t count, const Body& body) {
  for (; count > 8; count -= 8) body(std::integral_constant<int, 8>(), count - 8);
  switch (count) {
    case 1: return body(std::integral_constant<int, 1>(), 0);
    case 2: return body(std::integral_constant<int, 2>(), 0);
    case 3: return body(std::integral_constant<int, 3>(), 0);
    case 4: return body(std::integral_constant<int, 4>(), 0);
    case 5: return body(std::integral_constant<int, 5>(), 0);
    case 6: return body(std::integral_constant<int, 6>(), 0);
    case 7: return body(std::integral_constant<int, 7>(), 0);
    case 8: return body(std::integral_constant<int, 8>(), 0);
  }
}

// v with all but its first n elements set to zero, also if they are NaN.
template <typename A>
LFCC_INLINE vec<A> first_elements(const vec<A>& v, int64_t n) {
  using Bits = typename std::conditional<sizeof(A) == 8, int64_t, int32_t>::type;
  const vec<Bits> lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return reinterpret_cast<vec<A>>(reinterpret_cast<vec<Bits>>(v) & (lane < Bits(n)));
}

// rows[r][c] -> rows[c][r] in three rounds of interleaving.
template <typename A>
LFCC_INLINE void transpose8x8(vec<A> (&rows)[8]) {
  using Index = typename vector_of<typename std::conditional<sizeof(A) == 8, int64_t, int32_t>::type>::type;
  const Index low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
  for (int round = 0; round < 3; ++round) {
    vec<A> next[8];
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + 4], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 4], high);
    }
    for (int i = 0; i < 8; ++i) rows[i] = next[i];
  }
}

// exp for arguments up to about 88; 0 below -87.3, NaN for NaN. Cody-Waite reduction and the degree-5 polynomial of
// Cephes (S. Moshier, expf), within 2 ulp. Plain arithmetic, so loops over it vectorise.
LFCC_INLINE float fast_exp(float x) {
  const float bounded = x < -87.33654f ? -87.33654f : (x > 88.0f ? 88.0f : x);
  const float n = (bounded * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // round to nearest integer
  float f = bounded - n * 0.693359375f;
  f -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const float scaled = p * bit_cast<float>((int32_t(n) + 127) << 23);
  return x < -87.33654f ? 0.0f : scaled;
}
LFCC_INLINE double fast_exp(double x) { return std::exp(x); }

// Stores n values that are not read again soon, bypassing the caches if the type allows it: otherwise the lines of a
// large gradient would be read before they are written. Does not fence; see stream_fence.
template <typename T, typename A>
LFCC_INLINE void stream_out(T* destination, const A* source, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(destination + i, source[i]);
}
#if defined(__x86_64__)
template <>
LFCC_INLINE void stream_out(float* destination, const float* source, int64_t n) {
  int64_t i = 0;
  for (; i < n && (reinterpret_cast<uintptr_t>(destination + i) & 15); ++i) destination[i] = source[i];
  for (; i + 4 <= n; i += 4) _mm_stream_ps(destination + i, _mm_loadu_ps(source + i));
  for (; i < n; ++i) destination[i] = source[i];
}
LFCC_INLINE void stream_fence() { _mm_sfence(); }
#else
LFCC_INLINE void stream_fence() {}
#endif

#if defined(__x86_64__)
template <int QUADS>
LFCC_INLINE void stream_quads(float* destination, const float* row, int64_t quads, int64_t times) {
  if constexpr (QUADS > 1)
    if (quads < QUADS) return stream_quads<QUADS - 1>(destination, row, quads, times);
  __m128 values[QUADS];
  for (int q = 0; q < QUADS; ++q) values[q] = _mm_loadu_ps(row + 4 * q);
  for (; times > 0; --times, destination += 4 * QUADS)
    for (int q = 0; q < QUADS; ++q) _mm_stream_ps(destination + 4 * q, values[q]);
}
#endif

// Stores the same n values `times` times in a row; a short row of whole quads stays in registers.
template <typename T, typename A>
LFCC_INLINE void stream_repeated(T* destination, const A* row, int64_t n, int64_t times) {
#if defined(__x86_64__)
  if constexpr (std::is_same<T, float>::value)
    if (n % 4 == 0 && n <= 64 && reinterpret_cast<uintptr_t>(destination) % 16 == 0)
      return stream_quads<16>(destination, row, n / 4, times);
#endif
  for (int64_t k = 0; k < times; ++k) stream_out(destination + k * n, row, n);
}

}  // namespace lfcc
