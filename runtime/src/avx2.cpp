// Kernels for AVX2 (with FMA, F16C and BMI): values are put at their columns by byte and lane shuffles. For float32 their
// indices come from tables of the 256 possible mask bytes, for int8 they are worked out in registers (Places).
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include "bits.h"
#include "kernels.h"
#include "target.h"

BLOCKPRESS_TARGET("avx2,fma,f16c,popcnt,bmi,bmi2")
#include "attention_loops.h"
#include "loops.h"
#include "values.h"

namespace blockpress {
namespace {

alignas(64) constexpr auto kBytes = ExpandIndices<1>();
alignas(64) constexpr auto kHalves = ExpandIndices<2>();

inline __m128i Load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// Sixteen bytes of each in the two lanes.
inline __m256i LoadLanes(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

inline __m256i BothLanes(__m128i lane) { return _mm256_broadcastsi128_si256(lane); }

// The same vector, of which the compiler then knows nothing: constants that it knows it makes anew within loops, for
// want of registers, and a product with one it takes apart into shifts and sums.
inline __m256i Opaque(__m256i v) {
#if defined(__GNUC__)
  asm("" : "+x"(v));
#endif
  return v;
}

inline int64_t Count(uint32_t bits) { return _mm_popcnt_u32(bits); }

inline __m256 Float8(__m128i int8) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(int8)); }

// Eight columns as float32: `bits` of the mask, whose first value lies at p. `zero` is that.
template <ValueType type> inline __m256 ExpandFloats(const uint8_t* p, uint32_t bits, __m256 zero) {
  if constexpr (type == ValueType::kFloat32) {
    // The same indices, one a lane: the top bit of a lane says that nothing is stored there.
    const __m256i lanes = _mm256_cvtepi8_epi32(Load8(kBytes[bits].data()));
    const __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(p)), lanes);
    return _mm256_blendv_ps(values, zero, _mm256_castsi256_ps(lanes));
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
  if constexpr (columns == 64) return static_cast<int64_t>(_mm_popcnt_u64(word));
  else if constexpr (columns == 32) return _mm_popcnt_u32(static_cast<uint32_t>(word));
  else return static_cast<int64_t>(_mm_popcnt_u64(_bzhi_u64(word, columns)));
}

// Where the int8 values of two pieces lie, as indices of pshufb: a vector for each half piece, whose low lane stands for
// sixteen columns and whose high lane for the sixteen columns that lie 32 further. The sixteen are four groups of four,
// and byte 4 q + c is column q of group c. The four mask bits of the group, times 8 >> q, have the column's own bit at 8
// and those of the columns before it below, and a table of the sixteen possible such numbers gives how many values of
// the group come first, or 0x80 (the index for which pshufb gives zero) where the own bit is not set. How many values
// the groups before have comes to that. Activations::quantized has its columns in the same order (Avx2::ArrangePiece).
class Places {
public:
  struct Constants {
    __m256i spread, low_bits, counts, before, own_bits, ranks;
    Constants() {
      // Mask bytes 0, 1; 2, 3 of both pieces for the low lane, 4, 5; 6, 7 for the high one, each in an int16.
      spread = Opaque(_mm256_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1, //
                                       4, -1, 5, -1, 6, -1, 7, -1, 12, -1, 13, -1, 14, -1, 15, -1));
      low_bits = Opaque(_mm256_set1_epi8(0x0f));
      counts = Opaque(BothLanes(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4)));
      before = Opaque(_mm256_set1_epi32(0x01010100)); // times four bytes: the sum of those before each of them
      own_bits = Opaque(BothLanes(_mm_setr_epi16(8, 8, 4, 4, 2, 2, 1, 1)));
      ranks = Opaque(BothLanes(_mm_setr_epi8(-128, -128, -128, -128, -128, -128, -128, -128, 0, 1, 1, 2, 1, 2, 2, 3)));
    }
  };

  Places(const Constants& constants, __m128i mask_bytes) : constants_(constants) {
    const __m256i bytes = _mm256_shuffle_epi8(BothLanes(mask_bytes), constants.spread);
    groups_ = _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), constants.low_bits);
    starts_ = _mm256_mullo_epi32(_mm256_shuffle_epi8(constants.counts, groups_), constants.before);
  }

  // Of a half piece: 0 and 1 of the first piece, 2 and 3 of the second.
  template <int half> __m256i Of() const {
    constexpr int kFourTimes = half * 0x55;
    const __m256i own = _mm256_mullo_epi16(_mm256_shuffle_epi32(groups_, kFourTimes), constants_.own_bits);
    return _mm256_add_epi8(_mm256_shuffle_epi8(constants_.ranks, own), _mm256_shuffle_epi32(starts_, kFourTimes));
  }

