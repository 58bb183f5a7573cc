// A packed matrix and the rows that are multiplied with it, as kernels see them: checked, and not owned.
// The layout is that of FORMAT.md.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace blockpress {

constexpr int64_t kStripRows = 16;    // rows between two entries of `offsets`
constexpr int64_t kPieceColumns = 64; // columns that one mask word covers
constexpr int64_t kPaddingBytes = 64; // zeros after the last value

enum class ValueType { kFloat32, kFloat16, kBfloat16, kInt8, kInt4 };

// Bytes of one element of `values`; an int4 element is a byte with two values.
constexpr int64_t ElementBytes(ValueType type) {
  return type == ValueType::kFloat32 ? 4 : type == ValueType::kFloat16 || type == ValueType::kBfloat16 ? 2 : 1;
}

// W (rows, columns). A dense one looks the same: one row of set bits is the mask of all (dense_weight.h).
struct Weight {
  ValueType type;
  int64_t rows;
  int64_t columns;
  int64_t group_size; // a multiple of 64, or `columns` rounded up to one where a row has a single scale
  const uint8_t* mask;
  int64_t mask_stride; // bytes from one row of the mask to the next; 0 where the weight is dense
  const uint8_t* values;
  const uint8_t* tail; // values of the last strips, where they do not follow the others; else null
  int64_t tail_strip;  // the first of those
  const int64_t* offsets;
  const float* scales;
  int64_t scales_per_row; // 0 where one scale holds for every row
  const float* bias;
  bool bias_per_row; // false where one bias holds for every row

  bool dense() const { return mask_stride == 0; }
  int64_t strips() const { return (rows + kStripRows - 1) / kStripRows; }
  int64_t pieces() const { return (columns + kPieceColumns - 1) / kPieceColumns; }
  int64_t mask_row_bytes() const { return (columns + 7) / 8; }
  const float* row_scales(int64_t row) const { return scales + row * scales_per_row; }
  float row_bias(int64_t row) const { return bias_per_row ? bias[row] : bias[0]; }

  // The mask bits of columns 64 * piece to 64 * piece + 63 of a row; those past the last column are 0.
  uint64_t mask_word(int64_t row, int64_t piece) const {
    const uint8_t* bytes = mask + row * mask_stride + piece * 8;
    uint64_t word = 0;
    const int64_t left = mask_row_bytes() - piece * 8;
    if (left >= 8) {
      std::memcpy(&word, bytes, 8);
    } else {
      for (int64_t i = 0; i < left; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    }
    return word;
  }
  const uint8_t* strip_values(int64_t strip) const {
    const bool in_tail = tail != nullptr && strip >= tail_strip;
    const int64_t elements = offsets[strip] - (in_tail ? offsets[tail_strip] : 0);
    return (in_tail ? tail : values) + elements * ElementBytes(type);
  }
};

// The mask of one row in pieces of eight bytes, the last one filled up with zeros.
class MaskRow {
public:
  MaskRow(const Weight& weight, int64_t row)
      : bytes_(weight.mask + row * weight.mask_stride), whole_(weight.mask_row_bytes() / 8) {
    const int64_t left = weight.mask_row_bytes() - whole_ * 8;
    if (left != 0) std::memcpy(last_, bytes_ + whole_ * 8, static_cast<size_t>(left)); // a call, at every row
  }
  const uint8_t* piece(int64_t i) const { return i < whole_ ? bytes_ + i * 8 : last_; }

  // The pieces of eight bytes, which lie beside each other.
  int64_t whole_pieces() const { return whole_; }
  const uint8_t* whole_piece(int64_t i) const { return bytes_ + i * 8; }

private:
  const uint8_t* bytes_;
  int64_t whole_;
  uint8_t last_[8] = {};
};

// X (rows, columns), the rows padded with zeros to whole pieces of 64 columns.
struct Activations {
  int64_t rows;
  int64_t stride;           // elements from one row to the next: the columns rounded up to whole pieces
  const float* x;           // null where x is used as int8
  const int8_t* quantized;  // null where x is used as float32; values from -127 to 127, in Kernels::arrange's order
  const int16_t* widened;   // `quantized` once more, by columns; null where the kernels do not want it
  const float* scales;      // (rows): the step of each row of `quantized`
  const int8_t* transposed; // (stride, transposed_width): `quantized` once more; null where the kernels do not want it
  int64_t transposed_width; // the rows rounded up to whole kTransposedRows, with zeros

  // Rows first to first + count - 1.
  Activations part(int64_t first, int64_t count) const {
    Activations part = *this;
    part.rows = count;
    if (x != nullptr) part.x += first * stride;
    if (quantized != nullptr) {
      part.quantized += first * stride;
      part.scales += first;
    }
    if (widened != nullptr) part.widened += first * stride;
    if (transposed != nullptr) part.transposed += first;
    return part;
  }
};

constexpr int64_t kTransposedRows = 16;
constexpr int64_t TransposedWidth(int64_t rows) {
  return (rows + kTransposedRows - 1) / kTransposedRows * kTransposedRows;
}

// Swaps the bits of a under mask << shift with those of b under mask.
inline void SwapBits(uint64_t& a, uint64_t& b, int shift, uint64_t mask) {
  const uint64_t different = (a >> shift ^ b) & mask;
  a ^= different << shift;
  b ^= different;
}

// Writes columns first to last - 1, a multiple of 8, of `transposed`.
inline void Transpose(const Activations& x, int64_t first, int64_t last, int8_t* transposed) {
  const int64_t width = TransposedWidth(x.rows);
  for (int64_t m = 0; m < width; m += 8)
    for (int64_t k = first; k < last; k += 8) {
      uint64_t rows[8] = {}; // a square of eight by eight bytes, of which ever smaller squares change places
      for (int64_t i = 0; i < 8 && m + i < x.rows; ++i) std::memcpy(&rows[i], x.quantized + (m + i) * x.stride + k, 8);
      for (int i = 0; i < 4; ++i) SwapBits(rows[i], rows[i + 4], 32, 0x00000000ffffffffu);
      for (int i : {0, 1, 4, 5}) SwapBits(rows[i], rows[i + 2], 16, 0x0000ffff0000ffffu);
      for (int i : {0, 2, 4, 6}) SwapBits(rows[i], rows[i + 1], 8, 0x00ff00ff00ff00ffu);
      for (int64_t i = 0; i < 8; ++i) std::memcpy(transposed + (k + i) * width + m, &rows[i], 8);
    }
}

} // namespace blockpress
