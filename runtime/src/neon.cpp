// Kernels for 64-bit ARM with NEON and its dot product (SDOT): TBL puts the values at their columns, by places from a
// table of the 256 possible mask bytes, and one instruction adds four products of int8 to each int32.
#if defined(BLOCKPRESS_EMULATED_NEON)
#include "emulated_neon.h" // the same instructions in plain C++, so that any machine can test these kernels
#else
#include <arm_neon.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include "bits.h"
#include "kernels.h"
#include "target.h"

#if !defined(BLOCKPRESS_EMULATED_NEON) && !defined(__ARM_FEATURE_DOTPROD)
BLOCKPRESS_TARGET("arch=armv8.2-a+dotprod")
#endif
#include "attention_loops.h"
#include "loops.h"
#include "values.h"

namespace blockpress {
namespace {

constexpr uint8_t kNowhere = 0x80; // of a column that has no value: TBL gives zero, also where eight is added to it

using Places = std::array<uint8_t, 16>; // indices of TBL

// For sixteen columns, which of their values each of them has, as the sum of two: by the first mask byte the places of
// its eight columns, and its number of values for the eight others; by the second byte the places of those.
struct BytePlaces {
  std::array<Places, 256> first{}, second{};
  constexpr BytePlaces() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t used = 0;
      for (int k = 0; k < 8; ++k) {
        const bool set = (bits >> k & 1) != 0;
        first[bits][k] = second[bits][8 + k] = set ? used : kNowhere;
        used += set ? 1 : 0;
      }
      for (int k = 8; k < 16; ++k) first[bits][k] = used;
    }
  }
};

// For four columns and their mask bits: the bytes that make a float32 of each value, or of float16 the four values.
template <ValueType type> constexpr std::array<Places, 16> FloatPlaces() {
  constexpr int kElement = ElementBytes(type), kStep = type == ValueType::kFloat16 ? 2 : 4;
  std::array<Places, 16> table{};
  for (int bits = 0; bits < 16; ++bits) {
    for (auto& place : table[bits]) place = kNowhere;
    int used = 0;
    for (int k = 0; k < 4; ++k) {
      if ((bits >> k & 1) == 0) continue;
      for (int byte = 0; byte < kElement; ++byte) // the highest bytes, which is all that bfloat16 has
        table[bits][kStep * (k + 1) - kElement + byte] = static_cast<uint8_t>(used++);
    }
  }
  return table;
}

alignas(64) constexpr BytePlaces kBytePlaces;
template <ValueType type> alignas(64) constexpr auto kFloatPlaces = FloatPlaces<type>();

// The number of set bits of each byte, and as PrefixCounts does of it and those before it.
inline uint64_t ByteCounts(uint64_t word) { return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(word))), 0); }
inline uint64_t RunningCounts(uint64_t word) { return ByteCounts(word) * 0x0101010101010101u; }

inline uint64_t ByteAt(uint64_t word, int i) { return word >> (8 * i) & 0xff; }

