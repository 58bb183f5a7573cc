// The NEON instructions that neon.cpp uses, in plain C++: what Arm's reference says that each does, one element at a
// time. Slow, and good for one thing: the kernels run, under sanitizers too, on other machines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "emulated_half.h"

namespace blockpress_emulated {

template <class T, int count> struct alignas(count * sizeof(T)) Lanes {
  static constexpr int kCount = count;
  T lane[count];
};

// The vector whose element i is f(i).
template <class V, class F> V EachLane(F f) {
  V v{};
  for (int i = 0; i < V::kCount; ++i) v.lane[i] = static_cast<std::remove_reference_t<decltype(v.lane[0])>>(f(i));
  return v;
}
template <class To, class From> To SameBits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T> T Saturated(int32_t value) {
  return static_cast<T>(std::min<int32_t>(std::max<int32_t>(value, std::numeric_limits<T>::min()),
                                          std::numeric_limits<T>::max()));
}

} // namespace blockpress_emulated

using int8x8_t = blockpress_emulated::Lanes<int8_t, 8>;
using uint8x8_t = blockpress_emulated::Lanes<uint8_t, 8>;
using int16x4_t = blockpress_emulated::Lanes<int16_t, 4>;
struct float16x4_t : blockpress_emulated::Lanes<uint16_t, 4> {};
using uint64x1_t = blockpress_emulated::Lanes<uint64_t, 1>;
using int8x16_t = blockpress_emulated::Lanes<int8_t, 16>;
using uint8x16_t = blockpress_emulated::Lanes<uint8_t, 16>;
using int16x8_t = blockpress_emulated::Lanes<int16_t, 8>;
using int32x4_t = blockpress_emulated::Lanes<int32_t, 4>;
using float32x4_t = blockpress_emulated::Lanes<float, 4>;

#define BLOCKPRESS_LANES(name, result, a_type, b_type, expression)                                                     \
  inline result name(const a_type& a, const b_type& b) {                                                               \
    return blockpress_emulated::EachLane<result>([&](int i) { return expression; });                                   \
  }
BLOCKPRESS_LANES(vaddq_f32, float32x4_t, float32x4_t, float32x4_t, (a.lane[i] + b.lane[i]))
BLOCKPRESS_LANES(vsubq_f32, float32x4_t, float32x4_t, float32x4_t, (a.lane[i] - b.lane[i]))
BLOCKPRESS_LANES(vmulq_f32, float32x4_t, float32x4_t, float32x4_t, (a.lane[i] * b.lane[i]))
BLOCKPRESS_LANES(vdivq_f32, float32x4_t, float32x4_t, float32x4_t, (a.lane[i] / b.lane[i]))
BLOCKPRESS_LANES(vmaxq_f32, float32x4_t, float32x4_t, float32x4_t, (a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]))
BLOCKPRESS_LANES(vpaddq_f32, float32x4_t, float32x4_t, float32x4_t,
                 (i < 2 ? a.lane[2 * i] + a.lane[2 * i + 1] : b.lane[2 * i - 4] + b.lane[2 * i - 3]))
BLOCKPRESS_LANES(vaddq_s32, int32x4_t, int32x4_t, int32x4_t, (a.lane[i] + b.lane[i]))
BLOCKPRESS_LANES(vshlq_n_s32, int32x4_t, int32x4_t, int, (static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << b)))
BLOCKPRESS_LANES(vmaxq_s32, int32x4_t, int32x4_t, int32x4_t, (std::max(a.lane[i], b.lane[i])))
BLOCKPRESS_LANES(vpaddq_s32, int32x4_t, int32x4_t, int32x4_t,
                 (i < 2 ? a.lane[2 * i] + a.lane[2 * i + 1] : b.lane[2 * i - 4] + b.lane[2 * i - 3]))
BLOCKPRESS_LANES(vaddq_u8, uint8x16_t, uint8x16_t, uint8x16_t, (a.lane[i] + b.lane[i]))
BLOCKPRESS_LANES(vsubq_u8, uint8x16_t, uint8x16_t, uint8x16_t, (a.lane[i] - b.lane[i]))
BLOCKPRESS_LANES(vandq_u8, uint8x16_t, uint8x16_t, uint8x16_t, (a.lane[i] & b.lane[i]))
BLOCKPRESS_LANES(vzip1q_u8, uint8x16_t, uint8x16_t, uint8x16_t, (i % 2 == 0 ? a.lane[i / 2] : b.lane[i / 2]))
BLOCKPRESS_LANES(vzip2q_u8, uint8x16_t, uint8x16_t, uint8x16_t, (i % 2 == 0 ? a.lane[8 + i / 2] : b.lane[8 + i / 2]))
BLOCKPRESS_LANES(vqtbl1q_u8, uint8x16_t, uint8x16_t, uint8x16_t, (b.lane[i] < 16 ? a.lane[b.lane[i]] : 0))
BLOCKPRESS_LANES(vshrq_n_u8, uint8x16_t, uint8x16_t, int, (a.lane[i] >> b))
BLOCKPRESS_LANES(vcombine_s16, int16x8_t, int16x4_t, int16x4_t, (i < 4 ? a.lane[i] : b.lane[i - 4]))
#undef BLOCKPRESS_LANES

