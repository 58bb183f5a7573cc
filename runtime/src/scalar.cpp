// The kernels in plain C++: every machine runs them, and the tests hold the others against them. Sums are kept in
// double (those of int8 products in int64).

#include <cmath>
#include <type_traits>

#include "bits.h"
#include "kernels.h"

namespace blockpress {
namespace {

constexpr int64_t kRowsAtOnce = 8; // activation rows that share one walk over the mask

template <typename T>
T Load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31;
  const uint32_t fraction = half & 1023;
  if (exponent == 31) return FromBits(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return FromBits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  return sign != 0 ? -magnitude : magnitude;
}

// The stored weight `index` of a piece whose first is at `bytes`.
template <ValueType type>
auto StoredWeight(const uint8_t* bytes, int64_t index) {
  if constexpr (type == ValueType::kFloat32) return Load<float>(bytes + 4 * index);
  if constexpr (type == ValueType::kFloat16) return HalfToFloat(Load<uint16_t>(bytes + 2 * index));
  if constexpr (type == ValueType::kBfloat16) {
    return FromBits(static_cast<uint32_t>(Load<uint16_t>(bytes + 2 * index)) << 16);
  }
  if constexpr (type == ValueType::kInt8) return static_cast<int>(static_cast<int8_t>(bytes[index]));
  if constexpr (type == ValueType::kInt4) return (bytes[index / 2] >> (index % 2 * 4) & 15) - 8;
}

template <ValueType type>
int64_t PieceBytes(int64_t count) {
  return type == ValueType::kInt4 ? (count + 1) / 2 : count * ElementBytes(type);
}

// One row of W times up to kRowsAtOnce rows of X: writes `sums`, and returns where the next row's values start.
template <ValueType type, typename Element, typename Sum>
const uint8_t* MultiplyRow(const Weight& weight, int64_t row, const uint8_t* values, const Element* x, int64_t stride,
                           int64_t x_rows, double* sums) {
  for (int64_t i = 0; i < x_rows; ++i) sums[i] = 0;
  const float* scales = weight.row_scales(row);
  const int64_t pieces_per_group = weight.group_size / kPieceColumns;
  for (int64_t first = 0, group = 0; first < weight.pieces(); first += pieces_per_group, ++group) {
    Sum group_sums[kRowsAtOnce] = {};
    for (int64_t piece = first; piece < weight.pieces() && piece < first + pieces_per_group; ++piece) {
      int64_t count = 0;
      for (uint64_t word = weight.mask_word(row, piece); word != 0; word &= word - 1) {
        const Element* column = x + piece * kPieceColumns + LowestBit(word);
        const Sum w = StoredWeight<type>(values, count++);
        for (int64_t i = 0; i < x_rows; ++i) group_sums[i] += w * column[i * stride];
      }
      values += PieceBytes<type>(count);
    }
    for (int64_t i = 0; i < x_rows; ++i) {
      sums[i] += static_cast<double>(scales[group]) * static_cast<double>(group_sums[i]);
    }
  }
  return values;
}

template <ValueType type, typename Element, typename Sum>
void MultiplyStrips(const Weight& weight, const Element* x, const Activations& activations, int64_t first_strip,
                    int64_t last_strip, float* y) {
  for (int64_t strip = first_strip; strip < last_strip; ++strip) {
    for (int64_t first = 0; first < activations.rows; first += kRowsAtOnce) {
      const int64_t left = activations.rows - first;
      const int64_t x_rows = left < kRowsAtOnce ? left : kRowsAtOnce;
      const uint8_t* values = weight.strip_values(strip);
      for (int64_t row = strip * kStripRows; row < weight.rows && row < (strip + 1) * kStripRows; ++row) {
        double sums[kRowsAtOnce];
        values = MultiplyRow<type, Element, Sum>(weight, row, values, x + first * activations.stride,
                                                 activations.stride, x_rows, sums);
        for (int64_t i = 0; i < x_rows; ++i) {
          const double step = activations.scales != nullptr ? activations.scales[first + i] : 1;
          y[(first + i) * weight.rows + row] = static_cast<float>(sums[i] * step + weight.row_bias(row));
        }
      }
    }
  }
}

void Multiply(const Weight& weight, const Activations& activations, int64_t first_strip, int64_t last_strip,
              float* y) {
  const auto floats = [&](auto type) {
    MultiplyStrips<type(), float, double>(weight, activations.x, activations, first_strip, last_strip, y);
  };
  const auto int8s = [&](auto type) {
    MultiplyStrips<type(), int8_t, int64_t>(weight, activations.quantized, activations, first_strip, last_strip, y);
  };
  const bool quantized = activations.quantized != nullptr;
  switch (weight.type) {
    case ValueType::kFloat32: return floats(std::integral_constant<ValueType, ValueType::kFloat32>());
    case ValueType::kFloat16: return floats(std::integral_constant<ValueType, ValueType::kFloat16>());
    case ValueType::kBfloat16: return floats(std::integral_constant<ValueType, ValueType::kBfloat16>());
    case ValueType::kInt8: {
      constexpr std::integral_constant<ValueType, ValueType::kInt8> type;
      return quantized ? int8s(type) : floats(type);
    }
    case ValueType::kInt4: {
      constexpr std::integral_constant<ValueType, ValueType::kInt4> type;
      return quantized ? int8s(type) : floats(type);
    }
  }
}

float Quantize(const float* x, int64_t columns, int64_t stride, int8_t* quantized) {
  std::memset(quantized, 0, static_cast<size_t>(stride));
  float largest = 0;
  for (int64_t k = 0; k < columns; ++k) {
    if (!std::isfinite(x[k])) return NAN;
    largest = std::fmax(largest, std::fabs(x[k]));
  }
  const float step = largest / 127;
  if (step == 0) return 1; // all zero, or so small that the step is
  for (int64_t k = 0; k < columns; ++k) {
    // The quotient passes 127 only where the step is subnormal and so a rounded one.
    const float rounded = std::nearbyint(x[k] / step);
    quantized[k] = static_cast<int8_t>(std::fmin(127.0f, std::fmax(-127.0f, rounded)));
  }
  return step;
}

void Arrange(int8_t*, int64_t) {} // as they are

bool WantsTransposed(const Weight&, const Activations&) { return false; }

} // namespace

extern const Kernels kScalarKernels = {"scalar", &Multiply, &Quantize, &Arrange, &WantsTransposed,
                                       &AttendScalar, 0};

} // namespace blockpress
