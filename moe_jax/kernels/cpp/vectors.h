// Vectors as wide as the CPU's registers, bfloat16, multiplying and adding, and e^x.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace moe {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

inline Vec all(float x) { return Vec{} + x; }

// a vector, or its first n elements and zeros
inline Vec load(const float* p, int n = kLanes) {
  if (n >= kLanes) return *reinterpret_cast<const Vec*>(p);
  float padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(float));
  return load(padded);
}

inline void store(float* p, Vec v, int n = kLanes) {
  if (n >= kLanes)
    *reinterpret_cast<Vec*>(p) = v;
  else
    std::memcpy(p, &v, n * sizeof(float));
}

struct Bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

inline void from_float(float x, float* to) { *to = x; }
inline void from_float(float x, Bf16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class X>
inline void widen(const X* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

template <class X>
inline void narrow(const float* from, int64_t n, X* to) {
  for (int64_t i = 0; i < n; i++) from_float(from[i], to + i);
}

// What products are computed in: floats, or for bfloat16, where the CPU multiplies it, words of two numbers that are
// neighbours along the inner dimension, the first one in the low half.
struct Pair {
  uint32_t bits;
};
#ifdef __AVX512BF16__
template <class X>
using Word = std::conditional_t<std::is_same_v<X, Bf16>, Pair, float>;
inline Vec multiply_add(Vec sum, Pair a, Vec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a.bits)), (__m512bh)b);
}
#else
template <class X>
using Word = float;
#endif
inline Vec multiply_add(Vec sum, float a, Vec b) { return sum + a * b; }

template <class W>
constexpr int kNumbers = std::is_same_v<W, Pair> ? 2 : 1;  // of a word

inline uint32_t half(Bf16 x) { return x.bits; }
inline uint32_t half(float x) {
  Bf16 y;
  from_float(x, &y);
  return y.bits;
}

// e^x to 2e-7, for |x| up to 87: x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by a polynomial
inline Vec exponential(Vec x) {
  x = x < all(-87.0f) ? all(-87.0f) : x;
  x = x > all(87.0f) ? all(87.0f) : x;
  Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 x 2^23: the low bits are the nearest integer
  Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec e = all(1.9875691500e-4f);
#pragma GCC unroll 8
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f, 1.0f, 1.0f})
    e = e * r + c;
  IntVec power = ((IntVec)shifted - 0x4b400000 + 127) << 23;
  return e * (Vec)power;
}

// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) {
  Vec s = 1.0f / (1.0f + exponential(-x));
  return x == x ? s : x;
}

}  // namespace moe
