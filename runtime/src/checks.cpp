#include "checks.h"

#include <cinttypes>

namespace blockpress {
namespace {

constexpr const char* kNames[kWeightInputs] = {"mask", "values", "offsets", "scales", "bias"};

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int BitCount(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_popcountll(bits);
#else
  int count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
#endif
}

int64_t BytesOf(ort::ElementType type) {
  switch (type) {
    case ort::kInt64: return 8;
    case ort::kFloat: return 4;
    case ort::kFloat16:
    case ort::kBfloat16: return 2;
    default: return 1;
  }
}

bool TakeValueType(const Tensor& values, ValueType* type, Message* message) {
  switch (values.type) {
    case ort::kFloat: *type = ValueType::kFloat32; return true;
    case ort::kFloat16: *type = ValueType::kFloat16; return true;
    case ort::kBfloat16: *type = ValueType::kBfloat16; return true;
    case ort::kInt8: *type = ValueType::kInt8; return true;
    case ort::kUint8: *type = ValueType::kInt4; return true;
    default:
      return message->Set(
          "values must be float32, float16, bfloat16, int8, or uint8 (int4), but has element type %d of "
          "ONNX",
          static_cast<int>(values.type));
  }
}

// The type of the values is known.
bool CheckForms(const Tensor (&inputs)[kWeightInputs], Message* message) {
  return CheckForm(kNames[kMask], inputs[kMask], ort::kUint8, "uint8", 2, message) &&
         CheckForm(kNames[kValues], inputs[kValues], inputs[kValues].type, "", 1, message) &&
         CheckForm(kNames[kOffsets], inputs[kOffsets], ort::kInt64, "int64", 1, message) &&
         CheckForm(kNames[kScales], inputs[kScales], ort::kFloat, "float32", 2, message) &&
         CheckForm(kNames[kBias], inputs[kBias], ort::kFloat, "float32", 1, message);
}

// Takes the shapes of scales and bias.
bool TakeScales(const Attributes& attributes, const Tensor (&inputs)[kWeightInputs], Weight* weight,
                Message* message) {
  const int64_t* scales = inputs[kScales].dims;
  const int64_t whole = weight->pieces() * kPieceColumns;
  const int64_t groups = attributes.group_size == 0 ? 1 : CeilDiv(weight->columns, attributes.group_size);
  if (scales[0] == weight->rows && scales[1] == groups) {
    weight->scales_per_row = groups;
    weight->group_size = attributes.group_size == 0 ? whole : attributes.group_size;
  } else if (scales[0] == 1 && scales[1] == 1) {
    weight->scales_per_row = 0;
    weight->group_size = whole;
  } else {
    return message->Set("scales must have the shape (%" PRId64 ", %" PRId64 ") or (1, 1), but has (%" PRId64
                        ", %" PRId64 ")",
                        weight->rows, groups, scales[0], scales[1]);
  }
  const int64_t bias = inputs[kBias].dims[0];
  if (bias != weight->rows && bias != 1) {
    return message->Set("bias must have the shape (%" PRId64 ") or (1), but has (%" PRId64 ")",
                        weight->rows, bias);
  }
  weight->bias_per_row = bias == weight->rows;
  return true;
}

// Elements of `values` that the mask bits of a row take, or -1 where a bit past the last column is set.
int64_t RowElements(const Weight& weight, int64_t row) {
  int64_t elements = 0;
  uint64_t word = 0;
  for (int64_t piece = 0; piece < weight.pieces(); ++piece) {
    word = weight.mask_word(row, piece);
    const int count = BitCount(word);
    elements += weight.type == ValueType::kInt4 ? (count + 1) / 2 : count;
  }
  const int64_t used = weight.columns % kPieceColumns;
  return used != 0 && word >> used != 0 ? -1 : elements;
}

// Walks the mask: where the strips start and that nothing is left over.
bool CheckOffsets(const Weight& weight, int64_t value_count, Message* message) {
  const int64_t strips = CeilDiv(weight.rows, kStripRows);
  if (weight.offsets[0] != 0) {
    return message->Set("offsets must start at 0, but start at %" PRId64, weight.offsets[0]);
  }
  int64_t end = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    for (int64_t row = strip * kStripRows; row < weight.rows && row < (strip + 1) * kStripRows; ++row) {
      const int64_t elements = RowElements(weight, row);
      if (elements < 0) {
        return message->Set("row %" PRId64 " of mask has bits set beyond its %" PRId64 " columns", row,
                            weight.columns);
      }
      end += elements;
    }
    if (weight.offsets[strip + 1] != end) {
      return message->Set("offsets[%" PRId64 "] must be %" PRId64 " by the bits of mask, but is %" PRId64,
                          strip + 1, end, weight.offsets[strip + 1]);
    }
  }
  const int64_t padding = kPaddingBytes / ElementBytes(weight.type);
  if (value_count < padding || value_count - padding != end) {
    return message->Set("values must have %" PRId64 " elements and %" PRId64
                        " of padding by the bits of mask, but has %" PRId64 " in all",
                        end, padding, value_count);
  }
  return true;
}

} // namespace

