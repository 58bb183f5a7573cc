// SparseMatMul, SparseMatMul2 and SparseMatMul3: one x times one, two and three weights.

#include "ort_operator.h"

namespace blockpress {
namespace {

ort::Status* BLOCKPRESS_ORT_CALL Compute(void* self, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  const int count = kernel.op->weights;
  Input x;
  int64_t rows = 0;
  Product of[kMostWeights];
  if (auto* status = TakeX(kernel, context, kernel.attributes.columns, &x, &rows)) return status;
  for (int i = 0; i < count; ++i) {
    if (auto* status = TakeWeight(kernel, context, i, &of[i].weight)) return status;
    of[i].first = 0;
    of[i].rows = rows;
    of[i].ordered = nullptr;
  }
  for (int i = 0; i < count; ++i) {
    if (auto* status = TakeOutput(kernel, context, i, of[i].weight.rows, &x, &of[i].y)) return status;
  }
  const bool rounded = kernel.attributes.activation_bits == 8;
  Session session(kernel, context);
  return Multiply(*kernel.kernels,
                  {static_cast<const float*>(x.data), rows, kernel.attributes.columns, rounded, nullptr, of, count},
                  &session);
}

} // namespace

extern const ProductOperator kSparseMatMul[kMostWeights] = {MakeProductOperator("SparseMatMul", 1, false, &Compute),
                                                            MakeProductOperator("SparseMatMul2", 2, false, &Compute),
                                                            MakeProductOperator("SparseMatMul3", 3, false, &Compute)};

} // namespace blockpress
