// One or two rows of X times int8 weights on processors whose units are 128 bits wide, though they run AVX2 (the first
// EPYC and Ryzen). There, every instruction of Places counts twice, so that an index from a table, for eight columns at a
// time, is less work. A byte of the mask gives the sixteen indices that put each value into the high byte of an int16:
// times 256, with its sign. X comes as int16 in its own order (Activations::widened).
//
// For avx2.cpp alone, which gives the vectors (Avx2) and includes this where the instruction set is set.
#pragma once

#include "bits.h"
#include "loops.h"

namespace blockpress {
namespace {

// For each mask byte and each of its columns an index that gives zero, and one of the column's value or, once more, zero.
constexpr std::array<std::array<uint8_t, 16>, 256> HighByteIndices() {
  std::array<std::array<uint8_t, 16>, 256> table{};
  for (int bits = 0; bits < 256; ++bits) {
    const auto places = ExpandIndices<1>()[bits];
    for (int k = 0; k < 8; ++k) {
      table[bits][2 * k] = 0x80;
      table[bits][2 * k + 1] = places[k];
    }
  }
  return table;
}

constexpr int64_t kNarrowRows = 2; // with more, expanding the weights is not what takes the time

template <int Rows> class NarrowProduct {
  // An int32 holds 520 products of at most 256 * 127 * 127. Each lane of two sums gets eight of them from a piece.
  static constexpr int64_t kMostPieces = 64;
  static constexpr int kSums = 2;

public:
  NarrowProduct(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row, float* y)
      : weight_(weight), x_(x), y_(y), values_(weight.strip_values(first_row / kStripRows)) {
    for (int64_t row = first_row; row < last_row; ++row) MultiplyRow(row);
  }

private:
  void MultiplyRow(int64_t row) {
    const MaskRow mask(weight_, row);
    FetchNextMask<Avx2>(weight_, row);
    __m128 total[Rows];
    for (auto& sum : total) sum = _mm_setzero_ps();
    EachGroup(weight_, weight_.row_scales(row), 0, weight_.pieces(), [&](float scale, int64_t first, int64_t last) {
      for (; first < last; first += kMostPieces) AddPieces(mask, first, std::min(first + kMostPieces, last), scale, total);
    });
    for (int i = 0; i < Rows; ++i) {
      const __m128 two = _mm_add_ps(total[i], _mm_movehl_ps(total[i], total[i]));
      const float sum = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
      y_[i * weight_.rows + row] = sum * x_.scales[i] + weight_.row_bias(row);
    }
  }

  BLOCKPRESS_INLINE void AddPieces(const MaskRow& mask, int64_t first, int64_t last, float scale, __m128* total) {
    __m128i sums[Rows][kSums];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = _mm_setzero_si128();
    const int64_t whole = std::min(last, mask.whole_pieces());
    for (int64_t piece = first; piece < whole; ++piece) AddPiece(mask.whole_piece(piece), piece, sums);
    for (int64_t piece = std::max(first, whole); piece < last; ++piece) AddPiece(mask.piece(piece), piece, sums);
    for (int i = 0; i < Rows; ++i) {
      const __m128i sum = _mm_add_epi32(_mm_srai_epi32(sums[i][0], 8), _mm_srai_epi32(sums[i][1], 8));
      total[i] = _mm_fmadd_ps(_mm_cvtepi32_ps(sum), _mm_set1_ps(scale), total[i]);
    }
  }

  // The same word, of which nothing is worked out before this: else that of the last piece is, for every row.
  static uint64_t NotAhead(uint64_t word) {
#if defined(__GNUC__)
    asm volatile("" : "+r"(word));
#endif
    return word;
  }

  template <int j> static uint64_t SixteenTimesByte(uint64_t word) {
    constexpr int kRight = (8 * j + 60) % 64; // one instruction, where a shift is two
    return (word >> kRight | word << (64 - kRight)) & 0xff0;
  }

  BLOCKPRESS_INLINE void AddPiece(const uint8_t* bits, int64_t piece, __m128i (*sums)[kSums]) {
    FetchValues<Avx2, ValueType::kInt8>(values_);
    const uint64_t word = NotAhead(MaskWord(bits));
    const uint8_t* values = values_;
    const int16_t* inputs = x_.widened + piece * kPieceColumns;
    const auto add = [&](auto part) {
      constexpr int j = decltype(part)::value;
      const uint64_t place = SixteenTimesByte<j>(word); // of the indices in the table
      const __m128i indices = _mm_load_si128(reinterpret_cast<const __m128i*>(kIndices[0].data() + place));
      const __m128i w = _mm_shuffle_epi8(Load8(values), indices);
      for (int i = 0; i < Rows; ++i) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(inputs + i * x_.stride + 8 * j));
        sums[i][j % kSums] = _mm_add_epi32(sums[i][j % kSums], _mm_madd_epi16(w, x));
      }
      values += _mm_popcnt_u64(place);
    };
    add(std::integral_constant<int, 0>()), add(std::integral_constant<int, 1>());
    add(std::integral_constant<int, 2>()), add(std::integral_constant<int, 3>());
    add(std::integral_constant<int, 4>()), add(std::integral_constant<int, 5>());
    add(std::integral_constant<int, 6>()), add(std::integral_constant<int, 7>());
    values_ += _mm_popcnt_u64(word); // and not where `values` is: that takes longer to be known
  }

  alignas(64) static constexpr auto kIndices = HighByteIndices();

  const Weight& weight_;
  const Activations& x_;
  float* const y_;
  const uint8_t* values_; // where the next piece begins
};

template <int Rows>
BLOCKPRESS_NOINLINE void MultiplyNarrow(const Weight& weight, const Activations& x, int64_t first_row, int64_t last_row,
                                        float* y) {
  NarrowProduct<Rows>(weight, x, first_row, last_row, y);
}

// What Kernels::multiply is, for these processors.
void MultiplyNarrow(const Weight& weight, const Activations& x, int64_t first_strip, int64_t last_strip, float* y) {
  const bool few = x.rows == 1 || x.rows == kNarrowRows;
  if (!few || x.widened == nullptr || weight.type != ValueType::kInt8 || weight.dense())
    return Multiply<Avx2>(weight, x, first_strip, last_strip, y);
  const int64_t first = first_strip * kStripRows;
  const int64_t last = std::min(last_strip * kStripRows, weight.rows);
  if (x.rows == 1) MultiplyNarrow<1>(weight, x, first, last, y);
  else MultiplyNarrow<2>(weight, x, first, last, y);
}

} // namespace
} // namespace blockpress
