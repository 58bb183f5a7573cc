// Kernels for AVX-512 with VBMI2 and VNNI: one instruction puts the values at their columns (vpexpand under the mask
// bits), and one adds four products of int8 to each int32.
#if defined(BLOCKPRESS_EMULATED_AVX512)
#include "emulated_avx512.h" // the same instructions in plain C++, so that any machine can test these kernels
#else
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "bits.h"
#include "kernels.h"
#include "target.h"

#if !defined(BLOCKPRESS_EMULATED_AVX512)
BLOCKPRESS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx2,fma,f16c,popcnt")
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized" // GCC 12 warns of its own headers: their undefined vectors are meant
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "attention_loops.h"
#include "loops.h"

namespace blockpress {
namespace {

struct Avx512 {
  using Floats = __m512;
  static constexpr int kFloats = 16;
  static Floats Zero() { return _mm512_setzero_ps(); }
  static Floats Fill(float value) { return _mm512_set1_ps(value); }
  static Floats Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats Plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats Times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats Minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats Over(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats LargerSize(Floats size, Floats v) { return _mm512_max_ps(size, _mm512_abs_ps(v)); }
  static Floats Larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats PowerOfTwo(Floats n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static void CopyAround(const float* from, int64_t count, float* to) {
    int64_t i = 0;
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      for (; i + kFloats <= count; i += kFloats) _mm512_stream_ps(to + i, Load(from + i));
      _mm_sfence();
    }
    std::copy_n(from + i, count - i, to + i);
  }
  static void StoreRounded(int8_t* p, Floats v) {
    const __m512i q = _mm512_min_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
    const __m512i limited = _mm512_max_epi32(q, _mm512_set1_epi32(-127));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(limited));
  }
  static void Fetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static float Sum(Floats v) { return _mm512_reduce_add_ps(v); }
  // Adds the sums of four vectors to four floats beside each other.
  static void AddSums(Floats a, Floats b, Floats c, Floats d, float* y) {
    y[0] += Sum(a);
    y[1] += Sum(b);
    y[2] += Sum(c);
    y[3] += Sum(d);
  }

  using Bytes = __m512i;
  static constexpr int kBytes = 64;
  static constexpr int kPieceVectors = 1;

  // vpdpbusd multiplies bytes without a sign by bytes with one: x goes in as x + 128, and 128 times the sum of the
  // weights comes off at the end.
  static Bytes LoadPlus128(const int8_t* x) {
    return _mm512_xor_si512(_mm512_loadu_si512(x), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
  static Bytes Add128(Bytes sums, Bytes w) {
    return _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(static_cast<char>(0x80)), w);
  }

  // A sum, or two that take turns, as one waits several cycles for its last product. Loops over two pieces at a time
  // need no instruction for that.
  template <bool two> class Sums32 {
  public:
    Sums32() : next_(_mm512_setzero_si512()), other_(_mm512_setzero_si512()) {}
    template <class Add> void Next(Add add) {
      next_ = add(next_);
      if constexpr (two) std::swap(next_, other_);
    }
    Bytes Total() const { return two ? _mm512_add_epi32(next_, other_) : next_; }

  private:
    Bytes next_, other_;
  };

  template <ValueType type, int Rows> class Dots {
    static constexpr bool kTwo = type != ValueType::kInt4; // whose groups mostly are a piece

  public:
    Dots() {} // written out, as an implicit one would be compiled without these instructions
    void Clear() { *this = Dots(); }
    void Add(int, Bytes w, const int8_t* x, int64_t stride) {
      too_much_.Next([&](Bytes sum) { return Add128(sum, w); });
      for (int i = 0; i < Rows; ++i)
        sums_[i].Next([&](Bytes sum) { return _mm512_dpbusd_epi32(sum, LoadPlus128(x + i * stride), w); });
    }
    Floats Sums(int i) const {
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(sums_[i].Total(), too_much_.Total()));
    }

  private:
    Sums32<kTwo> sums_[Rows], too_much_;
  };

  static void ArrangePiece(int8_t*) {} // as it is
  template <class Use> static void EachDenseBytes(const uint8_t* piece, Use use) { use(0, _mm512_loadu_si512(piece)); }

  static void StoreBytes(int8_t* p, Bytes w) { _mm512_storeu_si512(p, w); }
  class Tally {
  public:
    void Add(Bytes w) { sums_ = _mm512_dpbusd_epi32(sums_, _mm512_set1_epi8(1), w); }
    int32_t Sum() const { return _mm512_reduce_add_epi32(sums_); }

  private:
    Bytes sums_ = {};
  };

  static constexpr int kFloatRows = 5;
  static constexpr int kByteRows = 5; // with four rows of W: 26 of the 32 registers
  static constexpr int kAdded = 128;
  static constexpr bool kPairsSaturate = false;
  template <int Rows>
  static void TileDots(const int8_t* tile, int64_t columns, const int8_t* x, int64_t stride, const float* scales,
                       const int32_t* added, float* y, int64_t stride_y) {
    Bytes sums[kTileWeights][Rows];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < columns; k += kBytes) {
      Bytes xs[Rows];
      for (int i = 0; i < Rows; ++i) xs[i] = LoadPlus128(x + i * stride + k);
      for (int r = 0; r < kTileWeights; ++r) {
        const Bytes w = _mm512_loadu_si512(tile + r * kTileStride<int8_t> + k);
        for (int i = 0; i < Rows; ++i) sums[r][i] = _mm512_dpbusd_epi32(sums[r][i], xs[i], w);
      }
    }
    for (int i = 0; i < Rows; ++i)
      for (int r = 0; r < kTileWeights; ++r)
        y[i * stride_y + r] += static_cast<float>(_mm512_reduce_add_epi32(sums[r][i]) - added[r]) * scales[r];
  }

