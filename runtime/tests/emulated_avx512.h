// The AVX-512 instructions that avx512.cpp uses, in plain C++: what Intel's manual says that each does, one element at
// a time. Slow, and good for one thing: the kernels run, under sanitizers too, on machines without AVX-512.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulated_half.h"

namespace blockpress_emulated {

template <int bytes> struct Vector {
  alignas(bytes) uint8_t raw[bytes];
};

// The first elements of a vector, or the vector at an address.
template <class V> V LoadAs(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class T, class V> T Get(const V& v, int i) {
  T value;
  std::memcpy(&value, v.raw + i * sizeof(T), sizeof(T));
  return value;
}
// The vector whose element i, of type T, is f(i).
template <class T, class V, class F> V Each(F f) {
  V v{};
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(T)); ++i) {
    const T value = static_cast<T>(f(i));
    std::memcpy(v.raw + i * sizeof(T), &value, sizeof(T));
  }
  return v;
}
template <class T, class V> V ExpandAs(const V& others, uint64_t mask, const V& packed) {
  int next = 0;
  return Each<T, V>([&](int i) { return (mask >> i & 1) != 0 ? Get<T>(packed, next++) : Get<T>(others, i); });
}

} // namespace blockpress_emulated

struct __m128i : blockpress_emulated::Vector<16> {};
struct __m256i : blockpress_emulated::Vector<32> {};
struct __m512i : blockpress_emulated::Vector<64> {};
struct __m512 : blockpress_emulated::Vector<64> {};
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

namespace blockpress_emulated {
template <class F> __m512 Floats(F f) { return Each<float, __m512>(f); }
inline float At(const __m512& v, int i) { return Get<float>(v, i); }
template <class T, class F> __m512i Integers(F f) { return Each<T, __m512i>(f); }
} // namespace blockpress_emulated

#define BLOCKPRESS_FLOATS(name, expression)                                                                            \
  inline __m512 name(const __m512& a, const __m512& b) {                                                               \
    return blockpress_emulated::Floats([&](int i) {                                                                    \
      const float x = blockpress_emulated::At(a, i);                                                                   \
      const float y = blockpress_emulated::At(b, i);                                                                   \
      return expression;                                                                                               \
    });                                                                                                                \
  }
BLOCKPRESS_FLOATS(_mm512_add_ps, (x + y))
BLOCKPRESS_FLOATS(_mm512_sub_ps, (x - y))
BLOCKPRESS_FLOATS(_mm512_mul_ps, (x * y))
BLOCKPRESS_FLOATS(_mm512_div_ps, (x / y))
BLOCKPRESS_FLOATS(_mm512_max_ps, (x > y ? x : y))
#undef BLOCKPRESS_FLOATS

#define BLOCKPRESS_INTEGERS(name, type, expression)                                                                    \
  inline __m512i name(const __m512i& a, const __m512i& b) {                                                            \
    return blockpress_emulated::Integers<type>([&](int i) {                                                            \
      const type x = blockpress_emulated::Get<type>(a, i);                                                             \
      const type y = blockpress_emulated::Get<type>(b, i);                                                             \
      return expression;                                                                                               \
    });                                                                                                                \
  }
BLOCKPRESS_INTEGERS(_mm512_xor_si512, uint64_t, (x ^ y))
BLOCKPRESS_INTEGERS(_mm512_or_si512, uint64_t, (x | y))
BLOCKPRESS_INTEGERS(_mm512_and_si512, uint64_t, (x & y))
BLOCKPRESS_INTEGERS(_mm512_add_epi8, uint8_t, (x + y))
BLOCKPRESS_INTEGERS(_mm512_sub_epi8, uint8_t, (x - y))
BLOCKPRESS_INTEGERS(_mm512_add_epi32, uint32_t, (x + y))
BLOCKPRESS_INTEGERS(_mm512_sub_epi32, uint32_t, (x - y))
BLOCKPRESS_INTEGERS(_mm512_min_epi32, int32_t, (x < y ? x : y))
BLOCKPRESS_INTEGERS(_mm512_max_epi32, int32_t, (x > y ? x : y))
#undef BLOCKPRESS_INTEGERS

#define BLOCKPRESS_SHIFT(name, type)                                                                                   \
  inline __m512i name(const __m512i& v, int bits) {                                                                    \
    return blockpress_emulated::Integers<type>([&](int i) { return blockpress_emulated::Get<type>(v, i) << bits; });   \
  }
BLOCKPRESS_SHIFT(_mm512_slli_epi16, uint16_t)
BLOCKPRESS_SHIFT(_mm512_slli_epi32, uint32_t)
#undef BLOCKPRESS_SHIFT

#define BLOCKPRESS_WIDEN(name, to, from, vector)                                                                       \
  inline __m512i name(const vector& v) {                                                                               \
    return blockpress_emulated::Integers<to>([&](int i) { return blockpress_emulated::Get<from>(v, i); });             \
  }
BLOCKPRESS_WIDEN(_mm512_cvtepi8_epi32, int32_t, int8_t, __m128i)
BLOCKPRESS_WIDEN(_mm512_cvtepu8_epi16, uint16_t, uint8_t, __m256i)
BLOCKPRESS_WIDEN(_mm512_cvtepu16_epi32, uint32_t, uint16_t, __m256i)
#undef BLOCKPRESS_WIDEN

