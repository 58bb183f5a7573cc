// Kernels for AVX2 (with FMA and F16C): values are put at their columns by byte and lane shuffles whose indices come
// from tables of the 256 possible mask bytes.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include "bits.h"
#include "kernels.h"
#include "target.h"

BLOCKPRESS_TARGET("avx2,fma,f16c,popcnt")
#include "loops.h"

namespace blockpress {
namespace {

alignas(64) constexpr auto kBytes = ExpandIndices<1>();
alignas(64) constexpr auto kHalves = ExpandIndices<2>();

// The indices of a mask byte, then eight times the number of its bits.
constexpr std::array<std::array<uint8_t, 16>, 256> IndicesAndCounts() {
  std::array<std::array<uint8_t, 16>, 256> table{};
  for (int bits = 0; bits < 256; ++bits)
    for (int k = 0; k < 8; ++k) {
      table[bits][k] = kBytes[bits][k];
      table[bits][8 + k] = static_cast<uint8_t>(CountBits(static_cast<uint64_t>(bits)));
    }
  return table;
}
alignas(64) constexpr auto kBytesAndCount = IndicesAndCounts();

inline __m128i Load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

inline __m256i LoadBytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// `low` with its high eight bytes replaced.
inline __m128i LoadHigh8(__m128i low, const void* high) {
  return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), static_cast<const double*>(high)));
}

inline int64_t Count(uint32_t bits) { return _mm_popcnt_u32(bits); }

inline __m256 Float8(__m128i int8) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(int8)); }

// Eight columns as float32: `bits` of the mask, whose first value lies at p.
template <ValueType type> inline __m256 ExpandFloats(const uint8_t* p, uint32_t bits) {
  if constexpr (type == ValueType::kFloat32) {
    // The same indices, one a lane: the top bit of a lane says that nothing is stored there.
    const __m256i lanes = _mm256_cvtepi8_epi32(Load8(kBytes[bits].data()));
    const __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(p)), lanes);
    return _mm256_blendv_ps(values, _mm256_setzero_ps(), _mm256_castsi256_ps(lanes));
  } else if constexpr (type == ValueType::kInt8) {
    return Float8(_mm_shuffle_epi8(Load8(p), Load8(kBytes[bits].data())));
  } else {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i indices = _mm_load_si128(reinterpret_cast<const __m128i*>(kHalves[bits].data()));
    const __m128i values = _mm_shuffle_epi8(packed, indices);
    if constexpr (type == ValueType::kFloat16) return _mm256_cvtph_ps(values);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
  }
}

// The set bits of the first `columns` columns of a piece.
template <int columns> inline int64_t CountFirst(uint64_t word) {
  return static_cast<int64_t>(_mm_popcnt_u64(word << (64 - columns)));
}

// Sixteen columns of int8: two bytes of the mask, whose first value lies at p. The second eight indices go on from the
// number of the first byte's bits.
inline __m128i ExpandBytes(const uint8_t* p, const uint8_t* bits) {
  const __m128i second = LoadHigh8(_mm_setzero_si128(), kBytes[bits[1]].data());
  const __m128i first = _mm_load_si128(reinterpret_cast<const __m128i*>(kBytesAndCount[bits[0]].data()));
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_add_epi8(first, second));
}

// int4 values are first unpacked to int8, some hundred ahead, and then go the way of int8.
class UnpackedInt4 {
  static constexpr int64_t kAhead = 512;

public:
  struct Scratch {
    alignas(32) uint8_t values[kAhead + 2 * kPieceColumns];
  };
  UnpackedInt4(const Weight& weight, const uint8_t* values, Scratch* scratch)
      : next_(values), last_(weight.values_end()), scratch_(scratch->values), current_(scratch_), end_(scratch_) {}

  // The int8 values from the current piece on: at least all of that piece.
  const uint8_t* Current() {
    if (end_ - current_ < kPieceColumns) Unpack();
    return current_;
  }
  // Moves on from a piece of `count` values.
  void Skip(int64_t count) { current_ += (count + 1) / 2 * 2; }
  const uint8_t* values() const { return next_ - (end_ - current_) / 2; }

private:
  void Unpack() {
    const int64_t left = end_ - current_; // less than a piece
    for (int64_t i = 0; i < kPieceColumns; i += 32)
      _mm256_store_si256(reinterpret_cast<__m256i*>(scratch_ + i), LoadBytes(current_ + i));
    current_ = scratch_;
    end_ = scratch_ + left;
    const int64_t bytes = std::min(kAhead / 2, last_ - next_);
    for (int64_t i = 0; i < bytes; i += 16) {
      const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(next_ + i)));
      const __m256i apart = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
      const __m256i both = _mm256_and_si256(apart, _mm256_set1_epi8(0x0f));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(end_ + 2 * i), _mm256_sub_epi8(both, _mm256_set1_epi8(8)));
    }
    next_ += bytes;
    end_ += 2 * bytes;
  }

  const uint8_t* next_; // what is not unpacked yet
  const uint8_t* last_;
  uint8_t* scratch_;
  uint8_t* current_;
  uint8_t* end_;
};