#define BLOCKPRESS_LANES(name, result, type, expression)                                                               \
  inline result name(const type& v) {                                                                                  \
    return blockpress_emulated::EachLane<result>([&](int i) { return expression; });                                   \
  }
BLOCKPRESS_LANES(vabsq_f32, float32x4_t, float32x4_t, (std::fabs(v.lane[i])))
BLOCKPRESS_LANES(vcvtq_f32_s32, float32x4_t, int32x4_t, (v.lane[i]))
BLOCKPRESS_LANES(vcvtnq_s32_f32, int32x4_t, float32x4_t, (std::nearbyint(v.lane[i])))
BLOCKPRESS_LANES(vcvt_f32_f16, float32x4_t, float16x4_t, (blockpress_emulated::HalfToFloat(v.lane[i])))
BLOCKPRESS_LANES(vqmovn_s32, int16x4_t, int32x4_t, (blockpress_emulated::Saturated<int16_t>(v.lane[i])))
BLOCKPRESS_LANES(vqmovn_s16, int8x8_t, int16x8_t, (blockpress_emulated::Saturated<int8_t>(v.lane[i])))
BLOCKPRESS_LANES(vmovl_s8, int16x8_t, int8x8_t, (v.lane[i]))
BLOCKPRESS_LANES(vmovl_s16, int32x4_t, int16x4_t, (v.lane[i]))
BLOCKPRESS_LANES(vget_low_u8, uint8x8_t, uint8x16_t, (v.lane[i]))
BLOCKPRESS_LANES(vget_low_s8, int8x8_t, int8x16_t, (v.lane[i]))
BLOCKPRESS_LANES(vget_high_s8, int8x8_t, int8x16_t, (v.lane[8 + i]))
BLOCKPRESS_LANES(vget_low_s16, int16x4_t, int16x8_t, (v.lane[i]))
BLOCKPRESS_LANES(vget_high_s16, int16x4_t, int16x8_t, (v.lane[4 + i]))
BLOCKPRESS_LANES(vdupq_n_f32, float32x4_t, float, (static_cast<void>(i), v))
BLOCKPRESS_LANES(vdupq_n_s32, int32x4_t, int32_t, (static_cast<void>(i), v))
BLOCKPRESS_LANES(vdupq_n_u8, uint8x16_t, uint8_t, (static_cast<void>(i), v))
#undef BLOCKPRESS_LANES

inline uint8x8_t vcnt_u8(const uint8x8_t& v) {
  return blockpress_emulated::EachLane<uint8x8_t>([&](int i) {
    int count = 0;
    for (int bits = v.lane[i]; bits != 0; bits &= bits - 1) ++count;
    return count;
  });
}
inline float32x4_t vfmaq_f32(const float32x4_t& c, const float32x4_t& a, const float32x4_t& b) {
  return blockpress_emulated::EachLane<float32x4_t>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline int32x4_t vdotq_s32(const int32x4_t& sums, const int8x16_t& a, const int8x16_t& b) {
  return blockpress_emulated::EachLane<int32x4_t>([&](int i) {
    int32_t sum = sums.lane[i];
    for (int k = 4 * i; k < 4 * i + 4; ++k) sum += a.lane[k] * b.lane[k];
    return sum;
  });
}
inline float vaddvq_f32(const float32x4_t& v) { return (v.lane[0] + v.lane[1]) + (v.lane[2] + v.lane[3]); }

inline float32x4_t vld1q_f32(const float* p) {
  float32x4_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline int8x16_t vld1q_s8(const int8_t* p) {
  int8x16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline uint8x16_t vld1q_u8(const uint8_t* p) {
  uint8x16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void vst1q_f32(float* p, const float32x4_t& v) { std::memcpy(p, &v, sizeof v); }
inline void vst1q_s8(int8_t* p, const int8x16_t& v) { std::memcpy(p, &v, sizeof v); }

inline uint8x8_t vcreate_u8(uint64_t bits) { return blockpress_emulated::SameBits<uint8x8_t>(bits); }
inline uint64_t vget_lane_u64(const uint64x1_t& v, int lane) { return v.lane[lane]; }
inline uint64x1_t vreinterpret_u64_u8(const uint8x8_t& v) { return blockpress_emulated::SameBits<uint64x1_t>(v); }
inline float16x4_t vreinterpret_f16_u8(const uint8x8_t& v) { return blockpress_emulated::SameBits<float16x4_t>(v); }
inline int8x16_t vreinterpretq_s8_u8(const uint8x16_t& v) { return blockpress_emulated::SameBits<int8x16_t>(v); }
inline float32x4_t vreinterpretq_f32_s32(const int32x4_t& v) { return blockpress_emulated::SameBits<float32x4_t>(v); }
inline float32x4_t vreinterpretq_f32_u8(const uint8x16_t& v) { return blockpress_emulated::SameBits<float32x4_t>(v); }