enum { _MM_HINT_T0 };
inline void _mm_prefetch(const char*, int) {}

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_set1_ps(float value) {
  return blockpress_emulated::Floats([=](int) { return value; });
}
inline __m512i _mm512_set1_epi8(char value) {
  return blockpress_emulated::Integers<char>([=](int) { return value; });
}
inline __m512i _mm512_set1_epi32(int value) {
  return blockpress_emulated::Integers<int32_t>([=](int) { return value; });
}

inline __m512 _mm512_loadu_ps(const void* p) { return blockpress_emulated::LoadAs<__m512>(p); }
inline __m512i _mm512_loadu_si512(const void* p) { return blockpress_emulated::LoadAs<__m512i>(p); }
inline __m256i _mm256_loadu_si256(const void* p) { return blockpress_emulated::LoadAs<__m256i>(p); }
inline void _mm512_storeu_ps(void* p, const __m512& v) { std::memcpy(p, v.raw, 64); }
inline void _mm512_stream_ps(void* p, const __m512& v) { std::memcpy(p, v.raw, 64); }
inline void _mm_sfence() {}
inline void _mm512_storeu_si512(void* p, const __m512i& v) { std::memcpy(p, v.raw, 64); }
inline void _mm_storeu_si128(void* p, const __m128i& v) { std::memcpy(p, v.raw, 16); }

inline __m128i _mm512_castsi512_si128(const __m512i& v) { return blockpress_emulated::LoadAs<__m128i>(v.raw); }
inline __m256i _mm512_castsi512_si256(const __m512i& v) { return blockpress_emulated::LoadAs<__m256i>(v.raw); }
inline __m512 _mm512_castsi512_ps(const __m512i& v) { return blockpress_emulated::LoadAs<__m512>(v.raw); }
inline __m128i _mm512_extracti32x4_epi32(const __m512i& v, int part) {
  return blockpress_emulated::LoadAs<__m128i>(v.raw + 16 * part);
}
inline __m256i _mm512_extracti64x4_epi64(const __m512i& v, int part) {
  return blockpress_emulated::LoadAs<__m256i>(v.raw + 32 * part);
}

inline __m512 _mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
  using blockpress_emulated::At;
  return blockpress_emulated::Floats([&](int i) { return std::fma(At(a, i), At(b, i), At(c, i)); });
}
inline __m512 _mm512_abs_ps(const __m512& v) {
  return blockpress_emulated::Floats([&](int i) { return std::fabs(blockpress_emulated::At(v, i)); });
}
inline int _mm512_reduce_add_epi32(const __m512i& v) {
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += blockpress_emulated::Get<int32_t>(v, i);
  return sum;
}
inline float _mm512_reduce_add_ps(const __m512& v) {
  float lanes[16];
  std::memcpy(lanes, v.raw, 64);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float _mm512_reduce_max_ps(const __m512& v) {
  float most = blockpress_emulated::At(v, 0);
  for (int i = 1; i < 16; ++i) most = std::max(most, blockpress_emulated::At(v, i));
  return most;
}
inline __m512i _mm512_dpbusd_epi32(const __m512i& sums, const __m512i& a, const __m512i& b) {
  using blockpress_emulated::Get;
  return blockpress_emulated::Integers<int32_t>([&](int i) {
    int32_t sum = Get<int32_t>(sums, i);
    for (int k = 4 * i; k < 4 * i + 4; ++k) sum += int32_t{Get<uint8_t>(a, k)} * int32_t{Get<int8_t>(b, k)};
    return sum;
  });
}
inline __m512 _mm512_mask_expand_ps(const __m512& others, __mmask16 mask, const __m512& v) {
  return blockpress_emulated::ExpandAs<float>(others, mask, v);
}
inline __m512i _mm512_mask_expand_epi16(const __m512i& others, __mmask32 mask, const __m512i& v) {
  return blockpress_emulated::ExpandAs<uint16_t>(others, mask, v);
}
inline __m512i _mm512_mask_expand_epi8(const __m512i& others, __mmask64 mask, const __m512i& v) {
  return blockpress_emulated::ExpandAs<uint8_t>(others, mask, v);
}
inline __m128i _mm512_cvtepi32_epi8(const __m512i& v) {
  return blockpress_emulated::Each<int8_t, __m128i>([&](int i) { return blockpress_emulated::Get<int32_t>(v, i); });
}
inline __m512 _mm512_cvtepi32_ps(const __m512i& v) {
  return blockpress_emulated::Floats([&](int i) { return blockpress_emulated::Get<int32_t>(v, i); });
}
inline __m512i _mm512_cvtps_epi32(const __m512& v) {
  return blockpress_emulated::Integers<int32_t>([&](int i) { return std::nearbyint(blockpress_emulated::At(v, i)); });
}
inline __m512 _mm512_cvtph_ps(const __m256i& v) {
  using blockpress_emulated::Get;
  return blockpress_emulated::Floats([&](int i) { return blockpress_emulated::HalfToFloat(Get<uint16_t>(v, i)); });
}