private:
  const Constants& constants_;
  __m256i groups_; // the mask bits of a group in each byte
  __m256i starts_; // the number of values of the groups before
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
  static Floats Larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats PowerOfTwo(Floats n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static void CopyAround(const float* from, int64_t count, float* to) {
    int64_t i = 0;
    if (reinterpret_cast<uintptr_t>(to) % 32 == 0) {
      for (; i + kFloats <= count; i += kFloats) _mm256_stream_ps(to + i, Load(from + i));
      _mm_sfence();
    }
    std::copy_n(from + i, count - i, to + i);
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
  static constexpr int kPieceVectors = 2;
  static Bytes LoadBytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  // Sums of products of vectors of weights and of Rows rows of X. The first factor of vpmaddubsw has no sign, so its sign
  // goes to the other; two products of at most 127 * 127 do not saturate its int16.
  template <ValueType type, int Rows> class Dots {
  public:
    Dots() : ones_(Opaque(_mm256_set1_epi16(1))) { Clear(); }
    void Clear() {
      for (auto& sum : sums_) sum = _mm256_setzero_si256();
    }
    void Add(int j, Bytes w, const int8_t* x, int64_t stride) {
      const __m256i size = _mm256_abs_epi8(w);
      for (int i = 0; i < Rows; ++i) {
        const __m256i inputs = LoadBytes(x + i * stride);
        // The signs of x go to the weights for one and two rows, where that is faster, those of the weights to x for more.
        const __m256i pairs = Rows <= 2 ? _mm256_maddubs_epi16(_mm256_abs_epi8(inputs), _mm256_sign_epi8(w, inputs))
                                        : _mm256_maddubs_epi16(size, _mm256_sign_epi8(inputs, w));
        if (type != ValueType::kInt4) AddPairs(i, pairs);
        else if (j == 0) first_[i] = pairs;
        else AddPairs(i, _mm256_add_epi16(first_[i], pairs)); // four products of at most 8 * 127
      }
    }
    Floats Sums(int i) const { return _mm256_cvtepi32_ps(sums_[i]); }

  private:
    void AddPairs(int i, __m256i pairs) { sums_[i] = _mm256_add_epi32(sums_[i], _mm256_madd_epi16(pairs, ones_)); }

    __m256i ones_, sums_[Rows], first_[Rows];
  };

  // One piece of X as int8, in the order of Places.
  static void ArrangePiece(int8_t* x) {
    Bytes arranged[kPieceVectors];
    EachDenseBytes(reinterpret_cast<const uint8_t*>(x), [&](int j, Bytes part) { arranged[j] = part; });
    for (int j = 0; j < kPieceVectors; ++j) StoreBytes(x + j * kBytes, arranged[j]);
  }

  template <class Use> static void EachDenseBytes(const uint8_t* piece, Use use) {
    const __m256i turn = BothLanes(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    use(0, _mm256_shuffle_epi8(LoadLanes(piece, piece + 32), turn));
    use(1, _mm256_shuffle_epi8(LoadLanes(piece + 16, piece + 48), turn));
  }

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

  static __m256i SumOfPairs(Bytes w) { return _mm256_maddubs_epi16(_mm256_set1_epi8(1), w); }
  static uint32_t LargePairs(__m256i sizes) { // two bits a pair
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi16(sizes, _mm256_set1_epi16(129))));
  }
  class Tally {
  public:
    void Add(Bytes w) {
      const __m256i pairs = SumOfPairs(w);
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
      large |= uint64_t{LargePairs(_mm256_abs_epi16(SumOfPairs(LoadBytes(weights + k))))} << k;
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

  // The int4 value in the low half of each byte.
  static Bytes FromHalfBytes(Bytes v) {
    return _mm256_sub_epi8(_mm256_and_si256(v, _mm256_set1_epi8(0x0f)), _mm256_set1_epi8(8));
  }
  static void UnpackInt4(const uint8_t* packed, int8_t* values) {
    // Its four quarters as 0, 2, 1, 3: then each interleaving gives values beside each other.
    const Bytes pairs = _mm256_permute4x64_epi64(LoadBytes(packed), 0xd8);
    const Bytes first = FromHalfBytes(pairs), second = FromHalfBytes(_mm256_srli_epi16(pairs, 4));
    StoreBytes(values, _mm256_unpacklo_epi8(first, second));
    StoreBytes(values + kBytes, _mm256_unpackhi_epi8(first, second));
  }

  template <ValueType type> using Scratch = typename Values<Avx2, type>::Scratch;

  struct Constants {
    Places::Constants places;
    Floats zero = _mm256_castsi256_ps(Opaque(_mm256_setzero_si256()));
    Constants() {}
  };

  template <ValueType type> class Cursor {
    static constexpr int64_t kElement = ElementBytes(type);

  public:
    Cursor(const Constants& constants, const uint8_t* values, const uint8_t* end, Scratch<type>* scratch)
        : constants_(constants), values_(values, end, scratch) {}

    static int64_t RowBytes(const MaskRow& mask, int64_t pieces) {
      int64_t bytes = 0;
      for (int64_t i = 0; i < pieces; ++i) bytes += PieceBytes<type>(CountFirst<64>(MaskWord(mask.piece(i))));
      return bytes;
    }

    // Calls use(j, columns 8 j to 8 j + 7 of the piece) for its eight parts.
    template <class Use> void EachFloats(const uint8_t* bits, Use use) {
      values_.Prepare();
      const uint64_t word = MaskWord(bits);
      const uint8_t* first = values_.Current(); // two chains of addresses, which the processor follows side by side
      const uint8_t* second = first + CountFirst<32>(word) * kElement;
      for (int j = 0; j < 4; ++j) use(j, TakeFloats(bits[j], &first));
      for (int j = 4; j < 8; ++j) use(j, TakeFloats(bits[j], &second));
      values_.Skip(CountFirst<64>(word));
    }

    // Calls use(j, the columns of vector j) for the two vectors of the piece.
    template <class Use> void EachBytes(const uint8_t* bits, Use use) {
      values_.Prepare();
      TakePiece<0>(Places(constants_.places, Load8(bits)), MaskWord(bits), use);
    }

    // Calls use(piece, j, the columns of vector j of the piece) for the vectors of two pieces beside each other.
    template <class Use> void EachBytesOfTwo(const uint8_t* bits, Use use) {
      values_.Prepare();
      const Places places(constants_.places, _mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
      TakePiece<0>(places, MaskWord(bits), [&](int j, __m256i w) { use(0, j, w); });
      TakePiece<1>(places, MaskWord(bits + 8), [&](int j, __m256i w) { use(1, j, w); });
    }

    // Where the next piece begins.
    const uint8_t* values() const { return values_.values(); }

  private:
    Floats TakeFloats(uint32_t bits, const uint8_t** values) const {
      constexpr ValueType kStored = type == ValueType::kInt4 ? ValueType::kInt8 : type;
      const Floats columns = ExpandFloats<kStored>(*values, bits, constants_.zero);
      *values += Count(bits) * kElement;
      return columns;
    }

    template <int piece, class Use> void TakePiece(const Places& places, uint64_t word, Use use) {
      const uint8_t* values = values_.Current();
      const __m256i first = LoadLanes(values, values + CountFirst<32>(word));
      use(0, _mm256_shuffle_epi8(first, places.Of<2 * piece>()));
      const __m256i second = LoadLanes(values + CountFirst<16>(word), values + CountFirst<48>(word));
      use(1, _mm256_shuffle_epi8(second, places.Of<2 * piece + 1>()));
      values_.Skip(CountFirst<64>(word));
    }

    const Constants& constants_;
    Values<Avx2, type> values_;
  };
};

} // namespace
} // namespace blockpress

#include "narrow_products.h"

namespace blockpress {

extern const Kernels kAvx2Kernels = {"avx2", Multiply<Avx2>, Quantize<Avx2>, Arrange<Avx2>, WantsTransposed<Avx2>,
                                     Attend<Avx2>, 0};
extern const Kernels kNarrowAvx2Kernels = {"avx2-128", MultiplyNarrow, Quantize<Avx2>, Arrange<Avx2>,
                                           WantsTransposed<Avx2>, Attend<Avx2>, kNarrowRows};

} // namespace blockpress

BLOCKPRESS_TARGET_END