bool CheckForm(const char* name, const Tensor& tensor, ort::ElementType type, const char* type_name, int64_t rank,
               Message* message) {
  if (tensor.type != type) {
    return message->Set("%s must be %s, but has element type %d of ONNX", name, type_name,
                        static_cast<int>(tensor.type));
  }
  if (tensor.rank != rank) {
    return message->Set("%s must have %" PRId64 " axes, but has %" PRId64, name, rank, tensor.rank);
  }
  const int64_t bytes = BytesOf(tensor.type);
  if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(bytes) == 0) return true;
  return message->Set("%s lies at an address that is no multiple of %" PRId64
                      " bytes; align it in the external data file",
                      name, bytes);
}

bool CheckActivationBits(int64_t activation_bits, Message* message) {
  if (activation_bits == 32 || activation_bits == 8) return true;
  return message->Set("activation_bits must be 32 or 8, but is %" PRId64, activation_bits);
}

bool CheckSummedColumns(int64_t columns, Message* message) {
  // A sum of products of int8, each at most 127 * 127, stays below 2^31.
  constexpr int64_t kMost = INT32_MAX / (127 * 127);
  if (columns <= kMost) return true;
  return message->Set("with activation_bits = 8 a scale may cover %" PRId64 " columns, but covers %" PRId64
                      "; int32 sums would overflow",
                      kMost, columns);
}

bool CheckAttributes(const Attributes& attributes, Message* message) {
  if (attributes.format_version != 1) {
    return message->Set("format_version %" PRId64
                        " is unknown, this library reads version 1; a newer blockpress-runtime may read it",
                        attributes.format_version);
  }
  if (attributes.columns < 1 || attributes.columns > kMaxColumns) {
    return message->Set("columns must be from 1 to %" PRId64 ", but is %" PRId64, kMaxColumns,
                        attributes.columns);
  }
  if (attributes.group_size < 0 || attributes.group_size % kPieceColumns != 0) {
    return message->Set("group_size must be 0 or a multiple of 64, but is %" PRId64,
                        attributes.group_size);
  }
  return CheckActivationBits(attributes.activation_bits, message);
}

bool CheckWeight(const Attributes& attributes, const Tensor (&inputs)[kWeightInputs], Weight* weight,
                 Message* message) {
  if (!TakeValueType(inputs[kValues], &weight->type, message) || !CheckForms(inputs, message)) return false;
  weight->rows = inputs[kMask].dims[0];
  weight->columns = attributes.columns;
  if (inputs[kMask].dims[1] != weight->mask_row_bytes()) {
    return message->Set("mask must have %" PRId64 " bytes in a row for %" PRId64
                        " columns, but has %" PRId64,
                        weight->mask_row_bytes(), weight->columns, inputs[kMask].dims[1]);
  }
  const int64_t entries = CeilDiv(weight->rows, kStripRows) + 1;
  if (inputs[kOffsets].dims[0] != entries) {
    return message->Set("offsets must have %" PRId64 " entries for %" PRId64 " rows, but has %" PRId64,
                        entries, weight->rows, inputs[kOffsets].dims[0]);
  }
  if (!TakeScales(attributes, inputs, weight, message)) return false;
  if (attributes.activation_bits == 8) {
    if (weight->type != ValueType::kInt8 && weight->type != ValueType::kInt4) {
      return message->Set("activation_bits = 8 is for int8 and int4 values only");
    }
    const int64_t summed = weight->group_size < weight->columns ? weight->group_size : weight->columns;
    if (!CheckSummedColumns(summed, message)) return false;
  }
  weight->mask = static_cast<const uint8_t*>(inputs[kMask].data);
  weight->mask_stride = weight->mask_row_bytes();
  weight->tail = nullptr;
  weight->tail_strip = 0;
  weight->values = static_cast<const uint8_t*>(inputs[kValues].data);
  weight->offsets = static_cast<const int64_t*>(inputs[kOffsets].data);
  weight->scales = static_cast<const float*>(inputs[kScales].data);
  weight->bias = static_cast<const float*>(inputs[kBias].data);
  return CheckOffsets(*weight, inputs[kValues].dims[0], message);
}

bool CheckExpertRows(int64_t expert_rows, Message* message) {
  if (expert_rows > 0 && expert_rows % kStripRows == 0) return true;
  return message->Set("expert_rows must be a multiple of 16 from 16 on, but is %" PRId64, expert_rows);
}

bool CheckExperts(const Weight& weight, int64_t expert_rows, Message* message) {
  if (weight.rows % expert_rows == 0) return true;
  return message->Set("the rows of mask must be a multiple of expert_rows, %" PRId64 ", but are %" PRId64, expert_rows,
                      weight.rows);
}

} // namespace blockpress
