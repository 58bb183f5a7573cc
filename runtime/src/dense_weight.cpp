#include "dense_weight.h"

#include <cinttypes>
#include <cstring>

namespace blockpress {

bool DenseParts::Make(const Tensor (&inputs)[kDenseInputs], int64_t activation_bits, Weight* weight,
                      Message* message) {
  if (!CheckForm("weight", inputs[kDenseValues], ort::kInt8, "int8", 2, message) ||
      !CheckForm("scales", inputs[kDenseScales], ort::kFloat, "float32", 1, message) ||
      !CheckForm("bias", inputs[kDenseBias], ort::kFloat, "float32", 1, message))
    return false;
  const int64_t rows = inputs[kDenseValues].dims[0], columns = inputs[kDenseValues].dims[1];
  const int64_t scales = inputs[kDenseScales].dims[0], bias = inputs[kDenseBias].dims[0];
  if (columns < 1 || columns > kMaxColumns)
    return message->Set("weight must have 1 to %" PRId64 " columns, but has %" PRId64, kMaxColumns, columns);
  if (activation_bits == 8 && !CheckSummedColumns(columns, message)) return false;
  if (scales != rows)
    return message->Set("scales must have the shape (%" PRId64 "), but has (%" PRId64 ")", rows, scales);
  if (bias != rows && bias != 1)
    return message->Set("bias must have the shape (%" PRId64 ") or (1), but has (%" PRId64 ")", rows, bias);
  *weight = {};
  weight->type = ValueType::kInt8;
  weight->rows = rows;
  weight->columns = columns;
  weight->group_size = weight->pieces() * kPieceColumns;
  weight->scales = static_cast<const float*>(inputs[kDenseScales].data);
  weight->scales_per_row = 1;
  weight->bias = static_cast<const float*>(inputs[kDenseBias].data);
  weight->bias_per_row = bias == rows;
  return Fill(inputs[kDenseValues], weight) || message->Set("out of memory for the weight's last rows");
}

bool DenseParts::Fill(const Tensor& values, Weight* weight) {
  const int64_t rows = weight->rows, columns = weight->columns, mask_bytes = weight->mask_row_bytes();
  const int64_t strips = weight->strips();
  int64_t tail_strip = strips, tail_bytes = 0;
  while (tail_strip > 0 && tail_bytes < kPaddingBytes) tail_bytes = (rows - --tail_strip * kStripRows) * columns;
  auto* mask = mask_.Allocate<uint8_t>(mask_bytes);
  auto* offsets = offsets_.Allocate<int64_t>(strips + 1);
  auto* tail = tail_.Allocate<uint8_t>(tail_bytes + kPaddingBytes);
  if (mask == nullptr || offsets == nullptr || tail == nullptr) return false;
  std::memset(mask, 0xff, static_cast<size_t>(mask_bytes));
  if (columns % 8 != 0) mask[mask_bytes - 1] = static_cast<uint8_t>((1 << columns % 8) - 1);
  for (int64_t strip = 0; strip < strips; ++strip) offsets[strip] = strip * kStripRows * columns;
  offsets[strips] = rows * columns;
  weight->values = static_cast<const uint8_t*>(values.data);
  if (tail_bytes != 0) std::memcpy(tail, weight->values + offsets[tail_strip], static_cast<size_t>(tail_bytes));
  std::memset(tail + tail_bytes, 0, kPaddingBytes);
  weight->mask = mask;
  weight->offsets = offsets;
  weight->tail = tail;
  weight->tail_strip = tail_strip;
  return true;
}

} // namespace blockpress
