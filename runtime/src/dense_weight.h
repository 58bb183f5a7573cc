// A matrix of int8 of which every weight is stored, as a Weight: read where it lies, by the kernels of packed ones.
#pragma once

#include "buffer.h"
#include "checks.h"
#include "message.h"
#include "weight.h"

namespace blockpress {

// The inputs that are a dense weight, in their order: int8 (N, K), float32 (N), float32 (N) or (1).
enum DenseInput : int { kDenseValues, kDenseScales, kDenseBias, kDenseInputs };

// What a dense weight has beside its tensors: a row of the mask, offsets, and a copy of its last strips, as kernels load
// whole vectors at the last values.
class DenseParts {
public:
  // Whether no kernel can be led outside of the tensors; then `weight` is what the kernels read, as long as the parts and
  // the tensors are there. Once for each object.
  bool Make(const Tensor (&inputs)[kDenseInputs], int64_t activation_bits, Weight* weight, Message* message);

private:
  bool Fill(const Tensor& values, Weight* weight);

  Buffer mask_, offsets_, tail_;
};

} // namespace blockpress
