// Counting and placing the bits of a mask word.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace blockpress {

// Byte i of the result is the number of set bits in bytes 0 to i of the word; the last byte is the number of all.
constexpr uint64_t PrefixCounts(uint64_t word) {
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return word * 0x0101010101010101u;
}

// The bits of eight mask bytes.
inline uint64_t MaskWord(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, 8);
  return word;
}

constexpr int64_t CountBits(uint64_t word) { return static_cast<int64_t>(PrefixCounts(word) >> 56); }

// The number of the lowest set bit of a word that is not 0.
inline int LowestBit(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#elif defined(_WIN64)
  unsigned long index;
  _BitScanForward64(&index, bits);
  return static_cast<int>(index);
#else
  int index = 0;
  for (; (bits & 1) == 0; bits >>= 1) ++index;
  return index;
#endif
}

// For each byte of a mask and each of its eight bits: `width` indices of the bytes of the value that the bit stands
// for, or 0x80 (the index for which pshufb gives zero) where the bit is not set.
template <int width> constexpr std::array<std::array<uint8_t, 8 * width>, 256> ExpandIndices() {
  std::array<std::array<uint8_t, 8 * width>, 256> table{};
  for (int bits = 0; bits < 256; ++bits) {
    int used = 0;
    for (int k = 0; k < 8; ++k) {
      const bool set = (bits >> k & 1) != 0;
      for (int byte = 0; byte < width; ++byte)
        table[bits][k * width + byte] = static_cast<uint8_t>(set ? used + byte : 0x80);
      used += set ? width : 0;
    }
  }
  return table;
}

} // namespace blockpress