// Other values lie in the tensor as they are.
template <ValueType type> class StoredValues {
public:
  struct Scratch {};
  StoredValues(const Weight&, const uint8_t* values, Scratch*) : values_(values) {}
  const uint8_t* Current() const { return values_; }
  void Skip(int64_t count) { values_ += count * ElementBytes(type); }
  const uint8_t* values() const { return values_; }

private:
  const uint8_t* values_;
};

struct Avx2 {
  using Floats = __m256;
  static constexpr int kFloats = 8;
  static Floats Zero() { return _mm256_setzero_ps(); }
  static Floats Fill(float value) { return _mm256_set1_ps(value); }
  static Floats Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats Plus(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats Times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats Minus(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats Over(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats LargerSize(Floats size, Floats v) {
    return _mm256_max_ps(size, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
  }
  static void StoreRounded(int8_t* p, Floats v) {
    const __m256i q = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const __m128i limited = _mm_max_epi16(words, _mm_set1_epi16(-127));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(limited, limited));
  }
  static void Fetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static float Sum(Floats v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  // Adds the sums of four vectors to four floats beside each other.
  static void AddSums(Floats a, Floats b, Floats c, Floats d, float* y) {
    const Floats sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    _mm_storeu_ps(y, _mm_add_ps(_mm_loadu_ps(y), four));
  }

  using Bytes = __m256i;
  static constexpr int kBytes = 32;

  // Sums of products of one vector of weights and Rows vectors of X. The first factor of vpmaddubsw has no sign, so
  // the weight's sign goes to x; two products of at most 127 * 127 do not saturate its int16.
  template <int Rows> struct Dots {
    __m256i sums[Rows] = {};
    void Add(Bytes w, const int8_t* x, int64_t stride) {
      const __m256i size = _mm256_abs_epi8(w);
      for (int i = 0; i < Rows; ++i) {
        const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(LoadBytes(x + i * stride), w));
        sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      }
    }
    Floats Sums(int i) const { return _mm256_cvtepi32_ps(sums[i]); }
  };

  static void StoreBytes(int8_t* p, Bytes w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w); }
  static Floats FromBytes(const int8_t* p) { return Float8(Load8(p)); }

  static constexpr int kFloatRows = 3;
  static constexpr int kByteRows = 2; // with three, not all sums stay in registers

  // vpmaddubsw adds two products, of x + 127 from 0 to 254 and w, in an int16: that holds them up to a sum of the two
  // weights of 129 = 32767 / 254, as products of different signs do not add up.
  static constexpr int kAdded = 127;
  static constexpr bool kPairsSaturate = true;
  static Bytes LoadAdded(const int8_t* x) { return _mm256_add_epi8(LoadBytes(x), _mm256_set1_epi8(kAdded)); }

  // A function of its own, or GCC keeps the sums in memory.
  BLOCKPRESS_NOINLINE static void AddScaledSums(__m256i a, __m256i b, __m256i c, __m256i d, const float* scales,
                                                const int32_t* added, float* y) {
    const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    const __m128i sums = _mm_sub_epi32(four, _mm_loadu_si128(reinterpret_cast<const __m128i*>(added)));
    _mm_storeu_ps(y, _mm_fmadd_ps(_mm_cvtepi32_ps(sums), _mm_loadu_ps(scales), _mm_loadu_ps(y)));
  }

  static __m256i SumPairs(Bytes w) { return _mm256_maddubs_epi16(_mm256_set1_epi8(1), w); }
  static uint32_t LargePairs(__m256i sizes) { // two bits a pair
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi16(sizes, _mm256_set1_epi16(129))));
  }
  class Tally {
  public:
    void Add(Bytes w) {
      const __m256i pairs = SumPairs(w);
      sums_ = _mm256_add_epi32(sums_, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      largest_ = _mm256_max_epi16(largest_, _mm256_abs_epi16(pairs));
    }
    bool TakeLarge() {
      const bool large = LargePairs(largest_) != 0;
      largest_ = _mm256_setzero_si256();
      return large;
    }
    int32_t Sum() const {
      const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums_), _mm256_extracti128_si256(sums_, 1));
      const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
      return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }

