// What FORMAT.md tells a reader to check before the first product.
#pragma once

#include "message.h"
#include "ort_abi.h"
#include "weight.h"

namespace blockpress {

constexpr int kMaxRank = 8; // of the weight's tensors; one with more axes is refused anyway

// A tensor as ONNX Runtime gives it; `dims` holds the first kMaxRank axes.
struct Tensor {
  ort::ElementType type;
  int64_t rank;
  int64_t dims[kMaxRank];
  const void* data;
};

// The inputs that are a weight, in their order.
enum WeightInput : int { kMask, kValues, kOffsets, kScales, kBias, kWeightInputs };

struct Attributes {
  int64_t format_version;
  int64_t columns;
  int64_t group_size;
  int64_t activation_bits;
};

constexpr int64_t kMaxColumns = INT32_MAX;

// Whether the input of this name has this type, of that name, so many axes, and an address that fits its elements.
bool CheckForm(const char* name, const Tensor& tensor, ort::ElementType type, const char* type_name, int64_t rank,
               Message* message);

bool CheckActivationBits(int64_t activation_bits, Message* message);

// Whether products of int8 in so many columns, rounded, fit in an int32 sum.
bool CheckSummedColumns(int64_t columns, Message* message);

// Whether the attributes hold by themselves; if not, `message` says which does not and why.
bool CheckAttributes(const Attributes& attributes, Message* message);

// Whether no kernel can be led outside of the tensors; then `weight` is what the kernels read. Reads every byte of the
// mask, none of the values. The attributes are checked ones.
bool CheckWeight(const Attributes& attributes, const Tensor (&inputs)[kWeightInputs], Weight* weight, Message* message);

// Whether an expert may have so many rows, and whether the weight is that of experts of so many.
bool CheckExpertRows(int64_t expert_rows, Message* message);
bool CheckExperts(const Weight& weight, int64_t expert_rows, Message* message);

} // namespace blockpress