struct Neon {
  using Floats = float32x4_t;
  static constexpr int kFloats = 4;
  static Floats Zero() { return vdupq_n_f32(0); }
  static Floats Fill(float value) { return vdupq_n_f32(value); }
  static Floats Load(const float* p) { return vld1q_f32(p); }
  static void Store(float* p, Floats v) { vst1q_f32(p, v); }
  static Floats Plus(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats Times(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats Minus(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats Over(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) {
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
    return c + a * b; // also one instruction: with vfmaq_f32, GCC keeps the sums of a tile in memory
#else
    return vfmaq_f32(c, a, b);
#endif
  }
  static Floats LargerSize(Floats size, Floats v) { return vmaxq_f32(size, vabsq_f32(v)); }
  static Floats Larger(Floats a, Floats b) { return vmaxq_f32(a, b); }
  static Floats PowerOfTwo(Floats n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static void CopyAround(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
  static void StoreRounded(int8_t* p, Floats v) {
    const int16x4_t words = vqmovn_s32(vmaxq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(-127)));
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    std::memcpy(p, &bytes, kFloats);
  }
  static void Fetch(const uint8_t* p) {
#if defined(_MSC_VER)
    __prefetch(p);
#else
    __builtin_prefetch(p);
#endif
  }
  static float Sum(Floats v) { return vaddvq_f32(v); }
  // Adds the sums of four vectors to four floats beside each other.
  static void AddSums(Floats a, Floats b, Floats c, Floats d, float* y) {
    Store(y, Plus(Load(y), vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))));
  }

  using Bytes = int8x16_t;
  static constexpr int kBytes = 16;
  static constexpr int kPieceVectors = 4;
  static Bytes LoadBytes(const int8_t* p) { return vld1q_s8(p); }
  static void StoreBytes(int8_t* p, Bytes w) { vst1q_s8(p, w); }
  static void ArrangePiece(int8_t*) {} // as it is
  template <class Use> static void EachDenseBytes(const uint8_t* piece, Use use) {
    for (int j = 0; j < 4; ++j) use(j, vreinterpretq_s8_u8(vld1q_u8(piece + 16 * j)));
  }

  template <ValueType, int Rows> class Dots {
    static constexpr int kSums = Rows == 1 ? 2 : 1; // enough independent sums to hide the latency of SDOT

  public:
    Dots() { Clear(); }
    void Clear() {
      for (auto& of_row : sums_)
        for (auto& sum : of_row) sum = vdupq_n_s32(0);
    }
    void Add(int j, Bytes w, const int8_t* x, int64_t stride) {
      for (int i = 0; i < Rows; ++i)
        sums_[i][j % kSums] = vdotq_s32(sums_[i][j % kSums], w, LoadBytes(x + i * stride));
    }
    Floats Sums(int i) const {
      return vcvtq_f32_s32(kSums == 1 ? sums_[i][0] : vaddq_s32(sums_[i][0], sums_[i][kSums - 1]));
    }

  private:
    int32x4_t sums_[Rows][kSums];
  };

  // SDOT takes the signs of both factors, so that nothing is added to either of them.
  static constexpr int kAdded = 0;
  static constexpr bool kPairsSaturate = false;
  static Bytes PlusEight(Bytes w) { return w; }
  struct Tally {
    void Add(Bytes) {}
    int32_t Sum() const { return 0; }
  };

  static constexpr int kFloatRows = 5;
  static constexpr int kByteRows = 5; // with four rows of W: 26 of the 32 registers
  template <int Rows>
  static void TileDots(const int8_t* tile, int64_t columns, const int8_t* x, int64_t stride, const float* scales,
                       const int32_t*, float* y, int64_t stride_y) {
    int32x4_t sums[kTileWeights][Rows];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = vdupq_n_s32(0);
    for (int64_t k = 0; k < columns; k += kBytes) {
      Bytes xs[Rows];
      for (int i = 0; i < Rows; ++i) xs[i] = LoadBytes(x + i * stride + k);
      for (int r = 0; r < kTileWeights; ++r) {
        const Bytes w = LoadBytes(tile + r * kTileStride<int8_t> + k);
        for (int i = 0; i < Rows; ++i) sums[r][i] = vdotq_s32(sums[r][i], w, xs[i]);
      }
    }
    for (int i = 0; i < Rows; ++i, y += stride_y) {
      const int32x4_t four = vpaddq_s32(vpaddq_s32(sums[0][i], sums[1][i]), vpaddq_s32(sums[2][i], sums[3][i]));
      Store(y, Fma(vcvtq_f32_s32(four), Load(scales), Load(y)));
    }
  }

  class Inputs {
  public:
    Inputs() = default;
    explicit Inputs(const int8_t* x)
        : x_{LoadBytes(x), LoadBytes(x + kBytes), LoadBytes(x + 2 * kBytes), LoadBytes(x + 3 * kBytes)} {}
    Floats TimesInt4(const int8_t* weights) const {
      int32x4_t sums = vdupq_n_s32(0);
      for (int j = 0; j < kPieceVectors; ++j) sums = vdotq_s32(sums, LoadBytes(weights + j * kBytes), x_[j]);
      return vcvtq_f32_s32(sums);
    }

  private:
    Bytes x_[kPieceVectors];
  };

  static void UnpackInt4(const uint8_t* packed, int8_t* values) {
    for (int k = 0; k < 2; ++k, packed += kBytes, values += 2 * kBytes) {
      const uint8x16_t pairs = vld1q_u8(packed), eights = vdupq_n_u8(8);
      const uint8x16_t first = vsubq_u8(vandq_u8(pairs, vdupq_n_u8(0x0f)), eights);
      const uint8x16_t second = vsubq_u8(vshrq_n_u8(pairs, 4), eights);
      StoreBytes(values, vreinterpretq_s8_u8(vzip1q_u8(first, second)));
      StoreBytes(values + kBytes, vreinterpretq_s8_u8(vzip2q_u8(first, second)));
    }
  }
  template <ValueType type> using Scratch = typename Values<Neon, type>::Scratch;

  struct Constants {
    Constants() {}
  };

  template <ValueType type> class Cursor {
    static constexpr int64_t kElement = ElementBytes(type);

  public:
    Cursor(const Constants&, const uint8_t* values, const uint8_t* end, Scratch<type>* scratch)
        : values_(values, end, scratch) {}

    static int64_t RowBytes(const MaskRow& mask, int64_t pieces) {
      int64_t bytes = 0;
      for (int64_t i = 0; i < pieces; ++i) bytes += PieceBytes<type>(CountBits(MaskWord(mask.piece(i))));
      return bytes;
    }

    // Calls use(j, columns 4 j to 4 j + 3 of the piece) for its sixteen parts.
    template <class Use> void EachFloats(const uint8_t* bits, Use use) {
      if constexpr (type == ValueType::kInt8 || type == ValueType::kInt4) {
        EachBytes(bits, [&](int j, Bytes w) {
          const int16x8_t low = vmovl_s8(vget_low_s8(w)), high = vmovl_s8(vget_high_s8(w));
          use(4 * j, vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))));
          use(4 * j + 1, vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))));
          use(4 * j + 2, vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))));
          use(4 * j + 3, vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))));
        });
      } else {
        values_.Prepare();
        const uint64_t word = MaskWord(bits), counts = RunningCounts(word);
        const uint64_t starts = counts << 8; // of the values of each byte's columns
        const uint64_t middles = starts + ByteCounts(word & 0x0f0f0f0f0f0f0f0fu); // of those of its high four
        for (int j = 0; j < 16; j += 4) // by fours, so that the caller's sums stay in registers where this is a loop
          for (int k = j; k < j + 4; k += 2) {
            use(k, TakeFloats(word >> (4 * k) & 0x0f, ByteAt(starts, k / 2)));
            use(k + 1, TakeFloats(word >> (4 * k + 4) & 0x0f, ByteAt(middles, k / 2)));
          }
        values_.Skip(counts >> 56);
      }
    }

    // Calls use(j, columns 16 j to 16 j + 15 of the piece) for its four vectors.
    template <class Use> void EachBytes(const uint8_t* bits, Use use) {
      values_.Prepare();
      const uint64_t word = MaskWord(bits), counts = RunningCounts(word);
      const uint64_t starts = counts << 8; // of the values of each byte's columns
      for (int j = 0; j < 4; ++j) {
        const uint8x16_t first = vld1q_u8(kBytePlaces.first[ByteAt(word, 2 * j)].data());
        const uint8x16_t second = vld1q_u8(kBytePlaces.second[ByteAt(word, 2 * j + 1)].data());
        const uint8x16_t values = vld1q_u8(values_.Current() + ByteAt(starts, 2 * j));
        use(j, vreinterpretq_s8_u8(vqtbl1q_u8(values, vaddq_u8(first, second))));
      }
      values_.Skip(counts >> 56);
    }

    // Calls use(piece, j, the columns of vector j of the piece) for two pieces beside each other.
    template <class Use> void EachBytesOfTwo(const uint8_t* bits, Use use) {
      EachBytes(bits, [&](int j, Bytes w) { use(0, j, w); });
      EachBytes(bits + 8, [&](int j, Bytes w) { use(1, j, w); });
    }

    // Where the next piece begins.
    const uint8_t* values() const { return values_.values(); }

  private:
    // Four columns with these mask bits, `start` values on.
    Floats TakeFloats(uint64_t bits, uint64_t start) const {
      const uint8x16_t packed = vld1q_u8(values_.Current() + start * kElement);
      const uint8x16_t values = vqtbl1q_u8(packed, vld1q_u8(kFloatPlaces<type>[bits].data()));
      if constexpr (type == ValueType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u8(vget_low_u8(values)));
      else return vreinterpretq_f32_u8(values);
    }

    Values<Neon, type> values_;
  };
};

} // namespace

extern const Kernels kNeonKernels = {"neon", Multiply<Neon>, Quantize<Neon>, Arrange<Neon>, WantsTransposed<Neon>,
                                     Attend<Neon>, 0};

} // namespace blockpress

#if !defined(BLOCKPRESS_EMULATED_NEON) && !defined(__ARM_FEATURE_DOTPROD)
BLOCKPRESS_TARGET_END
#endif