  private:
    __m256i sums_ = {};
    __m256i largest_ = {};
  };
  template <class Body> static void EachLargePair(const int8_t* weights, Body body) {
    uint64_t large = 0;
    for (int64_t k = 0; k < kPieceColumns; k += kBytes) {
      large |= uint64_t{LargePairs(_mm256_abs_epi16(SumPairs(LoadBytes(weights + k))))} << k;
    }
    for (large &= 0x5555555555555555u; large != 0; large &= large - 1) body(LowestBit(large));
  }

  template <int Rows>
  static void TileDots(const int8_t* tile, int64_t columns, const int8_t* x, int64_t stride, const float* scales,
                       const int32_t* added, float* y, int64_t stride_y) {
    static_assert(Rows <= kByteRows && kByteRows == 2 && kTileWeights == 4);
    // Variables and not an array, which GCC would write to memory.
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (int64_t k = 0; k < columns; k += kBytes) {
      const __m256i xa = LoadAdded(x + k), xb = LoadAdded(x + (Rows - 1) * stride + k);
      const auto add = [&](int r, __m256i sums, __m256i inputs) {
        const __m256i w = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile + r * kTileStride<int8_t> + k));
        return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(inputs, w), _mm256_set1_epi16(1)));
      };
      a0 = add(0, a0, xa), a1 = add(1, a1, xa), a2 = add(2, a2, xa), a3 = add(3, a3, xa);
      if constexpr (Rows == 2) b0 = add(0, b0, xb), b1 = add(1, b1, xb), b2 = add(2, b2, xb), b3 = add(3, b3, xb);
    }
    AddScaledSums(a0, a1, a2, a3, scales, added, y);
    if constexpr (Rows == 2) AddScaledSums(b0, b1, b2, b3, scales, added, y + stride_y);
  }

  static Bytes PlusEight(Bytes w) { return _mm256_add_epi8(w, _mm256_set1_epi8(8)); }
  class Inputs {
  public:
    Inputs() = default;
    explicit Inputs(const int8_t* x) : low_(LoadBytes(x)), high_(LoadBytes(x + kBytes)) {
      const __m256i eights = _mm256_set1_epi8(8);
      eights_ = _mm256_add_epi16(_mm256_maddubs_epi16(eights, low_), _mm256_maddubs_epi16(eights, high_));
    }
    // Weights plus eight go up to 15, so that four products stay in an int16.
    Floats TimesInt4(const int8_t* weights) const {
      const __m256i low = _mm256_maddubs_epi16(LoadBytes(weights), low_);
      const __m256i high = _mm256_maddubs_epi16(LoadBytes(weights + kBytes), high_);
      const __m256i sums = _mm256_sub_epi16(_mm256_add_epi16(low, high), eights_);
      return _mm256_cvtepi32_ps(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
    }

  private:
    __m256i low_, high_, eights_;
  };

  template <ValueType type>
  using Values = std::conditional_t<type == ValueType::kInt4, UnpackedInt4, StoredValues<type>>;
  template <ValueType type> using Scratch = typename Values<type>::Scratch;

  template <ValueType type> class Cursor {
    static constexpr int64_t kElement = ElementBytes(type);

  public:
    Cursor(const Weight& weight, const uint8_t* values, Scratch<type>* scratch) : values_(weight, values, scratch) {}

    static int64_t RowBytes(const MaskRow& mask, int64_t pieces) {
      int64_t bytes = 0;
      for (int64_t i = 0; i < pieces; ++i) {
        const int64_t count = CountFirst<64>(MaskWord(mask.piece(i)));
        bytes += type == ValueType::kInt4 ? (count + 1) / 2 : count * kElement;
      }
      return bytes;
    }

    // Calls use(j, columns 8 j to 8 j + 7 of the piece) for its eight parts.
    template <class Use> void EachFloats(const uint8_t* bits, Use use) {
      constexpr ValueType kStored = type == ValueType::kInt4 ? ValueType::kInt8 : type;
      FetchValues<Avx2, type>(values_.values());
      const uint8_t* values = values_.Current();
      for (int j = 0; j < 8; ++j) {
        use(j, ExpandFloats<kStored>(values, bits[j]));
        values += Count(bits[j]) * kElement;
      }
      values_.Skip(CountFirst<64>(MaskWord(bits)));
    }

    // Calls use(j, columns 32 j to 32 j + 31 of the piece) for its two halves.
    template <class Use> void EachBytes(const uint8_t* bits, Use use) {
      FetchValues<Avx2, type>(values_.values());
      const uint8_t* values = values_.Current();
      const uint64_t word = MaskWord(bits);
      const __m128i first = ExpandBytes(values, bits);
      const __m128i second = ExpandBytes(values + CountFirst<16>(word), bits + 2);
      use(0, _mm256_set_m128i(second, first));
      const __m128i third = ExpandBytes(values + CountFirst<32>(word), bits + 4);
      const __m128i fourth = ExpandBytes(values + CountFirst<48>(word), bits + 6);
      use(1, _mm256_set_m128i(fourth, third));
      values_.Skip(CountFirst<64>(word));
    }

    // Where the next piece begins.
    const uint8_t* values() const { return values_.values(); }

  private:
    Values<type> values_;
  };
};

} // namespace

extern const Kernels kAvx2Kernels = {"avx2", Multiply<Avx2>, Quantize<Avx2>, WantsTransposed<Avx2>};

} // namespace blockpress

BLOCKPRESS_TARGET_END
