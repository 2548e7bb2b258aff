// CUDA's vector types and 16-bit floating point, with the conversions that the kernels use.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define LFCC_VECTOR_2(name, T)                              \
  struct alignas(2 * sizeof(T)) name {                      \
    T x, y;                                                 \
  };                                                        \
  inline name make_##name(T x, T y) { return {x, y}; }
#define LFCC_VECTOR_4(name, T)                              \
  struct alignas(16) name {                                 \
    T x, y, z, w;                                           \
  };                                                        \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
LFCC_VECTOR_2(int2, int)
LFCC_VECTOR_2(uint2, unsigned)
LFCC_VECTOR_2(float2, float)
LFCC_VECTOR_2(double2, double)
LFCC_VECTOR_4(int4, int)
LFCC_VECTOR_4(uint4, unsigned)
LFCC_VECTOR_4(float4, float)
#undef LFCC_VECTOR_2
#undef LFCC_VECTOR_4

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest even; any NaN becomes that of the GPU.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  uint32_t bits = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);  // exact, for subnormal numbers too
  if (magnitude >= 0x7c00u << 13) bits |= 0x7f800000u;                     // infinity and NaN
  return __uint_as_float(bits | (x.bits & 0x8000u) << 16);
}

// Rounds to nearest even, as above.
inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  uint32_t result;
  if (std::isnan(x)) return {0x7fff};
  if (magnitude >= 65520.0f)  // halfway between the largest number and the next, which overflows
    result = 0x7c00u;
  else if (magnitude < 0x1p-14f)  // subnormal: adding 0.5 rounds to the last place of the result
    result = __float_as_uint(magnitude + 0.5f) - 0x3f000000u;
  else
    result = ((bits & 0x7fffffffu) - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  return {static_cast<uint16_t>(result | sign)};
}
