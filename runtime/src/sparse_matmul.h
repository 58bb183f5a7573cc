// The operator SparseMatMul as ONNX Runtime sees it.
#pragma once

#include "ort_abi.h"

namespace blockpress {

extern const ort::CustomOp kSparseMatMul;

} // namespace blockpress