  static Bytes PlusEight(Bytes w) { return _mm512_add_epi8(w, _mm512_set1_epi8(8)); }
  class Inputs {
  public:
    Inputs() = default;
    explicit Inputs(const int8_t* x)
        : x_(_mm512_loadu_si512(x)), eights_(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(8), x_)) {}
    Floats TimesInt4(const int8_t* weights) const {
      const Bytes sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(weights), x_);
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, eights_));
    }

  private:
    Bytes x_, eights_;
  };

  // Zeros of which the compiler does not know that they are. Zen 4 and 5 let an expansion that fills up with zeros by
  // itself wait for what its register held before; one that takes the zeros from another register does not wait.
  struct Constants {
    Bytes zeros;
    Constants() : zeros(_mm512_setzero_si512()) {
#if defined(__GNUC__) && !defined(BLOCKPRESS_EMULATED_AVX512)
      asm("" : "+v"(zeros));
#endif
    }
  };
  template <ValueType type> struct Scratch {};

  template <ValueType type> class Cursor {
    static constexpr int64_t kElement = ElementBytes(type);

  public:
    Cursor(const Constants& constants, const uint8_t* values, const uint8_t*, Scratch<type>*)
        : zeros_(constants.zeros), values_(values) {}

    static int64_t RowBytes(const MaskRow& mask, int64_t pieces) {
      int64_t bytes = 0;
      for (int64_t i = 0; i < pieces; ++i) bytes += PieceBytes(MaskWord(mask.piece(i)));
      return bytes;
    }

    // Calls use(j, columns 16 j to 16 j + 15 of the piece) for its four parts.
    template <class Use> void EachFloats(const uint8_t* bits, Use use) {
      FetchValues<Avx512, type>(values_);
      const uint64_t word = MaskWord(bits);
      if constexpr (type == ValueType::kFloat32) {
        const uint64_t starts = PrefixCounts(word) << 8;
        for (int j = 0; j < 4; ++j) {
          const uint8_t* part = values_ + (starts >> (16 * j) & 0xff) * kElement;
          const Floats packed = _mm512_loadu_ps(reinterpret_cast<const float*>(part));
          const auto mask = static_cast<__mmask16>(word >> (16 * j));
          use(j, _mm512_mask_expand_ps(_mm512_castsi512_ps(zeros_), mask, packed));
        }
      } else if constexpr (type == ValueType::kFloat16 || type == ValueType::kBfloat16) {
        const int64_t low = CountBits(word & 0xffffffffu);
        for (int half = 0; half < 2; ++half) {
          const Bytes packed = _mm512_loadu_si512(values_ + (half == 0 ? 0 : low * kElement));
          const Bytes halves = _mm512_mask_expand_epi16(zeros_, static_cast<__mmask32>(word >> (32 * half)), packed);
          use(2 * half, FromHalves(_mm512_castsi512_si256(halves)));
          use(2 * half + 1, FromHalves(_mm512_extracti64x4_epi64(halves, 1)));
        }
      } else {
        const Bytes w = Expand(word);
        use(0, FromBytes(_mm512_castsi512_si128(w)));
        use(1, FromBytes(_mm512_extracti32x4_epi32(w, 1)));
        use(2, FromBytes(_mm512_extracti32x4_epi32(w, 2)));
        use(3, FromBytes(_mm512_extracti32x4_epi32(w, 3)));
      }
      values_ += PieceBytes(word);
    }

    // Calls use(0, the 64 columns of the piece).
    template <class Use> void EachBytes(const uint8_t* bits, Use use) {
      FetchValues<Avx512, type>(values_);
      const uint64_t word = MaskWord(bits);
      use(0, Expand(word));
      values_ += PieceBytes(word);
    }

    // Calls use(piece, 0, its columns) for two pieces beside each other.
    template <class Use> void EachBytesOfTwo(const uint8_t* bits, Use use) {
      EachBytes(bits, [&](int j, Bytes w) { use(0, j, w); });
      EachBytes(bits + 8, [&](int j, Bytes w) { use(1, j, w); });
    }

    // Where the next piece begins.
    const uint8_t* values() const { return values_; }

  private:
    static int64_t PieceBytes(uint64_t word) {
      const int64_t count = CountBits(word);
      return type == ValueType::kInt4 ? (count + 1) / 2 : count * kElement;
    }
    static Floats FromBytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
    static Floats FromHalves(__m256i halves) {
      if constexpr (type == ValueType::kFloat16) return _mm512_cvtph_ps(halves);
      else return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    Bytes Expand(uint64_t word) const {
      Bytes packed;
      if constexpr (type == ValueType::kInt4) {
        const Bytes pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values_)));
        const Bytes both = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
        packed = _mm512_sub_epi8(_mm512_and_si512(both, _mm512_set1_epi8(0x0f)), _mm512_set1_epi8(8));
      } else {
        packed = _mm512_loadu_si512(values_);
      }
      return _mm512_mask_expand_epi8(zeros_, word, packed);
    }

    const Bytes zeros_;
    const uint8_t* values_;
  };
};

} // namespace

extern const Kernels kAvx512Kernels = {"avx512", Multiply<Avx512>, Quantize<Avx512>, Arrange<Avx512>,
                                       WantsTransposed<Avx512>,
                                       Attend<Avx512>, 0};

} // namespace blockpress

#if !defined(BLOCKPRESS_EMULATED_AVX512)
BLOCKPRESS_TARGET_END
#endif
