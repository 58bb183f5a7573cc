// The operators SparseMatMul, SparseMatMul2 and SparseMatMul3 as ONNX Runtime sees them: one, two and three weights.
#pragma once

#include "ort_abi.h"

namespace blockpress {

constexpr int kOperatorCount = 3;
extern const ort::CustomOp kSparseMatMul[kOperatorCount];

} // namespace blockpress
