// float16 in plain C++, for the emulated instruction sets.
#pragma once

#include <cmath>
#include <cstdint>

namespace blockpress_emulated {

inline float HalfToFloat(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const auto fraction = static_cast<float>(half & 1023);
  float size = std::ldexp(fraction, -24);
  if (exponent == 31) size = fraction != 0 ? NAN : INFINITY;
  else if (exponent != 0) size = std::ldexp(1024 + fraction, exponent - 25);
  return (half & 0x8000) != 0 ? -size : size;
}

} // namespace blockpress_emulated
